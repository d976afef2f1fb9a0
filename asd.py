"""Adversarial Score Distillation (ASD, arXiv 2312.00739, CVPR 2024): Eqs. 1–10, the loop, a CLI.

    python asd.py --prompt "a red apple"                      # offline, with the embedded tiny-sd
    python asd.py --prompt "a fox" --method vsd --particles 4
    python asd.py --prompt "a photo of a corgi" --model path/to/stable-diffusion --device cuda

A frozen text-to-image diffusion model becomes a loss. Every method of the family is Eq. 7 with one
choice, the noise prediction ε_φ that stands for the fake samples:

    ∇θ L'_G = E[ ω(t) · ( ε_∅ + λ(ε_y − ε_∅) − ε_φ ) · ∂x0/∂θ ]                               (7)

| equation                   | function                                        | in test_asd.py    |
| -------------------------- | ----------------------------------------------- | ----------------- |
| 1  the diffusion loss      | sds_grad at λ = 1                               | test_sds_with_…   |
| 2  guidance                | cfg_noise                                       | test_equation[…]  |
| 3  SDS                     | sds_grad                                        | test_sds_is_eq7_… |
| 4  WGAN with a penalty     | wgan_objective                                  | test_equation[…]  |
| 5  the discriminator       | log_discriminator                               | test_equation[…]  |
| 6  generator's loss, bound | generator_loss, generator_bound                 | test_eq6_…        |
| 7  generator's gradient    | classifier_score, generator_grad                | test_eq7_…        |
| 8  discriminator's loss    | discriminator_loss_density, gradient_penalty    | test_eq8_…        |
| 9  in noise, a condition   | discriminator_loss, gamma_lower_bound           | test_eq9_…        |
| 10 without real samples    | discriminator_loss_text; optimal_eps_phi (ours) | test_eq10_…       |

Eq. 11, editing, is in editing.py. Checked against the paper's full main text; its supplement was
not available. Where the paper leaves something open, the code says so.

Notation: x_t = α_t x0 + σ_t ε; ε_∅, ε_y, ε_φ are noise predictions at the same x_t without prompt,
with the prompt y, and of the fake-sample model φ. x^g are samples of the generator, x^r real ones.
Shapes: x0, x_t, ε [B, C, H, W], latents; images are RGB in [0, 1]; t [B] long in 0 … T−1; α_t, σ_t
[B, 1, 1, 1]; λ, γ, η floats (in Eqs. 2, 7, 9 and 10 also tensors, shaped like α_t).
‖·‖² is a sum over all but the batch dimension, E the mean over the batch. Everything here needs
torch alone, and the equations can be copied out one by one, with the three helpers above them.
"""
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

try:
    from phi import EmbeddingPhi, LoRAPhi, NoisePhi, make_phi
    from prior import Latents, Pixels, Prior, UserError  # noqa: F401
except ImportError:                # this file was copied out alone: bring a prior and a φ
    EmbeddingPhi = LoRAPhi = NoisePhi = None


# ------------------------------------------------------------------------ the paper's equations
def _coefficient(c, like):
    """λ, γ, ω, α_t, σ_t as they combine with `like`: floats as they are, tensors in its dtype."""
    return c.to(like) if torch.is_tensor(c) else c


def _per_sample(c, like):
    """The same for a coefficient of squared norms [B]."""
    c = _coefficient(c, like)
    return c.flatten() if torch.is_tensor(c) and c.ndim else c


def _norm2(v):
    """‖v‖²₂ per sample: [B, …] -> [B], at least float32: a sum over a picture overflows half."""
    return v.to(torch.promote_types(v.dtype, torch.float32)).square().flatten(1).sum(1)


def add_noise(x0, eps, alpha_t, sigma_t):
    """The forward process: x0, eps [B, C, H, W] -> x_t; α² + σ² = 1 for Stable Diffusion."""
    # x_t = α_t x0 + σ_t ε
    return _coefficient(alpha_t, x0) * x0 + _coefficient(sigma_t, x0) * eps


def cfg_noise(eps_uncond, eps_y, lam):
    """Eq. 2, classifier-free guidance. λ = 1 is the plain conditional prediction.

    Some code bases (threestudio's SDS) write ε_y + s(ε_y − ε_∅) instead: their s is λ − 1.
    """
    # ε_∅ + λ (ε_y − ε_∅)
    return eps_uncond + _coefficient(lam, eps_y) * (eps_y - eps_uncond)


def sds_grad(eps_uncond, eps_y, eps, lam, omega=1.0):
    """Eq. 3, Score Distillation Sampling (DreamFusion): Eq. 7 with the added noise ε as ε_φ.

    At λ = 1 it is the last line of Eq. 1, ω(t)(ε_y − ε): the gradient of the diffusion loss without
    the network's Jacobian. With guidance it is the gradient of no such loss.
    """
    # ω(t) · ( ε_∅ + λ(ε_y − ε_∅) − ε )
    return generator_grad(eps_uncond, eps_y, eps, lam, omega)


def wgan_objective(real_d, fake_d, grad_norm, tau, p=2):
    """Eq. 4: what a WGAN's critic maximises, and its generator minimises. -> scalar.

    real_d [N], fake_d [M]: the critic D at real and at fake samples; grad_norm [K]: ‖∇D(x̃)‖ at a
    mixture of the two; τ ≥ 0.
    """
    # E[ D(x^r) ] − E[ D(x^g) ] − τ E[ ‖∇D(x̃)‖^p ]
    return real_d.mean() - fake_d.mean() - tau * (grad_norm ** p).mean()


def log_discriminator(log_p_y, log_p_phi):
    """Eq. 5: the discriminator, high where x_t looks like y and not like φ, the fake samples.

    log_p_y = log p(y | x_t) and log_p_phi = log p(φ | x_t), of any one shape.
    """
    # D(x_t; y) = log p(y|x_t) − log p(φ|x_t)
    return log_p_y - log_p_phi


def generator_loss(log_p_y, log_p_phi):
    """Eq. 6, left: the WGAN generator's loss over fake samples. -> scalar."""
    # L_G = −E[ D(x_t^g) ] = E[ log p(φ|x_t) − log p(y|x_t) ]
    return -log_discriminator(log_p_y, log_p_phi).mean()


def generator_bound(log_p_y, log_p_phi, lam):
    """Eq. 6, right: L'_G ≥ L_G for λ ≥ 1, as −log p(y | x_t) ≥ 0 for a discrete y. -> scalar."""
    # L'_G = E[ log p(φ|x_t) − λ log p(y|x_t) ]
    return (log_p_phi - lam * log_p_y).mean()


def classifier_score(eps_uncond, eps_y, sigma_t):
    """The Bayes step before Eq. 7: the diffusion model as a classifier. -> ∇ log p(y | x_t)."""
    # ∇ log p(y|x_t) = ∇ log p(x_t|y) − ∇ log p(x_t) = −(ε_y − ε_∅) / σ_t
    return -(eps_y - eps_uncond) / _coefficient(sigma_t, eps_y)


def generator_grad(eps_uncond, eps_y, eps_phi, lam, omega=1.0):
    """Eq. 7: the gradient of Eq. 6's bound with respect to x0, with ω(t) for the factor α_t/σ_t.

    All [B, C, H, W]. Warns once where λ < 1: Eq. 6 is no upper bound of the generator's loss there.
    """
    if float(lam.min() if torch.is_tensor(lam) else lam) < 1:     # Python shows it once per place
        warnings.warn("λ < 1: Eq. 6's L'_G is no bound of the generator's loss", stacklevel=2)
    # ω(t) · ( ε_∅ + λ(ε_y − ε_∅) − ε_φ )
    return _coefficient(omega, eps_y) * (cfg_noise(eps_uncond, eps_y, lam) - eps_phi)


def discriminator_loss_density(fake_d, real_d, grad_norm2, tau):
    """Eq. 8: the discriminator's loss from its values; Eq. 4 at p = 2 with the sign of a loss.

    fake_d [N], real_d [M]: D (Eq. 5) at noised fake and real samples; grad_norm2 [K]: ‖∇D(x̃_t)‖².
    """
    # L_D = E[ D(x_t^g) ] − E[ D(x_t^r) ] + τ E[ ‖∇D(x̃_t)‖²₂ ]
    return fake_d.mean() - real_d.mean() + tau * grad_norm2.mean()


def gradient_penalty(eps_y, eps_phi, sigma_t):
    """‖∇D‖² of Eq. 8 in noise predictions, from ∇D = ∇ log p(x_t|y)/p(x_t|φ). -> [B]."""
    # ∇D = (ε_φ − ε_y) / σ_t   ⇒   ‖∇D‖² = ‖ε_y − ε_φ‖² / σ_t²
    norm2 = _norm2(eps_y - eps_phi)
    return norm2 / _per_sample(sigma_t, norm2) ** 2


def discriminator_loss(eps, fake_phi, fake_y, real_phi, real_y, eta=0.5, gamma=-1.0):
    """Eq. 9: Eq. 8 as a loss of φ in noise predictions, up to terms without φ. -> scalar.

    eps and the four predictions are [B, C, H, W]; fake_… at the noised fake, real_… at the noised
    real samples, both with the noise eps. The first row is D(x^g) − D(x^r), with −log p(x0|·) as a
    denoising error (an ELBO step: a difference of two bounds, so itself no bound of Eq. 8); the
    second is the penalty, σ_t² gradient_penalty, at real samples with weight η, at fake ones with
    weight γ. The paper advises η = ½ and γ ∈ [−1, 0). In ε_{x^r;φ} the curvature is η − 1: for
    η < 1 the loss is concave there, with its *maximum* at (ε − η ε_y)/(1 − η), and has no minimum,
    also at η = ½; what bounds φ is its low rank, its shared weights, the rate and the steps.
    """
    # ‖ε_{x^g;φ} − ε‖² − ‖ε_{x^r;φ} − ε‖² + η ‖ε_{x^r;y} − ε_{x^r;φ}‖² + γ ‖ε_{x^g;y} − ε_{x^g;φ}‖²
    eta, gamma = _per_sample(eta, eps), _per_sample(gamma, eps)
    critic = _norm2(fake_phi - eps) - _norm2(real_phi - eps)
    penalty = eta * _norm2(real_y - real_phi) + gamma * _norm2(fake_y - fake_phi)
    return (critic + penalty).mean()


def gamma_lower_bound(fake_phi, fake_y, real_phi, real_y, eta=0.5):
    """The condition under Eq. 9: the least γ for which its penalty is not negative. -> 0-d.

    A ratio of means over the batch (the paper prints no E here), as the penalty is a mean. −inf
    where φ and y agree on the fake samples: any γ will do. It is no condition of Eq. 10's bound.
    Raises ValueError for η < 0.
    """
    if eta < 0:
        raise ValueError(f"eta must be at least 0, not {eta}")
    # γ ≥ −η E‖ε_{x^r;y} − ε_{x^r;φ}‖² / E‖ε_{x^g;y} − ε_{x^g;φ}‖²
    real, fake = _norm2(real_y - real_phi).mean(), _norm2(fake_y - fake_phi).mean()
    return torch.where(fake > 0, -eta * real / fake, -math.inf)


def discriminator_loss_text(eps, fake_phi, fake_y, gamma=-1.0):
    """Eq. 10: the discriminator's loss when only a prompt is given, no real samples. -> scalar.

    All [B, C, H, W], without classifier-free guidance. At η = ½, Eq. 9 with the same γ, whatever it
    is, is at most this plus E‖ε_{x^r;y} − ε‖², which has no φ: between the losses, not between
    their gradients, where the paper prints the «≤». γ = 0 is VSD's loss; −1 is the paper's 2D
    setting, −0.5 its 3D one (the released configurations have −0.75). At γ = −1 the loss is
    *affine* in ε_φ: nothing but the learning rate and the number of steps bounds φ.
    """
    # ‖ε_φ − ε‖² + γ ‖ε_y − ε_φ‖²
    gamma = _per_sample(gamma, eps)
    return (_norm2(fake_phi - eps) + gamma * _norm2(fake_y - fake_phi)).mean()


def optimal_eps_phi(eps, fake_y, gamma):
    """The ε_φ that minimises Eq. 10 for γ > −1. With E[ε | x_t] for eps: the optimal discriminator.

    Ours, not in the paper. Eq. 10 is (1 + γ)‖ε_φ‖² plus linear terms: strictly convex for γ > −1,
    affine at γ = −1, concave below, so ValueError for γ ≤ −1: there is no minimiser. Put into
    Eq. 7, it gives 1/(1 + γ) times VSD's bracket at guidance λ_eff = 1 + (1 + γ)(λ − 1): γ < 0
    turns guidance down alone.
    """
    if float(gamma.min() if torch.is_tensor(gamma) else gamma) <= -1:
        raise ValueError(f"Eq. 10 has no minimiser for gamma <= -1 (it is not convex): {gamma}")
    # ε_φ* = (ε + γ ε_y) / (1 + γ)
    gamma = _coefficient(gamma, eps)
    return (eps + gamma * fake_y) / (1 + gamma)


# ω(t) of Eq. 7, by the name the command line uses
OMEGAS = {
    "sigma2": lambda alpha_t, sigma_t: sigma_t ** 2,             # DreamFusion, the peers' default
    "1": lambda alpha_t, sigma_t: torch.ones_like(sigma_t),
    "sigma/alpha": lambda alpha_t, sigma_t: sigma_t / alpha_t,   # ASD's Gaussian-splatting setting
    "sigma*alpha": lambda alpha_t, sigma_t: sigma_t * alpha_t,
    "1/alpha": lambda alpha_t, sigma_t: 1 / alpha_t,             # of flow models: RFDS's weight 1
}


# --------------------------------------------------------------------------- methods and the loop
@dataclass(frozen=True)
class Method:
    """A row of the table: which φ, and the loop's settings. `dataclasses.replace` varies it.

    The defaults were chosen by looking, on tiny-sd; PAPER is for other models. Eq. 10 is affine at
    γ = −1, φ never settles: θ must be slow, or colours run away. θ starts as noise, which only
    small t take away; so they get weight, by ω = 1 and by t < T/2 in the second half.
    """
    phi: Callable = LoRAPhi       # what makes the φ: (prior, prompts, **options) -> φ
    lam: float = 7.5              # λ, guidance of Eq. 7
    gamma: float = -1.0           # γ of Eqs. 9 and 10; 0 is VSD
    eta: float = 0.5              # η of Eq. 9: where there are real samples
    omega: str = "1"              # ω(t), a name of OMEGAS
    t_min: float = 0.02           # θ's t is uniform in [t_min T, t_max T]; φ's in 0 … T−1
    t_max: float = 0.98
    t_max_late: float = 0.5       # the same after t_late of the steps
    t_late: float = 0.5
    lr: float = 0.01              # for θ
    lr_end: float = 1.0           # θ's rate falls along a cosine to this part of lr; 1: stays
    optimizer: str = "adam"       # of θ, a name of OPTIMIZERS
    phi_lr: float = 1e-3          # AdamW for φ, no weight decay
    lam_phi: float = 1.0          # guidance inside φ
    steps: int = 350
    phi_steps: int = 1            # φ's updates per update of θ
    phi_first: bool = False       # φ before θ ("lookahead"): overfits a single particle
    share_noise: bool = False     # Algorithm 1 as printed: θ and φ learn from the same t and ε
    fixed_noise: bool = False     # θ sees one ε throughout, t is still drawn (LMC-SDS's trick)


OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
METHODS = {"sds": Method(phi=NoisePhi), "vsd": Method(gamma=0.0), "asd": Method(gamma=-1.0)}
PAPER = ("§6: ProlificDreamer-2D's, by its README and program", {        # no rates are in the text
    "omega": "sigma2", "t_late": 1.0, "lr": 0.03, "phi_lr": 1e-4, "steps": 500})


generated = lambda x0: x0             # what a Discriminator sees by default: the samples themselves


@dataclass
class Discriminator:
    """D(x_t; y) of Eq. 5: what it asks for, what it is shown, and what its φ learns from.

    cond        y [1 or B, L, C]; gamma, eta: of Eqs. 9 and 10.
    fake, real  x0 of x^g and x^r in Eq. 9; real None: there are none, Eq. 10.
    seen        x0 at which the generator's gradient is taken (editing shows D(x_t; z) the source).
    Each of these three is a tensor [1 or B, C, H, W], or a function of the generator's samples x0.
    """
    phi: nn.Module
    cond: torch.Tensor
    gamma: float = -1.0
    eta: float = 0.5
    fake: torch.Tensor | Callable = generated
    real: torch.Tensor | Callable | None = None
    seen: torch.Tensor | Callable = generated


class State:
    """All that a run consists of: θ, φ, both optimisers, the generator of randomness, the step.

    second: a Discriminator that is subtracted (Eq. 11); its φ shares φ's optimiser. real: x0 [N,
    C, H, W] of real samples. rng is on the CPU: a seed draws the same noise on every device.
    """

    def __init__(self, generator, phi, method, rng, second=None, real=None):
        self.generator, self.phi, self.rng, self.step = generator, phi, rng, 0
        self.second, self.real = second, real
        self.eps = None               # that of the first step, where the method keeps it fixed
        phis = [phi] if second is None else [phi, second.phi]
        phi_parameters = [p for module in phis for p in module.parameters() if p.requires_grad]
        groups = getattr(generator, "parameter_groups", None)         # rates of its own, in 3D
        theta = groups(method.lr) if groups else generator.parameters()
        self.opt_theta = OPTIMIZERS[method.optimizer](theta, method.lr)
        self.rates = [group["lr"] for group in self.opt_theta.param_groups]
        self.opt_phi = torch.optim.AdamW(phi_parameters, method.phi_lr, weight_decay=0.0,
                                         fused=True) if phi_parameters else None


def draw(rng, x0, lowest, highest):
    """t [B] uniform in lowest … highest, and ε like x0, from one generator on the CPU."""
    t = torch.randint(lowest, highest + 1, (len(x0),), generator=rng)
    return t.to(x0.device), torch.randn(x0.shape, generator=rng, dtype=torch.float32).to(x0.device)


class Share:
    """This process's part of a step's n samples, in units of `size` (None: all are one), each of
    which is one call of a network. ranks: of several processes, at most as many as there are units,
    see runs.Ranks."""

    def __init__(self, n, size=None, ranks=None):
        units = torch.arange(n).split(size or (1 if ranks else n))
        self.n, self.count, self.ranks = n, len(units), ranks
        self.units = units[ranks.rank::ranks.size] if ranks else units
        self.rows = torch.cat(self.units)
        self.sizes = [len(unit) for unit in self.units] if self.count > 1 else None

    def draw(self, rng, x0, lowest, highest):
        """draw() for all n samples, here or elsewhere."""
        return draw(rng, x0[:1].expand(self.n, *x0.shape[1:]), lowest, highest)

    def backward(self, losses, optimizer):
        """The gradients of all units' losses, summed. losses: (loss, a number to tell) of each unit
        that is here, made one by one. -> all numbers."""
        optimizer.zero_grad()
        if self.ranks:
            return self.ranks.backward(losses, optimizer, self.count)
        told = []
        for loss, number in losses:
            loss.backward()
            told.append(number.item())
        return told


def in_units(generator, size, ranks):
    """A step's samples: [(x0, y, camera, regulariser)], each with a graph of its own, the Share."""
    apart = hasattr(generator, "parts") and Share(generator.batch, size, ranks)
    outs = generator.parts(apart.units) if apart and apart.count > 1 else [generator()]
    outs = [(*(out if isinstance(out, tuple) else (out, None, None)),
             generator.regulariser() if hasattr(generator, "regulariser") else 0) for out in outs]
    return outs, apart or Share(len(outs[0][0]), size)


def guidance(step, x_t, t, y, null, lam):
    """What Eq. 2 asks: ε_∅, unless λ = 1 cancels it, and ε_y. A φ may have `asks` of its own."""
    return [None if lam == 1 else (x_t, t, null.expand_as(y)), (x_t, t, y)]


@torch.no_grad()
def ask(prior, questions, sizes=None):
    """A list of (x_t, t, cond), each [B, …], or None -> their ε's, or None: one batched call, or
    one for each unit, of so many of the samples."""
    asked = [question for question in questions if question is not None]
    units = zip(*(zip(*(x.split(sizes or len(x)) for x in question)) for question in asked))
    said = [prior.eps(*(torch.cat(each) for each in zip(*unit))).split([len(t) for _, t, _ in unit])
            for unit in units]
    said = iter([torch.cat(parts) for parts in zip(*said)])
    return [None if question is None else next(said) for question in questions]


def predict_phi(phi, x_t, t, y, null, eps, camera=None, lam_phi=1.0, sizes=None, said=()):
    """ε_φ, with guidance λ_φ inside φ (1: none); φ may use what the prior has said at x_t."""
    def of(cond):
        parts = [(x_t, t, cond, eps, camera, *said)]
        if sizes and not getattr(phi, "whole", False):
            parts = zip(*([None] * len(sizes) if x is None else x.split(sizes) for x in parts[0]))
        return torch.cat([phi(*part) for part in parts])
    return of(y) if lam_phi == 1 else cfg_noise(of(null.expand_as(y)), of(y), lam_phi)


@dataclass
class Update:
    """One update of φ: where it looks, x_t^g and x_t^r of one t and ε, and what the prior says."""
    t: torch.Tensor
    eps: torch.Tensor
    camera: torch.Tensor | None
    fake_t: torch.Tensor
    real_t: torch.Tensor | None = None    # None: Eq. 10
    fake_y: torch.Tensor | None = None    # None: γ = 0
    real_y: torch.Tensor | None = None    # None: η = 0


def discriminator_step(state, method, d, u, null, share=None, eps_phi=None):
    """Step 4 of the loop: one Update u of d's φ, with a graph of one unit at a time. -> loss_D.

    eps_phi: φ at x_t^g, with its graph, where the generator's step has computed it.
    """
    y, share = d.cond.expand(len(u.t), -1, -1), share or Share(len(u.t))

    def losses():
        for part in torch.arange(len(y), device=y.device).split(share.sizes or len(y)):
            eps, said = u.eps[part], [eps_phi]
            if eps_phi is None:                     # φ once, at x_t^g and x_t^r
                seen = [x_t[part] for x_t in (u.fake_t, u.real_t) if x_t is not None]
                t, cond, noise, camera = (None if v is None else torch.cat([v[part]] * len(seen))
                                          for v in (u.t, y, u.eps, u.camera))
                said = predict_phi(d.phi, torch.cat(seen), t, cond, null, noise, camera,
                                   method.lam_phi).chunk(len(seen))
            # a prediction of the prior that has no weight is not asked for: φ's own stands for it
            of_y = [phi.detach() if v is None else v[part]
                    for phi, v in zip(said, (u.fake_y, u.real_y))]
            if u.real_t is None:
                loss = discriminator_loss_text(eps, said[0], of_y[0], d.gamma)            # Eq. 10
            else:
                loss = discriminator_loss(eps, said[0], of_y[0], said[1], of_y[1], d.eta, d.gamma)
            loss = loss * len(part) / share.n
            check_finite(loss, "discriminator's loss", state.step)
            yield loss, loss.detach()
    told = share.backward(losses(), state.opt_phi)
    check_gradients(state.opt_phi, "discriminator's gradient", state.step)
    state.opt_phi.step()
    return sum(told)


def check_gradients(optimizer, name, step):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    check_finite(torch.nn.utils.get_total_norm(grads), name, step)


def check_finite(tensor, name, step):
    """A non-finite value ends the run; hidden as zero, it would end as a black picture."""
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(f"the {name} is not finite at step {step}: try a smaller --lr or "
                                 "--phi-lr, or --dtype float32")


def judge(prior, state, method, d, x0, null, noise, camera, share):
    """One step of the loop for the discriminator d: a Python generator, as two may work together.

    x0 [B, C, H, W] detached, noise = (t, ε). It yields its questions to the prior and is sent the
    answers (see ask); then it yields the gradient of Eq. 7, like x0; then, φ updated, loss_D.
    """
    t, eps = noise

    def noised(given, t, eps):
        given = given(x0) if callable(given) else given
        return add_noise(given.expand_as(x0), eps, *prior.alpha_sigma(t))
    x_t, y = noised(d.seen, t, eps), d.cond.expand(len(x0), -1, -1)
    questions = getattr(d.phi, "asks", guidance)(state.step, x_t, t, y, null, method.lam)
    told, for_theta = questions[1][2], len(questions)
    # what φ will learn from, at a draw of its own or at this one: then x_t^g may be x_t itself
    trains = any(p.requires_grad for p in d.phi.parameters())
    again, updates = method.share_noise and d.fake is d.seen, []
    for _ in range(method.phi_steps if trains else 0):
        t_phi, eps_phi = noise if method.share_noise else (
            v[share.rows] for v in share.draw(state.rng, x0, 0, prior.steps - 1))
        seen_from = None if camera is None else camera * (     # one view in ten without its camera
            torch.rand(share.n, 1, generator=state.rng)[share.rows] > 0.1).to(camera)
        u = Update(t_phi, eps_phi, seen_from, x_t if again else noised(d.fake, t_phi, eps_phi),
                   None if d.real is None else noised(d.real, t_phi, eps_phi))
        updates.append(u)
        questions += [None if d.gamma == 0 or again else (u.fake_t, t_phi, y),    # no guidance
                      None if d.eta == 0 or d.real is None else (u.real_t, t_phi, y)]

    answers = yield questions
    eps_uncond, eps_y, *more = answers[:for_theta]
    eps_uncond = eps_y if eps_uncond is None else eps_uncond         # λ = 1: it cancels
    for u, fake_y, u.real_y in zip(updates, answers[for_theta::2], answers[for_theta + 1::2]):
        u.fake_y = eps_y if again and d.gamma != 0 else fake_y

    def learn(eps_phi=None):
        losses = [discriminator_step(state, method, d, u, null, share,
                                     eps_phi if i == 0 else None) for i, u in enumerate(updates)]
        return losses[-1] if losses else 0.0
    if method.phi_first:
        loss_D = learn()
    # ε_φ: with its graph where φ's update uses it again
    keep = trains and again and not method.phi_first and d.real is None and camera is None \
        and share.count == 1
    with torch.set_grad_enabled(keep):
        eps_phi = predict_phi(d.phi, x_t, t, told, null, eps, camera, method.lam_phi, share.sizes,
                              (eps_uncond, eps_y, *more))
    omega = OMEGAS[method.omega](*prior.alpha_sigma(t))
    yield generator_grad(eps_uncond, eps_y, eps_phi.detach(), method.lam, omega)
    yield loss_D if method.phi_first else learn(eps_phi if keep else None)


@torch.inference_mode(False)              # gradients, whatever the caller has switched off
def distill(prior, generator, cond, method="asd", phi=None, second=None, state=None, seed=0,
            micro_batch=None, callback=None, real=None, ranks=None):
    """The loop: optimise the generator's θ until its samples look to the prior like the prompt.

    prior       a Prior.
    generator   an nn.Module; generator() -> x0 [B, C, H, W], or (x0, cond, camera) where what is
                asked for depends on the view (3D): cond [B, L, C], camera [B, 16] for φ.
                generator.regulariser() -> a scalar, of the last samples, that is added to its loss.
                generator.parts([rows, …]) -> the same for these of its `batch` samples, one by one.
                (Both only if it can.)
    cond        [1 or B, L, C] from prior.encode_text.
    method      a Method, or a name in METHODS.
    phi         default: method.phi's, where that needs no prompt (an embedding does).
    second      a Discriminator to subtract (Eq. 11, editing.py); it sees the same t and ε.
    state       to go on with, of the same generator and method, with its own phi, second and real.
    micro_batch samples at a time; below B, φ with shared noise is evaluated once more.
    ranks       several processes that share the samples (no second), with one State: runs.Ranks.
    callback    callback(state, {"loss_G": ‖∇L'_G‖, "loss_D": …, "seconds": …}) after each step.
    real        x0 [N, C, H, W] of real samples, for the image-conditioned case: φ learns by Eq. 9,
                each time from B of them, drawn anew. Default: there are none, Eq. 10.

    Returns the State. UNet evaluations per particle and step, the prior's in one batched call: SDS
    2; with shared noise 3 + 1 backward (4 + 1 with a camera); with fresh noise VSD 4 + 1, ASD
    5 + 1; real samples add 1 + 1, and 1 for η ≠ 0. FloatingPointError if something is not finite.
    """
    method = METHODS[method] if isinstance(method, str) else method
    if state is None:
        phi = phi or make_phi(method, prior, seed=seed)
        state = State(generator, phi, method, torch.Generator().manual_seed(seed), second, real)
    if state.generator is not generator:
        raise ValueError("the state belongs to another generator")
    null = prior.encode_text([""])
    while state.step < method.steps:
        began = time.perf_counter()
        # 1. x0 = g(θ);  x_t = α_t x0 + σ_t ε
        parts, mine = in_units(generator, micro_batch, ranks)
        x0, y, camera = (None if part[0] is None else torch.cat(part).detach()
                         for part in list(zip(*parts))[:3])           # a copy: θ's step is in place
        y = y if y is not None else cond[mine.rows] if len(cond) > 1 else cond
        late = state.step >= method.t_late * method.steps
        highest = min(method.t_max, method.t_max_late) if late else method.t_max
        t, eps = mine.draw(state.rng, x0, *(
            min(round(f * prior.steps), prior.steps - 1) for f in (method.t_min, highest)))
        if method.fixed_noise:
            state.eps = eps = eps if state.eps is None else state.eps.to(eps)
        noise = t[mine.rows], eps[mine.rows]
        # 2. ε_∅, ε_y, ε_φ, and Eq. 7's bracket; Eq. 11 subtracts a second one. All draws of the
        # step come first, so that the prior is asked once for what θ and φ need of it
        first = Discriminator(state.phi, y, method.gamma, method.eta)
        if state.real is not None:
            first.real = lambda x0, mine=mine: state.real.to(x0)[
                torch.randint(len(state.real), (mine.n,), generator=state.rng)[mine.rows]]
        judges = [judge(prior, state, method, d, x0, null, noise, camera, mine)
                  for d in (first, state.second) if d is not None]
        questions = [next(one) for one in judges]
        answers = iter(ask(prior, sum(questions, []), mine.sizes))
        grad, *minus = (one.send([next(answers) for _ in asked])
                        for one, asked in zip(judges, questions))
        grad = grad - minus[0] if minus else grad
        # 3. θ: Eq. 7, sent through x0 by the surrogate ⟨stop(grad), x0⟩ / B
        check_finite(grad, "generator's gradient", state.step)
        said = mine.backward((
            ((part * x).sum() / mine.n + more * len(x) / mine.n, part.norm())
            for part, (x, _, _, more) in zip(grad.split([len(part[0]) for part in parts]), parts)),
            state.opt_theta)
        check_gradients(state.opt_theta, "generator's gradient", state.step)
        fall = (1 + math.cos(math.pi * state.step / method.steps)) / 2
        for group, rate in zip(state.opt_theta.param_groups, state.rates, strict=True):
            group["lr"] = rate * (method.lr_end + (1 - method.lr_end) * fall)
        state.opt_theta.step()
        # 4. φ: Eq. 10 (or 9), with its own draw or this one
        loss_D = sum(next(one) for one in judges)
        state.step += 1
        if callback:
            callback(state, {"loss_G": math.hypot(*said), "loss_D": loss_D,
                             "seconds": time.perf_counter() - began})
    return state


# ----------------------------------------------------------------------------------- command line
PHIS = {"noise": NoisePhi, "lora": LoRAPhi, "embedding": EmbeddingPhi}         # as --phi names them
CHOICES = {"omega": OMEGAS, "optimizer": OPTIMIZERS}


def build(settings, prior, method, rng, folder, anew):
    """A picture for every prompt and particle, from noise or --init, and φ. -> (State, y)"""
    import files
    import runs
    y = prior.encode_text(settings["prompt"]).repeat_interleave(settings["particles"], 0)
    init = real = None                            # of a resumed run the checkpoint has them
    if settings["init"] and anew:
        init = files.read_image(settings["init"], prior.image_size)
    theta = (Pixels if settings["pixels"] else Latents)(prior, len(y), rng, init)
    phi = method.phi(prior, settings["prompt"], **runs.told(settings, method.phi))
    if settings["real"] and anew:
        if len(settings["prompt"]) > 1 or not any(p.requires_grad for p in phi.parameters()):
            raise ValueError("--real is for one --prompt, and a φ that learns from its pictures")
        real = files.encode_folder(prior, settings["real"])
    return State(theta, phi, method, rng, real=real), y


def main(argv=None):
    """`python asd.py --prompt …`: runs.py does the rest."""
    import runs
    return runs.main(runs.Command(
        "asd.py", "Pictures that look, to a frozen diffusion model, like the prompt (ASD).",
        METHODS, PHIS, CHOICES, build, distill, paper=PAPER), argv)


if __name__ == "__main__":
    sys.exit(main())
