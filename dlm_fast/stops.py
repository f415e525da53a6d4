"""Stop strings: where a text ends by them, and which ids spell what is left."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

# A character that is not spelled to its end, or bytes that are none.
REPLACEMENT = "\ufffd"
# What `clean_up_tokenization_spaces` joins is found at most so many characters before a text's end (" n't" without its
# last).
CLEANED_TAIL = 3


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """What ends a response: the earliest of `strings` in its text, and the first of `ids`, special tokens, which no
    text shows.

    A text is `tokenizer.decode(ids, skip_special_tokens=True)`. Where two strings begin at one place, both cut there.

    Attributes:
        tokenizer: decodes.
        byte_ids: tokens of one byte ("<0xE2>"); a run of them is text, or not, as a whole. special_ids: what a text
            leaves out, which does not end such a run.
    """

    strings: tuple[str, ...]
    ids: frozenset[int]
    tokenizer: Any
    byte_ids: frozenset[int]
    special_ids: frozenset[int]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def settled(self, ids: list[int]) -> str:
        """The part of the text of `ids` that no later token can change."""
        end, run = len(ids), self.byte_ids | self.special_ids
        while end and ids[end - 1] in run:
            end -= 1
        text = self.decode(ids[:end]).rstrip(REPLACEMENT)
        cleaned = getattr(self.tokenizer, "clean_up_tokenization_spaces", False)
        return text[: max(0, len(text) - CLEANED_TAIL)] if cleaned else text

    def find(self, text: str) -> int | None:
        """Where the earliest stop string of `text` begins; None without one."""
        return min((at for at in map(text.find, self.strings) if at >= 0), default=None)

    def decided(self, text: str) -> bool:
        """Whether `text` has a stop string that stays the earliest whatever follows: none that begins before it is
        still unfinished."""
        at = self.find(text)
        if at is None:
            return False
        tails = (text[start:] for start in range(max(0, len(text) - self.longest + 1), at))
        return not any(string.startswith(tail) for tail in tails for string in self.strings)

    @property
    def longest(self) -> int:
        return max(map(len, self.strings))

    def spelling(self, ids: list[int], text: str) -> int:
        """How many of `ids` spell `text`, a beginning of theirs: the fewest whose text begins with it.

        Their text equals `text` unless the last of them goes on past its end.
        """

        def holds(count: int) -> bool:
            return self.decode(ids[:count]).startswith(text)

        # Within a run of byte tokens more ids may spell less.
        run = self.byte_ids | self.special_ids
        counts = [n for n in range(len(ids) + 1) if not (0 < n < len(ids) and ids[n - 1] in run and ids[n] in run)]
        found = bisect.bisect_left(counts, True, key=holds)
        before, count = counts[max(0, found - 1)], counts[found]
        # A run is UTF-8, or else every byte of it is a replacement.
        part = text[len(self.decode(ids[:before])) :]
        ends = [n + 1 for n in range(before, count) if ids[n] in self.byte_ids]
        for length in (len(part), len(part.encode())):
            if 0 < length <= len(ends) and self.decode(ids[: ends[length - 1]]) == text:
                return ends[length - 1]
        return count


def read_stop_strings(stop_strings: Any, tokenizer: Any, mask_id: int) -> StopStrings | None:
    """Checks `generate`'s stop_strings; None without any. Raises ValueError or TypeError."""
    if isinstance(stop_strings, str):
        raise TypeError(f"generate: stop_strings must be a list of strings, got the string {stop_strings!r}")
    if isinstance(stop_strings, (bytes, bytearray, Mapping)) or not isinstance(stop_strings, Iterable):
        raise TypeError(f"generate: stop_strings must be a list of strings, got stop_strings={stop_strings!r}")
    strings = tuple(stop_strings)
    if any(not isinstance(s, str) or not s for s in strings):
        raise ValueError(f"generate: stop_strings must be non-empty strings, got {list(strings)!r}")
    if not strings:
        return None
    if tokenizer is None:
        raise ValueError("generate: stop_strings need a tokenizer; the checkpoint has none, pass tokenizer=")

    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token): token_id for token_id, token in added.items() if getattr(token, "special", False)}
    special |= zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ()))
    for string in strings:
        if special.get(string) == mask_id:
            raise ValueError(f"generate: stop_strings must be what can be written, got the mask token {string!r}")
        inside = sorted(token for token in special if token and token in string and token != string)
        if inside and string not in special:
            raise ValueError(
                "generate: stop_strings must not hold a special token beside other text, which leaves it out, "
                f"got {string!r} with {inside[0]!r}"
            )
    return StopStrings(
        strings=strings,
        ids=frozenset(special[string] for string in strings if string in special),
        tokenizer=tokenizer,
        byte_ids=frozenset(_byte_ids(tokenizer)),
        special_ids=frozenset(special.values()),
    )


def _byte_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens "<0x00>" to "<0xFF>" of a vocabulary that falls back to bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return []
    ids = tokenizer.convert_tokens_to_ids(names)
    known = [token_id for token_id in ids if token_id is not None]
    # A name that is not in the vocabulary has the id of the unknown token.
    return [token_id for token_id, name in zip(known, tokenizer.convert_ids_to_tokens(known)) if name in names]
