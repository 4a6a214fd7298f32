"""Triton kernels of the passes over logits; importing this module imports triton.

A program of a statistics kernel goes over one row in tiles with running maxima: whatever was summed so far is rescaled
when a tile raises a maximum. A program of a gradient kernel has one tile of one row. Each entry of either model is read
once by each kernel, whatever its format, and all arithmetic is float32.

Exactly 0 for equal models holds because both models go through the same operations, each rounded by itself: the
launches switch the fusion of multiplications and additions off, and where it is wanted ``tl.fma`` says so.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token.
"""

import triton
import triton.language as tl

from megatron_gkd.losses import divergences

_FAR = tl.constexpr(divergences.FAR)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def kl_sums(
    x_ptr,
    y_ptr,
    out_ptr,
    num_columns,
    x_stride,
    y_stride,
    inverse_tau_x,
    inverse_tau_y,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Max and sum of exp of x, the same of y, and the KL of their softmaxes in each direction: [T, 4 + directions]."""
    row = tl.program_id(0).to(tl.int64)
    max_x = tl.full((), _LOWEST, tl.float32)
    max_y = tl.full((), _LOWEST, tl.float32)
    sum_x = tl.zeros((TILE,), tl.float32)
    sum_y = tl.zeros((TILE,), tl.float32)
    difference = tl.zeros((TILE,), tl.float32)
    forward = tl.zeros((TILE,), tl.float32)
    forward_cross = tl.zeros((TILE,), tl.float32)
    reverse = tl.zeros((TILE,), tl.float32)
    reverse_cross = tl.zeros((TILE,), tl.float32)
    for start in range(0, num_columns, TILE):
        columns = start + tl.arange(0, TILE)
        x = _read(x_ptr + row * x_stride, columns, num_columns)
        y = _read(y_ptr + row * y_stride, columns, num_columns)
        new_max_x = tl.maximum(max_x, tl.max(x, 0))
        new_max_y = tl.maximum(max_y, tl.max(y, 0))
        far_x = (max_x - new_max_x) * inverse_tau_x
        far_y = (max_y - new_max_y) * inverse_tau_y
        scale_x = tl.exp(far_x)
        scale_y = tl.exp(far_y)
        x = (x - new_max_x) * inverse_tau_x
        y = (y - new_max_y) * inverse_tau_y
        q = tl.exp(x)
        p = tl.exp(y)
        # sums so far, moved to the new maxima: every log ratio y - x grows by far_y - far_x
        if FORWARD:
            forward, forward_cross = _moved(
                forward, forward_cross, sum_y, difference, far_y - far_x, scale_y, scale_x
            )
            small, cross = _kl_entries(p, q, y - x)
            forward += small
            forward_cross += cross
        if REVERSE:
            reverse, reverse_cross = _moved(
                reverse, reverse_cross, sum_x, -difference, far_x - far_y, scale_x, scale_y
            )
            small, cross = _kl_entries(q, p, x - y)
            reverse += small
            reverse_cross += cross
        difference = difference * scale_x + sum_y * _gap(scale_y, scale_x, far_y - far_x) + _gap(p, q, y - x)
        sum_x = _rescaled(sum_x, scale_x) + q
        sum_y = _rescaled(sum_y, scale_y) + p
        max_x = new_max_x
        max_y = new_max_y
    out_ptr += row * (4 + FORWARD + REVERSE)
    tl.store(out_ptr, max_x)
    tl.store(out_ptr + 1, tl.sum(sum_x, 0))
    tl.store(out_ptr + 2, max_y)
    tl.store(out_ptr + 3, tl.sum(sum_y, 0))
    if FORWARD:
        _store_kl(out_ptr + 4, sum_y, difference, forward, forward_cross)
    if REVERSE:
        _store_kl(out_ptr + (4 + FORWARD), sum_x, -difference, reverse, reverse_cross)


@triton.jit
def _store_kl(out_ptr, sum_a, difference, small, cross):
    """KL(a || b) = (B - D) / S + log(1 + D / S), in float64, for its terms may be large beside it.

    With d = log(a / b): S = sum_v a, D = sum_v (b - a) and B = sum_v a (d + e^-d - 1) are ``sum_a``, ``difference`` and
    ``small``: D and B are sums of differences, so that similar models keep their digits. Where D > S, the sum A = B - D of
    a d, ``cross``, keeps more.
    """
    total = tl.sum(sum_a, 0).to(tl.float64)
    gap = tl.sum(difference, 0).to(tl.float64)
    linear = tl.where(gap <= total, tl.sum(small, 0).to(tl.float64) - gap, tl.sum(cross, 0).to(tl.float64))
    tl.store(out_ptr, (linear / total + tl.log(1.0 + gap / total)).to(tl.float32))


@triton.jit
def _moved(small, cross, sum_a, difference, shift, scale_a, scale_b):
    """The cross sums of KL(a || b) after a grew by ``scale_a``, b by ``scale_b`` and so the log ratios by ``shift``."""
    small_shift, cross_shift = _kl_entries(scale_a, scale_b, shift)
    small = small * scale_a + _times(sum_a, small_shift) + _times(difference, _gap(scale_a, scale_b, shift))
    return small, cross * scale_a + _times(sum_a, cross_shift)


@triton.jit
def _gap(a, b, d):
    """B - a with d = log(a / b)."""
    return tl.where(tl.abs(d) <= 0.5, a * _expm1(-d), b - a)


@triton.jit
def _kl_entries(a, b, d):
    """(a (d + e^-d - 1), a d) with d = log(a / b)."""
    cross = _times(a, d)
    return tl.where(tl.abs(d) <= 0.5, a * _expm1_minus(-d), cross + (b - a)), cross


@triton.jit
def normalizers(
    x_ptr, y_ptr, out_ptr, num_columns, x_stride, y_stride, inverse_tau_x, inverse_tau_y, TILE: tl.constexpr
):
    """Max and sum of exp of x, the same of y, and y at the max of x (the largest, if several x share it): [T, 5]."""
    row = tl.program_id(0).to(tl.int64)
    max_x = tl.full((), _LOWEST, tl.float32)
    max_y = tl.full((), _LOWEST, tl.float32)
    at_max = tl.full((), float("-inf"), tl.float32)
    sum_x = tl.zeros((TILE,), tl.float32)
    sum_y = tl.zeros((TILE,), tl.float32)
    for start in range(0, num_columns, TILE):
        columns = start + tl.arange(0, TILE)
        x = _read(x_ptr + row * x_stride, columns, num_columns)
        y = _read(y_ptr + row * y_stride, columns, num_columns)
        new_max_x = tl.maximum(max_x, tl.max(x, 0))
        new_max_y = tl.maximum(max_y, tl.max(y, 0))
        tile_at_max = tl.max(tl.where(x == new_max_x, y, float("-inf")), 0)
        at_max = tl.where(max_x == new_max_x, tl.maximum(at_max, tile_at_max), tile_at_max)
        scale_x = tl.exp((max_x - new_max_x) * inverse_tau_x)
        scale_y = tl.exp((max_y - new_max_y) * inverse_tau_y)
        sum_x = _rescaled(sum_x, scale_x) + tl.exp((x - new_max_x) * inverse_tau_x)
        sum_y = _rescaled(sum_y, scale_y) + tl.exp((y - new_max_y) * inverse_tau_y)
        max_x = new_max_x
        max_y = new_max_y
    out_ptr += row * 5
    tl.store(out_ptr, max_x)
    tl.store(out_ptr + 1, tl.sum(sum_x, 0))
    tl.store(out_ptr + 2, max_y)
    tl.store(out_ptr + 3, tl.sum(sum_y, 0))
    tl.store(out_ptr + 4, at_max)


@triton.jit
def _rescaled(total, scale):
    """Sums of exp relative to a max that has grown."""
    return total * scale


@triton.jit
def kl_gradient(
    x_ptr,
    y_ptr,
    out_ptr,
    stats_ptr,
    upstream_ptr,
    num_columns,
    x_stride,
    y_stride,
    out_stride,
    inverse_tau_x,
    inverse_tau_y,
    forward_weight,
    reverse_weight,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Upstream (forward (q - p) + reverse q (log q - log p - KL(q || p))) / temperature of one tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    stats_ptr += row * 5
    max_x = tl.load(stats_ptr)
    sum_x = tl.load(stats_ptr + 1)
    max_y = tl.load(stats_ptr + 2)
    sum_y = tl.load(stats_ptr + 3)
    upstream = tl.load(upstream_ptr + row) * inverse_tau_x
    # NaN if one of them is no positive number: _times drops NaN
    upstream += 0.0 * (tl.log(sum_x) + tl.log(sum_y))
    x = (_read(x_ptr + row * x_stride, columns, num_columns) - max_x) * inverse_tau_x
    y = (_read(y_ptr + row * y_stride, columns, num_columns) - max_y) * inverse_tau_y
    q = tl.exp(x)
    grad = tl.zeros((TILE,), tl.float32)
    if REVERSE:
        grad += _times(q, x - y + tl.load(stats_ptr + 4)) * (reverse_weight * upstream / sum_x)
    if FORWARD:
        scale = forward_weight * upstream
        grad += q * (scale / sum_x) - tl.exp(y) * (scale / sum_y)
    _write(out_ptr + row * out_stride, columns, num_columns, grad)


@triton.jit
def entry_sums(
    x_ptr,
    y_ptr,
    norms_ptr,
    out_ptr,
    num_columns,
    x_stride,
    y_stride,
    inverse_tau_x,
    inverse_tau_y,
    weight,
    FORMULA: tl.constexpr,
    TILE: tl.constexpr,
):
    """[T, 2] sums of a divergence's values and of its r."""
    row = tl.program_id(0).to(tl.int64)
    value_sum = tl.zeros((TILE,), tl.float32)
    r_sum = tl.zeros((TILE,), tl.float32)
    for start in range(0, num_columns, TILE):
        columns = start + tl.arange(0, TILE)
        x = _read(x_ptr + row * x_stride, columns, num_columns)
        y = _read(y_ptr + row * y_stride, columns, num_columns)
        value, r, _ = _entries(x, y, norms_ptr + row * 5, inverse_tau_x, inverse_tau_y, weight, FORMULA)
        value_sum += value
        r_sum += r
    tl.store(out_ptr + row * 2, tl.sum(value_sum, 0))
    tl.store(out_ptr + row * 2 + 1, tl.sum(r_sum, 0))


@triton.jit
def entry_gradient(
    x_ptr,
    y_ptr,
    out_ptr,
    stats_ptr,
    upstream_ptr,
    num_columns,
    x_stride,
    y_stride,
    out_stride,
    inverse_tau_x,
    inverse_tau_y,
    weight,
    FORMULA: tl.constexpr,
    TILE: tl.constexpr,
):
    """Upstream (r - q E) / temperature of one tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    stats_ptr += row * 6
    upstream = tl.load(upstream_ptr + row) * inverse_tau_x
    x = _read(x_ptr + row * x_stride, columns, num_columns)
    y = _read(y_ptr + row * y_stride, columns, num_columns)
    _, r, q = _entries(x, y, stats_ptr, inverse_tau_x, inverse_tau_y, weight, FORMULA)
    _write(out_ptr + row * out_stride, columns, num_columns, (r - q * tl.load(stats_ptr + 5)) * upstream)


@triton.jit
def _entries(x, y, norms_ptr, inverse_tau_x, inverse_tau_y, weight, FORMULA: tl.constexpr):
    """(value, r, q) of every entry, as ``losses.divergences`` has them; all 0 beyond the last column, where p = q = 0."""
    log_q = (x - tl.load(norms_ptr)) * inverse_tau_x - tl.log(tl.load(norms_ptr + 1))
    log_p = (y - tl.load(norms_ptr + 2)) * inverse_tau_y - tl.log(tl.load(norms_ptr + 3))
    top_ratio = tl.load(norms_ptr + 4)
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    far = top_ratio < _FAR
    if FORMULA == "tvd":
        value = 0.5 * tl.abs(q - p)
        r = 0.5 * (q * (_sign(log_q, log_p) - _sign(1.0, top_ratio)))
    elif FORMULA == "jsd":
        log_p_over_m, log_q_over_m = _log_ratios_to_mixture(log_p, log_q, weight, far)
        r = _times((1.0 - weight) * q, log_q_over_m)
        # a sum of two products instead makes LLVM crash in Triton 3.9 for sm_90
        value = tl.fma(weight * p, tl.where(p == 0.0, 0.0, log_p_over_m), r)
    elif FORMULA == "skew_forward_kl":
        log_p_over_m, _ = _log_ratios_to_mixture(log_p, log_q, weight, far)
        ratio = tl.where(far, tl.exp(log_p_over_m) / weight, _expm1(log_p_over_m))
        r = (weight - 1.0) * _times(q, ratio)
        value = _kl_terms(log_p, log_q, p, q, log_p_over_m, 1.0 - weight)
    else:
        tl.static_assert(FORMULA == "skew_reverse_kl")
        _, log_q_over_m = _log_ratios_to_mixture(log_p, log_q, 1.0 - weight, far)
        r = _times(q, log_q_over_m - tl.where(far, 1.0, weight) * _expm1(log_q_over_m))
        value = _kl_terms(log_q, log_p, q, p, log_q_over_m, 1.0 - weight)
    return value, r, q


@triton.jit
def _sign(a, b):
    """Sign of a - b; 0 where both are -inf."""
    return tl.where(a > b, 1.0, 0.0) - tl.where(a < b, 1.0, 0.0)


@triton.jit
def _kl_terms(log_a, log_b, a, b, log_a_over_m, share_b):
    """Entries a log(a / m) - a + m; where a is near b added before a multiplies them, see ``losses.divergences``."""
    log_b_over_a = log_b - log_a
    near = a * (log_a_over_m + share_b * _expm1(log_b_over_a))
    far = _times(a, log_a_over_m) + share_b * (b - a)
    return tl.where(tl.abs(log_b_over_a) < 1.0, near, far)


@triton.jit
def _log_ratios_to_mixture(log_p, log_q, weight_p, far):
    """(log p/m, log q/m) for m = weight_p p + (1 - weight_p) q, without their limits in far rows, see ``losses.divergences``."""
    weight_q = 1.0 - weight_p
    d = log_p - log_q + tl.where(far, tl.log(weight_p / weight_q), 0.0)
    distance = -tl.abs(d)
    near = tl.where(d < 0.0, weight_p, weight_q) * _expm1(distance)
    log_m_over_max = _log1p(tl.where(far, tl.exp(distance), near))
    return tl.minimum(d, 0.0) - log_m_over_max, -log_m_over_max - tl.maximum(d, 0.0)


@triton.jit
def _expm1(u):
    """e^u - 1; Taylor's series where the difference would cancel, |u| <= 1/2, to a relative 1e-8."""
    return tl.where(tl.abs(u) <= 0.5, u + _expm1_minus(u), tl.exp(u) - 1.0)


@triton.jit
def _expm1_minus(u):
    """e^u - 1 - u for |u| <= 1/2, by Taylor's series."""
    series = tl.fma(u, 1.0 / 40320, 1.0 / 5040)
    series = tl.fma(u, series, 1.0 / 720)
    series = tl.fma(u, series, 1.0 / 120)
    series = tl.fma(u, series, 1.0 / 24)
    series = tl.fma(u, series, 1.0 / 6)
    series = tl.fma(u, series, 0.5)
    return u * u * series


@triton.jit
def _log1p(u):
    """log(1 + u) for u > -1; 2 atanh(u / (2 + u)) by its series where 1 + u would round, |u| <= 1/2, to 2e-9."""
    s = u / (2.0 + u)
    square = s * s
    series = tl.fma(square, 1.0 / 17, 1.0 / 15)
    series = tl.fma(square, series, 1.0 / 13)
    series = tl.fma(square, series, 1.0 / 11)
    series = tl.fma(square, series, 1.0 / 9)
    series = tl.fma(square, series, 1.0 / 7)
    series = tl.fma(square, series, 0.2)
    series = tl.fma(square, series, 1.0 / 3)
    series = tl.fma(s * square, series, s)
    return tl.where(tl.abs(u) <= 0.5, 2.0 * series, tl.log(1.0 + u))


@triton.jit
def _times(probability, factor):
    """Product with 0 log 0 = 0; as ``vocab_parallel.times_`` it drops every NaN, which the normalizers bring back."""
    product = probability * factor
    return tl.where(product == product, product, 0.0)


@triton.jit
def _read(row_ptr, columns, num_columns):
    """A tile in float32; -inf beyond the last column."""
    return tl.load(row_ptr + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)


@triton.jit
def _write(row_ptr, columns, num_columns, value):
    tl.store(row_ptr + columns, value.to(row_ptr.dtype.element_ty), mask=columns < num_columns)
