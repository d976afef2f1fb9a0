"""cli/pictures.py — grids and sheets of pictures; views, a turntable, a mesh and a page of a scene.

All of it is made from tensors and functions: pictures [B, H, W, 3], density(x [N, 3]) -> [N]. The
world is nerf.py's (z is up, the scene fills [−box, box]³), colours are RGB in [0, 1].
"""
import base64
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from cli.files import moved_into, write_text

VIEWER = Path(__file__).resolve().with_name("viewer.html")


def to_bytes(images):
    """Turn [0, 1] into uint8 on the CPU, of any shape."""
    return (images.clamp(0, 1) * 255).round().byte().cpu()


def save_png(picture, path):
    """Write a PIL picture as a whole file, into a folder that is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with moved_into(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def write_grid(path, images, columns, least=256):
    """Write images [N, 3, H, W] uint8, `columns` to a row, each enlarged to `least` pixels."""
    n, _, height, width = images.shape
    rows = math.ceil(n / columns)
    blank = torch.full((rows * columns - n, 3, height, width), 255, dtype=torch.uint8)
    grid = torch.cat([images, blank]).view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    picture = Image.fromarray(grid.reshape(rows * height, columns * width, 3).numpy())
    scale = max(1, round(least / height))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    with moved_into(path) as temporary:
        picture.save(temporary, format="PNG")


def write_rows(path, rows):
    """Write rows of RGB [B, H, W, 3] in [0, 1], one below the other, twice as large."""
    pixels = to_bytes(torch.cat(rows))
    write_grid(path, pixels.permute(0, 3, 1, 2), len(rows[0]), 2 * pixels.shape[1])


def picture_measures(images):
    """RGB [B, 3, H, W] -> mean HSV saturation and mean |Laplacian| (sharpness), both in [0, …]."""
    high, low = images.amax(1), images.amin(1)
    grey = images.mean(1)
    laplacian = (4 * grey[:, 1:-1, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1]
                 - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:])
    return {"saturation": ((high - low) / high.clamp(min=1e-6)).mean().item(),
            "sharpness": laplacian.abs().mean().item()}


# ------------------------------------------------------------------------------------ a sheet
def sheet(path, columns, rows, side, left=None, corner="", colors=None):
    """Write a labelled grid of pictures.

    columns are names; a row is (label, pictures [N, 3, H, W]), or also a list of notes, a line
    under each picture; corner says what the notes are. side, left: pixels of a picture, and of the
    labels. colors: a palette of that many, dithered, which makes a file half the size.
    """
    lines = max(name.count("\n") + 1 for name in columns)
    top, left, under = side // 8 * (lines + 1), left or round(1.1 * side), 0
    if len(rows[0]) > 2:
        under = side // 7
    width, height = left + side * len(columns), top + (side + under) * len(rows)
    page = Image.new("RGB", (width, height), "white")
    write = ImageDraw.Draw(page)
    large, small = (ImageFont.load_default(size=side // n) for n in (10, 11))
    write.multiline_text((left // 2, top // 2), corner, "black", small, anchor="mm", align="center")
    for i, name in enumerate(columns):
        write.multiline_text((left + side * (i + 0.5), top // 2), name, "black", large,
                             anchor="mm", align="center", spacing=1)
    for j, (label, images, *notes) in enumerate(rows):
        y = top + (side + under) * j
        write.multiline_text((left // 2, y + side // 2), label, "black", small, anchor="mm",
                             align="center")
        for i, image in enumerate(images):
            picture = Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy())
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
            page.paste(picture, (left + side * i, y))
        for i, note in enumerate(notes[0] if notes else []):
            middle = left + side * (i + 0.5), y + side + under // 2
            write.text(middle, note, "black", small, anchor="mm")
    save_png(with_palette(page, colors) if colors else page, path)


def with_palette(page, colors):
    """Dither a PIL picture to so many colours; white stays white."""
    page = page.quantize(palette=page.quantize(colors), dither=Image.Dither.FLOYDSTEINBERG)
    palette = torch.tensor(page.getpalette()).view(-1, 3)
    palette[palette.amin(1) > 247] = 255
    page.putpalette(palette.flatten().tolist())
    return page


# ------------------------------------------------------------------------------------ a scene
def depth_normals(points):
    """The points that pixels show [B, H, W, 3] -> unit normals that face the camera, alike.

    They are smoother than NeRF.normal: after a fit, the density's gradient at one point is grainy.
    """
    down, right = torch.gradient(points, dim=(1, 2))
    return F.normalize(torch.linalg.cross(right, -down), dim=-1)


def write_views(path, origins, directions, picture, distance, box):
    """Write rows of colour, depth (near is bright) and normals (x, y, z as R, G, B).

    origins, directions: rays [B, H, W, 3] from `distance` away; picture: what they show (.rgb,
    .opacity, .depth).
    """
    opacity = picture.opacity[..., None]
    depth = ((distance + box - picture.depth) / (2 * box)).clamp(0, 1)[..., None]
    normal = depth_normals(origins + picture.depth[..., None] * directions)
    rows = [picture.rgb]
    for values in (depth.expand_as(directions), normal / 2 + 0.5):
        rows.append(opacity * values + 1 - opacity)                          # on white
    write_rows(path, rows)


def write_turntable(path, frames):
    """Write a GIF of pictures [H, W, 3], and an mp4 beside it where ffmpeg is installed."""
    path = Path(path)
    film = [Image.fromarray(to_bytes(rgb).numpy()) for rgb in frames]
    with moved_into(path) as temporary:
        film[0].save(temporary, format="GIF", save_all=True, append_images=film[1:], duration=70,
                     loop=0)
    if not shutil.which("ffmpeg"):
        return
    try:
        with moved_into(path.with_suffix(".mp4")) as temporary:
            subprocess.run(["ffmpeg", "-loglevel", "error", "-y", "-i", str(path), "-pix_fmt",
                            "yuv420p", "-f", "mp4", str(temporary)], check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no turntable.mp4: {error}", file=sys.stderr)


@torch.no_grad()
def extract_mesh(density, color, box, threshold=10.0, resolution=96, device="cpu"):
    """Marching cubes -> a trimesh.Trimesh with vertex colours (sRGB, as the pictures).

    density(x [N, 3]) -> [N], color(x [N, 3]) -> RGB [N, 3]. The colours are kept twice: rounded to
    8 bits, as trimesh has them, and as floats, the vertex attribute "rgb". Raises ValueError where
    the density is nowhere above, or nowhere below, the threshold.
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
    rgb = torch.cat([color(part) for part in vertices.to(x).split(1 << 16)])
    return trimesh.Trimesh(vertices.numpy(), faces, process=False,
                           vertex_colors=to_bytes(rgb).numpy(),
                           vertex_attributes={"rgb": rgb.clamp(0, 1).cpu().numpy()})


def linear_16_bits(rgb):
    """Turn sRGB [N, 3] in [0, 1] into linear RGBA [N, 4] uint16, as glTF's vertex colours are.

    sRGB is fine in the dark: of its darkest 64 levels 14 would be left in 8 linear bits, all in 16.
    """
    rgb = rgb.astype(np.float64)
    linear = np.where(rgb < 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    # opaque; a fourth channel also keeps each vertex at a multiple of 4 bytes, as glTF wants
    linear = np.concatenate([linear, np.ones_like(linear[:, :1])], 1)
    return (linear * 65535).round().astype(np.uint16)


def finish_tree(tree):
    """Mark in a glTF tree that the attribute _COLOR is the colour, shown as it is, without lamps.
    """
    tree["materials"] = [{"extensions": {"KHR_materials_unlit": {}}, "pbrMetallicRoughness": {
        "metallicFactor": 0.0, "roughnessFactor": 1.0}}]
    tree["extensionsUsed"] = ["KHR_materials_unlit"]
    for primitive in tree["meshes"][0]["primitives"]:
        primitive["material"] = 0
        attributes = primitive["attributes"]
        attributes["COLOR_0"] = attributes.pop("_COLOR")
        # 0 … 65535 mean 0 … 1
        tree["accessors"][attributes["COLOR_0"]]["normalized"] = True


def write_mesh(folder, mesh):
    """Write mesh.glb (y is up, colours linear, unlit: as glTF has them) and viewer.html."""
    import trimesh
    rgb = mesh.vertex_attributes["rgb"]
    # trimesh itself writes colours with 8 bits, but attributes as they are
    turned = trimesh.Trimesh(mesh.vertices[:, [1, 2, 0]], mesh.faces, process=False,   # y is up
                             vertex_attributes={"_COLOR": linear_16_bits(rgb)})
    with moved_into(folder / "mesh.glb") as temporary:
        temporary.write_bytes(turned.export(file_type="glb", tree_postprocessor=finish_tree))
    page = VIEWER.read_text("utf-8")
    for name, array, kind in (("place", turned.vertices, "<f4"),
                              ("color", mesh.visual.vertex_colors[:, :3], "u1"),
                              ("face", mesh.faces, "<u4")):
        coded = base64.b64encode(np.ascontiguousarray(array, kind)).decode()
        page = page.replace("{{" + name + "}}", coded)
    write_text(folder / "viewer.html", page)
