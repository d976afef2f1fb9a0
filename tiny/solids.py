"""Posed pictures of simple solids, with ground truth: signed distance functions and sphere tracing.

    picture = render(["mug"], ["red"], lambda n: (origins, directions))     # [1, n, n, 3] each
    picture.rgb, picture.opacity, picture.depth

Training data for tiny/sd («a red mug, front view» with the picture it describes) and the ground
truth a NeRF is measured against: the picture, its mask, its depth and the surface are all known.

World: z is up, an object's front faces +x, and it fits the ball of radius 0.9 about the origin.
The rays come from whoever looks: nerf.py, or `around` in make.py for the training data.
Shading is diffuse and the lights stay with the object, so a surface point has one colour in all
views: what a NeRF without view dependence can fit exactly.

Distances: unions (min) and intersections (max) of exact primitives. The sign is right everywhere,
‖∇d‖ = 1 almost everywhere (≤ 1 where two parts are blended), and |d| never exceeds the true
distance, so a step of sphere tracing never passes through the surface.

Speed: 1000 pictures of 64×64 take about 20 s on one core. Where other programs hold the cores,
OMP_NUM_THREADS=1 keeps threads from waiting for each other.
"""
import math
import re
from functools import reduce
from typing import NamedTuple

import torch

COLORS = {
    "red": (0.88, 0.10, 0.10), "orange": (1.00, 0.50, 0.05), "yellow": (1.00, 0.86, 0.10),
    "green": (0.12, 0.65, 0.20), "blue": (0.12, 0.32, 0.90), "purple": (0.52, 0.18, 0.75),
    "pink": (1.00, 0.50, 0.72), "brown": (0.48, 0.27, 0.12), "gray": (0.55, 0.55, 0.56),
    "black": (0.15, 0.15, 0.16),
}
VIEWS = ("front", "side", "back", "overhead")
RADIUS = 0.9                     # every solid fits the ball of this radius about the origin

# Colours of parts: fixed, or (a string) derived from the colour word; see `part_color`.
BODY, SHADE, TINT, INK = "body", "shade", "tint", "ink"
WHITE, CREAM, TAN = (0.96, 0.96, 0.96), (0.97, 0.90, 0.74), (0.86, 0.63, 0.36)
WOOD, COFFEE, BRICK = (0.50, 0.31, 0.16), (0.25, 0.13, 0.06), (0.66, 0.30, 0.22)
DARK, METAL, GLASS = (0.16, 0.16, 0.18), (0.66, 0.68, 0.72), (0.62, 0.84, 0.96)
BEAK, LIGHT, CHERRY = (1.00, 0.55, 0.05), (1.00, 0.90, 0.40), (0.85, 0.08, 0.12)


# ---- signed distances. A point p is a triple (x, y, z) of tensors of one shape, and so is d. -----

def length(*v):
    """√(v₁² + v₂² + …), with gradient 0 at 0 in place of NaN."""
    return reduce(lambda s, c: torch.addcmul(s, c, c), v[1:], v[0] * v[0]).clamp_min(1e-24).sqrt()


def at(p, *origin):
    """The point p seen from `origin`."""
    return tuple(c - o if o else c for c, o in zip(p, origin))


def turned(p, degrees):
    """p in a frame whose z axis is turned by `degrees` from z towards +x."""
    x, y, z = p
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return c * x - s * z, y, s * x + c * z


def repeated(p, n):
    """p folded into one of n equal sectors about the z axis, the one around +x."""
    x, y, z = p
    sector = 2 * math.pi / n
    angle = torch.atan2(y, x)
    angle = angle - sector * torch.round(angle / sector)
    rho = length(x, y)
    return rho * angle.cos(), rho * angle.sin(), z


def corner(*q):
    """Distance to the region where all q ≤ 0, for axis-aligned (orthogonal) q."""
    return length(*(c.clamp_min(0) for c in q)) + reduce(torch.maximum, q).clamp_max(0)


def sphere(p, r):
    return length(*p) - r


def box(p, hx, hy, hz, r=0.0):
    """A box of half sides hx, hy, hz whose edges are rounded by r."""
    return corner(*(c.abs() - h + r for c, h in zip(p, (hx, hy, hz)))) - r


def drum(p, radius, half, r=0.0):
    """About the last axis of p."""
    return corner(length(p[0], p[1]) - radius + r, p[2].abs() - half + r) - r


def torus(p, major, minor):
    """About the last axis of p."""
    return length(length(p[0], p[1]) - major, p[2]) - minor


def capsule(p, a, b, ra, rb=None):
    """The hull of two balls, centres a and b, radii ra and rb.

    d = min over c in [0, l] of √(ρ² + (s − c)²) − (ra − k c), with k = (ra − rb)/l, and s, ρ the
    coordinates of p along and across the axis; the minimum is at c = s − ρ k/√(1 − k²).
    """
    rb = ra if rb is None else rb
    axis = [j - i for i, j in zip(a, b)]
    l = math.hypot(*axis)
    q, u = at(p, *a), [c / l for c in axis]
    s = sum(c * i for c, i in zip(q, u))
    rho = length(*(c - s * i for c, i in zip(q, u)))
    k = (ra - rb) / l
    c = (s - rho * (k / math.sqrt(1 - k * k))).clamp(0, l)
    return length(rho, s - c) - (ra - k * c)


def polygon(u, v, corners, closed=True):
    """Exact distance to a polygon in the plane; the sign is the parity of edges met along +u.

    closed=False leaves out the edge from the last corner to the first: the cut through a solid of
    revolution, from the axis u = 0 back to it.
    """
    nearest, inside = None, False
    for (au, av), (bu, bv) in zip(corners, corners[1:] + corners[:closed]):
        eu, ev = bu - au, bv - av
        pu, pv = u - au, v - av
        h = ((pu * eu + pv * ev) / (eu * eu + ev * ev)).clamp(0, 1)
        d2 = (pu - eu * h) ** 2 + (pv - ev * h) ** 2
        nearest = d2 if nearest is None else torch.minimum(nearest, d2)
        if ev:
            inside = inside ^ (((v < av) != (v < bv)) & (pu < pv * (eu / ev)))
    d = nearest.clamp_min(1e-24).sqrt()
    return torch.where(inside, -d, d)


def lathe(p, *corners):
    """The solid of revolution about z whose half section has these corners (ρ, z), axis to axis."""
    closed = corners[0][0] > 0
    return polygon(length(p[0], p[1]), p[2], list(corners), closed)


def prism(p, corners, half, r=0.0):
    """The polygon in the first two axes of p, thick 2·half along the third, grown by r."""
    return corner(polygon(p[0], p[1], corners), p[2].abs() - half) - r


def blend(a, b, k):
    """Union with a fillet of size k: a polynomial smooth minimum, ≤ min(a, b), ‖∇‖ ≤ 1."""
    return torch.minimum(a, b) - (k - (a - b).abs()).clamp_min(0) ** 2 / (4 * k)


def cut(*d):
    """The intersection."""
    return reduce(torch.maximum, d)


# ---- the kinds: each gives its parts, [(distance, colour), …], in units of its own. --------------

class Kind(NamedTuple):
    parts: object                # p -> [(distance, colour), ...]
    radius: float = 1.0          # of a ball about (0, 0, height) that encloses the parts
    height: float = 0.0
    has_front: bool = False      # whether front and back views differ


SLOPE = math.atan2(1.5, 0.85)    # of the pyramid's faces: base 1.7, height 1.5
KINDS = {
    "ball": Kind(lambda p: [(sphere(p, 1), BODY)]),
    "cube": Kind(lambda p: [(box(p, 0.6, 0.6, 0.6, 0.05), BODY)], 1.01),
    "cone": Kind(lambda p: [(lathe(p, (0, -0.6), (0.8, -0.6), (0, 1)), BODY)]),
    "cylinder": Kind(lambda p: [(drum(p, 0.6, 0.8, 0.02), BODY)]),
    "pyramid": Kind(lambda p: [(cut(torch.maximum(p[0].abs(), p[1].abs()) * math.sin(SLOPE)
                                    + (p[2] - 1) * math.cos(SLOPE), -0.5 - p[2]), BODY)],
                    1.245, -0.22),
}


def solid(radius, height=0.0, front=False):
    """Enters a kind in KINDS under its function's name."""
    def add(parts):
        KINDS[parts.__name__.replace("_", " ")] = Kind(parts, radius, height, front)
        return parts
    return add


@solid(0.98, front=True)
def donut(p):
    p = turned(p, 50)                                       # leans back: the icing faces front
    icing = torch.maximum(torus(at(p, 0, 0, 0.03), 0.66, 0.31), 0.04 - p[2])
    q, r = repeated(p, 7), repeated((-p[0], p[1], p[2]), 7)  # r: half a sector further
    sprinkles = torch.minimum(capsule(q, (0.5, 0, 0.3), (0.64, 0, 0.34), 0.035),
                              capsule(r, (0.76, -0.07, 0.33), (0.76, 0.07, 0.33), 0.035))
    return [(torus(p, 0.66, 0.3), TAN), (icing, BODY), (sprinkles, WHITE)]


@solid(1.02, front=True)
def mug(p):
    x, y, z = p
    rho = length(x, y)
    cup = lathe(p, (0, -0.7), (0.56, -0.7), (0.56, 0.7), (0.48, 0.7), (0.48, -0.6), (0, -0.6))
    handle = cut(torus((y - 0.58, z, x), 0.36, 0.085), 0.5 - rho)
    badge = cut(length(y, z) - 0.26, rho - 0.575, 0.5 - rho, -x)
    return [(cup, BODY), (handle, BODY), (badge, WHITE),
            (drum(at(p, 0, 0, -0.05), 0.5, 0.55), COFFEE)]


@solid(0.84, -0.05)
def mushroom(p):
    cap = sphere(at(p, 0, 0, -0.05), 0.8)
    q, top = repeated(p, 5), at(p, 0, 0, 0.75)
    spots = torch.minimum(sphere(at(q, 0.64, 0, 0.38), 0.19), sphere(top, 0.19))
    return [(capsule(p, (0, 0, -0.55), (0, 0, 0.2), 0.33, 0.24), CREAM),
            (cut(cap, -p[2]), BODY), (cut(spots, cap - 0.03), WHITE)]


@solid(1.01, 0.02, front=True)
def snowman(p):
    x, y, z = p
    m = (x, y.abs(), z)
    balls = [sphere(at(p, 0, 0, h), r) for h, r in ((-0.5, 0.48), (0.1, 0.36), (0.55, 0.26))]
    hat = torch.minimum(drum(at(p, 0, 0, 0.74), 0.3, 0.03),
                        drum(at(p, 0, 0, 0.88), 0.19, 0.12))
    dots = [sphere(at(m, a, b, c), 0.045) for a, b, c in
            ((0.235, 0.1, 0.61), (0.36, 0, 0.13), (0.34, 0, -0.04), (0.43, 0, -0.3))]
    return [(reduce(torch.minimum, balls), BODY), (hat, DARK), (reduce(torch.minimum, dots), INK),
            (torus(at(p, 0, 0, 0.34), 0.23, 0.08), TINT),
            (capsule(m, (0, 0.3, 0.15), (0, 0.75, 0.4), 0.035), WOOD),
            (capsule(p, (0.22, 0, 0.54), (0.56, 0, 0.5), 0.075, 0.02), BEAK)]


@solid(1.07, -0.1)
def traffic_cone(p):
    z = p[2]
    body = lathe(p, (0, -0.8), (0.48, -0.8), (0.11, 0.95), (0, 0.95))
    bands = cut(body - 0.015, torch.minimum((z - 0.45).abs() - 0.14, (z + 0.15).abs() - 0.14))
    return [(body, BODY), (bands, WHITE), (box(at(p, 0, 0, -0.76), 0.58, 0.58, 0.06, 0.03), BODY)]


@solid(1.1, 0.03)
def table(p):
    q = (p[0].abs(), p[1].abs(), p[2])
    return [(box(at(p, 0, 0, 0.36), 0.6, 0.85, 0.06, 0.03), BODY),
            (box(at(q, 0.48, 0.72, -0.1), 0.07, 0.07, 0.42, 0.02), SHADE)]


@solid(1.1, front=True)
def chair(p):
    m = (p[0], p[1].abs(), p[2])
    legs = torch.minimum(box(at(m, 0.42, 0.4, -0.48), 0.07, 0.07, 0.38, 0.02),
                         box(at(m, -0.44, 0.4, 0), 0.07, 0.07, 0.86, 0.02))
    back = box(at(p, -0.44, 0, 0.55), 0.045, 0.4, 0.22, 0.02)
    return [(legs, SHADE), (back, BODY), (box(at(p, 0, 0, -0.1), 0.51, 0.48, 0.06, 0.03), BODY),
            (box(at(p, 0.03, 0, -0.01), 0.42, 0.38, 0.07, 0.05), TINT)]


@solid(1.01, -0.06, front=True)
def house(p):
    x, y, z = p
    m = (x.abs(), y.abs(), z)
    walls = prism((y, z, x), [(-.55, -.7), (.55, -.7), (.55, .1), (0, .6), (-.55, .1)], 0.55)
    slope = math.hypot(0.5, 0.55)
    roof = box(((m[1] * 0.5 + (z - 0.62) * 0.55) / slope, (m[1] * 0.55 - (z - 0.62) * 0.5) / slope
                - 0.38, x), 0.05, 0.46, 0.65)
    frame = box(at(p, 0.55, 0, -0.42), 0.02, 0.19, 0.28)
    door = box(at(p, 0.57, 0, -0.44), 0.02, 0.14, 0.26)
    side = box(at(m, 0, 0.55, -0.2), 0.2, 0.02, 0.17)
    back = box(at((x, m[1], z), -0.55, 0.27, -0.2), 0.02, 0.13, 0.16)
    attic = drum((y, z - 0.2, x - 0.55), 0.13, 0.02)
    return [(walls, BODY), (roof, DARK), (box(at(p, -0.25, 0.3, 0.5), 0.09, 0.09, 0.3), BRICK),
            (frame, WHITE), (door, WOOD), (reduce(torch.minimum, (side, back, attic)), GLASS)]


@solid(1.01, -0.02)
def tree(p):
    crown = blend(sphere(at(p, 0, 0, 0.35), 0.5), sphere(at(repeated(p, 5), 0.4, 0, 0.15), 0.3), .1)
    crown = blend(crown, sphere(at(p, 0, 0, 0.65), 0.33), 0.1)
    return [(crown, BODY), (capsule(p, (0, 0, -0.85), (0, 0, 0), 0.16, 0.11), WOOD)]


@solid(1.04, -0.01, front=True)
def rocket(p):
    x, y, z = p
    body = lathe(p, (0, -.55), (.2, -.55), (.29, -.2), (.29, .25), (.2, .62), (0, 1))
    q = repeated((-x, y, z), 3)                             # one fin points straight back
    fins = prism((q[0], q[2], q[1]), [(.2, -.1), (.58, -.55), (.58, -.85), (.2, -.5)], 0.035, 0.01)
    ring = torus((y, z - 0.25, x - 0.28), 0.15, 0.04)
    return [(body, BODY), (fins, SHADE), (ring, WHITE), (sphere(at(p, 0.17, 0, 0.25), 0.17), GLASS),
            (cut(body - 0.012, 0.5 - z), SHADE),
            (capsule(p, (0, 0, -0.6), (0, 0, -0.88), 0.15, 0.03), BEAK)]


@solid(1.02, -0.01, front=True)
def car(p):
    x, y, z = p
    m, w = (x, y.abs(), z), (x.abs() - 0.54, z + 0.27, y.abs() - 0.37)
    cabin = [(-.68, .05), (.42, .05), (.14, .4), (-.5, .4)]
    return [(box(at(p, 0, 0, -0.08), 0.92, 0.42, 0.19, 0.09), BODY),
            (prism((x, z, y), cabin, 0.34, 0.01), GLASS),
            (box(at(p, -0.18, 0, 0.41), 0.36, 0.36, 0.04, 0.03), BODY),
            (drum(w, 0.21, 0.09, 0.03), DARK), (drum(w, 0.1, 0.11), METAL),
            (sphere(at(m, 0.87, 0.27, -0.03), 0.085), LIGHT),
            (box(at(m, -0.9, 0.28, -0.01), 0.04, 0.09, 0.05), CHERRY),
            (box(at(p, 0.9, 0, -0.1), 0.04, 0.13, 0.05), DARK)]


@solid(0.905, 0.07, front=True)
def duck(p):
    m = (p[0], p[1].abs(), p[2])
    body = blend(capsule(p, (-0.2, 0, -0.35), (0.2, 0, -0.35), 0.42, 0.42),
                 capsule(p, (-0.45, 0, -0.2), (-0.85, 0, 0.1), 0.2, 0.05), 0.15)
    body = blend(body, sphere(at(p, 0.3, 0, 0.35), 0.34), 0.12)
    wings = capsule(m, (0.08, 0.36, -0.25), (-0.35, 0.44, -0.15), 0.17, 0.05)
    return [(body, BODY), (wings, SHADE),
            (capsule(m, (0.6, 0, 0.28), (0.8, 0.07, 0.26), 0.1, 0.07), BEAK),
            (sphere(at(m, 0.53, 0.17, 0.46), 0.085), WHITE),
            (sphere(at(m, 0.59, 0.19, 0.47), 0.05), DARK)]


@solid(0.955, -0.03)
def lamp(p):
    shade = lathe(p, (.34, .85), (.62, .1), (.59, .1), (.31, .85))
    return [(shade, BODY), (drum(at(p, 0, 0, -0.84), 0.38, 0.06, 0.03), DARK),
            (drum(at(p, 0, 0, -0.2), 0.05, 0.65), METAL), (sphere(at(p, 0, 0, 0.42), 0.17), LIGHT)]


@solid(0.97, -0.01)
def ice_cream_cone(p):
    drips = sphere(at(repeated(p, 8), 0.36, 0, 0.1), 0.12)
    scoop = blend(sphere(at(p, 0, 0, 0.32), 0.44), drips, 0.06)
    return [(lathe(p, (0, -0.97), (0.4, 0.1), (0, 0.1)), TAN), (scoop, BODY),
            (sphere(at(p, 0, 0, 0.83), 0.12), CHERRY)]


@solid(0.965)
def dumbbell(p):
    w = (p[0], p[2], p[1].abs())
    return [(drum(w, 0.07, 0.95), METAL), (drum(at(w, 0, 0, 0.55), 0.42, 0.11, 0.04), BODY),
            (drum(at(w, 0, 0, 0.76), 0.3, 0.09, 0.04), BODY)]


@solid(0.975)
def star(p):
    tips = [(r * math.sin(i * math.pi / 5), r * math.cos(i * math.pi / 5))
            for i, r in enumerate((0.9, 0.4) * 5)]
    return [(prism((p[1], p[2], p[0]), tips, 0.1, 0.06), BODY)]


@solid(1.11, 0.09)
def heart(p):
    angles = [math.pi * i / 14 for i in (*range(12), 14)]
    curve = [(.96 * math.sin(t) ** 3, .78 * math.cos(t) - .3 * math.cos(2 * t)
              - .12 * math.cos(3 * t) - .06 * math.cos(4 * t)) for t in angles]
    flat = polygon(p[1].abs(), p[2] - 0.1, curve, closed=False)
    return [(corner(flat, p[0].abs() - 0.14) - 0.08, BODY)]


@solid(0.96, 0.14, front=True)
def teapot(p):
    x, y, z = p
    spout = capsule(p, (0.35, 0, -0.15), (0.85, 0, 0.32), 0.17, 0.08)
    return [(sphere(at(p, 0, 0, -0.1), 0.55), BODY), (spout, BODY),
            (torus((x + 0.55, z + 0.05, y), 0.3, 0.07), INK),
            (drum(at(p, 0, 0, 0.41), 0.24, 0.04, 0.03), SHADE),
            (sphere(at(p, 0, 0, 0.52), 0.09), INK),
            (drum(at(p, 0, 0, -0.62), 0.34, 0.05), SHADE)]


@solid(0.985, -0.09, front=True)
def teddy_bear(p):
    m = (p[0], p[1].abs(), p[2])
    fur = [sphere(at(p, 0, 0, -0.25), 0.42), sphere(at(p, 0.02, 0, 0.42), 0.34),
           sphere(at(m, 0, 0.28, 0.7), 0.14), capsule(m, (0, 0.32, 0), (0.2, 0.6, -0.25), 0.13),
           capsule(m, (0.1, 0.25, -0.55), (0.45, 0.35, -0.65), 0.17)]
    return [(reduce(torch.minimum, fur), BODY), (sphere(at(p, 0.28, 0, 0.34), 0.15), TINT),
            (sphere(at(p, 0.14, 0, -0.25), 0.32), TINT),
            (sphere(at(m, 0.12, 0.26, 0.7), 0.07), TINT),
            (sphere(at(m, 0.57, 0.36, -0.65), 0.1), TINT),
            (sphere(at(m, 0.32, 0.13, 0.52), 0.045), INK),
            (sphere(at(p, 0.42, 0, 0.38), 0.055), INK)]


def lookup(table, name, what):
    """table[name]; ValueError that lists the names where there is none."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}: one of {', '.join(table)}")
    return table[name]


def parts(kind, p):
    """The parts of a kind at p, a triple of tensors in world units: [(distance, colour), …]."""
    shape, radius, height, _ = lookup(KINDS, kind, "kind")
    s = radius / RADIUS
    x, y, z = p
    return [(d / s, color) for d, color in shape((x * s, y * s, z * s + height))]


def union(kind, p):
    """Signed distance to a kind at p, a triple in world units."""
    return reduce(torch.minimum, (d for d, _ in parts(kind, p)))


def sdf(kind, points):
    """Signed distance [...] from points [..., 3], negative inside; differentiable.

    Raises ValueError for an unknown kind.
    """
    return union(kind, points.unbind(-1))


def part_color(color, body):
    """The RGB of a part: fixed, or derived from the colour `body` of the whole."""
    if color == BODY:
        return body
    if color == SHADE:
        return tuple(0.72 * c for c in body)
    if color == TINT:
        return tuple(0.45 * c + 0.55 for c in body)
    if color == INK:                                        # must be seen on a black body too
        return WHITE if sum(body) < 0.6 else DARK
    return color


# ---- words --------------------------------------------------------------------------------------

def view_word(elevation_deg, azimuth_deg):
    """One of VIEWS, as in DreamFusion and threestudio.

    overhead if elevation > 60°, else front if |azimuth| < 45°, back if |azimuth| > 135°, else side,
    the azimuth taken in (−180°, 180°].
    """
    azimuth = abs((float(azimuth_deg) + 180) % 360 - 180)
    if float(elevation_deg) > 60:
        return "overhead"
    if azimuth < 45:
        return "front"
    return "back" if azimuth > 135 else "side"


def caption(kind, color, elevation_deg=None, azimuth_deg=None):
    """«a red mug, front view»; «a red mug» without a pose. ValueError for an unknown word."""
    lookup(KINDS, kind, "kind")
    lookup(COLORS, color, "colour")
    text = f"{'an' if color[0] in 'aeiou' else 'a'} {color} {kind}"
    if elevation_deg is None or azimuth_deg is None:
        return text
    return f"{text}, {view_word(elevation_deg, azimuth_deg)} view"


def find_solid(text):
    """A text such as "mug", "red mug" or "a red mug" -> (kind, colour), or None."""
    words = re.sub(r"^an? ", "", text.strip().lower())
    color, _, kind = words.partition(" ")
    if color in COLORS and kind in KINDS:
        return kind, color
    return (words, "red") if words in KINDS else None


# ---- pictures ------------------------------------------------------------------------------------

KEY, FILL = (0.65, -0.50, 0.57), (-0.62, 0.66, 0.42)       # unit vectors towards the two lights
STEPS, TOLERANCE = 160, 3e-4                                # of sphere tracing


class Picture(NamedTuple):
    rgb: torch.Tensor            # [B, 3, H, W] in [0, 1] on white
    opacity: torch.Tensor        # [B, 1, H, W] in [0, 1]: the covered part of the pixel
    depth: torch.Tensor          # [B, 1, H, W] distance along the unit ray through the pixel's
                                 # centre, inf where it misses


def along(o, d, t):
    """o + t d, of triples."""
    return tuple(a + t * b for a, b in zip(o, d))


def trace(kind, o, d):
    """Depths [N] of the first hits of the rays o + t d (triples of [N]), inf for misses."""
    middle = -sum(a * b for a, b in zip(o, d))
    chord = RADIUS ** 2 - sum(c * c for c in along(o, d, middle))       # of the enclosing ball
    far = middle + (chord.clamp_min(0) + 0.02).sqrt()
    t = (middle - (chord.clamp_min(0) + 0.02).sqrt()).clamp_min(0)
    depth = torch.full_like(t, math.inf)
    live = ((chord > -0.02) & (far > 0)).nonzero().squeeze(-1)
    for _ in range(STEPS // 4):
        o_, d_, t_, far_ = [c[live] for c in o], [c[live] for c in d], t[live], far[live]
        for _ in range(4):
            h = union(kind, along(o_, d_, t_))
            t_ = t_ + h
        hit = h.abs() < TOLERANCE
        depth[live[hit]] = t_[hit]
        t[live] = t_
        live = live[~hit & (t_ < far_)]
        if not len(live):
            break
    return depth


def shade(kind, p, palette, picture):
    """Diffuse RGB [N, 3] at surface points p; palette [B, parts, 3], picture [N] indexes it."""
    e = 1e-3                                                # ∇d from the corners of a tetrahedron
    corners = ((e, -e, -e), (-e, -e, e), (-e, e, -e), (e, e, e))
    h, n = [], []
    for x, y, z in corners:
        h.append(union(kind, at(p, -x, -y, -z)))
    for axis in range(3):
        n.append(sum(k[axis] * d for k, d in zip(corners, h)))
    norm = length(*n)
    n = [c / norm for c in n]
    facing = lambda light: sum(a * b for a, b in zip(n, light)).clamp_min(0)
    # Ambient occlusion: how much nearer the surface is than a plane would be, at two distances.
    open_ = 1 - sum(w * (s - union(kind, along(p, n, s))).clamp(0, s) / s
                    for w, s in ((0.35, 0.06), (0.35, 0.2)))
    lit = facing(KEY) * shadow(kind, along(p, n, 0.01))
    light = (0.62 + 0.05 * n[2] + 0.26 * facing(FILL)) * open_ + 0.42 * lit
    ds = torch.stack([d for d, _ in parts(kind, p)])
    return (palette[picture, ds.argmin(0)] * light[:, None]).clamp(0, 1)


def shadow(kind, p, steps=10, sharpness=10.0):
    """How much of the key light reaches p, 0 to 1: the narrowest gap seen on the way to it."""
    t, seen = 0.02, torch.ones_like(p[0])
    for _ in range(steps):
        h = union(kind, tuple(c + t * l for c, l in zip(p, KEY)))
        seen = torch.minimum(seen, (sharpness * h / t).clamp_min(0))
        t = t + h.clamp(0.03, 0.3)
    return seen


def cast(kind, origins, directions, palette, picture):
    """RGB on white, opacity and depth [N, 5] of rays [N, 3] at pictures of one kind."""
    seen = torch.cat([torch.ones_like(directions), torch.zeros_like(directions)[:, :2]], 1)
    for part in torch.arange(len(seen), device=seen.device).split(1 << 18):
        o, d = (v[part].t().contiguous().unbind() for v in (origins, directions))
        t = trace(kind, o, d)
        hit = t.isfinite()
        p = along([c[hit] for c in o], [c[hit] for c in d], t[hit])
        seen[part[hit], :3] = shade(kind, p, palette, picture[part[hit]])
        seen[part, 3:] = torch.stack([hit.to(t), t], 1)
    return seen


@torch.no_grad()
def render(kinds, colors, rays, size=64, supersample=3):
    """A Picture of B solids, one per camera.

    kinds, colors: B names each; rays(n) -> origins, unit directions [B, n, n, 3] through the n × n
    pixels' centres of the B cameras. Every pixel's centre is traced; pixels where the colour
    changes are then averaged over supersample² rays (1: none). Raises ValueError for an unknown
    kind or colour, or where the lengths differ.
    """
    coarse = rays(size)
    fine = coarse if supersample == 1 else rays(supersample * size)
    B, like = len(coarse[0]), coarse[0]
    if not len(kinds) == len(colors) == B:
        raise ValueError(f"{len(kinds)} kinds, {len(colors)} colours and {B} cameras: "
                         "there must be one of each per picture")
    body = [lookup(COLORS, c, "colour") for c in colors]
    seen = like.new_empty(B, size, size, 5)                 # RGB, opacity, depth
    for kind in dict.fromkeys(kinds):
        which = [i for i, k in enumerate(kinds) if k == kind]
        painted = [c for _, c in parts(kind, like.new_zeros(3, 1).unbind())]
        palette = []                                        # of each picture, its parts' colours
        for i in which:
            palette.append([part_color(c, body[i]) for c in painted])
        seen[which] = _render_kind(kind, like.new_tensor(palette), [v[which] for v in coarse],
                                   [v[which] for v in fine])
    return Picture(*(v.contiguous() for v in seen.movedim(-1, 1).split((3, 1, 1), 1)))


def _render_kind(kind, palette, coarse, fine):
    """RGB, opacity and depth [B, H, W, 5] of B pictures of one kind; rays, and finer ones."""
    (o, d), size, n = coarse, coarse[0].shape[1], fine[0].shape[1] // coarse[0].shape[1]
    index = torch.arange(len(o), device=o.device)[:, None, None].expand(-1, size, size)
    seen = cast(kind, o.reshape(-1, 3), d.reshape(-1, 3), palette, index.flatten()) \
        .view(len(o), size, size, 5)
    if n == 1:
        return seen
    color = seen[..., :4].movedim(-1, 1)
    pool = lambda v: torch.nn.functional.max_pool2d(v, 3, 1, 1)
    edge = (pool(color) + pool(-color) > 0.06).any(1)       # max − min over the 3×3 neighbours
    o, d = (v.unflatten(2, (size, n)).unflatten(1, (size, n)).transpose(2, 3)[edge]
            for v in fine)                                  # [pixels, n, n, 3]
    finer = cast(kind, o.reshape(-1, 3), d.reshape(-1, 3), palette,
                 index[edge].repeat_interleave(n * n))
    mean = seen[edge]
    mean[:, :4] = finer[:, :4].view(-1, n * n, 4).mean(1)
    seen[edge] = mean
    return seen
