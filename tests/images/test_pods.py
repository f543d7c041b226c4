"""The pods of k8s/overlays/cpu-demo as containers: two on one network, with the names that a headless Service gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import manifests
import pytest
from engine import RESTRICTED, Engine
from harness import newest_step, trained, until

pytestmark = pytest.mark.images
SHORT = [
    "train.epochs=2", "checkpoint.every_steps=50", "data.audit=true", "log.report=false", "launch.rejoin_seconds=10",
    "launch.standby=false",  # importing torch a second time would take most of the time of the test
]  # fmt: skip


class Pods:
    """Starts the pods of the rendered Job, with their variables, mounts and security context."""

    def __init__(self, engine: Engine, image: str, folder: Path) -> None:
        self._engine, self._image, self._folder = engine, image, folder
        self._network, self._addresses = engine.network()
        objects = manifests.render(manifests.K8S / "overlays/cpu-demo")
        (self._job,) = (each for each in objects if each["kind"] == "Job")
        (self._config,) = (each["data"] for each in objects if each["kind"] == "ConfigMap")
        self._template = self._job["spec"]["template"]
        self._pod = self._template["spec"]

    def start(self, index: int, *keys: str) -> str:
        """Start a pod: run its init container, then start its container; the container's name."""
        for init in self._pod["initContainers"]:
            code, output = self._engine.run(self._image, *init["args"], options=self._options(index, init))
            assert code == 0, output
        (container,) = self._pod["containers"]
        arguments = manifests.arguments(self._template, container)
        return self._engine.start(self._image, *arguments, *keys, options=self._options(index, container))

    def show(self, *command: str) -> tuple[int, str]:
        """Run a command in the pod of k8s/files; its exit code and output."""
        (pod,) = manifests.pods(manifests.render(manifests.K8S / "files"))
        (container,) = pod["containers"]
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == "runs")
        assert mount["readOnly"]
        options = [
            *RESTRICTED, "--user", "1000:1000", "--network", "none", "--tmpfs", "/tmp:rw,mode=1777",
            "-v", f"{self._folder}/runs:/runs:ro", "--entrypoint", command[0],
        ]  # fmt: skip
        return self._engine.run(self._image, *command[1:], options=options)

    def _options(self, index: int, container: dict[str, Any]) -> list[str]:
        host = f"{self._job['metadata']['name']}-{index}"
        name = f"{host}.{self._pod['subdomain']}.default.svc.cluster.local"
        address = f"{self._addresses}.{10 + index}"
        hosts = self._folder / f"hosts-{index}"
        hosts.write_text(f"127.0.0.1 localhost\n{address} {name} {host}\n")  # the same lines as the kubelet writes
        context, limits = self._pod["securityContext"], container["resources"]["limits"]
        options = [
            *RESTRICTED, "--user", f"{context['runAsUser']}:{context['runAsGroup']}", "--hostname", host,
            "--no-hosts", "-v", f"{hosts}:/etc/hosts:ro",
            "--network", f"{self._network}:ip={address},alias={name}",  # in place of the Service: a name while it runs
            "--memory", limits["memory"].lower().rstrip("i"), "-e", f"JOB_COMPLETION_INDEX={index}",
        ]  # fmt: skip
        for name, value in manifests.environ(self._template, container).items():
            options += ["-e", f"{name}={value}"]
        if "workingDir" in container:
            options += ["--workdir", container["workingDir"]]
        volumes = {volume["name"]: volume for volume in self._pod["volumes"]}
        for mount in container["volumeMounts"]:
            options += self._mount(index, mount, volumes[mount["name"]])
        return options

    def _mount(self, index: int, mount: dict[str, Any], volume: dict[str, Any]) -> list[str]:
        path, mode = mount["mountPath"], ":ro" if mount.get("readOnly") else ""
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
        return ["-v", f"{source}:{path}{mode}"]


def test_a_job_whose_pods_are_deleted_and_killed_trains_the_same(engine: Engine, image: str, folder: Path) -> None:
    pods = Pods(engine, image, folder)
    run = folder / "runs/distrain-demo"
    undisturbed = [pods.start(index, *SHORT, "run.dir=/runs/undisturbed") for index in range(2)]
    assert [engine.wait(pod) for pod in undisturbed] == [0, 0], engine.logs(undisturbed[0])

    both = [pods.start(index, *SHORT) for index in range(2)]
    until(lambda: newest_step(run) >= 50, "a checkpoint", 120)
    engine.signal(both[1], "TERM")
    assert [engine.wait(pod) for pod in both] == [75, 75], engine.logs(both[0])

    both = [pods.start(index, *SHORT) for index in (1, 0)][::-1]
    until(lambda: newest_step(run) >= 250, "a later checkpoint", 120)
    engine.signal(both[0], "KILL")
    assert [engine.wait(pod) for pod in both] == [137, 75], engine.logs(both[1])

    both = [pods.start(index, *SHORT) for index in range(2)]
    assert [engine.wait(pod) for pod in both] == [0, 0], engine.logs(both[0])
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    trained(run).same_as(trained(folder / "runs/undisturbed"))

    late = pods.start(1, *SHORT)  # a pod that was lost at the end of the run is started again alone
    assert engine.wait(late) == 0
    assert "the run is done" in engine.logs(late)

    code, output = pods.show("distrain", "status", "/runs/distrain-demo")
    assert code == 0, output
    code, output = pods.show("distrain", "export", "/runs/distrain-demo", "--out", "/tmp/demo.pt2")
    assert code == 0, output
    code, output = pods.show(
        "sh", "-c", "command -v tar sleep && ! touch /runs/distrain-demo/x"
    )  # kubectl cp needs tar
    assert code == 0, output
