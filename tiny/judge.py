"""judge.py — tiny/clip, the small CLIP that scores pictures by the embedded model.

    clip_score(images, "a fox")              # mean cosine; None where tiny/clip is not there
    clip, tokenizer = load_clip()            # an ordinary transformers CLIPModel, in float32
    clip_scores(clip, tokenizer, images, ["a fox", "an apple"])        # cosines [B, 2]

Images are RGB [B, 3, H, W] in [0, 1]; the model sees 64 x 64 of them, as 2·image − 1.
"""
import functools
from pathlib import Path

import torch
from torch.nn import functional as F

FOLDER = Path(__file__).resolve().parent / "clip"
CONTEXT = 32          # tokens of a prompt


def load_clip(folder=FOLDER, device="cpu"):
    """(CLIPModel, its tokenizer) in float32. FileNotFoundError where there is none."""
    from transformers import CLIPModel, CLIPTokenizer
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no CLIP: python tiny/make.py train --only clip "
                                "makes it")
    clip = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                     dtype=torch.float32)
    return clip.to(device).eval(), CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def tokenize(tokenizer, captions):
    """list of B strings -> ids [B, CONTEXT]."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=CONTEXT,
                     return_tensors="pt").input_ids


def clip_pixels(images):
    """[B, 3, 64, 64] in [0, 1] -> what tiny/clip takes: mean ½, standard deviation ½."""
    return 2 * images - 1


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


# ------------------------------------------------------------- the same, where the judge is at hand
@functools.cache
def load_judge():
    """tiny/clip and its tokenizer; None where they, or transformers, are not there."""
    try:
        return load_clip()
    except (ImportError, FileNotFoundError):
        return None


def clip_features(batches, texts):
    """Batches of RGB [B, 3, H, W] in [0, 1] and T texts -> their unit vectors [B, 128], …, [T, 128]
    in tiny/clip; None where it cannot be had."""
    if load_judge() is None:
        return None
    clip, tokenizer = load_judge()
    small = [F.interpolate(x.cpu(), (64, 64), mode="area") for x in batches]
    return *(image_features(clip, x) for x in small), text_features(clip, tokenizer, texts)


def clip_score(images, prompt):
    """Mean cosine of RGB [B, 3, H, W] with the prompt in tiny/clip; None where it is not there."""
    features = clip_features([images], [prompt])
    return features and (features[0] @ features[1].T).mean().item()


def distances(before, after, source, target):
    """Pictures [B, 3, H, W] in [0, 1] -> {"psnr" to `before` in dB; "clip_distance", 1 − cosine of
    the pictures in tiny/clip's features; "clip_target", "clip_source": cosines with the prompts}.
    """
    error = (after - before).square().mean((1, 2, 3)).clamp(min=1e-10)
    numbers = {"psnr": (-10 * error.log10()).mean().item()}
    features = clip_features([before, after], [source, target])
    if features is None:
        return numbers
    a, b, (z, y) = features
    return numbers | {"clip_distance": (1 - (a * b).sum(1)).mean().item(),
                      "clip_target": (b @ y).mean().item(), "clip_source": (b @ z).mean().item()}
