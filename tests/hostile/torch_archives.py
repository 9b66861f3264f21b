"""Files of torch written opcode by opcode, to say what torch.save never would."""

import io
import struct
import zipfile
from collections.abc import Mapping

MAGIC = 0x1950A86A20F9469CFC6C


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def mapping(**values: bytes) -> bytes:
    """A dict of names and opcodes that push their values."""
    return b"}" + b"".join(text(key) + value + b"s" for key, value in values.items())


def call(name: str, *arguments: bytes) -> bytes:
    """Opcodes that call a function, as `os system`."""
    module, _, function = name.partition(" ")
    return f"c{module}\n{function}\n(".encode() + b"".join(arguments) + b"tR"


def tensor(
    *,
    storage: str = "FloatStorage",
    key: str = "0",
    held: int = 4,
    offset: int = 0,
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    older: bool = False,
) -> bytes:
    """Opcodes that push a tensor on a storage that is said to hold `held` elements.

    Files of the older kind name a storage with one item more.
    """
    kind = f"ctorch\n{storage}\n".encode()
    persistent = b"(" + text("storage") + kind + text(key) + text("cpu") + number(held)
    return call(
        "torch._utils _rebuild_tensor_v2",
        persistent + (b"NtQ" if older else b"tQ"),
        number(offset),
        numbers(*size),
        numbers(*stride),
        b"\x89",
        b"ccollections\nOrderedDict\n)R",
    )


def pickled(code: bytes) -> bytes:
    return b"\x80\x02" + code + b"."


def nested(depth: int) -> bytes:
    """Opcodes that push tuples in tuples."""
    return b")" + b"\x85" * depth


def archive(
    code: bytes, storages: Mapping[str, bytes] | None = None, compressed: bool = False
) -> bytes:
    """A zip archive as torch writes it, of opcodes and the bytes of storages."""
    kept = {"0": bytes(16)} if storages is None else storages
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr("archive/data.pkl", pickled(code))
        file.writestr("archive/byteorder", "little")
        for key, data in kept.items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def stream(code: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None) -> bytes:
    """The older kind of file: five pickles, then each storage's length and bytes."""
    kept = {"0": (4, bytes(16))} if storages is None else storages
    keys = b"]" + b"".join(text(key) + b"a" for key in kept)
    system = mapping(protocol_version=number(1001), little_endian=b"\x88", type_sizes=b"}")
    head = [number(MAGIC), number(1001), system, code, keys]
    data = b"".join(struct.pack("<q", length) + content for length, content in kept.values())
    return b"".join(map(pickled, head)) + data
