"""Every family of priors through the one door: tiny random pipelines of the real classes.

The oracle is each pipeline's own prediction, caught by a hook inside its own __call__; and a flow
prior that is exact, tiny/sd itself in a flow model's variables.
"""
import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import asd
from phi import EmbeddingPhi, LoRAPhi
from prior import Latents, Prior, UserError
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


@pytest.fixture(params=OTHERS)
def family(request, family_folders):
    """(the Prior of a family, its folder)."""
    folder = family_folders[request.param]
    return Prior.from_pretrained(folder, "cpu", torch.float32, size=16), folder


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


@pytest.mark.parametrize("step", [1, 3])
def test_eps_is_the_pipelines_own_prediction(family, step, monkeypatch):
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


def test_pipeline_takes_the_saved_embedding_of_two_encoders(family_folders, tmp_path):
    prior = Prior.from_pretrained(family_folders["sdxl"], "cpu")
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


@pytest.mark.parametrize("name", ["sd3", "flux2"])
def test_embedding_of_other_encoders_is_refused(family_folders, name):
    prior = Prior.from_pretrained(family_folders[name], "cpu", size=16)
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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("change", [lambda named: named.pop(sorted(named)[0]), poison,
                                    lambda named: named.update(another=torch.zeros(3))],
                         ids=["missing", "not finite", "unexpected"])
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


def test_a_part_stored_in_half_precision_alone(family_folders, tmp_path):
    """Some publishers store one part as *.fp16.safetensors only, and others whole."""
    folder = shutil.copytree(family_folders["sdxl"], tmp_path / "model")
    (file,) = (folder / "unet").glob("*.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    whole = Prior.from_pretrained(family_folders["sdxl"], "cpu")
    assert same(Prior.from_pretrained(folder, "cpu").network.state_dict(),
                whole.network.state_dict())


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


@pytest.fixture
def single(folders, family_folders, tmp_path):  # noqa: F811
    """single(kind) -> (the Prior of a folder, the same in one file, the folder without weights)."""
    def single(kind):
        folder, file = (folders | family_folders)[kind], tmp_path / "model.safetensors"
        prior = Prior.from_pretrained(folder, "cpu")
        single_file(prior, kind, file)
        return prior, file, shutil.copytree(folder, tmp_path / "config",
                                            ignore=shutil.ignore_patterns("*.safetensors"))
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
    *((key, lambda named, key: named.pop(key), "lacks weights") for key in KEYS),
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


@pytest.mark.parametrize("method", ["sds", "vsd", "asd"])
def test_eq7_is_the_same_through_the_flow_door(doors, method):
    """ε(x'; y, t) of the flow model is ε(x; y, t), so Eq. 7's bracket is too, at every t."""
    x0, eps = torch.randn(2, 12, 4, 16, 16, generator=rng())
    t = torch.linspace(20, 980, 12).long()
    grads = []
    for prior in doors:
        y, null = (prior.encode_text([text]).expand(12, -1, -1) for text in ("a red apple", ""))
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


@pytest.mark.parametrize("method", ["sds", "asd"])
def test_distill_takes_the_same_way_through_the_flow_door(doors, method):
    """The same seed, the same draws: x0 after some steps is the same up to rounding."""
    ends = []
    for prior in doors:
        theta = Latents(prior, 1, rng(3))
        row = replace(asd.METHODS[method], steps=8, optimizer="sgd", lr=1e-3, phi_lr=1e-4)
        asd.distill(prior, theta, prior.encode_text(["a red apple"]), row)
        ends.append(theta().detach())
    moved = (ends[0] - torch.randn(1, 4, 16, 16, generator=rng(3))).abs().max()
    assert moved > 1e-2 and (ends[0] - ends[1]).abs().max() < 1e-3 * moved


# --------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux2"])
def test_a_run_of_every_family(family_folders, name, tmp_path, monkeypatch, capsys):
    """It runs, resumes bit-identically and saves a φ that the pipeline takes."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(family_folders[name]), "--size", "16", "--device", "cpu"]
    start = ["--prompt", PROMPT, "--save-every", "1", "--vae-tiling", *model]
    assert asd.main([*start, "--steps", "4", "--out", "whole"]) == 0
    assert asd.main([*start, "--steps", "2", "--out", "parts"]) == 0
    assert asd.main(["--resume", "parts", "--steps", "4"]) == 0
    ends = [load_file(tmp_path / out / "checkpoint.safetensors") for out in ("whole", "parts")]
    assert all(same(*([{k: v for k, v in end.items() if part in k} for end in ends]))
               for part in ("theta", "phi"))
    for file in ("final.png", "progress.png", "phi/pytorch_lora_weights.safetensors"):
        assert (tmp_path / "whole" / file).exists()
    pipe = pipeline(family_folders[name])
    pipe.load_lora_weights(tmp_path / "whole" / "phi")
    assert asd.main([*start, "--steps", "1", "--out", "third", "--phi-init", "whole/phi"]) == 0
    with pytest.raises(UserError, match="multiple"):
        Prior.from_pretrained(family_folders[name], "cpu", size=17)


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
                 "gamma": -1.0, "lam": 7.5}),
    ("asd", ["--settings", "tiny"], {"lr": 0.01, "phi_lr": 1e-3, "omega": "1", "steps": 350}),
    ("asd", ["--model", "tiny-sd"], {"settings": "tiny", "lr": 0.01}),
    ("asd", ["--model", "tiny-sd", "--settings", "paper", "--lr", "0.5"], {
        "lr": 0.5, "phi_lr": 1e-4}),
    ("variants", ["--method", "csd"], {"lr": 0.03, "steps": 500}),
    ("text_to_3d", [], {"gamma": -0.5, "levels": 16, "table": 19, "steps": 25000, "samples": 512}),
    ("editing", ["--image", "a.png", "--source", "a", "--target", "b"], {
        "lr": 0.0488, "optimizer": "sgd", "steps": 200, "gamma": -1.0, "phi_z": "eq9"})])
def test_settings_travel_with_the_model(tmp_path, monkeypatch, name, flags, expected):
    """A real model's are the paper's, tiny-sd's are those measured on it, given ones are given."""
    import runs
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(runs, "run", lambda command, settings, *_: seen.append(settings))
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
