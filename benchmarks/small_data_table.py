"""The section "Found" of `docs/small_data.md`, made from the result files; nothing in it is typed by hand.

`python benchmarks/small_data_table.py benchmarks/small_data docs/small_data.md` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mrl.run import read_json, writing

BEGIN, END = "<!-- made by benchmarks/small_data_table.py -->", "<!-- end of what is made -->"


def span(found: dict[str, Any], digits: int = 1, factor: float = 100.0, sign: str = "") -> str:
    """ "81.3 (79.7 to 82.9)", or the estimate alone where not all folds are there."""
    keys = ("estimate", "low", "high") if found["low"] is not None else ("estimate",)
    estimate, *ends = (f"{factor * found[key]:{sign}.{digits}f}" for key in keys)
    return f"{estimate} ({ends[0]} to {ends[1]})" if ends else f"{estimate} (no interval)"


def networks(result: dict[str, Any]) -> list[str]:
    """A line a network: what it is, what it costs, the rate that was chosen for it."""
    lines = [
        "| network | what it is | parameters, millions | GMACs an image | peak learning rate |",
        "|---|---|---|---|---|",
    ]
    for name, about in result["about"].items():
        cost, rate = result["cost"][name], result["settings"]["rates"][name]
        lines.append(f"| {name} | {about} | {cost['params_m']:.1f} | {cost['gmacs']:.2f} | {rate:g} |")
    return lines


def scores(result: dict[str, Any]) -> list[str]:
    """A line a size and network: scores, differences to the first network, gaps, convergence."""
    found, aurocs, speed = result["accuracy"], result["auroc"], result["updates_to_95"]
    first = next(iter(result["about"]))
    lines = [
        f"| training images | network | accuracy, % | difference to {first}, points | AUROC | generalisation gap, points | updates to 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in found["sizes"]:
        share = f"{size['share']:g}"
        for name, score in size["arms"].items():
            gap = size["differences"].get(name)
            auroc = aurocs.get(name, {}).get(share)
            cells = [
                f"{size['n_train']:,.0f} ({100 * size['share']:g} %)",
                name,
                span(score),
                span(gap, sign="+") if gap else "",
                span(auroc, 3, 1.0) if auroc else "",
                "" if score["gap"] is None else f"{100 * score['gap']:+.1f}",
                f"{speed[name][share]['median']:.0f} ({min(speed[name][share]['of'])} to {max(speed[name][share]['of'])})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def seen(result: dict[str, Any]) -> str:
    """Which intervals of a difference exclude 0, in one sentence."""
    first = next(iter(result["about"]))
    gaps = [(size, name, gap) for size in result["accuracy"]["sizes"] for name, gap in size["differences"].items()]
    gaps = [(size, name, gap) for size, name, gap in gaps if gap["low"] is not None]
    out = [(size, name, gap) for size, name, gap in gaps if gap["low"] > 0 or gap["high"] < 0]
    if not out:
        return f"None of the {len(gaps)} intervals of a difference to {first} excludes 0."
    said = [
        f"{name} is {'above' if gap['low'] > 0 else 'below'} {first} with {size['n_train']:,.0f} images"
        for size, name, gap in out
    ]
    return f"{len(out)} of the {len(gaps)} intervals of a difference to {first} exclude 0: {'; '.join(said)}."


def section(results: Path) -> str:
    """The Markdown between the two marks: both tables of every machine."""
    lines = [BEGIN, ""]
    for path in sorted(results.glob("*.json")):
        result = read_json(path)
        facts, settings = result["environment"], result["settings"]
        versions = ", ".join(f"{k} {v}" for k, v in facts["libraries"].items() if k in ("torch", "timm"))
        lines += [
            f"{facts['gpu'] or facts['cpu']}, {settings['precision']}; {versions}; {facts['os']}; {settings['updates']} updates of "
            f"{settings['batch_size']} images at {settings['image_size']} px, {settings['folds']} of {settings['k']} folds.",
            "",
            *networks(result),
            "",
            *scores(result),
            "",
            seen(result),
            "",
        ]
    return "\n".join([*lines, END])


def write_section(results: Path, page: Path) -> Path:
    """Puts the section between the marks of the page.

    Args:
        results: folder with a JSON file for each machine.
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
