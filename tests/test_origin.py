"""The origin of an attempt: its command, without secrets, and the git commit of the code."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from distrain.runs import origin


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/usr/bin/distrain", "train", "train.lr=0.1"], "distrain train train.lr=0.1"),
        (["/x/distrain/__main__.py", "train", "run.dir=my runs/1"], "distrain train 'run.dir=my runs/1'"),
        (["sweep.py", "--lr", "0.1"], "python sweep.py --lr 0.1"),
        ([""], "python ''"),
        (["distrain", "data.dir=s3://me:pass@host/data?sig=x"], "distrain data.dir=s3://host/data"),
        (["distrain", "data.dir=https://host/a b?token=x"], "distrain 'data.dir=https://host/a b'"),
        (["distrain", "https://me:pass@host/a b?token=x"], "distrain 'https://host/a b'"),
        (["x.py", "--api-key", "abc", "--token=abc", "b"], "python x.py --api-key hidden --token=hidden b"),
        (["x.py", "password=abc"], "python x.py password=hidden"),
        (["x.py", "a\nb\udcff\x1b[2J"], "python x.py 'a\\nb\\udcff\\x1b[2J'"),
    ],
)
def test_a_command_is_recorded_as_typed_without_its_secrets(arguments: list[str], shown: str) -> None:
    assert origin.command(arguments) == shown


def test_the_commit_of_a_working_tree_is_known_with_its_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        author = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        command = ["git", *author, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert origin.git_commit(tmp_path) is None  # no repository
    git("init", "-q")
    assert origin.git_commit(tmp_path) is None  # no commit
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is not the commit's name")
    (tmp_path / "untracked").mkdir()
    commit = git("rev-parse", "HEAD")
    assert origin.git_commit(tmp_path / "untracked") == (commit, False)
    (tmp_path / "code.py").write_text("2")
    assert origin.git_commit(tmp_path) == (commit, True)


def test_without_git_or_an_answer_in_time_no_commit_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin.git_commit(tmp_path) is None  # it cannot be executed
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    monkeypatch.setattr(origin, "_GIT_SECONDS", 0.2)
    start = time.monotonic()
    assert origin.git_commit(tmp_path) is None
    assert time.monotonic() - start < 10
