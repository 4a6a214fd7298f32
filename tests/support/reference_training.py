"""Distillation in one process with transformers, a dense loss and torch's optimizers, all in float64; for the parent process.

Shapes: T = tokens, V = vocabulary entries.
"""

import fnmatch
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from megatron_gkd.data.sample import Batch
from megatron_gkd.losses.verify.reference import dense_cross_entropy, dense_divergence
from tests.support.hf_reference import load_hf_model


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Plain numbers of the optimizer and the loss."""

    divergence: str
    beta: float = 0.5
    temperature: float = 1.0
    lr: float
    min_lr: float
    warmup_iters: int
    train_iters: int = 5
    weight_decay: float
    clip_grad: float
    sgd_momentum: float | None = None
    """AdamW if not given."""
    no_weight_decay: tuple[str, ...] = ("*.bias", "*norm.weight")
    freeze: tuple[str, ...] = ()
    sft_weight: float = 0.0

    @classmethod
    def of(cls, *sections: dict[str, Any], **others: Any) -> Self:
        """The keys of sections of a configuration that are fields here, and others by name."""
        known = {field.name for field in fields(cls)}
        given = {key: value for section in sections for key, value in section.items() if key in known}
        return cls(**given | others)

    def lr_at(self, iteration: int) -> float:
        """Linear warm-up, then half a cosine from lr to min_lr, reached one iteration after the last."""
        step = iteration + 1
        if step <= self.warmup_iters:
            return self.lr * step / self.warmup_iters
        progress = (step - self.warmup_iters) / (self.train_iters + 1 - self.warmup_iters)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class Outcome(NamedTuple):
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def train_reference(student: Path, teacher: Path, batches: list[Batch], recipe: Recipe) -> Outcome:
    """One update per batch: the loss summed over completion tokens, divided by their number in the whole batch."""
    model, judge = load_hf_model(student), load_hf_model(teacher)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not _matches(name, recipe.freeze))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _make_optimizer(model, recipe)
    losses, norms = [], []
    for iteration, batch in enumerate(batches):
        loss = _batch_loss(model, judge, batch, recipe)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        if recipe.clip_grad and norm > recipe.clip_grad:
            for p in trained:
                p.grad *= recipe.clip_grad / norm
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(iteration)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    tied = model.config.tie_word_embeddings
    weights = {k: v.detach() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    return Outcome(losses, norms, weights)


def _make_optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (undecayed if _matches(name, recipe.no_weight_decay) else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    if recipe.sgd_momentum is None:
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), eps=1e-8)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.sgd_momentum)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _batch_loss(model: Any, judge: Any, batch: Batch, recipe: Recipe) -> Tensor:
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for sample in batch.samples:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        rows = slice(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        student_TV = model(ids).logits[0, rows]
        with torch.no_grad():
            teacher_TV = judge(ids).logits[0, rows]
        divergence_T = dense_divergence(
            student_TV, teacher_TV, recipe.divergence, beta=recipe.beta, temperature=recipe.temperature
        )
        cross_entropy_T = dense_cross_entropy(
            student_TV, torch.tensor(sample.completion_ids, dtype=torch.long)
        )
        total = total + ((1 - recipe.sft_weight) * divergence_T + recipe.sft_weight * cross_entropy_T).sum()
        num_tokens += len(sample.completion_ids)
    return total / num_tokens
