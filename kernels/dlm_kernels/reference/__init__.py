"""The specification of every op in plain torch. Imports torch only; the Triton kernels and the ops for a CPU must equal
these functions."""

from ..state import DraftSource
from .attention import block_attention
from .confidence import Confidence, confidence
from .drafts import Verified, draft_build, verify
from .noise import uniform_scores
from .unmask import unmask

__all__ = [
    "Confidence",
    "DraftSource",
    "Verified",
    "block_attention",
    "confidence",
    "draft_build",
    "uniform_scores",
    "unmask",
    "verify",
]
