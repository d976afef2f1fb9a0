"""Every family of priors through the one door: tiny random pipelines of the real classes.

The oracle is each pipeline's own prediction, caught by a hook inside its own __call__; and a flow
prior that is exact, tiny/sd itself in a flow model's variables.
"""
import functools
import json
import math
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import asd
import nerf
import text_to_3d
from phi import EmbeddingPhi, LoRAPhi
from prior import Latents, Prior, UserError, ddim_samples
from test_distill import (  # noqa: F401 (fixtures)
    PROMPT,
    folders,
    load,
    no_network,
    rng,
    same,
    sample,
    save_tiny_pipeline,
    scramble,
    trainable,
)
from tiny import make

OTHERS = ["sdxl", "sd3", "sd3-dynamic", "flux2"]


# ------------------------------------------------------------------------------- tiny pipelines
def clip(tokenizer, kind, width):
    from transformers import CLIPTextConfig
    return kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def vae(kind, **config):
    return kind(down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, sample_size=16,
                up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
                layers_per_block=1, norm_num_groups=4, **config)


def sdxl(tokenizer):
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=32 + 24, attention_head_dim=2, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + 6 * 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    return StableDiffusionXLPipeline(
        vae(AutoencoderKL, scaling_factor=0.13, latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5]),
        clip(tokenizer, CLIPTextModel, 32), clip(tokenizer, CLIPTextModelWithProjection, 24),
        tokenizer, tokenizer, unet, make.make_scheduler())


def sd3(tokenizer, **schedule):
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=16,
        pooled_projection_dim=32 + 48, out_channels=4, pos_embed_max_size=8)
    return StableDiffusion3Pipeline(            # without its third encoder, T5, as many have it
        transformer, FlowMatchEulerDiscreteScheduler(**schedule),
        vae(AutoencoderKL, scaling_factor=1.5, shift_factor=0.06),
        clip(tokenizer, CLIPTextModelWithProjection, 32), tokenizer,
        clip(tokenizer, CLIPTextModelWithProjection, 48), tokenizer, None, None)


def flux2(tokenizer):
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
    words = Qwen2Tokenizer(vocab=tokenizer.get_vocab(), merges=[])
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text_encoder = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4))
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False)
    coder = vae(AutoencoderKLFlux2)
    coder.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    coder.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    schedule = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2KleinPipeline(schedule, coder, text_encoder, words, transformer)


MAKERS = {"sdxl": sdxl, "sd3": lambda words: sd3(words, shift=3.0),
          "sd3-dynamic": lambda words: sd3(words, use_dynamic_shifting=True), "flux2": flux2}


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    tokenizer = make.make_tokenizer([PROMPT, "a blue fox"], root / "words")
    for i, (name, maker) in enumerate(MAKERS.items()):
        torch.manual_seed(i)
        pipe = maker(tokenizer)
        network = pipe.components.get("unet") or pipe.transformer
        with torch.no_grad():                               # zeros at the start; and words matter
            for key, p in network.named_parameters():
                p += 0.05 * torch.randn_like(p) if "proj_out" in key or "norm" in key else 0
                p *= 10 if "attn2" in key and ("to_out.0.w" in key or "to_v" in key) else 1
        pipe.save_pretrained(root / name)
    return {name: root / name for name in MAKERS}


@pytest.fixture(scope="session")
def families(family_folders):
    """families(name) -> its Prior, which is loaded once, as nothing may change it."""
    return functools.cache(lambda name: Prior.from_pretrained(family_folders[name], "cpu",
                                                              torch.float32, size=16))


@pytest.fixture(params=OTHERS)
def family(request, families, family_folders):
    """(the Prior of a family, its folder)."""
    return families(request.param), family_folders[request.param]


# ------------------------------------------------------------------------------------- the oracle
class Caught(Exception):
    pass


def pipeline(folder):
    """As its user has it."""
    from diffusers import DiffusionPipeline
    index = json.loads((folder / "model_index.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(
        folder, **{key: None for key, value in index.items() if value == [None, None]})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipelines_own(folder, lam, step):
    """(what the pipeline predicts, guided, at x_t; x_t; the time it tells its network) in one step
    of its own __call__, and the pipeline."""
    pipe, seen = pipeline(folder), []
    scheduled = pipe.scheduler.step

    def step_function(predicted, t, x_t, *args, **kwargs):
        seen.append((predicted.clone(), x_t.clone(), t))
        return scheduled(predicted, t, x_t, *args, **kwargs)
    pipe.scheduler.step = step_function
    pipe(prompt=PROMPT, num_inference_steps=4, guidance_scale=lam, output_type="latent",
         generator=rng(), height=16, width=16)
    return *seen[step], pipe


def test_eps_is_the_pipelines_own_prediction(family, monkeypatch, step=1):
    """Guidance included; a flow model's velocity u is x_t + (1 − σ) u as ε."""
    (prior, folder), lam = family, 3.0
    predicted, x_t, time, pipe = pipelines_own(folder, lam, step)
    if prior.prediction_type == "flow":
        sigma = float(time) / 1000                            # none of the table's own, as a rule
        monkeypatch.setattr(prior, "sigmas", torch.full((1000,), sigma))
        monkeypatch.setattr(prior, "alphas", 1 - prior.sigmas)
        t = torch.tensor([7])
    else:
        t = torch.tensor([int(time)])
    unpacked = [v if v.dim() == 4 else v.transpose(1, 2).reshape(1, *prior.shape)
                for v in (predicted, x_t)]
    expected = unpacked[0]
    if prior.prediction_type == "flow":
        expected = unpacked[1] + (1 - sigma) * expected
    with torch.no_grad():
        eps_uncond, eps_y = (prior.eps(unpacked[1], t, prior.encode_text([text]))
                             for text in ("", PROMPT))
    assert not torch.allclose(eps_uncond, eps_y, atol=1e-3)            # the words matter
    torch.testing.assert_close(asd.cfg_noise(eps_uncond, eps_y, lam), expected,
                               rtol=1e-4, atol=1e-4)


def test_pictures_are_the_pipelines_own(family):
    prior, folder = family
    *_, pipe = pipelines_own(folder, 1.0, 0)
    latents, pictures = (pipe(prompt=PROMPT, num_inference_steps=2, output_type=kind,
                              generator=rng(), height=16, width=16).images
                         for kind in ("latent", "pt"))
    x0 = latents
    if prior.patch > 1:      # the pipeline gives unfolded latents, in the VAE's own units
        x0 = (nn.functional.pixel_unshuffle(latents, 2) - prior.center) * prior.scale
    torch.testing.assert_close(prior.decode(x0), pictures, rtol=1e-4, atol=1e-4)


def test_encoding_inverts_the_units_of_decoding(family, monkeypatch):
    """With a VAE that changes nothing, decode(encode) is the identity, in any units of x0."""
    prior, _ = family
    z = torch.randn(2, 4, 8, 8, generator=rng())
    monkeypatch.setattr("prior.check_images", lambda images: None)         # four colours are none
    monkeypatch.setattr(prior, "vae", SimpleNamespace(
        dtype=torch.float32, decode=lambda z: SimpleNamespace(sample=z / 20), encode=lambda images:
        SimpleNamespace(latent_dist=SimpleNamespace(mean=10 * images))))
    x0 = prior.encode_image((z / 10 + 1) / 2)
    assert x0.shape == (2, *prior.shape)
    torch.testing.assert_close(prior.decode(x0), (z / 40 + 0.5).clamp(0, 1))


# --------------------------------------------------------------------------------- its own time
def test_schedules_are_the_schedulers(family):
    """α + σ = 1 for flow, α² + σ² = 1 for the rest; σ rises with t as the scheduler has it."""
    prior, folder = family
    assert len(prior.alphas) == len(prior.sigmas) == 1000 and (prior.sigmas.diff() > 0).all()
    if prior.prediction_type != "flow":
        torch.testing.assert_close(prior.alphas ** 2 + prior.sigmas ** 2, torch.ones(1000))
        return
    torch.testing.assert_close(prior.alphas + prior.sigmas, torch.ones(1000))
    scheduler, told = prior.pipe.scheduler, {}
    if scheduler.config.use_dynamic_shifting:
        told["mu"] = prior.family.mu(prior.pipe, prior.shape)
    scheduler.set_timesteps(sigmas=(torch.arange(1000, 0, -1) / 1000).tolist(), **told)
    torch.testing.assert_close(prior.sigmas, scheduler.sigmas[:-1].flip(0))


def test_shift_grows_with_the_canvas(family_folders):
    """Of a schedule that moves with the picture's size: a larger one is noisier at the same t."""
    small, large = (Prior.from_pretrained(family_folders["sd3-dynamic"], "cpu", size=size)
                    for size in (8, 16))
    assert small.shape[1] == 4 and (large.sigmas[:-1] > small.sigmas[:-1]).all()


# ------------------------------------------------------------------------------------------ cond
def test_cond_is_one_tensor_that_may_be_cut_and_joined(family):
    prior, _ = family
    x_t, t, cond = sample(prior, 4)
    whole = prior.eps(x_t, t, cond)
    parts = [prior.eps(x_t[i], t[i], cond[i]) for i in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    alone = prior.encode_text(["a blue fox"])
    torch.testing.assert_close(prior.eps(x_t, t, torch.cat([alone] * 4)),
                               prior.eps(x_t, t, alone.expand(4, -1, -1)), rtol=1e-4, atol=1e-5)
    tokens, pooled = prior.unpack(cond)
    assert torch.equal(prior.pack(tokens, pooled), cond)
    assert torch.equal(prior.encode_text(["x", PROMPT])[1], prior.encode_text([PROMPT])[0])


# ---------------------------------------------------------------------------------------------- φ
def test_pipeline_takes_the_saved_lora(family, tmp_path):
    prior, folder = family
    x_t, t, cond = sample(prior)
    tensors = {k: v.clone() for k, v in prior.network.state_dict().items()}
    phi = LoRAPhi(prior)
    assert torch.equal(phi(x_t, t, cond, None), prior.eps(x_t, t, cond))       # step 0
    phi(x_t, t, cond, None).square().sum().backward()
    assert {n for n, p in trainable(phi).items() if p.grad is None} == set()
    scramble(phi).save(tmp_path)
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path)
    loaded = getattr(pipe, prior.family.network)
    with torch.no_grad():
        expected = phi(x_t, t, cond, None)
        torch.testing.assert_close(prior.eps_of(loaded, x_t, t, cond), expected,
                                   rtol=1e-4, atol=1e-4)
        again = LoRAPhi(prior, phi_init=tmp_path, seed=5)
        assert torch.equal(again(x_t, t, cond, None), expected)
        assert not torch.allclose(expected, prior.eps(x_t, t, cond), atol=1e-2)
    assert same(tensors, prior.network.state_dict())
    shared = {p.data_ptr() for p in prior.network.parameters()}
    assert shared <= {p.data_ptr() for p in phi.network.parameters()}


def test_pipeline_takes_the_saved_embedding_of_two_encoders(families, family_folders, tmp_path):
    prior = families("sdxl")
    x_t, t, _ = sample(prior)
    phi = EmbeddingPhi(prior, PROMPT, tokens=3)
    torch.testing.assert_close(phi.encode(), prior.encode_text([PROMPT]), rtol=1e-5, atol=1e-5)
    assert [tuple(p.shape) for p in phi.parameters()] == [(3, 32), (3, 24)]
    phi(x_t, t, None, None).square().sum().backward()
    assert all((p.grad.abs().sum(1) > 0).all() for p in phi.parameters())
    scramble(phi).save(tmp_path)
    pipe = pipeline(family_folders["sdxl"])
    words = load_file(tmp_path / "learned_embeds.safetensors")
    for name, part in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            {"<phi>": words[name]}, token="<phi>", tokenizer=getattr(pipe, f"tokenizer{part}"),
            text_encoder=getattr(pipe, f"text_encoder{part}"))
    tokens, _, pooled, _ = pipe.encode_prompt("<phi>", do_classifier_free_guidance=False)
    torch.testing.assert_close(prior.pack(tokens, pooled), phi.encode(), rtol=1e-4, atol=1e-4)
    again = EmbeddingPhi(prior, "a blue fox", tokens=3)
    again.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.words, phi.words, strict=True))


def test_the_end_token_of_old_configs(families, family_folders, tmp_path):
    """SDXL's say 2: transformers then takes the token of the largest number, a learnt word."""
    folder = shutil.copytree(family_folders["sdxl"], tmp_path / "sdxl")
    for part in ("text_encoder", "text_encoder_2"):
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    prior = Prior.from_pretrained(folder, "cpu")
    expected = families("sdxl").encode_text([PROMPT])
    torch.testing.assert_close(prior.encode_text([PROMPT]), expected)
    phi = EmbeddingPhi(prior, PROMPT, tokens=3)
    torch.testing.assert_close(phi.encode(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux2"])
def test_embedding_of_other_encoders_is_refused(families, name):
    prior = families(name)
    with pytest.raises(ValueError, match="use a LoRA"):
        EmbeddingPhi(prior, PROMPT)
    with pytest.raises(ValueError, match="needs a UNet"):
        LoRAPhi(prior, camera=16)


# --------------------------------------------------------------------------- folders that do not do
def damage(folder, part, change):
    """Rewrite the weights of a part of a folder: change({name: tensor})."""
    (file,) = (folder / part).glob("*.safetensors")
    named = load_file(file)
    change(named)
    save_file(named, file, {"format": "pt"})


def poison(named):
    next(iter(named.values())).view(-1)[0] = math.nan


@pytest.mark.parametrize("part, change", [
    ("unet", lambda named: named.pop(sorted(named)[0])), ("text_encoder_2", poison),
    ("vae", lambda named: named.update(another=torch.zeros(3))),
    ("text_encoder", lambda named: named.update({sorted(named)[0]: torch.zeros(3)})),
    ("unet", lambda named: named.update({"conv_in.weight": named["conv_in.weight"].to(torch.int8)}))
    ], ids=["missing", "not finite", "unexpected", "another shape", "integers"])
def test_weights_that_are_not_a_models_are_refused(family_folders, tmp_path, part, change):
    folder = shutil.copytree(family_folders["sdxl"], tmp_path / "model")
    damage(folder, part, change)
    with pytest.raises(UserError, match=f"{folder}.*{part}") as caught:
        Prior.from_pretrained(folder, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file, changes", [
    ("unet", {"cross_attention_dim": 24}), ("unet", {"sample_size": None}),
    ("vae", {"scaling_factor": None}), ("scheduler", {"prediction_type": "sample"}),
    ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}),
    ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}),
    ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}),
    ("model_index.json", {"unet": ["elsewhere", "Net"]})])
def test_configurations_that_do_not_fit_are_refused(family_folders, tmp_path, file, changes):
    folder = shutil.copytree(family_folders["sdxl"], tmp_path / "model")
    path = folder / file
    if path.is_dir():
        (path,) = path.glob("*config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if changes == {"sample_size": None}:             # the pipeline's own default is 1024 pixels
        assert Prior.from_pretrained(folder, "cpu", size=16).shape == (4, 8, 8)
        return
    with pytest.raises(UserError, match=str(folder)) as caught:
        Prior.from_pretrained(folder, "cpu")
    assert "\n" not in str(caught.value)


def odd_part(name):
    """A part of another kind than its pipeline's."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel
    unet = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16),
            "norm_num_groups": 4, "cross_attention_dim": 32, "attention_head_dim": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    if name in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"):
        return {"scheduler": getattr(diffusers, name)()}
    if name == "AutoencoderTiny":
        return {"vae": diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)}
    if name == "small vocabulary":
        return {"text_encoder": CLIPTextModel(CLIPTextConfig(
            vocab_size=5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))}
    changes = {"eight outputs": {"out_channels": 8}, "classes": {"num_class_embeds": 3},
               "another width": {"cross_attention_dim": 24}}[name]
    return {"unet": diffusers.UNet2DConditionModel(**unet | changes)}


@pytest.mark.parametrize("name", [
    "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "AutoencoderTiny", "small vocabulary",
    "eight outputs", "classes", "another width"])
def test_parts_that_do_not_fit_together_are_refused(folders, tmp_path, name):  # noqa: F811
    """Each is a valid part; one evaluation of all of them tells."""
    from diffusers import StableDiffusionPipeline
    parts = pipeline(folders["epsilon"]).components | odd_part(name)
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        Prior.from_pretrained(tmp_path, "cpu")
    assert "\n" not in str(caught.value)


def test_a_part_stored_in_half_precision_alone(families, family_folders, tmp_path):
    """Some publishers store one part as *.fp16.safetensors only, and others whole."""
    folder = shutil.copytree(family_folders["sdxl"], tmp_path / "model")
    (file,) = (folder / "unet").glob("*.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert same(Prior.from_pretrained(folder, "cpu").network.state_dict(),
                families("sdxl").network.state_dict())


# ------------------------------------------------------------------------- all parts in one file
# how the authors' own code names its tensors: {part: (prefix, "pattern > replacement; …")}
LDM = {"unet": ("model.diffusion_model.", r"""
(resnets.*)norm1 > \1in_layers.0; (resnets.*)norm2 > \1out_layers.0; time_emb_proj > emb_layers.1
(resnets.*)conv1 > \1in_layers.2; (resnets.*)conv2 > \1out_layers.3; conv_norm_out > out.0
time_embedding.linear_1 > time_embed.0; time_embedding.linear_2 > time_embed.2; conv_out > out.2
add_embedding.linear_1 > label_emb.0.0; add_embedding.linear_2 > label_emb.0.2
conv_shortcut > skip_connection; conv_in > input_blocks.0.0
down_blocks.0.resnets.0 > input_blocks.1.0; down_blocks.1.resnets.0 > input_blocks.3.0
down_blocks.0.downsamplers.0.conv > input_blocks.2.0.op; mid_block.resnets.0 > middle_block.0
down_blocks.1.attentions.0 > input_blocks.3.1; mid_block.resnets.1 > middle_block.2
mid_block.attentions.0 > middle_block.1; up_blocks.1.resnets.0 > output_blocks.2.0
up_blocks.0.resnets.(.) > output_blocks.\1.0; up_blocks.0.attentions.(.) > output_blocks.\1.1
up_blocks.0.upsamplers.0 > output_blocks.1.2; up_blocks.1.resnets.1 > output_blocks.3.0"""),
       "vae": ("first_stage_model.", r"""
down_blocks.(.).resnets > down.\1.block; down_blocks.0.downsamplers.0 > down.0.downsample
up_blocks.0.resnets > up.1.block; up_blocks.1.resnets > up.0.block; conv_norm_out > norm_out
up_blocks.0.upsamplers.0 > up.1.upsample; mid_block.resnets.0 > mid.block_1; group_norm > norm
mid_block.resnets.1 > mid.block_2; mid_block.attentions.0 > mid.attn_1; to_(q|k|v) > \1
to_out.0 > proj_out; conv_shortcut > nin_shortcut""")}
CLIP, OPEN = r"^(text_model\.)? > text_model.", r"""^(text_model\.)? > ; embeddings.token > token
embeddings.position_embedding.weight > positional_embedding; encoder.layers > transformer.resblocks
final_layer_norm > ln_final; layer_norm > ln_; self_attn > attn; fc1 > c_fc; fc2 > c_proj
text_projection.weight > text_projection"""
TEXT = {"epsilon": {"text_encoder": ("cond_stage_model.transformer.", CLIP)},
        "v_prediction": {"text_encoder": ("cond_stage_model.model.", OPEN)},
        "sdxl": {"text_encoder": ("conditioner.embedders.0.transformer.", CLIP),
                 "text_encoder_2": ("conditioner.embedders.1.model.", OPEN)}}


def single_file(prior, kind, file):
    """The prior's weights as Stable Diffusion 1.x, 2.x or XL was published: one file."""
    named = {"alphas_cumprod": prior.alphas ** 2}                # as left over from training
    for part, (prefix, renames) in (LDM | TEXT[kind]).items():
        for key, value in getattr(prior.pipe, part).state_dict().items():
            for rename in re.split("; |\n", renames.strip()):
                key = re.sub(*rename.split(" > "), key)
            if part == "vae" and "attn" in key and value.dim() == 2:
                value = value[..., None, None]                   # a 1 x 1 convolution there
            value = value.T if key == "text_projection" else value
            named[prefix + key] = value.contiguous()
    for key in [key for key in named if ".attn.q_proj." in key]:        # one matrix there
        named[key.replace("q_proj.", "in_proj_")] = torch.cat(
            [named.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"])
    save_file(named, file)


@pytest.fixture(scope="session")
def single_files(load, families, tmp_path_factory):  # noqa: F811
    """single_files(kind) -> (the Prior of a folder, the same in one file)."""
    def made(kind):
        prior = families(kind) if kind == "sdxl" else load(kind)
        file = tmp_path_factory.mktemp("single") / "model.safetensors"
        single_file(prior, kind, file)
        return prior, file
    return functools.cache(made)


@pytest.fixture
def single(single_files, folders, family_folders, tmp_path):  # noqa: F811
    """single(kind) -> (the Prior of a folder, the same in one file, the folder without weights)."""
    def single(kind):
        prior, file = single_files(kind)
        config = shutil.copytree((folders | family_folders)[kind], tmp_path / "config",
                                 ignore=shutil.ignore_patterns("*.safetensors"))
        return prior, Path(shutil.copy(file, tmp_path)), config
    return single


@pytest.mark.parametrize("kind", TEXT)
def test_a_single_file_is_the_folders_own(single, kind, no_network):  # noqa: F811
    prior, file, config = single(kind)
    with pytest.raises(UserError, match="--config"):
        Prior.from_pretrained(file, "cpu")
    loaded = Prior.from_pretrained(file, "cpu", config=config)
    (x_t, t, cond), images = sample(prior), torch.rand(2, 3, *prior.image_size, generator=rng())
    assert torch.equal(loaded.encode_text([PROMPT, "a blue fox"]), cond) and no_network == []
    with torch.no_grad():
        assert torch.equal(loaded.eps(x_t, t, cond), prior.eps(x_t, t, cond))
        assert torch.equal(loaded.encode_image(images), prior.encode_image(images))
        assert torch.equal(loaded.decode(x_t), prior.decode(x_t))


KEYS = ["model.diffusion_model.out.2.bias", "model.diffusion_model.label_emb.0.0.weight",
        "first_stage_model.decoder.norm_out.weight", "conditioner.embedders.1.model.ln_final.bias",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"]


@pytest.mark.parametrize("key, change, told", [
    *((key, lambda named, key: named.pop(key), "lacks weights") for key in KEYS[1:4]),
    (KEYS[3], lambda named, key: named.update({key: named[key][:-1]}), "expected shape"),
    (KEYS[2], lambda named, key: named[key].view(-1)[:1].fill_(math.nan), "not finite"),
    (KEYS[0], lambda named, key: named.update({f"{key}_scale": torch.ones(1)}), "of a unet")])
def test_a_single_file_of_other_weights_is_refused(single, key, change, told):
    _, file, config = single("sdxl")
    named = load_file(file)
    change(named, key)
    save_file(named, file)
    with pytest.raises(UserError, match=f"{file}.*{told}") as caught:
        Prior.from_pretrained(file, "cpu", config=config)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ what people have: models and files
def altered(folder, tmp_path, **files):
    """A copy of a folder of links; files: {part: changes of its JSON}."""
    copy = tmp_path / f"altered-{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy, copy_function=os.symlink)
    for part, changes in files.items():
        names = {"tokenizer": "tokenizer_config.json", "tokenizer_2": "tokenizer_config.json",
                 "scheduler": "scheduler_config.json"}
        path = copy / part / names.get(part, "config.json")
        if part == "model_index":
            path = copy / "model_index.json"
        config = json.loads(path.read_text())
        config.update(changes)
        path.unlink()
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "left out"}))
    return copy


def refused(place, words, size=16, **options):
    """The one line with which a folder or file is refused."""
    with pytest.raises(UserError, match=words) as caught:
        Prior.from_pretrained(place, "cpu", size=size, **options)
    assert "\n" not in str(caught.value) and str(place) in str(caught.value)
    return str(caught.value)


def adapted_pipe(folder, name="default", targets=("to_q", "to_v", "conv1"), fuse=False):
    """A user's pipeline with an adapter of their own in it."""
    from peft import LoraConfig
    pipe = pipeline(folder)
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)
    getattr(pipe, "unet", None).add_adapter(config, adapter_name=name)
    if fuse:
        pipe.fuse_lora(components=["unet"])
    return pipe


@pytest.mark.parametrize("name, fuse", [("default_0", False), ("default", False), ("phi", True)])
def test_the_users_adapters_are_the_priors_and_below_phi(folders, tmp_path, name, fuse):  # noqa: F811
    pipe = adapted_pipe(folders["epsilon"], name, fuse=fuse)
    prior, plain = Prior(pipe), Prior(pipeline(folders["epsilon"]))
    x_t, t, cond = sample(prior)
    tensors = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    expected = prior.eps(x_t, t, cond)
    assert not torch.allclose(expected, plain.eps(x_t, t, cond), atol=1e-3)
    phi = LoRAPhi(prior)
    assert torch.equal(phi(x_t, t, cond, None), expected)
    assert not pipe.unet.training and pipe.unet.peft_config.keys() == {name}
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    phi(x_t, t, cond, None).square().sum().backward()
    assert not [n for n, p in trainable(phi).items() if p.grad is None or "base_layer" in n]
    scramble(phi).save(tmp_path)
    assert same(tensors, pipe.unet.state_dict()) and torch.equal(prior.eps(x_t, t, cond), expected)
    # the file holds φ's adapter alone; on the user's pipeline it is a second one
    assert len(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == len(trainable(phi))
    with torch.no_grad():
        whole = phi(x_t, t, cond, None)
        assert torch.equal(LoRAPhi(prior, phi_init=tmp_path)(x_t, t, cond, None), whole)
        if not fuse:
            pipe.load_lora_weights(tmp_path, adapter_name="trained")
            pipe.set_adapters([name, "trained"])
            torch.testing.assert_close(prior.eps(x_t, t, cond), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, markers, metadata, found", [
    ("epsilon", ["v_pred"], {}, ("v_prediction", False)),
    ("epsilon", ["v_pred", "ztsnr"], {}, ("v_prediction", True)),
    ("epsilon", [], {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
    ("epsilon", [], {"modelspec.predict_key": "v"}, ("v_prediction", False)),
    ("v_prediction", [], {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    ("v_prediction", ["ztsnr"], {}, ("v_prediction", True)),
    ("v_prediction", ["v_pred"], {}, None),
    ("epsilon", ["v_pred", "edm_vpred.sigma_max"], {}, "EDM"),
    ("epsilon", ["ztsnr"], {}, "zero terminal SNR")])
def test_a_single_file_is_taken_at_its_word(single, capfd, kind, markers, metadata, found):
    prior, file, config = single(kind)
    named = load_file(file) | {key: torch.ones(0) for key in markers}
    save_file(named, file, metadata)
    if isinstance(found, str):
        refused(file, found, config=config)
        return
    loaded = Prior.from_pretrained(file, "cpu", config=config)
    said = capfd.readouterr().err.splitlines()
    if found is None:
        assert said == [] and loaded.prediction_type == "v_prediction"
        return
    assert len(said) == 1 and str(file) in said[0]
    assert (loaded.prediction_type, bool(loaded.alphas[-1] < 1e-3)) == found


def zero_snr_betas():
    from diffusers import DDIMScheduler
    return DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).betas.tolist()


@pytest.mark.parametrize("name, changes", [
    ("DDPMScheduler", {"rescale_betas_zero_snr": True}),
    ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}),
    ("DDIMScheduler", {"trained_betas": zero_snr_betas})])
def test_a_schedule_that_ends_in_pure_noise(folders, name, changes):  # noqa: F811
    """v says what x0 is, there too: samples from T − 1, and a run with ω = 1/α, are finite."""
    import diffusers
    changes = {key: value if value is True else value() for key, value in changes.items()}
    for kind in ("v_prediction", "epsilon"):
        pipe = pipeline(folders[kind])
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
        if kind == "epsilon":
            with pytest.raises(UserError, match="zero terminal SNR"):
                Prior(pipe)
            continue
        prior = Prior(pipe)
        assert prior.steps == 1000 and (prior.alphas > 0).all() and (prior.sigmas.diff() >= 0).all()
        assert prior.alphas[-1] < 1e-3
        samples_are_finite(prior)


def samples_are_finite(prior):
    noise = torch.randn(1, *prior.shape, generator=rng())
    x0 = ddim_samples(prior, [PROMPT], noise, steps=3)
    assert x0.isfinite().all() and x0.abs().max() < 1000
    row = replace(asd.METHODS["asd"], steps=1, t_min=1.0, t_max=1.0, t_max_late=1.0,
                  omega="1/alpha")
    theta = Latents(prior, 1, rng())
    asd.distill(prior, theta, prior.encode_text(PROMPT), row)
    assert theta.theta.isfinite().all()


def test_a_flow_too_is_sampled_from_pure_noise(families):
    samples_are_finite(families("sd3"))


def test_an_error_names_the_alpha_that_is_zero(load):  # noqa: F811
    """Of another prior than ours, whose last α is 0."""
    prior = load("v_prediction")
    other = SimpleNamespace(
        steps=1000, eps=prior.eps, encode_text=prior.encode_text,
        alpha_sigma=lambda t: (torch.zeros(len(t), 1, 1, 1), torch.ones(len(t), 1, 1, 1)))
    row = replace(asd.METHODS["sds"], steps=1, omega="1/alpha")
    with pytest.raises(FloatingPointError, match="α_t = 0"):
        asd.distill(other, Latents(prior, 1, rng()), prior.encode_text(PROMPT), row)


@pytest.mark.parametrize("name, part, changes", [
    ("flux2", "model_index", {"is_distilled": True}),
    ("flux2", "transformer", {"guidance_embeds": True}),
    ("sdxl", "unet", {"time_cond_proj_dim": 8})])
def test_distilled_models_are_refused(family_folders, tmp_path, name, part, changes):
    folder = altered(family_folders[name], tmp_path, **{part: changes})
    if part != "model_index":
        import diffusers
        kind = diffusers.UNet2DConditionModel if name == "sdxl" else (
            diffusers.Flux2Transformer2DModel)
        config = json.loads((folder / part / "config.json").read_text())
        shutil.rmtree(folder / part)
        kind.from_config(config).save_pretrained(folder / part)
    refused(folder, "is distilled")


def test_offloaded_pipelines_are_refused(folders):  # noqa: F811
    from accelerate import cpu_offload
    pipe = pipeline(folders["epsilon"])
    cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(UserError, match="offload"):
        Prior(pipe)
    pipe = pipeline(folders["epsilon"])
    pipe.vae.to("meta")
    with pytest.raises(UserError, match="its vae .*meta"):
        Prior(pipe)
    pipe = pipeline(folders["epsilon"])
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(UserError, match="offload"):
        Prior(pipe)


@pytest.mark.parametrize("name, changes", [
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0,
                                     "prediction_type": "flow_prediction"}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}), ("FlowMatchLCMScheduler", {"shift": 3.0}),
    ("DDIMScheduler", None), ("DPMSolverMultistepScheduler", None)])
def test_the_sampler_of_a_flow_model_does_not_matter(families, family_folders, name, changes):
    import diffusers
    pipe = pipeline(family_folders["sd3"])
    pipe.scheduler = getattr(diffusers, name)(**(changes or {}))
    if changes is None:
        with pytest.raises(UserError, match="needs a flow's"):
            Prior(pipe, size=16)
        return
    assert torch.equal(Prior(pipe, size=16).sigmas, families("sd3").sigmas)


@pytest.mark.parametrize("name, size, words", [
    ("sd3", 18, "multiple of 4, at most 32, not 18"), ("sd3", 36, "multiple of 4, at most 32"),
    ("sd3", 0, "multiple of 4"), ("sdxl", 17, "multiple of 2"), ("flux2", 18, "multiple of 4"),
    ("sd3", None, "multiple of 4, at most 32, not its own 18 x 18")])
def test_a_size_that_the_network_cannot_take(family_folders, tmp_path, name, size, words):
    folder = family_folders[name]
    if size is None:
        folder = altered(folder, tmp_path, transformer={"sample_size": 9})
    refused(folder, words, size)
    if name == "sd3" and size == 36:
        assert Prior.from_pretrained(folder, "cpu", size=32).shape == (4, 16, 16)


@pytest.mark.parametrize("name", ["epsilon", "sdxl", "sd3"])
def test_a_tokenizer_without_a_maximal_length(
        folders, family_folders, load, families, tmp_path, name):  # noqa: F811
    folder = (folders | family_folders)[name]
    parts = [part for part in ("tokenizer", "tokenizer_2") if (folder / part).is_dir()]
    bare = altered(folder, tmp_path, **{part: {"model_max_length": "left out"} for part in parts})
    prior = Prior.from_pretrained(bare, "cpu", size=16)
    whole = load() if name == "epsilon" else families(name)
    assert torch.equal(prior.encode_text([PROMPT]), whole.encode_text([PROMPT]))
    if name != "sd3":
        phi, expected = EmbeddingPhi(prior, PROMPT), EmbeddingPhi(whole, PROMPT)
        assert torch.equal(phi.encode(), expected.encode())
    refused(altered(folder, tmp_path, tokenizer={"model_max_length": 0}), "model_max_length")


def test_a_token_that_the_text_encoder_does_not_know(folders, tmp_path):  # noqa: F811
    folder = altered(folders["epsilon"], tmp_path)
    for path in (folder / "tokenizer").iterdir():
        text = path.read_text()
        path.unlink()
        path.write_text(text)
    for name in ("vocab.json", "tokenizer.json"):
        path = folder / "tokenizer" / name
        if path.exists():
            words = json.loads(path.read_text())
            vocabulary = words["model"]["vocab"] if name == "tokenizer.json" else words
            vocabulary["apple</w>"] = 90_000
            path.write_text(json.dumps(words))
    refused(folder, "90000")


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"], ["vocab.json"], ["merges.txt"]])
def test_a_tokenizer_without_a_vocabulary_is_refused(folders, tmp_path, kept):  # noqa: F811
    folder = altered(folders["epsilon"], tmp_path)
    for file in (folder / "tokenizer").iterdir():
        if file.name not in kept:
            file.unlink()
    refused(folder, "tokenizer holds no vocabulary")


@pytest.mark.parametrize("damage", ["dead link", "empty", "no words"])
def test_a_tokenizer_that_reads_all_prompts_alike_is_refused(folders, tmp_path, damage):  # noqa: F811
    """Such as a hub's snapshot that was copied without what its links lead to."""
    folder = altered(folders["epsilon"], tmp_path)
    for file in list((folder / "tokenizer").iterdir()):
        if file.name in ("tokenizer.json", "vocab.json", "merges.txt"):
            file.unlink()
            if damage == "dead link":
                file.symlink_to("nothing")
            elif damage == "empty":
                file.touch()
    if damage == "no words":
        (folder / "tokenizer/vocab.json").write_text("{}")
        (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    refused(folder, "do not fit together" if damage == "no words" else "holds no vocabulary")


@pytest.mark.parametrize("damage", ["FIFO", "name"])
def test_a_part_that_is_a_pipe_or_a_name_is_refused(folders, no_network, tmp_path, damage):  # noqa: F811
    """It neither waits for ever nor asks the hub for the name."""
    folder = altered(folders["epsilon"], tmp_path, unet={})
    file = folder / "unet/config.json"
    if damage == "FIFO":
        file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.unlink()
    if damage == "FIFO":
        os.mkfifo(file)
    else:
        file.write_text('"someone/unet"')
    refused(folder, "is not a file" if damage == "FIFO" else "holds no JSON object")
    assert no_network == []


@pytest.mark.parametrize("name, text, words", [
    ("unet/config.json", "{,", "unet/config.json is no valid JSON"),
    ("tokenizer/tokenizer.json", '{"model": {', "tokenizer/tokenizer.json is no valid JSON"),
    ("tokenizer/tokenizer.json", "{}", "tokenizer/tokenizer.json holds no tokenizer"),
    ("model_index.json", '{"unet": []}', "is a folder without a _class_name: only text-to-image"),
    ("vae/config.json", '{"scaling_factor": "0.5"}', "a text for scaling_factor: '0.5'"),
    ("unet/diffusion_pytorch_model.safetensors", "version https://git-lfs.github.com/spec/v1",
     "unet/diffusion_pytorch_model.safetensors is a pointer of git-lfs"),
    ("unet/diffusion_pytorch_model.fp16.safetensors", "cut",
     "fp16.safetensors is no safetensors file, or damaged")])
def test_a_damaged_file_of_a_model_is_named(folders, tmp_path, name, text, words):  # noqa: F811
    folder = altered(folders["epsilon"], tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(text)
    refused(folder, words)


def test_a_clone_without_the_embedded_model(no_network, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("prior.HERE", tmp_path)
    refused("tiny-sd", "the embedded model, is not there: .*tiny/sd is a part of the clone")
    assert no_network == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_folder_without_a_part(folders, no_network, tmp_path, part):     # noqa: F811
    folder = altered(folders["epsilon"], tmp_path)
    shutil.rmtree(folder / part)
    refused(folder, f"has no folder {part}, which its model_index.json names")
    assert no_network == []


@pytest.mark.parametrize("value", [
    ["os", "system"], ["diffusers", "NoSuchModel"], ["diffusers", "logging"], ["diffusers"], [7, 8],
    ["diffusers", 7]], ids=str)
def test_a_part_of_an_unknown_class_is_named(folders, tmp_path, value):          # noqa: F811
    refused(altered(folders["epsilon"], tmp_path, model_index={"unet": value}),
            r"model_index.json names \[.*\] as unet: no class of diffusers or transformers")


@pytest.mark.parametrize("changes, words", [
    ({"beta_start": 0.0, "beta_end": 0.0}, "does not fall from 1 to 0"),
    ({"beta_end": 1.5}, "beta_end is 1.5, and must be from 0 to below 1"),
    ({"beta_schedule": "left out"}, "beta_schedule is missing"),
    ({"beta_start": "left out"}, "beta_start is missing"),
    ({"trained_betas": [0.01] * 9}, "9 trained_betas, but num_train_timesteps is 1000")])
def test_a_schedule_that_is_not_whole_is_refused(folders, tmp_path, changes, words):  # noqa: F811
    refused(altered(folders["epsilon"], tmp_path, scheduler=changes), words)


@pytest.mark.parametrize("changes", [
    {"scaling_factor": 0}, {"scaling_factor": math.nan}, {"scaling_factor": math.inf},
    {"scaling_factor": 1e308}, {"scaling_factor": 1e-300}, {"shift_factor": math.nan},
    {"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}])
def test_a_vae_of_impossible_units(folders, tmp_path, changes):  # noqa: F811
    refused(altered(folders["epsilon"], tmp_path, vae=changes), "scaling_factor")


def test_nothing_that_is_not_finite_is_decoded(load):  # noqa: F811
    with pytest.raises(FloatingPointError):
        load().decode(torch.full((1, *load().shape), math.nan))


@pytest.mark.parametrize("name, part, changes", [
    ("sdxl", "unet", {"layers_per_block": 10_000_000}),
    ("sdxl", "unet", {"layers_per_block": [1, 10_000_000]}),
    ("sdxl", "vae", {"layers_per_block": 10_000_000}),
    ("sdxl", "text_encoder", {"num_hidden_layers": 10_000_000}),
    ("sd3", "transformer", {"num_layers": 10_000_000}),
    ("sd3", "transformer", {"pos_embed_max_size": 10_000_000}),
    ("sd3", "transformer", {"joint_attention_dim": 10_000_000}),
    ("sdxl", "unet", {"block_out_channels": [8, 10_000_000]}),
    ("sdxl", "unet", {"sample_size": 10_000_000}),
    ("sdxl", "scheduler", {"num_train_timesteps": 10 ** 12})])
def test_a_gigantic_configuration_is_refused_at_once(family_folders, tmp_path, name, part, changes):
    folder = altered(family_folders[name], tmp_path, **{part: changes})
    began = time.perf_counter()
    refused(folder, "10000000")
    assert time.perf_counter() - began < 3


def test_a_gigantic_configuration_beside_a_single_file(single):
    _, file, config = single("epsilon")
    path = config / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 10_000_000}))
    with pytest.raises(UserError, match="layers_per_block"):
        Prior.from_pretrained(file, "cpu", config=config)


@pytest.mark.parametrize("variant, shards", [("fp16", True), ("bf16", False), ("bf16", True),
                                             ("ema", True), ("fp32.v2", False)])
def test_weights_that_are_saved_as_a_variant_alone(folders, load, tmp_path, variant, shards):  # noqa: F811
    """… and in parts, as tools write them."""
    pipe = pipeline(folders["epsilon"])
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size="12KB" if shards else "10GB")
    names = [path.name for path in tmp_path.glob("*/*.safetensors")]
    assert all(f".{variant}" in name for name in names)
    assert any("-of-0" in name for name in names) == shards
    assert same(Prior.from_pretrained(tmp_path, "cpu").network.state_dict(),
                load().network.state_dict())


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "model")
    refused(tmp_path / "model", "a link")


# ------------------------------------------------------------------------ LoRAs that people have
EIGHT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def trained_lora(folder, part, targets, path, alpha=None, **config):
    """A LoRA as diffusers' training scripts write it, and the pipeline that has it on.

    alpha: written as metadata, as newer scripts do.
    """
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    pipe, trained = pipeline(folder), {}
    torch.manual_seed(5)
    pieces = {part: (targets, config)} | (
        {"text_encoder": (["q_proj", "v_proj"], {"r": 2})} if config.pop("text", False) else {})
    for name, (layers, options) in pieces.items():
        getattr(pipe, name).add_adapter(LoraConfig(
            lora_alpha=alpha or options["r"], target_modules=layers, init_lora_weights=False,
            **options))
        named = get_peft_model_state_dict(getattr(pipe, name))
        if name != "transformer":
            named = convert_state_dict_to_diffusers(named)
        trained[f"{name}_lora_layers"] = named
    if alpha:
        trained |= _collate_lora_metadata({name: getattr(pipe, name) for name in pieces})
    pipe.save_lora_weights(path, **trained)
    return pipe


@pytest.mark.parametrize("name, part, targets, options", [
    ("sd3", "transformer", list(EIGHT), {"r": 3}),
    ("sd3", "transformer", list(EIGHT), {"r": 3, "text": True}),
    ("sd3", "transformer", list(EIGHT), {"r": 4, "alpha": 8}),
    ("sdxl", "unet", ["to_q", "to_k", "conv1", "proj_in"], {"r": 2, "alpha": 1, "text": True}),
    ("sdxl", "unet", ["to_q", "to_v"], {"r": 2, "alpha": 4, "rank_pattern": {"attn2.to_q": 5},
                                        "alpha_pattern": {"attn2.to_v": 7}}),
    ("sdxl", "unet", ["to_q", "to_v"], {"r": 4, "alpha": 2, "use_rslora": True}),
    ("flux2", "transformer", ["to_k", "to_q", "to_qkv_mlp_proj", "to_add_out"], {"r": 2})])
def test_phi_starts_at_a_lora_as_it_was_trained(families, family_folders, tmp_path, capfd, name,
                                                part, targets, options):
    """Its layers, ranks and scales; the text encoder's part is left out, and a line says so."""
    has_text = options.get("text")
    pipe = trained_lora(family_folders[name], part, targets, tmp_path, **options)
    prior = families(name)
    x_t, t, cond = sample(prior)
    capfd.readouterr()
    phi = LoRAPhi(prior, phi_init=tmp_path)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(has_text) and all("text encoder" in line for line in lines)
    network = getattr(pipe, part).eval()
    with torch.no_grad():
        expected = prior.eps_of(network, x_t, t, cond)
        torch.testing.assert_close(phi(x_t, t, cond, None), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, prior.eps(x_t, t, cond), atol=1e-3)
        # it saves itself with its ranks and scales, and the pipeline takes it
        phi.save(tmp_path / "again")
        fresh = pipeline(family_folders[name])
        fresh.load_lora_weights(tmp_path / "again")
        again = prior.eps_of(getattr(fresh, part), x_t, t, cond)
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    phi(x_t, t, cond, None).square().sum().backward()
    assert all(p.grad is not None for p in trainable(phi).values())


def test_phi_starts_at_what_other_tools_write(folders, load, tmp_path):  # noqa: F811
    """kohya's names with an alpha for each layer; peft's folder; a file without a prefix."""
    from peft import LoraConfig, get_peft_model
    prior = load()
    x_t, t, cond = sample(prior)
    phi = scramble(LoRAPhi(prior, rank=2, targets=("attn2.to_q", "attn2.to_v")))
    kohya = {}
    for name, layer in phi.layers().items():
        key = f"lora_unet_{name.replace('.', '_')}"
        kohya[f"{key}.lora_down.weight"] = layer.lora_A["default"].weight.detach()
        kohya[f"{key}.lora_up.weight"] = 4 * layer.lora_B["default"].weight.detach()
        kohya[f"{key}.alpha"] = torch.tensor(0.5)
    save_file(kohya, tmp_path / "kohya.safetensors")
    with torch.no_grad():
        expected = phi(x_t, t, cond, None)
        again = LoRAPhi(prior, phi_init=tmp_path / "kohya.safetensors")
        torch.testing.assert_close(again(x_t, t, cond, None), expected, rtol=1e-4, atol=1e-5)
        unet = pipeline(folders["epsilon"]).unet
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_k"], init_lora_weights=False)
        trained = get_peft_model(unet, config).eval()
        trained.save_pretrained(tmp_path / "peft")
        again = LoRAPhi(prior, phi_init=tmp_path / "peft")
        torch.testing.assert_close(again(x_t, t, cond, None),
                                   prior.eps_of(trained.base_model.model, x_t, t, cond),
                                   rtol=1e-4, atol=1e-5)
        unet = pipeline(folders["epsilon"]).unet
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
        unet.save_lora_adapter(tmp_path / "alone")
        again = LoRAPhi(prior, phi_init=tmp_path / "alone")
        torch.testing.assert_close(again(x_t, t, cond, None),
                                   prior.eps_of(unet.eval(), x_t, t, cond), rtol=1e-4, atol=1e-5)


def first(named, value):
    named[next(iter(named))] = value


@pytest.mark.parametrize("change, words", [
    (lambda named: first(named, next(iter(named.values())).int()), "int32"),
    (lambda named: next(iter(named.values())).view(-1)[:1].fill_(math.nan), "not finite"),
    (lambda named: named.pop(next(iter(named))), "no pairs"),
    (lambda named: first(named, torch.ones(2, 3)), "another shape"),
    (lambda named: named.update({"unet.elsewhere.lora.down.weight": torch.ones(1, 2),
                                 "unet.elsewhere.lora.up.weight": torch.ones(2, 1)}),
     "other layers"),
    (lambda named: named.update({"unet.down_blocks.0.lora_magnitude_vector": torch.ones(2)}),
     "no plain LoRA"),
    (lambda named: first(named, torch.ones(0, 32)), "ZeroDivisionError"),
    (lambda named: first(named, torch.ones(())), "TypeError"),
    (lambda named: [named.update({key: value.T.contiguous()}) for key, value in named.items()
                    if "lora.up" in key or "lora_B" in key], "another shape .*in place of"),
    (lambda named: named.update({next(iter(named)).partition("lora")[0] + "dora_scale":
                                 torch.ones(2)}), "no plain LoRA"),
    ("brackets", "RecursionError"), ("damaged", "safetensors")])
def test_a_lora_that_does_not_do_is_refused_by_name(load, tmp_path, change, words):  # noqa: F811
    prior, file = load(), tmp_path / "pytorch_lora_weights.safetensors"
    LoRAPhi(prior, rank=2).save(tmp_path)
    named = load_file(file)
    if change == "brackets":
        save_file(named, file, {"lora_adapter_metadata": "[" * 100_000})
    elif change == "damaged":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        change(named)
        save_file(named, file)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{words}") as caught:
        LoRAPhi(prior, phi_init=tmp_path)
    assert "\n" not in str(caught.value)
    if words in ("int32", "not finite", "RecursionError", "safetensors"):
        with pytest.raises(UserError, match=str(file)):
            Prior.from_pretrained("tiny-sd", "cpu", lora=file)


@pytest.mark.parametrize("config", ['{"lora_alpha": "8"}', '{"alpha_pattern": ["a"]}', "[]", "3",
                                    '{"lora_alpha": null}', '{"alpha_pattern": {"(": 3}}'])
def test_a_configuration_of_peft_that_is_none_is_refused_by_name(load, tmp_path, config):  # noqa: F811
    prior = load()
    LoRAPhi(prior, rank=2).save(tmp_path)
    named = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    named = {key.removeprefix("unet."): value for key, value in named.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match=str(tmp_path)):
        LoRAPhi(prior, phi_init=tmp_path)


def test_phi_adapts_all_eight_projections_of_a_joint_block(families):
    names = [name for name in LoRAPhi(families("sd3")).layers() if "transformer_blocks.0." in name]
    assert sorted(name.split("attn.")[1] for name in names) == sorted(EIGHT)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_prior_with_a_users_lora(families, family_folders, tmp_path, scale, capfd):
    """As load_lora_weights takes it, the text encoder's part and the weight included."""
    trained_lora(family_folders["sdxl"], "unet", ["to_q", "to_v"], tmp_path, alpha=4, r=2,
                 text=True)
    folder = family_folders["sdxl"]
    capfd.readouterr()
    prior = Prior.from_pretrained(folder, "cpu", lora=tmp_path, lora_scale=scale)
    assert capfd.readouterr().err == ""
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    pipe.set_adapters(["style"], [scale])
    expected, plain = Prior(pipe), families("sdxl")
    x_t, t, cond = sample(expected)
    assert torch.equal(prior.encode_text([PROMPT]), expected.encode_text([PROMPT]))
    assert torch.equal(prior.eps(x_t, t, cond), expected.eps(x_t, t, cond))
    assert not torch.allclose(cond[:1], plain.encode_text([PROMPT]), atol=1e-3)
    assert torch.equal(LoRAPhi(prior)(x_t, t, cond, None), prior.eps(x_t, t, cond))


@pytest.mark.parametrize("options, words", [
    ({"lora": "nowhere.safetensors"}, "nowhere"), ({"lora": "file"}, "of this model"),
    ({"lora": "file", "lora_scale": math.nan}, "finite")])
def test_a_users_lora_that_does_not_fit(family_folders, load, tmp_path, options, words):  # noqa: F811
    LoRAPhi(load(), targets=("proj_in",)).save(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({key.replace("down_blocks.1", "blocks.7").replace("up_blocks.0", "blocks.8").replace(
        "mid_block", "blocks.9"): value for key, value in load_file(file).items()}, file)
    if options["lora"] == "file":
        options = options | {"lora": file}
    with pytest.raises(UserError, match=words):
        Prior.from_pretrained(family_folders["sdxl"], "cpu", **options)


def test_phi_on_another_checkpoint(folders, load, tmp_path):  # noqa: F811
    """The paper's 3D setting: a prior that predicts ε, φ on a checkpoint that predicts v."""
    prior, own = load(), load("v_prediction")
    x_t, t, cond = sample(prior)
    phi = LoRAPhi(prior, PROMPT, phi_model=folders["v_prediction"])
    told = own.encode_text([PROMPT] * 2)              # the two read text in different ways
    assert torch.equal(phi(x_t, t, cond, None), own.eps(x_t, t, told))
    with pytest.raises(ValueError, match="one prompt"):
        LoRAPhi(prior, [PROMPT, "a fox"], phi_model=folders["v_prediction"])
    same_text = altered(folders["epsilon"], tmp_path, scheduler={"prediction_type": "v_prediction"})
    phi = LoRAPhi(prior, phi_model=same_text)
    with torch.no_grad():
        alpha, sigma = prior.alpha_sigma(t)
        assert torch.equal(phi(x_t, t, cond, None), sigma * x_t + alpha * prior.eps(x_t, t, cond))
    other = altered(folders["epsilon"], tmp_path, scheduler={"beta_end": 0.02})
    with pytest.raises(ValueError, match="noise schedule"):
        LoRAPhi(prior, phi_model=other)
    theta = Latents(prior, 1, rng())
    row = replace(asd.METHODS["asd"], steps=1)
    asd.distill(prior, theta, prior.encode_text(PROMPT), row, phi=phi)
    phi.save(tmp_path / "phi")
    pipeline(same_text).load_lora_weights(tmp_path / "phi")


# ------------------------------------------------------------------------ prompts, surroundings
@pytest.mark.parametrize("name", OTHERS[:2] + ["flux2", "epsilon"])
def test_a_long_prompt_is_cut_in_one_line(folders, family_folders, capfd, name):  # noqa: F811
    prior = Prior.from_pretrained((folders | family_folders)[name], "cpu", size=16)
    capfd.readouterr()
    long = " ".join(["apple"] * 600) + " lastword"
    prior.encode_text([PROMPT, long])
    prior.encode_text([long])
    (line,) = capfd.readouterr().err.splitlines()
    assert "apple" in line and "the text encoder reads" in line
    if prior.family.read is not None:
        EmbeddingPhi(prior, long)
        assert capfd.readouterr().err == ""


def test_a_text_is_one_prompt(load):  # noqa: F811
    assert torch.equal(load().encode_text(PROMPT), load().encode_text([PROMPT]))


def outcome(folder, phi):
    """x0 after a run, a picture of it, and φ's parameters."""
    prior = Prior.from_pretrained(folder, "cpu", torch.float32, size=16)
    picture = torch.rand(1, 3, *prior.image_size, generator=rng(), device="cpu")
    theta = Latents(prior, 2, rng(), picture)
    row = replace(asd.METHODS["asd"], steps=1, optimizer="sgd", phi=asd.PHIS[phi])
    y = prior.encode_text([PROMPT])
    state = asd.distill(prior, theta, y, row, asd.make_phi(row, prior, PROMPT))
    noise = torch.randn(1, *prior.shape, generator=rng(), device="cpu")
    return [theta.theta.detach(), theta.images(), Latents(prior, 1, rng()).theta.detach(),
            asd.Pixels(prior, 1, rng()).theta.detach(),
            ddim_samples(prior, [PROMPT], noise, steps=1),
            *(p.detach() for p in trainable(state.phi).values())]


@pytest.mark.parametrize("name, phi", [("epsilon", "embedding"), ("sdxl", "lora"),
                                       ("flux2", "lora")])
def test_default_device_and_autocast_change_nothing(folders, family_folders, name, phi):  # noqa: F811
    folder = (folders | family_folders)[name]
    expected = outcome(folder, phi)
    with torch.autocast("cpu", torch.bfloat16):
        cast = expected if name == "flux2" else outcome(folder, phi)
    torch.set_default_device("meta")
    try:
        elsewhere = outcome(folder, phi)
    finally:
        torch.set_default_device(None)
    for found in (cast, elsewhere):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_default_device_changes_no_scene():
    """Generators of the CPU draw on the CPU, whatever the caller's default device is."""
    prior, views = Prior.from_pretrained("tiny-sd", "cpu"), []
    for device in (None, "meta"):
        field = nerf.NeRF(levels=2, size=256, cells=4)
        scene = text_to_3d.Scene(prior, field, "a red mug", rng(), 2, views=2, resolution=(8, 8),
                                 samples=4, background="random")
        torch.set_default_device(device)
        try:
            views.append(scene().x0.detach())
        finally:
            torch.set_default_device(None)
    assert torch.equal(*views)


# -------------------------------------------------------------------- a flow prior that is exact
class AsFlow(nn.Module):
    """tiny/sd as a flow transformer: at VP level (α, σ) it is one at σ' = σ/(α + σ) of
    x' = x/(α + σ), and its velocity is u = ε − x̂0."""

    def __init__(self, prior):
        super().__init__()
        self.unet, self.alphas, self.sigmas = prior.network, prior.alphas, prior.sigmas
        self.register_buffer("levels", prior.sigmas / (prior.alphas + prior.sigmas))
        self.config = SimpleNamespace(in_channels=prior.shape[0],
                                      get=lambda name: prior.shape[1:])
    device, dtype = property(lambda self: self.unet.device), property(lambda self: self.unet.dtype)

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections):
        t = (timestep[:, None] / 1000 - self.levels).abs().argmin(1)
        alpha, sigma = (v[t][:, None, None, None] for v in (self.alphas, self.sigmas))
        x = hidden_states * (alpha + sigma)
        eps = self.unet(x, t, encoder_hidden_states).sample
        return SimpleNamespace(sample=eps - (x - sigma * eps) / alpha)


@pytest.fixture(scope="module")
def doors():
    """(tiny/sd, the same as a flow model): two Priors."""
    tiny = Prior.from_pretrained("tiny-sd", "cpu")
    kind = type("StableDiffusion3Pipeline", (), {
        "encode_prompt": lambda self, prompt, *args, **kwargs: (
            tiny.encode_text([prompt]), None, torch.zeros(1, 3), None)})
    pipe = kind()
    from diffusers import FlowMatchEulerDiscreteScheduler
    pipe.__dict__.update(transformer=AsFlow(tiny), vae=tiny.vae, tokenizer=tiny.pipe.tokenizer,
                         text_encoder=tiny.pipe.text_encoder, components={},
                         scheduler=FlowMatchEulerDiscreteScheduler())
    flow = Prior(pipe, "tiny-flow")
    flow.sigmas = tiny.sigmas / (tiny.alphas + tiny.sigmas)
    flow.alphas = 1 - flow.sigmas
    return tiny, flow


@pytest.mark.parametrize("method", ["sds", "asd"])
def test_eq7_is_the_same_through_the_flow_door(doors, method):
    """ε(x'; y, t) of the flow model is ε(x; y, t), so Eq. 7's bracket is too, at every t."""
    x0, eps = torch.randn(2, 4, 4, 16, 16, generator=rng())
    t = torch.linspace(20, 980, 4).long()
    grads = []
    for prior in doors:
        y, null = (prior.encode_text([text]).expand(4, -1, -1) for text in ("a red apple", ""))
        x_t = asd.add_noise(x0, eps, *prior.alpha_sigma(t))
        phi = asd.METHODS[method].phi(prior)
        if isinstance(phi, LoRAPhi):
            for name, p in trainable(phi).items():
                draw = rng(len(name.split("unet.")[-1].removeprefix("network.")))
                p.data = 0.1 * torch.randn(p.shape, generator=draw)
        with torch.no_grad():
            of_phi = phi(x_t, t, y, eps)
            grads.append(asd.generator_grad(prior.eps(x_t, t, null), prior.eps(x_t, t, y), of_phi,
                                            7.5))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4 * grads[0].abs().max().item())


def test_distill_takes_the_same_way_through_the_flow_door(doors, method="asd"):
    """The same seed, the same draws: x0 after some steps is the same up to rounding."""
    ends = []
    for prior in doors:
        theta = Latents(prior, 1, rng(3))
        row = replace(asd.METHODS[method], steps=3, optimizer="sgd", lr=1e-3, phi_lr=1e-4)
        asd.distill(prior, theta, prior.encode_text(["a red apple"]), row)
        ends.append(theta().detach())
    moved = (ends[0] - torch.randn(1, 4, 16, 16, generator=rng(3))).abs().max()
    assert moved > 3e-3 and (ends[0] - ends[1]).abs().max() < 1e-3 * moved


# --------------------------------------------------------------------------------- command line
def test_a_run_of_sd3(family_folders, tmp_path, monkeypatch, capsys, name="sd3"):
    """It runs, resumes bit-identically and saves a φ that the pipeline takes."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(family_folders[name]), "--size", "16", "--device", "cpu"]
    start = ["--prompt", PROMPT, "--save-every", "1", "--vae-tiling", *model]
    assert asd.main([*start, "--steps", "2", "--out", "whole"]) == 0
    assert asd.main([*start, "--steps", "1", "--out", "parts"]) == 0
    assert asd.main(["--resume", "parts", "--steps", "2"]) == 0
    ends = [load_file(tmp_path / out / "checkpoint.safetensors") for out in ("whole", "parts")]
    assert all(same(*([{k: v for k, v in end.items() if part in k} for end in ends]))
               for part in ("theta", "phi"))
    for file in ("final.png", "progress.png", "phi/pytorch_lora_weights.safetensors"):
        assert (tmp_path / "whole" / file).exists()
    pipe = pipeline(family_folders[name])
    pipe.load_lora_weights(tmp_path / "whole" / "phi")


def test_every_method_makes_a_step_on_every_family(family):
    """θ moves, φ learns where it can, the prior stays as it was, bit for bit."""
    from variants import all_methods
    prior, _ = family
    weights = {f"{part}.{name}": weight for part, module in prior.pipe.components.items()
               if isinstance(module, nn.Module) for name, weight in module.named_parameters()}
    before = {name: weight.clone() for name, weight in weights.items()}
    for name, row in all_methods().items():
        if name == "lmc":                                      # it needs a network of its own
            continue
        theta = Latents(prior, 2, rng(0))
        start, row = theta.theta.detach().clone(), replace(row, steps=1)
        state = asd.State(theta, asd.make_phi(row, prior, PROMPT), row, rng(1))
        kept = {key: value.clone() for key, value in trainable(state.phi).items()}
        asd.distill(prior, theta, prior.encode_text([PROMPT]), row, state=state)
        assert theta.theta.isfinite().all() and not torch.equal(theta.theta, start), name
        assert not kept or not same(trainable(state.phi), kept), name
        assert same(weights, before), name


@pytest.mark.parametrize("name, flags, expected", [
    ("asd", [], {"lr": 0.03, "phi_lr": 1e-4, "omega": "sigma2", "steps": 500, "t_late": 1.0,
                 "gamma": -1.0, "lam": 7.5, "lr_end": 1.0}),
    ("asd", ["--settings", "tiny"], {"lr": 0.02, "phi_lr": 3e-3, "omega": "1", "steps": 350}),
    ("asd", ["--model", "tiny-sd"], {"settings": "tiny", "lr_end": 0.3}),
    ("asd", ["--model", "tiny-sd", "--settings", "paper", "--lr", "0.5"], {
        "lr": 0.5, "phi_lr": 1e-4}),
    ("variants", ["--method", "bridge"], {"lam": 40.0, "lr": 0.01, "steps": 1000}),
    ("variants", ["--method", "csd"], {"lr": 0.01, "steps": 350}),       # nothing is published
    ("variants", ["--method", "asd", "--generator", "network", "--settings", "tiny"], {
        "lr": 0.01, "lr_end": 1.0, "phi_lr": 1e-3}),
    ("text_to_3d", [], {"gamma": -0.5, "levels": 16, "table": 19, "steps": 25000, "samples": 512}),
    ("editing", ["--image", "a.png", "--source", "a", "--target", "b"], {
        "lr": 0.0488, "optimizer": "sgd", "steps": 200, "gamma": -1.0, "phi_z": "eq9"})])
def test_settings_travel_with_the_model(tmp_path, monkeypatch, name, flags, expected):
    """A real model's are the paper's, tiny-sd's are those measured on it, given ones are given."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def run(command, settings, folder, resumed):
        seen.append(settings.model_dump())
        return SimpleNamespace(execute=lambda: None)
    monkeypatch.setattr("cli.run.Run", run)
    command = __import__(name)
    model = [] if "--model" in flags else ["--model", "some/stable-diffusion"]
    prompt = [] if name == "editing" else ["--prompt", PROMPT]
    assert command.main([*prompt, *model, *flags]) == 0
    assert expected.items() <= seen[0].items()
    assert seen[0]["settings"] == ("tiny" if "tiny" in flags or flags == ["--model", "tiny-sd"]
                                   else "paper")



@pytest.mark.parametrize("make_it", [
    lambda tiny: LoRAPhi(tiny, camera=16, seed=3), lambda tiny: EmbeddingPhi(tiny, PROMPT),
    lambda tiny: __import__("nerf").NeRF(),
    lambda tiny: __import__("tiny.corrective").corrective.load_bias(tiny),
    lambda tiny: __import__("variants").Network(tiny, tiny.encode_text([PROMPT]), rng()),
    lambda tiny: __import__("editing").Translator(
        tiny, *[torch.zeros(1, *tiny.shape)] + [tiny.encode_text([PROMPT])] * 2, rng=rng())],
    ids=["lora", "embedding", "nerf", "corrective", "network", "translator"])
def test_nothing_is_drawn_from_the_global_generator(doors, make_it):
    """Made in four threads at once, it is the same four times; the global generator stays."""
    from concurrent.futures import ThreadPoolExecutor
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make_it(doors[0]).state_dict(), range(4)))
    assert torch.equal(before, torch.get_rng_state())
    assert all(same(made[0], other) for other in made[1:])
