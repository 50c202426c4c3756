"""The page of `torchtrain.tools.report`: one HTML file that loads nothing."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from torchtrain.tools.report_charts import FEWEST_SMOOTHED, Picture, colors
from torchtrain.tools.report_data import Run, differences
from torchtrain.utils import plural

MOST_SAMPLES = 20
"""Steps per run whose texts the page shows."""

NOTE = (
    "Faint: as logged. Strong: the mean over a window of one fifteenth of the logged steps; where "
    f"there are fewer than {FEWEST_SMOOTHED}, the values themselves."
)
# What the page may load, which holds for whatever a model writes as well: nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 20px 40px; max-width: 1720px; background: #f6f7f9; color: #202124;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 22px; margin: 24px 0 4px; }
h2 { font-size: 17px; margin: 32px 0 10px; }
.note { color: #5f6368; margin: 4px 0 12px; font-size: 13px; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 2px 20px;
  margin: 0 -20px; padding: 8px 20px; background: #f6f7f9ee; max-height: 20vh; overflow: auto; }
.swatch { display: inline-block; width: 18px; height: 4px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px),
  1fr)); }
figure, .card { margin: 0; padding: 10px; background: #fff; border: 1px solid #e3e5e8;
  border-radius: 8px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
.card { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: left; vertical-align: top; }
th { color: #5f6368; font-weight: 600; font-size: 13px; }
tr + tr { border-top: 1px solid #eceef0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.value { overflow-wrap: anywhere; min-width: 150px; }
code, pre { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 4px 0 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: #0b57a4; font-weight: 600; }
details { margin: 6px 0; } summary { cursor: pointer; }
"""


def make_page(runs: Sequence[Run], pictures: Sequence[Picture]) -> str:
    """Return the page as HTML."""
    title = escape("torchtrain: " + ", ".join(run.label for run in runs))
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        *_legend(runs),
        *_summary(runs),
        "<h2>Curves</h2>",
        f'<p class="note">{NOTE}</p>',
        '<div class="grid">',
        *(
            f'<figure role="img" aria-label="{escape(picture.title)}" data-name="'
            f'{escape(picture.name)}">{picture.svg}</figure>'
            for picture in pictures
        ),
        "</div>",
        *_differences(runs),
        *_samples(runs),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _swatches(runs: Sequence[Run]) -> list[str]:
    """Return each run's label, with its color where there are several."""
    labels = [escape(run.label) for run in runs]
    if len(runs) == 1:
        return labels
    marks = [
        f'<span class="swatch" style="background:{color}"></span>' for color in colors(len(runs))
    ]
    return [f"<span>{mark}{label}</span>" for mark, label in zip(marks, labels, strict=True)]


def _legend(runs: Sequence[Run]) -> list[str]:
    return ['<div class="legend">', *_swatches(runs), "</div>"] if len(runs) > 1 else []


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> list[str]:
    """Return a table of HTML cells; all columns but the first are of a kind, a class of CSS."""
    head, *rest = titles
    lines = ['<div class="card"><table>', f"<tr><th>{head}</th>"]
    lines += [f'<th class="{kind}">{title}</th>' for title in rest] + ["</tr>"]
    for first, *cells in rows:
        line = "".join(f'<td class="{kind}">{cell}</td>' for cell in cells)
        lines.append(f"<tr><td>{first}</td>{line}</tr>")
    return [*lines, "</table></div>"]


def _summary(runs: Sequence[Run]) -> list[str]:
    titles = ["run", "step", "tokens", "loss", "val. loss", "tokens/s, median", "peak memory"]
    titles += ["parameters", "ranks", "device", "torch"]
    rows = []
    for swatch, run in zip(_swatches(runs), runs, strict=True):
        last = run.records[-1]
        planned = run.facts.get("steps") or run.config.get("training.steps")
        speeds = run.series("tokens_per_second")[1]
        rows.append(
            [
                f"{swatch}<br><small>{escape(str(run.folder))}</small>",
                f"{last['step']:,}" + (f" of {planned:,}" if isinstance(planned, int) else ""),
                _latest(run, "tokens_seen", "{:,}"),
                _latest(run, "loss", "{:.4f}"),
                _latest(run, "val_loss", "{:.4f}"),
                f"{median(speeds):,.0f}" if speeds else "–",
                _latest(run, "memory_gib", "{:.2f} GiB"),
                *(_fact(run, name) for name in ("parameters", "world_size", "device", "torch")),
            ]
        )
    return ["<h2>Runs</h2>", *_table(titles, rows, "number")]


def _latest(run: Run, key: str, form: str) -> str:
    """Return the last number of a metric."""
    values = run.series(key)[1]
    return form.format(values[-1]) if values else "–"


def _fact(run: Run, name: str) -> str:
    fact: Any = run.facts.get(name, "–")
    return f"{fact:,}" if isinstance(fact, int) else escape(str(fact))


def _differences(runs: Sequence[Run]) -> list[str]:
    """Return the table of what differs, or for one run nothing."""
    if len(runs) == 1:
        return []
    rows = [
        [f"<code>{escape(name)}</code>", *(f"<code>{escape(value)}</code>" for value in values)]
        for name, values in differences(runs)
    ]
    lines = ["<h2>What differs</h2>"]
    if not rows:
        return [*lines, '<p class="note">Nothing in config.toml and run.json.</p>']
    return lines + _table(["", *_swatches(runs)], rows, "value")


def _samples(runs: Sequence[Run]) -> list[str]:
    """Return the texts that the models wrote, of the last step at once and of others on a click."""
    lines = []
    for swatch, run in zip(_swatches(runs), runs, strict=True):
        by_step: dict[int, list[str]] = {}
        for sample in run.samples:
            prompt, text = (escape(str(sample.get(key, ""))) for key in ("prompt", "text"))
            by_step.setdefault(sample["step"], []).append(f"<pre><b>{prompt}</b>{text}</pre>")
        if by_step:
            lines += [f'<h3>{swatch}</h3>\n<div class="card">', *_steps(by_step), "</div>"]
    return ["<h2>Text written by the model</h2>", *lines] if lines else []


def _steps(by_step: dict[int, list[str]]) -> list[str]:
    """Return a part per step: of many, some that are evenly spaced, the last among them."""
    steps = list(by_step)
    lines = []
    if len(steps) > MOST_SAMPLES:
        every = (len(steps) - 1) / (MOST_SAMPLES - 1)
        lines = [f'<p class="note">{MOST_SAMPLES} of {plural(len(steps), "step")}.</p>']
        steps = [steps[round(number * every)] for number in range(MOST_SAMPLES)]
    for step in steps:
        is_open = " open" if step in (steps[0], steps[-1]) else ""
        texts = "\n".join(by_step[step])
        lines.append(f"<details{is_open}><summary>step {step:,}</summary>\n{texts}</details>")
    return lines


def write_report(runs: Sequence[Run], pictures: Sequence[Picture], html: Path) -> Path:
    """Write the page, and its pictures as PNG into a folder beside it, which is returned."""
    images = html.with_name(f"{html.stem}-images")
    # A prompt can hold half a surrogate pair, which UTF-8 has no bytes for.
    html.write_text(make_page(runs, pictures), encoding="utf-8", errors="replace")
    images.mkdir(exist_ok=True)
    for picture in pictures:
        (images / f"{picture.name}.png").write_bytes(picture.png)
    return images
