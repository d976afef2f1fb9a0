"""The Python API: the guide's programs, and what a mistake is told; how a command starts.

The programs are those of «Your own method, generator, prior» in docs/guide.md, as they stand there,
but for two steps in place of 350.
"""
import importlib.util
import json
import os
import re
import runpy
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
    ((2, 4, 16, 16), "a fox", {"real": torch.zeros(5, 3, 64, 64)},
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
@pytest.mark.parametrize("command", ["asd", "editing"])
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
