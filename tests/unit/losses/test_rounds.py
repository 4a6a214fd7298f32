"""All ranks of a split vocabulary in one process: their rounds run in step, what each sends is stacked for all.

The collectives themselves, and the functions that users call: tests/distributed/test_split_vocabulary*.py.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

from megatron_gkd.cli.verify_loss import _losses
from megatron_gkd.losses.combine import Sum, Term
from megatron_gkd.losses.comparison import Joined
from megatron_gkd.losses.cross_entropy import LabelComparison
from megatron_gkd.losses.sparse import local_entries
from tests.support.loss_cases import make_known_entries, make_labels, make_logits, make_upstream

VOCAB, NUM_KNOWN = 64, 20
SPLITS = {"2": [0, 40, 64], "4 uneven": [0, 3, 40, 41, 64], "4 with an empty shard": [0, 30, 64, 64, 64]}


class FakeGroup(NamedTuple):
    """What a comparison may ask of a process group outside its rounds."""

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


def comparison_of(how: dict, group: Any) -> Sum:
    objective, sft_weight = how["objective"], how.get("sft_weight", 0.0)
    terms = []
    if objective is not None:
        comparison = (
            objective.against_entries(group, NUM_KNOWN)
            if how.get("from_entries")
            else objective.against_logits(group)
        )
        terms.append(Term("divergence", (1 - sft_weight) * objective.scale, comparison))
    if sft_weight:
        terms.append(Term("cross_entropy", sft_weight, LabelComparison(group)))
    return Sum(group, tuple(terms))


def target_of(how: dict, teacher, first: int, last: int) -> Joined:
    """The targets of the terms for the shard [first, last) of the whole teacher."""
    objective, labels = how["objective"], make_labels(len(teacher), VOCAB) - first
    shard: Any = teacher[:, first:last]
    targets = []
    if how.get("from_entries"):
        entries = make_known_entries(teacher, NUM_KNOWN, dtype=torch.float32)
        targets.append(
            local_entries(*entries, None, tail=objective.tail, num_tokens=len(teacher), first=first)
        )
    elif objective is not None:
        targets.append(shard if objective.support == "full" else Joined([shard, labels]))
    return Joined([*targets, labels] if how.get("sft_weight") else targets)


def value_and_gradient(how, student, teacher, bounds, upstream):
    columns = [slice(*pair) for pair in pairwise(bounds)]
    targets = [target_of(how, teacher, c.start, c.stop) for c in columns]
    comparisons = [comparison_of(how, FakeGroup(r, len(columns))) for r in range(len(columns))]
    parts = list(zip(comparisons, columns, targets, strict=True))
    torch.manual_seed(0)
    results = in_step([comparison.rounds(student[:, c], target) for comparison, c, target in parts])
    assert all(loss.equal(results[0][0]) for loss, _ in results)
    grads = [
        comparison.gradient(student[:, c], target, stats, upstream)
        for (comparison, c, target), (_, stats) in zip(parts, results, strict=True)
    ]
    return results[0][0], torch.cat(grads, -1)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_loss_depends_on_how_the_vocabulary_is_split(split, dtype):
    student, teacher = (z.to(dtype) for z in make_logits(vocab=VOCAB))
    upstream = make_upstream(24).to(dtype)
    # float32 rounds: relative to the largest entry, and to a small divergence
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 5e-6, "atol": 1e-6}
    for how in _losses(None):
        want, want_grad = value_and_gradient(how, student, teacher, [0, VOCAB], upstream)
        loss, grad = value_and_gradient(how, student, teacher, SPLITS[split], upstream)
        name = str(how)
        torch.testing.assert_close(loss, want, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(
            grad, want_grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
