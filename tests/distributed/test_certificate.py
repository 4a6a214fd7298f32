"""Every loss against float64 over a split vocabulary; gradients that other systems shipped, re-created, are caught.

In one process: tests/unit/losses/test_certificate.py.
"""

import json
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.support.on_ranks import Split, student_groups
from tests.support.run_config import write_config

KNOWN = {"divergence": "forward_kl", "support": "teacher_top_k", "tail": "none"}


def check_every_loss(rank: int, world_size: int) -> None:
    from megatron_gkd.losses.verify.certificate import certify
    from megatron_gkd.losses.verify.problem import every_case

    for dtype, tokens_per_chunk in ((torch.float32, 40), (torch.bfloat16, 24)):
        for case in every_case(dtype=dtype, tokens_per_chunk=tokens_per_chunk):
            result = certify(case, group=dist.group.WORLD, device=torch.device("cpu"))
            assert result.is_passed, str(result)
            assert max(result.student_error, result.head_error) <= 2e-3, str(result)


@pytest.mark.parametrize("tp", [2, 4])
def test_every_loss_is_that_of_float64(run_on_ranks, tp):
    run_on_ranks(tp, check_every_loss)


def test_the_tool_starts_its_own_ranks(tmp_path):
    from megatron_gkd.cli import verify_loss

    file = tmp_path / "certificate.json"
    arguments = ["--divergence", "tvd", "--dtype", "fp32", "--tokens-per-chunk", "16"]
    assert verify_loss.main(["--tp", "2", *arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows
    assert {row["tp"] for row in rows} == {2}


# ---- wrong gradients ----


class _WithGradient(torch.autograd.Function):
    """``value_T`` with a gradient of one's own with respect to the logits."""

    @staticmethod
    def forward(ctx, logits_TV, value_T, grad_TV):
        ctx.save_for_backward(grad_TV)
        return value_T.clone()

    @staticmethod
    def backward(ctx, upstream_T):
        return ctx.saved_tensors[0] * upstream_T.unsqueeze(-1), None, None


def local_logits(head: Any, num_columns: int) -> torch.Tensor:
    return head.hidden_TH @ head.weight_VH[:num_columns].T


def real_columns(shard: Any, rank: int) -> tuple[int, int]:
    """(first id, number of real columns) of this rank."""
    size = len(shard.student.weight_VH)
    return rank * size, min(max(shard.valid_vocab_size - rank * size, 0), size)


def split_log_softmax(logits_TV: torch.Tensor) -> torch.Tensor:
    """The all-reduce changes a number that autograd takes for this rank's own."""
    max_T1 = logits_TV.detach().amax(-1, keepdim=True)
    dist.all_reduce(max_T1, dist.ReduceOp.MAX)
    sum_T1 = (logits_TV - max_T1).exp().sum(-1, keepdim=True)
    dist.all_reduce(sum_T1.data)
    return logits_TV - max_T1 - sum_T1.log()


def without_the_mass(shard: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k forward KL whose gradient is q - p_k in place of q sum_k p_k - p_k."""
    first, num_columns = real_columns(shard, dist.get_rank())
    logits_TV = local_logits(shard.student, num_columns)
    log_q_TV = split_log_softmax(logits_TV.detach())
    columns_TK = shard.known.ids_TK - first
    is_own_TK = (columns_TK >= 0) & (columns_TK < num_columns) & (shard.known.ids_TK >= 0)
    columns_TK = columns_TK.where(is_own_TK, num_columns)
    log_p_TV = torch.full((len(logits_TV), num_columns + 1), -torch.inf)
    log_p_TV = log_p_TV.scatter(1, columns_TK, shard.known.log_probs_TK)[:, :-1]
    value_T = (log_p_TV.exp() * (log_p_TV - log_q_TV).nan_to_num(neginf=0.0)).sum(-1)
    dist.all_reduce(value_T)
    loss_T = _WithGradient.apply(logits_TV, value_T, log_q_TV.exp() - log_p_TV.exp())
    return (loss_T * shard.weight_T).sum(), loss_T


def reduced_without_autograd(shard: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Reverse KL with in-place all-reduces: the sums are global in the value and local in the gradient."""
    _, num_columns = real_columns(shard, dist.get_rank())
    log_q_TV = split_log_softmax(local_logits(shard.student, num_columns))
    log_p_TV = split_log_softmax(local_logits(shard.teacher, num_columns))
    loss_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
    dist.all_reduce(loss_T.data)
    return (loss_T * shard.weight_T).sum(), loss_T


def times_tp(shard: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A right loss whose gradient every rank adds once more."""
    from megatron_gkd.losses import linear_distill_loss

    total, loss_T = linear_distill_loss(
        *shard.student[:2],
        *shard.teacher[:2],
        divergence="jsd",
        group=dist.group.WORLD,
        valid_vocab_size=shard.valid_vocab_size,
        token_weight_T=shard.weight_T,
    )
    return total * dist.get_world_size(), loss_T


def check_wrong_gradients(rank: int, world_size: int) -> None:
    from megatron_gkd.config.loss import LossSettings
    from megatron_gkd.losses.verify.certificate import certify
    from megatron_gkd.losses.verify.problem import Case

    for loss, how, from_entries in (
        (without_the_mass, KNOWN, True),
        (reduced_without_autograd, {"divergence": "reverse_kl"}, False),
        (times_tp, {"divergence": "jsd"}, False),
    ):
        case = Case(settings=LossSettings(**how), tokens_per_chunk=16, from_entries=from_entries)
        result = certify(case, group=dist.group.WORLD, device=torch.device("cpu"), loss=loss)
        assert result.value_error <= 1e-6, str(result)  # a test of the value alone would let it pass
        assert result.student_error > 0.01, str(result)
        assert not result.is_passed


def test_three_wrong_gradients_behind_right_values_are_caught(run_on_ranks):
    run_on_ranks(2, check_wrong_gradients)


# ---- the start of a run ----


def check_start_of_a_run(rank: int, world_size: int, config_file) -> None:
    from megatron_gkd.config import load_config
    from megatron_gkd.losses.verify.certificate import Certificate, CertificateError
    from megatron_gkd.train import loss

    config, cpu = load_config(config_file), torch.device("cpu")
    for split in (Split(tp=2), Split(pp=2), Split()):
        with student_groups(split) as groups:
            loss.certify_run(config, groups, cpu)
            bad_error = 0.1 if rank == world_size - 1 else 0.0
            (case,) = loss.cases_of_run(config, cpu)
            found = Certificate(case, split.tp, 0.0, bad_error, 0.0)
            with (
                mock.patch.object(loss, "certify", return_value=found),
                pytest.raises(CertificateError, match=r"nothing is trained.*loss\.certify=false"),
            ):
                loss.certify_run(config, groups, cpu)


def test_a_wrong_loss_on_one_rank_refuses_to_train_on_all(run_on_ranks, tiny_llama, tmp_path):
    run_on_ranks(2, check_start_of_a_run, write_config(tmp_path, tiny_llama, tiny_llama))
