"""The manifests in k8s/: every folder renders, fits the schemas, and follows rules that no schema has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import FOLDERS, K8S, arguments, environ, job_specs, pods, render

from distrain import cli
from distrain.config import Config, load
from distrain.data.manifest import Dataset
from distrain.launcher.cluster import Options, Topology, detect
from distrain.runs.folder import configuration

OVERLAYS = sorted(name for name in FOLDERS if name.startswith("overlays/"))
CUSTOM = {"JobSet", "TrainJob", "TrainingRuntime"}
"""Kinds without a published schema in a package; only their parts are validated."""
UNITS = {"Mi": 2**20, "Gi": 2**30}
INSTANCE = "app.kubernetes.io/instance"


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(K8S / request.param)


@pytest.fixture(scope="module", params=FOLDERS)
def everything(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(K8S / request.param)


def one(rendered: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (each,) = (each for each in rendered if each["kind"] == kind)
    return each


def training(rendered: list[dict[str, Any]]) -> dict[str, Any]:
    """The spec of the Job that trains."""
    (spec,) = job_specs(rendered)
    return spec


def trainer(rendered: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = training(rendered)["template"]["spec"]["containers"]
    return container


def name_of(rendered: list[dict[str, Any]]) -> str:
    (name,) = {each["metadata"]["name"] for each in rendered if each["kind"] in ("Job", "JobSet", "TrainJob")}
    return name


def is_sweep(rendered: list[dict[str, Any]]) -> bool:
    """Whether each pod is a run of its own, not a node of one run."""
    return "TRIAL" in environ(training(rendered)["template"], trainer(rendered))


def volume(rendered: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (each,) = (each for each in training(rendered)["template"]["spec"]["volumes"] if each["name"] == name)
    return each


def resolved(rendered: list[dict[str, Any]], folder: Path) -> Config:
    """The configuration of a run, from its ConfigMap and its arguments."""
    file = folder / "config.yaml"
    file.write_text(one(rendered, "ConfigMap")["data"]["config.yaml"])
    template = training(rendered)["template"]
    given = arguments(template, trainer(rendered))
    return load(file, [each for each in given if "=" in each and not each.startswith("--")])


def size(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def test_fits_the_schemas(everything: list[dict[str, Any]]) -> None:
    for each in everything:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, "1.36", strict=True)  # raises an error for a kind without a schema
    for spec in job_specs(everything):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
        kubernetes_validate.validate(job, "1.36", strict=True)


def test_an_overlay_has_what_a_run_needs_and_no_volume(rendered: list[dict[str, Any]]) -> None:
    kinds = {each["kind"] for each in rendered}
    assert kinds >= {"ConfigMap", "NetworkPolicy"}
    assert kinds & {"Job", "JobSet", "TrainJob"}
    assert "PersistentVolumeClaim" not in kinds  # deleting a run must not delete checkpoints


@pytest.mark.parametrize(("folder", "mode"), [("storage", "ReadWriteOnce"), ("storage-shared", "ReadWriteMany")])
def test_volumes_are_a_kustomization_of_their_own(folder: str, mode: str) -> None:
    claims = render(K8S / folder)
    assert {each["kind"] for each in claims} == {"PersistentVolumeClaim"}
    assert {each["metadata"]["name"] for each in claims} == {"distrain-data", "distrain-runs"}
    assert all(each["spec"]["accessModes"] == [mode] for each in claims)


def test_pods_are_restricted(everything: list[dict[str, Any]]) -> None:
    for pod in pods(everything):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["restartPolicy"] == "Never"
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


def test_the_image_has_one_place(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s/images/kustomization.yaml"
    file.write_text(
        file.read_text()
        .replace("newName: distrain", "newName: registry.example.com/distrain")
        .replace("newTag: latest", "newTag: v7")
    )
    for folder in FOLDERS:
        for pod in pods(render(tmp_path / "k8s" / folder)):
            images = {each["image"] for part in ("containers", "initContainers") for each in pod.get(part, [])}
            assert images == {"registry.example.com/distrain:v7"}, folder


def test_every_mount_has_its_volume_and_every_volume_its_claim(everything: list[dict[str, Any]]) -> None:
    claims = {each["metadata"]["name"] for each in render(K8S / "storage")}
    maps = {each["metadata"]["name"] for each in everything if each["kind"] == "ConfigMap"}
    for pod in pods(everything):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        used = {mount["name"] for part in ("containers", "initContainers") for container in pod.get(part, [])
                for mount in container["volumeMounts"]}  # fmt: skip
        assert used == set(volumes)
        for each in volumes.values():
            (kind,) = set(each) - {"name"}
            assert kind in ("emptyDir", "persistentVolumeClaim", "configMap")
            if kind == "persistentVolumeClaim":
                assert each[kind]["claimName"] in claims
            if kind == "configMap":
                assert each[kind]["name"] in maps


def test_only_the_necessary_folders_are_writable(rendered: list[dict[str, Any]]) -> None:
    mounts = {mount["mountPath"]: mount for mount in trainer(rendered)["volumeMounts"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {"/runs", "/tmp", "/dev/shm"}
    shm = volume(rendered, "shm")["emptyDir"]
    assert shm["medium"] == "Memory"
    assert 2 * size(shm["sizeLimit"]) <= size(trainer(rendered)["resources"]["limits"]["memory"])


def test_a_shard_cache_fits_into_its_volume(rendered: list[dict[str, Any]], tmp_path: Path) -> None:
    config = resolved(rendered, tmp_path)
    assert config.data.dir == "/data/train"
    if "persistentVolumeClaim" in volume(rendered, "data"):  # it may become an address
        assert config.data.cache_gib * 2**30 < size(volume(rendered, "tmp")["emptyDir"]["sizeLimit"])


def test_exit_codes_decide_whether_the_job_is_retried(rendered: list[dict[str, Any]]) -> None:
    spec = training(rendered)
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    # Counted for each index; what is ignored would make the pauses of all pods longer with backoffLimit.
    assert spec["backoffLimitPerIndex"] == 3
    # One node is missing: the run fails. One run of a sweep failed: the others are not stopped.
    assert spec.get("maxFailedIndexes") == (None if is_sweep(rendered) else 0)
    assert "backoffLimit" not in spec
    assert "suspend" not in spec
    assert verdicts(spec) == {
        (None, "disruption"): "Ignore",
        (trainer(rendered)["name"], 75): "Ignore",
        (trainer(rendered)["name"], 78): "FailIndex" if is_sweep(rendered) else "FailJob",
        **{("prepare", code): "Ignore" for code in (75, 143) if "initContainers" in spec["template"]["spec"]},
    }


def verdicts(spec: dict[str, Any]) -> dict[tuple[str | None, object], str]:
    """(container, exit code) → action of the podFailurePolicy; the first rule that fits decides."""
    results: dict[tuple[str | None, object], str] = {}
    pod = spec["template"]["spec"]
    names = {each["name"] for part in ("containers", "initContainers") for each in pod.get(part, [])}
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": ["disruption"], "containerName": None, "operator": "In"})
        assert codes["operator"] == "In"
        assert codes["containerName"] in {None, *names}
        for code in codes["values"]:
            results.setdefault((codes["containerName"], code), rule["action"])
    return results


def test_finished_jobs_are_removed_after_a_day(everything: list[dict[str, Any]]) -> None:
    for each in everything:
        if each["kind"] in ("Job", "JobSet"):
            assert each["spec"]["ttlSecondsAfterFinished"] == 86400


def test_preparing_fails_at_once_when_it_would_fail_again() -> None:
    (spec,) = job_specs(render(K8S / "prepare"))
    assert verdicts(spec) == {(None, "disruption"): "Ignore", ("prepare", 78): "FailJob"}
    assert spec["backoffLimit"] == 3


def test_the_number_of_nodes_is_the_same_everywhere(rendered: list[dict[str, Any]]) -> None:
    spec = training(rendered)
    nodes = 1 if is_sweep(rendered) else spec["completions"]
    assert is_sweep(rendered) or spec["parallelism"] == nodes
    variables = environ(spec["template"], trainer(rendered))
    jobs = [each for each in rendered if each["kind"] == "TrainJob"]
    assert variables.get("DISTRAIN_NODES") == (None if jobs else str(nodes))  # Kubeflow sets PET_NNODES
    assert [each["spec"]["trainer"]["numNodes"] for each in jobs] == [nodes] * len(jobs)


def test_the_number_of_nodes_is_edited_once(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s/overlays/gpu-multi-node/train.yaml"
    assert file.read_text().count("2 #") == 1
    file.write_text(file.read_text().replace("completions: 2 #", "completions: 12 #"))
    for overlay in ("gpu-multi-node", "kueue", "jobset", "trainjob"):
        objects = render(tmp_path / "k8s/overlays" / overlay)
        assert training(objects)["completions"] == 12
        test_the_number_of_nodes_is_the_same_everywhere(objects)


def test_pods_reach_each_other_and_nobody_else_reaches_them(rendered: list[dict[str, Any]]) -> None:
    template = training(rendered)["template"]
    labels = {INSTANCE: name_of(rendered)}
    assert labels.items() <= template["metadata"]["labels"].items()
    services = [each for each in rendered if each["kind"] == "Service"]
    if one_of_kind(rendered, "Job"):
        (service,) = services
        assert template["spec"]["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        assert service["spec"]["selector"] == labels
    else:  # JobSet creates a Service with the JobSet's name
        assert services == []
        assert template["spec"]["subdomain"] == name_of(rendered)
    policy = one(rendered, "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    ((sources,),) = (rule["from"] for rule in policy["spec"]["ingress"])
    assert sources["podSelector"]["matchLabels"] == labels
    for kind in ("podAffinity", "podAntiAffinity"):
        for term in template["spec"].get("affinity", {}).get(kind, {}).values():
            assert term[0]["labelSelector"]["matchLabels"] == labels
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def one_of_kind(rendered: list[dict[str, Any]], kind: str) -> bool:
    return any(each["kind"] == kind for each in rendered)


def test_the_run_has_the_name_of_its_job(rendered: list[dict[str, Any]], tmp_path: Path) -> None:
    trial = "/0" if is_sweep(rendered) else ""
    assert resolved(rendered, tmp_path).run.dir == f"/runs/{name_of(rendered)}{trial}"
    names = {each["metadata"]["name"] for each in rendered if each["kind"] != "ConfigMap"}
    assert names == {name_of(rendered)}


def test_the_grace_is_longer_than_the_launchers(rendered: list[dict[str, Any]], tmp_path: Path) -> None:
    config = resolved(rendered, tmp_path)  # raises for a key that does not exist
    assert config.launch == Config().launch
    grace = training(rendered)["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.launch.grace_seconds


def test_pods_that_never_meet_free_their_gpus_within_two_hours(rendered: list[dict[str, Any]], tmp_path: Path) -> None:
    config = resolved(rendered, tmp_path)
    # An attempt waits for the name of the first pod, and then for the processes of all pods. Restarts after the limit
    # end at once (see test_launcher); the pauses between them double.
    attempts = config.launch.max_attempts_without_progress + training(rendered)["backoffLimitPerIndex"]
    pauses = sum(10 * 2**number for number in range(attempts))
    waits = 2 * config.timeouts.start_seconds * config.launch.max_attempts_without_progress
    assert waits + pauses < 2 * 3600
    assert environ(training(rendered)["template"], trainer(rendered), "uid-1")["DISTRAIN_JOB"] == "uid-1"


def test_a_pod_whose_first_pod_never_comes_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(K8S / "overlays/gpu-multi-node")
    template = training(rendered)["template"]
    variables = {"JOB_COMPLETION_INDEX": "1", "DISTRAIN_HOST": "distrain-0.invalid"}
    for name, value in {**environ(template, trainer(rendered)), **variables}.items():
        monkeypatch.setenv(name, value)
    config = resolved(rendered, tmp_path)
    keys = ["timeouts.start_seconds=1", f"data.dir={config.data.dir}", f"run.dir={tmp_path}{config.run.dir}"]
    launch = ["launch", "--nproc", "1", "--", "train", *keys]
    assert [cli.main(launch) for _ in range(5)] == [75, 75, 75, 1, 1]
    monkeypatch.setenv("DISTRAIN_JOB", "another")
    assert cli.main(launch) == 75


def test_a_job_without_its_data_set_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(K8S / "overlays/gpu-1-node")
    for name, value in {
        **environ(training(rendered)["template"], trainer(rendered)),
        "JOB_COMPLETION_INDEX": "0",
    }.items():
        monkeypatch.setenv(name, value)
    keys = ["run.device=cpu", f"data.dir={tmp_path}/data", f"run.dir={tmp_path}/run"]
    assert cli.main(["launch", "--nproc", "1", "--", "train", *keys]) == 78
    assert verdicts(training(rendered))["train", 78] == "FailJob"


def test_no_pod_with_gpus_waits_for_data(rendered: list[dict[str, Any]]) -> None:
    if "nvidia.com/gpu" in trainer(rendered)["resources"]["limits"]:
        assert "initContainers" not in training(rendered)["template"]["spec"]


def test_the_disks_of_both_volumes_are_where_one_pod_can_use_them() -> None:
    """A disk belongs to the zone of the first pod that uses it, and a run needs both."""
    for folder in ("prepare", "files"):
        (pod,) = pods(render(K8S / folder))
        claims = {
            each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each
        }
        assert claims == {"distrain-data", "distrain-runs"}


def test_no_secret_is_required_or_in_a_manifest(everything: list[dict[str, Any]]) -> None:
    assert not one_of_kind(everything, "Secret")
    for spec in job_specs(everything):
        for container in spec["template"]["spec"]["containers"]:
            for source in container.get("envFrom", []):
                assert source["secretRef"]["optional"] is True


def test_autoscalers_leave_a_run_alone_and_kubectl_shows_it(rendered: list[dict[str, Any]]) -> None:
    assert training(rendered)["template"]["metadata"]["annotations"] == {
        "kubectl.kubernetes.io/default-container": trainer(rendered)["name"],
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }


EDITS = {
    "storageClassName", "imagePullSecrets", "serviceAccountName", "nodeSelector", "tolerations", "name", "cpu",
    "rdma/hca", "add", "key",
}  # fmt: skip
"""Fields that are comments until someone needs them."""


def uncomment(text: str) -> tuple[str, set[str]]:
    """Remove the # before each field that a comment with EDIT follows, and before the lines of its value."""
    lines, names, is_field = [], set(), False
    for line in text.splitlines():
        match = re.match(r"( *)# ( *(?:- )?(?:([\w./-]+):|[\w.-]+).*)$", line)
        is_field = match is not None and ("# EDIT" in match[2] or is_field) and "mine.py" not in line
        if is_field and "# EDIT" in line:
            names.add(match[3])
        lines.append(match[1] + match[2] if is_field else line)
    return "\n".join(lines), names


def cores(quantity: str) -> float:
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else int(quantity)


def test_what_clusters_ask_for_is_there_as_a_comment_that_works_in_every_overlay(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    fields = set()
    for file in sorted((tmp_path / "k8s").rglob("*.yaml")):
        text, names = uncomment(file.read_text())
        file.write_text(text)
        fields |= names
    assert fields == EDITS
    for folder in FOLDERS:
        objects = render(tmp_path / "k8s" / folder)
        test_fits_the_schemas(objects)
        for pod in pods(objects) if folder != "base" else []:
            assert pod["imagePullSecrets"] == [{"name": "registry"}]
            for container in pod["containers"] + pod.get("initContainers", []):
                resources = container["resources"]
                assert cores(resources["limits"]["cpu"]) >= cores(resources["requests"]["cpu"])
    for overlay in OVERLAYS:  # a list or a map of an overlay may replace that of the base
        objects = render(tmp_path / "k8s" / overlay)
        pod, container = training(objects)["template"]["spec"], trainer(objects)
        assert "dedicated" in {each["key"] for each in pod["tolerations"]}
        assert pod["nodeSelector"]
        assert pod["serviceAccountName"] == "training"
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        assert container["resources"]["limits"]["rdma/hca"] == 1
        assert "NCCL_SOCKET_IFNAME" in {each["name"] for each in container["env"]}


def test_kueue_alone_suspends_the_job() -> None:
    job = one(render(K8S / "overlays/kueue"), "Job")
    assert "suspend" not in job["spec"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def test_kubeflow_finds_its_container() -> None:
    """Kubeflow adds the variables PET_… to the container `node` of the Job with this label, if there is a trainer."""
    objects = render(K8S / "overlays/trainjob")
    runtime, job = one(objects, "TrainingRuntime"), one(objects, "TrainJob")
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"],
    }  # fmt: skip
    assert set(runtime["spec"]["mlPolicy"]) == {"torch"}
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    label = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert replicated["template"]["metadata"]["labels"] == label
    assert trainer(objects)["name"] == "node"
    assert runtime["spec"]["template"]["spec"]["failurePolicy"] == {"maxRestarts": 0}
    assert "ttlSecondsAfterFinished" not in training(objects)


def test_a_jobset_does_not_restart_what_its_job_gave_up() -> None:
    jobset = one(render(K8S / "overlays/jobset"), "JobSet")
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 0}
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert "ttlSecondsAfterFinished" not in training(render(K8S / "overlays/jobset"))


KUBEFLOW = {
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "distrain-node-0-0.distrain", "PET_MASTER_PORT": "29400",
}  # fmt: skip


@pytest.mark.parametrize(
    ("overlay", "pod", "added", "first"),
    [
        ("gpu-multi-node", "distrain-1.distrain", {}, "distrain-0.distrain.ns.svc"),
        ("jobset", "distrain-node-0-1.distrain", {}, "distrain-node-0-0.distrain.ns.svc"),
        ("trainjob", "distrain-node-0-1.distrain", KUBEFLOW, "distrain-node-0-0.distrain"),
    ],
)
def test_each_kind_of_job_tells_its_pods_where_the_first_one_is(
    overlay: str, pod: str, added: dict[str, str], first: str
) -> None:
    objects = render(K8S / "overlays" / overlay)
    variables = {**environ(training(objects)["template"], trainer(objects)), "JOB_COMPLETION_INDEX": "1", **added}
    topology = detect(variables, Options(), lambda: f"{pod}.ns.svc")
    assert (topology.nodes, topology.node, topology.host, topology.port, topology.job) == (2, 1, first, 29400, "uid")


@pytest.mark.parametrize("overlay", ["gpu-1-node", "gpu-multi-node", "kueue", "jobset", "trainjob"])
def test_a_second_job_under_another_name_is_independent(overlay: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    shutil.copytree(K8S / "overlays/mine", tmp_path / "k8s/overlays/second")
    file = tmp_path / "k8s/overlays/second/kustomization.yaml"
    text = file.read_text().replace("nameSuffix: -first", "nameSuffix: -second")
    file.write_text(text.replace("- ../gpu-1-node", f"- ../{overlay}"))
    objects = render(tmp_path / "k8s/overlays/second")
    test_pods_reach_each_other_and_nobody_else_reaches_them(objects)
    test_every_mount_has_its_volume_and_every_volume_its_claim(objects)
    assert all("-second" in each["metadata"]["name"] for each in objects)
    assert resolved(objects, tmp_path).run.dir == "/runs/distrain-second"


def test_each_pod_of_a_sweep_trains_its_own_line(small: Dataset, tmp_path: Path) -> None:
    objects = render(K8S / "overlays/sweep")
    template, container = training(objects)["template"], trainer(objects)
    for name, text in one(objects, "ConfigMap")["data"].items():
        (tmp_path / name).write_text(text)
    keys = ["run.device=cpu", f"data.dir={small.root}", "train.epochs=null", "train.max_steps=1"]
    for index, lr in ((0, 0.05), (3, 0.4)):
        variables = {**environ(template, container, index=index), "JOB_COMPLETION_INDEX": str(index)}
        assert detect(variables, Options(), str) == Topology(1, 0, "127.0.0.1", 0, "as given", job="uid")
        given = arguments(template, container, index)
        assert given[-1] == f"run.dir=/runs/distrain-sweep/{index}"
        given = [each.replace("/config/", f"{tmp_path}/").replace("/runs/", f"{tmp_path}/runs/") for each in given]
        assert cli.main([*given[2:], *keys, "log.report=false"]) == 0
        assert configuration(tmp_path / f"runs/distrain-sweep/{index}").train.lr == lr
    assert int(training(objects)["completions"]) == len((tmp_path / "trials.txt").read_text().splitlines()) - 1


MODEL = """
import torch


class Net(torch.nn.Sequential):
    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = image_shape
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(channels * height * width, num_classes))
"""


def test_a_model_of_your_own_is_a_file_beside_the_configuration(small: Dataset, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s/overlays/mine"
    file = mine / "kustomization.yaml"
    file.write_text(file.read_text().replace("      # - mine.py", "      - mine.py"))
    (mine / "mine.py").write_text(MODEL)
    tree = yaml.safe_load((mine / "config.yaml").read_text())
    tree.update({"model": {"name": "mine:Net"}, "run": {"device": "cpu"}, "log": {"report": False}})
    tree["train"].update(epochs=1, global_batch_size=60)
    (mine / "config.yaml").write_text(yaml.safe_dump(tree))
    objects = render(mine)
    template, container = training(objects)["template"], trainer(objects)

    folders = {"/config": tmp_path / "config", "/data/train": small.root, "/runs": tmp_path / "runs"}
    content = folders["/config"] / "..2026_11_26"  # the kubelet writes a folder, and links to its files
    content.mkdir(parents=True)
    for name, text in one(objects, "ConfigMap")["data"].items():
        (content / name).write_text(text)
        (folders["/config"] / name).symlink_to(f"..data/{name}")
    (folders["/config"] / "..data").symlink_to(content.name)
    (content / "config.yaml").write_text((content / "config.yaml").read_text().replace("/data/train", str(small.root)))
    given = arguments(template, container)
    for path, real in folders.items():
        given = [argument.replace(f"={path}/", f"={real}/") for argument in given]
    given.insert(1, "--nproc=1")
    variables = {**os.environ, **environ(template, container), "PYTHONPATH": str(K8S.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "distrain", *given], cwd=folders[container["workingDir"]], env=variables,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folders["/runs"] / "distrain-first/result.json").is_file()


def test_the_files_of_runs_are_seen_read_only_for_an_hour_and_images_are_copied_in() -> None:
    pod = one(render(K8S / "files"), "Pod")
    assert pod["metadata"]["name"] == "distrain-files"
    assert pod["spec"]["activeDeadlineSeconds"] == 3600
    (container,) = pod["spec"]["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/data"] == {"name": "data", "mountPath": "/data"}  # one's own images are copied to it
    assert mounts["/runs"] == {"name": "runs", "mountPath": "/runs", "readOnly": True}
    assert container["command"] == ["sleep", "3600"]
