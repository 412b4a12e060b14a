"""From hits to pictures: procedural textures, sun and sky, shadows, haze, exposure. Colours are linear until `develop`.

Everything is evaluated per pixel in metres on the surface, and fades with the pixel's footprint so that far detail
does not shimmer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perception.synthetic.labels import Label
from perception.synthetic.primitives import QUADRIC, Solids, Texture, surface_normal
from perception.synthetic.raycast import GROUND, SKY, Hits, Orthographic, Pinhole, cast
from perception.synthetic.roads import KERB_WIDTH_M, Ground, Style

_NOISE = 1024


def noise_tile(device: torch.device | str) -> Tensor:
    """(1024 * 1024, 3) in [0, 1], periodic, about 0.5 on average: fractal, fine and cloud-like noise."""
    rng = np.random.default_rng(7)
    frequency = np.hypot(np.fft.fftfreq(_NOISE)[:, None], np.fft.fftfreq(_NOISE)[None]) * _NOISE
    layers = []
    for power, low in ((1.1, 2), (0.35, 4), (1.75, 1)):
        spectrum = np.fft.fft2(rng.standard_normal((_NOISE, _NOISE))) / np.maximum(frequency, low) ** power
        spectrum[0, 0] = 0
        layer = np.fft.ifft2(spectrum).real
        layers.append(np.clip(0.5 + 0.2 * layer / layer.std(), 0, 1))
    return torch.tensor(np.stack(layers, -1).reshape(-1, 3), dtype=torch.float32, device=device)


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
            noise_tile(device),
        )

    def grain(self, x: Tensor, y: Tensor, texel_m: float, layer: int) -> Tensor:
        """(N,) noise at x, y metres, one texel being `texel_m` wide."""
        column = torch.remainder((x / texel_m).floor(), _NOISE).long()
        row = torch.remainder((y / texel_m).floor(), _NOISE).long()
        return self.noise[:, layer][row * _NOISE + column]

    def sky(self, direction: Tensor, clouds: bool = True) -> Tensor:
        """(N, 3) radiance of the sky in a direction (N, 3); far hills stand below."""
        up = direction[:, 2].clamp_min(0)
        zenith = (torch.tensor([0.16, 0.33, 0.72], device=up.device) * (1 - self.overcast) * 1.1
                  + torch.tensor([0.70, 0.74, 0.80], device=up.device) * self.overcast)  # fmt: skip
        zenith = zenith * self.horizon.mean()
        blend = ((1 - up) ** 3.5)[:, None]
        color = zenith * (1 - blend) + self.horizon * blend
        toward = (direction @ self.sun).clamp(0, 1)
        color = color + self.sun_color * (0.35 * toward**64 + 0.10 * toward**8)[:, None] * (1 - self.overcast)
        if clouds:
            plane = direction[:, :2] / (up + 0.12)[:, None]
            depth = self._smooth(plane[:, 0] * 60, plane[:, 1] * 60)
            cover = ((depth - 0.54 + 0.35 * self.overcast) * 5).clamp(0, 1)[:, None] * (up * 8).clamp(0, 1)[:, None]
            white = self.sky_color * 0.75 + 0.22 * self.sun_color
            color = color * (1 - 0.8 * cover) + 0.8 * cover * white * (1.0 - 0.5 * (depth - 0.6).clamp(0, 1))[:, None]
            ridge = 0.035 * self._smooth(torch.atan2(direction[:, 1], direction[:, 0]) * 120, 0 * up) ** 1.5
            hill = ((ridge + 0.004 - direction[:, 2]) * 400).clamp(0, 1)[:, None]
            far = self.horizon * torch.tensor([0.46, 0.54, 0.60], device=up.device)
            color = color * (1 - hill) + far * hill
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
    """Depths seen from the sun, and a blurred plan of what stands close to the ground, around the ego vehicle."""

    view: Orthographic
    depth: Tensor
    plan: Orthographic
    cover: Tensor

    @staticmethod
    def cast(solids: Solids, light: Light, center: Tensor, reach_m: float = 56.0, chunk: int = 1 << 17) -> Shadows:
        side = torch.cross(torch.tensor([0.0, 0.0, 1.0], device=center.device), light.sun, dim=0)
        side = side / side.norm()
        rotation = torch.stack([side, torch.cross(-light.sun, side, dim=0), -light.sun], 1)[None]
        first = solids.at(0)
        step, plan_step = 0.125, 0.25
        count = int(2 * reach_m / step)
        corner = center + light.sun * 150 - rotation[0] @ torch.tensor([reach_m, reach_m, 0.0], device=center.device)
        view = Orthographic(rotation, corner[None], step, count, count)
        down = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]], device=center.device)[None]
        corner = center + torch.tensor([-reach_m, reach_m, 100.0], device=center.device)
        plan = Orthographic(down, corner[None], plan_step, int(2 * reach_m / plan_step), int(2 * reach_m / plan_step))
        depth = cast(first, view, chunk).distance.view(count, count)
        top = cast(first, plan, chunk)
        building = (solids.label == Label.BUILDING)[top.part.clamp_min(0)] & (top.part >= 0)
        low = (top.distance < 100 + 3) & ((top.distance > 100 - 4) | building)
        cover = low.float().view(1, 1, plan.rows, plan.columns)
        for _ in range(2):
            cover = torch.nn.functional.avg_pool2d(cover, 3, 1, 1)
        return Shadows(view, depth, plan, cover[0, 0])

    def lit(self, point: Tensor) -> Tensor:
        """(N,) share of the sun that reaches points (N, 3), 0 to 1."""
        local = (point - self.view.corner[0]) @ self.view.rotation[0]
        u, v = (local[:, :2] / self.view.step_m).unbind(1)
        inside = (u >= 0) & (v >= 0) & (u < self.view.columns - 1) & (v < self.view.rows - 1)
        u, v = u.clamp(0, self.view.columns - 1.01), v.clamp(0, self.view.rows - 1.01)
        u0, v0 = u.floor(), v.floor()
        fu, fv = u - u0, v - v0
        flat, index = self.depth.view(-1), v0.long() * self.view.columns + u0.long()
        a, b, c, d = (
            (flat[index + k] > local[:, 2] - 0.12).float() for k in (0, 1, self.view.columns, self.view.columns + 1)
        )
        share = (a * (1 - fu) + b * fu) * (1 - fv) + (c * (1 - fu) + d * fu) * fv
        return torch.where(inside, share, 1.0)

    def open_sky(self, point: Tensor) -> Tensor:
        """(N,) share of the sky over ground points (N, 3), 0 to 1."""
        local = (point - self.plan.corner[0]) @ self.plan.rotation[0] / self.plan.step_m
        u, v = local[:, 0].clamp(0, self.plan.columns - 1.01), local[:, 1].clamp(0, self.plan.rows - 1.01)
        u0, v0 = u.floor(), v.floor()
        fu, fv, flat = u - u0, v - v0, self.cover.reshape(-1)
        index = v0.long() * self.plan.columns + u0.long()
        a, b, c, d = (flat[index + k] for k in (0, 1, self.plan.columns, self.plan.columns + 1))
        return 1 - 0.72 * ((a * (1 - fu) + b * fu) * (1 - fv) + (c * (1 - fu) + d * fu) * fv)


@dataclass
class _Surface:
    """What a set of pixels shows: (N, 3) albedo and normal, (N,) gloss (mirror share) and glow (emission)."""

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


def ground_label(ground: Ground, xy: Tensor) -> Tensor:
    """(N,) uint8 Label of the ground at (N, 2)."""
    sample = ground.sample(xy)
    label = torch.full_like(sample[:, 0], Label.ROAD)
    label = torch.where(sample[:, 0] > 0, float(Label.SIDEWALK), label)
    land = torch.where(sample[:, 3] > 0.75, float(Label.PAVED), float(Label.TERRAIN))
    return torch.where(sample[:, 0] > ground.sidewalk_m, land, label).to(torch.uint8)


def meet(solids: Solids, ground: Ground, grid: Pinhole, chunk: int) -> tuple[Hits, Tensor, Tensor]:
    """Hits on solids and ground, with the rays' origins and directions."""
    origin, direction, _ = grid.rays()
    hits = cast(solids, grid, chunk)
    t = ground.intersect(origin, direction, 250.0)
    first = t < hits.distance
    return (
        Hits(torch.where(first, t, hits.distance), torch.where(first, GROUND, hits.part)),
        origin,
        direction,
    )


def render(
    solids: Solids, ground: Ground, grid: Pinhole, light: Light, shadows: Shadows, chunk: int = 1 << 17
) -> Picture:
    """All views of a grid."""
    hits, origin, direction = meet(solids, ground, grid, chunk)
    n, device = len(origin), origin.device
    radiance = torch.empty(n, 3, device=device)
    label = torch.full((n,), 255, dtype=torch.uint8, device=device)
    agent = torch.zeros(n, dtype=torch.int64, device=device)
    angle = 1 / float(grid.intrinsic[:, 0, 0].mean())
    index = (hits.part == SKY).nonzero()[:, 0]
    radiance[index] = light.sky(direction[index])
    index = (hits.part == GROUND).nonzero()[:, 0]
    point = origin[index] + hits.distance[index, None] * direction[index]
    surface, label[index] = _ground_surface(ground, light, point, hits.distance[index] * angle, direction[index])
    radiance[index] = _illuminate(surface, point, direction[index], light, shadows, hits.distance[index],
                                  shadows.open_sky(point))  # fmt: skip
    view = torch.arange(len(grid.position), device=device).repeat_interleave(grid.rows * grid.columns)
    texture = torch.where(hits.part >= 0, solids.texture[hits.part.clamp_min(0)].long(), -1)
    for kind in Texture:
        index = (texture == kind).nonzero()[:, 0]
        if not len(index):
            continue
        part, t = hits.part[index], hits.distance[index]
        point = origin[index] + t[:, None] * direction[index]
        rotation = solids.rotation[view[index], part]
        local = ((point - solids.center[view[index], part])[:, :, None] * rotation).sum(1)
        face = surface_normal(local, solids.kind[part], solids.half[part], solids.form[part])
        surface = _PAINTERS.get(kind, _plain)(
            _Spot(local, face, solids.half[part], solids.color[part], solids.seed[view[index], part], t * angle,
                  (solids.kind[part] == QUADRIC), light)
        )  # fmt: skip
        surface.normal = (rotation * surface.normal[:, None]).sum(-1)
        low = 0.8 + 0.2 * ((point[:, 2] - ground.terrain(point[:, :2])[0]) / 1.5).clamp(0, 1)
        radiance[index] = _illuminate(surface, point, direction[index], light, shadows, t, low)
        label[index], agent[index] = solids.label[part], solids.agent[part]
    shape = (len(grid.position), grid.rows, grid.columns)
    return Picture(radiance.view(*shape, 3), hits.distance.view(shape), label.view(shape), agent.view(shape))


def _illuminate(
    s: _Surface, point: Tensor, direction: Tensor, light: Light, shadows: Shadows, t: Tensor, sky: Tensor
) -> Tensor:
    facing = (s.normal @ light.sun).clamp_min(0)
    sun = facing * shadows.lit(point + 0.06 * s.normal)
    ambient = (0.62 + 0.38 * s.normal[:, 2:]) * sky[:, None] * light.sky_color
    bounce = (0.10 + 0.10 * (1 - s.normal[:, 2:]).clamp(0, 1)) * (
        light.sun_color * light.sun[2] * 0.25 + 0.2 * light.sky_color
    )
    color = s.albedo * (sun[:, None] * light.sun_color + ambient + bounce) + s.glow[:, None] * s.albedo
    shiny = (s.gloss > 0).nonzero()[:, 0]
    if len(shiny):
        d, n = direction[shiny], s.normal[shiny]
        cosine = -(d * n).sum(1, keepdim=True).clamp(-1, 0)
        mirrored = d + 2 * cosine * n
        share = s.gloss[shiny, None] * (0.08 + 0.92 * (1 - cosine) ** 5)
        skyline = (
            0.08 + 0.55 * light.grain(torch.atan2(mirrored[:, 1], mirrored[:, 0]), 0 * t[shiny], 0.02, 2)[:, None] ** 2
        )
        seen = light.sky(mirrored, clouds=False) * torch.where(mirrored[:, 2:] > skyline, 1.0, 0.3)
        glint = (mirrored @ light.sun).clamp_min(0) ** 200 * sun[shiny].clamp(0, 1)
        color[shiny] = (
            color[shiny] * (1 - share) + share * seen + s.gloss[shiny, None] * 2.5 * glint[:, None] * light.sun_color
        )
    if light.lamps > 0:  # the ego vehicle's headlights and the street's lamps
        color = (
            color
            + s.albedo
            * light.lamps
            * (0.35 + 40 / (t + 4) ** 1.5 * (-(direction * s.normal).sum(1)).clamp_min(0.1))[:, None]
            * 0.12
        )
    clear = torch.exp(-light.haze_per_m * t)[:, None]
    return color * clear + light.horizon * (1 - clear)


def _ground_surface(
    ground: Ground, light: Light, point: Tensor, pixel_m: Tensor, direction: Tensor
) -> tuple[_Surface, Tensor]:
    x, y = point[:, 0], point[:, 1]
    sample = ground.sample(point[:, :2])
    edge, paint, yellow, land = sample.unbind(1)
    _, slope = ground.terrain(point[:, :2])
    normal = torch.stack([-slope[:, 0], -slope[:, 1], torch.ones_like(x)], 1)
    normal = normal / normal.norm(dim=1, keepdim=True)
    foot = pixel_m / (-direction[:, 2]).clamp_min(0.03)
    fine = (1 - foot / 0.05).clamp(0, 1)
    grain = light.grain(x, y, 0.012, 1) - 0.5
    broad, mid = light.grain(x, y, 0.22, 0) - 0.5, light.grain(x, y, 0.045, 0) - 0.5

    def mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        return a + (b - a) * share[:, None]

    def tone(*rgb: float) -> Tensor:
        return torch.tensor(rgb, device=x.device)

    soft = foot.clamp(0.02, 0.3)
    asphalt = tone(0.098, 0.098, 0.102) * (1 + 0.35 * broad + 0.22 * mid + 0.9 * grain * fine)[:, None]
    patch = ((light.grain(x, y, 0.35, 2) - 0.66) * 30).clamp(0, 1)
    color = asphalt * (1 - 0.22 * patch)[:, None]
    color = mix(color, tone(0.15, 0.148, 0.14).expand_as(color), ((edge + 0.34) / soft).clamp(0, 1) * 0.6)
    coverage = ((paint - 0.5) * (0.1 / soft).clamp(0.8, 1.7) + 0.5).clamp(0, 1) * (
        1 - (broad + mid + 0.1).clamp(0, 0.6)
    )
    white = tone(0.62, 0.62, 0.60) * (1 - yellow)[:, None] + tone(0.62, 0.40, 0.05) * yellow[:, None]
    color = mix(color, white, coverage * 0.92)
    kerb = tone(0.36, 0.355, 0.34) * (1 + 0.3 * mid + 0.4 * grain * fine)[:, None]
    color = mix(color, kerb, (edge / soft + 0.5).clamp(0, 1))
    joint = torch.remainder(edge, 0.9)
    line = ((0.02 + foot * 0.5 - (joint - 0.45).abs()) / (foot * 0.5 + 0.005)).clamp(0, 1) * (0.04 / (foot + 0.04))
    walk = tone(0.29, 0.275, 0.255) * (1 + 0.25 * broad + 0.15 * mid + 0.5 * grain * fine - 0.35 * line)[:, None]
    color = mix(color, walk, ((edge - KERB_WIDTH_M) / soft + 0.5).clamp(0, 1))
    grass = tone(0.085, 0.15, 0.035) * (1 + 0.9 * mid + 0.6 * broad + 1.3 * grain * fine)[:, None]
    bare = tone(0.22, 0.17, 0.11) * (1 + 0.6 * mid + 0.5 * broad + 0.6 * grain * fine)[:, None]
    slabs = tone(0.26, 0.25, 0.235) * (1 + 0.3 * broad + 0.2 * mid + 0.5 * grain * fine)[:, None]
    wild = mix(mix(grass, bare, (land * 2).clamp(0, 1)), slabs, ((land - 0.6) * 8).clamp(0, 1))
    color = mix(color, wild, ((edge - ground.sidewalk_m) / soft + 0.5).clamp(0, 1))
    gloss = torch.where(edge < 0, 0.10, 0.0)
    surface = _Surface(color.clamp_min(0.01), normal, gloss, torch.zeros_like(x))
    label = torch.where(edge > 0, float(Label.SIDEWALK), float(Label.ROAD))
    beyond = torch.where(land > 0.75, float(Label.PAVED), float(Label.TERRAIN))
    return surface, torch.where(edge > ground.sidewalk_m, beyond, label).to(torch.uint8)


@dataclass(frozen=True)
class _Spot:
    """Pixels on solids of one texture: point and normal in the part's frame, half extents, colour, footprint."""

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
        across = self.n[:, 0].abs() > self.n[:, 1].abs()
        u = torch.where(across, self.p[:, 1] * torch.sign(self.n[:, 0]), -self.p[:, 0] * torch.sign(self.n[:, 1]))
        width = 2 * torch.where(across, self.half[:, 1], self.half[:, 0])
        return u + width / 2, self.p[:, 2] + self.half[:, 2], width, self.n[:, 2].abs() < 0.6

    def inside(self, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """(N,) 1 where low < x < high, smoothed over a pixel."""
        soft = self.pixel_m.clamp_min(0.004)
        return ((x - low) / soft + 0.5).clamp(0, 1) * ((high - x) / soft + 0.5).clamp(0, 1)

    def chance(self, a: Tensor, b: Tensor | float = 0.0) -> Tensor:
        """(N,) random in [0, 1), the same for the same a, b and part."""
        return torch.remainder(torch.sin(a * 12.9898 + b * 78.233 + self.seed * 37.719) * 43758.547, 1.0)


def _mix(a: Tensor, b: Tensor | tuple[float, ...], share: Tensor) -> Tensor:
    other = b if isinstance(b, Tensor) else torch.tensor(b, device=a.device)
    return a + (other - a) * share[:, None]


def _plain(s: _Spot) -> _Surface:
    return s.paint(s.color)


def _facade(s: _Spot) -> _Surface:
    u, v, width, upright = s.wall()
    height = 2 * s.half[:, 2]
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
    wall = s.color * (1 + 0.25 * g + 0.22 * streak - 0.25 * brick.clamp(0, 1) * fade * (s.seed < 0.5))[:, None]
    band = s.inside(torch.remainder(v, pitch_v), 0, 0.16) * (s.seed > 0.3)
    wall = _mix(wall, s.color * 0.5 + 0.28, band * 0.7)
    sill = s.inside(x, -half_w - 0.12, half_w + 0.12) * s.inside(y, -half_h - 0.17, -half_h - 0.05)
    wall = _mix(wall, (0.50, 0.49, 0.46), sill)
    trim = torch.where((s.chance(s.seed * 0 + 4) > 0.4)[:, None], 0.55, 0.06).expand(-1, 3)
    color = _mix(wall, trim, frame * ~modern)
    curtain = s.chance(column, row)
    inner = (
        0.008
        + 0.05 * s.chance(row, column + 5.0) ** 2
        + 0.20 * (curtain > 0.72) * s.inside(y, half_h * (1 - 2 * s.chance(row, column)), half_h)
    )
    glass = inner[:, None] * torch.tensor([1.0, 1.02, 1.05], device=u.device)
    lit = (curtain < 0.25) * s.light.lamps
    color = _mix(color, glass.expand(-1, 3), pane)
    color = _mix(color, trim, pane * mullion.clamp(0, 1) * 0.9)
    flat = s.color.new_tensor([0.24, 0.235, 0.22]).expand_as(color)
    color = torch.where(upright[:, None], color, flat)
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
    hue = torch.stack([s.chance(cell, 1.0), s.chance(cell, 2.0), s.chance(cell, 3.0)], 1) ** 2 * 0.6 + 0.02
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
    color = _mix(color, goods[:, None].expand(-1, 3), window)
    color = _mix(color, (0.05, 0.05, 0.05), bars)
    front = (s.n[:, 1] > 0.5)[:, None]
    glow = torch.where(front[:, 0], window * s.light.lamps * 4, base.glow)
    return s.paint(torch.where(front, color, base.albedo), torch.where(front[:, 0], window, base.gloss), glow)


def _foliage(s: _Spot) -> _Surface:
    u = s.p / s.half
    x, y = s.p[:, 0] + s.p[:, 2] * 0.7 + 9 * s.seed, s.p[:, 1] - s.p[:, 2] * 0.6
    near = (1 - s.pixel_m / 0.06).clamp(0, 1)
    leaf, clump = s.light.grain(x, y, 0.035, 1) - 0.5, s.light.grain(x, y, 0.028, 0) - 0.5
    depth = 0.62 + 0.38 * u[:, 2].clamp(-1, 1)
    color = s.color * (depth * (1 + 2.2 * clump + 2.4 * leaf * (0.35 + 0.65 * near)))[:, None].clamp_min(0.12)
    bump = torch.stack([clump, leaf, -clump], 1) * 1.6
    normal = s.n + bump + torch.tensor([0, 0, 0.25], device=u.device)
    surface = s.paint(color)
    surface.normal = normal / normal.norm(dim=1, keepdim=True)
    return surface


def _body(s: _Spot) -> _Surface:
    p, h = s.p, s.half
    u, v = p / h, (p[:, 2] + h[:, 2])
    color, gloss = s.color, torch.full_like(s.seed, 0.75)
    dark = (0.016, 0.016, 0.017)
    side = (s.n[:, 1].abs() > 0.6).float()
    arch = ((0.40 - torch.hypot(p[:, 0].abs() - 0.6 * h[:, 0], v - 0.13)) / s.pixel_m.clamp_min(0.01) + 0.5).clamp(0, 1)
    seams = sum(s.inside((p[:, 0] - k * h[:, 0]).abs(), -1.0, 0.008) for k in (0.28, -0.08, -0.42)) * s.inside(
        v, 0.12, 2 * h[:, 2]
    )
    handle = s.inside(p[:, 0] - 0.02 * h[:, 0], -0.1, 0.1) * s.inside(v - 1.5 * h[:, 2], -0.02, 0.02)
    color = _mix(color, dark, side * (seams * 0.8 + handle * 0.7).clamp(0, 1))
    color = _mix(color, dark, side * torch.maximum(arch, s.inside(v, -1, 0.10)))
    front, back = (s.n[:, 0] > 0.6).float(), (s.n[:, 0] < -0.6).float()
    ends = front + back
    color = _mix(color, dark, ends * s.inside(v, -1, 0.13))
    grille = s.inside(u[:, 1], -0.55, 0.55) * s.inside(u[:, 2], -0.45, 0.25)
    lamp = s.inside(u[:, 1].abs(), 0.60, 0.94) * s.inside(u[:, 2], 0.15, 0.72)
    plate = s.inside(p[:, 1], -0.26, 0.26) * s.inside(v - 0.62 * h[:, 2], -0.06, 0.06)
    color = _mix(color, (0.025, 0.025, 0.027), front * grille)
    color = _mix(color, (0.75, 0.75, 0.72), front * lamp)
    color = _mix(color, (0.42, 0.012, 0.01), back * s.inside(u[:, 1].abs(), 0.62, 0.96) * s.inside(u[:, 2], 0.1, 0.85))
    color = _mix(color, (0.62, 0.62, 0.55), ends * plate)
    return s.paint(
        color, gloss, s.light.lamps * 8 * (front * lamp + 0.4 * back * (color[:, 0] > 0.3) * (color[:, 1] < 0.05))
    )


def _cabin(s: _Spot) -> _Surface:
    u = s.p / s.half
    roof = s.n[:, 2] > 0.97
    tall = 0.5 * (u[:, 2] + 1)
    side = s.n[:, 1].abs() > 0.6
    lean = torch.where(side, u[:, 0], u[:, 1])
    reach = torch.where(side, 0.93 - 0.30 * tall, 0.93 - 0.18 * tall)
    pane = s.inside(lean * s.half[:, 0], -reach * s.half[:, 0], reach * s.half[:, 0]) * s.inside(tall, 0.05, 0.9)
    pillar = side * s.inside(s.p[:, 0] + 0.05 * s.half[:, 0], -0.04, 0.04)
    pane = torch.where(roof, 0.0, pane * (1 - pillar))
    glass = torch.full_like(s.color, 0.016)
    seats = s.inside(tall, 0.0, 0.42) * 0.02
    color = _mix(s.color, glass + seats[:, None], pane)
    return s.paint(color, 0.75 + 0.25 * pane)


def _wheel(s: _Spot) -> _Surface:
    r = torch.hypot(s.p[:, 0], s.p[:, 1]) / s.half[:, 0]
    cap = s.n[:, 2].abs() > 0.7
    angle = torch.atan2(s.p[:, 1], s.p[:, 0])
    spoke = (angle * 5).cos() > -0.2
    rim = cap & (r < 0.66)
    tone = torch.where(rim & (spoke | (r < 0.2) | (r > 0.58)), 0.22, torch.where(rim, 0.03, 0.018))
    return s.paint(tone[:, None].expand(-1, 3), torch.where(rim, 0.3, 0.0))


def _sign(s: _Spot) -> _Surface:
    round_ = s.quadric
    a = torch.where(round_, s.p[:, 0], s.p[:, 2]) / s.half[:, 2].where(~round_, s.half[:, 0])
    b = s.p[:, 1] / s.half[:, 1]
    front = torch.where(round_, s.n[:, 2], s.n[:, 0]) > 0.5
    r = torch.hypot(a, b)
    edge = torch.maximum(a.abs(), b.abs())
    white, red, black = (s.color.new_tensor(c) for c in ((0.75, 0.75, 0.73), (0.55, 0.015, 0.02), (0.02, 0.02, 0.02)))
    digits = (a.abs() < 0.36) & (((b - 0.22).abs() < 0.14) | ((b + 0.22).abs() < 0.14)) & ((a * 3).abs() > 0.25)
    limit = torch.where((r > 0.74)[:, None], red, torch.where(digits[:, None], black, white))
    stop = torch.where(((a.abs() < 0.17) & (b.abs() < 0.66))[:, None], white, red)
    arrow = (b.abs() < 0.12) & (a.abs() < 0.6) | ((a - 0.3).abs() + b.abs() < 0.38)
    blue = torch.where(((edge > 0.92) | arrow)[:, None], white, s.color)
    warn = torch.where(((edge > 0.82) & (edge < 0.94) | (b.abs() < 0.1) & (a.abs() < 0.4))[:, None], black, s.color)
    color = torch.where((s.seed < 0.5)[:, None], limit, torch.where((s.seed < 1.5)[:, None], stop,
                        torch.where((s.seed < 2.5)[:, None], blue, warn)))  # fmt: skip
    return s.paint(torch.where(front[:, None], color, 0.33), 0.1)


def _signal(s: _Spot) -> _Surface:
    """Three lamps, one alight: seed 0 red, 1 amber, 2 green."""
    front, color, glow = s.n[:, 0] > 0.5, s.color, torch.zeros_like(s.seed)
    for k, (height, lamp) in enumerate(((0.3, (1.0, 0.03, 0.02)), (0.0, (1.0, 0.5, 0.02)), (-0.3, (0.03, 0.9, 0.35)))):
        disc = front * ((0.11 - torch.hypot(s.p[:, 1], s.p[:, 2] - height)) / s.pixel_m.clamp_min(0.005) + 0.5).clamp(
            0, 1
        )
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
    rows = (torch.remainder(v, 0.35) < 0.05).float() * fade * ((s.n[:, 2] > 0.2) & (s.n[:, 2] < 0.95))
    g = s.light.grain(u, v, 0.06, 0) - 0.5
    return s.paint(s.color * (1 + 0.4 * g - 0.3 * ribs - 0.2 * rows)[:, None], 0.1)


def _stripes(s: _Spot) -> _Surface:
    u, v, _, _ = s.wall()
    level = s.p[:, 2] / s.half[:, 2]
    bands = s.inside(level, -0.15, 0.25) + s.inside(level, 0.5, 0.72)
    slanted = (torch.remainder(u + v, 0.5) < 0.25).float()
    share = torch.where(s.quadric, bands, slanted)
    return s.paint(_mix(s.color, (0.68, 0.68, 0.66), share))


def _coach(s: _Spot) -> _Surface:
    u, v, width, upright = s.wall()
    level, side = v / (2 * s.half[:, 2]), s.n[:, 1].abs() > 0.5
    post = s.inside(torch.remainder(u, 1.55), 0, 0.09)
    low = torch.where(side, 0.40, torch.where(s.n[:, 0] > 0.5, 0.30, 0.5))
    pane = s.inside(level, low, 0.84) * s.inside(u, 0.12, width - 0.12) * (1 - post * side) * upright
    door = (
        (s.n[:, 1] < -0.5)
        * (s.inside(u, 0.12 * width, 0.12 * width + 1.3) + s.inside(u, 0.55 * width, 0.55 * width + 1.3))
        * s.inside(level, 0.04, 0.8)
    )
    color = _mix(s.color, (0.60, 0.60, 0.58), s.inside(level, 0.30, 0.345) * upright)
    color = _mix(color, (0.03, 0.03, 0.03), s.inside(level, -1, 0.05))
    pane = torch.maximum(pane, door * upright)
    color = _mix(color, (0.018, 0.02, 0.022), pane)
    board = (s.n[:, 0] > 0.5) * s.inside(level, 0.87, 0.96) * s.inside(u, 0.2 * width, 0.8 * width)
    color = _mix(color, (0.75, 0.45, 0.05), board * 0.8)
    lamps = s.inside((u - width / 2).abs(), 0.36 * width, 0.47 * width) * s.inside(level, 0.10, 0.17)
    color = _mix(color, (0.7, 0.7, 0.68), lamps * (s.n[:, 0] > 0.5))
    color = _mix(color, (0.4, 0.01, 0.01), lamps * (s.n[:, 0] < -0.5))
    return s.paint(color, 0.45 + 0.55 * pane)


def _bark(s: _Spot) -> _Surface:
    u, v, _, _ = s.wall()
    g = s.light.grain(u * 3 + s.p[:, 0], v * 0.4, 0.03, 0) - 0.5
    return s.paint(s.color * (1 + 1.2 * g)[:, None])


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
    Texture.LAMP: lambda s: s.paint(s.color, 0.2, (s.n[:, 2] < -0.5) * s.light.lamps * 40.0),
}


def develop(radiance: Tensor, generator: torch.Generator, noise: float = 0.012) -> Tensor:
    """Radiance (V, H, W, 3) to uint8: exposure per view, vignetting, filmic curve, sensor noise."""
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
    grain = torch.randn(image.shape, generator=generator, device=device)
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
