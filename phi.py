"""phi.py — φ, what predicts ε_φ for the fake samples: the noise, a LoRA, or an embedding.

Each is made by its class(prior, prompts, …) and is then a module, phi(x_t, t, cond, eps,
camera=None, eps_uncond=None, eps_y=None) -> ε_φ like x_t in float32. Its trainable parameters are
float32 whatever the prior's dtype, and it saves itself in the ecosystem's formats:
`pipe.load_lora_weights(folder)` and `pipe.load_textual_inversion(file)` take what save() writes.
The prior never changes.
"""
import copy
import inspect
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


class NoisePhi(nn.Module):
    """SDS: ε_φ = ε, the added noise itself. Nothing to train, no network to evaluate."""

    def __init__(self, prior=None, prompts=None):
        super().__init__()

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        return eps

    def save(self, folder):
        """Nothing to keep."""


def second_view(unet):
    """A copy of the network whose weights and buffers *are* those of `unet`: the same storage."""
    frozen = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in frozen})


class LoRAPhi(nn.Module):
    """VSD's and ASD's φ: a second view of the UNet with low-rank adapters.

    The view's frozen weights *are* the prior's (same storage), its adapters are its own: there is
    no adapter to switch on and off, and the prior never sees them. At step 0, ε_φ = ε_y exactly.

    prior: whose UNet; it may be another checkpoint than the loop's prior (the paper's 3D setting:
    prior 2.1-base, predicting ε, φ 2.1, predicting v) with the same latents and noise schedule.
    cond [1, L, C]: what φ is told instead of the loop's prompt embedding (such a checkpoint's own;
    or, in 3D, the prompt without the view); guidance inside φ has no effect then. camera: length of
    the flattened camera (0: none), which enters through the class embedding of φ's own view.
    checkpointing: less memory, more time.
    """

    def __init__(self, prior, prompts=None, rank=4, targets=("to_q", "to_k", "to_v", "to_out.0"),
                 cond=None, camera=0, checkpointing=False, seed=0):
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding
        from peft import LoraConfig
        self.prior, self.cond = prior, cond
        self.unet = second_view(prior.unet)
        with seeded(seed):
            # scale lora_alpha / r = 1; "gaussian": N(0, 1/r²) down, zeros up
            self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets),
                                             init_lora_weights="gaussian"))
            if camera:
                width = self.unet.time_embedding.linear_2.out_features
                embedding = TimestepEmbedding(camera, width).to(prior.device)
                nn.init.zeros_(embedding.linear_2.weight)     # step 0: the camera changes nothing
                nn.init.zeros_(embedding.linear_2.bias)
                self.unet.class_embedding = embedding
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        cond = cond if self.cond is None else self.cond.expand(len(x_t), -1, -1)
        extra = {} if self.unet.class_embedding is None else {"class_labels": camera}
        return self.prior.eps_of(self.unet, x_t, t, cond, **extra)

    def save(self, folder):
        """Write what `pipe.load_lora_weights(folder)` takes (and camera.safetensors beside it)."""
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file
        Path(folder).mkdir(parents=True, exist_ok=True)       # an error where it is a file
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
        if self.unet.class_embedding is not None:
            save_file(self.unet.class_embedding.state_dict(), Path(folder) / "camera.safetensors")

    def load(self, folder):
        """Read what save(), or a LoRA training of scale 1, wrote.

        Raises ValueError for other scales, other layers and another rank.
        """
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_unet_state_dict_to_peft
        from peft.utils import set_peft_model_state_dict
        from safetensors.torch import load_file
        layers, alphas, about = StableDiffusionPipeline.lora_state_dict(
            folder, local_files_only=True, return_lora_metadata=True)
        about = about or {}
        if alphas or about.get("unet.lora_alpha") != about.get("unet.r"):
            raise ValueError(f"{folder}: a LoRA with a scale of its own: not φ's")
        layers = {key.removeprefix("unet."): value for key, value in layers.items()}
        layers = convert_unet_state_dict_to_peft(layers)
        try:
            found = set_peft_model_state_dict(self.unet, layers)
        except RuntimeError as error:
            raise ValueError(f"{folder}: a LoRA of another rank: {error}") from error
        missing = [key for key in found.missing_keys if "lora_" in key]
        if missing or found.unexpected_keys:
            raise ValueError(f"{folder}: a LoRA of other layers than φ's")
        if self.unet.class_embedding is not None:
            camera = load_file(Path(folder) / "camera.safetensors")
            self.unet.class_embedding.load_state_dict(camera)


class EmbeddingPhi(nn.Module):
    """Textual inversion: ε_φ = ε(x_t; φ, t) of the frozen prior, told `tokens` learnable words.

    embedding [tokens, width] float32 is its own parameter, spliced into the token sequence: the
    text encoder's table is never a leaf. It starts at the word embeddings of the first prompt (cut,
    or filled up with the last one). checkpointing: less memory, more time. ValueError for too many
    tokens, and where there is no prompt.
    """

    def __init__(self, prior, prompts, tokens=4, checkpointing=False):
        super().__init__()
        if prompts is None:
            raise ValueError("an embedding φ starts at its prompt: EmbeddingPhi(prior, prompt)")
        self.prior = prior
        table = prior.text_encoder.get_input_embeddings().weight
        limit = prior.tokenizer.model_max_length - 2
        if not 1 <= tokens <= limit:
            raise ValueError(f"tokens must lie in 1 … {limit}, not {tokens}")
        words = prior.tokenizer(as_list(prompts)[0]).input_ids[1:-1]
        words = words or prior.tokenizer("").input_ids[-1:]
        words = (words + [words[-1]] * tokens)[:tokens]
        self.embedding = nn.Parameter(table[words].detach().float().clone())
        null = prior.token_ids([""])[0]
        new = torch.arange(tokens, device=null.device) + len(table)
        self.ids = torch.cat([null[:1], new, null[1:-tokens]])[None]
        self.name = next(name for name, p in prior.text_encoder.named_parameters() if p is table)
        self.view = None                   # the prior's own, but where it has to change
        if checkpointing:
            self.view = second_view(prior.unet)
            self.view.enable_gradient_checkpointing()

    def encode(self):
        """-> [1, L, C]: the prompt that consists of the learnable words."""
        table = self.prior.text_encoder.get_parameter(self.name)
        longer = torch.cat([table, self.embedding.to(table.dtype)])
        return torch.func.functional_call(self.prior.text_encoder, {self.name: longer}, self.ids)[0]

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        unet = self.prior.unet if self.view is None else self.view
        return self.prior.eps_of(unet, x_t, t, self.encode().expand(len(x_t), -1, -1))

    def save(self, folder):
        """Write learned_embeds.safetensors: after `pipe.load_textual_inversion(file)`, "<phi>"."""
        from safetensors.torch import save_file
        file = Path(folder) / "learned_embeds.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"<phi>": self.embedding.detach().cpu()}, file)

    def load(self, folder):
        """Read what save() wrote. Raises ValueError for another number of words, another width."""
        from safetensors.torch import load_file
        (value,) = load_file(Path(folder) / "learned_embeds.safetensors").values()
        if value.shape != self.embedding.shape:
            raise ValueError(f"{folder}: words {tuple(value.shape)}, φ has "
                             f"{tuple(self.embedding.shape)}")
        with torch.no_grad():
            self.embedding.copy_(value)


@contextmanager
def seeded(seed):
    """Draws of other libraries' initialisers, from `seed`, without touching the global state."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)     # torch.manual_seed: every GPU's, too
        yield


def make_phi(method, prior, prompts=None, seed=0, **options):
    """method.phi(prior, prompts, …), told what it takes of the run: the seed, λ, γ, the steps.

    method: with the attributes phi, lam, gamma and steps. prompts: one, or a list of all that the
    run can ask; None where φ needs none. options: the φ's own; TypeError for one that it lacks.
    """
    run = {"seed": seed, "lam": method.lam, "gamma": method.gamma, "steps": method.steps}
    takes = inspect.signature(method.phi).parameters
    return method.phi(prior, prompts, **{key: run[key] for key in run.keys() & takes} | options)


def as_list(prompts):
    """A prompt, a list of them, or None -> a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts or [])
