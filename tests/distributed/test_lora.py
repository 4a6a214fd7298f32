"""Adapters compute, train, merge and resume as W + scale B A does in plain torch, in every layout.

Their names in PEFT's format: tests/unit/reshard/test_lora_slices.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.support.on_ranks import CPU, DP, PP2, TP2, TP2_PP2, TP2_PP2_SP, TP2_SP, Split, allow_saving
from tests.support.run_config import write_config
from tests.support.run_parts import (
    PROBE,
    build_parts,
    check_resume,
    copy_of,
    leave,
    make_batch,
    make_store,
    make_world,
    update,
)
from tests.support.tiny_models import EOS_ID, SMALL, write_tiny_model

OPTIM = {"lr": 1e-2, "warmup_iters": 2, "decay_style": "cosine", "weight_decay": 0.1, "clip_grad": 0.0}
LORA = {"rank": 3, "alpha": 6.0}
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYOUTS = [(2, DP), (2, TP2), (2, TP2_SP), (2, PP2), (4, TP2_PP2), (4, TP2_PP2_SP)]


@pytest.fixture(scope="module", params=["llama_tied", "qwen3_untied"])
def models(request, tmp_path_factory) -> tuple[Path, Path]:
    return _write_models(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tied_models(tmp_path_factory) -> tuple[Path, Path]:
    return _write_models(tmp_path_factory.mktemp("tied"), "llama_tied")


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory) -> Path:
    from tests.support.reference_lora import write_random_adapters

    return write_random_adapters(models[0], tmp_path_factory.mktemp("random") / "a", 3, ALL_MODULES)


@pytest.fixture(scope="module")
def plain(models, adapters) -> tuple[float, dict[str, torch.Tensor]]:
    from tests.support.reference_lora import loss_and_gradients

    return loss_and_gradients(*models, adapters, 2.0, make_batch(0))


@pytest.fixture(scope="module")
def unsplit(run_on_ranks, models, tmp_path_factory) -> Path:
    """Folder of a run whose ranks hold the whole student."""
    folder = tmp_path_factory.mktemp("unsplit")
    run_on_ranks(2, _train, _config(folder, models, DP))
    return folder


@pytest.mark.parametrize(("num_ranks", "split"), LAYOUTS, ids=str)
def test_loss_and_gradients_are_those_of_a_plain_lora(
    run_on_ranks, models, adapters, plain, tmp_path, num_ranks: int, split: Split
):
    run_on_ranks(num_ranks, _differentiate, _config(tmp_path, models, split), adapters)
    loss, gradients = plain
    assert json.loads((tmp_path / "loss.json").read_text()) == pytest.approx(loss, rel=1e-6)
    got = load_file(tmp_path / "gradients.safetensors")
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        # fp32 against float64; measured: 1.9e-6
        assert (got[name].double() - gradient).norm() <= 5e-6 * gradient.norm(), name


@pytest.mark.parametrize(
    ("num_ranks", "split", "is_distributed"),
    [(2, TP2, False), (2, PP2, False), (4, TP2_PP2_SP, False), (4, TP2, True)],
    ids=str,
)
def test_training_starts_at_the_base_and_is_the_same_in_every_layout(
    run_on_ranks, models, unsplit, tmp_path, num_ranks: int, split: Split, is_distributed: bool
):
    optim = {"use_distributed_optimizer": is_distributed}
    run_on_ranks(num_ranks, _train, _config(tmp_path, models, split, optim=optim))
    expected, got = (json.loads((folder / "losses.json").read_text()) for folder in (unsplit, tmp_path))
    assert got == pytest.approx(expected, rel=1e-6)
    _check_merged(tmp_path, models[0])


def test_the_merged_model_computes_and_generates_as_the_adapters_do(models, unsplit, tmp_path):
    from tests.support.hf_reference import greedy, load_hf_model, logits

    _check_merged(unsplit, models[0])
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(models[0] / name, tmp_path / name)
    shutil.copyfile(unsplit / "merged.safetensors", tmp_path / "model.safetensors")
    model = load_hf_model(tmp_path)
    trained = json.loads((unsplit / "trained.json").read_text())
    for ids, scores in zip(PROBE, trained["log_probs"], strict=True):
        expected = logits(model, ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert scores == pytest.approx(expected.tolist(), abs=5e-5)
    for ids, completion in zip(PROBE, trained["completions"], strict=True):
        expected, margin = greedy(model, ids, 8, (EOS_ID,))
        assert margin > 1e-3
        assert completion == expected


@pytest.mark.parametrize(
    ("num_ranks", "split", "precision"),
    [(2, TP2_SP, "bf16"), (4, TP2_PP2, "fp32")],
    ids=str,
)
def test_a_run_with_dropout_resumes_bit_for_bit(
    run_on_ranks, tied_models, tmp_path, num_ranks: int, split: Split, precision: str
):
    lora, train = {**LORA, "dropout": 0.3}, {"precision": precision}
    run_on_ranks(num_ranks, _resume, _config(tmp_path, tied_models, split, lora=lora, train=train))


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(TP2, PP2), (PP2, TP2)], ids=str)
def test_a_checkpoint_continues_in_another_layout_and_is_a_merged_model_elsewhere(
    run_on_ranks, tied_models, tmp_path, saved_by: Split, loaded_by: Split
):
    run_on_ranks(2, _train, _config(tmp_path, tied_models, saved_by))
    run_on_ranks(2, _continue, _config(tmp_path, tied_models, loaded_by))
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000003"
    student = {"hf": None, "checkpoint": str(checkpoint)}
    run_on_ranks(2, _start_from, _config(tmp_path / "next", tied_models, loaded_by, lora={}, student=student))
    merged, loaded = (
        load_file(tmp_path / "merged.safetensors"),
        load_file(tmp_path / "next/start.safetensors"),
    )
    assert all(torch.equal(merged[name], loaded[name]) for name in merged)
    others = {"'alpha': 6.0": {**LORA, "alpha": 7.0}, "this run has off": {}}
    for message, lora in others.items():
        run_on_ranks(2, _meet_other_adapters, _config(tmp_path, tied_models, loaded_by, lora=lora), message)


def test_the_adapters_of_a_checkpoint_become_a_folder_for_peft(run_on_ranks, unsplit, tmp_path):
    checkpoint = unsplit / "run" / "checkpoints" / "iter_0000003"
    run_on_ranks(1, _export_peft, checkpoint, tmp_path / "out")
    peft, exported = (
        load_file(unsplit / "peft.safetensors"),
        load_file(tmp_path / "out/adapter_model.safetensors"),
    )
    assert peft.keys() == exported.keys()
    assert all(torch.equal(peft[name], exported[name]) for name in peft)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 6.0)
    assert set(settings["target_modules"]) == set(ALL_MODULES)


def _write_models(folder: Path, kind: str) -> tuple[Path, Path]:
    family, tied = kind.split("_")
    student = write_tiny_model(folder / "student", family, seed=1, tied=tied == "tied", **SMALL)
    return student, write_tiny_model(folder / "teacher", seed=2, **SMALL)


def _check_merged(folder: Path, student: Path) -> None:
    """What leaves a run is W + scale B A of the base and the adapters, in exports as in pushes."""
    base = load_file(student / "model.safetensors")
    merged, peft, pushed = (
        load_file(folder / f"{name}.safetensors") for name in ("merged", "peft", "pushed")
    )
    assert merged.keys() == base.keys()
    changed = set()
    for name, weight in merged.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        expected = base[name]
        if stem + ".lora_A.weight" in peft:
            expected = expected + 2.0 * (peft[stem + ".lora_B.weight"] @ peft[stem + ".lora_A.weight"])
            changed.add(name)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(weight, pushed[name]), name
        assert torch.equal(weight, base[name]) == (name not in changed), name
    assert len(changed) == 2 * len(ALL_MODULES)


def _config(folder: Path, models, split: Split, *, lora=LORA, student=None, train=None, optim=None) -> Path:
    sections = {
        "student": {"lora": lora, **(student or {})},
        "train": train or {},
        "optim": OPTIM | (optim or {}),
    }
    return write_config(folder, *models, split=split, teacher_split=split, **sections)


def _prepare(rank: int, world_size: int, config_file: Path, *overrides: str):
    from megatron_gkd.config import load_config

    config = load_config(config_file, overrides)
    return config, build_parts(config, make_world(rank, world_size))


def _adapter_slices(student):
    from megatron_gkd.reshard.lora import adapter_slices

    parameters = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
    place = {"tp_rank": student.groups.tp_rank, "pp_rank": student.groups.pp_rank}
    names = dict(student.model.named_parameters())
    return parameters, adapter_slices(student.weights, LORA["rank"], **place, parameters=names)


def _differentiate(rank: int, world_size: int, config_file: Path, adapters: Path) -> None:
    from megatron_gkd.reshard.lora import peft_tensors
    from megatron_gkd.reshard.transport import HfFolder, MappedSafetensors, read_slices

    config, parts = _prepare(rank, world_size, config_file)
    student = parts.student
    parameters, slices = _adapter_slices(student)
    read_slices(parameters, HfFolder(adapters), slices)
    _, loss = update(parts, make_batch(0), 0, config)
    tensors = peft_tensors(student.weights, LORA["rank"], config.student.lora.targets)
    target, file = MappedSafetensors(tensors, torch.float32), config_file.parent / "gradients.safetensors"
    if rank == 0:
        (config_file.parent / "loss.json").write_text(json.dumps(loss))
        target.create(file)
    dist.barrier()
    target.write(file, {name: p.main_grad for name, p in parameters.items()}, slices)
    dist.barrier()
    leave()


def _train(rank: int, world_size: int, config_file: Path) -> None:
    """From the base: three updates, and everything that leaves the run afterwards."""
    from megatron_gkd.checkpoint.hf import export_adapters
    from megatron_gkd.parallel.collectives import gather_json
    from megatron_gkd.rollout.weight_sync import trainer_log_probs
    from tests.support.export import export_weights

    allow_saving()
    _, (base, _, _) = _prepare(rank, world_size, config_file, "student.lora.rank=0")
    log_probs_of_base = trainer_log_probs(base, PROBE)
    leave()
    config, parts = _prepare(rank, world_size, config_file)
    student, folder = parts.student, config_file.parent
    assert trainer_log_probs(student, PROBE) == log_probs_of_base
    before = copy_of(student.model)
    losses = [update(parts, make_batch(i), i, config)[1] for i in range(3)]
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".adapter." in name), name
        assert parameter.requires_grad == (".adapter." in name)
    num_trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    num_optimized = sum(p.numel() for p in student.optimizer.get_parameters())
    optimized, trained = (sum(gather_json(n, device=CPU)) for n in (num_optimized, num_trained))
    assert trained == optimized * (
        student.groups.layout.dp_size if config.optim.use_distributed_optimizer else 1
    )
    place = student.shapes, student.groups, student.dtype
    export_weights(student.model, folder / "merged.safetensors", *place)
    export_adapters(student.model, folder / "peft.safetensors", *place)
    _push(rank, student, folder)
    make_store(config, student).save(3, student.model, student.optimizer, {})
    trained = {"log_probs": trainer_log_probs(student, PROBE), "completions": _complete(student)}
    losses += [update(parts, make_batch(i), i, config)[1] for i in (3, 4)]
    if rank == 0:
        (folder / "trained.json").write_text(json.dumps(trained))
        (folder / "losses.json").write_text(json.dumps(losses))
    leave()


def _push(rank: int, student, folder: Path) -> None:
    from megatron_gkd.rollout.weight_sync import SharedWeightFile

    pushed, _ = SharedWeightFile(folder / "push", student).write(1)
    if rank == 0:
        (pushed / "model.safetensors").rename(folder / "pushed.safetensors")
    dist.barrier()


def _complete(student) -> list[list[int]]:
    from megatron_gkd.models.generation import SamplingRule, generate

    if student.model.config.sequence_parallel:
        return []
    rule = SamplingRule(temperature=1.0, top_p=1.0, top_k=1, max_new_tokens=8, stop_token_ids=(EOS_ID,))
    return generate(
        student.model,
        student.groups,
        student.tap,
        PROBE,
        seeds=(1, 2),
        rule=rule,
        vocab_size=student.shapes.vocab_size,
    )


def _resume(rank: int, world_size: int, config_file: Path) -> None:
    check_resume(rank, world_size, config_file)
    config, parts = _prepare(rank, world_size, config_file)
    for i in range(2):
        update(parts, make_batch(i), i, config)
    for name, parameter in parts.student.model.named_parameters():
        if name.endswith(
            "linear_qkv.adapter.lora_A"
        ):  # whole on every rank: all must have dropped the same inputs
            copies = [torch.empty_like(parameter) for _ in range(parts.student.groups.layout.tp_size)]
            dist.all_gather(copies, parameter.detach(), group=parts.student.groups.pg.tp)
            assert all(torch.equal(copies[0], copy) for copy in copies)
    leave()


def _continue(rank: int, world_size: int, config_file: Path) -> None:
    config, parts = _prepare(rank, world_size, config_file)
    store = make_store(config, parts.student)
    store.load(store.find_newest_valid(), parts.student.model, parts.student.optimizer)
    losses = [update(parts, make_batch(i), i, config)[1] for i in (3, 4)]
    expected = json.loads((config_file.parent / "losses.json").read_text())
    assert losses == pytest.approx(expected[3:], rel=1e-6)
    leave()


def _start_from(rank: int, world_size: int, config_file: Path) -> None:
    from tests.support.export import export_weights

    _, (student, _, _) = _prepare(rank, world_size, config_file)
    assert all(p.requires_grad for p in student.model.parameters())
    place = student.shapes, student.groups, student.dtype
    export_weights(student.model, config_file.parent / "start.safetensors", *place)
    leave()


def _export_peft(rank: int, world_size: int, checkpoint: Path, out: Path) -> None:
    from megatron_gkd.checkpoint.hf import convert_megatron_to_peft
    from tests.support.on_ranks import no_kernels, student_groups

    with student_groups(DP) as groups:
        convert_megatron_to_peft(checkpoint, out, groups, no_kernels(), CPU)


def _meet_other_adapters(rank: int, world_size: int, config_file: Path, message: str) -> None:
    from megatron_gkd.checkpoint.integrity import CheckpointError

    config, (student, _, _) = _prepare(rank, world_size, config_file)
    store = make_store(config, student)
    with pytest.raises(CheckpointError, match=message):
        store.load(store.find_newest_valid(), student.model, student.optimizer)
    leave()
