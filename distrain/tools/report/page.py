"""The page of a report: its content as plain values, which fill the template page.html."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distrain import __version__, config, files
from distrain.errors import ConfigError
from distrain.progress import Bar
from distrain.runs import results
from distrain.runs.folder import AUGMENTED, MISCLASSIFIED, RunRecord, read_pictures
from distrain.text import clock, percent, plural
from distrain.tools import status
from distrain.tools.report import charts, checks, epochs, origin
from distrain.tools.report.charts import Matrix
from distrain.tools.report.checks import Check
from distrain.tools.report.epochs import Table

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


class ClassRow(NamedTuple):
    """A class in the table of classes; `part` is its accuracy in percent, for the bar."""

    name: str
    images: str
    precision: str
    accuracy: str
    f1: str
    part: float


class Pictures(NamedTuple):
    """Training images and augmented variants of them, as one image.

    Attributes:
        url: the image.
        has_variants: false if the variants are all like the images.
        source: what the images are before these variants: decoding may have augmented them.
        settings: the keys of augmentation that are set; empty without any.
    """

    url: str
    has_variants: bool
    source: str
    settings: str


@dataclass(frozen=True)
class Section:
    """The part of the page about one run."""

    name: str
    tiles: list[tuple[str, str]]
    about: list[tuple[str, str]]
    warnings: list[str]
    by_epoch: Table
    checks: list[Check]
    matrix: Matrix | None
    confusions: list[dict[str, Any]]
    by_class: list[ClassRow]
    misclassified: list[dict[str, str]]
    augmented: Pictures | None
    attempts: Table
    facts: list[tuple[str, list[tuple[str, str]]]]


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
    """Write OUT/index.html.

    Raises:
        OSError: it cannot be written.
        ConfigError: a file of the same name is there that is no report.
    """
    _refuse_foreign(out / PAGE)  # before anything is drawn
    names = _names(records)
    profiles = charts.profiles(records, names) if len(records) > 1 else []
    progress = Bar("runs", records[:_MAX_DETAILED], leave=False, show=len(records) > 1)
    text = _template().render(
        title=" · ".join(names) if len(names) < 4 else f"{len(names)} runs",
        frame=charts,  # the sizes of a chart
        curves=charts.curves(records, names),
        profiles=profiles,
        phases=charts.phases(profiles),
        sections=[_section(record, name) for record, name in zip(progress, names)],  # noqa: B905 - not all
        differences=_differences(records),
        names=names,
        colours=charts.colours(len(records)),
        many=len(records) > _MAX_COLUMNS,
        version=__version__,
    )
    out.mkdir(parents=True, exist_ok=True)
    files.replace(out / PAGE, text)
    return out / PAGE


def _template() -> jinja2.Template:
    """Return page.html, which escapes all names."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["parts"] = _parts
    return environment.get_template("page.html")


def _parts(text: str) -> list[str]:
    """Cut a text after separators, as in paths and names of keys: a browser may break a line there."""
    return re.split(r"(?<=[/_=-])|(?<=[.,:])(?!\d)", text)


_MARK = b'<meta name="generator" content="distrain">'
"""Text at the beginning of the page."""


def _refuse_foreign(page: Path) -> None:
    """Refuse to replace a file that is no report: a report names distrain as its generator.

    Raises:
        ConfigError: there is such a file.
    """
    if page.is_symlink() or page.exists():
        try:
            with files.open_regular(page) as file:
                head = file.read(1000)
        except OSError:
            head = b""
        if _MARK not in head:
            raise ConfigError(f"{page}: is no report of distrain; choose another --out, or move it away")


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the runs' folders, with their parents' names if two are the same."""
    paths = [record.folder.resolve() for record in records]
    plain = [path.name for path in paths]
    return [name if plain.count(name) == 1 else f"{path.parent.name}/{name}" for path, name in zip(paths, plain)]  # noqa: B905


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _section(record: RunRecord, name: str) -> Section:
    return Section(
        name=name,
        tiles=_tiles(record),
        about=origin.about(record),
        warnings=_warnings(record),
        by_epoch=epochs.table(record),
        checks=checks.of_run(record),
        matrix=charts.matrix(record.result, record.classes) if record.result and record.classes else None,
        confusions=_confusions(record),
        by_class=_by_class(record),
        misclassified=_misclassified(record),
        augmented=_augmented(record),
        attempts=origin.attempts(record),
        facts=_facts(record),
    )


_SCORES = {
    "top5_accuracy": "top-5 accuracy on test",
    "macro_f1": "macro-F1 on test: the mean over the classes",
    "calibration_error": "expected calibration error on test",
    "train_accuracy": "accuracy in training, on the images as augmented, in the last epoch",
}
"""Scores in RUN/result.json that are shown where they are known, and their meaning."""


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
        tiles += [(percent(result[key]), text) for key, text in _SCORES.items() if result.get(key) is not None]
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
    tiles += _health(record)
    tiles.append((f"{done:,}", f"of {plural(setup['steps'], 'step')}, {setup['steps_per_epoch']:,} per epoch"))
    tiles.append((f"{processes['number']} × {device}", f"{setup['model']['name']}, {_millions(setup)} parameters"))
    number = len(charts.restarts(record))
    tiles.append((f"{number:,}", "restart" if number == 1 else "restarts"))
    return tiles


def _health(record: RunRecord) -> list[tuple[str, str]]:
    """Return goodput, peaks of memory and, if there is one, the slow process."""
    tiles = []
    newest: dict[str, Any] = next((line for line in reversed(record.lines) if "train/loss" in line), {})
    spent = status.goodput_of(record)
    if spent.fraction is not None:
        pauses = f"; {clock(spent.pause_seconds)} between them" if spent.pause_seconds >= 1 else ""
        text = f"goodput: steps that counted, of {clock(spent.attempt_seconds)} of all attempts{pauses}"
        tiles.append((percent(spent.fraction), text))
    memory = (record.result or {}).get("memory_gib") or {
        name: newest.get(f"memory/{name}_gib") for name in ("host", "device")
    }
    for kind, text in (("host", "peak host memory of a process"), ("device", "peak GPU memory of a process")):
        if memory.get(kind) is not None:
            tiles.append((f"{memory[kind]:.2f} GiB", text))
    if "train/slowest_rank" in newest and "train/slowest_factor" in newest:
        slow = f"{newest['train/slowest_factor']:.2f} × as long busy as the median of the others, at the newest line"
        tiles.append((f"rank {newest['train/slowest_rank']:.0f}", f"is the slowest process: {slow}"))
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
    return [f"This run is {_progress(record)}; {status.state_of(record)[1]}"]


def _progress(record: RunRecord) -> str:
    done = max((line["step"] for line in record.lines), default=0)
    return f"not done: step {done:,} of {record.setup['steps']:,}"


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


def _by_class(record: RunRecord) -> list[ClassRow]:
    """Return the scores of the classes, lowest accuracy first."""
    if record.result is None:
        return []
    precisions = record.result.get("precision_by_class", {})
    return [
        _class_row(row, precisions.get(row.name))
        for row in results.lowest_first(results.classes_of(record.result))[:_MAX_CLASSES]
    ]


def _class_row(row: results.ClassAccuracy, precision: float | None) -> ClassRow:
    recall, f1 = row.accuracy, None
    if recall is not None and precision is not None:
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    shown = ["–" if value is None else percent(value) for value in (precision, recall, f1)]
    return ClassRow(row.name, f"{row.samples:,}", shown[0], shown[1], shown[2], round(100 * (recall or 0.0), 1))


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


def _augmented(record: RunRecord) -> Pictures | None:
    """Return a row for each training image: the original, then augmented variants; a single row if there are none."""
    arrays = read_pictures(record.folder / AUGMENTED)
    if not arrays or not len(arrays["images"]):  # the main process's local batch of the first step may be empty
        return None
    images, variants = arrays["images"], arrays["variants"]
    has_variants = not (variants == images[:, None]).all()
    rows = np.concatenate([images[:, None], variants], axis=1) if has_variants else images[None]
    augment = record.config.augment
    decoded = [name for name in ("crop_scale", "trivial_augment") if getattr(augment, name)]
    source = f"the image as it was decoded, with {' and '.join(decoded)}" if decoded else "the original image"
    return Pictures(_data_url("image/png", _sheet(rows)), has_variants, source, _augmentation(augment))


def _sheet(rows: NDArray[Any]) -> bytes:
    """Encode images uint8 [rows, columns, H, W, C] as one PNG, with gaps between them."""
    count, columns, height, width, channels = rows.shape
    gap = max(1, height // 16)
    sheet = np.full((count * (height + gap) - gap, columns * (width + gap) - gap, channels), 0, np.uint8)
    alpha = np.zeros(sheet.shape[:2], np.uint8)
    for row, column in np.ndindex(count, columns):
        top, left = row * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = rows[row, column]
        alpha[top : top + height, left : left + width] = 255
    return _png(sheet, alpha, max_size=4096)


def _augmentation(augment: config.Augment) -> str:
    settings = augment.model_dump(exclude=None if augment.crop_scale else {"crop_ratio"})
    return ", ".join(f"{name} {'on' if value is True else value}" for name, value in settings.items() if value)


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
        *known("top-5 accuracy", [(record.result or {}).get("top5_accuracy") for record in records]),
        *known("macro-F1", [(record.result or {}).get("macro_f1") for record in records]),
        *known("calibration error", [(record.result or {}).get("calibration_error") for record in records]),
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
    commits = [origin.short_commit(origin.newest_attempt(record)) for record in records]
    rows = [
        ("git commit", [commit or "not known" for commit in commits]),
        ("data set", [setup["data"]["manifest"][:12] for setup in setups]),
        ("parameters", [f"{setup['model']['parameters']:,}" for setup in setups]),
        ("processes", [str(setup["processes"]["number"]) for setup in setups]),
        ("device", [setup["processes"]["device_name"] or setup["processes"]["device"] for setup in setups]),
        ("processor", [setup["machine"]["processor"] for setup in setups]),
    ]
    return rows + [(name, [setup["versions"].get(name, "") for setup in setups]) for name in setups[0]["versions"]]
