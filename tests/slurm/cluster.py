"""A real Slurm cluster on this machine, for tests: a controller, and nodes that each have an address, a host name and a
network namespace of their own, so that a link can be cut and a node lost.

`python -m tests.slurm.cluster FOLDER` keeps one up until Ctrl-C, to try things by hand.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
PACKAGES = ("slurm-wlm", "munge", "iproute2")
REQUEUE_SECONDS = 11
"""From a requeue to the job's next start at the earliest: Slurm waits for its credentials to expire."""


def reason_to_skip() -> str | None:
    """Why there can be no cluster here; None where there can. Installs what is missing, where it may."""
    if os.geteuid() != 0:
        return "a Slurm cluster of network namespaces needs root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        if shutil.which("apt-get") is None:
            return f"{', '.join(missing)} missing, and no apt-get to install {' '.join(PACKAGES)} by"
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            result = subprocess.run(["apt-get", "-q", *command], capture_output=True, text=True, env=environment)
            if result.returncode:
                return f"apt-get {' '.join(command)} failed: {result.stderr.strip()[-300:]}"
    probe = ["unshare", "--net", "--uts", "--mount", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "making namespaces is not allowed here"
    return None


class Cluster(AbstractContextManager["Cluster"]):
    """A controller and `nodes` nodes of `cpus` CPUs inside a `with` block; `environment` makes Slurm's commands speak
    to it.

    Args:
        folder: for configuration, state and logs.
    """

    def __init__(self, folder: Path, *, nodes: int = 3, cpus: int = 2) -> None:
        self.folder = folder
        tag = f"{os.getpid() % 46656:x}"
        self.nodes = [f"s{tag}n{number}" for number in range(1, nodes + 1)]
        self._bridge, self._net = f"s{tag}br", f"10.{os.getpid() // 256 % 100 + 100}.{os.getpid() % 256}"
        self._cpus = cpus
        self._host = socket.gethostname().split(".")[0]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            _start_munge()
            self._write_configuration()
            self._make_network()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self.wait_idle(self.nodes)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def start_controller(self) -> None:
        """Start slurmctld, from the state that an earlier one left."""
        self._processes["controller"] = self._spawn(["slurmctld", "-D"], "slurmctld")

    def stop_controller(self) -> None:
        """Kill slurmctld: what it did not save is lost."""
        _kill(self._processes.pop("controller"))

    def start_node(self, node: str) -> None:
        """Start a node's slurmd in its namespaces."""
        # nsenter and not `ip netns exec`, which hides the cgroup file system that slurmd looks for.
        script = (
            f"hostname {node}; mount --bind {self.folder}/hosts /etc/hosts; "
            f"mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf; exec slurmd -D -N {node}"
        )
        inside = ["nsenter", f"--net=/var/run/netns/{node}", "unshare", "--uts", "--mount", "--propagation=private"]
        self._processes[node] = self._spawn([*inside, "sh", "-ec", script], f"slurmd-{node}")

    def kill_node(self, node: str) -> None:
        """End all that runs on a node at once, slurmd too."""
        for pid in self.processes(node):
            _signal(pid, signal.SIGKILL)
        _kill(self._processes.pop(node))

    def processes(self, node: str) -> list[int]:
        """The numbers of all processes on a node."""
        listed = _run("ip", "netns", "pids", node)
        return [int(pid) for pid in listed.split()]

    def cut(self, node: str) -> None:
        """Cut a node's network: what runs on it runs on."""
        _run("ip", "link", "set", f"v{node}", "down")

    def heal(self, node: str) -> None:
        """Undo `cut`."""
        _run("ip", "link", "set", f"v{node}", "up")

    def command(self, *words: str) -> str:
        """Run one of Slurm's commands; what it printed."""
        return _run(*words, environment=self.environment)

    def wait_idle(self, nodes: list[str], seconds: float = 60) -> None:
        """Wait until nodes are idle. Raises AssertionError with the logs where they are not in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            result = subprocess.run(
                ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True, env=self.environment
            )
            if set(nodes) <= set(result.stdout.split()):
                return
            time.sleep(0.1)
        raise AssertionError(f"nodes {nodes} are not idle after {seconds:g} s\n{self.logs()}")

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        paths = sorted((self.folder / "log").iterdir())
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def _spawn(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            return subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _write_configuration(self) -> None:
        for name in ("state", "log", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        addresses = {node: f"{self._net}.{number}" for number, node in enumerate(self.nodes, start=1)}
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr={address} Port=6818 CPUs={self._cpus} RealMemory=2000"
            for node, address in addresses.items()
        ]
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        configuration = _CONFIGURATION.format(
            host=self._host, address=f"{self._net}.254", port=port, folder=self.folder, nodes="\n".join(lines)
        )
        (self.folder / "slurm.conf").write_text(configuration)
        known = addresses | {self._host: f"{self._net}.254"}
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in known.items())]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")

    def _make_network(self) -> None:
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for number, node in enumerate(self.nodes, start=1):
            _run("ip", "netns", "add", node)
            _run("ip", "link", "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", node)
            _run("ip", "link", "set", f"v{node}", "master", self._bridge, "up")
            _run("ip", "-n", node, "addr", "add", f"{self._net}.{number}/24", "dev", "eth0")
            _run("ip", "-n", node, "link", "set", "eth0", "up")
            _run("ip", "-n", node, "link", "set", "lo", "up")

    def _end(self) -> None:
        for node in self.nodes:
            if Path(f"/var/run/netns/{node}").exists():
                for pid in self.processes(node):
                    _signal(pid, signal.SIGKILL)
        for process in self._processes.values():
            _kill(process)
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", node], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)


def _start_munge() -> None:
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return
    key = Path("/etc/munge/munge.key")
    if not key.exists():
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        shutil.chown(key, "munge", "munge")
    for folder, mode in (("/run/munge", 0o755), ("/var/log/munge", 0o700), ("/var/lib/munge", 0o700)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder).chmod(mode)
        shutil.chown(folder, "munge", "munge")
    _run("su", "-s", "/bin/sh", "munge", "-c", "munged")


def _run(*command: str, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
    return result.stdout


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has ended by itself


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


# No systemd, no cgroups, no database: with the usual plugins every step would fail here while srun returns 0.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=20
SlurmctldTimeout=30
InactiveLimit=0
MessageTimeout=30
BatchStartTimeout=60
SchedulerParameters=sched_min_interval=0,bf_interval=1,requeue_delay=1
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
{nodes}
"""


def main() -> None:
    """Keep a cluster up, and say how to speak to it."""
    if reason := reason_to_skip():
        sys.exit(reason)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).absolute()
    with Cluster(folder) as cluster:
        print(f"export SLURM_CONF={folder / 'slurm.conf'}    # nodes: {' '.join(cluster.nodes)}; Ctrl-C ends them")
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ending")


if __name__ == "__main__":
    main()
