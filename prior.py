"""prior.py — the frozen text-to-image diffusion model, as asd.py sees it: ε(x_t; y, t).

    prior = Prior.from_pretrained("tiny-sd")      # or a Stable Diffusion folder or name
    eps_y = prior.eps(x_t, t, prior.encode_text(["a fox"]))

Shapes as in asd.py: x0, x_t, ε [B, C, H, W] latents; images RGB [B, 3, height, width] in [0, 1];
t [B] long in 0 … T−1; cond [B, L, C]. Only this file knows what a checkpoint predicts (ε, v or a
flow's velocity), and how its latents are scaled; loading.py knows where it comes from.
"""
import difflib
import inspect
import math
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from loading import UserError, add_lora, load_pipeline, modules_of, note, one_line, quiet

HERE = Path(__file__).resolve().parent


@contextmanager
def full_precision():
    """Switch a surrounding torch.autocast off: it must not change a result."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def to_eps(output, x_t, alpha_t, sigma_t, prediction_type):
    """The one place where a network's output becomes ε, whatever the checkpoint predicts.

    output, x_t [B, C, H, W]; α_t, σ_t [B, 1, 1, 1]. ValueError for other prediction types.
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        # v = α ε − σ x0 and x_t = α x0 + σ ε, so ε = σ x_t + α v. At the *given* x_t this is exact.
        # ASD's released code instead forms a velocity target from the true x0 and ε_y, which is the
        # ε-target α² ε_y + σ² ε. That is Eq. 10 at γ(t) = γα²/(1+γ−γα²), weighted by
        # (1+γ−γα²)/α²: exactly Eq. 10 at γ = −1; above, γ fades to VSD's 0 at large t.
        return sigma_t * x_t + alpha_t * output
    if prediction_type == "flow":
        # u = ε − x0 and x_t = α x0 + σ ε with α = 1 − σ, so ε = x_t + α u
        return x_t + alpha_t * output
    raise ValueError(f"unknown prediction type {prediction_type!r}")


# ------------------------------------------------------------------- what differs between families
class Family(NamedTuple):
    """What a pipeline class of diffusers does in its own way."""
    network: str                      # the name of the part that predicts
    encode: Callable                  # (pipe, a prompt, device) -> tokens [1, L, C], pooled [1, P]
    predict: Callable                 # (prior, network, x_t, t, tokens, pooled) -> its prediction
    read: Callable | None = None      # the outputs of its text encoders -> (tokens, pooled)
    mu: Callable | None = None        # flow models: (pipe, shape of x0) -> a schedule's shift


# what the text encoders make of a prompt: tokens, and a pooled vector where the network takes one
def encode_sd(pipe, prompt, device):
    return pipe.encode_prompt(prompt, device, 1, False)[0], None


def encode_sd3(pipe, prompt, device):
    tokens, _, pooled, _ = pipe.encode_prompt(prompt, None, None, device,
                                              do_classifier_free_guidance=False)
    return tokens, pooled


def encode_sdxl(pipe, prompt, device):
    tokens, _, pooled, _ = pipe.encode_prompt(prompt, None, device,
                                              do_classifier_free_guidance=False)
    if not prompt and pipe.config.force_zeros_for_empty_prompt:
        return torch.zeros_like(tokens), torch.zeros_like(pooled)      # SDXL's null prompt is zeros
    return tokens, pooled


def encode_flux2(pipe, prompt, device):
    return pipe.encode_prompt(prompt, device)[0], None


# one call of the network, in the units in which it was trained: t as 0 … T−1 of a UNet, as σ (or
# σ times T) of a transformer
def predict_sd(prior, unet, x_t, t, tokens, pooled, **kwargs):
    return unet(x_t, t, tokens, **kwargs).sample


def predict_sdxl(prior, unet, x_t, t, tokens, pooled, **kwargs):
    # a picture of the model's own size, uncropped: (height, width) as it was, (top, left), as it is
    size = torch.tensor([*prior.image_size, 0, 0, *prior.image_size], device=x_t.device)
    added = {"text_embeds": pooled, "time_ids": size.to(tokens.dtype).expand(len(x_t), -1)}
    return unet(x_t, t, tokens, added_cond_kwargs=added, **kwargs).sample


def predict_sd3(prior, transformer, x_t, t, tokens, pooled):
    return transformer(hidden_states=x_t, timestep=prior.steps * prior.sigmas[t],
                       encoder_hidden_states=tokens, pooled_projections=pooled).sample


def predict_flux2(prior, transformer, x_t, t, tokens, pooled):
    # latents as a sequence [B, H·W, C], with the places of tokens and latents beside them
    with torch.device("cpu"):                                 # the pipeline names no device
        text_ids = prior.pipe._prepare_text_ids(tokens).to(x_t.device)
        image_ids = prior.pipe._prepare_latent_ids(x_t).to(x_t.device)
    velocity = transformer(
        hidden_states=x_t.flatten(2).transpose(1, 2), timestep=prior.sigmas[t], guidance=None,
        encoder_hidden_states=tokens, txt_ids=text_ids, img_ids=image_ids).sample
    return velocity.transpose(1, 2).reshape(x_t.shape)


# how far a flow's schedule is shifted towards noise, which may depend on the size of the picture
def mu_sd3(pipe, shape):
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
    config = pipe.scheduler.config
    tokens = shape[1] * shape[2] // pipe.transformer.config.patch_size ** 2
    return calculate_shift(tokens, config.get("base_image_seq_len", 256),
                           config.get("max_image_seq_len", 4096), config.get("base_shift", 0.5),
                           config.get("max_shift", 1.16))


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


# ---------------------------------------------------------------- a pipeline is inspected once
def readers_of(pipe):
    """The text encoders that a pipeline has, each with its tokenizer: [(encoder, tokenizer)]."""
    readers = []
    for number in ("", "_2", "_3"):
        encoder = getattr(pipe, f"text_encoder{number}", None)
        tokenizer = getattr(pipe, f"tokenizer{number}", None)
        if encoder is not None and tokenizer is not None:
            readers.append((encoder, tokenizer))
    return readers


def is_clip(encoder):
    return "clip" in getattr(encoder.config, "model_type", "")


def check_parts(pipe, network):
    """UserError where parts are offloaded or on "meta", or where λ would mean nothing."""
    for name, part in modules_of(pipe).items():
        # accelerate and diffusers leave hooks where they move weights in and out
        tensors = [*part.parameters(), *part.buffers()]
        hooked = any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
                     for module in part.modules())
        if hooked or any(tensor.is_meta for tensor in tensors):
            raise UserError(f"has its {name} offloaded, or on \"meta\": hand over a pipeline with "
                            "all weights in place, and call no enable_…_offload()")
    if getattr(pipe, "config", {}).get("is_distilled"):
        raise UserError("is distilled (is_distilled in model_index.json): its guidance is built "
                        "in, so λ means nothing: take the base model")
    # LCMs, and FLUX's guidance-distilled models: guidance is an input, not a difference
    for name in ("time_cond_proj_dim", "guidance_embeds"):
        if getattr(network.config, name, None):
            raise UserError(f"is distilled: it is told its guidance ({name}), so λ means nothing: "
                            "take the model that it was made from")


def check_text(pipe):
    """Set a CLIP tokenizer's length where it has none, and a CLIP encoder's end token where it is
    wrong. UserError for tokens that do not fit."""
    for encoder, tokenizer in readers_of(pipe):
        if is_clip(encoder):
            positions = encoder.config.max_position_embeddings
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
            # 2 stands in old configs by mistake (SDXL's, too): transformers then takes the token of
            # the largest number for the end, and so EmbeddingPhi's words, which are numbered above
            for module in encoder.modules():
                if getattr(module, "eos_token_id", None) == 2:
                    module.eos_token_id = tokenizer.eos_token_id
        if tokenizer.model_max_length < 3:
            raise UserError(f"has a tokenizer whose model_max_length is "
                            f"{tokenizer.model_max_length}: no prompt fits")
        # a token beyond the table would be an index error, or another word's row, much later
        known = encoder.get_input_embeddings().weight.shape[0]
        word, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= known:
            raise UserError(f"has a tokenizer that makes {word!r} the token {number}, but its text "
                            f"encoder knows {known} tokens")
    if hasattr(pipe, "tokenizer_max_length") and readers_of(pipe):
        pipe.tokenizer_max_length = readers_of(pipe)[0][1].model_max_length


def text_cut(pipe, prompt):
    """-> (the number of tokens that a text encoder reads, what it does not read), or None."""
    # CLIP reads up to its last position and keeps its end token; T5 and Qwen read as many tokens as
    # the pipeline's encode_prompt lets them by default
    parameters = inspect.signature(pipe.encode_prompt).parameters
    for encoder, tokenizer in readers_of(pipe):
        if is_clip(encoder):
            limit, ends = tokenizer.model_max_length, 1
            tokens = tokenizer(prompt).input_ids
        else:
            limit, ends, text = parameters["max_sequence_length"].default, 0, prompt
            if tokenizer.chat_template:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False,
                    add_generation_prompt=True, enable_thinking=False)
            tokens = tokenizer(text).input_ids
        if len(tokens) > limit:
            lost = tokens[limit - ends:len(tokens) - ends]
            return limit, tokenizer.decode(lost, skip_special_tokens=True)
    return None


def kind_of(value):
    """What a value is, for an error: a tensor's type and shape, else its class."""
    if torch.is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"


def check_images(images):
    """ValueError for what is no floats [B, 3, height, width], all finite."""
    if not (torch.is_tensor(images) and images.is_floating_point()
            and images.dim() == 4 and images.shape[1] == 3):
        raise ValueError("images are floats [B, 3, height, width] in [0, 1], not "
                         f"{kind_of(images)}")
    if not images.isfinite().all():
        raise ValueError("images have values that are not finite")


def check_start(images, particles, rng):
    """ValueError for pictures that are none in [0, 1], such as 0 … 255, and for no particles.

    A little beyond is no mistake: a resized picture overshoots.
    """
    if not isinstance(particles, int) or isinstance(particles, bool) or particles < 1:
        raise ValueError(f"particles is a whole number, at least 1, not {particles!r}")
    if rng is not None and not isinstance(rng, torch.Generator):
        raise ValueError(f"rng is a torch.Generator on the CPU, not {rng!r}")
    if images is None:
        return
    check_images(images)
    if not len(images):
        raise ValueError("images are none at all: [0, 3, height, width]")
    if not (images.min() > -0.2 and images.max() < 1.2):
        raise ValueError(f"images lie in [0, 1], these in {images.min():g} … {images.max():g}")


class Prior:
    """The frozen text-to-image diffusion model, seen as ε(x_t; y, t). Nothing φ does changes it.

    pipe: a pipeline of one of the FAMILIES, with all adapters that are active in it; size: pixels
    of a square picture, by default those the checkpoint names. Attributes: network (UNet or
    transformer), vae, pipe; alphas, sigmas [T] float32, rising with t, α never 0; shape = (C, H, W)
    of x0; image_size = (height, width) in pixels. What changes in the pipe: its parts are set to
    eval() and need no gradients, a CLIP tokenizer without a maximal length gets its encoder's, a
    CLIP encoder whose end token is the old mistake, 2, its tokenizer's, and a float16 VAE is made
    float32, as Stable Diffusion's overflows. UserError where the pipe cannot serve as a prior.

    cond is one tensor [B, L, C]: the tokens, and below them what else the family tells its network
    of the prompt (the pooled vector), filled up with zeros to rows of the same width. So whoever
    holds a cond indexes, expands and concatenates it without knowing what it means.
    """

    def __init__(self, pipe, name="prior", size=None):
        kind = type(pipe).__name__
        if kind not in FAMILIES:
            raise UserError(f"is a {kind}: only {', '.join(FAMILIES)} do")
        self.pipe, self.name, self.family = pipe, name, FAMILIES[kind]
        self.network, self.vae = getattr(pipe, self.family.network), pipe.vae
        check_parts(pipe, self.network)
        check_text(pipe)
        for module in modules_of(pipe).values():
            module.requires_grad_(False).eval()
        # Stable Diffusion's VAE overflows in half precision, and decodes black pictures then
        if self.vae.dtype == torch.float16:
            self.vae.float()
        self.patch = 2 if hasattr(self.vae, "bn") else 1           # FLUX.2 folds 2 x 2 latents
        self.image_size, self.shape = self.choose_size(size)
        self.alphas, self.sigmas = (v.to(self.device) for v in self.schedule())
        self.center, self.scale = (v.to(self.device) for v in self.latent_units())
        self.encoded = {}                                          # {prompt: cond [L, C]}
        with torch.no_grad(), torch.device("cpu"), quiet(), full_precision():
            tokens, pooled = self.family.encode(pipe, "", self.text_device)
        self.width = tokens.shape[2]                               # C of cond [B, L, C]
        self.pooled = 0 if pooled is None else pooled.shape[1]
        self.rows = self.pack(tokens, pooled).shape[1]             # L of it, of every prompt

    device = property(lambda self: self.network.device)
    dtype = property(lambda self: self.network.dtype)
    steps = property(lambda self: len(self.alphas))              # T

    @property
    def text_device(self):
        encoder = self.pipe.text_encoder
        return self.device if encoder is None else encoder.device

    @classmethod
    def from_pretrained(cls, path_or_name="tiny-sd", device=None, dtype=None, size=None,
                        config=None, lora=None, lora_scale=1.0):
        """Load a diffusers text-to-image pipeline of one of the FAMILIES.

        path_or_name: a local folder (the network is never touched), "tiny-sd", the embedded model
        in tiny/sd beside this file, a hub name, or a .safetensors file that holds all parts, with
        `config`, a folder of the same kind of model. device: default cuda where there is one.
        dtype: default bfloat16 on cuda, float32 on the CPU. lora: a LoRA to add, a file or a
        folder, whatever load_lora_weights takes; lora_scale: its weight. safetensors only. Raises
        UserError where the model cannot be loaded, or where its parts do not fit together.
        """
        # what would be ignored in silence, or taken for something else
        if lora is None and lora_scale != 1:
            raise UserError(f"a lora_scale of {lora_scale:g} without a lora (--lora) does nothing")
        if not isinstance(dtype, (torch.dtype, type(None))):
            raise UserError(f"dtype is a torch.dtype, such as torch.float16, not {dtype!r}")
        device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # now, and not as an error of the last part that is moved there
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device} cannot be used: {one_line(error, 90)}") from error
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        with torch.device("cpu"):                # whatever the caller's default device is
            pipe = load_pipeline(path_or_name, dtype, config, FAMILIES, HERE)
            if lora is not None:
                add_lora(pipe, lora, lora_scale)
        try:
            prior = cls(pipe.to(device), str(path_or_name), size)
            prior.try_out()
        except UserError as error:
            raise UserError(f"{path_or_name} {error}") from error
        except Exception as error:         # whatever its parts say of one another
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                raise
            raise UserError(f"{path_or_name}: its parts do not fit together: "
                            f"{type(error).__name__}: {one_line(error)}") from error
        return prior

    @torch.no_grad()
    def try_out(self):
        """UserError where a part has weights that are not finite; one evaluation of each."""
        for name, part in modules_of(self.pipe).items():
            if not all(tensor.isfinite().all() for tensor in part.state_dict().values()):
                raise UserError(f"has weights in its {name} that are not finite")
        for name, tokenizer in self.pipe.components.items():
            if name.startswith("tokenizer") and tokenizer is not None:
                fox, apple = (tokenizer(text).input_ids for text in ("a blue fox", "a red apple"))
                if fox == apple:
                    raise UserError(f"has a {name} to which all prompts are the same")
        # so that what does not fit together is noticed now, and not after minutes
        x0 = torch.zeros(1, *self.shape, device=self.device)
        t = torch.full((1,), self.steps // 2, device=self.device)
        if self.eps(x0, t, self.encode_text([""])).shape != x0.shape:
            raise UserError("predicts something of another shape than its latents")
        image = torch.zeros(1, 3, *self.image_size, device=self.device)
        if self.encode_image(image).shape != x0.shape or self.decode(x0).shape != image.shape:
            raise UserError(f"has a VAE that makes no latents of {self.shape} of its pictures")

    def choose_size(self, size):
        """size in pixels, or None -> (height, width) in pixels, (C, H, W) of x0.

        UserError where the network takes no such size.
        """
        if not isinstance(size, (int, type(None))):
            raise UserError(f"has a size of {size!r}: pixels of a side, a whole number, are needed")
        config = self.network.config
        pixels = 2 ** (len(self.vae.config.block_out_channels) - 1) * self.patch     # of a latent
        if size is None:
            side = config.get("sample_size") or self.pipe.default_sample_size // self.patch
            latents = (side, side) if isinstance(side, int) else tuple(side)
        else:
            latents = (size // pixels, size // pixels)
        image_size = (latents[0] * pixels, latents[1] * pixels)
        # a transformer cuts the latents into patches, and may have a table of their positions
        patch = getattr(config, "patch_size", None) or 1
        largest = (getattr(config, "pos_embed_max_size", None) or 16384) * patch * pixels
        largest = min(largest, 16384)
        wanted = image_size if size is None else (size, size)
        if any(side % (pixels * patch) or not 0 < side <= largest for side in wanted):
            found = f"its own {wanted[0]} x {wanted[1]}" if size is None else size
            raise UserError(f"needs a size that is a multiple of {pixels * patch}, at most "
                            f"{largest}, not {found}")
        return image_size, (config.in_channels, *latents)

    def schedule(self):
        """-> α_t, σ_t [T] float32, and sets what the network predicts. No α_t is 0."""
        return self.diffusion_schedule() if self.family.mu is None else self.flow_schedule()

    def diffusion_schedule(self):
        """The schedule of a model that predicts ε or v: α² + σ² = 1."""
        scheduler = self.pipe.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(f"has a {type(scheduler).__name__}: no noise schedule known here")
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"predicts {self.prediction_type}: a UNet must predict ε or v")
        # ᾱ_t = α_t², the product of 1 − β up to t
        alpha_bar = scheduler.alphas_cumprod.float().cpu()
        if not (alpha_bar.isfinite().all() and alpha_bar.min() >= 0 and alpha_bar.max() <= 1
                and (alpha_bar.diff() <= 0).all() and alpha_bar[-1] < 0.5):
            raise UserError("has a noise schedule whose α_t does not fall from 1 to 0")
        zero_snr = scheduler.config.get("rescale_betas_zero_snr") or alpha_bar.min() == 0
        if zero_snr and self.prediction_type == "epsilon":
            raise UserError("predicts ε, but its schedule ends in pure noise (zero terminal SNR), "
                            "where ε says nothing of x0: only v-prediction does")
        # α = 0 stands in denominators: as in diffusers' samplers, the last ᾱ is almost 0
        smallest = min(2 ** -24, alpha_bar[alpha_bar > 0].min().item() / 4)
        alpha_bar = torch.where(alpha_bar == 0, smallest, alpha_bar)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def flow_schedule(self):
        """The schedule of a flow model, whatever its sampler: α + σ = 1."""
        scheduler, config = self.pipe.scheduler, self.pipe.scheduler.config
        name = type(scheduler).__name__
        if not name.startswith("FlowMatch") and not config.get("use_flow_sigmas"):
            raise UserError(f"has a {name} without use_flow_sigmas: a flow model needs a flow's "
                            "noise schedule")
        self.prediction_type = "flow"
        # σ' = s σ / (1 + (s − 1) σ), with s fixed, or growing with the picture
        if config.get("use_dynamic_shifting"):
            shift = self.family.mu(self.pipe, self.shape)
            if config.get("time_shift_type", "exponential") == "exponential":
                shift = math.exp(shift)
        elif isinstance(getattr(type(scheduler), "shift", None), property):
            shift = scheduler.shift
        else:
            shift = config.get("flow_shift") or config.get("shift") or 1.0
        if not (math.isfinite(shift) and shift > 0):
            raise UserError(f"has a noise schedule whose shift is {shift}")
        T = config.num_train_timesteps
        # t is an index into the model's own schedule, so that drawing it evenly draws σ as it does
        sigma = torch.arange(1, T + 1, device="cpu") / T
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        sigma = sigma.clamp(max=1 - 1e-5)                # α = 0 stands in denominators
        return 1 - sigma, sigma

    def latent_units(self):
        """-> (center, scale), [1, C, 1, 1]: x0 = (z − center)·scale, z the VAE's latents."""
        config = self.vae.config
        if self.patch > 1:
            center = self.vae.bn.running_mean
            scale = (self.vae.bn.running_var + config.batch_norm_eps).rsqrt()
        else:
            if config.scaling_factor is None:
                raise UserError("has a VAE without a scaling_factor")
            center = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
            scale = torch.tensor(config.scaling_factor, device="cpu") / torch.tensor(
                config.get("latents_std") or [1.0], device="cpu")
        center, scale = (torch.as_tensor(v, dtype=torch.float32, device="cpu")
                         for v in (center, scale))
        # a scale of 0, NaN or 1e308 makes black pictures, and no error
        magnitude = scale.abs()
        if not (center.abs().max() < 1e6 and magnitude.min() > 1e-6 and magnitude.max() < 1e6):
            raise UserError("has a VAE whose units (scaling_factor, shift_factor, mean, std) are "
                            "zero, not finite, or out of all proportion")
        return center[None, :, None, None], scale[None, :, None, None]

    def alpha_sigma(self, t):
        """t [B], or an int for all -> (α_t, σ_t), each [B, 1, 1, 1] float32.

        ValueError where there is no such t.
        """
        t = torch.as_tensor(t, device=self.alphas.device)
        if t.dim() > 1 or t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"t is a whole number, or a tensor [B] of such, not {t}")
        try:                          # unlike [t], it takes no negative t for one from the end
            alpha_t, sigma_t = self.alphas.index_select(0, t), self.sigmas.index_select(0, t)
        except IndexError as error:
            raise ValueError(f"t must lie in 0 … {self.steps - 1}: {t}") from error
        return alpha_t.view(-1, 1, 1, 1), sigma_t.view(-1, 1, 1, 1)

    @torch.no_grad()
    def encode_text(self, prompts):
        """A prompt, or a list of B -> cond [B, L, C]; "" is the null prompt ∅.

        Each prompt is encoded once and alone, so that it is the same whatever else is asked. A
        prompt that is too long is cut, and a line on stderr says what is lost.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not (isinstance(prompts, (list, tuple)) and prompts
                and all(isinstance(text, str) for text in prompts)):
            raise ValueError(f"no prompt is given, but {prompts!r}: a text, or a list of texts; "
                             "\"\" is the null prompt")
        for prompt in prompts:
            if prompt not in self.encoded:
                self.encoded[prompt] = self.encode_one(prompt)
        return torch.stack([self.encoded[prompt] for prompt in prompts])

    def encode_one(self, prompt):
        """-> cond [L, C]."""
        with quiet(), torch.device("cpu"), full_precision():
            cut = text_cut(self.pipe, prompt)
            tokens, pooled = self.family.encode(self.pipe, prompt, self.text_device)
        if cut is not None:
            limit, lost = cut
            note(f"the text encoder reads {limit} tokens of a prompt: not \"{lost}\"")
        return self.pack(tokens, pooled)[0].to(self.device)

    def pack(self, tokens, pooled):
        """tokens [B, L, C], pooled [B, P] or None -> cond [B, L', C].

        The pooled vector becomes rows below the tokens, its last row filled up with zeros.
        """
        if pooled is None:
            return tokens
        rows = F.pad(pooled, (0, -pooled.shape[1] % tokens.shape[2]))
        return torch.cat([tokens, rows.unflatten(1, (-1, tokens.shape[2])).to(tokens)], 1)

    def unpack(self, cond):
        """The inverse of pack."""
        if not self.pooled:
            return cond, None
        rows = math.ceil(self.pooled / cond.shape[2])
        return cond[:, :-rows], cond[:, -rows:].flatten(1)[:, :self.pooled]

    def release_text_encoders(self):
        """Move them to the CPU, once all prompts are encoded; EmbeddingPhi moves them back.

        They are a large part of the memory: SD3's T5 is more than twice its network.
        """
        for name, part in self.pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to("cpu")

    def unknown_words(self, prompt):
        """The prompt's words that a small vocabulary (the embedded model's) spells in pieces.

        A word that it knows is one token between the start and the end token.
        """
        tokenizer = self.pipe.tokenizer
        if len(tokenizer) >= 20_000:
            return []
        # letters, or a sign that is no letter, such as an emoji; not "2" or "!"
        words = re.findall(r"[^\W\d_]+|[^\w\s\x00-\x7f]", prompt.lower())
        return [word for word in words if len(tokenizer(word).input_ids) > 3]

    def nearest_words(self, word):
        """At most three words of the vocabulary: those spelt most like a word."""
        whole = {token.removesuffix("</w>") for token in self.pipe.tokenizer.get_vocab()
                 if re.fullmatch(r"[a-z]{3,}</w>", token)}
        # without the pieces of which it makes words: they are the ends of longer words
        ends = {longer[i:] for longer in whole for i in range(1, len(longer))}
        return difflib.get_close_matches(word, whole - ends, 3, cutoff=0.1)

    def encode_image(self, images):
        """RGB [B, 3, height, width] in [0, 1] -> x0 [B, C, H, W] float32, the VAE's mean.

        The whole batch at once, as gradients may flow: --pixels needs memory for all pictures.
        ValueError for what is no floats [B, 3, height, width], all finite.
        """
        check_images(images)
        with full_precision():
            mean = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist.mean
        return (F.pixel_unshuffle(mean.float(), self.patch) - self.center) * self.scale

    def decode(self, x0, clamp=True):
        """x0 [B, C, H, W] -> RGB in [0, 1], float32; clamp=False: as the decoder has it, which may
        lie outside. FloatingPointError where x0, or what it decodes to, is not finite."""
        if not torch.is_tensor(x0) or x0.dim() != 4 or x0.shape[1] != self.shape[0]:
            raise ValueError(f"x0 is [B, {self.shape[0]}, H, W], not {kind_of(x0)}")
        if not x0.isfinite().all():
            raise FloatingPointError("latents that are not finite cannot be made a picture")
        z = F.pixel_shuffle(x0 / self.scale + self.center, self.patch)
        with full_precision():                           # four at once: to bound the memory
            rgb = [self.vae.decode(part.to(self.vae.dtype)).sample.float() for part in z.split(4)]
        images = torch.cat(rgb) / 2 + 0.5
        if not images.isfinite().all():
            raise FloatingPointError("latents this large cannot be made a picture")
        return images.clamp(0, 1) if clamp else images

    def eps(self, x_t, t, cond):
        """ε(x_t; y, t): x_t [B, C, H, W], t [B], cond [B, L, C] from encode_text -> like x_t.

        An int t holds for all samples. Raises ValueError where the canvas is not the checkpoint's,
        the batches differ, or there is no such t.
        """
        if not torch.is_tensor(cond) or cond.dim() != 3:
            raise ValueError("cond is prompt embeddings [B, L, C], from encode_text([…])")
        if cond.shape[2] != self.width:
            raise ValueError(f"cond is {list(cond.shape)}, but {self.name} reads embeddings of "
                             f"{self.width}: another prior has encoded it")
        if cond.shape[1] != self.rows:
            raise ValueError(f"cond has {cond.shape[1]} rows, but a prompt of {self.name} has "
                             f"{self.rows}: cut or joined, another is read than was written")
        if not torch.is_tensor(x_t):
            raise ValueError(f"x_t is a tensor [B, C, H, W], not {kind_of(x_t)}")
        t = torch.as_tensor(t, device=x_t.device)
        if t.dim() == 0:
            t = t.expand(len(x_t))
        if (len(t), len(cond)) != (len(x_t), len(x_t)):
            raise ValueError(f"x_t has {len(x_t)} samples, t {len(t)}, cond {len(cond)}")
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"x_t is {tuple(x_t.shape[1:])}, but {self.name} was trained on "
                             f"latents of {self.shape}: another canvas gives poor pictures")
        return self.eps_of(self.network, x_t, t, cond)

    def eps_of(self, network, x_t, t, cond, **kwargs):
        """eps() by φ's view of the network, on a canvas of any size."""
        levels = self.alpha_sigma(t)             # ValueError for a wrong t, before the network
        with full_precision():
            dtype = self.dtype                   # looks at all weights: once is enough
            tokens, pooled = self.unpack(cond.to(dtype))
            output = self.family.predict(self, network, x_t.to(dtype), t, tokens, pooled,
                                         **kwargs)
            return to_eps(output.float(), x_t, *levels, self.prediction_type)


# --------------------------------------------------- generators whose θ is x0, or a picture, itself
class Latents(nn.Module):
    """The simplest generator: θ is x0 itself, `images` [B, 3, H, W] encoded, or unit noise."""

    def __init__(self, prior, particles=1, rng=None, images=None):
        super().__init__()
        check_start(images, particles, rng)
        self.prior = prior
        if images is None:
            start = torch.randn(particles, *prior.shape, generator=rng, device="cpu")
            start = start.to(prior.device)
        else:
            with torch.no_grad():
                start = repeated(prior.encode_image(images.to(prior.device)), particles)
        self.theta = nn.Parameter(start)

    @property
    def batch(self):
        return len(self.theta)

    def forward(self, rows=None):
        """x0 of all pictures, or of those with these numbers."""
        return self.theta if rows is None else self.theta[rows]

    @torch.no_grad()
    def images(self):
        """-> RGB [B, 3, H, W] in [0, 1]."""
        return self.prior.decode(self.theta)


class Pixels(nn.Module):
    """θ is the picture; x0 is its encoding, so that gradients reach the pixels through the VAE."""

    def __init__(self, prior, particles=1, rng=None, images=None):
        super().__init__()
        check_start(images, particles, rng)
        self.prior = prior
        if images is None:
            noise = torch.randn(particles, 3, *prior.image_size, generator=rng, device="cpu")
            images = 0.5 + 0.1 * noise
        self.theta = nn.Parameter(repeated(images.to(prior.device), particles))

    @property
    def batch(self):
        return len(self.theta)

    def forward(self, rows=None):
        """x0 of all pictures, or of those with these numbers."""
        return self.prior.encode_image(self.theta if rows is None else self.theta[rows])

    @torch.no_grad()
    def images(self):
        return self.theta.clamp(0, 1)


def repeated(start, particles):
    """[N, …] -> [particles, …], the N in turn: particle i begins at picture i mod N.

    ValueError where the particles are no multiple of the pictures.
    """
    if particles % len(start):
        raise ValueError(f"{particles} particles cannot start from {len(start)} pictures alike")
    return torch.cat([start] * (particles // len(start)))


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
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"the ODE takes a whole number of steps, at least 1 step, not {steps!r}")
    for k in range(steps, 0, -1):
        now = t * k // steps
        if eps is None:
            eps = eps_of(x_t, now)
        x0 = one_step_x0(x_t, eps, *alpha_sigma(now))
        # x_{t'} = α_{t'} x̂0 + σ_{t'} ε;  of the last step x̂0 is the end
        alpha_t, sigma_t = alpha_sigma(t * (k - 1) // steps)
        x_t = alpha_t * x0 + sigma_t * eps
        eps = None
    return x0


@torch.no_grad()
def ddim_samples(prior, prompts, x_T, steps=50, lam=3.0):
    """Text-to-image by the deterministic DDIM sampler from noise x_T [B, C, H, W] -> x0.

    What distillation is compared with: the pictures that the prior itself makes of the prompts.
    prompts: B texts. ValueError for another number of them, and for numbers that are not finite.
    """
    # NaN would go through all steps without an error
    if not (torch.is_tensor(x_T) and x_T.isfinite().all() and math.isfinite(lam)):
        raise ValueError("x_T is a tensor of finite numbers, and lam a finite number")
    y, null = prior.encode_text(prompts), prior.encode_text([""])
    if len(x_T) != len(y):
        raise ValueError(f"{len(y)} prompts for {len(x_T)} pictures of noise: one for each")
    t = torch.full((len(y),), prior.steps - 1, device=prior.device)

    def eps_of(x, t):
        if lam == 1:
            return prior.eps(x, t, y)
        both = prior.eps(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([null.expand_as(y), y]))
        eps_uncond, eps_y = both.chunk(2)
        return eps_uncond + lam * (eps_y - eps_uncond)                   # Eq. 2
    return ode_end(eps_of, x_T.to(prior.device), t, steps, prior.alpha_sigma)


def compile_blocks(network):
    """torch.compile of its repeated blocks alone: diffusers' compile_repeated_blocks, and SD3's.

    A block is compiled once for all places where it stands, which a whole network is not.
    """
    names = network._repeated_blocks or ["JointTransformerBlock"]
    for block in network.modules():
        if type(block).__name__ in names:
            block.compile(dynamic=False)


def usable(device):
    """The device of a --device; None or "auto": cuda where there is one. Raises UserError.

    Of several processes each gets the device of its own number on its machine.
    """
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
