import pytest
from launching import write_corpus

SHARE_NOTHING = ("test_launch.py",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A file's tests stay on one worker, for what it sets up once; those that share nothing fill the gaps."""
    for item in items:
        if item.path.name not in SHARE_NOTHING:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Options that name a small made-up corpus and a token cache of this test session's own."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "training.dataset": "text",
        "training.dataset_path": str(write_corpus(folder / "corpus")),
        "data.cache_folder": str(folder / "cache"),
    }
