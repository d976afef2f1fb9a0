"""solids.py — text-to-3D, of things whose true shape is known: Table 1, Figs. 5b and 7 in 3D."""
import torch

import asd
import text_to_3d
from claims.pictures import LABELS, LATE, SIDE, SMALL, drift, keep_late, minus
from claims.work import Claim, Job, numbers_of
from cli.pictures import picture_measures, sheet, to_bytes
from cli.settings import SceneSettings
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
    values = text_to_3d.SCENE | vars(row) | {
        "method": method, "phi": row.phi.__name__, "settings": "tiny", "kernels": "torch",
        "prompt": prompt, "seed": seed}
    fields = values.keys() & SceneSettings.model_fields.keys()          # a row may have others
    settings = SceneSettings(**{name: values[name] for name in fields})
    state, cond = text_to_3d.build(settings, prior, row, rng, None, True)
    asd.distill(prior, state.generator, cond, row, state=state,
                callback=keep_late(snapshots, row.steps))
    with torch.no_grad():
        seen = render(state.generator.nerf, *rays(orbit(8), 40.0, 64), 64).rgb.movedim(-1, 1)
    scores = view_scores(state.generator.nerf, prompt)
    return {"snapshots": torch.stack(snapshots), "views": to_bytes(seen),
            "scores": torch.tensor([scores["iou"], scores["psnr"]])}


def solid_jobs(methods, minutes=2.5):
    """{(method, prompt, seed): Job}, the seeds outermost."""
    jobs = {}
    for seed in SEEDS:
        for prompt in SOLIDS:
            for method in methods:
                name = f"solid-{method}-{prompt.replace(' ', '-')}-{seed}"
                arguments = {"method": method, "prompt": prompt, "seed": seed}
                jobs[method, prompt, seed] = Job(name, solid, arguments, minutes)
    return jobs


# ------------------------------------------------------------------------- measures, tests, claims
THREE = solid_jobs(asd.METHODS)
CLASSIFIER = solid_jobs(["csd"], minutes=1.5)


def measured(result, prompt):
    """{measure: number} of one run: its eight views' score in tiny-clip; off the white background
    HSV saturation and the share of colours at 0 or 255; silhouette IoU, PSNR; two drifts of its
    late pictures, in pixels and in tiny-clip's features."""
    views = result["views"]
    seen, text = clip_features([views / 255], [prompt])
    colours = views.movedim(1, -1)[~(views > 250).all(1)]
    drifts = [drift(result["snapshots"][:, [i]]) for i in range(4)]
    pixels, turned = torch.tensor(drifts).mean((0, 2)).tolist()
    iou, quality = result["scores"].tolist()
    return {"score": (seen @ text.T).mean().item(), "IoU": iou, "PSNR": quality,
            "saturation": picture_measures(colours.T[None, :, None] / 255)["saturation"],
            "clipped": ((colours == 0) | (colours == 255)).float().mean().item(),
            "drift in pixels": pixels, "drift in features": turned}


def by_method(results):
    """{method: {measure: [a number for each solid and seed]}}."""
    rows = {}
    for (method, prompt, _), result in results.items():
        for measure, number in measured(result, prompt).items():
            rows.setdefault(method, {}).setdefault(measure, []).append(number)
    return rows


def tests_table1(results):
    """CLIP scores as in Table 1; IoU and PSNR, of which the true shape is the judge."""
    rows = by_method(results)
    return {f"{measure}, ASD − {other.upper()}": minus(rows["asd"][measure], rows[other][measure])
            for measure in ("score", "IoU", "PSNR") for other in ("sds", "vsd")}


def tests_7(results):
    vsd, ours = (by_method(results)[method] for method in ("vsd", "asd"))
    return {f"{measure}, VSD − ASD": minus(vsd[measure], ours[measure])
            for measure in ("drift in pixels", "drift in features")}


def tests_5b(results):
    rows = by_method(results)
    return {f"{measure}, classifier term − {other.upper()}": minus(rows["csd"][measure],
                                                                   rows[other][measure])
            for measure in ("saturation", "clipped") for other in ("sds", "asd")}


def prompts_of(results):
    return list(dict.fromkeys(prompt for _, prompt, _ in results))


def numbers(results):
    scores = [clip_score(text_to_3d.eight_views(prompt).over(1.0).movedim(-1, 1), prompt)
              for prompt in prompts_of(results)]
    return numbers_of(by_method(results) | {"the true solids": {"score": scores}})


def drawn(path, results):
    """Each method's solids of the first seed, and the true ones, half from the side."""
    prompts, rows = prompts_of(results), []
    for method in dict.fromkeys(method for method, _, _ in results):
        runs = [results[method, prompt, 0] for prompt in prompts]
        views = torch.stack([run["views"][1] for run in runs])
        rows.append((LABELS[method], views / 255, [f"{run['scores'][0]:.2f}" for run in runs]))
    truth = torch.cat([solid_pictures(*find_solid(prompt), orbit(8)[1:2]).over(1.0)
                       for prompt in prompts]).movedim(-1, 1).clamp(0, 1)
    rows.append(("the true solids", truth, ["1"] * len(prompts)))
    sheet(path, prompts, rows, SIDE, corner="silhouette IoU", colors=256)


def progress(path, results):
    """Fig. 7 in 3D: late in the run, from the side."""
    rows = [(f"{method.upper()}, {prompt}", results[method, prompt, 0]["snapshots"][:, 1] / 255)
            for prompt in SOLIDS[:3] for method in ("vsd", "asd")]
    sheet(path, [f"{part:.0%} of the steps" for part in LATE], rows, SIDE, colors=256)


def without(jobs, method):
    return {key: job for key, job in jobs.items() if key[0] != method}


LIMITS = SMALL + "; tiny-clip may rank a distilled solid above the true one"
CLAIMS = {
    "T1": Claim("quality in 3D: ASD is better than SDS and VSD", "Table 1, Fig. 6b, §6", THREE,
                tests_table1, drawn, numbers, LIMITS, len(SOLIDS)),
    "7, 3D": Claim("in 3D, too, VSD's structures change faster than ASD's", "Fig. 7, §6",
                   without(THREE, "sds"), tests_7, progress,
                   numbers, SMALL, len(SOLIDS)),
    "5b": Claim("the classifier term alone over-saturates in 3D, too", "Fig. 5b, §5",
                CLASSIFIER | without(THREE, "vsd"), tests_5b,
                drawn, numbers, SMALL, len(SOLIDS)),
}
