"""The phases of a config: what they draw, and what cannot work, with the way out."""

import dataclasses

import pytest

from data_pipeline.buckets import Bucket
from qi2_jax.tasks.autoencoder.phases import make_phases
from qi2_jax.workflows.config import load_experiment
from tests.tasks.autoencoder.test_task import images  # noqa: F401

FORM = "experiments/qwen_image_2/autoencoder.py"


def config(*changes, form=":tiny"):
    return load_experiment(FORM + form, [f"vae.{change}" for change in changes]).vae


def made(images, *changes):  # noqa: F811
    return make_phases(config(*changes), images, range).phases


def test_kinds_are_drawn_by_their_shares_from_the_images_that_are_large_enough(images, caplog):  # noqa: F811
    caplog.set_level("INFO")
    first, later = made(images)
    assert (first.start, first.sizes, first.shares) == (0, ((32, 32),), (3, 1))
    assert (later.start, later.sizes, later.shares, later.batch_size) == (40, ((48, 48),), (1, 1), 8)
    for phase in (first, later):
        (streams,) = phase.streams
        assert [sorted(stream.indices.tolist()) for stream in streams] == [
            [1, 2, 4, 5, 7, 8, 10, 11],
            [0, 3, 6, 9],
        ]
    seeds = [stream.seed for phase in (first, later) for (streams,) in (phase.streams,) for stream in streams]
    assert len({*seeds, *(seed + 1 for seed in seeds)}) == 2 * len(seeds)
    assert [stream.mirrored for streams in first.streams for stream in streams] == [0.5, 0.0]  # photographs, synthetic
    missing = "0 of 8 images of the kind 'photographs' and 0 of 4 images of the kind 'synthetic' are as large"
    assert f"vae.later_phases.at_48 has no crops of 80x32 pixels, because {missing}" in caplog.text


def test_a_ratio_is_as_frequent_as_images_that_fit_it(images):  # noqa: F811
    wide = images.chosen[0].__class__(0, images.chosen[0].bucket.__class__(96, 32), ())
    mixed = images.__class__(images.records, (*images.chosen[1:], wide), images.channels)
    _, later = make_phases(config("later_phases.at_48.shares.photographs=0"), mixed, range).phases
    frequencies = dict(zip(later.sizes, later.frequencies, strict=True))
    assert frequencies == {(48, 48): 8, (32, 80): 3} and later.shares == (1,)


def test_a_ratio_that_few_images_fit_is_left_out(images, caplog):  # noqa: F811
    caplog.set_level("INFO")
    plain = dataclasses.replace(load_experiment("experiments/demo.py:tiny").vae, crop=48, ratios=("1:1", "3:1"))
    square, wide = images.chosen[0], dataclasses.replace(images.chosen[1], bucket=Bucket(96, 32))
    for count, frequencies in ((15, {(48, 48): 8, (32, 80): 1}), (17, {(48, 48): 1})):
        chosen = dataclasses.replace(images, chosen=(*[square] * count, wide))
        crops = make_phases(plain, chosen, range)
        assert dict(zip(crops.phases[0].sizes, crops.phases[0].frequencies, strict=True)) == frequencies
        assert crops.used == [*range(count + (len(frequencies) > 1))]
    assert "no crops of 80x32 pixels, because only 1 of 18 images are as large" in caplog.text
    assert "1 of 18 images are smaller than its crops and not used" in caplog.text and "of 16 " not in caplog.text


def test_without_kinds_and_phases_all_images_are_drawn_alike(images):  # noqa: F811
    plain = load_experiment("experiments/demo.py:tiny").vae
    (phase,) = make_phases(plain, images, range).phases
    ((stream,),) = phase.streams
    assert stream.indices.tolist() == [*range(12)] and stream.seed == plain.seed and phase.sizes == ((32, 32),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("kinds.synthetic=('none/',)",),
            r"vae\.shares .* the kind 'synthetic' \(labels that begin with 'none/'\), but 0 of the 12 .*or add such",
        ),
        (
            ("kinds.synthetic=('source/',)",),
            r"vae\.shares has a share for the kind 'photographs' \(images of no other kind\), but 0 of the 12 ",
        ),
        (
            ("later_phases.at_48.crop=96",),
            r"at_48 has no crops of 64x160 pixels, because 0 of 8 images of the kind 'photographs' and 0 .*smaller",
        ),
    ],
)
def test_images_that_a_phase_lacks_are_named(images, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        made(images, *changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("later_phases.at_48.crop=40",), r"vae\.later_phases\.at_48\.crop is 40; it must be a multiple of 16"),
        (
            ("later_phases.at_48.start=0",),
            r"vae\.later_phases start after \[0\] updates; these must be above 0 and differ",
        ),
        (("later_phases.at_48.ratios=('wide',)",), r"at_48: ratio 'wide' must be width:height"),
        (("later_phases.at_48.ratios=()",), r"at_48\.ratios is \(\); name at least one"),
        (("shares.synthetic=-1",), r"vae.*shares are at least 0"),
        (("shares.synthetic=0", "shares.photographs=0"), r"vae.*not all 0"),
        (("kinds.synthetic=()",), r"vae.* both have images of no other kind"),
        (("shares.photographs=1", "batch_size=0"), r"batch_size is 0"),
        (("kinds.photographs=('a','a')",), r"vae.*kind 'photographs' has the beginning 'a' twice"),
        (("unmirrored_kinds=('none',)",), r"unmirrored_kinds has \['none'\]; name some of kinds, \['photographs'"),
    ],
)
def test_phases_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(*changes)


def test_kinds_with_names_of_other_metrics_are_refused():
    plain = load_experiment("experiments/demo.py:tiny").vae
    with pytest.raises(ValueError, match=r"kinds has \['phase'\], but the metrics batch/phase .*; rename these kinds"):
        dataclasses.replace(plain, kinds={"phase": ()}, shares={"phase": 1})
    with pytest.raises(ValueError, match=r"kinds has 'raw', but the metrics validation_loss/raw .*rename this kind"):
        dataclasses.replace(plain, kinds={"raw": ()}, shares={"raw": 1})


def test_the_published_form_rises_to_2048_pixels():
    phases = config(form="").phases
    assert [phase.crop for phase in phases.values()] == [256, 512, 1024, 2048]
    assert all(sum(height > width for height, width in phase.sizes) == 4 for phase in [*phases.values()][1:])
