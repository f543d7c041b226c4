"""A Lightning module. Run the command again, with any number of processes: it resumes where it ended.

distrain prepare synthetic --out data/synthetic
torchrun --nproc-per-node 2 examples/lightning_module.py --data data/synthetic --out runs/lightning
"""

import argparse
import os
from collections.abc import Iterator

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import distrain


class Classifier(lightning.LightningModule):
    """A small convolutional network for images of three channels."""

    def __init__(self, folder: str, steps: int, batch: int) -> None:
        super().__init__()
        self.folder, self.steps, self.batch, self.data = folder, steps, batch, distrain.open_data(folder)
        layers: list[nn.Module] = []
        for channels_in, channels_out in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, len(self.data.classes)))
        self.counts = torch.zeros(2, dtype=torch.int64)  # correct predictions, and all

    def train_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the remaining steps: Lightning has restored `global_step` before it calls this."""
        steps = range(self.trainer.global_step, self.steps)
        for batch in distrain.batches(self.folder, global_batch_size=self.batch, steps=steps):
            yield batch.images.clone(), batch.labels.clone()  # Lightning takes the next batch before it uses this one

    def test_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the test images, each on one process."""
        return ((images, labels) for images, labels, _ in distrain.evaluation_batches(self.folder, "test"))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss, scaled so that the gradient is the mean over the global batch."""
        logits = self.net(distrain.normalize(batch[0], self.data.mean, self.data.std))
        scale = distrain.loss_scale(self.batch, self.trainer.world_size)
        return F.cross_entropy(logits, batch[1], reduction="sum") * scale

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Count the correct predictions of this process."""
        correct = self.net(distrain.normalize(batch[0], self.data.mean, self.data.std)).argmax(1) == batch[1]
        self.counts += torch.tensor([int(correct.sum()), len(correct)])

    def on_test_epoch_end(self) -> None:
        """Add the counts of all processes."""
        counts = self.trainer.strategy.reduce(self.counts.to(self.device), reduce_op="sum")
        self.print(f"{counts[0]} of {counts[1]} test images are correct")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="samples of a step, of all processes together")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    args = parser.parse_args()
    lightning.seed_everything(0)
    model = Classifier(args.data, args.steps, args.batch)
    saving = ModelCheckpoint(args.out, save_last=True, every_n_train_steps=args.save_every)
    local, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    trainer = lightning.Trainer(
        devices=local, num_nodes=world // local, max_steps=args.steps, callbacks=[saving], logger=False
    )
    trainer.fit(model, ckpt_path="last", weights_only=True)
    trainer.test(model)
