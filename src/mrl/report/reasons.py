"""The reasons of the decision and the warnings of the run, said in the page's language.

Other modules write them in English. A reason comes with a key and the texts that fill it; a warning is only a sentence,
and is found again by the English table, whose texts serve as patterns. What is not found stays English and is marked.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping
from typing import Any

from mrl.report.parts import Cell, View
from mrl.report.words import MINUS, Words, table


def reasons(view: View) -> list[dict[str, Any]]:
    """The reasons as sentences; `foreign` marks one that exists in English only."""
    said = []
    for i, english in enumerate(view.data["reasons"]):
        keys = view.data["reason_keys"]
        item = keys[i] if i < len(keys) and isinstance(keys[i], Mapping) else {}
        key = f"reason.{item.get('key')}"
        if view.words.has(key):
            said.append({"text": _sentence(view, key, item.get("params") or {}), "foreign": False})
        else:
            said.append({"text": english, "foreign": view.words.lang != "en"})
    return said


def _sentence(view: View, key: str, params: Mapping[str, Any]) -> str:
    words, verdict, row = view.words, view.data["verdict"], view.run.decisive()
    texts = {name: _minus(str(value)) for name, value in params.items()}
    where = ""
    if texts.get("where"):
        where = words("latency.at", **view.how(row))
    own = {
        "metric": view.metric,
        "quality": words.get(f"quality.{verdict['quality']}", ""),
        "said": words.get(f"cost.{verdict['cost']}", ""),
        "cost": words.get(f"cost.{verdict['cost']}", ""),
        "where": where,
    }
    sentence = words(key, **{**texts, **own})
    return sentence[:1].upper() + sentence[1:]


def _minus(text: str) -> str:
    return MINUS + text[1:] if re.fullmatch(r"-[\d.,]+", text) else text


def warnings(view: View, without: str = "") -> list[dict[str, Any]]:
    """The warnings of the run as sentences; one whose key is `without` is left out."""
    found = [said(view.words, text) for text in view.data["warnings"]]
    return [item for item in found if not without or item["key"] != f"warning.{without}"]


def said(words: Words, english: str) -> dict[str, Any]:
    """A warning in the page's language; `foreign` marks one that exists in English only.

    Example:
        >>> said(Words("ja"), "something that no table has")["foreign"]
        True
    """
    found = translated(words, english)
    if words.lang == "en":
        found["text"] = english[:1].upper() + english[1:] + ("" if english.endswith(".") else ".")
    return found


def translated(words: Words, english: str) -> dict[str, Any]:
    """What another module says, in the page's language: {"text", "foreign", "key"}.

    Example:
        >>> translated(Words("en"), "the file is empty")["key"]
        'warning.empty'
    """
    of_arm = re.fullmatch(r"Arm ([A-Za-z0-9_-]+): (.+)", english, re.DOTALL)
    if of_arm:
        found = translated(words, of_arm[2])
        return {**found, "text": words("arms.of_arm", arm=words.own_arm(of_arm[1]), text=found["text"])}
    for key, pattern in _patterns().items():
        found = pattern.fullmatch(english)
        if found:
            texts = {name: _term(words, text) for name, text in found.groupdict().items()}
            return {"text": english if words.lang == "en" else words(key, **texts), "foreign": False, "key": key}
    return {"text": english, "foreign": words.lang != "en", "key": ""}


def _term(words: Words, text: str) -> str:
    """An arm, a metric or a verdict in the page's language; anything else as it is."""
    if text in ("baseline", "mrl"):
        return words.own_arm(text)
    for key in (f"metric.{text.replace(' ', '_')}", f"quality.{text}"):
        if words.has(key):
            return words(key)
    return text


def said_cell(words: Words, english: Any) -> Cell:
    """A table's cell with what another module says."""
    found = translated(words, str(english or ""))
    return Cell(found["text"], foreign=found["foreign"] and bool(found["text"]))


@functools.cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """The English warnings as patterns: every brace matches whatever stands there."""
    found = {}
    for key, text in table("en").items():
        if key.startswith("warning."):
            pieces = string.Formatter().parse(text)
            pattern = "".join(
                re.escape(literal) + (f"(?P<{name}>.+?)" if name else "") for literal, name, _, _ in pieces
            )
            found[key] = re.compile(pattern, re.DOTALL)
    return found
