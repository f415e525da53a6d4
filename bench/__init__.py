"""Measurements of the kernels and of a denoise step. They run from a checkout (`python -m bench gpu-check --out DIR`)
and are not installed."""
