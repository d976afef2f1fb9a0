"""Every command on another device, where there is no GPU.

A stand-in device, "other": its tensors say that they are elsewhere while the CPU computes. What
CUDA refuses is refused: an operation on tensors of two devices, a draw from a generator of another
device. The commands run in a process of their own, as PyTorch knows the device from then on.

    python test_device.py FOLDER [CASE …]      # runs them, and prints what went wrong with each
"""
import functools
import json
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
SOLID = ["--views", "1", "--samples", "4", "--resolution", "4", "8", "--levels", "2",
         "--table", "8", "--background", "random"]
CASES = {                              # {name: (program, model, flags)}
    "vsd": ("asd", "sd", [*PROMPT, "--method", "vsd", "--share-noise", "--phi", "embedding",
                          "--pixels", "--init", FOX[1], "--fixed-noise"]),
    "real": ("asd", "sd", [*PROMPT, "--real", FOX[1], "--lam-phi", "2", "--particles", "3",
                           "--micro-batch", "2"]),
    "sdxl": ("asd", "sdxl", [*PROMPT, "--size", "16", "--phi", "embedding", "--vae-tiling"]),
    "sd3": ("asd", "sd3", [*PROMPT, "--size", "16", "--phi-steps", "2"]),
    "flux2": ("asd", "flux2", [*PROMPT, "--size", "16"]),
    "nfsd": ("variants", "sd", [*PROMPT, "--method", "nfsd", "--negative", "blue"]),
    "bridge": ("variants", "sd", [*PROMPT, "--method", "bridge", "--bridge-steps", "2",
                                  "--bridge-start", "0"]),
    "lmc": ("variants", "tiny-sd", [*PROMPT, "--method", "lmc"]),
    "exact": ("variants", "sd", [*PROMPT, "--method", "vsd", "--phi", "exact",
                                 "--particles", "2"]),
    "network": ("variants", "sd", [*PROMPT, "--method", "vsd", "--generator", "network"]),
    "edit": ("editing", "sd", FOX),
    "flowedit": ("editing", "sd", [*FOX, "--method", "flowedit"]),
    "translator": ("editing", "sd", [*FOX, "--network", "--batch", "2"]),
    "scene": ("text_to_3d", "sd", [*PROMPT, *SOLID]),
    "nerf": ("nerf", None, ["red mug", "--pictures", "1", "--size", "8", "--samples", "4"]),
}
RESUMED = ["real"]


# ---------------------------------------------------------------------------------- the stand-in
def is_other(device):
    return device is not None and torch.device(device).type == "other"


class OtherTensor(torch.Tensor):
    """A tensor on the other device; `held` is what it holds."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype,
            device=torch.device("other:0"))
        made.held = held
        return made

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def unwrap(x, kinds):
    """Replace each OtherTensor in an argument by what it holds; add the kinds of all in it."""
    if isinstance(x, OtherTensor):
        kinds.add("other")
        return x.held
    if isinstance(x, torch.Tensor):
        kinds.add("cpu" if x.dim() else "number")
    elif isinstance(x, torch.Generator):
        kinds.add("generator")
    elif isinstance(x, (list, tuple)):
        return type(x)(unwrap(each, kinds) for each in x)
    return x


@functools.cache
def has_aliases(func):
    return any(argument.alias_info for argument in func._schema.arguments)


def compute(func, args, kwargs):
    """Compute func on the CPU; wrap the result where it is on the other device."""
    aten, device, kinds = torch.ops.aten, kwargs.get("device"), set()
    cpu_args = unwrap(args, kinds)
    cpu_kwargs = {key: unwrap(value, kinds) for key, value in kwargs.items()}
    if "other" not in kinds and not is_other(device):
        return func(*args, **kwargs)
    copies = func in (aten.copy_.default, aten._to_copy.default)
    indexes = "aten::index" in func.name() and isinstance(args[0], OtherTensor)   # CUDA allows it
    if "generator" in kinds or ({"other", "cpu"} <= kinds and not copies and not indexes):
        raise RuntimeError(f"{func} is on two devices")
    if device is not None:
        cpu_kwargs["device"] = torch.device("cpu")
    out = func(*cpu_args, **cpu_kwargs)
    onto_cpu = func is aten.copy_.default and not isinstance(args[0], OtherTensor)
    if device is not None:
        onto_cpu = not is_other(device)
    if onto_cpu:
        return out
    if type(out) is torch.Tensor:
        out = OtherTensor(out)
    else:
        out = tree_map_only(torch.Tensor, OtherTensor, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if has_aliases(func) else out


class ComputeMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class MakeMode(TorchFunctionMode):
    """What torch does below the mode above: torch.tensor(…, device=…), a list as an index."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_other(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.new_tensor and is_other(args[0].device):
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1])
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------- the cases
def make_models(folder):
    """Save a tiny pipeline of each kind. -> {name: its folder}"""
    from test_distill import save_tiny_pipeline
    from test_prior import MAKERS
    from tiny import make
    models = {"tiny-sd": "tiny-sd", "sd": save_tiny_pipeline(folder, "epsilon")}
    words = make.make_tokenizer(["a red fox", "a blue fox"], folder / "words")
    for name in ("sdxl", "sd3", "flux2"):
        MAKERS[name](words).save_pretrained(folder / name)
        models[name] = folder / name
    return models


def prepare():
    """Make the device known, and a run's pictures small."""
    import huggingface_hub.serialization
    import safetensors.torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    import nerf
    import prior
    import text_to_3d
    import variants
    from cli import run
    _setup_privateuseone_for_python_backend("other")
    torch.__future__.set_overwrite_module_params_on_conversion(True)       # by module.to(…)
    with ComputeMode(), MakeMode(), pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2).to("other") + torch.ones(2)              # it does refuse
    for module in (prior, run, variants):
        module.usable = str                                    # a device is what it is called
    prior.Prior.from_pretrained = functools.cache(prior.Prior.from_pretrained)
    small = functools.partial(nerf.write_all, size=8, views=1, frames=1, cells=8)
    nerf.write_all = text_to_3d.write_all = small
    text_to_3d.view_scores = functools.partial(text_to_3d.view_scores, samples=4)
    # writers that read the memory of a tensor, which an OtherTensor has not
    huggingface_hub.serialization._torch._get_unique_id = id
    flatten = safetensors.torch._flatten_as_ptr

    def flatten_on_cpu(named, *rest):
        return flatten({name: tensor.cpu() for name, tensor in named.items()}, *rest)
    safetensors.torch._flatten_as_ptr = flatten_on_cpu


def run_case(name, models, folder, device):
    """Make a run of one step, resumed for another. -> its picture, its folder"""
    import importlib
    program, model, flags = CASES[name]
    main, out = importlib.import_module(program).main, folder / f"{name}-{device}"
    flags = [*flags, "--device", device, "--out", str(out), "--steps", "1"]
    if model:
        flags += ["--model", str(models[model]), "--settings", "tiny"]
    with ExitStack() as modes:
        if device == "other":
            modes.enter_context(ComputeMode())
            modes.enter_context(MakeMode())
        status = main(flags)
        if not status and name in RESUMED:
            status = main(["--resume", str(out), "--steps", "2"])
    if status:
        raise RuntimeError(f"exit status {status} on {device}")
    pictures = [out / file for file in ("before_after.png", "views.png", "final.png")]
    return next(path for path in pictures if path.exists()), out


def run_cases(folder, names):
    """Run each case on the CPU and on the other device. -> {case: what went wrong, or ""}"""
    from PIL import Image, ImageChops
    prepare()
    models, results = make_models(folder), {}
    for name in names or CASES:
        try:
            paths = [run_case(name, models, folder, device) for device in ("cpu", "other")]
            pictures = [Image.open(picture).convert("RGB") for picture, _ in paths]
            levels = max(high for _, high in ImageChops.difference(*pictures).getextrema())
            config = json.loads((paths[1][1] / "config.json").read_text())
            device = config.get("device", "other:0")           # nerf.py's does not say it
            results[name] = ""
            if levels >= 8 or device != "other:0":
                results[name] = f"{levels} levels apart, on {device}"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"[:500]
    return results


def write_results(folder):
    """Run all cases -> folder/results.json. In a process of its own, of one thread."""
    torch.set_num_threads(1)
    (folder / "results.json").write_text(json.dumps(run_cases(folder, [])))


def test_the_same_on_another_device(fork, tmp_path):
    """One test, as all cases share their models."""
    process = fork(write_results, tmp_path)
    process.join()
    assert process.exitcode == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == CASES.keys() and not any(results.values()), results


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]), sys.argv[2:])))
