"""A real SLURM on this machine: one controller, and nodes with their own host name, address and processes.

Each node is a set of name spaces with a slurmd in it, so a test can kill a node (all its processes at once). Settings
differ from SLURM's defaults only where the defaults would make tests wait.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
_SECONDS = 30
_FREEZER = Path("/sys/fs/cgroup/freezer")


def missing() -> str:
    """Return the reason why no cluster can be started here; empty if one can."""
    if os.geteuid():
        return "a SLURM cluster of name spaces needs root"
    programs = [name for name in NEEDED if shutil.which(name) is None]
    return f"no {', '.join(programs)} (Debian: slurmctld slurmd slurm-client munge iproute2)" if programs else ""


class Cluster:
    """Nodes node0, node1 …, configured with `cpus` processors each; all its files are in `folder`."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        self._folder, self._cpus = folder, cpus
        mark = secrets.token_hex(2)
        self._bridge = f"sl{mark}"
        self._spaces = [f"sl{mark}n{number}" for number in range(nodes)]
        self._subnet = f"10.{200 + secrets.randbelow(40)}.{secrets.randbelow(256)}"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            jobs = self.query("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.query("scancel", *jobs)
                until(lambda: not self.query("squeue", "-h"), "all jobs have ended", 20)
        for number in list(self._nodes):
            self.crash(number)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for name in self._spaces:
            _quietly("ip", "netns", "delete", name)
        _quietly("ip", "link", "delete", self._bridge)
        if _FREEZER.is_dir():
            for number in range(len(self._spaces)):
                group = _FREEZER / f"slurm_node{number}"
                for path in sorted(group.rglob("*"), reverse=True) if group.is_dir() else []:
                    if path.is_dir():
                        with contextlib.suppress(OSError):
                            path.rmdir()
                with contextlib.suppress(OSError):
                    group.rmdir()

    def query(self, *command: str) -> str:
        """Run one of SLURM's commands; its output."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def crash(self, number: int) -> None:
        """Kill all processes of a node at once, as a power failure does."""
        node = self._nodes.pop(number)
        os.killpg(node.pid, signal.SIGKILL)  # with the first process of its name space, all others end
        node.wait(10)

    def boot(self, number: int) -> None:
        """Start a node."""
        hosts, names = self._folder / "hosts", self._folder / "nsswitch.conf"
        script = (
            f"hostname node{number}; mount --bind {hosts} /etc/hosts; mount --bind {names} /etc/nsswitch.conf;"
            f" slurmd -D -f {self.environ['SLURM_CONF']} -N node{number} & wait $!"
        )
        with (self._folder / f"node{number}.out").open("ab") as output:
            # nsenter, because `ip netns exec` hides /sys/fs/cgroup; bash, because process 1 must reap.
            enter = f"nsenter --net=/run/netns/{self._spaces[number]}"
            unshare = "unshare --uts --pid --fork --kill-child --mount-proc"
            self._nodes[number] = subprocess.Popen(
                [*enter.split(), *unshare.split(), "bash", "-ec", script],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _up(self) -> None:
        self._folder.chmod(0o755)
        for name in ("state", "spool"):
            (self._folder / name).mkdir()
        self._write_configuration()
        subprocess.run(["ip", "link", "add", self._bridge, "type", "bridge"], check=True)
        subprocess.run(["ip", "addr", "add", f"{self._subnet}.1/24", "dev", self._bridge], check=True)
        subprocess.run(["ip", "link", "set", self._bridge, "up"], check=True)
        key = self._folder / "munge.key"
        key.touch(0o400)
        key.write_bytes(secrets.token_bytes(128))
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self._folder}/munge.socket",
            f"--pid-file={self._folder}/munged.pid", f"--log-file={self._folder}/munged.log",
            f"--seed-file={self._folder}/munged.seed",
        )  # fmt: skip
        until((self._folder / "munge.socket").exists, "munged answers", _SECONDS)
        self._start("slurmctld", "-D", "-f", self.environ["SLURM_CONF"])
        for number, space in enumerate(self._spaces):
            pair = f"{self._bridge}v{number}"
            for line in (
                f"netns add {space}",
                f"link add {pair} type veth peer name eth0 netns {space}",
                f"link set {pair} master {self._bridge} up",
                f"-n {space} addr add {self._subnet}.{10 + number}/24 dev eth0",
                f"-n {space} link set lo up",
                f"-n {space} link set eth0 up",
            ):
                subprocess.run(["ip", *line.split()], check=True)
            self.boot(number)
        until(self._all_idle, "all nodes are idle", _SECONDS)

    def _all_idle(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return self.query("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == [
                f"node{number}" for number in range(len(self._spaces))
            ]
        return False

    def _start(self, *command: str) -> None:
        with (self._folder / f"{command[0]}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self.environ,
                    start_new_session=True,
                )
            )

    def _write_configuration(self) -> None:
        folder, host = self._folder, socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName=node{number} NodeAddr={self._subnet}.{10 + number} Port=17000 CPUs={self._cpus} RealMemory=8000"
            for number in range(len(self._spaces))
        ]
        tracking = "cgroup" if os.access(_FREEZER / "cgroup.procs", os.W_OK) else "linuxproc"
        (folder / "slurm.conf").write_text(
            f"""ClusterName=tests
SlurmctldHost={host}({self._subnet}.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as a credential is valid: 2 minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=15
# Tests ask about jobs that have long ended.
MinJobAge=3600
KillWait=10
{chr(10).join(nodes)}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        lines = ["127.0.0.1 localhost", f"{self._subnet}.1 {host}"]
        lines += [f"{self._subnet}.{10 + number} node{number}" for number in range(len(self._spaces))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "nsswitch.conf").write_text("hosts: files\n")  # the nodes have no name server to wait for


def until(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def _quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
