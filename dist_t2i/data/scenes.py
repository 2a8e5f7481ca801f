"""Scenes of one or two flat shapes on a background, which the project renders, so that all facts about them are known.

A caption states the number of objects, their colors and shapes, and the position of the first object relative to the
second. Position, size, rotation, background and light are in no caption, so that pictures of one caption vary.

**Held-out combinations.** A hash selects one pair of a color and a shape ("red star") for each color and shape, and
some combinations of two pairs and a relation ("red star left of blue ring"). A scene with a selected pair or
combination belongs to the split `test-combinations`, any other scene to `train`. So training contains every color,
shape and relation, but no held-out combination. The split depends only on the scene.

Scenes are the same on every machine, because `sample_scene` uses only integers and Python's `math`, and rounds numbers.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from dist_t2i.utils.seeds import Purpose, mix, unit_hash

VERSION = 3
"""The version of the scenes. A change of the scene or pixels for any seed and index needs a new version."""
COLORS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.97, 0.88, 0.10),
    "green": (0.13, 0.62, 0.18),
    "cyan": (0.10, 0.80, 0.84),
    "blue": (0.12, 0.26, 0.88),
    "purple": (0.52, 0.16, 0.76),
    "pink": (0.98, 0.45, 0.74),
}
"""The RGB of each color, in [0, 1]. The lightness of an object varies around its color."""
SYMMETRY = {
    "disc": 0.0,
    "ring": 0.0,
    "square": 90.0,
    "cross": 90.0,
    "star": 72.0,
    "triangle": 120.0,
    "heart": 360.0,
    "crescent": 360.0,
}
"""Shape -> the smallest rotation in degrees that leaves the shape unchanged. Angles of objects are below this value."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""Relation of the first object to the second -> relation of the second object to the first."""
BACKGROUNDS = ("plain", "gradient", "stripes", "checks")


def _held_out_pairs() -> frozenset[str]:
    """For each color, the shape with the smallest hash among the shapes that no earlier color has."""
    left = list(SYMMETRY)
    chosen = []
    for color in COLORS:
        shape = min(left, key=lambda shape: unit_hash(f"scenes {color} {shape}"))
        left.remove(shape)
        chosen.append(f"{color} {shape}")
    return frozenset(chosen)


HELD_OUT_PAIRS = _held_out_pairs()
"""8 of the 64 pairs of color and shape."""
RELATION_SHARE = 0.1
"""A combination is two pairs and a relation. This share of all combinations is held out."""
_MARGIN, _GAP = 0.02, 0.03
_SATURATION = 0.35

_Floats = NDArray[numpy.float64]
_Uniform = Callable[[float, float], float]
_Integer = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape. Lengths are in units of the picture's side; (0, 0) is the upper left corner."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    """Radius of the smallest circle around the center that contains the shape."""
    angle: float
    """Rotation in degrees, counterclockwise, in [0, SYMMETRY[shape])."""
    shade: float
    """Lightness relative to the color, in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class Background:
    """Two tones of one hue in a pattern."""

    kind: str
    hue: float
    """In [0, 1), as in HSL."""
    lightness: float
    """The mean lightness in [0, 1], as in HSL: dark or pastel."""
    angle: float
    """The direction in degrees in which the pattern varies."""
    period: float
    """The period of stripes and checks, in units of the side."""
    phase: float
    """The shift of stripes and checks, in periods."""


@dataclass(frozen=True, slots=True)
class Light:
    """The light that shades objects and casts shadows. `angle` is the direction of the lamp, in degrees
    counterclockwise from the right. `strength` is in [0, 1]."""

    angle: float
    strength: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two objects. `relation` is that of the first object to the second object; "" for one object."""

    objects: tuple[SceneObject, ...]
    relation: str
    background: Background
    light: Light


def sample_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the sequence `seed`."""
    uniform, integer = _samplers(seed, index)
    pairs = [(color, shape) for color in COLORS for shape in SYMMETRY]
    chosen = [pairs.pop(integer(len(pairs))) for _ in range(1 + integer(2))]
    relation = tuple(OPPOSITE)[integer(len(OPPOSITE))] if len(chosen) == 2 else ""
    return _scene_of(chosen, relation, uniform, integer)


def same_caption(about: Mapping[str, Any], seed: int, index: int) -> Scene:
    """A scene with the captions of a scene whose `attributes` are given. What captions leave open is sampled as in
    `sample_scene`."""
    pairs = [(item["color"], item["shape"]) for item in about["objects"]]
    return _scene_of(pairs, about["relation"], *_samplers(seed, index))


def _samplers(seed: int, index: int) -> tuple[_Uniform, _Integer]:
    """Functions that sample the next number of a scene: a rounded number in a range, or an integer below a bound."""
    numbers = (mix(seed, index, Purpose.SCENES, count) / 2**63 for count in itertools.count())

    def uniform(low: float, high: float) -> float:
        return round(low + (high - low) * next(numbers), 4)

    def integer(below: int) -> int:
        return min(int(next(numbers) * below), below - 1)

    return uniform, integer


def _scene_of(pairs: list[tuple[str, str]], relation: str, uniform: _Uniform, integer: _Integer) -> Scene:
    """A scene of one or two objects with these colors and shapes."""
    radii = [uniform(0.13, 0.30 if len(pairs) == 1 else 0.20) for _ in pairs]
    centers = _two_centers(radii, relation, uniform) if len(pairs) == 2 else [_center(radii[0], uniform)]
    objects = tuple(
        SceneObject(color, shape, *center, radius, uniform(0.0, SYMMETRY[shape]), uniform(-1.0, 1.0))
        for (color, shape), center, radius in zip(pairs, centers, radii, strict=True)
    )
    kind = BACKGROUNDS[integer(len(BACKGROUNDS))]
    lightness = uniform(0.16, 0.28) if integer(2) else uniform(0.72, 0.86)
    background = Background(
        kind, uniform(0.0, 1.0), lightness, uniform(0.0, 360.0), uniform(0.22, 0.36), uniform(0.0, 1.0)
    )
    return Scene(objects, relation, background, Light(uniform(0.0, 360.0), uniform(0.5, 1.0)))


def _center(radius: float, uniform: _Uniform) -> tuple[float, float]:
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    return uniform(low, high), uniform(low, high)


def _two_centers(radii: list[float], relation: str, uniform: _Uniform) -> list[tuple[float, float]]:
    """Centers of two objects whose circles do not touch. The distance of the centers along the direction of the
    relation is at least twice the distance across this direction."""
    first, second = (radius + _MARGIN for radius in radii)
    if relation in ("right of", "below"):  # swapped here, and swapped back at the end
        first, second = second, first
    along = uniform(sum(radii) + _GAP, 1 - first - second)
    start = uniform(first, 1 - second - along)
    across = uniform(first, 1 - first)
    other = uniform(max(second, across - along / 2), min(1 - second, across + along / 2))
    centers = [(start, across), (round(start + along, 4), other)]
    if relation in ("above", "below"):
        centers = [(y, x) for x, y in centers]
    return centers[::-1] if relation in ("right of", "below") else centers


def combination(scene: Scene) -> str:
    """The canonical name of a scene's content, such as "red star" or "red star left of blue ring". The relation in a
    name is always "left of" or "above"."""
    names = [f"{item.color} {item.shape}" for item in scene.objects]
    if scene.relation in ("right of", "below"):
        return f"{names[1]} {OPPOSITE[scene.relation]} {names[0]}"
    return f" {scene.relation} ".join(names)


def split_of(scene: Scene) -> str:
    """`test-combinations` if the scene contains a held-out combination, and `train` otherwise."""
    held_out = any(f"{item.color} {item.shape}" in HELD_OUT_PAIRS for item in scene.objects)
    if scene.relation:
        held_out = held_out or unit_hash(f"scenes {combination(scene)}") < RELATION_SHARE
    return "test-combinations" if held_out else "train"


def captions(scene: Scene) -> list[str]:
    """All captions of a scene, the plainest caption first."""
    first, *rest = (f"{item.color} {item.shape}" for item in scene.objects)
    if not rest:
        color, shape = first.split()
        return [
            _with_article(first),
            f"one {first}",
            f"a single {shape} that is {color}",
            f"there is {_with_article(first)}",
            f"a picture of {_with_article(first)}",
        ]
    one, two = _with_article(first), _with_article(rest[0])
    long = {"left of": "to the left of", "right of": "to the right of"}
    relation, turned = scene.relation, OPPOSITE[scene.relation]
    return [
        f"{one} {relation} {two}",
        f"{two} {long.get(turned, turned)} {one}",
        f"there is {one} {relation} {two}",
        f"two shapes: {two} {turned} {one}",
        f"{one} and {two}, the {scene.objects[0].shape} {long.get(relation, relation)} the {scene.objects[1].shape}"
        if scene.objects[0].shape != scene.objects[1].shape
        else f"{one} and {two}, the {scene.objects[0].color} one {long.get(relation, relation)} the other",
    ]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def attributes(scene: Scene) -> dict[str, Any]:
    """Everything about a scene as JSON values: the number of objects, and the fields of the dataclasses."""
    fields = asdict(scene)
    return {"number": len(scene.objects), **fields, "objects": list(fields["objects"])}


def render(scene: Scene, size: int) -> NDArray[numpy.uint8]:
    """The antialiased picture of a scene, uint8 [size, size, 3]. Takes about 1 ms at 64 pixels."""
    middles = (numpy.arange(size) + 0.5) / size
    x, y = numpy.meshgrid(middles, middles)
    picture = _background(scene.background, x, y, size)
    angle = math.radians(scene.light.angle)
    light_x, light_y, strength = math.cos(angle), -math.sin(angle), scene.light.strength
    for item in scene.objects:
        away_x, away_y = (-0.35 * item.radius * part for part in (light_x, light_y))
        window = _window(item.x + away_x, item.y + away_y, 1.3 * item.radius, size)
        distance = _distance(item, x[window] - away_x, y[window] - away_y)
        shadow = numpy.clip(0.5 - distance / (0.4 * item.radius), 0, 1)
        picture[window] *= 1 - 0.6 * strength * shadow[..., None]
    for item in scene.objects:
        window = _window(item.x, item.y, item.radius + 1 / size, size)
        toward = ((x[window] - item.x) * light_x + (y[window] - item.y) * light_y) / item.radius
        tone = (1 + 0.08 * item.shade + 0.28 * strength * toward)[..., None]
        color = numpy.array(COLORS[item.color])
        # A lighter tone mixes the color with white, and a darker tone mixes the color with black.
        shaded = numpy.where(tone > 1, color + (1 - color) * (tone - 1), color * tone)
        inside = numpy.clip(0.5 - _distance(item, x[window], y[window]) * size, 0, 1)[..., None]
        picture[window] += inside * (shaded - picture[window])
    return numpy.clip(numpy.rint(picture * 255), 0, 255).astype(numpy.uint8)


def _window(x: float, y: float, reach: float, size: int) -> tuple[slice, slice]:
    """The rows and columns of the pixels whose distance to a point may be less than `reach`."""
    rows, columns = (slice(max(0, int((z - reach) * size)), math.ceil((z + reach) * size)) for z in (y, x))
    return rows, columns


def _background(background: Background, x: _Floats, y: _Floats, size: int) -> _Floats:
    """[size, size, 3] in [0, 1]."""
    angle = math.radians(background.angle)
    across = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)

    def bands(position: _Floats) -> _Floats:
        phase = (position / background.period + background.phase) % 1
        return numpy.clip(0.5 + (abs(phase - 0.5) - 0.25) * background.period * size, 0, 1)

    if background.kind == "plain":
        share = numpy.full_like(x, 0.5)
    elif background.kind == "gradient":
        share = numpy.clip(0.5 + across, 0, 1)
    else:
        share = bands(across)
        if background.kind == "checks":
            other = bands((y - 0.5) * math.cos(angle) - (x - 0.5) * math.sin(angle))
            share = share + other - 2 * share * other
    spread = 0.13 if background.kind == "gradient" else 0.07
    dark, light = (
        numpy.array(colorsys.hls_to_rgb(background.hue, background.lightness + change, _SATURATION))
        for change in (-spread, spread)
    )
    return dark + share[..., None] * (light - dark)


def _distance(item: SceneObject, x: _Floats, y: _Floats) -> _Floats:
    """The signed distance, negative inside, of points to the edge of an object, in units of the side."""
    angle = math.radians(item.angle)
    right, up = (x - item.x) / item.radius, (item.y - y) / item.radius
    cos, sin = math.cos(angle), math.sin(angle)
    return item.radius * _SHAPES[item.shape](right * cos + up * sin, up * cos - right * sin)


def _length(x: _Floats, y: _Floats) -> _Floats:
    return numpy.sqrt(x * x + y * y)


_Shape = Callable[[_Floats, _Floats], _Floats]
"""The signed distance of points (right, up) to the edge of an upright shape in the unit circle."""


def _polygon(*corners: tuple[float, float]) -> _Shape:
    """Corners in counterclockwise order."""
    starts = numpy.array(corners)[:, :, None, None]
    edges = numpy.roll(starts, -1, axis=0) - starts
    squares = (edges**2).sum(axis=1)

    def distance(x: _Floats, y: _Floats) -> _Floats:
        to_x, to_y = x - starts[:, 0], y - starts[:, 1]
        share = numpy.clip((to_x * edges[:, 0] + to_y * edges[:, 1]) / squares, 0, 1)
        nearest = numpy.sqrt(((to_x - share * edges[:, 0]) ** 2 + (to_y - share * edges[:, 1]) ** 2).min(axis=0))
        # The winding number of a point: the upward minus the downward edges on the right of the point, at its height.
        to_left = edges[:, 0] * to_y - edges[:, 1] * to_x > 0
        upward = (to_y >= 0) & (to_y < edges[:, 1]) & to_left
        downward = (to_y < 0) & (to_y >= edges[:, 1]) & ~to_left
        inside = upward.sum(axis=0) != downward.sum(axis=0)
        return numpy.where(inside, -nearest, nearest)

    return distance


def _regular(corners: int, inner: float = 1.0) -> _Shape:
    """A regular polygon with a corner at the top. Every second corner has the distance `inner` to the center."""
    angles = [math.pi / 2 + 2 * math.pi * corner / corners for corner in range(corners)]
    radii = [inner if corner % 2 else 1.0 for corner in range(corners)]
    return _polygon(*((r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)))


def _heart(x: _Floats, y: _Floats) -> _Floats:
    """A square on its corner, and half discs on its upper sides."""
    half = 0.79  # half of the square's diagonal, for a heart inside the unit circle
    y = y + 0.207
    square = (abs(x) + abs(y) - half) / math.sqrt(2)
    disc = _length(abs(x) - half / 2, y - half / 2) - half / math.sqrt(2)
    return numpy.minimum(square, disc)


_WIDTH = 0.3
_ARM = math.sqrt(1 - _WIDTH**2)
_QUARTER = ((_ARM, -_WIDTH), (_ARM, _WIDTH), (_WIDTH, _WIDTH))
_SHAPES: dict[str, _Shape] = {
    "disc": lambda x, y: _length(x, y) - 1,
    "ring": lambda x, y: abs(_length(x, y) - 0.76) - 0.24,
    "square": _polygon(*((math.cos(a), math.sin(a)) for a in (math.pi / 4 + k * math.pi / 2 for k in range(4)))),
    "triangle": _regular(3),
    "star": _regular(10, inner=0.45),
    "cross": _polygon(
        *_QUARTER,
        *((-y, x) for x, y in _QUARTER),
        *((-x, -y) for x, y in _QUARTER),
        *((y, -x) for x, y in _QUARTER),
    ),
    "heart": _heart,
    "crescent": lambda x, y: numpy.maximum(_length(x, y) - 1, 0.95 - _length(x - 0.7, y)),
}
