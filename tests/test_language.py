"""Check the project's language: no replaced word in names or prose; docstrings that begin with a sentence.

`python tests/test_language.py [PATH…]` prints the violations of these files and folders, or of the whole project.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
PYTHON = ("distrain", "benchmarks", "examples", "tests", "docs")
PROSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "Dockerfile", "pyproject.toml", ".ci/run")
PROSE_FOLDERS = ("docs", "launch", "configs", "k8s", "distrain")
PROSE_SUFFIXES = {".md", ".yaml", ".sbatch", ".sh", ".html", ".toml"}

NAMES = {
    "asked": "requested",
    "beacon": "worker status",
    "book": "exit record",
    "couple": "sync_batch_norm",
    "coupled": "sync_batch_norm",
    "found": "name what it is: manifest, matches",
    "hear": "read the error record",
    "heard": "error record",
    "held": "cache",
    "kept": "retained, cache",
    "life": "attempt",
    "lives": "attempts",
    "meeting": "collective",
    "meetings": "collectives",
    "notice": "error record",
    "notices": "peer store",
    "own": "local",
    "passes": "accumulation steps",
    "place": "position, device, path",
    "places": "positions, devices, paths",
    "scored": "eval model",
    "settle": "warm up",
    "settled": "warmed up",
    "share": "local batch",
    "shares": "local batch sizes",
    "told": "message",
    "wanted": "required, requested",
    "watch": "watchdog",
    "word": "text, random bits",
    "words": "text, random bits",
}
"""Parts of names (between underscores and capital letters) that were replaced, and what to say instead."""

MODULES = {"nodes": "cluster", "output": "console", "trained": "loaded_model"}
"""Names of modules and classes that were replaced, and what to say instead."""

PHRASES = {
    r"anew": "again, re-initialised",
    r"beacons?": "worker status",
    r"coupl(?:e|es|ed)": "sync_batch_norm",
    r"(?:go|goes|going|gone|went) on": "resume, continue",
    r"(?:get|gets|got|gotten) wrong": "misclassified",
    r"(?:hear|hears|heard)": "read, receive",
    r"(?:leave|leaves|left|leaving) (?:a |no )?word": "record the error",
    r"(?:leave|leaves|left|leaving) out": "drop, omit",
    r"(?:lies|lays)": "is, puts",
    r"(?:life|lives)": "attempt",
    r"meetings?": "collective, rendezvous",
    r"notices?": "error record, detects",
    r"settl(?:e|es|ed|ing)": "warm up",
    r"stands? in": "is in",
    r"surest": "most confident",
    r"taken for": "predicted as",
    r"told": "report, message",
    r"(?:random|raw) words": "random bits",
    r"empty shares?": "empty local batch",
    r"where (?:they|all|processes) meet": "rendezvous",
}
"""Phrases of prose that were replaced (regular expressions; a space is any white space), and what to say instead."""

FRAGMENT = re.compile(
    r"(?:What|How|Of|By|As|Where|When|While|Who|Whom|Whose|Which|That|So|Or|And|But|Nor|From|For|With|Without|To|In|Into"
    r"|At|On|If|Until|Because|Than|Then|Whatever|Whoever|Whichever|Wherever|Besides?|Between|Through|Under|Over|Per|Via"
    r"|After|Before|Since|Those|These|Them|Their|Its|It|They|Such|Only|Not|Also|Else)\b"
)
"""Words with which the first line of a docstring does not begin: what follows is a fragment."""

PRODUCT = re.compile(r"(?:accelerate|distrain|torch|torchrun|torchvision|wandb)\b")
"""Products whose names begin with a small letter."""

ALLOWED: dict[tuple[str, str], str] = {}
"""Exceptions, at most ten: (file, phrase) and the reason."""

SELF = REPO / "tests/test_language.py"
_PATTERNS = [
    (re.compile(r"(?<![A-Za-z])" + phrase.strip().replace(" ", r"\s+(?:#\s*)?") + r"(?![A-Za-z])", re.IGNORECASE), hint)
    for phrase, hint in PHRASES.items()
]


class Violation(NamedTuple):
    """One word or line to be changed."""

    file: str
    line: int
    phrase: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.phrase}: {self.text}"


def parts(name: str) -> list[str]:
    """The lower-case words of a name in snake case or camel case."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each name that a file defines; names that it only uses belong to whoever defines them."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield getattr(node, "lineno", 0), node.asname
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.lineno, node.name


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each string that is a statement: docstrings, those of attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each block of comments; consecutive lines are one text."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    comment_lines = [(token.start[0], token.string) for token in tokens]
    for _, block in groupby(enumerate(comment_lines), key=lambda item: item[1][0] - item[0]):
        lines = [line for _, line in block]
        yield lines[0][0], "\n".join(text for _, text in lines)


def in_prose(file: str, line: int, text: str) -> Iterator[Violation]:
    """The replaced phrases in a text that begins in this line of a file."""
    for pattern, hint in _PATTERNS:
        for match in pattern.finditer(text):
            start = text.rfind("\n", 0, match.start()) + 1
            end = text.find("\n", match.end())
            shown = " ".join(text[start : end if end >= 0 else None].split())
            phrase = " ".join(match[0].split()).lower()
            yield Violation(file, line + text.count("\n", 0, match.start()), phrase, f"[{hint}] {shown[:100]}")


def in_names(file: str, tree: ast.AST) -> Iterator[Violation]:
    """The replaced words in the names that a file defines, and in its own."""
    stem = Path(file).stem
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for name in {stem, *classes}:
        if name.lower() in MODULES:
            yield Violation(file, 1, name, f"[{MODULES[name.lower()]}] the name {name}")
    for line, name in [(1, stem), *sorted(set(bound_names(tree)))]:
        if name.startswith("test_"):  # a sentence
            yield from in_prose(file, line, name.replace("_", " "))
            continue
        for part in parts(name):
            if part in NAMES:
                yield Violation(file, line, part, f"[{NAMES[part]}] the name {name}")


def in_docstrings(file: str, tree: ast.AST) -> Iterator[Violation]:
    """Docstrings whose first line is neither a sentence nor a noun phrase."""
    for line, text in docstrings(tree):
        first = text.strip().partition("\n")[0].strip()
        initial = re.match(r"[A-Z0-9`'\"(\[{<*$]|\S*\w[/.=_]\w", first) or PRODUCT.match(first)
        for problem, applies in (
            ("the first sentence does not end in this line", not re.search(r"[.:…?!][)”\"'`]*$", first)),
            ("begins with a small letter", not initial),
            (f"begins with {first.partition(' ')[0]}", FRAGMENT.match(first)),
            ("one word", " " not in first),
        ):
            if applies:
                yield Violation(file, line, "docstring", f"[{problem}] {first[:100]}")


def in_python(path: Path, file: str) -> Iterator[Violation]:
    """All violations of a Python file."""
    tree = ast.parse(path.read_text())
    yield from in_names(file, tree)
    yield from in_docstrings(file, tree)
    if path == SELF:  # its patterns are such phrases
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from in_prose(file, node.lineno, node.value)
    for line, text in comments(path):
        yield from in_prose(file, line, text)


def files() -> list[Path]:
    """All files of the project that people read."""
    python = [path for folder in PYTHON for path in (REPO / folder).rglob("*.py")]
    prose = [path for folder in PROSE_FOLDERS for path in (REPO / folder).rglob("*") if path.suffix in PROSE_SUFFIXES]
    return sorted({*python, *prose, *(REPO / name for name in PROSE)})


@functools.cache
def violations(path: Path) -> frozenset[Violation]:
    """All violations in a file, those that are allowed too."""
    file = path.relative_to(REPO).as_posix()
    return frozenset(in_python(path, file) if path.suffix == ".py" else in_prose(file, 1, path.read_text()))


def not_allowed(paths: list[Path]) -> list[Violation]:
    """All violations in these files that are not allowed, in the order of files and lines."""
    every = sorted(one for path in paths for one in violations(path))
    return [one for one in every if (one.file, one.phrase) not in ALLOWED]


def report(listed: list[Violation]) -> str:
    """The violations as lines, with the number of each phrase at the end."""
    counts: dict[str, int] = {}
    for one in listed:
        counts[one.phrase] = counts.get(one.phrase, 0) + 1
    summary = ", ".join(f"{phrase} {count}" for phrase, count in sorted(counts.items(), key=lambda item: -item[1]))
    return "\n".join([*map(str, listed), f"{len(listed)} in {len({one.file for one in listed})} files: {summary}"])


def test_names_and_prose_use_none_of_the_replaced_words() -> None:
    wrong = [one for one in not_allowed(files()) if one.phrase != "docstring"]
    assert not wrong, report(wrong)


def test_docstrings_begin_with_a_sentence_or_a_noun_phrase() -> None:
    wrong = [one for one in not_allowed(files()) if one.phrase == "docstring"]
    assert not wrong, report(wrong)


def test_exceptions_are_few_and_used() -> None:
    assert len(ALLOWED) <= 10
    assert all(ALLOWED.values())
    assert set(ALLOWED) <= {(one.file, one.phrase) for path in files() for one in violations(path)}


if __name__ == "__main__":
    chosen = [Path(argument).resolve() for argument in sys.argv[1:]]
    unread = [path for path in files() if not chosen or any(path.is_relative_to(one) for one in chosen)]
    print(report(not_allowed(unread)))
