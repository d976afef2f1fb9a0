"""nerf.py on other people's cameras: lenses, matrices, names, scales; the mesh file and its page.

The lenses are checked against their forward models, written out by themselves in NumPy.
"""
import json
import math
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import nerf
from cli import pictures
from nerf import camera_to_world
from tiny import solids

DOUBLE = {"dtype": torch.float64}
close = torch.testing.assert_close
ANGLE = {"camera_angle_x": math.radians(40)}


# ------------------------------------------------------------------------------- a folder of frames
def write_folder(folder, count=8, size=16, fields=None, change=None, picture=None, name="r_{}.png"):
    """Pictures of a blue ball from `count` sides, and transforms.json. -> the frames

    fields: of the file; change(i, frame) may change a frame; picture: a PIL one in place of all.
    """
    rng = torch.Generator().manual_seed(1)
    elevation, azimuth = torch.rand(2, count, generator=rng)
    c2w = camera_to_world(90 * elevation - 20, 360 * azimuth, 2.7)
    posed = nerf.solid_pictures("ball", "blue", c2w, size=size)
    frames = []
    for i in range(count):
        alpha = posed.opacity[i, ..., None]
        rgba = torch.cat([posed.color[i] / alpha.clamp(min=1e-6), alpha], -1).clamp(0, 1)
        image = picture or Image.fromarray((rgba * 255).round().byte().numpy())
        image.save(folder / name.format(i))
        frames.append({"file_path": name.format(i), "transform_matrix": c2w[i].tolist()})
        if change:
            change(i, frames[i])
    write_json(folder, (ANGLE if fields is None else fields) | {"frames": frames})
    return frames


def write_json(folder, fields, name="transforms.json"):
    (folder / name).write_text(json.dumps(fields))


def one_frame(folder, fields, size=(40, 20), height=20, matrix=None):
    """Posed of one red picture of `size` from the origin, or from the matrix."""
    Image.new("RGB", size, "red").save(folder / "a.png")
    matrix = torch.eye(4).tolist() if matrix is None else matrix
    frame = {"file_path": "a.png", "transform_matrix": matrix}
    write_json(folder, {"frames": [frame | fields.pop("frame", {})]} | fields)
    return nerf.read_transforms(folder / "transforms.json", height)


def project(d, lens):
    """The forward model, by hand: directions [..., 3] -> pixels [..., 2] of the lens's picture."""
    x, y, z = d[..., 0], -d[..., 1], -d[..., 2]            # OpenCV's axes: y down, z forward
    k1, k2, k3, k4 = (lens.get(f"k{i}", 0) for i in (1, 2, 3, 4))
    p1, p2 = lens.get("p1", 0), lens.get("p2", 0)
    if lens.get("camera_model") == "OPENCV_FISHEYE":
        r = np.hypot(x, y)
        theta = np.arctan2(r, z)
        bent = theta * (1 + k1 * theta ** 2 + k2 * theta ** 4 + k3 * theta ** 6 + k4 * theta ** 8)
        a, b = bent * x / r, bent * y / r
    else:
        x, y = x / z, y / z
        r2 = x ** 2 + y ** 2
        radial = 1 + k1 * r2 + k2 * r2 ** 2 + k3 * r2 ** 3
        a = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x ** 2)
        b = y * radial + p1 * (r2 + 2 * y ** 2) + 2 * p2 * x * y
    return np.stack([lens["fl_x"] * a + lens["cx"], lens["fl_y"] * b + lens["cy"]], -1)


LENSES = {
    "square pixels": {"fl_x": 30, "fl_y": 30, "cx": 20, "cy": 10},
    "fl_x ≠ fl_y": {"fl_x": 30, "fl_y": 17, "cx": 20, "cy": 10},
    "off the centre": {"fl_x": 30, "fl_y": 30, "cx": 4.5, "cy": 13},
    "OPENCV": {"fl_x": 31, "fl_y": 29, "cx": 21, "cy": 9.5, "k1": -0.2, "k2": 0.06, "p1": 0.01,
               "p2": -0.02, "camera_model": "OPENCV"},
    "k3": {"fl_x": 31, "fl_y": 31, "cx": 20, "cy": 10, "k1": 0.1, "k2": 0.02, "k3": 0.01},
    "OPENCV_FISHEYE": {"fl_x": 14, "fl_y": 13, "cx": 19.2, "cy": 11.1, "k1": 0.05, "k2": -0.01,
                       "k3": 0.002, "k4": -0.0003, "camera_model": "OPENCV_FISHEYE"},
}


@pytest.mark.parametrize("name", LENSES)
@pytest.mark.parametrize("place", ["file", "frame", "half"])
def test_a_ray_is_imaged_where_its_pixel_is(name, place, tmp_path):
    """The lens's forward model takes each ray back to the middle of its pixel.

    Whether the file has the intrinsics or the frame (then those of the file are not its own), or
    the picture is a copy half as large as w × h.
    """
    lens = LENSES[name]
    fields = {"w": 40, "h": 20} | lens
    if place == "frame":
        fields = {"fl_x": 99, "fl_y": 98, "cx": 1, "cy": 2, "frame": fields}
    step = 2 if place == "half" else 1
    posed = one_frame(tmp_path, fields, (40 // step, 20 // step), 20 // step)
    d = posed.directions[0].double()
    close(d.norm(dim=-1), torch.ones(20 // step, 40 // step, **DOUBLE), rtol=0, atol=1e-6)
    u, v = np.meshgrid(np.arange(0.5, 40 / step) * step, np.arange(0.5, 20 / step) * step)
    assert np.abs(project(d.numpy(), lens) - np.stack([u, v], -1)).max() < 2e-5


def test_null_in_a_frame_is_no_field(tmp_path):
    """The file's distortion holds for a frame that writes null."""
    lens = {"w": 40, "h": 20} | LENSES["OPENCV"]
    plain = one_frame(tmp_path, dict(lens))
    assert torch.equal(one_frame(tmp_path, lens | {"frame": {"k1": None, "cx": None}}).directions,
                       plain.directions)


@given(st.floats(-0.15, 0.4), st.floats(-0.02, 0.1), st.floats(-0.03, 0.03), st.floats(-0.03, 0.03))
def test_undistort_is_the_inverse_of_distort(k1, k2, p1, p2):
    """In double precision, over a picture as wide as 90°."""
    line = torch.linspace(-1, 1, 9, **DOUBLE)
    a, b = torch.meshgrid(line, 0.7 * line, indexing="xy")
    k, p = (k1, k2, 0.0, 0.0), (p1, p2)
    close(torch.stack(nerf.undistort(*nerf.distort(a, b, k, p), k, p)), torch.stack([a, b]),
          rtol=0, atol=1e-9)


def test_distort_by_hand():
    """r² = 5 at (1, 2): R = 1 + 0.1·5 + 0.01·25 = 1.75; the tangential part by OpenCV's formula."""
    a, b = nerf.distort(torch.tensor(1.0, **DOUBLE), torch.tensor(2.0, **DOUBLE),
                        (0.1, 0.01, 0, 0), (0.1, 0.2))
    assert (a.item(), b.item()) == pytest.approx((1.75 + 0.4 + 0.2 * 7, 3.5 + 0.1 * 13 + 0.8))


def test_wide_pictures_of_a_rounded_width(tmp_path):
    """41 × 20 pixels become 20 × 10: the columns are 2.05 wide, and the rays know it."""
    posed = one_frame(tmp_path, {"camera_angle_x": math.pi / 2}, (41, 20), 10)
    corner = posed.directions[0, 0, 0]
    close(corner / -corner[2], torch.tensor([-0.95, 0.9 * 20 / 41, -1]))


@pytest.mark.parametrize("fields, message", [
    ({"camera_angle_x": 0}, "camera_angle_x is 0"),
    ({"camera_angle_x": math.pi}, "camera_angle_x is 3.14"),
    ({"camera_angle_x": -1}, "camera_angle_x is -1"),
    ({"camera_angle_x": 40}, "camera_angle_x is 40: radians"),
    ({"camera_angle_x": 1e-9}, "camera_angle_x"), ({"camera_angle_x": math.nan}, "camera_angle_x"),
    ({"camera_angle_x": 10 ** 400}, "camera_angle_x"), ({"camera_angle_x": True}, "camera_angle_x"),
    ({"camera_angle_x": "0.7"}, "camera_angle_x"), ({"camera_angle_y": 40}, "camera_angle_y is 40"),
    ({"fl_x": 0}, "fl_x is 0"), ({"fl_x": -30}, "fl_x is -30"), ({"fl_x": math.inf}, "fl_x"),
    ({"fl_x": 30, "fl_y": -30}, "fl_y is -30"), ({"fl_x": 1e9}, "fl_x is 1e"),
    ({"fl_x": 0.8}, r"fl_x is 0.8"), ({"fl_x": [30]}, "fl_x"),
    ({"fl_x": 30, "w": 0, "h": 0}, "w, h are 0, 0"), ({"fl_x": 30, "w": -40}, "w, h are -40"),
    ({"fl_x": 30, "w": 20, "h": 40}, "40 × 20 pixels, but w, h are 20, 40"),
    ({"fl_x": 30, "cx": math.nan}, "cx is nan"), ({"fl_x": 30, "cx": 9999}, "cx, cy are 9999"),
    ({"fl_x": 30, "k1": math.nan}, "k1 is nan"), ({"fl_x": 30, "k1": 1e11}, "no lens has"),
    ({"fl_x": 30, "p1": 5}, "no lens has"), ({"fl_x": 10, "k1": -0.5}, "no inverse"),
    ({"fl_x": 30, "k4": 0.1}, "k4 is 0.1"), ({"fl_x": 30, "k6": 0.1}, "k6 is 0.1"),
    ({"fl_x": 30, "camera_model": "EQUIRECTANGULAR"}, "camera_model EQUIRECTANGULAR"),
    ({"fl_x": 30, "is_fisheye": True, "p1": 0.1}, "p1 is 0.1"),
    ({"camera_angle_x": 0.7, "is_fisheye": True}, "no fl_x"),
    ({"fl_x": 2, "is_fisheye": True}, "fl_x is 2"),
    ({"fl_x": 30, "is_fisheye": "false"}, "is_fisheye is 'false': true or false is needed"),
    ({"fl_x": 30, "rolling_shutter": [0, 0, 0.1]}, "rolling_shutter"),
    ({"fl_x": 30, "ftheta_p1": 0.1}, "ftheta_p1"),
    ({"fl_x": 30, "camera_angle_x": 0.7}, "differ"), ({}, "neither fl_x nor camera_angle_x"),
])
def test_lenses_that_cannot_be(fields, message, tmp_path):
    """A ValueError names the file, the frame and the field."""
    with pytest.raises(ValueError, match=message) as caught:
        one_frame(tmp_path, dict(fields))
    assert "transforms.json cannot be used: frame 0 (a.png): " in str(caught.value)


EYE = np.eye(4)


@pytest.mark.parametrize("matrix, message", [
    (np.zeros((4, 4)), "no rotation"), (np.full((4, 4), math.nan), "no finite number"),
    (EYE + math.inf * (EYE - EYE + 1), "no finite"), (np.diag([1, 1, 0, 1]), "no rotation"),
    (np.diag([-1, 1, 1, 1]), "no rotation"), (np.diag([1, 1, 3, 1]), "no rotation"),
    (np.triu(np.ones((4, 4))) - [[0, 0, 0, 1]], "ends in|no rotation"),
    (EYE + np.outer([0, 0, 0, 1], [3, 4, 5, 0]), "transposed"), (np.eye(3), "shape"),
    (np.ones((4, 3)), "shape"), (np.eye(5), "shape"), (1e200 * EYE, "no finite"),
    ([], "shape"), ([[1, 2], [3]], "no matrix"), ("identity", "no matrix"), (None, "no matrix"),
    ([["1"] * 4] * 4, "no matrix"), ([[10 ** 400] * 4] * 4, "no matrix")])
def test_matrices_that_are_no_camera(matrix, message, tmp_path):
    matrix = matrix.tolist() if isinstance(matrix, np.ndarray) else matrix
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write_json(tmp_path, ANGLE | {"frames": [{"file_path": "a.png", "transform_matrix": matrix}]})
    with pytest.raises(ValueError, match=rf"frame 0 \(a.png\): .*({message})"):
        nerf.read_transforms(tmp_path / "transforms.json", 8)


def test_matrices_of_three_rows_or_with_a_scale(tmp_path):
    """3 × 4 is the same as 4 × 4; a rotation that a tool has scaled turns, and scales nothing."""
    whole = camera_to_world(20.0, 30.0, 2.7)[0]
    scaled = whole.clone()
    scaled[:3, :3] *= 2.5
    expected = one_frame(tmp_path, dict(ANGLE), matrix=whole.tolist())
    for matrix in (whole[:3], scaled):
        posed = one_frame(tmp_path, dict(ANGLE), matrix=matrix.tolist())
        close(posed, expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------- names and pictures
@pytest.mark.parametrize("written, stored", [
    ("./images/r_0", "images/r_0.png"), ("images\\r_0.png", "images/r_0.png"),
    (".\\images\\r_0", "images/r_0.jpg"), ("images/r.0.1", "images/r.0.1.png"),
    ("images/r.0.1.png", "images/r.0.1.png"), ("images/r.0", "images/r.0.jpeg"),
    ("images/R", "images/R.PNG"), ("images/plain", "images/plain")])
def test_names_of_pictures(written, stored, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / stored, format="PNG")
    frame = {"file_path": written, "transform_matrix": EYE.tolist()}
    write_json(tmp_path, ANGLE | {"frames": [frame]})
    posed = nerf.read_transforms(tmp_path / "transforms.json", 8)
    close(posed.color[0, 0, 0], torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("name", ["nowhere", "", None, 3, "..", "a\0b", "x" * 999, ["a.png"]])
def test_names_of_no_picture(name, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    frame = {"file_path": name, "transform_matrix": EYE.tolist()}
    write_json(tmp_path, ANGLE | {"frames": [frame]})
    with pytest.raises(ValueError, match="frame 0 "):
        nerf.read_transforms(tmp_path / "transforms.json", 8)


@pytest.mark.parametrize("content", [
    "[]", "{}", '{"frames": {}}', '{"frames": []}', '{"frames": [3]}', "{", "\ufeff{"])
def test_files_of_no_frames(content, tmp_path):
    (tmp_path / "transforms.json").write_text(content)
    with pytest.raises(ValueError, match="transforms.json cannot be used: "):
        nerf.read_transforms(tmp_path / "transforms.json", 8)


def test_pictures_of_different_sizes_are_refused(tmp_path):
    frames = write_folder(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "r_3.png")
    with pytest.raises(ValueError, match=r"frame 3 \(r_3.png\): 32 × 32 pixels.* have 16 × 16"):
        nerf.posed_folder(tmp_path, 8)
    assert len(frames) == 8


def test_pictures_that_all_have_the_same_camera_are_refused(tmp_path):
    same = {"transform_matrix": EYE.tolist()}
    write_folder(tmp_path, change=lambda i, frame: frame.update(same))
    with pytest.raises(ValueError, match="all frames have the same transform_matrix"):
        nerf.posed_folder(tmp_path, 8)


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (2000, 100)])
def test_strips_are_no_pictures(size, tmp_path):
    with pytest.raises(ValueError, match=rf"a.png\): {size[0]} × {size[1]} pixels are a strip"):
        one_frame(tmp_path, dict(ANGLE), size)


@pytest.mark.parametrize("values, expected", [
    (np.full((8, 8), 0.5, np.float32), 0.5), (np.full((8, 8), 32768, np.uint16), 0.5),
    (np.full((8, 8), math.nan, np.float32), None), (np.full((8, 8), 7.0, np.float32), None),
    (np.full((8, 8), 70000, np.int32), None)])
def test_pictures_of_many_bits(values, expected, tmp_path):
    """Floats in [0, 1] and 16 bits are read; what has no known white is refused by name."""
    Image.fromarray(values).save(tmp_path / "a.tiff")
    frame = {"file_path": "a", "transform_matrix": EYE.tolist()}
    write_json(tmp_path, ANGLE | {"frames": [frame]})
    if expected is None:
        with pytest.raises(ValueError, match="a.tiff"):
            nerf.read_transforms(tmp_path / "transforms.json", 8)
    else:
        posed = nerf.read_transforms(tmp_path / "transforms.json", 8)
        close(posed.color, torch.full((1, 8, 8, 3), expected), rtol=0, atol=0.005)


# ------------------------------------------------------------------------------------- the command
QUICK = ["--steps", "2", "--batch", "16", "--samples", "4", "--size", "8", "--device", "cpu"]


def run_command(folder, capsys, monkeypatch, *flags):
    """-> (status, lines on stderr, but for what it does last) of `nerf.py folder`."""
    monkeypatch.setattr(nerf, "write_all", lambda folder, nerf, threshold: folder)
    status = nerf.main([str(folder), *QUICK, "--out", str(folder / "out"), *flags])
    err = [line for line in capsys.readouterr().err.strip().split("\n") if "%|" not in line]
    return status, [line for line in err if line and "makes the views" not in line]


def spoil(value):
    return lambda frame: frame.update(transform_matrix=np.full((4, 4), value).tolist())


@pytest.mark.parametrize("last, message", [
    (spoil(math.nan), "frame 7 (r_7.png): transform_matrix"), (spoil(0), "frame 7 (r_7.png): "),
    (lambda frame: frame.update(camera_angle_x=40), "camera_angle_x is 40"),
    (lambda frame: frame.update(k1=-9), "no inverse")])
def test_what_is_wrong_in_held_out_frames_alone(last, message, tmp_path, capsys, monkeypatch):
    """The eighth frame is held out: the run used to end in «PSNR nan» and status 0."""
    write_folder(tmp_path, change=lambda i, frame: last(frame) if i == 7 else None)
    status, err = run_command(tmp_path, capsys, monkeypatch)
    assert status == 2 and len(err) == 1 and message in err[0], err


@pytest.mark.parametrize("scale, offset", [
    (100, (0, 0, 0)), (100, (50, -400, 300)), (0.01, (3, 0, 0)), (6, (0, 0, 0)),
    (1, (20, 0, 0)), (1, (5e5, 5e6, 0))])
def test_a_scene_of_another_scale_is_put_into_the_box(scale, offset, tmp_path, capsys, monkeypatch):
    """One line names the centre and the factor; what is learnt is the same from any scale."""
    def change(i, frame):
        m = np.array(frame["transform_matrix"])
        m[:3, 3] = scale * m[:3, 3] + offset
        frame["transform_matrix"] = m.tolist()
    write_folder(tmp_path, change=change)
    status, err = run_command(tmp_path, capsys, monkeypatch)
    assert status == 0 and len(err) == 1, err
    config = json.loads((tmp_path / "out/config.json").read_text())
    found = re.search(r"its centre \((.*)\) to the origin and scaled by (\S+) into", err[0])
    assert float(found[2]) == pytest.approx(config["factor"], rel=1e-3)
    # the ball is at the cameras' origin, and fills the box but for a margin
    centre = (np.array(config["centre"]) - offset) / scale
    assert np.abs(centre).max() < 0.05
    radius = solids.render(["ball"], ["blue"], lambda n: nerf.rays(
        camera_to_world(0.0, 0.0, 2.7), 40.0, n), 64).depth.min().item()
    assert config["factor"] * scale * (2.7 - radius) == pytest.approx(0.9 * 1.5, rel=0.1)
    learnt, held_out, _ = nerf.into_box(*nerf.posed_folder(tmp_path, 16, torch.float64), 1.5)
    for posed in (learnt, held_out):
        near, far = nerf.intersect_box(posed.origins[posed.opacity > 0.5],
                                       posed.directions[posed.opacity > 0.5], 1.5)
        assert (near < far).all() and posed.origins.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.5, 1, 1.5])
def test_a_scene_that_fits_stays_as_it_is(scale, tmp_path, capsys, monkeypatch):
    """Bit for bit, and no line says otherwise."""
    def change(i, frame):
        m = np.array(frame["transform_matrix"])
        m[:3, 3] *= scale
        frame["transform_matrix"] = m.tolist()
    write_folder(tmp_path, change=change)
    plain = nerf.posed_folder(tmp_path, 16)
    learnt, held_out, moved = nerf.into_box(*nerf.posed_folder(tmp_path, 16, torch.float64), 1.5)
    assert moved is None
    for posed, expected in zip((learnt, held_out), plain):
        assert all(map(torch.equal, posed, expected))
    assert run_command(tmp_path, capsys, monkeypatch) == (0, [])


def test_photographs_of_another_scale(tmp_path):
    """Opaque ones: all that is seen at the centre's distance is put into the box."""
    frames = write_folder(tmp_path, picture=Image.new("RGB", (16, 16), "red"))
    for frame in frames:
        for row, offset in zip(frame["transform_matrix"], (7, 8, 9)):
            row[3] = 100 * row[3] + offset
    write_json(tmp_path, ANGLE | {"frames": frames})
    _, _, (centre, factor) = nerf.into_box(*nerf.posed_folder(tmp_path, 16, torch.float64), 1.5)
    assert centre == pytest.approx([7, 8, 9], abs=0.01)
    # the corner pixel's centre is 15/16 √2 tan 20° off the axis
    corner = math.atan(15 / 16 * math.sqrt(2) * math.tan(math.radians(20)))
    assert factor == pytest.approx(0.9 * 1.5 / (270 * math.sin(corner)), rel=1e-3)


@pytest.mark.parametrize("turned", ["outwards", "OpenCV's", "side by side"])
def test_cameras_that_look_at_no_common_point_are_refused(turned, tmp_path, capsys, monkeypatch):
    def change(i, frame):
        m = np.array(frame["transform_matrix"])
        if turned != "side by side":
            m[:3, :3] = m[:3, :3] @ np.diag([-1, 1, -1] if turned == "outwards" else [1, -1, -1])
        else:
            m[:3, :3] = np.eye(3)
        m[:3, 3] = 50 * m[:3, 3] + [0, 0, 200]
        frame["transform_matrix"] = m.tolist()
    write_folder(tmp_path, change=change)
    status, err = run_command(tmp_path, capsys, monkeypatch)
    assert status == 2 and len(err) == 1 and "look at no common point" in err[0], err
    assert ("negate columns 2 and 3" in err[0]) == (turned != "side by side")
    assert not (tmp_path / "out").exists()


def test_a_room_seen_from_inside_stays_as_it_is(tmp_path):
    """Cameras in the box that look outwards meet it with every ray."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    frames = [{"file_path": "a.png", "transform_matrix": camera_to_world(
        0.0, 45.0 * i, -0.2)[0].tolist()} for i in range(8)]
    write_json(tmp_path, ANGLE | {"frames": frames})
    assert nerf.into_box(*nerf.posed_folder(tmp_path, 8), 1.5)[2] is None


def test_held_out_cameras_of_another_scale_are_refused(tmp_path, capsys, monkeypatch):
    def change(i, frame):
        if i == 7:
            for row in frame["transform_matrix"][:3]:
                row[3] = 100 * row[3] + 500
    write_folder(tmp_path, change=change)
    status, err = run_command(tmp_path, capsys, monkeypatch)
    assert status == 2 and len(err) == 1 and "held-out pictures" in err[0], err


# ------------------------------------------------------------------------------------ mesh and page
@pytest.fixture(scope="module")
def mesh_folder(tmp_path_factory):
    """A ball of radius ½ whose colours are the darkest 64 levels, and the others."""
    pytest.importorskip("trimesh"), pytest.importorskip("skimage")

    def color(x):
        level = torch.arange(len(x)) % 256 / 255
        return torch.stack([level, level / 4, 1 - level], 1)
    folder = tmp_path_factory.mktemp("mesh")
    mesh = pictures.extract_mesh(lambda x: 20 * (0.5 - x.norm(dim=1)) + 10, color, 1.0, 10.0, 24)
    pictures.write_mesh(folder, mesh)
    return folder, mesh, color(torch.zeros(len(mesh.vertices), 1)).numpy()


def read_glb(path):
    """-> (the tree, {attribute: array}) of a GLB of one mesh, by the specification."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    tree = json.loads(data[20:20 + length])
    binary = data[28 + length:]

    def array(number):
        accessor = tree["accessors"][number]
        start = tree["bufferViews"][accessor["bufferView"]]["byteOffset"]
        kind = {5123: "<u2", 5125: "<u4", 5126: "<f4"}[accessor["componentType"]]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        return np.frombuffer(binary, kind, accessor["count"] * width, start).reshape(-1, width)
    primitive = tree["meshes"][0]["primitives"][0]
    return tree, {name: array(i) for name, i in primitive["attributes"].items()}


def test_mesh_colours_keep_the_dark_levels(mesh_folder):
    """COLOR_0 is linear, 16 bits, normalised: every sRGB level comes back as itself."""
    folder, mesh, srgb = mesh_folder
    tree, attributes = read_glb(folder / "mesh.glb")
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    assert accessor["componentType"] == 5123 and accessor["normalized"] is True
    assert set(attributes) == {"POSITION", "COLOR_0"}
    linear = attributes["COLOR_0"] / 65535
    assert (linear[:, 3] == 1).all()
    again = np.where(linear <= 0.0031308, 12.92 * linear,
                     1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)[:, :3]
    assert np.abs(again - srgb).max() < 1e-4
    assert len(np.unique((255 * again[:, 0]).round())) == 256
    close(torch.tensor(attributes["POSITION"][:, [2, 0, 1]]).double(),
          torch.from_numpy(np.array(mesh.vertices)), rtol=0, atol=1e-6)
    assert tree["extensionsUsed"] == ["KHR_materials_unlit"]


STUB = """
let data, shaders = [], buffers = {}, uniforms = {}, draws = 0
const calls = {createProgram: () => 0, createShader: () => 0,
  shaderSource: (shader, text) => shaders.push(text), bufferData: (kind, d) => { data = [...d] },
  getAttribLocation: (program, name) => { buffers[name] = data; return 0 },
  getUniformLocation: (program, name) => name, drawElements: () => draws++,
  uniformMatrix4fv: (name, turned, value) => { uniforms[name] = value },
  uniform3fv: (name, value) => { uniforms[name] = value },
  uniform1i: (name, value) => { uniforms[name] = value }}
const context = new Proxy({}, {get: (_, name) => calls[name] || (() => 0)})
const found = {canvas: {getContext: () => context}, p: {}}, buttons = [{}, {}, {}]
globalThis.document = {querySelector: name => found[name], querySelectorAll: () => buttons}
globalThis.innerWidth = globalThis.innerHeight = 100
"""
STEPS = """
const first = {...uniforms}, modes = buttons.map(b => { b.onclick(); return uniforms.mode })
found.canvas.onpointermove({buttons: 1, movementX: 300, movementY: 60})
console.log(JSON.stringify({normal: buffers.normal, place: buffers.place, first, modes, draws,
                            turned: uniforms.light}))
"""


def test_page_has_normals_light_and_modes(mesh_folder, tmp_path):
    """The page's own script, in node: a ball's normals point outwards, the light stands at the
    eye's upper left and turns with it, three buttons draw anew."""
    if shutil.which("node") is None:
        pytest.skip("no node here")
    folder, mesh, _ = mesh_folder
    page = (folder / "viewer.html").read_text()
    script = re.search("<script>(.*)</script>", page, re.S)[1]
    (tmp_path / "page.js").write_text(STUB + script + STEPS)
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-900:]
    shown = json.loads(done.stdout)
    normal, place = (np.array(shown[name]).reshape(-1, 3) for name in ("normal", "place"))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (normal, place)]
    assert (unit[0] * unit[1]).sum(1).min() > 0.95
    assert shown["first"]["mode"] == 0 and shown["modes"] == [0, 1, 2] and shown["draws"] == 5
    # clip coordinates of a far point in the light's direction: left of the middle, above, in front
    view = np.array(shown["first"]["view"]).reshape(4, 4).T
    light = np.array(shown["first"]["light"])
    assert np.linalg.norm(light) == pytest.approx(1, abs=1e-3)
    left, up, _, depth = view @ [*(0.5 * light), 1]
    assert left < 0 < up and depth < view[3, 3]
    assert np.abs(light - shown["turned"]).max() > 0.5


def test_page_says_how_and_needs_nothing(mesh_folder):
    page = (mesh_folder[0] / "viewer.html").read_text()
    assert "drag to turn, scroll to zoom" in page and "{{" not in page
    assert re.findall("<button>(.*?)</button>", page) == ["colour", "shading", "normals"]
    assert not any(word in page for word in ("http:", "https:", "src=", "import(", "fetch"))
    assert len(pictures.VIEWER.read_text()) < 6000
