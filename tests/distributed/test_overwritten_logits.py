"""``distill_loss(..., overwrite_logits=True)`` over a vocabulary split across ranks: results, collectives, allocations.

Not covered here: every divergence and special values (tests/unit/losses/test_overwritten_logits.py, test_compiled_kernels.py).
"""

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.losses import distill_loss
from megatron_gkd.losses.verify.reference import dense_divergence, relative_error
from tests.support.counting import counted
from tests.support.loss_cases import make_logits, make_upstream
from tests.support.shards import assert_equal_on_all_ranks, padded_shard, summed

NUMBERS = {"forward_kl": [5], "jsd": [5, 2]}


def check(rank, world_size, backend):
    group, tokens, vocab = dist.group.WORLD, 24, 1000
    weight = make_upstream(tokens)
    for name, numbers in NUMBERS.items():
        student, teacher = make_logits(vocab=vocab)
        whole = student.clone().requires_grad_()
        want = dense_divergence(whole, teacher, name)
        (want * weight).sum().backward()
        mine = padded_shard(student, 1, rank, world_size, 64).to(torch.float32, copy=True).requires_grad_()
        logits, theirs = mine * 1, padded_shard(teacher, 1, rank, world_size, 64).float()
        with counted() as counts:
            total, loss = distill_loss(
                logits,
                theirs,
                divergence=name,
                group=group,
                valid_vocab_size=vocab,
                token_weight_T=weight,
                overwrite_logits=True,
                backend=backend,
            )
            (gradient,) = torch.autograd.grad(total, logits)
        assert counts.collectives == [("_allgather_base_", 4 * n * tokens) for n in numbers]
        assert gradient.data_ptr() == logits.data_ptr()
        assert_equal_on_all_ranks(loss, group)
        assert relative_error(loss, want) <= 1e-6
        error = gradient.double() - padded_shard(whole.grad, 1, rank, world_size, 64, fill=0.0)
        assert (summed(error.square().sum(), group).sqrt() / whole.grad.norm()).item() <= 1e-6


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_the_gradient_takes_the_place_of_the_logits_with_the_same_collectives(run_on_ranks, backend):
    run_on_ranks(2, check, backend)
