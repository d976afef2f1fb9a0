"""solids.py — text-to-3D, of things whose true shape is known: Table 1, Figs. 5b and 7 in 3D."""
import torch

import asd
import text_to_3d
from claims.work import Job
from nerf import orbit, rays, render
from text_to_3d import view_scores

SOLIDS = ["a red mug", "a blue car", "a yellow duck", "a green house", "a purple teapot"]
SEEDS = range(3)
LATE = (0.6, 0.7, 0.8, 0.9, 1.0)          # of the steps: when a run's picture is kept


def to_bytes(images):
    return (255 * images.detach().cpu().clamp(0, 1)).round().byte()


def solid(method, prompt, seed):
    """What `python text_to_3d.py --prompt … --method … --seed …` makes, at its default settings.

    -> snapshots [5, 4, 3, 64, 64] at LATE, views [8, 3, 64, 64], scores [2]: IoU and PSNR, dB.
    """
    prior, row = asd.Prior.from_pretrained("tiny-sd"), text_to_3d.methods()[method]
    rng, snapshots = torch.Generator().manual_seed(seed), []
    settings = text_to_3d.DEFAULTS | {"prompt": prompt, "seed": seed, "kernels": "torch"}
    state, cond = text_to_3d.build(settings, prior, row, rng, None, True)

    def keep(state, terms):
        if state.step in [round(part * row.steps) for part in LATE]:
            snapshots.append(to_bytes(state.generator.images()))
    asd.distill(prior, state.generator, cond, row, state=state, callback=keep)
    with torch.no_grad():
        seen = render(state.generator.nerf, *rays(orbit(8), 40.0, 64), 64).rgb.movedim(-1, 1)
    scores = view_scores(state.generator.nerf, prompt)
    return {"snapshots": torch.stack(snapshots), "views": to_bytes(seen),
            "scores": torch.tensor([scores["iou"], scores["psnr"]])}


def solid_jobs(names, prompts=SOLIDS, minutes=2.5):
    """{(method, prompt, seed): Job}, the seeds outermost."""
    return {(name, prompt, seed): Job(
        f"solid-{name}-{prompt.replace(' ', '-')}-{seed}", solid,
        {"method": name, "prompt": prompt, "seed": seed}, minutes)
        for seed in SEEDS for prompt in prompts for name in names}
