"""Folders of files of every kind: links, endings, odd names."""

import csv
import logging
import os
from functools import partial

import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image

from qsd import QsdError
from qsd.callbacks import PredictionWriter
from qsd.data import ImageFolderData, TorchvisionData
from qsd.data.files import ImageFinder, class_folders, find_images
from qsd.data.loading import WORKER_ENDED

CPU = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
pytestmark = pytest.mark.filterwarnings("ignore")


def data(root, **kwargs):
    return ImageFolderData(str(root), **{"img_size": 16, "batch_size": 2, "num_workers": 0, **kwargs})


def names(paths, root):
    return [os.path.relpath(path, root) for path in paths]


def picture(path, file_format="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (200, 100, 50)).save(path, file_format)
    return path


@pytest.mark.timeout(20)
def test_links_upwards_and_sideways_list_no_image_twice(tmp_path, caplog):
    root = tmp_path / "train"
    picture(root / "cat" / "a" / "0.png")
    picture(root / "cat" / "b" / "1.png")
    picture(root / "dog" / "2.png")
    for name, target in {
        "b/up": "cat",
        "self": "cat",
        "to_root": "..",
        "b/side": "cat/a",
        "x": "/",
        "c": "cat/b",
    }.items():
        (root / "cat" / name).symlink_to(root / target, target_is_directory=True)
    (root / "cat" / "b" / "dead").symlink_to(root / "gone")
    finder = ImageFinder()
    with caplog.at_level(logging.WARNING, "qsd"):
        found = finder.find(root / "cat")
        finder.report(root / "cat")
    assert names(found, root) == ["cat/a/0.png", "cat/b/1.png"]
    assert "6 link(s) to folders above or searched before" in caplog.text


def test_links_to_files_and_to_folders_elsewhere_are_followed(tmp_path):
    picture(tmp_path / "store" / "inner" / "0.png")
    picture(tmp_path / "one.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "store" / "link.png").symlink_to(tmp_path / "one.png")
    found = ImageFinder().find(tmp_path / "train" / "cat")
    assert names(found, tmp_path / "train") == ["cat/link.png", "cat/inner/0.png"]


def test_a_class_folder_that_leads_upwards_is_refused(tree):
    (tree / "train" / "all").symlink_to(tree, target_is_directory=True)
    with pytest.raises(QsdError, match="all is a link to a folder that it lies in; remove it"):
        class_folders(tree / "train")
    with pytest.raises(QsdError, match="remove it"):
        data(tree).setup("fit")


def test_other_endings_are_read_or_named_with_their_number(tree, caplog):
    folder = tree / "train" / "cat"
    for ending, kind in {"jfif": "JPEG", "gif": "GIF", "avif": "AVIF", "JPE": "JPEG", "pnm": "PPM"}.items():
        picture(folder / f"new.{ending}", kind)
    for name in ("a.heic", "b.heic", "c.txt", "noending", ".hidden.txt"):
        (folder / name).write_text("x")
    with caplog.at_level(logging.WARNING, "qsd"):
        module = data(tree)
        module.setup("fit")
    assert len(module.load_part("train")) == 11 + 5
    (record,) = [r for r in caplog.records if "whose ending is not read" in r.message][:1]
    assert "4 file(s)" in record.message
    assert "2 .heic" in record.message
    assert "1 .txt" in record.message
    for images, _ in module.train_dataloader():
        assert images.isfinite().all()


ODD = ["[x]", "[bold]", 'a"b', "it's", "line\nbreak", "=1+1", "ä ö", "%s{0}", "\udce9", "tab\t", "-x", "@x", "#$&;*?"]


@pytest.mark.timeout(60)
def test_odd_names_of_classes_and_files_train_validate_and_predict(tmp_path, monkeypatch):
    for part in ("train", "val"):
        for name in ODD:
            picture(tmp_path / part / name / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    module = ImageFolderData(".", img_size=8, batch_size=4, num_workers=0, predict_path="val")
    module.setup("fit")
    assert sorted(module.class_names) == sorted(ODD)
    assert len(list(module.train_dataloader())) == 3

    class Guess(LightningModule):
        def predict_step(self, batch):
            images, labels = batch
            chances = torch.arange(len(images))[:, None] == torch.arange(len(ODD))
            return {"name": list(labels), "probabilities": chances.float()}

    writer = PredictionWriter(str(tmp_path / "predictions.csv"))
    Trainer(**CPU, callbacks=[writer], default_root_dir=tmp_path).predict(Guess(), module)
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ODD)
    assert not any(value.startswith(("=", "+", "-", "@")) for row in rows for value in row.values())
    assert {os.path.basename(row["image"]) for row in rows if "\\" not in row["image"]} == {
        f"{name}.png" for name in ODD if name != "\udce9"
    }
    classes = {name for row in rows if (name := row["class"])}
    assert classes <= {f"'{n}" if n[0] in "=-@" else n.replace("\udce9", "\\udce9") for n in ODD}


def test_a_name_that_begins_like_a_formula_stays_the_path_of_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = PredictionWriter(str(tmp_path / "p.csv"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    writer.on_predict_start(trainer, None)
    batch = {"name": ["=cmd.png"], "probabilities": torch.tensor([[0.25, 0.75]])}
    writer.write_on_batch_end(trainer, None, batch, None, None, 0, 0)
    writer.on_predict_end(trainer, None)
    assert (tmp_path / "p.csv").read_text() == "image,class,probability\n./=cmd.png,1,0.7500\n".replace(
        "\n", "\r\n"
    ) or ("./=cmd.png,1,0.7500" in (tmp_path / "p.csv").read_text())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["pipe", "empty", "postscript", "avif", "dds"])
def test_broken_files_are_handled_as_on_bad_image_says(tree, workers, kind):
    path = tree / "train" / "cat" / "broken\n[red].png"
    contents = {"empty": b"", "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n", "dds": b"DDS " + bytes(124)}
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(contents.get(kind, b"\0\0\0\x1cftypavif" + bytes(99)))
    with pytest.raises(QsdError) as error:
        list(data(tree, num_workers=workers).train_dataloader())
    assert "\n" not in str(error.value)
    assert "broken\\n[red].png" in str(error.value)
    module = data(tree, num_workers=workers, on_bad_image="skip", batch_size=12)
    (batch,) = module.train_dataloader()
    assert len(batch[0]) == 12
    assert module.skipped_images == [str(path)]


def test_orientation_is_one_rule_in_all_parts_and_can_be_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "val", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        stored = Image.new("RGB", (16, 16))
        stored.paste((250, 250, 250), (0, 0, 8, 16))  # its left half is bright; turned upright, its upper half
        stored.save(tmp_path / part / "cat" / "0.jpg", exif=exif, quality=100)
    options = {"auto_augment": None, "random_erasing": 0.0, "hflip": 0.0, "scale": (1.0, 1.0), "color_jitter": 0.0}
    for rule, bright in (("upright", (slice(0, 6), slice(None))), ("ignore", (slice(None), slice(0, 6)))):
        module = ImageFolderData(
            str(tmp_path), 16, 1, 0, ratio=(1.0, 1.0), crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1),
            predict_path=str(tmp_path / "val"), exif_orientation=rule, **options,
        )  # fmt: skip
        loaders = [
            module.train_dataloader(),
            module.val_dataloader(),
            module.test_dataloader(),
            module.predict_dataloader(),
        ]
        for loader in loaders:
            ((image, *_), *_) = next(iter(loader))
            assert image[0][bright].mean() > 0.9
            assert image.mean() < 0.7
    cifar = TorchvisionData(
        str(tmp_path), "cifar10", predict_path=str(tmp_path / "val"), exif_orientation="ignore", num_workers=0
    )
    assert next(iter(cifar.predict_dataloader()))[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("build", [ImageFolderData, partial(TorchvisionData, name="cifar10")])
def test_an_unknown_rule_of_orientation_is_named(build):
    with pytest.raises(QsdError, match="exif_orientation='sideways' is unknown; choose 'upright' or 'ignore'"):
        build("nowhere", exif_orientation="sideways")


@pytest.mark.timeout(20)
def test_what_a_user_asks_for_may_be_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QsdError, match="is no file: it is a named pipe"):
        find_images(str(tmp_path / "pipe"))


class Killed(torch.utils.data.Dataset):
    def __getitem__(self, index):
        os.kill(os.getpid(), 9)

    def __len__(self):
        return 4


def test_a_loading_process_that_is_killed_is_one_line(tree):
    loader = data(tree, num_workers=1).val_dataloader()
    loader.dataset.source.load = Killed().__getitem__
    with pytest.raises(QsdError, match=WORKER_ENDED[:40]):
        list(loader)
