"""The embedded model: an ordinary Stable Diffusion folder, loads offline, knows its pictures.

It is held against the dozen pictures in examples/ and their captions.
"""
import json
import socket
from pathlib import Path

import pytest
import torch

import asd
import runs
import tiny_sd

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not (HERE / "tiny-sd" / "model_index.json").exists(),
                                reason="tiny-sd/ is not there: python tiny_sd.py train makes it")


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd.load_pipeline(HERE / "tiny-sd", "cpu")


@pytest.fixture(scope="module")
def prior():
    return asd.Prior.from_pretrained("tiny-sd", device="cpu")


@pytest.fixture(scope="module")
def examples():
    """(captions, RGB [12, 3, 64, 64] in [0, 1])."""
    captions = json.loads((HERE / "examples/captions.json").read_text())
    images = [runs.read_image(HERE / "examples" / name, (64, 64)) for name in captions]
    return list(captions.values()), torch.cat(images)


def test_loads_with_the_network_off(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert tiny_sd.load_pipeline(HERE / "tiny-sd", "cpu").unet.config.sample_size == 16


def test_folder_is_small_safetensors_in_half_precision():
    from safetensors.torch import load_file
    weights = list((HERE / "tiny-sd").rglob("*.safetensors"))
    assert weights and not list((HERE / "tiny-sd").rglob("*.bin"))
    assert all(path.stat().st_size <= 15e6 for path in weights)
    assert sum(p.stat().st_size for p in (HERE / "tiny-sd").rglob("*") if p.is_file()) < 30e6
    assert {v.dtype for path in weights for v in load_file(path).values()} == {torch.float16}


def test_samples_are_deterministic_and_differ_by_prompt(pipe):
    def draw(prompt):
        return tiny_sd.sample_images(pipe, [prompt], steps=4)
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
    out = tiny_sd.sample_images(image, ["a red apple"], steps=10)
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
    assert [tiny_sd.articled(noun) for noun in nouns] == [
        "a fox", "an apple", "a unicorn", "an x-ray", "grapes", "an octopus", "bread",
        "a glass of milk"]


def test_judge_prefers_the_right_caption(examples):
    captions, images = examples
    clip, tokenizer = tiny_sd.load_clip(HERE / "tiny-clip", "cpu")
    scores = tiny_sd.clip_scores(clip, tokenizer, images, captions)
    assert (scores.argmax(1) == torch.arange(len(captions))).float().mean() >= 0.9
    assert sum(p.numel() for p in clip.parameters()) <= 3e6


def test_no_data_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tiny_sd, "DATA", tmp_path)
    assert tiny_sd.main(["evaluate", "--device", "cpu"]) == 2
    err = capsys.readouterr().err.strip()
    assert "tiny_sd.py data" in err and "\n" not in err
