"""Draws of mixup and CutMix; a run trains what a plain loop of them trains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from test_promise import by_id, configuration, distance, weights

import distrain
from distrain import models
from distrain.config import Augment
from distrain.data.manifest import Dataset
from distrain.data.order import cutmix_box, draws_cutmix, mixup_weight
from distrain.training import augment, mixing, optim

BOTH = Augment(mixup=0.3, cutmix=1.0)


def test_a_step_draws_mixup_or_cutmix_and_the_same_ones_again() -> None:
    drawn = [mixing.draw(BOTH, 5, step, 20, 30) for step in range(2000)]
    assert drawn[7] == mixing.draw(BOTH, 5, 7, 20, 30)
    with_box = [each.box is not None for each in drawn if each is not None]
    assert 0.46 < sum(with_box) / 2000 < 0.54
    for step, how in enumerate(drawn):
        if how is not None and how.box is None:
            assert how.weight == mixup_weight(5, step, 0.3)
    assert all(how is not None and how.box is None for how in [mixing.draw(Augment(mixup=0.3), 5, 1, 20, 30)])
    assert all(how is not None and how.box is not None for how in [mixing.draw(Augment(cutmix=1.0), 5, 2, 20, 30)])
    assert mixing.draw(Augment(), 5, 1, 20, 30) is None


def test_boxes_are_those_of_cutmix() -> None:
    """Torchvision's CutMix has boxes of this mean area, and as many pixels of them at the edge as in the middle."""
    height, width = 20, 30
    boxes = [cutmix_box(3, step, 1.0, height, width) for step in range(4000)]
    inside = np.zeros((height, width))
    for top, left, bottom, right in boxes:
        assert 0 <= top <= bottom <= height
        assert 0 <= left <= right <= width
        inside[top:bottom, left:right] += 1 / 4000
    assert abs(inside.mean() - 0.30) < 0.02
    assert abs(inside[:, :15].mean() - inside[:, 15:].mean()) < 0.03
    assert abs(inside[:10].mean() - inside[10:].mean()) < 0.03
    rare = [cutmix_box(3, step, 0.05, height, width) for step in range(400)]  # nearly all weights are almost 0 or 1
    areas = np.array([(bottom - top) * (right - left) for top, left, bottom, right in rare]) / (height * width)
    assert (areas < 0.02).mean() > 0.4


def test_a_run_trains_what_a_plain_loop_trains(small: Dataset, tmp_path: Path) -> None:
    """Micro-batches, and a batch that ends within a row of lanes."""
    steps, lanes = 4, 12
    sections = {
        "train": {
            "max_steps": steps, "epochs": None, "global_batch_size": 31, "micro_batch_size": 7, "label_smoothing": 0.1,
        },
        "augment": {"flip": False, "crop_padding": 0, "mixup": 0.4, "cutmix": 1.0},
        "checkpoint": {"every_steps": 1, "keep": 0},
        "log": {"report": False},
    }  # fmt: skip
    distrain.train(configuration(small, tmp_path / "run", **sections))
    images, labels = by_id(small)
    one_hot = F.one_hot(labels, 10).double()
    torch.manual_seed(7)
    net = models.build("net", "relu", 10, (3, 16, 16)).double()
    sgd = torch.optim.SGD(net.parameters(), 1.0, momentum=0.9)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (small.manifest.mean, small.manifest.std))
    kinds = set()
    for step, line in enumerate(map(json.loads, (tmp_path / "run/audit/rank-00000.jsonl").open())):
        ids = line["ids"]
        partner = [ids[at + lanes] if at + lanes < len(ids) else ids[at % lanes] for at in range(len(ids))]
        inputs, others = images[ids].clone(), images[partner]
        if draws_cutmix(7, step):
            top, left, bottom, right = cutmix_box(7, step, 1.0, 16, 16)
            inputs[:, top:bottom, left:right] = others[:, top:bottom, left:right]
            weight = 1 - (bottom - top) * (right - left) / 256
            normal = augment.normalize(inputs, mean, std)
        else:
            weight = mixup_weight(7, step, 0.4)
            normal = augment.normalize(inputs, mean, std) * weight + augment.normalize(others, mean, std) * (1 - weight)
        kinds.add(draws_cutmix(7, step))
        classes = weight * one_hot[ids] + (1 - weight) * one_hot[partner]
        sgd.param_groups[0]["lr"] = optim.learning_rate(step, steps, "one_cycle", 0.1, 0.25)
        sgd.zero_grad()
        F.cross_entropy(net(normal), classes, label_smoothing=0.1).backward()
        sgd.step()
        assert distance(weights(tmp_path / "run", step + 1), dict(net.state_dict())) < 1e-12, f"step {step}"
    assert kinds == {True, False}
