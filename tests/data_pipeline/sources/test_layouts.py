"""Public data sets and trainers' folders, with their published keys."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.records.schema import Caption
from data_pipeline.records.shards import RecordFolder
from data_pipeline.sources.ingest import ingest

NIGHT = Caption("make it night", "instruction")
CHOSEN = Caption("turn day into night", "instruction")


def read(src):
    report = ingest(src, src.parent / "out", progress=False)
    assert not report.refused.total, report.refused
    return list(RecordFolder(src.parent / "out"))


def write(folder, name: str, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in ("a.jpg", "b.jpg", "c.jpg", "images/1.png"):
        (folder / picture).parent.mkdir(exist_ok=True)
        (folder / picture).write_bytes(picture.encode())
    (folder / name).write_text(content)


def test_musubi_tuner(tmp_path):
    src = tmp_path / "musubi"
    lines = [
        {"image_path": str(src / "a.jpg"), "caption": "hills"},
        {"image_path": "b.jpg", "control_path": str(src / "a.jpg"), "caption": "make it night"},
        {"image_path": "c.jpg", "control_path_1": "b.jpg", "control_path_0": "a.jpg", "caption": "make it night"},
    ]
    (tmp_path / "link").symlink_to("musubi")
    lines.append({"image_path": str(tmp_path / "link" / "images" / "1.png"), "caption": "hills"})
    write(src, "pairs.jsonl", "\n".join(map(json.dumps, lines)))
    records = read(src / "pairs.jsonl")
    assert [record.captions for record in records] == [(Caption("hills"),), (NIGHT,), (NIGHT,), (Caption("hills"),)]
    assert [record.conditions for record in records] == [(), (b"a.jpg",), (b"a.jpg", b"b.jpg"), ()]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "metadata.csv",
            "image,prompt,edit_image\na.jpg,hills,\nb.jpg,make it night,a.jpg\n"
            'c.jpg,make it night,"[""a.jpg"", ""b.jpg""]"\n',
        ),
        (
            "metadata.json",
            json.dumps(
                [
                    {"image": "a.jpg", "prompt": "hills"},
                    {"image": "b.jpg", "prompt": "make it night", "edit_image": "a.jpg"},
                    {"image": "c.jpg", "prompt": "make it night", "edit_image": ["a.jpg", "b.jpg"]},
                ]
            ),
        ),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_diffsynth_studio(tmp_path, name, content, whole):
    src = tmp_path / "diffsynth"
    if not whole:
        name = name.replace("metadata", "metadata_edit")
    write(src, name, content)
    if whole:
        (src / "images" / "1.png").unlink()  # no row names it
    records = read(src if whole else src / name)
    assert [record.captions for record in records] == [(Caption("hills"),), (NIGHT,), (NIGHT,)]
    assert [record.conditions for record in records] == [(), (b"a.jpg",), (b"a.jpg", b"b.jpg")]


def test_pico_banana(tmp_path):
    line = {
        "open_image_input_url": "https://x.invalid/1.jpg",
        "text": "make it night",
        "output_image": "images/1.png",
        "edit_type": "Change the time of day",
        "summarized_text": "turn day into night",
        "local_input_image": "a.jpg",
    }
    write(tmp_path / "pico", "sft.jsonl", json.dumps(line))
    (record,) = read(tmp_path / "pico" / "sft.jsonl")
    assert (record.key, record.image, record.conditions) == ("images/1.png", b"images/1.png", (b"a.jpg",))
    assert record.captions == (NIGHT, CHOSEN) and record.tags == ("Change the time of day",)


def test_folders_of_instruct_pix2pix(tmp_path):
    src = tmp_path / "pix2pix"
    prompt = {"caption": "hills by day", "edit": "make it night", "output": "hills by night", "url": "http://x.invalid"}
    for place in ("shard-00/0000000", "shard-00/0000001"):
        (src / place).mkdir(parents=True)
        (src / place / "prompt.json").write_text(json.dumps(prompt))
        (src / place / "metadata.jsonl").write_text('{"seed": 7, "cfg_scale": 7.5, "clip_dir": 0.3}')
        for seed in (7, 8):
            (src / place / f"{seed}_0.jpg").write_bytes(b"before")
            (src / place / f"{seed}_1.jpg").write_bytes(b"after")
    records = read(src)
    assert [record.key for record in records][:2] == ["shard-00/0000000/7_1.jpg", "shard-00/0000000/8_1.jpg"]
    assert {(record.image, record.conditions) for record in records} == {(b"after", (b"before",))} and len(records) == 4
    assert records[0].captions == (NIGHT, Caption("hills by night"))


def image(name: str) -> dict:
    return {"bytes": name.encode(), "path": f"{name}.png"}


@pytest.mark.parametrize(
    ("row", "captions", "tags"),
    [
        (
            {
                "original_prompt": "hills by day",
                "original_image": image("before"),
                "edit_prompt": "make it night",
                "edited_prompt": "hills by night",
                "edited_image": image("after"),
            },
            (NIGHT, Caption("hills by night")),
            (),
        ),
        (
            {"input_image": image("before"), "edit_prompt": "make it night", "edited_image": image("after")},
            (NIGHT,),
            (),
        ),
        (
            {
                "img_id": "1",
                "turn_index": 1,
                "source_img": image("before"),
                "mask_img": image("mask"),
                "instruction": "make it night",
                "target_img": image("after"),
            },
            (NIGHT,),
            (),
        ),
        (
            {
                "omni_edit_id": "task_1",
                "task": "style",
                "src_img": image("before"),
                "edited_img": image("after"),
                "edited_prompt_list": ["make it night", "turn day into night"],
                "width": 8,
                "height": 8,
                "o_score": 9.0,
            },
            (NIGHT, CHOSEN),
            ("style",),
        ),
    ],
    ids=["InstructPix2Pix", "InstructPix2Pix samples", "MagicBrush", "OmniEdit"],
)
def test_tables_of_edits(tmp_path, row, captions, tags):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row]), buffer)
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train-00000-of-00001.parquet").write_bytes(buffer.getvalue())
    (record,) = read(tmp_path / "set")
    assert (record.image, record.conditions, record.captions) == (b"after", (b"before",), captions)
    assert record.tags == tags
