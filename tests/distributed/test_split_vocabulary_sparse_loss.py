"""Divergences on a few entries of a split vocabulary, and the mix with cross-entropy, are those of one process.

Not covered here: all parameters, special values and errors (tests/unit/losses/test_sparse_loss.py); collectives
(test_split_vocabulary_loss_cost.py).
"""

import pytest
import torch

from megatron_gkd.losses import (
    distill_loss,
    linear_distill_loss,
    linear_top_k_distill_loss,
    top_k_distill_loss,
)
from megatron_gkd.losses.verify.reference import (
    dense_cross_entropy,
    dense_divergence,
    dense_known,
    dense_top_k,
    relative_error,
)
from tests.support.loss_cases import (
    DIVERGENCE_CASES,
    TOP_K_CASES,
    make_known_entries,
    make_labels,
    make_linear_inputs,
    make_logits,
    make_upstream,
)
from tests.support.shards import assert_equal_on_all_ranks, group_of, padded_shard, summed

SIZES = [2, 4]
VOCAB = 90
ROWS_PER_RANK = 30  # 4 ranks hold 30, 30, 30 and 0 real columns; 2 ranks 60 and 30


def shard_of(x, dim, rank, world_size, **options):
    return padded_shard(x, dim, rank, world_size, ROWS_PER_RANK, **options)


def check_top_k(rank, world_size):
    group, upstream = group_of(world_size), make_upstream(24)
    student, teacher = make_logits(vocab=VOCAB)
    ids, log_probs = make_known_entries(teacher, dtype=torch.float32)
    for name, how, tail in TOP_K_CASES:
        whole = student.clone().requires_grad_()
        want = dense_top_k(whole, *dense_known(ids, log_probs, VOCAB), name, tail, **how)
        (want * upstream).sum().backward()
        mine = shard_of(student, 1, rank, world_size).float().requires_grad_()
        loss = top_k_distill_loss(
            mine, ids, log_probs, divergence=name, tail=tail, group=group, valid_vocab_size=VOCAB, **how
        )
        (loss * upstream.float()).sum().backward()
        assert_equal_on_all_ranks(loss, group)
        want_grad = shard_of(whole.grad, 1, rank, world_size, fill=0.0)
        error = summed((mine.grad - want_grad).square().sum(), group).sqrt() / whole.grad.norm()
        assert max(relative_error(loss, want), error.item()) <= 1e-6, (name, how, tail)


@pytest.mark.parametrize("tp", SIZES)
def test_top_k_value_and_gradient_are_those_of_float64(run_on_ranks, tp):
    run_on_ranks(tp, check_top_k)


def check_linear_top_k(rank, world_size):
    group, upstream = group_of(world_size), make_upstream(24)
    inputs = make_linear_inputs(vocab=VOCAB)
    entries = make_known_entries(inputs.teacher_TH @ inputs.teacher_head_VH.T, dtype=torch.float32)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        for tail in ("bucket", "renormalize", "none"):
            student, head = (x.clone().requires_grad_() for x in inputs[:2])
            want = dense_top_k(student @ head.T, *dense_known(*entries, VOCAB), name, tail)
            (want * upstream).sum().backward()
            for is_weighted in (False, True):
                mine = inputs.student_TH.float().requires_grad_()
                my_head = shard_of(inputs.student_head_VH, 0, rank, world_size).float().requires_grad_()
                result = linear_top_k_distill_loss(
                    mine,
                    my_head,
                    *entries,
                    divergence=name,
                    tail=tail,
                    group=group,
                    valid_vocab_size=VOCAB,
                    tokens_per_chunk=7,
                    token_weight_T=upstream if is_weighted else None,
                )
                total = result[0] if is_weighted else (result * upstream).sum()
                total.backward()
                want_head = shard_of(head.grad, 0, rank, world_size, fill=0.0)
                error = summed((my_head.grad - want_head).square().sum(), group).sqrt() / head.grad.norm()
                errors = relative_error(summed(mine.grad, group), student.grad), error.item()
                assert max(errors) <= 1e-6, (name, tail, is_weighted, errors)


@pytest.mark.parametrize("tp", SIZES)
def test_top_k_gives_both_gradients_of_hidden_states(run_on_ranks, tp):
    run_on_ranks(tp, check_linear_top_k)


def check_supports(rank, world_size):
    group = group_of(world_size)
    student, teacher = make_logits(vocab=VOCAB)
    labels = make_labels(24, VOCAB)
    for support in ("teacher_top_k", "student_top_k", "union", "sampled", "token"):
        how = {"divergence": "reverse_kl", "support": support, "top_k": 9, "labels_T": labels}
        whole = student.clone().requires_grad_()
        torch.manual_seed(3)
        want = distill_loss(whole, teacher, **how)
        want.sum().backward()
        mine = shard_of(student, 1, rank, world_size).requires_grad_()
        others = shard_of(teacher, 1, rank, world_size)
        torch.manual_seed(3 + rank)  # only rank 0's numbers count
        loss = distill_loss(mine, others, group=group, valid_vocab_size=VOCAB, **how)
        loss.sum().backward()
        assert_equal_on_all_ranks(loss, group)
        torch.testing.assert_close(loss, want, msg=support)
        torch.testing.assert_close(
            mine.grad, shard_of(whole.grad, 1, rank, world_size, fill=0.0), msg=support
        )


@pytest.mark.parametrize("tp", SIZES)
def test_a_chosen_support_does_not_depend_on_the_split(run_on_ranks, tp):
    run_on_ranks(tp, check_supports)


def check_mix(rank, world_size):
    group, upstream = group_of(world_size), make_upstream(24)
    inputs, labels = make_linear_inputs(vocab=VOCAB), make_labels(24, VOCAB)
    for name, how in DIVERGENCE_CASES:
        student, head = (x.clone().requires_grad_() for x in inputs[:2])
        logits = student @ head.T
        divergence = dense_divergence(logits, inputs.teacher_TH @ inputs.teacher_head_VH.T, name, **how)
        want = 0.7 * divergence + 0.3 * dense_cross_entropy(logits, labels)
        (want * upstream).sum().backward()
        mine = inputs.student_TH.float().requires_grad_()
        heads = (inputs.student_head_VH, inputs.teacher_head_VH)
        my_head, teacher_head = (shard_of(x, 0, rank, world_size).float() for x in heads)
        total, loss = linear_distill_loss(
            mine,
            my_head.requires_grad_(),
            inputs.teacher_TH.float(),
            teacher_head,
            labels_T=labels,
            sft_weight=0.3,
            divergence=name,
            group=group,
            valid_vocab_size=VOCAB,
            token_weight_T=upstream,
            tokens_per_chunk=7,
            **how,
        )
        total.backward()
        want_head = shard_of(head.grad, 0, rank, world_size, fill=0.0)
        error = summed((my_head.grad - want_head).square().sum(), group).sqrt() / head.grad.norm()
        errors = (
            relative_error(loss, want),
            relative_error(summed(mine.grad, group), student.grad),
            error.item(),
        )
        assert max(errors) <= 1e-6, (name, how, errors)


@pytest.mark.parametrize("tp", SIZES)
def test_the_mix_with_cross_entropy_is_that_of_float64(run_on_ranks, tp):
    run_on_ranks(tp, check_mix)
