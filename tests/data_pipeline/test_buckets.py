import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_pipeline.buckets import RATIOS, Bucket, Buckets, Resolutions, crop_box

SIDES = (256, 512, 640, 1024, 2048)
STAGES = {side: Buckets.for_area(side) for side in SIDES}
side = st.sampled_from(SIDES)
length = st.one_of(st.integers(1, 5000), st.integers(1, 1_000_000))


@pytest.mark.parametrize(
    ("side", "tokens"), [(256, (252, 280)), (512, (1008, 1040)), (640, (1536, 1680)), (1024, (3960, 4144))]
)
def test_token_counts_of_a_stage(side, tokens):
    stage = STAGES[side]
    assert len(stage.sizes) == len(RATIOS)
    assert (min(size.tokens for size in stage.sizes), stage.max_tokens) == tokens


@given(st.integers(32, 4096), st.sampled_from([16, 32, 64]))
def test_sides_lie_on_the_grid_and_areas_near_the_target(side, multiple):
    if side < multiple:
        with pytest.raises(ValueError, match="below the grid"):
            Buckets.for_area(side, multiple=multiple)
        return
    stage = Buckets.for_area(side, multiple=multiple)
    assert len(set(stage.sizes)) == len(stage.sizes) <= len(RATIOS)
    for size in stage.sizes:
        assert size.width % multiple == size.height % multiple == 0
        assert Bucket(size.height, size.width) in stage.sizes
        if side >= 8 * multiple:  # rounding moves each side by at most half a step, of at least side / sqrt(3)
            step = multiple * 3**0.5 / 2 / side
            assert (1 - step) ** 2 <= size.width * size.height / side**2 <= (1 + step) ** 2
    assert sorted(size.log_aspect for size in stage.sizes) == [size.log_aspect for size in stage.sizes]


@settings(max_examples=300)
@given(side, length, length)
def test_every_size_gets_a_bucket_or_a_reason(side, width, height):
    stage = STAGES[side]
    fit = stage.fit(width, height)
    assert fit.bucket in stage.sizes
    assert fit.bucket == stage.assign(width, height)
    assert 0 <= fit.cropped < 1
    used = fit.scale <= stage.max_upscale and fit.cropped <= stage.max_cropped
    assert (fit.left_out is None) == used
    left, top, right, bottom = crop_box(width, height, fit.bucket)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(fit.bucket.width / fit.bucket.height, rel=1e-6)
    assert (right - left) * fit.scale == pytest.approx(fit.bucket.width)
    assert left == pytest.approx(width - right, abs=1e-6 * width)


@settings(max_examples=300)
@given(side, length, length)
def test_swapping_the_sides_mirrors_everything(side, width, height):
    one, other = STAGES[side].fit(width, height), STAGES[side].fit(height, width)
    assert (one.bucket.width, one.bucket.height) == (other.bucket.height, other.bucket.width)
    assert (one.scale, one.left_out) == (other.scale, other.left_out)
    assert one.cropped == pytest.approx(other.cropped, abs=1e-12)


@given(side, st.floats(1 / 3, 3), st.integers(0, 3000))
def test_ordinary_images_are_used(side, aspect, extra):
    """What passes the default thresholds of the stage's resolution is never lost to cropping."""
    height = int(3 * side / min(1, aspect)) + extra
    assert STAGES[side].fit(max(1, round(height * aspect)), height).left_out is None


def test_image_of_the_size_of_its_bucket_is_used():
    fit = STAGES[256].fit(256, 256)
    assert (fit.scale, fit.cropped, fit.left_out) == (1, 0, None)


def test_limits_are_reported():
    stage = Buckets.for_area(256, max_upscale=1.25)
    sizes = [(256, 256), (300, 300), (225, 225), (100, 100), (512, 512), (2000, 200), (800, 600)]
    report = stage.report(sizes)
    assert report.counts | {"256x256": 4, "288x224": 1} == report.counts
    assert sum(report.counts.values()) == 5
    assert (report.seen, report.upscaled) == (7, 1)
    assert report.left_out.counts == {"upscaled_too_much": 1, "cropped_too_much": 1}
    assert report.mean_cropped == pytest.approx(stage.fit(800, 600).cropped / 5)
    assert json.loads(json.dumps(report.to_dict()))["left_out"]["cropped_too_much"]["examples"] == ["2000x200"]
    console = Console(width=200, file=io.StringIO())
    console.print(report.table())
    text = console.file.getvalue()
    assert "288x224" in text and "cropped_too_much" in text
    assert stage.report([]).mean_cropped == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": 16}, "below the grid"),
        ({"side": 256, "multiple": 24}, "multiple 24"),
        ({"side": 256, "ratios": ("16x9",)}, "'16x9'"),
        ({"side": 256, "ratios": ("0:1",)}, "'0:1'"),
        ({"side": 256, "ratios": ()}, "at least one"),
        ({"side": 256, "max_cropped": 1.0}, "max_cropped"),
        ({"side": 256, "max_upscale": 0}, "max_upscale"),
    ],
)
def test_impossible_stages(arguments, message):
    with pytest.raises(ValueError, match=message):
        Buckets.for_area(**arguments)


def test_image_without_pixels():
    with pytest.raises(ValueError, match="0 x 5"):
        STAGES[256].assign(0, 5)


def test_an_image_goes_to_the_largest_area_that_it_fills():
    resolutions = Resolutions(tuple((side, Buckets.for_area(side)) for side in (256, 512, 1024)))
    for size, side, bucket in (
        ((1024, 1024), 1024, "1024x1024"),
        ((4000, 3000), 1024, "1184x896"),
        ((1023, 1023), 512, "512x512"),
        ((300, 300), 256, "256x256"),
    ):
        ((found, fit),) = resolutions.fits(*size)
        assert (found, str(fit.bucket), fit.left_out) == (side, bucket, None)
    ((found, fit),) = resolutions.fits(200, 200)
    assert (found, fit.left_out) == (256, "upscaled_too_much")
    report = resolutions.report([(1024, 1024), (1023, 1023), (300, 300), (200, 200)])
    assert (report.seen, sum(report.counts.values()), report.left_out.counts) == (4, 3, {"upscaled_too_much": 1})
    also = Resolutions(resolutions.areas, smaller_too=True)
    assert [side for side, _ in also.fits(1023, 1023)] == [512, 256]
    report = also.report([(1024, 1024), (300, 300), (200, 200)])
    assert (sum(report.counts.values()), report.left_out.counts) == (4, {"upscaled_too_much": 1})
    with pytest.raises(ValueError, match="ascending"):
        Resolutions(((512, Buckets.for_area(512)), (256, Buckets.for_area(256))))
