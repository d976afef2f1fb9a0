"""edits.py — Eq. 11 against Delta Denoising Score: forty edits of the paper's kinds, Fig. 9."""
import numpy as np
import torch

from claims import runs
from claims.measures import PROMPTS, features
from claims.pictures import SHOWN, SIDE, short
from claims.work import SOURCES, Claim, Job
from cli.pictures import sheet
from tiny.data import STYLES
from tiny.judge import load_judge, text_features
from tiny.solids import COLORS

RENDER, ICON, DRAWING = STYLES
# four rates, or guidances, of each method: how far it goes
ROWS = {"dds": ("lr", (0.015, 0.03, 0.06, 0.12)), "asd": ("lr", (0.015, 0.03, 0.06, 0.12)),
        "flowedit": ("lam", (1.5, 2.0, 3.0, 4.5))}


def edit_prompts():
    """The test prompts and what each is to become.

    Renders become icons (simplification) and icons renders (refinement); a drawn thing becomes the
    next one, a solid gets the next colour (replacement).
    """
    sources, targets = PROMPTS["test"], []
    drawings = [prompt for prompt in sources if prompt.startswith(DRAWING)]
    colors = list(COLORS)
    for prompt in sources:
        if prompt.startswith(RENDER):
            target = prompt.replace(RENDER, ICON)
        elif prompt.startswith(ICON):
            target = prompt.replace(ICON, RENDER)
        elif prompt.startswith(DRAWING):
            target = drawings[(drawings.index(prompt) + 1) % len(drawings)]
        else:
            color = prompt.split()[1]
            target = prompt.replace(color, colors[(colors.index(color) + 1) % len(colors)])
        targets.append(target)
    return sources, targets


BEFORE, AFTER = edit_prompts()
JOBS = {}
for method, (name, values) in ROWS.items():
    for value in values:
        JOBS[method, value] = Job(
            f"edit-{method}-{value:g}", runs.edited,
            {"method": method, "sources": BEFORE, "targets": AFTER, name: value},
            12 if method == "asd" else 3, (*SOURCES, "editing.py"))


def psnr(a, b):
    return -10 * (a - b).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def curves(r, method):
    """(score with the target, PSNR to the source): [N, 5] each, of the source and the four rates.

    PSNR of the source itself is that of an edit nobody sees, 40 dB.
    """
    before = r[method, ROWS[method][1][0]]["before"]
    texts = text_features(*load_judge(), AFTER)
    scores, kept = [(features(before) * texts).sum(1)], [torch.full((len(before),), 40.0)]
    for value in ROWS[method][1]:
        after = r[method, value]["after"]
        scores.append((features(after) * texts).sum(1))
        kept.append(psnr(before, after).clamp(max=40))
    return torch.stack(scores, 1).double(), torch.stack(kept, 1).double()


def psnr_at(score, scores, kept):
    """The PSNR of one edit where it first reaches a score, on lines between its rates."""
    best = np.maximum.accumulate(scores)
    rises = np.diff(best, prepend=-np.inf) > 0
    return np.interp(score, best[rises], np.asarray(kept)[rises])


def at_equal_score(r, a, b):
    """PSNR of method a − that of b at the highest score that both reach, edit by edit [N]."""
    differences = []
    for scores_a, kept_a, scores_b, kept_b in zip(*curves(r, a), *curves(r, b)):
        score = min(scores_a.max(), scores_b.max())
        differences.append(psnr_at(score, scores_a, kept_a) - psnr_at(score, scores_b, kept_b))
    return differences


def numbers(r):
    rows = {}
    for method, (name, values) in ROWS.items():
        scores, kept = curves(r, method)
        for i, value in enumerate(values):
            rows[f"{method.upper()}, {name} {value:g}"] = {"score": scores[:, i + 1],
                                                           "PSNR to the source": kept[:, i + 1]}
    rows["FLOWEDIT − DDS"] = {"PSNR at equal score": at_equal_score(r, "flowedit", "dds")}
    return rows


def draw(path, r):
    """Eight edits: the source, then each method at its second rate, or guidance."""
    rows = [("source", r["dds", 0.03]["before"][SHOWN])]
    for method, (name, values) in ROWS.items():
        rows.append((f"{method.upper()},\n{name} {values[1]:g}",
                     r[method, values[1]]["after"][SHOWN]))
    sheet(path, [short(AFTER[i]) for i in SHOWN], rows, SIDE, corner="the target prompts")


CLAIMS = {"9": Claim(
    "editing: ASD is better than DDS", "Fig. 9, §6", JOBS,
    "PSNR to the source at equal score with the target, ASD − DDS", "dB", 0.5,
    lambda r: at_equal_score(r, "asd", "dds"), draw, numbers=numbers,
    remark="At the smallest rate ASD stays nearer to the source than DDS, at the two largest it "
           "goes farther. In half of the edits the best score is at the smallest rate tried. To "
           "the eye FlowEdit is the cleanest; by this outcome it is undecided against DDS, too.")}
