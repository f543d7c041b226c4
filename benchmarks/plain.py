"""The baseline: a plain PyTorch training script after the CIFAR-10 tutorial, without distrain's reading or training.

JPEG files in class folders → ImageFolder → PIL transforms → DataLoader with two workers → the small CNN.

    python benchmarks/plain.py IMAGES      # IMAGES has train/CLASS/*.jpg and test/CLASS/*.jpg

Prints one line of JSON: seed, accuracy, seconds of training (loading included), images per second.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from distrain.models.net import Net


def load(folder: Path, batch_size: int, workers: int, shuffle: bool) -> DataLoader:
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    dataset = ImageFolder(str(folder), transform)
    return DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=workers)


def train(model: nn.Module, batches: DataLoader, epochs: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss_of(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(batches.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small CNN as PyTorch's CIFAR-10 tutorial does.")
    parser.add_argument("images", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--threads", type=int, help="threads that compute; torch's default where not given")
    asked = parser.parse_args()

    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)
    training = load(asked.images / "train", asked.batch_size, asked.workers, shuffle=True)
    test = load(asked.images / "test", asked.batch_size, asked.workers, shuffle=False)
    model = Net(len(training.dataset.classes), (3, 32, 32))

    started = time.perf_counter()
    train(model, training, asked.epochs, asked.lr)
    seconds = time.perf_counter() - started

    figures = {
        "seed": asked.seed,
        "accuracy": accuracy(model, test),
        "seconds": seconds,
        "images_per_second": asked.epochs * len(training.dataset) / seconds,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
