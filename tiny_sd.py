"""tiny_sd.py — makes tiny-sd/, a small text-to-image diffusion model, and tiny-clip/, its judge.

    python tiny_sd.py data                          # pictures and captions  -> data/   (needs npm)
    python tiny_sd.py train --minutes 120           # VAE, then UNet + text encoder -> tiny-sd/
    python tiny_sd.py train --only clip --minutes 8 # the judge              -> tiny-clip/
    python tiny_sd.py evaluate                      # the numbers of the model cards
    python tiny_sd.py sample "a flat icon of a fox" # a picture; without a prompt: the contact sheet

Only people who retrain need this file; everybody else loads the finished folders:
`StableDiffusionPipeline.from_pretrained("tiny-sd")` is an ordinary Stable Diffusion in miniature
(64 x 64 pictures, 4 x 16 x 16 latents, 1000 steps, scaled-linear betas, predicts the noise).

Pictures: emoji in three styles (a 3d render, a flat icon, a drawing; package names, versions and
licences in PACKAGES) and the solids of solids.py from all sides. Training is resumable: killed at
any time, the same command goes on where its last checkpoint was.
"""
import argparse
import copy
import functools
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from prior import HERE, UserError

DATA = HERE / "data"


# ---------------------------------------------------------------------------------------- data
# style word -> (package on the npm registry, version, licence); names come from NAMES
PACKAGES = {
    "a 3d render of": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    "a flat icon of": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "a drawing of": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
}
NAMES = ("emojibase-data", "17.0.0", "MIT")
STYLES = list(PACKAGES)
# What is drawn by default: these subgroups of emojibase, and these single concepts. `data --all`
# takes every concept of GROUPS instead, three times as many, which needs a GPU's worth of training.
SUBGROUPS = """animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug
 plant-flower plant-other food-fruit food-vegetable food-prepared food-sweet drink""".split()
CONCEPTS = """grinning-face winking-face crying-face angry-face skull pile-of-poo ghost alien robot
 red-heart orange-heart yellow-heart green-heart blue-heart purple-heart pink-heart broken-heart
 rocket car bus bicycle sailboat train tractor helicopter fire-engine police-car taxi ambulance
 flying-saucer anchor house castle tent volcano rainbow fire star crescent-moon snowman umbrella
 balloon wrapped-gift jack-o-lantern christmas-tree soccer-ball basketball tennis-ball trophy
 teddy-bear game-die puzzle-piece crystal-ball kite guitar trumpet violin drum saxophone accordion
 crown top-hat t-shirt dress jeans necktie glasses handbag backpack high-heeled-shoe running-shoe
 ring gem-stone red-book pencil key hammer axe light-bulb candle camera television laptop
 mobile-phone magnifying-glass microscope telescope chair door bed bathtub toilet bomb magnet bell
 alarm-clock hourglass watch scissors envelope money-bag coin""".split()
LESS_KNOWN = """water-buffalo two-hump-camel mammoth sauropod microbe wing cockroach
 mosquito fly worm
 cricket beetle bug oyster rosette wilted-flower sheaf-of-rice herb shamrock ewe
 ginger-root pea-pod leaf-fluttering-in-wind empty-nest black-bird front-facing-baby-chick
 flatbread stuffed-flatbread
 tamale falafel bowl-with-spoon shallow-pan-of-food pot-of-food fondue canned-food butter salt sake
 custard shaved-ice teacup-without-handle beverage-box cup-with-straw bottle-with-popping-cork
 clinking-beer-mugs ice paw-prints pig-nose spiral-shell coral dodo badger""".split()
# With --all, emojibase's groups: smileys, animals and nature, food, travel, activities, objects …
GROUPS = {0, 3, 4, 5, 6, 7}
# … but for these subgroups: duplicates of one face, clock faces, pages that differ by a line
LEFT_OUT = """face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy
 face-unwell face-concerned face-negative cat-face emotion place-map time sound mail office
 """.split()
KEEP_ANYWAY = """grinning-face winking-face smiling-face-with-halo crying-face angry-face skull
 watch alarm-clock
 hourglass-done bell megaphone love-letter package envelope scissors pushpin briefcase
 paperclip compass""".split()
# Always left out: they look like another concept here, or like nothing a caption can name.
DROP = """heart-decoration heart-exclamation growing-heart revolving-hearts beating-heart grey-heart
 white-heart light-blue-heart guide-dog service-dog kaaba mate wedding love-hotel post-office foggy
 japanese-post-office derelict-house building-construction national-park night-with-stars metro
 light-rail station tram-car mountain-railway railway-car oncoming-bus oncoming-police-car
 oncoming-taxi oncoming-automobile motorway construction suspension-railway mountain-cableway
 airplane-departure airplane-arrival waxing-crescent-moon waning-crescent-moon waxing-gibbous-moon
 waning-gibbous-moon last-quarter-moon last-quarter-moon-face fog cloud-with-lightning-and-rain
 sun-behind-large-cloud sun-behind-small-cloud moon-viewing-ceremony tanabata-tree pine-decoration
 softball rugby-football 2nd-place-medal 3rd-place-medal field-hockey spade-suit club-suit
 mahjong-red-dragon flower-playing-cards joker performing-arts musical-score mobile-phone-with-arrow
 fax-machine pager low-battery camera-with-flash magnifying-glass-tilted-left green-book blue-book
 orange-book ledger page-with-curl bookmark-tabs yen-banknote euro-banknote pound-banknote
 chart-increasing-with-yen locked-with-pen locked-with-key unlocked nazar-amulet hamsa placard
 identification-card snowman-without-snow umbrella-on-ground hindu-temple pouring-liquid
 """.split()
RENAME = {"hourglass done": "hourglass", "automobile": "car", "hot beverage": "cup of coffee",
          "steaming bowl": "bowl of noodles", "cooking": "fried egg", "poultry leg": "chicken leg",
          "cut of meat": "steak", "high voltage": "lightning bolt", "tennis": "tennis ball",
          "locked": "padlock", "magnifying glass tilted right": "magnifying glass",
          "horizontal traffic light": "sideways traffic light", "vertical traffic light":
          "traffic light", "headphone": "headphones", "soft ice cream": "soft serve",
          "1st place medal": "gold medal", "long drum": "tall drum", "meat on bone": "meat bone",
          "doughnut": "donut", "closed book": "red book", "dollar banknote": "banknote",
          "sport utility vehicle": "blue van", "tumbler glass": "glass of whiskey",
          "badminton": "shuttlecock", "baseball": "baseball ball"}
# words that take no article although they do not end in s, and words in s that do take one
MASS = set("""bread bacon broccoli garlic salt butter spaghetti popcorn sushi coral ice fire soap
 yarn wood money milk dna food ginger corn chocolate
 badminton bowling baseball curling lacrosse softball
 basketball volleyball camping cricket fog foggy ping-pong tennis sunrise sunset""".split())
SINGULAR_S = set("""octopus cactus compass bus trolleybus minibus glass dress abacus walrus lotus
 hibiscus mattress hippopotamus rhinoceros rex cyclops moss cross""".split())


def articled(noun):
    """`noun` with its article: "a fox", "an apple", "grapes" (plural and mass nouns have none)."""
    last, first = noun.split()[-1], noun.split()[0]
    of_first = noun.split(" of ")[0].split()[-1]      # "sheaf of rice" counts as a sheaf
    plural = of_first.endswith("s") and of_first not in SINGULAR_S and not of_first.endswith("ss")
    if plural or noun.replace(" ", "-") in MASS or (last in MASS and " of " not in noun):
        return noun
    # vowel letters that sound like consonants, and one consonant that is silent
    vowel = first[0] in "aeiou" and not first.startswith(("uni", "eu", "ew", "one", "ukulele"))
    return f"an {noun}" if vowel or first.startswith(("hour", "x-")) else f"a {noun}"


def npm_pack(folder, package, version):
    """Download and unpack one npm package; returns the folder with its files."""
    target = folder / package.replace("/", "-").strip("@")
    if not (target / "package.json").exists():
        if shutil.which("npm") is None:
            raise UserError("npm was not found: it is needed to download the emoji packages "
                              "(install Node.js), or use the finished tiny-sd/ folder")
        done = subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder,
                              capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"npm pack {package}@{version} failed: {done.stderr.strip()[-200:]}")
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
        os.replace(folder / "package", target)
    return target


def fit_white(picture, size=64, fill=0.92):
    """PIL RGBA -> [3, size, size] uint8 on white: cropped to its contents, centred, `fill` wide."""
    import numpy as np
    from PIL import Image
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = fill * size / max(picture.size)
    inner = [max(1, round(side * scale)) for side in picture.size]
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    corner = [(size - side) // 2 for side in inner]
    canvas.paste(picture.resize(inner, Image.LANCZOS), corner)
    white = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    rgb = np.asarray(Image.alpha_composite(white, canvas).convert("RGB"))
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)


def emoji_concepts(names_folder, every):
    """[(hexcode, name)] of the concepts we keep; duplicates by skin tone and gender never occur."""
    subgroups = json.loads((names_folder / "meta/groups.json").read_text())["subgroups"]
    kept = []
    for entry in json.loads((names_folder / "en/data.json").read_text()):
        label = entry["label"].lower().replace("’", "'").replace("piñata", "pinata")
        subgroup, hyphened = subgroups.get(str(entry.get("subgroup"))), label.replace(" ", "-")
        name = RENAME.get(label, label)
        few = subgroup in SUBGROUPS and hyphened not in LESS_KNOWN
        few = few or name.replace(" ", "-") in CONCEPTS
        many = entry.get("group") in GROUPS
        many = many and (subgroup not in LEFT_OUT or hyphened in KEEP_ANYWAY)
        odd = ":" in label or "o'clock" in label or hyphened in DROP
        if (many if every else few) and not odd:
            kept.append((entry["hexcode"].lower(), name))
    return kept


def emoji_pictures(folder, every=False):
    """Yield (name, style, [3, 64, 64] uint8) for every concept that has a 3d render."""
    import resvg_py
    from PIL import Image
    render3d, flat, noto = (npm_pack(folder, *package[:2]) for package in PACKAGES.values())
    svgs = []
    for package in (flat, noto):
        chars, icons = (json.loads((package / f"{f}.json").read_text()) for f in ("chars", "icons"))
        svgs.append((chars, icons["icons"], icons["width"]))
    for code, name in tqdm(emoji_concepts(npm_pack(folder, *NAMES[:2]), every), desc="emoji"):
        codes = [code, code.replace("-fe0f", ""), code + "-fe0f"]
        webp = [p for c in codes if (p := render3d / "assets" / f"{c}.webp").exists()]
        drawn = [next((chars[c] for c in codes if c in chars), None) for chars, _, _ in svgs]
        if not webp or None in drawn:
            continue
        yield name, STYLES[0], fit_white(Image.open(webp[0]).convert("RGBA"))
        for style, icon, (_, icons, width) in zip(STYLES[1:], drawn, svgs, strict=True):
            body = icons[icon]["body"] if icon in icons else None
            if body is None:
                continue
            svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {width}" '
                   f'width="256" height="256">{body}</svg>')
            png = resvg_py.svg_to_bytes(svg_string=svg)
            yield name, style, fit_white(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def solid_pictures(per_pair=8, seed=0):
    """Yield (noun, captions, [3, 64, 64] uint8): each kind in each colour from `per_pair` sides."""
    import solids
    draw = random.Random(seed)
    for kind in tqdm(solids.KINDS, desc="solids"):
        rows = []
        for color in solids.COLORS:
            for i in range(per_pair):
                azimuth = (360 * i / per_pair + draw.uniform(0, 360 / per_pair) + 180) % 360 - 180
                elevation = draw.uniform(62, 80) if i == per_pair - 1 else draw.uniform(5, 35)
                rows.append((color, elevation, azimuth))
        colors, *angles = zip(*rows, strict=True)
        distance = [draw.uniform(2.75, 3.1) for _ in rows]
        c2w = solids.camera_to_world(*map(torch.tensor, (*angles, distance)))
        rgb = solids.render([kind] * len(rows), list(colors), c2w).rgb
        for (color, elevation, azimuth), picture in zip(rows, rgb, strict=True):
            captions = [solids.caption(kind, color, *view) for view in ((elevation, azimuth), ())]
            yield f"{color} {kind}", captions, (picture * 255).round().byte()


def make_data(args):
    """Write data/pictures.safetensors ([N, 3, 64, 64] uint8) and data/captions.json (N rows)."""
    DATA.mkdir(exist_ok=True)
    (DATA / "npm").mkdir(exist_ok=True)
    pictures, rows = [], []
    for name, style, picture in emoji_pictures(DATA / "npm", args.all):
        noun = articled(name)
        rows.append({"concept": name, "style": style, "captions": [f"{style} {noun}", noun]})
        pictures.append(picture)
    for name, captions, picture in solid_pictures():
        rows.append({"concept": name, "style": "solid", "captions": captions})
        pictures.append(picture)
    # one picture in forty is kept out of the VAE's training: evaluate() measures PSNR on those
    for i, row in enumerate(rows):
        row["held_out"] = random.Random(i).random() < 1 / 40
    save_file({"pictures": torch.stack(pictures)}, DATA / "pictures.safetensors")
    (DATA / "captions.json").write_text(json.dumps(rows))
    shutil.rmtree(DATA / "tokenizer", ignore_errors=True)
    concepts = {row["concept"] for row in rows if row["style"] != "solid"}
    print(f"{len(rows)} pictures: {len(concepts)} concepts in 3 styles, the rest solids")


def load_data():
    """(pictures [N, 3, 64, 64] uint8, rows) as make_data wrote them."""
    if not (DATA / "captions.json").exists():
        raise UserError("no data/ here: run `python tiny_sd.py data` first")
    return (load_file(DATA / "pictures.safetensors")["pictures"],
            json.loads((DATA / "captions.json").read_text()))


def jitter(images, shift=0.05, scale=0.06, flip=True):
    """Random flips, small shifts and scalings of [B, 3, H, W] in [0, 1] on their white ground."""
    batch = len(images)
    theta = torch.zeros(batch, 2, 3, device=images.device)
    zoom = 1 + scale * (2 * torch.rand(batch, device=images.device) - 1)
    sign = torch.where(torch.rand(batch, device=images.device) < 0.5, -1.0, 1.0) if flip else 1.0
    theta[:, 0, 0], theta[:, 1, 1] = zoom * sign, zoom
    theta[:, :, 2] = shift * (4 * torch.rand(batch, 2, device=images.device) - 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)    # zero padding = white


# ------------------------------------------------------------------------------------- networks
CONTEXT = 32          # tokens of a prompt


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
    if (DATA / "tokenizer" / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(DATA / "tokenizer", model_max_length=CONTEXT)
    return make_tokenizer([c for row in rows for c in row["captions"]], DATA / "tokenizer")


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


def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", truncation=True, max_length=CONTEXT,
                     return_tensors="pt").input_ids


# ------------------------------------------------------------------------------------- training
class Trainer:
    """AdamW with a learning rate that falls to zero as a cosine of the *time* spent, EMA weights,
    and a checkpoint every two minutes, from which the same command resumes."""

    def __init__(self, name, module, minutes, lr, args, ema_decay=0.999):
        from diffusers.training_utils import EMAModel
        self.name, self.module, self.lr = name, module.to(args.device), lr
        self.seconds, self.spent, self.step = 60 * minutes, 0.0, 0
        self.path = DATA / f"{name}.checkpoint.safetensors"
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr, betas=(0.9, 0.99), fused=True)
        self.ema = EMAModel(self.parameters, decay=ema_decay)
        if self.path.exists():
            self.load()
        elif not minutes:
            raise UserError(f"train the {name} first: python tiny_sd.py train --only {name}")

    unfinished = property(lambda self: self.spent < self.seconds)

    def save(self):
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
        about = {"step": str(self.step), "spent": str(self.spent)}
        temporary = self.path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, about)
        os.replace(temporary, self.path)

    def load(self):
        from safetensors import safe_open
        with safe_open(self.path, "pt") as file:
            about = file.metadata()
        tensors = load_file(self.path)
        state = self.optimizer.state_dict()
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.copy_(tensors[f"parameter.{i}"])
                self.ema.shadow_params[i].copy_(tensors[f"ema.{i}"])
                if f"adam.{i}.step" in tensors:       # not before the first step
                    state["state"][i] = {key: tensors[f"adam.{i}.{key}"]
                                         for key in ("step", "exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict(state)
        self.step, self.spent = int(about["step"]), float(about["spent"])
        self.ema.optimization_step = self.step

    def run(self, loss_function, device):
        """Call loss_function() -> (loss, {term: value}) until the time is up."""
        bar = tqdm(total=round(self.seconds), initial=round(self.spent), unit="s", desc=self.name)
        saved = tick = time.time()
        smooth = {}
        while self.unfinished:
            done = self.spent / self.seconds
            rate = min(1, (self.step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate
            with torch.autocast(device, torch.bfloat16):
                loss, terms = loss_function()
            if not torch.isfinite(loss):
                raise UserError(f"{self.name}: the loss is {loss.item()} at step {self.step}")
            loss.backward()
            if tick == saved and self.step:       # a parameter without a gradient learns nothing
                still = sum(p.grad is None or not p.grad.any() for p in self.parameters)
                if still:
                    raise UserError(f"{self.name}: {still} of {len(self.parameters)} parameters "
                                    "have no gradient")
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.step(self.parameters)
            self.step += 1
            now = time.time()
            self.spent, tick = self.spent + now - tick, now
            smooth = {k: 0.98 * smooth.get(k, float(v)) + 0.02 * float(v) for k, v in terms.items()}
            if self.step % 10 == 0:
                bar.n = min(round(self.spent), bar.total)
                bar.set_postfix(step=self.step, **{k: f"{v:.4f}" for k, v in smooth.items()})
            if now - saved > 120:
                self.save()
                saved = now
        self.save()
        bar.close()
        self.ema.copy_to(self.parameters)
        return self.module


def train_vae(args):
    """L1 + L1 of finite differences (edges) + a whisper of KL; then the decoder alone."""
    pictures, rows = load_data()
    pictures = pictures[[i for i, row in enumerate(rows) if not row["held_out"]]].to(args.device)
    vae = make_vae()
    trainer = Trainer("vae", vae, args.minutes_vae, 2e-3, args, ema_decay=0.99)

    def loss_function():
        x = sharp_and_jittered(pictures)
        posterior = vae.encode(2 * x - 1).latent_dist
        loss, terms = picture_loss(vae.decode(posterior.sample()).sample, x)
        return loss + 1e-5 * posterior.kl().mean() / 64, terms

    trainer.run(loss_function, args.device)
    return train_decoder(args, vae, pictures)


def train_decoder(args, vae, pictures):
    """The decoder alone, with PSNR itself in the loss, then the latents' normalisation."""
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    trainer = Trainer("decoder", decoder, args.minutes_decoder, 1e-3, args, ema_decay=0.99)

    def loss_function():
        x = sharp_and_jittered(pictures)
        recon = vae.decode(vae.encode(2 * x - 1).latent_dist.mean).sample
        loss, terms = picture_loss(recon, x)
        psnr = -10 * (recon.float() / 2 + 0.5 - x).square().mean((1, 2, 3)).log10().mean()
        return loss - 0.005 * psnr, terms | {"psnr": psnr.detach()}

    trainer.run(loss_function, args.device)
    normalize_latents(vae, pictures)
    return vae


def sharp_and_jittered(pictures, batch=8):
    """A random batch in [0, 1]; jitter() interpolates, which blurs: half of it stays as it is."""
    x = pictures[torch.randint(len(pictures), (batch,))].float() / 255
    x[batch // 2:] = jitter(x[batch // 2:])
    return x


def picture_loss(recon, x):
    """L1 and L1 of finite differences (edges), of a VAE output in [-1, 1] and x in [0, 1]."""
    recon = recon.float() / 2 + 0.5
    l1 = (recon - x).abs().mean()
    edges = sum((recon.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
    return l1 + 0.5 * edges, {"l1": l1.detach(), "edges": edges.detach()}


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
def cached_latents(vae, pictures, device, variants=4):
    """[variants, N, 4, 16, 16]: as they are, then flipped, shifted, scaled a little."""
    vae, versions = vae.to(device).eval(), []
    for variant in range(variants):
        latents = []
        for p in tqdm(pictures.split(100), desc=f"latents {variant + 1}/{variants}"):
            x = p.to(device).float() / 255
            x = x if variant == 0 else jitter(x)
            latents.append(vae.encode(2 * x - 1).latent_dist.mean)
        versions.append(torch.cat(latents))
    return torch.stack(versions)


def train_unet(args, vae):
    """UNet and text encoder together on cached latents; 10 % of the captions are null."""
    pictures, rows = load_data()
    tokenizer = data_tokenizer(rows)
    text_encoder, unet, scheduler = make_text_encoder(tokenizer), make_unet(), make_scheduler()
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    trainer = Trainer("unet", both, args.minutes_unet, 1.2e-3, args)
    torch.manual_seed(trainer.step)
    latents = cached_latents(vae, pictures, args.device) if trainer.unfinished else None
    ids = torch.stack([tokenize(tokenizer, [row["captions"][k] for row in rows]) for k in (0, 1)])
    ids, null = ids.to(args.device), tokenize(tokenizer, [""]).to(args.device)
    alpha_bar = scheduler.alphas_cumprod.to(args.device)
    weight = torch.tensor([0.2 if row["style"] == "solid" else 1.0 for row in rows])

    def loss_function():
        row = torch.multinomial(weight, args.batch, replacement=True).to(args.device)
        x0 = latents[torch.randint(len(latents), row.shape), row]
        tokens = ids[(torch.rand(len(row), device=row.device) < 0.3).long(), row]
        tokens = torch.where(torch.rand(len(row), 1, device=row.device) < 0.1, null, tokens)
        t = torch.randint(1000, row.shape, device=row.device)
        eps = torch.randn_like(x0)
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        x_t = scheduler.add_noise(x0, eps, t)
        predicted = unet(x_t, t, text_encoder(tokens).last_hidden_state).sample.float()
        error = (predicted - eps).square().mean((1, 2, 3))
        # the error of x0 is error / snr; its weight is the SNR within [1, 5]: not more than 5
        # (min-SNR), and not less than 1 (truncated SNR), or layouts follow the noise, not the words
        loss = (error * snr.clamp(1, 5) / snr).mean()
        return loss, {"loss": loss.detach(), "mse": error.mean().detach()}

    trainer.run(loss_function, args.device)
    return tokenizer, text_encoder, unet


def train_clip(args):
    """Contrastive: every caption that is true of a picture counts as its positive."""
    pictures, rows = load_data()
    tokenizer = data_tokenizer(rows)
    clip = make_clip(tokenizer)
    trainer = Trainer("clip", clip, args.minutes_clip, 1e-3, args)
    pictures = pictures.to(args.device)
    texts = sorted({c for row in rows for c in row["captions"]})
    number = {text: i for i, text in enumerate(texts)}
    true_of = torch.tensor([[number[c] for c in row["captions"]] for row in rows])
    ids = tokenize(tokenizer, texts).to(args.device)
    weight = torch.tensor([0.2 if row["style"] == "solid" else 1.0 for row in rows])

    def loss_function():
        row = torch.multinomial(weight, 128)
        text = true_of[row, (torch.rand(len(row)) < 0.4).long()]
        positive = (true_of[row][:, :, None] == text).any(1).float().to(args.device)
        image = soil(jitter(pictures[row].float() / 255, shift=0.08, scale=0.15))
        with torch.autocast(args.device, torch.bfloat16):
            out = clip(input_ids=ids[text], pixel_values=clip_pixels(image))
        logits = out.logits_per_image.float()
        loss = -(positive / positive.sum(1, True) * logits.log_softmax(1)).sum(1).mean() / 2
        loss = loss - (positive / positive.sum(0) * logits.log_softmax(0)).sum(0).mean() / 2
        hit = positive.gather(1, logits.argmax(1, True)).mean()
        return loss, {"loss": loss.detach(), "hit": hit}

    trainer.run(loss_function, args.device)
    return tokenizer, clip


def clip_pixels(images):
    """[B, 3, 64, 64] in [0, 1] -> what tiny-clip takes: mean ½, standard deviation ½."""
    return 2 * images - 1


def soil(images):
    """Blur, noise, fade and tint half of the pictures: a judge of generated ones must not mind."""
    batch = len(images)

    def some(chance):
        return (torch.rand(batch, 1, 1, 1, device=images.device) < chance).float()

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images + some(0.3) * (blurred - images)
    images = images + some(0.4) * 0.08 * torch.randn_like(images)
    tint = torch.randn(batch, 3, 1, 1, device=images.device)
    images = images + some(0.4) * 0.05 * tint
    return images + some(0.3) * (images.mean((2, 3), keepdim=True) - images) * 0.3


def export(args, vae, tokenizer, text_encoder, unet):
    """Write tiny-sd/ in half precision, in shards of at most 15 MB; its README.md stays."""
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=make_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    write_folder(Path(args.out), lambda folder: copy.deepcopy(pipe).to("cpu", torch.float16)
                 .save_pretrained(folder, max_shard_size="14MB"))
    for name in ("vocab.json", "merges.txt"):      # in CLIP's own format, beside tokenizer.json
        shutil.copy(DATA / "tokenizer" / name, Path(args.out) / "tokenizer" / name)
    # transformers loads in the dtype its config names, diffusers in float32 where none is asked for
    config = Path(args.out) / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def write_folder(folder, write):
    """write(temporary folder), then move its files into `folder`; other files there stay."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    for path in temporary.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(temporary)


# ----------------------------------------------------------------------------- samples and numbers
def load_pipeline(folder, device):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    if not (Path(folder) / "model_index.json").exists():
        raise UserError(f"{folder} holds no pipeline: run `python tiny_sd.py train` first")
    logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_clip(folder, device):
    """(CLIPModel, its tokenizer) in float32."""
    from transformers import CLIPModel, CLIPTokenizer
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{folder} holds no CLIP: run `python tiny_sd.py train --only clip` first")
    clip = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return clip.to(device).eval(), CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def text_features(clip, tokenizer, texts):
    """T texts -> unit vectors [T, 128]."""
    out = clip.get_text_features(tokenize(tokenizer, texts).to(clip.device))
    return F.normalize(getattr(out, "pooler_output", out), dim=-1)


@torch.no_grad()
def image_features(clip, images):
    """RGB [B, 3, 64, 64] in [0, 1] -> unit vectors [B, 128]."""
    out = clip.get_image_features(clip_pixels(images.to(clip.device)))
    return F.normalize(getattr(out, "pooler_output", out), dim=-1)


def clip_scores(clip, tokenizer, images, texts):
    """RGB [B, 3, 64, 64] in [0, 1], T texts -> cosine similarities [B, T]."""
    return image_features(clip, images) @ text_features(clip, tokenizer, texts).T


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
    """The numbers of the model cards: VAE PSNR, and how often tiny-clip knows what it sees."""
    pictures, rows = load_data()
    pipe = load_pipeline(args.out, args.device)
    clip, tokenizer = load_clip(args.clip, args.device)
    numbers = {"vae_psnr_db": held_out_psnr(pipe.vae, pictures, rows)}
    chosen = random.Random(1).sample(range(len(rows)), 200)
    captions = [rows[i]["captions"][0] for i in chosen]
    sampled = sample_images(pipe, captions, args.seed)
    for name, images in (("sampled", sampled), ("real", pictures[chosen].float() / 255)):
        found = concept_accuracy(clip, tokenizer, images, [rows[i] for i in chosen], rows)
        numbers |= {f"{name}_{key}": value for key, value in found.items()}
    numbers["unet_ms"] = unet_milliseconds(pipe.unet)
    print(json.dumps(numbers, indent=1))


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
    solids = ["red mug", "blue car", "yellow duck", "green house", "purple teapot", "pink chair"]
    return captions + [f"{articled(solid)}, {view} view" for view in
                       ("front", "side", "back", "overhead") for solid in solids]


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
def train(args):
    """The VAE, its decoder alone, UNet + text encoder, the judge: each its share of --minutes."""
    share = {"vae": 0.12, "decoder": 0.06, "unet": 0.74, "clip": 0.08}
    for name, part in share.items():
        minutes = part * args.minutes if args.only is None else args.minutes * (args.only == name)
        setattr(args, f"minutes_{name}", minutes)     # 0: what its last checkpoint holds
    torch.manual_seed(args.seed)
    if args.only != "clip":
        vae = train_vae(args)
        if args.only != "vae":
            export(args, vae, *train_unet(args, vae))
    if args.only in (None, "clip"):
        tokenizer, clip = train_clip(args)
        clip = clip.to("cpu", torch.float16)
        write_folder(Path(args.clip), lambda folder: (clip.save_pretrained(folder),
                                                      tokenizer.save_pretrained(folder)))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("data", help="download and draw the pictures")
    p.add_argument("--all", action="store_true", help="every concept, not the usual third of them")
    p = commands.add_parser("train", help="train everything, or --only one part")
    p.add_argument("--minutes", type=float, default=120, help="in all; with --only, of that part")
    p.add_argument("--only", choices=["vae", "decoder", "unet", "clip"])
    p.add_argument("--batch", type=int, default=64, help="pictures per step of the UNet")
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
        p.add_argument("--out", default=str(HERE / "tiny-sd"))
        p.add_argument("--clip", default=str(HERE / "tiny-clip"))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        commands = {"data": make_data, "train": train, "evaluate": evaluate, "sample": sample}
        commands[args.command](args)
    except UserError as mistake:
        print(f"tiny_sd.py: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
