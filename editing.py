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
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from asd import METHODS as ASD_METHODS
from asd import (
    Discriminator,
    Latents,
    Method,
    Pixels,
    State,
    UserError,
    distill,
    generator_grad,
    make_phi,
)


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


# plain SGD, as in the DDS notebook: Adam would blow up what the two discriminators agree on
SETTING = {"optimizer": "sgd", "lr": 0.05, "steps": 60}
METHODS = {
    "asd": Edit(**SETTING),
    "asd-edit": Edit(**SETTING, phi_z="edit"),
    "asd-10": Edit(**SETTING, phi_z="text"),
    # Delta Denoising Score: t in 50 … 948 of 1000, ω = 1
    "dds": Edit(**SETTING, phi="noise", omega="1", t_min=0.05, t_max=0.948),
    "sds": Edit(**SETTING, phi="noise", phi_z="none"),
}


def methods():
    """The rows above, then those of asd.py and variants.py: φ_y and φ_z are both of their kind."""
    try:
        from variants import METHODS as others
    except ImportError:
        others = {}
    rows = (ASD_METHODS | others).items()
    return {name: Edit(**asdict(row) | SETTING) for name, row in rows} | METHODS


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


def edit(prior, images, sources, targets, method="asd", seed=0, callback=None):
    """Edit pictures: RGB [B, 3, H, W] in [0, 1], B prompts each -> RGB of the same shape.

    One φ_y and one φ_z serve the whole batch; methods without φ edit each picture on its own.
    """
    method = METHODS[method] if isinstance(method, str) else method
    if method.optimizer == "sgd":                # the loop's loss is the mean over the batch
        method = replace(method, lr=method.lr * len(images))
    rng = torch.Generator().manual_seed(seed)
    generator = Latents(prior, len(images), rng, images)
    phi, phi_z = (make_phi(method.phi, prior, prompts, seed=seed, lam=method.lam,
                           gamma=method.gamma, steps=method.steps)
                  for prompts in (targets, sources))
    second = second_discriminator(method, phi_z, prior.encode_text(sources),
                                  generator.theta.detach().clone())
    state = State(generator, phi, method, rng, second)
    distill(prior, generator, prior.encode_text(targets), method, state=state, callback=callback)
    return generator.images()


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


def build(settings, prior, method, rng, folder, anew):
    """The generator that starts at the source image, the target's cond, both φ."""
    from runs import phi_of, read_image
    y, z = prior.encode_text([settings["target"], settings["source"]]).split(1)
    phi = phi_of(settings, prior, method, settings["target"])
    phi_z = phi_of(settings, prior, method, settings["source"])
    if settings["network"]:
        from translation import Translator, source_latents
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
    import runs
    before = state.generator.shown() if settings["network"] else state.generator.image
    return runs.distances(before, images, settings["source"], settings["target"])


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
        from translation import apply_network
        apply_network(given.apply, given.image, given.out)
    except (UserError, OSError) as mistake:
        print(f"editing.py: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
