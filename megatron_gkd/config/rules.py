"""Rules between sections, against the model folders, and against the number of ranks.

Rules of one section live in the section. Every rule here returns sentences that name the keys, their values
and what to change, so that all problems can be reported together.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gkd.config.errors import ConfigError
from megatron_gkd.config.explain import all_keys, did_you_mean
from megatron_gkd.config.hf_shapes import HfShapes, count_token_ids, load_hf_shapes, load_served_model
from megatron_gkd.config.loss_rules import find_loss_problems
from megatron_gkd.config.weight_files import find_checkpoint_problems, find_hf_problems, find_output_problems

if TYPE_CHECKING:
    from megatron_gkd.config.data import DataConfig, EvaluationConfig
    from megatron_gkd.config.model import ModelConfig
    from megatron_gkd.config.optim import OptimConfig
    from megatron_gkd.config.schema import GkdConfig


# weights, the fp32 copy that bf16 training keeps, and Adam's two moments
CHECKPOINT_BYTES_PER_PARAMETER = {"fp32": 4 + 4 + 4, "bf16": 2 + 4 + 4 + 4}


def find_file_problems(config: "GkdConfig") -> list[str]:
    """Problems between sections and with the files they name; needs no world size."""
    problems = [
        *_batch_problems(config),
        *_embedded_engine_problems(config),
        *_unknown_key_problems(config),
        *_data_problems(config.data, config.evaluation),
        *find_loss_problems(config),
    ]
    shapes: dict[str, HfShapes] = {}
    for name, model in config.models.items():
        problems += _own_checkpoint_problems(config, name, model)
        try:
            shapes[name] = _load_shapes(name, model)
        except ConfigError as error:
            problems.append(str(error))
            continue
        problems += _weight_problems(name, model)
        problems += _layout_problems(name, model, shapes[name])
        if name == "student":
            problems += _chunk_problems(config, shapes[name])
        problems += _length_problems(config, name, shapes[name])
    if len(shapes) == 2:
        problems += _vocabulary_problems(
            config, shapes["student"], config.models["teacher"].hf_folder, shapes["teacher"].vocab_size
        )
    if "student" in shapes:
        problems += _served_teacher_problems(config, shapes["student"])
        problems += _server_problems(config, shapes["student"])
        problems += _output_problems(config, shapes["student"])
    return problems


def find_world_problems(config: "GkdConfig", world_size: int) -> list[str]:
    """Problems of spreading the models and the batch over ``world_size`` ranks."""
    problems = []
    batch = config.train.global_batch_size
    for name, model in config.models.items():
        tp, pp = model.parallel.tensor_model_parallel_size, model.parallel.pipeline_model_parallel_size
        copies, rest = divmod(world_size, model.parallel.ranks_per_copy)
        if rest or not copies:
            problems.append(
                f"{name}.parallel: one copy takes tensor_model_parallel_size={tp} x "
                f"pipeline_model_parallel_size={pp} = {tp * pp} ranks, which does not divide the {world_size} ranks of the job; "
                f"start a multiple of {tp * pp} ranks or change the sizes"
            )
            continue
        micro = config.train.micro_batch_size if name == "student" else 1
        if batch % (micro * copies):
            product = f"train.micro_batch_size={micro} x {copies}" if name == "student" else f"{copies}"
            problems.append(
                f"train.global_batch_size={batch} is not divisible by {product} copies of the {name}; "
                f"use a multiple of {micro * copies}"
            )
        elif name == "student":
            problems += _interleaving_problems(config, batch // (micro * copies))
    return problems


def _interleaving_problems(config: "GkdConfig", num_micro_batches: int) -> Iterator[str]:
    parallel = config.student.parallel
    pp = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size > 1 and num_micro_batches % pp:
        yield (
            f"student.parallel.virtual_pipeline_model_parallel_size={parallel.virtual_pipeline_model_parallel_size} "
            f"works on groups of pipeline_model_parallel_size={pp} micro-batches, but every copy of the student has "
            f"{num_micro_batches}; change train.global_batch_size or train.micro_batch_size so that they are a "
            f"multiple of {pp}"
        )


def _load_shapes(name: str, model: "ModelConfig") -> HfShapes:
    key = "hf" if model.hf is not None else "checkpoint"
    source = model.hf if model.hf is not None else model.checkpoint
    assert source is not None  # ModelConfig._exactly_one_source
    if not source.is_dir():
        raise ConfigError(f"{name}.{key}={str(source)!r}: no such folder")
    if not (model.hf_folder / "config.json").is_file():
        kind = (
            "a Hugging Face model"
            if key == "hf"
            else "a checkpoint (written by tools/convert_hf_to_megatron.py or a run)"
        )
        raise ConfigError(
            f"{name}.{key}={str(source)!r} is not {kind}: {model.hf_folder / 'config.json'} is missing"
        )
    try:
        return load_hf_shapes(model.hf_folder)
    except ConfigError as error:
        raise ConfigError(f"{name}.{key}={str(source)!r}: {error}") from None


def _weight_problems(name: str, model: "ModelConfig") -> Iterator[str]:
    if model.hf is not None:
        for problem in find_hf_problems(model.hf):
            yield f"{name}.hf={str(model.hf)!r}: {problem}"
    elif model.checkpoint is not None:
        for problem in find_checkpoint_problems(model.checkpoint):
            yield f"{name}.checkpoint={str(model.checkpoint)!r}: {problem}"


def _own_checkpoint_problems(config: "GkdConfig", name: str, model: "ModelConfig") -> Iterator[str]:
    if model.checkpoint is not None and model.checkpoint.resolve().is_relative_to(
        config.checkpoint_dir.resolve()
    ):
        yield (
            f"{name}.checkpoint={str(model.checkpoint)!r} lies among the checkpoints of train.output_dir="
            f"{str(config.train.output_dir)!r}, which this run moves and removes; name another train.output_dir"
        )


def _output_problems(config: "GkdConfig", student: HfShapes) -> Iterator[str]:
    if config.checkpoint.keep_best_metric == "validation/loss" and not config.evaluation.files:
        yield (
            "checkpoint.keep_best_metric=validation/loss needs evaluation.files, or nothing measures it; give files, or "
            "set checkpoint.keep_best_metric=loss"
        )
    folder = config.train.output_dir
    needed = student.num_parameters * CHECKPOINT_BYTES_PER_PARAMETER[config.train.precision]
    for problem in find_output_problems(folder, needed):
        yield f"train.output_dir={str(folder)!r}: {problem}"


def _batch_problems(config: "GkdConfig") -> Iterator[str]:
    batch, num_samples = config.train.global_batch_size, config.rollout.num_samples
    if batch % num_samples:
        yield (
            f"train.global_batch_size={batch} is not a multiple of rollout.num_samples={num_samples}; "
            "all samples of a prompt belong to one iteration"
        )
    if config.train.train_iters:  # else train.epochs, whose iterations are known once the prompts are counted
        yield from schedule_problems(config.optim, config.train.train_iters)


def schedule_problems(optim: "OptimConfig", train_iters: int) -> Iterator[str]:
    """Phases of the learning-rate schedule that do not fit into a run of ``train_iters``."""
    warmup, decay = optim.num_warmup_iters(train_iters), optim.num_wsd_decay_iters(train_iters)
    if warmup > train_iters:
        yield (
            f"optim.warmup_iters={optim.warmup_iters} is above train.train_iters={train_iters}; "
            "the run would end before the warm-up"
        )
    elif optim.decay_style == "wsd" and warmup + decay > train_iters:
        yield (
            f"optim.decay_style=wsd: {warmup} iterations of warm-up and {decay} of decay (optim.wsd_decay_fraction="
            f"{optim.wsd_decay_fraction}) are more than the run's {train_iters}; shorten one of them"
        )


def _data_problems(data: "DataConfig", evaluation: "EvaluationConfig") -> Iterator[str]:
    for key, files in (("data.prompts", data.prompts), ("evaluation.files", evaluation.files)):
        for file in files:
            # an own class may read a folder
            if not (file.exists() if data.dataset_class else file.is_file()):
                yield f"{key}={str(file)!r}: no such file; give a file of prompts"
    template = data.chat_template
    if template is not None and ":" not in template and not Path(template).is_file():
        yield f"data.chat_template={template!r}: no such file; give a Jinja template"
    if data.tokenizer is not None and not data.tokenizer.exists():
        yield (
            f"data.tokenizer={str(data.tokenizer)!r}: no such file or folder; give a tokenizer's folder or a "
            "SentencePiece model file"
        )


def _layout_problems(name: str, model: "ModelConfig", shapes: HfShapes) -> Iterator[str]:
    tp, pp = model.parallel.tensor_model_parallel_size, model.parallel.pipeline_model_parallel_size
    for size, what in (
        (shapes.num_attention_heads, "attention heads"),
        (shapes.num_query_groups, "key-value heads"),
        (shapes.ffn_hidden_size, "FFN channels"),
    ):
        if size % tp:
            yield f"{name}.parallel.tensor_model_parallel_size={tp} does not divide the model's {size} {what}"
    if shapes.num_layers % pp:
        yield (
            f"{name}.parallel.pipeline_model_parallel_size={pp} does not divide "
            f"the model's {shapes.num_layers} layers"
        )


def _chunk_problems(config: "GkdConfig", shapes: HfShapes) -> Iterator[str]:
    parallel = config.student.parallel
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if shapes.num_layers % pp == 0 and shapes.num_layers // pp % chunks:
        yield (
            f"student.parallel.virtual_pipeline_model_parallel_size={chunks} does not divide "
            f"the {shapes.num_layers // pp} layers of a pipeline stage"
        )


def _length_problems(config: "GkdConfig", name: str, shapes: HfShapes) -> Iterator[str]:
    key, length, total = "max_prompt_length", config.data.max_prompt_length, config.seq_length
    if name == "teacher" and config.teacher_seq_length > total:
        key, length = "max_teacher_prompt_length", config.data.teacher_prompt_length
        total = config.teacher_seq_length
    tokens = f"data.{key}={length} + rollout.max_new_tokens={config.rollout.max_new_tokens} = {total} tokens"
    if total > shapes.max_position_embeddings:
        yield (
            f"{tokens}, but the {name} was made for {shapes.max_position_embeddings} (max_position_embeddings); shorten one "
            "of them"
        )
    elif shapes.sliding_window is not None and total > shapes.sliding_window:
        yield (
            f"{tokens}, but the attention of the {name} reaches back over sliding_window={shapes.sliding_window} only, which "
            "is not built; shorten one of them"
        )


def _vocabulary_problems(
    config: "GkdConfig", student: HfShapes, teacher_folder: Path, teacher_vocab_size: int
) -> Iterator[str]:
    if student.vocab_size == teacher_vocab_size:
        return
    num_ids = count_token_ids(config.student.hf_folder)
    if num_ids is not None and num_ids <= student.vocab_size < teacher_vocab_size:
        return  # only rows without a token differ, as between the small and the large models of Qwen2.5
    yield (
        f"the student ({config.student.hf_folder}) has vocab_size={student.vocab_size} and the teacher "
        f"({teacher_folder}) vocab_size={teacher_vocab_size}; both must use the same vocabulary, take models of one "
        "family (a teacher may have more rows that are no token)"
    )


def _served_teacher_problems(config: "GkdConfig", student: HfShapes) -> Iterator[str]:
    """Of a teacher behind a port; it may be of any architecture, so only its vocabulary is read."""
    teacher = config.teacher
    if teacher.kind != "server":
        return
    try:
        vocab_size = load_served_model(teacher.hf).vocab_size
    except ConfigError as error:
        yield f"teacher.hf={str(teacher.hf)!r}: {error}"
        return
    yield from _vocabulary_problems(config, student, teacher.hf, vocab_size)
    if teacher.top_k > vocab_size:
        yield f"teacher.top_k={teacher.top_k} is above the teacher's vocab_size={vocab_size}; lower it"


def _embedded_engine_problems(config: "GkdConfig") -> Iterator[str]:
    if config.rollout.kind != "megatron":
        return
    if config.student.parallel.sequence_parallel:
        yield (
            "rollout.kind=megatron generates one token at a time, which student.parallel.sequence_parallel=true cannot split; "
            "set it to false or use rollout.kind=sglang"
        )
    if (chunks := config.student.parallel.virtual_pipeline_model_parallel_size) > 1:
        yield (
            "rollout.kind=megatron passes every token through the pipeline once, which "
            f"student.parallel.virtual_pipeline_model_parallel_size={chunks} would repeat; "
            "set it to 1 or use rollout.kind=sglang"
        )


def _unknown_key_problems(config: "GkdConfig") -> Iterator[str]:
    known = list(all_keys(type(config)))
    for key in config.checkpoint.allow_changes:
        if key not in known:
            yield f"checkpoint.allow_changes names {key!r}, which is no key{did_you_mean(key, known)}"


def _server_problems(config: "GkdConfig", student: HfShapes) -> Iterator[str]:
    if config.rollout.kind == "sglang" and config.rollout.placement == "colocated":
        tp = config.rollout.tensor_model_parallel_size
        if student.num_attention_heads % tp:
            yield (
                f"rollout.tensor_model_parallel_size={tp} does not divide the student's "
                f"{student.num_attention_heads} attention heads"
            )
