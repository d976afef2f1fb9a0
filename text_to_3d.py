"""text_to_3d.py — a NeRF from a prompt: Adversarial Score Distillation's x0 = g(θ, c) in 3D.

    python text_to_3d.py --prompt "a red mug"

| what                                           | function    | in test_text_to_3d.py |
|------------------------------------------------|-------------|-----------------------|
| x0 = g(θ, c), a random view c at every step    | Scene       | test_scene_…          |
| how good it is; beside a solid of tiny/        | view_scores | test_scores_…         |
| Perp-Neg: between two views, away from others  | between     | test_perp_neg.py      |

The field and its renderer are nerf.py's, the loop is asd.py's. φ is told the camera, the prompt
names the view. The folder gets views.png, turntable.gif, mesh.glb and viewer.html.
"""
import inspect
import math
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":     # so that a failed import prints a line, and no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parent))     # python -I and -P omit this folder
    if not Path(__file__).resolve().with_name("cli").is_dir():
        print(f"{Path(__file__).name}: copied out alone it is a library, to be imported: the "
              "command needs all of the clone beside it", file=sys.stderr)
        sys.exit(2)
    import cli.start  # noqa: F401

import torch
from torch import nn
from torch.nn import functional as F

import asd
import variants
from cli import run
from cli.settings import SceneSettings, phi_options
from nerf import (
    NeRF,
    camera_to_world,
    check_whole,
    orbit,
    psnr,
    rays,
    render,
    solid_pictures,
    use_triton,
    write_all,
    write_around,
)
from phi import LoRAPhi
from prior import UserError
from tiny import solids
from tiny.judge import clip_score


# ------------------------------------------------------------------ text-to-3D: x0 = g(θ, c), …
class Scene(nn.Module):
    """ASD's generator in 3D: random views of a NeRF, encoded by the prior. x0 = E(render(θ, c))

    views per step; elevation, azimuth, fovy, distance: ranges, degrees and units of length;
    `overhead`: the part of the views that is seen from 62 … 80° of elevation in place of that. The
    default ranges are those tiny-sd was trained on. resolution: pixels, before and after `late` (a
    fraction of `steps`). background: "white", "random" or "learnt". sparsity, opaque: see
    regulariser(). perp_neg: between two views the prompt is between theirs, and the others are
    negatives (asd.perp_neg).
    """

    def __init__(self, prior, nerf, prompt, rng, steps, views=2, samples=48, elevation=(5.0, 35.0),
                 azimuth=(-180.0, 180.0), overhead=0.125, distance=(2.75, 3.1), fovy=(40.0, 40.0),
                 resolution=(32, 64), late=0.3, background="white", sparsity=0.0, opaque=100.0,
                 perp_neg=False):
        super().__init__()
        if not isinstance(prompt, str):
            raise ValueError(f"a Scene's prompt is one text, not {prompt!r}")
        if rng is not None:
            asd.check_rng(rng)
        check_scene(views, samples, resolution, background, overhead, late,
                    elevation=elevation, azimuth=azimuth, distance=distance, fovy=fovy)
        self.prior, self.nerf, self.rng, self.steps = prior, nerf.to(prior.device), rng, steps
        self.views, self.samples, self.fovy, self.distance = views, samples, fovy, distance
        self.elevation, self.azimuth, self.overhead = elevation, azimuth, overhead
        self.resolution, self.late = resolution, late
        self.background, self.sparsity, self.opaque = background, sparsity, opaque
        self.perp_neg = perp_neg
        # view-dependent prompts; solids.view_word states the thresholds
        self.prompts = {word: prior.encode_text([f"{prompt}, {word} view"])
                        for word in solids.VIEWS}
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.update_grid()

    def update_grid(self, rng=None):
        self.nerf.update_grid(2 * self.nerf.box / self.samples, rng, least=0.002)

    def parameter_groups(self, lr):
        """The table at lr, the networks and the background at lr/10 (as threestudio)."""
        others = [p for p in self.nerf.parameters() if p is not self.nerf.table]
        return [{"params": [self.nerf.table]}, {"params": others, "lr": lr / 10}]

    def cameras(self):
        """-> (c2w [B, 4, 4], fovy [B], the prompts' embeddings [B, L, C]) of random views."""
        def draw(low, high):                     # nothing is drawn where there is no choice
            if low == high:
                return torch.full((self.views,), float(low), device="cpu")
            return low + (high - low) * torch.rand(self.views, generator=self.rng, device="cpu")
        azimuth, distance = draw(*self.azimuth), draw(*self.distance)
        elevation = torch.where(draw(0, 1) < self.overhead, draw(62, 80), draw(*self.elevation))
        words = [solids.view_word(*pose) for pose in zip(elevation, azimuth)]
        c2w = camera_to_world(elevation, azimuth, distance)
        # in this order, as a seed's pictures depend on it
        fovy = draw(*self.fovy)
        cond = torch.cat([self.prompts[word] for word in words])
        return c2w.to(self.prior.device), fovy, cond

    def prompts_between(self, c2w):
        """Perp-Neg's prompts [B, L, C] of cameras; others [B, 2, L, C]; their weights [B, 2]."""
        prompts, others, weights = [], [], []
        for place in c2w[:, :3, 3].tolist():
            azimuth = math.degrees(math.atan2(place[1], place[0]))
            elevation = math.degrees(math.atan2(place[2], math.hypot(*place[:2])))
            shares, negatives = between(elevation, azimuth)
            prompts.append(sum(share * self.prompts[word] for word, share in shares.items()))
            others.append(torch.cat([self.prompts[word] for word in negatives]))
            weights.append(list(negatives.values()))
        return torch.cat(prompts), torch.stack(others), torch.tensor(weights).to(c2w)

    def picture(self, c2w, size, places=None, fovy=40.0, behind=1.0):
        """A Picture [B, H, W] of the cameras; places: of the samples on the rays, as in render."""
        if self.background == "learnt":
            behind = self.nerf.background.sigmoid()
        behind = torch.as_tensor(behind, dtype=c2w.dtype, device=c2w.device)
        behind = behind.expand(len(c2w), size, size, 3)
        return render(self.nerf, *rays(c2w, fovy, size), self.samples, behind, places)

    @property
    def batch(self):
        return self.views

    def forward(self, rows=None):
        """-> Samples: the views, or those with these numbers, their prompts, their cameras [B, 16].

        The random numbers are those of all views, whichever are rendered.
        """
        if self.step % 16 == 0:
            self.update_grid(self.rng)
        rows = torch.arange(self.views, device="cpu") if rows is None else rows
        c2w, fovy, cond = self.cameras()
        others = weights = None
        if self.perp_neg:
            cond, others, weights = self.prompts_between(c2w[rows])
        else:
            cond = cond[rows]
        size = self.resolution[int(self.step >= self.late * self.steps)]
        behind = torch.ones(self.views, 1, 1, 3, device="cpu")
        if self.background == "random":
            behind = torch.rand(self.views, 1, 1, 3, generator=self.rng, device="cpu")
        places = torch.rand(self.views, size * size, self.samples, generator=self.rng,
                            device="cpu")
        self.step += 1
        picture = self.picture(c2w[rows], size, places[rows].flatten(0, 1), fovy[rows],
                               behind[rows])
        self.opacity = picture.opacity
        rgb = F.interpolate(picture.rgb.permute(0, 3, 1, 2), self.prior.image_size,
                            mode="bilinear", align_corners=False)
        return asd.Samples(self.prior.encode_image(rgb), cond, c2w[rows].flatten(1),
                           others=others, other_weights=weights)

    def regulariser(self):
        """sparsity · E[√(o² + 0.01)] + opaque · E[H(o)] of the last views' opacities o. -> scalar.

        The first (threestudio) drives out fog, the second, o's binary entropy, half-tones.
        """
        o = self.opacity.clamp(1e-3, 1 - 1e-3)
        entropy = -(o * o.log() + (1 - o) * (1 - o).log())
        return self.sparsity * (o.square() + 0.01).sqrt().mean() + self.opaque * entropy.mean()

    @torch.no_grad()
    def images(self):
        """-> RGB [4, 3, H, W]: front, side, back, side."""
        picture = self.picture(orbit(4).to(self.prior.device), self.prior.image_size[0])
        return picture.rgb.permute(0, 3, 1, 2).clamp(0, 1)


def check_scene(views, samples, resolution, background, overhead, late, **ranges):
    """ValueError for numbers that no Scene can have.

    ranges: {name: (least, largest)} of elevation, azimuth, distance and fovy. The command has
    bounds of its own (cli/settings.py), which are closer.
    """
    for name, pair in (ranges | {"resolution": resolution}).items():
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2
                and all(isinstance(number, (int, float)) for number in pair)):
            raise ValueError(f"{name} is two numbers, not {pair!r}")
    # what follows would fail deep in the renderer, or in the middle of a run
    check_whole(views=views, samples=samples)
    for pixels in resolution:
        check_whole(resolution=pixels)
    if background not in ("white", "random", "learnt"):
        raise ValueError(f"unknown background {background!r}: choose white, random or learnt")
    if not (0 <= overhead <= 1 and 0 <= late <= 1):
        raise ValueError(f"overhead {overhead} and late {late} are parts of 1")
    for name, (least, largest) in ranges.items():
        if not -math.inf < least <= largest < math.inf:
            raise ValueError(f"{name} {least}, {largest}: two numbers are needed, the least first")
    if not (ranges["distance"][0] > 0 and 0 < ranges["fovy"][0] <= ranges["fovy"][1] < 180):
        raise ValueError(f"distance {ranges['distance']} must be above 0, and fovy "
                         f"{ranges['fovy']} between 0 and 180 degrees")


def between(elevation, azimuth):
    """Perp-Neg: the two views that a camera is between, and the negative ones. Degrees.

    -> {view: its share of the prompt}, {view: its weight w}. The numbers are threestudio's: w is
    almost 0 for the view that the camera is at.
    """
    def weight(a, b, c, r):
        return -(a * math.exp(-b * r) + c)
    away = abs((azimuth + 180) % 360 - 180)                 # from the front
    if solids.view_word(elevation, azimuth) == "overhead":
        return {"overhead": 1.0}, {"front": 0.0, "side": 0.0}
    if away < 90:
        r = 1 - away / 90                                   # 1 at the front, 0 at the side
        return ({"front": r, "side": 1 - r},
                {"front": weight(4, 0.5, -2.426, r), "side": weight(4, 0.5, -2.426, 1 - r)})
    r = 2 - away / 90                                       # 1 at the side, 0 at the back
    return ({"side": r, "back": 1 - r},
            {"side": weight(1, 0.5, -0.606, r), "front": weight(1, 0.5, 0.967, r)})


@torch.no_grad()
def view_scores(nerf, prompt, samples=64):
    """How good a NeRF is, over eight views of 64 pixels, all around at 20° of elevation.

    -> {"clip": tiny/clip's cosine with the prompt, where it is there; and where the prompt is a
    solid of tiny/solids.py: "iou" of the silhouettes, "psnr" in dB on white}.
    """
    truth, values = eight_views(prompt), {}
    c2w = orbit(8).to(nerf.table.device)
    seen = render(nerf, *rays(c2w, 40.0, 64), samples)
    score = clip_score(seen.rgb.movedim(-1, 1), prompt)
    if score is not None:
        values["clip"] = score
    if truth is not None:
        a, b = seen.opacity.cpu() > 0.5, truth.opacity > 0.5
        values["iou"] = ((a & b).sum() / (a | b).sum().clamp(min=1)).item()
        values["psnr"] = psnr(seen.rgb.cpu(), truth.over(1.0))
    return values


def eight_views(prompt):
    """What view_scores() compares with: the solid that the prompt describes. -> Posed, or None."""
    solid = solids.find_solid(prompt)
    return None if solid is None else solid_pictures(*solid, orbit(8))


# ----------------------------------------------------------------------------------- command line
# the Scene's own settings
SCENE = {name: p.default for name, p in inspect.signature(Scene).parameters.items()
         if p.default is not p.empty}


# its field, cameras (in a box of 1) and rates. Not here: its φ is another checkpoint (--phi-model,
# of SD 2.1), its opacity term begins after 10000 steps, its background is a network, its
# AdamW decays φ's weights, too
THREESTUDIO = {
    "optimizer": "adamw", "beta2": 0.99, "adam_eps": 1e-15, "coarsest": 16, "width": 64,
    "lr": 0.01, "lr_end": 1.0, "phi_lr": 1e-4, "steps": 25000, "t_late": 0.2, "late": 0.2,
    "views": 1, "samples": 512, "resolution": (64, 512), "elevation": (-10.0, 45.0),
    "overhead": 0.0, "distance": (1.0, 1.5), "fovy": (40.0, 70.0), "background": "learnt",
    "sparsity": 10.0, "opaque": 0.0, "levels": 16, "table": 19, "finest": 4096}
SOURCE = "§6: threestudio's VSD setting with λ 7.5, γ −0.5"
# every configuration that ASD's authors released has Perp-Neg on; the paper's text says no more
# than threestudio's VSD, where it is off
PAPER = dict.fromkeys(asd.METHODS, (SOURCE, THREESTUDIO)) | {
    "asd": (f"{SOURCE}; Perp-Neg as released", THREESTUDIO | {"perp_neg": True})}


def methods():
    """The rows of asd.py and variants.py at the rates and the schedule of 3D (λ 7.5, γ −0.5).

    At a rate that stays, the mug's late steps, of small t, painted a cyan smear on one side.
    """
    rows = {name: replace(row, lr=0.02, lr_end=0.05, phi_lr=1e-3, steps=600, omega="sigma2",
                          t_max_late=0.5, t_late=0.5)
            for name, row in variants.all_methods().items()}
    return rows | {"asd": replace(rows["asd"], gamma=-0.5)}


def check(settings):
    """UserError for what does not fit together, before anything is loaded."""
    for name in ("elevation", "azimuth", "fovy", "distance"):
        least, largest = getattr(settings, name)
        if least > largest:
            raise UserError(f"--{name} takes the least value first")
    if settings.coarsest > settings.finest:
        raise UserError(f"--coarsest {settings.coarsest} has more cells than --finest "
                        f"{settings.finest}")
    if settings.perp_neg and settings.phi == "bridge":
        raise UserError("--perp-neg asks prompts between the views, which SDS-Bridge's φ has no "
                        "words for: drop one of the two")
    if settings.lam_phi != 1:
        raise UserError("--lam-phi has no use in 3D: φ is given one prompt throughout")


def build(settings, prior, method, rng, folder, new):
    """The Scene, and φ: a LoRA is given the camera, and the prompt without the view."""
    # ValueError where the kernels cannot run
    use_triton(settings.kernels, torch.empty(0, device=prior.device))
    nerf = NeRF(blob=settings.blob, blob_radius=settings.blob_radius, kernels=settings.kernels,
                seed=settings.seed, levels=settings.levels, size=2 ** settings.table,
                base=settings.coarsest, finest=settings.finest, width=settings.width)
    scene = Scene(prior, nerf, settings.prompt, rng, method.steps,
                  **{name: getattr(settings, name) for name in SCENE})
    cond = prior.encode_text([settings.prompt])
    texts, options = [settings.prompt], phi_options(settings, method.phi)
    if method.phi is LoRAPhi:
        options |= {"cond": cond, "camera": 16}
    else:                                        # every prompt that a view may ask
        texts = [f"{settings.prompt}, {word} view" for word in scene.prompts]
    return asd.State(scene, method.phi(prior, texts, **options), method, rng), cond


def prompts(settings):
    """The prompt, in a list."""
    return [settings.prompt or ""]


def measure(settings, prior, state, images):
    return view_scores(state.generator.nerf, settings.prompt)


def preview(folder, state):
    """Write views.png of the scene as it is, small."""
    write_around(folder / "views.png", state.generator.nerf, size=32, views=4)


def finish(folder, settings, prior, state):
    """Write all that write_all writes, and then say the numbers.

    They go to stderr: where nobody reads stdout, a print would end the run.
    """
    run.say("text_to_3d.py", "makes the views, the turntable and the mesh")
    picture = write_all(folder, state.generator.nerf, settings.threshold)
    values = measure(settings, prior, state, None)
    names = {"clip": "tiny-clip {:.3f}", "iou": "silhouette IoU {:.3f}", "psnr": "PSNR {:.2f} dB"}
    if values:
        words = ", ".join(names[key].format(values[key]) for key in values)
        run.say("text_to_3d.py", f"{words} over 8 views")
    return picture


def main(argv=None):
    """`python text_to_3d.py --prompt …`. -> exit status."""
    return run.main(run.Command(
        "text_to_3d.py", "Make a 3D object that looks, to a frozen text-to-image diffusion model, "
        "like the prompt (Adversarial Score Distillation).", SceneSettings, methods(),
        variants.ALL_PHIS, asd.CHOICES, build, asd.distill, defaults=SCENE,
        paper=PAPER, prompts=prompts, check=check, measure=measure,
        preview=preview, finish=finish), argv)


if __name__ == "__main__":
    sys.exit(main())
