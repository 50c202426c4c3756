"""Who had not arrived, by what the ranks tell of themselves; where the loop is, by its stack."""

import threading
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

import train
from torchtrain import hangs
from torchtrain.hangs import (
    Position,
    count_entered,
    describe_hang,
    find_missing,
    find_place,
    write_collectives,
    write_stacks,
)


def at(place="forward and backward", step=3, **entered):
    return Position(step=step, place=place, entered=entered)


def test_a_rank_that_is_silent_is_missing_whatever_the_others_say():
    assert find_missing({0: at(world=7), 2: at(world=6)}, 4) == [1, 3]


def test_a_rank_that_has_entered_fewer_collectives_of_a_group_is_missing():
    assert find_missing({0: at(world=7), 1: at(world=6), 2: at(world=7)}, 3) == [1]
    assert find_missing({0: at(world=7), 1: at(world=7)}, 2) == []
    # Ranks 0 and 1 share one group, ranks 2 and 3 another, of a different name and count.
    assert find_missing({0: at(a=5), 1: at(a=5), 2: at(b=9), 3: at(b=8)}, 4) == [3]


def test_a_rank_that_waits_itself_is_not_the_one_that_is_missing():
    """Rank 3 is stuck; rank 2 waits for it in their group, and ranks 0 and 1 for both."""
    positions = {
        0: at(world=7, pair=4),
        1: at(world=7, pair=4),
        2: at(world=6, other=3),
        3: at(world=6, other=2),
    }
    assert find_missing(positions, 4) == [3]


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        ({}, "rank 1 did not answer in step 3 (saving) for 30 s; see hang/step-3"),
        (
            {1: at("validation", step=2, world=6)},
            "rank 1 had not arrived, in step 2 (validation); others waited for 30 s; "
            "see hang/step-3",
        ),
        (
            {1: at(world=7)},
            "no rank has made progress in step 3 (saving) for 30 s; see hang/step-3",
        ),
    ],
)
def test_a_hang_is_one_line(theirs, line):
    own = at("saving", world=7)
    assert describe_hang({0: own, **theirs}, 2, own, 30.2, "hang/step-3") == line


def test_collectives_are_counted_by_group_where_the_backend_counts(alone):
    class Uncounted:
        group_name = "uncounted"

        def _get_sequence_number_for_group(self):
            raise RuntimeError("does not yet support sequence numbers")

    world = dist.group.WORLD
    before = count_entered([Uncounted(), world])
    dist.barrier()
    assert count_entered([Uncounted(), world]) == {world.group_name: before[world.group_name] + 1}


def test_a_position_is_told_as_it_is():
    assert Position.model_validate_json(at(world=7).model_dump_json()) == at(world=7)


def test_the_place_is_the_function_that_the_loop_has_called():
    here = threading.get_ident()
    found = []

    def validate():
        found.append(find_place(loop.__code__, here))

    def loop():
        found.append(find_place(loop.__code__, here))
        validate()
        [None].sort(key=lambda _: found.append(find_place(loop.__code__, here)))
        with scale_context():
            pass

    @contextmanager
    def scale_context():
        found.append(find_place(loop.__code__, here))
        yield

    loop()
    assert found == ["find_place", "validation", "<lambda>", "scales of float8 weights"]


def test_places_are_parts_of_the_loop():
    """A function that is named anew must be so in the table of places."""
    called = {*train.train.__code__.co_names, "__enter__", "__exit__"}
    assert hangs.PLACES.keys() <= called
    assert set(hangs.PATIENT_PLACES) <= set(hangs.PLACES.values())


def test_stacks_are_those_of_all_threads(tmp_path, alone):
    asleep, end = threading.Event(), threading.Event()

    def sleep_in_a_thread():
        asleep.set()
        end.wait()

    thread = threading.Thread(target=sleep_in_a_thread)
    thread.start()
    asleep.wait()
    write_stacks(tmp_path / "hang" / "step-3", at(world=7), 24.04)
    end.set()
    thread.join()
    assert dist.get_backend() == "gloo"
    assert [path.name for path in (tmp_path / "hang" / "step-3").iterdir()] == ["rank-0.txt"]
    text = (tmp_path / "hang" / "step-3" / "rank-0.txt").read_text()
    assert text.startswith("rank 0 of 1, process ")
    assert "step 3 (forward and backward), unmoved for 24.0 s" in text
    assert "in sleep_in_a_thread" in text
    assert "in test_stacks_are_those_of_all_threads" in text


def test_the_main_thread_is_there_however_many_there_are(tmp_path, alone):
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(120)]
    for thread in threads:
        thread.start()
    write_stacks(tmp_path, at(world=7), 24.04)
    end.set()
    for thread in threads:
        thread.join()
    text = (tmp_path / "rank-0.txt").read_text()
    assert "in test_the_main_thread_is_there_however_many_there_are" in text


def test_nccls_flight_recorder_is_asked_where_there_is_one(tmp_path, alone, monkeypatch):
    recorder = torch._C._distributed_c10d
    monkeypatch.setattr(recorder, "_dump_nccl_trace", lambda: b"collectives", raising=False)
    write_collectives(tmp_path)
    assert not list(tmp_path.iterdir()), "gloo alone"
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    write_collectives(tmp_path)
    assert (tmp_path / "nccl-rank-0").read_bytes() == b"collectives"
    (tmp_path / "nccl-rank-0").unlink()
    monkeypatch.delattr(recorder, "_dump_nccl_trace")
    write_collectives(tmp_path)
    assert not list(tmp_path.iterdir()), "another version of torch"
