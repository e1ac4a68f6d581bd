"""Folders that all hosts of a job share: in a bucket, on an NFS server, or mounted already."""

import dataclasses
import re

from qi2_jax.launching import names


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A folder in a Cloud Storage bucket, which hosts mount with Cloud Storage FUSE.

    Attributes:
      name: name of the bucket.
      prefix: path in the bucket; "": all of it.
    """

    name: str
    prefix: str

    def __str__(self) -> str:
        return f"gs://{self.name}" + (f"/{self.prefix}" if self.prefix else "")

    def mount_options(self, *, read_only: bool) -> dict[str, str]:
        """Options of Cloud Storage FUSE (https://cloud.google.com/storage/docs/cloud-storage-fuse/config-file).

        A folder that is written must show the files of other hosts at once: they join a checkpoint together. What is
        only read does not change during the job, so hosts need not ask for it again.
        """
        options = {"implicit-dirs": ""} | ({"only-dir": self.prefix} if self.prefix else {})
        if read_only:
            return options | {"metadata-cache:ttl-secs": "-1"}
        return options | {"metadata-cache:ttl-secs": "0", "metadata-cache:negative-ttl-secs": "0"}


@dataclasses.dataclass(frozen=True)
class Export:
    """A folder that an NFS server exports, such as a Filestore share.

    Attributes:
      server: host name or IPv4 address.
      path: absolute path of the export.
    """

    server: str
    path: str

    def __str__(self) -> str:
        return f"nfs://{self.server}{self.path}"


@dataclasses.dataclass(frozen=True)
class Mounted:
    """A folder that every host has at the same path.

    Attributes:
      path: absolute path.
    """

    path: str

    def __str__(self) -> str:
        return self.path


Folder = Bucket | Export | Mounted


def parse(flag: str, text: str) -> Folder:
    """Parses gs://BUCKET/FOLDER, nfs://SERVER/EXPORT or an absolute path.

    Raises:
      ValueError: for anything else.
    """
    scheme, separator, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    path = path.removesuffix("/")
    inside = not path or _is_path(path)
    if scheme == "gs" and separator and inside and _is_bucket(host):
        return Bucket(host, path)
    if scheme == "nfs" and separator and slash and path and inside and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", host):
        return Export(host, f"/{path}")
    if not separator and text.startswith("/") and _is_path(text.strip("/")):
        return Mounted("/" + text.strip("/"))
    raise ValueError(
        f"{flag} is {text!r}; write gs://BUCKET/FOLDER, nfs://SERVER/EXPORT or an absolute path, with letters, digits "
        "and ._=- only"
    )


def parse_bucket(flag: str, text: str) -> Bucket:
    """Parses gs://BUCKET/FOLDER.

    Raises:
      ValueError: for anything else.
    """
    folder = parse(flag, text)
    if not isinstance(folder, Bucket):
        raise ValueError(f"{flag} is {text!r}; it must be in a bucket: gs://BUCKET/FOLDER")
    return folder


def _is_bucket(name: str) -> bool:
    """Whether a bucket may have the name (https://cloud.google.com/storage/docs/buckets#naming)."""
    return bool(re.fullmatch(r"[a-z0-9]([a-z0-9._-]{1,61})[a-z0-9]", name, re.ASCII)) and ".." not in name


def _is_path(path: str) -> bool:
    try:
        return names.check_inside("", path) == path
    except ValueError:
        return False
