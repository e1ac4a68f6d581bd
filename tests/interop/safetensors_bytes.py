"""safetensors files parsed without the code under test: {tensor name: (dtype, shape, bytes)}."""

import json
import pathlib
import struct

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def read(path: pathlib.Path) -> Tensors:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def read_folder(folder: pathlib.Path) -> Tensors:
    """All tensors of a component, from files of any name."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        own = read(path)
        assert not own.keys() & tensors.keys()
        tensors |= own
    return tensors


def write(path: pathlib.Path, header: dict | bytes, data: bytes = b"") -> pathlib.Path:
    """Writes a file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_tensors(path: pathlib.Path, tensors: Tensors) -> pathlib.Path:
    header, start = {}, 0
    for name, (code, shape, data) in tensors.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, start + len(data)]}
        start += len(data)
    return write(path, header, b"".join(data for *_, data in tensors.values()))
