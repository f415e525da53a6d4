"""Heads: small trained networks that decide which positions a step writes, and their files, which are safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import disk
from ..files import CHECKPOINTS, PICKLES, CheckpointError, is_file, is_path, read_bytes
from ..limits import number, shown, whole
from ..ops import check_device

HEADS = CHECKPOINTS / "heads"
SUFFIX = ".safetensors"
# The facts in the metadata of a head's file, all of them as text.
FIELDS = ("kind", "block_length", "width", "accept_threshold", "trained_on", "seed", "step")
MAX_SIZE = 4096  # of a head's block and of its hidden layer
MAX_BYTES = 2**30  # of a head's file; the largest head has some 900 MB


def tree_sum(x: Tensor, dim: int = -1) -> Tensor:
    """The sum over one dimension: the second half is added to the first half until one entry is left.

    All additions are elementwise, so the order of the terms depends on their number only. A matrix product or a
    reduction may add the terms in another order when another number of rows is computed together.
    """
    x = x.movedim(dim, -1)
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = F.pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


class RowLinear(nn.Linear):
    """A linear layer that gives a row the same bits in any batch.

    In training mode the bits do not matter, and the layer is a matrix product.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return tree_sum(x[..., None, :] * self.weight) + self.bias


def probability(logits: Tensor) -> Tensor:
    """1 / (1 + exp(-x)). On a CPU, torch.sigmoid rounds differently at a vector's end than in its middle."""
    return 1 / (1 + torch.exp(-logits))


class Head(nn.Module):
    """A trained head. A subclass defines `logits` and says what its arguments are; `forward` gives sigmoid(logits).

    Attributes:
        block_length: number of positions of the block that the head reads.
        width: size of the hidden layer.
        accept_threshold: the probability above which a position is written, as training chose it.
        trained_on: name of the model that the head was trained on.
        seed: random seed of the training.
        step: number of optimizer steps of the training.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        block_length: int,
        width: int,
        *,
        accept_threshold: float = 0.5,
        trained_on: str = "",
        seed: int = 0,
        step: int = 0,
    ) -> None:
        super().__init__()
        owner = f"{self.kind} head"
        for name, value in (("block_length", block_length), ("width", width)):
            whole(owner, name, value, 1, MAX_SIZE)
        number(owner, "accept_threshold", accept_threshold, 0, 1)
        for name, value in (("seed", seed), ("step", step)):
            whole(owner, name, value, 0, 2**63)
        if not isinstance(trained_on, str):
            raise TypeError(f"{owner}: trained_on must be a text, got trained_on={shown(trained_on)}")
        self.block_length, self.width, self.accept_threshold = block_length, width, accept_threshold
        self.trained_on, self.seed, self.step = trained_on, seed, step

    def logits(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        return probability(self.logits(*inputs))

    @property
    def __name__(self) -> str:
        """How the description of a preset shows the head."""
        return f"{self.kind} head trained on {self.trained_on or 'nothing'}, block_length {self.block_length}"


class FilterHead(Head):
    """Learn2PD's filter: two layers that read a block's confidences.

    confidence [B, block_length] fp32, 0 where nothing is masked -> [B, block_length] logits of "this prediction is
    final". The published filter reads blocks of 32 and is 32 wide. arXiv:2509.25188.
    """

    kind = "filter"

    def __init__(self, block_length: int, width: int = 32, **facts: Any) -> None:
        super().__init__(block_length, width, **facts)
        self.hidden, self.out = RowLinear(block_length, width), RowLinear(width, block_length)

    def logits(self, confidence: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(confidence)))


class CommitHead(Head):
    """One transformer layer that reads a block's confidences and says which positions to write.

    confidence [B, W] fp32, 0 where nothing is masked; masked [B, W] bool; time [B] fp32, the share of the block's steps
    that are over -> [B, W] logits of "write this position", where W is the block length.

    The layer has two attention heads. In the paper the layer is 128 wide and has 300 thousand parameters, beside models
    of 8 billion; the shipped layer is 32 wide and has 9 thousand parameters, beside a model of 0.9 million. After
    Jazbec et al. 2025, arXiv:2512.09106.
    """

    kind = "commit"
    attention_heads: ClassVar[int] = 2
    # -ln(1 - p) of a confidence that fp32 cannot tell from 1; the division by this number scales the feature to [0, 1].
    certain: ClassVar[float] = 24 * math.log(2)

    def __init__(self, block_length: int, width: int = 32, **facts: Any) -> None:
        super().__init__(block_length, width, **facts)
        if width % self.attention_heads:
            raise ValueError(f"commit head: width must be a multiple of {self.attention_heads}, got width={width}")
        self.features, self.position = RowLinear(4, width), nn.Parameter(torch.zeros(block_length, width))
        self.qkv, self.attended = RowLinear(width, 3 * width), RowLinear(width, width)
        self.hidden, self.shrunk = RowLinear(width, 2 * width), RowLinear(2 * width, width)
        self.out = RowLinear(width, 1)

    def logits(self, confidence: Tensor, masked: Tensor, time: Tensor) -> Tensor:
        # Most confidences are close to 1, where the logarithm of 1 - confidence still tells them apart.
        certainty = -torch.log((1 - confidence).clamp(min=2.0**-24)) / self.certain
        features = torch.stack(
            [confidence, certainty, masked.to(confidence.dtype), time[:, None].expand_as(confidence)], -1
        )
        x = self.features(features) + self.position
        x = x + self.attended(self._attention(_normed(x)))
        x = x + self.shrunk(F.relu(self.hidden(_normed(x))))
        return self.out(_normed(x))[..., 0]

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.attention_heads, -1)).unbind(2)  # [B, W, heads, D]
        scores = tree_sum(q[:, :, None] * k[:, None]) / math.sqrt(q.shape[-1])  # [B, query, key, heads]
        weights = torch.exp(scores - scores.amax(2, keepdim=True))
        weights = weights / tree_sum(weights, 2)[:, :, None]
        return tree_sum(weights[..., None] * v[:, None], 2).flatten(2)


def _normed(x: Tensor) -> Tensor:
    """RMS norm without weights."""
    return x / torch.sqrt(tree_sum(x * x) / x.shape[-1] + 1e-5)[..., None]


KINDS: dict[str, type[Head]] = {head.kind: head for head in (FilterHead, CommitHead)}


def shipped() -> list[str]:
    """The names of the heads that come with the package."""
    return sorted(file.name.removesuffix(SUFFIX) for file in HEADS.glob("*" + SUFFIX))


def save_head(head: Head, path: str | Path) -> None:
    """Writes a head to a file.

    The file appears under its name once its content is complete. An earlier file of that name survives until then, and
    survives if the disk refuses (OSError).
    """
    if not isinstance(head, Head):
        raise TypeError(f"save_head: head must be a Head, got head={shown(head)}")
    if not isinstance(path, Path) and not is_path(path):
        raise TypeError(f"save_head: path must name a file, got path={shown(path)}")
    metadata = {name: str(getattr(head, name)) for name in FIELDS}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    with disk.replacing(Path(path)) as partial:
        partial.write_bytes(safetensors.torch.save(tensors, metadata))


def load_head(name_or_path: str | Path, device: torch.device | str | None = None) -> Head:
    """A trained head for the presets "learn2pd" (kind "filter") and "learned-commit" (kind "commit").

    Args:
        name_or_path: the name of a head that comes with the package ("tiny-filter", "tiny-commit"), or a *.safetensors
            file.
        device: where the head goes. Default: "cuda" if there is a GPU, else "cpu".
    Raises:
        CheckpointError: there is no such head; the file is not a head's, or is of an unknown kind; tensors are missing,
            unknown, of another shape or dtype, or not finite.
    """
    # 1. Check the arguments, and find the file.
    known = f"a *{SUFFIX} file or one of {', '.join(shipped()) or 'none is shipped'}"
    if not isinstance(name_or_path, (str, Path)):
        raise TypeError(f"load_head: head must be {known}, got name_or_path={shown(name_or_path)}")
    check_device("load_head", "device", device)
    path = Path(name_or_path)
    if str(name_or_path) in shipped() and not is_file(path):
        path = HEADS / f"{name_or_path}{SUFFIX}"
    if not is_file(path):
        raise CheckpointError(f"load_head: head must be {known}, got {str(name_or_path)!r}")
    if path.suffix in PICKLES:
        raise CheckpointError(f"load_head: {path} is a pickle file, which is never opened; heads are {SUFFIX} files")

    # 2. Read the file, once, so that metadata and tensors are those of one file.
    try:
        content = read_bytes(path, MAX_BYTES)
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"load_head: {path} is not a readable safetensors file, got {error}") from error

    # 3. Build the head that the metadata describe, and check the tensors.
    head = _head_of(path, metadata)
    expected = head.state_dict()
    for what, names in (("missing", set(expected) - set(tensors)), ("unknown", set(tensors) - set(expected))):
        if names:
            raise CheckpointError(f"load_head: {path} has {what} tensors: {sorted(names)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            got, rule = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, expected[name]))
            raise CheckpointError(f"load_head: tensor {name} of {path} must be {rule}, got {got}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"load_head: tensor {name} of {path} must be finite, got NaN or inf")

    # 4. Load.
    head.load_state_dict(tensors)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return head.to(device).eval().requires_grad_(False)


def _head_of(path: Path, metadata: dict[str, str] | None) -> Head:
    """An untrained head of the kind and sizes that a file's metadata names."""
    metadata = metadata or {}
    if set(metadata) != set(FIELDS):
        got = ", ".join(sorted(metadata)) or "none"
        raise CheckpointError(f"load_head: metadata of {path} must be {', '.join(FIELDS)}, got {got}")
    if metadata["kind"] not in KINDS:
        raise CheckpointError(
            f"load_head: kind of {path} must be one of {', '.join(KINDS)}, got kind={metadata['kind']!r}"
        )
    facts: dict[str, Any] = {"trained_on": metadata["trained_on"]}
    for name, kind, low, high in (
        ("block_length", int, 1, MAX_SIZE),
        ("width", int, 1, MAX_SIZE),
        ("accept_threshold", float, 0, 1),
        ("seed", int, 0, 2**63),
        ("step", int, 0, 2**63),
    ):
        try:
            facts[name] = kind(metadata[name])
        except (ValueError, OverflowError):
            facts[name] = math.nan
        if not low <= facts[name] <= high:
            rule = f"must be {kind.__name__} in [{low}, {high}]"
            raise CheckpointError(f"load_head: {name} of {path} {rule}, got {name}={metadata[name]!r}")
    try:
        return KINDS[metadata["kind"]](**facts).float()  # whatever the process-wide default dtype is
    except ValueError as error:
        raise CheckpointError(f"load_head: {path}: {error}") from error
