"""The counts of a decode that `GenerateOutput` reports, counted from outside: what its loop runs step by step."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import dlm_fast
from dlm_fast.decoding import progress


def generate_with_counts(*args: Any, **kwargs: Any) -> dlm_fast.GenerateOutput:
    """`dlm_fast.generate` with `shapes` and `computed_tokens` in the output, whether the package counts them or not."""
    if "shapes" in {field.name for field in dataclasses.fields(dlm_fast.GenerateOutput)}:
        return dlm_fast.generate(*args, **kwargs)
    shapes: collections.Counter[tuple] = collections.Counter()
    run = progress.denoise_step

    def counted(decode: Any, bucket: Any) -> None:
        shapes[(bucket.kind, len(decode.state.tokens), bucket.width, bucket.lanes, bucket.drafts)] += 1
        run(decode, bucket)

    progress.denoise_step = counted
    try:
        out = dlm_fast.generate(*args, **kwargs)
    finally:
        progress.denoise_step = run
    object.__setattr__(out, "shapes", dict(shapes))
    positions = sum(rows * width * drafts * times for (_, rows, width, _, drafts), times in shapes.items())
    object.__setattr__(out, "computed_tokens", positions)
    return out
