"""`make bench`: blocks and networks against the literal formulas and against timm's networks, on this machine.

Every suite writes `benchmarks/results/<device>/<suite>.json`; the table in `docs/performance.md` is made from those
files. Rows of a group are interleaved, so their ratios are of one run; the yardstick of every group is the literal form
of mrl_13 in eager float32 (or what the group says).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import literal
from mrl.blocks import RegionalLocalMixer
from mrl.macs import count
from mrl.run import environment, progress, say, write_json
from mrl.stats import ratio_of_medians
from mrl.timing import interleave, summary, warm_up
from subjects import DTYPES, OURS, PEERS, Call, NotRunError, as_call, build
from table import write_table

RESULTS = Path(__file__).parent / "results"
SEED = 0
Rows = list[dict[str, Any]]


class Plan:
    """How long and where a bench runs.

    Args:
        device: "cpu" or "cuda".
        blocks: rounds through the arms of a group.
        quick: tiny sizes, to see that everything runs; its numbers mean nothing.
    """

    def __init__(self, device: str = "cpu", blocks: int = 15, quick: bool = False) -> None:
        self.device, self.blocks, self.quick = device, 2 if quick else blocks, quick
        self.size, self.side = (64, 128) if quick else (224, 1024)

    def images(self, batch: int, size: int) -> Tensor:
        """Normal noise, the same every time."""
        draw = torch.Generator().manual_seed(SEED)
        return torch.randn(batch, 3, size, size, generator=draw).to(self.device)


def gemm_gflops(device: str, dtype: torch.dtype, side: int = 1024) -> float:
    """The rate of a large matrix product here, in 1e9 multiplications and additions a second: the roofline."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / float(np.median(times)) / 1e9


def timed(plan: Plan, arms: Mapping[str, tuple[Call, dict[str, Any]]], yardstick: str, batch: int = 1) -> Rows:
    """Interleaves the arms; a row for each, with its latency as a share of the yardstick's.

    Args:
        plan: how long.
        arms: {name: (call, facts that stand in the row)}.
        yardstick: one of the names.
        batch: images a call.
    """
    for call, _ in arms.values():
        warm_up(call, seconds=0.1 if plan.quick else 1.0)
    times = interleave({name: call for name, (call, _) in arms.items()}, blocks=plan.blocks, calls_per_block=2)
    base, rows = np.asarray(times[yardstick]), []
    for name, (_, facts) in arms.items():
        ratio = ratio_of_medians(base, np.asarray(times[name]), seed=SEED)
        share = {"estimate": ratio.estimate, "low": ratio.low, "high": ratio.high}
        row = {"subject": name, "batch": batch, **facts, **summary(times[name], batch), "latency_ratio": share}
        if facts.get("gmacs") and facts.get("gemm_gflops"):
            row["share_of_gemm_rate"] = 2e3 * batch * facts["gmacs"] / row["latency_ms_median"] / facts["gemm_gflops"]
        rows.append({**row, "yardstick": yardstick})
    return rows


def group(
    plan: Plan,
    subjects: list[tuple[str, str, str, str]],
    *,
    batch: int = 1,
    size: int | None = None,
    yardstick: str | None = None,
) -> Rows:
    """One group of networks: (name, form, runtime, precision) each; what cannot run is a row that says why."""
    size = size or plan.size
    images = plan.images(batch, size)
    rates = {p: gemm_gflops(plan.device, DTYPES[p], plan.side) for p in sorted({row[3] for row in subjects})}
    arms: dict[str, tuple[Call, dict[str, Any]]] = {}
    failed = []
    for name, form, runtime, precision in subjects:
        facts = {"network": name, "form": form, "runtime": runtime, "precision": precision, "image_size": size}
        label = f"{name} {form} {runtime} {precision}"
        try:
            model = build(name, size, form)
            cost = count(build(name, size), size)
            facts |= {"params_m": cost.params_m, "gmacs": cost.gmacs, "gemm_gflops": rates[precision]}
            arms[label] = as_call(model, images, runtime, precision, f"{name}-{form}"), facts
        except NotRunError as reason:
            failed.append({"subject": label, "batch": batch, **facts, "not_run": str(reason)})
    return timed(plan, arms, yardstick or next(iter(arms)), batch) + failed


def networks(plan: Plan) -> Rows:
    """Batch 1 at 224 x 224, a group for each runtime and number format; the literal form is in every one."""
    rows: Rows = []
    base = ("literal", "plain", "eager", "fp32")
    peers, own = (PEERS[2:3], OURS[:1]) if plan.quick else (PEERS, OURS)
    kinds = [("eager", "fp32"), ("eager", "bf16"), ("compile", "fp32"), ("compile", "bf16")]
    if plan.device == "cpu":
        kinds += [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]
    else:
        kinds += [("graphs", "fp32"), ("graphs", "bf16")]
    for runtime, precision in kinds[:1] + kinds[-1:] if plan.quick else kinds:
        forms = ("plain", "folded") if runtime == "eager" else ("folded",)
        ours = [(name, form, runtime, precision) for name in own for form in forms]
        others = [(name, "plain", runtime, precision) for name in peers]
        if runtime == "compile":  # a minute each
            ours, others = ours[:1], []
        rows += [{**row, "group": f"{runtime} {precision}"} for row in group(plan, [base, *ours, *others])]
    return rows


def resolution(plan: Plan) -> Rows:
    """Batch 1 from 224 to 1,024 pixels, eager; the yardstick is ViT-S/16 of the same size and format."""
    rows: Rows = []
    sizes = (64, 96) if plan.quick else (224, 384, 512, 768, 1024)
    vit = [("vit_small_patch16_224", "plain"), ("vit_small + mrl", "plain")]
    rest = [(name, "folded") for name in OURS] + [("swin_tiny_patch4_window7_224", "plain"), ("convnext_tiny", "plain")]
    for size in sizes:
        short = Plan(plan.device, 15 if size < 600 else 5, plan.quick)
        subjects = [(n, f, "eager", "fp32") for n, f in (vit if plan.quick else vit + rest)]
        rows += [{**row, "group": "eager fp32"} for row in group(short, subjects, size=size)]
    for size in () if plan.quick else (224, 448, 1024):
        short = Plan(plan.device, 15 if size < 600 else 5)
        subjects = [(n, f, "eager", "bf16") for n, f in vit]
        rows += [{**row, "group": "eager bf16"} for row in group(short, subjects, size=size)]
    return rows


def batches(plan: Plan) -> Rows:
    """224 x 224 at several batch sizes, eager; the yardstick is Swin-T at the same batch size."""
    rows: Rows = []
    subjects = [("swin_tiny_patch4_window7_224", "plain"), ("convnext_tiny", "plain"), *((n, "folded") for n in OURS)]
    for precision in ("fp32", "bf16"):
        for batch in (1, 2) if plan.quick else (1, 4, 16, 64):
            short = Plan(plan.device, 15 if batch < 16 else 3, plan.quick)
            arms = [(n, f, "eager", precision) for n, f in (subjects[2:3] if plan.quick else subjects)]
            found = group(short, arms, batch=batch)
            rows += [{**row, "group": f"eager {precision}"} for row in found]
    return rows


STAGES = {"stage 1": (64, 1, 4, 1, 56), "stage 2": (192, 3, 4, 3, 28), "stage 3": (384, 6, 2, 6, 14)}


def mixers(plan: Plan) -> Rows:
    """One mixer of each stage of mrl_13, batch 1 and 16, inference: literal, plain and folded."""
    rows: Rows = []
    rate = gemm_gflops(plan.device, torch.float32, plan.side)
    for (stage, (dim, heads, region, local, side)), batch in (
        (s, b) for s in STAGES.items() for b in ((1,) if plan.quick else (1, 16))
    ):
        written = literal.Mixer(dim, heads, region, local).to(plan.device).eval()
        x = plan.images(batch, side)[:, :1].permute(0, 2, 3, 1).repeat(1, 1, 1, dim)
        arms = {"literal": (_forward(written, x.flatten(1, 2), side), {"gemm_gflops": rate})}
        for qkv in ("separate", "common"):
            for form in ("plain", "folded"):
                mixer = RegionalLocalMixer(dim, heads, region, local, qkv=qkv, scale=dim**-0.5).to(plan.device).eval()
                gmacs = _gmacs(mixer, x[:1])
                arms[f"{qkv} {form}"] = (
                    _forward(mixer.fold_() if form == "folded" else mixer, x),
                    {"gmacs": gmacs, "gemm_gflops": rate},
                )
        group_name = {"group": f"{stage}: C {dim}, {side} x {side}, r {region}", "precision": "fp32"}
        rows += [{**row, **group_name} for row in timed(plan, arms, "literal", batch)]
    return rows


def training(plan: Plan) -> Rows:
    """Forward and backward: bytes kept and time of one mixer (C 192, 56 x 56, r 4), and of whole networks, batch 8."""
    side, batch = (16, 2) if plan.quick else (56, 8)
    x = torch.randn(batch, side, side, 192, device=plan.device, requires_grad=True)
    flat = x.detach().flatten(1, 2).requires_grad_()
    written = literal.Mixer(192, 3, 4, 3).to(plan.device)
    ours = {name: RegionalLocalMixer(192, 3, 4, 3, scale=192**-0.5).to(plan.device) for name in ("ours", "recomputing")}
    ours["recomputing"].set_grad_checkpointing()
    runs = {"literal": (written, lambda: written(flat, side))}
    runs |= {name: (mixer, lambda mixer=mixer: mixer(x)) for name, mixer in ours.items()}
    arms = {
        name: (_step(run), {"bytes_for_backward": saved_bytes(run, mixer.parameters())})
        for name, (mixer, run) in runs.items()
    }
    label = f"mixer: C 192, {side} x {side}, r 4, batch {batch}"
    rows = [{**row, "group": label, "precision": "fp32"} for row in timed(plan, arms, "literal", batch)]
    images = plan.images(2 if plan.quick else 8, 64 if plan.quick else 224)
    arms = {}
    for name in (
        ("literal", "mrl_13") if plan.quick else ("literal", *OURS, "swin_tiny_patch4_window7_224", "convnext_tiny")
    ):
        model = build(name).to(plan.device).train()
        arms[name] = _step(lambda model=model: model(images)), {}
        arms[name][1]["bytes_for_backward"] = saved_bytes(lambda model=model: model(images), model.parameters())
    short = Plan(plan.device, 5, plan.quick)
    label = f"networks: batch {len(images)}, {images.shape[-1]} x {images.shape[-1]}"
    return rows + [{**row, "group": label, "precision": "fp32"} for row in timed(short, arms, "literal", len(images))]


def saved_bytes(run: Callable[[], Tensor], parameters: Any) -> int:
    """Bytes that autograd keeps for the backward pass: each storage once, parameters left out."""
    own, seen = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(seen.values())


def _forward(module: nn.Module, *inputs: Any) -> Call:
    def call(index: int) -> None:
        with torch.inference_mode():
            module(*inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def _step(run: Callable[[], Tensor]) -> Call:
    def call(index: int) -> None:
        run().sum().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def _gmacs(module: nn.Module, x: Tensor) -> float:
    from mrl.macs import count_call

    return count_call(module, x) / 1e9


SUITES: dict[str, Callable[[Plan], Rows]] = {
    "mixers": mixers,
    "training": training,
    "networks": networks,
    "resolution": resolution,
    "batches": batches,
}


def device_slug(device: str) -> str:
    """The folder of this machine's results.

    Example:
        device_slug("cpu") -> "amd-epyc-2-threads"
    """
    facts = environment()
    name = f"{facts['cpu']} {facts['threads']} threads" if device == "cpu" else str(facts["gpu"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_suites(names: list[str], plan: Plan, out: Path) -> None:
    """Runs the suites one after the other and writes a file for each."""
    with progress("bench", len(names)) as advance:
        for name in names:
            start = time.monotonic()
            rows = SUITES[name](plan)
            about = {"schema": 1, "suite": name, "what": (SUITES[name].__doc__ or "").strip(), "seed": SEED}
            about |= {"date": datetime.now(UTC).date().isoformat(), "quick": plan.quick, "device": plan.device}
            seconds = round(time.monotonic() - start, 1)
            write_json(out / f"{name}.json", {**about, "seconds": seconds, "environment": environment(), "rows": rows})
            advance(1, f"{name}: {seconds:.0f} s")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SUITES, default=list(SUITES), help="suites to run; all without it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? no table is written")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")
    told = parser.parse_args(argv)
    out = told.out or RESULTS / device_slug(told.device)
    torch.manual_seed(SEED)
    run_suites(told.only, Plan(told.device, quick=told.quick), out)
    if not told.quick:
        say(f"table: {write_table(RESULTS, Path(__file__).parents[1] / 'docs' / 'performance.md')}")


if __name__ == "__main__":
    main(sys.argv[1:])
