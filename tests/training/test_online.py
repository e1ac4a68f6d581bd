"""Training that computes text features in every step takes the same steps as on cached features."""

import numpy as np
import pytest

from data_pipeline import encode as encoding
from data_pipeline.cache import Cache
from data_pipeline.records import Caption, Record
from data_pipeline.selection import INDEX, Kept, Selection, Thresholds, write_selection
from data_pipeline.shards import digest_of, write_shards
from qi2_jax import config as configs
from qi2_jax.job import encode, transformer
from qi2_jax.training import metrics

OVERRIDES = ["encode.mesh.data=2", "transformer.train.steps=2", "transformer.model.layers=1", "transformer.dropout=0.5"]


def test_losses_are_those_of_cached_features(tmp_path, picture_bytes, imported):
    captions = ("a picture", "a much longer caption of another picture", "x")
    made = [Record(f"{i}", picture_bytes(i), (Caption(captions[i % 3]),), "test") for i in range(6)]
    shards = write_shards(tmp_path / "records", made, records_per_shard=4)
    thresholds = Thresholds(**configs.load("experiments/demo.py:tiny").data.thresholds)
    kept = tuple(Kept(record.key, index, 150, 150, (0,)) for index, record in enumerate(made))
    write_selection(tmp_path / "records" / INDEX, Selection(thresholds, kept, {}, (), {}, {}, digest_of(shards)))

    def losses(text):
        config = configs.load("experiments/demo.py:tiny", [*OVERRIDES, f"encode.text={text}"])
        samples, out = tmp_path / f"samples-{text}", tmp_path / f"run-{text}"
        encode.encode(config, tmp_path / "records", tmp_path / "records" / INDEX, imported, samples)
        transformer.give_model(config.transformer, Cache(samples), imported, out)
        transformer.train_transformer(config, Cache(samples), out)
        lines = metrics.read(out / "metrics.jsonl")
        return [line.get("loss", line.get("validation_loss")) for line in lines]

    config = configs.load("experiments/demo.py:tiny", [*OVERRIDES, "encode.records_per_unit=4"])
    cached, online = losses(encoding.CACHED), losses(encoding.ONLINE)
    assert len(cached) == 4 and len(set(cached)) > 2
    np.testing.assert_allclose(online, cached, rtol=1e-5)

    index, samples = tmp_path / "records" / INDEX, tmp_path / "samples-cached"
    with pytest.raises(ValueError, match="records_per_unit: 16384, expected 4"):
        encode.encode(config, tmp_path / "records", index, imported, samples)
    write_shards(tmp_path / "others", made[1:], records_per_shard=4)
    with pytest.raises(ValueError, match="selected from other records"):
        encode.encode(config, tmp_path / "others", index, imported, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_prompts_need_their_encoder(tmp_path):
    config = configs.load("experiments/demo.py:tiny")
    cache = type("Cache", (), {"fingerprint": {"text": encoding.ONLINE}, "folder": tmp_path})
    with pytest.raises(ValueError, match="holds prompts, not features: name the encoders' folder"):
        transformer.TextSource(config.transformer, cache, tmp_path / "model", None)


@pytest.fixture(scope="module")
def picture_bytes():
    import io

    from PIL import Image

    def make(seed):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((150, 150)).save(buffer, "PNG")
        return buffer.getvalue()

    return make
