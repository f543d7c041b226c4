"""buildah and podman as Debian has them, on a machine without a Docker engine.

python tests/images/engine.py      builds the image's layers, for tests that come later
"""

from __future__ import annotations

import contextlib
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
BASE = "localhost/distrain-test-base"
PODMAN = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
# podman asks for more than this machine may give.
LIMITS = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000", "--no-healthcheck"]
RESTRICTED = ["--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
"""As the pods are: nothing of the image can be changed, nothing more may be had."""

_NEEDED = ("buildah", "podman", "mmdebstrap", "runc", "iptables")
_GIB = 25
"""Free disk that building takes: torch with CUDA, unpacked, in layers."""


def missing() -> str:
    """Why no image can be built here; empty where one can."""
    if os.geteuid():
        return "building an image here needs root"
    lacking = [name for name in _NEEDED if shutil.which(name) is None]
    if lacking:
        return f"no {', '.join(lacking)} (Debian: buildah podman runc mmdebstrap netavark aardvark-dns iptables)"
    free = shutil.disk_usage("/var/lib").free / 2**30
    return f"{free:.0f} GiB of free disk, {_GIB} are needed to build the image" if free < _GIB else ""


class Engine:
    """Everything made here has a name of its own, and is removed again, but for layers that the next run uses."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mark = folder, secrets.token_hex(3)
        self._containers: list[str] = []
        self._networks: list[str] = []

    def build(self) -> str:
        """Build the image from the Dockerfile as it is, on a stand-in for python:3.x-slim."""
        if self._ask("podman", "images", "-q", BASE) == "":
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

    def network(self) -> tuple[str, str]:
        """A network of this machine's own: its name, and the first three numbers of its addresses."""
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
        """The exit code of a container."""
        return int(self._ask(*PODMAN, "wait", container, seconds=seconds))

    def logs(self, container: str) -> str:
        """What a container said."""
        done = subprocess.run(["podman", "logs", container], capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def signal(self, container: str, name: str) -> None:
        """To its first process."""
        self._run(*PODMAN, "kill", "--signal", name, container)

    def run(self, image: str, *arguments: str, options: Sequence[str] = ()) -> tuple[int, str]:
        """Run a container to its end: its exit code, and what it said."""
        container = self.start(image, *arguments, options=options)
        return self.wait(container), self.logs(container)

    def close(self) -> None:
        """Remove what was made."""
        for name in self._containers:
            with contextlib.suppress(subprocess.SubprocessError):
                self._run(*PODMAN, "rm", "--force", "--time", "0", name)
        for name in self._networks:
            with contextlib.suppress(subprocess.SubprocessError):
                self._run("podman", "network", "rm", "--force", name)
        with contextlib.suppress(subprocess.SubprocessError):
            self._run("podman", "untag", f"localhost/distrain-test:{self._mark}")

    def _make_base(self) -> None:
        archive = self._folder / "base.tar"
        self._run(
            "mmdebstrap", "--variant=minbase", "--include=python3,python3-venv,python3-pip,ca-certificates",
            '--customize-hook=ln -s python3 "$1/usr/bin/python"', "bookworm", str(archive), seconds=600,
        )  # fmt: skip
        path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as python:slim has it
        self._run("podman", "import", "--change", path, str(archive), BASE, seconds=300)
        archive.unlink()

    def _run(self, *command: str, seconds: float = 120) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def _ask(self, *command: str, seconds: float = 60) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
        return done.stdout.strip()


def main() -> None:
    """Build, where that can be done, and say how long it took."""
    start, lacking = time.monotonic(), missing()
    if not lacking:
        with tempfile.TemporaryDirectory(prefix="distrain-image-") as folder:
            engine = Engine(Path(folder))
            engine.build()
            engine.close()
    print(lacking or f"== the image's layers took {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
