"""edits.py — Eq. 11 and Delta Denoising Score: sixty edits of the paper's three kinds, Fig. 9."""
from dataclasses import replace

import torch

import asd
import editing
from claims.pictures import LATE, SIDE, SMALL, OwnLoRA, features, keep_late, minus, to_bytes
from claims.work import Claim, Job, mean_and_error
from export import picture_measures, sheet
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


JOBS = {(kind, row): Job(f"edit-{kind}-{row}", edited, {"kind": kind, "row": row}, 2.0)
        for kind in KINDS for row in ROWS}


# -------------------------------------------------------------------------- measures, tests, figure
def measured(results, row):
    """{measure: [60]} of the edits by a row, or of "before" or "unrelated"; kind after kind.

    tiny.judge.distances', export.picture_measures', and background: 1 − the root mean square change
    of the pixels that are white in the source.
    """
    found = []
    for kind in KINDS:
        r = results[kind, row if (kind, row) in results else "dds"]
        after = r[row] if row in r else r["late"][-1]
        for x, y, z, t in zip(r["before"] / 255, after / 255, *edit_prompts(kind)):
            white = (x > 0.97).all(0)
            change = (x - y)[:, white].square().mean().sqrt().item() if white.any() else 0.0
            found.append(distances(x[None], y[None], z, t) | picture_measures(y[None])
                         | {"background": 1 - change})
    return {key: [one[key] for one in found] for key in found[0]}


def of_kind(values, kind):
    i = list(KINDS).index(kind) * len(CONCEPTS)
    return values[i:i + len(CONCEPTS)]


def tests_9(r):
    ours, dds, before, unrelated = (measured(r, row) for row in (
        "asd", "dds", "before", "unrelated"))
    tests = {f"{kind}: score with the target, ASD − DDS": of_kind(
        minus(ours["clip_target"], dds["clip_target"]), kind) for kind in KINDS}
    return tests | {
        "simplification: sharpness, source − ASD": of_kind(
            minus(before["sharpness"], ours["sharpness"]), "simplification"),
        "the source is kept: distance, unrelated picture − ASD": minus(
            unrelated["clip_distance"], ours["clip_distance"]),
        "its background is kept: unrelated picture's change − ASD's": minus(
            ours["background"], unrelated["background"])}


def tests_lmc(r):
    ours, dds = measured(r, "lmc"), measured(r, "dds")
    return {"score with the target, LMC − DDS": minus(ours["clip_target"], dds["clip_target"]),
            "PSNR to the source, LMC − DDS": minus(ours["psnr"], dds["psnr"])}


def numbers(*rows):
    def table(r):
        return {row: {key: mean_and_error(each) for key, each in measured(r, row).items()}
                for row in ("before", "unrelated", *rows)}
    return table


def drawn(*names, example=(0, 2, 6)):
    """Fig. 9: of each kind the source, then for each row its progress; the target's score."""
    def figure(path, r):
        lines = []
        for kind, i in zip(KINDS, example):
            target = edit_prompts(kind)[1][i]
            for row in names:
                late = r[kind, row]["late"]
                shown = torch.stack([r[kind, row]["before"][i], *late[[0, 2, 4], i]])
                (text,), = clip_features([], [target])
                notes = [f"{x:.2f}" for x in features(shown)[0] @ text]
                lines.append((f"{kind}, {row.upper()}\n-> {target}", shown / 255, notes))
        sheet(path, ["source", *(f"{LATE[i]:.0%} of the steps" for i in (0, 2, 4))], lines, SIDE,
              left=240, corner="tiny-clip's score of the target", colors=256)
    return figure


def claim(title, says, tests, rows, shown, seen=""):
    jobs = {key: one for key, one in JOBS.items() if key[1] in rows}
    return Claim(title, says, jobs, tests, drawn(*shown), numbers(*rows), SMALL + seen)


CLAIMS = {
    "9": claim("editing: ASD simplifies, refines and replaces better than DDS", "Fig. 9, §6",
               tests_9, ["dds", "asd", "swapped", "both"], ["dds", "asd"]),
    "LMC, editing": claim("LMC-SDS edits better than DDS", "2401.05293", tests_lmc,
                          ["dds", "lmc"], ["dds", "lmc"],
                          "; its λ is 2, so that at DDS's rate and steps it goes a shorter way"),
}
