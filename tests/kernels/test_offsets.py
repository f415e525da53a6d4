"""Tensors whose last row begins beyond 2^31 elements: every kernel addresses it in 64 bits.

The stride itself fits into 32 bits, so that Triton passes it as such and the product is what overflows. The buffers are
sparse: memory that is never touched is never given, so gigabytes of addresses cost a few pages.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, Window, reference

pytest.importorskip("triton", reason="these tests run Triton kernels")

from dlm_kernels.attention import block_attention
from dlm_kernels.confidence import confidence
from dlm_kernels.unmask import unmask

ROWS = 4
FAR = 3 * 2**28  # 3 * FAR > 2^31 > FAR


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The same values, with FAR elements from one row of dim 0 to the next."""
    strides = (FAR, *values.contiguous().stride()[1:])
    try:
        out = torch.empty_strided(values.shape, strides, dtype=values.dtype, device=values.device)
    except RuntimeError as error:
        pytest.skip(
            f"no {(ROWS - 1) * FAR * values.element_size() / 2**30:.0f} GiB of addresses here: "
            f"{str(error).splitlines()[0]}"
        )
    return out.copy_(values)


@pytest.mark.parametrize("far", ["q", "k", "v", "k_cache", "v_cache"])
def test_attention(device, far):
    B, H, W, D, S = ROWS, 2, 3, 16, 40
    shapes = {"q": (B, H, W, D), "k": (B, 1, W, D), "v": (B, 1, W, D), "k_cache": (B, 1, S, D), "v_cache": (B, 1, S, D)}
    given = {name: torch.randn(shape, dtype=torch.float16, device=device) for name, shape in shapes.items()}
    lane = torch.arange(W, dtype=torch.int32, device=device).expand(B, W)

    def int32(*values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    window = Window(
        q_pos=(lane + 33).contiguous(), q_block=lane.contiguous(), q_len=int32(*[W] * B),
        kv_slot=(lane + 33).contiguous(), kv_len=int32(*[33] * B), replaced=int32(*[[0, 0]] * B),
        cache_row=int32(3, 0, 1, 2), mode="causal",
    )  # fmt: skip
    near = {name: value.clone() for name, value in given.items()}
    expected = block_attention(**near, window=window, scale=0.25)
    apart = given | {far: far_apart(given[far])}
    found = block_attention(**apart, window=window, scale=0.25)
    assert torch.equal(found, expected)
    assert torch.equal(apart["k_cache"], near["k_cache"]) and torch.equal(apart["v_cache"], near["v_cache"])


def test_confidence(device):
    logits = torch.randn(ROWS, 500, dtype=torch.float16, device=device)
    previous = torch.randn(ROWS, 500, dtype=torch.float16, device=device)
    given = {"outputs": ("second", "logsumexp", "kl"), "previous_logsumexp": previous.float().logsumexp(1)}
    expected = confidence(logits, previous=previous, **given)
    found = confidence(far_apart(logits), previous=far_apart(previous), **given)
    for name, value in expected._asdict().items():
        assert value is None or torch.equal(getattr(found, name), value), name


def test_unmask(device):
    B, L, W = ROWS, 6, 4
    near = RowState.empty(B, L, device)
    near.tokens.fill_(9)
    for name, value in {"canvas_len": L, "block_end": W, "block_masks": W, "phase": 1}.items():
        getattr(near, name).fill_(value)
    # 9 GiB of addresses each; the 64-bit tokens would take 18.
    far = {name: far_apart(getattr(near, name)) for name in ("unmask_step", "unmask_confidence")}
    state = dataclasses.replace(near.clone(), **far)
    int32 = {"dtype": torch.int32, "device": device}
    inputs = UnmaskInputs(
        query_len=torch.full((B,), W, **int32),
        pred=torch.randint(0, 8, (B, W), device=device),
        score=torch.rand(B, W, device=device),
        confidence=torch.rand(B, W, device=device),
        value=torch.full((B,), 0.5, device=device),
        min_unmask=torch.ones(B, **int32),
        steps=torch.full((B,), 4, **int32),
        block_length=torch.full((B,), W, **int32),
        mask_id=9,
        stop_ids=torch.tensor([8], device=device),
    )
    written = reference.unmask(near, UnmaskRule("threshold"), inputs, kind="denoise")
    far_inputs = dataclasses.replace(inputs, score=far_apart(inputs.score))
    assert torch.equal(unmask(state, UnmaskRule("threshold"), far_inputs, kind="denoise"), written)
    for field in dataclasses.fields(RowState):
        assert torch.equal(getattr(state, field.name), getattr(near, field.name)), field.name
