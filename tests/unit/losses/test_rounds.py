"""All ranks of a split vocabulary in one process: their rounds run in step, what each sends is stacked for all.

The collectives themselves, and the functions that users call: tests/distributed/test_split_vocabulary*.py.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

from megatron_gkd.config.loss import LossSettings
from megatron_gkd.losses.distill import DistillLoss
from megatron_gkd.losses.fused_linear import Logits
from megatron_gkd.losses.sparse import KnownEntries
from megatron_gkd.losses.verify.problem import Case, every_case
from tests.support.loss_cases import make_known_entries, make_labels, make_logits, make_upstream

VOCAB, NUM_KNOWN = 64, 20
SPLITS = {"2": [0, 40, 64], "4 uneven": [0, 3, 40, 41, 64], "4 with an empty shard": [0, 30, 64, 64, 64]}


class FakeGroup(NamedTuple):
    """The part of a process group that a loss reads outside its rounds."""

    place: int
    num_ranks: int

    def rank(self):
        return self.place

    def size(self):
        return self.num_ranks


def in_step(runs):
    """What each run of rounds returns, when all of them are sent what all of them yielded."""
    sent = [next(run) for run in runs]
    while True:
        gathered, results = torch.stack(sent), []
        sent = []
        for run in runs:
            try:
                sent.append(run.send(gathered))
            except StopIteration as done:
                results.append(done.value)
        if results:
            assert not sent  # all ranks end in the same round
            return results


def loss_and_target(case: Case, student, teacher, columns: slice, group: Any) -> tuple[Any, Any]:
    """The loss of a token and its target for a shard of the whole teacher."""
    distill = DistillLoss(case.settings or LossSettings(), sft_weight=case.sft_weight, group=group)
    # shards may be uneven here, so the ids are counted from the first column by hand
    labels = make_labels(len(teacher), VOCAB) - columns.start
    shard: Any = Logits(teacher[:, columns])
    if case.from_entries:
        ids, log_probs = make_known_entries(teacher, NUM_KNOWN, dtype=torch.float32)
        shard = KnownEntries(ids, log_probs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_gkd.losses.distill.first_id", lambda num_columns, group: 0)
        chunked = distill._chunked(Logits(student[:, columns]), shard if case.settings else None, labels)
    is_single = chunked.name is not None  # then neither a sum of terms nor a tuple of their targets
    targets = [chunked.target] if is_single else list(chunked.target)
    if case.from_entries:
        known = targets[0].columns_TK
        targets[0] = targets[0]._replace(columns_TK=torch.where(known < 0, known, known - columns.start))
    return chunked.loss, targets[0] if is_single else tuple(targets)


def value_and_gradient(case, student, teacher, bounds, upstream):
    columns = [slice(*pair) for pair in pairwise(bounds)]
    parts = [
        (*loss_and_target(case, student, teacher, c, FakeGroup(rank, len(columns))), c)
        for rank, c in enumerate(columns)
    ]
    torch.manual_seed(0)
    results = in_step([loss.rounds(student[:, c], target) for loss, target, c in parts])
    assert all(loss.equal(results[0][0]) for loss, _ in results)
    grads = [
        loss.gradient(student[:, c], target, saved, upstream)
        for (loss, target, c), (_, saved) in zip(parts, results, strict=True)
    ]
    return results[0][0], torch.cat(grads, -1)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_loss_depends_on_how_the_vocabulary_is_split(split, dtype):
    student, teacher = (z.to(dtype) for z in make_logits(vocab=VOCAB))
    upstream = make_upstream(24).to(dtype)
    # float32 rounds: relative to the largest entry, and to a small divergence
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 5e-6, "atol": 1e-6}
    for case in every_case():
        want, want_grad = value_and_gradient(case, student, teacher, [0, VOCAB], upstream)
        loss, grad = value_and_gradient(case, student, teacher, SPLITS[split], upstream)
        name = str(case)
        torch.testing.assert_close(loss, want, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(
            grad, want_grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
