"""Triton kernels for decoding diffusion language models, each with the plain-torch reference that specifies it, and the
same ops for a CPU.

The ops, `block_attention`, `confidence`, `unmask`, `draft_build`, `verify`, `uniform_scores` and those of a layer,
`rms_norm`, `add_rms_norm`, `qk_norm_rope` and `swiglu`, are told everything by device tensors. Each is a launcher here,
an operator `torch.ops.dlm_kernels.*` where it is traced (`library`), and, under the same name and signature, a
plain-torch function in `dlm_kernels.reference`:

    from dlm_kernels.confidence import confidence      # imports Triton
    from dlm_kernels import reference                  # torch only
    reference.confidence(...)
    from dlm_kernels import cpu                        # torch and numpy only
    cpu.confidence(...)

Every op refuses arguments of a wrong type, dtype, shape, device or memory with an error that names the argument, before
it writes anything. What only the numbers on the device can show is checked in the debug mode, `debug(True)`, which is
off at first, changes no result, and costs a call that is not in it one test of a bool.

Importing this package imports torch and never Triton, so these run on a machine without Triton or a GPU.
"""

# Why the folder above this one, kernels/, has no __init__.py, and must never get one: Hugging Face publishes a package
# named `kernels`, and transformers imports it wherever it is installed. With an __init__.py, any Python started in the
# checkout (`python -m pytest` puts the current directory first on sys.path) would import our folder in its place, and
# installing us next to an installed Hugging Face `kernels` fails on its setuptools entry point. Without one, our folder
# is only a namespace portion, which every regular package of that name beats wherever it stands on sys.path.
# tests/package/test_shadow.py pins this.

from . import reference
from .checks.debug import debug
from .rules import UnmaskInputs, UnmaskRule
from .state import RowState
from .window import Window

__all__ = ["RowState", "UnmaskInputs", "UnmaskRule", "Window", "debug", "reference"]
