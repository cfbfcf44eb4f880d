"""Puts the configurations, which lie beside the package in a clone, into the wheel as ``qsd/configs``.

Everything else is declared in pyproject.toml. An editable installation reads the folder of the clone itself.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    """Copies the folder ``configs`` beside the modules."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "qsd", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("configs", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithConfigurations})
