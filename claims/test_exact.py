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
from PIL import Image

from claims import exact
from prior import HERE
from tiny.exact import GaussianMixture, randn

PAGE = HERE / "figures/explorer.html"
seeds, guidance = st.integers(0, 2 ** 31), st.floats(1.0, 15.0)
ROWS = [("sds", 7.5, None), ("vsd", 7.5, None), ("csd", 7.5, None), ("asd", 7.5, -0.5),
        ("asd", 3.0, 20.0)]


def cloud(seed, n=40):
    return randn(n, 2, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- MMD
@given(seeds, st.sampled_from([*exact.MIXTURES]))
def test_mmd_knows_no_order_and_no_turn(seed, mixture):
    """Neither the particles' order nor a turn by an eighth, which leaves p(x0|y) as it is; and it
    lies between 0 and √2, as k ≤ 1."""
    x, prior, c = cloud(seed), exact.MIXTURES[mixture](), math.sqrt(0.5)
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
@given(seeds, guidance, st.floats(-0.99, 50.0), st.sampled_from([*exact.MIXTURES]))
def test_asd_is_vsd_at_lam_eff(seed, lam, gamma, mixture):
    """(1 + γ) times ASD's bracket is VSD's at λ_eff = 1 + (1 + γ)(λ − 1), particle by particle."""
    prior, (x0, t, eps) = exact.MIXTURES[mixture](), exact.draws(30, 1, seed)
    ours = (1 + gamma) * exact.gradient(prior, "asd", lam, gamma, x0, t[0], eps[0])
    vsd = exact.gradient(prior, "vsd", 1 + (1 + gamma) * (lam - 1), None, x0, t[0], eps[0])
    torch.testing.assert_close(ours, vsd, rtol=1e-10, atol=1e-10)


@given(seeds, guidance)
def test_gamma_zero_is_vsd_and_a_lone_particle_sds(seed, lam):
    """E[ε | x_t] of one particle is ε: VSD of one is SDS."""
    prior, (x0, t, eps) = exact.two_rings(), exact.draws(30, 1, seed)
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
    assert {job.function for job in exact.JOBS.values()} == {exact.distilled}
    assert len({job.name for job in exact.JOBS.values()}) == len(exact.JOBS) == 20


# ----------------------------------------------------------------------- signs, on made-up runs
# how far each row is from p(x0|y), and where its particles are, if the paper is right
RIGHT = {"SDS, λ 1": (0.9, 0), "SDS": (0.8, 0), "VSD": (0.4, 1), "ASD": (0.2, 2),
         "ASD, γ −0.9": (0.1, 3), "ASD, γ 1": (0.6, 4), "VSD, λ 1": (0.0, 5), "CSD": (1.0, 9),
         "ASD, γ 1000": (1.0, 8), "SDS, λ 10⁴": (1.0, 8)}


def made_up(rows):
    results = {}
    for mixture in exact.MIXTURES:
        for name, (score, place) in rows.items():
            results[mixture, name] = {"mmd": torch.full((5,), score),
                                      "particles": torch.full((5, 7, 2), float(place))}
    return results


def test_the_signs_of_the_claim():
    tests = exact.tests(made_up(RIGHT))
    assert len(tests) == 8 * 2 and all(len(values) == 5 for values in tests.values())
    assert all(min(values) > 0 for values in tests.values()), tests


@pytest.mark.parametrize("a, b, part", [
    ("SDS", "ASD", "MMD, SDS − ASD"), ("VSD", "ASD", "MMD, VSD − ASD"),
    ("SDS, λ 1", "ASD", "MMD, SDS, λ 1 − ASD"), ("SDS", "VSD", "MMD, SDS − VSD"),
    ("ASD", "ASD, γ −0.9", "MMD, ASD − ASD, γ −0.9"), ("ASD, γ 1", "VSD", "MMD, ASD, γ 1 − VSD"),
    ("VSD", "CSD", "γ ≫ 0 is the classifier"), ("SDS", "SDS, λ 10⁴", "so is a huge λ")])
def test_each_test_can_fail(a, b, part):
    """Two rows change places: the test that compares them is negative."""
    tests = exact.tests(made_up(RIGHT | {a: RIGHT[b], b: RIGHT[a]}))
    values = [values for name, values in tests.items() if part in name]
    assert len(values) == 2 and max(map(max, values)) < 0


def test_the_figure_and_the_numbers(tmp_path):
    results = made_up(RIGHT)
    exact.figure(tmp_path / "exact.png", results, side=60)
    assert Image.open(tmp_path / "exact.png").size[0] > 6 * 60
    numbers = exact.numbers(results)
    assert numbers["VSD"]["MMD, two rings"][0] == pytest.approx(0.4)
    assert numbers.keys() == exact.ROWS.keys()


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
    cases = [(mixture, *row) for mixture in exact.MIXTURES for row in ROWS]
    found = run_page(tmp_path, f"""
        const given = {json.dumps(flat)}, cases = {json.dumps(cases)}
        answer(cases.map(([mixture, method, lam, gamma]) => {{
          let state = ASD.start({{mixture: ASD.MIXTURES[mixture], method: method.toUpperCase(), lam,
                                  gamma}}, given.start, {steps})
          for (let k = 0; k < {steps}; k++) state = ASD.step(state, given.t[k], given.eps[k])
          return [[...state.theta], ASD.mmd(state.theta, state.mixture)] }}))""")
    for (mixture, *row), (theta, score) in zip(cases, found, strict=True):
        particles, mmd = exact.mixture_experiment(*row, 5, n, steps,
                                                  mixture=exact.MIXTURES[mixture])
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
    prior = exact.two_rings()
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
