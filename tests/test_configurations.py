"""Configurations are found as ``configs/NAME`` from any folder, in a clone and in a wheel."""

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

from qsd import QsdError
from qsd.configurations import find_configuration, with_found_configurations
from tests.helpers import CONFIGS, ROOT


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_configuration_of_the_package_is_found_and_a_file_of_the_user_comes_first():
    assert find_configuration("configs/digits.yaml").read_text() == (CONFIGS / "digits.yaml").read_text()
    assert find_configuration("configs/_base_/coco.py").is_file()
    Path("configs").mkdir()
    Path("configs/digits.yaml").write_text("mine")
    assert find_configuration("configs/digits.yaml").read_text() == "mine"
    assert find_configuration("configs/imagenet.yaml").is_file()


@pytest.mark.parametrize(
    "path", ["digits.yaml", "other/digits.yaml", "/configs/digits.yaml", "configs/../pyproject.toml"]
)
def test_other_paths_are_the_user_s(path):
    with pytest.raises(QsdError, match="does not exist"):
        find_configuration(path)


def test_the_nearest_name_is_told():
    with pytest.raises(QsdError, match=r"did you mean configs/coco_qsd\.py"):
        find_configuration("configs/coco_qds.py")


def test_values_of_config_are_found_among_arguments():
    shipped = str(find_configuration("configs/digits.yaml"))
    words = ["fit", "--config", "configs/digits.yaml", "--config=configs/digits.yaml", "--data.root", "configs"]
    assert with_found_configurations(words) == ["fit", "--config", shipped, f"--config={shipped}", *words[4:]]
    assert with_found_configurations(["--config", "{a: 1}"]) == ["--config", "{a: 1}"]


# -- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this repository, built without network."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("pip or setuptools is not installed, and without network there is no isolated build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("qsd", "configs"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "qsd_launcher.py"):
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_modules_configurations_templates_and_commands(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "qsd").rglob("*.*") if "__pycache__" not in path.parts}
    configurations = {
        f"qsd/{path.relative_to(ROOT)}" for path in CONFIGS.rglob("*.*") if "__pycache__" not in path.parts
    }
    assert len(configurations) > 30
    assert names >= package | configurations | {"qsd_launcher.py"}
    assert not {name for name in names if name.startswith(("tests", "tools", "configs", "setup"))}
    assert "qsd = qsd_launcher:run" in entry_points
    assert "lightning = qsd_launcher:run_lightning" in entry_points


def test_an_installed_package_finds_its_configurations_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import qsd_launcher, sys, qsd.configurations as c; print(c.configuration_folder());"
        "sys.exit(qsd_launcher.main(['fit', '--config', 'configs/digits.yaml', '--print_config']))"
    )
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=empty, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site / "qsd" / "configs"))
    assert "qsd.data.DigitsData" in done.stdout
