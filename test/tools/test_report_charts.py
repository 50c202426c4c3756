"""The curves themselves: smoothing and thinning against sums worked out by hand, and the pixels."""

import io
import warnings

import numpy as np
import pytest
from helpers.runs import record, write_run

from torchtrain.tools.report_charts import (
    MOST_POINTS,
    colors,
    draw_all,
    list_panels,
    smoothed,
    thinned,
)
from torchtrain.tools.report_data import read_runs


def test_smoothing_is_the_mean_around_each_value():
    values = np.random.default_rng(0).normal(size=75)  # 3 to each side
    result = smoothed(values)
    assert np.allclose(result[10], values[7:14].mean())
    assert np.allclose(result[0], values[0])
    assert np.allclose(result[1], values[:3].mean())
    assert np.allclose(result[-1], values[-4:].mean())
    line = np.arange(75.0)
    assert np.allclose(smoothed(line)[:-3], line[:-3]), "a slope is shifted"


def test_thinning_keeps_the_extremes_and_both_ends():
    steps = np.arange(1.0, 100_001)
    values = np.random.default_rng(0).normal(size=100_000)
    values[[777, 54_321]] = 50, -50
    few_steps, few_values = thinned(steps, values)
    assert len(few_steps) <= MOST_POINTS
    assert (few_steps[0], few_steps[-1]) == (1, 100_000)
    assert (np.diff(few_steps) > 0).all()
    assert {50, -50} <= set(few_values)
    assert all(
        values[int(step) - 1] == value for step, value in zip(few_steps, few_values, strict=True)
    )


@pytest.mark.slow
def test_panels_are_those_of_the_numbers_there_are(tmp_path):
    layers = {"router/load_max": 1.5, "router/layer_0/load_max": 1.5, "router/layer_10/load_max": 2}
    a = write_run(tmp_path / "a", [record(1), record(2, val_loss=4.0)])
    b = write_run(tmp_path / "b", [record(1, **{"mine/x": 3}), record(2, **layers)])
    runs = read_runs([a, b])
    keys = [panel.key for panel in list_panels(runs)]
    own = ["loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "memory_gib"]
    assert keys == [*own, "data_time_pct", "router/load_max", "mine/x"]
    names = [picture.name for picture in draw_all(runs)]
    assert names[-3:] == ["router-load_max", "mine-x", "router-layers-1"]


def test_every_run_has_a_color_of_its_own():
    for count in (1, 8, 9, 30):
        assert len(set(colors(count))) == count


def pixels_of(png, color):
    """Return how many pixels of a PNG are of a color, up to rounding."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    image = imread(io.BytesIO(png))[..., :3]
    return int((np.abs(image - np.array(to_rgb(color))).max(axis=-1) < 0.02).sum())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_every_chart_shows_every_curve(tmp_path, steps):
    runs = [
        write_run(
            tmp_path / f"_$^${n}", [record(step, 9.0 - n / step) for step in range(1, steps + 1)]
        )
        for n in (1, 3)
    ]
    # Names that mean something to matplotlib are among them. Here, not as a mark of the test, which
    # would fail for what another test has left to the garbage collector.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = list(draw_all(read_runs(runs)))
    shown = {
        picture.name: [pixels_of(picture.png, color) for color in colors(2)] for picture in pictures
    }
    assert {"loss", "grad_norm", "lr"} <= shown.keys()
    for name, counts in shown.items():
        assert counts[1] > 10, f"{name}: the second run has no curve"
    assert shown["loss"][0] > 10, "the first run has no curve"
