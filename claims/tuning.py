"""tuning.py — the settings of the claims: `python -m claims tune` writes claims/tuned.json.

Each method gets the same budget on the ten tuning prompts, which no claim uses, by the distance to
the prior's samples: nine settings of θ's rate, its end and φ's rate, 350 steps; then the fewest
steps that are within δ of those; then the λ of the least distance. tuned.json has each distance as
soon as it is known, and the same command goes on. For other weights, empty each
"tried" first.
"""
import itertools
import json

from tqdm import tqdm

import asd
from claims import runs
from claims.measures import LAMBDAS, NEAR, PROMPTS, SAMPLE_JOBS, decoded, energy_distance, features
from claims.work import part_of, threads_of
from cli.files import locked, write_text
from prior import HERE

LR, LR_END, PHI_LR = (0.01, 0.02, 0.04), (1.0, 0.3, 0.1), (3e-4, 1e-3, 3e-3)
STEPS = (60, 90, 120, 175, 250)
FULL = 350
FILE = HERE / "claims/tuned.json"


def settings(method):
    """Nine of the 27: each pair of values of two of the three once (an orthogonal array)."""
    rows = [{"lr": LR[i], "lr_end": LR_END[j], "phi_lr": PHI_LR[(i + j) % 3]}
            for i, j in itertools.product(range(3), range(3))]
    if asd.METHODS[method].phi is asd.NoisePhi:
        for row in rows:
            del row["phi_lr"]
    return rows


def read():
    """tuned.json: {method: {"settings", "lam", "done": whether these are tuned, "tried":
    {settings in words: distance}}}."""
    return json.loads(FILE.read_text("utf-8"))


def keep(method, changes):
    """Change some of what tuned.json has of a method."""
    with locked(FILE.parent, wait=True):          # other processes tune other methods
        table = read()
        table[method] |= changes
        write_text(FILE, json.dumps(table, indent=1) + "\n")


def distance(method, **changes):
    """The mean distance of the pictures of the tuning prompts, from tuned.json where it has it."""
    words = ", ".join(f"{name} {value:g}" for name, value in changes.items())
    tried = read()[method]["tried"]
    if words not in tried:
        x0 = runs.distilled(method, PROMPTS["tuning"], **changes)["x0"]
        seen = features(decoded(asd.Prior.from_pretrained("tiny-sd"), x0))
        value = energy_distance(seen, SAMPLE_JOBS["tuning"].result()["features"]).mean().item()
        tried[words] = round(value, 4)
        keep(method, {"tried": tried})
    return tried[words]


def tune(part):
    """Tune this part of the methods ("1/2", …)."""
    with threads_of(part):
        with locked(FILE.parent, wait=True):      # once, whichever process comes first
            if not SAMPLE_JOBS["tuning"].file.exists():
                SAMPLE_JOBS["tuning"].run()
        for method in part_of(list(asd.METHODS), part):
            tune_method(method)


def tune_method(method):
    """Nine settings, then fewer steps, then other λ: keep the best of each."""
    with tqdm(total=9 + len(STEPS) + len(LAMBDAS), desc=f"tuning {method}", unit="run") as bar:
        nine = []
        for row in settings(method):
            nine.append(distance(method, **row, steps=FULL))
            bar.update()
        best = settings(method)[nine.index(min(nine))]
        steps = FULL
        for fewer in reversed(STEPS):
            if distance(method, **best, steps=fewer) <= min(nine) + NEAR:
                steps = fewer
            bar.update()
        keep(method, {"settings": best | {"steps": steps}})
        lams = {}
        for lam in LAMBDAS:
            lams[lam] = distance(method, **best, steps=steps, lam=lam)
            bar.update()
    keep(method, {"lam": min(lams, key=lams.get), "done": True})
