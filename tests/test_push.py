"""What a run has exported, on the hub: which folder goes, and what is said where it cannot."""

import sys
import types

import pytest
from etils import epath

from flora_jax.commands.push import push
from flora_jax.errors import InputError, MissingFileError, MissingPackageError, StorageError

hub = pytest.importorskip("huggingface_hub", reason="uploads with huggingface_hub")


class FakeApi:
    """Records calls; `error` is raised by an upload."""

    def __init__(self):
        self.calls, self.error = [], None

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", repo_id, folder_path))


@pytest.fixture
def api(monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    return api


@pytest.fixture
def run(tmp_path):
    for name in ("README.md", "preprocessing.json", "model.onnx"):
        (tmp_path / "run/export/subnet").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/export/subnet" / name).touch()
    return tmp_path / "run"


@pytest.mark.parametrize("inside", ["", "export/subnet"])
def test_the_one_export_goes_to_a_repository_that_is_private_at_first(run, inside, api, capsys):
    push("hf:me/small-vit", run / inside)
    folder = str(run / "export/subnet")
    options = {"private": True, "exist_ok": True}
    assert api.calls == [("create", "me/small-vit", options), ("upload", "me/small-vit", folder)]
    assert capsys.readouterr().out == f"{folder} is at https://hub/me/small-vit\n"


def test_folders_without_one_export(run, api):
    other = run / "export/subnet_0.7"
    other.mkdir()
    (other / "README.md").touch()  # no export without its preprocessing
    push("me/vit", run)
    (other / "preprocessing.json").touch()
    for folder in (run, run / "export", None, epath.Path("gs://bucket/run")):
        with pytest.raises((InputError, MissingFileError)):
            push("me/vit", folder)
    assert len(api.calls) == 2


def test_without_a_name_a_token_or_the_package(run, api, monkeypatch):
    for name in ("vit", "me/my vit", "me/vit@v2"):
        with pytest.raises(InputError, match=r"names no repository; expected owner/name, such as"):
            push(name, run)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="no token to write me/vit with: hf auth login, or the"):
        push("me/vit", run)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'flora_jax\[hub\]'"):
        push("me/vit", run)
    assert not api.calls


def test_what_the_hub_answers(run, api):
    refused = RuntimeError("403 Forbidden: not yours\nRequest ID: 7")
    refused.response = types.SimpleNamespace(status_code=403)
    for answer, kind, message in (
        (refused, InputError, r"token must be one of me.*\(403 Forbidden: not yours\)"),
        (ConnectionError("no route to host"), StorageError, r"uploaded to .* \(no route to host\)"),
        (hub.errors.HFValidationError("Cannot have --"), InputError, "names no repository: Cannot"),
        (KeyError("a fault of ours keeps its traceback"), KeyError, "a fault of ours"),
    ):
        api.error = answer
        with pytest.raises(kind, match=message):
            push("me/vit", run)
