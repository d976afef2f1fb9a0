"""tuning.py — the settings of the claims: `python -m claims tune` writes claims/tuned.json.

Each method gets the same budget on the ten tuning prompts, which no claim uses, by the distance to
the prior's samples: nine settings of θ's rate, its end and φ's rate, 350 steps; then the fewest
steps that are within δ of those; then the λ of the least distance.
"""
import itertools
import json

import torch

import asd
from claims import runs
from claims.measures import (
    LAMBDAS,
    NEAR,
    PROMPTS,
    decoded,
    energy_distance,
    features,
    samples,
)
from claims.work import SOURCES, Job
from cli.files import write_text
from prior import HERE

LR, LR_END, PHI_LR = (0.01, 0.02, 0.04), (1.0, 0.3, 0.1), (3e-4, 1e-3, 3e-3)
STEPS = (60, 90, 120, 175, 250)
FULL = 350


def settings():
    """Nine of the 27: each pair of values of two of the three once (an orthogonal array)."""
    return [{"lr": LR[i], "lr_end": LR_END[j], "phi_lr": PHI_LR[(i + j) % 3]}
            for i, j in itertools.product(range(3), range(3))]


def tuned(method):
    """-> {"distances": means over the tuning prompts of the nine settings, then of STEPS, then of
    LAMBDAS, "chosen": which of each}"""
    prior, reference = asd.Prior.from_pretrained("tiny-sd"), samples("tuning")["features"]

    def distance(**changes):
        x0 = runs.distilled(method, PROMPTS["tuning"], **changes)["x0"]
        return energy_distance(features(decoded(prior, x0)), reference).mean().item()
    nine = [distance(steps=FULL, **row) for row in settings()]
    best = min(range(9), key=nine.__getitem__)
    row = settings()[best]
    shorter = [distance(steps=steps, **row) for steps in STEPS]
    steps = FULL
    for fewer, value in reversed(list(zip(STEPS, shorter))):
        if value <= nine[best] + NEAR:
            steps = fewer
    lams = [distance(steps=steps, lam=lam, **row) for lam in LAMBDAS]
    lam = min(range(len(lams)), key=lams.__getitem__)
    return {"distances": torch.tensor(nine + shorter + lams),
            "chosen": torch.tensor([best, steps, lam])}


JOBS = {method: Job(f"tuned-{method}", tuned, {"method": method}, 25 if method == "sds" else 90,
                    SOURCES + ("claims/runs.py", "claims/measures.py")) for method in asd.METHODS}


def write():
    """Write claims/tuned.json from what the jobs returned."""
    table = {}
    for method, job in JOBS.items():
        result = job.result()
        best, steps, lam = result["chosen"].tolist()
        row = settings()[best] | {"steps": steps}
        if asd.METHODS[method].phi is asd.NoisePhi:
            del row["phi_lr"]
        table[method] = {"settings": row, "lam": LAMBDAS[lam],
                         "distances": [round(x, 4) for x in result["distances"].tolist()]}
    write_text(HERE / "claims/tuned.json", json.dumps(table, indent=1) + "\n")
