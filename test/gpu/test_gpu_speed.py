"""How fast the device trains, by the bench tool: figures, which nothing here judges."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.launching import ROOT, environment

from torchtrain.kernel_checks import find_device_facts
from torchtrain.metrics import find_peak_flops

PATIENCE_S = 900
pytestmark = pytest.mark.timeout(PATIENCE_S)

GOALS = {
    "1B eager": "",
    "1B compiled": "goal on an H100 55,000 tokens/s",
    "1B float8": "compiled; goal on an H100 65,000 tokens/s",
    "8B-blocks compiled": "goal on an H100 55 % MFU",
}


@pytest.mark.parametrize("name", GOALS)
def test_speed(device, record_property, name):
    on_cpu = device.type == "cpu"
    size, how = name.split()
    if how == "float8" and not (on_cpu or find_device_facts(device).has_float8):
        pytest.skip("this device has no float8")
    size = "host" if on_cpu else size
    options = ["--checkpoint.enable=false"]
    if on_cpu:
        options.append("--compile.backend=aot_eager")
    asked = ["--device", device.type, "--sizes", size, "--rounds", "1", "--json"]
    if how != "eager":
        asked.append("--compile")
    if how == "float8":
        options.append("--model.converters=quantize.linear.float8")
    if how == "float8" and on_cpu:
        options.append("--quantize.linear.float8.emulate=true")
    ended = subprocess.run(
        [sys.executable, "-m", "torchtrain.tools.bench", *asked, "--", *options],
        env=environment(1),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    figures = report["sizes"][size]
    peak = find_peak_flops(device, torch.bfloat16)
    record_property("tokens/s", f"{figures['tokens_per_second']:,.0f}")
    record_property("TFLOP/s", f"{figures['model_flops'] / 1e12:.3g}")
    record_property("of the products' peak", f"{figures['share_of_peak']:.1%}")
    if peak is not None:
        record_property("MFU", f"{figures['model_flops'] / peak:.1%}")
    record_property("memory", f"{figures['memory_gib']:.1f} GiB")
    record_property("first step", f"{figures['first_step_s']:.0f} s")
    if GOALS[name]:
        record_property("note", GOALS[name])
    # More than the hardware can: the model's FLOPs or the peak are counted wrongly.
    assert 0 < figures["share_of_peak"] < 1
