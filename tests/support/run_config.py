"""The configuration files of tests: every YAML file that a test makes from a tree is written here."""

from pathlib import Path
from typing import Any

import yaml

from tests.support.on_ranks import DP, PP2, TP2, Split
from tests.support.tiny_models import write_prompts, write_tiny_model

OPTIM = {"lr": 2e-3, "min_lr": 1e-4, "decay_style": "cosine", "warmup_iters": 2, "weight_decay": 0.1}
"""AdamW with a warm-up, a decay of the rate and one of the weights."""


def write_tree(file: Path, tree: dict[str, Any], **sections: Any) -> Path:
    """Write ``tree`` as YAML, with the keys of ``sections`` merged into its sections; return ``file``."""
    merged = {name: {**tree.get(name, {}), **section} for name, section in sections.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**tree, **merged}))
    return file


def write_run_config(folder: Path, **sections: Any) -> Path:
    """A whole run for two ranks, with its own models and prompts: student TP2, teacher of another depth PP2.

    ``sections`` are merged key by key.
    """
    student = write_tiny_model(folder / "student", seed=1)
    teacher = write_tiny_model(folder / "teacher", seed=2, num_layers=2, hidden_size=32, num_heads=2)
    tree: dict[str, Any] = {
        "student": {"hf": str(student), "parallel": _parallel(TP2)},
        "teacher": {"hf": str(teacher), "parallel": _parallel(PP2)},
        "rollout": {"kind": "megatron", "max_new_tokens": 12},
        "gkd": {"lmbda": 0.5},
        "data": {"prompts": str(write_prompts(folder / "prompts.jsonl", 20)), "max_prompt_length": 64},
        "optim": {"lr": 3e-3, "warmup_iters": 1, "decay_style": "cosine"},
        "train": {"train_iters": 4, "global_batch_size": 8, "micro_batch_size": 4, **_written_to(folder)},
    }
    return write_tree(folder / "config.yaml", tree, **sections)


def write_config(
    folder: Path,
    student: Path,
    teacher: Path | None,
    /,
    *,
    split: Split = DP,
    teacher_split: Split = DP,
    **sections: Any,
) -> Path:
    """A run of which a test builds the parts itself, over models that exist; no teacher: ``kind: none``.

    ``sections`` are merged key by key.
    """
    tree: dict[str, Any] = {
        "student": {"hf": str(student), "parallel": _parallel(split)},
        "teacher": {"kind": "none"},
        "rollout": {"kind": "sglang", "max_new_tokens": 16},  # nothing here starts an engine
        "data": {"max_prompt_length": 48},
        "train": {"train_iters": 5, "global_batch_size": 8, "micro_batch_size": 2, **_written_to(folder)},
    }
    if teacher is not None:
        parallel = _parallel(teacher_split)
        tree["teacher"] = {"hf": str(teacher), "parallel": parallel, "micro_batch_size": 2}
    folder.mkdir(parents=True, exist_ok=True)
    tree["data"]["prompts"] = str(write_prompts(folder / "prompts.jsonl"))
    return write_tree(folder / f"{split}.yaml", tree, **sections)


def _written_to(folder: Path) -> dict[str, str]:
    return {"output_dir": str(folder / "run"), "precision": "fp32"}


def _parallel(split: Split) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": split.tp,
        "pipeline_model_parallel_size": split.pp,
        "sequence_parallel": split.sequence_parallel,
    }
    return sizes if split.vpp == 1 else {**sizes, "virtual_pipeline_model_parallel_size": split.vpp}
