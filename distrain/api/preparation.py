"""Making data sets from Python, and for the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from distrain import address
from distrain.api.arguments import checked
from distrain.errors import ConfigError
from distrain.text import shown

if TYPE_CHECKING:
    from distrain.data.images import Decoding
    from distrain.data.manifest import Dataset
    from distrain.preparation.blocks import Options

AnyPath: TypeAlias = str | os.PathLike[str]
Size = Annotated[int, Field(ge=1)]
BitDepth = Annotated[int, Field(ge=1, le=16)]

MAX_PIXELS = 89_478_485
"""Default of the largest number of pixels of an image: Pillow's own."""


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10, downloaded and verified by torchvision.

    Attributes:
        root: folder of torchvision's files; missing ones are downloaded.
    """

    root: AnyPath = "data/downloads"


@dataclass(frozen=True)
class Folder:
    """Images of your own: a folder for each class under train/ and test/, or tar and zip archives of such folders.

    Attributes:
        paths: folders and archives, or one of them.
        image_size: height and width: images are resized and centre-cropped.
        background: colour behind transparent pixels: a name, or #rrggbb.
        bit_depth: bits of the pixels in grey images of 16 bits that do not state it.
        max_pixels: images with more pixels are unreadable.
    """

    paths: AnyPath | Sequence[AnyPath]
    image_size: Size = 32
    background: str = "white"
    bit_depth: BitDepth = 16
    max_pixels: Size = MAX_PIXELS


@dataclass(frozen=True)
class WebDataset:
    """Tar files of KEY.jpg and KEY.cls (or .json, .txt), which stay as they are: an index of them is written.

    Attributes:
        train: paths or addresses of tar files, with {000..123}, {a,b}, * and ?; or one of them.
        val: the same for val.
        test: the same for test.
        image: fields that are images; the first one is used.
        label: field that is the label: cls, txt or json:path.to.it.
        classes: names of the classes, or a text file with one in each line; None: the labels of train.
        accept_order: accept samples that are sorted by class in the tar files.
        normalization: mean and std: measured on 1,000 drawn images of train, or ImageNet's.
        convert: write blocks of images of one size, shuffled, instead of an index.
        image_size: with `convert`, height and width; None: as they are.
        background: colour behind transparent pixels: a name, or #rrggbb.
        bit_depth: bits of the pixels in grey images of 16 bits that do not state it.
        max_pixels: images with more pixels are unreadable.
    """

    train: str | Sequence[str]
    val: str | Sequence[str] = ()
    test: str | Sequence[str] = ()
    image: str = "jpg;jpeg;png;webp"
    label: str = "cls"
    classes: AnyPath | Sequence[str] | None = None
    accept_order: bool = False
    normalization: Literal["measured", "imagenet"] = "measured"
    convert: bool = False
    image_size: Size | None = None
    background: str = "white"
    bit_depth: BitDepth = 16
    max_pixels: Size = MAX_PIXELS


@dataclass(frozen=True)
class Synthetic:
    """Generated pictures, drawn from the seed.

    Attributes:
        samples: number of training pictures.
        test_samples: number of test pictures.
        image_size: height and width.
        classes: number of classes.
    """

    samples: Size = 20_000
    test_samples: Size = 4_000
    image_size: Annotated[int, Field(ge=8)] = 32
    classes: Annotated[int, Field(ge=2)] = 10


@dataclass(frozen=True)
class SourceClass:
    """A class of your own that yields images and labels: docs/extending.md has an example.

    Attributes:
        name: `package.module:Class`.
        arguments: keyword arguments of the class, which are text; no secrets are recorded.
    """

    name: str
    arguments: Mapping[str, str] = field(default_factory=dict)


AnySource: TypeAlias = Cifar10 | Folder | WebDataset | Synthetic | SourceClass


def prepare(
    source: AnySource,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float | None = None,
    limit: int | None = None,
    lanes: int | None = None,
    shards: int | None = None,
    skip_bad: int = 0,
) -> Path:
    """Write a data set that training can stream, as `distrain prepare` does.

        data = distrain.prepare(distrain.Folder("photos", image_size=64), "data/mine", val_fraction=0.1)
        distrain.train({"data": {"dir": data}, "run": {"dir": "runs/mine"}})

    A data set that is there already, with the same options, is not made again. Call this in one process alone, before
    others train. Messages name the options of the command: `--val-fraction` is `val_fraction`.

    Args:
        source: `Cifar10`, `Folder`, `WebDataset`, `Synthetic` or `SourceClass`.
        out: folder to write.
        seed: of the splits, the shuffle and the generated pictures.
        val_fraction: part of train that becomes val, which the best checkpoint is chosen on; stratified.
        test_fraction: part of train that becomes test, if the source has no test split; None: 0.1.
        limit: maximum number of samples of each split; stratified.
        lanes: parallel streams of an epoch, and so the maximum number of processes; None: 64, or fewer for some
            hundreds of images.
        shards: shards of each split, a multiple of the lanes; None: files of at most 32 MiB.
        skip_bad: number of unreadable images that are dropped; more are an error.

    Returns:
        The folder of the data set: the value of `data.dir`.

    Raises:
        distrain.ConfigError: an option cannot be used, or the folder has other content.
        distrain.DataError: the source cannot be read.
        distrain.AgainError: another process is preparing a data set there, or a worker process was killed.
    """
    from distrain.preparation.blocks import Options

    make(source, out, Options(seed, shards, lanes, limit, val_fraction, test_fraction, skip_bad))
    return Path(out)


def make(source: AnySource, out: AnyPath, options: Options) -> tuple[Dataset, bool]:
    """Make a data set, or read the one that is there.

    Returns:
        The data set, and whether it was made by this call.

    Raises:
        UserError, AgainError: as `prepare`.
    """
    folder = _folder(out)
    if not isinstance(source, AnySource):
        raise ConfigError(
            "source: should be distrain's Cifar10, Folder, WebDataset, Synthetic or SourceClass, such as"
            f' distrain.Folder("photos"); got {shown(source)}'
        )
    source, options = checked(type(source).__name__, source), checked("prepare", options)
    if isinstance(source, WebDataset):
        return _make_from_tars(source, folder, options)
    from distrain.preparation import blocks

    kind, recorded, open_source = _source(source, options)
    return blocks.prepare(folder, kind, recorded, open_source, options)


def _folder(out: AnyPath) -> Path:
    if not isinstance(out, (str, os.PathLike)):
        raise ConfigError(f"--out: should be a path; got {shown(out)}")
    kind = address.scheme(os.fspath(out))
    if kind is not None:  # otherwise a folder of that name would be created silently
        raise ConfigError(f"--out: {kind}:// is an address; write to a folder and upload that")
    return Path(out)


def _source(source: Cifar10 | Folder | Synthetic | SourceClass, options: Options) -> tuple[str, dict[str, Any], Any]:
    """Return the name of a kind of source, what the manifest records of it, and the function that opens it."""
    if isinstance(source, Cifar10):
        from distrain.preparation.sources.cifar10 import Cifar10 as OpenCifar10

        return "cifar10", {}, lambda work: OpenCifar10(Path(source.root), work)
    if isinstance(source, Synthetic):
        from distrain.preparation.sources.synthetic import Synthetic as OpenSynthetic

        sizes = (source.samples, source.test_samples, source.image_size, source.classes)
        return "synthetic", dict(vars(source)), lambda _: OpenSynthetic(*sizes, options.seed)
    if isinstance(source, SourceClass):
        from distrain.preparation.sources.user_class import UserSource

        arguments = dict(source.arguments)
        public = {key: "hidden" if address.is_secret(key) else address.scrub(text) for key, text in arguments.items()}
        return "source", {"class": source.name, "arguments": public}, lambda _: UserSource(source.name, arguments)
    from distrain.preparation.sources.folder import Folder as OpenFolder

    paths = [Path(path) for path in _listed(source.paths)]
    decoding = _decoding(source)
    recorded = {"image_size": source.image_size, **vars(decoding)}
    return "folder", recorded, lambda work: OpenFolder(paths, source.image_size, work, decoding)


def _make_from_tars(source: WebDataset, out: Path, options: Options) -> tuple[Dataset, bool]:
    if source.image_size is not None and not source.convert:
        raise ConfigError(
            "--image-size has no effect without --convert: an index has images as they are; set data.image_size when"
            " you train"
        )
    if source.convert and (source.accept_order or source.normalization != "measured"):
        name = "--accept-order" if source.accept_order else "--normalization"
        raise ConfigError(f"{name} has no effect with --convert; remove it")
    from distrain.preparation import indexing, labels

    classes = source.classes
    if isinstance(classes, (str, os.PathLike)):
        classes = labels.read_classes(Path(classes))
    tar_options = indexing.TarOptions(
        {split: _listed(getattr(source, split)) for split in ("train", "val", "test")},
        source.image,
        source.label,
        classes,
        _decoding(source),
        source.accept_order,
        source.normalization,
        source.convert,
        source.image_size,
    )
    return indexing.prepare_webdataset(out, tar_options, options)


def _listed(one_or_several: Any) -> list[Any]:
    return [one_or_several] if isinstance(one_or_several, (str, os.PathLike)) else list(one_or_several)


def _decoding(source: Folder | WebDataset) -> Decoding:
    """Return the options that decide how image files become pixels.

    Raises:
        ConfigError: the background is no colour.
    """
    from PIL import ImageColor

    from distrain.data.images import Decoding

    try:
        colour: tuple[int, ...] = ImageColor.getrgb(source.background)
    except ValueError:
        colour = ()
    if len(colour) != 3:  # unknown, or with an alpha channel
        raise ConfigError(f"--background {source.background}: should be a colour like white or #ffffff")
    return Decoding("#" + bytes(colour).hex(), source.bit_depth, source.max_pixels)
