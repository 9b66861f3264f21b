"""The packs of older programs: a pickled list of `io.BytesIO`, read without running anything.

A pickle can call any function that it names. This reader knows three names, `io.BytesIO`,
`_codecs.encode` (by which old pickles write bytes) and `bytes` (by which they write none), and
stands for each with an object of its own that can do that one thing. Any other name ends the
reading. It bounds sizes as well: a pickle is never let to claim more bytes than its file has.
"""

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

from sanctl.errors import UserError

# The first of the five pickles in a file that torch wrote before it wrote zip archives.
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_IMAGE_KEYS = ("samples", "imgs", "images", "data")
_TARGET_KEYS = ("targets", "labels")


@dataclass(frozen=True)
class OldPack:
    """Encoded images with the class index of each, and the class names."""

    classes: list[str]
    images: list[bytes]
    targets: list[int]


def read_old_pack(path: Path) -> OldPack:
    """Read an old `*_imgs.pt`.

    It may be a torch zip archive, an older torch file or a plain pickle, of a dict with classes,
    class_to_idx and samples (pairs of io.BytesIO and class index, or io.BytesIO alone beside
    `targets`), or of the list of pairs alone; classes without names are called "0", "1", ....

    Raises:
        UserError: The file is none of these; nothing of it was executed.
    """
    try:
        with _open_pickle(path) as stream:
            content = _unpickle(stream)
    except _Refused as refusal:
        raise UserError(f"{path}: refused, and nothing executed: {refusal}") from None
    except Exception:  # whatever a hostile or damaged file provokes
        raise UserError(
            f"{path}: neither a pack of images nor an old one: damaged, or of another kind; "
            "make it again with `sanctl dataset pack`"
        ) from None
    return _sorted_out(content, path)


class _Refused(Exception):  # noqa: N818 - it is caught above and never seen
    """The pickle asks for something that a pack never needs."""


class _Bounded:
    """A stream that never allocates more for a read than it has left."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream = stream
        self.size = self._left = size

    def read(self, wanted: int) -> bytes:
        if not 0 <= wanted <= self._left:
            raise _Refused(f"it claims {wanted} more bytes than the file has")
        return self._taken(self._stream.read(wanted))

    def readline(self) -> bytes:
        return self._taken(self._stream.readline(self._left))

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


class _Image:
    """Stands for io.BytesIO and keeps its bytes."""

    __slots__ = ("data",)

    def __init__(self, data: bytes = b"") -> None:
        self.__setstate__((data,))

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or not state or not isinstance(state[0], bytes):
            raise _Refused("an io.BytesIO holds something else than bytes")
        self.data = state[0]


class _Encode:
    """Stands for `_codecs.encode`: Latin-1 alone, and no more in all than the file can hold."""

    __slots__ = ("_left",)

    def __init__(self, limit: int) -> None:
        self._left = limit

    def __call__(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise _Refused("it encodes something else than bytes")
        self._left -= len(text)
        if self._left < 0:
            raise _Refused("its images would be larger than the file")
        return text.encode("latin-1")

    def __setstate__(self, state: Any) -> NoReturn:
        raise _Refused("it changes a function")


class _NoBytes:
    """Stands for `bytes`: called without arguments it gives none."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""

    def __setstate__(self, state: Any) -> NoReturn:
        raise _Refused("it changes a function")


# The unpickler written in Python keeps its memo in a dict; that in C makes it a list, as long as
# the largest number that a pickle of ten bytes cares to write.
class _Unpickler(pickle._Unpickler):
    """Knows the three names, no more."""

    # A byte array is allocated before its bytes are read; old packs have none, nor sets.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in (pickle.BYTEARRAY8 + pickle.ADDITEMS + pickle.FROZENSET)
    }

    def __init__(self, stream: _Bounded) -> None:
        super().__init__(stream)
        encode, no_bytes = _Encode(stream.size), _NoBytes()
        self._known = {
            ("_io", "BytesIO"): _Image,
            ("io", "BytesIO"): _Image,
            ("_codecs", "encode"): encode,
            ("__builtin__", "bytes"): no_bytes,
            ("builtins", "bytes"): no_bytes,
        }

    def load_setitem(self) -> None:
        self._require_plain_keys(self._stacked()[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        self._require_plain_keys(self._stacked()[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        self._require_plain_keys(self._stacked()[::2])
        super().load_dict()  # type: ignore[misc]

    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def _stacked(self) -> list[Any]:
        return self.stack  # type: ignore[attr-defined]

    def _require_plain_keys(self, keys: list[Any]) -> None:
        # Hashing a tuple that is nested deep enough would run through the end of the stack.
        if not all(type(key) in (str, int, bytes) for key in keys):
            raise _Refused("a key of it is neither text nor a number")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise _Refused(f"it asks for {module}.{name}, which no pack needs"[:200]) from None


def _unpickle(stream: _Bounded) -> Any:
    content = _Unpickler(stream).load()
    if type(content) is int and content == _TORCH_MAGIC:
        for _ in ("protocol", "system", "content"):
            content = _Unpickler(stream).load()
    return content


@contextmanager
def _open_pickle(path: Path) -> Iterator[_Bounded]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield _Bounded(file, path.stat().st_size)
        return
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.filename.rpartition("/")[2] == "data.pkl"]
        if len(members) != 1:
            raise _Refused("it is a zip archive, but not one of torch's")
        if members[0].compress_type != zipfile.ZIP_STORED:
            raise _Refused("its archive is compressed, which torch never does")
        with archive.open(members[0]) as file:
            yield _Bounded(file, min(members[0].file_size, path.stat().st_size))


def _sorted_out(content: Any, path: Path) -> OldPack:
    """Bring any of the known layouts into one."""
    payload = content if type(content) is dict else {"samples": content}
    entries = next((payload[key] for key in _IMAGE_KEYS if key in payload), None)
    if not isinstance(entries, list | tuple):
        raise _unknown(path, "it has no list of images")
    if all(isinstance(entry, list | tuple) and len(entry) == 2 for entry in entries):
        images, targets = [entry[0] for entry in entries], [entry[1] for entry in entries]
    else:
        images = list(entries)
        targets = next((payload[key] for key in _TARGET_KEYS if key in payload), [])
    if not images or not all(type(image) is _Image for image in images):
        raise _unknown(path, "its list holds other things than images")
    if not isinstance(targets, list | tuple) or len(targets) != len(images):
        raise _unknown(path, "it has not one class index for every image")
    if not all(type(target) is int and target >= 0 for target in targets):
        raise _unknown(path, "a class index is not a number from 0")
    classes = _class_names(payload, max(targets), path)
    return OldPack(classes, [image.data for image in images], list(targets))


def _class_names(payload: dict[Any, Any], largest: int, path: Path) -> list[str]:
    classes, numbers = payload.get("classes"), payload.get("class_to_idx")
    if classes is None and type(numbers) is dict:
        if not all(type(number) is int for number in numbers.values()):
            raise _unknown(path, "its class_to_idx holds other things than numbers")
        classes = sorted(numbers, key=numbers.__getitem__)
    if classes is None and largest < len(payload["samples"]):
        classes = [str(number) for number in range(largest + 1)]
    if not isinstance(classes, list | tuple) or not all(type(name) is str for name in classes):
        raise _unknown(path, "it has no list of class names")
    if largest >= len(classes):
        raise _unknown(path, f"class index {largest} is beyond its {len(classes)} classes")
    return list(classes)


def _unknown(path: Path, what: str) -> UserError:
    return UserError(f"{path}: no pack of images: {what}; make one with `sanctl dataset pack`")
