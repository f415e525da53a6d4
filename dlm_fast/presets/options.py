"""When a decoder reads an option: one table, by which `generate` refuses an option that would change nothing.

Somebody who tunes an option that the decoder does not read would conclude that the option does not matter. A preset's
own fields may hold numbers that its decoder does not read, since every field has a default; an option of a call must be
read.
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

# A condition on a Preset. The class Preset is built on this table, so this file cannot import the class.
When = Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Reading:
    """When an option is read.

    Attributes:
        when: whether a preset reads the option.
        by: what reads the option, in words, for the error.
        shows: the fields of the preset that decide, for the error.
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
    """Whether it may happen that no position passes the test, so that the order decides what a step writes."""
    always_passes = any(type(policy) is NearBest and (policy.slack > 0 or p.inclusive) for policy in p.policies)
    return not (always_passes and p.rule == "threshold" and p.min_unmask == 1)


def _draws(p: Any) -> bool:
    return p.drafts == 1 and not any(policy.greedy_only for policy in p.policies)


def _ordered(p: Any) -> bool:
    return _orders(p) and p.drafts == 1 and _falls_back(p)


def _refreshed(p: Any) -> bool:
    return p.operation.grows_stale and p.drafts == 1


def _option_of_cache(name: str, *, drafts: bool = True) -> Reading:
    """When an option is read that only some caches read (`CacheOperation.reads`).

    `drafts` says whether these caches read the option with drafts too.
    """
    cache_names = f"cache={names(lambda cache: name in cache.reads)}"
    if drafts:
        return Reading(lambda p: name in p.operation.reads, cache_names, ("cache",))
    return Reading(
        lambda p: name in p.operation.reads and p.drafts == 1, f"{cache_names} without drafts", ("cache", "drafts")
    )


REFRESHED = Reading(_refreshed, f"cache {names(lambda cache: cache.grows_stale)}, without drafts", ("cache", "drafts"))
ALWAYS = Reading(_always, "every decoder", ())
# The options of the decode loop: schedule, cache, blocks, guidance, drafts and draws. An option also counts as not read
# where the decoder allows no other value than the preset's, as a block-causal cache and drafts often do.
STRUCTURE: dict[str, Reading] = {
    "schedule": ALWAYS,
    "cache": ALWAYS,
    "stop": ALWAYS,
    "policies": ALWAYS,
    "block_length": Reading(lambda p: p.schedule != "canvas", "schedule 'block' and 'pipeline'", ("schedule",)),
    "last_block": Reading(lambda p: p.schedule != "canvas", "schedule 'block' and 'pipeline'", ("schedule",)),
    "sub_block_length": Reading(
        lambda p: not p.pipeline and p.drafts == 1,
        "decoders of one block at a time, without drafts",
        ("schedule", "drafts"),
    ),
    "first_token": _option_of_cache("first_token", drafts=False),
    "draws_first_token": Reading(lambda p: p.first_token, "first_token", ("first_token",)),
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
    "exclude_eos": ALWAYS,
    # Options of the draws count as read without a temperature too, since the temperature is no option of a preset.
    "tempered": Reading(_draws, "decoders that may draw", ("drafts",)),
    "top_k_first": Reading(_draws, "decoders that may draw", ("drafts",)),
    "greedy_filters": Reading(
        lambda p: not any(policy.greedy_only for policy in p.policies), "decoders with filters", ()
    ),
}
# The options of the rule, which decide what a step writes. A policy may decide in their place.
RULE: dict[str, Reading] = {
    "rule": ALWAYS,
    "threshold": Reading(lambda p: p.rule == "threshold", "rule='threshold'", ("rule",)),
    "inclusive": Reading(lambda p: p.rule in ("threshold", "entropy"), "rule 'threshold' or 'entropy'", ("rule",)),
    "factor": Reading(lambda p: p.rule == "factor", "rule='factor'", ("rule",)),
    "published_factor": Reading(lambda p: p.rule == "factor", "rule='factor'", ("rule",)),
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
    "remainder": Reading(
        lambda p: p.quota and p.steps_per_block is not None and p.drafts == 1,
        "rule 'quota', or min_unmask=None, with steps_per_block and without drafts",
        ("rule", "min_unmask", "steps_per_block"),
    ),
    "schedule_eps": Reading(lambda p: p.rule in ("schedule", "bernoulli"), "rule 'schedule' or 'bernoulli'", ("rule",)),
    "strict_reference": Reading(lambda p: p.rule == "schedule", "rule='schedule'", ("rule",)),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """What a policy makes of the rule, and what the policy goes with.

    Attributes:
        rules: the rules that the policy goes with; None = all.
        replaces: options of the rule that are not read any more, since the policy decides instead.
        reads: options that the policy reads, whatever the rule reads.
        through: options of the rule through which the policy acts; the policy's numbers are read where the rule reads
            one of these options. Empty = the numbers are always read.
        numbers: when a number of the policy is read, for the numbers that are not always read.
        caches: whether the policy goes with a cache operation; None = with all.
        sub_blocks: whether the policy goes with sub-blocks. A policy that chooses in the whole block does not, because
            a choice outside the sub-block would not be written.
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
_SHARES = frozenset({"quota_of", "remainder"})
_QUOTA = _SCHEDULE | _SHARES  # the options that `View.quota` reads
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


# A policy that is not in this table may read any option of the rule, and may also decide without the rule.
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
    """The table's entry of a policy."""
    return PARTS.get(type(policy), UNKNOWN)


def unread(preset: Any, options: Iterable[str], base: Any) -> list[str]:
    """One sentence for each of the `options` that `preset` does not read.

    The call made `preset` by replacing these options in `base`. An option counts as read if `preset` would be refused
    with the value of `base` (`horizon=None` beside a cache that allows no horizon).
    """
    # 1. The options of the rule that are read, after every policy has replaced some and read others.
    rule_options = {name for name, reading in RULE.items() if reading.when(preset)}
    replaced: dict[str, str] = {}
    for policy in preset.policies:
        part = part_of(policy)
        # A policy reads the score that the rule made, so an option of the score that an earlier policy replaced is not
        # read any more. The schedule is different, since every policy reads the schedule itself.
        reads = {name for name in part.reads if part is UNKNOWN or name in _QUOTA or name not in replaced}
        replaced |= {name: type(policy).__name__ for name in part.replaces & rule_options}
        rule_options = (rule_options - part.replaces) | reads
    if preset.steps_per_block is None:
        rule_options -= _SHARES  # one token per step is one, whatever the quota is spread over

    # 2. The numbers of the policies.
    numbers: dict[str, Reading] = {}
    for policy in preset.policies:
        part = part_of(policy)
        has_no_effect = part.through and not part.through & rule_options
        by_rule = Reading(lambda p: False, f"a decoder whose {' or '.join(sorted(part.through))} decides", ())
        for field in dataclasses.fields(policy):
            numbers[field.name] = by_rule if has_no_effect else part.numbers.get(field.name, ALWAYS)

    # 3. A sentence for every option that nothing reads.
    reasons = []
    for name in options:
        reading = RULE.get(name) or STRUCTURE.get(name) or numbers.get(name, ALWAYS)
        if name in rule_options or (name not in RULE and reading.when(preset)) or _needed(preset, name, base):
            continue
        if name in replaced:
            reasons.append(
                f"{name} has no effect with policy {replaced[name]} (preset {preset.name}), which decides that itself, "
                f"got {name}={value_of(preset, name)!r}"
            )
            continue
        shows = ", ".join(f"{field}={getattr(preset, field)!r}" for field in reading.shows)
        where = f"with {shows}" if shows else "here"
        reasons.append(
            f"{name} has no effect {where} (preset {preset.name}): it is read by {reading.by}, got "
            f"{name}={value_of(preset, name)!r}"
        )
    return reasons


def value_of(preset: Any, name: str) -> Any:
    """The value of an option of a preset, or of a number of a policy of the preset."""
    return getattr(next(each for each in (preset, *preset.policies) if hasattr(each, name)), name)


def _needed(preset: Any, name: str, base: Any) -> bool:
    """Whether the preset would be refused if the option `name` had the value that `base` has."""
    if not hasattr(preset, name):
        return False
    try:
        dataclasses.replace(preset, **{name: getattr(base, name)})
    except ValueError:
        return True
    return False
