"""Which nodes train together: what node 0 decides from what it knows."""

import pytest

from torchtrain.tools.membership import Attempt, Limits, Membership, Presence


def limits(count=2, usable=(1, 2), max_restarts=3):
    return Limits(
        count=count,
        usable=usable,
        max_restarts=max_restarts,
        lost_s=10.0,
        last_call_s=30.0,
        timeout_s=300.0,
    )


def waits(launcher="a", after=-1, **more):
    return Presence(launcher, after, **more)


def begun(launchers, count=2, usable=(1, 2), **more):
    """The decisions of a node 0 that trains with these nodes, by node rank, as attempt 0."""
    membership = Membership(limits(count, usable, **more))
    here = {rank: waits(launcher) for rank, launcher in launchers.items()}
    membership.decide(here, now=0.0)
    decision = membership.decide(here, now=30.0)  # the last call is over
    attempt = decision.attempt or membership.attempt
    assert attempt.launchers == launchers
    return membership


def test_all_nodes_begin_at_once():
    decision = Membership(limits()).decide({0: waits("a"), 1: waits("b")}, now=0.0)
    assert decision.attempt == Attempt(0, {0: "a", 1: "b"})


def test_the_first_attempt_waits_a_little_for_more_nodes_than_are_needed():
    membership = Membership(limits(3, (1, 2, 3)))
    assert "1 node is there; the config can be shared by 1, 2 or 3" in (
        membership.decide({0: waits("a")}, now=0.0).news
    )
    assert not membership.decide({0: waits("a"), 1: waits("b")}, now=29.0).attempt
    assert not membership.decide({0: waits("a"), 1: waits("b")}, now=58.0).attempt
    decision = membership.decide({0: waits("a"), 1: waits("b")}, now=59.0)
    assert decision.attempt.launchers == {0: "a", 1: "b"}
    assert decision.attempt.cause == ""


def test_too_few_nodes_wait_and_then_end_with_the_numbers_that_are_possible():
    membership = Membership(limits(4, (2, 4)))
    assert not membership.decide({0: waits("a")}, now=0.0).over
    decision = membership.decide({0: waits("a")}, now=301.0)
    assert decision.over == (
        "comm.init_timeout_seconds have passed, and 1 node is there; "
        "the config can be shared by 2 or 4"
    )


def test_a_node_beyond_a_usable_number_waits_and_takes_the_place_of_a_lost_one():
    membership = Membership(limits(3, (1, 2)))
    here = {0: waits("a"), 1: waits("b"), 2: waits("c")}
    assert membership.decide(here, now=0.0).attempt.launchers == {0: "a", 1: "b"}
    assert membership.decide(here, now=1.0).change == ""
    assert membership.decide(here | {1: waits("b", silent_s=10.0)}, now=2.0).change == "broken"
    here = {0: waits("a", after=0), 1: waits("b", silent_s=11.0), 2: waits("c")}
    assert membership.decide(here, now=3.0, step=8).attempt == Attempt(
        1, {0: "a", 2: "c"}, 1, "node 1 was lost in step 8", has_lost=True, is_restart=True
    )


@pytest.mark.parametrize("back", [{}, {1: waits("new")}])
def test_a_lost_node_is_done_without_until_it_is_back(back):
    membership = begun({0: "a", 1: "b"})
    assert membership.decide({0: waits("a"), 1: waits("b")}, now=31.0).change == ""
    here = {0: waits("a"), 1: waits("b", silent_s=10.0)} | back
    assert membership.decide(here, now=32.0).change == "broken"
    attempt = membership.decide(here | {0: waits("a", after=0)}, now=33.0).attempt
    assert set(attempt.launchers) == {0, *back}
    assert attempt.cause == "node 1 was lost before the first step"
    assert attempt.restarts == 1
    if not back:
        here = {0: waits("a", after=0), 1: waits("new")}
        assert membership.decide(here, now=34.0).change == "join"
        here[0] = waits("a", after=1)
        attempt = membership.decide(here, now=35.0).attempt
        assert attempt == Attempt(2, {0: "a", 1: "new"}, 1, "node 1 has come")


def test_the_others_end_their_ranks_where_those_of_one_have_failed():
    membership = begun({0: "a", 1: "b"})
    failed = waits("b", after=0, cause="rank 1 was ended by SIGKILL in step 8")
    decision = membership.decide({0: waits("a"), 1: failed}, now=31.0)
    assert decision.change == "broken"
    assert decision.news == "waiting for node 0, whose ranks have not ended yet"
    guess = waits("a", after=0, cause="rank 0 failed with exit status 1", is_guess=True)
    attempt = membership.decide({0: guess, 1: failed}, now=32.0).attempt
    assert (attempt.cause, attempt.has_lost, attempt.restarts) == (failed.cause, False, 1)


def test_a_node_that_comes_does_not_count_unless_a_rank_fails_meanwhile():
    for cause, is_restart in (("", False), ("rank 0 failed with exit status 1", True)):
        membership = begun({0: "a"})
        assert membership.decide({0: waits("a"), 1: waits("b")}, now=31.0).change == "join"
        ended = {0: waits("a", after=0, cause=cause), 1: waits("b")}
        attempt = membership.decide(ended, now=32.0).attempt
        assert attempt.launchers == {0: "a", 1: "b"}
        assert (attempt.is_restart, attempt.restarts) == (is_restart, int(is_restart))
        assert attempt.cause == (cause or "node 1 has come")


def test_a_node_that_leaves_again_while_the_others_save_for_it_is_said_to_have():
    membership = begun({0: "a"})
    assert membership.decide({0: waits("a"), 1: waits("b")}, now=31.0).change == "join"
    attempt = membership.decide({0: waits("a", after=0)}, now=32.0).attempt
    assert attempt.launchers == {0: "a"}
    assert attempt.cause == "a node had come, and left again"


def test_nodes_that_stop_one_after_the_other_for_one_that_comes_have_not_failed():
    membership = begun({0: "a", 1: "b"}, 3, (1, 2, 3))
    here = {0: waits("a"), 1: waits("b"), 2: waits("c")}
    assert membership.decide(here, now=31.0).change == "join"
    here[1] = waits("b", after=0)
    assert membership.decide(here, now=32.0).change == "join"
    here[0] = waits("a", after=0)
    attempt = membership.decide(here, now=33.0).attempt
    assert set(attempt.launchers) == {0, 1, 2}
    assert not attempt.is_restart


def test_the_ranks_do_not_wait_for_those_of_a_node_that_is_lost_while_they_save():
    membership = begun({0: "a", 1: "b"}, 3, (1, 2, 3))
    here = {0: waits("a"), 1: waits("b"), 2: waits("c")}
    assert membership.decide(here, now=31.0).change == "join"
    assert membership.decide(here | {1: waits("b", silent_s=10.0)}, now=32.0).change == "broken"


def test_restarts_are_used_up():
    membership = begun({0: "a", 1: "b"}, max_restarts=0)
    here = {0: waits("a", after=0), 1: waits("b", silent_s=10.0)}
    assert membership.decide(here, now=31.0, step=3).over == (
        "node 1 was lost in step 3; the ranks have been started again 0 times, as often as allowed"
    )


def test_a_node_that_was_taken_for_lost_joins_again():
    """Its launcher was stopped, as in a machine that was suspended, and goes on."""
    membership = begun({0: "a", 1: "b"})
    here = {0: waits("a", after=0), 1: waits("b", silent_s=10.0)}
    assert membership.decide(here, now=31.0).attempt.launchers == {0: "a"}
    assert membership.decide({0: waits("a", 0), 1: waits("b")}, now=32.0).change == "join"
