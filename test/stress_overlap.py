"""Train with DualPipeV's overlap for many steps: `python test/stress_overlap.py [--steps N]`.

Not part of the suite, which does the same for a few steps (parallelisms/test_overlap.py): N steps
with each mode of recomputation, both lanes held up at random, bitwise compared with the schedule
without overlap, and the order of exchanges between the ranks.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from helpers.forking import on_ranks
    from helpers.launching import write_corpus
    from parallelisms.test_overlap import LAYOUT, MODES, compare_with_serial

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="of each mode; default: %(default)s")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        data = {
            "training.dataset": "text",
            "training.dataset_path": str(write_corpus(Path(folder) / "corpus")),
            "data.cache_folder": str(Path(folder) / "cache"),
        }
        started = time.monotonic()
        on_ranks(4, compare_with_serial, {**data, **LAYOUT}, steps, timeout_s=3600)
    seconds = round(time.monotonic() - started)
    print(f"{steps} steps x {len(MODES)} modes: bitwise equal, in one order; {seconds} s")
