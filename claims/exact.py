"""exact.py — what the paper says, where all is known: a Gaussian mixture, φ at its minimiser.

Two classes share the plane, y in blue and another in grey. ε_∅, ε_y and ε_g = E[ε | x_t] over the
particles are closed-form (tiny/exact.py), and so is the discriminator, the minimiser of Eq. 10.
Nothing is learned but the particles θ = x0 [N, 2]. figures/explorer.html does the same, live.
"""
import contextlib
import math

import torch

import asd
from claims.work import Claim, Job, mean_and_error
from export import save_png
from tiny.exact import GaussianMixture, particle_eps, randn
from tiny.training import threads_kept

# Every method is Eq. 7 with one choice, the noise prediction that stands for the fake samples.
# ε: the added noise; ε_g = E[ε | x_t] over the particles; ε_y: the prior's conditional prediction.
FAKES = {
    "sds": lambda eps, eps_g, eps_y: eps,
    "vsd": lambda eps, eps_g, eps_y: eps_g,
    "csd": lambda eps, eps_g, eps_y: eps_y,
    "asd": lambda eps, eps_g, eps_y, gamma: asd.optimal_eps_phi(eps_g, eps_y, gamma),
}


def two_rings():
    """Class 0 (y): 8 modes on a ring of radius 2.  Class 1: 8 modes between them, at radius 1.

    The other class decides how far guidance can push: nothing bounds it here, as both have the same
    spread; ring_in_a_cloud() does.  These are two of six that were tried when the first was chosen:
    all six kept SDS at λ 1, VSD at 7.5 and ASD in this order, but not their gaps.
    """
    angle = torch.arange(16, dtype=torch.float64) * math.pi / 8
    radius = 2.0 - torch.arange(16) % 2
    means = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, [0.2] * 16, labels=torch.arange(16) % 2)


def ring_in_a_cloud():
    """The same class 0.  Class 1, as likely as it: one Gaussian of std 2 about the origin."""
    ring = two_rings().means[::2]
    return GaussianMixture(torch.cat([ring, torch.zeros(1, 2)]), [0.2] * 8 + [2.0], [1.0] * 8 + [8],
                           labels=[0] * 8 + [1])


MIXTURES = {"two rings": two_rings, "a ring in a cloud": ring_in_a_cloud}


def mmd(particles, mixture, y=0, bandwidth=1.0):
    """Maximum mean discrepancy to p(x0|y), Gaussian kernel k, with exact expectations over p.

    MMD² = E k(x, x') − 2 E k(x, z) + E k(z, z'),  x ~ particles [N, D], z ~ p(x0|y).
    """
    mine = mixture.labels == y
    means, var = mixture.means[mine], mixture.stds[mine, 0] ** 2                # isotropic modes
    w = torch.softmax(mixture.log_w[mine], 0)

    def kernel(a, b, extra):
        """E k(a + n, b) for Gaussian n of variance `extra`."""
        v = bandwidth ** 2 + extra
        distance = (a[:, None] - b).pow(2).sum(-1)
        return (bandwidth ** 2 / v) ** (a.shape[1] / 2) * torch.exp(-distance / (2 * v))

    xx = kernel(particles, particles, torch.zeros(())).mean()
    xz = (kernel(particles, means, var) * w).sum(1).mean()
    zz = (kernel(means, means, var[:, None] + var) * w * w[:, None]).sum()
    return math.sqrt(max(0.0, xx - 2 * xz + zz))


# ------------------------------------------------------------------------------------- a run
@contextlib.contextmanager
def one_thread():
    """Tensors of a few thousand numbers: more threads only wait for one another."""
    with threads_kept():
        torch.set_num_threads(1)
        yield


def draws(particles, steps, seed):
    """All randomness of a run: start [N, 2], t [steps, N, 1] in (0.02, 0.98), ε [steps, N, 2]."""
    g = torch.Generator().manual_seed(seed)
    start = randn(particles, 2, generator=g)
    t = 0.02 + 0.96 * torch.rand(steps, particles, 1, generator=g, dtype=torch.float64)
    return start, t, randn(steps, particles, 2, generator=g)


def gradient(mixture, method, lam, gamma, x0, t, eps):
    """Eq. 7 at particles x0 [N, 2] with φ at Eq. 10's minimiser: ω = σ_t², α_t = cos(πt/2)."""
    alpha_t, sigma_t = torch.cos(0.5 * math.pi * t), torch.sin(0.5 * math.pi * t)
    x_t = asd.add_noise(x0, eps, alpha_t, sigma_t)
    eps_uncond, eps_y = mixture.eps(x_t, alpha_t, sigma_t), mixture.eps(x_t, alpha_t, sigma_t, y=0)
    eps_phi = FAKES[method](eps, particle_eps(x_t, x0, alpha_t, sigma_t), eps_y,
                            **({} if gamma is None else {"gamma": gamma}))
    return asd.generator_grad(eps_uncond, eps_y, eps_phi, lam, sigma_t ** 2)


@one_thread()
def mixture_experiment(method, lam, gamma=None, seed=0, particles=256, steps=300, lr=0.1,
                       mixture=two_rings):
    """Distil a mixture into particles by Adam, its rate falling along a cosine from lr to 0.

    -> the particles and their MMD to p(x0|y).  256 independent draws from p(x0|y) would score
    0.05: at λ = 1 the particles, which repel one another, cover it more evenly than that.
    """
    mixture, (theta, *noise) = mixture(), draws(particles, steps, seed)
    optimiser = torch.optim.Adam([theta.requires_grad_()], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for t, eps in zip(*noise):
        theta.grad = gradient(mixture, method, lam, gamma, theta.detach(), t, eps)
        optimiser.step()
        schedule.step()
    return theta.detach(), mmd(theta.detach(), mixture)


# ----------------------------------------------------------------------------------- the claim
ROWS = {"SDS, λ 1": ("sds", 1.0), "SDS": ("sds", 7.5), "SDS, λ 10⁴": ("sds", 1e4),
        "VSD": ("vsd", 7.5), "CSD": ("csd", 7.5), "ASD": ("asd", 7.5, -0.5),
        "ASD, γ −0.9": ("asd", 7.5, -0.9), "ASD, γ 1": ("asd", 7.5, 1.0),
        "ASD, γ 1000": ("asd", 7.5, 1000.0), "VSD, λ 1": ("vsd", 1.0)}   # λ 7.5, γ −0.5 if not said
SEEDS = 5


def distilled(mixture, method, lam, gamma=None, steps=1000):
    """One row from SEEDS starts, the same for every row. -> particles [S, 256, 2], mmd [S]."""
    made = [mixture_experiment(method, lam, gamma, seed, steps=steps, mixture=MIXTURES[mixture])
            for seed in range(SEEDS)]
    particles, scores = zip(*made)
    return {"particles": torch.stack(particles), "mmd": torch.tensor(scores)}


JOBS = {(mixture, name): Job(
    "-".join(["exact", mixture.replace(" ", "-"), *(str(part) for part in row)]), distilled,
    {"mixture": mixture} | dict(zip(("method", "lam", "gamma"), row)), 0.25)
    for mixture in MIXTURES for name, row in ROWS.items()}


def apart(one, other):
    """The mean distance between the same particles of two rows. -> [S]"""
    return (one["particles"] - other["particles"]).norm(dim=-1).mean(-1)


def tests(r):
    """On each mixture, seed by seed: which of two rows is nearer, to p(x0|y) or to a third row."""
    found = {}
    for mixture in MIXTURES:
        row = {name: r[mixture, name] for name in ROWS}
        for far, near in (("SDS", "ASD"), ("VSD", "ASD"), ("SDS, λ 1", "ASD"), ("SDS", "VSD"),
                          ("ASD", "ASD, γ −0.9"), ("ASD, γ 1", "VSD")):
            found[f"{mixture}: MMD, {far} − {near}"] = row[far]["mmd"] - row[near]["mmd"]
        last, csd = row["ASD, γ 1000"], row["CSD"]
        found |= {f"{mixture}: γ ≫ 0 is the classifier: distance to VSD − to CSD":
                      apart(last, row["VSD"]) - apart(last, csd),
                  f"{mixture}: so is a huge λ: distance of CSD to SDS − to SDS at 10⁴":
                      apart(csd, row["SDS"]) - apart(csd, row["SDS, λ 10⁴"])}
    return {name: values.tolist() for name, values in found.items()}


def numbers(r):
    return {name: {f"MMD, {mixture}": mean_and_error(r[mixture, name]["mmd"])
                   for mixture in MIXTURES} for name in ROWS}


# ---------------------------------------------------------------------------------- its figure
# Pillow's built-in font has no Greek letters, hence the words.
PANELS = [("SDS", "SDS", "guidance 7.5"), ("CSD", "CSD", "the classifier term alone"),
          ("VSD", "VSD", "guidance 7.5"), ("ASD", "ASD", "guidance 7.5, gamma -0.5"),
          ("ASD, γ −0.9", "ASD", "guidance 7.5, gamma -0.9"), ("VSD, λ 1", "VSD", "guidance 1")]
VIEW = 4.0                                                # half the width of what a panel shows


def ground(mixture, side):
    """p(x0|y) in blue over the other class in grey, by the root of the density. -> PIL picture."""
    from PIL import Image
    ticks = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 * VIEW - VIEW
    grid = torch.stack(torch.meshgrid(ticks, -ticks, indexing="xy"), -1)        # [side, side, 2]
    shade = [mixture.log_p(grid, y=y).exp() for y in (0, 1)]
    shade = [(s / s.max()).sqrt()[..., None] for s in shade]
    white, blue, grey = (torch.tensor(c).double() for c in ([255] * 3, [120, 170, 232], [214] * 3))
    picture = white + shade[1] * (grey - white)
    picture = picture + shade[0] * (blue - picture)
    return Image.fromarray(picture.round().byte().numpy())


def dotted(picture, particles):
    """Particles on a panel; those outside are rings at its edge. Drawn four times too large, then
    reduced, for smooth edges."""
    from PIL import Image, ImageDraw
    side = picture.width
    picture = picture.resize((4 * side, 4 * side), Image.Resampling.BICUBIC)
    draw, r = ImageDraw.Draw(picture, "RGBA"), side / 28
    red, white = (200, 50, 40, 190), (255, 255, 255, 220)
    for place in particles / VIEW:
        far = place.abs().max().item()
        x, y = (place / (1.03 * far if far > 1 else 1)).tolist()
        u, v = 2 * side * (1 + x), 2 * side * (1 - y)
        draw.ellipse((u - r, v - r, u + r, v + r), *((white, red) if far > 1 else (red, white)), 3)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def figure(path, r, side=320):
    """A row for each mixture, a column for each of PANELS, the first seed; under it its MMD."""
    from PIL import Image, ImageDraw, ImageFont
    gap, top, under = side // 20, side // 4, side // 7
    sheet = Image.new("RGB", (len(PANELS) * (side + gap) + gap,
                              top + len(MIXTURES) * (side + under)), "white")
    write = ImageDraw.Draw(sheet)
    large, small = (ImageFont.load_default(size=side // n) for n in (10, 17))
    for row, (mixture, made) in enumerate(MIXTURES.items()):
        background, upper = ground(made(), side), top + row * (side + under)
        for column, (name, method, settings) in enumerate(PANELS):
            left, result = gap + column * (side + gap), r[mixture, name]
            middle, seen = left + side // 2, result["particles"][0]
            sheet.paste(dotted(background, seen), (left, upper))
            write.rectangle((left, upper, left + side - 1, upper + side - 1),
                            outline=(190, 190, 190))
            if row == 0:
                write.text((middle, top * 0.36), method, "black", large, anchor="mm")
                write.text((middle, top * 0.76), settings, (90, 90, 90), small, anchor="mm")
            if column == 0:
                write.text((left + gap // 2, upper + gap // 2), mixture, (90, 90, 90), small)
            outside = (seen.abs() > VIEW).any(1).sum()
            write.text((middle, upper + side + under * 0.42), f"MMD {result['mmd'][0]:.3f}"
                       + f", {outside} of {len(seen)} outside" * bool(outside),
                       "black", small, anchor="mm")
    save_png(sheet, path)


CLAIMS = {"exact": Claim(
    "on an exact mixture, φ at its minimiser: ASD is nearer to p(x0|y) than SDS and VSD, the lower "
    "γ the nearer; γ ≫ 0 is the classifier", "§§4, 5", JOBS, tests, figure, numbers,
    "two dimensions, two mixtures of ours; φ is Eq. 10's exact minimiser, which no φ of the paper "
    "is, and which γ = −1, its 2D setting, does not have")}
