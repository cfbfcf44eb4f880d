"""Check that every package of OpenMMLab is installed exactly once."""

from importlib.metadata import PackageNotFoundError, distribution, distributions
from importlib.util import find_spec

from qsd.errors import QsdError

# Import name, the maintained distribution, and the original ones, which install into the same folder.
_PACKAGES = {
    "mmengine": ("onedl-mmengine", ("mmengine", "mmengine-lite")),
    "mmcv": ("onedl-mmcv", ("mmcv", "mmcv-full", "mmcv-lite")),
    "mmdet": ("onedl-mmdetection", ("mmdet",)),
    "mmseg": ("onedl-mmsegmentation", ("mmsegmentation",)),
}


def check_installation() -> None:
    """Refuse an environment in which OpenMMLab's packages are missing or installed twice.

    Raises:
        QsdError: With the command that corrects it.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise QsdError(f"qsd.mm needs OpenMMLab ({', '.join(missing)} not installed): pip install 'qsd[mm]'")
    installed = {(found.metadata["Name"] or "").lower() for found in distributions()}
    for maintained, originals in _PACKAGES.values():
        both = [name for name in originals if {name, maintained} <= installed]
        if both:
            raise QsdError(
                f"{both[0]} and {maintained} are both installed, into the same folder, and overwrite each other: "
                f"pip uninstall -y {both[0]} {maintained}, then pip install {maintained}"
            )


def name_configurations() -> None:
    """Let ``_base_ = ['mmseg::...']`` find the configurations of the maintained distribution.

    mmengine looks for them under the name of the original one.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    for name, original in list(MODULE2PACKAGE.items()):
        if name in _PACKAGES and find_spec(name) is not None and not _is_distribution(original):
            MODULE2PACKAGE[name] = name


def _is_distribution(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
