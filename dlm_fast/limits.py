"""What a number may be: bounds that the decode's arithmetic can keep, and the errors that name them."""

from __future__ import annotations

from typing import Any

from dlm_kernels.checks.confidence import MAX_TEMPERATURE, MIN_TEMPERATURE

# More than any model has positions. A sum of a few such numbers and positions is far inside int32, and a schedule of so
# many steps is 64 MiB of fp32 per row.
MAX_WHOLE = 2**24
# Every draft is one more canvas of its row in each forward, and is of use only if all before it are accepted.
MAX_DRAFTS = 64
# Of what is added to a logit or multiplies one: far from the end of fp32.
MAX_SHIFT = 1e6
# The largest fp32 number.
MAX_NUMBER = (2 - 2**-23) * 2.0**127


def shown(value: Any) -> str:
    """The value as an error shows it; Python refuses to write out the longest integers."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    return repr(value)


def whole(owner: str, name: str, value: Any, least: int = 0, most: int = MAX_WHOLE, *, none: bool = False) -> None:
    """Raises ValueError unless the value is a whole number in [least, most] (or None, if `none`)."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        too_large = isinstance(value, int) and value > most
        rule = f"<= {most}" if too_large else f">= {least}"
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
    """Raises ValueError unless the value is a temperature: 0, or one by which logits may be divided in fp32."""
    number(owner, name, value, 0)
    if value and not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise ValueError(
            f"{owner}: {name} must be 0 or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}], got {name}={value:g}"
        )


def flag(owner: str, name: str, value: Any) -> None:
    """Raises ValueError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name} must be true or false, got {name}={shown(value)}")
