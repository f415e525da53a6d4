"""`confidence` in Triton. Importing it imports Triton; its specification is `dlm_kernels.reference.confidence`."""

from .launch import confidence

__all__ = ["confidence"]
