"""Write a finished run for deployment, as ONNX or as a torch.export program.

python tools/export.py runs/digits_ssf/1 --out digits.onnx
"""

import os
import sys

# The script's own folder comes off the path: it holds an inspect.py, which is also the name of a standard module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from vispeft.cli.common import run_tool  # noqa: E402
from vispeft.cli.export import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
