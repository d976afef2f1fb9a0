"""nerf.py — a small NeRF in plain PyTorch, with Triton kernels where there is CUDA; text-to-3D.

    python nerf.py --prompt "a red mug"            # text-to-3D by the loop of asd.py
    python nerf.py --fit "red mug"                 # fits posed pictures of a built-in solid …
    python nerf.py --fit nerf_synthetic/lego       # … or of a folder with transforms.json

    from nerf import NeRF, render                  # this file and torch are enough
    picture = render(NeRF(), origins, directions)  # .rgb [..., 3], .opacity [...], .depth [...]

| what                                                    | function       | in test_nerf.py  |
|---------------------------------------------------------|----------------|------------------|
| multiresolution hash encoding (Instant-NGP, 2201.05989) | hash_encode    | test_encoding_…  |
| volume rendering (NeRF, 2003.08934, Eq. 3)              | composite      | test_composite_… |
| what skipping empty space may change                    | render         | test_skipping_…  |
| the first two on a GPU, with gradients                  | triton_kernels | test_kernels_…   |
| x0 = g(θ, c) of Adversarial Score Distillation          | Scene          | test_scene_…     |

World: z is up, the object's front faces +x, the scene fills the box [−box, box]³. Cameras are
OpenGL's (x right, y up, looking down −z), as in a NeRF transforms.json. N points, R rays, S samples
on each; σ is the density per unit of length; colours are RGB in [0, 1].
"""
import base64
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

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
    offsets = itertools.accumulate((min(v, size) for v in vertices), initial=0)
    return list(offsets), sum(v <= size for v in vertices)


def corners(x, resolutions, size):
    """x [N, 3] in [0, 1] -> rows of the table and weights, both [8, L, N], of each cell's vertices.
    """
    offsets, dense = layout(resolutions, size)
    column = lambda values: torch.tensor(values, dtype=torch.int32, device=x.device)[:, None]
    n, prime = column(resolutions), torch.tensor(PRIMES, dtype=torch.int32, device=x.device)
    p = x.t()[:, None] * n                                               # [3, L, N]
    cell = p.detach().floor().clamp(min=0).minimum(n - 1)                # its lower vertex
    f = p - cell                                                         # the place in it, 0 … 1
    # w = Π_axes (f or 1 − f): piecewise trilinear, so continuous across cells
    f = torch.stack([1 - f, f])                                          # [2, 3, L, N]
    w = f[:, None, None, 0] * f[None, :, None, 1] * f[None, None, :, 2]  # [2, 2, 2, L, N]
    v = torch.stack([cell, cell + 1]).int()                              # vertices, [2, 3, L, N]
    stride = torch.stack([n ** 0, n + 1, (n + 1) ** 2])
    a, b, c = (v[:, i, :dense] * stride[i, :dense] for i in range(3))
    # dense: x + (n + 1) (y + (n + 1) z)
    exact = a[:, None, None] + b[None, :, None] + c[None, None]
    a, b, c = (v[:, i, dense:] * prime[i] for i in range(3))
    # hashed: (x π₁ ⊕ y π₂ ⊕ z π₃) mod size
    hashed = (a[:, None, None] ^ b[None, :, None] ^ c[None, None]) & (size - 1)
    return (torch.cat([exact, hashed], -2) + column(offsets[:-1])).flatten(0, 2), w.flatten(0, 2)


class _Rows(torch.autograd.Function):
    """table[row]; its gradient is a histogram, many times faster than torch's own on the CPU."""

    @staticmethod
    def forward(ctx, table, row):
        ctx.save_for_backward(row)
        ctx.length = len(table)
        return table.index_select(0, row.flatten()).view(*row.shape, table.shape[1])

    @staticmethod
    def backward(ctx, grad):
        row, = ctx.saved_tensors
        row, grad = row.flatten(), grad.flatten(0, -2)
        if grad.is_cuda:
            return grad.new_zeros(ctx.length, grad.shape[1]).index_add_(0, row, grad), None
        bins = [torch.bincount(row, g, ctx.length) for g in grad.t().contiguous()]
        return torch.stack(bins, 1).to(grad), None


def hash_encode(x, table, resolutions, size, kernels="torch"):
    """x [N, 3] in [0, 1], table [rows, F] as `layout` has it -> features [N, L·F]; differentiable.

    Instant-NGP: at each level, the trilinear interpolation of the F features of the eight vertices
    around x. kernels: "torch", "triton" or "auto" (Triton on CUDA where it is installed).
    """
    if use_triton(kernels, x):
        return _TritonEncode.apply(x, table, tuple(resolutions), size)
    row, w = corners(x, resolutions, size)
    # h_l(x) = Σ_vertices w · table[row]
    h = (_Rows.apply(table, row) * w[..., None]).sum(0)                  # [L, N, F]
    return h.transpose(0, 1).flatten(1)


# -------------------------------------------------------------------- compositing along the rays
def composite(sigma, delta, values, kernels="torch"):
    """Volume rendering: σ [R, S] ≥ 0, δ [R] the samples' spacing, values [R, S, C].

    -> (Σ_i w_i v_i [R, C], opacity Σ_i w_i [R] in [0, 1]); exact where σ and v are constant within
    each sample's interval.
    """
    if use_triton(kernels, sigma):
        return _TritonComposite.apply(sigma, delta, values)
    # w_i = T_i (1 − exp(−σ_i δ)),  T_i = exp(−Σ_{j<i} σ_j δ):  NeRF, Eq. 3
    tau = sigma * delta[:, None]
    T = torch.exp(-F.pad(tau[:, :-1], (1, 0)).cumsum(1))
    w = T * -torch.expm1(-tau)
    return torch.einsum("rs,rsc->rc", w, values), w.sum(1)


# --------------------------------------------------------------------- the same, as Triton kernels
def use_triton(kernels, tensor):
    """Whether Triton computes it: "auto" where CUDA and Triton are. ValueError if it cannot."""
    if kernels == "torch":
        return False
    there = importlib.util.find_spec("triton") is not None
    able = there and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    if kernels == "triton" and not able:
        raise ValueError("the Triton kernels need Triton and CUDA: choose --kernels auto or torch")
    return able and tensor.is_cuda if kernels == "auto" else able


@functools.cache
def triton_kernels():
    """-> (encode, composite), compiled when they are called. What the twins above compute, line by
    line; with BACKWARD the gradients instead, for which `out` and `opacity` hold ∂L/∂out, ….
    """
    import triton
    import triton.language as tl

    @triton.jit
    def encode(x, table, levels, out, grad_table, grad_x, N, mask, L: tl.constexpr,
               C: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
        """BLOCK points (axis 0) at one level (axis 1); levels [L, 3]: n, first row, dense or not.
        """
        l, i = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        c, here = tl.arange(0, C)[None, :], i < N
        n, first = tl.load(levels + 3 * l), tl.load(levels + 3 * l + 1)
        dense = tl.load(levels + 3 * l + 2) != 0
        px, py = tl.load(x + 3 * i, here, 0) * n, tl.load(x + 3 * i + 1, here, 0) * n
        pz = tl.load(x + 3 * i + 2, here, 0) * n
        cx, cy = tl.clamp(tl.floor(px), 0, n - 1), tl.clamp(tl.floor(py), 0, n - 1)
        cz = tl.clamp(tl.floor(pz), 0, n - 1)
        at = (i[:, None] * L + l) * C + c                                # of h_l(x) in out
        h = tl.load(out + at, here[:, None], 0) if BACKWARD else px[:, None] * c * 0
        gx, gy, gz = px * 0, px * 0, px * 0
        for k in tl.static_range(8):                                     # the vertices
            a, b, d = k // 4, k // 2 % 2, k % 2
            vx, vy, vz = cx.to(tl.int32) + a, cy.to(tl.int32) + b, cz.to(tl.int32) + d
            hashed = (vx ^ (vy * -1640531535) ^ (vz * 805459861)) & mask
            row = first + tl.where(dense, vx + (n + 1) * (vy + (n + 1) * vz), hashed)
            row = row[:, None] * C + c
            wx, wy = 1 - a + (2 * a - 1) * (px - cx), 1 - b + (2 * b - 1) * (py - cy)
            wz = 1 - d + (2 * d - 1) * (pz - cz)                         # f or 1 − f
            value = tl.load(table + row, here[:, None], 0)
            if BACKWARD:
                tl.atomic_add(grad_table + row, (wx * wy * wz)[:, None] * h, here[:, None])
                s = tl.sum(h * value, 1) * n                             # ∂f/∂x = n
                gx += (2 * a - 1) * wy * wz * s
                gy += wx * (2 * b - 1) * wz * s
                gz += wx * wy * (2 * d - 1) * s
            else:
                h += (wx * wy * wz)[:, None] * value
        if BACKWARD:                                                     # grad_x [L, N, 3]
            tl.store(grad_x + 3 * (l * N + i), gx, here)
            tl.store(grad_x + 3 * (l * N + i) + 1, gy, here)
            tl.store(grad_x + 3 * (l * N + i) + 2, gz, here)
        else:
            tl.store(out + at, h, here[:, None])

    @triton.jit
    def composite(sigma, delta, values, out, opacity, grad_sigma, grad_values, S, C: tl.constexpr,
                  BLOCK: tl.constexpr, COLUMNS: tl.constexpr, BACKWARD: tl.constexpr):
        """One ray; BLOCK and COLUMNS are the powers of two from S and C on."""
        r, i, c = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
        here, some, spacing = i < S, c < C, tl.load(delta + r)
        both = here[:, None] & some[None, :]
        tau = tl.load(sigma + r * S + i, here, 0) * spacing
        before = tl.load(sigma + r * S + i - 1, here & (i > 0), 0) * spacing
        T = tl.exp(-tl.cumsum(before, 0))
        w = T * (1 - tl.exp(-tau))
        at = (r * S + i)[:, None] * C + c[None, :]
        v = tl.load(values + at, both, 0)
        if BACKWARD:
            # g_i = ∂L/∂w_i;  ∂L/∂τ_i = T_{i+1} g_i − Σ_{j>i} w_j g_j;  ∂L/∂v_i = w_i ∂L/∂out
            grad = tl.load(out + r * C + c, some, 0)
            g = tl.sum(v * grad[None, :], 1) + tl.load(opacity + r)
            after = tl.cumsum(w * g, 0, reverse=True) - w * g
            tl.store(grad_sigma + r * S + i, ((T - w) * g - after) * spacing, here)
            tl.store(grad_values + at, w[:, None] * grad[None, :], both)
        else:
            tl.store(out + r * C + c, tl.sum(w[:, None] * v, 0), some)
            tl.store(opacity + r, tl.sum(w, 0))

    return encode, composite


class _TritonEncode(torch.autograd.Function):
    """hash_encode by the kernel; F must be a power of two. Its gradient has no gradient."""

    @staticmethod
    def forward(ctx, x, table, resolutions, size):
        x, table = x.contiguous(), table.contiguous()
        offsets, dense = layout(resolutions, size)
        rows = [[n, first, l < dense] for l, (n, first) in enumerate(zip(resolutions, offsets))]
        levels = torch.tensor(rows, dtype=torch.int32, device=x.device)
        out = x.new_empty(len(x), len(levels) * table.shape[1])
        ctx.save_for_backward(x, table, levels)
        ctx.mask = size - 1
        _TritonEncode.launch(x, table, levels, out, table, x, size - 1, False)
        return out

    @staticmethod
    def launch(x, table, levels, out, grad_table, grad_x, mask, backward):
        N, L, C, block = len(x), len(levels), table.shape[1], 128 if x.is_cuda else 1024
        triton_kernels()[0][(-(-N // block), L)](
            x, table, levels, out, grad_table, grad_x, N, mask, L=L, C=C, BLOCK=block,
            BACKWARD=backward)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, table, levels = ctx.saved_tensors
        grad_table, grad_x = torch.zeros_like(table), x.new_empty(len(levels), *x.shape)
        _TritonEncode.launch(x, table, levels, grad.contiguous(), grad_table, grad_x, ctx.mask,
                             True)
        return grad_x.sum(0), grad_table, None, None


class _TritonComposite(torch.autograd.Function):
    """composite by the kernel; δ has no gradient."""

    @staticmethod
    def forward(ctx, sigma, delta, values):
        tensors = [tensor.contiguous() for tensor in (sigma, delta, values)]
        out, opacity = sigma.new_empty(len(sigma), values.shape[2]), sigma.new_empty(len(sigma))
        ctx.save_for_backward(*tensors)
        _TritonComposite.launch(*tensors, out, opacity, sigma, values, False)
        return out, opacity

    @staticmethod
    def launch(sigma, delta, values, out, opacity, grad_sigma, grad_values, backward):
        (R, S, C), up = values.shape, lambda n: 1 << (n - 1).bit_length()
        triton_kernels()[1][(R,)](
            sigma, delta, values, out, opacity, grad_sigma, grad_values, S, C=C, BLOCK=up(S),
            COLUMNS=up(C), BACKWARD=backward)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_opacity):
        sigma, delta, values = ctx.saved_tensors
        grads = torch.empty_like(sigma), torch.empty_like(values)
        _TritonComposite.launch(sigma, delta, values, grad_out.contiguous(),
                                grad_opacity.contiguous(), *grads, True)
        return grads[0], None, grads[1]


# ------------------------------------------------------------------------------------- the field
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
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if size & (size - 1) or not 1 <= base <= finest:
            raise ValueError(f"size {size} must be a power of two, and 1 <= base {base} <= finest")
        self.box, self.size, self.cells, self.view = box, size, cells, view
        self.density, self.blob, self.blob_radius = density, blob, blob_radius
        self.kernels = kernels
        growth = (finest / base) ** (1 / max(levels - 1, 1))
        self.resolutions = [int(base * growth ** l + 1e-6) for l in range(levels)]
        rng = torch.Generator().manual_seed(seed)
        rows = layout(self.resolutions, size)[0][-1]
        self.table = nn.Parameter(1e-4 * (2 * torch.rand(rows, features, generator=rng) - 1))
        self.inner = nn.Sequential(nn.Linear(levels * features, width), nn.ReLU(),
                                   nn.Linear(width, 16))                 # log-density and features
        self.outer = nn.Sequential(nn.Linear(15 + 3 * view, width), nn.ReLU(), nn.Linear(width, 3))
        for layer in (*self.inner, *self.outer):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, math.sqrt(5), generator=rng)
                nn.init.zeros_(layer.bias)
        self.background = nn.Parameter(torch.zeros(3))                   # learnt, where asked for
        self.register_buffer("peak", torch.zeros(cells, cells, cells))   # σ, decaying
        self.register_buffer("occupied", torch.ones(cells, cells, cells, dtype=torch.bool))

    def geometry(self, x):
        """x [N, 3] -> (σ [N], features [N, 15])."""
        h = self.inner(hash_encode((x / self.box + 1) / 2, self.table, self.resolutions, self.size,
                                   self.kernels))
        # σ = softplus or exp of h₀ + b (1 − ‖x‖/r), the blob of Magic3D and threestudio
        log = h[:, 0] + self.blob * (1 - x.norm(dim=1) / (self.blob_radius * self.box))
        return F.softplus(log) if self.density == "softplus" else log.clamp(max=9).exp(), h[:, 1:]

    def forward(self, x, directions=None):
        """x [N, 3], unit directions [N, 3] where view is on -> (σ [N], RGB [N, 3])."""
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
        i = ((x / self.box + 1) * (self.cells / 2)).long().clamp(0, self.cells - 1).unbind(-1)
        return self.occupied.view(-1)[(i[0] * self.cells + i[1]) * self.cells + i[2]]

    @torch.no_grad()
    def update_grid(self, spacing, rng=None, least=0.01, decay=0.7):
        """Renew the occupancy grid at one random point per cell (rng: a CPU generator).

        A cell is empty if no density seen of late in it or its 26 neighbours makes a sample of
        length `spacing` more opaque than `least`.
        """
        index = torch.arange(self.cells, device=self.peak.device)
        x = torch.stack(torch.meshgrid(index, index, index, indexing="ij"), -1).view(-1, 3)
        u = torch.full(x.shape, 0.5) if rng is None else torch.rand(x.shape, generator=rng)
        x = ((x + u.to(x.device)) * (2 / self.cells) - 1) * self.box
        sigma = torch.cat([self.geometry(part)[0] for part in x.split(1 << 13)])
        self.peak.copy_(torch.maximum(decay * self.peak, sigma.view_as(self.peak)))
        near = F.max_pool3d(self.peak[None, None], 3, 1, 1)[0, 0]
        self.occupied.copy_(1 - torch.exp(-near * spacing) > least)

    def save(self, path):
        """All of it, as safetensors."""
        from safetensors.torch import save_file
        part = Path(f"{path}.tmp")
        try:
            save_file(self.state_dict(), part, {"nerf": json.dumps(self.settings)})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path, device="cpu", kernels="auto"):
        """What save() wrote. Raises ValueError for another file."""
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {})["nerf"])
                nerf = cls(**settings | {"kernels": kernels})
                nerf.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no NeRF of nerf.py ({type(error).__name__})") from error
        return nerf.to(device)


# ---------------------------------------------------------------------------------- the renderer
class Picture(NamedTuple):
    """Of rays of any shape [...]."""
    rgb: torch.Tensor             # [..., 3], over the background
    opacity: torch.Tensor         # [...] in [0, 1]
    depth: torch.Tensor           # [...] mean distance along the ray; the box's far side counts for
    #                               what passes through


def rays(c2w, fovy_deg, height, width=None):
    """Origins and unit directions [B, H, W, 3] through the pixels' centres; c2w [B, 4, 4]."""
    width = width or height
    half = math.tan(math.radians(fovy_deg) / 2)
    place = lambda n: (2 * torch.arange(n, device=c2w.device, dtype=c2w.dtype) + 1) / n - 1
    x, y = half * width / height * place(width), -half * place(height)
    d = torch.stack([x.expand(height, width), y[:, None].expand(height, width),
                     -torch.ones_like(x).expand(height, width)], -1)
    d = F.normalize(d, dim=-1) @ c2w[:, None, :3, :3].transpose(-1, -2)  # [B, H, W, 3]
    return c2w[:, None, None, :3, 3].expand_as(d), d


def intersect_box(origins, directions, box):
    """Where the rays [R, 3] enter and leave [−box, box]³: near, far [R]; equal where they miss."""
    safe = torch.where(directions.abs() < 1e-9, 1e-9, directions)
    a, b = (-box - origins) / safe, (box - origins) / safe
    near, far = torch.minimum(a, b).amax(1).clamp(min=0), torch.maximum(a, b).amin(1)
    return near, torch.maximum(near, far)


def render(nerf, origins, directions, samples=64, background=1.0, rng=None, cutoff=1e-3,
           chunk=None):
    """Volume-render rays of any shape [..., 3], directions of unit length. -> Picture.

    background: a number, or RGB [3] or [..., 3]. rng: a CPU generator, for one random sample in
    each interval in place of its middle. cutoff: samples that less than this part of the light
    reaches are left out, with those in empty cells: only the others are given to the field.
    Without gradients it is done `chunk` rays at a time (default: 2048 on the CPU, where they stay
    in its caches, 65536 on CUDA).
    """
    shape, o, d = origins.shape[:-1], origins.reshape(-1, 3), directions.reshape(-1, 3)
    back = torch.as_tensor(background, dtype=o.dtype, device=o.device).expand(*shape, 3)
    chunk = chunk or (1 << 16 if o.is_cuda else 1 << 11)
    if not torch.is_grad_enabled() and len(o) > chunk:
        parts = zip(*(v.reshape(-1, 3).split(chunk) for v in (o, d, back)))
        done = [render(nerf, *part[:2], samples, part[2], rng, cutoff, chunk) for part in parts]
        return Picture(*(torch.cat(v).view(*shape, *v[0].shape[1:]) for v in zip(*done)))
    near, far = intersect_box(o, d, nerf.box)
    # t_i = near + (i + u_i) δ,  δ = (far − near)/S,  u_i uniform in [0, 1): stratified
    u = torch.rand(len(o), samples, generator=rng) if rng else torch.full((len(o), samples), 0.5)
    delta = (far - near) / samples
    t = near[:, None] + (torch.arange(samples, device=o.device) + u.to(o)) * delta[:, None]
    x = o[:, None] + t[..., None] * d[:, None]                           # [R, S, 3]
    # skip what is empty …
    live = (nerf.occupancy(x) & (delta > 0)[:, None]).flatten().nonzero().squeeze(1)
    x, dense = x.view(-1, 3), t.new_zeros(t.numel())
    if cutoff:
        # … and what is hidden: T_i = exp(−Σ_{j<i} σ_j δ) < cutoff
        with torch.no_grad():
            sigma = dense.index_copy(0, live, nerf.geometry(x[live])[0]).view(t.shape)
            tau = (sigma[:, :-1] * delta[:, None]).cumsum(1)
            live = live[torch.exp(-F.pad(tau, (1, 0))).flatten()[live] > cutoff]
    sigma, rgb = nerf(x[live], d[live // samples])
    sigma = dense.index_copy(0, live, sigma).view(t.shape)
    rgb = dense[:, None].expand(-1, 3).index_copy(0, live, rgb).view(*t.shape, 3)
    out, opacity = composite(sigma, delta, torch.cat([rgb, t[..., None]], 2), nerf.kernels)
    # C = Σ w_i c_i + (1 − Σ w_i) c_background
    through = (1 - opacity).view(*shape, 1)
    return Picture(out[:, :3].view(*shape, 3) + through * back, opacity.view(shape),
                   (out[:, 3] + (1 - opacity) * far).view(shape))


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


def find_solid(text):
    """A text such as "mug", "red mug" or "a red mug" -> (kind, colour) of solids.py, or None."""
    import solids
    words = re.sub(r"^an? ", "", text.strip().lower())
    color, _, kind = words.partition(" ")
    if color in solids.COLORS and kind in solids.KINDS:
        return kind, color
    return (words, "red") if words in solids.KINDS else None


def solid_pictures(kind, color, elevation, azimuth, distance=2.7, fovy=40.0, size=64):
    """Posed pictures of a solid of solids.py; elevation and azimuth in degrees, [M] each."""
    import solids
    c2w = solids.camera_to_world(elevation, azimuth, distance)
    truth = solids.render([kind] * len(c2w), [color] * len(c2w), c2w, fovy, size)
    opacity = truth.opacity[:, 0]
    color = truth.rgb.permute(0, 2, 3, 1) - (1 - opacity)[..., None]     # they stand on white
    return Posed(*rays(c2w, fovy, size), color, opacity)


def builtin_scene(kind, color, views=40, held_out=8, size=64, seed=0):
    """-> (pictures to learn, pictures held out), from random sides."""
    rng = torch.Generator().manual_seed(seed)
    elevation, azimuth = torch.rand(2, views + held_out, generator=rng)
    posed = solid_pictures(kind, color, 90 * elevation - 20, 360 * azimuth, size=size)
    return tuple(Posed(*(v[part] for v in posed)) for part in
                 (slice(views), slice(views, None)))


def read_transforms(path, size):
    """A transforms*.json of Blender/NeRF-synthetic -> Posed at `size` pixels high.

    Raises ValueError where the file, a picture or a field of it cannot be used.
    """
    import numpy as np
    from PIL import Image
    try:
        about = json.loads(Path(path).read_text("utf-8"))
        pictures, matrices = [], []
        for frame in about["frames"]:
            file = Path(path).parent / frame["file_path"]
            file = file if file.suffix else file.with_suffix(".png")
            picture = Image.open(file).convert("RGBA")
            width = round(picture.width * size / picture.height)
            full = picture.height / picture.width
            pictures.append(np.asarray(picture.resize((width, size), Image.BOX)))
            matrices.append(frame["transform_matrix"])
        angle = about["camera_angle_x"] if "camera_angle_x" in about else \
            2 * math.atan(about["w"] / (2 * about["fl_x"]))
        rgba = torch.from_numpy(np.stack(pictures)).float() / 255
        c2w = torch.tensor(matrices, dtype=torch.float32).view(-1, 4, 4)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be used: {type(error).__name__}: {error}") from error
    fovy = math.degrees(2 * math.atan(math.tan(angle / 2) * full))
    return Posed(*rays(c2w, fovy, size, rgba.shape[2]), rgba[..., :3] * rgba[..., 3:], rgba[..., 3])


def posed_folder(folder, size):
    """-> (pictures to learn, pictures held out): the files' own split, or every eighth picture."""
    folder = Path(folder)
    if (folder / "transforms_train.json").exists():
        held_out = next((f for f in ("test", "val") if (folder / f"transforms_{f}.json").exists()),
                        "test")
        return tuple(read_transforms(folder / f"transforms_{s}.json", size)
                     for s in ("train", held_out))
    posed = read_transforms(folder / "transforms.json", size)
    test = torch.arange(len(posed.color)) % 8 == 7
    if not test.any():
        raise ValueError(f"{folder} has {len(test)} pictures: 8 are needed, to hold one out")
    return tuple(Posed(*(v[part] for v in posed)) for part in (~test, test))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of [B, …] in [0, 1], the mean over the pictures."""
    return -10 * torch.log10((a - b).square().flatten(1).mean(1).clamp(min=1e-10)).mean().item()


def fit(nerf, posed, steps=600, batch=1024, samples=64, lr=2e-2, background=None, rng=None,
        callback=None):
    """Fit posed pictures: least squares over random rays. background: RGB [3] the pictures are put
    on, or None for a random one per ray, which tells white from nothing.
    """
    rng = rng or torch.Generator().manual_seed(0)
    device, spacing = nerf.table.device, 2 * nerf.box / samples
    pixels = [v.reshape(posed.opacity.numel(), -1).to(device) for v in posed]
    optimizer = torch.optim.Adam(nerf.parameters(), lr, eps=1e-15)
    rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / steps))
    for step in range(steps):
        if step % 16 == 0:
            nerf.update_grid(spacing, rng)
        chosen = torch.randint(len(pixels[0]), (batch,), generator=rng).to(device)
        o, d, color, opacity = (v[chosen] for v in pixels)
        behind = torch.rand(batch, 3, generator=rng).to(device) if background is None \
            else torch.as_tensor(background).to(device)
        seen = render(nerf, o, d, samples, behind, rng).rgb
        # L = mean ‖C(r) − C_true(r)‖²
        loss = (seen - color - (1 - opacity) * behind).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if callback:
            callback(step, loss.item())


@torch.no_grad()
def look(nerf, posed, samples=64, background=1.0):
    """The Picture of the rays of Posed."""
    device = nerf.table.device
    return render(nerf, posed.origins.to(device), posed.directions.to(device), samples, background)


# ------------------------------------------------------------------------ what a run leaves behind
def pictures_to_png(path, rows, scale=2):
    """rows: lists of RGB [B, H, W, 3] in [0, 1] -> a PNG, one below the other."""
    from PIL import Image

    from runs import moved_into
    picture = torch.cat([torch.cat(list(row.cpu()), 1) for row in rows]).clamp(0, 1)
    picture = Image.fromarray((picture * 255).round().byte().numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    with moved_into(Path(path)) as part:
        picture.save(part, format="PNG")


def orbit(views, elevation=20.0, distance=2.9):
    """Cameras [views, 4, 4] around the object, the first one at its front."""
    import solids
    return solids.camera_to_world(elevation, torch.arange(views) * (360 / views), distance)


def depth_normals(points):
    """The points that pixels show [B, H, W, 3] -> unit normals that face the camera, alike.

    Smoother than NeRF.normal, as the density's gradient at one point is grainy after a fit.
    """
    down, right = torch.gradient(points, dim=(1, 2))
    return F.normalize(torch.linalg.cross(right, -down), dim=-1)


@torch.no_grad()
def write_views(path, nerf, samples=64, size=64, fovy=40.0, distance=2.9):
    """views.png: eight views; colour, depth (near is bright), normals (x, y, z as R, G, B).
    """
    o, d = (v.to(nerf.table.device) for v in rays(orbit(8, distance=distance), fovy, size))
    picture = render(nerf, o, d, samples)
    there = picture.opacity[..., None]
    depth = (distance + nerf.box - picture.depth) / (2 * nerf.box)
    normal = depth_normals(o + picture.depth[..., None] * d)
    on_white = lambda v: there * v + 1 - there
    pictures_to_png(path, [picture.rgb, on_white(depth.clamp(0, 1)[..., None].expand_as(d)),
                           on_white(normal / 2 + 0.5)])


@torch.no_grad()
def write_turntable(path, nerf, frames=36, samples=64, size=128, fovy=40.0):
    """turntable.gif, and an mp4 beside it where ffmpeg is installed."""
    from PIL import Image

    from runs import moved_into
    film = []
    for c2w in orbit(frames).split(1):
        o, d = (v.to(nerf.table.device) for v in rays(c2w, fovy, size))
        rgb = render(nerf, o, d, samples).rgb[0].clamp(0, 1).cpu()
        film.append(Image.fromarray((rgb * 255).round().byte().numpy()))
    with moved_into(Path(path)) as part:
        film[0].save(part, format="GIF", save_all=True, append_images=film[1:], duration=70, loop=0)
    if shutil.which("ffmpeg"):
        mp4 = Path(path).with_suffix(".mp4")
        with moved_into(mp4) as part:
            subprocess.run(["ffmpeg", "-loglevel", "error", "-y", "-i", str(path), "-pix_fmt",
                            "yuv420p", "-f", "mp4", str(part)], check=True)


@torch.no_grad()
def extract_mesh(nerf, threshold=10.0, resolution=96):
    """Marching cubes -> a trimesh.Trimesh with vertex colours (sRGB, as the pictures).

    Raises ValueError where the density is nowhere above, or nowhere below, the threshold.
    """
    import trimesh
    from skimage.measure import marching_cubes
    line = torch.linspace(-nerf.box, nerf.box, resolution, device=nerf.table.device)
    x = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3)
    sigma = torch.zeros(len(x), device=x.device)
    for part in nerf.occupancy(x).nonzero().squeeze(1).split(1 << 16):
        sigma[part] = nerf.geometry(x[part])[0]
    if not sigma.min() < threshold < sigma.max():
        raise ValueError(f"no surface to make a mesh of: the density lies in {sigma.min():.3g} … "
                         f"{sigma.max():.3g}, --threshold is {threshold:g}")
    volume = F.pad(sigma.view([resolution] * 3), [1] * 6).cpu().numpy()  # closed at the box
    vertices, faces, _, _ = marching_cubes(volume, threshold, gradient_direction="ascent")
    vertices = torch.from_numpy(vertices.copy() - 1) * (2 * nerf.box / (resolution - 1)) - nerf.box
    rgb = torch.cat([nerf(part, -nerf.normal(part))[1]
                     for part in vertices.to(x).split(1 << 16)]).cpu()
    return trimesh.Trimesh(vertices.numpy(), faces, process=False,
                           vertex_colors=(rgb * 255).round().byte().numpy())


def write_mesh(folder, mesh):
    """mesh.glb (y is up, colours linear, unlit: as glTF has them) and viewer.html."""
    import numpy as np

    from runs import moved_into, write_text
    turned = mesh.copy()
    turned.vertices = mesh.vertices[:, [1, 2, 0]]                        # z up -> y up
    srgb = mesh.visual.vertex_colors[:, :3] / 255
    linear = np.where(srgb < 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    turned.visual.vertex_colors = (linear * 255).round().astype(np.uint8)

    def unlit(tree):
        tree["materials"] = [{"extensions": {"KHR_materials_unlit": {}}, "pbrMetallicRoughness": {
            "metallicFactor": 0.0, "roughnessFactor": 1.0}}]
        tree["extensionsUsed"] = ["KHR_materials_unlit"]
        for part in tree["meshes"][0]["primitives"]:
            part["material"] = 0

    data = turned.export(file_type="glb", tree_postprocessor=unlit)
    with moved_into(folder / "mesh.glb") as part:
        part.write_bytes(data)
    coded = lambda array, kind: base64.b64encode(np.ascontiguousarray(array, kind)).decode()
    write_text(folder / "viewer.html", VIEWER % (
        coded(mesh.vertices[:, [1, 2, 0]], "<f4"), coded(mesh.visual.vertex_colors[:, :3], "u1"),
        coded(mesh.faces, "<u4")))


# a page of its own: no library, no server, no network; the mesh is in it, coded in base 64
VIEWER = """<!DOCTYPE html><html><meta charset="utf-8"><title>viewer</title>
<style>html, body, canvas {margin: 0; width: 100%%; height: 100%%; display: block}</style>
<canvas></canvas><script>
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer
const place = new Float32Array(bytes("%s")), color = new Uint8Array(bytes("%s"))
const face = new Uint32Array(bytes("%s"))
const size = place.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
const canvas = document.querySelector("canvas")
const gl = canvas.getContext("webgl2", {preserveDrawingBuffer: true})
const program = gl.createProgram()
const shader = (kind, text) => { const s = gl.createShader(kind)
  gl.shaderSource(s, text); gl.compileShader(s); gl.attachShader(program, s) }
shader(gl.VERTEX_SHADER, `#version 300 es
  in vec3 place, color; uniform mat4 view; out vec3 c;
  void main() { c = color; gl_Position = view * vec4(place, 1.0); }`)
shader(gl.FRAGMENT_SHADER, `#version 300 es
  precision mediump float; in vec3 c; out vec4 o; void main() { o = vec4(c, 1.0); }`)
gl.linkProgram(program); gl.useProgram(program)
gl.enable(gl.DEPTH_TEST); gl.clearColor(1, 1, 1, 1)
const fill = (kind, data) => { gl.bindBuffer(kind, gl.createBuffer())
  gl.bufferData(kind, data, gl.STATIC_DRAW) }
const feed = (name, data, kind, scaled) => { fill(gl.ARRAY_BUFFER, data)
  const at = gl.getAttribLocation(program, name); gl.enableVertexAttribArray(at)
  gl.vertexAttribPointer(at, 3, kind, scaled, 0, 0) }
feed("place", place.map(v => v / size), gl.FLOAT, false)
feed("color", color, gl.UNSIGNED_BYTE, true)
fill(gl.ELEMENT_ARRAY_BUFFER, face)
let turn = 0.5, tilt = 0.35, away = 4
function draw() {
  const w = canvas.width = innerWidth, h = canvas.height = innerHeight
  gl.viewport(0, 0, w, h); gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT)
  // turn about y, then tilt about x, then perspective with near 0.1 and far 20: by columns
  const [c, s, C, S] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)]
  const a = 2.5 * Math.min(1, h / w), b = 2.5 * Math.min(1, w / h), z = -20.1 / 19.9
  gl.uniformMatrix4fv(gl.getUniformLocation(program, "view"), false, [
    a * c, b * S * s, -z * C * s, C * s, 0, b * C, z * S, -S,
    a * s, -b * S * c, z * C * c, -C * c, 0, 0, -4 / 19.9 - z * away, away])
  gl.drawElements(gl.TRIANGLES, face.length, gl.UNSIGNED_INT, 0)
}
canvas.onpointermove = e => { if (!e.buttons) return
  turn += e.movementX / 150
  tilt = Math.max(-1.5, Math.min(1.5, tilt + e.movementY / 150)); draw() }
canvas.onwheel = e => { away = Math.max(2, Math.min(12, away * Math.exp(e.deltaY / 900))); draw() }
onresize = draw; draw()
</script></html>
"""


# ------------------------------------------------------------------ text-to-3D: x0 = g(θ, c), …
class Scene(nn.Module):
    """ASD's generator in 3D: random views of a NeRF, encoded by the prior. x0 = E(render(θ, c))

    views per step; elevation, distance: ranges, degrees and units of length; `overhead`: the part
    of the views that is seen from 62 … 80° of elevation in place of that. The default ranges are
    those tiny-sd was trained on. resolution: pixels, before and after `late` (a fraction of
    `steps`). background: "white", "random" or "learnt". sparsity, opaque: see regulariser().
    """

    def __init__(self, prior, nerf, prompt, rng, steps, views=2, samples=48, elevation=(5.0, 35.0),
                 overhead=0.125, distance=(2.75, 3.1), fovy=40.0, resolution=(32, 64), late=0.3,
                 background="white", sparsity=0.0, opaque=0.0):
        super().__init__()
        self.prior, self.nerf, self.rng, self.steps = prior, nerf.to(prior.device), rng, steps
        self.views, self.samples, self.fovy, self.distance = views, samples, fovy, distance
        self.elevation, self.overhead, self.resolution, self.late = (elevation, overhead,
                                                                     resolution, late)
        self.background, self.sparsity, self.opaque = background, sparsity, opaque
        # view-dependent prompts; solids.view_word states the thresholds
        self.prompts = {word: prior.encode_text([f"{prompt}, {word} view"])
                        for word in ("front", "side", "back", "overhead")}
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.update_grid()

    def update_grid(self, rng=None):
        self.nerf.update_grid(2 * self.nerf.box / self.samples, rng, least=0.002)

    def parameter_groups(self, lr):
        """The table at lr, the networks and the background at lr/10 (as threestudio)."""
        others = [p for p in self.nerf.parameters() if p is not self.nerf.table]
        return [{"params": [self.nerf.table]}, {"params": others, "lr": lr / 10}]

    def cameras(self):
        """-> (c2w [B, 4, 4], the prompts' embeddings [B, L, C]) of random views."""
        import solids
        draw = lambda low, high: low + (high - low) * torch.rand(self.views, generator=self.rng)
        azimuth, distance = draw(-180, 180), draw(*self.distance)
        elevation = torch.where(draw(0, 1) < self.overhead, draw(62, 80), draw(*self.elevation))
        words = [solids.view_word(*pose) for pose in zip(elevation, azimuth)]
        c2w = solids.camera_to_world(elevation, azimuth, distance)
        return c2w.to(self.prior.device), torch.cat([self.prompts[word] for word in words])

    def picture(self, c2w, size, rng=None):
        """A Picture [B, H, W] of the cameras."""
        behind = 1.0
        if rng and self.background == "random":
            behind = torch.rand(len(c2w), 1, 1, 3, generator=rng).to(c2w)
        elif self.background == "learnt":
            behind = self.nerf.background.sigmoid()
        behind = torch.as_tensor(behind).to(c2w).expand(len(c2w), size, size, 3)
        return render(self.nerf, *rays(c2w, self.fovy, size), self.samples, behind, rng)

    def forward(self):
        """-> (x0 [B, C, H, W], the views' prompts [B, L, C], cameras [B, 16] for φ)."""
        if self.step % 16 == 0:
            self.update_grid(self.rng)
        c2w, cond = self.cameras()
        size = self.resolution[int(self.step >= self.late * self.steps)]
        picture = self.picture(c2w, size, self.rng)
        self.opacity = picture.opacity
        rgb = F.interpolate(picture.rgb.permute(0, 3, 1, 2), self.prior.image_size, mode="bilinear",
                            align_corners=False)
        self.step += 1
        return self.prior.encode_image(rgb), cond, c2w.flatten(1)

    def regulariser(self):
        """sparsity · E[√(o² + 0.01)] + opaque · E[H(o)] of the last views' opacities o. -> scalar.

        The first (threestudio) drives out fog, the second, o's binary entropy, half-tones.
        """
        o = self.opacity.clamp(1e-3, 1 - 1e-3)
        entropy = -(o * o.log() + (1 - o) * (1 - o).log())
        return self.sparsity * (o.square() + 0.01).sqrt().mean() + self.opaque * entropy.mean()

    @torch.no_grad()
    def images(self):
        """-> RGB [4, 3, H, W]: front, side, back, side."""
        picture = self.picture(orbit(4).to(self.prior.device), self.prior.image_size[0])
        return picture.rgb.permute(0, 3, 1, 2).clamp(0, 1)


def compare(nerf, kind, color, samples=64, distance=2.9):
    """How near the NeRF is to a solid of solids.py, over eight views of 64 pixels.

    -> {"iou": of the silhouettes, "psnr": dB on white}.
    """
    azimuth = torch.arange(8) * 45.0
    truth = solid_pictures(kind, color, torch.full((8,), 20.0), azimuth, distance)
    seen = look(nerf, truth, samples)
    a, b = seen.opacity.cpu() > 0.5, truth.opacity > 0.5
    return {"iou": ((a & b).sum() / (a | b).sum().clamp(min=1)).item(),
            "psnr": psnr(seen.rgb.cpu(), truth.over(1.0))}


def write_all(folder, nerf, threshold):
    """nerf.safetensors, views.png, turntable.gif, mesh.glb, viewer.html; -> the last one written.

    A density without a surface costs the mesh, not the run: one line says so.
    """
    nerf.save(folder / "nerf.safetensors")
    write_views(folder / "views.png", nerf)
    write_turntable(folder / "turntable.gif", nerf)
    try:
        write_mesh(folder, extract_mesh(nerf, threshold))
    except (ValueError, ImportError) as error:
        print(f"nerf.py: no mesh: {error}", file=sys.stderr)
        return folder / "turntable.gif"
    return folder / "viewer.html"


# ----------------------------------------------------------------------------------- command line
DEFAULTS = {"prompt": None, "views": 2, "samples": 48, "elevation": [5.0, 35.0], "overhead": 0.125,
            "distance": [2.75, 3.1], "fovy": 40.0, "resolution": [32, 64], "late": 0.3,
            "background": "white", "sparsity": 0.0, "opaque": 0.0, "blob": 10.0,
            "blob_radius": 0.5, "threshold": 10.0, "kernels": "auto"}
SCENE = ("views", "samples", "elevation", "overhead", "distance", "fovy", "resolution", "late",
         "background", "sparsity", "opaque")


def methods():
    """The rows of asd.py and variants.py at the rates and the schedule of 3D (λ 7.5, γ −0.5)."""
    from dataclasses import replace

    from asd import METHODS
    try:
        from variants import METHODS as others
    except ImportError:
        others = {}
    rows = {name: replace(row, lr=0.01, steps=600, t_max_late=0.5, t_late=0.5)
            for name, row in (METHODS | others).items()}
    return rows | {"asd": replace(rows["asd"], gamma=-0.5)}


def add_flags(add):
    from runs import number
    some, positive = number(float), number(float, 0, 1e30)
    add("--prompt", metavar="TEXT", help="what to make")
    add("--views", type=number(int, 1), help="pictures per step (default 2)")
    add("--samples", type=number(int, 2), help="along each ray (default 48)")
    add("--elevation", type=some, nargs=2, help="degrees, least and largest (default 5 35)")
    add("--overhead", type=number(float, 0, 1), help="the part seen from above (default 0.125)")
    add("--distance", type=positive, nargs=2, help="of the camera (default 2.75 3.1)")
    add("--fovy", type=number(float, 1, 170), help="vertical angle of view, degrees (default 40)")
    add("--resolution", type=number(int, 4), nargs=2, help="pixels, at first and later (32 64)")
    add("--late", type=number(float, 0, 1), help="when: a fraction of the steps (default 0.3)")
    add("--background", choices=["white", "random", "learnt"], help="default white")
    add("--sparsity", type=some, help="weight against fog (default 0)")
    add("--opaque", type=some, help="weight against half-tones (default 0)")
    add("--blob", type=some, help="density at the origin at the start (default 10)")
    add("--blob-radius", type=number(float, 1e-3), help="where it ends (default 0.5)")
    add("--threshold", type=positive, help="density of the mesh's surface (default 10)")
    add("--kernels", choices=["auto", "torch", "triton"], help="default auto: Triton on CUDA")


def check(settings):
    """What can be said before anything is loaded."""
    from asd import UserError
    if not (settings["prompt"] or "").strip():
        raise UserError('give a --prompt that is not empty, such as --prompt "a red mug", or --fit')
    for name in ("elevation", "distance"):
        if settings[name][0] > settings[name][1]:
            raise UserError(f"--{name} takes the least value first")


def build(settings, prior, method, rng, folder, anew):
    """The Scene, and φ: a LoRA is told the camera, and the prompt without the view."""
    import runs
    nerf = NeRF(blob=settings["blob"], blob_radius=settings["blob_radius"],
                kernels=settings["kernels"], seed=settings["seed"])
    use_triton(settings["kernels"], torch.empty(0, device=prior.device))
    scene = Scene(prior, nerf, settings["prompt"], rng, method.steps,
                  **{key: settings[key] for key in SCENE})
    cond = prior.encode_text([settings["prompt"]])
    if method.phi == "lora":
        from phi import LoRAPhi
        phi = LoRAPhi(prior, settings["rank"], cond=cond, camera=16, seed=settings["seed"],
                      checkpointing=settings["checkpointing"])
    else:
        phi = runs.phi_of(settings, prior, method,      # every prompt that a view may ask
                          [f"{settings['prompt']}, {view} view" for view in scene.prompts])
    return scene, cond, phi, None


def measure(settings, prior, state, images):
    """Against the solid that the prompt describes, if it is one."""
    solid = find_solid(settings["prompt"])
    return compare(state.generator.nerf, *solid) if solid else {}


def finish(folder, settings, prior, state, frames):
    """All that write_all writes, and the numbers."""
    values = measure(settings, prior, state, None)
    if values:
        print("silhouette IoU {iou:.3f}, PSNR {psnr:.2f} dB over 8 views".format(**values))
    return write_all(folder, state.generator.nerf, settings["threshold"])


def fit_main(arguments):
    """`python nerf.py --fit …`. -> exit status."""
    from tqdm import trange

    import runs
    p = runs.Parser(prog="nerf.py --fit", description="Fit a NeRF to posed pictures.")
    add, count = p.add_argument, runs.number(int, 1)
    add("--fit", metavar="DIR_OR_BUILTIN", required=True,
        help='a folder with transforms.json, or a solid such as "red mug"')
    add("--pictures", type=count, default=40, help="of a built-in solid (default 40)")
    add("--size", type=runs.number(int, 8), default=64, help="pixels (default 64)")
    add("--steps", type=count, default=600)
    add("--batch", type=count, default=1024, help="rays per step (default 1024)")
    add("--samples", type=runs.number(int, 2), default=64, help="along each ray (default 64)")
    add("--lr", type=runs.number(float, 0, 1e30), default=2e-2)
    add("--box", type=runs.number(float, 1e-3), help="half the side of the scene (1; folders 1.5)")
    add("--background", choices=["white", "random"], default="random", help="default random")
    add("--view", action="store_true", help="colours depend on the direction")
    add("--threshold", type=float, default=10.0, help="density of the mesh's surface")
    add("--kernels", choices=["auto", "torch", "triton"], default="auto")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=count, default=0)
    add("--out", metavar="DIR", help="default outputs/fit-<name>")
    args = p.parse_args(arguments)
    folder = Path(args.fit)
    nerf = NeRF(args.box or (1.5 if folder.is_dir() else 1.0), density="exp", blob=5.0,
                blob_radius=0.6, view=args.view, kernels=args.kernels, seed=args.seed)
    nerf.to(args.device)
    use_triton(args.kernels, nerf.table)
    if folder.is_dir():
        learnt, held_out = posed_folder(folder, args.size)
    elif find_solid(args.fit):
        learnt, held_out = builtin_scene(*find_solid(args.fit), args.pictures, size=args.size,
                                         seed=args.seed)
    else:
        import solids
        raise ValueError(f"--fit {args.fit!r} is neither a folder nor a solid, such as "
                         f'"red mug": {", ".join(solids.COLORS)}; {", ".join(solids.KINDS)}')
    white, began = None if args.background == "random" else (1.0, 1.0, 1.0), time.perf_counter()
    with trange(args.steps, desc="fit") as bar:
        def show(step, loss):
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss:.5f}", PSNR=f"{-10 * math.log10(loss):.1f}")
        fit(nerf, learnt, args.steps, args.batch, args.samples, args.lr, white,
            torch.Generator().manual_seed(args.seed), show)
    seconds, truth = time.perf_counter() - began, held_out.over(1.0)
    seen = look(nerf, held_out, args.samples).rgb.cpu()
    print(f"PSNR on {len(truth)} held-out views: {psnr(seen, truth):.2f} dB; {seconds:.0f} s")
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-") or "scene"
    out = Path(args.out or Path("outputs") / f"fit-{name}")
    out.mkdir(parents=True, exist_ok=True)
    pictures_to_png(out / "truth.png", [truth[:8], seen[:8]])            # above, below
    print(write_all(out, nerf, args.threshold))
    return 0


def main(argv=None):
    """Text-to-3D as a program of runs.py, or --fit."""
    import runs
    arguments = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] == "--fit" for flag in arguments):
        return runs.main(argv, runs.Program(
            name="nerf.py", about="Make a 3D object that looks, to a frozen text-to-image "
            "diffusion model, like the prompt (Adversarial Score Distillation). For posed "
            "pictures: --fit --help.",
            methods=methods, add_flags=add_flags, defaults=DEFAULTS,
            prompts=lambda settings: [settings["prompt"]], check=check, build=build, finish=finish,
            measure=measure))
    try:
        return fit_main(arguments)
    except (runs.UserError, ValueError, OSError, RuntimeError) as mistake:
        print(f"nerf.py: {str(mistake).splitlines()[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
