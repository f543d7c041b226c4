"""TrivialAugmentWide: the operations and their strengths are torchvision's; what is drawn follows from the bits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from distrain.data.order import augmentation_bits
from distrain.data.trivial_augment import draw, operations, trivial_augment

THEIRS = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
IMAGE = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_no_operation_is_missing() -> None:
    assert list(operations()) == list(THEIRS._AUGMENTATION_SPACE)


@pytest.mark.parametrize("name", THEIRS._AUGMENTATION_SPACE)
def test_an_operation_is_that_of_torchvision(name: str) -> None:
    operation, planes = operations()[name], IMAGE.permute(2, 0, 1)
    strengths_of, is_signed = THEIRS._AUGMENTATION_SPACE[name]
    strengths = strengths_of(31, 20, 24)
    assert operation.is_signed == is_signed
    assert list(operation.strengths) == ([] if strengths is None else strengths.tolist())
    changed = 0
    for strength in operation.strengths or [0.0]:
        for signed in (strength, -strength) if is_signed else (strength,):
            expected = THEIRS._apply_image_or_video_transform(
                planes.contiguous(), name, signed, THEIRS.interpolation, THEIRS._fill
            )
            assert torch.equal(operation.apply(planes, signed), expected)
            changed += not torch.equal(expected, planes)
    assert (changed > 0) == (name != "Identity")


def test_operations_strengths_and_signs_are_equally_likely_and_independent_of_other_bits() -> None:
    bits = augmentation_bits(1, np.array([5]), np.arange(7_000))
    drawn = [draw(each) for each in bits]
    names = {id(operation): name for name, operation in operations().items()}
    counts = Counter(names[id(operation)] for operation, _ in drawn)
    assert len(counts) == 14
    assert min(counts.values()) > 400
    signed = np.array([strength for operation, strength in drawn if operation.is_signed and strength])
    assert abs((signed < 0).mean() - 0.5) < 0.03
    angles = Counter(round(abs(strength), 3) for operation, strength in drawn if names[id(operation)] == "Rotate")
    assert len(angles) == 31
    is_rotated = np.array([names[id(operation)] == "Rotate" for operation, _ in drawn])
    for column, shift in ((0, 0), (1, 0), (1, 20), (1, 39)):  # the bits of mirroring and cutout
        bit = (bits[:, column] >> np.uint64(shift) & np.uint64(1)).astype(float)
        assert abs(np.corrcoef(bit, is_rotated)[0, 1]) < 0.03
    assert drawn[3] == draw(bits[3])


def test_an_image_of_a_batch_is_changed_in_place() -> None:
    for bits in augmentation_bits(1, np.array([5]), np.arange(40)):
        batch = torch.stack([IMAGE, IMAGE])
        trivial_augment(batch[1], bits)
        operation, strength = draw(bits)
        assert torch.equal(batch[1], operation.apply(IMAGE.permute(2, 0, 1), strength).permute(1, 2, 0))
        assert torch.equal(batch[0], IMAGE)
