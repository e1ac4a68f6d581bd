"""What tests use from Debian packages, listed in `apt-packages.txt`: without them they skip, except under CI."""

import os
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent.parent / "apt-packages.txt"


def require_debian(package: str, *paths: Path | str) -> None:
    """Skips the test, saying what is missing, unless all paths of a package exist; fails if the variable CI is set.

    Raises:
      ValueError: if the package is not listed, so that CI would not install it.
    """
    listed = [line.split("#")[0].strip() for line in PACKAGES.read_text(encoding="utf-8").splitlines()]
    if package not in listed:
        raise ValueError(f"{package} is not listed in {PACKAGES.name}")
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        message = f"{', '.join(missing)} missing: apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
