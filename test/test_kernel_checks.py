"""What a device has no kernel for is refused before the run begins, and what is slow is told.

No GPU is needed: the checks are functions of facts about one.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.launching import options

import train
from torchtrain import needs
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.kernel_checks import DeviceFacts, check_kernels, find_device_facts
from torchtrain.tools import parity_ranks
from torchtrain.tools.layouts import LAYOUTS
from torchtrain.tools.parity_plan import make_plan

H100 = DeviceFacts(type="cuda", name="NVIDIA H100 80GB HBM3", has_bf16=True, has_float8=True)
A100 = DeviceFacts(type="cuda", name="NVIDIA A100", has_bf16=True)
T4 = DeviceFacts(type="cuda", name="Tesla T4", has_bf16=False)
CPU = DeviceFacts(type="cpu", name="CPU", has_bf16=True)

MASKS = {"training.document_masking": True}
RING = {"parallelism.context_parallel_degree": 2}
ULYSSES = RING | {"parallelism.context_parallel_method": "ulysses"}
BF16 = {"training.mixed_precision_param": "bfloat16"}
COMPILED = {"compile.enable": True}
FLOAT8 = {"model.converters": "quantize.linear.float8"}
EMULATED = FLOAT8 | {"quantize.linear.float8.emulate": True}


def wide(width):
    return {"model.head_width": width}


def check(given, facts):
    check_kernels(JobConfig().parse_args(options(given), world_size=2), facts)


# The options of a run, its device, and what the message says, "" for none.
CASES = {
    "narrow heads without masks": ({}, H100, ""),
    "narrow heads with masks": (
        MASKS,
        H100,
        "training.document_masking = true: model.dim / model.n_heads = 32 / 4 = 8, and on a GPU "
        "(NVIDIA H100 80GB HBM3) the heads must be at least 16 wide; set model.head_width or "
        "model.n_heads, or train without masks",
    ),
    "heads of 14": (MASKS | wide(14), H100, "model.head_width = 14, and on a GPU"),
    "heads of 16": (MASKS | wide(16), H100, ""),
    "a ring in bf16 of 8": (RING | BF16 | wide(8), H100, ""),
    "a ring in bf16 of 100": (
        RING | BF16 | wide(100),
        H100,
        "parallelism.context_parallel_degree = 2: model.head_width = 100, and on a GPU (NVIDIA "
        "H100 80GB HBM3) ring attention in bfloat16 needs a multiple of 8 and at most 256; set "
        'parallelism.context_parallel_method = "ulysses", or another head width',
    ),
    "a ring in bf16 of 256": (RING | BF16 | wide(256), H100, ""),
    "a ring in bf16 of 264": (RING | BF16 | wide(264), H100, "= 264, and on a GPU"),
    "a ring in fp32 of 100": (RING | wide(100), H100, ""),
    "a ring in fp32 of 264": (RING | wide(264), H100, ""),
    "a ring in fp32 of 10": (RING | wide(10), H100, "attention in float32 needs a multiple of 4;"),
    "no ring": (BF16 | wide(100), H100, ""),
    "ulysses in bf16 of 100": (ULYSSES | BF16 | wide(100), H100, ""),
    "bf16 that is emulated, compiled": (
        BF16 | COMPILED,
        T4,
        'training.mixed_precision_param = "bfloat16": Tesla T4 has no bf16, which compile.enable = '
        'true needs; set training.mixed_precision_param = "float32"',
    ),
    "the loss alone compiled": (BF16 | COMPILED | {"compile.components": "loss"}, T4, ""),
    "compiled by another backend": (BF16 | COMPILED | {"compile.backend": "aot_eager"}, T4, ""),
    "bf16 that is emulated, in a ring": (
        BF16 | RING,
        T4,
        'which parallelism.context_parallel_method = "ring" needs; set',
    ),
    "fp32, compiled, in a ring": (COMPILED | RING, T4, ""),
    "float8": (FLOAT8 | COMPILED, H100, ""),
    "float8 where there is none": (
        FLOAT8,
        A100,
        'model.converters = ["quantize.linear.float8"]: NVIDIA A100 has no float8, which NVIDIA\'s '
        "cards have from compute capability 8.9 on, AMD's from 9.4 on; set model.converters = [], "
        "or, to try it out, quantize.linear.float8.emulate = true",
    ),
    "float8 on a CPU": (FLOAT8, CPU, "CPU has no float8"),
    "float8 emulated": (EMULATED, CPU, ""),
    "float8 emulated on a card": (EMULATED, T4, ""),
    "all on a CPU": (MASKS | BF16 | COMPILED, CPU, ""),
    "a ring on a CPU": (RING | BF16 | wide(10), CPU, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_device_has_no_kernel_for_is_refused(case):
    given, facts, text = CASES[case]
    if not text:
        check(given, facts)
        return
    with pytest.raises(UserError) as caught:
        check(given, facts)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(UserError) as caught:
        check(RING | BF16 | COMPILED | wide(10), T4)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "ring attention in bfloat16 needs a multiple of 8" in lines[0]
    assert "compile.enable = true" in lines[1]
    assert 'parallelism.context_parallel_method = "ring"' in lines[2]


@pytest.mark.parametrize("facts", [H100, T4, CPU], ids=lambda facts: facts.name)
@pytest.mark.parametrize("given", [BF16, {}], ids=["bf16", "fp32"])
def test_bf16_that_is_emulated_is_warned_of(given, facts, caplog, monkeypatch):
    monkeypatch.setattr(train.logger, "propagate", True)
    monkeypatch.setattr(train.logger, "handlers", [])  # pytest's own, where it did not propagate
    check(given, facts)
    expected = []
    if facts is T4 and given is BF16:
        expected = [
            'training.mixed_precision_param = "bfloat16": Tesla T4 has no bf16: products are '
            "emulated, and attention holds the scores of all pairs of positions; "
            'training.mixed_precision_param = "float32" avoids both'
        ]
    assert [record.getMessage() for record in caplog.records] == expected


def test_the_facts_are_those_of_the_ranks_own_device(monkeypatch):
    device = torch.device("cuda", 1)
    capability = (8, 6)
    module = SimpleNamespace(
        get_device_name=lambda asked: f"card {asked.index}",
        get_device_capability=lambda asked: capability,
        # PyTorch says that each has it, if emulation counts.
        is_bf16_supported=lambda including_emulation=True: including_emulation,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda asked: module)
    assert find_device_facts(device) == DeviceFacts(type="cuda", name="card 1", has_bf16=False)
    capability = (8, 9)
    assert find_device_facts(device).has_float8
    assert find_device_facts(torch.device("cpu")).type == "cpu"


def test_float8_by_itself_is_slower_which_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(train.logger, "propagate", True)
    monkeypatch.setattr(train.logger, "handlers", [])
    check(FLOAT8 | COMPILED, H100)
    check(EMULATED, H100)
    assert not caplog.records
    for given in ({}, COMPILED | {"compile.components": "loss"}):
        caplog.clear()
        check(FLOAT8 | given, H100)
        (record,) = caplog.records
        assert record.getMessage().startswith("float8 without compile.enable: casts to float8 run")


def test_float8_without_torchao_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        UserError, match=r"float8\"\] needs the package torchao: pip install torchao$"
    ):
        check(EMULATED, CPU)


@pytest.mark.usefixtures("alone")
def test_the_run_is_refused_before_it_has_a_folder(tmp_path, data, monkeypatch):
    monkeypatch.setattr(needs, "find_device_facts", lambda device: H100)
    given = {**data, **MASKS, "job.dump_folder": tmp_path / "run"}
    config = JobConfig().parse_args(options(given), world_size=1)
    with pytest.raises(UserError, match="at least 16 wide"):
        train.run(config, torch.device("cpu"))
    assert not (tmp_path / "run").exists()


def test_a_layout_of_the_parity_tool_is_refused_too(monkeypatch):
    monkeypatch.setattr(parity_ranks, "find_device_facts", lambda device: H100)
    case = {"options": options(MASKS), "hide_labels": False}
    with pytest.raises(UserError, match="at least 16 wide"):
        parity_ranks.run_case(case, torch.device("cpu"))


def test_every_layout_of_the_parity_tools_own_table_has_its_kernels():
    plan = make_plan(None, 4, [], LAYOUTS)
    for layout in LAYOUTS.values():
        for given, ranks in ((layout, layout.ranks), (None, 1)):
            command_line = plan.command_line(layout.task, given)
            check_kernels(JobConfig().parse_args(command_line, world_size=ranks), H100)
