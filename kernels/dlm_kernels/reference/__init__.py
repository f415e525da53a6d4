"""The specification of every op in plain torch. Imports torch only; the Triton kernels must equal these functions."""

from .attention import block_attention
from .confidence import Confidence, confidence
from .unmask import unmask

__all__ = ["Confidence", "block_attention", "confidence", "unmask"]
