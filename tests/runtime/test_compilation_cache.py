"""Compiled programs of sampling are kept in the user's cache folder, unless that is moved or switched off."""

import os
import pathlib
import subprocess
import sys

import pytest

from qi2_jax.runtime import compilation_cache


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/qi2/compiled"),
        ({"HOME": "/home/ada"}, "/home/ada/.cache/qi2/compiled"),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": "relative"}, "/home/ada/.cache/qi2/compiled"),
        ({"XDG_CACHE_HOME": "/xdg", "QI2_COMPILATION_CACHE": "/else/where"}, "/else/where"),
        ({"HOME": "/home/ada", "QI2_COMPILATION_CACHE": "~/compiled"}, "/home/ada/compiled"),
        ({"XDG_CACHE_HOME": "/xdg", "QI2_COMPILATION_CACHE": "off"}, None),
        ({"XDG_CACHE_HOME": "/xdg", "QI2_COMPILATION_CACHE": ""}, None),
    ],
)
def test_the_folder_follows_from_the_environment(monkeypatch, variables, expected):
    for name in ("XDG_CACHE_HOME", "QI2_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert compilation_cache.folder() == (None if expected is None else pathlib.Path(expected))


PROGRAM = """
import jax
from qi2_jax.runtime import compilation_cache
compilation_cache.use()
jax.jit(lambda x: x * 2 + 1)(3.0)
print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
"""


def run(variables):
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_programs_are_kept_within_a_bound(tmp_path):
    place = tmp_path / "qi2" / "compiled"
    place.mkdir(parents=True)
    (place / "killed-cache").write_bytes(b"half")  # without a time of use, which JAX's eviction would stumble over
    os.utime(place / "killed-cache", (0, 0))
    assert run({"XDG_CACHE_HOME": str(tmp_path)}) == [str(place), str(2 << 30)]
    names = [path.name for path in place.glob("*-cache")]
    assert names and "killed-cache" not in names


def test_a_folder_that_cannot_be_made_and_one_that_jax_has_already(tmp_path):
    (tmp_path / "file").write_text("")
    assert run({"XDG_CACHE_HOME": str(tmp_path / "file")}) == ["None", "-1"]
    chosen = str(tmp_path / "chosen")
    assert run({"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": chosen}) == [chosen, "-1"]
    assert not (tmp_path / "qi2").exists()
