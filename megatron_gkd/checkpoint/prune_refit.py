"""Build a pruned student: choose FFN channels, refit down projections by least squares, add query groups.

Shapes: N = real (not padded) positions of all rows, H = hidden, F = FFN channels, K = kept FFN channels.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.checkpoint.prune_measure import Text, run_layer

log = logging.getLogger(__name__)

RIDGE = 1e-3
"""Added to the diagonal of the second moments, in units of its mean; keeps the refit near the old weights."""


@torch.no_grad()
def cut_student(teacher: Any, config: Any, text: Text, dropped_layers: Sequence[int], *, refits: bool) -> Any:
    """The teacher without some layers and FFN channels; with ``refits`` each kept layer's down projection is refitted.

    Layer by layer, on the student's own activations, the down projection D is fitted so that the layer's
    output comes close to the teacher's hidden state behind the same layer and the dropped ones after it:
        min over D of |target - (residual + A D^T)|^2 + ridge |D - D_teacher|^2,   A = [N, K] activations.

    Args:
        teacher: The whole model.
        config: The student's configuration; `intermediate_size` says how many FFN channels each layer keeps.
        text: Calibration text.
        dropped_layers: Indices of the teacher's layers that the student lacks.
        refits: Fit the down projections; otherwise the weights that stay are the teacher's.
    """
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_config(config).eval()
    weights = {name: value for name, value in teacher.state_dict().items() if ".layers." not in name}
    student.load_state_dict(weights, strict=False)
    layers = list(teacher.base_model.layers)
    kept = [index for index in range(len(layers)) if index not in set(dropped_layers)]
    targets = [teacher.get_input_embeddings()(batch) for batch in text.batches]
    hidden, reached = targets, 0
    for place, index in enumerate(kept):
        behind = kept[place + 1] if place + 1 < len(kept) else len(layers)
        for layer in layers[reached:behind]:
            targets = [run_layer(teacher, layer, target)[1] for target in targets]
        reached = behind
        state, hidden, errors = _fit_layer(
            teacher, layers[index], hidden, targets, text, config.intermediate_size, refits
        )
        student.base_model.layers[place].load_state_dict(state)
        log.info("Layer %d: error %.3f of the hidden state, %.3f at the end", index, *errors)
    return student


def _fit_layer(
    teacher: Any,
    layer: Any,
    hidden: list[Tensor],
    targets: list[Tensor],
    text: Text,
    num_channels: int,
    refits: bool,
) -> tuple[dict[str, Tensor], list[Tensor], tuple[float, float]]:
    """Weights of the student's layer, its outputs, and its relative error before and after the refit."""
    activations, outputs = zip(*(run_layer(teacher, layer, x) for x in hidden), strict=True)
    down_HF = layer.mlp.down_proj.weight
    a_NF, target_NH = text.pack(activations, text.is_real), text.pack(targets, text.is_real)
    residual_NH = text.pack(outputs, text.is_real) - a_NF @ down_HF.T
    moments_FF = (a_NF.T @ a_NF).double()
    ridge = RIDGE * moments_FF.diagonal().mean()
    if refits:
        kept_K = choose_channels(moments_FF, down_HF, num_channels, ridge)
    else:
        kept_K = largest_channels(moments_FF, down_HF, num_channels)
    old_HK, a_NK = down_HF[:, kept_K], a_NF[:, kept_K]
    missing_NH = target_NH - residual_NH - a_NK @ old_HK.T
    new_HK = old_HK
    if refits:
        new_HK = old_HK + fit_ridge(moments_FF[kept_K][:, kept_K], a_NK, missing_NH, ridge)
    left_NH = target_NH - residual_NH - a_NK @ new_HK.T
    errors = tuple((value.norm() / target_NH.norm()).item() for value in (missing_NH, left_NH))

    state = dict(layer.state_dict())
    for name in ("gate_proj", "up_proj"):
        state.update({key: value[kept_K] for key, value in state.items() if f".{name}." in key})
    state["mlp.down_proj.weight"] = new_HK
    new_outputs = [
        output - a @ down_HF.T + a[..., kept_K] @ new_HK.T
        for output, a in zip(outputs, activations, strict=True)
    ]
    return state, new_outputs, errors


def choose_channels(moments_FF: Tensor, down_HF: Tensor, num_channels: int, ridge: Tensor | float) -> Tensor:
    """[K] ascending indices of the channels that are left when the cheapest goes first.

    Removing channel f and refitting the others raises the squared error by |d_f|^2 / I_ff, with I the inverse
    of the second moments of the activations and d_f the channel's column of the down projection (optimal
    brain surgeon; Hassibi and Stork 1993). The others are refitted after each removal, because of two channels that
    can replace each other only one is cheap.
    """
    num_all = down_HF.shape[1]
    if num_channels == num_all:
        return torch.arange(num_all)
    inverse_FF = torch.linalg.inv(moments_FF + ridge * torch.eye(num_all, dtype=moments_FF.dtype))
    columns_FH = down_HF.double().T.contiguous()
    is_gone_F = torch.zeros(num_all, dtype=torch.bool)
    for _ in range(num_all - num_channels):
        cost_F = columns_FH.square().sum(1) / inverse_FF.diagonal()
        cheapest = int(cost_F.masked_fill_(is_gone_F, torch.inf).argmin())
        is_gone_F[cheapest] = True
        row_F = inverse_FF[cheapest].clone()
        share_F = row_F / row_F[cheapest]
        columns_FH.addr_(share_F, columns_FH[cheapest].clone(), alpha=-1)
        inverse_FF.addr_(row_F, share_F, alpha=-1)
    return torch.nonzero(~is_gone_F).flatten()


def largest_channels(moments_FF: Tensor, down_HF: Tensor, num_channels: int) -> Tensor:
    """[K] ascending indices of the channels that add most to the output: E[a_f^2] |d_f|^2."""
    share_F = moments_FF.diagonal() * down_HF.double().square().sum(0)
    return share_F.topk(num_channels).indices.sort().values


def fit_ridge(moments_KK: Tensor, a_NK: Tensor, missing_NH: Tensor, ridge: Tensor | float) -> Tensor:
    """[H, K] W that minimises |missing - A W^T|^2 + ridge |W|^2; solved in float64."""
    regular_KK = moments_KK + ridge * torch.eye(moments_KK.shape[0], dtype=moments_KK.dtype)
    factor_KK = torch.linalg.cholesky(regular_KK)
    return torch.cholesky_solve((a_NK.T @ missing_NH).double(), factor_KK).T.to(missing_NH.dtype)


@torch.no_grad()
def add_query_groups(model: Any, config: Any) -> Any:
    """The same function with the heads and query groups of `config`; `model` itself if it has them.

    An added group repeats the query, key and value rows of an old one and starts with zero columns in the
    output projection: it adds nothing, and the gradient of those columns is not zero, so it can learn.
    """
    from transformers import AutoModelForCausalLM

    old = model.config
    num_added = config.num_key_value_heads - old.num_key_value_heads
    if num_added == 0:
        return model
    rows_q = old.num_attention_heads // old.num_key_value_heads * config.head_dim
    padded = AutoModelForCausalLM.from_config(config).eval()
    state = {
        name: _with_groups(name, value, num_added, rows_q, config.head_dim)
        for name, value in model.state_dict().items()
    }
    padded.load_state_dict(state)
    padded.generation_config = model.generation_config
    return padded


def _with_groups(name: str, value: Tensor, num_added: int, rows_q: int, rows_kv: int) -> Tensor:
    """A weight or bias with the added groups at its end, if it belongs to an attention projection."""
    if "o_proj.weight" in name:
        return torch.cat([value, value.new_zeros(value.shape[0], num_added * rows_q)], dim=1)
    for projection, rows in (("q_proj.", rows_q), ("k_proj.", rows_kv), ("v_proj.", rows_kv)):
        if projection in name:
            groups = value.unflatten(0, (-1, rows))
            source = torch.arange(num_added) % groups.shape[0]
            return torch.cat([groups, groups[source]]).flatten(0, 1)
    return value
