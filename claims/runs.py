"""runs.py — what is run for the claims, and nothing of what is asked of the results.

Change this file, and all kept results must be made again; hence a file of its own. In 2D and in
editing a run makes a picture of each prompt at once, each with noise and a φ of its own (OwnLoRA),
so that they are as many runs in all but speed. They begin at the same noise whatever the method.
"""
import copy
import functools
import statistics
from dataclasses import replace

import torch
from torch import nn

import asd
import editing
import text_to_3d
from claims.measures import PROMPTS, SAMPLE_JOBS, measured
from cli.pictures import to_bytes
from cli.settings import SceneSettings
from nerf import orbit, rays, render
from phi import LoRAPhi, second_view
from prior import ddim_samples, one_step_x0
from tiny.judge import clip_features


# --------------------------------------------------------------------------- pictures, many at once
class OwnAdapters(nn.Module):
    """A Linear with low-rank adapters for each of N samples: x [kN, L, in] -> [kN, L, out]."""

    def __init__(self, base, samples, rank, rng):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(samples, rank, base.in_features, generator=rng) / rank)
        self.up = nn.Parameter(torch.zeros(samples, base.out_features, rank))

    def forward(self, x):
        k = len(x) // len(self.down)
        down, up = self.down.repeat(k, 1, 1), self.up.repeat(k, 1, 1)
        return self.base(x) + x @ down.mT @ up.mT


class OwnLoRA(nn.Module):
    """φ for N particles that have nothing in common: N LoRAs of phi.LoRAPhi's kind in one network.

    prompts: one for each particle. No parameter serves two particles and AdamW goes by elements, so
    each learns what it would alone. shares: of each step κ [N], where γ > −1.
    """
    whole = True                              # a batch is never cut: sample i is particle i's

    def __init__(self, prior, prompts, rank=4, seed=0, gamma=-1.0):
        super().__init__()
        self.prior, self.network = prior, second_view(prior.network)
        self.gamma, self.shares = gamma, []
        rng = torch.Generator().manual_seed(seed)
        for name, layer in list(self.network.named_modules()):
            if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
                self.network.set_submodule(name, OwnAdapters(layer, len(prompts), rank, rng))
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name.endswith((".down", ".up")))

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        eps_phi = self.prior.eps_of(self.network, x_t, t, cond)
        if answers is not None and self.gamma > -1:             # of Eq. 7, where guidance acts
            self.shares.append(asd.learnt_share(eps, eps_phi.detach(), answers["y"], self.gamma))
        return eps_phi


def with_own_phi(row):
    """The row with a φ for each particle, where φ is a LoRA."""
    return replace(row, phi=OwnLoRA) if row.phi is asd.LoRAPhi else row


def distilled(method, prompts, start=None, late=(), **changes):
    """One picture of each prompt by a method's row with `changes`.

    start: x0 to begin with, in place of noise. -> {"x0": [N, C, H, W], "late": the same at these
    parts of the steps, if any, "kappa": φ's mean learnt share over the second half [N]}
    """
    row = with_own_phi(replace(asd.METHODS[method], **changes))
    prior, rng, kept = asd.Prior.from_pretrained("tiny-sd"), torch.Generator().manual_seed(0), []
    latents = asd.Latents(prior, len(prompts), rng)
    if start is not None:
        latents.theta.data = start.clone()
    state = asd.State(latents, asd.make_phi(row, prior, list(prompts)), row, rng)
    kept_steps = [round(part * row.steps) for part in late]

    def keep(state, terms):
        if state.step in kept_steps:
            kept.append(latents.theta.detach().clone())
    asd.distill(prior, latents, prior.encode_text(prompts), row, state=state, callback=keep)
    found = {"x0": latents.theta.detach()}
    if kept:
        found["late"] = torch.stack(kept)
    if getattr(state.phi, "shares", None):
        found["kappa"] = torch.stack(state.phi.shares[row.steps // 2:]).mean(0)
    return found


def looks(method, **row):
    """A run of the test prompts -> {"grain", "distance", and where φ learns "kappa": [N]}."""
    run = distilled(method, PROMPTS["test"], **row)
    found = measured(run.pop("x0"), SAMPLE_JOBS["test"].result())
    return run | {"grain": found["grain"], "distance": found["distance"]}


def recovered(prompts, **settings):
    """Fig. 5c: over-saturated pictures (SDS at λ = 10⁴), then each method of `settings` from there.

    -> {"start" and the methods' names: x0 [N, C, H, W]}
    """
    start = distilled("sds", prompts, **settings["sds"] | {"lam": 1e4})["x0"]
    made = {"start": start}
    for method, row in settings.items():
        made[method] = distilled(method, prompts, start=start, **row)["x0"]
    return made


def times(prompt, rounds=15, steps=8):
    """Milliseconds a step of one picture, ASD's with fresh and with shared noise, in turns.

    -> {"fresh", "shared": [rounds]}
    """
    prior, found = asd.Prior.from_pretrained("tiny-sd"), {"fresh": [], "shared": []}
    for _ in range(rounds):
        for name, medians in found.items():
            row = replace(asd.METHODS["asd"], steps=steps, share_noise=name == "shared")
            seconds = []

            def keep(state, terms, seconds=seconds):
                seconds.append(terms["seconds"])
            latents = asd.Latents(prior, 1, torch.Generator().manual_seed(0))
            asd.distill(prior, latents, prior.encode_text([prompt]), row, callback=keep)
            medians.append(1000 * statistics.median(seconds[1:]))     # the first one warms up
    return {name: torch.tensor(medians) for name, medians in found.items()}


# ----------------------------------------------------------------------------------------- edits
def edited(method, sources, targets, **changes):
    """The prior's own pictures of the sources, edited; each with a φ_y and a φ_z of its own.

    -> {"before", "after": RGB [N, 3, H, W]}
    """
    prior = asd.Prior.from_pretrained("tiny-sd")
    row = with_own_phi(replace(editing.methods()[method], **changes))
    noise = torch.randn(len(sources), *prior.shape, generator=torch.Generator().manual_seed(0))
    before = prior.decode(ddim_samples(prior, sources, noise))
    return {"before": before, "after": editing.edit(prior, before, sources, targets, row)}


# ---------------------------------------------------------------------------------------- solids
def solid(method, prompt, **changes):
    """What `python text_to_3d.py --prompt … --method …` makes, at its default settings.

    changes: settings of the scene. -> {"views": RGB [8, 3, 64, 64], "psnr": dB against the true
    solid's views, "iou": of the silhouettes, "clip": tiny-clip's score of the views}
    """
    prior, row = asd.Prior.from_pretrained("tiny-sd"), text_to_3d.methods()[method]
    values = text_to_3d.SCENE | vars(row) | {
        "method": method, "phi": row.phi.__name__, "settings": "tiny", "kernels": "torch",
        "prompt": prompt, "seed": 0} | changes
    fields = values.keys() & SceneSettings.model_fields.keys()          # a row may have others
    settings = SceneSettings(**{name: values[name] for name in fields})
    rng = torch.Generator().manual_seed(0)
    state, cond = text_to_3d.build(settings, prior, row, rng, None, True)
    asd.distill(prior, state.generator, cond, row, state=state)
    with torch.no_grad():
        seen = render(state.generator.nerf, *rays(orbit(8), 40.0, 64), 64).rgb.movedim(-1, 1)
    scores = text_to_3d.view_scores(state.generator.nerf, prompt)
    return {"views": seen} | {name: torch.tensor(value) for name, value in scores.items()}


def side(method, prompt, **changes):
    """A run of solid() -> its "psnr", "iou", "clip", and "view", half from the side, uint8."""
    found = solid(method, prompt, **changes)
    views = found.pop("views")
    return found | {"view": to_bytes(views[1])}


def named(method, prompt, **changes):
    """A run of solid() -> {"right": [4], of the views from the front, both sides and behind, 1
    where the most alike of the true solid's four, to tiny-clip, has the same name, else 0}.
    """
    sides = ("front", "side", "back", "side")             # what views 0, 2, 4 and 6 of eight show
    views = solid(method, prompt, **changes)["views"][::2]
    truth = text_to_3d.eight_views(prompt).over(1.0).movedim(-1, 1)[::2]
    seen, true, _ = clip_features([views, truth], [prompt])
    right = [sides[nearest] == sides[i] for i, nearest in enumerate((seen @ true.T).argmax(1))]
    return {"right": torch.tensor(right).float()}


# ------------------------------------------------------------------------------ a one-step student
STUDENT_T = 400                 # what the student is told: σ/α = 1.16 there, 14.6 at T − 1
LAM = 3.0                       # guidance of the teacher, whoever asks it: tiny/README.md's
# DMD2's gradient is (σ/α)(ε̃ − ε_φ) / mean|x0 − x̂0| sample by sample, x̂0 the teacher's. As x0 − x̂0
# = (σ/α)(ε̃ − ε), that is (ε̃ − ε_φ) / mean|ε̃ − ε|; and of Gaussian data of variance 1, as tiny-sd's
# latents are of, E|ε̃ − ε|² = α². So its weight is 1/α in all but its luck with the sample's noise.
# Five updates of φ to the student's one, and t from the whole range: DMD2's, too. φ has rank 16 in
# place of 4, as it is told of all prompts' pictures, not of one. γ = −½, the paper's of 3D, where a
# network makes the pictures, too. The rates: by stability of a dry run.
ROW = asd.Method(phi=functools.partial(LoRAPhi, rank=16), lam=LAM, omega="1/alpha", t_late=1.0,
                 lr=2e-5, lr_end=0.1, phi_lr=1e-3, phi_steps=5, steps=400, gamma=-0.5)
STUDENTS = {"sds": replace(ROW, phi=asd.NoisePhi), "asd": ROW}


class Student(nn.Module):
    """A generator: noise and a prompt -> x0 in one step, by a copy of the prior's network.

    Diff-Instruct (2305.18455) distils a diffusion model, without data, into such a network; as in
    DMD2 (2405.14867) it begins as a copy of the prior's, always told the same t, and what it makes
    is x̂0 of its ε. Every step has fresh noise and prompts drawn from a list, from the run's rng.
    """

    def __init__(self, prior, prompts, rng, batch):
        super().__init__()
        self.prior, self.rng, self.n = prior, rng, batch
        self.y = prior.encode_text(prompts)
        self.unet = copy.deepcopy(prior.network).requires_grad_(True)

    def x0(self, noise, cond):
        """noise [B, C, H, W], cond [B, L, C] -> like noise."""
        t = torch.full((len(noise),), STUDENT_T, device=noise.device)
        eps = self.prior.eps_of(self.unet, noise, t, cond)
        return one_step_x0(noise, eps, *self.prior.alpha_sigma(t))

    def forward(self):
        """-> Samples of noise and prompts that are drawn anew."""
        rows = torch.randint(len(self.y), (self.n,), generator=self.rng)
        noise = torch.randn(self.n, *self.prior.shape, generator=self.rng)
        cond = self.y[rows]
        return asd.Samples(self.x0(noise.to(cond.device), cond), cond)


def student(method, prompts, number=32, batch=8, **changes):
    """A student of the prior; method None: as it begins. -> {"x0": [N, number, C, H, W], of noise
    that is the same for every method}"""
    prior, rng = asd.Prior.from_pretrained("tiny-sd"), torch.Generator().manual_seed(0)
    learner = Student(prior, prompts, rng, batch)
    if method is not None:
        row = replace(STUDENTS[method], **changes)
        state = asd.State(learner, asd.make_phi(row, prior), row, rng)
        asd.distill(prior, learner, learner.y, row, state=state)
    held, made = torch.Generator().manual_seed(1000), []
    for prompt in prompts:
        noise = torch.randn(number, *prior.shape, generator=held)
        cond = prior.encode_text([prompt]).expand(number, -1, -1)
        with torch.no_grad():
            made.append(learner.x0(noise, cond))
    return {"x0": torch.stack(made)}
