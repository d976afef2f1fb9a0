"""work.py — what every claim is made of: jobs that are kept, paired differences, a verdict.

A Job is a function and its arguments; what it returns, tensors by name, is kept in outputs/claims/
in a file whose name ends in a key of all that it depends on: the weights in tiny/, the packages
that run them, the arguments, the source files. A Claim names its jobs and turns what they returned
into tests; one rule turns the tests into a verdict.
"""
import ast
import functools
import hashlib
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from scipy.stats import t as student_t
from tqdm import tqdm

from prior import HERE, UserError
from tiny.corrective import fingerprint
from tiny.training import save_tensors, threads_kept

KEPT = Path("outputs/claims")
RULE = (
    "Each test is a difference that the paper says is positive, paired run by run (the same prompt "
    "or solid and seed; seeds of one prompt or solid are averaged first). It is sure where 0 is "
    "outside its 95 % interval by Student's t. The claim holds if all its tests are surely "
    "positive; it does not hold here if one is surely negative; else it is undecided, as it is "
    "where a control, which says that the measure sees what the claim is about, is not surely "
    "positive. Tests of ours, which the paper does not say, count for no verdict. (Added after the "
    "first runs: the average over seeds and t, both stricter, controls, what is ours.)")


# ------------------------------------------------------------------------------------------ keys
# the source files that runs depend on, tests aside, beside the module that defines the run
SOURCES = ("*.py", "cli/settings.py", "tiny/*.py", "claims/pictures.py")


def source_digest(*files):
    """8 digits of what Python files say; comments and layout do not count."""
    return fingerprint(*(ast.dump(ast.parse(file.read_text("utf-8"))) for file in files))


@functools.cache
def shared_digest():
    """A digest of SOURCES, of the embedded models, and of the packages that run them."""
    sources, weights = [], []
    for pattern in SOURCES:
        sources += HERE.glob(pattern)
    for pattern in ("tiny/*/**/*.json", "tiny/*/**/*.txt", "tiny/**/*.safetensors"):
        weights += HERE.glob(pattern)
    sources = [file for file in sources if not file.name.startswith(("test_", "conftest"))]
    packages = [version(name) for name in ("torch", "diffusers", "peft")]
    return fingerprint(source_digest(*sorted(sources)), packages,
                       *(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(weights)))


@functools.cache
def module_digest(name):
    """A digest of the source of a module that is imported."""
    return source_digest(Path(sys.modules[name].__file__))


# ------------------------------------------------------------------------------------------ jobs
@dataclass(frozen=True, eq=False)
class Job:
    """function(**arguments) -> {name: tensor}, once. minutes: what it takes, one thread of two."""
    name: str
    function: Callable
    arguments: dict
    minutes: float

    @property
    def file(self):
        """Where the result is kept."""
        module = module_digest(self.function.__module__)
        key = fingerprint(shared_digest(), module, self.arguments)
        return KEPT / f"{self.name}-{key}.safetensors"

    def result(self):
        """Return what the function returned. UserError where it has not been run."""
        if not self.file.exists():
            raise UserError(f"{self.file} is not there: run the claim first")
        return load_file(self.file)

    def run(self):
        """Call the function and keep what it returns."""
        result = self.function(**self.arguments)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.file, result)


def make(jobs, part="1/1"):
    """Run this part ("1/2", …) of the jobs, but for those that are kept. -> whether all are now."""
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--part {part} is no part: 1/2 is the first of two")
    own_jobs = jobs[int(number) - 1::int(parts)]
    missing = [job for job in own_jobs if not job.file.exists()]
    minutes = round(sum(job.minutes for job in missing))
    with threads_kept(), tqdm(total=minutes, desc=f"part {part}", unit="min",
                              disable=not missing) as bar:
        if int(parts) > 1:
            torch.set_num_threads(1)              # the other processes have the other cores
        for job in missing:
            bar.set_postfix_str(job.name)
            if not job.file.exists():             # another process may have run it
                job.run()
            bar.update(job.minutes)
    return all(job.file.exists() for job in jobs)


# ---------------------------------------------------------------------------- tests and verdicts
@dataclass(frozen=True)
class Claim:
    """title and says: what the paper says, and where. jobs {key: Job}. tests(what the jobs returned
    by key) -> {what is compared: its paired differences, positive if the paper is right}; a name
    may begin with "control: " or "ours: ". clusters: difference i is of prompt or solid i %
    clusters; None: each has one of its own. figure(path, what the jobs returned) draws. numbers(…)
    -> more of the table, {row: {measure: value}}. limits: why the miniature may be no judge of it.
    """
    title: str
    says: str
    jobs: dict
    tests: Callable
    figure: Callable | None = None
    numbers: Callable | None = None
    limits: str = ""
    clusters: int | None = None

    def record(self, results):
        """Return what claims.json has about the claim; results: what its jobs returned."""
        tests = {name: tested(differences, self.clusters)
                 for name, differences in self.tests(results).items()}
        return {"claim": self.title, "paper": self.says, "verdict": verdict(tests),
                "tests": tests, "limits": self.limits,
                "numbers": self.numbers(results) if self.numbers else {}}

    def made_of(self):
        """A digest of the jobs, and of the code that judges them."""
        return fingerprint(module_digest(__name__), *(str(job.file) for job in self.jobs.values()))


def mean_and_error(values):
    """(mean, its standard error) of numbers; the error of one alone is not known: nan."""
    values = [float(value) for value in values]
    if len(values) == 1:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def numbers_of(rows):
    """{row: {measure: numbers}} -> the same with (mean, its standard error) of each."""
    table = {}
    for name, measures in rows.items():
        table[name] = {measure: mean_and_error(values) for measure, values in measures.items()}
    return table


def tested(values, clusters=None):
    """Paired differences -> {"mean", "error", "n", "sure": 1, −1, or 0 where 0 is not outside}."""
    if clusters and len(values) > clusters:
        values = [statistics.fmean(values[i::clusters]) for i in range(clusters)]
    mean, error = mean_and_error(values)
    radius = student_t.ppf(0.975, len(values) - 1) * error        # of one alone: nan
    sure = int(mean > radius) - int(mean < -radius)
    return {"mean": mean, "error": error, "n": len(values), "sure": sure}


def paper_tests(tests):
    """The tests of what the paper says: neither controls nor ours."""
    return {name: test for name, test in tests.items()
            if not name.startswith(("control: ", "ours: "))}


def verdict(tests):
    """RULE: {name: {"sure": …}} -> "holds", "does not hold here", "undecided"."""
    controls = [test["sure"] for name, test in tests.items() if name.startswith("control: ")]
    sure = [test["sure"] for test in paper_tests(tests).values()]
    if min(controls, default=1) < 1:
        return "undecided"
    if min(sure) < 0:
        return "does not hold here"
    if min(sure) > 0:
        return "holds"
    return "undecided"
