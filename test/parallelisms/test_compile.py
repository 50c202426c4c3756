"""What compiling changes of a model and of the process."""

import warnings

import pytest
import torch

from torchtrain.catalog.models import ModelShape
from torchtrain.models.attention import CausalAttention
from torchtrain.models.cpu_attention import BlockwiseAttention
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.compile import apply_compile, silence_compiler


def build_model():
    with torch.device("meta"):
        return Transformer(ModelShape(32, 2, 4, 2, 64, 50))


def test_the_compiler_does_not_warn_of_complex_numbers():
    """As it does where a block takes the rotations."""
    from torch._inductor.lowering import _warn_complex_not_supported  # here: it takes a second

    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for is_silent in (False, True):
            if is_silent:
                silence_compiler()
            _warn_complex_not_supported.cache_clear()  # it is given once per process
            _warn_complex_not_supported()
            assert len(given) == 1  # that before `silence_compiler`
    assert "complex operators" in str(given[0].message)


def test_what_is_compiled_leaves_the_process_as_it_was():
    with warnings.catch_warnings():
        warnings.resetwarnings()
        apply_compile(build_model(), "inductor")
        assert warnings.filters == []


@pytest.mark.parametrize(("backend", "is_used"), [("inductor", True), ("aot_eager", False)])
def test_attention_has_its_own_backward_where_it_is_fused(backend, is_used):
    model = build_model()
    names = list(model.state_dict())
    apply_compile(model, backend)
    kernels = [type(block.attention.inner_attention) for block in model.layers.values()]
    assert kernels == [BlockwiseAttention if is_used else CausalAttention] * 2
    assert list(model.state_dict()) == names
