"""The tests. vispeft comes first: it makes torchvision importable, which timm needs, beside a CPU build of torch."""

import vispeft  # noqa: F401
