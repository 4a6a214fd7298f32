"""Distance between teacher and students on completions that the teacher wrote, from Hugging Face folders.

One process, plain transformers; independent of the training code, so that it can judge what that code made.

Shapes: B = rows in a batch, S = positions, T = completion tokens, H hidden, V = vocabulary entries.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]
ROWS_PER_FORWARD = 8
TOKENS_PER_CHUNK = 256


@dataclass(frozen=True)
class Completion:
    """One row of a completions file; `completion_ids` include the end token if the model stopped with it."""

    prompt: Messages
    completion: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


@dataclass(frozen=True)
class HeldOutKL:
    """Mean over completion tokens, in nats per token."""

    tokens: int
    teacher_entropy: float
    constant: float
    """KL(teacher || c) for the best distribution c that ignores the text."""
    students: dict[str, float]
    """KL(teacher || student), by the name the student was given."""


def load_completions(file: str | Path) -> list[Completion]:
    """Read a file that `write_completions` wrote.

    Raises:
        ValueError: A row lacks the token ids (the file was written by something else) or the file is empty.
    """
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or not all({"prompt_ids", "completion_ids"} <= row.keys() for row in rows):
        raise ValueError(f"{file} has no rows or rows without token ids; write it with write_completions")
    return [
        Completion(row["prompt"], row["completion"], tuple(row["prompt_ids"]), tuple(row["completion_ids"]))
        for row in rows
    ]


@torch.no_grad()
def write_completions(
    folder: str | Path,
    prompts: Sequence[Messages],
    out_file: str | Path | None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Completion]:
    """Let a model complete chat prompts, in batches with a KV cache.

    Args:
        folder: Hugging Face checkpoint with tokenizer and chat template.
        prompts: One list of chat messages per completion.
        out_file: JSONL of prompt, completion (text), prompt_ids and completion_ids; None writes nothing.
        max_new_tokens: Most tokens of one completion.
        temperature: 0 is greedy; anything else samples from the whole vocabulary.
        batch_size: Prompts completed side by side.
        seed: Of the sampling.

    Returns:
        The completions in the order of the prompts.
    """
    model, tokenizer = _load(folder), _load_tokenizer(folder)
    torch.manual_seed(seed)
    all_ids = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts
    ]
    by_length = sorted(range(len(prompts)), key=lambda i: len(all_ids[i]))
    done: dict[int, Completion] = {}
    for batch in _batches(by_length, batch_size):
        new_ids = _generate(
            model, [all_ids[i] for i in batch], tokenizer.eos_token_id, max_new_tokens, temperature
        )
        for i, ids in zip(batch, new_ids, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            done[i] = Completion(prompts[i], text, tuple(all_ids[i]), tuple(ids))
        log.info("%s completed %d of %d prompts", Path(folder).name, len(done), len(prompts))
    completions = [done[i] for i in range(len(prompts))]
    if out_file is not None:
        lines = [json.dumps(vars(completion)) + "\n" for completion in completions]
        Path(out_file).write_text("".join(lines), encoding="utf-8")
    return completions


@torch.no_grad()
def held_out_kl(
    teacher: str | Path, students: Mapping[str, str | Path], completions: Sequence[Completion]
) -> HeldOutKL:
    """Forward KL from the teacher to each student over the completion tokens, and to the best constant.

    With p_t the teacher's distribution at token t and m their mean over the T tokens, any constant c has
        mean_t KL(p_t || c) = -mean_t H(p_t) - sum_v m_v log c_v = [H(m) - mean_t H(p_t)] + KL(m || c),
    which is least for c = m. So the best constant is the mean, and its KL is H(m) - mean_t H(p_t).

    Args:
        teacher: Hugging Face checkpoint folder.
        students: Name to Hugging Face checkpoint folder; the vocabularies must equal the teacher's.
        completions: Text to score, written by the teacher; the tokens of the completions count, no others.

    Raises:
        ValueError: A student's vocabulary has another size.
    """
    teacher_TH, teacher_head_VH = _final_hidden(teacher, completions)
    scored = {name: _final_hidden(folder, completions) for name, folder in students.items()}
    for name, (_, head_VH) in scored.items():
        if head_VH.shape[0] != teacher_head_VH.shape[0]:
            raise ValueError(
                f"student {name} has {head_VH.shape[0]} vocabulary entries and the teacher "
                f"{teacher_head_VH.shape[0]}; forward KL needs one vocabulary: take a student of its family"
            )
    num_tokens = teacher_TH.shape[0]
    mean_V = torch.zeros(teacher_head_VH.shape[0], dtype=torch.float64)
    entropy, kl = 0.0, dict.fromkeys(scored, 0.0)
    for start in range(0, num_tokens, TOKENS_PER_CHUNK):  # never logits of all tokens
        chunk = slice(start, start + TOKENS_PER_CHUNK)
        log_p_TV = (teacher_TH[chunk] @ teacher_head_VH.T).log_softmax(-1)
        p_TV = log_p_TV.exp()
        mean_V += p_TV.sum(0, dtype=torch.float64)
        entropy -= (p_TV * log_p_TV).sum(-1).double().sum().item()
        for name, (hidden_TH, head_VH) in scored.items():
            log_q_TV = (hidden_TH[chunk] @ head_VH.T).log_softmax(-1)
            kl[name] += (p_TV * (log_p_TV - log_q_TV)).sum(-1).double().sum().item()
    mean_V /= num_tokens
    constant = -torch.special.xlogy(mean_V, mean_V).sum().item() - entropy / num_tokens
    return HeldOutKL(
        tokens=num_tokens,
        teacher_entropy=entropy / num_tokens,
        constant=constant,
        students={name: value / num_tokens for name, value in kl.items()},
    )


def _final_hidden(folder: str | Path, completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """[T, H] inputs of the output layer where it predicts completion tokens, and that layer [V, H]."""
    model = _load(folder)
    head: Any = model.get_output_embeddings()
    head_VH = head.weight
    by_length = sorted(range(len(completions)), key=lambda i: len(_sequence(completions[i])))
    hidden: dict[int, Tensor] = {}
    for batch in _batches(by_length, ROWS_PER_FORWARD):
        rows = [torch.tensor(_sequence(completions[i])) for i in batch]
        tokens_BS = pad_sequence(
            rows, batch_first=True
        )  # padding on the right: causal attention never sees it
        hidden_BSH = model.base_model(tokens_BS, use_cache=False).last_hidden_state
        for i, hidden_SH in zip(batch, hidden_BSH, strict=True):
            first = len(completions[i].prompt_ids) - 1
            hidden[i] = hidden_SH[first : first + len(completions[i].completion_ids)].clone()
    return torch.cat([hidden[i] for i in range(len(completions))]), head_VH


def _generate(
    model, prompts: list[list[int]], eos_id: int, max_new_tokens: int, temperature: float
) -> list[list[int]]:
    """New ids of each prompt, up to and with its end token."""
    width = max(len(ids) for ids in prompts)
    tokens_BS = torch.full((len(prompts), width), eos_id)
    mask_BS = torch.zeros_like(tokens_BS)
    for row, ids in enumerate(prompts):
        tokens_BS[row, width - len(ids) :] = torch.tensor(ids)
        mask_BS[row, width - len(ids) :] = 1
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    out_BS = model.generate(
        tokens_BS,
        attention_mask=mask_BS,
        max_new_tokens=max_new_tokens,
        pad_token_id=eos_id,
        eos_token_id=eos_id,
        **sampling,
    )
    new = out_BS[:, width:].tolist()
    return [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in new]


def _sequence(completion: Completion) -> tuple[int, ...]:
    return completion.prompt_ids + completion.completion_ids


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _load(folder: str | Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def _load_tokenizer(folder: str | Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
