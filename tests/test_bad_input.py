"""Input that is not what it should be: one short message with a cure, exit code 78, no wait and no control sequence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import yaml
from broken_disks import refuse_to_sync_folders
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distrain import cli, config
from distrain.data import manifest, shards
from distrain.errors import ConfigError

SECONDS = 30
ESCAPES = "a\x1b[31m\x9b2J\u202e\r\nb"
"""A name with a colour, a cleared screen, a reversed direction, and a second line."""
LONGEST = 6000
"""Characters of the longest message that a command may show."""


@pytest.fixture(autouse=True)
def _limited_time() -> Iterator[None]:
    """Interrupt a test that waits: a FIFO that nobody writes to is waited for without end."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"no end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two classes, whose names in the manifest have control sequences."""
    folder = tmp_path_factory.mktemp("data") / "data"
    sizes = ["--samples", "40", "--test-samples", "8", "--image-size", "16", "--classes", "2", "--lanes", "2"]
    assert cli.main(["prepare", "synthetic", *sizes, "--out", str(folder)]) == 0
    change_manifest(folder, classes=[ESCAPES, "two" * 100_000])
    return folder


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on this data set."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert cli.main(["train", *keys(dataset, folder)]) == 0
    return folder


def keys(data: Path, folder: Path) -> list[str]:
    return [
        f"data.dir={data}",
        f"run.dir={folder}",
        "train.max_steps=2",
        "train.global_batch_size=8",
        "log.report=false",
    ]


def change_manifest(folder: Path, **values: object) -> None:
    path = folder / manifest.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shown(*arguments: str, code: int = 78) -> str:
    """Run a command; return what it shows, which must be short and printable."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        assert cli.main(list(arguments)) == code, output.getvalue()
    text = output.getvalue()
    assert "Traceback" not in text
    assert all(each.isprintable() or each in "\n\t" for each in text), repr(text)
    assert len(text) < LONGEST
    text.encode()
    return text


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def socket_file(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # bind() takes only paths of up to 107 bytes


SPECIAL = pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fifo, "not a regular file"),
        (device, "not a regular file"),
        (socket_file, "not a regular file"),
        (folder, "Is a directory"),
    ],
)


@SPECIAL
@pytest.mark.parametrize("command", ["train --config FILE", "launch --nproc 1 -- train --config FILE"])
def test_a_configuration_is_a_regular_file(
    command: str, make: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    make(file)
    assert f"{file}: cannot be read: {reason}" in shown(*command.replace("FILE", str(file)).split())


@SPECIAL
def test_a_manifest_is_a_regular_file(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    make(tmp_path / manifest.NAME)
    text = shown("verify", str(tmp_path))
    assert text == (
        f"distrain: error: {tmp_path}/manifest.json: {reason}; make one with `distrain prepare`, or set data.dir\n"
    )


@SPECIAL
def test_a_shard_is_a_regular_file(make: Callable[[Path], None], reason: str, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    shard = tmp_path / "data/train/00001.tar"
    shard.unlink()
    make(shard)
    assert f"{shard}: {reason}" in shown("verify", str(tmp_path / "data"))
    shown("train", *keys(tmp_path / "data", tmp_path / "run"))


@SPECIAL
def test_an_image_to_predict_is_a_regular_file(
    make: Callable[[Path], None], reason: str, run: Path, tmp_path: Path
) -> None:
    make(tmp_path / "image.png")
    assert f"image.png: {reason}" in shown("predict", str(run), str(tmp_path / "image.png"))


@SPECIAL
@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_2"])
def test_the_files_of_cifar10_are_regular_files(
    name: str, make: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "root" / name
    file.parent.mkdir(parents=True)
    make(file)
    text = shown("prepare", "cifar10", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"))
    assert text == f"distrain: error: {file}: {reason}; remove it, or give another --root\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "a: &a [*a]",
        "train: &t {lr: 1}",
        "[" * 100_000,
        "- " * 20_000,
        "{a: " * 5_000,
        "? " * 20_000,
        'train: {lr: "\\UFFFFFFFF"}',
        f"%YAML 1.{'9' * 5000}\n---\n",
        "a: 1\n---\nb: 2\n",
        "a: \0",
        "a: \x1b[31m",
        f"train: {{lr: {'x' * 200_000}}}",
        f"train: {{epochs: {'9' * 200_000}}}",
        f"train: {{betas: [{'x,' * 10_000}]}}",
        f"data: {{mean: [{'1,' * 100_000}]}}",
        f"? {'k' * 200_000}\n: 1\n",
        "".join(f"k{number}: 1\n" for number in range(2_000)),
        '"a\\e[31m\\nb": 1',
        'train: {lr: "\\e[31m\\n"}',
        '"a\\e\\n": 1\n"a\\e\\n": 2\n',
        'run: {dir: "a\\0b"}',
        'run: {dir: "\\uD800"}',
        f"run: {{dir: {'x' * 256}}}",
        f"data: {{dir: {'x/' * 3000}}}",
        f"model: {{init: {'x' * 256}}}",
        "#" * 2**20,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_configuration_that_attacks_is_one_short_message(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert shown("train", "--config", str(file)).startswith("distrain: error: the configuration cannot be used:\n  ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=" + "x" * 100_000, r"got 'x{57}\.\.\.x{58}'"),
        ("train.betas=" + "[" * 5000, "is not valid YAML: brackets or indents are nested too deeply"),
        ("train.betas=[&a 1, *a]", "is not valid YAML: anchors and aliases"),
        ("x" * 100_000, "should be section.key=value"),
        (f"{ESCAPES}.lr=1", "unknown key"),
        (f"train.lr={ESCAPES}", "should be a valid number"),
        ("run.dir=caf\udce9", r"run.dir: should be text in UTF-8; got 'caf\\udce9'"),
        ("run.dir=" + "x" * 256, "run.dir: should be a path of at most 4095 bytes, each name in it at most 255"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_an_override_that_attacks_is_one_short_line(override: str, message: str) -> None:
    lines = shown("train", override).splitlines()
    assert len(lines) == 2
    assert re.search(message, lines[1])


def test_a_long_value_is_shortened_after_the_secrets_in_it_are_removed() -> None:
    for override in ("train.lr=https://h/p?token=SECRET", "https://h/p?token=SECRET"):
        assert "SECRET" not in shown("train", override + "x" * 1000 + "SECRET")


ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=60)
FILES = st.one_of(
    st.binary(max_size=200),
    ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(["train", "lr", ": ", "[", "]", "{", "}", "\n", "  ", "- ", "? ", "&a ", "*a ", "!t ", "|",
                              ">", '"', "'", "%", "1", "e", "\\U", "#", ",", "null", "\t", "---"]), max_size=30)
    .map(lambda parts: "".join(parts).encode()),
    st.dictionaries(st.sampled_from(["train", "run", "data", "x"]) | ANY_TEXT,
                    st.dictionaries(st.sampled_from(["lr", "dir", "epochs"]) | ANY_TEXT, ANY_TEXT | st.integers(),
                                    max_size=3), max_size=3)
    .map(lambda tree: yaml.safe_dump(tree).encode()),
)  # fmt: skip
OVERRIDES = st.lists(
    ANY_TEXT | st.tuples(st.sampled_from(["train.lr", "run.dir", "data.mean"]), ANY_TEXT).map("=".join), max_size=3
)


@settings(deadline=None, max_examples=150)
@given(content=FILES, overrides=OVERRIDES)
def test_any_text_is_a_configuration_or_a_short_error(
    content: bytes, overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    try:
        config.load(file, overrides)
    except ConfigError as error:
        text = str(error)
        assert all(each.isprintable() or each == "\n" for each in text)
        assert len(text) < LONGEST


def test_names_of_classes_reach_no_terminal(dataset: Path, run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "image\x1b[31m\n.png")
    lines = shown("predict", str(run), str(tmp_path / "image\x1b[31m\n.png"), code=0).splitlines()
    assert len(lines) == 1
    assert "a\\x1b[31m\\x9b2J\\u202e\\r\\nb" in lines[0]
    assert "image\\x1b[31m\\n.png" in lines[0]
    shown("train", *keys(dataset, tmp_path / "run"), code=0)
    shown("evaluate", str(run), code=0)
    shown("status", str(run), code=0)
    shown("verify", str(dataset), code=0)


@pytest.mark.parametrize(
    "values",
    [
        {"version": ESCAPES},
        {"version": ["x" * 10_000] * 100},
        {"source": ESCAPES},
        {ESCAPES: 1},
        {"k" * 100_000: 1},
        {"splits": {ESCAPES: {}}},
    ],
    ids=lambda values: repr(values)[:20],
)
def test_a_bad_manifest_is_one_short_line(values: dict[str, object], dataset: Path, tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_bytes((dataset / manifest.NAME).read_bytes())
    change_manifest(tmp_path, **values)
    assert shown("verify", str(tmp_path)).count("\n") == 1


def test_a_manifest_whose_test_split_is_trained_on_is_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_bytes((dataset / manifest.NAME).read_bytes())
    tree = json.loads((dataset / manifest.NAME).read_text())
    change_manifest(tmp_path, splits={**tree["splits"], "test": tree["splits"]["train"]})
    assert "test has shards of another split; prepare the data set again" in shown("verify", str(tmp_path))
    change_manifest(tmp_path, splits=tree["splits"], classes=[tree["classes"][0]] * len(tree["classes"]))
    assert "a class is named twice; prepare the data set again" in shown("verify", str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\x1b[31m\n"])
def test_a_manifest_that_is_not_json_is_one_short_line(text: str, tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_text(text)
    assert "manifest.json: not JSON" in shown("verify", str(tmp_path))


@pytest.mark.parametrize("name", [f"{ESCAPES}.images.npy", f"{'k' * 90}/{'k' * 5000}.x", f"0.{ESCAPES}"])
def test_names_in_a_shard_are_printable_in_its_one_message(name: str, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    path = tmp_path / "data/train/00000.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 100_000
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    tree = json.loads((tmp_path / "data" / manifest.NAME).read_text())
    entry = tree["splits"]["train"]["shards"][0]
    tree["splits"]["train"]["shards"][0] = shards.describe(path, entry["name"], entry["samples"]).model_dump()
    change_manifest(tmp_path / "data", splits=tree["splits"])
    text = shown("verify", str(tmp_path / "data"))
    assert "00000.tar: " in text
    assert text.count("\n") == 2


@pytest.mark.parametrize(
    "arguments",
    ["status NAME", "report NAME", "verify NAME", "predict NAME x.png", "export NAME --out x.pt2", "evaluate NAME",
     "wandb NAME", "train --config NAME", "prepare folder NAME --out out",
     "prepare synthetic --samples 20 --test-samples 8 --lanes 1 --out NAME"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x" * 256, "x/" * 2500, "a\x1b[31m\udcff"], ids=["long", "deep", "controls"])
def test_a_name_that_no_file_can_have_is_one_short_message(
    arguments: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = 0 if "--samples" in arguments and len(name) < 256 else 78
    shown(*(part.replace("NAME", name) for part in arguments.split()), code=code)


@pytest.mark.parametrize("argument", [f"--{ESCAPES}", "--" + "x" * 100_000, ESCAPES, "x" * 100_000])
def test_a_wrong_option_or_command_is_one_short_line(argument: str) -> None:
    (line,) = [line for line in shown(argument).splitlines() if line.startswith("Error: ")]
    assert "No such" in line


def test_a_run_trains_and_resumes_where_folders_cannot_be_synced(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_sync_folders(monkeypatch)
    assert "could be saved" not in shown("train", *keys(dataset, tmp_path / "run"), "checkpoint.every_steps=1", code=0)
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-00000001",
        "step-00000002",
    ]
    assert "Finished Training" in shown("train", *keys(dataset, tmp_path / "run"), "run.resume=must", code=0)


def test_the_name_of_a_checkpoint_reaches_no_terminal(run: Path) -> None:
    shown("predict", str(run), "x.png", "--checkpoint", ESCAPES)
    shown("evaluate", str(run), "--checkpoint", ESCAPES)
    shown("evaluate", str(run), "--checkpoint", "x" * 256)
