"""A scene rendered through three lenses by evaluating the ray of every pixel, then rectified."""

from __future__ import annotations

import dataclasses
from functools import cache

import cv2
import numpy as np
import pytest

from perception.errors import ConfigError, DataError
from perception.rectify import CameraModel

WIDTH, HEIGHT, FOCAL, CENTER = 400, 300, (200.0, 205.0), (203.0, 146.0)
GRID = np.stack(np.meshgrid(np.linspace(-0.72, 0.72, 9), np.linspace(-0.5, 0.5, 7)), -1).reshape(-1, 2)  # on z = 1
SIGMA = 2.5 / 200  # of the dots, on z = 1

PLUMB_BOB = CameraModel("plumb_bob", WIDTH, HEIGHT, FOCAL, CENTER, (-0.28, 0.07, 0.002, -0.0015, -0.004))
RATIONAL = CameraModel(
    "rational_polynomial", WIDTH, HEIGHT, FOCAL, CENTER, (0.3, 0.05, -0.001, 0.002, 0.01, 0.62, 0.12, 0.02)
)
FISHEYE = CameraModel("equidistant", WIDTH, HEIGHT, FOCAL, CENTER, (-0.03, 0.012, -0.006, 0.001))
LENSES = pytest.mark.parametrize("lens", [PLUMB_BOB, RATIONAL, FISHEYE], ids=lambda lens: lens.model)


def distort(xy: np.ndarray, lens: CameraModel) -> np.ndarray:
    """Rays (..., 2) at z = 1 to the distorted plane, by the formulas of the models."""
    r2 = (xy**2).sum(-1)
    if lens.model == "equidistant":
        r, (k1, k2, k3, k4) = np.sqrt(r2), lens.distortion
        t = np.arctan(r)
        bent = t * (1 + k1 * t**2 + k2 * t**4 + k3 * t**6 + k4 * t**8)
        return xy * np.divide(bent, r, out=np.ones_like(r), where=r > 1e-9)[..., None]
    k1, k2, p1, p2, k3, k4, k5, k6 = (*lens.distortion, 0.0, 0.0, 0.0)[:8]
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    x, y = xy[..., 0], xy[..., 1]
    return xy * radial[..., None] + np.stack(
        [2 * p1 * x * y + p2 * (r2 + 2 * x**2), p1 * (r2 + 2 * y**2) + 2 * p2 * x * y], -1
    )


def undistort(bent: np.ndarray, lens: CameraModel) -> np.ndarray:
    """The inverse of `distort`, by Newton's method with a numerical Jacobian."""
    xy, h = bent.copy(), 1e-6
    if lens.model == "equidistant":
        radius = np.linalg.norm(bent, axis=-1, keepdims=True)
        xy = bent * np.tan(np.minimum(radius, 1.3)) / np.maximum(radius, 1e-12)
    for _ in range(8):
        here = distort(xy, lens)
        dx = (distort(xy + np.array([h, 0]), lens) - here) / h
        dy = (distort(xy + np.array([0, h]), lens) - here) / h
        xy = xy + np.linalg.solve(np.stack([dx, dy], -1), (bent - here)[..., None])[..., 0]
    assert np.abs(distort(xy, lens) - bent).max() < 1e-9
    return xy


@cache
def render(lens: CameraModel) -> np.ndarray:
    """White dots of a grid on the plane z = 1, each pixel shaded by where its ray meets the plane."""
    pixel = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), -1).astype(float)
    ray = undistort((pixel - CENTER) / FOCAL, lens)  # (H, W, 2)
    light = sum(np.exp(-((ray - dot) ** 2).sum(-1) / (2 * SIGMA**2)) for dot in GRID)
    return np.repeat(np.rint(250 * light)[..., None], 3, -1).astype(np.uint8)


def centroids(gray: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """(M, 2) centres of light within 10 px of the guesses."""
    found = []
    for u, v in np.rint(guess).astype(int):
        patch = gray[v - 10 : v + 11, u - 10 : u + 11].astype(float)
        y, x = np.mgrid[-10:11, -10:11]
        found.append((u + (patch * x).sum() / patch.sum(), v + (patch * y).sum() / patch.sum()))
    return np.array(found)


def inside(pixel: np.ndarray) -> np.ndarray:
    return ((pixel > 12) & (pixel < (WIDTH - 13, HEIGHT - 13))).all(-1)


@LENSES
def test_dots_land_where_the_rectified_intrinsic_projects_them(lens):
    raw = render(lens)
    bent = distort(GRID, lens) * FOCAL + CENTER
    rgb, k = lens.rectify(raw)
    expected = GRID * (k[0, 0], k[1, 1]) + k[:2, 2]
    use = inside(expected) & inside(bent)
    assert use.sum() >= 45
    assert np.abs(bent - expected)[use].max() > 5  # the lens does bend
    np.testing.assert_allclose(centroids(raw[..., 0], bent[use]), bent[use], atol=0.3)  # the rendering is right
    np.testing.assert_allclose(centroids(rgb[..., 0], expected[use]), expected[use], atol=0.1)


@LENSES
def test_straight_lines_come_out_straight(lens):
    rgb, k = lens.rectify(render(lens))
    for row in (0, 3, 6):
        dots = GRID.reshape(7, 9, 2)[row] * (k[0, 0], k[1, 1]) + k[:2, 2]
        found = centroids(rgb[..., 0], dots[inside(dots)])
        line = np.polynomial.Polynomial.fit(found[:, 0], found[:, 1], 1)
        np.testing.assert_allclose(line(found[:, 0]), found[:, 1], atol=0.1)


@pytest.mark.parametrize("lens", [PLUMB_BOB, RATIONAL], ids=lambda lens: lens.model)
def test_pinhole_models_keep_k(lens):
    np.testing.assert_array_equal(lens.rectify(render(lens))[1], lens.intrinsic)


def test_balance_trades_the_fisheyes_centre_for_its_rim():
    kept = FISHEYE.rectify(render(FISHEYE))[1]
    np.testing.assert_array_equal(kept, FISHEYE.intrinsic)
    whole = dataclasses.replace(FISHEYE, balance=1.0)
    rgb, k = whole.rectify(np.full((HEIGHT, WIDTH, 3), 255, np.uint8))
    assert k[0, 0] / k[1, 1] == pytest.approx(FOCAL[0] / FOCAL[1])
    assert k[0, 0] < kept[0, 0]
    # The middle of every edge of the raw image is in the rectified one, and one of them is on its edge.
    edges = np.array([[0, CENTER[1]], [WIDTH - 1, CENTER[1]], [CENTER[0], 0], [CENTER[0], HEIGHT - 1]])
    seen = undistort((edges - CENTER) / FOCAL, whole) * (k[0, 0], k[1, 1]) + k[:2, 2]
    assert ((seen > -1) & (seen < (WIDTH, HEIGHT))).all()
    assert np.abs(seen - edges).max(1).min() < 1.0
    assert rgb[150, 0].min() == 0 or rgb[0, 200].min() == 0  # black where the lens saw nothing
    half = dataclasses.replace(FISHEYE, balance=0.5).rectify(rgb)[1]
    assert half[0, 0] == pytest.approx((k[0, 0] + kept[0, 0]) / 2)


def test_a_fisheye_of_more_than_a_half_circle_is_cut_at_75_degrees():
    wide = CameraModel("equidistant", 1000, 1000, (300.0, 300.0), (499.5, 499.5), (0.0,) * 4, balance=1.0)  # 95 deg
    _, k = wide.rectify(np.zeros((1000, 1000, 3), np.uint8))
    assert np.rad2deg(np.arctan(500 / k[0, 0])) == pytest.approx(75.0, abs=0.1)


def test_without_distortion_nothing_is_done():
    rgb = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    for model, distortion in (("plumb_bob", ()), ("plumb_bob", (0.0,) * 5), ("rational_polynomial", (0.0,) * 8)):
        same, k = CameraModel(model, WIDTH, HEIGHT, FOCAL, CENTER, distortion).rectify(rgb)
        assert same is rgb
        np.testing.assert_array_equal(k, [[200, 0, 203], [0, 205, 146], [0, 0, 1]])
    # An equidistant lens bends even with coefficients of zero.
    bent, _ = CameraModel("equidistant", WIDTH, HEIGHT, FOCAL, CENTER, ()).rectify(rgb)
    assert (bent != rgb).any()


def test_equal_models_share_their_maps(monkeypatch):
    calls = []
    real = cv2.initUndistortRectifyMap
    monkeypatch.setattr(cv2, "initUndistortRectifyMap", lambda *a: calls.append(1) or real(*a))
    rgb = np.zeros((120, 160, 3), np.uint8)
    for _ in range(3):
        CameraModel("plumb_bob", 160, 120, (101.0, 101.0), (80.0, 60.0), (0.1, 0.0, 0.0, 0.0)).rectify(rgb)
    assert len(calls) == 1


def test_what_is_no_calibration_is_refused():
    with pytest.raises(
        DataError, match=r"unknown distortion model 'fov'\n  known: plumb_bob, rational_polynomial, equi"
    ):
        CameraModel("fov", 4, 4, (1.0, 1.0), (0.0, 0.0), ())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="unknown distortion model ''"):
        CameraModel("", 4, 4, (1.0, 1.0), (0.0, 0.0), ())  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"5 distortion coefficients for equidistant\n  equidistant takes 0 or 4"):
        CameraModel("equidistant", 4, 4, (1.0, 1.0), (0.0, 0.0), (0.0,) * 5)
    with pytest.raises(DataError, match=r"focal length \(0.0, 0.0\).*not a calibration"):
        CameraModel("plumb_bob", 4, 4, (0.0, 0.0), (0.0, 0.0), ())
    with pytest.raises(DataError, match="image is 40x30 px, its camera model 400x300"):
        PLUMB_BOB.rectify(np.zeros((30, 40, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"balance 1\.5"):
        dataclasses.replace(FISHEYE, balance=1.5)
