"""A teacher behind a port: each copy of the student requests the top k of its own rows from an SGLang server.

Shapes: T = rows that enter the loss, K = entries per row.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from megatron_gkd.config import ConfigError
from megatron_gkd.config.hf_shapes import load_served_model
from megatron_gkd.config.teacher import ServerTeacherConfig
from megatron_gkd.data.sample import Batch, MicroBatch
from megatron_gkd.data.tokenizer import load_tokenizer, require_same_vocabulary
from megatron_gkd.models.gpt import ShardedModel
from megatron_gkd.parallel.collectives import gather_json
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.serving.connection import read_api_key
from megatron_gkd.serving.errors import EngineError, error_from_json, error_to_json
from megatron_gkd.serving.teacher_client import TeacherClient
from megatron_gkd.teacher.base import TeacherContext, TeacherEngine, TopKSignal

log = logging.getLogger(__name__)

Result = TypeVar("Result")
CHECK_TIMEOUT_S = 30.0
NO_ENTRY = -1
"""Id of an unused place in a ``TopKSignal``."""


class ServerTeacher(TeacherEngine):
    """Top-k entries of the rows of a batch that enter the loss.

    The first tensor-parallel rank of the student's last stage sends the requests for the sequences of its copy, and
    broadcasts the replies to the other ranks of the stage. No rows cross between copies.

    Args:
        client: Of the server; used by the ranks that send requests.
        model_type: As in the config.json of the model that must be served.
        num_sequence_tokens: Longest prompt plus completion.
        vocab_size: Of the student. A teacher may have more rows, which are no tokens; they are removed from its replies,
            and their mass counts as tail.
        groups: The student's layout and process groups.
        device: The device of this rank.

    Attributes:
        served_folder: Folder of the served model as the server reports it, on all ranks.

    Raises:
        EngineError: On all ranks: a requesting rank does not reach the server, or finds another model there. The
            construction is collective.
    """

    def __init__(
        self,
        client: TeacherClient,
        *,
        model_type: str,
        num_sequence_tokens: int,
        vocab_size: int,
        groups: ModelGroups,
        device: torch.device,
    ):
        self._client, self._groups, self._device = client, groups, device
        self._vocab_size = vocab_size
        folder = self._on_requesting_ranks(
            lambda: client.check_model(model_type=model_type, num_sequence_tokens=num_sequence_tokens)
        )
        self.served_folder: str = next(filter(None, gather_json(folder, device=device)))

    @override
    @classmethod
    def preflight(cls, section: ServerTeacherConfig, context: TeacherContext) -> None:
        # On every rank, so that none waits for one that was refused. A server that is up answers at once.
        hurried = {"request_timeout_s": min(section.request_timeout_s, CHECK_TIMEOUT_S), "max_retries": 0}
        client = make_teacher_client(section.model_copy(update=hurried))
        try:
            served = client.check_model(
                model_type=load_served_model(section.hf_folder).model_type,
                num_sequence_tokens=context.config.teacher_seq_length,
            )
        except EngineError as error:
            raise ConfigError(
                f"{_server_keys(section)}: {error}; start the server with launch/serve.py, and let "
                f"teacher.hf={str(section.hf)!r} be what it serves"
            ) from error
        require_same_model(section, Path(served))
        if (Path(served) / "tokenizer_config.json").is_file():
            require_same_vocabulary(context.tokenizer, load_tokenizer(served))

    @override
    @classmethod
    def build(
        cls, section: ServerTeacherConfig, context: TeacherContext, student: ShardedModel
    ) -> "ServerTeacher":
        teacher = cls(
            make_teacher_client(section),
            model_type=load_served_model(section.hf_folder).model_type,
            num_sequence_tokens=context.config.teacher_seq_length,
            vocab_size=student.shapes.vocab_size,
            groups=student.groups,
            device=context.job.device,
        )
        log.info(
            "Teacher: %s at %s, top %d; checked against %s",
            teacher.served_folder,
            section.url,
            section.top_k,
            section.hf_folder,
        )
        return teacher

    @override
    def score(self, batch: Batch, micro_batches: list[MicroBatch]) -> list[TopKSignal]:
        read = batch.as_read_by_teacher().samples
        samples = [read[index] for micro_batch in micro_batches for index in micro_batch.indices]
        # The server returns all rows from the first loss token to the end of a sequence. Rows between two assistant turns
        # do not enter the loss and are dropped below.
        masks = [sample.loss_mask(sample.num_tokens - 1) for sample in samples]
        firsts = [mask.index(True) if any(mask) else len(mask) for mask in masks]
        scored = self._on_requesting_ranks(
            lambda: self._client.score_top_k(
                [sample.prompt_ids + sample.completion_ids for sample in samples], firsts
            )
        )
        if not self._groups.is_last_stage:  # only now: errors are exchanged over all ranks
            return []
        num_rows, top_k = sum(sample.num_loss_tokens for sample in samples), self._client.top_k
        # not strict: ranks that send no requests have no replies
        replies = zip(scored or [], masks, firsts, strict=False)
        rows = [reply.select(mask[first:]) for reply, mask, first in replies]
        ids_TK = self._share([s.ids_TK for s in rows], (num_rows, top_k), torch.int32).long()
        tensors = (
            ids_TK.masked_fill(ids_TK >= self._vocab_size, NO_ENTRY),
            self._share([s.log_probs_TK for s in rows], (num_rows, top_k), torch.float32),
            self._share([s.token_log_probs_T for s in rows], (num_rows,), torch.float32),
        )
        rows_of_each = [int(micro_batch.loss_mask_BS.sum()) for micro_batch in micro_batches]
        return [
            TopKSignal(*parts)
            for parts in zip(*(tensor.split(rows_of_each) for tensor in tensors), strict=True)
        ]

    def _on_requesting_ranks(self, work: Callable[[], Result]) -> Result | None:
        """The result of ``work``, ``None`` on ranks that send no requests; its error on all ranks."""
        result, failure = None, None
        if self._groups.is_last_stage and self._groups.tp_rank == 0:
            try:
                result = work()
            except Exception as error:  # of any kind: the other ranks already wait for the outcome
                failure = error
        own = error_to_json(failure) if failure else None
        failures = [error for error in gather_json(own, device=self._device) if error]
        if failures:
            raise error_from_json(failures[0]) from failure
        return result

    def _share(self, parts: list[NDArray], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The requesting rank's ``parts``, concatenated, on all ranks of the stage."""
        if parts:
            whole = torch.from_numpy(np.concatenate(parts)).to(self._device)
        else:
            whole = torch.empty(shape, dtype=dtype, device=self._device)
        if whole.numel():  # equal on all ranks of the stage
            dist.broadcast(whole, group=self._groups.pg.tp, group_src=0)
        return whole


def require_same_model(section: ServerTeacherConfig, served: Path) -> None:
    """Check that the served model has the sizes of ``teacher.hf``.

    Weights are not compared. If the folders have different names, a warning is logged.

    Args:
        section: The teacher section.
        served: Folder that the server reports; a path on its machine, which may not exist here.

    Raises:
        ConfigError: Names the server, both folders and the sizes that differ.
    """
    is_seen = os.access(served / "config.json", os.R_OK)
    if is_seen:
        _require_same_sizes(section, served)
    if served.name not in (section.hf.name, section.hf.resolve().name):
        log.warning(
            "The teacher's server at %s runs from %s, and teacher.hf is %s; %s. Make sure that it is the same model",
            section.url,
            served,
            section.hf,
            "their sizes are equal" if is_seen else "its files are not seen from here",
        )


def _require_same_sizes(section: ServerTeacherConfig, served: Path) -> None:
    expected, found = load_served_model(section.hf_folder).sizes, load_served_model(served).sizes
    different = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if different:
        raise ConfigError(
            f"{_server_keys(section)}: it runs from {served} with {_values(found, different)}, but teacher.hf="
            f"{str(section.hf)!r} has {_values(expected, different)}; start it with launch/serve.py --model {section.hf}, or "
            "let teacher.hf be what it serves"
        )


def _values(sizes: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={sizes.get(key)}" for key in keys)


def _server_keys(section: ServerTeacherConfig) -> str:
    """Address of the server as keys and values, for messages."""
    return f"teacher.server_ip={section.server_ip!r}, teacher.server_port={section.server_port}"


def make_teacher_client(section: ServerTeacherConfig) -> TeacherClient:
    """A client of the teacher's server; sends no request.

    Raises:
        ConfigError: The variable that should hold the API key is not set.
    """
    return TeacherClient(
        section.url,
        vocab_size=load_served_model(section.hf_folder).vocab_size,
        top_k=section.top_k,
        requests_in_flight=section.requests_in_flight,
        request_timeout_s=section.request_timeout_s,
        max_retries=section.max_retries,
        api_key=read_api_key("teacher.api_key_env", section.api_key_env),
    )
