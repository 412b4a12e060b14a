"""SparseFusion's forward pass for inference on a GPU: the same network, arranged to keep the GPU busy.

* Batch norms are folded into the convolutions before them, and 2D convolutions run on channels-last tensors, in half
  precision if so configured. What is sensitive stays in float32, as under autocast.
* The sparse encoder runs on the Triton backend; only its sizes depend on the data.
* The image branch, and all that follows the encoder, are CUDA graphs. The first runs beside the sparse encoder, whose
  many small kernels go before it. In the second what is done for the cameras alone runs beside what is for the LiDAR.
* A second thread takes the images up: to copy 26 MB (six of 1600 x 900) takes the host 4 ms, and no lock of Python's.

The host waits for the device once for each strided convolution of the encoder, since the number of its sites has to be
known, and once for the number of BEV cells that a view sees.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from perception.networks.layers.attention import Attention, DeformableAttention
from perception.networks.layers.cuda_graphs import CudaGraphs
from perception.networks.layers.folding import fold_norms
from perception.networks.sparsefusion.encode import Encoder
from perception.networks.sparsefusion.head import Head
from perception.networks.sparsefusion.image import ImageBranch
from perception.networks.sparsefusion.lidar import LidarBranch
from perception.networks.sparsefusion.tensors import Calibration, Inputs, Outputs
from perception.networks.sparsefusion.transformer import FeedForward
from perception.types import Sample

_CELLS_STEP = 512
"""Numbers of visible cells are rounded up to it: each is a graph of its own."""


class FastForward:
    """Inputs -> Outputs, equal to the modules' own up to rounding; the tensors are overwritten by the next call.

    The modules are copied: later changes of their weights do not show.

    Args:
        lidar, image, head: of a SparseFusion in evaluation mode, on a GPU.
        dtype: float32, float16 or bfloat16.
    """

    def __init__(self, lidar: LidarBranch | None, image: ImageBranch | None, head: Head, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._lidar = None if lidar is None else _prepared(lidar, dtype)
        self._image = None if image is None else _prepared(image, dtype).to(dtype)
        self._head = _prepared(head, dtype)
        if self._lidar is not None:
            self._lidar.encoder.backend = "triton"
            for part in (self._lidar.encoder.stages, self._lidar.encoder.output):
                part.to(dtype)
        self._image_graphs = CudaGraphs(self._run_image)
        self._rest_graphs = CudaGraphs(self._run_rest)
        self._ahead = torch.cuda.Stream(priority=-1)
        self._beside = torch.cuda.Stream()
        self._cameras = torch.cuda.Stream()
        self._thread = ThreadPoolExecutor(1, "images")

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Into a stream whose kernels go before those of the image branch; the stream outside waits for it."""
        outside = torch.cuda.current_stream()
        self._ahead.wait_stream(outside)
        with torch.cuda.stream(self._ahead):
            yield
        outside.wait_stream(self._ahead)

    def encode(self, encoder: Encoder, samples: Sequence[Sample]) -> Inputs:
        """What the encoder makes of the samples."""
        if self._image is None:
            return encoder(samples)
        images = self._thread.submit(self._take_up, encoder, samples)
        inputs: Inputs = encoder(samples, images=False)
        inputs = inputs._replace(images=images.result())
        torch.cuda.current_stream().wait_stream(self._beside)
        return inputs

    @torch.inference_mode()  # of this thread
    def _take_up(self, encoder: Encoder, samples: Sequence[Sample]) -> Tensor:
        with torch.cuda.stream(self._beside):
            return encoder.all_images(samples)

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Outputs:
        """All predictions."""
        levels = None
        if inputs.images is not None:
            self._beside.wait_stream(torch.cuda.current_stream())
            inputs.images.record_stream(self._beside)  # wherever they were made
            with torch.cuda.stream(self._beside):
                levels = self.levels(inputs.images)
        cells = self.visible_cells(inputs)
        bev = None if self._lidar is None else self.bev(inputs)
        torch.cuda.current_stream().wait_stream(self._beside)
        return self.rest(inputs, bev, levels, cells)

    def levels(self, images: Tensor) -> tuple[Tensor, ...]:
        """The image branch, of images (B, K, 3, H, W)."""
        return self._image_graphs(images)

    def bev(self, inputs: Inputs) -> Tensor:
        """The sparse encoder."""
        assert self._lidar is not None
        bev: Tensor = self._lidar.encoder(inputs.voxels, inputs.coordinates, inputs.batch_size)
        return bev

    def rest(
        self, inputs: Inputs, bev: Tensor | None, levels: tuple[Tensor, ...] | None, visible_cells: int | None
    ) -> Outputs:
        """The BEV map's backbone and pyramid, and the head; of what the three methods above gave."""
        maps = [m for m in (bev, inputs.height_min, inputs.height_max, inputs.sparse_depth) if m is not None]
        return self._rest_graphs(*maps, *(inputs.calibration or ()), levels=levels, visible_cells=visible_cells)

    def visible_cells(self, inputs: Inputs) -> int | None:
        """BEV cells that a view sees at most, rounded up; None where there is no semantic transfer."""
        if self._lidar is None or self._image is None:
            return None
        assert inputs.height_min is not None
        assert inputs.height_max is not None
        assert inputs.calibration is not None
        cells = self._head.visible_cells(inputs.height_min, inputs.height_max, inputs.calibration)
        return -(-cells // _CELLS_STEP) * _CELLS_STEP

    def _run_image(self, images: Tensor) -> tuple[Tensor, ...]:
        assert self._image is not None
        flat = images.flatten(0, 1).to(self._dtype, memory_format=torch.channels_last)
        return tuple(self._image(flat))

    def _run_rest(self, *tensors: Tensor, levels: tuple[Tensor, ...] | None, visible_cells: int | None) -> Outputs:
        """See `rest`, whose tensors these are, in its order."""
        left = list(tensors)
        bev = low = high = depth = calibration = None
        half = self._dtype != torch.float32
        with torch.autocast("cuda", self._dtype if half else None, enabled=half, cache_enabled=False):
            if self._lidar is not None:
                bev = left.pop(0).to(memory_format=torch.channels_last)
                low, high = left.pop(0), left.pop(0)
            if self._image is not None:
                depth = left.pop(0) if self._lidar is not None else None
                calibration = Calibration(*left)
            if bev is not None and calibration is not None:
                return self._in_two_streams(bev, low, high, levels, depth, calibration, visible_cells)
            if self._lidar is not None and bev is not None:
                bev = self._lidar.neck(self._lidar.backbone(bev))
            outputs: Outputs = self._head(bev, low, high, levels and list(levels), depth, calibration, visible_cells)
            return outputs

    def _in_two_streams(
        self,
        bev: Tensor,
        low: Tensor | None,
        high: Tensor | None,
        levels: tuple[Tensor, ...] | None,
        depth: Tensor | None,
        calibration: Calibration,
        visible_cells: int | None,
    ) -> Outputs:
        """`Head.forward` of both modalities; the cameras' own part in a stream beside the LiDAR's."""
        assert self._lidar is not None
        assert levels is not None
        assert visible_cells is not None
        head, main, cameras = self._head, torch.cuda.current_stream(), self._cameras
        cameras.wait_stream(main)
        with torch.cuda.stream(cameras):
            images = head.image_pyramid(list(levels), depth, calibration)
        bev = head.bev_map(self._lidar.neck(self._lidar.backbone(bev)))
        sight = head.look(low, high, calibration)
        main.wait_stream(cameras)  # for the pyramid; what follows there runs beside
        with torch.cuda.stream(cameras):
            image = head.detect_in_images(images, calibration)
        lidar = head.detect_in_lidar(bev, head.lidar_heatmap(head.semantic(bev, images, sight, visible_cells)))
        main.wait_stream(cameras)
        outputs = lidar.into(image.into(Outputs(*[None] * len(Outputs._fields))))
        return outputs._replace(fusion=head.fuse(lidar, image, calibration))


M = TypeVar("M", bound=nn.Module)


def _prepared(module: M, dtype: torch.dtype) -> M:
    """A copy with folded norms, its 2D convolutions of `dtype` on channels-last tensors, its attention of `dtype`."""
    module = copy.deepcopy(module).eval()
    fold_norms(module)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif isinstance(part, Attention | DeformableAttention | FeedForward):
            part.to(dtype)  # autocast would do so in every replay
    return module
