"""Train a detector. Configurations, options and logs are those of mmdet's own tools/train.py.

python tools/mmdet_train.py configs/coco_qsd.py --pretrained CHECKPOINT --amp
"""

import sys

from qsd import QsdError

try:
    from qsd.mm import command
except QsdError as error:
    print(f"mmdet_train: error: {error}", file=sys.stderr)
    sys.exit(2)


def main(args: list[str] | None = None) -> int:
    return command.train("mmdet_train", "mmdet", args)


if __name__ == "__main__":
    sys.exit(main())
