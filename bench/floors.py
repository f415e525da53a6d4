"""The least a kernel can do: the bytes that it must move and the operations that it must multiply, computed from the
shape alone. This is arithmetic and needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .shapes import Model


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a piece of work cannot do without. Parts that run one after the other add up, and each part is bound by its
    own ceiling.

    Attributes:
        parts: (bytes moved, operations multiplied) of each part.
    """

    parts: tuple[tuple[float, float], ...]

    @property
    def nbytes(self) -> float:
        return sum(nbytes for nbytes, _ in self.parts)

    @property
    def flops(self) -> float:
        return sum(flops for _, flops in self.parts)

    def floor_us(self, copy_tb_s: float, gemm_tflop_s: float) -> float:
        """Microseconds at these ceilings: for every part the longer of moving and multiplying, added up."""
        return sum(max(nbytes / copy_tb_s / 1e6, flops / gemm_tflop_s / 1e6) for nbytes, flops in self.parts)


def cost(nbytes: float, flops: float = 0.0) -> Cost:
    return Cost(((float(nbytes), float(flops)),))


# Device copy and bf16 product on random data, as one expects of the card: (TB/s, TFLOP/s). Nothing here measured them.
# The two cards have the same multiprocessors and differ in their memory.
CARDS = {"H100": (3.0, 790.0), "H200": (4.3, 790.0)}


def kv_bytes(model: Model, positions: int, itemsize: float = 2) -> float:
    """Keys and values of one layer."""
    return 2 * itemsize * model.kv_heads * model.head_dim * positions


def decode(model: Model, lengths: Sequence[int], window: int | None = None, cache_itemsize: float = 2) -> Cost:
    """A window over cached prefixes: prefixes and the window's q, k, v read; its keys, values and the output
    written."""
    B, W = len(lengths), window or model.window
    moved = (
        kv_bytes(model, sum(lengths), cache_itemsize) + kv_bytes(model, B * W) + kv_bytes(model, B * W, cache_itemsize)
    )
    moved += 2 * 2 * B * W * model.heads * model.head_dim
    return cost(moved, 4 * model.heads * model.head_dim * W * (sum(lengths) + B * W))


def visible_pairs(visibility: str, L: int, block: int) -> int:
    """How many pairs of a query and a key that the query sees there are in one window of L positions without a
    cache."""
    if visibility == "full":
        return L * L
    if visibility == "causal":
        return L * (L + 1) // 2
    blocks, tail = divmod(L, block)
    return block * block * blocks * (blocks + 1) // 2 + tail * L


def prefill(model: Model, L: int) -> Cost:
    """One window of L positions without a cache: q, k, v read and the output written once."""
    moved = 2 * L * model.head_dim * 2 * (model.heads + model.kv_heads)
    return cost(moved, 4 * model.heads * model.head_dim * visible_pairs(model.prefill_visibility, L, model.window))


def confidence(N: int, V: int, itemsize: int, kl: bool = False) -> Cost:
    """N rows of logits, read once; for the divergence from the previous step, that step's rows are read as well."""
    return cost(N * V * itemsize * (1 + kl))


def unmask(B: int, lanes: int) -> Cost:
    """A lane's token is read and written (16 bytes), and its prediction (8) and its score (4) are read."""
    return cost(28 * B * lanes)


def norm(model: Model, N: int, summed: bool) -> Cost:
    """N rows are read and written; with a residual, two of each."""
    return cost(2 * 2 * (1 + summed) * N * model.hidden)


def rotation(model: Model, N: int) -> Cost:
    """Queries and keys of N positions are read and written, and the cos and sin of each position are read."""
    return cost(2 * N * (2 * (model.heads + model.kv_heads) * model.head_dim + 2 * model.rotated))


def swiglu(model: Model, N: int) -> Cost:
    """Two rows are read, and one is written."""
    return cost(2 * 3 * N * model.intermediate)


def matrices(model: Model, layers: int | None = None) -> int:
    """Weights that multiply: projections and MLP of the layers, and the head; a lookup is not a product."""
    D = model.head_dim
    attention = model.hidden * D * (model.heads + 2 * model.kv_heads) + model.heads * D * model.hidden
    layer = attention + 3 * model.hidden * model.intermediate
    return (model.layers if layers is None else layers) * layer + model.vocab * model.hidden


def requests(model: Model, lengths: Sequence[int]) -> Cost:
    """Whole decodes of rows of these lengths: every weight is read once, and every position multiplied once. What its
    steps do beyond that, only the decoder knows."""
    weights = matrices(model)
    return cost(2.0 * weights, 2.0 * weights * sum(lengths))


def step(model: Model, B: int, prefix: int, layers: int | None = None) -> Cost:
    """A denoise step of a dense model: every weight is read, every layer attends, and the logits are written and
    read."""
    count, weights, W = model.layers if layers is None else layers, matrices(model, layers), model.window
    attention = decode(model, [prefix] * B)
    return Cost(
        (
            (2.0 * weights, 2.0 * weights * B * W),
            (count * attention.nbytes, count * attention.flops),
            (2 * 2.0 * B * W * model.vocab, 0.0),
        )
    )
