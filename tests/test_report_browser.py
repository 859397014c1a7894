"""The report in a real Chromium: it draws, asks for nothing, fits the screen, a telephone and a sheet of paper."""

import re
import shutil

import pytest
from playwright.sync_api import sync_playwright

from mrl.report import report
from run_folder import build_run, replace_json

pytestmark = pytest.mark.browser

DECISIONS = ("go", "no-go", "inconclusive")
WORDS = {("go", "en"): "GO", ("no-go", "en"): "NO-GO", ("inconclusive", "en"): "INCONCLUSIVE"}
WORDS |= {("go", "ja"): "GO", ("no-go", "ja"): "NO-GO", ("inconclusive", "ja"): "判断保留"}
CASES = [(decision, lang) for decision in DECISIONS for lang in ("en", "ja")]
LONG = (
    "A warning that is as long as warnings become when they name the images, the reason and what to do about it, twice."
)


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "no Chromium on this machine: apt-get install chromium fonts-noto-cjk"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{(decision, language): the page}, and under "worst" pages with all that can stand on page one at once."""
    found = {}
    for decision in DECISIONS:
        out = build_run(tmp_path_factory.mktemp("run"), decision)
        worst = decision == "no-go"
        for lang in ("en", "ja"):
            path = report(out, lang=lang, overwrite=True)
            found[decision, lang] = path.rename(path.with_name(f"{lang}.html"))
        if worst:
            replace_json(out / "audit.json", lambda a: a.update(warnings=[f"{i}. {LONG}" for i in range(9)]))
            replace_json(out / "measure.json", lambda m: m.update(protocol_sha256="0" * 64))
            for lang in ("en", "ja"):
                path = report(out, lang=lang, overwrite=True, price_per_hour=1234.5, currency="JPY")
                found["worst", lang] = path.rename(path.with_name(f"worst_{lang}.html"))
    return found


@pytest.fixture
def visit(browser):
    """Opens a file and records what the page complains of and asks for."""
    opened = []

    def open_page(path, width=1280, height=900):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(path.as_uri())
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()


@pytest.mark.parametrize("case", CASES)
def test_page__asks_for_nothing_and_complains_of_nothing(visit, files, case):
    page = visit(files[case])
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith("data:")] == [files[case].as_uri()]


def test_page__policy_forbids_the_network(visit, files):
    page = visit(files["go", "en"])
    blocked = page.evaluate(
        """() => new Promise(done => {
            document.addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));
            const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image);
        })"""
    )
    assert blocked == "img-src"


@pytest.mark.parametrize("width", [1280, 800, 390])
@pytest.mark.parametrize("case", [*CASES, ("worst", "en"), ("worst", "ja")])
def test_page__no_sideways_scrolling(visit, files, case, width):
    page = visit(files[case], width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    wide, there = page.evaluate("[document.scrollingElement.scrollWidth, document.scrollingElement.clientWidth]")
    assert wide <= there
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('#front *')].map(e => e.getBoundingClientRect().right))"
    )
    assert right <= there + 1


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("case", CASES)
def test_front__decision_is_seen_at_once(visit, files, case, width):
    page = visit(files[case], width=width, height=844)
    word = page.locator("#decision")
    assert WORDS[case] in word.inner_text()
    box = word.bounding_box()
    assert box["y"] + box["height"] < 844
    assert page.locator("h1").is_visible()
    assert page.locator("#front .row").count() == 3


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_figures__are_drawn_and_nothing_sticks_out(visit, files, lang):
    page = visit(files["go", lang])
    sizes = page.eval_on_selector_all(
        "svg[role=img]", "all => all.map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height])"
    )
    assert len(sizes) >= 8
    assert min(width for width, _ in sizes) > 250
    assert min(height for _, height in sizes) > 30
    outside = page.evaluate(
        """() => [...document.querySelectorAll('svg[role=img] > text')].filter(text => {
            const own = text.getBBox(), all = text.ownerSVGElement.viewBox.baseVal;
            return own.x < -2 || own.y < -2 || own.x + own.width > all.width + 2 || own.y + own.height > all.height + 2;
        }).map(text => text.textContent)"""
    )
    assert outside == []
    shown = page.eval_on_selector_all("img", "all => all.map(e => e.naturalWidth)")
    assert len(shown) == 24
    assert min(shown) > 0


def test_figures__tell_their_numbers_under_the_pointer(visit, files):
    page = visit(files["go", "en"])
    group = page.locator("#curves g.hit").nth(5)
    tip = group.locator("g.tip")
    assert tip.evaluate("e => getComputedStyle(e).visibility") == "hidden"
    group.locator("rect.hitbox").hover()
    assert tip.evaluate("e => getComputedStyle(e).visibility") == "visible"
    assert "update" in tip.text_content()


@pytest.mark.parametrize("case", [*CASES, ("worst", "en"), ("worst", "ja")])
def test_front__prints_on_one_sheet_of_a4(visit, files, case):
    page = visit(files[case])
    assert _sheets(page) > 5
    page.add_style_tag(content=".detail, .end { display: none; }")
    assert _sheets(page) == 1


def _sheets(page):
    return len(re.findall(rb"/Type /Page\b", page.pdf(prefer_css_page_size=True)))


@pytest.mark.parametrize("case", CASES)
def test_front__colours_can_be_read(visit, files, case):
    page = visit(files[case])
    pairs = page.evaluate(
        """() => [...document.querySelectorAll('#front .word, #front .chip, #front .hint, #front .sub, .fine')].map(e => {
            const own = getComputedStyle(e), back = own.backgroundColor;
            return [own.color, back === 'rgba(0, 0, 0, 0)' ? 'rgb(255, 255, 255)' : back];
        })"""
    )
    assert len(pairs) > 6
    assert min(_contrast(*pair) for pair in pairs) >= 4.5


def _contrast(front, back):
    """WCAG's contrast of two CSS colours."""

    def light(colour):
        parts = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((light(front), light(back)), reverse=True)
    return (high + 0.05) / (low + 0.05)
