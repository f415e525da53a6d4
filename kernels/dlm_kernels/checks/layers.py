"""What the small ops of a layer accept: checked by their references and by the kernels' launchers, without reading an
element."""

from __future__ import annotations

import torch
from torch import Tensor, dtype

from .named import check_of, shown

# What the kernels hold in registers: a row that is normed, and a head.
MAX_ROW, MAX_HEAD_DIM = 16384, 512
# What the kernels add to the mean is a float32, and what they take the root of is a normal one.
MIN_EPS, MAX_EPS = 1e-30, 1e38


@check_of("rms_norm")
def check_rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtypes: tuple[dtype, ...], largest: int | None = None
) -> None:
    """Raises unless `rms_norm` can take these.

    Args:
        dtypes: those that x may have.
        largest: the length that a row may have; None: any.
    """
    _check_norm("rms_norm", {"x": x}, weight, eps, dtypes, largest)


@check_of("add_rms_norm")
def check_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtypes: tuple[dtype, ...], largest: int | None = None
) -> None:
    """Raises unless `add_rms_norm` can take these; dtypes and largest are those of `check_rms_norm`."""
    _check_norm("add_rms_norm", {"x": x, "residual": residual}, weight, eps, dtypes, largest)


@check_of("qk_norm_rope")
def check_qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float | None,
    q_scale: Tensor | None,
    dtypes: tuple[dtype, ...],
    largest: int | None = None,
) -> None:
    """Raises unless `qk_norm_rope` can take these; `largest` is that of D, None: any."""
    op = "qk_norm_rope"
    # 1. Shapes.
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be [B, W, H, D], got shape {tuple(q.shape)}")
    B, W, _, D = q.shape
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (B, W, D):
        raise ValueError(f"{op}: k must be [B, W, H_kv, D] with B={B}, W={W}, D={D} of q, got shape {tuple(k.shape)}")
    _check_length(op, "D", D, "dim 3 of q", largest)
    if cos.dim() != 3 or tuple(cos.shape[:2]) not in ((B, W), (1, W)):
        raise ValueError(f"{op}: cos must be [B, W, R] or [1, W, R] with B={B}, W={W}, got shape {tuple(cos.shape)}")
    R = cos.shape[2]
    if R % 2 or not 2 <= R <= D:
        raise ValueError(f"{op}: R must be even, at least 2 and at most D={D}, got R={R} (dim 2 of cos)")
    if sin.shape != cos.shape:
        raise ValueError(f"{op}: sin must have the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if q_scale is not None and tuple(q_scale.shape) not in ((B, W), (1, W)):
        raise ValueError(f"{op}: q_scale must be [B, W] or [1, W] with B={B}, W={W}, got shape {tuple(q_scale.shape)}")

    # 2. The norm of heads: both weights and eps, or none of them.
    given = {"q_weight": q_weight, "k_weight": k_weight, "eps": eps}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        present = ", ".join(name for name in given if name not in missing)
        raise ValueError(f"{op}: {', '.join(given)} must be given together, got {present} without {', '.join(missing)}")
    if eps is not None:
        _check_eps(op, eps)

    # 3. Dtypes, devices and strides.
    optional = {"q_weight": q_weight, "k_weight": k_weight, "q_scale": q_scale}
    optional = {name: tensor for name, tensor in optional.items() if tensor is not None}
    _check_tensors(op, dtypes, q=q, k=k, cos=cos, sin=sin, **optional)
    if q_weight is not None:
        _check_weight(op, "q_weight", q_weight, "D", D)
        _check_weight(op, "k_weight", k_weight, "D", D)
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        _check_last_stride(op, name, tensor)


@check_of("swiglu")
def check_swiglu(gate: Tensor, up: Tensor, dtypes: tuple[dtype, ...]) -> None:
    """Raises unless `swiglu` can take these."""
    if gate.dim() < 1:
        raise ValueError(f"swiglu: gate must be [..., I], got shape {tuple(gate.shape)}")
    if up.shape != gate.shape:
        raise ValueError(f"swiglu: up must have the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}")
    _check_tensors("swiglu", dtypes, gate=gate, up=up)
    for name, tensor in (("gate", gate), ("up", up)):
        _check_last_stride("swiglu", name, tensor)
        _check_rows("swiglu", name, tensor)


def row_stride(tensor: Tensor) -> int | None:
    """Elements from a row [..., d] to the next one; None where no single stride leads from row to row."""
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    stride, span = tensor.shape[-1], 1
    # From the last dimension to the first; a dimension of one row leads nowhere.
    for size, step in zip(reversed(sizes), reversed(strides)):
        if size == 1:
            continue
        if span == 1:
            stride = step
        elif step != stride * span:
            return None
        span *= size
    return stride


def _check_norm(
    op: str,
    rows: dict[str, Tensor],
    weight: Tensor,
    eps: float,
    dtypes: tuple[dtype, ...],
    largest: int | None,
) -> None:
    x = rows["x"]
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., d], got shape {tuple(x.shape)}")
    _check_length(op, "d", x.shape[-1], "the last dimension of x", largest)
    for name, tensor in rows.items():
        if tensor.shape != x.shape:
            raise ValueError(f"{op}: {name} must have the shape of x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    _check_eps(op, eps)
    _check_tensors(op, dtypes, **rows, weight=weight)
    _check_weight(op, "weight", weight, "d", x.shape[-1])
    for name, tensor in rows.items():
        _check_last_stride(op, name, tensor)
        _check_rows(op, name, tensor)


def _check_length(op: str, letter: str, length: int, place: str, largest: int | None) -> None:
    if length < 1:
        raise ValueError(f"{op}: {letter} must be at least 1, got {letter}={length} ({place})")
    if largest is not None and length > largest:
        raise ValueError(f"{op}: {letter} must be at most {largest}, got {letter}={length} ({place})")


def _check_eps(op: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not MIN_EPS <= eps <= MAX_EPS:
        raise ValueError(f"{op}: eps must be in [{MIN_EPS:g}, {MAX_EPS:g}], got eps={shown(eps)}")


def _check_tensors(op: str, dtypes: tuple[dtype, ...], **tensors: Tensor) -> None:
    """Raises unless the first tensor has one of the dtypes, and all of them its dtype and device."""
    name, first = next(iter(tensors.items()))
    if first.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be one of {', '.join(map(str, dtypes))}, got {first.dtype}")
    for other, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {other} must have the dtype of {name}, {first.dtype}, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{op}: {other} must be a dense tensor, got {tensor.layout}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {other} must be on {first.device} like {name}, got {tensor.device}")


def _check_weight(op: str, name: str, weight: Tensor, letter: str, length: int) -> None:
    if tuple(weight.shape) != (length,):
        raise ValueError(
            f"{op}: {name} must have shape [{letter}] with {letter}={length}, got shape {tuple(weight.shape)}"
        )
    _check_last_stride(op, name, weight)


def _check_last_stride(op: str, name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: {name} must have last stride 1, got strides {tensor.stride()}")


def _check_rows(op: str, name: str, tensor: Tensor) -> None:
    if tensor.numel() and row_stride(tensor) is None:
        raise ValueError(
            f"{op}: the rows of {name} must lie at one stride, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}"
        )
