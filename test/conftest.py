import pytest
from launching import write_corpus


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Options that name a small made-up corpus and a token cache of this test session's own."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "training.dataset": "text",
        "training.dataset_path": str(write_corpus(folder / "corpus")),
        "data.cache_folder": str(folder / "cache"),
    }
