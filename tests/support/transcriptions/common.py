"""What every transcription shares: a network in float64, the numbers of a position, a row, and the ways to choose among
positions.

Logits are rounded to fp32; what is computed from them (probability, margin, entropy) is computed in float64 and rounded
to fp32 before anything is compared or ranked. Ties go to the lowest token id and to the lowest position.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterable, Sequence

import torch
from oracles import KeysValues, Network
from torch import Tensor

Sees = Callable[[int, int], bool]


def fp32(x: float) -> float:
    """The fp32 number nearest to x."""
    return struct.unpack("f", struct.pack("f", x))[0]


def units(x: float) -> int:
    """An entropy or a budget of entropy, in whole units of 2^-24 nats; negative entropies count 0."""
    return max(0, math.floor(fp32(x) * 2**24))


class Model:
    """A network whose logits are fp32 numbers, and which of its rows predicts which position.

    previous: position p is predicted by the row of p - 1, position 0 by its own row.
    isolated: so many first positions, the prompt, see each other only; their keys never change. 0 = none.
    """

    def __init__(self, network: Network, previous: bool = False, isolated: int = 0) -> None:
        self.network, self.previous, self.isolated = network, previous, isolated
        self.prompt_computed: list[int] = []  # by every `look` with a cache: how many of those positions it computed

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], visible: Tensor, stale: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Logits [T, V] and keys and values per layer; visible [T, S + T], the S stale positions first."""
        logits, stored = self.network.forward(tokens, positions, visible, stale)
        return logits.float().double(), stored

    def look(
        self,
        tokens: Sequence[int],
        window: Iterable[int],
        *,
        cache: Cache | None = None,
        cached: Iterable[int] = (),
        sees: Sees = lambda q, k: True,
        store: bool = False,
    ) -> dict[int, Tensor]:
        """One forward of the `window` positions of a canvas: the logits row of each of them.

        A position sees the `cached` positions, by the keys that `cache` holds, and of the window what
        `sees(query, key)` says. store: the window's keys and values then go into the cache, replacing what was there.
        """
        window, cached = list(window), list(cached)

        def shown(q: int, k: int) -> bool:
            return q >= self.isolated or k < self.isolated

        visible = torch.tensor(
            [[shown(q, k) for k in cached] + [shown(q, k) and sees(q, k) for k in window] for q in window]
        )
        if cache is not None:
            self.prompt_computed.append(sum(p < self.isolated for p in window))
        stale = cache.take(cached) if cached else None
        logits, stored = self.forward([tokens[p] for p in window], window, visible, stale)
        if store:
            cache.store(window, stored)
        return dict(zip(window, logits))

    def predictor(self, rows: dict[int, Tensor], before: Tensor | None = None) -> Callable[[int], Tensor]:
        """From the rows of a window: position -> the logits that predict it. `before`: the saved row of the position
        before the window."""

        def of(position: int) -> Tensor:
            if not self.previous:
                return rows[position]
            if position == 0:
                return rows[0]
            if position - 1 in rows:
                return rows[position - 1]
            assert before is not None and position == min(rows)
            return before

        return of


class Cache:
    """Keys and values by position, as old as the forward that stored them."""

    def __init__(self) -> None:
        self.keys: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def store(self, positions: Iterable[int], stored: KeysValues) -> None:
        for i, position in enumerate(positions):
            self.keys[position] = [(k[:, i], v[:, i]) for k, v in stored]

    def take(self, positions: Sequence[int]) -> KeysValues:
        layers = range(len(self.keys[positions[0]]))
        return [
            tuple(torch.stack([self.keys[p][layer][kv] for p in positions], 1) for kv in (0, 1)) for layer in layers
        ]


@dataclasses.dataclass
class Settings:
    """What all decoders share.

    Attributes:
        mask_id: never written. banned: position -> other ids that may not be written there.
        stop_ids, stop: when a written id ends the row ("never", "closed", "after_block", "all_stop").
        temperature: 0 = greedy, else a token is the argmax of l / T + gumbel(position, step), [V] float64.
        uniform: (position, step) -> a number in (0, 1), an fp32 value.
        top_k (0 = all), top_p (1 = all), top_k_first: filters of the softmax of l / T (greedy: of l); an id that they
        leave out has
            probability 0. The likeliest id that may be written always stays.
        greedy_filters: the filters hold at temperature 0 too; else nothing is filtered there.
        exclude_eos: the first stop id, the EOS, leaves every softmax (LLaDA's logits_eos_inf).
        tempered: the statistics are those of l / T, else of l, of the ids that the filters leave.
    """

    mask_id: int
    stop_ids: tuple[int, ...] = ()
    stop: str = "closed"
    banned: Callable[[int], Iterable[int]] = lambda position: ()
    temperature: float = 0.0
    gumbel: Callable[[int, int], Tensor] | None = None
    uniform: Callable[[int, int], float] | None = None
    tempered: bool = False
    top_k: int = 0
    top_p: float = 1.0
    top_k_first: bool = False
    greedy_filters: bool = False
    exclude_eos: bool = False


@dataclasses.dataclass
class Stats:
    """A position's token and what its logits say; numbers are rounded to fp32.

    Attributes:
        token: drawn (greedy: the likeliest allowed id). confidence: its probability.
        margin: probability of the likeliest allowed id minus that of the second. entropy: in nats.
        gap: logit of the likeliest allowed id minus that of the second, untempered and unfiltered.
        likeliest: the likeliest allowed id, untempered. p: [V] the probabilities. logits: [V], untempered.
    """

    position: int
    token: int
    confidence: float
    margin: float
    entropy: float
    gap: float
    likeliest: int
    p: Tensor
    logits: Tensor


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Every id whose logit is at least the k-th largest; the others at -inf."""
    if not 0 < k < len(logits):
        return logits
    return logits.masked_fill(logits < sorted(logits.tolist(), reverse=True)[k - 1], -math.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The likeliest ids until their mass exceeds top_p (the one that crosses it is kept); the others at -inf."""
    if top_p >= 1:
        return logits
    p, values = logits.softmax(-1).tolist(), logits.tolist()
    better, kept = 0.0, torch.full_like(logits, -math.inf)
    for token in sorted(range(len(p)), key=lambda i: (-values[i], i)):
        if better <= fp32(top_p):
            kept[token] = logits[token]
        better += p[token]
    return kept


def kept(logits: Tensor, settings: Settings) -> Tensor:
    """[V] bool: the ids that top-k and top-p leave, each applied to what the other left."""
    if settings.temperature == 0 and not settings.greedy_filters:
        return torch.ones_like(logits, dtype=torch.bool)
    scaled = logits / (settings.temperature or 1.0)
    if settings.top_k_first:
        return keep_top_p(keep_top_k(scaled, settings.top_k), settings.top_p) > -math.inf
    return keep_top_k(keep_top_p(scaled, settings.top_p), settings.top_k) > -math.inf


class Row:
    """A decode in progress, and its result.

    Attributes:
        tokens: the canvas as it is. given: whether a position held a token at the start.
        unmask_step, confidence: of each position, when it was written; -1 and 0 where it was not.
        nfe, query_tokens: forwards, and positions computed by them. step: denoise steps taken so far.
    """

    def __init__(self, canvas: Sequence[int], settings: Settings) -> None:
        self.tokens, self.settings = list(canvas), settings
        self.given = [token != settings.mask_id for token in self.tokens]
        self.unmask_step = [-1] * len(self.tokens)
        self.confidence = [0.0] * len(self.tokens)
        self.nfe = self.query_tokens = self.step = 0

    def cut(self, length: int) -> None:
        """Leaves out what lies behind the first `length` positions."""
        for field in (self.tokens, self.given, self.unmask_step, self.confidence):
            del field[length:]

    def masked(self, start: int, end: int) -> list[int]:
        return [p for p in range(start, end) if self.tokens[p] == self.settings.mask_id]

    def written(self, start: int, end: int) -> list[int]:
        return [p for p in range(start, end) if self.unmask_step[p] >= 0]

    def pay(self, positions: int) -> None:
        """One forward over so many positions."""
        self.nfe += 1
        self.query_tokens += positions

    def stats(self, position: int, logits: Tensor, bias: Tensor | None = None) -> Stats:
        """The token that `position` would get now from its logits [V]. Mask and banned ids stay in every sum but cannot
        win.

        bias: [V], added to the logits; the filters look at them without it.
        """
        s = self.settings
        if s.exclude_eos:
            logits = logits.index_fill(0, torch.tensor(s.stop_ids[:1], dtype=torch.int64), -math.inf)
        forbidden = {s.mask_id, *s.banned(position)}
        allowed = [i for i in range(len(logits)) if i not in forbidden]

        def likeliest(values: Tensor) -> list[int]:
            values = values.tolist()
            return sorted((i for i in allowed if values[i] > -math.inf), key=lambda i: (-values[i], i))

        keep = kept(logits, s)
        keep[likeliest(logits)[0]] = True
        logits = logits if bias is None else logits + bias
        left = logits.masked_fill(~keep, -math.inf)
        drawn = left / s.temperature + s.gumbel(position, self.step) if s.temperature > 0 else left
        token = likeliest(drawn)[0]

        best, *runners_up = likeliest(left)
        plain = likeliest(logits)
        shown = left / s.temperature if s.tempered and s.temperature > 0 else left
        log_p = shown.log_softmax(-1)
        p = log_p.exp()
        second = p[runners_up[0]] if runners_up else 0.0
        return Stats(
            position=position,
            token=token,
            confidence=fp32(p[token].item()),
            margin=fp32((p[best] - second).item()),
            entropy=fp32(-torch.where(p > 0, p * log_p, 0.0).sum().item()),
            gap=fp32((logits[plain[0]] - logits[plain[1]]).item()) if len(plain) > 1 else math.inf,
            likeliest=best,
            p=p,
            logits=logits,
        )

    def score(self, name: str, s: Stats) -> float:
        """What ranks positions: by name, from their statistics."""
        if name == "random":
            return self.settings.uniform(s.position, self.step)
        return {"confidence": s.confidence, "margin": s.margin, "neg_entropy": -s.entropy, "position": -s.position}[
            name
        ]

    def write(self, s: Stats) -> None:
        self.tokens[s.position], self.unmask_step[s.position], self.confidence[s.position] = (
            s.token,
            self.step,
            s.confidence,
        )

    def remask(self, position: int) -> None:
        self.tokens[position], self.unmask_step[position], self.confidence[position] = self.settings.mask_id, -1, 0.0

    def written_stops(self, start: int, end: int) -> list[int]:
        """Where a stop id was written; a given one never stops a row."""
        return [p for p in self.written(start, end) if self.tokens[p] in self.settings.stop_ids]

    def closed(self, start: int, end: int) -> bool:
        """Whether what was written in the block [start, end) ends the row now, by the stop rule."""
        stops = self.written_stops(start, end)
        if not stops or self.settings.stop == "never":
            return False
        if self.settings.stop == "closed":
            return not self.masked(start, stops[0])
        finished = not self.masked(start, end)
        if self.settings.stop == "all_stop":
            return finished and all(token in self.settings.stop_ids for token in self.tokens[start:end])
        return finished  # after_block


def order(stats: Iterable[Stats], score: Callable[[Stats], float]) -> list[Stats]:
    """Best score first; ties by position."""
    return sorted(stats, key=lambda s: (-score(s), s.position))


def select(ordered: Sequence[Stats], passes: Callable[[Stats], bool], minimum: int) -> list[Stats]:
    """Those that pass, or else the `minimum` best. `ordered`: best first."""
    passing = [s for s in ordered if passes(s)]
    minimum = min(minimum, len(ordered))
    return passing if len(passing) >= minimum else list(ordered[:minimum])


def leading(ordered: Sequence[Stats], passes: Callable[[int, Stats], bool], minimum: int) -> list[Stats]:
    """The longest prefix whose every member passes (rank 1, 2, ...), or else the `minimum` best."""
    n = 0
    while n < len(ordered) and passes(n + 1, ordered[n]):
        n += 1
    return list(ordered[: max(n, min(minimum, len(ordered)))])


def quota(masks: int, steps: int, i: int) -> int:
    """Step i's share of `masks` over `steps` steps, the first masks % steps of them one more; never 0, so that every
    step writes."""
    return max(1, masks // steps + (1 if i < masks % steps else 0))


def last_block_end(prompt: int, new: int, block_length: int, alignment: str, last_block: str) -> int:
    """Where the canvas of a prompt ends: "crop" behind the new tokens (Stable-DiffCoder), "whole" with the block that
    they begin (SDAR's and LLaDA2's ceil((prompt + new) / block_length) blocks; Nemotron's from the prompt on), "drop"
    with the last block that they fill (D2F's new // block_length)."""
    start = 0 if alignment == "abs" else prompt
    blocks = {"whole": math.ceil, "drop": math.floor}
    if last_block == "crop":
        return prompt + new
    return start + blocks[last_block]((prompt + new - start) / block_length) * block_length


# (statistics of the eligible positions, what a quota is of (the masks when the block was opened; SDAR, LLaDA2: its
# length), denoise steps already taken in it) -> those to write
Rule = Callable[[list[Stats], int, int], list[Stats]]


def make_rule(
    row: Row,
    rule: str,
    *,
    score: str | Callable[[Stats], float] = "confidence",
    rank: str | Callable[[Stats], float] | None = None,
    threshold: float = 0.9,
    inclusive: bool = False,
    factor: float = 1.0,
    published_factor: bool = False,
    entropy_bound: float = 0.1,
    min_unmask: int | None = 1,
    steps: int = 1,
) -> Rule:
    """One of the four common rules, by the `score` that is tested and the `rank` that orders (None: the score).

    min_unmask: None = the quota over `steps` steps.
    quota: the step's share, best first. threshold: score > threshold (`inclusive`: >=).
    factor (Fast-dLLM): by rank r, while score >= 1 - factor / (r + 1). published_factor: as its code says that, which
    does not test the best one and takes the last one too if that is where it stops.
    entropy: by rank, while the entropies so far stay below the bound (`inclusive`), or within it but for the largest
    (EB-Sampler).
    """

    def named(name: str | Callable[[Stats], float], s: Stats) -> float:
        return name(s) if callable(name) else row.score(name, s)

    def value(s: Stats) -> float:
        return named(score, s)

    def choose(candidates: list[Stats], masks: int, i: int) -> list[Stats]:
        ordered = order(candidates, lambda s: named(rank or score, s))
        minimum = quota(masks, steps, i) if rule == "quota" or min_unmask is None else min_unmask
        if rule == "quota":
            return ordered[:minimum]
        if rule == "threshold":
            tau = fp32(threshold)
            return select(ordered, lambda s: value(s) >= tau if inclusive else value(s) > tau, minimum)
        if rule == "factor" and published_factor:
            bounds = [-1.0] + [fp32(1 - fp32(factor) / (r + 1)) for r in range(2, len(ordered) + 1)]
            stops_at = next((r for r, s in enumerate(ordered) if value(s) < bounds[r]), len(ordered))
            return ordered[: max(len(ordered) if stops_at == len(ordered) - 1 else stops_at, minimum)]
        if rule == "factor":
            return leading(ordered, lambda r, s: value(s) >= fp32(1 - fp32(factor) / (r + 1)), minimum)
        budget, costs = units(entropy_bound), [units(s.entropy) for s in ordered]

        def affordable(r: int, s: Stats) -> bool:
            return sum(costs[:r]) < budget if inclusive else sum(costs[:r]) - max(costs[:r]) <= budget

        return leading(ordered, affordable, minimum)

    return choose
