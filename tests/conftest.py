"""What every test runs under: kernels on the GPU if there is one, else in Triton's interpreter; few threads; a fixed
seed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# A bare checkout runs its tests too. An installed copy (editable or not) is left alone: nothing is put before it. The
# folder kernels/ is added for the package inside; the folder has no __init__.py, so it never is a module named
# `kernels` (see dlm_kernels/__init__.py).
for package, folder in (("dlm_kernels", ROOT / "kernels"), ("dlm_fast", ROOT)):
    if importlib.util.find_spec(package) is None:
        sys.path.append(str(folder))

# Triton reads the variable when a function is decorated, and its own library's functions are: the variable must be set
# before any import.
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "triton was imported before tests/conftest.py turned its interpreter on: set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"

# Toy tensors: a second thread costs more than it gives, and on a busy machine many times more.
torch.set_num_threads(1)


def patch_the_language_once() -> None:
    """Halves the interpreter's time. At each call of each device function the interpreter looks for every builtin of
    triton.language again, though a launch has patched them all. Here a launch patches a module once; what is patched,
    and how, stays the interpreter's."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another version's interpreter, as it is
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_lang(function):
        modules = {
            id(value)
            for value in function.__globals__.values()
            if value is interpreter.tl or value is interpreter.tl.core
        }
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(function)

    def launch(self, *args, **kwargs):
        patched.clear()
        try:
            return call(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, launch


def drop_nan_from_maxima() -> None:
    """Makes the maximum of a number and NaN the number. On a GPU it is (PTX max.f32), and the kernels are written for
    that; numpy's is NaN."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    patch_the_language_once()
    drop_nan_from_maxima()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--campaign-summary", type=Path, default=None, help="where a campaign of decodes writes its summary (JSON)"
    )
    parser.addoption(
        "--races",
        action="store_true",
        help="a launch whose loads and stores have no order between fails (tests/support/races.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--races"):
        return
    import races

    watching = contextlib.ExitStack()
    config.add_cleanup(watching.close)
    try:
        config.pluginmanager.register(races.Session(watching.enter_context(races.watch())))
    except RuntimeError as error:
        raise pytest.UsageError(f"--races: {error}") from None


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def without_debug() -> None:
    """For a test of what a call asks of torch, and for one that times or captures calls."""


@pytest.fixture(autouse=True)
def debug_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """The calls of the tests are meant to be valid: the debug mode reads each of them, and one that breaks its contract
    fails."""
    from dlm_kernels import debug

    with debug("without_debug" not in request.fixturenames):
        yield


@pytest.fixture
def layer_kernels() -> None:
    """For a test whose models run the kernels of a layer's ops in the interpreter too."""


@pytest.fixture(autouse=True)
def layers_of_the_reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, models with the Triton backend have the references of a layer's ops: these kernels are many
    small programs, which take minutes of a decode there, and have tests of their own."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    if not interpreted or "layer_kernels" in request.fixturenames:
        return
    from dlm_fast import ops
    from dlm_kernels import reference

    triton_ops = ops.triton_ops
    layers = {name: getattr(reference, name) for name in ops.LAYER_OPS}
    monkeypatch.setattr(ops, "triton_ops", lambda *reason: dataclasses.replace(triton_ops(*reason), **layers))


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
