"""Weights that lie in the package, and folders of weights with a model card."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import qsd
from qsd.data import DigitsData, TorchvisionData
from qsd.errors import QsdError
from qsd.models import shipped
from qsd.models.shipped import shipped_weights
from qsd.packing import image_notes
from qsd.tasks import ClassificationTask, load_task
from tests.helpers import long
from tests.helpers.networks import SMALL
from tests.helpers.training import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

# The second folder is that of Debian's package dataset-fashion-mnist.
_FOLDERS = (os.environ.get("QSD_FASHION_MNIST", "data/fashion_mnist"), "/usr/share/datasets/fashion-mnist")
FASHION = next((folder for folder in _FOLDERS if Path(folder).is_dir()), None)


@pytest.mark.parametrize("name", [name for name in shipped_weights() if name.endswith(".digits")])
def test_weights_of_digits_have_the_stated_accuracy_on_the_stated_images(name):
    weights = shipped_weights()[name]
    model = timm.create_model(name, pretrained=True).eval()
    assert (model.time_steps, model.weight_bits, model.num_classes) == (4, 4, 10)
    assert weights.file.stat().st_size <= 2_500_000
    cfg = model.pretrained_cfg
    height, width = cfg["input_size"][1:]
    data = DigitsData((height, width), batch_size=400)
    images, labels = next(iter(data.whole_part("test")))
    assert isinstance(labels, Tensor)
    assert cfg["mean"] == pytest.approx(data.mean)
    assert cfg["std"] == pytest.approx(data.std)
    assert (cfg["label_names"], cfg["num_classes"]) == (tuple(data.class_names), 10)
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    assert weights.notes["test_images"] == len(labels) == 400
    assert right == round(weights.notes["accuracy"] * 400)
    assert f"accuracy {right / 400:.4f} on 400 test images" in cfg["notes"][0]


@long
@pytest.mark.skipif(FASHION is None, reason="the files of Fashion-MNIST are not in the folder QSD_FASHION_MNIST")
@pytest.mark.parametrize("name", [name for name in shipped_weights() if ".fashion_mnist" in name])
def test_weights_of_fashion_mnist_have_the_stated_accuracy_on_the_test_images(name):
    weights = shipped_weights()[name]
    model = timm.create_model(name, pretrained=True).eval()
    data = TorchvisionData(str(FASHION), "fashion_mnist", batch_size=500, num_workers=0)
    assert (model.time_steps, model.weight_bits, model.pretrained_cfg["mean"]) == (4, 4, pytest.approx(data.mean))
    right = 0
    with torch.no_grad():
        for images, labels in data.whole_part("test"):
            right += int((model(images).argmax(1) == labels).sum())
    assert weights.notes["test_images"] == 10_000
    # Another processor adds in another order, which can move the few images whose two best classes are nearly even.
    assert right == pytest.approx(weights.notes["accuracy"] * 10_000, abs=5)


def test_all_weights_are_small_and_known_to_timm():
    weights = shipped_weights()
    assert {"qsd_tiny.digits", "csdformer_2_384.digits"} <= weights.keys()
    assert sum(entry.file.stat().st_size for entry in weights.values()) <= 6_000_000
    assert set(weights) <= set(timm.list_pretrained())
    assert timm.create_model("qsd_tiny").num_classes == 1000  # the name alone is as before
    with pytest.raises(QsdError, match=r"weights have the names .*qsd_tiny.digits"):
        timm.create_model("qsd_tiny", pretrained=True)


def test_a_tag_has_the_defaults_of_its_training_and_may_be_changed():
    model = timm.create_model("qsd_tiny.digits", pretrained=True)
    fresh = timm.create_model("qsd_tiny.digits")
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    assert model.in_chans == 1
    other = timm.create_model("qsd_tiny.digits", pretrained=True, num_classes=3, in_chans=3, time_steps=2)
    assert (other.head.weight.shape[0], other.in_chans, other.time_steps) == (3, 3, 2)
    deep = [name for name in model.state_dict() if not name.startswith(("head", "stem"))]
    assert all(torch.equal(model.state_dict()[name], other.state_dict()[name]) for name in deep)


def test_a_new_file_is_all_that_a_new_tag_needs(tmp_path, monkeypatch):
    notes = {"mean": [0.5], "std": [0.2], "img_size": [16, 16], "data": "x", "accuracy": 0.5, "test_images": 2}
    model = timm.create_model("qsd_tiny", **{**SMALL, "num_classes": 4, "in_chans": 1})
    qsd.save_packed(model, tmp_path / "qsd_tiny.x.safetensors", notes)
    (tmp_path / "qsd_tiny.damaged.safetensors").write_bytes(b"12345")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    found = shipped.shipped_weights.__wrapped__()
    assert list(found) == ["qsd_tiny.x"]
    cfg = found["qsd_tiny.x"].cfg()
    assert (cfg["input_size"], cfg["num_classes"], cfg["mean"]) == ((1, 16, 16), 4, (0.5,))
    assert found["qsd_tiny.x"].arguments["embed_dims"] == list(SMALL["embed_dims"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of weights, and the network that they come from."""
    data = DigitsData(16, batch_size=4)
    data.setup("fit")
    model = timm.create_model("qsd_tiny", **{**SMALL, "num_classes": 10, "in_chans": 1}).eval()
    path = tmp_path_factory.mktemp("folder") / "mine"
    qsd.save_pretrained(model, path, image_notes(data), {"test accuracy": 0.25}, "digits")
    return path, model


def test_a_folder_of_weights_is_read_by_timm(folder):
    path, model = folder
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert (loaded.pretrained_cfg["input_size"], len(loaded.pretrained_cfg["mean"])) == ((1, 16, 16), 1)
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: timm\n")
    for fact in ("25.00 %", "4-bit weights, T = 4", "qsd.to_spike_driven(model)", "local-dir:", "trained on | digits"):
        assert fact in card
    assert "url" not in json.loads((path / "config.json").read_text())["pretrained_cfg"]


def test_what_timm_pushes_is_read_again(folder, tmp_path):
    from timm.models import save_for_hf

    path, model = folder
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    save_for_hf(loaded, str(tmp_path), model_args=loaded.registered["arguments"], safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(again(images), model(images))


class ThreeChannels(DigitsData):
    """Sixteen digits in five classes and three channels."""

    def __init__(self):
        super().__init__(img_size=16, batch_size=8, in_chans=3)

    @property
    def class_names(self):
        return list("abcde")

    def load_part(self, part):
        source = super().load_part(part)
        return type(source)(source._images[:16], source.labels[:16] % 5, source._names[:16])


def test_a_folder_is_fine_tuned_on_other_classes_and_channels(folder, tmp_path):
    options = {"optimizer": "adamw", "base_lr": 0.01, "warmup_epochs": 0}
    task = ClassificationTask(f"local-dir:{folder[0]}", {"pretrained": True}, **options)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, ThreeChannels())
    assert (task.model.num_classes, task.model.in_chans) == (5, 3)
    assert trainer.global_step == 2
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    again = load_task(tmp_path / "tuned.ckpt").model  # the checkpoint names the network, not the folder
    assert torch.equal(again.state_dict()["head.weight"], task.model.state_dict()["head.weight"])
