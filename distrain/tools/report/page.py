"""The page of a report: what it says, as plain values, and page.html filled with them."""

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
from distrain.runs.folder import AUGMENTED, WRONG, Record, read_pictures
from distrain.runs.logs import clock
from distrain.tools.report import charts
from distrain.tools.report.charts import Chart

PAGE = "index.html"
_THUMBNAIL = 128
"""Most pixels of a picture's side on the page."""
_MOST_CONFUSIONS = 12
_MANY = 4
"""Runs that have columns of their own beside each other; of more, each has a row, and opens on demand."""


@dataclass(frozen=True)
class Shown:
    """A chart on the page: data addresses of its two forms, and its width in pixels."""

    title: str
    light: str
    dark: str
    width: int


@dataclass(frozen=True)
class Section:
    """One run's part of the page."""

    name: str
    tiles: list[tuple[str, str]]
    trust: list[tuple[bool, str]]
    notice: str | None
    classes: list[Shown] = field(default_factory=list)
    confusions: list[dict[str, Any]] = field(default_factory=list)
    by_class: list[tuple[str, str, str]] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    augmented: str | None = None
    augmentation: str = ""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    facts: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)


def write(records: Sequence[Record], out: Path) -> Path:
    """Write OUT/index.html and the charts as OUT/*.png.

    Raises:
        OSError: they cannot be written.
    """
    names = _names(records)
    curves = [_drawn(chart, out) for chart in charts.curves(records, names)]
    sections = []
    shown = tqdm(records, "runs", leave=False, disable=None if len(records) > 1 else True)
    for number, (record, name) in enumerate(zip(shown, names, strict=True)):
        own = []
        if record.result is not None and record.classes:
            own = charts.of_classes(record.result, record.classes, f"-{number + 1}" if len(records) > 1 else "")
        sections.append(_section(record, name, [_drawn(chart, out) for chart in own]))
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
        many=len(records) > _MANY,
        version=__version__,
    )
    files.replace(out / PAGE, text)  # last: a page that is there is whole
    return out / PAGE


def _names(records: Sequence[Record]) -> list[str]:
    """The folders' names; with more of the path where two are the same."""
    paths = [record.folder.resolve() for record in records]
    plain = [path.name for path in paths]
    return [name if plain.count(name) == 1 else f"{path.parent.name}/{name}" for path, name in zip(paths, plain)]  # noqa: B905


def _drawn(chart: Chart, out: Path) -> Shown:
    """A chart for the page; its PNG file is written."""
    (out / f"{chart.name}.png").write_bytes(chart.png())
    light, dark = (_address("image/svg+xml", chart.svg(theme)) for theme in ("light", "dark"))
    return Shown(chart.title, light, dark, round(chart.size[0] * 96))


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _section(record: Record, name: str, classes: list[Shown]) -> Section:
    return Section(
        name,
        _tiles(record),
        _trust(record),
        _notice(record),
        classes,
        _confusions(record),
        _by_class(record),
        _wrong(record),
        _augmented(record),
        _augmentation(record),
        _attempts(record),
        _facts(record),
    )


def _tiles(record: Record) -> list[tuple[str, str]]:
    """What people ask first."""
    result, setup = record.result, record.setup
    processes = setup["processes"]
    device = processes["device_name"] or processes["device"].upper()
    tiles = []
    if result is not None:
        tiles.append((f"{result['accuracy']:.2%}", f"of {result['total']:,} test images right"))
    else:
        scores = [line for line in record.lines if "val/accuracy" in line or "test/accuracy" in line]
        if scores:
            newest = scores[-1].get("val/accuracy", scores[-1].get("test/accuracy"))
            tiles.append((f"{newest:.2%}", f"accuracy after step {scores[-1]['step']:,}"))
    rates = [line["train/images_per_second"] for line in record.lines if "train/images_per_second" in line]
    rate = result["images_per_second"] if result is not None else (rates[-1] if rates else None)
    seconds = max((line.get("seconds", 0.0) for line in record.lines), default=0.0)
    done = max((line["step"] for line in record.lines), default=0)
    tiles.append((clock(result["seconds"] if result is not None else seconds), "wall time, all attempts"))
    if rate is not None:
        tiles.append((f"{rate:,.0f}", "images/s while training"))
    tiles.append((f"{done:,}", f"of {setup['steps']:,} steps, {setup['steps_per_epoch']:,} an epoch"))
    tiles.append((f"{processes['number']} × {device}", f"{setup['model']['name']}, {_millions(setup)} parameters"))
    tiles.append((str(len(charts.restarts(record))), "restarts"))
    return tiles


def _millions(setup: dict[str, Any]) -> str:
    number = setup["model"]["parameters"]
    return f"{number / 1e6:.1f} M" if number >= 10**6 else f"{number:,}"


def _notice(record: Record) -> str | None:
    if record.result is not None:
        return None
    done = max((line["step"] for line in record.lines), default=0)
    line = f"This run is not done: step {done:,} of {record.setup['steps']:,}."
    ended = record.ended.get("code") is not None
    return f"{line} It ended with {record.ended['code']}: {record.ended['reason']}" if ended else line


def _trust(record: Record) -> list[tuple[bool, str]]:
    """Whether the figures are what they seem."""
    result, setup = record.result, record.setup
    found = []
    dependent = setup["model"]["dependent"]
    if dependent:
        found.append(
            (False, f"What it learned depends on the number of processes: the model has {', '.join(dependent)}.")
        )
    else:
        found.append((True, "What it learned depends on data, configuration and seed alone: not on the number of"
                            " processes, not on restarts."))  # fmt: skip
    if result is not None:
        promised = setup["data"]["splits"].get("test")
        if result["total"] == promised:
            found.append((True, f"Each of the {promised:,} test images was scored exactly once."))
        else:
            found.append((False, f"{result['total']:,} test images were scored; the data set now has {promised:,}."))
        found.append((True, f"Every shard was checked against its digest; {result['dropped_per_epoch']:,} of"
                            f" {setup['data']['splits']['train']:,} training images are left out of an epoch, others"
                            " in each."))  # fmt: skip
        if result["val_accuracy"] is not None:
            found.append((True, f"The checkpoint ({result['checkpoint']}) was chosen on val, not on test."))
    again = charts.restarts(record)
    if again:
        steps = ", ".join(f"{step:,}" for step in again[:8]) + (" …" if len(again) > 8 else "")
        found.append(
            (True, f"It was interrupted, and went on after step {steps}: the result is as if it had not been.")
        )
    return found


def _confusions(record: Record) -> list[dict[str, Any]]:
    """The most frequent ones."""
    if record.result is None or not record.classes:
        return []
    matrix = np.asarray(record.result["confusion_matrix"])
    off = matrix - np.diag(np.diagonal(matrix))
    order = np.argsort(-off, axis=None, kind="stable")[:_MOST_CONFUSIONS]
    pairs = [tuple(map(int, np.unravel_index(place, off.shape))) for place in order]
    return [
        {
            "true": record.classes[row],
            "predicted": record.classes[column],
            "count": f"{off[row, column]:,}",
            "part": f"{off[row, column] / matrix[row].sum():.1%}",
        }
        for row, column in pairs
        if off[row, column]
    ]


def _by_class(record: Record) -> list[tuple[str, str, str]]:
    """Name, images, accuracy of every class, lowest first."""
    if record.result is None or not record.classes:
        return []
    matrix = np.asarray(record.result["confusion_matrix"])
    total, right = matrix.sum(1), np.diagonal(matrix)
    # Classes without test images have no accuracy: they come last.
    order = np.argsort(np.where(total > 0, right / np.maximum(total, 1), 2.0), kind="stable")
    told = [f"{right[k] / total[k]:.1%}" if total[k] else "–" for k in order]
    return [(record.classes[int(k)], f"{total[k]:,}", part) for k, part in zip(order, told, strict=True)]


def _wrong(record: Record) -> list[dict[str, str]]:
    arrays = read_pictures(record.folder / WRONG)
    if not arrays or not record.classes:
        return []
    columns = (arrays[name] for name in ("images", "ids", "labels", "predicted", "probabilities"))
    return [
        {
            "picture": _address("image/png", _png(image)),
            "true": record.classes[label],
            "predicted": record.classes[predicted],
            "probability": f"{probability:.1%}",
            "id": str(id_),
        }
        for image, id_, label, predicted, probability in zip(*columns, strict=True)
    ]


def _augmented(record: Record) -> str | None:
    """One picture: a row for each image, itself first, then what augmentation makes of it."""
    arrays = read_pictures(record.folder / AUGMENTED)
    if not arrays or not len(arrays["images"]):  # the main process's share of the first step may be empty
        return None
    images, variants = arrays["images"], arrays["variants"]
    rows = np.concatenate([images[:, None], variants], axis=1)
    number, across, height, width, channels = rows.shape
    gap = max(1, height // 16)
    sheet = np.full((number * (height + gap) - gap, (across + 1) * (width + gap) - gap, channels), 0, np.uint8)
    alpha = np.zeros(sheet.shape[:2], np.uint8)
    for row, column in np.ndindex(number, across):
        top = row * (height + gap)
        left = (column + (column > 0)) * (width + gap)  # a gap of a whole picture behind the original
        left = left if column == 0 else left - width // 2
        sheet[top : top + height, left : left + width] = rows[row, column]
        alpha[top : top + height, left : left + width] = 255
    return _address("image/png", _png(sheet, alpha, most=4096))


def _augmentation(record: Record) -> str:
    settings = record.config.augment.model_dump()
    on = [f"{name} {'on' if value is True else value}" for name, value in settings.items() if value]
    return ", ".join(on) or "none is on: every picture is trained as it is"


def _png(image: NDArray[Any], alpha: NDArray[Any] | None = None, most: int = _THUMBNAIL) -> bytes:
    """uint8 [H, W, C] as a PNG file; of other channels than 1 and 3, the first ones."""
    pixels = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, axis=-1)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if alpha is not None:
        picture.putalpha(Image.fromarray(alpha))
    picture.thumbnail((most, most))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _attempts(record: Record) -> list[dict[str, Any]]:
    return [
        {
            "attempt": attempt.get("attempt"),
            "host": attempt.get("host"),
            "start": attempt.get("start"),
            "end": attempt.get("ended") or "not released",
            "from": f"{attempt['from_step']:,}" if attempt.get("from_step") is not None else "never began",
            "processes": attempt.get("world_size") or "",
        }
        for attempt in record.attempts
    ]


def _facts(record: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """Configuration, data, machine."""
    setup = record.setup
    data, processes, machine = setup["data"], setup["processes"], setup["machine"]
    defaults = config.public(config.Config())
    tree = config.public(record.config)
    set_here: list[tuple[str, str]] = []
    unset: list[tuple[str, str]] = []
    for section, part in tree.items():
        for key, value in part.items():
            rows = unset if defaults[section][key] == value else set_here
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
        ("Configuration: what was set", set_here or [("all keys", "have their defaults")]),
        ("Data", data_rows),
        ("Machine and versions", machine_rows),
        ("Configuration: defaults", unset),
    ]


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _differences(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """What is not the same in all runs: configuration, data, machine, and what came of it."""
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
