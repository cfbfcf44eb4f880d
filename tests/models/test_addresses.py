"""Weights by address: a hub and a web server that the test serves on the loopback address."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import qsd
from qsd.commands import import_checkpoint
from qsd.errors import QsdError
from qsd.models.fetching import fetch_url, local_file, parse_hub_address
from qsd.models.pretrained import load_pretrained
from tests.helpers.networks import SMALL

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: each file with its tag and the commit."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - by address, filled by the tests
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if "/api/" not in self.path:
            self.asked.append(self.path)
        self.wfile.write(self.answer())

    def answer(self):
        content = self.files.get(self.path.replace(f"/resolve/{COMMIT}/", "/resolve/main/"))
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"") + 5 * self.path.startswith("/short")))
        self.end_headers()
        return content or b""

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("QSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
    yield address
    server.shutdown()
    server.server_close()


def small(**arguments):
    sizes = {key: value for key, value in SMALL.items() if key != "num_classes"}
    return timm.create_model("qsd_tiny", **{**sizes, "num_classes": 5, **arguments})


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_a_published_checkpoint_is_imported_from_the_hub(hub, reference_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": reference_state}, "reference.pth")
    Hub.files["/Xuerui123/QSD_Transformer/resolve/main/15m/V_1x4.pth"] = (tmp_path / "reference.pth").read_bytes()
    arguments = ["hf-hub:Xuerui123/QSD_Transformer/15m/V_1x4.pth", "imported.ckpt", "--num-heads=4"]
    assert import_checkpoint.main(arguments) == 0
    assert import_checkpoint.main(["reference.pth", "local.ckpt", "--num-heads=4"]) == 0
    imported, local = (torch.load(name, weights_only=True) for name in ("imported.ckpt", "local.ckpt"))
    assert imported["hyper_parameters"]["model_args"] == {**local["hyper_parameters"]["model_args"], "time_steps": 4}
    assert all(torch.equal(imported["state_dict"][name], tensor) for name, tensor in local["state_dict"].items())
    assert import_checkpoint.main([*arguments, "--force"]) == 0
    assert len(Hub.asked) == 1  # fetched once


def test_a_file_of_the_hub_that_is_missing_or_runs_code_is_one_line(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bomb.pth")
    Hub.files["/a/b/resolve/main/bomb.pth"] = (tmp_path / "bomb.pth").read_bytes()
    for source, message in (
        ("hf-hub:a/b/none.pth", "hf-hub:a/b/none.pth does not exist"),
        ("hf-hub:a/b/bomb.pth", "wants to run code"),
        ("hf-hub:a", "is no address on the hub"),
        ("hf-hub:a/b", "names no file"),
    ):
        assert import_checkpoint.main([source, "out.ckpt"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_a_repository_of_the_hub_gives_network_and_weights(hub, tmp_path):
    source = small().eval()
    qsd.save_pretrained(source, tmp_path / "folder")
    for path in (tmp_path / "folder").iterdir():
        Hub.files[f"/me/mine/resolve/main/{path.name}"] = path.read_bytes()
    model = timm.create_model("hf-hub:me/mine", pretrained=True).eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(image), source(image))
    assert model.registered["arguments"].keys() <= {*SMALL, "in_chans"}


def test_weights_of_a_web_server_are_fetched_once_and_completely(hub, tmp_path):
    source = small()
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    Hub.files["/files/a.safetensors"] = (tmp_path / "a.safetensors").read_bytes()
    overlay = {"url": f"{hub}/files/a.safetensors"}
    for _ in range(2):
        assert same(small(pretrained=True, pretrained_cfg_overlay=overlay), source)
    assert Hub.asked == ["/files/a.safetensors"]
    model = small()
    qsd.load_weights(model, f"{hub}/files/a.safetensors")
    assert same(model, source)
    Hub.files["/short/a.safetensors"] = b"12345"
    with pytest.raises(QsdError, match="cannot be fetched"):
        fetch_url(f"{hub}/short/a.safetensors")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    with pytest.raises(QsdError, match="is no https address"):
        fetch_url("http://example.org/a.safetensors")
    assert local_file("https:/no/address") == type(tmp_path)("https:/no/address")


def test_addresses_of_the_hub_are_taken_apart():
    assert parse_hub_address("hf-hub:a/b-1/c/d.pth@v1") == ("a/b-1", "c/d.pth", "v1")
    assert parse_hub_address("a/b") == ("a/b", "", None)
    for wrong in ("hf-hub:a/b/../c", "hf-hub:", "a", "hf-hub:a/b?c"):
        with pytest.raises(QsdError, match="no address on the hub"):
            parse_hub_address(wrong)


def test_a_configuration_in_a_folder_cannot_name_another_place(tmp_path):
    folder = tmp_path / "folder"
    qsd.save_pretrained(small(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"url": "https://example.org/a.pth", "hf_hub_id": "a/b"}
    (folder / "config.json").write_text(json.dumps(config))
    assert timm.create_model(f"local-dir:{folder}", pretrained=True) is not None  # the folder's own file
    assert load_pretrained.__module__ == "qsd.models.pretrained"
