"""`mrl serve`: the predictor behind HTTP, in the Open Inference Protocol (KServe v2), closed to the world unless there is a token."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import io
import ipaddress
import json
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrl import run
from mrl.errors import ConfigError, MissingExtra
from mrl.predictor import Predictor

TOKEN = "MRL_TOKEN"
NAME = "mrl"
FARTHEST = 8  # times the largest body are read before the connection is cut
WAITING = 256  # images that may wait for their turn before the answer is 503


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        body_mb: of the request, in MB of 1e6 bytes.
        megapixels: of an image, as its header says before it is decoded.
        images: in one request.
        batch: images computed together.
        wait_ms: how long an image waits for others to be computed with.
    """

    body_mb: float = 16.0
    megapixels: float = 50.0
    images: int = 64
    batch: int = 8
    wait_ms: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0 and not (name == "wait_ms" and value == 0):
                raise ConfigError(f"--{name.replace('_', '-')} {value}: has to be above 0.")


class Refused(Exception):
    """A request that gets a 4xx or 503, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Batcher:
    """Answers images in batches: the first waits a moment for others, then they are computed together in one thread.

    Args:
        model: an opened file.
        limits: batch and wait_ms.
    """

    def __init__(self, model: Predictor, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.queue: asyncio.Queue[tuple[Tensor, asyncio.Future]] = asyncio.Queue(WAITING)
        self.readers = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="read")
        self.compute = ThreadPoolExecutor(1, thread_name_prefix="compute")

    async def answer(self, data: bytes) -> np.ndarray:
        """Probabilities (K,) of one encoded image.

        Raises:
            Refused: 413 too many pixels, 422 not an image, 503 too much to do.
        """
        loop = asyncio.get_running_loop()
        if self.queue.full():
            raise Refused(503, "too many images are waiting; try again in a second")
        prepared = await loop.run_in_executor(self.readers, self._prepare, data)
        future: asyncio.Future = loop.create_future()
        try:
            self.queue.put_nowait((prepared, future))
        except asyncio.QueueFull:
            raise Refused(503, "too many images are waiting; try again in a second") from None
        return await future

    def _prepare(self, data: bytes) -> Tensor:
        too_large = None
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
            pixels = image.width * image.height
            if pixels > self.limits.megapixels * 1e6:
                most = f"more than the {self.limits.megapixels:g} megapixels that are allowed"
                too_large = Refused(413, f"{image.width} x {image.height} pixels, {most}")
        if too_large is not None:
            raise too_large
        prepared = self.model.prepare(data)
        if isinstance(prepared, str):
            raise Refused(422, prepared)
        return prepared

    async def work(self) -> None:
        """Until cancelled: takes what waits, computes it, hands it out."""
        loop = asyncio.get_running_loop()
        while True:
            part = [await self.queue.get()]
            end = loop.time() + self.limits.wait_ms / 1e3
            while len(part) < self.limits.batch:
                left = end - loop.time()
                try:
                    part.append(
                        self.queue.get_nowait() if left <= 0 else await asyncio.wait_for(self.queue.get(), left)
                    )
                except (TimeoutError, asyncio.QueueEmpty):
                    break
            try:
                found = await loop.run_in_executor(self.compute, self._compute, [image for image, _ in part])
            except Exception as error:
                for _, future in part:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), values in zip(part, found, strict=True):
                if not future.done():
                    future.set_result(values)

    def _compute(self, images: list[Tensor]) -> np.ndarray:
        return self.model.probabilities(torch.stack(images))


def make_app(model: Predictor, *, token: str | None = None, limits: Limits | None = None) -> Any:
    """The ASGI application.

    `POST /predict` takes the bytes of one image file. `POST /v2/models/mrl/infer` takes the protocol's JSON with one
    input "image", datatype BYTES, whose data are image files in base64. `GET /v2`, `/v2/health/live`, `/v2/health/ready`
    and `/v2/models/mrl` say what is there. With a token everything but the two health paths wants `Authorization: Bearer`.

    Args:
        model: an opened file.
        token: what a client has to show; None lets everyone in.
        limits: of a request.

    Raises:
        MissingExtra: Starlette is not installed.

    Reference:
        Open Inference Protocol, version 2 (KServe).
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ModuleNotFoundError as error:
        raise MissingExtra("mrl serve: its server is not installed; run `pip install mrl[serve]`.") from error
    limits = limits or Limits()
    batcher = Batcher(model, limits)

    def guarded(handler: Any, *, secret: bool = True) -> Any:
        async def handle(request: Request) -> JSONResponse:
            try:
                if secret and token is not None and not _allowed(request.headers.get("authorization", ""), token):
                    raise Refused(401, "a token is needed: send Authorization: Bearer <token>")
                return JSONResponse(await handler(request))
            except Refused as refused:
                headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(refused.status)
                return JSONResponse({"error": str(refused)}, status_code=refused.status, headers=headers)

        return handle

    async def live(request: Request) -> dict[str, Any]:
        return {"live": True}

    async def ready(request: Request) -> dict[str, Any]:
        return {"ready": True}

    async def server(request: Request) -> dict[str, Any]:
        return {"name": "mrl", "version": run.environment()["mrl"], "extensions": ["predict"]}

    async def about(request: Request) -> dict[str, Any]:
        if request.path_params["name"] != NAME:
            raise Refused(404, f"there is one model here, {NAME}")
        k = len(model.classes)
        outputs = [("probabilities", "FP32", [-1, k]), ("prediction", "BYTES", [-1])]
        return {
            "name": NAME,
            "platform": f"mrl_{model.runtime.format}",
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": n, "datatype": d, "shape": s} for n, d, s in outputs],
            "classes": list(model.classes),
            "preprocess": model.preprocess.to_dict(),
            "limits": vars(limits),
            "proved": model.proof is not None,
        }

    async def body(request: Request) -> bytes:
        most = int(limits.body_mb * 1e6)
        told = request.headers.get("content-length", "")
        data, seen = bytearray(), 0
        if not told.isdigit() or int(told) <= FARTHEST * most:
            async for (
                chunk
            ) in request.stream():  # what is too much is still read, not kept, so that the client hears why
                seen += len(chunk)
                if seen <= most:
                    data += chunk
                elif seen > FARTHEST * most:
                    break
        if seen > most or (told.isdigit() and int(told) > most):
            raise Refused(413, f"the body is larger than {limits.body_mb:g} MB")
        if not data:
            raise Refused(400, "the body is empty; send an image")
        return bytes(data)

    async def predict(request: Request) -> dict[str, Any]:
        values = _finite(await batcher.answer(await body(request)))
        named = dict(zip(model.classes, map(float, values), strict=True))
        return {"prediction": model.classes[int(values.argmax())], "probabilities": named}

    async def infer(request: Request) -> dict[str, Any]:
        if request.path_params["name"] != NAME:
            raise Refused(404, f"there is one model here, {NAME}")
        name, images = _inputs(await body(request), limits)
        found = await asyncio.gather(*(batcher.answer(image) for image in images), return_exceptions=True)
        for index, values in enumerate(found):
            if isinstance(values, Refused):
                raise Refused(values.status, f"image {index}: {values}")
            if isinstance(values, BaseException):
                raise values
        table = np.stack([_finite(values) for values in found])
        outputs = [
            {"name": "probabilities", "datatype": "FP32", "shape": list(table.shape), "data": table.ravel().tolist()},
            {
                "name": "prediction",
                "datatype": "BYTES",
                "shape": [len(table)],
                "data": [model.classes[int(i)] for i in table.argmax(1)],
            },
        ]
        return {"model_name": NAME, "id": name, "outputs": outputs}

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()
        batcher.readers.shutdown(wait=False)
        batcher.compute.shutdown(wait=False)

    routes = [
        Route("/v2/health/live", guarded(live, secret=False)),
        Route("/v2/health/ready", guarded(ready, secret=False)),
        Route("/v2", guarded(server)),
        Route("/v2/models/{name}", guarded(about)),
        Route("/v2/models/{name}/infer", guarded(infer), methods=["POST"]),
        Route("/predict", guarded(predict), methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _allowed(header: str, token: str) -> bool:
    kind, _, shown = header.partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), token.encode())


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise Refused(422, "the answer is not finite")
    return values


def _inputs(data: bytes, limits: Limits) -> tuple[str, list[bytes]]:
    """The request's id and its images."""
    try:
        asked = json.loads(data)
        (given,) = asked["inputs"]
        texts = given["data"]
        if given["name"] != "image" or given["datatype"] != "BYTES" or not isinstance(texts, list):
            raise ValueError
        images = [base64.b64decode(text, validate=True) for text in texts]
        name = str(asked.get("id", ""))
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
        shape = '{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [n], "data": [base64, ...]}]}'
        raise Refused(400, f"the body is not what is expected: {shape}") from None
    if not 1 <= len(images) <= limits.images:
        raise Refused(400 if not images else 413, f"{len(images)} images; send 1 to {limits.images}")
    return name, images


def read_token(token_file: Path | str | None) -> str | None:
    """The token from a file, or from the environment variable MRL_TOKEN; None where there is none.

    Raises:
        ConfigError: the file is not there or empty, or the token is shorter than 16 characters.

    Example:
        >>> _ = os.environ.pop("MRL_TOKEN", None)
        >>> read_token(None) is None
        True
    """
    token = os.environ.get(TOKEN)
    if token_file is not None:
        try:
            token = Path(token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {token_file}: cannot be read ({error}).") from error
    if token is None:
        return None
    if len(token) < 16:
        raise ConfigError("the token is shorter than 16 characters; take a longer one, such as `openssl rand -hex 24`.")
    return token


def check_address(host: str, token: str | None) -> None:
    """Refuses an address that others can reach, without a token.

    Raises:
        ConfigError: such an address, or none at all.

    Example:
        >>> check_address("127.0.0.1", None)
        >>> check_address("0.0.0.0", None)
        Traceback (most recent call last):
        mrl.errors.ConfigError: --host 0.0.0.0: others can reach it; set MRL_TOKEN or --token-file, or use 127.0.0.1.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and token is None:
        raise ConfigError(f"--host {host}: others can reach it; set {TOKEN} or --token-file, or use 127.0.0.1.")


def serve(
    model_file: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | str | None = None,
    threads: int | None = None,
    unproved: bool = False,
    limits: Limits | None = None,
) -> None:
    """Serves an exported file over HTTP until it is stopped; see `make_app` for the paths.

    Args:
        model_file: a file of `mrl export`.
        host: an address of this machine; any but loopback needs a token.
        port: 1 to 65535.
        token_file: a file with the token; else it is read from the environment variable MRL_TOKEN.
        threads: for the work of one pass; None takes torch's number.
        unproved: use a file that has no proof of its equality beside it.
        limits: of a request.

    Raises:
        ConfigError: an address without a token, a port that is out of range, or a file that is not one of `mrl export`.
        ParityError: the file has no proof, or is not the one that was proved equal.
        MissingExtra: the server is not installed.
    """
    token = read_token(token_file)
    check_address(host, token)
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: use 1 to 65535.")
    app = make_app(Predictor(model_file, unproved=unproved, threads=threads), token=token, limits=limits)
    import uvicorn

    locked = "with its token" if token else "from this machine"
    run.say(f"serving {Path(model_file).name} on http://{host}:{port} ({locked}); stop it with Ctrl-C.")
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, server_header=False)
