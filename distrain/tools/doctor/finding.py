"""The result of one check of `distrain doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    subject: str
    level: Level
    message: str
    cure: str = ""
    """The cure, unless `level` is ok."""

    @property
    def line(self) -> str:
        """The finding as text for people."""
        cure = f"\n{'':20}→ {self.cure}" if self.cure and self.level != "ok" else ""
        return f"  {self.level:4}  {self.subject:11} {self.message}{cure}"
