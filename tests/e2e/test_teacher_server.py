"""A teacher behind a port: what real SGLang answers, and training on it, with the rollouts of a second server.

Faults that real SGLang cannot be asked for: tests/unit/serving/test_teacher. Layouts: tests/distributed/test_served_teacher.
"""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gkd.serving import EngineReplyInvalid, ServerProcess, TeacherClient
from tests.e2e.conftest import CONTEXT_LENGTH
from tests.support.hf_reference import load_hf_model
from tests.support.launching import launch, read_metrics, read_status, wait_for_run
from tests.support.on_ranks import TP2
from tests.support.run_config import write_config, write_run_config
from tests.support.run_parts import build_parts, leave, make_batch, make_world, update
from tests.support.tiny_models import TOKENIZER_SIZE, write_tiny_model

pytestmark = pytest.mark.timeout(400)

LAST_ID = TOKENIZER_SIZE - 1


def make_teacher(server: ServerProcess, *, vocab_size: int = TOKENIZER_SIZE, top_k: int = 8) -> TeacherClient:
    return TeacherClient(
        server.url,
        vocab_size=vocab_size,
        top_k=top_k,
        requests_in_flight=4,
        request_timeout_s=60,
        max_retries=1,
    )


def check(
    client: TeacherClient, *, model_type: str = "llama", num_sequence_tokens: int = CONTEXT_LENGTH
) -> str:
    return client.check_model(model_type=model_type, num_sequence_tokens=num_sequence_tokens)


def make_sequences() -> tuple[list[list[int]], list[int]]:
    """Twelve sequences of many lengths, some with the last id of the vocabulary, and where their prompts end."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(TOKENIZER_SIZE, (3 + 7 * i,), generator=generator).tolist() for i in range(10)]
    sequences += [[5, LAST_ID, 6, LAST_ID, LAST_ID - 1], [LAST_ID, LAST_ID]]
    return sequences, [min(2 * i, len(ids) - 1) for i, ids in enumerate(sequences[:-2])] + [1, 0]


@pytest.mark.parametrize("top_k", [1, 8, TOKENIZER_SIZE])
def test_the_rows_are_the_most_probable_tokens_of_transformers(sglang_server, sglang_model, top_k):
    client = make_teacher(sglang_server, top_k=top_k)
    check(client)
    sequences, starts = make_sequences()
    model = load_hf_model(sglang_model)
    for ids, start, got in zip(sequences, starts, client.score_top_k(sequences, starts), strict=True):
        with torch.no_grad():
            log_probs_SV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        want_TV = log_probs_SV[start : len(ids) - 1]
        assert got.ids_TK.shape == (len(ids) - 1 - start, top_k)
        best_TK = want_TV.topk(top_k).values.numpy()
        same_ids_TK = want_TV.gather(1, torch.tensor(got.ids_TK).long()).numpy()
        tokens_T = want_TV.gather(1, torch.tensor(ids[start + 1 :])[:, None])[:, 0].numpy()
        # measured: 9e-6
        np.testing.assert_allclose(got.log_probs_TK, best_TK, rtol=0, atol=1e-4)
        np.testing.assert_allclose(got.log_probs_TK, same_ids_TK, rtol=0, atol=1e-4)
        np.testing.assert_allclose(got.token_log_probs_T, tokens_T, rtol=0, atol=1e-4)


def test_the_whole_vocabulary_has_mass_one_and_holds_its_last_id(sglang_server):
    client = make_teacher(sglang_server, top_k=TOKENIZER_SIZE)
    check(client)
    (got,) = client.score_top_k([[5, 6, LAST_ID, 7]], [0])
    assert np.abs(np.exp(got.log_probs_TK).sum(1) - 1).max() < 1e-5
    assert (got.ids_TK == LAST_ID).sum(1).tolist() == [1, 1, 1]


def test_a_look_at_the_server_names_its_model_and_refuses_another_one_without_harm(
    sglang_server, sglang_model
):
    assert Path(check(make_teacher(sglang_server))) == sglang_model
    for vocab_size in (LAST_ID, TOKENIZER_SIZE + 1):
        with pytest.raises(
            EngineReplyInvalid, match=f"vocab_size={TOKENIZER_SIZE}, expected is {vocab_size}"
        ):
            check(make_teacher(sglang_server, vocab_size=vocab_size))
    with pytest.raises(EngineReplyInvalid, match="of type 'llama'"):
        check(make_teacher(sglang_server), model_type="qwen3")
    with pytest.raises(EngineReplyInvalid, match="--context-length"):
        check(make_teacher(sglang_server), num_sequence_tokens=CONTEXT_LENGTH + 1)
    assert Path(check(make_teacher(sglang_server))) == sglang_model, "the server suffered from the questions"


def served(model: Path, port: int, *, top_k: int) -> str:
    keys = f"kind: server, hf: {model}, server_ip: 127.0.0.1, server_port: {port}, top_k: {top_k}, max_retries: 0"
    return f"teacher={{{keys}}}"


@pytest.mark.slow
def test_with_the_whole_vocabulary_loss_and_gradient_are_those_of_the_hidden_states(
    run_on_ranks, sglang_server, sglang_model, tmp_path
):
    student = write_tiny_model(tmp_path / "student", seed=1, hidden_size=32, num_layers=2, ffn=64)
    config = write_config(
        tmp_path, student, sglang_model, split=TP2, teacher_split=TP2, optim={"clip_grad": 0.0}
    )
    port = sglang_server.settings.port
    run_on_ranks(2, _compare_teachers, config, served(sglang_model, port, top_k=TOKENIZER_SIZE))


def _compare_teachers(rank: int, world_size: int, file: Path, behind_a_port: str) -> None:
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        chosen = f"loss.divergence={divergence}"
        exact_loss, exact = _loss_and_gradient(rank, world_size, file, [chosen])
        loss, gradient = _loss_and_gradient(
            rank, world_size, file, [chosen, "loss.support=teacher_top_k", behind_a_port]
        )
        assert loss == pytest.approx(exact_loss, rel=1e-4), divergence
        assert (gradient - exact).norm() <= 1e-4 * exact.norm(), divergence


def _loss_and_gradient(
    rank: int, world_size: int, file: Path, overrides: list[str]
) -> tuple[float, torch.Tensor]:
    from megatron_gkd.config import load_config

    config = load_config(file, overrides)
    parts = build_parts(config, make_world(rank, world_size))
    student = parts.student
    result, loss = update(parts, make_batch(0), 0, config)
    assert result.grad_norm > 0
    gradient = torch.cat([parameter.main_grad.flatten().clone() for parameter in student.model.parameters()])
    leave()
    return loss, gradient


class Relay(socketserver.ThreadingTCPServer):
    """A port that leads to another one until it is closed."""

    daemon_threads = True

    def __init__(self, target: int):
        super().__init__(("127.0.0.1", 0), RelayedConnection)
        self.target = target
        self.port = self.server_address[1]
        threading.Thread(target=lambda: self.serve_forever(poll_interval=0.05), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class RelayedConnection(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.target)) as far:
            threading.Thread(target=pump, args=(self.request, far), daemon=True).start()
            pump(far, self.request)


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(sglang_server: ServerProcess) -> Iterator[Relay]:
    relay = Relay(sglang_server.settings.port)
    yield relay
    relay.close()


@pytest.mark.slow
def test_two_ranks_train_on_a_teacher_server_and_stop_when_it_is_gone(relay, sglang_model, tmp_path):
    config = write_run_config(
        tmp_path,
        rollout={"kind": "sglang", "start_timeout_s": 240, "num_threads": 1},
        loss={"support": "teacher_top_k"},
    )
    run, log_file = tmp_path / "run", tmp_path / "log"
    teacher = served(sglang_model, relay.port, top_k=32)
    process = launch(config, teacher, "train.train_iters=1000", log_file=log_file)
    wait_for_run(lambda: len(read_metrics(run)) >= 3, process, log_file, 400)
    relay.close()
    assert process.wait(60) != 0
    status = read_status(run)
    assert status["state"] == "failed"
    assert f"http://127.0.0.1:{relay.port}/generate" in status["reason"], status
    iteration = status["iteration"]
    assert (run / "checkpoints" / f"iter_{iteration:07d}" / "manifest.json").is_file()
    for line in read_metrics(run):
        assert 0 < line["loss"] < 20
        assert 0.5 < line["loss/retained_mass"] <= 1 + 1e-6
        assert line["grad_norm"] > 0
        assert line["push/probe_difference"] < 2e-4
