"""The neighbours: each row's gradient is its published form, written out by hand.

    φ           claim                                    test
    CSD         coefficient table, schedule              test_csd_…
    NFSD        both sides of t = 200                    test_nfsd_…
    Bridge      two stages; the ODEs' known ends         test_bridge_…
    Corrective  SDS where b_k = x0; unbiased at data     test_lmc_…
    Exact       E[ε | x_t]; λ_eff                        test_exact_…

test_equation checks the pure functions, test_every_wrong_sign_is_noticed that the same check fails
for each sign flipped in them. Oracles: tables, closed forms on the exact prior (a Gaussian mixture
behind the interface of asd.Prior, float64), and test_distill.py's tiny random pipeline.
"""
# ruff: noqa: F811 (fixtures are imported by their names)
import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import asd
import prior as prior_file
import variants
from asd import NoisePhi, State
from claims.exact import mmd
from cli.files import load_tensors, tensors
from conftest import GaussianMixture, cosine, particle_eps, randn
from prior import Latents, ddim_samples, ode_end, one_step_x0
from test_asd import close, mutants, noise, seeds, shapes
from test_distill import (  # noqa: F401 (fixtures)
    PROMPT,
    counted,
    cuda,
    folders,
    load,
    needs_tiny_sd,
    prior,
    rng,
    same,
    tiny,
)
from test_runs import caller, contents, metrics, model  # noqa: F401 (a fixture)
from test_runs import one_line as of_a_command
from tiny import corrective, data, training
from tiny.corrective import Bias, save_bias
from tiny.exact import two_rings
from variants import (
    CSD,
    CSD_SCHEDULES,
    METHODS,
    NFSD,
    Bridge,
    Corrective,
    Exact,
    Network,
)

guidance, gammas = st.floats(1.1, 100.0), st.floats(-0.9, 10.0)
ROWS = {**METHODS, "exact": replace(asd.METHODS["vsd"], phi=Exact)}


# -------------------------------------------------------------------------------------- helpers
class ExactPrior:
    """A Gaussian mixture that answers like Prior; a prompt's last word names its class."""

    name, device = "exact", torch.device("cpu")

    def __init__(self, mixture, shape=None, steps=1000, words=()):
        self.mixture, self.steps, self.words = mixture, steps, ["", *words]
        self.shape = shape or (mixture.means.shape[1], 1, 1)

    def alpha_sigma(self, t):
        angle = 0.5 * math.pi * (t.double() + 1) / (self.steps + 1)
        return angle.cos().view(-1, 1, 1, 1), angle.sin().view(-1, 1, 1, 1)

    def encode_text(self, prompts):
        rows = [self.words.index(prompt.split(" ")[-1]) for prompt in prompts]
        return torch.tensor(rows, dtype=torch.float64).view(-1, 1, 1)

    def eps(self, x_t, t, cond):
        out, flat = torch.empty(x_t.shape, dtype=torch.float64), x_t.flatten(1)
        alpha_t, sigma_t = (level.flatten(1) for level in self.alpha_sigma(t))
        for number in cond.unique():
            rows = cond.flatten() == number
            y = None if number == 0 else int(number) - 1
            eps = self.mixture.eps(flat[rows], alpha_t[rows], sigma_t[rows], y)
            out[rows] = eps.view_as(x_t[rows])
        return out


class ScriptedPrior(ExactPrior):
    """Predicts given noise: answers[i] [B, C, H, W] for its word number i."""

    def __init__(self, answers, words=()):
        mixture = GaussianMixture(torch.zeros(1, 1), [1.0])
        super().__init__(mixture, answers[0].shape[1:], words=words)
        self.answers = answers

    def eps(self, x_t, t, cond):
        return torch.stack([self.answers[int(word)][i] for i, word in enumerate(cond.flatten())])


def gaussian(mean=0.0, std=1.0, dim=3, **kwargs):
    return ExactPrior(GaussianMixture(torch.full((1, dim), mean), [std]), **kwargs)


def bracket(phi, eps_uncond, eps_y, eps, lam, t=None, cond=None, x_t=None):
    """Eq. 7's bracket with this φ, which is given what it asks for beside ε_∅ and ε_y."""
    x_t = eps if x_t is None else x_t
    t = torch.full((len(eps),), 500) if t is None else t
    cond = torch.ones(len(eps), 1, 1, dtype=torch.float64) if cond is None else cond
    answers = {"uncond": eps_uncond, "y": eps_y}
    if isinstance(phi, (CSD, NFSD)):
        for name, prompt in phi.prompts(getattr(phi, "step", 0), cond, cond).items():
            answers[name] = phi.prior.eps(x_t, t, prompt)
    return asd.generator_grad(eps_uncond, eps_y, phi(x_t, t, cond, eps, None, answers), lam)


def table(row, *tensors):
    """cond·ε_y + neg·ε_neg + null·ε_∅ + noise·ε."""
    return sum(c * tensor for c, tensor in zip(row, tensors))


def make_state(prior, method, generator=None, seed=0, options=None):
    random = rng(seed)
    generator = generator(random) if generator else Latents(prior, 2, random)
    phi = asd.make_phi(method, prior, PROMPT, **(options or {}))
    return State(generator, phi, method, random)


def go(prior, method, state=None, micro_batch=None, **kwargs):
    state = state or make_state(prior, method, **kwargs)
    asd.distill(prior, state.generator, prior.encode_text([PROMPT]), method, state=state,
                micro_batch=micro_batch)
    return state


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A corrective that changes nothing yet."""
    path = tmp_path_factory.mktemp("b") / "b.safetensors"
    save_bias(Bias(4), path)
    return path


def options_of(name, untrained):
    """What a φ is made with where its default will not do: the tiny model has no corrective."""
    return {"corrective": untrained} if name == "lmc" else {}


# ---------------------------------------------------------------------------- the pure functions
def known_end(x, alpha_t, sigma_t, mean, std):
    """The probability-flow ODE of N(m, s²) scales: x0 = m + s (x_t − α m) / √(α²s² + σ²)."""
    return mean + std * (x - alpha_t * mean) / (alpha_t ** 2 * std ** 2 + sigma_t ** 2) ** 0.5


def ode_error(function, steps, mean=1.5, std=0.4):
    exact = gaussian(mean, std, steps=8192)
    x_t, t = randn(4, 3, 1, 1, generator=rng()), torch.tensor([8000, 6000, 4096, 100])
    null = exact.encode_text([""] * 4)
    end = function(lambda x, t: exact.eps(x, t, null), x_t, t, steps, exact.alpha_sigma)
    return (end - known_end(x_t, *exact.alpha_sigma(t), mean, std)).abs().max().item()


def check_row_eps_phi(function):
    tensors, lam = noise(0, (2, 3, 4, 4), 4), 7.5
    eps_y, eps_neg, eps_uncond, eps = tensors
    for row in ((1, 0, -1, 0), (1, -1, 0, 0), (0.3, 0.7, -1.3, 2.0)):
        eps_phi = function(row, eps_y, eps_neg, eps_uncond, eps, lam)
        close(asd.generator_grad(eps_uncond, eps_y, eps_phi, lam),
              (lam - 1) * table(row, *tensors))
    close(function((1, 0, -1, 0), eps_y, eps_neg, eps_uncond, eps, lam), eps_y)


def check_one_step_x0(function):
    x0, eps = noise(0, (2, 3, 4, 4), 2)
    close(function(asd.add_noise(x0, eps, 0.8, 0.6), eps, 0.8, 0.6), x0)


def check_ode_end(function):
    assert ode_error(function, 256) < 0.02
    x_t, eps = noise(1, (4, 3, 1, 1), 2)
    t, levels = torch.tensor([5, 50, 500, 999]), gaussian().alpha_sigma
    close(function(None, x_t, t, 1, levels, eps), one_step_x0(x_t, eps, *levels(t)))


def check_bridge_eps_phi(function):
    x_t, source, target, a, b = noise(0, (2, 3, 4, 4), 5)
    alpha_t, sigma_t = cosine(0.3)
    phi = function(source, target, a, b, alpha_t, sigma_t, 40.0)
    close(asd.generator_grad(source, target, phi, 40.0), 40 * alpha_t / sigma_t * (a - b))
    ends = [one_step_x0(x_t, eps, alpha_t, sigma_t) for eps in (source, target)]
    close(function(source, target, *ends, alpha_t, sigma_t, 40.0), source)


def check_corrective_eps_phi(function):
    x0, b, eps = noise(0, (2, 3, 4, 4), 3)
    close(function(x0, b, eps, 0.8, 0.6), (asd.add_noise(x0, eps, 0.8, 0.6) - 0.8 * b) / 0.6)


def check_corrective_loss(function):
    close(function(torch.tensor([3.0, 1.0]).double(), torch.tensor([1.0, 1.0]), 0.8, 0.6),
          (0.48 * 2) ** 2 / 2)


def check_mean_noise(function):
    particles, x_t = randn(5, 6, generator=rng()), randn(3, 6, generator=rng(1))
    levels = [cosine(t) for t in (0.1, 0.5, 0.9)]
    alpha_t, sigma_t = torch.tensor(levels, dtype=torch.float64).T.reshape(2, 3, 1, 1, 1)
    shaped = [x.view(-1, 6, 1, 1) for x in (x_t, particles)]
    alike = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    for h in (0.0, 0.7):
        for mask in (None, alike):
            rows = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask
            expected = [particle_eps(x_t[i], particles[rows[i]], *levels[i], h) for i in range(3)]
            close(function(*shaped, alpha_t, sigma_t, mask, h).flatten(1), torch.stack(expected))


CHECKS = {name[len("check_"):]: check for name, check in list(globals().items())
          if name.startswith("check_")}


def subject(name):
    return next(getattr(file, name) for file in (variants, prior_file, corrective)
                if hasattr(file, name))


@pytest.mark.parametrize("name", CHECKS)
def test_equation(name):
    CHECKS[name](subject(name))


@pytest.mark.parametrize("name", CHECKS)
def test_every_wrong_sign_is_noticed(name):
    candidates, survivors = list(mutants(subject(name))), []
    for place, mutant in candidates:
        try:
            CHECKS[name](mutant)
            survivors.append(place)
        except Exception as error:
            assert place != "unchanged", error
    assert survivors == ["unchanged"] and len(candidates) > 1


# ------------------------------------------------------------------- the rows, on random tensors
@given(shapes, seeds, guidance)
def test_sds_row(shape, seed, lam):
    """SDS is (λ, 0, 1 − λ, −1)."""
    eps_y, eps_uncond, eps = noise(seed, shape, 3)
    close(bracket(NoisePhi(), eps_uncond, eps_y, eps, lam),
          table((lam, 0, 1 - lam, -1), eps_y, 0, eps_uncond, eps))


@given(shapes, seeds, guidance, st.integers(0, 60))
def test_csd_row(shape, seed, lam, step):
    """(λ − 1) times the published (cond, neg, null, noise), at any step of a run of 40."""
    eps_y, eps_neg, eps_uncond, eps = tensors = noise(seed, shape, 4)
    late, half = min(1, step / 40), min(1, step / 20)
    rows = {"classifier": (1, 0, -1, 0), "coarse": (1, -half, half - 1, 0),
            "refine": (1, -1 + late / 2, -late / 2, 0)}
    assert rows.keys() == CSD_SCHEDULES.keys()
    for schedule, row in rows.items():
        phi = CSD(ScriptedPrior([eps_uncond, eps_neg], ["bad"]), [], lam, 40, "bad", schedule)
        phi.step = step
        close(bracket(phi, eps_uncond, eps_y, eps, lam), (lam - 1) * table(row, *tensors))


def test_csd_takes_a_schedule_of_ones_own():
    eps_y, eps_neg, eps_uncond, eps = noise(1, (2, 1, 3, 3), 4)
    row = [1.0, -0.25, -0.75, 0.0]
    phi = CSD(ScriptedPrior([eps_uncond, eps_neg], ["bad"]), [], 7.5, 40, "bad", [row, row, 1.0])
    close(bracket(phi, eps_uncond, eps_y, eps, 7.5),
          6.5 * table(row, eps_y, eps_neg, eps_uncond, eps))


def test_csd_is_eps_y_by_default():
    eps_y, eps_uncond, eps = noise(0, (2, 1, 3, 3), 3)
    phi = CSD(ScriptedPrior([eps_uncond]), [], 7.5, 10)
    close(phi(eps, None, None, eps, None, {"uncond": eps_uncond, "y": eps_y}), eps_y)


def test_csd_has_no_gradient_at_lam_1():
    with pytest.raises(ValueError, match="--lam 1"):
        CSD(ScriptedPrior([torch.zeros(1, 1, 1, 1)]), [], 1.0, 10)


@given(shapes, seeds, guidance)
def test_nfsd_row(shape, seed, lam):
    """λ(ε_y − ε_∅) + δ_D: δ_D is ε_∅ for t < 200 and ε_∅ − ε_neg above, picture by picture."""
    shape = (4, *shape[1:])
    eps_y, eps_neg, eps_uncond, eps = tensors = noise(seed, shape, 4)
    phi = NFSD(ScriptedPrior([eps_uncond, eps_neg], ["bad"]), [], "bad")
    got = bracket(phi, eps_uncond, eps_y, eps, lam, torch.tensor([0, 199, 200, 999]))
    close(got[:2], table((lam, 0, 1 - lam, 0), *tensors)[:2])
    close(got[2:], table((lam, -1, 1 - lam, 0), *tensors)[2:])


@given(shapes, seeds, st.floats(1.0, 100.0))
def test_bridge_rows(shape, seed, lam):
    """Stage 1 is SDS; stage 2 is λ(ε_tgt − ε_src), also at λ = 1, where guidance asks for no ∅."""
    eps_y, eps_uncond, source, target, eps = noise(seed, shape, 5)
    prior = ScriptedPrior([eps_uncond, eps_y, target, source], ["y", "real", "painted"])
    phi = Bridge(prior, ["y"], lam, 10, "painted", "real", bridge_start=0.5)
    y, null = prior.encode_text(["y"] * len(eps)), prior.encode_text([""])
    assert phi.prompts(4, y, null) == {}
    close(bracket(phi, eps_uncond, eps_y, eps, lam),
          table((lam, 0, 1 - lam, -1), eps_y, 0, eps_uncond, eps))
    prompts = phi.prompts(5, y, null)
    assert (prompts["y"] == 2).all() and (prompts["uncond"] == 3).all()
    close(bracket(phi, source, target, eps, lam, cond=prompts["y"]), lam * (target - source))


@given(shapes, seeds, guidance)
def test_lmc_row(shape, seed, lam):
    """λ(ε_y − ε_∅) + (α/σ)(b_k(x0, t) − x̂0); where b_k = x0, it is SDS's row."""
    eps_y, eps_uncond, eps, x0, b = noise(seed, shape, 5)
    prior, t = ScriptedPrior([eps_uncond]), torch.full((len(eps),), 300)
    alpha_t, sigma_t = prior.alpha_sigma(t)
    x_t = asd.add_noise(x0, eps, alpha_t, sigma_t)
    phi = lmc(prior, lambda x, t: b)
    expected = lam * (eps_y - eps_uncond) \
        + alpha_t / sigma_t * (b - (x_t - sigma_t * eps_uncond) / alpha_t)
    close(bracket(phi, eps_uncond, eps_y, eps, lam, t, x_t=x_t), expected)
    phi = lmc(prior, lambda x, t: x)
    close(bracket(phi, eps_uncond, eps_y, eps, lam, t, x_t=x_t),
          table((lam, 0, 1 - lam, -1), eps_y, 0, eps_uncond, eps))


def lmc(prior, b_k):
    """The φ of LMC-SDS with this function for its network."""
    phi = Corrective.__new__(Corrective)
    NoisePhi.__init__(phi)
    phi.prior, phi.b_k = prior, b_k
    return phi


# ------------------------------------------------------------------------- SDS-Bridge in detail
def test_bridge_ode_converges_to_the_known_ends():
    """On a Gaussian; the error of N steps falls like 1/N, one step is far off."""
    errors = [ode_error(ode_end, n) for n in (1, 16, 64, 256)]
    assert errors[0] > 0.5 and errors[3] < 0.02
    assert 3 < errors[1] / errors[2] < 5 and 3 < errors[2] / errors[3] < 5


def test_bridge_of_two_gaussians_is_the_known_one():
    """λ(α/σ)(x0_src − x0_tgt): with equal spreads s it is (m_src − m_tgt)(1 − sα/√(α²s² + σ²))."""
    means = torch.tensor([[0.0, 0.0], [2.0, -1.0], [-1.0, 1.0]])
    exact = ExactPrior(GaussianMixture(means, [0.5] * 3, labels=range(3)), steps=4096,
                       words=["y", "painted", "real"])
    phi = Bridge(exact, ["y"], 3.0, 10, "painted", "real", bridge_steps=200)
    x_t, t = randn(3, 2, 1, 1, generator=rng()), torch.tensor([3900, 2000, 400])
    prompts = phi.prompts(0, exact.encode_text(["y"] * 3), None)
    eps_source, eps_target = (exact.eps(x_t, t, prompts[name]) for name in ("uncond", "y"))
    grad = bracket(phi, eps_source, eps_target, x_t, 3.0, t, prompts["y"])
    a, s = exact.alpha_sigma(t)
    shift = (means[1] - means[2]).view(2, 1, 1) * (1 - 0.5 * a / (0.25 * a ** 2 + s ** 2) ** 0.5)
    torch.testing.assert_close(grad, 3 * a / s * shift, rtol=0.04, atol=0.02)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("lam", [1.0, 40.0])
def test_bridge_from_a_thing_to_itself_is_zero(prior, steps, lam):
    method = replace(METHODS["bridge"], steps=2, lam=lam)
    options = {"source_words": "a blue fox", "target_words": "a blue fox", "bridge_steps": steps}
    state = make_state(prior, method, options=options)
    before, norms = state.generator.theta.detach().clone(), []
    asd.distill(prior, state.generator, prior.encode_text([PROMPT]), method, state=state,
                callback=lambda state, terms: norms.append(terms["grad_norm"]))
    assert max(norms) < 1e-3
    if steps == 1:
        assert norms == [0, 0] and torch.equal(before, state.generator.theta)


def test_bridge_asks_for_the_words_beside_each_prompt(prior):
    """Stage 2 against the prompts spelt out; a prompt is found in any order."""
    phi = Bridge(prior, [PROMPT, "a blue fox"], 40.0, 10, "painting", "a photo of {}")
    y = prior.encode_text(["a blue fox", PROMPT, "a blue fox"])
    prompts = phi.prompts(0, y, None)
    for name, phrase in (("y", "a photo of {}"), ("uncond", "{}, painting")):
        expected = prior.encode_text([phrase.format(text) for text in ("a blue fox", PROMPT)])
        torch.testing.assert_close(prompts[name], expected[[0, 1, 0]])
    with pytest.raises(ValueError, match="asked for a prompt"):
        phi.prompts(0, prior.encode_text(["a red red fox"]), None)


def test_bridge_solves_the_odes_of_each_prompt(prior):
    """Of a batch of two prompts as of each alone."""
    x_t, t = torch.randn(2, *prior.shape, generator=rng()), torch.tensor([800, 300])
    texts = ["a blue fox", PROMPT]

    def eps_phi(known, part):
        phi = Bridge(prior, known, 3.0, 10, "painting", "new {}", 2)
        prompts = phi.prompts(10, prior.encode_text(texts[part]), None)
        questions = {name: (x_t[part], t[part], cond) for name, cond in prompts.items()}
        answers = asd.ask(prior, [questions])[0]
        return phi(x_t[part], t[part], prompts["y"], None, None, answers)
    whole = eps_phi(texts[::-1], slice(2))
    for i in range(2):
        torch.testing.assert_close(eps_phi([texts[i]], slice(i, i + 1)), whole[i:i + 1],
                                   rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options, first", [
    ({}, 5), ({"target_words": "x"}, 5), ({"source_words": "x"}, 0), ({"bridge_start": 0.37}, 4),
    ({"source_words": "x", "bridge_start": 1.0}, 10)])
def test_bridge_begins(prior, options, first):
    assert Bridge(prior, [PROMPT], 40.0, 10, **options).first_step == first


def test_words_are_put_around_the_prompt_or_after_it():
    assert variants.with_words("a fox", "a drawing of {}") == "a drawing of a fox"
    assert variants.with_words("a fox", "painting") == "a fox, painting"
    assert variants.with_words("a fox", "") == "a fox"


# ---------------------------------------------------------------------------- LMC-SDS in detail
class Linear(nn.Module):
    """b(x0, t) = a_t x0 + c_t, a pair per level."""

    def __init__(self, levels):
        super().__init__()
        self.levels = torch.tensor(levels)
        self.a = nn.Parameter(torch.ones(len(levels), 1, 1, 1, dtype=torch.float64))
        self.c = nn.Parameter(torch.zeros_like(self.a))

    def forward(self, x0, t):
        i = (t[:, None] == self.levels).long().argmax(1)
        return self.a[i] * x0 + self.c[i]


def closed_form(prior, x0, t, mean, std):
    """E[x̂0 | x0, t] = m + κ(x0 − m), κ = α²s²/(α²s² + σ²): the prior N(m, s²) is known."""
    alpha_t, sigma_t = prior.alpha_sigma(t)
    kappa = (alpha_t * std) ** 2 / ((alpha_t * std) ** 2 + sigma_t ** 2)
    return mean + kappa * (x0 - mean)


def train(network, exact, levels, mean, std, steps, lr, batch=32):
    """Train a corrective on pictures of an exact Gaussian prior. -> the network"""
    g, null = rng(), exact.encode_text([""])
    dtype = next(network.parameters()).dtype
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0, eps = randn(2, batch, *exact.shape, generator=g).to(dtype)
        t = torch.tensor(levels)[torch.randint(len(levels), (batch,), generator=g)]
        x0 = mean + std * x0
        x0_hat, *levels_t = variants.estimate(exact, x0, t, eps, null.expand(batch, -1, -1))
        loss, _ = corrective.losses(network, x0, t, x0_hat, *levels_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def test_lmc_corrective_learns_the_closed_form_and_unbiases_the_projection():
    """A linear b_k on the exact Gaussian prior.

    At data x0 the corrected projection gradient is 0 on average (over ε and −ε: exactly, as x̂0 is
    linear), SDS's pulls to the prior's mean.
    """
    exact, levels, mean, std = gaussian(1.0, 0.8, dim=16), [100, 400, 700, 950], 1.0, 0.8
    b = train(Linear(levels), exact, levels, mean, std, 600, 0.1, 64)
    x0 = mean + std * randn(4, *exact.shape, generator=rng(5))
    t, eps = torch.tensor(levels), randn(4, *exact.shape, generator=rng(6))
    with torch.no_grad():
        error = (b(x0, t) - closed_form(exact, x0, t, mean, std)).abs().amax((1, 2, 3))
    assert (error < torch.tensor([0.03, 0.03, 0.05, 0.2])).all(), error
    alpha_t, sigma_t = exact.alpha_sigma(t)

    def projection(phi):
        total, null = 0.0, exact.encode_text([""] * 4)
        for noise_added in (eps, -eps):
            x_t = asd.add_noise(x0, noise_added, alpha_t, sigma_t)
            eps_uncond = exact.eps(x_t, t, null)
            answers = {"uncond": eps_uncond, "y": eps_uncond}
            total += (eps_uncond - phi(x_t, t, null, noise_added, None, answers)) / 2
        return total
    best = lmc(exact, lambda x0, t: closed_form(exact, x0, t, mean, std))
    close(projection(best), 0.0)
    blur = x0 - closed_form(exact, x0, t, mean, std)
    close(projection(NoisePhi()), alpha_t / sigma_t * blur)
    with torch.no_grad():
        learnt, sds = projection(lmc(exact, b)), projection(NoisePhi())
    assert (learnt.flatten(1).norm(dim=1) < 0.15 * sds.flatten(1).norm(dim=1)).all()


def test_lmc_network_learns_the_closed_form():
    """The small U-Net itself, in float32: most of the blur is found, at each of two levels."""
    exact, levels, std = gaussian(0.0, 1.0, dim=128, shape=(2, 8, 8)), [400, 800], 1.0
    torch.manual_seed(0)
    network = train(Bias(2, 8), exact, levels, 0.0, std, 80, 1e-2)
    x0 = std * randn(16, *exact.shape, generator=rng(9)).float()
    for level in levels:
        t = torch.full((16,), level)
        with torch.no_grad():
            right = closed_form(exact, x0, t, 0.0, std)
            assert (network(x0, t) - right).norm() < 0.35 * (x0 - right).norm(), level


def test_lmc_untrained_is_sds(prior, untrained):
    sds = go(prior, replace(asd.METHODS["sds"], steps=1, lam=2.0))
    lmc = go(prior, replace(METHODS["lmc"], steps=1), options={"corrective": untrained})
    torch.testing.assert_close(sds.generator.theta.grad, lmc.generator.theta.grad,
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (7.0, -3.0)])
def test_lmc_network_follows_brightness_and_contrast(scale, shift):
    """Standardised per picture and put back: b_k(s x0 + c) = s b_k(x0) + c."""
    torch.manual_seed(0)
    network, x0, t = Bias(4, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    assert torch.allclose(network(x0, t), x0, atol=1e-6)
    nn.init.normal_(network.unet.conv_out.weight)
    b = network(x0, t)
    assert (b - x0).abs().max() > 0.1
    torch.testing.assert_close(network(scale * x0 + shift, t), scale * b + shift,
                               rtol=1e-3, atol=1e-3)


def test_lmc_files_that_do_not_fit_are_one_line(prior, tmp_path):
    path = tmp_path / "b.safetensors"
    with pytest.raises(FileNotFoundError, match="is not there"):
        corrective.load_bias(prior, path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no corrective"):
        corrective.load_bias(prior, path)
    save_bias(Bias(3), path)
    with pytest.raises(ValueError, match="is no corrective.*size mismatch for unet.conv_in"):
        corrective.load_bias(prior, path)
    with pytest.raises(ValueError, match="is a folder"):
        corrective.load_bias(prior, tmp_path)
    save_bias(Bias(4), path, model="tiny-sd", unet="0")         # a relative of the model may do
    with pytest.warns(UserWarning, match="was trained for tiny-sd, not for this epsilon"):
        corrective.load_bias(prior, path)


def test_lmc_default_file_is_of_one_model(prior, tmp_path, monkeypatch):
    """It is told by its UNet's weights, in any dtype, and the command that makes it is named."""
    monkeypatch.setattr(corrective, "OWN", tmp_path / "own.safetensors")
    own = corrective.fingerprint(*prior.network.parameters())
    assert own == corrective.fingerprint(*(p.bfloat16() for p in prior.network.parameters()))
    with pytest.raises(FileNotFoundError, match="is not there.*--model.*--out FILE"):
        corrective.load_bias(prior)
    save_bias(Bias(4), corrective.OWN, model="epsilon", unet=own)
    assert corrective.load_bias(prior)
    for name, part in (("tiny-sd", "for tiny-sd, not for this epsilon"), ("epsilon", "another")):
        save_bias(Bias(4), corrective.OWN, model=name, unet="0")
        with pytest.raises(ValueError, match=part):
            corrective.load_bias(prior)
    monkeypatch.setattr(prior, "name", "tiny-sd")
    with pytest.raises(ValueError, match="train-corrective --model tiny-sd makes it$"):
        corrective.load_bias(prior)


def test_shipped_corrective_is_small_and_of_the_shipped_weights(request):
    if not corrective.OWN.exists():
        pytest.skip(f"{corrective.OWN} is not here")
    assert corrective.OWN.stat().st_size < 2e6
    assert corrective.load_bias(request.getfixturevalue("tiny"))


@pytest.mark.parametrize("lam", [0.0, 1.0, 3.0])
def test_ddim_samples_follow_the_guided_ode(lam):
    exact = ExactPrior(GaussianMixture([[-1.0], [2.0]], [0.5, 0.5], labels=[0, 1]),
                       words=["y", "z"])
    texts, x_T = ["a y", "a z"] * 2, randn(4, 1, 1, 1, generator=rng())
    y, null = exact.encode_text(texts), exact.encode_text([""] * 4)

    def guided(x, t):
        return exact.eps(x, t, null) + lam * (exact.eps(x, t, y) - exact.eps(x, t, null))
    expected = ode_end(guided, x_T, torch.full((4,), 999), 7, exact.alpha_sigma)
    close(ddim_samples(exact, texts, x_T, 7, lam), expected)


def test_train_corrective_and_use_it(cli, model, tmp_path, monkeypatch, capsys):
    """The command; a killed one goes on; pictures come from the prior or from a folder."""
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    monkeypatch.setattr(training, "leave_a_core", lambda: None)    # it takes all cores but one
    Path("prompts").write_text("a red apple\na blue fox\n")
    flags = ["train-corrective", "--model", model, "--samples", "3", "--ddim", "2", "--batch", "2",
             "--minutes", "0.003", "--out"]
    assert variants.main([*flags, "made/b.safetensors"]) == 0
    assert capsys.readouterr().out == "made/b.safetensors\n"
    made, sample = contents("data"), variants.ddim_samples
    trained = Path("made/b.safetensors").read_bytes()
    assert variants.main([*flags, "made/b.safetensors"]) == 2
    assert "nothing is written over" in capsys.readouterr().err
    assert Path("made/b.safetensors").read_bytes() == trained
    Path("made/b.safetensors").unlink()                            # as if killed before its end
    monkeypatch.setattr(variants, "ddim_samples", None)            # no sample is made again
    assert variants.main([*flags, "made/b.safetensors"]) == 0
    assert contents("data").keys() == made.keys()
    monkeypatch.setattr(variants, "ddim_samples", sample)
    status, _, err = cli("--method", "lmc", "--corrective", "made/b.safetensors", "--steps", 1)
    assert status == 0, err
    assert variants.main([*flags, "c", "--prompts", "prompts"]) == 0
    Path("pictures").mkdir()
    assert variants.main([*flags, "d", "--images", "pictures"]) == 2
    assert "no folder with pictures" in capsys.readouterr().err
    Path("pictures/a.png").write_bytes(Path("run/final.png").read_bytes())
    assert variants.main([*flags, "d", "--images", "pictures"]) == 0
    assert len(list(Path("data").glob("*samples*"))) == 2
    assert len(list(Path("data").glob("*.checkpoint.*"))) == 3    # each has its own
    Path("prompts").write_text("a blue fox\n")
    assert variants.main([*flags, "e", "--prompts", "prompts", "--lr", "1e-3"]) == 0
    assert len(list(Path("data").glob("*samples*"))) == 3
    assert len(list(Path("data").glob("*.checkpoint.*"))) == 4


@pytest.mark.parametrize("flags, part", [
    (["--model", "nowhere"], "nowhere"), (["--device", "abacus"], "--device abacus"),
    (["--out", "."], "there already"), (["--out", "empty"], "there already"),
    (["--out", "/dev/null"], "there already"), (["--out", ""], "--out cannot be ''"),
    (["--out", None, "--model", "some/sd"], "needs an --out FILE"),
    (["--prompts", "binary"], "not UTF-8"), (["--prompts", "empty"], "holds no prompt")])
def test_train_corrective_mistake_is_one_line(model, tmp_path, monkeypatch, capsys,
                                              flags, part):
    """… before anything is sampled or trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    monkeypatch.setattr(corrective, "kept_samples", None)
    Path("binary").write_bytes(b"\xff\xfe")
    Path("empty").write_text("\n \n")
    given = {"--model": model, "--out": "b", "--device": "cpu"} | dict(zip(flags[::2], flags[1::2]))
    words = ["train-corrective"]
    for name, value in given.items():
        if value is not None:
            words += [name, value]
    assert variants.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("variants.py: ") and err.count("\n") == 1 and part in err
    assert not Path("data").exists()


# ------------------------------------------------------------------------------ exact φ in detail
@given(seeds, st.integers(1, 6), gammas, guidance, st.floats(0, 1))
def test_exact_is_vsd_at_lam_eff(seed, count, gamma, lam, bandwidth):
    """ASD's bracket with the exact φ is 1/(1 + γ) times VSD's at λ_eff = 1 + (1 + γ)(λ − 1)."""
    eps_uncond, eps_y, eps, x0 = noise(seed, (count, 2, 3, 3), 4)
    prior, t = ScriptedPrior([eps_uncond]), torch.randint(20, 980, (count,), generator=rng(seed))
    x_t = asd.add_noise(x0, eps, *prior.alpha_sigma(t))

    def exact_bracket(gamma, lam):
        phi = Exact(prior, [], gamma, bandwidth)
        return bracket(phi, eps_uncond, eps_y, eps, lam, t, x_t=x_t)
    vsd = exact_bracket(0.0, 1 + (1 + gamma) * (lam - 1))
    close(exact_bracket(gamma, lam), vsd / (1 + gamma))


def test_exact_blurs_its_particles():
    eps_y, eps, x0 = noise(0, (3, 2, 2, 2), 3)
    prior, t = ScriptedPrior([eps_y]), torch.tensor([300, 500, 900])
    levels, cond = prior.alpha_sigma(t), torch.ones(3, 1, 1)
    x_t = asd.add_noise(x0, eps, *levels)
    for h in (0.0, 0.7):
        close(Exact(prior, [], 0.0, h)(x_t, t, cond, eps, None, {"y": eps_y}),
              variants.mean_noise(x_t, x0, *levels, None, h))


@given(seeds, gammas, guidance)
def test_exact_of_one_particle_is_sds_at_lam_eff(seed, gamma, lam):
    """A single particle's noise is known: ε_g = ε, up to the particle's own rounding."""
    eps_uncond, eps_y, eps = noise(seed, (1, 2, 3, 3), 3)
    lam_eff = 1 + (1 + gamma) * (lam - 1)
    close(bracket(Exact(ScriptedPrior([eps]), [], gamma), eps_uncond, eps_y, eps, lam),
          asd.sds_grad(eps_uncond, eps_y, eps, lam_eff) / (1 + gamma))


def test_exact_keeps_prompts_apart():
    eps_y, eps = noise(0, (5, 2, 1, 1), 2)
    t, phi = torch.tensor([100, 500, 900, 950, 700]), Exact(ScriptedPrior([eps]), [], 0.0)
    cond = torch.tensor([1.0, 2, 1, 2, 1]).view(-1, 1, 1)
    whole = phi(eps, t, cond, eps.flip(0), None, {"y": eps_y})
    for number in (1, 2):
        rows = cond.flatten() == number
        part = phi(eps[rows], t[rows], cond[rows], eps.flip(0)[rows], None, {"y": eps_y[rows]})
        close(part, whole[rows])
    together = phi(eps, t, 0 * cond, eps.flip(0), None, {"y": eps_y})
    assert not torch.allclose(together, whole)


@pytest.mark.parametrize("gamma", [-1.0, -2.0])
def test_exact_wants_gamma_above_minus_one(prior, gamma):
    with pytest.raises(ValueError, match="no.*gamma|--gamma"):
        asd.make_phi(replace(ROWS["exact"], gamma=gamma), prior, PROMPT)


def test_exact_spreads_the_particles_of_the_loop():
    """claims/exact.py's experiment through distill(): SDS collapses, an exact φ covers."""
    exact, distances = ExactPrior(two_rings(), words=["y", "z"]), {}

    class Particles(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(randn(96, 2, 1, 1, generator=rng()))

        def forward(self):
            return self.theta
    for name, phi, lam, gamma in (("sds", NoisePhi, 1.0, 0.0), ("vsd", Exact, 1.0, 0.0),
                                  ("guided", Exact, 7.5, 0.0), ("asd", Exact, 7.5, -0.9)):
        method = asd.Method(phi=phi, lam=lam, gamma=gamma, omega="sigma2", t_late=1.0, lr=0.2,
                            lr_end=0.0, steps=100)
        state = State(Particles(), asd.make_phi(method, exact, "y"), method, rng(1))
        asd.distill(exact, state.generator, exact.encode_text(["y"]), method, state=state)
        distances[name] = mmd(state.generator.theta.detach().flatten(1), exact.mixture)
    assert distances["sds"] > 0.5 and distances["guided"] > 0.3, distances
    assert distances["vsd"] < 0.2 and distances["asd"] < 0.2, distances


# ------------------------------------------------------------------------------------- the loop
@pytest.mark.parametrize("name, changes, options, evaluations", [
    ("csd", {}, {}, (2, 2)), ("csd", {}, {"negative": "a blue fox"}, (2, 3)),
    ("nfsd", {}, {}, (3, 3)),
    ("bridge", {}, {}, (2, 2)), ("bridge", {}, {"bridge_start": 0.0}, (2, 2)),
    ("bridge", {"lam": 1.0}, {"bridge_start": 0.0}, (2, 2)),
    ("bridge", {}, {"bridge_steps": 4}, (2, 8)), ("lmc", {}, {}, (2, 2)),
    ("lmc", {"lam": 1.0}, {}, (1, 1)), ("exact", {}, {}, (2, 2))])
def test_unet_evaluations_per_particle_and_step(prior, untrained, name, changes,
                                                options, evaluations):
    method = replace(ROWS[name], steps=2, **changes)
    state = make_state(prior, method, options=options | options_of(name, untrained))
    for i, expected in enumerate(evaluations):
        with counted(prior.network) as counts:
            go(prior, replace(method, steps=i + 1), state)
        assert counts["forward"] == 2 * expected and counts["graph"] == 0


def busy_options(name, untrained):
    """Options with which a φ asks for all that it can."""
    options = options_of(name, untrained)
    if name == "csd":
        options |= {"negative": "a blue fox"}
    if name == "bridge":
        options |= {"bridge_start": 0.0, "bridge_steps": 2}
    return options


@pytest.mark.parametrize("name", ROWS)
def test_micro_batches_change_nothing(prior, untrained, name):
    """An exact φ is always given all particles at once."""
    method = replace(ROWS[name], steps=2, lam=1.0 if name == "bridge" else ROWS[name].lam)
    options, ends = busy_options(name, untrained), []
    for size in (None, 1):
        state = go(prior, method, micro_batch=size, options=options)
        ends.append(state.generator.theta)
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_trained_but_theta(prior, untrained, name):
    before = copy.deepcopy(prior.network.state_dict())
    state = go(prior, replace(ROWS[name], steps=2), options=options_of(name, untrained))
    assert state.opt_phi is None and same(before, prior.network.state_dict())
    assert state.generator.theta.isfinite().all()


@pytest.mark.parametrize("device, dtype", [
    ("cpu", torch.bfloat16), pytest.param("cuda", torch.bfloat16, marks=cuda),
    pytest.param("cuda", torch.float16, marks=cuda),
    pytest.param("cuda", torch.float32, marks=cuda)])
@pytest.mark.parametrize("name", ROWS)
def test_other_devices_and_half_precision(load, untrained, name, device, dtype):
    """One step from the same draws: θ stays float32, and goes where the CPU's float32 sends it."""
    method, gradients = replace(ROWS[name], steps=1, t_min=0.3), []
    for place, kind in (("cpu", torch.float32), (device, dtype)):
        state = go(load("epsilon", place, kind), method, options=busy_options(name, untrained))
        theta = state.generator.theta
        assert theta.dtype == theta.grad.dtype == torch.float32
        gradients.append(theta.grad.cpu().flatten())
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def network(prior, random):
    return Network(prior, prior.encode_text([PROMPT, "a blue fox"]), random, (8, 16))


@pytest.mark.parametrize("name, changes, generator", [
    ("vsd", {}, network), ("lmc", {"fixed_noise": True}, network), ("csd", {}, None),
    ("bridge", {}, None)])
def test_n_plus_m_steps_are_n_then_m(prior, untrained, name, changes, generator):
    """Fixed noise, the network's own draws and the φ that know the step: bit for bit."""
    method = replace((asd.METHODS | METHODS)[name], steps=3, t_late=1.0, **changes)
    options = options_of(name, untrained) | ({"negative": "a blue fox"} if name == "csd" else {})

    def fresh(seed=0):
        made = None if generator is None else lambda random: generator(prior, random)
        return make_state(prior, method, made, seed, options)
    whole, first, second = fresh(), fresh(), fresh(99)
    go(prior, method, whole)
    go(prior, replace(method, steps=1), first)
    load_tensors(second, copy.deepcopy(tensors(first)), 1)
    go(prior, method, second)
    assert second.step == 3 and same(tensors(second), tensors(whole))


# --------------------------------------------------------------------------- the network generator
def test_network_makes_each_prompt_from_fresh_noise(prior):
    made = network(prior, rng())
    samples, again = made(), made()
    assert samples.x0.shape == (2, *prior.shape) and samples.camera is None
    assert torch.equal(samples.cond, made.cond) and not torch.allclose(samples.x0, again.x0)
    assert torch.equal(made.images(), made.images())
    before = made.images()
    made.cond = made.cond.flip(0)                             # the prompt reaches the network
    assert not torch.allclose(before, made.images(), atol=1e-4)


def test_network_comes_from_the_runs_seed_alone(prior):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (network(prior, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert same(one.state_dict(), two.state_dict())
    assert not torch.equal(one.shown, other.shown)
    assert not torch.equal(one.unet.conv_in.weight, other.unet.conv_in.weight)


def test_network_learns_in_every_weight(prior):
    method = replace(asd.METHODS["sds"], steps=2, lr_end=1.0)
    state = make_state(prior, method, lambda random: network(prior, random))
    before = copy.deepcopy(dict(state.generator.named_parameters()))
    go(prior, method, state)
    assert state.opt_theta.param_groups[0]["lr"] == method.lr / 30
    still = [name for name, p in state.generator.named_parameters() if torch.equal(p, before[name])]
    assert all("attn2.to_q" in name or "attn2.to_k" in name for name in still), still


# ------------------------------------------------------------------------------ the command line
@pytest.fixture
def cli(model, tmp_path, monkeypatch, capsys):
    """That of variants.py: see test_runs.cli."""
    monkeypatch.chdir(tmp_path)
    return caller(variants.main, model, capsys)


def one_line(result, *parts):
    of_a_command(result, *parts, name="variants.py")


@pytest.mark.parametrize("flags", [
    ["--method", "csd", "--negative", "a blue fox"], ["--method", "nfsd"],
    ["--method", "bridge", "--bridge-steps", 2], ["--method", "lmc", "--fixed-noise"],
    ["--method", "asd", "--gamma", -0.5, "--phi", "exact", "--bandwidth", 0.3, "--particles", 2],
    ["--method", "vsd", "--generator", "network", "--particles", 2]], ids=lambda flags: flags[1])
def test_a_run_of_each_method(cli, untrained, flags):
    if "lmc" in flags:
        flags = [*flags, "--corrective", untrained]
    status, out, err = cli(*flags, "--steps", 2)
    assert status == 0 and out == "run/final.png\n", err
    rows = metrics("run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 and math.isfinite(row["grad_norm"]) for row in rows)


def test_words_reach_phi(cli, monkeypatch):
    """Every prompt of the run, and each flag that is given; what is not keeps the φ's default."""
    made = []
    monkeypatch.setattr(asd, "distill", lambda *args, state, **rest: made.append(state.phi))
    cli("--method", "bridge", "--source-words", "old {}", "--target-words", "new {}",
        "--bridge-steps", 3, "--bridge-start", 0.5, "--prompt", "a blue fox", "--lam", 3,
        "--prompt", "a red apple", "--steps", 8, "--out", "one")
    cli("--method", "nfsd", "--negative", "dull", "--out", "two")
    cli("--method", "nfsd", "--out", "three")
    bridge, dull, default = made
    assert bridge.texts == ["old {}", "new {}"] and len(bridge.plain) == 2
    assert (bridge.lam, bridge.ode_steps, bridge.first_step) == (3, 3, 4)
    assert (dull.texts, default.texts) == (["dull"], [variants.NFSD_NEGATIVE])


def test_words_never_seen_are_named(cli, monkeypatch):
    """Those of a φ's own prompts, too."""
    monkeypatch.setattr(asd, "distill", lambda *args, **rest: None)
    assert "seen: zebra" in cli("--method", "csd", "--negative", "a zebra", "--out", "one")[2]
    assert "unrealistic" in cli("--method", "nfsd", "--out", "two")[2]


@pytest.mark.parametrize("flags, parts", [
    (["--method", "hyper"], ["csd, nfsd, bridge, lmc, sds, vsd, asd"]),
    ([], ["give a --method", "csd, nfsd"]),
    (["--method", "asd", "--phi", "exact"], ["--gamma -1", "--gamma -0.5"]),
    (["--method", "csd", "--phi", "lora"], ["--method csd", "--phi lora"]),
    (["--method", "nfsd", "--phi", "noise"], ["--phi noise"]),
    (["--method", "csd", "--lam", 1], ["--lam 1"]),
    (["--method", "asd", "--negative", "blurry"], ["--negative", "csd or nfsd"]),
    (["--method", "csd", "--source-words", "x"], ["--source-words", "bridge"]),
    (["--method", "asd", "--bandwidth", 1], ["--bandwidth", "--phi exact"]),
    (["--method", "bridge", "--lam-phi", 2], ["--lam-phi", "--phi lora"]),
    (["--method", "bridge", "--bridge-steps", 0], ["--bridge-steps"]),
    (["--method", "lmc", "--corrective", "nowhere.safetensors"], ["nowhere", "train-corrective"]),
    (["--method", "vsd", "--generator", "network", "--pixels"], ["drop --init, --pixels, --real"]),
    (["--method", "vsd", "--generator", "network", "--init", "a.png"], ["--init"])])
def test_mistake_is_one_line(cli, flags, parts):
    one_line(cli(*flags), *parts)
    assert not Path("run").exists()


@pytest.mark.parametrize("name", variants.ALL_PHIS)
def test_no_option_is_swallowed(prior, untrained, name):
    """A misspelt option is an error where a person makes a φ."""
    method = replace(ROWS["exact"], phi=variants.ALL_PHIS[name])
    with pytest.raises(TypeError, match="negtive"):
        asd.make_phi(method, prior, PROMPT, negtive="blurry", **options_of(name, untrained))


def test_a_phi_takes_one_prompt_or_all(prior):
    with pytest.raises(ValueError, match="made for its prompts"):
        Bridge(prior, None, 40.0, 4)
    assert len(Bridge(prior, PROMPT, 40.0, 4).plain) == 1
    assert len(Bridge(prior, [PROMPT, "a blue fox"], 40.0, 4).plain) == 2


@cuda
def test_a_network_on_cuda_goes_on(cli):
    flags = ["--method", "vsd", "--generator", "network", "--device", "cuda"]
    assert cli(*flags, "--steps", 2)[0] == 0
    assert cli("--resume", "run", "--steps", 3)[0] == 0


# ----------------------------------------------------------------------------------- benchmarks
@needs_tiny_sd
@pytest.mark.parametrize("name", ["sds", *ROWS])
def test_time_of_a_step_of_tiny_sd(benchmark, tiny, untrained, name):
    method = replace((asd.METHODS | ROWS)[name], steps=0, t_min=0.25)
    options = options_of(name, untrained) | ({"bridge_start": 0.0} if name == "bridge" else {})
    state = make_state(tiny, method, lambda random: Latents(tiny, 1, random), options=options)

    def step():
        go(tiny, replace(method, steps=state.step + 1), state)
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert state.generator.theta.isfinite().all()
