"""Prior, φ, the generators and the loop, on two tiny diffusers pipelines with random weights.

    epsilon        like Stable Diffusion 1.x: predicts ε, 2 heads everywhere
    v_prediction   like 2.x: predicts v, heads per level, linear projections, padded with "!"

test_equation… in test_asd.py checks the formulas; here they are recomputed by hand around networks
that really run.  Timings of one step (pytest-benchmark) come last.
"""
import copy
import functools
import json
import math
import socket
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import asd
from asd import METHODS, Latents, NoisePhi, Pixels, Prior, State, UserError
from files import load_tensors, tensors
from phi import EmbeddingPhi, LoRAPhi, second_view
from prior import to_eps
from tiny import make

HERE = Path(asd.__file__).resolve().parent
KINDS = ["epsilon", "v_prediction"]
PROMPT = "a red apple"                                  # three tokens
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])


# ------------------------------------------------------------------------------- tiny pipelines
def save_tiny_pipeline(folder, kind):
    """A StableDiffusionPipeline with random weights: latents [4, 8, 8], pictures of 16 x 16."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    is_v = kind == "v_prediction"
    tokenizer = make.make_tokenizer([PROMPT, "a blue fox"], folder / "words")
    if is_v:
        tokenizer.pad_token = "!"
    torch.manual_seed(KINDS.index(kind))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=16, scaling_factor=0.5)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=32, attention_head_dim=(2, 4) if is_v else 2,
        use_linear_projection=is_v, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    with torch.no_grad():                               # so that prompts matter
        for name, weight in unet.named_parameters():
            weight *= 10 if "attn2" in name and ("to_out.0.w" in name or "to_v" in name) else 1
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    scheduler = make.make_scheduler()
    scheduler.register_to_config(prediction_type=kind)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / kind)
    return folder / kind


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {kind: save_tiny_pipeline(tmp_path_factory.mktemp("tiny"), kind) for kind in KINDS}


@pytest.fixture(scope="session")
def load(folders):
    """load(kind, device, dtype) -> the Prior; each is loaded once, as nothing may change it."""
    return functools.cache(lambda kind="epsilon", device="cpu", dtype=torch.float32:
                           Prior.from_pretrained(folders[kind], device, dtype))


@pytest.fixture
def prior(load):
    return load()


@pytest.fixture(params=KINDS)
def either(load, request):
    return load(request.param)


@pytest.fixture
def pipe(folders):
    from diffusers import StableDiffusionPipeline
    return StableDiffusionPipeline.from_pretrained(folders["epsilon"])


# -------------------------------------------------------------------------------------- helpers
def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(prior, batch=2, seed=0):
    """(x_t, t, cond) to evaluate a noise prediction at."""
    x_t = torch.randn(batch, *prior.shape, generator=rng(seed)).to(prior.device)
    t = torch.randint(1, prior.steps, (batch,), generator=rng(seed)).to(prior.device)
    return x_t, t, prior.encode_text([PROMPT, "a blue fox"] * batch)[:batch]


def snapshot(prior):
    """Every tensor of the prior, copied."""
    named = {f"{part}.{name}": tensor.clone() for part in ("unet", "vae", "text_encoder")
             for name, tensor in getattr(prior.pipe, part).state_dict(keep_vars=False).items()}
    return named | {"alphas": prior.alphas.clone(), "sigmas": prior.sigmas.clone()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def trainable(phi):
    return {name: p for name, p in phi.named_parameters() if p.requires_grad}


def scramble(phi, seed=0):
    """φ as if it had been trained for long: every trainable parameter away from its start."""
    with torch.no_grad():
        for p in trainable(phi).values():
            p += 0.3 * torch.randn(p.shape, generator=rng(seed)).to(p.device)
    return phi


def method_of(name="asd", steps=2, phi=None, **changes):
    """A row; phi: a name that --phi takes, in place of the row's."""
    changes |= {} if phi is None else {"phi": asd.PHIS[phi]}
    return replace(METHODS[name], steps=steps, **changes)


def make_state(prior, method, particles=1, seed=0, generator=None, phi=None):
    random = rng(seed)
    generator = generator or Latents(prior, particles, random)
    phi = phi or asd.make_phi(method, prior, PROMPT, seed)
    return State(generator, phi, method, random)


def go(prior, method, state=None, micro_batch=None, real=None, **kwargs):
    """A short run of the loop for PROMPT -> (state, [terms of each step])."""
    state, rows = state or make_state(prior, method, **kwargs), []
    state.real = real
    asd.distill(prior, state.generator, prior.encode_text([PROMPT]), method, state=state,
                micro_batch=micro_batch, callback=lambda state, terms: rows.append(terms))
    return state, rows


class Views(nn.Module):
    """A stand-in for a 3D scene: θ [N, …] seen by cameras [N, 16] that bring their own prompt."""

    def __init__(self, prior, cond=None, camera=None):
        super().__init__()
        count = 2 if camera is None else len(camera)
        self.theta = nn.Parameter(torch.randn(count, *prior.shape, generator=rng(1)))
        self.cond, self.camera = cond, camera

    def forward(self):
        return self.theta if self.cond is None else (self.theta, self.cond, self.camera)


# ---------------------------------------------------------------------------------------- Prior
def test_eps_is_the_pipelines_own_prediction(prior, pipe):
    x_t, t, _ = sample(prior)
    cond = pipe.encode_prompt([PROMPT, "a blue fox"], "cpu", 1, False)[0]
    with torch.no_grad():
        assert torch.equal(prior.eps(x_t, t, cond), pipe.unet(x_t, t, cond).sample)


def test_v_prediction_becomes_eps(load, folders, monkeypatch):
    """Oracle: diffusers' scheduler says which v belongs to x0 and ε."""
    from diffusers import DDPMScheduler
    prior = load("v_prediction")
    scheduler = DDPMScheduler.from_pretrained(folders["v_prediction"], subfolder="scheduler")
    (x0, t, cond), eps = sample(prior), sample(prior, seed=1)[0]
    x_t, v = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(asd.add_noise(x0, eps, *prior.alpha_sigma(t)), x_t)
    monkeypatch.setattr(prior.network, "forward", lambda *args: SimpleNamespace(sample=v))
    torch.testing.assert_close(prior.eps(x_t, t, cond), eps, rtol=1e-5, atol=1e-5)


def test_v_conversion_is_exact_in_float64():
    x0, eps = torch.randn(2, 3, 4, 5, 5, generator=rng(), dtype=torch.float64)
    alpha = torch.tensor([0.999, 0.6, 0.01], dtype=torch.float64).view(3, 1, 1, 1)
    sigma = (1 - alpha ** 2).sqrt()
    x_t, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
    torch.testing.assert_close(to_eps(v, x_t, alpha, sigma, "v_prediction"), eps,
                               rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="sample"):
        to_eps(v, x_t, alpha, sigma, "sample")


def test_another_canvas_is_refused(prior):
    _, t, cond = sample(prior)
    with pytest.raises(ValueError, match=r"\(4, 12, 8\).*\(4, 8, 8\)"):
        prior.eps(torch.zeros(2, 4, 12, 8), t, cond)


def test_levels_are_variance_preserving(either):
    """α² + σ² = 1, and they are Stable Diffusion's, recomputed here."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    t = torch.arange(1000)
    alpha, sigma = either.alpha_sigma(t)
    assert alpha.shape == (1000, 1, 1, 1) and alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha ** 2 + sigma ** 2, torch.ones(1000, 1, 1, 1))
    expected = (1 - betas).cumprod(0).sqrt().float()
    torch.testing.assert_close(alpha.flatten(), expected, rtol=1e-4, atol=1e-6)


def test_encode_text_is_the_pipelines(prior, pipe):
    prompts = ["", PROMPT, "a blue fox " * 50]          # the last is longer than the model reads
    cond = prior.encode_text(prompts)
    assert cond.shape == (3, pipe.tokenizer.model_max_length, 32) and not cond.requires_grad
    assert torch.equal(cond, pipe.encode_prompt(prompts, "cpu", 1, False)[0])


def test_unknown_words_are_those_spelt_in_pieces(prior):
    assert prior.unknown_words("A red zebra, and 2 apples!") == ["zebra", "and", "apples"]
    assert prior.unknown_words("") == prior.unknown_words(PROMPT) == []


def test_encode_image_is_the_scaled_mean(prior):
    images = torch.rand(2, 3, 16, 16, generator=rng())
    with torch.no_grad():
        mean = prior.vae.encode(images * 2 - 1).latent_dist.mean
        x0 = prior.encode_image(images)
    assert x0.shape == (2, *prior.shape) and x0.dtype == torch.float32
    torch.testing.assert_close(x0, 0.5 * mean)          # 0.5: the VAE's scaling_factor


def test_decode_gives_pictures_from_0_to_1(prior):
    x0 = 20 * torch.randn(9, *prior.shape, generator=rng())               # 4, 4 and 1
    with torch.no_grad():
        expected = (prior.vae.decode(x0 / 0.5).sample / 2 + 0.5).clamp(0, 1)
        images = prior.decode(x0)
    assert images.shape == (9, 3, 16, 16)
    assert images.min() == 0 or images.max() == 1       # the clamp was needed here
    torch.testing.assert_close(images, expected)


def test_encode_image_is_differentiable(prior):
    """Against a central difference along a random direction."""
    images, along = torch.rand(2, 1, 3, 16, 16, generator=rng())
    weight = torch.randn(1, *prior.shape, generator=rng(1))
    images.requires_grad_()
    (prior.encode_image(images) * weight).sum().backward()
    with torch.no_grad():
        up, down = (prior.encode_image(images + h * along) for h in (0.01, -0.01))
    slope = ((up - down) * weight).sum() / 0.02
    torch.testing.assert_close((images.grad * along).sum(), slope, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_prior_says_float32(load, dtype):
    prior = load(dtype=dtype)
    x_t, t, cond = sample(prior)
    assert prior.dtype == cond.dtype == dtype and prior.alphas.dtype == torch.float32
    assert prior.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    eps, exact = prior.eps(x_t, t, cond), load().eps(x_t, t, cond.float())
    assert eps.dtype == prior.encode_image(prior.decode(x_t)).dtype == torch.float32
    torch.testing.assert_close(eps, exact, rtol=0.1, atol=0.1)


@pytest.fixture
def no_network(monkeypatch):
    """Whatever asks for a connection fails, and is written down."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args[-1])
        raise OSError("no network in this test")
    for place, name in ((socket, "getaddrinfo"), (socket, "create_connection"),
                        (socket.socket, "connect"), (socket.socket, "connect_ex")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def test_local_folder_never_touches_the_network(folders, no_network):
    Prior.from_pretrained(str(folders["epsilon"]), "cpu")
    assert no_network == []


def test_folder_beside_the_code_is_found_from_anywhere(folders, no_network, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prior.HERE", folders["epsilon"].parent)
    assert Prior.from_pretrained("epsilon", "cpu").shape == (4, 8, 8) and no_network == []


def test_the_embedded_model_comes_before_what_lies_around(folders, monkeypatch, tmp_path):
    """A folder here comes before one beside the code, but for "tiny-sd", which means that one."""
    for folder in ("here/tiny-sd", "here/other", "code/other"):
        (tmp_path / folder).mkdir(parents=True)
    link_tree(folders["epsilon"], tmp_path / "code/tiny/sd")
    monkeypatch.setattr("prior.HERE", tmp_path / "code")
    monkeypatch.chdir(tmp_path / "here")
    assert Prior.from_pretrained("tiny-sd", "cpu").shape == (4, 8, 8)
    with pytest.raises(UserError, match="^other cannot be loaded"):
        Prior.from_pretrained("other", "cpu")


def test_weights_saved_in_half_precision_alone(pipe, prior, tmp_path):
    """diffusers' variant "fp16": *.fp16.safetensors and nothing else."""
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet/diffusion_pytorch_model.safetensors").exists()
    half = Prior.from_pretrained(str(tmp_path), "cpu")
    for a, b in zip(half.network.parameters(), prior.network.parameters(), strict=True):
        assert torch.equal(a, b.half().float())


def test_lost_hub_model_is_one_line(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "stabilityai/stable-diffusion-2-1-base"
    with pytest.raises(UserError) as caught:
        Prior.from_pretrained(name, "cpu")
    assert no_network                                   # the guard above is a working one
    for part in (repr(name), "withdrawn", "mirror", "local", "folder"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused(folders, tmp_path, part):
    folder = link_tree(folders["epsilon"], tmp_path / "model")
    (weights,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), weights.with_name(name))
    weights.unlink()
    with pytest.raises(UserError, match="safetensors") as caught:
        Prior.from_pretrained(folder, "cpu")
    assert "\n" not in str(caught.value)


def link_tree(source, target):
    """A copy of a model folder, to be damaged."""
    import shutil
    return Path(shutil.copytree(source, target))


@pytest.mark.parametrize("damage", ["no model_index.json", "no unet", "cut weights"])
def test_damaged_folder_is_one_line(folders, tmp_path, damage):
    folder = link_tree(folders["epsilon"], tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "no model_index.json":
        (folder / "model_index.json").unlink()
    elif damage == "no unet":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=str(folder)) as caught:
        Prior.from_pretrained(folder, "cpu")
    assert "\n" not in str(caught.value)


def test_pipelines_of_other_kinds_are_refused(tmp_path, prior):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    unet = UNet2DModel(8, block_out_channels=(4,), norm_num_groups=1, layers_per_block=1,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a DDPMPipeline.*StableDiffusionXLPipeline"):
        Prior.from_pretrained(tmp_path, "cpu")


@pytest.mark.parametrize("oddity", ["in_channels", "prediction_type"])
def test_models_that_would_fail_later_are_refused_at_once(folders, tmp_path, oddity):
    """An inpainting UNet takes nine channels; some schedulers stand for a prediction of x0."""
    folder = link_tree(folders["epsilon"], tmp_path / "model")
    unet, scheduler = folder / "unet/config.json", folder / "scheduler/scheduler_config.json"
    if oddity == "in_channels":
        unet.write_text(json.dumps(json.loads(unet.read_text()) | {"in_channels": 9}))
        weights = unet.with_name("diffusion_pytorch_model.safetensors")
        named = load_file(weights)
        named["conv_in.weight"] = named["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
        save_file(named, weights)
    else:
        changed = json.loads(scheduler.read_text()) | {"prediction_type": "sample"}
        scheduler.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=str(folder)):
        Prior.from_pretrained(folder, "cpu")


# --------------------------------------------------------------------------- φ and the one prior
@on_devices
@pytest.mark.parametrize("phi", ["lora", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_prior_is_bit_identical_after_training_phi(load, kind, phi, device):
    prior = load(kind, device)
    x_t, t, cond = sample(prior)
    tensors, eps = snapshot(prior), prior.eps(x_t, t, cond)
    state, _ = go(prior, method_of(phi=phi, phi_lr=0.1))
    assert same(snapshot(prior), tensors) and torch.equal(prior.eps(x_t, t, cond), eps)
    assert not torch.equal(state.phi(x_t, t, cond, None), eps)       # φ did learn
    modules = (prior.network, prior.vae, prior.pipe.text_encoder)
    assert all(p.grad is None and not p.requires_grad for m in modules for p in m.parameters())


@on_devices
@pytest.mark.parametrize("kind", KINDS)
def test_lora_starts_as_the_prior_told_y(load, kind, device):
    prior = load(kind, device)
    x_t, t, cond = sample(prior)
    phi = LoRAPhi(prior)
    assert torch.equal(phi(x_t, t, cond, None), prior.eps(x_t, t, cond))
    assert not torch.equal(scramble(phi)(x_t, t, cond, None), prior.eps(x_t, t, cond))


def test_lora_shares_the_priors_storage_and_owns_only_adapters(either):
    phi = LoRAPhi(either, rank=3)
    pointers = {tensor.data_ptr() for tensor in either.network.state_dict().values()}
    own = {n: p for n, p in phi.network.state_dict().items() if p.data_ptr() not in pointers}
    assert own.keys() == {n.removeprefix("network.") for n in trainable(phi)}
    linears = [m for name, m in either.network.named_modules()
               if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    expected = sum(3 * (m.in_features + m.out_features) for m in linears)
    assert sum(p.numel() for p in own.values()) == expected > 0
    assert len(linears) == 4 * 8                        # q, k, v, out of 4 blocks x (self, cross)


def test_lora_starts_with_unit_noise_by_rank_and_zeros(prior):
    """N(0, 1/r²) down, zeros up."""
    named = trainable(LoRAPhi(prior, rank=8))
    down, up = (torch.cat([p.flatten() for name, p in named.items() if part in name])
                for part in ("lora_A", "lora_B"))
    assert 8 * down.std().item() == pytest.approx(1, rel=0.05) and not up.any()


def test_a_second_view_shares_buffers_too():
    one = nn.BatchNorm1d(3)
    other = second_view(one)
    assert other is not one and len(other.state_dict()) == 5
    assert all(v.data_ptr() == one.state_dict()[name].data_ptr()
               for name, v in other.state_dict().items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_move_every_parameter_of_lora(prior, checkpointing):
    """Two, as the zeros of the up-matrices hold the down-matrices' gradients at 0 in the first."""
    phi = LoRAPhi(prior, camera=16, checkpointing=checkpointing)
    before = copy.deepcopy(trainable(phi))
    cond = prior.encode_text([PROMPT])
    go(prior, method_of(phi_lr=0.01), phi=phi,
       generator=Views(prior, cond, torch.randn(3, 16, generator=rng())))
    stuck = [name for name, p in trainable(phi).items() if torch.equal(p, before[name])]
    assert before and stuck == []


def test_checkpointing_recomputes_the_same_gradients(prior):
    (x_t, t, cond), grads, calls = sample(prior), [], []
    for checkpointing in (False, True):
        phi = scramble(LoRAPhi(prior, checkpointing=checkpointing))
        calls.append([])
        phi.network.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls[-1].append(1))
        phi(x_t, t, cond, None).square().sum().backward()
        grads.append({name: p.grad for name, p in trainable(phi).items()})
    assert len(calls[0]) == 1 < len(calls[1]) and not prior.network.is_gradient_checkpointing
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6)


def test_lora_of_another_checkpoint_answers_in_eps(load):
    """The paper's 3D setting: the prior predicts ε, φ is another model that predicts v."""
    prior, other = load("epsilon"), copy.copy(load("v_prediction"))
    other.shape = (4, 12, 12)                     # as 2.1's are of 96, 2.1-base's of 64 pixels
    (x_t, t, cond), own = sample(prior), other.encode_text([PROMPT])
    phi = LoRAPhi(other, cond=own)
    with torch.no_grad():
        v = other.network(x_t, t, own.expand(2, -1, -1)).sample
        alpha, sigma = other.alpha_sigma(t)
        # ε = σ x_t + α v; told its own prompt, whatever the loop's is
        torch.testing.assert_close(phi(x_t, t, cond, None), sigma * x_t + alpha * v)
    before = copy.deepcopy(trainable(phi))
    state, rows = go(prior, method_of(), phi=phi)
    assert all(math.isfinite(row["loss_D"]) for row in rows)
    assert not any(torch.equal(p, before[name]) for name, p in trainable(phi).items())


def test_checkpointing_of_the_embedding_recomputes_the_same_gradient(folders):
    (prior, whole), grads, calls = (Prior.from_pretrained(folders["epsilon"], "cpu")
                                    for _ in range(2)), [], []
    (x_t, t, cond), kept = sample(prior), prior.encode_text([PROMPT])
    for each in (whole, prior):
        phi = EmbeddingPhi(each, PROMPT, checkpointing=each is prior)
        calls.append([])
        unet = phi.view or each.network
        unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls[-1].append(1))
        phi(x_t, t, cond, None).square().sum().backward()
        grads.append(phi.words[0].grad)
    assert len(calls[0]) == 1 < len(calls[1]) and (grads[0] != 0).any()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert torch.equal(prior.eps(x_t, t, kept.expand(2, -1, -1)),
                       whole.eps(x_t, t, kept.expand(2, -1, -1)))


@pytest.mark.parametrize("phi", ["lora", "embedding"])
def test_all_that_learns_is_float32_beside_a_bfloat16_prior(load, phi):
    state, rows = go(load(dtype=torch.bfloat16), method_of(phi=phi), particles=2)
    assert {p.dtype for p in trainable(state.phi).values()} == {torch.float32}
    floats = [tensor for name, tensor in tensors(state).items() if name != "rng"]
    assert len(floats) >= 8 and {tensor.dtype for tensor in floats} == {torch.float32}
    assert all(math.isfinite(row["loss_G"] + row["loss_D"]) for row in rows)


def test_camera_starts_mute_and_is_learnt(prior):
    (x_t, t, cond), views = sample(prior), torch.randn(2, 16, generator=rng())
    phi = LoRAPhi(prior, camera=16)
    assert prior.network.class_embedding is None
    with torch.no_grad():
        assert torch.equal(phi(x_t, t, cond, None, views), prior.eps(x_t, t, cond))
    go(prior, method_of(phi_lr=0.05), phi=phi, generator=Views(prior, cond, views))
    assert not torch.allclose(phi(x_t, t, cond, None, views), phi(x_t, t, cond, None, -views))


def test_phi_comes_from_its_seed_alone(prior, monkeypatch):
    torch.manual_seed(1)
    a, before = LoRAPhi(prior, camera=16, seed=5), torch.get_rng_state()
    torch.manual_seed(2)
    b, c = LoRAPhi(prior, camera=16, seed=5), LoRAPhi(prior, camera=16, seed=6)
    assert same(trainable(a), trainable(b)) and not same(trainable(a), trainable(c))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)   # other people's randomness is untouched
    monkeypatch.setattr(torch, "manual_seed", None)     # … nor is that of GPUs
    assert same(trainable(LoRAPhi(prior, camera=16, seed=5)), trainable(a))


def test_make_phi_tells_what_is_taken(prior):
    """Of the run, what the φ takes; an option that it does not is an error, not forgotten."""
    for name, kind in (("noise", NoisePhi), ("lora", LoRAPhi), ("embedding", EmbeddingPhi)):
        method = method_of(phi=name)
        assert type(asd.make_phi(method, prior, PROMPT)) is method.phi is kind
        with pytest.raises(TypeError, match="rang"):
            asd.make_phi(method, prior, PROMPT, rang=8)
    assert len(asd.make_phi(method_of(phi="embedding"), prior, PROMPT, tokens=2).words[0]) == 2
    one, two, other = (trainable(asd.make_phi(method_of(), prior, seed=seed)) for seed in (3, 3, 4))
    assert same(one, two) and not same(one, other)
    seen = []
    made = asd.make_phi(SimpleNamespace(phi=lambda prior, prompts, steps, lam: seen.append(
        (prompts, steps, lam)), lam=3.0, gamma=0.0, steps=9), prior, PROMPT)
    assert made is None and seen == [(PROMPT, 9, 3.0)]
    with pytest.raises(ValueError, match="starts at its prompt"):          # where there is none
        asd.distill(prior, Latents(prior), prior.encode_text([PROMPT]), method_of(phi="embedding"))


def test_state_of_another_generator(prior):
    method = method_of()
    state = make_state(prior, method)
    with pytest.raises(ValueError, match="another generator"):
        asd.distill(prior, Latents(prior), prior.encode_text([PROMPT]), method, state=state)


# -------------------------------------------------------------------------------- embedding φ
def test_embedding_starts_at_the_words(either):
    """Told exactly the prompt's tokens, the learnable prompt is the prompt."""
    phi = EmbeddingPhi(either, PROMPT, tokens=3)
    torch.testing.assert_close(phi.encode(), either.encode_text([PROMPT]), rtol=1e-6, atol=1e-6)
    x_t, t, cond = sample(either, batch=1)
    torch.testing.assert_close(phi(x_t, t, 0 * cond, None), either.eps(x_t, t, cond))


@pytest.mark.parametrize("tokens, text", [(2, "a red"), (5, "a red apple apple apple")])
def test_words_are_cut_or_the_last_is_repeated(prior, tokens, text):
    phi = EmbeddingPhi(prior, PROMPT, tokens)
    assert phi.words[0].shape == (tokens, 32)
    torch.testing.assert_close(phi.encode(), prior.encode_text([text]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [-1, 0, 31])
def test_token_counts_that_cannot_be_are_refused(prior, tokens):
    with pytest.raises(ValueError, match=f"1 … 30, not {tokens}"):
        EmbeddingPhi(prior, PROMPT, tokens)
    assert EmbeddingPhi(prior, "", 30).encode().shape == (1, 32, 32)


def test_gradient_arrives_only_at_the_embedding(prior):
    phi = scramble(EmbeddingPhi(prior, PROMPT))
    assert list(trainable(phi)) == ["words.0"] and phi.words[0].is_leaf
    x_t, t, cond = sample(prior)
    phi(x_t, t, cond, None).square().sum().backward()
    assert (phi.words[0].grad.abs().sum(1) > 0).all()
    others = [*prior.network.parameters(), *prior.pipe.text_encoder.parameters()]
    assert all(p.grad is None for p in others)


# --------------------------------------------------------------------------------- save and load
def test_pipeline_takes_the_saved_lora(either, folders, tmp_path):
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(folders[either.prediction_type])
    phi = scramble(LoRAPhi(either))
    phi.save(tmp_path)
    pipe.load_lora_weights(tmp_path)
    x_t, t, cond = sample(either)
    with torch.no_grad():
        eps = either.eps_of(pipe.unet, x_t, t, cond)
        torch.testing.assert_close(eps, phi(x_t, t, cond, None), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(eps, either.eps(x_t, t, cond), atol=1e-2)


@pytest.mark.parametrize("camera", [0, 16])
def test_lora_round_trip(prior, tmp_path, camera):
    phi, again = scramble(LoRAPhi(prior, camera=camera)), LoRAPhi(prior, camera=camera, seed=9)
    phi.save(tmp_path)
    again.load(tmp_path)
    assert same(trainable(phi), trainable(again))
    files = {"pytorch_lora_weights.safetensors"} | ({"camera.safetensors"} if camera else set())
    assert {path.name for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("other, words", [
    ({"rank": 2}, "rank"), ({"targets": ("to_q",)}, "other layers"),
    ({"targets": ("to_q", "to_k", "to_v", "to_out.0", "proj_in")}, "other layers")])
def test_another_lora_is_refused(prior, tmp_path, other, words):
    LoRAPhi(prior, **other).save(tmp_path)
    with pytest.raises(ValueError, match=words):
        LoRAPhi(prior).load(tmp_path)


@pytest.mark.parametrize("alpha", [4, 8])
def test_a_lora_of_another_scale_is_refused(prior, tmp_path, alpha):
    """Trained with peft, saved by diffusers with what peft knows of it: alpha/r is 1 or 2."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict
    phi = scramble(LoRAPhi(prior))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(phi.network))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata={"r": 4, "lora_alpha": alpha})
    again = LoRAPhi(prior)
    if alpha == 4:
        again.load(tmp_path)
        assert same(trainable(phi), trainable(again))
    else:
        with pytest.raises(ValueError, match="scale"):
            again.load(tmp_path)


def test_a_lora_with_alphas_in_its_file_is_refused(prior, monkeypatch):
    """Other trainers' files have them; diffusers gives them beside the layers."""
    monkeypatch.setattr(type(prior.pipe), "lora_state_dict", classmethod(
        lambda *_, **__: ({}, {"unet.to_q.alpha": 4.0}, None)))
    with pytest.raises(ValueError, match="scale"):
        LoRAPhi(prior).load("anywhere")


def test_lora_sits_where_it_is_told(prior):
    names = [name for name, p in LoRAPhi(prior, targets=("to_q",)).network.named_parameters()
             if p.requires_grad]
    assert names and all(".to_q." in name for name in names)


def test_pipeline_takes_the_saved_embedding(either, folders, tmp_path):
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(folders[either.prediction_type])
    phi = scramble(EmbeddingPhi(either, PROMPT))
    phi.save(tmp_path)
    pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    words = pipe.maybe_convert_prompt("<phi>", pipe.tokenizer)
    assert words == "<phi> <phi>_1 <phi>_2 <phi>_3"
    encoded = pipe.encode_prompt("<phi>", "cpu", 1, False)[0]
    torch.testing.assert_close(encoded, phi.encode(), rtol=1e-5, atol=1e-5)


def test_embedding_round_trip(prior, tmp_path):
    phi, again = scramble(EmbeddingPhi(prior, PROMPT)), EmbeddingPhi(prior, PROMPT)
    phi.save(tmp_path)
    again.load(tmp_path)
    assert torch.equal(phi.words[0], again.words[0])
    with pytest.raises(ValueError, match="words"):
        EmbeddingPhi(prior, PROMPT, 1).load(tmp_path)


# ---------------------------------------------------------------------------------- generators
def test_latents_of_pictures_are_their_encodings(prior):
    images = torch.rand(1, 3, 16, 16, generator=rng())
    generator = Latents(prior, 3, images=images)
    with torch.no_grad():
        assert torch.equal(generator(), prior.encode_image(images).repeat(3, 1, 1, 1))
    assert generator.theta.requires_grad and not generator.images().requires_grad


def test_latents_start_as_unit_noise_from_the_generator(prior):
    theta, again = Latents(prior, 100, rng(3)).theta, Latents(prior, 100, rng(3)).theta
    assert theta.shape == (100, *prior.shape) and torch.equal(theta, again)
    assert theta.mean().abs() < 0.02 and abs(theta.std() - 1) < 0.02


def test_pixels_are_learnt_through_the_encoder(prior):
    images = torch.rand(1, 3, 16, 16, generator=rng())
    generator = Pixels(prior, 2, rng(), images)
    assert torch.equal(generator.theta, images.repeat(2, 1, 1, 1))
    state, _ = go(prior, method_of(steps=1, lr=2.0), generator=generator)
    assert (generator.theta != images).float().mean() > 0.99     # each pixel has a gradient
    shown = state.generator.images()
    assert shown.shape == (2, 3, 16, 16) and shown.min() == 0 and shown.max() == 1
    assert Pixels(prior, 2, rng()).images().shape == (2, 3, 16, 16)


@pytest.mark.parametrize("kind", [Latents, Pixels])
def test_particles_take_the_pictures_in_turn(prior, kind):
    images = torch.rand(2, 3, 16, 16, generator=rng())
    theta = kind(prior, 4, rng(), images).theta
    assert torch.equal(theta[:2], theta[2:]) and not torch.equal(theta[0], theta[1])
    with pytest.raises(ValueError, match="3 particles"):
        kind(prior, 3, rng(), images)


# ------------------------------------------------------------------------------------- the loop
@contextmanager
def counted(*unets):
    """Samples that went through the networks: forward, of these with a graph, backward; calls."""
    counts = Counter()

    def hook(module, args, output):
        counts["calls"] += 1
        counts["forward"] += len(args[0])
        if output.sample.requires_grad:
            counts["graph"] += len(args[0])
            output.sample.register_hook(lambda grad: counts.update(backward=len(grad)))
    handles = [unet.register_forward_hook(hook) for unet in unets]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name, changes, forward, backward", [
    ("sds", {}, 2, 0),
    ("sds", {"lam": 1.0}, 1, 0),
    ("vsd", {}, 4, 1),
    ("asd", {}, 5, 1),
    ("vsd", {"share_noise": True}, 3, 1),
    ("asd", {"share_noise": True}, 3, 1),
    ("asd", {"lam": 1.0}, 4, 1),
    ("asd", {"lam": 1.0, "share_noise": True}, 2, 1),
    ("asd", {"phi_steps": 2}, 7, 2),
    ("asd", {"phi_steps": 2, "share_noise": True}, 4, 2),
    ("asd", {"phi_first": True}, 5, 1),
    ("asd", {"phi_first": True, "share_noise": True}, 4, 1),    # φ changes between its two uses
    ("asd", {"lam_phi": 2.0}, 7, 2),
])
@pytest.mark.parametrize("phi", ["lora", "embedding"])
def test_unet_evaluations_per_particle_and_step(prior, name, phi, changes, forward, backward):
    """One call's samples count; only what is learnt from has a graph."""
    if name == "sds" and phi == "embedding":
        pytest.skip("SDS has no φ")
    method = method_of(name, steps=1, **changes, **({} if name == "sds" else {"phi": phi}))
    state = make_state(prior, method, particles=3)
    unets = {id(net): net for net in (prior.network, getattr(state.phi, "network", prior.network))}
    with counted(*unets.values()) as counts:
        go(prior, method, state)
    assert counts["forward"] == 3 * forward
    assert counts["backward"] == counts["graph"] == 3 * backward


@pytest.mark.parametrize("name, changes", [
    ("sds", {}), ("vsd", {}), ("asd", {}), ("asd", {"share_noise": True}), ("asd", {"lam": 1.0}),
    ("asd", {"phi_steps": 3}), ("asd", {"phi_first": True})])
@pytest.mark.parametrize("real", [False, True])
def test_the_prior_is_asked_once_a_step(prior, name, changes, real):
    """Whatever θ and φ need of it, at θ's noise, at φ's and at real samples."""
    method = method_of(name, steps=2, **changes)
    state = make_state(prior, method, particles=3)
    with counted(prior.network) as counts:
        go(prior, method, state, real=torch.randn(5, *prior.shape, generator=rng(1)) if real
           else None)
    assert counts["calls"] == 2


def test_what_the_prior_says_has_no_graph(prior):
    x_t, t, cond = sample(prior)
    nothing, said = asd.ask(prior, [None, (x_t.requires_grad_(), t, cond)])
    assert nothing is None and not said.requires_grad


@pytest.mark.parametrize("changes, forward, backward", [
    ({}, 7, 2), ({"eta": 0.0}, 6, 2), ({"gamma": 0.0}, 6, 2), ({"share_noise": True}, 6, 2)])
def test_unet_evaluations_with_real_samples(prior, changes, forward, backward):
    """Eq. 9: φ at both; the prior where η and γ are not zero."""
    method = method_of(steps=1, **changes)
    state = make_state(prior, method, particles=3)
    with counted(prior.network, state.phi.network) as counts:
        go(prior, method, state, real=torch.zeros(1, *prior.shape))
    assert counts["forward"] == 3 * forward
    assert counts["backward"] == counts["graph"] == 3 * backward


@pytest.mark.parametrize("micro_batch, forward", [(3, 3), (2, 4)])
def test_micro_batches_cost_one_evaluation_of_phi(prior, micro_batch, forward):
    """With shared noise, where they are smaller than the batch: no graph is kept."""
    state = make_state(prior, method := method_of("asd", steps=1, share_noise=True), particles=3)
    with counted(prior.network, state.phi.network) as counts:
        go(prior, method, state, micro_batch)
    assert counts["forward"] == 3 * forward and counts["backward"] == counts["graph"] == 3


def by_hand(prior, phi, theta, random, lam, low=20, high=980):
    """One draw and the four networks' answers, without asd's own code. -> SimpleNamespace"""
    t = torch.randint(low, high + 1, (len(theta),), generator=random)
    eps = torch.randn(theta.shape, generator=random)
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0).float()[t].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = alpha * theta + sigma * eps

    def says(unet, prompt):
        return unet(x_t, t, prior.encode_text([prompt]).expand(len(t), -1, -1)).sample
    with torch.no_grad():
        eps_y, eps_uncond = says(prior.network, PROMPT), says(prior.network, "")
        eps_phi = eps if isinstance(phi, NoisePhi) else says(phi.network, PROMPT)
    guided = eps_uncond + lam * (eps_y - eps_uncond)
    return SimpleNamespace(alpha=alpha, sigma=sigma, eps=eps, eps_y=eps_y, eps_phi=eps_phi,
                           bracket=guided - eps_phi)


@pytest.mark.parametrize("name, omega, lam", [
    ("sds", "sigma2", 5.0), ("vsd", "1", 5.0), ("asd", "sigma2", 1.0), ("asd", "sigma/alpha", 5.0),
    ("asd", "sigma*alpha", 0.0)])
def test_first_update_is_adam_on_eq7(prior, name, omega, lam):
    method = method_of(name, steps=1, lam=lam, omega=omega, lr=0.03)
    state = make_state(prior, method, particles=2)
    scramble(state.phi)
    theta, random = state.generator.theta.detach().clone(), state.rng.clone_state()
    hand = by_hand(prior, state.phi, theta, random, lam)
    weight = {"sigma2": hand.sigma ** 2, "1": 1, "sigma/alpha": hand.sigma / hand.alpha,
              "sigma*alpha": hand.sigma * hand.alpha}[omega]
    _, (row,) = go(prior, method, state)
    grad = state.generator.theta.grad
    torch.testing.assert_close(grad, weight * hand.bracket / 2, rtol=1e-3, atol=1e-5)
    assert row["loss_G"] == pytest.approx((weight * hand.bracket).norm().item(), rel=1e-3)
    # Adam's first step: −lr · m̂ / (√v̂ + 1e-8) with m̂ = grad, v̂ = grad²
    expected = theta - 0.03 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(state.generator.theta.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share_noise", [False, True])
@pytest.mark.parametrize("name, gamma", [("vsd", 0.0), ("asd", -1.0), ("asd", 0.5)])
def test_phi_loss_is_eq10_at_fresh_or_shared_noise(prior, name, gamma, share_noise):
    """Shared: θ's own t and ε. Fresh: the next draw, over all t."""
    method = method_of(name, steps=1, lr=1.0, gamma=gamma, share_noise=share_noise)
    state = make_state(prior, method, particles=2)
    scramble(state.phi)
    theta, random = state.generator.theta.detach().clone(), state.rng.clone_state()
    hand = by_hand(prior, state.phi, theta, random, 1)
    if not share_noise:
        hand = by_hand(prior, state.phi, theta, random, 1, 0, 999)
    # ‖ε_φ − ε‖² + γ ‖ε_y − ε_φ‖² on x0 as it was before θ's step, the mean over two particles
    loss = (hand.eps_phi - hand.eps).square() + gamma * (hand.eps_y - hand.eps_phi).square()
    _, (row,) = go(prior, method, state)
    assert row["loss_D"] == pytest.approx(loss.sum().item() / 2, rel=1e-4)


@pytest.mark.parametrize("share_noise", [False, True])
@pytest.mark.parametrize("eta, gamma", [(0.5, -1.0), (0.0, 1.0), (2.0, 0.0)])
def test_phi_loss_is_eq9_where_there_are_real_samples(either, eta, gamma, share_noise):
    """All four terms, of an ε and a v prior: one real sample for each particle, the same noise."""
    method = method_of(steps=1, lr=1.0, eta=eta, gamma=gamma, share_noise=share_noise)
    state = make_state(either, method, particles=2)
    scramble(state.phi)
    theta, random = state.generator.theta.detach().clone(), state.rng.clone_state()
    real = torch.randn(3, *either.shape, generator=rng(3))
    by = functools.partial(said_by, either, state.phi)
    t, eps = asd.draw(random, theta, 20, 980)
    if not share_noise:
        t, eps = asd.draw(random, theta, 0, 999)
    chosen = real[torch.randint(3, (2,), generator=random)]
    (fake_y, fake_phi), (real_y, real_phi) = by(theta, t, eps), by(chosen, t, eps)
    loss = (fake_phi - eps).square() - (real_phi - eps).square() \
        + eta * (real_y - real_phi).square() + gamma * (fake_y - fake_phi).square()
    loss.sum().div(2).backward()
    expected = [p.grad.clone() for p in trainable(state.phi).values()]
    state.opt_phi.zero_grad()
    _, (row,) = go(either, method, state, real=real)
    assert row["loss_D"] == pytest.approx(loss.sum().item() / 2, rel=1e-3)
    found = [p.grad for p in trainable(state.phi).values()]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def said_by(prior, phi, x0, t, eps):
    """(ε_y, ε_φ) at x0 with the noise eps, without asd's own code, φ's with its graph."""
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in (prior.alphas[t], prior.sigmas[t]))
    x_t, cond = alpha * x0 + sigma * eps, prior.encode_text([PROMPT]).expand(len(t), -1, -1)
    y, of_phi = (unet(x_t, t, cond).sample for unet in (prior.network, phi.network))
    if prior.prediction_type == "v_prediction":
        y, of_phi = (sigma * x_t + alpha * v for v in (y, of_phi))
    return y, of_phi


def test_phi_moves_away_from_real_samples(prior):
    """Eq. 9 at η = 0: the real samples' noise is what φ unlearns, the fake ones' what it learns."""
    method = method_of(steps=1, gamma=0.0, eta=0.0, phi_lr=3e-3)
    fake, real = torch.randn(2, 1, *prior.shape, generator=rng(5)).mul(3)
    state = make_state(prior, method)
    d = asd.Discriminator(state.phi, prior.encode_text([PROMPT]), 0.0, 0.0, real=real)
    t, eps = torch.tensor([500]), torch.randn(1, *prior.shape, generator=rng(6))
    u = asd.Update(t, eps, None, *(asd.add_noise(x0, eps, *prior.alpha_sigma(t))
                                   for x0 in (fake, real)))

    def errors():
        with torch.no_grad():
            return [(said_by(prior, state.phi, x0, t, eps)[1] - eps).square().sum()
                    for x0 in (fake, real)]
    before = errors()
    for _ in range(10):
        asd.discriminator_step(state, method, d, u, None)
    after = errors()
    assert after[0] - after[1] < before[0] - before[1] - 1


@pytest.mark.parametrize("kind", [LoRAPhi, EmbeddingPhi])
def test_checkpointing_of_phi_is_not_the_priors(prior, kind):
    """Its own view of the network recomputes, in the same storage and to the same bits."""
    x_t, t, cond = sample(prior)
    phis = [kind(prior, PROMPT, checkpointing=on) for on in (False, True)]
    one, two = (phi(x_t, t, cond, None) for phi in phis)
    assert torch.equal(one, two)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in prior.network.modules())
    assert any(getattr(m, "gradient_checkpointing", False) for m in phis[1].modules())
    assert {p.data_ptr() for p in prior.network.parameters()} <= \
        {p.data_ptr() for p in phis[1].parameters()}


def test_phi_is_told_lam_phi(prior):
    """ε_φ is guided inside φ by λ_φ, in Eq. 7 and in Eq. 10."""
    x_t, t, cond = sample(prior)
    null, phi = prior.encode_text([""]), scramble(LoRAPhi(prior))
    with torch.no_grad():
        with_y, without = phi(x_t, t, cond, None), phi(x_t, t, null.expand(2, -1, -1), None)
        for lam_phi in (0.0, 1.0, 3.0):
            guided = asd.predict_phi(phi, x_t, t, cond, null, None, lam_phi=lam_phi)
            torch.testing.assert_close(guided, without + lam_phi * (with_y - without))


@pytest.mark.parametrize("lam", [5.0, 1.0])
def test_phi_is_told_what_the_prior_says(prior, lam):
    """ε_∅ and ε_y at its x_t; where λ = 1 does not need ε_∅, ε_y stands for it."""
    heard = []

    class Listening(NoisePhi):
        def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
            heard.append((x_t, t, cond, eps_uncond, eps_y))
            return eps
    go(prior, method_of("sds", steps=1, lam=lam), phi=Listening(), particles=2)
    (x_t, t, cond, eps_uncond, eps_y), = heard
    null = prior.encode_text([""]).expand_as(cond)
    torch.testing.assert_close(eps_y, prior.eps(x_t, t, cond))
    torch.testing.assert_close(eps_uncond, eps_y if lam == 1 else prior.eps(x_t, t, null))


def test_draws_reach_both_ends(prior):
    x0 = torch.zeros(200, *prior.shape)
    t, eps = asd.draw(rng(), x0, 3, 5)
    assert set(t.tolist()) == {3, 4, 5} and abs(eps.std() - 1) < 0.02
    assert len(eps[:, 0, 0, 0].unique()) == 200         # each particle has its own
    go(prior, method_of("sds", t_min=1.0, t_max=1.0, t_late=1.0), particles=2)   # T − 1


@pytest.mark.parametrize("changes, highest", [
    ({}, [980, 980, 500, 500]), ({"t_late": 0.25}, [980, 500, 500, 500]),
    ({"t_late": 1.0}, [980] * 4), ({"t_max": 0.3}, [300] * 4)])
def test_t_turns_late(prior, monkeypatch, changes, highest):
    """θ's between t_min and t_max or t_max_late, φ's everywhere."""
    asked, draw = [], asd.draw
    monkeypatch.setattr(asd, "draw", lambda *args: asked.append(args[2:]) or draw(*args))
    go(prior, method_of(steps=4, **changes))
    assert asked == [bounds for high in highest for bounds in ((20, high), (0, 999))]


def test_each_update_of_phi_has_its_own_draw(prior, monkeypatch):
    drawn, draw = [], asd.draw
    monkeypatch.setattr(asd, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    go(prior, method_of("vsd", steps=1, phi_steps=3))
    assert len(drawn) == 4 and len({eps.sum().item() for _, eps in drawn}) == 4


def test_the_regulariser_is_added(prior):
    class Held(Latents):
        def regulariser(self):
            return 3 * self.theta.sum()
    free, held = (go(prior, method_of("sds", steps=1), generator=kind(prior, 2, rng()))[0]
                  for kind in (Latents, Held))
    torch.testing.assert_close(held.generator.theta.grad, free.generator.theta.grad + 3)


def test_a_gradient_of_phi_that_is_not_finite_ends_the_run(prior, monkeypatch):
    method = method_of()
    state = make_state(prior, method)
    before, loss = copy.deepcopy(trainable(state.phi)), asd.discriminator_loss_text
    monkeypatch.setattr(asd, "discriminator_loss_text", lambda eps, here, *rest:
                        loss(eps, here, *rest) + (0 * here.sum()).abs().sqrt())
    with pytest.raises(FloatingPointError, match="discriminator's gradient .*step 0"):
        go(prior, method, state)
    assert same(trainable(state.phi), before)


def test_micro_batches_keep_what_belongs_together(prior):
    """Every picture its own prompt and camera."""
    cond = prior.encode_text([PROMPT, "a blue fox", "a red fox"])
    method, results = method_of(steps=1), []
    for size in (None, 2, 1):
        phi = scramble(LoRAPhi(prior, camera=16))
        state = make_state(prior, method, phi=phi, generator=Views(
            prior, cond, torch.randn(3, 16, generator=rng())))
        go(prior, method, state, size)
        results.append([state.generator.theta.grad, *(p.grad for p in trainable(phi).values())])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-3, atol=1e-3)


def test_equal_particles_part(prior):
    images = torch.rand(1, 3, 16, 16, generator=rng())
    method = method_of("sds", steps=1, t_min=0.5, t_max=0.5)         # so that ε alone differs
    state, _ = go(prior, method, generator=Latents(prior, 2, images=images))
    a, b = state.generator.theta.detach()
    assert not torch.equal(a, b)


@pytest.mark.parametrize("changes, expected", [
    ({}, "θφθφ"), ({"phi_first": True}, "φθφθ"), ({"phi_steps": 2}, "θφφθφφ"),
    ({"phi_first": True, "phi_steps": 2}, "φφθφφθ")])
def test_order_of_updates(prior, changes, expected):
    method, order = method_of(**changes), []
    state = make_state(prior, method)
    state.opt_theta.register_step_post_hook(lambda *_: order.append("θ"))
    state.opt_phi.register_step_post_hook(lambda *_: order.append("φ"))
    go(prior, method, state)
    assert "".join(order) == expected


@pytest.mark.parametrize("lr_end, parts", [(1.0, [1, 1, 1, 1]), (0.2, [1, 0.8829, 0.6, 0.3172]),
                                           (0.0, [1, 0.8536, 0.5, 0.1464])])
def test_rate_falls_along_a_cosine(prior, lr_end, parts):
    """Each group's from its own rate; 0.2 + 0.8 (1 + cos(π step / 4)) / 2; φ's stays. Gone on with
    after two steps, too."""
    seen = []

    class Two(Latents):
        def parameter_groups(self, lr):
            return [{"params": [self.theta]}, {"params": [torch.nn.Parameter(torch.zeros(1))],
                                               "lr": lr / 10}]

    def note(optimizer, *_):
        seen.append([group["lr"] for group in optimizer.param_groups])

    class Stop(Exception):
        pass

    def stop(state, _):
        if state.step == 2 and len(seen) == 2:
            raise Stop

    method = method_of(steps=4, lr=0.1, lr_end=lr_end, phi_lr=0.3)
    first = make_state(prior, method, generator=Two(prior, 2, rng()))
    first.opt_theta.register_step_pre_hook(note)
    with pytest.raises(Stop):
        asd.distill(prior, first.generator, prior.encode_text([PROMPT]), method, state=first,
                    callback=stop)
    state = make_state(prior, method, generator=Two(prior, 2, rng()))
    load_tensors(state, copy.deepcopy(tensors(first)), 2)
    state.opt_theta.register_step_pre_hook(note)
    go(prior, method, state)
    expected = torch.tensor(parts)[:, None] * torch.tensor([0.1, 0.01])
    torch.testing.assert_close(torch.tensor(seen), expected, atol=1e-5, rtol=0)
    assert [group["lr"] for group in state.opt_phi.param_groups] == [0.3]


@pytest.mark.parametrize("phi", ["lora", "embedding"])
@pytest.mark.parametrize("share_noise", [False, True])
@pytest.mark.parametrize("phi_first", [False, True])
def test_steps_leave_each_others_gradients_none(prior, phi, share_noise, phi_first):
    method = method_of(phi=phi, share_noise=share_noise, phi_first=phi_first)
    state, found = make_state(prior, method), []
    theta, others = state.generator.theta, list(trainable(state.phi).values())

    def after_theta(*_):
        found.append(all(p.grad is None for p in others) and theta.grad is not None)
        theta.grad = None

    def after_phi(*_):
        found.append(theta.grad is None and all(p.grad is not None for p in others))
        for p in others:
            p.grad = None
    state.opt_theta.register_step_post_hook(after_theta)
    state.opt_phi.register_step_post_hook(after_phi)
    go(prior, method, state)
    assert found == [True] * 4


def test_phi_steps_by_adamw_without_decay(prior):
    """Of its first gradient g, however small: −lr · g / (|g| + 1e-8)."""
    state = make_state(prior, method_of(phi_lr=0.1))
    before = copy.deepcopy(trainable(scramble(state.phi)))
    for p in trainable(state.phi).values():
        p.grad = torch.full_like(p, 1e-7)
    state.opt_phi.step()
    for name, p in trainable(state.phi).items():
        torch.testing.assert_close(p, before[name] - 0.1 * 1e-7 / 1.1e-7, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"share_noise": True}, {"phi": "embedding"},
                                     {"phi_first": True, "lam_phi": 2.0}, {"lam": 1.0}])
def test_micro_batches_change_nothing(prior, changes):
    method, results = method_of(steps=1, lr=1.0, **changes), []
    for micro_batch in (None, 2, 1):
        state = make_state(prior, method, particles=3)
        scramble(state.phi)
        _, (row,) = go(prior, method, state, micro_batch)
        grads = [p.grad for p in trainable(state.phi).values()]
        results.append((row["loss_D"], row["loss_G"], state.generator.theta.grad, *grads))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-3, atol=1e-3)


def test_micro_batch_bounds_each_question(prior):
    state, sizes = make_state(prior, method_of(), particles=5), ([], [])
    for unet, seen in zip((prior.network, state.phi.network), sizes):
        unet.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(len(args[0])))
    go(prior, method_of(share_noise=True, steps=1), state, micro_batch=2)
    prior.network._forward_pre_hooks.clear()
    assert sizes == ([4, 4, 2], 2 * [2, 2, 1])     # the prior: ε_∅ and ε_y; φ: for θ, then to learn


def test_phi_learns_from_all_particles(prior):
    """Its gradient is the mean of those of the particles alone."""
    method, grads = method_of(steps=1, lr=0.0), []
    cond = prior.encode_text([PROMPT])
    null = prior.encode_text([""])
    state = make_state(prior, method, particles=3)
    x0, (t, eps) = state.generator().detach(), asd.draw(rng(), torch.zeros(3, *prior.shape), 0, 999)
    for part in (slice(3), slice(0, 1), slice(1, 2), slice(2, 3)):
        phi = scramble(LoRAPhi(prior))
        alone = State(state.generator, phi, method, rng())
        x_t = asd.add_noise(x0[part], eps[part], *prior.alpha_sigma(t[part]))
        y = cond.expand(len(x_t), -1, -1)
        u = asd.Update(t[part], eps[part], None, x_t, fake_y=prior.eps(x_t, t[part], y))
        asd.discriminator_step(alone, method, asd.Discriminator(phi, y), u, null)
        grads.append(torch.cat([p.grad.flatten() for p in trainable(phi).values()]))
    torch.testing.assert_close(grads[0], sum(grads[1:]) / 3, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, changes", [
    ("sds", {}), ("vsd", {}), ("asd", {}), ("asd", {"phi": "embedding", "share_noise": True})])
def test_a_seed_fixes_every_bit(prior, name, changes):
    runs = []
    for seed, noise in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(noise)                        # the global generator plays no part
        before = torch.get_rng_state()
        state, _ = go(prior, method_of(name, **changes), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(copy.deepcopy(tensors(state)))
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0]["theta.0"], runs[2]["theta.0"])


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_the_loop_has_gradients_under_no_grad(prior, around):
    """The same bits, whatever the caller has switched off, and whatever its default dtype is."""
    states = [make_state(prior, method_of()) for _ in range(3)]
    go(prior, method_of(), states[0])
    cond = prior.encode_text([PROMPT])
    with around():
        asd.distill(prior, states[1].generator, cond, method_of(), state=states[1])
    torch.set_default_dtype(torch.float64)
    try:
        go(prior, method_of(), states[2])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same(tensors(state), tensors(states[0])) for state in states)


def test_distill_makes_phi_and_state_itself(prior, monkeypatch):
    """As the method's row and the seed say; a name is its row of the table."""
    cond, row = prior.encode_text([PROMPT]), method_of()
    monkeypatch.setitem(METHODS, "asd", row)
    ends = [asd.distill(prior, Latents(prior, 1, rng(7)), cond, method, seed=4)
            for method in ("asd", row)]
    state = State(Latents(prior, 1, rng(7)), LoRAPhi(prior, seed=4), row, rng(4))
    ends.append(asd.distill(prior, state.generator, cond, row, state=state))
    assert ends[0].step == 2 and isinstance(ends[0].phi, LoRAPhi)
    mine, other = LoRAPhi(prior, rank=1), asd.Discriminator(NoisePhi(), cond)
    given = asd.distill(prior, Latents(prior), cond, row, phi=mine, second=other,
                        real=(real := torch.zeros(1, *prior.shape)))
    assert given.phi is mine and given.second is other and given.real is real
    assert all(same(tensors(end), tensors(state)) for end in ends)


# ----------------------------------------------------------------------------- what goes wrong
def test_nan_of_the_prior_ends_the_run(prior):
    broken = copy.deepcopy(prior)
    method = method_of(steps=5)
    state = make_state(broken, method)
    seen = []

    def poison(state, terms):
        seen.append(state.generator.theta.detach().clone())
        if state.step == 2:
            broken.network.conv_out.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="generator's gradient .*step 2"):
        asd.distill(broken, state.generator, broken.encode_text([PROMPT]), method, state=state,
                    callback=poison)
    assert len(seen) == 2 and torch.equal(state.generator.theta, seen[-1])


def test_infinite_loss_of_phi_ends_the_run(prior, monkeypatch):
    method = method_of()
    state = make_state(prior, method)
    before = copy.deepcopy(trainable(state.phi))
    loss = asd.discriminator_loss_text
    monkeypatch.setattr(asd, "discriminator_loss_text", lambda *args: loss(*args) / 0)
    with pytest.raises(FloatingPointError, match="discriminator's loss .*step 0"):
        go(prior, method, state)
    assert same(trainable(state.phi), before)


class Root(nn.Module):
    """A generator whose own derivative, not the prior's, is infinite at its start."""

    def __init__(self, prior):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, *prior.shape))

    def forward(self):
        return self.theta.abs().sqrt()


def test_infinite_derivative_of_the_generator_ends_the_run(prior):
    generator = Root(prior)
    with pytest.raises(FloatingPointError, match="step 0"):
        go(prior, method_of("sds"), generator=generator)
    assert torch.equal(generator.theta, torch.zeros_like(generator.theta))


# ------------------------------------------------------------------------- generators that look
@pytest.mark.parametrize("name", ["sds", "asd"])
def test_prompt_of_the_generator_replaces_the_loops(prior, name):
    fox, ends = prior.encode_text(["a blue fox"]), []
    for told, views in ((PROMPT, Views(prior, fox)), ("a blue fox", Views(prior))):
        state = make_state(prior, method_of(name), generator=views)
        asd.distill(prior, views, prior.encode_text([told]), method_of(name), state=state)
        ends.append(views.theta.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("share_noise, subtracted", [(False, False), (True, False), (False, True)])
def test_one_view_in_ten_is_learnt_without_its_camera(prior, share_noise, subtracted):
    """Also by the φ of a second discriminator."""
    phi, seen = LoRAPhi(prior, camera=16), []
    forward = phi.forward
    phi.forward = lambda *args: seen.append(args[4]) or forward(*args)
    camera = torch.randn(100, 16, generator=rng())
    method, y = method_of(steps=1, share_noise=share_noise), prior.encode_text([PROMPT])
    phis = (NoisePhi(), asd.Discriminator(phi, y)) if subtracted else (phi, None)
    go(prior, method, State(Views(prior, y, camera), phis[0], method, rng(), phis[1]))
    for_theta, for_phi = seen
    assert torch.equal(for_theta, camera)
    dropped = (for_phi == 0).all(1)
    assert 2 <= dropped.sum() <= 20 and torch.equal(for_phi[~dropped], camera[~dropped])


# ----------------------------------------------------------------------------------- going on
@pytest.mark.parametrize("name, changes, generator", [
    ("sds", {}, Latents), ("vsd", {}, Latents), ("asd", {}, Latents), ("asd", {}, Pixels),
    ("asd", {"phi": "embedding", "phi_steps": 2}, Latents),
    ("asd", {"share_noise": True, "phi_first": True}, Latents)])
def test_n_plus_m_steps_are_n_then_m(prior, name, changes, generator):
    """Both optimisers and the randomness go on too: bit for bit."""
    changes = changes | {"t_late": 1.0}           # what depends on the number of steps, left out
    whole, part = method_of(name, steps=5, **changes), method_of(name, steps=2, **changes)
    state, rows = go(prior, whole, generator=generator(prior, 2, rng()))
    first, _ = go(prior, part, generator=generator(prior, 2, rng()))
    kept = copy.deepcopy(tensors(first))
    second = make_state(prior, whole, seed=99, generator=generator(prior, 2, rng(98)))
    load_tensors(second, kept, 2)
    _, again = go(prior, whole, second)
    assert second.step == 5 and same(tensors(second), tensors(state))
    assert [row["loss_G"] for row in again] == [row["loss_G"] for row in rows[2:]]


def test_a_state_that_was_copied_lives_on_alone(prior):
    """load_tensors takes values, not the other state's memory."""
    method = method_of(steps=2)
    first, _ = go(prior, method)
    second = make_state(prior, method, seed=9)
    load_tensors(second, tensors(first), first.step)
    before = copy.deepcopy(tensors(second))
    go(prior, method_of(steps=3), first)
    assert same(tensors(second), before)


def test_state_with_an_unused_parameter_goes_on(prior):
    """A scene's background may have had no gradient yet."""
    class Scene(Latents):
        def __init__(self, seed):
            super().__init__(prior, 1, rng(seed))
            self.background = nn.Parameter(torch.zeros(3))
    first, _ = go(prior, method_of("sds"), generator=Scene(0))
    second = make_state(prior, method_of("sds"), generator=Scene(1))
    load_tensors(second, copy.deepcopy(tensors(first)), first.step)
    assert same(tensors(first), tensors(second))


def test_tensors_of_another_run_are_refused(prior):
    one, two = (make_state(prior, method_of(), particles=n) for n in (1, 2))
    with pytest.raises(ValueError, match="theta.0"):
        load_tensors(one, tensors(two), 0)
    with pytest.raises(KeyError):
        load_tensors(one, {"rng": one.rng.get_state()}, 0)


# ------------------------------------------------------------------------------------- on CUDA
@cuda
@pytest.mark.parametrize("name", METHODS)
def test_cuda_and_cpu_take_the_same_first_step(load, name, monkeypatch):
    """The same seed draws the same noise everywhere. TF32 would round the convolutions' inputs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ends = []
    for device in ("cpu", "cuda"):
        state, rows = go(load(device=device), method_of(name, steps=1), particles=2)
        ends.append((state.generator.theta.grad.cpu(), torch.tensor(rows[0]["loss_D"])))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@cuda
@pytest.mark.parametrize("phi", ["lora", "embedding"])
def test_cuda_run_in_bfloat16_goes_on(load, phi):
    prior, method = load(device="cuda", dtype=torch.bfloat16), method_of(phi=phi)
    first, _ = go(prior, method, particles=2)
    kept = {name: tensor.cpu() for name, tensor in tensors(first).items()}
    second = make_state(prior, method_of(phi=phi, steps=3), particles=2, seed=9)
    load_tensors(second, kept, 2)
    go(prior, method_of(phi=phi, steps=3), second)
    assert second.step == 3 and second.generator.theta.isfinite().all()


# ----------------------------------------------------------------------------------- benchmarks
ROWS = [("sds", "noise", False)] + [(name, phi, share) for name in ("vsd", "asd")
                                    for phi in ("lora", "embedding") for share in (False, True)]
rows = pytest.mark.parametrize("name, phi, share_noise", ROWS)


def time_step(benchmark, prior, cond, name, phi, share_noise, rounds):
    method = method_of(name, steps=0, phi=phi, share_noise=share_noise)
    state = make_state(prior, method)

    def step():
        one = replace(method, steps=state.step + 1)
        asd.distill(prior, state.generator, cond, one, state=state)
        if prior.device.type == "cuda":
            torch.cuda.synchronize()
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
    assert state.generator.theta.isfinite().all()


@pytest.fixture(scope="module")
def tiny():
    return Prior.from_pretrained("tiny-sd", "cpu")


@pytest.mark.skipif(not (HERE / "tiny/sd/unet").is_dir(), reason="tiny/sd is not here")
@rows
def test_time_of_a_step_of_tiny_sd(benchmark, tiny, name, phi, share_noise):
    time_step(benchmark, tiny, tiny.encode_text([PROMPT]), name, phi, share_noise, rounds=3)


@pytest.fixture(scope="module")
def big(folders):
    """Random weights in the shape of Stable Diffusion 2.1-base; the text encoder is a small one."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    pipe = StableDiffusionPipeline.from_pretrained(folders["epsilon"])
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(pipe.tokenizer), hidden_size=1024, num_hidden_layers=1,
        num_attention_heads=16, max_position_embeddings=77))
    pipe.tokenizer.model_max_length = 77
    with torch.device("cuda"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    return Prior(StableDiffusionPipeline(**pipe.components | {
        "unet": unet, "text_encoder": text_encoder}, requires_safety_checker=False).to(
            "cuda", torch.bfloat16))


@cuda
@rows
def test_time_of_a_step_of_stable_diffusion(benchmark, big, name, phi, share_noise):
    time_step(benchmark, big, big.encode_text([PROMPT]), name, phi, share_noise, rounds=5)
