"""editing.py — Eq. 11 of Adversarial Score Distillation (arXiv 2312.00739): image editing.

    python editing.py --image examples/fox.png --source "a 3d render of a fox" \\
                      --target "a flat icon of a fox"
    python editing.py --method dds …           # Delta Denoising Score (arXiv 2304.07090)
    python editing.py --network --source "a cat" --target "a dog"      # then: --apply DIR --image …

One discriminator asks for what is wanted, a second one for what is there:
F(x_t; y, z) = D(x_t; y) − D(x_t; z). The generator's gradient is Eq. 7 twice:

    ∇θ L = E[ ω(t) · ((ε_∅ + λ(ε_y − ε_∅) − ε_φy) − (ε_∅ + λ(ε_z − ε_∅) − ε_φz)) · ∂x0/∂θ ]  (11)

| equation                     | function             | in test_editing.py                   |
|------------------------------|----------------------|--------------------------------------|
| 11 editing gradient          | editing_grad         | test_eq11_…                          |
| Delta Denoising Score        | editing_grad, ε_φ = ε| test_dds_…                           |
| 9  for φ_z, η = 0, γ = 1     | second_discriminator | test_phi_z_…                         |

The loop is asd.distill, which subtracts `second`. Notation as in asd.py; z is the source prompt,
images are RGB [B, 3, H, W] in [0, 1].
"""
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from asd import METHODS as ASD_METHODS
from asd import Discriminator, Latents, Method, Pixels, Prior, UserError, generator_grad


def editing_grad(target, source, lam, omega=1.0):
    """Eq. 11: Eq. 7 of the target minus Eq. 7 of the source, all [B, C, H, W].

    target = (ε_∅, ε_y, ε_φy) at the noised edit; source = (ε_∅, ε_z, ε_φz) at the same x_t, or, as
    the paper has it, at the *source image* noised with the same t and ε. In the first case ε_∅
    cancels; in the second, with ε_φ = ε in both, ε does, and this is Delta Denoising Score.
    """
    # ω(t) · ( [ε_∅ + λ(ε_y − ε_∅) − ε_φy] − [ε_∅ + λ(ε_z − ε_∅) − ε_φz] )
    return generator_grad(*target, lam, omega) - generator_grad(*source, lam, omega)


# ---------------------------------------------------------------------------------- the settings
@dataclass(frozen=True)
class Edit(Method):
    """A Method and what the second discriminator's φ_z learns from.

    The paper gives φ_z Eq. 9 with η = 0 and γ = 1 and the source image to D(x_t; z), but not in so
    many words which pictures are real. "source": the source image is real, the edit fake, so φ_z
    fits ε to the one noised source image. "edit", the other reading: the edit is real, which is
    Eq. 10 with γ = 0, VSD's loss, on the edit. "text": Eq. 10 with the row's γ on the edit, which
    the paper allows. "none": no second discriminator, plain distillation that starts at the image.
    """
    phi_z: str = "source"


METHODS = {
    "asd": Edit(lr=0.02, steps=200),
    "asd-edit": Edit(lr=0.02, steps=200, phi_z="edit"),
    "asd-10": Edit(lr=0.02, steps=200, phi_z="text"),
    # Delta Denoising Score: t in 50 … 948 of 1000, ω = 1
    "dds": Edit(phi="noise", omega="1", t_min=0.05, t_max=0.948, lr=0.02, steps=200),
    "sds": Edit(phi="noise", phi_z="none", lr=0.02, steps=200),
}


def methods():
    """The rows above, then those of asd.py and variants.py: φ_y and φ_z are both of their kind."""
    try:
        from variants import METHODS as others
    except ImportError:
        others = {}
    return {name: Edit(**asdict(row)) for name, row in (ASD_METHODS | others).items()} | METHODS


def second_discriminator(method, phi_z, z, source):
    """D(x_t; z) of Eq. 11, which the loop subtracts. -> Discriminator, None where there is none.

    z [1, L, C] the source prompt; source: x0 [1 or B, C, H, W] of the source image, or a function
    that returns the one that belongs to the generator's last sample.
    """
    learns = {"source": {"real": source, "eta": 0.0, "gamma": 1.0},          # Eq. 9: on the image
              "edit": {"gamma": 0.0}, "text": {"gamma": method.gamma}}       # Eq. 10: on the edit
    if method.phi_z == "none":
        return None
    if method.phi_z not in learns:
        raise ValueError(f"unknown phi_z {method.phi_z!r}: choose {', '.join(learns)} or none")
    return Discriminator(phi_z, z, seen=source, **learns[method.phi_z])


# ------------------------------------------------------------------------------------ generators
class Masked(nn.Module):
    """Another generator inside a mask, the source image outside it.

    generator: Latents or Pixels. image [1, 3, H, W]; mask [1, 1, H, W], 1 where the edit may go.
    """

    def __init__(self, generator, prior, image, mask):
        super().__init__()
        self.generator, self.image = generator, image.to(prior.device)
        self.mask = mask.to(prior.device)
        with torch.no_grad():
            self.x0 = prior.encode_image(self.image)
        # a latent that decodes into any pixel of the mask may change
        self.inside = nn.functional.adaptive_max_pool2d(self.mask, self.x0.shape[2:])

    def forward(self):
        return self.x0 + self.inside * (self.generator() - self.x0)

    @torch.no_grad()
    def images(self):
        return self.image + self.mask * (self.generator.images() - self.image)


class Translator(nn.Module):
    """Image translation in one pass: x0 of the source -> x0 of the edit, a small U-Net's residual.

    sources [N, C, H, W] are the latents it learns on, `batch` of them drawn for each sample; the
    first ones are shown. At the start it is the identity.
    """

    def __init__(self, prior, sources, batch=4, rng=None):
        super().__init__()
        from diffusers import UNet2DModel
        self.prior, self.sources, self.batch, self.rng = prior, sources, batch, rng
        channels, height, _ = prior.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = UNet2DModel(
                sample_size=height, in_channels=channels, out_channels=channels,
                block_out_channels=(48, 96), layers_per_block=1, norm_num_groups=8,
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        nn.init.zeros_(self.net.conv_out.weight)
        nn.init.zeros_(self.net.conv_out.bias)
        self.net.to(prior.device)

    def translate(self, x0):
        """x0 [B, C, H, W] -> the same shape."""
        return x0 + self.net(x0, 0).sample

    def forward(self):
        chosen = torch.randint(len(self.sources), (self.batch,), generator=self.rng)
        self.source = self.sources[chosen.to(self.sources.device)]
        return self.translate(self.source)

    @torch.no_grad()
    def images(self):
        return self.prior.decode(self.translate(self.sources[:4]))

    @torch.no_grad()
    def shown(self):
        """The pictures that images() translates."""
        return self.prior.decode(self.sources[:4])


# ----------------------------------------------------------------------------------- command line
DEFAULTS = {"image": None, "source": None, "target": None, "pixels": False, "mask": None,
            "network": False, "batch": 4, "pictures": 64}


def add_flags(add):
    add("--image", metavar="PNG", help="the picture to edit; with --network a folder of them")
    add("--source", metavar="TEXT", help="z: what the picture is")
    add("--target", metavar="TEXT", help="y: what it should become")
    add("--mask", metavar="PNG", help="white where it may change; as large as the picture")
    add("--pixels", action="store_const", const=True, help="optimise RGB through the VAE's encoder")
    add("--network", action="store_const", const=True, help="train a network that translates any "
        "such picture; without --image it learns on the model's own samples of --source")
    add("--batch", type=int, help="pictures per step of --network (default 4)")
    add("--pictures", type=int, help="samples to make for --network (default 64)")
    add("--apply", metavar="DIR", help="translate --image by the network that was trained in DIR")


def check(settings):
    """What can be said before anything is loaded."""
    for name in ("source", "target"):
        if not (settings[name] or "").strip():
            raise UserError(f"give a --{name} prompt that is not empty")
    if settings["image"] is None and not settings["network"]:
        raise UserError("give the --image to edit")
    if settings["network"] and (settings["mask"] or settings["pixels"]):
        raise UserError("--network takes neither --mask nor --pixels")
    if min(settings["batch"], settings["pictures"]) < 1:
        raise UserError("--batch and --pictures must be at least 1")


def read_mask(path, image_path, size):
    """A mask file -> [1, 1, H, W] of 0 and 1, cropped like its picture."""
    from PIL import Image

    from runs import read_image
    mask = read_image(path, size).mean(1, keepdim=True).round()
    sizes = [Image.open(file).size for file in (path, image_path)]
    if sizes[0] != sizes[1]:
        raise UserError("--mask is {} x {}, the picture {} x {}: they must agree".format(
            *sizes[0], *sizes[1]))
    return mask


def read_folder(path, size):
    """The pictures of a folder -> [N, 3, H, W]."""
    from runs import read_image
    files = sorted(p for p in Path(path).glob("*") if p.suffix.lower() in
                   (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"{path} is no folder with pictures (png, jpg, webp)")
    return torch.cat([read_image(file, size) for file in files])


def kept(folder, make):
    """`make()`'s tensors from the first start on: a resumed run reads what it began with."""
    from safetensors.torch import load_file, save_file

    from runs import moved_into
    path = folder / "source.safetensors"
    if (folder / "config.json").exists() and path.exists():
        return load_file(path)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with moved_into(path) as temporary:
        save_file(tensors, temporary)
    return tensors


@torch.no_grad()
def source_latents(settings, prior, rng):
    """What a Translator learns on, a folder's pictures or the prior's samples: x0 [N, C, H, W]."""
    if settings["image"] is None:
        from variants import ddim_samples
        return ddim_samples(prior, [settings["source"]] * settings["pictures"], rng)
    images = read_folder(settings["image"], prior.image_size).to(prior.device)
    return torch.cat([prior.encode_image(part) for part in images.split(16)])


def build(settings, prior, method, rng, folder, anew):
    """The generator that starts at the source image, the target's cond, both φ."""
    from runs import phi_of, read_image
    y, z = prior.encode_text([settings["target"], settings["source"]]).split(1)
    phi = phi_of(settings, prior, method, settings["target"])
    phi_z = phi_of(settings, prior, method, settings["source"])
    if settings["network"]:
        sources = kept(folder, lambda: {"source": source_latents(settings, prior, rng)})["source"]
        generator = Translator(prior, sources.to(prior.device), settings["batch"], rng)
        return generator, y, phi, second_discriminator(method, phi_z, z, lambda: generator.source)

    def pictures():
        image = read_image(settings["image"], prior.image_size)
        return {"image": image} | ({} if settings["mask"] is None else {"mask": read_mask(
            settings["mask"], settings["image"], prior.image_size)})

    files = kept(folder, pictures)
    image = files["image"].to(prior.device)
    generator = (Pixels if settings["pixels"] else Latents)(prior, 1, rng, image)
    if "mask" in files:
        generator = Masked(generator, prior, image, files["mask"])
    with torch.no_grad():
        source = prior.encode_image(image)
    generator.image = image
    return generator, y, phi, second_discriminator(method, phi_z, z, source)


def measure(settings, prior, state, images):
    """How far from the source picture, how close to both prompts (tiny-clip, if it is there)."""
    before = state.generator.shown() if settings["network"] else state.generator.image
    return distances(before, images, settings["source"], settings["target"])


def distances(before, after, source, target, judge=None):
    """Pictures [B, 3, H, W] in [0, 1] -> {"psnr" to `before` in dB; "clip_distance", 1 − cosine of
    the pictures in tiny-clip's features; "clip_target", "clip_source": cosines with the prompts}.
    """
    error = (after - before).square().mean((1, 2, 3)).clamp(min=1e-10)
    numbers = {"psnr": (-10 * error.log10()).mean().item()}
    try:
        import tiny_sd
        clip, tokenizer = judge or tiny_sd.load_clip(Path(__file__).with_name("tiny-clip"), "cpu")
    except (ImportError, UserError):
        return numbers
    small = [nn.functional.interpolate(x.cpu(), (64, 64), mode="area") for x in (before, after)]
    a, b = (tiny_sd.image_features(clip, x) for x in small)
    z, y = tiny_sd.text_features(clip, tokenizer, [source, target])
    return numbers | {"clip_distance": (1 - (a * b).sum(1)).mean().item(),
                      "clip_target": (b @ y).mean().item(), "clip_source": (b @ z).mean().item()}


def finish(folder, settings, prior, state, frames):
    """edited.png, before_after.png; of a network its weights and pictures of its first sources."""
    from runs import write_grid
    generator = state.generator
    after = generator.images()
    before = generator.shown() if settings["network"] else generator.image
    if settings["network"]:
        generator.net.save_pretrained(folder / "network")
    pictures = [(255 * x).round().byte().cpu() for x in (before, after)]
    write_grid(folder / "edited.png", pictures[1], len(after))
    write_grid(folder / "before_after.png", torch.stack(pictures, 1).flatten(0, 1), 2)
    return folder / "before_after.png"


def apply_network(folder, image, out=None):
    """Translate a picture, or every picture of a folder, by the network trained in `folder`."""
    import json

    from diffusers import UNet2DModel

    from runs import read_image, write_grid
    try:
        settings = json.loads((Path(folder) / "config.json").read_text("utf-8"))["settings"]
        net = UNet2DModel.from_pretrained(Path(folder) / "network", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no trained network ({type(error).__name__}): train one "
                        "with --network") from error
    if image is None:
        raise UserError("give the --image, or a folder of them, to --apply the network to")
    prior = Prior.from_pretrained(settings["model"])
    size = prior.image_size
    before = read_folder(image, size) if Path(image).is_dir() else read_image(image, size)
    net.to(prior.device)
    with torch.no_grad():
        after, seconds = [], []
        for picture in before.split(1):
            began = time.perf_counter()
            x0 = prior.encode_image(picture.to(prior.device))
            after.append(prior.decode(x0 + net(x0, 0).sample).cpu())
            seconds.append(time.perf_counter() - began)
    out = Path(out or Path(folder) / "applied.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = torch.stack([before, torch.cat(after)], 1).flatten(0, 1)
    write_grid(out, (255 * pictures).round().byte(), 2)
    print(f"{1000 * sorted(seconds)[len(seconds) // 2]:.0f} ms per picture\n{out}")


def main(argv=None):
    """`python editing.py …`: the folder, the film and the checkpoints are those of runs.py."""
    import runs
    program = runs.Program(
        name="editing.py", about="Change a picture from what --source says to what --target says "
        "(Adversarial Score Distillation, Eq. 11).", methods=methods, add_flags=add_flags,
        defaults=DEFAULTS, prompts=lambda s: [s["target"], s["source"]], check=check, build=build,
        finish=finish, measure=measure, row=Edit)
    parser = runs.Parser(prog="editing.py", add_help=False)
    for flag in ("--apply", "--image", "--out"):
        parser.add_argument(flag)
    arguments = sys.argv[1:] if argv is None else argv
    if not any(flag.startswith("--apply") for flag in arguments):
        return runs.main(argv, program)
    try:
        given = parser.parse_args(arguments)
        apply_network(given.apply, given.image, given.out)
    except (UserError, OSError) as mistake:
        print(f"editing.py: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
