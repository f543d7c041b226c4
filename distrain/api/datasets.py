"""A data set as a training loop sees it: classes, sizes, and the steps of an epoch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from distrain import config as configuration
from distrain.api.arguments import text_of
from distrain.data.manifest import Dataset
from distrain.errors import ConfigError
from distrain.training import inputs


@dataclass(frozen=True)
class DatasetInfo:
    """A data set that was opened with `distrain.open_data`.

    Attributes:
        classes: their names; a label is an index of this list.
        samples: number of samples of each split.
        image_shape: [H, W, C] of the images; None for an index of images of several sizes.
        mean: of the train split, per channel, with images in 0 … 1.
        std: of the train split, per channel; never 0.
        lanes: number of lanes of the train split, the largest number of processes.
        is_index: whether the samples are encoded images in tar files; else they are blocks of images of one size.
        digest: sha256 of the manifest, which has the digests of all files.
    """

    classes: list[str]
    samples: dict[str, int]
    image_shape: list[int] | None
    mean: list[float]
    std: list[float]
    lanes: int
    is_index: bool
    digest: str
    _dataset: Dataset = field(repr=False)

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """Return the number of steps of an epoch; samples that fill no global batch are dropped, others in each epoch.

        Raises:
            ConfigError: an epoch has no whole global batch.
        """
        if global_batch_size < 1:
            raise ConfigError(f"global_batch_size={global_batch_size}: should be 1 or more")
        return inputs.order_of(self._dataset, global_batch_size, seed=0).steps_per_epoch

    def epoch(self, step: int, global_batch_size: int) -> tuple[int, int]:
        """Return the epoch of a step, and the number of the step in it, both from 0."""
        return divmod(step, self.steps_per_epoch(global_batch_size))

    def steps(self, epochs: range, global_batch_size: int) -> range:
        """Return the steps of consecutive epochs: `steps(range(3), 512)` for the first three."""
        per_epoch = self.steps_per_epoch(global_batch_size)
        return range(epochs.start * per_epoch, epochs.stop * per_epoch)


def open_data(data_dir: str | os.PathLike[str], *, tars: str | None = None) -> DatasetInfo:
    """Read the description of a data set; no samples are read.

    Args:
        data_dir: its folder or address, as `data.dir`.
        tars: folder or address of the tar files of an index; None: where they were when it was made.

    Raises:
        ConfigError: `data_dir` is no path, or the address cannot be opened.
        DataError: there is no data set, it is damaged, or it has no train split.
    """
    config = configuration.from_tree({"data": {"dir": text_of("data_dir", data_dir), "tars": tars}})
    dataset = inputs.open_data(config, "train")
    manifest = dataset.manifest
    return DatasetInfo(
        manifest.classes,
        {str(name): split.samples for name, split in manifest.splits.items()},
        manifest.image_shape,
        manifest.mean,
        manifest.std,
        dataset.split("train").lanes,
        dataset.is_index,
        dataset.digest,
        dataset,
    )
