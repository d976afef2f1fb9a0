"""variants.py — the neighbours of ASD: Eq. 7 with another ε_φ, each a row of METHODS or a --phi.

    python variants.py --method csd --negative "blurry" --prompt "a fox"
    python variants.py --method nfsd --prompt "a fox"
    python variants.py --method bridge --source-words "a drawing of {}" \\
                       --target-words "a 3d render of {}" --init drawing.png --prompt "a fox"
    python variants.py --method lmc --prompt "a fox"
    python variants.py --method asd --gamma -0.5 --phi exact --particles 16 --prompt "a fox"
    python variants.py --method vsd --generator network --prompt "a fox" --particles 4
    python variants.py train-corrective --model tiny-sd --minutes 20      # for --method lmc

| φ          | ε_φ that Eq. 7 subtracts                           | UNet evaluations | arXiv      |
|------------|----------------------------------------------------|------------------|------------|
| CSD        | ε_y; later a negative prompt comes in              | 2, or 3          | 2310.19415 |
| NFSD       | 0 for t < 200, ε_neg above                         | 3                | 2310.17590 |
| Bridge     | ε; then the source's ε, which also stands in for ∅ | 2, or 2N         | 2406.09417 |
| Corrective | (x_t − α b_k(x0, t)) / σ                           | 2, and b_k       | 2401.05293 |
| Exact      | (E[ε | x_t] + γ ε_y) / (1 + γ) over the particles  | 2                | ours       |

Evaluations are per particle and step. None of these φ is trained in the loop. Notation and shapes:
asd.py. A φ with a method `prompts` names what else the prior is asked at x_t, in the loop's one
call, and finds the answers under the same names. The rows of asd.py are offered, too: for --phi
exact and --generator network.
"""
import sys
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":     # so that a failed import prints a line, and no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parent))     # python -I and -P omit this folder
    if not Path(__file__).resolve().with_name("cli").is_dir():
        print(f"{Path(__file__).name}: copied out alone it is a library, to be imported: the "
              "command needs all of the clone beside it", file=sys.stderr)
        sys.exit(2)
    import cli.start  # noqa: F401

import torch
from torch import nn

import asd
from asd import Method, NoisePhi, cfg_noise, optimal_eps_phi
from cli import files, run
from cli.settings import (
    CorrectiveSettings,
    VariantSettings,
    parse_flags,
    phi_options,
    validated,
)
from phi import as_list, untrained
from prior import Prior, UserError, ddim_samples, ode_end, one_step_x0, usable

# the published prompts: NFSD's as in SDS-Bridge's repository, SDS-Bridge's own
NFSD_NEGATIVE = ("unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
                 "low-resolution, gloomy")
BRIDGE_SOURCE = ("oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, "
                 "noisy, malformed")
BRIDGE_TARGET = "detailed high resolution, high quality, sharp"
# CSD's schedules: (cond, neg, null, noise) first, last, and the share of the steps between them
CSD_SCHEDULES = {
    "classifier": ((1, 0, -1, 0), (1, 0, -1, 0), 1.0),
    "coarse": ((1, 0, -1, 0), (1, -1, 0, 0), 0.5),           # its csd-if.yaml
    "refine": ((1, -1, 0, 0), (1, -0.5, -0.5, 0), 1.0),      # its csd-sd-refine.yaml
}


# --------------------------------------------------------------------------------- the equations
def row_eps_phi(row, eps_y, eps_neg, eps_uncond, eps, lam):
    """CSD (repository, configs): any linear row as a choice of ε_φ. All [B, C, H, W]; λ ≠ 1.

    row = (cond, neg, null, noise). Eq. 7's bracket becomes λ − 1 times that row, so that
    (1, 0, −1, 0), the classifier score alone, is ε_φ = ε_y.
    """
    cond, neg, null, noise = row
    # ε_φ = ε_∅ + λ(ε_y − ε_∅) − (λ − 1) (cond ε_y + neg ε_neg + null ε_∅ + noise ε)
    bracket = cond * eps_y + neg * eps_neg + null * eps_uncond + noise * eps
    return cfg_noise(eps_uncond, eps_y, lam) - (lam - 1) * bracket


def bridge_eps_phi(eps_source, eps_target, x0_source, x0_target, alpha_t, sigma_t, lam):
    """SDS-Bridge: the ε_φ that makes Eq. 7's bracket λ times the bridge between two ends of x_t.

    The ends are where the ODEs under the source's and the target's prompt arrive; ε_source and
    ε_target are the predictions at x_t. Ends reached in one step make ε_φ = ε_source, the paper's
    own method; with more steps, its reference solution as we understand it.
    """
    # the bridge in units of ε:  ε_tgt − ε_src  ->  (α / σ) (x0_src − x0_tgt)
    bridge = alpha_t / sigma_t * (x0_source - x0_target)
    # ε_φ = ε_src + λ(ε_tgt − ε_src) − λ · bridge
    return cfg_noise(eps_source, eps_target, lam) - lam * bridge


def corrective_eps_phi(x0, b, eps, alpha_t, sigma_t):
    """LMC-SDS: (x_t − α b_k)/σ, written with x_t = α x0 + σ ε; where b_k = x0 it is SDS's ε."""
    # ε_φ = ε + (α / σ) (x0 − b_k)
    return eps + alpha_t / sigma_t * (x0 - b)


def mean_noise(x_t, particles, alpha_t, sigma_t, alike=None, bandwidth=0.0):
    """ε_g = E[ε | x_t] where x0 is one of N particles, each blurred to a Gaussian of std h.

    x_t [B, C, H, W], particles [N, C, H, W], α_t and σ_t [B, 1, 1, 1]; alike [B, N]: which of them
    x_t may come from (None: all). -> like x_t.
    """
    variance = (alpha_t * bandwidth) ** 2 + sigma_t ** 2
    # p(j | x_t) ∝ exp( −‖x_t − α x0_j‖² / 2(α²h² + σ²) )
    distance = (x_t[:, None] - alpha_t[:, None] * particles).square().flatten(2).sum(2)    # [B, N]
    logits = -0.5 * distance / variance.flatten(1)
    if alike is not None:
        logits = logits.masked_fill(~alike, -torch.inf)
    centre = (logits.softmax(1) @ particles.flatten(1)).view_as(x_t)
    # ε_g = σ (x_t − α Σ_j p(j | x_t) x0_j) / (α²h² + σ²)
    return sigma_t * (x_t - alpha_t * centre) / variance


# ----------------------------------------------------------------------------------- φ by method
class CSD(NoisePhi):
    """Classifier score distillation (arXiv 2310.19415): ε_φ = ε_y, ASD's optimum as γ → ∞.

    schedule: a name of CSD_SCHEDULES or such a triple; default "classifier", with a negative prompt
    "coarse". Their uniform ω, gradient normalisation and Perp-Neg are left out. ValueError at
    λ = 1, where the gradient (λ − 1)(ε_y − ε_∅) is zero.
    """

    def __init__(self, prior, prompts, lam, steps, negative=None, schedule=None):
        super().__init__()
        if lam == 1:
            raise ValueError("CSD has no gradient at --lam 1: it is (λ − 1)(ε_y − ε_∅)")
        schedule = schedule or ("coarse" if negative else "classifier")
        if isinstance(schedule, str):
            if schedule not in CSD_SCHEDULES:
                raise ValueError(f"unknown schedule {schedule!r}: choose one of "
                                 f"{', '.join(CSD_SCHEDULES)}")
            schedule = CSD_SCHEDULES[schedule]
        self.first, self.last, share = schedule
        self.prior, self.lam, self.span, self.step = prior, lam, max(1, share * steps), 0
        self.texts = [negative] if negative else []
        self.negative = prior.encode_text([negative or ""])

    def prompts(self, step, y, null):
        self.step = step
        return {"negative": self.negative.expand_as(y)} if self.row()[1] else {}

    def row(self):
        """(cond, neg, null, noise) at this step, linear between the schedule's two."""
        k = min(1.0, self.step / self.span)
        return [(1 - k) * a + k * b for a, b in zip(self.first, self.last)]

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        eps_neg = answers.get("negative", 0.0)
        return row_eps_phi(self.row(), answers["y"], eps_neg, answers["uncond"], eps, self.lam)


class NFSD(NoisePhi):
    """Noise-free score distillation (arXiv 2310.17590), as SDS-Bridge's repository has it.

    Eq. 7's bracket is λ(ε_y − ε_∅) + δ_D with δ_D = ε_∅ for t < 200 of 1000, ε_∅ − ε_neg above.
    """

    def __init__(self, prior, prompts, negative=NFSD_NEGATIVE):
        super().__init__()
        self.prior, self.texts = prior, [negative]
        self.negative = prior.encode_text([negative])

    def prompts(self, step, y, null):
        return {"negative": self.negative.expand_as(y)}

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        # ε_φ = 0 for t < 200, ε_neg above
        noisy = (5 * t >= self.prior.steps)[:, None, None, None]
        return torch.where(noisy, answers["negative"], 0.0)


class Bridge(NoisePhi):
    """SDS-Bridge (arXiv 2406.09417): SDS first; then from what the pictures are to what is wanted.

    Its own view is optimal transport: SDS approximates a dual bridge from the distribution of the
    pictures to the prompt's, with two errors. 1, one linear step stands for the bridge:
    bridge_steps solves it. 2, ε_∅ stands for the source: words describe the source instead.
    From `bridge_start` (a fraction of the steps) on, the gradient is ω λ (ε_{y+target words} −
    ε_{y+source words}). Words with a {} are a phrase that the prompt is put into, others follow it.
    Start: half-way; at once where source words say what the pictures are (from a painting:
    "painting"). bridge_steps > 1 solves both ODEs instead of taking one step.
    prompts: every prompt the run can ask, at least one (ValueError); a prompt is recognised by its
    embedding.
    """

    def __init__(self, prior, prompts, lam, steps, source_words=None, target_words=None,
                 bridge_steps=1, bridge_start=None):
        super().__init__()
        if not as_list(prompts):
            raise ValueError("SDS-Bridge's φ is made for its prompts: Bridge(prior, prompts, …)")
        if bridge_start is None:
            bridge_start = 0.5 if source_words is None else 0.0
        if not 0 <= bridge_start <= 1:
            raise ValueError(f"bridge_start is a fraction of the steps, not {bridge_start}")
        words = [BRIDGE_SOURCE if source_words is None else source_words,
                 BRIDGE_TARGET if target_words is None else target_words]
        self.prior, self.lam, self.ode_steps = prior, lam, bridge_steps
        self.first_step, self.bridging = round(bridge_start * steps), False
        self.texts = words
        prompts = as_list(prompts)
        self.plain = prior.encode_text(prompts)
        self.source = prior.encode_text([with_words(prompt, words[0]) for prompt in prompts])
        self.target = prior.encode_text([with_words(prompt, words[1]) for prompt in prompts])

    def prompts(self, step, y, null):
        """In the second stage the source stands in for ∅, and the target's words follow y."""
        self.bridging = step >= self.first_step
        if not self.bridging:
            return {}
        rows = rows_of(y, self.plain)
        return {"uncond": self.source[rows], "y": self.target[rows]}

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        if not self.bridging:
            return eps
        eps_source, eps_target = answers["uncond"], answers["y"]
        if self.ode_steps == 1:
            return eps_source
        source = self.source[rows_of(cond, self.target)]
        x0_source = self.end(x_t, t, source, eps_source)
        x0_target = self.end(x_t, t, cond, eps_target)
        return bridge_eps_phi(eps_source, eps_target, x0_source, x0_target,
                              *self.prior.alpha_sigma(t), self.lam)

    def end(self, x_t, t, cond, eps):
        """Where the ODE under a prompt arrives. -> x0"""
        return ode_end(lambda x, t: self.prior.eps(x, t, cond), x_t, t, self.ode_steps,
                       self.prior.alpha_sigma, eps)


def with_words(prompt, words):
    """The prompt in a phrase ("a drawing of {}"), or followed by words; "" adds nothing."""
    if "{}" in words:
        return words.replace("{}", prompt)
    return f"{prompt}, {words}" if words else prompt


def rows_of(cond, table):
    """Which row of table [P, L, C] each of cond [B, L, C] is: [B]. ValueError where it is none."""
    distance, rows = (cond[:, None] - table).abs().flatten(2).amax(2).min(1)
    # not ==: in a batch of another size the same prompt may be rounded in another way
    if (distance > 0.05 * table.abs().amax()).any():
        raise ValueError("SDS-Bridge is asked for a prompt that it was not made with")
    return rows


class Corrective(NoisePhi):
    """LMC-SDS (arXiv 2401.05293), as we understand it: SDS's projection term without its blur.

    SDS is λ(ε_y − ε_∅) plus ε_∅ − ε = (α/σ)(x0 − x̂0), which moves x0 towards the prior's one-step
    estimate x̂0: a blurred x0, even for a perfect picture. b_k(x0, t) ≈ E[x̂0 | x0, t] is blurred in
    the same way, so (α/σ)(b_k − x̂0) is zero on average at pictures the prior knows, and λ may be
    small. From the paper's abstract: a shallow network with weights k, trained beforehand, that
    imitates the prior's bias at each t. Ours: the network, its data, its loss's weight (all in
    tiny/corrective.py), that no gradient goes through it, λ = 2. The paper fixes ε as well
    (--fixed-noise): on tiny-sd that left speckles alone (tiny-clip 0.14, else 0.76), so it is off.
    """

    def __init__(self, prior, prompts, corrective=None):
        super().__init__()
        from tiny.corrective import load_bias
        self.prior = prior
        self.b_k = load_bias(prior, corrective).to(prior.device).requires_grad_(False).eval()

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        levels = self.prior.alpha_sigma(t)
        x0 = one_step_x0(x_t, eps, *levels)
        return corrective_eps_phi(x0, self.b_k(x0, t), eps, *levels)


class Exact(NoisePhi):
    """φ at the minimiser of Eq. 10 (asd.optimal_eps_phi) without network or training. γ > −1.

    The fake distribution is N known particles; those of one prompt belong together. VSD (γ = 0) or
    ASD at its optimum, SDS's cost. One particle at h = 0 knows its ε: ε_g = ε, so that the bracket
    is SDS's at λ_eff = 1 + (1 + γ)(λ − 1), times 1/(1 + γ). In many dimensions particles are so far
    apart that each only sees itself unless t or h is large.
    """
    whole = True                          # the loop gives it all particles at once

    def __init__(self, prior, prompts, gamma, bandwidth=0.0):
        super().__init__()
        if not gamma > -1:
            raise ValueError(f"an exact φ is the minimiser of Eq. 10, which has none at --gamma "
                             f"{gamma:g}: give one above -1, such as --gamma -0.5")
        self.prior, self.gamma, self.bandwidth = prior, gamma, bandwidth

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        levels = self.prior.alpha_sigma(t)
        x0 = one_step_x0(x_t, eps, *levels)
        prompt = torch.unique(cond.flatten(1).float(), dim=0, return_inverse=True)[1]
        eps_g = mean_noise(x_t, x0, *levels, prompt[:, None] == prompt, self.bandwidth)
        return optimal_eps_phi(eps_g, answers["y"], self.gamma)


PHIS = {"csd": CSD, "nfsd": NFSD, "bridge": Bridge, "lmc": Corrective, "exact": Exact}
METHODS = {
    "csd": Method(phi=CSD),                            # λ is only a factor, which Adam divides out
    "nfsd": Method(phi=NFSD),
    "bridge": Method(phi=Bridge),                      # its repository: λ = 40 in both stages
    "lmc": Method(phi=Corrective, lam=2.0),
}
# what is published for pictures; CSD's settings are of 3D, LMC-SDS's were not found
BRIDGE_REPOSITORY = ("SDS-Bridge's repository, 2D_experiments", {
    "lam": 40.0, "omega": "sigma2", "t_late": 1.0, "optimizer": "adamw", "lr": 0.01,
    "beta2": 0.99, "adam_eps": 1e-15, "steps": 1000})
PAPER = asd.PAPER | {"nfsd": BRIDGE_REPOSITORY, "bridge": BRIDGE_REPOSITORY}


# --------------------------------------------------------------------------- the one-step generator
class Network(nn.Module):
    """A small U-Net from noise and a prompt to latents in one step: Diff-Instruct (2305.18455).

    cond [B, L, C]: the prompt of each picture of a batch, whose noise is fresh at every step. The
    network's learning rate is a thirtieth of the latents': weights, not pictures.
    """

    def __init__(self, prior, cond, rng, widths=(32, 64)):
        super().__init__()
        from diffusers import UNet2DConditionModel
        self.prior, self.cond, self.rng = prior, cond.float(), rng
        self.unet = untrained(lambda: UNet2DConditionModel(
            sample_size=prior.shape[1:], in_channels=prior.shape[0], out_channels=prior.shape[0],
            block_out_channels=widths, layers_per_block=1, cross_attention_dim=cond.shape[-1],
            attention_head_dim=4, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")), rng).to(prior.device)
        self.register_buffer("shown", self.noise())    # what images() shows; in the checkpoint

    def noise(self):
        # drawn on the CPU whatever the device, from the run's one source of randomness
        shape = (len(self.cond), *self.prior.shape)
        return torch.randn(shape, generator=self.rng, device="cpu").to(self.prior.device)

    def parameter_groups(self, lr):
        return [{"params": list(self.parameters()), "lr": lr / 30}]

    def forward(self):
        return asd.Samples(self.unet(self.noise(), 0, self.cond).sample, self.cond)

    @torch.no_grad()
    def images(self):
        """-> RGB [B, 3, H, W] in [0, 1], always of the same noise."""
        return self.prior.decode(self.unet(self.shown, 0, self.cond).sample)


# ----------------------------------------------------------------------------------- command line
def all_methods():
    """The paper's rows and these."""
    return asd.METHODS | METHODS


ALL_PHIS = asd.PHIS | PHIS


def implied(given):
    """The rates of --generator network, whatever the model: those of pictures leave it coarser."""
    if given.get("generator") != "network":
        return {}
    return {"lr": 0.01, "lr_end": 1.0, "phi_lr": 1e-3}


def check(settings):
    """UserError for what does not fit together, before anything is loaded."""
    pictures = settings.init or settings.pixels or settings.real
    if settings.generator == "network" and pictures:
        raise UserError("--generator network makes latents of noise: drop --init, --pixels, --real")


def build(settings, prior, method, rng, folder, new):
    """As asd.py does, or the network that makes all pictures. -> (State, y)"""
    if settings.generator == "latents":
        return asd.build(settings, prior, method, rng, folder, new)
    y = prior.encode_text(settings.prompt).repeat_interleave(settings.particles, 0)
    phi = method.phi(prior, settings.prompt, **phi_options(settings, method.phi))
    return asd.State(Network(prior, y, rng), phi, method, rng), y


def train_corrective(settings):
    """Sample (or read) pictures, train b_k on them, write it. Resumes; see tiny/training.py."""
    from tiny import corrective, data
    name = Path(settings.model).name
    if not settings.out and name != "tiny-sd":
        raise UserError(f"--model {settings.model} needs an --out FILE of its own: "
                        f"{corrective.OWN.name} is tiny-sd's")
    out = Path(settings.out or corrective.OWN)
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out, as nothing is written over")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is a file, not a folder")
    prompts = []
    if settings.prompts:
        prompts = files.read_prompts(files.regular(settings.prompts))
    with ExitStack() as stack:
        # what is kept in DATA belongs to all such trainings, wherever their files go
        folders = [out.parent, data.DATA]
        if out.parent.resolve() == data.DATA.resolve():
            folders = [data.DATA]
        new = [folder for folder in folders if not folder.exists()]
        for folder in folders:
            if folder not in new:
                stack.enter_context(files.locked(folder))
        torch.manual_seed(settings.seed)
        prior = Prior.from_pretrained(settings.model, usable(settings.device))
        # nothing is written for a model that is refused
        for folder in new:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(folder))
        unet = corrective.fingerprint(*prior.network.parameters())
        pictures = corrective_pictures(settings, prior, unet, prompts)
        network = corrective.train(
            corrective_checkpoint(settings, prior, unet, pictures), prior.shape[0],
            corrective_draws(settings, prior, pictures), settings.lr, settings.minutes,
            str(prior.device))
        corrective.save_bias(network, out, model=name, unet=unet)
    print(out)


def corrective_pictures(settings, prior, unet, prompts):
    """The pictures b_k learns on, x0 [N, C, H, W]: those of --images, or the prior's samples.

    The samples are kept, named by what they are made of: other weights, words or settings have
    others.
    """
    from tiny import corrective
    from tiny.data import DATA
    if settings.images:
        return files.encode_folder(prior, settings.images).cpu()

    def sample(made, n):
        texts = [""] * n
        if prompts:
            texts = [prompts[(made + i) % len(prompts)] for i in range(n)]
        noise = torch.Generator().manual_seed(settings.seed + made)
        x_T = torch.randn(n, *prior.shape, generator=noise, device="cpu")
        return ddim_samples(prior, texts, x_T, settings.ddim, 3.0 if prompts else 1.0)

    made_of = corrective.fingerprint(unet, prompts, settings.ddim, settings.seed, settings.batch)
    kept = DATA / f"corrective-{Path(settings.model).name}-{made_of}.samples.safetensors"
    return corrective.kept_samples(still_ours(kept, {"x0": prior.shape}), settings.samples,
                                   settings.batch, sample, torch.empty(0, *prior.shape))


def corrective_checkpoint(settings, prior, unet, pictures):
    """The path of the checkpoint of a training of these settings, weights and pictures."""
    from tiny import corrective
    from tiny.data import DATA
    made_of = corrective.fingerprint(unet, pictures, settings.lr, settings.seed, settings.batch)
    shapes = {}
    for i, weight in enumerate(corrective.Bias(prior.shape[0]).parameters()):
        shapes |= {f"parameter.{i}": weight.shape, f"ema.{i}": weight.shape}
    name = Path(settings.model).name
    return still_ours(DATA / f"corrective-{name}-{made_of}.checkpoint.safetensors", shapes)


def corrective_draws(settings, prior, pictures):
    """The function that tiny/corrective.py's train() calls with the step it begins at."""
    null = prior.encode_text([""]).expand(settings.batch, -1, -1)

    def draws(step):
        """b_k's lessons from this step on: (x0, t, x̂0, α_t, σ_t), x̂0 the prior's without prompt."""
        rng = torch.Generator().manual_seed(settings.seed + step)

        def draw():
            rows = torch.randint(len(pictures), (settings.batch,), generator=rng, device="cpu")
            x0 = pictures[rows].to(prior.device)
            t, eps = asd.draw_noise(rng, x0, 0, prior.steps - 1)
            return x0, t, *estimate(prior, x0, t, eps, null)
        return draw
    return draws


@torch.no_grad()
def estimate(prior, x0, t, eps, null):
    """-> (x̂0 of the noised x0 without prompt, α_t, σ_t)."""
    levels = prior.alpha_sigma(t)
    x_t = asd.add_noise(x0, eps, *levels)
    return one_step_x0(x_t, prior.eps(x_t, t, null), *levels), *levels


def still_ours(path, shapes):
    """path, where an earlier call may have kept {name: last dimensions}; else UserError."""
    from safetensors import SafetensorError, safe_open
    try:
        if path.exists():
            with safe_open(files.regular(path), "pt") as file:
                if any(file.get_slice(name).get_shape()[-len(shape):] != list(shape)
                       for name, shape in shapes.items()):
                    raise ValueError("other shapes")
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not what was kept there: move it away ({error})") from error
    return path


def corrective_main(argv):
    """`python variants.py train-corrective …`. -> exit status."""
    def work():
        given = parse_flags("variants.py", "variants.py train-corrective: train LMC-SDS's "
                            "corrective b_k(x0, t). The same command goes on where it was stopped.",
                            CorrectiveSettings, argv)
        try:
            train_corrective(validated(CorrectiveSettings, given))
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("; the same command goes on") from stop
    return run.guarded("variants.py", work, "a smaller --batch")


def main(argv=None):
    """`python variants.py --method …`, and train-corrective. -> exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["train-corrective"]:
        return corrective_main(words[1:])
    return run.main(run.Command(
        "variants.py", "Make pictures of prompts by the neighbours of Adversarial Score "
        "Distillation. To train what LMC-SDS needs: train-corrective --help.",
        VariantSettings, METHODS | asd.METHODS, ALL_PHIS, asd.CHOICES, build, asd.distill,
        default_method=None, implied=implied, check=check, paper=PAPER), words)


if __name__ == "__main__":
    sys.exit(main())
