"""Decoders for one row, one readable function each, written from their specification and from nothing of the
project."""
