"""The test images in Pillow's source distribution, fetched once by pip and kept outside the repository.

python -m tests.pillow_source        fetches them, as `make test-data` does
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "12.3.0"
FOLDER = Path(os.environ.get("QI2_TEST_CACHE", Path.home() / ".cache/qi2"))
FETCH = ("pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(FOLDER), f"pillow=={VERSION}")


def require_pillow_source() -> Path:
    """The tar file; without it the test skips, saying how to fetch it, or fails if the variable CI is set."""
    path = FOLDER / f"pillow-{VERSION}.tar.gz"
    if not path.is_file():
        message = f"{path} missing: {' '.join(FETCH)}, or make test-data"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


if __name__ == "__main__":
    if not (FOLDER / f"pillow-{VERSION}.tar.gz").is_file():
        subprocess.run([sys.executable, "-m", *FETCH, "--quiet"], check=True)
