"""Decoders for one row, written down from their papers: slow, plain, and independent of the packages that they check.

Nothing here is imported from the project. A network is read off a Hugging Face module's parameters and run by our own
forward; a decoder recomputes what its specification says, token by token, in float64. Every decision also records its
margin, the distance to the nearest other decision, so that a test can tell a wrong token from a near-tie.

    Nie et al. (LLaDA) arXiv:2502.09992; Wu et al. (Fast-dLLM) arXiv:2505.22618; Cheng et al. (SDAR) arXiv:2510.06303;
    Bie et al. (LLaDA2.0) arXiv:2512.15745; Ben-Hamu et al. (EB-Sampler) arXiv:2505.24857.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

# Two numbers that are equal in exact arithmetic come out of float64 this close; decisions round them away, so that ties
# are ties.
TIE_DIGITS = 11
TIE = 10.0**-TIE_DIGITS

KeysValues = list[tuple[Tensor, Tensor]]


class Network:
    """The forward pass of a Llama, Qwen2 or Qwen3 decoder, given by who sees whom."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        config = model.config
        self.weights = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
        self.num_layers = config.num_hidden_layers
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps, self.theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
        self.dtype = dtype

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], visible: Tensor, stale: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Logits [T, V] of T tokens, and their keys and values [H_kv, T, D] per layer.

        visible [T, S + T]: whether a token (row) sees each of the S stale positions and then each of the T tokens.
        """
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        angles = self._angles(positions)
        stored: KeysValues = []
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}."
            normed = self._norm(x, name + "input_layernorm.weight")
            q = self._heads(normed, name + "self_attn.q_proj", self.heads, name + "self_attn.q_norm.weight")
            k = self._heads(normed, name + "self_attn.k_proj", self.kv_heads, name + "self_attn.k_norm.weight")
            v = self._heads(normed, name + "self_attn.v_proj", self.kv_heads, None)
            q, k = self._rotate(q, angles), self._rotate(k, angles)
            stored.append((k, v))
            if stale is not None:
                k, v = torch.cat([stale[layer][0], k], 1), torch.cat([stale[layer][1], v], 1)
            x = x + self._linear(self._attend(q, k, v, visible), name + "self_attn.o_proj")
            normed = self._norm(x, name + "post_attention_layernorm.weight")
            gate = self._linear(normed, name + "mlp.gate_proj")
            x = x + self._linear(
                gate * torch.sigmoid(gate) * self._linear(normed, name + "mlp.up_proj"), name + "mlp.down_proj"
            )
        return self._linear(self._norm(x, "model.norm.weight"), "lm_head"), stored

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[name]

    def _heads(self, x: Tensor, name: str, heads: int, norm: str | None) -> Tensor:
        """[T, d] -> [heads, T, D], normalized per head where the family does that (Qwen3)."""
        y = self._linear(x, name).view(x.shape[0], heads, -1)
        if norm is not None and norm in self.weights:
            y = self._norm(y, norm)
        return y.transpose(0, 1)

    def _angles(self, positions: Sequence[int]) -> Tensor:
        D = self.weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // self.kv_heads
        frequency = self.theta ** (-torch.arange(0, D, 2, dtype=self.dtype) / D)
        return torch.tensor(positions, dtype=self.dtype)[:, None] * frequency

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        out = []
        for head in range(self.heads):
            group = head // (self.heads // self.kv_heads)
            scores = q[head] @ k[group].T / math.sqrt(q.shape[-1])
            out.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ v[group])
        return torch.cat(out, -1)


@dataclasses.dataclass
class Candidate:
    """What a masked position would become: its token, the numbers that rank it, and how nearly it became another
    token."""

    position: int
    token: int
    confidence: float
    score: float
    entropy: float
    token_margin: float


# (candidates by position, masks when the block was opened, steps already taken in it) -> (indices to write, margin of
# that choice)
Rule = Callable[[list[Candidate], int, int], tuple[list[int], float]]


def rank(candidates: list[Candidate]) -> list[int]:
    """Indices by score, best first; ties go by position."""
    return sorted(range(len(candidates)), key=lambda i: (-round(candidates[i].score, TIE_DIGITS), i))


def _gap(candidates: list[Candidate], order: list[int], k: int) -> float:
    """How far the k-th best score is from the next one. An exact tie is no near-tie, because its order is defined."""
    if not 0 < k < len(order):
        return math.inf
    gap = candidates[order[k - 1]].score - candidates[order[k]].score
    return gap if gap > TIE else math.inf


def quota(steps: int, length: int | None = None) -> Rule:
    """LLaDA's schedule: m masks over S steps, the first m % S steps one more; our fix of its zero quotas: at least one.

    length: m whatever is masked (SDAR, LLaDA2), None = the block's masks.
    """

    def choose(candidates: list[Candidate], masks: int, step: int) -> tuple[list[int], float]:
        masks = length or masks
        k = min(len(candidates), max(1, masks // steps + (1 if step < masks % steps else 0)))
        order = rank(candidates)
        return order[:k], _gap(candidates, order, k)

    return choose


def threshold(tau: float, inclusive: bool, kmin: int | Rule = 1) -> Rule:
    """All candidates that pass, or else the `kmin` best; `kmin` may be a quota (SDAR dynamic)."""

    def choose(candidates: list[Candidate], masks: int, step: int) -> tuple[list[int], float]:
        passing = [i for i, c in enumerate(candidates) if (c.score >= tau if inclusive else c.score > tau)]
        margin = min(abs(c.score - tau) for c in candidates)
        if callable(kmin):
            forced, forced_margin = kmin(candidates, masks, step)
        else:
            order = rank(candidates)
            forced, forced_margin = order[:kmin], _gap(candidates, order, kmin)
        if len(passing) >= len(forced):
            return passing, margin
        return forced, min(margin, forced_margin)

    return choose


def _prefix_or(
    kmin: int | Rule, candidates: list[Candidate], order: list[int], n: int, margin: float, masks: int, step: int
) -> tuple[list[int], float]:
    if callable(kmin):
        kmin = len(kmin(candidates, masks, step)[0])
    n = max(n, min(kmin, len(order)))
    return order[:n], min(margin, _gap(candidates, order, n))


def factor(f: float, kmin: int | Rule = 1) -> Rule:
    """Fast-dLLM's factor rule: by rank r = 1, 2, ... while c_r >= 1 - f / (r + 1)."""

    def choose(candidates: list[Candidate], masks: int, step: int) -> tuple[list[int], float]:
        order, n, margin = rank(candidates), 0, math.inf
        for r, i in enumerate(order, 1):
            bound = 1 - f / (r + 1)
            margin = min(margin, abs(candidates[i].score - bound))
            if candidates[i].score < bound:
                break
            n = r
        return _prefix_or(kmin, candidates, order, n, margin, masks, step)

    return choose


def entropy_budget(gamma: float, inclusive: bool, kmin: int | Rule = 1) -> Rule:
    """EB-Sampler: by rank, while the entropies so far, the largest of them left out, stay within gamma; `inclusive`:
    all, below gamma."""

    def choose(candidates: list[Candidate], masks: int, step: int) -> tuple[list[int], float]:
        order, n, used, largest = rank(candidates), 0, 0.0, 0.0
        margin = min((_gap(candidates, order, k) for k in range(1, len(order))), default=math.inf)
        for r, i in enumerate(order, 1):
            used, largest = used + candidates[i].entropy, max(largest, candidates[i].entropy)
            spent = used if inclusive else used - largest
            if spent or gamma:
                margin = min(margin, abs(spent - gamma))
            if (spent >= gamma) if inclusive else (spent > gamma):
                break
            n = r
        return _prefix_or(kmin, candidates, order, n, margin, masks, step)

    return choose


@dataclasses.dataclass
class Settings:
    """What all decoders share.

    Attributes:
        rule: which candidates a step writes. score: what ranks them ("confidence", "margin", "neg_entropy", "random").
        banned: position -> ids that may not be written there. stop_ids, stop: when a written id ends the row.
        temperature, noise: a draw is argmax(l / T + noise(position, step)); T = 0 is greedy.
        random_score: (position, step) -> number in (0, 1), for score "random".
    """

    mask_id: int
    block_length: int
    rule: Rule
    score: str = "confidence"
    banned: Callable[[int], Iterable[int]] = lambda position: ()
    stop_ids: tuple[int, ...] = ()
    stop: str = "closed"
    temperature: float = 0.0
    noise: Callable[[int, int], Tensor] | None = None
    random_score: Callable[[int, int], float] | None = None


@dataclasses.dataclass
class Row:
    """A decode in progress, and its result.

    Attributes:
        follow: the step at which each position is to be written and its token, instead of deciding (to measure margins
            along another decode); steps after the last of it are decided here.
        token_margins, score_margins: of every denoise step, the nearest miss in logits and in the numbers that chose
            the positions.
    """

    tokens: list[int]
    settings: Settings
    follow: tuple[list[int], list[int]] | None = None
    unmask_step: list[int] = dataclasses.field(default_factory=list)
    confidence: list[float] = dataclasses.field(default_factory=list)
    nfe: int = 0
    query_tokens: int = 0
    token_margins: list[float] = dataclasses.field(default_factory=list)
    score_margins: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self.unmask_step = [-1] * len(self.tokens)
        self.confidence = [0.0] * len(self.tokens)

    def masked(self, start: int, end: int) -> list[int]:
        return [p for p in range(start, end) if self.tokens[p] == self.settings.mask_id]

    def pay(self, positions: int) -> None:
        """One forward over so many positions."""
        self.nfe += 1
        self.query_tokens += positions

    def candidate(self, position: int, logits: Tensor) -> Candidate:
        """The token that `position` would get from its logits [V]; mask and banned ids stay in every sum but cannot
        win."""
        s, step = self.settings, len(self.score_margins)
        forbidden = {s.mask_id, *s.banned(position)}
        log_p = logits.log_softmax(-1)
        allowed = [i for i in range(len(logits)) if i not in forbidden]
        key = logits / s.temperature + s.noise(position, step) if s.temperature > 0 else logits

        def order(values: list[float]) -> list[int]:
            return sorted(allowed, key=lambda i: (-round(values[i], TIE_DIGITS), i))

        keys = key.tolist()
        first, *runners_up = order(keys)
        token_margin = min((keys[first] - keys[i] for i in runners_up if keys[first] - keys[i] > TIE), default=math.inf)
        p, entropy = log_p.exp(), -(log_p.exp() * log_p).sum().item()
        if s.score == "margin":
            best = order(logits.tolist())
            score = (p[best[0]] - p[best[1]]).item()
        elif s.score == "neg_entropy":
            score = -entropy
        elif s.score == "random":
            score = s.random_score(position, step)
        else:
            score = p[first].item()
        return Candidate(position, first, p[first].item(), score, entropy, token_margin)

    def denoise(self, logits_of: Callable[[int], Tensor], start: int, end: int, masks: int, block_step: int) -> None:
        """Writes what the rule chooses in the block [start, end) from one forward's logits."""
        step = len(self.score_margins)
        candidates = [self.candidate(p, logits_of(p)) for p in self.masked(start, end)]
        chosen, score_margin = self.settings.rule(candidates, masks, block_step)
        written = [candidates[i] for i in chosen]
        if self.follow is not None and step <= max(self.follow[1]):
            tokens, steps = self.follow
            written = [
                dataclasses.replace(c, token=tokens[c.position]) for c in candidates if steps[c.position] == step
            ]
        self.score_margins.append(score_margin)
        self.token_margins.append(min((candidates[i].token_margin for i in chosen), default=math.inf))
        for c in written:
            self.tokens[c.position], self.unmask_step[c.position], self.confidence[c.position] = (
                c.token,
                step,
                c.confidence,
            )

    def stopped(self, start: int, end: int) -> bool:
        """Whether a stop id that was written in this block ends the row now."""
        stops = [p for p in range(start, end) if self.unmask_step[p] >= 0 and self.tokens[p] in self.settings.stop_ids]
        if self.settings.stop == "never" or not stops:
            return False
        return not self.masked(start, end if self.settings.stop == "after_block" else stops[0])


def decode_full(
    network: Network,
    canvas: Sequence[int],
    settings: Settings,
    cache: str = "none",
    follow: tuple | None = None,
    *,
    isolated: bool = False,
) -> Row:
    """LLaDA's semi-autoregressive loop (cache "none") and Fast-dLLM's prefix and dual caches, over full visibility.

    Blocks follow the first mask. With a cache, a block starts by a forward of the whole canvas, which is decoded from
    and whose keys and values then go stale: "prefix" keeps those before the block and recomputes everything from the
    block on; "dual" keeps all but the block's own and recomputes only the block. `isolated`: what precedes the first
    mask sees itself only, and as its keys cannot change, a cache pays for it once.
    """
    row, L = Row(list(canvas), settings, follow), len(canvas)
    if not row.masked(0, L):
        return row
    everything, first = list(range(L)), row.masked(0, L)[0]
    sees = torch.ones(L, L, dtype=torch.bool)
    if isolated:
        sees[:first, first:] = False
    for start in range(first, L, settings.block_length):
        end = min(start + settings.block_length, L)
        masks, block_step, stale = len(row.masked(start, end)), 0, None
        while row.masked(start, end):
            if cache == "none" or block_step == 0:
                logits, stored = network.forward(row.tokens, everything, sees)
                row.pay(L - first if isolated and cache != "none" and row.nfe else L)
                window = everything
                kept = [p for p in everything if p < start or (cache == "dual" and p >= end)]
                stale = [(k[:, kept], v[:, kept]) for k, v in stored]
            else:
                window = list(range(start, L if cache == "prefix" else end))
                visible = torch.ones(len(window), len(kept) + len(window), dtype=torch.bool)
                logits, _ = network.forward([row.tokens[p] for p in window], window, visible, stale)
                row.pay(len(window))
            row.denoise(lambda p: logits[window.index(p)], start, end, masks, block_step)
            block_step += 1
            if row.stopped(start, end):
                return row
    return row


def decode_block_causal(
    network: Network,
    canvas: Sequence[int],
    settings: Settings,
    alignment: str,
    cached: str | None = "commit",
    follow: tuple | None = None,
) -> Row:
    """SDAR's and LLaDA2's block diffusion, every token recomputed at every step: what an exact cache must equal.

    A position sees its own block and all earlier ones. Blocks begin at multiples of the block length ("abs") or at the
    first mask, what precedes it being one block ("rel"). `cached` only counts. "commit": a forward of the positions
    before the first block if there are any, one of the block per denoise step, one more (the commit) per block that has
    masks after it. "fused": one forward per denoise step, of the block, and in a block's first one of all that has not
    been computed since it was finished. None: one of [0, block end) per denoise step.
    """
    row, L, length = Row(list(canvas), settings, follow), len(canvas), settings.block_length
    if not row.masked(0, L):
        return row
    first = row.masked(0, L)[0]
    block = [p // length if alignment == "abs" else (0 if p < first else 1 + (p - first) // length) for p in range(L)]
    sees = torch.tensor([[block[k] <= block[q] for k in range(L)] for q in range(L)])
    start = block.index(block[first])
    if cached == "commit" and start:
        row.pay(start)
    final = 0  # keys before this position have been computed from finished tokens
    while start < L:
        end = start + block.count(block[start])
        masks, block_step = len(row.masked(start, end)), 0
        while row.masked(start, end):
            logits, _ = network.forward(row.tokens[:end], range(end), sees[:end, :end])
            row.pay(end - {"commit": start, "fused": final, None: 0}[cached])
            final = start
            row.denoise(lambda p: logits[p], start, end, masks, block_step)
            block_step += 1
            if row.stopped(start, end):
                return row
        if not row.masked(end, L):
            return row
        if cached == "commit":
            row.pay(end - start)
        start = end
    return row
