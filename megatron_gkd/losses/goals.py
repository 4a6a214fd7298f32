"""What the logits of a student's layer are compared with: a teacher's layer, entries that a teacher sent, or labels.

Shapes: T = tokens, V = vocabulary entries held by this rank, K = known entries.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_gkd.losses.chunked import Layer
from megatron_gkd.losses.combine import Term
from megatron_gkd.losses.comparison import Joined
from megatron_gkd.losses.cross_entropy import LabelComparison
from megatron_gkd.losses.objective import Objective
from megatron_gkd.losses.softmax import Group, first_id
from megatron_gkd.losses.sparse import local_entries


class Goal(NamedTuple):
    """A term of the loss and what the student is compared with: a teacher's layer, values for each row, or several."""

    term: Term
    target: Any


def logit_goal(
    student: Layer,
    teacher: Layer,
    objective: Objective,
    labels_T: Tensor | None,
    *,
    weight: float,
    group: Group,
) -> Goal:
    """The divergence from a teacher's logits, on the support of the objective.

    Raises:
        ValueError: If the support needs labels and there are none.
    """
    target: Any = teacher
    if objective.support != "full":
        if labels_T is None and objective.support == "token":
            raise ValueError("support=token needs labels_T, the token that follows each row")
        labels_T = (
            torch.zeros_like(student.hidden_TH[:, 0], dtype=torch.int64) if labels_T is None else labels_T
        )
        target = Joined([teacher, _local_ids(student, labels_T, group)])
    return Goal(Term("divergence", weight * objective.scale, objective.against_logits(group)), target)


def entry_goal(
    student: Layer,
    ids_TK: Tensor,
    log_probs_TK: Tensor,
    weight_TK: Tensor | None,
    objective: Objective,
    *,
    weight: float,
    group: Group,
) -> Goal:
    """The divergence from a teacher's log-probabilities of some ids.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the support needs other entries.
    """
    target = local_entries(
        ids_TK,
        log_probs_TK,
        weight_TK,
        tail=objective.tail,
        num_tokens=student.hidden_TH.shape[0],
        first=first_id(student.head_VH.shape[0], group),
    )
    comparison = objective.against_entries(group, ids_TK.shape[1])
    return Goal(Term("divergence", weight * objective.scale, comparison), target)


def label_goal(student: Layer, labels_T: Tensor, *, weight: float, group: Group) -> Goal:
    """The cross-entropy of global token ids.

    Raises:
        ValueError: If ``labels_T`` is not one int64 id per row.
    """
    local_T = _local_ids(student, labels_T, group)
    return Goal(Term("cross_entropy", weight, LabelComparison(group)), local_T)


def _local_ids(student: Layer, labels_T: Tensor, group: Group) -> Tensor:
    if labels_T.shape != student.hidden_TH.shape[:1] or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels {tuple(labels_T.shape)} {labels_T.dtype} do not fit hidden states "
            f"{tuple(student.hidden_TH.shape)}; pass one int64 token id per row"
        )
    return labels_T - first_id(student.head_VH.shape[0], group)


def check_shapes(student: Layer, goals: Sequence[Goal]) -> None:
    """Whether the layers of student and teacher fit.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    _check_layer("student", student)
    for goal in goals:
        _check_target(student, goal.target)


def _check_target(student: Layer, teacher: Any) -> None:
    if isinstance(teacher, Joined):
        for part in teacher:
            _check_target(student, part)
    if not isinstance(teacher, Layer):
        return
    _check_layer("teacher", teacher)
    hidden_TH, head_VH = student.hidden_TH, student.head_VH
    if hidden_TH.shape[0] != teacher.hidden_TH.shape[0] or head_VH.shape[0] != teacher.head_VH.shape[0]:
        raise ValueError(
            f"student hidden {tuple(hidden_TH.shape)} and head {tuple(head_VH.shape)} do not fit teacher hidden "
            f"{tuple(teacher.hidden_TH.shape)} and head {tuple(teacher.head_VH.shape)}: both need the same tokens and the "
            "same vocabulary rows; split and pad the teacher's head as the student's"
        )


def _check_layer(name: str, layer: Layer) -> None:
    hidden_TH, head_VH, bias_V = layer.hidden_TH, layer.head_VH, layer.bias_V
    if hidden_TH.dim() != 2 or head_VH.dim() != 2 or hidden_TH.shape[1] != head_VH.shape[1]:
        raise ValueError(
            f"{name} hidden states {tuple(hidden_TH.shape)} and head {tuple(head_VH.shape)} are not [tokens, hidden] and "
            "[local vocabulary, hidden]; flatten the tokens, and pass the weight of the output layer as it is"
        )
    if hidden_TH.dtype != head_VH.dtype:
        raise ValueError(
            f"{name} hidden states are {hidden_TH.dtype} but its head is {head_VH.dtype}; cast one of them, the product "
            "is made in their common dtype"
        )
    if bias_V is not None and bias_V.shape != head_VH.shape[:1]:
        raise ValueError(
            f"{name} bias {tuple(bias_V.shape)} does not fit its head {tuple(head_VH.shape)}; pass one number per row"
        )
