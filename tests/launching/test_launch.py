"""`qi2 launch`: what it prints, what it refuses, and that a dry run submits nothing."""

import pytest
import yaml

from qi2_jax.cli import main
from qi2_jax.launching.submission import Submission

STAGE = "experiments/qwen_image_2/s1_256p_t2i.py"
AUTOENCODER = "experiments/qwen_image_2/autoencoder.py"
PATHS = ["--work", "gs://bucket/qi2", "--out", "runs/s1", "--model", "model", "--image", "repository/qi2:1"]
TPU = ["--topology", "v6e:16x16", "--slices", "4", "--samples", "samples/s1", *PATHS]
PLACE = ["--project", "project", "--zone", "us-east5-b"]


@pytest.fixture
def applied(monkeypatch):
    """The submissions that were applied, which change nothing here."""
    done = []
    monkeypatch.setattr(Submission, "apply", lambda submission: done.append(submission))
    return done


def launch(*arguments: str) -> None:
    main.main(["launch", *arguments])


def test_a_dry_run_prints_what_would_be_applied_and_applies_nothing(applied, capsys):
    launch(STAGE, "--on", "gke", *TPU, "--dry-run")
    printed = capsys.readouterr().out
    (jobset,) = yaml.safe_load_all(printed)
    assert jobset["metadata"]["name"] == "s1-256p-t2i" and applied == []
    launch(STAGE, "--on", "gke", *TPU)
    assert capsys.readouterr().out == printed == applied[0].text
    assert applied[0].command == ("kubectl", "apply", "-f", "-")


def test_every_target_prints_a_text_that_its_command_reads(applied, capsys):
    launch(STAGE, "--on", "queued-resources", *TPU, *PLACE, "transformer.train.steps=5")
    on_gpus = ["--topology", "h100:8", "--slices", "128", "--work", "/shared", "--samples", "s", "--out", "r"]
    launch(STAGE, "--on", "slurm", *on_gpus)
    scoring = ["--records", "gs://bucket/records", "--image", "repository/scoring:1", "--project", "project"]
    launch(STAGE, "--on", "dataflow", *scoring, "--region", "us-east5")
    assert [each.command for each in applied] == [("bash", "-s"), ("sbatch",), ("bash", "-s")]
    assert all(each.text.startswith("#!/") for each in applied)
    assert "--distributed transformer.train.steps=5" in applied[0].text
    assert "requires alignment" in applied[2].text  # stage 1 requires it, and it needs a CLIP
    assert capsys.readouterr().out == "".join(each.text for each in applied)


def test_an_autoencoder_reads_records(applied):
    mesh = ["vae.mesh.data=4", "vae.mesh.fsdp=64", "vae.mesh.tensor=1"]
    paths = [part for part in PATHS if part not in ("--model", "model")]
    launch(AUTOENCODER, "--on", "gke", "--topology", "v6e:8x8", "--slices", "4", "--data", "records", *paths, *mesh)
    assert "--data\n" in applied[0].text.replace("- ", "") and "/mnt/qi2/work/records" in applied[0].text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((f"{STAGE}:tiny", "--on", "gke", *TPU), "runs on CPUs"),
        (("experiments/qwen_image_2/curriculum.py", "--on", "gke", *TPU), "take its stages one after the other"),
        (("experiments/none.py", "--on", "gke", *TPU), "is not a Python file"),
        ((STAGE, "--on", "gke", *TPU, "transformer.nothing=1"), "unknown config key"),
        ((STAGE, "--on", "gke", *TPU, "--slices", "2"), "--slices 4, or transformer.mesh.data=2"),
        ((STAGE, "--on", "gke", *PATHS), "needs --topology"),
        ((STAGE, "--on", "gke", "--topology", "v6e:16x16", *PATHS), "training data with --samples"),
        ((STAGE, "--on", "gke", *TPU, "--data", "records"), "which --data is not for"),
        ((AUTOENCODER, "--on", "gke", *TPU, "--data", "r"), "which --samples and --model is not for"),
        ((STAGE, "--on", "gke", *TPU, "transformer.batch_sizes=(64,)"), "a batch of 64 images"),
        ((STAGE, "--on", "gke", *TPU, "--work", "gs://Bucket/a"), "--work is 'gs://Bucket/a'"),
        ((STAGE, "--on", "gke", *TPU, "--name", "S1"), "RFC 1123"),
        ((STAGE, "--on", "queued-resources", *TPU), "needs --project"),
        ((STAGE, "--on", "slurm", *TPU), "such as h100:8"),
        ((STAGE, "--on", "dataflow", "--project", "project"), "needs --records"),
    ],
)
def test_mistakes_are_named_before_anything_is_printed(arguments, message, applied, capsys):
    with pytest.raises(SystemExit) as raised:
        launch(*arguments)
    assert message in str(raised.value) and not applied and not capsys.readouterr().out


def test_a_missing_program_and_a_failed_command_are_named():
    with pytest.raises(ValueError, match="no-such-program is not installed here: get it"):
        Submission("", ("true",), (("no-such-program", "get it"),)).apply()
    with pytest.raises(ValueError, match="false failed with status 1"):
        Submission("", ("false",), ()).apply()
