"""What a torch.export archive may hold before torch opens it: tensors, a graph of known operators, our notes; no pickle."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError

TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
PLAIN = re.compile(
    r"data/(weights|constants)/model_\1_config\.json|models/model\.json|data/sample_inputs/model\.pt|extra/mrl\.json"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+"
)
OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)(\.\w+)+|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
QUOTED = re.compile(r"'\w+'")
WORDS = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "Piecewise"),
    *("FloorDiv", "CleanDiv", "CeilDiv", "PythonMod", "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "TruncToInt"),
    *("FloorToInt", "CeilToInt", "RoundToInt", "ToFloat", "IsNonOverlappingAndDenseIndicator", "Where", "Identity"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or", "Not"),
    *("positive", "integer", "nonnegative", "real", "finite", "negative", "evaluate", "precision"),
    *("True", "False", "true", "false", "oo", "int_oo", "inf"),
}


def check_archive(path: Path) -> None:
    """Raises ConfigError for a `.pt2` file with anything that `mrl export` does not write and that could run code.

    `torch.export.load` unpickles sample inputs, legacy weights, custom objects and any tensor that says so, loads compiled
    libraries, looks operators up by name in all of torch, and evaluates the expressions of sizes. A proof beside the file
    is no protection from whoever wrote both, so each of these is looked at first.

    Args:
        path: the archive.

    Raises:
        ConfigError: not an archive, damaged, or with pickles, other entries, operators or expressions.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            wrong = next(_wrong(archive, names), None)
    except Exception as error:  # zipfile, zlib and json raise nearly anything on a broken or crafted archive
        raise ConfigError(f"{path.name} is not a torch.export archive, or is damaged.") from error
    if wrong is not None:
        raise ConfigError(f"{path.name} has {wrong}, which can run any code; export it with `mrl export`.")


def _wrong(archive: zipfile.ZipFile, names: list[str]) -> Iterator[str]:
    """What must not be there, first thing first."""
    short = [name.partition("/")[2] for name in names]
    if len({name.partition("/")[0] for name in names}) != 1 or len(set(short)) != len(short):
        yield "files of more than one model"
    found = dict(zip(short, names, strict=True))
    for name in short:
        if not TENSORS.fullmatch(name) and not PLAIN.fullmatch(name):
            yield f"an entry {name!r}"
    inputs = found.get("data/sample_inputs/model.pt")
    if inputs is not None and archive.getinfo(inputs).file_size:
        yield "pickled sample inputs"
    for kind in ("weights", "constants"):
        table = found.get(f"data/{kind}/model_{kind}_config.json")
        if table is None:
            yield f"no table of {kind}, so pickled ones"
            continue
        for entry in json.loads(archive.read(table))["config"].values():
            if entry.get("use_pickle") is not False or not TENSORS.fullmatch(f"data/{kind}/{entry['path_name']}"):
                yield "pickled tensors"
    for key, text in _texts(json.loads(archive.read(found["models/model.json"]))):
        if key == "target" and text.startswith(("torch", "_operator", "math", "#")) and not OPERATORS.fullmatch(text):
            yield f"an operator {text!r}"
        if key == "expr_str" and not _is_size(text):
            yield f"an expression {text[:60]!r}"


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a JSON tree with the key that it stands under."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)


def _is_size(text: str) -> bool:
    """Whether an expression is made of sizes and arithmetic.

    Example:
        >>> _is_size("Mul(Integer(2), Symbol('s77', positive=True))"), _is_size("__import__('os')")
        (True, False)
    """
    bare = QUOTED.sub("", text)
    words = re.findall(r"[^\W\d]\w*", bare)
    fine = re.fullmatch(r"[\w\s(),=+\-*/<>.]*", bare) and not re.search(r"\.\s*[^\W\d]", bare)
    return bool(fine) and all(word in WORDS or re.fullmatch(r"[suz]f?\d+", word) for word in words)
