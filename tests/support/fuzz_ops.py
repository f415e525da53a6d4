"""Calls of every op with one damaged argument: each must end in an error that names the argument, with nothing written.

A case is an op, a backend and a seed: a valid call is drawn, one argument or one field of an argument is damaged in one
way (its kind), and `run_case` says what came of it. Damages that only the debug mode can see are given in that mode;
without it some of them kill the process. A campaign therefore runs its cases in other processes (`run_apart`):

    python tests/support/fuzz_ops.py block_attention cpu 0 100
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from named_errors import unnamed
from torch import Tensor
from unmask_cases import random_rule

import dlm_kernels
from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, Window, cpu, reference
from dlm_kernels.checks.confidence import OUTPUTS
from dlm_kernels.checks.drafts import MAX_DRAFTS
from dlm_kernels.checks.unmask import OPTIONAL
from dlm_kernels.reference import DraftSource
from dlm_kernels.state import COMMIT, DENOISE
from dlm_kernels.testing import attention_calls, confidence_calls, drafts_calls, layers_calls, unmask_calls

LAYER_OPS = ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu")
OPS = ("block_attention", "confidence", "unmask", "draft_build", "verify", "uniform_scores", *LAYER_OPS)
BACKENDS = ("reference", "cpu", "triton")
CLASSES = {"window": Window, "state": RowState, "rule": UnmaskRule, "inputs": UnmaskInputs, "source": DraftSource}
# What each op writes in place.
WRITTEN = {
    "block_attention": ("k_cache", "v_cache"),
    "unmask": tuple(f"state.{field.name}" for field in dataclasses.fields(RowState)),
    "verify": tuple(f"source.{field.name}" for field in dataclasses.fields(DraftSource)),
}
# Tensors whose shapes the others must have: an error may name another one that no longer fits.
ANCHORS = {
    "q", "k", "k_cache", "window.q_pos", "window.page_table", "logits", "rows", "bias_ids", "state.tokens",
    "inputs.score", "tokens", "held", "noise", "x", "cos", "gate",
}  # fmt: skip

# A call: the op's arguments by name, those of a class as the dict of its fields.
Call = dict[str, Any]


def function(op: str, backend: str) -> Callable:
    if backend != "triton":
        return getattr({"reference": reference, "cpu": cpu}[backend], op)
    # What needs Triton is imported by its backend only.
    room = {"block_attention": "attention", "uniform_scores": "noise", "draft_build": "drafts", "verify": "drafts"}
    room |= dict.fromkeys(LAYER_OPS, "layers")
    module = __import__(f"dlm_kernels.{room.get(op, op)}.launch", fromlist=[op])
    return getattr(module, op)


def run(op: str, backend: str, call: Call) -> Any:
    """What the op makes of a call whose arguments of a class are put together first."""
    given = {
        name: CLASSES[name](**value) if name in CLASSES and type(value) is dict else value
        for name, value in call.items()
    }
    return function(op, backend)(**given)


def leaves(call: Call) -> dict[str, Any]:
    """Every argument and every field of an argument, by its path."""
    found = {}
    for name, value in call.items():
        if isinstance(value, dict):
            found |= {f"{name}.{field}": each for field, each in value.items()}
        else:
            found[name] = value
    return found


def replaced(call: Call, path: str, value: Any) -> Call:
    name, _, field = path.partition(".")
    return call | {name: call[name] | {field: value} if field else value}


# Valid calls.


def valid_call(op: str, rng: random.Random) -> Call:
    """A small call that every backend takes, with options by chance. Its first row takes part."""
    return {
        "block_attention": _attention,
        "confidence": _confidence,
        "unmask": _unmask,
        "draft_build": _drafts,
        "verify": _drafts,
        "uniform_scores": _noise,
        **dict.fromkeys(LAYER_OPS, _layer),
    }[op](op, rng)


def _attention(op: str, rng: random.Random) -> Call:
    options: dict[str, Any] = {name: True for name in ("kept", "sliding", "fp8") if rng.random() < 0.3}
    if rng.random() < 0.3:
        options["page_size"] = 16
    cache = bool(options) or rng.random() < 0.8
    mode, W, capacity = rng.choice(("full", "causal", "block", "shadow")), rng.choice((2, 5)), 32
    drawn = attention_calls.random_call(
        rng.randrange(2**31), B=2, W=W, H_kv=2, G=2, D=16, mode=mode, cache=cache, split=16, capacity=capacity,
        full_rows=True, kv_lens=(5, 17), replaced=((0, 0), (0, 0)), scale=0.25,
        **{name: value for name, value in options.items() if name != "page_size"},
    )  # fmt: skip
    # The first row has two live positions, which are stored behind what it sees; the second stores nothing.
    drawn.window.q_block[0, :2] = 1
    drawn.window.kv_slot[0] = torch.arange(W) + 5
    drawn.window.kv_slot[1] = -1
    drawn.window.cache_row.copy_(torch.tensor([1, 2]))
    for tensor in (drawn.q, drawn.k, drawn.v, *drawn.buffers):
        tensor.nan_to_num_(0.0, 0.0, 0.0)
    drawn = attention_calls.paged(drawn, 16, rng) if "page_size" in options else drawn
    for buffer in drawn.buffers:
        buffer.nan_to_num_(0.0, 0.0, 0.0)
    given = drawn.to(torch.float32)
    k_cache, v_cache = given.caches
    window = {field.name: getattr(given.window, field.name) for field in dataclasses.fields(Window)}
    return {
        "q": given.q, "k": given.k, "v": given.v, "k_cache": k_cache, "v_cache": v_cache, "window": window,
        "scale": given.scale, "k_scale": given.k_scale, "v_scale": given.v_scale,
        "sliding_window": given.sliding_window,
    }  # fmt: skip


def _confidence(op: str, rng: random.Random) -> Call:
    R, V = 3, rng.choice((5, 33))
    options = confidence_calls.Options(
        entries=rng.choice((None, 4)), bans=rng.choice((0, 2)), shared_bans=rng.random() < 0.5,
        biases=rng.choice((0, 2)), temperature=rng.random() < 0.5, soft_cap=rng.random() < 0.5,
    )  # fmt: skip
    outputs = tuple(name for name in OUTPUTS if rng.random() < 0.6)
    number = rng.randrange(2**31)
    generator, options = torch.Generator().manual_seed(number), dataclasses.replace(options, seeds=number % 2 == 1)
    return confidence_calls.random_call(generator, R, V, torch.float32, outputs, options, hostile=0)


def _unmask(op: str, rng: random.Random) -> Call:
    rule = random_rule(rng)
    W = rng.choice((3, 5))
    state, inputs = unmask_calls.random_call(
        torch.Generator().manual_seed(rng.randrange(2**31)), rule, "denoise", B=2, L=2 * W + 2, W=W
    )
    # The first row is at the beginning of a block of masks, and may choose every one.
    mask, length = inputs["mask_id"], 2
    state.tokens[0, :length] = mask
    state.unmask_step[0] = -1
    for name, number in {"block_start": 0, "block_end": length, "canvas_len": 2 * length, "phase": DENOISE}.items():
        getattr(state, name)[0] = number
    inputs["query_len"][0], inputs["pred"][0], inputs["block_length"][0] = W, 3, length
    for name, value in {"lane_start": 0, "stat_error": 0, "allowed": True, "max_steps": 10**6, "refill": 3}.items():
        if inputs[name] is not None:
            inputs[name][0] = value
    if rule.first_token:
        # The second row commits its block, and the next one receives its first token.
        state.phase[1], inputs["query_len"][1] = COMMIT, W
    if rng.random() < 0.7:
        inputs["stop_ids"] = torch.tensor([1, 4])
    return {"state": vars(state), "rule": dict(vars(rule)), "inputs": inputs, "kind": "denoise"}


def _drafts(op: str, rng: random.Random) -> Call:
    B, D, W = 2, rng.choice((1, 3)), 4
    source, call = drafts_calls.random_drafts(torch.Generator().manual_seed(rng.randrange(2**31)), B=B, D=D, W=W)
    # The first row has a source, drafts and selects; all its lanes are eligible.
    call["tokens"][0] = unmask_calls.MASK
    for tensor in (call["eligible"], call["ready"], call["drafting"], call["selects"]):
        tensor[0] = True
    source.token[0], call["token"][0] = 3, 2
    if op == "draft_build":
        return {"source": vars(source), **{name: call[name] for name in ("tokens", "eligible", "ready")}, "D": D}
    held = reference.draft_build(source, call.pop("tokens"), call["eligible"], call["ready"], D=D)
    return {"source": vars(source), "held": held, **call, "mask_id": unmask_calls.MASK}


def _noise(op: str, rng: random.Random) -> Call:
    number = rng.randrange(2**31)
    generator = torch.Generator().manual_seed(number)
    noise = torch.randint(-(2**31), 2**31 - 1, (rng.choice((1, 4)), 3), generator=generator)
    seed = torch.tensor([rng.randrange(-(2**62), 2**62)])
    if number % 2:  # a seed for every counter, drawn after all else
        seed = torch.randint(-(2**62), 2**62, (len(noise),), generator=generator)
    return {"seed": seed, "noise": noise.int()}


def _layer(op: str, rng: random.Random) -> Call:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = (*rng.choice(((3,), (2, 3))), rng.choice((5, 16)))
    if op == "swiglu":
        return layers_calls.random_mlp(generator, shape, torch.float32, fused=rng.random() < 0.5)
    if op == "qk_norm_rope":
        D, R = rng.choice(((16, 16), (16, 8), (6, 2)))
        options = {name: True for name in ("normed", "scaled", "shared", "fused") if rng.random() < 0.5}
        return layers_calls.random_heads(
            generator, B=2, W=3, H=rng.choice((2, 4)), H_kv=2, D=D, R=R, dtype=torch.float32, **options
        )
    call = layers_calls.random_norm(generator, shape, torch.float32)
    return {name: value for name, value in call.items() if op == "add_rms_norm" or name != "residual"}


# Damages.


@dataclasses.dataclass(frozen=True)
class Damage:
    """One argument of a call made wrong.

    Attributes:
        kind: in which way.
        path: the argument or field.
        call: the damaged call.
        names: what an error may name; the first one is the argument.
        read: whether only the debug mode can see the damage.
    """

    kind: str
    path: str
    call: Call
    names: tuple[str, ...]
    read: bool = False


def damages(op: str, call: Call, rng: random.Random) -> dict[str, list[Damage]]:
    """Every damage of a call, by its kind."""
    found: dict[str, list[Damage]] = {}
    parts = {name: value for name, value in call.items() if isinstance(value, dict)}
    for path, value in [*leaves(call).items(), *parts.items()]:
        for kind, wrong in _wrong(op, path, value, call, rng):
            damage = Damage(kind, path, replaced(call, path, wrong), _names(call, path, kind))
            found.setdefault(kind, []).append(damage)
    for kind, path, wrong in _memory(op, call):
        found.setdefault(kind, []).append(Damage(kind, path, replaced(call, path, wrong), _names(call, path, kind)))
    for path, index, value in CONTENTS.get(op, lambda _: ())(call):
        wrong = leaves(call)[path].clone()
        wrong[index] = value
        names = _names(call, path, "contents")
        found.setdefault("contents", []).append(Damage("contents", path, replaced(call, path, wrong), names, read=True))
    return found


def _names(call: Call, path: str, kind: str) -> tuple[str, ...]:
    others = tuple(each.split(".")[-1] for each in leaves(call)) if path in ANCHORS or kind == "None" else ()
    return (path.split(".")[-1], *others)


def _wrong(op: str, path: str, value: Any, call: Call, rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Wrong values for an argument, each with its kind."""
    if isinstance(value, dict):
        yield from (("None", None), ("list", [1, 2]), ("number", 5), ("string", "x"), ("another class", UnmaskRule))
    elif isinstance(value, Tensor):
        yield from _wrong_tensor(op, path, value, rng)
    elif isinstance(value, bool):  # a flag of a rule
        yield from (("None", None), ("number", 1), ("string", "yes"), ("list", [True]))
        yield "tensor for a number", torch.tensor(True)
    elif isinstance(value, str):
        yield from (("None", None), ("number", 5), ("unknown", "unheard-of"), ("list", [value]))
        yield "tensor for a number", torch.zeros(2)
    elif path == "outputs":
        yield from (("None", None), ("number", 5), ("string", "second"), ("unknown", ("third",)))
        yield from (("list", ["second", "second"]), ("list", [5]), ("list", [["second"]]))
        yield "tensor for a number", torch.zeros(2)
    elif isinstance(value, (int, float)):
        if path not in ("sliding_window", "soft_cap"):
            yield "None", None
        yield from (("string", "1"), ("list", [1]), ("bool for a number", True), ("numpy array", torch.ones(2).numpy()))
        yield "tensor for a number", torch.tensor(value)
        for wrong in (10**400, -1, -(10**400), *((0,) if path != "mask_id" else ())):
            yield "number out of bounds", wrong
        for wrong in (math.nan, math.inf, 2.5 if isinstance(value, int) else -math.inf):
            yield "number out of bounds", wrong
        if path == "D":
            yield "number out of bounds", MAX_DRAFTS + 1
            yield "number out of bounds", 10**4
    elif value is None:  # an optional argument that this call does without
        yield from (("list", [1]), ("string", "x"))


def _wrong_tensor(op: str, path: str, value: Tensor, rng: random.Random) -> Iterator[tuple[str, Any]]:
    field = path.split(".")[-1]
    if field not in OPTIONAL and field not in ("rows", "banned", "temperature", "kept", "page_table"):
        yield "None", None
    yield from (("list", value.tolist()), ("string", "x"), ("number", 3))
    if value.dtype != attention_calls.FP8:
        yield "numpy array", value.numpy()
        yield "sparse", value.to_sparse()
    yield "ndim", value[None]
    if value.dim() > 1:
        yield "ndim", value[0]
    for dim in range(value.dim() if value.numel() else 0):
        yield "shape", torch.cat([value.float(), value.narrow(dim, 0, 1).float()], dim).to(value.dtype)
    yield "dtype", value.to(torch.float16 if value.dtype == torch.int32 else torch.int16)
    if value.is_floating_point():
        yield "dtype", value.to(torch.complex64)
    yield "device", value.to("meta")
    if value.dim() and value.shape[-1] > 1 and value.dtype != attention_calls.FP8:
        yield "strides", torch.stack([value, value], -1)[..., 0]
    if field.endswith("_cache"):
        yield "no rows or slots", value[:0]
        yield "no rows or slots", value[:, :, :0]


def _memory(op: str, call: Call) -> Iterator[tuple[str, str, Any]]:
    """Written arguments whose memory is not their own."""
    of = leaves(call)
    written = {path: of[path] for path in WRITTEN.get(op, ()) if isinstance(of[path], Tensor)}
    for path, value in written.items():
        yield "expanded", path, value[:1].expand_as(value)
        if value.is_floating_point() and value.dtype != attention_calls.FP8:
            yield "wants a gradient", path, value.clone().requires_grad_()
        if value.dim() == 2:
            overlapping = torch.zeros(value.numel() + 1, dtype=value.dtype).as_strided(value.shape, (1, 1))
            yield "overlaps itself", path, overlapping
        for other, its in written.items():
            if other != path and its.shape == value.shape and its.dtype == value.dtype:
                yield "shared memory", path, its
    if "k_cache" in written:
        # A slot further on in the same buffer: the two share all slots but one. Interleaved heads are no overlap.
        k_cache = written["k_cache"]
        yield (
            "overlapping",
            "v_cache",
            torch.as_strided(k_cache, k_cache.shape, k_cache.stride(), k_cache.storage_offset() + k_cache.stride(2)),
        )


def _attention_contents(call: Call) -> Iterator[tuple[str, Any, int]]:
    W, window = call["q"].shape[2], call["window"]
    yield from (("window.q_len", 0, W + 1), ("window.q_len", 1, 2**30), ("window.q_len", 0, -1))
    yield "window.q_block", (0, 0), -2
    if call["k_cache"] is None:
        return
    table = window["page_table"]
    R, S_max = call["k_cache"].shape[0], call["k_cache"].shape[2]
    if table is not None:
        R, S_max, num_pages = table.shape[0], table.shape[1] * S_max, R
        first = int(window["cache_row"][0])
        yield from (("window.page_table", (first, 0), wrong) for wrong in (-1, num_pages, 2**30))
    for path, most in (("window.kv_len", S_max + 1), ("window.cache_row", R)):
        yield from ((path, 0, wrong) for wrong in (most, 2**30, -1, -(2**31)))
    yield from (("window.kv_slot", (0, 0), wrong) for wrong in (S_max, 2**30, -2, -(2**31)))
    yield "window.kv_slot", (0, 1), int(window["kv_slot"][0, 0])  # stored twice
    if window["kept"] is None and call["sliding_window"] is None:
        yield "window.kv_slot", (0, 0), 0  # seen by its own row
    if call["k_scale"] is not None:
        yield from ((name, 0, wrong) for name in ("k_scale", "v_scale") for wrong in (0, -1, math.nan, math.inf))


def _unmask_contents(call: Call) -> Iterator[tuple[str, Any, int]]:
    L, mask_id = call["state"]["tokens"].shape[1], call["inputs"]["mask_id"]
    regions = {"block_start": (-1, 3, 2**30), "block_end": (-1, L, -(2**31)), "canvas_len": (-1, 0, L + 1, 2**30)}
    for name, values in regions.items():
        yield from ((f"state.{name}", 0, wrong) for wrong in values)
    yield from (("state.phase", 0, wrong) for wrong in (-1, 4, 99))
    for name in ("block_masks", "block_step", "step", "nfe", "query_tokens", "error"):
        yield f"state.{name}", 1, -1
    yield from (("state.tokens", (0, 0), -1), ("state.tokens", (1, 1), 2**31), ("state.unmask_step", (0, 0), -2))
    yield "inputs.query_len", 0, -1
    yield from (("inputs.pred", (0, 0), wrong) for wrong in (mask_id, -1, 2**31))
    if call["rule"]["renoise"]:
        yield from (("inputs.refill", (0, 0), wrong) for wrong in (-1, 2**31))
    if call["rule"]["first_token"]:
        yield from (("inputs.first_token", 1, wrong) for wrong in (mask_id, -1, 2**31))
    if len(call["inputs"]["stop_ids"]):
        yield from (("inputs.stop_ids", 0, wrong) for wrong in (mask_id, -1, 2**31))


def _build_contents(call: Call) -> Iterator[tuple[str, Any, int]]:
    yield from (("tokens", (0, 0), wrong) for wrong in (-1, 2**31))
    yield from (("source.token", (0, 0), wrong) for wrong in (-1, 2**31))


def _verify_contents(call: Call) -> Iterator[tuple[str, Any, int]]:
    yield from (("held", (0, 0, 0), wrong) for wrong in (-1, 2**31))
    wrongs = (-1, 2**31, call["mask_id"])
    yield from (("source.token", (0, 0), wrong) for wrong in wrongs)
    masked = (0, 0, int((call["held"][0, 0] == call["mask_id"]).nonzero()[0]))
    yield from (("token", masked, wrong) for wrong in wrongs)
    yield from ((f"source.{name}", 1, -1) for name in ("tried", "accepted"))


CONTENTS: dict[str, Callable[[Call], Iterator[tuple[str, Any, int]]]] = {
    "block_attention": _attention_contents,
    "unmask": _unmask_contents,
    "draft_build": _build_contents,
    "verify": _verify_contents,
}


# What came of a call.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case: whether the op refused the damaged call, and what is wrong with that; None if nothing is."""

    kind: str
    where: str
    refused: bool
    problem: str | None


def run_case(op: str, backend: str, seed: int) -> Outcome:
    """The outcome of the seed's damage."""
    rng = random.Random(f"{op} {seed}")
    call = valid_call(op, rng)
    found = damages(op, call, rng)
    # The seed takes the kinds in turn.
    kind = sorted(found)[seed % len(found)]
    damage = rng.choice(found[kind])
    with dlm_kernels.debug(damage.read or rng.random() < 0.5):
        refused, problem = taken(op, backend, damage)
    return Outcome(kind, f"{op} {backend} seed {seed}: {kind} for {damage.path}", refused, problem)


def taken(op: str, backend: str, damage: Damage) -> tuple[bool, str | None]:
    """Whether a backend refuses a damaged call, and what is wrong with how it takes the call: an error without a name,
    a write before a refusal, or a result that is not the reference's."""
    before = bits_of(damage.call)
    expected = copy.deepcopy(damage.call)
    try:
        result = run(op, backend, damage.call)
    except Exception as error:
        if bits_of(damage.call) != before:
            return True, f"written before {type(error).__name__}: {error}"
        return True, unnamed_by(error, damage.names)
    # What no check minds must be a call like any other.
    if damage.read:
        return False, "accepted"
    try:
        specified = run(op, "reference", expected)
    except Exception as error:
        return False, f"accepted, and the reference raises {type(error).__name__}: {error}"
    pairs = [*zip(_tensors(result), _tensors(specified), strict=True)]
    pairs += [(leaves(damage.call)[path], leaves(expected)[path]) for path in WRITTEN.get(op, ())]
    same = all(_close(a, b) for a, b in pairs if isinstance(a, Tensor))
    return False, None if same else "accepted, and the result is not the reference's"


def unnamed_by(error: Exception, names: tuple[str, ...]) -> str | None:
    """What is wrong with the error as a refusal of the first name, or of another one; None if it is a named one."""
    problems = [unnamed(error, name) for name in names if re.search(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])", str(error))]
    if not problems:
        return f"does not name {names[0]}: {type(error).__name__}: {str(error)[:200]}"
    return None if None in problems else problems[0]


def bits_of(call: Call) -> dict[str, bytes]:
    """What every tensor of a call holds."""
    return {
        path: value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for path, value in leaves(call).items()
        if type(value) is Tensor and value.layout == torch.strided and not value.is_meta and value.dim()
    }


def _tensors(result: Any) -> list[Any]:
    return [result] if isinstance(result, Tensor) else list(result)


def _close(ours: Tensor, expected: Tensor) -> bool:
    if ours.is_meta or expected.is_meta:
        return ours.shape == expected.shape
    return torch.allclose(ours.double(), expected.double(), rtol=1e-4, atol=1e-4, equal_nan=True)


def counted(outcomes: list[Outcome]) -> dict[str, Any]:
    """Calls by kind, how many were accepted, and what is wrong."""
    return {
        "kinds": dict(collections.Counter(outcome.kind for outcome in outcomes)),
        "accepted": sum(not outcome.refused for outcome in outcomes),
        "wrong": [f"{each.where}: {each.problem}" for each in outcomes if each.problem is not None],
    }


def run_apart(op: str, backend: str, seeds: range) -> dict[str, Any]:
    """What a process of its own counts of these cases: calls by kind, and what is wrong. A process that dies is a
    crash, named with the case at which it died."""
    root = Path(__file__).resolve().parents[2]
    path = [str(root), str(root / "kernels"), str(root / "tests" / "support")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, __file__, op, backend, str(seeds.start), str(seeds.stop)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines or not lines[-1].startswith("{"):
        at = lines[-1] if lines else "no case"
        return {
            "kinds": {},
            "accepted": 0,
            "wrong": [],
            "crashes": [f"status {done.returncode} at {at}: {done.stderr[-500:]}"],
        }
    return json.loads(lines[-1]) | {"crashes": []}


def main(op: str, backend: str, start: str, stop: str) -> None:
    torch.set_num_threads(1)
    outcomes = []
    for seed in range(int(start), int(stop)):
        # The last line that a process has printed says where it died.
        print(op, backend, "seed", seed, flush=True)
        outcomes.append(run_case(op, backend, seed))
    print(json.dumps(counted(outcomes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
