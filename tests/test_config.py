"""The configuration: it is strict, reports all problems at once, and reads scalars as people mean them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import write_configuration
import yaml

from distrain import cli, config
from distrain.config import Config, from_tree, load
from distrain.errors import ConfigError

REPO = Path(__file__).parent.parent


def problems(file: Path | None = None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_overrides_replace_the_file_which_replaces_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: {lr: 0.3, momentum: 0.5}\n")
    train = load(file, ["train.lr=0.2", "train.lr=0.1"]).train
    assert (train.lr, train.momentum, train.weight_decay) == (0.1, 0.5, Config().train.weight_decay)


def test_scalars_mean_what_people_mean(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "train: {lr: 1e-3, global_batch_size: 1e2, clip_norm: null}\n"
        "data: {audit: yes, mean: [0.5, 1e-1, .5], dir: 007}\n"
        "wandb: {name: no}\n"
        "run:\n"
    )
    loaded = load(file, ["train.weight_decay=5e-4", "data.std=[1, 2, 3]", "model.name=a.b:C", "wandb.project=1e5"])
    assert loaded.train.lr == 0.001
    assert loaded.train.global_batch_size == 100
    assert loaded.train.clip_norm is None
    assert loaded.data.audit is True
    assert loaded.data.mean == [0.5, 0.1, 0.5]
    assert loaded.data.std == [1, 2, 3]
    assert (loaded.data.dir, loaded.wandb.name, loaded.wandb.project) == ("007", "no", "1e5")
    assert loaded.train.weight_decay == 0.0005
    assert loaded.model.name == "a.b:C"


def test_no_value_is_spelt_like_a_yaml_boolean() -> None:
    for section, name, *_ in config.every_key():
        field = type(getattr(Config(), section)).model_fields[name]
        choices = getattr(field.annotation, "__args__", ())
        spelt = {"no", "on", "off", "yes", "y", "n"} & set(choices)
        assert spelt <= {"off"}, f"{section}.{name}"
        if spelt:  # YAML 1.1 reads it as false, and tools write that back
            for text in (False, "false", "off"):
                assert getattr(getattr(config.from_tree({section: {name: text}}), section), name) == "off"


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train:\n  epoch: 3\n  lr: fast\nmodell:\n  name: net\n")
    lines = problems(file, "data.batch=4", "run.seed=-1", "train.momentum=1.5", "nonsense", "data.audit=maybe")
    assert len(lines) == 8
    text = "\n".join(lines)
    assert "train.epoch: unknown key; did you mean train.epochs?" in text
    assert "train.lr: should be a valid number" in text
    assert "'fast'" in text
    assert "modell: unknown key; did you mean model?" in text
    assert "run.seed: should be greater than or equal to 0; got -1" in text
    assert "nonsense: should be section.key=value" in text


@pytest.mark.parametrize(
    ("key", "meant"),
    [("train.global_batchsize=4", "train.global_batch_size"), ("data.lr=1", "train.lr"), ("run.sed=1", "run.seed")],
)
def test_the_nearest_key_is_suggested(key: str, meant: str) -> None:
    assert problems(None, key) == [f"{key.split('=', maxsplit=1)[0]}: unknown key; did you mean {meant}?"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lr: 1\n  lr: 2\n", "a.yaml:3: duplicate key 'lr'"),
        ("train: {lr: 1}\ntrain: {lr: 2}\n", "a.yaml:2: duplicate key 'train'"),
        ("train: [1, 2", "a.yaml:1: expected"),
        ("- 1\n", "should have sections with keys"),
        ("train: 3\n", "train: should have the keys of section Train"),
        ("? [a, b]\n: 1\n", "a key must be a word"),
        ("train: !!python/object/apply:os.system [exit]\n", "a.yaml:1: tags (!name) are not supported"),
        ("run:\n  dir: !!binary cnVucw==\n", "a.yaml:2: tags (!name) are not supported"),
        ("train.lr: 1\n", "train.lr: in a file, write train: with lr: in an indented line below it"),
    ],
)
def test_the_error_for_a_bad_file_has_the_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert message in "\n".join(problems(file))


def test_a_missing_file_is_reported() -> None:
    assert problems(Path("nowhere.yaml")) == ["nowhere.yaml: cannot be read: No such file or directory"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epochs=2", "train.max_steps=9"], "give epochs or max_steps, not both"),
        (["train.nesterov=true", "train.optimizer=adam"], "nesterov needs optimizer sgd"),
        (["train.betas=[0.9, 1.0]"], "betas must be in 0"),
        (["train.epochs=2.5"], "valid integer"),
        (["train.epochs=true"], "valid integer"),
        (["train.lr=nan"], "finite"),
        (["train.max_steps=1e300"], "train.max_steps: should be at most 1,000,000,000; got '1e300'"),
        (["timeouts.start_seconds=1e12"], "timeouts.start_seconds: should be at most 1,000,000,000"),
        (["train.lr=0"], "greater than 0"),
    ],
)
def test_values_out_of_range_are_reported(overrides: list[str], message: str) -> None:
    assert message in "\n".join(problems(None, *overrides))


def test_mappings_are_checked_by_the_same_rules() -> None:
    assert from_tree({"train": {"lr": 0.5}}).train.lr == 0.5
    with pytest.raises(ConfigError, match="whole number"):
        from_tree({"train": {"epochs": True}})
    with pytest.raises(ConfigError, match="did you mean train?"):
        from_tree({"trian": {}})


def test_the_printed_defaults_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "defaults.yaml"
    file.write_text(config.commented_yaml())
    assert load(file) == Config()
    for section, name, _, meaning, _ in config.every_key():
        assert meaning, f"{section}.{name} has no meaning"
        assert f"  # {meaning}" in file.read_text()


def test_the_keys_of_a_trial_come_between_the_file_and_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {lr: 0.3, momentum: 0.5, weight_decay: 0.1}\n")
    trials = tmp_path / "trials:1.txt"
    trials.write_text("# lr\n\ntrain.lr=0.1\ntrain.lr=0.2 'train.betas=[0.8, 0.9]' train.momentum=0.7  # the second\n")
    assert config.trial_keys(f"{trials}:0") == ["train.lr=0.1"]
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbftrain.lr=0.1\r\n")
    assert config.trial_keys(f"{tmp_path / 'windows.txt'}:0") == ["train.lr=0.1"]
    command = ["--config", str(tmp_path / "a.yaml"), "--trial", f"{trials}:1", "train.momentum=0.6"]
    for name in ("train", "doctor"):
        train = cli._of_launched((name, *command)).train
        assert (train.lr, train.betas, train.momentum, train.weight_decay) == (0.2, [0.8, 0.9], 0.6, 0.1)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("a.txt", "should be FILE:NUMBER, such as trials.txt:0 for its first line"),
        ("a.txt:-1", "should be FILE:NUMBER"),
        ("a.txt:2", "the file has 2 lines with keys, counted from 0"),
        ("b.txt:0", "the file cannot be read: No such file or directory"),
        ("c.txt:0", "the file cannot be read: No closing quotation"),
        ("d.txt:0", "the file cannot be read: 'utf-8' codec can't decode"),
    ],
)
def test_a_trial_that_cannot_be_read_is_one_message(
    location: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("train.lr=0.1\ntrain.lr=0.2\n")
    Path("c.txt").write_text("train.lr='0.1\n")
    Path("d.txt").write_bytes(b"\xff=1\n")
    assert cli.main(["train", "--trial", location]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--trial {location}: {message}" in line


def test_the_printed_reference_is_what_the_code_says() -> None:
    page = write_configuration.markdown()
    assert (REPO / "docs/configuration.md").read_text() == page, "`make docs` rewrites it"
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip(" `") for row in rows] == [f"{section}.{name}" for section, name, *_ in config.every_key()]
    for (*_, is_identity), row in zip(config.every_key(), rows, strict=True):
        assert [cell.strip() for cell in row][-1] == ("id" if is_identity else "")
        assert len(row) == 5
        assert row[2].strip()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("data.decode_device", "`cpu`, `gpu`"),
        ("train.optimizer", "`sgd`, `adam`, `adamw`, `muon`, or `package.module:name`"),
        ("train.optimizer_args", "mapping"),
        ("train.loss", "`cross_entropy`, or `package.module:name`"),
        ("train.clip_norm", "number > 0, or null"),
        ("train.micro_batch_size", "whole number ≥ 1, or null"),
        ("train.betas", "list of 2 numbers"),
        ("data.std", "list of numbers > 0, or null"),
        ("run.seed", "whole number ≥ 0, < 2^63"),
    ],
)
def test_the_reference_says_what_a_key_may_be(key: str, values: str) -> None:
    (row,) = [line for line in write_configuration.markdown().splitlines() if line.startswith(f"| `{key}` ")]
    assert row.split(" | ")[2] == values


def test_what_would_end_a_cell_or_begin_a_tag_is_escaped() -> None:
    assert write_configuration.escape("a|b <tag> 1 < 2") == "a\\|b \\<tag> 1 < 2"


def test_a_resolved_configuration_reads_back(tmp_path: Path) -> None:
    resolved = load(None, ["train.max_steps=5", "data.mean=[0.1, 0.2, 0.3]", "train.lr=1e-7"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(resolved.model_dump()))
    assert load(file) == resolved
    assert load(file).train.epochs is None


def test_the_identity_has_the_keys_that_determine_what_is_trained() -> None:
    identity = config.identity(Config())
    assert {"run.seed", "model.name", "train.lr", "train.global_batch_size", "augment.flip"} <= identity.keys()
    free = {"run.dir", "run.resume", "data.dir", "data.audit", "train.micro_batch_size", "checkpoint.every_steps"}
    assert not free & identity.keys()
    assert not any(key.startswith(("log.", "wandb.", "eval.", "checkpoint.")) for key in identity)


@pytest.mark.parametrize("file", sorted((REPO / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    assert load(file) != Config()


@pytest.mark.parametrize("arguments", [["--help"], ["config"], ["train", "--help"], ["train", "train.lrr=1"]])
def test_quick_answers_do_not_import_torch(arguments: list[str]) -> None:
    code = f"import sys; from distrain.cli import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir", "model.init"])
def test_addresses_are_refused_for_keys_that_are_paths(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: should be a path; s3:// is an address") as caught:
        config.load(None, [f"{key}=s3://key:secret@bucket/run"])
    assert "secret" not in str(caught.value)
