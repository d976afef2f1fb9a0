"""cli/settings.py — the settings of every command, one typed model each, and the flags made of it.

A field of a model is a flag, a value in config.json, and a line of --help: its name, its type, its
bounds and what it means are written once, here. A field without a default has it from the method's
row. config.json holds the model's dump, and --resume validates it again.
"""
import argparse
import hashlib
import inspect
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Annotated, ClassVar, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from cli.files import check_text, read_text, regular
from prior import UserError


# ------------------------------------------------------------------------------ types, and groups
def not_empty(text):
    """Return the text. ValueError for none, such as an unset variable of the shell."""
    if not text:
        raise ValueError("an empty text names no file")
    return text


def found(text):
    """Make the path of a file or folder that exists absolute; leave another name as it is."""
    if text != "tiny-sd" and regular(text).exists():
        return str(Path(text).resolve())
    return text


def check_found(path):
    """UserError where a path that found() has made absolute, of a stored run, is gone."""
    if path and Path(path).is_absolute() and not Path(path).exists():
        raise UserError(f"{path} is not there any more: move it back, or put a link there")


def flag(meaning, default=..., **bounds):
    """A field of a model. exclude=True: it is not written into config.json."""
    return Field(default, description=meaning, **bounds)


Text = Annotated[str, AfterValidator(check_text)]
Name = Annotated[Text, AfterValidator(not_empty)]
Place = Annotated[Name, AfterValidator(found)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10 ** 9)]
Rank = Annotated[int, Field(ge=1, le=4096)]                # of more a layer makes no use
Rays = Annotated[int, Field(ge=1, le=2 ** 20)]
OnRay = Annotated[int, Field(ge=2, le=4096)]
Degrees = Annotated[float, Field(ge=-1e6, le=1e6)]
Latitude = Annotated[float, Field(ge=-90, le=90)]
Distance = Annotated[float, Field(ge=1e-3, le=1e6)]
Angle = Annotated[float, Field(ge=1, le=170)]
Pixels = Annotated[int, Field(ge=4, le=8192)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, le=2 ** 63 - 1)]
Kernels = Literal["auto", "torch", "triton"]

EQUATION, PHI, SUBJECT, MODEL, RUN = GROUPS = (
    "the equation", "φ, which predicts ε_φ", "what is optimised", "the model", "the run")


class Settings(BaseModel):
    """What the models have in common: no field is unknown or infinite, none changes afterwards."""
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    group: ClassVar[str] = RUN
    may_change: ClassVar[set] = set()            # the fields that --resume may be given anew


class Equation(Settings):
    group: ClassVar[str] = EQUATION
    method: Text = flag("the row of the table")
    lam: Number = flag("λ, guidance of Eq. 7")
    gamma: Number = flag("γ of Eqs. 9 and 10")
    eta: Positive = flag("η of Eq. 9, where there are real pictures")
    omega: Text = flag("ω(t) of Eq. 7")
    t_min: Fraction = flag("least t for θ, a fraction of T")
    t_max: Fraction = flag("largest t for θ")
    t_max_late: Fraction = flag("largest t for θ after --t-late of the steps")
    t_late: Fraction = flag("a fraction of the steps")
    t_order: Literal["random", "descending"] = flag(
        "how θ's t is drawn; descending: it falls evenly from --t-max to --t-min")
    fixed_noise: bool = flag("one ε for θ throughout (LMC-SDS's trick)")
    share_noise: bool = flag("θ's t and ε for φ, too (Algorithm 1)")


class Phi(Settings):
    group: ClassVar[str] = PHI
    phi: Text = flag("what predicts ε_φ")
    phi_lr: Positive = flag("AdamW's learning rate for φ")
    phi_model: Place | None = flag("a checkpoint for φ's LoRA that is not the prior's, such as one "
                                   "that predicts v", None)
    phi_steps: Count = flag("updates of φ per update of θ")
    lam_phi: Number = flag("guidance inside φ; 1 is none")
    rank: Rank = flag("of the LoRA", 4)
    phi_init: Place | None = flag("a LoRA, a folder or a file, that φ starts at", None)
    tokens: Count = flag("learnable words of the embedding", 4)
    checkpointing: bool = flag("less memory for φ, more time", False)


class VariantPhi(Phi):
    negative: Text | None = flag("csd, nfsd: the negative prompt", None)
    source_words: Text | None = flag("bridge: what the pictures are; {} is the prompt", None)
    target_words: Text | None = flag("bridge: what is wanted of them; {} is the prompt", None)
    bridge_steps: int | None = flag("bridge: steps of its ODEs (default 1)", None, ge=1, le=1000)
    bridge_start: Fraction | None = flag("bridge: where it begins, a fraction of the steps "
                                         "(default 0.5; with --source-words 0)", None)
    bandwidth: Positive | None = flag("--phi exact: each particle's blur h", None)
    corrective: Place | None = flag("lmc: its network (default: the embedded model's)", None)


class Optimiser(Settings):
    group: ClassVar[str] = SUBJECT
    steps: Count = flag("updates of θ")
    lr: Positive = flag("learning rate for θ")
    lr_end: float = flag("the rate falls to this part of --lr", ge=0, le=1e6)
    optimizer: Text = flag("of θ")
    beta2: float = flag("of Adam, for θ and φ", ge=0, lt=1)
    adam_eps: Positive = flag("of Adam, for θ and φ")


class Model(Settings):
    group: ClassVar[str] = MODEL
    model: Place = flag('"tiny-sd", a diffusers folder, a hub name, or a .safetensors file, with '
                        "--config", "tiny-sd")
    config: Place | None = flag("of a --model file: a folder of such a model", None)
    size: int | None = flag("pixels of a side (default: the model's own)", None, ge=8, le=8192)
    lora: Place | None = flag("a LoRA of yours on the model, a folder or a file, as "
                              "load_lora_weights takes it", None)
    lora_scale: Number = flag("how much of --lora", 1.0)
    settings: Literal["tiny", "paper"] = flag(
        "whose defaults: tiny, measured on tiny-sd, or paper, for every other model")
    device: Text = flag("cpu, cuda, cuda:1, …; auto is cuda where there is one", "auto")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "of the prior; auto is bfloat16 on cuda, float32 on the cpu", "auto")
    compile: bool = flag("compile the networks' repeated blocks; meant for CUDA: on the CPU a step "
                         "of tiny-sd gains 3 to 10 %, less than the minute it takes", False)
    vae_tiling: bool = flag("less memory for large pictures", False)


class Run(Settings):
    seed: Seed = flag("of all randomness", 0)
    micro_batch: Count | None = flag("pictures at a time (default: all)", None)
    threads: Threads | None = flag("of torch, on the CPU (default: torch's own choice)", None)
    save_every: Count = flag("steps between checkpoints", 50)
    out: Name | None = flag("the folder (default outputs/METHOD-PROMPT-SEED)", None, exclude=True)
    resume: Name | None = flag("go on with the run in this folder", None, exclude=True)
    may_change: ClassVar[set] = {"steps", "device", "save_every", "micro_batch", "threads"}


class PromptsFile(Settings):
    prompts_file: Name | None = flag("a run for each line that has none yet; empty lines and lines "
                                     "that begin with # are left out; - is stdin", None,
                                     exclude=True)


# ---------------------------------------------------------------------------- a model a command
class PictureSettings(Equation, Phi, Optimiser, Model, Run, PromptsFile):
    """asd.py: pictures of prompts."""
    group: ClassVar[str] = SUBJECT
    prompt: list[Text] | None = flag("what to make; repeat for several", None)
    particles: Count = flag("pictures per prompt, one φ for all", 1)
    init: Place | None = flag("start from this picture, not from noise", None)
    pixels: bool = flag("optimise RGB through the VAE's encoder", False)
    real: Place | None = flag("real pictures, one or a folder: φ learns by Eq. 9", None)


class VariantSettings(PictureSettings, VariantPhi):
    """variants.py: the same by other methods."""
    generator: Literal["latents", "network"] = flag("network: learn to make all pictures at once",
                                                    "latents")


class EditSettings(Equation, VariantPhi, Optimiser, Model, Run):
    """editing.py: a picture, or a network that edits pictures."""
    group: ClassVar[str] = SUBJECT
    image: Place | None = flag("the picture to edit; with --network a folder of them", None)
    source: Text | None = flag("z: what the picture is", None)
    target: Text | None = flag("y: what it should become", None)
    mask: Place | None = flag("white where the picture may change, not where it is black or "
                              "transparent; as large as the picture", None)
    pixels: bool = flag("optimise RGB through the VAE's encoder", False)
    phi_z: Literal["eq9", "swapped", "both", "eq10", "none"] = flag(
        "how φ_z learns: by Eq. 9, the edit fake and the source real (eq9), swapped, or the source "
        "both; by Eq. 10 on the edit; or no second discriminator")
    lam_source: Number | None = flag("λ of what is subtracted (default: --lam)", None)
    shift: Number = flag("s: the noise added to the edit is ε + s (z − z_src); 1 is FlowEdit's")
    shift_grows: bool = flag("s grows from 0 to --shift")
    network: bool = flag("train a network that edits any such picture; without --image it learns "
                         "on the model's own samples of --source", False)
    things: Text | None = flag("--network: what {} in both prompts stands for, with commas", None)
    batch: Count | None = flag("--network: pictures per step (default 8)", None)
    pictures: Count | None = flag("--network without --image: samples to make (default 64)", None)
    apply: Name | None = flag("edit --image by the network that was trained in this folder; goes "
                              "with --image, --out and --device alone", None, exclude=True)


class ApplySettings(Settings, title="--apply"):
    """editing.py --apply."""
    apply: Name
    image: Place
    out: Name | None = None
    device: Text = "auto"


class SceneSettings(Equation, VariantPhi, Optimiser, Model, Run, PromptsFile):
    """text_to_3d.py: a NeRF of a prompt."""
    group: ClassVar[str] = SUBJECT
    prompt: Text | None = flag("what to make", None)
    views: Count = flag("pictures per step")
    samples: OnRay = flag("along each ray")
    elevation: tuple[Latitude, Latitude] = flag("degrees, least and largest")
    overhead: Fraction = flag("the part of the views that is from above")
    azimuth: tuple[Degrees, Degrees] = flag("degrees, 0 is the front")
    distance: tuple[Distance, Distance] = flag("of the camera")
    fovy: tuple[Angle, Angle] = flag("vertical angle of view, degrees")
    resolution: tuple[Pixels, Pixels] = flag("pixels, at first and later")
    late: Fraction = flag("when: a fraction of the steps")
    background: Literal["white", "random", "learnt"] = flag("behind the scene")
    sparsity: Number = flag("weight against fog")
    opaque: Number = flag("weight against half-tones")
    perp_neg: bool = flag("Perp-Neg: between two views the prompt is between theirs, and the other "
                          "views are negatives")
    blob: Number = flag("density at the origin at the start", 10.0)
    blob_radius: float = flag("where it ends", 0.5, ge=1e-3, le=1e30)
    levels: int = flag("of the hash grid", 8, ge=1, le=32)
    table: int = flag("log2 of its entries a level", 15, ge=4, le=24)
    coarsest: int = flag("cells of its coarsest level", 8, ge=1, le=8192)
    finest: int = flag("cells of its finest level", 96, ge=8, le=8192)
    width: int = flag("of the networks behind it", 32, ge=1, le=4096)
    threshold: Positive = flag("density of the mesh's surface", 10.0)
    kernels: Kernels = flag("auto is Triton on CUDA", "auto")
    may_change: ClassVar[set] = Run.may_change | {"threshold"}


class FitSettings(Settings):
    """nerf.py: a NeRF of posed pictures."""
    scene: Text = flag('a folder with transforms.json, or a solid such as "red mug"', "",
                       json_schema_extra={"positional": True})
    pictures: Count | None = flag("of a built-in solid (default 40)", None)
    size: int = flag("pixels", 64, ge=8, le=10 ** 9)
    steps: Count = flag("of Adam", 600)
    batch: Rays = flag("rays per step", 1024)
    samples: OnRay = flag("along each ray", 64)
    lr: Positive = flag("learning rate", 2e-2)
    box: float | None = flag("half the side of the scene (default 1; of a folder 1.5)", None,
                             ge=1e-3, le=1e30)
    background: Literal["white", "random"] = flag("the pictures are put on", "random")
    view: bool = flag("colours depend on the direction", False)
    threshold: Positive = flag("density of the mesh's surface", 10.0)
    kernels: Kernels = flag("auto is Triton on CUDA", "auto")
    device: Text = flag("cpu, cuda, …; auto is cuda where there is one", "auto")
    threads: Threads | None = flag("of torch, on the CPU (default: torch's own choice)", None)
    seed: Seed = flag("of all randomness", 0)
    out: Name | None = flag("the folder (default outputs/fit-SCENE)", None, exclude=True)


class CorrectiveSettings(Settings):
    """variants.py train-corrective: the network of LMC-SDS."""
    model: Name = flag('"tiny-sd", a diffusers folder or a hub name', "tiny-sd")
    minutes: float = flag("of training", 20.0, ge=1e-3, le=1e30)
    images: Name | None = flag("pictures to learn from (default: the prior's samples)", None)
    prompts: Name | None = flag("a file of prompts, one a line, for the samples", None)
    samples: Count = flag("how many to make", 512)
    ddim: Count = flag("steps to a sample", 25)
    batch: Count = flag("pictures per step", 16)
    lr: float = flag("AdamW's learning rate", 2e-3, gt=0, le=1)
    seed: int = flag("of all randomness", 0, ge=0, le=2 ** 62)
    device: Text = flag("cpu, cuda, …; auto is cuda where there is one", "auto")
    out: Name | None = flag("the file (default, of tiny-sd: in tiny/)", None)


# --------------------------------------------------------------------------------------- the flags
class Once(argparse.Action):
    """Store a flag's value. A UserError where the flag is given twice: one would be lost."""

    def __call__(self, parser, namespace, values, option_string=None):
        check_once(self, parser, namespace)
        setattr(namespace, self.dest, values)


class YesOrNo(argparse.BooleanOptionalAction):
    """--flag or --no-flag. A UserError for both, and for one that is given twice."""

    def __call__(self, parser, namespace, values, option_string=None):
        check_once(self, parser, namespace)
        super().__call__(parser, namespace, values, option_string)


def check_once(action, parser, namespace):
    """UserError where an earlier word of the command line has set the same field."""
    if hasattr(namespace, action.dest):
        parser.error(f"{' or '.join(action.option_strings)} is given twice")


class Parser(argparse.ArgumentParser):
    """A mistake is a UserError; −1e-2 is a number, no flag; words are valid text."""

    def __init__(self, **kwargs):
        # a part of a name is no name: --prompts would be --prompts-file
        super().__init__(**kwargs, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        flag = "the command line"
        for word in args:
            if word.startswith("--"):
                flag = word.partition("=")[0]
            check_text(word, where=flag)
        return super().parse_args(args, namespace)

    def error(self, message):
        if "expected one argument" in message:
            message += "; a text that begins with - is given as --flag=-text"
        raise UserError(f"{message} (--help lists the options)")


def flag_name(field):
    return "--" + field.replace("_", "-")


def plain_type(annotation):
    """The type within Annotated[…] and … | None."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = get_args(annotation)[0]
    return annotation


def groups_of(model):
    """{field: its group}, as the class that has it first says."""
    groups = {}
    for base in reversed(model.__mro__):
        if issubclass(base, Settings):
            for name in base.model_fields:
                groups.setdefault(name, base.group)
    return groups


def make_parser(name, about, model, choices, defaults):
    """The parser of a command's flags, in groups; choices: {field: names}; defaults, for --help."""
    parser = Parser(prog=name, usage="%(prog)s [flags]", description=about, add_help=False,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true", help="print this text")
    groups = {group: parser.add_argument_group(group) for group in GROUPS}
    for field, group in groups_of(model).items():
        add_flag(groups[group], field, model.model_fields[field], choices.get(field),
                 defaults.get(field))
    return parser


def add_flag(parser, name, field, choices, default):
    """Add a field's flag. All values are texts, as the model converts and checks them."""
    kind, meaning, options = plain_type(field.annotation), field.description, {}
    if get_origin(kind) is Literal:
        choices = get_args(kind)
    if choices:
        meaning += f": {', '.join(choices)}"
    if kind is bool:
        options["action"] = YesOrNo
    elif get_origin(kind) is list:
        options.update(action="append", metavar="TEXT")
    elif get_origin(kind) is tuple:
        options.update(action=Once, nargs=2, metavar=("LEAST", "LARGEST"))
    else:
        options["action"] = Once
        options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
    if default is not None:
        meaning += f" (default {shown(default)})"
    if (field.json_schema_extra or {}).get("positional"):
        parser.add_argument(name, nargs="?", help=meaning.replace("%", "%%"))
    else:
        parser.add_argument(flag_name(name), help=meaning.replace("%", "%%"), **options)


def shown(value):
    """A default, as --help prints it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_flags(name, about, model, argv=None, choices=None, defaults=None):
    """Parse a command line: {field: text}, of what was given. --help prints, and ends the program.

    defaults(given) -> what the command adds to the model's own defaults. UserError for a mistake.
    """
    choices = choices or {}
    given = vars(make_parser(name, about, model, choices, {}).parse_args(argv))
    if given.pop("help", False):
        values = {field: about.default for field, about in model.model_fields.items()
                  if about.default is not PydanticUndefined}
        values |= defaults(given) if defaults else {}
        make_parser(name, about, model, choices, values).print_help()
        sys.exit(0)
    return given


# ------------------------------------------------------------------------------------- the values
def validated(model, values):
    """The model of these values. UserError, which names the flag, for the first that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(first_mistake(error)) from error


def first_mistake(error):
    """One line about a ValidationError."""
    mistake = error.errors(include_url=False)[0]
    message = mistake["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not mistake["loc"]:
        return message
    name = flag_name(str(mistake["loc"][0]))
    if mistake["type"] == "missing":
        return f"{name} is missing"
    if mistake["type"] == "extra_forbidden":
        return f"{name} is no setting of {error.title}"
    return f"{name} cannot be {mistake['input']!r}: {message}"


def row_defaults(command, given):
    """What the method's row, the paper's column and the flags that were given make of the rest."""
    method = given.get("method", command.default_method)
    if method is None:
        raise UserError(f"give a --method, one of {', '.join(command.methods)}")
    if method not in command.methods:
        raise UserError(f"unknown method {method!r}: choose one of {', '.join(command.methods)}"
                        + command.elsewhere)
    column = given.get("settings", "paper")
    if given.get("model", "tiny-sd") == "tiny-sd":
        column = given.get("settings", "tiny")
    row = asdict(command.methods[method])
    values = command.defaults | {name: value for name, value in row.items()
                                 if name in command.settings.model_fields}
    values |= {"method": method, "phi": command.phi_name(method), "settings": column}
    if column == "paper" and method in command.paper:
        _, published = command.paper[method]
        values |= published
    return values | command.implied(given)


def new_settings(command, given):
    """The settings of a new run. UserError where they are wrong, or do not fit together."""
    settings = validated(command.settings, row_defaults(command, given) | given)
    check(settings, command, given)
    return settings


def stored_settings(command, folder):
    """The settings in a folder's config.json. UserError where they are not what a run writes."""
    try:
        config = json.loads(read_text(Path(folder) / "config.json"))
        if config["program"] != command.name:
            raise UserError(f"it is a run of {config['program']}: resume it with that")
        text = json.dumps(config["settings"])
        settings = command.settings.model_validate_json(text, strict=True)
        check(settings, command)
        return settings
    except Exception as error:                             # such JSON may be anything
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            reason = first_mistake(error)
        if isinstance(error, UserError):
            reason = error
        raise UserError(f"{folder} holds no run to resume: config.json: {reason}") from error


def resumed_settings(command, folder, given):
    """The settings of the run in `folder`, and of those given the few that may be others."""
    stored = stored_settings(command, folder)
    for name in ("model", "config", "lora", "phi_model", "phi_init", "corrective"):
        check_found(getattr(stored, name, None))
    settings = validated(command.settings, stored.model_dump() | given)
    changed = [name for name in given if getattr(settings, name) != getattr(stored, name)]
    forbidden = [name for name in changed if name not in stored.may_change | {"resume"}]
    if forbidden:
        names = ", ".join(map(flag_name, forbidden))
        raise UserError(f"the run in {folder} keeps its settings: drop {names}, or choose another "
                        "--out")
    check(settings, command)
    return settings


def settings_digest(settings):
    """Of what --resume may not change: a checkpoint names it."""
    kept = settings.model_dump(mode="json", exclude=settings.may_change)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def run_name(settings, command):
    """A run's name, such as asd-a-red-apple-0."""
    text = re.sub(r"[^a-z0-9]+", "-", command.prompts(settings)[0].lower()).strip("-")[:40]
    return f"{settings.method}-{text}-{settings.seed}"


# ------------------------------------------------------------------------------------- the checks
def check(settings, command, given=()):
    """UserError for what is wrong, as far as it shows before anything is loaded or written.

    given: the names of the flags that were given.
    """
    for name, allowed in command.choices.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise UserError(f"{flag_name(name)} cannot be {value!r}: choose one of "
                            f"{', '.join(allowed)}")
    command.check(settings)
    if not all(prompt.strip() for prompt in command.prompts(settings)):
        raise UserError('give a --prompt that is not empty, such as --prompt "a red apple"')
    if settings.lora is None and settings.lora_scale != 1:
        raise UserError(f"--lora-scale {settings.lora_scale:g} is how much of --lora: give that")
    t_max = settings.t_max
    if settings.t_late < 1 and settings.t_order == "random":
        t_max = min(t_max, settings.t_max_late)
    if "t_max_late" in given and (settings.t_late == 1 or settings.t_order != "random"):
        raise UserError("--t-max-late is for --t-late below 1, where t is drawn at random")
    if "eta" in given and not getattr(settings, "real", None):
        raise UserError("--eta is of Eq. 9, for which asd.py takes --real pictures")
    if settings.t_min > t_max:
        raise UserError(f"--t-min {settings.t_min} is above --t-max {settings.t_max} "
                        f"or --t-max-late {settings.t_max_late}")
    check_phi(settings, command, given)


def check_phi(settings, command, given):
    """UserError for a φ that is not the method's, and for settings that the φ does not have.

    given: the names of the flags that were given; without a default, a value is enough.
    """
    method, phi, own = settings.method, settings.phi, command.phi_name(settings.method)
    if phi != own and own != "lora":
        raise UserError(f"--method {method} is its φ: drop --phi {phi}")
    owners = [name for name in command.methods if command.phi_name(name) == phi]
    if phi != own and owners:
        raise UserError(f"--phi {phi} is --method {owners[0]}; {method} needs one to train")
    if "rank" in given and settings.phi_init:
        raise UserError("--rank and --phi-init: the file's LoRA has its own rank; drop one of them")
    if phi != "lora" and settings.lam_phi != 1:
        raise UserError("--lam-phi is guidance inside a φ that is given y, or ∅: --phi lora")
    for name, group in groups_of(command.settings).items():
        optional = command.settings.model_fields[name].default is None
        is_given = name in given or (optional and getattr(settings, name) is not None)
        if group != PHI or not is_given:
            continue
        owners = [owner for owner, maker in command.phis.items() if name in options_of(maker)]
        if owners and phi not in owners:
            kind = "--method" if owners[0] in command.methods else "--phi"
            raise UserError(f"{flag_name(name)} is for {kind} {' or '.join(owners)}")


def options_of(maker):
    """The names of what a φ takes beside the prior and the prompts."""
    return list(inspect.signature(maker).parameters)[2:]


def phi_options(settings, maker):
    """The settings that a φ takes; what is None keeps the φ's own default."""
    values = {name: getattr(settings, name, None) for name in options_of(maker)}
    return {name: value for name, value in values.items() if value is not None}
