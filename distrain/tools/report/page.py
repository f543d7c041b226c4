"""The page of a report: its content as plain values, which fill the template page.html."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from distrain import __version__, config, files
from distrain.errors import ConfigError
from distrain.runs import results
from distrain.runs.folder import AUGMENTED, MISCLASSIFIED, RunRecord, read_pictures
from distrain.runs.logs import clock
from distrain.tools.report import charts
from distrain.tools.report.charts import Chart

PAGE = "index.html"
_THUMBNAIL = 128
"""Largest height and width of an image on the page, in pixels."""
_MAX_CONFUSIONS = 12
_MAX_COLUMNS = 4
"""Up to this number of runs, each has a column in the table of differences; more have a row each, and are collapsed."""


@dataclass(frozen=True)
class EmbeddedChart:
    """A chart on the page: data URLs for the light and the dark theme, and its width in pixels."""

    title: str
    light: str
    dark: str
    width: int


@dataclass(frozen=True)
class Section:
    """The part of the page about one run."""

    name: str
    tiles: list[tuple[str, str]]
    checks: list[tuple[bool, str]]
    warning: str | None
    classes: list[EmbeddedChart] = field(default_factory=list)
    confusions: list[dict[str, Any]] = field(default_factory=list)
    by_class: list[tuple[str, str, str]] = field(default_factory=list)
    misclassified: list[dict[str, str]] = field(default_factory=list)
    augmented: str | None = None
    augmentation: str = ""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    facts: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)


def write(records: Sequence[RunRecord], out: Path) -> Path:
    """Write OUT/index.html and the charts as OUT/*.png.

    Raises:
        OSError: they cannot be written.
        ConfigError: a file of the same name is there that is no part of a report.
    """
    names = _names(records)
    pictures: dict[str, bytes] = {}
    curves = [_embed(chart, pictures) for chart in charts.curves(records, names)]
    sections = []
    progress = tqdm(records, "runs", leave=False, disable=None if len(records) > 1 else True)
    for number, (record, name) in enumerate(zip(progress, names, strict=True)):
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
    _refuse_foreign(out, [PAGE, *pictures])
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
        _checks(record),
        _warning_text(record),
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
        tiles.append((f"{result['accuracy']:.2%}", f"accuracy on {result['total']:,} test images"))
    else:
        scores = [line for line in record.lines if "val/accuracy" in line or "test/accuracy" in line]
        if scores:
            newest = scores[-1].get("val/accuracy", scores[-1].get("test/accuracy"))
            tiles.append((f"{newest:.2%}", f"accuracy after step {scores[-1]['step']:,}"))
    rates = [line["train/images_per_second"] for line in record.lines if "train/images_per_second" in line]
    rate = result["images_per_second"] if result is not None else (rates[-1] if rates else None)
    seconds = max((line.get("seconds", 0.0) for line in record.lines), default=0.0)
    done = max((line["step"] for line in record.lines), default=0)
    tiles.append((clock(result["seconds"] if result is not None else seconds), "wall time of all attempts"))
    if rate is not None:
        tiles.append((f"{rate:,.0f}", "images/s in training"))
    tiles.append((f"{done:,}", f"of {setup['steps']:,} steps, {setup['steps_per_epoch']:,} per epoch"))
    tiles.append((f"{processes['number']} × {device}", f"{setup['model']['name']}, {_millions(setup)} parameters"))
    tiles.append((str(len(charts.restarts(record))), "restarts"))
    return tiles


def _millions(setup: dict[str, Any]) -> str:
    number = setup["model"]["parameters"]
    return f"{number / 1e6:.1f} M" if number >= 10**6 else f"{number:,}"


def _warning_text(record: RunRecord) -> str | None:
    if record.result is not None:
        return None
    done = max((line["step"] for line in record.lines), default=0)
    line = f"This run is not done: step {done:,} of {record.setup['steps']:,}."
    code = record.exit_record.get("code")
    return line if code is None else f"{line} It exited with code {code}: {record.exit_record['reason']}"


def _checks(record: RunRecord) -> list[tuple[bool, str]]:
    """Return facts that show whether the result can be trusted; False marks a warning."""
    result, setup = record.result, record.setup
    checks = []
    dependent = setup["model"]["dependent"]
    if dependent:
        layers = ", ".join(dependent)
        checks.append((False, f"The result depends on the number of processes, because the model has {layers}."))
    else:
        checks.append((True, "The result depends on data, configuration and seed only, not on the number of processes"
                             " or on restarts."))  # fmt: skip
    if result is not None:
        expected = setup["data"]["splits"].get("test")
        if result["total"] == expected:
            checks.append((True, f"Each of the {expected:,} test images was evaluated exactly once."))
        else:
            checks.append(
                (False, f"{result['total']:,} test images were evaluated; the data set now has {expected:,}.")
            )
        checks.append((True, f"Every shard was checked against its digest; {result['dropped_per_epoch']:,} of"
                             f" {setup['data']['splits']['train']:,} training images are dropped in each epoch,"
                             " different ones each time."))  # fmt: skip
        if result["val_accuracy"] is not None:
            checks.append((True, f"The checkpoint ({result['checkpoint']}) was selected on val, not on test."))
    restarts = charts.restarts(record)
    if restarts:
        steps = ", ".join(f"{step:,}" for step in restarts[:8]) + (" …" if len(restarts) > 8 else "")
        message = f"The run was interrupted and resumed after step {steps}; the result is the same as without that."
        checks.append((True, message))
    return checks


def _confusions(record: RunRecord) -> list[dict[str, Any]]:
    """Return the most frequent pairs of a true class and another, predicted class."""
    if record.result is None or not record.classes:
        return []
    matrix = np.asarray(record.result["confusion_matrix"])
    off = matrix - np.diag(np.diagonal(matrix))
    order = np.argsort(-off, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [tuple(map(int, np.unravel_index(index, off.shape))) for index in order]
    return [
        {
            "true": record.classes[row],
            "predicted": record.classes[column],
            "count": f"{off[row, column]:,}",
            "fraction": f"{off[row, column] / matrix[row].sum():.1%}",
        }
        for row, column in pairs
        if off[row, column]
    ]


def _by_class(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return name, number of test images and accuracy of each class, lowest accuracy first."""
    if record.result is None:
        return []
    return [
        (row.name, f"{row.samples:,}", "–" if row.accuracy is None else f"{row.accuracy:.1%}")
        for row in results.lowest_first(results.classes_of(record.result))
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
            "probability": f"{probability:.1%}",
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
        ("splits", ", ".join(f"{name} {number:,}" for name, number in data["splits"].items())),
        ("images", "×".join(map(str, data["image_shape"]))),
        ("classes", str(len(data["classes"]))),
        ("shards, lanes", f"{data['shards']:,}, {data['lanes']:,}"),
        ("source", source),
        ("manifest's sha256", data["manifest"]),
    ]
    machine_rows = [
        ("processes", f"{processes['number']} on {processes['nodes']} node(s)"),
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
    rows: list[tuple[str, list[str]]] = [
        ("accuracy on test", [f"{r.result['accuracy']:.2%}" if r.result else "not done" for r in records]),
        ("wall time", [clock(r.result["seconds"]) if r.result else "not done" for r in records]),
        ("images/s", [f"{r.result['images_per_second']:,.0f}" if r.result else "not done" for r in records]),
    ]
    trees = [config.public(record.config) for record in records]
    for section, part in trees[0].items():
        for key in part:
            rows.append((f"{section}.{key}", [_value(tree[section][key]) for tree in trees]))
    setups = [record.setup for record in records]
    rows += [
        ("data set", [setup["data"]["manifest"][:12] for setup in setups]),
        ("parameters", [f"{setup['model']['parameters']:,}" for setup in setups]),
        ("processes", [str(setup["processes"]["number"]) for setup in setups]),
        ("device", [setup["processes"]["device_name"] or setup["processes"]["device"] for setup in setups]),
        ("processor", [setup["machine"]["processor"] for setup in setups]),
    ]
    for name in setups[0]["versions"]:
        rows.append((name, [setup["versions"].get(name, "") for setup in setups]))
    always = {"accuracy on test", "wall time", "images/s"}
    return [(name, values) for name, values in rows if name in always or len(set(values)) > 1]
