"""Tokenizer and prompts of a run from its configuration; every rank reads them for itself, before any process group."""

import logging
from pathlib import Path

from megatron_gkd.config import GkdConfig
from megatron_gkd.config.hf_shapes import load_hf_shapes
from megatron_gkd.data.custom import load_chat_template, load_dataset_class
from megatron_gkd.data.prompts import RowPolicy, load_prompts
from megatron_gkd.data.row_files import RowFile, open_row_files
from megatron_gkd.data.rows import RowEncoder, RowKeys, RowLimits
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.streams import MixedPrompts, PromptLoader, PromptStream, StreamedPrompts
from megatron_gkd.data.tokenizer import DataError, Tokenizer, load_tokenizer, require_same_vocabulary

log = logging.getLogger(__name__)


def build_tokenizer(config: GkdConfig) -> Tokenizer:
    """The student's tokenizer, or the one that ``data.tokenizer`` names.

    Raises:
        DataError: It cannot be read, has ids that the student has no row for, or another vocabulary than the teacher's,
            so that the two distributions cannot be compared.
    """
    data, folder = config.data, config.student.hf_folder
    template = None if data.chat_template is None else load_chat_template(data.chat_template)
    tokenizer = load_tokenizer(data.tokenizer or folder, data.tokenizer_kind, chat_template=template)
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
    """The prompts in the order of the seed.

    Raises:
        DataError: A file or a row cannot be used.
    """
    files = _open(config, config.data.prompts)
    groups = [[file] for file in files] if config.data.weights else [files]
    streams = [_build_stream(config, group, tokenizer) for group in groups]
    return MixedPrompts(streams, config.data.weights) if config.data.weights else streams[0]


def with_iterations(config: GkdConfig, tokenizer: Tokenizer) -> GkdConfig:
    """The configuration with ``train.epochs`` counted in iterations, which takes a look at the prompts."""
    if not config.train.epochs:
        return config
    return config.with_iterations(build_prompts(config, tokenizer).prompts_per_epoch)


def build_validation_prompts(config: GkdConfig, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The rows that the loss is measured on; none without ``evaluation.files``.

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
    prompts = load_prompts(files, encoder, policy)
    log.info("Prompts: %s", prompts.summary())
    return PromptLoader(prompts, seed=seed, shuffle=data.shuffle)


def _encoder(config: GkdConfig, tokenizer: Tokenizer, *, needs_completions: bool) -> RowEncoder:
    data = config.data
    limits = RowLimits(
        data.max_prompt_length,
        data.max_teacher_prompt_length,
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
