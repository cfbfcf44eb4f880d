"""Train a segmenter. Configurations, options and logs are those of mmseg's own tools/train.py.

python tools/mmseg_train.py configs/ade20k_qsd.py --pretrained CHECKPOINT --amp
"""

import sys

from qsd.commands.openmmlab import train_segmenter as main

if __name__ == "__main__":
    sys.exit(main())
