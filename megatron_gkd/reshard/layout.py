"""The Megatron parameters of each rank as slices of Hugging Face tensors.

One description serves import, export and the push to the inference engine. Nothing is gathered: a slice is a view of both
tensors.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_gkd.config.hf_shapes import HfShapes
from megatron_gkd.families import WeightMap, family_of
from megatron_gkd.parallel.groups import Layout

Span = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class WeightLayout:
    """A model's shapes in one parallel layout.

    Attributes:
        shapes: Shapes from config.json.
        layout: Tensor-, pipeline- and virtual-pipeline-parallel sizes.
        padded_vocab_size: Vocabulary rows after padding, over all tensor-parallel ranks.
    """

    shapes: HfShapes
    layout: Layout
    padded_vocab_size: int


@dataclass(frozen=True)
class Slice:
    """One block of values in a Megatron parameter and in a Hugging Face tensor.

    Attributes:
        parameter: Name of the Megatron parameter, prefixed by the number of its model chunk if the rank has several.
        local: One span per dimension of the parameter.
        tensor: Name of the Hugging Face tensor.
        full: One span per dimension of the tensor.
    """

    parameter: str
    local: tuple[Span, ...]
    tensor: str
    full: tuple[Span, ...]

    @property
    def num_elements(self) -> int:
        """Number of values in the block."""
        return math.prod(stop - start for start, stop in self.full)

    def row_blocks(self, max_elements: int) -> Iterator["Slice"]:
        """Split into slices of whole rows with at most ``max_elements`` values (at least one row)."""
        num_rows = self.full[0][1] - self.full[0][0]
        height = max(1, max_elements * num_rows // max(self.num_elements, 1))
        for row in range(0, num_rows, height):
            last = min(row + height, num_rows)
            local, full = (((s[0][0] + row, s[0][0] + last), *s[1:]) for s in (self.local, self.full))
            yield Slice(self.parameter, local, self.tensor, full)


def hf_tensors(shapes: HfShapes) -> dict[str, tuple[int, ...]]:
    """Return all Hugging Face tensors, name to shape, in layer order."""
    family = family_of(shapes.model_type)
    tensors: dict[str, tuple[int, ...]] = {}
    for weight in family.outer:
        # Tied models have no lm_head.weight on disk.
        if not (shapes.tied and weight.hf == ("lm_head.weight",)):
            tensors.update(_hf_shapes_of(weight, shapes, 0))
    for layer in range(shapes.num_layers):
        for weight in family.layer:
            tensors.update(_hf_shapes_of(weight, shapes, layer))
    return tensors


def rank_slices(
    weights: WeightLayout,
    *,
    tp_rank: int,
    pp_rank: int,
    parameters: Iterable[str] | None = None,
    is_headless: bool = False,
) -> list[Slice]:
    """Return all slices that fill a rank's parameters.

    Args:
        weights: The model and its layout.
        tp_rank: Tensor-parallel rank.
        pp_rank: Pipeline-parallel rank.
        parameters: Names of the rank's parameters, which select between the names of local and Transformer Engine layers;
            ``None``: local names.
        is_headless: The model has no output layer.
    """
    present = None if parameters is None else set(parameters)
    num_chunks = weights.layout.vpp_size
    slices: list[Slice] = []
    for chunk in range(num_chunks):
        # Interleaved schedule: chunk c of pipeline rank p is stage c * pp_size + p of the model.
        prefix = f"{chunk}." if num_chunks > 1 else ""
        stage = _Stage(chunk * weights.layout.pp_size + pp_rank, weights.layout.pp_size * num_chunks, prefix)
        slices += _outer_slices(weights, stage, tp_rank, is_headless)
        slices += _layer_slices(weights, stage, tp_rank, present)
    return slices


def parameters_made_of(
    tensors: Collection[str],
    weights: WeightLayout,
    *,
    tp_rank: int,
    pp_rank: int,
    parameters: Iterable[str] | None = None,
) -> set[str]:
    """Return the names of a rank's parameters that consist of the given tensors only."""
    # A fused parameter counts only if all of its tensors are given.
    contents: dict[str, set[str]] = {}
    for piece in rank_slices(weights, tp_rank=tp_rank, pp_rank=pp_rank, parameters=parameters):
        contents.setdefault(piece.parameter, set()).add(piece.tensor)
    return {name for name, parts in contents.items() if parts <= set(tensors)}


def owned_slices(
    weights: WeightLayout, *, tp_rank: int, pp_rank: int, parameters: Iterable[str] | None = None
) -> list[Slice]:
    """Return the slices that a rank writes.

    The ranks of one replica together write every value once. Replicated weights are written by tensor-parallel rank 0, a tied embedding by the first stage.
    """
    needed = rank_slices(weights, tp_rank=tp_rank, pp_rank=pp_rank, parameters=parameters)
    family = family_of(weights.shapes.model_type)
    replicated = {name for w in (*family.outer, *family.layer) if w.kind == "replicated" for name in w.hf}
    tied_copy = ("output_layer.weight",) if weights.shapes.tied else ()
    return [
        piece
        for piece in needed
        if piece.num_elements  # vocabulary padding only
        and not piece.parameter.endswith(tied_copy)
        and not (tp_rank > 0 and _template(piece.tensor) in replicated)
    ]


def all_owned_slices(weights: WeightLayout) -> list[Slice]:
    """Return the slices written by all ranks of one replica, for ``check_coverage``."""
    return [
        piece
        for tp_rank in range(weights.layout.tp_size)
        for pp_rank in range(weights.layout.pp_size)
        for piece in owned_slices(weights, tp_rank=tp_rank, pp_rank=pp_rank)
    ]


def check_coverage(shapes: HfShapes, pieces: Sequence[Slice]) -> None:
    """Check that the slices cover every Hugging Face tensor exactly once.

    Raises:
        ValueError: Lists the tensors that are missing, incomplete or written twice.
    """
    # SGLang accepts an incomplete push without an error and keeps the old values, so this is checked before the first.
    blocks: dict[str, list[tuple[Span, ...]]] = {name: [] for name in hf_tensors(shapes)}
    for piece in pieces:
        blocks.setdefault(piece.tensor, []).append(piece.full)
    wrong = []
    for name, shape in hf_tensors(shapes).items():
        covered = sum(math.prod(stop - start for start, stop in block) for block in blocks[name])
        if covered != math.prod(shape):
            wrong.append(f"{name}: {covered} of {math.prod(shape)} values")
        elif _overlap(blocks[name]):  # the right number of values may hide a gap and an overlap of equal size
            wrong.append(f"{name}: some values twice")
    wrong += [f"{name}: not a tensor of this model" for name in blocks.keys() - hf_tensors(shapes).keys()]
    if wrong:
        raise ValueError("the slices do not cover the model exactly once: " + "; ".join(wrong[:5]))


@dataclass(frozen=True)
class _Stage:
    """A block of consecutive layers on one rank.

    Attributes:
        index: Position in the model.
        count: Number of stages over all ranks, virtual ones included.
        prefix: Prefix of its parameters' names.
    """

    index: int
    count: int
    prefix: str


def _outer_slices(weights: WeightLayout, stage: _Stage, tp_rank: int, is_headless: bool) -> Iterator[Slice]:
    shapes = weights.shapes
    is_first, is_last = stage.index == 0, stage.index == stage.count - 1
    for weight in family_of(shapes.model_type).outer:
        name, hf = weight.megatron[0], weight.hf
        if not (is_first if name.startswith("embedding") else is_last):
            continue
        if name.startswith("output_layer"):
            if is_headless or (shapes.tied and is_first):
                continue
            # With pipeline parallelism the last stage of a tied model has its own copy of the embedding.
            hf = ("model.embed_tokens.weight",) if shapes.tied else hf
        yield from _cut(stage.prefix + name, hf, weight.kind, weights, tp_rank)


def _layer_slices(
    weights: WeightLayout, stage: _Stage, tp_rank: int, present: set[str] | None
) -> Iterator[Slice]:
    num_layers = weights.shapes.num_layers // stage.count
    for i in range(num_layers):
        for weight in family_of(weights.shapes.model_type).layer:
            name = _name_in(weight, i, stage.prefix, present)
            hf = tuple(x.format(i=i + stage.index * num_layers) for x in weight.hf)
            yield from _cut(name, hf, weight.kind, weights, tp_rank)


def _template(tensor: str) -> str:
    parts = tensor.split(".")
    return ".".join("{i}" if part.isdigit() else part for part in parts)


def _name_in(weight: WeightMap, layer: int, prefix: str, present: set[str] | None) -> str:
    names = [prefix + name.format(i=layer) for name in weight.megatron]
    if present is None:
        return names[0]
    return next((name for name in names if name in present), names[0])


def _overlap(blocks: list[tuple[Span, ...]]) -> bool:
    ordered = sorted(blocks)
    return any(
        all(a < d and c < b for (a, b), (c, d) in zip(first, second, strict=True))
        for i, first in enumerate(ordered)
        for second in ordered[i + 1 :]
        if second[0][0] < first[0][1]  # sorted by the first row: later blocks cannot overlap either
    )


def _hf_shapes_of(weight: WeightMap, shapes: HfShapes, layer: int) -> dict[str, tuple[int, ...]]:
    return {name.format(i=layer): _hf_shape(name, shapes) for name in weight.hf}


def _hf_shape(name: str, shapes: HfShapes) -> tuple[int, ...]:
    """Return a Hugging Face tensor's shape, from the last two parts of its name."""
    h, ffn, d = shapes.hidden_size, shapes.ffn_hidden_size, shapes.head_dim
    q, kv = shapes.num_attention_heads * d, shapes.num_query_groups * d
    part, kind = name.split(".")[-2:]
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": ffn, "up_proj": ffn}
    if kind == "bias":
        return (rows[part],)
    if part in rows:
        return rows[part], h
    by_name = {
        "embed_tokens": (shapes.vocab_size, h),
        "lm_head": (shapes.vocab_size, h),
        "o_proj": (h, q),
        "down_proj": (h, ffn),
        "q_norm": (d,),
        "k_norm": (d,),
    }
    return by_name.get(part, (h,))  # norms


def _cut(parameter: str, hf: tuple[str, ...], kind: str, weights: WeightLayout, tp_rank: int) -> list[Slice]:
    shapes, tp_size = weights.shapes, weights.layout.tp_size
    full = [_hf_shape(name, shapes) for name in hf]
    match kind:
        case "replicated":
            spans = tuple((0, n) for n in full[0])
            return [Slice(parameter, spans, hf[0], spans)]
        case "vocab":
            return _cut_vocab(parameter, hf[0], full[0], weights.padded_vocab_size // tp_size, tp_rank)
        case "row":
            rows, columns = full[0]
            width = columns // tp_size
            start = tp_rank * width
            return [Slice(parameter, ((0, rows), (0, width)), hf[0], ((0, rows), (start, start + width)))]
        case "gate_up":
            # Every rank holds cat(its rows of gate, its rows of up), not a contiguous block of cat(gate, up).
            rows, columns = full[0]
            height = rows // tp_size
            span, rest = (tp_rank * height, (tp_rank + 1) * height), (0, columns)
            return [
                Slice(parameter, ((i * height, (i + 1) * height), rest), name, (span, rest))
                for i, name in enumerate(hf)
            ]
        case "qkv":
            return _cut_qkv(parameter, hf, full, shapes, tp_size, tp_rank)
    raise ValueError(f"unknown kind of weight {kind!r}")


def _cut_vocab(parameter: str, tensor: str, full: tuple[int, ...], height: int, tp_rank: int) -> list[Slice]:
    vocab, hidden = full
    start, stop = tp_rank * height, min((tp_rank + 1) * height, vocab)
    # A slice without rows for a rank that holds only padding: its parameter is then known, and stays as initialized.
    stop = max(start, stop)
    return [Slice(parameter, ((0, stop - start), (0, hidden)), tensor, ((start, stop), (0, hidden)))]


def _cut_qkv(parameter: str, hf, full, shapes: HfShapes, tp_size: int, tp_rank: int) -> list[Slice]:
    # linear_qkv's rows are interleaved per query group: the group's query heads, then its key, then its value. The same
    # holds for the bias.
    d = shapes.head_dim
    heights = [shapes.num_attention_heads // shapes.num_query_groups * d, d, d]
    num_groups = shapes.num_query_groups // tp_size
    slices, local = [], 0
    for group in range(tp_rank * num_groups, (tp_rank + 1) * num_groups):
        for tensor, shape, height in zip(hf, full, heights, strict=True):
            rest = tuple((0, n) for n in shape[1:])
            span = (group * height, (group + 1) * height)
            slices.append(Slice(parameter, ((local, local + height), *rest), tensor, (span, *rest)))
            local += height
    return slices
