"""Text-to-3D: the Scene's views, prompts and regularisers, its scores; the command."""
# ruff: noqa: F811 (fixtures are imported by their names)
import functools
import math
from dataclasses import replace

import pytest
import torch

import asd
import text_to_3d
import variants
from cli.files import tensors
from nerf import NeRF, Picture
from phi import LoRAPhi
from test_distill import folders, load, prior  # noqa: F401 (fixtures)
from test_nerf import Ball, close, cuda, rng, small
from test_runs import caller, checkpoint, contents, metrics, model  # noqa: F401 (a fixture)
from tiny import solids


@pytest.fixture
def coarse(monkeypatch):
    """The pictures, the mesh and the measures of a run, but small ones."""
    for name, sizes in (("write_all", {"size": 8, "frames": 2, "cells": 16}),
                        ("view_scores", {"samples": 4})):
        made = functools.partial(getattr(text_to_3d, name), **sizes)
        monkeypatch.setattr(text_to_3d, name, made)


class Eye:
    """As much of a Prior as a Scene needs: x0 is the picture at half its size."""
    device, image_size, shape = torch.device("cpu"), (16, 16), (3, 8, 8)

    def encode_text(self, prompts):
        return torch.tensor([[[float(len(prompts[0]))]]])

    def encode_image(self, images):
        assert images.shape[1:] == (3, 16, 16)
        return torch.nn.functional.avg_pool2d(images, 2)


def make_scene(**changes):
    settings = {"views": 3, "samples": 8, "resolution": (4, 16), "late": 0.5} | changes
    return text_to_3d.Scene(Eye(), small(), "a mug", rng(4), 4, **settings)


def test_scene_asks_each_view_for_its_own_prompt():
    """The camera that φ is told is the one the picture was taken by; its word fits."""
    s = make_scene(views=64)
    c2w, _, cond = s.cameras()
    place = c2w[:, :3, 3]
    distance = place.norm(dim=1)
    elevation = torch.rad2deg(torch.asin(place[:, 2] / distance))
    azimuth = torch.rad2deg(torch.atan2(place[:, 1], place[:, 0]))
    words = [solids.view_word(*pose) for pose in zip(elevation, azimuth)]
    close(cond[:, 0, 0], torch.tensor([float(len(f"a mug, {word} view")) for word in words]))
    assert set(words) == {"front", "side", "back", "overhead"}
    assert (distance >= 2.75 - 1e-4).all() and (distance <= 3.1 + 1e-4).all()
    s, cameras, places = make_scene(samples=5), [], []
    picture, occupancy = s.picture, s.nerf.occupancy

    def taken(c2w, *rest):
        cameras.append(c2w)
        return picture(c2w, *rest)

    def occupied(x):
        places.append(x)
        return occupancy(x)
    s.picture, s.nerf.occupancy = taken, occupied
    assert torch.equal(s().camera, cameras[0].flatten(1)) and places[0].shape == (3 * 4 * 4, 5, 3)
    low = elevation < 50
    assert 0.75 < low.float().mean() < 0.98                       # an eighth is seen from above
    assert (elevation[low] > 4.9).all() and (elevation[low] < 35.1).all()
    x0, cond, camera, source, *_ = make_scene()()
    assert x0.shape == (3, 3, 8, 8) and cond.shape == (3, 1, 1) and camera.shape == (3, 16)
    assert source is None


@pytest.mark.parametrize("changes", [{"sparsity": 3.0}, {"background": "learnt"},
                                     {"background": "random", "opaque": 0.0}])
def test_views_one_by_one_have_the_gradient_of_all(prior, changes):
    """Eq. 7's, the regulariser's, and φ's, up to rounding."""
    found, cond = [], prior.encode_text(["a mug"])
    method = asd.Method(steps=1, t_min=0.5, t_max=0.5)
    for size in (None, 2, 1):
        scene = text_to_3d.Scene(prior, small(), "a mug", rng(4), 4, views=3, samples=8,
                                 resolution=(4, 16), **changes)
        phi = LoRAPhi(prior, camera=16)
        state = asd.State(scene, phi, method, scene.rng)
        asd.distill(prior, scene, cond, method, state=state, micro_batch=size)
        found.append([p.grad for part in (scene, phi) for p in part.parameters()
                      if p.grad is not None])
    for grads in found[1:]:
        for grad, expected in zip(grads, found[0], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-3,
                                       atol=1e-3 * expected.abs().max().item() + 1e-9)


def test_some_views_are_those_of_all():
    """forward(rows): the same random numbers, whichever are rendered (several processes)."""
    everything, some = make_scene(background="random")(), make_scene(background="random")
    samples = some(torch.tensor([2, 0]))
    for part in ("x0", "cond", "camera"):
        close(getattr(samples, part), getattr(everything, part)[[2, 0]])
    assert some.batch == 3


def test_scene_ranges_of_one_value_and_others():
    s = make_scene(views=64, azimuth=(30, 30), elevation=(0, 0), overhead=0, fovy=(30, 50))
    c2w, fovy, _ = s.cameras()
    place = torch.nn.functional.normalize(c2w[:, :3, 3], dim=1)
    turn = math.radians(30)
    close(place, torch.tensor([[math.cos(turn), math.sin(turn), 0.0]]).expand(64, 3), rtol=0,
          atol=1e-5)
    assert 30 <= fovy.min() < 32 and 48 < fovy.max() <= 50
    height = make_scene(views=64, overhead=1).cameras()[0][:, :3, 2][:, 2]       # from above
    elevation = torch.rad2deg(torch.asin(height))
    assert 61.9 < elevation.min() < 64 and 78 < elevation.max() < 80.1
    assert (make_scene().cameras()[1] == 40).all()
    wide, narrow = (make_scene(fovy=(f, f), late=0.0) for f in (120.0, 20.0))
    assert wide().x0.mean() > narrow().x0.mean()                  # more of the white around it


@pytest.mark.parametrize("changes", [
    {"views": 0}, {"samples": 0}, {"views": 1.5}, {"samples": "x"}, {"resolution": (8.5, 8)},
    {"elevation": ("a", "b")}, {"resolution": (0, 64)}, {"background": "black"},
    {"overhead": 1.5}, {"late": -0.1}, {"elevation": (35.0, 5.0)}, {"azimuth": (math.nan, 1.0)},
    {"distance": (0.0, 3.0)}, {"fovy": (40.0, 180.0)}, {"fovy": 40.0}, {"resolution": 32}],
    ids=str)
def test_scene_refuses_impossible_numbers(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make_scene(**changes)


def test_scene_renders_finer_later():
    s = make_scene()
    sizes = []
    for _ in range(4):
        s()
        sizes.append(s.opacity.shape[-1])
    assert sizes == [4, 4, 16, 16] and s.step == 4


def test_scene_is_enlarged_linearly():
    """From 4 pixels to 16, each in the middle of its square; then Eye's pairs are averaged."""
    s = make_scene(views=1)
    ramp = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 4, 4, 3)
    s.picture = lambda *_: Picture(ramp, torch.ones(1, 4, 4), None)
    expected = ((torch.arange(16) + 0.5) / 4 - 0.5).clamp(0, 3).view(8, 2).mean(1)
    close(s().x0, expected.expand(1, 3, 8, 8))


def test_scene_regularisers_by_hand():
    s = make_scene(sparsity=2.0, opaque=3.0)
    s.opacity = torch.full((1, 2, 2), 0.5, requires_grad=True)
    s.regulariser().backward()
    close(s.regulariser().detach(), torch.tensor(2 * math.sqrt(0.26) + 3 * math.log(2)))
    assert (s.opacity.grad > 0).all()                             # less opacity, less loss
    s.opacity = torch.full((1, 2, 2), 0.7, requires_grad=True)
    entropic = make_scene(opaque=1.0)
    entropic.opacity = s.opacity
    entropic.regulariser().backward()
    assert (s.opacity.grad < 0).all()                             # more than half: to one
    for o, as_if in ((0.0, 1e-3), (1.0, 1 - 1e-3)):               # log 0 and its slope are avoided
        s.opacity = torch.full((1, 2, 2), o, requires_grad=True)
        entropy = -1e-3 * math.log(1e-3) - (1 - 1e-3) * math.log(1 - 1e-3)
        close(s.regulariser().detach(), torch.tensor(2 * math.sqrt(as_if ** 2 + 0.01)
                                                     + 3 * entropy))
        s.regulariser().backward()
        assert (s.opacity.grad == 0).all()


@pytest.mark.parametrize("background", ["white", "random", "learnt"])
def test_scene_backgrounds(background):
    s = make_scene(background=background)
    s.nerf.inner[2].bias.data[0] = -100
    x0 = s().x0
    assert (x0 == 1).all() == (background == "white")
    assert x0[0].flatten(1).std(1).max() < 1e-6                   # one colour per view
    if background == "learnt":
        x0.sum().backward()
        assert (s.nerf.background.grad != 0).all()


def test_rows_in_3d_are_the_others_at_its_own_rates():
    for name, row in text_to_3d.methods().items():
        same = variants.all_methods()[name]
        assert (row.lr, row.lr_end, row.phi_lr) == (0.02, 0.05, 1e-3)
        assert (row.phi, row.lam, row.omega, row.steps) == (same.phi, same.lam, "sigma2", 600)
        assert row.gamma == (-0.5 if name == "asd" else same.gamma)       # the paper's 3D setting


def test_scene_rates():
    groups = make_scene().parameter_groups(0.01)
    assert [group.get("lr") for group in groups] == [None, 0.001]
    names = sum(len(group["params"]) for group in groups)
    assert names == len(list(make_scene().parameters()))


@pytest.fixture
def cli(model, tmp_path, monkeypatch, coarse, capsys):
    """cli(*flags) -> (status, stdout, stderr) of a short run of the tiny model."""
    monkeypatch.chdir(tmp_path)
    scene = [["--samples", "4"], ["--resolution", "4", "8"], ["--levels", "2"], ["--table", "8"]]

    def main(flags):
        for default in scene:
            if default[0] not in flags and "--resume" not in flags:
                flags = [*flags, *default]
        return text_to_3d.main(flags)
    return caller(main, model, capsys)


class Truth(Ball):
    """The red mug of solids.py itself, opaque, without its shading; or in a mirror."""

    def __init__(self, mirror=(1, 1, 1)):
        super().__init__()
        self.mirror = torch.tensor(mirror)

    def geometry(self, x):
        return 300 * (solids.sdf("mug", x * self.mirror) < 0).float(), x

    def forward(self, x, d=None):
        return self.geometry(x)[0], torch.tensor(solids.COLORS["red"]).expand(len(x), 3)


def test_scores_of_the_truth():
    """The silhouettes agree from all sides, if the handle is where it should be; and tiny-clip
    sees a red mug rather than a fox."""
    mug, fox = (text_to_3d.view_scores(Truth(), text) for text in ("a red mug", "a fox"))
    assert mug["iou"] > 0.98 and 17 < mug["psnr"] < 40
    assert text_to_3d.view_scores(Truth((1, -1, 1)), "a red mug")["iou"] < 0.9
    if "clip" in mug:                                            # where tiny/clip is
        assert set(fox) == {"clip"} and fox["clip"] < mug["clip"] - 0.1


def test_text_to_3d_command(cli):
    """Everything a run leaves behind; an empty field costs the mesh, not the run."""
    flags = ["--prompt", "a red ball", "--sparsity", 1, "--opaque", 1]
    status, out, err = cli(*flags, "--steps", 2, "--threshold", 5)
    assert status == 0 and "silhouette IoU" in err and out == "run/viewer.html\n", err
    assert contents("run").keys() == {
        "config.json", "metrics.jsonl", "checkpoint.safetensors", "progress.png",
        "phi/pytorch_lora_weights.safetensors", "phi/camera.safetensors", "nerf.safetensors",
        "views.png", "turntable.gif", "mesh.glb", "viewer.html"}
    field = NeRF.load("run/nerf.safetensors")
    fresh = NeRF(**field.settings)
    for name, parameter in field.named_parameters():
        assert name == "background" or not torch.equal(parameter, fresh.get_parameter(name)), name
    row = metrics("run")[-1]
    assert row["step"] == 2 and row["psnr"] > 0 and 0 <= row["iou"] <= 1
    status, out, err = cli("--steps", 1, "--threshold", 1e6, "--out", "run2", "--method", "sds")
    assert status == 0 and "no mesh: no surface" in err and out.endswith("turntable.gif\n")


@pytest.mark.parametrize("name, options", [
    ("embedding", {}), ("exact", {}), ("csd", {"negative": "a fox"}), ("nfsd", {}),
    ("bridge", {"source_words": "a fox", "target_words": "a {}"})])
def test_every_phi_makes_3d(prior, name, options):
    """One step, by a φ that is made of the prompts of all views, as the command makes it."""
    row = replace(text_to_3d.methods()["vsd"], phi=variants.ALL_PHIS[name], steps=1)
    scene = text_to_3d.Scene(prior, small(), "a mug", rng(4), 1, views=2, samples=8,
                             resolution=(4, 4))
    views = [f"a mug, {word} view" for word in scene.prompts]
    phi = asd.make_phi(row, prior, views, **options)
    before = scene.nerf.table.detach().clone()
    state = asd.State(scene, phi, row, scene.rng)
    asd.distill(prior, scene, prior.encode_text(["a mug"]), row, state=state)
    assert scene.nerf.table.isfinite().all() and not torch.equal(scene.nerf.table, before)


def test_a_scene_of_a_prior_in_half_precision(load):
    """The NeRF, φ and their optimisers stay float32."""
    prior = load(dtype=torch.bfloat16)
    row = replace(text_to_3d.methods()["asd"], steps=1)
    scene = text_to_3d.Scene(prior, small(), "a mug", rng(4), 1, views=1, samples=8,
                             resolution=(4, 4))
    state = asd.State(scene, LoRAPhi(prior, camera=16), row, scene.rng)
    asd.distill(prior, scene, prior.encode_text(["a mug"]), row, state=state)
    stored = {name: tensor for name, tensor in tensors(state).items() if tensor.is_floating_point()}
    assert len(stored) > 20 and {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_phi_gets_the_prompt_without_the_view(cli, monkeypatch):
    """Or, where it is no LoRA, the prompts of all views."""
    made = []

    def keep(prior, generator, cond, method, state, **_):
        made.append((prior, state.phi))
    monkeypatch.setattr(asd, "distill", keep)
    assert cli("--steps", 1, "--prompt", "a red ball")[0] == 0
    assert cli("--steps", 1, "--prompt", "a red ball", "--method", "bridge", "--out", "2")[0] == 0
    (prior, lora), (_, bridge) = made
    assert torch.equal(lora.cond, prior.encode_text(["a red ball"]))
    views = [f"a red ball, {word} view" for word in solids.VIEWS]
    assert torch.equal(bridge.plain, prior.encode_text(views))


@cuda
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_cuda_run_goes_on(cli, kernels):
    assert cli("--steps", 2, "--device", "cuda", "--kernels", kernels)[0] == 0
    assert cli("--resume", "run", "--steps", 3)[0] == 0


def test_a_resumed_run_ends_in_the_same_bits(cli):
    """As long as --late, --t-late and --lr-end, which depend on the number of steps, do nothing."""
    flags = ("--late", 0, "--t-late", 0, "--lr-end", 1, "--save-every", 1)
    assert cli(*flags, "--steps", 2)[0] == 0
    assert cli(*flags, "--steps", 1, "--out", "cut")[0] == 0
    status, _, err = cli("--resume", "cut", "--steps", 2)
    assert status == 0, err
    whole, cut = checkpoint("run"), checkpoint("cut")
    for name, tensor in whole.items():
        assert name.startswith("frame") or torch.equal(tensor, cut[name]), name


@pytest.mark.parametrize("flags, message", [
    (["--prompt", " "], "--prompt that is not empty"), ([], "--prompt that is not empty"),
    (["--prompt", "a mug", "--distance", "3", "2"], "least value first"),
    (["--prompt", "a mug", "--lam-phi", "2"], "--lam-phi has no use in 3D"),
    (["--prompt", "a mug", "--kernels", "cuda"], "--kernels")])
def test_mistakes_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = text_to_3d.main(flags)
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err.strip()
    assert status == 2 and "\n" not in err and err.startswith("text_to_3d.py: ") and message in err
