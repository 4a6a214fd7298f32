"""Environment variables of a run's processes. Imports no torch, which reads some on import."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placeholders:
    """Values of the placeholders in ``runtime.env_vars`` and ``runtime.log_file`` for one process.

    Attributes:
        output_dir: ``train.output_dir``.
        process: ``rank_<n>``, or the name of a server.
        host: Host name.
    """

    output_dir: Path
    process: str
    host: str = socket.gethostname()

    def fill(self, template: str) -> str:
        """Replace the placeholders in ``template``."""
        # not str.format: other braces, as in a JSON value, stay as they are
        values = {"output_dir": str(self.output_dir.absolute()), "host": self.host, "process": self.process}
        for name, value in values.items():
            template = template.replace(f"{{{name}}}", value)
        return template


@dataclass(frozen=True)
class Environment:
    """The variables of ``runtime.env_vars`` for one process.

    Attributes:
        values: Variables to set.
        kept: (user's value, configured value) of variables that the user has set differently; the user's wins.
        folders: Parent folders of values that start with ``{output_dir}/``.
    """

    values: Mapping[str, str]
    kept: Mapping[str, tuple[str, str]]
    folders: frozenset[Path]

    @classmethod
    def of(
        cls,
        env_vars: Mapping[str, str | None],
        placeholders: Placeholders,
        given: Mapping[str, str] | None = None,
    ) -> "Environment":
        """Replace the placeholders and skip variables that the user has set.

        Args:
            env_vars: ``runtime.env_vars``.
            placeholders: Values for this process.
            given: Variables set by the user; default: ``variables_of_user()``.
        """
        given = variables_of_user() if given is None else given
        templates = {name: value for name, value in env_vars.items() if value is not None}
        wanted = {name: placeholders.fill(value) for name, value in templates.items()}
        values = {name: value for name, value in wanted.items() if name not in given}
        return cls(
            values,
            {n: (given[n], value) for n, value in wanted.items() if n in given and given[n] != value},
            frozenset(Path(v).parent for n, v in values.items() if templates[n].startswith("{output_dir}/")),
        )

    def make_folders(self) -> None:
        """Create ``folders``."""
        # NCCL and the flight recorder do not create the folders of their log and dump files
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)

    def apply(self) -> None:
        """Set the variables in this process."""
        os.environ.update(self.values)

    def report(self) -> None:
        """Log the variables that were set, and warn about those that were not."""
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
    """The environment set by the user or the job script, without torchrun's additions."""
    # torchrun adds variables for its workers, among them OMP_NUM_THREADS=1 (torch 2.13). In a worker, the parent process
    # is torchrun, and Linux shows the environment that it was started with; elsewhere this falls back to the worker's own.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return dict(os.environ)
    try:
        words = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    pairs = (os.fsdecode(word).partition("=") for word in words if b"=" in word)
    return {name: value for name, _, value in pairs}
