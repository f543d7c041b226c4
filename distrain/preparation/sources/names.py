"""The meaning of file and folder names: splits, images, and what is never an image of the user's."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

from distrain.text import printable

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}
_ANY_SPLIT = "|".join(sorted(_SPLITS, key=len, reverse=True))
_SPLIT_NAME = re.compile(rf"({_ANY_SPLIT})(?:[-_ ]?(?:set|split|data|images))?")
_SPLIT_PART = re.compile(rf"(?<![a-z])({_ANY_SPLIT})(?:set)?(?![a-z])")
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_NO_LETTERS = re.compile(r"[\W\d_]+")
_ARCHIVE_SUFFIX = re.compile(r"\.(?:zip|tgz|tbz2?|txz|tar(?:\.\w+)?)$", re.IGNORECASE)

_SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r"}
_SYSTEM_NAMES |= {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
_DOT_FOLDERS = {".ipynb_checkpoints", ".git", ".hg", ".svn", ".dvc", ".cache", ".idea", ".vscode", ".venv", ".partial"}
_DOT_FOLDERS |= {".thumbnails", ".thumbs", ".@__thumb", ".xvpics", ".picasaoriginals", ".snapshot", ".snapshots"}
_DOT_FOLDERS |= {".trash", ".trashes", ".trash-1000", ".appledouble", ".spotlight-v100", ".fseventsd"}
_DOT_FOLDERS |= {".temporaryitems", ".documentrevisions-v100"}

_IMAGE = re.compile(
    r"\.(?:apng|avif|bmp|cr2|dib|dng|gif|heic|heif|ico|j2k|jfif|jp2|jpe|jpeg|jpg|jxl|nef|pbm|pgm|png|pnm|ppm|psd|svg|tga"
    r"|tif|tiff|webp)",
    re.IGNORECASE,
)
_ARCHIVE = re.compile(r"\.(?:7z|bz2|gz|rar|tar|tbz|tgz|txz|xz|zip|zst)", re.IGNORECASE)
_OTHER = re.compile(
    r"\.(?:avi|cfg|cls|csv|db|doc|docx|h5|hdf5|htm|html|ini|ipynb|json|jsonl|log|mat|md|mkv|mov|mp3|mp4|npy|npz|parquet"
    r"|pdf|pkl|pt|pth|py|rst|sh|tfrecord|tsv|txt|url|wav|xls|xlsx|xml|yaml|yml)",
    re.IGNORECASE,
)

DOT = "their names begin with a dot"
SYSTEM = "files of the operating system"


def normal(name: str) -> str:
    """Return the form in which equal names are equal: macOS decomposes é into e and an accent."""
    return unicodedata.normalize("NFC", name)


def split_of(name: str) -> str | None:
    """Return the split that a name stands for: Training, valid, test_set, train.tar.gz …; None: it is none."""
    match = _SPLIT_NAME.fullmatch(_ARCHIVE_SUFFIX.sub("", normal(name)).strip().casefold())
    return _SPLITS[match[1]] if match else None


def similar_splits(names: Iterable[str]) -> list[str]:
    """Return names that differ only in the split that they contain, and in numbers: 1_train and 2_test."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        text = _CAPITAL.sub("_", _ARCHIVE_SUFFIX.sub("", normal(name))).casefold()
        for match in _SPLIT_PART.finditer(text):
            rest = _NO_LETTERS.sub("", text[: match.start()] + text[match.end() :])
            groups[rest].setdefault(_SPLITS[match[1]], printable(name))
    return next((sorted(group.values()) for group in groups.values() if len(group) > 1), [])


def classes_in(file_names: Iterable[str]) -> list[str]:
    """Return the classes with which file names begin, as in cat.0.jpg and dog-1.jpg; nothing if there are none."""
    matches = [re.match(r"([^\W\d_]+)[ ._-]*\(?\d+\)?\.\w+$", name) for name in file_names]
    counts = Counter(match[1] if match else "" for match in matches)
    return [] if "" in counts or len(counts) < 2 or min(counts.values()) < 2 else sorted(counts)


def is_image(name: str) -> bool:
    """Return whether a file's name ends as those of images do."""
    return _IMAGE.fullmatch(PurePosixPath(name).suffix) is not None


def is_archive(name: str) -> bool:
    """Return whether a file's name ends as those of archives do."""
    return _ARCHIVE.fullmatch(PurePosixPath(name).suffix) is not None


def other_kind(name: str) -> str | None:
    """Return the suffix of a file that is known not to be an image, such as .csv; None: it may be an image."""
    suffix = PurePosixPath(name).suffix
    return suffix.lower() if _ARCHIVE.fullmatch(suffix) or _OTHER.fullmatch(suffix) else None


def never_has_images(folder_name: str) -> bool:
    """Return whether a folder is known to have no images of the user's, such as .git or __MACOSX."""
    name = folder_name.lower()
    return name in _SYSTEM_NAMES or name in _DOT_FOLDERS


def passed_over(parts: tuple[str, ...]) -> tuple[str, int]:
    """Return why a path is passed over, and how many of its parts lead to the cause; ("", 0) if it is not."""
    for position, part in enumerate(parts):
        if part.lower() in _SYSTEM_NAMES:
            return SYSTEM, position + 1
        if part.startswith("."):
            return DOT, position + 1
    return "", 0
