"""docs/from_verl.md: every key of the recipe has a row, and every key of ours that a row names exists."""

import re
from collections.abc import Iterator
from itertools import chain

import yaml

from megatron_gkd.config import GkdConfig
from megatron_gkd.config.base import Config, sections_of
from tests.support.processes import ROOT

PAGE = ROOT / "docs" / "from_verl.md"

# the recipe's configuration and what its code reads beside it (verl-recipe 48ea0a7); lists are keys without keys of their own
RECIPE = yaml.safe_load("""
data: [
  tokenizer, train_files, val_files, prompt_key, reward_fn_key, max_prompt_length, max_response_length, train_batch_size,
  val_batch_size, return_raw_input_ids, return_raw_chat, return_full_prompt, shuffle, filter_overlong_prompts,
  filter_overlong_prompts_workers, truncation, trust_remote_code, custom_cls.path, custom_cls.name, sampler.class_path,
  sampler.class_name, dataloader_num_workers, return_multi_modal_inputs]
actor_rollout_ref: [hybrid_engine, nccl_timeout]
actor_rollout_ref.model: [
  path, custom_chat_template, external_lib, override_config.model_config, override_config.moe_config.freeze_moe_router,
  enable_gradient_checkpointing, use_remove_padding, trust_remote_code]
actor_rollout_ref.actor: [
  strategy, micro_batch_size, data_loader_seed, load_weight, use_dynamic_bsz, max_token_len, use_torch_compile, shuffle]
actor_rollout_ref.actor.megatron: [
  param_offload, grad_offload, optimizer_offload, tensor_model_parallel_size, pipeline_model_parallel_size,
  context_parallel_size, expert_model_parallel_size, expert_tensor_parallel_size, virtual_pipeline_model_parallel_size,
  sequence_parallel, use_distributed_optimizer, use_dist_checkpointing, dist_checkpointing_path, seed,
  override_transformer_config, use_mbridge]
actor_rollout_ref.actor.optim: [
  lr, weight_decay, optimizer, clip_grad, lr_warmup_steps_ratio, lr_warmup_steps, lr_warmup_init, total_training_steps,
  lr_decay_steps, lr_decay_style, min_lr, weight_decay_incr_style, lr_wsd_decay_style, lr_wsd_decay_steps,
  use_checkpoint_opt_param_scheduler]
actor_rollout_ref.actor.checkpoint: [async_save, save_contents, load_contents]
actor_rollout_ref.actor.profiler: [tool, enable, all_ranks, ranks, save_path]
actor_rollout_ref.actor.profiler.tool_config: [
  nsys.discrete, npu.contents, npu.level, npu.analysis, torch.step_start, torch.step_end]
actor_rollout_ref.actor.distill_loss: [name, rkl_ratio, beta]
actor_rollout_ref.rollout: [
  name, mode, temperature, top_k, top_p, data_parallel_size, tensor_model_parallel_size, pipeline_model_parallel_size,
  expert_parallel_size, prompt_length, response_length, dtype, gpu_memory_utilization, ignore_eos, enforce_eager,
  free_cache_engine, load_format, max_num_batched_tokens, max_model_len, max_num_seqs, disable_log_stats,
  enable_chunked_prefill, do_sample, layer_name_map.qkv_layer_name, layer_name_map.gate_proj_layer_name,
  engine_kwargs.vllm.swap_space, engine_kwargs.vllm.disable_mm_preprocessor_cache, engine_kwargs.sglang.attention_backend,
  agent.num_workers, agent.custom_async_server.path, agent.custom_async_server.name, update_weights_bucket_megabytes,
  calculate_log_probs]
actor_rollout_ref.rollout.val_kwargs: [top_k, top_p, temperature, n, do_sample]
actor_rollout_ref.rollout.multi_turn: [
  enable, format, max_assistant_turns, max_user_turns, tool_config_path, interaction_config_path, max_parallel_calls,
  max_tool_response_length, tool_response_truncate_side, use_inference_chat_template, tokenization_sanity_check_mode]
actor_rollout_ref.teacher: [server_ip, server_port, n_server_workers, overlap_rollout]
trainer: [
  balance_batch, total_epochs, total_training_steps, profile_steps, project_name, experiment_name, logger,
  log_val_generations, nnodes, n_gpus_per_node, save_freq, esi_redundant_time, resume_mode, resume_from_path,
  del_local_ckpt_after_load, val_before_train, test_freq, critic_warmup, default_hdfs_dir, default_local_dir,
  max_actor_ckpt_to_keep, max_critic_ckpt_to_keep, ray_wait_register_center_timeout, device, scheduler]
rollout: [nnodes, n_gpus_per_node]
ray_init: [num_cpus, timeline_json_file]
""")


def rows() -> list[tuple[str, str]]:
    lines = [
        line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")
    ]
    assert all(len(cells) == 2 for cells in lines)
    return [(key.strip("`"), home) for key, home in lines]


def expand(key: str) -> list[str]:
    """``a.{b,c}`` as [a.b, a.c]."""
    found = re.fullmatch(r"(.*)\{(.*)\}", key)
    return [found[1] + part for part in found[2].split(",")] if found else [key]


def our_keys(section: type[Config], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in sections_of(field).values():
            yield from our_keys(kind, f"{prefix}{name}.")


def test_every_key_of_the_recipe_has_one_row():
    expected = [f"{section}.{key}" for section, keys in RECIPE.items() for key in keys]
    got = list(chain.from_iterable(expand(key) for key, _ in rows()))
    assert sorted(got) == sorted(expected)


def test_every_key_that_a_row_names_exists():
    keys, sections = set(our_keys(GkdConfig)), set(GkdConfig.model_fields)
    named = {
        word.partition("=")[0]
        for _, home in rows()
        for word in re.findall(r"`([^`]*)`", home)
        if word.partition(".")[0] in sections
    }
    assert len(named) > 40
    assert named <= keys, f"no such keys: {', '.join(sorted(named - keys))}"
