"""law.py — the law of a φ that lags: γ and κ act as guidance λ' = 1 + (1 + γ)(λ − 1)/κ.

Predicted: λ' from the κ that each run has logged. Measured: the λ of the SDS whose picture of the
same prompt has the same grain and distance; for a lone particle SDS is VSD with an exact φ, κ = 1.
The runs take five hours, so three numbers a prompt of each are committed, in claims/law/. In what
follows r is what the jobs returned, by key.
"""
import itertools
import math

import numpy as np
import torch

import asd
from claims import runs
from claims.measures import CONTROLS, LAMBDAS
from claims.pictures import TUNED, controls_of
from claims.work import COMMITTED, SOURCES, Claim, Job

GAMMAS, LAMS = (-0.75, -0.5, 0.0, 1.0, 10.0), LAMBDAS[:4]
GRID = list(itertools.product(GAMMAS, LAMS))
SATURATED = [(10.0, 7.5), (10.0, 15.0)]       # they look like SDS above 300, which hardly changes
NOTHING_LEARNT = (-0.75, 2.0)                 # a quarter of its κ are not above 0
LADDER = (1.0, 1.5, 2.25, 3.5, 5.0, 7.5, 11.0, 17.0, 30.0, 60.0, 120.0, 300.0, 1000.0, 1e4)   # λ'


# --------------------------------------------------------------------------------------- the jobs
def job(method, **changes):
    """The Job of a run with VSD's tuned settings and `changes`."""
    row = TUNED["vsd"]["settings"] | changes
    name = "-".join([method, *(f"{key}{value:g}" for key, value in changes.items())])
    minutes = row["steps"] * (0.013 if method == "sds" else 0.04)
    return Job(name, runs.looks, {"method": method} | row, minutes,
               (*SOURCES, "claims/measures.py"), COMMITTED / "law")


JOBS = {"controls": CONTROLS}
for gamma, lam in GRID:
    JOBS["law", gamma, lam] = job("vsd", gamma=gamma, lam=lam)
for lam in LADDER:
    JOBS["ladder", lam] = job("sds", lam=lam)


# ------------------------------------------------------------------------------------ the outcome
def curve(r, key):
    """Log grain and log distance of a run's pictures [N, 2]."""
    found = torch.stack([r[key]["grain"], r[key]["distance"]], 1)
    return found.clamp(min=1e-6).log()


def nearest_guidance(curves, ladder):
    """Log guidance of the SDS that looks most like each run: curves [N, 2], ladder [N, 14, 2].

    Nearest in log grain and log distance, each over its spread along the ladder, on straight lines
    between the ladder's guidances.
    """
    spread = ladder.std(1).mean(0).numpy()
    guidance = np.linspace(math.log(LADDER[0]), math.log(LADDER[-1]), 500)
    found = []
    for point, rungs in zip(curves.numpy(), ladder.numpy()):
        grain = np.interp(guidance, np.log(LADDER), rungs[:, 0])
        distance = np.interp(guidance, np.log(LADDER), rungs[:, 1])
        off = ((np.stack([grain, distance], 1) - point) / spread) ** 2
        found.append(guidance[off.sum(1).argmin()])
    return torch.tensor(found)


def both_guidances(r):
    """(log λ' predicted from the κ of each run, log guidance of the nearest SDS), [N, 20] each."""
    ladder = torch.stack([curve(r, ("ladder", lam)) for lam in LADDER], 1)
    predicted, nearest = [], []
    for gamma, lam in GRID:
        run = "law", gamma, lam
        kappas = r[run]["kappa"].double().clamp(min=1e-3).tolist()
        guidances = [asd.effective_guidance(lam, gamma, kappa) for kappa in kappas]
        predicted.append(torch.tensor(guidances, dtype=torch.float64).log())
        nearest.append(nearest_guidance(curve(r, run), ladder))
    return torch.stack(predicted, 1), torch.stack(nearest, 1)


def slopes(r, chosen=tuple(GRID)):
    """Of each prompt the slope of measured against predicted log guidance, − 1, of some runs."""
    predicted, nearest = both_guidances(r)
    part = [GRID.index(run) for run in chosen]
    return [np.polyfit(x[part], y[part], 1)[0] - 1
            for x, y in zip(predicted.numpy(), nearest.numpy())]


def log_range(r, gamma):
    """Log of the largest over the least distance over LAMS [N]."""
    distances = torch.stack([r["law", gamma, lam]["distance"] for lam in LAMS])
    return (distances.amax(0) / distances.amin(0)).log()


def numbers(r):
    """κ of each run, and both guidances; slopes of some runs; what γ < 0 does at the same rates."""
    predicted, nearest = both_guidances(r)
    rows = {}
    for i, (gamma, lam) in enumerate(GRID):
        rows[f"γ {gamma:g}, λ {lam:g}"] = {
            "κ": r["law", gamma, lam]["kappa"], "log λ' predicted": predicted[:, i],
            "log λ' measured": nearest[:, i]}
    sure = [run for run in GRID if run not in SATURATED]
    below = [run for run in GRID if run[0] < 0]
    parts = {"without γ 10, λ ≥ 7.5": sure,
             "without these and γ −0.75, λ 2": [run for run in sure if run != NOTHING_LEARNT],
             "γ −0.75 and −0.5 alone": below,
             "the same without γ −0.75, λ 2": [run for run in below if run != NOTHING_LEARNT],
             "γ 0 and 1 alone": [run for run in GRID if run[0] in (0.0, 1.0)]}
    for name, part in parts.items():
        rows[name] = {"slope − 1": slopes(r, part)}
    for gamma in (-0.75, -0.5):
        rows[f"γ 0 minus γ {gamma:g}"] = {
            "log-range of the distance over λ": log_range(r, 0.0) - log_range(r, gamma),
            "distance at λ 7.5": r["law", 0.0, 7.5]["distance"] - r["law", gamma, 7.5]["distance"]}
    return rows


def draw(path, r):
    """Measured against predicted guidance: a point for each γ and λ, its prompts' mean and 95 %.

    Grey: guidances above which the pictures of SDS hardly change.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    predicted, nearest = both_guidances(r)
    figure, axes = plt.subplots(figsize=(6.4, 5.2), dpi=130)
    x, y = predicted.mean(0), nearest.mean(0)
    across = 1.96 * predicted.std(0) / len(predicted) ** 0.5
    up = 1.96 * nearest.std(0) / len(nearest) ** 0.5
    for i, gamma in enumerate(GAMMAS):
        part = slice(4 * i, 4 * i + 4)
        axes.errorbar(x[part], y[part], up[part], across[part], capsize=3, linestyle=":",
                      color=f"C{i}", label=f"γ = {gamma:g}")
        for j, marker in enumerate("osD^"):
            axes.plot(x[4 * i + j], y[4 * i + j], marker, color=f"C{i}")
    for lam, marker in zip(LAMS, "osD^"):
        axes.plot([], [], marker, color="black", label=f"λ = {lam:g}")
    ends = np.log([5, 3000])
    axes.plot(ends, ends, color="grey", linestyle="--", label="the law")
    axes.axhspan(np.log(300), ends[1], color="0.9")
    ticks = [5, 10, 30, 100, 300, 1000]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.log(ticks), [str(tick) for tick in ticks])
    axes.set(xlim=np.log([5, 700]), ylim=ends)
    axes.set_xlabel("guidance predicted: λ' = 1 + (1 + γ)(λ − 1)/κ, κ logged in the run")
    axes.set_ylabel("guidance measured: of the SDS that looks most alike")
    axes.legend(ncols=2, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


CLAIMS = {"law": Claim(
    "γ and φ's lag act as guidance λ' = 1 + (1 + γ)(λ − 1)/κ", "ours", JOBS,
    "slope of log measured on log predicted guidance, minus 1", "", 0.1, slopes, draw,
    controls_of("grain", "distance"), numbers, ours=True, equality=True,
    remark="Where less than 33 is measured, the law predicts more: what is measured is 0.4 to 0.8 "
           "times the prediction, and at γ −0.75, λ 2, where a quarter of the κ are not above 0, "
           "0.2 times. At γ 1 with λ ≥ 7.5 and at γ 10 with λ 2 the two agree. Two places pull "
           "at the slope: γ 10 with λ ≥ 7.5 upwards (above 300 the pictures of SDS hardly change, "
           "so a run there has no sure place), and γ −0.75, λ 2 downwards (κ below 0.001 counts as "
           "0.001). The end of the table has it without them: still above 1 without both.")}
