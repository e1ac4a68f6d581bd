"""Alignment scores equal those of transformers on the same folder, and selection cuts by them."""

import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.numpy import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data_pipeline import filters
from data_pipeline.decoding.images import decode_image
from data_pipeline.filters.aesthetic import AESTHETIC, with_head
from data_pipeline.filters.alignment import ALIGNMENT, with_model
from data_pipeline.filters.base import Candidate
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.score_tables import read_scores
from data_pipeline.selection.index import Dropped
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds

TEXTS = ("a red boat", "two boats at sea", "ein rotes Boot", "zwei Boote auf dem Meer und noch viel mehr davon")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny random CLIP, its tokenizer and its image processor."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(pieces), "max_position_embeddings": 24}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = tower | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return folder


@pytest.fixture
def records(tmp_path, picture, encoded):
    captions = Caption(TEXTS[0], language="en"), Caption(TEXTS[2], language="de")
    pairs = [Record(str(i), encoded(picture(i, (60, 40))), captions, "s") for i in range(5)]
    turn = Caption("make it night", "instruction")
    edit = Record("edit", encoded(picture(9, (50, 50))), (turn,), "s", conditions=(encoded(picture(8)),))
    write_shards(tmp_path / "records", [*pairs, edit, Record("broken", b"x", (), "s")], records_per_shard=4)
    return tmp_path / "records"


def test_alignment_parity(clip, picture, encoded):
    filter = with_model(ALIGNMENT, clip)
    images = [decode_image(encoded(picture(seed, (60 + 7 * seed, 40)))) for seed in range(3)]
    record = Record("k", b"", tuple(map(Caption, TEXTS)), "s")
    scored = filter.score([Candidate(record, image, None) for image in images])

    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer, processor = CLIPTokenizer.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)
    options = {"padding": "max_length", "truncation": True, "max_length": 24, "return_tensors": "pt"}
    with torch.no_grad():
        pixels = processor([image.image for image in images], return_tensors="pt")["pixel_values"]
        out = model(input_ids=tokenizer(list(TEXTS), **options)["input_ids"], pixel_values=pixels)
    cosines = (out.image_embeds @ out.text_embeds.T).numpy()
    np.testing.assert_allclose([row["cosines"] for row in scored], cosines, atol=6e-5)  # stored with four decimals
    assert np.ptp(cosines) > 0.01


def test_percentiles_cut_each_language_separately_and_never_edits(clip, records):
    report = score(records, filters=filters.cascade(clip), workers=2, progress=False)
    assert report.scored["alignment"] == 7 and report.not_scored.keys() == {"aesthetic", "cluster"}
    rows = [row["alignment.cosines"] for row in read_scores(records, filters.CASCADE)]
    assert rows[-1] is None
    pairs = np.array(rows[:5])
    asked = {"min_side": 30, "drop_near_duplicates": False}
    kept = {kept.key: kept.captions for kept in select(records, Thresholds(**asked, min_alignment_percentile=50)).kept}
    for column in range(2):
        low = pairs[:, column] < np.percentile(pairs[:, column], 50)
        assert [column not in kept.get(str(i), ()) for i in range(5)] == low.tolist()
    assert kept["edit"] == (0,)
    strict = select(records, Thresholds(**asked, min_alignment=1.0))
    assert strict.keys == ("edit",) and strict.dropped["0"] == Dropped("captions", "unrelated")
    # Scores from another machine count on this one, which has no model.
    assert set(score(records, workers=1, progress=False).scored.values()) == {0}


def test_percentiles_without_scores_are_an_error(records):
    score(records, workers=1, progress=False)
    with pytest.raises(ValueError, match="alignment was not scored: score with --clip"):
        select(records, Thresholds(min_alignment_percentile=50))


def test_other_weights_score_again(clip, records, tmp_path):
    score(records, filters=filters.cascade(clip), workers=1, progress=False)
    shutil.copytree(clip, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    report = score(records, filters=filters.cascade(tmp_path / "other"), workers=1, progress=False)
    assert report.scored == dict.fromkeys(report.scored, 0) | {"alignment": 7}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "bert"}', "model_type 'bert' is not supported"),
        ("tokenizer_config.json", '{"tokenizer_class": "Evil"}', "names the tokenizer 'Evil'"),
        ("model.safetensors", "", "safetensors"),
        ("preprocessor_config.json", "[", "no readable tokenizer or image processor"),
    ],
)
def test_folders_without_such_a_model_are_refused(clip, tmp_path, file, content, message):
    shutil.copytree(clip, tmp_path / "spoiled")
    assert (tmp_path / "spoiled" / file).exists()
    (tmp_path / "spoiled" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        filters.cascade(tmp_path / "spoiled")


def write_head(path, widths=(12, 7, 1), **more):
    rng = np.random.default_rng(2)
    tensors = {}
    for index, (inner, outer) in enumerate(itertools.pairwise(widths)):
        tensors[f"layers.{2 * index}.weight"] = rng.normal(size=(outer, inner)).astype(np.float32)
        tensors[f"layers.{2 * index}.bias"] = rng.normal(size=outer).astype(np.float32)
    safetensors.numpy.save_file(tensors | more, path)
    return path


def test_aesthetic_head_parity(clip, tmp_path, picture, encoded):
    head = write_head(tmp_path / "head.safetensors")
    filter = with_head(AESTHETIC, clip, head)
    images = [decode_image(encoded(picture(seed))) for seed in range(3)]
    record = Record("k", b"", (Caption("x"),), "s")
    scored = filter.score([Candidate(record, image, None) for image in images])

    layers = torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.Dropout(0.2), torch.nn.Linear(7, 1)).eval()
    layers.load_state_dict({k.removeprefix("layers."): torch.from_numpy(v) for k, v in load_file(head).items()})
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessorPil.from_pretrained(clip)
    with torch.no_grad():
        pixels = processor([image.image for image in images], return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values=pixels).pooler_output
        expected = layers(torch.nn.functional.normalize(features, dim=-1))[:, 0]
    np.testing.assert_allclose([row["score"] for row in scored], expected.numpy(), atol=6e-4)  # three decimals


def test_aesthetic_scores_are_selected_by(clip, records, tmp_path):
    chosen = filters.cascade(clip, write_head(tmp_path / "head.safetensors"))
    assert score(records, filters=chosen, workers=1, progress=False).not_scored.keys() == {"cluster"}
    values = {row["key"]: row["aesthetic.score"] for row in read_scores(records, filters.CASCADE)}
    assert values.pop("broken") is None
    asked = {"min_side": 30, "drop_near_duplicates": False, "require": ("alignment", "aesthetic")}
    cut = max(0.001, sorted(values.values())[3])
    dropped = select(records, Thresholds(**asked, min_aesthetic=cut)).dropped
    assert {key for key, value in values.items() if value < cut} == {
        k for k, v in dropped.items() if v.step == "aesthetic"
    }


@pytest.mark.parametrize(
    ("widths", "more", "message"),
    [
        ((11, 1), {}, "have width 12"),
        ((12, 7, 2), {}, "have width 12"),
        ((12, 1), {"other": np.zeros(3, np.float32)}, "not a chain of linear layers"),
        ((12, 1), {"layers.5.weight": np.zeros((1, 3), np.float32)}, "not a chain of linear layers"),
    ],
)
def test_heads_that_do_not_fit_are_refused(clip, tmp_path, widths, more, message):
    with pytest.raises(ValueError, match=message):
        filters.cascade(clip, write_head(tmp_path / "head.safetensors", widths, **more))
    with pytest.raises(ValueError, match="so --clip FOLDER is required"):
        filters.cascade(None, tmp_path / "head.safetensors")
