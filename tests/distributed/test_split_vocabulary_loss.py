"""Losses over a vocabulary split across 2 and 4 ranks: value and gradients against float64, and what they cost.

Not covered here: an unsplit vocabulary, bfloat16 and the arguments' errors (tests/unit/losses).
"""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.losses import DIVERGENCES, distill_loss, linear_cross_entropy, linear_distill_loss
from tests.support.counting import counted
from tests.support.dense_losses import dense_cross_entropy, dense_divergence, relative_error
from tests.support.loss_cases import (
    DIVERGENCE_CASES,
    make_labels,
    make_linear_inputs,
    make_logits,
    make_upstream,
)

LINEAR_CASES = (*DIVERGENCE_CASES, ("cross_entropy", {}))
SIZES = [2, 4]


def group_of(world_size):
    return dist.group.WORLD if world_size > 1 else None


def padded_shard(x, dim, rank, world_size, multiple_of=1, fill=7.0):
    """This rank's equal part of ``x``, after padding ``dim`` to a multiple of ``multiple_of`` * world_size."""
    missing = -x.shape[dim] % (multiple_of * world_size)
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, fill)], dim).chunk(world_size, dim)[rank]


def assert_equal_on_all_ranks(x, group):
    if group is not None:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.detach().contiguous(), group=group)
        assert all(part.equal(parts[0]) for part in parts)


def ones(tokens):
    return torch.ones(tokens).double()


def summed(x, group):
    x = x.clone()
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


# ---- logits ----


def check_logits(rank, world_size):
    random = make_upstream(24)
    for name, how in DIVERGENCE_CASES:
        for upstream, dtype, scale, bound in (
            (random, torch.float64, 3.0, 1e-12),
            (random, torch.float32, 3.0, 1e-6),
            (ones(24), torch.float32, 3.0, 1e-6),
            (random, torch.float32, 30.0, 2e-6),
        ):
            student, teacher = make_logits(scale=scale)
            check_logits_case(rank, world_size, student, teacher, upstream, name, how, dtype, bound)


def check_logits_case(rank, world_size, student, teacher, upstream, name, how, dtype, bound):
    group = group_of(world_size)
    whole = student.clone().requires_grad_()
    want = dense_divergence(whole, teacher, name, **how)
    (want * upstream).sum().backward()
    mine = padded_shard(student, 1, rank, world_size).to(dtype, copy=True).requires_grad_()
    loss = distill_loss(
        mine, padded_shard(teacher, 1, rank, world_size).to(dtype), divergence=name, group=group, **how
    )
    (loss * upstream.to(dtype)).sum().backward()
    assert_equal_on_all_ranks(loss, group)
    error_TV = mine.grad.double() - padded_shard(whole.grad, 1, rank, world_size)
    gradient_error = summed(error_TV.square().sum(), group).sqrt() / whole.grad.norm()
    errors = relative_error(loss, want), gradient_error.item()
    assert max(errors) <= bound, (name, how, dtype, errors)


@pytest.mark.parametrize("tp", SIZES)
def test_split_logits_give_the_value_and_gradient_of_float64(run_on_ranks, tp):
    run_on_ranks(tp, check_logits)


# ---- hidden states ----


class LinearCase:
    """The dense float64 result for the whole vocabulary, and ours on this rank's shard."""

    def __init__(self, name, how, vocab, upstream_of=make_upstream):
        self.name, self.how, self.vocab = name, how, vocab
        self.inputs = make_linear_inputs(vocab=vocab)
        self.labels = make_labels(len(self.inputs.student_TH), vocab)
        self.upstream = upstream_of(len(self.labels))
        student, head = (x.clone().requires_grad_() for x in self.inputs[:2])
        if name == "cross_entropy":
            self.loss = dense_cross_entropy(student @ head.T, self.labels)
        else:
            teacher = self.inputs.teacher_TH @ self.inputs.teacher_head_VH.T
            self.loss = dense_divergence(student @ head.T, teacher, name, **how)
        (self.loss * self.upstream).sum().backward()
        self.student_grad, self.head_grad = student.grad, head.grad

    def run(self, rank, world_size, dtype, *, is_weighted, multiple_of=1, group=None, **options):
        """(loss_T, this rank's partial gradient of the hidden states, gradient of its head shard)."""
        student = self.inputs.student_TH.to(dtype, copy=True).requires_grad_()
        heads = (self.inputs.student_head_VH, self.inputs.teacher_head_VH)
        head, teacher_head = (
            padded_shard(x, 0, rank, world_size, multiple_of).to(dtype, copy=True) for x in heads
        )
        head.requires_grad_()
        if is_weighted:
            options["token_weight_T"] = self.upstream.to(dtype)
        if self.name == "cross_entropy":
            result = linear_cross_entropy(student, head, self.labels, group=group, **options)
        else:
            teacher = self.inputs.teacher_TH.to(dtype)
            result = linear_distill_loss(
                student, head, teacher, teacher_head, divergence=self.name, group=group, **self.how, **options
            )
        total, loss = result if is_weighted else ((result * self.upstream.to(dtype)).sum(), result)
        total.backward()
        return loss.detach(), student.grad, head.grad

    def check(self, rank, world_size, dtype, bound, multiple_of=1, **options):
        group = group_of(world_size)
        loss, student_grad, head_grad = self.run(
            rank, world_size, dtype, multiple_of=multiple_of, group=group, **options
        )
        assert_equal_on_all_ranks(loss, group)
        want_head = padded_shard(self.head_grad, 0, rank, world_size, multiple_of, fill=0.0)
        errors = (
            relative_error(loss, self.loss),
            relative_error(summed(student_grad, group), self.student_grad),
        )
        assert max(errors) <= bound, (self.name, self.how, dtype, options, errors)
        num_real = int(min(max(self.vocab - rank * len(want_head), 0), len(want_head)))
        assert head_grad[num_real:].eq(0).all()
        if num_real:
            error = relative_error(head_grad, want_head)
            assert error <= bound, (self.name, self.how, dtype, options, error)


def check_hidden_states(rank, world_size):
    for name, how in LINEAR_CASES:
        uniform, random = (LinearCase(name, how, 512, upstream_of) for upstream_of in (ones, make_upstream))
        for is_weighted in (True, False):
            random.check(rank, world_size, torch.float64, 1e-12, is_weighted=is_weighted)
            random.check(rank, world_size, torch.float32, 1e-6, is_weighted=is_weighted, tokens_per_chunk=7)
            uniform.check(rank, world_size, torch.float32, 1e-6, is_weighted=is_weighted, tokens_per_chunk=24)


@pytest.mark.parametrize("tp", SIZES)
def test_hidden_states_give_the_value_and_both_gradients_of_float64(run_on_ranks, tp):
    run_on_ranks(tp, check_hidden_states)


def check_padding(rank, world_size):
    for name, how in LINEAR_CASES:
        # 4 ranks: shards of 5 with 5, 5, 1 and 0 real rows
        case = LinearCase(name, how, 11)
        for is_weighted in (True, False):
            options = {
                "is_weighted": is_weighted,
                "multiple_of": 5,
                "valid_vocab_size": 11,
                "tokens_per_chunk": 9,
            }
            case.check(rank, world_size, torch.float32, 1e-6, **options)
    student, teacher = make_logits(vocab=11)
    for name in DIVERGENCES:
        whole = student.clone().requires_grad_()
        want = dense_divergence(whole, teacher, name)
        want.sum().backward()
        mine = padded_shard(student, 1, rank, world_size, 5).clone().requires_grad_()
        garbage = padded_shard(teacher, 1, rank, world_size, 5, fill=math.nan)
        loss = distill_loss(mine, garbage, divergence=name, group=group_of(world_size), valid_vocab_size=11)
        loss.sum().backward()
        torch.testing.assert_close(loss, want)
        want_grad = padded_shard(whole.grad, 1, rank, world_size, 5, fill=0.0)
        torch.testing.assert_close(mine.grad, want_grad)
        assert mine.grad[want_grad == 0].eq(0).all()


@pytest.mark.parametrize("tp", SIZES)
def test_padding_takes_no_part_even_on_a_rank_that_holds_nothing_else(run_on_ranks, tp):
    run_on_ranks(tp, check_padding)


def check_uneven_and_excluded(rank, world_size):
    group = group_of(world_size)
    bounds = [0, 3, 40, 41, 64] if world_size == 4 else [0, 3, 64]
    columns = slice(bounds[rank], bounds[rank + 1])
    student, teacher = make_logits(vocab=64)
    teacher[:, :3] = -math.inf  # all that rank 0 holds
    student[0, :3] = -math.inf
    for name in DIVERGENCES:
        whole = student.clone().requires_grad_()
        want = dense_divergence(whole, teacher, name)
        mine = student[:, columns].float().requires_grad_()
        loss = distill_loss(mine, teacher[:, columns].float(), divergence=name, group=group)
        loss.sum().backward()
        assert_equal_on_all_ranks(loss, group)
        if name == "reverse_kl":
            assert loss[1:].eq(math.inf).all()
            assert loss[0].isfinite()
            continue
        want.sum().backward()
        assert relative_error(loss, want) <= 1e-6
        assert mine.grad.isfinite().all()
        torch.testing.assert_close(mine.grad[1:], whole.grad[1:, columns].float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tp", [2, 4])
def test_uneven_shards_and_a_shard_that_the_teacher_excludes(run_on_ranks, tp):
    run_on_ranks(tp, check_uneven_and_excluded)


def check_one_bad_row(rank, world_size):
    group = group_of(world_size)
    student, teacher = (padded_shard(z, 1, rank, world_size).float() for z in make_logits(vocab=64))
    for name in DIVERGENCES:
        want = distill_loss(student, teacher, divergence=name, group=group)
        broken = teacher.clone()
        if rank == 0:
            broken[5, 2] = math.nan
        mine = student.clone().requires_grad_()
        loss = distill_loss(mine, broken, divergence=name, group=group)
        loss.sum().backward()
        others = torch.arange(24) != 5
        assert loss[5].isnan()
        assert not mine.grad[5].isfinite().any()
        assert loss[others].equal(want[others])
        assert mine.grad[others].isfinite().all()


@pytest.mark.parametrize("tp", [2, 4])
def test_a_bad_row_on_one_rank_is_bad_on_all_and_alone(run_on_ranks, tp):
    run_on_ranks(tp, check_one_bad_row)


def check_zero_rows(rank, world_size):
    group = group_of(world_size)
    for name in DIVERGENCES:
        student, head = torch.zeros(0, 6, requires_grad=True), torch.ones(10, 6, requires_grad=True)
        total, loss = linear_distill_loss(
            student,
            head,
            torch.zeros(0, 8),
            torch.ones(10, 8),
            divergence=name,
            group=group,
            token_weight_T=torch.zeros(0),
        )
        total.backward()
        assert total == 0
        assert loss.shape == (0,)
        assert student.grad.shape == (0, 6)
        assert head.grad.shape == (10, 6)
        assert head.grad.eq(0).all()
        logits = torch.zeros(0, 10, requires_grad=True)
        distill_loss(logits, torch.zeros(0, 10), divergence=name, group=group).sum().backward()
        assert logits.grad.shape == (0, 10)


@pytest.mark.parametrize("tp", SIZES)
def test_zero_rows_run_and_give_zero_gradients(run_on_ranks, tp):
    run_on_ranks(tp, check_zero_rows)


def check_equal_models(rank, world_size):
    group = group_of(world_size)
    inputs = make_linear_inputs()
    head = padded_shard(inputs.student_head_VH, 0, rank, world_size).float().requires_grad_()
    student = inputs.student_TH.float().requires_grad_()
    for name in DIVERGENCES:
        total, loss = linear_distill_loss(
            student,
            head,
            student.detach(),
            head.detach(),
            divergence=name,
            group=group,
            temperature=1.3,
            token_weight_T=torch.ones(24),
        )
        total.backward()
        assert all(x.eq(0).all() for x in (loss, student.grad, head.grad)), name


@pytest.mark.parametrize("tp", SIZES)
def test_equal_models_have_exactly_zero_loss_and_gradients(run_on_ranks, tp):
    run_on_ranks(tp, check_equal_models)


# ---- explicit groups, and cost ----


def check_two_groups_side_by_side(rank, world_size):
    groups = [dist.new_group([0, 1]), dist.new_group([3, 2])]  # every rank makes every group
    group = groups[rank // 2]
    case = LinearCase("jsd", {}, 50, lambda tokens: make_upstream(tokens, seed=rank // 2))
    loss, student_grad, head_grad = case.run(
        group.rank(), 2, torch.float32, is_weighted=True, multiple_of=4, group=group, valid_vocab_size=50
    )
    assert relative_error(loss, case.loss) <= 1e-6
    assert relative_error(summed(student_grad, group), case.student_grad) <= 1e-6
    want_head = padded_shard(case.head_grad, 0, group.rank(), 2, 4, fill=0.0)
    assert relative_error(head_grad, want_head) <= 1e-6
    alone = [dist.new_group([r]) for r in range(4)][rank]
    loss, _, _ = case.run(0, 1, torch.float32, is_weighted=True, group=alone)
    assert relative_error(loss, case.loss) <= 1e-6


def test_the_vocabulary_is_split_over_the_group_that_is_passed(run_on_ranks):
    run_on_ranks(4, check_two_groups_side_by_side)


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
