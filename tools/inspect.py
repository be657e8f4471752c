"""Show what a method would put where.

python tools/inspect.py vit_base_patch16_224 ssf
"""

import os
import sys

# The script's own folder comes off the path: it holds an inspect.py, which is also the name of a standard module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from vispeft.cli.common import run_tool  # noqa: E402
from vispeft.cli.inspect import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
