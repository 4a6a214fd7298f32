"""Build the parts of a run from the configuration: the only place that reads the whole tree."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_gkd.checkpoint.weights import WeightSource, load_head, load_weights
from megatron_gkd.config import GkdConfig
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.config.schema import MegatronTeacherConfig, ModelConfig, NoTeacherConfig
from megatron_gkd.data.prompts import PromptLoader, load_prompts
from megatron_gkd.data.tokenizer import Tokenizer, load_tokenizer, require_same_vocabulary
from megatron_gkd.models.gpt import HiddenTap, build_gpt
from megatron_gkd.optim.optimizer import build_optimizer, wrap_ddp
from megatron_gkd.optim.schedule import LearningRateSchedule
from megatron_gkd.parallel.groups import ModelGroups, init_student_groups, make_model_groups
from megatron_gkd.platform.device import Platform
from megatron_gkd.platform.kernels import Kernels
from megatron_gkd.reshard.layout import WeightLayout
from megatron_gkd.teacher.engine import NoTeacher, TeacherEngine
from megatron_gkd.teacher.megatron import MegatronTeacher

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """This process and what it runs on.

    Attributes:
        platform: Device and collective back end.
        kernels: Optional kernel libraries.
        rank: Rank in the job.
        size: Ranks in the job.
    """

    platform: Platform
    kernels: Kernels
    rank: int
    size: int

    @property
    def is_leader(self) -> bool:
        """Rank 0 talks to servers and writes the records."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.platform.device


@dataclass(frozen=True)
class Student:
    """The model that learns, and what trains it.

    Attributes:
        model: This rank's part.
        ddp: The same, wrapped for data parallelism.
        optimizer: Megatron's optimizer over it.
        schedule: Learning rate by iteration.
        groups: Layout and process groups.
        tap: Switch on the output layer of the last stage; ``None`` on other stages.
        weights: Its weights as slices of Hugging Face tensors.
        dtype: Number format of the parameters.
    """

    model: GPTModel
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: LearningRateSchedule
    groups: ModelGroups
    tap: HiddenTap | None
    weights: WeightLayout
    dtype: torch.dtype

    @property
    def shapes(self) -> HfShapes:
        """Sizes from config.json."""
        return self.weights.shapes


def weight_source(config: ModelConfig) -> WeightSource:
    """Where a model section says that its weights lie."""
    if config.checkpoint is not None:
        return WeightSource(config.checkpoint, is_checkpoint=True)
    assert config.hf is not None  # the schema asks for exactly one
    return WeightSource(config.hf, is_checkpoint=False)


def build_student(config: GkdConfig, world: World) -> Student:
    """The student with its weights loaded, DDP, optimizer and schedule. Collective."""
    section, source = config.student, weight_source(config.student)
    parallel = section.parallel
    groups = init_student_groups(
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, config.train.seed
    )
    shapes, dtype = load_hf_shapes(source.hf_folder), DTYPES[config.train.precision]
    model = build_gpt(
        shapes,
        groups,
        dtype=dtype,
        device=world.device,
        kernels=world.kernels,
        max_seq_length=config.seq_length,
        vocab_divisible_by=section.make_vocab_size_divisible_by,
        sequence_parallel=parallel.sequence_parallel,
    )
    load_weights(
        model,
        source,
        shapes,
        groups,
        vocab_divisible_by=section.make_vocab_size_divisible_by,
        device=world.device,
    )
    tap = HiddenTap(model) if groups.is_last_stage else None
    ddp = wrap_ddp(model, groups)
    optimizer = build_optimizer(ddp, groups, config.optim, dtype)
    schedule = LearningRateSchedule(optimizer, config.optim, config.train.train_iters)
    weights = WeightLayout(shapes, groups.layout, model.vocab_size)
    log.info("Student: %s, %s on %s", source.folder, groups.layout, world.device)
    return Student(model, ddp, optimizer, schedule, groups, tap, weights, dtype)


def build_teacher(
    config: GkdConfig, world: World, student: Student, pad_id: int
) -> tuple[TeacherEngine, Tensor | None]:
    """The teacher, and the shard of its head that the loss needs (``None`` where it needs none). Collective."""
    if isinstance(config.teacher, NoTeacherConfig):
        _warn_of_own_samples(config)
        return NoTeacher(), None
    return _build_megatron_teacher(config, config.teacher, world, student, pad_id)


def _warn_of_own_samples(config: GkdConfig) -> None:
    if config.gkd.lmbda > 0:
        log.warning(
            "gkd.lmbda=%g: the cross-entropy also pulls the student towards what it writes itself; set gkd.lmbda=0 to learn "
            "from the data alone",
            config.gkd.lmbda,
        )


def _build_megatron_teacher(
    config: GkdConfig, section: MegatronTeacherConfig, world: World, student: Student, pad_id: int
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
        device=world.device,
        kernels=world.kernels,
        max_seq_length=config.seq_length,
        sequence_parallel=parallel.sequence_parallel,
        is_headless=True,
    )
    load_weights(model, source, shapes, groups, is_headless=True, device=world.device)
    head_VH = load_head(
        source,
        shapes,
        tp_rank=student.groups.tp_rank,
        tp_size=student.groups.layout.tp_size,
        padded_vocab=student.model.vocab_size,
        dp_rank=student.groups.dp_rank,
        dtype=student.dtype,
        device=world.device,
        is_needed=student.groups.is_last_stage,
    )
    teacher = MegatronTeacher(
        model,
        groups,
        student_layout=student.groups.layout,
        student_dp_rank=student.groups.dp_rank,
        micro_batch_size=section.micro_batch_size,
        pad_id=pad_id,
        device=world.device,
    )
    log.info("Teacher: %s, %s, headless", source.folder, groups.layout)
    return teacher, head_VH


def build_tokenizer(config: GkdConfig) -> Tokenizer:
    """The student's tokenizer.

    Raises:
        ValueError: The teacher's has another vocabulary, so that the two distributions cannot be compared.
    """
    student = load_tokenizer(config.student.hf_folder)
    for name, model in config.models.items():
        if name != "student":
            require_same_vocabulary(student, load_tokenizer(model.hf_folder))
    return student


def build_loader(config: GkdConfig, tokenizer: Tokenizer) -> PromptLoader:
    """The prompts in the order of the seed; every rank reads them for itself."""
    prompts = load_prompts(
        config.data.prompts,
        tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        overlong=config.data.overlong_prompts,
        max_bad_rows=config.data.max_bad_rows,
        require_completions=config.gkd.lmbda < 1,
        max_completion_length=config.rollout.max_new_tokens if config.gkd.lmbda < 1 else None,
    )
    log.info("Prompts: %s", prompts.summary())
    return PromptLoader(prompts, seed=config.train.seed, shuffle=config.data.shuffle)


def start_world(platform: Platform, kernels: Kernels) -> World:
    """This process's place in the job, once the process group exists."""
    return World(platform, kernels, dist.get_rank(), dist.get_world_size())


def log_folder(config: GkdConfig) -> Path:
    """Where every rank keeps its own log."""
    return config.train.output_dir / "logs"
