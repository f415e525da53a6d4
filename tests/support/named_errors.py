"""What makes an error a named one: it says which argument, by which rule, and what was given."""

from __future__ import annotations

# The kinds of error that a refusal may be. CheckpointError and JobError are ValueErrors.
REFUSALS = (ValueError, TypeError, NotImplementedError)


def unnamed(error: BaseException, argument: str) -> str | None:
    """What is wrong with an error as the refusal of `argument`; None if it is a named one."""
    text = str(error)
    if not isinstance(error, REFUSALS) or isinstance(error, UnicodeError):
        return f"{type(error).__name__} is no refusal: {text[:200]}"
    if argument not in text:
        return f"does not name {argument}: {text[:200]}"
    if " got " not in text and not text.startswith("got "):
        return f"does not say what was given: {text[:200]}"
    return None
