"""`distrain report`: write an HTML page about one or several runs, which needs no network and no other file.

1. `distrain.runs.folder` reads the files of each run
2. `charts`, with `axes`, computes the charts; `checks` compares the files, `epochs` and `origin` make tables
3. `page` fills page.html and charts.html with Jinja, which escapes every name
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from distrain.errors import ConfigError, DataError
from distrain.runs import folder
from distrain.runs.folder import RunRecord
from distrain.tools.report import page

log = logging.getLogger("distrain")


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write OUT/index.html as `compare` does; return the page's path."""
    return compare(runs, out)[0]


def compare(runs: Sequence[Path], out: Path | None = None) -> tuple[Path, str]:
    """Write OUT/index.html.

    Args:
        runs: folders of runs. Several are compared, the best first; those without a run that has started, or with a
            damaged result, are named in a warning and omitted.
        out: folder to write to; None: RUN/report, for a single run only.

    Returns:
        The page's path, and the comparison as text; it is empty for a single run.

    Raises:
        ConfigError: several runs without `out`, a run is given twice, or `out` cannot be written or has a file of this
            name that is no report.
        DataError: a folder does not exist, or none can be shown.
    """
    if out is None and len(runs) > 1:
        raise ConfigError("several runs have no common folder: give one with --out")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is given twice")
    records = page.best_first(_read(runs))
    for problem in [problem for record in records for problem in record.problems]:
        log.warning("%s", problem)
    target = out or runs[0] / folder.REPORT
    try:
        return page.write(records, target), page.as_text(records)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}; choose another --out") from error


def _read(runs: Sequence[Path]) -> list[RunRecord]:
    records = []
    for run in runs:
        try:
            records.append(folder.read_started(run, (folder.RESULT,)))
        except DataError as error:
            if len(runs) == 1 or not run.exists():
                raise
            log.warning("not compared: %s", error)
    if not records:
        raise DataError("none of these folders holds a run that has started")
    return records
