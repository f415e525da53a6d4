"""Kernels that were compiled on another machine: the file that they travel in, and their place in this machine's Triton
cache.

The file is a tar.xz of `manifest.json`, `launchers.json` and a folder for each kernel with its machine code and
metadata. Triton finds a kernel by a key over its source, its options and the installation, down to the bytes of its
libraries, which differ from one Python version to another. So the file holds a kernel under the part of the key that is
the kernel's own, and the part of the installation is added where the kernel is placed. Where the kernel's own part does
not agree, Triton compiles: a cache makes a run faster, never different.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import lzma
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import machine

# Without line numbers the machine code is smaller. The variable is part of the key, so its value must be the same where
# a kernel is looked for.
ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1"}
KEPT = (".cubin", ".json")
GROUP = "__grp__"  # what Triton calls the file that lists a kernel's files


class CacheError(RuntimeError):
    """A file that is no cache of kernels; the message says why."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel in the file.

    Attributes:
        folder: the kernel's folder in the file.
        source, options: Triton's hashes of the kernel's source and options.
        target: compute capability.
    """

    folder: str
    source: str
    options: str
    target: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the kernels were made of, and by what.

    Attributes:
        triton: version of Triton.
        ptxas: version of ptxas, by target.
        environment: the variables that Triton counts as part of a key.
        commit: of the checkout.
        sources: a hash of the checkout's Python files.
        seed: of the checks' inputs, which decide which optional arguments a case has, and thereby its kernels.
    """

    triton: str
    ptxas: dict[str, str]
    environment: dict[str, str]
    commit: str
    sources: str
    seed: int
    kernels: list[Kernel]


def pack(path: Path, manifest: Manifest, files: Path, launchers: Sequence[str]) -> None:
    """Writes the file. `files` is a folder that holds the folders of `manifest.kernels`."""
    texts = {"manifest.json": json.dumps(dataclasses.asdict(manifest)), "launchers.json": json.dumps(list(launchers))}
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for name, text in texts.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
        # Files that are alike lie beside each other, because the compression sees only so far back.
        for file in sorted(files.rglob("*"), key=lambda file: (file.suffix, file.name, file.stat().st_size)):
            if file.suffix in KEPT and not file.name.startswith(GROUP):
                archive.add(file, arcname=str(file.relative_to(files)))


def unpack(path: Path, folder: Path) -> tuple[Manifest, list[str]]:
    """The manifest, and the C sources of the launchers; afterwards `folder` holds the kernels' files. Raises
    CacheError."""
    try:
        with tarfile.open(path, "r:xz") as archive:
            archive.extractall(folder, filter="data")
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest = Manifest(**found | {"kernels": [Kernel(**kernel) for kernel in found["kernels"]]})
        return manifest, json.loads((folder / "launchers.json").read_text(encoding="utf-8"))
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path}: must be a file of `precompile`, got {type(error).__name__}: {error}") from None


def environment() -> dict[str, str]:
    """The variables that Triton counts as part of a key, with their values here."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return get_cache_invalidating_env_vars()


def ptxas(target: int) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    return make_backend(GPUTarget("cuda", target, 32)).hash()


def place(manifest: Manifest, files: Path, cache: Path) -> tuple[int, str]:
    """Puts every kernel where Triton looks for it.

    Returns:
        (how many kernels were placed, why not all of them), the reason being "" if all were.
    """
    import triton
    from triton.runtime.cache import _base32, triton_key

    if triton.__version__ != manifest.triton:
        return 0, f"made by Triton {manifest.triton}, here is {triton.__version__}"
    if environment() != manifest.environment:
        return 0, f"made under {manifest.environment}, here is {environment()}"
    here = {target: ptxas(int(target)) for target in manifest.ptxas}
    differences = [
        f"ptxas {made} for sm_{target}, here {here[target]}"
        for target, made in manifest.ptxas.items()
        if here[target] != made
    ]
    if differences:
        return 0, f"made by {', '.join(differences)}"
    variables = str(sorted(environment().items()))
    for kernel in manifest.kernels:
        key = f"{triton_key()}-{kernel.source}-{here[str(kernel.target)]}-{kernel.options}-{variables}"
        folder = cache / _base32(hashlib.sha256(key.encode()).hexdigest())
        folder.mkdir(parents=True, exist_ok=True)
        paths = {}
        for file in (files / kernel.folder).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
            paths[file.name] = str(folder / file.name)
        (metadata,) = (name for name in paths if name.endswith(".json"))
        (folder / f"{GROUP}{metadata}").write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    return len(manifest.kernels), ""


def build_launchers(sources: Sequence[str]) -> int:
    """Builds the C extensions through which Triton launches kernels, where Triton looks for them; older Tritons have
    one extension for each signature."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    if not hasattr(driver, "make_launcher"):
        return 0
    options = {
        "library_dirs": driver.library_dirs(),
        "include_dirs": driver.include_dirs,
        "libraries": driver.libraries,
    }

    def build(source: str) -> None:
        compile_module_from_src(src=source, name="__triton_launcher", **options)

    # The C compiler is a process of its own, so threads are enough.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, sources))
    return len(sources)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A cache in use.

    Attributes:
        folder: the Triton cache.
        commit: the commit of the cache's sources; None if these are not the sources here.
        facts: what the report says of the cache.
    """

    manifest: Manifest
    folder: Path
    commit: str | None
    facts: dict[str, Any]

    def compiled_since(self) -> int:
        """How many kernels Triton has compiled besides those of the file."""
        return sum(1 for _ in self.folder.glob("*/*.cubin")) - self.facts["placed"]


@contextlib.contextmanager
def placed(path: Path) -> Iterator[Placed]:
    """Gives this process, and those that it starts, a Triton cache of their own that holds the kernels of a file.
    Raises CacheError."""
    before = dict(os.environ)
    with (
        tempfile.TemporaryDirectory(prefix="dlm-fast-") as files,
        tempfile.TemporaryDirectory(prefix="dlm-fast-triton-") as cache,
    ):
        manifest, sources = unpack(path, Path(files))
        os.environ |= ENVIRONMENT | {"TRITON_CACHE_DIR": cache}
        try:
            began = time.monotonic()
            count, reason = place(manifest, Path(files), Path(cache))
            launchers = 0
            try:
                launchers = build_launchers(sources) if count else 0
            except Exception as error:  # every launcher is then built at its first launch
                reason = (
                    f"the launchers cannot be built ahead: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                )
            same = machine.sources() == manifest.sources
            facts = {
                "placed": count,
                "launchers": launchers,
                "seconds": round(time.monotonic() - began, 1),
                "reason": reason,
            }
            facts |= {"commit": manifest.commit, "same_sources": same}
            yield Placed(manifest, Path(cache), manifest.commit if same else None, facts)
        finally:
            os.environ.clear()
            os.environ |= before


def lines(found: Placed) -> list[str]:
    """What the cache is worth here, in words."""
    facts, manifest = found.facts, found.manifest
    targets = ", ".join(f"sm_{target}" for target in manifest.ptxas)
    made = (
        f"compiled ahead: {len(manifest.kernels)} kernels for {targets}, Triton {manifest.triton}, seed {manifest.seed}"
    )
    variables = " ".join(
        f"{name}={value}" for name, value in ({"TRITON_CACHE_DIR": found.folder} | ENVIRONMENT).items()
    )
    lines = [f"{made}, commit {manifest.commit}"]
    lines += [
        f"    {facts['placed']} placed, {facts['launchers']} launchers built, {facts['seconds']} s; "
        f"for this run {variables}"
    ]
    if facts["reason"]:
        lines.append(f"    {facts['reason']}: what is missing is compiled when it is launched")
    if not facts["same_sources"]:
        lines.append("    made of other sources than those here: what they changed is compiled when it is launched")
    return lines
