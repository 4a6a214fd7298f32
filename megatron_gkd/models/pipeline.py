"""Run a model through Megatron's pipeline schedules: training, evaluation, or hidden states only.

Shapes: B = sequences of a micro-batch, S = positions, H = hidden, T = rows under a mask.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_gkd.models.gpt import LocalModel, chunks_of, select_rows
from megatron_gkd.parallel.groups import ModelGroups

LossFunction = Callable[[Any, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(micro-batch, hidden_BSH of the last stage) -> (loss sum to differentiate, number of tokens, report)."""


def train_schedule(
    chunks: Sequence[torch.nn.Module],
    config: Any,
    groups: ModelGroups,
    micro_batches: Sequence[Any],
    loss: LossFunction,
) -> list[dict[str, Tensor]]:
    """Run forward and backward over all micro-batches and finalize the gradients.

    Finalized: reduced over all ranks and divided by the global number of loss tokens.

    Args:
        chunks: The DDP-wrapped model, one entry per chunk of this rank.
        config: Its TransformerConfig.
        groups: Its layout and process groups.
        micro_batches: Objects with ``tokens_BS`` and ``position_ids_BS``, all of one shape. With virtual stages their
            number must be a multiple of the pipeline-parallel size.
        loss: Called on the last stage.

    Returns:
        One report per micro-batch on the last stage, an empty list elsewhere.
    """
    return _run(chunks, config, groups, micro_batches, partial(_loss_step, loss), forward_only=False)


def evaluate_schedule(
    model: LocalModel, config: Any, groups: ModelGroups, micro_batches: Sequence[Any], loss: LossFunction
) -> list[dict[str, Tensor]]:
    """Run the forward passes of ``train_schedule`` in evaluation mode, without gradients."""
    with evaluation_mode(model):
        return _run(
            chunks_of(model), config, groups, micro_batches, partial(_loss_step, loss), forward_only=True
        )


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Disable gradients and dropout, and restore the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def forward_rows(
    model: LocalModel, config: Any, groups: ModelGroups, micro_batches: Sequence[Any]
) -> list[Tensor]:
    """Compute hidden states of the rows under each micro-batch's ``loss_mask_BS``, without gradients.

    Args:
        model: This rank's part of the model.
        config: Its TransformerConfig.
        groups: Its layout and process groups.
        micro_batches: Dataclass objects with ``tokens_BS``, ``position_ids_BS`` and ``loss_mask_BS``, all of one shape.

    Returns:
        [T, H] per micro-batch on every rank of the last stage, an empty list elsewhere.
    """

    def forward_step(iterator, module):
        micro_batch = next(iterator)
        output = _forward(module, micro_batch)

        # collect_non_loss_data makes the schedule call the loss function with non_loss_data=True and keep its result
        def rows(hidden_BSH, non_loss_data=True):
            return select_rows(
                hidden_BSH,
                micro_batch.loss_mask_BS.to(hidden_BSH.device),
                sequence_parallel=config.sequence_parallel,
                group=groups.pg.tp,
            )

        return output, rows

    padded = _fill_last_group(micro_batches, groups)
    with torch.no_grad():
        found = _run(
            chunks_of(model),
            config,
            groups,
            padded,
            forward_step,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[: len(micro_batches)]


def _fill_last_group(micro_batches: Sequence[Any], groups: ModelGroups) -> list[Any]:
    """Append micro-batches with an empty mask up to a multiple of the pipeline-parallel size."""
    # the interleaved schedule refuses a last group smaller than the pipeline (megatron-core 0.16.1, schedules.py:1008)
    missing = -len(micro_batches) % groups.layout.pp_size if groups.layout.vpp_size > 1 else 0
    last = micro_batches[-1]
    return [*micro_batches, *[replace(last, loss_mask_BS=torch.zeros_like(last.loss_mask_BS))] * missing]


def _loss_step(
    loss: LossFunction, iterator: Any, module: torch.nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    """Megatron's forward step: the output of the next micro-batch, and the loss to call on it."""
    micro_batch = next(iterator)
    return _forward(module, micro_batch), partial(loss, micro_batch)


def _forward(model: torch.nn.Module, micro_batch: Any) -> Tensor:
    device = next(model.parameters()).device
    # no attention mask: attention is causal and the padding is on the right
    return model(micro_batch.tokens_BS.to(device), micro_batch.position_ids_BS.to(device), None)


def _run(
    chunks: Sequence[torch.nn.Module], config, groups: ModelGroups, micro_batches, forward_step, **options
) -> list:
    # get_forward_backward_func() reads the global pipeline size of parallel_state; the teacher has its own layout
    if groups.layout.pp_size == 1:
        schedule = schedules.forward_backward_no_pipelining
    else:
        options["p2p_communicator"] = P2PCommunicator(groups.pg.pp, config)
        schedule = (
            schedules.forward_backward_pipelining_with_interleaving
            if groups.layout.vpp_size > 1
            else schedules.forward_backward_pipelining_without_interleaving
        )
    # Megatron sizes its receive buffers from these two numbers, so all micro-batches have one shape
    num_sequences, seq_length = micro_batches[0].tokens_BS.shape
    return schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=num_sequences,
        pg_collection=groups.pg,
        **options,
    )
