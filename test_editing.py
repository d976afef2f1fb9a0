"""Eq. 11 and image editing: on the exact prior, on a tiny random pipeline, and on tiny/sd.

    Eq. 11  editing_grad           test_eq11_is_the_gradient_of_two_discriminators
    DDS     editing_grad           test_dds_is_eq11_with_the_added_noise
    Eq. 9   second_discriminator   test_phi_z_learns_by_eq9_as_read, test_second_discriminator…
"""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image
from safetensors.torch import load_file

import asd
import editing
import files
import runs
from conftest import cosine, fixed_mixture, mixtures, randn
from phi import EmbeddingPhi, LoRAPhi
from prior import ddim_samples
from test_asd import close, guidance, levels, mutants, noise, seeds, shapes, slope
from test_distill import folders, load, on_devices, prior, rng, trainable  # noqa: F401
from test_runs import checkpoint, contents, metrics, model  # noqa: F401
from tiny.judge import distances
from variants import Exact

HERE = Path(asd.__file__).resolve().parent
PROMPTS = ["--source", "a red apple", "--target", "a blue fox"]


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
    slopes, said = [], []
    for x, y, phi in ((x_t, 0, 2), (x_s, 1, 1)):
        x = x.requires_grad_()
        bound = mixture.log_posterior(phi, x, alpha_t, sigma_t) \
            - lam * mixture.log_posterior(y, x, alpha_t, sigma_t)
        slopes.append(sigma_t * slope(bound, x))
        said.append([mixture.eps(x.detach(), alpha_t, sigma_t, c) for c in (None, y, phi)])
    return slopes[0] - slopes[1], said


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
    uncond, other, y, z, phi_y, phi_z = noise(seed, shape, 6)
    grad = editing.editing_grad((uncond, y, phi_y), (uncond, z, phi_z), lam)
    close(grad, lam * (y - z) - (phi_y - phi_z))
    close(grad, editing.editing_grad((other, y, phi_y), (other, z, phi_z), lam))


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


# ------------------------------------------------------------------------- the loop, tiny pipeline
def row_of(name):
    """A row of editing.METHODS, or ASD's with this phi_z."""
    return editing.METHODS.get(name) or replace(editing.METHODS["asd"], phi_z=name)


def edit(prior, name="asd", steps=1, apart=0, same_prompt=False, **changes):     # noqa: F811
    """A short edit, which starts `apart` from the source -> (state, rows, source latents)."""
    method = replace(row_of(name), steps=steps, **changes)
    y, z = prior.encode_text(["a blue fox", "a red apple"]).split(1)
    source, random = torch.randn(1, *prior.shape, generator=rng(0)), rng(5)
    generator = asd.Latents(prior, 1, random)
    with torch.no_grad():
        generator.theta.copy_(source + apart)
    phis = [asd.make_phi(method, prior, "a red apple", seed) for seed in (0, 1)]
    second = editing.second_discriminator(method, phis[1], z if not same_prompt else y, source)
    state, rows = asd.State(generator, phis[0], method, random, second), []
    asd.distill(prior, generator, y, method, state=state,
                callback=lambda state, terms: rows.append(terms))
    return state, rows, source


@pytest.mark.parametrize("name", ["asd", "swapped", "both", "eq10", "dds", "sds"])
def test_the_loop_is_eq11(prior, name, monkeypatch):                             # noqa: F811
    """The gradient that reaches θ, recomputed around the networks: D(x_t; z) sees the source."""
    seen = {}
    draw = asd.draw_noise

    def first_draw(random, x0, lowest, highest):
        out = draw(random, x0, lowest, highest)
        seen.setdefault("noise", out)
        return out

    monkeypatch.setattr(asd, "draw_noise", first_draw)
    state, _, source = edit(prior, name, lr=0.0, apart=0.7)
    method = row_of(name)
    t, eps = seen["noise"]
    alpha_t, sigma_t = prior.alpha_sigma(t)
    y, z, null = prior.encode_text(["a blue fox", "a red apple", ""]).split(1)
    lora = method.phi is LoRAPhi               # at the first step a LoRA says what the prior says

    def triple(x0, cond):
        x_t = asd.add_noise(x0, eps, alpha_t, sigma_t)
        with torch.no_grad():
            eps_uncond, eps_cond = (prior.eps(x_t, t, each) for each in (null, cond))
        return eps_uncond, eps_cond, eps_cond if lora else eps

    omega = asd.OMEGAS[method.omega](alpha_t, sigma_t)
    target, second = triple(source + 0.7, y), triple(source, z)
    expected = asd.generator_grad(*target, method.lam, omega)
    if name != "sds":
        expected = editing.editing_grad(target, second, method.lam, omega)
    torch.testing.assert_close(state.generator.theta.grad, expected, rtol=1e-4, atol=1e-5)


def test_dds_draws_t_and_weighs_as_its_notebook(prior, monkeypatch):             # noqa: F811
    """t in 50 … 948 of 1000, ω(t) = 1 and no φ to train."""
    bounds = []
    draw = asd.draw_noise
    monkeypatch.setattr(asd, "draw_noise", lambda *args: bounds.append(args[2:]) or draw(*args))
    edit(prior, "dds", steps=2)
    assert bounds == [(50, 948)] * 2
    t = torch.tensor([50, 500, 948])
    omega = asd.OMEGAS[editing.METHODS["dds"].omega](*prior.alpha_sigma(t))
    assert (omega == 1).all() and editing.METHODS["dds"].phi is asd.NoisePhi


@pytest.mark.parametrize("name", ["asd", "eq10", "dds"])
def test_identical_prompts_and_image_give_no_gradient(prior, name):              # noqa: F811
    state, _, source = edit(prior, name, same_prompt=True)
    assert (state.generator.theta.grad.abs() < 1e-5).all()


def test_second_discriminator_sees_the_source_image(prior, monkeypatch):         # noqa: F811
    """Not the edit, with the same t and ε; at the second step the two have come apart."""
    seen, noises, edits = [], [], []
    eps_of, draw = prior.eps_of, asd.draw_noise
    monkeypatch.setattr(prior, "eps_of", lambda unet, x_t, t, cond, **kw: (
        seen.append((x_t.clone(), t)), eps_of(unet, x_t, t, cond, **kw))[1])

    def remembered(random, x0, *bounds):
        edits.append(x0.clone())
        noises.append(draw(random, x0, *bounds))
        return noises[-1]

    monkeypatch.setattr(asd, "draw_noise", remembered)
    _, _, source = edit(prior, "dds", steps=2, lr=1.0)
    assert len(seen) == 2 and (edits[1] - source).abs().max() > 0.5
    for (x_t, t_seen), (t, eps), picture in zip(seen, noises, edits):        # one call a step:
        expected = [asd.add_noise(x0, eps, *prior.alpha_sigma(t))            # ε_∅, ε_y; ε_∅, ε_z
                    for x0 in (picture, picture, source, source)]
        assert torch.equal(x_t, torch.cat(expected)) and (t_seen == t).all()


@pytest.mark.parametrize("phi_z, fake_is_edit, real", [
    ("eq9", True, "source"), ("swapped", False, "edit"), ("both", False, "source"),
    ("eq10", True, None)])
def test_phi_z_learns_by_eq9_as_read(prior, phi_z, fake_is_edit, real, monkeypatch):   # noqa: F811
    """Its loss in the loop, by hand: η = 0, γ = 1, of the edit e and the source s at one noise."""
    losses, noises, draw, step = {}, [], asd.draw_noise, asd.discriminator_step
    monkeypatch.setattr(asd, "draw_noise", lambda *args: noises.append(draw(*args)) or noises[-1])
    monkeypatch.setattr(asd, "discriminator_step", lambda state, method, d, *rest:
                        losses.setdefault(d is state.second, step(state, method, d, *rest)))
    _, _, s_ = edit(prior, phi_z, apart=0.7, phi_lr=0.0)
    z, (t, eps) = prior.encode_text(["a red apple"]), noises[2]     # θ's, φ_y's, φ_z's

    def z_at(x0):                   # at the first step ε_φz is ε_z
        with torch.no_grad():
            return prior.eps(asd.add_noise(x0, eps, *prior.alpha_sigma(t)), t, z)
    at = {"edit": z_at(s_ + 0.7), "source": z_at(s_)}
    fake = at["edit" if fake_is_edit else "source"]
    expected = asd.discriminator_loss_text(eps, fake, fake, -1.0) if real is None else \
        asd.discriminator_loss(eps, fake, fake, at[real], at[real], 0.0, 1.0)
    torch.testing.assert_close(torch.tensor(losses[True]), expected, rtol=1e-4, atol=1e-3)


def test_phi_z_has_its_names(prior):                                             # noqa: F811
    source, z = torch.zeros(1, *prior.shape), prior.encode_text(["a red apple"])
    row = editing.METHODS["asd"]
    for name in ("eq9", "swapped", "both", "eq10"):
        d = editing.second_discriminator(replace(row, phi_z=name), asd.NoisePhi(), z, source)
        assert torch.equal(d.seen, source) and (d.real is None) == (name == "eq10")
        assert (d.eta, d.gamma) == ((0.5, row.gamma) if name == "eq10" else (0.0, 1.0))
    assert row.phi_z == "eq9"
    assert editing.second_discriminator(replace(row, phi_z="none"), None, z, source) is None
    with pytest.raises(ValueError, match="phi_z"):
        editing.second_discriminator(replace(row, phi_z="sideways"), None, z, source)


def test_both_phi_learn_and_the_prior_does_not(prior):                           # noqa: F811
    before = {k: v.clone() for k, v in prior.network.state_dict().items()}
    state, rows, _ = edit(prior, "asd", steps=3)
    for phi in (state.phi, state.second.phi):
        fresh = LoRAPhi(prior, seed=0 if phi is state.phi else 1)
        old = trainable(fresh)
        assert all(not torch.equal(p, old[name]) for name, p in trainable(phi).items())
    assert all(torch.equal(v, before[k]) for k, v in prior.network.state_dict().items())
    assert all(math.isfinite(value) for row in rows for value in row.values())


@on_devices
@pytest.mark.parametrize("name", ["asd", "dds"])
def test_half_precision_priors_edit(load, name, device):                         # noqa: F811
    """θ, the source and both φ stay float32 on the prior's device, the result is the caller's."""
    half = load(device=device, dtype=torch.bfloat16)
    image, kept = torch.rand(2, 3, *half.image_size, generator=rng()), []
    mask = torch.ones(1, 1, *half.image_size)
    after = editing.edit(half, image, ["a red apple"] * 2, ["a blue fox"] * 2,
                         replace(editing.METHODS[name], steps=2), mask=mask,
                         callback=lambda state, terms: kept.append(state))
    assert after.dtype == torch.float32 and after.device == image.device
    state = kept[-1]
    for tensor in (*state.generator.parameters(), *state.generator.buffers(),
                   *trainable(state.phi).values(), *trainable(state.second.phi).values()):
        assert tensor.dtype == torch.float32 and tensor.device.type == device


# ---------------------------------------------------------------------------- masks and networks
@pytest.mark.parametrize("pixels", [False, True])
def test_outside_the_mask_nothing_changes(prior, pixels):                        # noqa: F811
    image = torch.rand(1, 3, *prior.image_size, generator=rng())
    mask = torch.zeros(1, 1, *prior.image_size)
    mask[..., :8] = 1
    generator = editing.Edited(prior, image, mask, pixels)
    assert torch.equal(generator(), generator.source)
    theta = generator.inner.theta
    with torch.no_grad():
        theta += 0.3
    assert torch.equal(generator.images()[..., 8:], image[..., 8:])
    assert not torch.allclose(generator.images()[..., :8], image[..., :8])
    assert torch.equal(generator()[..., 4:], generator.source[..., 4:])
    generator()[..., 4:].sum().backward()
    assert (theta.grad == 0).all()
    generator()[..., :4].sum().backward()
    assert (theta.grad[..., :4] != 0).any()
    if not pixels:
        assert (theta.grad[..., :4] == 1).all() and (theta.grad[..., 4:] == 0).all()


def test_a_latent_may_change_where_its_cell_meets_the_mask(prior):               # noqa: F811
    mask = torch.zeros(1, 1, *prior.image_size)
    mask[..., 3, 5] = 1
    inside = editing.Edited(prior, torch.zeros(1, 3, *prior.image_size), mask).inside
    assert inside[0, 0].nonzero().tolist() == [[1, 2]]


def translator(prior, sources=6, batch=3):                                       # noqa: F811
    """A network for two things -> (Translator, y, z)."""
    y = prior.encode_text(["a blue fox", "a blue apple"])
    z = prior.encode_text(["a red fox", "a red apple"])
    sources = torch.randn(sources, *prior.shape, generator=rng())
    return editing.Translator(prior, sources, y, z, batch, rng(1)), y, z


def test_a_network_starts_as_the_identity_and_draws_its_sources(prior):          # noqa: F811
    net, y, z = translator(prior)
    x0, cond, camera = net()
    assert x0.shape == (3, *prior.shape) and torch.equal(x0, net.source) and camera is None
    for _ in range(4):
        _, cond, _ = net()
        for i, source in enumerate(net.source):
            (index,) = [k for k, x in enumerate(net.sources) if torch.equal(x, source)]
            assert torch.equal(cond[i], y[index % 2]) and torch.equal(net.cond_z[i], z[index % 2])
    assert torch.equal(net.images(), net.shown())
    x0.square().sum().backward()
    assert net.net.conv_out.weight.grad.abs().sum() > 0


def test_a_network_is_asked_for_each_thing_by_its_prompts(prior, monkeypatch):   # noqa: F811
    """What the UNet is asked in the loop: y of the drawn sources, then their z, at their noise."""
    generator, _, z = translator(prior)
    asked, eps_of = [], prior.eps_of
    monkeypatch.setattr(prior, "eps_of", lambda unet, x_t, t, cond, **kw: (
        asked.append((x_t.clone(), cond.clone())), eps_of(unet, x_t, t, cond, **kw))[1])
    method, sampled = replace(editing.methods(network=True)["dds"], steps=3), []
    second = editing.second_discriminator(method, asd.NoisePhi(), generator.cond_z,
                                          lambda x0: generator.source)
    forward = generator.forward
    monkeypatch.setattr(generator, "forward", lambda: sampled.append(
        (out := forward(), generator.source, generator.cond_z.clone())) or out)
    state = asd.State(generator, asd.NoisePhi(), method, rng(), second)
    asd.distill(prior, generator, z[:1], method, state=state)
    assert len(asked) == 3 and len({x[2].sum().item() for x in sampled}) > 1
    for step, ((x0, y_i, _), source, z_i) in enumerate(sampled):
        (x_t, x_s), (cond_y, cond_z) = (v.chunk(2) for v in asked[step])
        assert torch.equal(cond_y[3:], y_i) and torch.equal(cond_z[3:], z_i)
        same_noise = (x_t - x_s)[:3] / (x0.detach() - source)
        if step == 0:
            assert torch.equal(x_t, x_s)
        else:            # their difference is α_t times that of the pictures, as ε is the same
            assert (same_noise.flatten(1).std(1) < 1e-2 * same_noise.flatten(1).mean(1)).all()


# ------------------------------------------------------------------------------- the command line
@pytest.fixture
def cli(model, tmp_path, monkeypatch, capsys):                                   # noqa: F811
    """cli(*flags) -> (status, stdout, stderr) of a short edit of a.png by the tiny model."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.rand(16, 16, 3, generator=rng()).mul(255).byte().numpy()
    Image.fromarray(pixels).save("a.png")

    def call(*flags):
        flags = [str(flag) for flag in flags]
        if not any(flag.startswith(("--resume", "--apply")) for flag in flags):
            flags = ["--model", model, "--settings", "tiny", *PROMPTS, "--steps", "3",
                     "--out", "run", "--device", "cpu",
                     *([] if "--network" in flags else ["--image", "a.png"]), *flags]
        try:
            status = editing.main(flags)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


def one_line(result, part):
    status, out, err = result
    lines = [line for line in err.splitlines() if line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("editing.py: "), err[-900:]
    assert part in lines[0] and out == ""


@pytest.mark.parametrize("name", ["asd", "dds", "sds", "vsd"])
def test_an_edit_leaves_its_files(cli, name):
    status, out, _ = cli("--method", name)
    assert status == 0 and out.strip().endswith("before_after.png")
    found = contents("run")
    for file in ("edited.png", "before_after.png", "progress.png", "metrics.jsonl", "config.json"):
        assert found[file]
    rows = metrics("run")
    assert len(rows) == 3 and {"psnr", "clip_distance", "clip_target"} <= rows[-1].keys()


def test_the_edit_begins_at_the_picture(cli):
    assert cli("--lr", 0, "--method", "dds", "--pixels")[0] == 0
    before = files.read_image("a.png", (16, 16))
    assert torch.equal(checkpoint("run")["theta.0"], before)
    assert metrics("run")[-1]["psnr"] == pytest.approx(100)


def test_before_is_left_of_after(cli):
    assert cli("--method", "dds", "--lr", 20, "--pixels")[0] == 0
    before, after = files.read_image("a.png", (16, 16)), checkpoint("run")["theta.0"].clamp(0, 1)
    assert (after - before).abs().mean() > 0.02
    pictures = (torch.cat([before, after]) * 255).round().byte()
    for name, expected in (("before_after", pictures), ("edited", pictures[1:])):
        runs.write_grid(Path("expected.png"), expected, len(expected))
        assert Path(f"run/{name}.png").read_bytes() == Path("expected.png").read_bytes()


def test_each_before_is_left_of_its_after(cli):
    """A network without a rate is the identity: the same twice in each row."""
    assert cli("--network", "--pictures", 2, "--method", "dds", "--lr", 0)[0] == 0
    rows = np.array(Image.open("run/before_after.png")).astype(int).reshape(2, 256, 2, 256, 3)
    left, right = rows[:, 40:-40, :, 40:-40].transpose(2, 0, 1, 3, 4)         # but for the seams
    assert abs(left - right).max() <= 1 and abs(left[0] - left[1]).max() > 20


@pytest.mark.parametrize("flags", [[], ["--network"], ["--mask", "m.png"], ["--pixels"]])
def test_resumed_edit_is_the_same(cli, flags, tmp_path):
    """Even though the picture itself is gone by then; t must not turn late in between."""
    Image.new("L", (16, 16), 255).save("m.png")
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 40, 90)).save(f"pictures/{i}.png")
    if flags == ["--network"]:
        flags = ["--network", "--image", "pictures", "--t-late", 1]
    assert cli(*flags, "--steps", 4)[0] == 0
    assert cli(*flags, "--steps", 2, "--out", "half")[0] == 0
    for path in [*(tmp_path / "pictures").iterdir(), tmp_path / "a.png"]:
        path.unlink()
    assert cli("--resume", "half", "--steps", 4)[0] == 0
    one, two = checkpoint("run"), checkpoint("half")
    assert one.keys() == two.keys()
    assert not [k for k in one if not k.startswith("frame") and not torch.equal(one[k], two[k])]
    assert contents("run")["edited.png"] == contents("half")["edited.png"]


@pytest.mark.parametrize("flags", [["--network", "--pictures", 5], ["--image", "a.png"]])
def test_a_run_stopped_before_its_first_checkpoint_ends_in_the_same(cli, flags):
    """A network's samples are there by then: reading them must not change what is drawn later."""
    for folder in ("run", "half"):
        assert cli("--method", "dds", *flags, "--out", folder)[0] == 0
    (Path("half") / "checkpoint.safetensors").unlink()
    assert cli("--resume", "half")[0] == 0
    one, two = checkpoint("run"), checkpoint("half")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_network_is_saved_and_applied(cli, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20), "teal").save("pictures/0.png")
    assert cli("--network", "--image", "pictures", "--method", "dds")[0] == 0
    assert (tmp_path / "run/network/diffusion_pytorch_model.safetensors").exists()
    status, out, _ = cli("--apply", "run", "--image", "a.png")
    assert status == 0 and "ms per picture" in out and (tmp_path / "run/applied.png").exists()
    status, out, _ = cli("--apply=run", "--image", "pictures", "--out", "new/all.png")
    assert status == 0 and (tmp_path / "new/all.png").exists()
    one_line(cli("--apply", "run"), "--image")
    kept = contents("run")
    for image, out in (("run/applied.png", []), ("a.png", ["--out", "run/checkpoint.safetensors"]),
                       ("a.png", ["--out", "run"])):
        one_line(cli("--apply", "run", "--image", image, *out), "there already")
    assert contents("run") == kept
    one_line(cli("--apply", "run", "--image", "missing.png"), "missing.png")
    one_line(cli("--apply", "run", "--image", "a.png", "--steps", "3"), "--steps")
    one_line(cli("--apply", "pictures", "--image", "a.png"), "no trained network")


def test_what_apply_translates_is_what_was_trained(cli):
    """The saved network is the trained one, and it is no longer the identity."""
    assert cli("--network", "--pictures", 2, "--method", "dds", "--lr", 0.01)[0] == 0
    prior_, net = editing.load_network("run", "cpu")
    named = [p for p in net.parameters()]
    trained = checkpoint("run")
    assert all(torch.equal(p, trained[f"theta.{i}"]) for i, p in enumerate(named))
    before = files.read_image("a.png", (16, 16))
    after, _ = editing.in_one_pass(prior_, net, before)
    with torch.no_grad():
        x0 = prior_.encode_image(before)
        assert torch.equal(after, prior_.decode(x0 + net(x0, 0).sample))
        assert not torch.equal(after, prior_.decode(x0))


def test_a_network_is_never_unpickled(cli):
    assert cli("--network", "--pictures", 2, "--method", "dds")[0] == 0
    weights = Path("run/network/diffusion_pytorch_model.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    one_line(cli("--apply", "run", "--image", "a.png"), "no trained network")
    weights.unlink()
    one_line(cli("--apply", "run", "--image", "a.png"), "no trained network")


def test_one_network_for_several_things(cli):
    """{} in the prompts is each of --things; the defaults are a network's, not a picture's."""
    assert cli("--network", "--things", "apple, fox", "--source", "a red {}", "--target",
               "a blue {}", "--pictures", 4, "--phi-z", "eq10")[0] == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert settings["optimizer"] == "adam" and settings["lr"] == editing.NETWORK["lr"]
    assert settings["phi_z"] == "eq10"
    assert editing.prompts(settings) == (["a blue apple", "a blue fox"],
                                         ["a red apple", "a red fox"])
    one_line(cli("--things", "fox"), "--network")
    one_line(cli("--network", "--things", "fox", "--image", "."), "--image")
    one_line(cli("--network", "--things", "fox,,apple"), "not empty")
    one_line(cli("--network", "--things", "fox"), "{}")


def test_the_command_asks_for_the_target(cli, monkeypatch):
    seen = []
    monkeypatch.setattr(asd, "distill", lambda prior_, generator, cond, method, state, **_:
                        seen.append((prior_, cond, state)))
    assert cli("--phi", "embedding")[0] == 0
    (prior_, y, state), = seen
    for text, cond, phi in (("a blue fox", y, state.phi),
                            ("a red apple", state.second.cond, state.second.phi)):
        assert torch.equal(cond, prior_.encode_text([text]))
        assert torch.equal(phi.words[0], EmbeddingPhi(prior_, text).words[0])


def test_a_network_learns_on_samples_of_the_source(cli, monkeypatch):
    asked = []
    monkeypatch.setattr("prior.ddim_samples", lambda _, texts, x_T: asked.extend(texts) or x_T)
    assert cli("--network", "--things", "apple, fox", "--source", "a red {}", "--target",
               "a blue {}", "--pictures", 3, "--method", "dds")[0] == 0
    assert asked == ["a red apple", "a red fox", "a red apple"]


@pytest.mark.parametrize("name", ["eq10"])
def test_shared_noise_is_not_a_shared_picture(prior, name, monkeypatch):         # noqa: F811
    """φ_z judges the source but learns on the edit: ε_z and ε_φz of the one do not serve."""
    t, eps = torch.tensor([300]), torch.randn(1, *prior.shape, generator=rng(1))
    apart = 2 * torch.randn(1, *prior.shape, generator=rng(2))
    monkeypatch.setattr(asd, "draw_noise", lambda *args: (t, eps))
    _, (row,), source = edit(prior, name, apart=apart, share_noise=True)
    x_t = asd.add_noise(source + apart, eps, *prior.alpha_sigma(t))
    errors = [(prior.eps(x_t, t, prior.encode_text([text])) - eps).square().sum().item()
              for text in ("a blue fox", "a red apple")]
    assert row["loss_D"] == pytest.approx(sum(errors), rel=1e-4)


@on_devices
def test_a_run_on_any_device_goes_on(cli, device):
    for out, flags in (("picture", []), ("network", ["--network", "--pictures", 2])):
        assert cli(*flags, "--steps", 2, "--device", device, "--out", out)[0] == 0
        assert cli("--resume", out, "--steps", 3)[0] == 0
    assert cli("--apply", "network", "--image", "a.png", "--device", device)[0] == 0


def test_mask_lies_as_the_picture_does(tmp_path):
    """A photograph that its camera has turned; strokes on nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6                                          # to be turned by 90° clockwise
    Image.new("RGB", (16, 8), "red").save(tmp_path / "turned.jpg", exif=exif)
    strokes = Image.new("RGBA", (8, 16))
    strokes.paste("white", (0, 0, 8, 8))                      # its upper half
    strokes.paste("#606060", (0, 8, 8, 12))                   # rather black than white
    strokes.save(tmp_path / "mask.png")
    settings = {"image": tmp_path / "turned.jpg", "mask": tmp_path / "mask.png"}
    _, mask = editing.read_pictures(settings, (16, 8))
    assert mask[0, 0, :, 0].tolist() == [1] * 8 + [0] * 8 and (mask == mask[..., :1]).all()
    Image.new("L", (16, 8), 255).save(tmp_path / "mask.png")
    with pytest.raises(asd.UserError, match="must agree"):
        editing.read_pictures(settings, (16, 8))


def test_mistakes_are_one_line(cli, tmp_path):
    Path("broken.png").write_bytes(b"no picture")
    Image.new("L", (8, 8), 255).save("small.png")
    one_line(cli("--image", "missing.png"), "missing.png")
    one_line(cli("--image", "broken.png"), "broken.png")
    one_line(cli("--mask", "small.png"), "must agree")
    one_line(cli("--mask", "missing.png"), "missing.png")
    one_line(cli("--method", "dds", "--phi", "lora"), "--method dds is its φ: drop --phi lora")
    one_line(cli("--source", " "), "--source")
    one_line(cli("--target", ""), "--target")
    one_line(cli("--network", "--mask", "a.png"), "--mask")
    one_line(cli("--network", "--batch", 0), "--batch")
    one_line(cli("--method", "nonsense"), "dds")
    one_line(cli("--phi-z", "sideways"), "swapped")
    assert not Path("run").exists()


@pytest.mark.parametrize("mode, size", [("RGBA", (30, 20)), ("L", (1, 1)), ("RGB", (3000, 2000))])
def test_pictures_of_every_kind_are_edited(cli, mode, size):
    Image.new(mode, size).save("a.png")
    assert cli("--method", "dds", "--steps", 1)[0] == 0


def test_a_run_of_another_program_is_not_resumed(cli, capsys):
    assert cli("--method", "dds", "--steps", 1)[0] == 0
    assert asd.main(["--resume", "run"]) == 2
    assert "editing.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["csd", "nfsd", "bridge", "exact", "vsd", "dds"])
def test_other_methods_edit_too(prior, name):                                    # noqa: F811
    """As a function, without the command line: rows of asd.py and variants.py."""
    row = editing.methods()["asd" if name == "exact" else name]
    if name == "exact":
        row = replace(row, phi=Exact, gamma=-0.5)
    image = torch.rand(2, 3, *prior.image_size, generator=rng())
    after = editing.edit(prior, image, ["a red apple"] * 2, ["a blue fox"] * 2,
                         replace(row, steps=2, lr=0.1))
    assert after.shape == image.shape and not torch.allclose(
        after, prior.decode(prior.encode_image(image)))


def test_a_batch_is_edited_as_its_pictures_are(prior, monkeypatch):              # noqa: F811
    """Without φ, SGD moves each picture of a batch as far as it would move it alone."""
    monkeypatch.setattr(asd, "draw_noise", lambda random, x0, low, high: (
        torch.full((len(x0),), 400), torch.ones_like(x0)))
    image = torch.rand(2, 3, *prior.image_size, generator=rng())
    row = replace(editing.METHODS["dds"], steps=2)
    together = editing.edit(prior, image, ["a red apple"] * 2, ["a blue fox"] * 2, row)
    alone = editing.edit(prior, image[1:], ["a red apple"], ["a blue fox"], row)
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------ on tiny-sd
needs_tiny_sd = pytest.mark.skipif(not (HERE / "tiny/sd/unet").is_dir(),
                                   reason="tiny/sd is not here")
# the paper's: simplification, refinement, replacement
SOURCES = ["a 3d render of a fox", "a flat icon of a fox", "a 3d render of a cat"]
TARGETS = ["a flat icon of a fox", "a 3d render of a fox", "a 3d render of a dog"]


@pytest.fixture(scope="module")
def tiny():
    return asd.Prior.from_pretrained("tiny-sd", "cpu")


@pytest.fixture(scope="module")
def cases(tiny):
    """The source pictures, and pictures of their targets that do not know them.

    The cat is the prior's own: tiny-clip takes that of examples/ for a dog (0.78) more than it does
    what the prior draws as one (0.7).
    """
    x_T = torch.randn(4, *tiny.shape, generator=rng())
    drawn = tiny.decode(ddim_samples(tiny, [SOURCES[2], *TARGETS], x_T, steps=20))
    foxes = [files.read_image(HERE / "examples" / name, tiny.image_size)
             for name in ("fox.png", "fox-flat.png")]
    return torch.cat([*foxes, drawn[:1]]), drawn[1:]


@needs_tiny_sd
@pytest.mark.parametrize("name", ["asd", "dds"])
def test_the_papers_three_cases(tiny, cases, name):
    """More of the target than the source image, and closer to that than an unrelated target is.

    Closer in pixels: in tiny-clip's features, which tell little but the caption, two pictures of
    one target are about as far from the source.
    """
    images, unrelated = cases
    row = replace(editing.METHODS[name], steps=40)           # two thirds of the run: enough
    edited = editing.edit(tiny, images, SOURCES, TARGETS, row)
    for i, case in enumerate(SOURCES):
        before, after, other = (distances(images[i:i + 1], x[i:i + 1], case, TARGETS[i])
                                for x in (images, edited, unrelated))
        print(case, name, before, after, other)
        assert after["clip_target"] > before["clip_target"], case
        assert after["psnr"] > other["psnr"], case


@needs_tiny_sd
@pytest.mark.parametrize("name", ["dds", "asd"])
def test_time_of_a_step_of_an_edit(benchmark, tiny, name):
    row, z = editing.METHODS[name], tiny.encode_text(["a fox"])
    generator = editing.Edited(tiny, torch.rand(1, 3, *tiny.image_size, generator=rng()))
    phi, phi_z = (asd.make_phi(row, tiny, "a fox") for _ in range(2))
    second = editing.second_discriminator(row, phi_z, z, generator.source)
    state = asd.State(generator, phi, row, rng(), second)

    def step():
        asd.distill(tiny, generator, z, replace(row, steps=state.step + 1), state=state)
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert generator().isfinite().all()
