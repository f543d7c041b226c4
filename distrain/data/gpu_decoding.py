"""Decoding on a GPU (nvJPEG): whole batches of JPEG files at once. Its pixels differ from a CPU's by rounding."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from distrain.data import images
from distrain.data.decoding import Bad, Decoder, Transform
from distrain.data.encoded import Encoded
from distrain.data.pillow import Decoding

_GPU_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""RuntimeErrors that say nothing about a file: it must not be decoded by the CPU after them, to other pixels."""


class GpuDecoder(Decoder):
    """Decodes JPEG files on a GPU; a CPU decodes all other images, and those that the GPU cannot.

    Which one decodes an image depends on the image alone, and so do its pixels.

    Args:
        device: the GPU.
        threads: for images that are scored, which the CPU decodes.
        decoding: how image files become pixels.
    """

    def __init__(self, device: torch.device, threads: int, decoding: Decoding) -> None:
        super().__init__(threads, decoding)
        self.device = device
        self._gpu_thread = ThreadPoolExecutor(1, thread_name_prefix="distrain-decode-gpu", initializer=self._begin)

    def start(
        self, batch: Encoded, transform: Transform, out: Tensor, stop: threading.Event
    ) -> list[Future[list[Bad]]]:
        """Start to decode a batch to the rows of `out`, uint8 [n, H, W, C], on the GPU or the CPU."""
        if out.device != self.device:
            return super().start(batch, transform, out, stop)
        return [self._gpu_thread.submit(self._decode_batch, batch, transform, out, stop)]

    def _begin(self) -> None:
        warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # GPU 0 in a new thread
            torch.cuda.set_stream(torch.cuda.Stream(self.device))  # training steps do not wait

    def _decode_batch(self, batch: Encoded, transform: Transform, out: Tensor, stop: threading.Event) -> list[Bad]:
        if stop.is_set():
            return []
        boxes = self.boxes(batch, transform)
        files = [batch.stretches[which].images[number] for which, number in batch.origin.tolist()]
        rows = [row for row, data in enumerate(files) if images.is_plain_jpeg(data, self.decoding)]
        decoded = dict(zip(rows, self._decode_files([files[row] for row in rows]), strict=True))
        reports = []
        for row in range(len(files)):
            pixels, entry = decoded.get(row), batch.samples[row]
            if pixels is not None and pixels.shape[:2] == (entry["height"], entry["width"]):
                transform.apply(pixels, images.Box(*boxes[row].tolist()), batch.random_bits[row], out[row])
                continue
            on_cpu = torch.empty(out.shape[1:], dtype=torch.uint8)
            reports.append(self.decode_row(batch, row, transform, boxes[row], on_cpu))
            out[row].copy_(on_cpu)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return [bad for bad in reports if bad is not None]

    def _decode_files(self, files: Sequence[memoryview]) -> list[Tensor | None]:
        """Return the pixels uint8 [H, W, C] of JPEG files, on the GPU; None for one that it cannot decode."""
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        if not tensors:
            return []
        try:
            return [planes.permute(1, 2, 0) for planes in decode_jpeg(tensors, ImageReadMode.RGB, self.device)]
        except _GPU_ERRORS:
            raise
        except RuntimeError:  # one of them cannot be decoded
            return [self._decode_file(tensor) for tensor in tensors]

    def _decode_file(self, file: Tensor) -> Tensor | None:
        try:
            planes: Tensor = decode_jpeg([file], ImageReadMode.RGB, self.device)[0]
        except _GPU_ERRORS:
            raise
        except RuntimeError:
            return None
        return planes.permute(1, 2, 0)
