"""Build the parts of a run from the configuration: the only place that reads the whole tree."""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_gkd.checkpoint.weights import WeightSource, load_head, load_weights
from megatron_gkd.config import GkdConfig
from megatron_gkd.config.hf_shapes import load_hf_shapes
from megatron_gkd.config.model import ModelConfig
from megatron_gkd.config.student import StudentConfig
from megatron_gkd.config.teacher import MegatronTeacherConfig, NoTeacherConfig, ServerTeacherConfig
from megatron_gkd.data.sample import Batch, MicroBatch
from megatron_gkd.models.gpt import (
    HiddenTap,
    LocalModel,
    ShardedModel,
    build_gpt,
    chunks_of,
    keep_graph_in_recompute,
)
from megatron_gkd.models.lora import LoraSpec, attach_adapters, start_training_adapters
from megatron_gkd.models.patterns import frozen_tensors, summarise, undecayed_tensors
from megatron_gkd.optim.optimizer import build_optimizer, wrap_ddp
from megatron_gkd.optim.schedule import LearningRateSchedule
from megatron_gkd.parallel.groups import Job, ModelGroups, init_student_groups, make_model_groups
from megatron_gkd.platform.device import DTYPES
from megatron_gkd.reshard.layout import WeightLayout, hf_tensors, parameters_made_of
from megatron_gkd.teacher.engine import NoTeacher, TeacherEngine
from megatron_gkd.teacher.megatron import MegatronTeacher
from megatron_gkd.train.served_teacher import build_served_teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student(ShardedModel):
    """The model that learns, and what trains it.

    Attributes:
        ddp: This rank's part, wrapped for data parallelism chunk by chunk.
        optimizer: Megatron's optimizer over it.
        schedule: Learning rate by iteration.
    """

    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: LearningRateSchedule

    @property
    def weights(self) -> WeightLayout:
        """The weights as slices of Hugging Face tensors."""
        return WeightLayout(self.shapes, self.groups.layout, self.model.vocab_size)


def weight_source(config: ModelConfig) -> WeightSource:
    """Where a model section says that its weights lie."""
    if config.checkpoint is not None:
        return WeightSource(config.checkpoint, is_checkpoint=True)
    assert config.hf is not None  # the schema asks for exactly one
    return WeightSource(config.hf, is_checkpoint=False)


def build_student(config: GkdConfig, job: Job) -> Student:
    """The student with its weights loaded, DDP, optimizer and schedule. Collective."""
    section, source = config.student, weight_source(config.student)
    parallel = section.parallel
    groups = init_student_groups(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        config.train.seed,
        parallel.virtual_pipeline_model_parallel_size,
    )
    shapes, dtype = load_hf_shapes(source.hf_folder), DTYPES[config.train.precision]
    model = build_gpt(
        shapes,
        groups,
        dtype=dtype,
        device=job.device,
        kernels=job.kernels,
        max_seq_length=config.seq_length,
        vocab_divisible_by=section.make_vocab_size_divisible_by,
        sequence_parallel=parallel.sequence_parallel,
        recompute=section.recompute,
    )
    load_weights(
        model,
        source,
        shapes,
        groups,
        vocab_divisible_by=section.make_vocab_size_divisible_by,
        device=job.device,
    )
    tap = HiddenTap(model) if groups.is_last_stage else None
    weights = WeightLayout(shapes, groups.layout, model.vocab_size)
    _choose_trained(section, model, weights, groups, config.train.seed)
    ddp = wrap_ddp(chunks_of(model), groups, config.optim)
    undecayed = _parameters_of(undecayed_tensors(config.optim, shapes), model, weights, groups)
    optimizer = build_optimizer(ddp, groups, config.optim, dtype, undecayed)
    schedule = LearningRateSchedule(optimizer, config.optim, config.train.train_iters)
    log.info("Student: %s, %s on %s", source.folder, groups.layout, job.device)
    return Student(model, groups, tap, shapes, dtype, ddp, optimizer, schedule)


def _choose_trained(
    config: StudentConfig, model: LocalModel, weights: WeightLayout, groups: ModelGroups, seed: int
) -> None:
    """Leave gradients to adapters alone, or to all weights but the frozen ones."""
    lora = config.lora
    keep_graph_in_recompute(model)
    if lora.rank:
        attach_adapters(model, LoraSpec(lora.rank, lora.alpha, lora.dropout, lora.targets), groups)
        start_training_adapters(model, groups, seed=seed)
        log.info(
            "Adapters of rank %d beside %s; all other weights are frozen", lora.rank, ", ".join(lora.targets)
        )
    tensors = frozen_tensors(config, weights.shapes)
    for parameter in _parameters_of(tensors, model, weights, groups):
        parameter.requires_grad_(False)
    if tensors:
        num_tensors = len(hf_tensors(weights.shapes))
        log.info("Frozen: %d of %d tensors: %s", len(tensors), num_tensors, summarise(tensors))


def _parameters_of(
    tensors: Collection[str], model: LocalModel, weights: WeightLayout, groups: ModelGroups
) -> list[Parameter]:
    """This rank's parameters that hold these Hugging Face tensors."""
    parameters = dict(model.named_parameters())
    names = parameters_made_of(
        tensors, weights, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=parameters
    )
    return [parameters[name] for name in names]


def build_teacher(
    config: GkdConfig, job: Job, student: Student, pad_id: int
) -> tuple[TeacherEngine, Tensor | None]:
    """The teacher, and the shard of its head that the loss needs (``None`` where it needs none). Collective."""
    if isinstance(config.teacher, NoTeacherConfig):
        _warn_of_own_samples(config)
        return NoTeacher(), None
    if isinstance(config.teacher, ServerTeacherConfig):
        return build_served_teacher(config, config.teacher, student.groups, job.device), None
    return _build_megatron_teacher(config, config.teacher, job, student, pad_id)


def _warn_of_own_samples(config: GkdConfig) -> None:
    if config.gkd.lmbda > 0:
        log.warning(
            "gkd.lmbda=%g: the cross-entropy also pulls the student towards what it writes itself; set gkd.lmbda=0 to learn "
            "from the data alone",
            config.gkd.lmbda,
        )


def _build_megatron_teacher(
    config: GkdConfig, section: MegatronTeacherConfig, job: Job, student: Student, pad_id: int
) -> tuple[MegatronTeacher, Tensor | None]:
    """The headless teacher, and the shard of its head on the student's last stage (``None`` elsewhere)."""
    source = weight_source(section)
    parallel = section.parallel
    groups = make_model_groups(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    shapes = load_hf_shapes(source.hf_folder)
    model = build_gpt(
        shapes,
        groups,
        dtype=student.dtype,
        device=job.device,
        kernels=job.kernels,
        max_seq_length=config.teacher_seq_length,
        sequence_parallel=parallel.sequence_parallel,
        is_headless=True,
    )
    load_weights(model, source, shapes, groups, is_headless=True, device=job.device)
    head_VH = load_head(
        source,
        shapes,
        tp_rank=student.groups.tp_rank,
        tp_size=student.groups.layout.tp_size,
        padded_vocab=student.model.vocab_size,
        dp_rank=student.groups.dp_rank,
        dtype=student.dtype,
        device=job.device,
        is_needed=student.groups.is_last_stage,
    )
    teacher = MegatronTeacher(
        model,
        groups,
        student_layout=student.groups.layout,
        student_dp_rank=student.groups.dp_rank,
        micro_batch_size=section.micro_batch_size,
        pad_id=pad_id,
        device=job.device,
    )
    log.info("Teacher: %s, %s, headless", source.folder, groups.layout)
    return teacher, head_VH


def make_micro_batches(config: GkdConfig, groups: ModelGroups, batch: Batch, pad_id: int) -> list[MicroBatch]:
    """This rank's part of the batch, padded to a length that student and teacher can split.

    Args:
        config: Says how large a micro-batch is and who splits sequences.
        groups: The student's.
        batch: All samples of the iteration.
        pad_id: Token that fills the sequences up.
    """
    parallel = [model.parallel for model in config.models.values()]
    multiple_of = math.lcm(*(p.tensor_model_parallel_size if p.sequence_parallel else 1 for p in parallel))
    return batch.micro_batches(
        config.train.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.layout.dp_size,
        seq_length=batch.padded_length(multiple_of),
        pad_id=pad_id,
    )
