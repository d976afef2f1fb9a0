"""The embedded model: an ordinary Stable Diffusion folder, loads offline, knows its pictures.

It is held against the dozen pictures in examples/ and their captions.
"""
import json
import shutil
import socket

import pytest
import torch

import asd
import nerf
from cli import files
from tiny import data, judge, make
from tiny.make import HERE

EXAMPLES = HERE.parent / "examples"
pytestmark = pytest.mark.skipif(not (HERE / "sd" / "model_index.json").exists(),
                                reason="tiny/sd is not there: python tiny/make.py train makes it")


@pytest.fixture(scope="module")
def pipe():
    return make.load_pipeline(HERE / "sd", "cpu")


@pytest.fixture(scope="module")
def prior():
    return asd.Prior.from_pretrained("tiny-sd", device="cpu")


@pytest.fixture(scope="module")
def examples():
    """(captions, RGB [12, 3, 64, 64] in [0, 1])."""
    captions = json.loads((EXAMPLES / "captions.json").read_text())
    images = [files.read_image(EXAMPLES / name, (64, 64)) for name in captions]
    return list(captions.values()), torch.cat(images)


def test_loads_with_the_network_off(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert make.load_pipeline(HERE / "sd", "cpu").unet.config.sample_size == 16


def test_folder_is_small_safetensors_in_half_precision():
    from safetensors.torch import load_file
    weights = list((HERE / "sd").rglob("*.safetensors"))
    assert weights and not list((HERE / "sd").rglob("*.bin"))
    assert all(path.stat().st_size <= 15e6 for path in weights)
    assert sum(p.stat().st_size for p in (HERE / "sd").rglob("*") if p.is_file()) < 30e6
    assert {v.dtype for path in weights for v in load_file(path).values()} == {torch.float16}


def test_samples_are_deterministic_and_differ_by_prompt(pipe):
    def draw(prompt):
        return make.sample_images(pipe, [prompt], steps=4)
    fox = draw("a fox")
    assert fox.shape == (1, 3, 64, 64) and torch.equal(fox, draw("a fox"))
    assert (fox - draw("a hamburger")).abs().mean() > 0.02


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_samples_with_other_schedulers(pipe, scheduler):
    import diffusers
    other = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    image = diffusers.StableDiffusionPipeline(**pipe.components | {"scheduler": other},
                                              requires_safety_checker=False)
    image.set_progress_bar_config(disable=True)
    out = make.sample_images(image, ["a red apple"], steps=10)
    red, green, blue = out[0, :, 16:48, 16:48].mean((1, 2))
    assert red > green + 0.1 and red > blue + 0.1


@pytest.mark.parametrize("t, bound", [(100, 0.25), (300, 0.13), (500, 0.08), (700, 0.04)])
def test_eps_error_is_small_and_smaller_with_the_right_caption(prior, examples, t, bound):
    captions, images = examples
    x0 = prior.encode_image(images)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
    times = torch.full((len(x0),), t)
    x_t = asd.add_noise(x0, eps, *prior.alpha_sigma(times))

    def error(cond):
        return (prior.eps(x_t, times, cond) - eps).square().mean().item()
    with torch.no_grad():
        right = prior.encode_text(captions)
        assert error(right) < bound
        assert error(right) < error(right.roll(1, 0))


@torch.no_grad()
def test_vae_round_trip(prior, examples):
    images = examples[1]
    x0 = prior.encode_image(images)
    assert x0.shape == (len(images), 4, 16, 16)
    assert 0.5 < x0.std() < 2
    psnr = -10 * (prior.decode(x0) - images).square().mean((1, 2, 3)).log10()
    assert psnr.mean() > 29 and psnr.min() > 22


@pytest.mark.parametrize("text", ["a 3d render of a fox", "Quite another WORD, 42 times!"])
def test_tokenizer_round_trip(pipe, text):
    ids = pipe.tokenizer(text).input_ids
    back = pipe.tokenizer.decode(ids, skip_special_tokens=True)
    assert back.replace(" ", "") == text.lower().replace(" ", "")


def test_words_of_the_captions_are_single_tokens_and_others_are_named(prior):
    assert prior.unknown_words("a flat icon of a fox, front view") == []
    assert prior.unknown_words("a photo of a zyzzyva") == ["photo", "zyzzyva"]


def test_articles():
    nouns = ["fox", "apple", "unicorn", "x-ray", "grapes", "octopus", "bread", "glass of milk"]
    assert [data.articled(noun) for noun in nouns] == [
        "a fox", "an apple", "a unicorn", "an x-ray", "grapes", "an octopus", "bread",
        "a glass of milk"]


def test_judge_prefers_the_right_caption(examples):
    captions, images = examples
    clip, tokenizer = judge.load_clip()
    scores = judge.clip_scores(clip, tokenizer, images, captions)
    assert (scores.argmax(1) == torch.arange(len(captions))).float().mean() >= 0.9
    assert sum(p.numel() for p in clip.parameters()) <= 3e6


def test_no_data_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "DATA", tmp_path)
    assert make.main(["evaluate", "--device", "cpu"]) == 2
    err = capsys.readouterr().err.strip()
    assert "tiny/make.py data" in err and "\n" not in err


def test_the_datas_cameras_are_nerfs():
    """make_data's rays, written out once more so that tiny/ needs nothing above it."""
    pose = [torch.tensor(v) for v in ([5.0, 70.0, -20.0], [-170.0, 30.0, 300.0], [2.7, 3.1, 2.9])]
    c2w = nerf.camera_to_world(*pose)
    for mine, theirs in zip(data.around(*pose)(6), nerf.rays(c2w, 40.0, 6)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["vae", "decoder", "unet", "clip"])
def test_a_part_is_trained_from_its_folder(part, examples, tmp_path, monkeypatch, capsys):
    """A step of each: its weights, and only they, are written, and are no others' by much."""
    captions, images = examples
    monkeypatch.setattr(data, "DATA", tmp_path)
    copies = 11 if part == "clip" else 1                            # the judge's batch is 128
    rows = [{"concept": text.split(", ")[0].removeprefix("a "), "more": False, "held_out": False,
             "style": "solid" if "view" in text else "emoji",
             "captions": [text, text.split(", ")[0]]} for text in captions * copies]
    pictures = (255 * images).byte().repeat(copies, 1, 1, 1)
    data.save_tensors(tmp_path / "pictures.safetensors", {"pictures": pictures})
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    for name in ("sd", "clip"):
        shutil.copytree(HERE / name, tmp_path / name)
    before = {str(path.relative_to(tmp_path)): path.read_bytes()
              for path in tmp_path.rglob("*.safetensors")}
    flags = ["train", part, "--device", "cpu", "--out", str(tmp_path / "sd"), "--clip",
             str(tmp_path / "clip"), "--minutes", "0"]
    assert make.main(flags) == 0
    assert "not written" in capsys.readouterr().out
    assert make.main([*flags, "--decay", "1e-9"]) == 0
    changed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")
               if path.read_bytes() != before.get(str(path.relative_to(tmp_path)))}
    folders = {"vae": ["sd/vae"], "decoder": ["sd/vae"], "clip": ["clip"],
               "unet": ["sd/unet", "sd/text_encoder"]}[part]
    assert f"{part}.checkpoint.safetensors" in changed
    assert {path.rsplit("/", 1)[0] for path in changed if "/" in path} <= set(folders)
    assert make.load_pipeline(tmp_path / "sd", "cpu").unet.config.sample_size == 16


def test_weak_spots_are_drawn_more_often():
    """A drawing 1.5 times as often as an icon, a view from above twice as often as a front."""
    styles = [("a drawing of", "a drawing of a cat"), ("a flat icon of", "a flat icon of a cat"),
              ("solid", "a red mug, overhead view"), ("solid", "a red mug, front view")]
    rows = [{"style": style, "captions": [caption]} for style, caption in styles]
    _, chances = make.balanced(rows)
    drawing, icon, above, front = make.weak_spots_first(rows, chances).tolist()
    assert drawing / icon == pytest.approx(1.5) and above / front == pytest.approx(2)
    assert drawing + icon + above + front == pytest.approx(1)
