"""One tar file of a WebDataset: the same samples as webdataset reads, and refusals of what it reads only in part."""

import functools
import gzip
import hashlib
import io
import struct
import subprocess
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import webdataset as wds
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from distrain.data.pillow import Decoding, UnreadableError, header_size
from distrain.errors import ConfigError, DataError, UnreachableError
from distrain.preparation import tars
from distrain.preparation.tars import Contents, Fields

FIELDS = Fields.parse("jpg;jpeg;png", "cls")
DECODING = Decoding()
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
ORIENTATION = 0x0112


@functools.cache
def image(height: int = 6, width: int = 8, kind: str = "JPEG", orientation: int = 1, shade: int = 0) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation != 1:
        exif[ORIENTATION] = orientation
    Image.new("RGB", (width, height), (shade, 0, 0)).save(file, kind, exif=exif)
    return file.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pack(members: list[tuple[str | tarfile.TarInfo, bytes]], kind: str = "pax", comment: str | None = None) -> bytes:
    """A tar file of (name or TarInfo, content); `comment` makes a global header, in the pax format."""
    file = io.BytesIO()
    headers = {"comment": comment} if comment and kind == "pax" else None
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind], pax_headers=headers) as archive:
        for name, content in members:
            info = member(name) if isinstance(name, str) else name
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def pairs(*keys: str) -> list[tuple[str | tarfile.TarInfo, bytes]]:
    return [
        each for number, key in enumerate(keys) for each in ((f"{key}.jpg", image()), (f"{key}.cls", b"%d" % number))
    ]


class Slow(io.RawIOBase):
    """A stream as of a network: it cannot seek, and returns less than it could."""

    def __init__(self, data: bytes) -> None:
        self._rest, self._is_read = memoryview(data), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), len(self._rest), 1 + len(self._rest) % 7001 if self._is_read else 1)
        self._is_read = True
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def read(data: bytes, fields: Fields = FIELDS, slow: bool = False, decoding: Decoding = DECODING) -> Contents:
    return tars.read(Slow(data) if slow else io.BytesIO(data), "a.tar", fields, decoding, lambda size: None)


def as_read(data: bytes, contents: Contents) -> list[tuple[int, bytes, int | str]]:
    """(digest of the key, image, label) of each sample."""
    offsets, sizes = contents.samples["offset"].tolist(), contents.samples["bytes"].tolist()
    images = [data[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    assert contents.samples["digest"].tolist() == [xxhash.xxh3_64_intdigest(each) for each in images]
    assert contents.samples["id"].tolist() == list(range(len(images)))
    assert (contents.samples["label"] == -1).all()
    return list(zip(contents.keys.tolist(), images, contents.labels, strict=True))


def by_webdataset(path: Path) -> list[dict[str, Any]]:
    return list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))


def complete(samples: list[dict[str, Any]]) -> Iterator[tuple[int, bytes, int | str]]:
    """(digest of the key, image, label) of webdataset's samples that have both."""
    for sample in samples:
        extension = next((each for each in FIELDS.image if each in sample), None)
        if extension is not None and "cls" in sample:
            yield xxhash.xxh3_64_intdigest(sample["__key__"].encode()), sample[extension], int(sample["cls"])


FOLDERS = st.sampled_from(["", "./", "n01/", "v1.0/", "a/b.c/", "/", "ü/", "long/" * 25, "x" * 120 + "/"])
NAMES = st.one_of(
    st.text("abAB01-", min_size=1, max_size=3), st.sampled_from(["ä", "y" * 130, "__m__", ".hidden", "a b"])
)
EXTENSIONS = st.sets(
    st.sampled_from(["jpg", "JPG", "jpeg", "png", "cls", "CLS", "json", "x.jpg", "seg.png", "", "Txt"]), max_size=5
)
SPECIAL = {
    "a folder": member("n01", tarfile.DIRTYPE),
    "a hard link": member("h.jpg", tarfile.LNKTYPE, "a.jpg"),
    "a symbolic link": member("s.jpg", tarfile.SYMTYPE, "a.jpg"),
    "a pipe": member("p.jpg", tarfile.FIFOTYPE),
    "no field": member("README"),
    "meta": member("__meta__/a.jpg"),
}


class Plan(NamedTuple):
    """Members of a tar file: keys of SPECIAL, or names."""

    members: list[str]
    kind: str
    comment: str | None

    def pack(self) -> bytes:
        members: list[tuple[str | tarfile.TarInfo, bytes]] = []
        for number, name in enumerate(self.members):
            is_image = name.lower().endswith(("jpg", "jpeg", "png"))
            content = b"" if name in SPECIAL else image(shade=number) if is_image else b" %d\n" % number
            members.append((SPECIAL.get(name, name), content))
        try:
            return pack(members, self.kind, self.comment)
        except ValueError:  # a name is too long for ustar
            return pack(members, "gnu")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    members: list[str] = []
    for _ in range(draw(st.integers(0, 6))):
        key, extensions = draw(FOLDERS) + draw(NAMES), draw(EXTENSIONS | st.just({"jpg", "cls"}))
        members += [f"{key}.{extension}" for extension in draw(st.permutations(sorted(extensions)))]
        if draw(st.booleans()):
            members.insert(draw(st.integers(0, len(members))), draw(st.sampled_from(sorted(SPECIAL))))
    return Plan(members, draw(st.sampled_from(sorted(FORMATS))), draw(st.sampled_from([None, "c" * 600])))


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """The result of a function, and the text of its error."""
    try:
        return function(), ""
    except (ValueError, tarfile.ReadError) as error:
        return None, str(error)


@settings(deadline=None, max_examples=200)
@given(plan=plans(), slow=st.booleans(), chunk=st.sampled_from([600, 1024, 2**20]))
def test_the_samples_are_those_of_webdataset(tmp_path_factory: Any, plan: Plan, slow: bool, chunk: int) -> None:
    data = plan.pack()
    path = tmp_path_factory.getbasetemp() / "any.tar"
    path.write_bytes(data)
    samples, webdataset_error = attempt(lambda: by_webdataset(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tars, "_CHUNK_BYTES", chunk)
        contents, error = attempt(lambda: read(data, slow=slow))
    if "duplicate file name" in webdataset_error or "is the second" in error:
        # Halves of a sample may come first.
        assert "duplicate file name" in webdataset_error
        assert "is the second" in error or "not adjacent" in error
    elif webdataset_error:
        assert (plan.members, "has a damaged header" in error) == ([], True)  # nothing behind a global header
    elif error:
        assert "not adjacent" in error
        images = {each["__key__"] for each in samples if set(each) & set(FIELDS.image) and "cls" not in each}
        labels = {each["__key__"] for each in samples if "cls" in each and not set(each) & set(FIELDS.image)}
        assert images & labels
    else:
        assert as_read(data, contents) == list(complete(samples))
        assert (contents.bytes, contents.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert len(contents.labels) + incomplete(contents) == len(samples)


def incomplete(contents: Contents) -> int:
    """Number of samples without an image or label."""
    kinds = ("samples without an image", "samples without a label")
    return sum(contents.passed_over[kind][0] for kind in kinds if kind in contents.passed_over)


@pytest.mark.parametrize("kind", FORMATS)
def test_long_names_global_headers_and_comments_do_not_shift_an_image(tmp_path: Path, kind: str) -> None:
    keys = ["./a", "f" * 90 + "/" + "k" * 90, "n01/B.C/x", "ü"]
    data = pack(pairs(*keys), kind, comment="text " * 300)
    (tmp_path / "a.tar").write_bytes(data)
    contents = read(data)
    assert as_read(data, contents) == list(complete(by_webdataset(tmp_path / "a.tar")))
    assert contents.labels == [0, 1, 2, 3]
    assert contents.passed_over == {}


def test_tars_of_the_usual_writers(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "%d.tar"), maxcount=1000, verbose=0) as writer:
        for number in range(70):
            writer.write({"__key__": f"{number:05d}", "jpg": image(shade=number), "cls": number % 3, "json": {"a": 1}})
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(70):
        (folder / f"{number:05d}.jpg").write_bytes(image(shade=number))
        (folder / f"{number:05d}.cls").write_text(f"{number % 3}\n")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "1.tar", "-C", folder, "."], check=True)
    for name in ("0.tar", "1.tar"):
        data = (tmp_path / name).read_bytes()
        assert as_read(data, read(data)) == list(complete(by_webdataset(tmp_path / name)))
        assert read(data).labels == [number % 3 for number in range(70)]


def test_what_is_passed_over_is_counted_and_named() -> None:
    link = [(member(f"l{number}.jpg", tarfile.LNKTYPE, "a.jpg"), b"") for number in range(5)]
    symbolic = [(member("s.jpg", tarfile.SYMTYPE, "a.jpg"), b"")]
    extra = [
        ("b.json", b"{}"),
        ("README", b""),
        ("c.jpg", image()),
        ("d.cls", b"1"),
        ("e.jpg", image()),
        ("e.cls", b" "),
    ]
    both = [("f.png", image(kind="PNG")), ("f.jpg", image()), ("f.cls", b"7"), ("f.jpeg", image())]
    contents = read(pack([*pairs("a"), *link, *symbolic, *pairs("b"), *extra, *both, *pairs("a")]))
    assert contents.labels == [0, 0, 7, 0]
    assert contents.passed_over == {
        "hard links": (5, ["l0.jpg", "l1.jpg", "l2.jpg"]),
        "symbolic links": (1, ["s.jpg"]),
        "field .json": (1, ["b.json"]),
        "members without a field": (1, ["README"]),
        "samples without a label": (2, ["c (no .cls)", "e (its .cls is empty)"]),
        "samples without an image": (1, ["d"]),
        "field .png": (1, ["f.png"]),
        "field .jpeg": (1, ["f.jpeg"]),
        "duplicate keys": (1, ["a"]),
    }


def test_keys_with_dots_do_not_fill_the_memory_with_fields() -> None:
    contents = read(pack([(f"a.{number}.jpg", b"") for number in range(200)]))
    assert len(contents.passed_over) < 60
    assert contents.passed_over["other fields"][0] > 100
    assert contents.passed_over["samples without an image"] == (1, ["a"])


def test_images_that_cannot_be_read_are_no_samples() -> None:
    members = [("a.jpg", image()[:20]), ("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"1"), *pairs("c")]
    contents = read(pack([*members, ("d.jpg", image(20, 20)), ("d.cls", b"1")]), decoding=Decoding(max_pixels=399))
    assert [key for key, _ in contents.unreadable] == ["a", "b", "d"]
    assert contents.unreadable[1][1] == "not an image of a known format"
    assert contents.unreadable[2][1] == "has 400 pixels, more than --max-pixels 399"
    assert contents.keys.tolist() == [xxhash.xxh3_64_intdigest(b"c")]


LABELS = {
    "cls": [(b"3", 3), (b" 12\n", 12), (b"007", 7), (b"-1", "-1"), (b"dog\n", "dog"), ("hündin".encode(), "hündin")],
    "label.cls": [(b"3", 3)],
    "txt": [(b" 3 ", "3"), (b"red fox\r\n", "red fox")],
    "json": [(b"5", 5), (b'"cat"', "cat")],
    "json:a.1.b": [(b'{"a": [0, {"b": 4}]}', 4), (b'{"a": {"1": {"b": " x"}}}', "x")],
}
NO_LABELS = {
    "cls": [b"", b" \n", b"\xff\xfe", b"x" * 1001],
    "txt": [b""],
    "json": [b"{", b"", b"true", b"1.5", b"null", b"[1]", b"{}", b'" "', b'"\\ud800"', b"[" * 100_000],
    "json:a.1.b": [b'{"a": [0]}', b'{"a": "xyz"}', b'{"a": [0, {"b": false}]}', b"[]", b'{"a": [0, {"b": NaN}]}'],
}


@pytest.mark.parametrize("option", LABELS)
def test_labels_are_numbers_and_names(option: str) -> None:
    fields = Fields.parse("jpg", option)
    for data, label in LABELS[option]:
        contents = read(pack([("a.jpg", image()), (f"a.{fields.label}", data)]), fields)
        assert contents.labels == [label]
        assert type(contents.labels[0]) is type(label)


@pytest.mark.parametrize("option", NO_LABELS)
def test_what_is_neither_a_number_nor_a_name_is_no_label(option: str) -> None:
    fields = Fields.parse("jpg", option)
    for data in NO_LABELS[option]:
        contents = read(pack([("a.jpg", image()), (f"a.{fields.label}", data)]), fields)
        assert contents.labels == []
        assert contents.passed_over["samples without a label"][0] == 1


def test_fields_are_parsed_from_options() -> None:
    assert Fields.parse("JPG; jpeg;seg.png", "cls") == Fields(("jpg", "jpeg", "seg.png"), "cls")
    assert Fields.parse("jpg", "json:path.to.0.Label") == Fields(("jpg",), "json", ("path", "to", "0", "Label"))


@pytest.mark.parametrize(
    ("image_option", "label", "message"),
    [
        ("jpg;", "cls", "--image: '' is no extension"),
        (".jpg", "cls", "--image: '.jpg' is no extension"),
        ("jpg", "", "--label: '' is no extension"),
        ("jpg", "cls:a", "only json has a path; give cls, or json:a"),
        ("jpg", "json:a..b", "an empty key in its path"),
        ("jpg", "json:", "an empty key in its path"),
        ("jpg;png", "png", "is an extension of --image too"),
    ],
)
def test_options_that_name_no_fields_are_refused(image_option: str, label: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fields.parse(image_option, label)


def sparse() -> bytes:
    info = member("a.jpg", tarfile.GNUTYPE_SPARSE)
    return pack([(info, image())], "gnu")


def zstd(data: bytes) -> bytes:
    return b"\x28\xb5\x2f\xfd" + data


GOOD = pack(pairs("a", "b", "c"))
LAST = GOOD.rstrip(b"\0")
AT_MEMBER = GOOD[: GOOD.index(b"c.cls")]
BAD_HEADER = GOOD[: len(AT_MEMBER)] + b"X" + GOOD[len(AT_MEMBER) + 1 :]
REFUSED = {
    "gzip": (gzip.compress(GOOD), r"is compressed with gzip, .*`gzip -d`"),
    "zstd": (zstd(GOOD), r"is compressed with zstd, .*`zstd -d`"),
    "empty": (b"", "is empty, no tar file"),
    "text": (b"<html>404</html>" * 100, "is not a tar file; give the tar files"),
    "short text": (b"404", "is not a tar file; give the tar files"),
    "in the first header": (GOOD[:300], "is truncated at its beginning"),
    "in a header": (GOOD[: len(AT_MEMBER) + 100], "is truncated after the member c.jpg: .*copy or download it again"),
    "in an image": (
        GOOD[: GOOD.index(b"c.jpg") + 700],
        "is truncated within the member c.jpg; copy or download it again",
    ),
    "in a label": (LAST[:-1], "is truncated within the member c.cls; copy"),
    "after a label": (LAST, "is truncated after the member c.cls"),
    "between members": (AT_MEMBER, "is truncated after the member c.jpg: it has no end marker"),
    "damaged header": (
        BAD_HEADER,
        "has a damaged header after the member c.jpg, near byte .*copy or download it again",
    ),
    "joined": (GOOD + GOOD, rf"has data behind its end marker \(at byte {len(GOOD):,}\).*tar --ignore-zeros"),
    "after the end": (GOOD + b"\0" * 3_000_000 + b"1", "has data behind its end marker"),
    "begins with the end": (bytes(1024) + GOOD, "has data behind its end marker"),
    "sparse": (sparse(), "a.jpg is stored as a sparse file; pack it again without --sparse"),
    "two images": (pack([*pairs("a"), ("a.JPG", image())]), "a.JPG is the second .jpg of its sample"),
    "labels first": (
        pack(sorted(pairs("a", "b"), key=lambda each: str(each[0])[2:])),
        "of a are not .*tar --sort=name",
    ),
    "images first": (pack([("a.jpg", image()), ("b.jpg", image()), ("a.cls", b"1")]), "of a are not adjacent"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("slow", [False, True])
def test_what_webdataset_reads_in_part_or_not_at_all_is_refused(case: str, slow: bool) -> None:
    data, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"^a\.tar: .*{message}") as caught:
        read(data, slow=slow)
    assert "\n" not in str(caught.value)


def test_a_tar_without_members_has_no_samples() -> None:
    contents = read(pack([]))
    assert (contents.bytes, len(contents.samples), contents.passed_over) == (10240, 0, {})


def test_one_zero_block_ends_a_tar_file() -> None:
    end = -(-len(LAST) // 512) * 512
    assert read(GOOD[: end + 512]).labels == [0, 1, 2]


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(sorted(FORMATS)), position=st.integers(0, 10**6))
def test_no_cut_is_read_without_an_error(kind: str, position: int) -> None:
    data = pack(pairs("a", "folder/" * 10 + "f" * 60, "c"), kind, comment="text")
    end = -(-len(data.rstrip(b"\0")) // 512) * 512
    with pytest.raises(DataError):
        read(data[: position % (end + 512)])


@settings(deadline=None, max_examples=300)
@given(kind=st.sampled_from(sorted(FORMATS)), position=st.integers(0, 10**6), values=st.binary(min_size=1, max_size=20))
def test_damaged_bytes_are_one_message(kind: str, position: int, values: bytes) -> None:
    data = bytearray(pack(pairs("a", "folder/" * 10 + "f" * 60, "c"), kind, comment="text"))
    position %= len(data)
    data[position : position + len(values)] = values
    contents, error = attempt(lambda: read(bytes(data)))
    assert "\n" not in error
    if not error:
        assert len(contents.labels) + len(contents.unreadable) + incomplete(contents) >= 3


def test_headers_that_only_an_attack_has_are_refused() -> None:
    name = member("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    name.size = 2**33 - 1
    long = io.BytesIO(name.tobuf(tarfile.GNU_FORMAT) + bytes(2**25))
    with pytest.raises(DataError, match="damaged header at its beginning"):
        tars.read(long, "a.tar", FIELDS, DECODING, lambda size: None)
    assert long.tell() < 2**22
    with pytest.raises(DataError, match="damaged header at its beginning"):  # nested more deeply than Python calls
        read(tarfile.TarInfo.create_pax_global_header({"comment": "x"}) * 5000 + GOOD)


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), UnreachableError("gone"), RuntimeError("gone")])
def test_errors_of_the_stream_and_of_progress_are_those_of_the_caller(error: Exception) -> None:
    data = pack([*pairs("a"), ("b.bin", bytes(3_000_000)), *pairs("c")])

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 2_000_000:
                raise error
            return super().read(size)

    with pytest.raises(type(error), match="gone"):
        tars.read(Broken(data), "a.tar", FIELDS, DECODING, lambda size: None)

    def stop(size: int) -> None:
        if size > 2_000_000:
            raise error

    with pytest.raises(type(error), match="gone"):
        tars.read(io.BytesIO(data), "a.tar", FIELDS, DECODING, stop)


def test_progress_counts_all_bytes() -> None:
    data = pack([("a.bin", bytes(5_000_000)), *pairs("b")])
    seen: list[int] = []
    tars.read(io.BytesIO(data), "a.tar", FIELDS, DECODING, seen.append)
    assert seen == sorted(seen)
    assert len(seen) >= 5
    assert seen[-1] == len(data)


def with_exif_last(png: bytes) -> bytes:
    """A PNG file with its EXIF data behind the pixels."""
    start = png.index(b"eXIf") - 4
    (length,) = struct.unpack_from(">I", png, start)
    chunk = png[start : start + 12 + length]
    rest = png[:start] + png[start + len(chunk) :]
    end = rest.index(b"IEND") - 4
    return rest[:end] + chunk + rest[end:]


def with_xmp(orientation: int) -> bytes:
    xmp = f'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="{orientation}"/>'.encode()
    jpeg = image()
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + jpeg[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_image(orientation: int) -> None:
    kinds = ("JPEG", "PNG", "WEBP", "TIFF")
    files = {kind: image(kind=kind, orientation=orientation) for kind in kinds}
    if orientation != 1:
        files["PNG with EXIF last"] = with_exif_last(files["PNG"])
        files["JPEG with XMP"] = with_xmp(orientation)
    for name, data in files.items():
        with Image.open(io.BytesIO(data)) as opened:
            upright = ImageOps.exif_transpose(opened)
        expected = (8, 6) if orientation > 4 else (6, 8)
        assert (upright.height, upright.width) == expected, name
        assert header_size(data, DECODING) == expected, name


def test_a_size_is_read_from_the_header_alone() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    assert header_size(file.getvalue()[:2000], DECODING) == (300, 400)
    with pytest.raises(UnreadableError, match="has 120,000 pixels, more than --max-pixels 119999"):
        header_size(file.getvalue(), Decoding(max_pixels=119_999))
    png = image(kind="PNG")
    header = struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)
    no_width = png[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + png[33:]
    with pytest.raises(UnreadableError):
        header_size(no_width, DECODING)


def test_damaged_exif_data_neither_warns_nor_hides_the_size() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # five entries, none of which is there
    data = image()[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + image()[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert header_size(data, DECODING) == (6, 8)
