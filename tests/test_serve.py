"""`mrl serve` on a real socket: the same answers as `mrl.Predictor`, 4xx for what is wrong, no door without a token."""

import base64
import http.client
import io
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import uvicorn
from PIL import Image
from torch import nn

from mrl.cli import main
from mrl.data import Preprocess
from mrl.errors import ConfigError
from mrl.export import export_model
from mrl.predictor import Predictor
from mrl.serve import Limits, check_address, make_app, read_token
from test_predict import bomb

TOKEN = "a-token-of-24-characters"


def photo(seed, size=(40, 50), kind="png"):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def wide():
    """A small file of 600,000 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1000, 600)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    net = timm.create_model("test_mrl", num_classes=3)
    nn.init.normal_(net.get_classifier().weight, std=1.0)
    path = tmp_path_factory.mktemp("served") / "model.onnx"
    given = {
        "preprocess": Preprocess((32, 32)),
        "classes": ["good", "crack", "stain"],
        "images": torch.randn(9, 3, 32, 32),
    }
    export_model(net, path, **given)
    return Predictor(path)


class Client:
    """A server in a thread, and requests to it."""

    def __init__(self, model, token=None, limits=None):
        app = make_app(model, token=token, limits=limits or Limits(body_mb=0.2, megapixels=0.5, images=4))
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def __call__(self, method, path, body=None, headers=None, connection=None):
        one = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        one.request(method, path, body, headers or {})
        answer = one.getresponse()
        data = answer.read()
        if connection is None:
            one.close()
        return answer.status, json.loads(data) if data[:1] in (b"{", b"[") else data

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def client(model):
    found = Client(model)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def locked(model):
    found = Client(model, TOKEN)
    yield found
    found.stop()


def infer_body(*images, **more):
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}
    return json.dumps({"id": "7", "inputs": [{**tensor, **more}]})


def test_serve__one_image_as_the_predictor_answers(client, model):
    expected = model(photo(1))
    status, found = client("POST", "/predict", photo(1))
    assert (status, found["prediction"]) == (200, expected.prediction)
    assert list(found["probabilities"]) == list(model.classes)
    assert np.allclose(list(found["probabilities"].values()), expected.probabilities, atol=1e-6)


def test_serve__open_inference_protocol(client, model):
    images = [photo(i) for i in range(3)]
    status, found = client("POST", "/v2/models/mrl/infer", infer_body(*images))
    assert (status, found["id"], found["model_name"]) == (200, "7", "mrl")
    outputs = {o["name"]: o for o in found["outputs"]}
    expected = model.predict(images)
    assert outputs["prediction"]["data"] == [answer.prediction for answer in expected]
    assert outputs["probabilities"]["shape"] == [3, 3]
    flat = np.concatenate([answer.probabilities for answer in expected])
    assert np.allclose(outputs["probabilities"]["data"], flat, atol=1e-6)
    status, about = client("GET", "/v2/models/mrl")
    assert (about["classes"], about["platform"], about["proved"]) == (list(model.classes), "mrl_onnx", True)
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/mrl/ready"):
        assert client("GET", path)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("POST", "/predict", b"", 400, "empty"),
        ("POST", "/predict", b"no image", 422, "is not an image"),
        ("POST", "/predict", photo(1)[:200], 422, "truncated"),
        ("POST", "/predict", bytes(300_000), 413, "larger than 0.2 MB"),
        ("POST", "/predict", wide(), 413, "pixels"),
        ("POST", "/predict", bomb(), 413, "pixels"),
        ("POST", "/predict", bomb(10_000), 413, "pixels"),
        ("POST", "/v2/models/mrl/infer", b"{", 400, "is not what is expected"),
        ("POST", "/v2/models/mrl/infer", b"[" * 50_000, 400, "is not what is expected"),
        ("POST", "/v2/models/mrl/infer", b'{"inputs": []}', 400, "is not what is expected"),
        ("POST", "/v2/models/mrl/infer", infer_body(photo(1), datatype="FP32"), 400, "is not what is expected"),
        ("POST", "/v2/models/mrl/infer", infer_body(photo(1), data=["%%"]), 400, "is not what is expected"),
        ("POST", "/v2/models/mrl/infer", infer_body(photo(1), shape=[5]), 400, "is not what is expected"),
        ("POST", "/v2/models/mrl/infer", infer_body(photo(1), shape="x"), 400, "is not what is expected"),
        (
            "POST",
            "/v2/models/mrl/infer",
            infer_body(photo(1)).replace('"7"', '"\\ud800"'),
            400,
            "is not what is expected",
        ),
        ("POST", "/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "is not an image"),
        ("GET", "/v2/models/other/ready", None, 404, "one model"),
        ("POST", "/v2/models/mrl/infer", infer_body(), 400, "send 1 to 4"),
        ("POST", "/v2/models/mrl/infer", infer_body(*[b"x"] * 5), 413, "send 1 to 4"),
        ("POST", "/v2/models/mrl/infer", infer_body(photo(1), b"no image"), 422, "image 1: "),
        ("POST", "/v2/models/other/infer", infer_body(photo(1)), 404, "one model"),
        ("GET", "/v2/models/other", None, 404, "one model"),
        ("GET", "/predict", None, 405, None),
        ("GET", "/etc/passwd", None, 404, None),
    ],
)
def test_serve__what_is_wrong_gets_4xx_and_the_reason(client, method, path, body, status, reason):
    found = client(method, path, body)
    assert found[0] == status
    if reason:
        assert reason in found[1]["error"]
    assert client("POST", "/predict", photo(1))[0] == 200  # it still answers


@pytest.mark.parametrize("shown", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"])
def test_serve__without_the_token_401(locked, shown):
    headers = {} if shown is None else {"Authorization": shown.encode("latin-1")}
    for method, path in (
        ("POST", "/predict"),
        ("GET", "/v2"),
        ("GET", "/v2/models/mrl"),
        ("POST", "/v2/models/mrl/infer"),
    ):
        assert locked(method, path, photo(1) if method == "POST" else None, headers)[0] == 401
    assert locked("GET", "/v2/health/live")[0] == 200
    assert locked("POST", "/predict", photo(1), {"Authorization": f"Bearer {TOKEN}"})[0] == 200


def test_serve__no_address_without_a_token(monkeypatch, tmp_path, model, capsys):
    monkeypatch.delenv("MRL_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        check_address(host, None)
    for host in ("0.0.0.0", "::", "192.168.0.4", "factory.example", ""):
        with pytest.raises(ConfigError, match="others can reach it"):
            check_address(host, None)
        check_address(host, TOKEN)
    (tmp_path / "t").write_text(TOKEN + "\n")
    assert read_token(tmp_path / "t") == TOKEN
    (tmp_path / "short").write_text("abc")
    for bad in ("short", "gone"):
        with pytest.raises(ConfigError, match=r"16 characters|cannot be read"):
            read_token(tmp_path / bad)
    monkeypatch.setenv("MRL_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    monkeypatch.delenv("MRL_TOKEN")
    assert main(["serve", "model.onnx", "--host", "0.0.0.0"]) == 1
    assert "others can reach it" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "none.onnx")]) == 1
    assert "not found" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "model.onnx", "--token", TOKEN])  # never as an argument


@pytest.mark.parametrize(
    "token", ["a token with some spaces", "schlüssel-mit-umlauten-drin", "line\nbreak-and-more-letters"]
)
def test_read_token__what_a_header_cannot_carry(token, monkeypatch):
    monkeypatch.setenv("MRL_TOKEN", token)
    with pytest.raises(ConfigError, match="the token has spaces or letters that HTTP does not carry"):
        read_token(None)
    monkeypatch.setenv("MRL_TOKEN", f" {TOKEN}\n")
    assert read_token(None) == TOKEN


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("body_mb", float("inf"), "--body-mb inf: has to be a number above 0"),
        ("wait_ms", -1, "--wait-ms -1: has to be"),
        ("megapixels", 200, "--megapixels 200: larger images are not opened; use at most 89"),
    ],
)
def test_limits__what_they_may_be(name, value, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**{name: value})


def test_serve__a_port_that_is_taken_is_one_sentence(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mrl.serve.Predictor", lambda *a, **k: model)
    monkeypatch.delenv("MRL_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "model.onnx", "--port", port]) == 1
    said = capsys.readouterr().err
    assert f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use); use a free port" in said
    assert "serving" not in said


def test_serve__a_client_that_goes_away_leaves_no_trace(client, monkeypatch):
    logged, listener = [], logging.Handler()
    listener.emit = logged.append
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [listener])
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", client.port)) as one:
            one.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n\r\nhalf")
    with socket.create_connection(("127.0.0.1", client.port)) as one:
        one.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n")
        assert b" 400 " in one.recv(100)
    assert client("POST", "/predict", photo(1))[0] == 200
    time.sleep(0.2)
    assert logged == []


def load(client, clients, seconds):
    """Every client asks again and again over one connection: latencies in ms, and everything that was not 200."""
    body, end = photo(1), time.monotonic() + seconds

    def one(_):
        connection, times, wrong = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30), [], []
        while time.monotonic() < end:
            start = time.perf_counter()
            status, _ = client("POST", "/predict", body, connection=connection)
            times.append((time.perf_counter() - start) * 1e3)
            if status != 200:
                wrong.append(status)
        connection.close()
        return times, wrong

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, range(clients)))
    return np.concatenate([times for times, _ in found]), [status for _, wrong in found for status in wrong]


@pytest.mark.parametrize(("clients", "seconds"), [(8, 2), pytest.param(32, 60, marks=pytest.mark.slow)])
def test_serve__load(client, clients, seconds):
    times, wrong = load(client, clients, seconds)
    assert wrong == []
    assert len(times) > 20 * seconds
    p50, p99 = np.percentile(times, [50, 99])
    assert p99 < 5_000
    print(f"{clients} clients, {seconds} s: {len(times)} answers, median {p50:.1f} ms, p99 {p99:.1f} ms, no error")


def test_serve__more_than_can_wait_is_503(model, monkeypatch):
    monkeypatch.setattr("mrl.serve.WAITING", 1)

    class Slow:
        classes, preprocess, proof, runtime = model.classes, model.preprocess, model.proof, model.runtime
        prepare = staticmethod(model.prepare)

        @staticmethod
        def probabilities(images):
            time.sleep(0.5)
            return model.probabilities(images)

    client = Client(Slow(), limits=Limits(batch=1, wait_ms=0))
    try:
        with ThreadPoolExecutor(12) as pool:
            found = [status for status, _ in pool.map(lambda _: client("POST", "/predict", photo(1)), range(12))]
        assert set(found) == {200, 503}
    finally:
        client.stop()
