"""Construction of a pruned student: FFN channel selection, least-squares refit, added query groups.

Shapes: N = unpadded positions of all rows, H = hidden, F = FFN channels, K = kept FFN channels.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.checkpoint.prune_measure import CalibrationText, run_layer

log = logging.getLogger(__name__)

# Added to the diagonal of the second moments, relative to its mean; keeps the refit near the teacher's weights.
RIDGE = 1e-3


@torch.no_grad()
def cut_student(
    teacher: Any, config: Any, text: CalibrationText, dropped_layers: Sequence[int], *, refits: bool
) -> Any:
    """Build the student from the teacher without some layers and FFN channels.

    With ``refits`` the down projection D of each layer is fitted, on the student's own activations, to the teacher's
    hidden state after the same layer and the dropped ones that follow it:
        min over D of |target - (residual + A D^T)|^2 + ridge |D - D_teacher|^2,   A = [N, K] activations.

    Args:
        teacher: The teacher.
        config: The student's configuration; each layer keeps ``intermediate_size`` FFN channels.
        text: Calibration text.
        dropped_layers: Indices of the teacher's layers to drop.
        refits: Fit the down projections; False keeps the teacher's weights.
    """
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_config(config).eval()
    weights = {name: value for name, value in teacher.state_dict().items() if ".layers." not in name}
    student.load_state_dict(weights, strict=False)
    layers = list(teacher.base_model.layers)
    kept = [index for index in range(len(layers)) if index not in set(dropped_layers)]
    targets = [teacher.get_input_embeddings()(batch) for batch in text.batches]
    # Front to back: each fit starts from the student's hidden states, so it also corrects the errors of earlier layers.
    hidden, num_run = targets, 0
    for position, index in enumerate(kept):
        next_kept = kept[position + 1] if position + 1 < len(kept) else len(layers)
        for layer in layers[num_run:next_kept]:
            targets = [run_layer(teacher, layer, target)[1] for target in targets]
        num_run = next_kept
        state, hidden, errors = _fit_layer(
            teacher, layers[index], hidden, targets, text, config.intermediate_size, refits
        )
        student.base_model.layers[position].load_state_dict(state)
        log.info("Layer %d: relative error of the hidden state %.3f, after the refit %.3f", index, *errors)
    return student


def _fit_layer(
    teacher: Any,
    layer: Any,
    hidden: list[Tensor],
    targets: list[Tensor],
    text: CalibrationText,
    num_channels: int,
    refits: bool,
) -> tuple[dict[str, Tensor], list[Tensor], tuple[float, float]]:
    """Return the layer's weights, its outputs, and its relative errors before and after the refit."""
    activations, outputs = zip(*(run_layer(teacher, layer, x) for x in hidden), strict=True)
    down_HF = layer.mlp.down_proj.weight
    a_NF, target_NH = text.pack(activations, text.is_real), text.pack(targets, text.is_real)
    # The output of the layer without its FFN, which is the part that does not depend on D.
    residual_NH = text.pack(outputs, text.is_real) - a_NF @ down_HF.T
    moments_FF = (a_NF.T @ a_NF).double()  # float64: inverted below
    ridge = RIDGE * moments_FF.diagonal().mean()
    if refits:
        kept_K = choose_channels(moments_FF, down_HF, num_channels, ridge)
    else:
        kept_K = largest_channels(moments_FF, down_HF, num_channels)
    old_HK, a_NK = down_HF[:, kept_K], a_NF[:, kept_K]
    missing_NH = target_NH - residual_NH - a_NK @ old_HK.T
    new_HK = old_HK
    if refits:
        # Solved for D - D_teacher, which the ridge pulls to zero.
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
    """Return the [K] ascending indices of the channels to keep, by optimal brain surgeon.

    Removing channel f and refitting the others increases the squared error by |d_f|^2 / I_ff, with I the inverse of the
    second moments of the activations and d_f the channel's column of the down projection (Hassibi and Stork 1993). The
    cheapest channel is removed repeatedly.
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
        # Refit after each removal: of two channels that can replace each other, only the first one is cheap. Both updates
        # are rank 1, so selecting costs O(F^2) per channel instead of a new inverse.
        row_F = inverse_FF[cheapest].clone()
        share_F = row_F / row_F[cheapest]
        columns_FH.addr_(share_F, columns_FH[cheapest].clone(), alpha=-1)
        inverse_FF.addr_(row_F, share_F, alpha=-1)
    return torch.nonzero(~is_gone_F).flatten()


def largest_channels(moments_FF: Tensor, down_HF: Tensor, num_channels: int) -> Tensor:
    """Return the [K] ascending indices of the channels with the largest E[a_f^2] |d_f|^2."""
    share_F = moments_FF.diagonal() * down_HF.double().square().sum(0)
    return share_F.topk(num_channels).indices.sort().values


def fit_ridge(moments_KK: Tensor, a_NK: Tensor, missing_NH: Tensor, ridge: Tensor | float) -> Tensor:
    """Return the [H, K] W that minimizes |missing - A W^T|^2 + ridge |W|^2."""
    regular_KK = moments_KK + ridge * torch.eye(moments_KK.shape[0], dtype=moments_KK.dtype)
    factor_KK = torch.linalg.cholesky(regular_KK)
    return torch.cholesky_solve((a_NK.T @ missing_NH).double(), factor_KK).T.to(missing_NH.dtype)


@torch.no_grad()
def add_query_groups(model: Any, config: Any) -> Any:
    """Pad a model to the heads and query groups of ``config`` without changing its function.

    An added group copies the query, key and value rows of an existing one; its columns in the output projection are zero.
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
    """Append the added groups to a weight or bias of an attention projection."""
    # Only o_proj is zero: with q, k, v copied its gradient is not, so the added groups can learn.
    if "o_proj.weight" in name:
        return torch.cat([value, value.new_zeros(value.shape[0], num_added * rows_q)], dim=1)
    for projection, rows in (("q_proj.", rows_q), ("k_proj.", rows_kv), ("v_proj.", rows_kv)):
        if projection in name:
            groups = value.unflatten(0, (-1, rows))
            source = torch.arange(num_added) % groups.shape[0]
            return torch.cat([groups, groups[source]]).flatten(0, 1)
    return value
