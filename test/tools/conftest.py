import socket

import pytest


@pytest.fixture
def free_port():
    """A port that no program has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
