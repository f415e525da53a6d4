"""What every test runs under: kernels on the GPU if there is one, else in Triton's interpreter; few threads; a fixed seed."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# A bare checkout runs its tests too. An installed copy (editable or not) is left alone: nothing is put before it. kernels/ is
# added for the package inside it; it has no __init__.py, so it never is a module named `kernels` (see dlm_kernels/__init__.py).
for package, folder in (("dlm_kernels", ROOT / "kernels"), ("dlm_fast", ROOT)):
    if importlib.util.find_spec(package) is None:
        sys.path.append(str(folder))

# Triton reads the variable when a function is decorated, its own library's functions included: it must be set before any import.
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before tests/conftest.py turned its interpreter on: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

# Toy tensors: a second thread costs more than it gives, and on a busy machine many times more.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign-summary", type=Path, default=None, help="where a campaign of decodes writes its summary (JSON)")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `gpu("what it proves")` is skipped without a GPU, and its skip says what would have been proved."""
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        if len(marker.args) != 1 or not isinstance(marker.args[0], str):
            raise pytest.UsageError(f"{item.nodeid}: the gpu marker takes one string, what the test proves on a GPU")
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU; it would have proved that {marker.args[0]}"))
