"""Every command on another device, where there is no GPU: a stand-in, whose tensors say that they
are elsewhere while the CPU computes. What CUDA refuses, an operation on tensors of two devices or
a draw there from a generator here, is refused. The commands run in a process of their own.

    python test_device.py FOLDER [CASE …]      # runs them, and prints what went wrong with each
"""
import functools
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

HERE = Path(__file__).resolve().parent
PROMPT = ["--prompt", "a red fox"]
FOX = ["--image", str(HERE / "examples/fox.png"), "--source", "a fox", "--target", "a blue fox"]
SOLID = ["--views", "1", "--samples", "8", "--resolution", "8", "16", "--levels", "2",
         "--background", "random"]
CASES = {                              # {name: (program, model, flags)}
    "asd": ("asd", "sd", [*PROMPT, "--particles", "3", "--micro-batch", "2"]),
    "vsd": ("asd", "sd", [*PROMPT, "--method", "vsd", "--share-noise", "--phi", "embedding",
                          "--pixels", "--init", FOX[1], "--fixed-noise"]),
    "real": ("asd", "sd", [*PROMPT, "--real", FOX[1], "--phi-first", "--lam-phi", "2"]),
    "half": ("asd", "sd", [*PROMPT, "--dtype", "bfloat16", "--phi-steps", "2"]),
    "sdxl": ("asd", "sdxl", [*PROMPT, "--size", "16", "--phi", "embedding", "--vae-tiling"]),
    "sd3": ("asd", "sd3", [*PROMPT, "--size", "16"]),
    "flux2": ("asd", "flux2", [*PROMPT, "--size", "16"]),
    "nfsd": ("variants", "sd", [*PROMPT, "--method", "nfsd", "--negative", "blue"]),
    "bridge": ("variants", "sd", [*PROMPT, "--method", "bridge", "--bridge-steps", "2"]),
    "lmc": ("variants", "tiny-sd", [*PROMPT, "--method", "lmc"]),
    "network": ("variants", "sd", [*PROMPT, "--method", "vsd", "--generator", "network"]),
    "edit": ("editing", "sd", FOX),
    "scene": ("text_to_3d", "sd", [*PROMPT, *SOLID]),
    "nerf": ("nerf", None, ["red mug", "--pictures", "2", "--size", "16", "--samples", "8"]),
}
RESUMED = "asd", "real"


# ---------------------------------------------------------------------------------- the stand-in
def other(device):
    return device is not None and torch.device(device).type == "other"


class There(torch.Tensor):
    """A tensor on the other device; `here` is what it holds."""

    @staticmethod
    def __new__(cls, here):
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype,
            device=torch.device("other:0"))
        made.here = here
        return made

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def here(x, seen):
    """An argument with what There holds; seen: the kinds of what is in it."""
    if isinstance(x, There):
        seen.add("there")
        return x.here
    if isinstance(x, torch.Tensor):
        seen.add("here" if x.dim() else "number")
    elif isinstance(x, torch.Generator):
        seen.add("generator")
    elif isinstance(x, (list, tuple)):
        return type(x)(here(each, seen) for each in x)
    return x


@functools.cache
def aliases(func):
    return any(argument.alias_info for argument in func._schema.arguments)


def computed(func, args, kwargs):
    """func's result, by the CPU, wrapped where it is on the other device."""
    aten, asked, seen = torch.ops.aten, kwargs.get("device"), set()
    args_here = here(args, seen)
    kwargs_here = {key: here(value, seen) for key, value in kwargs.items()}
    if "there" not in seen and not other(asked):
        return func(*args, **kwargs)
    may = func in (aten.copy_.default, aten._to_copy.default) or (        # an index may be here
        "aten::index" in func.name() and isinstance(args[0], There))
    if "generator" in seen or "there" in seen and "here" in seen and not may:
        raise RuntimeError(f"{func} is on two devices")
    if asked is not None:
        kwargs_here["device"] = torch.device("cpu")
    out = func(*args_here, **kwargs_here)
    if not other(asked) if asked is not None else (
            func is aten.copy_.default and not isinstance(args[0], There)):
        return out
    out = There(out) if type(out) is torch.Tensor else tree_map_only(torch.Tensor, There, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if aliases(func) else out


class Computed(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Made(TorchFunctionMode):
    """What torch does below the mode: torch.tensor(…, device=…), a list as an index."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and other(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.new_tensor and other(args[0].device):
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1])
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------- the cases
def run_cases(folder, names):
    """Each case for a step or two here and there; -> {case: what went wrong, or ""}."""
    import importlib

    import safetensors.torch
    from PIL import Image, ImageChops
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    import nerf
    import prior
    from test_distill import save_tiny_pipeline
    from test_prior import MAKERS
    from tiny import make
    _setup_privateuseone_for_python_backend("other")
    torch.__future__.set_overwrite_module_params_on_conversion(True)       # by module.to(…)
    with Computed(), Made(), pytest.raises(RuntimeError, match="two devices"):      # it does refuse
        torch.ones(2).to("other") + torch.ones(2)
    prior.usable = str                                         # a device is what it is called
    nerf.write_all = functools.partial(nerf.write_all, size=16, views=1, frames=1, cells=8)
    written = safetensors.torch._flatten_as_ptr                # it reads memory, which There lacks
    safetensors.torch._flatten_as_ptr = lambda named, *more: written(
        {name: tensor.cpu() for name, tensor in named.items()}, *more)
    models = {"tiny-sd": "tiny-sd", "sd": save_tiny_pipeline(folder, "epsilon")}
    words = make.make_tokenizer(["a red fox", "a blue fox"], folder / "words")
    for name in ("sdxl", "sd3", "flux2"):
        MAKERS[name](words).save_pretrained(folder / name)
        models[name] = folder / name
    found = {}
    for name in names or CASES:
        program, model, flags = CASES[name]
        main, ends = importlib.import_module(program).main, {}
        model = ["--model", str(models[model]), "--settings", "tiny"] if model else []
        try:
            for device in ("cpu", "other"):
                out = folder / f"{name}-{device}"
                ask = [*flags, *model, "--device", device, "--out", str(out), "--steps", "1"]
                with ExitStack() as modes:
                    for mode in (Computed(), Made()) if device == "other" else ():
                        modes.enter_context(mode)
                    status = main(ask)
                    if not status and name in RESUMED:
                        status = main(["--resume", str(out), "--steps", "2"])
                if status:
                    raise RuntimeError(f"exit status {status} on {device}")
                ends[device] = next(out / end for end in ("before_after.png", "views.png",
                                                          "final.png") if (out / end).exists())
            pictures = [Image.open(end).convert("RGB") for end in ends.values()]
            apart = max(high for _, high in ImageChops.difference(*pictures).getextrema())
            config = out / "config.json"
            there = not config.exists() or json.loads(config.read_text())["device"] == "other:0"
            found[name] = "" if apart < 8 and there else f"{apart} levels apart, there: {there}"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:500]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = subprocess.run([sys.executable, __file__, tmp_path_factory.mktemp("device")], cwd=HERE,
                          capture_output=True, text=True, check=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_same_on_another_device(found, name):
    assert found[name] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]), sys.argv[2:])))
