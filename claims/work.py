"""work.py — what every claim is made of: runs that are kept, one primary outcome, a verdict.

A Job is a function and its arguments. What it returns, tensors by name, is kept in outputs/claims/,
in a file whose name ends in a key of the code, the weights and the arguments it was made with. A
Claim names its jobs, and turns what they returned into one paired difference for each prompt.
"""
import functools
import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from scipy.stats import ttest_1samp
from tqdm import tqdm

from prior import HERE, UserError
from tiny.training import save_tensors, threads_kept

KEPT = Path("outputs/claims")
COMMITTED = HERE / "claims"       # of the jobs that most others need: the prior's samples
RULE = (
    "Each claim has one primary outcome, named in the code before any run: a difference that is "
    "positive where the paper is right, paired by prompt (by solid, mixture or round of timing "
    "where there are no prompts), and δ, the difference that would matter in practice. The verdict "
    "is read off the mean's 95 % interval by Student's t: above 0, «holds»; below 0, «the other "
    "way round»; inside ±δ, «no difference»; else «undecided». Where a claim is that two things "
    "are equal, an interval inside ±δ is «holds», one that ends below −δ or begins above δ «the "
    "other way round»: they differ. This reading of equality came after the first numbers of the "
    "law and of §7's speed: until then they were «holds» and «no difference». All other numbers "
    "are shown and count for nothing; a claim's own module, or claims/measures.py, says what they "
    "measure. The measures were chosen on controls alone, on prompts that no claim uses; the "
    "settings on ten tuning prompts, none of them a test prompt.")


# ------------------------------------------------------------------------------------------ jobs
@functools.cache
def code_key(*patterns):
    """10 digits of the files' contents, and of the versions of the packages that run them."""
    digest = hashlib.sha256()
    for name in ("torch", "diffusers", "peft"):
        digest.update(version(name).encode())
    for pattern in patterns:
        for file in sorted(HERE.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


# what most runs depend on, beside the module that defines them
SOURCES = ("asd.py", "prior.py", "phi.py", "tiny/*/**/*.safetensors", "tiny/judge.py")


@dataclass(frozen=True, eq=False)
class Job:
    """function(**arguments) -> {name: tensor}, once. minutes: what it takes, one thread of two.

    sources: patterns of the files, beside the function's own, that its result depends on. folder:
    where the result is kept, in place of KEPT.
    """
    name: str
    function: Callable
    arguments: dict
    minutes: float
    sources: tuple = SOURCES
    folder: Path | None = None

    @property
    def file(self):
        """Where the result is kept."""
        module = self.function.__module__.replace(".", "/") + ".py"
        key = code_key(module, *self.sources)
        arguments = hashlib.sha256(repr(sorted(self.arguments.items())).encode()).hexdigest()[:6]
        return (self.folder or KEPT) / f"{self.name}-{arguments}-{key}.safetensors"

    def result(self):
        """Return what the function returned. UserError where it has not been run."""
        if not self.file.exists():
            raise UserError(f"{self.file} is not there: run the claim first")
        return load_file(self.file)

    def run(self):
        """Call the function and keep what it returns."""
        file = self.file               # named by the code that runs, whatever is edited meanwhile
        result = self.function(**self.arguments)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, result)


def part_of(items, part):
    """Every N-th item, from the I-th on, of part "I/N". UserError for another word."""
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--part {part} is no part: 1/2 is the first of two")
    return items[int(number) - 1::int(parts)]


@contextmanager
def threads_of(part):
    """One thread where there are several parts: the other processes have the other cores."""
    with threads_kept():
        if not part.endswith("/1"):
            torch.set_num_threads(1)
        yield


def make(jobs, part="1/1"):
    """Run this part ("1/2", …) of the jobs, but for those that are kept. -> whether all are now."""
    missing = [job for job in part_of(jobs, part) if not job.file.exists()]
    minutes = round(sum(job.minutes for job in missing))
    with threads_of(part), tqdm(total=minutes, desc=f"part {part}", unit="min",
                                disable=not missing) as bar:
        for job in missing:
            bar.set_postfix_str(job.name)
            if not job.file.exists():             # another process may have run it
                job.run()
            bar.update(job.minutes)
    return all(job.file.exists() for job in jobs)


# ------------------------------------------------------------------------- outcomes and verdicts
@dataclass(frozen=True)
class Claim:
    """title and says: what the paper says, and where. jobs {key: Job}. outcome, unit, delta: the
    primary outcome in words, and the difference that would matter. values(what the jobs returned
    by key) -> one paired difference for each prompt, positive where the paper is right.

    controls(…) -> {what must be positive if the measure sees what the claim is about: numbers}.
    numbers(…) -> more of the table, {row: {column: numbers}}. figure(path, …) draws. ours: the
    paper does not say it. equality: the claim is that the outcome is 0, within δ. remark: what one
    should know of its numbers and pictures, written after looking at them.
    """
    title: str
    says: str
    jobs: dict
    outcome: str
    unit: str
    delta: float
    values: Callable
    figure: Callable | None
    controls: Callable = field(default=lambda results: {})
    numbers: Callable = field(default=lambda results: {})
    ours: bool = False
    equality: bool = False
    remark: str = ""

    def record(self, results):
        """Return what claims.json has about the claim; results: what its jobs returned."""
        values = [float(value) for value in self.values(results)]
        return {
            "claim": self.title, "paper": self.says,
            "verdict": verdict(values, self.delta, self.equality),
            "ours": self.ours, "equality": self.equality,
            "primary": {"name": self.outcome, "unit": self.unit, "delta": self.delta,
                        "values": values},
            "controls": summaries(self.controls(results)),
            "numbers": {row: summaries(columns)
                        for row, columns in self.numbers(results).items()},
            "made of": self.made_of()}

    def made_of(self):
        """The files of its jobs: their names tell whether a record is of today's code."""
        return sorted({job.file.name for job in self.jobs.values()})


def interval(values):
    """Numbers, at least two -> the mean, and its 95 % interval by Student's t."""
    values = torch.as_tensor(values, dtype=torch.float64)
    mean = values.mean().item()
    if values.std() == 0:                         # scipy's interval is then not a number
        return mean, mean, mean
    found = ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    return mean, float(found.low), float(found.high)


def verdict(values, delta, equality=False):
    """RULE: paired differences -> one of its four verdicts. equality: the claim is that it is 0."""
    _, low, high = interval(values)
    if equality:
        if -delta < low and high < delta:
            return "holds"
        return "the other way round" if low > delta or high < -delta else "undecided"
    if low > 0:
        return "holds"
    if high < 0:
        return "the other way round"
    if -delta < low and high < delta:
        return "no difference"
    return "undecided"


def summaries(columns):
    """{name: numbers} -> {name: [mean, low, high]}; a single number stays one."""
    found = {}
    for name, numbers in columns.items():
        numbers = torch.as_tensor(numbers, dtype=torch.float64).flatten()
        found[name] = list(interval(numbers)) if len(numbers) > 1 else numbers.item()
    return found
