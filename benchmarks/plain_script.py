"""The baseline: a plain PyTorch script after the CIFAR-10 tutorial. Of distrain it uses only the model.

Image files in class folders → ImageFolder → PIL transforms → DataLoader with two workers → the small CNN.

    python -m benchmarks.plain_script IMAGES      # IMAGES has train/CLASS/*.jpg and test/CLASS/*.jpg

Prints a JSON object: seed, accuracy, seconds of training (loading included), images per second.
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


def open_batches(folder: Path, batch_size: int, workers: int, shuffle: bool) -> DataLoader[Any]:
    """Return the batches of an epoch."""
    # The tutorial's images are 32×32; others are resized and cropped, as `distrain prepare folder` does.
    resize = [transforms.Resize(32), transforms.CenterCrop(32)]
    transform = transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    return DataLoader(ImageFolder(str(folder), transform), batch_size, shuffle=shuffle, num_workers=workers)


def train(model: nn.Module, batches: Iterable[Any], lr: float, device: str) -> int:
    """Train on the batches, and return the number of images."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    count = 0
    for images, labels in batches:
        optimizer.zero_grad()
        criterion(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        count += len(labels)
    if device == "cuda":
        torch.cuda.synchronize()
    return count


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader[Any], device: str) -> float:
    """Return the fraction of correct predictions."""
    model.eval()
    correct = [(model(images.to(device)).argmax(1).cpu() == labels).sum() for images, labels in batches]
    return int(sum(correct)) / len(batches.dataset)  # type: ignore[arg-type]


def main() -> None:
    """Train, and print the result."""
    parser = argparse.ArgumentParser(description="Train the small CNN as PyTorch's CIFAR-10 tutorial does.")
    parser.add_argument("images", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="stop after so many steps, without an evaluation")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    batches = open_batches(options.images / "train", options.batch_size, options.workers, shuffle=True)
    model = Net(len(batches.dataset.classes), (3, 32, 32)).to(options.device)  # type: ignore[attr-defined]

    epochs = options.epochs if options.steps is None else -(-options.steps // len(batches))
    started = time.perf_counter()
    all_batches = itertools.chain.from_iterable(batches for _ in range(epochs))
    images = train(model, itertools.islice(all_batches, options.steps), options.lr, options.device)
    seconds = time.perf_counter() - started

    score = None
    if options.steps is None:
        test_batches = open_batches(options.images / "test", options.batch_size, options.workers, shuffle=False)
        score = accuracy(model, test_batches, options.device)
    result = {"seed": options.seed, "accuracy": score, "seconds": seconds, "images_per_second": images / seconds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
