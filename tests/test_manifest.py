"""The manifest: what contradicts itself is refused with one clear line."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrain.cli import main
from distrain.data import manifest
from distrain.errors import DataError, ShardError

Tree = dict[str, Any]


def shard(name: str, samples: int) -> Tree:
    return {"name": name, "samples": samples, "bytes": 1000, "sha256": "0" * 64, "xxh3_128": "0" * 32}


VALID: Tree = {
    "format": "distrain-blocks",
    "version": 1,
    "source": {"kind": "synthetic", "skipped": 0},
    "classes": ["ant", "bee"],
    "image_shape": [4, 4, 3],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "splits": {
        "train": {"samples": 7, "lanes": 2, "shards": [shard("train/00000.tar", 4), shard("train/00001.tar", 3)]},
        "test": {"samples": 3, "lanes": 1, "shards": [shard("test/00000.tar", 3)]},
    },
}


def write(folder: Path, tree: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / manifest.NAME).write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return folder


def changed(change: Callable[[Tree], Any]) -> Tree:
    tree = copy.deepcopy(VALID)
    change(tree)
    return tree


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        manifest.read(folder)
    assert not isinstance(caught.value, ShardError)  # every process finds the same
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_valid_manifest_is_read_as_it_stands(tmp_path: Path) -> None:
    dataset = manifest.read(write(tmp_path, VALID))
    assert dataset.manifest.model_dump() == VALID
    assert dataset.sample_bytes == 48
    assert [entry.samples for entry in dataset.split("train").shards] == [4, 3]
    assert dataset.root == tmp_path


def test_text_and_digest_of_a_manifest_are_reproducible(tmp_path: Path) -> None:
    text = manifest.to_json(manifest.read(write(tmp_path, VALID)).manifest)
    again = manifest.read(write(tmp_path, text))
    assert manifest.to_json(again.manifest) == text
    assert again.digest == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_the_error_for_a_folder_without_a_manifest_says_how_to_make_one(folder: str, tmp_path: Path) -> None:
    message = refused(tmp_path / folder)
    assert "distrain prepare" in message
    assert "data.dir" in message
    assert ("no manifest.json" if folder == "." else "No such file") in message


@pytest.mark.parametrize("text", ["", "{", "manifest", '{"format": "distrain-blocks"', "\udcff"])
def test_what_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    message = refused(tmp_path)
    assert "manifest.json: not JSON" in message
    assert "prepare the data set again" in message


@pytest.mark.parametrize("tree", [[], 1, None, {}, {"format": "other", "version": 1}, {"version": 1}])
def test_the_manifest_of_another_program_is_refused(tree: Any, tmp_path: Path) -> None:
    message = refused(write(tmp_path, tree))
    assert "not a manifest of distrain" in message
    assert "prepare the data set again" in message


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_and_both_are_named(version: Any, tmp_path: Path) -> None:
    message = refused(write(tmp_path, VALID | {"version": version, "new_key": 1}))
    assert f"version {version!r}, this distrain reads version 1" in message
    assert "prepare the data set again" in message


@pytest.mark.parametrize(
    "name",
    [
        "../x.tar",
        "../train/00000.tar",
        "/train/00000.tar",
        "/etc/passwd",
        "train/../../00000.tar",
        "train/../00000.tar",
        "train//00000.tar",
        "train/00000.tar\n",
        "train/00000.tar/../../x",
        "train\\00000.tar",
        "00000.tar",
        "train/0.tar",
        "train/00000.zip",
        "s3://train/00000.tar",
        "pipe:echo",
        "",
    ],
)
def test_a_name_that_could_lead_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    tree = changed(lambda t: t["splits"]["test"].update(shards=[shard(name, 3)]))
    message = refused(write(tmp_path, tree))
    assert "splits.test.shards.0.name" in message
    assert "prepare the data set again" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["splits"]["train"].update(samples=8), "8 samples, but the shards have 7"),
        (lambda t: t["splits"]["train"].update(lanes=3), "3 lanes do not divide 2 shards"),
        (lambda t: t["splits"]["train"].update(lanes=0), "splits.train.lanes"),
        (lambda t: t["splits"]["train"].update(shards=[]), "splits.train.shards"),
        (
            lambda t: t["splits"]["train"].update(shards=[shard("train/00000.tar", 5), shard("train/00001.tar", 2)]),
            "differ by more than one",
        ),
        (lambda t: t["splits"]["train"]["shards"][1].update(name="train/00000.tar"), "named twice"),
        (lambda t: t["splits"]["train"]["shards"][1].update(samples=0), "splits.train.shards.1.samples"),
        (lambda t: t["splits"]["train"]["shards"][1].update(samples="3"), "splits.train.shards.1.samples"),
        (lambda t: t["splits"]["train"]["shards"][1].update(sha256="0" * 63), "splits.train.shards.1.sha256"),
        (lambda t: t["splits"]["train"]["shards"][1].pop("xxh3_128"), "splits.train.shards.1.xxh3_128"),
        (lambda t: t["splits"].update(dev=t["splits"].pop("test")), "splits.dev"),
        (lambda t: t.update(classes=[]), "classes"),
        (lambda t: t.update(image_shape=[400, 400, 3]), "a shard of train is smaller than its samples"),
        (lambda t: t.update(image_shape=[4, 4]), "image_shape"),
        (lambda t: t.update(image_shape=[4, 0, 3]), "image_shape.1"),
        (lambda t: t.update(new_key=1), "new_key"),
        (lambda t: t.pop("mean"), "mean"),
        (lambda t: t["mean"].pop(), "2 means and 3 stds for 3 channels"),
        (lambda t: t["std"].pop(), "3 means and 2 stds for 3 channels"),
        (lambda t: t["std"].__setitem__(1, 0.0), "must be finite, stds above 0"),
        (lambda t: t["std"].__setitem__(1, float("inf")), "must be finite, stds above 0"),
        (lambda t: t["mean"].__setitem__(1, float("nan")), "must be finite, stds above 0"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    change: Callable[[Tree], Any], reason: str, tmp_path: Path
) -> None:
    message = refused(write(tmp_path, changed(change)))
    assert reason in message
    assert "prepare the data set again" in message


def test_the_error_for_an_unknown_split_names_the_splits(tmp_path: Path) -> None:
    dataset = manifest.read(write(tmp_path, VALID))
    with pytest.raises(DataError, match="has no split 'val', only train, test") as caught:
        dataset.split("val")
    assert str(tmp_path) in str(caught.value)


def test_missing_and_resized_shards_are_listed(tmp_path: Path) -> None:
    dataset = manifest.read(write(tmp_path, VALID))
    (tmp_path / "train").mkdir()
    (tmp_path / "train/00000.tar").write_bytes(bytes(1000))
    (tmp_path / "train/00001.tar").write_bytes(bytes(999))
    assert list(dataset.missing(["train"])) == ["train/00001.tar: 999 bytes instead of 1000"]
    assert list(dataset.missing(["train", "test"]))[1:] == ["test/00000.tar: No such file or directory"]


@pytest.mark.parametrize("tree", [None, "{", VALID | {"format": "x"}, VALID | {"version": 2}, VALID | {"mean": "x"}])
def test_the_command_line_says_it_in_one_line_and_exits_with_78(
    tree: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if tree is not None:
        write(tmp_path, tree)
    assert main(["verify", str(tmp_path)]) == 78
    error = capsys.readouterr().err
    assert error.startswith(f"distrain: error: {tmp_path}")
    assert error.count("\n") == 1
