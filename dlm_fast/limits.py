"""Bounds of the numbers that a user may give, and the errors that name them.

Within these bounds the arithmetic of a decode stays inside int32 and fp32.
"""

from __future__ import annotations

from typing import Any

from dlm_kernels.checks.confidence import MAX_TEMPERATURE, MIN_TEMPERATURE

# The largest whole number, which is more than any model has positions. A sum of a few such numbers and positions is far
# inside int32, and a schedule of so many steps takes 64 MiB of fp32 per row.
MAX_WHOLE = 2**24
# The largest number of drafts. Every draft is one more canvas in each forward, and a draft is of use only if all drafts
# before it are accepted.
MAX_DRAFTS = 64
# The most stop strings of a call, and the most characters of one. A step looks for each of them in the newest text, and
# decodes as many tokens before the newest ones as the longest may have.
MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH = 1024, 4096
# The most characters of a value that an error shows.
MAX_SHOWN = 300
# The largest number that is added to a logit or multiplies one, far from the largest fp32 number.
MAX_SHIFT = 1e6
# The largest fp32 number.
MAX_NUMBER = (2 - 2**-23) * 2.0**127


def shown(value: Any) -> str:
    """The value as an error shows it: by its beginning where it is long, and by its kind where it cannot be written.

    Python refuses to write out the longest integers, so they are described.
    """
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # any class may have a repr of its own
        return f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def listed(owner: str, name: str, array: Any) -> Any:
    """The numbers of a tensor or an array as nested lists.

    Raises TypeError for a tensor whose numbers cannot be read, such as a sparse one or one on the device "meta".
    """
    try:
        return array.tolist()
    except Exception as error:
        raise TypeError(f"{owner}: {name} must hold numbers that can be read, got {shown(array)}") from error


def whole(owner: str, name: str, value: Any, low: int = 0, high: int = MAX_WHOLE, *, none: bool = False) -> None:
    """Raises ValueError unless the value is a whole number in [low, high] (or None, if `none`)."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        too_large = isinstance(value, int) and value > high
        rule = f"<= {high}" if too_large else f">= {low}"
        raise ValueError(
            f"{owner}: {name} must be a whole number {rule}{' or None' if none else ''}, got {name}={shown(value)}"
        )


def number(
    owner: str, name: str, value: Any, low: float = -MAX_NUMBER, high: float = MAX_NUMBER, *, none: bool = False
) -> None:
    """Raises ValueError unless the value is a finite fp32 number in [low, high] (or None, if `none`)."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        bounds = [f" >= {low:g}"] * (low > -MAX_NUMBER) + [f" <= {high:g}"] * (high < MAX_NUMBER)
        kind = "a number" if high < MAX_NUMBER else "a finite number"
        rule = f" in [{low:g}, {high:g}]" if len(bounds) == 2 else "".join(bounds)
        raise ValueError(f"{owner}: {name} must be {kind}{rule}{' or None' if none else ''}, got {name}={shown(value)}")


def heat(owner: str, name: str, value: Any) -> None:
    """Raises ValueError unless the value is a temperature: 0, or a number by which fp32 logits may be divided."""
    number(owner, name, value, 0)
    if value and not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise ValueError(
            f"{owner}: {name} must be 0 or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}], got {name}={value:g}"
        )


def flag(owner: str, name: str, value: Any, *, none: bool = False) -> None:
    """Raises ValueError unless the value is True or False, or None where `none` allows that."""
    if not isinstance(value, bool) and not (none and value is None):
        rule = "true, false or None" if none else "true or false"
        raise ValueError(f"{owner}: {name} must be {rule}, got {name}={shown(value)}")
