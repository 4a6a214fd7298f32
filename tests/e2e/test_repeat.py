"""The same command gives the same tokens and losses, with completions from real SGLang.

Not here: resuming (test_training), other layouts (tests/distributed). What does not repeat: docs/architecture.md.
"""

import json
from pathlib import Path

import pytest

from megatron_gkd.serving import ServerProcess
from tests.support.launching import read_metrics, train
from tests.support.run_config import write_run_config
from tests.support.tiny_models import TOKENIZER_SIZE

NUM_ITERATIONS = 10
VALUES = ("loss", "grad_norm", "lr", "tokens", "rollout/completion_length", "push/probe_difference")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_sglang_repeated_gives_the_same_tokens_and_losses(
    sglang_server: ServerProcess, sglang_model: Path, tmp_path: Path
):
    config = write_run_config(
        tmp_path,
        student={"hf": str(sglang_model)},
        rollout={
            "kind": "sglang",
            "placement": "external",
            "urls": [sglang_server.url],
            "max_new_tokens": 24,
        },
        gkd={"lmbda": 1.0},
        train={"train_iters": NUM_ITERATIONS},
        logging={"num_samples": 8},
    )
    runs = tmp_path / "first", tmp_path / "second"
    try:
        for run in runs:
            train(config, f"train.output_dir={run}")
    finally:
        client = sglang_server.client(vocab_size=TOKENIZER_SIZE, request_timeout_s=60, max_retries=1)
        client.update_weights_from_disk(sglang_model, 0)
    first, second = ((run / "samples.jsonl").read_text().splitlines() for run in runs)
    assert len(first) == NUM_ITERATIONS * 8
    assert len({json.loads(line)["completion"] for line in first}) > 16, "the completions say nothing"
    assert first == second
    for expected, got in zip(*map(read_metrics, runs), strict=True):
        assert {key: got[key] for key in VALUES} == {key: expected[key] for key in VALUES}
