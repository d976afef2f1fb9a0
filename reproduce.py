"""The paper's figures, in miniature.

    python reproduce.py mixture        # figures/mixture.png: methods at their optimum; CPU, 10 s
    python reproduce.py methods        # figures/methods.png: sampling, SDS, VSD, ASD; CPU, 10 min
    python reproduce.py edits          # figures/edits.png: Eq. 11, three edits by DDS and by ASD
    python reproduce.py edit-table     # figures/edit-table.json: 60 edits by each, with errors
"""

import argparse
import contextlib
import math
import os

import torch

import asd
from conftest import GaussianMixture, particle_eps, randn
from prior import HERE
from runs import distances, read_image
from variants import ddim_samples

# Every method is Eq. 7 with one choice, the noise prediction that stands for the fake samples.
# ε: the added noise; ε_g = E[ε | x_t] over the particles; ε_y: the prior's conditional prediction.
FAKES = {
    "sds": lambda eps, eps_g, eps_y: eps,
    "vsd": lambda eps, eps_g, eps_y: eps_g,
    "csd": lambda eps, eps_g, eps_y: eps_y,
    "asd": lambda eps, eps_g, eps_y, gamma: asd.optimal_eps_phi(eps_g, eps_y, gamma),
}
PANELS = [("sds", 1.0, None), ("vsd", 7.5, None), ("asd", 7.5, -0.5), ("asd", 7.5, -0.9),
          ("vsd", 1.0, None)]


def two_rings():
    """Class 0 (y): 8 modes on a ring of radius 2.  Class 1: 8 modes between them, at radius 1.

    The other class decides how far guidance can push: nothing bounds it here, as both have the same
    spread.  It is one of six we tried: in all six the methods keep their order, but not their gaps.
    With one broad Gaussian (std 2) in its place VSD at λ 7.5 scores 0.12 instead of 0.42, and ASD
    with γ −0.5 scores 0.09 instead of 0.29.
    """
    angle = torch.arange(16, dtype=torch.float64) * math.pi / 8
    radius = 2.0 - torch.arange(16) % 2
    means = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, [0.2] * 16, labels=torch.arange(16) % 2)


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


@contextlib.contextmanager
def one_thread():
    """Tensors of a few thousand numbers: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def mixture_experiment(method, lam, gamma=None, seed=0, particles=256, steps=300, lr=0.1):
    """Distil the exact prior into 2-D particles, with φ always at the minimiser of Eq. 10.

    Nothing is learned but the particles θ = x0 [N, 2]: ε_∅, ε_y and ε_g are closed-form, ω = σ_t².
    Returns the particles and their MMD to p(x0|y).  256 independent draws from p(x0|y) would score
    0.05: at λ = 1 the particles, which repel one another, cover it more evenly than that.
    """
    prior = two_rings()
    g = torch.Generator().manual_seed(seed)
    theta = randn(particles, 2, generator=g)
    extra = {} if gamma is None else {"gamma": gamma}
    optimiser = torch.optim.Adam([theta.requires_grad_()], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x0 = theta.detach()
        angle = 0.5 * math.pi * (0.02 + 0.96 * torch.rand(particles, 1, generator=g))
        alpha_t, sigma_t = angle.double().cos(), angle.double().sin()
        eps = randn(particles, 2, generator=g)
        x_t = asd.add_noise(x0, eps, alpha_t, sigma_t)
        eps_uncond, eps_y = prior.eps(x_t, alpha_t, sigma_t), prior.eps(x_t, alpha_t, sigma_t, y=0)
        eps_phi = FAKES[method](eps, particle_eps(x_t, x0, alpha_t, sigma_t), eps_y, **extra)
        theta.grad = asd.generator_grad(eps_uncond, eps_y, eps_phi, lam, sigma_t ** 2)
        optimiser.step()
        schedule.step()
    return theta.detach(), mmd(theta.detach(), prior)


def mixture_figure(path, side=400, view=4.0, steps=1000):
    """Draw every row of PANELS: the particles over p(x0|y) (blue) and the other class (grey)."""
    from PIL import Image, ImageDraw, ImageFont

    prior = two_rings()
    ticks = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 * view - view
    grid = torch.stack(torch.meshgrid(ticks, -ticks, indexing="xy"), -1)        # [side, side, 2]
    shade = [prior.log_p(grid, y=y).exp() for y in (0, 1)]
    shade = [(s / s.max()).sqrt()[..., None] for s in shade]
    white, blue, grey = (torch.tensor(c).double() for c in ([255] * 3, [120, 170, 232], [214] * 3))
    ground = white + shade[1] * (grey - white)
    ground = ground + shade[0] * (blue - ground)
    background = Image.fromarray(ground.round().byte().numpy())

    gap, top, bottom = side // 20, side // 4, side // 7
    size = (len(PANELS) * (side + gap) + gap, top + side + bottom)
    sheet = Image.new("RGB", size, "white")
    write = ImageDraw.Draw(sheet)
    large, small = (ImageFont.load_default(size=side // n) for n in (10, 17))
    for column, (method, lam, gamma) in enumerate(PANELS):
        particles, score = mixture_experiment(method, lam, gamma, steps=steps)
        # Drawn four times too large, then reduced: Pillow's circles have no smooth edge.
        panel = background.resize((4 * side, 4 * side), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(panel, "RGBA")
        for x, y in particles.tolist():
            u, v = (2 * side * (1 + x / view), 2 * side * (1 - y / view))
            r = side / 28
            draw.ellipse((u - r, v - r, u + r, v + r), (200, 50, 40, 190), (255, 255, 255, 220), 3)
        panel = panel.resize((side, side), Image.Resampling.LANCZOS)
        left = gap + column * (side + gap)
        sheet.paste(panel, (left, top))
        write.rectangle((left, top, left + side - 1, top + side - 1), outline=(190, 190, 190))
        # Pillow's built-in font has no Greek letters, hence the words.
        settings = f"guidance {lam:g}" + ("" if gamma is None else f",  gamma {gamma:g}")
        middle = left + side // 2
        write.text((middle, top * 0.36), method.upper(), "black", large, anchor="mm")
        write.text((middle, top * 0.76), settings, (90, 90, 90), small, anchor="mm")
        write.text((middle, top + side + bottom * 0.5), f"MMD {score:.3f}", "black", small,
                   anchor="mm")
    save_png(sheet, path)


PROMPTS = ["a red apple", "a fox", "a hamburger", "a rocket", "a mushroom"]


def methods_figure(path, side=160):
    """Draw the same prompts and seed by sampling (50 DDIM steps, guidance 3) and by each method."""
    prior = asd.Prior.from_pretrained("tiny-sd")
    columns = [("sampling", sampled(prior, PROMPTS))]
    for method in asd.METHODS:
        images = []
        for prompt in PROMPTS:
            latents = asd.Latents(prior, rng=torch.Generator().manual_seed(0))
            asd.distill(prior, latents, prior.encode_text([prompt]), method)
            images.append(latents.images())
            print(f"{method}: {prompt}")
        columns.append((method.upper(), torch.cat(images)))
    names, images = zip(*columns, strict=True)
    rows = [(prompt, torch.stack(row)) for prompt, row in zip(PROMPTS, zip(*images, strict=True),
                                                              strict=True)]
    sheet(path, names, rows, side)


def sampled(prior, prompts, seed=0):
    """Text-to-image of every prompt from the same noise -> RGB [B, 3, H, W] in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    x_T = torch.randn(1, *prior.shape, generator=rng).repeat(len(prompts), 1, 1, 1)
    return prior.decode(ddim_samples(prior, prompts, x_T))


def save_png(picture, path):
    """Write a PIL picture beside its place and move it there."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    picture.save(path + ".tmp", format="PNG", optimize=True)
    os.replace(path + ".tmp", path)


# kind of edit: (example picture, what it is, what it is to become)
EDITS = {
    "simplification": ("fox", "a 3d render of a fox", "a flat icon of a fox"),
    "refinement": ("dog-flat", "a flat icon of a dog", "a 3d render of a dog"),
    "replacement": ("cat", "a 3d render of a cat", "a 3d render of a dog"),
}


def edits_figure(path, side=192):
    """Three edits, a row each: the source, by Delta Denoising Score, by ASD."""
    import editing
    prior = asd.Prior.from_pretrained("tiny-sd")
    rows = []
    for kind, (name, source, target) in EDITS.items():
        image = read_image(HERE / "examples" / f"{name}.png", prior.image_size)
        edited = [editing.edit(prior, image, [source], [target], method)
                  for method in ("dds", "asd")]
        rows.append((f"{kind}:\n{source}\n-> {target}", torch.cat([image, *edited])))
        print(kind)
    sheet(path, ["source", "DDS", "ASD"], rows, side)


def sheet(path, columns, rows, side, left=None):
    """A labelled grid: column names, and for each row its label and pictures [N, 3, H, W]."""
    from PIL import Image, ImageDraw, ImageFont
    top, left = side // 4, left or round(1.1 * side)
    page = Image.new("RGB", (left + side * len(columns), top + side * len(rows)), "white")
    write = ImageDraw.Draw(page)
    font, small = (ImageFont.load_default(size=side // n) for n in (9, 13))
    for i, name in enumerate(columns):
        write.text((left + side * (i + 0.5), top // 2), name, "black", font, anchor="mm")
    for j, (label, images) in enumerate(rows):
        write.multiline_text((left // 2, top + side * (j + 0.5)), label, "black", small,
                             anchor="mm", align="center")
        for i, image in enumerate(images):
            picture = Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
            page.paste(picture, (left + side * i, top + side * j))
    save_png(page, path)


CONCEPTS = """fox,cat,dog,red apple,hamburger,rocket,mushroom,penguin,frog,pizza,tiger,lion,
panda,cherries,strawberry,pineapple,guitar,owl,snail,whale""".replace("\n", "").split(",")


def edit_table(path, count=20, methods=("dds", "asd")):
    """Edits of every kind of the prior's own samples; prints means ± standard errors.

    Sources are sampled ("a 3d render of a fox", …), 20 of each kind. Replacement turns each concept
    into the next one of the list.
    """
    import json

    import editing
    import tiny_sd
    prior = asd.Prior.from_pretrained("tiny-sd")
    names = [tiny_sd.articled(concept) for concept in CONCEPTS[:count]]
    prompts = {
        "simplification": [(f"a 3d render of {n}", f"a flat icon of {n}") for n in names],
        "refinement": [(f"a flat icon of {n}", f"a 3d render of {n}") for n in names],
        "replacement": [(f"a 3d render of {n}", f"a 3d render of {names[i - 1]}")
                        for i, n in enumerate(names)]}
    found = {}
    for kind, pairs in prompts.items():
        sources, targets = (list(x) for x in zip(*pairs, strict=True))
        before = sampled(prior, sources)
        edited = {"source": before, "target, sampled": sampled(prior, targets)}
        for method in methods:
            size = count if editing.METHODS[method].phi == "noise" else 1
            edited[method] = torch.cat([editing.edit(
                prior, before[i:i + size], sources[i:i + size], targets[i:i + size], method)
                for i in range(0, count, size)])
        for name, after in edited.items():
            each = [distances(before[i:i + 1], after[i:i + 1], *pairs[i])
                    for i in range(count)]
            row = {key: torch.tensor([e[key] for e in each]) for key in each[0]}
            found[f"{kind}, {name}"] = {key: (x.mean().item(), x.std().item() / count ** 0.5)
                                        for key, x in row.items()}
            print(f"{kind:15} {name:16}", "  ".join(
                f"{key} {mean:6.3f} ± {error:.3f}"
                for key, (mean, error) in found[f"{kind}, {name}"].items()), flush=True)
    with open(path, "w") as file:
        json.dump(found, file, indent=1)


FIGURES = {"mixture": mixture_figure, "methods": methods_figure, "edits": edits_figure,
           "edit-table": edit_table}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("--out", help="default: figures/<figure>.png")
    arguments = parser.parse_args(argv)
    ending = "json" if arguments.figure.endswith("table") else "png"
    path = arguments.out or f"figures/{arguments.figure}.{ending}"
    FIGURES[arguments.figure](path)
    print(path)


if __name__ == "__main__":
    main()
