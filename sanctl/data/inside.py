"""Which files an index may name: those in its own folder, unless the user says otherwise.

An index or a text file that somebody hands over lists paths. One that is absolute, or that climbs
out by `..`, could name any file of the reader's. Links are followed wherever they lead: they are
made on the reader's machine, not by what an index says.
"""

import os
from pathlib import Path

from sanctl.data.index import ImageIndex
from sanctl.errors import UserError


def first_outside(index: ImageIndex, *folders: Path) -> str | None:
    """Return the first path of an index that leads out of all these folders, or None."""
    homes = tuple(
        f"{os.path.normpath(home).rstrip('/')}/"
        for folder in folders
        for home in (folder.absolute(), folder.resolve())
    )
    start = index.root.absolute()
    # Then a relative path without `..` cannot lead out.
    safe = f"{os.path.normpath(start).rstrip('/')}/".startswith(homes)
    for name, _ in index.samples:
        if safe and not name.startswith("/") and ".." not in name:
            continue
        if not os.path.normpath(start / name).startswith(homes):
            return name
    return None


def require_inside(index: ImageIndex, file: Path, mend: str) -> ImageIndex:
    """Return the index if each of its images lies in the folder that it belongs to.

    That is the folder of the file; for a file of old, whose relative paths start from the current
    folder, the current one as well.

    Args:
        index: As read from the file.
        file: The index, or the text file.
        mend: What allows other images, as `--allow-outside`.

    Raises:
        UserError: An image lies outside; names the first.
    """
    name = first_outside(index, file.parent, index.root)
    if name is None:
        return index
    raise UserError(
        f"{file}: lists an image outside its folder: {name[:200]!r}; if you trust the file, "
        f"allow it with {mend}"
    )
