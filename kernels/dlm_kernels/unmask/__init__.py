"""`unmask` in Triton. Importing it imports Triton; its specification is `dlm_kernels.reference.unmask`."""

from .launch import unmask

__all__ = ["unmask"]
