"""Labels of PASCAL-Context for several tasks: parts of people, normals and edges, from MATLAB files and images.

The MATLAB files are those of PASCAL-Part (Chen et al., CVPR 2014) and PASCAL-Context (Mottaghi et al., CVPR 2014). What
is made of them is that of the public code (facebookresearch/astmt, ``fblib/dataloaders/pascal_context.py``). They are
read with scipy: the extra `multitask`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from vispeft.data.formats import PixelError, too_large
from vispeft.data.images import Reading, read_size
from vispeft.data.label_files import read_colours, read_shades
from vispeft.data.masks import IGNORE
from vispeft.data.thinning import thin
from vispeft.data.trees import open_regular
from vispeft.errors import ConfigError

__all__ = ["PARTS", "check_scipy", "people_in", "read_edges", "read_normals", "read_parts", "read_saliency"]

PERSON = 15
"""Category of people in PASCAL VOC."""
PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
PART_NAMES = {
    "head": ("head", "hair", "lear", "rear", "lebrow", "rebrow", "leye", "reye", "mouth", "nose"),
    "torso": ("neck", "torso"),
    "upper arm": ("luarm", "ruarm"),
    "lower arm": ("llarm", "rlarm", "lhand", "rhand"),
    "upper leg": ("luleg", "ruleg"),
    "lower leg": ("llleg", "rlleg", "lfoot", "rfoot"),
}
"""The 24 parts of a person in PASCAL-Part, by the six that are told apart."""
PART_OF = {name: PARTS.index(part) for part, names in PART_NAMES.items() for name in names}

# fmt: off
NORMAL_CONTEXTS = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56, 59,
    61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124, 135,
    141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215,
    216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272,
    273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329,
    330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405,
    407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)
# fmt: on
"""Those of the 459 classes of PASCAL-Context in which normals are kept: whose name is also one of the 894 classes of
NYUD-v2, on whose images the network that made the normals was trained, without "unknown", and tvmonitor."""

FROM_MATLAB = ("human_parts", "normals", "edge")
"""Tasks with labels in MATLAB files, which scipy reads."""


def check_scipy(owner: str, tasks: Iterable[str]) -> None:
    """Refuse tasks that need scipy where it is not installed.

    Args:
        owner: The data module, for messages.
        tasks: The tasks.

    Raises:
        ConfigError: If it is missing.
    """
    needing = [task for task in tasks if task in FROM_MATLAB]
    if needing and importlib.util.find_spec("scipy") is None:
        raise ConfigError(
            f"{owner} was asked for the task {needing[0]!r}, whose labels are MATLAB files, and scipy, which reads "
            f'them, is not installed. Install the extra: pip install "vispeft[multitask]", or leave '
            f"{', '.join(needing)} out of tasks."
        )


def read_saliency(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read a saliency map (1, H, W): 1 above half of white.

    Args:
        paths: The grey image.
        reading: The limit on pixels.
    """
    return torch.from_numpy((read_shades(paths[0], reading) > 0.5).astype(np.float32))[None]


def read_normals(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read normals (3, H, W), n = 2 v / 255 - 1, zero outside of the classes of `NORMAL_CONTEXTS`.

    Args:
        paths: The RGB image, and the MATLAB file of PASCAL-Context.
        reading: The limit on pixels.

    Raises:
        PixelError: If their sizes differ.
    """
    colours, contexts = read_colours(paths[0], reading), _contexts(paths[1], reading)
    if colours.shape[:2] != contexts.shape:
        raise PixelError("unsupported", f"it is {colours.shape[:2]} pixels and the context map {contexts.shape}")
    normals = (2 * colours.astype(np.float32) / 255 - 1) * np.isin(contexts, NORMAL_CONTEXTS)[..., None]
    return torch.from_numpy(normals.astype(np.float32)).permute(2, 0, 1).contiguous()


def read_edges(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read the edges (1, H, W) between the classes of a context map: where its Laplacian is not 0, thinned.

    Args:
        paths: The MATLAB file of PASCAL-Context.
        reading: The limit on pixels.
    """
    from scipy.ndimage import laplace

    # Pixels beyond the border are mirrored, as by OpenCV's Laplacian.
    edges = laplace(_contexts(paths[0], reading).astype(np.float64), mode="mirror") != 0
    return thin(torch.from_numpy(edges)[None]).float()


def read_parts(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read the parts of people, uint8 (1, H, W); all of `IGNORE` where nobody is shown, or nobody has parts.

    Where parts overlap, the later one is taken.

    Args:
        paths: The MATLAB file of PASCAL-Part, and the image, for its size where no object is annotated.
        reading: The limit on pixels.

    Raises:
        PixelError: If a person has a part of another name, or masks differ in their size.
    """
    objects = _objects(paths[0])
    height, width = objects[0][2].shape if len(objects) else read_size(paths[1], reading)
    if height * width > reading.max_pixels:
        raise too_large((width, height), reading.max_pixels)
    label, seen = np.zeros((height, width), np.uint8), False
    for thing in objects:
        if int(thing[1].item()) != PERSON:
            continue
        for part in thing[3].ravel():
            name, inside = str(part[0].item()), part[1].astype(bool)
            if name not in PART_OF:
                raise PixelError("unsupported", f'a person has a part "{name}"; known are {", ".join(sorted(PART_OF))}')
            if inside.shape != label.shape:
                raise PixelError("unsupported", f"the mask of a part is {inside.shape} and the image {label.shape}")
            label[inside], seen = PART_OF[name], True
    return torch.from_numpy(label if seen else np.full_like(label, IGNORE))[None]


def people_in(path: str) -> bool:
    """Whether a MATLAB file of PASCAL-Part has a person.

    Args:
        path: The file.
    """
    return any(int(thing[1].item()) == PERSON for thing in _objects(path))


def _objects(path: str) -> np.ndarray:
    """Read the objects of a file of PASCAL-Part: name, category, mask (H, W), and parts of a name and a mask each."""
    found = _matlab(path, "anno")
    # By position, as the public code does: the record of an image is its name and its objects.
    return np.asarray(found.ravel()[0][1]).ravel()


def _contexts(path: str, reading: Reading) -> np.ndarray:
    """Read the classes of a file of PASCAL-Context (H, W), from 1 to 459; 0 for none."""
    found = _matlab(path, "LabelMap")
    if found.ndim != 2 or found.dtype.kind not in "iuf":
        raise PixelError(
            "unsupported", f"LabelMap is {found.dtype} {found.shape}, and classes (height, width) are needed"
        )
    if found.size > reading.max_pixels:
        raise too_large((found.shape[1], found.shape[0]), reading.max_pixels)
    return found


def _matlab(path: str, name: str) -> np.ndarray:
    """Read a variable of a MATLAB file.

    Raises:
        PixelError: If the file has no such variable.
    """
    from scipy.io import loadmat

    with open_regular(path) as file:
        content = loadmat(file)
    if name not in content:
        there = ", ".join(key for key in content if not key.startswith("__"))
        raise PixelError("unsupported", f"it has no variable {name}; found {there or 'none'}")
    return content[name]
