"""One loop over chunks of tokens for every loss of hidden states, and its two autograd functions.

* with weights per token the gradients are made in the forward pass and kept as [T, H] and [V, H]; the backward
  multiplies them by one number. 6 H V floating-point operations per token, and 2 H_teacher V for a teacher's logits.
* without, the loss per token is returned, and the backward makes each chunk's logits again, because the gradient of
  the head is sum_t upstream_t g_t h_t^T: it depends on every token's own upstream. It has no collective.

Shapes: T = tokens, C = tokens of one chunk, V = vocabulary entries held by this rank, H = hidden size, K = numbers per
token that the gradient needs.
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.losses.combine import Sum
from megatron_gkd.losses.comparison import InFlight, Joined, joined_rows
from megatron_gkd.losses.softmax import accumulation_dtype, row_slices
from megatron_gkd.platform.products import as_factor, matmul_into

HeadGradient = Callable[[Tensor, Tensor], Tensor | None]
"""(gradient of the head [V, H], factor) takes factor * gradient; returns what autograd gets instead of it."""


class Layer(NamedTuple):
    """An output layer with its input: logits = soft_cap tanh(z / soft_cap) of z = scale (hidden @ head^T + bias)."""

    hidden_TH: Tensor
    head_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def logit_chunks(
        self, num_columns: int, tokens_per_chunk: int, dtype: torch.dtype, num_alive: int = 1
    ) -> Iterator[Tensor]:
        """The leading columns of each chunk's logits; ``num_alive`` chunks live until a further one is asked for."""
        hidden_TH, head_VH = self.hidden_TH, self.head_VH[:num_columns]
        slices = list(row_slices(hidden_TH.shape[0], tokens_per_chunk))
        shape = min(hidden_TH.shape[0], tokens_per_chunk), num_columns
        buffers = [hidden_TH.new_empty(shape, dtype=dtype) for _ in slices[:num_alive]]
        for rows, buffer_CV in zip(slices, cycle(buffers), strict=False):
            logits_CV = buffer_CV[: rows.stop - rows.start]
            matmul_into(logits_CV, hidden_TH[rows], head_VH.t())
            yield self._finish_(logits_CV)

    def _finish_(self, logits_CV: Tensor) -> Tensor:
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V[: logits_CV.shape[1]])
        if self.scale != 1.0:
            logits_CV.mul_(self.scale)
        if self.soft_cap is not None:
            logits_CV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_CV


class Problem(NamedTuple):
    """A loss of logits = hidden @ head^T + bias."""

    comparison: Sum
    targets: Joined  # of the terms: a tensor with a row for each token, a teacher's ``Layer``, or a ``Joined`` of such
    num_columns: int  # leading rows of the head that are real
    tokens_per_chunk: int

    def chunks(self, student: Layer, num_alive: int = 1) -> Iterator[tuple[slice, Tensor, Joined]]:
        """(rows, student logits [C, V], targets of those rows), see ``Layer.logit_chunks``; they may be overwritten."""
        slices = row_slices(student.hidden_TH.shape[0], self.tokens_per_chunk)
        dtype = accumulation_dtype(student.hidden_TH.dtype)
        logits = student.logit_chunks(self.num_columns, self.tokens_per_chunk, dtype, num_alive)
        return zip(slices, logits, self._target_chunks(self.targets, dtype, num_alive), strict=True)

    def differentiated_chunks(self, student: Layer, weight_T: Tensor) -> Iterator["DifferentiatedChunk"]:
        """Chunks whose logits have become their gradient.

        With a group the first collective of a chunk is on its way while the logits of the next one are made, and its second, once
        a chunk has shown that there is one, while the next one gets its own first: two are alive.
        """
        group, waiting, num_rounds = self.comparison.group, None, 1
        for rows, logits_CV, targets in self.chunks(student, 1 if group is None else 2):
            if group is None:
                outcome = self.comparison.differentiate_(logits_CV, targets, weight_T[rows])
                yield DifferentiatedChunk(rows, logits_CV, targets, *outcome)
                continue
            if waiting is not None and waiting[3].num_started < num_rounds:
                waiting[3].advance()
            run = self.comparison.differentiate_rounds_(logits_CV, targets, weight_T[rows])
            started = rows, logits_CV, targets, InFlight(run, group)
            if waiting is not None:
                yield DifferentiatedChunk(*waiting[:3], *waiting[3].finish())
                num_rounds = waiting[3].num_started
            waiting = started
        if waiting is not None:
            yield DifferentiatedChunk(*waiting[:3], *waiting[3].finish())

    def _target_chunks(self, target: Any, dtype: torch.dtype, num_alive: int) -> Iterator[Any]:
        """The target of each chunk, in order."""
        if isinstance(target, Layer):
            return target.logit_chunks(self.num_columns, self.tokens_per_chunk, dtype, num_alive)
        if isinstance(target, Joined):
            parts = (self._target_chunks(part, dtype, num_alive) for part in target)
            return map(Joined, zip(*parts, strict=True))
        return (target[rows] for rows in row_slices(target.shape[0], self.tokens_per_chunk))


class DifferentiatedChunk(NamedTuple):
    """Rows of a loss: the gradient of the student's logits, the targets, the losses and their stats."""

    rows: slice
    grad_CV: Tensor
    targets: Joined
    loss_C: Tensor
    stats_CK: Tensor


class WeightedLoss(NamedTuple):
    """What a loss with weights per token returns.

    Attributes:
        total: Sum of weight * loss, with gradients.
        loss_T: [T] loss of each token.
        details_TP: [T, P] what ``Sum.detail_names`` says about each token.
    """

    total: Tensor
    loss_T: Tensor
    details_TP: Tensor


def solve_weighted(
    student: Layer, problem: Problem, token_weight_T: Tensor, take_head_gradient: HeadGradient | None = None
) -> WeightedLoss:
    """The weighted sum, whose gradients are made in the forward pass.

    Args:
        student: Its layer.
        problem: The loss.
        token_weight_T: [T] weight of each token.
        take_head_gradient: Called in the backward pass instead of handing the head's gradient to autograd.

    Raises:
        ValueError: If ``token_weight_T`` is not [T].
    """
    if token_weight_T.shape != student.hidden_TH.shape[:1]:
        raise ValueError(
            f"token_weight_T {tuple(token_weight_T.shape)} does not fit hidden states "
            f"{tuple(student.hidden_TH.shape)}; pass one weight per row"
        )
    weight_T = token_weight_T.detach().to(accumulation_dtype(student.hidden_TH.dtype))
    inputs = student.hidden_TH, student.head_VH, student.bias_V
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return WeightedLoss(*_WeightedSum.apply(*inputs, problem, weight_T, take_head_gradient))
    return WeightedLoss(*_evaluate(student, problem, weight_T))


def solve_per_token(student: Layer, problem: Problem) -> Tensor:
    """[T] loss, right for any upstream gradient."""
    return _PerToken.apply(student.hidden_TH, student.head_VH, student.bias_V, problem)


class _WeightedSum(torch.autograd.Function):
    """sum_t weight_t loss_t, whose gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx,
        student_TH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        problem: Problem,
        weight_T: Tensor,
        take_head_gradient: HeadGradient | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each chunk's logits become their own gradient, which two products turn into those of the inputs."""
        student = Layer(student_TH, head_VH, bias_V)
        gradients = _Gradients(student, problem.num_columns, ctx.needs_input_grad)
        loss_T, details_TP = _empty_outcome(problem, weight_T)
        for chunk in problem.differentiated_chunks(student, weight_T):
            loss_T[chunk.rows] = chunk.loss_C
            details_TP[chunk.rows] = problem.comparison.details(chunk.stats_CK, chunk.targets)
            gradients.add(chunk.rows, chunk.grad_CV)
        ctx.save_for_backward(*gradients.tensors)
        ctx.mark_non_differentiable(loss_T, details_TP)
        ctx.dtypes = [student_TH.dtype, head_VH.dtype, None if bias_V is None else bias_V.dtype]
        ctx.take_head_gradient = take_head_gradient
        return (loss_T * weight_T).sum(), loss_T, details_TP

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """One number for all tokens."""

        def scaled(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if grad is None else (grad.to(upstream.dtype) * upstream).to(dtype)

        (hidden_TH, head_VH, bias_V), (hidden_dtype, head_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        if head_VH is not None and ctx.take_head_gradient is not None:
            for_head_VH = ctx.take_head_gradient(head_VH, upstream.to(head_VH.dtype))
        else:
            for_head_VH = scaled(head_VH, head_dtype)
        return scaled(hidden_TH, hidden_dtype), for_head_VH, scaled(bias_V, bias_dtype), None, None, None


class _PerToken(torch.autograd.Function):
    """[T] loss; the backward makes the logits again."""

    @staticmethod
    def forward(ctx, student_TH: Tensor, head_VH: Tensor, bias_V: Tensor | None, problem: Problem) -> Tensor:
        """Keeps K numbers per token."""
        loss_T, stats_TK = _measure(Layer(student_TH, head_VH, bias_V), problem)
        ctx.save_for_backward(student_TH, head_VH, bias_V, stats_TK)
        ctx.problem = problem
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        """No collective: the saved numbers are those of the whole vocabulary."""
        *inputs, stats_TK = ctx.saved_tensors
        student = Layer(*inputs)
        gradients = _Gradients(student, ctx.problem.num_columns, ctx.needs_input_grad)
        for chunk, logits_CV, targets in ctx.problem.chunks(student):
            ctx.problem.comparison.write_gradient(
                logits_CV, targets, stats_TK[chunk], upstream_T[chunk], logits_CV
            )
            gradients.add(chunk, logits_CV)
        grads = zip(gradients.tensors, inputs, strict=True)
        return (*(None if grad is None else grad.to(x.dtype) for grad, x in grads), None)


class _Gradients:
    """Gradients of the hidden states, the head and its bias (float32 or 64), filled chunk by chunk.

    They are rounded to the inputs' dtype once, when the backward has multiplied them.
    """

    def __init__(self, student: Layer, num_columns: int, needs_input_grad: tuple[bool, ...]):
        self._hidden_TH, self._head_VH = student.hidden_TH, student.head_VH[:num_columns]
        self._num_columns = num_columns
        needs_hidden, needs_head, needs_bias = needs_input_grad[:3]
        self._of_hidden_TH = (
            student.hidden_TH.new_empty(
                student.hidden_TH.shape, dtype=accumulation_dtype(student.hidden_TH.dtype)
            )
            if needs_hidden
            else None
        )
        self._of_head_VH = _zero_sums(student.head_VH) if needs_head else None
        self._of_bias_V = _zero_sums(student.bias_V) if needs_bias and student.bias_V is not None else None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, head and bias; ``None`` where none is needed."""
        return self._of_hidden_TH, self._of_head_VH, self._of_bias_V

    def add(self, rows: slice, grad_CV: Tensor) -> None:
        """Apply the chain rule of logits = hidden @ head^T + bias."""
        if self._of_bias_V is not None:
            self._of_bias_V[: self._num_columns].add_(grad_CV.sum(0))
        factor_CV = as_factor(grad_CV, self._hidden_TH)
        if self._of_hidden_TH is not None:
            matmul_into(self._of_hidden_TH[rows], factor_CV, self._head_VH)
        if self._of_head_VH is not None:
            sum_VH = self._of_head_VH[: self._num_columns]
            matmul_into(sum_VH, factor_CV.t(), self._hidden_TH[rows], add=True)


def _zero_sums(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype))


def _measure(student: Layer, problem: Problem) -> tuple[Tensor, Tensor]:
    """(loss_T, stats_TK)."""
    parts = [
        problem.comparison.measure(logits_CV, targets) for _, logits_CV, targets in problem.chunks(student)
    ]
    if parts:
        return joined_rows(parts)
    empty_T = student.hidden_TH.new_empty(0, dtype=accumulation_dtype(student.hidden_TH.dtype))
    return empty_T, empty_T.unsqueeze(-1)


def _evaluate(student: Layer, problem: Problem, weight_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_WeightedSum``, without gradients."""
    loss_T, details_TP = _empty_outcome(problem, weight_T)
    for rows, logits_CV, targets in problem.chunks(student):
        loss_T[rows], stats_CK = problem.comparison.measure(logits_CV, targets)
        details_TP[rows] = problem.comparison.details(stats_CK, targets)
    return (loss_T * weight_T).sum(), loss_T, details_TP


def _empty_outcome(problem: Problem, weight_T: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight_T), weight_T.new_empty(len(weight_T), len(problem.comparison.detail_names))
