"""Commands in README.md and docs/: those tagged `run` run as printed, those tagged `check` fit the command line."""

from __future__ import annotations

import ast
import glob
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
import click.testing
import drawn_photos
import manifests
import page_data
import pytest
import webdataset
from datasets import make
from group import fork_server
from indexes import jpeg
from PIL import Image, ImageDraw
from tar_files import write

from benchmarks.__main__ import bench
from distrain import cli, config

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
TAGS = {"bash run", "bash check", "bash ci", "python run", "text", "mermaid"}
FILE = re.compile(r"[a-z]+ file=([\w./-]+)")
"""A block that is a file: it is written into the folder in which the page's blocks run."""
LINKED = ("configs", "launch", "k8s")
TORCH_HOME = ".torch"
"""Folder with the weights that a page would download."""


class Block(NamedTuple):
    page: str
    line: int
    tag: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    results = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            results.append(Block(page.name, text[: match.start()].count("\n") + 1, match[1], match[2]))
    return results


BLOCKS = blocks()


def tagged(*tags: str) -> list[Block]:
    return [block for block in BLOCKS if block.tag in tags]


def commands(text: str) -> list[list[str]]:
    """The arguments of each command, without comments and variables before it."""
    results = []
    for line in text.replace("\\\n", " ").splitlines():
        arguments = shlex.split(line, comments=True)
        while arguments and re.fullmatch(r"[A-Z_]+=.*", arguments[0]):
            del arguments[0]
        if arguments:
            results.append(arguments)
    return results


def check_distrain(arguments: list[str]) -> None:
    """The options, paths of configuration files and keys of a `distrain` command."""
    command: click.Command = cli.cli
    name, rest = "distrain", list(arguments)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        command = command.commands[name]
    params = command.make_context(name, rest).params
    if name == "launch":
        check_distrain(list(params["command"]))
    if name in ("train", "doctor"):
        file = params["file"]
        config.load(REPO / file if file is not None else None, params["overrides"])


def check(arguments: list[str]) -> None:
    arguments = ["distrain" if argument == ".venv/bin/distrain" else argument for argument in arguments]
    program = arguments[0]
    if arguments[:3] == ["python", "-m", "benchmarks"]:
        bench.make_context("benchmarks", list(arguments[3:]))
    elif "distrain" in arguments and program in ("distrain", "torchrun", "accelerate", "srun", "python"):
        if "--config_file" in arguments:
            assert (REPO / arguments[arguments.index("--config_file") + 1]).is_file()
        check_distrain(arguments[arguments.index("distrain") + 1 :])
    elif program == "torchrun":
        (script,) = (argument for argument in arguments if argument.endswith(".py"))
        assert (REPO / script).is_file()
    elif program == "python":
        assert f"python file={arguments[1]}" in {block.tag for block in BLOCKS}, f"{arguments[1]} is on no page"
    elif "--wrap" in arguments:
        check(shlex.split(arguments[arguments.index("--wrap") + 1]))
    elif program == "sbatch":
        rest = [argument for argument in arguments[1:] if not argument.startswith("--")]
        assert (REPO / rest[0]).is_file(), rest[0]
        if rest[0].endswith("prepare.sbatch"):
            check_distrain(["prepare", *arguments[arguments.index(rest[0]) + 1 :]])
        else:
            for file in (argument for argument in rest[1:] if "=" not in argument):
                config.load(REPO / file, [argument for argument in rest[1:] if "=" in argument])
    elif program == "launch/torchrun.sh":
        check_distrain(["train", *arguments[1:]])
    elif program == "docker":
        if "run" in arguments:
            check_distrain(arguments[arguments.index("distrain") + 1 :])
    elif program == "make":
        targets = [argument for argument in arguments[1:] if "=" not in argument]
        known = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert targets
        assert set(targets) <= set(known)
    elif program == "kubectl":
        check_kubectl(arguments)
    elif program == "wandb":
        from wandb.cli.cli import cli as wandb

        assert arguments[1] in wandb.commands
    elif program == "tensorboard":
        assert arguments[1] == "--logdir"
        assert len(arguments) == 3
    else:
        assert program in ("pip", "source", "git", "cd", "mkdir", "mv"), f"nobody checks {program}"


def check_kubectl(arguments: list[str]) -> None:
    """Folders exist, and the folders of k8s/ have the objects, labels and mounted paths that a command names."""
    objects = [each for folder in manifests.FOLDERS for each in manifests.render(manifests.K8S / folder)]
    names = {(each["kind"].lower(), each["metadata"]["name"]) for each in objects}
    given = [each for option, each in pairwise(arguments) if not each.startswith("-") and option not in ("-k", "-l")]
    if "-k" in arguments:
        assert (REPO / arguments[arguments.index("-k") + 1] / "kustomization.yaml").is_file()
    if "-l" in arguments:
        labels = dict(each.split("=") for each in arguments[arguments.index("-l") + 1].split(","))
        labels.pop("batch.kubernetes.io/job-completion-index", None)  # the Job adds it
        templates = [spec["template"]["metadata"]["labels"] for spec in manifests.job_specs(objects)]
        assert any(labels.items() <= template.items() for template in templates), labels
        assert given[0] != "wait"  # it fails where no pod exists yet, as just after the apply
        assert given[0] != "logs" or "--tail=-1" in arguments  # ten lines without it
    for each in given:
        if match := re.fullmatch(r"(job|pod)/([a-z-]+)", each):
            assert match.groups() in names
        elif match := re.fullmatch(r"([a-z-]+):(/\w+)/.+", each):
            (pod,) = (one for one in objects if (one["kind"], one["metadata"]["name"]) == ("Pod", match[1]))
            (mount,) = (one for one in pod["spec"]["containers"][0]["volumeMounts"] if one["mountPath"] == match[2])
            assert each != given[-1] or not mount.get("readOnly"), f"{match[2]} cannot be written"
    if given[0] == "delete" and len(given) > 2:
        assert (given[1], given[2]) in names
    if given[0] == "exec":
        assert ("pod", given[1]) in names
        check_distrain(arguments[arguments.index("distrain") + 1 :])


def test_commands_of_kubectl_in_sentences_fit_the_manifests() -> None:
    page = (REPO / "docs/launching.md").read_text()
    quoted = [" ".join(match.split()) for match in re.findall(r"`(kubectl [^`]+)`", page)]
    complete = [command for command in quoted if "…" not in command and len(command.split()) > 3]
    assert len(complete) >= 5
    for command in complete:
        check(shlex.split(command))


def test_what_deletes_checkpoints_says_so() -> None:
    """Volumes are deleted by two folders of k8s/ alone; each command that does so stands beside a warning."""
    for page in PAGES:
        for line in page.read_text().splitlines():
            for folder in re.findall(r"kubectl delete -k (k8s/[\w/-]+)", line):
                kinds = {each["kind"] for each in manifests.render(REPO / folder)}
                assert "PersistentVolumeClaim" not in kinds or "**all data sets, checkpoints and results**" in line
            assert not re.search(r"kubectl delete (pvc|persistentvolumeclaim|namespace|all)", line)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_tagged(block: Block) -> None:
    assert block.tag in TAGS or FILE.fullmatch(block.tag)


@pytest.mark.parametrize("block", tagged("bash check", "bash run"), ids=str)
def test_commands_fit_the_command_line(block: Block) -> None:
    results = commands(block.text)
    assert results
    for arguments in results:
        check(arguments)


def test_what_ci_runs_is_printed() -> None:
    lines = re.findall(r"^tier make --no-print-directory (.+)$", (REPO / ".ci/run").read_text(), re.MULTILINE)
    made = [target for line in lines for target in line.split()]
    printed = [
        arguments[1] for block in tagged("bash ci") for arguments in commands(block.text) if arguments[0] == "make"
    ]
    assert printed
    assert set(printed) <= set(made)


def modules_in_the_code() -> set[tuple[str, str]]:
    """(folder, module); an `__init__` that holds no more than a docstring is none."""
    root = REPO / "distrain"
    results = set()
    for path in root.rglob("*.py"):
        folder = "distrain/" if path.parent == root else f"{path.parent.relative_to(root)}/"
        if path.stem != "__init__" or len(ast.parse(path.read_text()).body) > 1:
            results.add((folder, path.stem))
    return results


def modules_in_the_design() -> list[tuple[str, str]]:
    """(folder, module) of the table in docs/design.md; a row without a folder belongs to that of the row above."""
    text = (REPO / "docs/design.md").read_text().partition("\n## Modules\n")[2].partition("\n## ")[0]
    results, folder = [], ""
    for row in re.findall(r"^\|(.*?)\|(.*?)\|", text, re.MULTILINE)[2:]:
        folder = row[0].strip(" `") or folder
        results += [(folder, name) for name in re.findall(r"`(\w+)`", row[1])]
    return results


def test_the_design_names_every_module() -> None:
    assert sorted(modules_in_the_code() - set(modules_in_the_design())) == []


def test_the_design_names_no_module_that_is_not_there() -> None:
    named = modules_in_the_design()
    assert sorted(set(named) - modules_in_the_code()) == []
    assert len(named) == len(set(named)), "one is named twice"


def test_the_arrows_of_the_design_are_those_that_lint_checks() -> None:
    contract = re.search(r"^layers = \[\n(.*?)^\]", (REPO / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    layers = [line.split(" | ") for line in re.findall(r'"(.*)"', contract[1])]
    below = {(a, b) for upper, lower in pairwise(layers[1:]) for a in upper for b in lower}  # cli is the first shown
    drawn = next(block for block in tagged("mermaid") if block.page == "design.md").text
    unlabelled = re.sub(r"\[.*?\]", "", drawn)
    sides = [
        [re.findall(r"\w+", side) for side in line.split("-->")] for line in unlabelled.splitlines() if "-->" in line
    ]
    assert {(a, b) for upper, lower in sides for a in upper for b in lower} == below


@pytest.mark.ranks
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.faults] if page == "data.md" else [])  # a minute: `make faults` runs it
        for page in sorted({block.page for block in tagged("bash run", "python run")})
    ],
)
def test_blocks_run_as_printed(page: str, tmp_path: Path) -> None:
    """The blocks of a page run one after another, in one folder."""
    for name in LINKED:
        (tmp_path / name).symlink_to(REPO / name)
    if page == "README.md":  # `make train`, above, has made it
        make(tmp_path / "data/synthetic", 2000, 500, image_size=32)
    if page == "data.md":
        page_data.write(tmp_path)
    if page == "fine-tuning.md":
        drawn_photos.write(tmp_path / "photos", 15)
        drawn_photos.write_weights(tmp_path / TORCH_HOME)
    with ProcessPoolExecutor(1, mp_context=fork_server()) as process:
        for block in (one for one in BLOCKS if one.page == page):
            if file := FILE.fullmatch(block.tag):
                (tmp_path / file[1]).write_text(block.text)
            if block.tag in ("bash run", "python run"):
                failed = process.submit(run_block, block, tmp_path).result(timeout=300)
                assert failed is None, f"{block}: {failed}:\n{(tmp_path / 'log').read_text()[-4000:]}"


def expanded(arguments: list[str], text: str) -> list[str]:
    """Expand file names as a shell does: what matches none, or is in quotes in the text, stays as it is."""
    return [name for each in arguments for name in ((f"'{each}'" not in text and sorted(glob.glob(each))) or [each])]


def run_block(block: Block, folder: Path) -> str | None:
    """Run a block in this process, which has imported torch; in a shell, if it has more than commands of `distrain`.

    Args:
        block: the block.
        folder: the folder where it runs; the output goes to its file `log`.

    Returns:
        The command that failed, or None.
    """
    os.chdir(folder)
    os.environ["TORCH_HOME"] = str(folder / TORCH_HOME)
    sys.path[:0] = [""] * ("" not in sys.path)
    with open("log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if block.tag == "python run":
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
        return None
    lines = commands(block.text)
    if all(program == "distrain" and command != "launch" for program, command, *_ in lines):
        return next((shlex.join(line) for line in lines if cli.main(expanded(line[1:], block.text)) != 0), None)
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = ["bash", "-euo", "pipefail", "-c", block.text]
    return None if subprocess.run(shell, env=environ, timeout=240, check=False).returncode == 0 else block.text


def test_the_scripts_pack_each_image_once_with_its_class_in_random_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_data.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    scripts = {match[1]: block.text for block in BLOCKS if (match := FILE.fullmatch(block.tag))}
    for name, arguments in (("make_tars.py", ["photos", "tars/train"]), ("make_imagenet_tars.py", [])):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        exec(compile(scripts[name], name, "exec"), {})
    for pattern, numbers, classes in (
        ("tars/train-*.tar", range(120), page_data.CLASSES),
        ("imagenet/train-*.tar", range(120), page_data.WORDNET),
        ("imagenet/val-*.tar", range(1001, 1031), page_data.WORDNET),
    ):
        largest = 300 if pattern.startswith("tars") else 120
        expected = [(jpeg(number, 40, largest), classes[number % 3].encode()) for number in numbers]
        tars = webdataset.WebDataset(sorted(map(str, tmp_path.glob(pattern))), shardshuffle=False)
        samples = [(sample["jpg"], sample["txt"]) for sample in tars]
        assert sorted(samples) == sorted(expected)
        changes = sum(before != after for (_, before), (_, after) in pairwise(samples))
        assert changes > len(samples) / 2  # two thirds are expected; 2 if they were sorted by class


@pytest.mark.parametrize("module", ["torch.export", "onnxruntime"])
@pytest.mark.parametrize("kind", ["blocks", "index"])
def test_the_examples_of_exported_files_answer_like_predict(
    module: str,
    kind: str,
    paths: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, image = paths
    run = run if kind == "blocks" else run.with_name("run-on-index")
    folder = image.parents[3]
    monkeypatch.chdir(folder)
    assert (
        cli.main(["export", str(run), "--force", "--out", "tiny.onnx" if module == "onnxruntime" else "tiny.pt2"]) == 0
    )
    assert cli.main(["predict", str(run), str(image), "--json", "--top", "2"]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])["classes"]
    (example,) = (block.text for block in tagged("python run") if f"{module}." in block.text)
    exec(compile(example, "extending.md", "exec"), {})
    difference = 1e-5 if module == "torch.export" else 1e-2  # the other one resizes by Pillow
    assert ast.literal_eval(capsys.readouterr().out) == pytest.approx(expected, abs=difference)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on photos of circles and squares, and one of its test images; beside it, a run on an index of photos."""
    folder = tmp_path_factory.mktemp("photos")
    for split, name, number in itertools.product(("train", "test"), ("circle", "square"), range(8)):
        path = folder / "photos" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (48, 40), (20 * number, 60, 200))
        ImageDraw.Draw(image).ellipse((8, 8, 30, 20 + number), fill=(255, 90, 90 if name == "circle" else 0))
        image.save(path)
    data, keys = folder / "data", ["train.max_steps=4", "train.global_batch_size=8", "log.report=false"]
    assert cli.main(["prepare", "folder", str(folder / "photos"), "--lanes", "2", "--out", str(data)]) == 0
    assert cli.main(["train", f"data.dir={data}", f"run.dir={folder / 'run'}", *keys]) == 0
    images = [(f"{path.parent.name}-{path.stem}", path) for path in sorted((folder / "photos/train").glob("*/*.png"))]
    samples = [(key, {"png": path.read_bytes(), "cls": path.parent.name.encode()}) for key, path in images]
    tar = write(folder / "train.tar", samples[::8] + samples[1::8] + samples[2::8] + samples[3::8])
    assert cli.main(["prepare", "webdataset", str(tar), "--lanes", "2", "--out", f"{data}-index"]) == 0
    keys += ["data.image_size=20", "eval.resize=28", "train.global_batch_size=4"]
    assert cli.main(["train", f"data.dir={data}-index", f"run.dir={folder / 'run-on-index'}", *keys]) == 0
    return folder / "run", folder / "photos/test/circle/0.png"


@pytest.mark.parametrize("command", ["export", "predict"])
def test_the_help_of_commands_on_models_names_what_goes_in_and_out(command: str) -> None:
    text = click.testing.CliRunner().invoke(cli.cli, [command, "--help"]).output
    named = {"export": ["images", "[N, C, H, W]", "float32", "logits", "classes", "image_shape", "checkpoint"],
             "predict": ["resized and cropped as by `prepare`", '"classes"']}[command]  # fmt: skip
    assert [each for each in named if each not in " ".join(text.split())] == []


def test_no_page_promises_the_same_weights_on_another_number_of_processes() -> None:
    for page in PAGES:
        text = " ".join(page.read_text().split())
        assert "the same weights" not in text or page.name == "faults.md", page.name
    assert "except for rounding" in (REPO / "README.md").read_text()
