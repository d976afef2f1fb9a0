"""make_edits.py — the guide's six edits by four methods: `python docs/make_edits.py`, ten minutes.

Writes figures/edits.png and prints the guide's table. Each is what `python editing.py --method …`
makes of the same picture and prompts, seed 0; the penguin is tiny-sd's own sample.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import asd  # noqa: E402
import editing  # noqa: E402
from cli.files import read_image  # noqa: E402
from cli.pictures import sheet  # noqa: E402
from prior import ddim_samples  # noqa: E402
from tiny.judge import distances  # noqa: E402

EDITS = (("fox", "3d render of a fox", "flat icon of a fox"),
         ("dog-flat", "flat icon of a dog", "3d render of a dog"),
         ("", "3d render of a penguin", "3d render of an owl"),
         ("hamburger-flat", "flat icon of a hamburger", "3d render of a hamburger"),
         ("mushroom", "3d render of a mushroom", "drawing of a mushroom"),
         ("fox-drawing", "drawing of a fox", "drawing of a wolf"))
prior, rows = asd.Prior.from_pretrained("tiny-sd"), []
for name, source, target in EDITS:
    x_T = torch.randn(1, *prior.shape, generator=torch.Generator().manual_seed(0))
    before = (read_image(ROOT / f"examples/{name}.png", prior.image_size) if name else
              prior.decode(ddim_samples(prior, [f"a {source}"], x_T)))
    pictures, notes = [before], [""]
    for method in ("dds", "asd", "flowedit", "dvrf"):
        pictures.append(editing.edit(prior, before, [f"a {source}"], [f"a {target}"], method))
        found = distances(before, pictures[-1], f"a {source}", f"a {target}")
        notes.append(f"{found['clip_target']:.2f}, {found['psnr']:.1f} dB")
    rows.append((f"{source}\n-> {target}", torch.cat(pictures), notes))
    print(f"| {source} → {target} | {' | '.join(notes[1:])} |", flush=True)
sheet(ROOT / "figures/edits.png", ["source", "DDS", "ASD", "FlowEdit", "DVRF"], rows, 128,
      left=190, corner="the target's score,\nPSNR to the source", colors=256)
