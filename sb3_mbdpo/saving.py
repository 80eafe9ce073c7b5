"""Files that are either whole or not there: what is written replaces its predecessor only when it is complete."""

import io
import os
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
