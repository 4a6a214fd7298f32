"""What the loop does when an iteration cannot begin; whole runs are in tests/e2e."""

from types import SimpleNamespace

import pytest

from tests.support.run_config import write_config
from tests.support.run_parts import make_world


def test_an_unusable_streamed_row_ends_the_run_with_a_checkpoint_before_it(
    run_on_ranks, tiny_llama, tmp_path
):
    config = write_config(tmp_path, tiny_llama, tiny_llama, data={"streaming": True, "shuffle": False})
    file = tmp_path / "prompts.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], "no JSON", *lines[3:]]))
    run_on_ranks(2, _run_into_the_bad_row, config)


def _run_into_the_bad_row(rank: int, world_size: int, config_file) -> None:
    from megatron_gkd.config import load_config
    from megatron_gkd.data.tokenizer import DataError
    from megatron_gkd.observability.timing import Timers
    from megatron_gkd.train.inputs import build_prompts, build_tokenizer
    from megatron_gkd.train.loop import Trainer
    from megatron_gkd.train.stop import StopRequest

    saved = []

    class WithoutModels(Trainer):
        def connect_rollout(self):
            pass

        def save_finally(self):
            saved.append(self.loader.state_dict()["position"])

    config = load_config(config_file)
    tokenizer = build_tokenizer(config)
    loader = build_prompts(config, tokenizer)
    records = SimpleNamespace(timers=Timers(), status=lambda *args: None, start=lambda iteration: None)
    parts = dict.fromkeys(("student", "teacher", "teacher_head_VH", "rollout", "store"))
    trainer = WithoutModels(config, make_world(rank, world_size), tokenizer, loader, records=records, **parts)
    with pytest.raises(DataError, match=r"prompts\.jsonl:4: not JSON"):
        trainer.run(StopRequest(config.train.output_dir))
    assert saved == [0], "the three prompts in front of the bad row come again"
