"""`block_attention`: the reference against a loop over visible keys, the kernel against the reference, and what may not matter."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dlm_kernels import Window, reference

triton = pytest.importorskip("triton", reason="without Triton, the attention kernel cannot be compared with its reference")
import dlm_kernels.attention as kernel  # noqa: E402

# Boundaries at toy size: key tiles of 16, splits of two tiles.
TOY = kernel.AttentionTile(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1, SPLIT=32)
GUARD = 8


@dataclasses.dataclass
class Case:
    """Arguments of one call. The caches are views of buffers whose margins nobody may touch."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_buffer: Tensor | None
    v_buffer: Tensor | None
    window: Window
    scale: float

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """A copy: caches are written in place. Strides are kept."""
        tensors = (self.q, self.k, self.v, self.k_buffer, self.v_buffer)
        q, k, v, k_buffer, v_buffer = (None if t is None else t.to(device, dtype, copy=True) for t in tensors)
        fields = {f.name: getattr(self.window, f.name) for f in dataclasses.fields(Window)}
        fields = {name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in fields.items()}
        return Case(q, k, v, k_buffer, v_buffer, Window(**fields), self.scale)

    @property
    def caches(self) -> tuple[Tensor | None, Tensor | None]:
        if self.k_buffer is None:
            return None, None
        return self.k_buffer[:, :, GUARD:-GUARD], self.v_buffer[:, :, GUARD:-GUARD]

    def reference(self) -> Tensor:
        return reference.block_attention(self.q, self.k, self.v, *self.caches, self.window, scale=self.scale)

    def kernel(self, tile: kernel.AttentionTile = TOY, **private) -> Tensor:
        with poisoned_empty():
            return kernel._launch(self.q, self.k, self.v, *self.caches, self.window, scale=self.scale, tile=tile, **private)


def random_case(
    seed: int,
    *,
    B: int | None = None,
    W: int | None = None,
    H_kv: int | None = None,
    G: int | None = None,
    D: int = 16,
    mode: str | None = None,
    cache: bool | None = None,
    SPLIT: int = TOY.SPLIT,
    capacity: int = 80,
) -> Case:
    """A ragged batch in float64 (values exact in float16) where everything that must not be read is NaN or infinite."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    B = B or rng.choice((1, 2, 3))
    W = W or rng.choice((1, 3, 8, 15, 16, 17, 20))
    H_kv = H_kv or rng.choice((1, 2))
    G = G or rng.choice((1, 2, 4, 7))
    mode = mode or rng.choice(("full", "causal", "block"))
    cache = rng.random() < 0.8 if cache is None else cache
    R = B + 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().double()

    # q, k, v as Hugging Face hands them over: transposed views of [B, W, H, D].
    q = normal(B, W, H_kv * G, D).transpose(1, 2)
    k, v = (normal(B, W, H_kv, D).transpose(1, 2) for _ in range(2))
    k_buffer, v_buffer = (torch.full((R, H_kv, capacity + 2 * GUARD, D), math.nan, dtype=torch.float64) for _ in range(2))
    columns = {name: torch.full((B, W), -1, dtype=torch.int32) for name in ("q_block", "kv_slot")}
    columns["q_pos"] = torch.zeros(B, W, dtype=torch.int32)
    q_len, kv_len = (torch.zeros(B, dtype=torch.int32) for _ in range(2))
    replaced = torch.zeros(B, 2, dtype=torch.int32)
    cache_row = torch.tensor(rng.sample(range(R), B), dtype=torch.int32)
    for b in range(B):
        q_len[b] = rng.choice((0, W, W, rng.randint(1, W)))
        lengths = [0, 1, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 1, rng.randint(0, capacity)]
        kv_len[b] = min(rng.choice(lengths), capacity)
        if rng.random() < 0.4 and kv_len[b] > 0:
            start = rng.randrange(int(kv_len[b]))
            replaced[b] = torch.tensor([start, min(start + rng.randint(1, W + 4), capacity)])
        hidden_slots = [s for s in range(capacity) if s >= kv_len[b] or replaced[b, 0] <= s < replaced[b, 1]]
        for s in set(range(capacity)) - set(hidden_slots):
            k_buffer[cache_row[b], :, GUARD + s], v_buffer[cache_row[b], :, GUARD + s] = normal(H_kv, D), normal(H_kv, D)
        rng.shuffle(hidden_slots)

        block_length, prompt = rng.choice((1, 4, 5)), rng.randint(0, 9)
        position = list(range(rng.randint(0, 40), 100))[:W]
        if rng.random() < 0.2:
            rng.shuffle(position)
        relative = rng.random() < 0.5
        padding = rng.choice((0, 0, 1, W // 2))
        for j in range(W):
            p = position[j]
            columns["q_pos"][b, j] = p
            dead = j < padding or rng.random() < 0.05
            if not dead:
                columns["q_block"][b, j] = max(0, (p - prompt) // block_length + 1) if relative else p // block_length
            # Dead and out-of-window positions may carry a slot: it must be ignored.
            if hidden_slots and rng.random() < 0.7:
                columns["kv_slot"][b, j] = hidden_slots.pop()
            if dead or j >= q_len[b]:
                # Infinity times zero is NaN too, and shows if it is stored over the NaN of a hidden slot.
                q[b, :, j], k[b, :, j], v[b, :, j] = math.nan, math.inf, math.inf
    window = Window(q_len=q_len, kv_len=kv_len, replaced=replaced, cache_row=cache_row, mode=mode, **columns)
    return Case(q, k, v, k_buffer if cache else None, v_buffer if cache else None, window, rng.choice((D**-0.5, 0.3)))


# Every grouping and padded head dim, window widths off by one from the tile, with and without a cache.
SHAPES = [
    dict(D=16, G=1, W=17, mode="full", H_kv=2),
    dict(D=32, G=4, W=16, mode="causal", B=2, H_kv=1),
    dict(D=80, G=7, W=15, mode="block", B=2, H_kv=1),
    dict(D=128, G=1, W=33, mode="causal", B=2, H_kv=1),
    dict(D=32, G=7, W=17, mode="block", B=2, H_kv=1),
    dict(D=48, G=3, W=5, mode="full", H_kv=1),
    dict(D=16, G=7, W=17, mode="causal", H_kv=1, cache=False),
    dict(D=32, G=1, W=33, mode="block", H_kv=2, cache=False),
    dict(D=16, G=5, W=1, mode="full", cache=False),
    dict(D=256, G=2, W=3, B=1, H_kv=1, cache=True),
    dict(D=512, G=1, W=2, B=1, H_kv=1, cache=True),
]
SHAPES = [shape if "cache" in shape else {**shape, "cache": True} for shape in SHAPES]


def name_of(shape: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, fresh tensors are NaN between two guard zones; leaving checks that no guard was overwritten."""
    real, buffers = torch.empty, []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        n = math.prod(shape)
        buffers.append(torch.full((n + 2 * GUARD,), math.nan, dtype=dtype, device=device))
        return buffers[-1][GUARD : GUARD + n].view(shape)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = real
    assert all(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all() for buffer in buffers)


def by_the_loop(case: Case) -> Tensor:
    """Window's docstring, read aloud: for each live query, a list of the keys that it sees, then a softmax over the list."""
    B, H, W, D = case.q.shape
    H_kv = case.k.shape[1]
    out = torch.zeros(B, H, W, D, dtype=torch.float64)
    k_cache, v_cache = case.caches
    w = {f.name: getattr(case.window, f.name) for f in dataclasses.fields(Window)}
    w = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in w.items()}
    for b in range(B):
        position, block, (replaced_start, replaced_end) = w["q_pos"][b], w["q_block"][b], w["replaced"][b]
        live = [j for j in range(W) if j < w["q_len"][b] and block[j] >= 0]
        slots = []
        if k_cache is not None:
            slots = [s for s in range(w["kv_len"][b]) if not replaced_start <= s < replaced_end]
        for i in live:
            seen = {
                "full": live,
                "causal": [j for j in live if position[j] <= position[i]],
                "block": [j for j in live if block[j] <= block[i]],
            }[w["mode"]]
            for g in range(H_kv):
                keys, values = list(case.k[b, g, seen]), list(case.v[b, g, seen])
                if slots:
                    keys += list(k_cache[w["cache_row"][b], g, slots])
                    values += list(v_cache[w["cache_row"][b], g, slots])
                for h in range(g * H // H_kv, (g + 1) * H // H_kv):
                    scores = [case.scale * dot for dot in (torch.stack(keys) @ case.q[b, h, i]).tolist()]
                    top = max(scores)
                    weights = [math.exp(score - top) for score in scores]
                    out[b, h, i] = torch.tensor(weights, dtype=torch.float64) @ torch.stack(values) / math.fsum(weights)
    return out


def stored_by_the_loop(case: Case) -> tuple[Tensor, Tensor]:
    """The cache buffers after the call."""
    w = case.window
    buffers = case.k_buffer.clone(), case.v_buffer.clone()
    for b, j in ((b, j) for b in range(w.shape[0]) for j in range(int(w.q_len[b]))):
        if w.q_block[b, j] >= 0 and w.kv_slot[b, j] >= 0:
            for buffer, new in zip(buffers, (case.k, case.v), strict=True):
                buffer[w.cache_row[b], :, GUARD + w.kv_slot[b, j]] = new[b, :, j]
    return buffers


def in_a_wider_bucket(case: Case) -> Case:
    """The same rows in a bucket 32 wider and caches 32 longer, all of it dead and NaN."""

    def widen(tensor: Tensor, dim: int, value: float) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] += 32
        wide = tensor.new_full(shape, value)
        wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        return wide

    new = (widen(tensor, 2, math.nan) for tensor in (case.q, case.k, case.v))
    buffers = (widen(tensor, 2, math.nan) for tensor in (case.k_buffer, case.v_buffer))
    columns = {name: widen(getattr(case.window, name), 1, 3) for name in ("q_pos", "q_block", "kv_slot")}
    return Case(*new, *buffers, dataclasses.replace(case.window, **columns), case.scale)


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """Equal, NaN equal to NaN."""
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def assert_no_worse_than_torch(ours: Tensor, low_precision: Tensor, exact: Tensor, factor: float = 2, floor: float = 1e-6) -> None:
    """Our largest error against float64 is at most `factor` times that of the reference in the same dtype."""
    theirs = (low_precision.double().cpu() - exact).abs().max().item()
    error = (ours.double().cpu() - exact).abs().max().item()
    bound = factor * theirs + floor * max(1.0, exact.abs().max().item())
    assert error <= bound, f"error {error:.3g} exceeds {factor} x torch's own {theirs:.3g} (+ floor): {bound:.3g}"


def check_against_the_loop(case: Case, dtype: torch.dtype, device: torch.device, tile: kernel.AttentionTile = TOY) -> None:
    """The kernel's output within the error bound and its stores exact; also what the campaign runs."""
    ours, low = case.to(dtype, device), case.to(dtype)
    out = ours.kernel(tile)
    assert out.shape == case.q.shape and out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert_no_worse_than_torch(out, low.reference(), by_the_loop(case))
    if case.k_buffer is not None:
        for mine, expected in zip((ours.k_buffer, ours.v_buffer), stored_by_the_loop(case), strict=True):
            assert_same_bits(mine.double().cpu(), expected)


def two_keys() -> Case:
    """One query of norm 1 at position 5; cached key 0 scores 0 and carries value 8, the query's own key scores ln 3, value 16."""
    q, k, v, k_buffer, v_buffer = (torch.zeros(1, 1, n, 16, dtype=torch.float64) for n in (1, 1, 1, 2 + 2 * GUARD, 2 + 2 * GUARD))
    q[..., 0], k[..., 0], v[..., 3], v_buffer[0, 0, GUARD, 3] = 1.0, math.log(3.0), 16.0, 8.0
    ints = {name: torch.tensor([[value]], dtype=torch.int32) for name, value in (("q_pos", 5), ("q_block", 1), ("kv_slot", 1))}
    lens = {name: torch.tensor([value], dtype=torch.int32) for name, value in (("q_len", 1), ("kv_len", 1), ("cache_row", 0))}
    return Case(q, k, v, k_buffer, v_buffer, Window(replaced=torch.zeros(1, 2, dtype=torch.int32), mode="full", **ints, **lens), 1.0)


@pytest.mark.parametrize("op", ["reference", "kernel"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 8 * 0.25 + 16 * 0.75),
        ({"kv_len": torch.tensor([0])}, 16.0),
        ({"replaced": torch.tensor([[0, 1]])}, 16.0),
        ({"q_len": torch.tensor([0])}, 0.0),
        ({"q_block": torch.tensor([[-1]])}, 0.0),
        ({"mode": "causal"}, 14.0),
    ],
    ids=["both keys", "no prefix", "slot replaced", "row sits out", "dead query", "causal sees itself and the cache"],
)
def test_two_keys_by_hand(op: str, change: dict, expected: float, device: torch.device) -> None:
    case = two_keys().to(torch.float32, device)
    change = {name: value.int().to(device) if isinstance(value, Tensor) else value for name, value in change.items()}
    case.window = dataclasses.replace(case.window, **change)
    out = getattr(case, op)()
    assert out[0, 0, 0, 3].item() == pytest.approx(expected, abs=1e-5)
    assert out.sum().item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(16))
def test_reference_is_a_softmax_over_the_visible_keys(seed: int) -> None:
    case = random_case(seed)
    run = case.to(torch.float64)
    torch.testing.assert_close(run.reference(), by_the_loop(case), rtol=1e-12, atol=1e-13)
    if case.k_buffer is not None:
        for mine, expected in zip((run.k_buffer, run.v_buffer), stored_by_the_loop(case), strict=True):
            assert_same_bits(mine, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_kernel_is_no_worse_than_the_reference_and_stores_exactly(shape: dict, device: torch.device) -> None:
    check_against_the_loop(random_case(3, **shape), torch.float32, device)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[7], SHAPES[9]], ids=name_of)
def test_kernel_is_no_worse_than_the_reference_in_half_precision(shape: dict, device: torch.device) -> None:
    check_against_the_loop(random_case(5, **shape), torch.float16, device)


@pytest.mark.parametrize("seed", range(100, 105))
def test_kernel_equals_the_loop_on_random_ragged_batches(seed: int, device: torch.device) -> None:
    check_against_the_loop(random_case(seed), torch.float32, device)


@pytest.mark.campaign
def test_kernel_equals_the_loop_on_thousands_of_batches(device: torch.device) -> None:
    for seed in range(1000, 3000):
        D, dtype = random.Random(seed).choice(((16, torch.float32), (32, torch.float16), (80, torch.float32), (128, torch.float16)))
        check_against_the_loop(random_case(seed, D=D), dtype, device)


@pytest.mark.parametrize("kv_len", [0, 1, 31, 32, 33, 63, 64, 65, 80])
def test_prefix_lengths_around_split_boundaries(kv_len: int, device: torch.device) -> None:
    case = random_case(7, B=1, W=3, G=2, H_kv=1, cache=True, mode="block")
    case.k_buffer.nan_to_num_(0.5), case.v_buffer.nan_to_num_(-2.0)
    case.window = dataclasses.replace(
        case.window,
        q_len=torch.full((1,), 3, dtype=torch.int32),
        kv_len=torch.full((1,), kv_len, dtype=torch.int32),
        kv_slot=torch.full((1, 3), -1, dtype=torch.int32),
        q_block=torch.tensor([[0, 1, 0]], dtype=torch.int32),
        replaced=torch.tensor([[30, 34]], dtype=torch.int32),
    )
    for new in (case.q, case.k, case.v):
        new.nan_to_num_(1.0, posinf=1.0)
    check_against_the_loop(case, torch.float32, device)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5], SHAPES[7]], ids=name_of)
def test_row_alone_equals_row_in_batch(shape: dict, device: torch.device) -> None:
    case = random_case(11, **{**shape, "B": 3}).to(torch.float32, device)
    batch = case.kernel()
    for b in range(3):
        fields = {f.name: getattr(case.window, f.name) for f in dataclasses.fields(Window)}
        alone = {name: value[b : b + 1] if isinstance(value, Tensor) else value for name, value in fields.items()}
        new = (tensor[b : b + 1] for tensor in (case.q, case.k, case.v))
        # The caches already hold what this row stores: storing it again changes nothing.
        row = Case(*new, case.k_buffer, case.v_buffer, Window(**alone), case.scale)
        assert_same_bits(row.kernel()[0], batch[b])


@pytest.mark.parametrize("tile", [TOY, dataclasses.replace(TOY, BLOCK_M=64)], ids=["BLOCK_M=16", "BLOCK_M=64"])
@pytest.mark.parametrize("G", [1, 7])
def test_neither_bucket_width_nor_capacity_changes_a_bit(G: int, tile: kernel.AttentionTile, device: torch.device) -> None:
    case = random_case(13, B=2, W=17, H_kv=1, G=G, mode="block", cache=True).to(torch.float32, device)
    wide = in_a_wider_bucket(case).kernel(tile)
    assert_same_bits(wide[:, :, :17], case.kernel(tile))
    assert not wide[:, :, 17:].any()


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_a_long_window_in_groups_of_tiles_has_the_same_bits(mode: str, device: torch.device) -> None:
    case = random_case(17, B=1, W=17, G=3, H_kv=2, mode=mode, cache=True).to(torch.float32, device)
    at_once, grouped = case.to(torch.float32, device), case.to(torch.float32, device)
    assert_same_bits(grouped.kernel(workspace_bytes=0), at_once.kernel())
    assert_same_bits(grouped.k_buffer, at_once.k_buffer)


@pytest.mark.parametrize("op", ["reference", "kernel"])
def test_a_row_does_not_see_its_neighbours(op: str, device: torch.device) -> None:
    case = random_case(19, B=3, W=17, H_kv=1, G=2, mode="block", cache=True).to(torch.float32, device)
    changed = case.to(torch.float32, device)
    for tensor in (changed.q, changed.k, changed.v):
        tensor[1:] = torch.randn_like(tensor[1:])
    mine = int(case.window.cache_row[0])
    for buffer in (changed.k_buffer, changed.v_buffer):
        others = [row for row in range(buffer.shape[0]) if row != mine]
        buffer[others] = torch.randn_like(buffer[others])
    changed.window.kv_len[1:] = 80
    changed.window.kv_slot[1:] = -1
    assert_same_bits(getattr(changed, op)()[0], getattr(case, op)()[0])


@pytest.mark.parametrize("op", ["reference", "kernel"])
def test_which_cache_row_holds_a_row_does_not_matter(op: str, device: torch.device) -> None:
    case = random_case(23, B=3, H_kv=2, W=9, cache=True, G=2).to(torch.float32, device)
    moved = case.to(torch.float32, device)
    moved.k_buffer, moved.v_buffer = moved.k_buffer.roll(1, 0), moved.v_buffer.roll(1, 0)
    moved.window.cache_row.add_(1).remainder_(moved.k_buffer.shape[0])
    assert_same_bits(getattr(moved, op)(), getattr(case, op)())
    assert_same_bits(moved.k_buffer, case.k_buffer.roll(1, 0))


def test_query_tile_height_does_not_change_a_result_beyond_rounding(device: torch.device) -> None:
    # Bits may differ (numpy multiplies differently by shape), which is why no tile depends on the bucket.
    case = random_case(29, B=1, W=17, H_kv=1, G=4, mode="block", cache=True)
    exact = by_the_loop(case)
    for BLOCK_M in (16, 64):
        out = case.to(torch.float32, device).kernel(dataclasses.replace(TOY, BLOCK_M=BLOCK_M))
        torch.testing.assert_close(out.double().cpu(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kv_len", [511, 513])
def test_the_public_launcher_splits_at_its_own_tile_sizes(kv_len: int, device: torch.device) -> None:
    case = random_case(31, B=1, W=33, H_kv=1, G=4, D=32, mode="causal", cache=True, capacity=600, SPLIT=kv_len)
    case.window.kv_len.fill_(kv_len), case.window.kv_slot.fill_(-1)
    case.k_buffer.nan_to_num_(0.25), case.v_buffer.nan_to_num_(1.0)
    ours = case.to(torch.float32, device)
    out = kernel.block_attention(ours.q, ours.k, ours.v, *ours.caches, ours.window, scale=case.scale)
    exact = case.to(torch.float64).reference()
    assert_no_worse_than_torch(out, case.to(torch.float32).reference(), exact)


def test_the_tile_of_a_model_reaches_every_head_dim() -> None:
    for D in (*range(16, 257, 16), 512):
        for capability in (80, 86, 89, 90, 100, 120):
            tile = kernel.attention_tile(capability, D=D, G=1, dtype=torch.bfloat16)
            assert tile.SPLIT % tile.BLOCK_N == 0


@pytest.mark.parametrize("cache", [True, False])
def test_reference_reads_nothing_on_the_host(cache: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        ints = {name: torch.zeros(2, 5, dtype=torch.int32) for name in ("q_pos", "q_block", "kv_slot")}
        lens = {name: torch.zeros(2, dtype=torch.int32) for name in ("q_len", "kv_len", "cache_row")}
        window = Window(replaced=torch.zeros(2, 2, dtype=torch.int32), mode="block", **ints, **lens)
        q, k = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 5, 16)
        caches = (torch.zeros(3, 2, 9, 16), torch.zeros(3, 2, 9, 16)) if cache else (None, None)
        out = reference.block_attention(q, k, k, *caches, window, scale=1.0)
    assert out.fake_mode is mode and out.shape == (2, 4, 5, 16)


@pytest.mark.parametrize("B, W", [(0, 4), (2, 0)])
@pytest.mark.parametrize("op", ["reference", "kernel"])
def test_an_empty_batch_returns_before_launching(B: int, W: int, op: str, device: torch.device) -> None:
    ints = {name: torch.zeros(B, W, dtype=torch.int32, device=device) for name in ("q_pos", "q_block", "kv_slot")}
    lens = {name: torch.zeros(B, dtype=torch.int32, device=device) for name in ("q_len", "kv_len", "cache_row")}
    window = Window(replaced=torch.zeros(B, 2, dtype=torch.int32, device=device), mode="full", **ints, **lens)
    q, cache = torch.zeros(B, 2, W, 16, device=device), torch.zeros(1, 2, 8, 16, device=device)
    block_attention = reference.block_attention if op == "reference" else kernel.block_attention
    assert block_attention(q, q, q, cache, cache.clone(), window, scale=1.0).shape == (B, 2, W, 16)


BAD = {
    "q must be [B, H, W, D], got shape (2, 17, 32)": lambda a: a.update(q=torch.zeros(2, 17, 32)),
    "k must be [B, H_kv, W, D] with B=2, W=17, D=32": lambda a: a.update(k=torch.zeros(2, 2, 16, 32)),
    "v must have the shape of k (2, 2, 17, 32), got (2, 1, 17, 32)": lambda a: a.update(v=torch.zeros(2, 1, 17, 32)),
    "H must be a multiple of H_kv, got H=3, H_kv=2": lambda a: a.update(q=torch.zeros(2, 3, 17, 32)),
    "k_cache and v_cache must be given together, got only k_cache": lambda a: a.update(v_cache=None),
    "window must describe [B, W]=[2, 16] of q, got [2, 17]": lambda a: a.update({n: torch.zeros(2, 2, 16, 32) for n in "qkv"}),
    "k_cache must be [R, H_kv, S_max, D] with H_kv=2, D=32, got (4, 1, 80, 32)": lambda a: a.update(
        k_cache=torch.zeros(4, 1, 80, 32), v_cache=torch.zeros(4, 1, 80, 32)
    ),
    "v_cache must have the shape of k_cache": lambda a: a.update(v_cache=torch.zeros(4, 2, 79, 32)),
    "q must have last stride 1": lambda a: a.update(q=torch.zeros(2, 2, 32, 17).transpose(2, 3)),
    "window.kv_slot must be contiguous, got strides (34, 2)": lambda a: a.update(
        window=dataclasses.replace(a["window"], kv_slot=torch.zeros(2, 34, dtype=torch.int32)[:, ::2])
    ),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("block_attention", [reference.block_attention, kernel.block_attention], ids=["reference", "kernel"])
def test_wrong_shapes_are_named_with_their_values(message: str, block_attention) -> None:
    case = random_case(37, B=2, W=17, H_kv=2, G=1, D=32, cache=True).to(torch.float32)
    arguments = dict(zip(("q", "k", "v", "k_cache", "v_cache", "window"), (case.q, case.k, case.v, *case.caches, case.window), strict=True))
    BAD[message](arguments)
    with pytest.raises(ValueError) as error:
        block_attention(**arguments, scale=1.0)
    assert f"block_attention: {message}" in str(error.value)


@pytest.mark.parametrize("D", [8, 40, 272, 1024])
def test_other_head_dims_are_refused(D: int) -> None:
    case = random_case(41, B=1, W=2, H_kv=1, G=1, D=D, cache=False).to(torch.float32)
    with pytest.raises(ValueError, match=f"D must be a multiple of 16 up to 256, or 512, got D={D}"):
        case.reference()


def test_wrong_dtypes_are_named_with_their_values() -> None:
    case = random_case(43, B=1, W=2, H_kv=1, G=1, cache=False)
    with pytest.raises(TypeError, match="q must be one of .*, got torch.float64"):
        kernel.block_attention(case.q, case.k, case.v, None, None, case.window, scale=1.0)
    with pytest.raises(TypeError, match="v must have the dtype of q, torch.float64, got torch.float16"):
        reference.block_attention(case.q, case.k, case.v.half(), None, None, case.window, scale=1.0)


def test_the_kernel_says_what_it_needs_instead_of_being_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(47, B=1, W=2, H_kv=1, G=1, cache=False).to(torch.float32)
    arguments = (case.k, case.v, None, None, case.window)
    with pytest.raises(RuntimeError, match="requires_grad"):
        kernel._launch(case.q.clone().requires_grad_(), *arguments, scale=1.0, tile=TOY)
    monkeypatch.setattr(kernel, "_attention_kernel", triton.runtime.JITFunction.__new__(triton.runtime.JITFunction))
    with pytest.raises(RuntimeError, match="needs a CUDA GPU, or TRITON_INTERPRET=1"):
        kernel.block_attention(case.q, *arguments, scale=1.0)
    monkeypatch.setattr(kernel, "_attention_kernel", None)
    low = case.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="bfloat16, whose products Triton's interpreter gets wrong"):
        kernel.block_attention(low.q, low.k, low.v, None, None, low.window, scale=1.0)


SHIPPED = [(64, 1), (128, 1), (128, 4), (128, 7), (256, 2), (512, 1)]


def shipped_case(D: int, G: int, dtype: torch.dtype, device: torch.device) -> tuple[Case, kernel.AttentionTile]:
    case = random_case(53, B=3, W=33, H_kv=2, G=G, D=D, mode="block", cache=True, SPLIT=512, capacity=1100)
    major, minor = torch.cuda.get_device_capability(device)
    return case.to(dtype).to(torch.float64), kernel.attention_tile(10 * major + minor, D=D, G=G, dtype=dtype)


@pytest.mark.gpu("with the tiles as shipped, bfloat16 and float16 on tensor cores are within the error bound")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, G", SHIPPED)
def test_shipped_tiles_on_a_gpu(D: int, G: int, dtype: torch.dtype, device: torch.device) -> None:
    case, tile = shipped_case(D, G, dtype, device)
    check_against_the_loop(case, dtype, device, tile)


@pytest.mark.gpu("on tensor cores too, neither the bucket nor the capacity changes a bit of a row")
@pytest.mark.parametrize("D, G", SHIPPED)
def test_shipped_tiles_are_row_invariant_on_a_gpu(D: int, G: int, device: torch.device) -> None:
    case, tile = shipped_case(D, G, torch.bfloat16, device)
    case = case.to(torch.bfloat16, device)
    assert_same_bits(in_a_wider_bucket(case).kernel(tile)[:, :, :33], case.kernel(tile))
