"""The decode loops that papers publish, written out as plain loops over a transformers model: what `e2e` compares with.

    Recompute   LLaDA, arXiv:2502.09992                  every step recomputes the canvas
    UpToBlock   LLaDA2, arXiv:2512.15745                 every step recomputes the canvas up to the end of the block
    Prefix      Fast-dLLM, arXiv:2505.22618              a block's first step recomputes everything, later ones see the
                                                         keys before the block as that step left them
    Dual        Fast-dLLM                                later ones see those behind the block too
    Committed   SDAR, arXiv:2510.06303                   block-causal: the keys of a finished block are kept

A step writes the `per_step` most confident masks of the block. As published, the head and the softmax run over every
position of the window, and rows are ranked one after the other. Two things differ: where the published code converts
the logits to float64, these loops stay in float32, which is faster; and a stable sort, not `topk`, decides between
equal positions. All rows of a batch have one length, because the published loops know no padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "bench_published"  # transformers builds no mask for a name that it does not know


class Keys:
    """The keys and values [B, H_kv, S, D] that a loop keeps of every layer.

    Attributes:
        how: what becomes of the keys of a forward: "fill" = they are kept instead of all others; "append" = they are
            kept behind the others; "beside" = the forward sees them behind the others, and they are not kept; "replace"
            = they take the place of the kept ones from position `at` on.
    """

    def __init__(self) -> None:
        self.how = "fill"
        self.at = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer sees."""
        if self.how == "replace":
            for kept, computed in zip(self._kept[layer], (key, value)):
                kept[:, :, self.at : self.at + computed.shape[2]] = computed
            return self._kept[layer]
        if self.how != "fill":
            kept_key, kept_value = self._kept[layer]
            key, value = torch.cat([kept_key, key], 2), torch.cat([kept_value, value], 2)
        if self.how != "beside":
            self._kept[layer] = key, value
        return key, value

    def crop(self, length: int) -> None:
        """Keeps the first `length` positions."""
        self._kept = {layer: (key[:, :, :length], value[:, :, :length]) for layer, (key, value) in self._kept.items()}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kept_keys: Keys | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers calls: SDPA over the kept keys and the new ones, all of them visible but for the mask."""
    if kept_keys is not None:
        key, value = kept_keys.join(module.layer_idx, key, value)
    kwargs["is_causal"] = False
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, attention)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a loop decodes.

    Attributes:
        prompts: [B, P] token ids.
        new_tokens: positions to fill, a multiple of the block length.
        block_length: positions of a block, a multiple of `per_step`.
        per_step: tokens that a step writes.
        mask_id: id of the mask.
        banned: ids that are never written, the mask id among them. They count in the softmax.
    """

    prompts: Tensor
    new_tokens: int
    block_length: int
    per_step: int
    mask_id: int
    banned: tuple[int, ...]

    @property
    def starts(self) -> range:
        """Where the blocks begin."""
        prompt = self.prompts.shape[1]
        return range(prompt, prompt + self.new_tokens, self.block_length)

    @property
    def steps(self) -> int:
        """Steps of a block."""
        return self.block_length // self.per_step

    @property
    def block_ids(self) -> Tensor:
        """[L] the block of every position; the prompt is one."""
        prompt = self.prompts.shape[1]
        position = torch.arange(prompt + self.new_tokens, device=self.prompts.device)
        return torch.where(position < prompt, 0, 1 + (position - prompt) // self.block_length)


Choose = Callable[[Tensor, int, int], None]


class Loop:
    """A loop over the blocks of a batch.

    Attributes:
        tokens: [B, L] the canvas.
        forwards: forwards that were run.
        gap: [B] the smallest gap by which something was decided: between two candidates of a token, in logits, or
            between two positions, in probability; None = it is not watched.
    """

    def __init__(self, model: nn.Module, task: Task, *, watch: bool = False) -> None:
        self.model, self.task = model, task
        B, device = task.prompts.shape[0], task.prompts.device
        masks = torch.full((B, task.new_tokens), task.mask_id, device=device)
        self.tokens = torch.cat([task.prompts, masks], 1)
        self.banned = torch.tensor(task.banned, device=device)
        self.keys = Keys()
        self.forwards = 0
        self.gap = torch.full((B,), math.inf, device=device) if watch else None

    @torch.no_grad()
    def run(self) -> Tensor:
        """Decodes; returns the canvas [B, L]."""
        self.open(self.task.starts[0])
        for start in self.task.starts:
            self.block(start, self.write)
        return self.tokens

    def open(self, start: int) -> None:
        """The forwards before the block that begins at `start`, if the loop has any."""

    def block(self, start: int, choose: Choose) -> None:
        """The forwards of a block. `choose` gets the logits of each, the first position that they are of, and the end
        of the block."""
        raise NotImplementedError

    def forward(self, start: int, end: int, mask: Tensor | None = None) -> Tensor:
        """Logits [B, end - start, V] of the positions from `start` to `end`."""
        self.forwards += 1
        position = torch.arange(start, end, device=self.tokens.device)[None]
        return self.model(
            input_ids=self.tokens[:, start:end],
            position_ids=position,
            attention_mask=mask,
            use_cache=False,
            kept_keys=self.keys,
        ).logits

    def write(self, logits: Tensor, first: int, end: int) -> None:
        """Writes the most confident masks before `end`."""
        window = self.tokens[:, first : first + logits.shape[1]]
        is_masked = window == self.task.mask_id
        is_masked[:, end - first :] = False
        allowed = logits.index_fill(-1, self.banned, -torch.inf)
        token = allowed.argmax(-1)
        probability = logits.softmax(-1, dtype=torch.float32).gather(-1, token[..., None])[..., 0]
        confidence = torch.where(is_masked, probability, -torch.inf)
        is_written = torch.zeros_like(is_masked)
        for row, ranked in enumerate(confidence):
            is_written[row, ranked.argsort(descending=True, stable=True)[: self.task.per_step]] = True
        if self.gap is not None:
            self._watch(allowed, confidence, is_written)
        window[is_written] = token[is_written]

    def _watch(self, allowed: Tensor, confidence: Tensor, is_written: Tensor) -> None:
        best = allowed.float().topk(2, dim=-1).values
        between_tokens = torch.where(is_written, best[..., 0] - best[..., 1], torch.inf).amin(1)
        worst_written = torch.where(is_written, confidence, torch.inf).amin(1)
        best_left = torch.where(is_written, -torch.inf, confidence).amax(1)
        self.gap = torch.stack([self.gap, between_tokens, worst_written - best_left]).amin(0)


def idle(logits: Tensor, first: int, end: int) -> None:
    """Chooses nothing: what is left of a loop are its forwards."""


class Recompute(Loop):
    """Every step recomputes the canvas. With `block_causal` a position sees its own block and earlier ones."""

    def __init__(self, model: nn.Module, task: Task, *, watch: bool = False, block_causal: bool = False) -> None:
        super().__init__(model, task, watch=watch)
        ids = task.block_ids
        self.mask = (ids[:, None] >= ids[None, :])[None, None] if block_causal else None

    def block(self, start: int, choose: Choose) -> None:
        for _ in range(self.task.steps):
            choose(self.forward(0, self.tokens.shape[1], self.mask), 0, start + self.task.block_length)


class UpToBlock(Recompute):
    """Every step recomputes the canvas up to the end of the block."""

    def block(self, start: int, choose: Choose) -> None:
        end = start + self.task.block_length
        mask = None if self.mask is None else self.mask[:, :, :end, :end]
        for _ in range(self.task.steps):
            choose(self.forward(0, end, mask), 0, end)


class Prefix(Loop):
    """A block's first step recomputes everything; later ones recompute from the block on, over the keys before it."""

    def block(self, start: int, choose: Choose) -> None:
        L, end = self.tokens.shape[1], start + self.task.block_length
        self.keys.how = "fill"
        choose(self.forward(0, L), 0, end)
        self.keys.crop(start)
        self.keys.how = "beside"
        for _ in range(self.task.steps - 1):
            choose(self.forward(start, L), start, end)


class Dual(Loop):
    """A block's first step recomputes everything; later ones recompute the block, over the keys on both sides."""

    def block(self, start: int, choose: Choose) -> None:
        L, end = self.tokens.shape[1], start + self.task.block_length
        self.keys.how = "fill"
        choose(self.forward(0, L), 0, end)
        self.keys.how, self.keys.at = "replace", start
        for _ in range(self.task.steps - 1):
            choose(self.forward(start, end), start, end)


class Committed(Loop):
    """Block-causal: the prompt is computed once, and a finished block is computed once more for its keys."""

    def open(self, start: int) -> None:
        self.keys.how = "fill"
        self.forward(0, start)

    def block(self, start: int, choose: Choose) -> None:
        end = start + self.task.block_length
        self.keys.how = "beside"
        for _ in range(self.task.steps):
            choose(self.forward(start, end), start, end)
        if end < self.tokens.shape[1]:
            self.keys.how = "append"
            self.forward(start, end)
