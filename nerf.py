"""nerf.py — a small NeRF in plain PyTorch: a hash grid, its renderer, fitting posed pictures.

    from nerf import NeRF, render                  # this file and torch are enough
    picture = render(NeRF(), origins, directions)  # .rgb [..., 3], .opacity [...], .depth [...]

    python nerf.py "red mug"                       # fits posed pictures of a built-in solid …
    python nerf.py nerf_synthetic/lego             # … or of a folder with transforms.json

| what                                                    | function    | in test_nerf.py  |
|---------------------------------------------------------|-------------|------------------|
| multiresolution hash encoding (Instant-NGP, 2201.05989) | hash_encode | test_encoding_…  |
| volume rendering (NeRF, 2003.08934, Eq. 3)              | composite   | test_composite_… |
| what skipping empty space may change                    | render      | test_skipping_…  |
| least squares over rays of posed pictures               | fit         | test_fit_…       |
| lenses that bend the rays (OpenCV's two models)         | undistort   | test_cameras.py  |

nerf_kernels.py has the first two as Triton kernels, for CUDA. To import this file, torch alone is
needed; the command also needs cli/ and tiny/solids.py. text_to_3d.py makes a NeRF from a prompt.

World: z is up, the object's front faces +x, the scene fills the box [−box, box]³. Cameras are
OpenGL's (x right, y up, looking down −z), as in a NeRF transforms.json. N points, R rays, S samples
on each; σ is the density per unit of length; colours are RGB in [0, 1].
"""
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":     # so that a failed import prints a line, and no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parent))     # python -I and -P omit this folder
    if not Path(__file__).resolve().with_name("cli").is_dir():
        print(f"{Path(__file__).name}: copied out alone it is a library, to be imported: the "
              "command needs all of the clone beside it", file=sys.stderr)
        sys.exit(2)
    import cli.start  # noqa: F401

import torch
from torch import nn
from torch.nn import functional as F

# ------------------------------------------------------------ the multiresolution hash encoding
# of Instant-NGP's hash; modulo 2³², of which only the low bits are kept
PRIMES = (1, 2654435761 - 2 ** 32, 805459861)


def layout(resolutions, size):
    """Levels of n cells a side -> (first row of each level and the end, how many are dense).

    A level whose (n + 1)³ vertices fit into `size` rows is dense, each vertex has a row of its own;
    in finer ones the vertices share `size` rows, a power of two.
    """
    vertices = [(n + 1) ** 3 for n in resolutions]
    # the levels lie in one table, one behind the other
    offsets = itertools.accumulate((min(v, size) for v in vertices), initial=0)
    # resolutions grow, so the dense levels are the first ones
    return list(offsets), sum(v <= size for v in vertices)


def corners(x, resolutions, size):
    """x [N, 3] in [0, 1] -> rows of the table and weights, both [8, L, N], of each cell's vertices.
    """
    offsets, dense = layout(resolutions, size)
    # a number for each level, or for each axis, as a column beside the points
    column = lambda values: torch.tensor(values, dtype=torch.int32, device=x.device)[:, None]
    n, first, prime = column(resolutions), column(offsets[:-1]), column(PRIMES)
    p = x.t()[:, None] * n                                               # [3, L, N]
    cell = p.detach().floor().clamp(min=0).minimum(n - 1)                # its lower vertex
    f = p - cell                                                         # the place in it, 0 … 1
    # w = Π_axes (f or 1 − f): piecewise trilinear, so continuous across cells
    f = torch.stack([1 - f, f])                                          # [2, 3, L, N]
    w = f[:, None, None, 0] * f[None, :, None, 1] * f[None, None, :, 2]  # [2, 2, 2, L, N]
    v = torch.stack([cell, cell + 1]).int()                              # vertices, [2, 3, L, N]
    stride = torch.stack([torch.ones_like(n), n + 1, (n + 1) ** 2])
    a, b, c = (v[:, i, :dense] * stride[i, :dense] for i in range(3))
    # dense: x + (n + 1) (y + (n + 1) z)
    exact = (a + first[:dense])[:, None, None] + b[None, :, None] + c[None, None]
    a, b, c = (v[:, i, dense:] * prime[i] for i in range(3))
    # hashed: (x π₁ ⊕ y π₂ ⊕ z π₃) mod size
    hashed = (a[:, None, None] ^ b[None, :, None] ^ c[None, None]) & (size - 1)
    return torch.cat([exact, hashed + first[dense:]], -2).flatten(0, 2), w.flatten(0, 2)


class _Interpolate(torch.autograd.Function):
    """Σ_k w[k] table[row[k]]: table [rows, F], row and w [8, M] -> [M, F].

    embedding_bag is the fastest of torch's functions for it on the CPU, but its own gradient of the
    table is 20 times slower than these histograms. The gradients have no gradient.
    """

    @staticmethod
    def forward(ctx, table, row, w):
        ctx.save_for_backward(table, row, w)
        return F.embedding_bag(row.t(), table, per_sample_weights=w.t(), mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        table, row, w = ctx.saved_tensors
        to_table = to_w = None
        # ∂L/∂table[j] = Σ_{k: row[k] = j} w[k] ∂L/∂h, a weighted histogram for each feature
        if ctx.needs_input_grad[0]:
            columns = [torch.bincount(row.flatten(), (w * g).flatten(), len(table))
                       for g in grad.t()]
            to_table = torch.stack(columns, 1).to(table)
        # ∂L/∂w[k] = ⟨table[row[k]], ∂L/∂h⟩
        if ctx.needs_input_grad[2]:
            to_w = torch.stack([(table[r] * grad).sum(1) for r in row])
        return to_table, None, to_w


def hash_encode(x, table, resolutions, size, kernels="torch"):
    """x [N, 3] in [0, 1], table [rows, F] as `layout` has it -> features [N, L·F]; differentiable.

    Instant-NGP: at each level, the trilinear interpolation of the F features of the eight vertices
    around x. kernels: "torch", "triton" or "auto" (Triton on CUDA where it is installed).
    """
    if use_triton(kernels, x):
        from nerf_kernels import Encode
        offsets, dense = layout(resolutions, size)
        # of a level: cells a side, its first row, whether each vertex has a row of its own
        levels = [(n, first, l < dense) for l, (n, first) in enumerate(zip(resolutions, offsets))]
        return Encode.apply(x, table, levels, size)
    row, w = corners(x, resolutions, size)
    # h_l(x) = Σ_vertices w · table[row]
    h = _Interpolate.apply(table, row.flatten(1), w.flatten(1))          # [L·N, F]
    return h.view(len(resolutions), len(x), table.shape[1]).transpose(0, 1).flatten(1)


# -------------------------------------------------------------------- compositing along the rays
def composite(sigma, delta, values, kernels="torch"):
    """Volume rendering: σ [R, S] ≥ 0, δ [R] the samples' spacing, values [R, S, C].

    -> (Σ_i w_i v_i [R, C], opacity Σ_i w_i [R] in [0, 1]); exact where σ and v are constant within
    each sample's interval.
    """
    # the kernel gives δ no gradient
    if use_triton(kernels, sigma) and not delta.requires_grad:
        from nerf_kernels import Composite
        return Composite.apply(sigma, delta, values)
    # w_i = T_i (1 − exp(−σ_i δ)),  T_i = exp(−Σ_{j<i} σ_j δ):  NeRF, Eq. 3
    tau = sigma * delta[:, None]
    T = torch.exp(-F.pad(tau[:, :-1], (1, 0)).cumsum(1))
    w = T * -torch.expm1(-tau)
    return torch.einsum("rs,rsc->rc", w, values), w.sum(1)


# ---------------------------------------------------------------------- the same on CUDA, by Triton
def use_triton(kernels, tensor):
    """Whether to use nerf_kernels.py: at "auto", on CUDA where it, and Triton, are installed.

    ValueError where "triton" is chosen and cannot be.
    """
    if kernels not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels is auto, torch or triton, not {kernels!r}")
    if kernels == "torch" or (kernels == "auto" and not tensor.is_cuda):
        return False
    # Triton compiles a launcher in C for each kernel; its interpreter needs neither CUDA nor that
    compiler = shutil.which("gcc") or shutil.which("clang") or os.environ.get("CC")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    runs = interpreted or (tensor.is_cuda and compiler is not None)
    able = runs and _installed("triton") and _installed("nerf_kernels")
    if kernels == "triton" and not able:
        raise ValueError("the Triton kernels need CUDA, Triton, a C compiler and nerf_kernels.py "
                         "beside nerf.py: choose --kernels auto or torch")
    return able


@functools.cache
def _installed(module):
    """Whether a module is found, without importing it."""
    return importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------------------------- the field
def check_whole(least=1, **numbers):
    """ValueError, which names it, where one is no whole number, or less than the least."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{name} is a whole number, at least {least}, not {number!r}")


class NeRF(nn.Module):
    """The field: points -> density and colour, and a grid of the cells where there is any.

    box: half the side of the scene. levels × features, `size` rows a level, `base` to `finest`
    cells a side: of the hash encoding. width: of the two small networks. density: "softplus", or
    "exp", truncated, which becomes opaque faster. blob: what is added to its argument at the
    origin; it falls to 0 at blob_radius · box. view: the colour depends on the direction. cells: of
    the occupancy grid, a side. kernels: "auto", "torch" or "triton".
    """

    def __init__(self, box=1.0, levels=8, features=2, size=2 ** 15, base=8, finest=96, width=32,
                 density="softplus", blob=10.0, blob_radius=0.5, view=False, cells=32,
                 kernels="auto", seed=0):
        super().__init__()
        # what load() makes it of again
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_whole(levels=levels, features=features, size=size, width=width, cells=cells,
                    base=base, finest=finest)
        check_whole(0, seed=seed)
        power_of_two = size & (size - 1) == 0
        if not (power_of_two and base <= finest and density in ("softplus", "exp")):
            raise ValueError(f"size {size} must be a power of two, base {base} <= finest "
                             f"{finest}, and density {density!r} softplus or exp")
        if not all(isinstance(number, (int, float)) for number in (box, blob, blob_radius)):
            raise ValueError(f"box {box!r}, blob {blob!r} and blob_radius {blob_radius!r} are "
                             "numbers")
        if not (0 < box < math.inf and blob_radius > 0 and math.isfinite(blob)):
            raise ValueError(f"box {box} and blob_radius {blob_radius} must be above 0, and blob "
                             f"{blob} finite")
        self.box, self.size, self.cells, self.view = box, size, cells, view
        self.density, self.blob, self.blob_radius = density, blob, blob_radius
        self.kernels = kernels
        # cells a side: n_l = base · b^l, from base to finest (Instant-NGP, Eqs. 2 and 3)
        growth = (finest / base) ** (1 / max(levels - 1, 1))
        self.resolutions = [int(base * growth ** l + 1e-6) for l in range(levels)]
        rng = torch.Generator().manual_seed(seed)
        offsets, _ = layout(self.resolutions, size)
        table = torch.rand(offsets[-1], features, generator=rng, device="cpu")
        self.table = nn.Parameter(1e-4 * (2 * table - 1))
        # layers that draw nothing by themselves: all randomness is rng's
        linear = functools.partial(nn.utils.skip_init, nn.Linear)
        self.inner = nn.Sequential(linear(levels * features, width), nn.ReLU(),
                                   linear(width, 16))                    # log-density and features
        self.outer = nn.Sequential(linear(15 + 3 * view, width), nn.ReLU(), linear(width, 3))
        for layer in (*self.inner, *self.outer):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, math.sqrt(5), generator=rng)
                nn.init.zeros_(layer.bias)
        self.background = nn.Parameter(torch.zeros(3))                   # learnt, where asked for
        self.register_buffer("peak", torch.zeros(cells, cells, cells))   # σ, decaying
        self.register_buffer("occupied", torch.ones(cells, cells, cells, dtype=torch.bool))

    def geometry(self, x):
        """x [N, 3] -> (σ [N], features [N, 15])."""
        unit = (x / self.box + 1) / 2                                    # [−box, box] -> [0, 1]
        h = self.inner(hash_encode(unit, self.table, self.resolutions, self.size, self.kernels))
        # σ = softplus or exp of h₀ + b (1 − ‖x‖/r), the blob of Magic3D and threestudio
        raw = h[:, 0] + self.blob * (1 - x.norm(dim=1) / (self.blob_radius * self.box))
        if self.density == "softplus":
            return F.softplus(raw), h[:, 1:]
        # exp(raw) up to e⁹, and then its tangent e⁹ (1 + raw − 9), which keeps a gradient
        low = raw.clamp(max=9)
        return low.exp() * (1 + raw - low), h[:, 1:]

    def forward(self, x, directions=None):
        """x [N, 3], unit directions [N, 3] where view is on -> (σ [N], RGB [N, 3])."""
        if self.view and directions is None:
            raise ValueError("the colour of this NeRF depends on the view: give directions")
        sigma, h = self.geometry(x)
        h = torch.cat([h, directions], 1) if self.view else h
        return sigma, torch.sigmoid(self.outer(h))

    def normal(self, x):
        """Unit normals [N, 3], −∇σ/‖∇σ‖, by autograd through the encoding."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -F.normalize(torch.autograd.grad(self.geometry(x)[0].sum(), x)[0], dim=1)

    def occupancy(self, x):
        """Whether the cells of x [..., 3] may hold something: bool [...]."""
        # points on the far faces belong to the last cells
        i = ((x / self.box + 1) * (self.cells / 2)).long().clamp(0, self.cells - 1).unbind(-1)
        return self.occupied.view(-1)[(i[0] * self.cells + i[1]) * self.cells + i[2]]

    @torch.no_grad()
    def update_grid(self, spacing, rng=None, least=0.01, decay=0.7):
        """Renew the occupancy grid at a random point of each cell (rng: a CPU generator), or, with
        no rng, at its middle.

        A cell is empty if no density seen of late in it or its 26 neighbours makes a sample of
        length `spacing` more opaque than `least`.
        """
        # a point of each cell, anywhere in it, so that in time no place of it is missed
        index = torch.arange(self.cells, device=self.peak.device)
        x = torch.stack(torch.meshgrid(index, index, index, indexing="ij"), -1).view(-1, 3)
        u = torch.full(x.shape, 0.5, device="cpu")
        if rng is not None:
            u = torch.rand(x.shape, generator=rng, device="cpu")
        x = ((x + u.to(x.device)) * (2 / self.cells) - 1) * self.box
        sigma = torch.cat([self.geometry(part)[0] for part in x.split(1 << 13)])
        self.peak.copy_(torch.maximum(decay * self.peak, sigma.view_as(self.peak)))
        # the neighbours too: a surface may come out of its cell before the grid is renewed
        near = F.max_pool3d(self.peak[None, None], 3, 1, 1)[0, 0]
        # 1 − exp(−σ δ), the part of the light that one sample stops
        self.occupied.copy_(1 - torch.exp(-near * spacing) > least)

    def save(self, path):
        """Write the parameters, the grid and the settings as safetensors."""
        from safetensors.torch import save
        Path(path).write_bytes(save(self.state_dict(), {"nerf": json.dumps(self.settings)}))

    @classmethod
    def load(cls, path, device="cpu", kernels="auto"):
        """Return the NeRF that save() wrote. ValueError for another file."""
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {})["nerf"])
                nerf = cls(**settings | {"kernels": kernels})
                nerf.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no NeRF of nerf.py ({type(error).__name__})") from error
        return nerf.to(device)


# --------------------------------------------------------------------------- cameras, the renderer
def camera_to_world(elevation_deg, azimuth_deg, distance):
    """Matrices [B, 4, 4] of cameras that look at the origin; inputs are floats or [B].

    The position is distance · (cos θ cos φ, cos θ sin φ, sin θ): azimuth φ = 0 looks at the front,
    90° has the object's front to the left, elevation θ = 90° looks straight down.
    """
    pose = (elevation_deg, azimuth_deg, distance)
    # the first tensor decides about the dtype and the device
    like = next((v for v in pose if torch.is_tensor(v) and v.is_floating_point()), torch.ones(1))
    theta, phi, r = torch.broadcast_tensors(
        *(torch.as_tensor(v, dtype=like.dtype, device=like.device).reshape(-1) for v in pose))
    theta, phi = torch.deg2rad(theta), torch.deg2rad(torch.remainder(phi, 360))
    # the camera's axes in the world: x to the right, y up, z back, away from what it looks at
    zero = torch.zeros_like(r)
    back = torch.stack([theta.cos() * phi.cos(), theta.cos() * phi.sin(), theta.sin(), zero], -1)
    right = torch.stack([-phi.sin(), phi.cos(), zero, zero], -1)
    up = torch.stack([-theta.sin() * phi.cos(), -theta.sin() * phi.sin(), theta.cos(), zero], -1)
    position = back * r[:, None] + torch.stack([zero, zero, zero, torch.ones_like(r)], -1)
    return torch.stack([right, up, back, position], -1)


def orbit(views, elevation=20.0, distance=2.9):
    """Cameras [views, 4, 4] around the object, the first one at its front."""
    return camera_to_world(elevation, torch.arange(views) * (360 / views), distance)


class Picture(NamedTuple):
    """What rays of any shape [...] show."""
    rgb: torch.Tensor             # [..., 3], over the background
    opacity: torch.Tensor         # [...] in [0, 1]
    depth: torch.Tensor           # [...] mean distance along the ray; the box's far side counts for
    #                               what passes through


def rays(c2w, fovy_deg, height, width=None):
    """Return origins and unit directions [B, H, W, 3] through the pixels' centres; c2w [B, 4, 4].

    fovy_deg: the full vertical angle, a number or [B].
    """
    angle = torch.as_tensor(fovy_deg, dtype=c2w.dtype, device=c2w.device).expand(len(c2w))
    return cast(c2w, pinhole(angle, height, width or height))


def pinhole(fovy_deg, height, width):
    """Return unit directions [B, H, W, 3] in a camera's own axes, of square pixels; fovy_deg [B].
    """
    # at the distance 1 the picture reaches from −tan(fovy/2) to tan(fovy/2), y upwards
    half = torch.deg2rad(fovy_deg / 2).tan()[:, None, None]
    place = lambda n: (2 * torch.arange(n, device=half.device, dtype=half.dtype) + 1) / n - 1
    x, y = half * width / height * place(width), -half * place(height)[:, None]
    d = torch.stack(torch.broadcast_tensors(x, y, -torch.ones_like(half)), -1)
    return F.normalize(d, dim=-1)


def cast(c2w, d):
    """Turn directions [B, H, W, 3] from cameras' axes into the world's. -> (origins, directions)"""
    d = d @ c2w[:, None, :3, :3].transpose(-1, -2)                       # [B, H, W, 3]
    return c2w[:, None, None, :3, 3].expand_as(d), d


def intersect_box(origins, directions, box):
    """Where the rays [R, 3] enter and leave [−box, box]³: near, far [R]; equal where they miss."""
    # nothing is divided by 0 where a ray is parallel to a face
    safe = torch.where(directions.abs() < 1e-9, 1e-9, directions)
    # where it crosses the two planes of each axis: it is inside between the last way in and the
    # first way out
    a, b = (-box - origins) / safe, (box - origins) / safe
    near, far = torch.minimum(a, b).amax(1).clamp(min=0), torch.maximum(a, b).amin(1)
    return near, torch.maximum(near, far)


def check_rays(origins, directions, samples, rng):
    """ValueError for what cannot be rendered: other shapes, no samples, places that are none."""
    check_whole(samples=samples)
    if not (torch.is_tensor(origins) and torch.is_tensor(directions)):
        raise ValueError("origins and directions are tensors [..., 3]")
    if not (rng is None or torch.is_tensor(rng) or isinstance(rng, torch.Generator)):
        raise ValueError(f"rng is a torch.Generator, or places on the rays, not {rng!r}")
    if origins.shape != directions.shape or origins.shape[-1:] != (3,):
        raise ValueError(f"origins {tuple(origins.shape)} and directions {tuple(directions.shape)} "
                         "must be [..., 3], one of each for every ray")


def render(nerf, origins, directions, samples=64, background=1.0, rng=None, cutoff=1e-3,
           chunk=None):
    """Volume-render rays of any shape [..., 3], directions of unit length. -> Picture.

    background: a number, or RGB [3] or [..., 3]. rng: a CPU generator, for one random sample in
    each interval in place of its middle, or where they are, [rays, samples] in [0, 1). cutoff: rays
    of which no more than this part of the light is left end there; samples behind, and in empty
    cells, are not given to the field.
    Without gradients it is done `chunk` rays at a time (default: 2048 on the CPU, where they stay
    in its caches, 65536 on CUDA).
    """
    check_rays(origins, directions, samples, rng)
    shape, o, d = origins.shape[:-1], origins.reshape(-1, 3), directions.reshape(-1, 3)
    back = torch.as_tensor(background, dtype=o.dtype, device=o.device).expand(*shape, 3)
    chunk = chunk or (1 << 16 if o.is_cuda else 1 << 11)
    # u: where in its interval a sample lies, the same numbers whatever the chunks
    u = rng
    if isinstance(rng, torch.Generator):
        u = torch.rand(len(o), samples, generator=rng, device="cpu")
    if not torch.is_grad_enabled() and len(o) > chunk:
        parts, back = [], back.reshape(-1, 3)
        for first in range(0, len(o), chunk):
            rows = slice(first, first + chunk)
            places = None if u is None else u[rows]
            parts.append(render(nerf, o[rows], d[rows], samples, back[rows], places, cutoff, chunk))
        return Picture(torch.cat([part.rgb for part in parts]).view(*shape, 3),
                       torch.cat([part.opacity for part in parts]).view(shape),
                       torch.cat([part.depth for part in parts]).view(shape))
    near, far = intersect_box(o, d, nerf.box)
    # t_i = near + (i + u_i) δ,  δ = (far − near)/S,  u_i uniform in [0, 1): stratified
    u = 0.5 if u is None else u.to(o)
    delta = (far - near) / samples
    t = near[:, None] + (torch.arange(samples, device=o.device) + u) * delta[:, None]
    x = o[:, None] + t[..., None] * d[:, None]                           # [R, S, 3]
    # a quarter of each ray at a time, front to back, without what is empty and what is hidden
    occupied = nerf.occupancy(x) & (delta > 0)[:, None]
    quarter = math.ceil(samples / 4)
    T, sigma, rgb = torch.ones_like(delta), [], []
    for first in range(0, samples, quarter):
        part = slice(first, first + quarter)
        live = occupied[:, part] & (T > cutoff)[:, None]                 # [R, S/4]
        # the field sees these alone; to all other samples it gives σ = 0
        s, c = nerf(x[:, part][live], d[live.nonzero()[:, 0]])
        sigma.append(torch.zeros_like(t[:, part]).masked_scatter(live, s))
        rgb.append(torch.zeros_like(x[:, part]).masked_scatter(live[..., None], c))
        # T_i = exp(−Σ_{j<i} σ_j δ), the light that is left
        T = T * torch.exp(-sigma[-1].detach().sum(1) * delta)
    sigma, rgb = torch.cat(sigma, 1), torch.cat(rgb, 1)                  # [R, S], [R, S, 3]
    # colour and distance are summed alike
    out, opacity = composite(sigma, delta, torch.cat([rgb, t[..., None]], 2), nerf.kernels)
    # C = Σ w_i c_i + (1 − Σ w_i) c_background
    through = (1 - opacity).view(*shape, 1)
    return Picture(out[:, :3].view(*shape, 3) + through * back, opacity.view(shape),
                   (out[:, 3] + (1 - opacity) * far).view(shape))


# ------------------------------------------------------------ lenses, as a transforms.json has them
class Lens(NamedTuple):
    """Where a camera images a direction, in pixels of a picture of w × h, v downwards.

    u = cx + fl_x a',  v = cy + fl_y b',  (a', b') = distort(a, b), and a, b are, of a direction
    (x, y, −z) at the angle θ from the axis: x/z, −y/z of a pinhole; θ (x, −y)/√(x² + y²) of a
    fisheye, which is equidistant.
    """
    w: float
    h: float
    fl_x: float
    fl_y: float
    cx: float
    cy: float
    k: tuple = (0.0, 0.0, 0.0, 0.0)                                      # radial: k1, k2, k3, k4
    p: tuple = (0.0, 0.0)                                                # tangential: p1, p2
    fisheye: bool = False

    @property
    def is_plain(self):
        """Whether it is a pinhole of square pixels with its axis in the picture's middle."""
        central = (self.cx, self.cy) == (self.w / 2, self.h / 2) and self.fl_x == self.fl_y
        return central and not self.fisheye and not any(self.k + self.p)

    def directions(self, height, width):
        """Return unit directions [height, width, 3] in the camera's axes, through the pixels'
        centres. ValueError where the distortion has no inverse.
        """
        # the width may have been rounded: then the pixels are not square
        if self.is_plain and width * self.h == height * self.w:
            fovy = math.degrees(2 * math.atan(self.h / (2 * self.fl_y)))
            return pinhole(torch.tensor([fovy]), height, width)[0]
        # the pixels' centres in the picture of w × h
        u = (torch.arange(width, dtype=torch.float64) + 0.5) * self.w / width
        v = (torch.arange(height, dtype=torch.float64) + 0.5) * self.h / height
        a, b = torch.meshgrid((u - self.cx) / self.fl_x, (v - self.cy) / self.fl_y, indexing="xy")
        a, b = undistort(a, b, self.k, self.p)
        if not self.fisheye:
            return F.normalize(torch.stack([a, -b, -torch.ones_like(a)], -1), dim=-1).float()
        # a direction at the angle θ from the axis: (a sin θ/θ, −b sin θ/θ, −cos θ)
        theta = torch.hypot(a, b)
        if theta.max() > math.pi:
            raise ValueError("a fisheye that sees more than 360°")
        s = torch.sinc(theta / math.pi)                                  # sin θ/θ, 1 at θ = 0
        return torch.stack([a * s, -b * s, -theta.cos()], -1).float()


def distort(a, b, k, p):
    """Apply Brown's model, as OpenCV, COLMAP, nerfstudio have it: a, b of any shape -> a', b'.

    a' = a R + 2 p1 a b + p2 (r² + 2a²),  b' = b R + p1 (r² + 2b²) + 2 p2 a b,
    R = 1 + k1 r² + k2 r⁴ + k3 r⁶ + k4 r⁸. OpenCV's fisheye is the same without p, of r = θ.
    """
    r2 = a * a + b * b
    R = 1 + r2 * (k[0] + r2 * (k[1] + r2 * (k[2] + r2 * k[3])))
    return (a * R + 2 * p[0] * a * b + p[1] * (r2 + 2 * a * a),
            b * R + p[0] * (r2 + 2 * b * b) + 2 * p[1] * a * b)


def undistort(a_d, b_d, k, p, steps=50):
    """Invert distort by Newton's method, in float64. ValueError where it has no inverse."""
    a, b = a_d, b_d
    for _ in range(steps):
        found_a, found_b = distort(a, b, k, p)
        e_a, e_b = found_a - a_d, found_b - b_d
        r2 = a * a + b * b
        R = 1 + r2 * (k[0] + r2 * (k[1] + r2 * (k[2] + r2 * k[3])))
        slope = k[0] + r2 * (2 * k[1] + r2 * (3 * k[2] + r2 * 4 * k[3]))  # ∂R/∂r²
        # the Jacobian [[A, B], [B, C]], which is symmetric, and its inverse times the error
        A = R + 2 * a * a * slope + 2 * p[0] * b + 6 * p[1] * a
        B = 2 * a * b * slope + 2 * p[0] * a + 2 * p[1] * b
        C = R + 2 * b * b * slope + 6 * p[0] * b + 2 * p[1] * a
        determinant = A * C - B * B
        a = a - (C * e_a - B * e_b) / determinant
        b = b - (A * e_b - B * e_a) / determinant
    # beyond a fold, where ∂(r R)/∂r ≤ 0 on the way, a solution is another point's
    r2 = torch.linspace(0, 1, 256, dtype=a.dtype) * (a * a + b * b).max()
    rising = 1 + r2 * (3 * k[0] + r2 * (5 * k[1] + r2 * (7 * k[2] + r2 * 9 * k[3]))) > 0
    wanted, found = torch.stack([a_d, b_d]), torch.stack(distort(a, b, k, p))
    error = ((found - wanted).abs() / (1 + wanted.abs())).max()
    # no lens makes a picture ten times as large, or as small
    stretch = (wanted.abs().max() + 1e-9) / (torch.stack([a, b]).abs().max() + 1e-9)
    if not (error < 1e-9 and rising.all() and 0.1 < stretch < 10):
        raise ValueError(f"no lens has k1 … k4 = {k}, p1, p2 = {p}: at the picture's edge the "
                         "distortion has no inverse, or a huge one")
    return a, b


def number(fields, name, default=None):
    """Return a finite number of a transforms.json; ValueError, with its name, for others."""
    value = default if fields.get(name) is None else fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e12:
        raise ValueError(f"{name} is {value!r}: a number is needed")
    return float(value)


PERSPECTIVE = {"PERSPECTIVE", "SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"}
FISHEYE = {"FISHEYE", "OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE"}
# what instant-ngp, COLMAP and others write for cameras that are none of these
FOREIGN = ("k5", "k6", "s1", "s2", "s3", "s4", "sx1", "sy1", "sk_x", "sk_y", "skew", "latlong",
           "equirectangular", "orthographic", "rolling_shutter", "from_na", "ftheta_p0",
           "ftheta_p1", "ftheta_p2", "ftheta_p3", "ftheta_p4")


def is_fisheye(fields):
    """Whether the fields describe a fisheye or a pinhole, with its distortion.

    ValueError, with the field's name, where they describe a camera that is neither.
    """
    model = str(fields.get("camera_model") or "PERSPECTIVE").upper()
    if model not in PERSPECTIVE | FISHEYE:
        raise ValueError(f"camera_model {model} is not known: undistort the pictures, or one of "
                         f"{', '.join(sorted(PERSPECTIVE | FISHEYE))}")
    if not isinstance(fields.get("is_fisheye"), (bool, type(None))):
        raise ValueError(f"is_fisheye is {fields['is_fisheye']!r}: true or false is needed")
    fisheye = model in FISHEYE or bool(fields.get("is_fisheye"))
    # OpenCV's fisheye has no tangential part; the k4 of its pinhole is a denominator's
    unused = ("p1", "p2") if fisheye else ("k4",)
    for name in FOREIGN + unused:
        value = fields.get(name)
        if value and value not in ([0], [0, 0], [0, 0, 0], [0, 0, 0, 0]):
            raise ValueError(f"{name} is {value}: no lens of that kind is known, undistort the "
                             "pictures")
    return fisheye


def read_lens(shared, frame, width, height):
    """Return the Lens of a frame whose picture has width × height pixels.

    The frame's own fields come before those that the file has for all. ValueError, with the
    field's name, for what no camera has.
    """
    # null in a frame is no field of its own
    fields = shared | {name: value for name, value in frame.items() if value is not None}
    fisheye = is_fisheye(fields)
    # lengths are in pixels of w × h, of which the picture may be a smaller copy
    w, h = number(fields, "w", width), number(fields, "h", height)
    if fields.get("h") is None:
        h = w * height / width
    elif fields.get("w") is None:
        w = h * width / height
    if not (w >= 1 and h >= 1 and abs(width * h - height * w) <= max(w, h)):
        raise ValueError(f"the picture has {width} × {height} pixels, but w, h are {w:g}, {h:g}")
    cx, cy = number(fields, "cx", w / 2), number(fields, "cy", h / 2)
    if not (-w <= cx <= 2 * w and -h <= cy <= 2 * h):
        raise ValueError(f"cx, cy are {cx:g}, {cy:g}: far outside a picture of {w:g} × {h:g}")
    k = tuple(number(fields, name, 0.0) for name in ("k1", "k2", "k3", "k4"))
    p = tuple(number(fields, name, 0.0) for name in ("p1", "p2"))
    # a frame that has a focal length, or an angle, has nothing of those from the file
    own = any(frame.get(name) is not None for pair in FOCAL for name in pair)
    fl_x, fl_y = focal_lengths(frame if own else shared, w, h, fisheye)
    return Lens(w, h, fl_x, fl_y, cx, cy, k, p, fisheye)


FOCAL = (("fl_x", "camera_angle_x"), ("fl_y", "camera_angle_y"))
# angles of view that a camera can have: 0.1° … 170° of a pinhole, to 360° of a fisheye
LEAST, WIDEST, ALL_AROUND = math.radians(0.1), math.radians(170), 2 * math.pi


def focal_lengths(fields, w, h, fisheye):
    """Return fl_x and fl_y in pixels of w × h. ValueError where they are missing or impossible."""
    fl_x = focal_length(fields, *FOCAL[0], w, fisheye)
    fl_y = focal_length(fields, *FOCAL[1], h, fisheye)
    if fl_x is None and fl_y is None:
        raise ValueError("it has no fl_x, which a fisheye needs" if fisheye else
                         "it has neither fl_x nor camera_angle_x, in radians")
    # where one is missing the pixels are square
    return fl_x or fl_y, fl_y or fl_x


def focal_length(fields, length, angle, extent, fisheye):
    """Return one axis's focal length in pixels, from itself or from the angle of view, or None.

    length, angle: the fields' names; extent: the picture's pixels along the axis.
    """
    by_angle = None
    if fields.get(angle) is not None and not fisheye:
        view = number(fields, angle)
        if not LEAST <= view <= WIDEST:
            raise ValueError(f"{angle} is {view:g}: radians between {LEAST:.2g} and {WIDEST:.3g} "
                             "are needed")
        by_angle = extent / (2 * math.tan(view / 2))
    if fields.get(length) is None:
        return by_angle
    focal = number(fields, length)
    # the angle of view is 2 atan(w/(2 fl)) of a pinhole, w/fl of a fisheye
    view, widest = 2 * math.atan2(extent, 2 * focal), WIDEST
    if fisheye and focal > 0:
        view, widest = extent / focal, ALL_AROUND
    if not LEAST <= view <= widest:
        raise ValueError(f"{length} is {focal:g}: no focal length, in pixels, of a picture of "
                         f"{extent:g} pixels")
    if by_angle is not None and abs(focal / by_angle - 1) > 0.02:
        raise ValueError(f"{length} {focal:g} and {angle} {fields[angle]:g} differ, of a picture "
                         f"of {extent:g} pixels: leave one of them out, or give w and h")
    return focal


def read_matrix(values):
    """Return a camera's matrix to the world as [4, 4] float64, of 4 × 4 or 3 × 4 numbers.

    ValueError where it is no rotation and place; a scale of the rotation is taken out.
    """
    try:
        m = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError("transform_matrix is no matrix of numbers") from error
    if m.shape not in ((4, 4), (3, 4), (16,), (12,)):
        raise ValueError(f"transform_matrix has the shape {tuple(m.shape)}, not 4 × 4 or 3 × 4")
    last = torch.tensor([[0, 0, 0, 1]], dtype=m.dtype)
    m = m.view(-1, 4)
    if not m.isfinite().all() or m.abs().max() > 1e12:
        raise ValueError("transform_matrix holds what is no finite number")
    # RᵀR = 1 and det R = 1, to what rounding in a file costs
    scale = m[:3, :3].norm() / math.sqrt(3)
    R = m[:3, :3] / scale.clamp(min=1e-9)
    if (R.t() @ R - torch.eye(3, dtype=m.dtype)).abs().max() > 0.02 or torch.linalg.det(R) < 0:
        raise ValueError("transform_matrix is no rotation and place: its first three columns are "
                         "not right-handed axes at right angles")
    if len(m) == 4 and (m[3:] - last).abs().max() > 1e-3:
        raise ValueError(f"transform_matrix ends in {m[3].tolist()}, not in 0, 0, 0, 1: is it "
                         "transposed?")
    m = torch.cat([m[:3], last])
    if abs(scale - 1) > 1e-3:
        m[:3, :3] = R
    return m


# ---------------------------------------------------------------------- fitting posed pictures
class Posed(NamedTuple):
    """M pictures and their rays, [M, H, W, …]: colours are multiplied by their opacity."""
    origins: torch.Tensor         # [M, H, W, 3]
    directions: torch.Tensor      # [M, H, W, 3]
    color: torch.Tensor           # [M, H, W, 3]
    opacity: torch.Tensor         # [M, H, W]

    def over(self, background):
        """RGB [M, H, W, 3] over a colour."""
        return self.color + (1 - self.opacity)[..., None] * background


SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".PNG", ".JPG", ".JPEG")


def find_picture(folder, name):
    """The Path of a frame's picture; name: with or without an ending, / or \\ between folders."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"file_path is {name!r}: the name of a picture is needed")
    for spelling in (name, name.replace("\\", "/")):
        for suffix in SUFFIXES:
            file = Path(folder) / (spelling + suffix)
            if file.is_file():                # a FIFO would never end
                return file
    raise ValueError("no such file, nor one with .png, .jpg, … at its end")


def read_picture(file, size, pictures):
    """Read one of so many pictures. -> (RGBA uint8 [size, …, 4], its width and height in the file)

    ValueError where it cannot be read, or is a strip.
    """
    import numpy as np
    from PIL import Image
    with warnings.catch_warnings(action="ignore"), Image.open(file) as picture:
        width, height = picture.size
        if max(width, height) > 16 * min(width, height):
            raise ValueError(f"{width} × {height} pixels are a strip, no camera's picture")
        columns = max(1, round(width * size / height))
        check_memory(pictures, size, columns)
        if picture.mode[0] in "IF":               # convert() would make it black
            from cli.files import to_8_bits
            picture = to_8_bits(picture, file)
        picture = picture.convert("RGBA").resize((columns, size), Image.BOX)
    return np.asarray(picture), width, height


def check_memory(pictures, height, width):
    """MemoryError where so many pictures of that size would not fit into this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 500 * pictures * height * width > memory:                         # bytes, as measured
        raise MemoryError


def read_transforms(path, size, place_type=torch.float32):
    """A transforms*.json of NeRF-synthetic, instant-ngp or nerfstudio -> Posed, `size` pixels high.

    ValueError, with the frame and the field, where the file or a picture cannot be used.
    place_type: the dtype of the origins.
    """
    path, place = Path(path), ""
    try:
        if not path.is_file():
            raise FileNotFoundError("it is no file")
        shared = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(shared, dict) or not isinstance(shared.get("frames"), list):
            raise ValueError("it has no list of frames")
        frames = shared.pop("frames")
        if not frames:
            raise ValueError("it has no frames")
        first, made = None, {}
        pictures, directions, matrices = [], [], []
        for i, frame in enumerate(frames):
            place = f"frame {i}: "
            if not isinstance(frame, dict):
                raise ValueError("it has no fields")
            place = f"frame {i} ({frame.get('file_path')}): "
            file = find_picture(path.parent, frame.get("file_path"))
            pixels, *extent = read_picture(file, size, len(frames))
            first = first or extent
            if extent != first:
                raise ValueError(f"{extent[0]} × {extent[1]} pixels, those before it have "
                                 f"{first[0]} × {first[1]}")
            lens = read_lens(shared, frame, *extent)
            if lens not in made:                  # most files have a single one
                made[lens] = lens.directions(*pixels.shape[:2])
            pictures.append(pixels)
            directions.append(made[lens])
            matrices.append(read_matrix(frame.get("transform_matrix")))
        place = ""
        return posed_of(pictures, directions, matrices, place_type)
    except MemoryError:
        raise
    except Exception as error:                # every format of picture has errors of its own
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be used: {place}{kind}{error}") from error


def posed_of(pixels, directions, matrices, place_type):
    """Lists of RGBA [H, W, 4] uint8, directions [H, W, 3], matrices [4, 4] -> Posed."""
    import numpy as np
    rgba = torch.from_numpy(np.stack(pixels)).float() / 255
    c2w = torch.stack(matrices)
    if len(c2w) > 1 and (c2w == c2w[0]).all():
        raise ValueError("all frames have the same transform_matrix")
    _, directions = cast(c2w.float(), torch.stack(directions))
    # in single precision a place like a map's, 5000 km from its origin, is half a metre off
    origins = c2w[:, None, None, :3, 3].to(place_type).expand_as(directions)
    return Posed(origins, directions, rgba[..., :3] * rgba[..., 3:], rgba[..., 3])


def posed_folder(folder, size, place_type=torch.float32):
    """Read (pictures to learn, pictures held out): the files' own split, or every eighth picture.
    """
    train, test, val = (Path(folder) / f"transforms_{s}.json" for s in ("train", "test", "val"))
    if train.exists():
        if val.exists() and not test.exists():
            test = val
        return tuple(read_transforms(path, size, place_type) for path in (train, test))
    folder = Path(folder)
    posed = read_transforms(folder / "transforms.json", size, place_type)
    test = torch.arange(len(posed.color)) % 8 == 7
    if not test.any():
        raise ValueError(f"{folder} has {len(test)} pictures: 8 are needed, to hold one out")
    return some_of(posed, ~test), some_of(posed, test)


def some_of(posed, part):
    """Posed pictures with these numbers, or of this slice or mask."""
    return Posed(*(tensor[part] for tensor in posed))


# ------------------------------------------------------------------------- a scene of any scale
def part_in_box(posed, box):
    """Of the rays that show something, the part that meets the box. -> float"""
    near, far = intersect_box(posed.origins.reshape(-1, 3), posed.directions.reshape(-1, 3), box)
    shown = posed.opacity.flatten()
    if not shown.any():
        shown = torch.ones_like(shown)
    return ((far > near) * shown).sum().item() / shown.sum().item()


def scene_extent(posed):
    """Where the cameras look together: (centre [3], radius) of the ball that their pictures show.

    None where there is no such place: they look side by side, or outwards.
    """
    shown = posed.opacity > 0.5
    some = shown.flatten(1).any(1)
    o, d, shown = posed.origins[some, 0, 0], posed.directions[some], shown[some]
    if len(o) < 2:
        return None
    # of each picture the middle ray a of what it shows
    a = F.normalize((d * shown[..., None]).sum((1, 2)), dim=1)           # [M, 3]
    # the point nearest to these rays: Σ (1 − a aᵀ)(c − o) = 0
    across = torch.eye(3, dtype=o.dtype) - a[:, :, None] * a[:, None]    # [M, 3, 3]
    matrix, middle = across.mean(0), o.mean(0)
    if torch.linalg.eigvalsh(matrix)[0] < 1e-4:       # parallel, within half a degree
        return None
    pull = (across @ (o - middle)[:, :, None]).mean(0)
    centre = middle + torch.linalg.solve(matrix, pull)[:, 0]
    if ((centre - o) * a).sum(1).gt(0).double().mean() < 0.9:            # behind the cameras
        return None
    # a ball at the distance D that reaches to the angle α from the middle has the radius D sin α
    cos = (d * a[:, None, None]).sum(-1).masked_fill(~shown, 1).clamp(0, 1).flatten(1).amin(1)
    radius = ((centre - o).norm(dim=1) * (1 - cos ** 2).sqrt()).quantile(0.9).item()
    return (centre, radius) if radius > 0 else None


def into_box(learnt, held_out, box):
    """Centre and scale a scene that its cameras show elsewhere than in [−box, box]³.

    -> (learnt, held_out, None) as they were, where they fit; else (…, …, (centre, factor)), by
    which x becomes factor · (x − centre). ValueError where they do not fit and cannot be made to.
    """
    few, few_held_out, change = thinned(learnt), thinned(held_out), None
    # what is cut out belongs into the box; a photograph's surroundings may lie outside
    wanted = 0.25 if few.opacity.mean() > 0.9 else 0.9
    extent = scene_extent(few)
    tiny = extent is not None and 10 * extent[1] < box
    if extent is not None and (tiny or part_in_box(few, box) < wanted):
        centre, factor = extent[0], 0.9 * box / extent[1]                # 0.9 leaves a margin
        if part_in_box(moved(few, centre, factor), box) >= wanted:
            learnt, held_out, few, few_held_out = (
                moved(posed, centre, factor) for posed in (learnt, held_out, few, few_held_out))
            change = centre.tolist(), factor
    for name, posed in (("", few), ("held-out ", few_held_out)):
        part = part_in_box(posed, box)
        if part < 0.25:
            why = ""
            if extent is None:
                why = ", and the cameras look at no common point"
                if scene_extent(few._replace(directions=-few.directions)) is not None:
                    why += (", but away from one, as they do in OpenCV's axes (negate columns 2 "
                            "and 3 of each matrix)")
            raise ValueError(f"{part:.0%} of what the {name}pictures show meets the box of "
                             f"±{box:g}{why}: a larger --box, or other transform_matrix")
    single = [posed._replace(origins=posed.origins.float()) for posed in (learnt, held_out)]
    return (*single, change)


def thinned(posed):
    """Return Posed in double precision with about 32 pixels a side: enough to see where it looks.
    """
    every = max(1, min(posed.opacity.shape[1:]) // 32)
    return Posed(*(v[:, ::every, ::every].double() for v in posed))


def moved(posed, centre, factor):
    """Return Posed of the scene in which x has become factor · (x − centre)."""
    return posed._replace(origins=(posed.origins.double() - centre) * factor)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of [B, …] in [0, 1], the mean over the pictures."""
    return -10 * torch.log10((a - b).square().flatten(1).mean(1).clamp(min=1e-10)).mean().item()


def fit(nerf, posed, steps=600, batch=1024, samples=64, lr=2e-2, background=None, rng=None,
        callback=None):
    """Fit posed pictures: least squares over random rays, by Adam, whose rate falls to a tenth.

    background: RGB [3] the pictures are put on, or None for a random one per ray, by which white
    differs from nothing. callback(step, loss). FloatingPointError where the loss is not finite.
    """
    if min(steps, batch, samples) < 1:
        raise ValueError(f"steps {steps}, batch {batch} and samples {samples} must be at least 1")
    rng = rng or torch.Generator().manual_seed(0)
    device, spacing = nerf.table.device, 2 * nerf.box / samples
    if not (posed.color.is_floating_point() and 0 <= posed.color.min()
            and posed.color.max() <= 1):
        raise ValueError("colours are floats in [0, 1]")
    pixels = [v.reshape(posed.opacity.numel(), -1).to(device) for v in posed]
    optimizer = torch.optim.Adam(nerf.parameters(), lr, eps=1e-15)
    rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / steps))
    for step in range(steps):
        if step % 16 == 0:
            nerf.update_grid(spacing, rng)
        chosen = torch.randint(len(pixels[0]), (batch,), generator=rng, device="cpu").to(device)
        o, d, color, opacity = (v[chosen] for v in pixels)
        if background is None:
            behind = torch.rand(batch, 3, generator=rng, device="cpu").to(device)
        else:
            behind = torch.as_tensor(background).to(device)
        seen = render(nerf, o, d, samples, behind, rng).rgb
        # L = mean ‖C(r) − C_true(r)‖²
        loss = (seen - color - (1 - opacity) * behind).square().mean()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is not finite at step {step}: try a smaller --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if callback is not None:
            callback(step, loss.item())


@torch.no_grad()
def look(nerf, posed, samples=64, background=1.0):
    """Render the rays of Posed. -> Picture"""
    device = nerf.table.device
    return render(nerf, posed.origins.to(device), posed.directions.to(device), samples, background)


# ---------------------------------------------------------------------------- solids to learn from
def solid_pictures(kind, color, c2w, fovy=40.0, size=64):
    """Make Posed pictures of a solid of tiny/solids.py from cameras [M, 4, 4]."""
    from tiny import solids
    truth = solids.render([kind] * len(c2w), [color] * len(c2w), lambda n: rays(c2w, fovy, n), size)
    opacity = truth.opacity[:, 0]
    rgb = truth.rgb.permute(0, 2, 3, 1) - (1 - opacity)[..., None]       # they stand on white
    return Posed(*rays(c2w, fovy, size), rgb, opacity)


def builtin_scene(kind, color, views=40, held_out=8, size=64, seed=0):
    """Make (pictures to learn, pictures held out) of a solid, from random sides."""
    rng = torch.Generator().manual_seed(seed)
    elevation, azimuth = torch.rand(2, views + held_out, generator=rng, device="cpu")
    c2w = camera_to_world(90 * elevation - 20, 360 * azimuth, 2.7)
    posed = solid_pictures(kind, color, c2w, size=size)
    return some_of(posed, slice(views)), some_of(posed, slice(views, None))


# ----------------------------------------------------------------------------------- command line
@torch.no_grad()
def write_around(path, nerf, size=64, views=8):
    """Write a picture of a NeRF from all around: colour, depth, normals."""
    from cli.pictures import write_views
    origins, directions = (v.to(nerf.table.device) for v in rays(orbit(views), 40.0, size))
    write_views(path, origins, directions, render(nerf, origins, directions, 64), 2.9, nerf.box)


@torch.no_grad()
def write_all(folder, nerf, threshold, size=64, views=8, frames=36, cells=96):
    """Write nerf.safetensors, views.png, turntable.gif, mesh.glb, viewer.html. -> the last of them

    A density without a surface costs the mesh, not the run: one line says so.
    """
    from cli import files, pictures
    with files.moved_into(folder / "nerf.safetensors") as temporary:
        nerf.save(temporary)
    device = nerf.table.device
    write_around(folder / "views.png", nerf, size, views)
    pictures.write_turntable(folder / "turntable.gif", [
        render(nerf, *rays(c2w.to(device), 40.0, 2 * size), 64).rgb[0]
        for c2w in orbit(frames).split(1)])

    def density(x):                              # only where the grid is not empty
        sigma = torch.zeros(len(x), device=device)
        for part in nerf.occupancy(x).nonzero().squeeze(1).split(1 << 16):
            sigma[part] = nerf.geometry(x[part])[0]
        return sigma

    def color(x):                                # seen from outside
        return nerf(x, -nerf.normal(x))[1]
    try:
        pictures.write_mesh(folder, pictures.extract_mesh(density, color, nerf.box, threshold,
                                                          cells, device))
        return folder / "viewer.html"
    except (ValueError, ImportError) as error:
        print(f"no mesh: {error}", file=sys.stderr)
        return folder / "turntable.gif"


def read_scene(settings, box):
    """Return (pictures to learn, pictures held out, how the scene was moved into the box, or None).

    ValueError where the scene is neither a folder nor a solid.
    """
    from tiny import solids
    if settings.scene and Path(settings.scene).is_dir():
        if settings.pictures:
            raise ValueError("--pictures is for a built-in solid: of a folder all are taken")
        return into_box(*posed_folder(settings.scene, settings.size, torch.float64), box)
    views = settings.pictures or 40
    check_memory(views + 8, settings.size, settings.size)
    if solid := solids.find_solid(settings.scene):
        return *builtin_scene(*solid, views, size=settings.size, seed=settings.seed), None
    raise ValueError(f"{settings.scene!r} is neither a folder nor a solid, such as "
                     f'"red mug": {", ".join(solids.COLORS)}; {", ".join(solids.KINDS)}')


def run(settings):
    """Make the NeRF and the pictures that it learns from, and fit it in a folder of its own."""
    from cli import files
    from cli.run import say
    from prior import usable
    if settings.threads:
        torch.set_num_threads(settings.threads)
    box = settings.box or (1.5 if Path(settings.scene).is_dir() else 1.0)
    nerf = NeRF(box, density="exp", blob=5.0, blob_radius=0.6, view=settings.view,
                kernels=settings.kernels, seed=settings.seed)
    nerf.to(usable(settings.device))
    use_triton(settings.kernels, nerf.table)          # ValueError where the kernels cannot run
    learnt, held_out, change = read_scene(settings, box)
    name = re.sub(r"[^a-z0-9]+", "-", Path(settings.scene).name.lower()).strip("-") or "scene"
    config = {"program": "nerf.py", "settings": settings.model_dump(mode="json")}
    if change is not None:
        config["centre"], config["factor"] = change
        place = ", ".join(f"{v:.4g}" for v in change[0])
        say("nerf.py", f"the scene is moved by its centre ({place}) to the origin and scaled by "
                       f"{change[1]:.4g} into the box of ±{box:g}")
    with ExitStack() as stack:
        fit_in(files.open_folder(stack, settings.out, f"fit-{name}", config), settings, nerf,
               learnt, held_out)


def fit_in(folder, settings, nerf, learnt, held_out):
    """Fit; write truth.png and all that write_all writes; print the PSNR on held-out views."""
    from tqdm import trange

    from cli.pictures import write_rows
    from cli.run import say
    white = None if settings.background == "random" else (1.0, 1.0, 1.0)
    began = time.perf_counter()
    with trange(settings.steps, desc="fit") as bar:
        def show(step, loss):
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss:.5f}", PSNR=f"{-10 * math.log10(loss + 1e-10):.1f}")
        fit(nerf, learnt, settings.steps, settings.batch, settings.samples, settings.lr, white,
            torch.Generator().manual_seed(settings.seed), show)
    seconds = time.perf_counter() - began
    truth = held_out.over(1.0)
    seen = look(nerf, held_out, settings.samples).rgb.cpu()
    if not seen.isfinite().all():
        raise FloatingPointError("the fitted scene is not finite: try a smaller --lr")
    say("nerf.py", "makes the views, the turntable and the mesh")
    write_rows(folder / "truth.png", [truth[:8], seen[:8]])            # above, below
    picture = write_all(folder, nerf, settings.threshold)
    # printed last: where stdout is closed this ends the program, and all is written by then
    print(f"PSNR on {len(truth)} held-out views: {psnr(seen, truth):.2f} dB; {seconds:.0f} s")
    print(picture)


def main(argv=None):
    """`python nerf.py DIR`, `python nerf.py "red mug"`. -> exit status."""
    from cli.run import guarded
    from cli.settings import FitSettings, parse_flags, validated

    def work():
        given = parse_flags("nerf.py", "Fit a NeRF to posed pictures.", FitSettings, argv)
        run(validated(FitSettings, given))
    return guarded("nerf.py", work, "a smaller --size, --batch or --samples", (ValueError,))


if __name__ == "__main__":
    sys.exit(main())
