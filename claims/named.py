"""named.py — keeps which side of a solid each view shows, in tiny-clip's eyes.

Change this file, and the solids that have a front must be made again.
"""
import torch

from claims import runs
from text_to_3d import eight_views
from tiny.judge import clip_features

SIDES = ("front", "side", "back", "side")            # what views 0, 2, 4 and 6 of the eight show


def named(method, prompt, **changes):
    """A run of runs.solid -> {"right": [4], of the views from the front, both sides and behind, 1
    where the most alike of the true solid's four has the same name, else 0}.
    """
    views = runs.solid(method, prompt, **changes)["views"][::2]
    truth = eight_views(prompt).over(1.0).movedim(-1, 1)[::2]
    seen, true, _ = clip_features([views, truth], [prompt])
    right = [SIDES[nearest] == SIDES[i] for i, nearest in enumerate((seen @ true.T).argmax(1))]
    return {"right": torch.tensor(right).float()}
