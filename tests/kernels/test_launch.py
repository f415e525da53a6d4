"""What the launchers launch, as a GPU would see it: Triton's own specialisation of real calls, recorded without a GPU.

Two promises. The configurations that the static report compiles are those that decoders launch, argument types and
alignment included. And lengths, batches and buckets make no new machine code: a decode compiles at its first step and
not again.
"""

from __future__ import annotations

import collections
import itertools
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="these tests go through Triton's launch path")

import torch
from launch_cases import CALLS, covering
from torch._subclasses.fake_tensor import FakeTensorMode
from uninterpreted import said

from dlm_kernels import device as device_module
from dlm_kernels import library, tiles
from dlm_kernels.confidence import launch as confidence

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import dataclasses, json, sys
sys.path.insert(0, {tests!r})
from standin import record, variant_of_case
launches = record(90)

import torch
from dlm_kernels import (
    RowState, UnmaskInputs, UnmaskRule, Window, attention, confidence, device, drafts, layers, noise, reference, static,
    unmask,
)
device.capability_of = lambda op, tensor, kernel: 90

# Numbers that follow from the vocabulary: the report compiles one vocabulary.
OF_THE_VOCABULARY = ("PARTS", "LOG2_SLOTS", "COLUMN_TILES")


def known(variant):
    constants = tuple(item for item in variant.constants if item[0] not in OF_THE_VOCABULARY)
    return dataclasses.replace(variant, constants=constants)


SHIPPED = {{
    known(variant_of_case(case)): f"{{case.kernel}} {{case.config}}"
    for op in static.KERNEL_MODULES for case in static.shipped(op, 90)
}}


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32)


def attend(B, W, H, H_kv, D, S_max, mode, kv_len=5, dtype=torch.bfloat16, **options):
    q, k, v = (torch.zeros(B, W, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, H_kv, H_kv))
    caches = [torch.zeros(B, H_kv, S_max, D, dtype=dtype) if S_max else None for _ in range(2)]
    lane = torch.arange(W, dtype=torch.int32).expand(B, W).contiguous()
    window = Window(
        q_pos=lane, q_block=torch.zeros_like(lane), q_len=int32([W] * B), kv_slot=lane + kv_len,
        kv_len=int32([kv_len] * B), replaced=int32([[0, 0]] * B), cache_row=int32(range(B)), mode=mode,
    )
    attention.block_attention(q, k, v, *caches, window, scale=D**-0.5, **options)


def reduce(N, V, dtype=torch.bfloat16, **options):
    logits = torch.zeros(N, V, dtype=dtype)
    confidence.confidence(logits, rows=torch.arange(N, dtype=torch.int32), banned=torch.tensor([3]), **options)


def sampling(N, seeds):
    given = {{"sample_temperature": torch.zeros(N), "noise": torch.zeros(N, 3, dtype=torch.int32)}}
    return given | {{"seed": torch.zeros(seeds, dtype=torch.int64)}}


def draft(B, D, W):
    lanes = torch.zeros(B, W, dtype=torch.int64), torch.zeros(B, W), torch.zeros(B, W)
    source = reference.DraftSource(*lanes, int32([0] * B), int32([0] * B))
    eligible, rows = torch.zeros(B, W, dtype=torch.bool), torch.zeros(B, dtype=torch.bool)
    held = drafts.draft_build(source, lanes[0], eligible, rows, D=D)
    scores = torch.zeros(B, D, W)
    drafts.verify(
        source, held, held, scores, scores, eligible=eligible, ready=rows, drafting=rows, selects=rows, mask_id=9
    )


def draw(N):
    for seeds in (1, N):
        noise.uniform_scores(torch.zeros(seeds, dtype=torch.int64), torch.zeros(N, 3, dtype=torch.int32))


def layer(B, W, d, H, H_kv, D, R, I, norm=False, scale=False, dtype=torch.bfloat16):
    def rows(*shape):
        return torch.zeros(B, W, *shape, dtype=dtype)

    layers.rms_norm(rows(d), rows(d)[0, 0], eps=1e-6)
    layers.add_rms_norm(rows(d), rows(d), rows(d)[0, 0], eps=1e-6)
    weight = torch.zeros(D, dtype=dtype)
    given = dict(q_weight=weight, k_weight=weight, eps=1e-6) if norm else dict()
    angles = rows(R)[:1]
    layers.qk_norm_rope(rows(H, D), rows(H_kv, D), angles, angles, **given, q_scale=rows()[:1] if scale else None)
    layers.swiglu(*rows(2 * I).chunk(2, -1))


def write(B, L, W, rule=UnmaskRule("threshold", cache="refresh"), kind="denoise"):
    rows = int32([1] * B)
    inputs = UnmaskInputs(
        query_len=rows, pred=torch.zeros(B, W, dtype=torch.int64), score=torch.zeros(B, W),
        confidence=torch.zeros(B, W), value=torch.zeros(B), min_unmask=rows, steps=rows, block_length=rows,
        mask_id=9, stop_ids=torch.tensor([8]),
        lane_start=rows, rank=torch.zeros(B, W), stat_error=torch.zeros(B, W, dtype=torch.int32), max_steps=rows,
    )
    unmask.unmask(RowState.empty(B, L, "cpu"), rule, inputs, kind=kind)


def finish():
    variants = {{}}
    for launch in launches:
        variants.setdefault(launch.variant, []).append(launch.grid)
    print(json.dumps([[variant.function, SHIPPED.get(known(variant)), grids] for variant, grids in variants.items()]))
"""


def variants(script: str, folder: Path) -> list[tuple[str, str | None, list[list[int]]]]:
    """(function, the shipped configuration it is or None, its grids) of every machine code that the script's calls ask
    for."""
    path = folder / "calls.py"
    path.write_text(PRELUDE.format(tests=str(ROOT / "tests" / "support")) + script + "\nfinish()\n")
    return [tuple(item) for item in said(str(path))]


# LLaDA-8B, Dream-7B, SDAR-8B, LLaDA2-mini; DiffusionGemma's two kinds of layer.
MODELS = """
for H, H_kv, D in ((32, 32, 128), (28, 4, 128), (32, 8, 128), (16, 4, 128), (16, 8, 256), (16, 2, 512)):
    attend(2, 32, H, H_kv, D, 1024, "full")
for V in (126464, 152064, 151936, 157184, 262144):
    for options in ({"outputs": ("second",)}, {"outputs": ("second", "logsumexp", "entropy")}):
        reduce(64, V, **options)
        reduce(600, V, **options)
    for seeds in (1, 600):
        reduce(600, V, outputs=("sampled",), **sampling(600, seeds))
for W in (32, 64, 256, 2000):
    write(4, 4096, W)
    draft(4, 3, W)
    draw(4 * W)
layer(2, 32, 4096, 32, 32, 128, 128, 12288)
layer(2, 32, 3584, 28, 4, 128, 128, 18944)
layer(2, 32, 4096, 32, 8, 128, 128, 12288, norm=True)
layer(2, 32, 2048, 16, 4, 128, 64, 512, norm=True)
layer(2, 32, 3072, 32, 8, 128, 128, 12288, scale=True)
"""


def test_what_the_models_decoders_launch_is_what_the_static_report_compiles(tmp_path):
    found = variants(MODELS, tmp_path)
    assert [function for function, shipped, _ in found if shipped is None] == []
    assert {shipped.split()[0] for _, shipped, _ in found} == {
        "attention", "confidence", "unmask", "draft_build", "verify", "uniform_scores", "rms_norm", "add_rms_norm",
        "qk_norm_rope", "swiglu",
    }  # fmt: skip


LENGTHS = """
for B in (1, 3):
    for W in (1, 16, 33):
        for S_max, kv_len in ((16, 0), (48, 1), (1040, 700), (4112, 4000)):
            attend(B, W, 8, 2, 128, S_max, "block", kv_len)
for N in (1, 16, 40, 300):
    reduce(N, 126464, outputs=("second",))
for B, L, W in ((1, 40, 4), (3, 1000, 32), (16, 33, 32)):
    write(B, L, W)
    draft(B, 2, W)
    draw(B * W)
# Head sizes and widths that are aligned, and some that are not.
for B, W in ((1, 1), (1, 2), (3, 1), (2, 7), (5, 64)):
    layer(B, W, 64, 4, 2, 32, 32, 128)
    layer(B, W, 63, 3, 1, 7, 6, 70)
"""


def test_lengths_batches_and_buckets_make_no_new_machine_code(tmp_path):
    functions = collections.Counter(function for function, _, _ in variants(LENGTHS, tmp_path))
    assert functions.pop("_confidence_kernel") == 2  # split, and not
    assert functions.pop("rms_norm_kernel") == 4  # two lengths, with and without a residual
    assert functions.pop("qk_norm_rope_kernel") == functions.pop("swiglu_kernel") == 2  # two models
    assert set(functions.values()) == {1}, functions


NUMBERS_OF_BANNED_IDS = """
for N in (64, 600):
    for number in range(1, 33):
        logits = torch.zeros(N, 126464, dtype=torch.bfloat16)
        for banned in (torch.zeros(number, dtype=torch.int64), torch.zeros(N, number, dtype=torch.int64)):
            confidence.confidence(logits, banned=banned)
"""


def test_the_number_of_banned_ids_makes_no_new_machine_code(tmp_path):
    functions = collections.Counter(function for function, _, _ in variants(NUMBERS_OF_BANNED_IDS, tmp_path))
    assert functions == {"_confidence_kernel": 2, "_merge_kernel": 1}  # split, and not


# Every tensor but the logits begins a row or an element behind a multiple of 16 bytes, or does not; there is a seed for
# all rows, or one for each.
SLICES = """
def slices(shift):
    def cut(*shape, dtype=torch.int32, value=0):
        whole = torch.full((shape[0] + 1, *shape[1:]), value, dtype=dtype)
        return whole[shift:][: shape[0]]
    return cut


def reduce_slices(N, cut, seeds):
    logits = torch.zeros(N, 126464, dtype=torch.bfloat16)
    float32, int64 = {"dtype": torch.float32}, {"dtype": torch.int64}
    confidence.confidence(
        logits, rows=cut(N), outputs=("second", "kl", "sampled", "query"), banned=cut(N, 3, **int64),
        temperature=cut(N, **float32), sample_temperature=cut(N, **float32), seed=cut(seeds, **int64), noise=cut(N, 3),
        query=cut(N, **int64), bias_ids=cut(N, 5, **int64), bias=cut(N, 5, **float32), previous=logits,
        previous_logsumexp=cut(N, **float32),
    )


def write_slices(B, L, W, cut, passes):
    types = {"int64": ("pred",), "float": ("score", "confidence", "rank", "entropy", "value")}
    def of(name, *shape):
        kind = next((kind for kind, names in types.items() if name in names), "int32")
        return cut(*shape, dtype=getattr(torch, kind))
    rule = UnmaskRule(passes, cache="refresh")
    lanes = {name: of(name, B, W) for name in ("pred", "score", "confidence", "rank", "stat_error")}
    lanes |= {"entropy": of("entropy", B, W)} if passes == "entropy" else {}
    rows = {
        name: of(name, B)
        for name in ("query_len", "value", "min_unmask", "steps", "block_length", "lane_start", "max_steps")
    }
    inputs = UnmaskInputs(mask_id=9, stop_ids=cut(2, dtype=torch.int64), **lanes, **rows)
    state = RowState.empty(B, L, "cpu")
    state = dataclasses.replace(
        state, **{name: cut(*tensor.shape, dtype=tensor.dtype) for name, tensor in vars(state).items()}
    )
    unmask.unmask(state, rule, inputs, kind="denoise")


def draft_slices(B, D, W, cut):
    source = reference.DraftSource(
        cut(B, W, dtype=torch.int64), *(cut(B, W, dtype=torch.float32) for _ in range(2)), cut(B), cut(B)
    )
    eligible, rows = cut(B, W, dtype=torch.bool), cut(B, dtype=torch.bool)
    held = drafts.draft_build(source, cut(B, W, dtype=torch.int64), eligible, rows, D=D)
    token, score = cut(B, D, W, dtype=torch.int64), cut(B, D, W, dtype=torch.float32)
    drafts.verify(
        source, token, token, score, score, eligible=eligible, ready=rows, drafting=rows, selects=rows, mask_id=9
    )


def attend_slices(B, W, S, cut):
    q, k, v = (torch.zeros(B, W, heads, 128, dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2))
    caches = [torch.zeros(B, 2, S, 128, dtype=torch.bfloat16) for _ in range(2)]
    window = Window(
        cut(B, W), cut(B, W), cut(B), cut(B, W, value=-1), cut(B), cut(B, 2), cut(B), "block",
        kept=cut(B, S, dtype=torch.bool),
    )
    attention.block_attention(q, k, v, *caches, window, scale=0.125)


for shift in (0, 1):
    cut = slices(shift)
    for W in (33, 701):
        attend_slices(3, W, 1201, cut)
    for N in (5, 600):
        for seeds in (1, N):
            reduce_slices(N, cut, seeds)
    for W in (21, 301):
        for passes in ("threshold", "factor", "entropy"):
            write_slices(3, 401, W, cut, passes)
    draft_slices(3, 2, 21, cut)
    for seeds in (1, 7):
        noise.uniform_scores(cut(seeds, dtype=torch.int64), cut(7, 3))
"""


def test_slices_that_begin_anywhere_make_no_new_machine_code(tmp_path):
    functions = collections.Counter(function for function, _, _ in variants(SLICES, tmp_path))
    assert functions == {
        "_attention_kernel": 1, "_combine_kernel": 1, "_prefill_kernel": 1,
        "_confidence_kernel": 2, "_merge_kernel": 1, "unmask_kernel": 3, "unmask_memory_kernel": 3,
        "draft_build_kernel": 1, "verify_kernel": 1, "uniform_scores_kernel": 1,
    }  # fmt: skip


PREFILL = """
attend(1, 700, 8, 2, 128, 4096, "block", 0)
attend(1, 700, 8, 2, 128, 0, "full")
attend(1, 32, 8, 2, 128, 4096, "block", 0)
"""


def test_grids_follow_the_shapes(tmp_path):
    found = {function: grids for function, _, grids in variants(PREFILL, tmp_path)}
    assert set(found) == {"_prefill_kernel", "_attention_kernel", "_combine_kernel"}
    assert all(len(grid) <= 3 and all(size >= 1 for size in grid) for grids in found.values() for grid in grids)


def front_end(strength: int) -> dict:
    """What launch_cases.py says of all calls."""
    return said(str(ROOT / "tests" / "support" / "launch_cases.py"), str(strength))


KERNELS = {
    "_attention_kernel", "_prefill_kernel", "_combine_kernel", "_confidence_kernel", "_merge_kernel",
    "unmask_kernel", "unmask_memory_kernel", "draft_build_kernel", "verify_kernel", "uniform_scores_kernel",
    "rms_norm_kernel", "qk_norm_rope_kernel", "swiglu_kernel",
}  # fmt: skip


def test_every_kernel_passes_tritons_front_end_with_every_pair_of_options():
    """No such error shows in the interpreter, and the static report compiles a list of configurations."""
    found = front_end(2)
    assert found["wrong"] == []
    assert set(found["codes"]) == KERNELS
    assert sum(found["codes"].values()) >= 200, found["codes"]


@pytest.mark.campaign
def test_every_kernel_passes_tritons_front_end_with_every_three_options():
    found = front_end(3)
    assert found["wrong"] == []
    assert set(found["codes"]) == KERNELS


def test_choices_cover_every_pair_that_is_allowed_and_are_the_same_every_time():
    options = {"a": (0, 1, 2), "b": (0, 1), "c": ("x", "y", "z")}
    choices = list(covering(options, 2, lambda choice: choice["a"] != 2 or choice["b"] == 0))
    assert choices == list(covering(options, 2, lambda choice: choice["a"] != 2 or choice["b"] == 0))
    pairs = {(x, y) for choice in choices for x, y in itertools.combinations(choice.items(), 2)}
    expected = {((n, x), (m, y)) for n, m in itertools.combinations(options, 2) for x in options[n] for y in options[m]}
    assert pairs == expected - {(("a", 2), ("b", 1))}
    assert len(choices) < 3 * 2 * 3 - 3


class Machine:
    """GPUs that are not there: which one is current, and what was launched on it."""

    def __init__(self) -> None:
        self.current = 0
        self.launches: list[tuple[str, int]] = []
        self.entered = 0

    def device(self, index: int) -> Machine.Current:
        return Machine.Current(self, index)

    class Current:
        """`torch.cuda.device`."""

        def __init__(self, machine: Machine, index: int) -> None:
            self.machine, self.index = machine, index

        def __enter__(self) -> None:
            self.before, self.machine.current = self.machine.current, self.index
            self.machine.entered += 1

        def __exit__(self, *_: object) -> None:
            self.machine.current = self.before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Triton launches on the current device and its stream: what is current at a launch is where it goes."""
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(device_module, "_capability", lambda index: 90)
    monkeypatch.setattr(library, "_is_traced", lambda positional: False)
    monkeypatch.setattr(
        confidence, "_multiprocessors", confidence._multiprocessors
    )  # the calls choose it; put back afterwards

    def run(self, *_, grid, warmup, **arguments):
        devices = {value.device for value in arguments.values() if isinstance(value, torch.Tensor)}
        assert devices == {torch.device("cuda", machine.current)}, (
            f"{self.fn.__name__} on GPU {machine.current}, its tensors on {devices}"
        )
        machine.launches.append((self.fn.__name__, machine.current))

    monkeypatch.setattr(type(confidence._confidence_kernel), "run", run)
    return machine


ONE_CALL = {
    "unmask in registers": dict(passes="threshold", cache="refresh", stop="closed"),
    "unmask in memory": dict(passes="factor", cache="refresh", stop="closed"),
    "confidence, whole rows": dict(dtype="float32", banned="shared"),
    "confidence, split and merged": dict(dtype="float32", banned="shared"),
    "block_attention": dict(dtype="float32", D=16, G=1, mode="full", cache="plain", page=0),
    "drafts": dict(W=20),
    "uniform_scores": dict(N=20),
    "norms": dict(dtype="float32", d=64),
    "qk_norm_rope": dict(dtype="float32", dims=(80, 20)),
    "swiglu": dict(dtype="float32", I=70),
}


@pytest.mark.parametrize("current", [0, 1])
def test_every_launch_goes_to_the_gpu_of_its_tensors(current, machine):
    machine.current = current
    with FakeTensorMode(), torch.device("cuda", 1):
        for name, (options, _, call) in CALLS.items():
            call({option: values[0] for option, values in options.items()} | ONE_CALL[name])
    assert {function for function, _ in machine.launches} == KERNELS
    assert {index for _, index in machine.launches} == {1}
    assert machine.current == current
    # Nothing is switched where the GPU is the current one: it would cost the host time in every layer.
    assert (machine.entered > 0) == (current == 0)


@pytest.mark.parametrize("capability", [70, 75, 110])
def test_every_launcher_refuses_a_gpu_that_no_kernel_has_tiles_for(capability, monkeypatch):
    monkeypatch.setattr(device_module, "INTERPRETED", capability)
    monkeypatch.setattr(confidence, "_multiprocessors", confidence._multiprocessors)
    for name, (options, _, call) in CALLS.items():
        refusal = rf"^\w+: there are no Triton kernels for compute capability {capability / 10} \(cpu\)"
        with pytest.raises(NotImplementedError, match=refusal):
            call({option: values[0] for option, values in options.items()} | ONE_CALL[name])


def test_every_claimed_gpu_has_tiles_for_every_op():
    for capability in set(tiles.TARGETS.values()):
        assert capability in tiles.TARGETS and tiles.TARGETS[capability] == capability
        for dtype, D in itertools.product((torch.bfloat16, torch.float32), tiles.HEAD_DIMS):
            tiles.attention_tile(capability, D=D, G=1, dtype=dtype, fp8=True)
            tiles.attention_prefill_tile(capability, D=D, dtype=dtype, fp8=True)
        for itemsize in (2, 4):
            tiles.confidence_tile(capability, itemsize, kl=True, biased=True, sampled=True)
