"""Published folders as people have them: variants, caches, partial downloads, and folders of other kinds."""

import json
import os
import pathlib
import shutil

import pytest

from qi2_jax.interop import components, folder, published_files
from tests.interop import safetensors_bytes

INDEX = ".safetensors.index.json"


@pytest.fixture
def source(published, tmp_path):
    """A copy of the published folder; its files are links to the original, to be renamed and not changed."""
    out = tmp_path / "published"
    shutil.copytree(published, out, copy_function=os.link, ignore=shutil.ignore_patterns("tokenizer.json"))
    return out


def stem_of(name: str) -> str:
    return components.COMPONENTS[name].stem


def add_variant(source: pathlib.Path, name: str, variant: str, *, sharded: bool = False, keep: bool = False) -> None:
    """Renames the weights of a component to those of a variant."""
    stem, place = stem_of(name), source / name
    found = safetensors_bytes.read(place / f"{stem}.safetensors")
    if not keep:
        (place / f"{stem}.safetensors").unlink()
    if not sharded:
        safetensors_bytes.write_tensors(place / f"{stem}.{variant}.safetensors", found)
        return
    shards = [f"{stem}.{variant}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {key: shards[index % 2] for index, key in enumerate(sorted(found))}
    for shard in shards:
        own = {key: found[key] for key in found if places[key] == shard}
        safetensors_bytes.write_tensors(place / shard, own)
    (place / f"{stem}.safetensors.index.{variant}.json").write_text(json.dumps({"weight_map": places}))


def imported_tensors(source, out, variant=None):
    report = folder.import_folder(source, out, variant)
    return report, {name: safetensors_bytes.read_folder(out / name) for name in components.COMPONENTS}


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_only_variant_is_read(source, imported, tmp_path, variant, sharded):
    for name in components.COMPONENTS:
        add_variant(source, name, variant, sharded=sharded)
    report, found = imported_tensors(source, tmp_path / "out")
    assert found == {name: safetensors_bytes.read_folder(imported / name) for name in components.COMPONENTS}
    assert report.unread == () and report.left_out == ()
    assert not list((tmp_path / "out").rglob("*.index.*"))


def test_the_default_is_read_beside_a_variant_and_the_variant_on_demand(source, imported, tmp_path):
    add_variant(source, "vae", "fp16", keep=True)
    path = source / "vae" / f"{stem_of('vae')}.fp16.safetensors"
    other = safetensors_bytes.read(path)
    key = "decoder.conv_in.bias"
    other[key] = (*other[key][:2], bytes(len(other[key][2])))
    safetensors_bytes.write_tensors(path, other)
    report, found = imported_tensors(source, tmp_path / "default")
    assert found["vae"] == safetensors_bytes.read_folder(imported / "vae")
    assert report.unread == (f"vae/{path.name}",) and path.name in folder.describe(report)
    # The other components have no such variant: diffusers takes their default, too.
    report, chosen = imported_tensors(source, tmp_path / "chosen", "fp16")
    assert report.unread == (f"vae/{stem_of('vae')}.safetensors",)
    assert chosen["transformer"] == found["transformer"] and chosen["vae"] != found["vae"]


def test_several_variants_ask_for_a_choice(source, tmp_path):
    add_variant(source, "vae", "fp16", keep=True)
    add_variant(source, "vae", "bf16")
    with pytest.raises(ValueError, match=r"vae has the variants \['bf16', 'fp16'\]; choose one with --variant"):
        folder.import_folder(source, tmp_path / "out")
    folder.import_folder(source, tmp_path / "out", "bf16")
    with pytest.raises(ValueError, match=r"no component of .* has the variant 'fp8'; .* \['bf16', 'fp16'\]"):
        folder.import_folder(source, tmp_path / "other", "fp8")


def test_names_of_variants(tmp_path):
    for name in (
        "m.safetensors",
        "m-00001-of-00002.safetensors",
        "m.fp16-00001-of-00002.safetensors",
        "m.safetensors.index.fp16.json",
        "m.bf16.safetensors.index.json",
        "other.safetensors",
        "m.bin",
    ):
        (tmp_path / name).write_text("")
    found = {
        variant: [path.name for path in paths] for variant, paths in published_files.variants(tmp_path, "m").items()
    }
    assert found == {
        "": ["m.safetensors"],
        "fp16": ["m.safetensors.index.fp16.json"],
        "bf16": ["m.bf16.safetensors.index.json"],
    }


def refused(source: pathlib.Path, *messages: str) -> None:
    with pytest.raises(ValueError) as caught:
        folder.import_folder(source, source.parent / "out")
    for message in messages:
        assert message in str(caught.value)
    assert not (source.parent / "out").exists()


def test_places_that_are_no_pipeline_folder(source, imported, tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist", "model_index.json")
    (tmp_path / "model.safetensors").write_text("")
    refused(tmp_path / "model.safetensors", "model.safetensors is a file")
    refused(source / "transformer", "is a single model (QwenImage21Transformer2DModel)", "folder of the whole pipeline")
    refused(source / "text_encoder", "is a single model (['Qwen3VLForConditionalGeneration'])")
    refused(source.parent, f"it is in {source}; give that folder")
    shutil.copytree(imported, tmp_path / "model", copy_function=os.link)
    refused(tmp_path / "model", "is a model folder already")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    refused(tmp_path / "photos", "model_index.json does not exist", "photos contains a.jpg")


def test_a_cache_of_the_hub_names_its_snapshots(source, tmp_path):
    cache = tmp_path / "hub"
    snapshot = cache / "models--Qwen--Qwen-Image-2.1" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    refused(cache, "is a cache of the Hugging Face hub; give a snapshot in it", str(snapshot))
    refused(snapshot.parent.parent, str(snapshot))
    folder.import_folder(snapshot, tmp_path / "out")


def test_partial_downloads_are_listed(source):
    weights = source / "vae" / f"{stem_of('vae')}.safetensors"
    weights.unlink()
    weights.write_bytes(published_files.LFS_POINTER + b"v1\noid sha256:00\nsize 1\n")
    config = source / "scheduler" / "scheduler_config.json"
    config.unlink()
    config.symlink_to("../../blobs/0123")
    (source / "transformer" / "x.safetensors.incomplete").write_text("")
    refused(
        source,
        f"vae/{weights.name} (a Git LFS pointer instead of the file; run `git lfs pull`)",
        "scheduler/scheduler_config.json (a link to ../../blobs/0123, which does not exist)",
        "x.safetensors.incomplete (a partial download)",
    )


@pytest.mark.parametrize(
    ("files", "messages"),
    [
        ((), ["neither diffusion_pytorch_model.safetensors nor", "vae contains config.json"]),
        (("diffusion_pytorch_model.bin",), ["only safetensors", "['diffusion_pytorch_model.bin'] can run code"]),
        (("diffusion_pytorch_model-00001-of-00002.safetensors",), ["the index of the shards", "is missing"]),
        (("vae-ft.safetensors",), ["contains config.json, vae-ft.safetensors"]),
    ],
)
def test_components_without_weights_that_are_read(source, files, messages):
    (source / "vae" / f"{stem_of('vae')}.safetensors").unlink()
    for name in files:
        (source / "vae" / name).write_text("x")
    refused(source, *messages)


def test_a_missing_configuration_is_reported_with_what_is_there(source):
    (source / "vae" / "config.json").unlink()
    refused(source, "vae/config.json does not exist", "vae contains diffusion_pytorch_model.safetensors")
    shutil.rmtree(source / "vae")
    refused(
        source, "vae/config.json does not exist", "the folder", "vae does not exist", "model_index.json, processor/"
    )
