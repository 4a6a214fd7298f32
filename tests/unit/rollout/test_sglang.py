"""How prompts reach several servers and results reach all ranks; clients are stand-ins. Real servers: tests/e2e."""

import json
import threading

import pytest

from megatron_gkd.config import ConfigError, SglangRolloutConfig
from megatron_gkd.rollout.base import PushReport
from megatron_gkd.rollout.sglang import SglangRollout, api_key_of
from megatron_gkd.serving import Completion, EngineDied, EngineError, Sampling

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


class RunningServers:
    def __init__(self, clients):
        self.clients, self.is_closed = clients, False

    def connect(self):
        return self.clients

    def close(self):
        self.is_closed = True


class Pusher:
    """Notes every push."""

    def __init__(self):
        self.pushes = []

    def push(self, version, probe):
        self.pushes.append((version, probe))
        return PushReport(num_bytes=8, max_difference=0.0, num_probe_tokens=1)


class WithoutWeights(SglangRollout):
    """Connects without a student."""

    def _make_pusher(self, student, folder):
        return Pusher()


@pytest.fixture
def make_rollout(tmp_path):
    """make_rollout(clients, **changes) -> a rollout that is connected."""

    def make(clients, **changes):
        settings = {
            "is_leader": True,
            "broadcast": lambda value: json.loads(json.dumps(value)),
            "push_base": tmp_path,
            "probe_tolerance": 1.0,
        }
        rollout = WithoutWeights(RunningServers(clients), SAMPLING, **{**settings, **changes})
        rollout.connect(None)
        return rollout

    return make


def answers_of(sent):
    """The broadcast of another rank, to which the leader sent these values."""
    values = iter(sent)
    return lambda _: json.loads(json.dumps(next(values)))


@pytest.mark.parametrize("num_prompts", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("num_servers", [1, 2, 3])
def test_each_server_gets_one_contiguous_block_and_the_order_is_kept(make_rollout, num_prompts, num_servers):
    clients = [EchoClient(i) for i in range(num_servers)]
    prompts, seeds = [[10 + i] for i in range(num_prompts)], list(range(num_prompts))
    got = make_rollout(clients).generate(prompts, seeds)
    assert [(c.ids[1], c.ids[2]) for c in got] == [(10 + i, i) for i in range(num_prompts)]
    assert [c.ids[0] for c in got] == sorted(c.ids[0] for c in got)
    assert all(len(client.requests) == 1 for client in clients)
    sizes = [len(client.requests[0][0]) for client in clients]
    assert max(sizes) - min(sizes) <= 1


def test_servers_work_at_the_same_time(make_rollout):
    barrier = threading.Barrier(2)
    make_rollout([EchoClient(0, barrier=barrier), EchoClient(1, barrier=barrier)]).generate(
        [[1], [2]], [1, 2]
    )


def test_other_ranks_get_the_leaders_result_without_a_client(make_rollout):
    sent = []
    prompts, seeds = [[1], [2]], [5, 6]
    leader = make_rollout([EchoClient()], broadcast=lambda value: sent.append(value) or value)
    expected = leader.generate(prompts, seeds)
    follower = make_rollout([], is_leader=False, broadcast=answers_of(sent))
    assert follower.generate(prompts, seeds) == expected


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (EngineDied("killed, log says ..."), EngineDied, "killed, log says"),
        (KeyError("weight"), EngineError, "KeyError.*weight"),
    ],
)
def test_an_error_of_the_leader_is_raised_by_every_rank(make_rollout, error, kind, message):
    sent = []
    leader = make_rollout([EchoClient(error=error)], broadcast=lambda value: sent.append(value) or value)
    with pytest.raises(kind, match=message):
        leader.generate([[1]], [1])
    follower = make_rollout([], is_leader=False, broadcast=answers_of(sent))
    with pytest.raises(kind, match=message):
        follower.generate([[1]], [1])


@pytest.mark.parametrize("seeds", [[1, 1], [1]])
def test_repeated_or_missing_seeds_are_refused_before_anything_is_sent(make_rollout, seeds):
    client = EchoClient()
    with pytest.raises(ValueError, match="different seeds"):
        make_rollout([client]).generate([[1], [2]], seeds)
    assert client.requests == []


def test_completions_are_cut_at_stop_strings(make_rollout):
    rollout = make_rollout([EchoClient(3)], stop=["B"], decode=lambda ids: "".join(chr(64 + i) for i in ids))
    assert rollout.generate([[2]], [1]) == [Completion((3, 2), "stop", 7)]


@pytest.mark.parametrize("is_leader", [True, False])
def test_a_push_hands_version_and_probe_to_the_pusher_on_every_rank(make_rollout, tmp_path, is_leader):
    broadcast = answers_of([{"value": None}, "folder"])
    rollout = make_rollout([EchoClient()], is_leader=is_leader, broadcast=broadcast)
    assert rollout.push_weights(4, [[1, 2]]).num_bytes == 8
    assert rollout._pusher.pushes == [(4, [[1, 2]])]
    assert (tmp_path / "folder").is_dir() == is_leader


def test_closing_stops_the_servers_and_removes_the_pushed_files(make_rollout, tmp_path):
    rollout = make_rollout([EchoClient()])
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "file").write_text("weights")
    for _ in range(2):
        rollout.close()
        assert rollout._servers.is_closed
        assert not folder.exists()


@pytest.mark.parametrize(
    ("clients", "changes", "error", "message"),
    [
        ([], {}, EngineError, "at least one server"),
        ([EchoClient()], {"stop": ["x"]}, ValueError, "decode"),
        ([EchoClient()], {"stop": [""], "decode": str}, ValueError, "empty stop string"),
    ],
)
def test_a_rollout_that_cannot_work_is_refused(make_rollout, clients, changes, error, message):
    with pytest.raises(error, match=message):
        make_rollout(clients, **changes)


def external(api_key_env):
    return SglangRolloutConfig(placement="external", urls=("http://a:1",), api_key_env=api_key_env)


def test_the_key_of_external_servers_comes_from_the_named_variable(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    assert api_key_of(external("A_KEY")) == "secret"
    assert api_key_of(external(None)) is None


@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_key_is_refused_by_name(monkeypatch, value):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(
        ConfigError, match=r"rollout\.api_key_env='A_KEY': this environment variable is not set"
    ):
        api_key_of(external("A_KEY"))
