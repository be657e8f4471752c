"""Write class embeddings by the text tower of a CLIP. The same as `vispeft encode-classes`."""

import os
import sys

# The script's own folder comes off the path: it holds an inspect.py, which is also the name of a standard module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from vispeft.cli.main import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command("encode-classes"))
