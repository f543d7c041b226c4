"""`distrain report`: write an HTML page about one or several runs, which needs no network, and its charts as PNG files.

1. `distrain.runs.folder` reads the files of each run
2. `charts` draws the charts with matplotlib, in a light and a dark theme
3. `page` fills page.html with Jinja, which escapes every name
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from distrain.errors import ConfigError
from distrain.runs import folder
from distrain.tools.report import page

log = logging.getLogger("distrain")


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write OUT/index.html and OUT/*.png.

    Args:
        runs: folders of runs; several are compared.
        out: folder to write to; None: RUN/report, for a single run only.

    Returns:
        The page's path.

    Raises:
        ConfigError: several runs without `out`, a run is given twice, or `out` cannot be written or has files of these
            names that are no report.
        DataError: a folder holds no run, its run has not started, or its result is damaged.
    """
    if out is None and len(runs) > 1:
        raise ConfigError("several runs have no common folder: give one with --out")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is given twice")
    records = [folder.read_started(run, (folder.RESULT,)) for run in runs]
    for problem in [problem for record in records for problem in record.problems]:
        log.warning("%s", problem)
    target = out or runs[0] / folder.REPORT
    try:
        return page.write(records, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}; choose another --out") from error
