"""The manifests in k8s/, rendered."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parent.parent / "k8s"
FOLDERS = sorted(
    path.parent.relative_to(K8S).as_posix()
    for path in K8S.rglob("kustomization.yaml")
    if "kind: Kustomization" in path.read_text()
)
"""Every folder that can be applied, the base included."""


@functools.cache
def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of a kustomization."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # such as a warning of a deprecated field
    return list(yaml.safe_load_all(done.stdout))


def job_specs(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the specs of all Jobs, also of those in a JobSet or TrainingRuntime."""
    results = []
    for each in objects:
        if each["kind"] == "Job":
            results.append(each["spec"])
        elif each["kind"] in ("JobSet", "TrainingRuntime"):
            jobs = each["spec"] if each["kind"] == "JobSet" else each["spec"]["template"]["spec"]
            results += [job["template"]["spec"] for job in jobs["replicatedJobs"]]
    return results


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the specs of all pods."""
    return [spec["template"]["spec"] for spec in job_specs(objects)] + [
        each["spec"] for each in objects if each["kind"] == "Pod"
    ]


def environ(template: dict[str, Any], container: dict[str, Any], uid: str = "uid", index: int = 0) -> dict[str, str]:
    """Return the variables of a container whose pod has the labels of its template, and those that a Job adds."""
    labels = {
        **template["metadata"]["labels"],
        "batch.kubernetes.io/controller-uid": uid,
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    results = {}
    for variable in container.get("env", []):
        if "value" in variable:
            results[variable["name"]] = variable["value"]
        else:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert path.startswith("metadata.labels['")
            results[variable["name"]] = labels[path[len("metadata.labels['") : -2]]
    return results


def arguments(template: dict[str, Any], container: dict[str, Any], index: int = 0) -> list[str]:
    """Return a container's arguments; the kubelet replaces $(NAME) in them by the container's variables."""
    results = list(container["args"])
    for name, value in environ(template, container, index=index).items():
        results = [argument.replace(f"$({name})", value) for argument in results]
    assert not any("$(" in argument for argument in results)
    return results
