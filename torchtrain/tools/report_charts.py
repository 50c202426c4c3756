"""The pictures of `torchtrain.tools.report`: one chart per metric, the runs overlaid.

A chart is drawn once and written twice: as SVG for the page (sharp at any width, and with text as
text lighter than a PNG of twice the screen's resolution), and as PNG for everything else.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from torchtrain.errors import UserError
from torchtrain.tools.report_data import Run, is_number

Array = npt.NDArray[np.float64]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
"""Of the first runs; told apart by color-blind eyes too (Okabe and Ito 2008)."""
SIZE_INCHES, DOTS_PER_INCH = (5.0, 2.9), 150
MOST_POINTS = 1500
"""Of one curve on the page: about twice the pixels it is wide."""
FEWEST_SMOOTHED = 20
SMOOTHED_SHARE = 15
"""A smoothed curve is the mean over one part in so many of the steps, around each."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "font.size": 9.5,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#3c4043",
    "axes.titlecolor": "#202124",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Panel:
    """How a metric is drawn."""

    key: str
    title: str
    unit: str = ""
    smooth: bool = True
    from_zero: bool = False


PANELS = (
    Panel("loss", "Training loss", "nats per token"),
    Panel("val_loss", "Validation loss", "nats per token"),
    Panel("val_bits_per_byte", "Validation, bits per byte", "bits per byte"),
    Panel("lr", "Learning rate", "rate of the step", smooth=False, from_zero=True),
    Panel("grad_norm", "Gradient norm", "before clipping"),
    Panel("tokens_per_second", "Throughput", "tokens per second", from_zero=True),
    Panel("mfu", "Model FLOPs utilization", "share of the peak", from_zero=True),
    Panel("memory_gib", "Peak memory", "GiB, worst rank", smooth=False, from_zero=True),
    Panel("data_time_pct", "Waiting for data", "% of the time", from_zero=True),
    Panel("slowest_rank_excess_pct", "Slowest rank's excess", "% of the time", from_zero=True),
    Panel("router/load_max", "Load of the busiest expert", "times the mean, worst layer"),
    Panel("router/idle_experts", "Idle experts", "share of all experts", from_zero=True),
    Panel("router/entropy", "Router entropy", "nats"),
    Panel("router/balance_loss", "Balance loss", "part of the loss"),
    Panel("router/z_loss", "Router z-loss", "part of the loss"),
)
NOT_DRAWN = ("step", "tokens_seen", "step_time_s", "slowest_rank", "max_loss")
LAYER_LOAD = re.compile(r"router/layer_(\d+)/load_max")


@dataclass(frozen=True)
class Picture:
    """A chart, drawn."""

    name: str
    """Of its file, without an ending."""
    title: str
    svg: str
    """An `<svg>` element."""
    png: bytes


def draw_all(runs: Sequence[Run]) -> Iterator[Picture]:
    """Draw each metric that a run has a number of, and the load of the experts layer by layer.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "a report needs the package matplotlib, which torchtrain's extra `report` installs: "
            "pip install -e '.[report]' in the repository, or pip install matplotlib"
        ) from None
    with matplotlib.rc_context(STYLE):
        for panel in list_panels(runs):
            yield _draw(panel, runs)
        for number, run in enumerate(runs):
            layers = sorted({int(layer) for layer in _layers(run)})
            if layers:
                yield _draw_layers(run, layers, number)


def list_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels of the metrics that there are, those that others have added at the end."""
    keys = dict.fromkeys(
        key
        for run in runs
        for record in run.records
        for key, value in record.items()
        if is_number(value) and key.count("/") < 2 and key not in NOT_DRAWN
    )
    known = [panel for panel in PANELS if panel.key in keys]
    names = {panel.key for panel in known}
    return known + [Panel(key, key) for key in keys if key not in names]


def colors(count: int) -> list[str]:
    """Return a color per run."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(color) for color in colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def smoothed(values: Array) -> Array:
    """Return the mean around each value [N].

    The window reaches as far to the left as to the right, so that a slope is not shifted, and is
    narrower at the beginning, where a loss falls fastest. At the end it reaches to the left alone.
    """
    index = np.arange(len(values))
    left = np.minimum(index, len(values) // (2 * SMOOTHED_SHARE) + 1)
    right = np.minimum(left, index[::-1])
    sums = np.concatenate(([0.0], np.cumsum(values)))
    means: Array = (sums[index + right + 1] - sums[index - left]) / (left + right + 1)
    return means


def thinned(steps: Array, values: Array) -> tuple[Array, Array]:
    """Return at most MOST_POINTS points: of each stretch of steps its lowest and its highest."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept: set[int] = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), MOST_POINTS // 2 - 1):
        kept |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    chosen = sorted(kept)
    return steps[chosen], values[chosen]


def _draw(panel: Panel, runs: Sequence[Run]) -> Picture:
    figure, axes = _axes(panel.title, panel.unit)
    largest = 0.0
    for number, (run, color) in enumerate(zip(runs, colors(len(runs)), strict=True)):
        steps, values = (np.array(part, dtype=np.float64) for part in run.series(panel.key))
        if not len(steps):
            continue
        largest = max(largest, float(np.abs(values).max()))
        look: dict[str, Any] = {"color": color, "solid_joinstyle": "round"}
        curve = values
        if panel.smooth and len(steps) >= FEWEST_SMOOTHED:
            raw = thinned(steps, values)
            axes.plot(*raw, **look, linewidth=0.8, alpha=0.35, gid=f"raw-{number}")
            curve = smoothed(values)
        elif len(steps) < FEWEST_SMOOTHED:
            look |= {"marker": "o", "markersize": 3}
        shown = thinned(steps, curve)
        label = f" {run.label}"  # a legend leaves out what begins with an underscore
        axes.plot(*shown, **look, linewidth=1.7, label=label, gid=f"curve-{number}")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if not 0.01 <= largest < 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}" if largest >= 1000 else "{x:g}")
    first = min(run.records[0]["step"] for run in runs)
    last = max(run.records[-1]["step"] for run in runs)
    margin = max(last - first, 1) / 40
    axes.set_xlim(first - margin, last + margin)  # the same in all charts
    return _write(panel.key, panel.title, figure, has_legend=len(runs) > 1)


def _layers(run: Run) -> list[str]:
    keys = {key for record in run.records for key in record}
    return [match[1] for key in keys if (match := LAYER_LOAD.fullmatch(key))]


def _draw_layers(run: Run, layers: list[int], number: int) -> Picture:
    """Draw the load of each layer's busiest expert over the steps that logged it."""
    steps, _ = run.series(f"router/layer_{layers[0]}/load_max")
    rows = [dict(zip(*run.series(f"router/layer_{n}/load_max"), strict=True)) for n in layers]
    loads = np.array([[row.get(step, np.nan) for step in steps] for row in rows])
    title = f"Load of the busiest expert by layer: {run.label}"
    figure, axes = _axes(title, "layer")
    axes.grid(visible=False)
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(layers) - 0.5, -0.5)
    image = axes.imshow(loads, aspect="auto", cmap="cividis", extent=extent, interpolation="none")
    figure.colorbar(image, label="times the mean")
    every = -(-len(layers) // 12)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    return _write(f"router/layers-{number}", title, figure, has_legend=False)


def _axes(title: str, unit: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    plain = ScalarFormatter(useOffset=False)
    plain.set_scientific(False)
    axes.yaxis.set_major_formatter(plain)
    return figure, axes


def _write(key: str, title: str, figure: Any, *, has_legend: bool) -> Picture:
    """Return the picture. The page has one legend for all of its charts, a PNG needs its own."""
    import matplotlib

    name = re.sub(r"[^\w.-]+", "-", key)
    text, image = io.StringIO(), io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids that no other chart of the page has
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    if has_legend:
        figure.axes[0].legend(fontsize=8)
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH)
    svg = text.getvalue()
    svg = re.sub(r' id="[a-zA-Z.0-9]+_\d+"', "", svg[svg.index("<svg") :])
    return Picture(name, title, svg.rstrip(), image.getvalue())
