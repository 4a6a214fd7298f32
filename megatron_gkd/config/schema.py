"""The configuration tree: each key has a type, a limit, a default and a sentence, here and nowhere else.

Nothing changes after loading; what follows from other keys is a property. The sentences become the comments
of ``configs/on_policy_distill_trainer.yaml`` and the tables of ``docs/configuration.md``.
"""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, Tag, field_validator, model_validator

from megatron_gkd.config import rules
from megatron_gkd.config.base import Config, kind_discriminator
from megatron_gkd.config.data import DataConfig, EvaluationConfig
from megatron_gkd.config.errors import ConfigError
from megatron_gkd.config.lora import LoraConfig
from megatron_gkd.config.loss import LossConfig
from megatron_gkd.config.optim import OptimConfig, require_patterns
from megatron_gkd.config.rollout import RolloutConfig, SglangRolloutConfig
from megatron_gkd.config.runtime import RuntimeConfig


class ParallelConfig(Config):
    """How one copy of a model is spread over ranks; all other ranks hold further copies (data parallel)."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer; every one holds a slice of each weight matrix and of the vocabulary."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Stages that the layers are divided into, in order."""
    sequence_parallel: bool = False
    """Also split the activations between the tensor-parallel parts along the sequence; needs
    tensor_model_parallel_size > 1."""

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @model_validator(mode="after")
    def _sequence_parallel_needs_tensor_parallel(self) -> Self:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "sequence_parallel=true needs tensor_model_parallel_size > 1 (it is 1); "
                "raise it or set sequence_parallel=false"
            )
        return self


class StudentParallelConfig(ParallelConfig):
    """How one copy of the student is spread over ranks; all other ranks hold further copies (data parallel)."""

    virtual_pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Chunks of layers on every pipeline stage; more shorten the idle time at both ends of an iteration
    and cost more communication. Needs pipeline_model_parallel_size > 1."""

    @model_validator(mode="after")
    def _virtual_stages_need_a_pipeline(self) -> Self:
        chunks, pp = self.virtual_pipeline_model_parallel_size, self.pipeline_model_parallel_size
        if chunks > 1 and pp == 1:
            raise ValueError(
                f"virtual_pipeline_model_parallel_size={chunks} needs pipeline_model_parallel_size > 1 (it is 1); "
                "raise it or set virtual_pipeline_model_parallel_size=1"
            )
        return self


class RecomputeConfig(Config):
    """Activations that the backward pass computes again instead of keeping them: less memory, more time."""

    granularity: Literal["none", "selective", "full"] = "none"
    """selective: only the parts named by modules; full: whole layers, of which only the input is kept."""
    modules: tuple[Literal["core_attn", "mlp"], ...] = Field(default=("core_attn",), min_length=1)
    """Parts of every layer that selective computes again; core_attn is what Transformer Engine's fused
    attention does by itself."""
    method: Literal["uniform", "block"] = "uniform"
    """Layers that full computes again. uniform: all, keeping the input of every num_layers-th; block: the
    first num_layers of each pipeline stage, one by one."""
    num_layers: int = Field(default=1, ge=1)
    """See method."""


class ModelConfig(Config):
    """Where a model comes from and how it is spread over ranks."""

    hf: Path | None = None
    """Folder in Hugging Face format: config.json, safetensors and tokenizer files. Give either this or
    checkpoint."""
    checkpoint: Path | None = None
    """Folder written by tools/convert_hf_to_megatron.py, or a training checkpoint iter_<n>. Give either this
    or hf."""
    parallel: ParallelConfig = ParallelConfig()

    @property
    def hf_folder(self) -> Path:
        """Folder that holds config.json and the tokenizer files, whichever kind of source was given."""
        if self.hf is not None:
            return self.hf
        assert self.checkpoint is not None  # _exactly_one_source
        return self.checkpoint / "hf"

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        if self.hf is None and self.checkpoint is None:
            raise ValueError("give exactly one of hf and checkpoint; neither is given")
        if self.hf is not None and self.checkpoint is not None:
            raise ValueError(
                f"give exactly one of hf and checkpoint; hf={str(self.hf)!r} and "
                f"checkpoint={str(self.checkpoint)!r} are both given, set one to null"
            )
        return self


class StudentConfig(ModelConfig):
    """The model that learns."""

    parallel: StudentParallelConfig = StudentParallelConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    make_vocab_size_divisible_by: int = Field(default=1, ge=1)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size; the padding takes no
    part in the loss."""
    freeze: tuple[str, ...] = ()
    """Glob patterns of weights that are not trained, such as model.embed_tokens.weight or decoder.layers.[0-7].*, on
    Hugging Face or Megatron names with the layer's number in the whole model. Patterns that match nothing, or a part of
    what Megatron keeps in one parameter (q, k and v; gate and up), are refused."""

    lora: LoraConfig = LoraConfig()

    @field_validator("freeze")
    @classmethod
    def _patterns_are_not_empty(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return require_patterns(patterns)

    @model_validator(mode="after")
    def _freeze_or_lora(self) -> Self:
        if self.freeze and self.lora.rank:
            raise ValueError(
                f"freeze={list(self.freeze)} and lora.rank={self.lora.rank} are both given, and adapters leave every "
                "weight of the student frozen; remove freeze"
            )
        return self


class MegatronTeacherConfig(ModelConfig):
    """The model that is imitated; it runs forward only, in a layout of its own on the student's ranks."""

    kind: Literal["megatron"] = "megatron"
    """megatron: a model on the student's ranks; none: no teacher, only the cross-entropy of loss.sft_weight=1."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Sequences that the teacher scores in one forward pass."""


class NoTeacherConfig(Config):
    """No teacher: supervised fine-tuning on the completions, with loss.sft_weight=1."""

    kind: Literal["none"] = "none"
    """megatron: a model on the student's ranks; none: no teacher, only the cross-entropy of loss.sft_weight=1."""


TeacherConfig = Annotated[
    Annotated[MegatronTeacherConfig, Tag("megatron")] | Annotated[NoTeacherConfig, Tag("none")],
    kind_discriminator("megatron"),
]


class GkdSection(Config):
    """Generalized knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649)."""

    lmbda: float = Field(default=0.5, ge=0, le=1)
    """Probability that a sample's completion is generated by the student; the others are read from
    data.prompts."""


class TrainConfig(Config):
    """Length, batch and place of the run."""

    train_iters: int = Field(default=0, ge=0)
    """Optimizer steps of the whole run, including those before a resume. Give either this or epochs; 0: epochs."""
    epochs: float = Field(default=0.0, ge=0)
    """Passes over the prompts, rounded up to whole iterations; 0: train_iters counts."""
    global_batch_size: int = Field(ge=1)
    """Sequences per iteration over all ranks."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences in one forward and backward pass of the student on one rank."""
    seed: int = Field(default=1234, ge=0)
    """Seed of data order, on-policy choice, sampling and weight initialisation."""
    output_dir: Path
    """Everything the run writes lies under this folder."""
    max_skipped_updates: int = Field(default=3, ge=0)
    """Updates in a row that may be skipped because a gradient was not finite; one more ends the run."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of weights and activations; the optimizer keeps fp32 in either case."""

    @model_validator(mode="after")
    def _exactly_one_length(self) -> Self:
        if bool(self.train_iters) == bool(self.epochs):
            given = "both are given, set one to 0" if self.epochs else "neither is given"
            raise ValueError(f"give exactly one of train_iters and epochs; {given}")
        return self


class CheckpointConfig(Config):
    """Saving and resuming."""

    save_interval: int = Field(default=0, ge=0)
    """Iterations between checkpoints; 0: only at the end."""
    keep_last: int = Field(default=0, ge=0)
    """Newest checkpoints that are kept, older ones are removed; 0 keeps all. The disk needs room for one more."""
    keep_best_metric: Literal["loss", "validation/loss"] | None = None
    """Also keep the checkpoint at which this metric was lowest, and link it as checkpoints/best."""
    resume: bool = True
    """Continue from the newest valid checkpoint under train.output_dir, if there is one."""
    allow_changes: tuple[str, ...] = ()
    """Keys or sections, such as optim.lr or loss, that may differ from the configuration of the checkpoint that is
    resumed; any other change of what is computed is refused. Changed data are read from their beginning."""


class LoggingConfig(Config):
    """What the run tells."""

    level: Literal["debug", "info", "warning"] = "info"
    """Least important messages that are shown."""
    tensorboard: bool = True
    """Write the metrics to TensorBoard as well as to metrics.jsonl."""
    num_samples: int = Field(default=2, ge=0)
    """Samples written to samples.jsonl in every iteration."""


class GkdConfig(Config):
    """The whole configuration of a run."""

    student: StudentConfig
    teacher: TeacherConfig
    rollout: RolloutConfig = SglangRolloutConfig()
    gkd: GkdSection = GkdSection()
    loss: LossConfig = LossConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def seq_length(self) -> int:
        """Tokens of the longest sequence: prompt and completion."""
        return self.data.max_prompt_length + self.rollout.max_new_tokens

    @property
    def teacher_seq_length(self) -> int:
        """The same for the teacher, whose prompts may be longer."""
        return self.data.teacher_prompt_length + self.rollout.max_new_tokens

    @property
    def checkpoint_dir(self) -> Path:
        """Where the run keeps its checkpoints."""
        return self.train.output_dir / "checkpoints"

    def with_iterations(self, num_prompts: int | None) -> "GkdConfig":
        """This tree with ``train.epochs`` turned into ``train.train_iters``; unchanged if it has those already.

        Args:
            num_prompts: Usable prompts of one pass; ``None`` if nobody knows before the end of the stream.

        Raises:
            ConfigError: The number of prompts is not known, or the schedule does not fit into the run.
        """
        if not self.train.epochs:
            return self
        if num_prompts is None:
            raise ConfigError(
                f"train.epochs={self.train.epochs} needs the number of prompts, which is not known for streamed or weighted data; "
                "set train.train_iters instead"
            )
        prompts_per_iter = self.train.global_batch_size // self.rollout.num_samples
        # rounded first: 0.1 * 30 prompts are 3, not 3.0000000000000004
        train_iters = math.ceil(round(self.train.epochs * num_prompts, 6) / prompts_per_iter)
        if problems := list(rules.schedule_problems(self.optim, train_iters)):
            raise ConfigError.listing(f"train.epochs={self.train.epochs} of {num_prompts} prompts", problems)
        train = self.train.model_copy(update={"train_iters": train_iters, "epochs": 0.0})
        return self.model_copy(update={"train": train})

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that run on the ranks of the job, by section."""
        teacher = {"teacher": self.teacher} if isinstance(self.teacher, ModelConfig) else {}
        return {"student": self.student, **teacher}

    def check_files(self) -> None:
        """Checks between sections and against the model folders; ``load_config`` runs them.

        Raises:
            ConfigError: Lists all problems.
        """
        if problems := rules.find_file_problems(self):
            raise ConfigError.listing("the configuration", problems)

    def check_world(self, world_size: int) -> None:
        """Checks that need the number of ranks; run before any process group exists, so that none can hang.

        Raises:
            ConfigError: Lists all problems.
        """
        if problems := rules.find_world_problems(self, world_size):
            raise ConfigError.listing(f"the configuration for {world_size} ranks", problems)

    def to_yaml(self) -> str:
        """The complete tree with every default written out; ``load_config`` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
