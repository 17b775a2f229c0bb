"""What a supervisor decides, without a cluster: single cases, then any order of events at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.launch.happenings import (
    AskGroup,
    Beat,
    CapacitySeen,
    Ended,
    EndGroup,
    EndServer,
    Finish,
    FormGroup,
    GroupNotPlaced,
    HostDraining,
    Say,
    ScaleAsked,
    ServerUp,
    StartServer,
    StopAsked,
    StopServer,
)
from mfdist.launch.standing import Limits
from mfdist.launch.supervise import Supervision
from tests.launch.obedient import LIMITS, World, kinds


def running(trainers=2, servers=1, sizes=None, **limits):
    policy = Supervision(sizes or (trainers,), servers, Limits(**{**vars(LIMITS), **limits}))
    world = World(policy)
    world.run()
    return world


def test_servers_come_first_then_trainers_that_know_where_they_are():
    world = World(Supervision((2,), 2, LIMITS))
    assert world.decide() == [StartServer(0, 1, ""), StartServer(1, 1, "")]
    assert world.hear(ServerUp(0, 1, "a:0", "a")) == []
    assert world.hear(ServerUp(1, 1, "b:1", "b")) == [FormGroup(1, 2, ("a:0", "b:1"))]


def test_without_servers_trainers_are_formed_at_once():
    assert World(Supervision((4,), 0, LIMITS)).decide() == [FormGroup(1, 4, ())]


def test_all_finished_ends_servers_then_the_job():
    world = running()
    world.all_ended("finished")
    assert world.acted[-1] == StopServer(0, 1)
    world.servers.clear()
    assert world.hear(Ended("server", 0, 1, "stopped"))[-1] == Finish("finished", "", "", 7)
    assert world.decide() == []


def test_what_fails_once_the_first_trainer_has_finished_trains_nothing_again():
    for first, second in ((0, 1), (1, 0)):
        world = running(servers=0)
        hows = {0: "finished", 1: "failed"}
        assert world.ended(first, hows[first], message="connection reset") == []
        world.now += 1.0
        assert world.ended(second, hows[second], message="connection reset")[-1].reason == "finished"
        assert world.policy.generation == 1
    world = running(servers=0)
    world.ended(0, "finished")
    world.wait(LIMITS.stop_s + 1)
    assert world.policy.outcome.reason == "finished", "one that never ends"


def test_a_dead_trainer_ends_its_group_and_the_next_is_formed_at_once():
    world = running()
    assert kinds(world.ended(1, "died")) == [EndGroup, Say, FormGroup]
    assert world.group.generation == 2


def test_an_error_waits_for_the_death_that_caused_it():
    world = running()
    assert world.ended(0, "failed", "", "connection reset by peer") == []
    acted = world.ended(1, "died", "", "killed")
    assert kinds(acted) == [EndGroup, Say, FormGroup]
    assert "trainer-1 died: killed" in acted[1].message


def test_an_error_alone_is_taken_for_the_cause_after_a_while():
    world = running()
    world.ended(0, "failed", "unavailable", "a server is late")
    world.now += 2.0
    assert kinds(world.decide()) == [EndGroup, Say, FormGroup]


@pytest.mark.parametrize("kind", ["config", "data", "non_finite"])
def test_what_would_come_again_ends_the_job_with_its_cause(kind):
    world = running()
    world.ended(0, "failed", kind, "batch_size must be a multiple")
    world.servers.clear()
    finish = world.hear(Ended("server", 0, 1, "stopped"))[-1]
    assert finish == Finish("failed", "batch_size must be a multiple", kind, 0)


def test_failures_without_a_commit_back_off_and_give_up():
    world = running()
    starts = []
    for _ in range(3):
        world.ended(0, "died")
        begin = world.now
        while world.group is None:
            world.wait(1)
        starts.append(world.now - begin)
        world.train()
    assert starts == [0.0, 1.0, 2.0]
    world.ended(0, "died", message="no space left")
    world.servers.clear()
    finish = world.hear(Ended("server", 0, 1, "stopped"))[-1]
    assert finish.reason == "failed"
    assert "4 failures in a row" in finish.cause and "no space left" in finish.cause


def test_a_commit_forgives_failures():
    world = running()
    for step in range(1, 20):
        world.ended(0, "died")
        assert world.group is not None
        world.train()
        world.beat(committed=step)
    assert world.policy.failures == []


def test_a_job_that_begins_at_a_commit_knows_it():
    """A trainer that has loaded it forgives nothing, and a job that ends before that tells it."""
    world = World(Supervision((2,), 0, LIMITS, last_commit=200))
    world.run()
    world.ended(0, "died", message="no space left")
    world.train()
    world.beat(committed=200)
    assert len(world.policy.failures) == 1
    world.beat(committed=210)
    assert world.policy.failures == []
    world = World(Supervision((2,), 0, LIMITS, last_commit=200))
    assert world.hear(StopAsked())[-1] == Finish("stopped", "", "", 200)


def test_a_dead_server_is_started_where_it_was_and_the_group_goes_on():
    world = running(servers=2)
    del world.servers[1]
    acted = world.hear(Ended("server", 1, 1, "died", message="killed"))
    assert acted[1:] == [StartServer(1, 2, "a:1")]
    assert acted[0].message == "server-1 died: killed; starting it again from its log; trainers wait"
    assert world.hear(ServerUp(1, 2, "a:1", "a")) == []
    assert world.group.generation == 1


def test_a_server_that_comes_back_elsewhere_makes_a_new_group():
    world = running(servers=2)
    del world.servers[1]
    world.hear(Ended("server", 1, 1, "died"))
    acted = world.hear(ServerUp(1, 2, "c:9", "c"))
    assert kinds(acted) == [EndGroup, Say, FormGroup]
    assert acted[-1].addresses == ("a:0", "c:9")


def test_silence_is_death():
    world = running()
    world.now += 1
    for _ in range(11):
        world.now += 1.0
        world.hear(Beat("trainer", 0, 1))
        world.hear(Beat("server", 0, 1))
    assert [action for action in world.acted if isinstance(action, EndGroup)] == [EndGroup(1)]
    assert "trainer-1 died: on a was silent for 11 s" in world.said()[0]


def test_a_supervisor_that_was_away_itself_takes_nobody_for_dead():
    world = running()
    world.now += 1000.0
    assert world.decide() == []


def test_a_server_that_hangs_is_ended_and_started_again():
    world = running()
    for _ in range(11):
        world.now += 1.0
        world.hear(Beat("trainer", 0, 1, True))
        world.hear(Beat("trainer", 1, 1, True))
    assert [action for action in world.acted if isinstance(action, EndServer)] == [EndServer(0, 1)]
    assert world.servers == {0: 2}


def test_a_group_that_lives_and_does_not_move_is_ended():
    world = running()
    for _ in range(102):
        world.now += 1.0
        world.hear(Beat("trainer", 0, 1, False))
        world.hear(Beat("trainer", 1, 1, False))
        world.hear(Beat("server", 0, 1))
    assert EndGroup(1) in world.acted
    assert "made no step" in world.said()[0]


def test_without_place_for_all_fewer_go_on():
    world = running(sizes=(4, 2, 1))
    world.ended(0, "died")
    acted = world.hear(GroupNotPlaced(2, "one host"))
    assert kinds(acted) == [EndGroup, Say, FormGroup]
    assert acted[-1].size == 2
    world.train()
    world.wait(70)
    assert world.hear(CapacitySeen(3)) == []
    assert AskGroup(3) in world.hear(CapacitySeen(4))
    world.all_ended("stopped")
    assert world.group.size == 4


def test_without_place_for_the_fewest_it_gives_up_in_the_end():
    world = running(trainers=2, max_failures=0)
    world.ended(0, "died")
    assert "failures in a row" in world.policy.outcome.cause


def test_a_stop_saves_first_then_ends_servers():
    world = running()
    assert world.hear(StopAsked()) == [AskGroup(1)]
    world.all_ended("stopped")
    assert world.acted[-1] == StopServer(0, 1)
    world.servers.clear()
    assert world.hear(Ended("server", 0, 1, "stopped"))[-1].reason == "stopped"


def test_a_second_stop_ends_everything_at_once():
    world = running()
    world.hear(StopAsked())
    assert kinds(world.hear(StopAsked(at_once=True))) == [EndGroup, EndServer, Finish]


def test_trainers_that_do_not_stop_in_time_are_ended():
    world = running()
    world.hear(StopAsked())
    world.wait(22)
    assert EndGroup(1) in world.acted and StopServer(0, 1) in world.acted


def test_a_death_while_it_stops_is_no_failure():
    world = running()
    world.hear(StopAsked())
    world.ended(0, "died")
    world.ended(1, "failed", "", "reset")
    world.servers.clear()
    assert world.hear(Ended("server", 0, 1, "stopped"))[-1].reason == "stopped"


def test_sigterm_to_a_trainer_hands_over_to_a_new_group():
    world = running()
    world.all_ended("stopped")
    assert world.group.generation == 2 and world.policy.failures == []


def test_scaling_saves_and_forms_another_group():
    world = running()
    assert AskGroup(1) in world.hear(ScaleAsked((4,)))
    world.all_ended("stopped")
    assert world.group.size == 4


def test_a_host_about_to_go_is_left_by_trainers_then_by_servers():
    world = running(trainers=2, servers=2)  # all on host a
    assert AskGroup(1) in world.hear(HostDraining(("a",)))
    world.all_ended("stopped")
    assert world.acted[-2:] == [StopServer(0, 1), StopServer(1, 1)]
    world.servers.clear()
    for index in range(2):
        assert world.hear(Ended("server", index, 1, "stopped"))[-1] == StartServer(index, 2, "")
    world.hosts = ("b",) * 4
    world.serve()
    assert world.group is not None and world.group.addresses == ("b:0", "b:1")


def test_what_is_told_of_an_earlier_group_is_no_news():
    world = running()
    world.ended(0, "died")
    world.train()
    assert world.hear(Ended("trainer", 1, 1, "died")) == []
    assert world.hear(GroupNotPlaced(1, "")) == []
    assert world.group.generation == 2


STEPS = st.lists(
    st.sampled_from(
        ["trainer dies", "trainer fails", "server dies", "server moves", "group stops", "no place", "silence", "commit",
         "drain a", "drain none", "scale 1", "scale 4", "up", "train", "time", "away"]
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(STEPS, st.sampled_from([(0, 1), (1, 1), (2, 1), (3, 1), (2, 2), (4, 2)]), st.booleans())
def test_whatever_happens_it_goes_on_afterwards_and_ends_clean(steps, servers, is_stopped):
    """After any faults, a cluster that works again finishes the job or stops it, and nothing is left."""
    num_servers, replicas = servers
    limits = Limits(**{**vars(LIMITS), "max_failures": 10**6})
    world = World(Supervision((4, 2, 1), num_servers, limits, replicas=replicas))
    world.decide()
    committed = 0
    for step in steps:
        world.now += 0.5
        group = world.group
        is_training = group is not None and world.policy.group is not None and world.policy.group.phase != "placing"
        match step.split():
            case ["trainer", how] if is_training:
                world.ended(0, "died" if how == "dies" else "failed")
            case ["server", how] if world.servers:
                index, incarnation = next(iter(world.servers.items()))
                del world.servers[index]
                if how == "moves":
                    world.hosts = world.hosts[1:] + world.hosts[:1]
                world.hear(Ended("server", index, incarnation, "died"))
            case ["group", _] if is_training:
                world.all_ended("stopped") if not world.policy.group.ended else None
            case ["no", _] if group is not None and not is_training:
                world.hear(GroupNotPlaced(group.generation, "full"))
            case ["silence"]:
                for _ in range(12):
                    world.now += 1.0
                    world.decide()
            case ["commit"] if is_training:
                committed += 1
                world.beat(committed)
            case ["drain", host]:
                world.hear(HostDraining(() if host == "none" else (host,)))
            case ["scale", size]:
                world.hear(ScaleAsked((int(size),)))
            case ["up"]:
                world.serve()
            case ["train"] if group is not None and not is_training:
                world.train()
            case ["away"]:
                world.now += 100.0
                world.decide()
            case _:
                world.wait(1)
    world.hear(HostDraining(()))
    if is_stopped:
        world.hear(StopAsked())
    for _ in range(400):
        world.now += 1.0
        world.decide()
        if world.policy.outcome is None:
            world.serve()
        for index, incarnation in list(world.servers.items()):
            if world.policy.servers[index].phase == "stopping":
                del world.servers[index]
                world.hear(Ended("server", index, incarnation, "stopped"))
        policy = world.policy.group
        if policy is not None and policy.phase == "placing":
            world.train()
        elif policy is not None and policy.phase == "stopping":
            world.all_ended("stopped")
        elif policy is not None and policy.phase == "training" and not is_stopped:
            world.all_ended("finished")
        if isinstance(world.acted[-1], Finish):
            break
        world.beat()
    assert isinstance(world.acted[-1], Finish)
    assert world.acted[-1].reason == ("stopped" if is_stopped else "finished")
