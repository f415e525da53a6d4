"""`block_attention` in Triton. Importing it imports Triton; its specification is
`dlm_kernels.reference.block_attention`."""

from .launch import block_attention

__all__ = ["block_attention"]
