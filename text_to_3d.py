"""text_to_3d.py — a NeRF from a prompt: Adversarial Score Distillation's x0 = g(θ, c) in 3D.

    python text_to_3d.py --prompt "a red mug"

| what                                           | function    | in test_text_to_3d.py |
|------------------------------------------------|-------------|-----------------------|
| x0 = g(θ, c), a random view c at every step    | Scene       | test_scene_…          |
| how good it is; beside a solid of tiny/        | view_scores | test_scores_…         |

The field and its renderer are nerf.py's, the loop is asd.py's. φ is told the camera, the prompt
names the view. The folder gets views.png, turntable.gif, mesh.glb and viewer.html.
"""
import inspect
import sys
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

import asd
import runs
import variants
from nerf import (
    NeRF,
    camera_to_world,
    orbit,
    psnr,
    rays,
    render,
    solid_pictures,
    use_triton,
    write_all,
)
from phi import LoRAPhi
from tiny import solids
from tiny.judge import clip_score


# ------------------------------------------------------------------ text-to-3D: x0 = g(θ, c), …
class Scene(nn.Module):
    """ASD's generator in 3D: random views of a NeRF, encoded by the prior. x0 = E(render(θ, c))

    views per step; elevation, azimuth, fovy, distance: ranges, degrees and units of length;
    `overhead`: the part of the views that is seen from 62 … 80° of elevation in place of that. The
    default ranges are those tiny-sd was trained on. resolution: pixels, before and after `late` (a
    fraction of `steps`). background: "white", "random" or "learnt". sparsity, opaque: see
    regulariser().
    """

    def __init__(self, prior, nerf, prompt, rng, steps, views=2, samples=48, elevation=(5.0, 35.0),
                 azimuth=(-180.0, 180.0), overhead=0.125, distance=(2.75, 3.1), fovy=(40.0, 40.0),
                 resolution=(32, 64), late=0.3, background="white", sparsity=0.0, opaque=100.0):
        super().__init__()
        self.prior, self.nerf, self.rng, self.steps = prior, nerf.to(prior.device), rng, steps
        self.views, self.samples, self.fovy, self.distance = views, samples, fovy, distance
        self.elevation, self.azimuth, self.overhead = elevation, azimuth, overhead
        self.resolution, self.late = resolution, late
        self.background, self.sparsity, self.opaque = background, sparsity, opaque
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
                return torch.full((self.views,), float(low))
            return low + (high - low) * torch.rand(self.views, generator=self.rng)
        azimuth, distance = draw(*self.azimuth), draw(*self.distance)
        elevation = torch.where(draw(0, 1) < self.overhead, draw(62, 80), draw(*self.elevation))
        words = [solids.view_word(*pose) for pose in zip(elevation, azimuth)]
        c2w = camera_to_world(elevation, azimuth, distance)
        return (c2w.to(self.prior.device), draw(*self.fovy),
                torch.cat([self.prompts[word] for word in words]))

    def picture(self, c2w, size, places=None, fovy=40.0, behind=1.0):
        """A Picture [B, H, W] of the cameras; places: of the samples on the rays, as in render."""
        if self.background == "learnt":
            behind = self.nerf.background.sigmoid()
        behind = torch.as_tensor(behind).to(c2w).expand(len(c2w), size, size, 3)
        return render(self.nerf, *rays(c2w, fovy, size), self.samples, behind, places)

    @property
    def batch(self):
        return self.views

    def parts(self, units):
        """Of each of some lists of views, lazily: what forward() returns."""
        if self.step % 16 == 0:
            self.update_grid(self.rng)
        c2w, fovy, cond = self.cameras()
        size, behind = self.resolution[int(self.step >= self.late * self.steps)], torch.ones(1)
        if self.background == "random":
            behind = torch.rand(self.views, 1, 1, 3, generator=self.rng)
        behind = behind.expand(self.views, 1, 1, 3)
        places = torch.rand(self.views, size * size, self.samples, generator=self.rng)
        self.step += 1
        for rows in units:
            picture = self.picture(c2w[rows], size, places[rows].flatten(0, 1), fovy[rows],
                                   behind[rows])
            self.opacity = picture.opacity
            rgb = F.interpolate(picture.rgb.permute(0, 3, 1, 2), self.prior.image_size,
                                mode="bilinear", align_corners=False)
            yield self.prior.encode_image(rgb), cond[rows], c2w[rows].flatten(1)

    def forward(self):
        """-> (x0 [B, C, H, W], the views' prompts [B, L, C], cameras [B, 16] for φ)."""
        return next(self.parts([slice(None)]))

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
    return solid and solid_pictures(*solid, orbit(8))


# ----------------------------------------------------------------------------------- command line
# the Scene's own settings, and the NeRF's
SCENE = {name: p.default for name, p in inspect.signature(Scene).parameters.items()
         if p.default is not p.empty}
DEFAULTS = SCENE | {"prompt": None, "blob": 10.0, "blob_radius": 0.5, "threshold": 10.0,
                    "kernels": "auto", "levels": 8, "table": 15, "finest": 96}


# its field, cameras (in a box of 1) and rates. Not here: its φ is another checkpoint (2.1), its
# opacity term begins after 10000 steps, its background is a network
PAPER = ("§6: threestudio's VSD setting with λ 7.5, γ −0.5", {
         "lr": 0.01, "lr_end": 1.0, "phi_lr": 1e-4, "steps": 25000, "t_late": 0.2, "late": 0.2,
         "views": 1, "samples": 512, "resolution": (64, 512), "elevation": (-10.0, 45.0),
         "overhead": 0.0, "distance": (1.0, 1.5), "fovy": (40.0, 70.0), "background": "learnt",
         "sparsity": 10.0, "opaque": 0.0, "levels": 16, "table": 19, "finest": 4096})


def methods():
    """The rows of asd.py and variants.py at the rates and the schedule of 3D (λ 7.5, γ −0.5).

    At a rate that stays, the mug's late steps, of small t, painted a cyan smear on one side.
    """
    rows = {name: replace(row, lr=0.02, lr_end=0.05, steps=600, omega="sigma2", t_max_late=0.5,
                          t_late=0.5)
            for name, row in variants.all_methods().items()}
    return rows | {"asd": replace(rows["asd"], gamma=-0.5)}


def add_flags(add):
    some = runs.number(float)
    variants.add_options(add)
    add("--prompt", metavar="TEXT", help="what to make")
    add("--views", type=runs.number(int, 1), help="pictures per step (default 2)")
    add("--samples", type=runs.number(int, 2), help="along each ray (default 48)")
    add("--elevation", type=runs.number(float, -90, 90), nargs=2,
        help="degrees, least and largest (default 5 35)")
    add("--overhead", type=runs.number(float, 0, 1), help="the part seen from above "
        "(default 0.125)")
    add("--distance", type=runs.number(float, 1e-3, 1e6), nargs=2, help="of the camera (2.75 3.1)")
    add("--azimuth", type=runs.number(float, -1e6, 1e6), nargs=2,
        help="degrees, 0 is the front (default -180 180)")
    add("--fovy", type=runs.number(float, 1, 170), nargs=2, help="vertical angle of view, degrees "
        "(default 40 40)")
    add("--resolution", type=runs.number(int, 4), nargs=2, help="pixels, at first and later "
        "(default 32 64)")
    add("--late", type=runs.number(float, 0, 1), help="when: a fraction of the steps (0.3)")
    add("--background", choices=["white", "random", "learnt"], help="default white")
    add("--sparsity", type=some, help="weight against fog (default 0)")
    add("--opaque", type=some, help="weight against half-tones (default 100)")
    add("--blob", type=some, help="density at the origin at the start (default 10)")
    add("--blob-radius", type=runs.number(float, 1e-3), help="where it ends (default 0.5)")
    add("--levels", type=runs.number(int, 1, 32), help="of the hash grid (default 8)")
    add("--table", type=runs.number(int, 4, 24), help="log2 of its entries a level (default 15)")
    add("--finest", type=runs.number(int, 8, 8192), help="cells of its finest level (default 96)")
    add("--threshold", type=runs.number(float, 0), help="density of the mesh's surface "
        "(default 10)")
    add("--kernels", choices=["auto", "torch", "triton"], help="default auto: Triton on CUDA")


def check(settings):
    """What can be said before anything is loaded."""
    for name in ("elevation", "azimuth", "fovy", "distance"):
        if settings[name][0] > settings[name][1]:
            raise runs.UserError(f"--{name} takes the least value first")
    if settings["lam_phi"] != 1:
        raise runs.UserError("--lam-phi has no use here: φ is told one prompt throughout")


def build(settings, prior, method, rng, folder, anew):
    """The Scene, and φ: a LoRA is told the camera, and the prompt without the view."""
    use_triton(settings["kernels"], torch.empty(0, device=prior.device))     # ValueError, if not
    nerf = NeRF(blob=settings["blob"], blob_radius=settings["blob_radius"],
                kernels=settings["kernels"], seed=settings["seed"], levels=settings["levels"],
                size=2 ** settings["table"], finest=settings["finest"])
    scene = Scene(prior, nerf, settings["prompt"], rng, method.steps,
                  **{key: settings[key] for key in SCENE})
    cond = prior.encode_text([settings["prompt"]])
    prompts, options = [settings["prompt"]], runs.told(settings, method.phi)
    if method.phi is LoRAPhi:
        options |= {"cond": cond, "camera": 16}
    else:                                        # every prompt that a view may ask
        prompts = [f"{settings['prompt']}, {word} view" for word in scene.prompts]
    return asd.State(scene, method.phi(prior, prompts, **options), method, rng), cond


def measure(settings, prior, state, images):
    return view_scores(state.generator.nerf, settings["prompt"])


def finish(folder, settings, prior, state):
    """All that write_all writes, and the numbers."""
    values = measure(settings, prior, state, None)
    names = {"clip": "tiny-clip {:.3f}", "iou": "silhouette IoU {:.3f}", "psnr": "PSNR {:.2f} dB"}
    if values:
        print(", ".join(names[key].format(values[key]) for key in values), "over 8 views")
    return write_all(folder, state.generator.nerf, settings["threshold"])


def main(argv=None):
    """`python text_to_3d.py --prompt …`. -> exit status."""
    return runs.main(runs.Command(
        "text_to_3d.py", "Make a 3D object that looks, to a frozen text-to-image diffusion model, "
        "like the prompt (Adversarial Score Distillation).", methods(), variants.ALL_PHIS,
        asd.CHOICES, build, asd.distill, add_flags=add_flags, defaults=DEFAULTS,
        options=variants.OPTIONS, prompts=lambda settings: [settings["prompt"] or ""], check=check,
        finish=finish, measure=measure, paper=PAPER), argv)


if __name__ == "__main__":
    sys.exit(main())
