"""Adapters against peft and diffusers, their files, and runs that train them."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import QwenImage21Pipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qi2_jax import sharding
from qi2_jax.cli import main
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.interop import components, files, tensors
from qi2_jax.interop import lora as interop
from qi2_jax.interop import mmdit as names
from qi2_jax.interop import weights as storage
from qi2_jax.models import lora, tree
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.runs import locating, paths
from qi2_jax.training import step
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_torch.load import load_pipeline
from tests import tiny_pipeline
from tests.interop import safetensors_bytes
from tests.models.test_mmdit import Sample, batch, relative, run, torch_forward

TRANSFORMER = components.COMPONENTS["transformer"]
ALL = LoRAConfig(4, 6.0, ("*",))
CONFIGS = {
    "attention": LoRAConfig(3, 12.0, ("blocks.attn.*",)),
    "everything": ALL,
    "no_block": LoRAConfig(2, 0.5, ("text_in.*", "modulation", "image_out")),
}


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    """PyTorch's threads spin when other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ours(imported):
    return Pipeline.load(imported, dtype=jnp.float32, mesh=sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def theirs(published):
    pipeline = load_pipeline(published)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def base_config(imported):
    return components.read_config(imported / "transformer", "transformer")


def random_adapter(base, config, seed=0):
    """As after some training: B is not zero."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7 * leaf.shape[-1] ** -0.5, jnp.float32)
    return jax.tree.map(draw, lora.abstract(base, config))


def sample_of(base_config):
    """One edit, as both sides need it."""
    sample = Sample.random(base_config, 1, seed=5)
    return sample, batch([sample])


def their_layer(path):
    """The published path of the first of a layer's matrices, without the block's."""
    published, _ = names.NAMES.to_published(f"{path}.weight", (1,))[0].rsplit(".", 1)
    return published.removeprefix("transformer_blocks.0.")


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_of_an_exported_adapter(ours, theirs, base_config, name, tmp_path):
    """diffusers with the exported file computes what the joined model computes, and fused what the merged one holds."""
    config, (sample, (layout, target, given)) = CONFIGS[name], sample_of(base_config)
    adapter = random_adapter(ours.transformer, config)
    file = interop.export_lora(adapter, config, tmp_path / "out")
    time = jnp.asarray([0.6])
    plain = run(ours.transformer, layout, target, time, given)
    joined = run(lora.join(ours.transformer, adapter), layout, target, time, given)
    merged = lora.merge(ours.transformer, adapter)
    try:
        theirs.load_lora_weights(file)
        with torch.no_grad():
            want = torch_forward(theirs.transformer, sample, 0.6).numpy()
        theirs.fuse_lora()
        state = theirs.transformer.state_dict()
        fused = {key.replace(".base_layer", ""): value.numpy().copy() for key, value in state.items()}
    finally:
        theirs.unfuse_lora()
        theirs.unload_lora_weights()
    assert relative(plain[0], want) > 0.05, "the adapter must matter"
    assert relative(joined[0], want) <= 1e-5
    assert relative(run(merged, layout, target, time, given)[0], want) <= 1e-5
    for ours_name, leaf in tree.to_dict(merged).items():
        published = names.NAMES.to_published(ours_name, leaf.shape)
        for layer, key in enumerate(published):
            assert relative(leaf[layer] if names.NAMES.is_stacked(key) else leaf, fused[key]) <= 1e-5, key


def test_parity_of_a_whole_image(ours, theirs, tmp_path):
    text, noise = "A red fox 🦊, reading “{a} book”.", np.random.default_rng(0).normal(size=(1, 24, 16))
    adapter = random_adapter(ours.transformer, ALL, seed=1)
    joined = dataclasses.replace(ours, transformer=lora.join(ours.transformer, adapter))
    theirs.load_lora_weights(interop.export_lora(adapter, ALL, tmp_path / "out"))
    options = {"width": 96, "height": 64, "num_inference_steps": 3}
    latents = torch.from_numpy(noise.astype(np.float32))
    want = np.asarray(theirs(text, latents=latents, **options).images[0]).astype(int)
    theirs.unload_lora_weights()
    without = np.asarray(theirs(text, latents=latents, **options).images[0]).astype(int)
    (got,) = joined([text], sizes=[(96, 64)], steps=3, latents=noise.astype(np.float32))
    assert np.abs(want - without).max() > 20, "the adapter must matter"
    assert np.abs(got.astype(int) - want).max() <= 1


def peft_model(base, adapter, config):
    """The published transformer under peft, with the values of our adapter."""
    model = get_peft_model(
        tiny_pipeline.randomize(type(base).from_config(base.config), 1),
        LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=[their_layer(path) for path in adapter]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                key, layer = names.NAMES.to_ours(name.removeprefix("base_model.model.").replace(".default", ""))
                leaf = np.array(tree.to_dict(adapter)[key])
                parameter.copy_(torch.from_numpy(leaf if layer is None else leaf[layer]))
    return model


def test_parity_of_gradients_with_peft(ours, theirs, base_config):
    sample, (layout, target, given) = sample_of(base_config)
    adapter = random_adapter(ours.transformer, ALL, seed=2)
    model = peft_model(theirs.transformer, adapter, ALL)
    (torch_forward(model, sample, 0.4) ** 2).mean().backward()
    arrays = (target, jnp.asarray([0.4]), given)
    loss = lambda adapter: jnp.mean(lora.join(ours.transformer, adapter)(layout, *arrays) ** 2)
    gradients = tree.to_dict(jax.jit(jax.grad(loss))(adapter))
    count = 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name)
        if parameter.grad is not None:
            key, layer = names.NAMES.to_ours(name.removeprefix("base_model.model.").replace(".default", ""))
            got = gradients[key] if layer is None else gradients[key][layer]
            assert relative(got, parameter.grad.numpy()) <= 1e-4, name
            count += 1
    assert count == 2 * (7 * base_config.layers + 8)


@pytest.mark.parametrize("code", [None, "BF16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_of_our_files(ours, base_config, name, code, tmp_path):
    config = CONFIGS[name]
    adapter = random_adapter(ours.transformer, config)
    file = interop.export_lora(adapter, config, tmp_path / "out", code)
    found, weights = interop.read_lora(tmp_path / "out", base_config)
    assert (found.rank, found.alpha) == (config.rank, config.alpha)
    assert sorted(found.targets) == sorted(adapter)
    loaded = storage.load(weights, lora.abstract(ours.transformer, found))
    for key, leaf in tree.to_dict(adapter).items():
        want = leaf if code is None else leaf.astype(jnp.bfloat16)
        np.testing.assert_array_equal(tree.to_dict(loaded)[key], want)
    again = interop.export_lora(loaded, found, tmp_path / "again")
    assert again.read_bytes() == file.read_bytes()


def test_round_trip_of_a_file_of_diffusers(ours, theirs, base_config, tmp_path):
    """Loaded and saved by diffusers, our file keeps every tensor's bytes and its scale."""
    adapter = random_adapter(ours.transformer, ALL)
    file = interop.export_lora(adapter, ALL, tmp_path / "out")
    theirs.load_lora_weights(file)
    parameters = {
        name.replace(".default_0", ""): value.contiguous()
        for name, value in theirs.transformer.state_dict().items()
        if ".lora_" in name
    }
    values = theirs.transformer.peft_config["default_0"].to_dict()
    theirs.unload_lora_weights()
    QwenImage21Pipeline.save_lora_weights(tmp_path / "saved", parameters, transformer_lora_adapter_metadata=values)
    assert safetensors_bytes.read(tmp_path / "saved" / interop.FILE) == safetensors_bytes.read(file)
    found, weights = interop.read_lora(tmp_path / "saved", base_config)
    assert (found.rank, found.alpha) == (ALL.rank, ALL.alpha)
    again = interop.export_lora({name: weight.read() for name, weight in weights.items()}, found, tmp_path / "again")
    assert again.read_bytes() == file.read_bytes()


def test_round_trip_of_a_file_of_peft(ours, theirs, base_config, tmp_path):
    adapter = random_adapter(ours.transformer, ALL, seed=3)
    peft_model(theirs.transformer, adapter, ALL).save_pretrained(tmp_path / "saved")
    found, weights = interop.read_lora(tmp_path / "saved" / "adapter_model.safetensors", base_config)
    assert (found.rank, found.alpha, sorted(found.targets)) == (ALL.rank, ALL.alpha, sorted(adapter))
    for name, leaf in tree.to_dict(adapter).items():
        np.testing.assert_array_equal(weights[name].read(), leaf)


def test_parity_of_a_file_with_alphas(ours, theirs, base_config, tmp_path):
    """`diffusion_model.` .. `lora_down`, `lora_up`, `alpha`: the scale that diffusers gives it is ours too."""
    config = CONFIGS["attention"]
    file = interop.export_lora(random_adapter(ours.transformer, config), config, tmp_path / "out")
    renamed = {}
    for name, tensor in load_file(file).items():
        name = name.replace("transformer.", "diffusion_model.")
        renamed[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
        renamed[name.rpartition(".lora_")[0] + ".alpha"] = torch.tensor(config.alpha)
    save_file(renamed, tmp_path / "other.safetensors")
    found, weights = interop.read_lora(tmp_path / "other.safetensors", base_config)
    assert (found.rank, found.alpha) == (config.rank, config.alpha)
    sample, (layout, target, given) = sample_of(base_config)
    loaded = storage.load(weights, lora.abstract(ours.transformer, found))
    theirs.load_lora_weights(tmp_path / "other.safetensors")
    with torch.no_grad():
        want = torch_forward(theirs.transformer, sample, 0.6).numpy()
    theirs.unload_lora_weights()
    got = run(lora.join(ours.transformer, loaded), layout, target, jnp.asarray([0.6]), given)
    assert relative(got[0], want) <= 1e-5


def test_without_a_scale_alpha_is_the_rank(ours, base_config, tmp_path):
    file = interop.export_lora(random_adapter(ours.transformer, ALL), ALL, tmp_path / "out")
    save_file(load_file(file), tmp_path / "bare.safetensors")
    found, _ = interop.read_lora(tmp_path / "bare.safetensors", base_config)
    assert (found.rank, found.alpha) == (4, 4)


@pytest.fixture
def attention_file(ours, tmp_path):
    """(tensors, metadata) of a file to spoil, and a function that writes it."""
    config = CONFIGS["attention"]
    file = interop.export_lora(random_adapter(ours.transformer, config), config, tmp_path / "out")
    values = {"transformer.r": 3, "transformer.lora_alpha": 12}

    def write(parts, values=values):
        text = values if isinstance(values, str) else json.dumps(values)
        save_file(parts, tmp_path / "spoilt.safetensors", {interop.METADATA: text})
        return tmp_path / "spoilt.safetensors"

    return load_file(file), values, write


def test_everything_that_does_not_fit_is_listed_at_once(attention_file, base_config):
    parts, _, write = attention_file
    block = "transformer.transformer_blocks"
    del parts[f"{block}.1.attn.to_q.lora_A.weight"]
    parts[f"{block}.0.attn.to_k.lora_B.weight"] = torch.zeros(31, 3)
    parts[f"{block}.7.attn.to_k.lora_B.weight"] = torch.zeros(32, 3)
    parts["text_encoder.layers.0.q_proj.lora_A.weight"] = torch.zeros(3, 4)
    parts[f"{block}.0.attn.to_q.lora_magnitude_vector"] = torch.zeros(32)
    with pytest.raises(ValueError, match="5 tensors do not match") as error:
        interop.read_lora(write(parts), base_config)
    assert "missing: transformer_blocks.1.attn.to_q.lora_A.weight (3, 32)" in str(error.value)
    assert "misshapen: transformer_blocks.0.attn.to_k.lora_B.weight is (31, 3)" in str(error.value)
    assert str(error.value).count("unexpected: ") == 3


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"transformer.use_dora": True}, "use_dora"),
        ({"transformer.rank_pattern": {"attn.to_q": 8}}, "rank_pattern"),
        ({"transformer.r": 4}, "rank 3, but says r 4"),
        ({"transformer.lora_alpha": "1"}, "alpha is '1'"),
        ({"transformer.lora_alpha": [1]}, r"alpha is \[1\]"),
        ({"transformer.lora_alpha": -1}, "alpha is -1"),
        ("[1]", "is a list, not an object"),
        ("{", "not valid JSON"),
    ],
)
def test_other_headers_are_refused(attention_file, base_config, values, says):
    parts, before, write = attention_file
    with pytest.raises(ValueError, match=says):
        interop.read_lora(write(parts, before | values if isinstance(values, dict) else values), base_config)


def test_other_files_are_refused(attention_file, base_config, tmp_path):
    parts, _, write = attention_file
    first = "transformer.transformer_blocks.0.attn.to_q"
    with pytest.raises(ValueError, match=r"different alphas \[6.0, 12\]"):
        interop.read_lora(write(parts | {f"{first}.alpha": torch.tensor(6.0)}), base_config)
    with pytest.raises(ValueError, match=r"has the shape \(4,\); an alpha is one number"):
        interop.read_lora(write(parts | {f"{first}.alpha": torch.zeros(4)}), base_config)
    twice = parts[f"{first}.lora_A.weight"].clone()
    with pytest.raises(ValueError, match=r"holds transformer_blocks.0.attn.to_q.lora_A.weight twice"):
        interop.read_lora(write(parts | {f"{first.removeprefix('transformer.')}.lora_down.weight": twice}), base_config)
    with pytest.raises(ValueError, match=r"layers of blocks.attn.q.lora_A.weight have different dtypes"):
        interop.read_lora(write(parts | {f"{first}.lora_A.weight": twice.bfloat16()}), base_config)
    with pytest.raises(ValueError, match="holds no LoRA of this transformer"):
        interop.read_lora(write({"text_encoder.q.lora_A.weight": twice}), base_config)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        interop.read_lora(tmp_path / "absent.safetensors", base_config)
    torch.save(parts, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        interop.read_lora(tmp_path / "pickle.safetensors", base_config)


def test_an_export_does_not_overwrite(ours, tmp_path):
    adapter = random_adapter(ours.transformer, ALL)
    interop.export_lora(adapter, ALL, tmp_path / "out")
    with pytest.raises(ValueError, match="already exists"):
        interop.export_lora(adapter, ALL, tmp_path / "out")


@pytest.fixture(scope="module")
def lora_run(imported, ours, tmp_path_factory):
    """(folder, state) of a run that trained an adapter."""
    path = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(imported, path / paths.MODEL, copy_function=os.link)
    config = CONFIGS["attention"]
    group = {"rank": config.rank, "alpha": config.alpha, "targets": list(config.targets)}
    files.write_json(path / "config.json", {"seed": 0, "lora": group})
    model, ema = (random_adapter(ours.transformer, config, seed) for seed in (8, 9))
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    state = step.init_state(lambda _: model, optax.adam(0.1), jax.random.key(0), mesh)
    state = state._replace(step=jnp.int32(5), ema=ema)
    checkpoints = Checkpoints(path / paths.CHECKPOINTS)
    checkpoints.save(state)
    checkpoints.close()
    return path, state


@pytest.mark.parametrize("item", ["ema", "model"])
def test_a_lora_run_holds_the_merged_model(lora_run, ours, item):
    path, state = lora_run
    located = locating.locate(path, item)
    assert located.lora == CONFIGS["attention"]
    assert locating.locate(path / "checkpoints" / "5") == located
    weights = located.weights("transformer", item)
    want = tree.to_dict(lora.merge(ours.transformer, getattr(state, item)))
    assert weights.keys() == want.keys()
    for name, leaf in want.items():
        assert (weights[name].code, weights[name].shape) == ("F32", leaf.shape)
        np.testing.assert_allclose(weights[name].read(), leaf, rtol=0, atol=1e-6)
    name = "blocks.attn.q.weight"
    part = weights[name].read((slice(1, 2), slice(2, 9), slice(3, 5)))
    np.testing.assert_allclose(part, want[name][1:2, 2:9, 3:5], rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights[name].part(1), want[name][1], rtol=0, atol=1e-6)
    assert weights[name].read(dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert located.weights("vae").keys() == locating.Located(path / paths.MODEL).weights("vae").keys()


def test_exports_of_a_lora_run(lora_run, ours, theirs, base_config, tmp_path, capsys):
    """Alone, and merged into a pipeline: what diffusers makes of the first is the second."""
    path, state = lora_run
    main.main(["export", str(path), "--lora", "--out", str(tmp_path / "alone")])
    assert capsys.readouterr().out == f"{tmp_path / 'alone' / interop.FILE}\n"
    main.main(
        ["export", str(path), "--lora", "--weights", "model", "--dtype", "bfloat16", "--out", str(tmp_path / "b")]
    )
    for folder, adapter in (("alone", state.ema), ("b", state.model)):
        _, weights = interop.read_lora(tmp_path / folder, base_config)
        for name, leaf in tree.to_dict(adapter).items():
            want = leaf if folder == "alone" else leaf.astype(jnp.bfloat16)
            np.testing.assert_array_equal(weights[name].read(), want)
    main.main(["export", str(path), "--out", str(tmp_path / "merged")])
    fused = tensors.scan_folder(tmp_path / "merged" / "transformer", TRANSFORMER.stem)
    try:
        theirs.load_lora_weights(tmp_path / "alone")
        theirs.fuse_lora()
        for name, value in theirs.transformer.state_dict().items():
            if ".lora_" not in name:
                assert relative(fused[name.replace(".base_layer", "")].open(), value.numpy()) <= 1e-5, name
    finally:
        theirs.unfuse_lora()
        theirs.unload_lora_weights()


def test_a_lora_run_generates_with_its_adapter(lora_run, ours):
    path, state = lora_run
    loaded = tree.to_dict(Pipeline.load(path, dtype=jnp.float32).transformer)
    for name, leaf in tree.to_dict(lora.merge(ours.transformer, state.ema)).items():
        np.testing.assert_allclose(loaded[name], leaf, rtol=0, atol=1e-6)


def test_only_a_lora_run_has_an_adapter(imported, lora_run, tmp_path):
    with pytest.raises(SystemExit, match=r"holds no adapter; a run with lora.rank above 0 does"):
        main.main(["export", str(imported), "--lora", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="leave one of them out"):
        main.main(["export", str(lora_run[0]), "--lora", "--verify", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"rank": 3, "alpha": 12.0}, "'targets'"),
        ({"rank": 4, "alpha": 12.0, "targets": ["blocks.attn.*"]}, "misshapen: blocks.attn.k.lora_A.weight is"),
        ({"rank": 3, "alpha": 12.0, "targets": ["blocks.mlp.*"]}, "missing: blocks.mlp.down.lora_A.weight"),
        ({"rank": 0}, "unexpected: blocks.attn.k.lora_A.weight"),
        (None, "unexpected: blocks.attn.k.lora_A.weight"),
        ([3], "list indices"),
    ],
)
def test_a_run_whose_config_does_not_fit_is_refused(lora_run, group, says, tmp_path):
    shutil.copytree(lora_run[0], tmp_path / "run", copy_function=os.link)
    (tmp_path / "run" / "config.json").unlink()
    files.write_json(tmp_path / "run" / "config.json", {"lora": group})
    with pytest.raises(ValueError, match=says):
        locating.locate(tmp_path / "run").weights("transformer")
