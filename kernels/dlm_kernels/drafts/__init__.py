"""`draft_build` and `verify` in Triton. Importing them imports Triton; their specification is
`dlm_kernels.reference.drafts`."""

from .launch import draft_build, verify

__all__ = ["draft_build", "verify"]
