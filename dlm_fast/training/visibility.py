"""Who sees whom in training: the predicate and the block ids of the decoders, as a dense mask and for FlexAttention.

The function `sees` is the predicate that `dlm_kernels.block_attention` applies inside its window (see
`dlm_kernels.Window`, modes "full" and "block"). The other functions bring this predicate into the form that an
attention implementation of transformers takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion import DiffusionConfig
from ..patching import plain_window

IMPLEMENTATIONS = ("sdpa", "flex_attention")


def sees(query_block: Tensor, key_block: Tensor, mode: str) -> Tensor:
    """Whether a query sees a key, from the block ids of both.

    Block ids are integers that broadcast; -1 is padding, which neither sees nor is seen. In mode "full" every position
    sees every position. In mode "block" a position sees its own block and all earlier blocks. With a prompt of two
    tokens and blocks of two:

        keys       0 0 1 1 2 2
        query 0    1 1 0 0 0 0
        query 1    1 1 1 1 0 0
        query 2    1 1 1 1 1 1
    """
    are_real = (query_block >= 0) & (key_block >= 0)
    if mode == "full":
        return are_real
    if mode == "block":
        return are_real & (key_block <= query_block)
    raise ValueError(f"training: visibility must be full or block, got {mode!r}")


def block_labels(prompt_lengths: Tensor, lengths: Tensor, width: int, diffusion: DiffusionConfig) -> tuple[Tensor, str]:
    """The block id of every position of a batch of canvases, [B, width] int32, and the mode of `sees` for these ids.

    A decoder of `diffusion` gives the same ids. Positions from `lengths` [B] on are padding and have the id -1. The
    other ids depend on the model:

        "rel"            0 in the prompt; the response is cut from its own start into blocks 1, 2, ...
        "abs"            prompt and response are cut from position 0 into blocks 1, 2, ...
        full visibility  0 everywhere, since there are no blocks; with an isolated prompt, 1 in the response
    """
    is_real = torch.arange(width, device=lengths.device) < lengths[:, None]
    window = plain_window(
        diffusion.plain_mode,
        tuple(is_real.shape),
        is_real.device,
        diffusion=diffusion,
        input_ids=None,
        attention_mask=is_real,
        position_ids=None,
        prompt_lengths=None if diffusion.plain_mode == "full" else prompt_lengths,
    )
    return window.q_block, window.mode


def dense_mask(blocks: Tensor, mode: str) -> Tensor:
    """[B, 1, L, L] bool: the predicate for block ids [B, L], True where the query (dim 2) may see the key (dim 3).

    A position of padding sees itself, since a softmax over no keys would give NaN. Nothing reads the result there.
    """
    visible = sees(blocks[:, :, None], blocks[:, None, :], mode)
    padding = (blocks < 0)[:, :, None] & torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)
    return (visible | padding)[:, None]


def mask_mod(blocks: Tensor, mode: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The predicate in the form that FlexAttention asks for, a function of the indices (row, head, query, key)."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(blocks[row, query], blocks[row, key], mode)

    return visible


def attention_mask(blocks: Tensor, mode: str, implementation: str):
    """The mask that a transformers model with this attention implementation takes as `attention_mask`.

    Returns:
        For "sdpa" the dense mask; for "flex_attention" a BlockMask [B, 1, L, L], with which padding gets zeros.
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
