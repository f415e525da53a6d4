"""`Preset`: one decoder as a validated row of data."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm_kernels.rules import Scope, UnmaskRule

from ..limits import MAX_DRAFTS, MAX_NUMBER, MAX_SHIFT, flag, heat, number, shown, whole
from ..policies import Policy
from .caches import CACHES, CacheOperation, names
from .options import part_of

VISIBILITIES = ("full", "block")
# What each of an option's names means.
SCHEDULES = {
    "block": "one block at a time",
    "canvas": "everything is one block (Dream)",
    "pipeline": "several blocks at once, the next appended when the last is filled far enough (D2F)",
}
RULES = {
    "quota": "a fixed number of positions: the block spread over `steps_per_block` steps",
    "threshold": "every position whose score is above `threshold`, and `min_unmask` at least (the quota if that is "
    "None)",
    "factor": "the rank-aware threshold of Fast-dLLM: the more positions pass, the lower it is",
    "entropy": "positions in order while their entropies fit a budget of `entropy_bound` nats (EB-Sampler)",
    "schedule": "the share of the masks by which a time that falls from 1 to `schedule_eps` shrinks, one at least",
    "bernoulli": "each position with that share as its probability (Dream)",
    "renoise": "there are no masks: positions within the entropy budget get tokens, all others new random ones",
}
LAST_BLOCKS = {
    "crop": "the canvas ends at `max_new_tokens`, so that its last block may be shorter than the others (LLaDA, "
    "Stable-DiffCoder)",
    "whole": "the canvas is filled up to whole blocks, and what lies behind the limit is cut afterwards, at the cost "
    "of a whole block (SDAR, LLaDA2)",
    "drop": "the canvas ends with its last whole block, so that fewer than `max_new_tokens` may be decoded (D2F as "
    "published)",
}
SCORES = {
    "confidence": "probability of the token that is predicted or drawn",
    "margin": "top-1 minus top-2 probability",
    "neg_entropy": "minus the entropy in nats",
    "random": "a number drawn for each position",
    "position": "the leftmost position first",
}
QUOTAS = {
    "masks": "the masks that the block holds when it is opened (LLaDA's num_transfer_tokens)",
    "block": "the block's full length, also where it begins with the end of the prompt (SDAR, LLaDA2)",
}
REMAINDERS = {
    "first": "the first steps write one more (LLaDA)",
    "even": "evenly: after step i of S, floor(m (S - i) / S) of the m positions are left, and a step writes one at "
    "least (RND1)",
}
STOPS = {
    "never": "a row ends with its canvas",
    "closed": "once a written EOS has nothing masked before it",
    "after_block": "after the block in which an EOS was written",
    "all_stop": "after a block of nothing but EOS",
    "appends": "a written EOS bars further blocks of a pipeline (D2F)",
    "fill": "the first written EOS fills the rest of the canvas; of full visibility, masks before it then see it "
    "(d3LLM)",
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """One decoder: a validated choice of visibility, schedule, cache operation, unmask rule, policies and stop rule.

    Attributes:
        name: as published.
        source: the paper.
        exactness: what its tokens equal, and relative to what; begins with "exact" or "approximate".
        visibility: the model visibility that it decodes, "full" or "block" (`DiffusionConfig.visibility`).
        cache: what is kept between forwards, a row of `presets.caches.CACHES`.
        rule: which masked positions of the block a step writes (`RULES`).
        needs: what it needs beyond an ordinary checkpoint, such as weights that were trained for it; "" = nothing.

        schedule: how many blocks are decoded at once (`SCHEDULES`).
        block_length: positions denoised together; None = the model's own, or the whole generation where it has none.
        last_block: what becomes of a last block that `max_new_tokens` cuts (`LAST_BLOCKS`); a canvas that is given is
            neither filled up nor cut.
        sub_block_length: only the leftmost sub-block with masks is written (Fast-dLLM v2); None = no sub-blocks.
        first_token: whether prefill and commit forwards predict the token behind them, which opens the next block.
        draws_first_token: whether that token is drawn like any other (Nemotron), and not the likeliest one whatever the
            temperature (Fast-dLLM v2).
        sub_block_cache: whether later steps of a sub-block recompute nothing else, on the block's older keys.
        horizon: positions behind the block that a denoise step sees; None = all.
        keep_last: whether it sees the canvas's last position besides.
        scatter_suffix: whether positions of the horizon are dropped at random, the farther the likelier (DPad).
        vicinity: positions on either side of the block that a denoise step recomputes with it.
        warmup_steps: a row's first forwards whose keys nobody reads; the one after them is of everything too (dInfer).
        refresh_interval: every n-th step (`CacheOperation.refreshed`) sends a row to a refresh; None = no step does,
            besides those that the cache itself asks for.
        commit_delay: forwards that must have found a block finished before it is appended to the cache (d3LLM).
        append_threshold: filled share of the last block at which a pipeline appends the next one.
        activate_threshold: filled share of the block before at which a block must write a token every step.

        score: what the rule tests (`SCORES`).
        rank: what orders positions; None = the score.
        order_temperature: above 0, positions are drawn by softmax(rank / order_temperature) instead of taken in order.
        threshold: of rule "threshold".
        inclusive: whether a score equal to the threshold passes; of "entropy", whether a sum equal to the budget does
            not.
        factor: of rule "factor".
        published_factor: whether rule "factor" accepts the last position, if that one alone fails, as Fast-dLLM's code
            does; so two positions are always written together.
        entropy_bound: of rules "entropy" and "renoise", in nats.
        run_threshold: the best position of a run of adjacent masks is written above this score besides; None = it is
            not.
        min_unmask: positions that a step writes at least; None = the quota.
        steps_per_block: steps over which a quota is spread; None = one token per step.
        quota_of: what is spread (`QUOTAS`).
        remainder: which steps take one more where it does not divide (`REMAINDERS`).
        schedule_eps: the time at which rules "schedule" and "bernoulli" end.
        strict_reference: whether rule "schedule" may write nothing in a step, as published.
        scope: where a pipeline forces tokens: in "each" active block or in the "first" with masks; None = "each".
        tempered: whether statistics are those of the tempered, filtered distribution (Dream, SDAR), not of the model's.
        top_k_first: whether top_k filters before top_p.
        greedy_filters: whether the filters hold at temperature 0: same token, higher confidence (Dream, D2F, RCR).
        suppress_eos: whether a predicted EOS is ranked last and passes no test (LLaDA's confidence_eos_eot_inf).
        exclude_eos: whether the EOS, the first of the model's eos_token_ids, leaves the softmax: it is never predicted,
            and the probabilities of the other tokens, of which one may end a turn, add up to 1 (LLaDA's
            logits_eos_inf).
        cfg_scale: scale of the guidance against a copy without the given tokens; 0 = off.
        policies: what modifies the rule (`dlm_fast.policies`).
        drafts: canvases that a step verifies at once (FreeDave); 1 = none.
        stop: when a row ends (`STOPS`); its text ends at the first EOS under each. What differs is the cost and, of
            "fill" over full visibility, the tokens before that EOS.
    """

    name: str
    source: str
    exactness: str
    visibility: str
    cache: str
    rule: str
    needs: str = ""
    schedule: str = "block"
    block_length: int | None = None
    last_block: str = "crop"
    sub_block_length: int | None = None
    first_token: bool = False
    draws_first_token: bool = False
    sub_block_cache: bool = False
    horizon: int | None = None
    keep_last: bool = False
    scatter_suffix: bool = False
    vicinity: int = 0
    warmup_steps: int = 0
    refresh_interval: int | None = None
    commit_delay: int = 1
    append_threshold: float = 1.0
    activate_threshold: float = 1.0
    score: str = "confidence"
    rank: str | None = None
    order_temperature: float = 0.0
    threshold: float = 0.9
    inclusive: bool = False
    factor: float = 1.0
    published_factor: bool = False
    entropy_bound: float = 0.1
    run_threshold: float | None = None
    min_unmask: int | None = 1
    steps_per_block: int | None = None
    quota_of: str = "masks"
    remainder: str = "first"
    schedule_eps: float = 1e-3
    strict_reference: bool = False
    scope: Scope | None = None
    tempered: bool = False
    top_k_first: bool = False
    greedy_filters: bool = False
    suppress_eos: bool = False
    exclude_eos: bool = False
    cfg_scale: float = 0.0
    policies: tuple[Policy, ...] = ()
    drafts: int = 1
    stop: str = "closed"

    def __post_init__(self) -> None:
        check(self)

    @property
    def operation(self) -> CacheOperation:
        """Its row of the table of caches."""
        return CACHES[self.cache]

    @property
    def pipeline(self) -> bool:
        return self.schedule == "pipeline"

    @property
    def single_block(self) -> bool:
        """Whether everything that is to be written is one block."""
        return self.schedule == "canvas"

    @property
    def quota(self) -> bool:
        """Whether a fixed schedule says how many positions a step writes."""
        return self.rule == "quota" or (self.rule in ("threshold", "factor", "entropy") and self.min_unmask is None)

    @property
    def quota_in_op(self) -> bool:
        """Whether that schedule is the one that the `unmask` op computes itself: LLaDA's, of the block's masks."""
        return self.quota and self.quota_of == "masks" and self.remainder == "first"

    @property
    def by_share(self) -> bool:
        """Whether a step writes a share of the masks that a falling time gives (Dream)."""
        return self.rule in ("schedule", "bernoulli")

    @property
    def by_chance(self) -> bool:
        """Whether every position is written with that share as its probability."""
        return self.rule == "bernoulli"

    @property
    def by_entropy(self) -> bool:
        """Whether a step writes within a budget of entropy."""
        return self.rule == "entropy"

    @property
    def takes_last_rank(self) -> bool:
        """Whether the last position is written though it fails, if it alone does (Fast-dLLM's code)."""
        return self.rule == "factor" and self.published_factor

    @property
    def shadow(self) -> bool:
        """Whether a copy of the block, its shadow, verifies it (WINO)."""
        return any(policy.remask == "wino" for policy in self.policies)

    @property
    def lane_fields(self) -> set[str]:
        """The fields of `Lanes` that somebody reads, of those that are made only then."""
        needed = {"row": "masked", "region": "written"}
        fields = {name for policy in self.policies for name in policy.lane_fields}
        return fields | {needed[policy.reads] for policy in self.policies if policy.reads in needed}

    @property
    def families(self) -> set[str]:
        """What its policies replace (`Policy.family`)."""
        return {policy.family for policy in self.policies}

    def prefill_rule(self) -> UnmaskRule:
        """The rule of a prefill, which selects nothing."""
        return UnmaskRule("none", cache=self.operation.op(self.pipeline), first_token=self.first_token, stop=self.stop)

    def unmask_rule(self, *, exact: bool = False) -> UnmaskRule:
        """The static part of the `unmask` op. exact: a policy said itself which positions pass."""
        passes = {"quota": "none", "schedule": "none", "bernoulli": "threshold", "renoise": "entropy"}
        remask = next((policy.remask for policy in self.policies if policy.family == "revise"), "none")
        return UnmaskRule(
            passes="threshold" if exact else passes.get(self.rule, self.rule),
            inclusive=self.inclusive and not exact and self.rule in ("threshold", "entropy"),
            quota=self.quota_in_op and not exact,
            pipeline=self.pipeline,
            scope=(self.scope or "each") if self.pipeline else "row",
            runs=self.run_threshold is not None and not exact,
            edit="edit" in self.families,
            renoise=self.rule == "renoise",
            remask=remask,
            cache=self.operation.op(self.pipeline),
            first_token=self.first_token,
            stop=self.stop,
        )

    @property
    def value(self) -> float:
        """The number its pass test compares with (unused by "quota")."""
        numbers = {
            "threshold": self.threshold,
            "factor": self.factor,
            "entropy": self.entropy_bound,
            "renoise": self.entropy_bound,
        }
        return numbers.get(self.rule, 0.0)

    @property
    def supported(self) -> bool:
        """Whether `generate` runs it: uniform-noise models have no family yet."""
        return self.rule != "renoise"

    def options(self) -> dict[str, Any]:
        """What `generate` may replace: its own fields and its policies' numbers, with their values."""
        own = {name: getattr(self, name) for name in FIELDS}
        for policy in self.policies:
            own |= {
                field.name: getattr(policy, field.name) for field in dataclasses.fields(policy) if field.name not in own
            }
        return own

    def replace(self, **options: Any) -> Preset:
        """A copy with some options replaced; an option of a policy reaches every policy that has it. Unknown ones
        raise.

        Options that the copy does not read are allowed here: a preset may be made in several steps. `generate` refuses
        them.
        """
        own = {name: value for name, value in options.items() if name in FIELDS}
        policies, before = [], own.pop("policies", self.policies)
        _check_tuple(self.name, before)
        known = {*FIELDS, *(field.name for policy in before for field in dataclasses.fields(policy))}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(
                f"preset {self.name}: unknown options {', '.join(unknown)}; options are {', '.join(self.options())}"
            )
        for policy in before:
            names = {field.name for field in dataclasses.fields(policy)} - set(FIELDS)
            policies.append(
                dataclasses.replace(policy, **{name: value for name, value in options.items() if name in names})
            )
        return dataclasses.replace(self, **own, policies=tuple(policies))


FIELDS = tuple(
    field.name
    for field in dataclasses.fields(Preset)
    if field.name not in ("name", "source", "exactness", "visibility", "needs")
)


def check(preset: Preset) -> None:
    """Raises ValueError for a value out of range, and for a combination that makes no sense, saying why."""

    def fail(rule: str) -> None:
        raise ValueError(f"preset {preset.name}: {rule}")

    p = preset
    for name in ("name", "source", "exactness", "needs"):
        if not isinstance(getattr(p, name), str):
            raise TypeError(f"preset {shown(p.name)}: {name} must be a text, got {name}={shown(getattr(p, name))}")
    known = {
        "visibility": VISIBILITIES,
        "schedule": SCHEDULES,
        "cache": CACHES,
        "rule": RULES,
        "score": SCORES,
        "stop": STOPS,
    }
    known |= {"rank": (None, *SCORES), "scope": (None, "each", "first"), "quota_of": QUOTAS, "remainder": REMAINDERS}
    known |= {"last_block": LAST_BLOCKS}
    for name, values in known.items():
        if getattr(p, name) not in list(values):
            fail(f"{name} must be one of {', '.join(map(str, values))}, got {name}={shown(getattr(p, name))}")
    owner = f"preset {p.name}"
    for name in ("block_length", "sub_block_length", "steps_per_block", "refresh_interval"):
        whole(owner, name, getattr(p, name), 1, none=True)
    whole(owner, "horizon", p.horizon, none=True)
    whole(owner, "vicinity", p.vicinity)
    whole(owner, "warmup_steps", p.warmup_steps)
    whole(owner, "commit_delay", p.commit_delay, 1)
    whole(owner, "drafts", p.drafts, 1, MAX_DRAFTS)
    # Every step makes progress; in a pipeline it may be made by another of the row's blocks.
    whole(owner, "min_unmask", p.min_unmask, 0 if p.pipeline else 1, none=True)
    # A negative entropy is compared with a negative threshold (dParallel's H <= 0.5 is a threshold of -0.5).
    low, high = (-MAX_NUMBER, MAX_NUMBER) if p.score == "neg_entropy" else (0, 1)
    number(owner, "threshold", p.threshold, low, high)
    number(owner, "run_threshold", p.run_threshold, low, high, none=True)
    number(owner, "factor", p.factor, 0)
    number(owner, "entropy_bound", p.entropy_bound, 0)
    number(owner, "cfg_scale", p.cfg_scale, 0, MAX_SHIFT)
    number(owner, "append_threshold", p.append_threshold, 0, 1)
    number(owner, "activate_threshold", p.activate_threshold, 0, 1)
    number(owner, "schedule_eps", p.schedule_eps, 0, 1)
    if not p.schedule_eps > 0:
        fail(f"schedule_eps must be a number > 0, got schedule_eps={p.schedule_eps!r}")
    heat(owner, "order_temperature", p.order_temperature)
    for field in dataclasses.fields(p):
        if field.type == "bool":
            flag(owner, field.name, getattr(p, field.name))
    _check_tuple(p.name, p.policies)
    _check_caches(p, fail)
    _check_rules(p, fail)
    _check_policies(p, fail)


def _check_tuple(name: str, policies: Any) -> None:
    """Raises TypeError unless the policies of a preset are a tuple of policies."""
    if not isinstance(policies, tuple) or not all(isinstance(policy, Policy) for policy in policies):
        raise TypeError(f"preset {name}: policies must be a tuple of Policy, got policies={shown(policies)}")


def _check_caches(p: Preset, fail: Any) -> None:
    cache = p.operation
    if cache.visibility == "block" and p.visibility != "block":
        fail(f"cache={p.cache!r} needs a block-causal model (visibility 'block'), got visibility={p.visibility!r}")
    if cache.visibility == "full" and p.visibility != "full":
        exact = names(lambda other: other.stores and other.visibility != "full" and other.schedules == cache.schedules)
        fail(f"cache={p.cache!r} approximates full visibility; a block-causal model has an exact one, cache={exact}")
    only_pipelines = cache.schedules == ("pipeline",)
    if (only_pipelines and not p.pipeline) or (p.pipeline and "pipeline" not in cache.schedules):
        pipelines = names(lambda other: "pipeline" in other.schedules)
        fail(f"schedule='pipeline' goes with cache {pipelines}, got schedule={p.schedule!r}, cache={p.cache!r}")
    if cache.defers(p.pipeline) and p.visibility != "block":
        fail(
            f"cache={p.cache!r} of one block at a time needs a block-causal model (visibility 'block'), got "
            f"visibility={p.visibility!r}"
        )
    if p.schedule not in cache.schedules:
        serving = names(lambda other: p.schedule in other.schedules)
        fail(f"schedule={p.schedule!r} goes with cache {serving}, got cache={p.cache!r}")
    if p.first_token and "first_token" not in cache.reads:
        serving = names(lambda other: "first_token" in other.reads)
        fail(f"first_token is a part of cache={serving}, got cache={p.cache!r}")
    if p.sub_block_cache and ("sub_block_cache" not in cache.reads or p.sub_block_length is None):
        fail(
            f"sub_block_cache needs cache={names(lambda other: 'sub_block_cache' in other.reads)} and a "
            f"sub_block_length, got cache={p.cache!r}, sub_block_length={p.sub_block_length}"
        )
    if p.vicinity and "vicinity" not in cache.reads:
        fail(f"vicinity widens cache={names(lambda other: 'vicinity' in other.reads)}, got cache={p.cache!r}")
    if p.horizon is not None and (p.visibility != "full" or "horizon" not in cache.reads or p.schedule != "block"):
        serving = names(lambda other: "horizon" in other.reads)
        fail(f"horizon cuts what full-visibility blocks look ahead with cache {serving}")
    if (p.keep_last or p.scatter_suffix) and p.horizon is None:
        got = f"keep_last={p.keep_last}, scatter_suffix={p.scatter_suffix}"
        fail(f"keep_last and scatter_suffix need a horizon, got {got}")
    if (p.warmup_steps or p.refresh_interval) and not cache.grows_stale:
        stale = names(lambda other: other.grows_stale)
        fail(f"warmup_steps and refresh_interval refresh a cache {stale}, got cache={p.cache!r}")


def _check_rules(p: Preset, fail: Any) -> None:
    if p.rule == "entropy" and "random" in (p.score, p.rank):
        fail("rule='entropy' needs an order by score, got score='random'")
    if p.score == "position" and (p.rule in ("threshold", "factor") or p.run_threshold is not None):
        tests = f"rule={p.rule!r}" if p.run_threshold is None else "run_threshold"
        fail(
            f"{tests} tests a score, and a position is none; to go from the left use rank='position', got "
            "score='position'"
        )
    if p.rule in ("schedule", "bernoulli") and p.schedule != "canvas":
        fail(f"rule={p.rule!r} is a schedule over the whole canvas, got schedule={p.schedule!r}")
    if p.rule == "bernoulli" and p.order_temperature:
        fail("rule='bernoulli' has no order, got an order_temperature")
    if p.rule == "bernoulli" and p.run_threshold is not None:
        fail(f"rule='bernoulli' tests no score, got run_threshold={p.run_threshold!r}")
    if p.published_factor and p.min_unmask is None:
        fail("published_factor goes without a quota, got min_unmask=None")
    if p.stop in ("appends", "fill") and not p.pipeline:
        fail(f"stop={p.stop!r} is a pipeline's, got schedule={p.schedule!r}")
    if p.stop == "all_stop" and p.pipeline:
        fail("stop='all_stop' ends a row after a block, which a pipeline does not wait for")
    if p.pipeline:
        if p.rule != "threshold":
            fail(f"schedule='pipeline' needs a flat test (rule='threshold'), got rule={p.rule!r}")
        if p.min_unmask is None or p.sub_block_length is not None or p.run_threshold is not None:
            fail("schedule='pipeline' goes without min_unmask=None, sub-blocks and run_threshold")
        if p.scope != "first" and p.min_unmask != 1:
            fail(f"scope 'each' forces one token per active block, got min_unmask={p.min_unmask}")
    elif p.scope is not None or p.append_threshold != 1 or p.activate_threshold != 1:
        got = f"scope={p.scope!r}, append_threshold={p.append_threshold}, activate_threshold={p.activate_threshold}"
        fail(f"scope, append_threshold and activate_threshold are a pipeline's, got {got}")


def _check_policies(p: Preset, fail: Any) -> None:
    for policy in p.policies:
        part, name = part_of(policy), type(policy).__name__
        if part.rules is not None and p.rule not in part.rules:
            fail(f"policy {name} goes with rule {' or '.join(map(repr, part.rules))}, got rule={p.rule!r}")
        if part.caches is not None and not part.caches(p.operation):
            fail(f"policy {name} goes with cache {names(part.caches)}, got cache={p.cache!r}")
        if type(policy).refreshes is not Policy.refreshes and not p.operation.grows_stale:
            stale = names(lambda cache: cache.grows_stale)
            fail(f"policy {name} asks for refreshes, which go with cache {stale}, got cache={p.cache!r}")
        if p.sub_block_length is not None and not part.sub_blocks:
            fail(f"policy {name} chooses in the whole block, got sub_block_length={p.sub_block_length}")
    families = [policy.family for policy in p.policies]
    revising = [family for family in families if family in ("revise", "edit")]
    if len(revising) > 1:
        fail("two policies that take tokens back would undo each other")
    if p.pipeline and p.policies:
        fail("a pipeline's region moves under the memory of a policy; policies go with schedule 'block' or 'canvas'")
    if revising and p.operation.reused is not None:
        fail(f"a token taken back would leave its reused keys behind (cache={p.cache!r})")
    if revising and p.stop == "closed":
        fail("stop='closed' may end a row before a token that would still be taken back; use 'after_block'")
    if revising and (p.sub_block_length is not None or p.run_threshold is not None or p.first_token):
        fail("taking tokens back goes without sub-blocks, run_threshold and first_token")
    if "edit" in families and not p.operation.keys_are_final:
        final = names(lambda cache: cache.keys_are_final)
        fail(f"an editing decoder needs keys of its final tokens: cache {final}, got {p.cache!r}")
    if p.shadow and (p.operation.stores or p.visibility != "full" or p.horizon is not None):
        fail("shadow rows go with cache='none' and full visibility")
    if p.drafts > 1:
        _check_drafts(p, fail)
    if p.cfg_scale and (p.pipeline or p.shadow):
        fail("cfg_scale goes without a pipeline and without shadow rows")
    if p.cfg_scale and p.visibility != "full":
        fail("cfg_scale compares with a copy without the prompt, whose keys a block-causal cache does not hold")


def _check_drafts(p: Preset, fail: Any) -> None:
    revises = p.families & {"revise", "edit"}
    if revises:
        fail("drafts assume that masks only shrink, which a policy that takes tokens back breaks")
    if "exit" in p.families:
        fail("drafts are lossless and an early exit is not")
    if p.rule != "quota" or p.steps_per_block is not None or p.policies or p.order_temperature or p.score == "random":
        fail(
            "drafts verify a static decoder of one token per step: rule='quota', steps_per_block=None, no policy, "
            "no random order"
        )
    if p.rank is not None or p.suppress_eos or p.run_threshold is not None:
        fail("drafts verify the order of the score: no rank, suppress_eos or run_threshold")
    if not p.operation.frozen_around or p.vicinity or p.first_token or p.sub_block_length is not None or p.cfg_scale:
        fail(
            f"drafts share the keys outside their block: cache {names(lambda cache: cache.frozen_around)}, without "
            "vicinity, first_token, sub-blocks and cfg_scale"
        )
    if p.refresh_interval or p.warmup_steps:
        fail("drafts go without refresh_interval and warmup_steps")
