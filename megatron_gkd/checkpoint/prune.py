"""Structured pruning of a Hugging Face checkpoint by measured effect: layers and FFN channels.

Layers are chosen by the KL that their loss causes on text that the model itself wrote; FFN channels are
chosen, and down projections refitted, by least squares on the activations of the same text (prune_refit.py).
Query groups are only added, for tensor parallelism, never cut, and change nothing at first.
"""

import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.checkpoint.prune_measure import CalibrationRow, Text, mean_kl, measure_blocks
from megatron_gkd.checkpoint.prune_refit import add_query_groups, cut_student

log = logging.getLogger(__name__)

FFN_MULTIPLE = 16
REPORT_FILE = "pruning_report.json"


@dataclass(frozen=True)
class PruningReport:
    """What was cut and what it did; KL is KL(teacher || student) in nats per completion token of the text."""

    dropped_layers: tuple[int, ...]
    num_layers: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    num_parameters: int
    kept_ratio: float
    """Parameters of the student over those of the teacher, added query groups included."""
    calibration_tokens: int
    kl_by_first_dropped_layer: dict[int, float]
    """Without refit, for each block of layers that was tried."""
    kl: float
    added_groups_logit_difference: float
    """Largest difference that the added query groups made to the logits of one row; rounding only."""


@torch.no_grad()
def prune_checkpoint(
    hf: str | Path,
    out: str | Path,
    rows: Sequence[CalibrationRow],
    *,
    keep_ratio: float,
    tp_size: int = 1,
    num_layers: int | None = None,
    ffn_hidden_size: int | None = None,
    refits: bool = True,
) -> PruningReport:
    """Write a smaller student with the tokenizer of its teacher, and ``pruning_report.json`` beside it.

    Args:
        hf: Teacher, a checkpoint of one of ``megatron_gkd.families``.
        out: Folder to write.
        rows: Calibration text; a few thousand tokens are needed, more than FFN channels.
        keep_ratio: Most parameters of the student, as a share of the teacher's.
        tp_size: Heads, query groups and FFN channels become divisible by it.
        num_layers: Layers of the student; default: all.
        ffn_hidden_size: FFN channels of the student; default: as many as ``keep_ratio`` leaves room for.
        refits: Fit what remains to the teacher by least squares; otherwise it keeps the teacher's weights.

    Raises:
        ValueError: The sizes asked for do not fit ``keep_ratio`` or ``tp_size``, or there is too little text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    config = teacher.config
    layers: int = config.num_hidden_layers if num_layers is None else num_layers
    ffn = ffn_hidden_size or fit_ffn(config, keep_ratio, layers, tp_size)
    check_shape(config, keep_ratio, layers, ffn, tp_size)
    text = Text.of(rows)
    if refits and text.num_tokens <= ffn:
        raise ValueError(
            f"{text.num_tokens} calibration tokens cannot fit {ffn} FFN channels; give more text"
        )

    num_dropped = config.num_hidden_layers - layers
    tried = measure_blocks(teacher, text, num_dropped)
    first = min(tried, key=tried.__getitem__) if tried else 0
    dropped = tuple(range(first, first + num_dropped))
    student = cut_student(teacher, student_config(config, dropped, ffn), text, dropped, refits=refits)
    kl = mean_kl(teacher, student, text)
    log.info("Without layers %s, with %d FFN channels: KL %.3f nats/token", list(dropped), ffn, kl)
    padded = add_query_groups(student, student_config(config, dropped, ffn, padded_heads(config, tp_size)))
    probe = text.batches[0][:1]
    difference = (padded(probe).logits - student(probe).logits).abs().max().item()
    report = PruningReport(
        dropped_layers=dropped,
        num_layers=layers,
        ffn_hidden_size=ffn,
        num_attention_heads=padded.config.num_attention_heads,
        num_query_groups=padded.config.num_key_value_heads,
        num_parameters=padded.num_parameters(),
        kept_ratio=padded.num_parameters() / teacher.num_parameters(),
        calibration_tokens=text.num_tokens,
        kl_by_first_dropped_layer=tried,
        kl=kl,
        added_groups_logit_difference=difference,
    )
    padded.save_pretrained(out)
    AutoTokenizer.from_pretrained(hf).save_pretrained(out)
    (Path(out) / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def padded_heads(config: Any, tp_size: int) -> tuple[int, int]:
    """Attention heads and query groups once the groups are filled up to a multiple of ``tp_size``."""
    groups = -(-config.num_key_value_heads // tp_size) * tp_size
    return groups * (config.num_attention_heads // config.num_key_value_heads), groups


def student_config(
    config: Any, dropped: Sequence[int], ffn: int, heads: tuple[int, int] | None = None
) -> Any:
    """The teacher's configuration without the dropped layers; `heads`: attention heads and query groups."""
    changed = copy.deepcopy(config)
    kept = [index for index in range(config.num_hidden_layers) if index not in set(dropped)]
    # Explicit, because with more heads hidden_size / num_attention_heads no longer gives it.
    changed.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    changed.num_hidden_layers, changed.intermediate_size = len(kept), ffn
    if heads is not None:
        changed.num_attention_heads, changed.num_key_value_heads = heads
    if getattr(config, "layer_types", None):
        changed.layer_types = [config.layer_types[index] for index in kept]
    return changed


def count_parameters(config: Any) -> int:
    """Parameters of the model of this configuration; tied ones count once. Allocates nothing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def fit_ffn(config: Any, keep_ratio: float, num_layers: int, tp_size: int) -> int:
    """Most FFN channels that ``keep_ratio`` leaves room for, a multiple of 16 and of ``tp_size``.

    Raises:
        ValueError: There is room for none.
    """
    heads = padded_heads(config, tp_size)
    step = math.lcm(FFN_MULTIPLE, tp_size)
    dropped = range(num_layers, config.num_hidden_layers)
    smallest = count_parameters(student_config(config, dropped, step, heads))
    room = keep_ratio * count_parameters(config) - smallest
    ffn = min(config.intermediate_size, step + int(room // (3 * config.hidden_size * num_layers)))
    if ffn < step:
        raise ValueError(
            f"keep_ratio {keep_ratio} leaves no room for FFN channels; keep fewer than {num_layers} layers"
        )
    return ffn // step * step


def check_shape(config: Any, keep_ratio: float, num_layers: int, ffn: int, tp_size: int) -> None:
    """Refuse sizes that are larger than the teacher's, or than asked for.

    Raises:
        ValueError: Says which, with the numbers.
    """
    for name, value, most in (
        ("layers", num_layers, config.num_hidden_layers),
        ("FFN channels", ffn, config.intermediate_size),
    ):
        if not 0 < value <= most:
            raise ValueError(f"{value} {name} were asked for; the teacher has {most}")
    if ffn % tp_size:
        raise ValueError(f"{ffn} FFN channels are not divisible by tp {tp_size}")
    dropped = range(num_layers, config.num_hidden_layers)
    num_parameters = count_parameters(student_config(config, dropped, ffn, padded_heads(config, tp_size)))
    teacher_parameters = count_parameters(config)
    if num_parameters > keep_ratio * teacher_parameters:
        raise ValueError(
            f"{num_layers} layers with {ffn} FFN channels are {num_parameters:,} parameters, "
            f"{num_parameters / teacher_parameters:.1%} of the teacher, more than {keep_ratio:.1%}; keep fewer"
        )
