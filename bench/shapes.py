"""The shapes that are timed: published models, and toy ones that only exercise the code."""

from __future__ import annotations

import dataclasses

WINDOW = 32  # positions denoised together


@dataclasses.dataclass(frozen=True)
class Model:
    """A published architecture; `family` is the transformers class it is loaded into.

    visibility: what its decoder lets a position see.
    """

    name: str
    family: str
    visibility: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    mask_id: int
    eos_id: int

    def kv_bytes(self, positions: int) -> int:
        """Keys and values of one layer, bf16."""
        return 2 * 2 * self.kv_heads * self.head_dim * positions


MODELS = (
    Model("LLaDA-8B", "llama", "full", 32, 4096, 12288, 32, 32, 128, 126464, 126336, 126081),
    Model("Dream-7B", "qwen2", "full", 28, 3584, 18944, 28, 4, 128, 152064, 151666, 151643),
    Model("SDAR-8B", "qwen3", "block", 36, 4096, 12288, 32, 8, 128, 151936, 151669, 151643),
)
TOY_MODELS = (Model("toy", "qwen2", "full", 1, 32, 48, 4, 2, 16, 600, 0, 1),)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is timed for every model.

    Attributes:
        decode: (B, prefix) of decode attention with equal lengths. ragged: (B, longest prefix), lengths spread evenly.
        prefill: lengths of one window without a cache. rows: logits rows of confidence. batches: of unmask and its width.
        steps: (B, prefix) of the denoise step.
    """

    models: tuple[Model, ...]
    decode: tuple[tuple[int, int], ...]
    ragged: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]


GPU_SHAPES = Shapes(
    models=MODELS,
    decode=((1, 1024), (1, 4096), (1, 32768), (8, 1024), (8, 4096), (32, 1024)),
    ragged=((8, 8192),),
    prefill=(4096,),
    rows=(32, 256, 1024),
    batches=(1, 8, 128),
    steps=((1, 1024), (8, 1024)),
)
TOY_SHAPES = Shapes(
    models=TOY_MODELS, decode=((2, 20),), ragged=((2, 20),), prefill=(40,), rows=(4,), batches=(2,), steps=((2, 10),)
)
