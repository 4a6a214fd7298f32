"""A configuration whose files exist; the models have no weights, only files that look whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_config import write_tree

HF_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def write_hf_config(folder: Path, **changes: Any) -> Path:
    """A folder with config.json; a change to ``None`` removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (HF_CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """The smallest tree that loads."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    return {
        "student": {"hf": str(write_hf_config(tmp_path / "student"))},
        "teacher": {"hf": str(write_hf_config(tmp_path / "teacher", hidden_size=128))},
        "data": {"prompts": str(prompts)},
        "train": {"train_iters": 2, "global_batch_size": 8, "output_dir": "runs/test"},
    }


@pytest.fixture
def config_file(tmp_path: Path, tree: dict[str, Any]) -> Path:
    return write_tree(tmp_path / "config.yaml", tree)
