"""Sizes and variants of a model, read from the config.json of a Hugging Face folder.

Read by hand, so that a configuration is checked without torch or transformers. Supported: dense llama, qwen2
and qwen3 with silu, plain rotary embeddings and full attention; everything else is refused here, before any
rank starts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.config.errors import ConfigError

MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class HfShapes:
    """What Megatron needs to know to build the model of a Hugging Face folder."""

    model_type: str
    """One of ``MODEL_TYPES``."""
    vocab_size: int
    """Rows of the embedding in the Hugging Face checkpoint, before any padding for tensor parallelism."""
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """Key and value heads; each serves num_attention_heads / num_query_groups query heads."""
    head_dim: int
    ffn_hidden_size: int
    """Width of the gate and of the up projection, each."""
    tied: bool
    """The output layer uses the weight of the embedding."""
    qkv_bias: bool
    qk_norm: bool
    """RMSNorm over head_dim on queries and keys before the rotary embedding."""
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    """From config.json and generation_config.json, in that order; generation stops at any of them."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the Hugging Face model, a tied embedding counted once."""
        queries, groups = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = 2 * self.hidden_size * (queries + groups)
        attention += (queries + 2 * groups) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


def count_token_ids(folder: Path) -> int | None:
    """One more than the largest token id in ``folder``/tokenizer.json; ``None`` if there is no such file to tell."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = _read_json(file)
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return 1 + max([*ids, *(token["id"] for token in tokenizer.get("added_tokens", []))])
    except (KeyError, TypeError, ValueError):
        return None


def load_hf_shapes(folder: Path) -> HfShapes:
    """Read ``folder``/config.json (and generation_config.json for further end-of-sequence tokens).

    Raises:
        ConfigError: A file is missing or unreadable, or the model is of a kind that is not supported; names
            the file, every key with its value, and what is supported.
    """
    file = folder / "config.json"
    config = _read_json(file)
    problems = _find_unsupported(config)
    reader = _Reader(config, problems)
    heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    head_dim = _head_dim(reader, hidden_size, heads)
    shapes = HfShapes(
        model_type=str(config.get("model_type")),
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=reader.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_query_groups=reader.size(
            "num_key_value_heads", heads if config.get("model_type") == "llama" else None
        ),
        head_dim=head_dim,
        ffn_hidden_size=reader.size("intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=config.get("model_type") == "qwen2",
        qk_norm=config.get("model_type") == "qwen3",
        rope_theta=_rope_theta(reader),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        max_position_embeddings=reader.size("max_position_embeddings"),
        eos_token_ids=_eos_token_ids(folder, config),
    )
    if not problems and shapes.num_attention_heads % shapes.num_query_groups:
        problems.append(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shapes.num_query_groups}"
        )
    if problems:
        raise ConfigError.listing(str(file), problems)
    return shapes


@dataclass(frozen=True)
class ServedModel:
    """What is compared with a server, which may run models that are not built here."""

    model_type: str
    vocab_size: int
    """Rows of the output layer, all of which take part in the softmax."""


def load_served_model(folder: Path) -> ServedModel:
    """Read ``folder``/config.json, of any kind of model.

    Raises:
        ConfigError: The file is missing or unreadable or does not say the size of the vocabulary.
    """
    file = folder / "config.json"
    config = _read_json(file)
    problems: list[str] = []
    vocab_size = _Reader(config, problems).size("vocab_size")
    if problems:
        raise ConfigError.listing(str(file), problems)
    return ServedModel(str(config.get("model_type")), vocab_size)


class _Reader:
    """Takes numbers out of a config.json and notes those that are missing or senseless."""

    def __init__(self, config: Mapping[str, Any], problems: list[str]):
        self.config = config
        self._problems = problems

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; where it is none, the problem is noted and 1 returned."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self._note(key, value, "a whole number of at least 1 is needed")
        return 1

    def positive(self, key: str, default: float) -> float:
        """A number above 0; where it is none, the problem is noted and ``default`` returned."""
        value = self.config.get(key, default)
        if isinstance(value, int | float) and value > 0:
            return float(value)
        self._note(key, value, "a number above 0 is needed")
        return default

    def _note(self, key: str, value: Any, need: str) -> None:
        found = f"{key} is missing" if value is None else f"{key}={value!r}"
        self._problems.append(f"{found}; {need}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; give a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds {type(value).__name__}; a JSON object is needed")
    return value


def _find_unsupported(config: Mapping[str, Any]) -> list[str]:
    """Settings that would change the model's function and that this program does not build."""
    if config.get("model_type") not in MODEL_TYPES:
        return [f"model_type={config.get('model_type')!r}; supported: {', '.join(MODEL_TYPES)}"]
    problems = []
    for key, supported in (
        ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):
        value = config.get(key)
        if value is not None and value != supported:
            hint = "save the weights unquantized first" if supported is None else f"supported: {supported}"
            problems.append(f"{key}={value!r}; {hint}")
    flags = ("attention_bias", "mlp_bias", "use_sliding_window")
    problems += [f"{key}={config[key]!r}; supported: false" for key in flags if config.get(key)]
    windowed = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if windowed:
        problems.append(f"layer_types has {', '.join(map(repr, windowed))}; supported: full_attention")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            problems.append(f"{key} has rope_type={kind!r}; supported: default (no scaling)")
    return problems


def _head_dim(reader: _Reader, hidden_size: int, heads: int) -> int:
    """Llama and Qwen2 divide the hidden size by the heads unless told otherwise; Qwen3 always says it."""
    derived = hidden_size // heads if reader.config.get("model_type") in ("llama", "qwen2") else None
    return reader.size("head_dim", derived or None)


def _rope_theta(reader: _Reader) -> float:
    """Transformers 5 writes it into rope_parameters, earlier versions beside the other keys."""
    parameters = reader.config.get("rope_parameters") or {}
    if "rope_theta" in parameters:
        return _Reader(parameters, reader._problems).positive("rope_theta", 10000.0)
    return reader.positive("rope_theta", 10000.0)


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    generation_file = folder / "generation_config.json"
    sources = [config, _read_json(generation_file)] if generation_file.exists() else [config]
    ids: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        ids.extend(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(dict.fromkeys(ids))
