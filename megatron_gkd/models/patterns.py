"""Resolve glob patterns to the weights of a model, without torch.

A pattern is matched against the Hugging Face names and against Megatron's, both with global layer numbers. Megatron
fuses q, k and v into one parameter, and gate and up into one, so several Hugging Face tensors form one parameter.
"""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_gkd.config import ConfigError
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.config.optim import OptimConfig
from megatron_gkd.config.schema import GkdConfig
from megatron_gkd.config.student import StudentConfig
from megatron_gkd.families import family_of


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model.

    Attributes:
        megatron: Its names in Megatron: first with plain torch layers, then with Transformer Engine.
        hf: The Hugging Face tensors that it contains.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]


def all_weights(shapes: HfShapes) -> list[Weight]:
    """All weights of a model in layer order; a tied LM head is omitted."""
    family = family_of(shapes.model_type)
    outer = [
        Weight(w.megatron, w.hf) for w in family.outer if not (shapes.tied and w.hf == ("lm_head.weight",))
    ]
    layers = [
        Weight(tuple(n.format(i=i) for n in w.megatron), tuple(n.format(i=i) for n in w.hf))
        for i in range(shapes.num_layers)
        for w in family.layer
    ]
    return outer + layers


def check_patterns(config: GkdConfig) -> None:
    """Check the patterns of ``student.freeze`` and ``optim.no_weight_decay`` against the student.

    Raises:
        ConfigError: A pattern matches nothing; the message lists close names.
    """
    shapes = load_hf_shapes(config.student.hf_folder)
    frozen_tensors(config.student, shapes)
    undecayed_tensors(config.optim, shapes)


def frozen_tensors(config: StudentConfig, shapes: HfShapes) -> frozenset[str]:
    """Hugging Face names of the frozen tensors.

    Raises:
        ConfigError: A pattern of ``student.freeze`` matches nothing or part of a fused parameter, or all are frozen.
    """
    frozen = resolve_patterns("student.freeze", config.freeze, shapes)
    if all(name in frozen for weight in all_weights(shapes) for name in weight.hf):
        raise ConfigError(
            f"student.freeze={list(config.freeze)} matches every tensor of the student; leave some to train"
        )
    return frozen


def summarise(tensors: Collection[str]) -> str:
    """Tensor names with their layer count, such as ``model.layers.*.mlp.up_proj.weight (4)``."""
    kinds = Counter(_any_layer(name) for name in sorted(tensors))
    return ", ".join(f"{kind} ({count})" if "*" in kind else kind for kind, count in kinds.items())


def undecayed_tensors(config: OptimConfig, shapes: HfShapes) -> frozenset[str]:
    """Hugging Face names of the tensors without weight decay.

    Raises:
        ConfigError: A pattern of ``optim.no_weight_decay`` matches nothing or part of a fused parameter.
    """
    # the default patterns name biases, which Llama and Qwen3 do not have
    defaults = OptimConfig.model_fields["no_weight_decay"].default
    return resolve_patterns("optim.no_weight_decay", config.no_weight_decay, shapes, may_miss=defaults)


def resolve_patterns(
    key: str, patterns: Sequence[str], shapes: HfShapes, *, may_miss: Collection[str] = ()
) -> frozenset[str]:
    """Hugging Face names of all tensors matched by ``patterns``.

    Args:
        key: Configuration key for error messages.
        patterns: Glob patterns.
        shapes: Sizes of the model.
        may_miss: Patterns that may match nothing.

    Raises:
        ConfigError: A pattern matches nothing, or the patterns match only part of a fused parameter.
    """
    found = {pattern: _matches(pattern, shapes) for pattern in patterns}
    together = frozenset().union(*found.values())
    problems = [_explain_no_match(p, shapes) for p in patterns if not found[p] and p not in may_miss]
    problems += _explain_parts(together, shapes)
    if problems:
        raise ConfigError.listing(key, problems)
    return together


def _matches(pattern: str, shapes: HfShapes) -> set[str]:
    found: set[str] = set()
    for weight in all_weights(shapes):
        if any(fnmatchcase(name, pattern) for name in weight.megatron):
            # requires_grad and weight decay are set per Megatron parameter, so its name selects all of its tensors
            found.update(weight.hf)
        found.update(name for name in weight.hf if fnmatchcase(name, pattern))
    return found


def _explain_no_match(pattern: str, shapes: HfShapes) -> str:
    names = {_any_layer(n): None for w in all_weights(shapes) for n in (*w.hf, w.megatron[0])}
    near = difflib.get_close_matches(_any_layer(pattern), names, n=3, cutoff=0.5)
    known = near or list(names)
    word = "near names" if near else "known names"
    return f"{pattern!r} matches no tensor of the model; {word}: {', '.join(known)}"


def _explain_parts(found: frozenset[str], shapes: HfShapes) -> Iterator[str]:
    """Yield one message per fused parameter that is matched in part, not one per layer."""
    seen: set[str] = set()
    for weight in all_weights(shapes):
        missing = [name for name in weight.hf if name not in found]
        kind = _any_layer(weight.megatron[0])
        if missing and len(missing) < len(weight.hf) and kind not in seen:
            seen.add(kind)
            yield (
                f"{kind} holds {', '.join(map(_any_layer, weight.hf))} in one parameter, and "
                f"{', '.join(missing)} is not matched; match all of them or none"
            )


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
