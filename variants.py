"""variants.py — the neighbours of ASD: Eq. 7 with another ε_φ, each a row of METHODS or a --phi.

    python asd.py --method csd --negative "blurry" --prompt "a fox"
    python asd.py --method nfsd --prompt "a fox"
    python asd.py --method bridge --source-words "a drawing of {}" \\
                  --target-words "a 3d render of {}" --init drawing.png --prompt "a fox"
    python asd.py --method lmc --lam 2 --fixed-noise --prompt "a fox"
    python asd.py --method asd --gamma -0.5 --phi exact --particles 16 --prompt "a fox"
    python asd.py --method vsd --generator network --prompt "a fox" --prompt "a duck" --particles 4
    python variants.py train-corrective --model tiny-sd --minutes 20      # for --method lmc

| φ          | ε_φ that Eq. 7 subtracts                           | UNet evaluations | arXiv      |
|------------|----------------------------------------------------|------------------|------------|
| CSD        | ε_y; later a negative prompt comes in              | 2, or 3          | 2310.19415 |
| NFSD       | 0 for t < 200, ε_neg above                         | 2, or 3          | 2310.17590 |
| Bridge     | ε; then the source's ε, which also stands in for ∅ | 2, or 2N         | 2406.09417 |
| Corrective | (x_t − α b_k(x0, t)) / σ                           | 2, and b_k       | 2401.05293 |
| Exact      | (E[ε | x_t] + γ ε_y) / (1 + γ) over the particles  | 2                | ours       |

Evaluations are per particle and step. None of these φ is trained in the loop. Notation and shapes:
asd.py. A φ with `prompts` is told the step and may change what the prior is asked. The equations
need torch alone.
"""
import sys

import torch
from torch import nn

from asd import Method, NoisePhi, add_noise, ask, cfg_noise, guidance_questions, optimal_eps_phi

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


def one_step_x0(x_t, eps, alpha_t, sigma_t):
    """The denoised estimate that a noise prediction implies; with the added noise, x0 itself."""
    # x̂0 = (x_t − σ ε) / α
    return (x_t - sigma_t * eps) / alpha_t


def ode_end(eps_of, x_t, t, steps, alpha_sigma, eps=None):
    """Where the probability-flow ODE arrives from x_t at time t [B], by `steps` DDIM steps -> x0.

    eps_of(x, t) -> ε; alpha_sigma(t) -> (α_t, σ_t); eps: ε at x_t, where it is known already. One
    step is one_step_x0. Source: DDIM, arXiv 2010.02502, Eq. 12 with η = 0.
    """
    for k in range(steps, 0, -1):
        now = t * k // steps
        eps = eps_of(x_t, now) if eps is None else eps
        x0 = one_step_x0(x_t, eps, *alpha_sigma(now))
        # x_{t'} = α_{t'} x̂0 + σ_{t'} ε;  the last step goes to α = 1, σ = 0
        x_t, eps = add_noise(x0, eps, *alpha_sigma(t * (k - 1) // steps)), None
    return x0


@torch.no_grad()
def ddim_samples(prior, prompts, x_T, steps=50, lam=3.0):
    """Text-to-image by the deterministic DDIM sampler from noise x_T [B, C, H, W] -> x0."""
    y, null = prior.encode_text(prompts), prior.encode_text([""])
    t = torch.full((len(y),), prior.steps - 1, device=prior.device)

    def eps_of(x, t):
        said = ask(prior, guidance_questions(x, t, y, null, lam))
        return cfg_noise(said[0], said[-1], lam)
    return ode_end(eps_of, x_T.to(prior.device), t, steps, prior.alpha_sigma)


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

    def __init__(self, prior, prompts, lam, steps, negative=None, schedule=None, **_):
        super().__init__()
        if lam == 1:
            raise ValueError("CSD has no gradient at --lam 1: it is (λ − 1)(ε_y − ε_∅)")
        schedule = schedule or ("coarse" if negative else "classifier")
        self.first, self.last, share = CSD_SCHEDULES.get(schedule, schedule)
        self.prior, self.lam, self.span, self.step = prior, lam, max(1, share * steps), 0
        self.texts = [negative] if negative else []
        self.negative = prior.encode_text([negative or ""])

    def prompts(self, step, y, null):
        self.step = step
        return y, null

    def row(self):
        """(cond, neg, null, noise) at this step, linear between the schedule's two."""
        k = min(1.0, self.step / self.span)
        return [(1 - k) * a + k * b for a, b in zip(self.first, self.last)]

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        row, eps_neg = self.row(), 0.0
        if row[1]:
            eps_neg = self.prior.eps(x_t, t, self.negative.expand(len(x_t), -1, -1))
        return row_eps_phi(row, eps_y, eps_neg, eps_uncond, eps, self.lam)


class NFSD(NoisePhi):
    """Noise-free score distillation (arXiv 2310.17590), as SDS-Bridge's repository has it.

    Eq. 7's bracket is λ(ε_y − ε_∅) + δ_D with δ_D = ε_∅ for t < 200 of 1000, ε_∅ − ε_neg above.
    """

    def __init__(self, prior, prompts, negative=NFSD_NEGATIVE, **_):
        super().__init__()
        self.prior, self.texts = prior, [negative]
        self.negative = prior.encode_text([negative])

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        # ε_φ = 0 for t < 200, ε_neg above: only these are asked
        eps_phi, noisy = torch.zeros_like(eps), 5 * t >= self.prior.steps
        if noisy.any():
            negative = self.negative.expand(int(noisy.sum()), -1, -1)
            eps_phi[noisy] = self.prior.eps(x_t[noisy], t[noisy], negative).to(eps)
        return eps_phi


class Bridge(NoisePhi):
    """SDS-Bridge (arXiv 2406.09417): SDS first; then from what the pictures are to what is wanted.

    From `bridge_start` (a fraction of the steps) on, the gradient is ω λ (ε_{y+target words} −
    ε_{y+source words}). Words with a {} are a phrase that the prompt is put into, others follow it.
    Start: half-way; at once where source words say what the pictures are (from a painting:
    "painting"). bridge_steps > 1 solves both ODEs instead of taking one step.
    prompts: every prompt the run can ask, at least one (ValueError); a prompt is recognised by its
    embedding.
    """

    def __init__(self, prior, prompts, lam, steps, source_words=None, target_words=None,
                 bridge_steps=1, bridge_start=None, **_):
        super().__init__()
        if not prompts:
            raise ValueError("phi 'bridge' is made for its prompts: make_phi('bridge', prior, …)")
        start = bridge_start if bridge_start is not None else 0.5 if source_words is None else 0.0
        words = [BRIDGE_SOURCE if source_words is None else source_words,
                 BRIDGE_TARGET if target_words is None else target_words]
        self.prior, self.lam, self.ode_steps = prior, lam, bridge_steps
        self.first, self.bridging, self.texts = round(start * steps), False, words
        self.plain = prior.encode_text(prompts)
        self.source, self.target = (
            prior.encode_text([with_words(prompt, extra) for prompt in prompts]) for extra in words)

    def prompts(self, step, y, null):
        self.bridging = step >= self.first
        if not self.bridging:
            return y, null
        rows = rows_of(y, self.plain)
        return self.target[rows], self.source[rows]

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        if not self.bridging:
            return eps
        source = self.source[rows_of(cond, self.target)]
        if self.lam == 1:                              # then the loop has not asked for ∅
            eps_uncond = self.prior.eps(x_t, t, source)
        if self.ode_steps == 1:
            return eps_uncond
        ends = [ode_end(lambda x, t, told=told: self.prior.eps(x, t, told), x_t, t,
                        self.ode_steps, self.prior.alpha_sigma, at_x_t)
                for told, at_x_t in ((source, eps_uncond), (cond, eps_y))]
        return bridge_eps_phi(eps_uncond, eps_y, *ends, *self.prior.alpha_sigma(t), self.lam)


def with_words(prompt, words):
    """The prompt in a phrase ("a drawing of {}"), or followed by words; "" adds nothing."""
    if "{}" in words:
        return words.replace("{}", prompt)
    return f"{prompt}, {words}" if words else prompt


def rows_of(cond, table):
    """Which row of table [P, L, C] each of cond [B, L, C] is: [B]. ValueError where it is none."""
    distance, rows = (cond[:, None] - table).abs().flatten(2).amax(2).min(1)
    if (distance > 0.05 * table.abs().amax()).any():       # batches of other sizes round otherwise
        raise ValueError("SDS-Bridge is asked for a prompt that it was not made with")
    return rows


class Corrective(NoisePhi):
    """LMC-SDS (arXiv 2401.05293), as we understand it: SDS's projection term without its blur.

    SDS is λ(ε_y − ε_∅) plus ε_∅ − ε = (α/σ)(x0 − x̂0), which moves x0 towards the prior's one-step
    estimate x̂0: a blurred x0, even for a perfect picture. b_k(x0, t) ≈ E[x̂0 | x0, t] is blurred in
    the same way, so (α/σ)(b_k − x̂0) is zero on average at pictures the prior knows, and λ may be
    small. From the paper's abstract: a shallow network, trained beforehand, that imitates the
    prior's bias at each t. Ours: the network, its data, its loss's weight (corrective.py), that no
    gradient goes through it, λ = 2.
    """

    def __init__(self, prior, prompts, corrective=None, **_):
        super().__init__()
        from corrective import load_bias
        self.prior = prior
        self.b_k = load_bias(prior, corrective).to(prior.device).requires_grad_(False).eval()

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
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

    def __init__(self, prior, prompts, gamma, bandwidth=0.0, **_):
        super().__init__()
        if gamma <= -1:
            raise ValueError(f"an exact φ is the minimiser of Eq. 10, which has none at --gamma "
                             f"{gamma:g}: give one above -1, such as --gamma -0.5")
        self.prior, self.gamma, self.bandwidth = prior, gamma, bandwidth

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        levels = self.prior.alpha_sigma(t)
        x0 = one_step_x0(x_t, eps, *levels)
        prompt = torch.unique(cond.flatten(1).float(), dim=0, return_inverse=True)[1]
        eps_g = mean_noise(x_t, x0, *levels, prompt[:, None] == prompt, self.bandwidth)
        return optimal_eps_phi(eps_g, eps_y, self.gamma)


PHIS = {"csd": CSD, "nfsd": NFSD, "bridge": Bridge, "lmc": Corrective, "exact": Exact}
METHODS = {
    "csd": Method(phi="csd"),                          # λ is only a factor, which Adam divides out
    "nfsd": Method(phi="nfsd"),
    "bridge": Method(phi="bridge"),                    # its repository: λ = 40 in both stages
    "lmc": Method(phi="lmc", lam=2.0),
}


def make_phi(kind, prior, prompts, **words):
    """A name of PHIS -> φ, told what it takes of `words`; those that are None keep its default.

    prompts: every prompt the run can ask. words: lam, gamma, steps of the run, negative, …
    """
    given = {name: value for name, value in words.items() if value is not None}
    return PHIS[kind](prior, prompts, **given)


# --------------------------------------------------------------------------- the one-step generator
class Network(nn.Module):
    """A small U-Net from noise and a prompt to latents in one step: Diff-Instruct (2305.18455).

    cond [B, L, C]: the prompt of each picture of a batch, whose noise is fresh at every step. The
    network's learning rate is a thirtieth of the latents': weights, not pictures.
    """

    def __init__(self, prior, cond, rng, widths=(32, 64)):
        super().__init__()
        from diffusers import UNet2DConditionModel

        from phi import seeded
        self.prior, self.cond, self.rng = prior, cond.float(), rng
        with seeded(int(torch.randint(2 ** 31, (), generator=rng))):
            unet = UNet2DConditionModel(
                sample_size=prior.shape[1:], in_channels=prior.shape[0],
                out_channels=prior.shape[0], block_out_channels=widths, layers_per_block=1,
                cross_attention_dim=cond.shape[-1], attention_head_dim=4, norm_num_groups=8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
        self.unet = unet.to(prior.device)
        self.register_buffer("shown", self.noise())    # what images() shows; in the checkpoint

    def noise(self):
        # drawn on the CPU whatever the device, from the run's one source of randomness
        shape = (len(self.cond), *self.prior.shape)
        return torch.randn(shape, generator=self.rng).to(self.prior.device)

    def parameter_groups(self, lr):
        return [{"params": list(self.parameters()), "lr": lr / 30}]

    def forward(self):
        return self.unet(self.noise(), 0, self.cond).sample, self.cond, None

    @torch.no_grad()
    def images(self):
        """-> RGB [B, 3, H, W] in [0, 1], always of the same noise."""
        return self.prior.decode(self.unet(self.shown, 0, self.cond).sample)


# ----------------------------------------------------------------------------------- command line
def main(argv=None):
    """`python variants.py train-corrective …`: corrective.py, where LMC-SDS's network is."""
    import corrective
    return corrective.main(argv)


if __name__ == "__main__":
    sys.exit(main())
