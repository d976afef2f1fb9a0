"""side.py — of a solid its scores and one view are kept; the results stand as long as this file."""
from claims import runs
from cli.pictures import to_bytes


def side(method, prompt, **changes):
    """A run of runs.solid -> its "psnr", "iou", "clip", and "view", half from the side, uint8.
    """
    found = runs.solid(method, prompt, **changes)
    views = found.pop("views")
    return found | {"view": to_bytes(views[1])}
