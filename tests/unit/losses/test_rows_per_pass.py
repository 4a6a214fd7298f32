"""How many rows an elementwise pass takes changes nothing but the size of its temporaries."""

import pytest
import torch

from megatron_gkd.losses import distill_loss
from megatron_gkd.losses.divergences import WeightedKL
from megatron_gkd.losses.kernels import eager
from megatron_gkd.losses.vocab_parallel import Temperatures, row_pieces


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_loss_and_gradient_are_the_same_for_any_number_of_rows(divergence):
    generator = torch.Generator().manual_seed(0)
    student_TV, teacher_TV = (torch.randn(5, 300, generator=generator) for _ in range(2))
    results = []
    for rows_per_pass in (None, 1, 2, 100):
        logits_TV = student_TV.clone().requires_grad_()
        loss_T = distill_loss(logits_TV, teacher_TV, divergence=divergence, rows_per_pass=rows_per_pass)
        loss_T.sum().backward()
        results.append((loss_T.detach(), logits_TV.grad))
    for loss_T, grad_TV in results[1:]:
        torch.testing.assert_close(loss_T, results[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad_TV, results[0][1], rtol=1e-6, atol=1e-8)


def test_a_pass_takes_as_many_rows_as_it_is_told(monkeypatch):
    sizes = []

    def noted(student_TV, *rest):
        sizes.append(len(student_TV))
        return kl_sums(student_TV, *rest)

    kl_sums = eager.kl_sums
    monkeypatch.setattr(eager, "kl_sums", noted)
    kernels = eager.EagerKernels(WeightedKL(1.0, 0.0), Temperatures(1.0, 1.0), rows_per_pass=2)
    kernels.first(torch.zeros(5, 30), torch.ones(5, 30))
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("device", "shape", "sizes"),
    [
        ("cpu", (5, 2**16), [2, 2, 1]),
        ("cpu", (2, 2**19), [1, 1]),
        ("cpu", (0, 30), []),
        ("meta", (4096, 30), [4096]),
        ("meta", (1000, 151_936), [441, 441, 118]),
        ("meta", (2, 2**27), [1, 1]),
        ("meta", (3, 0), [3]),
        ("meta", (0, 30), []),
    ],
)
def test_a_pass_is_cache_sized_on_a_cpu_and_bounded_on_any_other_device(device, shape, sizes):
    logits_TV = torch.empty((), device=device).expand(shape)
    assert [rows.stop - rows.start for rows in row_pieces(logits_TV)] == sizes


def test_a_pass_without_rows_is_refused():
    logits_TV = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rows_per_pass: should be greater than or equal to 1 \(got 0\)"):
        distill_loss(logits_TV, logits_TV, divergence="jsd", rows_per_pass=0)
