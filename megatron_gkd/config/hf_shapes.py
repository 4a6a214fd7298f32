"""Sizes and variants of a model from the config.json of a Hugging Face folder.

The file is parsed here, without torch or transformers, so that ``--check`` runs anywhere. Supported are the dense
families of ``megatron_gkd.families`` with silu, plain or Llama 3 rotary embeddings and full causal attention; any other
setting is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.config.base import ConfigError
from megatron_gkd.families import Family, family_of


@dataclass(frozen=True)
class Llama3Scaling:
    """Scaling of the rotary frequencies as in Llama 3, with the names of config.json."""

    factor: float
    """Divides frequencies with wavelengths above original_max_position_embeddings / low_freq_factor."""
    low_freq_factor: float
    high_freq_factor: float
    """Wavelengths below original_max_position_embeddings / high_freq_factor are unchanged; between the two, interpolated."""
    original_max_position_embeddings: int


@dataclass(frozen=True)
class HfShapes:
    """Architecture of the model in a Hugging Face folder."""

    model_type: str
    """A name in ``megatron_gkd.families.FAMILIES``."""
    vocab_size: int
    """Rows of the embedding in the Hugging Face checkpoint, without padding for tensor parallelism."""
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads, each shared by num_attention_heads / num_query_groups query heads."""
    head_dim: int
    ffn_hidden_size: int
    """Width of each of the gate and up projections."""
    tied: bool
    """Whether the LM head shares the weight of the embedding."""
    qkv_bias: bool
    qk_norm: bool
    """RMSNorm over head_dim on queries and keys before the rotary embedding."""
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    """Tokens that end generation, from config.json and generation_config.json in this order."""
    rope_scaling: Llama3Scaling | None = None
    """``None``: plain rotary embeddings."""
    sliding_window: int | None = None
    """Positions that a query attends to, its own included; ``None``: all. Megatron builds full attention, which is the same
    up to this length; ``config.check`` refuses longer sequences."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the Hugging Face model; a tied embedding counts once."""
        queries, groups = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = 2 * self.hidden_size * (queries + groups)
        attention += (queries + 2 * groups) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


def count_token_ids(folder: Path) -> int | None:
    """One more than the largest token id in ``folder``/tokenizer.json; ``None`` without a readable file."""
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
        ConfigError: A file is missing or unreadable, or the model is not supported; names the file, every key with
            its value, and the supported values.
    """
    file = folder / "config.json"
    config = _read_json(file)
    try:
        family = family_of(str(config.get("model_type")))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    problems = _find_unsupported(config)
    reader = _Reader(config, problems)
    heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    derived = {"head_dim": hidden_size // heads or None, "num_key_value_heads": heads}
    defaults = {key: derived[key] for key in family.may_omit}
    rope = _rope_parameters(config)
    shapes = HfShapes(
        model_type=family.model_type,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=reader.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_query_groups=reader.size("num_key_value_heads", defaults.get("num_key_value_heads")),
        head_dim=reader.size("head_dim", defaults.get("head_dim")),
        ffn_hidden_size=reader.size("intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.has_qkv_bias,
        qk_norm=family.has_qk_norm,
        rope_theta=_Reader(rope, problems).positive("rope_theta", 10000.0),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        max_position_embeddings=reader.size("max_position_embeddings"),
        eos_token_ids=_eos_token_ids(folder, config),
        rope_scaling=_rope_scaling(_Reader(rope, problems)),
        sliding_window=_sliding_window(reader, family),
    )
    if not problems and shapes.num_attention_heads % shapes.num_query_groups:
        problems.append(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shapes.num_query_groups}"
        )
    if problems:
        raise ConfigError.listing(str(file), problems)
    return shapes


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_local_experts",
)


@dataclass(frozen=True)
class ServedModel:
    """Identity of a served model, which may have any architecture."""

    model_type: str
    vocab_size: int
    """Rows of the LM head, all of which take part in the softmax."""
    sizes: Mapping[str, Any]
    """Sizes in config.json by name; they distinguish the models of a family."""


def load_served_model(folder: Path) -> ServedModel:
    """Read ``folder``/config.json of a model of any architecture.

    Raises:
        ConfigError: The file is missing or unreadable or does not say the size of the vocabulary.
    """
    file = folder / "config.json"
    config = _read_json(file)
    problems: list[str] = []
    vocab_size = _Reader(config, problems).size("vocab_size")
    if problems:
        raise ConfigError.listing(str(file), problems)
    sizes = {key: config[key] for key in _SIZES if config.get(key) is not None}
    return ServedModel(str(config.get("model_type")), vocab_size, sizes)


class _Reader:
    """Reads numbers of a config.json and collects those that are missing or invalid."""

    def __init__(self, config: Mapping[str, Any], problems: list[str]):
        self.config = config
        self._problems = problems

    def size(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1; otherwise 1, with a problem noted."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.note(key, value, "a whole number of at least 1 is needed")
        return 1

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0; otherwise 1, with a problem noted."""
        value = self.config.get(key, default)
        if isinstance(value, int | float) and value > 0:
            return float(value)
        self.note(key, value, "a number above 0 is needed")
        return 1.0

    def note(self, key: str, value: Any, need: str) -> None:
        """Add the problem of one key."""
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
    """Settings that change the model's function and are not supported."""
    problems, rope = [], _rope_parameters(config)
    for key, supported in (
        ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):
        value = rope.get(key, config.get(key))
        if value is not None and value != supported:
            hint = "save the weights unquantized first" if supported is None else f"supported: {supported}"
            problems.append(f"{key}={value!r}; {hint}")
    flags = ("attention_bias", "mlp_bias", "use_sliding_window")
    problems += [f"{key}={config[key]!r}; supported: false" for key in flags if config.get(key)]
    windowed = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if windowed:
        problems.append(f"layer_types has {', '.join(map(repr, windowed))}; supported: full_attention")
    kind = _rope_type(rope)
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type={kind!r} (rotary embedding); supported: default, llama3")
    return problems


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters; Transformers 5 writes rope_parameters, version 4 rope_scaling and rope_theta."""
    old = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {**old, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(rope: _Reader) -> Llama3Scaling | None:
    if _rope_type(rope.config) != "llama3":
        return None
    scaling = Llama3Scaling(
        *(rope.positive(key) for key in ("factor", "low_freq_factor", "high_freq_factor")),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        rope.note(
            "low_freq_factor",
            scaling.low_freq_factor,
            f"it must be below high_freq_factor={scaling.high_freq_factor}",
        )
    return scaling


def _sliding_window(reader: _Reader, family: Family) -> int | None:
    if family.default_sliding_window is None or reader.config.get("sliding_window", 0) is None:
        return None
    return reader.size("sliding_window", family.default_sliding_window)


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    generation_file = folder / "generation_config.json"
    sources = [config, _read_json(generation_file)] if generation_file.exists() else [config]
    ids: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        ids.extend(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(dict.fromkeys(ids))
