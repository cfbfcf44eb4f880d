"""Train a segmenter. Configurations, options and logs are those of mmseg's own tools/train.py.

python tools/mmseg_train.py configs/ade20k_qsd.py --pretrained CHECKPOINT --amp
"""

import sys

from qsd import QsdError

try:
    from qsd.mm import command
except QsdError as error:
    print(f"mmseg_train: error: {error}", file=sys.stderr)
    sys.exit(2)


def main(args: list[str] | None = None) -> int:
    return command.train("mmseg_train", "mmseg", args)


if __name__ == "__main__":
    sys.exit(main())
