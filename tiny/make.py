"""make.py — makes tiny/sd, a small text-to-image diffusion model, and tiny/clip, its judge.

    python tiny/make.py data                          # pictures and captions -> data/  (needs npm)
    python tiny/make.py train unet                    # goes on until it is stopped, …
    python tiny/make.py train unet --minutes 0 --decay 30         # … and so it ends: -> tiny/sd
    python tiny/make.py evaluate                      # the numbers of the model cards
    python tiny/make.py sample "a flat icon of a fox" # a picture; without a prompt: a contact sheet

Only people who retrain need this file; everybody else loads the finished folders:
`StableDiffusionPipeline.from_pretrained("tiny/sd")` is an ordinary Stable Diffusion in miniature
(64 x 64 pictures, 4 x 16 x 16 latents, 1000 steps, scaled-linear betas, predicts the noise).

There are four parts to train: vae, its decoder alone, unet (with the text encoder), clip. Each
starts from the weights in its folder, where there are any, on the pictures of data.py, and can be
killed at any time (training.py).
"""
import argparse
import copy
import functools
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for python tiny/make.py

from tiny import data, solids
from tiny.data import STYLES, articled, jitter, load_data
from tiny.judge import CONTEXT, clip_pixels, image_features, load_clip, text_features, tokenize
from tiny.training import Trainer

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------- networks
def make_tokenizer(captions, folder):
    """CLIP's byte-level BPE trained on the captions, so that each of their words is one token.

    Writes vocab.json and merges.txt in CLIP's format and returns the CLIPTokenizer.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=30000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=letters,
        show_progress=False))
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" "))
              for m in json.loads(bpe.to_str())["model"]["merges"]]
    # any text can be spelled out: all bytes, alone and at a word's end, come before the merges
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)},
                                                  ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2"] + [" ".join(m) for m in merges]))
    (folder / "tokenizer.json").unlink(missing_ok=True)      # it would be read before the two
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_config(tokenizer):
    """Settings shared by the two text encoders: 3 layers of width 128."""
    return {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512,
            "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
            "projection_dim": 128, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def make_vae():
    """64 x 64 x 3 -> 16 x 16 x 4."""
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96), layers_per_block=1, latent_channels=4, norm_num_groups=16,
        sample_size=64, scaling_factor=1.0, mid_block_add_attention=False)


def make_unet():
    """10.9 M parameters; cross-attention at 8 x 8 and 4 x 4; heads of 32 channels."""
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 192),
        layers_per_block=1, cross_attention_dim=128, attention_head_dim=(2, 4, 6),   # = heads
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


def data_tokenizer(rows):
    """The captions' tokenizer, made once: ties between merges are not broken alike every time."""
    from transformers import CLIPTokenizer
    if (data.DATA / "tokenizer" / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(data.DATA / "tokenizer", model_max_length=CONTEXT)
    return make_tokenizer([c for row in rows for c in row["captions"]], data.DATA / "tokenizer")


def make_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel
    return CLIPTextModel(CLIPTextConfig(**text_config(tokenizer)))


def make_clip(tokenizer):
    """A judge of under 3 M parameters: ViT of 6 layers on 16 x 16 patches, text of 3 layers."""
    from transformers import CLIPConfig, CLIPModel
    vision = {"image_size": 64, "patch_size": 16, "hidden_size": 160, "intermediate_size": 640,
              "num_hidden_layers": 6, "num_attention_heads": 5, "projection_dim": 128}
    return CLIPModel(CLIPConfig(text_config=text_config(tokenizer), vision_config=vision,
                                projection_dim=128))


def make_scheduler():
    """Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler
    return DDIMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                         beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                         steps_offset=1, prediction_type="epsilon")


# ------------------------------------------------------------------------------------- training
def load_pipeline(folder, device, new=None):
    """The StableDiffusionPipeline in `folder`, in float32; where there is none, new()."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    if not (Path(folder) / "model_index.json").exists():
        if new is None:
            raise FileNotFoundError(f"{folder} holds no pipeline: `python tiny/make.py train` "
                                    "makes it")
        return new().to(device)
    logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True,
                                                   use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def new_pipeline(rows):
    """Untrained, of make_…() above."""
    from diffusers import StableDiffusionPipeline
    tokenizer = data_tokenizer(rows)
    return StableDiffusionPipeline(
        vae=make_vae(), text_encoder=make_text_encoder(tokenizer), tokenizer=tokenizer,
        unet=make_unet(), scheduler=make_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def trainer(args, module, lr, ema_decay=0.999):
    """A Trainer of args.part; draws begin anew where it begins."""
    module.train().requires_grad_(True)
    made = Trainer(data.DATA / f"{args.part}.checkpoint.safetensors", module, lr, args.minutes,
                   args.decay, ema_decay, args.device)
    torch.manual_seed(args.seed + made.step)
    return made


def train_vae(args, pipe, pictures, rows):
    """L1 + L1 of finite differences (edges) + a whisper of KL.

    "decoder": the decoder alone, with PSNR itself in the loss; the latents stay what they are.
    """
    vae, whole = pipe.vae.requires_grad_(False), args.part == "vae"
    pictures = pictures[[not row["held_out"] for row in rows]].to(args.device)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    training = trainer(args, vae if whole else decoder, 2e-3 if whole else 1e-3, ema_decay=0.99)

    def loss_function():
        x = sharp_and_jittered(pictures)
        posterior = vae.encode(2 * x - 1).latent_dist
        recon = vae.decode(posterior.sample() if whole else posterior.mean).sample / 2 + 0.5
        l1 = (recon - x).abs().mean()
        edges = sum((recon.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        psnr = -10 * (recon - x).square().mean((1, 2, 3)).log10().mean()
        loss = l1 + 0.5 * edges + (1e-5 * posterior.kl().mean() / 64 if whole else -0.005 * psnr)
        return loss, {"l1": l1.detach(), "edges": edges.detach(), "psnr": psnr.detach()}
    training.run(loss_function)
    if whole:
        normalize_latents(vae, pictures)


def sharp_and_jittered(pictures, batch=8):
    """A random batch in [0, 1]; jitter() interpolates, which blurs: half of it stays as it is."""
    x = pictures[torch.randint(len(pictures), (batch,))].float() / 255
    x[batch // 2:] = jitter(x[batch // 2:])
    return x


@torch.no_grad()
def normalize_latents(vae, pictures):
    """Give every latent channel mean 0 and variance 1, exactly, inside the two 1 x 1 convolutions.

    z' = (z − m)/s is folded into quant_conv and z = s z' + m into post_quant_conv: the decoder sees
    what it saw before, scaling_factor is 1, and unit-variance noise fits every channel.
    """
    z = torch.cat([vae.encode(2 * p.float() / 255 - 1).latent_dist.mean
                   for p in pictures[:2000].split(100)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    into.bias[:4] -= mean
    into.bias[:4] /= std
    into.weight[:4] /= std[:, None, None, None]
    into.bias[4:] -= 2 * std.log()            # the second half of the channels is log σ²


@torch.no_grad()
def cached_latents(vae, pictures, flip, variants=4):
    """[variants, N, 4, 16, 16]: as they are, then flipped (with probability flip [N]), shifted,
    scaled a little."""
    versions = []
    for variant in range(variants):
        latents = []
        parts = list(zip(pictures.split(100), flip.split(100), strict=True))
        for p, chance in tqdm(parts, desc=f"latents {variant + 1}/{variants}"):
            x = p.to(vae.device).float() / 255
            x = x if variant == 0 else jitter(x, flip=chance.to(vae.device))
            latents.append(vae.encode(2 * x - 1).latent_dist.mean)
        versions.append(torch.cat(latents))
    return torch.stack(versions)


def balanced(rows):
    """-> which rows are solids [N], and their chances to be drawn: four pictures in ten are."""
    solid = torch.tensor([row["style"] == "solid" for row in rows])
    return solid, 0.4 * solid / solid.sum() + 0.6 * ~solid / (~solid).sum()


def weak_spots_first(rows, weight):
    """The chances again, with what the last training's card calls weakest drawn more often:
    drawings 1.5 times, solids from above twice."""
    drawing = torch.tensor([row["style"] == "a drawing of" for row in rows])
    overhead = torch.tensor(["overhead" in row["captions"][0] for row in rows])
    weight = weight * (1 + 0.5 * drawing) * (1 + 1.0 * overhead)
    return weight / weight.sum()


def train_unet(args, pipe, pictures, rows):
    """UNet and text encoder together on cached latents; 10 % of the captions are null."""
    from diffusers.models.attention_processor import AttnProcessor
    unet, text_encoder, scheduler = pipe.unet, pipe.text_encoder, pipe.scheduler
    unet.set_attn_processor(AttnProcessor())        # written out: the fused one is slow in bf16
    training = trainer(args, torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}),
                       6e-4)
    solid, weight = balanced(rows)
    weight = weak_spots_first(rows, weight)
    latents = cached_latents(pipe.vae, pictures, 0.5 * ~solid)
    long_ids = tokenize(pipe.tokenizer, [row["captions"][0] for row in rows])
    short_ids = tokenize(pipe.tokenizer, [row["captions"][1] for row in rows])
    ids = torch.stack([long_ids, short_ids]).to(args.device)
    null = tokenize(pipe.tokenizer, [""]).to(args.device)
    alpha_bar = scheduler.alphas_cumprod.to(args.device)

    def loss_function():
        row = torch.multinomial(weight, 64, replacement=True)
        # 80 % of the solids' captions name the view, 70 % of the emoji's the style
        short = (torch.rand(len(row)) < torch.where(solid[row], 0.2, 0.3)).long()
        row, short = row.to(args.device), short.to(args.device)
        # 60 % of the pictures as they are, the others jittered
        variant = torch.randint(1, len(latents), row.shape, device=row.device)
        variant = torch.where(torch.rand(row.shape, device=row.device) < 0.6, 0, variant)
        x0 = latents[variant, row]
        dropped = torch.rand(len(row), 1, device=row.device) < 0.1
        tokens = torch.where(dropped, null, ids[short, row])
        t = torch.randint(1000, row.shape, device=row.device)
        eps = torch.randn_like(x0)
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        x_t = scheduler.add_noise(x0, eps, t)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            predicted = unet(x_t, t, text_encoder(tokens).last_hidden_state).sample
        error = (predicted.float() - eps).square().mean((1, 2, 3))
        # the error of x0 is error / snr; its weight is the SNR within [1, 5]: not more than 5
        # (min-SNR), and not less than 1 (truncated SNR), or layouts follow the noise, not the words
        loss = (error * snr.clamp(1, 5) / snr).mean()
        return loss, {"loss": loss.detach(), "mse": error.mean().detach()}
    training.run(loss_function)


def train_clip(args, clip, tokenizer, pictures, rows):
    """Contrastive: every caption that is true of a picture counts as its positive, a spoilt picture
    is nobody's, and solids that have a front are told from the same solid's other views."""
    clip.set_attn_implementation("eager")
    training = trainer(args, clip, 1e-3)
    pictures = pictures.to(args.device)
    captions = [[*row["captions"], *other_views(row)] for row in rows]
    texts = sorted({caption for some in captions for caption in some})
    number = {text: i for i, text in enumerate(texts)}
    numbers = []
    for some in captions:
        numbers.append([number[caption] for caption in some] + (6 - len(some)) * [-1])
    true_of, views = torch.tensor(numbers).split([2, 4], 1)          # of views, where it has any
    ids = tokenize(tokenizer, texts).to(args.device)
    _, weight = balanced(rows)

    def loss_function():
        row = torch.multinomial(weight, 128, replacement=True)
        text = true_of[row, (torch.rand(len(row)) < 0.4).long()]
        positive = (true_of[row][:, :, None] == text).any(1).float().to(args.device)
        image = jitter(pictures[row].float() / 255, shift=0.08, scale=0.15)
        viewed = views[row, 0] >= 0
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            out = clip(input_ids=ids[torch.cat([text, views[row[viewed]].flatten()])],
                       pixel_values=clip_pixels(torch.cat([soil(image), spoil(image)])))
        words, others = out.text_embeds.float().split([len(row), 4 * viewed.sum()])
        seen, scale = out.image_embeds.float(), clip.logit_scale.exp()
        logits = scale * seen @ words.T                                    # [256, 128]
        of_image = logits[:len(row)].log_softmax(1)
        loss = -(positive / positive.sum(1, True) * of_image).sum(1).mean() / 2
        of_text = logits.log_softmax(0)[:len(row)]
        loss = loss - (positive / positive.sum(0) * of_text).sum(0).mean() / 2
        hit = positive.gather(1, of_image.argmax(1, True)).mean()
        # which of its four views is it?
        others = others.unflatten(0, (-1, 4))
        among = scale * torch.einsum("bd,bvd->bv", seen[:len(row)][viewed], others)
        right = (views[row] == true_of[row, :1])[viewed].float().to(args.device)
        view_loss = -(right * among.log_softmax(1)).sum(1).mean() if len(right) else 0 * loss
        return loss + 0.3 * view_loss, {"loss": loss.detach(), "hit": hit,
                                        "view_loss": view_loss.detach()}
    training.run(loss_function)


def other_views(row):
    """The four captions with a view of a solid whose views differ; [] for all other pictures."""
    kind = row["concept"].partition(" ")[2]
    if row["style"] != "solid" or not solids.KINDS[kind].has_front:
        return []
    return [f"{row['captions'][1]}, {view} view" for view in solids.VIEWS]


def some(chance, images):
    """1 with this probability for a picture, else 0: [B, 1, 1, 1]."""
    return (torch.rand(len(images), 1, 1, 1, device=images.device) < chance).float()


def soil(images):
    """Blur, noise, fade and tint some of the pictures a little: a judge must not mind that."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images + 0.5 * some(0.3, images) * (blurred - images)
    images = images + some(0.4, images) * 0.03 * torch.randn_like(images)
    tint = torch.randn(len(images), 3, 1, 1, device=images.device)
    images = images + some(0.4, images) * 0.03 * tint
    return images + some(0.3, images) * (images.mean((2, 3), keepdim=True) - images) * 0.15


def spoil(images):
    """What distillation does where it fails, to each picture at least one: a smear, speckles,
    colours too strong, blotches, a veil of the mean."""
    which = torch.randint(5, (len(images), 1, 1, 1), device=images.device)

    def also(kind):
        return ((which == kind) | (torch.rand(which.shape, device=which.device) < 0.2)).float()
    strength = 0.5 + torch.rand(which.shape, device=images.device)                  # 0.5 … 1.5
    small = F.interpolate(images, scale_factor=1 / 8, mode="area")
    smeared = F.interpolate(small, size=images.shape[-2:], mode="bicubic")
    images = images + also(0) * (0.5 * strength + 0.1).clamp(max=0.8) * (smeared - images)
    images = images + also(1) * 0.15 * strength * torch.randn_like(images)
    grey = images.mean(1, keepdim=True)
    images = (images + also(2) * strength * (images - grey)).clamp(0, 1)
    blotches = F.interpolate(torch.randn_like(small), size=images.shape[-2:], mode="bicubic")
    images = images + also(3) * 0.2 * strength * blotches
    mean = images.mean((2, 3), keepdim=True)
    return (images + also(4) * (0.4 * strength) * (mean - images)).clamp(0, 1)


def export(folder, pipe):
    """Write a pipeline in half precision, in shards of at most 15 MB; other files there stay."""
    write_folder(Path(folder), lambda to: copy.deepcopy(pipe).to("cpu", torch.float16)
                 .save_pretrained(to, max_shard_size="14MB"))
    if (data.DATA / "tokenizer").is_dir():         # in CLIP's own format, beside tokenizer.json
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(data.DATA / "tokenizer" / name, Path(folder) / "tokenizer" / name)
    for config in (*Path(folder).glob("*/config.json"), Path(folder) / "model_index.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)                        # a place on this machine
        if "dtype" in values:      # in which transformers loads; diffusers in float32 where unasked
            values["dtype"] = "float32"
        config.write_text(json.dumps(values, indent=2) + "\n")


def write_folder(folder, write):
    """write(temporary folder), then move its files into `folder`; other files there stay."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    for path in temporary.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(temporary)


def train(args):
    """One part, from where its checkpoint or its folder has left it; written after the decay."""
    pictures, rows = load_data()
    if args.part == "clip":
        try:
            clip, tokenizer = load_clip(args.clip, args.device)
        except FileNotFoundError:
            tokenizer = data_tokenizer(rows)
            clip = make_clip(tokenizer)
        train_clip(args, clip, tokenizer, pictures, rows)
    else:
        pipe = load_pipeline(args.out, args.device, functools.partial(new_pipeline, rows))
        (train_unet if args.part == "unet" else train_vae)(args, pipe, pictures, rows)
    if not args.decay:
        print(f"not written: its rate has not fallen yet (train {args.part} --decay MINUTES)")
    elif args.part == "clip":
        clip = clip.to("cpu", torch.float16)
        write_folder(Path(args.clip), lambda folder: (clip.save_pretrained(folder),
                                                      tokenizer.save_pretrained(folder)))
    else:
        export(args.out, pipe)


# ----------------------------------------------------------------------------- samples and numbers
@torch.no_grad()
def sample_images(pipe, captions, seed=0, steps=50, guidance=3.0, batch=50):
    """Text-to-image: captions -> RGB [B, 3, 64, 64] in [0, 1]."""
    images = []
    for first in tqdm(range(0, len(captions), batch), desc="sampling"):
        noise = torch.Generator().manual_seed(seed + first)
        out = pipe(captions[first:first + batch], num_inference_steps=steps, output_type="pt",
                   guidance_scale=guidance, generator=noise)
        images.append(out.images.float().cpu())
    return torch.cat(images)


def evaluate(args):
    """The numbers of the model cards: VAE PSNR, ε's error, and what tiny-clip sees in samples."""
    pictures, rows = load_data()
    rows = [row for row in rows if not row["more"]]
    pictures = pictures[:len(rows)]
    pipe = load_pipeline(args.out, args.device)
    clip, tokenizer = load_clip(args.clip, args.device)
    numbers = {"vae_psnr_db": held_out_psnr(pipe.vae, pictures, rows)}
    chosen = random.Random(1).sample(range(len(rows)), 200)
    captions = [rows[i]["captions"][0] for i in chosen]
    numbers["eps_error"] = eps_errors(pipe, pictures[chosen], captions)
    sampled = sample_images(pipe, captions, args.seed)
    for name, images in (("sampled", sampled), ("real", pictures[chosen].float() / 255)):
        of = [rows[i] for i in chosen]
        numbers[name] = concept_accuracy(clip, tokenizer, images, of, rows)
        for style in (*STYLES, "solid"):
            some = [i for i, row in enumerate(of) if row["style"] == style]
            numbers[name][style] = concept_accuracy(
                clip, tokenizer, images[some], [of[i] for i in some], rows)["top1"]
    numbers["views"] = views_named(pipe, clip, tokenizer, pictures, rows, args.seed)
    numbers["unet_ms"] = unet_milliseconds(pipe.unet)
    print(json.dumps(numbers, indent=1))


@torch.no_grad()
def eps_errors(pipe, pictures, captions):
    """{t: mean squared error of ε} over the pictures, each with noise of its own, fixed."""
    errors, scheduler = {}, pipe.scheduler
    x0 = torch.cat([pipe.vae.encode(2 * p.float().to(pipe.device) / 255 - 1).latent_dist.mean
                    for p in pictures.split(50)])
    words = pipe.text_encoder(tokenize(pipe.tokenizer, captions).to(pipe.device))[0]
    for t in (50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 980):
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t)).to(x0)
        times = torch.full((len(x0),), t, device=x0.device)
        parts = zip(*(v.split(50) for v in (scheduler.add_noise(x0, eps, times), times, words)))
        predicted = torch.cat([pipe.unet(*part).sample for part in parts])
        errors[t] = round((predicted - eps).square().mean().item(), 5)
    return errors


def views_named(pipe, clip, tokenizer, pictures, rows, seed):
    """How often tiny-clip names the view that was asked for, of the solids that have a front."""
    of = [row for row in rows if other_views(row)]
    chosen = random.Random(2).sample(of, 100)
    real = torch.stack([pictures[rows.index(row)] for row in chosen]).float() / 255
    sampled = sample_images(pipe, [row["captions"][0] for row in chosen], seed)
    right = {}
    for name, images in (("sampled", sampled), ("real", real)):
        hits = {view: [] for view in solids.VIEWS}
        for image, row in zip(image_features(clip, images), chosen, strict=True):
            scores = text_features(clip, tokenizer, other_views(row)) @ image
            found = other_views(row)[scores.argmax()]
            hits[row["captions"][0].split()[-2]].append(found == row["captions"][0])
        right[name] = {view: round(sum(of) / len(of), 2) for view, of in hits.items()} \
            | {"all": sum(map(sum, hits.values())) / len(chosen)}
    return right


@torch.no_grad()
def held_out_psnr(vae, pictures, rows):
    """Mean over the held-out pictures of −10 log10 MSE, RGB in [0, 1]."""
    x = pictures[[i for i, row in enumerate(rows) if row["held_out"]]].to(vae.device).float() / 255
    back = vae.decode(vae.encode(2 * x - 1).latent_dist.mean).sample / 2 + 0.5
    return (-10 * (back.clamp(0, 1) - x).square().mean((1, 2, 3)).log10()).mean().item()


def concept_accuracy(clip, tokenizer, images, of, rows):
    """Top-1 and top-5: is the caption's concept the likeliest of all, in the caption's own words?

    A picture of "a flat icon of a fox" is held against "a flat icon of …" every emoji concept and
    every coloured solid; a solid's view is given.
    """
    emoji = sorted({row["captions"][1] for row in rows if row["style"] != "solid"})
    solid = sorted({row["captions"][1] for row in rows if row["style"] == "solid"})
    top1 = top5 = score = 0.0
    features = functools.cache(lambda *texts: text_features(clip, tokenizer, list(texts)))
    for image, row in zip(image_features(clip, images), of, strict=True):
        if row["style"] == "solid":
            view = row["captions"][0].removeprefix(row["captions"][1])
            texts = emoji + [text + view for text in solid]
        else:
            texts = [f"{row['style']} {text}" for text in emoji] + solid
        scores = features(*texts) @ image
        right = texts.index(row["captions"][0])
        rank = (scores > scores[right]).sum().item()
        top1, top5, score = top1 + (rank < 1), top5 + (rank < 5), score + scores[right].item()
    return {"top1": top1 / len(of), "top5": top5 / len(of), "clip_score": score / len(of)}


@torch.no_grad()
def unet_milliseconds(unet, rounds=20):
    """Median time of one evaluation at batch 1."""
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, CONTEXT, 128)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        unet(x.to(unet.device), 500, text.to(unet.device))
        times.append(1000 * (time.perf_counter() - began))
    return sorted(times)[rounds // 2]


def sheet_captions():
    """60 captions: 12 concepts in three styles, then 6 solids from four sides."""
    nouns = ["fox", "red apple", "hamburger", "rocket", "mushroom", "cat", "dog", "sailboat",
             "guitar", "sunflower", "penguin", "pineapple"]
    captions = [f"{style} {articled(noun)}" for style in STYLES for noun in nouns]
    names = ["red mug", "blue car", "yellow duck", "green house", "purple teapot", "pink chair"]
    return captions + [f"{articled(name)}, {view} view" for view in solids.VIEWS for name in names]


def sample(args):
    """Pictures of the given prompts, or the contact sheet of the model card."""
    from PIL import Image
    captions = args.prompt or sheet_captions()
    images = sample_images(load_pipeline(args.out, args.device), captions, args.seed, args.steps,
                           args.guidance)
    columns = 12 if not args.prompt else min(len(captions), 8)
    blank = torch.ones(-len(images) % columns, *images.shape[1:])
    grid = torch.cat([images, blank]).unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    grid = (grid.flatten(2, 3).flatten(0, 1) * 255).round().byte()
    picture = Image.fromarray(grid.numpy())
    picture.resize((picture.width * args.enlarge, picture.height * args.enlarge),
                   Image.BICUBIC).save(args.png)
    print(args.png)


# ----------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    """Errors on one line."""

    def error(self, message):
        self.exit(2, f"make.py: {message}\n")


def parse(argv):
    parser = Parser(prog="make.py", description="Make tiny/sd and its judge, tiny/clip.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("data", help="download and draw the pictures")
    p = commands.add_parser("train", help="train a part")
    p.add_argument("part", choices=["vae", "decoder", "unet", "clip"])
    p.add_argument("--minutes", type=float, help="before the decay (default: no end)")
    p.add_argument("--decay", type=float, default=0.0, metavar="MINUTES",
                   help="then its rate falls to zero and the weights are written (default: never)")
    p.add_argument("--bf16", action="store_true",
                   help="unet, clip: in bfloat16: half the time where the CPU has it (avx512_bf16, "
                        "amx), up to 20 times as much where it has not")
    p = commands.add_parser("evaluate", help="print the numbers of the model cards")
    p = commands.add_parser("sample", help="text-to-image; without prompts the contact sheet")
    p.add_argument("prompt", nargs="*")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--png", default="samples.png")
    p.add_argument("--enlarge", type=int, default=2)
    for p in commands.choices.values():
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--out", default=str(HERE / "sd"))
        p.add_argument("--clip", default=str(HERE / "clip"))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        commands = {"data": data.make_data, "train": train, "evaluate": evaluate, "sample": sample}
        commands[args.command](args)
    except (OSError, FloatingPointError) as mistake:
        print(f"make.py: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmake.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
