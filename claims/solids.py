"""solids.py — text-to-3D of things whose true shape is known: Table 1, Figs. 5b and 6b.

Of each run the scores and one view are kept, in claims/solids/, as all of them take six hours.
"""
import torch

from claims.measures import PROMPTS
from claims.pictures import SIDE
from claims.side import side
from claims.work import COMMITTED, SOURCES, Claim, Job
from cli.pictures import sheet
from nerf import orbit, solid_pictures
from text_to_3d import eight_views
from tiny.judge import clip_score
from tiny.solids import find_solid

SOLIDS = PROMPTS["solids"]
PERP_NEG = "asd, Perp-Neg"
METHODS = {"sds": {}, "vsd": {}, "asd": {}, "csd": {}, PERP_NEG: {"perp_neg": True}}
FILES = (*SOURCES, "claims/runs.py", "text_to_3d.py", "variants.py", "nerf.py", "cli/settings.py",
         "tiny/solids.py")
JOBS = {}
for name, changes in METHODS.items():
    for prompt in SOLIDS:
        method = name.partition(",")[0]
        JOBS[name, prompt] = Job(f"{name}-{prompt}".replace(",", "").replace(" ", "-"), side,
                                 {"method": method, "prompt": prompt} | changes, 3.5, FILES,
                                 COMMITTED / "solids")


def of(r, method, measure):
    """A number of each solid by a method [20]."""
    return torch.stack([r[method, prompt][measure] for prompt in SOLIDS]).double()


def gap(a, b):
    return lambda r: of(r, a, "psnr") - of(r, b, "psnr")


def controls(r):
    """The true solid should score above every method, in tiny-clip's eyes, too."""
    truth = torch.tensor([clip_score(eight_views(prompt).over(1.0).movedim(-1, 1), prompt)
                          for prompt in SOLIDS])
    methods = dict.fromkeys(method for method, _ in r)
    return {f"score, truth − {method}": truth - of(r, method, "clip") for method in methods}


def numbers(r):
    methods = dict.fromkeys(method for method, _ in r)
    return {method: {"PSNR": of(r, method, "psnr"), "IoU": of(r, method, "iou"),
                     "score": of(r, method, "clip")} for method in methods}


def draw(path, r):
    """Ten solids by each method, half from the side; IoU under them; the true ones."""
    shown, rows = SOLIDS[::2], []
    for method in dict.fromkeys(method for method, _ in r):
        views = torch.stack([r[method, prompt]["view"] for prompt in shown]) / 255
        rows.append((method.upper(), views, [f"{r[method, prompt]['iou']:.2f}"
                                             for prompt in shown]))
    truth = torch.cat([solid_pictures(*find_solid(prompt), orbit(8)[1:2]).over(1.0)
                       for prompt in shown]).movedim(-1, 1)
    rows.append(("the true solids", truth, ["1"] * len(shown)))
    sheet(path, shown, rows, SIDE, corner="silhouette IoU", colors=256)


def claim(title, says, a, b, shown, **more):
    jobs = {key: job for key, job in JOBS.items() if key[0] in shown}
    return Claim(title, says, jobs, f"PSNR against the true solid, {a} − {b}", "dB", 0.5,
                 gap(a, b), draw, controls, numbers, **more)


THREE = ("sds", "vsd", "asd")
CLAIMS = {
    "T1, SDS": claim("quality in 3D: ASD is better than SDS", "Table 1, Fig. 6b, §6",
                     "asd", "sds", THREE),
    "T1, VSD": claim("quality in 3D: ASD is better than VSD", "Table 1, Fig. 6b, §6",
                     "asd", "vsd", THREE),
    "5b": claim("in 3D the classifier term alone is worse than ASD", "Fig. 5b, §5",
                "asd", "csd", ("csd", "asd")),
    "Perp-Neg": claim("text-to-3D is better with the other views as negatives", "ours; 2304.04968",
                      PERP_NEG, "asd", ("asd", PERP_NEG), ours=True),
}
