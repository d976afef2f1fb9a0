"""The claim about the exact mixture, and its page: figures/explorer.html against this Python."""
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asd
from claims import exact
from prior import HERE
from tiny.exact import MIXTURES, GaussianMixture, particle_eps, randn, two_rings

PAGE = HERE / "figures/explorer.html"
seeds, guidance = st.integers(0, 2 ** 31), st.floats(1.0, 15.0)
ROWS = [("sds", 7.5, None), ("vsd", 7.5, None), ("csd", 7.5, None), ("asd", 7.5, -0.5),
        ("asd", 3.0, 20.0)]


def cloud(seed, n=40):
    return randn(n, 2, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- MMD
@given(seeds, st.sampled_from([*MIXTURES]))
def test_mmd_knows_no_order_and_no_turn(seed, mixture):
    """Neither the particles' order nor a turn by an eighth, which leaves p(x0|y) as it is; and it
    lies between 0 and √2, as k ≤ 1."""
    x, prior, c = cloud(seed), MIXTURES[mixture](), math.sqrt(0.5)
    turned = x[torch.randperm(len(x))] @ torch.tensor([[c, c], [-c, c]], dtype=torch.float64)
    assert exact.mmd(turned, prior) == pytest.approx(exact.mmd(x, prior), abs=1e-9)
    assert 0 <= exact.mmd(x, prior) <= math.sqrt(2)
    assert exact.mmd(x + 3, prior) > exact.mmd(prior.sample(400, 0, torch.Generator()), prior)


@given(seeds, seeds)
def test_mmd_of_points_by_hand(seed, other):
    """p(x0|y) of points alone: a mean over pairs; 0 where the particles are those points."""
    x, z = cloud(seed, 7), cloud(other, 5)
    prior = GaussianMixture(torch.cat([z, cloud(1, 3)]), [0.0] * 8, labels=[0] * 5 + [1] * 3)
    k = lambda a, b: sum(math.exp(-(p - q).square().sum() / 2) for p in a for q in b) / (
        len(a) * len(b))
    assert exact.mmd(x, prior) ** 2 == pytest.approx(k(x, x) - 2 * k(x, z) + k(z, z), abs=1e-12)
    assert exact.mmd(z, prior) < 1e-7


# ------------------------------------------------------------------------------------ the gradient
@given(seeds, guidance, st.floats(-0.99, 50.0), st.sampled_from([*MIXTURES]))
def test_asd_is_vsd_at_lam_eff(seed, lam, gamma, mixture):
    """(1 + γ) times ASD's bracket is VSD's at λ_eff = 1 + (1 + γ)(λ − 1), particle by particle."""
    prior, (x0, t, eps) = MIXTURES[mixture](), exact.draws(30, 1, seed)
    ours = (1 + gamma) * exact.gradient(prior, "asd", lam, gamma, x0, t[0], eps[0])
    vsd = exact.gradient(prior, "vsd", 1 + (1 + gamma) * (lam - 1), None, x0, t[0], eps[0])
    torch.testing.assert_close(ours, vsd, rtol=1e-10, atol=1e-10)


@given(seeds, guidance)
def test_gamma_zero_is_vsd_and_a_lone_particle_sds(seed, lam):
    """E[ε | x_t] of one particle is ε: VSD of one is SDS."""
    prior, (x0, t, eps) = two_rings(), exact.draws(30, 1, seed)
    at = lambda method, gamma, n: exact.gradient(prior, method, lam, gamma, x0[:n], t[0, :n],
                                                 eps[0, :n])
    assert torch.equal(at("asd", 0.0, 30), at("vsd", None, 30))
    torch.testing.assert_close(at("vsd", None, 1), at("sds", None, 1), rtol=1e-9, atol=1e-9)


def test_starts_and_noise_are_the_same_for_every_row():
    """Paired, seed by seed; levels within the paper's (0.02, 0.98)."""
    start, t, eps = exact.draws(9, 20, 3)
    assert start.shape == (9, 2) and t.shape == (20, 9, 1) and eps.shape == (20, 9, 2)
    assert 0.02 <= t.min() and t.max() <= 0.98
    assert all(map(torch.equal, (start, t, eps), exact.draws(9, 20, 3)))


def test_the_law_of_a_phi_that_lags_is_exact():
    """With ε_φ = ε_y + κ(ε_g − ε_y)/(1 + γ), Eq. 7 is κ/(1 + γ) times VSD's at λ'."""
    x0, t, eps = exact.draws(30, 1, 3)
    alpha_t, sigma_t = torch.cos(0.5 * math.pi * t[0]), torch.sin(0.5 * math.pi * t[0])
    x_t, prior = asd.add_noise(x0, eps[0], alpha_t, sigma_t), two_rings()
    eps_uncond, eps_y = prior.eps(x_t, alpha_t, sigma_t), prior.eps(x_t, alpha_t, sigma_t, y=0)
    eps_g = particle_eps(x_t, x0, alpha_t, sigma_t)
    for kappa in (0.1, 0.3, 1.0):
        for gamma in (-0.75, 0.0, 10.0):
            eps_phi = eps_y + kappa * (eps_g - eps_y) / (1 + gamma)
            ours = asd.generator_grad(eps_uncond, eps_y, eps_phi, 7.5)
            lam = asd.effective_guidance(7.5, gamma, kappa)
            vsd = asd.generator_grad(eps_uncond, eps_y, eps_g, lam)
            torch.testing.assert_close(ours, kappa / (1 + gamma) * vsd, rtol=1e-10, atol=1e-10)
            shares = asd.learnt_share(eps_g[..., None, None], eps_phi[..., None, None],
                                      eps_y[..., None, None], gamma)
            torch.testing.assert_close(shares, torch.full((30,), kappa).double())


# ----------------------------------------------------------------------------------- the claims
def test_random_mixtures_differ_and_are_their_seed():
    mixtures = [exact.random_mixture(seed) for seed in range(exact.UNITS)]
    dimensions = {mixture.means.shape[1] for mixture in mixtures}
    assert {2, 16} <= dimensions and all(2 <= d <= 16 for d in dimensions)
    assert {int(mixture.labels.max()) + 1 for mixture in mixtures} == {2, 3, 4}
    assert torch.equal(mixtures[7].means, exact.random_mixture(7).means)


def test_the_claims_signs_and_the_equality(monkeypatch):
    """ASD nearer by 0.1 is +0.1; its particles are those of VSD at λ_eff."""
    r = {"exact": {"VSD": torch.tensor([0.3, 0.4]), "ASD": torch.tensor([0.2, 0.3])}}
    assert list(exact.CLAIMS["exact"].values(r)) == pytest.approx([0.1, 0.1])
    for name, value in (("UNITS", 2), ("PARTICLES", 16), ("STEPS", 20)):
        monkeypatch.setattr(exact, name, value)
    found = exact.distilled()
    assert found["apart"].max() < 1e-6 and found.keys() == {*exact.ROWS, "apart"}
    assert (found["ASD"] - found["VSD at λ_eff"]).abs().max() < 1e-6
    assert (found["VSD"] - found["ASD"]).abs().min() > 1e-3


# ------------------------------------------------------------------------------------- the page
def run_page(folder, script):
    """What a script at the page's end makes of `answer`, in headless Chromium, from disk."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here")
    page = Path(folder) / "page.html"
    page.write_text(PAGE.read_text("utf-8") + "<pre id=answer></pre><script>const answer = x => {"
                    "document.getElementById('answer').textContent = JSON.stringify(x) };"
                    f"{script}</script>", "utf-8")
    done = subprocess.run([chromium, "--headless", "--no-sandbox", "--dump-dom",
                           f"--user-data-dir={folder / 'user'}", "--window-size=1160,860",
                           "--virtual-time-budget=3000", page.as_uri()],
                          check=True, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search("<pre id=\"answer\">(.+)</pre>", done.stdout)[1]))


def test_the_page_needs_nothing():
    text = PAGE.read_text("utf-8")
    assert not any(word in text for word in ("http:", "https:", "src=", "import", "fetch"))


def test_the_page_moves_particles_as_this_does(tmp_path):
    """Every method on both mixtures, from the same start with the same noise: 40 steps of 48."""
    n, steps, (start, t, eps) = 48, 40, exact.draws(48, 40, 5)
    flat = {"start": start.flatten().tolist(), "t": t.flatten(1).tolist(),
            "eps": eps.flatten(1).tolist()}
    cases = [(mixture, *row) for mixture in MIXTURES for row in ROWS]
    found = run_page(tmp_path, f"""
        const given = {json.dumps(flat)}, cases = {json.dumps(cases)}
        answer(cases.map(([mixture, method, lam, gamma]) => {{
          let state = ASD.start({{mixture: ASD.MIXTURES[mixture], method: method.toUpperCase(), lam,
                                  gamma}}, given.start, {steps})
          for (let k = 0; k < {steps}; k++) state = ASD.step(state, given.t[k], given.eps[k])
          return [[...state.theta], ASD.mmd(state.theta, state.mixture)] }}))""")
    for (mixture, *row), (theta, score) in zip(cases, found, strict=True):
        particles, mmd = exact.mixture_experiment(MIXTURES[mixture](), *row, 5, n, steps)
        theta = torch.tensor(theta, dtype=torch.float64).view(n, 2)
        assert (theta - particles).abs().max() < 1e-6, (mixture, row)
        assert score == pytest.approx(mmd, abs=1e-9) and (particles - start).abs().max() > 0.5


def test_the_page_shows_what_it_says(tmp_path):
    """Live: the particles have moved, and beside them stand their MMD, λ_eff and the step."""
    script = """
        const at = id => document.getElementById(id), move = (id, value) => {
          at(id).value = value; at(id).dispatchEvent(new Event("input")) }
        const seen = () => ({mmd: at("mmd").textContent, eff: at("eff").textContent,
          step: +at("step").textContent, theta: [...ASD.live.theta], draws: ASD.mmdOfDraws(
          ASD.MIXTURES["two rings"], 256)})
        at("reset").click()
        const found = [seen()]
        setTimeout(() => {
          found.push(seen()); move("lam", 5); move("gamma", 0); found.push(seen())
          for (const method of ["SDS", "CSD", "VSD"]) {
            [...document.querySelectorAll("#methods button")].find(
              b => b.textContent === method).click()
            found.push(seen()) }
          at("reset").click(); found.push(seen())
          answer(found) }, 1500)"""
    found = run_page(tmp_path, script)
    prior = two_rings()
    for each in found:
        theta = torch.tensor(each["theta"], dtype=torch.float64).view(-1, 2)
        assert float(each["mmd"]) == pytest.approx(exact.mmd(theta, prior), abs=5.1e-4)
    assert found[0]["step"] == 0 and found[1]["step"] > 3
    assert found[0]["theta"] != found[1]["theta"] and found[0]["theta"] == found[-1]["theta"]
    assert [each["eff"] for each in found] == ["4.25", "4.25", "5.00", "–", "∞", "5.00", "5.00"]
    # E MMD² of n independent draws is (E k(z, z) − E k(z, z'))/n
    draws = [exact.mmd(prior.sample(256, 0, torch.Generator().manual_seed(i)), prior) ** 2
             for i in range(200)]
    assert found[0]["draws"] == pytest.approx(math.sqrt(sum(draws) / 200), rel=0.1)
