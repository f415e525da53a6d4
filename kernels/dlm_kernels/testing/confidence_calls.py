"""Random calls of `confidence`, for the tests and for the check on a GPU."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import torch
from torch import Tensor

# What can be wrong or odd about a row of logits.
HOSTILE = (
    "ties",
    "nothing",
    "a NaN",
    "an infinity",
    "one candidate",
    "zeros",
    "low half",
    "masked",
    "far below",
    "late start",
    "broken tail",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a call passes besides its logits and what its outputs need.

    Attributes:
        entries: length of the row list, which names absent rows and one row twice; from R + 4 on, every row is in the
            list. None: no list, and an output for every row.
        bans: ids that are banned, 0 = none. shared_bans: the same ids for every output.
        biases: ids that get a bias, 0 = none.
        temperature, soft_cap: whether they are passed.
        seeds: every output has a seed of its own. They change no other number of the call.
        errors: temperatures and queries of some outputs are errors, and by chance one number of every other
            floating-point argument is not finite.
    """

    entries: int | None = None
    bans: int = 0
    shared_bans: bool = False
    biases: int = 0
    temperature: bool = False
    soft_cap: bool = False
    seeds: bool = False
    errors: bool = False


def random_call(
    generator: torch.Generator,
    R: int,
    V: int,
    dtype: torch.dtype,
    outputs: tuple[str, ...],
    options: Options,
    *,
    hostile: int,
    padding: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The arguments of one call by name.

    Args:
        hostile: rows of logits that are made hostile, each in another way of `HOSTILE` as long as there are ways; never
            the last of several rows, which is what an op that clamps the row list would read.
        padding: NaN between the rows of logits, which nobody may read.
    """
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))

    # 1. The logits, and what their rows would choose if none were hostile.
    scale = torch.tensor([0.5, 4.0, 12.0])[torch.randint(3, (R, 1), generator=generator)]
    logits = torch.randn(R, V, generator=generator) * scale
    tied = torch.rand(R, 1, generator=generator) < 0.5
    logits = torch.where(tied, logits.round(), logits).to(dtype)
    clean = logits.argmax(1)
    ways = rng.sample(HOSTILE, len(HOSTILE))
    others = range(max(1, R - 1))
    changed = rng.sample(others, min(hostile, len(others)))
    for place, r in enumerate(changed):
        _make_hostile(logits[r], ways[place % len(ways)], rng)
    call: dict[str, Any] = {"logits": logits, "outputs": outputs}

    # 2. The rows of the outputs.
    row = list(range(R))
    if options.entries is not None:
        row = rng.sample(row, R)
        row += [-1, row[0], R, -7]
        extra = rng.choices(row, k=max(0, options.entries - len(row)))
        row = row + extra if options.entries >= len(row) else rng.choices([*row, *row[:R]], k=options.entries)
        call["rows"] = torch.tensor(row, dtype=torch.int32)
    N = len(row)
    needed = torch.tensor(row).clamp(0, R - 1)

    # 3. Ids that are banned or biased: those that would win, some that are none, and any.
    def any_ids(*shape: int) -> Tensor:
        return torch.randint(-1, V + 1, shape, generator=generator)

    if options.bans and options.shared_bans:
        call["banned"] = any_ids(options.bans)
        call["banned"][0] = clean[rng.randrange(R)]
    elif options.bans:
        limits = torch.finfo(dtype)
        best = torch.nan_to_num(logits.float(), 0, limits.max, limits.min).topk(min(V, 4), dim=1).indices
        columns = [clean[needed, None], any_ids(N, 1), torch.full((N, 1), V), torch.full((N, 1), -1), best[needed]]
        banned = torch.cat([*columns, any_ids(N, options.bans)], 1)[:, : options.bans].contiguous()
        banned[rng.randrange(3) :: 3] = -1
        call["banned"] = banned
    if options.biases:
        columns = [clean[needed, None], any_ids(N, 1), torch.full((N, 1), V), any_ids(N, 1), torch.full((N, 1), -1)]
        call["bias_ids"] = torch.cat([*columns, any_ids(N, options.biases)], 1)[:, : options.biases].contiguous()
        call["bias"] = torch.randn(N, options.biases, generator=generator) * 8

    # 4. The other options, and what the outputs need.
    if options.temperature:
        call["temperature"] = torch.rand(N, generator=generator) + 0.3
    if options.soft_cap:
        call["soft_cap"] = rng.choice((1.5, 30.0))
    if "sampled" in outputs:
        call["sample_temperature"] = torch.rand(N, generator=generator) + 0.2
        call["sample_temperature"][rng.randrange(4) :: 4] = 0.0
        call["seed"] = torch.randint(-(2**62), 2**62, (1,), generator=generator)
        if options.seeds:
            own = torch.Generator().manual_seed(int(call["seed"]))
            call["seed"] = torch.randint(-(2**62), 2**62, (N,), generator=own)
        call["noise"] = torch.randint(-(2**31), 2**31 - 1, (N, 3), generator=generator).to(torch.int32)
    if "query" in outputs:
        call["query"] = torch.randint(V, (N,), generator=generator)
    if "kl" in outputs:
        # Row by row a little off the logits, further off, or nothing like them.
        kind = torch.randint(3, (R, 1), generator=generator)
        change = torch.where(kind == 0, 0.1, torch.where(kind == 1, scale / 4, 2.0))
        start = torch.where(kind < 2, logits.float(), 0.0)
        call["previous"] = (start + change * torch.randn(R, V, generator=generator)).to(dtype)
        call["previous_logsumexp"] = call["previous"].float().logsumexp(1)
    if options.errors:
        _add_errors(call, [n for n, r in enumerate(row) if 0 <= r < R and r not in changed] or [0], rng)

    # 5. On the device, the rows of logits apart.
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
    buffer = torch.full((R, V + padding), math.nan, dtype=dtype, device=device)
    buffer[:, :V] = moved["logits"]
    return moved | {"logits": buffer[:, :V]}


def _make_hostile(logits: Tensor, way: str, rng: random.Random) -> None:
    V, start = len(logits), rng.randrange(len(logits))
    if way == "ties":
        # About ten values for the whole row.
        logits.copy_((logits.float() / logits.float().abs().max().clamp(min=1) * 5).round())
    elif way == "nothing":
        logits.fill_(-math.inf)
    elif way == "a NaN":
        logits[start] = math.nan
    elif way == "an infinity":
        logits[start] = math.inf
    elif way == "one candidate":
        candidate = logits[-1].item()
        logits.fill_(-math.inf)
        logits[-1] = candidate
    elif way == "zeros":
        logits.zero_()
    elif way == "low half":
        # Masks are often written so; the least number of float16 is none of them, but a logit.
        logits[: V // 2] = torch.finfo(logits.dtype).min if logits.dtype != torch.float16 else -math.inf
    elif way == "masked":
        logits[start : start + rng.choice((1, V))] = -math.inf
    elif way == "far below":
        logits[start : start + rng.choice((1, V))] = -60000.0
    elif way == "late start":
        # Whole parts of -inf before the first logit.
        logits[: V - 1 - rng.randrange(min(V, 3))] = -math.inf
    elif way == "broken tail":
        logits[start:] = rng.choice((math.nan, math.inf))
    else:
        raise ValueError(f"way must be one of {HOSTILE}, got {way!r}")


def _add_errors(call: dict[str, Any], ordinary: list[int], rng: random.Random) -> None:
    """Errors of outputs that would have none: those of `ordinary`."""
    not_finite = (math.nan, math.inf, -math.inf)
    cold, not_a_number, unknown, none = rng.sample((ordinary * 4)[: max(4, len(ordinary))], 4)
    if "temperature" in call:
        call["temperature"][not_a_number] = rng.choice(not_finite)
        call["temperature"][cold] = 0.0
    if "query" in call:
        call["query"][none] = -1
        call["query"][unknown] = call["logits"].shape[1]
    for name in ("bias", "sample_temperature", "previous", "previous_logsumexp"):
        if name in call and rng.random() < 0.5:
            values = call[name].view(-1)
            values[rng.randrange(len(values))] = rng.choice(not_finite)
