"""Weights by their name on the hub: a server of ours in its place, and its cache."""

import dataclasses
import http.server
import json
import logging
import sys
import threading

import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import InputError, MissingFileError, MissingPackageError, StorageError
from flora_jax.weights import hub, layouts
from flora_jax.weights.export import pytorch
from flora_jax.weights.export.timm import export_timm_folder
from flora_jax.weights.metadata.preprocessing import save_preprocessing
from tests.helpers.weights import VIT, assert_same, random_model, written
from tests.pretrained.test_beside import HUGGING_FACE_VIT

COMMIT = "5f" * 20
ERRORS = {
    "owner/missing": (401, "RepoNotFound"),
    "owner/gated": (403, "GatedRepo"),
    "owner/broken": (500, ""),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The three requests of a download: the commit, its files, each file."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        for name, (status, code) in ERRORS.items():
            if f"/{name}/" in path:
                return self.answer(status, b"", {"X-Error-Code": code})
        if path.endswith("/revision/v9"):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if "/revision/" in path:
            return self.answer(200, json.dumps({"id": "owner/vit", "sha": COMMIT}).encode())
        paths = [path for path in self.server.folder.rglob("*") if path.is_file()]
        files = {str(p.relative_to(self.server.folder)): p.read_bytes() for p in paths}
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{name}-1"}
                for name, content in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in files:  # the package asks for other things too
            return self.answer(404, b"")
        if self.command == "GET":
            self.server.fetched.append(name)
        return self.answer(200, files[name], {"ETag": f'"{name}-1"', "X-Repo-Commit": COMMIT})

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def vit():
    return random_model(VIT)


@pytest.fixture
def server(vit, tmp_path, monkeypatch):
    """A hub that serves `server.folder`; `server.fetched` lists what was downloaded from it."""
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="downloads from the hub need huggingface_hub"
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.fetched = tmp_path / "repository", []
    server.folder.mkdir()
    save_file(written(vit, layouts.hugging_face_vit), server.folder / "model.safetensors")
    (server.folder / "config.json").write_text(json.dumps(HUGGING_FACE_VIT))
    for other in ("README.md", "pytorch_model.bin", "open_clip_model.safetensors"):
        (server.folder / other).write_bytes(b"another")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._downloaded.cache_clear()
    yield server
    hub._downloaded.cache_clear()
    server.shutdown()
    server.server_close()


def test_a_repository_is_read_like_its_folder(server, vit, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "flora_jax"):
        model = flora.from_pretrained("hf:owner/vit", VIT)
    assert_same(model, vit)
    assert f"hf:owner/vit is commit {COMMIT}, in " in caplog.text
    spec = flora.read_spec("hf:owner/vit")
    assert dataclasses.replace(spec, num_registers=0) == dataclasses.replace(VIT, num_classes=0)
    assert sorted(server.fetched) == ["config.json", "model.safetensors"]

    hub._downloaded.cache_clear()  # another process, without network
    server.shutdown()
    server.server_close()
    assert_same(flora.from_pretrained("hf:owner/vit@main", VIT), vit)
    with pytest.raises(
        StorageError, match=r"^hf:owner/other could not be .*downloads are in \S+cache"
    ):
        flora.from_pretrained("hf:owner/other", VIT)
    (next(hub.local_folder("hf:owner/vit").parents[1].glob("trees/*"))).write_text("{}")
    assert hub.local_folder(f"hf:owner/vit@{COMMIT}").name == COMMIT


@pytest.mark.parametrize("kind", ["pytorch", "timm"])
def test_what_an_export_has_pushed_is_read_back(server, vit, kind, monkeypatch):
    """Its weights lie in a folder inside, beside files that nobody needs to read it."""
    for path in server.folder.iterdir():
        path.unlink()
    (server.folder / "model.onnx").write_bytes(b"large")
    if kind == "timm":
        (server.folder / kind).mkdir()
        export_timm_folder(vit, server.folder / kind)
    else:
        monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)
        flora.export_torch(vit, server.folder / kind)
    save_preprocessing(server.folder / kind, Preprocessing(VIT.image_size))
    assert_same(flora.from_pretrained("hf:owner/vit", flora.read_spec("hf:owner/vit")), vit)
    assert flora.read_preprocessing("hf:owner/vit") == Preprocessing(VIT.image_size)
    assert "model.onnx" not in server.fetched


def test_pytorch_files_where_there_are_no_others(server):
    (server.folder / "model.safetensors").unlink()
    (server.folder / "training_args.bin").touch()
    folder = hub.local_folder("hf:owner/vit")
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("hf:owner/missing", MissingFileError, "owner/missing: no such repository"),
        ("hf:owner/gated", InputError, "access is refused; .*, .*HF_TOKEN"),
        ("hf:owner/broken", StorageError, "could not be downloaded from http.*500"),
        ("hf:owner/vit@v9", MissingFileError, "repository has no such revision"),
        ("hf:owner/a--b", InputError, "names no repository"),
        ("hf:dinov2-base", InputError, "names no repository; expected hf:owner/name or"),
        ("hf:https://huggingface.co/a/b", InputError, "names no repository"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(server, path, error, message):
    with pytest.raises(error, match=message) as raised:
        flora.from_pretrained(path, VIT)
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [ImportError("no 'socksio'"), ValueError("no scheme\nmore")])
def test_what_a_proxy_does_is_one_line_that_names_the_variable(server, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"by the proxy of ALL_PROXY.* \(no .*\); downl"
    ) as raised:
        flora.read_spec("hf:owner/vit")
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_call_of_the_hub_is_our_fault(server, monkeypatch):
    def fails(*_, **__):
        raise TypeError("unexpected argument")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(TypeError, match=r"^unexpected argument$"):
        flora.read_spec("hf:owner/vit")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"hf:a/b needs .*'flora_jax\[hub\]'$"):
        flora.read_spec("hf:a/b")
