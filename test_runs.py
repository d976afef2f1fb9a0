"""The command line: what a run leaves behind, going on after any interruption, users' mistakes.

main() is called in this process; the runs that are killed are processes of their own, ASD_KILLS of
them (default 3; of 30, every other one is killed while a checkpoint is written).  The model is
test_distill.py's tiny one; the last test uses tiny/sd.
"""
import fcntl
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import asd
import files
import runs
from phi import LoRAPhi
from test_distill import folders, link_tree, no_network, rng  # noqa: F401 (fixtures)

HERE = Path(asd.__file__).resolve().parent
KILLS = int(os.environ.get("ASD_KILLS", 3))
load_once = functools.cache(asd.Prior.from_pretrained)


# -------------------------------------------------------------------------------------- helpers
@pytest.fixture
def model(folders, monkeypatch):                            # noqa: F811
    """The tiny model's folder; it is loaded once, as no run may change it."""
    monkeypatch.setattr(asd.Prior, "from_pretrained", load_once)
    return str(folders["epsilon"])


@pytest.fixture
def cli(model, tmp_path, monkeypatch, capsys):
    """cli(*flags) -> (status, stdout, stderr) of a run of 3 steps of the tiny model in tmp_path."""
    monkeypatch.chdir(tmp_path)
    call = caller(asd.main, model, capsys)
    call.model = model
    return call


def caller(main, model, capsys):
    """What `cli` is, for the main() of a command that makes pictures."""
    def call(*flags):
        flags = [str(flag) for flag in flags]
        if "--resume" not in flags:
            for default in (["--model", model], ["--prompt", "a red apple"], ["--steps", "3"],
                            ["--out", "run"], ["--device", "cpu"], ["--settings", "tiny"]):
                flags += default if default[0] not in flags else []
        try:
            status = main(flags)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


def contents(folder):
    """{path: bytes} of all that is in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*")
            if p.is_file()}


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return load_file(Path(folder) / "checkpoint.safetensors")


def same_run(a, b):
    """The same bits in pictures, checkpoint and φ, the same numbers in the metrics."""
    a, b = Path(a), Path(b)
    assert contents(a).keys() == contents(b).keys()
    one, two = checkpoint(a), checkpoint(b)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for path in a.glob("*.png"):
        assert path.read_bytes() == (b / path.name).read_bytes()
    for path in a.glob("phi/*"):
        one, two = load_file(path), load_file(b / "phi" / path.name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    rows = [[row | {"seconds": 0} for row in metrics(folder)] for folder in (a, b)]
    assert rows[0] == rows[1]


def one_line(result, *parts, name="asd.py"):
    """The user made a mistake: status 2, a single line that says so, nothing on stdout."""
    status, out, err = result
    lines = [line for line in re.split(r"[\r\n]+", err)
             if line and "%|" not in line and ", settings " not in line]     # its first, and bars
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"{name}: "), err[-900:]
    assert out == "" and "Traceback" not in err
    for part in parts:
        assert part in lines[0]


# ----------------------------------------------------------------------------- what a run leaves
@pytest.mark.parametrize("name, phi, file", [
    ("sds", None, None),
    ("vsd", "lora", "pytorch_lora_weights"), ("vsd", "embedding", "learned_embeds"),
    ("asd", "lora", "pytorch_lora_weights"), ("asd", "embedding", "learned_embeds")])
def test_a_run_leaves_its_files(cli, model, name, phi, file):
    status, out, err = cli("--method", name, *(["--phi", phi] if phi else []), "--seed", 5)
    assert status == 0 and out == "run/final.png\n" and "Warning" not in err
    files = {"final.png", "progress.png", "metrics.jsonl", "config.json", "checkpoint.safetensors"}
    assert contents("run").keys() == files | ({f"phi/{file}.safetensors"} if file else set())
    rows = metrics("run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["loss_G"] > 0 and (row["loss_D"] != 0) == (name != "sds") for row in rows)
    config = json.loads(Path("run/config.json").read_text())
    settings = config.pop("settings")
    assert settings["prompt"] == ["a red apple"] and settings["model"] == model
    assert (settings["method"], settings["seed"], settings["steps"]) == (name, 5, 3)
    assert settings["phi"] == (phi or "noise") and settings["gamma"] == asd.METHODS[name].gamma
    assert config["torch"] == torch.__version__ and config["python"] == sys.version.split()[0]
    assert config["dtype"] == "torch.float32" and config["device"] == "cpu"


def test_a_model_that_predicts_v_runs_too(cli, folders):                       # noqa: F811
    status, out, _ = cli("--model", folders["v_prediction"], "--particles", 2)
    assert status == 0 and Path(out.strip()).is_file() and len(metrics("run")) == 3
    saved = checkpoint("run")
    assert not torch.equal(saved["frame.0"], saved["frame.3"]) and saved["theta.0"].isfinite().all()


def test_a_shell_shows_the_bar_and_the_path(model, tmp_path):
    """`python asd.py …` from anywhere: no warnings, nothing of the libraries' chatter."""
    flags = ["--model", model, "--prompt", "a red apple", "--steps", "1", "--device", "cpu"]
    done = subprocess.run([sys.executable, HERE / "asd.py", *flags], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stdout) == (0, "outputs/asd-a-red-apple-0/final.png\n")
    first, *others = [line for line in re.split(r"[\r\n]+", done.stderr) if line]
    assert first.startswith("asd.py: asd, settings paper (§6: ProlificDreamer-2D's")
    assert all("%|" in line for line in others)


def test_final_picture_is_theta_decoded(cli, model):
    cli()
    images = asd.Prior.from_pretrained(model, "cpu", None).decode(checkpoint("run")["theta.0"])
    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    expected = Image.fromarray(pixels).resize((256, 256), Image.BICUBIC)
    with Image.open("run/final.png") as final:
        assert np.array_equal(np.array(final), np.array(expected))


def test_progress_goes_from_the_start_to_the_end(cli):
    cli("--lr", 0.5)
    saved = checkpoint("run")
    frames = [saved[f"frame.{step}"] for step in range(4)]
    assert all(frame.shape == (1, 3, 16, 16) for frame in frames)
    assert not torch.equal(frames[0], frames[3])
    with Image.open("run/progress.png") as film:
        assert film.size == (4 * 128, 128)
        first = film.resize((4 * 16, 16), Image.BOX).crop((0, 0, 16, 16))
    first = torch.from_numpy(np.array(first)).permute(2, 0, 1).float()
    errors = [(first - frame[0].float()).abs().mean() for frame in frames]
    assert errors[0] == min(errors) < 8


def test_film_of_a_long_run_has_ten_frames(cli, monkeypatch):
    def quick(prior, generator, cond, method, state, micro_batch, ranks, callback):
        while state.step < method.steps:
            state.step += 1
            callback(state, {"loss_G": 0.0, "loss_D": 0.0, "seconds": 0.0})
    monkeypatch.setattr(asd, "distill", quick)
    cli("--steps", 95, "--particles", 5)
    with Image.open("run/progress.png") as film:            # of the first four particles
        assert film.size == (10 * 128, 4 * 128)
    measured = {row["step"] for row in metrics("run") if "saturation" in row}
    assert measured == set(range(10, 91, 10)) | {round(i * 95 / 9) for i in range(1, 10)}


def test_prompts_and_particles_make_a_grid(cli, model, monkeypatch):
    told = []
    distill = asd.distill
    monkeypatch.setattr(asd, "distill", lambda prior, generator, cond, *args, **kwargs:
                        told.append(cond) or distill(prior, generator, cond, *args, **kwargs))
    status, _, _ = cli("--prompt", "a red apple", "--prompt", "a blue fox", "--particles", 3)
    assert status == 0
    assert checkpoint("run")["theta.0"].shape == (6, 4, 8, 8)
    with Image.open("run/final.png") as final:
        assert final.size == (3 * 256, 2 * 256)
    encode = asd.Prior.from_pretrained(model, "cpu", None).encode_text
    assert torch.equal(told[0], encode(["a red apple"] * 3 + ["a blue fox"] * 3))


def test_grid_is_filled_row_by_row(tmp_path):
    images = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    runs.write_grid(tmp_path / "grid.png", images, 2)
    with Image.open(tmp_path / "grid.png") as grid:
        grid = torch.from_numpy(np.array(grid)).permute(2, 0, 1)
    white = torch.full((3, 256, 256), 255, dtype=torch.uint8)
    above, below = torch.cat([*images[:2]], 2), torch.cat([images[2], white], 2)
    assert torch.equal(grid, torch.cat([above, below], 1))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_picture_measures_by_hand():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * torch.ones(1, 3, 1, 1)
    assert runs.picture_measures(red) == pytest.approx({"saturation": 1, "sharpness": 0}, abs=1e-6)
    assert runs.picture_measures(board) == pytest.approx({"saturation": 0, "sharpness": 4})


def test_unknown_words_are_named_once(cli):
    _, _, err = cli("--prompt", "a red zebra", "--prompt", "Zebra fox", "--steps", 2)
    assert err.count("zebra") == 1 and "has never seen: zebra\n" in err
    assert "never seen" not in cli("--out", "known", "--steps", 1)[2]


def test_real_pictures_are_what_phi_learns_from(cli, model, tmp_path):
    """--real: one, or a folder; Eq. 9's loss; a resumed run has them in its checkpoint."""
    Path("real").mkdir()
    for i in range(3):
        rgb = torch.rand(16, 16, 3, generator=rng(i)).mul(255).byte().numpy()
        Image.fromarray(rgb).save(f"real/{i}.png")
    flags = ["--real", "real", "--t-late", 1]
    assert cli(*flags, "--out", "whole")[0] == cli(*flags, "--steps", 2, "--out", "part")[0] == 0
    images = torch.cat([files.read_image(f"real/{i}.png", (16, 16)) for i in range(3)])
    with torch.no_grad():
        expected = asd.Prior.from_pretrained(model, "cpu").encode_image(images)
    torch.testing.assert_close(checkpoint("whole")["real"], expected)
    shutil.rmtree("real")
    assert cli("--resume", "part", "--steps", 3)[0] == 0
    assert torch.equal(checkpoint("part")["theta.0"], checkpoint("whole")["theta.0"])
    cli("--t-late", 1, "--out", "text")
    losses = [[row["loss_D"] for row in metrics(folder)] for folder in ("whole", "text")]
    assert losses[0] != losses[1]
    one_line(cli("--real", "real"), "real", "folder")
    two = ["--prompt", "a red apple", "--prompt", "a blue fox", "--out", "two"]
    one_line(cli("--real", "a.png", *two), "one --prompt")


@pytest.mark.parametrize("name", ["sds", "vsd"])
def test_real_pictures_need_a_phi_that_learns(cli, name):
    Image.new("RGB", (16, 16), "red").save("real.png")
    result = cli("--real", "real.png", "--method", name, "--eta", 0.3)
    if name == "sds":
        one_line(result, "--real", "a φ that learns")
    else:
        assert result[0] == 0 and checkpoint(result[1].split("/final")[0])["real"].shape[0] == 1


def test_runs_of_one_name_stay_apart(cli, model):
    for _ in range(3):
        asd.main(["--model", model, "--prompt", "A red Apple!", "--steps", "1", "--seed", "7",
                  "--device", "cpu"])
    names = sorted(path.name for path in Path("outputs").iterdir())
    assert names == ["asd-a-red-apple-7", "asd-a-red-apple-7-2", "asd-a-red-apple-7-3"]


def test_runs_that_start_together_have_a_folder_each(model, tmp_path, monkeypatch):
    """Two processes of one name: two folders; with the same --out the second one is refused."""
    monkeypatch.chdir(tmp_path)
    argv = ["--prompt", "a red apple", "--steps", "2", "--model", model]
    for extra, statuses in ([], [0, 0]), (["--out", "one"], [0, 2]):
        processes = [SERVER.Process(target=command, args=("asd", [*argv, *extra], f"log{i}", None))
                     for i in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert sorted(process.exitcode for process in processes) == statuses
    made = sorted(path.parent.name for path in tmp_path.glob("**/final.png"))
    assert made == ["asd-a-red-apple-0", "asd-a-red-apple-0-2", "one"]


@pytest.mark.parametrize("name", ["final.png", "progress.png", "metrics.jsonl", "notes.txt"])
def test_a_run_never_writes_over_what_it_did_not_make(cli, name):
    """A folder that is not empty is refused, also where the picture to start from lies in it."""
    Path("mine").mkdir()
    Image.new("RGB", (16, 16), "red").save("mine/final.png")
    Path("mine", name).touch()
    before = contents("mine")
    one_line(cli("--init", "mine/final.png", "--out", "mine"), "mine", "not empty")
    assert contents("mine") == before


@pytest.mark.parametrize("flags", [["--init", "nowhere.png"], ["--model", "nowhere/model"]])
def test_a_refused_run_leaves_nothing(cli, tmp_path, flags):
    before = sorted(tmp_path.iterdir())
    assert cli(*flags)[0] == cli(*flags, "--out", "new/run")[0] == 2
    assert sorted(tmp_path.iterdir()) == before


def test_settings_reach_the_loop(cli, monkeypatch):
    """Each flag of a method's row, φ's and the generator's."""
    seen, make = {}, LoRAPhi.__init__

    @functools.wraps(make)
    def remembered(self, prior, prompts, **options):
        seen.update(prompts=prompts, options=options)
        make(self, prior, prompts, **options)
    monkeypatch.setattr(LoRAPhi, "__init__", remembered)
    monkeypatch.setattr(asd, "distill", lambda *args, **kwargs: seen.update(args=args, **kwargs))
    flags = {"method": "vsd", "lam": 3.5, "gamma": -0.5, "omega": "sigma2", "t_min": 0.1,
             "t_max": 0.9, "t_max_late": 0.4, "t_late": 0.7, "lr": 0.2, "lr_end": 0.1,
             "optimizer": "sgd", "phi_lr": 0.3, "lam_phi": 2.0, "phi_steps": 2, "steps": 11,
             "eta": 0.3}
    given = [part for key, value in flags.items() for part in ("--" + key.replace("_", "-"), value)]
    status, _, _ = cli(*given, "--phi-first", "--share-noise", "--fixed-noise", "--rank", 3,
                       "--tokens", 2,
                       "--micro-batch", 1, "--checkpointing", "--seed", 8, "--pixels")
    assert status == 0 and seen["micro_batch"] == 1 and isinstance(seen["args"][1], asd.Pixels)
    del flags["method"]
    method, row = seen["args"][3], asd.Method()
    assert method == asd.Method(**flags, phi=LoRAPhi, phi_first=True, share_noise=True,
                                fixed_noise=True)
    assert [name for name in vars(row) if vars(row)[name] == vars(method)[name]] == ["phi"]
    assert seen["prompts"] == ["a red apple"]
    assert seen["options"] == {"rank": 3, "checkpointing": True, "seed": 8}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_prior_makes_a_float32_picture(cli, dtype):
    status, _, _ = cli("--dtype", dtype, "--steps", 2)
    saved = checkpoint("run")
    assert status == 0 and saved["theta.0"].dtype == saved["phi.0"].dtype == torch.float32
    assert json.loads(Path("run/config.json").read_text())["dtype"] == f"torch.{dtype}"


# ------------------------------------------------------------------------------ first pictures
def test_first_picture_is_cropped_on_white(tmp_path):
    """Left half transparent, right half blue, twice as wide as high: its middle is kept."""
    pixels = np.zeros((20, 40, 4), dtype=np.uint8)
    pixels[:, 20:] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = files.read_image(tmp_path / "a.png", (20, 20))
    assert image.shape == (1, 3, 20, 20) and image.dtype == torch.float32
    assert (image[..., :8] == 1).all()
    assert (image[:, :2, :, 12:] == 0).all() and (image[:, 2, :, 12:] == 1).all()


def test_pictures_are_made_smaller_by_averaging(tmp_path):
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert (files.read_image(tmp_path / "a.png", (8, 8)) - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("mode, size, value", [
    ("RGBA", (16, 16), (255, 0, 0, 255)), ("L", (40, 30), 76), ("P", (16, 16), 0), ("1", (9, 9), 1),
    ("RGB", (5000, 3000), (10, 20, 30)), ("RGB", (1, 1), (10, 20, 30)), ("LA", (7, 7), (76, 255)),
    ("I;16", (16, 16), 76 * 257)])
def test_pictures_of_every_kind_are_read(tmp_path, mode, size, value):
    Image.new(mode, size, value).save(tmp_path / "a.png")
    image = files.read_image(tmp_path / "a.png", (12, 16))
    colour = {"RGBA": (255, 0, 0), "L": (76,) * 3, "P": (0,) * 3, "1": (255,) * 3, "LA": (76,) * 3,
              "RGB": (10, 20, 30), "I;16": (76,) * 3}[mode]
    expected = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 12, 16) / 255
    torch.testing.assert_close(image, expected, atol=0.006, rtol=0)


def test_pictures_are_turned_as_the_camera_says(tmp_path):
    picture = Image.new("RGB", (16, 16), "red")
    picture.paste("blue", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[274] = 3                                           # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    image = files.read_image(tmp_path / "a.png", (16, 16))
    assert image[0, 0, 0, 0] == 1 and image[0, 2, 15, 0] == 1


def test_a_run_starts_from_the_picture(cli):
    """With no learning rate the picture stays as it was."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    status, _, _ = cli("--init", "a.png", "--pixels", "--lr", 0, "--particles", 2)
    assert status == 0
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    theta = checkpoint("run")["theta.0"]
    assert theta.shape == (2, 3, 16, 16) and (theta == expected).all()
    status, _, _ = cli("--init", "a.png", "--lr", 0, "--out", "latents")
    assert status == 0 and checkpoint("latents")["theta.0"].shape == (1, 4, 8, 8)
    assert torch.equal(checkpoint("latents")["frame.0"], checkpoint("latents")["frame.3"])


# ------------------------------------------------------------------------------------- going on
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft", "PIL.Image"])
PICTURE, EDIT, MUG = ("--prompt", "a red apple"), (
    "--image", "a.png", "--source", "a red apple", "--target", "a blue fox"), (
    "--prompt", "a red mug", "--samples", "4", "--resolution", "4", "8")
TO_BE_KILLED = [
    ("asd", *PICTURE), ("editing", *EDIT), ("text_to_3d", *MUG),
    ("asd", *PICTURE, "--method", "vsd", "--phi", "embedding", "--share-noise"),
    ("editing", *EDIT, "--method", "dds", "--pixels"),
    ("text_to_3d", *MUG, "--method", "vsd", "--background", "random"),
    ("asd", *PICTURE, "--pixels", "--particles", "2"),
    ("editing", *EDIT[2:], "--network", "--pictures", "3", "--batch", "2"),
    ("text_to_3d", *MUG, "--method", "sds")]


def cheaper(patch):
    """What a run in 3D is measured by, and leaves behind, left out."""
    text_to_3d = importlib.import_module("text_to_3d")
    patch(text_to_3d, "view_scores", lambda *_: {})
    patch(text_to_3d, "write_all", lambda folder, *_: folder / "progress.png")


def command(name, argv, log, moment, threads=None):
    """A command line in a process of its own, its stderr in a file. moment = (n, part): killed
    where it is writing its n-th checkpoint, when this part of it is on the disk; or None."""
    torch.set_num_threads(threads or torch.get_num_threads())
    sys.stdout = sys.stderr = open(log, "w")
    replace, checkpoints = os.replace, itertools.count(1)

    def dying(source, target):
        if Path(target).name == "checkpoint.safetensors" and next(checkpoints) == moment[0]:
            os.truncate(source, int(moment[1] * os.path.getsize(source)))
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    if moment:
        os.replace = dying
    cheaper(setattr)
    sys.exit(importlib.import_module(name).main(argv))


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_goes_on_bit_for_bit(model, tmp_path, monkeypatch, seed):
    """Every other one while a checkpoint is written, the others at any moment."""
    monkeypatch.chdir(tmp_path)
    cheaper(monkeypatch.setattr)
    Image.effect_noise((16, 16), 99).convert("RGB").save("a.png")
    chance, (name, *flags) = random.Random(seed), TO_BE_KILLED[seed % len(TO_BE_KILLED)]
    flags += ["--model", model, "--steps", "16", "--save-every", "2", "--device", "cpu",
              "--seed", str(seed)]
    moment = (chance.randint(1, 8), chance.choice([0, chance.random(), 1])) if seed % 2 else None
    process = SERVER.Process(target=command, args=(
        name, [*flags, "--out", str(tmp_path / "killed")], str(tmp_path / "log"), moment))
    process.start()
    if moment is None:
        wanted, lines, log = chance.randint(0, 11), 0, Path("killed/metrics.jsonl")
        while lines < wanted or not Path("killed/config.json").exists():
            lines = log.read_bytes().count(b"\n") if log.exists() else 0
            assert process.exitcode is None, (tmp_path / "log").read_text()[-900:]
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not Path("killed/progress.png").exists(), \
        (tmp_path / "log").read_text()[-900:]
    assert Path("killed/checkpoint.safetensors.tmp").exists() or moment is None
    main = importlib.import_module(name).main
    assert main(["--resume", "killed"]) == main([*flags, "--out", "whole"]) == 0
    same_run("whole", "killed")


@pytest.mark.parametrize("init", [False, True])
def test_a_run_without_a_checkpoint_yet_goes_on(cli, init):
    """Stopped after config.json was written, before the first checkpoint."""
    Image.new("RGB", (16, 16), "teal").save("a.png")
    flags = ["--init", "a.png"] if init else []
    cli(*flags)
    cli(*flags, "--out", "stopped")
    for path in ("checkpoint.safetensors", "final.png", "progress.png"):
        (Path("stopped") / path).unlink()
    assert cli("--resume", "stopped")[0] == 0
    same_run("run", "stopped")


def test_a_finished_run_goes_on_as_it_is(cli):
    def now():
        return contents("run") | {"config.json": json.loads(Path("run/config.json").read_text())}
    cli()
    before = now()
    assert cli("--resume", "run")[0] == 0
    assert now() == before


def test_more_steps_are_the_longer_run(cli):
    """As long as what depends on the number of steps, --t-late, does not differ."""
    cli("--steps", 2, "--t-late", 1)
    assert cli("--resume", "run", "--steps", 5)[0] == 0
    assert cli("--steps", 5, "--t-late", 1, "--out", "long")[0] == 0
    short, long = checkpoint("run"), checkpoint("long")
    assert all(torch.equal(short[key], long[key]) for key in long if "frame" not in key)
    assert [row["step"] for row in metrics("run")] == [1, 2, 3, 4, 5]
    assert json.loads(Path("run/config.json").read_text())["settings"]["steps"] == 5


def test_metrics_follow_the_checkpoint(cli):
    """Lines after the checkpoint, and half a line, are written again."""
    cli("--steps", 2)
    with Path("run/metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "loss_G": 1e9}\n{"ste')
    cli("--resume", "run", "--steps", 4)
    assert [row["step"] for row in metrics("run")] == [1, 2, 3, 4]
    assert all(row["loss_G"] < 1e9 for row in metrics("run"))


def test_a_resumed_run_keeps_its_settings(cli):
    cli("--lam", 3)
    before = contents("run")
    one_line(cli("--resume", "run", "--lam", 4, "--seed", 1), "--lam", "--seed")
    one_line(cli("--resume", "run", "--prompt", "a blue fox"), "--prompt")
    one_line(cli("--resume", "run", "--pixels"), "--pixels")
    one_line(cli("--resume", "run", "--out", "other"), "--out")
    one_line(cli("--resume", "run", "--steps", 1), "steps already", "--steps 1")
    assert contents("run") == before
    assert cli("--resume", "run", "--lam", 3, "--save-every", 7, "--device", "cpu")[0] == 0


def test_interrupted_run_says_how_to_go_on(cli, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(asd, "distill", interrupt)
    status, _, err = cli()
    assert status == 130 and "--resume run" in err and "Traceback" not in err
    monkeypatch.setattr(runs, "set_up", interrupt)
    status, _, err = cli("--out", "early")
    assert status == 130 and err == "\nasd.py: stopped\n"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_is_not_there_is_one_line(cli, monkeypatch, error):
    def refuse(*args):
        raise error
    monkeypatch.setattr(asd, "Latents", refuse)
    one_line(cli(), "out of memory", "--micro-batch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [
    [], ["--pixels"], ["--phi", "embedding", "--share-noise"],
    ["--particles", 3, "--micro-batch", 1, "--checkpointing"]])
def test_a_cuda_run_goes_on(cli, flags):
    assert cli("--device", "cuda", "--steps", 2, *flags)[0] == 0
    assert cli("--resume", "run", "--steps", 3)[0] == 0


@pytest.mark.parametrize("error, line", [
    (ModuleNotFoundError("No module named 'peft'"), "asd.py: No module named 'peft': pip install"),
    (ValueError("two\n  lines"), "asd.py: two lines")])
def test_an_error_of_a_library_is_one_line(cli, monkeypatch, error, line):
    @functools.wraps(LoRAPhi.__init__)
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(LoRAPhi, "__init__", fail)
    one_line(cli(), line)


@pytest.mark.parametrize("phi", ["lora", "embedding"])
def test_compiled_blocks_say_the_same(cli, monkeypatch, phi):
    """Every transformer block of the prior, and of a LoRA's view, once; up to rounding. Eager code
    stands for the compiled."""
    blocks, compile_ = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: blocks.append(block) or
                        compile_(block, backend="eager", **how))
    monkeypatch.setattr(asd.Prior, "from_pretrained", load_once.__wrapped__)   # it changes this one
    flags = ["--phi", phi, "--pixels", "--steps", 2]
    assert cli(*flags, "--compile", "--out", "compiled")[0] == cli(*flags, "--out", "plain")[0] == 0
    there = [block for block in load_once(cli.model).network.modules()
             if type(block).__name__ == "BasicTransformerBlock"]
    assert len(set(map(id, blocks))) == len(blocks) == (1 + (phi == "lora")) * len(there) > 0
    one, two = checkpoint("compiled"), checkpoint("plain")
    for name in ("theta.0", "phi.0"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- several processes
def as_rank(number, size, port, name, argv, log, moment):
    """command() as one of several processes, as torchrun starts them."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command(name, argv, log, moment, 1)


def started(size, name, argv, moment=None):
    """The processes, just started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [SERVER.Process(target=as_rank, args=(
        i, size, port, name, argv, f"log{i}", None if i else moment)) for i in range(size)]
    for process in ranks:
        process.start()
    return ranks


def ranked(size, name, *argv, moment=None):
    """A command as `size` processes (0: as one that nobody launched) -> (exit codes, outputs).

    moment: number 0 is killed there, see command()."""
    argv = [str(word) for word in argv]
    if size:
        ranks = started(size, name, argv, moment)
    else:
        ranks = [SERVER.Process(target=command, args=(name, argv, "log0", moment, 1))]
        ranks[0].start()
    for process in ranks:
        process.join(100)
    return ([process.exitcode for process in ranks],
            [Path(f"log{i}").read_text() for i in range(len(ranks))])


SHARED = [("asd", *PICTURE, "--particles", "5", "--save-every", "1"),
          ("asd", *PICTURE, "--prompt", "a fox", "--particles", "2", "--pixels", "--share-noise",
           "--phi", "embedding", "--phi-steps", "2", "--optimizer", "sgd"),
          ("asd", *PICTURE, "--particles", "4", "--real", "a.png", "--fixed-noise", "--phi-first"),
          ("variants", *PICTURE, "--particles", "4", "--method", "nfsd", "--negative", "a fox"),
          ("text_to_3d", *MUG, "--views", "4", "--background", "random", "--sparsity", "1"),
          ("text_to_3d", *MUG, "--views", "4", "--background", "learnt", "--method", "vsd")]


@pytest.mark.parametrize("i, flags", enumerate(SHARED))
def test_the_number_of_processes_changes_no_bit(model, tmp_path, monkeypatch, i, flags):
    """Of θ, φ, their optimisers, the pictures; where it changes in the middle of the run, too."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((16, 16), 99).convert("RGB").save("a.png")
    name, *flags = flags
    flags += ["--model", model, "--device", "cpu", "--settings", "tiny"]
    sizes = (0, 1, 2, 4) if i in (0, 4) else (0, 2)               # in 2D, in 3D
    for size in sizes:
        codes, outputs = ranked(size, name, *flags, "--steps", 3, "--micro-batch", 1, "--out", size)
        assert codes == [0] * max(size, 1), outputs
        assert not any(outputs[1:])                                  # number 0 alone speaks
    for size in sizes[1:]:
        same_run("0", str(size))
    if len(sizes) == 2:
        return
    half, _ = ranked(4, name, *flags, "--steps", 3, "--micro-batch", 1, "--out", "half",
                     "--save-every", 2, moment=(2, 0))
    assert half[0] == -signal.SIGKILL
    assert ranked(2, name, "--resume", "half")[0] == [0, 0]
    same_run("0", "half")


def test_a_unit_may_be_several_pictures(model, tmp_path, monkeypatch):
    """Three units, the last of them smaller, of two processes."""
    monkeypatch.chdir(tmp_path)
    flags = [*PICTURE, "--particles", 5, "--micro-batch", 2, "--model", model, "--steps", 2]
    assert ranked(0, "asd", *flags, "--out", "one")[0] == [0]
    assert ranked(2, "asd", *flags, "--out", "two")[0] == [0, 0]
    same_run("one", "two")


def test_where_a_process_ends_the_run_ends_in_a_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*PICTURE, "--particles", "2", "--model", model, "--steps", "400", "--save-every", "2",
             "--out", "run"]
    ranks = started(2, "asd", flags)
    while not Path("run/checkpoint.safetensors").exists():
        assert ranks[0].exitcode is None, Path("log0").read_text()
        time.sleep(0.01)
    ranks[1].kill()
    ranks[0].join(60)
    said = Path("log0").read_text()
    assert ranks[0].exitcode == 2 and "Traceback" not in said and said.splitlines()[-1] == \
        "asd.py: another process has ended; go on with --resume run"
    assert asd.main(["--resume", "run", "--steps", "1"]) == 2 and \
        "steps already" in capsys.readouterr().err                          # it can be read


def test_what_cannot_be_shared_is_said_once(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((16, 16), 99).convert("RGB").save("a.png")
    exact = ("variants", *PICTURE, "--method", "vsd", "--phi", "exact", "--particles", "2")
    for (name, *flags), wanted in [(("editing", *EDIT), "one process alone"), (exact, "1 parts"),
                                   (("asd", *PICTURE), "too many for 1 parts"),
                                   (("asd", *PICTURE, "--lam", "much"), "--help"),
                                   (("asd", *PICTURE, "--steps", "0"), "[1")]:
        codes, (first, second) = ranked(2, name, *flags, "--model", model, "--out", "run")
        assert codes in ([2, 2], [2, 1]) and wanted in first and not second
        assert len(first.strip().splitlines()) == 1 and not Path("run").exists()


# --------------------------------------------------------------------------- many prompts
def test_prompts_of_a_file(cli, capsys):
    """A run for each line, of a name of its own; the same command again makes what is missing."""
    prompts = ["a fox", "a-fox", "  a fox", "", "a picture of " + 3 * "very " + "red apples"]
    Path("prompts").write_text("\n".join(prompts))
    flags = ["--prompts-file", "prompts", "--out", "all", "--steps", "2"]
    call = lambda *more: asd.main([*flags, "--model", cli.model, "--device", "cpu", *more])
    assert call() == 0 and len(capsys.readouterr().out.splitlines()) == 3
    runs_of = sorted(Path("all").iterdir())
    assert Path("all/asd-a-fox-0") in runs_of and len(runs_of) == 3
    asked = [json.loads((folder / "config.json").read_text())["settings"]["prompt"]
             for folder in runs_of]
    assert sorted(asked) == sorted([prompts[i]] for i in (0, 1, 4))
    before = contents("all")
    shutil.copytree("all", "before")
    assert call() == 0 and contents("all") == before and not capsys.readouterr().out
    for folder in runs_of[:2]:                              # one that was stopped, one with nothing
        config = json.loads((folder / "config.json").read_text())
        del config["picture"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "final.png").unlink()
    shutil.rmtree(runs_of[2])
    assert call() == 0 and len(capsys.readouterr().out.splitlines()) == 3
    for folder in runs_of:
        same_run(folder, "before" / folder.relative_to("all"))
    assert call("--lam", "3") == 2                          # another run: finished or not
    assert capsys.readouterr().err.count("keeps its settings: drop --lam") == 3
    assert call("--steps", "3") == 0 and len(metrics(runs_of[0])) == 3            # more of it


def test_a_prompt_that_another_process_has_is_left_to_it(cli, capsys):
    Path("prompts").write_text("a fox\na red apple")
    Path("all/asd-a-fox-0").mkdir(parents=True)
    held = os.open("all/asd-a-fox-0", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    flags = ["--prompts-file", "prompts", "--out", "all", "--steps", "1", "--model", cli.model]
    assert asd.main(flags) == 0
    assert not any(Path("all/asd-a-fox-0").iterdir()) and Path(
        "all/asd-a-red-apple-0/final.png").exists()
    os.close(held)
    assert asd.main(flags) == 0 and Path("all/asd-a-fox-0/final.png").exists()


def test_mistakes_about_a_file_of_prompts(cli, capsys):
    """One that is of one prompt alone does not keep the others from being made."""
    Path("prompts").write_text("a fox\na red apple")
    flags = ["--prompts-file", "prompts", "--steps", "1", "--model", cli.model, "--out", "all"]
    for more, wanted in [(["--prompt", "a"], "drop --prompt"), (["--resume", "a"], "--resume"),
                         (["--method", "none"], "unknown method")]:
        assert asd.main([*flags, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert wanted in line and not Path("all").exists()
    Path("empty").write_text(" \n")
    assert asd.main(["--prompts-file", "empty", "--model", cli.model]) == 2
    assert "empty holds no prompt" in capsys.readouterr().err
    Path("all/asd-a-fox-0").mkdir(parents=True)
    Path("all/asd-a-fox-0/mine").touch()
    assert asd.main(flags) == 2
    assert "asd-a-fox-0 already holds a run" in capsys.readouterr().err
    assert Path("all/asd-a-red-apple-0/final.png").exists()


# ------------------------------------------------------------------------------ users' mistakes
@pytest.mark.parametrize("flags, parts", [
    (["--method", "hyper"], ["'hyper'", "sds, vsd, asd"]),
    (["--method", "csd"], ["'csd'", "sds, vsd, asd"]),
    (["--phi", "hyper"], ["--phi", "lora"]),
    (["--phi", "noise"], ["--phi noise", "--method sds"]),
    (["--method", "sds", "--phi", "lora"], ["--method sds", "--phi lora"]),
    (["--lam", "nan"], ["--lam", "nan"]),
    (["--lam", "inf"], ["--lam", "inf"]),
    (["--lam", "many"], ["--lam", "many"]),
    (["--gamma", "-inf"], ["--gamma"]),
    (["--steps", "0"], ["--steps", "0"]),
    (["--steps", "-3"], ["--steps", "-3"]),
    (["--steps", "2.5"], ["--steps", "2.5"]),
    (["--steps", "1" + 400 * "0"], ["--steps"]),
    (["--phi", "embedding", "--lam-phi", "2"], ["--lam-phi", "lora"]),
    (["--t-min", "0.6"], ["--t-min 0.6", "--t-max-late"]),
    (["--lr", "-1"], ["--lr", "-1"]),
    (["--particles", "0"], ["--particles"]),
    (["--rank", "0"], ["--rank"]),
    (["--seed", "-1"], ["--seed"]),
    (["--seed", str(2 ** 63)], ["--seed"]),
    (["--omega", "2"], ["--omega", "sigma2"]),
    (["--prompt", ""], ["--prompt", "empty"]),
    (["--prompt", "a fox", "--prompt", "  \n"], ["--prompt", "empty"]),
    (["--t-min", "0.7", "--t-max", "0.3"], ["--t-min 0.7", "--t-max 0.3"]),
    (["--t-max", "1.5"], ["--t-max", "1.5"]),
    (["--gama", "1"], ["--gama"]),
    (["apple"], ["apple"]),
    (["--prompt"], ["--prompt"]),
    (["--init", "nowhere.png"], ["nowhere.png"]),
    (["--dtype", "int8"], ["--dtype", "bfloat16"]),
    (["--device", "abacus"], ["abacus"]),
    (["--phi", "embedding", "--tokens", "99"], ["tokens", "99"]),
    (["--phi", "embedding", "--tokens", "0"], ["--tokens"]),
    (["--resume", "nowhere"], ["nowhere", "no run to resume"]),
    (["--resume", ""], ["no run to resume"]),
])
def test_mistake_is_one_line(cli, flags, parts):
    one_line(cli(*flags), *parts)
    assert not Path("run").exists()


@pytest.mark.parametrize("gamma", ["-1", "-.5", "-1e-2", "-2.5E+0"])
def test_negative_numbers_are_read_in_any_notation(cli, monkeypatch, gamma):
    seen = []
    monkeypatch.setattr(runs, "run", lambda command, settings, *_: seen.append(settings))
    assert cli("--gamma", gamma)[0] == 0 and seen[0]["gamma"] == float(gamma)


def test_no_prompt_is_one_line(cli, capsys):
    assert asd.main([]) == 2
    assert capsys.readouterr().err == \
        'asd.py: give a --prompt that is not empty, such as --prompt "a red apple"\n'


@pytest.mark.parametrize("flags", [["--device", "auto", "--dtype", "auto"],
                                   ["--t-min", "0.6", "--t-late", "1"]])
def test_this_is_no_mistake(cli, flags):
    assert cli(*flags)[0] == 0


def broken_chunk():
    """A PNG whose second chunk says that it has no content."""
    data = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(data, "PNG")
    return data.getvalue()[:35] + b"\0" + data.getvalue()[36:]


def png_of(width, height):
    """A PNG that announces this size and breaks off."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(
        ">I", zlib.crc32(header))


@pytest.mark.parametrize("content", [
    b"", b"not a picture", png_of(16, 16), png_of(60000, 60000), broken_chunk(), None])
def test_picture_that_cannot_be_read_is_one_line(cli, content):
    Path("a.png").write_bytes(content) if content is not None else Path("a.png").mkdir()
    one_line(cli("--init", "a.png"), "a.png", "picture")


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_folder_that_cannot_be_made_is_one_line(cli, out):
    Path("file").write_text("mine")
    one_line(cli("--out", out), "file")
    assert Path("file").read_text() == "mine"


def test_an_earlier_run_is_never_overwritten(cli):
    cli("--steps", 1)
    before = contents("run")
    one_line(cli("--seed", 1), "run already holds a run", "--resume")
    assert contents("run") == before


def test_a_stray_checkpoint_is_not_taken_for_this_run(cli):
    """A folder without config.json holds no run: what lies there must not be continued."""
    cli("--seed", 1)
    Path("stray").mkdir()
    os.link("run/checkpoint.safetensors", "stray/checkpoint.safetensors")
    one_line(cli("--seed", 2, "--out", "stray"), "stray", "not empty")
    one_line(cli("--resume", "stray"), "stray", "no run")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "{}", '{"settings": 3}', '{"settings": {}}',
    '{"settings": {"method": "asd"}}', "\0", b"\xff\xfe"])
def test_corrupt_config_is_one_line(cli, text):
    cli("--steps", 1)
    Path("run/config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents("run")
    one_line(cli("--resume", "run", "--steps", 2), "run")
    assert contents("run") == before


def rewritten(path, tensors=None, **metadata):
    """A checkpoint with other tensors (None: without) and metadata, and a digest that fits."""
    with safe_open(path, "pt") as file:
        about = file.metadata() | metadata
    named = {name: x for name, x in (load_file(path) | (tensors or {})).items() if x is not None}
    save_file(named, path, {"digest": files.digest(named, about["step"], about["weights"])}
              | {key: value for key, value in about.items() if key != "digest"} | metadata)


def written(path):
    """The digest that is in a checkpoint."""
    with safe_open(path, "pt") as file:
        return file.metadata()["digest"]


DAMAGES = {
    "cut": lambda path, whole: path.write_bytes(whole[:len(whole) // 2]),
    "empty": lambda path, whole: path.write_bytes(b""),
    "noise": lambda path, whole: path.write_bytes(random.Random(0).randbytes(5000)),
    "FIFO": lambda path, whole: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path, whole: (path.unlink(), path.mkdir()),
    "foreign": lambda path, whole: rewritten(path, format="pt"),
    "changed": lambda path, whole: rewritten(path, digest="0" * 64),
    "renamed": lambda path, whole: rewritten(
        path, {"frame.3": None, "frame.9": load_file(path)["frame.3"]}, digest=written(path)),
    "step": lambda path, whole: rewritten(path, step="many"),
    "no theta": lambda path, whole: rewritten(path, {"theta.0": None}),
    "no momentum": lambda path, whole: rewritten(path, {"theta.0.exp_avg": None}),
    "shape": lambda path, whole: rewritten(path, {"theta.0": torch.zeros(1, 4, 4, 4)}),
    "type": lambda path, whole: rewritten(path, {"theta.0": torch.zeros(1, 4, 8, 8).half()}),
    "momentum": lambda path, whole: rewritten(path, {"theta.0.exp_avg": torch.zeros(1, 1, 1, 1)}),
    "count": lambda path, whole: rewritten(path, {"phi.0.step": torch.zeros(3)}),
    "infinite": lambda path, whole: rewritten(
        path, {"theta.0.exp_avg_sq": torch.full((1, 4, 8, 8), math.inf)}),
    "randomness": lambda path, whole: rewritten(path, {"rng": torch.zeros(3, dtype=torch.uint8)}),
    "no randomness": lambda path, whole: rewritten(path, {"rng": torch.zeros(5056)})}


@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupt_checkpoint_is_one_line(cli, damage):
    cli()
    path = Path("run/checkpoint.safetensors")
    DAMAGES[damage](path, path.read_bytes())
    before = contents("run")
    one_line(cli("--resume", "run", "--steps", 5), "checkpoint.safetensors", "neither a file"
             if damage == "FIFO" else "cannot be resumed")
    assert contents("run") == before


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_noticed(cli, seed):
    """Wherever in the checkpoint it is, the run is refused."""
    cli("--fixed-noise")
    path, chance = Path("run/checkpoint.safetensors"), random.Random(seed)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    where = chance.randrange(header) if seed % 3 == 0 else chance.randrange(header, len(data))
    data[where] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    before = contents("run")
    one_line(cli("--resume", "run", "--steps", 5), "checkpoint.safetensors cannot be resumed")
    assert contents("run") == before


def test_lost_model_is_one_line(cli, no_network):          # noqa: F811
    one_line(cli("--model", "no/such-model"), "'no/such-model'", "mirror", "local diffusers folder")
    one_line(cli("--model", "/no/such/folder"), "'/no/such/folder'")


def test_broken_model_is_one_line(cli, model, tmp_path):
    folder = link_tree(model, tmp_path / "model")
    (folder / "unet" / "config.json").write_text("{")
    one_line(cli("--model", folder), str(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_there_is_one_line(cli):
    one_line(cli("--device", "cuda"), "--device cuda")


def test_divergence_is_one_line_and_keeps_the_checkpoint(cli):
    result = cli("--method", "sds", "--lr", 1e30, "--steps", 9, "--save-every", 1)
    one_line(result, "not finite at step", "--lr")
    with safe_open("run/checkpoint.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == len(metrics("run")) >= 1
        assert file.get_tensor("theta.0").isfinite().all()


def full_disk(monkeypatch, real):
    """The second checkpoint finds the disk full: as we say it, or the system, in the middle."""
    write, limits, calls = Path.write_bytes, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def write_bytes_on_full_disk(path, data):
        calls.append(1)
        if len(calls) < 2:
            return write(path, data)
        if not real:
            write(path, b"half")
            raise OSError(28, "No space left on device")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            write(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(Path, "write_bytes", write_bytes_on_full_disk)


@pytest.mark.parametrize("real", [False, True])
def test_full_disk_is_one_line_and_keeps_the_checkpoint(cli, monkeypatch, real):
    cli("--steps", 2, "--t-late", 1, "--out", "whole", "--save-every", 2)
    with monkeypatch.context() as patch:
        full_disk(patch, real)
        one_line(cli("--steps", 6, "--t-late", 1, "--save-every", 2))
    kept, good = checkpoint("run"), checkpoint("whole")
    assert all(torch.equal(kept[key], good[key]) for key in good if "frame" not in key)
    assert not list(Path("run").glob("*.tmp*"))
    assert cli("--resume", "run")[0] == 0 and len(metrics("run")) == 6


@pytest.mark.parametrize("phi", ["lora", "embedding"])
def test_full_disk_at_the_end_is_one_line(cli, monkeypatch, phi):
    """Nothing but φ cannot be written; its libraries have an error of their own for that."""
    import safetensors.torch

    def save_file(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save_file)
        one_line(cli("--phi", phi), "No space left")
    cli("--phi", phi, "--out", "other")
    shutil.rmtree("other/phi")
    Path("other/phi").write_text("a file, no folder")
    one_line(cli("--resume", "other"), "phi")
    assert cli("--resume", "run")[0] == 0


# ---------------------------------------------------------------------------------- end to end
@pytest.mark.skipif(not (HERE / "tiny/sd/unet").is_dir(), reason="tiny/sd is not here")
@pytest.mark.parametrize("name", ["sds", "vsd", "asd"])
def test_twenty_steps_of_tiny_sd(cli, name):
    status, out, _ = cli("--model", "tiny-sd", "--method", name, "--steps", 20)
    assert status == 0 and Path(out.strip()).is_file() and len(metrics("run")) == 20
    assert all(math.isfinite(value) for row in metrics("run") for value in row.values())
    frames = checkpoint("run")
    assert (frames["frame.0"].float() - frames["frame.20"].float()).abs().mean() > 1
