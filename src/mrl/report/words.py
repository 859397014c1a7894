"""The words of the report in each language, and how its numbers are written; nothing here knows what a run is."""

from __future__ import annotations

import functools
import json
import math
import string
from collections.abc import Sequence
from importlib import resources
from typing import Any

from mrl.errors import ConfigError

LANGUAGES = ("en", "ja")
MINUS = "\u2212"
THIN = "\u202f"
ABOUT_MRL = ("title", "arm.", "front.kicker", "front.about", "glossary.", "arms.", "warning.")  # not of an arm


class Words:
    """The texts of one language, and numbers with their units in it.

    A text is found by its key, `words("front.costs")`; parameters fill its braces. Every formatter takes None or NaN
    and then answers "not measured", so that a page never shows an empty cell or a wrong zero.

    Args:
        lang: "en" or "ja".

    Raises:
        ConfigError: a language that is not there.

    Example:
        >>> words = Words("en")
        >>> words.number(1234.5, 1), words.duration(3750), words.percent(None)
        ('1,234.5', '1 h 02 min', 'not measured')
    """

    def __init__(self, lang: str = "en"):
        if lang not in LANGUAGES:
            raise ConfigError(f"--lang {lang}: not a language of the report; choose one of {', '.join(LANGUAGES)}.")
        self.lang, self._name = lang, ""
        self._table = table(lang)

    def __call__(self, key: str, /, **params: Any) -> str:
        """The text of a key, its braces filled."""
        text = self._table[key]
        if self._name and not key.startswith(ABOUT_MRL):
            text = text.replace("MRL", self._name)
        return text.format(**params) if params else text

    def of_arm(self, arm: str) -> Words:
        """The same words, in which another arm than `mrl` has the place of MRL.

        Example:
            >>> Words().of_arm("region4")("reason.superior"), Words().of_arm("mrl").arm("mrl")
            ('The whole interval is above zero: region4 is superior.', 'MRL')
        """
        words = Words(self.lang)
        words._name = "" if arm == "mrl" else arm
        return words

    def has(self, key: str) -> bool:
        """Whether there is a text of this key."""
        return key in self._table

    def get(self, key: str, otherwise: str) -> str:
        """The text of this key, or `otherwise` where the key is somebody's own name (a metric, a backend)."""
        return self(key) if key in self._table else otherwise

    def number(self, value: Any, digits: int = 2, sign: bool = False) -> str:
        """A plain number with thousands separated: 1,234.5."""
        if not known(value):
            return self("missing")
        text = f"{abs(value):,.{digits}f}"
        if float(text.replace(",", "")) == 0:
            return text
        return (MINUS if value < 0 else "+" if sign else "") + text

    def count(self, value: Any) -> str:
        """A whole number with thousands separated."""
        return self.number(value, 0)

    def percent(self, value: Any, digits: int = 1) -> str:
        """A fraction as percent."""
        return f"{self.number(value * 100, digits)}{THIN}%" if known(value) else self("missing")

    def points(self, value: Any, digits: int = 1, sign: bool = True) -> str:
        """A difference of two fractions, in percentage points."""
        return self("unit.points", x=self.number(value * 100, digits, sign)) if known(value) else self("missing")

    def ratio(self, value: Any) -> str:
        """A ratio, with the sign of multiplication."""
        return f"{self.number(value, 2 if value >= 0.095 else 3)}{THIN}×" if known(value) else self("missing")

    def ms(self, value: Any) -> str:
        """Milliseconds, three significant digits."""
        return f"{self.number(value, significant(value))}{THIN}ms" if known(value) else self("missing")

    def unit(self, value: Any, unit: str) -> str:
        """A number of three significant digits with its unit, if it has one."""
        return (
            f"{self.number(value, significant(value))}{THIN if unit else ''}{unit}" if known(value) else self("missing")
        )

    def duration(self, seconds: Any) -> str:
        """A time a person can picture: 41 s, 12 min 30 s, 3 h 05 min."""
        if not known(seconds):
            return self("missing")
        if seconds < 10:
            return self("unit.seconds", s=self.number(seconds, 1))
        whole = round(seconds)
        if whole < 60:
            return self("unit.seconds", s=whole)
        if whole < 3600:
            return self("unit.minutes", m=whole // 60, s=f"{whole % 60:02d}")
        minutes = round(seconds / 60)
        return self("unit.hours_minutes", h=f"{minutes // 60:,}", m=f"{minutes % 60:02d}")

    def hours(self, value: Any) -> str:
        """Hours, three significant digits."""
        return self("unit.hours", h=self.number(value, significant(value))) if known(value) else self("missing")

    def money(self, value: Any, currency: str) -> str:
        """An amount: the currency's sign close to the number, its letters or none with a space."""
        if not known(value):
            return self("missing")
        amount = self.number(value, 0 if abs(value) >= 100 else 2)
        return amount if not currency else f"{currency}{THIN if currency[-1].isalpha() else ''}{amount}"

    def between(self, low: str, high: str) -> str:
        """An interval of two numbers that are already written."""
        return self("unit.between", low=low, high=high)

    def interval(self, low: Any, high: Any, kind: str, marks: Sequence[float] = ()) -> str:
        """An interval with as many digits as keep its ends on their side of every mark (zero, the margin, one).

        Args:
            low: lower end.
            high: upper end.
            kind: "percent", "points", "ratio", "hours", or a number of digits such as "3".
            marks: values that an end must not be rounded to or across.
        """
        if not (known(low) and known(high)):
            return self("missing")
        if kind == "hours":
            return self.between(self.number(low, significant(low)), self.hours(high))
        if kind == "ratio":
            digits = decimals((low, high), marks, 2 if low >= 0.095 else 3)
            return self.between(self.number(low, digits), f"{self.number(high, digits)}{THIN}×")
        if kind == "points":
            digits = decimals((low * 100, high * 100), [mark * 100 for mark in marks], 1)
            return self("unit.between_signed", low=self.number(low * 100, digits, True), high=self.points(high, digits))
        if kind == "percent":
            return self.between(self.number(low * 100, 1), self.percent(high))
        return self.between(self.number(low, int(kind)), self.number(high, int(kind)))

    def p_value(self, value: Any) -> str:
        """A p-value: three digits, or "< 0.001"."""
        if not known(value):
            return self("missing")
        return "<\u00a00.001" if value < 0.001 else self.number(value, 3)

    def metric(self, name: str) -> str:
        """The name of a metric in this language."""
        return self.get(f"metric.{name}", name)

    def score(self, name: str, value: Any) -> str:
        """A metric's value: AUROC as a number of three digits, all others in percent."""
        return self.number(value, 3) if name == "auroc" else self.percent(value)

    def arm(self, name: str) -> str:
        """The name of an arm in this language."""
        return self._name if name == "mrl" and self._name else self.own_arm(name)

    def own_arm(self, name: str) -> str:
        """The same, but `mrl` is always MRL."""
        return self._table.get(f"arm.{name}", name)

    def listed(self, items: list[str], most: int = 8) -> str:
        """A short list in a sentence; past `most` it says how many more."""
        shown = self("unit.comma").join(items[:most])
        return shown if len(items) <= most else self("unit.and_more", items=shown, n=self.count(len(items) - most))


def known(value: Any) -> bool:
    """Whether a value is a finite number.

    Example:
        >>> known(0.0), known(None), known(float("nan"))
        (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def decimals(values: Sequence[float], marks: Sequence[float], least: int) -> int:
    """The fewest digits, at most 4, with which values stay apart, and each on its side of every mark.

    Example:
        >>> decimals([0.04, 2.0], [0.0], 1), decimals([0.4, 2.0], [0.0], 1)
        (2, 1)
    """
    for digits in range(least, 5):
        shown = [round(value, digits) for value in values]
        apart = len(set(shown)) == len(set(values))
        if apart and all(
            (v > m) == (s > m) and (v < m) == (s < m) for v, s in zip(values, shown, strict=True) for m in marks
        ):
            return digits
    return 4


def significant(value: float, digits: int = 3) -> int:
    """The decimals that leave `digits` significant digits.

    Example:
        >>> significant(12.34), significant(0.1234), significant(1234.0)
        (1, 3, 0)
    """
    return 0 if value == 0 else min(6, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def table(lang: str) -> dict[str, str]:
    """All texts of a language by their dotted keys.

    Example:
        >>> sorted(table("en")) == sorted(table("ja"))
        True
    """
    return dict(_table(lang))


@functools.cache
def _table(lang: str) -> dict[str, str]:
    text = resources.files("mrl.report").joinpath("lang", f"{lang}.json").read_text(encoding="utf-8")
    return _flat(json.loads(text), "")


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def fields(text: str) -> set[str]:
    """The names in a text's braces; both languages must have the same.

    Example:
        >>> sorted(fields("{a} of {b}"))
        ['a', 'b']
    """
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}
