"""Correctness checks of the ops and of whole decodes, for a GPU and for the interpreter."""
