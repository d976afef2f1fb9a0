"""Adversarial Score Distillation (ASD, arXiv 2312.00739, CVPR 2024): Eqs. 1–10, the loop, a CLI.

    python asd.py --prompt "a red apple"                      # offline, with the embedded tiny-sd
    python asd.py --prompt "a fox" --method vsd --particles 4
    python asd.py --prompt "a photo of a corgi" --model path/to/stable-diffusion --device cuda

A frozen text-to-image diffusion model becomes a loss. Every method of the family is Eq. 7 with one
choice, the noise prediction ε_φ that stands for the fake samples:

    ∇θ L'_G = E[ ω(t) · ( ε_∅ + λ(ε_y − ε_∅) − ε_φ ) · ∂x0/∂θ ]                               (7)

This file has five parts, in the paper's order: the equations; the methods, each a row of a table;
`algorithm_1`, the paper's loop written out straight, to be read and copied; `distill`, the same
loop made for work; and the command.

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
| ours: φ that lags          | effective_guidance, learnt_share                | test_lag_…        |

Eq. 11, editing, is in editing.py. Checked against the paper's full main text. Its supplement was
not available; Algorithm 1 is read from a figure of the project page. Where the paper leaves
something open, the code says so.

Notation: x_t = α_t x0 + σ_t ε; ε_∅, ε_y, ε_φ are noise predictions at the same x_t without prompt,
with the prompt y, and of the fake-sample model φ. x^g are samples of the generator, x^r real ones.
Shapes: x0, x_t, ε [B, C, H, W], latents; images are RGB in [0, 1]; t [B] long in 0 … T−1; α_t, σ_t
[B, 1, 1, 1]; λ, γ, η floats (in Eqs. 2, 7, 9 and 10 also tensors, shaped like α_t).
‖·‖² is a sum over all but the batch dimension, E the mean over the batch.

Everything up to the command needs torch alone: the equations can be copied out one by one, with the
three helpers above them, and so can this file, if it is given a prior and a φ.
"""
import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple, Protocol

if __name__ == "__main__":     # so that a failed import prints a line, and no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parent))     # python -I and -P omit this folder
    if not Path(__file__).resolve().with_name("cli").is_dir():
        print(f"{Path(__file__).name}: copied out alone it is a library, to be imported: the "
              "command needs all of the clone beside it", file=sys.stderr)
        sys.exit(2)
    import cli.start  # noqa: F401

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters

if Path(__file__).resolve().with_name("phi.py").exists():       # not where it was copied out alone
    from phi import EmbeddingPhi, LoRAPhi
    from prior import Latents, Pixels, Prior, UserError  # noqa: F401
else:
    EmbeddingPhi = LoRAPhi = None


# ------------------------------------------------------------------------ the paper's equations
def _coefficient(c, like):
    """λ, γ, ω, α_t or σ_t, to multiply `like` with: floats as they are, tensors in its dtype.

    ValueError for a tensor [B]: it would broadcast along the width, not along the batch.
    """
    if not torch.is_tensor(c):
        return c
    if c.dim() not in (0, like.dim()):
        raise ValueError(f"a coefficient of {list(like.shape)} is a number, or a tensor "
                         f"{[len(like)] + [1] * (like.dim() - 1)}, not {list(c.shape)}")
    return c.to(like)


def _per_sample(c, like):
    """A coefficient to multiply squared norms [B] with: a tensor becomes [B], or [1]."""
    if not torch.is_tensor(c):
        return c
    return c.to(like).flatten()


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
    the network's Jacobian, and without the constant 2α_t, which the paper drops. With guidance it
    is the gradient of no such loss.
    """
    # ω(t) · ( ε_∅ + λ(ε_y − ε_∅) − ε )
    return generator_grad(eps_uncond, eps_y, eps, lam, omega)


def wgan_objective(real_d, fake_d, grad_norm, tau, p=2):
    """Eq. 4: what a WGAN's critic maximises, and its generator minimises. -> scalar.

    real_d [N], fake_d [M]: the critic D at real and at fake samples; grad_norm [K]: ‖∇D(x̃)‖ at a
    mixture of the two; τ ≥ 0. Of the power ‖·‖^p the paper says "p-norm"; here it is the p-th power
    of the Euclidean norm, which at p = 2 is Eq. 8's penalty.
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

    All [B, C, H, W]. Both differences are scores: ε_y − ε_∅ = −σ_t ∇ log p(y|x_t); and ε_φ − ε_∅ ≈
    −σ_t ∇ log p(φ|x_t) where a diffusion model predicts ε_φ, but not where it is the added noise ε.
    Warns once where λ < 1: Eq. 6 is no upper bound of the generator's loss there.
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
    weight γ. The paper advises η = ½ and γ ∈ [−1, 0). Eq. 8's τ ≥ 0 times the shares of a mixture
    of real and fake samples never gives a weight below 0: γ < 0 leaves Eq. 8, and the paper asks
    instead that the sum of both terms be positive (gamma_lower_bound).
    In ε_{x^r;φ} the curvature is η − 1: for η < 1 the loss is concave there, with its *maximum* at
    (ε − η ε_y)/(1 − η), and has no minimum, also at η = ½; what bounds φ is its low rank, its
    shared weights, the rate and the steps.
    """
    # ‖ε_{x^g;φ} − ε‖² − ‖ε_{x^r;φ} − ε‖² + η ‖ε_{x^r;y} − ε_{x^r;φ}‖² + γ ‖ε_{x^g;y} − ε_{x^g;φ}‖²
    eta, gamma = _per_sample(eta, eps), _per_sample(gamma, eps)
    critic = _norm2(fake_phi - eps) - _norm2(real_phi - eps)
    penalty = eta * _norm2(real_y - real_phi) + gamma * _norm2(fake_y - fake_phi)
    return (critic + penalty).mean()


def gamma_lower_bound(fake_phi, fake_y, real_phi, real_y, eta=0.5):
    """The condition under Eq. 9: the least γ for which its penalty is not negative. -> 0-d.

    A ratio of means over the batch (the paper prints no E here), as the penalty is a mean. At η = ½
    γ = −1 is allowed where ‖ε_y − ε_φ‖² is at least twice as large at real as at fake samples. −inf
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
    their gradients, where the paper prints the «≤». Its two steps, at real samples: the triangle
    ‖ε_y − ε_φ‖ ≤ ‖ε_y − ε‖ + ‖ε_φ − ε‖, and Cauchy–Schwarz (a + b)² ≤ 2a² + 2b², so that
    ½‖ε_y − ε_φ‖² ≤ ‖ε_y − ε‖² + ‖ε_φ − ε‖², of which the last term is the critic's.
    §5 reads γ so: 0 is VSD's loss; γ < 0 weakens the penalty and strengthens the discriminator;
    γ ≫ 0 leaves the classifier term alone. −1 is the paper's 2D setting, −0.5 its 3D one (the
    released configurations have −0.75). At γ = −1 the loss is *affine* in ε_φ: nothing but the
    learning rate and the number of steps bounds φ.
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
    if not float(gamma.min() if torch.is_tensor(gamma) else gamma) > -1:
        raise ValueError(f"Eq. 10 has no minimiser for gamma <= -1 (it is not convex): {gamma}")
    # ε_φ* = (ε + γ ε_y) / (1 + γ)
    gamma = _coefficient(gamma, eps)
    return (eps + gamma * fake_y) / (1 + gamma)


def effective_guidance(lam, gamma, kappa=1.0):
    """The guidance λ' that Eq. 7 has in effect, where φ has learnt the share κ. Ours.

    With ε_φ = ε_y + κ (ε − ε_y)/(1 + γ), Eq. 7's bracket is κ/(1 + γ) times that of SDS at λ' (of
    VSD, with ε_g in place of ε). κ = 1 is λ_eff of optimal_eps_phi; a φ that lags, κ < 1, raises
    the guidance, γ < 0 lowers it. ValueError for γ ≤ −1 or κ ≤ 0.
    """
    if not (gamma > -1 and kappa > 0):
        raise ValueError(f"needs gamma > -1 and kappa > 0, not {gamma} and {kappa}")
    # λ' = 1 + (1 + γ)(λ − 1)/κ
    return 1 + (1 + gamma) * (lam - 1) / kappa


def learnt_share(eps, fake_phi, fake_y, gamma):
    """κ: how far φ has come from ε_y, where it starts, to the minimiser of Eq. 10. -> [B]. Ours.

    All [B, C, H, W], at the same x_t. Exact for a lone particle, whose ε_g = E[ε | x_t] is ε;
    for several an estimate. ValueError for γ ≤ −1, where there is no minimiser.
    """
    if gamma <= -1:
        raise ValueError(f"Eq. 10 has no minimiser for gamma <= -1: {gamma}")
    # κ = (1 + γ) ⟨ε_φ − ε_y, ε − ε_y⟩ / ‖ε − ε_y‖²
    way = eps - fake_y
    norm2 = _norm2(way)
    along = ((fake_phi - fake_y) * way).flatten(1).sum(1, dtype=norm2.dtype)
    return (1 + gamma) * along / norm2


def perp_neg(eps_uncond, eps_y, eps_others, weights):
    """Perp-Neg (arXiv 2304.04968): what stands for ε_y in Eq. 2, with prompts as negatives.

    eps_others: K predictions under other prompts, like eps_y; weights [B, K], at most 0. Only the
    part of a negative that is perpendicular to y counts: a picture can be less of a front view
    without being less of a mug. Each sample is projected as one vector. -> like eps_y.
    """
    delta_y = eps_y - eps_uncond
    norm2 = _norm2(delta_y).clamp(min=1e-30)
    shifted = eps_y
    for eps_i, w_i in zip(eps_others, weights.unbind(1), strict=True):
        delta_i = eps_i - eps_uncond
        # δ_i^⊥ = δ_i − (⟨δ_i, δ_y⟩ / ‖δ_y‖²) δ_y,   δ = ε − ε_∅
        along = (delta_i * delta_y).flatten(1).sum(1, dtype=norm2.dtype) / norm2
        delta_perp = delta_i - along.view(-1, 1, 1, 1).to(delta_y) * delta_y
        # ε_∅ + δ_y + Σ_i w_i δ_i^⊥
        shifted = shifted + w_i.view(-1, 1, 1, 1).to(delta_y) * delta_perp
    return shifted


# ω(t) of Eq. 7, by the name the command line uses
OMEGAS = {
    "sigma2": lambda alpha_t, sigma_t: sigma_t ** 2,             # DreamFusion, the peers' default
    "1": lambda alpha_t, sigma_t: torch.ones_like(sigma_t),
    "sigma/alpha": lambda alpha_t, sigma_t: sigma_t / alpha_t,   # ASD's Gaussian-splatting setting
    "sigma*alpha": lambda alpha_t, sigma_t: sigma_t * alpha_t,
    "1/alpha": lambda alpha_t, sigma_t: 1 / alpha_t,             # of flow models: RFDS's weight 1
    "1+sigma/alpha": lambda alpha_t, sigma_t: 1 + sigma_t / alpha_t,    # the same, of any model
}


# ------------------------------------------------------------------------------------ the methods
class NoisePhi(nn.Module):
    """SDS: ε_φ = ε, the added noise itself. Nothing to train, no network to evaluate."""

    def __init__(self, prior=None, prompts=None):
        super().__init__()

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        return eps

    def save(self, folder):
        """Keep nothing."""


@dataclass(frozen=True)
class Method:
    """A row of the table: which φ, and the loop's settings. `dataclasses.replace` varies it.

    The defaults were chosen by looking, on tiny-sd; METHODS has tuned rates, PAPER what other
    models take. Eq. 10 is affine at γ = −1, so φ never settles, and with a large lr for θ colours
    run away. θ starts as noise, which only small t remove. So small t get more weight than by the
    usual ω = σ², and t < T/2 in the second half of the steps.
    """
    phi: Callable = LoRAPhi       # what makes the φ: (prior, prompts, **options) -> φ
    lam: float = 7.5              # λ, guidance of Eq. 7
    gamma: float = -1.0           # γ of Eqs. 9 and 10; 0 is VSD
    eta: float = 0.5              # η of Eq. 9: where there are real samples
    omega: str = "1"              # ω(t), a name of OMEGAS
    t_min: float = 0.02           # θ's t is uniform in [t_min T, t_max T]
    t_max: float = 0.98
    t_max_late: float = 0.5       # t_max from step t_late · steps on
    t_late: float = 0.5
    lr: float = 0.01              # for θ
    lr_end: float = 1.0           # θ's rate falls along a cosine to this part of lr; 1: it stays,
    #                               as it does where t falls, "descending"
    optimizer: str = "adam"       # of θ, a name of OPTIMIZERS
    phi_lr: float = 1e-3          # AdamW for φ, no weight decay
    beta2: float = 0.999          # of Adam, for θ and φ
    adam_eps: float = 1e-8        # of Adam, for θ and φ
    lam_phi: float = 1.0          # guidance inside φ, also in Eqs. 9, 10: a peer's, not the paper's
    steps: int = 350
    phi_steps: int = 1            # φ's updates per update of θ
    share_noise: bool = False     # Algorithm 1 as printed: θ and φ learn from the same t and ε
    fixed_noise: bool = False     # each sample keeps its first ε, only t is drawn (LMC-SDS's trick)
    t_order: str = "random"       # "descending": t falls evenly from t_max T to t_min T (FlowEdit)
    shift: float = 0.0            # of an edit: s of FlowEdit and DVRF, see editing.py
    shift_grows: bool = False     # s grows from 0 to that

    def __post_init__(self):
        """ValueError for an unknown name, a number out of its range, and another type."""
        for name, known in (("omega", OMEGAS), ("optimizer", OPTIMIZERS), ("t_order", T_ORDERS)):
            if getattr(self, name) not in list(known):      # a list: the name may be unhashable
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of "
                                 f"{', '.join(known)}")
        for field in fields(self):
            name, value, kind = field.name, getattr(self, field.name), field.type
            if kind in TYPES and not isinstance(value, TYPES[kind]):
                raise ValueError(f"{name} is of type {kind.__name__}, not {value!r}")
            if kind in (int, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
            if name in NOT_NEGATIVE and value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
            if name.startswith("t_") and kind is float and not 0 <= value <= 1:
                raise ValueError(f"{name} is a part of T or of the steps, not {value}")
        if self.phi is not None and not callable(self.phi):
            raise ValueError(f"phi is what makes the φ, such as LoRAPhi, not {self.phi!r}")
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} is above t_max {self.t_max}")
        late = self.t_late < 1 and self.t_order == "random"
        if late and self.t_min > self.t_max_late:
            raise ValueError(f"t_min {self.t_min} is above t_max_late {self.t_max_late}")


T_ORDERS = ("random", "descending")
TYPES = {int: Integral, float: Real, bool: bool, str: str}                    # of a row's values
NOT_NEGATIVE = ("steps", "phi_steps", "eta", "lr_end")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# rates as tuned for tiny-sd on ten prompts, alike for all three (claims/tuned.json)
METHODS = {"sds": Method(phi=NoisePhi, lr=0.02, lr_end=0.3),
           "vsd": Method(gamma=0.0, lr=0.04, lr_end=1.0, phi_lr=3e-3),
           "asd": Method(gamma=-1.0, lr=0.02, lr_end=0.3, phi_lr=3e-3)}
# what other models than tiny-sd take, {method: (its source, settings)}; the text names no rates
PAPER = dict.fromkeys(METHODS, ("§6: ProlificDreamer-2D's, by its README and program", {
    "omega": "sigma2", "t_late": 1.0, "lr": 0.03, "lr_end": 1.0, "phi_lr": 1e-4, "steps": 500}))


ELSEWHERE = "; variants.py has csd, nfsd, bridge, lmc, and editing.py dds, flowedit, dvrf"


def find_method(method):
    """A row, or a name of METHODS -> the row. ValueError for another name."""
    if isinstance(method, Method):
        return method
    if method not in list(METHODS):         # a list: the name may be unhashable
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}, or hand "
                         f"over a Method{ELSEWHERE}")
    return METHODS[method]


def make_phi(method, prior, prompts=None, seed=0, **options):
    """method.phi(prior, prompts, …), with what it takes of the run: the seed, λ, γ, the steps.

    prompts: one, or a list of all that the run can ask; None where φ needs none. options: the φ's
    own; TypeError for one that it lacks.
    """
    if method.phi is None:
        raise ValueError("no phi.py lies beside this asd.py: hand over a φ, phi=…")
    given = {"seed": seed, "lam": method.lam, "gamma": method.gamma, "steps": method.steps}
    accepted = inspect.signature(method.phi).parameters
    given = {name: value for name, value in given.items() if name in accepted}
    return method.phi(prior, prompts, **given | options)


# ------------------------------------------------------ what algorithm_1 and distill have in common
class DiffusionModel(Protocol):
    """All that the loop asks of a prior. prior.py's Prior is one; any object like this will do."""
    steps: int                                                       # T

    def alpha_sigma(self, t): ...        # t [B] -> α_t, σ_t [B, 1, 1, 1]
    def eps(self, x_t, t, cond): ...     # ε(x_t; y, t), like x_t
    def encode_text(self, prompts): ...  # B strings -> cond [B, L, C]; "" is the null prompt ∅


def check_inputs(prior, cond, rng):
    """ValueError for what is no DiffusionModel, no prompt's embedding, or no torch.Generator."""
    for name in ("steps", "alpha_sigma", "eps", "encode_text"):
        if not hasattr(prior, name):
            raise ValueError(f"{prior!r} has no {name}: a prior is Prior.from_pretrained(…), or "
                             "another DiffusionModel")
    if not torch.is_tensor(cond) or cond.dim() != 3:
        raise ValueError("cond is prompt embeddings [1 or B, L, C], from prior.encode_text([…])")
    check_rng(rng)


def check_rng(rng):
    """ValueError for what is no torch.Generator of the CPU."""
    if not (isinstance(rng, torch.Generator) and rng.device.type == "cpu"):
        raise ValueError(f"rng is a torch.Generator on the CPU, not {rng!r}")


def check_seed(seed):
    """ValueError for what seeds no torch.Generator."""
    if not (isinstance(seed, Integral) and abs(seed) < 2 ** 63):
        raise ValueError(f"seed is a whole number below 2^63, not {seed!r}")


def check_modules(generator, phi):
    """ValueError where one of them is no nn.Module."""
    for name, module in (("generator", generator), ("phi", phi)):
        if not isinstance(module, nn.Module):
            raise ValueError(f"{name} is an nn.Module, not {module!r}")


def check_real(real, phi):
    """ValueError for real samples that are none, or that nobody learns from."""
    if real is None:
        return
    if not any(p.requires_grad for p in phi.parameters()):
        raise ValueError(f"real samples teach φ (Eq. 9), but {type(phi).__name__} has nothing to "
                         "learn: drop real")
    if not (torch.is_tensor(real) and len(real)):
        raise ValueError("real is a tensor of real samples [N, C, H, W], at least one")


def check_plain(prior, generator, cond, phi, method, rng, real):
    """-> the row of the method. ValueError for what `algorithm_1` cannot use, or would not heed."""
    check_inputs(prior, cond, rng)
    check_modules(generator, phi)
    method = find_method(method)
    if hasattr(generator, "regulariser") or hasattr(generator, "parameter_groups"):
        raise ValueError("a generator's regulariser and parameter_groups are heeded by distill "
                         "alone")
    if hasattr(phi, "prompts") or hasattr(phi, "whole"):
        raise ValueError(f"{type(phi).__name__} asks the prior for more than ∅ and y, or compares "
                         "samples: that is heeded by distill alone")
    if method.lam_phi != 1 or method.fixed_noise or method.t_order != "random" or method.shift:
        raise ValueError("lam_phi, fixed_noise, t_order and shift are heeded by distill alone")
    check_real(real, phi)
    return method


def check_x0(x0, real=None):
    """-> x0, as it is. ValueError where a generator cannot have made it, or real does not fit."""
    if not torch.is_tensor(x0) or x0.dim() != 4 or len(x0) == 0:
        found = list(x0.shape) if torch.is_tensor(x0) else f"a {type(x0).__name__}"
        raise ValueError(f"a generator's x0 is [B, C, H, W], not {found}")
    if not x0.requires_grad:
        raise ValueError("a generator's x0 must depend on its parameters: this one has no gradient")
    if real is not None and real.shape[1:] != x0.shape[1:]:
        raise ValueError(f"real is {list(real.shape)}, the generator's x0 {list(x0.shape)}: real "
                         "samples are latents, too")
    return x0


def null_prompt(prior, cond):
    """-> ∅ [1, L, C]. ValueError where another prior has encoded cond."""
    null = prior.encode_text([""])
    if cond.shape[1:] != null.shape[1:]:
        raise ValueError(f"cond's prompts are {list(cond.shape[1:])}, those of this prior "
                         f"{list(null.shape[1:])}: another prior has encoded them")
    return null


def one_each(cond, n, kind="prompts"):
    """cond [1 or n, L, C] -> a copy [n, L, C]. ValueError for another number of prompts.

    A copy, as φ cannot learn from a tensor that was made in torch.inference_mode.
    """
    if len(cond) not in (1, n):
        raise ValueError(f"{len(cond)} {kind} for {n} samples: give one, or one for each")
    return cond.expand(n, -1, -1).clone()


def draw_noise(rng, x0, lowest, highest):
    """t [B] uniform in lowest … highest, and ε like x0, drawn on the CPU from a torch.Generator."""
    t = torch.randint(lowest, highest + 1, (len(x0),), generator=rng, device="cpu")
    eps = torch.randn(x0.shape, generator=rng, dtype=torch.float32, device="cpu")
    return t.to(x0.device), eps.to(x0)


def range_of_t(method, step, T):
    """The least and the largest t for θ at this step, both included."""
    late = step >= method.t_late * method.steps and method.t_order == "random"
    t_max = min(method.t_max, method.t_max_late) if late else method.t_max
    return min(round(method.t_min * T), T - 1), min(round(t_max * T), T - 1)


def rate_factor(method, step):
    """The part of θ's learning rate that is left at this step: 1, falling to lr_end."""
    fall = (1 + math.cos(math.pi * step / method.steps)) / 2
    return method.lr_end + (1 - method.lr_end) * fall


def descending_t(method, step, T):
    """t at a step of a run whose noise falls evenly, from t_max T to t_min T.

    t counts from 0: −1 is no noise at all, where a run with t_min = 0 ends.
    """
    return round(T * (method.t_max - (method.t_max - method.t_min) * step / method.steps)) - 1


def flow_time(prior, t, device="cpu"):
    """τ = σ/(α + σ) at t: x_t/(α + σ) = (1 − τ) x0 + τ ε, so any prior is a flow model in τ."""
    if t < 0:
        return 0.0
    alpha_t, sigma_t = prior.alpha_sigma(torch.tensor([t], device=device))
    return (sigma_t / (alpha_t + sigma_t)).item()


def theta_optimizer(parameters, method):
    """The optimiser of θ: parameters or groups of them, as torch.optim takes them."""
    if method.optimizer == "sgd":
        return torch.optim.SGD(parameters, method.lr)
    return OPTIMIZERS[method.optimizer](parameters, method.lr, betas=(0.9, method.beta2),
                                        eps=method.adam_eps)


def phi_optimizer(parameters, method):
    """AdamW without weight decay, for φ; None where φ has nothing to train."""
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return None
    # fused: one kernel for a LoRA's hundred small tensors, a fifth of the time
    return torch.optim.AdamW(parameters, method.phi_lr, betas=(0.9, method.beta2),
                             eps=method.adam_eps, weight_decay=0.0, fused=True)


# ------------------------------------------------------------------------------------ Algorithm 1
@torch.inference_mode(False)     # gradients, also where the caller is in no_grad or inference_mode
def algorithm_1(prior, generator, cond, phi, method, rng, real=None, callback=None):
    """The paper's Algorithm 1, straight, for sds, vsd, asd; as printed with share_noise=True.

    prior: a DiffusionModel. generator() -> x0 [B, C, H, W], θ are its parameters. cond [1 or B, L,
    C]: y. phi(x_t, t, cond, ε) -> ε_φ. method: a Method, or its name. rng: a torch.Generator on the
    CPU. real: x0 [N, C, H, W], for Eq. 9. callback(step, loss_D), after each step.

    `distill` does the same, in every bit where the composition of a batch makes none. Only there:
    the second discriminator of Eq. 11, cameras, generators with rates or regularisers of their
    own, micro-batches, processes, and the rows' lam_phi, fixed_noise, t_order and shift.
    """
    method = check_plain(prior, generator, cond, phi, method, rng, real)
    theta_opt = theta_optimizer(generator.parameters(), method)
    phi_opt = phi_optimizer(phi.parameters(), method)
    null = null_prompt(prior, cond)
    for step in range(method.steps):
        # x0 = g(θ);  x_t = α_t x0 + σ_t ε
        x0 = check_x0(generator(), real)
        fake = x0.detach().clone()                  # φ learns from x0 as it is before θ's step
        y, uncond = one_each(cond, len(x0)), one_each(null, len(x0))
        t, eps = draw_noise(rng, x0, *range_of_t(method, step, prior.steps))
        x_t = add_noise(fake, eps, *prior.alpha_sigma(t))
        # ε_∅ and ε_y of the frozen model, ε_φ of φ, all at the same x_t
        with torch.no_grad():
            eps_uncond, eps_y = prior.eps(x_t, t, uncond), prior.eps(x_t, t, y)
        eps_phi = phi(x_t, t, y, eps)
        check_prediction(eps_phi, x_t, "φ")
        # θ: Eq. 7, sent through x0 by ⟨stop(grad), x0⟩ / B, whose derivative by x0 is grad / B
        omega = OMEGAS[method.omega](*prior.alpha_sigma(t))
        grad = generator_grad(eps_uncond, eps_y, eps_phi.detach(), method.lam, omega)
        theta_opt.zero_grad()
        ((grad * x0).sum() / len(x0)).backward()
        theta_opt.param_groups[0]["lr"] = method.lr * rate_factor(method, step)
        theta_opt.step()
        # φ: Eq. 10, or Eq. 9, by default at a t and ε of its own, from the whole range
        loss_D = torch.zeros(())
        for update in range(method.phi_steps if phi_opt else 0):
            if not method.share_noise:
                t, eps = draw_noise(rng, x0, 0, prior.steps - 1)
                x_t = add_noise(fake, eps, *prior.alpha_sigma(t))
                with torch.no_grad():
                    eps_y = prior.eps(x_t, t, y)
            if real is None:
                if update or not method.share_noise:
                    eps_phi = phi(x_t, t, y, eps)
                loss_D = discriminator_loss_text(eps, eps_phi, eps_y, method.gamma)
            else:
                rows = torch.randint(len(real), (len(x0),), generator=rng, device="cpu")
                real_t = add_noise(real[rows].to(x0), eps, *prior.alpha_sigma(t))
                with torch.no_grad():
                    real_y = prior.eps(real_t, t, y)
                both = torch.cat([x_t, real_t])     # φ at x_t^g and at x_t^r, in one call
                both = phi(both, t.repeat(2), y.repeat(2, 1, 1), eps.repeat(2, 1, 1, 1))
                loss_D = discriminator_loss(eps, both[:len(x0)], eps_y, both[len(x0):], real_y,
                                            method.eta, method.gamma)
            phi_opt.zero_grad()
            loss_D.backward()
            phi_opt.step()
        if callback:
            callback(step, loss_D.item())


# --------------------------------------------------------------- distill: Algorithm 1 made for work
class Samples(NamedTuple):
    """What a generator returns where x0 alone does not say enough."""
    x0: torch.Tensor                            # [B, C, H, W]
    cond: torch.Tensor | None = None            # y of each sample [B, L, C]; in 3D with the view
    camera: torch.Tensor | None = None          # [B, 16], for φ
    source: torch.Tensor | None = None          # x0 of the source pictures of an edit (Eq. 11)
    source_cond: torch.Tensor | None = None     # z of each sample [B, L, C]
    others: torch.Tensor | None = None          # Perp-Neg: K other prompts of each [B, K, L, C]
    other_weights: torch.Tensor | None = None   # … and their weights [B, K]


class Draw(NamedTuple):
    """What is random where a discriminator looks at B noised samples."""
    t: torch.Tensor                             # [B]
    eps: torch.Tensor                           # [B, C, H, W]
    camera: torch.Tensor | None = None          # [B, 16]; where φ learns, one in ten is hidden
    real: torch.Tensor | None = None            # x0 of the real samples drawn for Eq. 9


@dataclass
class Discriminator:
    """D(x_t; y) of Eq. 5: the prompt, its φ, and which pictures it is shown.

    at, fake and real say which: "generated" are the generator's samples, "source" the source
    pictures of an edit, "real" the run's real samples, some drawn for each update of φ.
    """
    phi: nn.Module
    cond: torch.Tensor              # y [1 or B, L, C]
    gamma: float = -1.0             # of Eqs. 9 and 10
    eta: float = 0.5
    lam: float | None = None        # λ of its half of Eq. 11; None: the method's
    at: str = "generated"           # what is noised for Eq. 7; not "real"
    fake: str = "generated"         # x^g, from which φ learns
    real: str | None = None         # x^r of Eq. 9; None: there are none, Eq. 10

    def __post_init__(self):
        """ValueError for pictures that there are none of, for text in place of cond, and the like.
        """
        if not isinstance(self.phi, nn.Module):
            raise ValueError(f"phi is an nn.Module, not {self.phi!r}")
        for name in ("gamma", "eta", "lam"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (name == "lam" and value is None):
                raise ValueError(f"{name} is a number, not {value!r}")
        if not torch.is_tensor(self.cond) or self.cond.dim() != 3:
            raise ValueError("cond is prompt embeddings [1 or B, L, C], from "
                             f"prior.encode_text([…]), not {self.cond!r}")
        for which in (self.at, self.fake, self.real):
            if which not in ("generated", "source", "real", None):
                raise ValueError(f"unknown pictures {which!r}: choose generated, source or real")


class State:
    """All that a run consists of: θ, φ, both optimisers, the generator of randomness, the step.

    second: a Discriminator that is subtracted (Eq. 11); its φ shares φ's optimiser. real: x0 [N,
    C, H, W] of real samples. method: the row whose φ and optimisers these are, or its name. rng is
    on the CPU: a seed draws the same noise on every device.
    """

    def __init__(self, generator, phi, method, rng, second=None, real=None):
        self.generator, self.phi, self.rng, self.step = generator, phi, rng, 0
        check_modules(generator, phi)
        check_real(real, phi)
        check_rng(rng)
        if not isinstance(second, (Discriminator, type(None))):
            raise ValueError(f"second is a Discriminator, not {second!r}")
        method = find_method(method)
        self.second, self.real, self.method = second, real, method
        self.eps = None               # that of the first step, where the method keeps it fixed
        theta = generator.parameters()
        if hasattr(generator, "parameter_groups"):                    # with rates of their own
            theta = generator.parameter_groups(method.lr)
        self.opt_theta = theta_optimizer(theta, method)
        self.rates = [group["lr"] for group in self.opt_theta.param_groups]
        phis = [phi] if second is None else [phi, second.phi]
        # one optimiser for both φ, used for one at a time: what has no gradient makes no step
        self.opt_phi = phi_optimizer([p for module in phis for p in module.parameters()], method)

    def check(self, generator, method):
        """ValueError where a run of this generator and method cannot go on from here."""
        if self.generator is not generator:
            raise ValueError("the state belongs to another generator")
        # λ, γ, the steps and the like may change
        if (self.method.phi, self.method.optimizer) != (method.phi, method.optimizer):
            raise ValueError("the state belongs to another method: its φ and its optimisers stay")


class Step(NamedTuple):
    """What all discriminators and micro-batches of a step have in common."""
    prior: DiffusionModel
    method: Method
    number: int
    null: torch.Tensor                          # ∅ [1, L, C]
    n: int                                      # samples, of all processes together


class Branch:
    """A discriminator at a micro-batch of a step. Call questions(), which the prior is to answer,
    then gradient(answers), then phi_loss(i) for each update of φ.

    phi_draws: the Draws of φ's updates. part: which of the samples are in the micro-batch.
    """

    def __init__(self, step, discriminator, samples, draw, phi_draws, part):
        method = step.method
        self.step, self.discriminator, self.phi = step, discriminator, discriminator.phi
        self.samples, self.draw = take(samples, part), take(draw, part)
        self.phi_draws = [take(phi_draw, part) for phi_draw in phi_draws]
        self.lam = method.lam if discriminator.lam is None else discriminator.lam
        self.y = discriminator.cond.expand(len(samples.x0), -1, -1)[part]
        self.null = step.null.expand_as(self.y)
        if method.shift and discriminator.at == "generated":
            # FlowEdit, DVRF: the edit's noise is ε + s(x0 − x0_src), also as its ε_φ: Eq. 11 is
            # then ε_y − ε_z − s(x0 − x0_src)
            s = method.shift * (step.number / method.steps if method.shift_grows else 1)
            moved = self.samples.x0 - self.samples.source
            self.draw = self.draw._replace(eps=self.draw.eps + s * moved)
        self.x_t = self.noised(discriminator.at, self.draw)
        # at the same t and ε of the same pictures θ and φ share x_t, and so ε_y …
        self.shares_x_t = (method.share_noise and discriminator.fake == discriminator.at
                           and not method.shift)
        # … and they share ε_φ, if besides
        self.shares_eps_phi = (
            self.shares_x_t and len(phi_draws) > 0      # φ learns,
            and samples.camera is None                  # with no camera hidden from it,
            and discriminator.real is None              # by Eq. 10, at generated samples alone,
            and len(part) == len(samples.x0))           # and only one graph has to be kept
        self.prompt = self.answers = self.eps_phi = None    # set by questions() and gradient()
        # fake_phi, fake_y, real_phi, real_y of φ's last update, if that was by Eq. 9
        self.predictions = None

    def noised(self, which, draw):
        """x_t of the pictures that the Discriminator names."""
        x0 = {"generated": self.samples.x0, "source": self.samples.source, "real": draw.real}[which]
        if x0 is None:
            raise ValueError(f"a Discriminator is shown {which} pictures, and there are none")
        return add_noise(x0, draw.eps, *self.step.prior.alpha_sigma(draw.t))

    def questions(self):
        """What the prior is asked at these samples: {name: (x_t, t, cond)}."""
        d, others, prompts = self.discriminator, self.samples.others, {}
        if self.lam != 1 or others is not None:         # at λ = 1 ε_∅ cancels in Eq. 2
            prompts["uncond"] = self.null
        prompts["y"] = self.y
        if others is not None:
            for i, cond in enumerate(others.unbind(1)):
                prompts[f"other {i}"] = cond
        if hasattr(self.phi, "prompts"):                # such as a negative prompt
            prompts |= self.phi.prompts(self.step.number, self.y, self.null)
        self.prompt = prompts["y"]
        questions = {name: (self.x_t, self.draw.t, cond) for name, cond in prompts.items()}
        # ε_y of Eqs. 9 and 10, without guidance; not where its weight is 0
        for i, phi_draw in enumerate(self.phi_draws):
            if d.gamma != 0 and not self.shares_x_t:
                questions[f"fake_y {i}"] = (self.noised(d.fake, phi_draw), phi_draw.t, self.y)
            if d.eta != 0 and d.real is not None:
                questions[f"real_y {i}"] = (self.noised(d.real, phi_draw), phi_draw.t, self.y)
        return questions

    def gradient(self, answers):
        """Eq. 7 of these samples, from the prior's answers {name: ε}."""
        self.answers = answers
        t, eps, eps_y = self.draw.t, self.draw.eps, answers["y"]
        with torch.set_grad_enabled(self.shares_eps_phi):
            self.eps_phi = self.predict_phi(self.x_t, t, self.prompt, eps, self.draw.camera,
                                            answers)
        omega = OMEGAS[self.step.method.omega](*self.step.prior.alpha_sigma(t))
        eps_uncond = answers.get("uncond", eps_y)       # at λ = 1 any will do
        if self.samples.others is not None:
            eps_others = [answers[f"other {i}"] for i in range(self.samples.others.shape[1])]
            eps_y = perp_neg(eps_uncond, eps_y, eps_others, self.samples.other_weights)
        return generator_grad(eps_uncond, eps_y, self.eps_phi.detach(), self.lam, omega)

    def predict_phi(self, x_t, t, cond, eps, camera, answers=None):
        """ε_φ, with guidance λ_φ inside φ (1: none)."""
        lam_phi = self.step.method.lam_phi
        eps_phi = self.phi(x_t, t, cond, eps, camera, answers)
        check_prediction(eps_phi, x_t, "φ")
        if lam_phi == 1:
            return eps_phi
        null = self.null[:1].expand_as(cond)
        return cfg_noise(self.phi(x_t, t, null, eps, camera, answers), eps_phi, lam_phi)

    def phi_loss(self, i):
        """Eq. 10, or 9, of φ's update number i, at these samples."""
        d, y, phi_draw = self.discriminator, self.y, self.phi_draws[i]
        t, eps, camera, _ = phi_draw
        if d.real is None:
            fake_phi = self.eps_phi
            if i > 0 or not self.shares_eps_phi:
                fake_phi = self.predict_phi(self.noised(d.fake, phi_draw), t, y, eps, camera)
            return discriminator_loss_text(eps, fake_phi, self.fake_y(i, fake_phi), d.gamma)
        x_t = torch.cat([self.noised(d.fake, phi_draw), self.noised(d.real, phi_draw)])
        camera = None if camera is None else camera.repeat(2, 1)
        fake_phi, real_phi = self.predict_phi(
            x_t, t.repeat(2), y.repeat(2, 1, 1), eps.repeat(2, 1, 1, 1), camera).chunk(2)
        fake_y = self.fake_y(i, fake_phi)
        real_y = self.answers.get(f"real_y {i}", real_phi.detach())
        self.predictions = fake_phi.detach(), fake_y, real_phi.detach(), real_y
        return discriminator_loss(eps, fake_phi, fake_y, real_phi, real_y, d.eta, d.gamma)

    def fake_y(self, i, fake_phi):
        """ε_y at x_t^g of update i; at γ = 0 it was not asked for, and φ's own stands in for it."""
        if self.discriminator.gamma == 0:
            return fake_phi.detach()
        return self.answers["y" if self.shares_x_t else f"fake_y {i}"]


def phi_metrics(branches):
    """Numbers of a φ for the log: its learnt share, at θ's noise; the bound under Eq. 9.

    branches: those of its micro-batches, in this process.
    """
    numbers, d = {}, branches[0].discriminator
    if branches[0].phi_draws and d.gamma > -1:
        shares = [learnt_share(branch.draw.eps, branch.eps_phi.detach(), branch.answers["y"],
                               d.gamma) for branch in branches]
        numbers["kappa"] = torch.cat(shares).mean().item()
    if branches[0].predictions is not None:
        columns = zip(*[branch.predictions for branch in branches])
        fake_phi, fake_y, real_phi, real_y = (torch.cat(parts) for parts in columns)
        bound = gamma_lower_bound(fake_phi, fake_y, real_phi, real_y, d.eta).item()
        if math.isfinite(bound):
            numbers["gamma_bound"] = bound
        if d.gamma < bound:
            warnings.warn("γ is below the bound under Eq. 9 (gamma_bound in metrics.jsonl): "
                          "the penalty is negative", stacklevel=2)
    return numbers


def check_prediction(eps, x_t, who):
    """ValueError for another shape than x_t's, which might be broadcast without an error."""
    if getattr(eps, "shape", None) != x_t.shape:
        shape = list(eps.shape) if torch.is_tensor(eps) else f"a {type(eps).__name__}"
        raise ValueError(f"{who} predicts {shape} at x_t {list(x_t.shape)}: they must agree")


def take(record, rows):
    """The same rows of all tensors of Samples or a Draw."""
    return type(record)(*(None if tensor is None else tensor[rows] for tensor in record))


@torch.no_grad()
def ask(prior, questions, micro_batch=None):
    """Ask the prior, in one batched call, what several branches want to know.

    questions: for each branch {name: (x_t, t, cond)}, all [B, …]. -> for each branch {name: ε}.
    micro_batch: at most that many samples a question in a call (a φ that compares all samples, see
    one_step, brings more).
    """
    flat = [question for named in questions for question in named.values()]
    x_t = torch.cat([x_t for x_t, _, _ in flat])
    t = torch.cat([t for _, t, _ in flat])
    cond = torch.cat([cond for _, _, cond in flat])
    size = len(t) if micro_batch is None else micro_batch * len(flat)
    chunks = zip(x_t.split(size), t.split(size), cond.split(size))
    predictions = torch.cat([prior.eps(*chunk) for chunk in chunks])
    check_prediction(predictions, x_t, "the prior")
    predictions = predictions.chunk(len(flat))
    answers, first = [], 0
    for named in questions:
        last = first + len(named)
        answers.append(dict(zip(named, predictions[first:last], strict=True)))
        first = last
    return answers


def sum_over_processes(tensor):
    """A tensor, summed over the processes that torchrun or accelerate has started, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def trained(optimizer):
    """All parameters of an optimiser."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def sum_gradients(optimizer, name, step, alpha_t):
    """Sum all gradients over the processes, so that all make the same step; check the sums."""
    gradients = [p.grad for p in trained(optimizer) if p.grad is not None]
    if dist.is_initialized():
        vector_to_parameters(sum_over_processes(parameters_to_vector(gradients)), gradients)
    check_finite(get_total_norm(gradients), name, step, alpha_t)


def check_finite(tensor, name, step, alpha_t):
    """A non-finite value ends the run; hidden as zero, it would end as a black picture."""
    if not torch.isfinite(tensor).all():
        advice = "try a smaller --lr or --phi-lr, or --dtype float32"
        if (alpha_t == 0).any():
            advice = "α_t = 0 at one of its t, which ω or the prior divides by: end t before it"
        raise FloatingPointError(f"the {name} is not finite at step {step.number}: {advice}")


def make_samples(generator, cond, real=None):
    """-> this process's Samples, with their prompts; their numbers; how many all processes have.

    ValueError where the generator's x0 does not fit cond, or the real samples.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        out, rows = generator(), None
    elif hasattr(generator, "batch"):
        n, processes = generator.batch, dist.get_world_size()
        if n < processes:
            raise ValueError(f"{processes} processes are too many for {n} samples")
        rows = torch.arange(n, device="cpu")[dist.get_rank()::processes]
        out = generator(rows)
    else:
        raise ValueError("several processes need a generator with `batch` and forward(rows)")
    samples = Samples(*out) if isinstance(out, tuple) else Samples(out)
    x0 = check_x0(samples.x0, real)
    for name, tensor in samples._asdict().items():
        if tensor is not None and len(tensor) != len(x0):
            raise ValueError(f"a generator's {name} is of {len(tensor)} samples, its x0 of "
                             f"{len(x0)}")
    if rows is None:
        n, rows = len(x0), torch.arange(len(x0), device="cpu")
    if samples.cond is None:
        samples = samples._replace(cond=one_each(cond, n)[rows])
    return samples, rows, n


def draw_step(state, step, samples, rows, discriminators):
    """All that is random in a step, drawn in a fixed order, for the samples of all processes.

    -> the Draw of Eq. 7, and for each discriminator the Draws of φ's updates. By default φ has t
    and ε of its own, as in every released code, with t from the whole 0 … T−1 (prolific_dreamer2d,
    threestudio); with share_noise it has θ's, which is faster and, by §7, a little worse.
    """
    method, rng, n, T = step.method, state.rng, step.n, step.prior.steps
    all_x0 = samples.x0[:1].expand(n, *samples.x0.shape[1:])       # for shape, type and device
    t, eps = draw_noise(rng, all_x0, *range_of_t(method, step.number, T))
    if method.t_order == "descending":
        t = torch.full_like(t, max(0, descending_t(method, step.number, T)))
    if method.fixed_noise:
        if state.eps is None:
            state.eps = eps
        eps = state.eps = state.eps.to(eps)
    theta_draw = Draw(t[rows], eps[rows], samples.camera)
    all_phi_draws = []
    for discriminator in discriminators:
        phi_draws = []
        trains = any(p.requires_grad for p in discriminator.phi.parameters())
        for _ in range(method.phi_steps if trains else 0):
            phi_draw = theta_draw
            if not method.share_noise:
                t, eps = draw_noise(rng, all_x0, 0, T - 1)
                phi_draw = Draw(t[rows], eps[rows])
            if samples.camera is not None:   # so that φ also learns without (ProlificDreamer: 0.1)
                shown = torch.rand(n, 1, generator=rng, device="cpu")[rows] > 0.1
                phi_draw = phi_draw._replace(camera=samples.camera * shown.to(samples.camera))
            if discriminator.real == "real" and state.real is not None:
                chosen = torch.randint(len(state.real), (n,), generator=rng, device="cpu")[rows]
                phi_draw = phi_draw._replace(real=state.real[chosen].to(samples.x0))
            phi_draws.append(phi_draw)
        all_phi_draws.append(phi_draws)
    return theta_draw, all_phi_draws


def one_step(prior, state, cond, method, null, micro_batch=None):
    """Algorithm 1, once. -> {name: number} for the metrics."""
    # x0 = g(θ), and all that is random
    samples, rows, n = make_samples(state.generator, cond, state.real)
    if method.shift and samples.source is None:
        raise ValueError("shift needs the source pictures of an edit: see editing.py")
    step = Step(prior, method, state.step, null, n)
    real = None if state.real is None else "real"
    discriminators = [Discriminator(state.phi, samples.cond, method.gamma, method.eta, real=real)]
    if state.second is not None:
        z = samples.source_cond
        if z is None:
            z = one_each(state.second.cond, n, "source prompts")[rows]
        discriminators.append(replace(state.second, cond=z))
    draw, all_phi_draws = draw_step(state, step, samples, rows, discriminators)
    # ε_∅, ε_y, ε_φ and Eq. 7, by micro-batches; the prior is asked once for all that one needs
    before = samples._replace(x0=samples.x0.detach().clone())      # φ learns from x0 as it is now
    size = micro_batch or len(rows)
    if getattr(state.phi, "whole", False):              # such a φ compares all samples
        size = len(rows)
    grads, target_branches, source_branches = [], [], []
    for part in torch.arange(len(rows), device="cpu").split(size):
        branches = [Branch(step, discriminator, before, draw, phi_draws, part)
                    for discriminator, phi_draws in zip(discriminators, all_phi_draws)]
        answers = ask(prior, [branch.questions() for branch in branches], micro_batch)
        grad = branches[0].gradient(answers[0])
        target_branches.append(branches[0])
        if state.second is not None:                    # Eq. 11
            grad = grad - branches[1].gradient(answers[1])
            source_branches.append(branches[1])
        grads.append(grad)
    grad = torch.cat(grads)
    update_theta(state, step, samples.x0, grad, prior.alpha_sigma(draw.t)[0])
    # φ: Eq. 10, or 9
    loss_D = update_phi(state, step, target_branches)
    if state.second is not None:
        loss_D += update_phi(state, step, source_branches)
    grad_norm = sum_over_processes(_norm2(grad).sum()).sqrt().item()
    return {"grad_norm": grad_norm, "loss_D": loss_D} | phi_metrics(target_branches)


def update_theta(state, step, x0, grad, alpha_t):
    """Send Eq. 7 through x0 by the surrogate ⟨stop(grad), x0⟩ / n, and make a step of θ."""
    check_finite(grad, "generator's gradient", step, alpha_t)
    loss = (grad * x0).sum() / step.n
    if hasattr(state.generator, "regulariser"):
        loss = loss + state.generator.regulariser() * (len(x0) / step.n)
    state.opt_theta.zero_grad()
    loss.backward()
    sum_gradients(state.opt_theta, "generator's gradient", step, alpha_t)
    method, device = step.method, x0.device
    if method.t_order == "random":
        factor = rate_factor(method, step.number)
    else:
        # with SGD at lr n and ω = 1 + σ/α, a step of θ is a step in the flow's time, as a sampler's
        now = descending_t(method, step.number, step.prior.steps)
        after = descending_t(method, step.number + 1, step.prior.steps)
        factor = flow_time(step.prior, now, device) - flow_time(step.prior, after, device)
    for group, rate in zip(state.opt_theta.param_groups, state.rates, strict=True):
        group["lr"] = rate * factor
    state.opt_theta.step()
    check_finite(get_total_norm(trained(state.opt_theta)), "generator's θ", step, alpha_t)


def update_phi(state, step, branches):
    """All updates of a φ in a step. branches: of its micro-batches. -> the last loss_D."""
    total = torch.zeros((), device=branches[0].y.device)
    for i in range(len(branches[0].phi_draws)):
        losses = []
        state.opt_phi.zero_grad()
        for branch in branches:
            alpha_t = step.prior.alpha_sigma(branch.phi_draws[i].t)[0]
            loss = branch.phi_loss(i) * (len(branch.y) / step.n)
            check_finite(loss, "discriminator's loss", step, alpha_t)
            loss.backward()
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        sum_gradients(state.opt_phi, "discriminator's gradient", step, alpha_t)
        state.opt_phi.step()
        check_finite(get_total_norm(trained(state.opt_phi)), "discriminator's φ", step, alpha_t)
    return sum_over_processes(total).item()


@torch.inference_mode(False)     # gradients, also where the caller is in no_grad or inference_mode
def distill(prior, generator, cond, method="asd", phi=None, second=None, state=None, seed=0,
            micro_batch=None, callback=None, real=None):
    """The loop at work: optimise θ until the generator's samples look to the prior like the prompt.

    prior       a DiffusionModel, such as prior.Prior.
    generator   an nn.Module; generator() -> x0 [B, C, H, W], or Samples. And only if it has them:
                regulariser() -> a scalar, of the last samples, that is added to its loss;
                parameter_groups(lr), as an optimiser takes them; `batch` and generator(rows), for
                the numbers of some of its samples, if several processes are to share them.
    cond        [1 or B, L, C] from prior.encode_text: y of all samples, or of each.
    method      a Method, or a name in METHODS.
    phi         default: method.phi's, where that needs no prompt (an embedding does).
                phi(x_t, t, cond, eps, camera, answers) -> ε_φ. answers, for Eq. 7: {"uncond": ε_∅
                (not at λ = 1), "y": ε_y}, and what phi.prompts(step, y, null) -> {name: cond} adds
                or replaces (φ then does not learn); phi.whole: it needs all samples at once.
    second      a Discriminator to subtract (Eq. 11, editing.py), at the same t and ε.
    state       to go on with, of the same generator and method; it has phi, second, real and rng.
    micro_batch samples a question in a call of the prior, and of φ; gradients are accumulated.
    callback    callback(state, {"grad_norm": ‖Eq. 7‖ of all samples, "loss_D": the sum of both
                discriminators', "seconds", "kappa" (where γ > −1, before φ's update) and
                "gamma_bound" (with real): both of this process's samples alone}) after each step.
    real        x0 [N, C, H, W] of real samples: φ learns by Eq. 9, each time from B of them, drawn
                anew. Default: there are none, Eq. 10.

    Where torch.distributed is initialised, its processes share the samples; all end in the same
    State, which is returned. UNet evaluations per particle and step, the prior's in one batched
    call: SDS 2; VSD 4 + 1 backward, ASD 5 + 1; both with shared noise 3 + 1 (with a camera or
    micro-batches 4 + 1). With real samples VSD 6 + 2 and ASD 7 + 2; shared noise saves ASD one.
    Raises ValueError for what does not fit together, FloatingPointError if something is not finite.
    """
    method = find_method(method)
    check_seed(seed)
    if not (callback is None or callable(callback)):
        raise ValueError(f"callback is a function, not {callback!r}")
    if not isinstance(state, (State, type(None))):
        raise ValueError(f"state is a State, not {state!r}")
    rng = torch.Generator().manual_seed(seed) if state is None else state.rng
    check_inputs(prior, cond, rng)
    if state is None:
        if phi is None:
            phi = make_phi(method, prior, seed=seed)
        state = State(generator, phi, method, rng, second, real)
    elif phi is not None or second is not None or real is not None:
        raise ValueError("a state has its own phi, second and real: drop those of this call")
    state.check(generator, method)
    if micro_batch is not None and not (isinstance(micro_batch, int) and micro_batch >= 1):
        raise ValueError(f"micro_batch must be at least 1, not {micro_batch!r}")
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and getattr(state.phi, "whole", False):
        raise ValueError("a φ that compares all samples needs them all in one process")
    null = null_prompt(prior, cond)
    while state.step < method.steps:
        began = time.perf_counter()
        # losses are float32, and the prior has its own dtype, whatever the caller's autocast says
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            metrics = one_step(prior, state, cond, method, null, micro_batch)
        state.step += 1
        if callback:
            callback(state, metrics | {"seconds": time.perf_counter() - began})
    return state


# ----------------------------------------------------------------------------------- command line
PHIS = {"noise": NoisePhi, "lora": LoRAPhi, "embedding": EmbeddingPhi}         # as --phi names them
CHOICES = {"omega": OMEGAS, "optimizer": OPTIMIZERS}


def build(settings, prior, method, rng, folder, new):
    """A picture for every prompt and particle, from noise or --init, and φ. -> (State, y)"""
    from cli.files import encode_folder, read_image
    from cli.settings import phi_options
    y = prior.encode_text(settings.prompt).repeat_interleave(settings.particles, 0)
    init = real = None                            # of a resumed run the checkpoint has them
    if settings.init and new:
        init = read_image(settings.init, prior.image_size)
    kind = Pixels if settings.pixels else Latents
    generator = kind(prior, len(y), rng, init)
    phi = method.phi(prior, settings.prompt, **phi_options(settings, method.phi))
    if settings.real and new:
        if len(settings.prompt) > 1 or not any(p.requires_grad for p in phi.parameters()):
            raise ValueError("--real is for one --prompt, and a φ that learns from its pictures")
        real = encode_folder(prior, settings.real)
    return State(generator, phi, method, rng, real=real), y


def main(argv=None):
    """`python asd.py --prompt …`: the rest is in cli/. -> exit status."""
    from cli import run
    from cli.settings import PictureSettings
    return run.main(run.Command(
        "asd.py", "Pictures that look, to a frozen diffusion model, like the prompt (ASD).",
        PictureSettings, METHODS, PHIS, CHOICES, build, distill, paper=PAPER,
        elsewhere=ELSEWHERE), argv)


if __name__ == "__main__":
    sys.exit(main())
