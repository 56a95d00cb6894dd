"""Repositories of the Hugging Face hub as folders: `hf:owner/name`, or with `@revision` behind."""

import contextlib
import functools
import logging
import os
import re
import types
from collections.abc import Iterator

from etils import epath

from flora_jax.errors import InputError, MissingFileError, MissingPackageError, StorageError
from flora_jax.io.paths import user_path
from flora_jax.weights.folder import SPEC_FILE, WEIGHTS_FILE

log = logging.getLogger(__name__)

PREFIX = "hf:"
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# The files that a network is read from; others stay where they are.
_DESCRIPTIONS = (
    *(SPEC_FILE, "config.json", "preprocessor_config.json", "processor_config.json"),
    *("preprocessing.json", "classes.json"),
)
_SAFETENSORS = (WEIGHTS_FILE, "model-*.safetensors", "model.safetensors.index.json")
_EXPORTED = ("pytorch", "timm")  # folders of an export that hold weights
_PYTORCH = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_LOGIN = "hf auth login, or the variable HF_TOKEN"


def is_repository(path: epath.PathLike) -> bool:
    """Whether this names a repository of the hub, and no file or folder."""
    return os.fspath(path).startswith(PREFIX)


def repository_name(path: epath.PathLike) -> str:
    """The owner/name of `hf:owner/name@revision`."""
    return os.fspath(path).removeprefix(PREFIX).partition("@")[0]


def local_folder(path: epath.PathLike) -> epath.Path:
    """A path as a user gives it; for `hf:owner/name`, the folder that it was downloaded to.

    Of a repository only its descriptions and its safetensors are downloaded, or its PyTorch files
    where there are no safetensors, once a process; the commit goes into the log. Of an export of
    ours it is the folder inside that holds weights. Without network the cache of an earlier
    download answers.

    Raises:
      MissingPackageError: a repository, and huggingface_hub is not installed.
      InputError: no name of a repository, or access to it is refused.
      MissingFileError: no such repository or revision.
      StorageError: it could not be downloaded, and is not in the cache.
    """
    if not is_repository(path):
        return user_path(path)
    match = _REPOSITORY.fullmatch(os.fspath(path).removeprefix(PREFIX))
    if match is None:
        raise InputError(
            f"{path} names no repository; expected hf:owner/name or hf:owner/name@revision, such "
            f"as hf:facebook/dinov2-base"
        )
    return _downloaded(match["name"], match["revision"])


def uploaded(folder: epath.Path, name: str) -> str:
    """Uploads a folder to the repository owner/name of the hub; a new one is private.

    Returns:
      The address of the repository.

    Raises:
      MissingPackageError: huggingface_hub is not installed.
      InputError: no name of a repository, no token, or one that may not write there.
      StorageError: the hub cannot be reached; says why.
    """
    name = name.removeprefix(PREFIX)
    match = _REPOSITORY.fullmatch(name)
    if match is None or match["revision"]:
        raise InputError(f"{name!r} names no repository; expected owner/name, such as me/small-vit")
    hub = _package("an upload")
    if hub.get_token() is None:
        raise InputError(f"no token to write {name} with: {_LOGIN}")
    with _errors_named(hub, name, "uploaded to"):
        api = hub.HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=os.fspath(folder), commit_message="Upload by flora_jax"
        )
    return str(url)


@functools.cache
def _downloaded(name: str, revision: str | None) -> epath.Path:
    asked = PREFIX + name + (f"@{revision}" if revision else "")
    files = (*_DESCRIPTIONS, *_SAFETENSORS)
    exported = (f"{inside}/{file}" for inside in _EXPORTED for file in files)
    folder = _snapshot(asked, name, revision, (*files, *exported))
    for place in (folder / inside for inside in _EXPORTED):
        if (place / WEIGHTS_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
            log.info("%s is commit %s, in %s", asked, folder.name, place)
            return place
    if not any((folder / file).exists() for file in (_SAFETENSORS[0], _SAFETENSORS[-1])):
        folder = _snapshot(asked, name, revision, (*_DESCRIPTIONS, *_PYTORCH))
    log.info("%s is commit %s, in %s", asked, folder.name, folder)
    return folder


def _snapshot(asked: str, name: str, revision: str | None, files: tuple[str, ...]) -> epath.Path:
    hub = _package(asked)
    try:
        with _errors_named(hub, asked, "downloaded from"):
            return epath.Path(
                hub.snapshot_download(name, revision=revision, allow_patterns=[*files])
            )
    except StorageError:
        # Another program may have fetched the weights, perhaps without all that is wanted here.
        for file in (_SAFETENSORS[0], _SAFETENSORS[-1], _PYTORCH[0], _PYTORCH[-1]):
            cached = hub.try_to_load_from_cache(name, file, revision=revision)
            if isinstance(cached, str):
                return epath.Path(cached).parent
        raise


@contextlib.contextmanager
def _errors_named(hub: types.ModuleType, name: str, done: str) -> Iterator[None]:
    """Makes of the hub's errors, and those of the network, what a user can mend."""
    try:
        yield
    except hub.errors.HFValidationError as error:
        raise InputError(f"{name!r} names no repository: {_first_line(error)}") from error
    except hub.errors.RevisionNotFoundError as error:
        raise MissingFileError(f"{name}: the repository has no such revision") from error
    except (TypeError, AttributeError, LookupError):  # a fault of ours
        raise
    except Exception as error:
        is_not_cached = isinstance(error, hub.errors.LocalEntryNotFoundError)
        cause = (error.__cause__ or error) if is_not_cached else error
        reason = f"({_first_line(cause)})"
        status = getattr(getattr(cause, "response", None), "status_code", None)
        is_gated = isinstance(error, hub.errors.GatedRepoError)
        if isinstance(error, hub.errors.RepositoryNotFoundError) and not is_gated:
            raise MissingFileError(
                f"{name}: no such repository; a private one needs a login: {_LOGIN}"
            ) from error
        if is_gated or status in (401, 403):
            raise InputError(
                f"{name}: access is refused; accept the conditions on its page, and log in as "
                f"someone who has access: {_LOGIN} {reason}"
            ) from error
        endpoint, cache = hub.constants.ENDPOINT, hub.constants.HF_HUB_CACHE
        proxies = [key for key in os.environ if key.lower() in _PROXIES]  # they may hold passwords
        by = f", by the proxy of {', '.join(proxies)}" if proxies else ""
        raise StorageError(
            f"{name} could not be {done} {endpoint}{by} {reason}; downloads are in {cache}"
        ) from error


def _package(asked: str) -> types.ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingPackageError(
            f"{asked} needs huggingface_hub: pip install 'flora_jax[hub]'"
        ) from error
    return huggingface_hub


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
