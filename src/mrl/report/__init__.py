"""The report: a run folder in, `report.json` and one self-contained `report.html` out; computes nothing."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError
from mrl.report import cost, curve, front, quality, record
from mrl.report.collect import assemble, collect_report, read_run
from mrl.report.parts import Section, View
from mrl.report.seen import seen
from mrl.report.words import LANGUAGES, Words
from mrl.run import refuse_existing, write_json, writing

__all__ = ["LANGUAGES", "collect_report", "report"]

_BUILDERS: dict[str, Callable[[View], Section]] = {
    "audit": record.audit,
    "split": record.split,
    "scores": quality.scores,
    "curves": quality.learning,
    "curve": curve.by_images,
    "confusion": quality.confusion,
    "recall": quality.recall,
    "disagree": quality.disagree,
    "latency": cost.latency,
    "size": cost.size,
    "training": cost.training,
    "plan": cost.plan,
    "statistics": quality.statistics,
    "protocol": record.protocol,
    "environment": record.environment,
    "glossary": record.glossary,
}


def report(
    out: str | Path,
    *,
    lang: str = "en",
    price_per_hour: float | None = None,
    currency: str = "",
    overwrite: bool = False,
) -> Path:
    """Writes `report.json` and `report.html` into a run folder and returns the path of the page.

    The page is one file without scripts; its content security policy forbids every request, so it can be mailed and
    opened anywhere. Its first page prints on one sheet of A4.

    Args:
        out: a run folder whose arms were compared and measured.
        lang: "en" or "ja".
        price_per_hour: what an hour of this machine costs; with it the page says what a million images cost.
        currency: the sign or letters of that price, such as "€" or "JPY".
        overwrite: replace a report that is there.

    Raises:
        ConfigError: a wrong argument, a report that exists, or a file of the run that is not there.

    Example:
        >>> import tempfile
        >>> try:
        ...     report(tempfile.mkdtemp(), lang="fr")
        ... except ConfigError as error:
        ...     print(error)
        --lang fr: not a language of the report; choose one of en, ja.
    """
    words = Words(lang)
    if price_per_hour is not None and not (math.isfinite(price_per_hour) and price_per_hour >= 0):
        raise ConfigError(f"--price-per-hour {price_per_hour}: give a number of 0 or more.")
    out = Path(out)
    page = refuse_existing(out / "report.html", overwrite)
    refuse_existing(out / "report.json", overwrite)
    run = read_run(out)
    data = assemble(run)
    shown, told = seen(run, data)
    html = render(View(shown, told, words.of_arm(shown.featured), price_per_hour, currency))
    write_json(out / "report.json", data)
    with writing(page) as part:
        part.write_text(html, encoding="utf-8", errors="replace")
    return page


def render(view: View) -> str:
    """The page as HTML text."""
    sections = [_BUILDERS[key](view) for key in view.sections]
    context: dict[str, Any] = {"words": view.words, "front": front.front(view), "sections": sections, "style": _style()}
    return _environment().get_template("page.html.j2").render(context)


@functools.cache
def _environment() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("mrl.report", "templates")
    found = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    found.filters["code"] = _code
    return found


def _code(text: str) -> Any:
    """A text of the language files, escaped, with what stands between back ticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@functools.cache
def _style() -> str:
    return resources.files("mrl.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
