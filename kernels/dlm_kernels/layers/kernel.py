"""Device code of the small ops of a layer. Specification: reference.layers.

Bits: everything is computed in float32 and rounded to the dtype where the reference rounds. The launchers switch off
the fusion of products with sums (`FUSION`), so a product is rounded before it is added in float32 too, and sums and
rotations equal the reference bit for bit. Sums of squares are added in the order of the layout, which follows from the
length of a row or head and its dtype; `exp` and `rsqrt` are accurate to a few units of float32.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# The launch option of every kernel here.
FUSION = False

_LOG2E = tl.constexpr(math.log2(math.e))
# ln 2 in two parts: a multiple of the first by a whole number up to 2^15 is exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(math.log(2) - 0.693359375)


@triton.jit
def _rounded(x, dtype):
    """x after a rounding to the dtype, in float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _inverse_root(square_sum, eps, length: tl.constexpr):
    """1 / sqrt(square_sum / length + eps), to a few units in the last place; eps is a normal number, because the
    approximation takes others for 0."""
    return tl.rsqrt(square_sum * (1.0 / length) + eps)


@triton.jit
def _exp(x):
    """e^x, to a few units in the last place of float32; inf from 88.73 on, 0 below -104."""
    x = tl.minimum(tl.maximum(x, -104.0), 89.0)
    whole = tl.floor(x * _LOG2E)
    rest = tl.fma(whole, -_LN2_LOW, tl.fma(whole, -_LN2_HIGH, x))
    return tl.exp2(whole) * tl.exp2(rest * _LOG2E)


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr,
    total_ptr, normed_ptr,
    x_stride, residual_stride,
    eps,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The norm of a row of x, or, with a residual, of their sum, which is stored too; one program a row."""
    # 1. The row.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < d
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = _rounded(residual + x, dtype)
        tl.store(total_ptr + row * d + column, x.to(dtype), mask=inside)

    # 2. Its norm.
    scale = _inverse_root(tl.sum(x * x, axis=0), eps, d)
    normed = weight * _rounded(x * scale, dtype)
    tl.store(normed_ptr + row * d + column, normed.to(dtype), mask=inside)


@triton.jit
def _place(index, stride, ALIGNED: tl.constexpr):
    """Elements to the index of a dimension."""
    place = index * stride
    return tl.multiple_of(place, 16) if ALIGNED else place


@triton.jit
def _rotate_heads(
    x_ptr, weight_ptr, out_ptr, strides, first_head, batch, place, position, cos, sin, scale, eps,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Norms, rotates and stores HEADS heads of a position. A head is held in three parts: the halves of what is
    rotated, [HEADS, BLOCK_R] each, and the dims that pass, [HEADS, BLOCK_P]."""
    HALF: tl.constexpr = R // 2
    PASS: tl.constexpr = D - R
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    # 1. The heads.
    batch_stride, position_stride, head_stride = strides
    heads = first_head + tl.arange(0, HEADS)
    head = heads[:, None]
    dim = tl.broadcast_to(tl.arange(0, BLOCK_R)[None, :], (HEADS, BLOCK_R))
    passed_dim = tl.broadcast_to(tl.arange(0, BLOCK_P)[None, :], (HEADS, BLOCK_P))
    inside = (head < H) & (dim < HALF)
    passed_inside = (head < H) & (passed_dim < PASS)
    x_ptr += _place(batch, batch_stride, ALIGNED) + _place(place, position_stride, ALIGNED)
    heads_ptr = x_ptr + _place(heads.to(tl.int64), head_stride, ALIGNED)[:, None]
    first = tl.load(heads_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads_ptr + HALF + dim, mask=inside, other=0.0).to(tl.float32)
    passed = first
    if PASS > 0:
        passed = tl.load(heads_ptr + R + passed_dim, mask=passed_inside, other=0.0).to(tl.float32)

    # 2. Their norms. The weights are read before the sums wait for the heads.
    if weight_ptr is not None:
        first_weight = tl.load(weight_ptr + dim, mask=dim < HALF, other=0.0).to(tl.float32)
        second_weight = tl.load(weight_ptr + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)
        square_sum = tl.sum(first * first + second * second, axis=1)
        if PASS > 0:
            square_sum += tl.sum(passed * passed, axis=1)
        inverse = _inverse_root(square_sum, eps, D)[:, None]
        first = _rounded(first_weight * _rounded(first * inverse, dtype), dtype)
        second = _rounded(second_weight * _rounded(second * inverse, dtype), dtype)
        if PASS > 0:
            weight = tl.load(weight_ptr + R + passed_dim, mask=passed_dim < PASS, other=0.0).to(tl.float32)
            passed = _rounded(weight * _rounded(passed * inverse, dtype), dtype)

    # 3. The rotation: each product is rounded, then their sum. A difference, because Triton's -x is 0 - x, which has
    # no negative zero.
    cos_first, cos_second = cos
    sin_first, sin_second = sin
    turned_first = _rounded(_rounded(first * cos_first, dtype) - _rounded(second * sin_first, dtype), dtype)
    turned_second = _rounded(_rounded(second * cos_second, dtype) + _rounded(first * sin_second, dtype), dtype)
    if scale is not None:
        turned_first *= scale
        turned_second *= scale
        passed *= scale
    out_ptr += (position * H + head) * D
    tl.store(out_ptr + dim, turned_first.to(dtype), mask=inside)
    tl.store(out_ptr + HALF + dim, turned_second.to(dtype), mask=inside)
    if PASS > 0:
        tl.store(out_ptr + R + passed_dim, passed.to(dtype), mask=passed_inside)


# Strides and W change with the batch, and nothing is compiled again for them: ALIGNED says what Triton would find out.
@triton.jit(
    do_not_specialize=(
        "q_batch_stride", "q_position_stride", "q_head_stride", "k_batch_stride", "k_position_stride", "k_head_stride",
        "cos_batch_stride", "cos_position_stride", "sin_batch_stride", "sin_position_stride",
        "scale_batch_stride", "scale_position_stride",
        "W",
    )
)  # fmt: skip
def qk_norm_rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_scale_ptr,
    q_out_ptr, k_out_ptr,
    q_batch_stride, q_position_stride, q_head_stride, k_batch_stride, k_position_stride, k_head_stride,
    cos_batch_stride, cos_position_stride, sin_batch_stride, sin_position_stride,
    scale_batch_stride, scale_position_stride,
    W,
    eps,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """HEADS heads of the queries or of the keys of one position: the programs of a position take the queries' heads
    first."""
    # 1. Which position, and what it is rotated by.
    HALF: tl.constexpr = R // 2
    Q_GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    GROUPS: tl.constexpr = Q_GROUPS + (H_KV + HEADS - 1) // HEADS
    position = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    batch = position // W
    place = position % W
    # Every head reads these for itself: a broadcast would go through shared memory.
    dim = tl.broadcast_to(tl.arange(0, BLOCK_R)[None, :], (HEADS, BLOCK_R))
    inside = dim < HALF
    cos_ptr += _place(batch, cos_batch_stride, ALIGNED) + _place(place, cos_position_stride, ALIGNED)
    sin_ptr += _place(batch, sin_batch_stride, ALIGNED) + _place(place, sin_position_stride, ALIGNED)
    cos = (
        tl.load(cos_ptr + dim, mask=inside, other=0.0).to(tl.float32),
        tl.load(cos_ptr + HALF + dim, mask=inside, other=0.0).to(tl.float32),
    )
    sin = (
        tl.load(sin_ptr + dim, mask=inside, other=0.0).to(tl.float32),
        tl.load(sin_ptr + HALF + dim, mask=inside, other=0.0).to(tl.float32),
    )

    # 2. The heads of this program.
    if group < Q_GROUPS:
        scale = None
        if q_scale_ptr is not None:
            scale = tl.load(q_scale_ptr + batch * scale_batch_stride + place * scale_position_stride).to(tl.float32)
        _rotate_heads(
            q_ptr, q_weight_ptr, q_out_ptr, (q_batch_stride, q_position_stride, q_head_stride),
            group * HEADS, batch, place, position, cos, sin, scale, eps,
            H, D, R, ALIGNED, HEADS, BLOCK_R, BLOCK_P,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr, k_weight_ptr, k_out_ptr, (k_batch_stride, k_position_stride, k_head_stride),
            (group - Q_GROUPS) * HEADS, batch, place, position, cos, sin, None, eps,
            H_KV, D, R, ALIGNED, HEADS, BLOCK_R, BLOCK_P,
        )  # fmt: skip


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK_I: tl.constexpr):
    """R(R(silu(gate)) * up) of BLOCK_I columns of a row."""
    TILES: tl.constexpr = (WIDTH + BLOCK_I - 1) // BLOCK_I
    row = (tl.program_id(0) // TILES).to(tl.int64)
    column = (tl.program_id(0) % TILES) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < WIDTH
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    activated = _rounded(gate / (1.0 + _exp(-gate)), dtype)
    tl.store(out_ptr + row * WIDTH + column, (activated * up).to(dtype), mask=inside)
