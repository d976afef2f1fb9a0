"""measures.py — the claims' prompts, what is measured in a picture, and the controls of that.

A measure is used only if it moves as it must on its controls: pictures of ten prompts that no claim
uses, spoilt on purpose in a known way (controls()). Pictures are RGB as the decoder returns them,
*before* they are clamped to [0, 1].
"""
import random
import re

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, median_filter
from skimage.color import rgb2lab

import asd
from claims.work import COMMITTED, Job
from prior import HERE, ddim_samples
from tiny.data import STYLES, articled
from tiny.judge import image_features, load_judge
from tiny.solids import COLORS, KINDS, VIEWS

SAMPLES = 64                              # of the prior, of each prompt, that a picture is held to
LAMBDAS = (2.0, 4.0, 7.5, 15.0, 30.0)     # the guidances that methods are compared at
NEAR = 0.05      # δ of the distance: in the controls a clearly visible noise adds 0.10, a blur 0.04
# looked at while the defaults were chosen: no claim may use them
SEEN = {"red apple", "fox", "hamburger", "rocket", "mushroom", "red mug", "blue car",
        "yellow duck", "green house", "purple teapot"}


# --------------------------------------------------------------------------------------- prompts
def drawn_prompts():
    """A fixed draw of what tiny-sd knows, no thing twice: {"test": 40 prompts, a quarter of each
    style and of the solids, "tuning": 10, "control": 10, "solids": 20 for 3D}."""
    rng = random.Random(2312)
    card = (HERE / "tiny/README.md").read_text("utf-8")
    things = re.search(r"these 307 things:\n\n((?:>.*\n)+)", card)[1].replace("\n>", "")
    things = [thing.strip() for thing in things.strip(">.\n ").split(",")]
    things = [thing for thing in things if thing not in SEEN]
    solids = [f"{color} {kind}" for kind in KINDS for color in COLORS]
    solids = [solid for solid in solids if solid not in SEEN]
    rng.shuffle(things)
    rng.shuffle(solids)
    prompts = {}
    for use, counts in (("test", (10, 10, 10, 10)), ("tuning", (3, 3, 2, 2)),
                        ("control", (3, 3, 2, 2))):
        prompts[use] = []
        for style, count in zip(STYLES, counts):
            prompts[use] += [f"{style} {articled(things.pop())}" for _ in range(count)]
        for _ in range(counts[-1]):
            prompts[use].append(f"{articled(solids.pop())}, {rng.choice(VIEWS)} view")
    prompts["solids"] = []
    for kind in rng.sample(sorted(KINDS), 20):
        colored = [solid for solid in solids if solid.endswith(f" {kind}")]
        prompts["solids"].append(articled(colored[0]))
    return prompts


PROMPTS = drawn_prompts()


# -------------------------------------------------------------------------------------- measures
def decoded(prior, x0):
    """x0 [N, C, H, W] -> RGB [N, 3, H, W], not clamped."""
    return torch.cat([prior.decode(part, clamp=False) for part in x0.float().split(16)])


def measure(images):
    """RGB [N, 3, H, W], not clamped -> {measure: [N]}.

    over-saturation: how far colours lie outside [0, 1], the mean over the picture. acutance: the
    95th percentile of the gradient of luminance, after a blur of one pixel, to be blind to grain.
    grain: the mean distance of the colours (a, b of CIELAB) from their median over 5 × 5 pixels.
    chroma: their mean distance from grey.
    """
    outside = (images - images.clamp(0, 1)).abs().mean((1, 2, 3))
    found = {"over-saturation": outside, "acutance": [], "grain": [], "chroma": []}
    for image in images.clamp(0, 1).permute(0, 2, 3, 1).double().numpy():
        luminance = gaussian_filter(image @ [0.2126, 0.7152, 0.0722], 1.0)
        found["acutance"].append(np.quantile(np.hypot(*np.gradient(luminance)), 0.95))
        colours = rgb2lab(image)[..., 1:]
        smooth = median_filter(colours, size=(5, 5, 1))
        found["grain"].append(np.abs(colours - smooth).mean())
        found["chroma"].append(np.hypot(*colours.transpose(2, 0, 1)).mean())
    return {name: torch.as_tensor(np.asarray(values)).double() for name, values in found.items()}


def features(images):
    """RGB [N, 3, 64, 64] -> unit vectors of tiny-clip [N, 128]."""
    clip, _ = load_judge()
    return torch.cat([image_features(clip, part) for part in images.clamp(0, 1).split(64)])


def energy_distance(seen, reference):
    """Energy distance of one picture to the prior's samples of its prompt, in tiny-clip's features.

    seen [N, D], reference [N, S, D] -> [N]: 2 E‖f − s‖ − E‖s − s'‖ ≥ 0.
    """
    to_samples = torch.cdist(seen[:, None], reference)[:, 0].mean(1)
    among = torch.cdist(reference, reference)
    pairs = reference.shape[1] * (reference.shape[1] - 1)
    return (2 * to_samples - among.sum((1, 2)) / pairs).double()


def samples(use, number=SAMPLES, seed=100):
    """The prior's own pictures, 50 DDIM steps at guidance 3. use: of drawn_prompts().

    -> {"x0": of the first four [N, 4, C, H, W], "features": [N, number, D], "floor": the distance
    that half of the samples have to the other half [N], "rms": of x0 [N], measure: mean [N]}
    """
    prior, rng = asd.Prior.from_pretrained("tiny-sd"), torch.Generator().manual_seed(seed)
    found = {name: [] for name in ("x0", "features", "rms")}
    for prompt in PROMPTS[use]:
        noise = torch.randn(number, *prior.shape, generator=rng)
        x0 = ddim_samples(prior, [prompt] * number, noise)
        images = decoded(prior, x0)
        found["x0"].append(x0[:4])
        found["features"].append(features(images))
        found["rms"].append(x0.square().mean().sqrt())
        for name, values in measure(images).items():
            found.setdefault(name, []).append(values.mean())
    found = {name: torch.stack(values) for name, values in found.items()}
    held, others = found["features"].chunk(2, 1)
    floor = [energy_distance(held[:, i], others) for i in range(held.shape[1])]
    return found | {"floor": torch.stack(floor).mean(0)}


# committed, as nearly all claims need them, and they take half an hour
FILES = ("prior.py", "tiny/*/**/*.safetensors", "tiny/judge.py")
SAMPLE_JOBS = {use: Job(f"samples-{use}", samples, {"use": use}, minutes, FILES, COMMITTED)
           for use, minutes in (("test", 30), ("tuning", 8))}


def measured(x0, reference):
    """x0 [N, C, H, W] of a run, one for each prompt; what samples() returned -> {measure: [N]}.

    measure()'s, and the distance; "colour" is the log of chroma over that of the samples, "rms"
    that of x0.
    """
    prior = asd.Prior.from_pretrained("tiny-sd")
    images = decoded(prior, x0)
    found = measure(images)
    found["distance"] = energy_distance(features(images), reference["features"])
    found["colour"] = (found["chroma"] / reference["chroma"]).log()
    found["rms"] = (x0.float().square().mean((1, 2, 3)).sqrt() / reference["rms"]).log()
    return found


# -------------------------------------------------------------------------------------- controls
def blurred(images, sigma=1.0):
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def faded(images):
    """Half the colour."""
    grey = images.mean(1, keepdim=True)
    return grey + (images - grey) / 2


def controls(number=8, seed=200):
    """Samples of the control prompts, spoilt. -> {"kind: measure": [10 · number]}

    "samples" are as they are, at guidance 3, from noise of their own; the distance is to others.
    """
    prior, rng = asd.Prior.from_pretrained("tiny-sd"), torch.Generator().manual_seed(seed)
    prompts = [prompt for prompt in PROMPTS["control"] for _ in range(number)]
    reference = samples("control")["features"].repeat_interleave(number, 0)
    noise = torch.randn(len(prompts), *prior.shape, generator=rng)
    images = {}
    for lam in (3.0, 1.0, 7.5, 15.0, 30.0):
        x0 = torch.cat([ddim_samples(prior, prompts[i:i + 40], noise[i:i + 40], lam=lam)
                        for i in range(0, len(prompts), 40)])
        images[f"guidance {lam:g}"] = decoded(prior, x0)
    plain = images["samples"] = images.pop("guidance 3")
    grain = torch.randn(plain.shape, generator=rng)
    images |= {"blur": blurred(plain), "noise": plain + 0.08 * grain,
               "clipped": 0.5 + 1.6 * (plain - 0.5), "faded": faded(plain)}
    found = {}
    for kind, pictures in images.items():
        values = measure(pictures)
        values["distance"] = energy_distance(features(pictures), reference)
        found |= {f"{kind}: {name}": value for name, value in values.items()}
    return found


# what must surely rise (1) or fall (−1) against the samples, on the control prompts
MUST_MOVE = {
    "over-saturation": {"clipped": 1, "guidance 15": 1, "guidance 30": 1},
    "acutance": {"blur": -1, "clipped": 1},
    "grain": {"noise": 1, "blur": -1, "guidance 30": 1},
    "chroma": {"faded": -1, "clipped": 1},
    "distance": {"blur": 1, "noise": 1, "clipped": 1, "faded": 1, "guidance 15": 1,
                 "guidance 30": 1},
}


def control_differences(found, name):
    """What controls() returned -> {control of a measure: [10] differences that must be positive}:
    of each prompt the mean; of over-saturation, which has a long tail, the logs'. Acutance must
    also mind noise less than half as much as a blur."""
    def change(kind):
        spoilt, plain = found[f"{kind}: {name}"], found[f"samples: {name}"]
        if name == "over-saturation":
            spoilt, plain = spoilt.log(), plain.log()
        return (spoilt - plain).view(len(PROMPTS["control"]), -1).mean(1)
    differences = {f"{name}, {kind}": sign * change(kind)
                   for kind, sign in MUST_MOVE[name].items()}
    if name == "acutance":
        differences["acutance, noise beside half a blur"] = (
            change("blur").abs() / 2 - change("noise").abs())
    return differences


CONTROLS = Job("controls", controls, {}, 15, FILES, COMMITTED)
