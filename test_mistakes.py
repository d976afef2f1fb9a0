"""What users, other programs and disks do wrong, at every command: one line each, nothing lost.

Wrong values, stored runs that are others, files that are none, texts that are none, what does not
fit; and that no command unpickles anything or asks for a connection where the model is a local
folder.
"""
import faulthandler
import functools
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, features
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import asd
import editing
import nerf
import text_to_3d
import variants
from claims import __main__ as claims
from cli import files, run, settings
from phi import LoRAPhi
from test_distill import folders, link_tree, load, no_network  # noqa: F401 (fixtures)
from test_runs import (  # noqa: F401 (fixtures)
    checkpoint,
    cli,
    config_of,
    contents,
    finished,
    load_once,
    made_once,
    metrics,
    model,
    one_line,
)
from tiny import data
from tiny.training import save_tensors

HERE = Path(asd.__file__).resolve().parent


@pytest.fixture(autouse=True)
def nothing_waits():
    """Five minutes at most: what waits for ever, be it in C, ends all the tests with its place."""
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(command, *flags, part) -> the line on stderr; nothing in the folder changes."""
    monkeypatch.chdir(tmp_path)

    def call(command, *flags, part=""):
        before, _ = contents("."), capsys.readouterr()
        status = command.main([str(flag) for flag in flags])
        result = status, *capsys.readouterr()
        name = f"{command.__name__}.py"
        if command is claims:
            name = "python -m claims"
        one_line(result, part, name=name)
        assert len(result[2]) <= 301 and contents(".") == before
        return result[2]
    return call


# ------------------------------------------------------------------------------- wrong values
EDIT, MUG = "--source a --target b --image a.png", "--prompt mug"


@pytest.mark.parametrize("command, flags, part", [
    (asd, "--lam many", "--lam"), (asd, "--lam nan", "--lam"), (asd, "--gamma -inf", "--gamma"),
    (asd, "--lam 1e39", "--lam"), (asd, "--steps 2.5", "--steps"), (asd, "--steps 0", "--steps"),
    (asd, "--seed -1", "--seed"), (asd, f"--seed {2 ** 63}", "--seed"),
    (asd, "--t-max 1.5", "--t-max"), (asd, "--particles 0", "--particles"),
    (asd, "--gama 1", "--gama"), (asd, "apple", "apple"), (asd, "--rank", "--rank"),
    (asd, "--method csd", "sds, vsd, asd"), (asd, "--omega 2", "sigma2"),
    (asd, "--dtype int8", "bfloat16"), (asd, "--phi hyper", "lora"),
    (text_to_3d, f"{MUG} --fovy 40", "--fovy"), (text_to_3d, f"{MUG} --fovy 0 40", "--fovy"),
    (text_to_3d, f"{MUG} --distance 1 1e39", "--distance"),
    (variants, "--method bridge --prompt a --bridge-steps 1000000000", "--bridge-steps"),
    (variants, "--prompt a", "--method"), (variants, "train-corrective --minutes 0", "--minutes"),
    (editing, f"{EDIT} --phi-z sideways", "--phi-z"), (editing, "--apply a", "--image"),
    (nerf, "mug --kernels cuda", "--kernels"), (nerf, "mug --size many", "--size"),
    (nerf, "mug --batch 1000000000", "--batch"), (nerf, "mug --samples 1000000000", "--samples"),
    (variants, "train-corrective --lr 0", "--lr cannot be '0'"),
    (variants, f"train-corrective --out {__file__}/b", "is a file, not a folder"),
    (text_to_3d, f"{MUG} {MUG}", "--prompt is given twice"), (asd, "--lam 1 --lam 2", "twice"),
    (text_to_3d, f"{MUG} --fovy 40 50 --fovy 40 50", "--fovy is given twice"),
    (asd, "--pixels --no-pixels", "--pixels or --no-pixels is given twice"),
    (asd, "--prompt a --rank 1000000", "--rank cannot be"),
    (asd, "--prompts b", "unrecognized arguments: --prompts b"),
    (asd, "--init -b", "expected one argument; a text that begins with - is given as --flag=-text"),
    (asd, "--init=", "--init cannot be ''"), (asd, "--real=", "--real cannot be ''"),
    (asd, "--out=", "--out cannot be ''"), (asd, "--phi-init=", "--phi-init cannot be ''"),
    (claims, "nothing", "nothing"), (claims, "1a --part 3/2", "--part"),
    (claims, "1a --x", "--x")], ids=lambda value: ascii(value)[1:40])
def test_a_wrong_value_is_one_line(refused, command, flags, part):
    """By type, by bound, not finite, unknown flag, unknown name: pydantic and argparse know all."""
    given = flags.split()
    if command is asd:
        given += ["--prompt", "a red apple"]
    refused(command, *given, part=part)


@pytest.mark.parametrize("command, flags, part", [
    (asd, "--lora-scale .5", "--lora-scale 0.5 is how much of --lora: give that"),
    (asd, "--beta2 1", "--beta2 cannot be '1'"),
    (asd, "--config a.png", "config a.png is for a model in one .safetensors file"),
    (asd, "--phi noise", "--method sds"), (asd, "--method sds --phi lora", "--method sds"),
    (asd, "--phi embedding --lam-phi 2", "lora"), (asd, "--t-min 0.6", "--t-max-late"),
    (asd, "--t-min 0.7 --t-max 0.3", "--t-max 0.3"),
    (variants, "--method csd --prompt a --source-words b", "--source-words is for --method bridge"),
    (editing, "--source a --target b", "--image"), (editing, f"{EDIT} --things fox", "--things"),
    (editing, f"{EDIT} --network --pixels", "--pixels"),
    (editing, "--network --source a{} --target b", "stands for the --things: give those"),
    (asd, "--phi embedding --rank 8", "--rank is for --phi lora"),
    (asd, "--rank 8 --phi-init b.safetensors", "--rank and --phi-init"),
    (asd, "--t-late 1 --t-max-late .3", "--t-max-late is for --t-late below 1"),
    (editing, f"{EDIT} --method flowedit --t-max-late .3", "--t-max-late is for --t-late below 1"),
    (asd, "--eta .3", "--eta is of Eq. 9"), (editing, f"{EDIT} --eta .3", "--eta is of Eq. 9"),
    (asd, "--tokens 4", "--tokens is for --phi embedding"),
    (variants, "--method nfsd --prompt a --checkpointing", "--checkpointing is for --phi lora"),
    (editing, f"{EDIT} --batch 8", "--batch is for --network"),
    (editing, f"{EDIT} --pictures 64", "--pictures is for --network on samples"),
    (editing, f"{EDIT} --network --pictures 64", "--pictures is for --network on samples"),
    (editing, f"{EDIT} --phi-z none --lam-source 2", "--lam-source is for the second"),
    (text_to_3d, f"{MUG} --coarsest 100 --finest 50", "--coarsest 100 has more"),
    (text_to_3d, f"{MUG} --elevation 35 5", "least value first")])
def test_settings_that_do_not_fit_together_are_one_line(refused, command, flags, part):
    given = flags.split()
    if command is asd:
        given += ["--prompt", "a red apple"]
    refused(command, *given, part=part)


@pytest.mark.parametrize("color", [(0, 0, 0, 255), (255, 255, 255, 0), (120, 120, 120, 255)])
def test_a_mask_that_is_black_throughout_is_one_line(refused, model, color):   # noqa: F811
    """Black, transparent, dark grey: nothing would change."""
    Image.new("RGB", (16, 16), "teal").save("a.png")
    Image.new("RGBA", (16, 16), color).save("b.png")
    refused(editing, *EDIT.split(), "--mask", "b.png", "--model", model, "--settings", "tiny",
            "--device", "cpu", "--method", "dds", part="black (0) throughout: nothing would change")


def test_real_pictures_need_a_phi_that_learns(refused, model):                 # noqa: F811
    Image.new("RGB", (16, 16), "teal").save("a.png")
    refused(asd, "--prompt", "a", "--method", "sds", "--real", "a.png", "--model", model,
            "--device", "cpu", part="--real is for one --prompt, and a φ that learns")


@pytest.mark.parametrize("flags", ["--gamma -.5", "--phi-lr 2e-4", "--phi-steps 2",
                                   "--share-noise"])
@pytest.mark.parametrize("command, method", [(asd, "sds"), (variants, "csd")])
def test_what_a_phi_that_learns_nothing_does_not_heed_is_one_line(
        refused, model, command, method, flags):                               # noqa: F811
    refused(command, "--prompt", "a", "--method", method, *flags.split(), "--model", model,
            "--device", "cpu", part=f"{flags.split()[0]} is of a φ that learns, and that of "
                                    f"--method {method} does not: drop it")


def test_pictures_of_a_folder_are_all_taken(refused):
    Path("scene").mkdir()
    refused(nerf, "scene", "--pictures", "5", part="--pictures is for a built-in solid")


def test_an_empty_model_is_one_line(refused):
    refused(asd, "--prompt", "a", "--model", "", part="--model cannot be ''")


@pytest.mark.parametrize("prompts", [[], [""], ["a fox", "  \n"]])
def test_an_empty_prompt_is_one_line(refused, prompts):
    flags = []
    for prompt in prompts:
        flags += ["--prompt", prompt]
    line = refused(asd, *flags)
    assert line == 'asd.py: give a --prompt that is not empty, such as --prompt "a red apple"\n'


@pytest.mark.parametrize("gamma", ["-1", "-.5", "-1e-2", "-2.5E+0"])
def test_negative_numbers_are_read_in_any_notation(cli, monkeypatch, gamma):   # noqa: F811
    given = []
    monkeypatch.setattr(run, "start", lambda command, flags: given.append(
        settings.new_settings(command, flags)))
    assert cli("--gamma", gamma)[0] == 0 and given[0].gamma == float(gamma)


@pytest.mark.parametrize("flags", [["--device", "auto", "--dtype", "auto"],
                                   ["--t-min", "0.6", "--t-late", "1"], ["--no-pixels"]])
def test_this_is_no_mistake(cli, flags):                                        # noqa: F811
    assert cli(*flags, "--steps", 1, "--method", "sds")[0] == 0


# ------------------------------------------------------------------------------ a stored run
@pytest.fixture
def edited(finished):                                                           # noqa: F811
    """edited(**settings): resume a finished run whose config.json was edited, and refuse that."""
    def call(part, **changes):
        config = config_of("run")
        config["settings"] |= changes
        Path("run/config.json").write_text(json.dumps(config))
        before = contents("run")
        one_line(finished("--resume", "run", "--steps", 5), part)
        assert contents("run") == before
    return call


@pytest.mark.parametrize("name, value", [
    ("steps", "abc"), ("steps", 2.5), ("steps", True), ("steps", None), ("steps", 10 ** 400),
    ("lam", math.nan), ("lam", math.inf), ("lam", -1e39), ("t_min", 5), ("seed", -1),
    ("pixels", "yes"), ("prompt", [" "]), ("prompt", [3]), ("prompt", "a fox"),
    ("prompt", ["a\0b"]), ("model", "\udcff"), ("method", "csd"), ("method", ["asd"]),
    ("phi", "noise"), ("omega", "foo"), ("dtype", "int8"), ("phi_first", 1)], ids=ascii)
def test_an_edited_setting_is_refused(edited, name, value):
    """By its flag's own check, before anything is loaded."""
    edited("config.json", **{name: value})


@pytest.mark.parametrize("name", ["model", "phi_init", "lora"])
def test_a_moved_model_is_to_be_moved_back(edited, name):
    """--resume takes no other --model, so the line asks for none."""
    edited("/no/such/place is not there any more: move it back", **{name: "/no/such/place"})


def test_a_finished_run_without_its_checkpoint_is_not_made_again(finished):     # noqa: F811
    Path("run/checkpoint.safetensors").unlink()
    before = contents("run")
    one_line(finished("--resume", "run"), "run was finished, and has no checkpoint.safetensors")
    assert contents("run") == before


@pytest.mark.parametrize("name, value", [("lam", 3.0), ("prompt", ["a blue fox"]), ("seed", 5)])
def test_other_settings_do_not_go_on_from_a_checkpoint(edited, name, value):
    """A run whose settings are right, but not those the checkpoint names."""
    edited("other settings", **{name: value})


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "{}", '{"settings": 3}', '{"program": "asd.py", "settings": {}}',
    '{"settings": {"method": "asd"}}', "\0", b"\xff\xfe", 100_000 * "["],
                         ids=lambda text: ascii(text)[:9])
def test_corrupt_config_is_one_line(finished, text):                            # noqa: F811
    Path("run/config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents("run")
    one_line(finished("--resume", "run", "--steps", 2), "run holds no run to resume")
    assert contents("run") == before


@pytest.mark.parametrize("command, folder, part", [
    (asd, "nowhere", "nowhere holds no run"), (asd, "", "no run to resume"),
    (variants, "run", "it is a run of asd.py"), (editing, "run", "it is a run of asd.py"),
    (text_to_3d, "run", "it is a run of asd.py")])
def test_a_run_of_another_command_is_not_resumed(finished, refused, command, folder,  # noqa: F811
                                                 part):
    refused(command, "--resume", folder, part=part)


def test_an_earlier_run_is_never_overwritten(finished):                         # noqa: F811
    before = contents("run")
    one_line(finished("--seed", 1), "run is not empty", "--resume")
    assert contents("run") == before


@pytest.mark.parametrize("flags", [["--prompt", "a blue fox"], ["--lam", 3]], ids=str)
def test_the_checkpoint_of_another_run_is_refused(finished, flags):             # noqa: F811
    """Of the same shapes, but of another prompt, or λ; also in a folder that holds no run."""
    assert finished(*flags, "--steps", 1, "--out", "other")[0] == 0
    shutil.copy("run/checkpoint.safetensors", "other")
    before = contents("other")
    one_line(finished("--resume", "other", "--steps", 5), "checkpoint.safetensors cannot be",
             "other settings")
    assert contents("other") == before
    Path("stray").mkdir()
    shutil.copy("run/checkpoint.safetensors", "stray")
    one_line(finished("--seed", 2, "--out", "stray"), "stray", "not empty")
    one_line(finished("--resume", "stray"), "stray", "no run")


def rewrite(path, tensors=None, **metadata):
    """Give a checkpoint other tensors (None: without) and metadata, and a digest that fits."""
    with safe_open(path, "pt") as file:
        about = file.metadata() | metadata
    named = load_file(path) | (tensors or {})
    named = {name: tensor for name, tensor in named.items() if tensor is not None}
    if "digest" not in metadata:
        about["digest"] = files.digest(named, about["step"], about["weights"], about["settings"])
    save_file(named, path, about)


def rename_frame(path):
    """Call a frame of the film by another step, but keep the digest."""
    with safe_open(path, "pt") as file:
        digest = file.metadata()["digest"]
    rewrite(path, {"frame.3": None, "frame.9": load_file(path)["frame.3"]}, digest=digest)


def in_place_of(path, make):
    """Remove a file, and make something else in its place."""
    path.unlink()
    make(path)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:999]),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "FIFO": lambda path: in_place_of(path, os.mkfifo),
    "folder": lambda path: in_place_of(path, os.mkdir),
    "foreign": lambda path: rewrite(path, format="pt"),
    "changed": lambda path: rewrite(path, digest="0" * 64),
    "renamed": rename_frame,
    "step": lambda path: rewrite(path, step="many"),
    "no theta": lambda path: rewrite(path, {"theta.0": None}),
    "no momentum": lambda path: rewrite(path, {"theta.0.exp_avg": None}),
    "shape": lambda path: rewrite(path, {"theta.0": torch.zeros(1, 4, 4, 4)}),
    "type": lambda path: rewrite(path, {"theta.0": torch.zeros(1, 4, 8, 8).half()}),
    "momentum": lambda path: rewrite(path, {"theta.0.exp_avg": torch.zeros(1, 1, 1, 1)}),
    "count": lambda path: rewrite(path, {"phi.0.step": torch.zeros(3)}),
    "infinite": lambda path: rewrite(
        path, {"theta.0.exp_avg_sq": torch.full((1, 4, 8, 8), math.inf)}),
    "randomness": lambda path: rewrite(path, {"rng": torch.zeros(3, dtype=torch.uint8)}),
    "no randomness": lambda path: rewrite(path, {"rng": torch.zeros(5056)})}


@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupt_checkpoint_is_one_line(finished, damage):                      # noqa: F811
    DAMAGES[damage](Path("run/checkpoint.safetensors"))
    before = contents("run")
    part = "it is no file" if damage in ("FIFO", "folder") else "cannot be resumed"
    one_line(finished("--resume", "run", "--steps", 5), "checkpoint.safetensors", part)
    assert contents("run") == before


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_noticed(finished, seed):                              # noqa: F811
    """Wherever in the checkpoint it is, the run is refused."""
    path, chance = Path("run/checkpoint.safetensors"), random.Random(seed)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = chance.randrange(header, len(content))
    if seed % 2 == 0:
        place = chance.randrange(header)
    content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    before = contents("run")
    one_line(finished("--resume", "run", "--steps", 5), "checkpoint.safetensors cannot be resumed")
    assert contents("run") == before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_other_weights_are_refused(finished, monkeypatch, part):                           # noqa: F811
    """… by --resume, whichever part's they are; its own are taken again."""
    fingerprint, priors = files.fingerprint, []
    monkeypatch.setattr(files, "fingerprint", lambda prior, phi: priors.append(prior) or
                        fingerprint(prior, phi))
    assert finished("--resume", "run")[0] == 0
    weight = next(priors[0].pipe.components[part].parameters())
    before, kept = contents("run"), weight.detach().clone()
    with torch.no_grad():
        weight.flatten()[-1] += 1
    try:
        one_line(finished("--resume", "run", "--steps", 5), "other weights")
    finally:
        weight.data.copy_(kept)
    assert contents("run") == before
    assert finished("--resume", "run")[0] == 0


def changed_by_hand(prior, phi, what):
    """Change something that a checkpoint does not hold. -> a function that takes it back."""
    if what == "LoRA's scale":
        scaling = next(m.scaling for m in phi.modules() if getattr(m, "scaling", None))
        scaling["default"] *= 2
        return lambda: scaling.update(default=scaling["default"] / 2)
    name = {"prediction_type": "prediction_type", "schedule": "alphas", "units": "scale"}[what]
    before = getattr(prior, name)
    setattr(prior, name, "v_prediction" if what == "prediction_type" else before * 0.9)
    return lambda: setattr(prior, name, before)


@pytest.mark.parametrize("what", ["prediction_type", "schedule", "units", "LoRA's scale", "words"])
def test_what_a_run_was_made_with_is_in_its_checkpoint(load, monkeypatch, what):    # noqa: F811
    """Not only the weights: what --resume must find as it was."""
    prior = load()
    phi = LoRAPhi(prior, rank=2)
    before = files.fingerprint(prior, phi)
    if what == "words":
        words = prior.pipe.tokenizer.get_vocab()
        first, second = sorted(words)[:2]
        swapped = words | {first: words[second], second: words[first]}
        monkeypatch.setattr(type(prior.pipe.tokenizer), "get_vocab", lambda self: swapped)
        assert files.fingerprint(prior, phi) != before
        return
    take_back = changed_by_hand(prior, phi, what)
    try:
        assert files.fingerprint(prior, phi) != before
    finally:
        take_back()
    assert files.fingerprint(prior, phi) == before


def test_a_finished_run_without_its_checkpoint_is_not_made_again(finished):         # noqa: F811
    """… also where its picture was moved elsewhere."""
    Path("run/final.png").rename("gallery.png")
    Path("run/checkpoint.safetensors").unlink()
    before = contents("run")
    one_line(finished("--resume", "run"), "run was finished")
    assert contents("run") == before


def test_phi_is_not_saved_through_a_link(finished):                                 # noqa: F811
    Path("run/phi").rename("mine")
    Path("run/phi").symlink_to(Path("mine").resolve())
    before = contents("mine")
    assert finished("--resume", "run", "--steps", 5)[0] == 0
    assert contents("mine") == before and not Path("run/phi").is_symlink()


def test_a_run_goes_on_from_another_directory(cli, model, tmp_path, monkeypatch):  # noqa: F811
    """A model's folder and the pictures are stored with their whole path, names as they are."""
    Path("model").symlink_to(model)
    Image.new("RGB", (16, 16), "teal").save("a.png")
    flags = ["--model", "model", "--init", "a.png", "--method", "sds"]
    assert cli(*flags, "--steps", 1)[0] == 0
    stored = config_of("run")["settings"]
    assert stored["model"] == str(Path(model).resolve())
    assert stored["init"] == str(tmp_path / "a.png")
    assert cli("--resume", "run", "--model", "model", "--steps", 2)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("--resume", "../run", "--steps", 3)[0] == 0
    Path("tiny-sd").mkdir()                          # whatever lies around here
    assert settings.found("tiny-sd") == "tiny-sd" and settings.found("some/sd") == "some/sd"


# ---------------------------------------------------------------------- files that are none, texts
@pytest.mark.parametrize("command, flags", [
    (asd, "--prompt a --init {}"), (asd, "--prompt a --real {}"), (asd, "--prompt a --model {}"),
    (asd, "--prompt a --real {folder}"), (asd, "--resume {folder}"), (asd, "--resume {}"),
    (editing, "--source a --target b --image {}"), (editing, "--apply . --image {}"),
    (editing, "--source a --target b --image a.png --mask {}"),
    (editing, "--apply {folder} --image a.png"),
    (variants, "--method lmc --prompt a --corrective {}"),
    (variants, "train-corrective --out {}"), (variants, "train-corrective --out b --prompts {}"),
    (variants, "train-corrective --out b --images {}"), (nerf, "{}"), (nerf, "{folder}")])
@pytest.mark.parametrize("device", [False, True])
def test_only_regular_files_are_read(refused, model, tmp_path, command, flags, device):  # noqa: F811
    """A FIFO or a device, in place of a file or in a folder, would never end."""
    Image.new("RGB", (16, 16), "teal").save("a.png")
    (tmp_path / "folder").mkdir()
    for file in ("fifo", "folder/config.json", "folder/transforms.json", "folder/b.png"):
        if device:
            os.symlink("/dev/zero", file)
        else:
            os.mkfifo(file)
    refused(command, *flags.format("fifo", folder="folder").split(" "))


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json"])
def test_only_regular_files_are_resumed(finished, file):                        # noqa: F811
    Path("run", file).unlink()
    os.mkfifo(Path("run", file))
    before = contents("run")
    one_line(finished("--resume", "run", "--steps", 5), file, "neither a file nor a folder")
    assert contents("run") == before


def test_pictures_of_posed_ones_are_regular_files(refused):
    os.mkfifo("0.png")
    Path("transforms.json").write_text(json.dumps({"camera_angle_x": 1, "frames": [
        {"file_path": "0", "transform_matrix": [[1, 0, 0, 0]] * 4}]}))
    refused(nerf, ".", part="transforms.json cannot be used")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xe9" * 9])
def test_metrics_that_are_no_text_are_refused(finished, text):                  # noqa: F811
    Path("run/metrics.jsonl").write_bytes(text)
    before = contents("run")
    one_line(finished("--resume", "run", "--steps", 5), "metrics.jsonl is not UTF-8")
    assert contents("run") == before


@pytest.fixture(scope="session")
def edit_once(folders, tmp_path_factory):                                       # noqa: F811
    """The folder of a finished editing.py --network; it is to be copied, not changed."""
    folder = tmp_path_factory.mktemp("edit") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asd.Prior, "from_pretrained", load_once)
        assert editing.main([
            "--network", "--pictures", "2", "--steps", "1", "--method", "dds", "--source", "a fox",
            "--target", "a cat", "--model", str(folders["epsilon"]), "--device", "cpu", "--out",
            str(folder)]) == 0
    return folder


@pytest.mark.parametrize("damage", ["key", "shape", "type", "empty", "cut", "FIFO"])
def test_kept_sources_that_are_others_are_refused(refused, model, edit_once, damage):  # noqa: F811
    """editing.py --network: what it learns on."""
    shutil.copytree(edit_once, "run")
    path, x0 = Path("run/sources.safetensors"), load_file("run/sources.safetensors")["x0"]
    if damage == "FIFO":
        in_place_of(path, os.mkfifo)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        save_file({"key": {"x": x0}, "type": {"x0": x0.half()}, "empty": {"x0": x0[:0]},
                   "shape": {"x0": x0[:, :, :4].contiguous()}}[damage], path)
    refused(editing, "--resume", "run", "--steps", 2, part="sources.safetensors")


def test_a_resumed_network_keeps_its_own_sources(refused, model, edit_once):    # noqa: F811
    """The checkpoint has them: whatever lies in sources.safetensors, the end is the same."""
    ends = []
    for folder in ("run", "again"):
        shutil.copytree(edit_once, folder)
        if folder == "again":
            path = Path("again/sources.safetensors")
            save_file({"x0": torch.randn(load_file(path)["x0"].shape)}, path)
        assert editing.main(["--resume", folder, "--steps", "2"]) == 0
        ends.append(Path(folder, "edited.png").read_bytes())
    assert ends[0] == ends[1]


def broken_chunk():
    """Return a PNG whose second chunk says that it has no content."""
    stream = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(stream, "PNG")
    return stream.getvalue()[:35] + b"\0" + stream.getvalue()[36:]


def png_of(width, height):
    """Return a PNG that announces this size and breaks off."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(
        ">I", zlib.crc32(header))


@pytest.mark.parametrize("content", [
    b"", b"not a picture", png_of(16, 16), png_of(60000, 60000), broken_chunk(), None])
def test_picture_that_cannot_be_read_is_one_line(cli, content):                 # noqa: F811
    if content is None:
        Path("a.png").mkdir()
    else:
        Path("a.png").write_bytes(content)
    one_line(cli("--init", "a.png"), "a.png", "picture")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "DDS", "AVIF", "QOI",
                                  "SGI"])
def test_a_damaged_picture_is_a_mistake_or_a_picture(tmp_path, recwarn, kind):
    """Whatever its library raises."""
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip("this Pillow has no such pictures")
    stream, shapes = io.BytesIO(), []
    Image.effect_noise((40, 40), 50).convert("RGB").save(stream, kind)
    for seed in range(40):
        chance, content = random.Random(seed), bytearray(stream.getvalue())
        for _ in range(8):
            content[chance.randrange(min(200, len(content)))] = chance.randrange(256)
        (tmp_path / "a").write_bytes(content)
        try:
            shapes.append(files.read_image(tmp_path / "a", (8, 8)).shape)
        except files.UserError as mistake:
            assert "cannot be read as a picture" in str(mistake)
    assert set(shapes) <= {(1, 3, 8, 8)} and len(shapes) < 40 and not recwarn.list


# ------------------------------------------------------------------------------ what does not fit
@pytest.mark.parametrize("command, flags, part", [
    (asd, "--prompt a --device abacus", "--device abacus"),
    (asd, "--prompt a --device meta", "--device meta"),
    (asd, "--prompt a --device mkldnn", "--device mkldnn"),
    (asd, "--prompt a --device cuda:99999999999", "--device cuda:9"),
    (nerf, "mug --device meta", "--device meta"),
    (editing, "--apply . --image a.png --device meta", "no trained network"),
    (nerf, "mug --size 1000000", "out of memory: try a smaller --size"),
    (nerf, "mug --pictures 1000000000", "out of memory"),
    (editing, "--apply . --image a.png --out /", "there already"),
    (asd, "--prompt a --out /", "not empty")])
def test_what_does_not_fit_is_one_line(refused, command, flags, part):
    refused(command, *flags.split(), part=part)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_there_is_one_line(cli):                               # noqa: F811
    one_line(cli("--device", "cuda"), "--device cuda")


def test_pictures_beyond_the_memory_are_one_line(refused, monkeypatch):
    """A little more than there is would end the process, not raise."""
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    refused(nerf, "red mug", part="out of memory: try a smaller --size")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_is_not_there_is_one_line(cli, monkeypatch, error):         # noqa: F811
    def refuse(*args):
        raise error
    monkeypatch.setattr(asd, "Latents", refuse)
    one_line(cli(), "out of memory", "--micro-batch")


@pytest.mark.parametrize("error, line", [
    (ModuleNotFoundError("No module named 'peft'"),
     "asd.py: No module named 'peft': copy all of the folder, and pip"),
    (ValueError("two\n  lines"), "asd.py: two lines")])
def test_an_error_of_a_library_is_one_line(cli, monkeypatch, error, line):      # noqa: F811
    @functools.wraps(LoRAPhi.__init__)
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(LoRAPhi, "__init__", fail)
    one_line(cli(), line)


@pytest.mark.parametrize("flags, part", [
    (["--phi", "embedding", "--tokens", "99"], "99"), (["--init", "nowhere.png"], "nowhere.png"),
    (["--phi-init", "nowhere"], "nowhere"), (["--real", "nowhere"], "nowhere")])
def test_what_the_model_refuses_leaves_nothing(cli, flags, part):               # noqa: F811
    one_line(cli(*flags), part)
    assert not Path("run").exists()


def test_lost_model_is_one_line(cli, no_network):                               # noqa: F811
    one_line(cli("--model", "no/such-model"), "'no/such-model'", "mirror", "local diffusers folder")
    one_line(cli("--model", "/no/such/folder"), "/no/such/folder: there is no such folder or file")


@pytest.mark.parametrize("file, changes, words", [
    ("tokenizer/tokenizer_config.json", None, "tokenizer cannot be loaded: JSONDecodeError"),
    ("unet/config.json", {"norm_num_groups": 7}, "unet cannot be loaded: ValueError: num_channels"),
    ("text_encoder/config.json", {"num_attention_heads": 3}, "text_encoder cannot be loaded"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sawtooth"},
     "scheduler cannot be loaded: NotImplementedError: sawtooth"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"},
     "scheduler_config.json: num_train_timesteps is '1000', not a number of steps"),
    ("scheduler/scheduler_config.json", {"beta_start": "0.1"}, "beta_start is '0.1', and must be"),
    ("model_index.json", {"scheduler": None}, "model_index.json names no scheduler")])
def test_a_part_that_cannot_be_loaded_is_named(cli, model, tmp_path, file, changes, words):  # noqa: F811
    path = shutil.copytree(model, tmp_path / "model") / file
    if changes is None:
        path.write_text(path.read_text()[:40])
    else:
        config = json.loads(path.read_text()) | changes
        config = {name: value for name, value in config.items() if value is not None}
        path.write_text(json.dumps(config))
    one_line(cli("--model", tmp_path / "model"), words)


def test_broken_model_is_one_line(cli, model, tmp_path):                        # noqa: F811
    folder = link_tree(model, tmp_path / "model")
    (folder / "unet" / "config.json").write_text("{")
    one_line(cli("--model", folder), str(folder))


def test_divergence_is_one_line_and_keeps_the_checkpoint(cli):                  # noqa: F811
    result = cli("--method", "sds", "--lr", 5e17, "--steps", 9, "--save-every", 1)
    one_line(result, "not finite at step", "--lr")
    with safe_open("run/checkpoint.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == len(metrics("run")) >= 1
        assert file.get_tensor("theta.0").isfinite().all()


@pytest.mark.parametrize("flags", [["--lr", 1e30], ["--optimizer", "sgd", "--lr", 1e30]], ids=str)
def test_divergence_in_the_last_step_is_no_black_picture(cli, flags):           # noqa: F811
    one_line(cli("--method", "sds", "--steps", 1, *flags), "generator's θ is not finite at step 0")
    assert not Path("run/final.png").exists()


def test_a_phi_that_diverges_in_the_last_step_is_not_kept(cli):                 # noqa: F811
    """A's gradient is 0 at first, as B is: 0/0 of Adam without its ε."""
    one_line(cli("--method", "vsd", "--steps", 1, "--adam-eps", 0), "φ is not finite at step 0")
    assert not Path("run/checkpoint.safetensors").exists() and not Path("run/phi").exists()


def test_what_lies_where_a_file_is_prepared_is_not_written_to(tmp_path):
    """A user's x.png.tmp stays; a link under the temporary name is not followed."""
    mine, theirs = tmp_path / "x.png.tmp", tmp_path / "theirs"
    for path in (mine, theirs):
        path.write_text("mine")
    (tmp_path / ".x.png.tmp").symlink_to(theirs)
    files.write_text(tmp_path / "x.png", "ours")
    (tmp_path / ".x.png.tmp").symlink_to(theirs)
    save_tensors(tmp_path / "x.png", {"x": torch.ones(1)})
    assert mine.read_text() == theirs.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs", "x.png", "x.png.tmp"]


@pytest.mark.parametrize("command, flags, part", [
    (nerf, ["no-such-solid"], "neither a folder nor a solid"), (claims, ["zzz"], "no claim"),
    (asd, ["--prompts-file", "missing.txt"], "missing.txt"),
    (variants, ["train-corrective", "--lr", "9"], "--lr")], ids=lambda value: ascii(value)[:30])
def test_a_rank_left_over_hides_no_line(refused, monkeypatch, command, flags, part):
    """… where no other process has been met; under torchrun the first alone speaks."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    refused(command, *flags, part=part)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not run.speaks()


# ---------------------------------------------------------------------------------- full disks
@pytest.mark.parametrize("out, part", [
    ("file", "file is a file"), ("link", "link is a file, or a link to nothing"),
    ("file/run", "file")])
def test_folder_that_cannot_be_made_is_one_line(cli, out, part):                # noqa: F811
    Path("file").write_text("mine")
    Path("link").symlink_to("nothing")
    one_line(cli("--out", out), part)
    assert Path("file").read_text() == "mine"


def fill_the_disk(monkeypatch, real):
    """The second checkpoint finds the disk full: as we say it, or the system, in the middle."""
    write, limits, calls = Path.write_bytes, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def write_bytes_on_full_disk(path, content):
        calls.append(1)
        if len(calls) < 2:
            return write(path, content)
        if not real:
            write(path, b"half")
            raise OSError(28, "No space left on device")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            write(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(Path, "write_bytes", write_bytes_on_full_disk)


@pytest.mark.parametrize("real", [False, True])
def test_full_disk_is_one_line_and_keeps_the_checkpoint(cli, monkeypatch, real):   # noqa: F811
    with monkeypatch.context() as patch:
        fill_the_disk(patch, real)
        one_line(cli("--steps", 3, "--save-every", 1))
    with safe_open("run/checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "1"
    assert not list(Path("run").glob("*.tmp*"))
    assert cli("--resume", "run")[0] == 0 and len(metrics("run")) == 3


def test_full_disk_at_the_end_is_one_line(finished, monkeypatch):               # noqa: F811
    """Nothing but φ cannot be written; its libraries have an error of their own for that."""
    def no_space(*args, **kwargs):
        raise SafetensorError("No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", no_space)
        one_line(finished("--resume", "run"), "No space left")
    shutil.rmtree("run/phi")
    Path("run/phi").write_text("a file, no folder")
    one_line(finished("--resume", "run"), "phi")
    Path("run/phi").unlink()
    assert finished("--resume", "run")[0] == 0


def with_full_disk(number, argv, log):
    """Run asd.py with a stream, 1 or 2, on a full disk and the other one in a file."""
    torch.set_num_threads(1)
    streams = [open("/dev/full", "w"), open(log, "w")]
    for place in (number, 3 - number):
        stream = streams.pop(0)
        os.dup2(stream.fileno(), place)
        setattr(sys, ("stdin", "stdout", "stderr")[place], open(place, "w"))
    try:
        status = asd.main(argv)
    except SystemExit as stop:
        status = stop.code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()                            # Python does so at its end, or its status is 120
    os._exit(status)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("number, flags, status", [
    (2, [], 0), (2, ["--lam", "nan"], 2), (1, [], 2), (1, ["--help"], 2)])
def test_a_full_disk_behind_a_stream(fork, model, tmp_path, monkeypatch, number, flags,  # noqa: F811
                                     status):
    """Behind stderr it ends no run, and a mistake's status stays; behind stdout it is a mistake."""
    monkeypatch.chdir(tmp_path)
    argv = ["--prompt", "a fox", "--model", model, "--steps", "1", "--method", "sds", *flags]
    process = fork(with_full_disk, number, argv, "log")
    process.join()
    assert process.exitcode == status
    if number == 1:
        log = Path("log").read_text()
        assert log.endswith("No space left on device\n") and "Traceback" not in log


def test_a_reader_that_has_read_enough_is_no_mistake():
    """… such as head: no line, and the status that a shell gives SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "claims"], cwd=HERE, stdout=writer,
                          stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# -------------------------------------------------------------------------------------- messages
@pytest.mark.parametrize("command, flags", [
    (asd, ["--prompt"]), (asd, ["--prompt", "a", "--init"]), (asd, ["--prompt", "a", "--out"]),
    (asd, ["--resume"]), (asd, ["--method"]), (variants, ["train-corrective", "--out"]),
    (variants, ["--prompt", "a", "--method", "csd", "--negative"]),
    (editing, ["--source", "a", "--target"]), (editing, ["--apply"]), (text_to_3d, ["--prompt"]),
    (nerf, []), (claims, []), (claims, ["1a", "--part"])])
@pytest.mark.parametrize("text", ["\udcff", "a\udc80b", "a\0b"], ids=ascii)
def test_texts_that_are_no_utf8_are_one_line(refused, command, flags, text):
    named = [flag for flag in flags if flag.startswith("--")] or ["the command line"]
    assert f": {named[-1]}: " in refused(command, *flags, text, part="not valid text")


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", "\u202e", "\r\x07", "\u2028", "x" * 9999],
                         ids=lambda text: ascii(text[:9]))
@pytest.mark.parametrize("command, flags", [
    (asd, ["--prompt", "a", "--method"]), (asd, ["--prompt", "a", "--init"]), (asd, []), (nerf, []),
    (editing, ["--image", "a", "--apply"]), (claims, []),
    (variants, ["train-corrective", "--out", "b", "--prompts"])])
def test_a_message_is_one_short_printable_line(refused, model, command, flags, text):  # noqa: F811
    line = refused(command, *flags, text).removesuffix("\n")
    assert line.isprintable() and len(line) <= 300


@pytest.mark.parametrize("length", [280, 290, 295, 300, 305, 9999])
def test_a_long_message_keeps_both_its_ends(capsys, length):
    run.say("asd.py", "b" + length * "x" + "e")
    line = capsys.readouterr().err.removesuffix("\n")
    assert len(line) <= 300 and line.startswith("asd.py: bx") and line.endswith("xe")
    assert ("..." in line) == (length > 290)


def test_ten_thousand_earlier_runs(monkeypatch):
    """The name's number is found without a limit, each folder tried once."""
    tried = []

    def taken(folder, config):
        tried.append(folder)
        if len(tried) <= 10_001:
            raise files.FolderTaken("taken")
        return pytest.MonkeyPatch.context()
    monkeypatch.setattr(files, "new_folder", taken)
    with run.ExitStack() as stack:
        files.open_folder(stack, None, "asd-a-0", {})
    assert tried[-1] == Path("outputs/asd-a-0-10002") and len(set(tried)) == len(tried)


@pytest.mark.parametrize("command, argv", [
    (asd, []), (variants, []), (editing, []), (editing, ["--apply", "DIR", "--image", "a.png"]),
    (text_to_3d, []), (nerf, ["mug"]), (variants, ["train-corrective"]), (claims, ["1a"])])
def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path, command, argv):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.chdir(tmp_path)
    for place, name in ((run, "start"), (nerf, "run"), (editing, "apply_network"),
                        (variants, "train_corrective"), (claims, "make")):
        monkeypatch.setattr(place, name, interrupt)
    status, err = command.main(argv), capsys.readouterr().err
    assert status == 130 and "stopped" in err and len(err.strip().splitlines()) == 1


ODD = """
import sys
import asd, editing, nerf, text_to_3d, variants
for command in (asd, editing, nerf, text_to_3d, variants):
    try:
        command.main(["--help"])
    except SystemExit as stop:
        assert stop.code == 0
"""


def test_help_on_an_odd_python():
    """Without docstrings, with warnings as errors, on a terminal without Greek letters."""
    done = subprocess.run([sys.executable, "-OO", "-W", "error", "-c", ODD], cwd=HERE,
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"usage: ") == 5


# --------------------------------------------------------------- nothing is unpickled, nobody asked
SHORT = ["--minutes", "0.001", "--samples", "2", "--batch", "2", "--ddim", "1", "--device", "cpu"]


def test_foreign_files_in_data_are_one_line(model, tmp_path, monkeypatch, capsys):   # noqa: F811
    """train-corrective: what lies where it would go on is neither read nor lost."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    argv = ["train-corrective", "--model", model, *SHORT, "--out", "b.safetensors"]
    assert variants.main(argv) == 0
    Path("b.safetensors").unlink()
    for kind in ("samples", "checkpoint"):
        (path,) = Path("data").glob(f"*.{kind}.*")
        kept = path.read_bytes()
        for content in (b"foreign", {"x": torch.zeros(3)}, {"x0": torch.zeros(3, 4)}, None):
            path.unlink()
            if content is None:
                os.mkfifo(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                save_file(content, path)
            before, _ = contents("."), capsys.readouterr()
            status = variants.main(argv)
            err = capsys.readouterr().err
            lines = [line for line in err.splitlines() if line and "%|" not in line]
            assert status == 2 and len(lines) == 1 and path.name in lines[0]
            assert contents(".") == before
        path.unlink()
        path.write_bytes(kept)


def test_two_trainings_of_correctives_do_not_share_their_samples(refused, monkeypatch, tmp_path):
    """Whatever their --out: data/ is one process's at a time, also where --out is in it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    argv = ["train-corrective", "--model", "a", "--out"]
    with files.locked(tmp_path / "data"):
        refused(variants, *argv, "other/b.safetensors", part="another process is at work in /")
    refused(variants, *argv, "data/b.safetensors", part="'a' is no local folder")


def test_no_command_unpickles_or_connects(model, no_network, tmp_path, monkeypatch):  # noqa: F811
    """All commands on a local folder, while torch.load, pickle and sockets raise."""
    def refuse(*args, **kwargs):
        pytest.fail("unpickled")
    for place, name in ((torch, "load"), (torch.serialization, "load"), (pickle, "load"),
                        (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    for module in (nerf, text_to_3d):                 # the same, but smaller
        monkeypatch.setattr(module, "write_all", functools.partial(
            nerf.write_all, size=8, views=1, frames=2, cells=8))
    monkeypatch.setattr(text_to_3d, "view_scores", lambda *_: {})
    load_once.cache_clear()                           # the model is loaded again
    Image.effect_noise((16, 16), 99).convert("RGB").save("a.png")
    on = ["--model", model, "--device", "cpu", "--steps", "1", "--settings", "tiny"]
    edit = ["--source", "a fox", "--target", "a cat", "--method", "dds"]
    for command, *argv in (
            [asd, "--prompt", "a fox", "--init", "a.png", "--real", "a.png", "--out", "asd", *on],
            [asd, "--prompt", "a fox", "--phi", "embedding", "--out", "embedding", *on],
            [asd, "--resume", "asd", "--steps", "2"],
            [variants, "train-corrective", "--model", model, *SHORT, "--out", "b.safetensors"],
            [variants, "--method", "csd", "--prompt", "a fox", "--out", "csd", *on],
            [variants, "--method", "bridge", "--prompt", "a fox", "--out", "bridge", *on],
            [variants, "--method", "lmc", "--prompt", "a fox", "--corrective", "b.safetensors",
             *on],
            [editing, *edit, "--image", "a.png", "--out", "edit", *on],
            [editing, *edit, "--network", "--pictures", "2", "--out", "network", *on],
            [editing, "--apply", "network", "--image", "a.png", "--device", "cpu"],
            [text_to_3d, "--prompt", "a red mug", "--samples", "4", "--resolution", "4", "8",
             "--levels", "2", "--table", "8", "--out", "3d", *on],
            [nerf, "ball", "--pictures", "2", "--size", "8", "--steps", "2", "--batch", "16",
             "--samples", "4", "--device", "cpu"]):
        assert command.main(argv) == 0, argv
    assert claims.main([]) == 0
    assert no_network == []
