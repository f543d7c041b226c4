"""The files in a run's folder: damaged, foreign, renamed, copied, or gone while a job writes them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from datasets import make
from harness import Job, small_run
from PIL import Image
from safetensors.numpy import load_file, save_file

from distrain import cli
from distrain.errors import FolderLostError
from distrain.runs import attempts, checkpoint, exit_record, folder, records
from distrain.runs import lease as leasing
from distrain.runs.trackers import wandb_id

KEYS = ["train.max_steps=6", "train.global_batch_size=16", "log.every_steps=1", "checkpoint.every_steps=2"]
KEYS += ["log.report=false", "model.name=models_for_tests:Linear", "data.audit=true", "log.level=warning"]
CHECKPOINT = "checkpoints/step-00000006"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, with every kind of file that a run can have."""
    top = tmp_path_factory.mktemp("files")
    make(top / "data", 64, 20, image_size=8, shards=4, lanes=2)
    run = top / "run"
    assert cli.main(train(run)) == 0
    ended = {"launch": 1, "attempts_without_progress": 0, "code": 0, "reason": "done", "step": 6, "attempt": 1}
    exit_record.write(run / "exit.json", ended)
    wandb_id(run)
    Image.new("RGB", (8, 8)).save(top / "image.png")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, beside its data set."""
    (tmp_path / "data").symlink_to(finished.parent / "data")
    (tmp_path / "image.png").symlink_to(finished.parent / "image.png")
    return Path(shutil.copytree(finished, tmp_path / "run"))


def train(run: Path, *keys: str) -> list[str]:
    return ["train", f"data.dir={run.parent / 'data'}", f"run.dir={run}", *KEYS, *keys]


def status(run: Path) -> list[str]:
    return ["status", str(run)]


def predict(run: Path, *options: str) -> list[str]:
    return ["predict", str(run), str(run.parent / "image.png"), *options]


def evaluate(run: Path, *options: str) -> list[str]:
    return ["evaluate", str(run), f"data.dir={run.parent / 'data'}", *options]


def report(run: Path, out: str = "page") -> list[str]:
    return ["report", str(run), "--out", str(run.parent / out)]


def to_wandb(run: Path) -> list[str]:
    return ["wandb", str(run), "--mode", "offline", "--out", str(run.parent / "wandb")]


WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "binary": lambda content: bytes(range(256)) * 20,
    "zeros": lambda content: bytes(len(content)),
    "list": lambda content: b"[]\n",
    "null": lambda content: b"null\n",
    "number": lambda content: b"9" * 10_000 + b"\n",
    "deep": lambda content: b"[" * 200_000 + b"\n",
    "deep object": lambda content: b'{"version": 1, "a": ' * 100_000 + b"\n",
    "no keys": lambda content: b"{}\n",
    "version 2": lambda content: content.replace(b'"version": 1', b'"version": 2').replace(b"version 1", b"version 2"),
    "no version": lambda content: content.replace(b'"version": 1,', b"").replace(b"version 1", b""),
}
"""Damages to a file as a whole."""

VALUES: list[Any] = [None, -1, "x", {}, float("nan"), 10**30, "deleted"]
"""Values in the place of those of a JSON file."""


def keyed(content: bytes, values: list[Any]) -> Iterator[bytes]:
    """Yield a JSON object with one key after another, also of its parts, changed to each of `values`."""

    def paths(tree: dict[str, Any]) -> Iterator[tuple[str, ...]]:
        for key, value in tree.items():
            yield (key,)
            yield from ((key, *rest) for rest in paths(value)) if isinstance(value, dict) and len(value) < 12 else ()

    for path, value in itertools.product(paths(json.loads(content)), values):
        tree = part = json.loads(content)
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        if value == "deleted":
            del part[path[-1]]
        yield json.dumps(tree).encode() + b"\n"


def special(path: Path, kind: str) -> None:
    """Put something in a file's place that is no regular file."""
    path.unlink()
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path.name)}[kind]()


class Commands:
    """Runs commands, which may end in every documented way but a fault."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str]:
        self._capsys.readouterr()
        code = cli.main(list(arguments))
        output = self._capsys.readouterr()
        assert "Traceback" not in output.err
        assert code in (0, 75, 78), output.err
        return code, output.out + output.err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


RECORDS = ["result.json", "setup.json", "exit.json", "attempts/000001.json"]


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_named_by_status_and_passed_over(name: str, run: Path, command: Commands) -> None:
    path, content = run / name, (run / name).read_bytes()
    for damage, apply in WHOLE.items():
        path.write_bytes(apply(content))
        code, output = command(*status(run))
        assert code == 0
        assert f"warning: {path}: damaged, or written by another version of distrain (" in output, damage
    for kind in ("folder", "fifo", "loop"):
        special(path, kind) if path.is_file() else None
        code, output = command(*status(run))
        assert code == 0
        assert f"warning: {path}: cannot be read" in output
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize("name", [*RECORDS, "metrics.jsonl"])
def test_no_value_of_any_key_is_a_fault(name: str, run: Path, command: Commands) -> None:
    path, content = run / name, (run / name).read_bytes()
    values = VALUES if name != "setup.json" else [None, float("nan"), "deleted"]
    for changed in keyed(content.splitlines()[0] if name == "metrics.jsonl" else content, values):
        path.write_bytes(changed)
        assert command(*status(run))[0] == 0


@pytest.mark.parametrize("name", ["result.json", "setup.json", "config.yaml"])
@pytest.mark.parametrize("damage", [*WHOLE, "fifo", "loop", "folder"])
def test_what_a_command_needs_ends_it_with_one_message(name: str, damage: str, run: Path, command: Commands) -> None:
    path = run / name
    path.write_bytes(WHOLE[damage](path.read_bytes())) if damage in WHOLE else special(path, damage)
    needed = {"result.json": (predict, evaluate, report, to_wandb), "setup.json": (predict, report)}
    for arguments in needed.get(name, (status, predict, evaluate, report, to_wandb)):
        code, output = command(*arguments(run))
        assert code == 78
        assert output.count(str(path)) == 1 or f"{run}: holds no run (no config.yaml)" in output
        assert not (run.parent / "page").exists()
    if name == "result.json":
        assert command(*predict(run, "--checkpoint", "last"))[0] == 0


@pytest.mark.parametrize("name", ["state.json", "digests.json"])
def test_a_checkpoint_whose_state_is_damaged_or_of_another_version_is_skipped(
    name: str, run: Path, command: Commands
) -> None:
    path = run / CHECKPOINT / name
    content, digests = path.read_bytes(), (run / CHECKPOINT / "digests.json").read_bytes()
    for changed in [apply(content) for apply in WHOLE.values()] + list(keyed(content, [None, "x", -1, "deleted"])):
        path.write_bytes(changed)
        if name == "state.json":  # as if it had been written so
            tree = json.loads(digests)
            tree["files"][name] = xxhash.xxh3_128_hexdigest(changed)
            path.with_name("digests.json").write_text(json.dumps(tree))
        saved, skipped = checkpoint.newest(run / "checkpoints")
        assert saved is not None
        assert saved.step == 4 or (name == "state.json" and not skipped)
        assert all(str(path.parent) in message and "\n" not in message for message in skipped)
    path.write_bytes(WHOLE["no version"](content))
    code, output = command(*predict(run))
    assert code == 0
    assert f"warning: skipped {path.parent}" in output


def test_pictures_that_are_damaged_are_not_shown(run: Path, command: Commands) -> None:
    path = run / folder.MISCLASSIFIED
    arrays, content = load_file(path), path.read_bytes()
    assert folder.read_pictures(path, 10)
    changed = [{**arrays, "labels": arrays["labels"] + 10}, {**arrays, "images": arrays["images"][:, :0]}]
    changed += [{name: value for name, value in arrays.items() if name != gone} for gone in arrays]
    changed += [{**arrays, "predicted": arrays["predicted"].astype("f4")}, {**arrays, "ids": arrays["ids"][:-1]}]
    for each in changed:
        save_file({name: value.copy() for name, value in each.items()}, path)
        assert folder.read_pictures(path, 10) == {}
    for apply in WHOLE.values():
        path.write_bytes(apply(content))
        assert (apply(content) == content) == bool(folder.read_pictures(path, 10))
    (run / folder.AUGMENTED).write_bytes(b"x")
    (run / "attempts/000001.json").write_text("{}")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x"}\n{"step": 7, "test/accuracy": 8}\n')
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    code, output = command(*report(run))
    assert code == 0
    for part in (
        f"{path}: damaged",
        f"{run / folder.AUGMENTED}: damaged",
        "(2 lines are damaged)",
        "000001.json: damaged",
    ):
        assert part in output
    code, output = command(*to_wandb(run))
    assert code == 78  # a copy that lacks lines would look complete
    assert "metrics.jsonl, line 9: damaged" in output


def test_a_run_resumes_whatever_happened_to_files_that_it_can_do_without(run: Path, command: Commands) -> None:
    shutil.rmtree(run / CHECKPOINT)
    for name in RECORDS:
        (run / name).write_bytes(b"\xff{")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 50)
    code, output = command(*train(run, "run.wait_seconds=0"))
    assert code == 75  # the newest attempt may be of a job that runs
    assert f"owner unknown: {run / 'attempts/000001.json'}: damaged" in output
    assert command(*status(run))[0] == 0
    (run / "attempts/000001.json").unlink()
    assert command(*train(run))[0] == 0
    assert command(*status(run))[1].startswith(f"{run}: done\n")


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "setup.json", "audit", "checkpoints", "attempts"])
def test_something_else_in_the_place_of_a_file_or_folder_is_refused(name: str, run: Path, command: Commands) -> None:
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text("") if name in ("audit", "checkpoints", "attempts") else os.mkfifo(path)
    code, output = command(*train(run))
    assert code == 78
    assert str(path) in output


def test_endless_attempts_are_neither_read_nor_waited_for(run: Path, command: Commands) -> None:
    one = json.loads((run / "attempts/000001.json").read_text())
    for number in [*range(2, 1500), 999_999_999]:
        (run / f"attempts/{number:06d}.json").write_text(json.dumps({**one, "attempt": number}))
    (run / f"attempts/{10**200}.json").write_text("{}")
    code, output = command(*status(run))
    assert code == 0
    assert "only the newest 1,000 of 1,500 are shown" in output
    assert "attempts 999999999;" in output
    leasing.acquire(run, 0).release()


# Files that distrain did not write


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "metrics.jsonl", "result.json", "setup.json", "audit/rank-00000.jsonl", "pictures/cat.png",
     "tensorboard/events", "checkpoints/mine.pt", "attempts/notes.txt", "trace/rank-00000.json"],
)  # fmt: skip
def test_a_folder_with_files_of_the_user_is_refused(name: str, run: Path, command: Commands) -> None:
    mine = run.parent / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine\n")
    before = sorted(run.parent.rglob("*"))
    code, output = command(*train(run.parent / "mine", f"data.dir={run.parent / 'data'}"))
    assert code == 78
    assert f"{mine}: was not written by this version of distrain, and would be overwritten; choose another" in output
    assert mine.read_text() == "mine\n"
    assert sorted(run.parent.rglob("*")) == before


def test_the_configuration_that_a_run_was_given_is_not_overwritten(
    run: Path, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run.parent / "here"
    here.mkdir()
    text = f"# my notes\ndata: {{dir: {run.parent / 'data'}}}\ntrain: {{max_steps: 2, global_batch_size: 16}}\n"
    text += "model: {name: 'models_for_tests:Linear'}\n"
    (here / "config.yaml").write_text(text)
    (here / "notes.txt").write_text("also mine")
    monkeypatch.chdir(here)
    code, output = command("train", "--config", "config.yaml", "run.dir=.")
    assert code == 78
    assert "config.yaml: was not written by" in output
    assert (here / "config.yaml").read_text() == text
    (here / "config.yaml").rename("mine.yaml")
    assert command("train", "--config", "mine.yaml", "run.dir=.", "log.report=false")[0] == 0
    assert command("train", "--config", "config.yaml", "run.dir=.", "log.report=false")[0] == 0  # its own


def test_an_exit_record_does_not_replace_a_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError):
        exit_record.write(tmp_path / "exit.json", {"code": 0})
    assert (tmp_path / "exit.json").read_text() == '{"mine": 1}'
    assert folder.foreign(tmp_path) == tmp_path / "exit.json"


def test_a_report_replaces_reports_alone(run: Path, command: Commands) -> None:
    out = run.parent / "page"
    out.mkdir()
    (out / "index.html").write_text("<p>mine, and not of distrain")
    code, output = command(*report(run))
    assert code == 78
    assert f"{out}/index.html: is no report of distrain; choose another --out, or move it away" in output
    assert [path.read_text() for path in out.iterdir()] == ["<p>mine, and not of distrain"]


# Checkpoints with other names, logs that are too short


def test_a_renamed_checkpoint_is_said_to_be_that_and_left_alone(run: Path, command: Commands) -> None:
    other = run / "checkpoints/step-00000009"
    (run / CHECKPOINT).rename(other)
    code, output = command(*train(run))
    assert code == 78
    assert f"{other}: was renamed or copied, it holds step 6; rename it back to step-00000006" in output
    assert other.is_dir()
    code, output = command(*status(run))
    assert code == 0
    assert output.count(f"{other}: was renamed or copied") == 1
    assert "saved    step 4," in output
    code, output = command(*predict(run, "--checkpoint", "last"))
    assert code == 0
    assert f"skipped {other}: was renamed or copied" in output
    checkpoint.prune(run / "checkpoints", 1, 0, None)
    assert other.is_dir()
    other.rename(run / CHECKPOINT)
    assert command(*train(run))[0] == 0


def sign(path: Path) -> None:
    """Write the digests of a checkpoint's files as they are now."""
    digests = json.loads((path / "digests.json").read_text())
    digests["files"] = {name: xxhash.xxh3_128_hexdigest((path / name).read_bytes()) for name in digests["files"]}
    (path / "digests.json").write_text(json.dumps(digests))


def test_logits_that_are_not_finite_are_no_answer(run: Path, command: Commands) -> None:
    path = run / CHECKPOINT / "model.safetensors"
    save_file({name: value * 0 + 3e38 for name, value in load_file(path).items()}, path)
    sign(path.parent)
    for arguments in (predict(run), ["export", str(run), "--out", str(run.parent / "model.pt2")]):
        code, output = command(*arguments)
        assert code == 78
        assert "step-00000006: its model gives logits that are not finite; use another checkpoint" in output


def test_a_checkpoint_of_a_run_on_other_data_predicts_no_classes_of_this_one(run: Path, command: Commands) -> None:
    state = run / CHECKPOINT / "state.json"
    content = json.loads(state.read_text())
    content["identity"]["data.manifest"] = "that of another data set"
    state.write_text(json.dumps(content))
    sign(run / CHECKPOINT)
    code, output = command(*predict(run))
    assert code == 78
    assert f"was not trained on the data set that {run / 'setup.json'} describes: its classes may be others" in output


def test_initial_weights_from_a_folder_that_is_no_run_are_refused_by_that_name(run: Path, command: Commands) -> None:
    other = run.parent / "other"
    other.mkdir()
    shutil.copy(run / CHECKPOINT / "model.safetensors", other)
    for folder_ in (other, run / "checkpoints", run.parent):
        code, output = command(*train(run.parent / "new", f"model.init={folder_}"))
        assert code == 78
        assert (
            f"model.init={folder_}: is neither a run's folder nor a checkpoint; give one of these, or a file" in output
        )


def test_a_copied_checkpoint_can_be_used_by_its_name_but_not_as_another_step(run: Path, command: Commands) -> None:
    for name in ("best-copy", "step-00000007"):
        shutil.copytree(run / CHECKPOINT, run / "checkpoints" / name)
    code, output = command(*train(run))
    assert code == 78
    assert f"step-00000007: was renamed or copied, it holds step 6; move it out of {run / 'checkpoints'}" in output
    assert command(*predict(run, "--checkpoint", "step-00000007"))[0] == 78
    assert command(*predict(run, "--checkpoint", "best-copy"))[0] == 0
    code, output = command(*evaluate(run, "--checkpoint", "best-copy"))
    assert code == 0
    assert f"written to {run / 'evaluations/test-best-copy.json'}" in output
    code, output = command(*predict(run, "--checkpoint", "beste"))
    assert code == 78
    assert "no such checkpoint; there are step-00000007, step-00000006" in output
    shutil.rmtree(run / "checkpoints/step-00000007")
    assert command(*train(run))[0] == 0


def test_logs_that_are_shorter_than_the_checkpoint_says_are_named(run: Path, command: Commands) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    audit = (run / "audit/rank-00000.jsonl").read_text().splitlines(keepends=True)
    (run / "audit/rank-00000.jsonl").write_text("".join(audit[:1] + audit[3:]))
    counted = json.loads((run / CHECKPOINT / "state.json").read_text())["lines"]
    assert f"metrics.jsonl: has 2 of the {counted} lines that a checkpoint counts on" in command(*status(run))[1]
    shutil.rmtree(run / CHECKPOINT)
    at_four = json.loads((run / "checkpoints/step-00000004/state.json").read_text())["lines"]
    code, output = command(*train(run))
    assert code == 0
    assert (
        f"metrics.jsonl: {at_four - 2} of {at_four} lines are missing that were there when step 4 was saved" in output
    )
    assert "audit: lacks samples of 2 of the 4 steps done, first of step 1" in output
    after = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert after == [1, 2, 5, 6, 6]
    # The lines are counted from what is there, so the next attempt cuts nothing and repeats nothing.
    assert json.loads((run / CHECKPOINT / "state.json").read_text())["lines"] == 4


# One writer, whatever happens to the folder


@pytest.mark.parametrize("change", ["removed", "moved", "emptied", "copied over"])
def test_an_owner_sees_that_its_folder_is_gone(change: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lease = leasing.acquire(run, 0)
    lease.check()
    if change == "emptied":
        shutil.rmtree(run / "attempts")
    elif change == "removed":
        shutil.rmtree(run)
    else:
        run.rename(tmp_path / "other")
        if change == "copied over":  # the token is the same, but the folder is not
            shutil.copytree(tmp_path / "other", run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(FolderLostError, match="while this job was writing there"):
        lease.check()
    with pytest.raises(FolderLostError):
        lease.note(beat=1)
    lease.release()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_another_job_in_the_place_of_a_folder_is_not_disturbed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    first = leasing.acquire(run, 0)
    run.rename(tmp_path / "moved")
    run.mkdir()
    second = leasing.acquire(run, 0)
    entry = (run / "attempts/000001.json").read_text()
    with pytest.raises(FolderLostError, match="another folder was put in its place"):
        first.check()
    first.release()
    assert (run / "attempts/000001.json").read_text() == entry
    second.check()
    second.release()
    assert attempts.history(tmp_path / "moved")[0].get("ended") is None


@pytest.mark.faults
@pytest.mark.parametrize("change", ["remove", "move", pytest.param("replace", marks=pytest.mark.short)])
def test_a_job_whose_folder_is_gone_ends_with_all_its_processes(change: str, data: Path, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    with Job(small_run(data, run), tmp_path, environ={"FAULT": "slow:0:1"}) as job:
        job.wait_for("train", 13)
        os.kill(job.workers()[0].pid, signal.SIGSTOP)  # so that nothing is written between the two changes
        run.rename(moved)
        if change == "remove":
            shutil.rmtree(moved)
        if change == "replace":
            tree = small_run(data, run, run={"seed": 8}, train={"max_steps": 12})
            with Job(tree, tmp_path) as second:
                assert second.wait() == 0, second.output
        before = contents(tmp_path)
        os.kill(job.workers()[0].pid, signal.SIGCONT)
        assert job.wait(60) == 78, job.output
        assert f"{run}: was " in job.output
        assert "while this job was writing there; nothing more is written" in job.output
    assert contents(tmp_path) == before


def contents(top: Path) -> dict[str, bytes]:
    """Return the files of the runs in a folder."""
    runs = (top / "run", top / "moved")
    return {str(path): path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()}


# The id at wandb


def test_a_copied_run_has_another_id_at_wandb_and_a_moved_one_keeps_its_id(run: Path, tmp_path: Path) -> None:
    (run / "wandb-id").unlink()
    first = wandb_id(run)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert wandb_id(copy) != first
    assert wandb_id(copy) == wandb_id(copy)
    assert wandb_id(run) == first
    moved = run.rename(tmp_path / "moved")
    assert wandb_id(moved) == first
    elsewhere = Path(shutil.copytree(moved, tmp_path / "another file system"))
    shutil.rmtree(moved)
    assert wandb_id(elsewhere) == first


@pytest.mark.parametrize("damage", list(WHOLE))
def test_a_damaged_wandb_id_is_one_message(damage: str, run: Path, command: Commands) -> None:
    path = run / "wandb-id"
    path.write_bytes(WHOLE[damage](path.read_bytes()))
    code, output = command(*to_wandb(run))
    assert code == 78
    assert f"{path}: damaged" in output
    assert "delete it, and the run gets a new id" in output


def test_records_have_a_version(run: Path) -> None:
    for path in (*run.glob("*.json"), *run.glob("attempts/*"), *run.glob("checkpoints/*/*.json"), run / "wandb-id"):
        assert json.loads(path.read_text())["version"] == records.VERSION
    assert (run / "config.yaml").read_text().startswith("# distrain run, version 1\n")
