"""How large a session is: what its rows may need at most, and the plan and the shapes that serve any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .call import Decoder
from .decoding.budget import MemoryPlan, memory_plan
from .decoding.memory import GIB, SMALL, BatchTooLarge, free_bytes, most_bytes
from .decoding.plan import Plan, block_length_of, first_mask, placed_rows, plan_of
from .decoding.progress import planned_grid
from .decoding.shapes import Grid
from .decoding.slots import idle_canvas
from .draws import sampling_of
from .limits import shown
from .models.cache import Paging
from .presets.caches import Sizes
from .requests import Requests

# Shapes are planned for so many lengths, where nobody says which to expect.
PLANNED_LENGTHS = 12
# The most lengths that shapes are planned for.
MOST_LENGTHS = 256


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a session has room for; the fields are arguments of `Session`."""

    slots: int
    max_positions: int
    max_new_tokens: int
    infill: bool
    share_prefixes: bool
    page_size: int
    cache_positions: int | None

    def check(self, batch: Requests, decoder: Decoder) -> None:
        """Raises ValueError for rows that are larger than the session has room for."""
        for canvas, opened in zip(batch.canvases, batch.opened):
            new = len(canvas) - first_mask(canvas, decoder.handle.diffusion.mask_token_id)
            if len(opened) > self.max_positions:
                raise ValueError(
                    f"a row with its new tokens must have at most max_positions={self.max_positions} positions, got "
                    f"{len(opened)}"
                )
            if new > self.max_new_tokens:
                raise ValueError(
                    f"a row must have at most the session's max_new_tokens={self.max_new_tokens} positions from its "
                    f"first mask on, got {new}"
                )


def planned(
    decoder: Decoder, asked: Requests, capacity: Capacity, lengths: Sequence[tuple[int, int]] | None
) -> tuple[Plan, Grid, Paging | None]:
    """The plan of a session, its shapes, and how its cache is cut into pages. Raises ValueError."""
    preset, diffusion, slots = decoder.preset, decoder.handle.diffusion, capacity.slots
    cache, new = preset.operation, capacity.max_new_tokens
    check_sharing(decoder, capacity)
    check_rotary(decoder, capacity)

    # 1. The most of everything. A first block of "abs" may begin before the first mask, and a last one may be whole.
    length = block_length_of(preset, diffusion, new)
    one_block = preset.single_block or (preset.block_length or diffusion.block_length) is None
    rest = new if one_block else new + 2 * (length - 1)
    width = capacity.max_positions
    if cache.reused is not None:
        # Slots that are hidden one by one are those of whole pages.
        width = -(-width // capacity.page_size) * capacity.page_size
    rest = min(rest, width)
    sizes = Sizes(
        canvas=width,
        prompt=width,
        opened=width,
        rest=rest,
        block=min(length, width),
        # A canvas may have blocks without masks between blocks with masks.
        waiting=-(-rest // length) * length if capacity.infill else length,
        before=int(diffusion.logits_row == "previous"),
        vicinity=preset.vicinity,
        pipeline=preset.pipeline,
    )
    steps = preset.steps_per_block or (max(1, new) if one_block else length)
    plan = plan_of(preset, diffusion, sizes, block_length=length, rows=slots, steps=steps, device=decoder.device)
    if capacity.share_prefixes:
        plan = dataclasses.replace(plan, prefilled=torch.zeros_like(plan.first))

    # 2. The shapes, for rows of the lengths that are expected.
    canvases = []
    for prompt, tokens in expected_lengths(capacity, lengths):
        canvas = torch.full((prompt + tokens,), diffusion.mask_token_id)
        canvas[:prompt] = int(diffusion.mask_token_id == 0)
        canvases.append(canvas)
    state = placed_rows(canvases, width, length, preset, diffusion)
    grid = planned_grid(decoder.handle, plan, state, refilled=True)

    # 3. The pages.
    paging, size = None, capacity.page_size
    if cache.stores and (capacity.cache_positions is not None or capacity.share_prefixes):
        # Without either, every slot has a row's cache of its own, in one piece, which is read faster.
        whole = slots * -(-width // size)
        pages = whole if capacity.cache_positions is None else -(-capacity.cache_positions // size)
        paging = Paging(size, plan.copies * min(pages, whole) if not capacity.share_prefixes else pages)
    elif capacity.cache_positions is not None:
        raise ValueError(
            f"Session: cache_positions goes with a preset that keeps keys, got cache={preset.cache!r} of preset "
            f"{preset.name}"
        )
    return plan, grid, paging


def planned_memory(decoder: Decoder, asked: Requests, plan: Plan, grid: Grid, paging: Paging | None) -> MemoryPlan:
    """What a session takes of the memory where its rows ask for as much as any."""
    preset = decoder.preset
    idle = asked.idle([idle_canvas(plan)] * plan.first.shape[0])
    B = len(idle.canvases)
    if preset.drafts == 1 and not any(policy.greedy_only for policy in preset.policies):
        idle = dataclasses.replace(idle, temperature=[1.0] * B)
    idle = dataclasses.replace(idle, min_new_tokens=[1] * B)
    return memory_plan(decoder.handle, plan, grid, sampling_of(idle, plan, decoder.device), paging)


def check_memory(
    decoder: Decoder,
    asked: Requests,
    capacity: Capacity,
    sizes: tuple[Plan, Grid, Paging | None],
    lengths: Sequence[tuple[int, int]] | None,
    memory: int | None,
) -> None:
    """Raises BatchTooLarge for a session that needs more memory than `memory`, or than is free where this is None."""
    handle, diffusion = decoder.handle, decoder.handle.diffusion
    most = most_bytes(handle, decoder.preset, diffusion, capacity.slots, capacity.max_positions)
    if memory is None and most < SMALL:
        return

    def short(sizes: tuple[Plan, Grid, Paging | None]) -> tuple[MemoryPlan, torch.device, int] | None:
        """The first device that has too little, and what it has."""
        plan = planned_memory(decoder, asked, *sizes)
        for device, parts in plan.parts.items():
            left = memory
            if left is None:
                free = free_bytes(device)
                left = None if free is None else free + parts["weights"]
            if left is not None and plan.total(device) > left:
                return plan, device, left
        return None

    found = short(sizes)
    if found is None:
        return
    plan, device, left = found
    # What would fit: fewer positions in the cache, as long as a row of full length has its own; else fewer slots.
    other, advice = capacity, "not even slots=1 would fit"
    positions = (capacity.cache_positions or capacity.slots * capacity.max_positions) // 2
    while sizes[0].cache.stores and positions >= capacity.max_positions:
        other = dataclasses.replace(capacity, cache_positions=positions)
        if short(planned(decoder, asked, other, lengths)) is None:
            advice = f"cache_positions={positions} would fit"
            break
        positions //= 2
    else:
        slots = capacity.slots // 2
        while slots:
            other = dataclasses.replace(capacity, slots=slots, cache_positions=None)
            if short(planned(decoder, asked, other, lengths)) is None:
                advice = f"slots={slots} would fit"
                break
            slots //= 2
    raise BatchTooLarge(
        f"Session: weights, buffers and the largest step must fit {left / GIB:.2f} GiB of {device}, got "
        f"{capacity.slots} slots of {capacity.max_positions} positions, which take {plan}; {advice}"
    )


def expected_lengths(capacity: Capacity, lengths: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """(prompt, new tokens) of the rows that shapes are planned for."""
    most, new = capacity.max_positions, capacity.max_new_tokens
    if lengths is None:
        # Short ones lie closer together, so that none wastes much of its own length.
        shares = [((step + 1) / PLANNED_LENGTHS) ** 2 for step in range(PLANNED_LENGTHS)]
        prompts = [max(1, round(share * (most - new))) for share in shares]
        found = [(prompt, max(1, new >> step % 3)) for step, prompt in enumerate(prompts)]
    else:
        found = []
        for pair in lengths:
            numbers = list(pair) if isinstance(pair, (list, tuple)) else []
            is_pair = len(numbers) == 2 and all(type(number) is int and number >= 1 for number in numbers)
            if not is_pair or sum(pair) > most or pair[1] > new:
                raise ValueError(
                    f"Session: lengths must be pairs (prompt, new tokens) of whole numbers >= 1, within max_positions="
                    f"{most} and max_new_tokens={new}, got {shown(pair)}"
                )
            found.append(tuple(pair))
        found = found[:: -(-len(found) // MOST_LENGTHS)] if found else [(1, 1)]
    if capacity.share_prefixes:
        # What is left of a prompt whose beginning is there may be short.
        found += [(max(1, prompt >> shift), tokens) for prompt, tokens in found for shift in (2, 4)]
    return found


def check_sharing(decoder: Decoder, capacity: Capacity) -> None:
    """Raises ValueError where rows cannot share the beginnings of their prompts."""
    preset, diffusion = decoder.preset, decoder.handle.diffusion
    if not capacity.share_prefixes:
        return
    if diffusion.visibility != "block":
        raise ValueError(
            f"Session: share_prefixes needs a block-causal model, whose prompts see nothing behind them, got preset "
            f"{preset.name} on a model of visibility {diffusion.visibility!r}"
        )
    if not preset.operation.stores or preset.operation.grows_stale:
        raise ValueError(
            f"Session: share_prefixes needs a cache whose keys never change, got cache={preset.cache!r} of preset "
            f"{preset.name}"
        )


def check_rotary(decoder: Decoder, capacity: Capacity) -> None:
    """Raises ValueError where rotary frequencies would follow the longest row of a forward: those of "longrope" and
    "dynamic" do beyond the positions that the model was first trained for."""
    config = decoder.handle.model.config
    rotary = getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type", "default")
    trained = rotary.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind in ("dynamic", "longrope") and capacity.max_positions > trained:
        raise ValueError(
            f"Session: max_positions must be at most {trained} for rope_type={kind!r}, beyond which all rows of a "
            f"forward would turn by the longest of them, got max_positions={capacity.max_positions}"
        )
