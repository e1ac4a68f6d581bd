"""Environment variables of a process on a cluster, each with its reason.

Options of the TPU compiler are not among them: `LIBTPU_INIT_ARGS` would apply to every program, and would be lost in a
start by hand. Nor are `MEGASCALE_*` and `TPU_WORKER_*`, by which JAX and libtpu find the other hosts and slices: GKE
and the TPU runtime set them. `NCCL_*` variables depend on the network of a Slurm cluster, which sets them itself.
"""

import dataclasses

from qi2_jax.runtime.signals import STOPPED_STATUS

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later

GKE, QUEUED_RESOURCES, SLURM = "gke", "queued-resources", "slurm"
TARGETS = (GKE, QUEUED_RESOURCES, SLURM)
_TPU = (GKE, QUEUED_RESOURCES)


@dataclasses.dataclass(frozen=True)
class Variable:
    """An environment variable of every process.

    Attributes:
      name, value: variable and its value.
      reason: sentence that says why it is set.
      targets: clusters on which it is set.
    """

    name: str
    value: str
    reason: str
    targets: tuple[str, ...] = TARGETS


VARIABLES = (
    Variable(
        STOPPED_STATUS,
        str(STOPPED),
        "Without it, SIGTERM ends a process with status 0, and the cluster would take a preempted job for a finished "
        "one. Status 0 now means that the training is finished.",
    ),
    Variable(
        "JAX_PLATFORMS",
        "tpu,cpu",
        "JAX would train on the CPU if the TPU cannot be initialised. With this value it fails, and the job restarts.",
        _TPU,
    ),
    Variable(
        "JAX_PLATFORMS",
        "cuda,cpu",
        "JAX would train on the CPU if the GPUs cannot be initialised. With this value it fails, and the job restarts.",
        (SLURM,),
    ),
    Variable(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.92",
        "JAX reserves 75% of a GPU's memory by default; nothing else runs on these GPUs.",
        (SLURM,),
    ),
    Variable(
        "HF_HUB_OFFLINE",
        "1",
        "Tokenizer and encoders are read from the model folder. A missing file is an error, instead of a request from "
        "every host to the hub.",
    ),
    Variable("PYTHONUNBUFFERED", "1", "The cluster's log shows a line when it is printed, also before a crash."),
    Variable("PYTHONFAULTHANDLER", "1", "A crash inside libtpu, CUDA or XLA prints the Python stack to the log."),
)


def variables(target: str) -> tuple[Variable, ...]:
    """The variables of a process on a cluster."""
    return tuple(variable for variable in VARIABLES if target in variable.targets)
