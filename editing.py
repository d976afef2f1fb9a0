"""editing.py — Eq. 11 of Adversarial Score Distillation (arXiv 2312.00739): image editing.

    python editing.py --image examples/fox.png --source "a 3d render of a fox" \\
                      --target "a flat icon of a fox"
    python editing.py --method dds …           # Delta Denoising Score (arXiv 2304.07090)
    python editing.py --network --source "a drawing of {}" --target "a 3d render of {}" \\
                      --things "a fox, a mushroom" --method dds --out drawings-to-renders
    python editing.py --apply drawings-to-renders --image examples/fox-drawing.png    # in one pass

One discriminator asks for what is wanted, a second one for what is there:
F(x_t; y, z) = D(x_t; y) − D(x_t; z). The generator's gradient is Eq. 7 twice:

    ∇θ L = E[ ω(t) · ((ε_∅ + λ(ε_y − ε_∅) − ε_φy) − (ε_∅ + λ(ε_z − ε_∅) − ε_φz)) · ∂x0/∂θ ]  (11)

| equation                     | function              | in test_editing.py                  |
|------------------------------|-----------------------|-------------------------------------|
| 11 editing gradient          | editing_grad          | test_eq11_…                         |
| Delta Denoising Score        | editing_grad, ε_φ = ε | test_dds_…                          |
| 9  for φ_z, η = 0, γ = 1     | second_discriminator  | test_phi_z_…                        |
| 10 for φ_y, γ = −1           | asd.distill           | test_the_loop_is_eq11               |
| FlowEdit, DVRF: 11, shifted  | METHODS, asd.Branch   | test_flow_editing.py                |

(As printed, Eq. 11 closes ω's bracket before the second row, a misprint: ω weighs both.) As in the
paper's §6, D(x_t; z) is shown the source image. The loop is asd.distill, which subtracts `second`;
its generator is a picture, Edited, or a network that edits any such picture at once, Translator.
Notation as in asd.py; z is the source prompt, images are RGB [B, 3, H, W] in [0, 1].
"""
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":     # so that a failed import prints a line, and no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parent))     # python -I and -P omit this folder
    if not Path(__file__).resolve().with_name("cli").is_dir():
        print(f"{Path(__file__).name}: copied out alone it is a library, to be imported: the "
              "command needs all of the clone beside it", file=sys.stderr)
        sys.exit(2)
    import cli.start  # noqa: F401

import torch
from torch import nn

import asd


def editing_grad(target, source, lam, omega=1.0):
    """Eq. 11: Eq. 7 of the target minus Eq. 7 of the source, all [B, C, H, W].

    target = (ε_∅, ε_y, ε_φy) at the noised edit; source = (ε_∅, ε_z, ε_φz) at the same x_t, or, as
    the paper has it, at the *source image* noised with the same t and ε. In the first case ε_∅
    cancels; in the second, with ε_φ = ε in both, ε does, and this is Delta Denoising Score.
    """
    eps_uncond, eps_y, eps_phi_y = target
    eps_uncond_z, eps_z, eps_phi_z = source
    # ω(t) · ( [ε_∅ + λ(ε_y − ε_∅) − ε_φy] − [ε_∅ + λ(ε_z − ε_∅) − ε_φz] )
    return (asd.generator_grad(eps_uncond, eps_y, eps_phi_y, lam, omega)
            - asd.generator_grad(eps_uncond_z, eps_z, eps_phi_z, lam, omega))


# ---------------------------------------------------------------------------------- the settings
@dataclass(frozen=True)
class Edit(asd.Method):
    """A Method and what the second discriminator's φ_z learns from.

    The paper (§6): φ_z by Eq. 9 with η = 0 and γ = 1. Who is fake there and who real it does not
    say. "eq9": the edit is x^g and the source image x^r, as §4 has them. "swapped": x^g is what
    D(x_t; z) is shown, the source, and x^r the edit. "both": both are the source, which leaves
    ‖ε_z − ε_φz‖², of which a LoRA, as it starts at ε_z, has nothing to learn. "eq10": Eq. 10 with
    the row's γ on the edit, which §4 allows, too. "none": no second discriminator, plain
    distillation that starts at the image.
    """
    phi_z: str = "eq9"
    lam_source: float | None = None     # λ of the second discriminator; None: lam


# plain SGD, as in the DDS notebook: where the two discriminators agree little is left, and Adam
# would make full steps of it
SETTING = {"optimizer": "sgd", "lr": 0.03, "lr_end": 1.0, "phi_lr": 1e-3, "steps": 60,
           "omega": "sigma2", "t_late": 1.0, "t_max_late": 0.98}
# FlowEdit and DVRF: t falls from a part of T to 0, a step of θ is a step in t, and ω makes Eq. 11 a
# difference of velocities. λ and where t begins: ours, of fourteen looked at on six edits (the
# guide's); a larger λ runs into glaring colours
SAMPLER = {"phi": asd.NoisePhi, "optimizer": "sgd", "lr": 1.0, "omega": "1+sigma/alpha",
           "t_order": "descending", "t_min": 0.0, "t_max": 0.8, "steps": 40, "lam": 2.0,
           "lam_source": 1.0}
METHODS = {
    "asd": Edit(**SETTING),
    # Delta Denoising Score: t in 50 … 948 of 1000; ω = 1, lr smaller by the mean of σ², 0.63
    "dds": Edit(**SETTING | {"lr": 0.02, "omega": "1"}, phi=asd.NoisePhi, t_min=0.05, t_max=0.948),
    "sds": Edit(**SETTING, phi=asd.NoisePhi, phi_z="none"),
    "flowedit": Edit(**SAMPLER, shift=1.0),
    "dvrf": Edit(**SAMPLER, shift=1.0, shift_grows=True),
}
# for --network: the rates of weights, not of a picture; small t in the second half remove blotches
NETWORK = {"optimizer": "adam", "lr": 5e-4, "steps": 600, "t_late": 0.5, "t_max_late": 0.5,
           "t_order": "random"}


# SGD 0.1 of the DDS notebook's loss is 0.0488 of Eq. 11; §6 names no rate for φ
NOTEBOOK = {"lr": 0.0488, "steps": 200, "omega": "1", "t_min": 0.05, "t_max": 0.948}
PAPER = {
    "asd": ("§6: the DDS notebook's, with the paper's γ and η; φ's rate ProlificDreamer-2D's",
            NOTEBOOK | {"phi_lr": 1e-4}),
    "dds": ("the DDS notebook", NOTEBOOK),
    # on FLUX it takes the last 24 of 28 steps, λ 5.5 and 1.5
    "flowedit": ("FlowEdit on SD3: the last 33 of 50 steps, λ 13.5 and 3.5 for the source",
                 {"steps": 33, "t_max": 0.66, "lam": 13.5, "lam_source": 3.5}),
    # its program makes steps of another size, a hump over the run; here, as FlowEdit's, they are
    # the steps in t
    "dvrf": ("DVRF on SD3: 50 steps, λ 16.5 and 6 for the source, s = i/T",
             {"steps": 50, "t_max": 1.0, "lam": 16.5, "lam_source": 6.0}),
}


def methods(network=False):
    """The rows above, then those of asd.py and variants.py: φ_y and φ_z are both of their kind."""
    from variants import all_methods
    rows = {}
    for name, row in all_methods().items():
        rows[name] = Edit(**asdict(row) | SETTING)
    rows |= METHODS
    if network:
        rows = {name: replace(row, **NETWORK) for name, row in rows.items()}
    return rows


def lam_of_source(method):
    """λ of the second discriminator, also for a φ_z that is made for its λ."""
    return method.lam if method.lam_source is None else method.lam_source


def second_discriminator(method, phi_z, z):
    """D(x_t; z) of Eq. 11, which the loop subtracts: it is shown the source pictures.

    z [1 or B, L, C]: the source prompt. -> a Discriminator; None where the method has none.
    """
    paper = {"eta": 0.0, "gamma": 1.0}
    learns_from = {"eq9": {"fake": "generated", "real": "source"} | paper,
                   "swapped": {"fake": "source", "real": "generated"} | paper,
                   "both": {"fake": "source", "real": "source"} | paper,
                   "eq10": {"gamma": method.gamma}}
    if method.phi_z == "none":
        return None
    if method.phi_z not in learns_from:
        raise ValueError(f"unknown phi_z {method.phi_z!r}: choose {', '.join(learns_from)} or none")
    return asd.Discriminator(phi_z, z, at="source", lam=method.lam_source,
                             **learns_from[method.phi_z])


# ------------------------------------------------------------------------------------- a picture
class Edited(nn.Module):
    """θ, latents or (pixels) RGB, starts at the pictures; outside a mask nothing changes.

    images [B, 3, H, W]; mask [1 or B, 1, H, W], 1 where the edit may go, default everywhere. The
    pictures, `source` (their x0) and the mask are buffers: a checkpoint has them.
    """

    def __init__(self, prior, images, mask=None, pixels=False, rng=None):
        super().__init__()
        self.inner = (asd.Pixels if pixels else asd.Latents)(prior, len(images), rng, images)
        images = images.to(prior.device).contiguous()
        mask = torch.ones_like(images[:, :1]) if mask is None else checked_mask(mask, images)
        with torch.no_grad():
            source = self.inner().clone()
        # a latent whose cell meets the mask may change
        inside = nn.functional.adaptive_max_pool2d(mask, source.shape[2:])
        self.register_buffer("image", images)
        self.register_buffer("mask", mask)
        self.register_buffer("source", source)
        self.register_buffer("inside", inside)

    def forward(self):
        x0 = torch.where(self.inside > 0, self.inner(), self.source)
        return asd.Samples(x0, source=self.source)

    @torch.no_grad()
    def images(self):
        return torch.where(self.mask > 0, self.inner.images(), self.image)

    def shown(self):
        """The pictures that images() has edited."""
        return self.image


def checked_mask(mask, images):
    """The mask, like the images. ValueError for one that does not fit, or lets nothing change."""
    from prior import kind_of
    shapes = [(n, 1, *images.shape[2:]) for n in (1, len(images))]
    if not torch.is_tensor(mask) or mask.shape not in shapes:
        raise ValueError(f"mask is [1 or B, 1, H, W], for images {list(images.shape)}, not "
                         f"{kind_of(mask)}")
    if not (mask > 0).any():
        raise ValueError("the mask is black (0) throughout: nothing would change")
    return mask.to(images)


def edit(prior, images, sources, targets, method="asd", seed=0, mask=None, callback=None):
    """Edit pictures: RGB [B, 3, H, W] in [0, 1], B prompts each, mask as in Edited -> RGB alike.

    method: an Edit, or a name of methods(). One φ_y and one φ_z serve the whole batch; methods
    without φ edit each picture on its own.
    """
    if isinstance(method, str):
        if method not in methods():
            raise ValueError(f"unknown method {method!r}: choose one of {', '.join(methods())}")
        method = methods()[method]
    if not isinstance(method, Edit):
        raise ValueError(f"method is an Edit, or a name of methods(), not {method!r}")
    if method.optimizer == "sgd":                # the loop's loss is the mean over the batch
        method = replace(method, lr=method.lr * len(images))
    asd.check_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    generator = Edited(prior, images, mask)
    phi = asd.make_phi(method, prior, targets, seed)
    second = None
    if method.phi_z != "none":
        phi_z = asd.make_phi(replace(method, lam=lam_of_source(method)), prior, sources, seed)
        second = second_discriminator(method, phi_z, prior.encode_text(sources))
    state = asd.State(generator, phi, method, rng, second)
    asd.distill(prior, generator, prior.encode_text(targets), state=state, method=method,
                callback=callback)
    return generator.images().to(images.device)


# ------------------------------------------------------------- a network that edits in one pass
class Translator(nn.Module):
    """A network in place of a picture: x0 of the source -> x0 of the edit, a U-Net's residual.

    What Eq. 11 asks of every source picture goes into one set of weights, and new pictures take one
    pass (zero-shot image translation, as in LMC-SDS and Delta Denoising Score). No pairs of
    pictures are needed; the prompts of several things are, where one network is to edit them all.

    sources [N, C, H, W] are the latents it learns on, `batch` of them drawn for each sample; the
    first ones are shown. Source i is asked for by prompt i mod P of y and z [P, L, C]. At the start
    it is the identity.
    """

    def __init__(self, prior, sources, y, z, batch=8, rng=None, seed=0):
        super().__init__()
        from diffusers import UNet2DModel

        from phi import untrained
        self.prior, self.y, self.z = prior, y, z
        self.register_buffer("sources", sources)         # so that the checkpoint has them
        self.n, self.rng = batch, rng
        channels, height, _ = prior.shape
        self.net = untrained(lambda: UNet2DModel(
            sample_size=height, in_channels=channels, out_channels=channels,
            block_out_channels=(48, 96), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
            torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.net.conv_out.weight)
        nn.init.zeros_(self.net.conv_out.bias)
        self.net.to(prior.device)

    def forward(self):
        """-> Samples of `batch` sources, drawn anew, and of their prompts."""
        chosen = torch.randint(len(self.sources), (self.n,), generator=self.rng, device="cpu")
        chosen = chosen.to(self.sources.device)
        source, thing = self.sources[chosen], chosen % len(self.y)
        return asd.Samples(translated(self.net, source), self.y[thing], source=source,
                           source_cond=self.z[thing])

    @torch.no_grad()
    def images(self):
        return self.prior.decode(translated(self.net, self.sources[:4]))

    @torch.no_grad()
    def shown(self):
        """The pictures that images() translates."""
        return self.prior.decode(self.sources[:4])


def translated(net, x0):
    """One pass: x0 [B, C, H, W] -> the same shape."""
    return x0 + net(x0, 0).sample


def load_network(folder, device):
    """What a run of --network has left in `folder` -> (prior, net)."""
    from diffusers import UNet2DModel

    from cli import files
    from cli.settings import check_found
    from loading import read_json
    from prior import Prior, usable
    network = Path(folder) / "network"
    try:
        settings = json.loads(files.read_text(Path(folder) / "config.json"))["settings"]
        for name in ("model", "config", "lora"):
            check_found(settings[name])
        for file in network.iterdir():
            files.regular(file)
        read_json(network / "config.json")
        net, info = UNet2DModel.from_pretrained(network, local_files_only=True,
                                                use_safetensors=True, output_loading_info=True)
        prior = Prior.from_pretrained(settings["model"], usable(device), None, settings["size"],
                                      settings["config"], settings["lora"], settings["lora_scale"])
        if any(info.values()) or net.config.in_channels != prior.shape[0]:
            raise ValueError("other weights")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise asd.UserError(f"{folder} holds no trained network ({type(error).__name__}): train "
                            "one with --network") from error
    return prior, net.to(prior.device)


@torch.no_grad()
def in_one_pass(prior, net, pictures):
    """RGB [B, 3, H, W], one after the other -> (the same shape, seconds per picture)."""
    after, seconds = [], []
    for picture in pictures.split(1):
        began = time.perf_counter()
        x0 = prior.encode_image(picture.to(prior.device))
        after.append(prior.decode(translated(net, x0)).to(pictures.device))
        seconds.append(time.perf_counter() - began)
    return torch.cat(after), sorted(seconds)[len(seconds) // 2]


# ----------------------------------------------------------------------------------- command line
def implied(given):
    """The settings of --network, whatever the model."""
    return NETWORK if given.get("network") else {}


def check(settings):
    """UserError for what does not fit together, before anything is loaded."""
    for name in ("source", "target"):
        if not (getattr(settings, name) or "").strip():
            raise asd.UserError(f"give a --{name} prompt that is not empty")
    if settings.image is None and not settings.network:
        raise asd.UserError("give the --image to edit")
    if settings.network and (settings.mask or settings.pixels):
        raise asd.UserError("--network takes neither --mask nor --pixels")
    if settings.batch and not settings.network:
        raise asd.UserError("--batch is for --network")
    if settings.pictures and (settings.image or not settings.network):
        raise asd.UserError("--pictures is for --network on samples, without --image")
    if settings.lam_source is not None and settings.phi_z == "none":
        raise asd.UserError("--lam-source is for the second discriminator, and --phi-z none, as of "
                            "--method sds, is without one")
    if settings.things is None:
        if settings.network and "{}" in settings.source + settings.target:
            raise asd.UserError("{} in --source and --target stands for the --things: give those")
        return
    if not settings.network or settings.image:
        raise asd.UserError("--things is for --network on samples, without --image")
    if not all(thing.strip() for thing in settings.things.split(",")):
        raise asd.UserError('give --things that are not empty, such as "a fox, a cat"')
    if "{}" not in settings.source or "{}" not in settings.target:
        raise asd.UserError("--things stand in place of {}: write it in --source and --target")


def target_prompts(settings):
    """y, of each of the --things: a list of P texts."""
    return with_things(settings.target, settings.things)


def source_prompts(settings):
    """z, of each of the --things: a list of P texts."""
    return with_things(settings.source, settings.things)


def with_things(prompt, things):
    """The prompt with each of some things, with commas between them, in place of {}."""
    if things is None:
        return [prompt]
    return [prompt.replace("{}", thing.strip()) for thing in things.split(",")]


def prompts(settings):
    """All prompts, the target's first."""
    return target_prompts(settings) + source_prompts(settings)


def read_pictures(settings, size):
    """--image and --mask, cropped alike -> [1, 3, H, W], and [1, 1, H, W] of 0 and 1 or None."""
    from PIL import Image, ImageOps

    from cli.files import read_image
    image = read_image(settings.image, size)
    if settings.mask is None:
        return image, None
    mask = read_image(settings.mask, size, "black").mean(1, keepdim=True).round()
    with Image.open(settings.mask) as drawn, Image.open(settings.image) as picture:
        mask_size = ImageOps.exif_transpose(drawn).size
        image_size = ImageOps.exif_transpose(picture).size
    if mask_size != image_size:
        raise asd.UserError(f"--mask has {mask_size} pixels, the picture {image_size}: they must "
                            "agree")
    return image, mask


@torch.no_grad()
def source_latents(settings, prior, folder):
    """What a Translator learns on, a folder's pictures or the prior's samples: x0 [N, C, H, W].

    They are kept in `folder`, where a resumed run finds them, even if the pictures are gone. The
    samples' noise is from a generator of their own: that run draws none, and yet ends in the same.
    """
    from safetensors.torch import save_file

    from cli.files import encode_folder, moved_into
    from prior import ddim_samples
    path = folder / "sources.safetensors"
    if path.exists():                              # the folder is this run's alone
        return kept_sources(path, prior)
    if settings.image is None:
        rng = torch.Generator().manual_seed(settings.seed ^ 1)
        x_T = torch.randn(settings.pictures or 64, *prior.shape, generator=rng, device="cpu")
        texts = source_prompts(settings)
        texts = [texts[i % len(texts)] for i in range(len(x_T))]
        x0 = torch.cat([ddim_samples(prior, texts[i:i + 16], x_T[i:i + 16])
                        for i in range(0, len(x_T), 16)])
    else:
        x0 = encode_folder(prior, settings.image)
    x0 = x0.contiguous()                         # as it is read again: the layout decides bits
    with moved_into(path) as temporary:
        save_file({"x0": x0.cpu()}, temporary)
    return x0


def kept_sources(path, prior):
    """The latents that source_latents has kept. UserError where they are others."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from cli.files import regular
    try:
        x0 = load_file(regular(path))["x0"]
        if x0.shape[1:] != prior.shape or x0.dtype != torch.float32 or not len(x0):
            raise ValueError("latents of another shape or type")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise asd.UserError(f"{path} is not what this run has kept: {error}") from error
    return x0.to(prior.device)


def build(settings, prior, method, rng, folder, new):
    """The generator that starts at the source, φ_y and the second D. -> (State, y)"""
    from cli.settings import phi_options
    targets, sources = target_prompts(settings), source_prompts(settings)
    y, z = prior.encode_text(targets), prior.encode_text(sources)
    options = phi_options(settings, method.phi)
    phi = method.phi(prior, targets, **options)
    second = None
    if method.phi_z != "none":
        if "lam" in options:
            options["lam"] = lam_of_source(method)
        second = second_discriminator(method, method.phi(prior, sources, **options), z)
    if settings.network:
        x0 = source_latents(settings, prior, folder)
        generator = Translator(prior, x0, y, z, settings.batch or 8, rng, settings.seed)
    else:
        image, mask = torch.zeros(1, 3, *prior.image_size), None
        if new:                                  # of a resumed run the checkpoint has the picture
            image, mask = read_pictures(settings, prior.image_size)
        generator = Edited(prior, image, mask, settings.pixels, rng)
    return asd.State(generator, phi, method, rng, second), y


def measure(settings, prior, state, images):
    """How far from the source picture, how close to both prompts (tiny/clip, if it is there)."""
    from tiny.judge import distances
    targets, sources = target_prompts(settings), source_prompts(settings)
    rows = []
    for i, (before, after) in enumerate(zip(state.generator.shown().split(1), images.split(1))):
        thing = i % len(targets)
        rows.append(distances(before, after, sources[thing], targets[thing]))
    means = {}
    for name in rows[0]:
        means[name] = sum(row[name] for row in rows) / len(rows)
    return means


def finish(folder, settings, prior, state):
    """edited.png, before_after.png; of a network its weights and pictures of its first sources."""
    from cli.pictures import to_bytes, write_grid
    generator = state.generator
    if settings.network:
        generator.net.save_pretrained(folder / "network")
    before, after = to_bytes(generator.shown()), to_bytes(generator.images())
    write_grid(folder / "edited.png", after, len(after))
    write_grid(folder / "before_after.png", torch.stack([before, after], 1).flatten(0, 1), 2)
    return folder / "before_after.png"


def apply_network(settings):
    """--apply: edit a picture, or every picture of a folder, by the network trained in a folder."""
    from cli.files import locked, read_folder
    from cli.pictures import to_bytes, write_grid
    folder, image = Path(settings.apply), Path(settings.image)
    if not folder.is_dir():
        raise asd.UserError(f"{folder} holds no trained network: train one with --network")
    out = Path(settings.out or folder / f"applied-{image.stem}.png")
    if out.exists():
        raise asd.UserError(f"{out} is there already: choose another --out, as nothing is written "
                            "over")
    if out.suffix.lower() != ".png":
        raise asd.UserError(f"--out {out}: the picture is a PNG, so the name must end in .png")
    with locked(folder):
        prior, net = load_network(folder, settings.device)
        before = read_folder(image, prior.image_size)
        after, seconds = in_one_pass(prior, net, before)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_grid(out, to_bytes(torch.stack([before, after], 1).flatten(0, 1)), 2)
    print(f"{1000 * seconds:.0f} ms per picture\n{out}")


def command():
    """What editing.py adds to cli/run.py."""
    from cli.run import Command
    from cli.settings import EditSettings
    from variants import ALL_PHIS
    return Command(
        "editing.py", "Make a picture of --source one of --target (ASD's Eq. 11).", EditSettings,
        methods(), ALL_PHIS, asd.CHOICES, build, asd.distill, implied=implied, prompts=prompts,
        check=check, measure=measure, finish=finish, paper=PAPER, divisible=False)


def main(argv=None):
    """`python editing.py …`: the folder, the film and the checkpoints are those of cli/run.py."""
    from cli import run
    from cli.settings import ApplySettings, validated

    def work():
        given = run.flags_of(command(), argv)
        if "apply" in given:
            return apply_network(validated(ApplySettings, given))
        return run.start(command(), given)
    return run.guarded("editing.py", work)


if __name__ == "__main__":
    sys.exit(main())
