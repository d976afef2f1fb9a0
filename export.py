"""export.py — whole files; pictures with labels; views, a turntable, a mesh and a page.

All of it from tensors and callables: pictures [B, H, W, 3], density(x [N, 3]) -> [N]. The world is
nerf.py's (z is up, the scene fills [−box, box]³), colours are RGB in [0, 1].
"""
import base64
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

VIEWER = Path(__file__).resolve().with_name("viewer.html")


@contextmanager
def moved_into(path):
    """A temporary path beside `path`, moved there if all went well and removed if not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    with moved_into(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_png(picture, path):
    """Write a PIL picture beside its place and move it there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with moved_into(Path(path)) as part:
        picture.save(part, format="PNG", optimize=True)


def sheet(path, columns, rows, side, left=None, corner="", colors=None):
    """A labelled grid: column names, and for each row its label, pictures [N, 3, H, W], and, where
    there are notes, a line under each picture; corner: what the notes are. colors: a palette of
    that many, dithered, makes a file half the size."""
    from PIL import ImageDraw, ImageFont
    top, left, under = side // 4, left or round(1.1 * side), side // 7 * (len(rows[0]) > 2)
    width, height = left + side * len(columns), top + (side + under) * len(rows)
    page = Image.new("RGB", (width, height), "white")
    write = ImageDraw.Draw(page)
    font, small = (ImageFont.load_default(size=side // n) for n in (9, 13))
    write.multiline_text((left // 2, top // 2), corner, "black", small, anchor="mm", align="center")
    for i, name in enumerate(columns):
        write.text((left + side * (i + 0.5), top // 2), name, "black", font, anchor="mm")
    for j, (label, images, *notes) in enumerate(rows):
        y = top + (side + under) * j
        write.multiline_text((left // 2, y + side // 2), label, "black", small, anchor="mm",
                             align="center")
        for i, image in enumerate(images):
            pixels = (255 * image).round().byte().permute(1, 2, 0).cpu()
            picture = Image.fromarray(pixels.numpy())
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
            page.paste(picture, (left + side * i, y))
        for i, note in enumerate(notes[0] if notes else []):
            middle = left + side * (i + 0.5), y + side + under // 2
            write.text(middle, note, "black", small, anchor="mm")
    if colors:
        page = page.quantize(palette=page.quantize(colors), dither=Image.Dither.FLOYDSTEINBERG)
        palette = torch.tensor(page.getpalette()).view(-1, 3)     # white is white, not nearly so
        palette[palette.amin(1) > 247] = 255
        page.putpalette(palette.flatten().tolist())
    save_png(page, path)


def write_grid(path, images, columns, least=256):
    """images [N, 3, H, W] uint8 -> a PNG, `columns` to a row, each enlarged to `least` pixels."""
    n, _, height, width = images.shape
    rows = math.ceil(n / columns)
    blank = torch.full((rows * columns - n, 3, height, width), 255, dtype=torch.uint8)
    grid = torch.cat([images, blank]).view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    picture = Image.fromarray(grid.reshape(rows * height, columns * width, 3).numpy())
    scale = max(1, round(least / height))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    with moved_into(path) as temporary:
        picture.save(temporary, format="PNG")


def picture_measures(images):
    """RGB [B, 3, H, W] -> mean HSV saturation and mean |Laplacian| (sharpness), both in [0, …]."""
    high, low = images.amax(1), images.amin(1)
    grey = images.mean(1)
    laplacian = (4 * grey[:, 1:-1, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1]
                 - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:])
    return {"saturation": ((high - low) / high.clamp(min=1e-6)).mean().item(),
            "sharpness": laplacian.abs().mean().item()}


def write_rows(path, rows):
    """rows: RGB [B, H, W, 3] in [0, 1] each -> a PNG, one below the other, twice as large."""
    pixels = (torch.cat(rows).cpu().clamp(0, 1) * 255).round().byte()
    write_grid(path, pixels.permute(0, 3, 1, 2), len(rows[0]), 2 * pixels.shape[1])


def depth_normals(points):
    """The points that pixels show [B, H, W, 3] -> unit normals that face the camera, alike.

    Smoother than NeRF.normal, as the density's gradient at one point is grainy after a fit.
    """
    down, right = torch.gradient(points, dim=(1, 2))
    return F.normalize(torch.linalg.cross(right, -down), dim=-1)


def write_views(path, origins, directions, picture, distance, box):
    """views.png of rays [B, H, W, 3] and what they show (.rgb, .opacity, .depth), from `distance`
    away: colour, depth (near is bright), normals (x, y, z as R, G, B)."""
    there = picture.opacity[..., None]
    depth = (distance + box - picture.depth) / (2 * box)
    normal = depth_normals(origins + picture.depth[..., None] * directions)
    on_white = lambda v: there * v + 1 - there
    write_rows(path, [picture.rgb, on_white(depth.clamp(0, 1)[..., None].expand_as(directions)),
                      on_white(normal / 2 + 0.5)])


def write_turntable(path, frames):
    """turntable.gif of pictures [H, W, 3], and an mp4 beside it where ffmpeg is installed."""
    film = [Image.fromarray((rgb.clamp(0, 1).cpu() * 255).round().byte().numpy()) for rgb in frames]
    with moved_into(Path(path)) as part:
        film[0].save(part, format="GIF", save_all=True, append_images=film[1:], duration=70, loop=0)
    if shutil.which("ffmpeg"):
        try:
            with moved_into(Path(path).with_suffix(".mp4")) as part:
                subprocess.run(["ffmpeg", "-loglevel", "error", "-y", "-i", str(path), "-pix_fmt",
                                "yuv420p", "-f", "mp4", str(part)], check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"no turntable.mp4: {error}", file=sys.stderr)


@torch.no_grad()
def extract_mesh(density, color, box, threshold=10.0, resolution=96, device="cpu"):
    """Marching cubes -> a trimesh.Trimesh with vertex colours (sRGB, as the pictures).

    density(x [N, 3]) -> [N], color(x [N, 3]) -> RGB [N, 3]. Raises ValueError where the density is
    nowhere above, or nowhere below, the threshold.
    """
    import trimesh
    from skimage.measure import marching_cubes
    line = torch.linspace(-box, box, resolution, device=device)
    x = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3)
    sigma = density(x)
    if not sigma.min() < threshold < sigma.max():
        raise ValueError(f"no surface to make a mesh of: the density lies in {sigma.min():.3g} … "
                         f"{sigma.max():.3g}, --threshold is {threshold:g}")
    volume = F.pad(sigma.view([resolution] * 3), [1] * 6).cpu().numpy()  # closed at the box
    vertices, faces, _, _ = marching_cubes(volume, threshold, gradient_direction="ascent")
    vertices = torch.from_numpy(vertices.copy() - 1) * (2 * box / (resolution - 1)) - box
    rgb = torch.cat([color(part) for part in vertices.to(x).split(1 << 16)]).cpu()
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
    with moved_into(folder / "mesh.glb") as part:
        part.write_bytes(data)
    coded = lambda array, kind: base64.b64encode(np.ascontiguousarray(array, kind)).decode()
    page = VIEWER.read_text("utf-8")
    for name, array, kind in (("place", mesh.vertices[:, [1, 2, 0]], "<f4"),
                              ("color", mesh.visual.vertex_colors[:, :3], "u1"),
                              ("face", mesh.faces, "<u4")):
        page = page.replace("{{" + name + "}}", coded(array, kind))
    write_text(folder / "viewer.html", page)
