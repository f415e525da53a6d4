"""When an option is read: one table, by which `generate` refuses an option that would change nothing.

An option that a decoder does not read is the first thing people tune, and they conclude that it does not matter. A
preset's own fields may hold such numbers (a default is a default); what is given in a call must be read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from ..policies import (
    AdaptiveThreshold,
    Backtrack,
    CertaintyPrior,
    ConsistentTrajectory,
    Credit,
    EntropyRefresh,
    InsertDelete,
    JointThreshold,
    KLStability,
    LearnedCommit,
    LearnedFilter,
    LocalLeap,
    NearBest,
    Policy,
    Prophet,
    RunningConfidence,
    Sched,
    Wino,
)
from .caches import CacheOperation, names

# A function of a Preset, whose class is built on this table and so cannot be named here.
When = Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Reading:
    """When an option is read.

    when: whether a preset reads it. by: what reads it, in words. shows: the preset's fields that decide, for the error.
    """

    when: When
    by: str
    shows: tuple[str, ...]


def _always(preset: Any) -> bool:
    return True


def _tests(p: Any) -> bool:
    return p.rule in ("threshold", "factor") or p.run_threshold is not None


def _orders(p: Any) -> bool:
    return p.rule != "bernoulli"


def _falls_back(p: Any) -> bool:
    """Whether a step may find nothing that passes: the order decides then, and only then if it is no part of the
    test."""
    near = any(type(policy) is NearBest and (policy.slack > 0 or p.inclusive) for policy in p.policies)
    return not (near and p.rule == "threshold" and p.min_unmask == 1)


def _draws(p: Any) -> bool:
    return p.drafts == 1 and not any(policy.greedy_only for policy in p.policies)


def _ordered(p: Any) -> bool:
    return _orders(p) and p.drafts == 1 and _falls_back(p)


def _refreshed(p: Any) -> bool:
    return p.operation.grows_stale and p.drafts == 1


def _option_of_cache(name: str, *, drafts: bool = True) -> Reading:
    """An option that some caches read (`CacheOperation.reads`). drafts: whether they read it with drafts too."""
    serving = f"cache={names(lambda cache: name in cache.reads)}"
    if drafts:
        return Reading(lambda p: name in p.operation.reads, serving, ("cache",))
    return Reading(
        lambda p: name in p.operation.reads and p.drafts == 1, f"{serving} without drafts", ("cache", "drafts")
    )


REFRESHED = Reading(_refreshed, f"cache {names(lambda cache: cache.grows_stale)}, without drafts", ("cache", "drafts"))
ALWAYS = Reading(_always, "every decoder", ())
# A block-causal cache and drafts are incompatible with much: where a preset could not be told otherwise, the option is
# not read.
STRUCTURE: dict[str, Reading] = {
    "schedule": ALWAYS,
    "cache": ALWAYS,
    "stop": ALWAYS,
    "policies": ALWAYS,
    "block_length": Reading(lambda p: p.schedule != "canvas", "schedule 'block' and 'pipeline'", ("schedule",)),
    "sub_block_length": Reading(
        lambda p: not p.pipeline and p.drafts == 1,
        "decoders of one block at a time, without drafts",
        ("schedule", "drafts"),
    ),
    "causal_commit": _option_of_cache("causal_commit"),
    "first_token": _option_of_cache("first_token", drafts=False),
    "sub_block_cache": Reading(
        lambda p: "sub_block_cache" in p.operation.reads and p.sub_block_length is not None,
        f"cache={names(lambda cache: 'sub_block_cache' in cache.reads)} with a sub_block_length",
        ("cache", "sub_block_length"),
    ),
    "horizon": Reading(
        lambda p: p.visibility == "full" and p.schedule == "block" and "horizon" in p.operation.reads and not p.shadow,
        f"blocks of full visibility with cache {names(lambda cache: 'horizon' in cache.reads)}",
        ("visibility", "schedule", "cache"),
    ),
    "keep_last": Reading(lambda p: p.horizon is not None, "a horizon", ("horizon",)),
    "scatter_suffix": Reading(lambda p: p.horizon is not None, "a horizon", ("horizon",)),
    "vicinity": _option_of_cache("vicinity", drafts=False),
    "warmup_steps": REFRESHED,
    "refresh_interval": REFRESHED,
    "commit_delay": _option_of_cache("commit_delay"),
    "append_threshold": Reading(lambda p: p.pipeline, "schedule='pipeline'", ("schedule",)),
    "activate_threshold": Reading(
        lambda p: p.pipeline and p.scope != "first", "schedule='pipeline' with scope='each'", ("schedule", "scope")
    ),
    "scope": Reading(lambda p: p.pipeline, "schedule='pipeline'", ("schedule",)),
    "cfg_scale": Reading(
        lambda p: p.visibility == "full" and not p.pipeline and not p.shadow and p.drafts == 1,
        "full visibility without a pipeline, shadow rows and drafts",
        ("visibility", "schedule", "drafts"),
    ),
    "drafts": Reading(
        lambda p: (
            (p.rule, p.steps_per_block, p.policies, p.order_temperature, p.rank) == ("quota", None, (), 0, None)
            and p.operation.frozen_around
            and not (
                p.vicinity or p.first_token or p.cfg_scale or p.refresh_interval or p.warmup_steps or p.suppress_eos
            )
            and p.sub_block_length is None
            and p.run_threshold is None
            and p.score != "random"
        ),
        f"a static decoder of one token per step with cache {names(lambda cache: cache.frozen_around)}",
        ("rule", "steps_per_block", "cache"),
    ),
    # What happens to a drawn token; without a temperature nothing is drawn, and the option waits for one.
    "tempered": Reading(_draws, "decoders that may draw", ("drafts",)),
    "top_k_first": Reading(_draws, "decoders that may draw", ("drafts",)),
    "greedy_filters": Reading(
        lambda p: not any(policy.greedy_only for policy in p.policies), "decoders with filters", ()
    ),
}
# What decides which positions a step writes; a policy may decide it instead.
RULE: dict[str, Reading] = {
    "rule": ALWAYS,
    "threshold": Reading(lambda p: p.rule == "threshold", "rule='threshold'", ("rule",)),
    "inclusive": Reading(lambda p: p.rule in ("threshold", "entropy"), "rule 'threshold' or 'entropy'", ("rule",)),
    "factor": Reading(lambda p: p.rule == "factor", "rule='factor'", ("rule",)),
    "entropy_bound": Reading(lambda p: p.rule in ("entropy", "renoise"), "rule 'entropy' or 'renoise'", ("rule",)),
    "run_threshold": Reading(
        lambda p: not p.pipeline and p.drafts == 1 and p.rule != "bernoulli" and p.score != "position",
        "blocks one at a time, by a rule with a score, without drafts",
        ("rule", "score", "schedule", "drafts"),
    ),
    "score": Reading(
        lambda p: _tests(p) or (_orders(p) and p.rank is None),
        "rule 'threshold' or 'factor', a run_threshold, and an order that has no rank of its own",
        ("rule", "rank"),
    ),
    "rank": Reading(_ordered, "a rule with an order that decides", ("rule", "min_unmask", "drafts", "policies")),
    "order_temperature": Reading(
        _ordered, "a rule with an order that decides", ("rule", "min_unmask", "drafts", "policies")
    ),
    "suppress_eos": Reading(
        lambda p: _orders(p) and p.drafts == 1, "a rule with an order, without drafts", ("rule", "drafts")
    ),
    "min_unmask": Reading(
        lambda p: p.rule in ("threshold", "factor", "entropy") and not (p.pipeline and p.scope != "first"),
        "rule 'threshold', 'factor' or 'entropy', of a pipeline with scope='first'",
        ("rule", "schedule", "scope"),
    ),
    "steps_per_block": Reading(
        lambda p: (p.quota or p.rule in ("schedule", "bernoulli")) and p.drafts == 1,
        "rule 'quota', 'schedule' or 'bernoulli', or min_unmask=None, without drafts",
        ("rule", "min_unmask", "drafts"),
    ),
    "quota_of": Reading(
        lambda p: p.quota and p.steps_per_block is not None and p.drafts == 1,
        "rule 'quota', or min_unmask=None, with steps_per_block and without drafts",
        ("rule", "min_unmask", "steps_per_block"),
    ),
    "schedule_eps": Reading(lambda p: p.rule in ("schedule", "bernoulli"), "rule 'schedule' or 'bernoulli'", ("rule",)),
    "strict_reference": Reading(lambda p: p.rule == "schedule", "rule='schedule'", ("rule",)),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """What a policy makes of the rule.

    rules, caches: those that it goes with; None = any. Caches are told by a fact of their row. sub_blocks: whether it
    goes with them: what chooses in the whole block,
        and nothing besides, would wait for positions that may not be written.
    replaces: options that its own decision puts out of use. reads: options that it reads whatever the rule does.
    through: options of the rule through which it acts; its numbers are read where one of them is. numbers: when single
    numbers
        of its own are read, for those that are not always.
    """

    rules: tuple[str, ...] | None = None
    replaces: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    through: frozenset[str] = frozenset()
    numbers: dict[str, Reading] = dataclasses.field(default_factory=dict)
    caches: Callable[[CacheOperation], bool] | None = None
    sub_blocks: bool = True


_ALL, _VALUE = frozenset(RULE), frozenset({"threshold", "factor", "entropy_bound"})
_SCHEDULE = frozenset({"steps_per_block"})
_QUOTA = _SCHEDULE | {"quota_of"}  # what `View.quota` reads
_BY_SCORE = frozenset({"score", "suppress_eos"})
_WEIGHTED = Reading(
    lambda p: _tests(p) or (p.rank is None and not p.order_temperature),
    "a rule that tests the score or orders by it",
    ("rule", "rank", "order_temperature"),
)
_EXPONENTIAL = Reading(
    lambda p: any(isinstance(policy, Sched) and policy.curve == "exponential" for policy in p.policies),
    "curve='exponential'",
    (),
)


def _commits_alone(cache: CacheOperation) -> bool:
    return cache.commits and not cache.commit_selects


def _grows_stale_in_blocks(cache: CacheOperation) -> bool:
    return cache.grows_stale and "block" in cache.schedules


# Policies that are not here may read any option of the rule, and may decide without it.
UNKNOWN = Part(reads=_ALL)
PARTS: dict[type[Policy], Part] = {
    NearBest: Part(("threshold",), through=_VALUE),
    LocalLeap: Part(("threshold",), through=_VALUE),
    AdaptiveThreshold: Part(("threshold", "factor", "entropy"), through=_VALUE),
    CertaintyPrior: Part(through=_BY_SCORE, numbers={"sigma": _WEIGHTED}),
    KLStability: Part(("threshold",), replaces=frozenset({"inclusive", "min_unmask", "run_threshold"}), reads=_QUOTA),
    ConsistentTrajectory: Part(replaces=_ALL, reads=_BY_SCORE | _SCHEDULE, sub_blocks=False),
    Credit: Part(("quota", "threshold", "factor", "entropy", "schedule")),
    Prophet: Part(reads=_SCHEDULE),
    Sched: Part(reads=_SCHEDULE, numbers={"rate": _EXPONENTIAL}),
    RunningConfidence: Part(replaces=_ALL, reads=_BY_SCORE | _SCHEDULE),
    Backtrack: Part(("threshold",), replaces=_BY_SCORE | {"threshold", "rank", "order_temperature"}),
    Wino: Part(),
    JointThreshold: Part(),
    InsertDelete: Part(("threshold",), replaces=_ALL - {"rule", "threshold"}, caches=_commits_alone),
    EntropyRefresh: Part(caches=_grows_stale_in_blocks),
    LearnedFilter: Part(replaces=_ALL, reads=_BY_SCORE | _QUOTA, sub_blocks=False),
    LearnedCommit: Part(replaces=_ALL),
}


def part_of(policy: Policy) -> Part:
    return PARTS.get(type(policy), UNKNOWN)


def unread(preset: Any, given: Iterable[str], base: Any) -> list[str]:
    """A sentence for each of the options `given`, by which `preset` came of `base`, that it does not read.

    An option that the preset could not do without is no such option (`horizon=None` beside a cache that allows none).
    """
    live = {name for name, reading in RULE.items() if reading.when(preset)}
    replaced: dict[str, str] = {}
    for policy in preset.policies:
        part = part_of(policy)
        # What reaches a policy through the rule is gone where an earlier one has replaced it; the schedule is read as
        # it is.
        reads = {name for name in part.reads if part is UNKNOWN or name in _QUOTA or name not in replaced}
        replaced |= {name: type(policy).__name__ for name in part.replaces & live}
        live = (live - part.replaces) | reads
    if preset.steps_per_block is None:
        live.discard("quota_of")  # one token a step is one, whatever it is a share of
    numbers: dict[str, Reading] = {}
    for policy in preset.policies:
        part = part_of(policy)
        idle = part.through and not part.through & live
        by_rule = Reading(lambda p: False, f"a decoder whose {' or '.join(sorted(part.through))} decides", ())
        for field in dataclasses.fields(policy):
            numbers[field.name] = by_rule if idle else part.numbers.get(field.name, ALWAYS)
    reasons = []
    for name in given:
        reading = RULE.get(name) or STRUCTURE.get(name) or numbers.get(name, ALWAYS)
        if name in live or (name not in RULE and reading.when(preset)) or _needed(preset, name, base):
            continue
        if name in replaced:
            reasons.append(
                f"{name} has no effect with policy {replaced[name]} (preset {preset.name}), which decides that itself"
            )
            continue
        shows = ", ".join(f"{field}={getattr(preset, field)!r}" for field in reading.shows)
        where = f"with {shows}" if shows else "here"
        reasons.append(f"{name} has no effect {where} (preset {preset.name}): it is read by {reading.by}")
    return reasons


def _needed(preset: Any, name: str, base: Any) -> bool:
    """Whether the preset would be refused with the value that `base` has."""
    if not hasattr(preset, name):
        return False
    try:
        dataclasses.replace(preset, **{name: getattr(base, name)})
    except ValueError:
        return True
    return False
