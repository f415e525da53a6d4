"""`rms_norm`, `add_rms_norm`, `qk_norm_rope` and `swiglu` in Triton. Importing them imports Triton; their specification
is `dlm_kernels.reference.layers`."""

from .launch import add_rms_norm, qk_norm_rope, rms_norm, swiglu

__all__ = ["add_rms_norm", "qk_norm_rope", "rms_norm", "swiglu"]
