"""SparseFusion's forward pass for inference on a GPU: the same network, arranged to keep the GPU busy.

* Batch norms are folded into the convolutions before them, and 2D convolutions run on channels-last tensors, in half
  precision if so configured. What is sensitive stays in float32, as under autocast.
* Three CUDA graphs, since a host takes longer to launch a thousand kernels than the GPU to run them: the image branch;
  points to voxels, the sparse encoder (on the Triton backend) and what the cameras see of its cells; all the rest, to
  scored boxes. The first runs beside the second, whose many small kernels go before it. In the third what is done for
  the cameras alone runs beside what is for the LiDAR.
* In a graph no size depends on the data. Points, sites of the sparse tensors and visible cells get room for more than
  there are; a frame that needs more than the room so far is run again with more, in graphs that are captured anew. So
  the first frames of a drive, while sweeps gather and streets widen, take some tenths of a second now and then.
* A second thread takes the images up: to copy 26 MB (six of 1600 x 900) takes the host milliseconds, and no lock of
  Python's.

The host waits for the device once, for what a frame needed, when all is done; what is left to fetch then are the boxes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.networks.layers.attention import Attention, DeformableAttention
from perception.networks.layers.cuda_graphs import CudaGraph
from perception.networks.layers.folding import fold_norms
from perception.networks.sparsefusion.boxes import Detections, detect
from perception.networks.sparsefusion.encode import Encoder, as_calibration
from perception.networks.sparsefusion.head import Head
from perception.networks.sparsefusion.image import ImageBranch
from perception.networks.sparsefusion.lidar import LidarBranch
from perception.networks.sparsefusion.semantic import Sight, most_visible
from perception.networks.sparsefusion.tensors import Calibration, Outputs
from perception.networks.sparsefusion.transformer import FeedForward
from perception.types import Sample

_SPARE = 1.25
"""Room for so many times what a frame needed: the next one may need a little more."""
_STEP = 1024
"""Room is a multiple of it, and at least it."""


class Room(NamedTuple):
    """How much of what varies from frame to frame the graphs take. It never shrinks: what is unused costs little.

    Attributes:
        points: of the cloud.
        key_sweep: of these, the first ones, which may be of the key sweep.
        cells: BEV cells that a view sees.
        sites: of the sparse encoder, after each strided convolution.
    """

    points: int
    key_sweep: int
    cells: int
    sites: tuple[int, ...]


def _grown(room: int, needed: int) -> int:
    return room if needed <= room else -(-math.ceil(_SPARE * needed) // _STEP) * _STEP


class LidarTensors(NamedTuple):
    """What the second graph makes.

    Attributes:
        bev: (1, C, Y, X) of the sparse encoder.
        sparse_depth: see `Inputs`; this and the next two are None without cameras.
        calibration: of the cameras.
        sight: of the BEV cells in the views.
        counts: int64: voxels there are, kept or not; sites after each strided convolution; with cameras, the most cells
            that a view sees.
    """

    bev: Tensor
    sparse_depth: Tensor | None
    calibration: Calibration | None
    sight: Sight | None
    counts: Tensor


class Frame(NamedTuple):
    """A frame's results, overwritten by the next one's.

    Attributes:
        outputs: of the network.
        detections: scored boxes of all queries.
        voxels: there are in range, kept or not; None without a LiDAR.
    """

    outputs: Outputs
    detections: Detections
    voxels: int | None


class FastForward:
    """Sample -> Frame, equal to the modules' own up to rounding.

    The modules are copied: later changes of their weights do not show. One thread at a time may call it.

    Args:
        encoder, lidar, image, head: of a SparseFusion in evaluation mode, on a GPU.
        dtype: float32, float16 or bfloat16.
    """

    def __init__(
        self, encoder: Encoder, lidar: LidarBranch | None, image: ImageBranch | None, head: Head, dtype: torch.dtype
    ) -> None:
        self._encoder = encoder
        self._dtype = dtype
        self._lidar = None if lidar is None else _prepared(lidar, dtype)
        self._image = None if image is None else _prepared(image, dtype).to(dtype)
        self._head = _prepared(head, dtype)
        strided = 0
        if self._lidar is not None:
            for part in (self._lidar.encoder.stages, self._lidar.encoder.output):
                part.to(dtype)
            strided = len(self._lidar.encoder.stages)
        self._room = Room(_STEP, _STEP, _STEP, (_STEP,) * strided)
        self._settled = False  # whether this room was enough for a frame
        self._image_graph: CudaGraph[tuple[Tensor, ...]] = CudaGraph()
        self._lidar_graph: CudaGraph[LidarTensors] = CudaGraph()
        self._rest_graph: CudaGraph[tuple[Outputs, Detections]] = CudaGraph()
        device = encoder.mean.device
        self._ahead = torch.cuda.Stream(device, priority=-1)
        self._beside = torch.cuda.Stream(device)
        self._cameras = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, "images", torch.cuda.set_device, (device,))

    @torch.inference_mode()
    def __call__(self, sample: Sample) -> Frame:
        """All predictions for a sample; see `Encoder` for errors."""
        with self._in_front():
            images = self._thread.submit(self.take_up, sample) if self._image is not None else None
            camera_numbers = self._encoder.camera_numbers([sample]) if self._image is not None else None
            points = self.points(sample) if self._lidar is not None else None
            if images is not None and not self._settled:
                wait([images])  # nothing else goes on while graphs are captured
            lidar = self.lidar(points, camera_numbers) if points is not None else None
            levels = self.levels(images.result()) if images is not None else None
            if points is None or lidar is None:
                return Frame(*self.rest(camera_numbers, levels, None), None)
            results = self.rest(camera_numbers, levels, lidar) if self._settled else None
            while not self._fits(counts := lidar.counts.tolist()):  # the host waits
                lidar, results = self.lidar(points, camera_numbers), None
            self._settled = True
            if results is None:
                results = self.rest(camera_numbers, levels, lidar)
            return Frame(*results, counts[0])

    @contextmanager
    def _in_front(self) -> Iterator[None]:
        """Into a stream whose kernels go before those of the image branch; the stream outside waits for it."""
        outside = torch.cuda.current_stream(self._ahead.device)
        self._ahead.wait_stream(outside)
        self._beside.wait_stream(outside)
        try:
            with torch.cuda.stream(self._ahead):
                yield
        finally:
            outside.wait_stream(self._ahead)

    def _fits(self, counts: list[int]) -> bool:
        """Whether there was room for all that a frame needed; else there is from now on."""
        _, *sites = counts
        cells = sites.pop() if self._image is not None else 0
        room = self._room._replace(
            cells=_grown(self._room.cells, cells), sites=tuple(map(_grown, self._room.sites, sites))
        )
        fits, self._room = room == self._room, room
        return fits

    @torch.inference_mode()  # of a thread of its own
    def take_up(self, sample: Sample) -> Tensor:
        """(1, K, 3, H, W) images, on the stream that `levels` runs on."""
        with torch.cuda.stream(self._beside):
            return self._encoder.all_images([sample])

    def points(self, sample: Sample) -> Tensor:
        """(points there is room for, 5) of the sample; what is left of the room is NaN."""
        points = self._encoder.points(sample)
        room = self._room._replace(
            points=_grown(self._room.points, len(points)),
            key_sweep=_grown(self._room.key_sweep, self._encoder.key_sweep(sample)),
        )
        self._settled, self._room = self._settled and room == self._room, room
        return F.pad(points, (0, 0, 0, self._room.points - len(points)), value=math.nan)

    def levels(self, images: Tensor) -> tuple[Tensor, ...]:
        """The image branch, beside what comes next on the current stream."""
        with torch.cuda.stream(self._beside):
            return self._image_graph(self._run_image, images)

    def join(self) -> None:
        """The current stream waits for `levels`."""
        torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)

    def lidar(self, points: Tensor, camera_numbers: Tensor | None) -> LidarTensors:
        """Voxels, the sparse encoder and the cells in the views, of what `points` and the encoder gave."""
        inputs = [tensor for tensor in (points, camera_numbers) if tensor is not None]
        room = self._room
        return self._lidar_graph(self._run_lidar, *inputs, key_sweep=room.key_sweep, sites=room.sites)

    def rest(
        self, camera_numbers: Tensor | None, levels: tuple[Tensor, ...] | None, lidar: LidarTensors | None
    ) -> tuple[Outputs, Detections]:
        """The BEV map's backbone and pyramid, the head and scored boxes, of what the methods above gave."""
        self.join()
        inputs = [camera_numbers] if camera_numbers is not None and lidar is None else []
        return self._rest_graph(self._run_rest, *inputs, levels=levels, lidar=lidar, cells=self._room.cells)

    def _run_image(self, images: Tensor) -> tuple[Tensor, ...]:
        assert self._image is not None
        flat = images.flatten(0, 1).to(self._dtype, memory_format=torch.channels_last)
        return tuple(self._image(flat))

    def _run_lidar(
        self, points: Tensor, camera_numbers: Tensor | None = None, *, key_sweep: int, sites: tuple[int, ...]
    ) -> LidarTensors:
        assert self._lidar is not None
        means, coordinates, low, high, voxels = self._encoder.padded_voxels(points)
        bev, found = self._lidar.encoder.padded(means, coordinates, sites)
        counts = [voxels[None], found]
        if camera_numbers is None:
            return LidarTensors(bev, None, None, None, torch.cat(counts))
        calibration = as_calibration(camera_numbers)
        of_sample = Calibration(*(values[0] for values in calibration))
        depth = self._encoder.sparse_depth(points[:key_sweep], of_sample)[None]
        sight = self._head.look(low, high, calibration)
        return LidarTensors(bev, depth, calibration, sight, torch.cat([*counts, most_visible(sight)[None]]))

    def _run_rest(
        self,
        camera_numbers: Tensor | None = None,
        *,
        levels: tuple[Tensor, ...] | None,
        lidar: LidarTensors | None,
        cells: int,
    ) -> tuple[Outputs, Detections]:
        half = self._dtype != torch.float32
        with torch.autocast("cuda", self._dtype if half else None, enabled=half, cache_enabled=False):
            outputs = self._outputs(camera_numbers, levels, lidar, cells)
        return outputs, detect(outputs, self._head.config)

    def _outputs(
        self,
        camera_numbers: Tensor | None,
        levels: tuple[Tensor, ...] | None,
        lidar: LidarTensors | None,
        cells: int,
    ) -> Outputs:
        """`Head.forward`; with both modalities, the cameras' own part in a stream beside the LiDAR's."""
        head, main, cameras = self._head, torch.cuda.current_stream(), self._cameras
        outputs = Outputs(*[None] * len(Outputs._fields))
        if lidar is None:
            assert camera_numbers is not None
            assert levels is not None
            calibration = as_calibration(camera_numbers)
            return head.detect_in_images(head.image_pyramid(list(levels), None, calibration), calibration).into(outputs)
        assert self._lidar is not None
        features = lidar.bev.to(memory_format=torch.channels_last)
        if lidar.calibration is None:
            bev = head.bev_map(self._lidar.neck(self._lidar.backbone(features)))
            return head.detect_in_lidar(bev, head.lidar_heatmap(bev)).into(outputs)
        assert levels is not None
        assert lidar.sight is not None
        cameras.wait_stream(main)
        with torch.cuda.stream(cameras):
            images = head.image_pyramid(list(levels), lidar.sparse_depth, lidar.calibration)
        bev = head.bev_map(self._lidar.neck(self._lidar.backbone(features)))
        main.wait_stream(cameras)  # for the pyramid; what follows there runs beside
        with torch.cuda.stream(cameras):
            image = head.detect_in_images(images, lidar.calibration)
        enhanced = head.semantic(bev, images, lidar.sight, cells)
        points = head.detect_in_lidar(bev, head.lidar_heatmap(enhanced))
        main.wait_stream(cameras)
        outputs = points.into(image.into(outputs))
        return outputs._replace(fusion=head.fuse(points, image, lidar.calibration))


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
