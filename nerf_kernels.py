"""nerf_kernels.py — the two hot operations of nerf.py on CUDA: Triton kernels and their gradients.

Each computes line by line what its twin in nerf.py does (hash_encode, composite), which is its
definition and its oracle. nerf.py imports this file where there are CUDA and Triton, and works
without it. N points, L levels of C features; R rays, S samples on each.
"""
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


@triton.jit
def cell_of(x, i, axis: tl.constexpr, n, inside):
    """Where the points i lie along an axis, in units of cells, and their cells' lower vertices."""
    p = tl.load(x + 3 * i + axis, inside, 0) * n
    return p, tl.clamp(tl.floor(p), 0, n - 1)       # the far faces belong to the last cells


@triton.jit
def weight(p, cell, upper: tl.constexpr):
    """An axis's part of a vertex's weight: f of the upper one, 1 − f of the lower, f = p − cell."""
    return 1 - upper + (2 * upper - 1) * (p - cell)


@triton.jit
def encode_kernel(x, table, levels, out, grad_table, grad_x, N, mask, L: tl.constexpr,
                  C: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr, X: tl.constexpr):
    """Encode BLOCK points (axis 0) at one level (axis 1), or compute the gradients of that.

    x [N, 3], table [rows, C], levels [L, 3]: n, first row, dense or not; mask = size − 1.
    Forward (neither TABLE nor X): out [N, L, C] is written, as nerf.py's corners and interpolation.
    Backward: out holds ∂L/∂out; TABLE adds to grad_table [rows, C], X writes grad_x [L, N, 3],
    which the caller sums over the levels.
    """
    l = tl.program_id(1)
    # the points of this program; 64 bits, as N · L · C may exceed 2³¹
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N                                                   # the last block is not full
    c = tl.arange(0, C)[None, :]
    n = tl.load(levels + 3 * l)
    first = tl.load(levels + 3 * l + 1)
    dense = tl.load(levels + 3 * l + 2) != 0
    px, cx = cell_of(x, i, 0, n, inside)
    py, cy = cell_of(x, i, 1, n, inside)
    pz, cz = cell_of(x, i, 2, n, inside)
    at = (i[:, None] * L + l) * C + c                                # of h_l(x) in out
    # h: the sum that is made, or in a backward pass its gradient
    if TABLE or X:
        h = tl.load(out + at, inside[:, None], 0)
    else:
        h = px[:, None] * c * 0
    gx, gy, gz = px * 0, px * 0, px * 0
    for k in tl.static_range(8):                                     # the cell's eight vertices
        # a, b, d: 0 for the lower, 1 for the upper one of each axis
        a, b, d = k // 4, k // 2 % 2, k % 2
        vx, vy, vz = cx.to(tl.int32) + a, cy.to(tl.int32) + b, cz.to(tl.int32) + d
        # hashed: (x π₁ ⊕ y π₂ ⊕ z π₃) mod size; dense: x + (n + 1) (y + (n + 1) z)
        hashed = (vx ^ (vy * -1640531535) ^ (vz * 805459861)) & mask
        row = first + tl.where(dense, vx + (n + 1) * (vy + (n + 1) * vz), hashed)
        row = row.to(tl.int64)[:, None] * C + c
        # w = Π_axes (f or 1 − f)
        wx = weight(px, cx, a)
        wy = weight(py, cy, b)
        wz = weight(pz, cz, d)
        value = tl.load(table + row, inside[:, None], 0)
        if TABLE:
            # ∂L/∂table[row] += w ∂L/∂h; points of one block may share a row
            tl.atomic_add(grad_table + row, (wx * wy * wz)[:, None] * h, inside[:, None])
        if X:
            # ∂w/∂x = ± n wy wz, and so on, as ∂f/∂x = n
            s = tl.sum(h * value, 1) * n
            gx += (2 * a - 1) * wy * wz * s
            gy += wx * (2 * b - 1) * wz * s
            gz += wx * wy * (2 * d - 1) * s
        if not (TABLE or X):
            # h_l(x) = Σ_vertices w · table[row]
            h += (wx * wy * wz)[:, None] * value
    if X:
        to = grad_x + 3 * (l.to(tl.int64) * N + i)
        tl.store(to, gx, inside)
        tl.store(to + 1, gy, inside)
        tl.store(to + 2, gz, inside)
    if not (TABLE or X):
        tl.store(out + at, h, inside[:, None])


@triton.jit
def composite_kernel(sigma, delta, values, out, opacity, grad_sigma, grad_values, S,
                     C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
                     BACKWARD: tl.constexpr):
    """Composite one ray, or compute the gradients; BLOCK, COLUMNS: powers of two from S and C on.

    sigma [R, S], delta [R], values [R, S, C] -> out [R, C], opacity [R]. With BACKWARD, out and
    opacity hold the gradients of those, and grad_sigma, grad_values are written.
    """
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, COLUMNS)
    # what of the powers of two is really a sample, a channel, both
    sample = i < S
    channel = c < C
    both = sample[:, None] & channel[None, :]
    spacing = tl.load(delta + r)
    # τ_i = σ_i δ, and that of the sample in front of it
    tau = tl.load(sigma + r * S + i, sample, 0) * spacing
    before = tl.load(sigma + r * S + i - 1, sample & (i > 0), 0) * spacing
    # w_i = T_i (1 − exp(−τ_i)),  T_i = exp(−Σ_{j<i} τ_j):  NeRF, Eq. 3
    T = tl.exp(-tl.cumsum(before, 0))
    w = T * (1 - tl.exp(-tau))
    at = (r * S + i)[:, None] * C + c[None, :]
    v = tl.load(values + at, both, 0)
    if BACKWARD:
        # g_i = ∂L/∂w_i;  ∂L/∂τ_i = T_{i+1} g_i − Σ_{j>i} w_j g_j;  ∂L/∂v_i = w_i ∂L/∂out
        grad = tl.load(out + r * C + c, channel, 0)
        g = tl.sum(v * grad[None, :], 1) + tl.load(opacity + r)
        after = tl.cumsum(w * g, 0, reverse=True) - w * g
        # T_{i+1} = T_i − w_i
        tl.store(grad_sigma + r * S + i, ((T - w) * g - after) * spacing, sample)
        tl.store(grad_values + at, w[:, None] * grad[None, :], both)
    else:
        tl.store(out + r * C + c, tl.sum(w[:, None] * v, 0), channel)
        tl.store(opacity + r, tl.sum(w, 0))


class Encode(torch.autograd.Function):
    """hash_encode(x [N, 3], table [rows, C]) -> [N, L·C]; its gradient has no gradient.

    C is a power of two. levels: (cells a side, first row, dense or not) for each level; size: the
    rows of a hashed level.
    """

    @staticmethod
    def forward(ctx, x, table, levels, size):
        x, table = x.contiguous(), table.contiguous()
        # on the device, so that one compiled kernel serves all levels
        levels = torch.tensor(levels, dtype=torch.int32, device=x.device)
        out = x.new_empty(len(x), len(levels) * table.shape[1])
        ctx.save_for_backward(x, table, levels)
        ctx.mask = size - 1
        Encode.launch(x, table, levels, out, None, None, ctx.mask)
        return out

    @staticmethod
    def launch(x, table, levels, out, grad_table, grad_x, mask):
        """Start the kernel over all blocks of points and all levels."""
        N, L, C = len(x), len(levels), table.shape[1]
        # the interpreter is slow for each block, whatever its size
        block = 128 if x.is_cuda else 1024
        with torch.cuda.device_of(x):                    # Triton launches on the current device
            encode_kernel[(-(-N // block), L)](
                x, table, levels, out, grad_table, grad_x, N, mask, L=L, C=C, BLOCK=block,
                TABLE=grad_table is not None, X=grad_x is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, table, levels = ctx.saved_tensors
        # normals want the gradient of x, a fit that of the table: what is not wanted is None, and
        # the kernel is compiled without it
        grad_x = x.new_empty(len(levels), *x.shape) if ctx.needs_input_grad[0] else None
        # atomic sums begin at 0
        grad_table = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        Encode.launch(x, table, levels, grad.contiguous(), grad_table, grad_x, ctx.mask)
        if grad_x is not None:
            grad_x = grad_x.sum(0)                       # over the levels
        return grad_x, grad_table, None, None


class Composite(torch.autograd.Function):
    """composite(σ [R, S], δ [R], values [R, S, C]) -> (out [R, C], opacity [R]).

    δ has no gradient, nor have the gradients: nerf.py computes by torch what needs those.
    """

    @staticmethod
    def forward(ctx, sigma, delta, values):
        tensors = [tensor.contiguous() for tensor in (sigma, delta, values)]
        out, opacity = sigma.new_empty(len(sigma), values.shape[2]), sigma.new_empty(len(sigma))
        ctx.save_for_backward(*tensors)
        # the last two stand for gradients, which a forward pass does not write
        Composite.launch(*tensors, out, opacity, sigma, values, False)
        return out, opacity

    @staticmethod
    def launch(sigma, delta, values, out, opacity, grad_sigma, grad_values, backward):
        """Start the kernel, a program for each ray."""
        R, S, C = values.shape
        up = lambda n: 1 << (n - 1).bit_length()         # the next power of two
        with torch.cuda.device_of(sigma):
            composite_kernel[(R,)](
                sigma, delta, values, out, opacity, grad_sigma, grad_values, S, C=C, BLOCK=up(S),
                COLUMNS=up(C), BACKWARD=backward)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_opacity):
        sigma, delta, values = ctx.saved_tensors
        # ∂L/∂σ and ∂L/∂values, every element of which the kernel writes
        grads = torch.empty_like(sigma), torch.empty_like(values)
        Composite.launch(sigma, delta, values, grad_out.contiguous(), grad_opacity.contiguous(),
                         *grads, True)
        return grads[0], None, grads[1]
