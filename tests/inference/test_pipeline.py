"""Images from our pipeline against those from diffusers, with the same weights, prompts and noise, in fp32."""

import dataclasses
import functools
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from qi2_jax import sharding
from qi2_jax.diffusion import sampler
from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.inference import tiling
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.interop import folder
from qi2_jax.text import prompts
from qi2_torch import generate
from qi2_torch.load import load_pipeline
from tests import tiny_pipeline

RESOLUTION = 80  # images with sides of ratio 3 : 2 are resized to 96 x 64 pixels
SIZE, TALL, SQUARE = (96, 64), (64, 96), (64, 64)  # (width, height); the first two have equally many tokens
TEXT, NEGATIVE = "A red fox 🦊, reading “{a} book”.", "blurry, 模糊"
LONG = "An old lighthouse on a rock above a stormy sea at dawn, oil on canvas, with a ship and two gulls in the sky."


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    """PyTorch's threads waste time in spin locks when other processes occupy the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load_theirs(path):
    pipeline = load_pipeline(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_ours(path, devices=1):
    mesh = sharding.make_mesh(sharding.MeshShape(tensor=devices), jax.devices()[:devices])
    return Pipeline.load(path, dtype=jnp.float32, mesh=mesh)


@pytest.fixture(scope="module")
def theirs(published):
    return load_theirs(published)


@pytest.fixture(scope="module")
def ours(imported):
    return load_ours(imported)


def noise(*sizes, seed=0):
    """Initial noise of each size, [tokens, channels]."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(width * height // 256, tiny_pipeline.LATENT_CHANNELS)).astype(np.float32)
        for width, height in sizes
    ]


def random_image(mode, size, seed):
    """A smooth random image with an alpha channel that varies, converted to `mode`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def run_theirs(theirs, text, size, latents, *, negative=None, guidance=1.0, steps=3, images=()):
    width, height = size or (None, None)
    result = theirs(
        text,
        image=list(images) or None,
        negative_prompt=negative,
        true_cfg_scale=guidance,
        width=width,
        height=height,
        num_inference_steps=steps,
        latents=torch.from_numpy(latents)[None],
        output_resolution=RESOLUTION,
    )
    return np.asarray(result.images[0])


def run_ours(ours, text, size, latents, **options):
    sizes = None if size is None else [size]
    return ours([text], sizes=sizes, latents=latents[None], resolution=RESOLUTION, **{"steps": 3, **options})[0]


def assert_same_image(got, want):
    assert got.dtype == np.uint8 and got.shape == want.shape
    assert want.std() > 20, "an image that hardly varies proves nothing"
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize(("steps", "guidance", "negative"), [(2, 1.0, None), (5, 4.0, NEGATIVE), (3, 4.0, "")])
def test_parity_of_generation(ours, theirs, steps, guidance, negative):
    (latents,) = noise(SIZE)
    options = dict(steps=steps, guidance=guidance, negative=negative)
    want = run_theirs(theirs, TEXT, SIZE, latents, **options)
    assert want.shape == (64, 96, 4)  # RGBA
    assert_same_image(run_ours(ours, TEXT, SIZE, latents, **options), want)


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (4.0, NEGATIVE)])
@pytest.mark.parametrize("modes", [["RGBA"], ["RGB", "RGBA"]], ids=["one_image", "two_images"])
def test_parity_of_editing(ours, theirs, modes, guidance, negative):
    images = [
        random_image(mode, size, i) for i, (mode, size) in enumerate(zip(modes, [(45, 30), (30, 46)], strict=False))
    ]
    # Without a size, the result is as large as the last condition image after its resize.
    last = SIZE if len(images) == 1 else TALL
    (latents,) = noise(last)
    options = dict(images=images, guidance=guidance, negative=negative)
    want = run_theirs(theirs, TEXT, None, latents, **options)
    assert want.shape == (last[1], last[0], 4)
    got = run_ours(ours, TEXT, None, latents, **options)
    assert_same_image(got, want)
    without = run_ours(ours, TEXT, last, latents, guidance=guidance, negative=negative)
    assert np.abs(got.astype(int) - without.astype(int)).max() > 20, "the condition images have no effect"


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (4.0, NEGATIVE)])
def test_parity_of_a_batch_with_each_sample_alone(ours, theirs, guidance, negative):
    texts, sizes = [TEXT, LONG, ""], [SQUARE, TALL, SIZE]
    latents = noise(*sizes)
    longest = max(len(rows) for rows in latents)
    # The content of padding must not matter.
    padded = np.stack([np.pad(rows, ((0, longest - len(rows)), (0, 0)), constant_values=3.0) for rows in latents])
    got = ours(texts, sizes=sizes, latents=padded, guidance=guidance, negative=negative, steps=3)
    for text, size, rows, image in zip(texts, sizes, latents, got, strict=True):
        want = run_theirs(theirs, text, size, rows, guidance=guidance, negative=negative)
        assert_same_image(image, want)


@pytest.mark.parametrize(
    ("scheduler", "sigmas"),
    [
        (tiny_pipeline.SCHEDULER | {"shift_terminal": None}, None),
        (tiny_pipeline.SCHEDULER | {"time_shift_type": "linear", "base_shift": 1.5, "max_shift": 4.0}, None),
        ({"shift": 3.0, "use_dynamic_shifting": False}, None),
        ({"shift": 3.0, "shift_terminal": 0.1}, [0.9, 0.4]),
        (tiny_pipeline.SCHEDULER, [1.0, 0.75, 0.5, 0.25]),
    ],
    ids=["dynamic", "linear", "static", "static_to_terminal_by_sigmas", "fixed_sigmas"],
)
def test_parity_of_schedules(ours, theirs, monkeypatch, scheduler, sigmas):
    monkeypatch.setattr(theirs, "scheduler", type(theirs.scheduler)(**scheduler))
    changed = dataclasses.replace(ours, schedule=Schedule.from_diffusers(dict(theirs.scheduler.config), sigmas))
    (latents,) = noise(SIZE)
    theirs.register_to_config(sample_sigmas=sigmas)
    try:
        want = run_theirs(theirs, TEXT, SIZE, latents)
    finally:
        theirs.register_to_config(sample_sigmas=None)
    assert_same_image(run_ours(changed, TEXT, SIZE, latents), want)


def test_parity_of_a_folder_with_its_own_schedule(published, tmp_path):
    """Few-step models: fixed times in `model_index.json`, a static shift in the scheduler; sampled by `generate`."""
    source = tmp_path / "published"
    shutil.copytree(published, source)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": [1.0, 0.6]}))
    (source / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0})
    )
    folder.import_folder(source, tmp_path / "model")
    (latents,) = noise(SIZE)
    np.savez(tmp_path / "latents.npz", **{"0": latents})
    request = {
        "folder": str(source),
        "prompts": [TEXT],
        "sizes": [list(SIZE)],
        "negative": NEGATIVE,
        "guidance": 2.0,
        "steps": 40,
        "latents": str(tmp_path / "latents.npz"),
        "images": [],
        "resolution": RESOLUTION,
        "dtype": "float32",
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate", str(tmp_path / "request.json"), str(tmp_path / "out.npz")])
        generate.main()
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        want = out["0"]
    ours = load_ours(tmp_path / "model")
    assert len(ours.schedule.times(40, 24)) == 3
    assert_same_image(run_ours(ours, TEXT, SIZE, latents, negative=NEGATIVE, guidance=2.0, steps=40), want)


def test_parity_of_other_forms(tmp_path):
    """RGB images, and text modulated with the sampled time, for which the prefix cannot be cached."""
    source = tiny_pipeline.write(tmp_path / "published", image_channels=3, causal_condition=False)
    folder.import_folder(source, tmp_path / "model")
    (latents,) = noise(SIZE)
    want = run_theirs(load_theirs(source), TEXT, SIZE, latents)
    assert want.shape == (64, 96, 3)
    assert_same_image(run_ours(load_ours(tmp_path / "model"), TEXT, SIZE, latents), want)


def test_parity_on_eight_devices(imported, theirs):
    pipeline = Pipeline.load(imported, dtype=jnp.float32)
    weight = pipeline.transformer.blocks.mlp.up.weight[...]
    assert len(weight.sharding.device_set) == 8 and not weight.sharding.is_fully_replicated
    (latents,) = noise(SIZE)
    want = run_theirs(theirs, TEXT, SIZE, latents)
    assert_same_image(run_ours(pipeline, TEXT, SIZE, latents), want)


def test_prompts_of_similar_length_share_compiled_programs(ours):
    (latents,) = noise(SIZE)
    programs = (prompts.hidden_states.compiled(), sampler._prefill.compiled(), sampler._velocity.compiled())
    run_ours(ours, "A fox.", SIZE, latents)
    before = [program._cache_size() for program in programs]
    run_ours(ours, "A fox in the snow.", SIZE, latents, steps=4)
    assert [program._cache_size() for program in programs] == before


def test_large_images_are_decoded_and_encoded_in_tiles(ours, monkeypatch):
    latents = np.random.default_rng(0).normal(size=(4, 6, 16)).astype(np.float32)
    whole = ours.decode(latents)
    expected = ours.encode(Image.fromarray(whole))
    for name in ("decode_in_tiles", "encode_in_tiles"):
        monkeypatch.setattr(tiling, name, functools.partial(getattr(tiling, name), tile=32))
    monkeypatch.setattr(tiling, "MAX_DECODED_WHOLE", 95 * 64)
    monkeypatch.setattr(tiling, "MAX_ENCODED_WHOLE", 95 * 64)
    assert np.abs(ours.decode(latents).astype(int) - whole).max() <= 1
    np.testing.assert_allclose(ours.encode(Image.fromarray(whole)), expected, atol=1e-4)


def test_noise_follows_from_the_seed(ours):
    options = dict(sizes=[SIZE], steps=1, sigmas=[0.5])
    first, again, other = (ours([TEXT], seed=seed, **options)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other.astype(int)).max() > 20


@pytest.mark.parametrize("options", [{}, {"images": [Image.new("RGB", (45, 30), "teal")]}], ids=["texts", "edits"])
def test_an_image_does_not_depend_on_how_images_share_batches(ours, options):
    texts, sizes = [TEXT, LONG, "A fox.", ""], [SIZE, TALL, SQUARE, SIZE]
    options = dict(sizes=sizes, resolution=RESOLUTION, steps=2, seed=7) | options
    first, *others = [list(ours.in_batches(texts, batch_size=size, **options)) for size in (1, 2, 3)]
    for images in others:
        for got, want in zip(images, first, strict=True):
            assert_same_image(got, want)
    # Image i can be generated alone with the seed of the list plus i.
    alone = ours([texts[2]], **options | {"sizes": [sizes[2]], "seed": 9})[0]
    np.testing.assert_array_equal(alone, first[2])
    assert np.abs(first[0].astype(int) - first[3].astype(int)).max() > 20, "two images have the same noise"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sizes=[(96, 80)]), "96x80 must have sides that are multiples of 32"),
        (dict(sizes=[(96, 0)]), "96x0"),
        (dict(sizes=[(1_000_000_000, 32)]), "up to 8192"),
        (
            dict(sizes=[SIZE], latents=np.zeros((1, 25, 16))),
            r"\(1, 25, 16\), these prompts and sizes need \(1, 24, 16\)",
        ),
        (dict(images=[Image.new("RGB", (90, 1))], resolution=80), "no side left"),
        (dict(sizes=[SIZE], steps=0), "at least 1, got 0"),
    ],
)
def test_requests_that_are_refused(ours, options, message):
    with pytest.raises(ValueError, match=message):
        ours([TEXT], **options)


def test_images_that_the_processor_would_resize_again_are_refused(ours, monkeypatch):
    monkeypatch.setitem(ours.processor.image_processor.size, "longest_edge", 64 * 64)
    with pytest.raises(ValueError, match=r"image of 96x64 pixels to .* areas up to 4096 .* at most 64"):
        run_ours(ours, TEXT, None, *noise(SIZE), images=[random_image("RGB", (45, 30), 0)])
