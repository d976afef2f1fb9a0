"""Every equation of the paper as a test, on a prior whose densities are known exactly.

    Eq.  function                        claim beside test_equation[function]
    1    sds_grad at λ = 1               test_sds_with_cfg_is_not_the_gradient_of_the_diffusion_loss
    2    cfg_noise                       –
    3    sds_grad                        test_sds_is_eq7_with_the_added_noise
    4    wgan_objective                  test_eq8_is_eq4_with_the_sign_of_a_loss
    5    log_discriminator               –
    6    generator_loss                  test_eq6_bound_holds_for_lam_at_least_one
    6    generator_bound                 test_eq6_bound_fails_for_lam_below_one
    –    classifier_score                –
    7    generator_grad                  test_eq7_is_the_gradient_of_eq6
    8    discriminator_loss_density      test_eq8_on_the_exact_prior
    8    gradient_penalty                test_eq8_on_the_exact_prior
    9    discriminator_loss              test_eq9_penalty_is_that_of_eq8, test_eq9_has_no_minimum
    9    gamma_lower_bound               test_the_condition_keeps_the_penalty_nonnegative
    10   discriminator_loss_text         test_eq10_is_above_eq9_up_to_terms_without_phi
    10   optimal_eps_phi                 test_minimiser_has_no_slope, test_lam_eff
    ours effective_guidance              test_lag_raises_the_guidance, test_lam_eff
    ours learnt_share                    test_lag_is_measured, test_lag_of_an_exact_phi_is_none
    all  –                               test_methods_on_the_exact_mixture_are_in_order

test_equation checks the identity itself, test_every_wrong_sign_is_noticed that the same check
fails for each sign flipped in the function's source.  Three kinds of oracle: autograd on exact
log-densities, closed forms, and numbers worked by hand.

Checked against the paper's full main text; its supplement was not available.
"""

import ast
import inspect
import itertools
import math
import textwrap
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asd
from claims.exact import mixture_experiment, mmd
from conftest import GaussianMixture, cosine, fixed_mixture, mixtures, particle_eps, randn
from tiny.exact import two_rings

Y, PHI = 0, 1                                     # classes of the mixtures: y, and φ
seeds = st.integers(0, 2 ** 31)
levels = st.floats(0.05, 0.95)
guidance = st.floats(1.0, 100.0)
shapes = st.tuples(*[st.integers(1, n) for n in (4, 4, 5, 5)])
convex = st.floats(-0.95, 10.0)                   # the γ for which Eq. 10 has a minimiser
learnt = st.floats(0.05, 1.5)                     # κ: φ lags below 1, and has gone too far above
either = st.floats(-3.0, 3.0)                     # a weight of the penalty, of either sign


# ---------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------

def close(actual, expected, tol=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=tol, atol=tol)


def norm2(v):
    """‖·‖²: summed over all but the batch dimension: [B]."""
    return (v * v).sum(dim=tuple(range(1, v.ndim)))


def noise(seed, shape, count, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [randn(*shape, generator=g).to(dtype) for _ in range(count)]


def scene(mixture, t=0.4, n=6, seed=0, of=Y):
    """Noised samples of a class with all that the exact prior says about them; φ is class 1."""
    s, g = SimpleNamespace(), torch.Generator().manual_seed(seed)
    s.alpha_t, s.sigma_t = cosine(t)
    s.noise = randn(n, mixture.means.shape[1], generator=g)     # the same ε for real and fake
    s.x0 = mixture.sample(n, y=of, generator=g)
    s.x_t = (s.alpha_t * s.x0 + s.sigma_t * s.noise).requires_grad_()
    at = (s.x_t.detach(), s.alpha_t, s.sigma_t)
    s.eps_uncond, s.eps_y, s.eps_phi = (mixture.eps(*at, y=y) for y in (None, Y, PHI))
    s.log_p = mixture.log_p(s.x_t, s.alpha_t, s.sigma_t)
    s.log_p_y = mixture.log_posterior(Y, s.x_t, s.alpha_t, s.sigma_t)
    s.log_p_phi = mixture.log_posterior(PHI, s.x_t, s.alpha_t, s.sigma_t)
    return s


def slope(value, x):
    """∇_x of the sum of `value`."""
    return torch.autograd.grad(value.sum(), x, retain_graph=True)[0]


def mutants(function):
    """`function` recompiled as it is, then with each of its signs flipped: (line, function) pairs.

    A sign is a binary or augmented + or −, or a unary minus; −1 as an integer literal is left
    alone, since it is a dimension rather than a sign.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))

    def rebuild():
        namespace = dict(function.__globals__)
        exec(compile(ast.fix_missing_locations(tree), "mutant", "exec"), namespace)
        return namespace[function.__name__]

    yield "unchanged", rebuild()
    other = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.USub: ast.UAdd}
    for node in ast.walk(tree):
        sign = type(getattr(node, "op", None))
        index = isinstance(getattr(node, "operand", None), ast.Constant) \
            and isinstance(node.operand.value, int)
        if sign in other and not index:
            before, node.op = node.op, other[sign]()
            yield f"line {node.lineno}: {ast.unparse(node)}", rebuild()
            node.op = before


# ---------------------------------------------------------------------------------------------
# The exact prior itself
# ---------------------------------------------------------------------------------------------

@given(mixtures(), levels, st.sampled_from([None, 0, 1, 2]), seeds)
def test_exact_eps_is_the_score_of_the_exact_density(mixture, t, y, seed):
    """ε(x_t; y) = −σ_t ∇ log p(x_t|y)."""
    alpha_t, sigma_t = cosine(t)
    x_t = noise(seed, (2, 3, mixture.means.shape[1]), 1)[0].requires_grad_()
    log_p = mixture.log_p(x_t, alpha_t, sigma_t, y)
    close(mixture.eps(x_t.detach(), alpha_t, sigma_t, y), -sigma_t * slope(log_p, x_t))


@given(mixtures(max_dim=1), levels)
def test_exact_density_integrates_to_one(mixture, t):
    x = torch.linspace(-30, 30, 6001, dtype=torch.float64)[:, None]
    for y in (None, Y):
        close(torch.trapezoid(mixture.log_p(x, *cosine(t), y).exp(), x[:, 0]), 1.0, 1e-8)


@given(mixtures(), levels, seeds)
def test_exact_posteriors_sum_to_one(mixture, t, seed):
    x_t = noise(seed, (5, mixture.means.shape[1]), 1)[0]
    total = sum(mixture.log_posterior(y, x_t, *cosine(t)).exp() for y in (0, 1, 2))
    close(total, 1.0)


def test_exact_eps_is_the_mean_of_the_noise(exact):
    """ε(x_t; y) = E[ε | x_t, y], by sampling: ε − ε(x_t; y) is uncorrelated with any f(x_t)."""
    g, (alpha_t, sigma_t) = torch.Generator().manual_seed(1), cosine(0.5)
    x0, eps = exact.sample(50_000, y=Y, generator=g), randn(50_000, 3, generator=g)
    x_t = alpha_t * x0 + sigma_t * eps
    residual = (eps - exact.eps(x_t, alpha_t, sigma_t, Y)) * torch.tanh(x_t)
    assert residual.mean(0).abs().max() < 5 * residual.std() / math.sqrt(50_000)


@given(levels, st.floats(0.0, 1.0), seeds)
def test_particle_eps_is_a_mixture_of_points(t, bandwidth, seed):
    """ε_g of a particle set is the exact ε of a mixture with one component per particle."""
    particles, x_t = noise(seed, (5, 3), 2)
    points = GaussianMixture(particles, [bandwidth] * 5)
    close(particle_eps(x_t, particles, *cosine(t), bandwidth), points.eps(x_t, *cosine(t)), 1e-9)


# ---------------------------------------------------------------------------------------------
# One check per equation: a plain function of the implementation, so that mutants can be tried too
# ---------------------------------------------------------------------------------------------

def check_add_noise(fn):
    """x_t = α_t x0 + σ_t ε: by hand, and both ends."""
    x0, eps = noise(0, (2, 3, 4, 4), 2)
    close(fn(torch.full((1, 1, 1, 1), 2.0).double(), torch.full((1, 1, 1, 1), -1.0).double(),
             0.8, 0.6), 1.0)
    close(fn(x0, eps, 1.0, 0.0), x0)
    close(fn(x0, eps, 0.0, 1.0), eps)


def check_cfg_noise(fn):
    """Eq. 2: the guided noise is the score of p(x_t) p(y|x_t)^λ."""
    s = scene(fixed_mixture())
    for lam in (0.0, 1.0, 7.5):
        close(fn(s.eps_uncond, s.eps_y, lam), -s.sigma_t * slope(s.log_p + lam * s.log_p_y, s.x_t))


def check_wgan_objective(fn):
    """Eq. 4 by hand: the critic is to be high at real samples, low at fake ones, and not steep."""
    real, fake, norm = (torch.tensor(v).double() for v in ([4.0, 2.0], [1.0, 3.0, 8.0], [2.0, 3.0]))
    close(fn(real, fake, norm, 0.0), 3 - 4)
    close(fn(real, fake, norm, 10.0), 3 - 4 - 10 * (4 + 9) / 2)                     # p = 2
    close(fn(real, fake, norm, 10.0, 3), 3 - 4 - 10 * (8 + 27) / 2)


def check_log_discriminator(fn):
    """Eq. 5: D = log p(y|x_t)/p(φ|x_t); p(x_t) cancels, and ∇D = (ε_φ − ε_y)/σ_t."""
    m = fixed_mixture()
    s = scene(m)
    joint = [m.log_p(s.x_t, s.alpha_t, s.sigma_t, y) + m.log_prior(y) for y in (Y, PHI)]
    D = fn(s.log_p_y, s.log_p_phi)
    close(D, joint[0] - joint[1])
    close(slope(D, s.x_t), (s.eps_phi - s.eps_y) / s.sigma_t)


def check_generator_loss(fn):
    """Eq. 6: the WGAN generator maximises the critic, L_G = −E[D] = E[log p(φ)/p(y)]."""
    s = scene(fixed_mixture())
    close(fn(s.log_p_y, s.log_p_phi), -asd.log_discriminator(s.log_p_y, s.log_p_phi).mean())
    close(fn(torch.tensor([-1.0, -3.0]).double(), torch.tensor([-2.0, -5.0]).double()), -1.5)


def check_generator_bound(fn):
    """Eq. 6: L'_G − L_G = (λ − 1) E[−log p(y|x_t)], so the two agree at λ = 1."""
    s = scene(fixed_mixture())
    loss = asd.generator_loss(s.log_p_y, s.log_p_phi)
    for lam in (1.0, 7.5, 100.0):
        close(fn(s.log_p_y, s.log_p_phi, lam) - loss, (1 - lam) * s.log_p_y.mean())


def check_classifier_score(fn):
    """Before Eq. 7: the score of the implicit classifier is −(ε_y − ε_∅)/σ_t."""
    s = scene(fixed_mixture())
    close(fn(s.eps_uncond, s.eps_y, s.sigma_t), slope(s.log_p_y, s.x_t))


def check_generator_grad(fn):
    """Eq. 7: ∇_{x_t} [log p(φ|x_t) − λ log p(y|x_t)] = (ε_∅ + λ(ε_y − ε_∅) − ε_φ) / σ_t."""
    s = scene(fixed_mixture())
    for lam, omega in ((1.0, 1.0), (7.5, 1.0), (7.5, s.sigma_t ** 2), (100.0, s.alpha_t)):
        bracket = s.sigma_t * slope(s.log_p_phi - lam * s.log_p_y, s.x_t)
        close(fn(s.eps_uncond, s.eps_y, s.eps_phi, lam, omega), omega * bracket, 1e-9)
    close(fn(s.eps_uncond, s.eps_y, s.eps_phi, lam),
          s.sigma_t * slope(s.log_p_phi - lam * s.log_p_y, s.x_t), 1e-9)


def check_sds_grad(fn):
    """Eq. 3: SDS is Eq. 7 for the φ that knows one image only, p(x_t|φ) = N(α_t x0, σ_t²)."""
    s = scene(fixed_mixture())
    log_p_x_phi = -0.5 * ((s.x_t - s.alpha_t * s.x0) / s.sigma_t).pow(2).sum(-1)
    for lam in (1.0, 7.5, 100.0):
        bracket = s.sigma_t * slope(log_p_x_phi - s.log_p - lam * s.log_p_y, s.x_t)
        close(fn(s.eps_uncond, s.eps_y, s.noise, lam), bracket, 1e-9)
        close(fn(s.eps_uncond, s.eps_y, s.noise, lam, 0.3), 0.3 * bracket, 1e-9)


def check_discriminator_loss_density(fn):
    """Eq. 8 by hand: the same three means with the sign of a loss."""
    fake, real, grad_norm2 = (torch.tensor(v).double()
                              for v in ([1.0, 3.0, 8.0], [4.0, 2.0], [1.5, 2.5]))
    close(fn(fake, real, grad_norm2, 0.0), 4 - 3)
    close(fn(fake, real, grad_norm2, 10.0), 4 - 3 + 10 * 2)


def check_gradient_penalty(fn):
    """In Eq. 8: ‖ε_y − ε_φ‖²/σ_t² is the squared norm of the exact ∇D, one per sample."""
    s = scene(fixed_mixture())
    D = asd.log_discriminator(s.log_p_y, s.log_p_phi)
    close(fn(s.eps_y, s.eps_phi, s.sigma_t), norm2(slope(D, s.x_t)))


def check_discriminator_loss(fn):
    """Eq. 9's «≈» is an equality for exact denoisers, integrated over the noise level.

    log p(x0|c) = const − ½ ∫ E‖ε̂(x_t; c) − ε‖² d log SNR with a constant that is the same for
    every c, so D(x0) = ½ ∫ E[‖ε_φ − ε‖² − ‖ε_y − ε‖²] d log SNR.  Other denoisers give bounds of
    log p(x0|c); Eq. 9 has the difference of two, so it is no bound of Eq. 8.  The penalty is
    σ_t²‖∇D‖² at every level.  The expectation over ε is a Gauss–Hermite sum, the integral a
    trapezoid sum; their weights enter through the square roots.
    """
    g = torch.Generator().manual_seed(3)
    m = GaussianMixture(2 * randn(6, 1, generator=g), 0.6 + torch.rand(6, generator=g),
                        labels=torch.arange(6) % 3)
    snr, step = torch.arange(-30.0, 30.0, 0.25, dtype=torch.float64), 0.25
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(48))
    eps = nodes.repeat(len(snr))[:, None]                                       # [L·N, 1]
    alpha_t = torch.sigmoid(snr).sqrt().repeat_interleave(len(nodes))[:, None]
    sigma_t = torch.sigmoid(-snr).sqrt().repeat_interleave(len(nodes))[:, None]
    root = (0.5 * step * weights / weights.sum() * len(eps)).sqrt().repeat(len(snr))[:, None]

    def critic(x0):
        """D(x0) = log p(x0|y) − log p(x0|φ), up to a constant."""
        x0 = torch.tensor([x0]).double()
        return m.log_p(x0, y=Y) - m.log_p(x0, y=PHI)

    def noised(x0):
        """-> ε_φ and ε_y at x_t, and E[σ_t²‖∇D(x_t)‖²]."""
        x_t = (alpha_t * x0 + sigma_t * eps).requires_grad_()
        D = m.log_p(x_t, alpha_t, sigma_t, Y) - m.log_p(x_t, alpha_t, sigma_t, PHI)
        phi, y = (m.eps(x_t.detach(), alpha_t, sigma_t, c) for c in (PHI, Y))
        return root * phi, root * y, norm2(root * sigma_t * slope(D, x_t)).mean()

    (fake_phi, fake_y, fake_penalty), (real_phi, real_y, real_penalty) = noised(0.7), noised(-1.9)
    eps = root * eps
    tensors = (eps, fake_phi, fake_y, real_phi, real_y)
    without_phi = norm2(real_y - eps).mean() - norm2(fake_y - eps).mean()
    close(fn(*tensors, 0.0, 0.0) + without_phi, critic(0.7) - critic(-1.9), 1e-7)
    close(fn(*tensors), fn(*tensors, 0.5, -1.0))
    for eta, gamma in ((0.5, -1.0), (0.3, 0.7), (0.0, 1.0), (1.0, 0.0)):
        close(fn(*tensors, eta, gamma) - fn(*tensors, 0.0, 0.0),
              eta * real_penalty + gamma * fake_penalty)


def check_discriminator_loss_text(fn):
    """Eq. 10 is a parabola in ε_φ, with the minimiser (ε + γ ε_y)/(1 + γ) and curvature 1 + γ."""
    eps, phi, y = noise(0, (3, 2, 4, 4), 3)
    for gamma in (0.0, -0.5, 2.0):
        best = (eps + gamma * y) / (1 + gamma)
        lowest = gamma / (1 + gamma) * norm2(eps - y).mean()
        close(fn(eps, phi, y, gamma), lowest + (1 + gamma) * norm2(phi - best).mean())
    # The default, γ = −1: ‖ε_φ − ε‖² − ‖ε_y − ε_φ‖² = ⟨y − ε, 2ε_φ − ε − y⟩ is affine.
    close(fn(eps, phi, y), ((y - eps) * (2 * phi - eps - y)).sum((1, 2, 3)).mean())


def check_gamma_lower_bound(fn):
    """The condition under Eq. 9 by hand, −η (1 + 9)/2 / ((16 + 4)/2): means first, then the ratio.

    The ratio's mean over the batch would be (1/16 + 9/4)/2. At the bound the penalty is 0.
    """
    zero = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    real_y, fake_y = (zero + torch.tensor(v).reshape(2, 1, 1, 1) for v in ([1.0, 3.0], [4.0, 2.0]))
    close(fn(zero, fake_y, zero, real_y), -0.25)                                   # η = ½
    close(fn(zero, fake_y, zero, real_y, 2.0), -1.0)
    assert fn(zero, fake_y, zero, real_y, 0.0) == 0             # no weight on real samples: γ ≥ 0
    assert fn(fake_y, fake_y, zero, real_y) == -math.inf        # nothing to weigh: any γ will do
    eps, *tensors = noise(4, (3, 2, 4, 4), 5)
    for eta in (0.2, 0.5, 1.5):
        close(asd.discriminator_loss(eps, *tensors, eta, fn(*tensors, eta)),
              asd.discriminator_loss(eps, *tensors, 0.0, 0.0))


def check_optimal_eps_phi(fn):
    """The minimiser of Eq. 10 extrapolates from ε_y past ε by 1/(1 + γ)."""
    eps, y = noise(0, (3, 2, 4, 4), 2)
    for gamma in (-0.75, -0.5, 0.0, 3.0):
        close(fn(eps, y, gamma), y + (eps - y) / (1 + gamma))


def check_effective_guidance(fn):
    """λ' by hand: φ has learnt a tenth of its way, γ = −½: half the guidance, times ten."""
    assert fn(7.5, -0.5, 0.1) == pytest.approx(1 + 0.5 * 6.5 / 0.1)
    assert fn(7.5, -0.5) == pytest.approx(1 + 0.5 * 6.5)              # κ = 1
    assert fn(7.5, 2.0, 4.0) == pytest.approx(1 + 3 * 6.5 / 4)
    assert fn(1.0, 3.0, 0.2) == 1                                      # no guidance, none in effect


def check_learnt_share(fn):
    """κ by hand, of two samples: φ has gone a quarter and three quarters of ε − ε_y."""
    eps, y = noise(0, (2, 2, 4, 4), 2)
    part = torch.tensor([0.25, 0.75]).double()
    phi = y + part.reshape(2, 1, 1, 1) * (eps - y)
    for gamma in (0.0, -0.5, 3.0):
        close(fn(eps, phi, y, gamma), (1 + gamma) * part)
        close(fn(eps, y, y, gamma), 0.0)                               # where φ starts


CHECKS = {name[len("check_"):]: check for name, check in list(globals().items())
          if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_equation(name):
    """Eqs. 2–10, and the two of a φ that lags: each function satisfies its identity."""
    CHECKS[name](getattr(asd, name))


@pytest.mark.parametrize("name", CHECKS)
def test_every_wrong_sign_is_noticed(name):
    """Each check fails for each mutant of its equation, and only for those."""
    function, survivors = getattr(asd, name), []
    candidates = list(mutants(function))
    for place, mutant in candidates:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                CHECKS[name](mutant)
            survivors.append(place)
        except Exception as error:
            assert place != "unchanged", error
    assert survivors == ["unchanged"]
    # Eq. 3 is Eq. 7 with another argument: the only one that may have no sign of its own.
    assert len(candidates) > 1 or name == "sds_grad"


# ---------------------------------------------------------------------------------------------
# Eqs. 1–3: what SDS is not
# ---------------------------------------------------------------------------------------------

def test_sds_with_cfg_is_not_the_gradient_of_the_diffusion_loss(exact):
    """Eqs. 1–3: Eq. 1's gradient has a Jacobian; without it or with CFG it is another direction."""
    s = scene(exact, t=0.4, n=64)
    eps_y = exact.eps(s.x_t, s.alpha_t, s.sigma_t, Y)
    eps_cfg = asd.cfg_noise(exact.eps(s.x_t, s.alpha_t, s.sigma_t), eps_y, 7.5)
    diffusion = slope(0.5 * norm2(eps_y - s.noise), s.x_t)              # Eq. 1, exactly
    diffusion_cfg = slope(0.5 * norm2(eps_cfg - s.noise), s.x_t)        # and with guidance
    no_jacobian = asd.sds_grad(s.eps_uncond, s.eps_y, s.noise, 1.0)
    sds = asd.sds_grad(s.eps_uncond, s.eps_y, s.noise, 7.5)             # Eq. 3

    close(no_jacobian, s.eps_y - s.noise)
    jacobian_free = slope((eps_y - s.noise).detach() * s.x_t, s.x_t)
    close(no_jacobian, jacobian_free)
    for gradient in (diffusion, diffusion_cfg, no_jacobian):
        cosine_to_sds = torch.cosine_similarity(gradient.flatten(), sds.flatten(), 0)
        assert cosine_to_sds < 0.9
    # Eq. 7's loss has it as its gradient: φ is then the density of the one image at hand.
    log_p_x_phi = -0.5 * ((s.x_t - s.alpha_t * s.x0) / s.sigma_t).pow(2).sum(-1)
    loss = log_p_x_phi - s.log_p - 7.5 * s.log_p_y
    close(sds, s.sigma_t * slope(loss, s.x_t), 1e-9)


@given(shapes, seeds, guidance)
def test_sds_is_eq7_with_the_added_noise(shape, seed, lam):
    """Eq. 3 = Eq. 7 at ε_φ = ε."""
    eps_uncond, eps_y, eps = noise(seed, shape, 3)
    close(asd.sds_grad(eps_uncond, eps_y, eps, lam, 0.7),
          asd.generator_grad(eps_uncond, eps_y, eps, lam, 0.7))


# ---------------------------------------------------------------------------------------------
# Eqs. 6 and 7: the generator
# ---------------------------------------------------------------------------------------------

@given(mixtures(), levels, guidance, seeds)
def test_eq6_bound_holds_for_lam_at_least_one(mixture, t, lam, seed):
    """Eq. 6: L_G ≤ L'_G, because −log p(y|x_t) ≥ 0 for a discrete y."""
    s = scene(mixture, t, seed=seed)
    loss = asd.generator_loss(s.log_p_y, s.log_p_phi)
    assert loss <= asd.generator_bound(s.log_p_y, s.log_p_phi, lam) + 1e-12


@given(mixtures(), levels, st.floats(-5.0, 0.99), seeds)
def test_eq6_bound_fails_for_lam_below_one(mixture, t, lam, seed):
    """Eq. 6 is an upper bound for λ ≥ 1 only: below, it is a lower one."""
    s = scene(mixture, t, seed=seed)
    loss = asd.generator_loss(s.log_p_y, s.log_p_phi)
    assert loss > asd.generator_bound(s.log_p_y, s.log_p_phi, lam)


@given(mixtures(), levels, guidance, seeds)
def test_eq7_is_the_gradient_of_eq6(mixture, t, lam, seed):
    """Eq. 7: B ∇_{x_t} L'_G = bracket / σ_t for every mixture, level and guidance."""
    s = scene(mixture, t, seed=seed)
    gradient = len(s.x_t) * slope(asd.generator_bound(s.log_p_y, s.log_p_phi, lam), s.x_t)
    bracket = asd.generator_grad(s.eps_uncond, s.eps_y, s.eps_phi, lam)
    close(bracket / s.sigma_t, gradient, 1e-8)


def test_eq7_reaches_the_parameters(exact):
    """Eq. 7 with ω = α_t/σ_t is ∇θ L'_G through a generator x0 = g(θ), ∂x0/∂θ and all."""
    g, (alpha_t, sigma_t), lam = torch.Generator().manual_seed(2), cosine(0.6), 7.5
    z, eps = randn(5, 4, generator=g), randn(5, 3, generator=g)
    theta = randn(4, 3, generator=g).requires_grad_()
    x0 = torch.tanh(z @ theta)
    x_t = asd.add_noise(x0, eps, alpha_t, sigma_t)
    posteriors = [exact.log_posterior(c, x_t, alpha_t, sigma_t) for c in (Y, PHI)]
    loss = asd.generator_bound(*posteriors, lam)
    at = (x_t.detach(), alpha_t, sigma_t)
    grad = asd.generator_grad(exact.eps(*at), exact.eps(*at, y=Y), exact.eps(*at, y=PHI), lam,
                              alpha_t / sigma_t)
    surrogate = (grad * x0).sum() / len(x0)
    close(slope(surrogate, theta), slope(loss, theta))


@given(shapes, seeds, st.floats(1e6, 1e8))
def test_huge_lam_is_the_classifier(shape, seed, lam):
    """λ → ∞: Eq. 7 is proportional to ε_y − ε_∅, whatever φ says."""
    eps_uncond, eps_y, eps_phi = noise(seed, shape, 3)
    close(asd.generator_grad(eps_uncond, eps_y, eps_phi, lam) / lam, eps_y - eps_uncond, 1e-5)


@given(shapes, seeds, guidance)
def test_huge_gamma_is_the_classifier(shape, seed, lam):
    """γ → ∞: ε_φ* tends to ε_y, and Eq. 7 to (λ − 1)(ε_y − ε_∅)."""
    eps_uncond, eps_y, eps = noise(seed, shape, 3)
    eps_phi = asd.optimal_eps_phi(eps, eps_y, 1e9)
    close(eps_phi, eps_y, 1e-7)
    close(asd.generator_grad(eps_uncond, eps_y, eps_phi, lam), (lam - 1) * (eps_y - eps_uncond),
          1e-6)


def test_lam_below_one_warns_once():
    """Eq. 6 is no bound for λ < 1: one UserWarning, not one per step."""
    eps = torch.zeros(1, 1, 2, 2)
    for lams, expected in (((7.5, 1.0), 0), ((0.5, 0.5, 0.5), 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")               # as Python does: once for each place
            for lam in lams:
                asd.generator_grad(eps, eps, eps, lam)
        assert [w.category for w in caught] == [UserWarning] * expected


# ---------------------------------------------------------------------------------------------
# Eqs. 8–10: the discriminator
# ---------------------------------------------------------------------------------------------

def test_norms_are_sums_over_pixels_and_means_over_the_batch():
    """Eqs. 8–10 by hand: two images of 2 × 3 × 3 numbers, the second's twice the first's."""
    eps, fake_phi, fake_y, real_phi, real_y = (
        c * torch.ones(2, 2, 3, 3).double() * torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
        for c in (0.0, 1.0, 3.0, 2.0, 7.0))
    both = 18 * (1 + 4) / 2
    assert asd.gradient_penalty(fake_y, fake_phi, 0.5).tolist() == [18 * 4 * 4, 18 * 16 * 4]
    assert asd.discriminator_loss_text(eps, fake_phi, fake_y, 0.0) == both * 1
    assert asd.discriminator_loss_text(eps, fake_phi, fake_y, -0.5) == both * (1 - 0.5 * 4)
    assert asd.discriminator_loss_text(eps, fake_phi, fake_y) == both * (1 - 4)
    assert asd.discriminator_loss(eps, fake_phi, fake_y, real_phi, real_y, 0.25, -2.0) == (
        both * (1 - 4 + 0.25 * 25 - 2 * 4))
    assert asd.discriminator_loss(eps, fake_phi, fake_y, real_phi, real_y) == (
        both * (1 - 4 + 0.5 * 25 - 4))


@given(seeds, st.tuples(*[st.integers(1, 5)] * 3), st.floats(0.0, 10.0))
def test_eq8_is_eq4_with_the_sign_of_a_loss(seed, sizes, tau):
    """Eq. 8 is what Eq. 4's critic maximises, at p = 2 and negated, so that it is minimised."""
    real_d, fake_d, grad_norm = (noise(seed + i, (n,), 1)[0] for i, n in enumerate(sizes))
    grad_norm = grad_norm.abs()
    eq8 = asd.discriminator_loss_density(fake_d, real_d, grad_norm ** 2, tau)
    close(eq8, -asd.wgan_objective(real_d, fake_d, grad_norm, tau, p=2))
    close(eq8, -asd.wgan_objective(real_d, fake_d, grad_norm, tau))


@given(mixtures(), levels, seeds, st.floats(0.0, 10.0))
def test_eq8_on_the_exact_prior(mixture, t, seed, tau):
    """Eq. 8, its two lines: D's values and ‖ε_y − ε_φ‖²/σ_t² against log-densities and autograd."""
    fake, real = scene(mixture, t, seed=seed, of=PHI), scene(mixture, t, seed=seed)
    fake_d, real_d = (asd.log_discriminator(s.log_p_y, s.log_p_phi) for s in (fake, real))
    grad_norm2 = torch.cat([asd.gradient_penalty(s.eps_y, s.eps_phi, s.sigma_t)
                            for s in (fake, real)])                   # x̃: both, mixed
    ratios = [mixture.log_p(s.x_t, s.alpha_t, s.sigma_t, Y)
              - mixture.log_p(s.x_t, s.alpha_t, s.sigma_t, PHI) for s in (fake, real)]
    gradients = torch.cat([slope(r, s.x_t) for r, s in zip(ratios, (fake, real))])
    close(asd.discriminator_loss_density(fake_d, real_d, grad_norm2, tau),
          (ratios[0] - ratios[1]).mean() + tau * norm2(gradients).mean(), 1e-9)


def test_eq8_is_negative_where_the_critic_can_tell(exact):
    """D of the true densities, without its penalty: Eq. 8 is −KL(φ‖y) − KL(y‖φ)."""
    fake_d, real_d = (asd.log_discriminator(s.log_p_y, s.log_p_phi)
                      for s in (scene(exact, n=2000, of=of) for of in (PHI, Y)))
    assert asd.discriminator_loss_density(fake_d, real_d, torch.zeros(1).double(), 1.0) < -1
    assert asd.wgan_objective(real_d, fake_d, torch.zeros(1).double(), 1.0) > 1


@given(mixtures(), levels, st.floats(0.0, 3.0), either, seeds)
def test_eq9_penalty_is_that_of_eq8(mixture, t, eta, gamma, seed):
    """Eq. 9's second row is σ_t²‖∇D‖², at real samples with weight η, at fake ones with γ."""
    fake, real = scene(mixture, t, seed=seed, of=PHI), scene(mixture, t, seed=seed)
    tensors = (fake.noise, fake.eps_phi, fake.eps_y, real.eps_phi, real.eps_y)
    fake_penalty, real_penalty = (norm2(slope(s.log_p_y - s.log_p_phi, s.x_t)).mean()
                                  for s in (fake, real))
    close(asd.discriminator_loss(*tensors, eta, gamma) - asd.discriminator_loss(*tensors, 0, 0),
          fake.sigma_t ** 2 * (eta * real_penalty + gamma * fake_penalty), 1e-9)


@given(shapes, seeds)
def test_gamma_zero_is_vsd(shape, seed):
    """VSD's loss, denoising of the fake samples, is Eq. 9's first term, and Eq. 10 with γ = 0."""
    eps, fake_phi, fake_y, real_phi, real_y = noise(seed, shape, 5)
    vsd = norm2(fake_phi - eps).mean()
    close(asd.discriminator_loss_text(eps, fake_phi, fake_y, 0.0), vsd)
    close(asd.discriminator_loss(eps, fake_phi, fake_y, real_phi, real_y, 0.0, 0.0),
          vsd - norm2(real_phi - eps).mean())
    close(asd.optimal_eps_phi(eps, fake_y, 0.0), eps)


@given(shapes, seeds, either, either)
def test_eq9_is_its_penalty_where_fake_is_real(shape, seed, eta, gamma):
    """x^g = x^r: the critic's row is 0, and (η + γ) E‖ε_y − ε_φ‖² is left."""
    eps, phi, y = noise(seed, shape, 3)
    close(asd.discriminator_loss(eps, phi, y, phi, y, eta, gamma),
          (eta + gamma) * norm2(y - phi).mean())


@given(shapes, seeds, st.floats(0.0, 2.0), either)
def test_the_condition_keeps_the_penalty_nonnegative(shape, seed, eta, above):
    """The penalty is (γ − bound) E‖ε_{x^g;y} − ε_{x^g;φ}‖²: at least 0 ⇔ γ ≥ bound, 0 at it."""
    eps, fake_phi, fake_y, real_phi, real_y = tensors = noise(seed, shape, 5)
    gamma = asd.gamma_lower_bound(*tensors[1:], eta) + above
    penalty = (asd.discriminator_loss(*tensors, eta, gamma)
               - asd.discriminator_loss(*tensors, 0.0, 0.0))
    close(penalty, above * norm2(fake_y - fake_phi).mean())


def test_the_condition_wants_eta_not_negative():
    with pytest.raises(ValueError):
        asd.gamma_lower_bound(*noise(0, (1, 1, 2, 2), 4), -0.1)


@given(shapes, seeds, st.floats(-1.0, 0.95), either)
def test_eq10_is_above_eq9_up_to_terms_without_phi(shape, seed, eta, gamma):
    """Eq. 9 = Eq. 10 + η/(1−η) E‖a‖² − (1−η) E‖b + η/(1−η) a‖², where a and b are ε_{x^r;y} − ε and
    ε_{x^r;φ} − ε: for every γ, also below the condition's bound, and every η < 1.

    At the paper's η = ½ it is Eq. 10 + E‖a‖² − ½ E‖a + b‖²; the last term is what the «≤» leaves
    out, 0 only at ε_{x^r;φ} = 2ε − ε_{x^r;y}.
    """
    eps, fake_phi, fake_y, real_phi, real_y = tensors = noise(seed, shape, 5)
    a, b, ratio = real_y - eps, real_phi - eps, eta / (1 - eta)
    eq10 = asd.discriminator_loss_text(eps, fake_phi, fake_y, gamma)
    close(asd.discriminator_loss(*tensors, 0.5, gamma),
          eq10 + norm2(a).mean() - 0.5 * norm2(a + b).mean())
    close(asd.discriminator_loss(*tensors, eta, gamma),
          eq10 + ratio * norm2(a).mean() - (1 - eta) * norm2(b + ratio * a).mean())
    close(asd.discriminator_loss(eps, fake_phi, fake_y, 2 * eps - real_y, real_y, 0.5, gamma),
          eq10 + norm2(a).mean())


@given(shapes, seeds, st.floats(1.0, 3.0), either)
def test_eq10_is_no_bound_for_eta_from_one_on(shape, seed, eta, gamma):
    """Along ε_{x^r;φ} = ε − k (ε_{x^r;y} − ε), Eq. 9 − Eq. 10 ≥ 2ηk E‖a‖², without limit."""
    eps, fake_phi, fake_y, real_y = noise(seed, shape, 4)
    a2 = norm2(real_y - eps).mean()
    for k in (1, 10, 1000):
        gap = (asd.discriminator_loss(eps, fake_phi, fake_y, eps - k * (real_y - eps), real_y, eta,
                                      gamma)
               - asd.discriminator_loss_text(eps, fake_phi, fake_y, gamma))
        close(gap, (eta * (1 + k) ** 2 - k ** 2) * a2, 1e-9)
        assert gap > 2 * eta * k * a2


def test_eq10_is_between_losses_not_gradients():
    """Eq. 10 is printed with ∇_φ on both sides of its «≤». The gradients differ by −(a + b), of
    either sign, and a step of φ that lowers Eq. 10 can raise Eq. 9."""
    eps, fake_phi, fake_y, real_phi, real_y = noise(0, (1, 3, 4, 4), 5)
    step = torch.zeros_like(eps, requires_grad=True)      # φ's weights move both predictions
    eq10 = slope(asd.discriminator_loss_text(eps, fake_phi + step, fake_y), step)

    def eq9(real_phi):
        return slope(asd.discriminator_loss(eps, fake_phi + step, fake_y, real_phi + step, real_y),
                     step)

    close(eq9(real_phi) - eq10, -(real_y + real_phi - 2 * eps))
    assert (eq9(real_phi) - eq10).min() < -1 and (eq9(real_phi) - eq10).max() > 1
    close(eq9(2 * eps - real_y), eq10)                    # where the bound is tight
    close(eq9(2 * eps - real_y + 2 * eq10), -eq10)        # where the two pull against each other


# ---------------------------------------------------------------------------------------------
# The optima of Eqs. 9 and 10
# ---------------------------------------------------------------------------------------------

@given(shapes, seeds, either)
def test_curvature_of_eq10_is_one_plus_gamma(shape, seed, gamma):
    """Affine at γ = −1 (the default), strictly convex above, strictly concave below."""
    eps, y, phi, step = noise(seed, shape, 4)
    for gamma in (gamma, -1.0):
        low, middle, high = (asd.discriminator_loss_text(eps, phi + k * step, y, gamma).item()
                           for k in (-1, 0, 1))
        second = low - 2 * middle + high
        expected = 2 * (1 + gamma) * norm2(step).mean().item()
        assert second == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(shapes, seeds, st.floats(-1.0, 3.0), either)
def test_eq9_has_curvature_eta_minus_one_at_real_samples(shape, seed, eta, gamma):
    """1 + γ in ε_{x^g;φ} as in Eq. 10, η − 1 in ε_{x^r;φ}: affine there at η = 1."""
    eps, fake_phi, fake_y, real_phi, real_y, step = noise(seed, shape, 6)
    for eta in (eta, 1.0):
        for fake, real, expected in ((step, 0, 1 + gamma), (0, step, eta - 1)):
            low, middle, high = (asd.discriminator_loss(
                eps, fake_phi + k * fake, fake_y, real_phi + k * real, real_y, eta, gamma)
                for k in (-1, 0, 1))
            close(low - 2 * middle + high, 2 * expected * norm2(step).mean(), 1e-9)


@given(shapes, seeds, st.floats(-1.0, 0.95), convex)
def test_eq9_has_no_minimum(shape, seed, eta, gamma):
    """For η < 1, so at the paper's ½: a maximum over ε_{x^r;φ}, at (ε − η ε_y)/(1 − η), from which
    the loss falls without limit, whatever the fake half, which has Eq. 10's minimiser, can do."""
    eps, fake_y, real_y, step = noise(seed, shape, 4)
    for eta in (eta, 0.5):
        best = asd.optimal_eps_phi(eps, fake_y, gamma).requires_grad_()
        top = ((eps - eta * real_y) / (1 - eta)).requires_grad_()
        saddle = asd.discriminator_loss(eps, best, fake_y, top, real_y, eta, gamma)
        close(slope(saddle, best), 0.0, 1e-9)
        close(slope(saddle, top), 0.0, 1e-9)
        for k in (-1, 0.1, 1000):
            close(asd.discriminator_loss(eps, best, fake_y, top + k * step, real_y, eta, gamma)
                  - saddle, -(1 - eta) * k ** 2 * norm2(step).mean(), 1e-8)


@given(shapes, seeds, convex)
def test_minimiser_has_no_slope(shape, seed, gamma):
    """ε_φ* = (ε + γ ε_y)/(1 + γ): the gradient of Eq. 10 vanishes, any other φ is worse."""
    eps, y, step = noise(seed, shape, 3)
    best = asd.optimal_eps_phi(eps, y, gamma).requires_grad_()
    lowest = asd.discriminator_loss_text(eps, best, y, gamma)
    close(slope(lowest, best), 0.0, 1e-9)
    for k in (0.1, 1.0, -1.0):
        assert asd.discriminator_loss_text(eps, best + k * step, y, gamma) > lowest


def test_the_minimiser_over_functions_of_x_t_uses_the_mean_noise():
    """Eq. 10 over all ε_φ(x_t): ε is replaced by ε_g = E[ε | x_t], as for VSD."""
    g, (alpha_t, sigma_t), gamma = torch.Generator().manual_seed(0), cosine(0.5), -0.5
    prior, particles = two_rings(), randn(4, 2, generator=g)
    eps = randn(20_000, 2, generator=g)
    x0 = particles[torch.randint(4, (20_000,), generator=g)]
    x_t = asd.add_noise(x0, eps, alpha_t, sigma_t)
    eps_y, eps_g = prior.eps(x_t, alpha_t, sigma_t, Y), particle_eps(x_t, particles, alpha_t,
                                                                     sigma_t)
    best = asd.optimal_eps_phi(eps_g, eps_y, gamma)
    lowest = asd.discriminator_loss_text(eps, best, eps_y, gamma)
    for rival in (eps_g, eps_y, 1.1 * best, best + 0.1, best + 0.1 * torch.sin(x_t)):
        assert asd.discriminator_loss_text(eps, rival, eps_y, gamma) > lowest


@given(shapes, seeds, convex, guidance)
def test_lam_eff(shape, seed, gamma, lam):
    """ASD at its optimum is VSD at λ_eff = 1 + (1 + γ)(λ − 1), with the gain 1/(1 + γ): κ = 1."""
    eps_uncond, eps_y, eps_g = noise(seed, shape, 3)
    ours = asd.generator_grad(eps_uncond, eps_y, asd.optimal_eps_phi(eps_g, eps_y, gamma), lam)
    lam_eff = 1 + (1 + gamma) * (lam - 1)
    assert asd.effective_guidance(lam, gamma) == asd.effective_guidance(lam, gamma, 1.0) == lam_eff
    close(ours, asd.generator_grad(eps_uncond, eps_y, eps_g, lam_eff) / (1 + gamma), 1e-8)


@pytest.mark.parametrize("gamma", [-1, -1.0, -1.5, torch.tensor(-1.0),
                                   torch.tensor([0.5, -2.0]).reshape(2, 1, 1, 1)])
def test_no_minimiser_at_gamma_minus_one_or_below(gamma):
    """Eq. 10 is affine or concave there: it has no minimum."""
    with pytest.raises(ValueError):
        asd.optimal_eps_phi(*noise(0, (2, 1, 2, 2), 2), gamma)


# ---------------------------------------------------------------------------------------------
# Ours: a φ that lags, ε_φ = ε_y + κ (ε − ε_y)/(1 + γ)
# ---------------------------------------------------------------------------------------------

@given(shapes, seeds, guidance, convex, learnt)
def test_lag_raises_the_guidance(shape, seed, lam, gamma, kappa):
    """Eq. 7 is κ/(1 + γ) times SDS at λ' = 1 + (1 + γ)(λ − 1)/κ."""
    eps_uncond, eps_y, eps = noise(seed, shape, 3)
    eps_phi = eps_y + kappa * (eps - eps_y) / (1 + gamma)
    in_effect = asd.effective_guidance(lam, gamma, kappa)
    close(asd.generator_grad(eps_uncond, eps_y, eps_phi, lam),
          kappa / (1 + gamma) * asd.sds_grad(eps_uncond, eps_y, eps, in_effect))


@given(shapes, seeds, convex, learnt)
def test_lag_is_measured(shape, seed, gamma, kappa):
    """learnt_share gives κ back, for each sample its own; 1 for Eq. 10's minimiser."""
    eps, eps_y = noise(seed, shape, 2)
    kappas = kappa * torch.arange(1, len(eps) + 1).double()
    eps_phi = eps_y + kappas.reshape(-1, 1, 1, 1) * (eps - eps_y) / (1 + gamma)
    close(asd.learnt_share(eps, eps_phi, eps_y, gamma), kappas)
    close(asd.learnt_share(eps, asd.optimal_eps_phi(eps, eps_y, gamma), eps_y, gamma), 1.0)


@given(mixtures(), levels, convex, guidance, seeds)
def test_lag_of_an_exact_phi_is_none(mixture, t, gamma, lam, seed):
    """On the exact prior, with the exact φ of a lone particle: κ = 1, Eq. 7 is SDS at λ_eff."""
    s = scene(mixture, t, n=1, seed=seed)
    eps_g = particle_eps(s.x_t.detach(), s.x0, s.alpha_t, s.sigma_t)
    eps_phi = asd.optimal_eps_phi(eps_g, s.eps_y, gamma)
    close(asd.learnt_share(s.noise, eps_phi, s.eps_y, gamma), 1.0, 1e-8)
    close((1 + gamma) * asd.generator_grad(s.eps_uncond, s.eps_y, eps_phi, lam),
          asd.sds_grad(s.eps_uncond, s.eps_y, s.noise, asd.effective_guidance(lam, gamma)), 1e-8)


@pytest.mark.parametrize("gamma, kappa", [(-1.0, 1.0), (-2.0, 0.5), (0.0, 0.0), (0.0, -0.1)])
def test_lag_has_no_guidance_without_a_minimiser_or_a_share(gamma, kappa):
    with pytest.raises(ValueError, match="gamma > -1 and kappa > 0"):
        asd.effective_guidance(7.5, gamma, kappa)


@pytest.mark.parametrize("gamma", [-1.0, -1.5])
def test_lag_cannot_be_measured_without_a_minimiser(gamma):
    with pytest.raises(ValueError, match="no minimiser"):
        asd.learnt_share(*noise(0, (2, 1, 2, 2), 3), gamma)


# ---------------------------------------------------------------------------------------------
# What a coefficient may be, and what comes back
# ---------------------------------------------------------------------------------------------

COEFFICIENTS = {                                  # function: (number of tensors, coefficients)
    "add_noise": (2, (0.8, 0.6)), "cfg_noise": (2, (7.5,)), "classifier_score": (2, (0.6,)),
    "sds_grad": (3, (7.5, 0.5)), "generator_grad": (3, (7.5, 0.5)),
    "discriminator_loss": (5, (0.3, -0.7)), "discriminator_loss_text": (3, (-0.5,)),
    "optimal_eps_phi": (2, (-0.5,)), "gradient_penalty": (2, (0.6,)),
}
FORMS = {"float": float, "0-d": torch.tensor, "per image": lambda c: torch.full((2, 1, 1, 1), c)}
DTYPES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("name, form, dtype", [*itertools.product(COEFFICIENTS, FORMS, DTYPES)])
def test_coefficients_may_be_numbers_or_tensors(name, form, dtype):
    """Float, 0-d or [B, 1, 1, 1], fp32 or not: the same result, in the dtype of ε, losses and norms
    at least in float32."""
    count, coefficients = COEFFICIENTS[name]
    tensors = noise(0, (2, 2, 3, 3), count)
    reference = getattr(asd, name)(*tensors, *coefficients)
    result = getattr(asd, name)(*[t.to(dtype) for t in tensors],
                                *[FORMS[form](c) for c in coefficients])
    least = torch.promote_types(dtype, torch.float32) if reference.ndim < 4 else dtype
    assert result.dtype == least and result.shape == reference.shape
    error = (result.double() - reference).abs().max()
    assert error <= DTYPES[dtype] * (1 + reference.abs().max())


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.5])
def test_a_picture_s_sum_does_not_overflow_half_precision(gamma):
    tensors = [4 * v for v in noise(0, (1, 4, 96, 96), 3)]
    loss = asd.discriminator_loss_text(*[v.half() for v in tensors], gamma)
    torch.testing.assert_close(loss.double(), asd.discriminator_loss_text(*tensors, gamma),
                               rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_one_coefficient_per_image(name):
    """[B, 1, 1, 1] weighs each image by its own; a loss is then the mean over the images."""
    count, coefficients = COEFFICIENTS[name]
    tensors, factors = noise(0, (3, 2, 3, 3), count), torch.tensor([1.0, 1.25, 1.5]).double()
    batch = getattr(asd, name)(*tensors, *[c * factors.reshape(3, 1, 1, 1) for c in coefficients])
    single = [getattr(asd, name)(*[t[b:b + 1] for t in tensors],
                                 *[c * factors[b].item() for c in coefficients]) for b in range(3)]
    close(batch, torch.cat(single) if batch.ndim else torch.stack(single).mean())


# ---------------------------------------------------------------------------------------------
# All of it together: every method at its optimum, on an exact prior (claims/exact.py)
# ---------------------------------------------------------------------------------------------

def test_methods_on_the_exact_mixture_are_in_order():
    """Guidance pulls VSD off p(x0|y) and γ < 0 brings ASD back towards it; over three seeds the
    standard deviation of each of these discrepancies was below 0.005."""
    sds, vsd, ours, unguided = (
        mixture_experiment(two_rings(), *row, particles=128, steps=150)[1] for row in (
            ("sds", 1.0, None), ("vsd", 7.5, None), ("asd", 7.5, -0.5), ("vsd", 1.0, None)))
    assert sds > vsd + 0.1 and vsd > ours + 0.05 and ours > unguided + 0.1
    assert unguided < 0.05                    # what 256 independent draws from p(x0|y) would have


def test_asd_runs_as_vsd_at_lam_eff():
    """λ 7.5 and γ −0.5 against λ_eff 4.25: Adam ignores the gain, so the particles coincide."""
    ours, vsd, guided = (mixture_experiment(two_rings(), *row, steps=100)[0] for row in (
        ("asd", 7.5, -0.5), ("vsd", 4.25), ("vsd", 7.5)))
    assert (ours - vsd).abs().max() < 1e-4
    assert (ours - guided).abs().max() > 0.1


def test_mmd_against_sampling():
    """The closed-form discrepancy agrees with the same quantity on samples of p(x0|y)."""
    g, prior = torch.Generator().manual_seed(0), two_rings()
    particles, z = randn(50, 2, generator=g), prior.sample(4000, y=Y, generator=g)

    def k(a, b):
        return torch.exp(-0.5 * torch.cdist(a, b) ** 2).mean()

    sampled = k(particles, particles) - 2 * k(particles, z) + k(z[:2000], z[2000:])
    assert mmd(particles, prior) == pytest.approx(math.sqrt(sampled), abs=0.01)
