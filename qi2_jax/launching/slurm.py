"""Slurm with GPUs: a batch script that requeues itself. It is documented at https://slurm.schedmd.com/sbatch.html."""

import re
import shlex

from qi2_jax.launching import environment
from qi2_jax.launching.folders import Folder, Mounted
from qi2_jax.launching.job import Job
from qi2_jax.launching.submission import Submission, commented
from qi2_jax.launching.topology import GpuNode

WARNING_SECONDS = 300  # before the time limit, in which a microbatch and a save must complete


def submission(job: Job, options: tuple[str, ...] = ()) -> Submission:
    """The batch script of a job.

    Args:
      job: training on nodes with GPUs.
      options: more options of `sbatch`, such as `--partition=gpu`.

    Raises:
      ValueError: if the job needs something that Slurm does not have, or for an option of another form.
    """
    if not isinstance(job.hardware, GpuNode):
        raise ValueError(f"--topology is {job.hardware}; --on slurm needs the GPUs of a node, such as h100:8")
    if job.spot:
        raise ValueError("--spot is for TPUs; with Slurm, choose a partition: --sbatch-option=--partition=NAME")
    work, cache = _path("--work", job.work), _path("--cache", job.cache or job.work)
    for option in options:
        if not re.fullmatch(r"--[a-z][a-z-]*(=[A-Za-z0-9_.:,/@%+-]+)?", option, re.ASCII):
            raise ValueError(f"--sbatch-option is {option!r}; write it as --sbatch-option=--partition=gpu")
    step = ["srun", "--kill-on-bad-exit=0"]  # the others save and leave by themselves; killed, they would not save
    if job.image:
        mounts = ",".join(dict.fromkeys((f"{work}:{work}", f"{cache}:{cache}")))
        step += [f"--container-image={job.image}", f"--container-mounts={mounts}", "--container-workdir=/opt/qi2"]
    exports = [
        f"{commented([each.reason])}export {each.name}={shlex.quote(each.value)}"
        for each in environment.variables(environment.SLURM)
    ]
    text = _SCRIPT.format(
        head=commented(job.summary(environment.SLURM)[:2]),
        name=job.name,
        nodes=job.slices,
        gpu=job.hardware,
        gpus=job.hardware.gpus,
        output=f"{work}/{job.name}-%j.log",
        warning=WARNING_SECONDS,
        more="".join(f"#SBATCH {option}\n" for option in options),
        exports="\n".join(exports),
        step=shlex.join([*step, *job.command(work, cache)]),
        stopped=environment.STOPPED,
        restarts=job.restarts,
    )
    return Submission(text, ("sbatch",), (("sbatch", "run this on a login node of the cluster"),))


def _path(flag: str, folder: Folder) -> str:
    if not isinstance(folder, Mounted):
        raise ValueError(f"{flag} is {folder}; with --on slurm, name a path that all nodes share, such as /shared/qi2")
    return folder.path


# One task per GPU: JAX gives each process the GPU with its local number.
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --gpus-per-node={gpu}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --exclusive
#SBATCH --output={output}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@{warning}
{more}{head}
{exports}

# Slurm signals this shell only (B:). scancel passes SIGTERM on to the processes, which save. Given SIGTERM, srun would
# kill them instead.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
{step} &
step=$!
while true; do
  wait "$step"
  status=$?
  kill -0 "$step" 2> /dev/null || break  # a trap interrupts `wait`
done

# Status 0: finished. {stopped}: stopped by SIGTERM, with the state saved. 2: the command cannot be parsed.
echo "status $status after ${{SLURM_RESTART_COUNT:-0}} restarts"
if [ "$status" = 0 ] || [ "$status" = 2 ]; then
  exit "$status"
elif [ "$status" = {stopped} ] || [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
