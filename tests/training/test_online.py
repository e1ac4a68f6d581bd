"""Training that computes text features, or latents too, takes the same steps as with cached ones."""

import functools
import io
import itertools
import json
import pathlib
import re

import jax
import jax._src.monitoring
import numpy as np
import pytest
from PIL import Image

from data_pipeline.decoding.images import read_image
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import digest_of, write_shards
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.schema import NOTHING, ONLINE, TEXT, TEXT_AND_IMAGES
from data_pipeline.selection.index import INDEX, Kept, Selection, write_selection
from qi2_jax import sharding
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.tasks.transformer import batches, start, task
from qi2_jax.tasks.transformer.grids import drawing
from qi2_jax.text.prompts import resize_condition
from qi2_jax.training.compiled import Compiled
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows import encode
from qi2_jax.workflows.config import load_experiment
from tests.training import runs_of

OVERRIDES = [
    "encode.mesh.data=2",
    "data.ratios=('1:1','9:16')",
    "data.mixture.tasks=(1,1)",  # an edit, and pairs of two aspect ratios
    "transformer.model.layers=1",
    "transformer.dropout=0.5",
    "transformer.validation.samples=4",
    "transformer.mesh.fsdp=1",
    "transformer.mesh.tensor=1",
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Six pairs and two edits, all of them selected."""

    def encoded(seed, size):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(buffer, "PNG")
        return buffer.getvalue()

    folder = tmp_path_factory.mktemp("online") / "records"
    captions = ("a picture", "a much longer caption of another picture", "x")
    made, kept = [], []
    for index in range(8):
        size = ((150, 150), (90, 160))[index % 2]
        sources = (encoded(10 + index, (160, 150)),) if index >= 6 else ()
        caption = Caption(captions[index % 3], "instruction" if sources else "general")
        made.append(Record(f"{index}", encoded(index, size), (caption,), "test", conditions=sources))
        kept.append(Kept(f"{index}", index, *size, (0,), len(sources)))
    shards = write_shards(folder, made, records_per_shard=4)
    thresholds = load_experiment("experiments/demo.py:tiny").data.thresholds
    write_selection(folder / INDEX, Selection(thresholds, tuple(kept), {}, (), {}, {}, digest_of(shards)))
    return folder


@pytest.fixture(scope="module")
def caches(records, imported, tmp_path_factory):
    """The same samples for each value of `encode.online`."""
    made = {}
    for online in ONLINE:
        config = load_experiment("experiments/demo.py:tiny", [*OVERRIDES, f"encode.online={online}"])
        out = tmp_path_factory.mktemp("caches") / online
        report = encode.encode(config, records, records / INDEX, imported, out)
        assert report.streams == {"64-0": 6, "64-1": 2} and report.online == online
        made[online] = Cache(out)
        assert made[online].online == online
    return made


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    """Overrides that draw two samples of each stream, two prompts, and an edit."""
    image = tmp_path_factory.mktemp("images") / "image.png"
    pixels = np.random.default_rng(5).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    Image.fromarray(pixels).resize((100, 60)).save(image)
    drawn = {"every": 1000000, "count": 2, "steps": 2, "guidance": 3.0, "seed": 4}
    drawn |= {"prompts": ("a picture", "a lighthouse"), "edits": (("make it night", str(image)),)}
    return [f"transformer.samples.{key}={value!r}" for key, value in drawn.items()]


@pytest.fixture(scope="module")
def cached(caches, imported, grids, tmp_path_factory):
    """A run on cached samples, with its losses and grids."""
    out = tmp_path_factory.mktemp("runs") / NOTHING
    return out, *train(caches[NOTHING], imported, out, 4, *grids)


def train(cache, model, out, steps, *overrides):
    """Trains or resumes. Returns losses and validation losses by step, and grids by name."""
    config = load_experiment("experiments/demo.py:tiny", [*OVERRIDES, f"transformer.train.steps={steps}", *overrides])
    prepare = functools.partial(start.prepare_model_folder, config.transformer, cache, model, out)
    task.train_transformer(config, cache, out, prepare=prepare)
    found = {}
    for line in metrics.lines(out / metrics.FILE):
        for name in ("loss", "validation_loss"):
            if name in line:
                found[name, line["step"]] = line[name]
    drawings = {path.relative_to(out): np.asarray(Image.open(path), np.float32) for path in sorted(out.rglob("*.png"))}
    return found, drawings


@pytest.fixture
def compilations(monkeypatch):
    """The number of programs that were compiled before each update."""
    seen, counts = itertools.count(), []
    name = "/jax/core/compile/backend_compile_duration"

    def listener(event, duration, **_):
        if event == name:
            next(seen)

    update = Compiled.__call__

    def counted(self, *arguments):
        counts.append(int(re.search(r"\d+", repr(seen)).group()))
        return update(self, *arguments)

    monkeypatch.setattr(Compiled, "__call__", counted)
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield counts
    jax._src.monitoring.unregister_event_duration_listener(listener)


def test_losses_and_grids_are_those_of_cached_samples(caches, imported, cached, grids, tmp_path, compilations):
    _, expected, drawn = cached
    found, _ = train(caches[TEXT], imported, tmp_path / TEXT, 4)
    train(caches[TEXT_AND_IMAGES], imported, tmp_path / TEXT_AND_IMAGES, 1)
    resumed, own = train(caches[TEXT_AND_IMAGES], imported, tmp_path / TEXT_AND_IMAGES, 4, *grids)
    assert len(set(expected.values())) > 4
    assert {path.name for path in own} == {f"{name}-4.png" for name in ("64-0", "64-1", "prompts", "edits")}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
        assert resumed[key] == pytest.approx(value, rel=1e-5), key
    for name, pixels in own.items():
        np.testing.assert_allclose(pixels, drawn[name], atol=2)
        told = json.loads((tmp_path / TEXT_AND_IMAGES / name).with_suffix(".json").read_text())
        assert told == json.loads((cached[0] / name).with_suffix(".json").read_text())
        assert all(row["text"] for row in told["samples"])
    assert len(set(compilations[-3:])) == 1, "something was compiled after the first step"


def test_fixed_prompts_and_edits_are_drawn_as_the_saved_model_generates_them(cached, grids):
    out, _, drawn = cached
    asked = load_experiment("experiments/demo.py:tiny", grids).transformer.samples
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    pipeline = Pipeline.load(out, dtype=np.float32, mesh=mesh)
    options = {"negative": "", **{key: getattr(asked, key) for key in ("steps", "guidance", "seed")}}
    ((instruction, path),) = asked.edits
    condition = resize_condition(read_image(pathlib.Path(path)), 64)
    assert condition.size == (96, 64)
    found = {
        "prompts": (asked.prompts, [[image] for image in pipeline(asked.prompts, resolution=64, **options)]),
        "edits": (
            [instruction],
            [
                [
                    pipeline.decode(pipeline.encode(condition)),
                    *pipeline([instruction], images=[read_image(pathlib.Path(path))], resolution=64, **options),
                ]
            ],
        ),
    }
    for name, (texts, rows) in found.items():
        columns = ["condition 1", "sample"][-len(rows[0]) :]
        expected = drawing(columns, rows, [{"text": text} for text in texts]).pixels.astype(np.float32)
        before, after = (drawn[pathlib.Path("samples") / f"{name}-{step}.png"] for step in (0, 4))
        np.testing.assert_allclose(expected, after, atol=1, err_msg=name)
        assert abs(after - before).max() > 2, "training has changed nothing"


PROGRAM = """
import pathlib, sys
import jax
process, port, work, model = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
import numpy as np
from data_pipeline.samples.cache import Cache
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.mixture import layout_of
from qi2_jax import sharding
from qi2_jax.workflows.config import load_experiment
from qi2_jax.runtime.read_ahead import read_ahead
from qi2_jax.tasks.transformer import batches

config = load_experiment("experiments/demo.py:tiny").transformer
mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2))
summed = jax.jit(lambda batch: jax.tree.map(lambda leaf: leaf.sum(), batch))
found = {}
for name in ("nothing", "text_and_images"):
    cache = Cache(pathlib.Path(work) / name)
    inputs = batches.Inputs(config, cache, pathlib.Path(model), mesh)
    for stream in cache.streams:
        layout = layout_of(stream.largest, cache.empty.lengths)
        rows = sharding.local_rows(mesh, 4)
        loaded = Loader(stream, stream.lengths, cache.empty, (layout,), 4, 0, rows=rows).batches()
        for batch in read_ahead((inputs.complete_on_host(layout, loaded[step].batch) for step in range(3)), 2):
            assert len(batch.latents_BNC) == 2
            kept = batch.latents_BNC, batch.cond.conditions_BMC
            summed(sharding.put_batch(mesh, kept, 4))  # over both processes, while the next batch is encoded
            found.setdefault(name, []).append(kept)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found["nothing"], found["text_and_images"])
print("equal rows", process)
"""


def test_two_processes_encode_their_own_rows(caches, imported, tmp_path):
    for online in (NOTHING, TEXT_AND_IMAGES):
        (tmp_path / online).symlink_to(caches[online].folder)
    for process, printed in enumerate(runs_of.printed_by_two(PROGRAM, tmp_path, imported)):
        assert f"equal rows {process}" in printed


def test_encoders_that_samples_need_are_asked_for(caches, tmp_path):
    config = load_experiment("experiments/demo.py:tiny").transformer
    model = tmp_path / "model"
    with pytest.raises(ValueError, match=r"encode.online=text, but .* lacks \['text_encoder'\]; name the encoders"):
        batches.Inputs(config, caches[TEXT], model, None)
    (model / "text_encoder").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"encode.online=text_and_images, but .* lacks \['vae'\]"):
        batches.Inputs(config, caches[TEXT_AND_IMAGES], model, None)


def test_other_records_and_settings_are_refused(caches, records, imported, tmp_path):
    made = caches[NOTHING].folder
    for change, message in (
        ("encode.records_per_unit=4", "records_per_unit: 16384, expected 4"),
        ("encode.online=text_and_images", "online: 'nothing', expected 'text_and_images'"),
    ):
        config = load_experiment("experiments/demo.py:tiny", [*OVERRIDES, change])
        with pytest.raises(ValueError, match=message):
            encode.encode(config, records, records / INDEX, imported, made)
    write_shards(tmp_path / "others", [Record("a", b"b", (Caption("c"),), "test")], records_per_shard=4)
    config = load_experiment("experiments/demo.py:tiny", OVERRIDES)
    with pytest.raises(ValueError, match="selected from other records"):
        encode.encode(config, tmp_path / "others", records / INDEX, imported, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_samples_of_the_schema_before_say_what_is_online():
    for fingerprint, online in (({"text": "online"}, TEXT), ({"text": "cached"}, NOTHING), ({}, NOTHING)):
        cache = Cache.__new__(Cache)
        cache.fingerprint = fingerprint
        assert cache.online == online
