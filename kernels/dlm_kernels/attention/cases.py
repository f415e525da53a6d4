"""The configurations of `block_attention` that must compile: every tile of the table, every variant of the kernels."""

from __future__ import annotations

import dataclasses

import torch
import triton

from ..static import CompileCase
from ..tiles import ATTENTION_CANDIDATES, COMBINE_ELEMENTS, AttentionTile, attention_prefill_tile, attention_tile
from .cache import ROW_POINTERS
from .combine import _combine_kernel
from .prefill import _prefill_kernel
from .split import _attention_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {"attention": _attention_kernel, "attention prefill": _prefill_kernel, "attention combine": _combine_kernel}
# Pointers to float32; those that are in no list are to int32.
FLOAT_POINTERS = ("partials_ptr", "k_scale_ptr", "v_scale_ptr")
# Arguments that the launcher leaves out, as None, of a call that does without them.
OPTIONAL = {
    "cache": ("k_cache_ptr", "v_cache_ptr"),
    "fp8": ("k_scale_ptr", "v_scale_ptr"),
    "kept": ("kept_ptr",),
    "paged": ("page_table_ptr",),
    "sliding": ("sliding_window",),
    "partials": ("partials_ptr",),
}


@dataclasses.dataclass(frozen=True)
class _Variant:
    """What a call has compiled in. `page` is the page size, 0 without a page table."""

    dtype: str
    D: int
    G: int
    mode: str = "full"
    cache: bool = True
    kept: bool = False
    sliding: bool = False
    fp8: bool = False
    page: int = 0

    @property
    def absent(self) -> list[str]:
        """Arguments that are None."""
        present = {"paged": self.page > 0, "partials": self.cache} | {
            n: getattr(self, n) for n in OPTIONAL if hasattr(self, n)
        }
        return [argument for name, arguments in OPTIONAL.items() if not present[name] for argument in arguments]

    def __str__(self) -> str:
        extras = [name for name in ("kept", "sliding", "fp8") if getattr(self, name)]
        extras += [f"paged {self.page}"] if self.page else []
        return " ".join(
            [f"{self.dtype} D={self.D} G={self.G} {self.mode}", "cache" if self.cache else "no cache", *extras]
        )


def compile_cases(capability: int) -> list[CompileCase]:
    """Every tile, every mode and every optional argument, as the launcher specialises them for aligned strides."""
    everything = {"kept": True, "sliding": True}
    # LLaDA, Dream, SDAR and the two kinds of layer of DiffusionGemma come first, then what else the table has.
    splits = [_Variant("bf16", D, G) for D, G in ((128, 1), (128, 7), (128, 4), (256, 2), (512, 8), (64, 1), (64, 4))]
    splits += [_Variant("bf16", D, 1, "block") for D in (16, 32, 80, 128, 256)]
    splits += [_Variant("bf16", D, 7, "block") for D in (16, 32, 128, 512)]
    splits += [_Variant("bf16", 128, 4, mode) for mode in ("causal", "shadow")]
    no_cache = ((128, 1, "full"), (128, 4, "causal"))
    splits += [_Variant("bf16", D, G, mode, cache=False) for D, G, mode in no_cache]
    splits += [_Variant("fp16", 128, 7, "block")] + [
        _Variant("fp32", D, 1, "block") for D in (16, 32, 64, 128, 256, 512)
    ]
    splits += [_Variant("bf16", 128, 1, kept=True)]
    splits += [_Variant("bf16", D, 2, sliding=True) for D in (256, 512)]
    splits += [_Variant("bf16", 128, 1, page=64), _Variant("bf16", 128, 4, page=16)]
    splits += [_Variant("bf16", D, 1, fp8=True) for D in (64, 128, 256, 512)] + [
        _Variant("bf16", 128, 7, "block", fp8=True)
    ]
    splits += [_Variant("bf16", 128, 1, "shadow", page=64, **everything)]
    splits += [_Variant("bf16", 128, 7, "shadow", fp8=True, page=16, **everything)]
    splits += [_Variant("bf16", 256, 2, fp8=True, page=64, sliding=True)]
    splits += [_Variant("fp32", 512, 7, "block")]
    splits += [_Variant("fp32", D, 7, "block", fp8=True) for D in (16, 32, 64, 128, 256, 512)]
    prefills = [_Variant("bf16", D, 4, "causal") for D in (16, 32, 64, 128, 256, 512)]
    prefills += [
        _Variant("bf16", 128, 1),
        _Variant("fp16", 128, 7, "block"),
        _Variant("bf16", 128, 4, "causal", cache=False),
    ]
    prefills += [_Variant("fp32", 64, 1, "causal"), _Variant("bf16", 128, 4, "block", fp8=True)]
    prefills += [_Variant("bf16", 128, 7, "shadow", fp8=True, page=16, **everything)]
    prefills += [_Variant("bf16", 256, 2, fp8=True, page=64, sliding=True)]
    prefills += [_Variant("fp32", 512, 7, "block")]
    prefills += [_Variant("fp32", D, 7, "block", fp8=True) for D in (128, 256, 512)]
    combines = [
        ("bf16", 64, False),
        ("bf16", 128, False),
        ("bf16", 256, False),
        ("bf16", 256, True),
        ("bf16", 512, False),
    ]
    combines += [("fp32", 64, False)]
    return [
        *(_split_case(capability, variant) for variant in splits),
        *(_prefill_case(capability, variant) for variant in prefills),
        *(_combine_case(dtype, D, sliding) for dtype, D, sliding in combines),
    ]


def candidate_cases(capability: int) -> list[CompileCase]:
    """The tiles that a GPU has yet to choose from, in the modes and groups of the models that they are for."""
    cases = []
    for (D, place), tiles in ATTENTION_CANDIDATES[capability].items():
        groups = ((4, "full"), (7, "block")) if place else ((1, "full"), (1, "block"))
        for tile in tiles:
            cases += [_tiled_split_case(capability, _Variant("bf16", D, G, mode), tile) for G, mode in groups]
    return cases


def _split_case(capability: int, variant: _Variant) -> CompileCase:
    tile = attention_tile(capability, D=variant.D, G=variant.G, dtype=DTYPES[variant.dtype], fp8=variant.fp8)
    return _tiled_split_case(capability, variant, tile)


def _tiled_split_case(capability: int, variant: _Variant, tile: AttentionTile) -> CompileCase:
    constexprs = {"SPLIT": tile.SPLIT, "MAX_SPLITS": tile.MAX_SPLITS, "SWAP": tile.SWAP}
    return _case("attention", capability, variant, tile, constexprs)


def _prefill_case(capability: int, variant: _Variant) -> CompileCase:
    tile = attention_prefill_tile(capability, D=variant.D, dtype=DTYPES[variant.dtype], fp8=variant.fp8)
    return _case("attention prefill", capability, variant, tile, {})


def _combine_case(dtype: str, D: int, sliding: bool) -> CompileCase:
    BLOCK_D = triton.next_power_of_2(D)
    constexprs = {
        "D": D,
        "SPLIT": 512,
        "MAX_SPLITS": 32,
        "BLOCK_R": min(16, COMBINE_ELEMENTS // BLOCK_D),
        "BLOCK_D": BLOCK_D,
    }
    constexprs |= {} if sliding else {"sliding_window": None}
    config = f"{dtype} D={D}{' sliding' if sliding else ''}"
    return _signed("attention combine", config, dtype, dtype, constexprs, num_warps=4, num_stages=1)


def _case(
    kernel: str, capability: int, variant: _Variant, tile: AttentionTile, constexprs: dict[str, object]
) -> CompileCase:
    BLOCK_D = triton.next_power_of_2(variant.D)
    constexprs = constexprs | {"G": variant.G, "D": variant.D, "MODE": variant.mode, "HAS_CACHE": variant.cache}
    constexprs |= {"PAGE": variant.page, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_D": BLOCK_D}
    constexprs |= {argument: None for argument in variant.absent if argument in KERNELS[kernel].arg_names}
    config = f"{variant} {tile.BLOCK_M}x{tile.BLOCK_N}{' swapped' if tile.SWAP else ''}"
    # wgmma wants 64 rows in the first operand of both products, and a tile that has them was chosen to get it.
    rows = min(tile.BLOCK_N, BLOCK_D) if tile.SWAP else tile.BLOCK_M
    mma = "wgmma" if capability == 90 and variant.dtype != "fp32" and rows >= 64 else None
    cache_dtype = "u8" if variant.fp8 else variant.dtype
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.max_registers, "mma": mma}
    return _signed(kernel, config, variant.dtype, cache_dtype, constexprs, **options)


def _signed(
    kernel: str, config: str, dtype: str, cache_dtype: str, constexprs: dict[str, object], **options
) -> CompileCase:
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}") | dict.fromkeys(
        FLOAT_POINTERS, "*fp32"
    )
    pointers |= {"k_cache_ptr": f"*{cache_dtype}", "v_cache_ptr": f"*{cache_dtype}", "kept_ptr": "*u8"}
    signature: dict[str, object] = {}
    aligned: list[str] = []
    for name in KERNELS[kernel].arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*i32")
            aligned += () if name in ROW_POINTERS else (name,)
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            aligned += [f"{name}.{dim}" for dim in range(3)]
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
    return CompileCase(kernel, config, KERNELS[kernel], signature, constexprs, tuple(aligned), **options)
