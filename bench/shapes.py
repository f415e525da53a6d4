"""The shapes that are timed: published models, and toy ones that only exercise the code."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Model:
    """A published architecture, or one kind of its attention layers.

    Attributes:
        family: what `checks.decode.FAMILIES` builds the model of the denoise step from; None = a mixture of experts,
            which has no row of steps, and no `intermediate` here.
        visibility: what the model's decoder lets a position of a window see.
        prefill: the visibility of a window without a cache; "" = the same.
        window: positions that are denoised together.
        reach: cached positions that the layers see at most; None = all.
        soft_cap: the soft cap of the logits; None = none.
        has_head: whether rows of logits are timed for this model (not for a second kind of layers of one model).
        small_ops: whether the norms, the rotation and the activation of its layers are those of `dlm_kernels.layers`.
        head_norms: whether each head is normed before it is rotated.
        rotary: dims of a head that are rotated; None = all.
    """

    name: str
    family: str | None
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
    window: int = 32
    reach: int | None = None
    prefill: str = ""
    soft_cap: float | None = None
    has_head: bool = True
    small_ops: bool = True
    head_norms: bool = False
    rotary: int | None = None

    @property
    def rotated(self) -> int:
        """Dims of a head that are rotated."""
        return self.head_dim if self.rotary is None else self.rotary

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.kv_heads

    @property
    def prefill_visibility(self) -> str:
        return self.prefill or self.visibility

    def prefix(self, positions: int) -> int:
        """How many positions of a prefix the layers see."""
        return positions if self.reach is None else min(positions, self.reach)


LLADA = Model("LLaDA-8B", "llama", "full", 32, 4096, 12288, 32, 32, 128, 126464, 126336, 126081)
DREAM = Model("Dream-7B", "qwen2", "full", 28, 3584, 18944, 28, 4, 128, 152064, 151666, 151643)
SDAR_4B = Model("SDAR-4B", "qwen3", "block", 36, 2560, 9728, 32, 8, 128, 151936, 151669, 151643, head_norms=True)
SDAR_8B = Model("SDAR-8B", "qwen3", "block", 36, 4096, 12288, 32, 8, 128, 151936, 151669, 151643, head_norms=True)
LLADA2_MINI = Model(
    "LLaDA2-mini", None, "block", 20, 2048, 0, 16, 4, 128, 157184, 156895, 156892, head_norms=True, rotary=64
)  # fmt: skip
# This model has no mask token: its canvas starts from random ids. A sliding layer shows each query the last 1,023
# cached positions and the canvas.
DIFFUSION_GEMMA = Model(
    "DiffusionGemma-sliding", None, "full", 25, 2816, 0, 16, 8, 256, 262144, 0, 1,
    window=256, reach=1023, prefill="causal", soft_cap=30.0, small_ops=False,
)  # fmt: skip
DIFFUSION_GEMMA_FULL = dataclasses.replace(
    DIFFUSION_GEMMA, name="DiffusionGemma-full", layers=5, kv_heads=2, head_dim=512, reach=None, has_head=False
)
MODELS = (LLADA, DREAM, SDAR_4B, SDAR_8B, LLADA2_MINI, DIFFUSION_GEMMA, DIFFUSION_GEMMA_FULL)
TOY_MODELS = (Model("toy", "qwen2", "full", 1, 32, 48, 4, 2, 16, 600, 0, 1),)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is timed for every model.

    Attributes:
        decode: (B, prefix) of decode attention with equal lengths.
        ragged: (B, longest prefix) of decode attention with lengths that are spread evenly.
        prefill: lengths of one window without a cache.
        forms: (B, prefix) of the paged, fp8 and shadow forms of attention.
        rows: logits rows of confidence.
        batches: (B, lanes) of unmask.
        unmask_forms: (B, lanes) at which the two forms of unmask run side by side.
        steps: (B, prefix) of the denoise step.
        positions: positions of a call of the small ops of a layer.
        slots: requests of mixed lengths, slots that they go through, and the most new tokens of a request.
        variants: whether the variants of confidence (fp32, more outputs) are timed for every model.
    """

    models: tuple[Model, ...]
    decode: tuple[tuple[int, int], ...]
    ragged: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]
    forms: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    batches: tuple[tuple[int, int], ...]
    unmask_forms: tuple[tuple[int, int], ...]
    steps: tuple[tuple[int, int], ...]
    positions: tuple[int, ...]
    slots: tuple[int, int, int] = (48, 8, 64)
    variants: bool = False


# What fits the eight minutes of gpu-check: three models, and few lengths.
CHECK_SHAPES = Shapes(
    models=(LLADA, DREAM, SDAR_8B),
    decode=((1, 1024), (1, 4096), (1, 32768), (8, 1024), (8, 4096), (32, 1024)),
    ragged=((8, 8192),),
    prefill=(4096,),
    forms=((8, 4096),),
    rows=(32, 256, 1024),
    batches=((1, 32), (8, 32), (128, 32)),
    unmask_forms=((8, 32), (8, 128)),
    steps=((1, 1024), (8, 1024)),
    positions=(32, 256),
)
SWEEP_SHAPES = Shapes(
    models=MODELS,
    decode=((1, 1024), (1, 4096), (1, 32768), (8, 1024), (8, 4096), (8, 32768), (32, 1024), (32, 4096)),
    ragged=((8, 8192), (32, 4096)),
    prefill=(1024, 4096, 16384),
    forms=((1, 4096), (8, 4096), (8, 32768)),
    rows=(32, 128, 256, 1024),
    batches=((1, 32), (8, 32), (32, 32), (128, 32), (8, 256), (8, 2048), (8, 8192)),
    unmask_forms=((1, 32), (8, 32), (128, 32), (1, 128), (8, 128), (128, 128)),
    steps=((1, 1024), (1, 8192), (8, 1024), (32, 1024)),
    positions=(32, 256, 1024, 8192),
    variants=True,
)
TOY_SHAPES = Shapes(
    models=TOY_MODELS,
    decode=((2, 20),),
    ragged=((2, 20),),
    prefill=(40,),
    forms=((2, 20),),
    rows=(4,),
    batches=((2, 32),),
    unmask_forms=((2, 32), (2, 128)),
    steps=((2, 10),),
    positions=(3,),
    slots=(5, 2, 12),
)
