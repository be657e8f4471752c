"""Keep the features of a VQT adapter that matter.

python tools/select_features.py runs/digits_vqt/1 runs/digits_vqt/2 --keep 0.7 --out selected
"""

import os
import sys

# The script's own folder comes off the path: it holds an inspect.py, which is also the name of a standard module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from vispeft.cli.common import run_tool  # noqa: E402
from vispeft.cli.select_features import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
