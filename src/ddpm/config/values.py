"""One plain value of a config: of the type its key has, and within its limits."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

from ddpm.config.limits import LIMITS, Between, describe
from ddpm.errors import UserError, is_plain

MAX_ITEMS = 4096  # in a list


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint "; did you mean …?" or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def like(example: Any, value: Any, path: str) -> Any:
    """`value`, if it is of the example's type and within the limits of its key `path`. Raises UserError."""
    match example:
        case None:
            result, kind = value, "plain data"
            fits = value is None or isinstance(value, str | int | float | bool | list)
        case bool():
            result, kind, fits = value, "true or false", isinstance(value, bool)
        case int():
            result, kind = value, "a whole number"
            fits = isinstance(value, int) and not isinstance(value, bool)
        case float():
            fits, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
            result = float(value) if fits and abs(value) < 1e300 else value
        case str():
            if isinstance(value, bool) and (word := str(value).lower()) in LIMITS.get(path, ()):
                value = word  # no text to YAML, nor in checkpoints of before there was a third word
            result, kind = value, "a text without control characters"
            fits = isinstance(value, str) and len(value) <= 4096 and is_plain(value)
        case list():
            if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
                raise UserError(f"{path}={value!r}: must be a list such as [1, 2]")
            item = example[0] if example else 0
            return [like(item, each, path) for each in value]
        case _:
            raise AssertionError(f"{path}: a config holds plain values and lists of them")
    allowed = LIMITS.get(path)
    if not fits:
        raise UserError(f"{path}={_show(value)}: must be {describe(allowed) or kind}")
    if allowed and value is not None and not isinstance(value, list) and result not in allowed:
        words = () if isinstance(allowed, Between) or not isinstance(value, str) else allowed
        hint = nearest(value, words) if words else ""
        raise UserError(f"{path}={_show(value)}: must be {describe(allowed)}{hint}")
    if isinstance(result, float) and not math.isfinite(result):
        raise UserError(f"{path}={_show(value)}: must be a finite number")
    return result


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 80 else text[:77] + "…"
