"""Repositories of the Hugging Face hub as folders: `hf:owner/name` or `hf:owner/name@revision`.

Folders go the other way, too: `uploaded`.
"""

import functools
import logging
import os
import re

from etils import epath

from flora_jax.errors import InputError, MissingFileError, MissingPackageError, StorageError
from flora_jax.io.paths import user_path
from flora_jax.weights.folder import SPEC_FILE, WEIGHTS_FILE

log = logging.getLogger(__name__)

PREFIX = "hf:"
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What it takes to read a network, or to say why it cannot be read; other files stay where they are.
_DESCRIPTIONS = (
    *(SPEC_FILE, "config.json", "preprocessor_config.json", "processor_config.json"),
    *("preprocessing.json", "classes.json", "adapter_config.json", "model_index.json"),
)
_SAFETENSORS = (WEIGHTS_FILE, "model-*.safetensors", "model.safetensors.index.json")
_PYTORCH = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "requests")


def is_repository(path: epath.PathLike) -> bool:
    """Whether this names a repository of the hub, and no file or folder."""
    return os.fspath(path).startswith(PREFIX)


def repository_name(path: epath.PathLike) -> str:
    """The owner/name of `hf:owner/name@revision`."""
    return os.fspath(path).removeprefix(PREFIX).partition("@")[0]


def local_folder(path: epath.PathLike) -> epath.Path:
    """A path as a user gives it; for `hf:owner/name`, the folder that it was downloaded to.

    Of a repository only its descriptions and its safetensors are downloaded, or its PyTorch files
    where there are no safetensors, once a process; the commit goes into the log. Without network
    the cache of an earlier download answers.

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
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingPackageError(
            "an upload needs huggingface_hub: pip install 'flora_jax[hub]'"
        ) from error
    if huggingface_hub.get_token() is None:
        raise InputError(f"no token to write {name} with: hf auth login, or the variable HF_TOKEN")
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=os.fspath(folder), commit_message="Upload by flora_jax"
        )
    except errors.HFValidationError as error:
        raise InputError(f"{name!r} names no repository: {_first_line(error)}") from error
    except Exception as error:
        if _status(error) in (401, 403):
            raise InputError(
                f"{name}: the hub refuses to write; the token must be one of {name.split('/')[0]} "
                f"that may: hf auth login, or the variable HF_TOKEN ({_first_line(error)})"
            ) from error
        if not _is_of_the_network(error):
            raise
        raise StorageError(
            f"{name} could not be uploaded to {huggingface_hub.constants.ENDPOINT} "
            f"({_first_line(error)}); the same command tries again"
        ) from error
    return str(url)


@functools.cache
def _downloaded(name: str, revision: str | None) -> epath.Path:
    asked = PREFIX + name + (f"@{revision}" if revision else "")
    folder = _snapshot(asked, name, revision, (*_DESCRIPTIONS, *_SAFETENSORS))
    if not any((folder / file).exists() for file in (_SAFETENSORS[0], _SAFETENSORS[-1])):
        folder = _snapshot(asked, name, revision, (*_DESCRIPTIONS, *_PYTORCH))
    log.info("%s is commit %s, in %s", asked, folder.name, folder)
    return folder


def _snapshot(asked: str, name: str, revision: str | None, files: tuple[str, ...]) -> epath.Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingPackageError(
            f"{asked} needs huggingface_hub: pip install 'flora_jax[hub]'"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files)
        )
    except errors.GatedRepoError as error:
        raise _refused(asked, name) from error
    except errors.RepositoryNotFoundError as error:
        raise MissingFileError(
            f"{asked}: no repository {name} on the hub; a private one needs a login: hf auth "
            f"login, or the variable HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingFileError(f"{asked}: {name} has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise InputError(f"{asked} names no repository: {_first_line(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        if _status(error.__cause__) in (401, 403):
            raise _refused(asked, name) from error
        return _of_another_download(asked, name, revision, error)
    except Exception as error:
        if _status(error) in (401, 403):
            raise _refused(asked, name) from error
        if _is_of_the_network(error):
            raise _unreachable(asked, error) from error
        raise
    return epath.Path(folder)


def _of_another_download(
    asked: str, name: str, revision: str | None, error: Exception
) -> epath.Path:
    """The cached folder whose weights another program fetched, perhaps without all that we want."""
    import huggingface_hub

    for file in (_SAFETENSORS[0], _SAFETENSORS[-1], _PYTORCH[0], _PYTORCH[-1]):
        cached = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            return epath.Path(cached).parent
    raise _unreachable(asked, error.__cause__ or error) from error


def _unreachable(asked: str, error: BaseException) -> StorageError:
    from huggingface_hub import constants

    return StorageError(
        f"{asked} could not be downloaded from {constants.ENDPOINT} ({_first_line(error)}), and "
        f"the cache {constants.HF_HUB_CACHE} does not hold it"
    )


def _refused(asked: str, name: str) -> InputError:
    return InputError(
        f"{asked}: access is refused; accept its conditions at https://huggingface.co/{name}, and "
        f"log in: hf auth login, or the variable HF_TOKEN"
    )


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _HTTP_CLIENTS


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of the hub carries."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
