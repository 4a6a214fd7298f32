"""The models compute what transformers computes, in every layout: all families, tied or not, any vocabulary.

Not here: bf16 (test_student_step), the embedded generation (test_generation), Transformer Engine layers (need a GPU).

Shapes: B = sequences, S = positions, T = rows, V = vocabulary entries.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.data.sample import MicroBatch
from tests.support.on_ranks import (
    DP,
    PP2,
    PP2_VPP2,
    TP2,
    TP2_PP2,
    TP2_PP2_SP,
    TP2_SP,
    Split,
    gather_vocabulary,
    load_model,
    student_groups,
)
from tests.support.tiny_models import LLAMA_3_ROPE, TOKENIZER_SIZE

MODELS = {
    "llama_tied_261": {"family": "llama", "vocab_size": 261, "tied": True},
    "llama_untied_1003": {"family": "llama", "vocab_size": 1003, "tied": False},
    "llama3_rope": {"family": "llama", "tied": True, "rope_parameters": LLAMA_3_ROPE},
    "mistral_untied_263": {
        "family": "mistral",
        "vocab_size": 263,
        "tied": False,
        "head_dim": 24,
        "sliding_window": 40,
    },
    "qwen2_tied_1003": {"family": "qwen2", "vocab_size": 1003, "tied": True},
    "qwen2_untied_261": {"family": "qwen2", "vocab_size": 261, "tied": False},
    "qwen3_tied_261": {"family": "qwen3", "vocab_size": 261, "tied": True, "head_dim": 24},
    "qwen3_untied_1003": {"family": "qwen3", "vocab_size": 1003, "tied": False, "num_groups": 4},
}
LENGTHS, SEQ_LENGTH = (11, 5, 40), 40  # the last without padding, and as long as the sliding window


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Folders with a model and the logits of transformers for all positions of three sequences."""
    from tests.support.hf_reference import load_hf_model, logits
    from tests.support.tiny_models import write_tiny_model

    folders = []
    for seed, (name, options) in enumerate(MODELS.items()):
        folder = write_tiny_model(tmp_path_factory.mktemp(name), seed=seed, **options)
        model = load_hf_model(folder)
        generator = torch.Generator().manual_seed(seed)
        vocab_size = options.get("vocab_size", TOKENIZER_SIZE)
        ids = [torch.randint(vocab_size, (n,), generator=generator) for n in LENGTHS]
        tokens_BS = torch.zeros(len(ids), SEQ_LENGTH, dtype=torch.long)
        mask_BS = torch.zeros(len(ids), SEQ_LENGTH, dtype=torch.bool)
        for b, row in enumerate(ids):
            tokens_BS[b, : len(row)], mask_BS[b, : len(row)] = row, True
        logits_TV = torch.cat([logits(model, row.tolist()) for row in ids])
        save_file(
            {"tokens": tokens_BS, "mask": mask_BS, "logits": logits_TV}, folder.parent / f"{folder.name}.ref"
        )
        folders.append(str(folder))
    return folders


@pytest.mark.parametrize(
    ("num_ranks", "split"),
    [(1, DP), (2, TP2), (2, PP2), (2, PP2_VPP2), (2, TP2_SP), (4, TP2_PP2), (4, TP2_PP2_SP)],
    ids=str,
)
def test_logits_are_those_of_transformers(run_on_ranks, models, num_ranks: int, split: Split):
    run_on_ranks(num_ranks, _compare, models, split)


def _compare(rank: int, world_size: int, folders: list[str], split: Split) -> None:
    from megatron_gkd.models.gpt import head_weight
    from megatron_gkd.models.pipeline import forward_rows

    with student_groups(split) as groups:
        for folder in map(Path, folders):
            expected = load_file(folder.parent / f"{folder.name}.ref")
            model = load_model(folder, groups, split)
            _tap(model, groups)
            micro_batch = MicroBatch(
                expected["tokens"],
                torch.arange(SEQ_LENGTH).expand(len(LENGTHS), -1).contiguous(),
                expected["mask"],
                tuple(range(len(LENGTHS))),
            )
            rows = forward_rows(model, model.config, groups, [micro_batch, micro_batch])
            assert len(rows) == 2 * groups.is_last_stage
            for rows_TH in rows:
                vocab_size = expected["logits"].shape[1]
                logits_TV = gather_vocabulary(rows_TH @ head_weight(model).T, groups, vocab_size)
                error = (logits_TV.double() - expected["logits"]).abs().max()
                limit = 1e-5 * expected["logits"].abs().max()
                assert error <= limit, f"{folder.name}: {error:.1e} > {limit:.1e}"


def _tap(model, groups) -> None:
    from megatron_gkd.models.gpt import HiddenTap

    if groups.is_last_stage:
        HiddenTap(model)
