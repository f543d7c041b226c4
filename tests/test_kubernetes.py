"""The manifests in k8s/: every overlay renders, fits the schemas, and follows rules that no schema has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from distrain.config import Config, load

K8S = Path(__file__).parent.parent / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
UNITS = {"Mi": 2**20, "Gi": 2**30}


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(K8S / "overlays" / request.param)


def one(rendered: list[dict[str, Any]], kind: str, containing: str = "") -> dict[str, Any]:
    (each,) = (each for each in rendered if each["kind"] == kind and containing in each["metadata"]["name"])
    return each


def training(rendered: list[dict[str, Any]]) -> dict[str, Any]:
    (job,) = (each for each in rendered if each["kind"] == "Job" and "prepare" not in each["metadata"]["name"])
    return job


def pods(rendered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in rendered if each["kind"] == "Job"]


def trainer(rendered: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = training(rendered)["spec"]["template"]["spec"]["containers"]
    return container


def size(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def test_fits_the_schemas(rendered: list[dict[str, Any]]) -> None:
    assert {each["kind"] for each in rendered} >= {"Job", "Service", "ConfigMap", "NetworkPolicy"}
    for each in rendered:
        kubernetes_validate.validate(each, "1.36", strict=True)  # raises an error for a kind without a schema


def test_pods_are_restricted(rendered: list[dict[str, Any]]) -> None:
    for pod in pods(rendered):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"] + pod.get("initContainers", []):
            restrictions = container["securityContext"]
            assert restrictions["allowPrivilegeEscalation"] is False
            assert restrictions["readOnlyRootFilesystem"] is True
            assert restrictions["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert container["image"] == "distrain:latest"


def test_every_mount_has_its_volume_and_every_volume_its_claim(rendered: list[dict[str, Any]]) -> None:
    claims = {each["metadata"]["name"] for each in rendered if each["kind"] == "PersistentVolumeClaim"}
    maps = {each["metadata"]["name"] for each in rendered if each["kind"] == "ConfigMap"}
    for pod in pods(rendered):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        used = {mount["name"] for part in ("containers", "initContainers") for container in pod.get(part, [])
                for mount in container["volumeMounts"]}  # fmt: skip
        assert used == set(volumes)
        for volume in volumes.values():
            (kind,) = set(volume) - {"name"}
            assert kind in ("emptyDir", "persistentVolumeClaim", "configMap")
            if kind == "persistentVolumeClaim":
                assert volume[kind]["claimName"] in claims
            if kind == "configMap":
                assert volume[kind]["name"] in maps


def test_only_the_necessary_folders_are_writable(rendered: list[dict[str, Any]]) -> None:
    mounts = {mount["mountPath"]: mount for mount in trainer(rendered)["volumeMounts"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {"/runs", "/tmp", "/dev/shm"}
    (shm,) = (each for each in training(rendered)["spec"]["template"]["spec"]["volumes"] if each["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    assert 2 * size(shm["emptyDir"]["sizeLimit"]) <= size(trainer(rendered)["resources"]["limits"]["memory"])


def test_exit_codes_decide_whether_the_job_is_retried(rendered: list[dict[str, Any]]) -> None:
    spec = training(rendered)["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["ttlSecondsAfterFinished"] > 0
    assert "backoffLimitPerIndex" not in spec
    assert spec["backoffLimit"] % spec["completions"] == 0
    verdicts = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": ["disruption"], "containerName": None, "operator": "In"})
        assert codes["operator"] == "In"
        for code in codes["values"]:
            verdicts[codes["containerName"], code] = rule["action"]
    pod = spec["template"]["spec"]
    (main,), (first,) = ([each["name"] for each in pod[part]] for part in ("containers", "initContainers"))
    assert verdicts == {
        (None, "disruption"): "Ignore", (main, 75): "Ignore", (main, 78): "FailJob",
        (first, 75): "Ignore", (first, 143): "Ignore",
    }  # fmt: skip


def test_the_number_of_nodes_is_the_same_everywhere(rendered: list[dict[str, Any]]) -> None:
    spec = training(rendered)["spec"]
    environ = {each["name"]: each.get("value") for each in trainer(rendered)["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environ["DISTRAIN_NODES"])


def test_pods_reach_each_other_and_nobody_else_reaches_them(rendered: list[dict[str, Any]]) -> None:
    template = training(rendered)["spec"]["template"]
    labels = {"batch.kubernetes.io/job-name": training(rendered)["metadata"]["name"]}  # a label that the Job's pods get
    service, policy = one(rendered, "Service"), one(rendered, "NetworkPolicy")
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    ((sources,),) = (rule["from"] for rule in policy["spec"]["ingress"])
    assert sources["podSelector"]["matchLabels"] == labels
    for kind in ("podAffinity", "podAntiAffinity"):
        for term in template["spec"].get("affinity", {}).get(kind, {}).values():
            assert term[0]["labelSelector"]["matchLabels"] == labels
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_the_grace_is_longer_than_the_launchers(rendered: list[dict[str, Any]], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    (text,) = one(rendered, "ConfigMap")["data"].values()
    config.write_text(text)
    container = trainer(rendered)
    keys = [each for each in container["args"] if "=" in each and not each.startswith("--")]
    resolved = load(config, keys)  # raises for a key that does not exist
    assert resolved.data.dir == "/data/train"
    assert resolved.run.dir.startswith("/runs/")
    assert resolved.launch == Config().launch
    grace = training(rendered)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > resolved.launch.grace_seconds


def test_no_secret_is_required_or_in_a_manifest(rendered: list[dict[str, Any]]) -> None:
    (key,) = (each for each in trainer(rendered)["env"] if each["name"] == "WANDB_API_KEY")
    assert key["valueFrom"]["secretKeyRef"]["optional"] is True
    assert not any(each["kind"] == "Secret" for each in rendered)


def render(folder: Path) -> list[dict[str, Any]]:
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_kueue_admits_it() -> None:
    job = training(render(K8S / "overlays/kueue"))
    assert job["spec"]["suspend"] is True
    assert "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]


def test_a_second_job_under_another_name_is_independent(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s/overlays/mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text("nameSuffix: -second\nresources:\n  - ../gpu-multi-node\n")
    rendered = render(mine)
    test_pods_reach_each_other_and_nobody_else_reaches_them(rendered)
    test_every_mount_has_its_volume_and_every_volume_its_claim(rendered)
    assert all("-second" in each["metadata"]["name"] for each in rendered)
