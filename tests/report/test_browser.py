"""The page in a real browser: drawn at three sizes, in both colours, on paper, and live, without a complaint."""

import json
import threading

import pytest

from mfdist.report.document import Report
from mfdist.report.page import page
from mfdist.report.server import ReportServer
from mfdist.sharding import kinds
from mfdist.sharding.plan import ShardingPlan
from tests.report import recorded as r
from tests.report.browser import NAMES, browsing, chromium
from tests.report.recorded import recorded

pytestmark = pytest.mark.skipif(chromium() is None, reason=f"needs a browser: none of {', '.join(NAMES)} is installed")

SIZES = ((390, 844), (1280, 800), (1920, 1080))
DRAWN = "[...document.querySelectorAll('.plot')].filter(each => each.querySelector('svg')).map(each => each.id)"
ALL = {"loss", "bpb", "speed", "memory", "layers", "history", "hits", "lorenz", "bits", "scores", "movement"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def quiet(browser):
    """Fail where the page complained of anything, or asked for something besides itself."""
    browser.complaints.clear()
    browser.requested.clear()
    yield browser
    assert browser.complaints == []
    asked = {url for url in browser.requested if not url.startswith(("data:", "blob:"))}
    assert all(url.startswith(("file://", "http://127.0.0.1:")) for url in asked)


def written(folder, run, *others):
    """Return the address of a run's page."""
    path = folder / "report.html"
    path.write_text(page(Report(run.path, [other.path for other in others]).document()))
    return path.as_uri()


def shape(browser):
    return browser.value("[document.documentElement.scrollWidth, innerWidth]")


def test_every_chart_is_drawn_at_every_size_and_answers(tmp_path, quiet):
    run = recorded(tmp_path / "run", r.whole_run(num_ranks=2))
    run.write_plan(ShardingPlan(2, tuple(kinds.column_wise(spec, 2) for spec in r.specs())))
    address = written(tmp_path, run, recorded(tmp_path / "dense", r.whole_run(kind="dense"), kind="dense"))
    expected = {f"plot-{name}" for name in (*ALL, "plan", "plan-memory")}
    for width, height in SIZES:
        quiet.resize(width, height, is_dark=width == 1280)
        quiet.open(address)
        assert set(quiet.value(DRAWN)) == expected
        assert shape(quiet)[0] <= width  # nothing is pushed over the edge
        theme = "dark" if width == 1280 else "light"
        assert quiet.value("document.documentElement.dataset.theme") == theme
    # What is chosen is drawn, by mouse or by keyboard.
    first = quiet.value("document.getElementById('layer-line').textContent")
    quiet.value("document.getElementById('layer').selectedIndex = 0")
    quiet.value("document.getElementById('layer').dispatchEvent(new Event('change'))")
    assert quiet.value("document.getElementById('layer-line').textContent") != first
    for button in ("axis-tokens", "axis-flops", "axis-seconds", "figure-dead", "figure-movement", "plan-sent_forward"):
        quiet.value(f"document.getElementById('choice-{button}').click()")
        assert quiet.value(f"document.getElementById('choice-{button}').getAttribute('aria-pressed')") == "true"
    assert quiet.value("document.getElementById('plot-loss').layout.xaxis.title.text") == "seconds trained"
    quiet.value("document.getElementById('details-inside').open = true")
    quiet.wait_for("document.querySelector('#plot-rates svg') !== null")
    quiet.value("document.getElementById('theme').click()")  # auto, light, dark
    quiet.value("document.getElementById('theme').click()")
    assert quiet.value("document.documentElement.dataset.theme") == "dark"
    assert quiet.value("document.querySelectorAll('#hot-rows tbody tr').length") == 10


def test_on_paper_it_is_light_and_nothing_is_cut_off(tmp_path, quiet):
    address = written(tmp_path, recorded(tmp_path / "run", r.whole_run()))
    quiet.resize(1280, 800, is_dark=True)
    quiet.open(address)
    quiet.value(
        "addEventListener('beforeprint', () => { window.printed ="
        " [document.documentElement.dataset.theme, document.querySelector('#plot-loss svg').clientWidth]; })"
    )
    quiet.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    theme, width = quiet.value("window.printed")
    assert theme == "light" and width < 340
    assert quiet.value("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("length", [0, 1, 2, 12])
def test_a_run_that_has_just_begun_is_shown(tmp_path, quiet, length):
    quiet.resize(1280, 800)
    quiet.open(written(tmp_path, recorded(tmp_path / "run", r.whole_run()[:length])))
    assert bool(quiet.value(DRAWN)) == (length > 1)


def test_a_live_page_follows_the_run(tmp_path, quiet):
    whole = recorded(tmp_path / "whole", r.whole_run())
    run = recorded(tmp_path / "run", [])
    lines = whole.metrics_path.read_text().splitlines(keepends=True)
    server = ReportServer(Report(run.path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        quiet.resize(1280, 800)
        quiet.open(server.address)
        assert quiet.value("document.querySelector('#plot-loss')") is None
        with run.metrics_path.open("a") as file:
            file.writelines(lines[:6])
        quiet.wait_for("document.querySelector('#plot-loss svg') !== null")  # a part that was not there before
        run.write_table_use(json.loads(whole.table_use_path.read_text()))
        with run.metrics_path.open("a") as file:
            file.writelines(lines[6:])
        quiet.wait_for("document.querySelector('.state').textContent === 'finished'")
        assert set(quiet.value(DRAWN)) == {f"plot-{name}" for name in ALL}
        assert quiet.value("document.querySelector('#plot-loss').data[0].x.length") == 40
        assert "learnt from 5.1k tokens" in quiet.value("document.getElementById('live-summary').textContent")
    finally:
        server.close()
        thread.join(30)
