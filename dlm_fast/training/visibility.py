"""Who sees whom in training: the decoders' predicate on the decoders' block ids, as a dense mask and for FlexAttention.

One function, `sees`, is the predicate that `dlm_kernels.block_attention` applies inside its window (see
`dlm_kernels.Window`, modes "full" and "block"); everything else here brings it into the form that an attention
implementation of transformers takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion import DiffusionConfig
from ..patching import plain_window

IMPLEMENTATIONS = ("sdpa", "flex_attention")


def sees(query_block: Tensor, key_block: Tensor, mode: str) -> Tensor:
    """Whether a query sees a key, from their block ids (integers that broadcast; -1 = padding, which neither sees nor
    is seen).

    mode: "full": every position sees every position. "block": its own block and those before it. With a prompt of two
    tokens and blocks of two:

        keys       0 0 1 1 2 2
        query 0    1 1 0 0 0 0
        query 1    1 1 1 1 0 0
        query 2    1 1 1 1 1 1
    """
    live = (query_block >= 0) & (key_block >= 0)
    if mode == "full":
        return live
    if mode == "block":
        return live & (key_block <= query_block)
    raise ValueError(f"training: visibility must be full or block, got {mode!r}")


def block_labels(prompt_lengths: Tensor, lengths: Tensor, width: int, diffusion: DiffusionConfig) -> tuple[Tensor, str]:
    """Block id of every position of a batch of canvases, [B, width] int32, and the mode of `sees` that goes with them.

    They are those a decoder of `diffusion` gives them. "rel": the prompt is block 0, the response is cut into blocks 1,
    2, ... from its own start. "abs": blocks are cut from position 0 and number from 1, the prompt in them. A model that
    sees all has no blocks, its positions are all 0; if its prompt is isolated the response is block 1. Positions from
    `lengths` [B] on are padding, -1.
    """
    live = torch.arange(width, device=lengths.device) < lengths[:, None]
    window = plain_window(
        diffusion.plain_mode,
        tuple(live.shape),
        live.device,
        diffusion=diffusion,
        input_ids=None,
        attention_mask=live,
        position_ids=None,
        prompt_lengths=None if diffusion.plain_mode == "full" else prompt_lengths,
    )
    return window.q_block, window.mode


def dense_mask(blocks: Tensor, mode: str) -> Tensor:
    """The predicate as [B, 1, L, L] bool, True where the query (dim 2) may attend to the key (dim 3), from block ids
    [B, L].

    Padding sees itself, for a softmax over no keys would give NaN; nothing reads what it computes.
    """
    visible = sees(blocks[:, :, None], blocks[:, None, :], mode)
    padding = (blocks < 0)[:, :, None] & torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)
    return (visible | padding)[:, None]


def mask_mod(blocks: Tensor, mode: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The predicate as FlexAttention asks for it: a function of (row, head, query, key) indices."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(blocks[row, query], blocks[row, key], mode)

    return visible


def attention_mask(blocks: Tensor, mode: str, implementation: str):
    """What a transformers model with this attention implementation takes as `attention_mask`, and hands through
    untouched.

    Returns:
        "sdpa": the dense mask. "flex_attention": a BlockMask [B, 1, L, L]; there padding gets zeros.
    """
    if implementation == "sdpa":
        return dense_mask(blocks, mode)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        B, L = blocks.shape
        return create_block_mask(mask_mod(blocks, mode), B, None, L, L, device=blocks.device)
    raise ValueError(
        f"training: attention must be one of {', '.join(IMPLEMENTATIONS)}, got attention={implementation!r}"
    )
