"""LiDAR, camera and radar in; 3D boxes, semantic occupancy and a localized pose out."""

__version__ = "0.1.0"
