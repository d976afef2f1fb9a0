"""runs.py — what the commands share: flags, folders, settings, checkpoints, pictures, errors.

What a command is, is a record of functions, Command: asd.py, variants.py, editing.py and
text_to_3d.py hand theirs to main(). No method is known here, and no φ.

A run lives in one folder: config.json (every setting), metrics.jsonl (a line per step),
checkpoint.safetensors (θ, φ, both optimisers, the state of the generator of randomness, the step,
the frames of the film), and at the end final.png, progress.png and phi/. What a run goes on from is
written beside its place and moved into it when it is whole, so that a run killed at any moment can
be resumed; on the CPU the resumed run ends in the same bits. A user's mistake is one line and exit
status 2.
"""
import argparse
import inspect
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

from prior import Prior, UserError


class Parser(argparse.ArgumentParser):
    """Errors on one line; −1e-2 is a number, not a flag."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")

    def error(self, message):
        print(f"{self.prog}: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


def number(kind, low=-math.inf, high=None):
    """An argparse type: a finite number of `kind` in [low, high]; integers end at 10⁹."""
    high = (10 ** 9 if kind is int else math.inf) if high is None else high

    def convert(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f" in [{low:g}, {high:g}]" if low > -math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a finite number{bounds}")
        return value
    convert.__name__ = kind.__name__
    return convert


# ------------------------------------------------------------------------------ what a command is
def picture_flags(add):
    """The flags of a command that makes pictures of its prompts."""
    add("--prompt", action="append", metavar="TEXT", help="what to make; repeat for several")
    add("--particles", type=number(int, 1), help="pictures per prompt, one φ for all (default 1)")
    add("--init", metavar="PNG", help="start from this picture, not from noise")
    add("--pixels", action="store_const", const=True, help="optimise RGB through the VAE's encoder")
    add("--real", metavar="PNG_OR_DIR", help="real pictures of the prompt: φ learns by Eq. 9")


def final_picture(folder, settings, prior, state):
    """final.png, all that the generator shows in a grid."""
    final = (state.generator.images() * 255).round().byte().cpu()
    write_grid(folder / "final.png", final, math.ceil(math.sqrt(len(final))))
    return folder / "final.png"


@dataclass(frozen=True)
class Command:
    """What one of the commands adds to what they share; by default it makes pictures of prompts."""
    name: str                     # "asd.py"
    about: str                    # one line for --help
    methods: dict                 # {name: row}, all of one dataclass
    phis: dict                    # {name: what makes the φ}, as --phi and config.json have it
    choices: dict                 # {"omega": names, "optimizer": names}
    build: Callable               # (settings, prior, method, rng, folder, anew) -> (state, cond);
    #                               `anew`: no checkpoint is read afterwards
    loop: Callable                # (prior, generator, cond, method, state=…, micro_batch, callback)
    default: str | None = "asd"   # the method that is taken where none is given
    add_flags: Callable = picture_flags     # (add): its own, as argparse's add_argument
    defaults: dict = field(default_factory=lambda: {
        "particles": 1, "init": None, "pixels": False, "real": None})   # of flags not in a row
    options: tuple = ()           # those of them that only some φ take; their default is None
    prompts: Callable = lambda settings: settings.get("prompt") or [""]     # names the folder
    check: Callable = lambda settings: None          # raises UserError; nothing is loaded yet
    finish: Callable = final_picture                 # … -> the picture to name
    measure: Callable = lambda settings, prior, state, images: {}           # {name: number}

    def phi_name(self, row):
        return next(name for name, phi in self.phis.items() if phi is row.phi)

    def row(self, settings):
        """The row that the settings describe. KeyError where they lack one of its fields."""
        kind = type(next(iter(self.methods.values())))
        told = {key: settings[key] for key in kind.__dataclass_fields__}
        return kind(**told | {"phi": self.phis[settings["phi"]]})


def takes(phi):
    """What the maker of a φ may be told beside prior and prompts: names."""
    return list(inspect.signature(phi).parameters)[2:]


def told(settings, phi):
    """Those of the settings that the maker of a φ takes; what is None keeps the φ's own default."""
    return {key: settings[key] for key in takes(phi) if settings.get(key) is not None}


# ------------------------------------------------------------------------------- flags, settings
def make_parser(command):
    """Flags named by the paper's symbols; what is not given comes from the method's row."""
    p = Parser(prog=command.name, description=command.about)
    add, some, methods = p.add_argument, number(float), command.methods
    command.add_flags(add)
    add("--method", metavar="NAME", help=f"one of {', '.join(methods)} (default "
        f"{command.default or 'none'})")
    add("--phi", choices=[name for name in command.phis if name not in methods],
        help="what predicts ε_φ")
    add("--model", help='"tiny-sd", a diffusers folder or a hub name (default tiny-sd)')
    add("--lam", type=some, help="λ, guidance (default 7.5)")
    add("--gamma", type=some, help="γ of Eqs. 9 and 10 (asd: default -1, in 3D -0.5; vsd: 0)")
    add("--eta", type=number(float, 0), help="η of Eq. 9, with --real (default 0.5)")
    add("--steps", type=number(int, 1), help="updates of θ (default 350; editing: 60; 3D: 600)")
    add("--lr", type=number(float, 0, 1e30), help="learning rate for θ (default 0.01; editing: "
        "0.03; 3D: 0.02)")
    add("--lr-end", type=number(float, 0, 1e30), help="it falls to this part of --lr "
        "(default 1; 3D: 0.05)")
    add("--optimizer", choices=list(command.choices["optimizer"]),
        help="of θ (default adam; editing: sgd)")
    add("--phi-lr", type=number(float, 0, 1e30), help="AdamW's for φ (default 1e-3)")
    add("--omega", choices=list(command.choices["omega"]),
        help="ω(t) (default 1; editing, 3D: sigma2)")
    add("--t-min", type=number(float, 0, 1), help="least t for θ, a fraction of T (default 0.02)")
    add("--t-max", type=number(float, 0, 1), help="largest t for θ (default 0.98)")
    add("--t-max-late", type=number(float, 0, 1), help="the same after --t-late of the steps "
        "(default 0.5)")
    add("--t-late", type=number(float, 0, 1), help="a fraction of the steps (default 0.5)")
    add("--lam-phi", type=some, help="guidance inside φ (default 1: none)")
    add("--phi-steps", type=number(int, 1), help="updates of φ per update of θ (default 1)")
    yes_or_no = argparse.BooleanOptionalAction
    add("--phi-first", action=yes_or_no, help="update φ before θ")
    add("--share-noise", action=yes_or_no, help="θ's t and ε for φ, too (Algorithm 1)")
    add("--fixed-noise", action=yes_or_no, help="one ε for θ throughout (LMC-SDS's trick)")
    add("--rank", type=number(int, 1), help="of the LoRA (default 4)")
    add("--tokens", type=number(int, 1), help="learnable words of the embedding (default 4)")
    add("--micro-batch", type=number(int, 1), help="pictures per UNet call (default: all)")
    add("--checkpointing", action="store_const", const=True, help="less memory for φ, more time")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), help="of all randomness (default 0)")
    add("--device", help="cpu, cuda, cuda:1, … (default auto: cuda where there is one)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the prior (default auto: bfloat16 on cuda, float32 on the cpu)")
    add("--save-every", type=number(int, 1), help="steps between checkpoints (default 50)")
    add("--out", metavar="DIR", help="default outputs/<method>-<prompt>-<seed>")
    add("--resume", metavar="DIR", help="go on with the run in this folder")
    return p


DEFAULTS = {"model": "tiny-sd", "rank": 4, "tokens": 4, "seed": 0, "save_every": 50,
            "checkpointing": False, "micro_batch": None, "device": "auto", "dtype": "auto"}
MAY_CHANGE = {"steps", "device", "save_every", "micro_batch"}     # of a run that is resumed


def read_settings(given, command):
    """Command line -> (settings, folder, resumed): rows, defaults and a resumed run filled in."""
    given = {key: value for key, value in given.items() if value is not None}
    resume, out = given.pop("resume", None), given.pop("out", None)
    if resume is not None:
        return resumed_settings(given, out, Path(resume), command), Path(resume), True
    methods, name = command.methods, given.get("method", command.default)
    if name not in methods:
        wrong = f"unknown method {name!r}: choose" if name else "give a --method,"
        raise UserError(f"{wrong} one of {', '.join(methods)}")
    settings = DEFAULTS | dict.fromkeys(command.options) | command.defaults \
        | asdict(methods[name]) | {"method": name, "phi": command.phi_name(methods[name])} | given
    command.check(settings)
    prompts = command.prompts(settings)
    if not all(prompt.strip() for prompt in prompts):
        raise UserError('give a --prompt that is not empty, such as --prompt "a red apple"')
    if any("\ud800" <= letter <= "\udfff" for letter in "".join(prompts)):
        raise UserError("the prompt is not valid text (UTF-8)")
    late = settings["t_max_late"] if settings["t_late"] < 1 else 1.0
    if settings["t_min"] > min(settings["t_max"], late):
        raise UserError(f"--t-min {settings['t_min']} is above --t-max {settings['t_max']} "
                        f"or --t-max-late {settings['t_max_late']}")
    check_phi(settings, command)
    name = re.sub(r"[^a-z0-9]+", "-", prompts[0].lower()).strip("-")[:40]
    folder = Path(out or Path("outputs") / f"{settings['method']}-{name}-{settings['seed']}")
    if out is None:                    # an earlier run of the same name is kept
        tries = (folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))
        folder = next(f for f in (folder, *tries) if claimed(f, settings, command))
    elif (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a run: --resume it, or choose another --out")
    elif not claimed(folder, settings, command):
        raise UserError(f"{folder} is not empty: choose another --out, as nothing is written over")
    return settings, folder, False


def claimed(folder, settings, command):
    """Make a new or empty folder this run's, at once: config.json. -> whether it could be had."""
    if folder.is_dir() and any(folder.iterdir()):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    try:                                # of two runs that start together one finds it there
        with (folder / "config.json").open("x", encoding="utf-8") as file:
            file.write(json.dumps({"program": command.name, "settings": settings}))
    except FileExistsError:
        return False
    return True


def unclaim(folder):
    """Leave nothing of a run that has not begun, neither its folder nor an empty outputs/."""
    if [path.name for path in folder.iterdir()] == ["config.json"]:
        (folder / "config.json").unlink()
        for path in (folder, folder.parent):
            if not any(path.iterdir()) and path.resolve() != Path.cwd():
                path.rmdir()


def check_phi(settings, command):
    """--phi, and what only some φ are told: UserError where they do not belong to the method."""
    method, phi = settings["method"], settings["phi"]
    own, trained = command.methods[method].phi, type(command.methods[method])().phi
    chosen, called = command.phis[phi], next(k for k, v in command.phis.items() if v is trained)
    if chosen is not own is not trained:
        raise UserError(f"--method {method} is its φ: drop --phi {phi}")
    others = [name for name, row in command.methods.items() if row.phi is chosen is not own]
    if others:
        raise UserError(f"--phi {phi} is --method {others[0]}; {method} needs one to train")
    if settings["lam_phi"] != 1 and chosen is not trained:
        raise UserError("--lam-phi is guidance inside a trained φ that is told y or ∅: "
                        f"--phi {called}")
    for option in command.options:
        if settings[option] is not None and option not in takes(chosen):
            whose = [name for name, maker in command.phis.items() if option in takes(maker)]
            of = "--method" if whose[0] in command.methods else "--phi"
            raise UserError(f"--{option.replace('_', '-')} is for {of} {' or '.join(whose)}")


def resumed_settings(given, out, folder, command):
    """The settings of the run in `folder`; of those given, only MAY_CHANGE may be others."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        settings, made_by = dict(config["settings"]), config.get("program", command.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run to resume: config.json cannot be read "
                        f"({type(error).__name__})") from error
    if made_by != command.name:
        raise UserError(f"{folder} holds a run of {made_by}: resume it with that")
    changed = [k for k, v in given.items() if k not in MAY_CHANGE and settings.get(k) != v]
    if out is not None or changed:
        flags = ["--" + key.replace("_", "-") for key in changed] or ["--out"]
        raise UserError(f"a resumed run keeps its settings: drop {', '.join(flags)}")
    settings = DEFAULTS | dict.fromkeys(command.options) | command.defaults | settings | given
    try:
        command.row(settings)
        command.check(settings)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run to resume: config.json lacks {error}") from error
    return settings


# -------------------------------------------------------------------------------- files, pictures
@contextmanager
def moved_into(path):
    """A temporary path beside `path`, moved there if all went well and removed if not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    with moved_into(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_image(path, size, ground="white"):
    """A picture file -> RGB [1, 3, H, W] in [0, 1] of `size` = (H, W): on white, cropped to fit.

    Raises UserError where it cannot be read.
    """
    import numpy as np
    from PIL import Image, ImageOps
    try:
        picture = ImageOps.exif_transpose(Image.open(path))       # as cameras turn them
        if picture.mode.startswith("I"):          # 16-bit grey, which convert() would clip
            picture = Image.fromarray((np.array(picture) / 257).round().astype("uint8"))
        picture = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__})") from error
    ground = Image.new("RGBA", picture.size, ground)
    picture = Image.alpha_composite(ground, picture).convert("RGB")
    picture = ImageOps.fit(picture, size[::-1], Image.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def read_folder(path, size):
    """The pictures of a folder, by name, or one -> RGB [N, 3, H, W], as read_image has them."""
    files = [Path(path)] if Path(path).is_file() else sorted(
        p for p in Path(path).glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"{path} is no folder with pictures (png, jpg, webp)")
    return torch.cat([read_image(file, size) for file in files])


def encode_folder(prior, path):
    """The pictures of a folder, or one -> x0 [N, C, H, W], on the prior's device."""
    with torch.no_grad():
        return torch.cat([prior.encode_image(part.to(prior.device))
                          for part in read_folder(path, prior.image_size).split(16)])


def write_grid(path, images, columns, least=256):
    """images [N, 3, H, W] uint8 -> a PNG, `columns` to a row, each enlarged to `least` pixels."""
    from PIL import Image
    n, _, height, width = images.shape
    rows = math.ceil(n / columns)
    blank = torch.full((rows * columns - n, 3, height, width), 255, dtype=torch.uint8)
    grid = torch.cat([images, blank]).view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    picture = Image.fromarray(grid.reshape(rows * height, columns * width, 3).numpy())
    scale = max(1, round(least / height))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    with moved_into(path) as temporary:
        picture.save(temporary, format="PNG")


def picture_measures(images):
    """RGB [B, 3, H, W] -> mean HSV saturation and mean |Laplacian| (sharpness), both in [0, …]."""
    high, low = images.amax(1), images.amin(1)
    grey = images.mean(1)
    laplacian = (4 * grey[:, 1:-1, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1]
                 - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:])
    return {"saturation": ((high - low) / high.clamp(min=1e-6)).mean().item(),
            "sharpness": laplacian.abs().mean().item()}


# ------------------------------------------------------------------------------------- the run
def save_checkpoint(path, state, frames):
    """All that a run needs to go on, in one safetensors file."""
    from safetensors.torch import save
    tensors = state.tensors() | {f"frame.{step}": frame for step, frame in frames.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(tensors, {"format": "asd checkpoint 1", "step": str(state.step)})
    with moved_into(path) as temporary:
        temporary.write_bytes(data)


def load_checkpoint(path, state):
    """Restore `state`; -> {step: frame}. Raises UserError for a corrupt or foreign file."""
    from safetensors import safe_open
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}
        if about.get("format") != "asd checkpoint 1":
            raise ValueError("not a checkpoint of this program")
        state.load_tensors(named, int(about["step"]))
    except Exception as error:
        raise UserError(f"{path} cannot be resumed: {type(error).__name__}: {error}") from error
    return {int(name.split(".")[1]): value for name, value in named.items() if "frame." in name}


def usable(device):
    """A --device, checked; None or "auto" is cuda where there is one. UserError where it cannot be.
    """
    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].split(" device type")[0][:90]
        raise UserError(f"--device {device} cannot be used here: {reason}") from error
    return device


def set_up(command, settings, folder, checkpoint=None):
    """settings -> (prior, cond, method, state, frames), from a checkpoint where one is given."""
    dtype = None if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
    prior = Prior.from_pretrained(settings["model"], usable(settings["device"]), dtype)
    method, rng = command.row(settings), torch.Generator().manual_seed(settings["seed"])
    try:
        state, cond = command.build(settings, prior, method, rng, folder, checkpoint is None)
    except ValueError as error:
        raise UserError(error) from error
    asked = [*command.prompts(settings), *getattr(state.phi, "texts", [])]
    unknown = sorted({word for text in asked for word in prior.unknown_words(text)})
    if unknown:
        print(f"{command.name}: {prior.name} has never seen: {', '.join(unknown)}", file=sys.stderr)
    frames = load_checkpoint(checkpoint, state) if checkpoint else {}
    return prior, cond, method, state, frames


def run(command, settings, folder, resumed):
    """One run of the command line, from its settings to its pictures."""
    from tqdm import tqdm
    checkpoint, metrics = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
    # a run that was stopped before its first checkpoint starts anew
    going_on = checkpoint if resumed and checkpoint.exists() else None
    try:
        prior, cond, method, state, frames = set_up(command, settings, folder, going_on)
    except BaseException:
        if not resumed:
            unclaim(folder)
        raise
    if state.step > method.steps:
        raise UserError(f"{folder} has {state.step} steps already: --steps {method.steps} is less")
    lines = metrics.read_text("utf-8").splitlines() if going_on and metrics.exists() else []
    write_text(metrics, "".join(line + "\n" for line in lines[:state.step]))
    write_text(folder / "config.json", json.dumps(
        {"program": command.name, "settings": settings, "python": platform.python_version(),
         "device": str(prior.device), "dtype": str(prior.dtype)}
        | {package: version(package) for package in ("torch", "diffusers", "transformers", "peft")},
        indent=1, ensure_ascii=False))
    film = {round(i * method.steps / 9) for i in range(10)}

    def record(state, terms):
        """One line of metrics, a frame of the film, a checkpoint, where it is their turn."""
        row = {"step": state.step} | terms
        if state.step in film or state.step % 10 == 0:
            images = state.generator.images()
            row |= picture_measures(images)
            if state.step in film:
                row |= command.measure(settings, prior, state, images)
                frames[state.step] = (images[:4] * 255).round().byte().cpu()
        log.write(json.dumps(row) + "\n")
        log.flush()
        if state.step % settings["save_every"] == 0 or state.step == method.steps:
            save_checkpoint(checkpoint, state, frames)
        bar.update()
        bar.set_postfix(loss_G=f"{terms['loss_G']:.2f}", loss_D=f"{terms['loss_D']:.1f}",
                        ms=f"{1000 * terms['seconds']:.0f}")

    if 0 not in frames:
        frames[0] = (state.generator.images()[:4] * 255).round().byte().cpu()
    with tqdm(total=method.steps, initial=state.step, desc=settings["method"]) as bar, \
            metrics.open("a") as log:
        command.loop(prior, state.generator, cond, method, state=state, callback=record,
                     micro_batch=settings["micro_batch"])
    strip = torch.stack([frames[step] for step in sorted(frames)], 1).flatten(0, 1)
    write_grid(folder / "progress.png", strip, len(frames), 128)
    state.phi.save(folder / "phi")
    if prior.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(prior.device) / 2 ** 30
        print(f"peak memory: {peak:.2f} GiB", file=sys.stderr)
    print(command.finish(folder, settings, prior, state))


def main(command, argv=None):
    """The command line of a Command. -> exit status."""
    folder, name = None, command.name
    try:
        settings, folder, resumed = read_settings(vars(make_parser(command).parse_args(argv)),
                                                  command)
        run(command, settings, folder, resumed)
    except (UserError, FloatingPointError, OSError, SafetensorError, ImportError) as mistake:
        mend = ": pip install -r requirements.txt" if isinstance(mistake, ImportError) else ""
        print(f"{name}: {' '.join(str(mistake).split()) or type(mistake).__name__}{mend}",
              file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) \
                and "DefaultCPUAllocator" not in str(error):
            raise
        print(f"{name}: out of memory: try --micro-batch 1, --checkpointing or less at once",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        held = folder is not None and (folder / "config.json").exists()
        print(f"\n{name}: stopped" + f"; go on with --resume {folder}" * held, file=sys.stderr)
        return 130
    return 0
