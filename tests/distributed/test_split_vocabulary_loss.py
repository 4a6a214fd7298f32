"""Losses over a vocabulary split across 2 and 4 ranks: value and gradients against float64.

Not covered here: an unsplit vocabulary and the arguments' errors (tests/unit/losses); bfloat16 but for padding
(test_certificate.py); collectives, bytes and allocations (test_split_vocabulary_loss_cost.py).
"""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.losses import DIVERGENCES, distill_loss, linear_cross_entropy, linear_distill_loss
from megatron_gkd.losses.verify.reference import dense_cross_entropy, dense_divergence, relative_error
from tests.support.loss_cases import (
    DIVERGENCE_CASES,
    make_labels,
    make_linear_inputs,
    make_logits,
    make_upstream,
)
from tests.support.shards import assert_equal_on_all_ranks, group_of, ones, padded_shard, summed

LINEAR_CASES = (*DIVERGENCE_CASES, ("cross_entropy", {}))
SIZES = [2, 4]


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
            errors = errors_of_logits(rank, world_size, name, how, upstream, dtype=dtype, scale=scale)
            assert max(errors) <= bound, (name, how, dtype, errors)


def errors_of_logits(rank, world_size, name, how, upstream, *, dtype, scale):
    """Relative errors of the value and of the gradient of this rank's logits."""
    student, teacher = make_logits(scale=scale)
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
    return relative_error(loss, want), gradient_error.item()


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
            case.check(
                rank, world_size, torch.bfloat16, 8e-3, **options
            )  # the weights of tokens are rounded, too
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
        if name in ("reverse_kl", "mixed_kl", "adaptive_kl"):
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


# ---- explicit groups ----


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
