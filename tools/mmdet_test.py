"""Test a detector by mmdet's own metrics.

python tools/mmdet_test.py configs/coco_qsd.py runs/coco_qsd/CHECKPOINT.pth
"""

import sys

from qsd.commands.openmmlab import test_detector as main

if __name__ == "__main__":
    sys.exit(main())
