"""What the loop does when an iteration cannot begin or end; whole runs are in tests/e2e."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.run_config import write_config
from tests.support.run_parts import make_batch, make_world


def test_an_unusable_streamed_row_ends_the_run_with_a_checkpoint_before_it(
    run_on_ranks, tiny_llama, tmp_path
):
    config = write_config(tmp_path, tiny_llama, tiny_llama, data={"streaming": True, "shuffle": False})
    file = tmp_path / "prompts.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], "no JSON", *lines[3:]]))
    (tmp_path / "run").mkdir()
    run_on_ranks(2, _run_into_the_bad_row, config)


def _run_into_the_bad_row(rank: int, world_size: int, config_file) -> None:
    from megatron_gkd.config import load_config
    from megatron_gkd.data.tokenizer import DataError
    from megatron_gkd.train.lifecycle import StopRequest
    from megatron_gkd.train.recorder import Recorder
    from megatron_gkd.train.setup import build_prompts, build_tokenizer
    from megatron_gkd.train.trainer import Trainer

    class Engine:
        def connect(self, student):
            pass

        def push_weights(self, version, probe):
            assert version == 0
            assert probe

    class Checkpoints:
        def save(self, state, metrics, *, wait):
            assert wait
            saved.append(prompts.state_dict()["position"])

    saved = []
    config = load_config(config_file)
    tokenizer = build_tokenizer(config)
    prompts = build_prompts(config, tokenizer)
    job = make_world(rank, world_size)
    parts = dict.fromkeys(("student", "teacher", "loss", "sharding", "evaluation"))
    trainer = Trainer(
        config,
        job,
        prompts,
        Engine(),
        **parts,
        checkpoints=Checkpoints(),
        recorder=Recorder(config, job, tokenizer),
    )
    with pytest.raises(DataError, match=r"prompts\.jsonl:4: not JSON"):
        trainer.train(StopRequest(config.train.output_dir))
    assert saved == [0], "the three prompts in front of the bad row come again"


def test_an_iteration_is_recorded_if_its_push_fails_not_if_its_update_does(
    run_on_ranks, tiny_llama, tmp_path
):
    config = write_config(tmp_path, tiny_llama, tiny_llama)
    (tmp_path / "run").mkdir()
    run_on_ranks(2, _fail_before_and_after_the_update, config)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert (metrics["iteration"], metrics["grad_norm"]) == (1, 0.5)
    assert metrics["time/iteration_s"] >= metrics["time/push_s"] >= 0


def _fail_before_and_after_the_update(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config
    from megatron_gkd.serving import EngineError
    from megatron_gkd.train.lifecycle import TrainState
    from megatron_gkd.train.recorder import Recorder

    config, state = load_config(config_file), TrainState()
    tokenizer = SimpleNamespace(decode=str)
    recorder, batch = (
        Recorder(config, make_world(rank, world_size), tokenizer),
        make_batch(0, ((2, 3), (1, 2))),
    )
    with pytest.raises(EngineError, match="no answer"):
        _fail(recorder, state, batch, "rollout", EngineError("no answer"))
    with pytest.raises(EngineError, match="no weights"):
        _fail(recorder, state, batch, "push", EngineError("no weights"))
    recorder.close()


def _fail(recorder, state, batch, stage: str, error: Exception) -> None:
    """Raise ``error`` in a stage of an iteration: before its update, or in the push behind it."""
    from megatron_gkd.train.step import StepResult

    with recorder.iteration(state) as record:
        if stage == "push":
            state.advance(batch, is_skipped=False, max_skipped_updates=0)
            record.add_update(state, batch, StepResult(1.0, 2.0, 0.5, is_skipped=False), lr=0.1)
        with record.timer(stage):
            raise error
