"""A loop with Hugging Face accelerate. Run the command again, with any number of processes: it resumes where it ended.

distrain prepare synthetic --out data/synthetic
accelerate launch --num_processes 2 examples/accelerate_loop.py --data data/synthetic --out runs/accelerate

On CPUs: torchrun --nproc-per-node 2 examples/accelerate_loop.py …
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import distrain


def make_model(classes: int) -> nn.Module:
    """Build a small convolutional network for images of three channels."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes))


def main() -> None:
    """Train, save every few steps, and evaluate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="samples of a step, of all processes together")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device, data = accelerator.device, distrain.open_data(args.data)
    torch.manual_seed(0)
    model = make_model(len(data.classes))
    # The loader is not prepared: accelerate would divide again what is divided already.
    prepared, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=2e-3))

    start, path = 0, args.out / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]

    scale = distrain.loss_scale(args.batch, accelerator.num_processes)
    steps = range(start, args.steps)
    batches = distrain.batches(args.data, global_batch_size=args.batch, steps=steps, device=device)
    for step, batch in zip(steps, batches, strict=True):
        logits = prepared(distrain.normalize(batch.images, data.mean, data.std))
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(logits, batch.labels, reduction="sum") * scale)
        optimizer.step()
        if accelerator.is_main_process and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            args.out.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)  # so that the checkpoint is always complete

    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # correct predictions, and all
    for images, labels, _ in distrain.evaluation_batches(args.data, "test"):
        with torch.no_grad():
            predicted = model(distrain.normalize(images.to(device), data.mean, data.std)).argmax(1).cpu()
        counts += torch.tensor([int((predicted == labels).sum()), len(labels)], device=device)
    counts = accelerator.reduce(counts, "sum")
    accelerator.print(f"{counts[0]} of {counts[1]} test images are correct")
    accelerator.end_training()


if __name__ == "__main__":
    main()
