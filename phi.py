"""phi.py — φ, what predicts ε_φ for the fake samples: a LoRA, or an embedding.

Each is made by its class(prior, prompts, …) and is then a module, phi(x_t, t, cond, eps,
camera=None, answers=None) -> ε_φ like x_t in float32. Its trainable parameters are
float32 whatever the prior's dtype, and it saves itself in the ecosystem's formats:
`pipe.load_lora_weights(folder)` and `pipe.load_textual_inversion(file)` take what save() writes.
The prior never changes.
"""
import copy
import re
from pathlib import Path

import torch
from torch import nn

from loading import quiet, read_lora
from prior import Prior, full_precision, readers_of


def second_view(network):
    """A copy whose weights and buffers *are* those of the prior's `network`: the same storage."""
    # deepcopy takes what is in its memo for copied already: these tensors stay the very same
    frozen = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in frozen})


def with_adapter(layer, rank, scale=1.0):
    """peft's LoRA layer around a frozen one: x ↦ layer(x) + scale · B A x. A, B have no values yet.

    layer: a linear one or a convolution, also one that peft has adapted already: its adapters stay
    as they are, below φ's.
    """
    from peft import LoraConfig
    from peft.tuners.lora import Conv2d, Linear
    plain, kind = plain_layer(layer), Linear
    if isinstance(plain, nn.Conv2d):
        kind = Conv2d
        layer.groups = plain.groups                           # peft reads it
    with torch.device("meta"):                     # draws nothing from the global generator
        adapted = kind(layer, "default", LoraConfig(), r=rank, lora_alpha=rank)
    adapted.scaling["default"] = scale
    return adapted


def plain_layer(module):
    """The layer below the adapters that peft has put around it.

    A prior may have some: a user's LoRA of a style or a subject.
    """
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


@torch.no_grad()
def set_adapter(layer, down, up):
    """Give A and B their values. ValueError for another shape; 1 × 1 at its end may be left out."""
    for module, value in ((layer.lora_A["default"], down), (layer.lora_B["default"], up)):
        wanted = module.weight.shape
        if value.shape[:2] != wanted[:2] or value.numel() != wanted.numel():
            raise ValueError(f"{list(value.shape)} in place of {list(wanted)}")
        if module.weight.is_meta:
            empty = torch.empty(wanted, dtype=torch.float32, device=layer.weight.device)
            module.weight = nn.Parameter(empty)
        module.weight.copy_(value.reshape(wanted))


# to_out.0 and the four after it are the two halves of a joint block, the last is FLUX.2's
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
             "to_add_out", "to_qkv_mlp_proj")


class LoRAPhi(nn.Module):
    """VSD's and ASD's φ: a second view of the prior's network with low-rank adapters.

    The view's frozen weights *are* the prior's (same storage), the user's own adapters among them;
    φ's are its own: there is no adapter to switch on and off, and the prior never sees them. At
    step 0, ε_φ = ε_y exactly.

    prior: it may be another checkpoint than the loop's (the paper's 3D setting: prior 2.1-base,
    predicting ε, φ 2.1, predicting v) with the same latents and noise schedule. phi_model: such a
    checkpoint's folder or name, loaded in place of `prior`; where it reads text in another way, φ
    is told the one prompt of `prompts`. cond [1, L, C]: what φ is told instead of the loop's
    prompt embedding; guidance inside φ has no effect then. camera: length of the flattened camera
    (0: none), which enters through the class embedding of φ's own view, a UNet's. checkpointing:
    less memory, more time. targets: ends of the names of the layers to adapt. phi_init: a LoRA to
    start from, a file or a folder: layers, ranks and scales are its own then. ValueError where
    something does not fit.

    It learns by Eqs. 9 and 10 in ε, also where its checkpoint predicts v. All peers train such a φ
    in v, whose squared error is 1/α_t² of that in ε: with them late t weigh more.
    """

    def __init__(self, prior, prompts=None, rank=4, cond=None, camera=0, checkpointing=False,
                 seed=0, targets=ATTENTION, phi_init=None, phi_model=None):
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding
        from peft import LoraConfig
        if cond is not None and not (torch.is_tensor(cond) and cond.dim() == 3):
            raise ValueError("cond is prompt embeddings [1, L, C], from prior.encode_text([…]), "
                             f"not {cond!r}")
        if phi_model is not None:
            prior, cond = own_checkpoint(prior, phi_model, as_list(prompts), cond)
        if not isinstance(camera, int) or camera < 0:
            raise ValueError(f"camera is the length of a camera's vector, or 0, not {camera!r}")
        if camera and prior.family.network != "unet":
            raise ValueError(f"{prior.name}: a φ that knows the camera needs a UNet")
        self.prior, self.cond, self.camera = prior, cond, camera
        self.network = second_view(prior.network)
        # A and B are drawn here, as rng is the only source of randomness
        rng = torch.Generator().manual_seed(seed)
        if phi_init is None:
            self.adapt(rank, targets, rng)
        else:
            self.adapt_as(phi_init)
        # so that peft's own functions, such as get_peft_model_state_dict, find φ's adapter
        self.network.peft_config = {"default": LoraConfig()}
        if camera:
            width = self.network.time_embedding.linear_2.out_features
            embedding = untrained(lambda: TimestepEmbedding(camera, width), rng)
            nn.init.zeros_(embedding.linear_2.weight)    # step 0: the camera changes nothing
            nn.init.zeros_(embedding.linear_2.bias)
            self.network.class_embedding = embedding.to(prior.device)
            if phi_init is not None:
                self.load_camera(phi_init)
        if checkpointing:
            self.network.enable_gradient_checkpointing()

    def adapt(self, rank, targets, rng):
        """Put adapters beside the layers whose names end in `targets`, drawn from rng.

        ValueError where the prior has no such layers, and for a rank of 0 or 2.5.
        """
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank is a whole number, at least 1, not {rank!r}")
        # A ~ N(0, 1/r²) and B = 0, as in diffusers' LoRA layers and in ProlificDreamer
        targets = as_list(targets)
        ends = tuple(f".{target}" for target in targets)
        names = [name for name, module in self.network.named_modules()
                 if f".{name}".endswith(ends) and can_adapt(module)]
        if not names:
            raise ValueError(f"{self.prior.name} has no layers named {', '.join(targets)}")
        for name in names:
            layer = with_adapter(self.network.get_submodule(name), rank)
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            set_adapter(layer, torch.randn(down.shape, generator=rng, device="cpu") / rank,
                        torch.zeros(up.shape, device="cpu"))     # step 0: nothing is changed
            self.network.set_submodule(name, layer)
        self.adapted = names

    def adapt_as(self, place):
        """Put adapters where a LoRA's file has them, with its values, ranks and scales."""
        found = read_lora(self.prior.pipe, self.prior.family.network, place)
        modules = dict(self.network.named_modules())
        unknown = [name for name in found if not can_adapt(modules.get(name))]
        if unknown:
            raise ValueError(f"{place}: a LoRA of other layers than {self.prior.name} has: "
                             f"{len(unknown)}, such as {unknown[0]}")
        self.adapted = [name for name in modules if name in found]    # in the network's own order
        for name in self.adapted:
            adapter = found[name]
            layer = with_adapter(modules[name], len(adapter.down), adapter.scale)
            try:
                set_adapter(layer, adapter.down, adapter.up)
            except ValueError as error:
                raise ValueError(f"{place}: {name} has another shape than {self.prior.name}'s: "
                                 f"{error}") from error
            self.network.set_submodule(name, layer)

    def layers(self):
        """The layers that φ adapts: {name: peft's layer}."""
        return {name: self.network.get_submodule(name) for name in self.adapted}

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        if self.cond is not None:         # in 3D the plain prompt: φ is told the camera, no view
            cond = self.cond.expand(len(x_t), -1, -1)
        extra = {"class_labels": camera} if self.camera else {}
        return self.prior.eps_of(self.network, x_t, t, cond, **extra)

    def save(self, folder):
        """Write what `pipe.load_lora_weights(folder)` takes (and camera.safetensors beside it)."""
        from diffusers.utils import convert_state_dict_to_diffusers
        from safetensors.torch import save_file
        Path(folder).mkdir(parents=True, exist_ok=True)       # an error where it is a file
        part = self.prior.family.network
        named, ranks, alphas = {}, {}, {}
        for name, layer in self.layers().items():
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            named[f"{name}.lora_A.weight"] = down.detach()
            named[f"{name}.lora_B.weight"] = up.detach()
            ranks[name], alphas[name] = len(down), len(down) * layer.scaling["default"]
        if part == "unet":
            # in the names that diffusers has used since its first LoRA, if it has all of them
            older = convert_state_dict_to_diffusers(named)
            if not any(".lora_A" in key for key in older):
                named = older
        options = {f"{part}_lora_layers": named}
        if ranks != alphas:                                   # scales that are not 1 must be said
            options[f"{part}_lora_adapter_metadata"] = {
                "r": max(ranks.values()), "lora_alpha": max(ranks.values()),
                "target_modules": list(ranks), "rank_pattern": exactly(ranks),
                "alpha_pattern": exactly(alphas)}
        self.prior.pipe.save_lora_weights(folder, **options)
        if self.camera:
            save_file(self.network.class_embedding.state_dict(),
                      Path(folder) / "camera.safetensors")

    def load(self, folder):
        """Read what save(), or another LoRA training, wrote into this φ's own adapters.

        safetensors only. Raises ValueError for other layers, another rank or another scale.
        """
        found = read_lora(self.prior.pipe, self.prior.family.network, folder)
        layers = self.layers()
        given = {name: (len(adapter.down), adapter.scale) for name, adapter in found.items()}
        expected = {name: (layer.r["default"], layer.scaling["default"])
                    for name, layer in layers.items()}
        if given != expected:
            raise ValueError(f"{folder}: a LoRA of other layers, another rank or another scale "
                             "than φ's: phi_init makes a φ like it")
        for name, layer in layers.items():
            set_adapter(layer, found[name].down, found[name].up)
        if self.camera:
            self.load_camera(folder)

    def load_camera(self, folder):
        """Read the camera's embedding, if φ was saved with one.

        A LoRA that was trained elsewhere has none: the embedding stays as it is.
        """
        from safetensors.torch import load_file
        file = Path(folder) / "camera.safetensors"
        if file.is_file():
            self.network.class_embedding.load_state_dict(load_file(file))


def can_adapt(module):
    return isinstance(plain_layer(module), (nn.Linear, nn.Conv2d))


def exactly(values):
    """{layer: value} -> {peft's pattern of names: value}, each pattern for that layer alone."""
    return {f"^{re.escape(name)}": value for name, value in values.items()}


def own_checkpoint(prior, place, prompts, cond):
    """-> φ's own Prior, and what φ is told. ValueError where it does not fit beside the loop's."""
    height, width = prior.image_size
    phi_prior = Prior.from_pretrained(place, prior.device, prior.dtype,
                                      size=height if height == width else None)
    if phi_prior.shape != prior.shape:
        raise ValueError(f"{place} has latents of {phi_prior.shape}, {prior.name} of {prior.shape}")
    for name in ("alphas", "sigmas", "center", "scale"):
        if not alike(getattr(phi_prior, name), getattr(prior, name)):
            raise ValueError(f"{place} has another noise schedule, or another scale of its "
                             f"latents, than {prior.name}")
    texts = ["", *prompts[:1]]
    if not alike(phi_prior.encode_text(texts), prior.encode_text(texts)):
        if len(prompts) != 1:
            raise ValueError(f"{place} reads text in another way than {prior.name}: its φ takes "
                             f"one prompt, not {len(prompts)}")
        cond = phi_prior.encode_text(prompts)
    phi_prior.vae.to("cpu")                            # φ needs its network alone
    phi_prior.release_text_encoders()
    return phi_prior, cond


def alike(a, b):
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2)


class EmbeddingPhi(nn.Module):
    """Textual inversion: ε_φ = ε(x_t; φ, t) of the frozen prior, told `tokens` learnable words.

    words: for each text encoder, [tokens, its width] float32, parameters of their own, spliced into
    the token sequence: the text encoders' tables are never leaves. They start at the word
    embeddings of the first prompt (cut, or filled up with the last one). checkpointing: less
    memory, more time. ValueError for too many tokens or a part of one, where there is no prompt,
    and for priors with other text encoders than CLIP's.
    """

    def __init__(self, prior, prompts, tokens=4, checkpointing=False):
        super().__init__()
        if not isinstance(prompts, (str, list, tuple)) or not as_list(prompts):
            raise ValueError("an embedding φ starts at its prompt: EmbeddingPhi(prior, prompt), "
                             f"not {prompts!r}")
        if prior.family.read is None:
            raise ValueError(f"{prior.name}: an embedding φ needs CLIP's text encoders: use a LoRA")
        self.prior = prior
        self.encoders, self.tables, self.ids = [], [], []      # tables: names; ids [1, L]
        self.words = nn.ParameterList()
        for encoder, tokenizer in readers_of(prior.pipe):
            tokenizer = copy.deepcopy(tokenizer)     # as padding= below stays set in it
            table = encoder.get_input_embeddings().weight
            limit = tokenizer.model_max_length
            if not (isinstance(tokens, int) and 1 <= tokens <= limit - 2):
                raise ValueError(f"tokens is a whole number in 1 … {limit - 2}, not {tokens!r}")
            with quiet():
                words = tokenizer(as_list(prompts)[0]).input_ids[1:-1]
            words = words or tokenizer("").input_ids[-1:]
            words = (words + [words[-1]] * tokens)[:tokens]
            self.words.append(nn.Parameter(table[words].detach().float().to(prior.device)))
            null = tokenizer("", padding="max_length", max_length=limit).input_ids
            new = range(len(table), len(table) + tokens)            # rows below the table's own
            ids = [null[0], *new, *null[1:-tokens]]
            self.ids.append(torch.tensor([ids], device=prior.device))
            self.tables.append(next(name for name, p in encoder.named_parameters() if p is table))
            self.encoders.append(encoder)
        self.view = None                   # None: the prior's network itself serves
        if checkpointing:
            self.view = second_view(prior.network)
            self.view.enable_gradient_checkpointing()

    def encode(self):
        """-> [1, L, C]: the prompt that consists of the learnable words."""
        outputs = []
        for encoder, name, words, ids in zip(self.encoders, self.tables, self.words, self.ids):
            if encoder.device != self.prior.device:     # release_text_encoders has moved it
                encoder.to(self.prior.device)
            table = encoder.get_parameter(name)
            longer = torch.cat([table, words.to(table.dtype)])
            with full_precision():
                outputs.append(torch.func.functional_call(encoder, {name: longer}, ids,
                                                          {"output_hidden_states": True}))
        return self.prior.pack(*self.prior.family.read(outputs))

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
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
        expected = [tuple(words.shape) for words in self.words]
        if shapes != expected:
            raise ValueError(f"{folder}: words {shapes}, φ has {expected}")
        with torch.no_grad():
            for name, words in zip(self.names(), self.words, strict=True):
                words.copy_(found[name])


def untrained(make, rng):
    """make(), a network, on the CPU, with values as torch's defaults, but drawn from rng alone.

    torch would draw them from the global generator, which is everybody's.
    """
    with torch.device("meta"):
        network = make()
    network.to_empty(device="cpu")
    with torch.no_grad():
        for layer in network.modules():
            weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
            for p in (weight, bias):
                if p is None:
                    continue
                if weight.dim() > 1:                              # nn.Linear's and nn.Conv2d's
                    bound = weight[0].numel() ** -0.5
                    p.uniform_(-bound, bound, generator=rng)
                else:                                             # a normalisation's
                    p.fill_(1.0 if p is weight else 0.0)
    return network


def as_list(prompts):
    """A prompt, a list of them, or None -> a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts or [])
