import pytest
from helpers.launching import find_free_port


@pytest.fixture
def free_port():
    """A port that no program has."""
    return find_free_port()
