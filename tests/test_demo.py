"""What `make demo` left in runs/demo: `make test-demo`."""

import json
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "runs" / "demo"
pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def report():
    return json.loads((RUN / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", ["report.html", "report.json", "model.onnx", "protocol.yaml", "split.csv", "audit.json"]
)
def test_demo__leaves_its_files(name):
    assert (RUN / name).stat().st_size > 100


def test_demo__both_arms_reach_the_accuracy_that_these_weights_allow(report):
    for arm in ("baseline", "mrl"):
        assert report["arms"][arm]["metrics"]["accuracy"] >= 0.84
        assert report["arms"][arm]["n"] == 656


def test_demo__the_decision_follows_from_the_verdicts(report):
    quality, cost = report["verdict"]["quality"], report["verdict"]["cost"]
    go = (quality == "superior" and cost != "slower") or (
        quality in ("equivalent", "non-inferior") and cost == "faster"
    )
    no_go = quality == "inferior" or (cost == "slower" and quality != "superior")
    assert report["decision"] == ("go" if go else "no-go" if no_go else "inconclusive")
    assert report["exported_arm"] == ("mrl" if go else "baseline")


def test_demo__the_report_opens_in_chromium_without_the_network():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1800})
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((RUN / "report.html").as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert page.locator("svg").count() >= 3
        assert page.locator("h1").first.is_visible()
        browser.close()
