"""Checks between sections, against files, and against the number of ranks.

Rules within a section are validators of that section. Each rule here yields messages with keys, values and the fix, so
that all problems are reported together.
"""

from collections.abc import Iterator

from megatron_gkd.config.base import ConfigError, all_keys, did_you_mean, sections_of
from megatron_gkd.config.check_files import find_file_problems
from megatron_gkd.config.schema import GkdConfig


def check_config(config: GkdConfig) -> None:
    """Check the sections against each other and against files; ``load_config`` calls it.

    Raises:
        ConfigError: Lists all problems.
    """
    if problems := [*_section_problems(config), *find_file_problems(config)]:
        raise ConfigError.listing("the configuration", problems)


def check_world(config: GkdConfig, world_size: int) -> None:
    """Check the layouts and the batch against the number of ranks.

    Call it before any process group exists, so that no rank waits in a collective for one that raised.

    Raises:
        ConfigError: Lists all problems.
    """
    if problems := list(_world_problems(config, world_size)):
        raise ConfigError.listing(f"the configuration for {world_size} ranks", problems)


def _section_problems(config: GkdConfig) -> Iterator[str]:
    yield from _batch_problems(config)
    yield from _embedded_engine_problems(config)
    yield from _unknown_key_problems(config)
    yield from _metric_problems(config)
    yield from _share_problems(config)
    yield from _estimator_problems(config)
    yield from _partial_teacher_problems(config)


def _batch_problems(config: GkdConfig) -> Iterator[str]:
    batch, num_samples = config.train.global_batch_size, config.rollout.num_samples
    if batch % num_samples:
        yield (
            f"train.global_batch_size={batch} is not a multiple of rollout.num_samples={num_samples}; "
            "all samples of a prompt belong to one iteration"
        )
    if config.train.train_iters:  # else train.epochs, whose iterations are known once the prompts are counted
        yield from config.optim.schedule_problems(config.train.train_iters)


def _embedded_engine_problems(config: GkdConfig) -> Iterator[str]:
    if not config.rollout.uses_student_model:
        return
    kind, others = f"rollout.kind={config.rollout.kind}", _kinds("rollout", uses_student_model=False)
    if config.student.parallel.sequence_parallel:
        yield (
            f"{kind} generates one token at a time, which student.parallel.sequence_parallel=true cannot split; "
            f"set it to false or use {others}"
        )
    if (chunks := config.student.parallel.virtual_pipeline_model_parallel_size) > 1:
        yield (
            f"{kind} passes every token through the pipeline once, which "
            f"student.parallel.virtual_pipeline_model_parallel_size={chunks} would repeat; "
            f"set it to 1 or use {others}"
        )


def _unknown_key_problems(config: GkdConfig) -> Iterator[str]:
    known = list(all_keys(type(config)))
    for key in config.checkpoint.allow_changes:
        if key not in known:
            yield f"checkpoint.allow_changes names {key!r}, which is no key{did_you_mean(key, known)}"


def _metric_problems(config: GkdConfig) -> Iterator[str]:
    if config.checkpoint.keep_best_metric == "validation/loss" and not config.evaluation.files:
        yield (
            "checkpoint.keep_best_metric=validation/loss needs evaluation.files, or nothing measures it; give files or "
            "set checkpoint.keep_best_metric=loss"
        )


def _share_problems(config: GkdConfig) -> Iterator[str]:
    teacher, sft_weight = config.teacher, config.loss.sft_weight
    if not teacher.gives_signal and sft_weight != 1:
        yield (
            f"loss.sft_weight={sft_weight} leaves a share to a divergence, but teacher.kind={teacher.kind}; set "
            "loss.sft_weight=1 or give a teacher"
        )
    if teacher.gives_signal and sft_weight == 1:
        yield (
            f"loss.sft_weight=1.0 leaves nothing for teacher.kind={teacher.kind}; set "
            f"{_kinds('teacher', gives_signal=False)} or lower loss.sft_weight"
        )


def _estimator_problems(config: GkdConfig) -> Iterator[str]:
    """Estimators are unbiased only for tokens drawn from the distribution that the loss is computed with."""
    loss, rollout = config.loss, config.rollout
    if loss.support != "token":
        return
    if config.gkd.lmbda < 1:
        yield (
            f"loss.support=token needs completions of the student, but gkd.lmbda={config.gkd.lmbda} takes some from data; "
            "set gkd.lmbda=1"
        )
    if rollout.temperature != loss.temperature:
        yield (
            f"loss.support=token needs tokens drawn at loss.temperature={loss.temperature}, but rollout.temperature="
            f"{rollout.temperature} draws others; set rollout.temperature={loss.temperature}"
        )
    for key, value, off in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, -1)):
        if value != off:
            yield (
                f"loss.support=token needs tokens of the student's whole distribution, but rollout.{key}={value} "
                f"draws from a part of it; set rollout.{key}={off}"
            )
    if loss.estimator == "k1" and not loss.policy_gradient:
        yield (
            "loss.estimator=k1 with loss.policy_gradient=false has a gradient with mean 0, which trains nothing; set "
            "loss.policy_gradient=true, or loss.estimator=k2 or k3"
        )
    if config.evaluation.files:
        yield (
            f"loss.support=token needs completions of the student, but evaluation.files="
            f"{[str(file) for file in config.evaluation.files]} holds those of others; set evaluation.files=[]"
        )


def _partial_teacher_problems(config: GkdConfig) -> Iterator[str]:
    """Losses that need logits from a teacher that gives log-probabilities of some entries at temperature 1."""
    loss, teacher = config.loss, config.teacher
    if not teacher.gives_signal or teacher.gives_full_distribution:
        return
    kind, others = f"teacher.kind={teacher.kind}", _kinds("teacher", gives_full_distribution=True)
    if loss.support not in ("teacher_top_k", "token"):
        yield (
            f"loss.support={loss.support} needs the teacher's whole distribution, and {kind} gives its top_k; set "
            f"loss.support=teacher_top_k or use {others}"
        )
    temperature = loss.temperature if loss.teacher_temperature is None else loss.teacher_temperature
    if temperature != 1:
        key = "temperature" if loss.teacher_temperature is None else "teacher_temperature"
        yield (
            f"loss.{key}={temperature} would need the teacher's whole distribution, and {kind} gives its top_k at "
            f"temperature 1; set loss.teacher_temperature=1 or use {others}"
        )
    if loss.teacher_logit_scale != 1 or loss.teacher_logit_soft_cap is not None:
        yield (
            f"loss.teacher_logit_scale={loss.teacher_logit_scale} and loss.teacher_logit_soft_cap="
            f"{loss.teacher_logit_soft_cap} change logits, which {kind} has already turned into "
            "log-probabilities; leave them out"
        )


def _world_problems(config: GkdConfig, world_size: int) -> Iterator[str]:
    """Layouts and batch sizes that do not fit ``world_size`` ranks."""
    batch = config.train.global_batch_size
    for name, model in config.models.items():
        tp, pp = model.parallel.tensor_model_parallel_size, model.parallel.pipeline_model_parallel_size
        copies, rest = divmod(world_size, model.parallel.ranks_per_copy)
        if rest or not copies:
            yield (
                f"{name}.parallel: one copy takes tensor_model_parallel_size={tp} x "
                f"pipeline_model_parallel_size={pp} = {tp * pp} ranks, which does not divide the {world_size} ranks of the job; "
                f"start a multiple of {tp * pp} ranks or change the sizes"
            )
            continue
        micro = config.train.micro_batch_size if name == "student" else 1
        if batch % (micro * copies):
            product = f"train.micro_batch_size={micro} x {copies}" if name == "student" else f"{copies}"
            yield (
                f"train.global_batch_size={batch} is not divisible by {product} copies of the {name}; "
                f"use a multiple of {micro * copies}"
            )
        elif name == "student":
            yield from _interleaving_problems(config, batch // (micro * copies))


def _interleaving_problems(config: GkdConfig, num_micro_batches: int) -> Iterator[str]:
    parallel = config.student.parallel
    pp = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size > 1 and num_micro_batches % pp:
        yield (
            f"student.parallel.virtual_pipeline_model_parallel_size={parallel.virtual_pipeline_model_parallel_size} "
            f"works on groups of pipeline_model_parallel_size={pp} micro-batches, but every copy of the student has "
            f"{num_micro_batches}; change train.global_batch_size or train.micro_batch_size so that they are a "
            f"multiple of {pp}"
        )


def _kinds(section: str, **capability: bool) -> str:
    """Kinds with a capability, as text: "teacher.kind=megatron or teacher.kind=server"."""
    [(name, value)] = capability.items()
    kinds = sections_of(GkdConfig.model_fields[section])
    return " or ".join(f"{section}.kind={kind}" for kind, cls in kinds.items() if getattr(cls, name) == value)
