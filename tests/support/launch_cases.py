"""Calls of every launcher with every option, on torch's default device; for Triton's front end:
`python tests/support/launch_cases.py 2`, without TRITON_INTERPRET.

The interpreter is typed as Python is: a variable that changes its shape in a loop, or an argument that is None where
the code needs none, runs there and compiles for no GPU. The front end refuses it in a tenth of a second, without ptxas.
Which code it sees depends on what is compiled in, so of every kernel all pairs of options are met (`2`), or all triples
(`3`).
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Options = Mapping[str, Sequence[Any]]


def covering(
    options: Options, strength: int, allowed: Callable[[dict[str, Any]], bool] = lambda choice: True
) -> Iterator[dict[str, Any]]:
    """Choices of a value for each option, such that any values of `strength` options are met together, if a choice with
    them is allowed.

    A new choice is made for the first values not met yet: the rest of it is drawn, the best of 30 draws that are
    allowed. The same every time. Values of which 300 draws make no allowed choice are taken for values that do not go
    together.
    """
    rng = random.Random(0)
    strength = min(strength, len(options))
    missing = {
        tuple(zip(names, values, strict=True)): None
        for names in itertools.combinations(options, strength)
        for values in itertools.product(*(range(len(options[name])) for name in names))
    }
    while missing:
        wanted = dict(next(iter(missing)))
        best: tuple[int, dict[str, int]] | None = None
        draws = found = 0
        while found < 30 and draws < 300:
            draws += 1
            places = {name: wanted.get(name, rng.randrange(len(values))) for name, values in options.items()}
            if not allowed({name: options[name][place] for name, place in places.items()}):
                continue
            found += 1
            met = sum(group in missing for group in itertools.combinations(places.items(), strength))
            if best is None or met > best[0]:
                best = met, places
        if best is None:
            del missing[tuple(wanted.items())]
            continue
        for group in itertools.combinations(best[1].items(), strength):
            missing.pop(group, None)
        yield {name: options[name][place] for name, place in best[1].items()}


BOTH = (False, True)

UNMASK = {
    "passes": ("none", "threshold", "factor", "entropy"),
    "inclusive": BOTH,
    "kind": ("denoise", "refresh"),
    "extra": ("none", "quota", "first_token", "edit", "renoise", "each", "first", "lowest", "saber", "wino"),
    "runs": BOTH,
    "cache": ("none", "commit", "refresh", "once", "fused", "delayed"),
    "stop": ("never", "after_block", "closed", "appends", "fill", "all_stop"),
    "value per lane": BOTH,
    **dict.fromkeys(
        ("rank", "stat_error", "allowed", "lane_start", "fallback", "max_unmask", "exits", "max_steps"), BOTH
    ),
}


def unmask_rule(choice: dict[str, Any]):
    """The rule of a choice; ValueError if there is none."""
    from dlm_kernels import UnmaskRule

    extra = choice["extra"]
    options: dict[str, Any] = {extra: True} if extra in ("quota", "first_token", "edit", "renoise") else {}
    options |= {"pipeline": True, "scope": extra} if extra in ("each", "first") else {}
    options |= {"remask": extra} if extra in ("lowest", "saber", "wino") else {}
    names = ("inclusive", "runs", "cache", "stop")
    return UnmaskRule(choice["passes"], **options, **{name: choice[name] for name in names})


def unmask_allowed(choice: dict[str, Any]) -> bool:
    import torch

    try:
        with torch.device("meta"):
            call_unmask(choice, W=4, check_only=True)
    except ValueError:
        return False
    return True


def call_unmask(choice: dict[str, Any], W: int, check_only: bool = False) -> None:
    import torch

    from dlm_kernels import RowState, UnmaskInputs
    from dlm_kernels.checks.unmask import LANES, OPTIONAL, ROWS, check_arguments, wanted_inputs
    from dlm_kernels.unmask import launch as unmask

    rule, B, L = unmask_rule(choice), 2, W + 8
    state = RowState.empty(B, L, torch.get_default_device())
    given = {name for name in OPTIONAL if choice.get(name)}
    given |= {name for name, wanted in wanted_inputs(rule).items() if wanted}
    given |= {"entropy"} if rule.passes == "entropy" else set()
    tensors = {name: torch.zeros(B, W, dtype=dtype) for name, dtype in LANES.items()}
    tensors |= {name: torch.zeros(B, dtype=dtype) for name, dtype in ROWS.items()}
    tensors["value"] = torch.zeros((B, W) if choice["value per lane"] else (B,))
    tensors = {name: tensor for name, tensor in tensors.items() if name in given or name not in OPTIONAL}
    inputs = UnmaskInputs(mask_id=9, stop_ids=torch.zeros(2, dtype=torch.int64), **tensors)
    if check_only:
        check_arguments(state, rule, inputs, choice["kind"])
    else:
        unmask.unmask(state, rule, inputs, kind=choice["kind"])


CONFIDENCE = {
    "dtype": ("bfloat16", "float32"),
    **dict.fromkeys(("second", "logsumexp", "entropy", "kl", "sampled", "query"), BOTH),
    "banned": ("no", "shared", "per row"),
    **dict.fromkeys(("rows", "temperature", "soft_cap", "bias"), BOTH),
}  # fmt: skip


def confidence_options(choice: dict[str, Any], N: int) -> dict[str, Any]:
    import torch

    outputs = tuple(name for name in ("second", "logsumexp", "entropy", "kl", "sampled", "query") if choice.get(name))
    per_row = {
        "sample_temperature": torch.zeros(N) if choice["sampled"] else None,
        "seed": torch.zeros(1, dtype=torch.int64) if choice["sampled"] else None,
        "noise": torch.zeros(N, 3, dtype=torch.int32) if choice["sampled"] else None,
        "query": torch.zeros(N, dtype=torch.int64) if choice["query"] else None,
        "temperature": torch.zeros(N) if choice["temperature"] else None,
        "rows": torch.zeros(N, dtype=torch.int32) if choice["rows"] else None,
    }
    banned = {"no": None, "shared": torch.zeros(3, dtype=torch.int64), "per row": torch.zeros(N, 2, dtype=torch.int64)}
    return per_row | {
        "outputs": outputs,
        "banned": banned[choice["banned"]],
        "soft_cap": 30.0 if choice["soft_cap"] else None,
    }


def call_confidence(choice: dict[str, Any], split: bool) -> None:
    import torch

    from dlm_kernels.confidence import launch as confidence

    N = R = 3
    logits = torch.zeros(R, 40000, dtype=getattr(torch, choice["dtype"]))
    options = confidence_options(choice, N)
    if choice["kl"]:
        options |= {"previous": logits, "previous_logsumexp": torch.zeros(R)}
    if choice["bias"]:
        options |= {"bias_ids": torch.zeros(N, 5, dtype=torch.int64), "bias": torch.zeros(N, 5)}
    confidence._multiprocessors = lambda device: 1000 if split else 0
    confidence.confidence(logits, **options)


ATTENTION = {
    "dtype": ("bfloat16", "float16", "float32"),
    "D": (16, 80, 128, 512),
    "G": (1, 7),
    "mode": ("full", "causal", "block", "shadow"),
    "cache": ("none", "plain", "fp8"),
    "page": (0, 16, 64),
    **dict.fromkeys(("kept", "sliding"), BOTH),
}  # fmt: skip


def attention_allowed(choice: dict[str, Any]) -> bool:
    return choice["cache"] != "none" or not (choice["page"] or choice["kept"] or choice["sliding"])


def call_attention(choice: dict[str, Any]) -> None:
    """A window and a cache that are long enough for all three kernels."""
    import torch

    from dlm_kernels import Window
    from dlm_kernels.attention import launch as attention

    B, W, D, H_kv, S_max, dtype = 1, 520, choice["D"], 1, 1088, getattr(torch, choice["dtype"])

    def int32(*shape: int):
        return torch.zeros(*shape, dtype=torch.int32)

    page = choice["page"]
    window = Window(
        q_pos=int32(B, W), q_block=int32(B, W), q_len=int32(B), kv_slot=int32(B, W), kv_len=int32(B),
        replaced=int32(B, 2), cache_row=int32(B), mode=choice["mode"],
        kept=torch.zeros(B, S_max, dtype=torch.bool) if choice["kept"] else None,
        page_table=int32(B, S_max // page) if page else None,
    )  # fmt: skip
    q = torch.zeros(B, H_kv * choice["G"], W, D, dtype=dtype)
    k, v = (torch.zeros(B, H_kv, W, D, dtype=dtype) for _ in range(2))
    caches: list[Any] = [None, None]
    if choice["cache"] != "none":
        shape = (S_max // page, H_kv, page, D) if page else (B, H_kv, S_max, D)
        stored = torch.float8_e4m3fn if choice["cache"] == "fp8" else dtype
        caches = [
            torch.zeros(shape, dtype=torch.uint8).view(stored) if stored != dtype else torch.zeros(shape, dtype=dtype)
            for _ in "kv"
        ]
    scales = {"k_scale": torch.ones(H_kv), "v_scale": torch.ones(H_kv)} if choice["cache"] == "fp8" else {}
    sliding = {"sliding_window": 1000} if choice["sliding"] else {}
    attention.block_attention(q, k, v, *caches, window, scale=0.25, **scales, **sliding)


def call_drafts(choice: dict[str, Any]) -> None:
    import torch

    from dlm_kernels import reference
    from dlm_kernels.drafts import launch as drafts

    B, D, W = 2, 3, choice["W"]
    lanes, flags = torch.zeros(B, W), torch.zeros(B, dtype=torch.bool)
    counts = [torch.zeros(B, dtype=torch.int32) for _ in range(2)]
    source = reference.DraftSource(torch.zeros(B, W, dtype=torch.int64), lanes, lanes.clone(), *counts)
    eligible = torch.zeros(B, W, dtype=torch.bool)
    held = drafts.draft_build(source, source.token, eligible, flags, D=D)
    scores = torch.zeros(B, D, W)
    drafts.verify(
        source, held, held, scores, scores, eligible=eligible, ready=flags, drafting=flags, selects=flags, mask_id=9
    )


def call_noise(choice: dict[str, Any]) -> None:
    import torch

    from dlm_kernels.noise import launch as noise

    noise.uniform_scores(torch.zeros(1, dtype=torch.int64), torch.zeros(choice["N"], 3, dtype=torch.int32))


NORM = {"dtype": ("bfloat16", "float32"), "d": (64, 70, 4096), "residual": BOTH}


def call_norm(choice: dict[str, Any]) -> None:
    import torch

    from dlm_kernels.layers import launch as layers

    dtype = getattr(torch, choice["dtype"])
    rows, weight = torch.zeros(3, choice["d"], dtype=dtype), torch.zeros(choice["d"], dtype=dtype)
    if choice["residual"]:
        layers.add_rms_norm(rows, rows, weight, eps=1e-6)
    else:
        layers.rms_norm(rows, weight, eps=1e-6)


HEADS = {
    "dtype": ("bfloat16", "float16", "float32"),
    "dims": ((128, 128), (128, 64), (80, 20), (512, 512)),
    "heads": ((4, 2), (9, 1)),
    **dict.fromkeys(("norm", "scale", "fused"), BOTH),
}


def call_heads(choice: dict[str, Any]) -> None:
    import torch

    from dlm_kernels.layers import launch as layers

    (D, R), (H, H_kv), W, dtype = choice["dims"], choice["heads"], 3, getattr(torch, choice["dtype"])
    # Heads of a fused projection that is two numbers wider lie at strides that are not aligned.
    width = (H + H_kv) * D + 2 * choice["fused"]
    whole = torch.zeros(2, W, width, dtype=dtype)
    q, k = (whole.as_strided((2, W, n, D), (W * width, width, D, 1), at) for n, at in ((H, 0), (H_kv, H * D)))
    angles, weight = torch.zeros(2, W, R, dtype=dtype), torch.zeros(D, dtype=dtype)
    norm = {"q_weight": weight, "k_weight": weight, "eps": 1e-6} if choice["norm"] else {}
    scale = torch.zeros(2, W, dtype=dtype) if choice["scale"] else None
    layers.qk_norm_rope(q, k, angles, angles, **norm, q_scale=scale)


SWIGLU = {"dtype": ("bfloat16", "float16", "float32"), "I": (70, 1024, 3072)}


def call_swiglu(choice: dict[str, Any]) -> None:
    import torch

    from dlm_kernels.layers import launch as layers

    gate, up = (torch.zeros(3, choice["I"], dtype=getattr(torch, choice["dtype"])) for _ in range(2))
    layers.swiglu(gate, up)


# Name: (options, which choices are calls, the call). One for every kernel that has code of its own for an option.
CALLS: dict[str, tuple[Options, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], None]]] = {
    "unmask in registers": (UNMASK, unmask_allowed, lambda choice: call_unmask(choice, W=20)),
    "unmask in memory": (UNMASK, unmask_allowed, lambda choice: call_unmask(choice, W=300)),
    "confidence, whole rows": (CONFIDENCE, lambda choice: True, lambda choice: call_confidence(choice, split=False)),
    "confidence, split and merged": (
        CONFIDENCE,
        lambda choice: True,
        lambda choice: call_confidence(choice, split=True),
    ),
    "block_attention": (ATTENTION, attention_allowed, call_attention),
    "drafts": ({"W": (20, 200, 3000)}, lambda choice: True, call_drafts),
    "uniform_scores": ({"N": (20, 200)}, lambda choice: True, call_noise),
    "norms": (NORM, lambda choice: True, call_norm),
    "qk_norm_rope": (HEADS, lambda choice: True, call_heads),
    "swiglu": (SWIGLU, lambda choice: True, call_swiglu),
}


def main(strength: int, names: Sequence[str]) -> None:
    """Prints, as JSON: calls by name, machine codes by kernel, and what does not compile: (name, choice, error)."""
    from standin import record

    launches = record(90, front_end=True)
    from dlm_kernels import device

    device.capability_of = lambda op, tensor, kernel: 90
    calls: dict[str, int] = {}
    wrong = []
    for name in names or CALLS:
        options, allowed, call = CALLS[name]
        for choice in covering(options, strength, allowed):
            calls[name] = calls.get(name, 0) + 1
            try:
                call(choice)
            except Exception as error:  # whatever the front end raises is the finding
                wrong.append((name, str(choice), f"{type(error).__name__}: {error}"))
    codes: dict[str, int] = {}
    for variant in {launch.variant for launch in launches}:
        codes[variant.function] = codes.get(variant.function, 0) + 1
    print(json.dumps({"calls": calls, "codes": codes, "wrong": wrong}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
