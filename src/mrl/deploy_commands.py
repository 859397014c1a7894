"""The commands around an exported file: measure, export, predict, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mrl import results
from mrl.errors import ConfigError
from mrl.workspace import Workspace


def measure(
    models: list[str] | None = None,
    out: str = "",
    data: str | None = None,
    backend: list[str] | None = None,
    precision: list[str] | None = None,
    batch: list[int] | None = None,
    image_size: list[int] | None = None,
    threads: list[int] | None = None,
    seconds: float = 15.0,
    merge: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Measures models side by side, or the arms of a run, on this machine; writes measure.json, measure.html and a table.

    Args:
        models: files of mrl export, folders of mrl.save, run folders, timm names; the first is what others are compared with. Without any: the arms of the run in --out, as in its protocol.
        out: folder of the result, or the run folder.
        data: images to measure on: folder of class folders, CSV, or elpv.
        backend: eager, compile, onnxruntime, openvino.
        precision: fp32, fp16, bf16, int8.
        batch: images in a call.
        image_size: pixels along a side.
        threads: of a call; torch's number without it.
        seconds: about how long each case is timed.
        merge: the words are measure.json files of several machines, to be put together.
        seed: of the bootstrap.
        overwrite: measure again.
    """
    if not out:
        raise ConfigError("--out is missing: give the folder for the result, or a run folder.")
    if not models:
        results.measure_step(Workspace(out), overwrite=overwrite)
        return
    from mrl.measure_page import measure_models_step, merge_step, table

    if merge:
        found = merge_step(models, out, overwrite=overwrite)
    else:
        if data is None:
            raise ConfigError("--data is missing: latency is measured on real images; give a folder, a CSV, or elpv.")
        options = {"backends": backend or ["onnxruntime"], "precisions": precision or ["fp32"], "batches": batch or [1]}
        more = {"threads": threads or [], "seconds": seconds, "seed": seed, "overwrite": overwrite}
        found = measure_models_step(models, out, data=data, sizes=image_size or [224], **options, **more)
    print(table(found))


def export(
    out: str,
    arm: str | None = None,
    data: str | None = None,
    image_size: int | None = None,
    format: Literal["onnx", "openvino", "torch-export"] = "onnx",
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
    max_drop: float = 0.005,
    overwrite: bool = False,
) -> None:
    """Exports the chosen arm of a run, or a saved model, to a file in its folder: proved equal on real images or not written.

    Args:
        out: the run folder, or a folder of mrl.save.
        arm: of a run, baseline, mrl or another; without it the one that was decided for, else baseline.
        data: for a folder of mrl.save: labelled images that prove it, folder of class folders, CSV, or elpv.
        image_size: for a folder of mrl.save that does not say its own, in pixels.
        format: onnx, openvino or torch-export; other than onnx in fp32 it is OUT/model-FORMAT-PRECISION.
        precision: fp32 has to give the same numbers; below it the metric may drop by max_drop.
        max_drop: as a share; the one-sided 95 % bound of the drop counts.
        overwrite: replace a file that is there.
    """
    chosen = {"format": format, "precision": precision, "max_drop": max_drop, "overwrite": overwrite}
    if (Path(out) / "model.json").is_file():
        if data is None:
            raise ConfigError(f"--data is missing: {out} is a saved model; give labelled images that prove its export.")
        results.export_saved(out, data=data, image_size=image_size, **chosen)
    elif data is not None or image_size is not None:
        raise ConfigError("--data and --image-size are for a folder of mrl.save; a run has its own.")
    elif not (Path(out) / "protocol.yaml").is_file():
        raise ConfigError(f"{out}: is neither a run folder nor a folder of mrl.save; give one of them.")
    else:
        space = Workspace(out)
        space.alone = arm  # named by the user: a run may have no other arm fitted
        results.export_step(space, arm=arm, **chosen)


def predict(
    model: str,
    images: list[str],
    out: str,
    batch_size: int = 32,
    threads: int | None = None,
    explain: bool = False,
    unproved: bool = False,
    overwrite: bool = False,
) -> None:
    """Predicts images with an exported file, with exactly the preprocessing of training; writes a table.

    Args:
        model: a file of `mrl export`: .onnx, .xml or .pt2.
        images: folders, files, patterns, CSVs with a column `path`, or - for paths on standard input.
        out: the .csv, .jsonl or .parquet to write: image, prediction, p_<class>..., error; a killed run goes on.
        batch_size: images in a pass.
        threads: for the work of one pass; all cores without it.
        explain: also draw which regions of each picture the answer hangs on, in OUT_maps.
        unproved: use a file that has no proof of its equality beside it.
        overwrite: replace a table that is there.
    """
    from mrl.predict import predict as run_predict

    more = {"threads": threads, "explain": explain, "unproved": unproved, "overwrite": overwrite}
    run_predict(model, images, out, batch_size=batch_size, **more)


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | None = None,
    threads: int | None = None,
    body_mb: float = 16.0,
    megapixels: float = 50.0,
    batch: int = 8,
    wait_ms: float = 2.0,
    unproved: bool = False,
) -> None:
    """Answers images over HTTP with an exported file; from this machine only, unless there is a token in MRL_TOKEN or a file.

    Args:
        model: a file of `mrl export`: .onnx, .xml or .pt2.
        host: an address of this machine; any but loopback needs a token.
        port: 1 to 65535.
        token_file: file with the token; else the environment variable MRL_TOKEN.
        threads: for the work of one pass; all cores without it.
        body_mb: largest body of a request.
        megapixels: largest image.
        batch: images computed together.
        wait_ms: how long an image waits for others.
        unproved: use a file that has no proof of its equality beside it.
    """
    from mrl.serve import Limits
    from mrl.serve import serve as run_server

    limits = Limits(body_mb=body_mb, megapixels=megapixels, batch=batch, wait_ms=wait_ms)
    run_server(model, host=host, port=port, token_file=token_file, threads=threads, unproved=unproved, limits=limits)
