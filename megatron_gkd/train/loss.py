"""The loss of a micro-batch on the student's last stage, from the teacher's signal and the labels.

Shapes: T = rows that enter the loss, V = vocabulary entries of this rank, P = details.
"""

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_gkd.config import GkdConfig, load_hf_shapes
from megatron_gkd.config.loss import LossConfig
from megatron_gkd.losses.certificate import Case, CertificateError, certify
from megatron_gkd.losses.chunked import HeadGradient, Layer, WeightedLoss
from megatron_gkd.losses.goals import Goal, entry_goal, label_goal, logit_goal
from megatron_gkd.losses.linear import suitable_tokens_per_chunk, weighted_loss
from megatron_gkd.losses.objective import Objective
from megatron_gkd.losses.softmax import Group
from megatron_gkd.models.gpt import padded_vocab_size
from megatron_gkd.parallel.collectives import any_rank
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.device import DTYPES
from megatron_gkd.teacher.base import Signal, TopKSignal

log = logging.getLogger(__name__)

DETAILS = {
    "divergence": "nats/token",
    "cross_entropy": "nats/token",
    "limited_share": "1",
    "forward_weight": "1",
    "retained_mass": "1",
    "variance": "nats^2/token",
}
"""What a loss may tell beside its value, with the unit: means over tokens."""

MIN_RETAINED_MASS = 0.98
"""Below it the gradient of a reverse KL on a top-k is off by more than some percent."""


def make_objective(config: LossConfig) -> Objective:
    """The divergence that the configuration names."""
    return Objective(
        divergence=config.divergence,
        beta=config.beta,
        alpha=config.alpha,
        weight=config.weight,
        temperature=config.temperature,
        teacher_temperature=config.teacher_temperature,
        temperature_squared=config.temperature_squared,
        max_token_loss=config.max_token_loss,
        support=config.support,
        top_k=config.top_k,
        num_draws=config.num_draws,
        tail=config.tail,
        estimator=config.estimator,
        policy_gradient=config.policy_gradient,
        backend=config.backend,
        rows_per_pass=config.rows_per_pass,
    )


def case_of_run(config: GkdConfig) -> Case:
    """The loss of a run, to be certified."""
    loss, kind = config.loss, config.teacher.kind
    return Case(
        objective=None if kind == "none" else make_objective(loss),
        dtype=DTYPES[config.train.precision],
        tokens_per_chunk=loss.tokens_per_chunk or _suitable_tokens_per_chunk(config),
        sft_weight=loss.sft_weight,
        from_entries=kind not in ("megatron", "none"),
        teacher_scale=loss.teacher_logit_scale,
        teacher_soft_cap=loss.teacher_logit_soft_cap,
    )


def _suitable_tokens_per_chunk(config: GkdConfig) -> int:
    """As ``weighted_loss`` picks it from the student's head."""
    section = config.student
    tp_size = section.parallel.tensor_model_parallel_size
    vocab_size = load_hf_shapes(section.hf_folder).vocab_size
    padded = padded_vocab_size(vocab_size, divisible_by=section.make_vocab_size_divisible_by, tp_size=tp_size)
    return suitable_tokens_per_chunk(padded // tp_size)


def certify_run(config: GkdConfig, groups: ModelGroups, device: torch.device) -> None:
    """Compare the loss of the run with float64 on the ranks that are to compute it; collective over all ranks.

    Raises:
        CertificateError: It is beyond its tolerance on some rank; on all ranks.
    """
    start, certificate = time.monotonic(), None
    if groups.is_last_stage:
        certificate = certify(case_of_run(config), group=groups.pg.tp, device=device)
        log.info("Loss certified in %.1f s: %s", time.monotonic() - start, certificate)
    is_wrong = certificate is not None and not certificate.is_passed
    if any_rank(is_wrong, device=device):
        found = str(certificate) if is_wrong else "found by another rank"
        raise CertificateError(
            f"the loss is not what its formula says, so nothing is trained: {found}; run tools/verify_loss.py with this "
            "configuration, or set loss.certify=false to train all the same"
        )


def compute_loss(
    student: Layer,
    signal: Signal | None,
    teacher_head_VH: Tensor | None,
    labels_T: Tensor,
    config: LossConfig,
    *,
    group: Group,
    valid_vocab_size: int,
    take_head_gradient: HeadGradient | None = None,
) -> tuple[WeightedLoss, tuple[str, ...]]:
    """The loss of every row and their sum with its gradients, and the names of its details.

    Args:
        student: The rows and the output layer of the student; a batch without rows goes the same way, so that
            collectives match on all ranks.
        signal: What the teacher says about the rows; ``None`` without a teacher.
        teacher_head_VH: This rank's shard of the teacher's output layer, for a ``HiddenSignal``.
        labels_T: [T] the next token of each row.
        config: The loss section.
        group: The student's tensor-parallel group.
        valid_vocab_size: Real entries of the vocabulary.
        take_head_gradient: Takes the gradient of the output layer in the backward pass, instead of autograd.
    """
    goals = []
    if signal is not None:
        goals.append(_divergence_goal(student, signal, teacher_head_VH, labels_T, config, group))
    if config.sft_weight > 0:
        goals.append(label_goal(student, labels_T, weight=config.sft_weight, group=group))
    return weighted_loss(
        student,
        goals,
        torch.ones(student.hidden_TH.shape[0], device=student.hidden_TH.device),
        group=group,
        valid_vocab_size=valid_vocab_size,
        tokens_per_chunk=config.tokens_per_chunk,
        take_head_gradient=take_head_gradient,
    )


def _divergence_goal(
    student: Layer,
    signal: Signal,
    teacher_head_VH: Tensor | None,
    labels_T: Tensor,
    config: LossConfig,
    group: Group,
) -> Goal:
    objective, weight = make_objective(config), 1 - config.sft_weight
    if isinstance(signal, TopKSignal):
        entries = _entries(signal, labels_T, config.support)
        return entry_goal(student, *entries, None, objective, weight=weight, group=group)
    assert teacher_head_VH is not None  # the last stage has a shard of it
    teacher = Layer(
        signal.rows_TH,
        teacher_head_VH,
        scale=config.teacher_logit_scale,
        soft_cap=config.teacher_logit_soft_cap,
    )
    return logit_goal(student, teacher, objective, labels_T, weight=weight, group=group)


def _entries(signal: TopKSignal, labels_T: Tensor, support: str) -> tuple[Tensor, Tensor]:
    """The ids and log-probabilities that the support needs."""
    if support == "teacher_top_k":
        return signal.ids_TK, signal.log_probs_TK
    if support == "token" and signal.token_log_prob_T is not None:
        return labels_T.unsqueeze(-1), signal.token_log_prob_T.unsqueeze(-1)
    raise ValueError(
        f"loss.support={support} needs a teacher whose whole distribution is at hand, but this one sends its top-k; set "
        "loss.support=teacher_top_k or teacher.kind=megatron"
    )


def lost_mass_warning(details: Mapping[str, float], config: LossConfig) -> str | None:
    """What to say about a divergence that the missing part of the teacher's distribution makes wrong."""
    mass = details.get("retained_mass", 1.0)
    if mass >= MIN_RETAINED_MASS or config.divergence not in ("reverse_kl", "skew_reverse_kl", "mixed_kl"):
        return None
    return (
        f"the teacher's top-k holds {mass:.3f} of its mass, below {MIN_RETAINED_MASS}: {config.divergence} is far from its "
        "value on the whole vocabulary; raise the number of entries, or use forward_kl"
    )
