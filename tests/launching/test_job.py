"""What a job refuses before anything is submitted, and what every process of it runs."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qi2_jax.launching import environment, folders, names, topology
from qi2_jax.launching.job import Inputs
from qi2_jax.sharding import MeshShape
from tests.launching import jobs

HOSTILE = (
    "",
    "A",
    "1a",
    "-a",
    "a-",
    "a_b",
    "a.b",
    "a b",
    "a\nb",
    "ä",
    "a;rm",
    "$(id)",
    "`id`",
    'a"b',
    "a" * 64,
    "../a",
)
SLICES = sorted(
    [f"{kind}:{a}x{b}" for kind in ("v5e", "v6e") for a, b in topology.KINDS["v6e"].shapes]
    + ["v5p:2x2x1", "v5p:2x4x4", "v5p:4x4x4", "v5p:8x8x16", "v5p:16x16x24"]
)


@given(st.sampled_from(SLICES))
def test_a_slice_has_four_chips_per_host(text):
    parsed = topology.parse_slice(text)
    assert str(parsed) == text
    assert parsed.chips == 4 * parsed.hosts == math.prod(map(int, text.partition(":")[2].split("x")))


@settings(max_examples=30)
@given(st.from_regex(r"(v5e|v5p|v6e|v4|h100|)(:[0-9]{0,5}(x[0-9]{0,2}){0,3})?", fullmatch=True))
def test_any_other_text_is_refused_with_an_example_or_is_a_slice(text):
    try:
        assert topology.parse_slice(text).hosts >= 1
    except ValueError as error:
        assert repr(text) in str(error) and "x" in str(error)


@pytest.mark.parametrize(
    ("text", "accelerator", "machine"),
    [("v6e:16x16", "v6e-256", "ct6e"), ("v5e:8x16", "v5litepod-128", "ct5lp"), ("v5p:4x4x8", "v5p-256", "ct5p")],
)
def test_accelerator_types_count_as_google_does(text, accelerator, machine):
    parsed = topology.parse_slice(text)
    assert parsed.accelerator_type == accelerator and parsed.kind.machine_type.startswith(machine)


@pytest.mark.parametrize("text", ["", "8", "h100", "h100:0", "h100:x", "v6e:8", "H100:8", "h100:8;id"])
def test_gpus_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="h100:8"):
        topology.parse_node(text)


def test_a_mesh_of_another_size_is_refused_with_both_ways_out():
    with pytest.raises(ValueError, match=r"1,024 chips.* has 512; use --slices 4, or transformer\.mesh\.data=2$"):
        jobs.tpu(slices=2)
    with pytest.raises(ValueError, match=r"use transformer\.mesh\.data, \.fsdp and \.tensor with a product of 64$"):
        jobs.tpu(hardware=topology.parse_slice("v6e:8x8"), slices=1, mesh=MeshShape(1, 3, 1))


def test_batches_split_over_the_mesh():
    jobs.tpu(batch_sizes=(4096, 2048))
    with pytest.raises(ValueError, match=r"a batch of 512 images over data x fsdp = 1,024 chips; use fewer chips"):
        jobs.tpu(batch_sizes=(4096, 512))


def test_only_data_crosses_slices():
    with pytest.raises(ValueError, match="does not split over 4 slices"):
        jobs.tpu(mesh=MeshShape(2, 512, 1))
    jobs.gpu(mesh=MeshShape(1, 16, 1))  # nodes with GPUs have no such limit


@given(st.sampled_from(SLICES), st.integers(1, 8))
def test_a_mesh_that_fits_is_accepted(text, slices):
    hardware = topology.parse_slice(text)
    job = jobs.tpu(hardware=hardware, slices=slices, mesh=MeshShape(slices, hardware.chips, 1))
    assert job.chips == slices * hardware.chips


@pytest.mark.parametrize("text", HOSTILE)
def test_names_that_a_cluster_refuses(text):
    with pytest.raises(ValueError, match="RFC 1123"):
        jobs.tpu(name=text)


@given(st.text(max_size=60))
def test_the_name_of_any_file_becomes_a_label_or_is_empty(text):
    label = names.label_of(text)
    assert not label or label[0].isdigit() or names.check_label("--name", label, names.MAX_NAME) == label


@pytest.mark.parametrize("text", ["/absolute", "../out", "a/../b", "a//b", "a b", "a;b", "$HOME", "-rf", "~/a", "a\nb"])
def test_paths_stay_in_their_folder(text):
    with pytest.raises(ValueError, match="--out is"):
        Inputs(out=text)


WRONG_BUCKETS = ("gs://", "gs:///a", "gs://B/a", "gs://b/a", "gs://bucket/../a", "gs://bucket/a b", "gs://bucket/a,ro")
WRONG_EXPORTS = ("nfs://server", "nfs://server/", "nfs://ser ver/a", "nfs://$(id)/a")
WRONG_PATHS = ("", "s3://bucket/a", "relative", "/", "/a/../b", "/a;id")


@pytest.mark.parametrize("text", [*WRONG_BUCKETS, *WRONG_EXPORTS, *WRONG_PATHS])
def test_folders_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="--work is"):
        folders.parse("--work", text)


@pytest.mark.parametrize("text", ["gs://bucket", "gs://my-bucket/a/b", "nfs://10.0.0.2/share/qi2", "/shared/qi2"])
def test_folders_print_as_they_are_written(text):
    assert str(folders.parse("--work", text)) == text and str(folders.parse("--work", f"{text}/")) == text


@pytest.mark.parametrize("text", ["qi2", "qi2:", "QI2:1", "qi2:1 --privileged", "qi2:$(id)", "qi2@sha256:12"])
def test_images_need_a_tag_or_a_digest(text):
    with pytest.raises(ValueError, match="tag or digest"):
        jobs.tpu(image=text)


@pytest.mark.parametrize("text", ["/experiments/s1.py", "../s1.py", "a b.py", "s1.py;id", "s1.py\n"])
def test_the_experiment_is_in_the_image(text):
    with pytest.raises(ValueError, match="root of the repository"):
        jobs.tpu(experiment=text)


def test_every_process_runs_the_same_command_with_the_folders_of_its_host():
    job = jobs.tpu(cache=folders.parse("--cache", "gs://bucket/cache"), compiled=folders.parse("", "gs://bucket/c"))
    assert job.command("/w", "/c") == [
        *("qi2", "train", job.experiment, "--samples", "/c/samples/s1", "--model", "/w/model", "--out", "/w/runs/s1"),
        *("--distributed", "transformer.train.steps=10", "compilation_cache=gs://bucket/c"),
    ]


def test_every_variable_has_one_value_on_a_target_and_a_reason():
    for target in environment.TARGETS:
        chosen = environment.variables(target)
        assert len({each.name for each in chosen}) == len(chosen)
    assert all(
        each.reason.endswith(".") and set(each.targets) <= set(environment.TARGETS) for each in environment.VARIABLES
    )
