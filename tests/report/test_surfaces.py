"""Surfaces of volumes: where they are, which way round, and the same on the page as in Python."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cryodrgn_amort.report import html as pages, meshes as surfaces, turnable
from cryodrgn_amort.report.meshes import VIEW, Mesh, isosurfaces, render, simplified

VIEWER = Path(pages.__file__).parent / "templates/viewer.js"
BLUE = "#3f90da"


def ball(box, radius, centre=(0, 0, 0)):
    """Return a density that is 0 at a distance (voxels) from a place (z, y, x), and more inside."""
    axis = np.arange(box) - (box - 1) / 2
    z, y, x = np.meshgrid(*(axis - c for c in centre), indexing="ij", sparse=True)
    return (radius - np.sqrt(z**2 + y**2 + x**2)).astype(np.float32)


def solid(box, radius, centre=(0, 0, 0)):
    """Return a ball whose surface, at whatever low threshold, is about at its radius."""
    return np.clip(ball(box, radius, centre) + 0.5, 0, 1)


def voxel(box, *where):
    volume = np.zeros((box, box, box), np.float32)
    volume[where] = 1
    return volume


def mesh_of(volume, level=0.0):
    return surfaces._mesh(volume, level)


def centre_of(image):
    """Return where the ink is: to the right and up, in half edges of the picture."""
    rows, columns = np.nonzero(image[..., 3])
    middle = (len(image) - 1) / 2
    return np.array([columns.mean() - middle, middle - rows.mean()]) / (len(image) / 2)


# averaged down (130, and 65 with a voxel left over), as they are (40), doubled (16, 17)
@pytest.mark.parametrize(("box", "radius"), [(16, 5), (17, 5), (40, 12), (65, 20), (130, 40)])
def test_a_ball_is_a_sphere_of_its_radius(box, radius):
    mesh = mesh_of(ball(box, radius))
    distance = np.linalg.norm(mesh.vertices, axis=1) * box / 2
    np.testing.assert_allclose(distance, radius, atol=0.5)
    outward = (mesh.normals() * mesh.vertices).sum(1) / np.linalg.norm(mesh.vertices, axis=1)
    assert outward.min() > 0.95
    a, b, c = (mesh.vertices[mesh.faces[:, i]] * box / 2 for i in range(3))
    inside = np.einsum("ij,ij->", a, np.cross(b, c)) / 6  # positive if faces turn outwards
    assert inside == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03)
    assert is_closed(mesh)


def is_closed(mesh):
    edges = np.sort(mesh.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    return set(np.unique(edges, axis=0, return_counts=True)[1]) == {2}


@pytest.mark.parametrize("box", [16, 40])
def test_a_surface_is_closed_at_the_edge_of_the_box(box):
    mesh = mesh_of(ball(box, box * 0.45, (box / 2, 0, 0)))
    assert is_closed(mesh)
    assert mesh.vertices[:, 2].max() == pytest.approx(1, abs=1 / box)


@pytest.mark.parametrize("box", [24, 40])
def test_one_voxel_is_where_it_is(box):
    mesh = mesh_of(voxel(box, 20, 5, 13), 0.5)  # z, y, x
    middle = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2 * box / 2 + (box - 1) / 2
    np.testing.assert_allclose(middle, [13, 5, 20], atol=0.5)  # x, y, z


def test_the_view_is_not_a_mirror():
    """Right, up and towards the viewer are right-handed, in x, y, z; and the nearer one is seen."""
    np.testing.assert_allclose(VIEW @ VIEW.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(VIEW) == pytest.approx(1)
    to_viewer = VIEW[2, ::-1] * 13  # as z, y, x
    near, far = solid(48, 4, to_viewer), solid(48, 9, -to_viewer)
    both, alone, behind = (render(mesh_of(v, 0.5), BLUE) for v in (near + far, near, far))
    disc = np.hypot(*np.indices((200, 200)) - 99.5) < 10  # within the small one's outline
    assert np.abs(both - alone)[disc].max() < 0.01
    assert np.abs(both - behind)[disc].max() > 0.05


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_where_each_axis_of_a_volume_points(axis, sign):
    """From 25 degrees above and 35 degrees from x towards y: by hand, not by ``VIEW``."""
    elevation, azimuth = np.deg2rad([25, 35])
    right = {"x": -np.sin(azimuth), "y": np.cos(azimuth), "z": 0}
    up = {
        "x": -np.sin(elevation) * np.cos(azimuth),
        "y": -np.sin(elevation) * np.sin(azimuth),
        "z": np.cos(elevation),
    }
    centre = sign * 11 * np.array([axis == "z", axis == "y", axis == "x"])
    found = centre_of(render(mesh_of(solid(40, 3, centre), 0.5), BLUE))
    expected = np.array([right[axis], up[axis]]) * sign * 11 / 20
    np.testing.assert_allclose(found, expected, atol=0.01)  # one pixel


def test_a_ball_is_drawn_as_a_lit_disc():
    image = render(mesh_of(ball(32, 8)), BLUE)
    assert image.shape == (200, 200, 4)
    assert (image >= 0).all()
    assert (image <= 1).all()
    assert image[..., 3].mean() * 32**2 == pytest.approx(np.pi * 8**2, rel=0.03)
    upper, lower = image[60:100, 80:120, :3].mean(), image[100:140, 80:120, :3].mean()
    assert upper > 1.1 * lower  # the light comes from above
    blue = image[99, 99]
    assert blue[2] > blue[1] > blue[0]
    closer = render(mesh_of(ball(32, 8)), BLUE, 0.5)
    assert closer[..., 3].mean() == pytest.approx(4 * image[..., 3].mean(), rel=0.02)


def test_what_reaches_out_of_the_picture_is_cut():
    image = render(mesh_of(ball(32, 12)), BLUE, 0.4)
    assert image[..., 3].min() == 1
    up_right = render(mesh_of(solid(32, 5, (8, 8, 0)), 0.5), BLUE, 0.5)
    assert up_right[:100, 100:, 3].any()
    assert not up_right[:, :100].any()
    assert not up_right[100:].any()


NOTHING = [
    np.zeros((8, 8, 8)), np.full((9, 9, 9), np.nan), np.full((9, 9, 9), np.inf),
    np.full((70, 70, 70), 0.1), np.ones((1, 1, 1)), np.full((33, 33, 33), -2.0),
]  # fmt: skip


@pytest.mark.parametrize("volume", NOTHING)
def test_nothing_has_an_empty_mesh_and_picture(volume):
    found = isosurfaces(np.stack([volume] * 2)) + isosurfaces(volume[None], ball(8, 2)[None] - 99)
    for mesh in found:
        assert mesh.vertices.shape == mesh.faces.shape == (0, 3)
        assert simplified(mesh, 8).faces.shape == (0, 3)
        assert not render(mesh, BLUE).any()
    assert surfaces.common_reach(found) == surfaces.common_reach([]) == 1
    assert [v.mesh for stack in turnable(found, "abc", "xyz").stacks for v in stack] == [""] * 3
    assert isosurfaces(volume[None][:0]) == []


def test_a_bad_voxel_does_not_spoil_the_rest():
    volume = solid(130, 25)
    volume[3, 3, 3], volume[3, 3, 4], volume[9, 9, 9] = np.nan, -np.inf, np.inf
    (mesh,) = isosurfaces(volume[None])
    assert len(mesh.faces) > 1000
    assert np.isfinite(mesh.vertices).all()


def test_one_threshold_for_all():
    first = ball(20, 6)
    level = first.mean() + 3 * first.std()
    volumes = np.stack([first, 2 * first])
    one, other = isosurfaces(volumes)
    np.testing.assert_array_equal(one.vertices, mesh_of(first, float(level)).vertices)
    assert np.abs(other.vertices).max() > np.abs(one.vertices).max()
    np.testing.assert_array_equal(isosurfaces(volumes[1:], volumes)[0].vertices, other.vertices)


def test_the_scale_shows_the_largest():
    small, large = mesh_of(ball(32, 6)), mesh_of(ball(32, 12))
    assert surfaces.common_reach([small, large]) == pytest.approx(1.05 * 12 / 16, rel=0.02)


def test_simplified_is_smaller_and_in_place():
    mesh = mesh_of(ball(40, 14))
    less = simplified(mesh, 16)
    assert len(less.faces) < len(mesh.faces) / 4
    assert less.faces.max() < len(less.vertices)
    distance = np.linalg.norm(less.vertices, axis=1) * 20
    np.testing.assert_allclose(distance, 14, atol=0.5)


def decoded(text, steps=1024):
    """Read a mesh as the docstring of ``pages._encoded`` says, number by number."""
    numbers, shift = [0], 0
    for byte in base64.b64decode(text):
        numbers[-1] |= (byte & 127) << shift
        shift = shift + 7 if byte > 127 else 0
        if not shift:
            numbers.append(0)
    assert numbers.pop() == 0
    count, face_count = numbers[:2]
    moves = [n // 2 if n % 2 == 0 else -(n + 1) // 2 for n in numbers[2 : 2 + 3 * count]]
    vertices = np.cumsum(np.reshape(moves, (count, 3)), 0) / steps
    faces, unseen = [], 0
    for behind in numbers[2 + 3 * count :]:
        faces.append(unseen - behind)
        unseen += behind == 0
    return vertices, np.reshape(faces, (face_count, 3))


def payload(mesh):
    return turnable([mesh], ["1"], [BLUE]).stacks[0][0].mesh


def lumps(box=40):
    """Return a volume that no rotation or reflection leaves as it is."""
    places = [((0, 0, 0), 6), ((11, 2, 3), 4), ((-2, 10, -6), 5), ((1, -7, 9), 3)]
    places.append(((6, 8, 11), 3))  # between the first one and the viewer
    return np.max([solid(box, radius, place) for place, radius in places], 0)


def test_the_page_holds_the_mesh():
    mesh = mesh_of(lumps(), 0.5)
    # vertices without a face, and in any order, must not matter
    shuffle = np.random.default_rng(0).permutation(len(mesh.vertices) + 1)
    odd = Mesh(np.append(mesh.vertices, [[9, 9, 9]], 0)[shuffle], np.argsort(shuffle)[mesh.faces])
    for given in (mesh, odd):
        vertices, faces = decoded(payload(given))
        np.testing.assert_allclose(vertices[faces], mesh.vertices[mesh.faces], atol=0.5 / 1024)
        assert len(vertices) == len(mesh.vertices)


def test_a_mesh_for_the_page_is_small():
    mesh = mesh_of(ball(64, 30))
    assert len(pages._encoded(mesh)) > 100_000
    text = payload(mesh)
    assert 10_000 < len(text) <= 40_000
    distance = np.linalg.norm(decoded(text)[0], axis=1) * 32
    np.testing.assert_allclose(distance, 30, atol=0.5)


def test_volumes_stand_on_top_of_each_other():
    some = [mesh_of(ball(8, 2))] * 4
    shown = turnable(some, ["1", "1′", "2", "2′"], [BLUE] * 4, 0.5, stack=2)
    assert [[v.name for v in stack] for stack in shown.stacks] == [["1", "1′"], ["2", "2′"]]
    look = json.loads(shown.look)
    assert look["reach"] == 0.5
    np.testing.assert_allclose(look["view"], VIEW)


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
def test_the_script_draws_the_same_picture(tmp_path):
    """So it has the same camera, light and handedness as the figure."""
    mesh = mesh_of(lumps(), 0.5)
    (tmp_path / "mesh.json").write_text(
        json.dumps([VIEWER.read_text(), turnable([mesh], ["1"], [BLUE]).look, payload(mesh), BLUE])
    )
    (tmp_path / "draw.js").write_text(
        """
        globalThis.document = { querySelectorAll: () => [] };
        const [script, text, triangles, colour] = require("./mesh.json");
        const { decode, render } = new Function(script + "; return { decode, render };")();
        const look = JSON.parse(text), mesh = decode(triangles, look.steps);
        process.stdout.write(Buffer.from(render(mesh, colour, look, look.view, 400)));
        """
    )
    raw = subprocess.run(["node", tmp_path / "draw.js"], capture_output=True, check=True).stdout
    fine = np.frombuffer(raw, np.uint8).reshape(200, 2, 200, 2, 4) / 255
    fine[..., :3] *= fine[..., 3:]
    found = fine.mean((1, 3))
    found[..., :3] /= np.maximum(found[..., 3:], 1e-9)
    expected = render(mesh, BLUE, surfaces.common_reach([mesh]))
    # vertices that are rounded move an outline by a part of a pixel, here and there
    assert (np.abs(found - expected).max(-1) > 0.05).mean() < 0.01
    assert np.abs(found - expected).mean() < 0.002
