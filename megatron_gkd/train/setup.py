"""The construction of a run: every part of it from the configuration.

Tokenizer and prompts are read by every rank before the process group exists, so that a file that cannot be used is refused
while no rank waits for another.
"""

import logging
import math
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from torch.nn import Parameter

from megatron_gkd.checkpoint.store import CheckpointStore
from megatron_gkd.checkpoint.weights import WeightSource, load_weights
from megatron_gkd.config import GkdConfig
from megatron_gkd.config.hf_shapes import load_hf_shapes
from megatron_gkd.config.student import StudentConfig
from megatron_gkd.data.custom import load_chat_template, load_dataset_class
from megatron_gkd.data.prompts import RowPolicy, load_prompts
from megatron_gkd.data.row_files import RowFile, open_row_files
from megatron_gkd.data.rows import RowEncoder, RowKeys, RowLimits
from megatron_gkd.data.sample import Prompt, Sharding
from megatron_gkd.data.streams import MixedPrompts, PromptLoader, PromptStream, StreamedPrompts
from megatron_gkd.data.tokenizer import DataError, Tokenizer, load_tokenizer, require_same_vocabulary
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
from megatron_gkd.optim.optimizer import LearningRateSchedule, build_optimizer, wrap_ddp
from megatron_gkd.parallel.groups import Job, ModelGroups, init_student_groups
from megatron_gkd.platform.device import DTYPES, Platform
from megatron_gkd.platform.kernels import detect_kernels
from megatron_gkd.reshard.layout import WeightLayout, hf_tensors, parameters_made_of
from megatron_gkd.rollout import ROLLOUTS
from megatron_gkd.rollout.base import RolloutContext
from megatron_gkd.teacher import TEACHERS
from megatron_gkd.teacher.base import TeacherContext, TeacherEngine
from megatron_gkd.train.backend import require_loss_backend, with_backend_of
from megatron_gkd.train.evaluation import Evaluation
from megatron_gkd.train.lifecycle import Checkpoints
from megatron_gkd.train.loss import RunLoss, certify_run
from megatron_gkd.train.recorder import Recorder
from megatron_gkd.train.step import Student
from megatron_gkd.train.trainer import Trainer

log = logging.getLogger(__name__)


def build_trainer(config: GkdConfig, platform: Platform, cleanup: ExitStack) -> Trainer:
    """All parts of a run, resumed from its newest checkpoint. Collective.

    Args:
        config: Checked configuration.
        platform: The device of this process.
        cleanup: Receives what must be closed at the end of the run, also if a later part cannot be built.

    Raises:
        ConfigError, DataError, CheckpointError: The input cannot be used; nothing was trained or changed.
        CertificateError: The loss is wrong on this machine.
    """
    # everything that may refuse the run comes before the process group: no rank waits for one that has ended
    tokenizer = build_tokenizer(config)
    prompts = build_prompts(config, tokenizer)
    held_out = build_validation_prompts(config, tokenizer)
    config = _with_iterations_of(config, prompts)
    job = Job.of_process(platform, detect_kernels(on_cpu=platform.is_cpu))
    rollout_kind, rollout_context = ROLLOUTS[type(config.rollout)], RolloutContext(config, job, tokenizer)
    require_loss_backend(config, platform.device)
    rollout_kind.preflight(config.rollout, rollout_context)
    check_teacher(config, job, tokenizer)

    join(job, cleanup)
    # first, so that a server that the run starts loads while the models are built
    rollout = rollout_kind.build(config.rollout, rollout_context)
    cleanup.callback(rollout.close)
    student = build_student(config, job)
    config = with_backend_of(config, student, job.device)
    if config.loss.certify:  # with the back end that trains, and before anything is written
        certify_run(config, student.groups, job.device)
    teacher = build_teacher(config, job, tokenizer, student)
    sharding = build_sharding(config, student.groups, tokenizer.pad_id)
    checkpoints = Checkpoints(_build_store(config, job, tokenizer, student), config, student, prompts)
    recorder = Recorder(config, job, tokenizer)
    cleanup.callback(recorder.close)
    return Trainer(
        config=config,
        job=job,
        prompts=prompts,
        rollout=rollout,
        teacher=teacher,
        student=student,
        loss=build_loss(config, student, teacher),
        sharding=sharding,
        evaluation=Evaluation(held_out, config, sharding) if held_out else None,
        checkpoints=checkpoints,
        recorder=recorder,
        state=checkpoints.resume(),
    )


def join(job: Job, cleanup: ExitStack) -> None:
    """Create the process group, which ``cleanup`` destroys. Collective."""
    job.join()
    cleanup.callback(dist.destroy_process_group)
    log.info("%d ranks on %s (%s); %s", job.size, job.device, job.platform.reason, job.kernels.reason)


def build_tokenizer(config: GkdConfig) -> Tokenizer:
    """The student's tokenizer, or the one of ``data.tokenizer``.

    Raises:
        DataError: It cannot be read, has ids beyond the student's vocabulary, or differs from the teacher's, so that their
            distributions cannot be compared.
    """
    data, folder = config.data, config.student.hf_folder
    template = None if data.chat_template is None else load_chat_template(data.chat_template)
    tokenizer = load_tokenizer(data.tokenizer or folder, data.tokenizer_kind, chat_template=template)
    # fewer ids than rows is common (padded embeddings); more would index beyond the embedding
    num_rows = load_hf_shapes(folder).vocab_size
    if tokenizer.vocab_size > num_rows:
        raise DataError(
            f"the tokenizer {tokenizer.folder} has {tokenizer.vocab_size} ids, but the student ({folder}) only {num_rows} "
            "rows of its vocabulary; set data.tokenizer to the student's own"
        )
    if (teacher_folder := config.teacher.hf_folder) is not None:
        require_same_vocabulary(tokenizer, load_tokenizer(teacher_folder))
    return tokenizer


def build_prompts(config: GkdConfig, tokenizer: Tokenizer) -> PromptStream:
    """The prompts, in the order of the seed.

    Raises:
        DataError: A file or a row cannot be used.
    """
    files = _open(config, config.data.prompts)
    # weights apply to files, so each becomes a stream of its own; otherwise all files are shuffled together
    groups = [[file] for file in files] if config.data.weights else [files]
    streams = [_build_stream(config, group, tokenizer) for group in groups]
    return MixedPrompts(streams, config.data.weights) if config.data.weights else streams[0]


def build_validation_prompts(config: GkdConfig, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The held-out rows; none without ``evaluation.files``.

    Raises:
        DataError: A file or a row cannot be used, or a row has no completion.
    """
    section = config.evaluation
    if not section.files:
        return ()
    policy = RowPolicy(
        config.data.overlong_prompts, config.data.max_bad_rows, "evaluation.files; add it or remove the row"
    )
    encoder = _encoder(config, tokenizer, needs_completions=True)
    prompts = load_prompts(_open(config, section.files), encoder, policy, max_rows=section.num_rows)
    log.info("Validation: %s", prompts.summary())
    return prompts.prompts


def with_iterations(config: GkdConfig, tokenizer: Tokenizer) -> GkdConfig:
    """The configuration with ``train.epochs`` converted to iterations; reads the prompts to count them."""
    return _with_iterations_of(config, build_prompts(config, tokenizer)) if config.train.epochs else config


def build_student(config: GkdConfig, job: Job) -> Student:
    """The student with its weights loaded, DDP, optimizer and schedule. Collective."""
    section, source = config.student, WeightSource.of(config.student)
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
    # before DDP and the optimizer, which allocate buffers and state for what requires a gradient
    _set_requires_grad(section, model, weights, groups, config.train.seed)
    ddp = wrap_ddp(chunks_of(model), groups, config.optim)
    undecayed = _parameters_of(undecayed_tensors(config.optim, shapes), model, weights, groups)
    optimizer = build_optimizer(ddp, groups, config.optim, dtype, undecayed)
    log.info("Student: %s, %s on %s", source.folder, groups.layout, job.device)
    return Student(
        model=model,
        groups=groups,
        tap=tap,
        shapes=shapes,
        dtype=dtype,
        ddp=ddp,
        optimizer=optimizer,
        schedule=LearningRateSchedule(optimizer, config.optim, config.train.train_iters),
    )


def check_teacher(config: GkdConfig, job: Job, tokenizer: Tokenizer) -> None:
    """Run the teacher's checks of this machine, before the process group exists.

    Raises:
        ConfigError, DataError: The teacher's server does not answer, or serves another model.
    """
    TEACHERS[type(config.teacher)].preflight(config.teacher, TeacherContext(config, job, tokenizer))


def build_teacher(config: GkdConfig, job: Job, tokenizer: Tokenizer, student: ShardedModel) -> TeacherEngine:
    """The teacher of the configured kind. Collective."""
    context = TeacherContext(config, job, tokenizer)
    return TEACHERS[type(config.teacher)].build(config.teacher, context, student)


def build_loss(config: GkdConfig, student: ShardedModel, teacher: TeacherEngine) -> RunLoss:
    """The loss of the run, for the student's layout and the teacher's LM head."""
    return RunLoss(config.loss, student.groups.pg.tp, student.shapes.vocab_size, teacher.head_VH)


def build_sharding(config: GkdConfig, groups: ModelGroups, pad_id: int) -> Sharding:
    """How a rank cuts its share of a batch into the student's micro-batches.

    Args:
        config: Checked configuration.
        groups: The student's.
        pad_id: Token that pads shorter sequences.
    """
    parallel = [model.parallel for model in config.models.values()]
    return Sharding(
        config.train.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.layout.dp_size,
        pad_id=pad_id,
        # sequence parallelism splits the positions, of the student and of a teacher on the same batch
        multiple_of=math.lcm(*(p.tensor_model_parallel_size if p.sequence_parallel else 1 for p in parallel)),
    )


def _with_iterations_of(config: GkdConfig, prompts: PromptStream) -> GkdConfig:
    counted = config.with_iterations(prompts.prompts_per_epoch)
    if counted is not config:
        log.info(
            "train.epochs=%g of %d prompts are %d iterations",
            config.train.epochs,
            prompts.prompts_per_epoch,
            counted.train.train_iters,
        )
    return counted


def _build_stream(config: GkdConfig, files: list[RowFile], tokenizer: Tokenizer) -> PromptStream:
    data, seed = config.data, config.train.seed
    needs_completions = config.gkd.lmbda < 1
    needed_by = "gkd.lmbda below 1; add it or set gkd.lmbda: 1" if needs_completions else None
    policy = RowPolicy(data.overlong_prompts, data.max_bad_rows, needed_by)
    encoder = _encoder(config, tokenizer, needs_completions=needs_completions)
    if data.streaming:
        return StreamedPrompts(
            files, encoder, policy, seed=seed, shuffle=data.shuffle, block_rows=data.shuffle_rows
        )
    prompts = load_prompts(files, encoder, policy)  # streamed prompts are counted as they are read
    log.info("Prompts: %s", prompts.summary())
    return PromptLoader(prompts, seed=seed, shuffle=data.shuffle)


def _encoder(config: GkdConfig, tokenizer: Tokenizer, *, needs_completions: bool) -> RowEncoder:
    data = config.data
    limits = RowLimits(
        data.max_prompt_length,
        data.max_teacher_prompt_length,
        # on-policy samples replace the completions, whose length then does not matter
        config.rollout.max_new_tokens if needs_completions else None,
        data.truncation,
    )
    return RowEncoder(tokenizer, limits, _keys(config))


def _keys(config: GkdConfig) -> RowKeys:
    data = config.data
    return RowKeys(data.prompt_key, data.completion_key, data.messages_key, data.teacher_prompt_key)


def _open(config: GkdConfig, paths: tuple[Path, ...]) -> list[RowFile]:
    name = config.data.dataset_class
    return open_row_files(paths, _keys(config), make=load_dataset_class(name) if name else None)


def _set_requires_grad(
    config: StudentConfig, model: LocalModel, weights: WeightLayout, groups: ModelGroups, seed: int
) -> None:
    """Set requires_grad: adapters only, or all weights but the frozen ones."""
    lora = config.lora
    keep_graph_in_recompute(model)  # only matters if the embedding is frozen
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


def _build_store(config: GkdConfig, job: Job, tokenizer: Tokenizer, student: Student) -> CheckpointStore:
    return CheckpointStore(
        config.checkpoint_dir,
        hf_files=config.student.hf_folder,
        groups=student.groups,
        dtype=student.dtype,
        device=job.device,
        keep_last=config.checkpoint.keep_last,
        best_metric=config.checkpoint.keep_best_metric,
        tokenizer=config.data.tokenizer,
        # otherwise the template is copied with the tokenizer's files
        chat_template=tokenizer.chat_template if config.data.chat_template else None,
        in_background=config.checkpoint.async_save,
    )
