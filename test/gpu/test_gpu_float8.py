"""Linear layers in float8, by the device's own products, against the same emulated in fp32."""

import pytest
import torch

from torchtrain.catalog.models import ModelShape
from torchtrain.config.schema import Float8Linear
from torchtrain.kernel_checks import find_device_facts
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.compile import apply_compile
from torchtrain.parallelisms.float8 import apply_float8, find_compiler_options

SHAPE = ModelShape(256, 2, 4, 4, 512, 1024)
# The numbers are the same; sums are rounded to bf16, 8 bits, in each of two layers, and those that
# lie between two numbers of float8 may then go to the other.
LIMIT = 2**-4


def result_and_gradients(device, recipe, *, emulate, compiled=False):
    torch.manual_seed(0)
    model = Transformer(SHAPE).to(device, torch.bfloat16)
    tokens = torch.randint(1024, (2, 128), generator=torch.Generator().manual_seed(1)).to(device)
    section = Float8Linear(recipe_name=recipe, emulate=emulate)
    apply_float8(model, section, 1)
    if compiled:
        apply_compile(model, "inductor", find_compiler_options(section))
    logits = model(tokens)
    logits.float().square().mean().backward()
    gradients = [weight.grad.float().flatten() for weight in model.parameters()]
    return logits.detach().float(), torch.cat(gradients)


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_the_devices_products_are_the_emulated_ones(device, recipe, record_property):
    if device.type != "cpu" and not find_device_facts(device).has_float8:
        pytest.skip("this device has no float8")
    is_dry = device.type == "cpu"
    expected = result_and_gradients(device, recipe, emulate=True)
    for compiled in (False,) if is_dry else (False, True):
        found = result_and_gradients(device, recipe, emulate=is_dry, compiled=compiled)
        for name, mine, theirs in zip(("logits", "gradient"), found, expected, strict=True):
            distance = ((mine - theirs).norm() / theirs.norm()).item()
            record_property(f"{name}{', compiled' if compiled else ''}", f"{distance:.1e}")
            assert distance < LIMIT
