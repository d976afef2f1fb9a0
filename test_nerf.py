"""The NeRF: encoding, compositing, rendering, kernels, cameras, fitting; meshes and pages.

The Triton kernels run in Triton's interpreter where there is no CUDA. The last are benchmarks.
"""
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import nerf
from cli import pictures
from nerf import NeRF, camera_to_world, composite, hash_encode, layout, render
from tiny import solids

try:                                 # whether the interpreter runs is settled by Triton's import
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        import nerf_kernels
except ImportError:
    nerf_kernels = None

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
seeds = st.integers(0, 2 ** 31)
DOUBLE = {"dtype": torch.float64}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
RESOLUTIONS, SIZE, DENSE = (2, 3, 5), 64, 2          # two dense levels, the second one just fits
close = torch.testing.assert_close


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=rng(seed), **DOUBLE)


def table(features=2, seed=1):
    return rand(layout(RESOLUTIONS, SIZE)[0][-1], features, seed=seed) - 0.5


def small(**changes):
    return NeRF(**{"levels": 3, "size": 1 << 10, "base": 4, "finest": 12, "width": 8, "cells": 8,
                   "kernels": "torch"} | changes)


# ---------------------------------------------------------------------------------- compositing
@given(sigma=st.floats(0, 30), length=st.floats(0, 3), S=st.integers(1, 20))
def test_composite_of_constant_density(sigma, length, S):
    """Opacity 1 − e^{−σd}, whatever the number of samples."""
    out, opacity = composite(torch.full((1, S), sigma, **DOUBLE),
                             torch.full((1,), length / S, **DOUBLE), torch.ones(1, S, 1, **DOUBLE))
    close(opacity, torch.tensor([1 - math.exp(-sigma * length)], **DOUBLE), **TIGHT)
    close(out[:, 0], opacity, **TIGHT)


@pytest.mark.parametrize("changes", [
    {"levels": 0}, {"features": 0}, {"width": 0}, {"cells": 0}, {"box": 0.0}, {"box": math.inf},
    {"blob_radius": -1.0}, {"levels": 2.5}, {"seed": "x"}, {"size": "big"}, {"size": 1000},
    {"base": 100}, {"density": "relu"}], ids=str)
def test_field_refuses_impossible_numbers(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        NeRF(**changes)


def test_rays_that_do_not_pair_are_refused():
    f, rays_of_5 = field(), torch.rand(5, 3)
    for other, words in ((torch.rand(4, 3), "directions"), (torch.rand(5, 2), "directions")):
        with pytest.raises(ValueError, match=words):
            render(f, rays_of_5, other)
    with pytest.raises(ValueError, match="samples is a whole number, at least 1, not 0"):
        render(f, rays_of_5, rays_of_5, samples=0)


def test_composite_of_two_slabs():
    """By hand: half of the light stops in the red slab in front, a quarter in the blue one."""
    half = math.log(2)
    out, opacity = composite(torch.tensor([[0, half / 0.1, 0, half / 0.1]], **DOUBLE),
                             torch.tensor([0.1], **DOUBLE),
                             torch.tensor([[[9, 9], [1, 0], [9, 9], [0, 1]]], **DOUBLE))
    close(out, torch.tensor([[0.5, 0.25]], **DOUBLE), **TIGHT)
    close(opacity, torch.tensor([0.75], **DOUBLE), **TIGHT)


def weights(sigma, delta):
    """[R, S] of composite: what it makes of the values 1 at one sample, 0 at the others."""
    eye = torch.eye(sigma.shape[1], **DOUBLE)
    return composite(sigma, delta, eye.expand(len(sigma), -1, -1))


@given(seeds, st.integers(1, 12))
def test_composite_weights(seed, S):
    """0 ≤ w_i ≤ 1, Σ w_i = opacity = 1 − exp(−Σ σ_i δ) ≤ 1, and a denser sample hides the next."""
    sigma, delta = 40 * rand(5, S, seed=seed) ** 3, rand(5, seed=seed + 1)
    w, opacity = weights(sigma, delta)
    assert (w >= 0).all() and (w <= 1).all() and (opacity <= 1 + 1e-12).all()
    close(w.sum(1), opacity, **TIGHT)
    close(opacity, 1 - torch.exp(-(sigma * delta[:, None]).sum(1)), **TIGHT)
    denser = sigma.clone()
    denser[:, 0] += 1
    assert (weights(denser, delta)[0][:, 1:] <= w[:, 1:]).all()


@given(seeds, st.integers(2, 4))
def test_composite_of_split_samples(seed, parts):
    """A sample cut into equal parts of its density and value gives the same."""
    sigma, delta, values = (rand(3, 6, seed=seed) * 9, rand(3, seed=seed + 1),
                            rand(3, 6, 4, seed=seed))
    finer = composite(sigma.repeat_interleave(parts, 1), delta / parts,
                      values.repeat_interleave(parts, 1))
    close(finer, composite(sigma, delta, values), **TIGHT)


def test_composite_gradient():
    inputs = [v.requires_grad_() for v in (rand(2, 5), rand(2), rand(2, 5, 3))]
    assert torch.autograd.gradcheck(composite, inputs)


def test_composite_of_extreme_densities():
    """Fog in front of a wall in float32: e^{−0.1} of the light comes through."""
    sigma = torch.tensor([[0.1, 1e4, 1e9]], requires_grad=True)
    out, opacity = composite(sigma, torch.ones(1), torch.tensor([[[0.0], [1.0], [0.0]]]))
    close(out, torch.tensor([[math.exp(-0.1)]]), rtol=1e-6, atol=0)
    (out.sum() + opacity.sum()).backward()
    assert sigma.grad.isfinite().all()


# -------------------------------------------------------------------------------- hash encoding
def index(level, vertex):
    """The row of a vertex in the table, in plain Python."""
    offsets, _ = layout(RESOLUTIONS, SIZE)
    x, y, z = vertex
    n = RESOLUTIONS[level]
    if level < DENSE:
        return offsets[level] + x + (n + 1) * (y + (n + 1) * z)
    return offsets[level] + (x ^ y * 2654435761 ^ z * 805459861) % 2 ** 32 % SIZE


@pytest.mark.parametrize("level", range(len(RESOLUTIONS)))
def test_encoding_is_exact_at_the_vertices(level):
    """At a vertex, its row of the table: of its own in a dense level, of its hash in another."""
    n = RESOLUTIONS[level]
    vertices = list(itertools.product(range(n + 1), repeat=3))
    rows = [index(level, v) for v in vertices]
    features = hash_encode(torch.tensor(vertices, **DOUBLE) / n, table(), RESOLUTIONS, SIZE)
    close(features[:, 2 * level:2 * level + 2], table()[rows], **TIGHT)
    if level < DENSE:
        assert len(set(rows)) == len(rows)


@given(seeds)
def test_encoding_is_trilinear_within_a_cell(seed):
    """Σ over the cell's vertices of Π (1 − |x − v|) table[v], and so linear along each axis."""
    x = rand(1, 3, seed=seed)
    expected = torch.zeros(2, **DOUBLE)
    for vertex in itertools.product(range(6), repeat=3):
        w = (1 - (x[0] * 5 - torch.tensor(vertex)).abs()).clamp(min=0).prod()
        expected += w * table()[index(2, vertex)]
    close(hash_encode(x, table(), RESOLUTIONS, SIZE)[0, 4:], expected, **TIGHT)
    cell, axis = (x * 30).floor() / 30, torch.eye(3, **DOUBLE)[seed % 3] / 30    # the lcm
    low, mid, high = (hash_encode(cell + s * axis + 1e-12, table(), RESOLUTIONS, SIZE)
                      for s in (0.01, 0.5, 0.99))
    close(low + high, 2 * mid, **TIGHT)


@given(seeds)
def test_encoding_is_continuous_across_cells(seed):
    x = rand(8, 3, seed=seed)
    x[:, seed % 3] = (torch.arange(8) % 5 / 5).to(x)          # on a face between cells of a level
    x = x.clamp(1e-6, 1 - 1e-6)
    step = 1e-9 * torch.eye(3, **DOUBLE)[seed % 3]
    close(hash_encode(x - step, table(), RESOLUTIONS, SIZE),
          hash_encode(x + step, table(), RESOLUTIONS, SIZE), rtol=0, atol=1e-7)


def test_encoding_gradient():
    """Of the table and of the positions (where the normals come from)."""
    x = (0.05 + 0.9 * rand(2, 3, seed=3)).requires_grad_()
    encode = lambda x, t: hash_encode(x, t, RESOLUTIONS, SIZE)
    assert torch.autograd.gradcheck(encode, (x, table().requires_grad_()), atol=1e-6)


def test_encoding_takes_any_number_of_points_and_the_edge():
    for n in (0, 1, 7):
        assert hash_encode(rand(n, 3), table(), RESOLUTIONS, SIZE).shape == (n, 6)
    corner = hash_encode(torch.ones(1, 3, **DOUBLE), table(), RESOLUTIONS, SIZE)
    close(corner[0, :2], table()[index(0, (2, 2, 2))], **TIGHT)


def test_the_far_faces_belong_to_the_last_cells():
    """The slope there is that of the cell inside; a grid's last cells reach to the box's faces."""
    x = (rand(3, 3, seed=4) * 0.1 + 0.85).fill_diagonal_(1).requires_grad_()      # one face each
    encode = lambda x: hash_encode(x, table(), RESOLUTIONS, SIZE).sum(1)
    slope = torch.autograd.grad(encode(x).sum(), x)[0]
    for axis in torch.eye(3, **DOUBLE):
        close((encode(x) - encode(x - 0.01 * axis)) / 0.01, slope @ axis, rtol=1e-8, atol=1e-8)
    field = small()
    field.occupied.copy_(torch.rand(8, 8, 8, generator=rng()) < 0.5)
    x = torch.cat([x.detach(), -x.detach()]).float()
    assert torch.equal(field.occupancy(x), field.occupancy(0.999 * x))


# ------------------------------------------------------------------------------- Triton kernels
@pytest.fixture
def device(monkeypatch):
    """Where the kernels run: on CUDA, or on the CPU in Triton's interpreter."""
    if nerf_kernels is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


def both_ways(function, inputs, seed):
    """Outputs and gradients of function(kernels, *inputs) as ["torch"], ["triton"]."""
    results = []
    for kernels in ("torch", "triton"):
        outputs = function(kernels, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((rand(*o.shape, seed=seed).to(o) * o).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(
            loss, [v for v in inputs if v.requires_grad])])
    return results


@pytest.mark.parametrize("dtype, tolerance, N, features", [
    (torch.float64, 1e-10, 19, 4), (torch.float32, 1e-5, 5, 2)])
def test_kernels_encode_as_their_twin(device, dtype, tolerance, N, features):
    """Forward, and the gradients of the table (rows met twice) and of the positions."""
    x, rows = rand(N, 3, seed=N), table(features)
    x[0], x[-1] = 0, 1
    inputs = [v.to(device, dtype).requires_grad_() for v in (x, rows)]
    call = lambda kernels, x, t: hash_encode(x, t, RESOLUTIONS, SIZE, kernels)
    close(*both_ways(call, inputs, seed=2), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("S, C", [(1, 1), (6, 4), (8, 3)])
def test_kernels_composite_as_their_twin(device, dtype, tolerance, S, C):
    sigma, values = 5 * rand(4, S), rand(4, S, C)
    sigma[0] = 0
    inputs = [v.to(device, dtype) for v in (sigma, rand(4, seed=5), values)]
    inputs = [inputs[0].requires_grad_(), inputs[1], inputs[2].requires_grad_()]
    call = lambda kernels, *v: composite(*v, kernels)
    close(*both_ways(call, inputs, seed=2), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("which", [0, 1], ids=["positions", "table"])
def test_kernels_compute_only_the_gradients_asked_for(device, which):
    """Those of the positions (normals) or of the table (fitting), which the kernel tells apart."""
    inputs = [v.to(device) for v in (rand(4, 3), table())]
    inputs[which].requires_grad_()
    call = lambda kernels, x, t: hash_encode(x, t, RESOLUTIONS, SIZE, kernels)
    close(*both_ways(call, inputs, seed=2), **TIGHT)


def test_kernels_take_no_points(device):
    x, rows = torch.zeros(0, 3, device=device), table().to(device, torch.float32).requires_grad_()
    h = hash_encode(x, rows, RESOLUTIONS, SIZE, "triton")
    h.sum().backward()
    assert h.shape == (0, 6) and not rows.grad.any()


def test_kernels_leave_the_spacings_gradient_to_their_twin(device):
    inputs = [v.to(device).requires_grad_() for v in (5 * rand(4, 6), rand(4), rand(4, 6, 2))]
    close(*both_ways(lambda kernels, *v: composite(*v, kernels), inputs, seed=2), **TIGHT)


def test_kernels_render_as_their_twins(device):
    """With a table that matters, unlike the one a NeRF starts from; and so do the gradients."""
    results = []
    for kernels in ("torch", "triton"):
        field = small(kernels=kernels)
        nn.init.normal_(field.table, generator=rng())
        field.to(device)
        picture = render(field, *(v.to(device) for v in camera_rays(3)), 8)
        picture.rgb.square().sum().backward()
        results.append([*picture, field.table.grad])
    close(*results, rtol=1e-4, atol=1e-5)


COMPILE = """
import itertools, triton
from nerf_kernels import composite_kernel, encode_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for kernel, backward in itertools.product((encode_kernel, composite_kernel), (False, True)):
    constants = {"L": 8, "C": 2, "BLOCK": 64, "COLUMNS": 4, "BACKWARD": backward,
                 "TABLE": backward, "X": backward}
    types = {"levels": "*i32", "N": "i32", "S": "i32", "mask": "i32"}
    types |= {name: "constexpr" for name in constants}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    print(len(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]))
"""


@pytest.mark.skipif(nerf_kernels is None, reason="Triton is not installed")
def test_kernels_compile_for_a_gpu():
    """To machine code for sm_80, which needs no GPU; in a process without the interpreter."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert [int(size) > 0 for size in done.stdout.split()] == [True] * 4, done.stderr[-900:]


def test_kernels_are_chosen(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1)
    assert not nerf.use_triton("torch", x) and not nerf.use_triton("auto", x)
    with pytest.raises(ValueError, match="--kernels auto or torch"):
        nerf.use_triton("triton", x)
    with pytest.raises(ValueError, match="not 'tritn'"):
        nerf.use_triton("tritn", x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")                  # only where it is asked for
    assert not nerf.use_triton("auto", x)


# -------------------------------------------------------------------------------- rays, cameras
def camera_rays(size, elevation=20.0, azimuth=30.0, distance=2.7, fovy=40.0):
    c2w = camera_to_world(elevation, azimuth, distance)
    return (v[0] for v in nerf.rays(c2w, fovy, size))


def test_rays_go_through_the_pixels_centres():
    """By hand: the middle pixel looks down −z; the first of 2 lies a quarter of the picture off."""
    o, d = nerf.rays(torch.eye(4, **DOUBLE)[None], 90.0, 3, 5)
    close(d[0, 1, 2], torch.tensor([0, 0, -1.0], **DOUBLE), **TIGHT)
    o, d = nerf.rays(torch.eye(4, **DOUBLE)[None], 90.0, 2, 4)
    expected = torch.tensor([-1.5, 0.5, -1.0], **DOUBLE)              # right is +x, up is +y
    close(d[0, 0, 0], expected / expected.norm(), **TIGHT)
    assert (o == 0).all()


@given(st.floats(-80, 80), st.floats(-180, 180), st.floats(20, 60))
def test_points_on_a_ray_are_seen_in_its_pixel(elevation, azimuth, fovy):
    """The projection (x, y)/(−z tan(fovy/2)) of a point on it is the pixel's centre in [−1, 1]²."""
    c2w = camera_to_world(torch.tensor([elevation], **DOUBLE), azimuth, 2.7)
    o, d = (v[0] for v in nerf.rays(c2w, fovy, 6))
    x, y, z = ((o + 1.7 * d - c2w[0, :3, 3]) @ c2w[0, :3, :3]).unbind(-1)
    centers = (2 * torch.arange(6, **DOUBLE) + 1) / 6 - 1
    scale = -z * math.tan(math.radians(fovy / 2))
    close(x / scale, centers.expand(6, 6), **TIGHT)
    close(y / scale, -centers[:, None].expand(6, 6), **TIGHT)
    close(d.norm(dim=-1), torch.ones(6, 6, **DOUBLE), **TIGHT)


def test_each_camera_has_its_own_field_of_view():
    c2w = camera_to_world(torch.tensor([20.0, 30.0]), 40.0, 2.7)
    both = nerf.rays(c2w, torch.tensor([30.0, 50.0]), 4, 6)
    for i, fovy in enumerate((30.0, 50.0)):
        for v, alone in zip(both, nerf.rays(c2w[i:i + 1], fovy, 4, 6)):
            assert torch.equal(v[i:i + 1], alone)


def test_a_camera_looks_at_the_origin():
    o, d = camera_rays(5)
    close(d[2, 2], -o[2, 2] / o[2, 2].norm())


@given(st.floats(-90, 90), st.floats(-720, 720), st.floats(1, 9))
def test_camera_looks_at_the_origin_upright(elevation, azimuth, distance):
    m = camera_to_world(*torch.tensor([elevation, azimuth, distance], dtype=torch.float64))[0]
    right, up, back, position = m[:3].T
    close(m[:3, :3].T @ m[:3, :3], torch.eye(3, dtype=m.dtype))
    close(torch.linalg.cross(right, up), back)
    close(position, distance * back)
    assert right[2] == 0 and up[2] >= -1e-12
    assert position[2].item() == pytest.approx(distance * math.sin(math.radians(elevation)))


def test_azimuth_zero_is_in_front_and_sees_left_as_left():
    m = camera_to_world(0, torch.tensor([0., 90.]), 2)
    close(m[:, :3, 3], torch.tensor([[2., 0, 0], [0, 2., 0]]))
    o, d = nerf.rays(m, 90.0, 2)
    close(o[0, 0, 0], torch.tensor([2., 0, 0]))
    # Pixel (row 0, column 1), up and to the right: towards −x, +y, +z, at tan 45° / 2 off the axis.
    close(d[0, 0, 1], torch.tensor([-1, .5, .5]) / math.sqrt(1.5))
    close(d.norm(dim=-1), torch.ones(2, 2, 2))


@given(seeds)
def test_intersect_box(seed):
    """Both ends lie on the box, the middle inside; rays that point away meet nothing."""
    o = 3 * torch.nn.functional.normalize(rand(9, 3, seed=seed) - 0.5, dim=1)
    d = torch.nn.functional.normalize(0.5 * (rand(9, 3, seed=seed + 1) - 0.5) - o, dim=1)
    near, far = nerf.intersect_box(o, d, 1.0)
    for t in (near, far):
        close((o + t[:, None] * d).abs().amax(1), torch.ones(9, **DOUBLE), **TIGHT)
    assert (near < far).all() and ((o + (near + far)[:, None] / 2 * d).abs().amax(1) < 1).all()
    near, far = nerf.intersect_box(o, -d, 1.0)
    assert (near == far).all()


def test_intersect_box_by_hand():
    o = torch.tensor([[-3.0, 0, 0], [0, 0, 0], [-3, 0.9999, 0], [-3, 2, 0]])
    near, far = nerf.intersect_box(o, torch.tensor([[1.0, 0, 0]] * 4), 1.0)
    assert near.tolist()[:3] == [2, 0, 2] and far.tolist()[:3] == [4, 1, 4] and near[3] == far[3]


# ------------------------------------------------------------------------------------ rendering
class Field(nn.Module):
    """What render() needs of a field: density and colour of cells, and which cells it skips."""
    box, kernels = 1.0, "torch"

    def __init__(self, sigma, rgb, occupied):
        super().__init__()
        self.sigma, self.rgb, self.occupied, self.cells = sigma, rgb, occupied, len(sigma)

    def cell(self, x):
        i = ((x + 1) / 2 * self.cells).long().clamp(0, self.cells - 1).unbind(-1)
        return (i[0] * self.cells + i[1]) * self.cells + i[2]

    def forward(self, x, d):
        return self.sigma.flatten()[self.cell(x)], self.rgb.view(-1, 3)[self.cell(x)]

    def occupancy(self, x):
        return self.occupied.flatten()[self.cell(x)]


def field(seed=0, sigma=None, cells=4):
    density = 5 * rand(cells, cells, cells, seed=seed) ** 4 if sigma is None else \
        torch.full((cells,) * 3, sigma, **DOUBLE)
    return Field(density, rand(cells, cells, cells, 3, seed=seed + 1),
                 torch.ones(cells, cells, cells, dtype=torch.bool))


def fan(seed, n=12):
    """n rays from the sphere of radius 3 to points near the origin."""
    o = 3 * torch.nn.functional.normalize(rand(n, 3, seed=seed) - 0.5, dim=1)
    return o, torch.nn.functional.normalize(rand(n, 3, seed=seed + 1) - 0.5 - o, dim=1)


@given(seeds, st.floats(0, 4), st.integers(1, 9), st.booleans())
def test_render_of_constant_density(seed, sigma, samples, stratified):
    """Opacity 1 − e^{−σ·chord}, wherever in its interval a sample lies; mean depth
    near + (1 − e^{−σ·chord})/σ up to that place."""
    o, d = fan(seed)
    near, far = nerf.intersect_box(o, d, 1.0)
    picture = render(field(sigma=sigma), o, d, samples, 0.0, rng(seed) if stratified else None, 0)
    close(picture.opacity, 1 - torch.exp(-sigma * (far - near)), **TIGHT)
    depth = near + picture.opacity / sigma if sigma > 1e-9 else far
    spacing = (far - near) / samples
    assert ((picture.depth - depth).abs() <= spacing * (1 if stratified else 0.5) + 1e-9).all()
    white = render(field(sigma=sigma), o, d, samples, 1.0, rng(seed) if stratified else None, 0)
    close(white.rgb - picture.rgb, (1 - picture.opacity)[:, None].expand(-1, 3), **TIGHT)


def test_render_of_nothing_and_of_a_wall():
    o, d = fan(0)
    near, far = nerf.intersect_box(o, d, 1.0)
    empty, wall = render(field(sigma=0.0), o, d, 4, 0.3), render(field(sigma=1e6), o, d, 4, 0.3)
    close(empty.rgb, torch.full((12, 3), 0.3, **DOUBLE), **TIGHT)
    close(empty.depth, far, **TIGHT)
    first = near + (far - near) / 8                           # the middle of the first interval
    close(wall.depth, first, **TIGHT)
    f = field(sigma=1e6)
    close(wall.rgb, f(o + first[:, None] * d, d)[1], **TIGHT)
    f.forward = lambda x, d: (torch.full_like(x[:, 0], 1e6), d)
    close(render(f, o, d, 4).rgb, d, **TIGHT)                 # each sample is told its own ray's


def test_stratified_samples_stay_in_their_interval(monkeypatch):
    o, d = fan(1)
    places, f = [], field(sigma=1.0)

    def everywhere(x):
        places.append(x)
        return torch.ones(x.shape[:-1], dtype=torch.bool)
    monkeypatch.setattr(f, "occupancy", everywhere)
    near, far = nerf.intersect_box(o, d, 1.0)
    for seed in range(3):
        render(f, o, d, 7, rng=rng(seed))
    for x in places:
        t = ((x - o[:, None]) * d[:, None]).sum(-1)
        i = (t - near[:, None]) / ((far - near) / 7)[:, None]
        assert (i.floor() == torch.arange(7)).all() and i.frac().std() > 0.1


@given(seeds)
def test_skipping_changes_less_than_what_is_skipped(seed):
    """Leaving out the samples S changes a colour by at most 1 − exp(−Σ_S σδ): the light that they
    alone could stop."""
    f, (o, d), samples = field(seed), fan(seed), 10
    whole = render(f, o, d, samples, 0.5, cutoff=0)
    f.occupied = rand(4, 4, 4, seed=seed + 2) < 0.5
    part = render(f, o, d, samples, 0.5, cutoff=0)
    everywhere = torch.ones_like(f.occupied)
    skipped = Field(f.sigma * ~f.occupied, f.rgb, everywhere)
    bound = render(skipped, o, d, samples, 0.5, cutoff=0).opacity
    assert ((whole.rgb - part.rgb).abs().amax(1) <= bound + 1e-12).all()
    assert (whole.opacity - part.opacity <= bound + 1e-12).all()
    thinner = Field(f.sigma * f.occupied, f.rgb, everywhere)
    close(part, render(thinner, o, d, samples, 0.5, cutoff=0), **TIGHT)


@given(seeds, st.floats(1e-3, 0.5))
def test_early_termination_changes_less_than_the_cutoff(seed, cutoff):
    f, (o, d) = field(seed), fan(seed)
    f.sigma = 20 * f.sigma
    whole, cut = (render(f, o, d, 16, 0.5, cutoff=c) for c in (0, cutoff))
    assert ((whole.rgb - cut.rgb).abs() <= cutoff).all()
    assert (whole.opacity - cut.opacity >= -1e-12).all()


def test_early_termination_stops_behind_a_wall(monkeypatch):
    """Of 15 samples in an opaque box the field is only asked about the first quarter."""
    f, (o, d), counts = field(sigma=100.0), fan(0), []

    def counted(x, d):
        counts.append(len(x))
        return Field.forward(f, x, d)
    monkeypatch.setattr(f, "forward", counted)
    for cutoff in (0, 1e-3):
        render(f, o, d, 15, cutoff=cutoff)                    # T < 1e-3 after the first quarter
    assert counts == [12 * 4] * 3 + [12 * 3, 12 * 4, 0, 0, 0]


def test_skipping_by_the_grid_of_a_nerf():
    """Each sample left out is less opaque than `least`, so the picture changes by at most
    1 − (1 − least)^S; and most of the space is left out."""
    field, samples, least = small(blob=20.0), 32, 1e-3
    o, d = camera_rays(16)
    with torch.no_grad():
        whole = render(field, o, d, samples, cutoff=0)
        field.update_grid(2 * 3 ** 0.5 / samples, least=least)    # the longest spacing there is
        part = render(field, o, d, samples, cutoff=0)
    assert 0.02 < field.occupied.float().mean() < 0.6
    assert (whole.rgb - part.rgb).abs().max() <= 1 - (1 - least) ** samples
    assert whole.opacity.max() > 0.9 and not torch.equal(whole.rgb, part.rgb)


def test_grid_holds_what_is_dense_and_its_neighbours():
    """Cell by cell: occupied where σ at its centre or at a neighbour's makes a sample opaque."""
    field, spacing, least = small(), 0.1, 0.05
    field.update_grid(spacing, least=least)
    dense = set()
    for cell in itertools.product(range(8), repeat=3):
        centre = torch.tensor([[(i + 0.5) / 4 - 1 for i in cell]])
        if 1 - math.exp(-field.geometry(centre)[0].item() * spacing) > least:
            dense.add(cell)
    for cell in itertools.product(range(8), repeat=3):
        near = itertools.product(*(range(i - 1, i + 2) for i in cell))
        assert field.occupied[cell] == any(c in dense for c in near)
        centre = torch.tensor([(i + 0.5) / 4 - 1 for i in cell])
        assert field.occupancy(centre) == field.occupied[cell]


def test_grid_looks_anywhere_in_its_cells(monkeypatch):
    """At one random point of each, or at all their middles."""
    field, points = small(box=2.0), []

    def empty(x):
        points.append(x)
        return x.new_zeros(len(x)), None
    monkeypatch.setattr(field, "geometry", empty)
    for random in (None, rng(1), rng(2)):
        field.update_grid(0.1, random)
    corner = torch.tensor(list(itertools.product(range(8), repeat=3)))
    middle, *places = ((x / 2 + 1) * 4 - corner for x in points)              # in the cell, 0 … 1
    close(middle, torch.full((512, 3), 0.5))
    for place in places:
        assert -1e-5 < place.min() < 0.05 and 0.95 < place.max() < 1 + 1e-5
    assert (places[0] - places[1]).abs().mean() > 0.2


def test_grid_forgets_what_has_gone():
    field = small()
    field.update_grid(0.05)
    before = field.occupied.float().mean()
    field.inner[2].bias.data[0] = -100
    for _ in range(50):
        field.update_grid(0.05)
    assert before > 0.05 and not field.occupied.any()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_render_takes_any_shape_in_any_chunks(shape):
    o, d = (v[:math.prod(shape)].view(*shape, 3) for v in fan(2, 24))
    back = rand(*shape, 3)
    whole = render(field(), o, d, 6, back, rng(), 0.5)
    assert whole.rgb.shape == (*shape, 3) and whole.depth.shape == shape
    with torch.no_grad():
        close(render(field(), o, d, 6, back, rng(), 0.5, chunk=5), whole, **TIGHT)


def test_gradients_reach_all_parameters():
    field = small(view=True)
    o, d = camera_rays(8)
    picture = render(field, o, d, 8, field.background.sigmoid(), rng())
    (picture.rgb.sum() + picture.depth.sum()).backward()
    for name, parameter in field.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_normals_of_a_blob_point_outwards():
    x = torch.randn(20, 3, generator=rng()) * 0.2
    close(small().normal(x), torch.nn.functional.normalize(x, dim=1), rtol=0, atol=0.01)


def test_normals_of_a_depth_map():
    """A ball's, from its true depth: the direction from its centre."""
    truth = solids.render(["ball"], ["red"], lambda n: nerf.rays(
        camera_to_world(20.0, 30.0, 2.7), 40.0, n), 32)
    o, d = camera_rays(32)
    x = (o + truth.depth[0, 0, ..., None] * d)[10:22, 10:22]
    close(pictures.depth_normals(x[None])[0], torch.nn.functional.normalize(x, dim=-1), rtol=0,
          atol=0.05)


def test_colours_depend_on_the_direction_only_if_asked():
    x, d = torch.randn(9, 3, generator=rng()) * 0.3, torch.nn.functional.normalize(
        torch.randn(9, 3, generator=rng(1)), dim=1)
    assert torch.equal(small()(x, d)[1], small()(x, -d)[1])
    assert not torch.equal(small(view=True)(x, d)[1], small(view=True)(x, -d)[1])


def test_dense_points_keep_a_gradient():
    """exp is exp up to e⁹ and goes on as its tangent there."""
    for height in (8.5, 9.5, 20.0):
        field = small(density="exp", blob=height)
        for layer in field.inner:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
        x = torch.tensor([[0.01, 0.0, 0.0]], requires_grad=True)
        sigma, log = field.geometry(x)[0], height * (1 - 0.01 / field.blob_radius)
        expected = math.exp(log) if log < 9 else math.exp(9) * (log - 8)
        close(sigma, torch.tensor([expected]), rtol=1e-4, atol=0)
        sigma.backward()
        slope = -math.exp(min(log, 9)) * height / field.blob_radius
        close(x.grad[0, 0], torch.tensor(slope), rtol=1e-3, atol=0)


def test_a_checkpoint_renders_the_same_picture(tmp_path):
    field = small(view=True, seed=3)
    nn.init.normal_(field.table, generator=rng())
    field.update_grid(0.1)
    field.save(tmp_path / "nerf.safetensors")
    again = NeRF.load(tmp_path / "nerf.safetensors", kernels="torch")
    with torch.no_grad():
        assert all(map(torch.equal, *(render(f, *camera_rays(8), 8) for f in (field, again))))
    with pytest.raises(OSError):
        field.save(tmp_path / "nowhere" / "nerf.safetensors")
    (tmp_path / "other").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is no NeRF"):
        NeRF.load(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_the_same_seed_gives_the_same_field():
    assert torch.equal(small(seed=1).table, small(seed=1).table)
    assert not torch.equal(small(seed=1).inner[0].weight, small(seed=2).inner[0].weight)


def test_a_new_field_is_grey_and_its_colours_stay_within_bounds():
    """The table starts in ±1e-4, as Instant-NGP's."""
    field, x = small(), torch.randn(9, 3, generator=rng()) * 0.3
    assert 0.99e-4 < field.table.max() <= 1e-4 and -1e-4 <= field.table.min() < -0.99e-4
    close(field(x)[1], torch.full((9, 3), 0.5), rtol=0, atol=1e-3)
    field.outer[2].bias.data += 100
    assert (field(x)[1] == 1).all()


def test_nerf_stands_alone(tmp_path, monkeypatch):
    """Copied into an empty folder, where neither our other files nor other libraries are found."""
    missing = ("asd", "prior", "cli", "tiny", "nerf_kernels", "triton", "diffusers",
               "transformers", "pydantic", "PIL", "skimage", "trimesh", "tqdm")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)           # importing it is an ImportError
    for name in [name for name in sys.modules if name.startswith(("cli.", "tiny."))]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location("copied", shutil.copy(nerf.__file__, tmp_path))
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    o, d = torch.tensor([[3.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]])
    assert copied.render(copied.NeRF(blob=10.0), o, d).opacity > 0.9
    assert not copied.use_triton("auto", SimpleNamespace(is_cuda=True))
    with pytest.raises(ValueError, match="nerf_kernels.py beside nerf.py"):
        copied.render(copied.NeRF(kernels="triton"), o, d)


@pytest.mark.parametrize("wrong", [{"size": 1000}, {"finest": 2}, {"density": "relu"}])
def test_fields_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="must be"):
        small(**wrong)


# -------------------------------------------------------------------------------------- fitting
def test_posed_pictures_of_a_solid():
    learnt, held_out = nerf.builtin_scene("ball", "blue", 3, 2, 16)
    assert learnt.color.shape == (3, 16, 16, 3) and held_out.opacity.shape == (2, 16, 16)
    close(learnt.over(1.0)[:, 0, 0], torch.ones(3, 3))
    assert not torch.equal(learnt.origins[:2], held_out.origins)


def transforms(folder, count, split=""):
    """A folder in NeRF-synthetic's format: a blue ball. -> Posed."""
    posed = nerf.builtin_scene("ball", "blue", count, 0, 32)[0]
    azimuth = torch.rand(2, count, generator=rng())
    c2w = camera_to_world(90 * azimuth[0] - 20, 360 * azimuth[1], 2.7)
    frames = []
    for i in range(count):
        alpha = posed.opacity[i, ..., None]
        rgba = torch.cat([posed.color[i] / alpha.clamp(min=1e-6), alpha], -1).clamp(0, 1)
        Image.fromarray((rgba * 255).round().byte().numpy()).save(folder / f"r{split}_{i}.png")
        frames.append({"file_path": f"./r{split}_{i}", "transform_matrix": c2w[i].tolist()})
    (folder / f"transforms{split}.json").write_text(
        json.dumps({"camera_angle_x": math.radians(40), "frames": frames}))
    return posed


def test_transforms_json_is_read_back(tmp_path):
    posed = transforms(tmp_path, 8)
    learnt, held_out = nerf.posed_folder(tmp_path, 32)
    assert len(learnt.color) == 7 and len(held_out.color) == 1
    close(learnt.directions, posed.directions[:7], rtol=0, atol=1e-5)
    close(learnt.origins, posed.origins[:7], rtol=0, atol=1e-5)
    close(learnt.color, posed.color[:7], rtol=0, atol=0.01)
    transforms(tmp_path, 3, "_train"), transforms(tmp_path, 2, "_test")
    transforms(tmp_path, 1, "_val")
    assert [len(p.color) for p in nerf.posed_folder(tmp_path, 16)] == [3, 2]
    assert nerf.posed_folder(tmp_path, 16)[0].color.shape == (3, 16, 16, 3)


def test_wide_pictures_keep_their_angle(tmp_path):
    """camera_angle_x is the horizontal one: at 90° the left edge is at x = −1, the top at ½."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "wide.png")
    frame = {"file_path": "wide.png", "transform_matrix": torch.eye(4).tolist()}
    for angle in ({"camera_angle_x": math.pi / 2}, {"w": 40, "fl_x": 20}):
        (tmp_path / "transforms.json").write_text(json.dumps({"frames": [frame]} | angle))
        posed = nerf.read_transforms(tmp_path / "transforms.json", 10)
        assert posed.color.shape == (1, 10, 20, 3) and (posed.opacity == 1).all()
        corner = posed.directions[0, 0, 0]
        close(corner / -corner[2], torch.tensor([-0.95, 0.45, -1]))      # the pixel's centre
    bad = {"transform_matrix": torch.zeros(4, 4).tolist()}
    for wrong in ({"w": 40, "fl_x": 0}, {}, angle | {"frames": []},
                  angle | {"frames": [frame | bad] * 4},
                  angle | {"frames": [frame | {"file_path": "nowhere"}]}):
        (tmp_path / "transforms.json").write_text(json.dumps({"frames": [frame]} | wrong))
        with pytest.raises(ValueError, match="cannot be used"):
            nerf.read_transforms(tmp_path / "transforms.json", 10)


@pytest.fixture(scope="module")
def two_pictures():
    """Of a blue ball, 8 pixels each."""
    return nerf.builtin_scene("ball", "blue", 2, 0, 8)[0]


def test_fit_stops_where_the_loss_is_not_finite(two_pictures):
    with pytest.raises(FloatingPointError, match="at step 1"):
        nerf.fit(small(), two_pictures, 3, 16, 4, lr=1e30)


def test_fit_of_bytes(two_pictures):
    for factor in (255, -1):
        with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
            nerf.fit(NeRF(), two_pictures._replace(color=factor * two_pictures.color), 1)


def test_fit_of_empty_pictures(two_pictures):
    """Nothing to see: white pictures on white are fitted without an error."""
    nothing, field = torch.zeros_like(two_pictures.color), small()
    empty = two_pictures._replace(color=nothing, opacity=nothing[..., 0])
    field.inner[2].bias.data[0] = -100
    nerf.fit(field, empty, 2, 16, 4, background=(1.0, 1.0, 1.0))
    assert all(p.isfinite().all() for p in field.parameters())


def test_fit_finds_a_ball():
    """A few seconds are enough for a ball: more than 20 dB on views it has not seen."""
    learnt, held_out = nerf.builtin_scene("ball", "blue", 16, 4, 24)
    field = NeRF(levels=4, size=1 << 12, base=4, finest=24, cells=16, density="exp",
                 blob=5.0, blob_radius=0.6, kernels="torch")
    losses = []
    nerf.fit(field, learnt, 100, 256, 24, callback=lambda step, loss: losses.append(loss))
    picture = nerf.look(field, held_out, 32)
    assert losses[-1] < losses[0] / 4
    assert nerf.psnr(picture.rgb, held_out.over(1.0)) > 20


def test_fit_lets_its_rate_fall_and_renews_the_grid(two_pictures, monkeypatch):
    """The rate falls to a tenth; the grid is renewed each 16th step, for the samples' spacing.

    The pictures are put on the given background.
    """
    field, rates, spacings, grounds, ground = small(box=1.5), [], [], [], (0.2, 0.4, 0.6)
    monkeypatch.setattr(field, "update_grid", lambda spacing, rng: spacings.append(spacing))

    class Noted(torch.optim.Adam):
        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args)
    monkeypatch.setattr(torch.optim, "Adam", Noted)

    def rendered(field, origins, directions, samples, background, *rest):
        grounds.append(background)
        return render(field, origins, directions, samples, background, *rest)
    monkeypatch.setattr(nerf, "render", rendered)
    nerf.fit(field, two_pictures, 20, 16, 6, lr=0.1, background=ground)
    assert all(torch.equal(each, torch.tensor(ground)) for each in grounds)
    assert rates == pytest.approx([0.1 * 0.1 ** (step / 20) for step in range(20)])
    assert spacings == [0.5, 0.5]


def test_fit_is_repeatable(two_pictures):
    one, two = small(), small()
    for field in (one, two):
        nerf.fit(field, two_pictures, 3, 64, 8)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def test_psnr_by_hand():
    assert nerf.psnr(torch.zeros(2, 5), torch.full((2, 5), 0.1)) == pytest.approx(20)


@pytest.mark.parametrize("flags, message", [
    (["red dragon"], "neither a folder nor a solid"),
    (["{tmp}"], "transforms.json cannot be used"),
    (["mug", "--kernels", "triton", "--device", "cpu"], "need CUDA, Triton"),
    (["mug", "--device", "tpu9"], "tpu9"),
    pytest.param(["mug", "--device", "cuda"], "--device cuda cannot be used here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")),
    (["mug", "--steps", "0"], "--steps"),
    (["ball", "--steps", "3", "--lr", "1e30", "--seed", "0", "--size", "8", "--pictures",
      "2", "--batch", "16", "--samples", "4", "--device", "cpu"], "loss is not finite"),
    (["mug", "--kernels", "cuda"], "--kernels"), ([], "neither a folder nor a solid"),
])
def test_mistakes_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    try:
        status = nerf.main([flag.format(tmp=tmp_path) for flag in flags])
    except SystemExit as stop:
        status = stop.code
    err = [line for line in capsys.readouterr().err.strip().split("\n") if "%|" not in line]
    assert status == 2 and len(err) == 1 and message in err[0], err


def test_fit_leaves_another_run_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert nerf.main(["ball", "--pictures", "1", "--size", "8", "--device", "cpu",
                      "--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture
def coarse(monkeypatch):
    """The pictures and the mesh of a run, but small ones."""
    small_ones = functools.partial(nerf.write_all, size=8, frames=3, cells=16)
    monkeypatch.setattr(nerf, "write_all", small_ones)


def test_numbers_that_no_fit_can_have():
    posed = nerf.solid_pictures("ball", "red", nerf.orbit(1), size=4)
    field = nerf.NeRF(levels=2, size=64, view=True)
    for name in ("steps", "batch", "samples"):
        with pytest.raises(ValueError, match=f"{name} 0"):
            nerf.fit(field, posed, **{name: 0})
    with pytest.raises(ValueError, match="give directions"):
        field(torch.zeros(2, 3))


def test_fit_command(tmp_path, monkeypatch, capsys, coarse):
    monkeypatch.chdir(tmp_path)
    assert nerf.main(["blue ball", "--pictures", "2", "--size", "8", "--steps", "8",
                      "--batch", "64", "--samples", "16", "--threshold", "4", "--seed", "0",
                      "--device", "cpu"]) == 0
    out = tmp_path / "outputs/fit-blue-ball"
    assert {p.name for p in out.iterdir()} >= {"nerf.safetensors", "truth.png", "views.png",
                                               "turntable.gif", "mesh.glb", "viewer.html"}
    assert "PSNR on 8 held-out views" in capsys.readouterr().out
    assert Image.open(out / "turntable.gif").n_frames == 3


def test_a_fit_is_written_before_its_numbers(tmp_path, monkeypatch, coarse):
    """Nobody may be reading them any more: `nerf.py … | true`."""
    monkeypatch.chdir(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert nerf.main(["blue ball", "--pictures", "2", "--size", "8", "--steps", "2", "--batch",
                          "64", "--samples", "16", "--device", "cpu", "--out", "o"]) == 141
    assert Path("o/nerf.safetensors").exists() and Path("o/viewer.html").exists()


# ------------------------------------------------------------------------------ mesh and viewer
class Ball(Field):
    """Density 20 at the distance ½ from CENTRE, less outside; the colour is the place."""
    CENTRE = torch.tensor([0.2, -0.1, 0.3])

    def __init__(self):
        super().__init__(*([torch.ones(1, 1, 1)] * 3))
        self.table = torch.zeros(1)

    def geometry(self, x):
        return 40 * torch.sigmoid(20 * (0.5 - (x - self.CENTRE).norm(dim=1))), x

    def forward(self, x, d=None):
        return self.geometry(x)[0], (x + 1) / 2

    def occupancy(self, x):
        return torch.ones_like(x[..., 0], dtype=torch.bool)

    normal = NeRF.normal


def ball_mesh(threshold, resolution):
    ball = Ball()
    return pictures.extract_mesh(lambda x: ball.geometry(x)[0], lambda x: ball(x)[1], 1.0,
                                 threshold, resolution)


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("trimesh"), pytest.importorskip("skimage")
    return ball_mesh(20.0, 48)


def test_mesh_of_a_ball(mesh):
    """Place, radius and volume, faces outwards, closed; the colours are the field's."""
    close((torch.from_numpy(mesh.vertices) - Ball.CENTRE).norm(dim=1),
          torch.full((len(mesh.vertices),), 0.5, **DOUBLE), rtol=0, atol=2e-3)
    assert mesh.volume == pytest.approx(4 / 3 * math.pi / 8, rel=0.01) and mesh.is_watertight
    assert np.abs(mesh.visual.vertex_colors[:, :3] / 255 - (mesh.vertices + 1) / 2).max() < 0.003


def test_mesh_of_nothing():
    pytest.importorskip("trimesh"), pytest.importorskip("skimage")
    with pytest.raises(ValueError, match="no surface.*--threshold"):
        ball_mesh(50.0, 16)


def test_mesh_file_and_page(mesh, tmp_path):
    """The GLB is y-up with linear colours; the page needs nothing from outside."""
    import trimesh
    pictures.write_mesh(tmp_path, mesh)
    again = trimesh.load(tmp_path / "mesh.glb", force="mesh")
    close(torch.from_numpy(again.vertices[:, [2, 0, 1]]), torch.from_numpy(mesh.vertices),
          rtol=0, atol=1e-5)
    page = (tmp_path / "viewer.html").read_text()
    assert not any(word in page for word in ("http:", "https:", "src=", "import(", "fetch"))


def seen_from(turn, tilt, away):
    """By hand: the ball's colour in the middle of the page, the part of the page that it covers."""
    toward = np.array([math.cos(tilt) * math.cos(turn), -math.cos(tilt) * math.sin(turn),
                       math.sin(tilt)])                                # the eye; z is up
    middle, size = Ball.CENTRE.numpy(), 0.8                            # its farthest coordinate
    along = middle @ toward
    place = (along + math.sqrt(0.25 - middle @ middle + along ** 2)) * toward
    distance = np.linalg.norm(away * size * toward - middle)
    # in the light, which stands behind the eye, up and to the left of it
    right = np.array([math.sin(turn), math.cos(turn), 0])
    up = np.array([-math.sin(tilt) * math.cos(turn), math.sin(tilt) * math.sin(turn),
                   math.cos(tilt)])
    normal = (place - middle) / 0.5
    shade = 0.3 + 0.7 * max(0, normal @ (0.768 * toward + 0.5 * up - 0.4 * right))
    part = math.pi / 4 * (2.5 * 0.5) ** 2 / (distance ** 2 - 0.25)
    return shade * (place + 1) / 2, part


@pytest.mark.parametrize("event, turn, tilt, away", [
    ("", 0.5, 0.35, 4),
    ("new PointerEvent('pointermove', {movementX: 300, movementY: 60})", 0.5, 0.35, 4),
    ("new PointerEvent('pointermove', {movementX: 300, movementY: 60, buttons: 1})", 2.5, 0.75, 4),
    ("new WheelEvent('wheel', {deltaY: 365})", 0.5, 0.35, 6)])                 # 4 e^(365/900)
def test_page_shows_the_mesh(mesh, tmp_path, event, turn, tilt, away):
    """In headless Chromium, opened from disk: the ball on a white page; a drag turns it, the wheel
    moves it away."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here")
    pictures.write_mesh(tmp_path, mesh)
    page = tmp_path / "viewer.html"
    script = "document.querySelector('p').remove();"           # the buttons lie over the picture
    if event:
        script += f"canvas.dispatchEvent({event})"
    page.write_text(page.read_text() + f"<script>{script}</script>")
    subprocess.run([chromium, "--headless", "--no-sandbox", "--use-angle=swiftshader",
                    "--enable-unsafe-swiftshader", "--hide-scrollbars", "--window-size=300,300",
                    f"--screenshot={tmp_path / 'page.png'}", f"--user-data-dir={tmp_path / 'user'}",
                    "--virtual-time-budget=3000", page.as_uri()],
                   check=True, capture_output=True, timeout=120)
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")) / 255
    assert (page[0, 0] == 1).all()
    middle, part = seen_from(turn, tilt, away)
    assert np.abs(page[page.shape[0] // 2, page.shape[1] // 2] - middle).max() < 0.02
    assert (page.min(2) < 0.99).mean() == pytest.approx(part, rel=0.05)


@pytest.mark.parametrize("box", [0.5, 4.0])
def test_a_field_in_another_box_is_the_same_enlarged(box):
    """Powers of two: bit for bit."""
    one, other, x = small(), small(box=box), 2 * torch.rand(99, 3, generator=rng()) - 1
    for field in (one, other):
        field.update_grid(0.05)
    assert 0.02 < one.occupied.float().mean() < 0.9
    assert all(map(torch.equal, one(x), other(box * x)))
    assert torch.equal(one.occupied, other.occupied)
    assert torch.equal(one.occupancy(x), other.occupancy(box * x))


def test_a_turntable_with_a_film(monkeypatch, tmp_path):
    """ffmpeg is given the gif, and a place for the mp4 that is no half-written mp4."""
    (tmp_path / "ffmpeg").write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    pictures.write_turntable(tmp_path / "turntable.gif", torch.rand(2, 8, 8, 3))
    assert {p.name for p in tmp_path.iterdir()} == {"ffmpeg", "turntable.gif", "turntable.mp4"}
    arguments = (tmp_path / "turntable.mp4").read_text()
    assert "turntable.gif" in arguments and "mp4.tmp" in arguments


def test_a_turntable_without_a_film(monkeypatch, tmp_path, capsys):
    """An ffmpeg that fails costs the mp4, not the run."""
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    pictures.write_turntable(tmp_path / "turntable.gif", torch.rand(2, 8, 8, 3))
    assert {p.name for p in tmp_path.iterdir()} == {"ffmpeg", "turntable.gif"}
    assert "no turntable.mp4" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- benchmarks
devices = pytest.mark.parametrize("device_name, kernels", [
    ("cpu", "torch"),
    pytest.param("cuda", "torch", marks=cuda), pytest.param("cuda", "triton", marks=cuda)])


def timed(benchmark, function, device_name, rounds=3):
    def call():
        function()
        if device_name == "cuda":
            torch.cuda.synchronize()
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)


@devices
@pytest.mark.parametrize("size, samples", [(64, 64), (256, 128)])
def test_time_of_render_and_backward(benchmark, device_name, kernels, size, samples):
    if size > 64 and device_name == "cpu":
        pytest.skip("a GPU's size")
    field = NeRF(blob=10.0, kernels=kernels).to(device_name)
    field.update_grid(2 / samples)
    o, d = (v.to(device_name) for v in camera_rays(size))

    def step():
        render(field, o, d, samples, rng=rng()).rgb.sum().backward()
    timed(benchmark, step, device_name, 3 if size == 64 else 1)
    assert field.table.grad.isfinite().all()


@devices
def test_time_of_encoding(benchmark, device_name, kernels):
    field = NeRF().to(device_name)
    x = torch.rand(1 << 14, 3, generator=rng()).to(device_name)
    timed(benchmark, lambda: hash_encode(x, field.table, field.resolutions, field.size,
                                         kernels).sum().backward(), device_name)


@devices
def test_time_of_compositing(benchmark, device_name, kernels):
    sigma, values = (torch.rand(4096, 64, *c, generator=rng()).to(device_name).requires_grad_()
                     for c in ((), (4,)))
    delta = torch.full((4096,), 0.03, device=device_name)
    timed(benchmark, lambda: composite(sigma, delta, values, kernels)[0].sum().backward(),
          device_name)
