"""Stop strings: where they end a text, and which ids spell the text before a stop string."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from .limits import MAX_STOP_STRING_LENGTH, MAX_STOP_STRINGS, shown

# What decoding shows for a character that is not spelled to its end, and for bytes that are no character.
REPLACEMENT = "\ufffd"
# How many characters at a text's end `clean_up_tokenization_spaces` may still change when the text goes on: those of
# " n't" without the last one.
CLEANED_TAIL = 3
# How many sets of stop strings a reader remembers.
MOST_KNOWN = 64


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """What ends a response: the earliest of the stop strings in the response's text, or the first special token.

    The text of some ids is `tokenizer.decode(ids, skip_special_tokens=True)`. If two stop strings begin at one place,
    both cut the text there.

    Attributes:
        strings: all stop strings.
        ids: ids of the stop strings that are special tokens, which no text shows.
        tokenizer: what decodes.
        byte_ids: ids of the tokens that are one byte ("<0xE2>"). A run of byte tokens is decoded as a whole.
        special_ids: ids of all special tokens, which a text leaves out and which do not end a run of byte tokens.
    """

    strings: tuple[str, ...]
    ids: frozenset[int]
    tokenizer: Any
    byte_ids: frozenset[int]
    special_ids: frozenset[int]

    @classmethod
    def none(cls, tokenizer: Any) -> StopStrings:
        """No stop strings, of a tokenizer."""
        return _strings_of((), tokenizer, _special_ids(tokenizer))

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return text_of(self.tokenizer, ids)

    def settled(self, ids: list[int]) -> str:
        """The part of the text of `ids` that no later token can change."""
        end, run_ids = len(ids), self.byte_ids | self.special_ids
        while end and ids[end - 1] in run_ids:
            end -= 1
        text = self.decode(ids[:end]).rstrip(REPLACEMENT)
        cleaned = getattr(self.tokenizer, "clean_up_tokenization_spaces", False)
        return text[: max(0, len(text) - CLEANED_TAIL)] if cleaned else text

    def find(self, text: str) -> int | None:
        """Where the earliest stop string in `text` begins; None if there is none."""
        return min((place for place in map(text.find, self.strings) if place >= 0), default=None)

    def decided(self, text: str) -> bool:
        """Whether `text` has a stop string that stays the earliest one, whatever follows the text.

        That is the case unless the end of the text is the beginning of another stop string that would begin earlier.
        """
        place = self.find(text)
        if place is None:
            return False
        tails = (text[start:] for start in range(max(0, len(text) - self.longest + 1), place))
        return not any(string.startswith(tail) for tail in tails for string in self.strings)

    @property
    def longest(self) -> int:
        """Number of characters of the longest stop string."""
        return max(map(len, self.strings), default=0)

    def spelling(self, ids: list[int], text: str) -> int:
        """How many of the first `ids` spell `text`, which is the beginning of the ids' text.

        That is the smallest number of ids whose text begins with `text`. The ids' text is longer than `text` only if
        their last id spells more than the end of `text`.
        """

        def holds(count: int) -> bool:
            return self.decode(ids[:count]).startswith(text)

        # 1. Find the number of ids by bisection. Inside a run of byte tokens more ids may spell less, so that no count
        # may end inside a run.
        run_ids = self.byte_ids | self.special_ids
        counts = [
            n for n in range(len(ids) + 1) if not (0 < n < len(ids) and ids[n - 1] in run_ids and ids[n] in run_ids)
        ]
        index = bisect.bisect_left(counts, True, key=holds)
        before, count = counts[max(0, index - 1)], counts[index]
        # 2. Find a smaller number if the text ends inside a run. Either the run is UTF-8, so that its bytes count, or
        # every byte of the run is a replacement character.
        part = text[len(self.decode(ids[:before])) :]
        ends = [n + 1 for n in range(before, count) if ids[n] in self.byte_ids]
        for length in (len(part), len(part.encode())):
            if 0 < length <= len(ends) and self.decode(ids[: ends[length - 1]]) == text:
                return ends[length - 1]
        return count


class StopReader:
    """Reads the stop strings of many requests, each set of them once.

    Attributes:
        tokenizer: what decodes.
        mask_id: id of the mask.
    """

    def __init__(self, tokenizer: Any, mask_id: int) -> None:
        self.tokenizer, self.mask_id = tokenizer, mask_id
        self._known: dict[tuple[str, ...], StopStrings | tuple[()]] = {}

    def __call__(self, strings: Any) -> StopStrings | tuple[()]:
        """The stop strings, as `requests.read` takes them; () without any. Raises ValueError or TypeError."""
        is_listed = isinstance(strings, (list, tuple)) and all(isinstance(string, str) for string in strings)
        if is_listed and tuple(strings) in self._known:
            return self._known[tuple(strings)]
        read = read_stop_strings(strings, self.tokenizer, self.mask_id) or ()
        if is_listed:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[tuple(strings)] = read
        return read


def _is_iterable(value: Any) -> bool:
    # A tensor or an array without dimensions is an Iterable that refuses to be iterated over.
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids without special tokens. Raises ValueError where the tokenizer gives none."""
    try:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    except Exception as error:
        raise ValueError(
            f"generate: tokenizer must decode token ids, got {type(error).__name__}: {error} for {shown(ids)}"
        ) from error
    if not isinstance(text, str):
        raise ValueError(f"generate: tokenizer must decode token ids to a string, got {shown(text)} for {shown(ids)}")
    return text


def read_stop_strings(stop_strings: Any, tokenizer: Any, mask_id: int) -> StopStrings | None:
    """The stop strings of a call of `generate`, checked; None without any. Raises ValueError or TypeError."""
    # 1. Check the list.
    if isinstance(stop_strings, str):
        raise TypeError(f"generate: stop_strings must be a list of strings, got the string {shown(stop_strings)}")
    if isinstance(stop_strings, (bytes, bytearray, Mapping)) or not _is_iterable(stop_strings):
        raise TypeError(f"generate: stop_strings must be a list of strings, got stop_strings={shown(stop_strings)}")
    strings = tuple(stop_strings)
    if any(not isinstance(s, str) or not s for s in strings):
        raise ValueError(f"generate: stop_strings must be non-empty strings, got {shown(list(strings))}")
    if not strings:
        return None
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"generate: stop_strings must be at most {MAX_STOP_STRINGS}, got {len(strings)}")
    longest = max(map(len, strings))
    if longest > MAX_STOP_STRING_LENGTH:
        raise ValueError(
            f"generate: stop_strings must be strings of at most {MAX_STOP_STRING_LENGTH} characters, got one of "
            f"{longest}"
        )
    if tokenizer is None:
        raise ValueError("generate: stop_strings need a tokenizer; the checkpoint has none, pass tokenizer=")

    # 2. Find the strings that are special tokens; beside other text a special token can never be found.
    special = _special_ids(tokenizer)
    for string in strings:
        if special.get(string) == mask_id:
            raise ValueError(f"generate: stop_strings must be what can be written, got the mask token {shown(string)}")
        inside = sorted(token for token in special if token and token in string and token != string)
        if inside and string not in special:
            raise ValueError(
                "generate: stop_strings must not hold a special token beside other text, which leaves it out, "
                f"got {shown(string)} with {inside[0]!r}"
            )
    return _strings_of(strings, tokenizer, special)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of a tokenizer's special tokens, by their text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token): token_id for token_id, token in added.items() if getattr(token, "special", False)}
    return special | dict(zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ())))


def _strings_of(strings: tuple[str, ...], tokenizer: Any, special: Mapping[str, int]) -> StopStrings:
    return StopStrings(
        strings=strings,
        ids=frozenset(special[string] for string in strings if string in special),
        tokenizer=tokenizer,
        byte_ids=frozenset(_byte_ids(tokenizer)),
        special_ids=frozenset(special.values()),
    )


def _byte_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens "<0x00>" to "<0xFF>", in a vocabulary that spells unknown text by bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return []
    ids = tokenizer.convert_tokens_to_ids(names)
    known = [token_id for token_id in ids if token_id is not None]
    # A name that is not in the vocabulary has the id of the unknown token.
    return [token_id for token_id, name in zip(known, tokenizer.convert_ids_to_tokens(known)) if name in names]
