"""The calls of these tests are meant to be valid: the debug mode reads each of them, and one that breaks its contract
fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import dlm_kernels


@pytest.fixture
def without_debug() -> None:
    """For a test of what a call asks of torch, and for one that times or captures calls."""


@pytest.fixture(autouse=True)
def debug_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with dlm_kernels.debug("without_debug" not in request.fixturenames):
        yield
