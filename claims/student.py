"""student.py — §4 and [33]: the generator may be a network. A one-step student of tiny-sd."""
import warnings

import torch
from torch import nn

from claims import runs
from claims.measures import PROMPTS, SAMPLE_JOBS, decoded, features
from claims.pictures import SHOWN, SIDE, short
from claims.work import Claim, Job
from cli.pictures import sheet
from prior import Prior

TEST = PROMPTS["test"]
NUMBER = 32                     # pictures of a prompt
JOBS = {"samples": SAMPLE_JOBS["test"]}
for method, minutes in ((None, 1), ("sds", 12), ("asd", 45)):
    JOBS[method or "start"] = Job(f"student-{method or 'start'}", runs.student,
                                  {"method": method, "prompts": TEST, "number": NUMBER}, minutes)


def kid(real, fake):
    """The kernel distance (KID, 1801.01401) of unit vectors [N, D] each -> a number.

    MMD² without bias, of all N at once; it may be negative. KID's kernel (⟨a, b⟩/d + 1)³, but 1 in
    place of 1/d, as tiny-clip's features are of length 1, Inception's of about √d.
    """
    from torchmetrics.image.kid import KernelInceptionDistance
    with warnings.catch_warnings():               # that it keeps the features
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=len(real), gamma=1.0)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()[0].item()


def kids(r, name):
    """KID of a student's pictures to as many of the prior's samples, prompt by prompt [N]."""
    prior, found = Prior.from_pretrained("tiny-sd"), []
    for x0, reference in zip(r[name]["x0"], r["samples"]["features"], strict=True):
        found.append(kid(reference[:NUMBER], features(decoded(prior, x0))))
    return torch.tensor(found, dtype=torch.float64)


def floor(r):
    """KID of the other half of the prior's samples to the first."""
    return torch.tensor([kid(x[:NUMBER], x[NUMBER:2 * NUMBER]) for x in r["samples"]["features"]])


def numbers(r):
    rows = {name: {"KID": kids(r, name)} for name in ("start", "sds", "asd")}
    return rows | {"the prior's samples": {"KID": floor(r)}}


def draw(path, r):
    prior = Prior.from_pretrained("tiny-sd")
    rows = [("samples", decoded(prior, r["samples"]["x0"][SHOWN, 0]))]
    for name, label in (("start", "the start"), ("sds", "SDS student"), ("asd", "ASD student")):
        rows.append((label, decoded(prior, r[name]["x0"][SHOWN, 0])))
    sheet(path, [short(TEST[i]) for i in SHOWN], rows, SIDE)


def claim(title, says, outcome, far, figure, remark, ours=False):
    return Claim(title, says, JOBS, outcome, "in tiny-clip's features", 0.1,
                 lambda r: kids(r, far) - kids(r, "asd"), figure, numbers=numbers, ours=ours,
                 remark=remark)


CLAIMS = {
    "33": claim("a general generator, a one-step student, can be distilled by ASD", "§4, [33]",
                "KID, the start − ASD's student", "start", draw,
                "In 400 steps a copy of the prior's network, which makes blotches in one step, "
                "learns to make the thing in one. It is not yet as good as fifty steps of the "
                "prior, whose other samples are at 0."),
    "33, SDS": claim("ASD's student is better than SDS's", "ours", "KID, SDS's student − ASD's",
                     "sds", None,
                     "SDS's pictures are smooth, ASD's have more texture, and some grain. Each was "
                     "trained once: the interval is over prompts, not over trainings.", ours=True),
}
