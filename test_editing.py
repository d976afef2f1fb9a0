"""Eq. 11 and image editing: on the exact prior, on a tiny random pipeline, and on tiny/sd.

    Eq. 11  editing_grad           test_eq11_is_the_gradient_of_two_discriminators
    DDS     editing_grad           test_dds_is_eq11_with_the_added_noise
    Eq. 9   second_discriminator   test_phi_z_learns_by_eq9_as_read, test_second_discriminator…
"""
# ruff: noqa: F811 (fixtures are imported by their names)
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import asd
import editing
from cli import files, pictures
from cli.settings import new_settings
from conftest import cosine, fixed_mixture, mixtures, randn
from phi import EmbeddingPhi, LoRAPhi
from prior import ddim_samples
from test_asd import close, guidance, levels, mutants, noise, seeds, shapes, slope
from test_distill import (  # noqa: F401 (fixtures)
    cuda,
    folders,
    load,
    needs_tiny_sd,
    on_devices,
    prior,
    rng,
    tiny,
    trainable,
)
from test_runs import checkpoint, contents, forget_picture, load_once, metrics, model  # noqa: F401
from test_runs import one_line as of_a_command
from tiny.judge import distances
from variants import Exact

HERE = Path(asd.__file__).resolve().parent
SOURCE, TARGET = "a red apple", "a blue fox"


# ----------------------------------------------------------------------------------- the equation
def two_discriminators(mixture, t, seed, lam, apart):
    """Eq. 11 by autograd on exact densities, and what editing_grad is given for it.

    Classes: 0 is y and 1 is z; φ_y and φ_z are 2 and 1 (any class will do). apart: the second
    discriminator sees other pictures (the source image), else the same x_t.
    """
    alpha_t, sigma_t = cosine(t)
    g = torch.Generator().manual_seed(seed)
    x_t = (alpha_t * mixture.sample(5, y=0, generator=g)
           + sigma_t * randn(5, mixture.means.shape[1], generator=g))
    x_s = x_t + randn(*x_t.shape, generator=g) if apart else x_t.clone()
    slopes, predictions = [], []
    for x, y, phi in ((x_t, 0, 2), (x_s, 1, 1)):
        x = x.requires_grad_()
        bound = mixture.log_posterior(phi, x, alpha_t, sigma_t) \
            - lam * mixture.log_posterior(y, x, alpha_t, sigma_t)
        slopes.append(sigma_t * slope(bound, x))
        predictions.append([mixture.eps(x.detach(), alpha_t, sigma_t, c) for c in (None, y, phi)])
    return slopes[0] - slopes[1], predictions


def check_eq11(function, mixture=None, t=0.4, seed=0, lam=7.5):
    for apart in (False, True):
        expected, (target, source) = two_discriminators(mixture or fixed_mixture(), t, seed, lam,
                                                        apart)
        close(function(target, source, lam), expected)
        close(function(target, source, lam, 0.3), 0.3 * expected)


@given(mixtures(), levels, seeds, guidance)
def test_eq11_is_the_gradient_of_two_discriminators(mixture, t, seed, lam):
    """∇[log p(φ_y|x) − λ log p(y|x)] − ∇[log p(φ_z|x) − λ log p(z|x)], times σ_t."""
    check_eq11(editing.editing_grad, mixture, t, seed, lam)


def test_every_wrong_sign_is_noticed():
    same, *wrong = mutants(editing.editing_grad)
    check_eq11(same[1])
    assert wrong
    for line, function in wrong:
        with pytest.raises(AssertionError):
            check_eq11(function)
            pytest.fail(f"not noticed: {line}")


@given(seeds, shapes, guidance)
def test_eps_uncond_cancels_at_one_x_t(seed, shape, lam):
    """At the same x_t Eq. 11 is λ(ε_y − ε_z) − (ε_φy − ε_φz)."""
    uncond, uncond_2, y, z, phi_y, phi_z = noise(seed, shape, 6)
    grad = editing.editing_grad((uncond, y, phi_y), (uncond, z, phi_z), lam)
    close(grad, lam * (y - z) - (phi_y - phi_z))
    close(grad, editing.editing_grad((uncond_2, y, phi_y), (uncond_2, z, phi_z), lam))


@given(seeds, shapes, guidance)
def test_dds_is_eq11_with_the_added_noise(seed, shape, lam):
    """DDS: the guided prediction at the noised edit minus that at the noised source image."""
    eps, uncond_t, uncond_s, y, z = noise(seed, shape, 5)
    dds = (uncond_t + lam * (y - uncond_t)) - (uncond_s + lam * (z - uncond_s))
    close(editing.editing_grad((uncond_t, y, eps), (uncond_s, z, eps), lam), dds)


@given(seeds, shapes, guidance)
def test_the_same_twice_is_zero_and_swapping_flips(seed, shape, lam):
    """Swapping (y, z), (φ_y, φ_z) and the pictures flips the sign; equal ones leave nothing."""
    one, two = noise(seed, shape, 3), noise(seed + 1, shape, 3)
    assert (editing.editing_grad(one, one, lam) == 0).all()
    close(editing.editing_grad(one, two, lam), -editing.editing_grad(two, one, lam))
    for short in ((one[:2], two), (one, two[:2])):       # λ would slide into the place of ε_φ
        with pytest.raises(ValueError, match="expected 3"):
            editing.editing_grad(*short, lam)


# ------------------------------------------------------------------------- the loop, tiny pipeline
def row_of(name):
    """A row of editing.METHODS, or ASD's with this phi_z."""
    return editing.METHODS.get(name) or replace(editing.METHODS["asd"], phi_z=name)


class Moved(nn.Module):
    """A picture that starts `apart` from its source."""

    def __init__(self, source, apart=0.0):
        super().__init__()
        self.source, self.theta = source, nn.Parameter(source + apart)

    def forward(self):
        return asd.Samples(self.theta, source=self.source)


def edit(prior, name="asd", steps=1, apart=0.0, same_prompt=False, **changes):
    """A short edit, which starts `apart` from the source -> (state, [metrics], source latents)."""
    method = replace(row_of(name), steps=steps, **changes)
    y, z = prior.encode_text([TARGET, TARGET if same_prompt else SOURCE]).split(1)
    source = torch.randn(1, *prior.shape, generator=rng(0))
    phi, phi_z = (asd.make_phi(method, prior, SOURCE, seed) for seed in (0, 1))
    second, generator = editing.second_discriminator(method, phi_z, z), Moved(source, apart)
    state, logs = asd.State(generator, phi, method, rng(5), second), []
    asd.distill(prior, generator, y, method, state=state,
                callback=lambda state, terms: logs.append(terms))
    return state, logs, source


@pytest.fixture
def draws(monkeypatch):
    """The (t, ε) that the loop draws, in its order: θ's; then φ_y's; then φ_z's."""
    drawn, draw_noise = [], asd.draw_noise

    def keep(*args):
        drawn.append(draw_noise(*args))
        return drawn[-1]
    monkeypatch.setattr(asd, "draw_noise", keep)
    return drawn


@pytest.mark.parametrize("name", ["asd", "swapped", "both", "eq10", "dds", "sds"])
def test_the_loop_is_eq11(prior, name, draws):
    """The gradient that reaches θ, recomputed around the networks: D(x_t; z) sees the source."""
    state, _, source = edit(prior, name, lr=0.0, apart=0.7)
    method, (t, eps) = row_of(name), draws[0]
    alpha_t, sigma_t = prior.alpha_sigma(t)
    y, z, null = prior.encode_text([TARGET, SOURCE, ""]).split(1)
    lora = method.phi is LoRAPhi               # at the first step ε_φ of a LoRA is the prior's ε_y

    def triple(x0, cond):
        x_t = asd.add_noise(x0, eps, alpha_t, sigma_t)
        eps_uncond, eps_cond = (prior.eps(x_t, t, each) for each in (null, cond))
        return eps_uncond, eps_cond, eps_cond if lora else eps

    omega = asd.OMEGAS[method.omega](alpha_t, sigma_t)
    target, second = triple(source + 0.7, y), triple(source, z)
    expected = asd.generator_grad(*target, method.lam, omega)
    if name != "sds":
        expected = editing.editing_grad(target, second, method.lam, omega)
    torch.testing.assert_close(state.generator.theta.grad, expected, rtol=1e-4, atol=1e-5)


def test_dds_draws_t_and_weighs_as_its_notebook(prior):
    """t in 50 … 948 of 1000, ω(t) = 1 and no φ to train."""
    row = editing.METHODS["dds"]
    assert [asd.range_of_t(row, step, 1000) for step in (0, row.steps - 1)] == [(50, 948)] * 2
    omega = asd.OMEGAS[row.omega](*prior.alpha_sigma(torch.tensor([50, 500, 948])))
    assert (omega == 1).all() and row.phi is asd.NoisePhi


@pytest.mark.parametrize("name", ["asd", "eq10", "dds"])
def test_identical_prompts_and_image_give_no_gradient(prior, name):
    state, _, _ = edit(prior, name, same_prompt=True)
    assert (state.generator.theta.grad.abs() < 1e-5).all()


def test_second_discriminator_sees_the_source_image(prior, draws, monkeypatch):
    """Not the edit, with the same t and ε; at the second step the two have come apart."""
    calls, eps_of_prior = [], prior.eps

    def keep(x_t, t, cond):
        calls.append((x_t, t))
        return eps_of_prior(x_t, t, cond)
    monkeypatch.setattr(prior, "eps", keep)
    theta = edit(prior, "dds", lr=1.0)[0].generator.theta.detach().clone()
    calls.clear()
    draws.clear()
    _, _, source = edit(prior, "dds", steps=2, lr=1.0)
    assert len(calls) == 2 and (theta - source).abs().max() > 0.5
    for (x_t, t_asked), (t, eps), picture in zip(calls, draws, (source, theta)):
        expected = [asd.add_noise(x0, eps, *prior.alpha_sigma(t))        # one call a step:
                    for x0 in (picture, picture, source, source)]        # ε_∅, ε_y; ε_∅, ε_z
        assert torch.equal(x_t, torch.cat(expected)) and (t_asked == t).all()


@pytest.mark.parametrize("phi_z, fake, real", [
    ("eq9", "edit", "source"), ("swapped", "source", "edit"), ("both", "source", "source"),
    ("eq10", "edit", None)])
def test_phi_z_learns_by_eq9_as_read(prior, phi_z, fake, real, draws):
    """The losses of the first step, by hand: η = 0, γ = 1, of the edit and the source at one noise.

    loss_D is that and φ_y's, which is Eq. 10 at the edit. A LoRA still predicts what the prior
    does.
    """
    _, (log,), source = edit(prior, phi_z, apart=0.7)
    pictures_of = {"edit": source + 0.7, "source": source}

    def prediction(picture, prompt, t, eps):
        x_t = asd.add_noise(pictures_of[picture], eps, *prior.alpha_sigma(t))
        return prior.eps(x_t, t, prior.encode_text([prompt]))
    _, (t_y, eps_y), (t_z, eps_z) = draws                      # θ's, φ_y's, φ_z's
    y = prediction("edit", TARGET, t_y, eps_y)
    expected = asd.discriminator_loss_text(eps_y, y, y, -1.0)
    z = prediction(fake, SOURCE, t_z, eps_z)
    if real is None:
        expected += asd.discriminator_loss_text(eps_z, z, z, -1.0)
    else:
        z_real = prediction(real, SOURCE, t_z, eps_z)
        expected += asd.discriminator_loss(eps_z, z, z, z_real, z_real, 0.0, 1.0)
    assert log["loss_D"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-3)


def test_phi_z_has_its_names(prior):
    z, row = prior.encode_text([SOURCE]), editing.METHODS["asd"]
    for name in ("eq9", "swapped", "both", "eq10"):
        d = editing.second_discriminator(replace(row, phi_z=name), asd.NoisePhi(), z)
        assert d.at == "source" and (d.real is None) == (name == "eq10")
        assert (d.eta, d.gamma) == ((0.5, row.gamma) if name == "eq10" else (0.0, 1.0))
    assert row.phi_z == "eq9"
    assert editing.second_discriminator(replace(row, phi_z="none"), None, z) is None
    with pytest.raises(ValueError, match="phi_z"):
        editing.second_discriminator(replace(row, phi_z="sideways"), None, z)


def test_both_phi_learn_and_the_prior_does_not(prior):
    before = {name: tensor.clone() for name, tensor in prior.network.state_dict().items()}
    state, logs, _ = edit(prior, "asd", steps=2)
    for phi, seed in ((state.phi, 0), (state.second.phi, 1)):
        start = trainable(LoRAPhi(prior, seed=seed))
        assert not any(torch.equal(p, start[name]) for name, p in trainable(phi).items())
    for name, tensor in prior.network.state_dict().items():
        assert torch.equal(tensor, before[name])
    for log in logs:
        assert all(np.isfinite(value) for value in log.values())


@on_devices
@pytest.mark.parametrize("name", ["asd", "dds"])
def test_half_precision_priors_edit(load, name, device):
    """θ, the source and both φ stay float32 on the prior's device, the result is the caller's."""
    half = load(device=device, dtype=torch.bfloat16)
    image, states = torch.rand(2, 3, *half.image_size, generator=rng()), []
    mask = torch.ones(1, 1, *half.image_size)
    after = editing.edit(half, image, [SOURCE] * 2, [TARGET] * 2,
                         replace(editing.METHODS[name], steps=2), mask=mask,
                         callback=lambda state, terms: states.append(state))
    assert after.dtype == torch.float32 and after.device == image.device
    state = states[-1]
    for tensor in (*state.generator.parameters(), *state.generator.buffers(),
                   *trainable(state.phi).values(), *trainable(state.second.phi).values()):
        assert tensor.dtype == torch.float32 and tensor.device.type == device


def test_shared_noise_is_not_a_shared_picture(prior, draws):
    """φ_z judges the source but learns on the edit: ε_z and ε_φz of the one do not serve."""
    apart = 2 * torch.randn(1, *prior.shape, generator=rng(2))
    _, (log,), source = edit(prior, "eq10", apart=apart, share_noise=True)
    (t, eps), = draws
    x_t = asd.add_noise(source + apart, eps, *prior.alpha_sigma(t))
    errors = [(prior.eps(x_t, t, prior.encode_text([text])) - eps).square().sum().item()
              for text in (TARGET, SOURCE)]
    assert log["loss_D"] == pytest.approx(sum(errors), rel=1e-4)


@pytest.mark.parametrize("name", ["csd", "nfsd", "bridge", "exact", "vsd"])
def test_other_methods_edit_too(prior, name):
    """As a function, without the command line: rows of asd.py and variants.py."""
    row = editing.methods()["asd" if name == "exact" else name]
    if name == "exact":
        row = replace(row, phi=Exact, gamma=-0.5)
    image = torch.rand(2, 3, *prior.image_size, generator=rng())
    after = editing.edit(prior, image, [SOURCE] * 2, [TARGET] * 2, replace(row, steps=2, lr=0.1))
    assert after.shape == image.shape and not torch.allclose(
        after, prior.decode(prior.encode_image(image)))


def test_phi_z_is_made_for_the_lam_of_the_source(prior, draws):
    """CSD, of which Eq. 11 leaves (λ − 1)(ε_y − ε_∅) − (λ_z − 1)(ε_z − ε_∅), each with its λ."""
    image, states = torch.rand(1, 3, *prior.image_size, generator=rng()), []
    row = replace(editing.methods()["csd"], steps=1, omega="1", lr=0.0, lam=5.0, lam_source=3.0)
    editing.edit(prior, image, [SOURCE], [TARGET], row,
                 callback=lambda state, terms: states.append(state))
    (t, eps), generator = draws[0], states[0].generator
    x_t = asd.add_noise(generator.source, eps, *prior.alpha_sigma(t))
    null, y, z = (prior.eps(x_t, t, prior.encode_text([text])) for text in ("", TARGET, SOURCE))
    torch.testing.assert_close(generator.inner.theta.grad, 4 * (y - null) - 2 * (z - null),
                               rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="--lam 1"):
        editing.edit(prior, image, [SOURCE], [TARGET], replace(row, lam_source=1.0))


def test_a_batch_is_edited_as_its_pictures_are(prior, monkeypatch):
    """Without φ, SGD moves each picture of a batch as far as it would move it alone."""
    monkeypatch.setattr(asd, "draw_noise", lambda random, x0, lowest, highest: (
        torch.full((len(x0),), 400), torch.ones_like(x0)))
    image = torch.rand(2, 3, *prior.image_size, generator=rng())
    row = replace(editing.METHODS["dds"], steps=2)
    together = editing.edit(prior, image, [SOURCE] * 2, [TARGET] * 2, row)
    alone = editing.edit(prior, image[1:], [SOURCE], [TARGET], row)
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------- masks and networks
@pytest.mark.parametrize("pixels", [False, True])
def test_outside_the_mask_nothing_changes(prior, pixels):
    image = torch.rand(1, 3, *prior.image_size, generator=rng())
    mask = torch.zeros(1, 1, *prior.image_size)
    mask[..., :8] = 1
    generator = editing.Edited(prior, image, mask, pixels)
    assert torch.equal(generator().x0, generator.source)
    assert generator().source is generator.source
    theta = generator.inner.theta
    with torch.no_grad():
        theta += 0.3
    assert torch.equal(generator.images()[..., 8:], image[..., 8:])
    assert not torch.allclose(generator.images()[..., :8], image[..., :8])
    assert torch.equal(generator().x0[..., 4:], generator.source[..., 4:])
    generator().x0[..., 4:].sum().backward()
    assert (theta.grad == 0).all()
    generator().x0[..., :4].sum().backward()
    assert (theta.grad[..., :4] != 0).any()
    if not pixels:
        assert (theta.grad[..., :4] == 1).all() and (theta.grad[..., 4:] == 0).all()


def test_a_latent_may_change_where_its_cell_meets_the_mask(prior):
    mask = torch.zeros(1, 1, *prior.image_size)
    mask[..., 3, 5] = 1
    inside = editing.Edited(prior, torch.zeros(1, 3, *prior.image_size), mask).inside
    assert inside[0, 0].nonzero().tolist() == [[1, 2]]


def translator(prior, sources=6, batch=3):
    """A network for two things -> (Translator, y, z)."""
    y = prior.encode_text(["a blue fox", "a blue apple"])
    z = prior.encode_text(["a red fox", "a red apple"])
    sources = torch.randn(sources, *prior.shape, generator=rng())
    return editing.Translator(prior, sources, y, z, batch, rng(1)), y, z


def test_a_network_starts_as_the_identity_and_draws_its_sources(prior):
    net, y, z = translator(prior)
    for _ in range(4):
        samples = net()
        assert samples.x0.shape == (3, *prior.shape) and samples.camera is None
        assert torch.equal(samples.x0, samples.source)
        for i, source in enumerate(samples.source):
            (number,) = [k for k, x0 in enumerate(net.sources) if torch.equal(x0, source)]
            assert torch.equal(samples.cond[i], y[number % 2])
            assert torch.equal(samples.source_cond[i], z[number % 2])
    assert torch.equal(net.images(), net.shown())
    samples.x0.square().sum().backward()
    assert net.net.conv_out.weight.grad.abs().sum() > 0


def test_a_network_is_asked_for_each_thing_by_its_prompts(prior, draws, monkeypatch):
    """What the prior is asked: y of the drawn sources at the edit, their z at the source."""
    generator, _, z = translator(prior)
    calls, samples, eps_of_prior, forward = [], [], prior.eps, generator.forward

    def keep_call(x_t, t, cond):
        calls.append((x_t, cond))
        return eps_of_prior(x_t, t, cond)

    def keep_samples():
        samples.append(forward())
        return samples[-1]
    monkeypatch.setattr(prior, "eps", keep_call)
    monkeypatch.setattr(generator, "forward", keep_samples)
    method = replace(editing.methods(network=True)["dds"], steps=3)
    second = editing.second_discriminator(method, asd.NoisePhi(), z)
    state = asd.State(generator, asd.NoisePhi(), method, rng(), second)
    asd.distill(prior, generator, z[:1], method, state=state)
    assert len({sample.source_cond.sum().item() for sample in samples}) > 1
    for (x_t, cond), sample, (t, eps) in zip(calls, samples, draws, strict=True):
        at_edit, at_source = (asd.add_noise(x0.detach(), eps, *prior.alpha_sigma(t))
                              for x0 in (sample.x0, sample.source))
        assert torch.equal(x_t, torch.cat([at_edit, at_edit, at_source, at_source]))
        _, asked_y, _, asked_z = cond.chunk(4)
        assert torch.equal(asked_y, sample.cond) and torch.equal(asked_z, sample.source_cond)


# ------------------------------------------------------------------------------- the command line
def with_defaults(flags, model):
    """The flags of a short edit of a.png, or of the model's samples, but for those given."""
    flags = [str(flag) for flag in flags]
    if "--resume" in flags or "--apply" in flags:
        return flags
    defaults = {"--model": str(model), "--settings": "tiny", "--source": SOURCE,
                "--target": TARGET, "--steps": "2", "--out": "run", "--device": "cpu"}
    if "--network" not in flags:
        defaults["--image"] = "a.png"
    for name, value in defaults.items():
        if name not in flags:
            flags += [name, value]
    return flags


@pytest.fixture
def cli(model, tmp_path, monkeypatch, capsys):
    """cli(*flags) -> (status, stdout, stderr) of a short edit of a.png by the tiny model."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.rand(16, 16, 3, generator=rng()).mul(255).byte().numpy()
    Image.fromarray(pixels).save("a.png")

    def call(*flags):
        return editing.main(with_defaults(flags, model)), *capsys.readouterr()
    return call


@pytest.fixture(scope="module")
def made_once(folders, tmp_path_factory):
    """The folder of a trained network, no longer the identity; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("network") / "run"
    flags = ["--network", "--pictures", 2, "--batch", 2, "--method", "dds", "--lr", 0.01,
             "--steps", 1, "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asd.Prior, "from_pretrained", load_once)
        assert editing.main(with_defaults(flags, folders["epsilon"])) == 0
    return folder


@pytest.fixture
def trained(cli, made_once):
    """What `cli` is, where run/ is a trained network."""
    shutil.copytree(made_once, "run")
    return cli


def one_line(result, *parts):
    of_a_command(result, *parts, name="editing.py")


@pytest.mark.parametrize("name", ["asd", "dds"])
def test_an_edit_leaves_its_files(cli, name):
    status, out, _ = cli("--method", name)
    assert status == 0 and out == "run/before_after.png\n"
    assert contents("run").keys() >= {"edited.png", "before_after.png", "progress.png",
                                      "metrics.jsonl", "config.json", "checkpoint.safetensors"}
    rows = metrics("run")
    assert len(rows) == 2 and {"psnr", "clip_distance", "clip_target"} <= rows[-1].keys()


def test_the_edit_begins_at_the_picture(cli):
    assert cli("--lr", 0, "--method", "dds", "--pixels", "--steps", 1)[0] == 0
    assert torch.equal(checkpoint("run")["theta.0"], files.read_image("a.png", (16, 16)))
    assert metrics("run")[-1]["psnr"] == pytest.approx(100)


def test_before_is_left_of_after(cli):
    assert cli("--method", "dds", "--lr", 20, "--pixels", "--steps", 1)[0] == 0
    before, after = files.read_image("a.png", (16, 16)), checkpoint("run")["theta.0"].clamp(0, 1)
    assert (after - before).abs().mean() > 0.02
    both = pictures.to_bytes(torch.cat([before, after]))
    for name, expected in (("before_after", both), ("edited", both[1:])):
        pictures.write_grid(Path("expected.png"), expected, len(expected))
        assert Path(f"run/{name}.png").read_bytes() == Path("expected.png").read_bytes()


def test_each_before_is_left_of_its_after(cli):
    """A network without a rate is the identity: the same twice in each row."""
    assert cli("--network", "--pictures", 2, "--batch", 1, "--method", "dds", "--lr", 0,
               "--steps", 1)[0] == 0
    rows = np.array(Image.open("run/before_after.png")).astype(int).reshape(2, 256, 2, 256, 3)
    left, right = rows[:, 40:-40, :, 40:-40].transpose(2, 0, 1, 3, 4)         # but for the seams
    assert abs(left - right).max() <= 1 and abs(left[0] - left[1]).max() > 20


@pytest.mark.parametrize("flags", [["--network"], ["--mask", "m.png"]], ids=" ".join)
def test_resumed_edit_is_the_same(cli, flags):
    """Even though the picture itself is gone by then; t must not turn late in between."""
    Image.new("L", (16, 16), 255).save("m.png")
    Path("pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 40, 90)).save(f"pictures/{i}.png")
    if flags == ["--network"]:
        flags = ["--network", "--image", "pictures", "--t-late", 1, "--batch", 2]
    assert cli(*flags)[0] == 0
    assert cli(*flags, "--steps", 1, "--out", "half")[0] == 0
    for path in [*Path("pictures").iterdir(), Path("a.png")]:
        path.unlink()
    assert cli("--resume", "half", "--steps", 2)[0] == 0
    whole, half = checkpoint("run"), checkpoint("half")
    assert whole.keys() - {"frame.1"} == half.keys() - {"frame.1"}
    for name, tensor in whole.items():
        assert name == "frame.1" or torch.equal(tensor, half[name]), name
    assert contents("run")["edited.png"] == contents("half")["edited.png"]


def test_a_run_stopped_before_its_first_checkpoint_ends_in_the_same(trained):
    """A network's samples are there by then: reading them must not change what is drawn later."""
    before = checkpoint("run")
    Path("run/checkpoint.safetensors").unlink()
    Path("run/before_after.png").unlink()
    forget_picture("run")
    assert trained("--resume", "run")[0] == 0
    after = checkpoint("run")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_network_is_saved_and_applied(trained):
    """And a run of editing.py is not resumed by another program."""
    Path("pictures").mkdir()
    Image.new("RGB", (20, 20), "teal").save("pictures/0.png")
    status, out, _ = trained("--apply", "run", "--image", "a.png")
    assert status == 0 and "ms per picture" in out and Path("run/applied-a.png").exists()
    status, out, _ = trained("--apply", "run", "--image", "pictures", "--out", "new/all.png")
    assert status == 0 and Path("new/all.png").exists()
    Path("holiday").mkdir()
    shutil.copy("a.png", "holiday/b.png")                           # the user's own
    before = contents("run")
    for image, out in (("a.png", []), ("a.png", ["--out", "run/checkpoint.safetensors"]),
                       ("a.png", ["--out", "run"]), ("a.png", ["--out", "holiday/b.png"])):
        one_line(trained("--apply", "run", "--image", image, *out), "there already")
    one_line(trained("--apply", "run", "--image", "a.png", "--out", "new/all.jpg"), "end in .png")
    assert contents("run") == before and not Path("new/all.jpg").exists()
    one_line(trained("--apply", "run"), "--image")
    one_line(trained("--apply", "run", "--image", "missing.png"), "missing.png")
    one_line(trained("--apply", "run", "--image", "a.png", "--steps", "3"),
             "--steps is no setting of --apply")
    one_line(trained("--apply", "pictures", "--image", "a.png"), "no trained network")
    assert asd.main(["--resume", "run"]) == 2


def test_a_network_is_applied_at_the_size_it_was_trained_at(trained):
    config = json.loads(Path("run/config.json").read_text())
    config["settings"]["size"] = 24
    Path("run/config.json").write_text(json.dumps(config))
    assert editing.load_network("run", "cpu")[0].image_size == (24, 24)


def test_what_apply_translates_is_what_was_trained(trained):
    """The saved network is the trained one, and it is no longer the identity."""
    prior, net = editing.load_network("run", "cpu")
    theta = checkpoint("run")
    for i, p in enumerate(net.parameters()):
        assert torch.equal(p, theta[f"theta.{i}"])
    before = files.read_image("a.png", (16, 16))
    after, _ = editing.in_one_pass(prior, net, before)
    with torch.no_grad():
        x0 = prior.encode_image(before)
        assert torch.equal(after, prior.decode(x0 + net(x0, 0).sample))
        assert not torch.equal(after, prior.decode(x0))


def test_a_network_whose_model_has_moved_is_not_applied(trained):
    config = json.loads(Path("run/config.json").read_text())
    config["settings"]["model"] = "/no/such/model"
    Path("run/config.json").write_text(json.dumps(config))
    one_line(trained("--apply", "run", "--image", "a.png"), "/no/such/model", "move it back")


def test_a_network_is_never_unpickled(trained):
    weights = Path("run/network/diffusion_pytorch_model.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    one_line(trained("--apply", "run", "--image", "a.png"), "no trained network")
    weights.unlink()
    one_line(trained("--apply", "run", "--image", "a.png"), "no trained network")


def test_one_network_for_several_things():
    """{} in the prompts is each of --things; the defaults are a network's, not a picture's."""
    given = {"network": True, "things": "apple, fox", "source": "a red {}", "target": "a blue {}",
             "phi_z": "eq10"}
    settings = new_settings(editing.command(), given)
    assert (settings.optimizer, settings.lr) == ("adam", editing.NETWORK["lr"])
    assert settings.phi_z == "eq10"
    assert editing.target_prompts(settings) == ["a blue apple", "a blue fox"]
    assert editing.source_prompts(settings) == ["a red apple", "a red fox"]
    for wrong, part in (({"network": False, "image": "a.png"}, "--network"),
                        ({"image": "."}, "--image"), ({"things": "fox,,apple"}, "not empty"),
                        ({"source": "a fox"}, "{}")):
        with pytest.raises(asd.UserError, match=part):
            new_settings(editing.command(), given | wrong)


def test_the_command_asks_for_the_target(cli, monkeypatch):
    kept = []

    def keep(prior, generator, cond, method, state, **_):
        kept.append((prior, cond, state))
    monkeypatch.setattr(asd, "distill", keep)
    assert cli("--phi", "embedding")[0] == 0
    (prior, y, state), = kept
    for text, cond, phi in ((TARGET, y, state.phi),
                            (SOURCE, state.second.cond, state.second.phi)):
        assert torch.equal(cond, prior.encode_text([text]))
        assert torch.equal(phi.words[0], EmbeddingPhi(prior, text).words[0])


def test_a_network_learns_on_samples_of_the_source(cli, monkeypatch):
    texts_of_samples = []

    def sample(prior, texts, x_T):
        texts_of_samples.extend(texts)
        return x_T
    monkeypatch.setattr("prior.ddim_samples", sample)
    monkeypatch.setattr(asd, "distill", lambda *args, **rest: None)
    assert cli("--network", "--things", "apple, fox", "--source", "a red {}", "--target",
               "a blue {}", "--pictures", 3, "--method", "dds")[0] == 0
    assert texts_of_samples == ["a red apple", "a red fox", "a red apple"]


@cuda
def test_a_run_on_cuda_goes_on(cli):
    for out, flags in (("picture", []), ("network", ["--network", "--pictures", 2])):
        assert cli(*flags, "--device", "cuda", "--out", out)[0] == 0
        assert cli("--resume", out, "--steps", 3)[0] == 0
    assert cli("--apply", "network", "--image", "a.png", "--device", "cuda")[0] == 0


def test_mask_lies_as_the_picture_does(tmp_path):
    """A photograph that its camera has turned; strokes on nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6                                          # to be turned by 90° clockwise
    Image.new("RGB", (16, 8), "red").save(tmp_path / "turned.jpg", exif=exif)
    strokes = Image.new("RGBA", (8, 16))
    strokes.paste("white", (0, 0, 8, 8))                      # its upper half
    strokes.paste("#606060", (0, 8, 8, 12))                   # rather black than white
    strokes.save(tmp_path / "mask.png")
    settings = SimpleNamespace(image=tmp_path / "turned.jpg", mask=tmp_path / "mask.png")
    _, mask = editing.read_pictures(settings, (16, 8))
    assert mask[0, 0, :, 0].tolist() == [1] * 8 + [0] * 8 and (mask == mask[..., :1]).all()
    Image.new("L", (16, 8), 255).save(tmp_path / "mask.png")
    with pytest.raises(asd.UserError, match="must agree"):
        editing.read_pictures(settings, (16, 8))


def test_mistakes_are_one_line(cli):
    Path("broken.png").write_bytes(b"no picture")
    Image.new("L", (8, 8), 255).save("small.png")
    for flags, part in (
            (["--image", "missing.png"], "missing.png"), (["--image", "broken.png"], "broken.png"),
            (["--mask", "small.png"], "must agree"), (["--mask", "missing.png"], "missing.png"),
            (["--method", "dds", "--phi", "lora"], "--method dds is its φ: drop --phi lora"),
            (["--source", " "], "--source"), (["--target", ""], "--target"),
            (["--network", "--mask", "a.png"], "--mask"), (["--network", "--batch", 0], "--batch"),
            (["--method", "nonsense"], "dds"), (["--phi-z", "sideways"], "swapped")):
        one_line(cli(*flags), part)
    assert not Path("run").exists()


# ------------------------------------------------------------------------------------ on tiny-sd
# the paper's: simplification, refinement, replacement
SOURCES = ["a 3d render of a fox", "a flat icon of a fox", "a 3d render of a cat"]
TARGETS = ["a flat icon of a fox", "a 3d render of a fox", "a 3d render of a dog"]


@pytest.fixture(scope="module")
def cases(tiny):
    """The source pictures, and pictures of their targets that do not know them.

    The cat is the prior's own: tiny-clip takes that of examples/ for a dog (0.78) more than it does
    what the prior draws as one (0.7).
    """
    x_T = torch.randn(4, *tiny.shape, generator=rng())
    drawn = tiny.decode(ddim_samples(tiny, [SOURCES[2], *TARGETS], x_T, steps=12))
    foxes = [files.read_image(HERE / "examples" / name, tiny.image_size)
             for name in ("fox.png", "fox-flat.png")]
    return torch.cat([*foxes, drawn[:1]]), drawn[1:]


@needs_tiny_sd
@pytest.mark.parametrize("name", ["asd", "dds"])
def test_the_papers_three_cases(tiny, cases, name):
    """More of the target and less of the source prompt than the source image has, and closer to
    that image than an unrelated target is.

    Closer in pixels: in tiny-clip's features, which tell little but the caption, two pictures of
    one target are about as far from the source.
    """
    images, unrelated = cases
    row = editing.METHODS[name]
    row = replace(row, steps=5, lr=8 * row.lr)               # two thirds of the run's way, quickly
    edited = editing.edit(tiny, images, SOURCES, TARGETS, row)
    for i, case in enumerate(SOURCES):
        before, after, free = (distances(images[i:i + 1], x[i:i + 1], case, TARGETS[i])
                               for x in (images, edited, unrelated))
        moved = [numbers["clip_target"] - numbers["clip_source"] for numbers in (before, after)]
        assert moved[1] > moved[0] + 0.05, case
        assert after["psnr"] > free["psnr"], case


@needs_tiny_sd
@pytest.mark.parametrize("name", ["dds", "asd"])
def test_time_of_a_step_of_an_edit(benchmark, tiny, name):
    row, z = editing.METHODS[name], tiny.encode_text(["a fox"])
    generator = editing.Edited(tiny, torch.rand(1, 3, *tiny.image_size, generator=rng()))
    phi, phi_z = (asd.make_phi(row, tiny, "a fox") for _ in range(2))
    state = asd.State(generator, phi, row, rng(), editing.second_discriminator(row, phi_z, z))

    def step():
        asd.distill(tiny, generator, z, replace(row, steps=state.step + 1), state=state)
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert generator().x0.isfinite().all()
