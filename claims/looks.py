"""looks.py — of a run for the law three numbers a prompt; its results stand as long as this file.
"""
from claims import runs
from claims.measures import PROMPTS, SAMPLE_JOBS, measured


def looks(method, **row):
    """A run of the test prompts -> {"grain", "distance", and where φ learns "kappa": [N]}."""
    run = runs.distilled(method, PROMPTS["test"], **row)
    found = measured(run.pop("x0"), SAMPLE_JOBS["test"].result())
    return run | {"grain": found["grain"], "distance": found["distance"]}
