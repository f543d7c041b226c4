"""The configuration of a run: all keys with their meanings, defaults and limits, and the run's identity.

    defaults  <  YAML file  <  section.key=value

`load` checks all values, and reports all problems at once. Scalars are read as text, and the key determines their type:
`1e-3` is a number for a key that is a number.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from distrain import address, files
from distrain.errors import ConfigError
from distrain.text import Values, plural, printable, shortened

_MAX_BYTES = 2**16
"""Maximum size of a YAML file: parsing it may take seconds. All keys with their meanings are an eighth of this."""
_MAX_TRIALS_BYTES = 2**20
"""Maximum size of a file with the keys of trials."""
_MAX_DEPTH = 10
"""Maximum depth of brackets and indents; a key's value has depth 3."""
_MAX_PROBLEMS = 20
"""Maximum number of problems that a message names."""
_MAX_NUMBER = 10**9
"""Maximum of whole numbers: no run has more steps, and no clock or file format has a problem with such a number."""
_MAX_FILE_NAME, _MAX_PATH = 255, 4095
"""Maximum bytes of a file's name and of its path, on Linux's file systems."""
_USER_CODE = re.compile(r"[\w.]+:\w+")
"""The name of a class or function of the user: package.module:name."""


def _key(default: Any, meaning: str, *, identity: bool = False, **limits: Any) -> Any:
    """Declare a key. With `identity` it changes what is trained: a run cannot be resumed with another value."""
    return Field(default, description=meaning, json_schema_extra={"identity": identity}, **limits)


def _whole(value: Any) -> Any:
    """Convert a number without a fraction, such as `1e4`, to an int; refuse true and false."""
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


def _limited(value: Any) -> Any:
    """Convert a number as `_whole` does, and refuse one that is too large for any key."""
    number = _whole(value)
    if isinstance(number, int) and number > _MAX_NUMBER:
        raise ValueError(f"should be at most {_MAX_NUMBER:,}")
    return number


def _flip(value: Any) -> Any:
    """Convert text to true or false, unless it is `alternating`."""
    if value == "alternating":
        return value
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError("should be true, false or alternating") from None


def _off(value: Any) -> Any:
    """Convert false to `off`: other YAML tools read an unquoted `off` as false."""
    return "off" if value is False or value in ("false", "False") else value


def _path(value: Any) -> Any:
    """Refuse text that cannot be a path, before a folder is made for it; convert a `Path` to text."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or address.scheme(value) is not None:
        return value
    try:
        path = os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError("should be text that is a valid file name") from None
    if b"\0" in path:
        raise ValueError("should have no NUL character, as it is a path")
    if len(path) > _MAX_PATH or any(len(name) > _MAX_FILE_NAME for name in path.split(b"/")):
        raise ValueError(f"should be a path of at most {_MAX_PATH} bytes, each name in it at most {_MAX_FILE_NAME}")
    return value


def _local(value: Any) -> Any:
    """Refuse an address for a key that is a path: a folder of that name would be created silently."""
    scheme = address.scheme(value) if isinstance(value, str) else None
    if scheme is not None:
        raise ValueError(f"should be a path; {printable(scheme, 20)}:// is an address")
    return _path(value)


def _mirror(value: Any) -> Any:
    """Refuse what is no address of a store with conditional writes."""
    if value is None:
        return value
    scheme = address.scheme(value) if isinstance(value, str) else None
    rest = value[len(scheme) + len("://") :] if scheme is not None else ""
    if scheme == "s3":
        if rest.startswith("/") or not rest:
            raise ValueError("should be s3://bucket/prefix, with the name of a bucket")
        if "?" in rest or "#" in rest:  # s3fs would read one version of one object, whatever its name
            raise ValueError("should be s3://bucket/prefix without ? and #")
        return f"s3://{rest}"
    path = rest if scheme == "file" else ""
    if not path.startswith("/"):
        raise ValueError("should be s3://bucket/prefix or file:///path; a mirror needs a store with conditional writes")
    _path(path)
    return f"file://{path}"


def _one_of(*names: str, example: str = "") -> Callable[[Any], Any]:
    """Return a function that refuses what is neither one of these names nor package.module:name; null without names."""
    expected = ", ".join([*names, "or package.module:name" if names else "package.module:name"]) + example

    def check(value: Any) -> Any:
        if value is None and not names:
            return None
        if not isinstance(value, str) or (value not in names and not is_user_code(value)):
            raise ValueError(f"should be {expected}")
        return value

    return check


def is_user_code(name: str) -> bool:
    """Whether a name is that of a class or function of the user, package.module:name."""
    return _USER_CODE.fullmatch(name) is not None


def _arguments(value: Any) -> Any:
    """Convert the values of keyword arguments, as `_plain` does; refuse what is no mapping of names to values."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise ValueError("should be a mapping of names to values, such as {eps: 1e-6, amsgrad: true}")
    return {name: _plain(each) for name, each in value.items()}


def _factors(value: Any) -> Any:
    """Refuse what is no mapping of names to values; without a space after it, YAML reads a colon as part of a name."""
    if not isinstance(value, Mapping) or None in value.values():
        raise ValueError("should be a mapping of names to factors, such as {backbone: 0.1, head: 1}; {} for none")
    return value


def _plain(value: Any) -> Any:
    """Convert text to the number, true, false or null that it is, also in lists; refuse other values."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value) if math.isfinite(kind(value)) else value
        return {"true": True, "false": False, "null": None}.get(value.lower(), value)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError("should have plain values: finite numbers, true, false, null, text, or lists of them")


LocalPath = Annotated[str, BeforeValidator(_local)]
PathOrAddress = Annotated[str, BeforeValidator(_path)]
Seed = Annotated[int, BeforeValidator(_whole)]
Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp64"]
Whole = Annotated[int, BeforeValidator(_limited)]
UserCode = Annotated[str, WithJsonSchema({"type": "string", "format": "package.module:name"})]
"""The name of a class or function of the user."""
Arguments = Annotated[dict[str, Any], BeforeValidator(_arguments)]
Factors = Annotated[dict[str, NonNegativeFloat], BeforeValidator(_factors)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]
PerChannel = Annotated[list[float], Field(min_length=1)]
PositivePerChannel = Annotated[list[PositiveFloat], Field(min_length=1)]


class Section(BaseModel):
    """A group of keys. Unknown keys are errors, and values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _changed(section: Section, *names: str) -> list[str]:
    """Return which of these keys do not have their defaults."""
    return [name for name in names if getattr(section, name) != type(section).model_fields[name].default]


class Run(Section):
    """Folder, seed and device of the run."""

    dir: LocalPath = _key(
        "runs/default",
        "folder of the run, for checkpoints, metrics and the result; all processes must see the same folder, unless"
        " run.mirror is set",
        min_length=1,
    )
    seed: Seed = _key(
        0,
        "random seed of the initial weights, the order of the samples and augmentation",
        identity=True,
        ge=0,
        lt=2**63,
    )
    resume: Literal["auto", "must", "never"] = _key(
        "auto",
        "auto: resume from the newest checkpoint in run.dir, or start if there is none; must: resume, and fail if there"
        " is none; never: start, and fail if run.dir has a run",
    )
    mirror: Annotated[str | None, BeforeValidator(_mirror)] = _key(
        None,
        "address that gets a copy of each checkpoint and of the logs: s3://bucket/prefix or file:///path, for this run"
        " alone. Where run.dir is empty or older, the run resumes from there; only rank 0 needs run.dir then",
    )
    wait_seconds: Whole = _key(60, "longest wait for another job that still writes to run.dir", ge=0)
    device: Literal["auto", "cpu", "cuda"] = _key(
        "auto", "auto: GPUs if there are any (an error if torch cannot use them), else the CPU"
    )
    cpu_threads: Whole = _key(1, "CPU threads per process; another number changes the rounding of sums", ge=1, le=1024)

    @model_validator(mode="after")
    def _folders(self) -> Run:
        if self.mirror is not None and address.scheme(self.mirror) == "file":
            # Unlike Path.resolve, realpath knows links that form a loop.
            mirror, run = os.path.realpath(self.mirror[len("file://") :]), os.path.realpath(self.dir)
            if Path(mirror).is_relative_to(run):
                raise ValueError("mirror must be outside dir: it would be lost with it")
        return self


class Data(Section):
    """The data set, made by `distrain prepare`."""

    dir: PathOrAddress = _key(
        "data/synthetic",
        "folder of the data set (it has manifest.json), or its address: file://, http://, https://, s3://, gs://, hf://",
        min_length=1,
    )
    tars: PathOrAddress | None = _key(
        None, "folder or address of the tar files of an index; null: where they were when it was made", min_length=1
    )
    image_size: Whole | None = _key(
        None,
        "height and width of training images, for an index of images of several sizes; null: the size that all have",
        identity=True,
        ge=1,
        le=2**14,
    )
    start_size: Whole | None = _key(
        None,
        "for an index: height and width of training images at the beginning of the run, a multiple of 32; they grow to"
        " data.image_size in steps of 32 (progressive resizing); null: data.image_size from the beginning",
        identity=True,
        ge=32,
        le=2**14,
    )
    growth: Range = _key(
        [0.7, 0.85],
        "with data.start_size: fractions of the run's steps between which images grow, at equal distances; from the"
        " second one on they have their full size",
        identity=True,
    )
    decode_threads: Whole | None = _key(
        None,
        "threads of a process that decode the images of an index; null: the cores that may be used, divided among the"
        " processes of the machine",
        ge=1,
        le=1024,
    )
    decode_device: Literal["cpu", "gpu"] = _key(
        "cpu",
        "where training images of an index are decoded; gpu: JPEG files by nvJPEG, whose pixels differ from a CPU's by"
        " rounding",
        identity=True,
    )
    skip_bad: Whole = _key(
        0,
        "number of images of an index that may turn out to be unreadable in a run: the next readable one is trained"
        " instead, and they are not evaluated; more are an error",
        ge=0,
    )
    cache_dir: LocalPath | None = _key(
        None,
        "folder that caches what is fetched from a remote data set; null: distrain in $XDG_CACHE_HOME or ~/.cache",
        min_length=1,
    )
    cache_gib: float = _key(
        50.0, "maximum size of that folder in GiB; 0: no cache, data are fetched at every use", ge=0, le=2**30
    )
    fetch_retries: Whole = _key(5, "how often a failed fetch is retried, with exponential backoff", ge=0, le=100)
    fetch_timeout_seconds: float = _key(
        60.0,
        "time-out of one attempt to fetch a shard, or a range of a tar file; where a tar file is fetched whole, of each"
        " MiB. Raise it for a slow network",
        gt=0,
        le=86400,
    )
    mean: PerChannel | None = _key(
        None, "mean of each channel, subtracted from images in 0 … 1; null: that of the train split", identity=True
    )
    std: PositivePerChannel | None = _key(
        None,
        "standard deviation of each channel, which images are divided by; null: that of the train split",
        identity=True,
    )
    audit: bool = _key(False, "every process records the ids of its training samples in RUN/audit/")
    cache: Annotated[Literal["auto", "off", "ram", "device"], BeforeValidator(_off)] = _key(
        "auto",
        "where each process caches the training set. auto: on the GPU or in RAM if it fits in a quarter of the free"
        " memory, else off; ram; device: on the GPU; off: shards are read in every epoch. With a cache, each process"
        " reads almost the whole training set once: with ram and device before its first step, with auto during the"
        " first epoch. Of an index, encoded images are cached, in RAM, during the first epoch; by auto only if its tar"
        " files are remote",
    )
    read_ahead: Whole = _key(
        1,
        "rounds of shards (one shard per lane) that are read before they are needed; more rounds need more memory",
        ge=1,
        le=16,
    )

    @model_validator(mode="after")
    def _sizes(self) -> Data:
        problems = []
        if self.start_size is not None and (self.start_size % 32 or self.start_size >= (self.image_size or 0)):
            problems.append("start_size must be a multiple of 32, and smaller than image_size")
        if not 0 <= self.growth[0] <= self.growth[1] <= 1:
            problems.append("growth must be two numbers from 0 to 1, the smaller one first")
        elif self.start_size is None and _changed(self, "growth"):
            problems.append("growth has an effect with start_size alone; give that too, or remove growth")
        if problems:
            raise ValueError("\n  data: ".join(problems))
        return self


class Model(Section):
    """The model."""

    name: str = _key(
        "net",
        "net, small, resnet9, whitened, a classification model of torchvision (resnet18 …), timm:NAME (a model of"
        " timm), or package.module:Class (called with num_classes=…, image_shape=(C, H, W))",
        identity=True,
    )
    init: LocalPath | None = _key(
        None,
        "initial weights: torchvision:NAME, such as torchvision:IMAGENET1K_V2, or timm:TAG: pretrained weights of"
        " model.name, which is of the same library; fetched once (DEFAULT: those that the library recommends). Or a"
        " run's folder (its best checkpoint), a checkpoint, or a file (safetensors, or a state dict saved by"
        " torch.save). A last layer for other classes is re-initialised",
        min_length=1,
    )
    activation: Literal["relu", "sigmoid", "tanh"] = _key("relu", "activation function of net", identity=True)


class Augment(Section):
    """Random augmentation of training images, drawn again for each sample in each step."""

    flip: Annotated[bool | Literal["alternating"], BeforeValidator(_flip)] = _key(
        False,
        "true: mirror images horizontally with probability 0.5, drawn again in each step; alternating: with probability"
        " 0.5 in the first epoch, and in each later one those that were not mirrored in the epoch before",
        identity=True,
    )
    crop_padding: Whole = _key(
        0, "shift images by up to this many pixels in each direction, with reflected edges", identity=True, ge=0
    )
    crop_scale: Range | None = _key(
        None,
        "for an index: smallest and largest fraction of an image's area that a random part has, which is resized to"
        " data.image_size (random resized crop; [0.08, 1] is usual for ImageNet); null: the largest part at the centre",
        identity=True,
    )
    crop_ratio: Range = _key(
        [0.75, 1.3333333333333333], "smallest and largest aspect ratio (width / height) of that part", identity=True
    )
    trivial_augment: bool = _key(
        False,
        "for an index: TrivialAugmentWide, one random operation of random strength on each image (rotation, colour …)",
        identity=True,
    )
    cutout: Whole = _key(0, "side in pixels of a random square that is set to the mean; 0: none", identity=True, ge=0)
    erasing: float = _key(
        0.0,
        "probability of random erasing: a random rectangle of 2 % to 33 % of an image is set to the mean",
        identity=True,
        ge=0,
        le=1,
    )
    mixup: float = _key(
        0.0,
        "alpha of mixup: pairs of images and their labels are mixed, with a weight per step from Beta(alpha, alpha);"
        " 0: none",
        identity=True,
        ge=0,
        le=1,
    )
    cutmix: float = _key(
        0.0,
        "alpha of CutMix: a random box of each image is replaced by that of another one, and labels are mixed by its"
        " area; with mixup, each step does one of the two, at random; 0: none",
        identity=True,
        ge=0,
        le=1,
    )
    also: Annotated[UserCode | None, BeforeValidator(_one_of())] = _key(
        None,
        "a function of your own, called after the others and before mixup and CutMix with (images, random_bits): uint8"
        " images [n, H, W, C] and 128 random bits of each image, int64 [n, 2]; it returns images of the same shape",
        identity=True,
    )

    @property
    def mixes_labels(self) -> bool:
        """Whether samples are trained with the labels of two images."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _ranges(self) -> Augment:
        problems = []
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            problems.append("crop_scale must be two numbers above 0, at most 1, the smaller one first")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            problems.append("crop_ratio must be two numbers above 0, the smaller one first")
        elif self.crop_scale is None and _changed(self, "crop_ratio"):
            problems.append("crop_ratio has an effect with crop_scale alone; give that too, or remove crop_ratio")
        if problems:
            raise ValueError("\n  augment: ".join(problems))
        return self


class Train(Section):
    """Length, batch size, optimizer, learning rate and precision of training."""

    epochs: Whole | None = _key(
        None, "length of the run in epochs; 10 if max_steps is not given either", identity=True, ge=1
    )
    max_steps: Whole | None = _key(None, "length of the run in steps, instead of epochs", identity=True, ge=1)
    stop_after: Whole | None = _key(
        None,
        "end the run after this many evaluations on val in a row without a better accuracy; the schedule stays that of"
        " the whole length, so an early end comes before its learning rate has decayed; null: never",
        identity=True,
        ge=1,
    )
    global_batch_size: Whole = _key(128, "samples per step, in total over all processes", identity=True, ge=1)
    micro_batch_size: Whole | None = _key(
        None,
        "maximum number of samples that a device computes at once (gradient accumulation); null: its whole local batch",
        ge=1,
    )
    optimizer: Annotated[
        Literal["sgd", "adam", "adamw", "muon"] | UserCode,
        BeforeValidator(_one_of("sgd", "adam", "adamw", "muon", example=" such as torch.optim:NAdam")),
    ] = _key(
        "sgd",
        "sgd, adam, adamw; muon: steps along orthogonal matrices for weights of two or more dimensions (without"
        " embeddings and the last layer), sgd for the rest; package.module:name: a class of optimizers, such as"
        " torch.optim:NAdam (called with the parameters, lr, those of momentum, nesterov, betas and weight_decay that"
        " are among its arguments, and optimizer_args), or a function of (module, settings) that returns one optimizer",
        identity=True,
    )
    optimizer_args: Arguments = _key(
        {}, "further arguments for an optimizer of your own, such as {eps: 1e-6}", identity=True
    )
    lr: float = _key(0.05, "learning rate; the maximum, if the schedule changes it", identity=True, gt=0)
    lr_scale: Factors = _key(
        {},
        "factors of lr by parameter, such as {backbone: 0.1}: for head (the last layer, which computes the logits),"
        " backbone (all others), or patterns of names such as layer4.*; the last key that matches counts, and 1 without"
        " any. With 0, parameters are frozen, and so are the statistics of a BatchNorm that has no others",
        identity=True,
    )
    schedule: Annotated[
        Literal["constant", "one_cycle", "cosine"] | UserCode,
        BeforeValidator(_one_of("constant", "one_cycle", "cosine")),
    ] = _key(
        "one_cycle",
        "constant; one_cycle: linear warm-up, then linear decay to 0; cosine: linear warm-up, then cosine decay to 0;"
        " package.module:name: a function of (step, total_steps), counted from 0, that returns the factor of lr",
        identity=True,
    )
    warmup_fraction: float = _key(
        0.25, "fraction of the steps used for warm-up by one_cycle and cosine", identity=True, ge=0, lt=1
    )
    momentum: float = _key(0.9, "momentum of sgd and muon", identity=True, ge=0, lt=1)
    nesterov: bool = _key(False, "use Nesterov momentum with sgd and muon", identity=True)
    muon_iterations: Whole = _key(
        5, "iterations of Newton and Schulz, with which muon makes matrices orthogonal", identity=True, ge=1, le=20
    )
    muon_normalize: bool = _key(
        False,
        "with muon, scale each matrix of m rows to a norm of m^0.5 before each step, in place of weight decay; for"
        " weights that are all followed by a normalisation layer, so that their scale does not matter",
        identity=True,
    )
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = _key(
        [0.9, 0.999], "betas of Adam and AdamW", identity=True
    )
    weight_decay: float = _key(
        0.0,
        "weight decay: L2 penalty with sgd and adam, decoupled with adamw and for the matrices of muon",
        identity=True,
        ge=0,
    )
    decay_biases: bool = _key(
        True,
        "false: no weight decay for parameters of one dimension, which are biases and those of normalisation layers",
        identity=True,
    )
    clip_norm: float | None = _key(
        None, "maximum norm of the gradient (clipping); null: no clipping", identity=True, gt=0
    )
    loss: Annotated[Literal["cross_entropy"] | UserCode, BeforeValidator(_one_of("cross_entropy"))] = _key(
        "cross_entropy",
        "cross_entropy; package.module:name: a function of (logits, labels), [n, K] and int64 [n], that returns the"
        " loss of each sample, [n]; evaluations report the cross-entropy in any case",
        identity=True,
    )
    label_smoothing: float = _key(
        0.0, "fraction of each label that is spread over all classes, by cross_entropy", identity=True, ge=0, lt=1
    )
    ema_decay: float | None = _key(
        None,
        "decay per step of an exponential moving average (EMA) of the weights, which is then evaluated and saved as the"
        " model; after n steps at most (1 + n) / (10 + n), so that it also suits short runs; null: no EMA",
        identity=True,
        gt=0,
        lt=1,
    )
    precision: Precision = _key(
        "fp32",
        "tf32: fp32 with matrix products in TF32; bf16 and fp16: mixed precision; tf32 and fp16 need a GPU; fp64: to"
        " compare results exactly",
        identity=True,
    )
    virtual_ranks: Whole | None = _key(
        None,
        "number of virtual ranks, among which a global batch is divided: the weights are then the same, bit for bit, on"
        " any number of processes up to this one; implies deterministic; null: one for each process",
        identity=True,
        ge=1,
        le=4096,
    )
    deterministic: bool = _key(
        False, "on GPUs, use only deterministic operations, which are slower (CPUs are always deterministic)"
    )
    compile: Annotated[Literal["off", "default", "reduce-overhead"], BeforeValidator(_off)] = _key(
        "off",
        "mode of torch.compile for the passes of training; reduce-overhead uses CUDA graphs for them; shifts, cutout"
        " and normalisation are compiled too; needs a C++ compiler; fastest if all micro-batches have one size",
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
            problems.append("give epochs or max_steps, not both; train.epochs=null removes the value of the file")
        if self.nesterov and (self.optimizer in ("adam", "adamw") or self.momentum == 0):
            problems.append("nesterov needs optimizer sgd or muon, or one of your own, and a momentum above 0")
        of_muon = _changed(self, "muon_iterations", "muon_normalize")
        if of_muon and self.optimizer != "muon":
            problems.append(f"{', '.join(of_muon)}: for optimizer muon alone; remove them, or set their defaults")
        if self.optimizer_args and not is_user_code(self.optimizer):
            problems.append(
                f"optimizer_args are for an optimizer package.module:name; {self.optimizer} has the keys lr, momentum …"
            )
        if self.label_smoothing and is_user_code(self.loss):
            problems.append("label_smoothing is done by loss cross_entropy alone; do it in your own loss")
        if any(not 0 <= beta < 1 for beta in self.betas):
            problems.append("betas must be in 0 ≤ beta < 1")
        if problems:
            raise ValueError("\n  train: ".join(problems))
        return self


class Eval(Section):
    """Evaluation during the run: on the val split if there is one, else on test."""

    every_steps: Whole | None = _key(None, "steps between evaluations; null: once per epoch; 0: only at the end", ge=0)
    batch_size: Whole = _key(512, "maximum number of samples that are evaluated at once", ge=1)
    flip: bool = _key(
        False,
        "evaluate each image and its mirror image, and average their logits (test-time flip): evaluations take twice as"
        " long; `predict`, `export` and `distrain.load_model` do it too",
    )
    crop: Whole | None = _key(
        None,
        "for an index: height and width of the images that are evaluated, the centre of the resized ones; null:"
        " data.image_size",
        ge=1,
        le=2**14,
    )
    resize: Whole | None = _key(
        None,
        "for an index: length of the shorter side to which images are resized before that crop; null: eval.crop, with"
        " augment.crop_scale 8/7 of it (256 for 224)",
        ge=1,
        le=2**14,
    )


class Checkpoint(Section):
    """Checkpoints: when they are saved, and which are kept. The first host needs memory for a copy of what is saved."""

    every_steps: Whole = _key(1000, "steps between checkpoints; 0: do not save by steps", ge=0)
    every_minutes: float = _key(10.0, "minutes between checkpoints; 0: do not save by time", ge=0)
    keep: Whole = _key(
        2, "number of newest checkpoints to keep, in addition to the best one and the one saved at a stop; 0: all", ge=0
    )
    keep_every: Whole = _key(0, "also keep checkpoints whose step is a multiple of this; 0: none", ge=0)


class Timeouts(Section):
    """Time-outs without progress. When one expires, all stacks are written to RUN/stacks/ and the run exits with 75."""

    start_seconds: Whole = _key(
        1800,
        "for each of: the rendezvous of all processes, the rest of the start, a compilation, an attempt's first step",
        ge=1,
    )
    step_seconds: Whole = _key(600, "for a step, including the wait for its data", ge=1)
    eval_seconds: Whole = _key(600, "for a batch of an evaluation, including the wait for its data", ge=1)
    save_seconds: Whole = _key(1800, "for a checkpoint, also one that is written while training continues", ge=1)


class Launch(Section):
    """The end of an attempt, and restarts, under `distrain launch`."""

    grace_seconds: Whole = _key(120, "longest wait for the processes to save and exit after a stop request", ge=1)
    max_attempts_without_progress: Whole = _key(
        3,
        "after this many attempts in a row without a newer checkpoint, exit with 1 instead of 75, so that the run"
        " is not started again",
        ge=1,
    )
    restarts: Whole = _key(
        0,
        "start the processes again, at most so many times, when one was killed, crashed by a signal, hung or lost its"
        " link; they resume from the newest checkpoint (--restarts)",
        ge=0,
    )
    rejoin_seconds: Whole = _key(
        60,
        "before a restart, longest wait for the launchers of other nodes; nodes that are missing then are lost",
        ge=1,
    )
    standby: bool = _key(
        True,
        "with restarts: while a run trains, a second set of processes waits with torch imported, so that a restart"
        " takes less time; each takes some hundred MB of memory",
    )


class Log(Section):
    """Progress messages, metrics.jsonl, the report, TensorBoard and other trackers."""

    every_steps: Whole = _key(
        50, "steps between lines of metrics.jsonl; a log file shows at most one every five seconds", ge=1
    )
    level: Literal["debug", "info", "warning", "error"] = _key(
        "info", "least severe messages that the command line shows"
    )
    report: bool = _key(True, "a run writes a page with charts and pictures to RUN/report/ at its end")
    tensorboard: bool = _key(
        False, "write metrics, the configuration and pictures to RUN/tensorboard; needs distrain[tensorboard]"
    )
    trackers: list[str] = _key(
        [],
        "trackers of accelerate that get metrics and the configuration, such as [mlflow]: aim, clearml, comet_ml,"
        " dvclive, mlflow, swanlab, trackio",
    )


class Profile(Section):
    """Traces by torch's profiler. The time spent on waiting, copying and computing is always measured."""

    steps: Whole = _key(
        0, "number of steps to trace in each attempt, after its tenth step, to RUN/trace/; 0: none", ge=0, le=1000
    )


class Wandb(Section):
    """Weights & Biases, used by the main process. `distrain wandb RUN` uploads a run afterwards."""

    mode: Literal["disabled", "offline", "online"] = _key(
        "disabled", "online: upload during the run, needs WANDB_API_KEY or `wandb login`; offline: write to local files"
    )
    project: str = _key("distrain", "project of the run")
    name: str | None = _key(None, "name of the run; null: the name of its folder")
    group: str | None = _key(None, "group of the run; null: none, or with nodes=all the id of the run", min_length=1)
    job_type: str = _key("train", "job type of the run in its group", min_length=1)
    nodes: Literal["first", "all"] = _key(
        "first",
        "nodes whose system metrics are recorded; all: the first process of each other node opens another run in the"
        " group, with job type node",
    )


class Config(Section):
    """The whole configuration of a run: `distrain.Config.load(…)` builds one; its values cannot be changed."""

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

    @classmethod
    def load(cls, source: ConfigSource = None, overrides: Overrides = ()) -> Config:
        """Return the configuration: the defaults, replaced by `source`, and then by `overrides`.

            config = distrain.Config.load("configs/cifar10.yaml", {"run": {"dir": "runs/first"}, "train": {"lr": 0.1}})
            longer = distrain.Config.load(config, {"run": {"dir": "runs/second"}, "train": {"epochs": 20}})

        Args:
            source: the path of a YAML file, nested mappings of the keys, or a `Config`; None: the defaults.
            overrides: nested mappings of the keys, or texts `section.key=value` as on the command line.

        Raises:
            distrain.ConfigError: the file cannot be read, or keys or values are wrong. The message names all problems.
        """
        return load(source, overrides)


ConfigSource: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Config | None"
"""Values of the keys: the path of a YAML file, nested mappings, or a configuration."""
Overrides: TypeAlias = Mapping[str, Any] | Sequence[str]
"""Values that replace others: nested mappings, or texts `section.key=value`."""


def load(source: ConfigSource = None, overrides: Overrides = ()) -> Config:
    """Return the configuration: the defaults, replaced by `source`, and then by `overrides`; see `Config.load`."""
    problems: list[str] = []
    tree = _tree(source, problems)
    if isinstance(overrides, Mapping):
        _merge(tree, overrides)
    elif isinstance(overrides, Sequence) and not isinstance(overrides, str):
        for override in overrides:
            _override(tree, str(override), problems)
    else:
        problems.append(
            "overrides: should be nested mappings of the keys, or a list of texts section.key=value; got"
            f" {_VALUES.repr(overrides)}"
        )
    return from_tree(tree, problems)


def _tree(source: ConfigSource, problems: list[str]) -> dict[str, Any]:
    """Return the values of `source` as nested dicts, which may be changed."""
    if source is None:
        return {}
    if isinstance(source, Config):
        return source.model_dump(exclude_unset=True)
    if isinstance(source, Mapping):
        tree: dict[str, Any] = {}
        _merge(tree, source)
        return tree
    if isinstance(source, (str, os.PathLike)):
        return _read_yaml(Path(source), problems)
    problems.append(
        f"should be the path of a YAML file, nested mappings of the keys, or a Config; got {_VALUES.repr(source)}"
    )
    return {}


def _merge(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Replace values of nested dicts by those of nested mappings."""
    for section, part in overrides.items():
        before = tree.get(section)
        if isinstance(part, Mapping):
            tree[section] = {**(before if isinstance(before, dict) else {}), **part}
        else:
            tree[section] = part


def from_tree(tree: Mapping[str, Any], problems: Sequence[str] = ()) -> Config:
    """Build the configuration from nested mappings, with the checks of `load`.

    `problems`, which were found earlier, are reported together with those found here.
    """
    problems = list(problems)
    config = Config()
    try:
        config = Config.model_validate({k: v for k, v in tree.items() if v is not None})
    except ValidationError as error:
        items = error.errors()
        problems += [_explain(item) for item in items[:_MAX_PROBLEMS]]
        problems += [""] * len(items[_MAX_PROBLEMS:])  # counted only
    if problems:
        lines = [f"  {address.scrub(problem)}" for problem in shortened(problems, _MAX_PROBLEMS)]
        raise ConfigError("\n".join(["the configuration cannot be used:", *lines]))
    return config


def trial_keys(location: str) -> list[str]:
    """Return the keys of one trial of a sweep, the `section.key=value` in a line of a text file.

    Args:
        location: FILE:NUMBER; trials are counted from 0. Empty lines and comments (#) are none.

    Raises:
        ConfigError: the file cannot be read, or has no such line.
    """
    shown = printable(location)
    name, _, number = location.rpartition(":")
    if not (name and number.isascii() and number.isdecimal()):
        raise ConfigError(f"--trial {shown}: should be FILE:NUMBER, such as trials.txt:0 for its first line")
    try:
        text = files.read(name, _MAX_TRIALS_BYTES).decode("utf-8-sig")  # editors of Windows write a byte-order mark
        trials = [keys for line in text.splitlines() if (keys := shlex.split(line, comments=True))]
    except OSError as error:
        raise ConfigError(f"--trial {shown}: the file cannot be read: {error.strerror}") from error
    except ValueError as error:  # no UTF-8, or quotes that are not closed
        raise ConfigError(f"--trial {shown}: the file cannot be read: {printable(error)}") from error
    if int(number) >= len(trials):
        raise ConfigError(f"--trial {shown}: the file has {plural(len(trials), 'line')} with keys, counted from 0")
    return trials[int(number)]


def every_key() -> list[tuple[str, str, Any, str, bool]]:
    """Return (section, key, default, meaning, identity) of all keys, in order."""
    return [
        (section, name, field.default, field.description or "", _is_identity(field))
        for section, part in Config.model_fields.items()
        for name, field in type(part.default).model_fields.items()
    ]


def identity(config: Config) -> dict[str, Any]:
    """Return the keys that determine what is trained, as `section.key` → value: no paths, intervals or logging."""
    values = {
        f"{section}.{name}": getattr(getattr(config, section), name)
        for section, name, _, _, is_identity in every_key()
        if is_identity
    }
    factors = (f"{name}: {factor!r}" for name, factor in config.train.lr_scale.items())
    values["train.lr_scale"] = f"{{{', '.join(factors)}}}"  # text: the order of the keys matters
    return values


def public(config: Config) -> dict[str, Any]:
    """Return the configuration as it may be recorded: without the secrets of an address."""
    tree = config.model_dump()
    for section, key in (("data", "dir"), ("data", "tars"), ("run", "mirror")):
        location = tree[section][key]
        tree[section][key] = None if location is None else address.without_secrets(location)
    return tree


def commented_yaml() -> str:
    """Return the defaults as YAML, with the meaning of each key as a comment."""
    lines: list[str] = ["# distrain: all keys with their defaults. [id]: part of the run's identity."]
    section = ""
    for part, name, default, meaning, is_identity in every_key():
        if part != section:
            section = part
            lines += ["", f"# {type(Config.model_fields[part].default).__doc__}", f"{part}:"]
        lines.append(f"  # {meaning}{' [id]' if is_identity else ''}")
        lines.append(f"  {name}: {_scalar(default)}")
    return "\n".join(lines) + "\n"


def keys_help() -> str:
    """Return the defaults and meanings of all keys, as text for `--help`."""
    return "\n".join(
        f"  {section}.{name}={_scalar(default)}\n      {meaning}" for section, name, default, meaning, _ in every_key()
    )


def _is_identity(field: Any) -> bool:
    return bool(isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity"))


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.BaseLoader):
    """A YAML loader that keeps scalars as text: PyYAML's own rules read `1e-3` as a string and `no` as false.

    It refuses aliases, whose values can grow without bound, deep nesting, and tags, which it would pass over.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases (&name, *name) are not supported; write the value itself"
        elif getattr(event, "tag", None) is not None:
            problem = "tags (!name) are not supported; write the value itself"
        elif self._depth == _MAX_DEPTH:
            problem = "brackets or indents are nested too deeply"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

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
                message = f"duplicate key {_VALUES.repr(key)}"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)


def _parse(text: str) -> Any:
    """Return the content of YAML text: text, lists and dicts.

    Raises:
        ValueError: it is not valid YAML; the message begins with `:LINE: ` if the line is known.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from BaseLoader, which builds nothing else
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        context = f"{error.context}, " if str(error.problem).startswith("but ") else ""
        raise ValueError(f"{line}: {printable(f'{context}{error.problem}')}") from None
    except yaml.YAMLError as error:
        raise ValueError(f": {printable(str(error).partition(chr(10))[0])}") from None
    except (ValueError, OverflowError):  # PyYAML converts escapes and versions without checks
        raise ValueError(": an escape or a version of YAML is out of range") from None


def _read_yaml(file: Path, problems: list[str]) -> dict[str, Any]:
    name = printable(file)
    try:
        text = files.read(file, _MAX_BYTES).decode()
    except OSError as error:
        problems.append(f"{name}: cannot be read: {error.strerror}")
        return {}
    except UnicodeDecodeError as error:
        problems.append(f"{name}: cannot be read: {error}")
        return {}
    try:
        tree = _parse(text)
    except ValueError as error:
        problems.append(f"{name}{error}")
        return {}
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        problems.append(f"{name}: should have sections with keys, as `distrain config` prints them")
        return {}
    return tree


def _override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    shown = printable(address.scrub(override), 120)
    path, equals, text = override.partition("=")
    section, dot, name = path.partition(".")
    if not (equals and dot and section and name):
        hint = f"; give a file with --config {shown}" if override.endswith((".yaml", ".yml")) else ""
        hint = "; write no spaces around =" if override == "=" else hint
        problems.append(f"{shown}: should be section.key=value{hint}")
        return
    try:
        value = _parse(text) if text[:1] in ("[", "{", "'", '"') or text in ("null", "~", "") else text
    except ValueError as error:
        problems.append(f"{shown}: is not valid YAML{str(error).removeprefix(':1')}")
        return
    part = tree.get(section)
    if part is None:
        part = tree[section] = {}
    if isinstance(part, dict):  # otherwise validation reports the mistake in the file
        part[name] = value


def _explain(item: Any) -> str:
    path = printable(address.scrub(".".join(str(part) for part in item["loc"])), 100)
    if item["type"] == "extra_forbidden":
        known = [f"{section}.{name}" for section, name, *_ in every_key()] if "." in path else list(Config.model_fields)
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        if len(item["loc"]) == 1 and path in known:
            section, _, name = path.partition(".")
            return (
                f"{path}: in a file, write {section}: with {name}: in an indented line below it; in Python,"
                f' {{"{section}": {{"{name}": …}}}}'
            )
        name = path.rpartition(".")[2]
        in_other_section = [k for k in known if k.endswith(f".{name}")]
        matches = in_other_section or close
        hint = f"did you mean {matches[0]}?" if matches else "`distrain config` lists all keys"
        return f"{path}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("a valid string, unable to parse raw data as a unicode string", "text in UTF-8")
    message = message.replace("should be a valid dictionary or instance of", "should have the keys of section")
    if isinstance(item["input"], (dict, BaseModel)):
        return f"{path}: {message}"
    return f"{path}: {message}; got {_VALUES.repr(item['input'])}"


class _PublicValues(Values):
    """The values of messages, with secrets removed from the addresses in them before they are shortened."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(address.scrub(x), level)


_VALUES = _PublicValues()
