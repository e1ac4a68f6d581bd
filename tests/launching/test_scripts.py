"""The scripts for queued resources, Slurm and Dataflow, run with programs that stand in for the cluster's."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from qi2_jax.launching import dataflow, folders, queued_resources, slurm
from qi2_jax.launching.environment import STOPPED
from tests.launching import jobs

PLACE = queued_resources.Place(project="project", zone="us-east5-b")
ROOT = pathlib.Path(__file__).parents[2]


def run(script: str, folder: pathlib.Path, programs: dict[str, str], **environment: str) -> tuple[int, list[str]]:
    """Runs a script with programs that replace the real ones; returns its status and the calls of these programs."""
    calls = folder / "calls"
    for name, body in programs.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{body}\n')
        path.chmod(0o755)
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), **environment}
    done = subprocess.run(["bash", "-s"], input=script, env=env, text=True, check=False, timeout=60, cwd=folder)
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, "0", False), (STOPPED, "0", True), (STOPPED, "99", True), (1, "0", True), (1, "7", False), (2, "0", False)],
)
def test_slurm_requeues_a_job_that_is_not_finished(status, restarts, requeued, tmp_path):
    script = slurm.submission(jobs.GPU).text
    programs = {"srun": f"exit {status}", "scontrol": ""}
    done, calls = run(script, tmp_path, programs, SLURM_JOB_ID="12", SLURM_RESTART_COUNT=restarts)
    assert done == status and ("scontrol requeue 12" in calls) == requeued
    assert calls[0].startswith("srun ") and "--out /shared/qi2/runs/s1 --distributed" in calls[0]


def test_slurm_passes_sigterm_on_and_requeues(tmp_path):
    """The processes of the step get SIGTERM, not srun, which would kill them."""
    waiting = f"""
        trap 'exit 1' TERM
        trap 'exit {STOPPED}' USR1
        echo $$ > srun.pid
        kill -TERM $PPID  # what `--signal=B:TERM` does
        for _ in $(seq 600); do sleep 0.1; done
        exit 1"""
    programs = {"srun": waiting, "scancel": "kill -USR1 $(cat srun.pid)", "scontrol": ""}
    done, calls = run(slurm.submission(jobs.GPU).text, tmp_path, programs, SLURM_JOB_ID="12")
    assert done == STOPPED and calls[1:] == ["scancel --signal=TERM 12", "scontrol requeue 12"]


def test_slurm_has_a_process_for_each_gpu_and_names_its_options():
    text = slurm.submission(jobs.gpu(image=jobs.IMAGE), ("--partition=gpu", "--time=1-00:00:00")).text
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=h100:8", "--requeue", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in text
    assert f"--container-image={jobs.IMAGE}" in text and "/shared/qi2:/shared/qi2" in text
    for option in ("--wrap=id;id", "partition=gpu", "--a b", "--a\n#SBATCH"):
        with pytest.raises(ValueError, match="--sbatch-option is"):
            slurm.submission(jobs.GPU, (option,))
    with pytest.raises(ValueError, match="all nodes share"):
        slurm.submission(jobs.gpu(work=jobs.TPU.work))
    with pytest.raises(ValueError, match="--spot is for TPUs"):
        slurm.submission(jobs.gpu(spot=True))


# `list` prints the states in $STATES one after the other, and nothing at the end.
GCLOUD = """
case "$*" in *" list "*)
  read -r state rest < states; echo "$rest" > states
  [ "$state" = NONE ] || echo "$state" ;;
esac"""


@pytest.mark.parametrize(
    ("states", "requests", "deletions", "status"),
    [
        ("NONE ACTIVE NONE", 1, 0, 0),  # requested, and deleted by a host when finished
        ("ACTIVE ACTIVE NONE", 0, 0, 0),  # the script was started again
        ("NONE ACTIVE SUSPENDED ACTIVE NONE", 2, 1, 0),  # preempted
        ("NONE FAILED NONE", 1, 0, 1),  # no quota
    ],
)
def test_preempted_slices_are_requested_again_until_the_training_is_finished(
    states, requests, deletions, status, tmp_path
):
    (tmp_path / "states").write_text(f"{states}\n")
    script = queued_resources.submission(jobs.tpu(spot=True), PLACE).text
    done, calls = run(script, tmp_path, {"gcloud": GCLOUD, "sleep": ""})
    made = [call for call in calls if " create " in call]
    assert done == status and len(made) == requests and sum(" delete " in call for call in calls) == deletions
    for call in made:
        for flag in ("--accelerator-type=v6e-256", "--node-count=4", "--spot", "--runtime-version=v2-alpha-tpuv6e"):
            assert flag in call


STAND_INS = {
    "mountpoint": "exit 1",
    "mkdir": "",
    "gcsfuse": "",
    "gcloud": "",
    "curl": 'echo "$WORKER"',
    "mount.nfs": "",
}


@pytest.mark.parametrize(
    ("status", "worker", "given_back"), [(0, "0", True), (0, "3", False), (STOPPED, "0", False), (1, "0", False)]
)
def test_a_host_gives_the_tpus_back_only_when_the_training_is_finished(status, worker, given_back, tmp_path):
    docker = f'[ "$1" = run ] && exit {status}'
    script = queued_resources.startup_script(jobs.TPU, PLACE)
    _, calls = run(script, tmp_path, STAND_INS | {"docker": docker}, WORKER=worker)
    assert any("queued-resources delete s1-256p" in call for call in calls) == given_back
    (container,) = [call for call in calls if call.startswith("docker run")]
    assert "--restarts 7 -- qi2 train" in container and "--volume=/mnt/qi2/work:/mnt/qi2/work" in container
    assert calls.index("mountpoint -q /mnt/qi2/work") < calls.index(container)


def test_a_folder_that_cannot_be_mounted_ends_the_start(tmp_path):
    script = queued_resources.startup_script(jobs.TPU, PLACE)
    done, calls = run(script, tmp_path, STAND_INS | {"gcsfuse": "exit 1", "docker": ""})
    assert done and not any(call.startswith("docker run") for call in calls)


def test_one_slice_is_one_node_and_nfs_is_mounted():
    job = jobs.tpu(work=folders.parse("--work", "nfs://10.0.0.2/share"))
    assert "mount -t nfs -o rw,hard 10.0.0.2:/share /mnt/qi2/work" in queued_resources.startup_script(job, PLACE)
    one = jobs.tpu(slices=1, mesh=jobs.MeshShape(1, 256, 1))
    assert "--node-id=s1-256p" in queued_resources.create_flags(one, PLACE)
    with pytest.raises(ValueError, match="--zone"):
        queued_resources.Place(project="project", zone="")
    with pytest.raises(ValueError, match="--service-account"):
        queued_resources.Place(project="project", zone="zone-a", service_account="a b@c")


def test_dataflow_gets_the_options_of_the_guide(tmp_path):
    records = folders.parse_bucket("--records", "gs://bucket/records")
    chosen = dict(project="project", region="us-east5", image=jobs.IMAGE, workers=9, needs_model=["alignment"])
    text = dataflow.submission(records, **chosen).text
    done, (call,) = run(text, tmp_path, {"qi2": ""})
    assert done == 0 and call.startswith("qi2 data score gs://bucket/records --runner DataflowRunner")
    assert "--beam-option=--max_num_workers=9" in call and "requires alignment" in text
    for wrong in (dict(region=""), dict(project="a b"), dict(image=""), dict(workers=0)):
        with pytest.raises(ValueError):
            dataflow.submission(records, **(chosen | wrong))


def tool(name: str) -> str:
    """A linter from requirements-dev.txt; the test is skipped without it, except in CI."""
    found = shutil.which(name, path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        message = f"{name} is missing: pip install -r requirements-dev.txt"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


def test_the_container_file_has_no_mistakes():
    done = subprocess.run([tool("hadolint"), ROOT / "launch" / "Containerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_scripts_have_no_mistakes(tmp_path):
    scripts = {
        "slurm.sh": slurm.submission(jobs.gpu(image=jobs.IMAGE)).text,
        "request.sh": queued_resources.submission(jobs.tpu(spot=True), PLACE).text,
        "startup.sh": queued_resources.startup_script(jobs.TPU, PLACE),
        "start.sh": (ROOT / "launch" / "start.sh").read_text(),
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    files = [tmp_path / name for name in scripts]
    done = subprocess.run([tool("shellcheck"), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
