"""The loss on held-out rows is that of dense float64 models, in every layout, and measuring it changes nothing.

The rows hold what a batch can hold: earlier assistant turns that count, the teacher's own prompts, samples that only fill up
the last batch. So the same rows also show that an update learns from the right tokens, against the teacher's right rows.

Not here: reading the rows (tests/unit/data), writing the metric (tests/e2e).
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_gkd.data.sample import Batch, Prompt
from tests.support.on_ranks import DP, PP2, TP2, TP2_PP2, TP2_SP
from tests.support.run_config import write_config
from tests.support.run_parts import build_parts, copy_of, leave, make_world, update
from tests.support.tiny_models import PAD_ID, SMALL, write_tiny_model

LOSS = {"divergence": "jsd", "beta": 0.3, "temperature": 1.5, "tokens_per_chunk": 4}
LAYOUTS = {2: [(TP2, PP2), (PP2, TP2_SP), (DP, TP2), (TP2_SP, DP)], 4: [(TP2_PP2, PP2), (TP2, DP)]}


def _prompts() -> list[Prompt]:
    """Six rows: two plain, two with earlier turns that count, two with a prompt for the teacher alone."""
    generator = torch.Generator().manual_seed(3)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(250, (size,), generator=generator).tolist())

    counted = (False, False, True, True, False, True, False)
    return [
        Prompt(0, ids(3), ids(5), ""),
        Prompt(1, ids(7), ids(2), "", loss_mask=counted),
        Prompt(2, ids(2), ids(4), "", teacher_ids=ids(11)),
        Prompt(3, ids(6), ids(3), "", teacher_ids=ids(1)),
        Prompt(4, ids(1), ids(9), ""),
        Prompt(5, ids(7), ids(1), "", loss_mask=counted),
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path, float]:
    """(student, teacher, mean loss of the rows by dense models)."""
    from megatron_gkd.losses.verify.reference import dense_divergence
    from tests.support.hf_reference import load_hf_model, logits

    folder = tmp_path_factory.mktemp("validation")
    folders = [
        write_tiny_model(folder / name, seed=seed, **{**SMALL, "hidden_size": size})
        for name, seed, size in (("student", 1, 32), ("teacher", 2, 48))
    ]
    student, teacher = map(load_hf_model, folders)
    losses = []
    for prompt in _prompts():
        counts = [*(prompt.loss_mask or [False] * len(prompt.ids)), *[True] * len(prompt.completion_ids)]
        rows = [i for i, is_counted in enumerate(counts[1:]) if is_counted]
        shift = len(prompt.teacher_ids) - len(prompt.ids) if prompt.teacher_ids else 0
        student_TV = logits(student, prompt.ids + prompt.completion_ids)[rows]
        read = (prompt.teacher_ids or prompt.ids) + prompt.completion_ids
        teacher_TV = logits(teacher, read)[[row + shift for row in rows]]
        how = {key: LOSS[key] for key in ("beta", "temperature")}
        losses.append(dense_divergence(student_TV, teacher_TV, LOSS["divergence"], **how))
    return folders[0], folders[1], torch.cat(losses).mean().item()


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_validation_and_training_see_the_loss_of_dense_models(run_on_ranks, models, tmp_path, num_ranks):
    student, teacher, expected = models
    jobs = [
        write_config(
            tmp_path / f"{split} {teacher_split}",
            student,
            teacher,
            split=split,
            teacher_split=teacher_split,
            loss=LOSS,
            optim={"lr": 1e-3},
            train={"global_batch_size": 4},
        )
        for split, teacher_split in LAYOUTS[num_ranks]
    ]
    run_on_ranks(num_ranks, _validate_and_train, jobs)
    for job in jobs:
        measured = json.loads((job.parent / "measured.json").read_text())
        assert measured["tokens"] == 30
        # measured on one rank: 9e-8 and 2e-8
        assert measured["validation"] == pytest.approx(expected, rel=2e-6), job.parent.name
        assert measured["training"] == pytest.approx(expected, rel=2e-6), job.parent.name
        assert measured["after the update"] != measured["validation"]


def _validate_and_train(rank: int, world_size: int, config_files: list[Path]) -> None:
    from megatron_gkd.config import load_config

    for file in config_files:
        config = load_config(file)
        values, result, weights = _run(config, rank, world_size, with_validation=True)
        if file == config_files[0]:
            _, plain_result, plain_weights = _run(config, rank, world_size, with_validation=False)
            assert result == plain_result, "the update after a validation is another one"
            assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)
        if rank == 0:
            (file.parent / "measured.json").write_text(json.dumps(values))


def _run(config, rank: int, world_size: int, *, with_validation: bool):
    from megatron_gkd.rollout.mixing import sample_from_data

    parts = build_parts(config, make_world(rank, world_size))
    student = parts.student
    # six rows fill the batch of eight with two more
    samples = [sample_from_data(prompt, 0) for prompt in _prompts()]
    batch = Batch((*samples, *[_without_loss(sample) for sample in samples[:2]]))
    values = {}
    if with_validation:
        before, random_state = copy_of(student.model), torch.get_rng_state()
        values = _measure(config, parts)
        assert student.model.training
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(p, before[name]) for name, p in student.model.named_parameters())
    result, values["training"] = update(parts, batch, 0, config)
    if with_validation:
        values["after the update"] = _measure(config, parts)["validation"]
    weights = copy_of(student.model)
    leave()
    return values, result, weights


def _without_loss(sample):
    from dataclasses import replace

    return replace(sample, completion_ids=(), prompt_loss_mask=())


def _measure(config, parts) -> dict[str, float]:
    """Over batches of four, so that the second one is filled up."""
    from megatron_gkd.observability.metrics import Metrics
    from megatron_gkd.parallel.collectives import reduce_values
    from megatron_gkd.train.evaluation import Evaluation
    from megatron_gkd.train.setup import build_loss, build_sharding

    metrics = Metrics()
    sharding = build_sharding(config, parts.student.groups, PAD_ID)
    loss = build_loss(config, parts.student, parts.teacher)
    Evaluation(_prompts(), config, sharding).measure(parts.student, parts.teacher, loss, metrics)
    loss, tokens = metrics.take()
    assert (loss.name, loss.unit, loss.reduce) == ("validation/loss", "nats/token", "sum")
    assert tokens.name == "validation/tokens"
    value, number = reduce_values(
        [loss.value, tokens.value], [loss.reduce, tokens.reduce], device=torch.device("cpu")
    )
    return {"validation": value, "tokens": number}
