"""From hits to pictures: procedural textures, sun and sky, shadows, haze, exposure. Colours are linear until `develop`.

Everything is evaluated per pixel in metres on the surface, and fades with the pixel's footprint so that far detail
does not shimmer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from perception.synthetic.labels import Label
from perception.synthetic.primitives import QUADRIC, Solids, Texture, length, surface_normal
from perception.synthetic.raycast import GROUND, Orthographic, Pinhole, cast
from perception.synthetic.roads import KERB_WIDTH_M, Ground, Style
from perception.types import IGNORE_LABEL

_NOISE = 1024


@lru_cache(maxsize=2)
def noise_tile(device: torch.device) -> Tensor:
    """(3, 1024 * 1024) in [0, 1], periodic, about 0.5 on average: fractal, fine and cloud-like noise."""
    rng = np.random.default_rng(7)
    frequency = np.hypot(np.fft.fftfreq(_NOISE)[:, None], np.fft.fftfreq(_NOISE)[None]) * _NOISE
    layers = []
    for power, low in ((1.1, 2), (0.35, 4), (1.75, 1)):
        spectrum = np.fft.fft2(rng.standard_normal((_NOISE, _NOISE))) / np.maximum(frequency, low) ** power
        spectrum[0, 0] = 0
        layer = np.fft.ifft2(spectrum).real
        layers.append(np.clip(0.5 + 0.2 * layer / layer.std(), 0, 1))
    return torch.tensor(np.stack(layers).reshape(3, -1), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Light:
    """Sun and sky of a scene.

    Attributes:
        sun: (3,) unit vector towards the sun. sun_color, sky_color: (3,) irradiance; horizon: (3,) radiance.
        overcast: share of the sky under clouds. haze_per_m: extinction. lamps: brightness of artificial light.
    """

    sun: Tensor
    sun_color: Tensor
    sky_color: Tensor
    horizon: Tensor
    overcast: float
    haze_per_m: float
    lamps: float
    noise: Tensor

    @staticmethod
    def of(style: Style, device: torch.device | str, fog: float = 0.0, night: float = 0.0) -> Light:
        """Daylight of a style; `fog` and `night` in [0, 1] change it."""

        def color(*rgb: float) -> Tensor:
            return torch.tensor(rgb, dtype=torch.float32, device=device)

        ce, overcast = np.cos(style.sun_elevation), max(style.overcast, fog)
        sun = color(ce * np.cos(style.sun_azimuth), ce * np.sin(style.sun_azimuth), np.sin(style.sun_elevation))
        day = (1 - night) ** 2 + 0.004
        warm = 0.12 * style.warmth
        clear, grey = color(0.50, 0.66, 0.98), color(1.05, 1.10, 1.18)
        return Light(
            sun,
            color(1.0, 0.93 - warm, 0.82 - 1.6 * warm) * 3.1 * (1 - overcast) ** 1.3 * day,
            (clear * (1 - overcast) + grey * overcast) * day,
            (color(0.80, 0.88, 0.98) * (1 - overcast) + color(0.86, 0.89, 0.93) * overcast) * 1.1 * day,
            overcast,
            1 / 700 + fog**1.5 / 12,
            night,
            noise_tile(torch.device(device)),
        )

    def grain(self, x: Tensor, y: Tensor, texel_m: float, layer: int) -> Tensor:
        """(N,) noise at x, y metres, one texel being `texel_m` wide."""
        column = torch.remainder((x / texel_m).floor(), _NOISE).long()
        row = torch.remainder((y / texel_m).floor(), _NOISE).long()
        return self.noise[layer].index_select(0, row * _NOISE + column)

    def sky(self, direction: Tensor, clouds: bool = True) -> Tensor:
        """(3, N) radiance of the sky in a direction (3, N); far hills stand below."""
        up = direction[2].clamp_min(0)
        zenith = (torch.tensor([0.16, 0.33, 0.72], device=up.device) * (1 - self.overcast) * 1.1
                  + torch.tensor([0.70, 0.74, 0.80], device=up.device) * self.overcast)  # fmt: skip
        zenith, horizon = (zenith * self.horizon.mean())[:, None], self.horizon[:, None]
        color = zenith + (horizon - zenith) * (1 - up) ** 3.5
        toward = (self.sun @ direction).clamp(0, 1)
        color = color + self.sun_color[:, None] * (0.35 * toward**64 + 0.10 * toward**8) * (1 - self.overcast)
        if clouds:
            plane = direction[:2] / (up + 0.12)
            depth = self._smooth(plane[0] * 60, plane[1] * 60)
            cover = 0.8 * ((depth - 0.54 + 0.35 * self.overcast) * 5).clamp(0, 1) * (up * 8).clamp(0, 1)
            white = (self.sky_color * 0.75 + 0.22 * self.sun_color)[:, None]
            color = color + (white * (1.0 - 0.5 * (depth - 0.6).clamp(0, 1)) - color) * cover
            ridge = 0.035 * self._smooth(torch.atan2(direction[1], direction[0]) * 120, 0 * up) ** 1.5
            hill = ((ridge + 0.004 - direction[2]) * 400).clamp(0, 1)
            far = horizon * torch.tensor([[0.46], [0.54], [0.60]], device=up.device)
            color = color + (far - color) * hill
        return color

    def _smooth(self, x: Tensor, y: Tensor) -> Tensor:
        """Cloud noise at texels x, y, interpolated."""
        x0, y0 = x.floor(), y.floor()
        fx, fy = x - x0, y - y0
        a, b = self.grain(x0, y0, 1, 2), self.grain(x0 + 1, y0, 1, 2)
        c, d = self.grain(x0, y0 + 1, 1, 2), self.grain(x0 + 1, y0 + 1, 1, 2)
        return (a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy


@dataclass(frozen=True)
class Shadows:
    """Depths seen from the sun, and a blurred plan of what stands close to the ground, around V places.

    Attributes:
        depth, cover: (V * rows * columns,) of the grids `view` and `plan`.
    """

    view: Orthographic
    depth: Tensor
    plan: Orthographic
    cover: Tensor

    @staticmethod
    def cast(
        solids: Solids, light: Light, center: Tensor, step: float = 0.125, reach_m: float = 56.0, chunk: int = 1 << 17
    ) -> Shadows:
        """Of V views of the solids, around their centers (V, 3); a texel is `step` metres wide, of the plan twice."""
        device = center.device
        side = torch.cross(torch.tensor([0.0, 0.0, 1.0], device=device), light.sun, dim=0)
        side = side / side.norm()
        rotation = torch.stack([side, torch.cross(-light.sun, side, dim=0), -light.sun], 1)
        plan_step, count = 2 * step, int(2 * reach_m / step)
        corner = center + light.sun * 150 - rotation @ torch.tensor([reach_m, reach_m, 0.0], device=device)
        view = Orthographic(rotation.expand(len(center), -1, -1), corner, step, count, count)
        down = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]], device=device)
        corner = center + torch.tensor([-reach_m, reach_m, 100.0], device=device)
        count = int(2 * reach_m / plan_step)
        plan = Orthographic(down.expand(len(center), -1, -1), corner, plan_step, count, count)
        top = cast(solids, plan, chunk)
        building = (solids.label == Label.BUILDING)[top.part.clamp_min(0)] & (top.part >= 0)
        low = (top.distance < 100 + 3) & ((top.distance > 100 - 4) | building)
        cover = low.float().view(-1, 1, count, count)
        for _ in range(2):
            cover = torch.nn.functional.avg_pool2d(cover, 3, 1, 1)
        return Shadows(view, cast(solids, view, chunk).distance, plan, cover.flatten())

    def lit(self, point: Tensor, place: Tensor) -> Tensor:
        """(N,) share of the sun, 0 to 1, that reaches points (3, N) around places (N,)."""
        u, v, depth = self.view.rotation[0].T @ (point - self.view.corner.T.index_select(1, place))
        u, v = u / self.view.step_m, v / self.view.step_m
        inside = (u >= 0) & (v >= 0) & (u < self.view.columns - 1) & (v < self.view.rows - 1)
        share = _bilinear(self.depth, self.view, place, u, v, depth - 0.12)
        return torch.where(inside, share, 1.0)

    def open_sky(self, point: Tensor, place: Tensor) -> Tensor:
        """(N,) share of the sky over ground points (3, N) around places (N,), 0 to 1."""
        u, v, _ = self.plan.rotation[0].T @ (point - self.plan.corner.T.index_select(1, place)) / self.plan.step_m
        return 1 - 0.72 * _bilinear(self.cover, self.plan, place, u, v)


def _bilinear(
    flat: Tensor, grid: Orthographic, place: Tensor, u: Tensor, v: Tensor, above: Tensor | None = None
) -> Tensor:
    """(N,) values of V grids, or how much of them is > `above`, at columns u and rows v of the grids `place` (N,)."""
    u, v = u.clamp(0, grid.columns - 1.01), v.clamp(0, grid.rows - 1.01)
    u0, v0 = u.floor(), v.floor()
    fu, fv = u - u0, v - v0
    index = (place * grid.rows + v0.long()) * grid.columns + u0.long()
    corners = [flat.index_select(0, index + k) for k in (0, 1, grid.columns, grid.columns + 1)]
    a, b, c, d = corners if above is None else [(x > above).float() for x in corners]
    return (a * (1 - fu) + b * fu) * (1 - fv) + (c * (1 - fu) + d * fu) * fv


@dataclass
class _Surface:
    """What a set of pixels shows: (3, N) albedo and normal, (N,) gloss (mirror share) and glow (emission)."""

    albedo: Tensor
    normal: Tensor
    gloss: Tensor
    glow: Tensor


@dataclass(frozen=True)
class Picture:
    """V views: radiance (V, H, W, 3); (V, H, W): distance along rays, label (uint8, 255 the sky), agent."""

    radiance: Tensor
    distance: Tensor
    label: Tensor
    agent: Tensor

    def at(self, view: int) -> Picture:
        """One view, without the leading axis."""
        return Picture(self.radiance[view], self.distance[view], self.label[view], self.agent[view])


def ground_label(ground: Ground, sample: Tensor) -> Tensor:
    """(N,) uint8 Label of what `Ground.sample` gave."""
    edge, land = sample[:, 0], sample[:, 3]
    label = torch.where(edge > 0, Label.SIDEWALK.value, Label.ROAD.value)
    beyond = torch.where(land > 0.75, Label.PAVED.value, Label.TERRAIN.value)
    return torch.where(edge > ground.sidewalk_m, beyond, label).to(torch.uint8)


def render(
    solids: Solids, ground: Ground, grid: Pinhole, light: Light, shadows: Shadows, place: Tensor, chunk: int = 1 << 17
) -> Picture:
    """All views of a grid, whose shadows are those around `place` (V,). Pixels of one texture are painted together."""
    origin, direction, _ = grid.rays()
    hits = cast(solids, grid, chunk)
    t = ground.intersect(origin, direction, 250.0)
    distance, part = torch.minimum(t, hits.distance), torch.where(t < hits.distance, GROUND, hits.part)
    n, device, solid = len(t), t.device, part.clamp_min(0)
    label = torch.where(part >= 0, solids.label.index_select(0, solid), IGNORE_LABEL)
    agent = torch.where(part >= 0, solids.agent.index_select(0, solid), 0)
    texture = torch.where(part >= 0, solids.texture.index_select(0, solid).long(), len(Texture) - 1 - part)
    order = texture.argsort(stable=True)
    counts = torch.bincount(texture, minlength=len(Texture) + 2).tolist()
    on_solids, sky = sum(counts[: len(Texture)]), counts[-1]
    met, above = order[: n - sky], order[n - sky :]
    t, ray = distance.index_select(0, met), direction.index_select(1, met)
    point = origin.index_select(1, met) + t * ray
    view = torch.arange(len(place), device=device).repeat_interleave(grid.rows * grid.columns).index_select(0, met)
    place, pixel_m = place.index_select(0, view), t / float(grid.intrinsic[:, 0, 0].mean())

    one, two = slice(None, on_solids), slice(on_solids, None)
    painted = _paint_solids(solids, view[one], part[met[one]], point[:, one], pixel_m[one], light, counts)
    height, _ = ground.terrain(point[:2, one].T)
    low = 0.8 + 0.2 * ((point[2, one] - height) / 1.5).clamp(0, 1)
    floor, label[met[two]] = _ground_surface(ground, light, point[:, two], pixel_m[two], ray[:, two])
    surface = _Surface(
        torch.cat([painted.albedo, floor.albedo], 1),
        torch.cat([painted.normal, floor.normal], 1),
        torch.cat([painted.gloss, floor.gloss]),
        torch.cat([painted.glow, floor.glow]),
    )
    open_sky = torch.cat([low, shadows.open_sky(point[:, two], place[two])])
    lit = shadows.lit(point + 0.06 * surface.normal, place)
    radiance = torch.empty(3, n, device=device)
    radiance.index_copy_(1, met, _illuminate(surface, ray, light, t, lit, open_sky))
    radiance.index_copy_(1, above, light.sky(direction.index_select(1, above)))
    shape = (len(grid.position), grid.rows, grid.columns)
    return Picture(radiance.T.reshape(*shape, 3), distance.view(shape), label.view(shape), agent.view(shape))


def _paint_solids(
    solids: Solids, view: Tensor, part: Tensor, point: Tensor, pixel_m: Tensor, light: Light, counts: list[int]
) -> _Surface:
    """Surfaces at points (3, N) of parts (N,), sorted by texture; `counts`: how many of each."""
    posed = view * len(solids.kind) + part
    rotation = solids.rotation.reshape(-1, 9).T.contiguous().index_select(1, posed).view(3, 3, -1)  # map, part, N
    offset = point - solids.center.reshape(-1, 3).T.index_select(1, posed)
    local = offset[0] * rotation[0] + offset[1] * rotation[1] + offset[2] * rotation[2]
    half, form, color = (x.T.index_select(1, part) for x in (solids.half, solids.form, solids.color))
    quadric, seed = solids.kind.index_select(0, part) == QUADRIC, solids.seed.reshape(-1).index_select(0, posed)
    normal = surface_normal(local, quadric, half, form)
    albedo, turned = torch.empty_like(color), torch.empty_like(normal)
    gloss, glow = torch.empty_like(seed), torch.empty_like(seed)
    end = 0
    for kind in Texture:
        some = slice(end, end + counts[kind])
        end += counts[kind]
        if counts[kind]:
            spot = _Spot(local[:, some], normal[:, some], half[:, some], color[:, some], seed[some], pixel_m[some],
                         quadric[some], light)  # fmt: skip
            s = _PAINTERS.get(kind, _plain)(spot)
            albedo[:, some], turned[:, some], gloss[some], glow[some] = s.albedo, s.normal, s.gloss, s.glow
    return _Surface(albedo, (rotation * turned).sum(1), gloss, glow)


def _illuminate(s: _Surface, direction: Tensor, light: Light, t: Tensor, lit: Tensor, open_sky: Tensor) -> Tensor:
    """(3, N) radiance towards the camera; `lit`, `open_sky` (N,): the shares of sun and sky that reach the surface."""
    sun_color, sky_color, horizon = light.sun_color[:, None], light.sky_color[:, None], light.horizon[:, None]
    up = s.normal[2]
    sun = (light.sun @ s.normal).clamp_min(0) * lit
    bounce = sun_color * light.sun[2] * 0.25 + 0.2 * sky_color
    ambient = (0.62 + 0.38 * up) * open_sky * sky_color + (0.10 + 0.10 * (1 - up).clamp(0, 1)) * bounce
    color = s.albedo * (sun * sun_color + ambient + s.glow)
    shiny = (s.gloss > 0).nonzero()[:, 0]
    d, n, gloss = direction.index_select(1, shiny), s.normal.index_select(1, shiny), s.gloss.index_select(0, shiny)
    cosine = -(d * n).sum(0).clamp(-1, 0)
    mirrored = d + 2 * cosine * n
    share = gloss * (0.08 + 0.92 * (1 - cosine) ** 5)
    skyline = 0.08 + 0.55 * light.grain(torch.atan2(mirrored[1], mirrored[0]), 0 * gloss, 0.02, 2) ** 2
    seen = light.sky(mirrored, clouds=False) * (0.3 + 0.7 * (mirrored[2] > skyline))
    glint = (light.sun @ mirrored).clamp_min(0) ** 200 * sun.index_select(0, shiny).clamp(0, 1)
    matt = color.index_select(1, shiny)
    color.index_copy_(1, shiny, matt + (seen - matt) * share + gloss * 2.5 * glint * sun_color)
    if light.lamps > 0:  # the ego vehicle's headlights and the street's lamps
        facing = (-(direction * s.normal).sum(0)).clamp_min(0.1)
        color = color + s.albedo * light.lamps * (0.35 + 40 / (t + 4) ** 1.5 * facing) * 0.12
    return horizon + (color - horizon) * torch.exp(-light.haze_per_m * t)


def _ground_surface(
    ground: Ground, light: Light, point: Tensor, pixel_m: Tensor, direction: Tensor
) -> tuple[_Surface, Tensor]:
    """Asphalt, paint, kerb, sidewalk and land at points (3, N), and their labels (N,) uint8."""
    x, y = point[:2]
    sample = ground.sample(point[:2].T)
    edge, paint, yellow, land = sample.unbind(1)
    slope_x, slope_y = ground.terrain(point[:2].T)[1].T
    normal = torch.stack([-slope_x, -slope_y, torch.ones_like(x)]) / (slope_x**2 + slope_y**2 + 1).sqrt()
    foot = pixel_m / (-direction[2]).clamp_min(0.03)
    fine = (1 - foot / 0.05).clamp(0, 1)
    grain = light.grain(x, y, 0.012, 1) - 0.5
    broad, mid = light.grain(x, y, 0.22, 0) - 0.5, light.grain(x, y, 0.045, 0) - 0.5

    def mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        return a + (b - a) * share

    def tone(*rgb: float) -> Tensor:
        return torch.tensor(rgb, device=x.device)[:, None]

    soft = foot.clamp(0.02, 0.3)
    asphalt = tone(0.098, 0.098, 0.102) * (1 + 0.35 * broad + 0.22 * mid + 0.9 * grain * fine)
    patch = ((light.grain(x, y, 0.35, 2) - 0.66) * 30).clamp(0, 1)
    color = asphalt * (1 - 0.22 * patch)
    color = mix(color, tone(0.15, 0.148, 0.14), ((edge + 0.34) / soft).clamp(0, 1) * 0.6)
    coverage = ((paint - 0.5) * (0.1 / soft).clamp(0.8, 1.7) + 0.5).clamp(0, 1) * (
        1 - (broad + mid + 0.1).clamp(0, 0.6)
    )
    white = tone(0.62, 0.62, 0.60) * (1 - yellow) + tone(0.62, 0.40, 0.05) * yellow
    color = mix(color, white, coverage * 0.92)
    kerb = tone(0.36, 0.355, 0.34) * (1 + 0.3 * mid + 0.4 * grain * fine)
    color = mix(color, kerb, (edge / soft + 0.5).clamp(0, 1))
    joint = torch.remainder(edge, 0.9)
    line = ((0.02 + foot * 0.5 - (joint - 0.45).abs()) / (foot * 0.5 + 0.005)).clamp(0, 1) * (0.04 / (foot + 0.04))
    walk = tone(0.29, 0.275, 0.255) * (1 + 0.25 * broad + 0.15 * mid + 0.5 * grain * fine - 0.35 * line)
    color = mix(color, walk, ((edge - KERB_WIDTH_M) / soft + 0.5).clamp(0, 1))
    grass = tone(0.085, 0.15, 0.035) * (1 + 0.9 * mid + 0.6 * broad + 1.3 * grain * fine)
    bare = tone(0.22, 0.17, 0.11) * (1 + 0.6 * mid + 0.5 * broad + 0.6 * grain * fine)
    slabs = tone(0.26, 0.25, 0.235) * (1 + 0.3 * broad + 0.2 * mid + 0.5 * grain * fine)
    wild = mix(mix(grass, bare, (land * 2).clamp(0, 1)), slabs, ((land - 0.6) * 8).clamp(0, 1))
    color = mix(color, wild, ((edge - ground.sidewalk_m) / soft + 0.5).clamp(0, 1))
    gloss = torch.where(edge < 0, 0.10, 0.0)
    surface = _Surface(color.clamp_min(0.01), normal, gloss, torch.zeros_like(x))
    return surface, ground_label(ground, sample)


@dataclass(frozen=True)
class _Spot:
    """Pixels of one texture: (3, N) point, normal (in the part's frame), half extents, colour; (N,) the rest."""

    p: Tensor
    n: Tensor
    half: Tensor
    color: Tensor
    seed: Tensor
    pixel_m: Tensor
    quadric: Tensor
    light: Light

    def paint(self, albedo: Tensor, gloss: Tensor | float = 0.0, glow: Tensor | float = 0.0) -> _Surface:
        def full(x: Tensor | float) -> Tensor:
            return x if isinstance(x, Tensor) else torch.full_like(self.seed, x)

        return _Surface(albedo, self.n, full(gloss), full(glow))

    def wall(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of upright faces: metres along, metres from the bottom, the face's width, and which are upright."""
        across = self.n[0].abs() > self.n[1].abs()
        u = torch.where(across, self.p[1] * torch.sign(self.n[0]), -self.p[0] * torch.sign(self.n[1]))
        width = 2 * torch.where(across, self.half[1], self.half[0])
        return u + width / 2, self.p[2] + self.half[2], width, self.n[2].abs() < 0.6

    def tone(self, *rgb: float) -> Tensor:
        """(3, 1)."""
        return self.color.new_tensor(rgb)[:, None]

    def inside(self, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """(N,) 1 where low < x < high, smoothed over a pixel."""
        soft = self.pixel_m.clamp_min(0.004)
        return ((x - low) / soft + 0.5).clamp(0, 1) * ((high - x) / soft + 0.5).clamp(0, 1)

    def chance(self, a: Tensor, b: Tensor | float = 0.0) -> Tensor:
        """(N,) random in [0, 1), the same for the same a, b and part."""
        return torch.remainder(torch.sin(a * 12.9898 + b * 78.233 + self.seed * 37.719) * 43758.547, 1.0)


def _mix(a: Tensor, b: Tensor | tuple[float, ...], share: Tensor) -> Tensor:
    other = b if isinstance(b, Tensor) else a.new_tensor(b)[:, None]
    return a + (other - a) * share


def _plain(s: _Spot) -> _Surface:
    return s.paint(s.color)


def _facade(s: _Spot) -> _Surface:
    u, v, width, upright = s.wall()
    height = 2 * s.half[2]
    modern = s.seed > 0.8
    pitch_u = width / (width / torch.where(modern, 2.0, 2.4 + 1.4 * s.chance(s.seed * 0 + 1))).round().clamp_min(1)
    pitch_v = height / (height / 3.1).round().clamp_min(1)
    column, row = (u / pitch_u).floor(), (v / pitch_v).floor()
    x, y = u - (column + 0.5) * pitch_u, v - (row + 0.5) * pitch_v
    half_w = torch.where(modern, 0.46 * pitch_u, pitch_u * (0.20 + 0.10 * s.chance(s.seed * 0 + 2)))
    half_h = torch.where(modern, 0.42 * pitch_v, pitch_v * (0.24 + 0.06 * s.chance(s.seed * 0 + 3)))
    pane = s.inside(x, -half_w, half_w) * s.inside(y, -half_h, half_h)
    frame = s.inside(x, -half_w - 0.07, half_w + 0.07) * s.inside(y, -half_h - 0.07, half_h + 0.07)
    mullion = s.inside(x.abs(), -1.0, 0.03) + s.inside(y - half_h * 0.35, -0.03, 0.03)
    fade = (1 - s.pixel_m / 0.04).clamp(0, 1)
    g = s.light.grain(u + 31 * s.seed, v, 0.03, 0) - 0.5
    streak = s.light.grain(u * 4, v * 0.35, 0.05, 0) - 0.5
    brick = s.inside(torch.remainder(v, 0.08), 0, 0.012) + s.inside(
        torch.remainder(u + 0.11 * (v / 0.08).floor(), 0.22), 0, 0.012
    )
    wall = s.color * (1 + 0.25 * g + 0.22 * streak - 0.25 * brick.clamp(0, 1) * fade * (s.seed < 0.5))
    band = s.inside(torch.remainder(v, pitch_v), 0, 0.16) * (s.seed > 0.3)
    wall = _mix(wall, s.color * 0.5 + 0.28, band * 0.7)
    sill = s.inside(x, -half_w - 0.12, half_w + 0.12) * s.inside(y, -half_h - 0.17, -half_h - 0.05)
    wall = _mix(wall, (0.50, 0.49, 0.46), sill)
    trim = torch.where(s.chance(s.seed * 0 + 4) > 0.4, 0.55, 0.06).expand_as(s.color)
    color = _mix(wall, trim, frame * ~modern)
    curtain = s.chance(column, row)
    inner = (
        0.008
        + 0.05 * s.chance(row, column + 5.0) ** 2
        + 0.20 * (curtain > 0.72) * s.inside(y, half_h * (1 - 2 * s.chance(row, column)), half_h)
    )
    glass = inner * s.tone(1.0, 1.02, 1.05)
    lit = (curtain < 0.25) * s.light.lamps
    color = _mix(color, glass, pane)
    color = _mix(color, trim, pane * mullion.clamp(0, 1) * 0.9)
    color = torch.where(upright, color, s.tone(0.24, 0.235, 0.22))
    return s.paint(color, torch.where(upright, pane * 1.0, 0.0), torch.where(upright, pane * lit * 6, 0.0))


def _shop(s: _Spot) -> _Surface:
    """A ground floor: shop windows and a sign to the street (+y of the building), plain windows elsewhere."""
    base = _facade(s)
    u, v, width, _ = s.wall()
    v = v - 0.6
    pitch = width / (width / 3.8).round().clamp_min(1)
    cell = (u / pitch).floor()
    x = u - (cell + 0.5) * pitch
    door = s.chance(cell) > 0.7
    window = s.inside(x, -0.43 * pitch, 0.43 * pitch) * s.inside(v, torch.where(door, 0.05, 0.55), 2.75)
    bars = s.inside(torch.remainder(x, 1.25), 0, 0.05) * window
    goods = 0.05 + 0.25 * s.light.grain(x * 3 + 7 * cell, v * 3, 0.05, 0) * (v < 1.6)
    hue = torch.stack([s.chance(cell, 1.0), s.chance(cell, 2.0), s.chance(cell, 3.0)]) ** 2 * 0.6 + 0.02
    sign = s.inside(v, 2.95, 3.45) * s.inside(x, -0.45 * pitch, 0.45 * pitch)
    letters = (
        sign
        * s.inside(v, 3.07, 3.33)
        * (s.light.grain(u, v * 0 + cell, 0.05, 1) > 0.5)
        * s.inside(x.abs(), -1.0, 0.3 * pitch)
    )
    color = s.color * 0.8
    color = _mix(color, hue, sign)
    color = _mix(color, (0.7, 0.7, 0.68), letters)
    color = _mix(color, goods.expand_as(color), window)
    color = _mix(color, (0.05, 0.05, 0.05), bars)
    front = s.n[1] > 0.5
    glow = torch.where(front, window * s.light.lamps * 4, base.glow)
    return s.paint(torch.where(front, color, base.albedo), torch.where(front, window, base.gloss), glow)


def _foliage(s: _Spot) -> _Surface:
    u = s.p / s.half
    x, y = s.p[0] + s.p[2] * 0.7 + 9 * s.seed, s.p[1] - s.p[2] * 0.6
    near = (1 - s.pixel_m / 0.06).clamp(0, 1)
    leaf, clump = s.light.grain(x, y, 0.035, 1) - 0.5, s.light.grain(x, y, 0.028, 0) - 0.5
    depth = 0.62 + 0.38 * u[2].clamp(-1, 1)
    color = s.color * (depth * (1 + 2.2 * clump + 2.4 * leaf * (0.35 + 0.65 * near))).clamp_min(0.12)
    bump = torch.stack([clump, leaf, -clump]) * 1.6
    normal = s.n + bump + s.tone(0, 0, 0.25)
    surface = s.paint(color)
    surface.normal = normal / length(normal)
    return surface


def _body(s: _Spot) -> _Surface:
    p, h = s.p, s.half
    u, v = p / h, (p[2] + h[2])
    color, gloss = s.color, torch.full_like(s.seed, 0.75)
    dark = (0.016, 0.016, 0.017)
    side = (s.n[1].abs() > 0.6).float()
    arch = ((0.40 - torch.hypot(p[0].abs() - 0.6 * h[0], v - 0.13)) / s.pixel_m.clamp_min(0.01) + 0.5).clamp(0, 1)
    seams = sum(s.inside((p[0] - k * h[0]).abs(), -1.0, 0.008) for k in (0.28, -0.08, -0.42)) * s.inside(
        v, 0.12, 2 * h[2]
    )
    handle = s.inside(p[0] - 0.02 * h[0], -0.1, 0.1) * s.inside(v - 1.5 * h[2], -0.02, 0.02)
    color = _mix(color, dark, side * (seams * 0.8 + handle * 0.7).clamp(0, 1))
    color = _mix(color, dark, side * torch.maximum(arch, s.inside(v, -1, 0.10)))
    front, back = (s.n[0] > 0.6).float(), (s.n[0] < -0.6).float()
    ends = front + back
    color = _mix(color, dark, ends * s.inside(v, -1, 0.13))
    grille = s.inside(u[1], -0.55, 0.55) * s.inside(u[2], -0.45, 0.25)
    lamp = s.inside(u[1].abs(), 0.60, 0.94) * s.inside(u[2], 0.15, 0.72)
    plate = s.inside(p[1], -0.26, 0.26) * s.inside(v - 0.62 * h[2], -0.06, 0.06)
    color = _mix(color, (0.025, 0.025, 0.027), front * grille)
    color = _mix(color, (0.75, 0.75, 0.72), front * lamp)
    color = _mix(color, (0.42, 0.012, 0.01), back * s.inside(u[1].abs(), 0.62, 0.96) * s.inside(u[2], 0.1, 0.85))
    color = _mix(color, (0.62, 0.62, 0.55), ends * plate)
    return s.paint(color, gloss, s.light.lamps * 8 * (front * lamp + 0.4 * back * (color[0] > 0.3) * (color[1] < 0.05)))


def _cabin(s: _Spot) -> _Surface:
    u = s.p / s.half
    roof = s.n[2] > 0.97
    tall = 0.5 * (u[2] + 1)
    side = s.n[1].abs() > 0.6
    lean = torch.where(side, u[0], u[1])
    reach = torch.where(side, 0.93 - 0.30 * tall, 0.93 - 0.18 * tall)
    pane = s.inside(lean * s.half[0], -reach * s.half[0], reach * s.half[0]) * s.inside(tall, 0.05, 0.9)
    pillar = side * s.inside(s.p[0] + 0.05 * s.half[0], -0.04, 0.04)
    pane = torch.where(roof, 0.0, pane * (1 - pillar))
    glass = torch.full_like(s.color, 0.016)
    seats = s.inside(tall, 0.0, 0.42) * 0.02
    color = _mix(s.color, glass + seats, pane)
    return s.paint(color, 0.75 + 0.25 * pane)


def _wheel(s: _Spot) -> _Surface:
    r = torch.hypot(s.p[0], s.p[1]) / s.half[0]
    cap = s.n[2].abs() > 0.7
    angle = torch.atan2(s.p[1], s.p[0])
    spoke = (angle * 5).cos() > -0.2
    rim = cap & (r < 0.66)
    tone = torch.where(rim & (spoke | (r < 0.2) | (r > 0.58)), 0.22, torch.where(rim, 0.03, 0.018))
    return s.paint(tone.expand_as(s.color), torch.where(rim, 0.3, 0.0))


def _sign(s: _Spot) -> _Surface:
    round_ = s.quadric
    a = torch.where(round_, s.p[0], s.p[2]) / s.half[2].where(~round_, s.half[0])
    b = s.p[1] / s.half[1]
    front = torch.where(round_, s.n[2], s.n[0]) > 0.5
    r = torch.hypot(a, b)
    edge = torch.maximum(a.abs(), b.abs())
    white, red, black = (s.tone(*c) for c in ((0.75, 0.75, 0.73), (0.55, 0.015, 0.02), (0.02, 0.02, 0.02)))
    digits = (a.abs() < 0.36) & (((b - 0.22).abs() < 0.14) | ((b + 0.22).abs() < 0.14)) & ((a * 3).abs() > 0.25)
    limit = torch.where((r > 0.74), red, torch.where(digits, black, white))
    stop = torch.where(((a.abs() < 0.17) & (b.abs() < 0.66)), white, red)
    arrow = (b.abs() < 0.12) & (a.abs() < 0.6) | ((a - 0.3).abs() + b.abs() < 0.38)
    blue = torch.where(((edge > 0.92) | arrow), white, s.color)
    warn = torch.where(((edge > 0.82) & (edge < 0.94) | (b.abs() < 0.1) & (a.abs() < 0.4)), black, s.color)
    color = torch.where((s.seed < 0.5), limit, torch.where((s.seed < 1.5), stop,
                        torch.where((s.seed < 2.5), blue, warn)))  # fmt: skip
    return s.paint(torch.where(front, color, 0.33), 0.1)


def _signal(s: _Spot) -> _Surface:
    """Three lamps, one alight: seed 0 red, 1 amber, 2 green."""
    front, color, glow = s.n[0] > 0.5, s.color, torch.zeros_like(s.seed)
    for k, (height, lamp) in enumerate(((0.3, (1.0, 0.03, 0.02)), (0.0, (1.0, 0.5, 0.02)), (-0.3, (0.03, 0.9, 0.35)))):
        disc = front * ((0.11 - torch.hypot(s.p[1], s.p[2] - height)) / s.pixel_m.clamp_min(0.005) + 0.5).clamp(0, 1)
        alight = (s.seed.round() == k).float()
        color = _mix(color, tuple(c * 0.08 for c in lamp), disc)
        color = _mix(color, lamp, disc * alight)
        glow = glow + disc * alight * 2.2
    return s.paint(color, 0.0, glow)


def _roof(s: _Spot) -> _Surface:
    """Tiles and corrugated sheet: ribs along the longest way up."""
    u, v, _, _ = s.wall()
    fade = (1 - s.pixel_m / 0.12).clamp(0, 1)
    ribs = (torch.remainder(u, 0.3) < 0.05).float() * fade
    rows = (torch.remainder(v, 0.35) < 0.05).float() * fade * ((s.n[2] > 0.2) & (s.n[2] < 0.95))
    g = s.light.grain(u, v, 0.06, 0) - 0.5
    return s.paint(s.color * (1 + 0.4 * g - 0.3 * ribs - 0.2 * rows), 0.1)


def _stripes(s: _Spot) -> _Surface:
    u, v, _, _ = s.wall()
    level = s.p[2] / s.half[2]
    bands = s.inside(level, -0.15, 0.25) + s.inside(level, 0.5, 0.72)
    slanted = (torch.remainder(u + v, 0.5) < 0.25).float()
    share = torch.where(s.quadric, bands, slanted)
    return s.paint(_mix(s.color, (0.68, 0.68, 0.66), share))


def _coach(s: _Spot) -> _Surface:
    u, v, width, upright = s.wall()
    level, side = v / (2 * s.half[2]), s.n[1].abs() > 0.5
    post = s.inside(torch.remainder(u, 1.55), 0, 0.09)
    low = torch.where(side, 0.40, torch.where(s.n[0] > 0.5, 0.30, 0.5))
    pane = s.inside(level, low, 0.84) * s.inside(u, 0.12, width - 0.12) * (1 - post * side) * upright
    door = (
        (s.n[1] < -0.5)
        * (s.inside(u, 0.12 * width, 0.12 * width + 1.3) + s.inside(u, 0.55 * width, 0.55 * width + 1.3))
        * s.inside(level, 0.04, 0.8)
    )
    color = _mix(s.color, (0.60, 0.60, 0.58), s.inside(level, 0.30, 0.345) * upright)
    color = _mix(color, (0.03, 0.03, 0.03), s.inside(level, -1, 0.05))
    pane = torch.maximum(pane, door * upright)
    color = _mix(color, (0.018, 0.02, 0.022), pane)
    board = (s.n[0] > 0.5) * s.inside(level, 0.87, 0.96) * s.inside(u, 0.2 * width, 0.8 * width)
    color = _mix(color, (0.75, 0.45, 0.05), board * 0.8)
    lamps = s.inside((u - width / 2).abs(), 0.36 * width, 0.47 * width) * s.inside(level, 0.10, 0.17)
    color = _mix(color, (0.7, 0.7, 0.68), lamps * (s.n[0] > 0.5))
    color = _mix(color, (0.4, 0.01, 0.01), lamps * (s.n[0] < -0.5))
    return s.paint(color, 0.45 + 0.55 * pane)


def _bark(s: _Spot) -> _Surface:
    u, v, _, _ = s.wall()
    g = s.light.grain(u * 3 + s.p[0], v * 0.4, 0.03, 0) - 0.5
    return s.paint(s.color * (1 + 1.2 * g))


_PAINTERS = {
    Texture.FACADE: _facade,
    Texture.SHOP: _shop,
    Texture.FOLIAGE: _foliage,
    Texture.BODY: _body,
    Texture.CABIN: _cabin,
    Texture.WHEEL: _wheel,
    Texture.SIGN: _sign,
    Texture.SIGNAL: _signal,
    Texture.ROOF: _roof,
    Texture.STRIPES: _stripes,
    Texture.COACH: _coach,
    Texture.GLASS: lambda s: s.paint(s.color * 0.5, 1.0),
    Texture.BARK: _bark,
    Texture.LAMP: lambda s: s.paint(s.color, 0.2, (s.n[2] < -0.5) * s.light.lamps * 40.0),
}


def develop(radiance: Tensor, generators: Sequence[torch.Generator], noise: float = 0.012) -> Tensor:
    """Radiance (V, H, W, 3) to uint8: exposure per view, vignetting, filmic curve, sensor noise.

    Each generator gives the noise of V / len(generators) views.
    """
    _, height, width, _ = radiance.shape
    luminance = radiance.mean(-1)
    gain = 0.19 / luminance.clamp(1e-4, 4).log().mean((1, 2)).exp()
    gain = gain.clamp(0.1, 2.2)[:, None, None, None]
    device = radiance.device
    y = torch.linspace(-1, 1, height, device=device)[:, None] * height / width
    x = torch.linspace(-1, 1, width, device=device)[None]
    vignette = (1 - 0.16 * (x * x + y * y))[None, :, :, None]
    exposed = radiance * gain * vignette
    grey = exposed.mean(-1, keepdim=True)
    exposed = grey + 0.82 * (exposed - grey)  # automotive sensors are dull
    curve = exposed * (2.51 * exposed + 0.03) / (exposed * (2.43 * exposed + 0.59) + 0.14)
    image = curve.clamp(0, 1) ** (1 / 2.2)
    image = smooth_edges(image)
    size = (len(image) // len(generators), *image.shape[1:])
    grain = torch.cat([torch.randn(size, generator=g, device=device) for g in generators])
    return ((image + noise * (1.2 - image) * grain).clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def smooth_edges(image: Tensor) -> Tensor:
    """Images (V, H, W, 3) with stair steps along edges blended (fast approximate anti-aliasing, Lottes 2009)."""
    planes = image.permute(0, 3, 1, 2)
    luma = torch.nn.functional.pad(planes.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")[:, 0]
    nw, ne, sw, se = luma[:, :-2, :-2], luma[:, :-2, 2:], luma[:, 2:, :-2], luma[:, 2:, 2:]
    along = torch.stack([sw + se - nw - ne, nw + sw - ne - se], -1)
    least = 0.03 * (nw + ne + sw + se)[..., None] + 1 / 128
    along = (along / (along.abs().amin(-1, keepdim=True) + least)).clamp(-4, 4)
    contrast = torch.stack([nw, ne, sw, se]).amax(0) - torch.stack([nw, ne, sw, se]).amin(0)
    along = along * (contrast > 0.06)[..., None]
    height, width = image.shape[1:3]
    y, x = torch.meshgrid(
        torch.arange(height, device=image.device), torch.arange(width, device=image.device), indexing="ij"
    )
    size = torch.tensor([width, height], device=image.device)
    blended = torch.zeros_like(planes)
    for step in (-1 / 6, 1 / 6):
        at = (torch.stack([x, y], -1) + along * step + 0.5) / size * 2 - 1
        blended += 0.5 * torch.nn.functional.grid_sample(planes, at, padding_mode="border", align_corners=False)
    return blended.permute(0, 2, 3, 1)
