"""The paper's figures, in miniature.

    python reproduce.py mixture        # figures/mixture.png: methods at their optimum; CPU, 10 s
    python reproduce.py methods        # figures/methods.png: sampling, SDS, VSD, ASD; CPU, 10 min
    python reproduce.py edits          # figures/edits.png: Eq. 11, three edits by DDS and by ASD
    python reproduce.py edit-table     # figures/edit-table.json: 60 edits by each, with errors
    python reproduce.py network        # figures/network.png: drawings made renders in one pass
    python reproduce.py grid           # figures/neighbours.png, thumb-….png: every method; 15 min
    python reproduce.py bridge         # figures/bridge.png: drawings made 3d renders
    python reproduce.py solids         # figures/solids.json: Table 1, 45 objects; hours
"""
import contextlib
import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

import asd
import editing
import text_to_3d
import translation
from conftest import GaussianMixture, particle_eps, randn
from export import picture_measures, save_png, sheet, write_grid, write_text
from nerf import NeRF, orbit, rays, render, solid_pictures
from prior import HERE, ddim_samples
from runs import Parser, guarded, number, read_image
from tiny import corrective
from tiny.corrective import fingerprint
from tiny.data import articled
from tiny.judge import clip_score, distances
from tiny.solids import find_solid
from tiny.training import threads_kept
from variants import all_methods

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
    with threads_kept():
        torch.set_num_threads(1)
        yield


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
    """PROMPTS by sampling (50 DDIM steps, guidance 3) and by asd.py's methods, cells of grid."""
    prior = asd.Prior.from_pretrained("tiny-sd")
    files = cells(prior, asd.METHODS)
    made(files, "1/1", functools.partial(make_cell, prior))
    columns = [sampled(prior, PROMPTS)] + [torch.cat([cell_image(prior, files[name, prompt])
                                                      for prompt in PROMPTS])
                                           for name in asd.METHODS]
    rows = list(zip(PROMPTS, torch.stack(columns, 1), strict=True))
    sheet(path, ["sampling", *(name.upper() for name in asd.METHODS)], rows, side)


def sampled(prior, prompts, seed=0):
    """Text-to-image of every prompt from the same noise -> RGB [B, 3, H, W] in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    x_T = torch.randn(1, *prior.shape, generator=rng).repeat(len(prompts), 1, 1, 1)
    return prior.decode(ddim_samples(prior, prompts, x_T)).cpu()


# kind of edit: (example picture, what it is, what it is to become)
EDITS = {
    "simplification": ("fox", "a 3d render of a fox", "a flat icon of a fox"),
    "refinement": ("dog-flat", "a flat icon of a dog", "a 3d render of a dog"),
    "replacement": ("fox", "a 3d render of a fox", "a 3d render of a panda"),
}


def edits_figure(path, side=192):
    """Three edits, a row each: the source, by Delta Denoising Score, by ASD.

    Under each picture: tiny-clip's score of the target.
    """
    prior = asd.Prior.from_pretrained("tiny-sd")
    rows = []
    for kind, (name, source, target) in EDITS.items():
        image = read_image(HERE / "examples" / f"{name}.png", prior.image_size)
        images = [image, *(editing.edit(prior, image, [source], [target], method)
                           for method in ("dds", "asd"))]
        notes = [f"{clip_score(x, target):.2f}" for x in images]
        rows.append((f"{kind}:\n{source}\n-> {target}", torch.cat(images), notes))
        print(kind, *notes)
    sheet(path, ["source", "DDS", "ASD"], rows, side, corner="tiny-clip's score\nof the target")


# neighbours are alike, as replacement makes each the next one
CONCEPTS = """fox,cat,dog,tiger,lion,panda,penguin,owl,frog,snail,whale,red apple,cherries,
strawberry,pineapple,hamburger,pizza,mushroom,rocket,guitar""".replace("\n", "").split(",")
KINDS = {  # kind of edit: the style before and after, how far down the list the concept moves
    "simplification": ("a 3d render of", "a flat icon of", 0),
    "refinement": ("a flat icon of", "a 3d render of", 0),
    "replacement": ("a 3d render of", "a 3d render of", 1),
}
# the rows of the table: a method, and a reading of the second discriminator's Eq. 9 (editing.Edit)
EDITED_BY = {"dds": ("dds", "eq9"), "asd": ("asd", "eq9"), "swapped": ("asd", "swapped"),
             "both": ("asd", "both")}


def edited_by(name):
    """A row of EDITED_BY as an editing.Edit."""
    method, phi_z = EDITED_BY[name]
    return replace(editing.METHODS[method], phi_z=phi_z)


def edit_prompts(kind, i):
    """(source, target) of the i-th edit of a kind."""
    before, after, further = KINDS[kind]
    nouns = [articled(CONCEPTS[(i + k) % len(CONCEPTS)]) for k in (0, further)]
    return f"{before} {nouns[0]}", f"{after} {nouns[1]}"


def edited_unit(prior, kind, i):
    """The i-th edit of a kind by each of EDITED_BY, with one seed -> {name: distances}.

    Beside them the source itself, and a picture of the target that does not know the source.
    """
    source, target = edit_prompts(kind, i)
    before = sampled(prior, [source], i)
    pictures = {"source": before, "unrelated": sampled(prior, [target], 1000 + i)} | {
        name: editing.edit(prior, before, [source], [target], edited_by(name), i)
        for name in EDITED_BY}
    return {name: distances(before, after, source, target) for name, after in pictures.items()}


def edit_table(path, part="1/1"):
    """20 edits of each kind of the prior's own samples by each method: means ± standard errors.

    Edits that are there already (outputs/edits/) are not made again. part "1/2" and "2/2" in two
    processes: a half each; whichever ends last prints the table and writes it.
    """
    prior = asd.Prior.from_pretrained("tiny-sd")
    key = fingerprint(*prior.network.parameters(), *map(edited_by, EDITED_BY))
    files = {(kind, j): Path("outputs/edits", f"{kind}-{j}-{key}.json")
             for j in range(len(CONCEPTS)) for kind in KINDS}
    if not made(files, part, lambda file, kind, j: write_text(
            file, json.dumps(edited_unit(prior, kind, j)))):
        return False
    found = {kind: [json.loads(files[kind, j].read_text()) for j in range(len(CONCEPTS))]
             for kind in KINDS}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), json.dumps(print_edits(found), indent=1))


def print_edits(found):
    """Print means ± standard errors, then how the rows differ, edit by edit -> the same, nested.

    found: {kind: [{row: {measure: number}}, one for each edit]}.
    """
    table = {}
    for kind, edits in (found | {"all": sum(found.values(), [])}).items():
        rows = {name: [edit[name] for edit in edits] for name in edits[0]}
        for one, other in [("asd", "dds")] + [(name, "asd") for name in list(EDITED_BY)[2:]]:
            rows[f"{one} minus {other}"] = [{key: edit[one][key] - edit[other][key]
                                             for key in edit[one]} for edit in edits]
        table[kind] = {name: {key: mean_and_error([row[key] for row in each]) for key in each[0]}
                       for name, each in rows.items()}
        for name, row in table[kind].items():
            print(f"{kind:15} {name:18}", "  ".join(
                "{} {:6.3f} ± {:.3f}".format(key, *value) for key, value in row.items()))
    return table


def made(files, part, make):
    """Make this part ("1/2", …) of {key: file} by make(file, *key). -> whether all are there."""
    from tqdm import tqdm
    i, _, n = part.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise asd.UserError(f"--part {part} is no part: 1/2 is the first of two")
    for key, file in tqdm(list(files.items())[int(i) - 1::int(n)], desc=f"part {part}"):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            make(file, *key)
    if all(file.exists() for file in files.values()):
        return True
    print("the other parts are not done yet")
    return False


def mean_and_error(numbers):
    """-> (mean, its standard error)."""
    numbers = torch.tensor(numbers)
    return numbers.mean().item(), (numbers.std() / len(numbers) ** 0.5).item()


# drawings made 3d renders by one network: the things it learns on, and others
STYLES = "a drawing of {}", "a 3d render of {}"
LEARNT = """fox,red apple,hamburger,mushroom,penguin,frog,pizza,sunflower,strawberry,pineapple,
cherries,carrot,guitar,rocket,owl,panda,lion,tiger""".replace("\n", "").split(",")
OTHERS = "lemon,tomato,avocado,rose,bear,koala".split(",")


def trained_network(prior, steps, pictures):
    """The translation network, trained unless outputs/ has it; None where that fails."""
    flags = ["--network", "--method", "dds", "--source", STYLES[0], "--target", STYLES[1],
             "--things", ", ".join(articled(concept) for concept in LEARNT),
             "--steps", str(steps), "--pictures", str(pictures)]
    key = fingerprint(*prior.network.parameters(), flags, editing.methods(network=True)["dds"])
    folder = Path("outputs", f"network-{key}")
    if not (folder / "network").exists():
        going_on = (folder / "config.json").exists()
        if editing.main(["--resume", str(folder)] if going_on else [*flags, "--out", str(folder)]):
            return None
    return translation.load_network(folder)[1]


def network_figure(path, steps=600, pictures=90, side=128):
    """Drawings that a network has not seen above, what it makes of them in one pass below.

    They are samples of the prior: of the things that it has learnt on, from other noise, and of
    others. Prints the time of a picture, and tiny-clip's score of the target before and after.
    """
    prior = asd.Prior.from_pretrained("tiny-sd")
    net = trained_network(prior, steps, pictures)
    if net is None:
        return False
    rows, notes = ([], []), ([], [])
    for group, concepts, shown in (("learnt on", LEARNT, 5), ("others", OTHERS, 3)):
        sources, targets = ([style.format(articled(concept)) for concept in concepts]
                            for style in STYLES)
        before = torch.cat([sampled(prior, [text], 1000 + i) for i, text in enumerate(sources)])
        after, seconds = translation.in_one_pass(prior, net, before)
        scores = [[clip_score(x[None], target) for x, target in zip(images, targets, strict=True)]
                  for images in (before, after)]
        gain = mean_and_error([b - a for a, b in zip(*scores, strict=True)])
        print(f"{group}: {len(before)} pictures, {1000 * seconds:.0f} ms each on "
              f"{torch.get_num_threads()} threads; tiny-clip's score of the target "
              "{:.3f} ± {:.3f}, was {:.3f} ± {:.3f}, {:+.3f} ± {:.3f}".format(
                  *mean_and_error(scores[1]), *mean_and_error(scores[0]), *gain))
        for i, images in enumerate((before, after)):
            rows[i].append(images[:shown])
            notes[i].extend(f"{score:.2f}" for score in scores[i][:shown])
    labels = "a drawing", f"a 3d render,\nin one pass\nof {1000 * seconds:.0f} ms"
    sheet(path, LEARNT[:5] + OTHERS[:3], [(label, torch.cat(row), note) for label, row, note in
                                          zip(labels, rows, notes, strict=True)],
          side, corner="tiny-clip's score\nof the target")


# The neighbours' figure: each method's row, and the words that its φ is told. tiny-sd has never
# seen the published ones ("blurry", "oversaturated, smooth, …"), so these are of its vocabulary.
NEIGHBOURS = {
    "sds": ("SDS", {}),
    "csd": ("CSD", {}),
    "nfsd": ("NFSD", {"negative": "a flat icon"}),
    "vsd": ("VSD", {}),
    "bridge": ("SDS-Bridge", {"source_words": "a flat icon of {}", "bridge_start": 0.8,
                              "target_words": "a 3d render of {}"}),
    "lmc": ("LMC-SDS", {}),
    "asd": ("ASD", {}),
}


def distilled(prior, method, prompt, start=None, **words):
    """What `python variants.py --prompt … --seed 0` makes, from noise or from the picture `start`.

    method: a row; words: what its φ is told. -> RGB [1, 3, H, W] in [0, 1].
    """
    rng = torch.Generator().manual_seed(0)
    latents = asd.Latents(prior, rng=rng, images=start)
    phi = asd.make_phi(method, prior, prompt, **words)
    state = asd.State(latents, phi, method, rng)
    asd.distill(prior, latents, prior.encode_text([prompt]), method, state=state)
    return latents.images().cpu()


def cell_file(prior, name, prompt):
    """Where one cell of the neighbours' figure is kept: named by all that it depends on."""
    b_k = corrective.load_bias(prior).parameters() if name == "lmc" else []
    key = fingerprint(*prior.network.parameters(), *b_k, all_methods()[name], NEIGHBOURS[name])
    return Path("outputs/neighbours", f"{name}-{prompt.replace(' ', '-')}-{key}.json")


def make_cell(prior, file, name, prompt):
    """Distil one cell and keep its picture and its numbers."""
    image = distilled(prior, all_methods()[name], prompt, **NEIGHBOURS[name][1])
    numbers = picture_measures(image) | {"clip": clip_score(image, prompt)}
    write_grid(file.with_suffix(".png"), (255 * image).round().byte(), 1, least=1)
    write_text(file, json.dumps(numbers))


def cells(prior, names):
    """Where the cells of some rows of NEIGHBOURS are kept -> {(name, prompt): file}."""
    return {(name, prompt): cell_file(prior, name, prompt) for name in names for prompt in PROMPTS}


def cell_image(prior, file):
    """-> RGB [1, 3, H, W]."""
    return read_image(file.with_suffix(".png"), prior.image_size)


def neighbours_figure(path, part="1/1", side=128):
    """Draw PROMPTS by every method of NEIGHBOURS, each at its row's settings, all from seed 0.

    Under each picture: saturation, sharpness (mean |Laplacian|), tiny-clip's score; their means and
    standard errors are printed. Cells that are there already are not made again. part "1/2" and
    "2/2" in two processes: a half of the cells each; whichever ends last draws the figure. One
    thumbnail of each method lies beside it.
    """
    prior = asd.Prior.from_pretrained("tiny-sd")
    files = cells(prior, NEIGHBOURS)
    if not made(files, part, functools.partial(make_cell, prior)):
        return False
    rows, table = [], {}
    for name, (label, _) in NEIGHBOURS.items():
        mine = [files[name, prompt] for prompt in PROMPTS]
        table[name] = [json.loads(file.read_text()) for file in mine]
        images = torch.cat([cell_image(prior, file) for file in mine])
        notes = ["{saturation:.2f}  {sharpness:.3f}  {clip:.2f}".format(**cell)
                 for cell in table[name]]
        rows.append((f"{label}\nguidance {all_methods()[name].lam:g}", images, notes))
        fox = (255 * images[PROMPTS.index("a fox")][None]).round().byte()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_grid(Path(path).with_name(f"thumb-{name}.png"), fox, 1, least=1)
    sheet(path, PROMPTS, rows, side, corner="saturation, sharpness,\ntiny-clip's score",
          colors=256)
    print_neighbours(table)


def print_neighbours(table):
    """Means ± standard errors over the prompts, and LMC-SDS against SDS, prompt by prompt."""
    for name, cells in table.items():
        print(f"{NEIGHBOURS[name][0]:11}", "  ".join("{} {:.3f} ± {:.3f}".format(
            key, *mean_and_error([cell[key] for cell in cells])) for key in cells[0]))
    sharper, paler = (mean_and_error([ours[key] - sds[key] for ours, sds in zip(
        table["lmc"], table["sds"], strict=True)]) for key in ("sharpness", "saturation"))
    lmc, sds = (all_methods()[name].lam for name in ("lmc", "sds"))
    print(f"LMC-SDS at guidance {lmc:g} is {'' if sharper[0] > 0 else 'not '}sharper than SDS at "
          "{:g} ({:+.3f} ± {:.3f}) and {}less saturated ({:+.3f} ± {:.3f}).".format(
              sds, *sharper, "" if paler[0] < 0 else "not ", *paler))


# editing's settings, but for the number of steps: SDS-Bridge's gradient holds nothing in place, and
# of 10, 20, 30, 40 and 60 steps 40 scored best on these three pictures
BRIDGE = {"steps": 40}


def bridge_figure(path, side=160):
    """Drawings made 3d renders: by SDS-Bridge from the picture, by DDS, by ASD.

    The drawing is one of examples/, or, where there is none, a sample of the prior. Under each
    picture: tiny-clip's score of what is wanted.
    """
    prior = asd.Prior.from_pretrained("tiny-sd")
    words = {"source_words": "a drawing of {}", "target_words": "a 3d render of {}"}
    method, rows = replace(all_methods()["bridge"], **editing.SETTING | BRIDGE), []
    for noun in ("a fox", "a mushroom", "a penguin"):
        source, target = (phrase.format(noun) for phrase in words.values())
        file = HERE / "examples" / f"{noun[2:]}-drawing.png"
        image = read_image(file, prior.image_size) if file.exists() else sampled(prior, [source])
        image = image.cpu()
        images = [image, distilled(prior, method, noun, image, **words),
                  *(editing.edit(prior, image, [source], [target], name)
                    for name in ("dds", "asd"))]
        scores = [clip_score(x, target) for x in images]
        print(f"{target}:", "  ".join(f"{score:.3f}" for score in scores), flush=True)
        rows.append((f"{source}\n-> {target}", torch.cat(images), [f"{s:.2f}" for s in scores]))
    sheet(path, ["source", "SDS-Bridge", "DDS", "ASD"], rows, side, corner="tiny-clip")


# Table 1 in miniature: text-to-3D of things whose true shape is known
SOLIDS = ["a red mug", "a blue car", "a yellow duck", "a green house", "a purple teapot"]


def solids_table(path, part="1/1", steps=None, seeds=3, only=""):
    """Print tiny-clip's score, silhouette IoU and PSNR of five solids by SDS, VSD and ASD.

    Means over the solids ± standard errors over the seeds, and ASD's differences, seed by seed;
    beside the numbers a picture of the first seed. The runs lie in outputs/solids/: those that are
    there already are not made again, one that was stopped goes on. part "1/2" and "2/2" in two
    processes, of one thread each: a half each; whichever ends last prints. only: of "asd/a red
    mug", …, those that it is a part of.
    """
    prior, rows = asd.Prior.from_pretrained("tiny-sd"), text_to_3d.methods()
    rows = {name: replace(rows[name], steps=steps or rows[name].steps) for name in asd.METHODS}
    keys = {name: fingerprint(*prior.network.parameters(), row, text_to_3d.DEFAULTS)
            for name, row in rows.items()}
    files = {(name, prompt, seed): Path("outputs/solids", f"{name}-{prompt.replace(' ', '-')}-"
                                        f"{seed}-{keys[name]}", "numbers.json")
             for seed in range(seeds) for prompt in SOLIDS for name in rows
             if only in f"{name}/{prompt}"}
    if not files:
        raise asd.UserError(f"--only {only!r} names no run, as asd or asd/{SOLIDS[0]} do")
    if not made(files, part, lambda file, name, prompt, seed: solid_run(
            file, name, prompt, seed, rows[name].steps)):
        return False
    found = {run: json.loads(file.read_text()) for run, file in files.items()}
    solids_sheet(Path(path).with_suffix(".png"), files, found)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), json.dumps({"table": print_solids(found), "runs": {
        f"{name}/{prompt}/{seed}": numbers
        for (name, prompt, seed), numbers in found.items()}}, indent=1))


def solid_run(file, method, prompt, seed, steps):
    """`python text_to_3d.py --prompt … --method …` in the file's folder, its scores into it."""
    folder = file.parent
    flags = ["--resume", folder] if (folder / "config.json").exists() else \
        ["--prompt", prompt, "--method", method, "--seed", seed, "--steps", steps, "--out", folder]
    if text_to_3d.main([str(flag) for flag in flags]):
        raise asd.UserError(f"{folder} is not finished; the same command goes on with it")
    field = NeRF.load(folder / "nerf.safetensors")
    write_text(file, json.dumps(text_to_3d.view_scores(field, prompt)))


def solids_sheet(path, files, found, side=128):
    """Each method's solids of the first seed, and the true ones, half from the side."""
    names, prompts, seeds = (list(dict.fromkeys(key)) for key in zip(*files, strict=True))
    c2w, rows = orbit(8)[1:2], []
    for name in names:
        runs = [(name, prompt, seeds[0]) for prompt in prompts]
        fields = [NeRF.load(files[run].parent / "nerf.safetensors") for run in runs]
        seen = torch.cat([render(field, *rays(c2w, 40.0, 64), 64).rgb for field in fields])
        rows.append((name.upper(), seen, [f"{found[run]['iou']:.2f}" for run in runs]))
    truth = torch.cat([solid_pictures(*find_solid(prompt), c2w).over(1.0) for prompt in prompts])
    rows.append(("the true solids", truth, ["1"] * len(prompts)))
    rows = [(label, rgb.movedim(-1, 1).clamp(0, 1), notes) for label, rgb, notes in rows]
    sheet(path, prompts, rows, side, corner="silhouette IoU")


def print_solids(found):
    """found {(method, prompt, seed): {measure: number}} -> {row: {measure: (mean, its error)}}.

    Each seed's number is a mean over the solids. "truth" is tiny-clip's score of the true solids.
    """
    names, prompts, seeds = (list(dict.fromkeys(key)) for key in zip(*found, strict=True))
    rows = {name: [{key: sum(found[name, prompt, seed][key] for prompt in prompts) / len(prompts)
                    for key in found[name, prompts[0], seed]} for seed in seeds] for name in names}
    for other in ("sds", "vsd"):
        if {"asd", other} <= set(rows):
            rows[f"asd minus {other}"] = [{key: a[key] - b[key] for key in a} for a, b in zip(
                rows["asd"], rows[other], strict=True)]
    table = {name: {key: mean_and_error([seed[key] for seed in each]) for key in each[0]}
             for name, each in rows.items()}
    truth = [clip_score(text_to_3d.eight_views(prompt).over(1.0).movedim(-1, 1), prompt)
             for prompt in prompts]
    table["truth"] = {"clip": (sum(truth) / len(truth), 0.0)}
    for name, row in table.items():
        print(f"{name:14}", "  ".join("{} {:6.3f} ± {:.3f}".format(key, *value)
                                      for key, value in row.items()))
    return table


FIGURES = {"mixture": mixture_figure, "methods": methods_figure, "edits": edits_figure,
           "edit-table": edit_table, "network": network_figure, "grid": neighbours_figure,
           "bridge": bridge_figure, "solids": solids_table}
# the flags that some of them take
FLAGS = {"grid": {"part"}, "edit-table": {"part"}, "solids": {"part", "steps", "seeds", "only"}}


def main(argv=None):
    parser = Parser(prog="reproduce.py", description="The paper's figures, in miniature.")
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("--out", help="default: in figures/")
    parser.add_argument("--part", metavar="I/N", help="grid, tables, solids: one of N processes")
    parser.add_argument("--steps", type=number(int, 1), help="solids: of each run (default 600)")
    parser.add_argument("--seeds", type=number(int, 1), help="solids: how many (default 3)")
    parser.add_argument("--only", metavar="TEXT", help="solids: such as asd/a red mug; asd; mug")
    arguments = parser.parse_args(argv)
    figure = arguments.figure
    ending = "json" if figure.endswith("table") or figure == "solids" else "png"
    path = arguments.out or f"figures/{'neighbours' if figure == 'grid' else figure}.{ending}"
    given = {key: value for key, value in vars(arguments).items()
             if key not in ("figure", "out") and value is not None}
    wrong = set(given) - FLAGS.get(figure, set())
    if wrong:
        parser.error(f"--{min(wrong)} is not for {figure}")

    def work():
        if FIGURES[figure](path, **given) is not False:
            print(path)
    status = guarded("reproduce.py", work, go_on=lambda: "; the same command goes on")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
