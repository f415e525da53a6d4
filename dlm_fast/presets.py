"""Decoder presets: every published decoder is a row of this table."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm_kernels.rules import UnmaskRule

CACHES = ("none", "prefix", "dual", "commit")
RULES = ("quota", "threshold", "factor", "entropy")
SCORES = ("confidence", "margin", "neg_entropy", "random")
STOPS = ("never", "after_block", "closed")


@dataclasses.dataclass(frozen=True)
class Preset:
    """One decoder: a validated choice of visibility, cache operation, schedule, unmask rule and stop rule.

    Attributes:
        name, source: as published.
        exactness: what its tokens equal, and relative to what.
        visibility: the model visibility it decodes ("full" or "block").
        cache: what is kept between forwards.
            "none": the whole canvas is recomputed (C0).
            "prefix": at the start of a block, a forward of everything; then keys before the block are kept (C3).
            "dual": the same, and keys after the block are kept too, the block's own replaced (C3 + C4).
            "commit": finished blocks are appended by a forward of their own; exact for block-causal models (C1).
        block_length: positions denoised together; None = the model's own, or the whole generation where it has none.
        rule: which masked positions of the block a step writes.
            "quota": a fixed number: the block's masks spread over `steps_per_block` steps (LLaDA's num_transfer_tokens).
            "threshold": score > `threshold` (>= if `inclusive`), and at least `min_unmask`, or the quota if None.
            "factor": Fast-dLLM's rank-aware threshold; "entropy": EB-Sampler's budget `entropy_bound` in nats.
        score: what ranks positions: "confidence" (probability of the drawn token), "margin" (top-1 minus top-2
            probability), "neg_entropy" or "random".
        steps_per_block: of the quota; None = block_length, one token per step.
        stop: "closed": once a written EOS has nothing masked before it. "after_block": after its block. "never": at the
            end of the canvas. The text ends at the first EOS under each of them; what differs is the cost.
    """

    name: str
    source: str
    exactness: str
    visibility: str
    cache: str
    rule: str
    block_length: int | None = None
    score: str = "confidence"
    threshold: float = 0.9
    inclusive: bool = False
    factor: float = 1.0
    entropy_bound: float = 0.1
    min_unmask: int | None = 1
    steps_per_block: int | None = None
    stop: str = "closed"

    def __post_init__(self) -> None:
        def fail(rule: str) -> None:
            raise ValueError(f"preset {self.name}: {rule}")

        for name, known in (("cache", CACHES), ("rule", RULES), ("score", SCORES), ("stop", STOPS), ("visibility", ("full", "block"))):
            value = getattr(self, name)
            if value not in known:
                fail(f"{name} must be one of {', '.join(known)}, got {name}={value!r}")
        for name in ("block_length", "steps_per_block"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                fail(f"{name} must be a whole number >= 1 or None, got {name}={value!r}")
        if self.min_unmask is not None and (not isinstance(self.min_unmask, int) or self.min_unmask < 1):
            fail(f"min_unmask must be a whole number >= 1 (every step makes progress) or None, got min_unmask={self.min_unmask!r}")
        # A negative entropy is compared with a negative threshold (dParallel's H <= 0.5 is a threshold of -0.5).
        least = {"threshold": float("-inf") if self.score == "neg_entropy" else 0.0, "factor": 0.0, "entropy_bound": 0.0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value >= low:
                fail(f"{name} must be a number >= {low:g}, got {name}={value!r}")
        if self.cache == "commit" and self.visibility != "block":
            fail(f"cache='commit' needs a block-causal model (visibility 'block'), got visibility={self.visibility!r}")
        if self.cache in ("prefix", "dual") and self.visibility != "full":
            fail(f"cache={self.cache!r} approximates full visibility; a block-causal model has an exact one, cache='commit'")
        if self.rule == "entropy" and self.score == "random":
            fail("rule='entropy' needs an order by score, got score='random'")

    @property
    def quota(self) -> bool:
        return self.rule == "quota" or self.min_unmask is None

    def unmask_rule(self) -> UnmaskRule:
        """The static part of the `unmask` op for this preset."""
        return UnmaskRule(
            passes="none" if self.rule == "quota" else self.rule,
            inclusive=self.inclusive,
            quota=self.quota,
            cache={"none": "none", "prefix": "refresh", "dual": "refresh", "commit": "commit"}[self.cache],
            stop=self.stop,
        )

    @property
    def value(self) -> float:
        """The number its pass test compares with (unused by "quota")."""
        return {"quota": 0.0, "threshold": self.threshold, "factor": self.factor, "entropy": self.entropy_bound}[self.rule]


_LLADA = "Nie et al. 2025, arXiv:2502.09992"
_FAST = "Wu et al. 2025, arXiv:2505.22618"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="llada",
            source=_LLADA,
            exactness="exact: it is the uncached loop",
            visibility="full",
            cache="none",
            rule="quota",
        ),
        Preset(
            name="fast-dllm",
            source=_FAST,
            exactness="exact: it is the uncached loop",
            visibility="full",
            cache="none",
            rule="threshold",
            inclusive=True,
            block_length=32,
        ),
        Preset(
            name="fast-dllm-prefix",
            source=_FAST,
            exactness="approximate: keys before the block are as old as the block",
            visibility="full",
            cache="prefix",
            rule="threshold",
            inclusive=True,
            block_length=32,
        ),
        Preset(
            name="fast-dllm-dual",
            source=_FAST,
            exactness="approximate: keys before and after the block are as old as the block",
            visibility="full",
            cache="dual",
            rule="threshold",
            inclusive=True,
            block_length=32,
        ),
        Preset(
            name="sdar",
            source="Cheng et al. 2025 (SDAR), arXiv:2510.06303; static strategy",
            exactness="exact: same tokens as recomputing everything",
            visibility="block",
            cache="commit",
            rule="quota",
        ),
        Preset(
            name="sdar-dynamic",
            source="Cheng et al. 2025 (SDAR), arXiv:2510.06303; dynamic strategy",
            exactness="exact: same tokens as recomputing everything",
            visibility="block",
            cache="commit",
            rule="threshold",
            threshold=0.85,
            min_unmask=None,
        ),
        Preset(
            name="llada2",
            source="Bie et al. 2025 (LLaDA2.0), arXiv:2512.15745",
            exactness="exact: same tokens as recomputing everything",
            visibility="block",
            cache="commit",
            rule="threshold",
            threshold=0.95,
        ),
    )
}

OPTIONS = tuple(
    field.name for field in dataclasses.fields(Preset) if field.name not in ("name", "source", "exactness", "visibility")
)


def resolve(preset: str | Preset | None, visibility: str, overrides: dict[str, Any]) -> Preset:
    """A preset by name (default: "llada" or "sdar", by the model's visibility) with some of its options replaced.

    Raises ValueError for an unknown preset or option, and where the preset's visibility is not the model's.
    """
    if preset is None:
        preset = "llada" if visibility == "full" else "sdar"
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got preset={preset!r}")
        preset = PRESETS[preset]
    unknown = sorted(set(overrides) - set(OPTIONS))
    if unknown:
        raise ValueError(f"generate: unknown options {', '.join(unknown)}; preset options are {', '.join(OPTIONS)}")
    if preset.visibility != visibility:
        fitting = ", ".join(p.name for p in PRESETS.values() if p.visibility == visibility)
        raise ValueError(f"preset {preset.name} decodes models of visibility {preset.visibility!r}, this model is {visibility!r}; use {fitting}")
    return dataclasses.replace(preset, **overrides)
