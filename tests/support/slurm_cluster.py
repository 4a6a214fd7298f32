"""A SLURM of its own on this machine: munged, slurmctld and one slurmd per node, all in one folder.

A guard runs each daemon, so that nothing of it survives the test, even one that is killed.

Needs root (slurmd starts steps as other users) and Debian's packages slurm-wlm and munge. Each node pretends to have one GPU, so
that the shipped job files run as they are.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from megatron_gkd.serving import guard
from tests.support.processes import wait_until

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
START_TIMEOUT_S = 20.0
GRACE_S = 10.0

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
KillWait=5
InactiveLimit=0
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 Gres=gpu:1 State=UNKNOWN\n"


def why_not() -> str | None:
    """Why no cluster can be started here; ``None`` if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not found; apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "the daemons of a SLURM cluster need root"
    return None


class SlurmCluster:
    """Nodes n1, n2, ... on this machine. Use as a context manager.

    Args:
        folder: For everything the daemons write; a short path, since a socket lies in it.
        num_nodes: Nodes.

    Attributes:
        environment: For commands that talk to the cluster.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self._folder, self._num_nodes = folder, num_nodes
        self._daemons: list[subprocess.Popen] = []
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "SlurmCluster":
        self._write_config()
        try:
            self._start_daemons()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def run(self, *command: str, **options) -> str:
        """Standard output of a command that talks to the cluster.

        Raises:
            AssertionError: It failed; the message has its output.
        """
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, **options)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def job_state(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` says of it."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def close(self) -> None:
        """End the daemons, the nodes first, with the steps they run."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(GRACE_S + guard.KILL_TIMEOUT_S + 5)
        self._daemons.clear()

    def _write_config(self) -> None:
        host, ports = socket.gethostname().partition(".")[0], _free_ports(self._num_nodes + 1)
        for name in ("state", *(f"spool.{node}" for node in self._nodes())):
            (self._folder / name).mkdir(parents=True)
        text = _CONFIG.format(host=host, folder=self._folder, controller_port=ports[0])
        for name, port in zip(self._nodes(), ports[1:], strict=True):
            text += _NODE.format(name=name, host=host, port=port)
        (self._folder / "slurm.conf").write_text(text)
        (self._folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (self._folder / "cgroup.conf").write_text("")

    def _start_daemons(self) -> None:
        folder = self._folder
        folder.chmod(0o755)
        self.run("mungekey", "--create", f"--keyfile={folder}/munge.key")
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_until((folder / "munge.socket").exists, START_TIMEOUT_S, explain=lambda: "munged")
        self._start("slurmctld", "-D")
        for node in self._nodes():
            self._start("slurmd", "-D", "-N", node)
        wait_until(self._all_idle, START_TIMEOUT_S, explain=lambda: "all nodes idle")

    def _start(self, *command: str) -> None:
        guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(GRACE_S), *command]
        with (self._folder / "daemons.log").open("ab") as output:
            daemon = subprocess.Popen(
                guarded, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
        self._daemons.append(daemon)

    def _all_idle(self) -> bool:
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return result.stdout.split() == ["idle"] * self._num_nodes

    def _nodes(self) -> list[str]:
        return [f"n{number + 1}" for number in range(self._num_nodes)]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports
