"""Test a detector by mmdet's own metrics.

python tools/mmdet_test.py configs/coco_qsd.py runs/coco_qsd/CHECKPOINT.pth
"""

import sys

from qsd import QsdError

try:
    from qsd.mm import command
except QsdError as error:
    print(f"mmdet_test: error: {error}", file=sys.stderr)
    sys.exit(2)


def main(args: list[str] | None = None) -> int:
    return command.test("mmdet_test", "mmdet", args)


if __name__ == "__main__":
    sys.exit(main())
