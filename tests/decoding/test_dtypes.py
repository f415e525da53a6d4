"""Dtypes of a decode: nothing depends on the process-wide default; models in float64, in 16 bits and quantised ones
decode."""

from __future__ import annotations

import pytest
import torch
from helpers import HOST_SIDE, MASK, RUNNABLE, model_for, native_model, options_of, random_prompts, toy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dlm_fast
from dlm_fast.patching import attach
from dlm_fast.presets import PRESETS


class DtypesMade(TorchDispatchMode):
    """The dtypes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.dtypes |= {x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("preset", RUNNABLE)
def test_nothing_depends_on_the_process_wide_default_dtype(preset, default_dtype):
    model, prompts = model_for(preset), random_prompts([5, 3])
    settings = {"preset": preset, "max_new_tokens": 6, "min_new_tokens": 2, **options_of(preset)}
    draws = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    greedy_only = PRESETS[preset].drafts > 1 or preset in HOST_SIDE
    for sampling in ({},) if greedy_only else ({}, draws):
        default_dtype(torch.float32)
        expected = dlm_fast.generate(model, prompts, **settings, **sampling)
        for dtype in (torch.bfloat16, torch.float64):
            default_dtype(dtype)
            with DtypesMade() as made:
                found = dlm_fast.generate(model, prompts, **settings, **sampling)
            assert found.nfe == expected.nfe
            for name in ("canvas", "confidence", "unmask_step"):
                assert all(
                    torch.equal(a, b) for a, b in zip(getattr(found, name), getattr(expected, name), strict=True)
                ), (name, dtype)
            # A tensor of a default that is nobody's own dtype was made by leaving the dtype out.
            assert dtype == torch.float64 or dtype not in made.dtypes


@pytest.mark.parametrize("preset", RUNNABLE)
def test_a_float64_model_decodes_on_the_reference(preset):
    model, prompts = model_for(preset), random_prompts([5, 3])
    settings = {"preset": preset, "max_new_tokens": 6, **options_of(preset)}
    expected = dlm_fast.generate(model, prompts, **settings)
    model.to(torch.float64)
    with DtypesMade() as made:
        found = dlm_fast.generate(model, prompts, **settings)
    assert torch.float64 in made.dtypes
    assert [row.tolist() for row in found.canvas] == [row.tolist() for row in expected.canvas]
    assert all(c.dtype == torch.float32 for c in found.confidence)


def test_a_float64_model_is_refused_by_the_kernels_by_name():
    pytest.importorskip("triton")
    with pytest.raises(TypeError, match="block_attention: q must be .* got torch.float64"):
        dlm_fast.generate(toy(backend="triton", dtype=torch.float64), random_prompts([3]), max_new_tokens=2)


class Quantised(nn.Module):
    """A linear layer as quantising libraries leave it: weights of bytes, results in the dtype of what it is given."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale + 128).round().to(torch.uint8), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ ((self.weight.float() - 128) * self.scale).to(x.dtype).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["llada", "fast-dllm-dual", "sdar", "klass", "nbdiff"])
def test_a_quantised_model_decodes_with_every_kind_of_buffer(preset, dtype):
    def quantised(module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            setattr(
                module,
                name,
                Quantised(child) if isinstance(child, nn.Linear) and name != "lm_head" else quantised(child),
            )
        return module

    diffusion = dlm_fast.handle_of(model_for(preset)).diffusion
    model = quantised(native_model(dtype=dtype)).eval()
    attach(model, backend="reference", diffusion=diffusion, plain_mode=diffusion.plain_mode)
    prompts, settings = random_prompts([5, 3]), {"preset": preset, "max_new_tokens": 6, **options_of(preset)}
    found = dlm_fast.generate(model, prompts, **settings)
    assert all(MASK not in row for row in found.canvas)
    if dtype == torch.float32:
        # The same weights, not quantised.
        plain = native_model()
        for (_, ours), (_, theirs) in zip(
            model.model.layers.named_modules(), plain.model.layers.named_modules(), strict=True
        ):
            if isinstance(ours, Quantised):
                theirs.weight.data = (ours.weight.float() - 128) * ours.scale
        attach(plain, backend="reference", diffusion=diffusion, plain_mode=diffusion.plain_mode)
        expected = dlm_fast.generate(plain, prompts, **settings)
        assert [row.tolist() for row in found.canvas] == [row.tolist() for row in expected.canvas]


FIXED_SHAPES = [
    n for n in RUNNABLE if not (PRESETS[n].pipeline or PRESETS[n].cache == "scattered" or PRESETS[n].drafts > 1)
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", FIXED_SHAPES)
def test_a_row_in_16_bits_depends_on_its_neighbours_lengths_and_not_on_what_they_say(preset, dtype):
    """A matrix product may change its kernel, and so its rounding, with its shape; rows of one product are
    independent."""
    model = model_for(preset, dtype=dtype)
    row = random_prompts([6])[0]
    neighbours = [random_prompts([3, 9], seed=seed) for seed in (1, 2)]
    settings = {"preset": preset, "max_new_tokens": [7, 6, 9], **options_of(preset)}

    first, second = (dlm_fast.generate(model, [before, row, after], **settings) for before, after in neighbours)
    assert first.canvas[0].tolist() != second.canvas[0].tolist()
    for name in ("canvas", "confidence", "unmask_step"):
        assert torch.equal(getattr(first, name)[1], getattr(second, name)[1]), name
    assert (first.nfe[1], first.query_tokens[1]) == (second.nfe[1], second.query_tokens[1])
