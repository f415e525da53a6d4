"""The ops for a CPU: the functions of `dlm_kernels.reference`, which specifies them, in fewer passes.

The host may read every number here at no cost. So masks and indices are made once a window, only rows that are needed
are computed, and only slots that are seen are read. `unmask`, `draft_build` and `verify` are those of the reference. A
sixth of a step of the smallest model is `unmask`; in numpy that step took 6% less, which a second form of all its rules
is not worth. Imports torch and numpy only.
"""

from ..reference import draft_build, uniform_scores, verify
from .attention import block_attention
from .confidence import confidence
from .unmask import unmask

__all__ = ["block_attention", "confidence", "draft_build", "uniform_scores", "unmask", "verify"]
