"""`uniform_scores` in Triton. Importing it imports Triton; its specification is `dlm_kernels.reference.noise`."""

from .launch import uniform_scores

__all__ = ["uniform_scores"]
