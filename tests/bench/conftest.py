"""Puts `bench`, which is not installed, within reach of an import before any test of this room asks for it."""

import bench_module  # noqa: F401
