"""The fused convolution as an implicit GEMM over NHWC, in Triton.

    y[m, k] = act(sum over r, s, c of x[n, h, w, c] * weight[k, r, s, c] * scale[k] + shift[k]
                  + residual[m, k])
    m = (n, p, q);  h = p * stride_h - pad_h + r * dilation_h;  w likewise

A program computes a tile of pixels by output channels. The reduction goes tap by tap, a tap in
steps of BLOCK_C channels: what a pixel's address and bounds need of m is worked out once, and a
step adds a scalar. With few input channels (the stem has 3) taps and channels are one flat index.

A 1x1 convolution of a second tensor, the shortcut of a residual block, follows as more steps of the
same sum: between the two the accumulator is multiplied by scale / shortcut_scale, so that the
epilogue's shortcut_scale serves both, and no weight is scaled. Where shortcut_scale is at most
2^-100 or that ratio at least 1e30, whatever their signs, the first sum is multiplied by scale at
once and the shortcut's weights by 0, which keeps the NaN that eager gets from 0 * Inf.

SPLIT > 1: programs share the steps of a tile and leave float32 sums; reduce_kernel adds them in
order.
SWAP: channels are the rows of the product. wgmma takes rows by 64 and up to 256 columns, so that 64
channels by 256 pixels read 320 rows of shared memory, as 64 by 64 four times would 512.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _operand(values, INTERPRETED: tl.constexpr):
    # The interpreter computes bfloat16 as if its bits were integers.
    if INTERPRETED:
        values = values.to(tl.float32)
    return values


@triton.jit
def rounded(values, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 values in a tensor's dtype, rounded to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off, and errs on subnormals
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        values = tl.where(tl.abs(values) >= 1.1754944e-38, nearest, values)
    return values.to(dtype)


@triton.jit
def _multiply(
    x, weight, sums, SWAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr
):
    """sums + x (pixels, c) * weight (channels, c); sums has channels as rows if SWAP."""
    x, weight = _operand(x, INTERPRETED), _operand(weight, INTERPRETED)
    if SWAP:
        sums = tl.dot(weight, tl.trans(x), sums, input_precision=PRECISION)
    else:
        sums = tl.dot(x, tl.trans(weight), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _by_channel(values, SWAP: tl.constexpr):
    """One value a channel, as it is spread over a tile."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def _both(m_in, k_in, SWAP: tl.constexpr):
    """Where a tile lies within the output."""
    return k_in[:, None] & m_in[None, :] if SWAP else m_in[:, None] & k_in[None, :]


@triton.jit
def _places(m, k, channels, SWAP: tl.constexpr):
    """A tile's offsets in the output."""
    return k[:, None] + m[None, :] * channels if SWAP else m[:, None] * channels + k[None, :]


@triton.jit
def _halves(values, SIZE: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(values, (2, SIZE // 2)), (1, 0)))


@triton.jit
def _finish(
    sums,
    scale,
    shift,
    residual_ptr,
    y_ptr,
    m,
    m_in,
    first_k,  # output channel
    left,  # output channels from there on, in the group
    channels,
    COUNT: tl.constexpr,  # output channels of the tile
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    SWAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The epilogue of a tile, or of half its channels, which takes half of the registers."""
    k = tl.arange(0, COUNT)
    at = _places(m, first_k + k, channels, SWAP)
    inside = _both(m_in, k < left, SWAP)
    y = sums * _by_channel(scale, SWAP) + _by_channel(shift, SWAP)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # NaN passes
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _ratio(scale, shortcut_scale):
    """The accumulator's factor between the two sums, the epilogue's scale, and which channels of
    the shortcut count for nothing."""
    ratio = scale / shortcut_scale
    # Below 2^-100 the shortcut is lost in float32 beside anything else. Of a NaN neither is true.
    lost = (tl.abs(shortcut_scale) <= 7.9e-31) | (tl.abs(ratio) >= 1e30)
    return tl.where(lost, scale, ratio), tl.where(lost, 1.0, shortcut_scale), lost


@triton.jit
def _tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Which tile: GROUP_M rows of tiles are walked together, so that weights are read from L2."""
    per_group = GROUP_M * tiles_n
    first_m = program // per_group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    within = program % per_group
    return first_m + within % rows, within // rows


@triton.jit
def conv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    shortcut_x_ptr,
    shortcut_weight_ptr,
    shortcut_scale_ptr,
    shortcut_shift_ptr,
    y_ptr,  # with SPLIT > 1 the sums: (SPLIT, pixels, channels) float32
    pixels,  # of the output: n * p * q
    in_h,
    in_w,
    out_h,
    out_w,
    group_out,  # output channels of a group
    shortcut_h,
    shortcut_w,
    tiles_m,
    tiles_n,  # of a group
    GROUPS: tl.constexpr,
    GROUP_IN: tl.constexpr,  # input channels of a group
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SHORTCUT_C: tl.constexpr,  # 0: there is none
    SHORTCUT_STRIDE_H: tl.constexpr,
    SHORTCUT_STRIDE_W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    FLAT: tl.constexpr,  # one index for taps and channels
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "tf32" or "ieee"
    WIDE: tl.constexpr,  # offsets need 64 bits
    HALVES: tl.constexpr,  # the epilogue takes half of the tile's channels at a time
    INTERPRETED: tl.constexpr,
):
    channels = group_out * GROUPS
    tile = tl.program_id(0)
    group = tile // (tiles_m * tiles_n)
    tile_m, tile_n = _tile_of(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    part = tl.program_id(1)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    m_in, k_in = m < pixels, k < group_out
    q = m % out_w
    p = m // out_w % out_h
    n = m // (out_w * out_h)
    if WIDE:
        n, k = n.to(tl.int64), k.to(tl.int64)
    h = p * STRIDE_H - PAD_H
    w = q * STRIDE_W - PAD_W

    IN: tl.constexpr = GROUP_IN * GROUPS
    WINDOW: tl.constexpr = KERNEL_H * KERNEL_W * GROUP_IN
    CHUNKS: tl.constexpr = (GROUP_IN + BLOCK_C - 1) // BLOCK_C
    if FLAT:
        STEPS: tl.constexpr = (WINDOW + BLOCK_C - 1) // BLOCK_C
    else:
        STEPS: tl.constexpr = KERNEL_H * KERNEL_W * CHUNKS
    SHORTCUT_STEPS: tl.constexpr = (SHORTCUT_C + BLOCK_C - 1) // BLOCK_C
    PER_PART: tl.constexpr = (STEPS + SHORTCUT_STEPS + SPLIT - 1) // SPLIT
    start = part * PER_PART
    end = min(start + PER_PART, STEPS + SHORTCUT_STEPS)

    # Offsets of 32 bits, not pointers of 64, are what a thread keeps of its rows.
    x_row = ((n * in_h + h) * in_w + w) * IN + group * GROUP_IN
    weight_row = (group * group_out + k) * WINDOW
    if SWAP:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for step in range(start, min(end, STEPS)):
        if FLAT:
            at = step * BLOCK_C + c
            tap = at // GROUP_IN
            r = tap // KERNEL_W * DILATION_H
            s = tap % KERNEL_W * DILATION_W
            at_h, at_w = h[:, None] + r[None, :], w[:, None] + s[None, :]
            if WIDE:
                r = r.to(tl.int64)  # a few rows of one image may be that far
            in_window = at < WINDOW
            inside = (at_h >= 0) & (at_h < in_h) & (at_w >= 0) & (at_w < in_w)
            inside = inside & m_in[:, None] & in_window[None, :]
            moved = (r * in_w + s) * IN + at % GROUP_IN
            x = tl.load(x_ptr + (x_row[:, None] + moved[None, :]), mask=inside, other=0.0)
            weight_mask = k_in[:, None] & in_window[None, :]
        else:
            tap = step // CHUNKS
            first_c = step % CHUNKS * BLOCK_C
            r = tap // KERNEL_W * DILATION_H
            s = tap % KERNEL_W * DILATION_W
            at_h, at_w = h + r, w + s
            if WIDE:
                r = r.to(tl.int64)
            inside = (at_h >= 0) & (at_h < in_h) & (at_w >= 0) & (at_w < in_w) & m_in
            moved = (r * in_w + s) * IN + first_c
            at = tap * GROUP_IN + first_c + c
            if GROUP_IN % BLOCK_C == 0:
                x_mask, weight_mask = inside[:, None], k_in[:, None]
            else:
                c_in = first_c + c < GROUP_IN
                x_mask = inside[:, None] & c_in[None, :]
                weight_mask = k_in[:, None] & c_in[None, :]
            x = tl.load(x_ptr + ((x_row + moved)[:, None] + c[None, :]), mask=x_mask, other=0.0)
        weight = tl.load(
            weight_ptr + (weight_row[:, None] + at[None, :]), mask=weight_mask, other=0.0
        )
        sums = _multiply(x, weight, sums, SWAP, PRECISION, INTERPRETED)

    k_all = group * group_out + k
    scale = tl.load(scale_ptr + k_all, mask=k_in, other=1.0)
    if SHORTCUT_C > 0:
        shortcut_scale = tl.load(shortcut_scale_ptr + k_all, mask=k_in, other=1.0)
        ratio, scale, lost = _ratio(scale, shortcut_scale)
        sums = sums * _by_channel(ratio, SWAP)
        row = (n * shortcut_h + p * SHORTCUT_STRIDE_H) * shortcut_w + q * SHORTCUT_STRIDE_W
        shortcut_row = row * SHORTCUT_C
        shortcut_weight_row = k * SHORTCUT_C
        for step in range(max(start, STEPS), end):
            first_c = (step - STEPS) * BLOCK_C
            c_in = first_c + c < SHORTCUT_C
            x = tl.load(
                shortcut_x_ptr + ((shortcut_row + first_c)[:, None] + c[None, :]),
                mask=m_in[:, None] & c_in[None, :],
                other=0.0,
            )
            weight = tl.load(
                shortcut_weight_ptr + ((shortcut_weight_row + first_c)[:, None] + c[None, :]),
                mask=(k_in & (lost == 0))[:, None] & c_in[None, :],
                other=0.0,
            )
            sums = _multiply(x, weight, sums, SWAP, PRECISION, INTERPRETED)

    if WIDE:
        m = m.to(tl.int64)
    if SPLIT > 1:
        at = _places(m, k_all, channels, SWAP)
        inside = _both(m_in, k_in, SWAP)
        tl.store(y_ptr + part.to(tl.int64) * pixels * channels + at, sums, mask=inside)
    else:
        shift = tl.load(shift_ptr + k_all, mask=k_in, other=0.0)
        if SHORTCUT_C > 0:
            shift += tl.load(shortcut_shift_ptr + k_all, mask=k_in, other=0.0)
        first_k = group * group_out + tile_n * BLOCK_N
        left = group_out - tile_n * BLOCK_N
        if HALVES:
            parts = tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            low, high = tl.split(parts)
            low_scale, high_scale = _halves(scale, BLOCK_N)
            low_shift, high_shift = _halves(shift, BLOCK_N)
            half: tl.constexpr = BLOCK_N // 2
            _finish(
                *(low, low_scale, low_shift, residual_ptr, y_ptr, m, m_in, first_k, left),
                *(channels, half, HAS_RESIDUAL, RELU, SWAP, INTERPRETED),
            )
            _finish(
                *(high, high_scale, high_shift, residual_ptr, y_ptr, m, m_in, first_k + half),
                *(left - half, channels, half, HAS_RESIDUAL, RELU, SWAP, INTERPRETED),
            )
        else:
            _finish(
                *(sums, scale, shift, residual_ptr, y_ptr, m, m_in, first_k, left),
                *(channels, BLOCK_N, HAS_RESIDUAL, RELU, SWAP, INTERPRETED),
            )


@triton.jit
def reduce_kernel(
    sums_ptr,  # (SPLIT, pixels, channels) float32
    scale_ptr,
    shift_ptr,
    residual_ptr,
    shortcut_scale_ptr,
    shortcut_shift_ptr,
    y_ptr,
    count,  # pixels * channels
    CHANNELS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Adds the parts in order, then the epilogue of conv_kernel."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < count
    k = ((first % CHANNELS).to(tl.int32) + tl.arange(0, BLOCK)) % CHANNELS
    sums = tl.zeros((BLOCK,), tl.float32)
    part_at = tl.zeros((1,), tl.int64)
    for _ in range(SPLIT):
        sums += tl.load(sums_ptr + at + part_at, mask=inside, other=0.0)
        part_at += count  # not part * count: 64 bits, and a count of 1 is compiled in
    scale = tl.load(scale_ptr + k, mask=inside, other=1.0)
    shift = tl.load(shift_ptr + k, mask=inside, other=0.0)
    if HAS_SHORTCUT:
        _, scale, _ = _ratio(scale, tl.load(shortcut_scale_ptr + k, mask=inside, other=1.0))
        shift += tl.load(shortcut_shift_ptr + k, mask=inside, other=0.0)
    y = sums * scale + shift
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # NaN passes
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), mask=inside)
