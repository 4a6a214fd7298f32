"""The loss of a micro-batch on the student's last stage, from the teacher's signal and the labels.

Shapes: T = rows that enter the loss, V = vocabulary entries of this rank.
"""

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_gkd.config import GkdConfig, load_hf_shapes
from megatron_gkd.config.loss import LossConfig
from megatron_gkd.losses.distill import DistillLoss, choose_tokens_per_chunk
from megatron_gkd.losses.fused_linear import HeadGradient, LMHead, WeightedLoss
from megatron_gkd.losses.sparse import KnownEntries
from megatron_gkd.losses.verify.certificate import CertificateError, certify
from megatron_gkd.losses.verify.problem import Case
from megatron_gkd.models.gpt import padded_vocab_size
from megatron_gkd.parallel.collectives import any_rank
from megatron_gkd.parallel.gathering import Group
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.device import DTYPES
from megatron_gkd.teacher.base import Signal, TopKSignal

log = logging.getLogger(__name__)

MIN_RETAINED_MASS = 0.98
"""Below it the gradient of a reverse KL on a top-k is off by more than some percent."""


def cases_of_run(config: GkdConfig, device: torch.device) -> list[Case]:
    """The loss of a run, to be certified; on a GPU also where its kernels step over tiles."""
    loss, teacher = config.loss, config.teacher
    case = Case(
        settings=loss if teacher.gives_signal else None,
        dtype=DTYPES[config.train.precision],
        tokens_per_chunk=loss.tokens_per_chunk or _tokens_per_chunk(config),
        sft_weight=loss.sft_weight,
        from_entries=teacher.gives_signal and not teacher.gives_full_distribution,
        teacher_scale=loss.teacher_logit_scale,
        teacher_soft_cap=loss.teacher_logit_soft_cap,
    )
    return [case] if device.type == "cpu" else [case, *case.on_tiles()]


def _tokens_per_chunk(config: GkdConfig) -> int:
    """As ``DistillLoss`` chooses it from the student's head."""
    section = config.student
    tp_size = section.parallel.tensor_model_parallel_size
    vocab_size = load_hf_shapes(section.hf_folder).vocab_size
    padded = padded_vocab_size(vocab_size, divisible_by=section.make_vocab_size_divisible_by, tp_size=tp_size)
    return choose_tokens_per_chunk(padded // tp_size)


def certify_run(config: GkdConfig, groups: ModelGroups, device: torch.device) -> None:
    """Compare the loss of the run with float64 on the ranks that are to compute it; collective over all ranks.

    Raises:
        CertificateError: It is beyond its tolerance on some rank; on all ranks.
    """
    start, wrong = time.monotonic(), None
    if groups.is_last_stage:
        for case in cases_of_run(config, device):
            certificate = certify(case, group=groups.pg.tp, device=device)
            log.info("Loss certified after %.1f s: %s", time.monotonic() - start, certificate)
            wrong = wrong if certificate.is_passed else certificate
    if any_rank(wrong is not None, device=device):
        found = "found by another rank" if wrong is None else str(wrong)
        raise CertificateError(
            f"the loss is not what its formula says, so nothing is trained: {found}; run tools/verify_loss.py with this "
            "configuration, or set loss.certify=false to train all the same"
        )


class RunLoss:
    """The loss of a run, from the teacher's signals; built once and called for every micro-batch.

    Args:
        config: The loss section.
        group: The student's tensor-parallel group.
        valid_vocab_size: Real entries of the vocabulary.
        teacher_head_VH: This rank's shard of the teacher's LM head, for a ``HiddenSignal``; ``None`` otherwise.
    """

    def __init__(
        self, config: LossConfig, group: Group, valid_vocab_size: int, teacher_head_VH: Tensor | None
    ):
        self._config, self._teacher_head_VH = config, teacher_head_VH
        self._distill = DistillLoss(
            config,
            sft_weight=config.sft_weight,
            tokens_per_chunk=config.tokens_per_chunk,
            group=group,
            valid_vocab_size=valid_vocab_size,
        )

    def __call__(
        self,
        student: LMHead,
        signal: Signal | None,
        labels_T: Tensor,
        *,
        add_head_gradient: HeadGradient | None = None,
    ) -> WeightedLoss:
        """The loss of every row and their sum with its gradients.

        Args:
            student: Rows and LM head of the student; a batch without rows takes the same path, so that collectives match
                on all ranks.
            signal: The teacher's signal for the rows; ``None`` without a teacher.
            labels_T: [T] the next token of each row.
            add_head_gradient: Takes the gradient of the LM head in the backward pass, instead of autograd.
        """
        teacher = None
        if signal is not None:
            teacher = teacher_of(signal, self._teacher_head_VH, labels_T, self._config)
        return self._distill.weighted(student, teacher, labels_T, add_head_gradient=add_head_gradient)


def teacher_of(
    signal: Signal, teacher_head_VH: Tensor | None, labels_T: Tensor, config: LossConfig
) -> LMHead | KnownEntries:
    """The teacher of ``DistillLoss`` that a signal stands for.

    Raises:
        ValueError: If the support needs other entries than those that were sent.
    """
    if not isinstance(signal, TopKSignal):
        assert teacher_head_VH is not None  # the last stage has a shard of it
        scale, soft_cap = config.teacher_logit_scale, config.teacher_logit_soft_cap
        return LMHead(signal.rows_TH, teacher_head_VH, scale=scale, soft_cap=soft_cap)
    if config.support == "teacher_top_k":
        return KnownEntries(signal.ids_TK, signal.log_probs_TK)
    if config.support == "token" and signal.token_log_prob_T is not None:
        return KnownEntries(labels_T.unsqueeze(-1), signal.token_log_prob_T.unsqueeze(-1))
    raise ValueError(
        f"loss.support={config.support} needs a teacher whose whole distribution is at hand, but this one sends its top-k; set "
        "loss.support=teacher_top_k or teacher.kind=megatron"
    )


def lost_mass_warning(metrics: Mapping[str, float], config: LossConfig) -> str | None:
    """Warning about a divergence that the missing part of the teacher's distribution makes wrong; ``None``: no reason."""
    mass = metrics.get("retained_mass", 1.0)
    if mass >= MIN_RETAINED_MASS or config.divergence not in ("reverse_kl", "skew_reverse_kl", "mixed_kl"):
        return None
    return (
        f"the teacher's top-k holds {mass:.3f} of its mass, below {MIN_RETAINED_MASS}: {config.divergence} is far from its "
        "value on the whole vocabulary; raise the number of entries, or use forward_kl"
    )
