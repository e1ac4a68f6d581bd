"""Folders: images with sidecar files, images that metadata files list, archives and tables, at any depth.

- Sidecar files: for `a/cat.jpg`, a file `a/cat.txt` or `a/cat.caption`, whose whole text is one general caption, or
  `a/cat.json` with the keys of `fields.describe`.
- Metadata files (`metadata.jsonl`, `.csv` or `.json`): in and below a folder with such a file, only the images it lists
  are read.
- Pairs of InstructPix2Pix: `1_0.jpg` before and `1_1.jpg` after the edit of a `prompt.json`.
- Tars and Parquet tables, which have their own readers.
"""

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.records.schema import Record
from data_pipeline.sources import base, layouts
from data_pipeline.sources.base import CAPTION_SUFFIXES, Ledger, Options, Refused
from data_pipeline.sources.fields import (
    MAX_JSON_BYTES,
    CaptionFile,
    Description,
    describe,
    make_record,
    merge,
    parse_json,
    read_caption_file,
    source_name,
)
from data_pipeline.sources.metadata import Entry, Listing, count_named, read_metadata
from data_pipeline.sources.parquet import NoImageColumn, read_parquet
from data_pipeline.sources.sidecars import describe_sidecars
from data_pipeline.sources.tree import EXTRACT, Files, Image, Tree, walk
from data_pipeline.sources.webdataset import read_tar

MAX_EXAMINED = 100  # tables under other names that are searched for names of images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder:
    """A folder whose files have been listed and whose metadata has been read, but no image yet.

    Attributes:
      entries: images to read, in the order of their keys, each with its metadata or its sidecar files.
      archives: tars and tables, relative to the root.
      prefixes: key prefix of each archive.
      has_columns: whether `Options.columns` applies to this folder.
    """

    files: Files
    entries: list[Entry | Image]
    archives: list[str]
    prefixes: list[str]
    has_columns: bool

    def read(self, options: Options, ledger: Ledger) -> Iterator[Record]:
        """Yields the records of the images, and then those of every archive and table."""
        yield from read_entries(self.files, self.entries, options, ledger)
        for name, prefix in zip(self.archives, self.prefixes, strict=True):
            path = self.files.root / name
            if not path.is_file():
                ledger.refuse("not_a_file", name)
            elif name.lower().endswith(".tar"):
                yield from read_tar(path, options, ledger, prefix)
            else:
                yield from _read_table(path, name, options, ledger, prefix)


def open_folder(path: Path, options: Options, ledger: Ledger) -> Folder:
    """Walks a folder and reads its metadata.

    Raises:
      ValueError: if a metadata file is outside the folder, or lacks a column that the options name.
    """
    tree = walk(path, ledger)
    files = Files(tree.root)
    listings = {name: read_metadata(files, name, options, ledger) for name in tree.metadata}
    # A file in which no row names an image is empty, broken, or describes something other than images.
    listings = {name: listing for name, listing in listings.items() if listing.names_images}
    entries: list[Entry | Image] = [*_metadata_entries(listings, ledger), *_plain_images(tree, listings, ledger)]
    entries.sort(key=lambda entry: entry.key)
    _warn_of_unread(tree, files, options)
    has_tables = any(name.lower().endswith(".parquet") for name in tree.archives)
    has_json = any(isinstance(entry, Image) and entry.has_json for entry in entries)
    return Folder(files, entries, tree.archives, _key_prefixes(tree), has_tables or has_json or bool(listings))


def open_metadata(path: Path, options: Options, ledger: Ledger) -> Folder:
    """Reads a metadata file; its images are in or below its folder. Raises the errors of `open_folder`."""
    ledger.count_file(base.suffix_of(path.name))
    files = Files(path.parent.resolve())
    listing = read_metadata(files, path.name, options, ledger)
    return Folder(files, sorted(listing.entries, key=lambda entry: entry.key), [], [], True)


def _warn_of_unread(tree: Tree, files: Files, options: Options) -> None:
    """Warns of archives without a reader, and of tables under other names whose rows name images of the folder."""
    if tree.compressed:
        log.warning(
            "%s: archives that are not read: %d, such as %s; %s",
            tree.root,
            len(tree.compressed),
            tree.compressed[0],
            EXTRACT,
        )
    images = {image.key for image in tree.images}
    if images and len(tree.tables) > MAX_EXAMINED:
        log.warning("%s: of %d tables, only %d are examined", tree.root, len(tree.tables), MAX_EXAMINED)
    for name in tree.tables[:MAX_EXAMINED] if images else ():
        named, rows = count_named(files, name, options, images)
        if named:
            log.warning(
                "%s is not read, but %d of its %d rows name images of this folder; rename it to metadata%s, or name it "
                "as the source instead of the folder. Then only the images that it lists are read",
                files.root / name,
                named,
                rows,
                base.suffix_of(name),
            )


def _metadata_entries(listings: dict[str, Listing], ledger: Ledger) -> list[Entry]:
    """The entries of all metadata files; several descriptions of one image are merged."""
    entries: dict[str, Entry] = {}
    for name, listing in listings.items():
        for entry in listing.entries:
            first = entries.setdefault(entry.key, entry)
            if first is entry:
                continue
            try:
                if first.described.conditions != entry.described.conditions:
                    raise Refused("duplicate_key")
                entries[entry.key] = replace(first, described=merge(first.described, entry.described))
            except Refused as refusal:
                ledger.refuse(refusal, f"{name}: {entry.key}")
    return list(entries.values())


def _plain_images(tree: Tree, listings: dict[str, Listing], ledger: Ledger) -> Iterator[Image]:
    """Images outside the folders of all metadata files. Images inside them that no metadata lists are refused."""
    named = set(itertools.chain.from_iterable(listing.named for listing in listings.values()))
    listed_folders = {name.rpartition("/")[0] for name in listings}
    for image in tree.images:
        parents = itertools.accumulate(image.key.split("/")[:-1], "{}/{}".format)
        if "" in listed_folders or any(parent in listed_folders for parent in parents):
            if image.key not in named:
                ledger.refuse("not_listed", image.key)
        elif base.is_name(image.key):
            yield image
        else:
            ledger.refuse("bad_name", image.key)


def _key_prefixes(tree: Tree) -> list[str]:
    """Key prefixes of the archives: the path of each, without its suffix unless that path is taken."""
    taken = {image.key.rpartition("/")[0] for image in tree.images}
    taken |= {"/".join(parts[:end]) for place in taken for parts in [place.split("/")] for end in range(1, len(parts))}
    prefixes = []
    for name in tree.archives:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        choices = itertools.chain([name.rpartition(".")[0], name], numbered)
        prefixes.append(next(choice for choice in choices if choice not in taken))
        taken.add(prefixes[-1])
    return prefixes


def _read_table(path: Path, name: str, options: Options, ledger: Ledger, prefix: str) -> Iterator[Record]:
    try:
        yield from read_parquet(path, options, ledger, prefix)
    except NoImageColumn as error:  # such as the table of URLs that img2dataset writes with every tar
        if options.columns:
            raise
        ledger.refuse(Refused("unknown_keys", f"columns {layouts.format_keys(error.columns)}"), name)


def read_entries(files: Files, entries: Iterable[Entry | Image], options: Options, ledger: Ledger) -> Iterator[Record]:
    """Records of images whose names are known."""
    known = list(entries)
    ledger.bar.total = (ledger.bar.total or 0) + len(known)
    read = functools.partial(files.read, limit=options.max_image_bytes, too_large="too_large")
    for entry in known:
        try:
            key, described = (entry.image, entry.described) if isinstance(entry, Entry) else (entry.key, None)
            image = base.check_image(read(key), options.max_image_bytes)
            if isinstance(entry, Image):
                described = _describe_image(files, entry, options, ledger)
            assert described is not None
            conditions = tuple(base.check_image(read(name), options.max_image_bytes) for name in described.conditions)
            record = make_record(entry.key, image, conditions, described, source_name(options, files.root.name))
            ledger.count_lost(described.lost, entry.key)
            yield record
        except Refused as error:
            ledger.refuse(error, entry.key)
        ledger.bar.update()


def _describe_image(files: Files, image: Image, options: Options, ledger: Ledger) -> Description:
    if image.source is not None:
        prompt = parse_json(files.read(image.sidecars[0], MAX_JSON_BYTES, "bad_json"))
        fields = {"instruction": prompt.get("edit"), "text": prompt.get("output"), "conditions": [image.source]}
        return describe({name: value for name, value in fields.items() if value is not None}, options)
    texts: list[CaptionFile] = []
    json_file: bytes | Refused | None = None
    for name in image.sidecars:
        is_text = base.suffix_of(name) in CAPTION_SUFFIXES
        limit, too_large = (base.MAX_TEXT_FILE_BYTES, "caption_too_long") if is_text else (MAX_JSON_BYTES, "bad_json")
        content: bytes | Refused
        try:
            content = files.read(name, limit, too_large)
        except Refused as refusal:
            content = refusal
        if is_text:
            texts.append(read_caption_file(content))
        else:
            json_file = content
    return describe_sidecars(json_file, texts, options, ledger)
