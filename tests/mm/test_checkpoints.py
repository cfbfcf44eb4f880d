"""Checkpoints of detectors and segmenters: nothing in them runs, and they open no other file."""

import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner import checkpoint as checkpoint_module

from qsd import QsdError
from qsd.mm import DistillationHook
from qsd.mm.checkpoints import read_mm_checkpoint, stored_config
from qsd.mm.checks import check_weights
from qsd.mm.loading import load_model
from qsd.mm.spiking import load_part
from qsd.reading import CodeError, FileError
from tests.helpers import CONFIGS, sample
from tests.helpers.files import only_opens, save_payload, works_or_one_line, zero_block
from tests.helpers.mm import SMALL


@pytest.fixture(scope="module")
def content():
    """The contents of a segmenter's checkpoint as mmengine writes it."""
    import qsd.mm.segmentation  # noqa: F401

    config = Config.fromfile(CONFIGS / "digits_seg.py")
    config.merge_from_dict(SMALL)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    names = tuple(f"class {i}" for i in range(11))
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    return {
        "meta": {"cfg": config.pretty_text, "dataset_meta": {"classes": names, "palette": None}, "epoch": 1, "iter": 5},
        "state_dict": model.state_dict(),
        "message_hub": {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": 5}, "resumed_keys": {}},
    }


def save(path, content, **meta):
    torch.save({**content, "meta": {**content["meta"], **meta}}, path)
    return path


def with_cfg(content, old, new):
    assert old in content["meta"]["cfg"]
    return content["meta"]["cfg"].replace(old, new, 1)


ROADS = {
    "predict, convert and distil": load_model,
    "a teacher": lambda path: DistillationHook(str(path))._build_teacher(),
    "test": lambda path: check_weights(torch.nn.Linear(1, 1), str(path)),
    "load_from and --resume": lambda path: CheckpointLoader.load_checkpoint(str(path), map_location="cpu"),
    "pretrained weights": lambda path: load_checkpoint(torch.nn.Linear(1, 1), str(path)),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("way", ["archive", "before 1.6", "pickle"])
def test_a_payload_is_refused_as_code_and_does_not_run(road, way, content, tmp_path):
    path = save_payload(tmp_path / "evil.pth", tmp_path / "mark", way, **content)
    with pytest.raises(CodeError, match="this file wants to run code"):
        ROADS[road](path)
    assert not (tmp_path / "mark").exists()


def test_files_that_openmmlab_fetches_by_names_do_not_run(content, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    save_payload(tmp_path / "checkpoints" / "evil.pth", tmp_path / "mark", **content)
    address = {"evil": "https://example.invalid/evil.pth"}
    for kind in ("external", "mmcls", "torchvision"):
        monkeypatch.setattr(checkpoint_module, f"get_{kind}_models", lambda: address)
    for name in ("open-mmlab://evil", "openmmlab://evil", "mmcls://evil", "torchvision://evil", address["evil"]):
        with pytest.raises(CodeError, match="this file wants to run code"):
            CheckpointLoader.load_checkpoint(name, map_location="cpu")
    with (tmp_path / "checkpoints" / "evil.pth").open("rb") as buffer, pytest.raises(CodeError):
        checkpoint_module._safe_torch_load(buffer)  # of a storage server
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("key", ["cfg", "config"])
def test_a_configuration_in_a_checkpoint_is_not_executed(key, content, tmp_path):
    mark = tmp_path / "mark"
    text = f"import os\nos.mkdir({str(mark)!r})\n" + content["meta"]["cfg"]
    path = save(tmp_path / "a.pth", content, **{key: text})
    for road, read in ROADS.items():
        if key == "cfg" and road in ("predict, convert and distil", "a teacher"):
            with pytest.raises(QsdError, match=r"line 1 is no plain value \(import os\)"):
                read(path)
        elif "load_from" in road:
            assert "config" not in read(path)["meta"]  # which Runner.resume would execute
    assert not mark.exists()


def test_a_good_checkpoint_gives_its_model_its_configuration_and_opens_nothing_else(content, tmp_path):
    path = save(tmp_path / "a.pth", content)
    load_model(path)
    with only_opens(path):
        model, config = load_model(path)
    assert all(torch.equal(value, content["state_dict"][key]) for key, value in model.state_dict().items())
    stored = Config.fromstring(content["meta"]["cfg"], ".py")
    for key in ("model", "test_dataloader", "val_evaluator", "visualizer"):
        ours, theirs = config[key].to_dict() if isinstance(config[key], dict) else config[key], stored[key]
        if key != "model":
            assert ours == (theirs.to_dict() if isinstance(theirs, dict) else theirs)


def test_histories_of_losses_come_back_for_resuming(content, tmp_path):
    read = CheckpointLoader.load_checkpoint(str(save(tmp_path / "a.pth", content)), map_location="cpu")
    history = read["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer)
    assert history.statistics("mean") == 1.5


class Attribute:
    """Asks for an attribute of a type that is allowed, from which everything else can be reached."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return getattr, (HistoryBuffer, self.name)


def test_getattr_reaches_the_statistics_of_histories_alone(content, tmp_path):
    for name in ("__init__", "update", "__class__"):
        torch.save({**content, "x": Attribute(name)}, tmp_path / "a.pth")
        with pytest.raises(FileError):
            read_mm_checkpoint(tmp_path / "a.pth")


TYPES = ["os.system", "subprocess.Popen", "mmengine.fileio.load", "builtins.exec", "qsd.load_packed", "Unknown", 3]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("part", ["model", "test_dataloader", "visualizer"])
def test_types_that_are_not_registered_are_refused(name, part, content, tmp_path):
    mark = tmp_path / "mark"
    text = content["meta"]["cfg"] + f"\n{part} = dict(type={name!r}, command='mkdir {mark}', file={str(mark)!r})\n"
    with pytest.raises(QsdError, match=rf"{part}\.type=.* is not registered with OpenMMLab"):
        load_model(save(tmp_path / "a.pth", content, cfg=text))
    assert not mark.exists()


@pytest.mark.parametrize("module", ["os", "antigravity", "qsd.cli", "evil"])
def test_files_do_not_choose_what_is_imported(module, content, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('mark')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = content["meta"]["cfg"] + f"\ncustom_imports = dict(imports=[{module!r}])\n"
    with pytest.raises(QsdError, match=f"imports '{module}'; files do not choose what is imported"):
        load_model(save(tmp_path / "a.pth", content, cfg=text))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model='qsd_tiny'", "model='hf-hub:timm/resnet18'", "not registered with timm"),
        ("model='qsd_tiny'", "model='local-dir:/etc'", "not registered with timm"),
        ("model='qsd_tiny'", "teacher_config='x.py', model='qsd_tiny'", "teacher_config"),
        ("model='qsd_tiny'", "teacher_ckpt='x.pth', model='qsd_tiny'", "teacher_ckpt"),
        ("model='qsd_tiny'", "note='https://example.org/x', model='qsd_tiny'", "files open no other files"),
        ("model='qsd_tiny'", "note='other.pth', model='qsd_tiny'", "files open no other files"),
    ],
)
def test_models_that_name_other_files_and_addresses_are_refused(old, new, message, content, tmp_path):
    path = save(tmp_path / "a.pth", content, cfg=with_cfg(content, old, new))
    with only_opens(path), pytest.raises(QsdError, match=message):
        load_model(path)


def test_weights_that_a_model_names_are_not_opened(content, tmp_path):
    other = save_payload(tmp_path / "other.pth", tmp_path / "mark")
    arguments = f"model_args=dict(checkpoint_path={str(other)!r}, pretrained=True, "
    text = with_cfg(content, "model_args=dict(", arguments)
    text = text.replace(
        "model='qsd_tiny'", f"init_cfg=dict(type='Pretrained', checkpoint={str(other)!r}), model='qsd_tiny'"
    )
    path = save(tmp_path / "a.pth", content, cfg=text)
    with only_opens(path):
        load_model(path)
    assert not (tmp_path / "mark").exists()


def test_data_and_metrics_of_a_checkpoint_neither_write_nor_fetch(content, tmp_path):
    text = content["meta"]["cfg"]
    places = "outfile_prefix='x', output_dir='x', format_only=True"
    changed = text + f"\nval_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], {places})\n"
    _, config = load_model(save(tmp_path / "a.pth", content, cfg=changed))
    assert config.val_evaluator.to_dict() == {"type": "IoUMetric", "iou_metrics": ["mIoU"]}
    for added, message in (
        ("val_evaluator = dict(type='DumpResults', out_file_path='x.pkl')", "val_evaluator.type='DumpResults', which"),
        ("val_evaluator = [dict(type='mmdet.DumpProposals', output_dir='x')]", "DumpProposals', which writes files"),
        ("val_dataloader = dict(dataset=dict(type='CocoDataset', ann_file='a.pkl'))", "pickled data may run code"),
        ("val_dataloader = dict(dataset=dict(proposal_file='a.pickle'))", "pickled data may run code"),
        ("val_dataloader = dict(dataset=dict(type='mmdet.RefCocoDataset'))", "unpickles or fetches files"),
        ("val_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadBiomedicalData')]))", "unpickles or fetches"),
        ("val_dataloader = dict(dataset=dict(metainfo=dict(classes='/etc/hosts')))", "where OpenMMLab reads a file"),
        ("model = dict(type='EncoderDecoder', weight='weights.pickle')", "files open no other files"),
        ("model = dict(type='EncoderDecoder', weight='/dev/zero')", "files open no other files"),
    ):
        with pytest.raises(QsdError, match=message):
            load_model(save(tmp_path / "a.pth", content, cfg=f"{text}\n{added}\n"))
    config.val_dataloader.dataset.data_root = "s3://bucket"
    with pytest.raises(QsdError, match=r"the val data are at s3://bucket, which is not fetched"):
        load_part(config, "val")
    config.val_dataloader.dataset = {"type": "CityscapesDataset", "surprise": 3}
    with pytest.raises(QsdError, match=r"the val data or their metrics cannot be built: .*surprise"):
        load_part(config, "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta": []}, "'meta' is of type list"),
        ({"meta": {}}, "is no checkpoint of a training"),
        ({"meta": {"cfg": 3}}, "'meta.cfg' is of type int"),
        ({"meta": {"cfg": "a = 1"}}, "no part 'model'"),
        ({"meta": {"cfg": "model = dict(type='ResNet')\ndefault_scope = 3"}}, "'default_scope' is of type int"),
        ({"meta": {"cfg": "model = 3"}}, "'model' is of type int"),
        ({"state_dict": []}, "'state_dict' is of type list"),
        ({"state_dict": {"a": "b"}}, "entry 'a' of type str"),
        ({"state_dict": {}}, "cannot be built"),
        ({"message_hub": 3}, "'message_hub' is of type int"),
    ],
)
def test_parts_of_other_types_are_named(change, message, content, tmp_path):
    torch.save({**content, **change}, tmp_path / "a.pth")
    with pytest.raises(QsdError, match=message) as error:
        load_model(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", [None, "cat", [1, 2], {}])
def test_names_of_classes_are_checked(classes, content, tmp_path):
    with pytest.raises(QsdError, match="does not tell the names of its classes"):
        load_model(save(tmp_path / "a.pth", content, dataset_meta={"classes": classes}))


@pytest.mark.timeout(60)
def test_damage_other_formats_and_pipes_are_named_on_every_road(content, tmp_path):
    save(tmp_path / "zeros.pth", content)
    zero_block(tmp_path / "zeros.pth", "/data/")
    (tmp_path / "text.pth").write_text("a text\n" * 50)
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(save(tmp_path / "x.pth", content).read_bytes()[:5000])
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1], protocol=2))
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "x")
    os.mkfifo(tmp_path / "pipe.pth")
    messages = {
        "zeros": "check sum", "text": "a text file", "empty": "an empty file", "cut": "damaged",
        "list": "cannot be read|holds", "zip": "a zip archive", "pipe": "a named pipe", "gone": "does not exist",
    }  # fmt: skip
    for name, message in messages.items():
        for road in ROADS.values():
            with pytest.raises(QsdError, match=message) as error:
                road(tmp_path / f"{name}.pth")
            assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_not_tested(tmp_path):
    layer = torch.nn.Linear(2, 1)
    torch.save(
        {"state_dict": {**layer.state_dict(), "weight": torch.tensor([[1.0, float("nan")]])}}, tmp_path / "a.pth"
    )
    with pytest.raises(QsdError, match="weights that are not finite: weight; it cannot be used"):
        check_weights(layer, str(tmp_path / "a.pth"))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-9, 10**7), st.text(max_size=5), st.just([]), st.just({}))


@settings(max_examples=sample(8, 500), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_fields_dropped_and_retyped_end_in_one_line(content, tmp_path_factory, data):
    meta = dict(content["meta"])
    changed = {**content, "meta": meta, "state_dict": dict(content["state_dict"])}
    part = data.draw(st.sampled_from([changed, meta, changed["state_dict"]]))
    key = data.draw(st.sampled_from(sorted(part)))
    if data.draw(st.booleans()):
        del part[key]
    else:
        part[key] = data.draw(VALUES)
    path = tmp_path_factory.getbasetemp() / "fields.pth"
    torch.save(changed, path)
    with works_or_one_line():
        load_model(path)


@settings(max_examples=sample(15, 500), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_changed_characters_of_a_configuration_end_in_one_line(content, data):
    text = list(content["meta"]["cfg"])
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.sampled_from("()[]{}'=,.ax1-\n "))
    with works_or_one_line():
        stored_config({"meta": {"cfg": "".join(text)}}, "a.pth")
