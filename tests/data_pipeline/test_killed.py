"""Real processes that are killed or run out of disk space: the final bytes equal those of an undisturbed run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.records.shards import MANIFEST, RecordFolder, read_manifest
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.pair_search import _WORK
from data_pipeline.sources.ingest import ingest

# The last shard is never finished, in whichever process: the kill always comes while there is work left.
SCORE = """
import sys, time
from data_pipeline.scoring import cascade
write_scores = cascade.write_scores
def unless_last(folder, filter, shard, keys, rows):
    if shard.file == cascade.RecordFolder(folder).shards[-1].file:
        time.sleep(600)
    write_scores(folder, filter, shard, keys, rows)
cascade.write_scores = unless_last
if __name__ == "__main__":
    cascade.score(sys.argv[1], workers=2, progress=False)
"""
# It stops after three shards until a file exists.
INGEST = """
import os, sys, time
from data_pipeline.records import shards
from data_pipeline.sources import ingest
written = shards._write_shard
count = 0
def three_at_first(path, records):
    global count
    while count == 3 and not os.path.exists(sys.argv[3]):
        time.sleep(0.01)
    count += 1
    return written(path, records)
shards._write_shard = three_at_first
ingest.ingest(sys.argv[1], sys.argv[2], records_per_shard=2, progress=False)
"""
FULL = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from qi2_jax.cli.main import main
main(sys.argv[2:])
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sizes(folder: Path, pattern: str) -> list[int]:
    """Sizes of the files that match, smallest first. The limits on a full disk follow from them."""
    return sorted(path.stat().st_size for path in folder.glob(pattern))


def start(tmp_path, program: str, *arguments) -> subprocess.Popen:
    script = tmp_path / "program.py"
    script.write_text(program)
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def wait_for(happened, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not happened():
        # Asked again after the end, because a process may fulfil it and end between the two calls.
        assert process.poll() is None or happened(), process.communicate()[1]
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(picture, encoded, tmp_path_factory):
    """Images, and records with their scores, of undisturbed runs."""
    root = tmp_path_factory.mktemp("undisturbed")
    (root / "images").mkdir()
    for i in range(24):
        (root / "images" / f"{i}.png").write_bytes(encoded(picture(i % 20, (90 - i, 60))))
        (root / "images" / f"{i}.txt").write_text("a picture for a test")
    ingest(root / "images", root / "records", records_per_shard=2, progress=False)
    score(root / "records", workers=1, progress=False)
    return root / "images", root / "records"


@pytest.fixture
def unscored(undisturbed, tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    for path in undisturbed[1].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_scoring_that_is_killed_continues_to_the_same_bytes(undisturbed, unscored, tmp_path, victim):
    process = start(tmp_path, SCORE, unscored)
    wait_for(lambda: list(unscored.glob("scores/description/*.done.json")), process)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in str(child.cmdline())
    ]
    assert len(workers) == 2
    os.kill(process.pid if victim == "parent" else workers[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if victim == "parent" else 1)
    assert victim == "parent" or "a process for scoring died. Finished work is kept: run again" in errors
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlive their parent"
    assert not (unscored / "scores/pairs/done.json").exists()
    report = score(unscored, workers=1, progress=False)
    assert 0 < report.scored["description"] < report.records
    kept = {name: content for name, content in files(unscored).items() if not name.endswith(".partial")}
    assert kept == files(undisturbed[1])


def test_ingestion_that_is_killed_starts_over_to_the_same_bytes(undisturbed, tmp_path):
    out = tmp_path / "records"
    process = start(tmp_path, INGEST, undisturbed[0], out, tmp_path / "go")
    wait_for(lambda: len(list(out.glob("*.partial"))) >= 3, process)
    process.kill()
    process.communicate()
    assert not (out / MANIFEST).exists()
    with pytest.raises(ValueError, match="its ingestion was interrupted"):
        RecordFolder(out)
    ingest(undisturbed[0], out, records_per_shard=2, progress=False)
    expected = {name: content for name, content in files(undisturbed[1]).items() if not name.startswith("scores/")}
    assert files(out) == expected


def test_full_disk_while_ingesting(undisturbed, tmp_path):
    out = tmp_path / "records"
    limit = sizes(undisturbed[1], "*.arrayrecord")[-1] // 2
    process = start(tmp_path, FULL, limit, "data", "ingest", undisturbed[0], "--out", out)
    errors = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 1 and errors.splitlines()[-1].startswith("qi2 data: ") and "cannot be written" in errors
    )
    assert "File too large" in errors and "Traceback" not in errors
    with pytest.raises(ValueError, match="its ingestion was interrupted"):
        read_manifest(out)


def test_two_ingestions_into_one_folder(undisturbed, tmp_path):
    out = tmp_path / "records"
    process = start(tmp_path, INGEST, undisturbed[0], out, tmp_path / "go")
    wait_for(lambda: len(list(out.glob("*.partial"))) >= 3, process)
    with pytest.raises(ValueError, match=rf"another process works in .*records \(process {process.pid} of"):
        ingest(undisturbed[0], out, records_per_shard=3, progress=False)
    (tmp_path / "go").touch()
    assert process.wait(timeout=60) == 0
    expected = {name: content for name, content in files(undisturbed[1]).items() if not name.startswith("scores/")}
    assert files(out) == expected


def test_full_disk_while_pairing(undisturbed, unscored, tmp_path):
    score(unscored, workers=1, progress=False)
    limit = sizes(unscored, "scores/pairs/*.parquet")[0] // 2
    shutil.rmtree(unscored / "scores" / "pairs")
    process = start(tmp_path, FULL, limit, "data", "score", unscored, "--workers", 1)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "File too large" in errors and "scores/pairs" in errors, errors


def test_full_disk_while_scoring(undisturbed, unscored, tmp_path):
    largest, others = (sizes(undisturbed[1], f"scores/{name}/*.parquet") for name in ("duplicates", "[!d]*"))
    assert others[-1] < largest[0]
    process = start(tmp_path, FULL, (others[-1] + largest[0]) // 2, "data", "score", unscored, "--workers", 1)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "File too large" in errors and "duplicates/records-00000" in errors
    assert "Traceback" not in errors
    score(unscored, workers=1, progress=False)
    assert files(unscored) == files(undisturbed[1])
    assert not list((unscored / "scores/pairs").glob(f"{_WORK}*"))
