"""One generated street: its plan, light and camera, and where things stand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.scenes.annotation import misannotate
from rdd_pipeline.scenes.canvas import (
    RGB,
    SUPERSAMPLING,
    Camera,
    Canvas,
    Light,
    Paint,
    smooth_noise,
)
from rdd_pipeline.scenes.objects import (
    GROUND,
    LEAVES,
    WALLS,
    Random,
    Raw,
    bicyclist,
    building,
    car,
    chance,
    clutter,
    fence,
    foliage,
    gray,
    pedestrian,
    pick,
    pole,
    shade,
    sign,
    tree,
    uniform,
    vary,
)

SPLITS = ("train", "val", "test")


class Scene(NamedTuple):
    """An image, uint8 (H, W, 3), and its mask of raw CamVid values, uint8 (H, W)."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


class _Street(NamedTuple):
    """The plan of one street, in meters."""

    road_left: float
    road_right: float
    pavement: float
    setback: float
    built: float
    """Probability that a stretch of the street has a house."""
    green: float
    """How many trees and hedges, 0..1."""
    traffic: float
    crossing: float
    """Distance of a side street; 0: none."""


def render_scene(
    seed: int, split: str, number: int, height: int, width: int, label_noise: float = 0.0
) -> Scene:
    """Scene `number` of a split.

    Args:
        seed: Decides every scene.
        split: One of `SPLITS`.
        number: Counted from 0.
        height: Pixels.
        width: Pixels.
        label_noise: Share of the pixels whose label is wrong, see `scene_annotation`.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), number))
    camera = _draw_camera(rng, height * SUPERSAMPLING, width * SUPERSAMPLING)
    light, sky, sunny = _draw_light(rng, height)
    street = _draw_street(rng)
    sun_side = 1 if chance(rng, 0.5) else -1
    canvas = Canvas(height, width, camera)
    _paint_sky(canvas, rng, sky)
    _paint_ground(canvas, rng, street)
    _paint_backdrop(canvas, rng, street)
    _paint_sides(canvas, rng, street, sun_side, sunny)
    _paint_things(canvas, rng, street)
    image, labels, objects = canvas.finish(rng, light, ground_labels=GROUND)
    if label_noise > 0:
        # Numbers of its own: the image, and which borders are left open, stay as they are.
        hasty = np.random.default_rng((seed, SPLITS.index(split), number, 1))
        labels = misannotate(hasty, labels, objects, label_noise)
    return Scene(image, _with_void(rng, labels, objects))


def _draw_camera(rng: Random, height: int, width: int) -> Camera:
    return Camera(
        focal=width * uniform(rng, 0.75, 1.15),
        vanishing_x=width * uniform(rng, 0.32, 0.68),
        horizon=height * uniform(rng, 0.42, 0.58),
        height=uniform(rng, 1.25, 2.0),
        curve=float(rng.normal(0, 0.0012)) if chance(rng, 0.6) else 0.0,
        roll=float(rng.normal(0, 0.012)),
    )


def _draw_light(rng: Random, height: int) -> tuple[Light, tuple[RGB, RGB], bool]:
    """The light, the sky's colors at the top and at the horizon, and whether the sun shines."""
    sunny, dusk = chance(rng, 0.5), chance(rng, 0.12)
    level = uniform(rng, 0.85, 1.3) * (0.5 if dusk else 1.0)
    warm = uniform(rng, -0.08, 0.1) + (0.06 if dusk else 0.0)
    tint: RGB = (level * (1 + warm), level, level * (1 - warm))
    if sunny:
        top, low = vary(rng, (0.35, 0.52, 0.80), 0.25), vary(rng, (0.75, 0.82, 0.90), 0.15)
    else:
        value = uniform(rng, 0.6, 1.0)
        top, low = gray(value, uniform(rng, -0.06, 0.03)), gray(value * uniform(rng, 0.85, 1.15))
    haze = shade(low, min(level, 1.0) * 0.9)
    light = Light(
        tint=tint,
        haze_color=haze,
        haze_distance=uniform(rng, 120, 600),
        shadow=uniform(rng, 0.35, 0.6) if sunny else uniform(rng, 0.7, 0.9),
        shadow_blur=height / (200 if sunny else 40),
        contrast=uniform(rng, 0.8, 1.2),
        noise=uniform(rng, 1, 4.5) * (1.4 if dusk else 1.0),
        blur=uniform(rng, 0.0, 0.7) * (height / 96) ** 0.5,
        vignette=uniform(rng, 0.0, 0.35),
    )
    return light, (top, low), sunny


def _draw_street(rng: Random) -> _Street:
    kind = rng.random()
    built, green, setback = uniform(rng, 0.75, 1.0), uniform(rng, 0.1, 0.5), uniform(rng, 0, 2.0)
    if kind < 0.3:  # Suburb: gardens in front of the houses.
        built, green = uniform(rng, 0.5, 0.85), uniform(rng, 0.4, 0.9)
        setback = uniform(rng, 3, 8)
    elif kind < 0.45:  # Open: few houses, many trees.
        built, green, setback = uniform(rng, 0.1, 0.4), uniform(rng, 0.5, 1.0), uniform(rng, 2, 10)
    return _Street(
        road_left=uniform(rng, 2.4, 6.5),
        road_right=uniform(rng, 2.4, 5.0),
        pavement=uniform(rng, 2.0, 5.5),
        setback=setback,
        built=built,
        green=green,
        traffic=uniform(rng, 0.1, 1.0),
        crossing=uniform(rng, 12, 45) if chance(rng, 0.35) else 0.0,
    )


def _paint_sky(canvas: Canvas, rng: Random, colors: tuple[RGB, RGB]) -> None:
    """A gradient in bands, clouds over it."""
    canvas.new_object()
    top, low = colors
    bands = 12
    bottom = canvas.camera.horizon + canvas.height * 0.12
    for band in range(bands):
        part = band / (bands - 1)
        color: RGB = tuple(t + (b - t) * part for t, b in zip(top, low, strict=True))  # type: ignore[assignment]
        number = canvas.paint(Paint(color, Raw.SKY, 0.01, 0.006, 0.03))
        row = bottom * band / bands
        canvas.polygon([(0, row), (canvas.width, row), (canvas.width, bottom), (0, bottom)], number)
    if not chance(rng, 0.6):
        return
    white = canvas.paint(Paint(gray(uniform(rng, 0.8, 1.1)), Raw.SKY, 0.01, 0.01, 0.06))
    dull = canvas.paint(Paint(gray(uniform(rng, 0.55, 0.9)), Raw.SKY, 0.01, 0.01, 0.06))
    noise = smooth_noise(rng, 24, 32, 6)
    for _ in range(int(rng.random() * 6) + 1):
        x, y = rng.random() * canvas.width, rng.random() * bottom * 0.8
        size = uniform(rng, 0.03, 0.12) * canvas.width
        for blob in range(10):
            shift = float(noise[blob, blob]), float(noise[blob + 10, blob])
            center = (x + shift[0] * size * 1.5, y + shift[1] * size * 0.3)
            canvas.ellipse(
                center, size * uniform(rng, 0.3, 1), size * uniform(rng, 0.12, 0.3),
                white if chance(rng, 0.6) else dull,
            )  # fmt: skip


_FAR = 220.0
_STEPS = tuple(float(z) for z in np.geomspace(1.6, _FAR, 26))


def _strip(canvas: Canvas, left: float, right: float, number: int, near: float = 1.6,
           far: float = _FAR) -> None:  # fmt: skip
    """Ground between X = left and X = right, following the road's bend."""
    steps = [near, *(z for z in _STEPS if near < z < far), far]
    points = [(left, z) for z in steps] + [(right, z) for z in reversed(steps)]
    canvas.ground(points, number)


def _paint_ground(canvas: Canvas, rng: Random, street: _Street) -> None:
    """Road, lane markings, pavements and what lies beyond."""
    canvas.new_object()
    asphalt = gray(uniform(rng, 0.2, 0.42), uniform(rng, -0.05, 0.08))
    stone = vary(rng, asphalt, 0.5) if chance(rng, 0.55) else gray(uniform(rng, 0.3, 0.6), 0.05)
    texture = uniform(rng, 0.03, 0.12)
    road = canvas.paint(Paint(asphalt, Raw.ROAD, 0, texture, uniform(rng, 0.02, 0.09)))
    pavement = canvas.paint(Paint(stone, Raw.PAVEMENT, 0, texture, uniform(rng, 0.02, 0.09)))
    grass = vary(rng, pick(rng, LEAVES[:4]), 0.3)
    # Beyond the pavements: lawn where the houses stand back, else paved.
    lawn = street.setback > 2 and chance(rng, 0.7)
    beyond = canvas.paint(Paint(grass, Raw.TREE, 0, 0.2, 0.15)) if lawn else pavement
    _strip(canvas, -400, 400, beyond)
    edges = (-street.road_left, street.road_right)
    _strip(canvas, edges[0] - street.pavement, edges[1] + street.pavement, pavement)
    if lawn and chance(rng, 0.3):  # A lawn between road and pavement.
        _strip(canvas, edges[0] - street.pavement * 0.4, edges[1] + street.pavement * 0.4, beyond)
    if chance(rng, 0.5):  # Slabs.
        joint = canvas.paint(Paint(shade(stone, 0.8), Raw.PAVEMENT, 0, texture, 0.05))
        step = uniform(rng, 0.6, 1.5)
        z = 2.0
        while z < 16:
            for left, right in (
                (edges[0] - street.pavement, edges[0]), (edges[1], edges[1] + street.pavement)
            ):  # fmt: skip
                canvas.line([canvas.camera.project(left, 0, z), canvas.camera.project(right, 0, z)],
                            1, joint)  # fmt: skip
            z += step
    canvas.new_object()
    _strip(canvas, edges[0], edges[1], road)
    if street.crossing:
        _strip(canvas, -300, 300, road, street.crossing, street.crossing + 7)
    for _ in range(int(rng.random() * 4)):  # Patches and stains.
        patch = canvas.paint(Paint(vary(rng, asphalt, 0.3), Raw.ROAD, 0, texture, 0.1))
        x, z = uniform(rng, *edges), uniform(rng, 4, 30)
        long, wide = uniform(rng, 1, 6), uniform(rng, 0.4, 1.5)
        canvas.ground([(x, z), (x + wide, z), (x + wide, z + long), (x, z + long)], patch)
    _paint_markings(canvas, rng, street)
    curb = canvas.paint(Paint(vary(rng, gray(0.5), 0.3), Raw.PAVEMENT, 0, 0.05))
    for edge, out in ((edges[0], -1), (edges[1], 1)):
        if chance(rng, 0.7):
            _strip(canvas, edge, edge + out * 0.18, curb, far=street.crossing or _FAR)


def _paint_markings(canvas: Canvas, rng: Random, street: _Street) -> None:
    white = canvas.paint(Paint(gray(uniform(rng, 0.55, 0.85)), Raw.ROAD, 0, 0.12, 0.1))
    if chance(rng, 0.75):
        x, dash, gap = uniform(rng, -1.5, 0.5), uniform(rng, 1.5, 4), uniform(rng, 1.5, 5)
        z = uniform(rng, 1.6, 4)
        while z < 70:
            canvas.ground([(x, z), (x + 0.14, z), (x + 0.14, z + dash), (x, z + dash)], white)
            z += dash + gap
    for edge, inwards in ((-street.road_left, 1), (street.road_right, -1)):
        if chance(rng, 0.4):
            color = white
            if chance(rng, 0.3):
                color = canvas.paint(Paint((0.7, 0.6, 0.2), Raw.ROAD, 0, 0.1, 0.1))
            _strip(canvas, edge + inwards * 0.3, edge + inwards * 0.42, color)
    if chance(rng, 0.2):  # Zebra crossing.
        z, x = uniform(rng, 6, 18), -street.road_left + 0.4
        while x < street.road_right - 0.6:
            canvas.ground([(x, z), (x + 0.5, z), (x + 0.5, z + 2.5), (x, z + 2.5)], white)
            x += 1.0


def _paint_backdrop(canvas: Canvas, rng: Random, street: _Street) -> None:
    """What closes the view at the horizon: houses and trees."""
    x = -150.0
    while x < 150:
        canvas.new_object()
        width = uniform(rng, 8, 30)
        z = uniform(rng, 110, 200)
        if chance(rng, 0.35 + 0.5 * street.green):
            foliage(canvas, rng, (x + width / 2, uniform(rng, 2, 6), z), (width * 0.7, 7),
                    vary(rng, pick(rng, LEAVES), 0.3), density=1.4)  # fmt: skip
        else:
            color = vary(rng, pick(rng, WALLS), 0.3)
            number = canvas.paint(Paint(color, Raw.BUILDING, z, 0.1, 0.1))
            up = uniform(rng, 5, 16)
            project = canvas.camera.project
            canvas.polygon([project(x, -1, z), project(x + width, -1, z),
                            project(x + width, up, z), project(x, up, z)], number)  # fmt: skip
        x += width * uniform(rng, 0.6, 1.1)


def _paint_sides(canvas: Canvas, rng: Random, street: _Street, sun_side: int, sunny: bool) -> None:
    """Houses, gaps with trees, hedges and fences along both sides, far to near."""
    leaves = pick(rng, LEAVES)
    for side, road in ((-1, street.road_left), (1, street.road_right)):
        stretches: list[tuple[float, float]] = []
        z = uniform(rng, -6, 3)
        while z < 110:
            long = uniform(rng, 6, 22)
            if street.crossing and z < street.crossing + 8 and z + long > street.crossing - 1:
                if street.crossing - 1 - z > 4:
                    stretches.append((z, street.crossing - 1))
                z = street.crossing + 8
                continue
            stretches.append((z, z + long))
            z += long + (uniform(rng, 0, 5) if chance(rng, 0.3) else 0.0)
        line = road + street.pavement + street.setback
        height = uniform(rng, 4, 14)
        for near, far in reversed(stretches):
            near = max(near, 1.7)
            if far - near < 1.5:
                continue
            front = line + uniform(rng, 0, 1.5)
            if chance(rng, street.built):
                if chance(rng, 0.5):
                    height = uniform(rng, 4, 17)
                building(canvas, rng, side, front, near, far, height, sun_side)
                if sunny and side == sun_side:
                    reach = front - height * uniform(rng, 0.5, 1.2)
                    canvas.shadow([(side * front, near), (side * front, far),
                                   (side * reach, far), (side * reach, near)])  # fmt: skip
            elif chance(rng, street.green):
                canvas.new_object()
                for _ in range(3):
                    foliage(canvas, rng, (side * (front + uniform(rng, 0, 5)), uniform(rng, 1, 5),
                            uniform(rng, near, far)), (uniform(rng, 2, 4), uniform(rng, 2, 4)),
                            vary(rng, leaves, 0.3))  # fmt: skip
        _paint_borders(canvas, rng, street, side, road, leaves, stretches)


def _paint_borders(
    canvas: Canvas,
    rng: Random,
    street: _Street,
    side: int,
    road: float,
    leaves: RGB,
    stretches: list[tuple[float, float]],
) -> None:
    """Fences and hedges between pavement and garden."""
    if street.setback < 0.8:
        return
    edge = side * (road + street.pavement)
    for near, far in reversed(stretches):
        near = max(near, 1.8)
        if far - near < 2:
            continue
        kind = rng.random()
        if kind < 0.6:
            fence(canvas, rng, edge, near, far)
        elif kind < 0.6 + 0.3 * street.green:
            canvas.new_object()
            z = far
            while z > near:
                foliage(canvas, rng, (edge, 0.6, z), (0.9, 0.9), vary(rng, leaves, 0.25),
                        density=0.5)  # fmt: skip
                z -= 1.0 if z < 15 else 3.0


def _paint_things(canvas: Canvas, rng: Random, street: _Street) -> None:
    """Everything that stands or moves in front of the houses, far to near."""
    leaves = vary(rng, pick(rng, LEAVES), 0.2)
    for z, kind, x, side in sorted(_place_things(rng, street), reverse=True):
        if kind == "tree":
            tree(canvas, rng, x, z, vary(rng, leaves, 0.25))
        elif kind == "pole":
            pole(canvas, rng, x, z, side)
        elif kind == "sign":
            sign(canvas, rng, x, z)
        elif kind == "clutter":
            clutter(canvas, rng, x, z)
        elif kind == "pedestrian":
            pedestrian(canvas, rng, x, z)
        elif kind == "bicyclist":
            bicyclist(canvas, rng, x, z)
        elif kind == "crossing":
            car(canvas, rng, x, z, side_view=True, back=False)
        else:
            back = side > 0 if kind == "driving" else chance(rng, 0.6)
            car(canvas, rng, x, z, side_view=False, back=back)


def _place_things(rng: Random, street: _Street) -> list[tuple[float, str, float, int]]:
    """Distance, kind, place across the street and side of each thing."""
    things: list[tuple[float, str, float, int]] = []
    left, right = -street.road_left, street.road_right

    def distance(low: float = 4.0, high: float = 60.0) -> float:
        """Near things are as frequent as far ones in the image, not on the ground."""
        return float(low * (high / low) ** rng.random())

    def beside() -> tuple[float, int]:
        """A place on one of the pavements, and its side."""
        side = 1 if chance(rng, 0.5) else -1
        road = right if side > 0 else -left
        return side * (road + uniform(rng, 0.2, street.pavement)), side

    def curbside() -> tuple[float, int]:
        side = 1 if chance(rng, 0.5) else -1
        return side * ((right if side > 0 else -left) + 0.4), side

    for _ in range(rng.poisson(0.6 + 3.5 * street.green)):
        things.append((distance(5), "tree", *(curbside() if chance(rng, 0.5) else beside())))
    for _ in range(rng.poisson(3.0)):
        things.append((distance(4, 30), "pole", *curbside()))
    for _ in range(rng.poisson(2.6)):
        things.append((distance(4, 20), "sign", *curbside()))
    for _ in range(rng.poisson(1.0)):
        things.append((distance(4, 30), "clutter", *beside()))
    for _ in range(rng.poisson(3.6)):
        x, side = beside()
        z = distance(3.2, 20)
        for member in range(1 + (rng.random() < 0.35)):
            things.append((z + 0.3 * member, "pedestrian", x + 0.6 * member, side))
    if chance(rng, 0.25):
        things.append((distance(5, 15), "pedestrian", uniform(rng, left, right), 1))
    for _ in range(rng.poisson(1.5)):
        x, side = (uniform(rng, left, right), 1) if chance(rng, 0.6) else beside()
        things.append((distance(3.2, 18), "bicyclist", x, side))
    for side, road in ((-1, -left), (1, right)):  # Parked cars in a row.
        if road > 3.6 and chance(rng, 0.5 * street.traffic + 0.15):
            z = uniform(rng, 3.5, 14)
            for _ in range(int(rng.random() * 5) + 1):
                things.append((z, "parked", side * (road - 1.05), side))
                z += uniform(rng, 5.2, 8)
    for _ in range(rng.poisson(1.6 * street.traffic)):
        side = 1 if chance(rng, 0.5) else -1
        lane = (right if side > 0 else -left) * uniform(rng, 0.25, 0.6)
        things.append((distance(6, 50), "driving", side * lane, side))
    if street.crossing and chance(rng, 0.6):
        z = street.crossing + uniform(rng, 1.5, 5)
        things.append((z, "crossing", uniform(rng, left - 8, right + 8), 1))
    return things


def _with_void(
    rng: Random, labels: NDArray[np.int64], objects: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Leave the borders of about a third of the objects unlabeled, as annotators do."""
    drawn_wide = rng.random(int(objects.max()) + 1) < 0.33
    # A border belongs to the nearer object, which was painted later, and is taken from the farther
    # one: else thin objects would vanish.
    border = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        this, other = _shifted(axis)
        nearer = np.maximum(objects[this], objects[other])
        edge = (labels[this] != labels[other]) & drawn_wide[nearer]
        border[this] |= edge & (objects[this] < objects[other])
        border[other] |= edge & (objects[this] > objects[other])
    for _ in range(round(labels.shape[0] / 250)):
        for axis in (0, 1):
            this, other = _shifted(axis)
            border[this] |= border[other]
    return np.where(border, int(Raw.VOID), labels).astype(np.uint8)


def _shifted(axis: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Indices of all pixels but the last along an axis, and of their successors."""
    whole, first, second = slice(None), slice(None, -1), slice(1, None)
    if axis == 0:
        return (first, whole), (second, whole)
    return (whole, first), (whole, second)
