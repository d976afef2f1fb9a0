"""corrective.py — LMC-SDS's b_k(x0, t), the network that blurs a picture as the prior's x̂0 does.

    python variants.py train-corrective --model tiny-sd --minutes 20      calls main() below

LMC-SDS (arXiv 2401.05293), as we understand it: b_k ≈ E[x̂0 | x0, t] over the noise ε, where x̂0 is
the prior's one-step estimate without prompt at x_t = α x0 + σ ε, and x0 are pictures the prior
knows: its own samples, or a folder of yours. variants.Corrective puts it into Eq. 7. The network,
its data and its training are ours. The same command goes on with what it finds in data/.
"""
import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

from asd import Prior, UserError, add_noise, draw
from variants import ddim_samples, one_step_x0

HERE = Path(__file__).resolve().parent
OWN = "corrective.safetensors"                  # beside this file: the embedded model's


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
    from safetensors.torch import save_file

    from runs import moved_into
    weights = {key: value.half().cpu() for key, value in network.state_dict().items()}
    with moved_into(Path(path)) as temporary:
        save_file(weights, temporary, about)


def load_bias(prior, path=None):
    """b_k from a file (default: OWN, which is tiny-sd's). UserError where it is none of `prior`."""
    from safetensors import safe_open
    name, own, path = Path(prior.name).name, path is None, Path(path or HERE / OWN)
    mend = f"python variants.py train-corrective --model {prior.name} makes it"
    if not own or name != "tiny-sd":
        mend = mend.replace("makes it", "--out FILE makes one for --corrective FILE")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            named = {key: file.get_tensor(key).float() for key in file.keys()}
        network = Bias(prior.shape[0])
        network.load_state_dict(named)
    except FileNotFoundError as error:
        raise UserError(f"LMC-SDS needs a corrective and {path} is not there: {mend}") from error
    except Exception as error:                    # safetensors', torch's and the disk's
        first, *more = str(error).strip().split("\n")       # torch's first line names no tensor
        reason = (more or [first])[0].strip()[:100]
        raise UserError(f"{path} is no corrective for {prior.name} ({reason}): {mend}") from error
    if own and about.get("unet") != fingerprint(*prior.unet.parameters()):
        whose = "another" if about.get("model") == name else about.get("model")
        raise UserError(f"{path} was trained for {whose}, not for this {name}: {mend}")
    return network


# ------------------------------------------------------------------------------------- training
def corrective_loss(b, x0_hat, alpha_t, sigma_t):
    """b_k's loss, least at E[x̂0 | x0, t]. The weight is ours: θ feels b_k's error as ω α/σ = σα."""
    # E[ (α σ)² (b_k(x0, t) − x̂0)² ]
    return (alpha_t * sigma_t * (b - x0_hat)).square().mean()


def losses(network, prior, null, x0, t, eps):
    """corrective_loss at one draw of pictures x0, times and noise: (b_k's, SDS's: b_k = x0)."""
    levels = prior.alpha_sigma(t)
    x_t = add_noise(x0, eps, *levels)
    with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
        x0_hat = one_step_x0(x_t, prior.eps(x_t, t, null.expand(len(x0), -1, -1)), *levels)
    return corrective_loss(network(x0, t), x0_hat, *levels), corrective_loss(x0, x0_hat, *levels)


@torch.no_grad()
def own_samples(prior, args, prompts, path):
    """x0 [N, C, H, W]: the prior's own pictures, without prompt, or of prompts in turn at λ = 3.

    Each batch is kept in `path` as soon as it is made.
    """
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    from runs import moved_into
    x0 = load_file(path)["x0"] if path.exists() else torch.empty(0, *prior.shape)
    with tqdm(total=args.samples, initial=len(x0), desc="sampling") as bar:
        while len(x0) < args.samples:
            rng, n = torch.Generator().manual_seed(args.seed + len(x0)), args.batch
            asked = [prompts[(len(x0) + i) % len(prompts)] for i in range(n)] if prompts else \
                [""] * n
            x_T = torch.randn(n, *prior.shape, generator=rng)
            new = ddim_samples(prior, asked, x_T, args.ddim, 3.0 if prompts else 1.0)
            x0 = torch.cat([x0, new.cpu()])
            with moved_into(path) as temporary:
                save_file({"x0": x0}, temporary)
            bar.update(n)
    return x0[:args.samples]


def read_lines(path):
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} holds no prompt: one per line is needed")
    return lines


@torch.no_grad()
def encoded(prior, folder):
    """x0 [N, C, H, W] of the pictures in a folder."""
    from runs import read_folder
    return torch.cat([prior.encode_image(part.to(prior.device)).cpu()
                      for part in read_folder(folder, prior.image_size).split(16)])


def train(args):
    """Sample (or read) pictures, train b_k on them, write it. Resumes; see tiny_sd.Trainer."""
    import tiny_sd
    from runs import usable
    torch.manual_seed(args.seed)
    name = Path(args.model).name
    if args.out is None and name != "tiny-sd":
        raise UserError(f"--model {args.model} needs an --out FILE of its own: {OWN} is tiny-sd's")
    out = Path(args.out or HERE / OWN)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    args.device = usable(args.device)
    prior = Prior.from_pretrained(args.model, args.device)
    # what was made with other weights, words or settings is never taken for this
    unet = fingerprint(*prior.unet.parameters())
    prompts, data = read_lines(args.prompts) if args.prompts else [], tiny_sd.DATA
    data.mkdir(exist_ok=True)
    made_by = fingerprint(unet, prompts, args.ddim, args.seed, args.batch)
    pictures = encoded(prior, args.images) if args.images else \
        own_samples(prior, args, prompts, data / f"corrective-{name}-{made_by}.samples.safetensors")
    run = f"corrective-{name}-{fingerprint(unet, pictures, args.lr, args.seed, args.batch)}"
    trainer = tiny_sd.Trainer(run, Bias(prior.shape[0]), args.minutes, args.lr, args)
    rng, null = torch.Generator().manual_seed(args.seed + trainer.step), prior.encode_text([""])

    def loss_function():
        x0 = pictures[torch.randint(len(pictures), (args.batch,), generator=rng)].to(prior.device)
        t, eps = draw(rng, x0, 0, prior.steps - 1)
        loss, sds = losses(trainer.module, prior, null, x0, t, eps)
        return loss, {"loss": loss.item(), "of_sds": (loss / sds).item()}
    save_bias(trainer.run(loss_function, prior.device.type), out, model=name, unet=unet)
    print(out)


def main(argv=None):
    """The command line of variants.py. -> exit status."""
    from safetensors import SafetensorError

    from runs import Parser, number
    parser = Parser(prog="variants.py", description="Train LMC-SDS's corrective b_k(x0, t).")
    parser.add_argument("task", choices=["train-corrective"])
    add = parser.add_argument
    add("--model", default="tiny-sd", help='"tiny-sd", a diffusers folder or a hub name')
    add("--minutes", type=number(float, 1e-3), default=20.0, help="of training (default 20)")
    add("--images", metavar="DIR", help="pictures to learn from (default: the prior's samples)")
    add("--prompts", metavar="FILE", help="a prompt per line for the samples (default: none)")
    add("--samples", type=number(int, 1), default=512, help="how many to make (default 512)")
    add("--ddim", type=number(int, 1), default=25, help="steps to a sample (default 25)")
    add("--batch", type=number(int, 1), default=16, help="pictures per step (default 16)")
    add("--lr", type=number(float, 0, 1), default=2e-3, help="AdamW's (default 2e-3)")
    add("--seed", type=number(int, 0, 2 ** 62), default=0, help="of all randomness (default 0)")
    add("--device", default="auto", help="default auto: cuda where there is one")
    add("--out", metavar="FILE", help=f"where to (default, of tiny-sd: {OWN} beside this program)")
    args = parser.parse_args(argv)
    try:
        train(args)
    except (UserError, OSError, SafetensorError) as mistake:                       # a full disk
        print(f"variants.py: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvariants.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0
