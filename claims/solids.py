"""solids.py — text-to-3D of things whose true shape is known: Table 1, Figs. 5b and 6b.

The runs take six hours, so of each the scores and one view are committed, in claims/solids/; for
Perp-Neg also whether the sides of a solid that has a front can be told from each other.
"""
import torch

from claims import runs
from claims.measures import PROMPTS
from claims.pictures import SIDE
from claims.work import COMMITTED, SOURCES, Claim, Job
from cli.pictures import sheet
from nerf import orbit, solid_pictures
from text_to_3d import eight_views
from tiny.judge import clip_score
from tiny.solids import KINDS, find_solid

SOLIDS = PROMPTS["solids"]
FRONTED = [prompt for prompt in SOLIDS if KINDS[find_solid(prompt)[0]].has_front]
PERP_NEG = "asd, Perp-Neg"
METHODS = {"sds": {}, "vsd": {}, "asd": {}, "csd": {}, PERP_NEG: {"perp_neg": True}}
FILES = (*SOURCES, "text_to_3d.py", "variants.py", "nerf.py", "cli/settings.py", "tiny/solids.py")


def job(function, method, prompt):
    """The Job of a solid: function is runs.side or runs.named."""
    name = f"{method}-{prompt}" if function is runs.side else f"named-{method}-{prompt}"
    arguments = {"method": method.partition(",")[0], "prompt": prompt} | METHODS[method]
    return Job(name.replace(",", "").replace(" ", "-"), function, arguments, 3.5, FILES,
               COMMITTED / "solids")


JOBS = {(method, prompt): job(runs.side, method, prompt) for method in METHODS for prompt in SOLIDS}
NAMED = {(method, prompt, "named"): job(runs.named, method, prompt)
         for method in ("asd", PERP_NEG) for prompt in FRONTED}


def methods_of(r):
    return dict.fromkeys(key[0] for key in r)


def label(method):
    """A method's name in a table or a figure."""
    return method[:3].upper() + method[3:]


def of(r, method, measure):
    """A number of each solid by a method [20]."""
    return torch.stack([r[method, prompt][measure] for prompt in SOLIDS]).double()


def gap(a, b):
    return lambda r: of(r, a, "psnr") - of(r, b, "psnr")


def controls(r):
    """The true solid should score above every method, in tiny-clip's eyes, too."""
    truth = torch.tensor([clip_score(eight_views(prompt).over(1.0).movedim(-1, 1), prompt)
                          for prompt in SOLIDS])
    return {f"score, truth − {label(method)}": truth - of(r, method, "clip")
            for method in methods_of(r)}


def numbers(r):
    found = {}
    for method in methods_of(r):
        row = found[label(method)] = {"PSNR": of(r, method, "psnr"), "IoU": of(r, method, "iou")}
        right = [r[key]["right"].mean() for key in r if key[0] == method and key in NAMED]
        if right:
            row["sides told right, of those with a front"] = torch.stack(right)
    if "csd" in methods_of(r):
        found["SDS − CSD"] = {"PSNR": gap("sds", "csd")(r)}
    return found


def draw(path, r):
    """Ten solids by each method, half from the side; IoU under them; the true ones."""
    shown, rows = SOLIDS[::2], []
    for method in methods_of(r):
        views = torch.stack([r[method, prompt]["view"] for prompt in shown]) / 255
        rows.append((label(method), views, [f"{r[method, prompt]['iou']:.2f}"
                                             for prompt in shown]))
    truth = torch.cat([solid_pictures(*find_solid(prompt), orbit(8)[1:2]).over(1.0)
                       for prompt in shown]).movedim(-1, 1)
    rows.append(("the true solids", truth, ["1"] * len(shown)))
    sheet(path, shown, rows, SIDE, corner="silhouette IoU", colors=256)


NO_SCORE = ("The control fails: tiny-clip does not surely score the true solids higher than each "
            "method's, so its score is no measure here, and is left out.")


def claim(title, says, a, b, shown, remark="", figure=draw, ours=False, more_jobs=()):
    """Method a is better than b. shown: the methods of the table and the figure."""
    jobs = {key: job for key, job in JOBS.items() if key[0] in shown} | dict(more_jobs)
    outcome = f"PSNR against the true solid, {label(a)} − {label(b)}"
    return Claim(title, says, jobs, outcome, "dB", 0.5, gap(a, b), figure, controls=controls,
                 numbers=numbers, ours=ours, remark=f"{remark} {NO_SCORE}".lstrip())


THREE = ("sds", "vsd", "asd")
CLAIMS = {
    "T1, SDS": claim("quality in 3D: ASD is better than SDS", "Table 1, Fig. 6b, §6",
                     "asd", "sds", THREE,
                     "To the eye SDS's are smooth: the rocket has no window, the duck a gray beak; "
                     "ASD's and VSD's, which are alike, have both, and more dust. The "
                     "paper's Table 1 has CLIP scores: by two of three ASD is better than SDS."),
    "T1, VSD": claim("quality in 3D: ASD is better than VSD", "Table 1, Fig. 6b, §6",
                     "asd", "vsd", THREE, figure=None),
    "5b": claim("in 3D the classifier term alone is worse than ASD", "Fig. 5b, §5",
                "asd", "csd", ("sds", "asd", "csd"),
                "SDS is better than CSD, too, so that this is not the adversary's. To the eye "
                "CSD's rocket lacks its window, the duck its brown beak. The paper says that CSD "
                "over-saturates; PSNR as the measure is ours."),
    "Perp-Neg": claim("text-to-3D is better with the other views as negatives", "ours; 2304.04968",
                      PERP_NEG, "asd", ("asd", PERP_NEG),
                      "With Perp-Neg the table lacks a leg and the lamp its foot; the chair has no "
                      "horns. Of the nine solids that have a front tiny-clip tells the sides right "
                      "as often on average, ± 0.17.", ours=True, more_jobs=NAMED),
}
