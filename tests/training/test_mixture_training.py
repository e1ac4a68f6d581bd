"""The transformer trains on pairs and edits in their shares, and resumes exactly."""

import numpy as np
import pytest

from data_pipeline.loading import loader
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.encoding import preprocessing
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.tasks.transformer import task
from qi2_jax.tasks.transformer.config import check_samples
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows.config import load_experiment
from tests.caches import write_cache
from tests.training.runs_of import VARYING

TINY = "experiments/demo.py:tiny"
OVERRIDES = [
    "data.mixture.tasks=(3, 1)",
    "data.mixture.conditions=(0, 1)",
    "transformer.batch_sizes=(6,)",
    "transformer.model.layers=1",
    "transformer.mesh.fsdp=1",
    "transformer.mesh.tensor=1",
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def make(side, conditions, tall):
        grid = (side // 8, side // 32) if tall else (side // 16, side // 16)
        lengths = tuple(rng.integers(1, 5, conditions + 1).tolist())
        texts = tuple(Text(draw(sum(lengths), 16), lengths) for _ in range(2))
        sources = tuple(draw(*grid, 8) for _ in range(conditions))
        return side, Sample(draw(*grid, 8), texts, sources, texts[0] if conditions else None)

    folder = tmp_path_factory.mktemp("data") / "samples"
    made = [make(64, conditions, tall) for conditions in (0, 2) for tall in (0, 1, 1)]
    data = load_experiment(TINY, OVERRIDES).data
    write_cache(folder, made, Text(draw(2, 16), (2,)), preprocessing(data))
    return Cache(folder)


def train(samples, out, steps, log_every=1):
    own = [f"transformer.train.steps={steps}", f"transformer.train.log_every={log_every}"]
    task.train_transformer(load_experiment(TINY, [*OVERRIDES, *own]), samples, out)
    lines = metrics.read(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(VARYING)} for line in lines]


def test_mixture_trains_in_its_shares_and_resumes(samples, tmp_path):
    whole = train(samples, tmp_path / "whole", 4)
    steps = [line for line in whole if "loss" in line]
    drawn = [(line["batch/side"], line["batch/conditions"]) for line in steps]
    assert sorted(drawn) == sorted([(64, count) for count in (0, 0, 0, 2)])
    assert all(np.isfinite(line["loss"]) and 0 < line["batch/tall"] < 1 for line in steps)
    validation = [line for line in whole if "validation_loss" in line]
    assert validation[0].keys() >= {f"validation_loss/{kind}/64-{count}" for kind in ("ema", "raw") for count in (0, 2)}
    for line in validation:
        of = {
            (kind, count): [line[f"validation_loss/{kind}_t/64-{count}/{place:02d}"] for place in range(9)]
            for kind in ("ema", "raw")
            for count in (0, 2)
        }
        for (kind, count), losses in of.items():
            assert np.mean(losses) == pytest.approx(line[f"validation_loss/{kind}/64-{count}"])
        by_time = np.mean([of["ema", 0], of["ema", 2]], axis=0)
        assert by_time == pytest.approx([line[f"validation_loss/ema_t/{place:02d}"] for place in range(9)])
    train(samples, tmp_path / "parts", 2)
    parts = [line for line in train(samples, tmp_path / "parts", 4) if "loss" in line]
    assert parts == steps


def test_short_texts_have_a_program_of_their_own_which_changes_no_loss(tmp_path, monkeypatch):
    """The same batches, padded to the smaller of two layouts where they fit, and all padded to the larger one."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    lengths = [3, 40, 4, 38, 5, 36]
    made = [(64, Sample(draw(2, 4, 8), (Text(draw(length, 16), (length,)),))) for length in lengths]
    own = ["data.mixture.tasks=(1, 0)", "data.mixture.conditions=(1,)", "transformer.dropout=0"]
    own += ["transformer.batch_sizes=(2,)", "transformer.train.steps=6", "transformer.train.log_every=1"]
    own += ["transformer.text_slots.layouts=2", "transformer.text_slots.window=3"]
    config = load_experiment(TINY, [*OVERRIDES, *own])
    write_cache(tmp_path / "samples", made, Text(draw(2, 16), (2,)), preprocessing(config.data))
    found = []
    for name in ("short", "padded"):
        task.train_transformer(config, Cache(tmp_path / "samples"), tmp_path / name)
        found.append([line for line in metrics.read(tmp_path / name / "metrics.jsonl") if "loss" in line])
        monkeypatch.setattr(loader, "smallest", lambda layouts, tokens: layouts[-1])
    np.testing.assert_allclose(*([line["loss"] for line in lines] for lines in found), rtol=1e-5)
    slots = [sum(line["slots_per_second"] * line["time/seconds"] for line in lines) for lines in found]
    # Sorted, the batches of a window have texts of 3 and 4, 5 and 36, 38 and 40 tokens, in layouts of 16 and 40.
    assert slots == pytest.approx([2 * 2 * (24 + 48 + 48), 2 * 2 * 3 * 48])


def test_padding_of_an_interval_is_the_share_of_all_of_its_slots(samples, tmp_path):
    """Steps with and without condition images have sequences of different lengths."""
    for log_every in (1, 4):
        train(samples, tmp_path / str(log_every), 4, log_every)
    each, (whole,) = (
        [line for line in metrics.read(tmp_path / str(log_every) / "metrics.jsonl") if "loss" in line]
        for log_every in (1, 4)
    )
    slots = [line["slots_per_second"] * line["time/seconds"] for line in each]
    assert max(slots) > 1.5 * min(slots)
    empty = np.dot(slots, [line["batch/padding"] for line in each])
    assert whole["batch/padding"] == pytest.approx(empty / np.sum(slots))
    assert whole["tokens_per_second"] == pytest.approx(whole["slots_per_second"] * (1 - whole["batch/padding"]))
    assert 1 - whole["batch/padding"] > whole["batch/useful"] > 0.5 * (1 - whole["batch/padding"])
    assert whole["batch/side"] == 64 and whole["batch/conditions"] == 0.5


def test_validation_reads_every_held_sample_once_however_many_rows_its_batches_have(tmp_path):
    """Three held-out samples fill batches of four and of two rows. The training sample is smaller than all of them."""
    rng, held_out = np.random.default_rng(0), "data.held_out=0.5"

    def make(width, held):
        draw = rng.normal(size=(2, width, 8)).astype(np.float32)
        return 64, Sample(draw, (Text(rng.normal(size=(3, 16)).astype(np.float32), (3,)),)), held

    data = load_experiment(TINY, [held_out]).data
    made = [make(2, True), make(4, True), make(6, True), make(2, False)]
    write_cache(tmp_path / "samples", made, Text(np.zeros((2, 16), np.float32), (2,)), preprocessing(data))
    found = []
    for batch in (4, 2):
        own = ["data.mixture.tasks=(1, 0)", "data.mixture.conditions=(1,)", f"transformer.batch_sizes=({batch},)"]
        config = load_experiment(TINY, [*OVERRIDES, *own, held_out, "transformer.train.steps=1"])
        task.train_transformer(config, Cache(tmp_path / "samples"), tmp_path / str(batch))
        found.append(metrics.read(tmp_path / str(batch) / "metrics.jsonl")[0]["validation_loss/raw/64-0"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    with pytest.raises(ValueError, match="encoded from other data or with other settings"):
        check_samples(load_experiment(TINY, OVERRIDES), Cache(tmp_path / "samples"))


def test_samples_that_the_config_does_not_describe_are_refused(samples, tmp_path):
    other = load_experiment(TINY, [*OVERRIDES, "data.max_cropped=0.1"])
    with pytest.raises(ValueError, match="encoded from other data or with other settings"):
        task.train_transformer(other, samples, tmp_path / "run")
    more = load_experiment(TINY, [*OVERRIDES, "data.mixture.conditions=(1, 1)"])
    with pytest.raises(ValueError, match=r"no samples for the streams \['64-1'\]"):
        task.train_transformer(more, samples, tmp_path / "run")
    assert not (tmp_path / "run").exists()
