"""What a supervisor decides about table servers in pairs, without a cluster."""

from mfdist.launch.happenings import Ended, EndGroup, FormGroup, Say, ServerUp, StartServer
from mfdist.launch.standing import Limits
from mfdist.launch.supervise import Supervision
from tests.launch.obedient import LIMITS, World, kinds


def paired(**limits):
    policy = Supervision((2,), 4, Limits(**{**vars(LIMITS), **limits}), replicas=2)
    world = World(policy, hosts=("a", "b", "a", "b"))
    world.run()
    return world


def test_a_pair_goes_on_with_one_and_the_lost_one_comes_back_wherever_there_is_place():
    world = paired()
    assert world.policy.addresses == ("a:0", "b:1", "a:2", "b:3")
    del world.servers[0]
    assert kinds(world.hear(Ended("server", 0, 1, "died", message="killed"))) == [Say, StartServer]
    assert "the other one of its pair goes on" in world.said()[-1]
    assert world.policy.failures == []
    assert world.hear(ServerUp(0, 2, "c:9", "c")) == []
    assert world.policy.addresses == ("c:9", "b:1", "a:2", "b:3")
    assert world.group.generation == 1


def test_a_group_needs_one_server_of_each_pair_once_all_have_been_up():
    world = World(Supervision((2,), 4, LIMITS, replicas=2))
    world.decide()
    for index in (0, 1, 2):
        assert world.hear(ServerUp(index, 1, f"a:{index}", "a")) == []
    assert kinds(world.hear(ServerUp(3, 1, "a:3", "a"))) == [FormGroup]
    world.train()
    for index in (0, 3):
        del world.servers[index]
        world.hear(Ended("server", index, 1, "died"))
    assert kinds(world.ended(0, "died")) == [EndGroup, Say, FormGroup]
    world.train()
    del world.servers[1]
    world.hear(Ended("server", 1, 1, "died"))
    assert len(world.policy.failures) == 2
    assert kinds(world.ended(0, "died")) == [EndGroup, Say]
    world.wait(4)
    world.serve()
    assert world.group.generation == 3


def test_one_of_a_pair_that_dies_again_and_again_backs_off_by_itself_and_ends_nothing():
    world = paired(max_failures=0, max_backoff_s=4.0)
    waits = []
    for incarnation in range(1, 6):
        del world.servers[1]
        world.hear(Ended("server", 1, incarnation, "failed", "config", "no space left"))
        begin = world.now
        while 1 not in world.servers:
            world.wait(1)
        waits.append(world.now - begin)
        world.serve()
    assert waits == [0.0, 1.0, 2.0, 4.0, 4.0]
    assert world.group.generation == 1 and world.policy.outcome is None
