"""The page of a report: its content as plain values, which fill the template page.html."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distrain import __version__, config, files
from distrain.errors import ConfigError
from distrain.progress import Bar
from distrain.runs import checkpoint, results
from distrain.runs.folder import AUGMENTED, MISCLASSIFIED, RunRecord, read_pictures
from distrain.text import clock, percent, plural
from distrain.tools.report import charts
from distrain.tools.report.charts import Chart

PAGE = "index.html"
_THUMBNAIL = 128
"""Largest height and width of an image on the page, in pixels."""
_MAX_CONFUSIONS = 12
_MAX_CLASSES = 1000
"""Classes in the table of accuracies: with more, those with the lowest."""
_MAX_DETAILED = 10
"""Runs with a part of the page of their own, and its charts and images: of more runs, the best ones."""
_MAX_COLUMNS = 4
"""Up to this number of runs, each has a column in the table of differences; more have a row each, and are collapsed."""


@dataclass(frozen=True)
class EmbeddedChart:
    """A chart on the page: data URLs for the light and the dark theme, and its width in pixels."""

    title: str
    light: str
    dark: str
    width: int


class Check(NamedTuple):
    """A line under Checks.

    Attributes:
        mark: good: it was checked in the files of the run, and holds; bad: it does not; note: it was not checked.
        text: what was checked.
    """

    mark: Literal["good", "bad", "note"]
    text: str


@dataclass(frozen=True)
class Section:
    """The part of the page about one run."""

    name: str
    tiles: list[tuple[str, str]]
    warnings: list[str]
    checks: list[Check]
    classes: list[EmbeddedChart] = field(default_factory=list)
    confusions: list[dict[str, Any]] = field(default_factory=list)
    by_class: list[tuple[str, str, str]] = field(default_factory=list)
    misclassified: list[dict[str, str]] = field(default_factory=list)
    augmented: str | None = None
    augmentation: str = ""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    facts: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)


def best_first(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Sort runs by their accuracy on val, or on test if no run has val; those that were not evaluated come last."""
    split = "val" if any(_accuracy(record, "val") is not None for record in records) else "test"

    def key(record: RunRecord) -> float:
        accuracy = _accuracy(record, split)
        return 1.0 if accuracy is None else -accuracy

    return sorted(records, key=key)


def _accuracy(record: RunRecord, split: str) -> float | None:
    """Return the best accuracy of a run on val, or its newest one on test; None if there is none yet."""
    scores: list[float] = [line[f"{split}/accuracy"] for line in record.lines if f"{split}/accuracy" in line]
    if not scores:
        return None
    return max(scores) if split == "val" else scores[-1]


_IN_TEXT = ("accuracy on val", "accuracy on test", "of checkpoint")


def as_text(records: Sequence[RunRecord]) -> str:
    """Return the comparison of several runs as a table: accuracies, and the keys that differ; empty for one run."""
    if len(records) < 2:
        return ""
    rows = [("run", _names(records)), *(row for row in _outcomes(records) if row[0] in _IN_TEXT)]
    rows += [(name, values) for name, values in _keys(records) if name != "run.dir" and len(set(values)) > 1]
    columns = [[name, *values] for name, values in rows]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write(records: Sequence[RunRecord], out: Path) -> Path:
    """Write OUT/index.html and the charts as OUT/*.png.

    Raises:
        OSError: they cannot be written.
        ConfigError: a file of the same name is there that is no part of a report.
    """
    _refuse_foreign(out, [PAGE])  # before anything is drawn
    names = _names(records)
    pictures: dict[str, bytes] = {}
    curves = [_embed(chart, pictures) for chart in charts.curves(records, names)]
    sections = []
    progress = Bar("runs", records[:_MAX_DETAILED], leave=False, show=len(records) > 1)
    for number, (record, name) in enumerate(zip(progress, names)):  # noqa: B905 - not all
        class_charts = []
        if record.result is not None and record.classes:
            suffix = f"-{number + 1}" if len(records) > 1 else ""
            class_charts = charts.class_charts(record.result, record.classes, suffix)
        sections.append(_section(record, name, [_embed(chart, pictures) for chart in class_charts]))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        title=" · ".join(names) if len(names) < 4 else f"{len(names)} runs",
        curves=curves,
        sections=sections,
        differences=_differences(records),
        names=names,
        colours=charts.colours(len(records)),
        many=len(records) > _MAX_COLUMNS,
        version=__version__,
    )
    _refuse_foreign(out, list(pictures))
    out.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        files.replace(out / name, content)
    files.replace(out / PAGE, text)  # last: if there is a page, it is complete
    return out / PAGE


_MARKS = (b'<meta name="generator" content="distrain">', b"Software\x00distrain")
"""Text at the beginning of the page, and of the PNG files of its charts."""


def _refuse_foreign(out: Path, names: Sequence[str]) -> None:
    """Refuse to replace a file that is no part of a report: those of a report name distrain as their generator.

    Raises:
        ConfigError: there is such a file.
    """
    for name in names:
        path = out / name
        if path.is_symlink() or path.exists():
            try:
                with files.open_regular(path) as file:
                    head = file.read(1000)
            except OSError:
                head = b""
            if not any(mark in head for mark in _MARKS):
                raise ConfigError(f"{path}: is no part of a report of distrain; choose another --out, or move it away")


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the runs' folders, with their parents' names if two are the same."""
    paths = [record.folder.resolve() for record in records]
    plain = [path.name for path in paths]
    return [name if plain.count(name) == 1 else f"{path.parent.name}/{name}" for path, name in zip(paths, plain)]  # noqa: B905


def _embed(chart: Chart, pictures: dict[str, bytes]) -> EmbeddedChart:
    """Add a chart's PNG file to `pictures`, and return the chart for the page."""
    pictures[f"{chart.name}.png"] = chart.png()
    light, dark = (_data_url("image/svg+xml", chart.svg(theme)) for theme in ("light", "dark"))
    return EmbeddedChart(chart.title, light, dark, round(chart.size[0] * 96))


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _section(record: RunRecord, name: str, classes: list[EmbeddedChart]) -> Section:
    return Section(
        name,
        _tiles(record),
        _warnings(record),
        _checks(record),
        classes,
        _confusions(record),
        _by_class(record),
        _misclassified(record),
        _augmented(record),
        _augmentation(record),
        _attempts(record),
        _facts(record),
    )


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    """Return the most important values of a run, each with its meaning."""
    result, setup = record.result, record.setup
    processes = setup["processes"]
    device = processes["device_name"] or processes["device"].upper()
    tiles = []
    if result is not None:
        tested = plural(result["total"], "test image")
        tiles.append(
            (percent(result["accuracy"]), f"accuracy on {tested}, after {results.describe_checkpoint(result)}")
        )
    else:
        scores = [
            (line[f"{split}/accuracy"], f"accuracy on {split} after step {line['step']:,}")
            for line in record.lines
            for split in ("val", "test")
            if f"{split}/accuracy" in line
        ]
        tiles += [(percent(accuracy), meaning) for accuracy, meaning in scores[-1:]]
    rate, tflops, mfu = (_rate(record, name) for name in ("images_per_second", "tflops_per_second", "mfu"))
    seconds = max((line.get("seconds", 0.0) for line in record.lines), default=0.0)
    done = max((line["step"] for line in record.lines), default=0)
    tiles.append((clock(result["seconds"] if result is not None else seconds), "wall time of all attempts"))
    if rate is not None:
        tiles.append((f"{rate:,.0f}", "images/s in training"))
    if tflops is not None:
        part = "" if mfu is None else f", {percent(mfu)} of the devices' peak (MFU)"
        tiles.append((f"{tflops:.3g}", f"TFLOP/s in training{part}"))
    tiles.append((f"{done:,}", f"of {plural(setup['steps'], 'step')}, {setup['steps_per_epoch']:,} per epoch"))
    tiles.append((f"{processes['number']} × {device}", f"{setup['model']['name']}, {_millions(setup)} parameters"))
    number = len(charts.restarts(record))
    tiles.append((f"{number:,}", "restart" if number == 1 else "restarts"))
    return tiles


def _rate(record: RunRecord, name: str) -> float | None:
    """Return a rate of training: of the whole run, or while it is not done of the newest line."""
    if record.result is not None:
        return record.result.get(name)
    return next((line[f"train/{name}"] for line in reversed(record.lines) if f"train/{name}" in line), None)


def _millions(setup: dict[str, Any]) -> str:
    number = setup["model"]["parameters"]
    return f"{number / 1e6:.1f} M" if number >= 10**6 else f"{number:,}"


def _warnings(record: RunRecord) -> list[str]:
    """Return what a reader must know before the figures."""
    if record.result is not None:
        return list(record.result.get("warnings", []))
    code = record.exit_record.get("code")
    end = "" if code is None else f" It exited with code {code}: {record.exit_record['reason']}"
    return [f"This run is {_progress(record)}.{end}"]


def _progress(record: RunRecord) -> str:
    done = max((line["step"] for line in record.lines), default=0)
    return f"not done: step {done:,} of {record.setup['steps']:,}"


def _checks(record: RunRecord) -> list[Check]:
    """Return what was checked in the files of the run, and what a reader should know beside it."""
    result, setup = record.result, record.setup
    checks = []
    if result is not None:
        checks += [_check_counts(result, setup), _check_metrics(record, result), _check_checkpoint(record, result)]
        if result["val_accuracy"] is not None:
            checks.append(_check_selection(record, result))
        if result.get("stopped_early"):
            checks.append(Check("note", f"The run was stopped {result['stopped_early']} (train.stop_after)."))
        if result["dropped_per_epoch"]:
            dropped = f"{result['dropped_per_epoch']:,} of {setup['data']['splits']['train']:,} training images"
            checks.append(Check("note", f"Each epoch drops {dropped}, different ones each time."))
    restarts = charts.restarts(record)
    if restarts:
        steps = ", ".join(f"{step:,}" for step in restarts[:8]) + (" …" if len(restarts) > 8 else "")
        checks.append(Check("note", f"The run was interrupted and resumed after step {steps}. {_effect(record)}"))
    dependent = setup["model"]["dependent"]
    if dependent:
        layers = ", ".join(dependent)
        text = f"The model has {layers}: on another number of processes, such layers compute something else."
        checks.append(Check("bad", text))
    else:
        checks.append(Check("note", _OTHER_NUMBER))
    return checks


_OTHER_NUMBER = (
    "On another number of processes, each step trains the same samples, and its gradient is the same except for"
    " rounding. Training amplifies rounding: weights and accuracy differ a little, as between two seeds."
)


def _effect(record: RunRecord) -> str:
    sizes = {attempt.get("world_size") for attempt in record.attempts if attempt.get("from_step") is not None}
    if len(sizes) > 1:
        return "The number of processes changed: the samples are the same, the weights differ as described below."
    return "On CPUs, an interruption changes no bit of the result if the number of processes stays the same."


def _check_counts(result: dict[str, Any], setup: dict[str, Any]) -> Check:
    """Compare the counts of the classes with the manifest's number of test images and with the accuracy."""
    confusion = results.Confusion.of_result(result)
    total, correct, expected = confusion.total, confusion.correct, setup["data"]["splits"].get("test", 0)
    if total != expected:
        return Check("bad", f"The confusion matrix counts {total:,} test images, the manifest {expected:,}.")
    counts = (result["total"], result["correct"])
    if counts != (total, correct) or abs(result["accuracy"] - correct / max(total, 1)) > 1e-9:
        return Check("bad", f"The accuracy is not that of the confusion matrix, {correct:,} of {total:,}.")
    images = plural(total, "test image")
    return Check("good", f"The confusion matrix counts {images}, as many as the manifest; {correct:,} are correct.")


def _check_metrics(record: RunRecord, result: dict[str, Any]) -> Check:
    """Compare the last lines of the metrics with the result."""
    last = max((line["step"] for line in record.lines), default=0)
    if last != result["steps"]:
        return Check("bad", f"metrics.jsonl ends at step {last:,}, the result is of step {result['steps']:,}.")
    tested = [line["test/accuracy"] for line in record.lines if "test/accuracy" in line]
    if not tested or tested[-1] != result["accuracy"]:
        return Check("bad", "The last test accuracy in metrics.jsonl is not that of the result.")
    return Check("good", f"metrics.jsonl ends at the last step, {last:,}, with the accuracy of the result.")


def _check_checkpoint(record: RunRecord, result: dict[str, Any]) -> Check:
    """Compare the files of the result's checkpoint with their digests."""
    name = result["checkpoint"]
    problem = checkpoint.problem(record.folder / checkpoint.FOLDER / name)
    if problem is not None:
        return Check("bad", f"The checkpoint of the result cannot be read: {problem}")
    return Check("good", f"The files of the evaluated checkpoint, {name}, are unchanged: their digests match.")


def _check_selection(record: RunRecord, result: dict[str, Any]) -> Check:
    """Compare the selected checkpoint with all evaluations on val."""
    scores = [(line["val/accuracy"], line["step"]) for line in record.lines if "val/accuracy" in line]
    best = max((accuracy for accuracy, _ in scores), default=None)
    step = results.step_of(result)
    if best is None or (best, step) not in scores or best != result["val_accuracy"]:
        return Check("bad", f"{result['checkpoint']} is not the best of the evaluations on val in metrics.jsonl.")
    number = plural(len(scores), "evaluation")
    return Check("good", f"{result['checkpoint']} is the best on val, of {number}; test did not select it.")


def _confusions(record: RunRecord) -> list[dict[str, Any]]:
    """Return the most frequent pairs of a true class and another, predicted class."""
    if record.result is None or not record.classes:
        return []
    confusion = results.Confusion.of_result(record.result)
    samples = confusion.samples_by_class()
    return [
        {
            "true": record.classes[true],
            "predicted": record.classes[predicted],
            "count": f"{count:,}",
            "fraction": percent(count / samples[true]),
        }
        for true, predicted, count in confusion.most_frequent_mistakes(_MAX_CONFUSIONS)
    ]


def _by_class(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return name, number of test images and accuracy of the classes, lowest accuracy first."""
    if record.result is None:
        return []
    return [
        (row.name, f"{row.samples:,}", "–" if row.accuracy is None else percent(row.accuracy))
        for row in results.lowest_first(results.classes_of(record.result))[:_MAX_CLASSES]
    ]


def _misclassified(record: RunRecord) -> list[dict[str, str]]:
    arrays = read_pictures(record.folder / MISCLASSIFIED, len(record.classes))
    if not arrays or not record.classes:
        return []
    columns = (arrays[name] for name in ("images", "ids", "labels", "predicted", "probabilities"))
    return [
        {
            "picture": _data_url("image/png", _png(image)),
            "true": record.classes[label],
            "predicted": record.classes[predicted],
            "probability": percent(probability),
            "id": str(id_),
        }
        for image, id_, label, predicted, probability in zip(*columns, strict=True)
    ]


def _augmented(record: RunRecord) -> str | None:
    """Return one image with a row for each training image: the original, then augmented variants."""
    arrays = read_pictures(record.folder / AUGMENTED)
    if not arrays or not len(arrays["images"]):  # the main process's local batch of the first step may be empty
        return None
    images, variants = arrays["images"], arrays["variants"]
    rows = np.concatenate([images[:, None], variants], axis=1)
    count, columns, height, width, channels = rows.shape
    gap = max(1, height // 16)
    sheet = np.full((count * (height + gap) - gap, (columns + 1) * (width + gap) - gap, channels), 0, np.uint8)
    alpha = np.zeros(sheet.shape[:2], np.uint8)
    for row, column in np.ndindex(count, columns):
        top = row * (height + gap)
        left = (column + (column > 0)) * (width + gap)  # a gap as wide as an image after the original
        left = left if column == 0 else left - width // 2
        sheet[top : top + height, left : left + width] = rows[row, column]
        alpha[top : top + height, left : left + width] = 255
    return _data_url("image/png", _png(sheet, alpha, max_size=4096))


def _augmentation(record: RunRecord) -> str:
    settings = record.config.augment.model_dump()
    enabled = [f"{name} {'on' if value is True else value}" for name, value in settings.items() if value]
    return ", ".join(enabled) or "no augmentation: images are used unchanged"


def _png(image: NDArray[Any], alpha: NDArray[Any] | None = None, max_size: int = _THUMBNAIL) -> bytes:
    """Encode an image uint8 [H, W, C] as PNG: its first channel as grey, or its first three channels as colours."""
    pixels = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, axis=-1)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if alpha is not None:
        picture.putalpha(Image.fromarray(alpha))
    picture.thumbnail((max_size, max_size))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _attempts(record: RunRecord) -> list[dict[str, Any]]:
    return [
        {
            "attempt": attempt.get("attempt"),
            "host": attempt.get("host"),
            "start": attempt.get("start"),
            "end": attempt.get("ended") or "not released",
            "from": f"{attempt['from_step']:,}" if attempt.get("from_step") is not None else "training did not start",
            "processes": attempt.get("world_size") or "",
        }
        for attempt in record.attempts
    ]


def _facts(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return tables about configuration, data and machine, each with a heading."""
    setup = record.setup
    data, processes, machine = setup["data"], setup["processes"], setup["machine"]
    defaults = config.public(config.Config())
    tree = config.public(record.config)
    changed: list[tuple[str, str]] = []
    default_rows: list[tuple[str, str]] = []
    for section, part in tree.items():
        for key, value in part.items():
            rows = default_rows if defaults[section][key] == value else changed
            rows.append((f"{section}.{key}", _value(value)))
    source = ", ".join(f"{key}: {_value(value)}" for key, value in data["source"].items())
    data_rows = [
        ("folder", data["dir"]),
        *([("tar files", data["tars"])] if data.get("tars", data["dir"]) != data["dir"] else []),
        ("splits", ", ".join(f"{name} {number:,}" for name, number in data["splits"].items())),
        ("images", "×".join(map(str, data["image_shape"]))),
        ("classes", str(len(data["classes"]))),
        ("shards, lanes", f"{data['shards']:,}, {data['lanes']:,}"),
        ("source", source),
        ("manifest's sha256", data["manifest"]),
    ]
    machine_rows = [
        ("processes", f"{processes['number']:,} on {plural(processes['nodes'], 'node')}"),
        ("device", processes["device_name"] or processes["device"]),
        ("processor", machine["processor"]),
        ("cores", str(machine["cores"])),
        ("memory", f"{machine['memory_gib']} GiB"),
        ("system", machine["system"]),
        *((name, text) for name, text in setup["versions"].items()),
    ]
    return [
        ("Configuration: changed values", changed or [("all keys", "default")]),
        ("Data", data_rows),
        ("Machine and versions", machine_rows),
        ("Configuration: default values", default_rows),
    ]


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the results of several runs, and all values of configuration, data and machine that differ."""
    if len(records) < 2:
        return []
    rest = [*_keys(records), *_surroundings(records)]
    return _outcomes(records) + [(name, values) for name, values in rest if len(set(values)) > 1]


def _outcomes(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return what came of several runs: a name, and a value of each run."""

    def format_all(show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [show(record.result) if record.result else "not done" for record in records]

    def known(name: str, values: Sequence[float | None]) -> list[tuple[str, list[str]]]:
        texts = ["not known" if value is None else percent(value) for value in values]
        return [(name, texts)] if set(values) != {None} else []

    return [
        *known("accuracy on val", [_accuracy(record, "val") for record in records]),
        ("accuracy on test", format_all(lambda result: percent(result["accuracy"]))),
        ("of checkpoint", [results.describe_checkpoint(r.result) if r.result else _progress(r) for r in records]),
        ("wall time", format_all(lambda result: clock(result["seconds"]))),
        ("images/s", format_all(lambda result: f"{result['images_per_second']:,.0f}")),
        *known("MFU", [_rate(record, "mfu") for record in records]),
    ]


def _keys(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return all keys of the configuration, with the value of each run."""
    trees = [config.public(record.config) for record in records]
    return [
        (f"{section}.{key}", [_value(tree[section][key]) for tree in trees])
        for section, part in trees[0].items()
        for key in part
    ]


def _surroundings(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return data, processes, machine and versions of several runs."""
    setups = [record.setup for record in records]
    rows = [
        ("data set", [setup["data"]["manifest"][:12] for setup in setups]),
        ("parameters", [f"{setup['model']['parameters']:,}" for setup in setups]),
        ("processes", [str(setup["processes"]["number"]) for setup in setups]),
        ("device", [setup["processes"]["device_name"] or setup["processes"]["device"] for setup in setups]),
        ("processor", [setup["machine"]["processor"] for setup in setups]),
    ]
    return rows + [(name, [setup["versions"].get(name, "") for setup in setups]) for name in setups[0]["versions"]]
