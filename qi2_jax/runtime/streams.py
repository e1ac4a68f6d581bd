"""Standard output and error whose terminal or reader may be gone."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from typing import Any


class _Tolerant:
    """A text stream that drops what a closed terminal refuses, and after a signal everything that cannot be written."""

    def __init__(self, stream: Any, ending: Callable[[], bool]):
        self._stream, self._ending = stream, ending

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO and not self._ending():
                raise

    def write(self, text: str) -> int:
        with self._tolerating():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerating():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerate_lost_readers(ending: Callable[[], bool]) -> None:
    """Keeps messages that nobody can read from preventing a save.

    Every write to a closed terminal fails. Ctrl-C also ends a `tee` that this process writes to.

    Args:
      ending: function that says whether the process was asked to end. From then on a failed write is not an error.
    """
    sys.stdout, sys.stderr = _Tolerant(sys.stdout, ending), _Tolerant(sys.stderr, ending)
