"""edits.py — Eq. 11 and Delta Denoising Score: sixty edits of the paper's three kinds, Fig. 9."""
from dataclasses import replace

import torch

import asd
import editing
from claims.pictures import LATE, SIDE, SMALL, OwnLoRA, features, keep_late, minus
from claims.work import Claim, Job, numbers_of
from cli.pictures import picture_measures, sheet, to_bytes
from prior import ddim_samples
from tiny.data import articled
from tiny.judge import clip_features, distances

# neighbours are alike, as replacement makes each the next one
CONCEPTS = """fox,cat,dog,tiger,lion,panda,penguin,owl,frog,snail,whale,red apple,cherries,
strawberry,pineapple,hamburger,pizza,mushroom,rocket,guitar""".replace("\n", "").split(",")
KINDS = {  # kind of edit: the style before and after, how far down the list the concept moves
    "simplification": ("a 3d render of", "a flat icon of", 0),
    "refinement": ("a flat icon of", "a 3d render of", 0),
    "replacement": ("a 3d render of", "a 3d render of", 1),
}
# what edits: a method, and a reading of the second discriminator's Eq. 9 (editing.Edit)
ROWS = {"dds": ("dds", "eq9"), "asd": ("asd", "eq9"), "swapped": ("asd", "swapped"),
        "both": ("asd", "both"), "lmc": ("lmc", "eq9")}


def edit_prompts(kind):
    """([20 source prompts], [20 targets])."""
    before, after, further = KINDS[kind]
    moved = CONCEPTS[further:] + CONCEPTS[:further]
    return ([f"{before} {articled(concept)}" for concept in CONCEPTS],
            [f"{after} {articled(concept)}" for concept in moved])


def sampled(prior, prompts, seed):
    """The prior's own pictures, each from its own noise -> RGB [N, 3, H, W]."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *prior.shape, generator=rng)
    return prior.decode(ddim_samples(prior, prompts, noise)).cpu()


def edited(kind, row):
    """Twenty samples of the prior, edited; each with a φ_y and a φ_z of its own.

    -> {"before", "unrelated" (a picture of the target that does not know the source): uint8
    [20, 3, H, W], "late": [5, 20, 3, H, W] at LATE of the steps}.
    """
    prior, (method, phi_z) = asd.Prior.from_pretrained("tiny-sd"), ROWS[row]
    method, late = replace(editing.methods()[method], phi_z=phi_z), []
    if method.phi is asd.LoRAPhi:
        method = replace(method, phi=OwnLoRA)
    sources, targets = edit_prompts(kind)
    before, unrelated = sampled(prior, sources, 0), sampled(prior, targets, 1)
    editing.edit(prior, before, sources, targets, method, callback=keep_late(late, method.steps))
    return {"before": to_bytes(before), "unrelated": to_bytes(unrelated),
            "late": torch.stack(late)}


JOBS = {}
for kind in KINDS:
    for row in ROWS:
        JOBS[kind, row] = Job(f"edit-{kind}-{row}", edited, {"kind": kind, "row": row}, 2.0)


# -------------------------------------------------------------------------- measures, tests, figure
def pairs(results, kind, row):
    """(before, after): uint8 [20, 3, H, W] each; row: of ROWS, or "before" or "unrelated"."""
    if row in ROWS:
        result = results[kind, row]
        return result["before"], result["late"][-1]
    result = results[kind, "dds"]
    return result["before"], result[row]


def measured(results, row):
    """{measure: [60]} of the edits by a row, or of "before" or "unrelated"; kind after kind.

    tiny.judge.distances', cli.pictures.picture_measures', and background: 1 − the root mean square
    change of the pixels that are white in the source.
    """
    found = {}
    for kind in KINDS:
        before, after = pairs(results, kind, row)
        for x, y, source, target in zip(before / 255, after / 255, *edit_prompts(kind)):
            white = (x > 0.97).all(0)
            change = (x - y)[:, white].square().mean().sqrt().item() if white.any() else 0.0
            numbers = distances(x[None], y[None], source, target) | picture_measures(y[None])
            for measure, number in (numbers | {"background": 1 - change}).items():
                found.setdefault(measure, []).append(number)
    return found


def of_kind(values, kind):
    first = list(KINDS).index(kind) * len(CONCEPTS)
    return values[first:first + len(CONCEPTS)]


def tests_9(results):
    ours, dds = measured(results, "asd"), measured(results, "dds")
    before, unrelated = measured(results, "before"), measured(results, "unrelated")
    scores = minus(ours["clip_target"], dds["clip_target"])
    sharper = minus(before["sharpness"], ours["sharpness"])
    tests = {f"{kind}: score with the target, ASD − DDS": of_kind(scores, kind) for kind in KINDS}
    return tests | {
        "simplification: sharpness, source − ASD": of_kind(sharper, "simplification"),
        "the source is kept: distance, unrelated picture − ASD": minus(
            unrelated["clip_distance"], ours["clip_distance"]),
        "its background is kept: unrelated picture's change − ASD's": minus(
            ours["background"], unrelated["background"])}


def tests_lmc(results):
    lmc, dds = measured(results, "lmc"), measured(results, "dds")
    return {"score with the target, LMC − DDS": minus(lmc["clip_target"], dds["clip_target"]),
            "PSNR to the source, LMC − DDS": minus(lmc["psnr"], dds["psnr"])}


def numbers(*rows):
    """A function that makes the table of some rows, of the sources and of unrelated pictures."""
    def table(results):
        return numbers_of({row: measured(results, row) for row in ("before", "unrelated", *rows)})
    return table


def drawn(*rows, example=(0, 2, 6)):
    """Fig. 9: of each kind the source, then for each row its progress; the target's score."""
    def figure(path, results):
        lines = []
        for kind, i in zip(KINDS, example):
            target = edit_prompts(kind)[1][i]
            (text,), = clip_features([], [target])
            for row in rows:
                before, late = results[kind, row]["before"], results[kind, row]["late"]
                shown = torch.stack([before[i], *late[[0, 2, 4], i]])
                notes = [f"{score:.2f}" for score in features(shown)[0] @ text]
                lines.append((f"{kind}, {row.upper()}\n-> {target}", shown / 255, notes))
        sheet(path, ["source", *(f"{LATE[i]:.0%} of the steps" for i in (0, 2, 4))], lines, SIDE,
              left=240, corner="tiny-clip's score of the target", colors=256)
    return figure


def claim(title, says, tests, rows, shown, seen=""):
    jobs = {key: job for key, job in JOBS.items() if key[1] in rows}
    return Claim(title, says, jobs, tests, drawn(*shown), numbers(*rows), SMALL + seen)


CLAIMS = {
    "9": claim("editing: ASD simplifies, refines and replaces better than DDS", "Fig. 9, §6",
               tests_9, ["dds", "asd", "swapped", "both"], ["dds", "asd"]),
    "LMC, editing": claim("LMC-SDS edits better than DDS", "2401.05293", tests_lmc,
                          ["dds", "lmc"], ["dds", "lmc"],
                          "; its λ is 2, so that at DDS's rate and steps it goes a shorter way"),
}
