"""What preflight predicts for a run against what the device's allocator gave to its tensors."""

import pytest
from helpers.launching import TINY, launched, metrics, options
from helpers.measured import measure, predict

from torchtrain.kernel_checks import find_device_facts
from torchtrain.metrics import GIB

WITHIN = 0.05
MODES = {
    "none": {"activation_checkpoint.mode": "none"},
    "selective of ops": {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
    },
    "full": {"activation_checkpoint.mode": "full"},
}
# On a GPU kernels' workspaces, tens of MiB, are allocated too: next to these they are little.
LARGE = {
    "model.dim": 2048,
    "model.n_layers": 6,
    "model.n_heads": 16,
    "model.n_kv_heads": 8,
    "model.ffn_hidden_dim": 5632,
    "model.vocab_size": 32_768,
    "training.seq_len": 2048,
    "training.local_batch_size": 2,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_takes_what_preflight_predicts(tmp_path, device, ranks, data, mode, record_property):
    on_cpu = device.type == "cpu"
    given = {**TINY, **data, **MODES[mode], "training.steps": 3}
    given |= {"training.global_batch_size": 2 * ranks, "training.local_batch_size": 2}
    if not on_cpu:
        given |= LARGE
    if find_device_facts(device).has_bf16:
        given["training.mixed_precision_param"] = "bfloat16"
    words = options({**given, "job.config_file": None})
    if on_cpu:
        (measured,) = measure(ranks, [("debug_model", words)], tmp_path)
    else:
        launched(ranks, {**given, "job.dump_folder": tmp_path / "run"})
        measured = max(line["memory_gib"] for line in metrics(tmp_path / "run")) * GIB
    predicted = predict("debug_model", ranks, words, device.type).total
    record_property("predicted", f"{predicted / GIB:.2f} GiB")
    record_property("measured", f"{measured / GIB:.2f} GiB")
    record_property("predicted / measured", f"{predicted / measured:.3f}")
    assert predicted == pytest.approx(measured, rel=WITHIN)
