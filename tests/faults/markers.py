"""Markers in the code, `# guard: NAME`, and the removal of the statements that carry them.

A marker is a trailing comment on the first line of a statement, or on its last one. It marks the innermost such
statement.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

_MARKER = re.compile(r"# guard: ([a-z0-9-]+)")


@dataclass(frozen=True)
class Marked:
    """A marked statement.

    Attributes:
        file: path of its file, relative to the repository.
        text: text of the whole file.
        statement: the statement.
    """

    file: str
    text: str
    statement: ast.stmt

    @property
    def source(self) -> str:
        """Source of the statement."""
        return ast.get_source_segment(self.text, self.statement) or ""


@dataclass(frozen=True)
class Removal:
    """A way to remove a guard: the marked statement, or the condition of its `if` or `while`, becomes `text`."""

    text: str
    of_condition: bool = False

    def apply(self, marked: Marked) -> str:
        """Return the text of the file without the guard."""
        node: ast.stmt | ast.expr = marked.statement
        if self.of_condition:
            assert isinstance(marked.statement, ast.If | ast.While), f"{marked.file}: no condition: {marked.source}"
            node = marked.statement.test
        assert node.end_lineno is not None
        lines = marked.text.encode().splitlines(keepends=True)  # columns of ast are counted in bytes
        first, last = node.lineno - 1, node.end_lineno - 1
        text = self.text.replace("\n", "\n" + " " * marked.statement.col_offset)
        middle = lines[first][: node.col_offset] + text.encode() + lines[last][node.end_col_offset :]
        return b"".join([*lines[:first], middle, *lines[last + 1 :]]).decode()


DROP = Removal("pass")
NEVER = Removal("False", of_condition=True)
ALWAYS = Removal("True", of_condition=True)


def replace(text: str) -> Removal:
    """Replace the marked statement by others."""
    return Removal(text)


def condition(text: str) -> Removal:
    """Replace the condition of the marked `if` or `while`."""
    return Removal(text, of_condition=True)


def find(repo: Path, folder: str = "distrain") -> dict[str, Marked]:
    """Return the marked statements of a folder, by the names of their markers."""
    marked: dict[str, Marked] = {}
    for path in sorted((repo / folder).rglob("*.py")):
        text = path.read_text()
        if not _MARKER.search(text):
            continue
        statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type != tokenize.COMMENT or not (match := _MARKER.search(token.string)):
                continue
            file, line, name = str(path.relative_to(repo)), token.start[0], match[1]
            here = [node for node in statements if line in (node.lineno, node.end_lineno)]
            assert here, f"{file}:{line}: no statement begins or ends at the marker {name}"
            assert name not in marked, f"{file}:{line}: the marker {name} is in {marked[name].file} too"
            marked[name] = Marked(file, text, max(here, key=lambda node: (node.lineno, node.col_offset)))
    return marked
