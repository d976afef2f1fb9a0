"""phi.py — φ, what predicts ε_φ for the fake samples: the noise, a LoRA, or an embedding.

Each is made by its class(prior, prompts, …) and is then a module, phi(x_t, t, cond, eps,
camera=None, eps_uncond=None, eps_y=None) -> ε_φ like x_t in float32. Its trainable parameters are
float32 whatever the prior's dtype, and it saves itself in the ecosystem's formats:
`pipe.load_lora_weights(folder)` and `pipe.load_textual_inversion(file)` take what save() writes.
The prior never changes.
"""
import copy
import inspect
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


def second_view(network):
    """A copy whose weights and buffers *are* those of the prior's `network`: the same storage."""
    frozen = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in frozen})


class LoRAPhi(nn.Module):
    """VSD's and ASD's φ: a second view of the prior's network with low-rank adapters.

    The view's frozen weights *are* the prior's (same storage), its adapters are its own: there is
    no adapter to switch on and off, and the prior never sees them. At step 0, ε_φ = ε_y exactly.

    prior: whose network; it may be another checkpoint than the loop's (the paper's 3D setting:
    prior 2.1-base, predicting ε, φ 2.1, predicting v) with the same latents and noise schedule.
    cond [1, L, C]: what φ is told instead of the loop's prompt embedding (such a checkpoint's own;
    or, in 3D, the prompt without the view); guidance inside φ has no effect then. camera: length of
    the flattened camera (0: none), which enters through the class embedding of φ's own view, a
    UNet's. checkpointing: less memory, more time. phi_init: a folder or file to load() first.
    """

    def __init__(self, prior, prompts=None, rank=4, cond=None, camera=0, checkpointing=False,
                 seed=0, targets=("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"),
                 phi_init=None):
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding
        from peft import LoraConfig, inject_adapter_in_model
        if camera and prior.family.network != "unet":
            raise ValueError(f"{prior.name}: a φ that knows the camera needs a UNet")
        self.prior, self.cond, self.camera = prior, cond, camera
        self.network = second_view(prior.network)
        # made without values, so that none are drawn from the global generator; scale α / r = 1
        # (peft's own low_cpu_mem_usage changes nn.Module for every thread while it works)
        with torch.device("meta"):
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank,
                                               target_modules=list(targets)), self.network)
        rng = torch.Generator().manual_seed(seed)
        values = {name: torch.randn(p.shape, generator=rng) / rank if "lora_A" in name
                  else torch.zeros(p.shape)                       # step 0: nothing is changed
                  for name, p in self.named_parameters() if "lora_" in name}
        self.load_state_dict({name: value.to(prior.device) for name, value in values.items()},
                             strict=False, assign=True)
        if camera:
            width = self.network.time_embedding.linear_2.out_features
            embedding = untrained(lambda: TimestepEmbedding(camera, width), rng)
            nn.init.zeros_(embedding.linear_2.weight)             # nor does the camera
            nn.init.zeros_(embedding.linear_2.bias)
            self.network.class_embedding = embedding.to(prior.device)
        if checkpointing:
            self.network.enable_gradient_checkpointing()
        if phi_init is not None:
            self.load(phi_init)

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        cond = cond if self.cond is None else self.cond.expand(len(x_t), -1, -1)
        extra = {"class_labels": camera} if self.camera else {}
        return self.prior.eps_of(self.network, x_t, t, cond, **extra)

    def save(self, folder):
        """Write what `pipe.load_lora_weights(folder)` takes (and camera.safetensors beside it)."""
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file
        Path(folder).mkdir(parents=True, exist_ok=True)       # an error where it is a file
        layers = get_peft_model_state_dict(self.network)
        if self.prior.family.network == "unet":
            layers = convert_state_dict_to_diffusers(layers)
        self.prior.pipe.save_lora_weights(
            folder, **{f"{self.prior.family.network}_lora_layers": layers})
        if self.camera:
            save_file(self.network.class_embedding.state_dict(),
                      Path(folder) / "camera.safetensors")

    def load(self, folder):
        """Read what save(), or a LoRA training of scale 1, wrote: a folder, or a file.

        safetensors only. Raises ValueError for other scales, other layers and another rank.
        """
        from diffusers.utils import convert_unet_state_dict_to_peft
        from peft.utils import set_peft_model_state_dict
        from safetensors.torch import load_file
        part = self.prior.family.network
        try:
            layers, *alphas, about = self.prior.pipe.lora_state_dict(
                folder, local_files_only=True, use_safetensors=True, return_lora_metadata=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no LoRA as safetensors") from error
        about = about or {}
        if any(alphas) or about.get(f"{part}.lora_alpha") != about.get(f"{part}.r"):
            raise ValueError(f"{folder}: a LoRA with a scale of its own: not φ's")
        layers = {key.removeprefix(f"{part}."): value for key, value in layers.items()}
        layers = convert_unet_state_dict_to_peft(layers)
        try:
            found = set_peft_model_state_dict(self.network, layers)
        except RuntimeError as error:
            raise ValueError(f"{folder}: a LoRA of another rank: {error}") from error
        missing = [key for key in found.missing_keys if "lora_" in key]
        if missing or found.unexpected_keys:
            raise ValueError(f"{folder}: a LoRA of other layers than φ's")
        if self.camera:
            camera = load_file(Path(folder) / "camera.safetensors")
            self.network.class_embedding.load_state_dict(camera)


class EmbeddingPhi(nn.Module):
    """Textual inversion: ε_φ = ε(x_t; φ, t) of the frozen prior, told `tokens` learnable words.

    words: for each text encoder, [tokens, its width] float32, parameters of their own, spliced into
    the token sequence: the text encoders' tables are never leaves. They start at the word
    embeddings of the first prompt (cut, or filled up with the last one). checkpointing: less
    memory, more time. ValueError for too many tokens, where there is no prompt, and for priors with
    other text encoders than CLIP's.
    """

    def __init__(self, prior, prompts, tokens=4, checkpointing=False):
        super().__init__()
        if prompts is None:
            raise ValueError("an embedding φ starts at its prompt: EmbeddingPhi(prior, prompt)")
        if prior.family.read is None:
            raise ValueError(f"{prior.name}: an embedding φ needs CLIP's text encoders: use a LoRA")
        self.prior, pipe = prior, prior.pipe
        parts = [name for name in ("", "_2") if getattr(pipe, f"text_encoder{name}", None)]
        self.encoders = [getattr(pipe, f"text_encoder{name}") for name in parts]
        self.tables, self.ids = [], []                    # names; token ids [1, L]
        self.words = nn.ParameterList()
        for encoder, tokenizer in zip(
                self.encoders, (getattr(pipe, f"tokenizer{name}") for name in parts)):
            tokenizer = copy.deepcopy(tokenizer)     # it keeps its padding, for all threads alike
            table = encoder.get_input_embeddings().weight
            limit = tokenizer.model_max_length
            if not 1 <= tokens <= limit - 2:
                raise ValueError(f"tokens must lie in 1 … {limit - 2}, not {tokens}")
            words = tokenizer(as_list(prompts)[0]).input_ids[1:-1]
            words = words or tokenizer("").input_ids[-1:]
            words = (words + [words[-1]] * tokens)[:tokens]
            self.words.append(nn.Parameter(table[words].detach().float().to(prior.device)))
            null = tokenizer("", padding="max_length", max_length=limit,
                             return_tensors="pt").input_ids[0]
            new = torch.arange(tokens) + len(table)
            self.ids.append(torch.cat([null[:1], new, null[1:-tokens]])[None].to(prior.device))
            self.tables.append(next(name for name, p in encoder.named_parameters() if p is table))
        self.view = None                   # the prior's own, but where it has to change
        if checkpointing:
            self.view = second_view(prior.network)
            self.view.enable_gradient_checkpointing()

    def encode(self):
        """-> [1, L, C]: the prompt that consists of the learnable words."""
        outputs = []
        for encoder, name, words, ids in zip(self.encoders, self.tables, self.words, self.ids):
            if encoder.device != self.prior.device:                # it had left after the prompts
                encoder.to(self.prior.device)
            table = encoder.get_parameter(name)
            longer = torch.cat([table, words.to(table.dtype)])
            outputs.append(torch.func.functional_call(encoder, {name: longer}, ids,
                                                      {"output_hidden_states": True}))
        return self.prior.pack(*self.prior.family.read(outputs))

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        network = self.prior.network if self.view is None else self.view
        return self.prior.eps_of(network, x_t, t, self.encode().expand(len(x_t), -1, -1))

    def save(self, folder):
        """Write learned_embeds.safetensors: after `pipe.load_textual_inversion(file)`, "<phi>".

        Of two text encoders: clip_l and clip_g, to be loaded one by one, as diffusers does.
        """
        from safetensors.torch import save_file
        file = Path(folder) / "learned_embeds.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: words.detach().cpu()
                   for name, words in zip(self.names(), self.words, strict=True)}, file)

    def names(self):
        return ["<phi>"] if len(self.words) == 1 else ["clip_l", "clip_g"]

    def load(self, folder):
        """Read what save() wrote. Raises ValueError for another number of words, another width."""
        from safetensors.torch import load_file
        found = load_file(Path(folder) / "learned_embeds.safetensors")
        shapes = [tuple(found[name].shape) for name in self.names() if name in found]
        own = [tuple(words.shape) for words in self.words]
        if shapes != own:
            raise ValueError(f"{folder}: words {shapes}, φ has {own}")
        with torch.no_grad():
            for name, words in zip(self.names(), self.words, strict=True):
                words.copy_(found[name])


def untrained(make, rng):
    """make(), a network, on the CPU, with the values that torch gives its layers: drawn from rng
    alone, as the global generator is everybody's."""
    with torch.device("meta"):
        network = make()
    network.to_empty(device="cpu")
    with torch.no_grad():
        for layer in network.modules():
            weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
            for p in (v for v in (weight, bias) if v is not None):
                if weight.dim() > 1:                              # nn.Linear's and nn.Conv2d's
                    bound = weight[0].numel() ** -0.5
                    p.uniform_(-bound, bound, generator=rng)
                else:                                             # a normalisation's
                    p.fill_(float(p is weight))
    return network


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
