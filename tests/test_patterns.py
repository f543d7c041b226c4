"""Patterns that name tar files, and the folder or address that all of them are below."""

import os
from pathlib import Path
from urllib.parse import unquote

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.shardlists import expand_urls

from distrain.config import Data
from distrain.data.fetch import FetchOptions, Remote, locate
from distrain.errors import ConfigError, DataError
from distrain.preparation import patterns
from distrain.preparation.patterns import common_root, expand

OPTIONS = FetchOptions.of(Data(), cached=False)


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with tar files in it."""
    for name in ("a-2.tar", "a-10.tar", "a-1.tar", "b/c[1].tar", "b/x.tar"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given_patterns", "names"),
    [
        (["a-{2..1}.tar"], ["a-2.tar", "a-1.tar"]),
        (["a-2.tar::b/x.tar", "a-1.tar"], ["a-2.tar", "b/x.tar", "a-1.tar"]),
        (["b/x.tar", "a-*.tar"], ["b/x.tar", "a-1.tar", "a-10.tar", "a-2.tar"]),
        (["a-?.tar"], ["a-1.tar", "a-2.tar"]),
        (["{b/x,a-*}.tar"], ["b/x.tar", "a-1.tar", "a-10.tar", "a-2.tar"]),
        (["b/c[1].tar"], ["b/c[1].tar"]),
        (["b/c[*.tar"], ["b/c[1].tar"]),
        (["b/?[1].tar"], ["b/c[1].tar"]),
        (["**/x.tar"], ["b/x.tar"]),
        (["./b/../b/x.tar"], ["b/x.tar"]),
        (["~/a-1.tar"], ["a-1.tar"]),
    ],
)
def test_local_patterns(tars: Path, given_patterns: list[str], names: list[str]) -> None:
    assert expand(given_patterns) == [str(tars / name) for name in names]


def test_a_file_address_is_a_local_path(tars: Path) -> None:
    assert expand([f"file://{tars}/a-{{1,2}}.tar"]) == [f"{tars}/a-1.tar", f"{tars}/a-2.tar"]


def test_a_file_names_patterns_below_its_folder(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tars / "b/list[1].txt").write_text("# those of b\n\n  x.tar\n../a-{1,2}.tar\ns3://bucket/{0,1}.tar\n*[*.tar\n")
    names = [f"{tars}/b/x.tar", f"{tars}/a-1.tar", f"{tars}/a-2.tar", "s3://bucket/0.tar", "s3://bucket/1.tar"]
    assert expand(["@b/list[1].txt"]) == [*names, f"{tars}/b/c[1].tar"]


def test_the_folder_of_a_pattern_may_have_brackets(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tars / "data[1]"
    folder.mkdir()
    (folder / "x.tar").touch()
    monkeypatch.chdir(folder)
    assert expand(["*.tar"]) == [str(folder / "x.tar")]


@pytest.mark.parametrize(
    "pattern",
    [
        "s3://bucket/train-{000..012}.tar",
        "http://h:8000/a/{x,y{1..2}}.tar::gs://b/c.tar",
        "https://h/{a..c}.tar?token={1}",
        "http://[::1]:80/a-{0..1}.tar",
        r"hf://datasets/u/n/\{a\}.tar",
    ],
)
def test_addresses_are_expanded_as_webdataset_does(pattern: str) -> None:
    expected = expand_urls(pattern) if "[::1]" not in pattern else list(braceexpand(pattern))
    assert expand([pattern]) == expected


REFUSED: dict[str, tuple[list[str], str]] = {
    "none": ([], "no tar files are given; name them"),
    "empty": ([" "], "a pattern is empty; give a path"),
    "ends with ::": (["a-1.tar::"], "a pattern is empty"),
    "missing": (["nope-1.tar"], r"nope-1\.tar: No such file or directory; check the pattern"),
    "no match": (["nope-*.tar"], r"^nope-\*\.tar: matches no file; check the pattern"),
    "a folder": (["b"], r"/b: is a folder; give its tar files: .*/b/\*\.tar"),
    "a pipe": (["pipe.tar"], "is neither a tar file nor a folder"),
    "twice": (["a-1.tar", "a-*.tar"], r"a-1\.tar: is named twice, .* name it once"),
    "twice by a link": (["a-1.tar", "link.tar"], r"link\.tar: is named twice"),
    "address twice": (["http://h/a.tar", "http://h/{a,b}.tar"], r"http://h/a\.tar: is named twice"),
    "a command": (["pipe:cat a.tar"], "pipe: would run a command"),
    "a command among others": (["a-1.tar::PIPE:cat a.tar"], "pipe: would run a command"),
    "chained": (["simplecache::s3://b/a.tar"], "^simplecache::…: chained addresses are not supported"),
    "remote wildcards": (["s3://b/a-*.tar"], "remote folders are not listed; name the files with braces"),
    "http wildcards": (["http://h/a-*.tar"], "remote folders are not listed; name the files with braces"),
    "braces": (["a-{1..2.tar"], r"its braces are not balanced; close each \{"),
    "too many": (["{0..1000000}.tar"], "names more than 1,000,000 tar files"),
    "endless": (["{{0..999999}{0..999999}{0..999999},x}.tar"], "names more than 1,000,000 tar files"),
    "endless digits": (["{0.." + "9" * 5000 + "}.tar"], "more than 1,000,000 tar files|braces"),
    "no list": (["@nope.txt"], "nope.txt: No such file or directory; @ is followed by a text file"),
    "an empty list": (["@empty.txt"], "empty.txt: names no tar files; write one pattern in each line"),
    "a list in a list": (["@nested.txt"], "a file with patterns cannot name another one"),
    "no text": (["@binary.txt"], "is not UTF-8 text"),
    "no home": (["~nobody-here/a.tar"], "no such home folder; write the whole path"),
    "another host's file": (["file://host/a.tar"], "names another host; write file:///"),
    "a fragment": (["http://h/a.tar#1"], "has a fragment"),
    "no file": (["http://h/"], "names no file; give the address of a tar file"),
    "no host": (["s3:///a.tar"], "has an empty part"),
    "an empty part": (["s3://b//a.tar"], "has an empty part"),
    "dots": (["http://h/a/../b.tar"], r"or \. or \.\."),
    "not UTF-8": (["*-latin.tar"], "-latin.tar: its name is not UTF-8 text"),
    "NUL": (["a\0.tar"], "is no pattern"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_patterns_that_cannot_be_used_are_one_message(tars: Path, case: str) -> None:
    os.mkfifo("pipe.tar")
    Path(os.fsdecode(b"\xe9-latin.tar")).touch()
    Path("link.tar").symlink_to("a-1.tar")
    Path("empty.txt").write_text("# nothing\n\n")
    Path("nested.txt").write_text("@empty.txt\n")
    Path("binary.txt").write_bytes(b"\xff\xfe")
    given_patterns, message = REFUSED[case]
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        expand(given_patterns)
    assert "\n" not in str(caught.value)
    assert type(caught.value) in (ConfigError, DataError)


def test_all_patterns_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_TARS", 100)
    assert len(expand(["s3://b/{0..49}.tar", "s3://c/{0..49}.tar"])) == 100
    with pytest.raises(ConfigError, match="the patterns name more than 100 tar files"):
        expand(["s3://b/{0..49}.tar", "s3://c/{0..50}.tar"])


def test_messages_show_no_secrets() -> None:
    secret = "https://user:secret@h/a.tar?token=secret"
    for call in (
        lambda: expand([secret, secret]),
        lambda: expand([f"{secret}#1"]),
        lambda: expand([f"{secret}{{"]),
        lambda: expand([f"a::{secret}"]),
        lambda: expand([f"pipe:curl {secret}"]),
        lambda: expand(["https://user:secret@h/{0..9999999}.tar"]),
        lambda: expand(["s3://user:secret@h/*.tar"]),
        lambda: common_root([secret, "https://user:secret@h/b.tar?token=other"]),
        lambda: common_root([secret, "https://user:secret@i/b.tar?token=secret"]),
    ):
        with pytest.raises((ConfigError, DataError)) as caught:
            call()
        assert "secret" not in str(caught.value)


PIECES = st.recursive(
    st.sampled_from(["a", "0", "b-", "{1..3}", "{3..1..2}", "{01..12..5}", "{a..c}", "{x}", "{}", r"\{", r"\,"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(pattern=PIECES)
def test_the_number_of_names_is_known_before_they_are_made(pattern: str) -> None:
    assert patterns._count(pattern) == len(list(braceexpand(pattern)))


@pytest.mark.parametrize(
    ("names", "root", "below"),
    [
        (["/d/a.tar"], "/d", ["a.tar"]),
        (["/d/x/a.tar", "/d/xy/b.tar", "/d/c.tar"], "/d", ["x/a.tar", "xy/b.tar", "c.tar"]),
        (["/a.tar", "/d/b.tar"], "/", ["a.tar", "d/b.tar"]),
        (["s3://b/p/t/0.tar", "s3://b/p/v/1.tar"], "s3://b/p", ["t/0.tar", "v/1.tar"]),
        (["s3://b/x0/a.tar", "s3://b/x1/a.tar"], "s3://b", ["x0/a.tar", "x1/a.tar"]),
        (["http://h/d/0.tar?t=1/2", "http://h/d/1.tar?t=1/2"], "http://h/d?t=1/2", ["0.tar", "1.tar"]),
        (["HTTP://h:80/0.tar", "http://h:80/1.tar"], "http://h:80", ["0.tar", "1.tar"]),
        (["http://[::1]/0.tar"], "http://[::1]", ["0.tar"]),
        (["gs://b/a?b/0.tar"], "gs://b/a?b", ["0.tar"]),
    ],
)
def test_the_root_is_the_deepest_folder_in_common(names: list[str], root: str, below: list[str]) -> None:
    assert common_root(names) == (root, below)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["/d/a.tar", "s3://b/a.tar"], "some tar files are local and some remote; make one data set of each"),
        (
            ["s3://b/a.tar", "s3://c/a.tar"],
            r"^s3://b/a\.tar and s3://c/a\.tar: are on different hosts; make one data set",
        ),
        (["s3://b/a.tar", "gs://b/a.tar"], "are on different hosts"),
        (["http://h/a.tar", "https://h/a.tar"], "are on different hosts"),
        (["http://h/a.tar?t=1", "http://h/b.tar?t=2"], r"^http://h/b\.tar: has another query .* use one token"),
        (["http://h/a.tar?t=1", "http://h/b.tar"], "has another query"),
    ],
)
def test_tar_files_without_a_common_root_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        common_root(names)


PARTS = st.lists(st.text("ab01-._%[", min_size=1, max_size=4).filter(lambda part: part not in (".", "..")), max_size=4)
HOSTS = st.sampled_from(["http://h", "https://user:pw@h:8000", "http://[::1]:80", "file://"])
QUERIES = st.sampled_from(["", "?token=a/b", "?a=1&b=?"])


@settings(deadline=None, max_examples=200)
@given(host=HOSTS, common=PARTS, paths=st.lists(PARTS.filter(bool), min_size=1, max_size=4), query=QUERIES)
def test_the_root_and_a_name_give_the_tar_file_again(
    host: str, common: list[str], paths: list[list[str]], query: str
) -> None:
    is_local = host == "file://"
    names = ["/".join(["" if is_local else host, *common, *path]) + query * (not is_local) for path in paths]
    root, below = common_root(names)
    assert all(part not in ("", ".", "..") for name in below for part in name.split("/"))
    if is_local:
        assert [os.path.join(root, name) for name in below] == names
    else:
        remote = locate(root, OPTIONS)
        assert isinstance(remote, Remote)
        assert [unquote(remote.url(name)) for name in below] == [unquote(name) for name in names]
    folders = [name.split("/")[0] for name in below if "/" in name]
    assert len(folders) < len(below) or len(set(folders)) > 1  # no deeper folder has all of them
