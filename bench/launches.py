"""docs/launches.md, how many small launches a step of every preset and a layer costs: `python -m bench launches`.

A launch is a torch op that is one kernel or more on a GPU: every op that computes or copies, and no view, reshape or
allocation. What the model launches, from the embedding to the head, and what happens inside an op of
`dlm_fast.ops.Ops` is not counted. A step has fixed shapes and reads nothing on the host, so one step of each kind, on
any rows, tells the number.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dlm_fast
from dlm_fast.decoding.plan import Bucket, open_rows
from dlm_fast.decoding.progress import Progress
from dlm_fast.decoding.shapes import grid_of
from dlm_fast.decoding.step import Decode, denoise_step, open_decode
from dlm_fast.draws import sampling_of
from dlm_fast.models import native
from dlm_fast.ops import LAYER_OPS, OP_NAMES, REFERENCE
from dlm_fast.patching import attach
from dlm_fast.policies import InsertDelete
from dlm_fast.presets import PRESETS, Preset, resolve
from dlm_fast.requests import read

from .checks.decode import EOS, MASK, VOCAB, random_model

LIMIT = 40  # launches of a step
# Presets whose steps take more, and why.
BEYOND = {
    "ccd": "it ranks its lanes among the eligible, the candidates and the rest, over numbers of its own for every row",
    "ccd-ds": "as `ccd`",
    "sched": "a curve, a share of changed predictions and a mean gap for every row, each a dozen tiny ops",
}

# Ops that allocate or name memory without touching it, besides those that torch itself calls views.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}

PRODUCTS = {"mm", "addmm", "bmm", "linear"}

# A model with dense layers only, in the fields of every class, with norms of queries and keys where the class has them.
_LAYER = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "use_qk_norm": True,
    "num_experts": 0,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 2**18,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Where a launch belongs: the innermost function of these files that asked for it; a file's own entry holds for the
# functions that have none.
PLACES = ("window", "lanes", "forward", "measure", "rule", "policies", "after")
COUNT = "count"
GATHERED = "of rows"
_PLACE_OF = {
    "decoding/window.py": "window",
    "decoding/window.py lanes_of": "lanes",
    "decoding/progress.py": COUNT,
    "decoding/forward.py": "forward",
    "decoding/forward.py rule_choice": "rule",
    "decoding/forward.py with_last_rank": "rule",
    "decoding/drafts.py": "forward",
    "decoding/measure.py": "measure",
    "decoding/step.py nothing_chosen": "rule",
    "decoding/step.py only_first_mask": "rule",
    "decoding/step.py request_refresh": "after",
    "decoding/step.py after": "after",
    "decoding/step.py of_rows": GATHERED,
    "decoding/step.py put_rows": GATHERED,
    "policies/setting.py": GATHERED,
    "policies/select.py": "policies",
    "policies/exits.py": "policies",
    "policies/history.py": "policies",
    "policies/revise.py": "policies",
    "policies/learned.py": "policies",
    "policies/refresh.py": "policies",
}
_PACKAGE = Path(dlm_fast.__file__).parent


@functools.cache
def _place(file: str, function: str) -> str | None:
    path = Path(file)
    if not path.is_relative_to(_PACKAGE):
        return None
    name = path.relative_to(_PACKAGE).as_posix()
    return _PLACE_OF.get(f"{name} {function}", _PLACE_OF.get(name))


class Launches(TorchDispatchMode):
    """Counts launches by their place while it is entered.

    Attributes:
        found: launches of every place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._inside = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not self._inside and not function.is_view and function.overloadpacket.__name__ not in FREE:
            self.found[self._what(function)] += 1
        return function(*args, **(kwargs or {}))

    def without(self, function: Callable) -> Callable:
        """The function, whose launches are not counted."""

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._inside -= 1

        return uncounted

    def _what(self, function: Any) -> str:
        """The place of a launch."""
        frame = sys._getframe(2)
        while frame is not None:
            place = _place(frame.f_code.co_filename, frame.f_code.co_name)
            if place is not None:
                return place
            frame = frame.f_back
        raise AssertionError("a launch must have a place, got one outside the files of _PLACE_OF")


class LayerLaunches(Launches):
    """Counts launches while it is entered, products of matrices apart from the others."""

    def _what(self, function: Any) -> str:
        return "products" if function.overloadpacket.__name__ in PRODUCTS else "small"

    def as_one(self, function: Callable, name: str) -> Callable:
        """The function, which counts as one launch under a name of its own."""
        uncounted = self.without(function)

        def one(*args: Any, **kwargs: Any) -> Any:
            self.found[name] += 1
            return uncounted(*args, **kwargs)

        return one


def layer_launches(kind: type[nn.Module], fuse_layers: bool) -> Counter[str]:
    """The launches of one layer of a class in bfloat16: "products", "attention", and "small", which are the others."""
    counter, found = LayerLaunches(), []
    ops = {name: counter.as_one(getattr(REFERENCE, name), "small") for name in LAYER_OPS}
    ops["block_attention"] = counter.as_one(REFERENCE.block_attention, "attention")
    for layers in (1, 2):
        config = kind.config_class(**_LAYER, num_hidden_layers=layers)
        model = kind(config).bfloat16().eval().requires_grad_(False)
        backend = dataclasses.replace(REFERENCE, **ops)
        attach(model, backend=backend, diffusion=None, plain_mode="full", fuse_layers=fuse_layers)
        counter.found = Counter()
        with counter:
            model(torch.arange(6)[None], use_cache=False)
        found.append(counter.found)
    return found[1] - found[0]


def _head(*inputs: torch.Tensor) -> torch.Tensor:
    """In place of a trained head, which is a model of its own and not counted."""
    return inputs[0]


def on_the_device(preset: Preset) -> bool:
    """Whether a step of the preset reads nothing on the host."""
    return preset.supported and not any(isinstance(policy, InsertDelete) for policy in preset.policies)


def launches(preset: Preset, temperature: float = 0.0) -> dict[str, Counter[str]]:
    """The launches of a step of every kind by place, and those of the count after it; "drafts" is a denoise step that
    verifies drafts."""
    counter = Launches()
    decode = _opened(preset, temperature, counter)
    plan, found = decode.plan, {}
    buckets: dict[str, Bucket] = {"refresh": plan.bucket("refresh")} if plan.refresh_width else {}
    buckets["denoise"] = plan.bucket("denoise")
    if preset.drafts > 1:
        buckets["drafts"] = plan.bucket("denoise", drafts=preset.drafts)
    progress = Progress(decode, grid_of(plan, decode.state, fixed=0), 0)
    rows = torch.tensor([2, 0])
    with torch.no_grad(), counter:
        decode.put_rows(rows, decode.of_rows(rows))
    gathered = counter.found.total()
    for name, bucket in buckets.items():
        counter.found = Counter()
        with torch.no_grad(), counter:
            denoise_step(decode, bucket)
        found[name], counter.found = counter.found, Counter()
        with torch.no_grad(), counter:
            progress.record(bucket.kind)
        found[name][COUNT] = counter.found.total()
        found[name][GATHERED] = gathered
    return found


def _opened(preset: Preset, temperature: float, counter: Launches) -> Decode:
    """A decode of three rows before its first step; the model and the ops are not counted."""
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        visibility=preset.visibility,
        block_length=8,
        block_alignment="rel",
        logits_row="previous" if "logits_row 'previous'" in preset.needs else "self",
        causal_prefix="causal_prefix" in preset.needs,
    )
    options = {"head": _head} if "head=" in preset.needs else {}
    chosen = resolve(preset, preset.visibility, options)
    batch = read(
        diffusion, vocab_size=VOCAB, max_positions=512, tokenizer=None,
        prompts=[[2, 3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18]], canvas=None, request_ids=None,
        max_new_tokens=64, min_new_tokens=0, temperature=temperature, top_k=0, top_p=1.0, seed=0,
        stop_strings=(), banned_token_ids=(), eos_token_ids=None,
    )  # fmt: skip
    plan, state = open_rows(batch.opened, chosen, diffusion, torch.device("cpu"))
    ops = dataclasses.replace(REFERENCE, **{name: counter.without(getattr(REFERENCE, name)) for name in OP_NAMES})
    model = random_model("llama", 4, 2, 16, 1, 0, "launches").requires_grad_(False)
    handle = attach(model, backend=ops, diffusion=diffusion, plain_mode=diffusion.plain_mode)
    uncounted = {name: counter.without(getattr(handle.adapter, name)) for name in ("window_hidden", "head")}
    handle.adapter = types.SimpleNamespace(**{**vars(handle.adapter), **uncounted})
    return open_decode(handle, plan, state, sampling_of(batch, plan, torch.device("cpu")))


def rows() -> list[dict[str, Any]]:
    """One row a preset and kind of step: its launches, those of a step with a temperature, those by place, those of the
    count after it, and those that a step of some rows costs besides."""
    found = []
    for name, preset in PRESETS.items():
        if not on_the_device(preset):
            continue
        draws = preset.drafts == 1 and not any(policy.greedy_only for policy in preset.policies)
        greedy, drawn = launches(preset), launches(preset, 1.0) if draws else {}
        for kind, places in greedy.items():
            apart = {what: places.pop(what) for what in (COUNT, GATHERED)}
            sampled = drawn[kind].total() - sum(drawn[kind][what] for what in apart) if draws else None
            row = {"preset": name, "step": kind, "launches": places.total(), "sampled": sampled}
            found.append(row | {"places": places} | apart)
    return found


INTRODUCTION = f"""\
# Launches

This page is generated by `python -m bench launches > docs/launches.md`; a test compares the two.

A step is the model, one call of each op that the decoder uses, and small torch ops around them. On a GPU a small op
costs a launch: a microsecond or two in a captured graph, several where the host launches it. The table counts them. A
launch is a torch op that computes or copies, though torch makes more than one kernel of some (a sort, a scatter); a
view, a reshape or an allocation is none. What the model launches, from the embedding to the head, and what happens
inside an op of [kernels.md](kernels.md) is not in it, nor is a trained head.

At most {LIMIT} launches are allowed in a step, with and without a temperature; an option may cost a few more. These
take more:

{{beyond}}

- **step** is the kind: "refresh" computes all that the cache needs, "denoise" a window, and "drafts" is a denoise step
  that verifies drafts.
- **launches** are those of a greedy step, **sampled** those of a step whose rows have a temperature.
- The next columns say where the greedy launches are: what the step computes (**window**) and looks at (**lanes**), the
  model's inputs and outputs (**forward**), the call of `confidence` (**measure**), the preset's **rule** and
  **policies**, and what follows the write (**after**).
- **count** are those by which the host learns what every row needs next, after the step.
- **of rows** are those that a step of some of the rows costs besides: it copies what it reads of them, and writes back
  what it has changed.

`llada2.2` moves tokens between positions on the host and is not in the table.
"""

LAYERS = """\

## A layer

What a dense layer of a model launches in bfloat16, beside its 7 products of matrices and the attention, of which a
split one is two launches: norms, rotary positions, the activation and sums. **own** are those of transformers' layer,
**fused** those of the forward that `patch(fuse_layers=)` binds: `rms_norm`, `qk_norm_rope`, `add_rms_norm`, `swiglu`
and a sum.
"""


def markdown() -> str:
    """The page."""
    beyond = "\n".join(f"- `{name}`: {reason}." for name, reason in BEYOND.items())
    header = ("preset", "step", "launches", "sampled", *PLACES, COUNT, GATHERED)
    lines = [INTRODUCTION.format(beyond=beyond), f"| {' | '.join(header)} |", "|" + " - |" * len(header)]
    for row in rows():
        cells = [f"`{row['preset']}`", row["step"], row["launches"], "" if row["sampled"] is None else row["sampled"]]
        cells += [row["places"][place] or "" for place in PLACES]
        lines.append(f"| {' | '.join(map(str, [*cells, row[COUNT], row[GATHERED]]))} |")
    lines += [LAYERS, "| class | own | fused |", "| - | - | - |"]
    for kind in native.CLASSES:
        own, ours = (layer_launches(kind, fuse_layers) for fuse_layers in (False, True))
        lines.append(f"| `{kind.__name__}` | {own['small']} | {ours['small']} |")
    return "\n".join(lines) + "\n"
