"""`distrain predict` and `distrain export`: predictions for image files, and the model as one file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import distrain
from benchmarks.context import load
from distrain import cli, models
from distrain.data.manifest import Dataset
from distrain.tools import loaded_model
from distrain.training.augment import normalize


def train(dataset: Dataset, run: Path, *keys: str) -> Path:
    steps = ["train.max_steps=6", "train.global_batch_size=32", "log.report=false"]
    assert cli.main(["train", f"data.dir={dataset.root}", f"run.dir={run}", *steps, *keys]) == 0
    return run


@pytest.fixture(scope="module")
def run(small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def pictures(small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first 70 test images as PNG files: more than are computed at once."""
    folder = tmp_path_factory.mktemp("pictures")
    images, _ = load(small, "test", 70)
    for number, image in enumerate(images.numpy()):
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    return sorted(folder.iterdir())


def plain(run: Path, dataset: Dataset, images: torch.Tensor, precision: str = "fp32") -> torch.Tensor:
    """Logits by a plain forward pass."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = models.build("net", "relu", 10, (3, 16, 16)).to(dtype).eval()
    model.load_state_dict(load_file(next((run / "checkpoints").glob("step-*")) / "model.safetensors"))
    mean, std = (torch.tensor(values, dtype=dtype) for values in (dataset.manifest.mean, dataset.manifest.std))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return model(normalize(images, mean, std)).to(dtype)


def test_probabilities_are_those_of_a_plain_pass(run: Path, small: Dataset, pictures: list[Path], capsys: Any) -> None:
    assert cli.main(["predict", str(run), *map(str, pictures), "--json", "--top", "10"]) == 0
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(one["file"]) for one in predictions] == pictures
    expected = plain(run, small, load(small, "test", 70)[0]).softmax(1)
    for one, row in zip(predictions, expected, strict=True):
        assert [one["classes"][name] for name in small.manifest.classes] == pytest.approx(row.tolist(), abs=1e-5)
        assert list(one["classes"].values()) == sorted(one["classes"].values(), reverse=True)


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_predictions_are_computed_as_evaluation_computes(
    precision: str, small: Dataset, pictures: list[Path], tmp_path: Path, capsys: Any
) -> None:
    run = train(small, tmp_path / "run", f"train.precision={precision}", "train.lr=0.5", "train.max_steps=40")
    images, _ = load(small, "test", 70)
    loaded = loaded_model.load(run, None)
    probabilities = loaded.probabilities(images)
    by_hand = plain(run, small, images, precision)
    assert torch.equal(probabilities, by_hand.softmax(1))
    # The same passes in fp32 give other bits, so this test would see them.
    assert not torch.equal(by_hand.float(), plain(run, small, images, "fp32"))


def test_a_precision_that_needs_a_gpu_is_replaced_aloud(
    run: Path, tmp_path: Path, pictures: list[Path], capsys: Any
) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("precision: fp32", "precision: fp16"))
    assert cli.main(["predict", str(run), str(pictures[0]), "--device", "cpu"]) == 0
    assert "train.precision=fp16 needs a GPU: fp32 is used" in capsys.readouterr().err


def test_files_of_any_kind_and_name(run: Path, tmp_path: Path, capsys: Any) -> None:
    grey = tmp_path / "a\nname.png"
    Image.fromarray(np.zeros((40, 7), np.uint8)).save(grey)
    assert cli.main(["predict", str(run), str(grey), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.count("%") == 2


def test_grey_models_take_coloured_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = "import numpy as np\nclass Grey:\n    classes = ['a', 'b']\n    image_shape = (9, 12, 1)\n"
    source += "    labels = {'train': np.arange(40) % 2, 'test': np.arange(8) % 2}\n"
    source += "    def name(self, split, index): return f'{split} {index}'\n"
    source += "    def load(self, split, index): return np.full((9, 12, 1), 100 * (index % 2), np.uint8)\n"
    (tmp_path / "grey_source.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "source", "grey_source:Grey", "--lanes", "4", "--out", "data"]) == 0
    keys = ["data.dir=data", "run.dir=run", "train.max_steps=3", "train.global_batch_size=8", "log.report=false"]
    assert cli.main(["train", *keys, "model.name=models_for_tests:Linear"]) == 0
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save("one.png")
    capsys.readouterr()
    assert cli.main(["predict", "run", "one.png"]) == 0
    assert capsys.readouterr().out.startswith("one.png  ")


def test_unreadable_files_are_named_before_the_first_prediction(
    run: Path, pictures: list[Path], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "no-image.png").write_bytes(b"no image")
    bad = [tmp_path / "no-image.png", tmp_path / "missing.png", tmp_path]
    assert cli.main(["predict", str(run), str(pictures[0]), *map(str, bad)]) == 78
    output = capsys.readouterr()
    assert output.out == ""
    assert "3 of the images cannot be read" in output.err
    assert all(str(file) in output.err for file in bad)
    assert "Traceback" not in output.err


def test_predict_decodes_as_the_data_set_of_the_run_was_decoded(run: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    Image.fromarray(np.full((16, 16), 4095, np.uint16)).save(tmp_path / "deep.png")

    def predicted() -> list[dict[str, float]]:
        paths = [str(tmp_path / f"{name}.png") for name in ("clear", "deep", "red", "white")]
        assert cli.main(["predict", str(run), *paths, "--json", "--top", "10"]) == 0
        return [json.loads(line)["classes"] for line in capsys.readouterr().out.splitlines()]

    clear, deep, red, white = predicted()
    assert clear == white != red
    assert deep != white
    setup = json.loads((run / "setup.json").read_text())
    setup["data"]["source"] |= {"background": "#ff0000", "bit_depth": 12, "max_pixels": 256}
    (run / "setup.json").write_text(json.dumps(setup))
    assert predicted() == [red, white, red, white]
    Image.new("L", (17, 16)).save(tmp_path / "red.png")
    assert cli.main(["predict", str(run), str(tmp_path / "red.png")]) == 78
    assert "red.png: has 272 pixels, more than --max-pixels 256" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["predict", "{}", "x.png"], ["export", "{}", "--out", "x.pt2"]])
def test_a_run_without_a_checkpoint_is_reported(command: list[str], run: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main([argument.format(tmp_path) for argument in command]) == 78
    assert "holds no run" in capsys.readouterr().err
    for name in ("config.yaml", "setup.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert cli.main([argument.format(tmp_path) for argument in command]) == 78
    assert "no readable checkpoint" in capsys.readouterr().err


def export_bundle(run: Path, bundle: Path, *options: str) -> Path:
    assert cli.main(["export", str(run), "--bundle", str(bundle), *options]) == 0
    return bundle


def run_file(path: Path, images: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_an_exported_file_gives_the_models_logits(suffix: str, run: Path, small: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "made" / f"model.{suffix}"
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    images, _ = load(small, "test", 9)
    floats = images.permute(0, 3, 1, 2).float() / 255
    for number in (1, 9):
        logits = run_file(out, floats[:number].contiguous())
        assert torch.allclose(logits, plain(run, small, images[:number]), atol=1e-4)
    if suffix == "pt2":
        metadata: dict[str, str] = {"classes": ""}
        torch.export.load(out, extra_files=metadata)
        assert json.loads(metadata["classes"]) == small.manifest.classes


@pytest.mark.parametrize("model", ["resnet9", "models_for_tests:Normed"])
def test_models_with_batch_norm_and_an_average_are_exported(model: str, small: Dataset, tmp_path: Path) -> None:
    run = train(small, tmp_path / "run", f"model.name={model}", "train.ema_decay=0.9", "train.max_steps=2")
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model.pt2")]) == 0
    bundle, images = export_bundle(run, tmp_path / "bundle"), load(small, "test", 9)[0]
    with torch.inference_mode():
        assert torch.equal(distrain.load_model(bundle)(images), distrain.load_model(run)(images))
    assert ("Its code is not in this folder" in (bundle / "README.md").read_text()) == (":" in model)


def test_images_and_their_mirror_images_are_evaluated_together(small: Dataset, tmp_path: Path) -> None:
    keys = ("eval.flip=true", "train.precision=bf16", "train.ema_decay=0.5", "train.lr=0.5", "train.max_steps=60")
    run = train(small, tmp_path / "run", *keys)
    images, labels = load(small, "test", 203)
    alone = plain(run, small, images, "bf16")
    expected = (alone + plain(run, small, images.flip(2), "bf16")) / 2
    result = json.loads((run / "result.json").read_text())
    assert result["correct"] == int((expected.argmax(1) == labels).sum())
    for logits, override in (
        (expected, []),
        (alone, ["eval.flip=false"]),
    ):  # batches have other sizes in fp32's last bits
        loss = float(cross_entropy(logits, labels))
        assert distrain.evaluate(run, overrides=override).loss == pytest.approx(loss, abs=1e-4)
    assert result["loss"] == pytest.approx(float(cross_entropy(expected, labels)), abs=1e-4)
    assert abs(float(cross_entropy(alone, labels)) - result["loss"]) > 1e-3
    assert torch.equal(loaded_model.load(run, None)(images), expected)
    bundle = export_bundle(run, tmp_path / "bundle")
    assert torch.equal(distrain.load_model(bundle)(images), expected)
    assert "mirror image" in (bundle / "README.md").read_text()
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model.pt2")]) == 0
    exported = run_file(tmp_path / "model.pt2", images.permute(0, 3, 1, 2).float() / 255)
    in_fp32 = (plain(run, small, images) + plain(run, small, images.flip(2))) / 2
    assert torch.allclose(exported, in_fp32, atol=1e-4)


def test_fp64_runs_are_exported_in_fp32(small: Dataset, tmp_path: Path) -> None:
    run = train(small, tmp_path / "run", "train.precision=fp64")
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model.pt2")]) == 0
    assert run_file(tmp_path / "model.pt2", torch.rand(3, 3, 16, 16)).dtype == torch.float32


def test_a_failed_export_leaves_no_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from distrain.tools import export

    there = tmp_path / "there.onnx"
    there.write_text("mine")
    for out, message in ((tmp_path / "model.zip", "should end with"), (there, "--force")):
        assert cli.main(["export", str(run), "--out", str(out)]) == 78
        assert message in capsys.readouterr().err
    assert there.read_text() == "mine"
    monkeypatch.setattr(export, "_run_torch", lambda path, images: torch.zeros(len(images), 10) + 5)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model.pt2")]) == 78
    assert "something else" in capsys.readouterr().err
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model.onnx")]) == 78
    assert "distrain[onnx]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_an_export_to_a_full_disk_is_an_error_and_leaves_no_file(
    suffix: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        assert cli.main(["export", str(run), "--out", str(disk / f"model.{suffix}")]) == 78
        error = capsys.readouterr().err
        assert f"model.{suffix}: cannot be written: No space left on device; make room there, or" in error
        assert error.count("\n") == 1
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_only_a_file_is_replaced_by_an_export(make: Callable[[Path], None], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "model.pt2"
    make(out)
    assert cli.main(["export", "no-run", "--out", str(out), "--force"]) == 78
    assert "exists already; choose another file\n" in capsys.readouterr().err
    assert not out.is_file()


def test_a_model_that_cannot_be_exported_is_reported(small: Dataset, tmp_path: Path, capsys: Any) -> None:
    run = train(small, tmp_path / "run", "model.name=models_for_tests:Branching")
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model.pt2")]) == 78
    error = capsys.readouterr().err
    assert "cannot be exported" in error
    assert "Traceback" not in error


def test_a_bundle_computes_what_its_run_computes(
    run: Path, small: Dataset, pictures: list[Path], tmp_path: Path
) -> None:
    bundle = export_bundle(run, tmp_path / "made" / "bundle")
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in bundle.iterdir()) == names
    one, other = distrain.load_model(run), distrain.load_model(bundle)
    images, _ = load(small, "test", 70)
    with torch.inference_mode():
        assert torch.equal(other(images), one(images))
    assert other.predict(pictures[0]) == one.predict(pictures[0])
    assert (other.classes, other.checkpoint, other.flip) == (one.classes, one.checkpoint, one.flip)
    again = export_bundle(run, tmp_path / "again")
    assert [(again / name).read_bytes() for name in names[1:]] == [(bundle / name).read_bytes() for name in names[1:]]


def test_the_card_of_a_bundle_has_the_scores_where_the_hub_looks_for_them(run: Path, tmp_path: Path) -> None:
    bundle = export_bundle(run, tmp_path / "my-model")
    result, card = json.loads((run / "result.json").read_text()), (bundle / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("distrain", "image-classification")
    ((entry,), name) = (metadata["model-index"][0]["results"], metadata["model-index"][0]["name"])
    assert (name, entry["dataset"]["split"]) == ("my-model", "test")
    keys = ("accuracy", "top5_accuracy", "macro_f1", "calibration_error")
    assert [metric["value"] for metric in entry["metrics"]] == [result[key] for key in keys]
    for text in ("optimizer steps | 6", "train.lr: 0.05", "data.growth: [0.7, 0.85]", "95 % interval", "sha256"):
        assert text in card
    for file in bundle.iterdir():
        assert str(tmp_path.parent).encode() not in file.read_bytes()
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard.load(bundle / "README.md").data  # as the Hub's own library reads it
    assert [each.metric_value for each in read.eval_results] == [result[key] for key in keys]


def test_a_bundle_of_a_checkpoint_that_was_not_evaluated_states_no_scores(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "checkpoint": "step-00000003"}))
    card = (export_bundle(run, tmp_path / "bundle", "--checkpoint", "last") / "README.md").read_text()
    assert "was not evaluated on the test split" in card
    assert "model-index" not in card


def damage_weights(bundle: Path) -> None:
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(content)


def edit_config(bundle: Path, **values: Any) -> None:
    path = bundle / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_evaluation(bundle: Path, **values: Any) -> None:
    evaluation = json.loads((bundle / "config.json").read_text())["evaluation"]
    edit_config(bundle, evaluation={**evaluation, **values})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "model.safetensors: damaged, or of another model (its digest differs); copy or download"),
        (lambda bundle: (bundle / "model.safetensors").unlink(), "model.safetensors: cannot be read: No such file"),
        (lambda bundle: edit_config(bundle, mean=[0.5]), "mean, std: not one number for each of 3 channels"),
        (lambda bundle: edit_config(bundle, library_name="timm"), "config.json: damaged, or written by another"),
        (
            lambda bundle: edit_evaluation(bundle, crop=[1, 1]),
            "cannot compute an image of evaluation.crop, 1×1 pixels (",
        ),
        (
            lambda bundle: edit_evaluation(bundle, crop=[2**20, 2**20]),
            "evaluation.crop: images of more than 67,108,864",
        ),
        (
            lambda bundle: edit_evaluation(bundle, resize=2**20),
            "evaluation.resize: images of more than 67,108,864 pixels",
        ),
        (
            lambda bundle: edit_config(bundle, image_shape=[2**20, 2**20, 3]),
            "image_shape: images of more than 67,108,864",
        ),
        (lambda bundle: edit_config(bundle, classes=["a"] * 10), "classes: a name is empty, or there twice"),
        (lambda bundle: edit_config(bundle, classes=[""]), "classes: a name is empty, or there twice"),
        (lambda bundle: edit_config(bundle, files={}), "model.safetensors: damaged, or of another model"),
        (lambda bundle: (bundle / "config.json").write_text("{"), "config.json: damaged"),
        (lambda bundle: (bundle / "config.json").unlink(), "holds no run"),
    ],
)
def test_a_damaged_bundle_is_refused(
    damage: Callable[[Path], None], message: str, run: Path, pictures: list[Path], tmp_path: Path, capsys: Any
) -> None:
    bundle = export_bundle(run, tmp_path / "bundle")
    damage(bundle)
    assert cli.main(["predict", str(bundle), str(pictures[0])]) == 78
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_bundle_replaces_nothing_and_is_whole_or_not_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    export_bundle(run, there)  # an empty folder
    assert cli.main(["export", str(run), "--bundle", str(there)]) == 78
    assert "exists already and is not an empty folder" in capsys.readouterr().err
    for options in ([], ["--bundle", "a", "--out", "b.pt2"], ["--bundle", "a", "--force"]):
        assert cli.main(["export", str(run), *options]) == 78
        assert "give either --out FILE" in capsys.readouterr().err
    assert cli.main(["predict", str(there), "x.png", "--checkpoint", "last"]) == 78
    assert "is a bundle, which has one model; omit" in capsys.readouterr().err

    def full(path: Path, content: bytes) -> None:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr("distrain.files.write", full)
    assert cli.main(["export", str(run), "--bundle", str(tmp_path / "full")]) == 78
    assert "full: cannot be written: No space left on device; make room" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
