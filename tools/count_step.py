"""Count the files and functions of the package that one iteration and one loss enter.

    python tools/count_step.py             both counts
    python tools/count_step.py --list      and the functions, file by file
    python tools/count_step.py --json F    both as JSON

The iteration runs from one optimizer step to the next, on one CPU rank with the embedded engine and forward KL; the loss is
``linear_distill_loss`` forward and backward. First calls are not counted, nor are comprehensions.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.run_config import write_run_config  # noqa: E402

PACKAGE = ROOT / "megatron_gkd"
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
NUM_ITERATIONS = 3
"""The first one compiles and fills caches; the count runs from the update of the second to that of the third."""


class Entered:
    """Functions of the package that were called, by file."""

    def __init__(self) -> None:
        self.by_file: dict[str, set[tuple[int, str]]] = {}

    @property
    def num_files(self) -> int:
        """Files with at least one of them."""
        return len(self.by_file)

    @property
    def num_functions(self) -> int:
        """All of them."""
        return sum(map(len, self.by_file.values()))

    def start(self) -> None:
        """Note every call of this thread from here on."""
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Note no further call."""
        sys.setprofile(None)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Note the calls inside the block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def _note(self, frame: Any, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name not in COMPREHENSIONS:
            file = Path(code.co_filename)
            if file.is_relative_to(PACKAGE):
                place = code.co_firstlineno, code.co_qualname
                self.by_file.setdefault(str(file.relative_to(PACKAGE)), set()).add(place)


def count_iteration(folder: Path) -> Entered:
    """What the third iteration of a tiny run in ``folder`` enters."""
    from megatron_gkd.config import load_config
    from megatron_gkd.platform.device import prepare_process

    config = load_config(
        write_run_config(
            folder,
            student={"parallel": {}},
            teacher={"parallel": {}},
            loss={"divergence": "forward_kl", "certify": False},
            train={"train_iters": NUM_ITERATIONS},
        )
    )
    config.train.output_dir.mkdir()
    platform = prepare_process()
    # imported once Megatron can be
    from megatron_gkd.train.lifecycle import StopRequest
    from megatron_gkd.train.setup import build_trainer

    entered, num_steps = Entered(), 0
    with ExitStack() as cleanup:
        trainer = build_trainer(config, platform, cleanup)
        optimizer: Any = trainer.student.optimizer
        step = optimizer.step

        def counted_step() -> Any:
            nonlocal num_steps
            entered.stop()
            num_steps += 1
            result = step()
            if num_steps == NUM_ITERATIONS - 1:
                entered.start()
            return result

        optimizer.step = counted_step
        trainer.train(StopRequest(config.train.output_dir))
    return entered


def count_loss() -> Entered:
    """What one forward KL from hidden states enters, forward and backward."""
    import torch

    from megatron_gkd.losses import linear_distill_loss

    generator = torch.Generator().manual_seed(0)
    student_TH, student_head_VH, teacher_TH, teacher_head_VH = (
        torch.randn(shape, generator=generator) for shape in ((8, 16), (64, 16), (8, 16), (64, 16))
    )
    student_TH.requires_grad_()
    student_head_VH.requires_grad_()

    def train() -> None:
        loss_T: Any = linear_distill_loss(
            student_TH, student_head_VH, teacher_TH, teacher_head_VH, divergence="forward_kl"
        )
        loss_T.mean().backward()

    train()
    entered = Entered()
    with entered.counting():
        train()
    return entered


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(
        prog="count_step.py", description="Count files and functions of one iteration and one loss."
    )
    parser.add_argument("--list", action="store_true", help="print the functions of every file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        counts = {"iteration": count_iteration(Path(folder)), "loss": count_loss()}
    for name, entered in counts.items():
        sys.stdout.write(f"{name}: {entered.num_files} files, {entered.num_functions} functions\n")
        for file, functions in sorted(entered.by_file.items()) if options.list else ():
            names = ", ".join(name for _, name in sorted(functions))
            sys.stdout.write(f"  {file} {len(functions)}: {names}\n")
    if options.json is not None:
        tree = {
            name: {"files": entered.num_files, "functions": entered.num_functions}
            for name, entered in counts.items()
        }
        options.json.write_text(json.dumps(tree) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
