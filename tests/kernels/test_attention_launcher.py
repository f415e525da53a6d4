"""`block_attention`'s launchers: what they refuse and how they say it, what they launch and allocate, and how far their
addresses reach."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="without Triton, there is no attention kernel to launch")
from attention_cases import TOY, assert_same_bits, random_case
from attention_oracle import by_the_loop

from dlm_kernels import Window, reference
from dlm_kernels.attention import launch as kernel
from dlm_kernels.testing.attention_calls import FP8
from dlm_kernels.tiles import ATTENTION_TILES, HEAD_DIMS


def zeros(
    *, W: int = 5, capacity: int | None = None, pages: bool = False, fp8: bool = False, **options
) -> tuple[tuple, dict]:
    """Arguments and options of a call of [2, 4, W, 16] in tensors of zeros; q and k are float16."""
    ints = {name: torch.zeros(2, W, dtype=torch.int32) for name in ("q_pos", "q_block", "kv_slot")}
    lens = {name: torch.zeros(2, dtype=torch.int32) for name in ("q_len", "kv_len", "cache_row")}
    extra = {"replaced": torch.zeros(2, 2, dtype=torch.int32), "mode": options.pop("mode", "block")}
    if options.pop("kept", False):
        extra["kept"] = torch.zeros(2, capacity, dtype=torch.bool)
    if pages:
        extra["page_table"] = torch.zeros(3, capacity // 16, dtype=torch.int32)
    caches = (None, None)
    if capacity is not None:
        shape = (7, 2, 16, 16) if pages else (3, 2, capacity, 16)
        caches = tuple(torch.zeros(shape, dtype=torch.float16).to(FP8 if fp8 else torch.float16) for _ in range(2))
    if fp8:
        options |= {"k_scale": torch.ones(2), "v_scale": torch.ones(2)}
    q, k, v = (torch.zeros(2, H, W, 16, dtype=torch.float16) for H in (4, 2, 2))
    return (q, k, v, *caches, Window(**ints, **lens, **extra)), {"scale": 1.0} | options


FEATURES = {
    "no cache": dict(),
    "cache": dict(capacity=80),
    "kept, sliding": dict(capacity=80, kept=True, sliding_window=9, mode="shadow"),
    "pages": dict(capacity=80, pages=True),
    "fp8 pages": dict(capacity=80, pages=True, fp8=True),
    "several splits": dict(capacity=1040),
    "long window": dict(W=300),
    "long window, several splits": dict(W=300, capacity=1040),
    "everything": dict(W=300, capacity=1040, pages=True, fp8=True, kept=True, sliding_window=900, mode="shadow"),
}


@pytest.mark.parametrize("features", FEATURES)
def test_reference_reads_nothing_on_the_host(features: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        arguments, options = zeros(**FEATURES[features])
        out = reference.block_attention(*arguments, **options)
    assert out.fake_mode is mode and out.shape == arguments[0].shape


@pytest.mark.parametrize("B, W", [(0, 4), (2, 0)])
@pytest.mark.parametrize("op", ["reference", "kernel"])
def test_an_empty_batch_returns_before_launching(B: int, W: int, op: str, device: torch.device) -> None:
    ints = {name: torch.zeros(B, W, dtype=torch.int32, device=device) for name in ("q_pos", "q_block", "kv_slot")}
    lens = {name: torch.zeros(B, dtype=torch.int32, device=device) for name in ("q_len", "kv_len", "cache_row")}
    window = Window(replaced=torch.zeros(B, 2, dtype=torch.int32, device=device), mode="full", **ints, **lens)
    q, cache = torch.zeros(B, 2, W, 16, device=device), torch.zeros(1, 2, 8, 16, device=device)
    block_attention = reference.block_attention if op == "reference" else kernel.block_attention
    assert block_attention(q, q, q, cache, cache.clone(), window, scale=1.0).shape == (B, 2, W, 16)


SCALE = "{}_scale must be given with a cache of torch.float8_e4m3fn and with no other"
BAD = {
    "q must be [B, H, W, D], got shape (2, 17, 32)": lambda a: a.update(q=torch.zeros(2, 17, 32)),
    "k must be [B, H_kv, W, D] with B=2, W=17, D=32": lambda a: a.update(k=torch.zeros(2, 2, 16, 32)),
    "v must have the shape of k (2, 2, 17, 32), got (2, 1, 17, 32)": lambda a: a.update(v=torch.zeros(2, 1, 17, 32)),
    "H must be a multiple of H_kv, got H=3, H_kv=2": lambda a: a.update(q=torch.zeros(2, 3, 17, 32)),
    "k_cache and v_cache must be given together, got only k_cache": lambda a: a.update(v_cache=None),
    "window must describe [B, W]=[2, 16] of q, got [2, 17]": lambda a: a.update(
        {n: torch.zeros(2, 2, 16, 32) for n in "qkv"}
    ),
    "k_cache must be [R, H_kv, S_max, D] with H_kv=2, D=32, got (4, 1, 80, 32)": lambda a: a.update(
        k_cache=torch.zeros(4, 1, 80, 32), v_cache=torch.zeros(4, 1, 80, 32)
    ),
    "v_cache must have the shape of k_cache": lambda a: a.update(v_cache=torch.zeros(4, 2, 79, 32)),
    "q must have last stride 1": lambda a: a.update(q=torch.zeros(2, 2, 32, 17).transpose(2, 3)),
    "window.kv_slot must be contiguous, got strides (34, 2)": lambda a: a.update(
        window=dataclasses.replace(a["window"], kv_slot=torch.zeros(2, 34, dtype=torch.int32)[:, ::2])
    ),
    "window.kept must be [B, S_max] with S_max=80 of the cache, got (2, 79)": lambda a: a.update(
        window=dataclasses.replace(a["window"], kept=torch.ones(2, 79, dtype=torch.bool))
    ),
    "window.kept must be [B, S_max] with S_max=160 of the cache, got (2, 80)": lambda a: a.update(
        k_cache=torch.zeros(9, 2, 32, 32),
        v_cache=torch.zeros(9, 2, 32, 32),
        window=dataclasses.replace(
            a["window"], kept=torch.ones(2, 80, dtype=torch.bool), page_table=torch.zeros(4, 5, dtype=torch.int32)
        ),
    ),
    "page_size, dim 2 of k_cache, must be a power of two >= 16, got 80": lambda a: a.update(
        window=dataclasses.replace(a["window"], page_table=torch.zeros(4, 1, dtype=torch.int32))
    ),
    "k_cache must have a row and a slot, got (0, 2, 80, 32) with S_max=80; None is no cache": lambda a: a.update(
        {f"{n}_cache": torch.zeros(0, 2, 80, 32) for n in "kv"}
    ),
    "k_cache must have a row and a slot, got (4, 2, 0, 32) with S_max=0; None is no cache": lambda a: a.update(
        {f"{n}_cache": torch.zeros(4, 2, 0, 32) for n in "kv"}
    ),
    "k_cache and v_cache are written in place and must not share memory": lambda a: a.update(v_cache=a["k_cache"]),
    "k_cache is written in place and must not be expanded, got strides (0, 2560, 32, 1)": lambda a: a.update(
        k_cache=torch.zeros(1, 2, 80, 32).expand(4, -1, -1, -1)
    ),
    "v_cache is written in place and must not require a gradient, got requires_grad=True": lambda a: a.update(
        v_cache=torch.zeros(4, 2, 80, 32, requires_grad=True)
    ),
    "sliding_window must be in [1, 2^31), got 0": lambda a: a.update(sliding_window=0),
    f"{SCALE.format('k')}, got k_scale (2,) and a cache of torch.float32": (
        lambda a: a.update(k_scale=torch.ones(2), v_scale=torch.ones(2))
    ),
    f"{SCALE.format('v')}, got no v_scale and a cache": lambda a: a.update(
        k_cache=a["k_cache"].to(FP8), v_cache=a["v_cache"].to(FP8), k_scale=torch.ones(2)
    ),
    "k_scale must be contiguous [H_kv] with H_kv=2, got (1,)": lambda a: a.update(
        k_cache=a["k_cache"].to(FP8), v_cache=a["v_cache"].to(FP8), k_scale=torch.ones(1), v_scale=torch.ones(1)
    ),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize(
    "block_attention", [reference.block_attention, kernel.block_attention], ids=["reference", "kernel"]
)
def test_wrong_values_are_named(message: str, block_attention) -> None:
    case = random_case(37, B=2, W=17, H_kv=2, G=1, D=32, cache=True).to(torch.float32)
    arguments = dict(zip(("q", "k", "v", "k_cache", "v_cache", "window"), case.arguments, strict=True))
    BAD[message](arguments)
    with pytest.raises(ValueError) as error:
        block_attention(**arguments, scale=1.0)
    assert f"block_attention: {message}" in str(error.value)


@pytest.mark.parametrize("D", [8, 20, 272, 1024])
def test_head_sizes_without_a_tile_are_the_references_alone(D: int) -> None:
    case = random_case(41, B=1, W=2, H_kv=1, G=1, D=D, cache=False, q_lens=(2,), scale=D**-0.5)
    low = case.to(torch.float32)
    torch.testing.assert_close(low.reference().double(), by_the_loop(case), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"D must be a multiple of 16 up to 256, or 512, got D={D}"):
        kernel.block_attention(*low.arguments, **low.options)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize(
    "block_attention", [reference.block_attention, kernel.block_attention], ids=["reference", "kernel"]
)
def test_a_scale_that_is_not_finite_is_refused(scale: float, block_attention) -> None:
    low = random_case(41, B=1, W=2, H_kv=1, G=1, cache=True).to(torch.float32)
    before = [buffer.clone() for buffer in low.buffers]
    with pytest.raises(
        ValueError, match=re.escape(f"scale must be a finite number, at most 1e+38 in size, got scale={scale}")
    ):
        block_attention(*low.arguments, scale=scale)
    with pytest.raises(TypeError, match="scale must be a float, got str"):
        block_attention(*low.arguments, scale="0.25")
    for mine, theirs in zip(low.buffers, before, strict=True):
        assert_same_bits(mine, theirs)


def test_wrong_dtypes_are_named_with_their_values() -> None:
    case = random_case(43, B=1, W=2, H_kv=1, G=1, fp8=True)
    low, window = case.to(torch.float32), case.window
    caches = {"k_scale": low.k_scale, "v_scale": low.v_scale, "scale": 1.0}
    with pytest.raises(TypeError, match="q must be one of .*, got torch.float64"):
        kernel.block_attention(case.q, case.k, case.v, None, None, window, scale=1.0)
    with pytest.raises(TypeError, match="v must have the dtype of q, torch.float64, got torch.float16"):
        reference.block_attention(case.q, case.k, case.v.half(), None, None, window, scale=1.0)
    with pytest.raises(
        TypeError, match="v_cache must have dtype torch.float8_e4m3fn, as there are scales, got torch.float32"
    ):
        kernel.block_attention(low.q, low.k, low.v, low.caches[0], low.caches[1].float(), window, **caches)
    with pytest.raises(TypeError, match="v_scale must be torch.float32, got torch.float16"):
        kernel.block_attention(low.q, low.k, low.v, *low.caches, window, **caches | {"v_scale": low.v_scale.half()})
    with pytest.raises(TypeError, match="sliding_window must be an int or None, got float"):
        kernel.block_attention(low.q, low.k, low.v, *low.caches, window, **caches, sliding_window=2.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(mode="prefix"), ValueError, "mode must be one of full, causal, block, shadow, got mode='prefix'"),
        (dict(q_block=torch.zeros(1, 3).int()), ValueError, r"q_block must have shape \(1, 2\), got \(1, 3\)"),
        (dict(q_block=torch.zeros(1, 2).long()), TypeError, "q_block must be int32, got torch.int64"),
        (dict(page_table=torch.zeros(3).int()), ValueError, r"page_table must be \[R, P\], got shape \(3,\)"),
        (dict(page_table=torch.zeros(3, 2).long()), TypeError, "page_table must be int32, got torch.int64"),
        (
            dict(kept=torch.ones(1, 9)),
            ValueError,
            r"kept must be \[B, S_max\] bool with B=1, got \(1, 9\), torch.float32",
        ),
    ],
)
def test_a_window_refuses_what_does_not_fit(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Window: {message}"):
        dataclasses.replace(random_case(43, B=1, W=2).window, **changes)


def test_the_kernel_says_what_it_needs_instead_of_being_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(47, B=1, W=2, H_kv=1, G=1, cache=False).to(torch.float32)
    arguments = (case.k, case.v, None, None, case.window)
    with pytest.raises(RuntimeError, match="requires_grad"):
        kernel._launch(case.q.clone().requires_grad_(), *arguments, scale=1.0, tile=TOY)
    monkeypatch.setattr(kernel, "_attention_kernel", triton.runtime.JITFunction.__new__(triton.runtime.JITFunction))
    with pytest.raises(RuntimeError, match="needs CUDA tensors, or TRITON_INTERPRET=1"):
        kernel.block_attention(case.q, *arguments, scale=1.0)
    monkeypatch.setattr(kernel, "_attention_kernel", None)
    low = case.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="bfloat16, whose products Triton's interpreter gets wrong"):
        kernel.block_attention(low.q, low.k, low.v, None, None, low.window, scale=1.0)


class Launches:
    """In place of a kernel: counts its launches instead of running them."""

    def __init__(self, name: str, counts: collections.Counter) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid):
        def launch(**arguments) -> None:
            self.counts[self.name] += 1

        return launch


class TorchOps(TorchDispatchMode):
    """Names of the operators that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A view computes nothing.
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> collections.Counter:
    """How often each kernel of the launcher's module would have been launched."""
    counts: collections.Counter = collections.Counter()
    for name, value in list(vars(kernel).items()):
        if isinstance(value, triton.runtime.jit.KernelInterface):
            monkeypatch.setattr(kernel, name, Launches(name, counts))
    return counts


SPLIT_FORM, WITH_COMBINE = {"_attention_kernel": 1}, {"_attention_kernel": 1, "_combine_kernel": 1}
PREFILL = {"_prefill_kernel": 1}


@pytest.mark.usefixtures("without_debug")
@pytest.mark.parametrize(
    ("features", "expected", "allocations"),
    [
        ("no cache", SPLIT_FORM, 1),
        ("cache", SPLIT_FORM, 2),
        ("kept, sliding", SPLIT_FORM, 2),
        ("pages", SPLIT_FORM, 2),
        ("fp8 pages", SPLIT_FORM, 2),
        ("several splits", WITH_COMBINE, 2),
        ("long window", SPLIT_FORM | PREFILL, 1),
        ("long window, several splits", WITH_COMBINE | PREFILL, 2),
        ("everything", WITH_COMBINE | PREFILL, 2),
    ],
)
def test_only_the_stated_launches_and_allocations_are_issued(
    features: str, expected: dict, allocations: int, launches: collections.Counter
) -> None:
    arguments, options = zeros(**FEATURES[features])
    with TorchOps() as ops:
        kernel.block_attention(*arguments, **options)
    assert dict(launches) == expected
    assert ops.names == ["empty"] * allocations


@pytest.mark.parametrize("features", FEATURES)
def test_the_launcher_reads_nothing_on_the_host(features: str, launches: collections.Counter) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        arguments, options = zeros(**FEATURES[features])
        out = kernel._launch(*arguments, **options, tile=TOY)
    assert out.fake_mode is mode and out.shape == arguments[0].shape and launches["_attention_kernel"] == 1


# Bytes of the partial results of one tile of queries of one KV head and batch row: two splits of 16 rows of 16 + 2.
PLACE = 2 * 16 * (16 + 2) * 4


@pytest.mark.parametrize(
    ("places", "pairs"), [(12, 1), (11, 2), (8, 2), (7, 3), (4, 3), (3, 6), (2, 6), (1, 12), (0, 12)]
)
def test_what_does_not_fit_the_workspace_takes_turns_in_it(
    places: int, pairs: int, launches: collections.Counter
) -> None:
    """Two batch rows of two KV heads of three tiles: first tiles take turns, then batch rows, then KV heads."""
    arguments, options = zeros(W=24, capacity=80)
    kernel._launch(*arguments, **options, tile=TOY, workspace_bytes=places * PLACE)
    assert dict(launches) == {"_attention_kernel": pairs, "_combine_kernel": pairs}


def plan_of(
    B: int, H_kv: int, G: int, D: int, *, W: int = 32, S_max: int = 32768, capability: int = 90
) -> kernel._AttentionPlan:
    """How a bfloat16 call of such a shape is launched on a GPU; nothing is allocated."""
    tensors = [torch.empty(B, heads, W, D, dtype=torch.bfloat16, device="meta") for heads in (H_kv * G, H_kv, H_kv)]
    tensors += [torch.empty(1, H_kv, S_max, D, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    lengths = [torch.empty(B, 1, dtype=torch.int32, device="meta") for _ in range(7)]
    given = (*tensors, None, None, *lengths, None, None)
    shape = dict(D=D, dtype=torch.bfloat16)
    tile = kernel.attention_tile(capability, G=G, **shape)
    prefill = kernel.attention_prefill_tile(capability, **shape)
    return kernel._AttentionPlan(given, "full", 1.0, None, tile, prefill, kernel.WORKSPACE_BYTES)


# Batch, KV heads, query heads of each, head dim: LLaDA and Dream, and what no model has.
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((8, 32, 1, 128), 1), ((32, 32, 1, 128), 2), ((64, 4, 7, 128), 4), ((3, 256, 4, 128), 6), ((70000, 1, 1, 64), 36)],
    ids=str,
)
def test_a_workspace_has_at_most_512_mib_and_groups_cover_every_row_once(shape: tuple, groups: int) -> None:
    plan = plan_of(*shape)
    B, H_kv, G, D = shape
    assert 4 * plan.partial_numbers <= kernel.WORKSPACE_BYTES == 2**29
    split_form = [launch for launch in plan.plan.launches if launch.kernel is kernel._attention_kernel]
    combines = [launch for launch in plan.plan.launches if launch.kernel is kernel._combine_kernel]
    assert len(split_form) == len(combines) == groups
    covered: collections.Counter = collections.Counter()
    for launch in split_form:
        assert all(size <= 65535 for size in launch.grid[1:])
        told = launch.values
        grid_heads, grid_rows, splits = launch.grid
        programs = grid_heads * grid_rows * splits
        assert programs * told["BLOCK_M"] <= told["partial_rows"] and splits == 32
        assert told["partial_rows"] * (D + 2) == plan.partial_numbers
        for batch in range(told["first_batch"], told["first_batch"] + grid_rows):
            for head in range(told["first_head"], told["first_head"] + grid_heads // told["num_tiles"]):
                for tile in range(told["first_tile"], told["first_tile"] + told["num_tiles"]):
                    covered[batch, head, tile] += 1
    tiles = -(-32 * G // told["BLOCK_M"])
    assert set(covered.values()) == {1} and len(covered) == B * H_kv * tiles


def test_more_batch_rows_than_a_grid_has_are_several_launches() -> None:
    plan = plan_of(70000, 2, 1, 64, S_max=512)
    assert [launch.grid for launch in plan.plan.launches] == [(2, 65535, 1), (2, 70000 - 65535, 1)]
    assert [launch.values["first_batch"] for launch in plan.plan.launches] == [0, 65535]
    assert plan.partial_numbers == 0


@pytest.mark.parametrize("capability", ATTENTION_TILES)
def test_one_tile_of_one_kv_head_fits_the_workspace_many_times(capability: int) -> None:
    for D in HEAD_DIMS:
        for G, dtype, fp8 in itertools.product((1, 7), (torch.bfloat16, torch.float32), (False, True)):
            tile = kernel.attention_tile(capability, D=D, G=G, dtype=dtype, fp8=fp8)
            assert 32 * tile.MAX_SPLITS * tile.BLOCK_M * (D + 2) * 4 <= kernel.WORKSPACE_BYTES


@pytest.mark.parametrize("fp8", [False, True], ids=["float16", "fp8"])
def test_pages_beyond_2_31_elements_are_addressed(fp8: bool, device: torch.device) -> None:
    """Three pages 2^30 elements apart, so that the last one's offset needs 64 bits. What lies between is never touched,
    nor given."""
    options = dict(B=1, W=5, G=2, H_kv=1, capacity=48, page_size=16, q_lens=(5,), kv_lens=(48,), replaced=((40, 45),))
    case = random_case(3, mode="block", fp8=fp8, **options)
    assert (case.window.kv_slot[case.live] >= 40).any()
    near, far = case.to(torch.float16, device), case.to(torch.float16, device)
    used = sorted(page for page in set(case.window.page_table.flatten().tolist()) if 0 <= page < 10**6)
    assert len(used) == 3
    try:
        buffer = torch.empty(2**31 + 2**21, dtype=near.k_buffer.dtype, device=device)
    except RuntimeError as error:
        pytest.skip(
            f"no {2**31 * near.k_buffer.element_size() / 1e9:.0f} GB of addresses here: {str(error).splitlines()[0]}"
        )
    shape = near.k_buffer.shape
    strides = (2**30, *near.k_buffer.stride()[1:])
    far.k_buffer, far.v_buffer = (buffer.as_strided((3, *shape[1:]), strides, offset) for offset in (0, 2**20))
    for mine, theirs in zip(far.buffers, near.buffers, strict=True):
        mine.copy_(theirs[used] if not fp8 else theirs.view(torch.uint8)[used].view(FP8))
    for new, old in enumerate(used):
        far.window.page_table[near.window.page_table == old] = new
    assert_same_bits(far.kernel(), near.kernel())
    for mine, theirs in zip(far.buffers, near.buffers, strict=True):
        for new, old in enumerate(used):
            assert_same_bits(mine[new], theirs[old])
