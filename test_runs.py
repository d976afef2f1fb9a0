"""The commands: what a run leaves behind, going on after any interruption, locks, processes.

main() is called in this process wherever a process of its own is not the point; the runs that are
killed are forked, ASD_KILLS of them (default 2; of 30, every other one is killed while a checkpoint
is written). The model is test_distill.py's tiny one; the last tests use tiny/sd. What users and
disks do wrong is in test_mistakes.py.
"""
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import asd
import editing
import nerf
import text_to_3d
import variants
from cli import files, pictures, run, settings
from phi import LoRAPhi
from test_distill import folders, rng  # noqa: F401 (fixtures)

HERE = Path(asd.__file__).resolve().parent
KILLS = int(os.environ.get("ASD_KILLS", 2))
load_once = functools.cache(asd.Prior.from_pretrained)
needs_tiny_sd = pytest.mark.skipif(not (HERE / "tiny/sd/unet").is_dir(),
                                   reason="tiny/sd is not here")


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
    """Return what `cli` is, for the main() of a command that makes pictures."""
    def call(*flags):
        flags = [str(flag) for flag in flags]
        if "--resume" not in flags:
            for default in (["--model", model], ["--prompt", "a red apple"], ["--steps", "3"],
                            ["--out", "run"], ["--device", "cpu"], ["--settings", "tiny"]):
                if default[0] not in flags:
                    flags += default
        try:
            status = main(flags)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture(scope="session")
def made_once(folders, tmp_path_factory):                   # noqa: F811
    """The folder of a finished run with the settings of `cli`; it is to be copied, not changed."""
    folder = tmp_path_factory.mktemp("made") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asd.Prior, "from_pretrained", load_once)
        flags = ["--model", str(folders["epsilon"]), "--prompt", "a red apple", "--steps", "3",
                 "--out", str(folder), "--device", "cpu", "--settings", "tiny"]
        assert asd.main(flags) == 0
    return folder


@pytest.fixture
def finished(cli, made_once):
    """What `cli` is, where run/ is a finished run already."""
    shutil.copytree(made_once, "run")
    return cli


def contents(folder):
    """Return {path: bytes} of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


def metrics(folder):
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder):
    """Return the tensors of a checkpoint."""
    return load_file(Path(folder) / "checkpoint.safetensors")


def config_of(folder):
    """Return what config.json says."""
    return json.loads((Path(folder) / "config.json").read_text())


def same_run(a, b):
    """Assert the same bits in pictures, checkpoint and φ, the same numbers in the metrics."""
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
    """Assert that a mistake ended with status 2 and a single line, and nothing on stdout."""
    status, out, err = result
    lines = [line for line in re.split(r"[\r\n]+", err)
             if line and "%|" not in line and ", settings " not in line]     # its first, and bars
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"{name}: "), err[-900:]
    assert out == "" and "Traceback" not in err
    for part in parts:
        assert part in lines[0]


def frames_of_film(folder):
    """Return how many frames progress.png has."""
    with Image.open(Path(folder) / "progress.png") as film:
        return film.width // 128


# ----------------------------------------------------------------------------- what a run leaves
@pytest.mark.parametrize("name, phi, file", [
    ("sds", None, None), ("vsd", "embedding", "learned_embeds"),
    ("asd", "lora", "pytorch_lora_weights")])
def test_a_run_leaves_its_files(cli, model, name, phi, file):
    flags = ["--method", name, "--seed", 5]
    wanted = {"final.png", "progress.png", "metrics.jsonl", "config.json", "checkpoint.safetensors"}
    if phi:
        flags += ["--phi", phi]
        wanted.add(f"phi/{file}.safetensors")
    status, out, err = cli(*flags)
    assert status == 0 and out == "run/final.png\n" and "Warning" not in err
    assert contents("run").keys() == wanted
    rows = metrics("run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0 and (row["loss_D"] != 0) == (name != "sds")
    config = config_of("run")
    stored = config.pop("settings")
    assert stored["prompt"] == ["a red apple"] and stored["model"] == model
    assert (stored["method"], stored["seed"], stored["steps"]) == (name, 5, 3)
    assert stored["phi"] == (phi or "noise") and stored["gamma"] == asd.METHODS[name].gamma
    assert config["torch"] == torch.__version__ and config["python"] == sys.version.split()[0]
    assert config["dtype"] == "torch.float32" and config["device"] == "cpu"


def test_a_model_that_predicts_v_runs_too(cli, folders):                       # noqa: F811
    status, out, _ = cli("--model", folders["v_prediction"], "--particles", 2, "--steps", 2)
    assert status == 0 and Path(out.strip()).is_file() and len(metrics("run")) == 2
    saved = checkpoint("run")
    assert not torch.equal(saved["frame.0"], saved["frame.2"]) and saved["theta.0"].isfinite().all()


def test_a_shell_may_close_stdout(model, tmp_path):
    """`python asd.py … >&-`, from anywhere: no warnings, nothing of the libraries' chatter."""
    words = [sys.executable, HERE / "asd.py", "--model", model, "--prompt", "a red apple",
             "--steps", "1", "--device", "cpu", "--method", "sds"]
    line = shlex.join(map(str, words))
    done = subprocess.run(["sh", "-c", f"{line} >&-"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    first, *others = [text for text in re.split(r"[\r\n]+", done.stderr) if text]
    assert first.startswith("asd.py: sds, settings paper (§6: ProlificDreamer-2D's")
    assert others and all("%|" in text for text in others)
    assert Path(tmp_path, "outputs/sds-a-red-apple-0/final.png").is_file()


def closed(numbers, argv, log):
    """Run asd.py as a shell would that has closed streams, 1 or 2, with stdout in a file."""
    torch.set_num_threads(1)
    sys.stdout = open(log, "w")
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    status = asd.main(argv)
    if sys.stdout is not None:
        sys.stdout.flush()
    os._exit(status)


def test_streams_may_be_closed(fork, model, tmp_path, monkeypatch):
    """`2>&-` and `>&- 2>&-`: the run is made, status 0."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", model, "--prompt", "a red apple", "--steps", "1", "--device", "cpu",
             "--method", "sds"]
    for folder, numbers in (("one", [2]), ("both", [1, 2])):
        process = fork(closed, numbers, [*flags, "--out", folder], "log")
        process.join()
        assert process.exitcode == 0 and Path(folder, "final.png").is_file()
        assert Path("log").read_text() == ("one/final.png\n" if folder == "one" else "")


def test_final_picture_is_theta_decoded(finished, model):
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


def test_progress_grows_while_a_run_goes_on(cli, monkeypatch):
    """Ten frames in all, each in progress.png as soon as it is made."""
    seen = []

    def quick(prior, generator, cond, method, state, micro_batch, callback):
        while state.step < method.steps:
            state.step += 1
            callback(state, {"grad_norm": 0.0, "loss_D": 0.0, "seconds": 0.0})
            if Path("run/progress.png").exists():
                seen.append(frames_of_film("run"))
    monkeypatch.setattr(asd, "distill", quick)
    assert cli("--steps", 95, "--particles", 5)[0] == 0
    with Image.open("run/progress.png") as film:            # of the first four particles
        assert film.size == (10 * 128, 4 * 128)
    assert sorted(set(seen)) == list(range(2, 11)) and seen == sorted(seen)
    measured = {row["step"] for row in metrics("run") if "saturation" in row}
    assert measured == set(range(10, 91, 10)) | {round(i * 95 / 9) for i in range(1, 10)}


def interrupted(monkeypatch, at):
    """Let asd.py's loop be interrupted by Ctrl-C after a step."""
    loop = asd.distill

    def stopping(*arguments, callback, **options):
        def then_stop(state, terms):
            callback(state, terms)
            if state.step == at:
                signal.raise_signal(signal.SIGINT)
        return loop(*arguments, callback=then_stop, **options)
    monkeypatch.setattr(asd, "distill", stopping)


def test_ctrl_c_leaves_a_picture_and_says_how_to_go_on(cli, monkeypatch):
    interrupted(monkeypatch, at=2)
    status, out, err = cli("--steps", 30)
    assert status == 130 and out == "" and "Traceback" not in err
    assert err.endswith("\nasd.py: stopped; go on with --resume run\n")
    assert frames_of_film("run") == 2                       # the start, and what there is now
    monkeypatch.setattr(run.Run, "make", functools.partial(signal.raise_signal, signal.SIGINT))
    status, _, err = cli("--out", "early")
    assert status == 130 and err == "\nasd.py: stopped\n" and not Path("early").exists()


def test_prompts_and_particles_make_a_grid(cli, model, monkeypatch):
    conds, distill = [], asd.distill

    def remembering(prior, generator, cond, *arguments, **options):
        conds.append(cond)
        return distill(prior, generator, cond, *arguments, **options)
    monkeypatch.setattr(asd, "distill", remembering)
    status, _, _ = cli("--prompt", "a red apple", "--prompt", "a blue fox", "--particles", 3,
                       "--steps", 1)
    assert status == 0
    assert checkpoint("run")["theta.0"].shape == (6, 4, 8, 8)
    with Image.open("run/final.png") as final:
        assert final.size == (3 * 256, 2 * 256)
    encode = asd.Prior.from_pretrained(model, "cpu", None).encode_text
    assert torch.equal(conds[0], encode(["a red apple"] * 3 + ["a blue fox"] * 3))


def test_grid_is_filled_row_by_row(tmp_path):
    images = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    pictures.write_grid(tmp_path / "grid.png", images, 2)
    with Image.open(tmp_path / "grid.png") as grid:
        grid = torch.from_numpy(np.array(grid)).permute(2, 0, 1)
    white = torch.full((3, 256, 256), 255, dtype=torch.uint8)
    above, below = torch.cat([*images[:2]], 2), torch.cat([images[2], white], 2)
    assert torch.equal(grid, torch.cat([above, below], 1))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_picture_measures_by_hand():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * torch.ones(1, 3, 1, 1)
    measured = pictures.picture_measures(red)
    assert measured == pytest.approx({"saturation": 1, "sharpness": 0}, abs=1e-6)
    assert pictures.picture_measures(board) == pytest.approx({"saturation": 0, "sharpness": 4})


def test_unknown_words_are_named_once(cli):
    _, _, err = cli("--prompt", "a red zebra", "--prompt", "Zebra fox", "--steps", 1,
                    "--method", "sds")
    assert err.count("zebra") == 1 and "has never seen: zebra" in err
    assert "never seen" not in cli("--out", "known", "--steps", 1, "--method", "sds")[2]


def test_real_pictures_are_what_phi_learns_from(cli, model, made_once):
    """--real: one, or a folder; Eq. 9's loss; a resumed run has them in its checkpoint."""
    Path("real").mkdir()
    for i in range(3):
        rgb = torch.rand(16, 16, 3, generator=rng(i)).mul(255).byte().numpy()
        Image.fromarray(rgb).save(f"real/{i}.png")
    flags = ["--real", "real", "--t-late", 1, "--lr-end", 1]
    assert cli(*flags, "--out", "whole")[0] == cli(*flags, "--steps", 2, "--out", "part")[0] == 0
    images = torch.cat([files.read_image(f"real/{i}.png", (16, 16)) for i in range(3)])
    with torch.no_grad():
        expected = asd.Prior.from_pretrained(model, "cpu").encode_image(images)
    torch.testing.assert_close(checkpoint("whole")["real"], expected)
    shutil.rmtree("real")
    assert cli("--resume", "part", "--steps", 3)[0] == 0
    assert torch.equal(checkpoint("part")["theta.0"], checkpoint("whole")["theta.0"])
    assert metrics("whole")[0]["loss_D"] != metrics(made_once)[0]["loss_D"]
    one_line(cli("--real", "real"), "real", "folder")
    two = ["--prompt", "a red apple", "--prompt", "a blue fox", "--out", "two"]
    one_line(cli("--real", "a.png", *two), "one --prompt")


@pytest.mark.parametrize("name", ["sds", "vsd"])
def test_real_pictures_need_a_phi_that_learns(cli, name):
    Image.new("RGB", (16, 16), "red").save("real.png")
    result = cli("--real", "real.png", "--method", name, "--eta", 0.3, "--steps", 1)
    if name == "sds":
        one_line(result, "--real", "a φ that learns")
    else:
        assert result[0] == 0 and checkpoint("run")["real"].shape[0] == 1


def test_runs_of_one_name_stay_apart(cli, model):
    for _ in range(3):
        asd.main(["--model", model, "--prompt", "A red Apple!", "--steps", "1", "--seed", "7",
                  "--device", "cpu", "--method", "sds"])
    names = sorted(path.name for path in Path("outputs").iterdir())
    assert names == ["sds-a-red-apple-7", "sds-a-red-apple-7-2", "sds-a-red-apple-7-3"]


@pytest.mark.parametrize("name", ["final.png", "metrics.jsonl", "notes.txt"])
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
    flags = {"lam": 3.5, "gamma": -0.5, "omega": "sigma2", "t_min": 0.1, "t_max": 0.9,
             "t_late": 0.7, "t_order": "descending", "lr": 0.2, "lr_end": 0.1,
             "optimizer": "sgd", "phi_lr": 0.3, "lam_phi": 2.0, "phi_steps": 2, "steps": 11,
             "eta": 0.3}
    given = ["--method", "vsd"]
    for name, value in flags.items():
        given += [settings.flag_name(name), value]
    Image.new("RGB", (16, 16), "teal").save("real.png")
    status, _, _ = cli(*given, "--share-noise", "--fixed-noise", "--rank", 3, "--real", "real.png",
                       "--micro-batch", 1, "--checkpointing", "--seed", 8, "--pixels")
    assert status == 0 and seen["micro_batch"] == 1 and isinstance(seen["args"][1], asd.Pixels)
    method, row = seen["args"][3], asd.Method()
    assert method == asd.Method(**flags, phi=LoRAPhi, share_noise=True, fixed_noise=True)
    changed = {name for name in vars(row) if vars(row)[name] != vars(method)[name]}
    assert changed >= set(settings.Equation.model_fields) - {"method", "t_max_late"}
    assert seen["prompts"] == ["a red apple"]
    assert seen["options"] == {"rank": 3, "checkpointing": True, "seed": 8}
    assert cli("--t-late", 0.7, "--t-max-late", 0.4, "--out", "other")[0] == 0
    assert seen["args"][3].t_max_late == 0.4


def test_threads_are_a_setting_that_may_change(finished, monkeypatch):
    """--threads N is torch's number and in config.json; --resume may be given another one."""
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    assert finished("--threads", 1, "--steps", 1, "--out", "one")[0] == 0
    assert config_of("one")["settings"]["threads"] == 1
    assert config_of("run")["settings"]["threads"] is None
    assert finished("--resume", "run", "--threads", 2)[0] == 0
    assert config_of("run")["settings"]["threads"] == 2 and numbers == [1, 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_prior_makes_a_float32_picture(cli, dtype):
    status, _, _ = cli("--dtype", dtype, "--steps", 1)
    saved = checkpoint("run")
    assert status == 0 and saved["theta.0"].dtype == saved["phi.0"].dtype == torch.float32
    assert config_of("run")["dtype"] == f"torch.{dtype}"


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


@pytest.mark.parametrize("mode, size, value, color, kind", [
    ("RGBA", (16, 16), (255, 0, 0, 255), (255, 0, 0), "png"),
    ("L", (40, 30), 76, (76, 76, 76), "png"), ("LA", (7, 7), (76, 255), (76, 76, 76), "png"),
    ("P", (16, 16), 0, (0, 0, 0), "png"), ("1", (9, 9), 1, (76, 76, 76), "png"),
    ("RGB", (1500, 900), (10, 20, 30), (10, 20, 30), "png"),
    ("RGB", (1, 1), (10, 20, 30), (10, 20, 30), "png"),
    ("I;16", (16, 16), 76 * 257, (76, 76, 76), "png"),
    ("I;16", (16, 16), 76 * 257, (76, 76, 76), "tiff"),
    ("F", (16, 16), 76 / 255, (76, 76, 76), "tiff")])
def test_pictures_of_every_kind_are_read(tmp_path, mode, size, value, color, kind):
    """Of 1, 8 and 16 bits, and of floats in [0, 1]."""
    if mode == "1":
        color = (255, 255, 255)
    Image.new(mode, size, value).save(tmp_path / f"a.{kind}")
    image = files.read_image(tmp_path / f"a.{kind}", (12, 16))
    expected = torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 12, 16) / 255
    torch.testing.assert_close(image, expected, atol=0.006, rtol=0)


@pytest.mark.parametrize("mode, value", [("F", 76.0), ("F", -0.1), ("F", math.nan), ("I", 70_000)])
def test_pictures_without_a_known_white_are_refused(tmp_path, mode, value):
    """Floats beyond [0, 1], and integers of 32 bits: Pillow would make them black, or white."""
    picture = Image.new(mode, (16, 16), value)
    picture.save(tmp_path / "a.tiff")
    with pytest.raises(files.UserError, match=r"a\.tiff cannot be read as a picture: save"):
        files.read_image(tmp_path / "a.tiff", (12, 16))


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
    flags = ["--init", "a.png", "--lr", 0, "--method", "sds", "--steps", 2]
    assert cli(*flags, "--pixels", "--particles", 2)[0] == 0
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    theta = checkpoint("run")["theta.0"]
    assert theta.shape == (2, 3, 16, 16) and (theta == expected).all()
    assert cli(*flags, "--out", "latents")[0] == 0
    saved = checkpoint("latents")
    assert saved["theta.0"].shape == (1, 4, 8, 8)
    assert torch.equal(saved["frame.0"], saved["frame.2"])


# ------------------------------------------------------------------------------------- going on
PICTURE, EDIT, MUG = ("--prompt", "a red apple"), (
    "--image", "a.png", "--source", "a red apple", "--target", "a blue fox"), (
    "--prompt", "a red mug", "--samples", "4", "--resolution", "4", "8", "--levels", "2", "--table",
    "8")
TO_BE_KILLED = [
    ("asd", *PICTURE), ("editing", *EDIT), ("text_to_3d", *MUG),
    ("asd", *PICTURE, "--method", "vsd", "--phi", "embedding", "--share-noise"),
    ("editing", *EDIT, "--method", "dds", "--pixels"),
    ("text_to_3d", *MUG, "--method", "vsd", "--background", "random"),
    ("asd", *PICTURE, "--pixels", "--particles", "2"),
    ("editing", *EDIT[2:], "--network", "--pictures", "3", "--batch", "2"),
    ("text_to_3d", *MUG, "--method", "sds")]


def cheaper(patch):
    """Leave out what a run in 3D is measured by, and what it shows at the end."""
    patch(text_to_3d, "view_scores", lambda *_: {})
    patch(text_to_3d, "preview", lambda *_: None)
    patch(text_to_3d, "write_all", lambda folder, *_: folder / "progress.png")


def command(name, argv, log, moment):
    """Run a command line in a process of its own, of one thread, with its output in a file.

    moment = (n, part): the process is killed where it is writing its n-th checkpoint, when this
    part of it is on the disk; or None.
    """
    torch.set_num_threads(1)
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


def kill_at(process, lines, seconds):
    """Kill a run's process some time after it has written so many lines of metrics."""
    log = Path("killed/metrics.jsonl")
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert process.exitcode is None, Path("log").read_text()[-900:]
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_goes_on_bit_for_bit(fork, model, tmp_path, monkeypatch, seed):
    """Every other one is killed while a checkpoint is written, the others at any moment.

    The lock of the dead process is none.
    """
    monkeypatch.chdir(tmp_path)
    cheaper(monkeypatch.setattr)
    Image.effect_noise((16, 16), 99).convert("RGB").save("a.png")
    chance, (name, *flags) = random.Random(seed), TO_BE_KILLED[seed % len(TO_BE_KILLED)]
    flags += ["--model", model, "--steps", "8", "--save-every", "2", "--device", "cpu",
              "--seed", str(seed)]
    moment = None
    if seed % 2:
        moment = (chance.randint(1, 4), chance.choice([0, chance.random(), 1]))
    process = fork(command, name, [*flags, "--out", str(tmp_path / "killed")],
                   str(tmp_path / "log"), moment)
    if moment is None:
        kill_at(process, chance.randint(0, 6), chance.uniform(0, 0.05))
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()[-900:]
    assert not Path("killed/phi").exists()                  # it was not at its end
    assert Path("killed/.checkpoint.safetensors.tmp").exists() or moment is None
    main = importlib.import_module(name).main
    assert main(["--resume", "killed"]) == main([*flags, "--out", "whole"]) == 0
    same_run("whole", "killed")


def forget_picture(folder):
    """config.json as it was before the run was finished."""
    config = config_of(folder)
    del config["picture"]
    Path(folder, "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("init", [False, True])
def test_a_run_without_a_checkpoint_yet_goes_on(cli, init):
    """Stopped after config.json was written, before the first checkpoint."""
    Image.new("RGB", (16, 16), "teal").save("a.png")
    flags = ["--init", "a.png"] if init else []
    cli(*flags, "--steps", 2)
    shutil.copytree("run", "stopped")
    for name in ("checkpoint.safetensors", "final.png", "progress.png"):
        Path("stopped", name).unlink()
    forget_picture("stopped")
    assert cli("--resume", "stopped")[0] == 0
    same_run("run", "stopped")


def test_a_finished_run_goes_on_as_it_is(finished):
    before = contents("run") | {"config.json": config_of("run")}
    assert finished("--resume", "run")[0] == 0
    assert contents("run") | {"config.json": config_of("run")} == before


def test_more_steps_are_the_longer_run(cli):
    """As long as what depends on the number of steps, --t-late and --lr-end, does not differ."""
    cli("--steps", 2, "--t-late", 1, "--lr-end", 1)
    assert cli("--resume", "run", "--steps", 4)[0] == 0
    assert cli("--steps", 4, "--t-late", 1, "--lr-end", 1, "--out", "long")[0] == 0
    short, long = checkpoint("run"), checkpoint("long")
    assert all(torch.equal(short[key], long[key]) for key in long if "frame" not in key)
    assert [row["step"] for row in metrics("run")] == [1, 2, 3, 4]
    assert config_of("run")["settings"]["steps"] == 4


JUNK = ['{"step": 4, "grad_norm": 1e9}', "null", "[]", "3", '"step"', "{}", '{"step": "2"}',
        '{"step": true, "grad_norm": 1e9}', '{"step": 0}', '{"step": 1.5}', '{"step": [1]}',
        '{"step": null}', "not JSON", "", 100_000 * "[", '{"ste']


def test_metrics_follow_the_checkpoint(finished):
    """Of metrics.jsonl a resumed run keeps a line a step; what is no such line is dropped."""
    rows = metrics("run")
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    Path("run/metrics.jsonl").write_text("\n".join([*JUNK, *lines, *JUNK]))
    assert finished("--resume", "run", "--steps", 4)[0] == 0
    assert metrics("run")[:3] == rows
    assert [row["step"] for row in metrics("run")] == [1, 2, 3, 4]
    assert metrics("run")[3]["grad_norm"] < 1e9


def test_a_resumed_run_keeps_its_settings(finished):
    before = contents("run")
    one_line(finished("--resume", "run", "--lam", 4, "--seed", 1), "--lam", "--seed")
    one_line(finished("--resume", "run", "--prompt", "a blue fox"), "--prompt")
    one_line(finished("--resume", "run", "--pixels"), "--pixels")
    one_line(finished("--resume", "run", "--out", "other"), "--out")
    one_line(finished("--resume", "run", "--steps", 1), "steps already", "--steps 1")
    assert contents("run") == before
    assert finished("--resume", "run", "--lam", 7.5, "--save-every", 7, "--device", "cpu")[0] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [
    [], ["--pixels"], ["--phi", "embedding", "--share-noise"],
    ["--particles", 3, "--micro-batch", 1, "--checkpointing"]])
def test_a_cuda_run_goes_on(cli, flags):
    assert cli("--device", "cuda", "--steps", 2, *flags)[0] == 0
    assert cli("--resume", "run", "--steps", 3)[0] == 0


@pytest.mark.parametrize("phi, views", [("lora", 2), ("embedding", 1)])
def test_what_compile_compiles(cli, monkeypatch, phi, views):
    """Every transformer block of the prior, and of a LoRA's view, once."""
    blocks = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: blocks.append(block))
    assert cli("--phi", phi, "--steps", 1, "--compile")[0] == 0
    network = asd.Prior.from_pretrained(cli.model, "cpu").network
    expected = [block for block in network.modules()
                if type(block).__name__ == "BasicTransformerBlock"]
    assert len(set(map(id, blocks))) == len(blocks) == views * len(expected) > 0


# --------------------------------------------------------------------------- one process a folder
@pytest.mark.parametrize("main, flags", [
    (asd.main, "--prompt a --out run"), (asd.main, "--resume run"),
    (variants.main, "--prompt a --method csd --out run"), (variants.main, "--resume run"),
    (variants.main, "train-corrective --model a --out run/b.safetensors"),
    (editing.main, "--source a --target b --image a.png --out run"),
    (editing.main, "--resume run"), (editing.main, "--apply run --image a.png"),
    (text_to_3d.main, "--prompt a --out run"), (text_to_3d.main, "--resume run"),
    (nerf.main, "ball --pictures 1 --size 8 --device cpu --out run")])
def test_a_folder_in_use_is_refused(cli, capsys, main, flags):
    """By every command, in a line, before anything is loaded."""
    Path("run").mkdir()
    with files.locked(Path("run")):
        result = main(flags.split()), *capsys.readouterr()
        one_line(result, "another process is at work in run", name=f"{main.__module__}.py")
    assert not contents("run")


def test_a_run_in_use_is_not_resumed(cli, made_once, monkeypatch):
    """A second --resume, or --out, in the middle of a run is refused; the run is unharmed."""
    statuses, loop = [], asd.distill

    def disturbed(*arguments, callback, **options):
        def then_disturb(state, terms):
            callback(state, terms)
            if state.step == 2:
                statuses.append(asd.main(["--resume", "run"]))
                statuses.append(asd.main(["--prompt", "a fox", "--out", "run"]))
        return loop(*arguments, callback=then_disturb, **options)
    monkeypatch.setattr(asd, "distill", disturbed)
    status, out, err = cli()
    assert (status, out, statuses) == (0, "run/final.png\n", [2, 2])
    assert err.count("asd.py: another process is at work in run\n") == 2
    same_run("run", made_once)


def hold(folder, ready):
    """Lock a folder until the process is killed."""
    with files.locked(Path(folder)):
        ready.set()
        time.sleep(600)


def test_the_lock_of_a_dead_process_is_none(fork, finished, tmp_path):
    ready = multiprocessing.get_context("forkserver").Event()
    process = fork(hold, tmp_path / "run", ready)
    assert ready.wait(300)
    one_line(finished("--resume", "run"), "another process is at work in run")
    process.kill()
    process.join()
    assert finished("--resume", "run")[0] == 0


def test_runs_that_start_together_have_a_folder_each(fork, model, tmp_path, monkeypatch):
    """Two processes of one name: two folders; with the same --out the second one is refused."""
    monkeypatch.chdir(tmp_path)
    argv = ["--prompt", "a red apple", "--steps", "1", "--model", model, "--method", "sds"]
    processes = []
    for i, extra in enumerate([[], [], ["--out", "one"], ["--out", "one"]]):
        processes.append(fork(command, "asd", [*argv, *extra], f"log{i}", None))
    for process in processes:
        process.join()
    statuses = [process.exitcode for process in processes]
    assert statuses[:2] == [0, 0] and sorted(statuses[2:]) == [0, 2]
    made = sorted(path.parent.name for path in tmp_path.glob("**/final.png"))
    assert made == ["one", "sds-a-red-apple-0", "sds-a-red-apple-0-2"]


def test_nerf_writes_only_into_a_folder_of_its_own(model, tmp_path, monkeypatch, capsys):
    """The name comes with a number, the second time; a run's folder, or the pictures', is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nerf, "write_all", lambda folder, *_: folder / "views.png")
    flags = ["ball", "--pictures", "1", "--size", "8", "--steps", "1", "--batch", "8",
             "--samples", "4", "--device", "cpu", "--threads", "1"]
    assert nerf.main(flags) == nerf.main(flags) == nerf.main([*flags, "--out", "o"]) == 0
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["fit-ball", "fit-ball-2"]
    assert config_of("o")["settings"]["threads"] == 1
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    before, _ = contents("."), capsys.readouterr()
    for folder in ("o", "mine"):
        result = nerf.main([*flags, "--seed", "1", "--out", folder]), *capsys.readouterr()
        one_line(result, folder, "choose another --out", name="nerf.py")
    assert contents(".") == before


# ----------------------------------------------------------------------------- several processes
def as_rank(number, size, port, name, argv, log, moment):
    """Run command() as one of several processes, as torchrun starts them."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command(name, argv, log, moment)


def start_ranks(fork, size, name, argv, moment=None):
    """Start a command as several processes, of which number 0 is killed at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for i in range(size):
        ranks.append(fork(as_rank, i, size, port, name, argv, f"log{i}", None if i else moment))
    return ranks


def run_ranks(fork, size, name, *argv, moment=None):
    """Run a command as several processes. -> exit codes, outputs"""
    ranks = start_ranks(fork, size, name, [str(word) for word in argv], moment)
    for process in ranks:
        process.join(300)
    return ([process.exitcode for process in ranks],
            [Path(f"log{i}").read_text() for i in range(size)])


def close_theta(a, b):
    """Assert that θ of two runs is the same but for rounding."""
    one, two = checkpoint(a), checkpoint(b)
    for name in one:
        if re.fullmatch(r"theta\.\d+", name):
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


@needs_tiny_sd
def test_the_number_of_processes_changes_rounding_alone(fork, tmp_path, monkeypatch):
    """Of tiny-sd: one process; and three, of which one is killed, then two that go on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asd.Prior, "from_pretrained", load_once)
    flags = [*PICTURE, "--particles", "4", "--device", "cpu", "--steps", "4", "--save-every", "1",
             "--share-noise"]
    assert asd.main([*flags, "--out", "one"]) == 0
    codes, outputs = run_ranks(fork, 3, "asd", *flags, "--out", "three", moment=(2, 0))
    assert codes[0] == -signal.SIGKILL and codes[1:] == [2, 2], outputs
    codes, outputs = run_ranks(fork, 2, "asd", "--resume", "three")
    assert codes == [0, 0] and outputs[1] == "", outputs           # number 0 alone speaks
    close_theta("one", "three")
    rows = [[row["grad_norm"] for row in metrics(folder)] for folder in ("one", "three")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


def test_processes_divide_the_views_of_a_scene(fork, model, tmp_path, monkeypatch):
    """… with their micro-batches and a background that is drawn or learnt."""
    monkeypatch.chdir(tmp_path)
    cheaper(monkeypatch.setattr)
    flags = [*MUG, "--views", "4", "--micro-batch", "1", "--background", "random", "--sparsity",
             "1", "--model", model, "--device", "cpu", "--settings", "tiny", "--steps", "3"]
    assert text_to_3d.main([*flags, "--out", "one"]) == 0
    codes, outputs = run_ranks(fork, 2, "text_to_3d", *flags, "--out", "two")
    assert codes == [0, 0], outputs
    close_theta("one", "two")


def test_where_a_process_ends_the_run_ends_in_a_line(fork, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*PICTURE, "--particles", "2", "--model", model, "--steps", "400", "--save-every", "1",
             "--method", "sds", "--out", "run"]
    ranks = start_ranks(fork, 2, "asd", flags)
    while not Path("run/checkpoint.safetensors").exists():
        assert ranks[0].exitcode is None, Path("log0").read_text()
        time.sleep(0.01)
    ranks[1].kill()
    ranks[0].join(300)
    log = Path("log0").read_text()
    assert ranks[0].exitcode == 2 and "Traceback" not in log
    assert log.splitlines()[-1] == "asd.py: another process has ended; go on with --resume run"
    assert checkpoint("run")["theta.0"].isfinite().all()


def test_what_cannot_be_divided_is_one_line(fork, model, tmp_path, monkeypatch):
    """Process 0 alone says it."""
    monkeypatch.chdir(tmp_path)
    codes, (first, second) = run_ranks(fork, 2, "asd", *PICTURE, "--model", model, "--out", "run")
    assert codes[0] == 2 and codes[1] in (2, 1) and second == ""
    assert "too many for 1 samples" in first and len(first.strip().splitlines()) == 1
    assert not Path("run").exists()


def test_a_phi_that_compares_all_samples_cannot_be_divided(monkeypatch):
    """Nor can an edit, which has one picture."""
    monkeypatch.setattr(run.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 2)
    state = SimpleNamespace(generator=SimpleNamespace(batch=2), phi=SimpleNamespace())
    run.check_divisible(state)
    state.phi.whole = True
    with pytest.raises(run.UserError, match="too many for 1 samples: raise --particles"):
        run.check_divisible(state)
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(run.UserError, match="is one process, and WORLD_SIZE is 2: unset RANK"):
        run.join_processes(editing.command())


LAUNCH = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("changes, part", [
    ({"RANK": "x"}, "RANK is no number"), ({"RANK": "-1"}, "RANK is no number"),
    ({"RANK": "2"}, "RANK is 2, WORLD_SIZE 2"), ({"WORLD_SIZE": None}, "WORLD_SIZE is no number"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE is no number"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0"),
    ({"MASTER_PORT": "x"}, "MASTER_PORT is no number"),
    ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR no.such.host.invalid"),
    ({"MASTER_ADDR": "a..b"}, "MASTER_ADDR a..b"),
    ({"RANK": "1"}, "nobody listens at MASTER_ADDR localhost, MASTER_PORT 29500, within 1 s")])
def test_variables_of_another_launch_are_one_line(cli, monkeypatch, changes, part):
    """What torchrun or a cluster has left behind ends the command within 20 seconds."""
    monkeypatch.setattr(run, "PATIENCE", timedelta(seconds=1))
    for name, value in (LAUNCH | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    began = time.monotonic()
    one_line(cli(), part, "unset RANK to run one process")
    assert time.monotonic() - began < 20 and not Path("run").exists()


def test_a_port_in_use_is_one_line(cli, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in (LAUNCH | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        one_line(cli(), f"MASTER_PORT {port} is in use: unset RANK")


@pytest.mark.parametrize("changes", [{"RANK": ""}, {"MASTER_ADDR": ""}, {"WORLD_SIZE": "1"}])
def test_one_process_needs_no_others(cli, monkeypatch, changes):
    """An empty RANK is none; a world of one process is no world."""
    for name, value in (LAUNCH | changes).items():
        monkeypatch.setenv(name, value)
    assert cli("--steps", 1, "--method", "sds")[0] == 0 and Path("run/final.png").exists()


# --------------------------------------------------------------------------- many prompts
@pytest.fixture
def many(cli, capsys, monkeypatch):
    """many(*flags) -> (status, stdout, stderr) of runs of one step, one a line of prompts.txt."""
    monkeypatch.setattr(run.gc, "collect", lambda: None)    # slow here, where nothing is to be had

    def call(*flags, prompts="prompts.txt"):
        for default in (["--steps", "1"], ["--method", "sds"]):
            if default[0] not in flags:
                flags = *default, *flags
        status = asd.main(["--prompts-file", str(prompts), "--out", "all", "--model", cli.model,
                           "--device", "cpu", *flags])
        return status, *capsys.readouterr()
    return call


def prompts_made():
    """Return the prompts of all runs in all/, sorted."""
    return sorted(config_of(folder)["settings"]["prompt"][0] for folder in Path("all").iterdir())


def test_prompts_of_a_file(many):
    """A run for each line, of a name of its own; the same command again makes what is missing."""
    prompts = ["a fox", "a-fox", "  a fox", "", "a picture of " + 3 * "very " + "red apples"]
    Path("prompts.txt").write_text("\n".join(prompts))
    status, out, _ = many()
    assert status == 0 and len(out.splitlines()) == 3
    made = sorted(Path("all").iterdir())
    assert Path("all/sds-a-fox-0") in made and len(made) == 3
    assert prompts_made() == sorted({prompt.strip() for prompt in prompts if prompt})
    before = contents("all")
    shutil.copytree("all", "before")
    assert many() == (0, "", "") and contents("all") == before
    for folder in made[:2]:                                 # two were stopped, one has nothing
        config = config_of(folder)
        del config["picture"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "final.png").unlink()
    shutil.rmtree(made[2])
    status, out, _ = many()
    assert status == 0 and len(out.splitlines()) == 3
    for folder in made:
        same_run(folder, "before" / folder.relative_to("all"))
    status, _, err = many("--lam", "3")                     # another run: finished or not
    assert status == 2 and err.count("keeps its settings: drop --lam") == 3
    assert many("--steps", "2")[0] == 0 and len(metrics(made[0])) == 2            # more of it


@pytest.mark.parametrize("source", ["file", "pipe", "-"])
def test_a_text_of_prompts_may_have_marks(many, source):
    """A BOM, line ends of Windows, comments, U+2028 in a line; from a file, a pipe, or stdin."""
    data = "\ufeffa fox\r\n# a comment\r\n\r\n  # another\na red\u2028apple".encode()
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    path, stdin = f"/dev/fd/{reading}", os.dup(0)
    if source == "file":
        path = "prompts.txt"
        Path(path).write_bytes(data)
    try:
        if source == "-":
            path = "-"
            os.dup2(reading, 0)
        assert many(prompts=path)[0] == 0
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(reading)
    assert prompts_made() == ["a fox", "a red\u2028apple"]
    assert sorted(path.name for path in Path("all").iterdir()) == [
        "sds-a-fox-0", "sds-a-red-apple-0-878f162f"]


@pytest.mark.parametrize("data, part", [
    (b"a fox\na\0b\n", "prompts.txt: 'a\\x00b' is not valid text"),
    (b"a fox\n\xff\xfe", "not UTF-8"),
    (b"\xef\xbb\xbf \n# a fox\n", "holds no prompt"), (b"", "holds no prompt")], ids=ascii)
def test_a_text_of_prompts_that_is_wrong_makes_nothing(many, data, part):
    Path("prompts.txt").write_bytes(data)
    one_line(many(), part)
    assert not Path("all").exists()


def test_a_prompt_that_another_process_has_is_left_to_it(many):
    Path("prompts.txt").write_text("a fox\na red apple")
    Path("all/sds-a-fox-0").mkdir(parents=True)
    with files.locked(Path("all/sds-a-fox-0")):
        assert many()[0] == 0
        assert not any(Path("all/sds-a-fox-0").iterdir())
        assert Path("all/sds-a-red-apple-0/final.png").exists()
    assert many()[0] == 0 and Path("all/sds-a-fox-0/final.png").exists()


def test_mistakes_about_a_file_of_prompts(many):
    """One that is of one prompt alone does not keep the others from being made."""
    Path("prompts.txt").write_text("a fox\na red apple")
    for flags, part in [(["--prompt", "a"], "drop --prompt"), (["--resume", "a"], "--resume"),
                        (["--method", "none"], "unknown method"), (["--lam", "nan"], "--lam")]:
        one_line(many(*flags), part)
        assert not Path("all").exists()
    Path("all/sds-a-fox-0").mkdir(parents=True)
    Path("all/sds-a-fox-0/mine").touch()
    status, _, err = many()
    assert status == 2 and "sds-a-fox-0 is not empty" in err
    assert Path("all/sds-a-red-apple-0/final.png").exists()
    shutil.rmtree("all")
    one_line(many("--init", "missing.png"), "missing.png")  # of all: it is said once
    assert not Path("all").exists()


# ------------------------------------------------------------------------- help, documentation
@pytest.mark.parametrize("method, gamma, phi", [("asd", "-1", "lora"), ("sds", "-1", "noise"),
                                                ("vsd", "0", "lora")])
def test_help_has_groups_and_the_defaults_of_the_method(capsys, method, gamma, phi):
    with pytest.raises(SystemExit) as stop:
        asd.main(["--method", method, "--model", "mine", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and out.startswith("usage: asd.py")
    places = [out.index(f" {group}: --") for group in settings.GROUPS]
    assert places == sorted(places)
    assert f"γ of Eqs. 9 and 10 (default {gamma})" in out
    assert re.search(rf"--phi TEXT what predicts ε_φ: [a-z, ]* \(default {phi}\)", out)
    assert "(default paper)" in out                         # as --model mine is not tiny-sd


def documented_commands():
    """Return every `python FILE.py …` of README.md and docs/*.md: as (file, line)."""
    found = []
    for path in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))):
        text = path.read_text("utf-8").replace("\\\n", " ")            # lines that go on
        pieces = re.findall(r"^(?: {4}|\t)(.+)$", text, re.M)            # blocks
        pieces += re.findall(r"`([^`]+)`", text)                         # words in a line
        for piece in pieces:
            for line in " ".join(piece.split()).split("&&"):
                program = re.match(r" *python (\w+)\.py\b", line)
                if program and program[1] in COMMANDS:
                    found.append((path.name, line.strip()))
    return found


COMMANDS = {"asd": asd, "variants": variants, "editing": editing, "text_to_3d": text_to_3d,
            "nerf": nerf}
DOCUMENTED = documented_commands()


def stand_in(command, given):
    """Check the settings that a command was given, in place of a run."""
    if "prompts_file" in given:
        settings.validated(command.settings, settings.row_defaults(command, given) | given)
    elif "resume" not in given:
        settings.new_settings(command, given)


def test_the_documentation_has_commands():
    """That the next test finds them: code blocks, words in a line, lines that go on."""
    found = [line for _, line in DOCUMENTED]
    assert 'python asd.py --prompt "a red apple"' in found
    assert 'python nerf.py "red mug"' in found
    assert any(line.startswith("python variants.py train-corrective") for line in found)
    assert any("--things" in line and line.endswith("--out drawings-to-renders") for line in found)


@pytest.mark.parametrize("file, line", DOCUMENTED, ids=lambda text: ascii(text)[1:60])
def test_every_documented_command_is_parsed(monkeypatch, capsys, file, line):
    """… by its command's own parser, and its settings are checked, before anything is loaded."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(run, "start", stand_in)
    for module, name in ((nerf, "run"), (editing, "apply_network"),
                         (variants, "train_corrective")):
        monkeypatch.setattr(module, name, lambda settings: None)
    line = line.replace("--method …", "--method vsd --prompt fox")      # any of them
    _, program, *flags = shlex.split(line, comments=True)
    assert COMMANDS[program.removesuffix(".py")].main(flags) == 0, capsys.readouterr().err


def documented_flags():
    """Return the flags in the first table of docs/guide.md, as {flag: the value that is shown}."""
    guide = (HERE / "docs/guide.md").read_text("utf-8")
    section = guide.split("## Flags")[1].split("\n## ")[0]
    table = "\n".join(re.findall(r"^\|.*", section, re.M))
    found = {}
    for code in re.findall(r"`(--[^`]+)`", table):
        flag, _, value = code.replace("\\|", "|").partition(" ")
        found[flag] = value
    return found


def test_the_table_of_flags_shows_the_defaults():
    """docs/guide.md's: of asd.py, flag by flag; one that it has not, such as a former one, fails.

    A value in capitals is the reader's to give; of several the default is one.
    """
    command = run.Command("asd.py", "", settings.PictureSettings, asd.METHODS, asd.PHIS,
                          asd.CHOICES, asd.build, asd.distill)
    made = settings.new_settings(command, {"prompt": ["a fox"]})
    flags = documented_flags()
    assert {"--lam", "--phi-steps", "--seed", "--steps"} <= flags.keys()
    for flag, shown in flags.items():
        name = flag.removeprefix("--").replace("-", "_")
        if name in ("resume", "out", "prompts_file"):
            continue
        default = getattr(made, name)
        if shown and not shown.replace("_", "").isupper():
            choices = shown.split("|")
            values = settings.validated(settings.PictureSettings,
                                        made.model_dump() | {name: choices[0]})
            assert getattr(values, name) == default or str(default) in choices, flag
        else:
            assert default in (None, False) or flag == "--prompt", flag


# ---------------------------------------------------------------------------------- end to end
@needs_tiny_sd
def test_a_few_steps_of_tiny_sd(cli):
    status, out, _ = cli("--model", "tiny-sd", "--steps", 3, "--lr", 0.1)
    assert status == 0 and Path(out.strip()).is_file() and len(metrics("run")) == 3
    for row in metrics("run"):
        assert all(math.isfinite(value) for value in row.values())
    saved = checkpoint("run")
    assert (saved["frame.0"].float() - saved["frame.3"].float()).abs().mean() > 1
