"""Environment variables of a run's processes, set before anything reads them; imports no torch."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """What the placeholders of ``runtime.env_vars`` and ``runtime.log_file`` mean in one process.

    Attributes:
        output_dir: ``train.output_dir``.
        process: ``rank_<n>``, or the name of a server.
        host: Name of the machine.
    """

    output_dir: Path
    process: str
    host: str = socket.gethostname()

    def fill(self, template: str) -> str:
        """``template`` with its placeholders replaced."""
        values = {"output_dir": str(self.output_dir.absolute()), "host": self.host, "process": self.process}
        for name, value in values.items():
            template = template.replace(f"{{{name}}}", value)
        return template


@dataclass(frozen=True)
class Environment:
    """What ``runtime.env_vars`` means for one process.

    Attributes:
        values: Variables to set.
        kept: Variables that the user had given another value, which stays, with both values.
        folders: Where variables that begin with {output_dir} point to.
    """

    values: Mapping[str, str]
    kept: Mapping[str, tuple[str, str]]
    folders: frozenset[Path]

    @classmethod
    def of(
        cls, env_vars: Mapping[str, str | None], place: Place, given: Mapping[str, str] | None = None
    ) -> "Environment":
        """Fill in the placeholders and leave out what the user has set.

        Args:
            env_vars: ``runtime.env_vars``.
            place: The process.
            given: What the user has set; default: see ``variables_of_user``.
        """
        given = variables_of_user() if given is None else given
        templates = {name: value for name, value in env_vars.items() if value is not None}
        wanted = {name: place.fill(value) for name, value in templates.items()}
        values = {name: value for name, value in wanted.items() if name not in given}
        return cls(
            values,
            {n: (given[n], value) for n, value in wanted.items() if n in given and given[n] != value},
            frozenset(Path(v).parent for n, v in values.items() if templates[n].startswith("{output_dir}/")),
        )

    def make_folders(self) -> None:
        """Make the folders that the variables point to; the libraries that write there do not."""
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)

    def apply(self) -> None:
        """Set the variables in this process."""
        os.environ.update(self.values)

    def report(self) -> None:
        """Log what was set and what was not."""
        if self.values:
            log.info("Environment: %s", " ".join(f"{name}={value}" for name, value in self.values.items()))
        for name, (given, wanted) in self.kept.items():
            log.warning(
                "Environment: %s=%s was set outside and wins over runtime.env_vars.%s=%s",
                name,
                given,
                name,
                wanted,
            )


def variables_of_user() -> Mapping[str, str]:
    """The environment as the user, or the job script, gave it.

    torchrun adds variables of its own for its workers, OMP_NUM_THREADS=1 for one, that no user wanted; so in a worker it is
    the environment that torchrun itself was started with, where the system shows it (Linux), else the worker's.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return dict(os.environ)
    try:
        words = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    pairs = (os.fsdecode(word).partition("=") for word in words if b"=" in word)
    return {name: value for name, _, value in pairs}
