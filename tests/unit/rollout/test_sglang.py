"""How prompts reach several servers and results reach all ranks; clients are stand-ins. Real servers: tests/e2e."""

import json
import threading

import pytest

from megatron_gkd.rollout.engine import Completion, EngineDied, EngineError, Sampling
from megatron_gkd.rollout.sglang import SglangRollout

SAMPLING = Sampling(max_new_tokens=4)


class EchoClient:
    """Completes a prompt by its own number and the seed."""

    def __init__(self, number=0, error=None, barrier=None):
        self.number, self.error, self.barrier, self.requests = number, error, barrier, []

    def generate(self, prompts, *, seeds, sampling):
        self.requests.append((prompts, seeds, sampling))
        if self.barrier:
            self.barrier.wait(5)
        if self.error:
            raise self.error
        return [
            Completion((self.number, prompt[0], seed), "length", 7)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


def make_rollout(clients, **changes):
    settings = {
        "is_leader": True,
        "broadcast": lambda value: json.loads(json.dumps(value)),
        "push": lambda version: None,
    }
    return SglangRollout(clients, SAMPLING, **{**settings, **changes})


@pytest.mark.parametrize("num_prompts", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("num_servers", [1, 2, 3])
def test_each_server_gets_one_contiguous_block_and_the_order_is_kept(num_prompts, num_servers):
    clients = [EchoClient(i) for i in range(num_servers)]
    prompts, seeds = [[10 + i] for i in range(num_prompts)], list(range(num_prompts))
    got = make_rollout(clients).generate(prompts, seeds)
    assert [(c.ids[1], c.ids[2]) for c in got] == [(10 + i, i) for i in range(num_prompts)]
    assert [c.ids[0] for c in got] == sorted(c.ids[0] for c in got)
    assert all(len(client.requests) == 1 for client in clients)
    sizes = [len(client.requests[0][0]) for client in clients]
    assert max(sizes) - min(sizes) <= 1


def test_servers_work_at_the_same_time():
    barrier = threading.Barrier(2)
    make_rollout([EchoClient(0, barrier=barrier), EchoClient(1, barrier=barrier)]).generate(
        [[1], [2]], [1, 2]
    )


def test_other_ranks_get_the_leaders_result_without_a_client():
    sent = []
    prompts, seeds = [[1], [2]], [5, 6]
    leader = make_rollout([EchoClient()], broadcast=lambda value: sent.append(value) or value)
    expected = leader.generate(prompts, seeds)
    follower = make_rollout([], is_leader=False, broadcast=lambda value: json.loads(json.dumps(sent[0])))
    assert follower.generate(prompts, seeds) == expected


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (EngineDied("killed, log says ..."), EngineDied, "killed, log says"),
        (KeyError("weight"), EngineError, "KeyError.*weight"),
    ],
)
def test_an_error_of_the_leader_is_raised_by_every_rank(error, kind, message):
    sent = []
    leader = make_rollout([EchoClient(error=error)], broadcast=lambda value: sent.append(value) or value)
    with pytest.raises(kind, match=message):
        leader.generate([[1]], [1])
    follower = make_rollout([], is_leader=False, broadcast=lambda value: json.loads(json.dumps(sent[0])))
    with pytest.raises(kind, match=message):
        follower.generate([[1]], [1])


@pytest.mark.parametrize("seeds", [[1, 1], [1]])
def test_repeated_or_missing_seeds_are_refused_before_anything_is_sent(seeds):
    client = EchoClient()
    with pytest.raises(ValueError, match="different seeds"):
        make_rollout([client]).generate([[1], [2]], seeds)
    assert client.requests == []


def test_completions_are_cut_at_stop_strings():
    rollout = make_rollout([EchoClient(3)], stop=["B"], decode=lambda ids: "".join(chr(64 + i) for i in ids))
    assert rollout.generate([[2]], [1]) == [Completion((3, 2), "stop", 7)]


def test_weights_are_pushed_by_the_given_function_on_every_rank():
    pushed = []
    make_rollout([], is_leader=False, push=pushed.append).push_weights(4)
    assert pushed == [4]


@pytest.mark.parametrize(
    ("clients", "changes", "message"),
    [
        ([], {}, "at least one server"),
        ([EchoClient()], {"stop": ["x"]}, "decode"),
        ([EchoClient()], {"stop": [""], "decode": str}, "empty stop string"),
    ],
)
def test_a_rollout_that_cannot_work_is_refused(clients, changes, message):
    with pytest.raises(ValueError, match=message):
        make_rollout(clients, **changes)
