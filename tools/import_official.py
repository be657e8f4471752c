"""Turn an authors' published checkpoint into an adapter directory.

python tools/import_official.py ssf model_best.pth.tar --model vit_base_patch16_224.augreg_in21k --out adapters/ssf
"""

import os
import sys

# The script's own folder comes off the path: it holds an inspect.py, which is also the name of a standard module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from vispeft.cli.common import run_tool  # noqa: E402
from vispeft.cli.import_official import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
