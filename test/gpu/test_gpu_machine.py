"""The devices themselves: each computes what a CPU does, and they are of one kind."""

import pytest
import torch

from torchtrain.kernel_checks import find_device_facts


def test_each_device_multiplies_as_a_cpu_does(device, devices, record_property):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = a.double() @ b.double()
    # Of fp32 the hardware may keep TF32's 10 bits alone where it is asked to, and nobody does.
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        errors = []
        for index in range(1 if device.type == "cpu" else devices):
            place = torch.device(device.type, index)
            product = (a.to(place, dtype) @ b.to(place, dtype)).cpu().double()
            errors.append(((product - exact).norm() / exact.norm()).item())
        record_property(str(dtype).removeprefix("torch."), f"{max(errors):.1e}")
        assert max(errors) <= limit
    has_bf16 = find_device_facts(device).has_bf16
    record_property("bf16 in hardware", "yes" if has_bf16 else "no: see docs/gpu.md")


def test_the_devices_are_of_one_kind_and_idle(device, devices, record_property):
    if device.type == "cpu":
        pytest.skip("there is one CPU")
    cards = [torch.cuda.get_device_properties(index) for index in range(devices)]
    assert len({(card.name, card.multi_processor_count) for card in cards}) == 1
    free, total = zip(*(torch.cuda.mem_get_info(index) for index in range(devices)), strict=True)
    record_property("free", f"{min(free) / 2**30:.1f} of {min(total) / 2**30:.1f} GiB")
    assert min(free) > 0.8 * min(total), "another program is on it: times would mean nothing"
