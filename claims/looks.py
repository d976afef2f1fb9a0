"""looks.py — keeps three numbers a prompt of a run, for the law.

Change this file, and the runs for the law must be made again.
"""
from claims import runs
from claims.measures import PROMPTS, SAMPLE_JOBS, measured


def looks(method, **row):
    """A run of the test prompts -> {"grain", "distance", and where φ learns "kappa": [N]}."""
    run = runs.distilled(method, PROMPTS["test"], **row)
    found = measured(run.pop("x0"), SAMPLE_JOBS["test"].result())
    return run | {"grain": found["grain"], "distance": found["distance"]}
