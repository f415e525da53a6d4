"""The specification of every op in plain torch. Imports torch only; the Triton kernels and the ops for a CPU must equal
these functions."""

from ..state import DraftSource
from .attention import block_attention
from .confidence import Confidence, confidence
from .drafts import Verified, draft_build, verify
from .layers import NormedSum, RotatedHeads, add_rms_norm, qk_norm_rope, rms_norm, swiglu
from .noise import uniform_scores
from .unmask import unmask

__all__ = [
    "Confidence",
    "DraftSource",
    "NormedSum",
    "RotatedHeads",
    "Verified",
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
