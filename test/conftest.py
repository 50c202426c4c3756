import gc
import os
import signal

import pytest
from hypothesis import settings

# The same examples in each run, and as long as each takes: a busy machine must not fail a test.
settings.register_profile("torchtrain", deadline=None, derandomize=True)
settings.load_profile("torchtrain")

# The suite is the same on every machine: its ranks are processes on the CPU, over gloo. What a GPU
# alone can show is test/gpu, which has a command of its own.
if os.environ.get("TORCHTRAIN_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ROCm honors it too

# A shell without job control starts background commands with Ctrl-C ignored. The processes that
# tests start and interrupt would inherit that, and go on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Those that last longest begin first: one that began last would keep a worker busy when the others
# are done.
LONGEST = (
    "test_parity.py",
    "test_restarts.py",
    "test_launch.py",
    "test_elastic_nodes.py",
    "test_streams.py",
    "test_watchdog.py",
    "test_resume.py",
    "test_validation.py",
    "test_bench.py",
    "test_text_samples.py",
    "test_stopping.py",
    "test_pipeline_parallel.py",
    "test_last_save.py",
    "test_replica_check.py",
    "test_elastic.py",
    "test_options.py",
    "test_expert_balance.py",
    "test_lm_eval.py",
    "test_standby.py",
    "test_fault_campaign.py",
    "test_bad_numbers.py",
    "test_foreign.py",
    "test_expert_parallel.py",
    "test_prepare.py",
    "test_overlap.py",
    "test_context_parallel.py",
    "test_float8.py",
    "test_loss.py",
    "test_architecture.py",
    "test_preflight_memory.py",
    "test_examples.py",
    "test_orphans.py",
    "test_cpu_attention.py",
    "test_commit.py",
    "test_state.py",
    "test_tensor_parallel.py",
    "test_changed_model.py",
    "test_muon.py",
    "test_convert.py",
    "test_training.py",
    "test_generate.py",
    "test_sweep.py",
    "test_large_layouts.py",
    "test_document_masking.py",
    "test_layouts.py",
    "test_sources.py",
)


def pytest_sessionstart(session):
    """In xdist's workers, fork the process of which ranks are forks, before a test is imported."""
    # Whoever runs a few tests may need none; and CUDA outlives no fork.
    if hasattr(session.config, "workerinput") and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        from helpers.forking import fork_server

        fork_server()


def pytest_collection_modifyitems(config, items):
    """Set the order of files for xdist's workers; its --no-loadscope-reorder keeps it."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))


def pytest_collection_finish():
    """Let no garbage collection walk what has been imported: each run of a trainer makes one."""
    gc.freeze()


@pytest.fixture
def alone():
    """A process group of this process alone."""
    import torch.distributed as dist  # here, for xdist's own process runs no test and needs none

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Options that name a small made-up corpus and a token cache of this test session's own."""
    from helpers.launching import write_corpus

    folder = tmp_path_factory.mktemp("data")
    return {
        "training.dataset": "text",
        "training.dataset_path": str(write_corpus(folder / "corpus")),
        "data.cache_folder": str(folder / "cache"),
    }
