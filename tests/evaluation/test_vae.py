"""An evaluation of several models: one that fails, and one that was trained on the evaluated records."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import digest_of, read_manifest, write_shards
from data_pipeline.samples.held_out import image_hash
from qi2_jax.evaluation import vae
from qi2_jax.evaluation.autoencoders import JaxAutoencoder
from qi2_jax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class Fake:
    """An autoencoder that returns its input, or raises an error in its second batch."""

    name: str
    error: Exception | None = None
    calls: list = dataclasses.field(default_factory=list)
    factor, channels, digest = 16, 4, "digest"

    @contextlib.contextmanager
    def loaded(self):
        yield self

    def reconstruct(self, images):
        self.calls.append(images)
        if self.error and len(self.calls) == 2:
            raise self.error
        return images


class Trained(JaxAutoencoder):
    """An autoencoder of a run, without weights."""

    factor, channels, digest = 16, 4, "digest"

    def loaded(self):
        return contextlib.nullcontext(Fake(self.name))


def encoded(seed: int, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Images of two sizes, so that there are several batches."""
    folder = tmp_path_factory.mktemp("data") / "records"
    images = [encoded(seed, (16, 16 * (1 + seed % 2))) for seed in range(8)]
    found = [Record(f"{seed}", image, (Caption("x"),), "test") for seed, image in enumerate(images)]
    write_shards(folder, found, records_per_shard=8)
    return folder


def test_other_models_are_measured_after_one_that_fails(records):
    states = []
    save = lambda found: states.append((len(found.results), list(found.pending), found.to_dict()["refused"]))
    models = [Fake("first"), Fake("broken", ValueError("Traceback\nbad weights\n")), Fake("last")]
    found = vae.evaluate(models, vae.Options(records), None, save=save)
    assert [result.model for result in found.results] == ["linear code", "first", "last"]
    assert found.failed == {"broken": "Traceback\nbad weights\n"} and found.pending == []
    assert "broken could not be measured: bad weights" in found.notes
    assert [state[:2] for state in states] == [
        (1, ["first", "broken", "last"]),
        (2, ["broken", "last"]),
        (2, ["last"]),
        (3, []),
    ]
    assert "last reproduces 8 of 8 images exactly; their PSNR is infinite" in "\n".join(found.notes)
    written = found.to_dict()
    assert [model["weights_sha256"] for model in written["models"]] == [None, "digest", "digest"]
    assert written["failed"] == found.failed and written["options"]["ocr"] == []


def test_an_unexpected_error_leaves_what_was_saved_before(records):
    saved = []
    models = [Fake("first"), Fake("broken", RuntimeError("out of memory"))]
    with pytest.raises(RuntimeError, match="out of memory"):
        vae.evaluate(models, vae.Options(records), None, save=lambda found: saved.append(found.to_dict()))
    assert [row["model"] for row in saved[-1]["rows"] if row["set"] == "all"] == ["linear code", "first"]
    assert saved[-1]["pending"] == ["broken"]


def test_records_of_the_training_are_noted_or_left_out(records):
    config = VAEConfig(4, 4, 4, (1, 1), 1, (True,), in_channels=3, out_channels=3)
    trained = Trained("run", config, {}, frozenset({digest_of(read_manifest(records))}))
    models = [Fake("other"), trained]

    def notes(**options):
        found = vae.evaluate(models, vae.Options(records, **options), None)
        return [image.name for image in found.results[0].images], "\n".join(found.notes), found

    names, text, _ = notes()
    assert "run was trained on these records, so its figures are too good; --held-out FRACTION" in text
    assert "other was trained" not in text and len(names) == 8
    names, text, found = notes(held_out=0.5, fit=records)
    assert names == [f"{seed}" for seed in range(8) if image_hash(encoded(seed, (16, 16 * (1 + seed % 2)))) < 0.5]
    assert "run was trained on these records: its figures are too good unless its data.held_out" in text
    assert "only held-out records are measured: --held-out 0.5, by images" in text
    assert "it has seen what it is judged on" not in text and found.to_dict()["options"]["held_out"] == 0.5
    assert "it has seen what it is judged on" in notes(fit=records)[1]
    assert f"give other images with --fit {records}, of which it takes the training records" in notes(held_out=0.5)[1]
