"""From an index to a pack: every image read, shrunk where it is large, and put into one file."""

import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sanctl.data.atomic import disk_failure
from sanctl.data.decode import ImageError
from sanctl.data.index import ImageIndex
from sanctl.data.packed import write_packed
from sanctl.data.scan import Progress
from sanctl.data.shrink import Shrunk, shrink_file
from sanctl.data.workers import Chunks, Workers, worker_count
from sanctl.errors import UserError

_BATCH = 32


class PackResult(NamedTuple):
    """What went into a pack."""

    images: int
    shrunk: int
    bytes: int


def pack_index(
    index: ImageIndex,
    root: Path,
    out: Path,
    short_side: int = 256,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Write the images of an index into one pack, in the order of the index.

    Memory does not grow with the images: their bytes go to an unnamed temporary file in the
    folder of the pack, and from there into the pack, which takes its place when it is complete.

    Args:
        index: The images.
        root: The folder that the paths in the index start from.
        out: Where to write the pack.
        short_side: Larger images are shrunk until their short side has this many px.
        workers: Processes that read and shrink; 0 does it in this process. None takes one for
            each core, and this process for a few hundred images.
        progress: Called with the number of images packed since the last call.

    Raises:
        UserError: The index is empty, or an image is damaged (an ImageError that names it).
        SanctlError: The pack cannot be written, or a worker process died.
    """
    if not len(index):
        raise UserError(f"no images to pack into {out}")
    count = worker_count(workers, len(index))
    shrinker, chunks = _Shrinker(index, root, short_side), Chunks(len(index), _BATCH)
    sizes = array("q")
    shrunk = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Without a name it vanishes with the process, however that ends.
        with tempfile.TemporaryFile(dir=out.parent) as blob:
            # No variable holds the workers: the traceback of an error would keep them alive.
            for images in Workers(shrinker, chunks, count):
                if isinstance(images, ImageError):
                    raise images
                for image in images:
                    blob.write(image.data)
                    sizes.append(len(image.data))
                    shrunk += image.is_smaller
                if progress is not None:
                    progress(len(images))
            blob.flush()
            write_packed(out, index, blob, sizes)
    except OSError as error:
        raise disk_failure(out, error) from error
    return PackResult(len(sizes), shrunk, sum(sizes))


@dataclass(frozen=True)
class _Shrinker:
    """What a worker process does: read and shrink the images at some positions of an index."""

    index: ImageIndex
    root: Path
    short_side: int

    def __call__(self, positions: list[int]) -> list[Shrunk] | ImageError:
        """Return the images, or the error that names the damaged one."""
        paths = [self.root / self.index.samples[position][0] for position in positions]
        try:
            return [shrink_file(path, self.short_side) for path in paths]
        except ImageError as error:
            return error
