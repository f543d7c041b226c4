"""The baseline: a plain PyTorch training script after the CIFAR-10 tutorial, without distrain's reading or training.

Image files in class folders → ImageFolder → PIL transforms → DataLoader with two workers → the small CNN.

    python -m distrain.tools.bench.plain IMAGES      # IMAGES has train/CLASS/*.jpg and test/CLASS/*.jpg

Prints one line of JSON: seed, accuracy, seconds of training (loading included), images per second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from distrain.models.net import Net


def load(folder: Path, batch_size: int, workers: int, shuffle: bool) -> DataLoader[Any]:
    """The batches of an epoch."""
    # The tutorial's images are 32×32 already; others are made so, as `distrain prepare folder` does.
    resize = [transforms.Resize(32), transforms.CenterCrop(32)]
    transform = transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    return DataLoader(ImageFolder(str(folder), transform), batch_size, shuffle=shuffle, num_workers=workers)


def train(model: nn.Module, batches: Iterable[Any], lr: float, device: str) -> int:
    """Images trained on."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    count = 0
    for images, labels in batches:
        optimizer.zero_grad()
        loss_of(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        count += len(labels)
    if device == "cuda":
        torch.cuda.synchronize()
    return count


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader[Any], device: str) -> float:
    """Fraction of the test images whose class was predicted."""
    model.eval()
    right = [(model(images.to(device)).argmax(1).cpu() == labels).sum() for images, labels in batches]
    return int(sum(right)) / len(batches.dataset)  # type: ignore[arg-type]


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(description="Train the small CNN as PyTorch's CIFAR-10 tutorial does.")
    parser.add_argument("images", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="end after so many; then nothing is tested")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()

    torch.manual_seed(asked.seed)
    training = load(asked.images / "train", asked.batch_size, asked.workers, shuffle=True)
    model = Net(len(training.dataset.classes), (3, 32, 32)).to(asked.device)  # type: ignore[attr-defined]

    epochs = asked.epochs if asked.steps is None else -(-asked.steps // len(training))
    started = time.perf_counter()
    batches = itertools.chain.from_iterable(training for _ in range(epochs))
    images = train(model, itertools.islice(batches, asked.steps), asked.lr, asked.device)
    seconds = time.perf_counter() - started

    tested = None
    if asked.steps is None:
        test = load(asked.images / "test", asked.batch_size, asked.workers, shuffle=False)
        tested = accuracy(model, test, asked.device)
    found = {"seed": asked.seed, "accuracy": tested, "seconds": seconds, "images_per_second": images / seconds}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
