"""dlm-fast: fast, exact decoding of diffusion language models on your own GPU.

Three lines decode a prompt:

    model = dlm_fast.load("tiny-full")
    out = dlm_fast.generate(model, [[{"role": "user", "content": "Add 398 and 904"}]], preset="fast-dllm")
    out.text[0], out.nfe[0]
"""

import importlib.util as _util
import sys as _sys
from pathlib import Path as _Path

# A checkout uses the kernels that lie beside this package, so that a bare checkout runs, and no stale installed copy of
# the kernels is used. The folder kernels/ must not become a package, for the reason in dlm_kernels/__init__.py.
_sibling = _Path(__file__).resolve().parent.parent / "kernels" / "dlm_kernels" / "__init__.py"
if "dlm_kernels" not in _sys.modules and _sibling.is_file():
    _spec = _util.spec_from_file_location("dlm_kernels", _sibling, submodule_search_locations=[str(_sibling.parent)])
    _sys.modules["dlm_kernels"] = _util.module_from_spec(_spec)
    _spec.loader.exec_module(_sys.modules["dlm_kernels"])

from . import policies  # noqa: E402
from .diffusion import DiffusionConfig  # noqa: E402
from .files import CheckpointError  # noqa: E402
from .generate import (  # noqa: E402
    BatchTooLarge,
    DecodeCancelled,
    DecodeError,
    DecodeInterrupted,
    DecodeOutOfMemory,
    GenerateOutput,
    generate,
)
from .inspection import inspect_checkpoint  # noqa: E402
from .loading import load  # noqa: E402
from .ops import CPU, REFERENCE, Ops, triton_ops  # noqa: E402
from .output import Completion  # noqa: E402
from .patching import PatchHandle, explain, handle_of, patch  # noqa: E402
from .policies.heads import load_head  # noqa: E402
from .presets import PRESETS, Preset  # noqa: E402
from .rollouts import Trajectories, trajectories  # noqa: E402
from .running import Block  # noqa: E402
from .session import Request, Session  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    "CPU",
    "PRESETS",
    "REFERENCE",
    "BatchTooLarge",
    "Block",
    "CheckpointError",
    "Completion",
    "DecodeCancelled",
    "DecodeError",
    "DecodeInterrupted",
    "DecodeOutOfMemory",
    "DiffusionConfig",
    "GenerateOutput",
    "Ops",
    "PatchHandle",
    "Preset",
    "Request",
    "Session",
    "Trajectories",
    "__version__",
    "explain",
    "generate",
    "handle_of",
    "inspect_checkpoint",
    "load",
    "load_head",
    "patch",
    "policies",
    "trajectories",
    "triton_ops",
]
