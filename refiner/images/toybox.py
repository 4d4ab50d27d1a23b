"""Toybox: an image set that is computed, not downloaded, with every factor known.

Twenty toys are written as signed distance functions (Hart 1996, "Sphere tracing"; Quilez,
iquilezles.org/articles/distfunctions) and ray-marched under a random pose, colour, light, camera
and background. The factors that were drawn come back with the images, so a lesson can ask which
block of a model still knows the hue, the pose or the class.

Image ``i`` of a split depends on ``(seed, split, i)`` alone. Two things make that exact to the
bit, whatever the order, the chunk or the number of images: the draws come from a counter-based
generator (Philox with the image's index as counter), and every operation that touches a pixel is
one that IEEE 754 rounds correctly (+ - * / sqrt min max abs floor), so vectorised and scalar
loops agree.

Shape legend: N images, R rays of one image (H*W pixels). Points are three tensors x, y, z of
[N, R] rather than one [N, R, 3]: the distance functions read like their formulas, and every
operation runs over contiguous memory.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.images.labs import Lab, lab, photographed, staged
from refiner.images.sets import ImageSet

SPLITS = {"train": 0, "val": 1, "test": 2}
PATTERNS = ("plain", "stripes", "checks", "bands")


# ---------------------------------------------------------------- distance functions
# Every toy fits into a ball of radius 1.1 around the origin, y points up, z to the camera.


def _norm(*axes: Tensor) -> Tensor:
    total = axes[0] * axes[0]
    for axis in axes[1:]:
        total = total + axis * axis
    return total.sqrt()


def _ball(x, y, z, radius):
    return _norm(x, y, z) - radius


def _box(x, y, z, a, b, c):
    """Box with half sides a, b, c."""
    qx, qy, qz = x.abs() - a, y.abs() - b, z.abs() - c
    outside = _norm(qx.clamp(min=0), qy.clamp(min=0), qz.clamp(min=0))
    return outside + torch.maximum(torch.maximum(qx, qy), qz).clamp(max=0)


def _cylinder(x, y, z, radius, half):
    """Capped cylinder along y."""
    qr, qy = _norm(x, z) - radius, y.abs() - half
    return _norm(qr.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qr, qy).clamp(max=0)


def _cone(x, y, z, base, tip, radius):
    """Cone along y from a disc at y=base to a point at y=tip (a bound at the rim)."""
    height = tip - base
    slant = math.hypot(height, radius)
    side = (_norm(x, z) * height + (y - tip) * radius) / slant
    return torch.maximum(side, base - y)


def _torus(x, y, z, ring, tube):
    """Torus around z: its hole faces the camera."""
    return _norm(_norm(x, y) - ring, z) - tube


def _legs(x, y, z, dx, dz, top, bottom):
    half = (top - bottom) / 2
    return _box(x.abs() - dx, y - (top + bottom) / 2, z.abs() - dz, 0.08, half, 0.08)


def _union(*distances: Tensor) -> Tensor:
    nearest = distances[0]
    for distance in distances[1:]:
        nearest = torch.minimum(nearest, distance)
    return nearest


def _mug(x, y, z):
    outer, inner = _cylinder(x + 0.15, y, z, 0.55, 0.7), _cylinder(x + 0.15, y - 0.2, z, 0.43, 0.7)
    handle = torch.maximum(_torus(x - 0.4, y, z, 0.36, 0.1), 0.35 - x)
    return _union(torch.maximum(outer, -inner), handle)


def _chair(x, y, z):
    seat = _box(x, y + 0.05, z, 0.5, 0.08, 0.5)
    back = _box(x, y - 0.45, z + 0.42, 0.5, 0.5, 0.08)
    return _union(seat, back, _legs(x, y, z, 0.42, 0.42, 0.0, -0.9))


def _tree(x, y, z):
    crown = _cone(x, y, z, -0.55, 0.35, 0.65), _cone(x, y, z, -0.05, 1.0, 0.5)
    return _union(_cylinder(x, y + 0.75, z, 0.14, 0.25), *crown)


def _arch(x, y, z):
    gate = torch.maximum(_box(x, y, z, 0.75, 0.7, 0.3), -_cylinder(x, z, y + 0.35, 0.42, 1.0))
    return torch.maximum(gate, -_box(x, y + 0.7, z, 0.42, 0.35, 1.0))


def _stairs(x, y, z):
    steps = (-0.5, 0.45, 0.2), (0.0, 0.25, 0.4), (0.5, 0.05, 0.6)
    return _union(*(_box(x - dx, y + dy, z, 0.25, height, 0.4) for dx, dy, height in steps))


def _snowman(x, y, z):
    head = _ball(x, y - 0.72, z, 0.26)
    return _union(_ball(x, y + 0.5, z, 0.5), _ball(x, y - 0.2, z, 0.37), head)


def _plus(x, y, z):
    return _union(_box(x, y, z, 0.85, 0.26, 0.26), _box(x, y, z, 0.26, 0.85, 0.26))


def _dumbbell(x, y, z):
    return _union(_ball(x.abs() - 0.62, y, z, 0.37), _cylinder(y, x, z, 0.13, 0.6))


def _table(x, y, z):
    return _union(_box(x, y - 0.35, z, 0.85, 0.09, 0.6), _legs(x, y, z, 0.7, 0.45, 0.4, -0.7))


_SHAPES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ball": lambda x, y, z: _ball(x, y, z, 0.85),
    "cube": lambda x, y, z: _box(x, y, z, 0.55, 0.55, 0.55) - 0.06,
    "donut": lambda x, y, z: _torus(x, y, z, 0.64, 0.28),
    "can": lambda x, y, z: _cylinder(x, y, z, 0.5, 0.8),
    "cone": lambda x, y, z: _cone(x, y, z, -0.7, 0.95, 0.75),
    "octahedron": lambda x, y, z: (x.abs() + y.abs() + z.abs() - 1.05) / math.sqrt(3),
    "pill": lambda x, y, z: _norm(x, y - y.clamp(-0.6, 0.6), z) - 0.36,
    "plus": _plus,
    "mug": _mug,
    "dumbbell": _dumbbell,
    "table": _table,
    "chair": _chair,
    "snowman": _snowman,
    "tree": _tree,
    "rings": lambda x, y, z: _union(_torus(x, y, z, 0.72, 0.14), _torus(z, y, x, 0.72, 0.14)),
    "arrow": lambda x, y, z: _union(
        _cylinder(y, x + 0.35, z, 0.16, 0.55), _cone(y, x, z, 0.1, 0.95, 0.5)
    ),
    # Held out of "toybox"; image set "toybox-new" shows only these, to test transfer.
    "arch": _arch,
    "hammer": lambda x, y, z: _union(
        _cylinder(x, y + 0.15, z, 0.12, 0.75), _box(x, y - 0.6, z, 0.55, 0.22, 0.22)
    ),
    "stairs": _stairs,
    "hourglass": lambda x, y, z: _union(
        _cone(x, y, z, -0.85, 0.15, 0.6), _cone(x, -y, z, -0.85, 0.15, 0.6)
    ),
}
TOYS = tuple(_SHAPES)[:16]
HELD_OUT = tuple(_SHAPES)[16:]


# ---------------------------------------------------------------- factors


@dataclass(frozen=True)
class Variant:
    """What a set draws: its toys, the ranges of its factors (angles in degrees), and its labs."""

    toys: tuple[str, ...] = TOYS
    yaw: float = 50.0
    pitch: float = 17.0
    roll: float = 11.0
    scale: tuple[float, float] = (0.78, 1.0)
    shift: float = 0.12
    saturation: tuple[float, float] = (0.25, 0.75)
    background_contrast: float = 0.12
    background_saturation: float = 0.18
    busy: bool = False
    labs: tuple[int, ...] = ()


VARIANTS = {
    "toybox": Variant(),
    "toybox-labs": Variant(labs=tuple(range(6))),
    "toybox-new": Variant(toys=HELD_OUT),
    "toybox-hard": Variant(
        yaw=180.0,
        pitch=30.0,
        roll=30.0,
        scale=(0.4, 0.8),
        shift=0.4,
        saturation=(0.1, 1.0),
        background_contrast=0.5,
        background_saturation=0.6,
        busy=True,
    ),
}

FACTORS = {
    "yaw": "rotation about the vertical axis, degrees",
    "pitch": "rotation about the horizontal axis, degrees",
    "roll": "rotation about the line of sight, degrees",
    "scale": "size of the toy, 1 = fills the frame",
    "x": "horizontal position, half frames",
    "y": "vertical position, half frames",
    "hue": "hue of the toy, a circle from 0 to 1",
    "saturation": "saturation of the toy, 0 to 1",
    "pattern": "index into PATTERNS",
    "light_azimuth": "direction of the light, degrees, 0 = from the camera",
    "light_elevation": "height of the light, degrees",
    "camera_elevation": "height of the camera, degrees",
    "background_hue": "hue of the background, a circle from 0 to 1",
    "background_brightness": "brightness of the background, 0 to 1",
    "background_angle": "direction of the background's gradient, degrees",
}
LAB = {"lab": "number of the lab that took the picture, in sets of several labs"}


def _generator(seed: int, split: str, index: int) -> np.random.Generator:
    # One stream an image: the index sits in the counter's highest word, far from the draws.
    key = np.array([seed, SPLITS[split]], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _draw_factors(rng: np.random.Generator, variant: Variant) -> dict[str, float]:
    # The order of the draws is part of the data set: append, never reorder.
    u = rng.random(len(FACTORS))
    signed = 2 * u - 1
    span = lambda pair, k: pair[0] + (pair[1] - pair[0]) * u[k]  # noqa: E731
    return {
        "yaw": variant.yaw * signed[0],
        "pitch": variant.pitch * signed[1],
        "roll": variant.roll * signed[2],
        "scale": span(variant.scale, 3),
        "x": variant.shift * signed[4],
        "y": variant.shift * signed[5],
        "hue": u[6],
        "saturation": span(variant.saturation, 7),
        "pattern": int(u[8] * len(PATTERNS)),
        "light_azimuth": 60.0 * signed[9],
        "light_elevation": 20.0 + 50.0 * u[10],
        "camera_elevation": 5.0 + 25.0 * u[11],
        "background_hue": u[12],
        "background_brightness": 0.35 + 0.5 * u[13],
        "background_angle": 360.0 * u[14],
    }


# ---------------------------------------------------------------- rendering


def _axis_angle(axis: int, degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


CAMERA_DISTANCE = 4.0
FRAME = 1.25  # half the frame's width at the toy's distance
BOUND = 1.25  # radius of a ball that holds every toy, with room for soft edges


def _pose(f: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """World-to-toy rotation [3, 3] and the camera's position in toy coordinates [3]."""
    to_world = (
        _axis_angle(0, f["camera_elevation"])
        @ _axis_angle(2, f["roll"])
        @ _axis_angle(0, f["pitch"])
        @ _axis_angle(1, f["yaw"])
    )
    camera = np.array([-f["x"] * FRAME, -f["y"] * FRAME, CAMERA_DISTANCE])
    return to_world.T, to_world.T @ camera / f["scale"]


def _light(f: dict[str, float]) -> np.ndarray:
    a, e = math.radians(f["light_azimuth"]), math.radians(f["light_elevation"])
    return np.array([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])


def _march(shape, o: list[Tensor], d: list[Tensor], pixel: Tensor, steps: int = 26):
    """Sphere tracing (Hart 1996) from o along unit d, both three tensors [N, R] in toy space.

    Args:
        pixel: width of a pixel at the toy's distance, in toy units, [N, 1].

    Returns:
        Distance along the ray [N, R] and the pixel's coverage [N, R]: 1 on a hit, falling to 0
        over one pixel outside of the silhouette, which is what makes the edges soft.
    """
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    inside = b * b - (o[0] * o[0] + o[1] * o[1] + o[2] * o[2]) + BOUND * BOUND
    half = inside.clamp(min=0).sqrt()
    t, end = -b - half, -b + half  # a ray that misses the ball starts at its closest point
    nearest = torch.full_like(t, 9.0)
    for _ in range(steps):
        distance = shape(o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2])
        nearest = torch.minimum(nearest, distance)
        t = torch.minimum(t + distance, end)
    coverage = (1.0 - (nearest - 0.004) / pixel).clamp(0, 1)
    return t, torch.where(inside > 0, coverage, torch.zeros(()))


def _normal(shape, p: list[Tensor], eps: float = 0.01) -> list[Tensor]:
    """Outward unit normal from four evaluations at a tetrahedron's corners (Quilez)."""
    total = [torch.zeros_like(p[0]) for _ in range(3)]
    for sx, sy, sz in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        value = shape(p[0] + sx * eps, p[1] + sy * eps, p[2] + sz * eps)
        total = [n + s * value for n, s in zip(total, (sx, sy, sz), strict=True)]
    length = _norm(*total).clamp(min=1e-6)
    return [n / length for n in total]


def _wave(v: Tensor) -> Tensor:
    """Square wave of period 1: 0 or 1."""
    return ((v - v.floor()) * 2).floor().clamp(0, 1)


def _surface(p: list[Tensor], pattern: Tensor) -> Tensor:
    """Brightness of the surface pattern at points p, [N, R]; pattern is [N, 1]."""
    stripes = _wave(p[0] * 2.5)
    bands = _wave(p[1] * 2.5)
    checks = (stripes - bands).abs()
    dark = torch.where(pattern == 1, stripes, torch.zeros(()))
    dark = torch.where(pattern == 2, checks, dark)
    dark = torch.where(pattern == 3, bands, dark)
    return 1.0 - 0.3 * dark


def _render_group(
    toy: str, factors: list[dict[str, float]], size: int, variant: Variant, device: torch.device
) -> tuple[Tensor, Tensor]:
    """All images of one toy: colours float32 [N, 3, R] in 0..1 without noise, coverage [N, R]."""
    shape = _SHAPES[toy]
    poses = [_pose(f) for f in factors]

    def column(values) -> list[Tensor]:  # [N, K] numbers -> K tensors of [N, 1]
        table = torch.tensor(np.asarray(values, dtype=np.float32), device=device)
        return list(table[:, :, None].unbind(1))

    # Rays through the pixels' centres: (u, v) in -1..1, v up.
    grid = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    u_R, v_R = grid.repeat(size), (-grid).repeat_interleave(size)
    slope = FRAME / CAMERA_DISTANCE
    length_R = _norm(u_R * slope, v_R * slope, torch.ones_like(u_R))
    ray = [u_R * slope / length_R, v_R * slope / length_R, -1.0 / length_R]
    rot = column([rotation.reshape(9) for rotation, _ in poses])
    o = column([camera for _, camera in poses])
    d = [rot[3 * k] * ray[0] + rot[3 * k + 1] * ray[1] + rot[3 * k + 2] * ray[2] for k in range(3)]
    scale, pattern = column([(f["scale"], f["pattern"]) for f in factors])
    angles = [math.radians(f["background_angle"]) for f in factors]
    angle_c, angle_s = column([(math.cos(angle), math.sin(angle)) for angle in angles])

    t, coverage = _march(shape, o, d, pixel=(2 * FRAME / size) / scale)
    p = [o[k] + t * d[k] for k in range(3)]
    normal = _normal(shape, p)
    light = column([rotation @ _light(f) for f, (rotation, _) in zip(factors, poses, strict=True)])
    lambert = (normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]).clamp(min=0)
    half = [light[k] - d[k] for k in range(3)]  # Blinn: halfway between light and camera
    half_length = _norm(*half).clamp(min=1e-6)
    shine = (sum(normal[k] * half[k] for k in range(3)) / half_length).clamp(min=0)
    for _ in range(5):  # shine ** 32, by squaring: pow is not rounded the same everywhere
        shine = shine * shine
    brightness = (0.35 + 0.65 * lambert) * _surface(p, pattern)

    ramp = u_R * angle_c + v_R * angle_s  # [N, R]
    if variant.busy:
        ramp = 2 * (_wave(ramp * 2) - _wave((u_R * angle_s - v_R * angle_c) * 2)).abs() - 1
    hsv = colorsys.hsv_to_rgb
    toy_rgb = column([hsv(f["hue"], f["saturation"], 0.9) for f in factors])
    backs = [(f["background_hue"], f["background_brightness"]) for f in factors]
    back_rgb = column([hsv(hue, variant.background_saturation, value) for hue, value in backs])
    colours = []
    for k in range(3):
        back = back_rgb[k] * (1.0 + variant.background_contrast * ramp)
        front = toy_rgb[k] * brightness + 0.3 * shine
        colours.append(back + coverage * (front - back))
    return torch.stack(colours, dim=1), coverage


def render(
    indices: int | Sequence[int],
    *,
    split: str = "train",
    size: int = 32,
    seed: int = 0,
    variant: str | Variant = "toybox",
    labs: Sequence[int] | None = None,
    noise: float = 0.01,
    chunk: int = 512,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> ImageSet:
    """Renders images of a split by index.

    Args:
        indices: which images; an int n means 0 to n-1. Any order, repetition allowed.
        split: "train", "val" or "test"; splits never share an image.
        size: height and width in pixels; the same index shows the same scene at every size.
        seed: another seed is another image set.
        variant: a name of :data:`VARIANTS` or a :class:`Variant`.
        labs: numbers of the labs that take the pictures in turn, so that each takes as many of
            every toy; by default the variant's (see :mod:`refiner.images.labs`). A scene is the
            same in each lab, but for its light and its background.
        noise: standard deviation of the sensor noise, in units of full brightness; labs have
            their own.
        chunk: images rendered at once; changes memory and speed, never a pixel.
        device: where to render; images come back on it.
        progress: show a bar.

    Returns:
        An :class:`ImageSet` with factors and masks. Labels are balanced: image i shows toy
        ``i mod len(classes)``. With labs, the factor "lab" says which one took it.

    Raises:
        ValueError: for an unknown split, variant or lab.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if isinstance(variant, str):
        if variant not in VARIANTS:
            raise UserError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
        variant = VARIANTS[variant]
    indices = list(range(indices)) if isinstance(indices, int) else [int(i) for i in indices]
    device = torch.device(device)
    n, classes = len(indices), variant.toys
    labs = variant.labs if labs is None else tuple(map(int, labs))
    lab_of = [labs[i // len(classes) % len(labs)] if labs else 0 for i in indices]
    images = torch.empty(n, 3, size, size, dtype=torch.uint8, device=device)
    masks = torch.empty(n, size, size, device=device)
    labels = torch.tensor([i % len(classes) for i in indices], dtype=torch.int64)
    factors = {name: np.empty(n) for name in FACTORS | (LAB if labs else {})}
    # Neighbors in a chunk share a toy and a lab: each function runs once over many rays.
    kind = lambda j: (indices[j] % len(classes), lab_of[j])  # noqa: E731
    bar = tqdm(total=n, desc="rendering Toybox", unit="image", disable=not progress)
    for (toy, number), group in groupby(sorted(range(n), key=kind), key=kind):
        group = list(group)
        for where in (group[i : i + chunk] for i in range(0, len(group), chunk)):
            rngs = [_generator(seed, split, indices[j]) for j in where]
            here = lab(number) if labs else None
            pixels, coverage, drawn = _pictures(
                classes[toy], rngs, size, variant, here, noise, device
            )
            at = torch.tensor(where, device=device)
            images[at] = pixels
            masks[at] = coverage
            for name, values in factors.items():
                values[where] = number if name == "lab" else [f[name] for f in drawn]
            bar.update(len(where))
    bar.close()
    return ImageSet(images, labels, classes, factors, f"toybox {split}", masks)


def _pictures(toy: str, rngs, size: int, variant: Variant, here: Lab | None, noise: float, device):
    """Pictures of one toy in one lab, uint8 [N, 3, S, S], coverage [N, S, S], and their factors."""
    drawn = [_draw_factors(rng, variant) for rng in rngs]
    if here is not None:
        drawn, noise = [staged(factors, here) for factors in drawn], here.noise
    colours, coverage = _render_group(toy, drawn, size, variant, device)
    if here is not None:
        colours = photographed(colours, here, size)
    grain = np.stack([rng.standard_normal((3, size * size), np.float32) for rng in rngs])
    colours = colours + noise * torch.from_numpy(grain).to(device)
    pixels = (colours * 255.0 + 0.5).clamp(0, 255).to(torch.uint8)
    return pixels.unflatten(2, (size, size)), coverage.unflatten(1, (size, size)), drawn
