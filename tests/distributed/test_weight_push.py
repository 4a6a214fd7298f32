"""A push hands over exactly the student's present weights, or fails on every rank alike.

The server is stood in for by a client that loads the pushed file into transformers on rank 0.

Not here: the real server (tests/e2e/test_sglang_server), the HTTP client (tests/unit/serving).
"""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_gkd.serving.errors import EngineError, StaleWeights
from tests.support.on_ranks import DP, PP2, TP2, TP2_PP2, TP2_SP, Split
from tests.support.run_config import write_config
from tests.support.run_parts import PROBE, build_parts, leave, make_batch, make_world, update
from tests.support.tiny_models import SMALL, write_tiny_model

LENGTHS = ((4, 5), (2, 9), (6, 3), (3, 1))
LAYOUTS = [(2, TP2), (2, PP2), (2, DP), (2, TP2_SP), (4, TP2_PP2)]


@pytest.fixture(scope="module", params=["llama_tied", "qwen3_untied"])
def models(request, tmp_path_factory) -> tuple[Path, Path]:
    folder, tied = tmp_path_factory.mktemp(request.param), request.param == "llama_tied"
    family = {"family": request.param.partition("_")[0], "tied": tied}
    student = write_tiny_model(folder / "student", seed=1, **SMALL, **family)
    return student, write_tiny_model(folder / "teacher", seed=2, **SMALL)


@pytest.mark.parametrize(("num_ranks", "split"), LAYOUTS, ids=str)
def test_the_pushed_file_holds_the_students_present_weights(
    run_on_ranks, models, tmp_path, num_ranks, split: Split
):
    config = _config(models, tmp_path, split)
    run_on_ranks(num_ranks, _push_after_updates, config)
    exported, pushed = (
        load_file(tmp_path / "exported.safetensors"),
        load_file(tmp_path / "pushed.safetensors"),
    )
    original = load_file(models[0] / "model.safetensors")
    assert pushed.keys() == original.keys()
    for name in original:
        assert torch.equal(pushed[name], exported[name]), name
        assert not torch.equal(pushed[name], original[name]), f"{name} was not trained"


@pytest.mark.parametrize(("num_ranks", "split"), [(2, TP2), (2, PP2), (4, TP2_PP2)], ids=str)
def test_a_layer_that_one_rank_does_not_write_stops_all_ranks_before_any_request(
    run_on_ranks, models, tmp_path, num_ranks, split: Split
):
    run_on_ranks(num_ranks, _leave_a_layer_out, _config(models, tmp_path, split))


@pytest.mark.parametrize(("num_ranks", "split"), [(2, TP2), (2, PP2), (4, TP2_PP2)], ids=str)
def test_a_stale_slice_of_one_rank_is_noticed_by_the_probe_on_all_ranks(
    run_on_ranks, models, tmp_path, num_ranks, split: Split
):
    run_on_ranks(num_ranks, _keep_a_stale_slice, _config(models, tmp_path, split))


def test_a_server_that_refuses_or_answers_nonsense_stops_all_ranks(run_on_ranks, models, tmp_path):
    run_on_ranks(2, _meet_bad_servers, _config(models, tmp_path, TP2))


def test_a_folder_that_ranks_do_not_share_is_noticed(run_on_ranks, models, tmp_path):
    run_on_ranks(2, _push_into_separate_folders, _config(models, tmp_path, TP2), tmp_path)


def test_a_folder_that_cannot_be_written_is_named_on_all_ranks(run_on_ranks, models, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run_on_ranks(2, _push_into_a_file, _config(models, tmp_path, TP2), tmp_path / "file")


class StandInClient:
    """Loads what it is told to into transformers; notes all requests."""

    def __init__(self, hf_folder: Path):
        self._hf_folder, self._model = hf_folder, None
        self.requests: list[tuple[str, int]] = []

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.requests.append((folder.name, version))
        config = AutoConfig.from_pretrained(self._hf_folder, attn_implementation="eager")
        self._model = AutoModelForCausalLM.from_config(config).eval()
        result = self._model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert result.missing_keys == ["lm_head.weight"] * config.tie_word_embeddings
        assert not result.unexpected_keys

    def score(self, sequences) -> list[list[float]]:
        scores = []
        for ids in sequences:
            with torch.no_grad():
                log_probs_SV = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(log_probs_SV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist())
        return scores


def _config(models, folder: Path, split: Split) -> Path:
    train = {"global_batch_size": 4, "micro_batch_size": 2}
    return write_config(folder, *models, split=split, teacher_split=split, optim={"lr": 1e-2}, train=train)


def _prepare(rank: int, world_size: int, config_file: Path):
    from megatron_gkd.config import load_config

    config = load_config(config_file)
    parts = build_parts(config, make_world(rank, world_size))
    client = StandInClient(config.student.hf)
    return config, parts, client


def _weight_file(folder: Path, student, parameters=None):
    from megatron_gkd.rollout.weight_sync import SharedWeightFile

    return SharedWeightFile(folder, student, parameters or dict(student.model.named_parameters()))


def _pusher(file, student, *clients):
    from megatron_gkd.rollout.weight_sync import WeightPusher

    return WeightPusher(student, file, clients, 2e-4)


def _push_after_updates(rank: int, world_size: int, config_file: Path) -> None:
    from tests.support.export import export_weights

    config, parts, client = _prepare(rank, world_size, config_file)
    student, folder = parts.student, config_file.parent
    pusher = _pusher(_weight_file(folder / "push", student), student, client)
    pusher.push(0, PROBE)
    for version in (1, 2, 3):
        update(parts, make_batch(version), version, config)
        report = pusher.push(version, PROBE)
    assert report.max_difference < 5e-5
    assert report.num_probe_tokens == 5
    file = folder / "push" / "slot_1" / "model.safetensors"
    assert report.num_bytes == sum(w.nbytes for w in load_file(file).values())
    if rank == 0:
        assert client.requests == [("slot_0", 0), ("slot_1", 1), ("slot_0", 2), ("slot_1", 3)]
        shutil.copyfile(file, folder / "pushed.safetensors")
    else:
        assert client.requests == []
    export_weights(
        student.model, folder / "exported.safetensors", student.shapes, student.groups, student.dtype
    )
    leave()


def _leave_a_layer_out(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.rollout.weight_sync import WeightPushFailed

    _, (student, _, _), client = _prepare(rank, world_size, config_file)
    file = _weight_file(config_file.parent / "push", student)
    pusher = _pusher(file, student, client)
    pusher.push(0, PROBE)  # so that the layer's bytes of an earlier push lie in a file
    pusher.push(1, PROBE)
    client.requests.clear()
    if rank == world_size - 1:
        file._slices = [
            piece for piece in file._slices if not piece.parameter.startswith("decoder.layers.0.")
        ]
    with pytest.raises(WeightPushFailed, match=r"push of version 2: \d+ of \d+ bytes were written"):
        pusher.push(2, PROBE)
    assert client.requests == []
    leave()


def _keep_a_stale_slice(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.rollout.weight_sync import WeightPushFailed

    config, parts, client = _prepare(rank, world_size, config_file)
    student = parts.student
    parameters = dict(student.model.named_parameters())
    if rank == world_size - 1:
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        parameters[name] = parameters[name].detach().clone()  # does not follow the updates
    pusher = _pusher(_weight_file(config_file.parent / "push", student, parameters), student, client)
    pusher.push(0, PROBE)
    update(parts, make_batch(1), 1, config)
    with pytest.raises(
        WeightPushFailed, match=r"differs from the trainer's by .* nats, more than rollout\.probe_tolerance"
    ):
        pusher.push(1, PROBE)
    leave()


def _meet_bad_servers(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.rollout.weight_sync import WeightPushFailed, trainer_log_probs

    _, (student, _, _), _ = _prepare(rank, world_size, config_file)

    def server(load=lambda folder, version: None, score=None):
        client = StandInClient(Path("unused"))
        client.update_weights_from_disk, client.score = load, score
        return client

    def fail(error):
        raise error

    def answer(value):
        return lambda sequences: [[value] * (len(ids) - 1) for ids in sequences]

    truth = trainer_log_probs(student, PROBE)
    good = server(score=lambda sequences: truth)
    cases = {
        "disk on fire": [server(load=lambda *_: fail(EngineError("disk on fire")))],
        "version 0 instead of 1": [server(score=lambda _: fail(StaleWeights("version 0 instead of 1")))],
        "ValueError": [server(score=lambda sequences: truth[:1])],  # an answer too short
        "nan nats": [server(score=answer(float("nan")))],
        "by nan": [good, server(score=answer(float("nan"))), good],
        r"by \d": [good, server(score=answer(-1.0))],  # only the second of two servers
    }
    for message, clients in cases.items():
        pusher = _pusher(_weight_file(config_file.parent / "push", student), student, *clients)
        with pytest.raises(WeightPushFailed, match=message):
            pusher.push(1, PROBE)
    _pusher(_weight_file(config_file.parent / "push", student), student, good, good).push(1, PROBE)
    leave()


def _push_into_separate_folders(rank: int, world_size: int, config_file: Path, folder: Path) -> None:
    from megatron_gkd.rollout.weight_sync import WeightPushFailed

    _, (student, _, _), client = _prepare(rank, world_size, config_file)
    pusher = _pusher(_weight_file(folder / f"of_rank_{rank}", student), student, client)
    with pytest.raises(WeightPushFailed, match=r"not every rank sees .* all nodes share"):
        pusher.push(0, PROBE)
    if rank == 1:  # a file of an earlier push does not help
        shutil.copytree(folder / "of_rank_0", folder / "of_rank_1")
    dist.barrier()
    with pytest.raises(WeightPushFailed, match="not every rank sees"):
        pusher.push(2, PROBE)
    assert client.requests == []
    leave()


def _push_into_a_file(rank: int, world_size: int, config_file: Path, blocked: Path) -> None:
    from megatron_gkd.rollout.weight_sync import WeightPushFailed

    _, (student, _, _), client = _prepare(rank, world_size, config_file)
    with pytest.raises(WeightPushFailed, match=r"cannot write the weights.*set rollout\.push_dir"):
        _pusher(_weight_file(blocked, student), student, client).push(0, PROBE)
    leave()
