"""cli/run.py — one run of a command, from its settings to its pictures; errors; several processes.

A run lives in one folder: config.json (every setting), metrics.jsonl (a line per step),
checkpoint.safetensors (θ, φ, both optimisers, the state of the generator of randomness, the step,
the frames of the film), progress.png, and at the end final.png and phi/. A run that is killed at
any moment can be resumed; on the CPU it ends in the same bits. A user's mistake is one line and
exit status 2. No method is known in this file, and no φ.
"""
import gc
import json
import math
import os
import platform
import re
import signal
import socket
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import get_origin

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from cli import files, pictures
from cli.settings import (
    flag_name,
    new_settings,
    options_of,
    parse_flags,
    plain_type,
    resumed_settings,
    row_defaults,
    run_name,
    settings_digest,
)
from prior import Prior, UserError, compile_blocks, usable


# ------------------------------------------------------------------------------ what a command is
def prompts_of_pictures(settings):
    """The prompts, of which the first names the folder."""
    return settings.prompt or [""]


def nothing(*_):
    """What a command does that adds nothing: {}."""
    return {}


def final_picture(folder, settings, prior, state):
    """Write final.png, a grid of all that the generator shows. -> its path"""
    images = pictures.to_bytes(state.generator.images())
    pictures.write_grid(folder / "final.png", images, math.ceil(math.sqrt(len(images))))
    return folder / "final.png"


@dataclass
class Command:
    """What one of the commands adds to what they share; by default it makes pictures of prompts."""
    name: str                     # "asd.py"
    about: str                    # one line for --help
    settings: type                # its model in cli/settings.py
    methods: dict                 # {name: row}, all of one dataclass
    phis: dict                    # {name: what makes the φ}
    names: dict                   # {setting: the names that it may have}
    build: Callable               # (settings, prior, method, rng, folder, new) -> (state, cond);
    #                               not new: a checkpoint replaces θ and the generator's buffers
    loop: Callable                # asd.distill
    default_method: str | None = "asd"
    defaults: dict = field(default_factory=dict)          # of settings that are in no row
    paper: dict = field(default_factory=dict)             # {method: (source, settings)}, published
    implied: Callable = nothing   # (flags) -> settings that follow from other flags
    prompts: Callable = prompts_of_pictures
    check: Callable = nothing     # (settings): UserError before anything is loaded
    measure: Callable = nothing   # (settings, prior, state, images) -> {name: number}
    preview: Callable = nothing   # (folder, state): writes pictures beside progress.png
    finish: Callable = final_picture                      # … -> the picture to name
    divisible: bool = True        # whether several processes can divide its samples
    elsewhere: str = ""           # where other methods are, for the line about an unknown one

    def __post_init__(self):
        """A row's φ that has no name of its own goes by the row's."""
        self.phis = self.phis | {name: row.phi for name, row in self.methods.items()
                                 if row.phi not in self.phis.values()}

    @property
    def choices(self):
        """{setting: the names that it may have}."""
        return self.names | {"method": self.methods, "phi": self.phis}

    def phi_name(self, method):
        """The name of a method's own φ."""
        return next(name for name, phi in self.phis.items() if phi is self.methods[method].phi)

    def row(self, settings):
        """The row that the settings describe."""
        row = self.methods[settings.method]
        values = {column.name: getattr(settings, column.name) for column in fields(row)
                  if hasattr(settings, column.name)}
        return replace(row, **values | {"phi": self.phis[settings.phi]})


# ------------------------------------------------------------------------------ lines, and errors
def say(name, message):
    """Print one line on stderr, at most 300 characters, all of them printable."""
    line = f"{name}: {' '.join(str(message).split())}"
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    if len(line) > 300:
        line = f"{line[:180]} ... {line[-115:]}"
    print(line, file=sys.stderr)


class Forgiving:
    """A stream that drops, without an error, what does not fit on a full disk."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def open_streams():
    """Open what the shell has closed (>&-), and let letters pass that a terminal does not have."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush(stream):
    """OSError where nobody takes what it holds; that is then dropped, or Python fails at its end.
    """
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def out_of_memory(error):
    """Whether an error says that there is not enough memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(
        re.search("DefaultCPUAllocator|ation overflow", str(error)))


def show_warning(name, message, *_):
    """Print a warning in a line; takes what warnings.showwarning takes."""
    from tqdm import tqdm
    if speaks():
        with tqdm.external_write_mode(sys.stderr):       # a bar goes on below the line
            say(name, message)


MISTAKES = (UserError, FloatingPointError, OSError, SafetensorError, ImportError, Warning)


def guarded(name, work, memory="--micro-batch 1, --checkpointing or less at once", mistakes=()):
    """Call work() and return its exit status, or 0. A mistake is one line: 2; Ctrl-C: 130.

    memory: what helps where there is too little.
    """
    open_streams()
    # from here on Ctrl-C is an exception, as there are things to put in order
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == "cli.start":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with redirect_stderr(Forgiving(sys.stderr)), warnings.catch_warnings():
        warnings.showwarning = partial(show_warning, name)
        status = status_of(name, work, memory, mistakes)
    with suppress(OSError):
        flush(sys.stderr)
    return status


def status_of(name, work, memory, mistakes):
    """guarded()'s exit status; the line is printed."""
    try:
        try:
            status = work() or 0
        finally:                             # also after --help, which ends the program
            flush(sys.stdout)
        return status
    except BrokenPipeError:                  # what reads stdout, such as head, has read enough
        return 141
    except (*MISTAKES, *mistakes) as mistake:
        line, status = str(mistake).strip() or type(mistake).__name__, 2
        if isinstance(mistake, ImportError):
            line += ": copy all of the folder, and pip install -r requirements.txt"
    except KeyboardInterrupt as stop:
        if "cli.start" in sys.modules:       # the command ends: a second Ctrl-C has no more to stop
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        line, status = f"stopped{''.join(map(str, stop.args))}", 130
        if speaks():
            print(file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        line, status = f"out of memory: try {memory}", 2
    if speaks():
        say(name, line)
    return status


# ------------------------------------------------------------------------------ several processes
def launched():
    """Whether torchrun or accelerate started this process."""
    return bool(os.environ.get("RANK") and os.environ.get("MASTER_ADDR"))


def process_number():
    """This process's number among those that torchrun or accelerate started; alone it is 0."""
    rank = os.environ.get("RANK", "")
    return int(rank) if launched() and rank.isdecimal() else 0


def speaks():
    """Whether this process prints: of several that torchrun started, or that joined, the first.

    A RANK by itself may be left over from a cluster: then this one is all that the user has.
    """
    several = dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ
    return not several or process_number() == 0


# with the other processes, at the start; where it was not torchrun that has set RANK, shorter
PATIENCE = timedelta(seconds=60 if "TORCHELASTIC_RUN_ID" in os.environ else 12)


def join_processes(command):
    """Join the processes that torchrun or accelerate started, if there are several."""
    if not launched():
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "").isdecimal():
            raise wrong_launch(f"{name} is no number, as torchrun sets it")
    size, host = int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    if int(os.environ["MASTER_PORT"]) > 65535:
        raise wrong_launch("MASTER_PORT is above 65535")
    if process_number() >= size:
        raise wrong_launch(f"RANK is {process_number()}, WORLD_SIZE {size}")
    if size == 1:
        return
    if not command.divisible:
        raise wrong_launch(f"{command.name} is one process, and WORLD_SIZE is {size}")
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise wrong_launch(f"MASTER_ADDR {host}: {error}") from error
    # the first process listens, or torchrun's agent in its place
    if process_number() > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        wait_for_listener(host, int(os.environ["MASTER_PORT"]))
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
        store.set(f"joined {rank}", "")
        store.wait([f"joined {other}" for other in range(size)], PATIENCE)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise wrong_launch(f"MASTER_PORT {os.environ['MASTER_PORT']} is in use") from error
        raise wrong_launch(f"the other processes of WORLD_SIZE {size} have not come within "
                           f"{PATIENCE.seconds} s") from error
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", store=store, rank=rank,
                            world_size=size)
    if process_number() == 0:                         # torchrun stops all where one has ended
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def wait_for_listener(host, port):
    """Wait until somebody listens there. UserError after PATIENCE: torch would try much longer."""
    deadline = time.monotonic() + PATIENCE.seconds
    while True:
        try:
            socket.create_connection((host, port), 1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise wrong_launch(f"nobody listens at MASTER_ADDR {host}, MASTER_PORT {port}, "
                                   f"within {PATIENCE.seconds} s") from error
        time.sleep(0.2)


def wrong_launch(message):
    """The error for variables that another program left behind; each process may print it."""
    os.environ.pop("RANK", None)
    return UserError(f"{message}: unset RANK to run one process")


def check_divisible(state):
    """UserError where there are fewer samples than processes."""
    if not dist.is_initialized():
        return
    samples = getattr(state.generator, "batch", 1)
    if getattr(state.phi, "whole", False):            # such a φ has to see all samples at once
        samples = 1
    if samples < dist.get_world_size():
        raise UserError(f"{dist.get_world_size()} processes are too many for {samples} samples: "
                        "raise --particles or --views")


# ----------------------------------------------------------------------------------- the run
class Run:
    """One run: the prior, the loop's State, and what is written into the folder on the way."""

    def __init__(self, command, settings, folder, resumed):
        self.command, self.settings, self.folder = command, settings, folder
        self.digest = settings_digest(settings)
        self.checkpoint = None
        if folder is not None:
            self.checkpoint = folder / "checkpoint.safetensors"
        # a run that was stopped before its first checkpoint starts anew
        self.goes_on = resumed and self.checkpoint.exists()
        self.frames, self.writing = {}, None
        if settings.threads:
            torch.set_num_threads(settings.threads)

    def make(self):
        """Load the prior, build θ, φ and the State, and restore the checkpoint, if there is one."""
        settings, command, dtype = self.settings, self.command, None
        if settings.dtype != "auto":
            dtype = getattr(torch, settings.dtype)
        self.prior = Prior.from_pretrained(settings.model, usable(settings.device), dtype,
                                           settings.size, settings.config, settings.lora,
                                           settings.lora_scale)
        if settings.vae_tiling:
            self.prior.vae.enable_tiling()
        self.method, rng = command.row(settings), torch.Generator().manual_seed(settings.seed)
        try:
            self.state, self.cond = command.build(settings, self.prior, self.method, rng,
                                                  self.folder, not self.goes_on)
        except ValueError as error:
            raise UserError(error) from error
        check_divisible(self.state)
        self.check_heeded()
        self.weights = files.fingerprint(self.prior, self.state.phi)
        if settings.compile:
            self.compile()
        self.prior.release_text_encoders()
        if self.goes_on:
            self.frames = files.load_checkpoint(self.checkpoint, self.state, self.weights,
                                                self.digest)
        if self.state.step > self.method.steps:
            raise UserError(f"{self.folder} has {self.state.step} steps already: --steps "
                            f"{self.method.steps} is less")

    def check_heeded(self):
        """UserError for settings of a φ that learns, where it does not."""
        if self.state.opt_phi is not None:
            return
        usual = row_defaults(self.command, self.settings.model_dump())
        names = {"gamma", "phi_lr", "phi_steps", "share_noise"}
        for name in sorted(names - set(options_of(self.method.phi))):      # --phi exact takes γ
            if getattr(self.settings, name) != usual[name]:
                raise UserError(f"{flag_name(name)} is of a φ that learns, and that of --method "
                                f"{self.settings.method} does not: drop it")

    def compile(self):
        """Compile the prior's network and each φ's view of it, once each."""
        owners = [self.prior, self.state.phi, getattr(self.state.second, "phi", None)]
        networks = {getattr(owner, name, None) for owner in owners for name in ("network", "view")}
        for network in networks - {None}:
            compile_blocks(network)

    def loop(self, callback):
        """Go on until the last step."""
        self.command.loop(self.prior, self.state.generator, self.cond, self.method,
                          state=self.state, micro_batch=self.settings.micro_batch,
                          callback=callback)

    def execute(self):
        """Do all of it; only process 0 writes."""
        from tqdm import tqdm
        self.make()
        if process_number() > 0:
            self.loop(None)
            return
        self.begin()
        with (tqdm(total=self.method.steps, initial=self.state.step,
                   desc=self.settings.method) as self.bar,
              (self.folder / "metrics.jsonl").open("a") as self.log,
              ThreadPoolExecutor(1) as self.writer):
            try:
                self.loop(self.record)
            except KeyboardInterrupt:
                self.write_progress({self.state.step: self.frame()})
                raise
            if self.writing:
                self.writing.result()
        self.finish()

    def begin(self):
        """Write config.json, and the metrics that the checkpoint covers; say what runs."""
        settings, name = self.settings, self.command.name
        files.write_text(self.folder / "metrics.jsonl", "".join(self.metrics_so_far()))
        self.source = "measured on tiny-sd"
        if settings.settings == "paper":
            none = "none are published, measured on tiny-sd", {}
            self.source = self.command.paper.get(settings.method, none)[0]
        shown = [f"{key} {getattr(settings, key)}"
                 for key in ("lam", "gamma", "omega", "lr", "phi_lr", "steps")]
        say(name, f"{settings.method}, settings {settings.settings} ({self.source}): "
                  f"{', '.join(shown)}")
        self.write_config()
        texts = [*self.command.prompts(settings), *getattr(self.state.phi, "texts", [])]
        unknown = sorted({word for text in texts for word in self.prior.unknown_words(text)})
        if len(unknown) <= 4:                         # more would not fit into a line
            unknown = [with_nearest(self.prior, word) for word in unknown]
        if unknown:
            say(name, f"{self.prior.name} has never seen: {', '.join(unknown)}")
        self.film = {round(i * self.method.steps / 9) for i in range(10)}
        if 0 not in self.frames:
            self.frames[0] = self.frame()

    def metrics_so_far(self):
        """The lines of metrics.jsonl up to the State's step; what is no such line is dropped."""
        path, lines = self.folder / "metrics.jsonl", {}
        text = files.read_text(path) if self.goes_on and path.exists() else ""
        for line in text.splitlines():
            with suppress(ValueError, AttributeError, RecursionError):
                step = json.loads(line).get("step")
                if type(step) is int and 1 <= step <= self.state.step:
                    lines[step] = line + "\n"
        return [lines[step] for step in sorted(lines)]

    def write_config(self, **more):
        """Write config.json: the settings, and what the run was made with."""
        packages = ("torch", "diffusers", "transformers", "peft")
        config = {"program": self.command.name, "settings": self.settings.model_dump(mode="json"),
                  "settings_from": self.source, "device": str(self.prior.device),
                  "dtype": str(self.prior.dtype), "python": platform.python_version()}
        config |= {package: version(package) for package in packages} | more
        files.write_text(self.folder / "config.json",
                         json.dumps(config, indent=1, ensure_ascii=False))

    def frame(self, images=None):
        """The first four pictures, as a frame of the film."""
        if images is None:
            images = self.state.generator.images()
        return pictures.to_bytes(images[:4])

    def write_progress(self, more=None):
        """Write progress.png, the film so far, and the command's own preview."""
        frames = self.frames | (more or {})
        strip = torch.stack([frames[step] for step in sorted(frames)], 1).flatten(0, 1)
        pictures.write_grid(self.folder / "progress.png", strip, len(frames), 128)
        self.command.preview(self.folder, self.state)

    def record(self, state, terms):
        """Write a line of metrics; at their steps a frame of the film and a checkpoint, too."""
        row, step = {"step": state.step} | terms, state.step
        if step in self.film or step % 10 == 0:
            images = state.generator.images()
            row |= pictures.picture_measures(images)
        if step in self.film:
            row |= self.command.measure(self.settings, self.prior, state, images)
            self.frames[step] = self.frame(images)
            self.write_progress()
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        if step % self.settings.save_every == 0 or step == self.method.steps:
            self.save()
        self.bar.update()
        self.bar.set_postfix(grad_norm=f"{terms['grad_norm']:.2f}",
                             loss_D=f"{terms['loss_D']:.1f}", ms=f"{1000 * terms['seconds']:.0f}")

    def save(self):
        """Write a checkpoint while the run goes on. An error of the last one is raised first."""
        if self.writing:
            self.writing.result()
        copy = files.snapshot(self.state, self.frames)
        self.writing = self.writer.submit(files.save_checkpoint, self.checkpoint, copy,
                                          self.state.step, self.weights, self.digest)

    def finish(self):
        """Write the last pictures and φ, and name the picture to look at."""
        self.write_progress()
        if (self.folder / "phi").is_symlink():            # where it leads something else may lie
            (self.folder / "phi").unlink()
        self.state.phi.save(self.folder / "phi")
        if self.prior.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.prior.device) / 2 ** 30
            print(f"peak memory: {peak:.2f} GiB", file=sys.stderr)
        picture = self.command.finish(self.folder, self.settings, self.prior, self.state)
        self.write_config(picture=picture.name)
        print(picture)


def with_nearest(prior, word):
    """A word that the prior has never seen, with those it knows that are spelt most like it."""
    near = prior.nearest_words(word)
    return f"{word} (nearest: {', '.join(near)})" if near else word


# --------------------------------------------------------------------------------- the command line
def flags_of(command, argv=None):
    """Parse the command line of a Command: {setting: text}, of what was given."""
    def defaults(given):
        if command.default_method is None and "method" not in given:
            return {}
        return row_defaults(command, given)
    phis = [name for name in command.phis if name not in command.methods]
    return parse_flags(command.name, command.about, command.settings, argv,
                       command.choices | {"phi": phis}, defaults)


def main(command, argv=None):
    """Run the command line of a Command. -> exit status."""
    def work():
        return start(command, flags_of(command, argv))
    return guarded(command.name, work)


def start(command, given):
    """Make the run, or the runs, that the flags ask for. -> exit status, or None for 0."""
    if "prompts_file" in given:
        return run_prompts(command, given)
    join_processes(command)
    folder = None
    try:
        with ExitStack() as stack:
            settings, folder, resumed = open_run(command, given, stack)
            Run(command, settings, folder, resumed).execute()
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(how_to_go_on(folder)) from stop
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise UserError(f"another process has ended{how_to_go_on(folder)}") from error
    if dist.is_initialized():
        dist.destroy_process_group()


def open_run(command, given, stack):
    """-> the settings of a run; its folder, locked by process 0; whether it was there before."""
    if "resume" in given:
        folder = Path(given["resume"])
        if folder.is_dir() and process_number() == 0:
            stack.enter_context(files.locked(folder))
        settings = resumed_settings(command, folder, given)
        check_kept(folder)
        return settings, folder, True
    settings = new_settings(command, given)
    if process_number() > 0:
        return settings, None, False
    config = {"program": command.name, "settings": settings.model_dump(mode="json")}
    folder = files.open_folder(stack, settings.out, run_name(settings, command), config)
    return settings, folder, False


def check_kept(folder):
    """UserError where a finished run has lost its checkpoint: it would be made again, over it.

    And where something that is not the run's would stop it at its end.
    """
    picture = json.loads(files.read_text(folder / "config.json")).get("picture")
    if picture is not None and not (folder / "checkpoint.safetensors").exists():
        raise UserError(f"{folder} was finished, and has no checkpoint.safetensors to go on from: "
                        "choose another --out, as nothing is written over")
    if (folder / "phi").exists() and not (folder / "phi").is_dir():
        raise UserError(f"{folder / 'phi'} is in the way of the run's folder of that name: move it "
                        "away")


def how_to_go_on(folder):
    """The end of a line, where there is a run to go on with."""
    if folder is None or not (folder / "config.json").exists():
        return ""
    return f"; go on with --resume {folder}"


def run_prompts(command, given):
    """Make a run for each line of a file, by whichever process is free. -> the worst status."""
    if given.keys() & {"prompt", "resume"}:
        raise UserError("--prompts-file names the prompts: drop --prompt and --resume")
    lines, several = files.read_prompts(given["prompts_file"]), launched()
    os.environ.pop("RANK", None)                      # from now on each process works alone
    given = {name: value for name, value in given.items() if name != "prompts_file"}
    runs, worst = {}, 0
    for prompt in lines:
        flags = given | {"prompt": prompt}
        if get_origin(plain_type(command.settings.model_fields["prompt"].annotation)) is list:
            flags["prompt"] = [prompt]
        name = run_name(new_settings(command, flags), command)
        if f" {prompt} " not in name.replace("-", " "):             # another may be called so
            name += f"-{zlib.crc32(prompt.encode()):08x}"
        runs[Path(given.get("out", "outputs")) / name] = flags
    for folder, flags in runs.items():
        status = guarded(command.name, partial(run_prompt, command, folder, flags))
        worst = max(worst, status)
        if status == 130:
            return worst
        if status and not folder.exists():            # none of the other lines would begin
            break
    for folder in runs:
        if worst and several and folder.is_dir():     # torchrun stops all where one has failed
            with files.locked(folder, wait=True):
                pass
    return worst


def run_prompt(command, folder, flags):
    """Make or finish the run of one prompt, unless it is done, or another process has it."""
    gc.collect()                                      # the last run's model
    with suppress(files.FolderBusy):
        if not (folder / "config.json").exists():
            start(command, flags | {"out": str(folder)})
            return
        flags = flags | {"resume": str(folder)}
        flags.pop("out", None)
        steps = resumed_settings(command, folder, flags).steps
        config = json.loads(files.read_text(folder / "config.json"))
        if "picture" not in config or config["settings"]["steps"] < steps:
            start(command, flags)
