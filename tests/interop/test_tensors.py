"""The streaming writer, and byte ranges of files."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qi2_jax.interop.tensors import Stored, Writer, scan
from qi2_jax.runtime import dtypes
from tests.interop import safetensors_bytes

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.array(3, np.float64),
    "empty": np.zeros((0, 4), np.float16),
    "bf16": np.arange(5).astype(dtypes.DTYPES["BF16"]),
    "stacked": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(ARRAYS, path)
    return path


def specs(arrays):
    return {name: (dtypes.CODES[array.dtype], array.shape) for name, array in arrays.items()}


def test_scan_finds_what_the_library_finds(file):
    found = scan(file)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        stored = found[name]
        assert (stored.dtype, stored.shape, stored.nbytes) == (array.dtype, array.shape, array.nbytes)
        np.testing.assert_array_equal(stored.open(), array)
    np.testing.assert_array_equal(found["stacked"].part(1).open(), ARRAYS["stacked"][1])
    assert found["stacked"].part(None) == found["stacked"]


@pytest.mark.parametrize("from_file", [False, True])
def test_round_trip_through_the_writer(file, tmp_path, from_file):
    path = tmp_path / "new" / "copy.safetensors"
    sources = scan(file) if from_file else ARRAYS
    with Writer(path, specs(ARRAYS)) as writer:
        for name in reversed(ARRAYS):  # the order of writing does not matter
            writer.write(name, sources[name])
        assert not path.exists()
    assert os.listdir(path.parent) == [path.name]
    assert safetensors_bytes.read(path) == safetensors_bytes.read(file)
    for name, array in load_file(path).items():
        assert array.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_round_trip_where_the_kernel_does_not_copy(file, tmp_path, monkeypatch):
    """Some file systems do not support it; short writes must not lose bytes either."""

    def refuse(*args):
        raise OSError(38, "Function not implemented")

    pwrite = os.pwrite
    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(os, "pwrite", lambda target, data, position: pwrite(target, data[:7], position))
    with Writer(tmp_path / "copy.safetensors", specs(ARRAYS)) as writer:
        for name, stored in scan(file).items():
            writer.write(name, stored)
    assert safetensors_bytes.read(tmp_path / "copy.safetensors") == safetensors_bytes.read(file)


def test_layers_are_written_beside_each_other(tmp_path):
    layers = [np.full((2, 2), value, np.float32) for value in (1, 2, 3)]
    with Writer(tmp_path / "x.safetensors", {"stacked": ("F32", (3, 2, 2))}) as writer:
        offset = 0
        for layer in layers:
            offset += writer.write("stacked", layer, offset)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["stacked"], np.stack(layers))


def test_transposed_arrays_are_written_in_their_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    with Writer(tmp_path / "x.safetensors", specs({"a": array})) as writer:
        writer.write("a", array)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["a"], array)


def test_a_file_that_is_not_full_does_not_appear(tmp_path):
    with (
        pytest.raises(ValueError, match="4 of 8 bytes were written"),
        Writer(tmp_path / "x.safetensors", {"a": ("F32", (2,))}) as writer,
    ):
        writer.write("a", np.zeros(1, np.float32))
    assert os.listdir(tmp_path) == []


def test_bytes_that_do_not_fit_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="8 bytes at 4 do not fit in a of 8 bytes"),
        Writer(tmp_path / "x.safetensors", {"a": ("F32", (2,)), "b": ("F32", (2,))}) as writer,
    ):
        writer.write("a", np.zeros(2, np.float32), 4)
    assert os.listdir(tmp_path) == []


def test_a_source_that_shrank_is_noticed(tmp_path):
    (tmp_path / "source").write_bytes(b"1234")
    stored = Stored(tmp_path / "source", "F32", (2,), 0)
    with (
        pytest.raises(ValueError, match="ended early: 4 bytes"),
        Writer(tmp_path / "x.safetensors", {"a": ("F32", (2,))}) as writer,
    ):
        writer.write("a", stored)
    assert os.listdir(tmp_path) == ["source"]
