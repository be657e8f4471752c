import subprocess
import sys

BLOCKED = """
import sys

for name in ("mmseg", "mmcv", "mmengine"):
    sys.modules[name] = None
import vispeft
try:
    import vispeft.mmseg
except vispeft.VispeftError as error:
    print(error)
"""


def test_without_mmseg_the_error_says_what_to_install():
    found = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    assert 'pip install "vispeft[mmseg]"' in found.stdout
