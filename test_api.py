"""The Python API: the guide's programs, and what a mistake is told; how a command starts.

The programs are those of «Your own method, generator, prior» in docs/guide.md, as they stand there,
but for two steps in place of 350.
"""
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import asd
import editing
import variants
from phi import EmbeddingPhi, LoRAPhi
from prior import ddim_samples
from tiny import solids

HERE = Path(__file__).resolve().parent
PROGRAMS = re.findall(r"^```python\n(.*?)^```", (HERE / "docs/guide.md").read_text("utf-8"),
                      re.M | re.S)


@pytest.fixture(scope="module")
def tiny():
    return asd.Prior.from_pretrained("tiny-sd", "cpu")


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """An empty working directory; tiny-sd is loaded once, and rows that are added go again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *args, **kwargs: tiny)
    monkeypatch.setattr(variants, "METHODS", dict(variants.METHODS))
    return tmp_path


def program(number):
    """Write a program of the guide, of two steps, into the working directory. -> its path"""
    path = Path(f"program_{number}.py")
    path.write_text(re.sub(r"\b350\b", "2", PROGRAMS[number]), "utf-8")
    return str(path)


# ----------------------------------------------------------------------------- the guide's programs
def test_the_guides_programs_are_short():
    assert len(PROGRAMS) == 4
    for text in PROGRAMS:
        assert len([line for line in text.splitlines() if line.strip()]) <= 25


def test_a_row_is_all_that_a_method_needs(folder, monkeypatch):
    """It is a command with variants.py's flags, is resumed, and is known to editing.py."""
    for flags in (["--method", "half", "--prompt", "a fox", "--steps", "2", "--out", "run"],
                  ["--resume", "run", "--steps", "3"]):
        monkeypatch.setattr(sys, "argv", ["half.py", *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(program(0), run_name="__main__")
        assert stop.value.code == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["settings"]["method"] == config["settings"]["phi"] == "half"
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    assert editing.methods()["half"].phi is variants.METHODS["half"].phi


@pytest.mark.parametrize("number", [1, 3])
def test_a_generator_and_a_loop_of_ones_own(folder, number):
    runpy.run_path(program(number), run_name="__main__")
    (picture,) = folder.glob("*.png")
    assert picture.stat().st_size > 1000


def test_a_prior_without_a_network(folder, capsys):
    """All 350 steps: the points' mean, all that its φ learns of them, arrives at the prior's, 1."""
    Path("program.py").write_text(PROGRAMS[2], "utf-8")
    names = runpy.run_path("program.py")
    assert abs(float(capsys.readouterr().out) - 1) < 0.15
    assert names["row"].steps == 350


# ---------------------------------------------------------------------------- what does not fit
@pytest.mark.parametrize("changes, words", [
    ({"omega": "sigma"}, "unknown omega 'sigma': choose one of sigma2, 1, sigma/alpha"),
    ({"omega": 1}, "unknown omega 1"), ({"optimizer": "lion"}, "'lion': choose one of adam"),
    ({"t_order": "falling"}, "'falling': choose one of random, descending")])
def test_a_row_of_unknown_names(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        asd.Method(**changes)
    with pytest.raises(ValueError, match="unknown"):
        replace(asd.METHODS["vsd"], **changes)


@pytest.mark.parametrize("changes, words", [
    ({"steps": -1}, "steps must not be negative"), ({"steps": 1.5}, "steps is of type"),
    ({"steps": "5"}, "steps is of type int, not '5'"), ({"lam": "7"}, "lam is of type float"),
    ({"lam": math.nan}, "lam is nan"), ({"gamma": math.inf}, "gamma is inf"),
    ({"lr": math.nan}, "lr is nan"), ({"t_max": 2.0}, "t_max is a part"),
    ({"t_min": -0.5}, "t_min is a part"), ({"t_late": -1.0}, "t_late is a part"),
    ({"t_min": 0.6}, "t_min 0.6 is above t_max_late 0.5"), ({"phi_steps": -1}, "phi_steps must"),
    ({"lr_end": -1.0}, "lr_end must not be"), ({"share_noise": "no"}, "share_noise is of type"),
    ({"phi": "lora"}, "phi is what makes the φ, such as LoRAPhi, not 'lora'"),
    ({"omega": ["1"]}, "unknown omega ['1']")])
def test_a_row_of_impossible_values(changes, words):
    """Each of these ran, with other settings than it says, or ended in the middle of a run."""
    with pytest.raises(ValueError, match=re.escape(words)):
        asd.Method(**changes)


class Fixed(nn.Module):
    """x0 of any shape."""
    def __init__(self, *shape):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(shape))

    def forward(self):
        return self.theta


@pytest.mark.parametrize("shape, cond, options, words", [
    ((4, 16, 16), "a fox", {}, r"x0 is [B, C, H, W], not [4, 16, 16]"),
    ((2, 4, 16, 16), ["a fox"] * 3, {}, "3 prompts for 2 samples"),
    ((0, 4, 16, 16), "a fox", {}, "x0 is [B, C, H, W], not [0, 4, 16, 16]"),
    ((2, 3, 64, 64), "a fox", {}, "x_t is (3, 64, 64), but tiny-sd was trained on latents of"),
    ((2, 4, 16, 16), "a fox", {"method": "vsd", "real": torch.zeros(5, 3, 64, 64)},
     "real is [5, 3, 64, 64], the generator's x0 [2, 4, 16, 16]"),
    ((2, 4, 16, 16), "a fox", {"method": "csd"}, "choose one of sds, vsd, asd, or hand over a "
     "Method; variants.py has csd"),
    ((2, 4, 16, 16), "a fox", {"method": "x"}, "unknown method 'x'"),
    ((2, 4, 16, 16), "a fox", {"method": replace(asd.METHODS["sds"], shift=1.0)},
     "shift needs the source pictures of an edit"),
    ((2, 4, 16, 16), "a fox", {"micro_batch": 0}, "micro_batch must be at least 1, not 0"),
    ((2, 4, 16, 16), torch.zeros(1, 77, 768), {}, "[77, 768], those of this prior [32, 128]"),
    ((2, 4, 16, 16), torch.zeros(32, 128), {}, "cond is prompt embeddings [1 or B, L, C]")])
def test_what_does_not_fit_in_distill(tiny, shape, cond, options, words):
    generator = Fixed(*shape)
    if not torch.is_tensor(cond):
        cond = tiny.encode_text(cond)
    options = {"method": "sds"} | options
    with pytest.raises(ValueError, match=re.escape(words)):
        asd.distill(tiny, generator, cond, **options)
    assert (generator.theta == 0).all()


class Other(Fixed):
    """What make(θ) returns."""
    def __init__(self, make):
        super().__init__(2, 4, 16, 16)
        self.make = make

    def forward(self):
        return self.make(self.theta)


@pytest.mark.parametrize("make, words", [
    (lambda x: None, "x0 is [B, C, H, W], not a NoneType"),
    (lambda x: [x], "x0 is [B, C, H, W], not a list"),
    (lambda x: x.detach(), "x0 must depend on its parameters"),
    (lambda x: asd.Samples(x, torch.zeros(3, 32, 128)), "cond is of 3 samples, its x0 of 2"),
    (lambda x: asd.Samples(x, source=x[:1]), "source is of 1 samples, its x0 of 2")])
def test_what_a_generator_returns(tiny, make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        asd.distill(tiny, Other(make), tiny.encode_text("a fox"), "sds")


@pytest.mark.parametrize("make, words", [
    (lambda x: None, "x0 is [B, C, H, W], not a NoneType"),
    (lambda x: x[0], "x0 is [B, C, H, W], not [4, 16, 16]"),
    (lambda x: x.detach(), "x0 must depend on its parameters"),
    (lambda x: asd.Samples(x), "x0 is [B, C, H, W], not a Samples")])
def test_what_a_generator_returns_to_algorithm_1(tiny, make, words):
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=re.escape(words)):
        asd.algorithm_1(tiny, Other(make), tiny.encode_text("a fox"), asd.NoisePhi(), "sds", rng)


@pytest.mark.parametrize("options, words", [
    ({"phi": None}, "phi is an nn.Module, not None"),
    ({"phi": lambda x_t, t, cond, eps: eps}, "phi is an nn.Module, not <function"),
    ({"generator": lambda: torch.zeros(2, 4, 16, 16)}, "generator is an nn.Module"),
    ({"cond": torch.zeros(3, 32, 128)}, "3 prompts for 2 samples"),
    ({"cond": torch.zeros(1, 77, 768)}, "[77, 768], those of this prior [32, 128]"),
    ({"phi": nn.Linear(1, 1), "real": torch.zeros(5, 3, 64, 64)},
     "real is [5, 3, 64, 64], the generator's x0 [2, 4, 16, 16]")])
def test_what_does_not_fit_in_algorithm_1(tiny, options, words):
    arguments = {"generator": Fixed(2, 4, 16, 16), "cond": tiny.encode_text("a fox"),
                 "phi": asd.NoisePhi()} | options
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=re.escape(words)):
        asd.algorithm_1(tiny, method="asd", rng=rng, **arguments)


class OtherPhi(asd.NoisePhi):
    """A φ that answers with a channel alone, or with nothing."""
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        return self.make(x_t)


@pytest.mark.parametrize("options, words", [
    ({"real": torch.zeros(1, 4, 16, 16)}, "real samples teach φ (Eq. 9), but NoisePhi has nothing"),
    ({"method": "vsd", "real": torch.zeros(0, 4, 16, 16)}, "real is a tensor of real samples"),
    ({"method": "vsd", "real": [torch.zeros(4, 16, 16)]}, "real is a tensor of real samples"),
    ({"method": ["sds"]}, "unknown method ['sds']"), ({"phi": "lora"}, "phi is an nn.Module"),
    ({"phi": asd.NoisePhi}, "phi is an nn.Module, not <class"),
    ({"phi": OtherPhi(lambda x_t: x_t[:, :1])}, "φ predicts [1, 1, 16, 16] at x_t [1, 4, 16, 16]"),
    ({"phi": OtherPhi(lambda x_t: None)}, "φ predicts a NoneType at x_t"),
    ({"micro_batch": 1.5}, "micro_batch must be at least 1, not 1.5"),
    ({"micro_batch": "1"}, "micro_batch must be at least 1, not '1'"),
    ({"seed": 1.5}, "seed is a whole number below 2^63, not 1.5"),
    ({"seed": None}, "seed is a whole number"), ({"seed": 2 ** 70}, "below 2^63, not 118"),
    ({"callback": "print"}, "callback is a function, not 'print'"),
    ({"state": "x"}, "state is a State, not 'x'"),
    ({"second": asd.NoisePhi()}, "second is a Discriminator, not NoisePhi()"),
    ({"second": asd.Discriminator(asd.NoisePhi(), torch.zeros(2, 32, 128))},
     "2 source prompts for 1 samples"),
    ({"second": asd.Discriminator(asd.NoisePhi(), torch.zeros(1, 32, 128), at="source")},
     "shown source pictures, and there are none")], ids=str)
def test_what_is_no_argument_of_distill(tiny, options, words):
    """Silent, or an error of torch's, until now."""
    with pytest.raises(ValueError, match=re.escape(words)):
        asd.distill(tiny, Fixed(1, 4, 16, 16), tiny.encode_text("a fox"),
                    **{"method": "sds"} | options)


def test_a_state_has_its_own_phi_and_real_samples(tiny):
    theta, cond = Fixed(1, 4, 16, 16), tiny.encode_text("a fox")
    row = replace(asd.METHODS["sds"], steps=0)
    state = asd.distill(tiny, theta, cond, row)
    assert asd.distill(tiny, theta, cond, row, state=state) is state
    for options in ({"phi": asd.NoisePhi()}, {"real": torch.zeros(1, 4, 16, 16)}):
        with pytest.raises(ValueError, match="a state has its own phi, second and real"):
            asd.distill(tiny, theta, cond, row, state=state, **options)


@pytest.mark.parametrize("prior", ["tiny-sd", None])
def test_a_name_is_no_prior_and_a_function_no_generator(tiny, prior):
    cond = torch.zeros(1, 32, 128)
    with pytest.raises(ValueError, match="has no steps: a prior is Prior.from_pretrained"):
        asd.distill(prior, Fixed(1, 4, 16, 16), cond)
    with pytest.raises(ValueError, match="generator is an nn.Module, not <function"):
        asd.distill(tiny, lambda: torch.zeros(1, 4, 16, 16), cond, "sds")


def test_a_coefficient_per_picture_is_of_four_dimensions():
    """[B] would meet the width: without an error where the pictures are B pixels wide."""
    x = torch.ones(2, 4, 2, 2)
    for call in (lambda c: asd.generator_grad(x, x, x, c), lambda c: asd.add_noise(x, x, c, c),
                 lambda c: asd.generator_grad(x, x, x, 7.0, c)):
        call(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        with pytest.raises(ValueError, match=re.escape("or a tensor [2, 1, 1, 1], not [2]")):
            call(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("t", [-1, 1000, 0.5, True, [[5]], torch.tensor([-1]), torch.tensor([1000]),
                               torch.tensor([0.5]), torch.tensor([True])], ids=str)
def test_a_t_that_there_is_not(tiny, t):
    """−1 was the last one, as Python counts."""
    x_t, cond = torch.zeros(1, 4, 16, 16), tiny.encode_text("a fox")
    for call in (tiny.alpha_sigma, lambda t: tiny.eps(x_t, t, cond)):
        with pytest.raises(ValueError, match="^t "):
            call(t)


def test_an_int_is_the_t_of_all(tiny):
    x_t, cond = torch.randn(2, 4, 16, 16), tiny.encode_text(["a fox", "a cat"])
    for t in (5, torch.tensor(5)):
        assert torch.equal(tiny.eps(x_t, t, cond), tiny.eps(x_t, torch.tensor([5, 5]), cond))
        for level, levels in zip(tiny.alpha_sigma(t), tiny.alpha_sigma(torch.tensor([5]))):
            assert torch.equal(level, levels) and level.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("prompts", [None, 3, [3], [None], [["a"]], {"a"}], ids=str)
def test_what_is_no_prompt(tiny, prompts):
    with pytest.raises(ValueError, match="no prompt is given"):
        tiny.encode_text(prompts)


IMAGE = torch.full((1, 3, 64, 64), 0.5)


@pytest.mark.parametrize("images, words", [
    (IMAGE[0], "not float32 [3, 64, 64]"), (IMAGE[:, :1], "not float32 [1, 1, 64, 64]"),
    (IMAGE.movedim(1, -1), "not float32 [1, 64, 64, 3]"), ("a.png", "not a str"),
    ((255 * IMAGE).byte(), "not uint8 [1, 3, 64, 64]"), (None, "not a NoneType")])
def test_what_are_no_images(tiny, images, words):
    """Bytes were encoded as what is left of them beyond 255."""
    calls = [tiny.encode_image, lambda images: editing.edit(tiny, images, "a fox", "a cat", "dds")]
    if images is None:                                # Latents then begins with noise
        calls = calls[:1]
    for call in calls:
        with pytest.raises((ValueError, TypeError), match=re.escape(words)):
            call(images)


@pytest.mark.parametrize("kind", [asd.Latents, asd.Pixels])
@pytest.mark.parametrize("images, particles, words", [
    (255 * IMAGE, 1, "images lie in [0, 1], these in 127.5 … 127.5"),
    (-IMAGE, 1, "these in -0.5 … -0.5"),
    (IMAGE * math.nan, 1, "images have values that are not finite"),
    (IMAGE[:0], 1, "images are none at all"), (IMAGE, 0, "at least 1, not 0"),
    (None, 0, "at least 1, not 0"), (None, -1, "at least 1, not -1"),
    (None, 2.0, "particles is a whole number, at least 1, not 2.0")])
def test_a_start_that_is_none(tiny, kind, images, particles, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        kind(tiny, particles, None, images)
    with pytest.raises(ValueError, match="rng is a torch.Generator on the CPU, not 7"):
        kind(tiny, 1, 7)


@pytest.mark.parametrize("make, words", [
    (lambda tiny: LoRAPhi(tiny, rank=2.5), "rank is a whole number, at least 1, not 2.5"),
    (lambda tiny: LoRAPhi(tiny, rank=0), "rank is a whole number, at least 1, not 0"),
    (lambda tiny: EmbeddingPhi(tiny, "a fox", tokens=2.5), "tokens is a whole number in 1 … 30"),
    (lambda tiny: EmbeddingPhi(tiny, "a fox", tokens=76), "tokens is a whole number in 1 … 30")])
def test_a_phi_of_impossible_sizes(tiny, make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make(tiny)


def test_a_state_and_algorithm_1_take_a_name(tiny):
    """As distill does: "sds" is METHODS["sds"]; the first step of both ends alike."""
    cond, ends = tiny.encode_text("a fox"), []

    def stop(step, loss_D):
        ends.append(latents.theta.detach().clone())
        raise StopIteration
    for method in ("sds", asd.METHODS["sds"]):
        latents = asd.Latents(tiny, 1, torch.Generator().manual_seed(0))
        with pytest.raises(StopIteration):
            asd.algorithm_1(tiny, latents, cond, asd.NoisePhi(), method,
                            torch.Generator().manual_seed(1), callback=stop)
    assert torch.equal(*ends)
    state = asd.State(latents, asd.NoisePhi(), "sds", torch.Generator())
    assert state.method is asd.METHODS["sds"]
    with pytest.raises(ValueError, match="unknown method 'x'"):
        asd.State(latents, asd.NoisePhi(), "x", torch.Generator())


@pytest.mark.parametrize("mask, words", [
    (torch.zeros(1, 1, 64, 64), "the mask is black (0) throughout: nothing would change"),
    (torch.full((1, 1, 64, 64), math.nan), "the mask is black"),
    (torch.ones(64, 64), "mask is [1 or B, 1, H, W], for images [1, 3, 64, 64], not float32 [64,"),
    (torch.ones(1, 1, 32, 32), "not float32 [1, 1, 32, 32]"),
    (torch.ones(1, 3, 64, 64), "not float32 [1, 3, 64, 64]"),
    (torch.ones(2, 1, 64, 64), "not float32 [2, 1, 64, 64]"), ("a.png", "not a str")])
def test_a_mask_that_does_not_fit(tiny, mask, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        editing.edit(tiny, IMAGE, "a fox", "a cat", "dds", mask=mask)


def test_an_edit_of_other_methods_and_prompts(tiny):
    for method in (asd.METHODS["sds"], None):
        with pytest.raises(ValueError, match="method is an Edit, or a name of methods()"):
            editing.edit(tiny, IMAGE, "a fox", "a cat", method)
    with pytest.raises(ValueError, match="2 source prompts for 1 samples"):
        editing.edit(tiny, IMAGE, ["a fox", "a cat"], "a dog", "dds")


@pytest.mark.parametrize("call, words", [
    (lambda prior: prior.decode(torch.zeros(4, 16, 16)), "x0 is [B, 4, H, W], not float32 [4, 16"),
    (lambda prior: prior.decode(torch.zeros(1, 3, 16, 16)), "not float32 [1, 3, 16, 16]"),
    (lambda prior: prior.eps(None, 5, torch.zeros(1, 32, 128)), "x_t is a tensor"),
    (lambda prior: prior.eps(torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, 77, 768)),
     "cond is [1, 77, 768], but tiny-sd reads embeddings of 128"),
    (lambda prior: prior.eps(IMAGE, 5, prior.encode_text(["a fox"])[:, :5]),
     "cond has 5 rows, but a prompt of tiny-sd has 32"),
    (lambda prior: ddim_samples(prior, "a fox", torch.zeros(1, 4, 16, 16), 0), "at least 1 step"),
    (lambda prior: ddim_samples(prior, ["a fox"] * 3, torch.zeros(2, 4, 16, 16)),
     "3 prompts for 2 pictures of noise"),
    (lambda prior: prior.encode_image(torch.full((1, 3, 64, 64), math.nan)), "are not finite"),
    (lambda prior: asd.LoRAPhi(prior, camera=-1), "camera is the length of a camera's vector"),
    (lambda prior: asd.LoRAPhi(prior, rank=True), "rank is a whole number, at least 1, not True"),
    (lambda prior: asd.EmbeddingPhi(prior, 5), "EmbeddingPhi(prior, prompt), not 5"),
    (lambda prior: ddim_samples(prior, "a fox", torch.zeros(1, 4, 16, 16), lam=math.nan),
     "lam a finite number"),
    (lambda prior: ddim_samples(prior, "a fox", IMAGE * math.nan), "x_T is a tensor of finite"),
    (lambda prior: ddim_samples(prior, "a fox", torch.zeros(1, 4, 16, 16), 2.5), "a whole number"),
    (lambda prior: asd.Latents(prior, True), "particles is a whole number"),
    (lambda prior: asd.Discriminator(None, prior.encode_text("a")), "phi is an nn.Module"),
    (lambda prior: asd.Discriminator(asd.NoisePhi(), prior.encode_text("a"), gamma="x"),
     "gamma is a number, not 'x'"),
    (lambda prior: asd.State(asd.Latents(prior), asd.NoisePhi(), "sds", 5), "rng is a torch.Gen"),
    (lambda prior: editing.edit(prior, IMAGE, ["a"], ["b"], "dds", seed="a"), "seed is a whole"),
    (lambda prior: asd.EmbeddingPhi(prior, []), "an embedding φ starts at its prompt"),
    (lambda prior: asd.LoRAPhi(prior, cond="a fox"), "cond is prompt embeddings [1, L, C]"),
    (lambda prior: asd.LoRAPhi(prior, targets="to_x"), "no layers named to_x"),
    (lambda prior: asd.Discriminator(asd.NoisePhi(), None), "cond is prompt embeddings"),
    (lambda prior: variants.CSD(prior, "a", 7.5, 5, schedule="fine"), "unknown schedule 'fine'"),
    (lambda prior: variants.Bridge(prior, "a", 7.5, 5, bridge_start=2.0), "a fraction of the"),
    (lambda prior: variants.Exact(prior, "a", math.nan), "at --gamma nan"),
    (lambda prior: asd.effective_guidance(7.5, math.nan), "needs gamma > -1"),
    (lambda prior: asd.optimal_eps_phi(IMAGE, IMAGE, math.nan), "no minimiser")])
def test_other_mistakes_are_value_errors(tiny, call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(tiny)


@pytest.mark.parametrize("options, words", [
    ({"lora_scale": 0.5}, "a lora_scale of 0.5 without"), ({"dtype": "float16"}, "'float16'"),
    ({"device": "gpu"}, "device gpu cannot be used: Expected one of cpu"),
    ({"path_or_name": 5}, "a model is a name"),
    ({"path_or_name": "./nosuch"}, "./nosuch: there is no such folder or file"),
    ({"path_or_name": ""}, "the name of the model is empty"), ({"size": 64.0}, "a size of 64.0"),
    ({"size": (64, 64)}, "a size of (64, 64)"), ({"config": "x"}, "config x is for a model in")])
def test_what_no_prior_can_be_made_of(options, words):
    with pytest.raises(asd.UserError, match=re.escape(words)):
        asd.Prior.from_pretrained(**{"device": "cpu"} | options)


def test_text_is_no_prompt_embedding(tiny):
    for call in (lambda: asd.distill(tiny, Fixed(1, 4, 16, 16), "a fox"),
                 lambda: tiny.eps(torch.zeros(1, 4, 16, 16), torch.tensor([5]), "a fox")):
        with pytest.raises(ValueError, match="cond is prompt embeddings"):
            call()


@pytest.mark.parametrize("n, times, prompts", [(2, 2, 1), (2, 2, 3), (2, 1, 2), (1, 2, 2)])
def test_a_prior_is_asked_in_batches_of_one_size(tiny, n, times, prompts):
    x_t, t = torch.zeros(n, 4, 16, 16), torch.full((times,), 500)
    with pytest.raises(ValueError, match=f"x_t has {n} samples, t {times}, cond {prompts}"):
        tiny.eps(x_t, t, tiny.encode_text(["a fox"] * prompts))


def test_a_discriminator_names_pictures_that_exist():
    with pytest.raises(ValueError, match="unknown pictures 'sorce': choose generated, source"):
        asd.Discriminator(asd.NoisePhi(), torch.zeros(1, 32, 128), at="sorce")


def test_no_prompts_and_no_method_of_an_edit(tiny):
    with pytest.raises(ValueError, match="no prompt is given"):
        tiny.encode_text([])
    with pytest.raises(ValueError, match="unknown method 'x': choose one of"):
        editing.edit(tiny, torch.zeros(1, 3, 64, 64), ["a fox"], ["a cat"], method="x")
    with pytest.raises(ValueError, match="t_min 0.5 is above t_max 0.4"):
        asd.Method(t_min=0.5, t_max=0.4)


def test_one_text_is_one_prompt(tiny):
    assert torch.equal(tiny.encode_text("a fox"), tiny.encode_text(["a fox"]))


def test_asd_py_copied_out_alone_asks_for_a_phi():
    with pytest.raises(ValueError, match="hand over a φ"):
        asd.make_phi(asd.Method(phi=None), None)


def test_a_module_of_the_same_name_is_never_hidden(monkeypatch):
    """A prior.py of somebody's, first on the path: the ImportError says which file it is."""
    mine = types.ModuleType("prior")
    mine.__file__ = "/home/me/prior.py"
    monkeypatch.setitem(sys.modules, "prior", mine)
    spec = importlib.util.spec_from_file_location("asd_again", HERE / "asd.py")
    with pytest.raises(ImportError, match=r"cannot import name '\w+' from 'prior'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ------------------------------------------------------------------------------ lines of a command
def test_asd_py_says_where_other_methods_are(capsys):
    assert asd.main(["--method", "csd", "--prompt", "a fox"]) == 2
    line = capsys.readouterr().err
    for name in set(editing.methods()) - set(asd.METHODS):
        assert re.search(rf"\b{name}\b", line), name
    assert line.count("\n") == 1 and "variants.py has csd" in line and len(line) < 200


def test_a_warning_of_ours_is_one_line(folder, capsys):
    """λ < 1: without the file, the line number and the source that Python prints."""
    assert asd.main(["--method", "sds", "--lam", "0.5", "--prompt", "a fox", "--steps", "2",
                     "--device", "cpu"]) == 0
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    (line,) = [line for line in lines if "λ < 1" in line]
    assert line == "asd.py: λ < 1: Eq. 6's L'_G is no bound of the generator's loss"
    assert not any("warn" in line for line in lines)


@pytest.mark.parametrize("word, near", [("elefant", "elephant"), ("dogs", "dog"),
                                        ("xylophone", "saxophone"), ("hamburgers", "hamburger")])
def test_the_words_nearest_to_an_unknown_one(tiny, word, near):
    """Three whole words, no pieces of them, such as "xophone"."""
    found = tiny.nearest_words(word)
    assert found[0] == near and len(found) == 3
    assert {*tiny.unknown_words(f"a {word}")} == {word} and not tiny.unknown_words(" ".join(found))
    assert "xophone" not in found and "mburger" not in found


def test_a_sign_is_unknown_too(tiny):
    """An emoji stands for nothing, and no word is near it; the signs of a sentence are no words."""
    assert tiny.unknown_words("a 🦊, and 2 dogs!") == ["🦊", "and", "dogs"]
    assert tiny.nearest_words("🦊") == []


def test_an_unknown_word_is_named_with_those(folder, capsys):
    flags = ["--method", "sds", "--steps", "1", "--device", "cpu"]
    asd.main([*flags, "--prompt", "an elefant", "--out", "one"])
    assert re.search(r"never seen: elefant \(nearest: elephant, \w+, \w+\)\n",
                     capsys.readouterr().err)
    asd.main([*flags, "--prompt", "foo fie bla nix wub a", "--out", "five"])
    assert "never seen: bla, fie, foo, nix, wub\n" in capsys.readouterr().err


def test_the_card_lists_what_can_be_asked(tiny):
    """tiny/README.md: 307 things and 24 solids, all of them words that tiny-sd knows."""
    card = (HERE / "tiny/README.md").read_text("utf-8").split("## What can be asked")[1]
    lists = [" ".join(block.split()) for block in card.split("\n## ")[0].split("\n\n")]
    things, shapes = [block.replace("> ", "").rstrip(".").split(", ") for block in lists
                      if block.startswith(">")]
    assert len(set(things)) == len(things) == 307 and shapes == list(solids.KINDS)
    for name in things + shapes + list(solids.COLORS):
        assert not tiny.unknown_words(f"a drawing of a {name}"), name


# ------------------------------------------------------------------------------ the first seconds
@pytest.mark.parametrize("command", ["asd", "editing", "nerf"])
@pytest.mark.parametrize("what, status, words", [
    ("raise KeyboardInterrupt", 130, "stopped"),
    ("raise ModuleNotFoundError(\"No module named 'torch'\")", 2,
     "No module named 'torch': copy all of the folder, and pip install -r requirements.txt"),
    ("raise ImportError('libtorch.so: cannot open')", 2, "libtorch.so: cannot open")])
def test_what_stops_an_import_is_one_line(tmp_path, command, what, status, words):
    """A torch that cannot be imported; also as python -P, which leaves the folder out."""
    (tmp_path / "torch.py").write_text(what)
    for options in ([], ["-P"]):
        done = subprocess.run([sys.executable, *options, HERE / f"{command}.py", "--prompt", "x"],
                              env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
                              capture_output=True)
        assert (done.returncode, done.stderr) == (status, f"{command}.py: {words}\n")


@pytest.mark.parametrize("command", ["asd", "nerf"])
def test_ctrl_c_is_not_lost_in_an_import(tmp_path, command):
    """Python's own imports swallow KeyboardInterrupt in their callbacks, and then go on."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise ImportError('lost')\n")
    done = subprocess.run([sys.executable, HERE / f"{command}.py", "--prompt", "x"], text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stderr) == (130, f"{command}.py: stopped\n")


def test_several_quick_ctrl_c_are_one_line(tmp_path):
    """Also those that come while Python ends: what is there to be stopped has been stopped."""
    (tmp_path / "stop.py").write_text(
        f"import sys, runpy, signal\nsys.path.insert(0, {str(HERE)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import atexit\natexit.register(signal.raise_signal, signal.SIGINT)\n"
        "import asd\n"
        "def stopped(*args, **options):\n    raise KeyboardInterrupt\n"
        "import cli.run\ncli.run.start = stopped\n"
        "import cli.start\nsys.exit(asd.main(['--prompt', 'a']))\n")
    done = subprocess.run([sys.executable, tmp_path / "stop.py"], text=True, capture_output=True)
    assert (done.returncode, done.stderr.strip()) == (130, "asd.py: stopped")


@pytest.mark.parametrize("command", ["asd", "nerf"])
def test_a_current_folder_that_is_removed_is_one_line(tmp_path, command):
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$0" "$1" --prompt x'
    done = subprocess.run(["sh", "-c", script, sys.executable, HERE / f"{command}.py"],
                          cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (
        2, f"{command}.py: the current folder has been removed: cd into another one\n")


@pytest.mark.parametrize("command", ["asd", "editing", "variants", "text_to_3d", "nerf"])
def test_a_command_copied_out_alone_is_one_line(tmp_path, command):
    """Also as python -I. What is wrong in our own files is told as it is."""
    file = shutil.copy(HERE / f"{command}.py", tmp_path)
    for options in ([], ["-I"]):
        done = subprocess.run([sys.executable, *options, file, "--prompt", "a"], cwd=tmp_path,
                              text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (2, (
            f"{command}.py: copied out alone it is a library, to be imported: the command needs "
            "all of the clone beside it\n"))
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli/start.py").write_text("from json import nothing")
    done = subprocess.run([sys.executable, file], text=True, capture_output=True)
    assert done.returncode and "cannot import name 'nothing' from 'json'" in done.stderr
