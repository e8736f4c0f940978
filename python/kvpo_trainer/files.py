"""Files that are kept: UTF-8 whatever the locale, and whole or not there at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file; where that fails, what was there before is untouched.

    Raises:
        OSError: no space, no permission.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
