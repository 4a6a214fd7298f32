"""One loop over chunks of tokens for losses of hidden states or of given logits, and its two autograd functions.

* ``_WeightedSum``: with weights per token the gradients are made in the forward pass and kept as [T, H] and [V, H]; the
  backward multiplies them by one number. 6 H V floating-point operations per token, and 2 H_teacher V for a teacher's
  logits.
* ``_PerToken``: the loss per token is returned, and the backward makes each chunk's logits again, because the gradient of
  the head is sum_t upstream_t g_t h_t^T: it depends on every token's own upstream. It has no collective.

Given logits are a head whose chunks are slices.

Shapes: T = tokens, C = tokens of one chunk, V = vocabulary entries held by this rank, H = hidden size.
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.losses.token_loss import TokenLoss, joined_rows, rebuilt, rows_of
from megatron_gkd.losses.vocab_parallel import accumulation_dtype, row_slices
from megatron_gkd.parallel.gathering import InFlight
from megatron_gkd.platform.products import as_factor, matmul_into

HeadGradient = Callable[[Tensor, Tensor], Tensor | None]
"""(gradient of the head [V, H], factor) adds factor * gradient somewhere; returns what autograd gets instead of it."""


class LMHead(NamedTuple):
    """An LM head with its input: logits = soft_cap tanh(z / soft_cap) of z = scale (hidden @ weight^T + bias).

    Attributes:
        hidden_TH: [T, H] input.
        weight_VH: [V, H] this rank's rows of the weight.
        bias_V: [V] bias, or ``None``.
        scale: Multiplies the logits; a student's must be 1.
        soft_cap: Bounds them, or ``None``; a student's must be ``None``.
    """

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def chunks(self, num_columns: int, slices: list[slice], num_alive: int = 1) -> Iterator[Tensor]:
        """The leading columns of each slice's logits; ``num_alive`` chunks live until a further one is asked for."""
        dtype = accumulation_dtype(self.hidden_TH.dtype)
        shape = slices[0].stop - slices[0].start, num_columns  # no slice is longer than the first
        buffers = [self.hidden_TH.new_empty(shape, dtype=dtype) for _ in slices[:num_alive]]
        for rows, buffer_CV in zip(slices, cycle(buffers), strict=False):
            logits_CV = buffer_CV[: rows.stop - rows.start]
            matmul_into(logits_CV, self.hidden_TH[rows], self.weight_VH[:num_columns].t())
            is_product = self.bias_V is None and self.scale == 1.0 and self.soft_cap is None
            yield logits_CV if is_product else self._finished_(logits_CV)

    def _finished_(self, logits_CV: Tensor) -> Tensor:
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V[: logits_CV.shape[1]])
        if self.scale != 1.0:
            logits_CV.mul_(self.scale)
        if self.soft_cap is not None:
            logits_CV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_CV


class Logits(NamedTuple):
    """Given logits [T, V], without a head. All tokens are one chunk: every collective carries all of them."""

    logits_TV: Tensor
    weight_VH: None = None
    bias_V: None = None

    def chunks(self, num_columns: int, slices: list[slice], num_alive: int = 1) -> Iterator[Tensor]:
        """The leading columns as one chunk."""
        yield self.logits_TV.detach()[:, :num_columns]


Source = LMHead | Logits
"""The first three fields of both are the tensors that may need a gradient."""


class WeightedLoss(NamedTuple):
    """Result of a loss with weights per token.

    Attributes:
        total: Sum of weight * loss, with gradients.
        loss_T: [T] loss of each token, without gradient.
        metrics: Name -> [T] metric of each token, see ``token_loss.METRIC_UNITS``.
    """

    total: Tensor
    loss_T: Tensor
    metrics: dict[str, Tensor]


class ChunkedLoss(NamedTuple):
    """A loss of a student's logits that are made chunk by chunk.

    Attributes:
        loss: Loss of each token.
        target: A tensor with a row for each token, a teacher's ``LMHead``, ``None``, or a tuple of such.
        num_columns: Leading rows of the head that are real vocabulary entries.
        tokens_per_chunk: Tokens whose logits exist at one time.
        name: Metric that the loss itself is, or ``None``.
    """

    loss: TokenLoss
    target: Any
    num_columns: int
    tokens_per_chunk: int
    name: str | None = None

    def weighted(
        self, student: Source, weight_T: Tensor | None, add_head_gradient: HeadGradient | None = None
    ) -> WeightedLoss:
        """The weighted sum, whose gradients are made in the forward pass.

        A token of weight 0 adds 0 and has gradient 0, whatever its row holds.

        Args:
            student: Its head, or its logits, which are overwritten where they need a gradient.
            weight_T: [T] weight of each token; ``None``: 1.
            add_head_gradient: Called in the backward pass in place of handing the head's gradient to autograd.
        """
        inputs = student[:3]
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            total, loss_T, *metrics = _WeightedSum.apply(*inputs, self, weight_T, add_head_gradient)
        else:
            loss_T, saved = self._measure(student)
            total = _weighted_sum(loss_T, weight_T, None if weight_T is None else _ignored(weight_T))
            metrics = self.loss.metrics(saved)
        named = dict(zip(self.loss.metric_names, metrics, strict=True))
        return WeightedLoss(total, loss_T, named if self.name is None else {self.name: loss_T, **named})

    def per_token(self, student: Source) -> Tensor:
        """[T] loss, right for any upstream gradient; given logits are not modified."""
        return _PerToken.apply(*student[:3], self)

    def _chunks(self, student: Source, num_alive: int = 1) -> Iterator[tuple[slice, Tensor, Any]]:
        """(rows, student logits [C, V], target of those rows); chunks of a head may be overwritten."""
        num_tokens = student[0].shape[0]
        tokens_per_chunk = max(num_tokens, 1) if isinstance(student, Logits) else self.tokens_per_chunk
        slices = list(row_slices(num_tokens, tokens_per_chunk)) or [slice(0, 0)]
        logits = student.chunks(self.num_columns, slices, num_alive)
        targets = self._target_chunks(self.target, slices, num_alive)
        return zip(slices, logits, targets, strict=True)

    def _target_chunks(self, target: Any, slices: list[slice], num_alive: int) -> Iterator[Any]:
        if isinstance(target, LMHead):
            return target.chunks(self.num_columns, slices, num_alive)
        if isinstance(target, tuple):
            parts = (self._target_chunks(part, slices, num_alive) for part in target)
            return (rebuilt(target, part) for part in zip(*parts, strict=True))
        return (None if target is None else target[rows] for rows in slices)

    def _differentiated_chunks(self, student: Source, weight_T: Tensor) -> Iterator["_Differentiated"]:
        """Chunks whose logits have become their gradient.

        Overlap: the first all-gather of chunk i is in flight while the logits of chunk i + 1 are computed, and its second
        while chunk i + 1 starts its own first; two chunks are alive. Whether there is a second is known after chunk 0.
        """
        group, waiting, num_rounds = self.loss.group, None, 1
        for rows, logits_CV, target in self._chunks(student, 1 if group is None else 2):
            if group is None:
                outcome = self.loss.differentiate_(logits_CV, target, weight_T[rows])
                yield _Differentiated(rows, logits_CV, *outcome)
                continue
            if waiting is not None and waiting[2].num_started < num_rounds:
                waiting[2].advance()
            run = self.loss.differentiate_rounds_(logits_CV, target, weight_T[rows])
            started = rows, logits_CV, InFlight(run, group)
            if waiting is not None:
                yield _Differentiated(*waiting[:2], *waiting[2].finish())
                num_rounds = waiting[2].num_started
            waiting = started
        if waiting is not None:
            yield _Differentiated(*waiting[:2], *waiting[2].finish())

    def _measure(self, student: Source) -> tuple[Tensor, Any]:
        """(loss_T, saved)."""
        parts = [self.loss.measure(logits_CV, target) for _, logits_CV, target in self._chunks(student)]
        return joined_rows(parts)


class _Differentiated(NamedTuple):
    """Rows of a loss: the gradient of the student's logits, the losses, and what metrics are computed from."""

    rows: slice
    grad_CV: Tensor
    loss_C: Tensor
    saved: Any


class _LogitGradients:
    """The gradient of given logits, in the storage it was written to."""

    def __init__(self, student: Logits, num_columns: int, needs_input_grad: tuple[bool, ...]):
        self._logits_TV, self._num_columns = student.logits_TV, num_columns
        self.tensors: tuple[Tensor | None, ...] = None, None, None

    def place(self, rows: slice, logits_CV: Tensor) -> Tensor:
        """Where a backward pass writes the gradient of these logits."""
        grad_TV = torch.empty_like(self._logits_TV, memory_format=torch.contiguous_format)
        self.tensors = grad_TV, None, None
        return grad_TV[:, : self._num_columns]

    def add(self, rows: slice, grad_CV: Tensor, is_ignored_C: Tensor | None) -> None:
        """Take the gradient of a chunk of logits; ignored rows have gradient 0 whatever they hold."""
        if self.tensors[0] is None:  # made in the storage of the logits
            self.tensors = self._logits_TV.detach(), None, None
        grad_TV = self.tensors[0]
        assert grad_TV is not None
        grad_TV[:, self._num_columns :] = 0
        if is_ignored_C is not None:
            grad_TV.masked_fill_(is_ignored_C.unsqueeze(-1), 0.0)


class _HeadGradients:
    """Gradients of the hidden states, the head and its bias in float32 (or 64), rounded to the inputs' dtype at the end."""

    def __init__(self, student: LMHead, num_columns: int, needs_input_grad: tuple[bool, ...]):
        self._hidden_TH, self._weight_VH = student.hidden_TH, student.weight_VH[:num_columns]
        self._num_columns = num_columns
        dtype = accumulation_dtype(student.hidden_TH.dtype)
        makers = (
            torch.empty_like,
            torch.zeros_like,
            torch.zeros_like,
        )  # every row of the first is written once
        self.tensors = tuple(
            make(x, dtype=dtype) if x is not None and is_needed else None
            for x, is_needed, make in zip(student[:3], needs_input_grad, makers, strict=False)
        )

    def place(self, rows: slice, logits_CV: Tensor) -> Tensor:
        return logits_CV

    def add(self, rows: slice, grad_CV: Tensor, is_ignored_C: Tensor | None) -> None:
        hidden_CH = self._hidden_TH[rows]
        if is_ignored_C is not None:  # 0 * NaN is NaN: both factors of the head's gradient are cleared
            grad_CV.masked_fill_(is_ignored_C.unsqueeze(-1), 0.0)
            hidden_CH = hidden_CH.masked_fill(is_ignored_C.unsqueeze(-1), 0.0)
        of_hidden_TH, of_weight_VH, of_bias_V = self.tensors
        if of_bias_V is not None:
            of_bias_V[: self._num_columns].add_(grad_CV.sum(0))
        factor_CV = as_factor(grad_CV, self._hidden_TH)
        if of_hidden_TH is not None:
            matmul_into(of_hidden_TH[rows], factor_CV, self._weight_VH)
        if of_weight_VH is not None:
            matmul_into(of_weight_VH[: self._num_columns], factor_CV.t(), hidden_CH, add=True)


_KINDS: dict[type, Callable[..., _HeadGradients | _LogitGradients]] = {
    LMHead: _HeadGradients,
    Logits: _LogitGradients,
}


class _WeightedSum(torch.autograd.Function):
    """sum_t weight_t loss_t, whose gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx,
        first: Tensor,
        weight_VH: Tensor | None,
        bias_V: Tensor | None,
        chunked: ChunkedLoss,
        weight_T: Tensor | None,
        add_head_gradient: HeadGradient | None,
    ) -> tuple[Tensor, ...]:
        """Each chunk's logits become their own gradient; those of a head become the inputs' by two products."""
        student = Logits(first) if weight_VH is None else LMHead(first, weight_VH, bias_V)
        gradients = _KINDS[type(student)](student, chunked.num_columns, ctx.needs_input_grad)
        dtype = accumulation_dtype(first.dtype)
        upstream_T = first.new_ones(first.shape[0], dtype=dtype) if weight_T is None else weight_T
        is_ignored_T = None if weight_T is None else _ignored(weight_T)
        loss_T, *metrics = (torch.empty_like(upstream_T) for _ in ("loss", *chunked.loss.metric_names))
        for chunk in chunked._differentiated_chunks(student, upstream_T):
            is_ignored_C = None if is_ignored_T is None else is_ignored_T[chunk.rows]
            gradients.add(chunk.rows, chunk.grad_CV, is_ignored_C)
            loss_T[chunk.rows] = chunk.loss_C
            for metric_T, metric_C in zip(metrics, chunked.loss.metrics(chunk.saved), strict=True):
                metric_T[chunk.rows] = metric_C
        ctx.save_for_backward(*gradients.tensors)
        ctx.mark_non_differentiable(loss_T, *metrics)
        ctx.is_logits = weight_VH is None
        ctx.dtypes = [None if x is None else x.dtype for x in (first, weight_VH, bias_V)]
        ctx.add_head_gradient = add_head_gradient
        return _weighted_sum(loss_T, weight_T, is_ignored_T), loss_T, *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """One number for all tokens; on a CPU without a pass over the logits' gradient where it is 1."""
        first, weight_VH, bias_V = ctx.saved_tensors
        if ctx.is_logits:
            if first.device.type != "cpu" or upstream != 1:
                first.mul_(upstream)
            return first, *[None] * 5
        if weight_VH is not None and ctx.add_head_gradient is not None:
            of_weight_VH = ctx.add_head_gradient(weight_VH, upstream.to(weight_VH.dtype))
        else:
            of_weight_VH = _scaled(weight_VH, upstream, ctx.dtypes[1])
        grads = (
            _scaled(first, upstream, ctx.dtypes[0]),
            of_weight_VH,
            _scaled(bias_V, upstream, ctx.dtypes[2]),
        )
        return *grads, *[None] * 3


class _PerToken(torch.autograd.Function):
    """[T] loss; the backward makes the logits of a head again."""

    @staticmethod
    def forward(
        ctx, first: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None, chunked: ChunkedLoss
    ) -> Tensor:
        """Keeps some numbers per token."""
        student = Logits(first) if weight_VH is None else LMHead(first, weight_VH, bias_V)
        loss_T, ctx.saved = chunked._measure(student)
        ctx.save_for_backward(first, weight_VH, bias_V)
        ctx.chunked = chunked
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        """No collective: the saved numbers are those of the whole vocabulary."""
        inputs, chunked = ctx.saved_tensors, ctx.chunked
        first, weight_VH, bias_V = inputs
        student = Logits(first) if weight_VH is None else LMHead(first, weight_VH, bias_V)
        gradients = _KINDS[type(student)](student, chunked.num_columns, ctx.needs_input_grad)
        is_ignored_T = _ignored(upstream_T)
        for rows, logits_CV, target in chunked._chunks(student):
            grad_CV = gradients.place(rows, logits_CV)
            saved = rows_of(ctx.saved, rows)
            chunked.loss.write_gradient(logits_CV, target, saved, upstream_T[rows], grad_CV)
            gradients.add(rows, grad_CV, None if is_ignored_T is None else is_ignored_T[rows])
        grads = zip(gradients.tensors, inputs, strict=True)
        return *(None if grad is None else grad.to(x.dtype) for grad, x in grads), None


def _ignored(weight_T: Tensor) -> Tensor | None:
    """[T] which tokens have weight 0; ``None`` where a CPU sees that none has. A GPU is not waited for."""
    is_ignored_T = weight_T == 0
    return None if weight_T.device.type == "cpu" and not is_ignored_T.any() else is_ignored_T


def _weighted_sum(loss_T: Tensor, weight_T: Tensor | None, is_ignored_T: Tensor | None) -> Tensor:
    if weight_T is None:
        return loss_T.sum()
    weighted_T = loss_T * weight_T
    return (weighted_T if is_ignored_T is None else weighted_T.masked_fill_(is_ignored_T, 0.0)).sum()


def _scaled(grad: Tensor | None, upstream: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if grad is None else (grad.to(upstream.dtype) * upstream).to(dtype)
