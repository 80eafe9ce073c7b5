"""Files that are either whole or not there: what is written replaces its predecessor only when it is complete."""

import io
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path, suffix: str) -> Iterator[io.BufferedIOBase]:
    """
    Open a file that takes its place when the block ends without an error.

    Until then the previous file stands, also if the process is killed; what a killed process had written stays beside
    it as a hidden file that ends in ``.part``. Missing folders are made, and a path that is a folder gets "_2"
    appended, as Stable-Baselines3 does.

    :param path: Where the file goes
    :param suffix: Added to a path that has none, without the dot
    :return: The open file
    :raises OSError: if the file cannot be written

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp(), "numbers")
    >>> with whole_file(target, "bin") as file:
    ...     _ = file.write(b"123")
    >>> Path(f"{target}.bin").read_bytes()
    b'123'
    """
    target = _with_suffix(Path(path), suffix)
    if target.is_dir():
        warnings.warn(f"{target} is a folder: saving to {path}_2 instead.", stacklevel=3)
        target = _with_suffix(Path(f"{path}_2"), suffix)
    # A link stays a link: what it points to is replaced
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _with_suffix(path: Path, suffix: str) -> Path:
    return path if path.suffix else Path(f"{path}.{suffix}")


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """
    Write several files of a folder that take their places together, when the block ends without an error.

    They are written to a hidden folder within it first. Where the block fails, what was there before stays as it was; a
    folder that did not exist is not left behind.

    :param folder: Folder the files go to; made if needed
    :return: Where to write them
    :raises OSError: if they cannot be written
    """
    target = Path(folder)
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    staging = target / f".{uuid.uuid4().hex}.part"
    try:
        staging.mkdir()
        yield staging
        files = sorted(staging.iterdir())
        for file in files:
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        for file in files:
            os.replace(file, target / file.name)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if made:
            target.rmdir()
        raise
    staging.rmdir()
