"""Adapters in plain torch on a transformers model, in float64; for the parent process.

Shapes: R = rank, I = inputs, O = outputs of a linear layer.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_gkd.data.sample import Batch
from megatron_gkd.losses.verify.reference import dense_divergence
from tests.support.hf_reference import load_hf_model

_ONE_A = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}


def write_random_adapters(student: Path, folder: Path, rank: int, modules: tuple[str, ...]) -> Path:
    """PEFT-named matrices of ordinary size, B too, with one A for q, k and v and one for gate and up."""
    generator = torch.Generator().manual_seed(5)
    tensors, shared = {}, {}
    for name, weight_OI in sorted(load_file(student / "model.safetensors").items()):
        parts = name.split(".")
        if parts[-2] not in modules:
            continue
        owner = ".".join([*parts[:-2], _ONE_A.get(parts[-2], parts[-2])])
        if owner not in shared:
            shared[owner] = torch.randn(rank, weight_OI.shape[1], generator=generator) * 0.1
        stem = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = shared[owner].clone()
        tensors[f"{stem}.lora_B.weight"] = torch.randn(len(weight_OI), rank, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def loss_and_gradients(
    student: Path, teacher: Path, adapters: Path, scale: float, batch: Batch
) -> tuple[float, dict[str, Any]]:
    """Forward KL per completion token, and its gradient by PEFT's names; that of an A in common is the sum."""
    model, judge = load_hf_model(student).requires_grad_(False), load_hf_model(teacher)
    leaves = {
        name: tensor.double().requires_grad_()
        for name, tensor in load_file(adapters / "adapters.safetensors").items()
    }
    used = _hook_adapters(model, leaves, scale)
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for sample in batch.samples:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        rows = slice(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            teacher_TV = judge(ids).logits[0, rows]
        total = total + dense_divergence(model(ids).logits[0, rows], teacher_TV, "forward_kl").sum()
        num_tokens += len(sample.completion_ids)
    loss = total / num_tokens
    loss.backward()
    return float(loss), {name: leaves[used[name]].grad for name in leaves}


def _hook_adapters(model: Any, leaves: dict[str, Tensor], scale: float) -> dict[str, str]:
    """Add scale B A x to each linear layer; returns which leaf stands for each name."""
    used, first_of = {}, {}
    for name, module in model.named_modules():
        stem = f"base_model.model.{name}.lora_"
        if stem + "A.weight" not in leaves:
            continue
        parent, _, last = name.rpartition(".")
        owner = first_of.setdefault((parent, _ONE_A.get(last, last)), stem + "A.weight")
        used[stem + "A.weight"], used[stem + "B.weight"] = owner, stem + "B.weight"
        a_RI, b_OR = leaves[owner], leaves[stem + "B.weight"]
        module.register_forward_hook(
            lambda _, args, output, a_RI=a_RI, b_OR=b_OR: output + scale * (args[0] @ a_RI.T @ b_OR.T)
        )
    return used
