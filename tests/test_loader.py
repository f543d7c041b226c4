"""`distrain.batches` and its companions: what a training loop of one's own reads, and how it ends."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from group import Group, GroupError
from indexes import build, jpeg
from runs import ids_by_step
from simulated_gpu import SimulatedGpu
from torch.utils.data import DataLoader, IterableDataset

import distrain
from distrain.config import Augment
from distrain.data.manifest import Dataset
from distrain.data.stream import TrainingBatches
from distrain.data.trivial_augment import trivial_augment
from distrain.distributed.numerics import numerics_restored
from distrain.environment import World
from distrain.errors import ConfigError, DataError, UnreadableImagesError, UserError
from distrain.training import augment, inputs

BATCH, SEED, V = 40, 5, 3
PIXELS = {"image_size": 16, "crop_scale": [0.3, 1.0]}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """300 training images of many sizes in 12 virtual shards of 6 lanes, and 31 test images."""
    return build(tmp_path_factory.mktemp("index"), {"train": [100, 150, 50], "test": [31]}, lanes=6, shards=12)


Threads = Callable[[], list[str]]


@pytest.fixture
def threads() -> Threads:
    """`threads()`: the names of the threads that the test has started and not ended."""
    before = set(threading.enumerate())

    def names() -> list[str]:
        return [each.name for each in set(threading.enumerate()) - before if each.name.startswith("distrain")]

    return names


def ids_of(data: str, steps: range, options: dict[str, Any]) -> dict[int, list[int]]:
    """Read steps; return the ids of this process in each."""
    batches = distrain.batches(data, global_batch_size=BATCH, seed=SEED, steps=steps, **options)
    return {step: batch.ids.tolist() for step, batch in zip(steps, batches, strict=True)}


def virtual_ids_of(data: str, steps: range, options: dict[str, Any]) -> dict[int, list[list[int]]]:
    """Read steps; return for each virtual rank of this process its ids in each."""
    with distrain.batches(data, global_batch_size=BATCH, seed=SEED, steps=steps, virtual_ranks=V, **options) as batches:
        read = [[batch.ids.tolist() for batch in of_ranks] for of_ranks in batches]
    ranks = World(*rank_and_size()).virtual_ranks(V)
    return {rank.rank: [step[number] for step in read] for number, rank in enumerate(ranks)}


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def outcome_on(folders: list[str], steps: range, seeds: list[int]) -> tuple[int, str, str]:
    """Read the folder of this rank; return the number of steps taken, and type and message of the error."""
    rank, taken = dist.get_rank(), 0
    try:
        for _ in distrain.batches(folders[rank], global_batch_size=BATCH, seed=seeds[rank], steps=steps):
            taken += 1
    except UserError as error:
        return taken, type(error).__name__, str(error)
    return taken, "", ""


def evaluated_ids(folders: list[str]) -> list[int]:
    """Return the ids of this rank's test samples."""
    return [each for batch in distrain.evaluation_batches(folders[dist.get_rank()]) for each in batch.ids.tolist()]


def damaged_copy(dataset: Dataset, out: Path, shard: str) -> str:
    """Copy a data set, with another byte in one shard, of the same size."""
    shutil.copytree(dataset.root, out)
    with (out / shard).open("r+b") as file:
        file.seek(2000)
        byte = file.read(1)[0]
        file.seek(2000)
        file.write(bytes([byte ^ 1]))
    return str(out)


@pytest.mark.ranks
def test_the_loader_reads_what_train_trains_on_any_number_of_processes(
    small: Dataset, index: Dataset, group: Callable[[int], Group], tmp_path: Path
) -> None:
    for dataset, pixels in ((small, {}), (index, PIXELS)):
        data, steps = str(dataset.root), range(33)
        group(2).train(
            {
                "data": {"dir": data, "audit": True, "image_size": pixels.get("image_size")},
                "augment": {"crop_scale": pixels.get("crop_scale")},
                "run": {"dir": str(tmp_path / data.replace("/", "-")), "seed": SEED},
                "train": {"max_steps": len(steps), "global_batch_size": BATCH},
                "eval": {"every_steps": 0},
                "checkpoint": {"every_steps": 0},
            }
        )
        trained = ids_by_step(tmp_path / data.replace("/", "-"))
        tail = range(steps.stop * 2 // 3, steps.stop)  # begins in the middle of an epoch
        virtual: list[dict[int, list[list[int]]]] = []
        for size in (1, 2, 3):
            of_ranks = group(size).call("function", ids_of, data, steps, pixels)
            assert {step: sorted(sum((each[step] for each in of_ranks), [])) for step in steps} == trained
            assert group(size).call("function", ids_of, data, tail, pixels) == [
                {step: each[step] for step in tail} for each in of_ranks
            ]
            by_rank = group(size).call("function", virtual_ids_of, data, steps, pixels)
            virtual.append({rank: ids for each in by_rank for rank, ids in each.items()})
        assert virtual[0] == virtual[1] == virtual[2]
        assert [[each[step] for step in steps] for each in of_ranks] == [virtual[2][rank] for rank in range(V)]
    order = inputs.order_of(small, BATCH, SEED)
    begin = next(step for step in range(1, 99) if order.begins_round(step))
    _, second = order.epoch_shards(0)
    shard = small.blocks("train").shards[second[1]].name  # of a lane that rank 1 owns
    folders = [str(small.root), damaged_copy(small, tmp_path / "damaged", shard)]
    outcomes = group(2).call("function", outcome_on, folders, range(99), [SEED, SEED])
    assert [each[:2] for each in outcomes] == [(begin, "ShardError")] * 2, outcomes
    assert all(shard in message for _, _, message in outcomes)
    outcomes = group(2).call("function", outcome_on, [folders[0]] * 2, range(99), [SEED, 6])
    assert [each[:2] for each in outcomes] == [(0, "ConfigError")] * 2
    assert all("rank 1 has seed=6, rank 0 5" in message for _, _, message in outcomes)

    evaluated = group(2).call("function", evaluated_ids, [folders[0]] * 2)
    assert sorted(sum(evaluated, [])) == list(range(203))
    shard = small.blocks("test").shards[1].name
    folders[1] = damaged_copy(small, tmp_path / "damaged-test", shard)
    with pytest.raises(GroupError) as failed:
        group(2).call("function", evaluated_ids, folders)
    assert failed.value.kinds == ["ShardError"] * 2


def read(dataset: Dataset, steps: range = range(3), **options: Any) -> distrain.Batches[Any]:
    return distrain.batches(dataset.root, global_batch_size=BATCH, seed=SEED, steps=steps, **options)


def test_threads_end_when_nothing_reads_any_more(small: Dataset, index: Dataset, threads: Threads) -> None:
    for dataset, options in ((small, {}), (index, PIXELS), (index, {"decoded": False})):
        for _ in read(dataset, range(50), **options):
            assert threads()
            break
        gc.collect()
        assert not threads()
        batches = read(dataset, range(2), **options)
        assert len(list(batches)) == 2
        assert not threads()
        assert list(batches) == []
        with read(dataset, range(50), **options) as entered:
            next(entered)
        assert not threads()
        assert list(entered) == []
        assert list(read(dataset, range(7, 7), **options)) == []


def test_the_interpreter_ends_while_batches_are_read(index: Dataset) -> None:
    program = (
        "import sys, distrain\n"
        "batches = distrain.batches(sys.argv[1], global_batch_size=40, steps=range(10**6), image_size=16)\n"
        "print(len(next(batches).ids))\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(index.root)],
        capture_output=True, text=True, timeout=120, check=False, env=environ,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "40\n", "")


def test_encoded_batches_are_the_files_of_the_decoded_ones(index: Dataset) -> None:
    def described(batch: Any) -> tuple[list[int], ...]:
        return batch.ids.tolist(), batch.labels.tolist(), batch.positions.tolist(), batch.random_bits.tolist()

    steps = range(4, 9)
    decoded = [described(batch) for batch in read(index, steps, **PIXELS)]
    encoded = list(distrain.batches(index.root, global_batch_size=BATCH, seed=SEED, steps=steps, decoded=False))
    assert [described(batch) for batch in encoded] == decoded
    for batch in encoded:  # all at once: they stay valid
        assert [bytes(image) for image in batch.images] == [jpeg(number) for number in batch.ids.tolist()]
        assert sorted(batch.positions.tolist()) == list(range(BATCH))
    of_ranks = list(
        distrain.batches(index.root, global_batch_size=BATCH, seed=SEED, steps=steps, decoded=False, virtual_ranks=V)
    )
    assert [sorted(i for each in step for i in each.ids.tolist()) for step in of_ranks] == [
        sorted(ids) for ids, *_ in decoded
    ]


def test_evaluation_batches_have_each_sample_once(small: Dataset, index: Dataset, threads: Threads) -> None:
    for dataset, options, total in ((small, {}, 203), (index, {"image_size": 16, "resize": 20}, 31)):
        for size in (1, 3):
            seen = []
            for rank in range(size):
                for batch in distrain.evaluation_batches(
                    dataset.root, batch_size=30, rank=rank, world_size=size, **options
                ):
                    assert batch.images.dtype == torch.uint8
                    assert batch.images.shape == (len(batch.ids), 16, 16, 3)
                    assert len(batch.labels) == len(batch.ids) <= 30
                    seen += batch.ids.tolist()
            assert sorted(seen) == list(range(total))
    assert not threads()


def test_an_unreadable_image_ends_the_loop_or_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, threads: Threads
) -> None:
    index = build(tmp_path, {"train": [60], "test": [8]}, 3, 6, images={17: b"no image", 62: b"nor this"})
    of_17 = [17 in batch.ids for batch in read(index, range(3), decoded=False)].index(True)
    batches = read(index, range(2), image_size=16)
    for _ in range(of_17):
        next(batches)
    with pytest.raises(UnreadableImagesError, match=r"1 image cannot be decoded, 0 allowed:\n +train-0000.tar"):
        next(batches)
    ids = [each for batch in read(index, range(5), image_size=16, skip_bad=1) for each in batch.ids.tolist()]
    assert len(ids) == 5 * BATCH
    assert 17 not in ids
    assert caplog.text.count("cannot be decoded") == 1
    evaluated = distrain.evaluation_batches(index.root, image_size=16, skip_bad=1)
    assert sorted(each for batch in evaluated for each in batch.ids.tolist()) == [0, 1, 3, 4, 5, 6, 7]
    with pytest.raises(UnreadableImagesError, match=r"test-0000.tar"):
        list(distrain.evaluation_batches(index.root, image_size=16))
    assert not threads()


@pytest.mark.parametrize("cache", ["off", "ram"])
@pytest.mark.parametrize("indexed", [False, True], ids=["blocks", "index"])
def test_on_a_gpu_batches_are_copied_ahead_and_stay_what_they_are(
    indexed: bool, cache: str, small: Dataset, index: Dataset, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, options = (index, PIXELS) if indexed else (small, {})
    steps = range(3, 45)
    expected = [
        (batch.images.clone(), batch.labels.clone(), batch.ids.tolist(), batch.random_bits.clone())
        for batch in read(dataset, steps, **options)
    ]
    order, gpu = inputs.order_of(dataset, BATCH, SEED), SimulatedGpu(monkeypatch, index=3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wrong: list[int] = []

    def compare(number: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if not all(torch.equal(*pair) for pair in pairs):
            wrong.append(number)

    for number, batch in enumerate(read(dataset, steps, device=gpu.device, cache=cache, **options)):
        images, labels, ids, bits = expected[number]
        tensors = zip((batch.images, batch.labels, batch.random_bits), (images, labels, bits), strict=True)
        gpu.compute.submit(partial(compare, number, list(tensors)))
        assert batch.ids.tolist() == ids
        if not indexed and number + 1 < len(steps) and not order.begins_round(steps[number + 1]):
            assert [call for *_, call in gpu.calls].count("copy") == 3 * (number + 2)  # the next one's have begun
    gpu.compute.synchronize()
    gpu.close()
    assert not wrong
    assert "copy that the host waits for" not in {call for *_, call in gpu.calls}
    assert not threads()


def test_an_open_data_set_counts_steps(small: Dataset, index: Dataset) -> None:
    info = distrain.open_data(small.root)
    assert (info.samples, info.lanes, info.is_index) == ({"train": 1003, "test": 203}, 12, False)
    assert (info.image_shape, len(info.classes), len(info.mean)) == ([16, 16, 3], 10, 3)
    assert "Shard" not in repr(info)  # a notebook shows it
    assert info.steps_per_epoch(BATCH) == 24 * 41 // BATCH == 24
    assert info.epoch(50, BATCH) == (2, 2)
    assert info.steps(range(1, 3), BATCH) == range(24, 72)
    with pytest.raises(ConfigError, match="larger than the 984 samples"):
        info.steps_per_epoch(985)
    info = distrain.open_data(index.root)
    assert (info.image_shape, info.is_index, info.samples) == (None, True, {"train": 300, "test": 31})


def test_alternating_flips_are_those_of_the_run(small: Dataset) -> None:
    order = replace(inputs.order_of(small, BATCH, SEED), alternating_flip=True)
    steps = range(order.steps_per_epoch - 1, order.steps_per_epoch + 1)
    with (
        distrain.batches(small.root, global_batch_size=BATCH, seed=SEED, steps=steps, alternating_flip=True) as batches,
        closing(TrainingBatches(small, order, (World(),), steps, 1, with_random_bits=True)) as expected,
    ):
        for batch, (other,) in zip(batches, expected, strict=True):
            assert torch.equal(batch.random_bits, other.random_bits)


def test_random_bits_decide_what_augment_does() -> None:
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 4, 3)
    bits = torch.tensor([[0, 0], [1, 0]])
    assert torch.equal(distrain.augment(images, bits, flip=True), torch.stack([images[0], images[1].flip(1)]))
    cut = distrain.augment(images, bits, cutout=2, fill=[9, 8, 7])
    assert cut[0, 0, 0].tolist() == [9, 8, 7]
    assert cut[0, 2, 2].tolist() == images[0, 2, 2].tolist()
    erased = distrain.augment(images, bits, erasing=1.0, fill=[9, 8, 7])
    assert torch.equal(erased, augment.augment(images, bits, Augment(erasing=1.0), torch.tensor([9, 8, 7]).byte()))
    assert not torch.equal(erased, images)
    with pytest.raises(ConfigError, match="crop_padding=4"):
        distrain.augment(images, bits, crop_padding=4)
    normal = distrain.normalize(images, [0.5, 0.25, 0.0], [0.5, 1.0, 2.0])
    assert normal.shape == (2, 3, 4, 4)
    assert normal.is_contiguous(memory_format=torch.channels_last)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)) / torch.tensor(
        [0.5, 1.0, 2.0]
    ).view(3, 1, 1)
    torch.testing.assert_close(normal, expected)


def test_random_operations_of_an_index_are_those_of_the_trainer(index: Dataset) -> None:
    pixels = []
    for with_operations in (False, True):
        with distrain.batches(
            index.root, global_batch_size=32, steps=range(5, 6), image_size=16, trivial_augment=with_operations
        ) as batches:
            (batch,) = batches
            pixels.append(batch.images.clone())
    for image, random_bits in zip(pixels[0], batch.random_bits.numpy().view(np.uint64), strict=True):
        trivial_augment(image, random_bits)
    assert torch.equal(*pixels)


@pytest.mark.parametrize(
    ("of_index", "options", "message"),
    [
        (False, {"rank": 1}, "rank=1, world_size=None: give both"),
        (False, {"rank": 2, "world_size": 2}, "rank should be 0 to world_size - 1"),
        (False, {"rank": "0", "world_size": 2}, "rank='0', world_size=2: should be whole numbers"),
        (False, {"rank": 0, "world_size": 13}, "13 processes for 12 lanes"),
        (False, {"virtual_ranks": 13}, "more than the 12 lanes"),
        (False, {"virtual_ranks": 2, "rank": 0, "world_size": 3}, "3 processes for train.virtual_ranks=2"),
        (False, {"global_batch_size": 0}, "train.global_batch_size"),
        (False, {"global_batch_size": 2000}, "larger than the 984 samples"),
        (False, {"crop_scale": (0.1, 1)}, "augment.crop_scale"),
        (False, {"trivial_augment": True}, "augment.trivial_augment"),
        (False, {"image_size": 8}, "data.image_size=8"),
        (False, {"decoded": False}, "decoded=False"),
        (False, {"steps": 5}, "steps=5: should be range"),
        (False, {"steps": range(0, 9, 2)}, "should be range"),
        (False, {"steps": range(-2, 9)}, "should be range"),
        (False, {"device": "cuda"}, "torch can use no GPU"),
        (False, {"device": "meta"}, "use cpu or cuda"),
        (False, {"device": "gpu"}, "device: should be the name of a device, such as cpu or cuda; got 'gpu'"),
        (False, {"data_dir": None}, "data_dir: should be a path; got None"),
        (False, {"rank": "0", "world_size": "2"}, "rank='0', world_size='2': should be whole numbers"),
        (False, {"seed": -1}, "run.seed"),
        (True, {}, "set data.image_size"),
        (True, {"image_size": 16, "decoded": False}, "image_size: has no effect"),
        (True, {"image_size": 16, "crop_scale": (1, 0.5)}, "crop_scale must be two numbers"),
    ],
)
def test_wrong_arguments_are_errors_when_batches_is_called(
    of_index: bool, options: dict[str, Any], message: str, small: Dataset, index: Dataset, threads: Threads
) -> None:
    data_dir = (index if of_index else small).root
    arguments: dict[str, Any] = {"data_dir": data_dir, "global_batch_size": BATCH, "steps": range(3)}
    with pytest.raises(ConfigError, match=message):
        distrain.batches(**(arguments | options))
    assert not threads()


IMAGES, BITS = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distrain.normalize(IMAGES / 255, [0.5] * 3, [0.5] * 3), r"images: should be uint8 .* got float32 \[2"),
        (lambda: distrain.normalize(IMAGES[0], [0.5] * 3, [0.5] * 3), r"images: should be .* got uint8 \[4, 4, 3\]"),
        (
            lambda: distrain.normalize(IMAGES.permute(0, 3, 1, 2), [0.5] * 3, [0.5] * 3),
            "mean: .* each of the 4 channels",
        ),
        (lambda: distrain.normalize(IMAGES, [0.5] * 3, [0.5]), r"std: .* each of the 3 channels .* got \[1\]"),
        (lambda: distrain.augment(IMAGES.float(), BITS), "images: should be uint8"),
        (lambda: distrain.augment(IMAGES, BITS, erasing=2), "erasing=2: should be a probability, from 0 to 1"),
        (
            lambda: distrain.augment(IMAGES, BITS, flip="alternating"),  # type: ignore[arg-type]
            "flip='alternating': should be True or False; .*alternating_flip=True",
        ),
        (lambda: distrain.augment(IMAGES, BITS[:1]), r"random_bits: should be int64 \[2, 2\].* got int64 \[1, 2\]"),
        (lambda: distrain.loss_scale(2, 64), "world_size=64: should be 1 to global_batch_size, which is 2"),
        (lambda: distrain.loss_scale(0, 1), "global_batch_size, which is 0"),
        (lambda: distrain.open_data(3), "data_dir: should be a path; got 3"),  # type: ignore[arg-type]
        (lambda: distrain.evaluation_batches(""), "data_dir: should be a path; got ''"),
    ],
)
def test_a_wrong_argument_of_another_function_is_one_message(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_batches_of_another_number_of_virtual_ranks_are_refused(small: Dataset) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10))
    with numerics_restored():
        ranks = distrain.VirtualRanks(net, V, BATCH, torch.zeros(2, 3, 16, 16), threads=torch.get_num_threads())
        for number in (None, 2):
            options: dict[str, Any] = {"global_batch_size": BATCH, "steps": range(1), "virtual_ranks": number}
            (of_step,) = distrain.batches(small.root, **options)
            with pytest.raises(ConfigError, match="batches: should be a list of 3, one for each virtual rank"):
                next(ranks.in_step(0, of_step))


class Refusals(IterableDataset[str]):
    """The messages with which batches are refused in the worker of a DataLoader."""

    def __init__(self, ways: list[Callable[[], Any]]) -> None:
        self.ways = ways

    def __iter__(self) -> Iterator[str]:
        for way in self.ways:
            with pytest.raises(ConfigError) as refusal:
                way()
            yield str(refusal.value)


def test_batches_are_refused_in_the_workers_of_a_data_loader(small: Dataset, threads: Threads) -> None:
    """All workers would read the same samples; and a process that was forked has no threads, and would wait forever."""
    with distrain.batches(small.root, global_batch_size=BATCH, steps=range(3)) as opened:
        ways = [
            lambda: distrain.batches(small.root, global_batch_size=BATCH, steps=range(3)),
            lambda: distrain.evaluation_batches(small.root),
            lambda: next(opened),
        ]
        loader = DataLoader(Refusals(ways), None, num_workers=1, multiprocessing_context="fork", timeout=20)
        messages = list(loader)
        assert len(list(opened)) == 3
    worker = "called in a worker of a DataLoader; it reads ahead by threads of its own: set num_workers=0"
    assert messages[:2] == [f"distrain.batches: {worker}", f"distrain.evaluation_batches: {worker}"]
    assert f"opened in process {os.getpid()}, whose threads read them, and a fork of it has no threads" in messages[2]
    assert not threads()


def test_missing_data_are_errors_when_a_function_is_called(small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'val'"):
        distrain.evaluation_batches(small.root, "val")
    with pytest.raises(DataError, match="manifest"):
        distrain.open_data(tmp_path)
    with pytest.raises(ConfigError, match="data_dir: should be a path; got None"):
        distrain.evaluation_batches(None)  # type: ignore[arg-type]
    shutil.copytree(small.root, tmp_path / "data")
    (tmp_path / "data" / small.blocks("train").shards[3].name).unlink()
    with pytest.raises(DataError, match="00003.tar: No such file"):
        distrain.batches(tmp_path / "data", global_batch_size=BATCH, steps=range(3))
