"""The tiny models are what transformers takes them for, and hard enough to tell a wrong converter from a
right one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gkd.config import load_hf_shapes
from tests.support.tiny_models import CHAT_TEMPLATE, EOS_ID, PAD_ID, TOKENIZER_SIZE, write_tiny_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_finds_every_weight_and_no_other(tmp_path, family, tied):
    write_tiny_model(tmp_path, family, tied=tied)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shapes_agree_with_transformers(tmp_path, family):
    write_tiny_model(tmp_path, family, vocab_size=300, num_groups=1, tied=False)
    shapes = load_hf_shapes(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = model.state_dict()
    layer = "model.layers.0."
    assert shapes.num_parameters == model.num_parameters()
    assert weights["lm_head.weight"].shape == (shapes.vocab_size, shapes.hidden_size)
    assert weights[layer + "self_attn.q_proj.weight"].shape[0] == shapes.num_attention_heads * shapes.head_dim
    assert weights[layer + "self_attn.k_proj.weight"].shape[0] == shapes.num_query_groups * shapes.head_dim
    assert weights[layer + "mlp.up_proj.weight"].shape[0] == shapes.ffn_hidden_size
    assert f"model.layers.{shapes.num_layers - 1}.mlp.up_proj.weight" in weights
    assert f"model.layers.{shapes.num_layers}.mlp.up_proj.weight" not in weights
    assert (layer + "self_attn.q_proj.bias" in weights) == shapes.qkv_bias
    assert (layer + "self_attn.q_norm.weight" in weights) == shapes.qk_norm
    assert shapes.eos_token_ids == (EOS_ID,)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_token_depends_on_the_first_of_twelve(tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path, family))
    tokens_BS = torch.randint(0, 256, (32, 12), generator=torch.Generator().manual_seed(0))
    changed_BS = tokens_BS.clone()
    changed_BS[:, 0] = (changed_BS[:, 0] + 1) % 256
    with torch.no_grad():
        before_B, after_B = (model(x).logits[:, -1].argmax(-1) for x in (tokens_BS, changed_BS))
    assert (before_B != after_B).float().mean() > 0.5


def test_the_seed_decides_the_weights(tmp_path):
    files = [write_tiny_model(tmp_path / str(i), seed=i // 2) / "model.safetensors" for i in range(4)]
    first, again, second, _ = (file.read_bytes() for file in files)
    assert first == again
    assert first != second


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_round_trips_any_text_and_knows_the_template(tmp_path, family):
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path, family))
    text = "h\u00e9llo\n  \u4f60 <end>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        TOKENIZER_SIZE,
        PAD_ID,
        EOS_ID,
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == "<user>Hi<eos><assistant>"
    assert tokenizer.encode(rendered)[-1] == TOKENIZER_SIZE - 1
