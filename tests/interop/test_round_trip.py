"""Import and export of a published folder reproduce every byte, and PyTorch loads our exports."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch

from qi2_jax.interop import components, folder, stored_weights
from qi2_jax.runtime import dtypes
from qi2_torch.load import load_pipeline
from tests import tiny_pipeline
from tests.interop import safetensors_bytes

SHARDS, SHARD_BYTES = "50KB", 50_000


@pytest.fixture(scope="module")
def folders(published, tmp_path_factory):
    """Published folders by dtype and by single or sharded files."""
    root = tmp_path_factory.mktemp("forms")
    return {
        "F32 single": published,
        "F32 sharded": tiny_pipeline.write(root / "f32", max_shard_size=SHARDS),
        "BF16 single": tiny_pipeline.write(root / "bf16", torch.bfloat16),
        "BF16 sharded": tiny_pipeline.write(root / "bf16_sharded", torch.bfloat16, max_shard_size=SHARDS),
    }


def other_files(path: pathlib.Path) -> dict[str, bytes]:
    """All files except weights and their index."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not file.name.endswith((".safetensors", ".index.json"))
    }


@pytest.mark.parametrize("form", ["F32 single", "F32 sharded", "BF16 single", "BF16 sharded"])
def test_round_trip_gives_back_every_byte(folders, form, tmp_path):
    source, ours, out = folders[form], tmp_path / "ours", tmp_path / "out"
    code, is_sharded = form.split()[0], form.endswith("sharded")
    report = folder.import_folder(source, ours)
    assert report.left_out == ()
    # Exported in the other form, because the division into files must not matter.
    folder.export_folder(ours, out, max_shard_bytes=10**9 if is_sharded else SHARD_BYTES)
    for name, component in components.COMPONENTS.items():
        before, after = safetensors_bytes.read_folder(source / name), safetensors_bytes.read_folder(out / name)
        assert before == after
        assert {tensor[0] for tensor in before.values()} == {code}
        assert (source / name / f"{component.stem}.safetensors.index.json").is_file() is is_sharded
        assert (out / name / f"{component.stem}.safetensors.index.json").is_file() is not is_sharded
        assert report.parameters[name] == sum(np.prod(shape, dtype=int) for _, shape, _ in before.values())
        assert report.bytes[name] == sum(len(data) for *_, data in before.values())
    assert other_files(source) == other_files(out)
    assert other_files(ours) == other_files(source) | {folder.MARK: (ours / folder.MARK).read_bytes()}


def test_round_trip_covers_tensors_that_our_models_do_not_use(published):
    """Ensures that the test above covers them."""
    assert "model.language_model.norm.weight" in safetensors_bytes.read_folder(published / "text_encoder")
    assert "lm_head.weight" in safetensors_bytes.read_folder(published / "text_encoder")
    time = [name for name in safetensors_bytes.read_folder(published / "vae") if "time_conv" in name]
    assert len(time) == 2 * 2 * 3  # weight and bias, encoder and decoder, three levels that halve time


def test_round_trip_of_ours(folders, imported, tmp_path):
    """Shards that we wrote give the same model folder as those of the published code."""
    folder.export_folder(imported, tmp_path / "sharded", max_shard_bytes=SHARD_BYTES)
    folder.import_folder(tmp_path / "sharded", tmp_path / "again")
    for name in components.COMPONENTS:
        again = safetensors_bytes.read_folder(tmp_path / "again" / name)
        assert again == safetensors_bytes.read_folder(imported / name)


def test_round_trip_of_shards_keeps_to_their_size(imported, tmp_path):
    folder.export_folder(imported, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    for name, component in components.COMPONENTS.items():
        index = json.loads((tmp_path / "out" / name / f"{component.stem}.safetensors.index.json").read_text())
        files = sorted((tmp_path / "out" / name).glob("*.safetensors"))
        assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
        assert [file.name for file in files] == [
            f"{component.stem}-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
        ]
        total = 0
        for file in files:
            sizes = [len(data) for *_, data in safetensors_bytes.read(file).values()]
            assert len(sizes) == 1 or sum(sizes) <= SHARD_BYTES
            total += sum(sizes)
        assert index["metadata"]["total_size"] == total


def test_parity_of_a_sharded_export_in_pytorch(imported, tmp_path):
    folder.export_folder(imported, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    pipeline = load_pipeline(tmp_path / "out")
    for name, model in tiny_pipeline.build().items():
        loaded = getattr(pipeline, name).state_dict()
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_parity_of_an_export_in_another_dtype(imported, tmp_path):
    """The rounding is that of PyTorch, also for passthrough tensors."""
    folder.export_folder(imported, tmp_path / "out", code="BF16")
    for name, model in tiny_pipeline.build().items():
        found = safetensors_bytes.read_folder(tmp_path / "out" / name)
        assert found.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            bits = value.to(torch.bfloat16).view(torch.uint16).numpy().tobytes()
            assert found[key] == ("BF16", tuple(value.shape), bits), key


def test_round_trip_with_replaced_weights(imported, tmp_path):
    """Trained weights replace those of the folder; passthrough tensors stay."""
    replaced = {}
    for name in ("transformer", "vae"):
        component = components.COMPONENTS[name]
        config = components.read_config(imported / name, name)
        weights, _ = stored_weights.open_ours(imported / name, component.expected(config))
        model = stored_weights.load(weights, component.abstract(config))
        doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
        folder.save_component(tmp_path / name, {}, doubled)
        replaced[name], _ = stored_weights.open_ours(tmp_path / name, component.expected(config))
    folder.export_folder(imported, tmp_path / "out", replace=replaced)
    for name, model in tiny_pipeline.build().items():
        found = safetensors_bytes.read_folder(tmp_path / "out" / name)
        assert found.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            is_doubled = name in replaced and "time_conv" not in key
            assert found[key][2] == (value * (2 if is_doubled else 1)).numpy().tobytes(), key


def test_round_trip_of_a_model_folder_written_from_memory(imported, tmp_path):
    """`save_component` writes the same file as an import."""
    config = components.read_config(imported / "vae", "vae")
    component = components.COMPONENTS["vae"]
    weights, passthrough = stored_weights.open_ours(imported / "vae", component.expected(config))
    model = stored_weights.load(weights, component.abstract(config))
    published = json.loads((imported / "vae" / "config.json").read_text())
    folder.save_component(
        tmp_path / "vae", published, model, {name: weight.read() for name, weight in passthrough.items()}
    )
    assert safetensors_bytes.read_folder(tmp_path / "vae") == safetensors_bytes.read_folder(imported / "vae")
    assert components.read_config(tmp_path / "vae", "vae") == config


def test_report_is_readable():
    report = folder.Report({"vae": 1_234_567}, {"vae": 2_500_000_000}, ("README.md",))
    text = folder.describe(report)
    assert "vae: 1,234,567 parameters, 2.500 GB" in text and "README.md" in text


def test_cast_leaves_the_right_dtype_alone(imported):
    config = components.read_config(imported / "transformer", "transformer")
    weights, _ = stored_weights.open_ours(
        imported / "transformer", components.COMPONENTS["transformer"].expected(config)
    )
    assert stored_weights.cast(weights, "F32") == weights
    halved = stored_weights.cast(weights, "BF16")["image_in.weight"]
    values = weights["image_in.weight"].read()
    assert halved.code == "BF16" and halved.shape == values.shape
    rounded = values.astype(dtypes.DTYPES["BF16"])
    np.testing.assert_array_equal(halved.read((slice(3, 5),)), rounded[3:5])
    # Values read as fp32 are still those that an export would write.
    np.testing.assert_array_equal(halved.read(dtype=np.float32), rounded.astype(np.float32))
