"""Timings of the ops, of one denoise step and of whole decodes, side by side with what they replace."""
