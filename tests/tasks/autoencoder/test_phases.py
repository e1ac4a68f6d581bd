"""The phases of a config: what they draw, and what cannot work, with the way out."""

import pytest

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
    assert "vae.later_phases.at_48 has no crops of" in caplog.text  # 3:1 is wider than all images


def test_a_ratio_is_as_frequent_as_images_that_fit_it(images):  # noqa: F811
    wide = images.chosen[0].__class__(0, images.chosen[0].bucket.__class__(96, 32), ())
    mixed = images.__class__(images.records, (*images.chosen[1:], wide), images.channels)
    _, later = make_phases(config("later_phases.at_48.shares.photographs=0"), mixed, range).phases
    frequencies = dict(zip(later.sizes, later.frequencies, strict=True))
    assert frequencies == {(48, 48): 8, (32, 80): 3} and later.shares == (1,)


def test_without_kinds_and_phases_all_images_are_drawn_alike(images):  # noqa: F811
    plain = load_experiment("experiments/demo.py:tiny").vae
    (phase,) = make_phases(plain, images, range).phases
    ((stream,),) = phase.streams
    assert stream.indices.tolist() == [*range(12)] and stream.seed == plain.seed and phase.sizes == ((32, 32),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("kinds.synthetic=('none/',)",), r"vae\.shares has a share for the kinds \['synthetic'\].*none/.*or add such"),
        (("later_phases.at_48.crop=96",), r"at_48: crops of 64x160, 96x96, 160x64 pixels fit no image, or not one of"),
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
    ],
)
def test_phases_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(*changes)


def test_the_published_form_rises_to_2048_pixels():
    phases = config(form="").phases
    assert [phase.crop for phase in phases.values()] == [256, 512, 1024, 2048]
    assert all(sum(height > width for height, width in phase.sizes) == 4 for phase in [*phases.values()][1:])
