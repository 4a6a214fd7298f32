"""What holds for any logits: generated shapes, extreme values, ties, equal models, padding, rows of other rows' fate.

Not covered here: accuracy against float64 (test_distill_loss.py, test_certificate.py).
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.losses import DIVERGENCES, distill_loss, linear_cross_entropy, top_k_distill_loss

NAMES = st.sampled_from(sorted(DIVERGENCES))
SUPPORTS = st.sampled_from(["full", "teacher_top_k", "student_top_k", "union"])
TAILS = st.sampled_from(["bucket", "renormalize", "none"])
UPPER_BOUND = {"tvd": 1.0, "jsd": 0.6932, "skew_forward_kl": 2.3026, "skew_reverse_kl": 2.3026}

fast = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def logits(draw, most_tokens=5, most_entries=40):
    """A float32 (student, teacher): normal, huge, tied, or with a single entry."""
    tokens, vocab = draw(st.integers(0, most_tokens)), draw(st.integers(1, most_entries))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    models = []
    for _ in range(2):
        scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
        z = torch.randn(tokens, vocab, generator=rng).clamp(-1, 1) * scale
        models.append(z.round() if draw(st.booleans()) else z)
    return models


def run(student, teacher, **how):
    student = student.clone().requires_grad_()
    loss = distill_loss(student, teacher, **how)
    loss.sum().backward()
    return loss.detach(), student.grad


@fast
@given(logits(), NAMES)
def test_loss_and_gradient_are_finite_and_the_loss_is_within_its_bounds(models, name):
    loss, grad = run(*models, divergence=name)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert (loss >= -1e-5 * (1 + loss.abs())).all()
    assert (loss <= UPPER_BOUND.get(name, 1e9) * (1 + 1e-5)).all()


@fast
@given(logits(), NAMES, st.floats(-100, 100))
def test_the_gradient_of_a_row_sums_to_zero_and_a_shift_changes_nothing(models, name, shift):
    loss, grad = run(*models, divergence=name)
    assert (grad.sum(-1).abs() <= 1e-5 * (1 + grad.abs().sum(-1))).all()
    rounded = [(z * 64).round() / 64 for z in models]  # so that adding a whole number rounds nothing away
    moved = [z.clamp(-1e3, 1e3) + round(shift) for z in rounded]
    loss, _ = run(*(z.clamp(-1e3, 1e3) for z in rounded), divergence=name)
    moved_loss, _ = run(*moved, divergence=name)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-5, atol=1e-6)


@fast
@given(logits(), NAMES)
def test_equal_models_have_exactly_zero_loss_and_gradient(models, name):
    loss, grad = run(models[0], models[0].clone(), divergence=name)
    assert loss.eq(0).all()
    assert grad.eq(0).all()


@fast
@given(logits(), NAMES, SUPPORTS, TAILS, st.integers(1, 8))
def test_rows_do_not_depend_on_each_other(models, name, support, tail, top_k):
    student, teacher = (z.clamp(-50, 50) for z in models)
    how = {"divergence": name, "support": support, "tail": tail, "top_k": top_k}
    if name == "adaptive_kl":
        how["support"] = "full"
    loss, grad = run(student, teacher, **how)
    for row in range(len(student)):
        alone, grad_alone = run(student[row : row + 1], teacher[row : row + 1], **how)
        torch.testing.assert_close(alone, loss[row : row + 1], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad_alone, grad[row : row + 1], rtol=1e-5, atol=1e-7)


@fast
@given(logits(), NAMES, st.integers(1, 9))
def test_padding_of_any_width_takes_no_part(models, name, width):
    student, teacher = models
    padding = torch.full((len(student), width), 1e4)
    vocab = student.shape[1]
    loss, grad = run(student, teacher, divergence=name)
    padded_loss, padded_grad = run(
        torch.cat([student, padding], -1),
        torch.cat([teacher, padding], -1),
        divergence=name,
        valid_vocab_size=vocab,
    )
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_grad[:, :vocab], grad)
    assert padded_grad[:, vocab:].eq(0).all()


@fast
@given(logits(), st.sampled_from(["forward_kl", "reverse_kl", "jsd"]), st.integers(1, 12))
def test_a_bucketed_divergence_never_exceeds_the_whole_one(models, name, top_k):
    student, teacher = (z.clamp(-20, 20).double() for z in models)
    ids = teacher.topk(min(top_k, teacher.shape[1]), -1).indices
    known = teacher.log_softmax(-1).gather(1, ids)
    bucketed = top_k_distill_loss(student, ids, known, divergence=name)
    whole = distill_loss(student, teacher, divergence=name)
    assert (bucketed <= whole * (1 + 1e-6) + 1e-6).all()


@fast
@given(logits(), st.integers(1, 7))
def test_cross_entropy_is_finite_and_does_not_depend_on_the_chunk(models, tokens_per_chunk):
    student = models[0]
    labels = torch.arange(len(student)) % student.shape[1]
    eye = torch.eye(student.shape[1])
    loss = linear_cross_entropy(student, eye, labels, tokens_per_chunk=tokens_per_chunk)
    assert loss.isfinite().all()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, labels, reduction="none"))
