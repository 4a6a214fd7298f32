"""The teacher's rows and head arrive right on every student rank, whatever the two layouts.

Not here: the arithmetic of the loss on them (test_split_vocabulary_loss, test_student_step).

Shapes: T = rows, H = hidden size, V = vocabulary entries.
"""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.data.sample import Batch, Sample
from tests.support.on_ranks import (
    CPU,
    DP,
    PP2,
    PP4,
    TP2,
    TP2_PP2,
    TP2_SP,
    Split,
    convert_folders,
    load_model,
    student_groups,
)
from tests.support.tiny_models import PAD_ID, write_tiny_model

PROMPT_LENGTHS = (4, 1, 9, 2, 3, 7, 5, 2)
COMPLETION_LENGTHS = (5, 12, 1, 0, 8, 3, 2, 6)  # 0: a sample without any row
MODELS = {
    "llama_tied": {"family": "llama", "tied": True},
    "qwen3_untied": {"family": "qwen3", "tied": False, "vocab_size": 1003},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    """Model folders, each with the hidden rows that transformers computes for every sample of ``_batch``."""
    from tests.support.hf_reference import hidden_rows, load_hf_model

    folders = []
    for seed, (name, options) in enumerate(MODELS.items(), 1):
        folder = write_tiny_model(
            tmp_path_factory.mktemp("teachers") / name, seed=seed, hidden_size=48, **options
        )
        model = load_hf_model(folder)
        rows = {}
        for i, sample in enumerate(_batch().samples):
            first = len(sample.prompt_ids) - 1
            states_SH = hidden_rows(model, sample.prompt_ids + sample.completion_ids)
            rows[str(i)] = states_SH[first : first + len(sample.completion_ids)].clone()
        save_file(rows, folder / "rows.reference")
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def converted_teachers(teachers, run_on_ranks, tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("converted") / folder.name for folder in teachers]
    run_on_ranks(1, convert_folders, list(zip(teachers, folders, strict=True)))
    return folders


@pytest.mark.parametrize(
    ("num_ranks", "student"),
    [(2, TP2), (2, PP2), (2, DP), (2, TP2_SP), (4, TP2_PP2), (4, TP2), (4, PP2)],
    ids=str,
)
def test_rows_are_those_of_transformers_for_every_layout_of_the_teacher(
    run_on_ranks, teachers, num_ranks: int, student: Split
):
    layouts = [DP, TP2, PP2, TP2_SP] if num_ranks == 2 else [DP, TP2, PP2, TP2_PP2, PP4]
    run_on_ranks(num_ranks, _score, teachers, student, layouts)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_heads_shard_is_split_and_padded_like_the_students_vocabulary(
    run_on_ranks, teachers, converted_teachers, num_ranks: int
):
    run_on_ranks(num_ranks, _load_heads, teachers, converted_teachers)


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    samples = []
    for row, (prompt, completion) in enumerate(zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)):
        ids = torch.randint(250, (prompt + completion,), generator=generator).tolist()
        samples.append(
            Sample(
                row=row,
                sample_index=0,
                prompt_ids=tuple(ids[:prompt]),
                completion_ids=tuple(ids[prompt:]),
                is_on_policy=True,
                finish_reason="length",
                weight_version=0,
            )
        )
    return Batch(tuple(samples))


def _score(rank: int, world_size: int, folders: list[Path], student: Split, layouts: list[Split]) -> None:
    from megatron_gkd.parallel.groups import make_model_groups

    with student_groups(student) as groups:
        batch = _batch()
        teacher_groups = [make_model_groups(split.tp, split.pp) for split in layouts]
        for folder, (split, own) in itertools.product(folders, zip(layouts, teacher_groups, strict=True)):
            expected = load_file(folder / "rows.reference")
            micro_batches = batch.micro_batches(
                2,
                dp_rank=groups.dp_rank,
                dp_size=groups.layout.dp_size,
                seq_length=batch.padded_length(2),
                pad_id=PAD_ID,
            )
            signals = _make_teacher(folder, split, own, groups).score(batch, micro_batches)
            own_rows = _rows_of_student(folder, student, groups, micro_batches)
            case = f"{folder.name}, teacher {split}"
            if not groups.is_last_stage:
                assert signals == [], case
                continue
            for signal, rows_TH, micro_batch in zip(signals, own_rows, micro_batches, strict=True):
                want_TH = torch.cat([expected[str(i)] for i in micro_batch.indices])
                limit = 2e-6 * torch.cat(list(expected.values())).abs().max()
                assert signal.rows_TH.shape == want_TH.shape, case
                assert _distance(signal.rows_TH, want_TH) <= limit, f"{case}: transformers"
                assert _distance(signal.rows_TH, rows_TH) <= limit, f"{case}: order of select_rows"


def _distance(a_TH: torch.Tensor, b_TH: torch.Tensor) -> float:
    return (a_TH.double() - b_TH.double()).abs().max().item() if a_TH.numel() else 0.0


def _make_teacher(folder: Path, split: Split, groups, student_groups):
    from megatron_gkd.teacher.megatron import MegatronTeacher

    return MegatronTeacher(
        load_model(folder, groups, split, is_headless=True),
        groups,
        student_layout=student_groups.layout,
        student_dp_rank=student_groups.dp_rank,
        micro_batch_size=3,  # does not divide a copy's share: the last micro-batch has blank rows
        pad_id=PAD_ID,
        device=CPU,
    )


def _rows_of_student(folder: Path, split: Split, groups, micro_batches) -> list[torch.Tensor]:
    """What the student itself, with the teacher's weights, would hand to the loss."""
    from megatron_gkd.models.gpt import HiddenTap
    from megatron_gkd.models.pipeline import forward_rows

    model = load_model(folder, groups, split)
    if groups.is_last_stage:
        HiddenTap(model)
    return forward_rows(model, model.config, groups, micro_batches)


def _load_heads(rank: int, world_size: int, folders: list[Path], converted: list[Path]) -> None:
    from megatron_gkd.checkpoint.weights import WeightSource, load_head
    from megatron_gkd.config.hf_shapes import load_hf_shapes
    from megatron_gkd.parallel.groups import Layout

    sources = [WeightSource(folder, False) for folder in folders] + [
        WeightSource(folder, True) for folder in converted
    ]
    splits = [split for split in (DP, TP2, PP2, TP2_PP2) if world_size % (split.tp * split.pp) == 0]
    for source, split, dtype in itertools.product(sources, splits, (torch.float32, torch.bfloat16)):
        shapes = load_hf_shapes(source.hf_folder)
        folder = next(f for f in folders if f.name == source.folder.name)
        weights = load_file(folder / "model.safetensors")
        head_VH = weights["model.embed_tokens.weight" if shapes.tied else "lm_head.weight"].to(dtype)
        layout = Layout(split.tp, split.pp, world_size)
        tp_rank, dp_rank, pp_rank = layout.coordinates(rank)
        is_last_stage = pp_rank == split.pp - 1
        # 128 x TP2: the last shard of the small vocabulary is mostly padding; 200: a student with fewer rows
        multiples = (-(-shapes.vocab_size // m) * m for m in (split.tp, 128 * split.tp))
        for padded in (*multiples, 200):
            shard_VH = load_head(
                source,
                shapes,
                tp_rank=tp_rank,
                tp_size=split.tp,
                padded_vocab=padded,
                dp_rank=dp_rank,
                dtype=dtype,
                device=CPU,
                is_needed=is_last_stage,
            )
            assert (shard_VH is not None) == is_last_stage
            if is_last_stage:
                full_VH = torch.cat([head_VH, head_VH.new_zeros(padded, head_VH.shape[1])])[:padded]
                assert torch.equal(shard_VH, full_VH.chunk(split.tp)[tp_rank]), (source, split, padded)
