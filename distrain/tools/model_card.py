"""The model card of a bundle: README.md with metadata in YAML, as the Hugging Face Hub reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from distrain import address
from distrain.config import identity, is_user_code
from distrain.runs import folder
from distrain.runs.checkpoint import Checkpoint
from distrain.runs.records import Description
from distrain.text import percent, plural, printable

_SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Facts:
    """The facts about a model that its card states.

    Attributes:
        description: of the model and its images.
        setup: content of RUN/setup.json.
        keys: the configuration that determines what is trained, `section.key` → value; it has no paths.
        step: optimizer steps of the checkpoint.
        scores: of the checkpoint on test; None if it was not evaluated there.
    """

    description: Description
    setup: Mapping[str, Any]
    keys: Mapping[str, Any]
    step: int
    scores: Mapping[str, Any] | None


def read_facts(run: Path, description: Description, saved: Checkpoint) -> Facts:
    """Read in a run's folder what a card says about a checkpoint."""
    evaluations = [folder.read_result(run), *folder.read_evaluations(run, [])]
    of_checkpoint = (
        each
        for each in evaluations
        if each is not None and each["checkpoint"] == description.checkpoint and each.get("split", "test") == "test"
    )
    keys = identity(folder.configuration(run))
    return Facts(description, folder.read_setup(run), keys, saved.step, next(of_checkpoint, None))


def write(name: str, facts: Facts) -> str:
    """Return the text of a card.

    Args:
        name: of the model.
        facts: about it.
    """
    metadata = yaml.safe_dump(_metadata(name, facts), sort_keys=False, allow_unicode=True)
    sections = "\n".join(line for section in (_model, _use, _scores, _training) for line in section(facts))
    return f"---\n{metadata}---\n\n# {printable(name)}\n\n{sections}"


def _metadata(name: str, facts: Facts) -> dict[str, Any]:
    """Return what the Hub reads: https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    metadata: dict[str, Any] = {
        "library_name": "distrain",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "pytorch", "distrain"],
    }
    if facts.scores is None:
        return metadata
    data = _data_name(facts)
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {"type": data, "name": data, "split": "test"},
        "metrics": _metrics(facts.scores),
    }
    return {**metadata, "metrics": ["accuracy", "f1"], "model-index": [{"name": name, "results": [result]}]}


def _metrics(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [
        ("accuracy", "Accuracy", scores["accuracy"]),
        ("accuracy", "Top-5 accuracy", scores["top5_accuracy"]),
        ("f1", "Macro F1", scores["macro_f1"]),
        ("expected_calibration_error", "Calibration error (15 bins)", scores["calibration_error"]),
    ]
    return [{"type": kind, "name": name, "value": value} for kind, name, value in rows if value is not None]


def _data_name(facts: Facts) -> str:
    """Return the last part of the data set's path or address."""
    location = address.without_secrets(facts.setup["data"]["dir"])
    return printable(PurePosixPath(location).name) or "data"


def _model(facts: Facts) -> Iterator[str]:
    description, classes = facts.description, facts.description.classes
    height, width = description.evaluation.crop
    kind = {1: "grey", 3: "RGB"}.get(description.image_shape[2], f"{description.image_shape[2]} channels")
    named = ", ".join(map(printable, classes[:_SHOWN_CLASSES]))
    more = f", and {len(classes) - _SHOWN_CLASSES:,} more in `config.json`" if len(classes) > _SHOWN_CLASSES else ""
    name = printable(description.model.name)
    yield f"An image classifier: `{name}` with {facts.setup['model']['parameters']:,} parameters, trained by distrain."
    yield ""
    yield f"- Images: {height} × {width} pixels, {kind}; `load_model` resizes, crops and normalises them."
    yield f"- {plural(len(classes), 'class')}: {named}{more}."
    if is_user_code(description.model.name):
        yield (
            f"- **Its code is not in this folder.** `{name}` is a class of the author's: `load_model` imports it from"
            " the current folder or from Python's path, so its module must be there."
        )
    yield ""


_USE = """\
## Use

```python
import distrain

model = distrain.load_model("FOLDER")  # this folder, downloaded
print(model.predict("photo.jpg"))
```

Or as a command: `distrain predict FOLDER photo.jpg`.
"""


def _use(facts: Facts) -> Iterator[str]:
    yield _USE
    if facts.description.flip:
        yield "Each image and its mirror image are classified, and their logits averaged (`eval.flip`).\n"


def _scores(facts: Facts) -> Iterator[str]:
    yield from ("## Scores", "")
    scores = facts.scores
    if scores is None:
        yield from ("This checkpoint was not evaluated on the test split.", "")
        return
    low, high = scores["accuracy_interval"]
    yield f"On the {scores['total']:,} images of the split test; each image is counted once."
    yield from ("", "| | |", "|---|---|")
    yield f"| accuracy | {percent(scores['accuracy'])} (95 % interval {percent(low)} to {percent(high)}) |"
    if scores["top5_accuracy"] is not None:
        yield f"| top-5 accuracy | {percent(scores['top5_accuracy'])} |"
    yield f"| macro F1 | {percent(scores['macro_f1'])} |"
    yield f"| expected calibration error | {percent(scores['calibration_error'])} |"
    yield from ("", "The interval is about the number of test images alone; the spread between seeds is not in it.", "")


def _training(facts: Facts) -> Iterator[str]:
    data = facts.setup["data"]
    splits = ", ".join(f"{printable(name)} {samples:,}" for name, samples in data["splits"].items())
    versions = ", ".join(f"{name} {version}" for name, version in facts.setup["versions"].items())
    yield from ("## Training", "", "| | |", "|---|---|")
    yield f"| data set | `{_data_name(facts)}`: {splits} images |"
    yield f"| sha256 of its manifest.json | `{data['manifest']}` |"
    yield f"| optimizer steps | {facts.step:,} |"
    yield f"| seed | {facts.description.seed} |"
    yield f"| versions | {printable(versions)} |"
    yield from ("", "The configuration that determines what was trained:", "", "```yaml")
    yield yaml.safe_dump(dict(facts.keys), sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip("\n")
    yield from ("```", "")
