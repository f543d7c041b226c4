"""The plain loop with virtual ranks: the weights are the same, bit for bit, on 1 to 6 processes, interrupted or not.

distrain prepare synthetic --out data/synthetic
torchrun --nproc-per-node 2 examples/same_bits_loop.py --data data/synthetic --out runs/same-bits
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_loop import make_model

import distrain

VIRTUAL_RANKS = 6


def main() -> None:
    """Train, save every few steps, and print a digest of the weights."""
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

    ranks = distrain.VirtualRanks(model, VIRTUAL_RANKS, args.batch, example=torch.zeros(2, 3, 32, 32, device=device))
    steps = range(start, args.steps)
    batches = distrain.batches(
        args.data, global_batch_size=args.batch, steps=steps, device=device, virtual_ranks=VIRTUAL_RANKS
    )
    for step, of_ranks in zip(steps, batches, strict=True):
        optimizer.zero_grad()
        for batch in ranks.in_step(step, of_ranks):
            logits = ranks(distrain.normalize(batch.images, data.mean, data.std))
            (F.cross_entropy(logits, batch.labels, reduction="sum") / args.batch).backward()
        optimizer.step()
        if dist.get_rank() == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            args.out.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)  # so that the checkpoint is always complete

    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    if dist.get_rank() == 0:
        print(f"weights after step {args.steps}: sha256 {digest.hexdigest()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
