"""``qsd results``: tables from the runs' own files."""

import csv
import json
import math
from pathlib import Path

import pytest

from qsd.commands import results
from qsd.runs.record import RunRecord, hardware, versions
from tests.helpers import ROOT

RECORD = ROOT / "docs/results/digits/conversion.json"
FACTS = {
    "model": "qsd_tiny", "model_args": {"time_steps": 4, "weight_bits": 4}, "parameters": 583_000, "data": "DigitsData",
    "batch_size": 64, "seed": 0, "hardware": "a processor, 2 threads", "versions": {"qsd": "1", "torch": "2"},
    "checkpoint": None, "best": "checkpoints/best.ckpt",
}  # fmt: skip


def write_run(folder, stage, measurements=(), **facts):
    folder.mkdir(parents=True)
    if stage is not None:
        defaults = {"images": {}, "epochs": 0, "seconds": 60.0, "metrics": {}}
        record = RunRecord(stage=stage, **{**FACTS, **defaults, **facts})
        (folder / "run.json").write_text(record.model_dump_json())
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in measurements for key in row}) or ["step"])
        writer.writeheader()
        writer.writerows(measurements)
    (folder / "config.yaml").write_text("model: {}\n")
    return str(folder)


def test_a_resumed_training_and_its_test_become_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = write_run(tmp_path / "runs/0", None, [{"step": 1, "train/loss": 2.0}])  # interrupted: no record
    last = write_run(
        tmp_path / "runs/1", "fit", [{"step": 2, "val/accuracy": 0.97}],
        epochs=25, seconds=5400.0, metrics={"val/accuracy": 0.97},
    )  # fmt: skip
    test = write_run(tmp_path / "runs/2", "test", images={"test": 400}, metrics={"test/accuracy": 0.985})
    arguments = [first, last, test, "--keep", "digits", "--title", "digits, 4 bits"]
    assert results.main(arguments) == 0
    kept = tmp_path / "docs/results/digits"
    assert {path.name for path in kept.iterdir()} == {
        "run.json",
        "test.json",
        "metrics.csv",
        "config.yaml",
        "entry.json",
    }
    with (kept / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
    deviation = 100 * math.sqrt(0.985 * 0.015 / 400)
    row = capsys.readouterr().out.splitlines()[-2]
    for cell in (
        "digits, 4 bits", "`qsd_tiny`", f"98.50 ± {deviation:.2f}", "97.00", "0.58 M", "25", "1.50",
        "a processor, 2 threads", "qsd 1, torch 2", "[log](digits/metrics.csv)",
    ):  # fmt: skip
        assert f" {cell} " in row or cell in row

    page = tmp_path / "docs/results.md"
    page.write_text("before\n<!-- results results -->\nold\n<!-- end -->\nafter\n")
    assert results.main(["--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- results results -->\n| recipe |")
    assert "[log](results/digits/metrics.csv)" in text
    assert "old" not in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert results.main(["--page", str(page)]) == 0
    assert page.read_text() == text


def test_a_float_twin_has_neither_time_steps_nor_bits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs/0", "fit", model="qsd_tiny_ann")  # by the recipe of the spiking network
    assert results.main([run, "--keep", "twin"]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].split("|")]
    assert cells[2:5] == ["`qsd_tiny_ann`", "–", "32"]


def test_a_later_conversion_takes_the_place_of_the_trainings(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = Path(write_run(tmp_path / "runs/0", "fit", epochs=1))
    for folder, record in ((training, b"{}"), (tmp_path / "converted", RECORD.read_bytes())):
        folder.mkdir(exist_ok=True)
        (folder / "conversion.json").write_bytes(record)
        (folder / "report.html").write_text(folder.name)
    assert results.main([str(training), "converted", "--keep", "digits"]) == 0
    kept = tmp_path / "docs/results/digits"
    assert (kept / "conversion.json").read_bytes() == RECORD.read_bytes()
    assert (kept / "report.html").read_text() == "converted"
    packed = json.loads(RECORD.read_bytes())["sizes"]
    assert f" {(packed['file_bytes'] or packed['packed_bytes']) / 1e3:,.0f} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"stage": "test"}, "no run is a finished training"),
        ({"stage": "fit", "version": 2}, "has version 2 of the format"),
        ({"stage": "fit", "epochs": -1}, "does not fit at epochs"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, facts, message):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", "fit")
    content = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**content, **facts}))
    assert results.main([run, "--keep", "x"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "docs/results/x/run.json").exists()


def test_runs_without_a_name_a_page_without_a_place(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", "fit")
    assert results.main([run]) == 2
    assert results.main([run, "--keep", "x"]) == 0
    (tmp_path / "page.md").write_text("nothing")
    assert results.main(["--page", "page.md"]) == 2
    assert "has no place for the table results" in capsys.readouterr().err
    (tmp_path / "docs/results/x/entry.json").write_text("[" * 100_000)
    assert results.main([]) == 2
    assert "entry.json is damaged" in capsys.readouterr().err


def test_hardware_and_versions_are_told():
    assert "thread" in hardware() or "NVIDIA" in hardware()
    assert {"qsd", "python", "torch", "timm"} <= versions().keys()
