"""side.py — keeps the scores and one view of a solid.

Change this file, and the solids must be made again.
"""
from claims import runs
from cli.pictures import to_bytes


def side(method, prompt, **changes):
    """A run of runs.solid -> its "psnr", "iou", "clip", and "view", half from the side, uint8.
    """
    found = runs.solid(method, prompt, **changes)
    views = found.pop("views")
    return found | {"view": to_bytes(views[1])}
