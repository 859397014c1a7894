"""`mrl serve`: the predictor behind HTTP, in the Open Inference Protocol (KServe v2), closed to the world unless there is a token."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import math
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
from mrl.data import header_of
from mrl.door import check_address, listen, read_token
from mrl.errors import ConfigError, DataError, MissingExtra
from mrl.predictor import Predictor

NAME = "mrl"
FARTHEST = 8  # times the largest body are read before the connection is cut
LARGEST = (Image.MAX_IMAGE_PIXELS or 1e9) / 1e6  # megapixels, Pillow's guard against decompression bombs
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
            flag = f"--{name.replace('_', '-')} {value}"
            if not 0 < value < math.inf and not (name == "wait_ms" and value == 0):
                raise ConfigError(f"{flag}: has to be a number above 0.")
            if name == "megapixels" and value > LARGEST:
                raise ConfigError(f"{flag}: larger images are not opened; use at most {LARGEST:.0f}.")


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
        try:
            header = header_of(data)
        except DataError as error:
            raise Refused(413, str(error)) from None
        if header is not None and header[0] * header[1] > self.limits.megapixels * 1e6:
            most = f"more than the {self.limits.megapixels:g} megapixels that are allowed"
            raise Refused(413, f"{header[0]} x {header[1]} pixels, {most}")
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
    input "image", datatype BYTES, whose data are image files in base64. `GET /v2`, `/v2/health/live`, `/v2/health/ready`,
    `/v2/models/mrl` and `/v2/models/mrl/ready` say what is there. With a token everything but the two health paths wants
    `Authorization: Bearer`.

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
        from starlette.routing import Route
    except ModuleNotFoundError as error:
        raise MissingExtra("mrl serve: its server is not installed; run `pip install mrl[serve]`.") from error
    service = Service(model, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        worker = asyncio.create_task(service.batcher.work())
        yield
        worker.cancel()
        service.batcher.readers.shutdown(wait=False)
        service.batcher.compute.shutdown(wait=False)

    routes = [
        Route("/v2/health/live", _guarded(service.live, None)),
        Route("/v2/health/ready", _guarded(service.ready, None)),
        Route("/v2", _guarded(service.server, token)),
        Route("/v2/models/{name}", _guarded(service.about, token)),
        Route("/v2/models/{name}/ready", _guarded(service.model_ready, token)),
        Route("/v2/models/{name}/infer", _guarded(service.infer, token), methods=["POST"]),
        Route("/predict", _guarded(service.predict, token), methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _guarded(handler: Any, token: str | None) -> Any:
    """A handler behind the token, whose refusals become answers."""
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse

    async def handle(request: Request) -> JSONResponse:
        try:
            if token is not None and not _allowed(request.headers.get("authorization", ""), token):
                raise Refused(401, "a token is needed: send Authorization: Bearer <token>")
            return JSONResponse(await handler(request))
        except Refused as refused:
            headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(refused.status)
            return JSONResponse({"error": str(refused)}, status_code=refused.status, headers=headers)
        except ClientDisconnect:  # nobody is there to hear it
            return JSONResponse({"error": "the request was cut off"}, status_code=400)

    return handle


class Service:
    """What the paths answer: each takes a request of Starlette and gives plain data.

    Args:
        model: an opened file.
        limits: of a request.
    """

    def __init__(self, model: Predictor, limits: Limits) -> None:
        self.model, self.limits, self.batcher = model, limits, Batcher(model, limits)

    async def live(self, request: Any) -> dict[str, Any]:
        """The process runs."""
        return {"live": True}

    async def ready(self, request: Any) -> dict[str, Any]:
        """The model is opened."""
        return {"ready": True}

    async def model_ready(self, request: Any) -> dict[str, Any]:
        """The model of this name is opened."""
        _known(request)
        return {"name": NAME, "ready": True}

    async def server(self, request: Any) -> dict[str, Any]:
        """Name and version."""
        return {"name": "mrl", "version": run.environment()["mrl"], "extensions": ["predict"]}

    async def about(self, request: Any) -> dict[str, Any]:
        """The model: tensors, classes, preprocessing, limits."""
        _known(request)
        model, k = self.model, len(self.model.classes)
        outputs = [("probabilities", "FP32", [-1, k]), ("prediction", "BYTES", [-1])]
        return {
            "name": NAME,
            "platform": f"mrl_{model.runtime.format}",
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": n, "datatype": d, "shape": s} for n, d, s in outputs],
            "classes": list(model.classes),
            "preprocess": model.preprocess.to_dict(),
            "limits": vars(self.limits),
            "proved": model.proof is not None,
        }

    async def predict(self, request: Any) -> dict[str, Any]:
        """One image file."""
        values = _finite(await self.batcher.answer(await self._body(request)))
        named = dict(zip(self.model.classes, map(float, values), strict=True))
        return {"prediction": self.model.classes[int(values.argmax())], "probabilities": named}

    async def infer(self, request: Any) -> dict[str, Any]:
        """The protocol's tensors."""
        _known(request)
        name, images = _inputs(await self._body(request), self.limits)
        found = await asyncio.gather(*(self.batcher.answer(image) for image in images), return_exceptions=True)
        for index, values in enumerate(found):
            if isinstance(values, Refused):
                raise Refused(values.status, f"image {index}: {values}")
            if isinstance(values, BaseException):
                raise values
        table = np.stack([_finite(values) for values in found])
        flat, named = table.ravel().tolist(), [self.model.classes[int(i)] for i in table.argmax(1)]
        outputs = [
            {"name": "probabilities", "datatype": "FP32", "shape": list(table.shape), "data": flat},
            {"name": "prediction", "datatype": "BYTES", "shape": [len(table)], "data": named},
        ]
        return {"model_name": NAME, "id": name, "outputs": outputs}

    async def _body(self, request: Any) -> bytes:
        """The body; what is too much is still read, not kept, so that the client hears why."""
        most = int(self.limits.body_mb * 1e6)
        told = request.headers.get("content-length", "")
        data, seen = bytearray(), 0
        if not told.isdigit() or int(told) <= FARTHEST * most:
            async for chunk in request.stream():
                seen += len(chunk)
                if seen <= most:
                    data += chunk
                elif seen > FARTHEST * most:
                    break
        if seen > most or (told.isdigit() and int(told) > most):
            raise Refused(413, f"the body is larger than {self.limits.body_mb:g} MB")
        if not data:
            raise Refused(400, "the body is empty; send an image")
        return bytes(data)


def _allowed(header: str, token: str) -> bool:
    kind, _, shown = header.partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), token.encode())


def _known(request: Any) -> None:
    """Raises Refused for another model's name."""
    if request.path_params["name"] != NAME:
        raise Refused(404, f"there is one model here, {NAME}")


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
        name.encode()  # a lone surrogate cannot be sent back
        if math.prod(given.get("shape", [len(images)])) != len(images):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
        shape = '{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [n], "data": [base64, ...]}]}'
        raise Refused(400, f"the body is not what is expected: {shape}") from None
    if not 1 <= len(images) <= limits.images:
        raise Refused(400 if not images else 413, f"{len(images)} images; send 1 to {limits.images}")
    return name, images


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
        ConfigError: an address without a token, a port that is out of range or taken, or a file that is not one of `mrl export`.
        ParityError: the file has no proof, or is not the one that was proved equal.
        MissingExtra: the server is not installed.
    """
    token = read_token(token_file)
    check_address(host, token)
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: use 1 to 65535.")
    app = make_app(Predictor(model_file, unproved=unproved, threads=threads), token=token, limits=limits)
    import uvicorn

    listening = listen(host, port)
    locked = "with its token" if token else "from this machine"
    run.say(f"serving {Path(model_file).name} on http://{host}:{port} ({locked}); stop it with Ctrl-C.")
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
