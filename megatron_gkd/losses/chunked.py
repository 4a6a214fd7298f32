"""One loop over chunks of tokens for every loss of hidden states, and its two autograd functions.

* with weights per token the gradients are made in the forward pass and kept as [T, H] and [V, H]; the backward
  multiplies them by one number. 6 H V floating-point operations per token, and 2 H_teacher V for a teacher's logits.
* without, the loss per token is returned, and the backward makes each chunk's logits again, because the gradient of
  the head is sum_t upstream_t g_t h_t^T: it depends on every token's own upstream. It has no collective.

Shapes: T = tokens, C = tokens of one chunk, V = vocabulary entries held by this rank, H = hidden size, K = numbers per
token that the gradient needs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.losses.comparison import Comparison
from megatron_gkd.losses.softmax import accumulation_dtype, row_pieces, row_slices


class Problem(NamedTuple):
    """A loss of logits = hidden @ head^T."""

    comparison: Comparison
    target_chunks: Callable[[], Iterator[Tensor]]  # teacher logits or labels of each chunk, in order
    num_columns: int  # leading rows of the head that are real
    tokens_per_chunk: int

    def chunks(self, student_TH: Tensor, head_VH: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, student logits [C, V], target of those rows); the logits may be overwritten."""
        slices = row_slices(student_TH.shape[0], self.tokens_per_chunk)
        dtype = accumulation_dtype(student_TH.dtype)
        logits = logit_chunks(student_TH, head_VH[: self.num_columns], self.tokens_per_chunk, dtype)
        return zip(slices, logits, self.target_chunks(), strict=True)


def solve(
    student_TH: Tensor, head_VH: Tensor, problem: Problem, token_weight_T: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_T, or (sum of weight * loss, loss_T without gradient) if weights are given.

    Raises:
        ValueError: If ``token_weight_T`` is not [T] or the chunk is empty.
    """
    if problem.tokens_per_chunk < 1:
        raise ValueError(
            f"tokens_per_chunk {problem.tokens_per_chunk} is not at least 1; 256 suits most shapes"
        )
    if token_weight_T is None:
        return _PerToken.apply(student_TH, head_VH, problem)
    if token_weight_T.shape != student_TH.shape[:1]:
        raise ValueError(
            f"token_weight_T {tuple(token_weight_T.shape)} does not fit hidden states {tuple(student_TH.shape)}; pass one "
            "weight per row"
        )
    weight_T = token_weight_T.detach().to(accumulation_dtype(student_TH.dtype))
    if torch.is_grad_enabled() and (student_TH.requires_grad or head_VH.requires_grad):
        return _WeightedSum.apply(student_TH, head_VH, problem, weight_T)
    loss_T, _ = _measure(student_TH, head_VH, problem)
    return (loss_T * weight_T).sum(), loss_T


class _WeightedSum(torch.autograd.Function):
    """sum_t weight_t loss_t, whose gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx, student_TH: Tensor, head_VH: Tensor, problem: Problem, weight_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each chunk's logits become their own gradient, which two products turn into those of the inputs."""
        gradients = _Gradients(student_TH, head_VH, problem.num_columns, ctx.needs_input_grad)
        loss_T = torch.empty_like(weight_T)
        for rows, logits_CV, target in problem.chunks(student_TH, head_VH):
            loss_T[rows] = problem.comparison.differentiate_(logits_CV, target, weight_T[rows])
            gradients.add(rows, logits_CV)
        ctx.save_for_backward(gradients.student_TH, gradients.head_VH)
        ctx.mark_non_differentiable(loss_T)
        ctx.head_dtype = head_VH.dtype
        return (loss_T * weight_T).sum(), loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """One number for all tokens."""
        grad_student_TH, grad_head_VH = ctx.saved_tensors
        if grad_student_TH is not None:
            grad_student_TH = grad_student_TH * upstream.to(grad_student_TH.dtype)
        if grad_head_VH is not None:
            grad_head_VH = (grad_head_VH * upstream).to(ctx.head_dtype)
        return grad_student_TH, grad_head_VH, None, None


class _PerToken(torch.autograd.Function):
    """[T] loss; the backward makes the logits again."""

    @staticmethod
    def forward(ctx, student_TH: Tensor, head_VH: Tensor, problem: Problem) -> Tensor:
        """Keeps K numbers per token."""
        loss_T, stats_TK = _measure(student_TH, head_VH, problem)
        ctx.save_for_backward(student_TH, head_VH, stats_TK)
        ctx.problem = problem
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        """No collective: the saved numbers are those of the whole vocabulary."""
        student_TH, head_VH, stats_TK = ctx.saved_tensors
        gradients = _Gradients(student_TH, head_VH, ctx.problem.num_columns, ctx.needs_input_grad)
        for chunk, logits_CV, target in ctx.problem.chunks(student_TH, head_VH):
            stats_CK, upstream_C = stats_TK[chunk], upstream_T[chunk]
            for rows in row_pieces(logits_CV):
                logits_CV[rows] = ctx.problem.comparison.gradient(
                    logits_CV[rows], target[rows], stats_CK[rows], upstream_C[rows]
                )
            gradients.add(chunk, logits_CV)
        grad_head_VH = gradients.head_VH
        return gradients.student_TH, None if grad_head_VH is None else grad_head_VH.to(head_VH.dtype), None


class _Gradients:
    """Gradients of the hidden states (in their dtype) and of the head (float32 or float64), filled chunk by chunk."""

    def __init__(
        self, student_TH: Tensor, head_VH: Tensor, num_columns: int, needs_input_grad: tuple[bool, ...]
    ):
        self._inputs = student_TH, head_VH[:num_columns]
        self._num_columns = num_columns
        needs_student, needs_head = needs_input_grad[:2]
        self.student_TH = (
            torch.empty_like(student_TH, memory_format=torch.contiguous_format) if needs_student else None
        )
        self.head_VH = (
            torch.zeros_like(head_VH, dtype=accumulation_dtype(head_VH.dtype)) if needs_head else None
        )

    def add(self, rows: slice, grad_CV: Tensor) -> None:
        """Apply the chain rule of logits = hidden @ head^T, with both products in the dtype of the inputs."""
        student_TH, head_VH = self._inputs
        grad_CV = grad_CV.to(student_TH.dtype)
        if self.student_TH is not None:
            torch.mm(grad_CV, head_VH, out=self.student_TH[rows])
        if self.head_VH is None:
            return
        sum_VH = self.head_VH[: self._num_columns]
        if sum_VH.dtype == grad_CV.dtype:
            sum_VH.addmm_(grad_CV.t(), student_TH[rows])
        else:
            sum_VH.add_(grad_CV.t() @ student_TH[rows])


def _measure(student_TH: Tensor, head_VH: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """(loss_T, stats_TK)."""
    parts = [
        problem.comparison.measure(logits_CV, target)
        for _, logits_CV, target in problem.chunks(student_TH, head_VH)
    ]
    if not parts:
        empty = student_TH.new_empty(0, dtype=accumulation_dtype(student_TH.dtype))
        return empty, empty.unsqueeze(-1)
    loss_T, stats_TK = (torch.cat(part) for part in zip(*parts, strict=True))
    return loss_T, stats_TK


def logit_chunks(
    hidden_TH: Tensor, head_VH: Tensor, tokens_per_chunk: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield hidden @ head^T of each chunk in ``dtype``, all in one buffer: a chunk lives until the next one is asked for."""
    num_rows = min(hidden_TH.shape[0], tokens_per_chunk)
    product_CV = hidden_TH.new_empty(num_rows, head_VH.shape[0])
    logits_CV = product_CV if dtype == hidden_TH.dtype else torch.empty_like(product_CV, dtype=dtype)
    for rows in row_slices(hidden_TH.shape[0], tokens_per_chunk):
        chunk = slice(0, rows.stop - rows.start)
        torch.mm(hidden_TH[rows], head_VH.t(), out=product_CV[chunk])
        if logits_CV is not product_CV:
            logits_CV[chunk].copy_(product_CV[chunk])
        yield logits_CV[chunk]


def label_chunks(labels_T: Tensor, tokens_per_chunk: int) -> Iterator[Tensor]:
    """The labels of each chunk."""
    return (labels_T[rows] for rows in row_slices(labels_T.shape[0], tokens_per_chunk))
