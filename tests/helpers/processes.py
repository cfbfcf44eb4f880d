"""Programs of `tests/programs` in two processes that talk to each other."""

import os
import subprocess
import sys

from tests.helpers import ROOT


def run_in_two(program, *arguments, timeout=250, **variables):
    """What the program writes; both processes have to end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests/programs" / program), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *sys.path])  # packages may lie where only this process looks
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
