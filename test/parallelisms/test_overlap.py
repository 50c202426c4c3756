"""The two lanes of an overlapped pair: turns, faults, threads."""

import random
import threading
import time

import pytest
import torch

from torchtrain.parallelisms.overlap import LaneAborted, Lanes


def run_lanes(lanes: Lanes, forward: int, backward: int, generator: random.Random) -> list[str]:
    """Return the order in which two lanes of so many exchanges issue them."""
    issued = []

    def lane(name: str, exchanges: int) -> str:
        for number in range(exchanges):
            time.sleep(generator.random() * 1e-3)
            issued.append(f"{name}{number}")
            lanes.hand_over()
        return name

    assert lanes.run(lambda: lane("f", forward), lambda: lane("b", backward)) == "f"
    return issued


def test_the_order_follows_from_the_programs_alone() -> None:
    lanes = Lanes(torch.device("cpu"))
    generator = random.Random(0)
    for _ in range(20):
        order = run_lanes(lanes, 3, 5, generator)
        assert order == ["f0", "b0", "f1", "b1", "f2", "b2", "b3", "b4"]
        assert run_lanes(lanes, 2, 0, generator) == ["f0", "f1"]
        assert run_lanes(lanes, 0, 2, generator) == ["b0", "b1"]


def test_a_lane_alone_is_not_held_up() -> None:
    lanes = Lanes(torch.device("cpu"))
    lanes.hand_over()
    assert lanes.run(lambda: 1, lambda: None) == 1
    lanes.hand_over()


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_a_fault_in_either_lane_ends_both_with_that_fault(failing: str) -> None:
    lanes = Lanes(torch.device("cpu"))
    ends: dict[str, type[BaseException] | None] = {}

    def lane(name: str) -> None:
        try:
            for number in range(3):
                if number == 1 and name == failing:
                    raise ValueError(f"of the {name} lane")
                lanes.hand_over()
        except BaseException as fault:
            ends[name] = type(fault)
            raise

    with pytest.raises(ValueError, match=f"of the {failing} lane"):
        lanes.run(lambda: lane("forward"), lambda: lane("backward"))
    assert ends.pop(failing) is ValueError
    assert set(ends.values()) <= {LaneAborted}
    assert lanes.run(lambda: 2, lambda: lanes.hand_over()) == 2, "they can be used again"


def test_the_thread_ends_with_its_lanes() -> None:
    before = set(threading.enumerate())
    lanes = Lanes(torch.device("cpu"))
    lanes.run(lambda: None, lambda: None)
    (worker,) = set(threading.enumerate()) - before
    del lanes
    worker.join(timeout=30)
    assert not worker.is_alive()
