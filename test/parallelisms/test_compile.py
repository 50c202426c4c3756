"""What the compiler says of itself on every rank."""

import warnings
from types import SimpleNamespace

from torch._inductor.lowering import _warn_complex_not_supported

from torchtrain.parallelisms.compile import apply_compile


def test_the_compiler_does_not_warn_of_complex_numbers():
    """As it does where a block takes the rotations."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for is_silent in (False, True):
            if is_silent:
                apply_compile(SimpleNamespace(layers={}), "inductor")
            _warn_complex_not_supported.cache_clear()  # it is given once per process
            _warn_complex_not_supported()
            assert len(given) == 1  # that before `apply_compile`
    assert "complex operators" in str(given[0].message)
