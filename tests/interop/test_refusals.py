"""Folders that do not fit or cannot be trusted are refused, with all problems in one error."""

import json
import math
import os
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest

from qi2_jax.interop import components, files, folder, stored_weights, tensors
from tests.interop import safetensors_bytes

WEIGHTS = {
    name: f"{name}/{component.stem}.safetensors" for name, component in components.COMPONENTS.items()
}  # published


@pytest.fixture
def source(published, tmp_path):
    """A copy of the published folder to damage. Its files are hard links: replace them, never write into them."""
    out = tmp_path / "published"
    shutil.copytree(published, out, copy_function=os.link, ignore=shutil.ignore_patterns("tokenizer.json"))
    return out


def replace(path: pathlib.Path, content: bytes | str | dict) -> None:
    path.unlink(missing_ok=True)
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def refused(source: pathlib.Path, *messages: str) -> str:
    """The error of an import, which must contain all messages; the import must leave nothing behind."""
    out = source.parent / "out"
    with pytest.raises(ValueError) as caught:
        folder.import_folder(source, out)
    assert not out.exists()
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


def change_tensors(source, name, changes: dict[str, np.ndarray | None]) -> None:
    path = source / WEIGHTS[name]
    found = safetensors_bytes.read(path)
    for key, array in changes.items():
        found.pop(key, None)
        if array is not None:
            found[key] = ("F32", array.shape, array.astype(np.float32).tobytes())
    path.unlink()
    safetensors_bytes.write_tensors(path, found)


@pytest.mark.parametrize(
    ("name", "missing", "misshapen"),
    [
        ("transformer", ["transformer_blocks.1.attn.to_q.weight", "img_in.weight"], "txt_in.in_layer.weight"),
        ("vae", ["decoder.conv_in.bias", "encoder.down_blocks.1.downsampler.time_conv.weight"], "quant_conv.weight"),
        ("text_encoder", ["model.language_model.norm.weight", "model.visual.merger.norm.bias"], "lm_head.weight"),
    ],
)  # fmt: skip
def test_every_tensor_that_does_not_fit_is_listed_at_once(source, name, missing, misshapen):
    extra = [
        "transformer_blocks.2.attn.to_q.weight",
        "model.visual.blocks.07.norm1.bias",
        "x.downsampler.time_conv.bias",
    ]
    changes = dict.fromkeys(missing) | dict.fromkeys(extra, np.ones(3)) | {misshapen: np.ones((3, 1))}
    change_tensors(source, name, changes)
    message = refused(source, f"{source / name}: 6 tensors do not match")
    assert {line.split()[1] for line in message.splitlines() if "missing:" in line} == set(missing)
    assert {line.split()[1] for line in message.splitlines() if "unexpected:" in line} == set(extra)
    (line,) = [line for line in message.splitlines() if "misshapen:" in line]
    assert misshapen in line and "(3, 1)" in line and "the configuration says" in line


def test_a_head_may_be_missing_but_not_wrong(source):
    change_tensors(source, "text_encoder", {"lm_head.weight": None})
    folder.import_folder(source, source.parent / "out")
    folder.export_folder(source.parent / "out", source.parent / "back")
    back = safetensors_bytes.read_folder(source.parent / "back" / "text_encoder")
    assert back == safetensors_bytes.read_folder(source / "text_encoder")


def test_weights_that_replace_others_are_checked(imported, tmp_path):
    config = components.read_config(imported / "transformer", "transformer")
    weights, _ = stored_weights.open_ours(
        imported / "transformer", components.COMPONENTS["transformer"].expected(config)
    )
    wrong = dict(weights)
    wrong["extra.weight"] = wrong.pop("image_in.weight")
    wrong["image_out.weight"] = weights["image_in.weight"]
    with pytest.raises(ValueError) as caught:
        folder.export_folder(imported, tmp_path / "out", replace={"transformer": wrong})
    for message in ("missing: image_in.weight", "unexpected: extra.weight", "misshapen: image_out.weight is (32, 16)"):
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_passthrough_tensors_that_a_model_folder_lost_are_listed(imported, tmp_path):
    """Without them in the export, diffusers would invent values."""
    model = tmp_path / "model"
    shutil.copytree(imported, model, copy_function=os.link)
    path = model / "vae" / "model.safetensors"
    kept = {
        name: t for name, t in safetensors_bytes.read(path).items() if not name.startswith(stored_weights.PASSTHROUGH)
    }
    path.unlink()
    safetensors_bytes.write_tensors(path, kept)
    with pytest.raises(ValueError, match="12 tensors do not match"):
        folder.export_folder(model, tmp_path / "out")


def test_layers_of_different_dtypes(source):
    path = source / WEIGHTS["transformer"]
    found = safetensors_bytes.read(path)
    for name in ("transformer_blocks.1.attn.to_q.weight", "transformer_blocks.0.attn.norm_k.weight", "img_in.weight"):
        _, shape, data = found[name]
        found[name] = ("BF16", shape, np.frombuffer(data, np.uint16)[1::2].tobytes())
    path.unlink()
    safetensors_bytes.write_tensors(path, found)
    message = refused(source, "blocks.attn.q.weight ['BF16', 'F32']", "blocks.attn.k_norm.weight ['BF16', 'F32']")
    assert "image_in" not in message  # a single tensor may differ in dtype from others


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "empty": b"",
    "header_longer_than_the_file": (1 << 30).to_bytes(8, "little") + b"{}",
    "header_of_an_exabyte": (1 << 60).to_bytes(8, "little") + b"{}",
    "no_json": (4).to_bytes(8, "little") + b"{{{{",
    "a_list": (2).to_bytes(8, "little") + b"[]",
    "truncated": ({"a": ENTRY}, b"1234567"),
    "longer_than_its_header_says": ({"a": ENTRY}, b"123456789"),
    "shape_larger_than_its_bytes": ({"a": ENTRY | {"shape": [3]}}, b"12345678"),
    "two_tensors_in_one_place": ({"a": ENTRY, "b": ENTRY}, b"12345678"),
    "a_gap": ({"a": ENTRY | {"data_offsets": [8, 16]}}, b"1234567812345678"),
    "backwards": ({"a": ENTRY | {"data_offsets": [8, 0]}}, b"12345678"),
    "negative": ({"a": ENTRY | {"shape": [-2]}}, b"12345678"),
    "overflow": ({"a": ENTRY | {"shape": [1 << 62, 4], "data_offsets": [0, 0]}}, b""),
    "a_pickle": pickle.dumps({"a": np.zeros(2)}),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_are_not_what_they_claim(tmp_path, lie):
    content, path = LIES[lie], tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        safetensors_bytes.write(path, *content)
    with pytest.raises(ValueError, match=r"x\.safetensors is not a complete safetensors file"):
        tensors.scan(path)


def test_truncated_weights_of_a_pipeline(source):
    path = source / WEIGHTS["vae"]
    replace(path, path.read_bytes()[:-1])
    refused(source, str(path), "not a complete safetensors file")


@pytest.mark.parametrize("code", ["I8", "U8", "F8_E4M3", "BOOL", "I32"])
def test_quantised_weights(tmp_path, code):
    entry = {"dtype": code, "shape": [1 if code == "I32" else 4], "data_offsets": [0, 4]}
    path = safetensors_bytes.write(tmp_path / "x.safetensors", {"weight": entry}, b"1234")
    with pytest.raises(ValueError, match=rf"other dtypes than .*'weight': '{code}'"):
        tensors.scan(path)


def shard(folder_, name, *keys):
    return safetensors_bytes.write_tensors(folder_ / name, {key: ("F32", (1,), b"1234") for key in keys})


@pytest.mark.parametrize(
    ("index", "messages"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, ["outside its folder ['../outside.safetensors']"]),
        ({"weight_map": {"a": "/etc/passwd", "b": "two"}}, ["outside its folder ['/etc/passwd']", "missing ['two']"]),
        ({"weight_map": {"a": "..", "b": ""}}, ["missing ['', '..']"]),
        ({"weight_map": {"a": "m-1.safetensors"}}, ["b is in m-1.safetensors, the index says None"]),
        (
            {"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-1.safetensors"}},
            ["a is in m-1.safetensors, the index says m-2", "c is in no shard", "d is in m-2.safetensors"],
        ),
        ({"weight_map": ["a"]}, ["has no weight_map"]),
        ({"weight_map": {"a": 5}}, ["has no weight_map"]),
        ({}, ["has no weight_map"]),
        ([], ["contains a list"]),
        ("{" * 100_000, ["is not valid JSON"]),
        ('{"a":' * 100_000, ["is not valid JSON"]),
        (" " * (2 << 20), ["2097152 bytes; at most 1048576"]),
    ],
)  # fmt: skip
def test_indexes_that_are_refused(tmp_path, index, messages):
    component = tmp_path / "component"
    shard(tmp_path, "outside.safetensors", "a")
    shard(component, "m-1.safetensors", "a", "b")
    shard(component, "m-2.safetensors", "d")
    (component / "m.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(ValueError) as caught:
        tensors.scan_folder(component, "m")
    for message in messages:
        assert message in str(caught.value)


def test_two_forms_at_once_are_ambiguous(tmp_path):
    shard(tmp_path, "m.safetensors", "a")
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "m.safetensors"}}')
    with pytest.raises(ValueError, match=r"has m\.safetensors and m\.safetensors\.index\.json"):
        tensors.scan_folder(tmp_path, "m")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_never_opened(source, tmp_path, file):
    (source / WEIGHTS["vae"]).unlink()
    (source / "vae" / file).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(source, "only safetensors weights are read", file, "save the model again as safetensors")
    assert not (tmp_path / "exploded").exists()


def test_code_and_pickles_are_not_copied(source, tmp_path):
    strange = [
        "README.md",
        "pipeline.py",
        "extra/config.json",
        "processor/deep/vocab.json",
        "processor/processing_qwen.py",
        "text_encoder/pytorch_model.bin",
        "transformer/modeling.py",
    ]
    for name in strange:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    os.mkfifo(source / "processor" / "pipe.json")  # opening it would block
    (source / "processor" / ".cache").mkdir()
    (source / "processor" / ".cache" / "download.json").write_text("{}")
    report = folder.import_folder(source, tmp_path / "ours")
    assert set(report.left_out) == {*strange, "processor/pipe.json"}
    exported = folder.export_folder(tmp_path / "ours", tmp_path / "out")
    assert exported.left_out == ()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".py", ".bin", ".md")]
    assert not (tmp_path / "ours" / "processor" / ".cache").exists()
    assert not (tmp_path / "exploded").exists()


def test_configuration_that_is_too_large(source, monkeypatch):
    (source / "processor" / "vocab.json").write_text(" " * 3000)
    monkeypatch.setattr(folder, "MAX_AUXILIARY_BYTES", 2000)
    refused(source, "['processor/vocab.json'] have more than 2000 bytes")


def test_a_disk_without_room_is_found_before_the_first_byte(source, imported, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for call, origin in ((folder.import_folder, source), (folder.export_folder, imported)):
        with pytest.raises(ValueError, match=r"out needs 0\.\d+ GB, its disk has 0\.00 GB left"):
            call(origin, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = tensors.Writer(tmp_path / "x.safetensors", {"a": ("F32", (1,))})
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.safetensors'"), writer:
        writer.write("a", np.zeros(1, np.float32))
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.json'"):
        files.write_json(tmp_path / "x.json", {})


def test_links_out_of_the_folder(source, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (source / "processor" / "vocab.json").symlink_to(secret)
    (source / "scheduler" / "more").symlink_to("/etc")
    moved = tmp_path / "weights"
    (source / WEIGHTS["vae"]).rename(moved)
    (source / WEIGHTS["vae"]).symlink_to(moved)
    refused(source, f"processor/vocab.json -> {secret}", "scheduler/more -> /etc", WEIGHTS["vae"], "cp -rL")


def test_a_component_folder_that_is_a_link(source, tmp_path):
    (source / "vae").rename(tmp_path / "vae")
    (source / "vae").symlink_to(tmp_path / "vae")
    refused(source, f"vae -> {tmp_path / 'vae'}")


def test_links_in_a_circle(source):
    (source / "processor" / "more.json").symlink_to("more.json")
    report = folder.import_folder(source, source.parent / "out")
    assert report.left_out == ("processor/more.json",)


def test_a_snapshot_in_a_hugging_face_cache(source, tmp_path):
    """Its files are links to blobs beside the snapshots; the content of the blobs is copied."""
    repository = tmp_path / "models--qwen--image"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    folder.import_folder(snapshot, tmp_path / "ours")
    assert not [path for path in (tmp_path / "ours").rglob("*") if path.is_symlink()]
    folder.export_folder(tmp_path / "ours", tmp_path / "out")
    for path in source.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.relative_to(source)).read_bytes() == path.read_bytes()
    for number, target in enumerate([repository / "refs.json", tmp_path / "secret.json"]):
        target.write_text("{}")
        (snapshot / f"extra{number}.json").symlink_to(target)
        refused(snapshot, f"extra{number}.json -> {target}")


@pytest.mark.parametrize(
    ("file", "content", "messages"),
    [
        ("model_index.json", None, ["model_index.json does not exist"]),
        ("model_index.json", {"_class_name": "FluxPipeline"}, ["describes a 'FluxPipeline'", "QwenImage21Pipeline"]),
        ("model_index.json", {"vae": ["evil", "Code"]}, ["{'vae': ['evil', 'Code']}", "AutoencoderKLQwenImage21"]),
        ("scheduler/scheduler_config.json", None, ["scheduler_config.json does not exist"]),
        ("transformer/config.json", None, ["config.json does not exist"]),
        ("transformer/config.json", "nonsense", ["transformer/config.json is not valid JSON"]),
        ("transformer/config.json", {"_class_name": "Flux2"}, ["describes a Flux2"]),
        ("transformer/config.json", {"num_layers": 3}, ["missing: transformer_blocks.2.attn.to_q.weight (32, 32)"]),
        ("transformer/config.json", {"num_layers": "two"}, ["transformer/config.json", "layers is 'two'"]),
        ("transformer/config.json", {"num_layers": -1}, ["transformer/config.json", "layers is -1"]),
        ("transformer/config.json", {"num_layers": 10**9}, ["asks for 1000000000 layers"]),
        ("transformer/config.json", {"axes_dims_rope": 16}, ["transformer/config.json", "int"]),
        ("transformer/config.json", {"axes_dims_rope": [4, 6]}, ["rope_dims"]),
        ("vae/config.json", {"dim_mult": "high"}, ["vae/config.json"]),
        ("vae/config.json", {"base_dim": None}, ["vae"]),
        ("vae/config.json", {"z_dim": 17}, ["vae/config.json", "17"]),
        ("vae/config.json", {"num_res_blocks": 10**7}, ["num_res_blocks = 10000000", "at most 64"]),
        ("vae/config.json", {"dim_mult": [1] * 1000}, ["1000 levels in dim_mult", "at most"]),
        ("vae/config.json", {"latents_mean": [math.nan] * 16}, ["latents_mean has values that are not finite"]),
        ("scheduler/scheduler_config.json", {"base_image_seq_len": 8192}, ["base_tokens 8192 must be below"]),
        ("scheduler/scheduler_config.json", {"base_shift": "x"}, ["scheduler_config.json", "base_shift is 'x'"]),
        ("scheduler/scheduler_config.json", {"base_shift": 1e9}, ["the times of an image of 256 tokens outside"]),
        ("scheduler/scheduler_config.json", {"shift_terminal": "x"}, ["the terminal time is 'x'"]),
        ("scheduler/scheduler_config.json", {"shift_terminal": 1}, ["the terminal time is 1"]),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, ["'use_karras_sigmas': True"]),
        ("model_index.json", {"sample_sigmas": "abc"}, ["sample_sigmas is 'abc'"]),
        ("model_index.json", {"sample_sigmas": 5}, ["sample_sigmas is 5"]),
        ("model_index.json", {"sample_sigmas": [1.5]}, ["in (0, 1], got [1.5]"]),
        ("text_encoder/config.json", {"model_type": "qwen2_vl"}, ["text_encoder/config.json", "qwen2_vl"]),
        ("text_encoder/config.json", {"vision_config": []}, ["text_encoder/config.json"]),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(source, file, content, messages):
    path = source / file
    if content is None:
        path.unlink()
    else:
        replace(path, json.loads(path.read_text()) | content if isinstance(content, dict) else content)
    refused(source, *messages)


def test_folders_that_are_not_empty_are_left_alone(source, imported, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for call, origin in ((folder.import_folder, source), (folder.export_folder, imported)):
        with pytest.raises(ValueError, match="is not an empty folder; choose another --out"):
            call(origin, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    folder.import_folder(source, out)  # an empty folder is accepted
    with pytest.raises(ValueError, match="not an empty folder"):
        folder.import_folder(source, out)


def test_model_folders_that_cannot_be_exported(imported, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"no {folder.MARK}")):
        folder.export_folder(tmp_path / "nothing", tmp_path / "out")
    model = tmp_path / "model"
    shutil.copytree(imported, model, copy_function=os.link)
    replace(model / folder.MARK, {"version": 99})
    with pytest.raises(ValueError, match="version 99; this qi2 reads version 1"):
        folder.export_folder(model, tmp_path / "out")
