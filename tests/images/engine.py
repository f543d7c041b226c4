"""Containers by buildah and podman from Debian's packages, for a machine without a Docker engine.

python tests/images/engine.py      builds the image's layers, which later builds use again
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).parent.parent.parent
BASE = "localhost/distrain-test-base-with-headers"
PODMAN = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
# podman's defaults are more than this machine may allow.
LIMITS = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000", "--no-healthcheck"]
RESTRICTED = ["--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
"""The same restrictions as the pods: a read-only image, no capabilities, no new privileges."""

_NEEDED = ("buildah", "podman", "mmdebstrap", "runc", "iptables")
_GIB = 25
"""Free disk space that a build needs: torch with CUDA, unpacked, in layers."""
_LOCK = Path(tempfile.gettempdir(), "distrain-test-image.lock")


def missing() -> str:
    """Return the reason why no image can be built here; empty if one can."""
    if os.geteuid():
        return "building an image here needs root"
    programs = [name for name in _NEEDED if shutil.which(name) is None]
    if programs:
        return f"no {', '.join(programs)} (Debian: buildah podman runc mmdebstrap netavark aardvark-dns iptables)"
    free = shutil.disk_usage("/var/lib").free / 2**30
    return f"{free:.0f} GiB of free disk, {_GIB} are needed to build the image" if free < _GIB else ""


class Engine:
    """Containers, networks and an image with unique names, which `close` removes; the image's layers stay."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mark = folder, secrets.token_hex(3)
        self._containers: list[str] = []
        self._networks: list[str] = []

    def build(self) -> str:
        """Build the image from the unchanged Dockerfile, on a stand-in for python:3.x-slim; waits for another build."""
        with _LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._build()

    def network(self) -> tuple[str, str]:
        """Create a network; its name, and the first three numbers of its addresses."""
        name = f"distrain-{self._mark}-{len(self._networks)}"
        first = f"10.{200 + secrets.randbelow(40)}.{secrets.randbelow(256)}"
        self._run("podman", "network", "create", "--subnet", f"{first}.0/24", name)
        self._networks.append(name)
        return name, first

    def start(self, image: str, *arguments: str, options: Sequence[str] = ()) -> str:
        """Start a container; its name."""
        name = f"distrain-{self._mark}-{len(self._containers)}"
        self._containers.append(name)
        self._run(*PODMAN, "run", "--detach", "--name", name, *LIMITS, *options, image, *arguments)
        return name

    def wait(self, container: str, seconds: float = 180) -> int:
        """Wait for a container to end; its exit code."""
        return int(self._output(*PODMAN, "wait", container, seconds=seconds))

    def logs(self, container: str) -> str:
        """The output of a container."""
        done = subprocess.run(["podman", "logs", container], capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def signal(self, container: str, name: str) -> None:
        """Send a signal to the first process of a container."""
        self._run(*PODMAN, "kill", "--signal", name, container)

    def run(self, image: str, *arguments: str, options: Sequence[str] = ()) -> tuple[int, str]:
        """Run a container to its end; its exit code and output."""
        container = self.start(image, *arguments, options=options)
        return self.wait(container), self.logs(container)

    def close(self) -> None:
        """Remove the containers, the networks and the name of the image."""
        for name in self._containers:
            with contextlib.suppress(subprocess.SubprocessError):
                self._run(*PODMAN, "rm", "--force", "--time", "0", name)
        for name in self._networks:
            with contextlib.suppress(subprocess.SubprocessError):
                self._run("podman", "network", "rm", "--force", name)
        with contextlib.suppress(subprocess.SubprocessError):
            self._run("podman", "untag", f"localhost/distrain-test:{self._mark}")

    def _build(self) -> str:
        if self._output("podman", "images", "-q", BASE) == "":
            self._make_base()
        (self._folder / "pip.conf").write_text("[global]\ncert = /run/host/ca.crt\n")
        authorities = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
        shutil.copy(str(authorities), self._folder / "ca.crt")
        name = f"localhost/distrain-test:{self._mark}"
        self._run(
            "buildah", "bud", "--isolation", "chroot", "--format", "docker", "--layers", "--build-arg",
            f"BASE_IMAGE={BASE}", "-v", f"{self._folder}:/run/host:ro",
            "-v", f"{self._folder}/pip.conf:/etc/pip.conf:ro", "-t", name, str(REPO), seconds=1500,
        )  # fmt: skip
        return name

    def _make_base(self) -> None:
        archive = self._folder / "base.tar"
        self._run(
            "mmdebstrap", "--variant=minbase",
            "--include=python3,python3-venv,python3-pip,libpython3-dev,ca-certificates",
            '--customize-hook=ln -s python3 "$1/usr/bin/python"', "bookworm", str(archive), seconds=600,
        )  # fmt: skip
        path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # the same as in python:slim
        self._run("podman", "import", "--change", path, str(archive), BASE, seconds=300)
        archive.unlink()

    def _run(self, *command: str, seconds: float = 120) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def _output(self, *command: str, seconds: float = 60) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
        return done.stdout.strip()


def main() -> None:
    """Build the image if that is possible here, and print how long it took."""
    start, reason = time.monotonic(), missing()
    if not reason:
        with tempfile.TemporaryDirectory(prefix="distrain-image-") as folder:
            engine = Engine(Path(folder))
            engine.build()
            engine.close()
    print(reason or f"== the image's layers took {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
