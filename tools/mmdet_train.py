"""Train a detector. Configurations, options and logs are those of mmdet's own tools/train.py.

python tools/mmdet_train.py configs/coco_qsd.py --pretrained CHECKPOINT --amp
"""

import sys

from qsd.commands.openmmlab import train_detector as main

if __name__ == "__main__":
    sys.exit(main())
