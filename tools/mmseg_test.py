"""Test a segmenter by mmseg's own metrics.

python tools/mmseg_test.py configs/ade20k_qsd.py runs/ade20k_qsd/CHECKPOINT.pth
"""

import sys

from qsd import QsdError

try:
    from qsd.mm import command
except QsdError as error:
    print(f"mmseg_test: error: {error}", file=sys.stderr)
    sys.exit(2)


def main(args: list[str] | None = None) -> int:
    return command.test("mmseg_test", "mmseg", args)


if __name__ == "__main__":
    sys.exit(main())
