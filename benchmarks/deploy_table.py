"""The section "Measured" of `docs/deploy.md`, made from the result files; nothing in it is typed by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mrl.run import read_json, writing

BEGIN, END = "<!-- made by make bench-deploy -->", "<!-- end of what is made -->"


def span(found: dict[str, Any], factor: float = 1.0, digits: int = 2) -> str:
    """ "1.80 (1.75 to 1.86)"."""
    estimate, low, high = (f"{factor * found[key]:.{digits}f}" for key in ("estimate", "low", "high"))
    return f"{estimate} ({low} to {high})"


def agreement(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """One line a model and size, the worst of its batches."""
    lines = []
    for name, size in dict.fromkeys((row["model"], row["image_size"]) for row in part["rows"]):
        rows = [row for row in part["rows"] if (row["model"], row["image_size"]) == (name, size)]
        worst, changed = (
            max(row["max_abs_diff"] for row in rows),
            max(max(r["decisions_changed"].values()) for r in rows),
        )
        batches = ", ".join(str(row["batch"]) for row in rows)
        asked = f"PyTorch, ONNX Runtime and OpenVINO agree: {name}, {size} px, {rows[0]['n_images']} images of ELPV, batch {batches}"
        lines.append((asked, f"{worst:.1e} apart at most, {changed} decisions differ", f"{part['tolerance']:.0e}"))
    return lines


def accuracy(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What int8 costs, and what the gate said."""
    drop, fp32 = part["drop"], part["fp32_accuracy"]
    said = "written" if part["written"] else "refused"
    asked = (
        f"int8 (OpenVINO) of mrl_13 trained on ELPV from scratch, {part['image_size']} px, {part['n']['test']} test images; "
        f"fp32 {span(fp32, 100, 1)} %, the larger class {100 * part['majority_share']:.1f} %"
    )
    found = f"drop {span(drop, 100)} points, {part['flips']} decisions changed: {said}"
    return [(asked, found, f"bound at most {100 * part['max_drop']:.1f}, or refused")]


def speed(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The literal form's latency over each form's."""
    first, *rest = part["rows"]
    asked = f"{first['subject']}, batch 1, {part['image_size']} px, {part['threads']} threads"
    lines = [(asked, f"{first['latency_ms_median']:.1f} ms", "")]
    for row in rest:
        share = row["latency_ratio"]
        times = {"estimate": 1 / share["estimate"], "low": 1 / share["high"], "high": 1 / share["low"]}
        wanted = f"{part['wanted']:.0f} times" if row["subject"] == part["int8"] else ""
        found = f"{row['latency_ms_median']:.1f} ms, {span(times)} times faster in the same run"
        lines.append((row["subject"], found, wanted))
    return lines


def serve(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The load test."""
    asked = (
        f"`mrl serve`, {part['model']} {part['precision']} at {part['image_size']} px: {part['clients']} clients on this machine, "
        f"{part['seconds']:.0f} s"
    )
    found = (
        f"{part['n_answers']:,} answers, {part['n_errors']} errors, {part['throughput_img_s']:.0f} images a second, "
        f"p50 {part['latency_ms_p50']:.0f} ms, p99 {part['latency_ms_p99']:.0f} ms"
    )
    return [(asked, found, "no error")]


def predict(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The long run."""
    asked = f"`mrl predict`, {part['n_images']:,} images, {part['model']} at {part['image_size']} px"
    found = (
        f"{part['predict_seconds']:.0f} s, {part['images_per_s']:.0f} images a second, resident memory "
        f"{part['memory_mb_first']:.0f} to {part['memory_mb_most']:.0f} MB ({100 * (part['growth'] - 1):+.1f} %)"
    )
    return [(asked, found, "under 600 s, at most +10 %")]


PARTS = {"agreement": agreement, "accuracy": accuracy, "speed": speed, "serve": serve, "predict": predict}


def section(results: Path) -> str:
    """The Markdown between the two marks: a table for each machine, a line for each number, with the date of its run."""
    lines = [BEGIN, ""]
    for path in sorted(results.glob("*/deploy.json")):
        parts = {name: part for name, part in read_json(path)["parts"].items() if name in PARTS}
        machine = next(iter(parts.values()))["environment"]
        versions = ", ".join(
            f"{k} {v}" for k, v in machine["libraries"].items() if k in ("torch", "onnxruntime", "openvino", "nncf")
        )
        lines += [
            f"{machine['cpu']}; {versions}; {machine['os']}.",
            "",
            "| what | found | wanted | date |",
            "|---|---|---|---|",
        ]
        for name in PARTS:
            if name in parts:
                lines += [f"| {' | '.join(line)} | {parts[name]['date']} |" for line in PARTS[name](parts[name])]
        lines.append("")
    return "\n".join([*lines, END])


def write_section(results: Path, page: Path) -> Path:
    """Puts the section between the marks of the page.

    Args:
        results: folder of a folder for each machine.
        page: the Markdown file, which has both marks.
    """
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    with writing(page) as part:
        part.write_text(before + section(results) + after, encoding="utf-8")
    return page


if __name__ == "__main__":
    print(write_section(Path(sys.argv[1]), Path(sys.argv[2])))
