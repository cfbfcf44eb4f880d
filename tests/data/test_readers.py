"""Parquet files, data sets saved to disk, shards and tar files: each image once, resumed to the bit, nothing run."""

import io
import json
import logging
import pickle
import tarfile

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from qsd.data import ReaderData, TrainSampler
from qsd.data.hub import HubImages
from qsd.data.shard_files import find_shards
from qsd.errors import QsdError
from tests.helpers import sample
from tests.helpers.distributed import Record, run_processes

datasets = pytest.importorskip("datasets")
webdataset = pytest.importorskip("webdataset")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.filterwarnings("ignore")

COUNTS = {"train": 24, "validation": 9}
SMALL = {"img_size": 8, "batch_size": 4, "num_workers": 0, "auto_augment": None, "seed": 3}


@pytest.fixture(scope="module", autouse=True)
def _own_caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def picture(number):
    """A picture of one colour, the n-th."""
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (number, 255 - number, 7)).save(file, "PNG")
    return file.getvalue()


def pictures(split):
    """Pictures and labels of a split; no two pictures are equal."""
    first = 100 if split == "validation" else 0
    return [(picture(first + number), number % 3) for number in range(COUNTS[split])]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The same pictures in every format; the arguments of the module by the name of the format."""
    root = tmp_path_factory.mktemp("stores")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    splits = datasets.DatasetDict()
    for folder in ("parquet/data", "shards", "tar"):
        (root / folder).mkdir(parents=True)
    for split in COUNTS:
        rows = pictures(split)
        images = [{"bytes": content, "path": f"{number}.png"} for number, (content, _) in enumerate(rows)]
        columns = {"image": images, "label": [label for _, label in rows]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
        splits[split].to_parquet(root / "parquet/data" / f"{split}-00000-of-00001.parquet")
        pattern = str(root / "shards" / f"set-{split}-%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=8, verbose=False) as writer:
            for number, (content, label) in enumerate(rows):
                sample = {
                    "__key__": f"a/{number:04d}",
                    "png": content,
                    "cls": label,
                    "json": {"deep": {"class": label}},
                }
                writer.write(sample)
        with tarfile.open(root / "tar" / f"{split}.tar", "w") as archive:
            for number, (content, label) in enumerate(rows):
                entry = tarfile.TarInfo(f"{features['label'].names[label]}/{number}.png")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    splits.save_to_disk(root / "saved")
    return {
        "parquet": {"name": "hfds/", "root": str(root / "parquet")},
        "saved": {"name": "hfds/", "root": str(root / "saved")},
        "shards": {"name": "wds/", "root": str(root / "shards")},
        "json": {"name": "wds/", "root": str(root / "shards"), "label_key": "deep/class"},
        "tar": {"name": "tar/", "root": str(root / "tar")},
    }


def test_every_format_holds_the_same_pictures_labels_and_names(stores):
    for kind, arguments in stores.items():
        module = ReaderData(**arguments, **SMALL)
        module.prepare_data()
        module.setup()
        assert module.class_names == (["0", "1", "2"] if kind in ("shards", "json") else ["ant", "bee", "cat"])
        for part, split in (("train", "train"), ("val", "validation"), ("test", "validation")):
            source = module.load_part(part)
            found = sorted((source.load(i).getpixel((0, 0))[0], int(source.labels[i])) for i in range(len(source)))
            expected = [
                (Image.open(io.BytesIO(content)).getpixel((0, 0))[0], label) for content, label in pictures(split)
            ]
            assert found == sorted(expected), kind
            assert len({source.name(i) for i in range(len(source))}) == COUNTS[split]
        images, labels = next(iter(module.train_dataloader()))
        assert (images.shape, labels.shape) == ((4, 3, 8, 8), (4,))
    reserved = ReaderData(**stores["saved"], **SMALL, val_size=6)
    assert [len(reserved.load_part(part)) for part in ("train", "val", "test")] == [18, 6, 6]


def two_processes(arguments):
    """The module for two processes with three loading workers each; pictures are known by their sum."""
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "random_erasing": 0.0, "color_jitter": 0.0}
    return lambda batch_size: ReaderData(**arguments, **{**SMALL, **whole, "batch_size": batch_size, "num_workers": 3})


def test_two_processes_with_three_workers_see_each_sample_once(stores, tmp_path):
    for kind in sample(("shards",), ("shards", "parquet", "saved", "tar")):
        two = run_processes(tmp_path / kind, 2, 4, two_processes(stores[kind]), features=192)
        assert [len(process["train"]) for process in two] == [6, 6]  # two epochs of three steps each
        for epoch in (slice(0, 3), slice(3, 6)):
            seen = [value for process in two for step in process["train"][epoch] for value in step]
            assert len(seen) == len(set(seen)) == COUNTS["train"], kind
        evaluated = [value for process in two for value in process["predict"]]
        assert len(evaluated) == len(set(evaluated)) == COUNTS["validation"]


def train(arguments, folder, steps=-1, resume=None):
    """Train for two epochs, or a few steps, and write a checkpoint in each of them."""
    folder.mkdir(exist_ok=True)
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = Record(folder, 192)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[every],
        max_epochs=2, max_steps=steps,
    )  # fmt: skip
    trainer.fit(module, ReaderData(**arguments, **{**SMALL, "auto_augment": "rand-m9"}), ckpt_path=resume)
    return module


def test_a_training_on_shards_and_on_a_saved_data_set_validates_and_resumes_to_the_bit(stores, tmp_path):
    for kind in ("shards", "saved"):
        whole = train(stores[kind], tmp_path / kind)
        assert len(whole.seen["val"]) >= 2 * COUNTS["validation"]
        resumed = train(stores[kind], tmp_path / "again", resume=tmp_path / kind / "step=4.ckpt")
        assert resumed.seen["train"] == whole.seen["train"][4:]
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name


def test_an_epoch_resumes_in_its_middle_to_the_bit(stores):
    for kind in ("shards", "saved", "parquet", "tar"):
        whole = ReaderData(**stores[kind], **{**SMALL, "auto_augment": "rand-m9"})
        batches = [images for images, _ in whole.train_dataloader()]
        again = ReaderData(
            **stores[kind], **{**SMALL, "auto_augment": "rand-m9", "num_workers": 2 * (kind == "shards")}
        )
        loader = again.train_dataloader()
        loader.load_state_dict({"epoch": 0, "batches": 2})
        rest = [images for images, _ in loader]
        assert len(rest) == len(batches) - 2
        assert all(torch.equal(a, b) for a, b in zip(rest, batches[2:]))


def test_shards_are_indexed_once_and_again_when_they_change(stores, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("QSD_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "qsd.data.shards")
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in find_shards(type(tmp_path)(stores["shards"]["root"]), "train"):
        (folder / path.name).write_bytes(path.read_bytes())

    def count():
        caplog.clear()
        return len(ReaderData("wds/", str(folder), **SMALL).load_part("train")), caplog.text.count("headers of")

    assert [count(), count()] == [(24, 3), (24, 0)]
    with tarfile.open(folder / "set-train-0002.tar", "a") as archive:
        for name, content in (("z.png", picture(90)), ("z.cls", b"2")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    assert count() == (25, 1)
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.write_bytes(path.read_bytes()[:60])  # a damaged index is made again
    assert count() == (25, 3)


def test_names_of_shards(tmp_path):
    for number in range(3):
        (tmp_path / f"set-train-{number:04d}.tar").touch()
        (tmp_path / f"constrained-{number}.tar").touch()
    names = [f"set-train-{number:04d}.tar" for number in range(3)]
    for split in ("train", "set-train-{0000..0002}.tar", "set-train-*.tar", "set-{train}-000{0,1,2}.tar"):
        assert [path.name for path in find_shards(tmp_path, split)] == names
    info = {"splits": {"train": {"name": "train", "filenames": names[:2], "shard_lengths": [1, 1], "num_samples": 2}}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert [path.name for path in find_shards(tmp_path, "train")] == names[:2]
    with pytest.raises(QsdError, match=r"set-train-0003.tar does not exist"):
        find_shards(tmp_path, "set-train-{0000..0003}.tar")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_nothing_in_shards_is_unpickled_run_or_fetched(stores, tmp_path):
    marker = tmp_path / "run"
    for bad in (f"pipe:touch {marker}", "https://example.org/a.tar", "../a.tar", "/etc/a.tar"):
        info = {"splits": {"train": {"name": "train", "filenames": [bad]}}}
        (tmp_path / "_info.json").write_text(json.dumps(info))
        for split in ("train", bad):
            with pytest.raises(QsdError, match="commands and addresses of shards are not opened"):
                ReaderData("wds/", str(tmp_path), train_split=split, **SMALL).load_part("train")
    assert not marker.exists()
    (tmp_path / "_info.json").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(QsdError, match="is no list of shards"):
        ReaderData("wds/", str(tmp_path), **SMALL).load_part("train")
    (tmp_path / "_info.json").unlink()
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in (("a.png", picture(1)), ("a.cls", b"0"), ("a.pyd", pickle.dumps(Bomb()))):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert len(ReaderData("wds/", str(tmp_path), **SMALL).load_part("train")) == 1


def test_mistakes_are_one_line(stores, tmp_path):
    shards, saved = stores["shards"], stores["saved"]
    path = next(type(tmp_path)(shards["root"]).glob("set-train-*.tar"))
    (tmp_path / "train.tar").write_bytes(path.read_bytes()[:3000])
    (tmp_path / "zipped-train.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with tarfile.open(tmp_path / "bare.tar", "w") as archive:
        entry = tarfile.TarInfo("a.png")
        archive.addfile(entry, io.BytesIO())
    (tmp_path / "paths").mkdir()
    files = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": "/etc/passwd"}], "label": [0]})
    files.to_pandas().to_parquet(tmp_path / "paths" / "train.parquet")
    for arguments, message in (
        ({"name": "tfds/x"}, "names no reader; it begins with hfds/, wds/, tar/"),
        ({"name": "wds/x", "root": "."}, "write wds/ and the folder as --data.root"),
        ({"name": "wds/"}, "needs --data.root"),
        ({"name": "wds/", "root": "nowhere"}, "root nowhere is not a folder"),
        ({"name": "wds/", "root": str(tmp_path)}, "train.tar cannot be read"),
        ({"name": "wds/", "root": str(tmp_path), "train_split": "zipped-train.tar"}, "a gzip archive; unpack it"),
        ({"name": "wds/", "root": str(tmp_path), "train_split": "bare.tar"}, "has no .cls beside it"),
        ({**shards, "label_key": "none"}, "no whole number as its label in .json in the field 'none'"),
        ({**shards, "train_split": "nothing"}, "has no tar files of the split nothing"),
        ({**saved, "image_key": "picture"}, "no column 'picture'; choose --data.image_key from image, label"),
        ({**saved, "train_split": "nothing"}, "has no split nothing: neither"),
        ({"name": "hfds/nobody/nothing", "root": str(tmp_path)}, "cannot be read: .*--data.download true"),
        ({**saved, "val_size": 24}, "val_size=24 leaves none of the 24 images"),
    ):
        with pytest.raises(QsdError, match=message) as error:
            ReaderData(**arguments, **SMALL).load_part("train")
        assert "\n" not in str(error.value)
    (tmp_path / "zipped" / "train").mkdir(parents=True)
    (tmp_path / "zipped" / "train" / "0000.tar.gz").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(QsdError, match=r"0000\.tar\.gz is compressed, .*; unpack it to a \.tar, as gunzip does"):
        ReaderData("wds/", str(tmp_path / "zipped"), **SMALL).load_part("train")
    source = ReaderData("hfds/", str(tmp_path / "paths"), **SMALL).load_part("train")
    assert "does not hold the image itself" in source.load(0).reason  # a path in a file is not opened
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "train" / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(QsdError, match="names a file outside of its folder"):
        ReaderData("hfds/", str(tmp_path / "saved"), **SMALL).load_part("train")
    for damaged in ('{"_data_files": 1}', "[" * 100_000):
        (tmp_path / "saved" / "train" / "state.json").write_text(damaged)
        with pytest.raises(QsdError, match=r"state\.json is damaged; save the data set again"):
            ReaderData("hfds/", str(tmp_path / "saved"), **SMALL).setup("validate")


def write_tar(path, files, end=True):
    """An archive of files by name, without the mark of its end if asked."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        length = archive.offset
    if not end:
        path.write_bytes(path.read_bytes()[:length])
    return length


def test_damaged_archives_are_refused_and_missing_ends_are_said(tmp_path, caplog):
    one, two = [[(f"{name}.png", picture(1)), (f"{name}.cls", b"0")] for name in "ab"]
    path = tmp_path / "train.tar"

    def read(files, change=None, end=True):
        length = write_tar(path, files, end)
        if change is not None:
            path.write_bytes(change(path.read_bytes(), length))
        return ReaderData("wds/", str(tmp_path), **SMALL).load_part("train")

    first = write_tar(path, one)
    for files, change, message in (
        (one + two, lambda content, _: content[:first] + b"x" + content[first + 1 :], f"damaged at byte {first}"),
        (one + two, lambda content, _: content[: first + 100], f"damaged at byte {first}"),
        (one, lambda content, _: content + content, "goes on behind its end; if archives were joined"),
        (one + one, None, "holds a.png several times"),
        (one + two + one, None, "holds the image a.png 2 times"),
        ([one[0], (one[1][0], b"-2")], None, "the label -2, which is no class"),
        ([one[0], (one[1][0], b"9" * 30)], None, "the label 9{30}, which is no class"),
        ([one[0], (one[1][0], b"-1")], None, "hold no image with a class"),
    ):
        with pytest.raises(QsdError, match=message):
            read(files, change)
    caplog.clear()
    assert len(read(one + two, end=False)) == 2
    assert "has no mark at its end" in caplog.text
    caplog.clear()
    source = read([*one, two[0], (two[1][0], b"-1")])
    assert (len(source), source.name(0)) == (1, f"{path}/a.png")
    assert "1 of 2 images of the split train have no class" in caplog.text
    for label in (b"1.7", b"Infinity", b'"x"'):
        write_tar(path, [one[0], ("a.json", b'{"label": %s}' % label)])
        with pytest.raises(QsdError, match=r"no whole number as its label in .json in the field 'label'"):
            ReaderData("wds/", str(tmp_path), label_key="label", **SMALL).load_part("train")


def test_lists_of_shards_that_do_not_fit_their_files(tmp_path, caplog):
    for number, name in enumerate(("train-val-0.tar", "train-1.tar")):
        write_tar(tmp_path / name, [(f"{number}.png", picture(number)), (f"{number}.cls", b"0")])
    with pytest.raises(QsdError, match=r"splits train and val share the file .*train-val-0.tar"):
        ReaderData("wds/", str(tmp_path), **SMALL).load_part("val")
    with pytest.raises(QsdError, match=r"names the file .*train-1.tar twice"):
        ReaderData("wds/", str(tmp_path), train_split="train-{1,1}.tar", **SMALL).load_part("train")
    info = {"splits": {"train": {"name": "train", "filenames": ["train-1.tar"], "num_samples": 2}}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    ReaderData("wds/", str(tmp_path), **SMALL).load_part("train")
    assert "the list of the split train has 2 images, and its tar files hold 1" in caplog.text


def test_classes_of_tar_files_are_numbered_by_a_list_and_hidden_files_are_ignored(tmp_path):
    write_tar(tmp_path / "train.tar", [(f"./{name}.png", picture(1)) for name in ("b/1", "a/2", "a/._2")])
    names = tmp_path / "names.txt"
    names.write_text("b\na\n")
    source = ReaderData("tar/", str(tmp_path), class_names=str(names), **SMALL).load_part("train")
    assert source.labels.tolist() == [0, 1]
    names.write_text("b\n")
    with pytest.raises(QsdError, match=r"has the class a, which .*names.txt lacks"):
        ReaderData("tar/", str(tmp_path), class_names=str(names), **SMALL).load_part("train")


def hub_split(folder, split, labels, names):
    """A parquet file of a split, whose labels have names or are plain numbers."""
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [{"bytes": picture(number), "path": None} for number in range(len(labels))]
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict({"image": images, "label": [0] * len(labels)}, features=features).data.table
    # Past the checks of the package; the schema keeps the names.
    table = table.set_column(1, table.field("label"), pyarrow.array(labels))
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


def test_splits_with_other_names_or_numbers_of_classes(tmp_path):
    def labels(name, validation, names):
        hub_split(tmp_path / name, "train", [0, 1, 2], ["ant", "bee", "cat"])
        hub_split(tmp_path / name, "validation", validation, names)
        module = ReaderData("hfds/", str(tmp_path / name), **SMALL)
        module.val_dataloader()
        return module.load_part("val").labels.tolist()

    assert labels("order", [0, 1, 1], ["cat", "ant"]) == [2, 0, 0]  # numbered by their names
    assert labels("more", [1, 1], ["dog", "bee"]) == [1, 1]  # a class that no image has
    assert labels("plain", [2, 0], None) == [2, 0]
    for name, validation, names, message in (
        ("unknown", [0, 1], ["ant", "dog"], "has the class dog, which the training split lacks"),
        ("beyond", [0, 5], ["ant", "bee"], "has the label 5, and its columns name 2 classes"),
        ("plainer", [0, 3], None, "has the label 3, and 3 classes are known"),
        ("without", [0, -1], ["ant", "bee"], "1 of the 2 images of the val part have no class"),
        ("enormous", [0, 10**12], None, "has the label 1000000000000, which is no class"),
    ):
        with pytest.raises(QsdError, match=message):
            labels(name, validation, names)
    path = tmp_path / "order" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(QsdError, match=r"the split train of .* cannot be read") as error:
        ReaderData("hfds/", str(tmp_path / "order"), **SMALL).load_part("train")
    assert "\n" not in str(error.value)


def test_a_saved_data_set_without_a_split_does_not_validate_on_what_it_trains(tmp_path):
    columns = {"image": [picture(number) for number in range(4)], "label": [0, 1, 0, 1]}
    dataset = datasets.Dataset.from_dict(columns).select([3, 1, 0])
    dataset.save_to_disk(tmp_path / "saved")
    module = ReaderData("hfds/", str(tmp_path / "saved"), **SMALL)
    source = module.load_part("train")
    assert [source.load(i).getpixel((0, 0))[0] for i in range(3)] == [3, 1, 0]
    with pytest.raises(QsdError, match=r"no split validation or val or valid.*--data.val_size"):
        module.load_part("val")
    module = HubImages(dataset, "image", "label", "train")  # rows in an order of their own
    assert [module.load(i).getpixel((0, 0))[0] for i in range(3)] == [3, 1, 0]
    assert pickle.loads(pickle.dumps(module)).load(0).getpixel((0, 0))[0] == 3


def test_parquet_files_in_folders_whose_names_are_patterns(tmp_path):
    for name in ("run [1]", "a*b", "c{1,2}", "d?e", "f#g", "h%20i"):
        hub_split(tmp_path / name, "train", [0, 1], ["ant", "bee"])
        assert len(ReaderData("hfds/", str(tmp_path / name), **SMALL).load_part("train")) == 2, name


def test_parquet_files_of_other_programs_with_texts_as_labels(tmp_path):
    for split, labels in (("train", ["b", "a", "c"]), ("val", ["c", "b"])):
        columns = {"picture": [picture(number) for number in range(len(labels))], "kind": labels}
        datasets.Dataset.from_dict(columns).to_pandas().to_parquet(tmp_path / f"{split}.parquet")
    module = ReaderData("hfds/", str(tmp_path), image_key="picture", label_key="kind", **SMALL)
    module.setup("fit")
    assert module.class_names == ["a", "b", "c"]
    assert [module.load_part(part).labels.tolist() for part in ("train", "val")] == [[1, 0, 2], [2, 1]]
    assert module.load_part("val").load(1).getpixel((0, 0)) == (1, 254, 7)
    columns = {"picture": [picture(0)], "kind": [0]}
    datasets.Dataset.from_dict(columns).to_pandas().to_parquet(tmp_path / "val.parquet")
    datasets.Dataset.from_dict(columns).to_pandas()[:0].to_parquet(tmp_path / "test.parquet")
    for part, message in (("val", "numbers without names, and those of the training split texts"), ("test", "no rows")):
        with pytest.raises(QsdError, match=message):
            ReaderData(
                "hfds/", str(tmp_path), image_key="picture", label_key="kind", test_split="test", **SMALL
            ).load_part(part)
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\nb\nc\n")
    keys = {"image_key": "picture", "label_key": "kind", "class_names": str(tmp_path / "names.txt")}
    with pytest.raises(QsdError, match=r"names.txt is no text in UTF-8"):
        ReaderData("hfds/", str(tmp_path), **keys, **SMALL).load_part("train")


def test_what_equal_steps_leave_out_or_repeat_is_said(caplog):
    caplog.set_level(logging.INFO)
    for length, processes, says in (
        (9, 4, "1 of 9 training images are left out of each epoch"),
        (2, 3, "1 of 2 training images are repeated in each epoch"),
        (8, 4, None),
        (9, 1, None),
    ):
        caplog.clear()
        for rank in range(processes):
            TrainSampler(range(length), 0, processes, rank)
        assert caplog.text.count("training images") == (says is not None)
        assert (says or "") in caplog.text
