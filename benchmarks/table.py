"""The tables of `docs/performance.md`, made from the result files; nothing in it is typed by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mrl.run import read_json, writing

INTRO = """# Performance

Made by `make bench` from `benchmarks/results/`; do not edit. Every number is a median of calls that were interleaved with
the other rows of its group, so the ratios of a group come from one run. `x faster` is the yardstick's latency over the
row's, with a 95 % percentile bootstrap interval over rounds; the yardstick is the row marked *. `of GEMM rate` is the
share of a 1,024 x 1,024 matrix product's rate, measured before the group, that the network's multiply-adds reach: 1 would
be the limit of a machine that does nothing but multiply. Inputs are random numbers and weights are not trained: these are
costs, not qualities. "literal" is `benchmarks/literal.py`, the formulas of the paper one after the other; "folded" is
after `fold_()`.
"""
TITLES = {
    "mixers": "One mixer, inference",
    "training": "Training: forward and backward",
    "networks": "Networks at 224 x 224, batch 1",
    "resolution": "Cost against resolution, batch 1",
    "batches": "Cost against batch size, 224 x 224",
}


def faster(row: dict[str, Any]) -> str:
    """ "1.80 x (1.75 to 1.86)"."""
    share = row["latency_ratio"]
    if row["subject"] == row["yardstick"]:
        return "1 *"
    return f"{1 / share['estimate']:.2f} x ({1 / share['high']:.2f} to {1 / share['low']:.2f})"


def cells(suite: str, row: dict[str, Any]) -> list[str]:
    """One line of a table."""
    name = row.get("network", row["subject"])
    name = f"{name}, folded" if row.get("form") == "folded" else name
    where = {"resolution": str(row.get("image_size", "")), "batches": str(row["batch"]), "mixers": str(row["batch"])}
    first = [where[suite]] if suite in where else []
    if "not_run" in row:
        return [*first, name, row["not_run"], "", "", ""]
    time = f"{row['latency_ms_median']:.{1 if row['latency_ms_median'] > 10 else 2}f}"
    tail = f"{row['latency_ms_p95']:.{1 if row['latency_ms_p95'] > 10 else 2}f}"
    if suite == "training":
        return [name, time, tail, faster(row), f"{row['bytes_for_backward'] / 1e6:.1f}"]
    share = f"{100 * row['share_of_gemm_rate']:.0f} %" if "share_of_gemm_rate" in row else ""
    return [*first, name, time, tail, faster(row), share]


def head(suite: str) -> list[str]:
    """The columns of a suite."""
    first = {"resolution": ["pixels"], "batches": ["batch"], "mixers": ["batch"]}.get(suite, [])
    last = "MB kept for backward" if suite == "training" else "of GEMM rate"
    return [*first, "what", "ms, median", "ms, p95", "faster than *", last]


def section(suite: str, result: dict[str, Any]) -> list[str]:
    """A suite's tables, one for each group."""
    lines = [f"### {TITLES.get(suite, suite)}", ""]
    rows = result["rows"]
    for group in dict.fromkeys(row["group"] for row in rows):
        names = head(suite)
        lines += [f"{group}:", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        lines += [f"| {' | '.join(cells(suite, row))} |" for row in rows if row["group"] == group]
        lines.append("")
    return lines


def write_table(results: Path, page: Path) -> Path:
    """Writes the page from every machine's result files.

    Args:
        results: folder of a folder for each machine.
        page: the Markdown file.
    """
    lines = [INTRO]
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        found = {suite: folder / f"{suite}.json" for suite in TITLES if (folder / f"{suite}.json").is_file()}
        data = {suite: read_json(path) for suite, path in found.items()}
        if not data:
            continue
        first = next(iter(data.values()))
        facts = first["environment"]
        versions = ", ".join(f"{k} {v}" for k, v in facts["libraries"].items() if k in ("torch", "timm", "onnxruntime"))
        dates = sorted({d["date"] for d in data.values()})
        lines += [f"## {facts['gpu'] or facts['cpu']}, {facts['threads']} threads", ""]
        lines += [f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {versions}; {facts['os']}.", ""]
        for suite, result in data.items():
            lines += section(suite, result)
    page.parent.mkdir(parents=True, exist_ok=True)
    with writing(page) as part:
        part.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


if __name__ == "__main__":
    print(write_table(Path(sys.argv[1]), Path(sys.argv[2])))
