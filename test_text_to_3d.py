"""Text-to-3D: the Scene's views, prompts and regularisers, its scores; the command."""
import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import asd
import text_to_3d
from nerf import NeRF, Picture
from test_distill import folders  # noqa: F401 (a fixture)
from test_nerf import Ball, close, cuda, rng, small
from tiny import solids


@pytest.fixture
def coarse(monkeypatch):
    """The pictures, the mesh and the measures of a run, but small ones."""
    for name, sizes in (("write_all", {"size": 8, "frames": 24, "cells": 24}),
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
    s, seen = make_scene(samples=5), []
    picture, occupancy = s.picture, s.nerf.occupancy
    s.picture = lambda c2w, *rest: seen.append(c2w) or picture(c2w, *rest)
    s.nerf.occupancy = lambda x: seen.append(x) or occupancy(x)
    assert torch.equal(s()[2], seen[0].flatten(1)) and seen[1].shape == (3 * 4 * 4, 5, 3)
    low = elevation < 50
    assert 0.75 < low.float().mean() < 0.98                       # an eighth is seen from above
    assert (elevation[low] > 4.9).all() and (elevation[low] < 35.1).all()
    x0, cond, camera = make_scene()()
    assert x0.shape == (3, 3, 8, 8) and cond.shape == (3, 1, 1) and camera.shape == (3, 16)


@pytest.mark.parametrize("changes", [{"sparsity": 3.0}, {"background": "learnt"},
                                     {"background": "random", "opaque": 0.0}])
def test_views_one_by_one_have_the_gradient_of_all(folders, changes):  # noqa: F811
    """Eq. 7's, the regulariser's, and φ's, up to rounding."""
    prior, found = asd.Prior.from_pretrained(folders["epsilon"], "cpu"), []
    method = asd.Method(steps=1, t_min=0.5, t_max=0.5)
    for size in (None, 2, 1):
        scene = text_to_3d.Scene(prior, small(), "a mug", rng(4), 4, views=3, samples=8,
                                 resolution=(4, 16), **changes)
        phi = text_to_3d.LoRAPhi(prior, camera=16)
        state = asd.State(scene, phi, method, scene.rng)
        asd.distill(prior, scene, None, method, state=state, micro_batch=size)
        found.append([p.grad for part in (scene, phi) for p in part.parameters()
                      if p.grad is not None])
    for grads in found[1:]:
        for one, other in zip(grads, found[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3,
                                       atol=1e-3 * other.abs().max().item() + 1e-9)


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
    assert wide()[0].mean() > narrow()[0].mean()                  # more of the white around it


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
    close(s()[0], expected.expand(1, 3, 8, 8))


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
    x0 = s()[0]
    assert (x0 == 1).all() == (background == "white")
    assert x0[0].flatten(1).std(1).max() < 1e-6                   # one colour per view
    if background == "learnt":
        x0.sum().backward()
        assert (s.nerf.background.grad != 0).all()


def test_rows_in_3d_are_the_others_at_its_own_rates():
    for name, row in text_to_3d.methods().items():
        other = text_to_3d.variants.all_methods()[name]
        assert (row.lr, row.lr_end, row.omega, row.steps) == (0.02, 0.05, "sigma2", 600)
        assert (row.phi, row.lam, row.phi_lr) == (other.phi, other.lam, other.phi_lr)
        assert row.gamma == (-0.5 if name == "asd" else other.gamma)       # the paper's 3D setting


def test_scene_rates():
    groups = make_scene().parameter_groups(0.01)
    assert [group.get("lr") for group in groups] == [None, 0.001]
    names = sum(len(group["params"]) for group in groups)
    assert names == len(list(make_scene().parameters()))


@pytest.fixture
def cli(folders, tmp_path, monkeypatch, coarse, capsys):      # noqa: F811
    """cli(*flags) -> (status, stdout, stderr) of a short run of the tiny model."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        if "--resume" not in flags:
            flags = ("--prompt", "a red ball", "--model", str(folders["epsilon"]), "--settings",
                     "tiny", "--out", "run", "--device", "cpu", "--samples", "8",
                     "--resolution", "8", "16", *flags)
        status = text_to_3d.main([str(flag) for flag in flags])
        return status, *capsys.readouterr()
    return call


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
    mug, other = (text_to_3d.view_scores(Truth(), text) for text in ("a red mug", "a fox"))
    assert mug["iou"] > 0.98 and 17 < mug["psnr"] < 40
    assert text_to_3d.view_scores(Truth((1, -1, 1)), "a red mug")["iou"] < 0.9
    if "clip" in mug:                                            # where tiny/clip is
        assert set(other) == {"clip"} and other["clip"] < mug["clip"] - 0.1


def test_text_to_3d_command(cli, tmp_path):
    """Everything a run leaves behind; an empty field costs the mesh, not the run."""
    status, out, err = cli("--steps", 2, "--threshold", 5, "--sparsity", 1, "--opaque", 1)
    assert status == 0 and "silhouette IoU" in out and out.endswith("run/viewer.html\n"), err
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "checkpoint.safetensors", "progress.png",
                     "phi", "nerf.safetensors", "views.png", "turntable.gif", "mesh.glb",
                     "viewer.html"}
    fields = [NeRF.load(tmp_path / "run/nerf.safetensors"), NeRF(seed=0)]
    for one, other in zip(*(field.parameters() for field in fields)):
        assert (one.shape == (3,)) or not torch.equal(one, other)            # all but a background
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2 and row["psnr"] > 0 and 0 <= row["iou"] <= 1
    status, out, err = cli("--steps", 1, "--threshold", 1e6, "--out", "run2",
                                  "--method", "sds")
    assert status == 0 and "no mesh: no surface" in err and out.endswith("turntable.gif\n")


@pytest.mark.parametrize("flags", [
    ["vsd", "--phi", "embedding"], ["vsd", "--phi", "exact"], ["csd"],
    ["csd", "--negative", "a fox"],
    ["nfsd", "--negative", "a fox"],
    ["bridge", "--source-words", "a fox", "--target-words", "a {}"]], ids=" ".join)
def test_every_method_makes_3d(cli, tmp_path, flags):
    status, _, err = cli("--steps", 2, "--method", *flags)
    assert status == 0, err
    table = NeRF.load(tmp_path / "run/nerf.safetensors").table
    assert table.isfinite().all() and not torch.equal(table, NeRF(seed=0).table)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_text_to_3d_with_a_prior_in_half_precision(cli, tmp_path, dtype):
    """The NeRF and what is stored stay float32."""
    status, _, err = cli("--steps", 1, "--dtype", dtype)
    assert status == 0, err
    stored = load_file(tmp_path / "run/checkpoint.safetensors")
    assert {v.dtype for name, v in stored.items() if name.startswith(("theta", "phi"))} == \
        {torch.float32}


def test_phi_is_told_the_prompt_without_the_view(cli, monkeypatch):
    seen = []
    monkeypatch.setattr(asd, "distill", lambda prior, generator, cond, method, state, **_:
                        seen.append((prior, state.phi)))
    assert cli("--steps", 1)[0] == 0
    prior, phi = seen[0]
    assert torch.equal(phi.cond, prior.encode_text(["a red ball"]))


@cuda
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_cuda_run_goes_on(cli, kernels):
    assert cli("--steps", 2, "--device", "cuda", "--kernels", kernels)[0] == 0
    assert cli("--resume", "run", "--steps", 3)[0] == 0


def test_a_resumed_run_ends_in_the_same_bits(cli, tmp_path):
    """As long as what depends on the number of steps (--late, --t-late, --lr-end) does not differ.
    """
    flags = ("--late", 0, "--t-late", 0, "--lr-end", 1, "--save-every", 1)
    assert cli(*flags, "--steps", 3)[0] == 0
    assert cli(*flags, "--steps", 1, "--out", "cut")[0] == 0
    status, _, err = cli("--resume", "cut", "--steps", 3)
    assert status == 0, err
    whole, cut = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("run", "cut"))
    for name, tensor in whole.items():
        assert name.startswith("frame") or torch.equal(tensor, cut[name]), name


@pytest.mark.parametrize("flags, message", [
    (["--prompt", " "], "--prompt that is not empty"), ([], "--prompt that is not empty"),
    (["--prompt", "a mug", "--distance", "3", "2"], "least value first"),
    (["--prompt", "a mug", "--lam-phi", "2"], "--lam-phi has no use here"),
    (["--prompt", "a mug", "--kernels", "cuda"], "--kernels")])
def test_mistakes_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = text_to_3d.main(flags)
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err.strip()
    assert status == 2 and "\n" not in err and err.startswith("text_to_3d.py: ") and message in err
