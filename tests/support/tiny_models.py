"""Random tiny models in Hugging Face format, with a byte-level tokenizer and a chat template.

The weights are written by hand, name by name, so that nothing here shares code with the converters under
test. They are large enough that the most probable next token depends on the whole context.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<user>", "<assistant>")
TOKENIZER_SIZE = 256 + len(SPECIAL_TOKENS)
PAD_ID, EOS_ID, BOS_ID = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SMALL = {"hidden_size": 32, "num_layers": 2, "ffn": 64}
"""Sizes of a model that a distributed test trains in every layout."""

FOUR_LAYERS = {**SMALL, "num_layers": 4}
"""For layouts of up to four pipeline stages."""

LLAMA_3_ROPE = {  # short enough that the scaling matters for the sequences of the tests
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    vocab_size: int = TOKENIZER_SIZE,
    hidden_size: int = 64,
    num_layers: int = 4,
    num_heads: int = 4,
    num_groups: int = 2,
    head_dim: int | None = None,
    ffn: int = 160,
    tied: bool = True,
    seed: int = 0,
    gain: float = 1.0,
    max_positions: int = 512,
    **changes: Any,
) -> Path:
    """Write config.json, generation_config.json, model.safetensors (fp32) and the tokenizer files.

    Args:
        folder: Made if missing.
        family: "llama", "mistral", "qwen2" (biases on q, k, v) or "qwen3" (norms on q, k).
        vocab_size: Rows of the embedding, at least ``TOKENIZER_SIZE``; the rows above it are no tokens.
        hidden_size: Width of the residual stream.
        num_layers: Transformer layers.
        num_heads: Query heads.
        num_groups: Key-value heads.
        head_dim: Default ``hidden_size // num_heads``.
        ffn: Width of the gate and of the up projection.
        tied: Without lm_head.weight.
        seed: Of the weights.
        gain: Factor on the matrices of the layers and on the last norm; smaller models amplify rounding less.
        max_positions: max_position_embeddings.
        changes: Further keys of config.json, or other values for them.

    Returns:
        ``folder``.
    """
    assert vocab_size >= TOKENIZER_SIZE, f"the tokenizer has {TOKENIZER_SIZE} tokens"
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_groups,
        "head_dim": head_dim or hidden_size // num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": "float32",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    save_file(_make_weights(config, seed, gain), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token per byte (ids 0 to 255) and ``SPECIAL_TOKENS`` after them; text of any kind round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<pad>",  # never used; without it the tokenizer class of Qwen adds a token of its own
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_prompts(file: Path, num_rows: int = 16, *, with_completions: bool = True) -> Path:
    """JSONL with short distinct prompts, every other one as chat messages."""
    rows = []
    for i in range(num_rows):
        text = f"Say {i} twice."
        row: dict[str, Any] = {"prompt": text if i % 2 else [{"role": "user", "content": text}]}
        if with_completions:
            row["completion"] = f"{i} {i}"
        rows.append(json.dumps(row))
    file.write_text("\n".join(rows) + "\n")
    return file


def _make_weights(config: dict[str, Any], seed: int, gain: float) -> dict[str, Tensor]:
    """All tensors by their Hugging Face names, fp32."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    def vector(size: int, mean: float) -> Tensor:
        return mean + 0.1 * torch.randn(size, generator=generator)

    # The rows of the embedding have norm 1 for the output's sake; each layer's first norm makes them large enough.
    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": vector(hidden, 3.0) * gain,
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": vector(hidden, 1.0),
            "post_attention_layernorm.weight": vector(hidden, 1.0),
            "self_attn.q_proj.weight": matrix(q_size, hidden, 2 * gain),
            "self_attn.k_proj.weight": matrix(kv_size, hidden, 2 * gain),
            "self_attn.v_proj.weight": matrix(kv_size, hidden, gain),
            "self_attn.o_proj.weight": matrix(hidden, q_size, gain),
            "mlp.gate_proj.weight": matrix(ffn, hidden, gain),
            "mlp.up_proj.weight": matrix(ffn, hidden, gain),
            "mlp.down_proj.weight": matrix(hidden, ffn, gain),
        }
        if config["model_type"] == "qwen2":
            for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                layer[f"self_attn.{name}_proj.bias"] = vector(size, 0.0)
        if config["model_type"] == "qwen3":
            layer |= {f"self_attn.{name}_norm.weight": vector(head_dim, 1.0) for name in "qk"}
        weights |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return weights
