"""Checks against the files that the configuration names: models, prompts, tokenizer, output folder."""

from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.base import ConfigError
from megatron_gkd.config.data import DataConfig
from megatron_gkd.config.evaluation import EvaluationConfig
from megatron_gkd.config.hf_shapes import HfShapes, count_token_ids, load_hf_shapes, load_served_model
from megatron_gkd.config.model import ModelConfig
from megatron_gkd.config.schema import GkdConfig
from megatron_gkd.config.weight_files import find_checkpoint_problems, find_hf_problems, find_output_problems

# weights, fp32 copy of bf16 weights, and Adam's two moments
CHECKPOINT_BYTES_PER_PARAMETER = {"fp32": 4 + 4 + 4, "bf16": 2 + 4 + 4 + 4}


def find_file_problems(config: GkdConfig) -> Iterator[str]:
    """Missing, damaged or unsuitable files, one message each."""
    yield from _data_problems(config.data, config.evaluation)
    shapes: dict[str, HfShapes] = {}
    for name, model in config.models.items():
        yield from _own_checkpoint_problems(config, name, model)
        try:
            shapes[name] = _load_shapes(name, model)
        except ConfigError as error:
            yield str(error)
            continue
        yield from _weight_problems(name, model)
        yield from _layout_problems(name, model, shapes[name])
        yield from _length_problems(config, name, shapes[name])
    if student := shapes.get("student"):
        yield from _chunk_problems(config, student)
        yield from _vocabulary_problems(config, student, shapes.get("teacher"))
        yield from config.rollout.student_problems(student)
        yield from _output_problems(config, student)


def _data_problems(data: DataConfig, evaluation: EvaluationConfig) -> Iterator[str]:
    for key, files in (("data.prompts", data.prompts), ("evaluation.files", evaluation.files)):
        for file in files:
            # a custom dataset_class may read folders
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


def _own_checkpoint_problems(config: GkdConfig, name: str, model: ModelConfig) -> Iterator[str]:
    if model.checkpoint is not None and model.checkpoint.resolve().is_relative_to(
        config.checkpoint_dir.resolve()
    ):
        yield (
            f"{name}.checkpoint={str(model.checkpoint)!r} lies among the checkpoints of train.output_dir="
            f"{str(config.train.output_dir)!r}, which this run moves and removes; name another train.output_dir"
        )


def _load_shapes(name: str, model: ModelConfig) -> HfShapes:
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


def _weight_problems(name: str, model: ModelConfig) -> Iterator[str]:
    if model.hf is not None:
        for problem in find_hf_problems(model.hf):
            yield f"{name}.hf={str(model.hf)!r}: {problem}"
    elif model.checkpoint is not None:
        for problem in find_checkpoint_problems(model.checkpoint):
            yield f"{name}.checkpoint={str(model.checkpoint)!r}: {problem}"


def _layout_problems(name: str, model: ModelConfig, shapes: HfShapes) -> Iterator[str]:
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


def _chunk_problems(config: GkdConfig, shapes: HfShapes) -> Iterator[str]:
    parallel = config.student.parallel
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if shapes.num_layers % pp == 0 and shapes.num_layers // pp % chunks:
        yield (
            f"student.parallel.virtual_pipeline_model_parallel_size={chunks} does not divide "
            f"the {shapes.num_layers // pp} layers of a pipeline stage"
        )


def _length_problems(config: GkdConfig, name: str, shapes: HfShapes) -> Iterator[str]:
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
            "is not supported; shorten one of them"
        )


def _vocabulary_problems(
    config: GkdConfig, student: HfShapes, teacher_shapes: HfShapes | None
) -> Iterator[str]:
    """Compare vocabularies. A teacher that is not on the ranks may have any architecture, only its vocabulary is read."""
    teacher, folder = config.teacher, config.teacher.hf_folder
    if teacher_shapes is not None:
        vocab_size = teacher_shapes.vocab_size
    elif teacher.on_ranks or folder is None:
        return  # its config.json has been reported already, or there is no teacher
    else:
        try:
            vocab_size = load_served_model(folder).vocab_size
        except ConfigError as error:
            yield f"teacher.hf={str(folder)!r}: {error}"
            return
    yield from teacher.vocabulary_problems(vocab_size)
    if student.vocab_size == vocab_size:
        return
    num_ids = count_token_ids(config.student.hf_folder)
    if num_ids is not None and num_ids <= student.vocab_size < vocab_size:
        return  # only padding rows differ, as between the small and the large models of Qwen2.5
    yield (
        f"the student ({config.student.hf_folder}) has vocab_size={student.vocab_size} and the teacher "
        f"({folder}) vocab_size={vocab_size}; both must use the same vocabulary; take models of one "
        "family (a teacher may have more padding rows)"
    )


def _output_problems(config: GkdConfig, student: HfShapes) -> Iterator[str]:
    folder = config.train.output_dir
    needed = student.num_parameters * CHECKPOINT_BYTES_PER_PARAMETER[config.train.precision]
    for problem in find_output_problems(folder, needed):
        yield f"train.output_dir={str(folder)!r}: {problem}"
