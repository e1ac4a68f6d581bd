"""Adapters that cannot be merged exactly, and hostile files: each error names the tensor or the setting."""

import json
import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qi2_jax.interop.lora import reading
from qi2_jax.interop.lora.settings import CONFIG_FILE, METADATA
from tests import tiny_pipeline
from tests.interop.lora import adapters

BLOCK = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{BLOCK}.lora_A.weight", f"{BLOCK}.lora_B.weight"  # [2, 32] and [32, 2]


@pytest.fixture
def refused(base_config, tmp_path):
    """Writes a file with changed tensors and a configuration, and returns the message of its refusal."""

    def message(changes=None, values=None, without=()):
        tensors = adapters.spelt(adapters.random_factors()) | (changes or {})
        tensors = {name: tensor for name, tensor in tensors.items() if name not in without}
        text = values if isinstance(values, str) else json.dumps(values)
        save_file(tensors, tmp_path / "adapter.safetensors", None if values is None else {METADATA: text})
        with pytest.raises(ValueError) as error:
            reading.read(tmp_path / "adapter.safetensors", base_config)
        assert str(tmp_path / "adapter.safetensors") in str(error.value)
        return str(error.value)

    return message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{BLOCK}.lora_magnitude_vector", "is DoRA"),
        (f"{BLOCK}.dora_scale", "is DoRA"),
        (f"{BLOCK}.lokr_w1", "is LoKr"),
        ("lora_unet_transformer_blocks_0_attn_to_q.lokr_w2_a", "is LoKr"),
        (f"{BLOCK}.hada_w1_a", "is LoHa"),
        (f"{BLOCK}.lora_mid.weight", "is LoCon"),
        (f"{BLOCK}.oft_blocks", "is OFT"),
        (f"{BLOCK}.diff", "is a full change"),
        (f"{BLOCK}.lora_B.bias", "is a bias"),
        ("text_encoder.layers.0.q_proj.lora_A.weight", "changes the text encoder"),
        ("lora_te_layers_0_q_proj.lora_down.weight", "changes the text encoder"),
        ("transformer.transformer_blocks.7.attn.to_q.lora_A.weight", "names no linear layer of this transformer"),
        ("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight", "names no linear layer"),
        ("lora_unet_transformer_blocks_0_attn_to_x.lora_down.weight", "names no linear layer"),
        ("transformer.transformer_blocks.0.attn.norm_q.weight", "is not a name of a LoRA tensor"),
        ("emb_params", "is not a name of a LoRA tensor"),
        ("a" * 256, "is not a name of a LoRA tensor"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(refused, name, says):
    assert f"{name} {says}" in refused({name: torch.zeros(3, 4)})


def test_an_endless_name_is_refused(refused):
    message = refused({"x.oft_a" * 100_000 + "!": torch.zeros(3, 4)})
    assert "is a name of 700001 characters" in message and len(message) < 1000


def test_everything_that_does_not_belong_is_listed_at_once(refused):
    other = {f"unknown.{index}.lora_A.weight": torch.zeros(2, 2) for index in range(35)}
    message = refused(other | {f"{BLOCK}.dora_scale": torch.zeros(32)}, without=[B])
    assert message.count("names no linear layer") == 30 - 1 and "and 7 more" in message and "is DoRA" in message


@pytest.mark.parametrize(
    ("changes", "without", "says"),
    [
        ({}, [B], f"{A} has no factor B of transformer_blocks.0.attn.to_q beside it"),
        ({}, [A], f"{B} has no factor A of"),
        ({f"{BLOCK}.alpha": torch.tensor(1.0)}, [A, B], f"{BLOCK}.alpha has no factor A"),
        ({B: torch.zeros(31, 2)}, [], f"{B} has the shape (31, 2); transformer_blocks.0.attn.to_q needs [32, rank]"),
        ({A: torch.zeros(2, 16)}, [], f"{A} has the shape (2, 16)"),
        ({A: torch.zeros(2, 32, 1, 1)}, [], f"{A} has the shape (2, 32, 1, 1)"),
        ({A: torch.zeros(3, 32)}, [], f"{A} and {B} have different ranks, 3 and 2"),
        ({A: torch.zeros(0, 32), B: torch.zeros(32, 0)}, [], f"{A} has the shape (0, 32)"),
        ({A: torch.full((2, 32), float("nan"))}, [], f"{A} has values that are not finite"),
        ({B: torch.full((32, 2), 1e39, dtype=torch.float64)}, [], f"{B} has values that are not finite in float32"),
        ({A: torch.zeros(2, 32, dtype=torch.int32)}, [], f"{A} has the dtype I32"),
        ({A: torch.zeros(2, 32, dtype=torch.float8_e4m3fn)}, [], f"'{A}': 'F8_E4M3'"),
        ({f"{BLOCK}.alpha": torch.zeros(4)}, [], f"{BLOCK}.alpha has the shape (4,); an alpha is one number"),
        ({f"{BLOCK}.alpha": torch.tensor(0.0)}, [], f"{BLOCK}.alpha is 0.0; it must be a finite number above 0"),
        ({f"{BLOCK}.alpha": torch.tensor(float("inf"))}, [], f"{BLOCK}.alpha is inf"),
        (
            {"transformer_blocks.0.attn.to_q.lora_down.weight": torch.zeros(2, 32)},
            [],
            "are the same tensor under two names",
        ),
    ],
)
def test_tensors_out_of_range_are_refused_by_name(refused, changes, without, says):
    assert says in refused(changes, without=without)


def test_a_layer_that_is_changed_twice_is_refused(refused):
    fused = "diffusion_model.transformer_blocks.1.img_mlp.gate_up.lora_{}.weight"
    message = refused({fused.format("A"): torch.zeros(2, 32), fused.format("B"): torch.zeros(192, 2)})
    assert "twice: by its own tensors, and by those of" in message and "img_mlp.gate_up" in message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"transformer.use_dora": True}, "{'use_dora': True}"),
        ({"transformer.lora_bias": True}, "{'lora_bias': True}"),
        ({"transformer.bias": "all"}, "{'bias': 'all'}"),
        ({"transformer.init_lora_weights": "pissa"}, "{'init_lora_weights': 'pissa'}"),
        ({"transformer.modules_to_save": ["img_in"]}, "modules_to_save"),
        ({"transformer.peft_type": "LOHA"}, "{'peft_type': 'LOHA'}"),
        ({"transformer.new_kind": 1}, "{'new_kind': 1}"),
        ({"transformer.r": 4}, "has tensors of rank 2, but "),
        ({"transformer.r": True}, "gives it the rank True"),
        ({"transformer.rank_pattern": {"attn.to_q": 8}}, "gives it the rank 8"),
        ({"transformer.rank_pattern": [8]}, "rank_pattern is a list, not an object"),
        ({"transformer.alpha_pattern": {"(a+)+b": 8}}, "alpha_pattern has the pattern '(a+)+b'"),
        ({"transformer.alpha_pattern": {"(t|t)" * 9: 8}}, "with at most 4 wildcards"),
        ({"transformer.alpha_pattern": {"to_(q": 8}}, "has the pattern 'to_(q'"),
        ({"transformer.lora_alpha": "1"}, "is '1'; it must be a finite number above 0"),
        ({"transformer.lora_alpha": [1]}, "is [1]; it must"),
        ({"transformer.lora_alpha": -1}, "is -1; it must"),
        ("[1]", "is a list, not an object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_other_headers_are_refused(refused, values, says):
    assert says in refused(values=values)


def test_an_alpha_that_contradicts_the_header_is_refused(refused):
    says = refused({f"{BLOCK}.alpha": torch.tensor(6.0)}, {"transformer.lora_alpha": 2})
    assert f"{BLOCK}.alpha gives the scale 3, but {METADATA} in the header" in says and "gives 1" in says


def test_other_files_are_refused(base_config, refused, tmp_path):
    for name in ("absent.safetensors", "absent"):
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            reading.read(tmp_path / name, base_config)
    torch.save({A: torch.zeros(2, 32)}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        reading.read(tmp_path / "pickle.safetensors", base_config)
    header = json.dumps({A: {"dtype": "F32", "shape": [1 << 40, 32], "data_offsets": [0, 64]}}).encode()
    (tmp_path / "large.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        reading.read(tmp_path / "large.safetensors", base_config)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="it has no tensors"):
        reading.read(tmp_path / "empty.safetensors", base_config)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        reading.read(tmp_path / "folder", base_config)
    for name in (reading.FILE, reading.PEFT_FILE):
        save_file({A: torch.zeros(2, 32)}, tmp_path / "folder" / name)
    with pytest.raises(ValueError, match="name the file of one adapter"):
        reading.read(tmp_path / "folder", base_config)


def test_an_adapter_of_another_model_says_what_exists(base_config, tmp_path):
    save_file({"transformer.blocks.0.q.lora_A.weight": torch.zeros(2, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has layers such as \['transformer_blocks.0.attn.to_k'"):
        reading.read(tmp_path / "other.safetensors", base_config)


def test_a_file_of_peft_without_its_configuration_is_refused(theirs, base_config, tmp_path):
    """Its scale would be lost without a word."""
    model = tiny_pipeline.randomize(type(theirs.transformer).from_config(theirs.transformer.config), 1)
    get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / reading.PEFT_FILE)
    assert reading.read(tmp_path, base_config)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=rf"keeps the scale in {CONFIG_FILE}; put that file beside it"):
        reading.read(tmp_path / reading.PEFT_FILE, base_config)
    save_file(tensors, tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match=r"renamed.safetensors was written by peft"):
        reading.read(tmp_path / "renamed.safetensors", base_config)
