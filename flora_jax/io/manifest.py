"""Manifests: a file of checksums beside a folder shows that it is whole and unaltered."""

from etils import epath

from flora_jax.errors import InputError
from flora_jax.io.files import num_bytes, read_json, sha256, write_json


def write_manifest(folder: epath.Path, manifest: epath.Path) -> None:
    """Writes the path, size in bytes and sha256 of every file under `folder` to a JSON file."""
    write_json(manifest, {name: _fingerprint(path) for name, path in _files(folder).items()})


def verify(folder: epath.Path, manifest: epath.Path) -> None:
    """Returns when the files under `folder` are those of its manifest, bit for bit.

    Only files found in the folder are opened, whatever paths a manifest names.

    Raises:
      InputError: they are not; says what is wrong.
    """
    if not manifest.exists():
        raise InputError(f"{manifest} is missing, so writing was not finished")
    recorded, files = read_json(manifest), _files(folder)
    if not recorded or not isinstance(recorded, dict):
        raise InputError(f"{manifest} is not a manifest")
    if missing := sorted(recorded.keys() - files.keys()):
        raise InputError(f"{', '.join(missing)} missing from {folder}")
    if unknown := sorted(files.keys() - recorded.keys()):
        raise InputError(f"{', '.join(unknown)} in {folder}, but not in {manifest}")
    for name, path in files.items():
        if (found := _fingerprint(path)) != recorded[name]:
            raise InputError(f"{path} is altered: {found} instead of {recorded[name]}")


def _fingerprint(path: epath.Path) -> dict:
    return {"bytes": num_bytes(path), "sha256": sha256(path)}


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """All files by their paths below the folder; on gs://, epath's glob and walk do not serve."""
    files: dict[str, epath.Path] = {}
    for path in folder.iterdir():
        if path.is_dir():
            files |= {f"{path.name}/{name}": file for name, file in _files(path).items()}
        else:
            files[path.name] = path
    return files
