"""Registers the marker of the microbenchmarks, and lets them run from a bare checkout: bench/ is not among the test
paths."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for package, folder in (("bench", ROOT), ("dlm_fast", ROOT), ("dlm_kernels", ROOT / "kernels")):
    if importlib.util.find_spec(package) is None:
        sys.path.append(str(folder))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "toy: toy shapes in Triton's interpreter; exercises the code, its times say nothing"
    )
