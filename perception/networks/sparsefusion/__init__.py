"""SparseFusion: camera and LiDAR candidates, each from its own detector, fused by self-attention in LiDAR space.

Xie et al., "SparseFusion: Fusing Multi-Modal Sparse Representations for Multi-Sensor 3D Object Detection", ICCV 2023,
arXiv 2304.14340; released code and weights: github.com/yichen928/SparseFusion. Sizes of the released configuration::

    points (N, 5) -> voxels (V, 5) ---------- LidarBranch --> BEV features (B, 512, 180, 180)      encode.py, lidar.py
    images (B, 6, 3, 448, 800) -------------- ImageBranch --> pyramid 4 x (6 B, 256, 112 / 2^l, 200 / 2^l)    image.py
    sparse depth (B, 6, 2, 112, 200) + pyramid --> geometric transfer: LiDAR's depth into images           geometric.py
    BEV features + pyramid -> semantic transfer --> LiDAR heatmap (B, 10, 180, 180)                         semantic.py
    pyramid --> camera heatmap (B, 10, 6, 29750 tokens)                                                   candidates.py
    200 peaks of each --> point decoder; image decoder, view transformation into LiDAR space        decoders.py, view.py
    both (B, 400, 128) --> self-attention --> boxes (B, 400): scores times the peaks' scores, circle suppression
                                                                                                   fusion.py, boxes.py

`SparseFusion` (network.py) is the whole; `Head` (head.py) what lies behind the two branches. `official.py` brings the
released checkpoints to our names, `targets.py`, `matching.py` and `losses.py` are for training.

Departures from the released code, none of which moves a box but where said:

* Voxels are found by one sort, not by comparing all points with all voxels, which takes two thirds of its time.
* The depth of the nearest point stays in the depth map, where the released code leaves the choice to the threads.
* Views are computed together, padded and masked, in training too.
* A camera may be missing: nothing is taken from it. The released code needs all six.
* Training neither shuffles points nor pastes objects; a mirrored image keeps its pixels' centres (`augment.py`).
* The heatmap of the LiDAR alone, and two norms, are in the checkpoints but of no use; they are dropped by name.
"""

from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.network import SparseFusion

__all__ = ["SparseFusion", "SparseFusionConfig"]
