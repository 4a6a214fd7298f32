"""Held-out KL and completions on tiny models, against dense float64 references written here."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gkd.report.held_out import held_out_kl, load_completions, write_completions
from tests.support.tiny_models import EOS_ID, write_tiny_model

PROMPTS = [
    [{"role": "user", "content": text}] for text in ("Hi", "What is a noun?", "Count to ten.", "Name a tree")
]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_tiny_model(folder / str(seed), num_layers=2, seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def completions(folders):
    return write_completions(folders[0], PROMPTS, None, max_new_tokens=12, temperature=1.0)


def dense_log_probs(folder, completions):
    """[T, V] float64 log-probabilities of every completion token's position, one row at a time."""
    model, parts = load(folder).double(), []
    for c in completions:
        logits = model(torch.tensor([c.prompt_ids + c.completion_ids])).logits[0]
        parts.append(logits[len(c.prompt_ids) - 1 : -1].log_softmax(-1))
    return torch.cat(parts).detach()


def test_kl_and_constant_equal_the_dense_reference(folders, completions, monkeypatch):
    monkeypatch.setattr("megatron_gkd.report.held_out.TOKENS_PER_CHUNK", 7)
    monkeypatch.setattr("megatron_gkd.report.held_out.ROWS_PER_FORWARD", 3)

    measured = held_out_kl(folders[0], {"same": folders[0], "other": folders[1]}, completions)

    log_p_TV, log_q_TV = (dense_log_probs(folder, completions) for folder in folders)
    p_TV = log_p_TV.exp()
    assert measured.tokens == sum(len(c.completion_ids) for c in completions)
    assert measured.students["same"] == pytest.approx(0, abs=1e-6)
    assert measured.students["other"] == pytest.approx(
        (p_TV * (log_p_TV - log_q_TV)).sum(-1).mean().item(), rel=1e-4
    )
    assert measured.constant == pytest.approx(
        (p_TV * (log_p_TV - p_TV.mean(0).log())).sum(-1).mean().item(), rel=1e-4
    )
    assert measured.teacher_entropy == pytest.approx(-(p_TV * log_p_TV).sum(-1).mean().item(), rel=1e-4)


def test_no_other_constant_distribution_is_closer(folders, completions):
    p_TV = dense_log_probs(folders[0], completions).exp()
    best = held_out_kl(folders[0], {}, completions).constant
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0):
        noise_V = size * torch.randn(p_TV.shape[1], generator=generator, dtype=torch.float64)
        log_c_V = (p_TV.mean(0).log() + noise_V).log_softmax(-1)
        assert (p_TV * (p_TV.log() - log_c_V)).sum(-1).mean().item() > best - 1e-6


def test_another_vocabulary_is_refused(tmp_path, folders, completions):
    larger = write_tiny_model(tmp_path, num_layers=1, vocab_size=300)
    with pytest.raises(ValueError, match="student big has 300 vocabulary entries and the teacher 261"):
        held_out_kl(folders[0], {"big": larger}, completions)


def test_batched_greedy_completions_equal_those_of_one_row_at_a_time(folders):
    together = write_completions(folders[0], PROMPTS, None, max_new_tokens=10, batch_size=3)

    model = load(folders[0])
    for completion in together:
        ids = list(completion.prompt_ids)
        while (len(ids) - len(completion.prompt_ids) < 10 and ids[-1] != EOS_ID) or ids == list(
            completion.prompt_ids
        ):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids == [*completion.prompt_ids, *completion.completion_ids]


def test_written_completions_are_read_back(tmp_path, folders):
    file = tmp_path / "completions.jsonl"
    written = write_completions(folders[0], PROMPTS, file, max_new_tokens=5, temperature=0.7, seed=3)

    assert load_completions(file) == written
    assert [c.prompt for c in written] == PROMPTS
    assert all(len(c.completion_ids) <= 5 and EOS_ID not in c.completion_ids[:-1] for c in written)
    assert write_completions(folders[0], PROMPTS, None, max_new_tokens=5, temperature=0.7, seed=3) == written


def test_rows_without_token_ids_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(ValueError, match="write it with write_completions"):
        load_completions(file)
