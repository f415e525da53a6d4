"""What the tests of the kernels and the check on a GPU (`python -m bench gpu-check`) are both made of.

`memory` hands out poisoned memory between guard zones, `compare` says when a result is right, and `draws` when a draw
of `confidence` may be compared at all. `attention_calls`, `confidence_calls`, `unmask_calls`, `drafts_calls` and
`layers_calls` draw the random calls of those ops. The package imports torch, and neither pytest nor Triton.
"""

from .compare import Failure, bits, no_worse_than_torch, same_bits
from .draws import CLEAR_DRAW, clear_draws
from .memory import POISON, GuardedMemory, poisoned

__all__ = [
    "CLEAR_DRAW", "POISON", "Failure", "GuardedMemory", "bits", "clear_draws", "no_worse_than_torch", "poisoned",
    "same_bits",
]  # fmt: skip
