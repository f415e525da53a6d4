"""Measurements of the kernels and of a denoise step, run from a checkout: `python -m bench gpu-check --out DIR`. Not
installed."""
