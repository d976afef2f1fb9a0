"""corrective.py — LMC-SDS's b_k(x0, t), the network that blurs a picture as the prior's x̂0 does.

    python variants.py train-corrective --model tiny-sd --minutes 20

LMC-SDS (arXiv 2401.05293), as we understand it: b_k ≈ E[x̂0 | x0, t] over the noise ε, where x̂0 is
the prior's one-step estimate without prompt at x_t = α x0 + σ ε, and x0 are pictures the prior
knows: its own samples, or a folder of yours. variants.Corrective puts it into Eq. 7, and the prior
comes from there, too. The network, its data and its training are ours; corrective.safetensors is
tiny/sd's.
"""
import hashlib
import warnings
from pathlib import Path

import torch
from torch import nn

from tiny.training import Trainer, save_tensors

OWN = Path(__file__).resolve().with_name("corrective.safetensors")      # the embedded model's


class Bias(nn.Module):
    """b_k(x0, t): a shallow U-Net that changes the standardised picture. Untrained, it is x0.

    x0 [B, C, H, W] with even H and W, t [B] -> like x0. The standardisation is per picture, and
    its mean and deviation are put back, so that pictures brighter or paler than those it was
    trained on stay within what it knows.
    """

    def __init__(self, channels, width=32):
        super().__init__()
        from diffusers import UNet2DModel
        self.unet = UNet2DModel(
            in_channels=channels, out_channels=channels, block_out_channels=(width, 2 * width),
            layers_per_block=1, norm_num_groups=8, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2, add_attention=False)
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, x0, t):
        mean = x0.mean((1, 2, 3), keepdim=True)
        std = x0.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
        z = (x0 - mean) / std
        return mean + std * (z + self.unet(z, t).sample)


def fingerprint(*things):
    """8 hexadecimal digits of what tensors (to bfloat16: any dtype's) and other things hold."""
    digest = hashlib.sha256()
    for thing in things:
        digest.update(thing.detach().bfloat16().cpu().view(torch.int16).numpy().tobytes()
                      if torch.is_tensor(thing) else repr(thing).encode())
    return digest.hexdigest()[:8]


def save_bias(network, path, **about):
    """Write b_k in half precision; about: model="its name", unet=fingerprint(*its weights)."""
    weights = {key: value.half().cpu() for key, value in network.state_dict().items()}
    save_tensors(Path(path), weights, about)


def load_bias(prior, path=None):
    """b_k from a file (default: OWN, which is tiny-sd's).

    FileNotFoundError where it is not there, ValueError where it is none of `prior`.
    """
    from safetensors import safe_open
    name, own, path = Path(prior.name).name, path is None, Path(path or OWN)
    train = f"python variants.py train-corrective --model {prior.name}"
    if own and name == "tiny-sd":
        mend = f"{train} makes it"
        anew = f"remove it, then {mend}"
    else:
        mend = anew = f"{train} --out FILE makes one for --corrective FILE"
    if path.is_dir():
        raise ValueError(f"{path} is a folder: {mend}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            named = {key: file.get_tensor(key).float() for key in file.keys()}
        with torch.device("meta"):
            network = Bias(prior.shape[0])
        network.load_state_dict(named, assign=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"LMC-SDS needs a corrective and {path} is not there: {mend}") from error
    except Exception as error:                    # safetensors', torch's and the disk's
        first, *more = str(error).strip().split("\n")       # torch's first line names no tensor
        reason = (more or [first])[0].strip()[:100]
        raise ValueError(f"{path} is no corrective for {prior.name} ({reason}): {anew}") from error
    if about.get("unet") != fingerprint(*prior.network.parameters()):
        other = "another" if about.get("model") == name else about.get("model")
        if own:
            raise ValueError(f"{path} was trained for {other}, not for this {name}: {anew}")
        if "unet" in about:
            warnings.warn(f"{path} was trained for {other}, not for this {name}", stacklevel=2)
    return network


# ------------------------------------------------------------------------------------- training
def corrective_loss(b, x0_hat, alpha_t, sigma_t):
    """b_k's loss, least at E[x̂0 | x0, t]. The weight is ours: θ feels b_k's error as ω α/σ = σα."""
    # E[ (α σ)² (b_k(x0, t) − x̂0)² ]
    return (alpha_t * sigma_t * (b - x0_hat)).square().mean()


def losses(network, x0, t, x0_hat, alpha_t, sigma_t):
    """corrective_loss at one draw of pictures, times and x̂0: (b_k's, SDS's: b_k = x0)."""
    return (corrective_loss(network(x0, t), x0_hat, alpha_t, sigma_t),
            corrective_loss(x0, x0_hat, alpha_t, sigma_t))


def kept_samples(path, count, batch, sample, empty):
    """x0 [count, C, H, W] from sample(already made, batch), each batch kept in `path` as it comes.

    empty [0, C, H, W]: what there is where nothing has been made.
    """
    from safetensors.torch import load_file
    from tqdm import tqdm
    x0 = load_file(path)["x0"] if path.exists() else empty
    with tqdm(total=count, initial=len(x0), desc="sampling") as bar:
        while len(x0) < count:
            x0 = torch.cat([x0, sample(len(x0), batch).cpu()])
            save_tensors(path, {"x0": x0})
            bar.update(batch)
    return x0[:count]


def train(path, channels, draw, lr, minutes, device):
    """A Bias trained for so long, by a Trainer whose checkpoint is `path`; the last fifth decays.

    draw(step the training begins with) -> a function that gives (x0, t, x̂0, α_t, σ_t) each time.
    """
    trainer = Trainer(path, Bias(channels), lr, 0.8 * minutes, 0.2 * minutes, device=device)
    drawn = draw(trainer.step)

    def loss_function():
        loss, sds = losses(trainer.module, *drawn())
        return loss, {"loss": loss.item(), "of_sds": (loss / sds).item()}
    return trainer.run(loss_function)
