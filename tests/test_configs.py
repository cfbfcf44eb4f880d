"""Every file in ``configs/`` is parsed and instantiated, so that none can rot."""

import pytest
import timm
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from qsd.cli import QsdCLI
from qsd.neurons import LsqNeuron, SpikeNeuron
from qsd.quantizers import StepSizeQuantizer
from tests.helpers import CONFIGS

BASES = ("imagenet", "cifar10", "cifar100", "digits", "digit_crops")
CSDFORMER = sorted(CONFIGS.glob("csdformer_*.yaml"))


def base_of(path):
    if path.stem in BASES or path in CSDFORMER:
        return None
    if path.stem.endswith(("_teacher", "_distill")):
        return CONFIGS / f"{path.stem.rpartition('_')[0]}.yaml"
    return CONFIGS / ("cifar100.yaml" if path.stem == "cifar_finetune" else "imagenet.yaml")


class InstantiateOnly(QsdCLI):
    """Everything up to running the subcommand."""

    def _run_subcommand(self, subcommand):
        pass


def instantiate(layers):
    return InstantiateOnly(
        LightningModule,
        LightningDataModule,
        args=["fit", *[a for path in layers for a in ("--config", str(path))], "--trainer.accelerator=cpu"],
        save_config_callback=None,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_config_is_parsed_and_instantiated(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = [p for p in (base_of(path), path) if p is not None]
    cli = instantiate(layers)
    hparams = cli.model.hparams
    with torch.device("meta"):
        model = timm.create_model(hparams["model"], num_classes=10, **hparams["model_args"])
    bits = {m.bits for m in model.modules() if isinstance(m, StepSizeQuantizer)}
    if path in CSDFORMER:
        assert bits == set(), "the paper's weights are floats"
        assert {type(m) for m in model.modules() if isinstance(m, SpikeNeuron)} == {LsqNeuron}
    elif path.stem.endswith("_teacher"):
        assert bits == set()
        assert hparams["model"].endswith("_ann")
    else:
        assert bits == {3 if path.stem == "imagenet_w3" else 2 if path.stem == "imagenet_w2" else 4}
    assert [c.filename for c in cli.trainer.checkpoint_callbacks] == ["best", "last"]
    assert len(cli.trainer.loggers) == 2
    if path.stem.endswith("_distill"):
        # the last one, where the command line reaches its teacher
        assert cli.config.fit.trainer.callbacks[-1].class_path.endswith("callbacks.Distillation")


def test_the_published_imagenet_recipe():
    # Published train.sh and its parser's defaults: blr 6e-4, 196 images per process, LAMB, 300 epochs, 15 warm-up, ...
    config = yaml.safe_load((CONFIGS / "imagenet.yaml").read_text())
    model, data, trainer = (config[k] for k in ("model", "data", "trainer"))
    recipe = {"optimizer": "lamb", "base_lr": 6e-4, "warmup_epochs": 15, "weight_decay": 0.05, "label_smoothing": 0.1}
    assert {key: model["init_args"][key] for key in recipe} == recipe
    assert data["init_args"]["batch_size"] == 196
    assert data["init_args"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert data["init_args"]["random_erasing"] == 0.25
    assert trainer["max_epochs"] == 300


def test_csdformer_s_recipes_are_the_paper_s():
    # AdamW, 5e-4 at a total batch of 288 for 310 epochs; CIFAR at 64 for 300 (10) and 400 (100)
    for name, batch, epochs in (("imagenet", 288, 310), ("cifar10", 64, 300), ("cifar100", 64, 400)):
        config = yaml.safe_load((CONFIGS / f"csdformer_{name}.yaml").read_text())
        model = config["model"]["init_args"]
        assert model["optimizer"] == "adamw"
        assert model["base_lr"] * batch / 256 == pytest.approx(5e-4, rel=1e-3)
        assert batch % config["data"]["init_args"]["batch_size"] == 0
        assert config["trainer"]["max_epochs"] == epochs


def test_every_csdformer_recipe_takes_the_float_network_as_its_first_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in CSDFORMER:
        config = yaml.safe_load(path.read_text())["model"]["init_args"]
        with torch.device("meta"):
            stages = [timm.create_model(config["model"] + twin, **config["model_args"]) for twin in ("_ann", "")]
        names = [set(stage.state_dict()) for stage in stages]
        assert {name for name in names[1] - names[0] if not name.endswith(".step")} == set()
        assert names[0] <= names[1]


def test_fine_tuning_drops_the_small_images_strides():
    cli = instantiate([CONFIGS / "cifar100.yaml", CONFIGS / "cifar_finetune.yaml"])
    assert "strides" not in cli.model.hparams["model_args"]
    assert cli.datamodule.img_size == (224, 224)
