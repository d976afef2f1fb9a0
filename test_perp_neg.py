"""Perp-Neg (arXiv 2304.04968): the equation, its weights, and what the loop makes of them.

    perp_neg    ε_y + Σ_i w_i δ_i^⊥                     test_perp_neg_…
    between     threestudio's weights by the azimuth    test_weights_…
"""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import asd
import text_to_3d
from conftest import cosine, randn
from phi import LoRAPhi
from test_asd import close, mutants, noise, slope
from test_distill import folders, load, prior, rng  # noqa: F401 (fixtures)
from test_nerf import small


# ----------------------------------------------------------------------------------- the equation
def check_perp_neg(function):
    """By hand: one sample of two numbers, and two negatives."""
    def column(*numbers):
        return torch.tensor(numbers).double().view(1, -1, 1, 1)
    uncond, y = column(1, 1), column(3, 1)                        # δ_y = (2, 0)
    others = [column(2, 4), column(0, -4)]                        # δ⊥ = (0, 3), (0, −5)
    weights = torch.tensor([[-2.0, -0.5]]).double()
    close(function(uncond, y, others, weights), column(3, 1 - 2 * 3 + 0.5 * 5))


def test_perp_neg_by_hand_and_every_wrong_sign_is_noticed():
    unchanged, *wrong = mutants(asd.perp_neg)
    check_perp_neg(unchanged[1])
    assert len(wrong) == 4
    for line, function in wrong:
        with pytest.raises(AssertionError):
            check_perp_neg(function)
            pytest.fail(f"not noticed: {line}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_perp_neg_of_no_weight_changes_no_bit(dtype):
    uncond, y, *others = (v.to(dtype) for v in noise(0, (3, 4, 8, 8), 4))
    found = asd.perp_neg(uncond, y, others, torch.zeros(3, 2))
    assert torch.equal(found, y) and found.dtype == dtype


def test_perp_neg_of_a_parallel_negative_changes_nothing():
    """What the negative has in common with y is not taken away, whichever way it points."""
    uncond, y = noise(1, (3, 4, 8, 8), 2)
    others = [uncond + c * (y - uncond) for c in (0.3, -2.0)]
    close(asd.perp_neg(uncond, y, others, torch.full((3, 2), -5.0).double()), y)


def test_perp_neg_adds_what_is_orthogonal_in_each_sample():
    uncond, y, *others = noise(2, (3, 4, 8, 8), 4)
    weights = -torch.rand(3, 2, generator=rng(3)).double()
    added = asd.perp_neg(uncond, y, others, weights) - y
    assert added.flatten(1).norm(dim=1).min() > 1
    along = (added * (y - uncond)).flatten(1).sum(1)
    close(along, torch.zeros(3).double())
    for b in range(3):                                            # no sample knows another
        alone = asd.perp_neg(*(v[b:b + 1] for v in (uncond, y)), [v[b:b + 1] for v in others],
                             weights[b:b + 1])
        close(alone, (y + added)[b:b + 1])


def test_perp_neg_where_y_says_nothing():
    """δ_y = 0 has no direction: then all of the negative counts, and nothing is divided by 0."""
    uncond, other = (v.float() for v in noise(4, (1, 4, 8, 8), 2))
    found = asd.perp_neg(uncond, uncond.clone(), [other], -torch.ones(1, 1))
    torch.testing.assert_close(found, 2 * uncond - other)


def test_perp_neg_points_away_from_the_other_class(exact):
    """On the exact mixture a step down Eq. 7 makes the other view less likely, and y no less."""
    alpha_t, sigma_t = cosine(0.4)
    x_t = alpha_t * exact.sample(6, y=0, generator=rng(5)) + sigma_t * randn(6, 3, generator=rng(6))
    x_t.requires_grad_()
    slopes = [slope(exact.log_posterior(c, x_t, alpha_t, sigma_t), x_t) for c in (0, 1)]
    uncond, y, other = (exact.eps(x_t.detach(), alpha_t, sigma_t, c)[..., None, None]
                        for c in (None, 0, 1))
    shifted = asd.perp_neg(uncond, y, [other], torch.full((6, 1), -1.5).double())
    grads = [asd.generator_grad(uncond, v, other, 7.5).flatten(1) for v in (y, shifted)]
    step = grads[0] - grads[1]                       # what Perp-Neg adds to −∇θ
    of_y, of_other = ((step * s).sum(1) for s in slopes)
    close(of_y, torch.zeros(6).double())
    assert (of_other < -1e-3).all()


# -------------------------------------------------------------------------------------- the views
E2, E4 = math.exp(-0.5), math.exp(-0.25)


@pytest.mark.parametrize("azimuth, shares, weights", [
    (0, {"front": 1, "side": 0}, {"front": -(4 * E2 - 2.426), "side": -(4 - 2.426)}),
    (45, {"front": 0.5, "side": 0.5}, {"front": 2.426 - 4 * E4, "side": 2.426 - 4 * E4}),
    (90, {"side": 1, "back": 0}, {"side": 0.606 - E2, "front": -(E2 + 0.967)}),
    (135, {"side": 0.5, "back": 0.5}, {"side": 0.606 - E4, "front": -(E4 + 0.967)}),
    (180, {"side": 0, "back": 1}, {"side": 0.606 - 1, "front": -1.967})])
def test_weights_by_hand(azimuth, shares, weights):
    """threestudio's f_fs, f_sf, f_sb and f_fsb; left and right alike, and none is positive."""
    for turn in (azimuth, -azimuth, azimuth + 360):
        found = text_to_3d.between(20, turn)
        assert found == (pytest.approx(shares), pytest.approx(weights))
        assert max(found[1].values()) <= 0 and sum(found[0].values()) == pytest.approx(1)
    near = text_to_3d.between(20, azimuth - 1e-6)[1]              # from one pair to the next
    assert near["front"] == pytest.approx(weights["front"], abs=1e-3)
    assert near["side"] == pytest.approx(weights["side"], abs=1e-3)
    assert text_to_3d.between(70, azimuth) == ({"overhead": 1.0}, {"front": 0.0, "side": 0.0})


def make_scene(prior, **changes):                                              # noqa: F811
    settings = {"views": 3, "samples": 8, "resolution": (4, 16), "perp_neg": True} | changes
    return text_to_3d.Scene(prior, small(), "a mug", rng(4), 4, **settings)


def test_a_scene_asks_between_its_views(prior):                                # noqa: F811
    """Of each camera the prompt, the others and the weights of its own azimuth and elevation."""
    for azimuth, elevation in ((-60, 20), (150, -10), (30, 75)):
        scene = make_scene(prior, azimuth=(azimuth, azimuth), elevation=(elevation, elevation),
                           overhead=0.0)
        samples, plain = scene(), make_scene(prior, perp_neg=False)()
        shares, weights = text_to_3d.between(elevation, azimuth)
        y = sum(share * scene.prompts[word] for word, share in shares.items())
        torch.testing.assert_close(samples.cond, y.expand(3, -1, -1), rtol=1e-5, atol=1e-5)
        for i, (word, w) in enumerate(weights.items()):
            assert torch.equal(samples.others[:, i], scene.prompts[word].expand(3, -1, -1))
            torch.testing.assert_close(samples.other_weights[:, i], torch.full((3,), float(w)),
                                       rtol=0, atol=1e-4)
        assert plain.others is None and plain.other_weights is None
    some = make_scene(prior)(torch.tensor([2, 0]))               # one of several processes
    for part, expected in zip(some, make_scene(prior)()):
        if expected is not None:
            torch.testing.assert_close(part, expected[[2, 0]])


# --------------------------------------------------------------------------------------- the loop
class Views(nn.Module):
    """Three latents with Perp-Neg's fields."""

    def __init__(self, prior, weights):                                        # noqa: F811
        super().__init__()
        self.theta = nn.Parameter(torch.randn(3, *prior.shape, generator=rng(7)))
        self.cond, *others = prior.encode_text(["a red apple", "a blue fox", "an apple"]).split(1)
        self.cond = self.cond.expand(3, -1, -1)
        self.others, self.weights = torch.stack(others, 1).expand(3, -1, -1, -1), weights

    def forward(self):
        return asd.Samples(self.theta, self.cond, others=self.others, other_weights=self.weights)


@pytest.mark.parametrize("lam, micro_batch", [(7.5, None), (7.5, 2), (1.0, None)])
def test_the_loop_is_eq7_with_perp_neg_in_eq2(prior, lam, micro_batch):        # noqa: F811
    """A step of SGD against Eq. 7 written out, at the loop's own t and ε; at λ = 1, too."""
    weights = torch.tensor([[-1.0, -0.3], [0.0, -2.0], [0.0, 0.0]])
    row = asd.Method(phi=asd.NoisePhi, optimizer="sgd", lr=3.0, steps=1, lam=lam, omega="sigma2",
                     t_late=1.0)
    generator = Views(prior, weights)
    x0 = generator.theta.detach().clone()
    asd.distill(prior, generator, generator.cond, row, seed=11, micro_batch=micro_batch)
    t, eps = asd.draw_noise(rng(11), x0, *asd.range_of_t(row, 0, prior.steps))
    alpha_t, sigma_t = prior.alpha_sigma(t)
    x_t, null = alpha_t * x0 + sigma_t * eps, prior.encode_text([""]).expand(3, -1, -1)
    with torch.no_grad():
        uncond, y, *others = (prior.eps(x_t, t, c) for c in (
            null, generator.cond, *generator.others.unbind(1)))
    guided = uncond + lam * (asd.perp_neg(uncond, y, others, weights) - uncond)
    moved = x0 - generator.theta.detach()
    torch.testing.assert_close(moved, sigma_t ** 2 * (guided - eps), rtol=1e-4, atol=1e-5)
    plain = sigma_t ** 2 * (asd.cfg_noise(uncond, y, lam) - eps)
    assert (moved - plain)[:2].abs().flatten(1).amax(1).min() > 1e-3
    torch.testing.assert_close(moved[2], plain[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sds", "asd"])
def test_a_run_asks_the_prior_once_a_step(prior, monkeypatch, method):         # noqa: F811
    """Three steps of 3D; φ is asked with its own prompt and the camera, the prior with all."""
    asked, told, eps = [], [], prior.eps
    monkeypatch.setattr(prior, "eps", lambda x_t, t, cond: asked.append(len(t)) or
                        eps(x_t, t, cond))
    row = replace(text_to_3d.methods()[method], steps=3)
    scene, cond = make_scene(prior), prior.encode_text(["a mug"])
    phi = row.phi(prior) if method == "sds" else LoRAPhi(prior, cond=cond, camera=16)
    forward = phi.forward

    def predict(x_t, t, y, eps, camera=None, answers=None):
        told.append(camera)
        return forward(x_t, t, y, eps, camera, answers)
    phi.forward = predict
    before = scene.nerf.table.detach().clone()
    asd.distill(prior, scene, cond, row, phi)
    # ∅, y, the front, the side; and ε_y of Eq. 10
    assert asked == [3 * (4 if method == "sds" else 5)] * 3
    assert all(camera.shape == (3, 16) for camera in told)
    assert (scene.nerf.table - before).abs().max() > 0


def test_it_is_off_for_tiny_sd_and_as_released_for_others(capsys):
    assert text_to_3d.SCENE["perp_neg"] is False
    assert text_to_3d.PAPER["asd"][1]["perp_neg"] is True
    assert not text_to_3d.PAPER["vsd"][1].get("perp_neg")
    assert text_to_3d.main(["--prompt", "a mug", "--method", "bridge", "--perp-neg"]) == 2
    assert "drop one of the two" in capsys.readouterr().err
