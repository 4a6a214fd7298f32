"""Collectives, bytes and allocations of the losses over a split vocabulary: counted, not timed.

Not covered here: whether the results are right (test_split_vocabulary_loss.py).
"""

import torch
import torch.distributed as dist

from megatron_gkd.losses import DIVERGENCES, distill_loss, linear_cross_entropy, linear_distill_loss
from tests.support.counting import counted
from tests.support.loss_cases import make_labels, make_linear_inputs

COLLECTIVES = {"forward_kl": [5], "reverse_kl": [5], "jsd": [4, 2], "cross_entropy": [3]}
"""Numbers per token of each collective of a block."""


def check_cost(rank, world_size):
    tokens, chunk, columns, hidden = 48, 16, 512, 8
    inputs = make_linear_inputs(tokens, columns * world_size, hidden, hidden)
    teacher_head = inputs.teacher_head_VH.chunk(world_size)[rank].float()
    labels = make_labels(tokens, columns * world_size)
    for name, numbers in COLLECTIVES.items():
        for options in ({}, {"token_weight_T": torch.ones(tokens)}):
            student = inputs.student_TH.float().requires_grad_()
            head = inputs.student_head_VH.chunk(world_size)[rank].float().requires_grad_()
            options = {"group": dist.group.WORLD, "tokens_per_chunk": chunk, **options}
            with counted() as forward:
                if name == "cross_entropy":
                    result = linear_cross_entropy(student, head, labels, **options)
                else:
                    result = linear_distill_loss(
                        student, head, inputs.teacher_TH.float(), teacher_head, divergence=name, **options
                    )
            with counted() as backward:
                (result[0] if isinstance(result, tuple) else result.sum()).backward()
            sent = [("_allgather_base_", 4 * n * chunk) for n in numbers] * (tokens // chunk)
            assert forward.collectives == sent, (name, forward.collectives)
            assert backward.collectives == []
            assert max(forward.largest_allocation, backward.largest_allocation) == chunk * columns
    for name in DIVERGENCES:
        logits = torch.zeros(tokens, columns, requires_grad=True)
        with counted() as counts:
            distill_loss(
                logits, torch.ones(tokens, columns), divergence=name, group=dist.group.WORLD
            ).sum().backward()
        assert counts.collectives == [("_allgather_base_", 4 * n * tokens) for n in COLLECTIVES[name]]


def test_collectives_bytes_and_allocations_per_block(run_on_ranks):
    run_on_ranks(2, check_cost)
