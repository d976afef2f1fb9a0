"""Prior, φ, the generators and the loop.

The networks are those of two tiny diffusers pipelines with random weights:

    epsilon        like Stable Diffusion 1.x: predicts ε, 2 heads everywhere
    v_prediction   like 2.x: predicts v, heads per level, linear projections, padded with "!"

test_equation… in test_asd.py checks the formulas; here they are recomputed by hand around networks
that really run. Whatever does not depend on a network is tested on ElementwisePrior, in float64.
Timings of one step come last, and run with --benchmark-only -n 0.
"""
import copy
import functools
import itertools
import json
import math
import socket
from collections import Counter, namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import asd
from asd import METHODS, NoisePhi, State
from cli.files import load_tensors, tensors
from phi import EmbeddingPhi, LoRAPhi, second_view
from prior import Latents, Pixels, Prior, UserError, to_eps
from tiny import make

HERE = Path(asd.__file__).resolve().parent
KINDS = ["epsilon", "v_prediction"]
PROMPT = "a red apple"                                  # three tokens
PHIS = {"noise": NoisePhi, "lora": LoRAPhi, "embedding": EmbeddingPhi}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = pytest.mark.filterwarnings("ignore:γ is below the bound")
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
    """A row of asd.METHODS, changed; phi: a name of PHIS, in place of the row's."""
    if phi is not None:
        changes["phi"] = PHIS[phi]
    return replace(METHODS[name], steps=steps, **changes)


def make_state(prior, method, particles=1, seed=0, generator=None, phi=None):
    random = rng(seed)
    generator = generator or Latents(prior, particles, random)
    phi = phi or asd.make_phi(method, prior, PROMPT, seed)
    return State(generator, phi, method, random)


def go(prior, method, state=None, real=None, **kwargs):
    """A short run of the loop for PROMPT -> (state, [metrics of each step])."""
    state, logs = state or make_state(prior, method, **kwargs), []
    state.real = real
    asd.distill(prior, state.generator, prior.encode_text([PROMPT]), method, state=state,
                callback=lambda state, metrics: logs.append(metrics))
    return state, logs


class Views(nn.Module):
    """A stand-in for a 3D scene: θ [N, …] seen by cameras [N, 16]; cond [1, L, C]."""

    def __init__(self, prior, cond, camera):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(len(camera), *prior.shape, generator=rng(1)))
        self.cond, self.camera = cond.repeat(len(camera), 1, 1), camera

    def forward(self):
        return asd.Samples(self.theta, self.cond, self.camera)


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


@pytest.mark.parametrize("kind", [LoRAPhi, EmbeddingPhi])
def test_checkpointing_recomputes_the_same_gradients(prior, kind):
    """In φ's own view of the network and the prior's storage; the prior does not recompute."""
    (x_t, t, cond), grads, calls = sample(prior), [], []
    for checkpointing in (False, True):
        phi = scramble(kind(prior, PROMPT, checkpointing=checkpointing))
        network = prior.network
        if kind is LoRAPhi:
            network = phi.network
        elif checkpointing:
            network = phi.view
        seen = []
        handle = network.mid_block.resnets[1].register_forward_pre_hook(
            lambda *_, seen=seen: seen.append(1))
        phi(x_t, t, cond, None).square().sum().backward()
        handle.remove()
        calls.append(len(seen))
        grads.append([p.grad for p in trainable(phi).values()])
    assert calls[0] == 1 < calls[1] and not prior.network.is_gradient_checkpointing
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    storage = {p.data_ptr() for p in network.parameters()}
    assert storage >= {p.data_ptr() for p in prior.network.parameters()}


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
    state, logs = go(prior, method_of(), phi=phi)
    assert all(math.isfinite(log["loss_D"]) for log in logs)
    assert not any(torch.equal(p, before[name]) for name, p in trainable(phi).items())


@pytest.mark.parametrize("phi", ["lora", "embedding"])
def test_all_that_learns_is_float32_beside_a_bfloat16_prior(load, phi):
    state, logs = go(load(dtype=torch.bfloat16), method_of(phi=phi), particles=2)
    assert {p.dtype for p in trainable(state.phi).values()} == {torch.float32}
    floats = [tensor for name, tensor in tensors(state).items() if name != "rng"]
    assert len(floats) >= 8 and {tensor.dtype for tensor in floats} == {torch.float32}
    assert all(math.isfinite(log["grad_norm"] + log["loss_D"]) for log in logs)


def test_camera_starts_mute_and_is_learnt(prior):
    (x_t, t, cond), views = sample(prior), torch.randn(2, 16, generator=rng())
    phi = LoRAPhi(prior, camera=16)
    assert prior.network.class_embedding is None
    with torch.no_grad():
        assert torch.equal(phi(x_t, t, cond, None, views), prior.eps(x_t, t, cond))
    go(prior, method_of(phi_lr=0.05), phi=phi, generator=Views(prior, cond[:1], views))
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


def test_make_phi_hands_over_what_the_phi_accepts(prior):
    """Of the run, what the φ takes; an option that it lacks is an error, not forgotten."""
    for name, kind in PHIS.items():
        method = method_of(phi=name)
        assert type(asd.make_phi(method, prior, PROMPT)) is kind
        with pytest.raises(TypeError, match="rang"):
            asd.make_phi(method, prior, PROMPT, rang=8)
    assert len(asd.make_phi(method_of(phi="embedding"), prior, PROMPT, tokens=2).words[0]) == 2
    one, two, other = (trainable(asd.make_phi(method_of(), prior, seed=seed)) for seed in (3, 3, 4))
    assert same(one, two) and not same(one, other)

    def record(prior, prompts, steps, lam):
        return prompts, steps, lam
    method = replace(method_of(steps=9, lam=3.0), phi=record)
    assert asd.make_phi(method, prior, PROMPT) == (PROMPT, 9, 3.0)
    with pytest.raises(ValueError, match="starts at its prompt"):          # where there is none
        asd.distill(prior, Latents(prior), prior.encode_text([PROMPT]), method_of(phi="embedding"))


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
def test_a_lora_of_another_scale_is_refused(prior, pipe, tmp_path, alpha):
    """Trained with peft, saved by diffusers with what peft knows of it: alpha/r is 1 or 2."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha,
                                     target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    scramble(pipe.unet)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers,
                           unet_lora_adapter_metadata={"r": 4, "lora_alpha": alpha})
    phi, (x_t, t, cond) = LoRAPhi(prior), sample(prior)
    if alpha == 8:
        with pytest.raises(ValueError, match="scale"):
            phi.load(tmp_path)
    else:
        phi.load(tmp_path)
        eps = prior.eps_of(pipe.unet, x_t, t, cond)
        torch.testing.assert_close(phi(x_t, t, cond, None), eps, rtol=1e-5, atol=1e-5)


def test_a_lora_with_alphas_in_its_file_is_refused(prior, tmp_path):
    """Other trainers' files have them, each layer its own."""
    phi = scramble(LoRAPhi(prior))
    phi.save(tmp_path)
    (file,) = tmp_path.iterdir()
    named = load_file(file)
    down = next(key for key in named if key.endswith(".lora.down.weight"))
    alpha = down.replace("lora.down.weight", "alpha")
    save_file(named | {alpha: torch.tensor(8.0)}, file)
    with pytest.raises(ValueError, match="scale"):
        LoRAPhi(prior).load(tmp_path)


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


# ------------------------------------------- a prior and a φ of element-wise float64 operations
class ElementwisePrior:
    """A DiffusionModel in which no bit of a sample depends on the rest of its batch.

    A prompt's embedding is its length, L = 2, C = 3. batches: the samples of each call of eps.
    """
    steps, shape = 1000, (2, 3, 3)

    def __init__(self):
        self.batches = []

    def alpha_sigma(self, t):
        alpha_t = torch.cos(0.5 * torch.pi * (t + 1).double() / 1001)[:, None, None, None]
        return alpha_t, (1 - alpha_t ** 2).sqrt()

    def encode_text(self, prompts):
        return torch.stack([torch.full((2, 3), float(len(prompt))) for prompt in prompts]).double()

    def predict(self, x_t, t, cond):
        c = cond.mean((1, 2))[:, None, None, None]
        return torch.tanh(x_t * (1 + 0.1 * c) + t[:, None, None, None] / 1000) + 0.01 * c

    def eps(self, x_t, t, cond):
        self.batches.append(len(x_t))
        return self.predict(x_t, t, cond)


Heard = namedtuple("Heard", "x_t t cond eps camera answers")         # what a φ was called with


class ElementwisePhi(nn.Module):
    """ε_φ = ε_y + a (x_t + 1 + the camera's mean). heard: every call of it."""

    def __init__(self, prior, a=0.0):
        super().__init__()
        self.prior, self.heard = prior, []
        self.a = nn.Parameter(torch.full((1, 2, 3, 3), a, dtype=torch.float64))

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        self.heard.append(Heard(x_t, t, cond, eps, camera, answers))
        seen = x_t + 1
        if camera is not None:
            seen = seen + camera.mean(1)[:, None, None, None]
        return self.prior.predict(x_t, t, cond) + self.a * seen


class ListeningPhi(NoisePhi):
    """SDS's φ. heard: every call of it."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        self.heard.append(Heard(x_t, t, cond, eps, camera, answers))
        return eps


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


class Particles(nn.Module):
    """θ [n, 2, 3, 3] is x0. fields: the prompts, cameras or sources of all samples."""

    def __init__(self, n=1, **fields):
        super().__init__()
        self.theta = nn.Parameter(normal(n, 2, 3, 3, seed=1))
        self.batch, self.fields = n, fields

    def forward(self, rows=None):
        rows = slice(None) if rows is None else rows
        x0 = self.theta[rows]
        if not self.fields:
            return x0
        return asd.Samples(x0, **{name: tensor[rows] for name, tensor in self.fields.items()})


def particles_with_everything(prior, n):
    """Each sample has a prompt, a camera, a source picture and a source prompt of its own."""
    texts = ["y" * (i + 1) for i in range(n)]
    sources = ["z" * (2 * i + 1) for i in range(n)]
    return Particles(n, cond=prior.encode_text(texts), camera=normal(n, 16, seed=2),
                     source=normal(n, 2, 3, 3, seed=3), source_cond=prior.encode_text(sources))


def run_elementwise(method, generator=None, phi=None, second=None, real=None, micro_batch=None,
                    prior=None):
    """A run for "a fox" on the element-wise prior -> (state, [metrics of each step])."""
    prior, logs = prior or ElementwisePrior(), []
    generator = Particles() if generator is None else generator
    if phi is None:
        phi = NoisePhi() if method.phi is NoisePhi else ElementwisePhi(prior, 0.1)
    state = State(generator, phi, method, rng(), second, real)
    asd.distill(prior, generator, prior.encode_text(["a fox"]), method, state=state,
                micro_batch=micro_batch, callback=lambda state, metrics: logs.append(metrics))
    return state, logs


def second_of(prior, **pictures):
    """A discriminator to subtract, for "a cat", with a φ of its own."""
    return asd.Discriminator(ElementwisePhi(prior, 0.2), prior.encode_text(["a cat"]), 1.0, 0.5,
                             at="source", **pictures)


# --------------------------------------------------------------------------------- Algorithm 1
@pytest.mark.parametrize("share_noise", [False, True], ids=["fresh", "shared"])
@pytest.mark.parametrize("name, with_real", [("sds", False), ("vsd", False), ("vsd", True),
                                             ("asd", False), ("asd", True)])
def test_distill_is_algorithm_1(name, share_noise, with_real):
    """Bit for bit: θ, φ, the losses and the generator of randomness."""
    real = normal(5, 2, 3, 3, seed=2) if with_real else None
    for n, phi_steps in itertools.product((1, 3), (1, 2)):
        method = method_of(name, steps=7, share_noise=share_noise, phi_steps=phi_steps,
                           lr_end=0.5, phi_lr=0.01)
        prior, generator, random, losses = ElementwisePrior(), Particles(n), rng(), []
        phi = NoisePhi() if name == "sds" else ElementwisePhi(prior, 0.1)
        asd.algorithm_1(prior, generator, prior.encode_text(["a fox"]), phi, method, random, real,
                        callback=lambda step, loss_D, losses=losses: losses.append(loss_D))
        state, logs = run_elementwise(method, Particles(n), real=real)
        assert torch.equal(state.generator.theta, generator.theta)
        assert same(state.phi.state_dict(), phi.state_dict())
        assert [log["loss_D"] for log in logs] == losses
        assert torch.equal(state.rng.get_state(), random.get_state())
        assert not torch.equal(generator.theta, Particles(n).theta)


@pytest.fixture(scope="module")
def tiny():
    return Prior.from_pretrained("tiny-sd", "cpu")


needs_tiny_sd = pytest.mark.skipif(not (HERE / "tiny/sd/unet").is_dir(),
                                   reason="tiny/sd is not here")


@needs_tiny_sd
@pytest.mark.parametrize("name, share_noise", [("sds", False), ("vsd", True), ("asd", False)])
def test_distill_is_algorithm_1_on_tiny_sd(tiny, name, share_noise):
    """Up to rounding, as the prior is asked in batches of other sizes: 4 steps."""
    method, y = method_of(name, steps=4, phi_lr=0.01, share_noise=share_noise), tiny.encode_text(
        [PROMPT])
    ends = []
    for loop in ("algorithm_1", "distill"):
        generator, phi = Latents(tiny, 1, rng()), asd.make_phi(method, tiny)
        if loop == "algorithm_1":
            asd.algorithm_1(tiny, generator, y, phi, method, rng())
        else:
            asd.distill(tiny, generator, y, method, state=State(generator, phi, method, rng()))
        ends.append(generator.theta.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=2e-5)


# ------------------------------------------------------------------------ what the prior is asked
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


@pytest.mark.parametrize("name, changes, with_real, forward, backward", [
    ("sds", {}, False, 2, 0),
    ("sds", {"lam": 1.0}, False, 1, 0),
    ("vsd", {}, False, 4, 1),
    ("asd", {}, False, 5, 1),
    ("asd", {"phi": "embedding"}, False, 5, 1),
    ("vsd", {"share_noise": True}, False, 3, 1),
    ("asd", {"share_noise": True}, False, 3, 1),
    ("asd", {"lam": 1.0, "share_noise": True}, False, 2, 1),
    ("asd", {"phi_steps": 2}, False, 7, 2),
    ("asd", {"phi_steps": 2, "share_noise": True}, False, 4, 2),
    ("asd", {"lam_phi": 2.0}, False, 7, 2),
    ("asd", {}, True, 7, 2),
    ("asd", {"eta": 0.0}, True, 6, 2),
    ("asd", {"gamma": 0.0}, True, 6, 2),
    ("asd", {"share_noise": True}, True, 6, 2),
])
def test_unet_evaluations_per_particle_and_step(prior, name, changes, with_real, forward, backward):
    """Those of distill's docstring; only what is learnt from has a graph."""
    method = method_of(name, steps=1, **changes)
    state = make_state(prior, method, particles=3)
    real = torch.zeros(1, *prior.shape) if with_real else None
    unets = [prior.network]
    if isinstance(state.phi, LoRAPhi):
        unets.append(state.phi.network)
    with counted(*unets) as counts:
        go(prior, method, state, real=real)
    assert counts["forward"] == 3 * forward
    assert counts["backward"] == counts["graph"] == 3 * backward


@pytest.mark.parametrize("pictures", [
    None, {}, {"real": "source"}, {"real": "real"}, {"fake": "source", "real": "generated"}],
    ids=str)
@pytest.mark.parametrize("changes", [{}, {"share_noise": True}, {"phi_steps": 3}, {"lam": 1.0}],
                         ids=str)
@pytest.mark.parametrize("with_real", [False, True], ids=["eq10", "eq9"])
def test_the_prior_is_asked_once_a_step(changes, with_real, pictures):
    """Whatever θ, φ and, if there is one, the second discriminator need of it."""
    prior = ElementwisePrior()
    needs_real = with_real or (pictures or {}).get("real") == "real"
    run_elementwise(method_of(**changes), particles_with_everything(prior, 3),
                    second=None if pictures is None else second_of(prior, **pictures),
                    real=normal(4, 2, 3, 3) if needs_real else None, prior=prior)
    assert len(prior.batches) == 2


def test_answers_have_the_names_of_the_questions_and_no_graph():
    prior = ElementwisePrior()
    x_t, t = normal(3, 2, 3, 3).requires_grad_(), torch.tensor([1, 500, 900])
    cond = prior.encode_text(["a", "bb", "ccc"])
    for micro_batch, batches in ((None, [9]), (2, [6, 3])):
        prior.batches.clear()
        one, nothing, two = asd.ask(prior, [
            {"y": (x_t, t, cond), "uncond": (x_t, t, 0 * cond)}, {}, {"y": (-x_t, t, 2 * cond)}],
            micro_batch)
        assert prior.batches == batches and nothing == {}
        assert one.keys() == {"y", "uncond"} and two.keys() == {"y"}
        assert torch.equal(one["y"], prior.predict(x_t, t, cond))
        assert torch.equal(one["uncond"], prior.predict(x_t, t, 0 * cond))
        assert torch.equal(two["y"], prior.predict(-x_t, t, 2 * cond))
        assert not one["y"].requires_grad


@pytest.mark.parametrize("lam", [5.0, 1.0])
def test_phi_gets_the_priors_answers(lam):
    """ε_∅ and ε_y at its x_t; where λ = 1 cancels ε_∅, it is not there."""
    prior, phi = ElementwisePrior(), ListeningPhi()
    run_elementwise(method_of("sds", steps=1, lam=lam), Particles(2), phi, prior=prior)
    (heard,) = phi.heard
    assert torch.equal(heard.answers["y"], prior.predict(heard.x_t, heard.t, heard.cond))
    if lam == 1:
        assert heard.answers.keys() == {"y"}
        return
    null = prior.encode_text([""]).expand_as(heard.cond)
    assert torch.equal(heard.answers["uncond"], prior.predict(heard.x_t, heard.t, null))


def test_phi_has_prompts_of_its_own():
    """What its `prompts` names is asked, too; a "y" among them replaces the loop's in Eq. 7."""
    class Asking(ListeningPhi):
        def prompts(self, step, y, null):
            assert torch.equal(null, torch.zeros_like(y))
            return {"y": 3 * y, "negative": (step + 1) * y}
    prior, phi = ElementwisePrior(), Asking()
    run_elementwise(method_of("sds", steps=2), Particles(2), phi, prior=prior)
    y = prior.encode_text(["a fox"]).expand(2, -1, -1)
    for step, heard in enumerate(phi.heard):
        assert heard.answers.keys() == {"uncond", "y", "negative"}
        assert torch.equal(heard.cond, 3 * y)
        for name, cond in (("uncond", 0 * y), ("y", 3 * y), ("negative", (step + 1) * y)):
            assert torch.equal(heard.answers[name], prior.predict(heard.x_t, heard.t, cond))
    assert len(prior.batches) == 2


# ------------------------------------------------------------- the equations in the loop, by hand
def predictions_by_hand(prior, phi, x0, t, eps):
    """α, σ, ε_∅, ε_y and ε_φ, without asd's own code, φ's with its graph. -> SimpleNamespace"""
    alpha, sigma = (level[t].view(-1, 1, 1, 1) for level in (prior.alphas, prior.sigmas))
    x_t = alpha * x0 + sigma * eps
    null, cond = (prior.encode_text([text]).expand(len(t), -1, -1) for text in ("", PROMPT))

    def predict(unet, cond):
        output = unet(x_t, t, cond).sample
        if prior.prediction_type == "v_prediction":
            output = sigma * x_t + alpha * output
        return output
    with torch.no_grad():
        eps_uncond, eps_y = predict(prior.network, null), predict(prior.network, cond)
    eps_phi = eps if isinstance(phi, NoisePhi) else predict(phi.network, cond)
    return SimpleNamespace(alpha=alpha, sigma=sigma, eps_uncond=eps_uncond, eps_y=eps_y,
                           eps_phi=eps_phi)


def draw_by_hand(random, theta, lowest=20, highest=980):
    t = torch.randint(lowest, highest + 1, (len(theta),), generator=random)
    return t, torch.randn(theta.shape, generator=random)


@pytest.mark.parametrize("name, omega, lam", [
    ("sds", "sigma2", 5.0), ("vsd", "1", 5.0), ("asd", "sigma/alpha", 1.0)])
def test_first_update_is_adam_on_eq7(prior, name, omega, lam):
    method = method_of(name, steps=1, lam=lam, omega=omega, lr=0.03)
    state = make_state(prior, method, particles=2)
    scramble(state.phi)
    theta, random = state.generator.theta.detach().clone(), state.rng.clone_state()
    t, eps = draw_by_hand(random, theta)
    hand = predictions_by_hand(prior, state.phi, theta, t, eps)
    weight = {"sigma2": hand.sigma ** 2, "1": 1, "sigma/alpha": hand.sigma / hand.alpha}[omega]
    bracket = hand.eps_uncond + lam * (hand.eps_y - hand.eps_uncond) - hand.eps_phi
    expected = (weight * bracket).detach()
    _, (metrics,) = go(prior, method, state)
    grad = state.generator.theta.grad
    torch.testing.assert_close(grad, expected / 2, rtol=1e-3, atol=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    # Adam's first step: −lr · m̂ / (√v̂ + 1e-8) with m̂ = grad, v̂ = grad²
    expected = theta - 0.03 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(state.generator.theta.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, gamma, eta, with_real, share_noise", [
    ("epsilon", 0.0, 0.5, False, False), ("epsilon", -1.0, 0.5, False, False),
    ("v_prediction", 0.5, 0.5, False, True), ("epsilon", -1.0, 0.5, True, False),
    ("v_prediction", 1.0, 0.0, True, True), ("epsilon", 0.0, 2.0, True, True)])
def test_first_update_of_phi_is_eq10_or_eq9(load, kind, gamma, eta, with_real, share_noise):
    """Loss and gradient, on x0 as it was before θ's step; one real sample for each particle.

    Shared: θ's own t and ε. Fresh: the next draw, over all t.
    """
    prior = load(kind)
    method = method_of(steps=1, lr=1.0, gamma=gamma, eta=eta, share_noise=share_noise)
    state = make_state(prior, method, particles=2)
    scramble(state.phi)
    theta, random = state.generator.theta.detach().clone(), state.rng.clone_state()
    t, eps = draw_by_hand(random, theta)
    if not share_noise:
        t, eps = draw_by_hand(random, theta, 0, 999)
    fake = predictions_by_hand(prior, state.phi, theta, t, eps)
    # Eq. 10: ‖ε_φ − ε‖² + γ ‖ε_y − ε_φ‖², the mean over two particles
    loss = (fake.eps_phi - eps).square() + gamma * (fake.eps_y - fake.eps_phi).square()
    pictures = torch.randn(3, *prior.shape, generator=rng(3)) if with_real else None
    if with_real:
        chosen = pictures[torch.randint(3, (2,), generator=random)]
        real = predictions_by_hand(prior, state.phi, chosen, t, eps)
        # Eq. 9 has − ‖ε_{x^r;φ} − ε‖² + η ‖ε_{x^r;y} − ε_{x^r;φ}‖² besides
        loss = loss - (real.eps_phi - eps).square() + eta * (real.eps_y - real.eps_phi).square()
    (loss.sum() / 2).backward()
    expected = [p.grad.clone() for p in trainable(state.phi).values()]
    _, (metrics,) = go(prior, method, state, real=pictures)
    assert metrics["loss_D"] == pytest.approx(loss.sum().item() / 2, rel=1e-3)
    found = [p.grad for p in trainable(state.phi).values()]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_second_gradient_is_subtracted():
    """Eq. 11: Eq. 7 of (y, φ_y) at the edit minus Eq. 7 of (z, φ_z) at the source picture."""
    prior = ElementwisePrior()
    generator, second = particles_with_everything(prior, 2), second_of(prior)
    method = method_of(steps=1, lam=5.0)
    phi, fields, theta = ElementwisePhi(prior, 0.1), generator.fields, generator.theta.detach()
    t, eps = asd.draw_noise(rng(), theta, 20, 980)
    alpha, sigma = prior.alpha_sigma(t)
    brackets = []
    for x0, cond, a in ((theta, fields["cond"], 0.1),
                        (fields["source"], fields["source_cond"], 0.2)):
        x_t = alpha * x0 + sigma * eps
        eps_uncond, eps_y = (prior.predict(x_t, t, c) for c in (0 * cond, cond))
        seen = x_t + 1 + fields["camera"].mean(1).view(-1, 1, 1, 1)
        brackets.append(eps_uncond + 5 * (eps_y - eps_uncond) - (eps_y + a * seen))
    state, (metrics,) = run_elementwise(method, generator, phi, second, prior=prior)
    expected = brackets[0] - brackets[1]
    torch.testing.assert_close(state.generator.theta.grad, expected / 2, rtol=1e-12, atol=1e-12)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-12)


def test_lam_phi_is_guidance_inside_phi():
    """ε_φ(∅) + λ_φ (ε_φ(y) − ε_φ(∅)) in Eqs. 7, 9 and 10: as of a φ that does it itself."""
    class Guided(ElementwisePhi):
        def forward(self, x_t, t, cond, *rest):
            without = super().forward(x_t, t, torch.zeros_like(cond), *rest)
            return without + 3.0 * (super().forward(x_t, t, cond, *rest) - without)
    for real, changes in ((None, {}), (normal(4, 2, 3, 3), {"share_noise": True})):
        one, _ = run_elementwise(method_of(lam_phi=3.0, **changes), Particles(2), real=real)
        two, _ = run_elementwise(method_of(**changes), Particles(2), real=real,
                                 phi=Guided(ElementwisePrior(), 0.1))
        assert torch.equal(one.generator.theta, two.generator.theta)
        assert torch.equal(one.phi.a, two.phi.a)


def test_kappa_is_logged_where_eq10_has_a_minimiser():
    """κ = (1 + γ) ⟨ε_φ − ε_y, ε − ε_y⟩ / ‖ε − ε_y‖² at θ's draw, the mean over the samples."""
    prior, theta = ElementwisePrior(), Particles(3).theta.detach()
    cond = prior.encode_text(["a fox"]).expand(3, -1, -1)
    t, eps = asd.draw_noise(rng(), theta, 20, 980)
    alpha, sigma = prior.alpha_sigma(t)
    x_t = alpha * theta + sigma * eps
    eps_y, lag = prior.predict(x_t, t, cond), 0.1 * (x_t + 1)
    way = eps - eps_y
    share = (lag * way).sum((1, 2, 3)) / way.square().sum((1, 2, 3))
    for gamma, share_noise in ((-0.5, False), (0.0, True), (2.0, False)):
        method = method_of(steps=1, gamma=gamma, share_noise=share_noise)
        _, (metrics,) = run_elementwise(method, Particles(3))
        assert metrics["kappa"] == pytest.approx((1 + gamma) * share.mean().item(), rel=1e-9)
    for method in (method_of("asd", steps=1, gamma=-1.0), method_of("sds", steps=1)):
        _, (metrics,) = run_elementwise(method, Particles(3))
        assert "kappa" not in metrics                    # no minimiser; nothing that trains


def test_gamma_bound_is_logged_with_real_samples():
    """−η E‖ε_{x^r;y} − ε_{x^r;φ}‖² / E‖ε_{x^g;y} − ε_{x^g;φ}‖² at φ's draw; a γ below it warns."""
    prior, theta, random = ElementwisePrior(), Particles(3).theta.detach(), rng()
    asd.draw_noise(random, theta, 20, 980)                     # θ's
    t, eps = asd.draw_noise(random, theta, 0, 999)
    pictures = 3 + normal(5, 2, 3, 3)
    chosen = pictures[torch.randint(5, (3,), generator=random)]
    alpha, sigma = prior.alpha_sigma(t)
    fake, real = ((0.1 * (alpha * x0 + sigma * eps + 1)).square().sum() for x0 in (theta, chosen))
    bound = -0.5 * (real / fake).item()
    _, (metrics,) = run_elementwise(method_of(steps=1, gamma=bound + 0.1), Particles(3),
                                    real=pictures)
    assert metrics["gamma_bound"] == pytest.approx(bound, rel=1e-9)
    with pytest.warns(UserWarning, match="below the bound"):
        run_elementwise(method_of(steps=1, gamma=bound - 0.1), Particles(3), real=pictures)
    for method, real in ((method_of(steps=1), None),
                         (method_of(steps=1, gamma=0.0), pictures)):       # holds in any case
        assert "gamma_bound" not in run_elementwise(method, Particles(3), real=real)[1][0]


def test_metrics_of_a_step():
    """The names, and numbers only."""
    _, logs = run_elementwise(method_of(gamma=-0.5), real=normal(4, 2, 3, 3))
    for metrics in logs:
        assert metrics.keys() == {"grad_norm", "loss_D", "seconds", "kappa", "gamma_bound"}
        assert all(type(number) is float for number in metrics.values())


# ------------------------------------------------------------------------------------ randomness
def test_draws_reach_both_ends():
    x0 = torch.zeros(200, 2, 3, 3)
    t, eps = asd.draw_noise(rng(), x0, 3, 5)
    assert set(t.tolist()) == {3, 4, 5} and abs(eps.std() - 1) < 0.03
    assert len(eps[:, 0, 0, 0].unique()) == 200         # each particle has its own
    assert asd.range_of_t(method_of(t_min=1.0, t_max=1.0, t_late=1.0), 0, 1000) == (999, 999)


@pytest.mark.parametrize("changes, highest", [
    ({}, [980, 980, 500, 500]), ({"t_late": 0.25}, [980, 500, 500, 500]),
    ({"t_late": 1.0}, [980] * 4), ({"t_max": 0.3}, [300] * 4)])
def test_t_turns_late(changes, highest):
    method = method_of(steps=4, **changes)
    assert [asd.range_of_t(method, step, 1000) for step in range(4)] == [(20, t) for t in highest]


def test_each_update_of_phi_has_its_own_draw(monkeypatch):
    """θ's between t_min and t_max or t_max_late, φ's everywhere; with shared noise only θ's."""
    draw = asd.draw_noise
    for share_noise, per_step in ((False, [(0, 999)] * 2), (True, [])):
        ranges, drawn = [], []

        def noted(random, x0, lowest, highest, ranges=ranges, drawn=drawn):
            ranges.append((lowest, highest))
            drawn.append(draw(random, x0, lowest, highest))
            return drawn[-1]
        monkeypatch.setattr(asd, "draw_noise", noted)
        run_elementwise(method_of("vsd", phi_steps=2, share_noise=share_noise))
        assert ranges == [(20, 980), *per_step, (20, 500), *per_step]
        assert len({eps.sum().item() for _, eps in drawn}) == len(ranges)


def test_fixed_noise_is_that_of_the_first_step():
    """θ's ε; t is still drawn."""
    phi = ListeningPhi()
    state, _ = run_elementwise(method_of("sds", steps=4, fixed_noise=True), Particles(2), phi)
    assert all(torch.equal(heard.eps, phi.heard[0].eps) for heard in phi.heard)
    assert torch.equal(state.eps, phi.heard[0].eps)
    assert len({tuple(heard.t.tolist()) for heard in phi.heard}) > 1


@pytest.mark.parametrize("changes", [{}, {"phi": "embedding", "share_noise": True}])
def test_a_seed_fixes_every_bit(prior, changes):
    ends = []
    for seed, noise in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(noise)                        # the global generator plays no part
        before = torch.get_rng_state()
        state, _ = go(prior, method_of(**changes), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(copy.deepcopy(tensors(state)))
    assert same(ends[0], ends[1])
    assert not torch.equal(ends[0]["theta.0"], ends[2]["theta.0"])


# ------------------------------------------------------------------------------ the two optimisers
@pytest.mark.parametrize("changes, expected", [({}, "θφθφ"), ({"phi_steps": 2}, "θφφθφφ")])
def test_order_of_updates(changes, expected):
    method, order = method_of(**changes), []
    generator, prior = Particles(), ElementwisePrior()
    state = State(generator, ElementwisePhi(prior), method, rng())
    state.opt_theta.register_step_post_hook(lambda *_: order.append("θ"))
    state.opt_phi.register_step_post_hook(lambda *_: order.append("φ"))
    asd.distill(prior, generator, prior.encode_text([""]), method, state=state)
    assert "".join(order) == expected


@pytest.mark.parametrize("phi, share_noise", [("lora", False), ("lora", True), ("embedding", True)])
def test_steps_leave_each_others_gradients_none(prior, phi, share_noise):
    method = method_of(phi=phi, share_noise=share_noise)
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


class TwoRates(Particles):
    """A second parameter, of a tenth of the rate, which no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.zeros(1))

    def parameter_groups(self, lr):
        return [{"params": [self.theta]}, {"params": [self.other], "lr": lr / 10}]


@pytest.mark.parametrize("lr_end, parts", [(1.0, [1, 1, 1, 1]), (0.2, [1, 0.8829, 0.6, 0.3172]),
                                           (0.0, [1, 0.8536, 0.5, 0.1464])])
def test_rate_falls_along_a_cosine(lr_end, parts):
    """Each group's from its own rate: 0.2 + 0.8 (1 + cos(π step / 4)) / 2; φ's stays.

    A run that goes on after two steps goes on where it was.
    """
    method = method_of(steps=4, lr=0.1, lr_end=lr_end, phi_lr=0.3)
    rates = []

    def note(optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])
    first, _ = run_elementwise(replace(method, steps=2), TwoRates())
    prior, generator = ElementwisePrior(), TwoRates()
    for step in (0, 2):
        state = State(generator, ElementwisePhi(prior), method, rng())
        if step:
            load_tensors(state, copy.deepcopy(tensors(first)), step)
        state.opt_theta.register_step_pre_hook(note)
        asd.distill(prior, generator, prior.encode_text([""]), method, state=state)
    expected = torch.tensor(parts + parts[2:])[:, None] * torch.tensor([0.1, 0.01])
    torch.testing.assert_close(torch.tensor(rates), expected, atol=1e-5, rtol=0)
    assert [group["lr"] for group in state.opt_phi.param_groups] == [0.3]


def test_phi_steps_by_adamw_without_decay():
    """Of its first gradient g, however small: −lr · g / (|g| + 1e-8)."""
    phi = ElementwisePhi(ElementwisePrior(), 0.5)
    optimizer = asd.phi_optimizer(phi.parameters(), method_of(phi_lr=0.1))
    phi.a.grad = torch.full_like(phi.a, 1e-7)
    optimizer.step()
    expected = torch.full_like(phi.a, 0.5 - 0.1 * 1e-7 / 1.1e-7)
    torch.testing.assert_close(phi.a.detach(), expected, rtol=1e-12, atol=0)
    assert asd.phi_optimizer(NoisePhi().parameters(), method_of()) is None


def test_the_regulariser_is_added():
    """With all samples at once, and by micro-batches."""
    class Held(Particles):
        def regulariser(self):
            return 3 * self.theta.sum()
    method = method_of("sds", steps=1)
    free, _ = run_elementwise(method, Particles(3))
    for micro_batch in (None, 2):
        held, _ = run_elementwise(method, Held(3), micro_batch=micro_batch)
        torch.testing.assert_close(held.generator.theta.grad, free.generator.theta.grad + 3)


# ---------------------------------------------------------------- micro-batches and processes
@pytest.mark.parametrize("pictures", [
    None, {}, {"real": "source"}, {"real": "real"}, {"fake": "source", "real": "generated"}],
    ids=str)
@pytest.mark.parametrize("with_real", [False, True], ids=["eq10", "eq9"])
def test_micro_batches_change_nothing(with_real, pictures):
    """θ, both φ and the metrics, of particles that have a prompt, a camera and a source each."""
    needs_real = with_real or (pictures or {}).get("real") == "real"
    real = normal(4, 2, 3, 3) if needs_real else None
    for changes in ({}, {"share_noise": True}, {"phi_steps": 2, "lam_phi": 2.0}, {"lam": 1.0},
                    {"gamma": 0.5}, {"gamma": 0.0, "eta": 0.0}):
        ends = []
        for micro_batch in (None, 2, 1):
            prior = ElementwisePrior()
            second = None if pictures is None else second_of(prior, **pictures)
            state, logs = run_elementwise(method_of(steps=3, **changes),
                                          particles_with_everything(prior, 3), second=second,
                                          real=real, micro_batch=micro_batch, prior=prior)
            ends.append([state.generator.theta, *(p for group in state.opt_phi.param_groups
                                                  for p in group["params"]),
                         torch.tensor([[log[name] for name in sorted(log) if name != "seconds"]
                                       for log in logs])])
        for end in ends[1:]:
            torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-10)


def test_micro_batches_of_shared_noise():
    """One sample at a time bounds every call; θ's ε_φ is then computed anew, for φ's loss."""
    prior = ElementwisePrior()
    phi = ElementwisePhi(prior, 0.1)
    run_elementwise(method_of(share_noise=True, steps=1), Particles(5), phi, micro_batch=2,
                    prior=prior)
    assert prior.batches == [4, 4, 2]                    # ε_∅ and ε_y
    assert [len(heard.x_t) for heard in phi.heard] == [2, 2, 1] * 2


def test_a_phi_that_compares_all_samples_gets_them_at_once():
    """Whatever the micro-batch, which still bounds the prior's calls."""
    class Comparing(ListeningPhi):
        whole = True
    prior, phi = ElementwisePrior(), Comparing()
    run_elementwise(method_of("sds", steps=1), Particles(5), phi, micro_batch=2, prior=prior)
    assert [len(heard.x_t) for heard in phi.heard] == [5] and prior.batches == [4, 4, 2]


PROCESS_CASES = {                              # of the loop, and what it has besides
    "asd": ({}, None), "asd with real samples": ({"phi_steps": 2}, "real"),
    "vsd, shared noise": ({"gamma": 0.0, "share_noise": True}, None),
    "a source prompt for each": ({}, "second")}


def run_process_case(changes, more, micro_batch=None):
    """12 steps of five particles with a regulariser. -> {name: tensor}, of the metrics, too"""
    prior, second = ElementwisePrior(), None
    generator = particles_with_everything(prior, 5)
    generator.regulariser = lambda: generator.theta.square().mean()
    if more == "second":
        second = replace(second_of(prior), cond=generator.fields.pop("source_cond"))
    state, logs = run_elementwise(method_of(steps=12, **changes), generator, prior=prior,
                                  real=normal(4, 2, 3, 3) if more == "real" else None,
                                  second=second, micro_batch=micro_batch)
    metrics = torch.tensor([[log["grad_norm"], log["loss_D"]] for log in logs])
    return tensors(state) | {"metrics": metrics.double()}


class Undivided(Particles):
    """Four samples that cannot be divided among processes."""
    def __init__(self):
        super().__init__(4)
        del self.batch


def run_in_a_process(rank, world, folder):
    """Each case as one of `world` processes -> folder/{case}-{world}-{rank}.safetensors."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}",
                                         rank=rank, world_size=world)
    for name, (changes, more) in PROCESS_CASES.items():
        end = run_process_case(changes, more, micro_batch=2)
        save_file(end, f"{folder}/{name}-{world}-{rank}.safetensors")
    if world == 1:                            # it asks no more than no world
        run_elementwise(method_of("sds", steps=1), Undivided())
    if world > 1:
        whole = NoisePhi()
        whole.whole = True
        for words, generator, phi in (
                ("`batch` and forward", Undivided(), None),
                ("too many for 1 samples", Particles(1), None),
                ("compares all samples", Particles(4), whole)):
            with pytest.raises(ValueError, match=words):
                run_elementwise(method_of("sds"), generator, phi)
    torch.distributed.destroy_process_group()


def test_the_number_of_processes_changes_only_rounding(fork, tmp_path):
    """1, 2 and 4 that share five samples, by micro-batches; all of them end in the same State.

    Of tiny-sd: test_runs.py.
    """
    processes = [fork(run_in_a_process, rank, world, tmp_path)
                 for world in (1, 2, 4) for rank in range(world)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 7

    def end_of(name, world, rank=0):
        return load_file(tmp_path / f"{name}-{world}-{rank}.safetensors")
    for name, case in PROCESS_CASES.items():
        alone = run_process_case(*case)
        for world in (1, 2, 4):
            ends = [end_of(name, world, rank) for rank in range(world)]
            assert all(same(end, ends[0]) for end in ends)
            for part in ("theta.0", "phi.0", "metrics"):
                torch.testing.assert_close(ends[0][part], alone[part], rtol=1e-10, atol=1e-10)
            assert torch.equal(ends[0]["rng"], alone["rng"])


# ------------------------------------------------------------------------- distill's own behaviour
def test_the_loop_has_gradients_under_no_grad(prior):
    """The same bits, whatever the caller has switched off, and whatever its default dtype is."""
    states = [make_state(prior, method_of()) for _ in range(4)]
    go(prior, method_of(), states[0])
    with torch.no_grad():
        go(prior, method_of(), states[1])
    cond = prior.encode_text([PROMPT])
    with torch.inference_mode():
        asd.distill(prior, states[2].generator, cond, method_of(), state=states[2])
    torch.set_default_dtype(torch.float64)
    try:
        go(prior, method_of(), states[3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same(tensors(state), tensors(states[0])) for state in states)


def test_a_prompt_encoded_in_inference_mode_serves(folders):  # noqa: F811
    """φ learns from it, in both loops."""
    prior = Prior.from_pretrained(folders["epsilon"], "cpu")
    with torch.inference_mode():
        cond = prior.encode_text([PROMPT])
    row = method_of(steps=1)
    asd.distill(prior, Latents(prior, 1, rng()), cond, row, phi=LoRAPhi(prior))
    asd.algorithm_1(prior, Latents(prior, 1, rng()), cond, LoRAPhi(prior), row, rng())


def test_distill_makes_phi_and_state_itself(prior, monkeypatch):
    """As the method's row and the seed say; a name is its row of the table."""
    cond, row = prior.encode_text([PROMPT]), method_of()
    monkeypatch.setitem(METHODS, "asd", row)
    ends = [asd.distill(prior, Latents(prior, 1, rng(7)), cond, method, seed=4)
            for method in ("asd", row)]
    state = State(Latents(prior, 1, rng(7)), LoRAPhi(prior, seed=4), row, rng(4))
    ends.append(asd.distill(prior, state.generator, cond, row, state=state))
    assert ends[0].step == 2 and isinstance(ends[0].phi, LoRAPhi)
    assert all(same(tensors(end), tensors(state)) for end in ends)


def test_distill_takes_phi_second_and_real():
    prior = ElementwisePrior()
    phi, second, real = ElementwisePhi(prior), second_of(prior), normal(1, 2, 3, 3)
    state = asd.distill(prior, particles_with_everything(prior, 2), prior.encode_text([""]),
                        method_of(steps=1), phi=phi, second=second, real=real)
    assert state.phi is phi and state.second is second and state.real is real


@pytest.mark.parametrize("cond", ["a fox", ["a fox"], torch.zeros(2, 3)], ids=str)
def test_cond_is_embeddings(cond):
    with pytest.raises(ValueError, match="prompt embeddings"):
        asd.distill(ElementwisePrior(), Particles(), cond, "sds")


@pytest.mark.parametrize("prompts, samples", [(2, 3), (3, 2), (2, 1)])
def test_prompts_fit_the_samples(prompts, samples):
    prior = ElementwisePrior()
    with pytest.raises(ValueError, match=f"{prompts} prompts for {samples} samples"):
        asd.distill(prior, Particles(samples), prior.encode_text(["a fox"] * prompts), "sds")


def test_x0_has_a_batch():
    class Single(Particles):
        def forward(self):
            return self.theta[0]
    with pytest.raises(ValueError, match=r"\[B, C, H, W\], not \[2, 3, 3\]"):
        run_elementwise(method_of("sds"), Single())


def test_an_unknown_method_lists_the_known_ones():
    prior = ElementwisePrior()
    with pytest.raises(ValueError, match="unknown method 'dsa': choose one of sds, vsd, asd"):
        asd.distill(prior, Particles(), prior.encode_text([""]), "dsa")


def test_state_of_another_generator():
    prior, method = ElementwisePrior(), method_of("sds")
    state = State(Particles(), NoisePhi(), method, rng())
    with pytest.raises(ValueError, match="another generator"):
        asd.distill(prior, Particles(), prior.encode_text([""]), method, state=state)


@pytest.mark.parametrize("changes", [{"phi": asd.LoRAPhi}, {"optimizer": "adamw"}])
def test_state_of_another_method(changes):
    """Its φ and its optimisers would go on; more steps, another λ or γ are taken."""
    prior, method, particles = ElementwisePrior(), method_of("sds", steps=2), Particles()
    y, state = prior.encode_text([""]), State(particles, NoisePhi(), method, rng())
    with pytest.raises(ValueError, match="another method"):
        asd.distill(prior, particles, y, replace(method, **changes), state=state)
    asd.distill(prior, particles, y, replace(method, lam=2.0), state=state)
    assert state.step == 2


@pytest.mark.parametrize("changes, with_real, words", [
    ({"lam_phi": 2.0}, False, "distill alone"), ({"fixed_noise": True}, False, "distill alone"),
    ({"t_order": "descending"}, False, "distill alone"), ({"shift": 1.0}, False, "distill alone"),
    ({}, True, "nothing to learn"), ("prompts", False, "distill alone"),
    ("regulariser", False, "distill alone"), ("rng", False, "torch.Generator")])
def test_algorithm_1_refuses_what_it_would_not_heed(changes, with_real, words):
    prior, real = ElementwisePrior(), torch.zeros(1, 2, 3, 3) if with_real else None
    particles, phi, method, random = Particles(), NoisePhi(), method_of("sds"), rng()
    if changes == "prompts":
        phi.prompts = lambda step, y, null: {}
    elif changes == "regulariser":
        particles.regulariser = lambda: 0
    elif changes == "rng":
        random = None
    else:
        method = method_of("sds", **changes)
    with pytest.raises(ValueError, match=words):
        asd.algorithm_1(prior, particles, prior.encode_text([""]), phi, method, random, real)


def test_a_falling_t_has_no_late_range():
    """t_max_late is for random t: a run of falling t may end above it."""
    row = method_of("sds", t_order="descending", t_min=0.6, t_max=0.9, t_max_late=0.5, t_late=0.5,
                    steps=4)
    run_elementwise(row, Particles())
    with pytest.raises(ValueError, match="above t_max_late"):
        replace(row, t_order="random")


# ----------------------------------------------------------------------------- what goes wrong
def test_nan_of_the_prior_ends_the_run():
    """θ stays as it was before the step."""
    class Breaking(ElementwisePrior):
        def eps(self, x_t, t, cond):
            answer = super().eps(x_t, t, cond)
            if len(self.batches) == 3:
                answer[0, 0, 0, 0] = math.nan
            return answer
    prior, generator, ends = Breaking(), Particles(), []
    with pytest.raises(FloatingPointError, match="generator's gradient .*step 2"):
        asd.distill(prior, generator, prior.encode_text([""]), method_of("sds", steps=5),
                    callback=lambda *_: ends.append(generator.theta.detach().clone()))
    assert len(ends) == 2 and torch.equal(generator.theta, ends[-1])


@pytest.mark.parametrize("spoil, words", [
    (lambda loss, fake_phi: loss / 0, "discriminator's loss .*step 0"),
    (lambda loss, fake_phi: loss + (0 * fake_phi.sum()).abs().sqrt(),
     "discriminator's gradient .*step 0")], ids=["loss", "gradient"])
def test_a_loss_of_phi_that_is_not_finite_ends_the_run(monkeypatch, spoil, words):
    """φ stays as it was."""
    loss, phi = asd.discriminator_loss_text, ElementwisePhi(ElementwisePrior(), 0.1)
    monkeypatch.setattr(asd, "discriminator_loss_text", lambda eps, fake_phi, *rest:
                        spoil(loss(eps, fake_phi, *rest), fake_phi))
    with pytest.raises(FloatingPointError, match=words):
        run_elementwise(method_of(), phi=phi)
    assert (phi.a == 0.1).all()


def test_infinite_derivative_of_the_generator_ends_the_run():
    """Its own, not the prior's."""
    class Root(Particles):
        def forward(self):
            return (0 * self.theta).abs().sqrt()
    generator = Root()
    with pytest.raises(FloatingPointError, match="step 0"):
        run_elementwise(method_of("sds"), generator)
    assert torch.equal(generator.theta, Particles().theta)


# ------------------------------------------------------------------------- generators that look
@pytest.mark.parametrize("name", ["sds", "asd"])
def test_prompt_of_the_generator_replaces_the_loops(name):
    prior, ends = ElementwisePrior(), []
    fox = prior.encode_text(["a blue fox"])
    for text, generator in (("", Particles(2, cond=fox.repeat(2, 1, 1))),
                            ("a blue fox", Particles(2))):
        phi = NoisePhi() if name == "sds" else ElementwisePhi(prior)
        state = State(generator, phi, method_of(name), rng())
        asd.distill(prior, generator, prior.encode_text([text]), method_of(name), state=state)
        ends.append(generator.theta.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("share_noise", [False, True])
def test_one_view_in_ten_is_learnt_without_its_camera(share_noise):
    """Also by the φ of a second discriminator, which misses others."""
    prior = ElementwisePrior()
    generator, second = particles_with_everything(prior, 200), second_of(prior)
    method = method_of(steps=1, share_noise=share_noise)
    state, _ = run_elementwise(method, generator, second=second, prior=prior)
    missed, camera = [], generator.fields["camera"]
    for phi in (state.phi, second.phi):
        for_theta, for_phi = phi.heard
        assert torch.equal(for_theta.camera, camera)
        dropped = (for_phi.camera == 0).all(1)
        assert 8 <= dropped.sum() <= 36
        assert torch.equal(for_phi.camera[~dropped], camera[~dropped])
        missed.append(dropped)
    assert not torch.equal(*missed)


# ----------------------------------------------------------------------------------- going on
@pytest.mark.parametrize("name, changes, generator", [
    ("sds", {}, Latents), ("asd", {}, Pixels), ("vsd", {"share_noise": True}, Latents),
    ("asd", {"phi": "embedding", "phi_steps": 2}, Latents)])
def test_n_plus_m_steps_are_n_then_m(prior, name, changes, generator):
    """Both optimisers and the randomness go on too: bit for bit."""
    changes = changes | {"t_late": 1.0}           # what depends on the number of steps, left out
    whole, part = method_of(name, steps=3, **changes), method_of(name, steps=1, **changes)
    state, logs = go(prior, whole, generator=generator(prior, 1, rng()))
    first, _ = go(prior, part, generator=generator(prior, 1, rng()))
    kept = copy.deepcopy(tensors(first))
    second = make_state(prior, whole, seed=99, generator=generator(prior, 1, rng(98)))
    load_tensors(second, kept, 1)
    _, again = go(prior, whole, second)
    assert second.step == 3 and same(tensors(second), tensors(state))
    assert [log["grad_norm"] for log in again] == [log["grad_norm"] for log in logs[1:]]


def test_a_state_that_was_copied_lives_on_alone():
    """load_tensors takes values, not the other state's memory."""
    prior, method = ElementwisePrior(), method_of(steps=3)
    first, _ = run_elementwise(method_of())
    second = State(Particles(), ElementwisePhi(prior), method, rng(9))
    load_tensors(second, tensors(first), first.step)
    before = copy.deepcopy(tensors(second))
    asd.distill(prior, first.generator, prior.encode_text([""]), method, state=first)
    assert first.step == 3 and same(tensors(second), before)


def test_state_with_an_unused_parameter_goes_on():
    """A scene's background may have had no gradient yet."""
    first, _ = run_elementwise(method_of("sds"), TwoRates())
    second = State(TwoRates(), NoisePhi(), method_of("sds"), rng(1))
    load_tensors(second, copy.deepcopy(tensors(first)), first.step)
    assert same(tensors(first), tensors(second))


def test_tensors_of_another_run_are_refused():
    one, two = (State(Particles(n), NoisePhi(), method_of("sds"), rng()) for n in (1, 2))
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
        state, (metrics,) = go(load(device=device), method_of(name, steps=1), particles=2)
        ends.append((state.generator.theta.grad.cpu(), torch.tensor(metrics["loss_D"])))
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


@needs_tiny_sd
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
