"""runs.py — what the commands share: flags, folders, settings, checkpoints, pictures, errors.

What a command is, is a record of functions, Command: asd.py, variants.py, editing.py and
text_to_3d.py hand theirs to main(). No method is known here, and no φ.

A run lives in one folder: config.json (every setting), metrics.jsonl (a line per step),
checkpoint.safetensors (θ, φ, both optimisers, the state of the generator of randomness, the step,
the frames of the film), and at the end final.png, progress.png and phi/. What a run goes on from is
written beside its place and moved into it when it is whole, so that a run killed at any moment can
be resumed; on the CPU it ends in the same bits. A user's mistake is one line and exit status 2.
"""
import argparse
import inspect
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from export import picture_measures, write_grid, write_text
from files import (
    claimed,
    copied,
    fingerprint,
    held,
    load_checkpoint,
    read_lines,
    read_text,
    regular,
    save_checkpoint,
    unclaim,
)
from prior import Prior, UserError, compile_blocks, usable


# ------------------------------------------------------------- what all commands read, and print
class Parser(argparse.ArgumentParser):
    """Errors on one line; −1e-2 is a number, not a flag; words are valid text."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for word in args:                  # bytes that are not UTF-8 arrive as lone surrogates
            if re.search("[\0\ud800-\udfff]", word):
                self.error(f"{word!r} is not valid text (UTF-8)")
        return super().parse_args(args, namespace)

    def error(self, message):
        sys.exit(2 if rank() else say(self.prog, f"{message} (--help lists the options)"))


def number(kind, low=-1e30, high=None):
    """An argparse type: a number of `kind` in [low, high]; integers end at 10⁹, others at 10³⁰."""
    high = (10 ** 9 if kind is int else 1e30) if high is None else high

    def convert(text):
        value = kind(text)
        if not low <= value <= high:                                       # nan, too
            raise argparse.ArgumentTypeError(
                f"{text} is not a finite number in [{low:g}, {high:g}]")
        return value
    convert.__name__, convert.kinds = kind.__name__, {int, kind}         # kinds: in config.json
    return convert


def place(text):
    """An argparse type: a file or folder, to be found from any directory; a name as it is."""
    there = text not in ("", "tiny-sd") and regular(text).exists()
    return str(Path(text).resolve()) if there else text


def say(name, message):
    """One line on stderr, at most 300 characters, all of them printable. -> a mistake's status."""
    line = f"{name}: {' '.join(str(message).split())}"
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    print(line if len(line) <= 300 else f"{line[:180]} ... {line[-115:]}", file=sys.stderr)
    return 2


class Forgiving:
    """A stream; what it does not take, on a full disk, is lost, and no error."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        def attempt(*text):
            with suppress(OSError):
                getattr(self.stream, name)(*text)
        return attempt if name in ("write", "flush") else getattr(self.stream, name)


def flush_stdout():
    """OSError where the disk behind it is full; what it holds is dropped, or Python fails again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def rank():
    """This process's number among those that torchrun or accelerate has started; None: one."""
    return int(os.environ["RANK"]) if {"RANK", "MASTER_ADDR"} <= os.environ.keys() else None


def guarded(name, work, less="--micro-batch 1 or --checkpointing", go_on=str, mistakes=UserError,
            loud=True):
    """work() -> its exit status, or 0. Mistakes are one line (if loud). go_on(): after Ctrl-C."""
    with redirect_stderr(Forgiving(sys.stderr)):
        if hasattr(sys.stdout, "reconfigure"):       # letters that a terminal does not have
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            status = work() or 0
            flush_stdout()
        except (UserError, FloatingPointError, OSError, SafetensorError, ImportError, Warning,
                mistakes) as mistake:
            if isinstance(mistake, UserError) and not loud:       # the first process has said it
                return 2
            mend = ": pip install -r requirements.txt" if isinstance(mistake, ImportError) else ""
            return say(name, f"{str(mistake).strip() or type(mistake).__name__}{mend}")
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, dist.DistError) or "/gloo/" in str(error):
                return say(name, f"another process has ended{go_on()}") if loud else 1
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) \
                    and not re.search("DefaultCPUAllocator|ation overflow", str(error)):
                raise
            return say(name, f"out of memory: try {less}")
        except KeyboardInterrupt:
            if loud:
                print(file=sys.stderr)
                say(name, f"stopped{go_on()}")
            return 130
    return status


# ------------------------------------------------------------------------------ several processes
class Ranks:
    """The processes that torchrun or accelerate started; asd.distill() shares a step among them.

    Number `rank` of `size` has the units rank, rank + size, … of the samples. All draw the same
    numbers, and every unit's gradient is summed in the units' order, whoever computed it: so all
    have the same θ and φ throughout, and in the same bits for any number of processes.
    """

    def __init__(self):
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.rank == 0:                            # torchrun stops all where one has ended
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def backward(self, losses, optimizer, count):
        """asd.Share.backward() of `count` units, of which some are here. -> all numbers."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        losses, told, total = iter(losses), [], None
        for first in range(0, count, self.size):
            loss, number = next(losses, (None, torch.zeros(())))
            if loss is not None:
                loss.backward()
            flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat += [flat[0].new_tensor([p.grad is not None for p in parameters]), number]
            flat = torch.cat([each.flatten().to(flat[0]) for each in flat])
            optimizer.zero_grad()
            everybody = [torch.empty_like(flat) for _ in range(self.size)]
            dist.all_gather(everybody, flat)
            for each in everybody[:count - first]:
                total = each if total is None else total + each
                told.append(each[-1].item())
        *grads, there, _ = total.split([*(p.numel() for p in parameters), len(parameters), 1])
        for p, grad, has in zip(parameters, grads, there.tolist(), strict=True):
            p.grad = grad.view_as(p) if has else None
        return told


# ------------------------------------------------------------------------------ what a command is
def picture_flags(add):
    """The flags of a command that makes pictures of its prompts."""
    add("--prompt", action="append", metavar="TEXT", help="what to make; repeat for several")
    add("--particles", type=number(int, 1), help="pictures per prompt, one φ for all (default 1)")
    add("--init", type=place, metavar="PNG", help="start from this picture, not from noise")
    add("--pixels", action="store_const", const=True, help="optimise RGB through the VAE's encoder")
    add("--real", type=place, metavar="PNG_OR_DIR", help="real pictures: φ learns by Eq. 9")


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
    defaults: dict = field(default_factory=lambda: {                    # of flags not in a row
        "prompt": None, "particles": 1, "init": None, "pixels": False, "real": None})
    options: tuple = ()           # those of them that only some φ take; their default is None
    prompts: Callable = lambda settings: settings.get("prompt") or [""]     # names the folder
    check: Callable = lambda settings: None          # raises UserError; nothing is loaded yet
    finish: Callable = final_picture                 # … -> the picture to name
    measure: Callable = lambda settings, prior, state, images: {}           # {name: number}
    paper: tuple = ("", {})       # the paper's settings, for real models: (source, {name: value})
    shared: bool = True           # whether several processes may share a run

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
    if "prompt" in command.defaults:
        add("--prompts-file", type=place, metavar="FILE", help="a run for each unfinished line")
    add("--method", metavar="NAME", help=f"one of {', '.join(methods)} (default "
        f"{command.default or 'none'})")
    add("--phi", choices=[name for name in command.phis if name not in methods],
        help="what predicts ε_φ")
    add("--model", type=place, help='"tiny-sd" (default), a diffusers folder, a hub name, or a '
        ".safetensors file, with --config")
    add("--config", type=place, metavar="DIR", help="of a --model file: a folder of such a model")
    add("--size", type=number(int, 8, 8192), help="pixels of a side (default: the model's own)")
    add("--settings", choices=["tiny", "paper"], help="whose defaults: those measured on tiny-sd, "
        "or the paper's (default tiny for tiny-sd, paper for every other model)")
    add("--lam", type=some, help="λ, guidance (default 7.5)")
    add("--gamma", type=some, help="γ of Eqs. 9 and 10 (asd: default -1, in 3D -0.5; vsd: 0)")
    add("--eta", type=number(float, 0), help="η of Eq. 9, with --real (default 0.5)")
    add("--steps", type=number(int, 1), help="updates of θ (default 350; editing: 60; 3D: 600)")
    add("--lr", type=number(float, 0), help="learning rate for θ (default 0.01; editing: "
        "0.03; 3D: 0.02)")
    add("--lr-end", type=number(float, 0, 1e6), help="it falls to this part of --lr "
        "(default 1; 3D: 0.05)")
    add("--optimizer", choices=list(command.choices["optimizer"]),
        help="of θ (default adam; editing: sgd)")
    add("--phi-lr", type=number(float, 0), help="AdamW's for φ (default 1e-3)")
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
    add("--phi-init", type=place, metavar="LORA", help="a folder or file that φ's LoRA starts at")
    add("--tokens", type=number(int, 1), help="learnable words of the embedding (default 4)")
    add("--micro-batch", type=number(int, 1), help="pictures at a time (default: all; 1 where "
        "several processes share them)")
    add("--checkpointing", action="store_const", const=True, help="less memory for φ, more time")
    add("--compile", action="store_const", const=True, help="the networks' repeated blocks; meant "
        "for CUDA: on the CPU a step of tiny-sd gains 3 to 10 %%, less than the minute it takes")
    add("--vae-tiling", action="store_const", const=True, help="less memory for large pictures")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), help="of all randomness (default 0)")
    add("--device", help="cpu, cuda, cuda:1, … (default auto: cuda where there is one)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the prior (default auto: bfloat16 on cuda, float32 on the cpu)")
    add("--save-every", type=number(int, 1), help="steps between checkpoints (default 50)")
    add("--out", metavar="DIR", help="default outputs/<method>-<prompt>-<seed>")
    add("--resume", metavar="DIR", help="go on with the run in this folder")
    return p


DEFAULTS = {"model": "tiny-sd", "rank": 4, "tokens": 4, "seed": 0, "save_every": 50,
            "checkpointing": False, "micro_batch": None, "device": "auto", "dtype": "auto",
            "config": None, "size": None, "phi_init": None, "vae_tiling": False, "compile": False}
MAY_CHANGE = {"steps", "device", "save_every", "micro_batch"}     # of a run that is resumed


def read_settings(given, command, claim=True):
    """Command line -> (settings, folder, resumed): rows, defaults and a resumed run filled in.
    claim: take a new folder; else there is none."""
    given = {key: value for key, value in given.items() if value is not None}
    resume, out = given.pop("resume", None), given.pop("out", None)
    if resume is not None:
        return resumed_settings(given, out, Path(resume), command), Path(resume), True
    embedded = given.get("model", "tiny-sd") == "tiny-sd"
    column = given.get("settings", "tiny" if embedded else "paper")
    settings = usual(given.get("method", command.default), command, column) | given
    check(settings, command)
    if not claim:
        return settings, None, False
    folder = Path(out or Path("outputs") / named(settings, command))
    config = {"program": command.name, "settings": settings}
    if out is None:                    # an earlier run of the same name is kept
        tries = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2))
        folder = next(f for f in itertools.chain([folder], tries) if claimed(f, config))
    elif not claimed(folder, config):
        raise UserError(f"{folder} already holds a run (--resume it), or is not empty: choose "
                        "another --out, as nothing is written over")
    return settings, folder, False


def named(settings, command):
    """A run's name, such as asd-a-red-apple-0."""
    text = re.sub(r"[^a-z0-9]+", "-", command.prompts(settings)[0].lower()).strip("-")[:40]
    return f"{settings['method']}-{text}-{settings['seed']}"


def usual(name, command, column="tiny"):
    """All settings of a method that is told nothing but whose they are, "tiny" or "paper".

    UserError where it is not the command's.
    """
    if name not in command.methods:
        wrong = f"unknown method {name!r}: choose" if name else "give a --method,"
        raise UserError(f"{wrong} one of {', '.join(command.methods)}")
    row, paper = command.methods[name], command.paper[1] if column == "paper" else {}
    return DEFAULTS | dict.fromkeys(command.options) | command.defaults | asdict(row) | paper | {
        "method": name, "phi": command.phi_name(row), "settings": column}


def check(settings, command):
    """What can be said of settings before anything is loaded or written. Raises UserError."""
    command.check(settings)
    if not all(prompt.strip() for prompt in command.prompts(settings)):
        raise UserError('give a --prompt that is not empty, such as --prompt "a red apple"')
    late = settings["t_max_late"] if settings["t_late"] < 1 else 1.0
    if settings["t_min"] > min(settings["t_max"], late):
        raise UserError(f"--t-min {settings['t_min']} is above --t-max {settings['t_max']} "
                        f"or --t-max-late {settings['t_max_late']}")
    # --phi, and what only some φ are told
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
    for option in (*command.options, "phi_init"):
        if settings[option] is not None and option not in takes(chosen):
            whose = [name for name, maker in command.phis.items() if option in takes(maker)]
            of = "--method" if whose[0] in command.methods else "--phi"
            raise UserError(f"--{option.replace('_', '-')} is for {of} {' or '.join(whose)}")


def resumed_settings(given, out, folder, command):
    """The settings of the run in `folder`; of those given, only MAY_CHANGE may be others."""
    try:
        config = json.loads(read_text(folder / "config.json"))
        made_by = config.get("program", command.name)
        if made_by != command.name:
            raise UserError(f"it is a run of {made_by}: resume it with that")
        settings = told_again(config["settings"], command)
    except Exception as error:              # such JSON may be anything
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{folder} holds no run to resume: config.json: {reason}") from error
    changed = [k for k, v in given.items() if k not in MAY_CHANGE and settings.get(k) != v]
    if out is not None or changed:
        flags = ["--" + key.replace("_", "-") for key in changed] or ["--out"]
        raise UserError(f"a resumed run keeps its settings: drop {', '.join(flags)}")
    check(settings | given, command)
    return settings | given


def told_again(stored, command):
    """Stored settings, told the parser once more: UserError for what a flag would not take."""
    def refuse(message):
        raise UserError(message)
    parser, words = make_parser(command), []
    parser.error = refuse
    column = "paper" if stored.get("settings") == "paper" else "tiny"
    settings = usual(str(stored["method"]), command, column)
    row = asdict(command.methods[stored["method"]])
    for action in parser._actions:
        key, flag, default = action.dest, action.option_strings[0], settings.get(action.dest)
        value = stored[key] if key in row else stored.get(key, default)
        if key not in settings or (value == default and type(value) is type(default)):
            continue
        kinds = getattr(action.type, "kinds", {bool} if action.nargs == 0 else {str})
        many = action.nargs == 2 or isinstance(action, argparse._AppendAction)
        parts = value if many else [value]
        if not isinstance(parts, list) or not {type(part) for part in parts} <= kinds:
            refuse(f"{flag} cannot be {json.dumps(value)}")
        if kinds == {bool}:
            words.append(action.option_strings[0 if value else -1])
        else:
            words += [flag, *map(str, parts)] if action.nargs else [f"{flag}={x}" for x in parts]
    return settings | {key: value for key, value in vars(parser.parse_args(words)).items()
                       if key in settings and value is not None}


# ------------------------------------------------------------------------------------- the run
def set_up(command, settings, folder, checkpoint=None):
    """settings -> (prior, its fingerprint, y, method, state, frames), from a checkpoint or new."""
    dtype = None if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
    prior = Prior.from_pretrained(settings["model"], usable(settings["device"]), dtype,
                                  settings["size"], settings["config"])
    if settings["vae_tiling"]:
        prior.vae.enable_tiling()
    weights = fingerprint(prior)
    method, rng = command.row(settings), torch.Generator().manual_seed(settings["seed"])
    try:
        state, cond = command.build(settings, prior, method, rng, folder, checkpoint is None)
    except ValueError as error:
        raise UserError(error) from error
    if settings["compile"]:                       # the prior's and each φ's view of the network
        owners = (prior, state.phi, getattr(state.second, "phi", None))
        views = {getattr(owner, name, None) for owner in owners for name in ("network", "view")}
        for network in views - {None}:
            compile_blocks(network)
    prior.release_text_encoders()
    frames = load_checkpoint(checkpoint, state, weights) if checkpoint else {}
    return prior, weights, cond, method, state, frames


def run(command, settings, folder, resumed, ranks=None):
    """One run of the command line, from its settings to its pictures, which number 0 writes."""
    from tqdm import tqdm
    # a run that was stopped before its first checkpoint starts anew
    checkpoint = folder and folder / "checkpoint.safetensors"
    going_on = checkpoint if resumed and checkpoint.exists() else None
    try:
        prior, weights, cond, method, state, frames = set_up(command, settings, folder, going_on)
        if ranks and ranks.size > 1:
            whole = getattr(state.phi, "whole", not hasattr(state.generator, "parts"))
            units = 1 if whole else -(-state.generator.batch // (settings["micro_batch"] or 1))
            if units < ranks.size:
                raise UserError(f"{ranks.size} processes are too many for {units} parts, "
                                "--particles or --views over --micro-batch")
    except BaseException:
        if folder and not resumed:
            unclaim(folder)
        raise
    loop = partial(command.loop, prior, state.generator, cond, method, state=state,
                   micro_batch=settings["micro_batch"], ranks=ranks)
    if state.step > method.steps:
        raise UserError(f"{folder} has {state.step} steps already: --steps {method.steps} is less")
    if ranks and ranks.rank:
        loop(callback=None)
        return
    metrics = folder / "metrics.jsonl"
    lines = read_text(metrics).splitlines() if going_on and metrics.exists() else []
    write_text(metrics, "".join(line + "\n" for line in lines[:state.step]))
    source = command.paper[0] if settings["settings"] == "paper" else "measured on tiny-sd"
    named = (f"{key} {settings[key]}" for key in ("lam", "gamma", "omega", "lr", "phi_lr", "steps"))
    say(command.name, f"{settings['method']}, settings {settings['settings']} ({source}): "
        f"{', '.join(named)}")
    config = {
        "program": command.name, "settings": settings, "python": platform.python_version(),
        "settings_from": source, "device": str(prior.device), "dtype": str(prior.dtype)} | {
        package: version(package) for package in ("torch", "diffusers", "transformers", "peft")}
    keep = lambda **more: write_text(folder / "config.json", json.dumps(
        config | more, indent=1, ensure_ascii=False))
    keep()
    asked = [*command.prompts(settings), *getattr(state.phi, "texts", [])]
    unknown = sorted({word for text in asked for word in prior.unknown_words(text)})
    if unknown:
        say(command.name, f"{prior.name} has never seen: {', '.join(unknown)}")
    film, writing = {round(i * method.steps / 9) for i in range(10)}, None

    def record(state, terms):
        """One line of metrics, a frame of the film, a checkpoint, where it is their turn."""
        nonlocal writing
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
            if writing:
                writing.result()                  # an error of it is one of this run's
            writing = writer.submit(save_checkpoint, checkpoint, copied(state, frames), state.step,
                                    weights)
        bar.update()
        bar.set_postfix(loss_G=f"{terms['loss_G']:.2f}", loss_D=f"{terms['loss_D']:.1f}",
                        ms=f"{1000 * terms['seconds']:.0f}")

    if 0 not in frames:
        frames[0] = (state.generator.images()[:4] * 255).round().byte().cpu()
    with tqdm(total=method.steps, initial=state.step, desc=settings["method"]) as bar, \
            metrics.open("a") as log, ThreadPoolExecutor(1) as writer:
        loop(callback=record)
        if writing:
            writing.result()
    strip = torch.stack([frames[step] for step in sorted(frames)], 1).flatten(0, 1)
    write_grid(folder / "progress.png", strip, len(frames), 128)
    state.phi.save(folder / "phi")
    if prior.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(prior.device) / 2 ** 30
        print(f"peak memory: {peak:.2f} GiB", file=sys.stderr)
    picture = command.finish(folder, settings, prior, state)
    keep(picture=picture.name)
    print(picture)


def many(command, given, file):
    """A run for each line of a file, but what is done, or another's now. -> the worst status."""
    import gc
    if given["prompt"] or given["resume"]:
        raise UserError("--prompts-file names the prompts: drop --prompt and --resume")
    several = isinstance(make_parser(command).parse_args(["--prompt", "a"]).prompt, list)
    asked, worst = {}, 0
    for text in read_lines(file):
        one = given | {"prompt": [text] if several else text}
        name = named(read_settings(one, command, False)[0], command)
        if f" {text} " not in name.replace("-", " "):                # there may be another such
            name += f"-{zlib.crc32(text.encode()):08x}"
        asked[Path(given["out"] or "outputs") / name] = one
    for folder, one in asked.items():

        def work(folder=folder, one=one):
            with held(folder) as mine:
                config = folder / "config.json"
                gc.collect(2 * torch.cuda.is_available())     # a model less, before the next one
                if mine and not config.exists():
                    run(command, *read_settings(one | {"out": str(folder)}, command))
                elif mine:
                    resumed = read_settings(one | {"resume": folder, "out": None}, command)
                    about = json.loads(read_text(config))
                    if "picture" not in about or about["settings"]["steps"] < resumed[0]["steps"]:
                        run(command, *resumed)
        worst = max(worst, guarded(command.name, work))
        if worst == 130:
            break
    for folder in asked if worst and rank() is not None else ():      # torchrun would stop them
        with held(folder, wait=True):
            pass
    return worst


def main(command, argv=None):
    """The command line of a Command. -> exit status."""
    folder = None

    def work():
        nonlocal folder
        given, ranks = vars(make_parser(command).parse_args(argv)), None
        if file := given.pop("prompts_file", None):
            return many(command, given, file)
        if rank() is not None:
            if not command.shared and os.environ.get("WORLD_SIZE") != "1":
                raise UserError("one process alone can do this")
            ranks = Ranks()
        settings, folder, resumed = read_settings(given, command, not rank())
        run(command, settings, folder, resumed, ranks)
        if ranks:
            dist.destroy_process_group()

    return guarded(command.name, work, go_on=lambda: f"; go on with --resume {folder}" * (
        folder is not None and (folder / "config.json").exists()), loud=not rank())
