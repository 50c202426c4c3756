"""The page, as a parser and as a browser see it: it loads nothing and shows every curve."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.runs import record, write_run

from torchtrain.tools.report import main
from torchtrain.tools.report_charts import colors

pytestmark = pytest.mark.slow  # matplotlib draws the charts

HOSTILE = (
    "</pre><script>document.title='taken'</script> & <img src=http://x.test/y> \u2028 'q' \"w\""
)
LOADING = ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background")
CHARTS = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "memory_gib", "data_time_pct")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
# As root and without a screen; the rest keeps the browser from asking its maker for anything.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Of each chart, the curves' colors and how far they reach on the screen, in CSS pixels.
MEASURE = """<script>
const found = {title: document.title, inner: innerWidth, wide: document.documentElement.scrollWidth,
  loaded: performance.getEntriesByType("resource").length, charts: {}};
for (const figure of document.querySelectorAll("figure"))
  found.charts[figure.dataset.name] = [...figure.querySelectorAll("g[id^=curve] > path")].map(
    path => ({color: path.style.stroke, width: path.getBoundingClientRect().width,
              length: path.getTotalLength()}));
const output = document.createElement("output");
output.textContent = JSON.stringify(found);
document.body.append(output);
</script></body>"""

# A window is at least 500 pixels wide, a frame in it as narrow as a phone.
FRAME = """<!DOCTYPE html><iframe id="f" style="border: 0; width: %dpx; height: 900px" srcdoc="%s">
</iframe><script>onload = () => document.body.append(
  document.importNode(f.contentDocument.querySelector("output"), true));</script>"""


class Page(HTMLParser):
    """What a page holds: everything that it could load, its text, the paths of its curves."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.ids, self.text = [], [], [], ""
        self.curves, self.figure, self.group = {}, None, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.loads += [given[name] for name in LOADING if name in given]
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style") or "")
        if tag == "figure":
            self.figure = given["data-name"]
            self.curves[self.figure] = {}
        elif tag == "g":
            self.group = given.get("id")
        elif tag == "path" and self.group and self.group.startswith(("curve-", "raw-")):
            self.curves[self.figure].setdefault(self.group, (given["d"], given["style"]))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs of 30 steps, in folders of the same name."""
    root = tmp_path_factory.mktemp("report")
    runs = []
    for name, shift in (("a", 0.0), ("b", 1.0)):
        records = [record(step, shift + 3 + 5 / step) for step in range(1, 31)]
        for one in records:
            for key in ("grad_norm", "lr", "memory_gib", "data_time_pct"):
                one[key] += shift
            one["tokens_per_second"] = 1000 * (shift + 1)
        for step in (10, 20, 30):
            records[step - 1]["val_loss"] = shift + 100 / step
        samples = [{"step": step, "prompt": "<b>", "text": HOSTILE} for step in (10, 20)]
        facts = {"parameters": 1234567, "device": "cpu", "torch": "2.13.0", "world_size": 1}
        config = f"[optimizer]\nlr = {1 + shift}\n"
        runs.append(str(write_run(root / name / "out", records, config, facts, samples)))
    html = root / "page.html"
    assert main([*runs, "--html", str(html)]) == 0
    return html


def test_the_page_loads_nothing_and_runs_nothing(page):
    parsed = Page(page.read_text(encoding="utf-8"))
    assert all(target.strip("\"'").startswith(("#", "data:")) for target in parsed.loads)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    assert "default-src 'none'" in page.read_text(encoding="utf-8")
    assert parsed.text.count(HOSTILE) == 4, "what the model wrote is shown as it is"


def test_the_page_has_every_curve(page):
    parsed = Page(page.read_text(encoding="utf-8"))
    assert tuple(parsed.curves) == CHARTS
    for name, curves in parsed.curves.items():
        for number, color in enumerate(colors(2)):
            d, style = curves[f"curve-{number}"]
            assert f"stroke: {color}" in style
            points = np.array(re.findall(r"[ML] (\S+) (\S+)", d), dtype=float)
            assert len(points) >= 2, f"{name}: a curve of {len(points)} points"
            assert np.ptp(points[:, 0]) > 100, f"{name}: a curve without width"
    assert {"raw-0", "raw-1"} <= parsed.curves["loss"].keys()
    # Upwards is to the top, to scale: the loss falls, fast at first.
    heights = [
        float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", parsed.curves["loss"]["raw-0"][0])
    ]
    assert heights == sorted(heights)
    # 8, 5.5, … 3.167: a half of the fall is in the first step.
    assert (heights[1] - heights[0]) / (heights[-1] - heights[0]) == pytest.approx(
        2.5 / (5 - 1 / 6), abs=1e-3
    )


def test_no_chart_refers_to_parts_of_another(page):
    parsed = Page(page.read_text(encoding="utf-8"))
    ids = [name for name in parsed.ids if not name.startswith(("curve-", "raw-"))]
    assert ids
    assert len(set(ids)) == len(ids)
    targets = {target.strip("\"'").removeprefix("#") for target in parsed.loads}
    assert targets <= set(ids)


def test_the_page_tells_the_runs_apart(page):
    text = Page(page.read_text(encoding="utf-8")).text
    for words in ("a/out", "b/out", "optimizer.lr", "1.0", "2.0", "1,234,567", "3,000"):
        assert words in text


def test_pngs_lie_beside_the_page(page):
    images = page.with_name("page-images")
    assert {path.name for path in images.iterdir()} == {f"{name}.png" for name in CHARTS}


def test_of_many_samples_some_are_shown(tmp_path):
    samples = [
        {"step": step, "prompt": "p", "text": f"\ud800text-{step}-"} for step in range(1, 101)
    ]
    run = write_run(tmp_path / "run", [record(1)], samples=samples)
    assert main([str(run)]) == 0
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    assert len(re.findall(r"text-\d+-", text)) == 20
    assert "text-1-" in text
    assert "text-100-" in text
    assert "20 of 100 steps" in text


def browse(tmp_path, html, *options):
    """Open a page in headless Chromium, and return what it prints."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *options]
    done = subprocess.run([*command, html.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_every_curve(page, tmp_path, width):
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv[^>]*>", "", text)  # it would forbid the test's own script
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME % (width, escape(text.replace("</body>", MEASURE))), encoding="utf-8")
    dom = browse(tmp_path, framed, "--window-size=1300,900", "--dump-dom")
    found = json.loads(unescape(re.search(r"<output>(.*?)</output>", dom, re.DOTALL)[1]))
    assert found["title"] == "torchtrain: a/out, b/out", "a script of the model's has run"
    assert found["inner"] == width
    assert found["loaded"] == 0
    assert found["wide"] <= found["inner"], "the page is wider than the window"
    assert tuple(found["charts"]) == CHARTS
    rgb = [f"rgb({', '.join(str(int(c[at : at + 2], 16)) for at in (1, 3, 5))})" for c in colors(2)]
    for curves in found["charts"].values():
        assert [curve["color"] for curve in curves] == rgb
        assert all(curve["width"] > 150 and curve["length"] > 150 for curve in curves)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_colors(page, tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    browse(tmp_path, page, "--window-size=1200,2000", f"--screenshot={shot}")
    image = imread(shot)[..., :3]
    for color in colors(2):
        seen = np.abs(image - np.array(to_rgb(color))).max(axis=-1) < 0.02
        # Seven curves of some 300 pixels each, fewer where a slope is smoothed to other shades.
        assert seen.sum() > 1000
        # In every column of the grid; the swatches are in the first two.
        assert all(seen[:, left : left + 400].sum() > 150 for left in (0, 400, 800))
