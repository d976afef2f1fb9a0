"""solids.py — text-to-3D, of things whose true shape is known: Table 1, Figs. 5b and 7 in 3D."""
import torch

import asd
import text_to_3d
from claims.pictures import LABELS, LATE, SIDE, SMALL, drift, keep_late, minus, to_bytes
from claims.work import Claim, Job, mean_and_error
from export import picture_measures, sheet
from nerf import orbit, rays, render, solid_pictures
from text_to_3d import view_scores
from tiny.judge import clip_features, clip_score
from tiny.solids import find_solid

SOLIDS = ["a red mug", "a blue car", "a yellow duck", "a green house", "a purple teapot"]
SEEDS = range(3)


def solid(method, prompt, seed):
    """What `python text_to_3d.py --prompt … --method … --seed …` makes, at its default settings.

    -> snapshots [5, 4, 3, 64, 64] at LATE, views [8, 3, 64, 64], scores [2]: IoU and PSNR, dB.
    """
    prior, row = asd.Prior.from_pretrained("tiny-sd"), text_to_3d.methods()[method]
    rng, snapshots = torch.Generator().manual_seed(seed), []
    settings = text_to_3d.DEFAULTS | vars(row) | {"prompt": prompt, "seed": seed,
                                                  "kernels": "torch"}
    state, cond = text_to_3d.build(settings, prior, row, rng, None, True)
    asd.distill(prior, state.generator, cond, row, state=state,
                callback=keep_late(snapshots, row.steps))
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


# ------------------------------------------------------------------------- measures, tests, claims
THREE = solid_jobs(asd.METHODS)
CLASSIFIER = solid_jobs(["csd"], minutes=1.5)


def measured(result, prompt):
    """{measure: number} of one run: its eight views' score in tiny-clip; off the white background
    HSV saturation and the share of colours at 0 or 255; silhouette IoU, PSNR; two drifts of its
    late pictures, in pixels and in tiny-clip's features."""
    views = result["views"]
    seen, text = clip_features([views / 255], [prompt])
    thing = ~(views > 250).all(1)
    colours = views.movedim(1, -1)[thing]
    pixels, turned = (torch.tensor(each).mean().item() for each in zip(*(
        drift(result["snapshots"][:, [i]]) for i in range(4))))
    iou, quality = result["scores"].tolist()
    return {"score": (seen @ text.T).mean().item(), "IoU": iou, "PSNR": quality,
            "saturation": picture_measures(colours.T[None, :, None] / 255)["saturation"],
            "clipped": ((colours == 0) | (colours == 255)).float().mean().item(),
            "drift in pixels": pixels, "drift in features": turned}


def by_method(results):
    """{method: {measure: [one for each solid and seed]}}."""
    found = {}
    for (name, prompt, _), result in results.items():
        for key, value in measured(result, prompt).items():
            found.setdefault(name, {}).setdefault(key, []).append(value)
    return found


def tests_table1(results):
    """CLIP scores as in Table 1; IoU and PSNR, of which the true shape is the judge."""
    rows = by_method(results)
    return {f"{key}, ASD − {other.upper()}": minus(rows["asd"][key], rows[other][key])
            for key in ("score", "IoU", "PSNR") for other in ("sds", "vsd")}


def tests_7(results):
    rows = by_method(results)
    return {f"{key}, VSD − ASD": minus(rows["vsd"][key], rows["asd"][key])
            for key in ("drift in pixels", "drift in features")}


def tests_5b(results):
    rows = by_method(results)
    return {f"{key}, classifier term − {other.upper()}": minus(rows["csd"][key], rows[other][key])
            for key in ("saturation", "clipped") for other in ("sds", "asd")}


def numbers(results):
    rows = {name: {key: mean_and_error(each) for key, each in row.items()}
            for name, row in by_method(results).items()}
    scores = [clip_score(text_to_3d.eight_views(prompt).over(1.0).movedim(-1, 1), prompt)
              for prompt in dict.fromkeys(prompt for _, prompt, _ in results)]
    return rows | {"the true solids": {"score": mean_and_error(scores)}}


def drawn(path, results):
    """Each method's solids of the first seed, and the true ones, half from the side."""
    names, prompts = (list(dict.fromkeys(key[i] for key in results)) for i in (0, 1))
    rows = [(LABELS[name], torch.stack([results[name, prompt, 0]["views"][1] for prompt in prompts])
             / 255, [f"{results[name, prompt, 0]['scores'][0]:.2f}" for prompt in prompts])
            for name in names]
    truth = torch.cat([solid_pictures(*find_solid(prompt), orbit(8)[1:2]).over(1.0)
                       for prompt in prompts]).movedim(-1, 1).clamp(0, 1)
    sheet(path, prompts, [*rows, ("the true solids", truth, ["1"] * len(prompts))], SIDE,
          corner="silhouette IoU", colors=256)


def progress(path, results):
    """Fig. 7 in 3D: late in the run, from the side."""
    rows = [(f"{name.upper()}, {prompt}", results[name, prompt, 0]["snapshots"][:, 1] / 255)
            for prompt in SOLIDS[:3] for name in ("vsd", "asd")]
    sheet(path, [f"{part:.0%} of the steps" for part in LATE], rows, SIDE, colors=256)


LIMITS = SMALL + "; tiny-clip may rank a distilled solid above the true one"
CLAIMS = {
    "T1": Claim("quality in 3D: ASD is better than SDS and VSD", "Table 1, Fig. 6b, §6", THREE,
                tests_table1, drawn, numbers, LIMITS, len(SOLIDS)),
    "7, 3D": Claim("in 3D, too, VSD's structures change faster than ASD's", "Fig. 7, §6",
                   {key: job for key, job in THREE.items() if key[0] != "sds"}, tests_7, progress,
                   numbers, SMALL, len(SOLIDS)),
    "5b": Claim("the classifier term alone over-saturates in 3D, too", "Fig. 5b, §5",
                CLASSIFIER | {key: job for key, job in THREE.items() if key[0] != "vsd"}, tests_5b,
                drawn, numbers, SMALL, len(SOLIDS)),
}
