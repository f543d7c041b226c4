"""The baseline of configs/speedrun.yaml: the same settings in a plain loop. Of distrain it uses model and optimizer.

The whole training set is in memory, and each epoch trains it in a new random order, on one device.

    python -m benchmarks.plain_speedrun DATA --seed 0     # DATA: a data set of blocks, 32×32

Prints a JSON object after each epoch: epoch, loss, accuracy on test with mirror images, seconds of training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distrain
from distrain import config
from distrain.data import manifest
from distrain.data.stream import EvaluationBatches
from distrain.environment import World
from distrain.models.whitened import Whitened
from distrain.training import optim

_RECIPE = Path(__file__).parent.parent / "configs/speedrun.yaml"
_EVALUATED = 1000
"""Images of a batch of the evaluation."""


class Images:
    """The images and labels of a split in memory: normalised [N, C, H, W], int64 [N]."""

    def __init__(self, data: Path, split: str, device: str) -> None:
        dataset = manifest.read(str(data))
        self.classes = len(dataset.manifest.classes)
        batches = list(EvaluationBatches(dataset, split, World(), _EVALUATED))
        mean, std = (torch.tensor(each, device=device) for each in (dataset.manifest.mean, dataset.manifest.std))
        pixels = torch.cat([images for images, _, _ in batches]).to(device)
        self.images = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        self.labels = torch.cat([labels for _, labels, _ in batches]).to(device)


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `most` pixels in each direction, with reflected edges."""
    size = images.shape[-1]
    padded = F.pad(images, (most,) * 4, "reflect").permute(0, 2, 3, 1)
    first = torch.randint(2 * most + 1, (2, len(images), 1), generator=generator)
    rows, columns = (first + torch.arange(size)).to(images.device)
    samples = torch.arange(len(images), device=images.device)
    return padded[samples[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: nn.Module, test: Images) -> float:
    """Return the fraction of correct predictions, from the mean logits of each image and its mirror image."""
    model.eval()
    correct = 0
    for images, labels in zip(test.images.split(_EVALUATED), test.labels.split(_EVALUATED), strict=True):
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = (model(images) + model(images.flip(3))) / 2
        correct += int((logits.argmax(1) == labels).sum())
    model.train()
    return correct / len(test.labels)


def main() -> None:
    """Train, and print a line for each epoch."""
    parser = argparse.ArgumentParser(description="Train configs/speedrun.yaml in a plain loop.")
    parser.add_argument("data", type=Path, help="a prepared data set of blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("keys", nargs="*", help="section.key=value, in place of the recipe's")
    options = parser.parse_args()
    settings = config.load(_RECIPE, options.keys)
    distrain.keep_freed_memory()  # as the trainer does
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    train, test = (Images(options.data, split, options.device) for split in ("train", "test"))
    model = Whitened(train.classes, tuple(train.images.shape[1:]))  # type: ignore[arg-type]
    model.initialize_from_images(train.images[:1000].cpu())
    model = model.to(options.device)
    optimizer = optim.build(settings.train, model)
    batch, epochs = settings.train.global_batch_size, settings.train.epochs or 1
    steps = len(train.labels) // batch
    mirrored = torch.rand(len(train.labels), generator=generator) < 0.5
    seconds = 0.0
    for epoch in range(epochs):
        started, loss = time.perf_counter(), torch.zeros((), device=options.device)
        for number, indices in enumerate(torch.randperm(len(train.labels), generator=generator).split(batch)[:steps]):
            flip = (mirrored[indices] ^ (epoch % 2 == 1)).to(options.device)
            images = shifted(train.images[indices], settings.augment.crop_padding, generator)
            images = torch.where(flip[:, None, None, None], images.flip(3), images)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(options.device, torch.bfloat16):
                logits = model(images)
            one = F.cross_entropy(logits.float(), train.labels[indices], label_smoothing=settings.train.label_smoothing)
            optimizer.zero_grad()
            one.backward()
            rate = optim.learning_rate(epoch * steps + number, epochs * steps, "one_cycle", settings.train.lr, 0.0)
            optim.set_learning_rate(optimizer, rate, settings.train.lr)
            optimizer.step()
            loss += one.detach() / steps
        loss_value = loss.item()  # waits for the device
        seconds += time.perf_counter() - started
        score = accuracy(model, test)
        print(json.dumps({"epoch": epoch + 1, "loss": loss_value, "accuracy": score, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
