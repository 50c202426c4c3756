"""What the compiler says of itself on every rank."""

import warnings
from types import SimpleNamespace

from torch._inductor.lowering import _warn_complex_not_supported

from torchtrain.parallelisms.compile import apply_compile, silence_compiler


def test_the_compiler_does_not_warn_of_complex_numbers():
    """As it does where a block takes the rotations."""
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
        apply_compile(SimpleNamespace(layers={}), "inductor")
        assert warnings.filters == []
