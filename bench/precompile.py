"""`python -m bench precompile`: every kernel that `gpu-check` launches, compiled on a machine without a GPU."""

from __future__ import annotations

import concurrent.futures
import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import triton
from triton.backends.nvidia import driver
from triton.compiler.compiler import get_cache_key, make_backend
from triton.runtime.cache import get_cache_manager

from . import collect, kernel_cache, machine
from .checks import run as checks
from .collect import Variant
from .shapes import CHECK_SHAPES, Shapes

# Of what is compiled, only the machine code is needed.
ENVIRONMENT = kernel_cache.ENVIRONMENT | {"TRITON_STORE_BINARY_ONLY": "1"}


def precompile(
    out: Path,
    targets: Sequence[int],
    seed: int,
    jobs: int,
    say: Callable[[str], None],
    sizes: checks.Sizes = checks.GPU,
    shapes: Shapes = CHECK_SHAPES,
    ops: tuple[str, ...] = checks.OPS,
) -> int:
    """Collects, compiles and packs. Exit status: 0; 1 if something did not compile or could not be followed, and each
    such thing is named.

    Args:
        targets: compute capabilities (90).
        seed: of the checks' inputs, on which depends which optional arguments a case has.
        jobs: processes that compile.
        ops: of checks.OPS; what is timed is followed where all ops that it needs are among them.
    """
    torch.set_num_threads(1)
    collector, lost = collect.Collector(), 0
    for target in targets:
        before = len(collector.variants)
        for name, reason in collect.checks_and_timings(collector, target, sizes, shapes, seed, ops):
            if reason:
                lost += 1
                say(f"NOT FOLLOWED {name}: {reason}")
        say(f"sm_{target}: {len(collector.variants) - before} kernels")
    variants = list(collector.variants.values())
    with tempfile.TemporaryDirectory(prefix="dlm-fast-triton-") as cache:
        os.environ |= ENVIRONMENT | {"TRITON_CACHE_DIR": cache}
        failed = set()
        for index, error in _compiled(variants, jobs, say):
            if error:
                failed.add(index)
                say(f"DOES NOT COMPILE {variants[index].name}: {error}")
        made = [variant for index, variant in enumerate(variants) if index not in failed]
        manifest = kernel_cache.Manifest(
            triton=triton.__version__,
            ptxas={str(target): kernel_cache.ptxas(target) for target in targets},
            environment=kernel_cache.environment(),
            commit=machine.commit(),
            sources=machine.sources(),
            seed=seed,
            kernels=[_kernel(variant, Path(cache)) for variant in made],
        )
        launchers = _launchers(made)
        kernel_cache.pack(out, manifest, Path(cache), launchers)
    size = f"{len(made)} kernels, {len(launchers)} launchers, {out.stat().st_size / 1e6:.1f} MB"
    say(f"{out}: {size}, commit {manifest.commit}, seed {seed}")
    say(f"{len(failed)} did not compile, {lost} could not be followed")
    return 1 if failed or lost else 0


def _compiled(variants: Sequence[Variant], jobs: int, say: Callable[[str], None]) -> Iterator[tuple[int, str]]:
    """(index, error or "") of each variant, as they are compiled, in forked processes: these have what was collected,
    which cannot be pickled."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_hold, initargs=(variants,)
    ) as pool:
        pending = {pool.submit(_compile, index): index for index in range(len(variants))}
        for number, future in enumerate(concurrent.futures.as_completed(pending), 1):
            yield pending[future], future.result()
            if number % 100 == 0:
                say(f"{number} of {len(variants)} compiled")


_held: Sequence[Variant] = ()


def _hold(variants: Sequence[Variant]) -> None:
    global _held
    _held = variants


def _compile(index: int) -> str:
    variant = _held[index]
    try:
        triton.compile(variant.source, target=variant.target, options=variant.options.__dict__)
    except Exception as error:
        # Triton's message begins with the place of the call and its code, and ends with what is wrong.
        while error.__cause__ is not None:
            error = error.__cause__
        return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    return ""


def _kernel(variant: Variant, cache: Path) -> kernel_cache.Kernel:
    """The kernel's entry: where Triton has put the kernel, and the parts of its key that are its own."""
    key = get_cache_key(
        variant.source, make_backend(variant.target), variant.options, env_vars=kernel_cache.environment()
    )
    folder = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).key
    return kernel_cache.Kernel(folder, variant.source.hash(), variant.options.hash(), variant.target.arch)


def _launchers(variants: Sequence[Variant]) -> list[str]:
    """The C sources of the extensions through which Triton launches the variants: one for each signature, or none where
    one extension serves all signatures."""
    if not hasattr(driver, "make_launcher"):
        return []

    def source_of(variant: Variant) -> str:
        source = variant.source
        names = source.fn.arg_names
        places = {(names.index(at),) if isinstance(at, str) else at: value for at, value in source.constants.items()}
        return driver.make_launcher(places, dict(source.signature), None)

    return sorted({source_of(variant) for variant in variants})
