"""The ops for a CPU: the functions of `dlm_kernels.reference`, which specifies them, in fewer passes.

The host may read every number here at no cost. So masks and indices are made once a window, only rows that are needed
are computed, only slots that are seen are read, and `unmask` passes over rows and lanes in plain Python, which for a
few rows takes a fraction of the time of the reference's small ops. `draft_build`, `verify` and `uniform_scores` are
those of the reference. Imports torch and numpy only.
"""

from ..reference import draft_build, uniform_scores, verify
from .attention import block_attention
from .confidence import confidence
from .layers import add_rms_norm, qk_norm_rope, rms_norm, swiglu
from .unmask import unmask

__all__ = [
    "add_rms_norm",
    "block_attention",
    "confidence",
    "draft_build",
    "qk_norm_rope",
    "rms_norm",
    "swiglu",
    "uniform_scores",
    "unmask",
    "verify",
]
