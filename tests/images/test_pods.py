"""The pods of k8s/overlays/cpu-demo, as containers: two on one network, named as a headless Service names them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import REPO, RESTRICTED, Engine
from harness import newest_step, trained, until

pytestmark = pytest.mark.images
SHORT = ["train.epochs=3", "checkpoint.every_steps=50", "data.audit=true"]


class Pods:
    """The pods of the rendered Job, with its variables, mounts and security context."""

    def __init__(self, engine: Engine, image: str, folder: Path) -> None:
        self._engine, self._image, self._folder = engine, image, folder
        self._network = engine.network()
        kubectl = Path(sys.executable).with_name("kubectl")
        text = subprocess.run(
            [kubectl, "kustomize", REPO / "k8s/overlays/cpu-demo"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        objects = list(yaml.safe_load_all(text))
        (self._job,) = (each for each in objects if each["kind"] == "Job")
        (self._config,) = (each["data"] for each in objects if each["kind"] == "ConfigMap")
        self._pod = self._job["spec"]["template"]["spec"]

    def start(self, index: int, *keys: str) -> str:
        """One pod: its init container, then its container, which is returned."""
        for init in self._pod["initContainers"]:
            code, told = self._engine.run(self._image, *init["command"][1:], options=self._options(index, init))
            assert code == 0, told
        (container,) = self._pod["containers"]
        return self._engine.start(self._image, *container["args"], *keys, options=self._options(index, container))

    def _options(self, index: int, container: dict[str, Any]) -> list[str]:
        host = f"{self._job['metadata']['name']}-{index}"
        name = f"{host}.{self._pod['subdomain']}.default.svc.cluster.local"
        context, limits = self._pod["securityContext"], container["resources"]["limits"]
        found = [
            *RESTRICTED, "--user", f"{context['runAsUser']}:{context['runAsGroup']}", "--hostname", name,
            "--network", f"{self._network}:alias={name}", "--memory", limits["memory"].lower().rstrip("i"),
            "-e", f"JOB_COMPLETION_INDEX={index}",
        ]  # fmt: skip
        for variable in container.get("env", []):
            if "value" in variable:
                found += ["-e", f"{variable['name']}={variable['value']}"]
        volumes = {volume["name"]: volume for volume in self._pod["volumes"]}
        for mount in container["volumeMounts"]:
            found += self._mount(index, mount, volumes[mount["name"]])
        return found

    def _mount(self, index: int, mount: dict[str, Any], volume: dict[str, Any]) -> list[str]:
        path, only = mount["mountPath"], ":ro" if mount.get("readOnly") else ""
        empty = volume.get("emptyDir")
        if empty is not None and empty.get("medium") == "Memory":
            return ["--shm-size", empty["sizeLimit"].lower().rstrip("i")]
        shared = "persistentVolumeClaim" in volume
        source = self._folder / (volume["name"] if shared else f"pod-{index}-{volume['name']}")
        source.mkdir(exist_ok=True)
        source.chmod(0o777)
        if "configMap" in volume:
            for name, text in self._config.items():
                (source / name).write_text(text)
        return ["-v", f"{source}:{path}{only}"]


def test_a_pod_is_deleted_and_the_job_comes_back(engine: Engine, image: str, folder: Path) -> None:
    pods = Pods(engine, image, folder)
    run = folder / "runs/demo"
    undisturbed = [pods.start(index, *SHORT, "run.dir=/runs/undisturbed") for index in range(2)]
    assert [engine.wait(pod) for pod in undisturbed] == [0, 0], engine.logs(undisturbed[0])
    first = [pods.start(index, *SHORT) for index in range(2)]
    until(lambda: newest_step(run) >= 50, "a checkpoint", 120)
    engine.signal(first[1], "TERM")
    assert [engine.wait(pod) for pod in first] == [75, 75], engine.logs(first[0])
    second = [pods.start(index, *SHORT) for index in (1, 0)]
    assert [engine.wait(pod) for pod in second] == [0, 0], engine.logs(second[1])
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    trained(run).same_as(trained(folder / "runs/undisturbed"))
