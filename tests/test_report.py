"""The report of real runs: its content, its escaping, and its layout in a browser. Also `distrain status`."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from PIL import Image

import distrain
from distrain import cli
from distrain.config import Augment
from distrain.runs import folder, results
from distrain.text import clock, percent
from distrain.tools.report import charts, epochs, page
from distrain.tools.report import checks as checking

NAMES = [
    '<script>document.title="x"</script>',
    "<img src=x onerror=alert(1)>",
    "$\\frac{1}{0}$ & \"quotes\" 'too' {{ 7 * 7 }}",
    "a class whose name is far too long for any chart, or table, or screen " + "x" * 80,
    "猫",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on images whose classes have malicious names; the second one was stopped and resumed."""
    top = tmp_path_factory.mktemp("report")
    draws = np.random.default_rng(0)
    for split, number in (("train", 40), ("test", 8)):
        for label, name in enumerate(NAMES):
            (top / "photos" / split / name).mkdir(parents=True)
            for image in range(number):
                pixels = draws.integers(0, 256, (16, 16, 3), np.uint8) // 2 + 25 * label
                Image.fromarray(pixels.astype(np.uint8)).save(top / "photos" / split / name / f"{image}.png")
    data = top / "data"
    assert cli.main(["prepare", "folder", f"{top}/photos", "--image-size", "16", "--lanes", "4", f"--out={data}"]) == 0
    keys = [f"data.dir={data}", "train.global_batch_size=8", "log.every_steps=5", "eval.every_steps=10"]
    keys += ["augment.flip=true", "augment.crop_padding=2", "checkpoint.every_steps=20"]
    assert cli.main(["train", *keys, f"run.dir={top}/one", "train.max_steps=40"]) == 0
    two = ["train", *keys, f"run.dir={top}/two", "train.max_steps=60", "augment.mixup=0.3", "log.report=false"]
    two.append("model.name=models_for_tests:Faulty")
    os.environ["FAULT"] = "stop:0:30"
    try:
        assert cli.main(two) == 75
    finally:
        del os.environ["FAULT"]
    assert cli.main(two) == 0
    return [top / "one", top / "two"]


def test_train_writes_a_report_unless_it_is_turned_off(runs: list[Path]) -> None:
    one, two = runs
    assert (one / "report" / "index.html").is_file()
    assert not (two / "report").exists()
    text = (one / "report" / "index.html").read_text()
    shown = re.findall(r"<figcaption>([A-Z][^<:]+)", text)
    assert {"Loss by step", "Accuracy by time", "Confusion matrix", "Time by phase"} <= set(shown)


def test_a_report_describes_the_run(runs: list[Path], tmp_path: Path) -> None:
    assert cli.main(["report", str(runs[1]), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "index.html").read_text()
    result = json.loads((runs[1] / "result.json").read_text())
    assert (
        f"<b>{percent(result['accuracy'])}</b><span>accuracy on 40 test images, after step 60 (the last)</span>" in text
    )
    assert "resumed after step" in text
    assert "mixup 0.3" in text
    misclassified = folder.read_pictures(runs[1] / folder.MISCLASSIFIED)
    assert len(misclassified["ids"]) == min(24, result["total"] - result["correct"])
    assert text.count('title="test sample') == len(misclassified["ids"])
    assert not folder.read(runs[1]).exit_record  # there was no launcher to write one
    assert charts.restarts(folder.read(runs[1])) == [folder.read(runs[1]).attempts[1]["from_step"]]


def html(run: Path, out: Path) -> str:
    """The page about a run."""
    assert cli.main(["report", str(run), "--out", str(out)]) == 0
    return (out / "index.html").read_text()


def tiles(text: str) -> dict[str, str]:
    return {meaning: value for value, meaning in re.findall("<b>([^<]*)</b><span>([^<]*)</span>", text)}


def about(text: str) -> dict[str, str]:
    rows = re.findall("<dt>([^<]*)</dt><dd>(.*?)</dd>", text)
    return {name: re.sub("<wbr>|</?code>", "", value) for name, value in rows}


def test_the_page_begins_with_the_origin_of_the_run(runs: list[Path], tmp_path: Path) -> None:
    run = copied(runs[1], tmp_path / "run")
    first, second = (run / "attempts" / f"00000{number}.json" for number in (1, 2))
    change(first, start="2026-03-01T22:00:00Z", ended="2026-03-01T23:00:00Z", git_commit="a" * 40, git_changes=False)
    change(
        second, start="2026-03-01T23:59:00Z", ended="2026-03-02T01:02:03Z", command="distrain train '<b>'",
        git_commit="b" * 40, git_changes=True, job="17",
    )  # fmt: skip
    change(run / "result.json", accuracy_interval=[0.123, 0.456])
    text = html(run, tmp_path / "page")
    assert '<th scope="col">git commit</th>' in text
    accuracy = percent(json.loads((run / "result.json").read_text())["accuracy"])
    assert about(text) == {
        "date": "2026-03-01 22:00:00 to 2026-03-02 01:02:03 UTC",
        "command": "distrain train &#39;&lt;b&gt;&#39;",
        "git commit": "b" * 40 + ", with changes that are not committed",
        "seed": "0",
        "run": str(run),
        "checkpoint": "checkpoints/step-00000060, the last",
        "accuracy": f"{accuracy}, 95 % confidence interval 12.3 % to 45.6 %",
        "job": "17",
    }
    assert text.index("<dl") < text.index("<h2>")
    assert "aaaaaaaaaaaa</td>" in text  # the other attempt, in the table of attempts
    assert "bbbbbbbbbbbb+</td>" in text
    for attempt in (first, second):
        change(attempt, git_commit=None, git_changes=None)
    assert "git commit" not in html(run, tmp_path / "page")


def test_scores_are_shown_where_they_are_known(runs: list[Path], tmp_path: Path) -> None:
    record = folder.read(runs[0])
    assert record.result is not None
    scores = ("top5_accuracy", "macro_f1", "calibration_error", "train_accuracy", "memory_gib", "precision_by_class")
    result = {key: value for key, value in record.result.items() if key not in scores}
    missing = ("train/grad_norm", "train/accuracy", "memory/host_gib")
    lines = [{k: v for k, v in line.items() if k not in missing} for line in record.lines]
    without = page.write([replace(record, result=result, lines=lines)], tmp_path / "a").read_text()
    assert not set(tiles(without)) & set(page._SCORES.values())
    for text in ("GiB</b>", 'number">precision</th>', "Gradient norm by step", "train accuracy</th>"):
        assert text not in without
    result |= {"top5_accuracy": 0.91, "macro_f1": 0.52, "calibration_error": 0.03, "train_accuracy": None}
    result |= {"memory_gib": {"host": 1.5, "device": None}}
    result |= {"precision_by_class": dict.fromkeys(result["accuracy_by_class"], 0.25)}
    more = {"train/grad_norm": 1.5, "train/accuracy": 0.25, "train/slowest_rank": 3, "train/slowest_factor": 1.43}
    lines = [line | more if "train/loss" in line else line for line in lines]
    known = page.write([replace(record, result=result, lines=lines)], tmp_path / "b").read_text()
    assert {meaning: value for meaning, value in tiles(known).items() if meaning not in tiles(without)} == {
        "top-5 accuracy on test": "91.0 %",
        "macro-F1 on test: the mean over the classes": "52.0 %",
        "expected calibration error on test": "3.0 %",
        "peak host memory of a process": "1.50 GiB",
        "is the slowest process: 1.43 × as long busy as the median of the others, at the newest line": "rank 3",
    }
    spent = record.result["attempt_seconds"]
    assert tiles(known)[f"goodput: steps that counted, of {clock(spent)} of all attempts"].endswith(" %")
    for text in ('number">precision</th>', "Gradient norm by step", "train accuracy</th>", ">25.0 %</td>"):
        assert text in known


@pytest.mark.parametrize(
    ("recall", "precision", "f1"), [(0.5, 0.25, "33.3 %"), (0.0, 0.0, "0.0 %"), (None, 0.0, "–"), (0.5, None, "–")]
)
def test_the_f1_of_a_class_is_that_of_precision_and_recall(
    recall: float | None, precision: float | None, f1: str
) -> None:
    assert page._class_row(results.ClassAccuracy("a", recall, 8), precision).f1 == f1


def test_the_table_by_epoch_has_means_of_training_and_the_last_evaluation(runs: list[Path]) -> None:
    record = folder.read(runs[0])
    lines = [
        {"step": 6, "train/loss": 4.0, "train/lr": 0.1, "seconds": 6.0},
        {"step": 8, "train/loss": 2.0, "train/lr": 0.2, "seconds": 8.0},
        {"step": 8, "val/accuracy": 0.5, "seconds": 9.0},
        {"step": 9, "train/loss": 1.0, "train/lr": 0.3, "seconds": 70.0},
    ]
    record = replace(record, lines=lines, result=None, setup={**record.setup, "steps_per_epoch": 8})
    assert epochs.table(record) == epochs.Table(
        "2 epochs; averages of training over each epoch",
        ["epoch", "step", "train loss", "val accuracy", "learning rate", "time"],
        [["1", "8", "3.5000", "50.0 %", "0.2", "0:09"], ["2", "9", "1.0000", "–", "0.3", "1:10"]],
    )
    diverged = epochs.table(replace(record, lines=[{"step": 8, "train/loss": 1.5e20}]))
    assert diverged.rows == [["1", "8", "1.5e+20", "–"]]
    many = epochs.table(replace(record, lines=[{"step": step, "val/loss": 1.0} for step in range(8, 8001, 8)]))
    assert (many.title[:30], len(many.rows), many.rows[-1][0]) == ("The last 300 of 1,000 epochs; ", 300, "1,000")


def set_augmentation(run: Path, **values: Any) -> None:
    text = (run / "config.yaml").read_text()
    tree = {**yaml.safe_load(text), "augment": Augment(**values).model_dump()}
    (run / "config.yaml").write_text(text.splitlines(keepends=True)[0] + yaml.safe_dump(tree))


def test_the_original_image_is_not_one_that_decoding_augmented(runs: list[Path], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path / "run")
    set_augmentation(run, trivial_augment=True)
    assert "Left: the image as it was decoded, with trivial_augment. Right:" in html(run, tmp_path / "page")


def test_images_that_are_not_augmented_are_shown_once(runs: list[Path], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path / "run")
    images = folder.read_pictures(run / folder.AUGMENTED)["images"]
    assert "Left: the original image." in html(run, tmp_path / "page")
    same = {"images": images, "variants": np.repeat(images[:, None], 6, 1)}
    safetensors.numpy.save_file(same, run / folder.AUGMENTED)
    assert "As in the first training step. Settings: flip on, crop_padding 2." in html(run, tmp_path / "page")
    set_augmentation(run, crop_scale=[0.25, 1.0], trivial_augment=True)
    settings = "crop_scale [0.25, 1.0], crop_ratio [0.75, 1.3333333333333333], trivial_augment on"
    assert f"As in the first training step. Settings: {settings}." in html(run, tmp_path / "page")
    set_augmentation(run)
    text = html(run, tmp_path / "page")
    assert "No augmentation: images are used unchanged." in text
    assert "Left: " not in text
    gap = max(1, images.shape[1] // 16)
    encoded = re.search('class="augmented" src="data:image/png;base64,([^"]+)"', text)
    with Image.open(io.BytesIO(base64.b64decode(encoded[1]))) as picture:
        assert picture.size == (len(images) * (images.shape[2] + gap) - gap, images.shape[1])


def checks(run: Path, out: Path) -> dict[str, list[str]]:
    """The lines under Checks, by mark."""
    assert cli.main(["report", str(run), "--out", str(out)]) == 0
    marks: dict[str, list[str]] = {"good": [], "bad": [], "note": []}
    for mark, text in re.findall(r'<li class="(\w+)">(.*?)</li>', (out / "index.html").read_text()):
        marks[mark].append(text)
    return marks


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_test(run: Path, samples: int) -> Any:
    data = json.loads((run / "setup.json").read_text())["data"]
    return {**data, "splits": {**data["splits"], "test": samples}}


def test_only_what_was_checked_is_ticked(runs: list[Path], tmp_path: Path) -> None:
    marks = checks(runs[0], tmp_path)
    correct = json.loads((runs[0] / "result.json").read_text())["correct"]
    assert marks["good"] == [
        f"The confusion matrix counts 40 test images, as many as the manifest; {correct} are correct.",
        "metrics.jsonl ends at the last step, 40, with the accuracy of the result.",
        "The files of the evaluated checkpoint, step-00000040, are unchanged: their digests match.",
    ]
    assert marks["bad"] == []
    assert any("its gradient is the same except for rounding" in text for text in marks["note"])
    assert not any("weights" in text for text in marks["good"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: change(run / "result.json", correct=41), "The accuracy is not that of the confusion matrix"),
        (lambda run: change(run / "result.json", accuracy=0.999), "The accuracy is not that of the confusion matrix"),
        (lambda run: change(run / "setup.json", data=with_test(run, 41)), "counts 40 test images, the manifest 41."),
        (lambda run: change(run / "result.json", steps=41), "metrics.jsonl ends at step 40, the result is of step 41."),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl ends at step 0"),
        (lambda run: (run / "checkpoints/step-00000040/model.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "The checkpoint of the result cannot be read"),
        (lambda run: change(run / "result.json", val_accuracy=0.9), "is not the best of the evaluations on val"),
    ],
)
def test_what_does_not_hold_is_marked(damage: Any, message: str, runs: list[Path], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path / "run")
    damage(run)
    assert any(message in check.text for check in checking.of_run(folder.read(run)) if check.mark == "bad")


def test_the_accuracy_is_shown_with_the_checkpoint_that_it_belongs_to(runs: list[Path], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path / "run")
    lines = folder.read_lines(run / "metrics.jsonl")
    evaluated = [line for line in lines if "test/accuracy" in line]
    for line in evaluated[:-1]:
        line |= {"val/accuracy": 0.9 if line["step"] == 20 else 0.5}
        del line["test/accuracy"], line["test/loss"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change(run / "result.json", checkpoint="step-00000020", val_accuracy=0.9, warnings=["<b>It collapsed.</b>", "Two"])
    good = checks(run, tmp_path / "page")["good"]
    assert "step-00000020 is the best on val, of 3 evaluations; test did not select it." in good
    text = (tmp_path / "page/index.html").read_text()
    assert "accuracy on 40 test images, after step 20 (the best on val, 90.0 %)" in text
    first, second = '<p class="warning">&lt;b&gt;It collapsed.&lt;/b&gt;</p>', '<p class="warning">Two</p>'
    assert 0 < text.index(first) < text.index(second) < text.index('<div class="tiles">')
    drawn = {chart.title: chart for chart in charts.curves([folder.read(run)], ["run"])}
    for title in ("Accuracy by step", "Loss by step"):
        (tested,) = (column.text for column in drawn[title].columns if "\ntest " in column.text)
        assert tested.startswith("step 20\n")


def test_an_accuracy_has_the_same_digits_everywhere(runs: list[Path], capsys: Any) -> None:
    result = json.loads((runs[1] / "result.json").read_text())
    shown = percent(result["accuracy"])
    assert results.accuracy_line("test", result["total"], result["accuracy"]).endswith(f"images: {shown}")
    assert cli.main(["status", str(runs[1])]) == 0
    assert f"\naccuracy {shown} on test" in capsys.readouterr().out
    record = folder.read(runs[1])
    assert page._tiles(record)[0][0] == shown
    assert ("accuracy on test", [shown, shown]) in page._differences([record, record])


def test_misclassified_images_are_those_of_the_data_set(runs: list[Path]) -> None:
    from benchmarks.context import load
    from distrain.data import manifest

    data = manifest.read(runs[0].parent / "data")
    images, labels = load(data, "test")
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    misclassified = folder.read_pictures(runs[0] / folder.MISCLASSIFIED)
    assert len(misclassified["ids"])
    columns = (misclassified[name] for name in ("images", "labels", "predicted"))
    for image, label, predicted in zip(*columns, strict=True):
        assert label_of[image.tobytes()] == label != predicted
    assert (np.diff(misclassified["probabilities"]) <= 0).all()


def test_a_run_without_a_line_has_no_empty_charts(runs: list[Path], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path / "run")
    shutil.rmtree(run / "report")
    for name in ("metrics.jsonl", "result.json"):
        (run / name).unlink()
    assert cli.main(["report", str(run)]) == 0
    assert "Nothing was logged yet" in (run / "report" / "index.html").read_text()
    assert [path.name for path in (run / "report").iterdir()] == ["index.html"]


def test_a_long_run_has_a_small_page(runs: list[Path], tmp_path: Path) -> None:
    long = copied(runs[0], tmp_path / "long")
    line = next(line for line in folder.read_lines(long / "metrics.jsonl") if "train/loss" in line)
    draws = np.random.default_rng(0).normal(2, 0.1, 10_000)
    lines = [{**line, "step": step, "seconds": step / 10, "train/loss": loss} for step, loss in enumerate(draws, 1)]
    (long / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = []
    for run in (runs[0], long):
        assert cli.main(["report", str(run), "--out", str(tmp_path / "page")]) == 0
        sizes.append((tmp_path / "page" / "index.html").stat().st_size)
    assert sizes[1] < 4 * sizes[0]


def test_each_of_many_runs_has_a_row_and_a_colour(runs: list[Path], tmp_path: Path) -> None:
    compared = [copied(runs[0], tmp_path / f"run-{index:02}") for index in range(100)]
    assert cli.main(["report", *map(str, compared), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count('<details class="run">') == 10  # of the best ones
    assert "The 10 best runs follow." in page
    assert len(page) < 12 * len((runs[0] / "report/index.html").read_text())
    shades = charts.colours(100)
    assert len(set(shades)) == 100
    assert [page.count(f"background: {shade}") for shade in shades] == [2] * 10 + [1] * 90
    assert re.findall(r"</span>(run-\d\d)</th>", page) == [f"run-{index:02}" for index in range(100)]


def test_runs_are_sorted_by_val_with_those_that_failed(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`good` and `bad` are done, `failed` is not, `new` was not evaluated, and `none` and `logs` have no run."""
    monkeypatch.chdir(tmp_path)
    for name, lr, val in (("bad", 0.1, 0.25), ("new", 0.2, None), ("good", 0.3, 0.75), ("failed", 0.4, 0.5)):
        run = copied(runs[0], Path(name))
        config = run / "config.yaml"
        config.write_text(re.sub(r"\n  lr: .*", f"\n  lr: {lr}", config.read_text()))
        if val is None:
            (run / "metrics.jsonl").write_text("")
        else:
            with (run / "metrics.jsonl").open("a") as lines:
                lines.write(json.dumps({"step": 40, "val/accuracy": val}) + "\n")
        if name in ("new", "failed"):
            (run / "result.json").unlink()
    Path("none").mkdir()
    names = ["bad", "new", "good", "failed", "none"]
    assert cli.main(["report", *names, "--out", "page"]) == 0
    output = capsys.readouterr()
    tested = percent(json.loads((runs[0] / "result.json").read_text())["accuracy"])
    lines = [re.split(r"  +", line) for line in output.out.splitlines()]
    assert lines == [
        ["run", "accuracy on val", "accuracy on test", "of checkpoint", "train.lr"],
        ["good", "75.0 %", tested, "step 40 (the last)", "0.3"],
        ["failed", "50.0 %", "not done", "not done: step 40 of 40", "0.4"],
        ["bad", "25.0 %", tested, "step 40 (the last)", "0.1"],
        ["new", "not known", "not done", "not done: step 0 of 40", "0.2"],
        ["page/index.html"],
    ]
    assert "not compared: none: holds no run" in output.err
    assert cli.main(["report", *names, "missing", "--out", "page"]) == 78


def test_several_runs_are_compared(runs: list[Path], tmp_path: Path) -> None:
    assert cli.main(["report", *map(str, runs), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text()
    rows = re.findall(r'<tr><th scope="row"[^>]*>([^<]+)</th>', text)
    assert {"accuracy on test", "train.max_steps", "augment.mixup", "run.dir"} <= set(rows)
    assert "train.lr" not in rows  # the same in both
    assert text.count('<svg class="matrix"') == 2


def test_names_are_escaped(runs: list[Path]) -> None:
    text = (runs[0] / "report" / "index.html").read_text()
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert "猫" in text


def test_the_same_run_gives_the_same_page(runs: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cli.main(["report", str(runs[0]), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a" / "index.html").read_bytes() == (tmp_path / "b" / "index.html").read_bytes()


def test_the_same_command_again_is_no_interruption(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    again = json.loads((run / "attempts" / "000001.json").read_text())
    (run / "attempts" / "000002.json").write_text(json.dumps({**again, "attempt": 2, "from_step": 40}))
    assert cli.main(["report", str(run)]) == 0
    assert "interrupted" not in (run / "report" / "index.html").read_text()


def test_a_run_that_is_training_can_be_reported(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:20])  # a line that is being written
    assert cli.main(["report", str(run)]) == 0
    assert "This run is not done: step " in (run / "report" / "index.html").read_text()
    change(run / "attempts" / "000002.json", code=78, reason="the loss is nan")
    assert re.search("not done: step .* of 60; exited with code 78: the loss is nan</p>", html(run, tmp_path / "page"))
    (run / "metrics.jsonl").write_text("")
    shutil.rmtree(run / "pictures")
    assert cli.main(["report", str(run)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "holds no run"),
        (["one", "two"], "--out"),
        (["one", "one", "--out", "x"], "given twice"),
        (["one", "--out", "one/result.json/x"], "cannot be written"),
    ],
)
def test_a_report_that_cannot_be_written_is_one_message(
    arguments: list[str], message: str, runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(runs[0].parent)
    assert cli.main(["report", *arguments]) == 78
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_status_shows_the_progress_of_a_run(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["status", str(runs[1]), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["step"], status["steps"], status["attempts"]) == ("done", 60, 60, 2)
    assert status["checkpoint"]["step"] == 60
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000060")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    retained = [line for line in lines if json.loads(line)["step"] <= 50]
    (run / "metrics.jsonl").write_text("".join(retained))
    assert cli.main(["status", str(run)]) == 0
    output = capsys.readouterr().out
    assert "not running; run the same command to resume" in output
    assert "step     50 of 60 (83 %)" in output
    assert re.search(r"images/s, [\d.e-]+ TFLOP/s, \d+:\d\d left", output)
    assert re.search(r"\nattempts 2; the newest on ", output)
    assert cli.main(["status", str(tmp_path)]) == 78


def test_a_running_run_has_an_owner(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    from distrain.runs import lease as leasing

    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    (run / "result.json").unlink()
    lease = leasing.acquire(run, 0)
    try:
        assert cli.main(["status", str(run)]) == 0
        assert "run: running" in capsys.readouterr().out
    finally:
        lease.release()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driven = webdriver.Chrome(options, webdriver.ChromeService(driver))
    driven.set_page_load_timeout(60)
    yield driven
    driven.quit()


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


LAYOUT = """
for (const one of document.querySelectorAll("details")) one.open = true;
const wide = [...document.body.querySelectorAll("*")].filter(e => !e.closest(".scroll")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200));
const images = [...document.images];
const boxes = [...document.querySelectorAll("figure, .tile, li, h2, h3, table, dd, .augmented")];
const overlap = [];
for (const a of boxes) for (const b of boxes) {
  if (a === b || a.contains(b) || b.contains(a)) continue;
  const r = a.getBoundingClientRect(), s = b.getBoundingClientRect();
  const across = r.left + 1 < s.right && s.left + 1 < r.right, down = r.top + 1 < s.bottom && s.top + 1 < r.bottom;
  if (r.width && s.width && across && down)
    overlap.push([a.outerHTML.slice(0, 80), b.outerHTML.slice(0, 80)]);
}
const column = document.querySelector(".column");
let under = "";
if (column) {
  column.scrollIntoView({block: "center"});
  const box = column.getBoundingClientRect();
  under = document.elementFromPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2).textContent;
}
const charts = document.querySelectorAll("svg[role=img]").length;
return {wide, overlap, under, charts, images: images.length,
  broken: images.filter(i => !i.complete || !i.naturalWidth).length,
  scroll: document.documentElement.scrollWidth, width: innerWidth, scripts: document.scripts.length,
  title: document.title};
"""


@pytest.mark.browser
@pytest.mark.parametrize(
    ("which", "width", "theme"),
    [
        *(("one", width, theme) for width in (1280, 400) for theme in ("light", "dark")),
        *(("both", 1280, "light"), ("both", 400, "dark"), ("many", 1280, "dark"), ("many", 400, "light")),
    ],
)
def test_a_browser_shows_the_whole_page_and_requests_nothing(
    which: str, width: int, theme: str, runs: list[Path], browser: Any, tmp_path: Path
) -> None:
    page = runs[0] / "report" / "index.html"
    if which != "one":
        compared = [*runs, *(copied(runs[index % 2], tmp_path / f"copy {index}") for index in range(8))]
        compared = compared if which == "many" else runs
        assert cli.main(["report", *map(str, compared), "--out", str(tmp_path)]) == 0
        page = tmp_path / "index.html"
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    layout = browser.execute_script(LAYOUT)
    assert layout["broken"] == 0
    assert layout["charts"] >= 8
    assert layout["images"] >= 9
    if which != "many":  # of more runs than a legend can list, a curve shows its name
        assert re.fullmatch(r"step \d+\n.*train [\d.]+\S*(\n.+)*", layout["under"])
    assert layout["wide"] == []
    assert layout["overlap"] == []
    assert layout["scroll"] <= layout["width"] == width
    assert layout["scripts"] == 0
    assert layout["title"] != "x"
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = {
        event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in requested if not url.startswith("data:")} == {page.as_uri()}
    assert page.as_uri() in requested
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[theme]


SLOW_REPORT = """
import time
import jinja2
from distrain.models.net import Net

jinja2.Environment.get_template = lambda *_: time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_it_is_drawn_leaves_the_run_done(number: signal.Signals, runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = [f"data.dir={runs[0].parent / 'data'}", f"run.dir={run}", "train.max_steps=2", "train.global_batch_size=8"]
    (tmp_path / "slow.py").write_text(SLOW_REPORT)
    with subprocess.Popen(
        [sys.executable, "-m", "distrain", "train", *keys, "model.name=slow:Net"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Run:"):  # the last line before the report
                process.send_signal(number)
                break
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert output == f"warning: no report was written: stopped; `distrain report {run}` tries again\n"
    assert cli.main(["report", str(run)]) == 0


def test_python_writes_the_report_as_the_command_does_in_any_thread(runs: list[Path], tmp_path: Path) -> None:
    tree = {
        "data": {"dir": str(runs[0].parent / "data")},
        "run": {"dir": str(tmp_path / "run")},
        "train": {"max_steps": 2, "global_batch_size": 8},
    }
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(distrain.train, tree).result(100)
    assert result.report == tmp_path / "run/report/index.html"
    assert result.report.is_file()
    assert distrain.open_run(result.run).result == result
