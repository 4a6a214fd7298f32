"""Collectives, bytes and allocations of the losses over a split vocabulary: counted, not timed.

Not covered here: whether the results are right (test_split_vocabulary_loss.py).
"""

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.losses import (
    DIVERGENCES,
    distill_loss,
    linear_cross_entropy,
    linear_distill_loss,
    top_k_distill_loss,
)
from tests.support.counting import counted
from tests.support.loss_cases import make_labels, make_linear_inputs

COLLECTIVES = {
    "forward_kl": [5],
    "reverse_kl": [5],
    "mixed_kl": [6],
    "jsd": [5, 2],
    "skew_forward_kl": [5, 2],
    "skew_reverse_kl": [5, 2],
    "tvd": [5, 2],
    "adaptive_kl": [10, 64, 64, 64, 2],
    "cross_entropy": [3],
}
"""Numbers per token of each collective of a block."""
TOP_K = 5
SUPPORT_COLLECTIVES = {
    "teacher_top_k": [2 * TOP_K, TOP_K + 2, TOP_K + 2],
    "union": [4 * TOP_K, 2 * TOP_K + 2, 2 * TOP_K + 2],
    "sampled": [2 * TOP_K + 4 + 3, 1, 3, TOP_K + 3 + 2, TOP_K + 3 + 2],
    "token": [3, 3],
}


def one_after_the_other(numbers: list[int], num_chunks: int) -> list[int]:
    return numbers * num_chunks


def in_flight(numbers: list[int], num_chunks: int) -> list[int]:
    """The first round of a chunk starts before the last ones of the one before: the second is the first to follow it there.

    Only with the end of the first chunk it is known that there is a second round.
    """
    first, second, rest = numbers[:1], numbers[1:2], numbers[2:]
    known = (second + first + rest) * (num_chunks - 2)
    return first + first + second + rest + known + second + rest


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
            order = in_flight if "token_weight_T" in options else one_after_the_other
            sent = [("_allgather_base_", 4 * n * chunk) for n in order(numbers, tokens // chunk)]
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


def check_cost_of_entries(rank, world_size):
    tokens, columns = 48, 512
    logits = torch.zeros(tokens, columns, requires_grad=True)
    ids = torch.arange(TOP_K).repeat(tokens, 1)
    log_probs = torch.full(ids.shape, -3.0)
    for tail in ("bucket", "renormalize", "none"):
        with counted() as counts:
            loss = top_k_distill_loss(
                logits, ids, log_probs, divergence="jsd", tail=tail, group=dist.group.WORLD
            )
            loss.sum().backward()
        assert counts.collectives == [("_allgather_base_", 4 * (TOP_K + 2) * tokens)], tail
    for support, numbers in SUPPORT_COLLECTIVES.items():
        with counted() as counts:
            distill_loss(
                logits,
                torch.ones(tokens, columns),
                labels_T=torch.zeros(tokens, dtype=torch.int64),
                divergence="reverse_kl",
                support=support,
                top_k=TOP_K,
                num_draws=3,
                group=dist.group.WORLD,
            ).sum().backward()
        assert counts.collectives == [("_allgather_base_", 4 * n * tokens) for n in numbers], support


def test_collectives_of_a_divergence_on_some_entries(run_on_ranks):
    run_on_ranks(2, check_cost_of_entries)


def check_cost_of_a_mix(rank, world_size):
    tokens, columns, hidden = 48, 512, 8
    inputs = make_linear_inputs(tokens, columns * world_size, hidden, hidden)
    head, teacher_head = (x.chunk(world_size)[rank].float() for x in (inputs[1], inputs[3]))
    student = inputs.student_TH.float().requires_grad_()
    for name, numbers in {"forward_kl": [5 + 3], "jsd": [5 + 3, 2]}.items():
        with counted() as counts:
            total, _ = linear_distill_loss(
                student,
                head.requires_grad_(),
                inputs.teacher_TH.float(),
                teacher_head,
                labels_T=make_labels(tokens, columns * world_size),
                sft_weight=0.5,
                divergence=name,
                group=dist.group.WORLD,
                token_weight_T=torch.ones(tokens),
                tokens_per_chunk=16,
            )
            total.backward()
        assert counts.collectives == [("_allgather_base_", 4 * n * 16) for n in in_flight(numbers, 3)]
        assert counts.products == 3 * (2 + 2)  # per chunk: two of logits, two of gradients
        assert counts.largest_allocation == 16 * columns


def test_the_mix_with_cross_entropy_adds_no_collective_and_no_product(run_on_ranks):
    run_on_ranks(2, check_cost_of_a_mix)


def check_order(rank, world_size, divergence):
    from megatron_gkd.parallel.gathering import GatheredRows

    inputs = make_linear_inputs(48, 64 * world_size, 8, 8)
    head, teacher_head = (x.chunk(world_size)[rank].float() for x in (inputs[1], inputs[3]))
    options = {"group": dist.group.WORLD, "tokens_per_chunk": 16, "token_weight_T": torch.ones(48)}
    wait = GatheredRows.wait
    with pytest.MonkeyPatch.context() as patch, counted() as counts:
        patch.setattr(GatheredRows, "wait", lambda rows: (counts.order.append("wait"), wait(rows))[1])
        student = inputs.student_TH.float().requires_grad_()
        linear_distill_loss(
            student,
            head.requires_grad_(),
            inputs.teacher_TH.float(),
            teacher_head,
            divergence=divergence,
            **options,
        )
    logits, gradients = ["product"] * 2, ["product"] * 2
    started, second = [*logits, "collective"], ["wait", "collective"] * (divergence == "jsd")
    first_ends = [*second, "wait", *gradients]
    later_ends = [*logits, *second, "collective", "wait", *gradients]
    assert counts.order == started + started + first_ends + later_ends + first_ends


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_collectives_of_a_chunk_are_in_flight_during_the_next_chunk(run_on_ranks, divergence):
    run_on_ranks(2, check_order, divergence)
