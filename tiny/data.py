"""data.py — what tiny/sd and tiny/clip learn from: emoji in three styles and solids, captioned.

    python tiny/make.py data                       # calls make_data() below; needs npm

The emoji come from the npm registry (package names, versions and licences in PACKAGES), the solids
from solids.py, from all sides. All of it lies in data/, at the top of the repository.
"""
import io
import json
import math
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from tiny import solids
from tiny.training import save_tensors

DATA = Path(__file__).resolve().parent.parent / "data"

# style word -> (package on the npm registry, version, licence); names come from NAMES
PACKAGES = {
    "a 3d render of": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    "a flat icon of": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "a drawing of": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
}
NAMES = ("emojibase-data", "17.0.0", "MIT")
STYLES = list(PACKAGES)
# What is drawn: these subgroups of emojibase without the LESS_KNOWN, and these single concepts.
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
LESS_KNOWN = """water-buffalo two-hump-camel mammoth sauropod microbe wing cockroach mosquito fly
 worm cricket beetle bug oyster rosette wilted-flower sheaf-of-rice herb shamrock ewe ginger-root
 pea-pod leaf-fluttering-in-wind empty-nest black-bird front-facing-baby-chick flatbread
 stuffed-flatbread tamale falafel bowl-with-spoon shallow-pan-of-food pot-of-food fondue
 canned-food butter salt sake custard shaved-ice teacup-without-handle beverage-box cup-with-straw
 bottle-with-popping-cork clinking-beer-mugs ice paw-prints pig-nose spiral-shell coral dodo
 badger guide-dog service-dog mate pouring-liquid""".split()
RENAME = {"hourglass done": "hourglass", "automobile": "car", "hot beverage": "cup of coffee",
          "cooking": "fried egg", "poultry leg": "chicken leg", "cut of meat": "steak",
          "tennis": "tennis ball", "magnifying glass tilted right": "magnifying glass",
          "soft ice cream": "soft serve", "meat on bone": "meat bone", "doughnut": "donut",
          "closed book": "red book", "tumbler glass": "glass of whiskey"}
# words that take no article although they do not end in s, and words in s that do take one
MASS = set("bacon basketball bread broccoli fire garlic popcorn".split())
SINGULAR_S = set("bus cactus hibiscus hippopotamus lotus octopus rhinoceros".split())


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
            raise OSError("npm was not found: it is needed to download the emoji packages "
                          "(install Node.js), or use the finished tiny/sd")
        done = subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder,
                              capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"npm pack {package}@{version} failed: {done.stderr.strip()[-200:]}")
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


def emoji_concepts(names_folder):
    """[(hexcode, name)] of the concepts we keep; duplicates by skin tone and gender never occur."""
    subgroups = json.loads((names_folder / "meta/groups.json").read_text())["subgroups"]
    kept = []
    for entry in json.loads((names_folder / "en/data.json").read_text()):
        label = entry["label"].lower().replace("’", "'").replace("piñata", "pinata")
        subgroup, name = subgroups.get(str(entry.get("subgroup"))), RENAME.get(label, label)
        if subgroup in SUBGROUPS and label.replace(" ", "-") not in LESS_KNOWN \
                or name.replace(" ", "-") in CONCEPTS:
            kept.append((entry["hexcode"].lower(), name))
    return kept


def emoji_pictures(folder):
    """Yield (name, style, [3, 64, 64] uint8) for every concept that has a 3d render."""
    import resvg_py
    from PIL import Image
    render3d, flat, noto = (npm_pack(folder, *package[:2]) for package in PACKAGES.values())
    svgs = []
    for package in (flat, noto):
        chars, icons = (json.loads((package / f"{f}.json").read_text()) for f in ("chars", "icons"))
        svgs.append((chars, icons["icons"], icons["width"]))
    for code, name in tqdm(emoji_concepts(npm_pack(folder, *NAMES[:2])), desc="emoji"):
        codes = [code, code.replace("-fe0f", ""), code + "-fe0f"]
        webp = [p for c in codes if (p := render3d / "assets" / f"{c}.webp").exists()]
        drawn = []                               # the icon's name in each package, or None
        for chars, _, _ in svgs:
            names = [chars[c] for c in codes if c in chars]
            drawn.append(names[0] if names else None)
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


def around(elevation, azimuth, distance, fovy=40.0):
    """Cameras that look at the origin, z up: degrees, distances [B] -> what solids.render takes.

    nerf.rays of nerf.camera_to_world, written out for these (an azimuth of 0 looks at the front).
    """
    theta, phi = (torch.deg2rad(v)[:, None] for v in (elevation, azimuth))
    zero = torch.zeros_like(phi)
    back = torch.cat([theta.cos() * phi.cos(), theta.cos() * phi.sin(), theta.sin()], 1)
    right = torch.cat([-phi.sin(), phi.cos(), zero], 1)
    up = torch.linalg.cross(back, right)

    def rays(n):
        place = ((2 * torch.arange(n) + 1) / n - 1) * math.tan(math.radians(fovy / 2))
        x, y = (v[None, :, :, None] for v in torch.meshgrid(place, -place, indexing="xy"))
        d = x * right[:, None, None] + y * up[:, None, None] - back[:, None, None]
        return (distance[:, None] * back)[:, None, None].expand_as(d), F.normalize(d, dim=-1)
    return rays


def solid_pictures(per_pair=8, seed=0):
    """Yield (noun, captions, [3, 64, 64] uint8): each kind in each colour from `per_pair` sides."""
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
        seen_from = around(*map(torch.tensor, (*angles, distance)))
        rgb = solids.render([kind] * len(rows), list(colors), seen_from).rgb
        for (color, elevation, azimuth), picture in zip(rows, rgb, strict=True):
            captions = [solids.caption(kind, color, *view) for view in ((elevation, azimuth), ())]
            yield f"{color} {kind}", captions, (picture * 255).round().byte()


def make_data(args):
    """Write data/pictures.safetensors ([N, 3, 64, 64] uint8) and data/captions.json (N rows)."""
    (DATA / "npm").mkdir(parents=True, exist_ok=True)
    pictures, rows = [], []
    for name, style, picture in emoji_pictures(DATA / "npm"):
        noun = articled(name)
        rows.append({"concept": name, "style": style, "captions": [f"{style} {noun}", noun],
                     "more": False})
        pictures.append(picture)
    for more, drawn in enumerate((solid_pictures(), solid_pictures(per_pair=32, seed=1))):
        for name, captions, picture in drawn:         # the second are for training alone
            rows.append({"concept": name, "style": "solid", "captions": captions,
                         "more": bool(more)})
            pictures.append(picture)
    # one picture in forty is kept out of the VAE's training: evaluate() measures PSNR on those
    for i, row in enumerate(rows):
        row["held_out"] = not row["more"] and random.Random(i).random() < 1 / 40
    save_tensors(DATA / "pictures.safetensors", {"pictures": torch.stack(pictures)})
    (DATA / "captions.json").write_text(json.dumps(rows))
    shutil.rmtree(DATA / "tokenizer", ignore_errors=True)
    concepts = {row["concept"] for row in rows if row["style"] != "solid"}
    print(f"{len(rows)} pictures: {len(concepts)} concepts in 3 styles, the rest solids")


def load_data():
    """(pictures [N, 3, 64, 64] uint8, rows) as make_data wrote them."""
    if not (DATA / "captions.json").exists():
        raise FileNotFoundError("no data/ here: run `python tiny/make.py data` first")
    return (load_file(DATA / "pictures.safetensors")["pictures"],
            json.loads((DATA / "captions.json").read_text()))


def jitter(images, shift=0.05, scale=0.06, flip=0.5):
    """Random flips, small shifts and scalings of [B, 3, H, W] in [0, 1] on their white ground.

    flip: its probability, one for all or [B]: a solid's mirror image is not what its view shows.
    """
    batch = len(images)
    theta = torch.zeros(batch, 2, 3, device=images.device)
    zoom = 1 + scale * (2 * torch.rand(batch, device=images.device) - 1)
    sign = torch.where(torch.rand(batch, device=images.device) < flip, -1.0, 1.0)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * sign, zoom
    theta[:, :, 2] = shift * (4 * torch.rand(batch, 2, device=images.device) - 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)    # zero padding = white
