"""The pages of a cache: which are free, which a row has, and which hold beginnings of prompts that rows share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence

import torch

from ..models.cache import KVCache, Paging


@dataclasses.dataclass(eq=False)
class _Kept:
    """A page of a prompt that is kept for prompts that begin alike.

    Attributes:
        ids: token ids of its positions; fewer than a page has where the prompt ends in it.
        page: the page.
        parent: the page before it; None = the beginning of a prompt.
        children: the pages after it, by their token ids.
        used: when it was asked for last.
    """

    ids: tuple[int, ...]
    page: int
    parent: _Kept | None
    children: dict[Hashable, _Kept] = dataclasses.field(default_factory=dict)
    used: int = 0


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt whose keys are in the cache.

    Attributes:
        length: its positions.
        pages: the pages that it fills.
        rest: the page that holds its last positions, where these do not fill one; else None.
    """

    length: int = 0
    pages: tuple[int, ...] = ()
    rest: int | None = None

    def of_whole_pages(self, page_size: int, block_length: int, offset: int) -> Prefix:
        """As much of it as fills pages, and ends with a block."""
        length = len(self.pages) * page_size
        while length and (length - offset) % block_length:
            length -= page_size
        return Prefix(length, self.pages[: length // page_size])


class Pages:
    """A pool of pages of one size.

    A row takes all pages that it will ever need when it is admitted, and gives them back when it is done, so that rows
    in work never wait for each other. A page may have several holders: rows, and the prefixes that are kept. A page
    that only a prefix holds is free for a row; the one that was not asked for longest goes first.

    Attributes:
        page_size: slots of a page.
        count: pages of the pool.
    """

    def __init__(self, paging: Paging) -> None:
        self.page_size, self.count = paging
        self._free = list(range(self.count))[::-1]
        self._holders = [0] * self.count
        self._roots: dict[Hashable, _Kept] = {}
        self._kept: set[_Kept] = set()
        self._clock = itertools.count(1)

    def needed(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self.page_size)

    @property
    def free(self) -> int:
        """Pages that rows could take."""

        def droppable(kept: _Kept) -> tuple[int, bool]:
            """Of a kept page and those after it, how many may go, and whether all of them may."""
            counts = [droppable(child) for child in kept.children.values()]
            number, all_of_them = sum(count for count, _ in counts), all(whole for _, whole in counts)
            goes = all_of_them and self._holders[kept.page] == 1
            return number + goes, goes

        return len(self._free) + sum(droppable(kept)[0] for kept in self._roots.values())

    @property
    def kept(self) -> int:
        """Pages that hold beginnings of prompts."""
        return len(self._kept)

    def take(self, count: int, beside: Prefix = Prefix()) -> list[int] | None:
        """Takes pages, and holds those that a prefix fills; None, and takes none, if so many are not free beside the
        prefix."""
        self.hold(beside.pages)
        rest = [] if beside.rest is None else [beside.rest]
        self.hold(rest)
        taken = self._taken(count)
        self.give(rest if taken is not None else [*rest, *beside.pages])
        return taken

    def _taken(self, count: int) -> list[int] | None:
        if self.free < count:
            return None
        while len(self._free) < count:
            unused = (kept for kept in self._kept if self._holders[kept.page] == 1 and not kept.children)
            self._drop(min(unused, key=lambda kept: kept.used))
        taken = [self._free.pop() for _ in range(count)]
        self.hold(taken)
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """Holds pages once more, which somebody holds already or which were just taken."""
        for page in pages:
            self._holders[page] += 1

    def give(self, pages: Sequence[int]) -> None:
        """Gives pages back; the last holder frees them."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def keep(self, kind: Hashable, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Keeps the keys of the beginning of a prompt, which are in these pages, for prompts of the same kind."""
        siblings, parent = self._roots, None
        for chunk, page in zip(self._chunks(ids), pages):
            key = (kind, chunk) if parent is None else chunk
            if key not in siblings:
                siblings[key] = _Kept(chunk, page, parent)
                self._kept.add(siblings[key])
                self.hold([page])
            parent = siblings[key]
            parent.used = next(self._clock)
            siblings = parent.children

    def _chunks(self, ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        return (tuple(ids[begin : begin + self.page_size]) for begin in range(0, len(ids), self.page_size))

    def find(self, kind: Hashable, ids: Sequence[int], block_length: int, offset: int) -> Prefix:
        """The longest kept beginning of a prompt that ends with a block.

        Args:
            kind: what else the keys of a prompt depend on.
            ids: as much of the prompt as may be shared.
            block_length: positions of a block.
            offset: position at which some block ends.
        """
        pages, matched, siblings, parent = [], 0, self._roots, None
        for chunk in self._chunks(ids):
            node = siblings.get((kind, chunk) if parent is None else chunk)
            if node is None:
                # The page that begins most like it.
                alike = [n for key, n in siblings.items() if parent is not None or key[0] == kind]
                node = max(alike, key=lambda n: common(n.ids, chunk), default=None)
                if node is None or not common(node.ids, chunk):
                    break
            node.used = next(self._clock)
            pages.append(node.page)
            matched += common(node.ids, chunk)
            if node.ids != chunk:
                break
            siblings, parent = node.children, node
        length = max(0, ends_with_a_block(matched, block_length, offset))
        whole = length // self.page_size
        return Prefix(length, tuple(pages[:whole]), pages[whole] if length % self.page_size else None)

    def forget(self) -> None:
        """Forgets all prefixes: their keys are not those of the model any more."""
        for kept in self._kept:
            self.give([kept.page])
        self._kept.clear()
        self._roots.clear()

    def _drop(self, kept: _Kept) -> None:
        siblings = self._roots if kept.parent is None else kept.parent.children
        key = next(key for key, node in siblings.items() if node is kept)
        del siblings[key]
        self._kept.remove(kept)
        self.give([kept.page])


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items two sequences begin with that are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def ends_with_a_block(length: int, block_length: int, offset: int) -> int:
    """The most positions, at most `length`, after which a block ends, where one ends at `offset`."""
    return length - (length - offset) % block_length


def set_pages(cache: KVCache, row: int, pages: Sequence[int]) -> None:
    """Gives a row its pages, in the order of its slots."""
    cache.page_table[row, : len(pages)].copy_(torch.tensor(pages, dtype=torch.int32))


def copy_page(cache: KVCache, source: int, target: int) -> None:
    """Copies the keys and values of a page."""
    for layer in cache.layers:
        for buffer in (layer.keys, layer.values):
            buffer[target].copy_(buffer[source])
