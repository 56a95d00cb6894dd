"""Manifests: a file of checksums beside a folder shows that it is whole and unaltered."""

from etils import epath

from flora_jax.io.files import dump_json, read_json, sha256


def write_manifest(folder: epath.Path, manifest: epath.Path) -> None:
    """Writes the path, size in bytes and sha256 of every file under `folder` to a JSON file."""
    dump_json(manifest, {name: _fingerprint(path) for name, path in _files(folder).items()})


def verify(folder: epath.Path, manifest: epath.Path) -> None:
    """Returns when the files under `folder` are those of its manifest, bit for bit.

    Only files found in the folder are opened, whatever paths a manifest names.

    Raises:
      ValueError: they are not; says what is wrong.
    """
    if not manifest.exists():
        raise ValueError(f"{manifest} is missing, so writing was not finished")
    recorded, files = read_json(manifest), _files(folder)
    if not recorded or not isinstance(recorded, dict):
        raise ValueError(f"{manifest} is not a manifest")
    if missing := sorted(recorded.keys() - files.keys()):
        raise ValueError(f"{', '.join(missing)} missing from {folder}")
    if unknown := sorted(files.keys() - recorded.keys()):
        raise ValueError(f"{', '.join(unknown)} in {folder}, but not in {manifest}")
    for name, path in files.items():
        if (found := _fingerprint(path)) != recorded[name]:
            raise ValueError(f"{path} is altered: {found} instead of {recorded[name]}")


def _fingerprint(path: epath.Path) -> dict:
    return {"bytes": path.stat().length, "sha256": sha256(path)}


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """By their paths below the folder. On gs://, epath cannot glob, and walks by other names."""
    files = {}
    for path in folder.iterdir():
        if path.is_dir():
            files |= {f"{path.name}/{name}": file for name, file in _files(path).items()}
        else:
            files[path.name] = path
    return files
