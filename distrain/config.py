"""Every key of a run: its meaning, its default, and whether it is part of the run's identity.

    defaults  <  YAML file  <  section.key=value

All values pass through the same door (`load`), which reports every problem at once. Scalars are read as text and
given their type by the key they belong to, so `1e-3` is a number wherever a number is wanted.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from distrain import address
from distrain.errors import ConfigError


def _key(default: Any, meaning: str, *, identity: bool = False, **limits: Any) -> Any:
    """A configuration key. `identity`: it changes what is trained, so a run cannot be resumed with another value."""
    return Field(default, description=meaning, json_schema_extra={"identity": identity}, **limits)


def _whole(value: Any) -> Any:
    """Accept `1e4` where a whole number is wanted; refuse true and false."""
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    if isinstance(value, str):
        try:
            return int(value)  # not through float, which loses digits
        except ValueError:
            pass
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


def _off(value: Any) -> Any:
    """Accept what other YAML tools make of `off`."""
    return "off" if value is False or value in ("false", "False") else value


def _local(value: Any) -> Any:
    """Refuse an address where a folder or file is meant: a folder of that name would be made, silently."""
    kind = address.scheme(value) if isinstance(value, str) else None
    if kind is not None:
        raise ValueError(f"should be a path here; {kind}:// is an address")
    return value


LocalPath = Annotated[str, BeforeValidator(_local)]
Whole = Annotated[int, BeforeValidator(_whole)]
PerChannel = Annotated[list[float], Field(min_length=1)]
PositivePerChannel = Annotated[list[PositiveFloat], Field(min_length=1)]


class Section(BaseModel):
    """A group of keys; unknown ones are errors, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Section):
    """The folder of the run, and its seed."""

    dir: LocalPath = _key(
        "runs/default",
        "folder of the run: checkpoints, metrics, result; shared by all processes",
        min_length=1,
    )
    seed: Whole = _key(0, "draws the weights, the order and the augmentation", identity=True, ge=0, lt=2**63)
    resume: Literal["auto", "must", "never"] = _key(
        "auto",
        "auto: go on from the folder's newest checkpoint, start where it holds none; must: only go on; never: only"
        " start, a folder that holds a run is an error",
    )
    wait_seconds: Whole = _key(60, "longest wait for another job that is writing in the folder", ge=0)
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "auto: GPUs where there are any, else the CPU")
    cpu_threads: Whole = _key(1, "threads per process on the CPU (they change the last bits)", ge=1, le=1024)


class Data(Section):
    """The data set, as `distrain prepare` wrote it."""

    dir: str = _key(
        "data/synthetic",
        "folder with manifest.json, or its address: file://, http://, https://, s3://, gs://, hf://",
        min_length=1,
    )
    cache_dir: LocalPath | None = _key(
        None,
        "folder that keeps the shards of a remote data set; null: distrain in $XDG_CACHE_HOME or ~/.cache",
        min_length=1,
    )
    cache_gib: float = _key(50.0, "most GiB in that folder; 0: shards are fetched at every use", ge=0, le=2**30)
    fetch_retries: Whole = _key(5, "times that a failed fetch is tried again, after waits that grow", ge=0, le=100)
    fetch_timeout_seconds: float = _key(
        60.0, "longest time for one try of a fetch; raise it for a slow line", gt=0, le=86400
    )
    mean: PerChannel | None = _key(
        None, "subtracted, per channel of images in 0 … 1; null: the train split's", identity=True
    )
    std: PositivePerChannel | None = _key(None, "divided by, per channel; null: the train split's", identity=True)
    audit: bool = _key(False, "every process writes the ids it trained on to RUN/audit/")
    cache: Annotated[Literal["auto", "off", "ram", "device"], BeforeValidator(_off)] = _key(
        "auto",
        "where train lies after its first epoch, in every process: off: it is read anew; ram; device: on the GPU;"
        " auto: on the GPU or in ram where a quarter of what is free holds it",
    )
    read_ahead: Whole = _key(1, "rounds of shards read before they are needed; memory grows with it", ge=1, le=16)


class Model(Section):
    """What is trained."""

    name: str = _key(
        "net",
        "net, small, resnet9, a classifier of torchvision (resnet18 …), or package.module:Class (called with"
        " num_classes=…, image_shape=(C, H, W))",
        identity=True,
    )
    init: LocalPath | None = _key(
        None,
        "file of weights to start from, safetensors or a state dict of torch.save; a head of another size starts anew",
        min_length=1,
    )
    activation: Literal["relu", "sigmoid", "tanh"] = _key("relu", "activation of net", identity=True)


class Augment(Section):
    """Changes to training images, drawn anew for every sample and step."""

    flip: bool = _key(False, "mirror half of the images, left to right", identity=True)
    crop_padding: Whole = _key(
        0, "shift by up to so many pixels in both directions, edges reflected", identity=True, ge=0
    )
    cutout: Whole = _key(0, "side in pixels of a square that is blanked to the mean; 0: none", identity=True, ge=0)
    mixup: float = _key(
        0.0,
        "alpha of mixup: a step's images and labels are mixed with weights from Beta(alpha, alpha); 0: none",
        identity=True,
        ge=0,
        le=1,
    )


class Train(Section):
    """Steps, batch, optimizer, learning rate, precision."""

    epochs: Whole | None = _key(
        None, "length of the run in epochs; 10 where max_steps is not given either", identity=True, ge=1
    )
    max_steps: Whole | None = _key(None, "length of the run in steps, instead of epochs", identity=True, ge=1)
    global_batch_size: Whole = _key(128, "samples per step, over all processes together", identity=True, ge=1)
    micro_batch_size: Whole | None = _key(
        None, "most samples a device computes at once; null: its whole share of a step", ge=1
    )
    optimizer: Literal["sgd", "adam", "adamw"] = _key("sgd", "torch.optim's SGD, Adam or AdamW", identity=True)
    lr: float = _key(0.05, "learning rate; the peak, where the schedule has one", identity=True, gt=0)
    schedule: Literal["constant", "one_cycle", "cosine"] = _key(
        "one_cycle",
        "one_cycle: linear up, linear down to 0; cosine: linear up, cosine down to 0",
        identity=True,
    )
    warmup_fraction: float = _key(0.25, "part of the steps in which the schedule goes up", identity=True, ge=0, lt=1)
    momentum: float = _key(0.9, "of SGD", identity=True, ge=0, lt=1)
    nesterov: bool = _key(False, "Nesterov's momentum, for SGD", identity=True)
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = _key(
        [0.9, 0.999], "of Adam and AdamW", identity=True
    )
    weight_decay: float = _key(0.0, "L2 (SGD, Adam) or decoupled (AdamW)", identity=True, ge=0)
    clip_norm: float | None = _key(None, "largest norm of the gradient; null: no clipping", identity=True, gt=0)
    label_smoothing: float = _key(0.0, "part of each label spread over all classes", identity=True, ge=0, lt=1)
    ema_decay: float | None = _key(
        None,
        "decay a step of an average of the weights, which is then what is evaluated and saved as the model; null: none",
        identity=True,
        gt=0,
        lt=1,
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = _key(
        "fp32",
        "tf32: fp32 with products in TF32; bf16 and fp16: mixed; tf32 and fp16 need a GPU; fp64 for proofs",
        identity=True,
    )
    deterministic: bool = _key(
        False, "on GPUs: only operations that give the same bits each time (CPUs always do); slower"
    )
    compile: Annotated[Literal["off", "default", "reduce-overhead"], BeforeValidator(_off)] = _key(
        "off", "torch.compile of the model, in that mode; reduce-overhead: with CUDA graphs. Needs a C++ compiler"
    )

    @model_validator(mode="before")
    @classmethod
    def _length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is None and values.get("max_steps") is None:
            return {**values, "epochs": 10}
        return values

    @model_validator(mode="after")
    def _agree(self) -> Train:
        problems = []
        if self.epochs is not None and self.max_steps is not None:
            problems.append("give epochs or max_steps, not both; train.epochs=null takes the file's away")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            problems.append("nesterov needs optimizer sgd and a momentum above 0")
        if any(not 0 <= beta < 1 for beta in self.betas):
            problems.append("betas lie in 0 ≤ beta < 1")
        if problems:
            raise ValueError("\n  train: ".join(problems))
        return self


class Eval(Section):
    """Evaluation during the run: on val where the data set has one, else on test."""

    every_steps: Whole | None = _key(None, "steps between evaluations; null: once an epoch; 0: only at the end", ge=0)
    batch_size: Whole = _key(512, "most samples evaluated at once", ge=1)


class Checkpoint(Section):
    """What is kept, and how often."""

    every_steps: Whole = _key(1000, "steps between checkpoints; 0: none by steps", ge=0)
    every_minutes: float = _key(10.0, "minutes between checkpoints; 0: none by the clock", ge=0)
    keep: Whole = _key(2, "newest checkpoints kept, beside the best one and the last one of a stop; 0: all", ge=0)
    keep_every: Whole = _key(0, "checkpoints of multiples of so many steps are kept as well; 0: none", ge=0)


class Timeouts(Section):
    """Longest time without progress; then all stacks are written to RUN/stacks/ and the run ends with 75."""

    start_seconds: Whole = _key(
        1800, "until all processes have met; then until training begins; then an attempt's first step", ge=1
    )
    step_seconds: Whole = _key(600, "a step, with the wait for its data", ge=1)
    eval_seconds: Whole = _key(600, "a batch of an evaluation, with the wait for its data", ge=1)
    save_seconds: Whole = _key(1800, "a checkpoint", ge=1)


class Launch(Section):
    """What `distrain launch` does when a run ends."""

    grace_seconds: Whole = _key(120, "longest wait, after a stop request, for processes to save and leave", ge=1)
    max_attempts_without_progress: Whole = _key(
        3,
        "so many attempts in a row without a newer checkpoint: exit 1 in place of 75, so nobody starts it again",
        ge=1,
    )


class Log(Section):
    """Progress and metrics.jsonl."""

    every_steps: Whole = _key(50, "steps between lines of metrics.jsonl; a log shows one in five seconds", ge=1)
    level: Literal["debug", "info", "warning", "error"] = _key(
        "info", "lowest level of the messages that commands show on stderr"
    )
    report: bool = _key(True, "`distrain train` writes RUN/report/ when it is done: a page with charts and pictures")
    tensorboard: bool = _key(
        False, "copy them, the configuration and pictures to RUN/tensorboard; needs distrain[tensorboard]"
    )


class Profile(Section):
    """A trace by torch's profiler; what part of the time waits, copies and computes is always measured."""

    steps: Whole = _key(
        0, "steps of each attempt that are traced, after its tenth, to RUN/trace/; 0: none", ge=0, le=1000
    )


class Wandb(Section):
    """Weights & Biases, from the main process; `distrain wandb RUN` sends a run afterwards."""

    mode: Literal["disabled", "offline", "online"] = _key("disabled", "online needs WANDB_API_KEY or `wandb login`")
    project: str = _key("distrain", "project that the run is filed under")
    name: str | None = _key(None, "name shown; null: the run's folder")
    group: str | None = _key(None, "group of runs; null: none, or with nodes=all the run's id", min_length=1)
    job_type: str = _key("train", "kind of run within its group", min_length=1)
    nodes: Literal["first", "all"] = _key(
        "first",
        "all: the first process of every other node opens a run beside the main one, in its group and of job type node,"
        " for that node's system metrics",
    )


class Config(Section):
    """The whole configuration of a run."""

    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    augment: Augment = Augment()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    timeouts: Timeouts = Timeouts()
    launch: Launch = Launch()
    log: Log = Log()
    profile: Profile = Profile()
    wandb: Wandb = Wandb()


def load(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file and `section.key=value` overrides, over the defaults.

    Raises:
        ConfigError: naming every problem: unreadable file, duplicate or unknown key, wrong type, value out of range.
    """
    problems: list[str] = []
    tree = _read_yaml(Path(file), problems) if file is not None else {}
    for override in overrides:
        _override(tree, override, problems)
    return from_tree(tree, problems)


def from_tree(tree: Mapping[str, Any], problems: Sequence[str] = ()) -> Config:
    """The configuration of nested mappings, as `load`; `problems` found before are reported with the others."""
    problems = list(problems)
    config = Config()
    try:
        config = Config.model_validate({k: v for k, v in tree.items() if v is not None})
    except ValidationError as error:
        problems += [_explain(item) for item in error.errors()]
    if problems:
        raise ConfigError("the configuration cannot be used:\n" + "\n".join(f"  {address.scrub(p)}" for p in problems))
    return config


def every_key() -> list[tuple[str, str, Any, str, bool]]:
    """(section, key, default, meaning, identity) of every key, in order."""
    return [
        (section, name, field.default, field.description or "", _is_identity(field))
        for section, part in Config.model_fields.items()
        for name, field in type(part.default).model_fields.items()
    ]


def identity(config: Config) -> dict[str, Any]:
    """What decides what is trained: `section.key` → value. Paths, cadences, logging and micro-batch are not in it."""
    return {
        f"{section}.{name}": getattr(getattr(config, section), name)
        for section, name, _, _, is_identity in every_key()
        if is_identity
    }


def public(config: Config) -> dict[str, Any]:
    """The configuration as it may be written down: an address without its secrets."""
    tree = config.model_dump()
    tree["data"]["dir"] = address.shown(config.data.dir)
    return tree


def commented_yaml() -> str:
    """The defaults as YAML, each key with its meaning."""
    lines: list[str] = ["# distrain: every key with its default. [id]: part of the run's identity."]
    section = ""
    for part, name, default, meaning, is_identity in every_key():
        if part != section:
            section = part
            lines += ["", f"# {type(Config.model_fields[part].default).__doc__}", f"{part}:"]
        lines.append(f"  # {meaning}{' [id]' if is_identity else ''}")
        lines.append(f"  {name}: {_scalar(default)}")
    return "\n".join(lines) + "\n"


def keys_help() -> str:
    """The defaults and meanings as lines for `--help`."""
    return "\n".join(
        f"  {section}.{name}={_scalar(default)}\n      {meaning}" for section, name, default, meaning, _ in every_key()
    )


def _is_identity(field: Any) -> bool:
    return bool(isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity"))


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.BaseLoader):
    """YAML whose scalars stay text: PyYAML's own rules make `1e-3` a string and `no` false."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        return None if node.style is None and value in ("", "~", "null", "Null", "NULL") else value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from BaseLoader: builds only text, lists and dicts


def _read_yaml(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        tree = _parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}")
        return {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problems.append(f"{file}{where}: {getattr(error, 'problem', None) or error}")
        return {}
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        problems.append(f"{file}: should hold sections with keys, as `distrain config` prints them")
        return {}
    return tree


def _override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, text = override.partition("=")
    section, dot, name = path.partition(".")
    if not (equals and dot and section and name):
        hint = f"; a file is given by --config {override}" if override.endswith((".yaml", ".yml")) else ""
        hint = "; without spaces around =" if override == "=" else hint
        problems.append(f"{override}: should be section.key=value{hint}")
        return
    try:
        value = _parse(text) if text[:1] in ("[", "{", "'", '"') or text in ("null", "~", "") else text
    except yaml.YAMLError:
        problems.append(f"{override}: not a value that YAML understands")
        return
    part = tree.get(section)
    if part is None:
        part = tree[section] = {}
    if isinstance(part, dict):  # otherwise the file's own mistake is reported by the validation
        part[name] = value


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = [f"{section}.{name}" for section, name, *_ in every_key()] if "." in path else list(Config.model_fields)
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        tail = path.rpartition(".")[2]  # the right key in the wrong section
        same = [k for k in known if k.endswith(f".{tail}")]
        hint = f"did you mean {(same or close)[0]}?" if same or close else "`distrain config` lists all keys"
        return f"{path}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("should be a valid dictionary or instance of", "should hold the keys of section")
    if isinstance(item["input"], (dict, BaseModel)):
        return f"{path}: {message}"
    return f"{path}: {message}; got {item['input']!r}"
