"""Who sees whom in training is who sees whom in decoding: the dense mask, FlexAttention and the decoders' op agree."""

import dataclasses

import pytest
import torch
from attention_cases import TOY
from helpers import native_model, random_prompts, toy
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

import dlm_fast
from dlm_fast.training.visibility import attention_mask, block_labels, dense_mask, mask_mod, sees
from dlm_kernels import Window, reference
from dlm_kernels.attention import launch as kernel

D = 32  # of the op's calls, and so the most positions a case may have


def random_canvases(seed: int) -> tuple[Tensor, Tensor, int, dlm_fast.DiffusionConfig]:
    """(prompt lengths, canvas lengths, width, diffusion) of a ragged batch, a row of width 0 answer tokens included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    prompt = draw(1, 12, 3)
    length = prompt + draw(0, 16, 3)
    visibility = "block" if seed % 3 else "full"
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=0,
        eos_token_ids=(1,),
        visibility=visibility,
        block_length=int(draw(1, 6)),
        block_alignment="abs" if seed % 4 == 1 and visibility == "block" else "rel",
        prompt_isolated=seed % 6 == 3,
    )
    return prompt, length, int(length.max()) + int(draw(0, 2)), diffusion


def seen_by_the_op(op, blocks: Tensor, mode: str, *, cached: Tensor | None = None) -> Tensor:
    """[B, W, W] bool: what each query of a whole window attends to, read off the op's output.

    With queries of zero all visible keys weigh the same, and the value of position j is the j-th unit vector. `cached`
    [B]: positions of each row whose keys an earlier forward stored; no query computes them then.
    """
    B, W = blocks.shape
    index = torch.arange(W).expand(B, W)
    cached = torch.zeros(B, dtype=torch.long) if cached is None else cached
    caches = torch.zeros(B, 2, W, D), torch.zeros(B, 2, W, D)
    value = torch.eye(W, D).expand(B, 2, W, D).contiguous()
    caches[1][:] = value
    window = Window(
        q_pos=index.int().contiguous(),
        q_block=torch.where(index < cached[:, None], -1, blocks).int().contiguous(),
        q_len=torch.full((B,), W, dtype=torch.int32),
        kv_slot=torch.full((B, W), -1, dtype=torch.int32),
        kv_len=cached.int(),
        replaced=torch.zeros(B, 2, dtype=torch.int32),
        cache_row=torch.arange(B, dtype=torch.int32),
        mode=mode,
    )
    zero = torch.zeros(B, 2, W, D)
    out = op(zero, zero.clone(), value, *(caches if cached.any() else (None, None)), window)
    return out[:, 0, :, :W] > 0


def by_reference(q, k, v, k_cache, v_cache, window):
    return reference.block_attention(q, k, v, k_cache, v_cache, window, scale=1.0)


def by_kernel(q, k, v, k_cache, v_cache, window):
    return kernel._launch(q, k, v, k_cache, v_cache, window, scale=1.0, tile=TOY)


def in_training(blocks: Tensor, mode: str) -> Tensor:
    """[B, L, L] of the dense mask, without what padding sees of itself."""
    return dense_mask(blocks, mode)[:, 0] & (blocks >= 0)[:, :, None]


@pytest.mark.parametrize("seed", range(40))
def test_dense_mask_mask_mod_and_the_decoders_op_agree(seed):
    prompt, length, width, diffusion = random_canvases(seed)
    blocks, mode = block_labels(prompt, length, width, diffusion)
    dense = in_training(blocks, mode)

    by_mod = create_mask(mask_mod(blocks, mode), 3, None, width, width, device="cpu")[:, 0]

    assert torch.equal(by_mod, dense)
    assert torch.equal(seen_by_the_op(by_reference, blocks, mode), dense)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_triton_kernel_sees_what_training_sees(seed):
    prompt, length, width, diffusion = random_canvases(seed)
    blocks, mode = block_labels(prompt, length, width, diffusion)

    assert torch.equal(seen_by_the_op(by_kernel, blocks, mode), in_training(blocks, mode))


@pytest.mark.parametrize(("op", "seeds"), [(by_reference, range(1, 30)), (by_kernel, [2])], ids=["reference", "triton"])
def test_blocks_read_from_a_cache_are_those_training_lets_be_seen(op, seeds):
    for seed in seeds:
        prompt, length, width, diffusion = random_canvases(seed)
        if diffusion.visibility != "block":
            continue
        blocks, mode = block_labels(prompt, length, width, diffusion)
        # The first block of each row is committed: its keys come from the cache.
        cached = (blocks == blocks[:, :1]).sum(1)
        computed = torch.arange(width) >= cached[:, None]

        seen = seen_by_the_op(op, blocks, mode, cached=cached)

        assert torch.equal(seen, in_training(blocks, mode) & computed[:, :, None])


def test_a_pipelined_decode_sees_what_training_sees():
    """Every forward of D2F on ragged prompts has windows of several blocks over a cache that commits fill."""
    model = toy("block", block_length=4)
    handle, windows = dlm_fast.handle_of(model), []

    def record(q, k, v, k_cache, v_cache, window, **options):
        windows.append(
            dataclasses.replace(window, **{name: tensor.clone() for name, tensor in window.tensors().items()})
        )
        return reference.block_attention(q, k, v, k_cache, v_cache, window, **options)

    handle.ops = dataclasses.replace(handle.ops, block_attention=record)
    lengths = [5, 2, 9]
    dlm_fast.generate(model, random_prompts(lengths), preset="d2f", threshold=0.3, max_new_tokens=12, eos_token_ids=[])
    prompt = torch.tensor(lengths)
    blocks, mode = block_labels(prompt, prompt + 12, 24, handle.diffusion)
    dense = in_training(blocks, mode)

    compared = 0
    for window in windows:
        for b in range(len(window.q_len)):
            live = [j for j in range(window.q_len[b]) if window.q_block[b, j] >= 0]
            place, label = window.q_pos[b, live].long(), window.q_block[b, live]
            if not live:
                continue
            row = window.cache_row[b]
            assert torch.equal(label[None] <= label[:, None], dense[row][place][:, place])
            assert dense[row][place][:, : window.kv_len[b]].all()
            compared += 1
    assert compared > 20


def test_labels_are_worked_by_hand():
    base = dlm_fast.DiffusionConfig(mask_token_id=0, eos_token_ids=(1,), visibility="block", block_length=2)
    prompt, length = torch.tensor([3, 1]), torch.tensor([7, 3])

    def labels(**changes):
        blocks, mode = block_labels(prompt, length, 8, dataclasses.replace(base, **changes))
        return blocks.tolist(), mode

    pad = [-1] * 5
    assert labels() == ([[0, 0, 0, 1, 1, 2, 2, -1], [0, 1, 1, *pad]], "block")
    assert labels(block_alignment="abs") == ([[1, 1, 2, 2, 3, 3, 4, -1], [1, 1, 2, *pad]], "block")
    assert labels(visibility="full") == ([[0] * 7 + [-1], [0, 0, 0, *pad]], "full")
    assert labels(visibility="full", prompt_isolated=True) == ([[0, 0, 0, 1, 1, 1, 1, -1], [0, 1, 1, *pad]], "block")


def test_padding_is_seen_by_nobody_and_sees_itself_alone():
    blocks = torch.tensor([[0, 1, -1, -1]], dtype=torch.int32)

    assert dense_mask(blocks, "block")[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_flex_attention_attends_as_the_dense_mask():
    """FlexAttention runs uncompiled and forward only, which is what it has on a CPU."""
    prompt, length, width, diffusion = random_canvases(2)
    blocks, mode = block_labels(prompt, length, width, diffusion)
    q, k, v = torch.randn(3, 3, 4, width, 16).unbind()
    with torch.no_grad():
        flex = flex_attention(q, k, v, block_mask=attention_mask(blocks, mode, "flex_attention"))
        dense = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask(blocks, mode, "sdpa")
        )

    live = blocks >= 0
    torch.testing.assert_close(flex.transpose(1, 2)[live], dense.transpose(1, 2)[live], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_transformers_model_hands_both_masks_through(family, monkeypatch):
    """The mask that each attention function receives is the one that was given, and the logits are the same."""
    from transformers.integrations import flex_attention as integration

    # Compiling would take minutes here, and the test is about what reaches the function.
    monkeypatch.setattr(
        integration,
        "compile_friendly_flex_attention",
        lambda *args, training=False, **kwargs: flex_attention(*args, **kwargs),
    )
    prompt, length, width, diffusion = random_canvases(5)
    blocks, mode = block_labels(prompt, length, width, diffusion)
    model = native_model(family)
    tokens = torch.randint(2, 40, (3, width))
    logits = []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(
                model(
                    input_ids=tokens, attention_mask=attention_mask(blocks, mode, implementation), use_cache=False
                ).logits[blocks >= 0]
            )

    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_an_unknown_mode_or_implementation_is_named():
    with pytest.raises(ValueError, match="visibility must be full or block, got 'causal'"):
        sees(torch.zeros(1), torch.zeros(1), "causal")
    with pytest.raises(ValueError, match="attention must be one of sdpa, flex_attention, got attention='eager'"):
        attention_mask(torch.zeros(1, 4, dtype=torch.int32), "block", "eager")
