"""Train SSF on real images, merge and reload it, and measure it beside a linear probe.

python tools/quickstart.py
"""

import os
import sys

# The script's own folder comes off the path: it holds an inspect.py, which is also the name of a standard module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from vispeft.cli.common import run_tool  # noqa: E402
from vispeft.cli.quickstart import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
