"""solids.py against closed forms, brute force and its own words."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerf import camera_to_world, rays
from tiny import solids
from tiny.solids import COLORS, KINDS, RADIUS, caption, sdf, view_word

quick = settings(max_examples=40, deadline=None)
every_kind = pytest.mark.parametrize("kind", KINDS)
kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 2 ** 32 - 1)
BLENDED = ("tree", "duck", "ice cream cone")               # smooth unions: the gradient is below 1


def cloud(seed, n=512, radius=1.3):
    """n points uniform in a ball, float64 [n, 3]."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(n, 3, generator=g, dtype=torch.float64)
    r = radius * torch.rand(n, 1, generator=g, dtype=torch.float64) ** (1 / 3)
    return r * v / v.norm(dim=1, keepdim=True)


def render(kinds, colors, c2w, fovy=40.0, size=64, supersample=3):
    """solids.render from nerf.py's cameras."""
    return solids.render(kinds, colors, lambda n: rays(c2w, fovy, n), size, supersample)


def triple(points):
    return points.unbind(-1)


# ---- distances -----------------------------------------------------------------------------------

def test_ball_distance_is_the_closed_form():
    p = cloud(0)
    torch.testing.assert_close(sdf("ball", p), p.norm(dim=1) - RADIUS)


def test_box_distance_by_hand():
    at = lambda *p: solids.box(triple(torch.tensor(p, dtype=torch.float64)), 1, 2, 3).item()
    assert at(2, 0, 0) == pytest.approx(1)                  # a face, an edge, a corner, inside
    assert at(4, 6, 0) == pytest.approx(5)
    assert at(2, 4, 5) == pytest.approx(3)
    assert at(0.5, 0, 0) == pytest.approx(-0.5)


INSIDE = {"ball": (0, 0, 0), "cube": (0, 0, 0), "cone": (0, 0, 0), "cylinder": (0, 0, 0),
          "pyramid": (0, 0, 0), "mug": (0, .46, .3), "donut": (0, .6, 0), "star": (0, 0, 0),
          "heart": (0, 0, -.2), "table": (0, 0, .28), "house": (0, 0, 0), "tree": (0, 0, -.6),
          "dumbbell": (0, 0, 0), "car": (0, 0, 0), "duck": (0, 0, -.4), "chair": (-.37, 0, .5)}
OUTSIDE = {"mug": (0, 0, .55), "donut": (0, 0, 0), "table": (0, 0, 0), "chair": (.3, 0, .5),
           "dumbbell": (0, 0, .2), "heart": (0, 0, .7), "star": (0, 0, -.6), "lamp": (0, .3, -.4),
           "car": (0, 0, -.4), "house": (0, .5, .6), "cone": (0, .3, .7), "teapot": (-.57, 0, -.15)}


@pytest.mark.parametrize("table, sign", ((INSIDE, -1), (OUTSIDE, 1)))
def test_sign_at_known_points(table, sign):
    for kind, point in table.items():
        assert sdf(kind, torch.tensor(point)).sign() == sign, kind


@every_kind
def test_fits_and_fills_the_ball(kind):
    p = torch.cartesian_prod(*(torch.linspace(-1, 1, 49),) * 3)
    reach = p[sdf(kind, p) < 0].norm(dim=1).max()
    assert 0.9 * RADIUS < reach <= RADIUS + 1e-6


@quick
@given(kinds, seeds)
def test_far_points_are_outside_by_at_least_the_gap(kind, seed):
    p = cloud(seed, radius=5)
    d = sdf(kind, p)
    far = p.norm(dim=1) > RADIUS + 0.02
    assert (d[far] > 0).all() and (d <= p.norm(dim=1) + RADIUS).all()


@quick
@given(kinds, seeds)
def test_gradient_norm_is_one(kind, seed):
    p = cloud(seed).requires_grad_()
    norm = torch.autograd.grad(sdf(kind, p).sum(), p)[0].norm(dim=1)
    assert norm.max() <= 1 + 1e-6
    below = (norm < 1 - 1e-6).double().mean()
    assert below <= (0.4 if kind in BLENDED else 0.01), below


@quick
@given(kinds, seeds)
def test_no_step_passes_through_the_surface(kind, seed):
    """|d(p) − d(q)| ≤ ‖p − q‖, across the seams of folded parts too."""
    p, q = cloud(seed), cloud(seed ^ 1)
    q = torch.where(torch.arange(len(p))[:, None] % 2 == 0, q, p + 0.05 * q)
    assert ((sdf(kind, p) - sdf(kind, q)).abs() <= (p - q).norm(dim=1) + 1e-9).all()


@quick
@given(seeds)
def test_capsule_is_the_nearest_of_its_balls(seed):
    a, b, *_ = cloud(seed, 2)
    p = cloud(seed ^ 1, 64)
    ra, rb = 0.3, 0.3 - 0.25 * min(1, (a - b).norm().item())
    s = torch.linspace(0, 1, 4001, dtype=torch.float64)
    centers = a + s[:, None] * (b - a)
    brute = ((p[:, None] - centers).norm(dim=2) - (ra + s * (rb - ra))).min(1).values
    got = solids.capsule(triple(p), a.tolist(), b.tolist(), ra, rb)
    torch.testing.assert_close(got, brute, atol=1e-4, rtol=0)


@quick
@given(st.integers(3, 9), seeds)
def test_polygon_is_the_nearest_edge_with_the_sign_of_the_winding(n, seed):
    g = torch.Generator().manual_seed(seed)
    r = 0.3 + torch.rand(n, generator=g, dtype=torch.float64)
    angle = torch.arange(n) * 2 * math.pi / n
    corner = torch.stack([r * angle.cos(), r * angle.sin()], 1)
    p = cloud(seed, 64)[:, :2]
    s = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None, None]
    edges = (1 - s) * corner + s * corner.roll(-1, 0)
    brute = torch.cdist(p, edges.reshape(-1, 2)).min(1).values
    around = torch.view_as_complex(corner - p[:, None])
    winding = torch.angle(around.roll(-1, 1) / around).sum(1).abs() / (2 * math.pi)
    got = solids.polygon(p[:, 0], p[:, 1], corner.tolist())
    torch.testing.assert_close(got, torch.where(winding > 0.5, -brute, brute), atol=1e-3, rtol=0)


# ---- pictures ------------------------------------------------------------------------------------

def test_ball_silhouette_and_depth_are_the_closed_form():
    c2w = camera_to_world(torch.tensor([17.], dtype=torch.float64), 200, 3)
    picture = render(["ball"], ["red"], c2w, 50.0, 48, supersample=1)
    o, d = rays(c2w, 50.0, 48)
    middle = -(o * d).sum(-1)
    chord = RADIUS ** 2 - (9 - middle ** 2)
    clear = chord.abs() > 1e-3                              # not within a hair of the rim
    depth = picture.depth[0]
    assert (depth.isfinite() == (chord > 0))[clear].all()
    hit = clear & (chord > 0)
    cosine = chord.sqrt() / RADIUS                          # of the ray with the normal
    error = (depth - middle + chord.sqrt()) * cosine        # what it is off, across the surface
    assert error[hit].abs().max() < 2 * solids.TOLERANCE


def test_supersampling_measures_the_area_of_the_disc():
    c2w, half = camera_to_world(0, 0, 3), math.tan(math.radians(25))
    exact = math.pi * (RADIUS ** 2 / (9 - RADIUS ** 2)) / (2 * half) ** 2
    error = lambda n: abs(render(["ball"], ["red"], c2w, 50.0, 24, n).opacity.mean().item() - exact)
    assert error(4) < 1e-3 and error(4) < error(1)


@every_kind
def test_opacity_and_depth_against_dense_marching(kind):
    c2w, size, step = camera_to_world(25, 35, 2.7), 20, 0.01
    picture = render([kind], ["blue"], c2w, 40.0, size, supersample=1)
    depth = picture.depth[0, 0]
    hit = depth.isfinite()
    assert torch.equal(picture.opacity[0, 0] > 0.5, hit) and hit.any() and not hit.all()
    o, d = (v[0] for v in rays(c2w, 40.0, size))
    on = o[hit] + depth[hit][:, None] * d[hit]
    assert sdf(kind, on).abs().max() < 2 * solids.TOLERANCE
    t = torch.arange(1.7, 3.7, step)
    along = sdf(kind, o[:, :, None] + t[:, None] * d[:, :, None])           # [H, W, samples]
    assert hit[(along < -solids.TOLERANCE).any(-1)].all()                   # what is inside is seen
    assert (along.amin(-1)[hit] < step).all()                               # what is seen is there
    before = t < depth[..., None] - 1e-3
    assert (along[before] > 0).all()                                        # and it is the first


def test_a_full_turn_changes_nothing():
    names = ("mug", "donut", "car")
    a, b, c = (render(names, ["pink"] * 3, camera_to_world(torch.full((3,), 20.), azimuth, 2.7),
                      size=16) for azimuth in (40, -320, 50))
    assert torch.equal(a.rgb, b.rgb) and torch.equal(a.opacity, b.opacity)
    assert not torch.equal(a.rgb, c.rgb)


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k].has_front])
def test_front_side_and_back_differ(kind):
    """In shape or in hue, so not by the light alone."""
    c2w = camera_to_world(10, torch.tensor([0., 90., 180.]), 2.7)
    picture = render([kind] * 3, ["purple"] * 3, c2w, size=24)
    hue = torch.cat([picture.rgb / picture.rgb.sum(1, keepdim=True), picture.opacity], 1)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert ((hue[i] - hue[j]).abs().amax(0) > 0.03).float().mean() > 0.01, (i, j)


def test_background_is_white_and_values_are_in_range():
    picture = render(list(KINDS), ["yellow"] * len(KINDS),
                     camera_to_world(30, torch.linspace(-180, 180, len(KINDS)), 2.7), size=12)
    empty = (picture.opacity == 0).expand_as(picture.rgb)
    assert (picture.rgb[empty] == 1).all() and empty[:, :, 0, 0].all()
    assert picture.rgb.min() >= 0 and picture.rgb.max() <= 1


def test_the_colour_seen_is_the_colour_said():
    names, table = list(COLORS), torch.tensor(list(COLORS.values()))
    c2w = camera_to_world(15, torch.zeros(len(names)), 2.7)
    picture = render(["ball"] * len(names), names, c2w, size=16)
    seen = (picture.rgb * picture.opacity).sum((2, 3)) / picture.opacity.sum((2, 3))
    assert torch.cdist(seen, table).argmin(1).tolist() == list(range(len(names)))


def test_a_mixed_batch_is_each_picture_alone():
    batch = (["car", "duck", "car"], ["red", "green", "blue"])
    c2w = camera_to_world(torch.tensor([0., 20, 70]), 30, 2.7)
    together = render(*batch, c2w, size=16)
    for i, (kind, color) in enumerate(zip(*batch)):
        alone = render([kind], [color], c2w[i:i + 1], size=16)
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[i], b[0])


# ---- words ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("pose, word", (
    ((0, 0), "front"), ((60, 44.9), "front"), ((0, -44.9), "front"), ((0, 360), "front"),
    ((0, 45), "side"), ((0, -90), "side"), ((0, 135), "side"), ((0, 225), "side"),
    ((0, 135.1), "back"), ((0, 180), "back"), ((0, -180), "back"), ((0, 200), "back"),
    ((60.1, 0), "overhead"), ((90, 180), "overhead"), ((-80, 0), "front")))
def test_view_words_have_the_thresholds_of_dreamfusion(pose, word):
    assert view_word(*pose) == word and word in solids.VIEWS


def test_captions():
    assert caption("mug", "red", 15, 0) == "a red mug, front view"
    assert caption("cube", "orange") == "an orange cube"
    assert caption("ice cream cone", "blue", 80, 0) == "a blue ice cream cone, overhead view"


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'dog': one of ball, "):
        sdf("dog", torch.zeros(3))
    with pytest.raises(ValueError, match="unknown colour 'white'"):
        render(["ball"], ["white"], camera_to_world(0, 0, 3))
    with pytest.raises(ValueError, match="unknown colour"):
        caption("ball", "mauve")
    with pytest.raises(ValueError, match="2 kinds, 1 colours"):
        render(["ball", "cube"], ["red"], camera_to_world(0, 0, 3))


def test_solids_are_found():
    assert solids.find_solid("a red mug") == solids.find_solid("Red mug") == ("mug", "red")
    assert solids.find_solid("an orange teddy bear") == ("teddy bear", "orange")
    assert solids.find_solid("mug") == ("mug", "red") and solids.find_solid("a red fox") is None
