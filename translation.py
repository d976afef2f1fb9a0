"""translation.py — image editing in one pass: a network trained by editing.py's Eq. 11.

    python editing.py --network --source "a drawing of {}" --target "a 3d render of {}" \\
                      --things "a fox, a mushroom" --method dds --out drawings-to-renders
    python editing.py --apply drawings-to-renders --image examples/fox-drawing.png

The generator of asd.distill is a small U-Net on latents in place of a picture's own: what Eq. 11
asks of every source picture goes into one set of weights, and new pictures take one pass (zero-shot
image translation, as in LMC-SDS and Delta Denoising Score). No pairs of pictures are needed; the
prompts of several things ({} in both) are, where one network is to edit them all.
"""
import json
import time
from pathlib import Path

import torch
from torch import nn

from export import moved_into, write_grid
from phi import untrained
from prior import Prior, UserError, ddim_samples
from runs import (
    Parser,
    encode_folder,
    guarded,
    number,
    place,
    read_folder,
    read_image,
    read_text,
    regular,
    usable,
)

DEFAULTS = {"network": False, "things": None, "batch": 8, "pictures": 64}


def add_flags(add):
    add("--network", action="store_const", const=True, help="train a network that translates any "
        "such picture; without --image it learns on the model's own samples of --source")
    add("--things", metavar="TEXT,…", help="--network: what {} in both prompts stands for")
    add("--batch", type=number(int, 1), help="pictures per step of --network (default 8)")
    add("--pictures", type=number(int, 1), help="samples to make for --network (default 64)")
    add("--apply", metavar="DIR", help="translate --image by the network that was trained in DIR")


def check(settings):
    """What can be said before anything is loaded."""
    if settings["network"] and (settings["mask"] or settings["pixels"]):
        raise UserError("--network takes neither --mask nor --pixels")
    if settings["things"] is None:
        return
    if not settings["network"] or settings["image"]:
        raise UserError("--things is for --network on samples, without --image")
    if not all(thing.strip() for thing in settings["things"].split(",")):
        raise UserError('give --things that are not empty, such as "a fox, a cat"')
    if not all("{}" in settings[name] for name in ("source", "target")):
        raise UserError("--things stand in place of {}: write it in --source and --target")


def prompts(settings):
    """(target prompts, source prompts), one of each for every thing: lists of P texts."""
    things = [thing.strip() for thing in (settings["things"] or "").split(",")]
    return tuple([settings[name].replace("{}", thing or "{}") for thing in things]
                 for name in ("target", "source"))


class Translator(nn.Module):
    """Image translation in one pass: x0 of the source -> x0 of the edit, a small U-Net's residual.

    sources [N, C, H, W] are the latents it learns on, `batch` of them drawn for each sample; the
    first ones are shown. Source i is asked for by prompt i mod P of y and z [P, L, C]. At the start
    it is the identity. forward() leaves its sources in `source` and their prompts in `cond_z`
    [batch, L, C], in place, as the second discriminator holds that tensor.
    """

    def __init__(self, prior, sources, y, z, batch=8, rng=None, seed=0):
        super().__init__()
        from diffusers import UNet2DModel
        self.prior, self.sources, self.y, self.z, self.rng = prior, sources, y, z, rng
        self.cond_z = z[:1].repeat(batch, 1, 1)
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
        """-> x0 [batch, C, H, W], its target prompts [batch, L, C], no camera."""
        chosen = torch.randint(len(self.sources), (len(self.cond_z),), generator=self.rng)
        chosen = chosen.to(self.sources.device)
        self.source, thing = self.sources[chosen], chosen % len(self.y)
        self.cond_z.copy_(self.z[thing])
        return translated(self.net, self.source), self.y[thing], None

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


@torch.no_grad()
def source_latents(settings, prior, folder):
    """What a Translator learns on, a folder's pictures or the prior's samples: x0 [N, C, H, W].

    They are kept in `folder`, where a resumed run finds them, even if the pictures are gone. The
    samples' noise is from a generator of their own: that run draws none, and yet ends in the same.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    path = folder / "sources.safetensors"
    if path.exists():                              # the folder is this run's alone
        try:
            x0 = load_file(regular(path))["x0"]
            if x0.shape[1:] != prior.shape or x0.dtype != torch.float32 or not len(x0):
                raise ValueError("latents of another shape or type")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} is not what this run has kept: {error}") from error
        return x0.to(prior.device)
    if settings["image"] is None:
        rng = torch.Generator().manual_seed(settings["seed"] ^ 1)
        x_T = torch.randn(settings["pictures"], *prior.shape, generator=rng)
        _, texts = prompts(settings)
        texts = [texts[i % len(texts)] for i in range(len(x_T))]
        x0 = torch.cat([ddim_samples(prior, texts[i:i + 16], x_T[i:i + 16])
                        for i in range(0, len(x_T), 16)])
    else:
        x0 = encode_folder(prior, settings["image"])
    x0 = x0.contiguous()                         # as it is read again: the layout decides bits
    folder.mkdir(parents=True, exist_ok=True)
    with moved_into(path) as temporary:
        save_file({"x0": x0.cpu()}, temporary)
    return x0


def load_network(folder, device="auto"):
    """What a run of --network has left in `folder` -> (prior, net)."""
    from diffusers import UNet2DModel
    network = Path(folder) / "network"
    try:
        model = json.loads(read_text(Path(folder) / "config.json"))["settings"]["model"]
        for file in network.iterdir():
            regular(file)
        net, info = UNet2DModel.from_pretrained(network, local_files_only=True,
                                                use_safetensors=True, output_loading_info=True)
        prior = Prior.from_pretrained(model, usable(device))
        if any(info.values()) or net.config.in_channels != prior.shape[0]:
            raise ValueError("other weights")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder} holds no trained network ({type(error).__name__}): train one "
                        "with --network") from error
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


def apply_network(folder, image, out=None, device="auto"):
    """Translate a picture, or every picture of a folder, by the network trained in `folder`."""
    if image is None:
        raise UserError("give the --image, or a folder of them, to --apply the network to")
    out = Path(out or Path(folder) / "applied.png")
    if out.exists() and (out.name != "applied.png" or not out.is_file()
                         or out.samefile(image)):
        raise UserError(f"{out} is there already: choose another --out, as nothing is written over")
    prior, net = load_network(folder, device)
    size = prior.image_size
    before = read_folder(image, size) if Path(image).is_dir() else read_image(image, size)
    after, seconds = in_one_pass(prior, net, before)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = torch.stack([before, after], 1).flatten(0, 1)
    write_grid(out, (255 * pictures).round().byte(), 2)
    print(f"{1000 * seconds:.0f} ms per picture\n{out}")


def main(argv):
    """`python editing.py --apply …`. -> exit status."""
    parser = Parser(prog="editing.py", description="Translate pictures by a trained network.")
    parser.add_argument("--apply", metavar="DIR", help="where it was trained")
    parser.add_argument("--image", metavar="PNG", type=place, help="a picture, or a folder of them")
    parser.add_argument("--out", metavar="PNG", help="default DIR/applied.png")
    parser.add_argument("--device", default="auto", help="default auto: cuda where there is one")
    return guarded("editing.py", lambda: apply_network(*vars(parser.parse_args(argv)).values()),
                   "smaller pictures")
