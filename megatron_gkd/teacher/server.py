"""A teacher behind a port: each copy of the student asks an SGLang server for the top k of its own rows.

Shapes: T = rows that enter the loss, K = entries per row.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_gkd.data.sample import Batch, MicroBatch
from megatron_gkd.parallel.collectives import gather_json
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.serving.errors import error_from_json, error_to_json
from megatron_gkd.serving.teacher_client import TeacherClient
from megatron_gkd.teacher.signal import TopKSignal

Result = TypeVar("Result")
NO_ENTRY = -1  # see TopKSignal


class ServerTeacher:
    """Scores the rows of a batch that enter the loss.

    The first tensor-parallel rank of the student's last stage asks about the sequences of its copy and hands the answers
    to the other ranks of the stage. No rows cross between copies.

    Args:
        client: Of the server; used by the ranks that ask.
        model_type: As in the config.json of the model that must be served.
        num_sequence_tokens: Longest prompt plus completion.
        vocab_size: Of the student. A teacher may have more rows, which are no tokens; they are taken out of its answers
            and their mass counts to the tail.
        groups: The student's layout and process groups.
        device: The device of this rank.

    Attributes:
        served_folder: The server's name of the model's folder, known on all ranks.

    Raises:
        EngineError: On all ranks: one that asks does not reach the server, or finds another model there. The
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
        told = self._on_asking_ranks(
            lambda: client.check_model(model_type=model_type, num_sequence_tokens=num_sequence_tokens)
        )
        self.served_folder: str = next(filter(None, gather_json(told, device=device)))

    def score(self, batch: Batch, micro_batches: list[MicroBatch]) -> list[TopKSignal]:
        """See ``TeacherEngine.score``.

        Raises:
            EngineError: On all ranks: the server failed, or an answer breaks the contract.
        """
        read = batch.as_read_by_teacher().samples
        samples = [read[index] for micro_batch in micro_batches for index in micro_batch.indices]
        # rows from a sequence's first that counts to its end are asked for; between two turns some count nothing
        masks = [sample.loss_mask(sample.num_tokens - 1) for sample in samples]
        firsts = [mask.index(True) if any(mask) else len(mask) for mask in masks]
        scored = self._on_asking_ranks(
            lambda: self._client.score_top_k(
                [sample.prompt_ids + sample.completion_ids for sample in samples], firsts
            )
        )
        if not self._groups.is_last_stage:
            return []
        num_rows, top_k = sum(sample.num_loss_tokens for sample in samples), self._client.top_k
        rows = [
            answer.select(mask[first:])
            for answer, mask, first in zip(
                scored or [], masks, firsts, strict=False
            )  # no answers where nobody asks
        ]
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

    def _on_asking_ranks(self, work: Callable[[], Result]) -> Result | None:
        """What ``work`` returns, ``None`` on ranks that do not ask; its error on all ranks, so that none waits."""
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
        """The asking rank's ``parts``, one below the other, on all ranks of the stage."""
        if parts:
            whole = torch.from_numpy(np.concatenate(parts)).to(self._device)
        else:
            whole = torch.empty(shape, dtype=dtype, device=self._device)
        if whole.numel():
            dist.broadcast(whole, group=self._groups.pg.tp, group_src=0)
        return whole
