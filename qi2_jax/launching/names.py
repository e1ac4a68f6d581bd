"""Checks of names and paths that go into manifests, scripts and commands."""

import re

MAX_NAME = 40  # characters; Kubernetes appends the numbers of slice and host, and allows 63 in all


def check_label(flag: str, text: str, limit: int = 63) -> str:
    """Returns the name of a cluster's object: a DNS label (RFC 1123) that begins with a letter.

    Raises:
      ValueError: for anything else.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", text, re.ASCII) or len(text) > limit:
        raise ValueError(
            f"{flag} is {text!r}; use at most {limit} lowercase letters, digits and hyphens, beginning with a letter "
            "and ending with a letter or digit (RFC 1123)"
        )
    return text


def label_of(stem: str) -> str:
    """A label from the name of an experiment file, such as "s1-256p-t2i" from "s1_256p_t2i"."""
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:MAX_NAME].strip("-")


def check_image(text: str) -> str:
    """Returns the name of a container image.

    Raises:
      ValueError: for a name without a tag or digest, since `latest` may change between two restarts, or another text.
    """
    name = r"[a-z0-9][a-z0-9.-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)*"
    if not re.fullmatch(rf"{name}(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}|@sha256:[0-9a-f]{{64}})", text, re.ASCII):
        raise ValueError(
            f"--image is {text!r}; write it with a tag or digest, such as us-docker.pkg.dev/PROJECT/qi2/qi2:1"
        )
    return text


def check_inside(flag: str, text: str) -> str:
    """Returns a path inside a folder, such as "runs/s1", without a final slash.

    Raises:
      ValueError: for an absolute path, one that leaves the folder, and characters that a shell would interpret.
    """
    path = text.removesuffix("/")
    if not re.fullmatch(r"[A-Za-z0-9._=-]+(/[A-Za-z0-9._=-]+)*", path, re.ASCII) or _leaves(path):
        raise ValueError(
            f"{flag} is {text!r}; write a path inside the folder of --work (or --cache) with letters, digits and ._=- "
            "only, such as runs/s1"
        )
    return path


def _leaves(path: str) -> bool:
    return bool({"..", "."} & set(path.split("/"))) or path.startswith("-")
