import numpy as np
import torch
from scipy.ndimage import gaussian_filter, label

from vispeft.data.thinning import thin

THINNED = """
............+++++++.+++++++......#+++++++++++++.
......#.....+++#####+###+++.......#+++#######++.
#.....#+...++##++..+#+++##++......+###.#+...+#+.
#+...+#+..++#+++...+#+..++#++...++#++.#++...+#++
+#++++#+++++#+++...+#+..++#+++++++#++.+#+...+#++
+#++++######++++...+#+..+++#####++#####+.....+++
++####++++++#+++...#+...++#+++++##+++...........
..++#+++..++#+++.......++#++...++#+++...........
..++#+++...+#++....++..++#++....+#++............
..+++###+..++#+....+#+.+#++....+#++..........+..
....+#++#+...#+....+#+.+#++..++#++..........###.
....+#+.+.....##....#+.###+++++#++........##+...
....#+...............##.++#####+##+........+#...
..##+................#+...++++++++##.........###
"""
"""Shapes (+ and #) and what `skimage.morphology.thin` of scikit-image 0.26.0 leaves of them (#)."""


def shapes(count=8, seed=0):
    """Blobs of different widths, with holes."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        field = gaussian_filter(rng.random((40 + index, 37)), rng.uniform(0.3, 4))
        yield field > np.quantile(field, rng.uniform(0.1, 0.9))


def parts(shape):
    return label(shape, structure=np.ones((3, 3)))[1]


def test_lines_keep_the_parts_and_holes_of_their_shapes_and_do_not_shrink_further():
    for shape in shapes():
        line = thin(torch.from_numpy(shape)[None])[0].numpy()
        assert not (line & ~shape).any()
        assert parts(line) == parts(shape)
        padded, thinned = (np.pad(~values, 1, constant_values=True) for values in (shape, line))
        assert label(padded)[1] == label(thinned)[1]
        assert np.array_equal(thin(torch.from_numpy(line)[None])[0].numpy(), line)


def test_bars_become_their_middle_and_images_of_a_batch_do_not_meet():
    maps = torch.zeros(3, 9, 20, dtype=torch.bool)
    maps[0, 3:6, 2:18] = True
    maps[1] = True
    found = thin(maps)
    assert found[0].nonzero()[:, 0].unique().tolist() == [4]
    assert found[0].sum() >= 12
    assert found[1].any(), "a full image keeps a line"
    assert not found[2].any()
    assert torch.equal(found[1], thin(maps[1:2])[0])
    assert maps[1].all(), "the given maps stay as they are"


def test_equals_scikit_image():
    found = torch.tensor([[pixel != "." for pixel in row] for row in THINNED.split()])
    wanted = torch.tensor([[pixel == "#" for pixel in row] for row in THINNED.split()])
    assert torch.equal(thin(found[None])[0], wanted)


def test_more_shapes_than_bits_are_thinned_each_by_itself():
    many = torch.stack([torch.from_numpy(shape[:40]) for shape in shapes(9)] * 8)
    assert torch.equal(thin(many[:70])[62:], thin(many[62:70]))
    assert thin(many[:0]).shape == (0, 40, 37)
