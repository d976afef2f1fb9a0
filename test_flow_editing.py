"""FlowEdit (arXiv 2412.08629) and Delta Velocity Rectified Flow (2509.05342) are Eq. 11.

The papers' forms are written here from the papers, in velocities v = E[ε − x0 | x_τ] of a flow,
x_τ = (1 − τ) x0 + τ ε, and know nothing of asd.py. s = 0 is Delta Denoising Score, s = 1 FlowEdit.

    Eq. 11 at ε + s(z − z_src)     editing.METHODS["flowedit"], ["dvrf"]      test_a_step_…
    t falls, θ's step is a step in τ      t_order = "descending"              test_a_run_…
"""
from dataclasses import replace

import pytest
import torch
from torch import nn

import asd
import editing
from conftest import fixed_mixture
from prior import to_eps

PROMPTS = {"": 0, "target": 1, "source": 2}


def rng(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------- what the papers say
def guided(velocity, x, tau, cond, lam):
    """v_∅ + λ (v_y − v_∅), as both papers guide."""
    uncond = velocity(x, tau, torch.zeros_like(cond))
    return uncond + lam * (velocity(x, tau, cond) - uncond)


def flowedit_direction(velocity, z, x_src, tau, noise, y, source, lam, lam_source):
    """FlowEdit, Algorithm 1: V^Δ = V(Z^tar) − V(Z^src)."""
    z_src = (1 - tau) * x_src + tau * noise
    z_tar = z + z_src - x_src
    return guided(velocity, z_tar, tau, y, lam) - guided(velocity, z_src, tau, source, lam_source)


def dvrf_direction(velocity, z, x_src, tau, noise, y, source, lam, lam_source, c):
    """DVRF, Eqs. 6 and 8: c is c_t/t. At c = 0 the source's and the edit's noise are one (DDS)."""
    z_src = (1 - tau) * x_src + tau * noise
    z_tar = (1 - tau) * z + tau * noise + c * tau * (z - x_src)
    delta = guided(velocity, z_tar, tau, y, lam) - guided(velocity, z_src, tau, source, lam_source)
    return delta + (1 - c) * (z - x_src)


# -------------------------------------------------------------------------------- priors, and z
class Mixture:
    """The exact mixture as a prior, of a flow or variance-preserving: asd.DiffusionModel."""

    def __init__(self, flow=True):
        self.mixture, self.flow, self.steps = fixed_mixture(), flow, 100

    def alpha_sigma(self, t):
        share = ((t.double() + 1) / (self.steps + 1)).view(-1, 1, 1, 1)
        if self.flow:
            return 1 - share, share
        return torch.cos(torch.pi / 2 * share), torch.sin(torch.pi / 2 * share)

    def encode_text(self, prompts):
        return torch.tensor([[[float(PROMPTS[prompt])]] for prompt in prompts])

    def eps(self, x_t, t, cond):
        return self.eps_at(x_t, *self.alpha_sigma(t), cond)

    def eps_at(self, x_t, alpha_t, sigma_t, cond):
        """Class 0 is the target and class 1 the source."""
        rows = []
        for x, a, b, number in zip(x_t.flatten(1), alpha_t.flatten(), sigma_t.flatten(),
                                   cond.flatten().tolist()):
            rows.append(self.mixture.eps(x, a, b, number - 1 if number else None))
        return torch.stack(rows).view_as(x_t)

    def velocity(self, x, tau, cond):
        """v = ε̂ − x̂0 at x = (1 − τ) x0 + τ ε, whichever way the prior itself adds noise."""
        tau = torch.as_tensor(tau, dtype=torch.float64).expand(len(x)).view(-1, 1, 1, 1)
        eps = self.eps_at(x, 1 - tau, tau, cond)
        return eps - (x - tau * eps) / (1 - tau)

    def source(self):
        return self.mixture.sample(1, y=1, generator=rng(1)).view(1, 3, 1, 1)


class Transformer:
    """A random transformer of SD3's kind in float64, which predicts a velocity."""
    steps = 100

    def __init__(self):
        from diffusers import SD3Transformer2DModel
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=16,
                pooled_projection_dim=64, out_channels=4, pos_embed_max_size=8).double()
            for p in self.network.parameters():        # zeros at the start; and words matter
                p.data += 0.1 * torch.randn_like(p)
        self.words = torch.randn(3, 5, 64, generator=rng(2)).double()

    def alpha_sigma(self, t):
        sigma = ((t.double() + 1) / (self.steps + 1)).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def encode_text(self, prompts):
        return self.words[[PROMPTS[prompt] for prompt in prompts]]

    @torch.no_grad()
    def velocity(self, x, tau, cond):
        if not cond.any():
            cond = self.words[:1]
        tau = torch.as_tensor(tau, dtype=torch.float64).expand(len(x))
        return self.network(hidden_states=x, timestep=1000 * tau, pooled_projections=cond[:, 4],
                            encoder_hidden_states=cond[:, :4]).sample

    def eps(self, x_t, t, cond):
        alpha_t, sigma_t = self.alpha_sigma(t)
        return to_eps(self.velocity(x_t, sigma_t.flatten(), cond), x_t, alpha_t, sigma_t, "flow")

    def source(self):
        return torch.randn(1, 4, 8, 8, generator=rng(1)).double()


class Moved(nn.Module):
    """An edit that starts `apart` from its source."""

    def __init__(self, source, apart=0.0):
        super().__init__()
        self.source, self.theta = source, nn.Parameter(source + apart)

    def forward(self):
        return asd.Samples(self.theta, source=self.source)


def run(prior, method, apart=0.0, seed=5):
    """-> [x0 before, x0 after each step] of an edit by the loop."""
    y, z = prior.encode_text(["target", "source"]).split(1)
    generator = Moved(prior.source(), apart)
    way = [generator.theta.detach().clone()]
    state = asd.State(generator, asd.NoisePhi(), method, rng(seed),
                      editing.second_discriminator(method, asd.NoisePhi(), z))
    asd.distill(prior, generator, y, method, state=state,
                callback=lambda state, terms: way.append(generator.theta.detach().clone()))
    return way


# -------------------------------------------------------------------------------------- one step
FLOW_PRIORS = {"mixture": Mixture, "sd3": Transformer}


@pytest.mark.parametrize("name", FLOW_PRIORS)
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
def test_a_step_of_eq11_is_the_papers(name, s):
    """The gradient that reaches θ at any z, in float64: DDS, between, and FlowEdit's V^Δ."""
    prior = FLOW_PRIORS[name]()
    apart = 0.5 * torch.randn(prior.source().shape, generator=rng(3)).double()
    for k, omega in ((20, "1/alpha"), (60, "1/alpha"), (90, "1+sigma/alpha")):
        row = replace(editing.METHODS["flowedit"], shift=s, t_order="random", t_min=k / 100,
                      t_max=k / 100, t_late=1.0, steps=1, lr=1.0, omega=omega, lam=7.5,
                      lam_source=1.5)
        before, after = run(prior, row, apart)
        t, noise = asd.draw_noise(rng(5), before, k, k)
        y, source = prior.encode_text(["target", "source"]).split(1)
        given = (prior.velocity, before, prior.source(), (k + 1) / 101, noise, y, source, row.lam,
                 row.lam_source)
        expected = dvrf_direction(*given, c=s)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(before - after, expected, rtol=1e-10, atol=1e-10)
        if s == 1:
            torch.testing.assert_close(before - after, flowedit_direction(*given), rtol=1e-10,
                                       atol=1e-10)


def test_without_shift_it_is_dds_bit_for_bit():
    """s = 0 of an s that grows, and the row itself, at z ≠ z_src: editing_grad with ε_φ = ε."""
    prior, apart = Mixture(flow=False), torch.tensor([0.3, -0.2, 0.5]).double().view(1, 3, 1, 1)
    dds = replace(editing.METHODS["dds"], steps=1, lr=1.0)
    before, after = run(prior, dds, apart)
    grown = run(prior, replace(dds, shift=1.0, shift_grows=True), apart)[1]
    assert torch.equal(after, grown)
    assert not torch.equal(after, run(prior, replace(dds, shift=0.1), apart)[1])
    t, eps = asd.draw_noise(rng(5), before, *asd.range_of_t(dds, 0, prior.steps))
    triples = []
    for x0, prompt in ((before, "target"), (prior.source(), "source")):
        x_t = asd.add_noise(x0, eps, *prior.alpha_sigma(t))
        cond, null = prior.encode_text([prompt, ""]).split(1)
        triples.append((prior.eps(x_t, t, null), prior.eps(x_t, t, cond), eps))
    grad = editing.editing_grad(*triples, dds.lam, torch.ones(1, 1, 1, 1).double())
    assert torch.equal(after, before - grad)


# ------------------------------------------------------------------------------------ a whole run
@pytest.mark.parametrize("flow", [True, False], ids=["flow prior", "ε prior"])
@pytest.mark.parametrize("name", ["flowedit", "dvrf"])
def test_a_run_is_the_published_sampler(name, flow):
    """Step by step; an ε prior is the same flow in τ = σ/(α + σ), as x_t/(α + σ) says."""
    prior, row = Mixture(flow), replace(editing.METHODS[name], steps=12, t_max=0.6)
    y, source = prior.encode_text(["target", "source"]).split(1)
    taus = []
    for k in (60, 55, 50, 45, 40, 35, 30, 25, 20, 15, 10, 5):       # noising steps; none at the end
        alpha, sigma = (v.item() for v in prior.alpha_sigma(torch.tensor([k - 1])))
        taus.append(sigma / (alpha + sigma))
    taus.append(0.0)
    way, draws, z, x_src = run(prior, row), rng(5), prior.source(), prior.source()
    assert torch.equal(way[0], x_src) and len(way) == 13
    for i in range(12):
        _, noise = asd.draw_noise(draws, z, 0, 59)
        given = (prior.velocity, z, x_src, taus[i], noise, y, source, row.lam, row.lam_source)
        if name == "flowedit":
            # Z_{i−1} = Z_i + (τ_{i−1} − τ_i) V^Δ
            z = z + (taus[i + 1] - taus[i]) * flowedit_direction(*given)
        else:
            z = z - (taus[i] - taus[i + 1]) * dvrf_direction(*given, c=i / 12)
        torch.testing.assert_close(way[i + 1], z, rtol=1e-5, atol=1e-5)
    assert (z - x_src).norm() > 0.3
    end, begin = (prior.mixture.log_posterior(0, v.flatten()) for v in (z, x_src))
    assert end > begin                                              # it is more of the target


def test_the_published_numbers():
    """FlowEdit's and DVRF's own settings for SD3, and the noising steps that they begin at."""
    for name, steps, first, lam, lam_source in (("flowedit", 33, 660, 13.5, 3.5),
                                                ("dvrf", 50, 1000, 16.5, 6.0)):
        _, published = editing.PAPER[name]
        row = replace(editing.METHODS[name], **published)
        ts = [asd.descending_t(row, step, 1000) + 1 for step in range(row.steps + 1)]
        assert (row.lam, row.lam_source, row.steps, ts[0], ts[-1]) == (lam, lam_source, steps,
                                                                       first, 0)
        assert {a - b for a, b in zip(ts, ts[1:])} == {20}             # 50 steps would be all
        assert row.shift == 1 and row.shift_grows == (name == "dvrf")
    row = replace(editing.methods(network=True)["flowedit"])
    assert row.t_order == "random" and row.shift == 1                  # a network has no one t
