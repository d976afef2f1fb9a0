"""translation.py — image editing in one pass: a network trained by editing.py's Eq. 11.

    python editing.py --network --source "a cat" --target "a dog" --method dds --out cats-to-dogs
    python editing.py --apply cats-to-dogs --image examples/cat.png

The generator of asd.distill is a small U-Net on latents in place of a picture's own: what Eq. 11
asks of every source picture goes into one set of weights, and new pictures take one pass (zero-shot
image translation, as in LMC-SDS and Delta Denoising Score). No pairs of pictures are needed.
"""
import json
import time
from pathlib import Path

import torch
from torch import nn

from asd import Prior, UserError
from runs import read_image, write_grid


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


def read_folder(path, size):
    """The pictures of a folder -> [N, 3, H, W]."""
    files = sorted(p for p in Path(path).glob("*") if p.suffix.lower() in
                   (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"{path} is no folder with pictures (png, jpg, webp)")
    return torch.cat([read_image(file, size) for file in files])


@torch.no_grad()
def source_latents(settings, prior, rng):
    """What a Translator learns on, a folder's pictures or the prior's samples: x0 [N, C, H, W]."""
    if settings["image"] is None:
        from variants import ddim_samples
        x_T = torch.randn(settings["pictures"], *prior.shape, generator=rng)
        return torch.cat([ddim_samples(prior, [settings["source"]] * len(part), part)
                          for part in x_T.split(16)])
    images = read_folder(settings["image"], prior.image_size).to(prior.device)
    return torch.cat([prior.encode_image(part) for part in images.split(16)])


def apply_network(folder, image, out=None):
    """Translate a picture, or every picture of a folder, by the network trained in `folder`."""
    from diffusers import UNet2DModel
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
