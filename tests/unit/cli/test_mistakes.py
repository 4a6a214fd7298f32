"""Likely mistakes, typed as a user types them: each is refused with exit code 2 before any process group or server exists,
and the message names the key, the value and what to change."""

import json
import shutil
import signal
import socket
import subprocess
from types import SimpleNamespace

import pytest

from megatron_gkd.cli import pretrain, serve
from megatron_gkd.serving import TeacherClient
from megatron_gkd.serving.process import ServerProcess
from tests.support.run_config import write_run_config
from tests.support.tiny_models import TOKENIZER_SIZE, write_tiny_model


@pytest.fixture(autouse=True)
def _nothing_may_start(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was started")

    monkeypatch.setattr("torch.distributed.init_process_group", refuse)
    monkeypatch.setattr(ServerProcess, "launch", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path):
    """A run on one rank that would start."""
    folders = {name: str(tmp_path / name) for name in ("student", "teacher")}
    return write_run_config(
        tmp_path, **{name: {"hf": folder, "parallel": {}} for name, folder in folders.items()}
    )


def rewrite(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def without_chat_template(folder):
    for model in ("student", "teacher"):
        (folder / model / "chat_template.jinja").unlink(missing_ok=True)
        rewrite(folder / model / "tokenizer_config.json", chat_template=None)


def other_tokens(folder):
    file = folder / "teacher" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(tokenizer))


def prompts(folder, text):
    (folder / "prompts.jsonl").write_text(text)


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


COLOCATED = "rollout={kind: sglang, max_new_tokens: 12}"

# what is done to the folder, what is typed besides --config, what the message must contain
MISTAKES = {
    "unknown key": (None, ["trian.seed=1"], ["trian", "did you mean 'train'"]),
    "wrong type": (None, ["train.train_iters=ten"], ["train.train_iters", "'ten'", "integer"]),
    "out of range": (None, ["gkd.lmbda=1.5"], ["gkd.lmbda", "1.5", "less than or equal to 1"]),
    "override without value": (None, ["train.seed"], ["train.seed", "="]),
    "unknown divergence": (None, ["loss.divergence=js"], ["loss.divergence", "'js'", "jsd"]),
    "wrong model path": (None, ["student.hf=nowhere"], ["student.hf='nowhere'", "no such folder"]),
    "model folder without config.json": (
        lambda f: (f / "teacher" / "config.json").unlink(), [], ["teacher.hf", "config.json is missing"],
    ),
    "model folder without weights": (
        lambda f: (f / "student" / "model.safetensors").unlink(), [], ["student.hf", "model.safetensors", "safetensors files only"],
    ),
    "download cut off": (
        lambda f: (f / "student" / "model.safetensors").write_bytes(b"\0" * 7), [], ["student.hf", "download the model again"],
    ),
    "unsupported model": (
        lambda f: rewrite(f / "student" / "config.json", model_type="gpt2"), [], ["student.hf", "model_type='gpt2'", "supported: llama"],
    ),
    "two sources of one model": (None, ["student.checkpoint=c"], ["hf=", "checkpoint='c'", "set one to null"]),
    "unfinished checkpoint": (
        lambda f: shutil.copytree(f / "student", f / "half" / "hf"),
        ["student.hf=null", "student.checkpoint=FOLDER/half"], ["student.checkpoint", "was not finished"],
    ),
    "different vocabulary sizes": (
        lambda f: write_tiny_model(f / "student", vocab_size=TOKENIZER_SIZE + 8), [], [f"vocab_size={TOKENIZER_SIZE + 8}", "same vocabulary"],
    ),
    "same size, other tokens": (other_tokens, [], ["teacher", "token"]),
    "TP that does not divide": (
        None, ["student.parallel.tensor_model_parallel_size=3"], ["student.parallel.tensor_model_parallel_size=3", "4 attention heads"],
    ),
    "PP that does not divide": (
        None, ["teacher.parallel.pipeline_model_parallel_size=3"], ["teacher.parallel.pipeline_model_parallel_size=3", "2 layers"],
    ),
    "too few ranks": (
        None, ["student.parallel.tensor_model_parallel_size=2"], ["student.parallel", "= 2 ranks", "the 1 ranks of the job"],
    ),
    "batch that does not divide": (
        None, ["train.micro_batch_size=3"], ["train.global_batch_size=8", "train.micro_batch_size=3", "multiple of 3"],
    ),
    "samples that do not divide": (None, ["rollout.num_samples=3"], ["train.global_batch_size=8", "rollout.num_samples=3"]),
    "SP without TP": (None, ["student.parallel.sequence_parallel=true"], ["sequence_parallel=true", "tensor_model_parallel_size > 1"]),
    "sequences too long": (None, ["data.max_prompt_length=9999"], ["data.max_prompt_length=9999", "max_position_embeddings", "shorten"]),
    "min_lr above lr": (None, ["optim.min_lr=1"], ["min_lr=1.0", "lr=0.003", "lower min_lr"]),
    "warm-up longer than the run": (None, ["optim.warmup_iters=9"], ["optim.warmup_iters=9", "train.train_iters=4"]),
    "warm-up longer than the epochs": (
        None, ["train={train_iters: 0, epochs: 0.5}", "optim.warmup_iters=9"],
        ["train.epochs=0.5 of 20 prompts", "optim.warmup_iters=9", "train.train_iters=2"],
    ),
    "epochs of a stream": (
        None, ["train={train_iters: 0, epochs: 1}", "data.streaming=true"],
        ["train.epochs=1", "streamed", "set train.train_iters"],
    ),
    "epochs and iterations": (None, ["train.epochs=1"], ["train_iters and epochs", "set one to 0"]),
    "misspelt frozen weight": (
        None, ["student.freeze=[model.embed_token.weight]"], ["student.freeze", "embed_token.", "near names: model.embed_tokens.weight"],
    ),
    "misspelt weight without decay": (
        None, ["optim.no_weight_decay=['*.q_norms.*']"], ["optim.no_weight_decay", "'*.q_norms.*' matches no tensor"],
    ),
    "a part of a fused weight": (
        None, ["student.freeze=['*.q_proj.weight']"], ["student.freeze", "linear_qkv", "match all of them or none"],
    ),
    "adapters and frozen weights": (
        None, ["student.lora.rank=4", "student.freeze=['*norm.weight']"], ["freeze=", "lora.rank=4", "remove freeze"],
    ),
    "no prompt file": (None, ["data.prompts=nowhere.jsonl"], ["data.prompts", "nowhere.jsonl"]),
    "empty prompt file": (lambda f: prompts(f, ""), [], ["prompts.jsonl", "no usable prompt"]),
    "prompt file that is no JSON": (lambda f: prompts(f, "Hello\n"), [], ["prompts.jsonl:1", "data.max_bad_rows=0"]),
    "only long prompts": (None, ["data.max_prompt_length=1"], ["prompts.jsonl", "overlong", "data.max_prompt_length=1"]),
    "no completions": (
        lambda f: prompts(f, '{"prompt": "Hi"}\n'), [], ["prompts.jsonl:1", "without completion", "set gkd.lmbda: 1"],
    ),
    "no chat template": (without_chat_template, [], ["chat template", "data.chat_template"]),
    "template that is not valid Jinja": (
        lambda f: (f / "chat.jinja").write_text("{{"), ["data.chat_template=FOLDER/chat.jinja"], ["line 1", "not valid Jinja", "data.chat_template"],
    ),
    "unknown kind of tokenizer": (None, ["data.tokenizer_kind=tiktoken"], ["data.tokenizer_kind", "'tiktoken'", "sentencepiece"]),
    "no SentencePiece model": (
        None, ["data.tokenizer=FOLDER/prompts.jsonl"], ["prompts.jsonl", "not a usable SentencePiece model", "data.tokenizer_kind"],
    ),
    "columns of other names": (
        lambda f: prompts(f, '{"question": "Hi"}\n'), [], ["prompts.jsonl:1", "no prompt", "question", "set data.prompt_key"],
    ),
    "prompt of a wrong type": (lambda f: prompts(f, '{"prompt": 7}\n'), [], ["prompts.jsonl:1", "prompt is a int"]),
    "empty file, streamed": (lambda f: prompts(f, ""), ["data.streaming=true"], ["prompts.jsonl", "no usable prompt"]),
    "weights without files": (None, ["data.weights=[1, 2]"], ["weights=[1.0, 2.0]", "1 files", "one per file"]),
    "weight of nothing": (None, ["data.weights=[0]"], ["weights=[0.0]", "above 0"]),
    "cut in the middle": (None, ["data.truncation=middle"], ["data.truncation", "'middle'", "'left'"]),
    "no Parquet": (
        lambda f: (f / "p.parquet").write_text("x"), ["data.prompts=FOLDER/p.parquet"], ["p.parquet", "cannot be read as Parquet"],
    ),
    "own class that is not there": (
        None, ["data.dataset_class=nowhere:Rows"], ["data.dataset_class='nowhere:Rows'", "no module 'nowhere'", "PYTHONPATH"],
    ),
    "validation without completions": (
        lambda f: (f / "v.jsonl").write_text('{"prompt": "Hi"}\n'), ["evaluation.files=FOLDER/v.jsonl"],
        ["v.jsonl:1", "without completion", "evaluation.files"],
    ),
    "validation without files": (None, ["evaluation.interval=2"], ["interval=2", "evaluation.files"]),
    "output folder is a file": (None, ["train.output_dir=FOLDER/prompts.jsonl"], ["train.output_dir", "is a file", "choose a folder"]),
    "external engine without address": (None, ["rollout={kind: sglang, placement: external}"], ["placement=external", "urls"]),
    "address without http": (
        None, ["rollout={kind: sglang, placement: external, urls: ['localhost:1']}"], ["localhost:1", "http://"],
    ),
    "push folder that is not there": (
        None, [COLOCATED, "rollout.push_dir=FOLDER/nowhere"], ["rollout.push_dir", "nowhere", "name one"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_with_the_key_the_value_and_the_fix(config, tmp_path, capsys, mistake):
    damage, overrides, words = MISTAKES[mistake]
    if damage is not None:
        damage(tmp_path)
    overrides = [override.replace("FOLDER", str(tmp_path)) for override in overrides]
    assert refusal(capsys, pretrain.main(["--config", str(config), *overrides]), words)
    assert not list(tmp_path.glob("run/checkpoints"))


def refusal(capsys, code, words):
    message = capsys.readouterr().err
    assert code == 2
    assert "refused: " in message
    assert all(word in message for word in words), message
    return message


def test_a_missing_configuration_file(tmp_path, capsys):
    assert refusal(capsys, pretrain.main(["--config", str(tmp_path / "run.yaml")]), ["run.yaml"])


def test_a_configuration_file_that_is_no_yaml(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("train: [1,\n")
    assert refusal(capsys, pretrain.main(["--config", str(tmp_path / "run.yaml")]), ["run.yaml", "line"])


def test_no_space_for_a_checkpoint(config, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    words = ["train.output_dir", "0.0 GiB free", "free space"]
    assert refusal(capsys, pretrain.main(["--config", str(config)]), words)


def test_no_space_for_two_copies_of_the_weights(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "small").mkdir()
    free = {str(tmp_path / "small"): 1000}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free.get(str(path), 2**40)))
    overrides = [COLOCATED, f"rollout.push_dir={tmp_path / 'small'}"]
    words = ["rollout.push_dir", "small", "2 copies", "larger folder"]
    assert refusal(capsys, pretrain.main(["--config", str(config), *overrides]), words)


def test_sglang_is_not_installed(config, capsys, monkeypatch):
    monkeypatch.setattr("megatron_gkd.rollout.sglang.find_spec", lambda name: None)
    words = ["rollout.kind=sglang", "not installed", "rollout.kind=megatron"]
    assert refusal(capsys, pretrain.main(["--config", str(config), COLOCATED]), words)


def test_sglang_without_this_package_s_platform(config, capsys, monkeypatch):
    monkeypatch.setattr("megatron_gkd.serving.command.PLATFORM_NAME", "not_there")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["rollout.kind=sglang", "pip install -e .", "rollout.kind=megatron"]
    assert refusal(capsys, pretrain.main(["--config", str(config), COLOCATED]), words)


def test_weights_from_two_machines_in_the_memory_of_one(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    command = ["--config", str(config), COLOCATED, "student.parallel.tensor_model_parallel_size=2"]
    words = ["rollout.push_dir='/dev/shm' (the default)", "student.parallel", "all of them share"]
    assert refusal(capsys, pretrain.main(command), words)


def test_an_external_engine_that_does_not_answer(config, capsys):
    url = f"http://127.0.0.1:{unused_port()}"
    override = f"rollout={{kind: sglang, placement: external, urls: ['{url}'], max_new_tokens: 12}}"
    assert refusal(capsys, pretrain.main(["--config", str(config), override]), ["rollout.urls", url])


def behind_a_port(folder, **keys):
    """Overrides that put a served teacher in the place of the other."""
    section = {"kind": "server", "hf": str(folder / "teacher"), "server_ip": "127.0.0.1", **keys}
    return [f"teacher={json.dumps(section)}", "loss.support=teacher_top_k"]


def test_a_teacher_that_does_not_answer(config, tmp_path, capsys):
    port = unused_port()
    overrides = behind_a_port(tmp_path, server_port=port)
    words = ["teacher.server_ip='127.0.0.1'", f"teacher.server_port={port}", "launch/serve.py"]
    assert refusal(capsys, pretrain.main(["--config", str(config), *overrides]), words)
    assert refusal(capsys, pretrain.main(["--config", str(config), "--dry-run", *overrides]), words)


def test_a_teacher_whose_key_is_not_there(config, tmp_path, capsys):
    overrides = behind_a_port(tmp_path, api_key_env="NO_SUCH_KEY")
    words = ["teacher.api_key_env='NO_SUCH_KEY'", "export"]
    assert refusal(capsys, pretrain.main(["--config", str(config), *overrides]), words)


def test_a_teacher_that_serves_another_tokenizer(config, tmp_path, capsys, monkeypatch):
    served = tmp_path / "elsewhere" / "teacher"
    shutil.copytree(tmp_path / "teacher", served)
    other_tokens(served.parent)
    monkeypatch.setattr(TeacherClient, "check_model", lambda self, **expected: str(served))
    words = [str(served), "differ", "one tokenizer"]
    assert refusal(capsys, pretrain.main(["--config", str(config), *behind_a_port(tmp_path)]), words)


def test_a_server_over_a_smaller_model_of_the_teachers_family(config, tmp_path, capsys, monkeypatch):
    served = tmp_path / "small"
    shutil.copytree(tmp_path / "teacher", served)
    rewrite(served / "config.json", hidden_size=16)
    monkeypatch.setattr(TeacherClient, "check_model", lambda self, **expected: str(served))
    words = ["teacher.server_port=30000", f"{served} with hidden_size=16", "--model"]
    overrides = behind_a_port(tmp_path)
    assert refusal(capsys, pretrain.main(["--config", str(config), *overrides]), words)
    assert refusal(capsys, pretrain.main(["--config", str(config), "--dry-run", *overrides]), words)


def test_more_ranks_than_gpus(config, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    words = ["refused: rank 1 on ", "LOCAL_RANK=1", "1 CUDA devices", "--nproc-per-node"]
    assert refusal(capsys, pretrain.main(["--config", str(config)]), words)


def test_a_port_that_is_taken(tmp_path, capsys):
    model = write_tiny_model(tmp_path / "model")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = serve.main(["--model", str(model), "--device", "cpu", "--port", str(port)])
    assert refusal(capsys, code, [f"--port {port}", "in use", "another"])
