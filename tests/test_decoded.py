"""Batches of an index: the samples and pixels of every step are the same, whatever reads and decodes them."""

from __future__ import annotations

import hashlib
import io
import threading
import weakref
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from indexes import build, jpeg
from PIL import ExifTags, Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as V

from distrain.data import index
from distrain.data.cache import size as cache_size
from distrain.data.crops import random_boxes
from distrain.data.decoded import DecodedBatches, EncodedBatches, memory
from distrain.data.decoding import Decoder, EvaluationTransform, Preprocessing, TrainingTransform
from distrain.data.encoded import EncodedCache, Stretches
from distrain.data.gpu_decoding import GpuDecoder
from distrain.data.image_sizes import FULL_SIZE, ImageSizes, Stage
from distrain.data.images import Decoding
from distrain.data.manifest import Dataset
from distrain.data.order import Order, augmentation_bits
from distrain.data.stream import EvaluationBatches
from distrain.data.trivial_augment import draw
from distrain.environment import World
from distrain.errors import ShardError

SIZE = 16
ALONE = World()
SCALE, RATIO = (0.2, 1.0), (0.75, 4 / 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """170 training images in tar files of 3 to 90 samples, in 12 virtual shards of 4 lanes; 23 of test."""
    folder = tmp_path_factory.mktemp("index")
    return build(folder, {"train": [3, 90, 17, 60], "test": [20, 3]}, lanes=4, shards=12).with_image_size(SIZE)


def order_of(dataset: Dataset, batch: int = 10) -> Order:
    split = dataset.split("train")
    return Order(len(split.sizes), split.lanes, int(split.sizes.min()), batch, seed=7)


def preprocessing(threads: int = 2, with_operations: bool = False, sizes: ImageSizes = FULL_SIZE) -> Preprocessing:
    return Preprocessing(
        Decoder(threads, Decoding()),
        TrainingTransform(SIZE, SIZE, SCALE, RATIO, with_operations),
        EvaluationTransform(SIZE, SIZE, 20),
        sizes,
    )


GROWING = ImageSizes([Stage(8, range(5)), Stage(12, range(5, 15))])


def trained(
    dataset: Dataset, steps: range, world: World = ALONE, threads: int = 2, ranks: Sequence[World] | None = None,
    cache: EncodedCache | None = None,
) -> dict[int, list[tuple[int, int, int, str]]]:  # fmt: skip
    """Position, id, label and digest of the pixels of each sample, by step; images grow."""
    order, samples, how = order_of(dataset), {}, preprocessing(threads, sizes=GROWING)
    with closing(DecodedBatches(dataset, order, ranks or (world,), steps, 1, how, cache=cache)) as batches:
        for step, of_ranks in zip(steps, batches, strict=True):
            samples[step] = [
                (position, id_, label, hashlib.sha256(image.numpy().tobytes()).hexdigest())
                for batch in of_ranks
                for position, id_, label, image in zip(
                    batch.positions.tolist(), batch.ids.tolist(), batch.labels.tolist(), batch.images, strict=True
                )
            ]
    return samples


def merged(parts: Sequence[dict[int, list[Any]]]) -> dict[int, list[Any]]:
    return {step: sorted(sample for part in parts for sample in part[step]) for step in parts[0]}


def test_every_step_has_the_same_pixels_on_any_number_of_ranks_and_threads(dataset: Dataset) -> None:
    steps = range(order_of(dataset).steps_per_epoch + 8)  # into the second epoch
    expected = merged([trained(dataset, steps)])
    assert all([position for position, *_ in samples] == list(range(10)) for samples in expected.values())
    for threads in (1, 7):
        assert merged([trained(dataset, steps, threads=threads)]) == expected
    for size in (2, 3, 4):
        assert merged([trained(dataset, steps, World(rank, size)) for rank in range(size)]) == expected
    assert merged([trained(dataset, steps, ranks=[World(rank, 4) for rank in range(4)])]) == expected
    for first in (1, 13, 20):  # a resume
        later = range(first, len(steps))
        assert merged([trained(dataset, later)]) == {step: expected[step] for step in later}


def test_alternating_flips_mirror_each_image_of_an_index_in_every_second_epoch(dataset: Dataset) -> None:
    order = replace(order_of(dataset), alternating_flip=True)
    steps, length = range(2 * order.steps_per_epoch), order.steps_per_epoch

    def mirrored(first: int, size: int) -> dict[tuple[int, int], int]:
        """Whether each sample is mirrored, by epoch and id."""
        bits = {}
        for rank in range(size):
            with closing(EncodedBatches(dataset, order, (World(rank, size),), range(first, len(steps)), 1)) as batches:
                for step, (batch,) in enumerate(batches, first):
                    of_step = (batch.random_bits[:, 0] & np.uint64(1)).tolist()
                    bits |= {
                        (step // length, id_): bit
                        for id_, bit in zip(batch.samples["id"].tolist(), of_step, strict=True)
                    }
        return bits

    expected = mirrored(0, 1)
    assert mirrored(0, 2) == mirrored(0, 3) == expected
    assert mirrored(length // 2, 1).items() <= expected.items()
    pairs = [(bit, expected[1, id_]) for (epoch, id_), bit in expected.items() if epoch == 0 and (1, id_) in expected]
    assert len(pairs) > 120
    assert all(one != other for one, other in pairs)


def test_an_epoch_has_each_sample_once(dataset: Dataset) -> None:
    order = order_of(dataset)
    ids = [id_ for samples in trained(dataset, range(order.steps_per_epoch)).values() for _, id_, *_ in samples]
    assert len(set(ids)) == len(ids) == order.steps_per_epoch * 10


@pytest.mark.parametrize("with_operations", [False, True])
def test_pixels_are_those_of_torchvision(dataset: Dataset, with_operations: bool) -> None:
    order = order_of(dataset)
    steps = range(4, 16, 5)
    samples, how = index.load(dataset, "train"), preprocessing(2, with_operations, GROWING)
    with closing(DecodedBatches(dataset, order, (World(),), range(4, 15), 1, how)) as batches:
        for step, (batch,) in zip(range(4, 15), batches, strict=True):
            size = 8 if step < 5 else 12 if step < 15 else SIZE
            assert batch.images.shape[1:] == (size, size, 3)
            if step not in steps:
                continue
            bits = augmentation_bits(order.seed, np.full(len(batch.ids), step), batch.positions)
            assert (batch.random_bits.numpy().view(np.uint64) == bits).all()
            for row, id_ in enumerate(batch.ids.tolist()):
                entry = samples[id_]
                data = np.frombuffer(jpeg(id_), np.uint8).copy()
                image = decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
                box = random_boxes(np.array([[entry["height"], entry["width"]]]), bits[row : row + 1, 1], SCALE, RATIO)
                expected = V.resized_crop(image, *box[0].tolist(), [size, size], antialias=True)
                if with_operations:
                    operation, strength = draw(bits[row])
                    expected = operation.apply(expected, strength)
                assert (batch.images[row].permute(2, 0, 1) == expected).all()
                assert batch.labels[row] == id_ % 3


@pytest.mark.parametrize("size", [1, 2])
def test_each_sample_is_evaluated_once_as_by_torchvision(dataset: Dataset, size: int) -> None:
    seen = {}
    for rank in range(size):
        with closing(EvaluationBatches(dataset, "test", World(rank, size), 5, preprocessing())) as batches:
            for images, labels, ids in batches:
                assert 1 <= len(images) <= 5
                seen |= {
                    id_: (image, label) for image, label, id_ in zip(images, labels.tolist(), ids.tolist(), strict=True)
                }
    assert sorted(seen) == list(range(23))
    for id_, (image, label) in seen.items():
        number = 170 + id_
        data = torch.from_numpy(np.frombuffer(jpeg(number), np.uint8).copy())
        whole = decode_jpeg(data, mode=ImageReadMode.RGB)
        expected = V.center_crop(V.resize(whole, [20], antialias=True), [SIZE, SIZE])
        assert (image.permute(2, 0, 1) == expected).all()
        assert label == number % 3


def test_a_cache_has_the_same_samples_and_all_encoded_bytes_once(dataset: Dataset) -> None:
    steps = range(order_of(dataset).steps_per_epoch * 2)
    cache = EncodedCache(12)
    assert trained(dataset, steps, cache=cache) == trained(dataset, steps)
    assert cache.is_complete
    cached = sum(len(image) for number in range(12) for image in cache.get(number).images)
    assert cached == dataset.indexed("train").bytes
    assert cached < cache_size(dataset) < cached + 170 * 300


def test_the_memory_that_is_stated_grows_with_lanes_and_rounds(dataset: Dataset) -> None:
    order = order_of(dataset)
    one, two = (memory(dataset, order, (World(0, size),), 1, cached=False) for size in (1, 2))
    split = dataset.indexed("train")
    assert one > split.index.bytes + 3 * split.lanes * split.bytes // split.shards
    assert two < one


def test_a_set_that_is_smaller_than_its_rounds_is_read_once_and_in_memory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a round is the whole set: three of them would be in memory, in every epoch another one is read."""
    small = build(tmp_path, {"train": [50], "test": [4]}, lanes=5, shards=5).with_image_size(SIZE)
    read, numbers = Stretches._read, []

    def recorded(self: Stretches, number: int, retry: bool) -> Any:
        numbers.append(number)
        return read(self, number, retry)

    monkeypatch.setattr(Stretches, "_read", recorded)
    epochs = trained(small, range(order_of(small).steps_per_epoch * 4))
    assert sorted(numbers) == list(range(5))
    assert len({id_ for samples in epochs.values() for _, id_, _, _ in samples}) == 50
    cached, read_again = (memory(small, order_of(small), (ALONE,), 1, cached=each) for each in (True, False))
    assert read_again <= cached


def test_encoded_images_are_released_as_soon_as_they_are_decoded(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps are decoded ahead: here all of five epochs."""
    read, images = Stretches.read, []

    def recorded(*arguments: Any) -> Any:
        stretch = read(*arguments)
        images.append(weakref.ref(stretch.images[0]))
        return stretch

    monkeypatch.setattr(Stretches, "read", recorded)
    steps = range(order_of(dataset).steps_per_epoch * 5)
    with closing(DecodedBatches(dataset, order_of(dataset), (ALONE,), steps, 1, preprocessing())) as batches:
        assert batches._background.wait(len(steps), 60)
        assert len(images) == 60
        assert len({image for each in images if (image := each()) is not None}) <= 2 * 4


def test_images_that_are_not_begun_when_a_reader_is_closed_are_not_decoded(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python exits when all tasks are done: a stopped run would exit late."""
    write, rows, begun, go_on = Decoder._write, [], threading.Event(), threading.Event()

    def waits(*arguments: Any) -> None:
        rows.append(1)
        begun.set()
        assert go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(Decoder, "_write", waits)
    how = preprocessing(threads=1)
    with closing(DecodedBatches(dataset, order_of(dataset, 50), (ALONE,), range(3), 1, how)) as batches:
        assert begun.wait(60)
        batches._closed.set()
        go_on.set()
    how.decoder._pool.submit(lambda: None).result(60)
    assert len(rows) == 4  # the task that had begun


def test_what_is_between_images_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Images of 700 bytes are further apart than they are long."""
    small = build(tmp_path, {"train": [30], "test": [4]}, lanes=1, shards=2)
    stretch = Stretches(small, "train", threading.Event()).read(0)
    in_memory = {id(image.obj): len(image.obj) for image in stretch.images}
    assert sum(in_memory.values()) == sum(map(len, stretch.images))


def test_an_image_that_changed_is_named(dataset: Dataset, tmp_path: Path) -> None:
    damaged = build(tmp_path, {"train": [3, 90, 17, 60], "test": [4]}, lanes=4, shards=12)
    sample = index.load(damaged, "train")[100]
    with (tmp_path / "tars/train-0002.tar").open("r+b") as file:
        file.seek(int(sample["offset"]) + 10)
        file.write(b"\0\1\2\3\4\5\6\7")
    stretches = Stretches(damaged, "train", threading.Event())
    number = int(np.searchsorted(damaged.indexed("train").starts, 100, "right")) - 1
    with pytest.raises(
        ShardError,
        match=rf"train-0002.tar: changed since it was indexed \(the image at byte {sample['offset']:,} differs",
    ):
        stretches.read(number)
    (tmp_path / "tars/train-0002.tar").unlink()
    with pytest.raises(ShardError, match="train-0002.tar: No such file or directory; bring the file back"):
        stretches.read(number)


def test_a_sample_that_cannot_be_decoded_is_replaced_by_the_next_one_and_reported(tmp_path: Path) -> None:
    bad = {number: jpeg(number)[:200] for number in (5, 6, 60)}
    folder = build(tmp_path, {"train": [170], "test": [8]}, lanes=4, shards=12, images=bad).with_image_size(SIZE)
    good = build(tmp_path / "good", {"train": [170], "test": [8]}, lanes=4, shards=12).with_image_size(SIZE)
    order = order_of(folder)
    steps = range(order.steps_per_epoch)
    expected, seen = merged([trained(good, steps)]), merged([trained(folder, steps)])
    substitutes = {5: 7, 6: 7, 60: 61}
    for step in steps:
        for (position, id_, *other), (position_, id__, *other_) in zip(expected[step], seen[step], strict=True):
            assert position == position_
            assert id__ == substitutes.get(id_, id_)
            if id_ not in bad:
                assert other == other_
    assert merged([trained(folder, steps, World(rank, 3)) for rank in range(3)]) == seen
    with closing(DecodedBatches(folder, order, (World(),), steps, 1, preprocessing())) as batches:
        for _ in batches:
            pass
        assert {each.id for each in batches.bad} <= set(bad)
        assert {index.describe(folder.indexed("train"), each.number, each.offset) for each in batches.bad} <= {
            f"train-0000.tar, the image at byte {index.load(folder, 'train')[number]['offset']:,}" for number in bad
        }
        assert batches.bad


def turned(number: int) -> bytes:
    """A JPEG file that EXIF turns."""
    image = Image.open(io.BytesIO(jpeg(number)))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 3
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).save(file, "PNG")
    return file.getvalue()


def test_whole_batches_are_decoded_to_the_same_pixels_as_single_images(tmp_path: Path) -> None:
    """The decoder for GPUs, which takes whole batches, on a CPU: nvJPEG alone is missing."""
    special = {3: jpeg(3)[:200], 50: turned(50), 90: png(90), 91: b"no image", 130: jpeg(130)[:-50]}
    folder = build(tmp_path, {"train": [170], "test": [8]}, lanes=4, shards=12, images=special).with_image_size(SIZE)
    order, transform = order_of(folder), preprocessing(with_operations=True).training
    results = []
    for decoder in (Decoder(2, Decoding()), GpuDecoder(torch.device("cpu"), 2, Decoding())):
        how = Preprocessing(decoder, transform, preprocessing().evaluation)
        with closing(DecodedBatches(folder, order, (ALONE,), range(order.steps_per_epoch), 1, how)) as batches:
            pixels = [batch.images.clone() for (batch,) in batches]
            results.append((torch.cat(pixels), sorted((bad.id, bad.reason) for bad in batches.bad)))
    assert results[0][0].equal(results[1][0])
    assert results[0][1] == results[1][1]
    assert {3, 91, 130} >= {id_ for id_, _ in results[0][1]}
    assert len(results[0][1]) >= 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error")])
def test_an_error_of_the_gpu_is_raised_and_no_image_is_decoded_by_the_cpu_instead(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("distrain.data.gpu_decoding.decode_jpeg", fails)
    plain = preprocessing()
    how = Preprocessing(GpuDecoder(torch.device("cpu"), 2, Decoding()), plain.training, plain.evaluation)
    with (
        closing(DecodedBatches(dataset, order_of(dataset), (ALONE,), range(2), 1, how)) as batches,
        pytest.raises(type(error)),
    ):
        next(batches)
