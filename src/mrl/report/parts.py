"""What a page is made of: paragraphs, tables, figures, lists. A section gives parts; one template draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrl.report.collect import RunFiles
from mrl.report.words import Words, known

SECTIONS = (
    "audit",
    "split",
    "scores",
    "curves",
    "curve",
    "confusion",
    "recall",
    "disagree",
    "latency",
    "size",
    "training",
    "plan",
    "statistics",
    "protocol",
    "environment",
    "glossary",
)


@dataclass(frozen=True)
class View:
    """What every section sees: the files, `report.json`'s content, the words, and the price of an hour."""

    run: RunFiles
    data: Mapping[str, Any]
    words: Words
    price_per_hour: float | None = None
    currency: str = ""

    def arm(self, arm: str) -> Mapping[str, Any]:
        """An arm's numbers as in `report.json`."""
        return self.data["arms"][arm]

    @property
    def home(self) -> str:
        """The folder inside the run where the arms lie that are measured and exported; "" is the run itself."""
        return self.run.home

    @property
    def sections(self) -> list[str]:
        """The sections of this page, in their order: all, but the one on `mrl curve` where it did not run."""
        return [key for key in SECTIONS if key != "curve" or self.run.curve]

    def number(self, section: str) -> int:
        """The number of a section in the page."""
        return self.sections.index(section) + 1

    @property
    def featured(self) -> str:
        """The arm that stands in the place of `mrl`."""
        return self.run.featured

    def name(self, arm: str) -> str:
        """The name of an arm of a run, whichever is featured."""
        return self.words.own_arm(arm)

    def colour(self, arm: str) -> str:
        """As which arm it is drawn: the featured one as `mrl`; "" is neither of the two."""
        return "baseline" if arm == "baseline" else "mrl" if arm == self.featured else ""

    def level_of(self, alpha: float) -> str:
        """The level of intervals at this alpha."""
        whole = abs(100 * alpha - round(100 * alpha)) < 1e-9
        return self.words.percent(1 - alpha, 0 if whole else 2)

    @property
    def level(self) -> str:
        """The level of the intervals, "95 %"."""
        return self.words.percent(1 - self.data["alpha"], 0)

    @property
    def metric(self) -> str:
        """The primary metric's name in the page's language."""
        return self.words.metric(self.data["metric"])

    @property
    def margin(self) -> str:
        """The margin in points."""
        return self.words.points(self.data["margin"], sign=False)

    def absent(self, file: str) -> Part:
        """A paragraph that says that a file is not there, and what writes it."""
        words = self.words
        return note(words("absent", file=file, todo=words.get(f"absent_todo.{file}", "")).strip())

    def size(self, value: Any) -> str:
        """An image size: one number where it is square."""
        if isinstance(value, (list, tuple)):
            return str(value[0]) if len(set(value)) == 1 else " × ".join(map(str, value))
        return str(value) if value is not None else self.words("missing")

    def how(self, row: Mapping[str, Any]) -> dict[str, str]:
        """How a row of `measure.json` was measured, each as text: backend, precision, batch, size, threads, blocks."""
        words = self.words
        texts = {key: row.get(key) for key in ("precision", "batch", "threads")} | {"blocks": row.get("n_blocks")}
        shown = {key: "?" if value is None else str(value) for key, value in texts.items()}
        backend = words.get(f"backend.{row.get('backend')}", str(row.get("backend") or words("missing")))
        return {**shown, "backend": backend, "size": self.size(row.get("image_size"))}


@dataclass(frozen=True)
class Part:
    """A piece of a section; `kind` names the macro of the template that draws it."""

    kind: str
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A numbered section: the one sentence to take away, and its parts."""

    key: str
    say: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Cell:
    """A table's cell with more than text: a small bar, a second line, a name somebody else gave, or words in English."""

    text: str
    bar: str = ""
    sub: str = ""
    name: bool = False
    strong: bool = False
    foreign: bool = False


def name(text: Any) -> Cell:
    """A cell with a name that comes from the user's data (a file, a class): escaped and kept apart from the words."""
    return Cell(str(text), name=True)


def text(words: str) -> Part:
    """A paragraph."""
    return Part("text", {"text": words})


def note(words: str) -> Part:
    """A paragraph that must not be missed."""
    return Part("note", {"text": words})


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    align: str = "",
    *,
    foot: str = "",
    width: str = "",
) -> Part:
    """A table of texts, cells or parts; `align` has a letter a column (l, r, c), `width` is "narrow", "medium" or all."""
    align = (align or "l" + "r" * (len(head) - 1)).ljust(len(head), "l")
    return Part("table", {"caption": caption, "head": head, "rows": rows, "align": align, "foot": foot, "width": width})


def figure(svg: str, caption: str, *, more: Part | None = None, foot: str = "") -> Part:
    """A figure with its caption; `more` is a table with its numbers, folded away."""
    return Part("figure", {"svg": svg, "caption": caption, "more": more, "foot": foot})


def side_by_side(*parts: Part) -> Part:
    """Parts in columns where the page is wide enough."""
    return Part("columns", {"parts": parts})


def folded(summary: str, *parts: Part) -> Part:
    """Parts that open at a click (print leaves them closed)."""
    return Part("folded", {"summary": summary, "parts": parts})


def capped(words: Words, rows: Sequence[Any], most: int, file: str) -> tuple[list[Any], str]:
    """The first `most` rows, and a sentence where to find the others.

    Example:
        >>> capped(Words("en"), [1, 2, 3], 2, "audit.json")
        ([1, 2], '1 more in audit.json')
    """
    kept = list(rows[:most])
    return kept, words("more_in", n=words.count(len(rows) - most), file=file) if len(rows) > most else ""


def hours(words: Words, found: Mapping[str, Any] | None) -> Cell:
    """Hours for a million images, with the interval below."""
    if not found or not known(found.get("estimate")):
        return Cell(words("missing"))
    low, high = found.get("low"), found.get("high")
    return Cell(
        words.hours(found["estimate"]), sub=words.interval(low, high, "hours") if known(low) and known(high) else ""
    )


def machine(environment: Mapping[str, Any]) -> str:
    """A machine in a few words.

    Example:
        >>> machine({"cpu": "Some CPU", "threads": 2, "gpu": None})
        'Some CPU'
    """
    return " + ".join(str(environment[key]) for key in ("cpu", "gpu") if environment.get(key)) or "?"


def quotient(a: Any, b: Any) -> float | None:
    """One number of a table divided by another, where both are there."""
    return a / b if known(a) and known(b) and b else None
