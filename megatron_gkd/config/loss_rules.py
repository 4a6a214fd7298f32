"""Rules between the loss and the sections that feed it: teacher, rollout, data."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gkd.config.schema import GkdConfig


def find_loss_problems(config: "GkdConfig") -> Iterator[str]:
    """Sentences that name the keys, their values and what to change."""
    yield from _share_problems(config)
    yield from _estimator_problems(config)
    yield from _served_teacher_problems(config)


def _share_problems(config: "GkdConfig") -> Iterator[str]:
    kind, sft_weight = config.teacher.kind, config.loss.sft_weight
    if kind == "none" and sft_weight != 1:
        yield (
            f"loss.sft_weight={sft_weight} leaves a share to a divergence, but teacher.kind=none; set loss.sft_weight=1 or "
            "give a teacher"
        )
    if kind != "none" and sft_weight == 1:
        yield (
            f"loss.sft_weight=1.0 leaves nothing for teacher.kind={kind}; set teacher.kind=none or lower loss.sft_weight"
        )


def _estimator_problems(config: "GkdConfig") -> Iterator[str]:
    """Of losses whose mean is right only over tokens drawn from the distribution that they are computed with."""
    loss, rollout = config.loss, config.rollout
    if loss.support != "token":
        return
    if config.gkd.lmbda < 1:
        yield (
            f"loss.support=token estimates from tokens that the student wrote, but gkd.lmbda={config.gkd.lmbda} takes some "
            "from data; set gkd.lmbda=1"
        )
    if rollout.temperature != loss.temperature:
        yield (
            f"loss.support=token estimates from tokens drawn at loss.temperature={loss.temperature}, but rollout.temperature="
            f"{rollout.temperature} draws others; set rollout.temperature={loss.temperature}"
        )
    for key, value, off in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, -1)):
        if value != off:
            yield (
                f"loss.support=token estimates from tokens of the student's whole distribution, but rollout.{key}={value} "
                f"draws from a part of it; set rollout.{key}={off}"
            )
    if loss.estimator == "k1" and not loss.policy_gradient:
        yield (
            "loss.estimator=k1 with loss.policy_gradient=false has a gradient whose mean is 0: it teaches nothing; set "
            "loss.policy_gradient=true, or loss.estimator=k2 or k3"
        )
    if config.evaluation.files:
        yield (
            f"loss.support=token estimates from tokens that the student wrote, but evaluation.files="
            f"{[str(file) for file in config.evaluation.files]} holds those of others, on which it means nothing; set "
            "evaluation.files=[]"
        )


def _served_teacher_problems(config: "GkdConfig") -> Iterator[str]:
    """Of losses that need more of the teacher than the top k of a server, at temperature 1."""
    loss = config.loss
    if config.teacher.kind != "server":
        return
    if loss.support not in ("teacher_top_k", "token"):
        yield (
            f"loss.support={loss.support} needs the teacher's whole distribution, and teacher.kind=server tells its top_k; set "
            "loss.support=teacher_top_k or use teacher.kind=megatron"
        )
    temperature = loss.temperature if loss.teacher_temperature is None else loss.teacher_temperature
    if temperature != 1:
        key = "temperature" if loss.teacher_temperature is None else "teacher_temperature"
        yield (
            f"loss.{key}={temperature} would need the teacher's whole distribution, and teacher.kind=server tells its top_k at "
            "temperature 1; set loss.teacher_temperature=1 or use teacher.kind=megatron"
        )
    if loss.teacher_logit_scale != 1 or loss.teacher_logit_soft_cap is not None:
        yield (
            f"loss.teacher_logit_scale={loss.teacher_logit_scale} and loss.teacher_logit_soft_cap="
            f"{loss.teacher_logit_soft_cap} change logits, which teacher.kind=server has turned into log-probabilities "
            "already; leave them out"
        )
