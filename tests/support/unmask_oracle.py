"""`unmask` on Python numbers, one row at a time: an independent transcription of the specification, for the tests of
the reference and of both kernels.

The transcription was written from the docstrings of `UnmaskRule` and `reference.unmask` and from the published rules
that they name, and imports neither.
"""

from __future__ import annotations

import math
import struct
from typing import Any

REFRESH, DENOISE, COMMIT, DONE = range(4)
ERROR_LOGITS, ERROR_STALLED = 1, 2


def fp32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def clean(x: float) -> float:
    return -math.inf if math.isnan(x) else x


def unmask_row(
    row: dict[str, Any], rule: Any, kind: str, given: dict[str, Any], mask_id: int, stops: set[int]
) -> list[bool]:
    """Advance one row in place and say which lanes were written. row: the state's fields. given: the row's inputs."""
    return _Row(row, rule, kind, given, mask_id, stops).step()


class _Row:
    def __init__(
        self, row: dict[str, Any], rule: Any, kind: str, given: dict[str, Any], mask_id: int, stops: set[int]
    ) -> None:
        self.row, self.rule, self.kind, self.given, self.mask_id, self.stops = row, rule, kind, given, mask_id, stops
        self.tokens, self.unmask_step, self.confidence = row["tokens"], row["unmask_step"], row["unmask_confidence"]
        self.start, self.end, self.length = row["block_start"], row["block_end"], max(1, given["block_length"])
        self.W = len(given["score"])
        self.first_lane = self.start if given.get("lane_start") is None else given["lane_start"]
        self.region = range(self.start - self.first_lane, self.end - self.first_lane)  # in lanes

    def arg(self, name: str, default: Any = None) -> Any:
        value = self.given.get(name)
        return default if value is None else value

    def masks(self, begin: int, end: int) -> list[int]:
        return [p for p in range(begin, end) if self.tokens[p] == self.mask_id]

    def masked(self, lane: int) -> bool:
        p = self.first_lane + lane
        return 0 <= p < self.row["canvas_len"] and self.tokens[p] == self.mask_id

    # 1. Who takes part.

    def step(self) -> list[bool]:
        changed = [False] * self.W
        commits, phase = self.rule.cache == "commit", self.row["phase"]
        fits = self.first_lane <= self.start and self.end <= self.first_lane + self.W
        if self.kind == "refresh":
            what = None if phase != REFRESH else self.prefill if commits else self.denoise if fits else None
        elif phase == COMMIT and self.rule.cache != "delayed":
            what = self.commit if commits else None
        else:
            what = self.denoise if phase in (DENOISE, COMMIT) and fits else None
        if what is not None and self.given["query_len"] > 0:
            self.row["nfe"] += 1
            self.row["query_tokens"] += self.given["query_len"]
            what(changed)
        return changed

    def prefill(self, changed: list[bool]) -> None:
        self.enter()

    def commit(self, changed: list[bool]) -> None:
        if self.end >= self.row["canvas_len"]:
            self.row["phase"] = DONE
        else:
            self.open_block(self.end)
            self.enter()

    def open_block(self, at: int) -> None:
        row = self.row
        self.start, self.end = at, min(at + self.length, row["canvas_len"])
        row["block_start"], row["block_end"], row["block_step"] = self.start, self.end, 0
        row["block_masks"] = len(self.masks(self.start, self.end))

    def enter(self) -> None:
        """After a prefill or a commit: the first token, and on."""
        row = self.row
        receives = self.rule.first_token and self.tokens[self.start] == self.mask_id
        if receives:
            self.tokens[self.start], self.unmask_step[self.start] = self.given["first_token"], row["step"]
            self.confidence[self.start] = self.given["first_token_confidence"]
        row["block_masks"] = len(self.masks(self.start, self.end))
        row["phase"] = DENOISE if row["block_masks"] else COMMIT
        if receives:
            filled = not row["block_masks"]
            if self.stopped(filled) or (filled and not self.masks(self.end, row["canvas_len"])):
                row["phase"] = DONE

    # 2. What is written.

    def denoise(self, changed: list[bool]) -> None:
        row, rule = self.row, self.rule
        eligible = [
            j for j in self.region if rule.renoise or (self.masked(j) and self.arg("allowed", [True] * self.W)[j])
        ]
        written = [j for j in self.region if self.unmask_step[self.first_lane + j] >= 0]
        needed = set(eligible)
        if rule.edit or rule.remask != "none":
            needed |= set(written)
        if self.given.get("exits") is not None:
            needed |= {j for j in range(self.W) if self.masked(j)}
        if any(self.arg("stat_error", [0] * self.W)[j] for j in needed):
            row["error"], row["phase"] = row["error"] | ERROR_LOGITS, DONE
            return
        if row["step"] >= self.arg("max_steps", math.inf):
            row["error"], row["phase"] = row["error"] | ERROR_STALLED, DONE
            return

        before = list(self.tokens)
        exiting = self.arg("exits", False)
        if exiting:
            chosen = {j for j in range(self.W) if (j in self.region if rule.renoise else self.masked(j))}
        else:
            chosen = self.choose(eligible)
            if rule.edit:
                for j in written:
                    differs = self.given["pred"][j] != self.tokens[self.first_lane + j]
                    if differs and self.given["score"][j] > self.given["edit_value"]:
                        chosen.add(j)
        for j in chosen:
            p, changed[j] = self.first_lane + j, True
            self.tokens[p], self.unmask_step[p], self.confidence[p] = (
                self.given["pred"][j],
                row["step"],
                self.given["confidence"][j],
            )
        if rule.renoise:
            for j in set(self.region) - chosen:
                self.tokens[self.first_lane + j] = self.given["refill"][j]
        if not exiting:
            for j in self.remasked(written, chosen):
                p = self.first_lane + j
                self.tokens[p], self.unmask_step[p], self.confidence[p] = self.mask_id, -1, 0.0
        if rule.stop == "fill":
            self.fill()
        row["step"] += 1
        row["block_step"] += 1
        if rule.pipeline:
            self.after_pipeline(before)
        else:
            self.after_block(bool(chosen), exiting)

    def best_first(self, lanes: Any) -> list[int]:
        rank = self.arg("rank", self.given["score"])
        return sorted(lanes, key=lambda j: (-clean(rank[j]), j))

    def passing(self, order: list[int]) -> list[int]:
        rule, value = self.rule, self.given["value"]
        score = [clean(x) for x in self.given["score"]]
        if rule.passes == "none":
            return []
        if rule.passes == "threshold":
            limit = value if isinstance(value, list) else [value] * self.W
            return [j for j in order if score[j] > limit[j] or (rule.inclusive and score[j] == limit[j])]
        for r, j in enumerate(order):
            if rule.passes == "factor":
                ok = score[j] >= fp32(1 - fp32(value / (r + 2)))
            else:
                spent = [_fixed(self.given["entropy"][i]) for i in order[: r + 1]]
                budget = _floor(value, 2**62, nan=-(2**62))
                ok = sum(spent) < budget if rule.inclusive else sum(spent) - max(spent) <= budget
            if not ok:
                return order[:r]
        return order

    def choose(self, eligible: list[int]) -> set[int]:
        """The prefix rule, and what runs and blocks add to it."""
        rule, given, row = self.rule, self.given, self.row
        kmin = given["min_unmask"]
        if rule.quota:
            quotient, remainder = divmod(row["block_masks"], max(1, given["steps"]))
            kmin = max(1, quotient + (1 if row["block_step"] < remainder else 0))
        if rule.scope == "each":
            kmin = 0
        order = self.best_first(eligible)
        chosen = self.passing(order)
        if len(chosen) < min(kmin, len(order)):
            chosen = order[: max(0, self.arg("fallback", kmin))]
        chosen = set(chosen[: max(0, self.arg("max_unmask", self.W))])
        if rule.runs:
            runs: list[list[int]] = []
            for j in eligible:
                if runs and runs[-1][-1] == j - 1:
                    runs[-1].append(j)
                else:
                    runs.append([j])
            best = [self.best_first(run)[0] for run in runs]
            chosen |= {j for j in best if clean(given["score"][j]) > given["run_value"]}
        if rule.pipeline:
            blocks = [[j for j in block if j in eligible] for block in self.blocks()]
            if rule.scope == "first":
                forced = [block for block in blocks if block][:1]
            else:
                masks = [
                    len(self.masks(self.first_lane + block[0], self.first_lane + block[-1] + 1))
                    for block in self.blocks()
                ]
                forced = [block for i, block in enumerate(blocks) if i == 0 or masks[i - 1] <= given["activate_masks"]]
            chosen |= {self.best_first(block)[0] for block in forced if block and not chosen & set(block)}
        return chosen

    def blocks(self) -> list[range]:
        """The region's blocks, in lanes."""
        return [self.region[i : i + self.length] for i in range(0, len(self.region), self.length)]

    def remasked(self, written: list[int], chosen: set[int]) -> list[int]:
        rule, given = self.rule, self.given
        if rule.remask == "none":
            return []
        candidates = set(written) | chosen
        if rule.remask == "lowest":
            k = given["remask_count"]
        elif rule.remask == "saber":
            n = max(0, given["min_unmask"])
            m = max(n, len(chosen))
            k = min(max(n // 2, math.ceil(m / 8)), m - 1)
            if not any(self.masked(j) for j in self.region):
                k = 0
        else:
            candidates = {j for j in written if given["remask_score"][j] < given["remask_value"]}
            k = given["remask_count"] if len(chosen) > 1 else 0
        return sorted(candidates, key=lambda j: (clean(given["remask_score"][j]), j))[: max(0, k)]

    def fill(self) -> None:
        canvas = range(self.row["canvas_len"])
        found = [p for p in canvas if self.unmask_step[p] >= 0 and self.tokens[p] in self.stops]
        for p in canvas[found[0] + 1 :] if found else ():
            if self.tokens[p] == self.mask_id:
                self.unmask_step[p] = self.row["step"]
            if self.unmask_step[p] >= 0:
                self.tokens[p] = self.tokens[found[0]]

    # 3. Where the row stands then.

    def written_stops(self) -> list[int]:
        return [p for p in range(self.start, self.end) if self.unmask_step[p] >= 0 and self.tokens[p] in self.stops]

    def stopped(self, finished: bool) -> bool:
        found, rule = self.written_stops(), self.rule
        if rule.stop == "closed":
            return any(not self.masks(self.start, p) for p in found)
        if rule.stop == "after_block":
            return finished and bool(found)
        if rule.stop == "all_stop":
            return finished and bool(found) and all(token in self.stops for token in self.tokens[self.start : self.end])
        return False

    def after_block(self, changed: bool, exiting: bool) -> None:
        row, rule = self.row, self.rule
        finished = not self.masks(self.start, self.end)
        if rule.edit:
            finished = finished and (exiting or not changed)
        if rule.renoise:
            finished = exiting
        later_masks = self.masks(self.end, row["canvas_len"])
        if self.stopped(finished) or (finished and not later_masks):
            row["phase"] = DONE
        elif not finished:
            row["phase"] = DENOISE
        elif rule.cache == "commit":
            row["phase"] = COMMIT
            if rule.edit:  # the keys of the block are final already
                self.open_block(self.end)
                row["phase"] = DENOISE if row["block_masks"] else COMMIT
        else:
            at = self.end
            while at + self.length <= later_masks[0]:
                at += self.length
            self.open_block(at)
            row["phase"] = REFRESH if rule.cache == "refresh" else DENOISE

    def after_pipeline(self, tokens_before: list[int]) -> None:
        row, rule, given = self.row, self.rule, self.given
        blocks = [[self.first_lane + j for j in block] for block in self.blocks()]

        def was_finished(block: list[int]) -> bool:
            return all(tokens_before[p] != self.mask_id for p in block)

        leading = 0
        if rule.cache == "delayed":
            leading = int(row["phase"] == COMMIT)
        else:
            while leading < len(blocks) and was_finished(blocks[leading]):
                leading += 1
        found, stopped = self.written_stops(), False
        if rule.stop == "closed":
            stopped = any(not self.masks(self.start, p) for p in found)
        elif rule.stop == "after_block":
            stopped = any(not self.masks(self.start, block[-1] + 1) and set(block) & set(found) for block in blocks)
        if found and rule.stop in ("closed", "after_block", "appends"):
            row["canvas_len"] = self.end
        end = self.end
        tail_masks = len(self.masks(blocks[-1][0], self.end))
        if tail_masks <= given["append_masks"] and self.end < row["canvas_len"] and not (found and rule.stop == "fill"):
            end = min(self.end + self.length, row["canvas_len"])
        done = stopped or not self.masks(self.start, row["canvas_len"])
        row["block_start"] = blocks[leading][0] if leading < len(blocks) else self.end
        row["block_end"] = end
        head_masks = self.masks(row["block_start"], min(row["block_start"] + self.length, end))
        if rule.cache == "delayed":
            self.wait(given["delay"], leading, head_masks, tokens_before)
        else:
            row["phase"] = DENOISE
        if done:
            row["phase"] = DONE

    def wait(self, delay: int, moved: int, head_masks: list[int], tokens_before: list[int]) -> None:
        """A finished first block waits for its commit: so many steps that found it finished, from the row's `delay`-th
        on."""
        row, taken = self.row, self.row["step"]
        head_end = min(row["block_start"] + self.length, row["block_end"])
        found = head_end <= self.end and self.mask_id not in tokens_before[self.start : head_end]
        before = 0 if moved else row["block_step"] - 1
        row["block_step"] = before + 1 if found and taken >= delay else 0
        row["phase"] = DENOISE
        if not head_masks:
            row["phase"] = COMMIT if row["block_step"] >= delay else REFRESH
        if taken < delay:
            row["phase"] = REFRESH


def _fixed(entropy: float) -> int:
    return max(0, _floor(entropy, 2**48, nan=2**48))


def _floor(nats: float, limit: int, nan: int) -> int:
    """In units of 2^-24 nat, at most `limit` in size."""
    if math.isnan(nats):
        return nan
    return math.floor(max(-limit, min(limit, nats * 2**24)))
