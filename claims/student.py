"""student.py — §4 and [33]: the generator may be a network. A one-step student of tiny-sd.

Diff-Instruct ([33], 2305.18455) distils a diffusion model, without data, into a network that makes
a picture in one evaluation; its gradient is VSD's, whose θ is the network's. Here the same student
is distilled by SDS, VSD and ASD, and compared with the prior's own sampler.

As in DMD2 (2405.14867: main/sd_unified_model.py, sd_guidance.py and the Stable Diffusion 1.5
recipe of experiments/sdv1.5) the student begins as a copy of the prior's UNet that is always told
t = T − 1, where x_t is all but noise, and what it makes is x̂0 of its ε. Before any training this
is the prior's sampler cut to one step, which blurs: the mean of all that the noise may become.
"""
import copy
import functools
import warnings
from dataclasses import replace

import torch
from torch import nn

import asd
from claims.work import Claim, Job, numbers_of
from cli.pictures import sheet, to_bytes
from phi import LoRAPhi
from prior import ddim_samples, one_step_x0
from tiny.judge import image_features, load_judge, text_features

# without a word for the style: the prior answers in three styles, the solids from all sides
PROMPTS = ["a fox", "a red apple", "a rocket", "an octopus", "a hamburger", "a guitar", "a red mug",
           "a blue car", "a yellow duck", "a green house"]
SEEDS = range(3)
EACH = 32                       # pictures of a prompt
BATCH = 8
LAM = 3.0                       # guidance of the teacher, whoever asks it: tiny/README.md's
# DMD2's gradient is (σ/α)(ε̃ − ε_φ) / mean|x0 − x̂0| sample by sample, x̂0 the teacher's. As x0 − x̂0
# = (σ/α)(ε̃ − ε), that is (ε̃ − ε_φ) / mean|ε̃ − ε|; and of Gaussian data of variance 1, as tiny-sd's
# latents are of, E|ε̃ − ε|² = α². So its weight is 1/α in all but its luck with the sample's noise.
# t is DMD2's, all through: nothing has to be annealed, as the student begins at x̂0. One update of
# φ a step ([33]'s) and shared noise (Algorithm 1) are for the time; φ has rank 16 in place of 4,
# as it is told of ten prompts' pictures, not of one. θ's rate, and that it falls, are chosen by
# stability alone: x̂0 has σ/α = 15 times the error of ε, and colours swung at 1e-4 and, where γ = −1
# (the paper's 2D setting, in which φ never settles), at 3e-5. So ASD has γ = −½, the paper's of 3D,
# where a network makes the pictures, too.
ROW = asd.Method(phi=functools.partial(LoRAPhi, rank=16), lam=LAM, omega="1/alpha", t_late=1.0,
                 lr=2e-5, lr_end=0.1, phi_lr=1e-3, steps=400, share_noise=True)
ROWS = {"sds": replace(ROW, phi=asd.NoisePhi), "vsd": replace(ROW, gamma=0.0),
        "asd": replace(ROW, gamma=-0.5)}


class Student(nn.Module):
    """A generator: noise and a prompt -> x0 in one step, by a copy of the prior's network.

    Every step has fresh noise and prompts drawn from a list, from rng, the run's own.
    """

    def __init__(self, prior, prompts, rng, batch):
        super().__init__()
        self.prior, self.rng, self.n = prior, rng, batch
        self.y = prior.encode_text(prompts)
        self.unet = copy.deepcopy(prior.network).requires_grad_(True)

    def x0(self, noise, cond):
        """noise [B, C, H, W], cond [B, L, C] -> like noise."""
        t = torch.full((len(noise),), self.prior.steps - 1, device=noise.device)
        eps = self.prior.eps_of(self.unet, noise, t, cond)
        return one_step_x0(noise, eps, *self.prior.alpha_sigma(t))

    def forward(self):
        """-> Samples of noise and prompts that are drawn anew."""
        rows = torch.randint(len(self.y), (self.n,), generator=self.rng)
        noise = torch.randn(self.n, *self.prior.shape, generator=self.rng)
        cond = self.y[rows]
        return asd.Samples(self.x0(noise.to(cond.device), cond), cond)


# -------------------------------------------------------------------------------------- the jobs
def pictures(prior, sampler, seed, prompts=PROMPTS, number=EACH):
    """sampler(noise [N, C, H, W], prompt) -> x0, of every prompt. -> uint8 [P · N, 3, H, W]"""
    rng, made = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for prompt in prompts:
            noise = torch.randn(number, *prior.shape, generator=rng).to(prior.device)
            made.append(to_bytes(prior.decode(sampler(noise, prompt))))
    return torch.cat(made)


HELD, OTHER = 1000, 2000        # seeds of noise: what all rows are shown, what KID compares with


def distilled(method, seed, steps=None, prompts=PROMPTS, number=EACH):
    """A student of the prior. -> {"pictures": of the held noise}"""
    prior, row = asd.Prior.from_pretrained("tiny-sd"), ROWS[method]
    if steps is not None:
        row = replace(row, steps=steps)
    rng = torch.Generator().manual_seed(seed)
    student = Student(prior, prompts, rng, BATCH)
    state = asd.State(student, asd.make_phi(row, prior, seed=seed), row, rng)
    asd.distill(prior, student, student.y, row, state=state)

    def sampler(noise, prompt):
        return student.x0(noise, prior.encode_text([prompt]).expand(len(noise), -1, -1))
    return {"pictures": pictures(prior, sampler, HELD, prompts, number)}


def sampled():
    """The prior by DDIM. "1 step" has no guidance: it is the student before training."""
    prior = asd.Prior.from_pretrained("tiny-sd")

    def ddim(steps, lam, seed):
        def sampler(noise, prompt):
            return ddim_samples(prior, [prompt] * len(noise), noise, steps, lam)
        return pictures(prior, sampler, seed)
    return {"50 steps": ddim(50, LAM, HELD), "reference": ddim(50, LAM, OTHER),
            "4 steps": ddim(4, LAM, HELD), "1 step": ddim(1, 1.0, HELD)}


JOBS = {"prior": Job("student-prior", sampled, {}, 7)}
for seed in SEEDS:
    for method in ROWS:
        JOBS[method, seed] = Job(f"student-{method}-{seed}", distilled,
                                 {"method": method, "seed": seed}, 6)


# ---------------------------------------------------------------------------------- the measures
class Features(nn.Module):
    """What the kernel compares: tiny-clip's unit vectors. uint8 [N, 3, 64, 64] -> [N, 128]"""

    def forward(self, images):
        return image_features(load_judge()[0], images / 255)


def kid(real, fake):
    """The kernel distance (KID, 1801.01401) of pictures, uint8 [N, 3, 64, 64] each -> a number.

    MMD² without bias, of all N at once; it may be negative. KID's kernel (⟨a, b⟩/d + 1)³, but 1 in
    place of 1/d, as these features are of length 1, Inception's of about √d.
    """
    from torchmetrics.image.kid import KernelInceptionDistance
    with warnings.catch_warnings():               # that it keeps the features
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(Features(), subsets=1, subset_size=len(real), gamma=1.0)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()[0].item()


SAMPLERS = ("50 steps", "4 steps", "1 step")


def measures(results):
    """What the jobs returned -> {row: (KID to the reference, score)}, each [seeds, prompts]."""
    rows = {name: [results["prior"][name]] for name in SAMPLERS}
    for method in ROWS:
        rows[method] = [results[method, seed]["pictures"] for seed in SEEDS]
    clip, tokenizer = load_judge()
    words = text_features(clip, tokenizer, PROMPTS)
    reference = results["prior"]["reference"].chunk(len(words))

    def of_a_run(images):
        kids, scores = [], []
        for real, fake, word in zip(reference, images.chunk(len(words)), words, strict=True):
            kids.append(kid(real, fake))
            scores.append((image_features(clip, fake / 255) @ word).mean().item())
        return kids, scores
    found = {}
    for name, runs in rows.items():
        found[name] = torch.tensor([of_a_run(run) for run in runs]).unbind(1)
    return found


def differences(measured):
    """The claim's tests, run by run and prompt by prompt."""
    kids = {name: row[0] for name, row in measured.items()}
    scores = {name: row[1] for name, row in measured.items()}
    tests = {}
    for method in ROWS:
        tests[f"KID: 1 step − {method}"] = kids["1 step"] - kids[method]
        tests[f"score: {method} − 1 step"] = scores[method] - scores["1 step"]
    for other in ("sds", "vsd"):
        tests[f"ours: KID: {other} − asd"] = kids[other] - kids["asd"]
    return {name: values.flatten().tolist() for name, values in tests.items()}


LABELS = {"50 steps": "the prior,\n50 steps", "4 steps": "4 steps",
          "1 step": "1 step:\nthe student's\nstart"}


def figure(path, results):
    """A row for each sampler and each student (of the first seed), the first of the held noise."""
    rows = []
    for name, (distance, score) in measures(results).items():
        label = LABELS.get(name, f"{name.upper()} student,\n1 step")
        images = results["prior"][name] if name in SAMPLERS else results[name, SEEDS[0]]["pictures"]
        first = images.unflatten(0, (len(PROMPTS), -1))[:8, 0]
        rows.append((f"{label}\n\nKID {distance.mean():.3f}\nscore {score.mean():.2f}",
                     first / 255))
    sheet(path, PROMPTS[:8], rows, 96, corner="same noise", colors=256)


def numbers(results):
    return numbers_of({name: {"KID": distance.flatten(), "score": score.flatten()}
                       for name, (distance, score) in measures(results).items()})


CLAIMS = {"student": Claim(
    "a general generator, here a one-step student, can be distilled, too", "§4, [33]", JOBS,
    lambda results: differences(measures(results)), figure, numbers,
    "minutes of training where [33] has GPU days; KID in the features of the judge, tiny-clip",
    len(PROMPTS))}
