"""scene.py — text-to-3D with nerf.py: random views for the loop of asd.py; meshes; the commands.

    python nerf.py --prompt "a red mug"            # main() below, …
    python nerf.py --fit "red mug"                 # … fit_main()

| what                                           | function      | in test_nerf.py         |
|------------------------------------------------|---------------|-------------------------|
| x0 = g(θ, c) of Adversarial Score Distillation | Scene         | test_scene_…            |
| how good it is; beside a solid of solids.py    | view_scores   | test_scores_…           |
| a mesh, and a page that turns it               | extract_mesh  | test_mesh_…, test_page… |
| normals of a picture from its depth            | depth_normals | test_normals_of_…       |
"""
import base64
import inspect
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import runs
import solids
from nerf import NeRF, Posed, fit, look, posed_folder, psnr, rays, render, use_triton


# ---------------------------------------------------------------------- the solids of solids.py
def find_solid(text):
    """A text such as "mug", "red mug" or "a red mug" -> (kind, colour) of solids.py, or None."""
    words = re.sub(r"^an? ", "", text.strip().lower())
    color, _, kind = words.partition(" ")
    if color in solids.COLORS and kind in solids.KINDS:
        return kind, color
    return (words, "red") if words in solids.KINDS else None


def solid_pictures(kind, color, c2w, fovy=40.0, size=64):
    """Posed pictures of a solid of solids.py from cameras [M, 4, 4]."""
    truth = solids.render([kind] * len(c2w), [color] * len(c2w), c2w, fovy, size)
    opacity = truth.opacity[:, 0]
    color = truth.rgb.permute(0, 2, 3, 1) - (1 - opacity)[..., None]     # they stand on white
    return Posed(*rays(c2w, fovy, size), color, opacity)


def builtin_scene(kind, color, views=40, held_out=8, size=64, seed=0):
    """-> (pictures to learn, pictures held out), from random sides."""
    rng = torch.Generator().manual_seed(seed)
    elevation, azimuth = torch.rand(2, views + held_out, generator=rng)
    c2w = solids.camera_to_world(90 * elevation - 20, 360 * azimuth, 2.7)
    posed = solid_pictures(kind, color, c2w, size=size)
    return tuple(Posed(*(v[part] for v in posed)) for part in (slice(views), slice(views, None)))


@torch.no_grad()
def view_scores(nerf, prompt, samples=64):
    """How good a NeRF is, over eight views of 64 pixels, all around at 20° of elevation.

    -> {"clip": tiny-clip's cosine with the prompt, where it is there; and where the prompt is a
    solid of solids.py: "iou" of the silhouettes, "psnr" in dB on white}.
    """
    truth, values = eight_views(prompt), {}
    c2w = orbit(8).to(nerf.table.device)
    seen = render(nerf, *rays(c2w, 40.0, 64), samples)
    score = runs.clip_score(seen.rgb.movedim(-1, 1), prompt)
    if score is not None:
        values["clip"] = score
    if truth is not None:
        a, b = seen.opacity.cpu() > 0.5, truth.opacity > 0.5
        values["iou"] = ((a & b).sum() / (a | b).sum().clamp(min=1)).item()
        values["psnr"] = psnr(seen.rgb.cpu(), truth.over(1.0))
    return values


def eight_views(prompt):
    """What view_scores() compares with: the solid that the prompt describes. -> Posed, or None."""
    solid = find_solid(prompt)
    return solid and solid_pictures(*solid, orbit(8))


def orbit(views, elevation=20.0, distance=2.9):
    """Cameras [views, 4, 4] around the object, the first one at its front."""
    return solids.camera_to_world(elevation, torch.arange(views) * (360 / views), distance)


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
        c2w = solids.camera_to_world(elevation, azimuth, distance)
        return (c2w.to(self.prior.device), draw(*self.fovy),
                torch.cat([self.prompts[word] for word in words]))

    def picture(self, c2w, size, rng=None, fovy=40.0):
        """A Picture [B, H, W] of the cameras."""
        behind = 1.0
        if rng and self.background == "random":
            behind = torch.rand(len(c2w), 1, 1, 3, generator=rng).to(c2w)
        elif self.background == "learnt":
            behind = self.nerf.background.sigmoid()
        behind = torch.as_tensor(behind).to(c2w).expand(len(c2w), size, size, 3)
        return render(self.nerf, *rays(c2w, fovy, size), self.samples, behind, rng)

    def forward(self):
        """-> (x0 [B, C, H, W], the views' prompts [B, L, C], cameras [B, 16] for φ)."""
        if self.step % 16 == 0:
            self.update_grid(self.rng)
        c2w, fovy, cond = self.cameras()
        size = self.resolution[int(self.step >= self.late * self.steps)]
        picture = self.picture(c2w, size, self.rng, fovy)
        self.opacity = picture.opacity
        rgb = F.interpolate(picture.rgb.permute(0, 3, 1, 2), self.prior.image_size, mode="bilinear",
                            align_corners=False)
        self.step += 1
        return self.prior.encode_image(rgb), cond, c2w.flatten(1)

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


# ------------------------------------------------------------------------ what a run leaves behind
def pictures_to_png(path, rows, scale=2):
    """rows: lists of RGB [B, H, W, 3] in [0, 1] -> a PNG, one below the other."""
    picture = torch.cat([torch.cat(list(row.cpu()), 1) for row in rows]).clamp(0, 1)
    picture = Image.fromarray((picture * 255).round().byte().numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    with runs.moved_into(Path(path)) as part:
        picture.save(part, format="PNG")


def depth_normals(points):
    """The points that pixels show [B, H, W, 3] -> unit normals that face the camera, alike.

    Smoother than NeRF.normal, as the density's gradient at one point is grainy after a fit.
    """
    down, right = torch.gradient(points, dim=(1, 2))
    return F.normalize(torch.linalg.cross(right, -down), dim=-1)


@torch.no_grad()
def write_views(path, nerf, samples=64, size=64, fovy=40.0, distance=2.9):
    """views.png: eight views; colour, depth (near is bright), normals (x, y, z as R, G, B).
    """
    o, d = (v.to(nerf.table.device) for v in rays(orbit(8, distance=distance), fovy, size))
    picture = render(nerf, o, d, samples)
    there = picture.opacity[..., None]
    depth = (distance + nerf.box - picture.depth) / (2 * nerf.box)
    normal = depth_normals(o + picture.depth[..., None] * d)
    on_white = lambda v: there * v + 1 - there
    pictures_to_png(path, [picture.rgb, on_white(depth.clamp(0, 1)[..., None].expand_as(d)),
                           on_white(normal / 2 + 0.5)])


@torch.no_grad()
def write_turntable(path, nerf, frames=36, samples=64, size=128, fovy=40.0):
    """turntable.gif, and an mp4 beside it where ffmpeg is installed."""
    film = []
    for c2w in orbit(frames).split(1):
        o, d = (v.to(nerf.table.device) for v in rays(c2w, fovy, size))
        rgb = render(nerf, o, d, samples).rgb[0].clamp(0, 1).cpu()
        film.append(Image.fromarray((rgb * 255).round().byte().numpy()))
    with runs.moved_into(Path(path)) as part:
        film[0].save(part, format="GIF", save_all=True, append_images=film[1:], duration=70, loop=0)
    if shutil.which("ffmpeg"):
        try:
            with runs.moved_into(Path(path).with_suffix(".mp4")) as part:
                subprocess.run(["ffmpeg", "-loglevel", "error", "-y", "-i", str(path), "-pix_fmt",
                                "yuv420p", "-f", "mp4", str(part)], check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"nerf.py: no turntable.mp4: {error}", file=sys.stderr)


@torch.no_grad()
def extract_mesh(nerf, threshold=10.0, resolution=96):
    """Marching cubes -> a trimesh.Trimesh with vertex colours (sRGB, as the pictures).

    Raises ValueError where the density is nowhere above, or nowhere below, the threshold.
    """
    import trimesh
    from skimage.measure import marching_cubes
    line = torch.linspace(-nerf.box, nerf.box, resolution, device=nerf.table.device)
    x = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3)
    sigma = torch.zeros(len(x), device=x.device)
    for part in nerf.occupancy(x).nonzero().squeeze(1).split(1 << 16):
        sigma[part] = nerf.geometry(x[part])[0]
    if not sigma.min() < threshold < sigma.max():
        raise ValueError(f"no surface to make a mesh of: the density lies in {sigma.min():.3g} … "
                         f"{sigma.max():.3g}, --threshold is {threshold:g}")
    volume = F.pad(sigma.view([resolution] * 3), [1] * 6).cpu().numpy()  # closed at the box
    vertices, faces, _, _ = marching_cubes(volume, threshold, gradient_direction="ascent")
    vertices = torch.from_numpy(vertices.copy() - 1) * (2 * nerf.box / (resolution - 1)) - nerf.box
    rgb = torch.cat([nerf(part, -nerf.normal(part))[1]
                     for part in vertices.to(x).split(1 << 16)]).cpu()
    return trimesh.Trimesh(vertices.numpy(), faces, process=False,
                           vertex_colors=(rgb * 255).round().byte().numpy())


def write_mesh(folder, mesh):
    """mesh.glb (y is up, colours linear, unlit: as glTF has them) and viewer.html."""
    turned = mesh.copy()
    turned.vertices = mesh.vertices[:, [1, 2, 0]]                        # z up -> y up
    srgb = mesh.visual.vertex_colors[:, :3] / 255
    linear = np.where(srgb < 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    turned.visual.vertex_colors = (linear * 255).round().astype(np.uint8)

    def unlit(tree):
        tree["materials"] = [{"extensions": {"KHR_materials_unlit": {}}, "pbrMetallicRoughness": {
            "metallicFactor": 0.0, "roughnessFactor": 1.0}}]
        tree["extensionsUsed"] = ["KHR_materials_unlit"]
        for part in tree["meshes"][0]["primitives"]:
            part["material"] = 0

    data = turned.export(file_type="glb", tree_postprocessor=unlit)
    with runs.moved_into(folder / "mesh.glb") as part:
        part.write_bytes(data)
    coded = lambda array, kind: base64.b64encode(np.ascontiguousarray(array, kind)).decode()
    runs.write_text(folder / "viewer.html", VIEWER % (
        coded(mesh.vertices[:, [1, 2, 0]], "<f4"), coded(mesh.visual.vertex_colors[:, :3], "u1"),
        coded(mesh.faces, "<u4")))


def write_all(folder, nerf, threshold):
    """nerf.safetensors, views.png, turntable.gif, mesh.glb, viewer.html; -> the last one written.

    A density without a surface costs the mesh, not the run: one line says so.
    """
    nerf.save(folder / "nerf.safetensors")
    write_views(folder / "views.png", nerf)
    write_turntable(folder / "turntable.gif", nerf)
    try:
        write_mesh(folder, extract_mesh(nerf, threshold))
    except (ValueError, ImportError) as error:
        print(f"nerf.py: no mesh: {error}", file=sys.stderr)
        return folder / "turntable.gif"
    return folder / "viewer.html"


# a page of its own: no library, no server, no network; the mesh is in it, coded in base 64
VIEWER = """<!DOCTYPE html><html><meta charset="utf-8"><title>viewer</title>
<style>html, body, canvas {margin: 0; width: 100%%; height: 100%%; display: block}</style>
<canvas></canvas><script>
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer
const place = new Float32Array(bytes("%s")), color = new Uint8Array(bytes("%s"))
const face = new Uint32Array(bytes("%s"))
const size = place.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
const canvas = document.querySelector("canvas")
const gl = canvas.getContext("webgl2", {preserveDrawingBuffer: true})
const program = gl.createProgram()
const shader = (kind, text) => { const s = gl.createShader(kind)
  gl.shaderSource(s, text); gl.compileShader(s); gl.attachShader(program, s) }
shader(gl.VERTEX_SHADER, `#version 300 es
  in vec3 place, color; uniform mat4 view; out vec3 c;
  void main() { c = color; gl_Position = view * vec4(place, 1.0); }`)
shader(gl.FRAGMENT_SHADER, `#version 300 es
  precision mediump float; in vec3 c; out vec4 o; void main() { o = vec4(c, 1.0); }`)
gl.linkProgram(program); gl.useProgram(program)
gl.enable(gl.DEPTH_TEST); gl.clearColor(1, 1, 1, 1)
const fill = (kind, data) => { gl.bindBuffer(kind, gl.createBuffer())
  gl.bufferData(kind, data, gl.STATIC_DRAW) }
const feed = (name, data, kind, scaled) => { fill(gl.ARRAY_BUFFER, data)
  const at = gl.getAttribLocation(program, name); gl.enableVertexAttribArray(at)
  gl.vertexAttribPointer(at, 3, kind, scaled, 0, 0) }
feed("place", place.map(v => v / size), gl.FLOAT, false)
feed("color", color, gl.UNSIGNED_BYTE, true)
fill(gl.ELEMENT_ARRAY_BUFFER, face)
let turn = 0.5, tilt = 0.35, away = 4
function draw() {
  const w = canvas.width = innerWidth, h = canvas.height = innerHeight
  gl.viewport(0, 0, w, h); gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT)
  // turn about y, then tilt about x, then perspective with near 0.1 and far 20: by columns
  const [c, s, C, S] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)]
  const a = 2.5 * Math.min(1, h / w), b = 2.5 * Math.min(1, w / h), z = -20.1 / 19.9
  gl.uniformMatrix4fv(gl.getUniformLocation(program, "view"), false, [
    a * c, b * S * s, -z * C * s, C * s, 0, b * C, z * S, -S,
    a * s, -b * S * c, z * C * c, -C * c, 0, 0, -4 / 19.9 - z * away, away])
  gl.drawElements(gl.TRIANGLES, face.length, gl.UNSIGNED_INT, 0)
}
canvas.onpointermove = e => { if (!e.buttons) return
  turn += e.movementX / 150
  tilt = Math.max(-1.5, Math.min(1.5, tilt + e.movementY / 150)); draw() }
canvas.onwheel = e => { away = Math.max(2, Math.min(12, away * Math.exp(e.deltaY / 900))); draw() }
onresize = draw; draw()
</script></html>
"""


# ----------------------------------------------------------------------------------- command line
# the Scene's own settings, and the NeRF's
SCENE = {name: p.default for name, p in inspect.signature(Scene).parameters.items()
         if p.default is not p.empty}
DEFAULTS = SCENE | {"prompt": None, "blob": 10.0, "blob_radius": 0.5, "threshold": 10.0,
                    "kernels": "auto"}


def methods():
    """The rows of asd.py and variants.py at the rates and the schedule of 3D (λ 7.5, γ −0.5).

    At a rate that stays, the mug's late steps, of small t, painted a cyan smear on one side.
    """
    rows = {name: replace(row, lr=0.02, lr_end=0.05, steps=600, omega="sigma2", t_max_late=0.5,
                          t_late=0.5)
            for name, row in runs.all_methods().items()}
    return rows | {"asd": replace(rows["asd"], gamma=-0.5)}


def add_flags(add):
    some = runs.number(float)
    add("--prompt", metavar="TEXT", help="what to make")
    add("--views", type=runs.number(int, 1), help="pictures per step (default 2)")
    add("--samples", type=runs.number(int, 2), help="along each ray (default 48)")
    add("--elevation", type=some, nargs=2, help="degrees, least and largest (default 5 35)")
    add("--overhead", type=runs.number(float, 0, 1), help="the part seen from above "
        "(default 0.125)")
    add("--distance", type=runs.number(float, 1e-3), nargs=2, help="of the camera (2.75 3.1)")
    add("--azimuth", type=some, nargs=2, help="degrees, 0 is the front (default -180 180)")
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
    add("--threshold", type=runs.number(float, 0, 1e30), help="density of the mesh's surface "
        "(default 10)")
    add("--kernels", choices=["auto", "torch", "triton"], help="default auto: Triton on CUDA")


def check(settings):
    """What can be said before anything is loaded."""
    if not (settings["prompt"] or "").strip():
        raise runs.UserError('give a --prompt that is not empty, such as --prompt "a red mug", '
                             "or --fit")
    for name in ("elevation", "azimuth", "fovy", "distance"):
        if settings[name][0] > settings[name][1]:
            raise runs.UserError(f"--{name} takes the least value first")
    if settings["lam_phi"] != 1:
        raise runs.UserError("--lam-phi has no use here: φ is told one prompt throughout")


def build(settings, prior, method, rng, folder, anew):
    """The Scene, and φ: a LoRA is told the camera, and the prompt without the view."""
    use_triton(settings["kernels"], torch.empty(0, device=prior.device))     # ValueError, if not
    nerf = NeRF(blob=settings["blob"], blob_radius=settings["blob_radius"],
                kernels=settings["kernels"], seed=settings["seed"])
    scene = Scene(prior, nerf, settings["prompt"], rng, method.steps,
                  **{key: settings[key] for key in SCENE})
    cond = prior.encode_text([settings["prompt"]])
    if method.phi == "lora":
        from phi import LoRAPhi
        phi = LoRAPhi(prior, settings["rank"], cond=cond, camera=16, seed=settings["seed"],
                      checkpointing=settings["checkpointing"])
    else:
        phi = runs.phi_of(settings, prior, method,      # every prompt that a view may ask
                          [f"{settings['prompt']}, {word} view" for word in scene.prompts])
    return scene, cond, phi, None


def measure(settings, prior, state, images):
    return view_scores(state.generator.nerf, settings["prompt"])


def finish(folder, settings, prior, state):
    """All that write_all writes, and the numbers."""
    values = measure(settings, prior, state, None)
    names = {"clip": "tiny-clip {:.3f}", "iou": "silhouette IoU {:.3f}", "psnr": "PSNR {:.2f} dB"}
    if values:
        print(", ".join(names[key].format(values[key]) for key in values), "over 8 views")
    return write_all(folder, state.generator.nerf, settings["threshold"])


def fit_parser():
    p = runs.Parser(prog="nerf.py --fit", description="Fit a NeRF to posed pictures.")
    add, count = p.add_argument, runs.number(int, 1)
    add("--fit", metavar="DIR_OR_BUILTIN", required=True,
        help='a folder with transforms.json, or a solid such as "red mug"')
    add("--pictures", type=count, default=40, help="of a built-in solid (default 40)")
    add("--size", type=runs.number(int, 8), default=64, help="pixels (default 64)")
    add("--steps", type=count, default=600)
    add("--batch", type=count, default=1024, help="rays per step (default 1024)")
    add("--samples", type=runs.number(int, 2), default=64, help="along each ray (default 64)")
    add("--lr", type=runs.number(float, 0, 1e30), default=2e-2)
    add("--box", type=runs.number(float, 1e-3), help="half the side of the scene (1; folders 1.5)")
    add("--background", choices=["white", "random"], default="random", help="default random")
    add("--view", action="store_true", help="colours depend on the direction")
    add("--threshold", type=runs.number(float, 0, 1e30), default=10.0,
        help="density of the mesh's surface (default 10)")
    add("--kernels", choices=["auto", "torch", "triton"], default="auto")
    add("--device", default="auto", help="default auto: cuda where there is one")
    add("--seed", type=runs.number(int, 0, 2 ** 63 - 1), default=0)
    add("--out", metavar="DIR", help="default outputs/fit-<name>")
    return p


def fit_main(arguments):
    """`python nerf.py --fit …`. -> exit status."""
    from tqdm import trange
    args = fit_parser().parse_args(arguments)
    folder = Path(args.fit)
    nerf = NeRF(args.box or (1.5 if folder.is_dir() else 1.0), density="exp", blob=5.0,
                blob_radius=0.6, view=args.view, kernels=args.kernels, seed=args.seed)
    nerf.to(runs.usable(args.device))
    use_triton(args.kernels, nerf.table)
    if folder.is_dir():
        learnt, held_out = posed_folder(folder, args.size)
    elif find_solid(args.fit):
        learnt, held_out = builtin_scene(*find_solid(args.fit), args.pictures, size=args.size,
                                         seed=args.seed)
    else:
        raise ValueError(f"--fit {args.fit!r} is neither a folder nor a solid, such as "
                         f'"red mug": {", ".join(solids.COLORS)}; {", ".join(solids.KINDS)}')
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-") or "scene"
    out = Path(args.out or Path("outputs") / f"fit-{name}")
    if (out / "config.json").exists():
        raise runs.UserError(f"{out} holds a run of text-to-3D: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    white, began = None if args.background == "random" else (1.0, 1.0, 1.0), time.perf_counter()
    with trange(args.steps, desc="fit") as bar:
        def show(step, loss):
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss:.5f}", PSNR=f"{-10 * math.log10(loss + 1e-10):.1f}")
        fit(nerf, learnt, args.steps, args.batch, args.samples, args.lr, white,
            torch.Generator().manual_seed(args.seed), show)
    seconds, truth = time.perf_counter() - began, held_out.over(1.0)
    seen = look(nerf, held_out, args.samples).rgb.cpu()
    print(f"PSNR on {len(truth)} held-out views: {psnr(seen, truth):.2f} dB; {seconds:.0f} s")
    pictures_to_png(out / "truth.png", [truth[:8], seen[:8]])            # above, below
    print(write_all(out, nerf, args.threshold))
    return 0


def main(argv=None):
    """Text-to-3D as a program of runs.py, or --fit. -> exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] == "--fit" for flag in arguments):
        return runs.main(argv, runs.Program(
            name="nerf.py", about="Make a 3D object that looks, to a frozen text-to-image "
            "diffusion model, like the prompt (Adversarial Score Distillation). For posed "
            "pictures: --fit --help.",
            methods=methods, add_flags=add_flags, defaults=DEFAULTS,
            prompts=lambda settings: [settings["prompt"]], check=check, build=build, finish=finish,
            measure=measure))
    try:
        return fit_main(arguments)
    except (runs.UserError, ValueError, OSError, RuntimeError, FloatingPointError) as mistake:
        message = str(mistake) or type(mistake).__name__
        print(f"nerf.py: {message.splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nnerf.py: stopped", file=sys.stderr)
        return 130
