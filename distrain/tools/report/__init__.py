"""`distrain report`: one HTML page of runs, which opens from disk without any network, and its charts as PNG files.

1. `distrain.runs.folder` reads what each run has written down
2. `charts` draws them, by matplotlib, in light and in dark
3. `page` fills page.html by Jinja, which escapes every name
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distrain.errors import ConfigError
from distrain.runs import folder
from distrain.tools.report import page


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write OUT/index.html and OUT/*.png.

    Args:
        runs: folders of runs; several are compared.
        out: folder to write to; of one run, None means RUN/report.

    Returns:
        The page's path.

    Raises:
        ConfigError: several runs and no `out`, a run named twice, or `out` cannot be written.
        DataError: a folder holds no run, or its run has not begun.
    """
    if out is None and len(runs) > 1:
        raise ConfigError("several runs have no folder of their own: say where to, with --out")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice")
    records = [folder.read_begun(run) for run in runs]
    target = out or runs[0] / folder.REPORT
    try:
        target.mkdir(parents=True, exist_ok=True)
        return page.write(records, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}; choose another --out") from error
