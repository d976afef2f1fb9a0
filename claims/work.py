"""work.py — what every claim is made of: jobs that are kept, paired differences, a verdict.

A Job is a function and its arguments; what it returns, tensors by name, is kept in outputs/claims/
under a name that has a key of all that it depends on: the weights in tiny/, the arguments, and the
code that it can reach (comments and docstrings apart). A Claim names its jobs and turns what they
returned into tests; one rule turns the tests into a verdict.
"""
import ast
import functools
import glob
import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from export import moved_into
from prior import HERE, UserError
from tiny.corrective import fingerprint
from tiny.training import threads_kept

KEPT = Path("outputs/claims")
RULE = (
    "Each test is a difference that the paper says is positive, paired run by run (the same prompt "
    "or solid and seed; seeds of one prompt or solid are averaged first). It is sure where 0 is "
    "outside its 95 % interval by Student's t. The claim holds if all its tests are surely "
    "positive; it does not hold here if one is surely negative; else it is undecided, as it is "
    "where a control, which says that the measure sees what the claim is about, is not surely "
    "positive. Tests of ours, which the paper does not say, count for no verdict. (Added after the "
    "first runs: the average over seeds and t, both stricter, controls, what is ours.)")


# ------------------------------------------------------------------------------------------ jobs
@dataclass(frozen=True, eq=False)
class Job:
    """function(**arguments) -> {name: tensor}, once. minutes: what it takes, one thread of two."""
    name: str
    function: Callable
    arguments: dict
    minutes: float

    def about(self):
        """All that the result depends on: the weights, the arguments, the code."""
        return {"weights": weights(), "arguments": repr(self.arguments),
                "code": code_of(self.function.__module__, self.function.__name__)}

    @property
    def file(self):
        return KEPT / f"{self.name}-{fingerprint(self.about())}.safetensors"

    def result(self):
        """What it returned; UserError where it has not been made."""
        from safetensors.torch import load_file
        if not self.file.exists():
            raise UserError(f"{self.file} is not there: run the claim first")
        return load_file(self.file)

    def run(self):
        return {name: x.contiguous() for name, x in self.function(**self.arguments).items()}

    def keep(self, result):
        from safetensors.torch import save_file
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with moved_into(self.file) as temporary:
            save_file(result, temporary, self.about())


def make(jobs, part="1/1"):
    """Make this part ("1/2", …) of the jobs; those that are there are not made again.

    -> whether all are there now.
    """
    from tqdm import tqdm
    i, _, n = part.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise UserError(f"--part {part} is no part: 1/2 is the first of two")
    missing = [job for job in jobs[int(i) - 1::int(n)] if not job.file.exists()]
    with threads_kept(), tqdm(total=round(sum(job.minutes for job in missing)), disable=not missing,
              desc=f"part {part}", unit="min", file=sys.stderr) as bar:
        if int(n) > 1:
            torch.set_num_threads(1)              # the other processes have the other cores
        for job in missing:
            bar.set_postfix_str(job.name)
            if not job.file.exists():                       # another process may have made it
                job.keep(job.run())
            bar.update(job.minutes)
    return all(job.file.exists() for job in jobs)


def vouch(jobs):
    """For code that was changed and does the same. -> how many results are kept.

    Of each kind, a function and its first argument (the method), the shortest job whose older
    result is there is made again. If it ends in the same bits, all results of that kind which are
    of the same older code, weights and arguments are taken for the new code's.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file
    older, same, kept = [], {}, 0
    for job in sorted(jobs, key=lambda job: job.minutes):
        for file in KEPT.glob(f"{glob.escape(job.name)}-????????.safetensors"):
            with safe_open(file, "pt") as opened:
                about = opened.metadata() or {}
            if {**job.about(), "code": about.get("code")} == about and not job.file.exists():
                older.append((job, about["code"], load_file(file)))
    for job, code, before in older:
        kind = job.function, code, *list(job.arguments.values())[:1]
        if kind not in same:
            now = job.run()
            same[kind] = now.keys() == before.keys() and all(
                torch.equal(now[name], before[name]) for name in now)
        if same[kind] and not job.file.exists():
            job.keep(before)
            kept += 1
    return kept


@functools.cache
def weights():
    """A digest of the embedded models, whole, and of the packages that run them."""
    digest = hashlib.sha256(repr([version(name) for name in ("torch", "diffusers", "peft")])
                            .encode())
    for file in sorted([*HERE.glob("tiny/*/**/*.*"), *HERE.glob("tiny/*.safetensors")]):
        if file.suffix in (".json", ".txt", ".safetensors"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


@functools.cache
def definitions():
    """({(module, name): what it is, without docstrings}, {(module, alias): (module, name)}): what
    our modules define at their top, and what they import of one another, wherever in them; the
    name of a module itself is ""."""
    files = [*HERE.glob("*.py"), *HERE.glob("tiny/*.py"), *HERE.glob("claims/*.py")]
    trees = {".".join(file.relative_to(HERE).with_suffix("").parts): ast.parse(
        file.read_text("utf-8")) for file in files if not file.name.startswith("test_")}
    defined, imports = {}, {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and len(body) > 1 and isinstance(body[0], ast.Expr) \
                    and isinstance(body[0].value, ast.Constant):
                del body[0]
            if isinstance(node, ast.Import):
                imports |= {(module, each.asname or each.name): (each.name, "")
                            for each in node.names if each.name in trees}
            elif isinstance(node, ast.ImportFrom):
                for each in node.names:
                    whole = f"{node.module}.{each.name}"
                    imports[module, each.asname or each.name] = \
                        (whole, "") if whole in trees else (node.module, each.name)
        for node in tree.body:
            targets = [target for each in ast.walk(node)
                       for target in getattr(each, "targets", [getattr(each, "target", None)])
                       if isinstance(each, (ast.Assign, ast.AnnAssign, ast.AugAssign))]
            named = [node.name] if hasattr(node, "name") else [
                each.id for target in targets for each in ast.walk(target)
                if isinstance(each, ast.Name)]
            for name in named:
                defined.setdefault((module, name), []).append(node)
    return defined, imports


def reached_from(module, name):
    """All (module, name) of ours that a definition can reach."""
    (defined, imports), reached, waiting = definitions(), set(), [(module, name)]
    while waiting:
        one = waiting.pop()
        if one in reached:
            continue
        reached.add(one)
        waiting += [imports[one]] if one in imports else []
        for each in (part for node in defined.get(one, []) for part in ast.walk(node)):
            if isinstance(each, ast.Name):
                waiting.append((one[0], each.id))
            elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
                whole, nothing = imports.get((one[0], each.value.id), ("", None))
                waiting += [(whole, each.attr)] if nothing == "" else []
    return reached & defined.keys()


@functools.cache
def code_of(module, name):
    """A digest of a definition and of what it can reach in our modules."""
    reached = reached_from(module, name)
    return fingerprint(*sorted(ast.dump(node) for one in reached for node in definitions()[0][one]))


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
        """All that is said of it, as claims.json has it; results: what its jobs returned."""
        tests = {name: tested(each, self.clusters) for name, each in self.tests(results).items()}
        return {"claim": self.title, "paper": self.says, "verdict": verdict(tests),
                "tests": tests, "limits": self.limits,
                "numbers": self.numbers(results) if self.numbers else {}}


def mean_and_error(values):
    """(mean, its standard error) of numbers; the error of one alone is not known: nan."""
    values = [float(value) for value in values]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def tested(values, clusters=None):
    """Paired differences -> {"mean", "error", "n", "sure": 1, −1, or 0 where 0 is not outside}."""
    from scipy.stats import t
    if clusters and len(values) > clusters:
        values = [sum(values[i::clusters]) / len(values[i::clusters]) for i in range(clusters)]
    mean, error = mean_and_error(values)
    beyond = abs(mean) > t.ppf(0.975, len(values) - 1) * error        # of one alone: nan, False
    return {"mean": mean, "error": error, "n": len(values),
            "sure": int(math.copysign(beyond, mean))}


def verdict(tests):
    """RULE: {name: {"sure": …}} -> "holds", "does not hold here", "undecided"."""
    if any(test["sure"] < 1 for name, test in tests.items() if name.startswith("control: ")):
        return "undecided"
    sure = [test["sure"] for name, test in tests.items()
            if not name.startswith(("control: ", "ours: "))]
    return "does not hold here" if min(sure) < 0 else "holds" if min(sure) > 0 else "undecided"
