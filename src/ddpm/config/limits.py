"""The limits of a config's values, and the check against them."""

import difflib
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ddpm.config.tables import Names
from ddpm.errors import UserError, is_plain


class Between(typing.NamedTuple):
    """Allowed numbers: low … high, without low itself where `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not abs(value) < math.inf:
            return False
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"a finite number {'above' if self.above else 'of at least'} {self.low}"
        return f"a number {'above' if self.above else 'from'} {self.low} {'up ' if self.above else ''}to {self.high}"


class Several(list[int]):
    """One whole number, or a list of them."""


class Labels(list[int | str]):
    """Numbers and names of classes, one or several; or the word `all`."""


class Interval(list[float]):
    """Two rising numbers; the value itself is a plain list, as YAML writes it."""


Allowed = Between | tuple[str, ...] | Names
REQUIRED: Any = object()  # `absent` of a key that every checkpoint has


@dataclass(frozen=True)
class Key:
    """The declaration of a key beside its type and default. Help, docs, TAB, checks and resume read it."""

    help: str = ""  # of the keys of a command; those of a group have a comment in its YAML file
    allowed: Allowed | None = None  # of a list, for each item
    absent: Any = REQUIRED  # what it meant in a checkpoint older than the key
    path: bool = False
    experiment: bool = True  # False: where or how a run is made, which says nothing about what it is
    # the settings without which it has no effect, as "key=value key!=value"; of a group, for each of its keys
    needs: str = ""


_NOT_INPAINT = "task!=inpaint"  # RePaint takes ancestral steps, whatever the sampler
_WITH_CHURN = f"{_NOT_INPAINT} sampler.churn!=0.0"

# Keys of groups with a choice, whose YAML files are their declarations: type, default, help.
GROUP_KEYS: dict[str, Key] = {
    "dataset.path": Key(path=True),
    "dataset.image_size": Key(allowed=Between(4, 256)),
    "model.channels": Key(allowed=Between(1, 2048)),
    "model.num_blocks": Key(allowed=Between(1, 16)),
    "model.attention": Key(allowed=Between(0, 15)),
    "model.head_dim": Key(allowed=Between(1, 512)),
    "model.norm_groups": Key(allowed=Between(1, 512)),
    "model.dropout": Key(allowed=Between(0, 0.95)),
    "model.hidden": Key(allowed=Between(1, 65536)),
    "model.num_layers": Key(allowed=Between(1, 64)),
    "schedule.num_timesteps": Key(allowed=Between(1, 100_000)),
    "schedule.beta_start": Key(allowed=Between(0, 1, above=True)),
    "schedule.beta_end": Key(allowed=Between(0, 1, above=True)),
    "schedule.s": Key(allowed=Between(0, 1)),
    "schedule.start": Key(allowed=Between(-100, 100)),
    "schedule.end": Key(allowed=Between(-100, 100)),
    "schedule.tau": Key(allowed=Between(0, 100, above=True)),
    "sampler.num_steps": Key(allowed=Between(1, 100_000)),
    "sampler.eta": Key(allowed=Between(0, 1), needs=_NOT_INPAINT),
    "sampler.rho": Key(allowed=Between(0, 100, above=True), needs="sampler.spacing=karras"),
    "sampler.dynamic_percentile": Key(allowed=Between(0, 1, above=True), needs="sampler.clip=dynamic"),
    "sampler.variance": Key(allowed=("small", "large", "learned"), needs=_NOT_INPAINT),
    "sampler.order": Key(allowed=Between(2, 3), needs=_NOT_INPAINT),
    "sampler.churn": Key(allowed=Between(0), needs=_NOT_INPAINT),
    "sampler.churn_min": Key(allowed=Between(0), needs=_WITH_CHURN),
    "sampler.churn_max": Key(allowed=Between(0), needs=_WITH_CHURN),
    "sampler.churn_noise": Key(allowed=Between(0, above=True), needs=_WITH_CHURN),
    "sampler.cap": Key(absent=True, needs=_NOT_INPAINT),
    "sampler.clip": Key(allowed=("none", "clip", "dynamic")),
}


def words(allowed: Allowed | None) -> tuple[str, ...]:
    """Return the words that a key takes, where it takes only some."""
    return () if allowed is None or isinstance(allowed, Between) else tuple(allowed)


def describe(allowed: Allowed | None) -> str:
    return f"one of {', '.join(words(allowed))}" if words(allowed) else str(allowed or "")


PLUGIN_HINT = "; if it comes from a plug-in, add plugins=[…]"
MAX_ITEMS = 4096  # in a list


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" or ""."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def number_or_name(text: str) -> int | str:
    """Return the number that a text is, or else the text."""
    return int(text) if text.isdecimal() and len(text) < 8 and str(int(text)) == text else text


def like(example: Any, value: Any, path: str, allowed: Allowed | None) -> Any:
    """Return `value` if it is of the example's type and allowed; `path` is its key. Raises UserError."""
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
            if isinstance(value, bool) and (word := str(value).lower()) in words(allowed):
                value = word  # no text to YAML, nor in checkpoints of before there was a third word
            elif isinstance(value, int | float) and not isinstance(value, bool) and not allowed:
                value = str(value)  # device=0 is told what it must be where that is known
            result, kind = value, "a text without control characters"
            fits = isinstance(value, str) and len(value) <= 4096 and is_plain(value)
        case list():
            if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
                one = _show(value) if isinstance(value, str | int | float) else "1, 2"
                raise UserError(f"{path}={_show(value)}: must be a list such as [{one}]")
            item = example[0] if example else 0
            return [like(item, each, path, allowed) for each in value]
        case _:
            raise UserError(f"{path}={_show(value)}: a config holds plain values and lists of them")
    if not fits:
        must = describe(allowed) or kind
        if kind == "a whole number" and allowed:
            written = f": {int(value)}" if isinstance(value, float) and value.is_integer() else ""
            must += f", {kind}{written}"
        raise UserError(f"{path}={_show(value)}: must be {must}")
    if allowed and value is not None and not isinstance(value, list) and result not in allowed:
        hint = nearest(value, words(allowed)) if isinstance(value, str) else ""
        hint = PLUGIN_HINT * isinstance(allowed, Names) + hint
        raise UserError(f"{path}={_show(value)}: must be {describe(allowed)}{hint}")
    if isinstance(result, float) and not math.isfinite(result):
        raise UserError(f"{path}={_show(value)}: must be a finite number")
    return result


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 80 else text[:77] + "…"
