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
def encode_kernel(x, table, levels, out, grad_table, grad_x, N, mask, L: tl.constexpr,
                  C: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr, X: tl.constexpr):
    """BLOCK points (axis 0) at one level (axis 1); levels [L, 3]: n, first row, dense or not.

    Where the gradient of the TABLE or of X (of each level alone) is wanted, out holds ∂L/∂out.
    """
    # 64 bits, as N · L · C may exceed 2³¹
    l, i = tl.program_id(1), tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, here = tl.arange(0, C)[None, :], i < N
    n, first = tl.load(levels + 3 * l), tl.load(levels + 3 * l + 1)
    dense = tl.load(levels + 3 * l + 2) != 0
    px, py = tl.load(x + 3 * i, here, 0) * n, tl.load(x + 3 * i + 1, here, 0) * n
    pz = tl.load(x + 3 * i + 2, here, 0) * n
    cx, cy = tl.clamp(tl.floor(px), 0, n - 1), tl.clamp(tl.floor(py), 0, n - 1)
    cz = tl.clamp(tl.floor(pz), 0, n - 1)                            # the cell's lower vertex
    at = (i[:, None] * L + l) * C + c                                # of h_l(x) in out
    h = tl.load(out + at, here[:, None], 0) if TABLE or X else px[:, None] * c * 0
    gx, gy, gz = px * 0, px * 0, px * 0
    for k in tl.static_range(8):                                     # its eight vertices
        a, b, d = k // 4, k // 2 % 2, k % 2
        vx, vy, vz = cx.to(tl.int32) + a, cy.to(tl.int32) + b, cz.to(tl.int32) + d
        hashed = (vx ^ (vy * -1640531535) ^ (vz * 805459861)) & mask
        row = first + tl.where(dense, vx + (n + 1) * (vy + (n + 1) * vz), hashed)
        row = row.to(tl.int64)[:, None] * C + c
        wx, wy = 1 - a + (2 * a - 1) * (px - cx), 1 - b + (2 * b - 1) * (py - cy)
        wz = 1 - d + (2 * d - 1) * (pz - cz)                         # f or 1 − f
        value = tl.load(table + row, here[:, None], 0)
        if TABLE:
            tl.atomic_add(grad_table + row, (wx * wy * wz)[:, None] * h, here[:, None])
        if X:
            s = tl.sum(h * value, 1) * n                             # ∂f/∂x = n
            gx += (2 * a - 1) * wy * wz * s
            gy += wx * (2 * b - 1) * wz * s
            gz += wx * wy * (2 * d - 1) * s
        if not (TABLE or X):
            h += (wx * wy * wz)[:, None] * value
    if X:                                                            # grad_x [L, N, 3]
        to = grad_x + 3 * (l.to(tl.int64) * N + i)
        tl.store(to, gx, here)
        tl.store(to + 1, gy, here)
        tl.store(to + 2, gz, here)
    if not (TABLE or X):
        tl.store(out + at, h, here[:, None])


@triton.jit
def composite_kernel(sigma, delta, values, out, opacity, grad_sigma, grad_values, S,
                     C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
                     BACKWARD: tl.constexpr):
    """One ray; BLOCK and COLUMNS are the powers of two from S and C on.

    With BACKWARD, out and opacity hold the gradients of those, and the other two are written.
    """
    r, i, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
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


class Encode(torch.autograd.Function):
    """hash_encode(x [N, 3], table [rows, C]); its gradient has no gradient. C: a power of two."""

    @staticmethod
    def forward(ctx, x, table, levels, size):
        x, table = x.contiguous(), table.contiguous()
        levels = torch.tensor(levels, dtype=torch.int32, device=x.device)
        out = x.new_empty(len(x), len(levels) * table.shape[1])
        ctx.save_for_backward(x, table, levels)
        ctx.mask = size - 1
        Encode.launch(x, table, levels, out, None, None, ctx.mask)
        return out

    @staticmethod
    def launch(x, table, levels, out, grad_table, grad_x, mask):
        N, L, C, block = len(x), len(levels), table.shape[1], 128 if x.is_cuda else 1024
        with torch.cuda.device_of(x):                    # Triton launches on the current device
            encode_kernel[(-(-N // block), L)](
                x, table, levels, out, grad_table, grad_x, N, mask, L=L, C=C, BLOCK=block,
                TABLE=grad_table is not None, X=grad_x is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, table, levels = ctx.saved_tensors
        grad_x = x.new_empty(len(levels), *x.shape) if ctx.needs_input_grad[0] else None
        grad_table = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        Encode.launch(x, table, levels, grad.contiguous(), grad_table, grad_x, ctx.mask)
        return grad_x if grad_x is None else grad_x.sum(0), grad_table, None, None


class Composite(torch.autograd.Function):
    """composite(σ [R, S], δ [R], values [R, S, C]); δ has no gradient, nor have the gradients."""

    @staticmethod
    def forward(ctx, sigma, delta, values):
        tensors = [tensor.contiguous() for tensor in (sigma, delta, values)]
        out, opacity = sigma.new_empty(len(sigma), values.shape[2]), sigma.new_empty(len(sigma))
        ctx.save_for_backward(*tensors)
        Composite.launch(*tensors, out, opacity, sigma, values, False)
        return out, opacity

    @staticmethod
    def launch(sigma, delta, values, out, opacity, grad_sigma, grad_values, backward):
        (R, S, C), up = values.shape, lambda n: 1 << (n - 1).bit_length()
        with torch.cuda.device_of(sigma):
            composite_kernel[(R,)](
                sigma, delta, values, out, opacity, grad_sigma, grad_values, S, C=C, BLOCK=up(S),
                COLUMNS=up(C), BACKWARD=backward)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_opacity):
        sigma, delta, values = ctx.saved_tensors
        grads = torch.empty_like(sigma), torch.empty_like(values)
        Composite.launch(sigma, delta, values, grad_out.contiguous(), grad_opacity.contiguous(),
                         *grads, True)
        return grads[0], None, grads[1]
