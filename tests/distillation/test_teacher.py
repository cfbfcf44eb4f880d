"""Teachers: whose attention can be seen, how they see the student's images, and those that must be refused."""

import copy

import pytest
import timm
import torch
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from torch import nn

from qsd import QsdError
from qsd.distillation import AttentionRecorder, Teacher, attention_layers, build_teacher
from qsd.tasks import ClassificationTask

SMALL = {"embed_dims": (8, 8, 16, 8), "num_heads": 2, "depth": 4, "strides": (1, 2, 2, 2, 1), "layer_scale": 0.5}
TWIN = {**SMALL, "in_chans": 1, "num_classes": 10}


def trained(model):
    """As after a training: norms that are no identities."""
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "norm.bias", "norm1.bias")):
            tensor.normal_(0, 0.3)
        elif name.endswith(("running_var", "norm.weight", "norm1.weight")):
            tensor.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def twin():
    return trained(timm.create_model("qsd_tiny_ann", **TWIN))


def saved_training(path, network, name="qsd_tiny_ann", **sizes):
    task = ClassificationTask(name, model_args={k: v for k, v in sizes.items() if k != "num_classes"})
    checkpoint = {
        "state_dict": {f"model.{k}": v for k, v in network.state_dict().items()},
        "hyper_parameters": {**task.hparams, "num_classes": sizes["num_classes"]},
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(checkpoint, path)
    return str(path)


# -- seeing attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qsd_tiny", "qsd_tiny_ann"])
def test_recorded_maps_are_what_the_attention_multiplies(name):
    model = timm.create_model(name, **TWIN).eval()
    layer = model.stages[2].blocks[0].attn
    seen = {}
    for key in "qkv":
        getattr(layer, f"{key}_neuron").register_forward_hook(lambda m, i, o, key=key: seen.update({key: o}))
    recorder = AttentionRecorder(model)
    recorder.start()
    model(torch.randn(2, 1, 32, 32))
    maps = recorder.take()
    assert list(recorder.layers) == [*(f"stages.2.blocks.{i}.attn" for i in range(3)), "stages.3.blocks.0.attn"]
    assert len(maps) == 4
    assert maps[0].query.shape == (2, 2, 8, 4, 4)  # head-major channels
    assert torch.equal(maps[0].key.flatten(1, 2), seen["k"])
    assert torch.equal(maps[0].value[:, 1], seen["v"][:, 8:])
    if name == "qsd_tiny":
        assert torch.equal(maps[0].query, maps[0].query.round())


def test_a_recorder_keeps_nothing_and_records_only_when_started():
    model = timm.create_model("qsd_tiny", **TWIN)
    recorder = AttentionRecorder(model)
    recorder.start()
    model(torch.randn(2, 1, 16, 16))
    assert len(recorder.take()) == 4
    model(torch.randn(2, 1, 16, 16))
    assert recorder._maps == {}
    with pytest.raises(QsdError, match=r"attention layer stages\.2\.blocks\.0\.attn\.query did not run"):
        recorder.take()
    hooks = [m._forward_hooks for m in model.modules()]
    assert sum(map(len, hooks)) == 12
    copied = copy.deepcopy(model)  # as weight averaging does: the copy's hooks must not drag a recorder along
    assert (
        next(iter(copied.stages[2].blocks[0].attn.q_neuron._forward_hooks.values()))
        in hooks[list(model.modules()).index(model.stages[2].blocks[0].attn.q_neuron)].values()
    )
    recorder.remove()
    assert sum(map(len, hooks)) == 0


def vit(**arguments):
    return timm.create_model("test_vit", num_classes=10, **arguments).eval()


def test_a_vision_transformer_s_products_are_recorded_without_its_class_token():
    model = vit(img_size=32)
    teacher = Teacher(model, "test_vit")
    images = torch.randn(2, 3, 32, 32)
    logits, maps = teacher(images)
    torch.testing.assert_close(logits, model(images))
    assert len(maps) == len(model.blocks)
    tokens = model.blocks[0].norm1(model._pos_embed(model.patch_embed(images)))
    attention = model.blocks[0].attn
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 4, 1)[..., 1:]
    for got, expected in zip((maps[0].query, maps[0].key, maps[0].value), qkv):
        torch.testing.assert_close(got, expected.unflatten(-1, (2, 2)))


def test_tokens_of_oblong_images_form_an_oblong_grid():
    _, maps = Teacher(vit(img_size=(32, 64)), "test_vit")(torch.randn(1, 3, 32, 64))
    assert maps[0].query.shape[-2:] == (2, 4)


def test_a_softmax_twin_and_a_metaformer_are_teachers_too():
    network = timm.create_model("qsd_tiny_ann", attention="softmax", **TWIN)
    _, maps = Teacher(network, "twin")(torch.randn(1, 1, 32, 32))
    assert maps[0].query.shape == (1, 2, 8, 4, 4)
    assert (maps[0].query < 0).any()
    mixers = [SepConv, SepConv, Attention, Attention]
    norms = [LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias]
    network = MetaFormer(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), token_mixers=mixers, norm_layers=norms)
    _, maps = Teacher(network, "caformer")(torch.randn(1, 3, 64, 64))
    assert [tuple(m.query.shape) for m in maps] == [(1, 1, 32, 4, 4), (1, 2, 32, 2, 2)]


def test_a_teacher_without_attention_or_with_windows_is_refused():
    with pytest.raises(QsdError, match=r"teacher resnet10t has no attention that can be distilled.*attention_weight=0"):
        Teacher(timm.create_model("resnet10t"), "resnet10t")(torch.randn(1, 3, 32, 32))
    assert Teacher(timm.create_model("resnet10t"), "resnet10t")(torch.randn(1, 3, 32, 32), attention=False)[1] == []
    swin = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    with pytest.raises(QsdError, match="attends within windows"):
        Teacher(timm.create_model("swin_tiny_patch4_window7_224", **swin), "swin")(torch.randn(1, 3, 64, 64))


def test_tokens_that_form_no_grid_are_refused():
    model = vit(img_size=32)
    model.num_prefix_tokens = 2
    with pytest.raises(QsdError, match=r"5 tokens \(2 of them .*\) form no grid"):
        Teacher(model, "test_vit")(torch.randn(1, 3, 32, 32))


# -- seeing images ----------------------------------------------------------------------------------------------------


def test_images_are_normalised_coloured_and_resized_for_the_teacher():
    teacher = Teacher(vit(img_size=32), "test_vit", statistics=((0.5, 0.4, 0.3), (0.1, 0.2, 0.4)))
    pixels = torch.rand(2, 1, 32, 32)
    prepared = teacher.prepare((pixels - 0.25) / 0.5, ((0.25,), (0.5,)))
    expected = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.1, 0.2, 0.4]).view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(prepared, expected)
    grey = Teacher(vit(img_size=32, in_chans=1), "test_vit", statistics=((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)))
    torch.testing.assert_close(grey.prepare((pixels - 0.25) / 0.5, ((0.25,), (0.5,))), (pixels - 0.4) / 0.2)
    images = torch.zeros(1, 3, 50, 48)
    assert Teacher(vit(img_size=32), "test_vit").prepare(images, None).shape == (1, 3, 50, 48)  # any size is legal
    fixed = Teacher(vit(img_size=32, dynamic_img_size=False), "test_vit")
    assert fixed.prepare(images, None).shape == (1, 3, 32, 32)


def test_the_student_s_own_normalisation_passes_through_unchanged():
    images = torch.randn(2, 1, 32, 32)
    statistics = ((0.3,), (0.4,))
    for own in (None, statistics):
        teacher = Teacher(timm.create_model("qsd_tiny_ann", **TWIN), "twin", own)
        assert torch.equal(teacher.prepare(images, statistics), images)


def test_images_that_cannot_be_prepared_are_named():
    teacher = Teacher(vit(img_size=32), "test_vit", statistics=((0.5,) * 3, (0.1,) * 3))
    with pytest.raises(QsdError, match="the data does not tell its mean"):
        teacher.prepare(torch.zeros(1, 3, 32, 32), None)
    with pytest.raises(QsdError, match="expects 3 channels, the images have 2"):
        Teacher(vit(img_size=32), "test_vit").prepare(torch.zeros(1, 2, 32, 32), None)
    with pytest.raises(QsdError, match=r"cannot see images of 50x48 pixels: .*divisible by patch size"):
        Teacher(vit(img_size=32), "test_vit")(torch.zeros(1, 3, 50, 48))


# -- building ---------------------------------------------------------------------------------------------------------


def test_a_training_s_checkpoint_is_rebuilt_frozen_and_folded(tmp_path, twin):
    images = torch.randn(2, 1, 32, 32)
    path = saved_training(tmp_path / "best.ckpt", twin, **TWIN)
    state = torch.get_rng_state()
    teacher = build_teacher(path)
    assert torch.equal(torch.get_rng_state(), state)  # students with and without a teacher start alike
    assert teacher.num_classes == 10
    assert not teacher.network.training
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in teacher.network.modules())
    logits, maps = teacher(images)
    recorder = AttentionRecorder(twin)
    recorder.start()
    torch.testing.assert_close(logits, twin(images), rtol=1e-4, atol=1e-5)
    for folded, as_trained in zip(maps, recorder.take()):
        torch.testing.assert_close(folded.key, as_trained.key, rtol=1e-4, atol=1e-5)


def test_a_named_model_takes_its_weights_and_classes_from_a_file(tmp_path, twin):
    torch.save(twin.state_dict(), tmp_path / "twin.pth")
    arguments = {k: v for k, v in TWIN.items() if k != "num_classes"}
    teacher = build_teacher("qsd_tiny_ann", str(tmp_path / "twin.pth"), arguments)
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(teacher(images)[0], twin(images), rtol=1e-4, atol=1e-5)
    assert teacher.statistics is None  # it was trained on what the student sees
    network = vit(img_size=32)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    teacher = build_teacher("test_vit", str(tmp_path / "vit.pth"), {"img_size": 32})
    assert teacher.num_classes == 10
    assert teacher.statistics == (network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    given = ((0.1,) * 3, (0.2,) * 3)
    assert build_teacher("test_vit", str(tmp_path / "vit.pth"), {"img_size": 32}, given).statistics == given


@pytest.mark.parametrize("name", ["qsd_tiny.digits", "csdformer_2_384.fashion_mnist"])
def test_shipped_weights_teach_by_name_in_the_normalisation_of_their_training(name):
    teacher, network = build_teacher(name), timm.create_model(name, pretrained=True).eval()
    size = network.pretrained_cfg["input_size"][1]
    images, (mean, std) = torch.rand(2, 1, size, size), teacher.statistics
    assert (mean, std) == (network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    logits = network((images - mean[0]) / std[0])
    # A student whose images are scaled to -1 to 1; the norms are folded, so that rounding may tip a neuron.
    taught, _ = teacher(images * 2 - 1, ([0.5], [0.5]), attention=False)
    torch.testing.assert_close(taught, logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qsd_tiny.nothing",), r"qsd_tiny.nothing has no weights; names with weights are qsd_tiny.digits, qsd_tiny"),
        (("nothing.ckpt",), "checkpoint nothing.ckpt does not exist"),
        (("qsd_tiny_an",), "'qsd_tiny_an' is neither a file nor a model that timm knows"),
        (("qsd_tiny_ann",), r"teacher qsd_tiny_ann has no weights: train it first"),
        (("qsd_tiny_ann", "nothing.pth"), "checkpoint nothing.pth does not exist"),
        (("bare.pth",), "does not say which model it belongs to"),
        (("qsd_tiny_ann", "bare.pth"), "bare.pth does not fit the model"),
        (("test_vit4",), "teacher test_vit4 cannot be built"),  # timm has no weights of it
        (("test_vit", "vit.pth", {"abacus": 1}), "abacus"),
    ],
)
def test_teachers_that_cannot_be_built_are_refused(tmp_path, monkeypatch, arguments, message, twin):
    monkeypatch.chdir(tmp_path)
    torch.save(twin.state_dict(), "bare.pth")
    torch.save(vit().state_dict(), "vit.pth")
    with pytest.raises(QsdError, match=message):
        build_teacher(*arguments)


def test_a_spiking_network_may_teach(twin):
    layers = attention_layers(timm.create_model("qsd_tiny", **TWIN))
    assert len(layers) == len(attention_layers(twin)) == 4
    _, maps = Teacher(timm.create_model("qsd_tiny", time_steps=2, **TWIN), "T = 2")(torch.randn(2, 1, 32, 32))
    assert set(maps[0].query.unique().tolist()) <= {0, 1, 2}
