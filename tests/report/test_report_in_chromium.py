"""The page in a real browser: drawn, quiet, not wider than a telephone, in the scheme that the reader prefers."""

import math
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from dist_lm.report.charts import COLOURS
from dist_lm.report.page import write_report
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.readable import four_digits
from tests.patience import patient
from tests.report.made_runs import make_agent_run, make_corpora, make_pipeline, make_run, write_lines

pytestmark = pytest.mark.heavy
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEADLINE_MS = patient(120_000)
LOOKS = ("color", "backgroundColor")
# for every chart, the pixels of its canvas that have the colour of a curve of it
DRAWN = """() => [...document.querySelectorAll("figure.chart")].map((figure) => {
  const name = figure.querySelector(".name").textContent, canvas = figure.querySelector("canvas");
  if (!canvas) return [name, 0];
  const colours = [...figure.querySelectorAll(".legend .dot")].map((dot) =>
    getComputedStyle(dot).backgroundColor.match(/\\d+/g).map(Number));
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const near = (at) => colours.some((one) =>
    one.slice(0, 3).reduce((sum, part, i) => sum + Math.abs(pixels[at + i] - part), 0) < 24);
  let found = 0;
  for (let at = 0; at < pixels.length; at += 4) if (pixels[at + 3] > 200 && near(at)) found++;
  return [name, found];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not there: pip install dist_lm[dev]")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=DEADLINE_MS)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    work = make_pipeline(tmp_path_factory.mktemp("work"))
    return write_report([work.path], None, None)[0]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    work = WorkDirectory(tmp_path_factory.mktemp("compared"))
    runs = [
        make_run(work, "code", name, overrides=[f"stage.lr={lr}"]) for name, lr in (("slow", 1e-4), ("faster", 1e-3))
    ]
    return write_report([run.path for run in runs], work.path / "report.html", None)[0]


def opened(browser, path: Path, width: int = 1280, scheme: str = "light"):
    """The page with all groups open, and what it complained about or asked the network for."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(DEADLINE_MS)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    page.evaluate("document.querySelectorAll('details').forEach((group) => (group.open = true))")
    page.wait_for_function("[...document.querySelectorAll('figure.chart')].every((one) => one.querySelector('canvas'))")
    return page, trouble


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (400, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.bars),
        pytest.param(400, "light", marks=pytest.mark.bars),
    ],
)
def test_every_curve_is_drawn_in_silence_and_fits(browser, report, width, scheme):
    page, trouble = opened(browser, report, width, scheme)
    missing = [name for name, pixels in page.evaluate(DRAWN) if pixels < 20]
    assert not missing
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 127")
    assert light == (scheme == "light")
    assert page.title().endswith("dist_lm report"), "a sample has run as a script"
    assert trouble == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_conversations_fit_a_telephone_and_stay_text(browser, tmp_path, scheme):
    """Finds turns that are wider than the page, and text of a conversation that runs or loads something."""
    run = make_agent_run(WorkDirectory(tmp_path), iterations=1)
    page, trouble = opened(browser, write_report([run.path], None, None)[0], width=360, scheme=scheme)
    assert page.locator("details.conversation .turn.model").count() == 8
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.title() == "rlhf / agent · dist_lm report"
    colours = [page.locator(".turn pre").first.evaluate(f"(text) => getComputedStyle(text).{name}") for name in LOOKS]
    ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert abs(ink - paper) > 300, "text is readable on its ground"
    assert trouble == []
    page.close()


def test_a_value_reads_the_same_below_a_curve_and_in_words(browser, tmp_path):
    values = [2.31415, 0.000988, 1.2e-05, 0.0, 9412.4, 123456.0, 1.2345e6, 99.996, -3.25]  # the last in a second chart
    run = make_run(WorkDirectory(tmp_path), "code", steps=20)
    write_lines(
        run.metrics,
        ({"step": n, "time": n} | {f"train/grad_norm_{k}": v * n / 2 for k, v in enumerate(values)} for n in (1, 2)),
    )
    page, _ = opened(browser, write_report([run.path], None, None)[0])
    shown = page.locator("figure.chart .legend b").all_inner_texts()
    assert shown == [four_digits(value) for value in values]
    page.close()


def test_axes_and_values_follow_the_reader(browser, comparison):
    page, trouble = opened(browser, comparison)
    first = page.locator("figure.chart").first
    assert first.locator(".legend button").all_inner_texts()[0].startswith("slow")
    before = first.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
    page.click("[data-log=y]")
    assert first.locator("canvas").evaluate("(canvas) => canvas.toDataURL()") != before
    page.click("[data-log=x]")
    for axis, words in (("tokens", " tokens$"), ("hours", " (s|min|h)$"), ("step", "^step ")):
        page.click(f"[data-x={axis}]")
        first.locator(".u-over").hover(position={"x": 200, "y": 60})
        page.wait_for_function(
            "(words) => document.querySelector('figure.chart .at').textContent.match(words)", arg=words
        )
    assert not [name for name, pixels in page.evaluate(DRAWN) if pixels < 20]
    first.locator(".legend button").first.click()
    assert first.locator(".legend button").first.get_attribute("aria-pressed") == "false"
    assert trouble == []
    page.close()


def test_entries_of_a_legend_look_different(browser, tmp_path):
    work = WorkDirectory(tmp_path)
    runs = [make_run(work, "code", f"run{number:02}", steps=20) for number in range(COLOURS + 1)]
    page, _ = opened(browser, write_report([run.path for run in runs], tmp_path / "report.html", None)[0])
    looks = """() => [...document.querySelectorAll("figure.chart .legend")].map((legend) =>
      [...legend.querySelectorAll(".dot")].map((dot) => {
        const style = getComputedStyle(dot);
        return style.backgroundColor + style.maskImage;
      }))"""
    legends = page.evaluate(looks)
    # The runs of a metric need two charts, in which they look different too.
    assert [len(dots) for dots in legends[:2]] == [COLOURS, 1]
    assert len({*legends[0], *legends[1]}) == COLOURS + 1
    assert all(len(set(dots)) == len(dots) for dots in legends)
    page.close()


def test_a_change_of_scheme_is_followed_at_once(browser, report):
    page, _ = opened(browser, report)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 60")
    assert not [name for name, pixels in page.evaluate(DRAWN) if pixels < 20]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_slices_of_a_mixture_look_different(browser, tmp_path, scheme):
    work = WorkDirectory(tmp_path)
    make_corpora(work, {"code": {f"language{number:02}": 1000 * (number + 1) for number in range(13)}})
    run = make_run(work, "code", steps=20)
    page, _ = opened(browser, write_report([run.path], None, None)[0], scheme=scheme)
    fills = """() => [...document.querySelectorAll("#data .mixture rect")].map((slice) =>
      getComputedStyle(slice).fill.match(/\\d+/g).map(Number))"""
    colours = page.evaluate(fills)
    assert len(colours) == COLOURS
    assert min(math.dist(one, other) for one, other in combinations(colours, 2)) > 50
    page.close()
