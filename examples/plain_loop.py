"""A plain PyTorch loop under DDP. Run the command again, with any number of processes: it resumes where it ended.

distrain prepare synthetic --out data/synthetic
torchrun --nproc-per-node 2 examples/plain_loop.py --data data/synthetic --out runs/plain
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    data = distrain.open_data(args.data)
    model = make_model(len(data.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    start, path = 0, args.out / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]

    parallel, scale = DistributedDataParallel(model), distrain.loss_scale(args.batch, dist.get_world_size())
    steps = range(start, args.steps)
    batches = distrain.batches(args.data, global_batch_size=args.batch, steps=steps, device=device)
    for step, batch in zip(steps, batches, strict=True):
        logits = parallel(distrain.normalize(batch.images, data.mean, data.std))
        optimizer.zero_grad()
        (F.cross_entropy(logits, batch.labels, reduction="sum") * scale).backward()
        optimizer.step()
        if dist.get_rank() == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
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
    dist.all_reduce(counts)
    if dist.get_rank() == 0:
        print(f"{counts[0]} of {counts[1]} test images are correct")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
