"""Test a segmenter by mmseg's own metrics.

python tools/mmseg_test.py configs/ade20k_qsd.py runs/ade20k_qsd/CHECKPOINT.pth
"""

import sys

from qsd.commands.openmmlab import test_segmenter as main

if __name__ == "__main__":
    sys.exit(main())
