"""JPEG files decoded on a GPU (data.decode_device=gpu): nearly the pixels of a CPU, the same in any batch."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from indexes import build

from distrain.data.decoded import DecodedBatches
from distrain.data.decoding import Decoder, EvaluationTransform, Preprocessing, TrainingTransform
from distrain.data.gpu_decoding import GpuDecoder
from distrain.data.images import Decoding
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.environment import World

pytestmark = pytest.mark.gpu
SIZE = 224
ALONE = World()
Pixels = dict[int, torch.Tensor]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("photos")
    return build(folder, {"train": [200, 184], "test": [8]}, lanes=8, shards=16).with_image_size(SIZE)


def decode(dataset: Dataset, decoder: Decoder, device: str, world: World = ALONE) -> tuple[Pixels, float]:
    """Return the pixels of an epoch on the CPU, by id, and the images decoded in a second."""
    split = dataset.split("train")
    order = Order(len(split.sizes), split.lanes, int(split.sizes.min()), 32, seed=3)
    how = Preprocessing(
        decoder, TrainingTransform(SIZE, SIZE, (0.08, 1.0), (0.75, 4 / 3)), EvaluationTransform(8, 8, 8)
    )
    pixels: Pixels = {}
    started = time.perf_counter()
    steps = range(order.steps_per_epoch)
    with closing(DecodedBatches(dataset, order, (world,), steps, 1, how, torch.device(device))) as batches:
        for (batch,) in batches:
            pixels |= dict(zip(batch.ids.tolist(), batch.images.cpu().clone(), strict=True))
    return pixels, len(pixels) / (time.perf_counter() - started)


def test_pixels_are_nearly_those_of_a_cpu_and_the_same_in_any_batch(
    photos: Dataset, device: str, measured: Any
) -> None:
    on_cpu, cpu_rate = decode(photos, Decoder(4, Decoding()), device)
    with closing(GpuDecoder(torch.device(device), 1, Decoding())) as decoder:
        on_gpu, rate = decode(photos, decoder, device)
        again, rate = decode(photos, decoder, device)
        parts = [decode(photos, decoder, device, World(rank, 4))[0] for rank in range(4)]
    differences = np.array([(on_cpu[id_].int() - on_gpu[id_].int()).abs().float().mean() for id_ in on_cpu])
    measured("largest mean difference of an image's pixels", float(differences.max()), "of 255")
    measured("images decoded by 4 threads of the CPU", cpu_rate, "images/s")
    measured("images decoded by the GPU", rate, "images/s")
    assert differences.max() < 4
    assert all(on_gpu[id_].equal(again[id_]) for id_ in on_gpu)
    merged = {id_: image for part in parts for id_, image in part.items()}
    assert all(merged[id_].equal(on_gpu[id_]) for id_ in on_gpu)
