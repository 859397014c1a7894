"""The house: levels, sizes of files, quiet imports, true words."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mrl"
LEVELS = [
    ["errors"],
    ["run"],
    ["blocks", "ranks", "fsdp", "tracking", "executor"],
    ["checkpoint", "ddp"],
    ["macs", "timing", "precision"],
    ["models"],
    ["swap", "data", "stats", "scores"],
    ["probe", "testing"],
    ["tasks"],
    ["protocol"],
    ["fit_config", "optimizer", "mixing", "features"],
    ["tuned"],
    ["fit_loop"],
    ["fit_fixed"],
    ["fit"],
    ["arms"],
    ["evaluate"],
    ["decision", "pairs", "memory", "family"],
    ["compared"],
    ["compare"],
    ["compare_folds"],
    ["deploy"],
    ["export", "cold", "journal", "door"],
    ["measure", "predictor"],
    ["side_by_side", "explain", "serve"],
    ["predict"],
    ["report"],
    ["workspace", "request"],
    ["measure_page"],
    ["steps", "results"],
    ["folds"],
    ["curve"],
    ["tuning", "launched"],
    ["tune"],
    ["poc"],
    ["deploy_commands", "tune_commands"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mrl":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mrl.")}
    return found


@pytest.mark.parametrize(
    "path", [f for f in FILES if f != SOURCE / "__init__.py"], ids=lambda p: p.relative_to(SOURCE).as_posix()
)
def test_levels__imports_go_down_only(path):
    own = part_of(path)
    for other in imported(path) - {own}:
        assert other in LEVEL, f"{other} has no level yet; add it to LEVELS"
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_size__files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def test_import__is_quick_and_quiet():
    code = (
        "import time, sys; import timm; t = time.perf_counter(); import mrl; print(time.perf_counter() - t);"
        "heavy = {'onnxruntime', 'optuna', 'plotly', 'pandas', 'sklearn', 'accelerate', 'onnx', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 3
    assert done.stderr == ""


def test_public_names__all_resolve():
    import mrl

    assert all(getattr(mrl, name) is not None for name in mrl.__all__)
    assert len(mrl.__all__) <= 25
    with pytest.raises(AttributeError, match="no attribute"):
        mrl.nothing  # noqa: B018
