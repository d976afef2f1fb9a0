"""cli/files.py — what a run reads and keeps: texts, pictures, its folder, its checkpoint.

Nothing that is read is trusted: what cannot be used is a UserError, one line for the user. Every
file is written under a temporary name and moved into place; tensors are stored as safetensors.
"""
import fcntl
import hashlib
import itertools
import json
import os
import re
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from prior import UserError


# -------------------------------------------------------------------------------------- texts
def check_text(text, *, where="a setting"):
    """Return the text. UserError, which says where, if it is not valid UTF-8, or holds NUL."""
    # bytes of the command line that are not UTF-8 arrive as lone surrogates
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: {text!r} is not valid text: UTF-8 without NUL is needed, and a "
                        "locale of UTF-8")
    return text


def regular(path):
    """The Path of a file or folder. UserError for a pipe or a device, which may never end."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder")
    return path


def read_text(path):
    """Return what a text file holds. UserError where it is no text."""
    try:
        return regular(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_prompts(path):
    """Read a text of one prompt a line, from a file, a pipe, or stdin, which is "-".

    Empty lines and those that begin with # are left out. UserError where no prompt is left.
    """
    path = "/dev/stdin" if str(path) == "-" else path
    if Path(path).is_block_device() or Path(path).is_char_device():
        raise UserError(f"{path} is a device, not a file of prompts")
    try:
        lines = re.split("[\r\n]+", Path(path).read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    lines = [check_text(line.strip(), where=path) for line in lines]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path} holds no prompt: one per line is needed")
    return prompts


# --------------------------------------------------------------------------------- whole files
@contextmanager
def moved_into(path):
    """Yield a temporary path beside `path`; what was written there is moved to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)         # of a killed run; a link would lead elsewhere
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Write a text file as a whole."""
    with moved_into(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------ pictures
def read_image(path, size, ground="white"):
    """Read a picture file as RGB [1, 3, H, W] in [0, 1], cropped to size = (H, W).

    What is transparent shows the ground. UserError where it cannot be read.
    """
    import numpy as np
    from PIL import Image, ImageOps
    regular(path)
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            picture = ImageOps.exif_transpose(Image.open(file))       # as the camera was held
            picture = to_8_bits(picture, path).convert("RGBA")
    except UserError:
        raise
    except Exception as error:              # every format raises errors of its own
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__})") from error
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)
    picture = ImageOps.fit(picture.convert("RGB"), size[::-1], Image.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def to_8_bits(picture, path):
    """Return a grey picture of 16 bits, or of floats in [0, 1], with 8 bits; others as they are.

    UserError for what has no known white: integers of 32 bits, floats beyond 1.
    """
    import numpy as np
    from PIL import Image
    values = np.array(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((values / 257).round().astype("uint8"))
    if picture.mode == "F" and values.min() >= 0 and values.max() <= 1:
        return Image.fromarray((values * 255).round().astype("uint8"))
    if picture.mode in ("F", "I"):
        raise UserError(f"{path} cannot be read as a picture: save its grey values with 8 or 16 "
                        "bits, or as floats in [0, 1]")
    return picture


def read_folder(path, size):
    """Read one picture, or those of a folder by name, as RGB [N, 3, H, W] in [0, 1]."""
    path = Path(path)
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    files = [path] if path.is_file() else sorted(
        file for file in path.glob("*") if file.suffix.lower() in kinds)
    if not files:
        raise UserError(f"{path} is no folder with pictures (png, jpg, webp)")
    return torch.cat([read_image(file, size) for file in files])


@torch.no_grad()
def encode_folder(prior, path):
    """Read one picture or a folder of them as x0 [N, C, H, W], on the prior's device."""
    batches = read_folder(path, prior.image_size).split(16)
    return torch.cat([prior.encode_image(batch.to(prior.device)) for batch in batches])


# --------------------------------------------------------------------------- the folder of a run
class FolderTaken(UserError):
    """The folder holds something already."""


class FolderBusy(FolderTaken):
    """Another process is at work in the folder."""


@contextmanager
def locked(folder, wait=False):
    """Keep a folder to this process. FolderBusy where another one has it, or wait for that one.

    The lock is the system's and lies on the folder itself, so it ends with the process.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if wait:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            lock_at_once(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def lock_at_once(descriptor, folder):
    """Lock an open folder. FolderBusy where another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FolderBusy(f"another process is at work in {folder}") from error


@contextmanager
def new_folder(folder, config):
    """Make a folder, lock it and write config.json into it. FolderTaken where it is not empty.

    If the run fails before it has written anything else, nothing of the folder stays.
    """
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise FolderTaken(f"{folder} is a file, or a link to nothing, not a folder: choose another "
                          "--out")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if any(folder.iterdir()):
            run = (folder / "config.json").exists() and config["program"] != "nerf.py"
            raise FolderTaken(f"{folder} is not empty: choose another --out, as nothing is written "
                              "over" + ("; the run there goes on with --resume" if run else ""))
        write_text(folder / "config.json", json.dumps(config))
        try:
            yield folder
        except BaseException:
            if [path.name for path in folder.iterdir()] == ["config.json"]:
                (folder / "config.json").unlink()
                for path in made:
                    if not any(path.iterdir()):
                        path.rmdir()
            raise


def open_folder(stack, out, name, config):
    """Make and lock a new run's folder, until the stack ends: `out`, or outputs/name, name-2, …"""
    if out is not None:
        return stack.enter_context(new_folder(Path(out), config))
    for number in itertools.count(1):
        folder = Path("outputs") / name
        if number > 1:
            folder = Path("outputs") / f"{name}-{number}"
        with suppress(FolderTaken):
            return stack.enter_context(new_folder(folder, config))


# ---------------------------------------------------------------------------- the state of a run
def named_parameters(state):
    """Yield (name, tensor, its optimiser or None): θ, φ, and the generator's buffers."""
    for name, optimizer in (("theta", state.opt_theta), ("phi", state.opt_phi)):
        groups = optimizer.param_groups if optimizer else []
        parameters = [parameter for group in groups for parameter in group["params"]]
        for i, parameter in enumerate(parameters):
            yield f"{name}.{i}", parameter, optimizer
    for name, buffer in state.generator.named_buffers():
        yield f"buffer.{name}", buffer, None


def tensors(state):
    """Return {name: tensor} of all that a State consists of, but for the step."""
    named = {"rng": state.rng.get_state(), "eps": state.eps, "real": state.real}
    for name, tensor, optimizer in named_parameters(state):
        named[name] = tensor.detach()
        moments = optimizer.state.get(tensor, {}) if optimizer else {}
        for key, moment in moments.items():
            named[f"{name}.{key}"] = moment
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def load_tensors(state, named, step):
    """Restore a State from tensors(). KeyError, ValueError or RuntimeError if they do not fit."""
    def stored(name, like):
        if (named[name].shape, named[name].dtype) != (like.shape, like.dtype):
            raise ValueError(f"{name} has another shape or type")
        return named[name].to(like.device, copy=True)

    for name, tensor, optimizer in named_parameters(state):
        tensor.data.copy_(stored(name, tensor))
        if f"{name}.step" not in named:                # it had no gradient yet, hence no moments
            continue
        count = torch.zeros(())
        if optimizer.defaults.get("fused"):
            count = count.to(tensor.device)
        optimizer.state[tensor] = {"step": stored(f"{name}.step", count),
                                   "exp_avg": stored(f"{name}.exp_avg", tensor),
                                   "exp_avg_sq": stored(f"{name}.exp_avg_sq", tensor)}
    state.rng.set_state(stored("rng", state.rng.get_state()))
    state.step, state.eps, state.real = step, named.get("eps"), named.get("real")


def digest(named, *others):
    """Return 64 digits that depend on tensors {name: tensor}, their names, and other things."""
    found = hashlib.sha256(repr(others).encode())
    for name, tensor in sorted(named.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint(prior, phi):
    """Return a digest of what a run is made with and does not change: weights, schedule, words.

    It is the same in whatever dtype they were loaded.
    """
    found = {"alphas": prior.alphas, "sigmas": prior.sigmas, "center": prior.center,
             "scale": prior.scale}
    words = {}
    for part, component in prior.pipe.components.items():
        if isinstance(component, torch.nn.Module):
            found |= {f"{part}.{name}": weight for name, weight in component.named_parameters()}
        elif hasattr(component, "get_vocab"):
            words[part] = sorted(component.get_vocab().items())
    # of φ what it does not learn, such as the weights of --phi-model, and a LoRA's scales
    found |= {f"phi.{name}": weight for name, weight in phi.named_parameters()
              if not weight.requires_grad}
    scales = [getattr(module, "scaling", None) for module in phi.modules()]
    sampled = {}
    for name, tensor in found.items():
        every = 1 + tensor.numel() // 2 ** 16                   # of a large one, some numbers
        sampled[name] = tensor.detach().flatten()[::every].bfloat16()
    return digest(sampled, prior.prediction_type, words, scales)


def snapshot(state, frames):
    """Return {name: a copy on the CPU} for a checkpoint; the run may go on meanwhile."""
    named = tensors(state) | {f"frame.{step}": frame for step, frame in frames.items()}
    return {name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in named.items()}


FORMAT = "asd checkpoint 2"


def save_checkpoint(path, named, step, weights, settings):
    """Write a snapshot and the digests of the prior's weights and of the run's settings."""
    from safetensors.torch import save
    about = {"step": str(step), "weights": weights, "settings": settings}
    about["digest"] = digest(named, *about.values())
    with moved_into(path) as temporary:
        temporary.write_bytes(save(named, about | {"format": FORMAT}))


def load_checkpoint(path, state, weights, settings):
    """Restore a State. -> the film, {step: frame}. UserError where the file is not this run's."""
    from safetensors import safe_open
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}
        if about.get("format") != FORMAT:
            raise ValueError("not a checkpoint of this program")
        digested = about["step"], about["weights"], about["settings"]
        if about["digest"] != digest(named, *digested):
            raise ValueError("it is not as it was written")
        if about["settings"] != settings:
            raise ValueError("it belongs to a run with other settings")
        if about["weights"] != weights:
            raise ValueError("it was made with other weights than the model has now")
        if not all(x.isfinite().all() for x in named.values() if x.is_floating_point()):
            raise ValueError("it is not finite")
        if int(about["step"]) < 0:
            raise ValueError("its step is negative")
        frames = {int(name[6:]): frame for name, frame in named.items()
                  if name.startswith("frame.")}
        load_tensors(state, named, int(about["step"]))
    except Exception as error:
        raise UserError(f"{path} cannot be resumed: {type(error).__name__}: {error}") from error
    return frames
