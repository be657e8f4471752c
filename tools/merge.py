"""Write a finished run as a plain timm model.

python tools/merge.py runs/digits_ssf/1 --out digits.safetensors
"""

import os
import sys

# The script's own folder comes off the path: it holds an inspect.py, which is also the name of a standard module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from vispeft.cli.common import run_tool  # noqa: E402
from vispeft.cli.merge import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
