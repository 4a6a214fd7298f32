"""Every loss against float64 in one process, and the certificate itself.

Not covered here: tensor parallelism, wrong gradients and the tool's ranks (tests/distributed/test_certificate.py).
"""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_gkd.cli import verify_loss
from megatron_gkd.config import load_config
from megatron_gkd.config.loss import LossSettings
from megatron_gkd.losses.fused_linear import LMHead
from megatron_gkd.losses.verify import reference
from megatron_gkd.losses.verify.certificate import certify, loss_of_training
from megatron_gkd.losses.verify.problem import Case, every_case
from megatron_gkd.platform import products
from megatron_gkd.train.loss import cases_of_run
from tests.support.run_config import write_tree
from tests.unit.config.conftest import write_hf_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens_per_chunk", [5, 32])
def test_every_loss_is_that_of_float64(dtype, tokens_per_chunk):
    for case in every_case(dtype=dtype, tokens_per_chunk=tokens_per_chunk):
        result = certify(case, group=None, device=CPU)
        assert result.is_passed, str(result)
        assert max(result.student_error, result.head_error) <= 2e-3, str(result)


@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 33, 40, 63, 64, 300])
def test_the_problem_has_enough_tokens_and_a_last_chunk_that_is_not_full(tokens_per_chunk):
    case = Case(settings=None, tokens_per_chunk=tokens_per_chunk)
    assert case.num_tokens > 64
    assert tokens_per_chunk == 1 or case.num_tokens % tokens_per_chunk


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "what",
    [{"teacher_scale": 0.0625}, {"teacher_soft_cap": 30.0}, {"teacher_scale": 9.0, "teacher_soft_cap": 0.1}],
)
def test_scale_and_cap_of_the_teacher_are_certified(monkeypatch, dtype, what):
    cases = [
        replace(case, **what)
        for case in every_case(dtype=dtype, tokens_per_chunk=32)
        if case.settings and not case.from_entries
    ]
    assert len(cases) > 20
    for case in cases:
        result = certify(case, group=None, device=CPU)
        assert result.is_passed, str(result)
    monkeypatch.setattr(LMHead, "_finished_", lambda head, logits_CV: logits_CV)
    assert not certify(cases[0], group=None, device=CPU).is_passed


def test_a_gradient_of_the_logits_that_is_rounded_too_stays_within_the_bound(monkeypatch):
    monkeypatch.setattr(products, "rounds_factors", lambda device: True)
    errors = []
    for case in every_case(dtype=torch.bfloat16, tokens_per_chunk=32):
        result = certify(case, group=None, device=CPU)
        assert result.is_passed, str(result)
        errors.append(result.head_error)
    assert max(errors) > 2e-3  # so it was rounded


def test_the_reference_shares_no_code_with_the_losses():
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"collections.abc", "inspect", "torch", "typing"}


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_an_error_of_a_thousandth_is_refused(wrong):
    case = Case(settings=LossSettings(divergence="jsd"), tokens_per_chunk=16)
    own = loss_of_training(case, None)

    def loss(shard):
        total, loss_T = own(shard)
        factor = float("nan") if wrong == "nan" else 1.001
        return (total, loss_T * factor) if wrong == "value" else (total * factor, loss_T)

    result = certify(case, group=None, device=CPU, loss=loss)
    assert not result.is_passed
    assert certify(case, group=None, device=CPU).is_passed


@pytest.fixture
def in_this_process(monkeypatch):
    """The tool without ranks of its own."""

    def certify_here(options):
        cases = verify_loss._cases(options, 1, CPU)
        return [verify_loss._row(certify(case, group=None, device=CPU)) for case in cases]

    monkeypatch.setattr(verify_loss, "_certify_on_ranks", certify_here)


def test_the_tool_writes_rows_and_gates(in_this_process, tmp_path, capsys):
    file = tmp_path / "certificate.json"
    arguments = ["--divergence", "tvd", "--dtype", "fp32", "--tokens-per-chunk", "16", "--json", str(file)]
    assert verify_loss.main(arguments) == 0
    assert "losses are right" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert {row["dtype"] for row in written["rows"]} == {"float32"}
    assert [(gate["name"], gate["sense"]) for gate in written["gates"]] == [
        ("value_error_float32", "<="),
        ("gradient_error_float32", "<="),
    ]
    assert all(0 < gate["value"] <= gate["bound"] for gate in written["gates"])


def test_the_tool_names_an_unknown_divergence(capsys):
    assert verify_loss.main(["--divergence", "kl"]) == 2
    assert "--divergence kl: unknown; it is one of forward_kl" in capsys.readouterr().err


def test_the_tool_certifies_the_loss_of_a_run(in_this_process, config_file, tmp_path):
    file = tmp_path / "certificate.json"
    assert verify_loss.main(["--config", str(config_file), "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["loss"], row["dtype"], row["tokens_per_chunk"]) == ("forward_kl", "bfloat16", 2048)
    assert row["backend"] == "eager"


@pytest.mark.parametrize(
    ("train_iters", "layout", "backend", "tokens_per_chunk"),
    [
        (10, [], "eager", 341),
        (10, ["--tp", "2"], "eager", 682),
        (4000, [], "compiled", 341),
        (4000, ["--tp", "2"], "compiled", 682),
        (4000, ["--dp", "1000"], "eager", 341),
    ],
)
def test_the_tool_certifies_the_chunk_and_the_back_end_that_the_trainer_takes(
    config_file, tree, train_iters, layout, backend, tokens_per_chunk
):
    for model in ("student", "teacher"):
        write_hf_config(Path(tree[model]["hf"]), vocab_size=49_152)
    tree["train"]["train_iters"] = train_iters
    write_tree(config_file, tree)
    options = verify_loss._parse(["--config", str(config_file), *layout])
    (case,) = verify_loss._cases(options, options.tp or 1, CPU)
    assert (case.settings.backend, case.tokens_per_chunk) == (backend, tokens_per_chunk)


def test_a_wrong_loss_gives_exit_code_1_and_is_marked(monkeypatch, capsys):
    row = {
        "loss": "jsd",
        "dtype": "float32",
        "tp": 1,
        "tokens_per_chunk": 16,
        "value_error": 1e-7,
        "student_error": 0.5,
        "head_error": 0.5,
        "value_bound": 1e-6,
        "gradient_bound": 1e-5,
        "passed": False,
    }
    monkeypatch.setattr(verify_loss, "_certify_on_ranks", lambda options: [row])
    assert verify_loss.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["loss={divergence: jsd, sft_weight: 0.25}"], "jsd + cross_entropy"),
        (["loss={divergence: jsd, support: union, tail: none}"], "jsd union none"),
        (["teacher={kind: none}", "loss.sft_weight=1"], "cross_entropy"),
    ],
)
def test_the_loss_of_a_run_is_what_is_certified(config_file, overrides, name):
    (case,) = cases_of_run(load_config(config_file, overrides), CPU)
    assert str(case) == name
    assert case.dtype == torch.bfloat16
    assert certify(case, group=None, device=CPU).is_passed


@pytest.mark.parametrize(
    ("vocab_size", "overrides", "expected"),
    [
        (1003, [], 2048),
        (24_576, [], 682),
        (49_152, ["student.parallel.tensor_model_parallel_size=2"], 682),
        (151_936, [], 256),
        (151_936, ["loss.tokens_per_chunk=40"], 40),
    ],
)
def test_the_chunk_is_picked_from_the_vocabulary_of_a_rank(
    config_file, tree, vocab_size, overrides, expected
):
    for model in ("student", "teacher"):
        write_hf_config(Path(tree[model]["hf"]), vocab_size=vocab_size)
    (case,) = cases_of_run(load_config(config_file, overrides), CPU)
    assert case.tokens_per_chunk == expected
