"""Random calls of `confidence`, the checks that tests and the campaign make of them, and how they are run."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from dlm_kernels import reference
from dlm_kernels.checks.confidence import MAX_BANNED, MAX_BIAS, OUTPUTS
from dlm_kernels.confidence import launch as kernel
from dlm_kernels.reference.confidence import Confidence
from dlm_kernels.testing import GuardedMemory, clear_draws, no_worse_than_torch, poisoned
from dlm_kernels.testing.confidence_calls import Options, random_call
from dlm_kernels.tiles import ConfidenceTile

INTEGERS = ("token", "second_token", "error")
FLOATS = (
    "logit",
    "second_logit",
    "logsumexp",
    "entropy",
    "confidence",
    "margin",
    "sampled_confidence",
    "query_confidence",
)
STATISTICS = ("second", "logsumexp", "entropy")
WITHOUT_KL = tuple(name for name in OUTPUTS if name != "kl")

# A whole tile of fp32 is 4 * columns ids: these cut every vocabulary here differently, one across many tiles and parts
# with a program for each part, one across tiles that are parts, one into a single tile.
COLUMNS = (16, 64, 1024)


# Running.


@contextlib.contextmanager
def changed(owner: object, **values: object) -> Iterator[None]:
    saved = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def faster_interpreter() -> Iterator[None]:
    """The interpreter patches Triton's library anew at every call of a device function; once a launch is enough."""
    patch_library, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        modules = {id(value) for value in function.__globals__.values() if inspect.ismodule(value)}
        missing = (modules & {id(interpreter.tl), id(interpreter.tl.core)}) - patched
        patched.update(missing)
        return patch_library(function) if missing else None

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    with changed(interpreter, _patch_lang=patch_once), changed(interpreter.GridExecutor, __call__=launch_afresh):
        yield


def toy_tile(columns: int, part_tiles: int = 4, num_warps: int = 1) -> ConfidenceTile:
    return ConfidenceTile(columns=columns, num_warps=num_warps, part_tiles=part_tiles)


def run_kernel(
    logits: Tensor,
    columns: int | None = None,
    *,
    part_tiles: int | None = None,
    num_warps: int = 1,
    split: bool | None = None,
    **arguments: object,
) -> Confidence:
    """`confidence` by the tile and in the form that are given (None: what the launcher chooses; 16 columns are split),
    its buffers poisoned."""
    tile = None if columns is None else toy_tile(columns, part_tiles or {16: 4, 64: 1}.get(columns, 2), num_warps)
    split = columns == 16 if columns is not None and split is None else split
    with contextlib.ExitStack() as stack:
        stack.enter_context(faster_interpreter())
        if tile is not None:
            stack.enter_context(changed(kernel, _tile=lambda logits, kl, biased, sampled: tile))
        if split is not None:
            stack.enter_context(changed(kernel, _multiprocessors=lambda device: 2**30 if split else 0))
        memory = GuardedMemory()
        stack.enter_context(poisoned(memory))
        result = kernel.confidence(logits, **arguments)
    memory.check()
    return result


class Recorder(TorchDispatchMode):
    """What a call asks of torch and of Triton, in order; kernels are not run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls.append(str(function.overloadpacket))
        return function(*arguments, **(options or {}))


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    recorder = Recorder()
    with (
        changed(type(kernel._merge_kernel), run=lambda self, *_, **__: recorder.calls.append(self.fn.__name__)),
        recorder,
    ):
        yield recorder.calls


# Checks.


def assert_equals_reference(ours: Confidence, logits: Tensor, **arguments: object) -> None:
    """Ids and errors exactly, floats by the error bound; `sampled_token` where the draw is clear, which nearly all
    are."""
    low = reference.confidence(logits, **arguments)
    previous = {"previous": arguments["previous"].double()} if arguments.get("previous") is not None else {}
    exact = reference.confidence(logits.double(), **arguments | previous)
    for name in Confidence._fields:
        assert (getattr(ours, name) is None) == (getattr(low, name) is None), name
    for name in INTEGERS:
        if getattr(low, name) is not None:
            assert getattr(ours, name).dtype == getattr(low, name).dtype
            assert torch.equal(getattr(ours, name), getattr(low, name)), name
    settled = torch.ones_like(ours.token, dtype=torch.bool)
    if low.sampled_token is not None:
        settled = clear_draws({"logits": logits, **arguments}) | (low.error != 0)
        assert (~settled).sum() <= max(1, 0.01 * settled.numel())
        assert torch.equal(ours.sampled_token[settled], exact.sampled_token[settled]), "sampled_token"
    temperature = arguments.get("temperature")
    usable = (
        [1.0] if temperature is None else [t for t in temperature.tolist() if 1e-6 <= t <= 1e6]
    )  # others are errors of their rows
    coldest = min(usable, default=1.0)
    added = [arguments[name] for name in ("bias", "previous") if arguments.get(name) is not None]
    finite = [values.float().nan_to_num(0, 0, 0).abs().clamp(max=1e4) for values in (logits, *added)]
    size = sum(values.max().item() for values in finite if values.numel())
    scale = 4 + (size + (arguments.get("soft_cap") or 0)) / coldest
    # Exponents are of the size of the scale and carry 24 bits: so far may a result be off that torch hits by chance.
    for name in (*FLOATS, "kl"):
        values = getattr(ours, name)
        if values is not None:
            assert values.dtype == torch.float32
            assert not values.isnan().any() and not getattr(exact, name).isnan().any(), name
            keep = settled if name == "sampled_confidence" else slice(None)
            # Log-probabilities are subtracted, and those of a flat row are as large as its logsumexp.
            terms = scale + (
                arguments["previous_logsumexp"].nan_to_num(0, 0, 0).abs().max().item() if name == "kl" else 0
            )
            no_worse_than_torch(
                name,
                values[keep],
                getattr(low, name)[keep],
                getattr(exact, name)[keep],
                floor=2**-22 * terms,
                one_by_one=True,
            )


def assert_identical(a: Confidence, b: Confidence) -> None:
    """Bit for bit; NaN would differ from itself, and is no value of any output."""
    for name in Confidence._fields:
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert torch.equal(left, right), f"{name}: {left.tolist()} is not {right.tolist()}"


def rows_of(result: Confidence, rows: slice) -> Confidence:
    return Confidence(*(None if values is None else values[rows] for values in result))


# Random calls.


def everything(N: int, V: int, device: torch.device, greedy_every: int = 4) -> dict[str, object]:
    """Arguments that request every output but "kl", random but for some greedy rows."""
    sample_temperature = torch.rand(N) + 0.5
    sample_temperature[::greedy_every] = 0
    arguments = {
        "temperature": torch.rand(N) + 0.5,
        "sample_temperature": sample_temperature,
        "seed": torch.tensor([0x123456789ABCDEF]),
        "noise": torch.randint(-5, 1000, (N, 3), dtype=torch.int32),
        "query": torch.randint(0, V, (N,)),
    }
    return {"outputs": WITHOUT_KL, **{name: value.to(device) for name, value in arguments.items()}}


def random_case(
    seed: int,
    device: torch.device | str = "cpu",
    vocabularies: tuple[int, ...] = (1, 2, 3, 31, 97, 255, 256, 257, 1023, 1025),
    most_rows: int = 6,
) -> tuple[Tensor, dict[str, object]]:
    """Logits and arguments of one random call of `confidence`: every option with some chance, hostile values."""
    rng = random.Random(seed)
    V = rng.choice(vocabularies)
    R = rng.randint(1, max(1, most_rows - 1))
    # The interpreter pays per id.
    most_bans, most_biases = (MAX_BANNED, MAX_BIAS) if V > 1000 else (8, 5)
    options = Options(
        entries=rng.choice([None, rng.randint(1, most_rows)]),
        bans=rng.choice([1, 2, 5, most_bans]) if rng.random() < 0.8 else 0,
        shared_bans=rng.random() < 0.3,
        biases=rng.choice([1, 3, most_biases]) if rng.random() < 0.4 else 0,
        temperature=rng.random() < 0.5,
        soft_cap=rng.random() < 0.3,
        seeds=random.Random(f"seeds {seed}").random() < 0.5,
        errors=rng.random() < 0.2,
    )
    call = random_call(
        torch.Generator().manual_seed(seed),
        R,
        V,
        rng.choice([torch.float16, torch.bfloat16, torch.float32]),
        tuple(name for name in OUTPUTS if rng.random() < 0.6),
        options,
        hostile=rng.randint(0, 3),
        padding=rng.choice([0, 3]),
        device=device,
    )
    return call.pop("logits"), call


def run_case(seed: int, device: torch.device) -> dict[str, object]:
    """One case of the campaign: a random call by a toy tile, against the float64 reference. Vocabularies are off by at
    most one from a tile or a few parts. One program a row, one a part, or both and then bit for bit the same."""
    rng = random.Random(seed + 2**32)
    form = rng.choice(["unsplit", "unsplit", "split", "split", "both"])
    columns, part_tiles = rng.choice([(4, 1), (4, 2), (16, 1), (64, 1)])
    # Parts of fp32 logits; those of fp16 and bf16 are twice as wide, and the vocabulary is then off a part's middle or
    # end.
    V = max(1, 4 * columns * part_tiles * rng.choice([1, 2, 3, 4]) + rng.choice([-1, 0, 1]))
    logits, arguments = random_case(seed, device, (V,), most_rows=2)
    width = columns * 16 // logits.element_size()
    forms = {"unsplit": [False], "split": [True], "both": [False, True]}[form]
    options = {"part_tiles": part_tiles, "num_warps": 1 << seed % 3}
    results = [run_kernel(logits, columns, **options, split=split, **arguments) for split in forms]
    if form == "both":
        assert_identical(*results)
    assert_equals_reference(results[0], logits, **arguments)
    named = [name for name in ("kl", "sampled") if name in arguments["outputs"]]
    named += [name for name in ("bias",) if name in arguments]
    return {"kind": " ".join([form, *named]), "boundary": V > width}


def draws(N: int, V: int, temperature: float, device: torch.device | str = "cpu") -> dict[str, object]:
    noise = torch.zeros(N, 3, dtype=torch.int32, device=device)
    noise[:, 1] = torch.arange(N)
    return {
        "outputs": ("sampled",),
        "sample_temperature": torch.full((N,), temperature, device=device),
        "seed": torch.tensor([5], device=device),
        "noise": noise,
    }
