"""Pickles that are not dicts of float32 arrays are refused, and nothing that they name is run."""

import builtins
import codecs
import os
import pickle
import struct

import numpy as np
import pytest

from qi2_jax.interop import array_pickles


def test_arrays_of_numpy_are_read():
    weights = {"a": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}, "b": np.zeros((0, 3), np.float32)}
    data = pickle.dumps(weights, 3)
    for written in (data, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")):  # before NumPy 2
        found = array_pickles.loads(written, "x.ckpt")
        np.testing.assert_array_equal(found["a"]["kernel"], weights["a"]["kernel"])
        assert found["b"].shape == (0, 3) and found["b"].dtype == np.float32


class Calls:
    """An object whose pickle calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


HOSTILE = {
    "os_system": Calls(os.system, "touch SENTINEL"),
    "eval": Calls(builtins.eval, "open('SENTINEL', 'w')"),
    "getattr": Calls(getattr, "a", "upper"),
    "import": Calls(__import__, "os"),
    "load_of_numpy": Calls(np.load, "SENTINEL"),
    "encode": Calls(codecs.encode, "a", "latin1"),
    "class": np.random.Generator,
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_refused(case, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"x\.ckpt is not a pickle of arrays: it names \w+\.\w+"):
        array_pickles.loads(pickle.dumps({"a": HOSTILE[case]}, protocol), "x.ckpt")
    assert not list(tmp_path.iterdir())


ARRAY = np.arange(4, dtype=np.float32)
OPCODES = {
    "persistent_id": (b"\x80\x03X\x01\x00\x00\x00aQ.", "is not a pickle of arrays"),
    "extension": (b"\x80\x02}U\x01a\x82\x01s.", "is not a pickle of arrays"),
    "new_object": (b"\x80\x02}U\x01acnumpy\nndarray\n)\x81s.", "is not a pickle of arrays"),
    "state_of_a_name": (b"\x80\x02}U\x01acnumpy\nndarray\n}b" + b"s.", "it changes what it names"),
    "state_of_a_dict": (b"\x80\x02}}b.", "is not a pickle of arrays"),
    "call_without_state": (b"\x80\x03}U\x01acnumpy\nndarray\n)Rs.", "x.ckpt: a is not an array"),
    "truncated": (pickle.dumps({"a": ARRAY}, 3)[:-9], "is not a pickle of arrays"),
    "bytes_beyond_the_end": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc", "is not a pickle of arrays"),
    "empty": (b"", "is not a pickle of arrays"),
    "contains_itself": (b"\x80\x02}q\x00U\x01ah\x00s.", "nests dicts too deeply"),
}


@pytest.mark.parametrize("case", OPCODES)
def test_opcodes_that_are_refused(case):
    data, message = OPCODES[case]
    with pytest.raises(ValueError, match=message):
        array_pickles.loads(data, "x.ckpt")


def with_state(*state: object) -> bytes:
    """The pickle of an array whose state is replaced."""

    class Lies:
        def __reduce__(self):
            return np.ndarray.__reduce__(ARRAY)[0], (np.ndarray, (0,), b"b"), state

    return pickle.dumps({"a": Lies()}, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([ARRAY], "contains a list where a dict"),
        ({"a": [ARRAY]}, "a is not an array"),
        ({"a": "text"}, "a is not an array"),
        ({3: ARRAY}, "the key 3 where a name"),
        ({"a": np.array([None])}, "another dtype than little-endian f4"),
        ({"a": ARRAY.astype(">f4")}, "another dtype"),
        ({"a": ARRAY.astype(np.float64)}, "another dtype"),
        ({"a": np.zeros(2, [("x", np.float32)])}, "another dtype"),
        ({"a": np.asfortranarray(np.ones((2, 3), np.float32))}, "not an array in C order"),
        (with_state(1, (5,), np.dtype("f4"), False, b"1234"), r"has 4 bytes for the shape \(5,\)"),
        (with_state(1, (-1,), np.dtype("f4"), False, b"1234"), "not an array in C order"),
        (with_state(1, (1,), np.dtype("f4"), False, [1.0]), "not an array in C order"),
        (with_state(1, (1,), "f4", False, b"1234"), "another dtype"),
        (with_state(1, (1 << 62, 4), np.dtype("f4"), False, b""), "has 0 bytes for the shape"),
    ],
)
def test_contents_that_are_refused(value, message):
    data = value if isinstance(value, bytes) else pickle.dumps(value, 3)
    with pytest.raises(ValueError, match=message):
        array_pickles.loads(data, "x.ckpt")
