"""The page: whole in itself, safe whatever a run says, and small however long it was."""

import base64
import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest

from mfdist.errors import ConfigError
from mfdist.report import page as page_module
from mfdist.report.document import Report
from mfdist.report.page import page, update
from tests.report import recorded as r
from tests.report.recorded import recorded

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"


def page_of(run, *others):
    return page(Report(run.path, [other.path for other in others]).document())


def embedded(html):
    """Return the document that the charts of a page read."""
    found = re.search(r'<script type="application/json" id="document">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_a_page_asks_nobody_for_anything(tmp_path):
    html = page_of(recorded(tmp_path / "run", r.whole_run()))
    own = html.replace(page_module._plotly(), "")
    assert not re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"', own) and "url(" not in own and "@import" not in own
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None and {"connect-src 'none'", "default-src 'none'"} <= set(unescape(policy[1]).split("; "))
    assert html.count("<script>") == 4 and len(html.encode()) < 6e6
    for text in ("A MemoryFormer with 100k parameters", "Table use", "Where the time went", "notes.txt is not text"):
        assert text in html


def test_what_a_run_says_is_text_and_never_markup(tmp_path):
    events = r.whole_run()
    events[0] = replace(events[0], baselines_bits_per_byte={HOSTILE: 2.5}, device=HOSTILE)
    events[-3:-1] = [r.Sampled(prompt=HOSTILE, text=HOSTILE), r.Warned(message=HOSTILE)]
    run = recorded(tmp_path / "run", events, overrides=[f"name={json.dumps(HOSTILE)}"])
    html = page_of(run, recorded(tmp_path / "other", []))
    own = html.replace(page_module._plotly(), "")
    assert "<img" not in own and "alert(1)</script>" not in own and "<!--" not in own
    assert own.count("</script>") == own.count("<script") == 5
    assert HOSTILE in embedded(html)["runs"][0]["baselines"]
    assert "&lt;/script&gt;" in own


def test_maps_come_through_their_packing(tmp_path):
    run = recorded(tmp_path / "run", r.whole_run())
    document = Report(run.path).document()
    layer = document["runs"][0]["tables"]["detail"]["layers"][4]
    packed = embedded(page(document))["runs"][0]["tables"]["detail"]["layers"][4]
    for key, expected in (
        ("hits", np.clip(np.log2(np.maximum(layer["hits"], 1e-9)), -5, 5)),
        ("bit_shares", np.array(layer["bit_shares"])),
    ):
        found = packed[key]
        content = np.frombuffer(base64.b64decode(found["bytes"]), np.uint8).reshape(-1, found["columns"])
        values = found["low"] + (found["high"] - found["low"]) * content / 255
        assert values.shape == expected.shape
        assert np.abs(values - expected).max() <= (found["high"] - found["low"]) / 255


@pytest.mark.parametrize("length", [0, 1, 2, 4, 12])
def test_a_run_that_has_just_begun_has_a_page_without_empty_parts(tmp_path, length):
    run = recorded(tmp_path / "run", r.whole_run()[:length])
    html = page_of(run)
    has_steps = length > 1
    assert ('id="learning"' in html, 'id="plot-loss"' in html) == (has_steps, has_steps)
    assert ('id="plot-bpb"' in html) == (length > 11) == ('id="tables"' not in html and length > 11) or length > 11
    assert 'id="checkpoints"' not in html and "config.toml" in html


def test_a_hundred_thousand_steps_make_a_small_page(tmp_path):
    run = recorded(tmp_path / "run", r.whole_run()[:3])
    line = json.loads(run.metrics_path.read_text().splitlines()[1])
    rng = np.random.default_rng(0)
    scored = {"event": "evaluated", "num_tokens": 9, "is_final": False}
    with run.metrics_path.open("a") as file:
        for step in range(3, 100_003):
            told = {"step": step, "time": line["time"] + step, "loss": 2 + 6 / step + 0.1 * rng.standard_normal()}
            file.write(json.dumps({**line, **told}) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({**scored, **told, "bits_per_byte": told["loss"]}) + "\n")
    document = Report(run.path).document()
    assert len(json.dumps(document)) < 400_000
    story = document["runs"][0]
    assert story["step"] == 100_002 and len(story["steps"]["places"]["step"]) <= 400
    assert story["evaluations"][-1]["step"] == 100_000 and len(story["evaluations"]) <= 400
    assert len(page(document).encode()) < 5.5e6


def test_an_update_has_the_parts_of_the_page(tmp_path):
    document = Report(recorded(tmp_path / "run", r.whole_run()).path).document()
    fresh = update(document)
    assert fresh["document"] == embedded(page(document))
    for part in re.findall(r'id="(live-[\w-]+)" data-live', page(document)):
        assert f'id="{part}" data-live' in fresh["html"]
    assert 'id="live-mark"' in fresh["html"] and "live-mark" not in page(document).split("<main")[0]


@pytest.mark.parametrize("package", ["plotly.offline", "jinja2"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    page_module._plotly.cache_clear()
    page_module._environment.cache_clear()
    try:
        with pytest.raises(
            ConfigError, match=rf"needs the package {package.split('.')[0]}; pip install 'mfdist\[report\]'"
        ):
            page_of(recorded(tmp_path / "run", []))
    finally:
        page_module._plotly.cache_clear()
        page_module._environment.cache_clear()
