"""Device code of `uniform_scores`. Specification: reference.noise.uniform_scores."""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.noise import ORDER_STREAM

_STREAM = tl.constexpr(ORDER_STREAM)


@triton.jit(
    do_not_specialize=("seed_stride", "N"), do_not_specialize_on_alignment=("seed_ptr", "noise_ptr", "score_ptr")
)
def uniform_scores_kernel(seed_ptr, noise_ptr, score_ptr, seed_stride, N, BLOCK_N: tl.constexpr):
    """((bits >> 9) + 0.5) * 2^-23 of the first Philox word of every counter (request, position, step, stream). A
    seed_stride of 0 is that of one seed for all counters."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    seed = tl.load(seed_ptr + row * seed_stride, mask=inside, other=0)
    address = noise_ptr + row * 3
    request = tl.load(address, mask=inside, other=0)
    position = tl.load(address + 1, mask=inside, other=0)
    step = tl.load(address + 2, mask=inside, other=0)
    bits, _, _, _ = tl.philox(seed, request, position, step, tl.zeros_like(step) + _STREAM)
    # Without a conversion: the bits become the mantissa of 1.x, from which 1 - 2^-24 is subtracted, exactly.
    one_to_two = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    tl.store(score_ptr + row, one_to_two - 0.999999940395355224609375, mask=inside)
