"""No module of ours is named `kernels`: that is Hugging Face's package, which transformers imports wherever it is
installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPED = {"dlm_fast/py.typed", "kernels/dlm_kernels/py.typed"}


def python(code: str, *, cwd: Path, path: str = "") -> list[str]:
    """Lines that a fresh interpreter prints. The sys.path of this interpreter starts with `cwd`, as under `python -m
    pytest`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"PYTHONPATH": path} if path else {}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def built() -> dict[str, list[str]]:
    """What setup.py would put into a wheel: setuptools is asked, and no wheel is built."""
    pytest.importorskip("setuptools")
    code = """
import json, pathlib
from setuptools import Distribution
import distutils.core
distribution = distutils.core.run_setup("setup.py", stop_after="init")
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
found = build.find_all_modules()
modules = {".".join(part for part in (package, name) if part): str(path) for package, name, path in found}
build.manifest_files = {}  # what a MANIFEST.in would add; reading it would write an egg-info folder
packages = [(package, build.get_package_dir(package)) for package in distribution.packages]
data = [file for package, folder in packages for file in build.find_data_files(package, folder)]
print(json.dumps({"packages": distribution.packages, "modules": modules, "data": data}))
"""
    return json.loads(python(code, cwd=ROOT)[-1])


def test_the_folder_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").iterdir() if not path.name.startswith((".", "__"))] == [
        "dlm_kernels"
    ]


def test_in_the_checkout_kernels_is_at_most_a_namespace():
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    (origin,) = python(code, cwd=ROOT)
    assert not origin.startswith(str(ROOT))


def test_away_from_the_checkout_kernels_is_not_ours_at_all(tmp_path):
    code = """
import importlib.util as u, sys
spec = u.find_spec("kernels")
print(*(["nothing"] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]), sep="\\n")
"""
    assert not [line for line in python(code, cwd=tmp_path) if line.startswith(str(ROOT))]


@pytest.mark.parametrize("folder", ["root", "elsewhere"])
def test_an_installed_kernels_package_wins_over_our_folder(tmp_path, folder):
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("CUDAProperties = 'theirs'\n")
    cwd, path = (ROOT, str(site)) if folder == "root" else (tmp_path, os.pathsep.join([str(ROOT), str(site)]))
    lines = python("import kernels; print(kernels.CUDAProperties, kernels.__file__)", cwd=cwd, path=path)
    assert lines == [f"theirs {site / 'kernels' / '__init__.py'}"]


def test_a_wheel_has_our_two_packages_and_no_kernels(built):
    assert {package.partition(".")[0] for package in built["packages"]} == {"dlm_fast", "dlm_kernels"}
    assert {name.partition(".")[0] for name in built["modules"]} == {"dlm_fast", "dlm_kernels"}
    assert Path(built["modules"]["dlm_kernels.window"]) == Path("kernels/dlm_kernels/window.py")


def test_a_wheel_has_every_source_file(built):
    files = [*(ROOT / "dlm_fast").rglob("*.py"), *(ROOT / "kernels" / "dlm_kernels").rglob("*.py")]
    assert set(built["modules"].values()) == {str(path.relative_to(ROOT)) for path in files}


def test_a_wheel_has_the_embedded_checkpoints(built):
    folder = ROOT / "dlm_fast" / "tiny" / "checkpoints"
    expected = {str(path.relative_to(ROOT)) for path in folder.glob("*/*") if path.is_file()}
    assert {str(Path(file)) for file in built["data"]} - TYPED == expected


def test_a_wheel_says_of_both_packages_that_they_are_typed(built):
    assert {str(Path(file)) for file in built["data"]} >= TYPED
    assert all((ROOT / file).is_file() for file in TYPED)
