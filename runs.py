"""runs.py — what asd.py, editing.py and nerf.py share: flags, folders, checkpoints, pictures.

    python asd.py --prompt "a red apple"       calls main() below

What differs between them is a Program, a record of functions; asd.py's, ASD, is the last one here.

A run lives in one folder: config.json (every setting), metrics.jsonl (a line per step),
checkpoint.safetensors (θ, φ, both optimisers, the state of the generator of randomness, the step,
the frames of the film), and at the end final.png, progress.png and phi/. What a run goes on from is
written beside its place and moved into it when it is whole, so that a run killed at any moment can
be resumed; on the CPU the resumed run ends in the same bits. A user's mistake is one line and exit
status 2.
"""
import argparse
import functools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

from asd import (
    METHODS,
    OMEGAS,
    OPTIMIZERS,
    Latents,
    Method,
    Pixels,
    Prior,
    State,
    UserError,
    distill,
    make_phi,
)


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


def all_methods():
    """asd.METHODS, and where variants.py is beside it, its rows."""
    try:
        from variants import METHODS as more
    except ImportError:
        more = {}
    return METHODS | more


@dataclass(frozen=True)
class Program:
    """What one of the programs adds to what they share."""
    name: str                     # "asd.py"
    about: str                    # one line for --help
    methods: Callable             # () -> {name: row}, all of one dataclass, `row`
    add_flags: Callable           # (add): its own, as argparse's add_argument
    defaults: dict                # of flags that are not in a method's row
    prompts: Callable             # (settings) -> the texts; the first one names the folder
    check: Callable               # (settings): raises UserError; nothing is loaded yet
    build: Callable               # (settings, prior, method, rng, folder, anew)
    #                               -> (generator, cond, phi, second); `anew`: no checkpoint is read
    finish: Callable              # (folder, settings, prior, state) -> the picture to name
    measure: Callable             # (settings, prior, state, images) -> {name: number}
    row: type = Method


def make_parser(program):
    """Flags named by the paper's symbols; what is not given comes from the method's row."""
    p = Parser(prog=program.name, description=program.about)
    add, some = p.add_argument, number(float)
    program.add_flags(add)
    add("--method", metavar="NAME", help=f"one of {', '.join(program.methods())} (default asd)")
    add("--phi", choices=["noise", "lora", "embedding", "exact"], help="what predicts ε_φ")
    add("--model", help='"tiny-sd", a diffusers folder or a hub name (default tiny-sd)')
    add("--lam", type=some, help="λ, guidance (default 7.5)")
    add("--gamma", type=some, help="γ of Eq. 10 (asd: default -1, in 3D -0.5; vsd: 0)")
    add("--steps", type=number(int, 1), help="updates of θ (default 350; editing: 60; 3D: 600)")
    add("--lr", type=number(float, 0, 1e30), help="learning rate for θ (default 0.01; editing: "
        "0.03; 3D: 0.02)")
    add("--lr-end", type=number(float, 0, 1e30), help="it falls to this part of --lr (default 1; "
        "3D: 0.05)")
    add("--optimizer", choices=list(OPTIMIZERS), help="of θ (default adam; editing: sgd)")
    add("--phi-lr", type=number(float, 0, 1e30), help="AdamW's for φ (default 1e-3)")
    add("--omega", choices=list(OMEGAS), help="ω(t) (default 1; editing, 3D: sigma2)")
    add("--t-min", type=number(float, 0, 1), help="least t for θ, a fraction of T (default 0.02)")
    add("--t-max", type=number(float, 0, 1), help="largest t for θ (default 0.98)")
    add("--t-max-late", type=number(float, 0, 1), help="the same after --t-late of the steps "
        "(default 0.5)")
    add("--t-late", type=number(float, 0, 1), help="a fraction of the steps (default 0.5)")
    add("--lam-phi", type=some, help="guidance inside φ (default 1: none)")
    add("--phi-steps", type=number(int, 1), help="updates of φ per update of θ (default 1)")
    add("--phi-first", action="store_const", const=True, help="update φ before θ")
    add("--share-noise", action="store_const", const=True, help="θ's t and ε for φ (Algorithm 1)")
    add("--fixed-noise", action="store_const", const=True, help="one ε for θ throughout (LMC-SDS)")
    add("--rank", type=number(int, 1), help="of the LoRA (default 4)")
    add("--tokens", type=number(int, 1), help="learnable words of the embedding (default 4)")
    add("--negative", metavar="TEXT", help="csd, nfsd: the negative prompt")
    add("--source-words", metavar="TEXT", help="bridge: what the pictures are; {} is the prompt")
    add("--target-words", metavar="TEXT", help="bridge: what is wanted of them; {} is the prompt")
    add("--bridge-steps", type=number(int, 1), help="bridge: steps of its ODEs (default 1)")
    add("--bridge-start", type=number(float, 0, 1), help="bridge: where it begins, a fraction of "
        "the steps (default 0.5; with --source-words 0)")
    add("--bandwidth", type=number(float, 0, 1e30), help="--phi exact: each particle's blur h")
    add("--corrective", metavar="FILE", help="lmc: its network (default corrective.safetensors)")
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


DEFAULTS = {"method": "asd", "model": "tiny-sd", "rank": 4, "tokens": 4, "seed": 0,
            "save_every": 50, "checkpointing": False, "micro_batch": None, "device": "auto",
            "dtype": "auto"}
# what only some φ are told (variants.py); None: the φ's own default
WORDS = {"negative": ("csd", "nfsd"), "source_words": ("bridge",), "target_words": ("bridge",),
         "bridge_steps": ("bridge",), "bridge_start": ("bridge",), "bandwidth": ("exact",),
         "corrective": ("lmc",)}
DEFAULTS |= dict.fromkeys(WORDS)
MAY_CHANGE = {"steps", "device", "save_every", "micro_batch"}     # of a run that is resumed


def read_settings(given, program):
    """Command line -> (settings, folder, resumed): rows, defaults and a resumed run filled in."""
    given = {key: value for key, value in given.items() if value is not None}
    resume, out = given.pop("resume", None), given.pop("out", None)
    if resume is not None:
        return resumed_settings(given, out, Path(resume), program), Path(resume), True
    methods = program.methods()
    method = methods.get(given.get("method", "asd"))
    if method is None:
        raise UserError(f"unknown method {given['method']!r}: choose one of {', '.join(methods)}")
    settings = DEFAULTS | program.defaults | asdict(method) | given
    program.check(settings)
    if any("\ud800" <= letter <= "\udfff" for letter in "".join(program.prompts(settings))):
        raise UserError("the prompt is not valid text (UTF-8)")
    late = settings["t_max_late"] if settings["t_late"] < 1 else 1.0
    if settings["t_min"] > min(settings["t_max"], late):
        raise UserError(f"--t-min {settings['t_min']} is above --t-max {settings['t_max']} "
                        f"or --t-max-late {settings['t_max_late']}")
    if settings["phi"] == "noise" and method.phi == "lora":
        raise UserError(f"--phi noise is --method sds; {settings['method']} needs one to train")
    if settings["phi"] != method.phi != "lora":
        raise UserError(f"--method {settings['method']} is its φ: drop --phi {settings['phi']}")
    if settings["lam_phi"] != 1 and settings["phi"] != "lora":
        raise UserError("--lam-phi is guidance inside a trained φ that is told y or ∅: --phi lora")
    for word, kinds in WORDS.items():
        if settings[word] is not None and settings["phi"] not in kinds:
            flag, of = word.replace("_", "-"), "--phi" if kinds == ("exact",) else "--method"
            raise UserError(f"--{flag} is for {of} {' or '.join(kinds)}")
    name = re.sub(r"[^a-z0-9]+", "-", program.prompts(settings)[0].lower()).strip("-")[:40]
    folder = Path(out or Path("outputs") / f"{settings['method']}-{name}-{settings['seed']}")
    if out is None:                    # an earlier run of the same name is kept
        tries = (folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))
        folder = next(f for f in (folder, *tries) if not (f / "config.json").exists())
    elif (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a run: --resume it, or choose another --out")
    return settings, folder, False


def resumed_settings(given, out, folder, program):
    """The settings of the run in `folder`; of those given, only MAY_CHANGE may be others."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        settings, made_by = dict(config["settings"]), config.get("program", program.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run to resume: config.json cannot be read "
                        f"({type(error).__name__})") from error
    if made_by != program.name:
        raise UserError(f"{folder} holds a run of {made_by}: resume it with that")
    changed = [k for k, v in given.items() if k not in MAY_CHANGE and settings.get(k) != v]
    if out is not None or changed:
        flags = ["--" + key.replace("_", "-") for key in changed] or ["--out"]
        raise UserError(f"a resumed run keeps its settings: drop {', '.join(flags)}")
    settings = DEFAULTS | program.defaults | settings | given
    try:
        program.row(**{key: settings[key] for key in program.row.__dataclass_fields__})
        program.check(settings)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run to resume: config.json lacks {error}") from error
    return settings


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
    """The pictures of a folder, by name -> RGB [N, 3, H, W], as read_image has them."""
    files = sorted(p for p in Path(path).glob("*") if p.suffix.lower() in
                   (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"{path} is no folder with pictures (png, jpg, webp)")
    return torch.cat([read_image(file, size) for file in files])


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


def distances(before, after, source, target):
    """Pictures [B, 3, H, W] in [0, 1] -> {"psnr" to `before` in dB; "clip_distance", 1 − cosine of
    the pictures in tiny-clip's features; "clip_target", "clip_source": cosines with the prompts}.
    """
    error = (after - before).square().mean((1, 2, 3)).clamp(min=1e-10)
    numbers = {"psnr": (-10 * error.log10()).mean().item()}
    features = clip_features([before, after], [source, target])
    if features is None:
        return numbers
    a, b, (z, y) = features
    return numbers | {"clip_distance": (1 - (a * b).sum(1)).mean().item(),
                      "clip_target": (b @ y).mean().item(), "clip_source": (b @ z).mean().item()}


@functools.cache
def load_judge():
    """tiny-clip, the small CLIP beside this file, and its tokenizer; None where they are not."""
    try:
        import tiny_sd
        return tiny_sd.load_clip(Path(__file__).with_name("tiny-clip"), "cpu")
    except (ImportError, UserError):
        return None


def clip_features(batches, texts):
    """Batches of RGB [B, 3, H, W] in [0, 1] and T texts -> their unit vectors [B, 128], …, [T, 128]
    in tiny-clip; None where it cannot be had."""
    if load_judge() is None:
        return None
    import tiny_sd
    clip, tokenizer = load_judge()
    small = [torch.nn.functional.interpolate(x.cpu(), (64, 64), mode="area") for x in batches]
    return *(tiny_sd.image_features(clip, x) for x in small), \
        tiny_sd.text_features(clip, tokenizer, texts)


def clip_score(images, prompt):
    """Mean cosine of RGB [B, 3, H, W] with the prompt in tiny-clip; None where it is not there."""
    features = clip_features([images], [prompt])
    return features and (features[0] @ features[1].T).mean().item()


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


def set_up(program, settings, folder, checkpoint=None):
    """settings -> (prior, cond, method, state, frames), from a checkpoint where one is given."""
    dtype = None if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
    prior = Prior.from_pretrained(settings["model"], usable(settings["device"]), dtype)
    method = program.row(**{key: settings[key] for key in program.row.__dataclass_fields__})
    rng = torch.Generator().manual_seed(settings["seed"])
    try:
        generator, cond, phi, second = program.build(settings, prior, method, rng, folder,
                                                     checkpoint is None)
    except ValueError as error:
        raise UserError(error) from error
    asked = [*program.prompts(settings), *getattr(phi, "texts", [])]
    unknown = sorted({word for text in asked for word in prior.unknown_words(text)})
    if unknown:
        print(f"{program.name}: {prior.name} has never seen: {', '.join(unknown)}", file=sys.stderr)
    state = State(generator, phi, method, rng, second)
    frames = load_checkpoint(checkpoint, state) if checkpoint else {}
    return prior, cond, method, state, frames


def phi_of(settings, prior, method, prompt):
    """φ as the settings describe it; ValueError where they cannot be had.

    prompt: a text, or the list of all that the run can ask.
    """
    return make_phi(method.phi, prior, prompt, settings["rank"], settings["tokens"],
                    settings["checkpointing"], settings["seed"], lam=method.lam,
                    gamma=method.gamma, steps=method.steps, **{w: settings[w] for w in WORDS})


def run(program, settings, folder, resumed):
    """One run of the command line, from its settings to its pictures."""
    from tqdm import tqdm
    checkpoint, metrics = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
    # a run that was stopped before its first checkpoint starts anew
    going_on = checkpoint if resumed and checkpoint.exists() else None
    prior, cond, method, state, frames = set_up(program, settings, folder, going_on)
    if state.step > method.steps:
        raise UserError(f"{folder} has {state.step} steps already: --steps {method.steps} is less")
    folder.mkdir(parents=True, exist_ok=True)
    lines = metrics.read_text("utf-8").splitlines() if going_on and metrics.exists() else []
    write_text(metrics, "".join(line + "\n" for line in lines[:state.step]))
    write_text(folder / "config.json", json.dumps(
        {"program": program.name, "settings": settings, "python": platform.python_version(),
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
                row |= program.measure(settings, prior, state, images)
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
        distill(prior, state.generator, cond, method, state=state, callback=record,
                micro_batch=settings["micro_batch"])
    strip = torch.stack([frames[step] for step in sorted(frames)], 1).flatten(0, 1)
    write_grid(folder / "progress.png", strip, len(frames), 128)
    state.phi.save(folder / "phi")
    if prior.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(prior.device) / 2 ** 30
        print(f"peak memory: {peak:.2f} GiB", file=sys.stderr)
    print(program.finish(folder, settings, prior, state))


def main(argv=None, program=None):
    """The command line of `program` (default: asd.py's). -> exit status."""
    program, folder = program or ASD, None
    name = program.name
    try:
        settings, folder, resumed = read_settings(vars(make_parser(program).parse_args(argv)),
                                                  program)
        run(program, settings, folder, resumed)
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


# ---------------------------------------------------------------------------------- asd.py's own
def asd_flags(add):
    add("--prompt", action="append", metavar="TEXT", help="what to make; repeat for several")
    add("--particles", type=number(int, 1), help="pictures per prompt, one φ for all (default 1)")
    add("--init", metavar="PNG", help="start from this picture, not from noise")
    add("--pixels", action="store_const", const=True, help="optimise RGB through the VAE's encoder")
    add("--generator", choices=["latents", "network"], help="network: learn to make all at once")


def check_prompts(settings):
    prompts = settings.get("prompt") or []
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError('give a --prompt that is not empty, such as --prompt "a red apple"')
    if settings["generator"] == "network" and (settings["init"] or settings["pixels"]):
        raise UserError("--generator network makes latents of noise: drop --init and --pixels")


def asd_build(settings, prior, method, rng, folder, anew):
    """Latents or Pixels for every prompt and particle, or the network that makes them; and φ."""
    init = read_image(settings["init"], prior.image_size) if anew and settings["init"] else None
    cond = prior.encode_text(settings["prompt"]).repeat_interleave(settings["particles"], 0)
    if settings["generator"] == "network":
        from variants import Network
        generator = Network(prior, cond, rng)
    else:
        generator = (Pixels if settings["pixels"] else Latents)(prior, len(cond), rng, init)
    return generator, cond, phi_of(settings, prior, method, settings["prompt"]), None


def asd_finish(folder, settings, prior, state):
    """final.png, the particles in a grid."""
    final = (state.generator.images() * 255).round().byte().cpu()
    write_grid(folder / "final.png", final, math.ceil(math.sqrt(len(final))))
    return folder / "final.png"


ASD = Program(
    name="asd.py", about="Optimise pictures until they look, to a frozen text-to-image diffusion "
    "model, like the prompt (Adversarial Score Distillation).",
    methods=all_methods, add_flags=asd_flags,
    defaults={"particles": 1, "init": None, "pixels": False, "generator": "latents"},
    prompts=lambda settings: settings["prompt"], check=check_prompts, build=asd_build,
    finish=asd_finish, measure=lambda settings, prior, state, images: {})
