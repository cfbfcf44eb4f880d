"""Every file in ``configs/`` is parsed and instantiated, so that none can rot."""

import pytest
import timm
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from qsd.cli import QsdCLI
from qsd.neurons import LsqNeuron, SpikeNeuron
from qsd.quantizers import StepSizeQuantizer
from qsd.tasks.inputs import sizes_from_data
from tests.helpers import CONFIGS

BASES = (
    "imagenet", "cifar10", "cifar100", "digits", "digit_crops", "imagenet_e_spikeformer", "digits_e_spikeformer",
    "digit_events", "n_mnist", "cifar10_dvs", "dvs128_gesture",
    "fashion_mnist",
)  # fmt: skip
CSDFORMER = sorted(CONFIGS.glob("csdformer_*.yaml"))


# What the overlays of E-SpikeFormer are laid over, as their first lines say.
LARGE = ["imagenet_e_spikeformer", "imagenet_e_spikeformer_83m"]
OVERLAYS = {
    "cifar_e_spikeformer": ["cifar100", "cifar_finetune"],
    "cifar10_dvs_transfer": ["cifar10_dvs"],
    "fashion_mnist_short": ["fashion_mnist"],
    "imagenet_e_spikeformer_5m": LARGE[:1],
    "imagenet_e_spikeformer_10m": LARGE[:1],
    "imagenet_e_spikeformer_83m": LARGE[:1],
    "imagenet_e_spikeformer_171m": LARGE,
    "imagenet_e_spikeformer_83m_distill": LARGE,
}


def layers_of(path):
    """The configuration, and those that it is laid over."""
    if path.stem in BASES or path in CSDFORMER:
        below = []
    elif path.stem in OVERLAYS:
        below = OVERLAYS[path.stem]
    elif path.stem.endswith(("_teacher", "_distill")):
        below = [path.stem.rpartition("_")[0]]
    else:
        below = ["cifar100" if path.stem == "cifar_finetune" else "imagenet"]
    return [*(CONFIGS / f"{name}.yaml" for name in below), path]


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
    cli = instantiate(layers_of(path))
    hparams = cli.model.hparams
    with torch.device("meta"):
        arguments = sizes_from_data(hparams["model_args"], cli.datamodule)
        model = timm.create_model(hparams["model"], num_classes=10, **arguments)
    bits = {m.bits for m in model.modules() if isinstance(m, StepSizeQuantizer)}
    if path in CSDFORMER:
        assert bits == ({4} if "fashion_mnist" in path.stem else set()), "the paper's weights are floats"
        assert {type(m) for m in model.modules() if isinstance(m, SpikeNeuron)} == {LsqNeuron}
    elif "e_spikeformer" in path.stem:
        assert bits == ({4} if path.stem.startswith("digits") else set()), "the published weights are floats"
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


def test_the_published_recipes_of_e_spikeformer():
    # Published commands: 8 processes; 256, 128 and 196 images; LAMB; 200, 150 and 100 epochs; 5, 10 and 5 of warm-up.
    def read(name):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        return config["model"]["init_args"], config["data"]["init_args"], config["trainer"]

    model, data, trainer = read("imagenet_e_spikeformer")
    assert (model["optimizer"], model["base_lr"], model["warmup_epochs"], model["mixup"]) == ("lamb", 6e-4, 5, 0)
    assert (data["batch_size"], trainer["max_epochs"]) == (256, 200)
    assert round(data["img_size"] / data["crop_pct"]) == 232
    model, data, trainer = read("imagenet_e_spikeformer_83m")
    assert (model["warmup_epochs"], model["layer_decay"], model["mixup"], model["cutmix"]) == (10, 0.75, 0.8, 1)
    assert (data["batch_size"], trainer["max_epochs"], model["model_args"]["drop_path_rate"]) == (128, 150, 0.1)
    model, data, trainer = read("imagenet_e_spikeformer_83m_distill")
    assert (model["base_lr"], model["warmup_epochs"], model["mixup"], data["batch_size"]) == (1e-3, 5, 0.5, 196)
    options = trainer["callbacks+"][-1]["init_args"]
    assert (options["logits_kind"], trainer["max_epochs"]) == ("hard", 100)
    assert timm.is_model(options["teacher"].partition(".")[0])


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
