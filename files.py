"""files.py — what a run reads and keeps: texts, pictures, and its state, a checkpoint.

Nothing is trusted: whatever cannot be used is a UserError, one line for the user.
"""
import hashlib
import json
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from export import moved_into
from prior import UserError


def regular(path):
    """The Path, to be read. UserError where it is a FIFO or a device, which may never end."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder")
    return path


def read_text(path):
    """What a text file holds. UserError where that is no text, OSError where it is not there."""
    try:
        return regular(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_lines(path):
    """The lines of a text file that are not empty. UserError where there is none."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no prompt: one per line is needed")
    return lines


# ----------------------------------------------------------------------------------- pictures
def read_image(path, size, ground="white"):
    """A picture file -> RGB [1, 3, H, W] in [0, 1] of `size` = (H, W): on white, cropped to fit.
    UserError where it cannot be read.
    """
    import numpy as np
    from PIL import Image, ImageOps
    regular(path)
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            picture = ImageOps.exif_transpose(Image.open(file))       # as cameras turn them
            if picture.mode.startswith("I"):          # 16-bit grey, which convert() would clip
                picture = Image.fromarray((np.array(picture) / 257).round().astype("uint8"))
            picture = picture.convert("RGBA")
    except Exception as error:              # each format has others
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


# ---------------------------------------------------------------------------- the folder of a run
def claimed(folder, config):
    """Make a new or empty folder this run's, at once: config.json. -> whether it could be had."""
    if folder.is_dir() and any(folder.iterdir()):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    try:                                # of two runs that start together one finds it there
        with (folder / "config.json").open("x", encoding="utf-8") as file:
            file.write(json.dumps(config))
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


@contextmanager
def held(folder, wait=False):
    """Make a folder and keep it from other processes' held(); what it gives is whether it could be
    had, at once or after a wait. However a process ends, the system opens its folder again."""
    from fcntl import LOCK_EX, LOCK_NB, flock
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            flock(lock, LOCK_EX if wait else LOCK_EX | LOCK_NB)
            mine = folder.exists() and os.path.samestat(os.fstat(lock), os.stat(folder))
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(lock)


# ---------------------------------------------------------------------------- the state of a run
def parts(state):
    """(name, tensor, its optimiser or None) of θ, φ and of what else the generator keeps."""
    for part, optimizer in (("theta", state.opt_theta), ("phi", state.opt_phi)):
        groups = optimizer.param_groups if optimizer else []
        for i, parameter in enumerate(p for group in groups for p in group["params"]):
            yield f"{part}.{i}", parameter, optimizer
    for name, buffer in state.generator.named_buffers():
        yield f"buffer.{name}", buffer, None


def tensors(state):
    """{name: tensor}: everything but the step; the parameters are the living ones."""
    kept = {"rng": state.rng.get_state(), "eps": state.eps, "real": state.real}
    named = {name: tensor for name, tensor in kept.items() if tensor is not None}
    for name, tensor, optimizer in parts(state):
        named[name] = tensor.detach()
        moments = optimizer.state.get(tensor, {}) if optimizer else {}
        named |= {f"{name}.{key}": x for key, x in moments.items() if x is not None}
    return named


def load_tensors(state, named, step):
    """The inverse of tensors(); KeyError, ValueError, RuntimeError if they do not fit."""
    def kept(name, like):
        if (named[name].shape, named[name].dtype) != (like.shape, like.dtype):
            raise ValueError(f"{name} has another shape or type")
        return named[name].to(like.device, copy=True)
    for name, tensor, optimizer in parts(state):
        tensor.data.copy_(kept(name, tensor))
        if f"{name}.step" in named:           # no gradient yet: no state
            count = tensor.new_zeros(()) if optimizer.defaults.get("fused") else torch.zeros(())
            optimizer.state[tensor] = {key: kept(f"{name}.{key}", like) for key, like in (
                ("step", count), ("exp_avg", tensor), ("exp_avg_sq", tensor))}
    state.rng.set_state(kept("rng", state.rng.get_state()))
    state.step, state.eps, state.real = step, named.get("eps"), named.get("real")


def digest(named, *about):
    """What tensors {name: tensor} and other things hold, names and shapes too: 64 digits."""
    found = hashlib.sha256(repr(about).encode())
    for name, tensor in sorted(named.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint(prior):
    """Of the prior's weights, in whatever dtype they were loaded."""
    def some(weight):                    # of a large one every n-th number: another model differs
        return weight.detach().flatten()[::1 + weight.numel() // 2 ** 16].bfloat16()
    return digest({f"{part}.{name}": some(weight)
                   for part, module in prior.pipe.components.items()
                   if isinstance(module, torch.nn.Module)
                   for name, weight in module.named_parameters()})


def copied(state, frames):
    """What a checkpoint holds, {name: a copy on the CPU}: the run may go on meanwhile."""
    named = tensors(state) | {f"frame.{step}": frame for step, frame in frames.items()}
    return {name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in named.items()}


def save_checkpoint(path, named, step, weights):
    """All that a run needs to go on, in one safetensors file. named: copied(…); weights: the
    prior's fingerprint."""
    from safetensors.torch import save
    about = {"step": str(step), "weights": weights}
    about |= {"format": "asd checkpoint 1", "digest": digest(named, *about.values())}
    with moved_into(path) as temporary:
        temporary.write_bytes(save(named, about))


def load_checkpoint(path, state, weights):
    """Restore `state`; -> {step: frame}. UserError for a corrupt or foreign file, another prior."""
    from safetensors import safe_open
    try:
        with safe_open(regular(path), "pt") as file:
            about = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}
        if about.get("format") != "asd checkpoint 1":
            raise ValueError("not a checkpoint of this program")
        if about.get("digest") != digest(named, about["step"], about["weights"]):
            raise ValueError("it is not as it was written")
        if about["weights"] != weights:
            raise ValueError("it was made with other weights than the model has now")
        if not all(x.isfinite().all() for x in named.values() if x.is_floating_point()):
            raise ValueError("it is not finite")
        load_tensors(state, named, int(about["step"]))
    except Exception as error:
        raise UserError(f"{path} cannot be resumed: {type(error).__name__}: {error}") from error
    return {int(name[6:]): value for name, value in named.items() if name.startswith("frame.")}
