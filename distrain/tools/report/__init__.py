"""`distrain report`: write an HTML page about one or several runs, which needs no network, and its charts as PNG files.

1. `distrain.runs.folder` reads the files of each run
2. `charts` draws the charts with matplotlib, in a light and a dark theme
3. `page` fills page.html with Jinja, which escapes every name
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
        out: folder to write to; None: RUN/report, for a single run only.

    Returns:
        The page's path.

    Raises:
        ConfigError: several runs without `out`, a run is given twice, or `out` cannot be written.
        DataError: a folder holds no run, or its run has not started.
    """
    if out is None and len(runs) > 1:
        raise ConfigError("several runs have no common folder: give one with --out")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is given twice")
    records = [folder.read_started(run) for run in runs]
    target = out or runs[0] / folder.REPORT
    try:
        target.mkdir(parents=True, exist_ok=True)
        return page.write(records, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}; choose another --out") from error
