"""The batch of a dry run; the run itself is in tests/e2e/test_training.py."""

from megatron_gkd.config import load_config
from megatron_gkd.train.dry_run import largest_batch
from tests.support.run_config import write_run_config


def test_every_sample_has_the_longest_prompt_and_completion(tmp_path):
    config = load_config(write_run_config(tmp_path))
    batch = largest_batch(config, vocab_size=50, seed=0)
    assert [len(sample.prompt_ids) for sample in batch.samples] == [64] * 8
    assert [len(sample.completion_ids) for sample in batch.samples] == [12] * 8
    assert {token for sample in batch.samples for token in sample.prompt_ids} == set(range(50))
