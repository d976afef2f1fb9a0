"""What users, other programs and disks do wrong, at every command: one line each, nothing lost.

The settings of a stored run, files that are none, texts that are none, what does not fit; and that
no command unpickles anything or asks for a connection where the model is a local folder.
"""
import faulthandler
import functools
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, features
from safetensors.torch import load_file, save_file

import asd
import editing
import files
import nerf
import reproduce
import runs
import text_to_3d
import variants
from test_distill import folders, no_network  # noqa: F401 (fixtures)
from test_runs import cli, contents, load_once, model, one_line  # noqa: F401 (fixtures)
from tiny import data

HERE = Path(asd.__file__).resolve().parent
COMMANDS = {"asd": asd, "variants": variants, "editing": editing, "text_to_3d": text_to_3d}


@pytest.fixture(autouse=True)
def nothing_waits():
    """Five minutes at most: what waits for ever, be it in C, ends all the tests with its place."""
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(command, *flags, parts) -> the line on stderr; nothing in the folder changes."""
    monkeypatch.chdir(tmp_path)

    def call(command, *flags, part=""):
        before, _ = contents("."), capsys.readouterr()
        try:
            status = command.main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
        result = status, *capsys.readouterr()
        one_line(result, part, name=f"{command.__name__}.py")
        assert len(result[2]) <= 301 and contents(".") == before
        return result[2]
    return call


# ------------------------------------------------------------------------- a stored run's settings
GIVEN = {"asd": {"prompt": ["a red apple"]}, "variants": {"prompt": ["a red apple"]},
         "text_to_3d": {"prompt": "a red mug"}, "editing": {
             "source": "a fox", "target": "a cat", "image": "a.png"}}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """stored(name, **settings): the folder of a run that was stopped at once, by this command."""
    def make(name, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(runs, "main", lambda command, argv: command)
            command = COMMANDS[name].main([])
        settings = runs.usual("asd", command) | GIVEN[name] | changes
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.json").write_text(json.dumps(
            {"program": command.name, "settings": settings}))
        return settings
    return make


FREE = {"model", "device", "image", "mask", "init", "real", "corrective", "things", "prompt",
        "source", "target", "config", "phi_init", "negative", "source_words",
        "target_words"}                                                       # whatever they say


@pytest.mark.parametrize("value", [
    "abc", None, True, 10 ** 400, math.nan, math.inf, -1e39, [], {}, [1, "2"], "\udcff", "a\0b"],
    ids=ascii)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_setting_of_another_type_is_refused(stored, refused, monkeypatch, name, value):
    """Each setting of a stored run in turn, by its flag's own check, before anything is loaded."""
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("it runs"))
    for key, usual in stored(name).items():
        if not (value is None and (usual is None or key in GIVEN[name]) or value == "abc" and
                key in FREE or value is True and isinstance(usual, bool)):
            stored(name, **{key: value})
            refused(COMMANDS[name], "--resume", "run")


@pytest.mark.parametrize("name, key, value, part", [
    ("asd", "method", "csd", "'csd'"), ("asd", "method", ["asd"], "method"),
    ("asd", "omega", "foo", "--omega"), ("asd", "t_min", 5, "--t-min"),
    ("asd", "t_min", 0.9, "--t-max"), ("asd", "phi_steps", 0, "--phi-steps"),
    ("asd", "steps", 2.5, "--steps"), ("asd", "seed", -1, "--seed"),
    ("asd", "phi", "noise", "--phi"),
    ("asd", "lam_phi", None, "--lam-phi"), ("asd", "prompt", [" "], "empty"),
    ("asd", "prompt", [3], "--prompt"), ("asd", "prompt", "a fox", "--prompt"),
    ("asd", "phi_first", 1, "--phi-first"), ("asd", "dtype", "int8", "--dtype"),
    ("variants", "negative", "blurry", "--negative"),
    ("variants", "bridge_steps", 10 ** 9, "--bridge-steps"),
    ("variants", "generator", "gan", "--generator"), ("variants", "bandwidth", -1, "--bandwidth"),
    ("editing", "network", "yes", "--network"), ("editing", "source", "  ", "--source"),
    ("editing", "phi_z", "sideways", "--phi-z"), ("editing", "things", "fox", "--things"),
    ("text_to_3d", "elevation", [35, 5], "least value first"),
    ("text_to_3d", "fovy", [40], "--fovy"),
    ("text_to_3d", "fovy", 40, "--fovy"), ("text_to_3d", "distance", [1, 1e39], "--distance"),
    ("text_to_3d", "resolution", [4, 8.5], "--resolution"),
    ("text_to_3d", "views", "2", "--views")])
def test_a_setting_out_of_its_range_is_refused(stored, refused, monkeypatch, name, key, value,
                                               part):
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("it runs"))
    stored(name, **{key: value})
    refused(COMMANDS[name], "--resume", "run", part=part)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_run_stores_passes_its_own_checks(stored, tmp_path, monkeypatch, name):
    """… and is taken as it is, whatever numbers JSON made of it; so are fields of no flag."""
    seen, settings = [], stored(name, unknown=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "run", lambda command, settings, *_: seen.append(settings))
    assert COMMANDS[name].main(["--resume", "run", "--steps", "9"]) == 0
    del settings["unknown"]
    assert json.loads(json.dumps(seen)) == json.loads(json.dumps([settings | {"steps": 9}]))


# ------------------------------------------------------------------------- another model, or place
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_other_weights_are_refused(cli, monkeypatch, part):                     # noqa: F811
    """… by --resume, whichever part's they are; its own are taken again."""
    priors, fingerprint = [], runs.fingerprint
    monkeypatch.setattr(runs, "fingerprint", lambda prior: priors.append(prior) or
                        fingerprint(prior))
    cli()
    before, (weight, *_) = contents("run"), priors[0].pipe.components[part].parameters()
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.flatten()[-1] += 1
    try:
        one_line(cli("--resume", "run", "--steps", 5), "other weights")
    finally:
        weight.data.copy_(kept)
    assert contents("run") == before
    assert cli("--resume", "run", "--steps", 5)[0] == 0


def test_a_run_goes_on_from_another_directory(cli, model, tmp_path, monkeypatch):  # noqa: F811
    """A model's folder and the pictures are stored with their whole path, names as they are."""
    Path("model").symlink_to(model)
    Image.new("RGB", (16, 16), "teal").save("a.png")
    assert cli("--model", "model", "--init", "a.png", "--steps", 2)[0] == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert settings["model"] == str(Path(model).resolve())
    assert settings["init"] == str(tmp_path / "a.png")
    assert cli("--resume", "run", "--model", "model", "--steps", 3)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("--resume", "../run", "--steps", 4)[0] == 0
    Path("tiny-sd").mkdir()                          # whatever lies around here
    assert runs.place("tiny-sd") == "tiny-sd" and runs.place("some/sd") == "some/sd"


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
def test_only_regular_files_are_read(refused, tmp_path, command, flags, device):
    """A FIFO or a device, in place of a file or in a folder, would never end."""
    Image.new("RGB", (16, 16), "teal").save("a.png")
    (tmp_path / "folder").mkdir()
    for file in ("fifo", "folder/config.json", "folder/transforms.json", "folder/b.png"):
        os.symlink("/dev/zero", file) if device else os.mkfifo(file)
    refused(command, *flags.format("fifo", folder="folder").split(" "))


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json"])
def test_only_regular_files_are_resumed(cli, file):                             # noqa: F811
    cli()
    Path("run", file).unlink()
    os.mkfifo(Path("run", file))
    before = contents("run")
    one_line(cli("--resume", "run", "--steps", 5), file, "neither a file nor a folder")
    assert contents("run") == before


def test_pictures_of_posed_ones_are_regular_files(refused):
    os.mkfifo("0.png")
    Path("transforms.json").write_text(json.dumps({"camera_angle_x": 1, "frames": [
        {"file_path": "0", "transform_matrix": [[1, 0, 0, 0]] * 4}]}))
    refused(nerf, ".", part="0.png is no file")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xe9" * 9])
def test_metrics_that_are_no_text_are_refused(cli, text):                       # noqa: F811
    cli()
    Path("run/metrics.jsonl").write_bytes(text)
    before = contents("run")
    one_line(cli("--resume", "run", "--steps", 5), "metrics.jsonl is not UTF-8")
    assert contents("run") == before


@pytest.mark.parametrize("damage", ["key", "shape", "type", "empty", "cut", "FIFO"])
def test_kept_sources_that_are_others_are_refused(refused, model, damage):      # noqa: F811
    """editing.py --network: what it learns on."""
    assert editing.main([
        "--network", "--pictures", "2", "--steps", "1", "--method", "dds", "--source", "a fox",
        "--target", "a cat", "--model", model, "--device", "cpu", "--out", "run"]) == 0
    path, x0 = Path("run/sources.safetensors"), load_file("run/sources.safetensors")["x0"]
    path.unlink() if damage == "FIFO" else None
    {"key": lambda: save_file({"x": x0}, path), "type": lambda: save_file({"x0": x0.half()}, path),
     "shape": lambda: save_file({"x0": x0[:, :, :4].contiguous()}, path),
     "empty": lambda: save_file({"x0": x0[:0]}, path), "FIFO": lambda: os.mkfifo(path),
     "cut": lambda: path.write_bytes(path.read_bytes()[:-9])}[damage]()
    refused(editing, "--resume", "run", "--steps", 2, part="sources.safetensors")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "DDS", "AVIF", "QOI",
                                  "SGI"])
def test_a_damaged_picture_is_a_mistake_or_a_picture(tmp_path, recwarn, kind):
    """Whatever its library raises."""
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip("this Pillow has no such pictures")
    data, read = io.BytesIO(), []
    Image.effect_noise((40, 40), 50).convert("RGB").save(data, kind)
    for seed in range(40):
        chance, bytes_ = random.Random(seed), bytearray(data.getvalue())
        for _ in range(8):
            bytes_[chance.randrange(min(200, len(bytes_)))] = chance.randrange(256)
        (tmp_path / "a").write_bytes(bytes_)
        try:
            read.append(files.read_image(tmp_path / "a", (8, 8)).shape)
        except runs.UserError as mistake:
            assert "cannot be read as a picture" in str(mistake)
    assert set(read) <= {(1, 3, 8, 8)} and len(read) < 40 and not recwarn.list


# ------------------------------------------------------------------------------ what does not fit
@pytest.mark.parametrize("command, flags, part", [
    (asd, ["--prompt", "a", "--device", "meta"], "--device meta"),
    (asd, ["--prompt", "a", "--device", "mkldnn"], "--device mkldnn"),
    (asd, ["--prompt", "a", "--device", "cuda:99999999999"], "--device cuda:9"),
    (nerf, ["mug", "--device", "meta"], "--device meta"),
    (editing, ["--apply", ".", "--image", "a.png", "--device", "meta"], "no trained network"),
    (asd, ["--prompt", "a", "--lam", "1e39"], "--lam"),
    (asd, ["--prompt", "a", "--lr", "1e30", "--lr-end", "1e30"], "--lr-end"),
    (variants, ["--method", "bridge", "--prompt", "a", "--bridge-steps", "1000000000"], "--bridge"),
    (text_to_3d, ["--prompt", "a", "--elevation", "0", "1e39"], "--elevation"),
    (text_to_3d, ["--prompt", "a", "--azimuth", "-1e39", "0"], "--azimuth"),
    (text_to_3d, ["--prompt", "a", "--distance", "1", "1e39"], "--distance"),
    (nerf, ["red mug", "--size", "1000000"], "out of memory: try a smaller --size"),
    (nerf, ["red mug", "--pictures", "1000000000"], "out of memory"),
    (editing, ["--apply", ".", "--image", "a.png", "--out", "/"], "there already"),
    (asd, ["--prompt", "a", "--out", "/"], "not empty"),
    (reproduce, ["1a", "--part", "3/2"], "--part"), (reproduce, ["nothing"], "nothing"),
    (reproduce, ["1a", "--part"], "--part"), (reproduce, ["1a", "--x"], "--x")])
def test_what_does_not_fit_is_one_line(refused, command, flags, part):
    refused(command, *flags, part=part)


def test_pictures_beyond_the_memory_are_one_line(refused, monkeypatch):
    """A little more than there is would end the process, not raise."""
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    refused(nerf, "red mug", part="out of memory: try a smaller --size")


@pytest.mark.parametrize("command, flags", [
    (asd, ["--prompt"]), (asd, ["--prompt", "a", "--init"]), (asd, ["--prompt", "a", "--out"]),
    (asd, ["--resume"]), (asd, ["--method"]), (variants, ["train-corrective", "--out"]),
    (variants, ["--prompt", "a", "--method", "csd", "--negative"]),
    (variants, ["--prompt", "a", "--method", "bridge", "--source-words"]),
    (editing, ["--source", "a", "--target"]), (editing, ["--apply"]), (text_to_3d, ["--prompt"]),
    (nerf, []), (reproduce, []), (reproduce, ["1a", "--part"])])
@pytest.mark.parametrize("text", ["\udcff", "a\udc80b", "a\0b"], ids=ascii)
def test_texts_that_are_no_utf8_are_one_line(refused, command, flags, text):
    refused(command, *flags, text, part="not valid text")


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", "\u202e", "\r\x07", "\u2028", "x" * 9999],
                         ids=lambda text: ascii(text[:9]))
@pytest.mark.parametrize("command, flags", [
    (asd, ["--prompt", "a", "--method"]), (asd, ["--prompt", "a", "--init"]), (asd, []), (nerf, []),
    (editing, ["--image", "a", "--apply"]), (reproduce, []),
    (variants, ["train-corrective", "--out", "b", "--prompts"])])
def test_a_message_is_one_short_printable_line(refused, command, flags, text):
    line = refused(command, *flags, text).removesuffix("\n")
    assert line.isprintable() and len(line) <= 300


@pytest.mark.parametrize("length", [280, 290, 295, 300, 305, 9999])
def test_a_long_message_keeps_both_its_ends(capsys, length):
    runs.say("asd.py", "b" + length * "x" + "e")
    line = capsys.readouterr().err.removesuffix("\n")
    assert len(line) <= 300 and line.startswith("asd.py: bx") and line.endswith("xe")
    assert ("..." in line) == (length > 290)


def test_ten_thousand_earlier_runs(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(runs, "claimed",
                        lambda folder, *_: tried.append(folder) or len(tried) > 10_001)
    monkeypatch.setattr(runs, "run", lambda *_: None)
    assert asd.main(["--prompt", "a"]) == 0
    assert tried[-1] == Path("outputs/asd-a-0-10002") and len(set(tried)) == len(tried)


SHORT = ["--minutes", "0.001", "--samples", "2", "--batch", "2", "--ddim", "1", "--device", "cpu"]


@pytest.mark.parametrize("kind", ["samples", "checkpoint"])
def test_foreign_files_in_data_are_one_line(model, tmp_path, monkeypatch, capsys, kind):  # noqa: F811
    """train-corrective: what lies where it would go on is neither read nor lost."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    argv = ["train-corrective", "--model", model, *SHORT, "--out", "b.safetensors"]
    assert variants.main(argv) == 0
    (path,) = Path("data").glob(f"*.{kind}.*")
    for content in (b"foreign", {"x": torch.zeros(3)}, {"x0": torch.zeros(3, 4)}, None):
        path.unlink()
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        before, _ = contents("."), capsys.readouterr()
        status = variants.main(argv)
        lines = [x for x in capsys.readouterr().err.splitlines() if x and "%|" not in x]
        assert status == 2 and len(lines) == 1 and path.name in lines[0]
        assert contents(".") == before


@pytest.mark.parametrize("command, argv", [
    (asd, []), (variants, []), (editing, []), (editing, ["--apply", "DIR"]), (text_to_3d, []),
    (nerf, ["mug"]), (reproduce, ["1a"])])
def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path, command, argv):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "read_settings", interrupt)
    monkeypatch.setattr(nerf, "run", interrupt)
    monkeypatch.setattr(editing, "apply_network", interrupt)
    monkeypatch.setattr(reproduce, "make", interrupt)
    try:
        status = command.main(argv)
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 130 and "stopped" in err and len(err.strip().splitlines()) == 1


def test_help_on_an_odd_python():
    """Without docstrings, with warnings as errors, on a terminal without Greek letters."""
    running = [subprocess.Popen(
        [sys.executable, "-OO", "-W", "error", HERE / f"{name}.py", "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"}) for name in (
            "asd", "variants", "editing", "text_to_3d", "nerf", "reproduce")]
    for one in running:
        out, err = one.communicate()
        assert (one.returncode, err) == (0, b"") and out.startswith(b"usage: "), one.args


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stderr(model, tmp_path):        # noqa: F811
    """What cannot be said ends no run, and a mistake's status stays what it is."""
    for flags, status in ([], 0), (["--lam", "nan"], 2):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, HERE / "asd.py", "--prompt", "a fox", "--model", model, "--steps",
                 "1", *flags], cwd=tmp_path, stderr=full, stdout=subprocess.DEVNULL)
        assert done.returncode == status
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:              # behind stdout the result is not told
        done = subprocess.run(
            [sys.executable, HERE / "asd.py", "--prompt", "a fox", "--model", model, "--steps",
             "1"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=full, text=True, env=buffered)
    assert done.returncode == 2 and done.stderr.endswith("No space left on device\n")
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------- nothing is unpickled, nobody asked
def test_no_command_unpickles_or_connects(model, no_network, tmp_path, monkeypatch):       # noqa: F811
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
    load_once.cache_clear()                           # the model is loaded again
    Image.effect_noise((16, 16), 99).convert("RGB").save("a.png")
    on = ["--model", model, "--device", "cpu", "--steps", "2", "--settings", "tiny"]
    edit = ["--source", "a fox", "--target", "a cat", "--method", "dds"]
    for command, *argv in (
            [asd, "--prompt", "a fox", "--init", "a.png", "--real", "a.png", "--out", "asd", *on],
            [asd, "--prompt", "a fox", "--phi", "embedding", "--out", "embedding", *on],
            [asd, "--resume", "asd", "--steps", "3"],
            [variants, "train-corrective", "--model", model, *SHORT, "--out", "b.safetensors"],
            *([variants, "--method", name, "--prompt", "a fox", "--out", name, *on]
              for name in ("csd", "nfsd", "bridge")),
            [variants, "--method", "lmc", "--prompt", "a fox", "--corrective", "b.safetensors",
             *on],
            [editing, *edit, "--image", "a.png", "--out", "edit", *on],
            [editing, *edit, "--network", "--pictures", "2", "--out", "network", *on],
            [editing, "--apply", "network", "--image", "a.png", "--device", "cpu"],
            [text_to_3d, "--prompt", "a red mug", "--samples", "4", "--resolution", "4", "8",
             "--out", "3d", *on],
            [nerf, "ball", "--pictures", "2", "--size", "8", "--steps", "2", "--batch", "16",
             "--samples", "4", "--device", "cpu"]):
        assert command.main(argv) == 0, argv
    reproduce.main([])
    assert no_network == []
