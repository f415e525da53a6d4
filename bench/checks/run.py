"""What every correctness check is made of: sizes, poisoned memory with guard zones, comparisons, and the runner that
makes rows of them."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

OPS = ("confidence", "unmask", "block_attention", "decode")
NOT_RUN = "not run"
Case = tuple[str, Callable[[], None]]


class Failure(AssertionError):
    """An op computed something else than its specification; the message says what."""


class Skip(Exception):
    """A check that this machine cannot run; the message says why. It is reported, and is neither green nor red."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the checks are. The code is the same for all; only these numbers differ between a GPU and the
    interpreter.

    Attributes:
        vocab: vocabulary of the products of outputs and dtypes. vocabs: vocabularies that get one call with everything.
        rows: logits rows of a call. logits_dtypes, attention_dtypes: dtypes checked.
        head_dims, groups: every pair is one attention call of the first attention dtype, every third of the others.
        width, prefix: longest window and cached prefix of an attention call.
        canvases: rows of an unmask call. widths: lanes of an unmask call; the first is used for all rules.
        presets: how many of the decode checks run. layers: of the random models. prompt_lengths, new_tokens: of their
            decodes.
        prompts: per task, for the embedded models; 0 = leave them out.
        far: also read and write beyond 2^31 elements. every: of the cases of an op, every n-th runs.
    """

    vocab: int
    vocabs: tuple[int, ...]
    rows: int
    logits_dtypes: tuple[torch.dtype, ...]
    attention_dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    groups: tuple[int, ...]
    width: int
    prefix: int
    canvases: int
    widths: tuple[int, ...]
    presets: int
    layers: int
    prompt_lengths: tuple[int, ...]
    new_tokens: int
    prompts: int
    far: bool
    every: int = 1


GPU = Sizes(
    vocab=126464,
    vocabs=(2, 97, 1025, 8191, 8193, 50257, 126464, 152064),
    rows=40,
    logits_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    attention_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    head_dims=(16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512),
    groups=(1, 4, 7),
    width=70,
    prefix=1600,
    canvases=96,
    widths=(32, 33, 100, 200, 1000, 2048),
    presets=10**9,
    layers=2,
    prompt_lengths=(3, 40, 17, 1),
    new_tokens=48,
    prompts=3,
    far=True,
)
# bfloat16 attention is left out: Triton's interpreter computes tl.dot on it wrongly (triton issue 11585).
TOY = Sizes(
    vocab=1025,
    vocabs=(2, 97, 8193),
    rows=8,
    logits_dtypes=(torch.float16, torch.float32),
    attention_dtypes=(torch.float32, torch.float16),
    head_dims=(16, 48),
    groups=(1, 7),
    width=9,
    prefix=40,
    canvases=10,
    widths=(6, 70),
    presets=1,
    layers=1,
    prompt_lengths=(3, 9),
    new_tokens=5,
    prompts=0,
    far=False,
    every=8,
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the correctness report."""

    op: str
    name: str
    status: str  # "passed", "FAILED", "skipped" or NOT_RUN
    detail: str
    seconds: float


def run(op: str, cases: Iterable[Case], device: torch.device) -> list[Check]:
    """Runs every case to its end; a case that raises becomes a row that says so."""
    done = []
    for name, case in cases:
        started = time.perf_counter()
        status, detail = "passed", ""
        try:
            case()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Skip as reason:
            status, detail = "skipped", str(reason)
        except Exception as error:
            # Whatever a kernel, a compiler or a driver raises is the finding; the other cases still run.
            kind = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
            status, detail = "FAILED", kind + " ".join(str(error).split())[:600]
        done.append(Check(op, name, status, detail, time.perf_counter() - started))
    return done


def sound(device: torch.device) -> bool:
    """Whether the device still answers. After an illegal access nothing does in the process that made it, whatever it
    computes."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:
        return False
    return True


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one case: they depend on the run's seed and the case's name, not on what ran before."""
    return torch.Generator(device).manual_seed((seed * 2654435761 + zlib.crc32(name.encode())) % 2**63)


# ---- memory: outputs are poisoned, and whatever is written next to them is seen

GUARD_BYTES = 1024
GUARD = 0xA5
POISON = -0x5A5A5A5B  # what an integer that was never written holds; a float holds NaN
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class GuardedMemory:
    """Hands out tensors that lie between two guard zones; `check` raises if a guard was written."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self.gaps: list[tuple[Tensor, Tensor]] = []

    def empty(
        self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A poisoned tensor of that shape and stride, aligned as the allocator aligns."""
        itemsize = torch.empty((), dtype=dtype).element_size()
        elements = 1 + sum((n - 1) * s for n, s in zip(shape, stride))
        nbytes = elements * itemsize
        buffer = torch.full(
            (GUARD_BYTES + -(-nbytes // 256) * 256 + GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device
        )
        payload = buffer[GUARD_BYTES : GUARD_BYTES + nbytes].view(dtype)
        if dtype.is_floating_point:
            payload.fill_(float("nan"))
        else:
            payload.fill_(POISON if itemsize >= 4 else 0x5A)
        self.buffers.append((buffer, nbytes))
        result = payload.as_strided(shape, stride)
        if elements > result.numel():
            gap = torch.ones(elements, dtype=torch.bool, device=device)
            gap.as_strided(shape, stride).fill_(False)
            self.gaps.append((payload, gap))
        return result

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's values in guarded memory, same strides."""
        if tensor.numel() == 0:
            return tensor.clone()
        return self.empty(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device).copy_(tensor)

    def check(self) -> None:
        for index, (buffer, nbytes) in enumerate(self.buffers):
            guards = torch.cat([buffer[:GUARD_BYTES], buffer[GUARD_BYTES + nbytes :]])
            touched = int((guards != GUARD).sum())
            if touched:
                raise Failure(f"{touched} bytes next to allocation {index} ({nbytes} bytes) were overwritten")
        for payload, gap in self.gaps:
            between = payload[gap]
            touched = int((between == between if payload.is_floating_point() else between != between[0]).sum())
            if touched:
                raise Failure(f"{touched} elements between the rows of a strided tensor were overwritten")


class poisoned(TorchFunctionMode):
    """While active, every uninitialised tensor a launcher asks torch for comes from `memory`: poisoned, between
    guards."""

    def __init__(self, memory: GuardedMemory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _EMPTY and result.numel():
            return self.memory.empty(tuple(result.shape), result.stride(), result.dtype, result.device)
        return result


# ---- comparisons


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(as_integer)


def same_bits(name: str, ours: Tensor, expected: Tensor) -> None:
    """Raises Failure unless both hold the same bits."""
    if ours.dtype != expected.dtype or ours.shape != expected.shape:
        raise Failure(f"{name}: {ours.dtype} {list(ours.shape)} instead of {expected.dtype} {list(expected.shape)}")
    ours, expected = ours.cpu(), expected.cpu()
    wrong = (bits(ours) != bits(expected)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise Failure(
            f"{name}: {len(wrong)} of {ours.numel()} differ, first at {list(at)}: {ours[at].item()} instead of {expected[at].item()}"
        )


def no_worse_than_torch(
    name: str,
    ours: Tensor,
    low_precision: Tensor,
    exact: Tensor,
    factor: float = 2,
    floor: float = 1e-6,
    unit: float = 1.0,
) -> None:
    """Raises Failure unless our largest error against float64 is at most `factor` times that of plain torch in our
    dtype.

    Where torch's largest error is less than the rounding of a result to our dtype, that rounding takes its place: of
    few results, torch's may all happen to lie close to a number of the dtype. An error of `floor` relative to the
    largest number involved (at least `unit`) is always allowed. Infinities and NaN must stand exactly where the float64
    result has them.
    """
    if ours.shape != exact.shape:
        raise Failure(f"{name}: shape {list(ours.shape)} instead of {list(exact.shape)}")
    epsilon = torch.finfo(ours.dtype).eps
    ours, low_precision = ours.double(), low_precision.double()
    finite = exact.isfinite()
    # One NaN is as good as another: its sign and payload are the hardware's.
    strange = (torch.where(finite, 0.0, torch.where(values.isnan(), torch.nan, values)) for values in (ours, exact))
    same_bits(f"{name} (where not finite)", *strange)
    unwritten = int((finite & ~ours.isfinite()).sum())
    if unwritten:
        raise Failure(f"{name}: {unwritten} of {ours.numel()} are NaN or infinite and should not be (never written?)")
    zero = torch.zeros_like(exact)
    error, sizes = torch.where(finite, (ours - exact).abs(), zero), torch.where(finite, exact.abs(), zero)
    theirs = torch.where(finite, (low_precision - exact).abs(), zero).max().item()
    # Half of the dtype's step there: epsilon times the power of two below the number; none at 0, whose mantissa is 0.
    rounding = epsilon / 2 * sizes / (2 * torch.frexp(sizes).mantissa.clamp(min=0.5))
    allowed = factor * rounding.clamp(min=theirs) + floor * max(unit, sizes.max().item())
    if not (error <= allowed).all():
        worst = (error - allowed).argmax()
        raise Failure(
            f"{name}: error {error.flatten()[worst]:.3g} against float64, torch's largest is {theirs:.3g} "
            f"(allowed {allowed.flatten()[worst]:.3g})"
        )
