"""Outputs that cannot be written, and messages: commands as real processes, whose exit codes stay those documented."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import terminal
from PIL import Image
from tqdm import tqdm

from distrain import cli, console, progress
from distrain.errors import DataError
from distrain.tools import status

TESTS = Path(__file__).parent
ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
OUTPUTS: dict[str, tuple[str, dict[str, str]]] = {
    "stdin closed": ("<&-", {}),
    "stdout closed": (">&-", {}),
    "stderr closed": ("2>&-", {}),
    "all closed": ("<&- >&- 2>&-", {}),
    "full": ("> /dev/full 2>&1", {}),
    "full, unbuffered": ("> /dev/full", {"PYTHONUNBUFFERED": "1"}),
    "reader gone": (">&GONE 2>&1", {}),
    "read-only": ("1< /dev/null 2>&1", {}),
    "ascii": ("", ASCII),
    "C locale": ("", C_LOCALE),
    "narrow": ("", {"COLUMNS": "20"}),
}
PREPARE = "prepare synthetic --samples 40 --test-samples 10 --image-size 8 --lanes 2 --shards 2 --out OUT"
PREDICT = "predict RUN IMAGE"
COMMANDS = {
    "config": (0, "log:"),
    "--help": (0, "Usage: distrain"),
    "status RUN": (0, "step"),
    PREPARE: (0, "OUT: train"),
    PREDICT: (0, "bär"),
    "status nowhere": (78, ""),
}
SLOW = {PREPARE: ("all closed", "full", "reader gone"), PREDICT: ("all closed", "full", "ascii", "C locale")}
"""Commands that import torch, with these outputs only: streams are set up before the command is known."""
ONLY_ON_STDOUT = ("config", "status RUN", PREDICT)
"""Commands whose answer is nowhere else: they fail if the disk that it should be kept on is full."""
WORST = "<&- > /dev/full 2>&-"
KEYS = "data.dir=DATA run.dir=OUT train.max_steps=3 train.global_batch_size=8 model.name=models_for_tests:Faulty"
OTHERS = {
    "--version": (0, ""),
    "train --help": (0, ""),
    "verify DATA": (0, ""),
    "status RUN --json": (78, ""),
    "no-such-command": (78, ""),
    "train train.lrr=1": (78, ""),
    f"train {KEYS}": (0, "OUT/report/index.html"),
    "evaluate RUN": (0, "RUN/evaluations/test-step-00000004.json"),
    "export RUN --out OUT.pt2": (0, "OUT.pt2"),
    "report RUN --out OUT": (0, "OUT/index.html"),
    "wandb RUN --mode offline --out OUT": (0, "OUT/wandb"),
    f"doctor {KEYS}": (0, ""),
    f"FAULT=raise:0:4 train {KEYS}": (1, ""),
    f"FAULT=stop:0:4 train {KEYS} checkpoint.every_steps=1": (75, "OUT/checkpoints"),
}
LAUNCHED = {
    f"launch --nproc 2 -- train {KEYS}": (0, "OUT/report/index.html"),
    f"FAULT=raise:1:4 launch --nproc 2 -- train {KEYS}": (1, "OUT/exit.json"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run whose data has a class that ASCII cannot write, its data and one of its images."""
    folder = tmp_path_factory.mktemp("console")
    for split, count in (("train", 20), ("test", 4)):
        for kind, colour in (("bär", 40), ("two", 200)):
            (folder / "images" / split / kind).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (16, 16), (colour, 10 * number, 0))
                image.save(folder / "images" / split / kind / f"{number}.png")
    data, run, shape = folder / "data", folder / "run", ["--image-size", "16", "--lanes", "2", "--shards", "2"]
    assert cli.main(["prepare", "folder", str(folder / "images"), *shape, "--out", str(data)]) == 0
    keys = [f"data.dir={data}", f"run.dir={run}", "train.max_steps=4", "train.global_batch_size=8", "log.report=false"]
    assert cli.main(["train", *keys]) == 0
    return {"DATA": str(data), "RUN": str(run), "IMAGE": str(folder / "images/test/bär/0.png")}


def fill_in(text: str, paths: dict[str, str]) -> str:
    return re.sub("|".join(paths), lambda match: paths[match[0]], text)


def run(
    arguments: str, output: str, environ: dict[str, str], paths: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[bytes]:
    """A command with its standard streams redirected, as a shell does it; `>&GONE` is a pipe without a reader."""
    fault, _, rest = (
        arguments.rpartition("FAULT=")[2].partition(" ") if arguments.startswith("FAULT=") else ("", "", arguments)
    )
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [fill_in(argument, paths) for argument in rest.split()]
    try:
        return subprocess.run(
            ["bash", "-c", f'exec "$@" {output.replace("GONE", str(writer))}', "bash",
             sys.executable, "-m", "distrain", *arguments],
            env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1",
                 **({"FAULT": fault} if fault else {}), **environ},
            capture_output=True, pass_fds=[writer], cwd=cwd, timeout=200, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("command", "output"),
    [(command, output) for command in COMMANDS for output in SLOW.get(command, OUTPUTS)],
)
def test_no_output_changes_the_exit_code_unless_the_answer_is_lost_on_a_full_disk(
    command: str, output: str, paths: dict[str, str], tmp_path: Path
) -> None:
    code, text = COMMANDS[command]
    redirection, environ = OUTPUTS[output]
    if command in ONLY_ON_STDOUT and "/dev/full" in redirection:
        code = 78
    done = run(command, redirection, environ, {**paths, "OUT": str(tmp_path / "out")}, tmp_path)
    encoding = "ascii" if environ in (ASCII, C_LOCALE) else "utf-8"
    stdout, stderr = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == code, stderr
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    if (
        "1" not in redirection
        and ">" not in redirection.replace("2>", "")
        and not (environ == C_LOCALE and "bär" in text)
    ):
        shown = fill_in(text, {"OUT": str(tmp_path / "out")})
        assert shown.encode(encoding, "backslashreplace").decode(encoding) in stdout
        assert bool(stdout) == (code == 0)
    if "2" not in redirection:
        assert bool(stderr) == (code != 0)
        assert ("to standard output: No space left on device" in stderr) == (code == 78 and command in ONLY_ON_STDOUT)
    if "prepare" in command:  # and nothing that was printed went into a shard
        assert cli.main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("command", OTHERS)
def test_commands_that_work_without_any_output(command: str, paths: dict[str, str], tmp_path: Path) -> None:
    check_worst(command, *OTHERS[command], paths, tmp_path)


@pytest.mark.ranks
@pytest.mark.parametrize("command", LAUNCHED)
def test_launched_commands_work_without_any_output(command: str, paths: dict[str, str], tmp_path: Path) -> None:
    check_worst(command, *LAUNCHED[command], paths, tmp_path)
    if (tmp_path / "out/exit.json").exists():
        assert json.loads((tmp_path / "out/exit.json").read_text())["code"] == LAUNCHED[command][0]


def check_worst(command: str, code: int, result: str, paths: dict[str, str], folder: Path) -> None:
    positions = {**paths, "OUT": str(folder / "out")}
    done = run(command, WORST, {**ASCII, "COLUMNS": "20"}, positions, folder)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")
    assert Path(fill_in(result, positions)).exists()


@pytest.mark.parametrize(("command", "columns"), [
    ("--help", 0), ("--help", 20), ("status RUN", 0), ("status RUN", 20),
    (f"train {KEYS} log.every_steps=1 log.report=false", 0),
    ("prepare synthetic --samples 40 --test-samples 10 --lanes 1 --out OUT", 20),
])  # fmt: skip
def test_a_narrow_terminal(command: str, columns: int, paths: dict[str, str], tmp_path: Path) -> None:
    arguments = [fill_in(argument, {**paths, "OUT": str(tmp_path / "out")}) for argument in command.split()]
    code, shown = terminal.run(arguments, columns, tmp_path)
    assert code == 0, shown.decode()
    assert shown
    assert b"Traceback" not in shown


@pytest.mark.parametrize(("columns", "notes"), [(80, r"  [\d:]+ left  loss \d\.\d{4}"), (40, "")])
def test_a_bar_fits_the_terminal_and_ctrl_c_leaves_one(
    columns: int, notes: str, paths: dict[str, str], tmp_path: Path
) -> None:
    long = "train.max_steps=1000000 eval.every_steps=0 checkpoint.every_steps=0 log.every_steps=10"
    keys = fill_in(KEYS, {**paths, "OUT": str(tmp_path / "out")}).replace("train.max_steps=3", long).split()
    interrupt = rb"\| +\d\d+/1,?000,?000" + (rb"[^\r]*loss" if notes else b"")
    code, shown = terminal.run(["train", *keys], columns, tmp_path, interrupt)
    bars = [line for line in terminal.screen(shown, columns) if line.startswith("train") and "%|" in line]
    assert len(bars) == 1, bars
    assert code == 75, shown.decode()
    match = re.match(rf"train   0%\|(.+)\| +\d+/1,000,000{notes}", bars[0])
    assert match, bars
    assert len(match[1]) >= (10 if columns == 80 else 4)
    assert re.search("(?m)^distrain: stopped by SIGINT: step ", shown.decode().replace("\r\n", "\n"))


@pytest.mark.parametrize("columns", [10, 20, 40, 80, 120, 400])
@pytest.mark.parametrize("total", [1, 60, 1872, 90_000_000])
def test_a_bar_drops_its_last_notes_first(columns: int, total: int) -> None:
    notes = ["12:34:56 left", "loss 0.1234", "10,000,000 images/s", "lr 0.000123"]
    line = progress.bar_format(columns, "train", total // 2, total, notes)
    head, _, tail = line.partition("{bar}")
    shown = [note for note in notes if note in line]
    assert shown == notes[: len(shown)]
    assert (len(shown) == 4) == (columns > 100)
    if columns >= 20:
        assert columns - len(head) - len(tail) >= columns // 8
    if columns >= 80:
        assert f"{total // 2:,}/{total:,}" in line


def say(text: str = "a message", level: int = logging.INFO) -> None:
    logging.getLogger("distrain.data.fetch").log(level, text)


def test_messages_have_their_level_in_front(capsys: pytest.CaptureFixture[str]) -> None:
    with console.logging_to_stderr():
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            say(level=level)
        console.set_level("debug")
        say(level=logging.DEBUG)
        console.set_level("error")
        say(level=logging.WARNING)
    assert capsys.readouterr() == ("", "a message\nwarning: a message\nerror: a message\ndebug: a message\n")


@pytest.mark.parametrize(("size", "prefix"), [("1", ""), ("2", "[rank 1] "), ("", "")])
def test_messages_have_the_rank_in_front_where_there_are_several(
    size: str, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_run(*_: Any) -> None:
        say("a message\nof two lines")
        say(level=logging.WARNING)
        raise DataError("no run")

    monkeypatch.setattr(cli, "_load_run", load_run)
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "1" if size == "2" else "")
    assert cli.main(["evaluate", "runs/any"]) == 78
    expected = f"{prefix}a message\n{prefix}of two lines\n{prefix}warning: a message\ndistrain: error: no run\n"
    assert capsys.readouterr().err == expected


def test_a_variable_that_is_no_number_is_a_mistake(paths: dict[str, str], tmp_path: Path) -> None:
    done = run(f"train {KEYS}", "", {"WORLD_SIZE": "many"}, {**paths, "OUT": str(tmp_path / "out")}, tmp_path)
    assert done.returncode == 78
    assert done.stderr.startswith(b"distrain: error: the environment variable WORLD_SIZE='many' is not")
    assert run("config", "", {"WORLD_SIZE": "many"}, paths, tmp_path).returncode == 0  # it works alone


def test_a_level_of_the_configuration_hides_messages(
    paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = fill_in(KEYS, {**paths, "OUT": str(tmp_path / "out")}).split()
    assert cli.main(["train", *keys, "log.level=error", "log.report=false"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Finished Training" in shown.out


def test_a_progress_bar_is_not_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.logging_to_stderr(), tqdm(total=3, file=terminal, ncols=40) as bar:
        for _ in range(3):
            bar.update()
            say("between")
    lines = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]
    assert lines.count("between") == 3


def test_commands_leave_no_handler_behind(paths: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("distrain")
    before = (list(logger.handlers), logger.level, logger.propagate)
    for _ in range(2):
        assert cli.main(["status", paths["RUN"]]) == 0
        assert (logger.handlers, logger.level, logger.propagate) == before
    capsys.readouterr()
    with console.logging_to_stderr(), console.logging_to_stderr():
        say()
    assert capsys.readouterr().err == "a message\n"
    assert (logger.handlers, logger.level, logger.propagate) == before


def test_a_handler_of_a_library_shows_no_message_twice(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.root.addHandler(handler)
    try:
        with console.logging_to_stderr():
            say()
    finally:
        logging.root.removeHandler(handler)
    assert capsys.readouterr().err == "a message\n"


def test_python_code_captures_messages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distrain"):
        say()
    assert caplog.messages == ["a message"]


class _Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stream", [None, _Broken()])
def test_messages_that_cannot_be_written_are_dropped(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with console.logging_to_stderr():
        say()


def test_a_message_with_wrong_arguments_is_still_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with console.logging_to_stderr():
        logging.getLogger("distrain").warning("%d images", "many")
    assert capsys.readouterr().err == "warning: %d images ('many',)\n"


def test_a_printed_line_survives_a_kill() -> None:
    code = "import os; from distrain import console; console.set_up(); print('a line'); os.kill(os.getpid(), 9)"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == "a line\n"


def test_a_slow_reader_of_a_non_blocking_pipe_gets_everything(tmp_path: Path) -> None:
    text = "×" * 200_000  # more than a pipe holds
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with (tmp_path / "read").open("wb") as file:
        slow = subprocess.Popen(["bash", "-c", "sleep 0.2; exec cat"], stdin=reader, stdout=file)
    os.close(reader)
    out = console._TolerantText(io.BufferedWriter(console._TolerantFile(writer, "wb", closefd=False)), "utf-8")
    print(text, file=out, flush=True)
    out.close()
    print("still open", file=out, flush=True)
    os.close(writer)
    assert slow.wait(60) == 0
    assert (tmp_path / "read").read_text() == f"{text}\nstill open\n"


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), EOFError("a short file")])
def test_an_error_of_a_socket_or_file_is_a_fault(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr(status, "run_status", fail)
    assert cli.main(["status", "runs/any"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert type(error).__name__ in shown
