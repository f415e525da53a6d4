"""What a newcomer installs: two commands, exact pins that fit the declared ranges, and one version."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dlm_fast

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def pins(python_version: str) -> dict[str, str]:
    """Package to version, as constraints.txt pins it for this Python."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found: dict[str, str] = {}
    for requirement in (Requirement(line) for line in lines if line):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python_version}):
            (pin,) = requirement.specifier
            assert pin.operator == "==" and requirement.name not in found, (
                f"constraints.txt: pin once, exactly: {requirement}"
            )
            found[requirement.name] = pin.version
    return found


@pytest.fixture(scope="module")
def declared() -> list[Requirement]:
    """What the README's two commands and CI ask for: the requirements that setup.py names, with two of its extras."""
    pytest.importorskip("setuptools")
    code = "import json, setuptools, distutils.core as core; found = core.run_setup('setup.py', stop_after='init'); "
    code += "print(json.dumps([*found.install_requires, *found.extras_require['test'], *found.extras_require['lint']]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return [Requirement(text) for text in json.loads(result.stdout.splitlines()[-1])]


def test_ci_runs_the_two_commands_that_the_readme_gives():
    commands = re.findall(r"^    '(python .*)'$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert len(commands) == 2
    readme = (ROOT / "README.md").read_text().splitlines()
    assert [command for command in commands if command not in readme] == []


@pytest.mark.parametrize("python_version", PYTHONS)
def test_every_declared_requirement_is_pinned_within_its_range(declared, python_version):
    pinned = pins(python_version)
    assert {"torch", "triton", "transformers", "pytest", "ruff"} <= {requirement.name for requirement in declared}
    for requirement in declared:
        assert requirement.specifier.contains(pinned[requirement.name]), f"{requirement}: {pinned[requirement.name]}"


@pytest.mark.parametrize("python_version", PYTHONS)
def test_ray_is_neither_declared_for_ci_nor_pinned(declared, python_version):
    assert '"ray": ["ray[data]' in (ROOT / "setup.py").read_text()
    assert "ray" not in {requirement.name for requirement in declared} | set(pins(python_version))


@pytest.mark.parametrize("python_version", PYTHONS)
def test_no_pin_names_a_build_of_torch_or_its_cuda_libraries(python_version):
    assert {
        name: pin for name, pin in pins(python_version).items() if "+" in pin or name.startswith(("nvidia-", "cuda-"))
    } == {}


def test_the_version_is_said_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", dlm_fast.__version__)
    assert dlm_fast.__version__ not in (ROOT / "setup.py").read_text()


def test_importing_the_kernels_package_does_not_import_triton():
    code = "import sys, dlm_kernels; print('triton' in sys.modules, *dlm_kernels.__all__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels", capture_output=True, text=True)
    assert result.stdout.split() == ["False", *"RowState UnmaskInputs UnmaskRule Window debug reference".split()], (
        result.stderr
    )
