"""What a window stores and sees, worked out on the host: which rows are attended in one product, where their keys lie,
and who is hidden from whom."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..window import Mode, Window

# Where slots or positions are read: a range, their numbers, or None for all.
Places = slice | Tensor | None
# Where the keys of a cache in pages lie in its memory, in steps of `step`, and where the values do.
InMemory = tuple[Tensor, Tensor]

# A row joins rows of other lengths in one product while the padding costs at most so many multiplications a row: what
# a product of its own costs, about 20 us on a core of an EPYC (measured with torch 2.13).
CALL = 1 << 19
# Slots that lie in more ranges than these are read by their numbers.
RANGES = 4
# A sight of more bytes is not kept beyond its window.
KEPT = 1 << 20


@dataclasses.dataclass(frozen=True)
class Store:
    """Keys to store: cache[cache_rows, :, slots] = k[rows, :, positions], ranges or numbers [n] each; of `is_whole` all
    of k. `in_memory` is where those slots of every head lie if the cache is in pages."""

    rows: int | slice | Tensor
    positions: slice | Tensor
    cache_rows: int | slice | Tensor
    slots: slice | Tensor
    is_whole: bool = False
    in_memory: InMemory | None = None


@dataclasses.dataclass(frozen=True)
class Product:
    """Rows that are attended in one product.

    Attributes:
        rows: rows of the batch.
        queries: their positions in the window.
        cache_rows: their rows of the cache.
        slots: where keys lie in the cache, in the order of the mask's columns.
        positions: the window positions whose keys follow those of the cache.
        joins: whether any do; if not, the cache holds all keys.
        mask: [rows, 1, queries, keys], 0 where a query sees a key and -inf elsewhere; None = every query sees all.
        dead_keys: numbers among the joined keys [rows * H_kv * keys] of those that may hold anything; None = there are
            none.
        dead_queries: [rows, 1, queries, 1] bool; None = all are live.
        in_memory: [rows, H_kv, keys]: where those of the cache lie if that is in pages; anywhere for dead keys and for
            the keys of the window.
    """

    rows: Places
    queries: Places
    cache_rows: Places
    slots: tuple[Places, ...]
    positions: Places
    joins: bool
    mask: Tensor | None
    dead_keys: Tensor | None = None
    dead_queries: Tensor | None = None
    in_memory: InMemory | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = (*self.slots, self.rows, self.queries, self.mask, self.dead_keys, self.dead_queries)
        tensors += tuple(set(self.in_memory or ()))
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


class Sight(NamedTuple):
    """What a window stores and sees.

    Attributes:
        form: what was checked of the call besides its window: what this follows from is part of that.
        mode: mode of the window.
        layout: shape, strides and device of each of its tensors.
        fields: names of the tensors whose numbers this follows from.
        content: their bytes.
        memory: arrays that share their memory.
        begins: their addresses.
        precision: dtype of the products.
        stores: what is stored first.
        products: every live query is in exactly one.
        is_whole: whether a single product has the shape of the result.
    """

    form: tuple | None
    mode: Mode
    layout: dict[str, tuple]
    fields: tuple[str, ...]
    content: list[bytes]
    memory: list[np.ndarray]
    begins: list[int]
    precision: torch.dtype
    stores: tuple[Store, ...]
    products: tuple[Product, ...]
    is_whole: bool

    def __reduce__(self) -> tuple:
        """A deep copy and a pickle of a window have None in place of its sight, whose memory is that of the window."""
        return type(None), ()


class _Row(NamedTuple):
    """A row with live positions.

    Attributes:
        slots: the slot behind the last one that it sees.
        queries: the position behind its last live one.
        row: its number in the batch.
        cache_row: its number in the cache.
        pairs: how many keys its queries look at, all together.
    """

    slots: int
    queries: int
    row: int
    cache_row: int
    pairs: int


class Sizes(NamedTuple):
    """What a sight follows from besides the window.

    Attributes:
        H_kv: key/value heads.
        work: multiplications of a query with a key and a value, over all heads.
        precision: dtype of the masks.
        R, S_max: rows and slots of the cache; None = there is no cache.
        sliding_window: as given to `block_attention`.
        strides: those of k_cache and of v_cache.
    """

    H_kv: int
    work: int
    precision: torch.dtype
    R: int | None
    S_max: int | None
    sliding_window: int | None
    strides: tuple[tuple[int, ...], ...] = ()


# The sight that was made last, without its memory: most steps of a decoder see what the step before saw.
_latest: Sight | None = None


def known_sight(window: Window, form: tuple) -> Sight | None:
    """The sight that stays beside the window for the layers to come, or the one made last, if it is of the same form
    and of the same numbers; None if there is none."""
    parts = vars(window)
    sight, latest = parts.get("_sight"), _latest
    # Comparing bytes finds what was written through an array or `.data` too, which no version of a tensor counts.
    if sight is not None and sight.form == form and [parts[name].data_ptr() for name in sight.fields] == sight.begins:
        if [x.tobytes() for x in sight.memory] == sight.content:
            return sight
    if latest is None or (latest.form, latest.mode, latest.layout) != (form, window.mode, _layout(window)):
        return None
    memory = [parts[name].numpy() for name in latest.fields]
    return _kept(window, latest, memory) if [x.tobytes() for x in memory] == latest.content else None


def new_sight(window: Window, form: tuple | None, sizes: Sizes) -> Sight:
    """The window's sight, which stays beside the window in place of an earlier one."""
    global _latest
    fields = ["q_block", "q_len"] if window.mode in ("full", "block") else ["q_pos", "q_block", "q_len"]
    if sizes.S_max is not None:
        fields += ["kv_slot", "kv_len", "replaced", "cache_row"]
        fields += [name for name in ("kept", "page_table") if getattr(window, name) is not None]
    memory = [getattr(window, name).numpy() for name in fields]
    content = [x.tobytes() for x in memory]
    stores, products = _alike(window, sizes) or _unlike(window, sizes)
    if "page_table" in fields:
        stores, products = _in_pages(window, sizes, stores, products)
    is_whole = len(products) == 1 and products[0].rows is None and products[0].queries is None
    sight = Sight(
        form, window.mode, _layout(window), tuple(fields), content, [], [], sizes.precision, stores, products, is_whole
    )
    if form is not None and sum(product.nbytes for product in products) + sum(map(len, content)) <= KEPT:
        _latest = sight
    return _kept(window, sight, memory)


def _kept(window: Window, sight: Sight, memory: list[np.ndarray]) -> Sight:
    """The sight of the window's own memory, which stays beside the window."""
    parts = vars(window)
    sight = sight._replace(memory=memory, begins=[parts[name].data_ptr() for name in sight.fields])
    # A field of the dataclass would be an argument of every operator (`library`), and a copy would take it along.
    parts["_sight"] = sight
    return sight


def _layout(window: Window) -> dict[str, tuple]:
    return {name: (x.shape, x.stride(), x.device) for name, x in window.tensors().items()}


def at(tensor: Tensor, dim: int, places: Places) -> Tensor:
    """The tensor at `places` of a dimension: a view of a range, a copy of numbers."""
    if places is None:
        return tensor
    if isinstance(places, slice):
        return tensor.narrow(dim, places.start, places.stop - places.start)
    return tensor.index_select(dim, places)


def step(strides: tuple[int, ...]) -> int:
    """Elements from one place in a cache's memory to the next: what every stride but the last is a multiple of."""
    return math.gcd(*strides[:3])


def _alike(window: Window, sizes: Sizes) -> tuple[tuple[Store, ...], tuple[Product, ...]] | None:
    """The stores and the product of rows that are all alike, worked out from where ranges begin and end; None of other
    windows.

    The live positions of every row that has some are its first ones, as many in each. All see the same slots. All store
    every live position, in one range of slots that is the same in each, or none does.
    """
    (B, W), S_max = window.shape, sizes.S_max
    lengths = window.q_len.tolist()
    rows = [b for b, length in enumerate(lengths) if length > 0]
    if not rows:
        return (), ()
    count = min(lengths[rows[0]], W)
    of_rows = operator.itemgetter(*rows) if len(rows) > 1 else lambda numbers: (numbers[rows[0]],)
    blocks = [numbers[:count] for numbers in of_rows(window.q_block.tolist())]
    lowest = min(map(min, blocks))
    is_odd = window.kept is not None or sizes.sliding_window is not None or lowest < 0
    if is_odd or not _are_equal(of_rows(lengths)):
        return None

    # 1. The slots that are seen, and those that are stored.
    seen, slot, cache_rows = [], -1, rows
    if S_max is not None:
        kv_lens, replaced, cache_rows = (
            of_rows(x.tolist()) for x in (window.kv_len, window.replaced, window.cache_row)
        )
        slots = [numbers[:count] for numbers in of_rows(window.kv_slot.tolist())]
        slot = slots[0][0]
        expected = [-1] * count if slot < 0 else list(range(slot, slot + count))
        if slots[0] != expected or not all(map(_are_equal, (kv_lens, replaced, slots))):
            return None
        end = max(0, min(kv_lens[0], S_max))
        hidden, shown = max(0, replaced[0][0]), min(replaced[0][1], end)
        seen = [(0, hidden), (shown, end)] if hidden < shown else [(0, end)]
        seen = [(begin, end) for begin, end in seen if begin < end]
    stores = ()
    if slot >= 0:
        to, of = (_places(x) for x in (cache_rows, rows))
        stores = (Store(of, slice(0, count), to, slice(slot, slot + count), is_whole=(len(rows), count) == (B, W)),)

    # 2. Once the window is stored, all that is seen lies in the cache. If that is a range, nothing is copied.
    before, joins = sum(end - begin for begin, end in seen), True
    keys = before + count
    if seen and slot >= 0:
        pieces = sorted([*seen, (slot, slot + count)])
        if all(piece[1] == following[0] for piece, following in itertools.pairwise(pieces)):
            joins, before = False, sum(end - begin for begin, end in seen if end <= slot)
            seen = [(pieces[0][0], pieces[-1][1])]

    # 3. Who looks at whom. In mode "full", and within one block, all do.
    mask = None
    if window.mode == "causal" or (window.mode != "full" and max(map(max, blocks)) > lowest):
        # Rows of the same blocks have one mask, but for a shadow, which looks at positions too.
        looking = rows[:1] if window.mode == "block" and _are_equal(blocks) else rows
        hidden = _hidden(window, _places(looking), slice(0, count))
        mask = torch.zeros(len(looking), 1, count, keys, dtype=sizes.precision)
        mask.narrow(3, before, count).masked_fill_(hidden.unsqueeze(1), -torch.inf)
    live = None if count == W else slice(0, count)
    product = Product(
        rows=_places(rows, B),
        queries=live,
        cache_rows=_places(cache_rows, sizes.R),
        slots=tuple(None if (begin, end) == (0, S_max) else slice(begin, end) for begin, end in seen),
        positions=live,
        joins=joins,
        mask=mask,
    )
    return stores, (product,)


def _are_equal(numbers: Sequence) -> bool:
    return numbers.count(numbers[0]) == len(numbers)


def _unlike(window: Window, sizes: Sizes) -> tuple[tuple[Store, ...], tuple[Product, ...]]:
    """The stores and the products of any window."""
    # 1. What is live [B, W], and what is seen of the cache [B, slots].
    q_block, q_len = window.q_block.numpy(), window.q_len.numpy()
    B, W = q_block.shape
    live = (np.arange(W) < q_len[:, None]) & (q_block >= 0)
    seen, stores, cache_row = np.zeros((B, 0), dtype=bool), (), q_len
    if sizes.S_max is not None:
        cache_row, kv_len, replaced = (x.numpy() for x in (window.cache_row, window.kv_len, window.replaced))
        slot = np.arange(max(0, min(int(kv_len.max()), sizes.S_max)))
        seen = (slot < kv_len[:, None]) & ((slot < replaced[:, :1]) | (slot >= replaced[:, 1:]))
        if sizes.sliding_window is not None:
            seen &= slot > kv_len[:, None] - sizes.sliding_window
        if window.kept is not None:
            seen &= window.kept.numpy()[:, : len(slot)]
        stores = _stores(live & (window.kv_slot.numpy() >= 0), window.kv_slot.numpy(), cache_row)

    # 2. Which rows are attended together.
    lives, sees = live.sum(1).tolist(), seen.sum(1).tolist()
    rows = [
        _Row(slots, queries, row, to, lives[row] * (lives[row] + sees[row]))
        for row, (slots, queries, to) in enumerate(zip(_ends(seen), _ends(live), cache_row.tolist()))
        if lives[row]
    ]
    groups = _groups(rows, sizes.work)
    return stores, tuple(
        _alone(window, sizes, group[0], live, seen) if len(group) == 1 else _together(window, sizes, group, live, seen)
        for group in groups
    )


def _ends(flags: np.ndarray) -> list[int]:
    """The place behind the last flag of each row [B, N]; 0 = none."""
    return (np.arange(1, flags.shape[1] + 1) * flags).max(1, initial=0).tolist()


def _stores(stored: np.ndarray, slots: np.ndarray, cache_row: np.ndarray) -> tuple[Store, ...]:
    """What is stored [B, W]: ranges where one row stores, and else numbers, for one write of all."""
    rows, positions = stored.nonzero()
    if not len(rows):
        return ()
    slots = slots[rows, positions]
    if rows[0] == rows[-1]:
        return (Store(int(rows[0]), _places(positions), int(cache_row[rows[0]]), _places(slots)),)
    return (Store(*map(_numbers, (rows, positions, cache_row[rows], slots))),)


def _groups(rows: list[_Row], work: int) -> list[list[_Row]]:
    """The rows of every product: rows of similar lengths, as long as the padding costs less than products of their
    own."""
    groups: list[list[_Row]] = []
    queries = pairs = 0
    for row in sorted(rows):
        queries, pairs = max(queries, row.queries), pairs + row.pairs
        count = len(groups[-1]) + 1 if groups else 1
        padding = count * queries * (row.slots + queries) - pairs
        if groups and padding * work <= count * CALL:
            groups[-1].append(row)
        else:
            groups.append([row])
            queries, pairs = row.queries, row.pairs
    return [sorted(group, key=lambda row: row.row) for group in groups]


def _alone(window: Window, sizes: Sizes, row: _Row, live: np.ndarray, seen: np.ndarray) -> Product:
    """The product of a single row: of exactly what is live and seen."""
    (B, W), S_max = window.shape, sizes.S_max
    live, seen = live[row.row].nonzero()[0], seen[row.row].nonzero()[0]
    order, joins, mask = None, True, None
    slots = _ranges(seen, S_max)
    stored = window.kv_slot[row.row].numpy()[live]
    if len(seen) and (stored >= 0).all():
        # Once the window is stored, all that is seen lies in the cache. If that is a range, nothing is copied.
        every = np.concatenate([seen, stored])
        begin, end = int(every.min()), int(every.max()) + 1
        if end - begin == len(every):
            order, joins, slots = np.argsort(every), False, (_places(range(begin, end), S_max),)
    if window.mode != "full":
        hidden = _hidden(window, slice(row.row, row.row + 1), _numbers(live))[0].numpy()
        sees = np.concatenate([np.ones((len(live), len(seen)), dtype=bool), ~hidden], 1)
        mask = _mask(sees if order is None else sees[:, order], sizes.precision)[None, None] if hidden.any() else None
    places = _places(live, W)
    return Product(
        rows=_places([row.row], B),
        queries=places,
        cache_rows=_places([row.cache_row], sizes.R),
        slots=slots,
        positions=places,
        joins=joins,
        mask=mask,
    )


def _together(window: Window, sizes: Sizes, group: list[_Row], live: np.ndarray, seen: np.ndarray) -> Product:
    """The product of several rows: of the first slots and the first positions, as many as any row has."""
    B, W = window.shape
    numbers = [row.row for row in group]
    queries, slots = max(row.queries for row in group), max(row.slots for row in group)
    live = live[numbers, :queries]
    readable = np.concatenate([seen[numbers, :slots], live], 1)
    dead_keys, dead_queries, places = None, None, _places(numbers)
    mask = torch.zeros(len(group), 1, queries, slots + queries, dtype=sizes.precision)
    if not readable.all():
        unreadable = torch.from_numpy(~readable)[:, None]
        mask.masked_fill_(unreadable.unsqueeze(1), -torch.inf)
        dead_keys = unreadable.expand(-1, sizes.H_kv, -1).flatten().nonzero()[:, 0]
    if window.mode != "full":
        hidden = _hidden(window, places, slice(0, queries))
        mask.narrow(3, slots, queries).masked_fill_(hidden.unsqueeze(1), -torch.inf)
    if not live.all():
        # The result of a dead query is replaced. Of a query that sees nothing it would be zero, which is looked into.
        dead_queries = torch.from_numpy(~live)[:, None, :, None]
        mask.masked_fill_(dead_queries, 0.0)
    return Product(
        rows=None if len(group) == B else places,
        queries=_places(range(queries), W),
        cache_rows=_places([row.cache_row for row in group], sizes.R),
        slots=(_places(range(slots), sizes.S_max),) if slots else (),
        positions=_places(range(queries), W),
        joins=True,
        mask=mask if mask.any() else None,
        dead_keys=dead_keys,
        dead_queries=dead_queries,
    )


def _hidden(window: Window, rows: slice | Tensor, positions: slice | Tensor) -> Tensor:
    """[rows, queries, positions] bool: whether a query does not look at a window position though both are live; of
    modes other than "full"."""
    order = (window.q_pos if window.mode == "causal" else window.q_block)[rows][:, positions]
    hidden = order.unsqueeze(1) > order.unsqueeze(2)
    if window.mode == "shadow":
        position = window.q_pos[rows][:, positions]
        is_twin = position.unsqueeze(1) == position.unsqueeze(2)
        hidden |= is_twin & (order.unsqueeze(1) < order.unsqueeze(2))
    return hidden


def _in_pages(
    window: Window, sizes: Sizes, stores: tuple[Store, ...], products: tuple[Product, ...]
) -> tuple[tuple[Store, ...], tuple[Product, ...]]:
    """The same stores and products, which say where their slots lie in memory."""
    # Row, head and slot of each key of a cache in one piece: what a store or a product takes of these are those of its
    # keys. Only the heads are all there, so that pages are looked up once for all heads.
    R, H_kv, S_max = sizes.R, sizes.H_kv, sizes.S_max
    indices = (
        torch.arange(R).view(-1, 1, 1).expand(R, 1, S_max),
        torch.arange(H_kv).view(1, -1, 1).expand(R, H_kv, S_max),
        torch.arange(S_max).expand(R, 1, S_max),
    )
    table, page_size = window.page_table.long(), S_max // window.page_table.shape[1]

    def in_memory(taken: list[Tensor], new: int = 0, dead: Tensor | None = None) -> InMemory:
        row, head, slot = taken
        parts, found = (table[row, slot // page_size], head, slot % page_size), {}
        for strides in set(sizes.strides):
            places = sum(part * (stride // step(strides)) for part, stride in zip(parts, strides))
            found[strides] = places = F.pad(places, (0, new))
            if dead is not None:
                # Their page may be any number.
                places.view(-1).index_fill_(0, dead, 0)
        keys, values = (found[strides] for strides in sizes.strides)
        return keys, values

    stores = tuple(
        dataclasses.replace(store, in_memory=in_memory([x[store.cache_rows, :, store.slots] for x in indices]))
        for store in stores
    )
    paged = []
    for product in products:
        # Of no slot, nothing is read of the cache.
        if product.slots:
            taken = [
                torch.cat([at(at(x, 2, part), 0, product.cache_rows) for part in product.slots], 2) for x in indices
            ]
            new = at(window.q_pos, 1, product.positions).shape[1] if product.joins else 0
            product = dataclasses.replace(product, in_memory=in_memory(taken, new, product.dead_keys))
        paged.append(product)
    return stores, tuple(paged)


def _mask(sees: np.ndarray, precision: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=precision).masked_fill_(torch.from_numpy(~sees), -torch.inf)


def _places(numbers: Sequence[int] | np.ndarray, size: int | None = None) -> Places:
    """The places of numbers in any order: a range where they are one, None where they are all of `size`."""
    numbers = list(numbers) if not isinstance(numbers, np.ndarray) else numbers.tolist()
    begin, count = numbers[0], len(numbers)
    if numbers == list(range(begin, begin + count)):
        return None if count == size else slice(begin, begin + count)
    return torch.tensor(numbers)


def _ranges(numbers: np.ndarray, size: int | None) -> tuple[Places, ...]:
    """The places of ascending numbers as few ranges, if few are enough."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    if len(cuts) >= RANGES:
        return (_numbers(numbers),)
    return tuple(_places(part, size) for part in np.split(numbers, cuts) if len(part))


def _numbers(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64))
