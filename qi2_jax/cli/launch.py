"""`qi2 launch EXPERIMENT --on CLUSTER`: prints a training in the language of a cluster, and submits it."""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

from qi2_jax.cli import options

if TYPE_CHECKING:
    from qi2_jax.launching.job import Job
    from qi2_jax.launching.submission import Submission
    from qi2_jax.workflows.config import AutoencoderExperiment, StageExperiment

ON = ("gke", "queued-resources", "slurm", "dataflow")
RESTARTS, WORKERS = 50, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_experiment_arguments(parser)
    parser.add_argument(
        "--on",
        required=True,
        choices=ON,
        help="gke: JobSet with Kueue; queued-resources: TPU VMs; slurm: nodes with GPUs; dataflow: scoring of records",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be submitted, and submit nothing: YAML or a script"
    )
    parser.add_argument("--image", default="", metavar="IMAGE", help="container image, see launch/Containerfile")
    parser.add_argument("--project", default="", help="Google Cloud project")
    _add_training(parser.add_argument_group("training (all but dataflow)"))
    _add_folders(
        parser.add_argument_group(
            "folders", "Folders are gs://BUCKET/FOLDER or nfs://SERVER/EXPORT, and on slurm an absolute path."
        )
    )
    gke = parser.add_argument_group("gke and queued-resources")
    gke.add_argument("--zone", default="", help="zone of the TPUs")
    gke.add_argument(
        "--service-account",
        default="",
        metavar="NAME",
        help="gke: Kubernetes service account (default: qi2); queued-resources: email of the VMs' account",
    )
    gke.add_argument("--cluster", default="", help="gke: name of the cluster, for the xpk commands")
    gke.add_argument("--namespace", default="default", help="gke: Kubernetes namespace (default: default)")
    gke.add_argument("--queue", default="qi2", help="gke: Kueue's LocalQueue (default: qi2)")
    gke.add_argument("--with-queue", action="store_true", help="gke: also create the queue, with a quota for this job")
    parser.add_argument_group("slurm").add_argument(
        "--sbatch-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="option of sbatch, written as --sbatch-option=--partition=gpu; may be repeated",
    )
    dataflow = parser.add_argument_group("dataflow")
    dataflow.add_argument("--records", default="", metavar="gs://BUCKET/DIR", help="folder of records to score")
    dataflow.add_argument("--region", default="", help="region of the workers")
    dataflow.add_argument(
        "--workers", type=int, default=WORKERS, metavar="N", help=f"most workers at a time (default {WORKERS})"
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--topology", default="", metavar="T", help="TPU slice such as v6e:16x16; on slurm h100:8")
    group.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices, or of nodes (default 1)")
    group.add_argument("--name", default="", help="name of the job (default: that of the experiment's file)")
    group.add_argument("--spot", action="store_true", help="use Spot capacity, which may be taken away at any time")
    group.add_argument(
        "--restarts",
        type=int,
        default=RESTARTS,
        metavar="N",
        help=f"restarts after errors (default {RESTARTS}); those after a preemption do not count",
    )


def _add_folders(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--work", default="", metavar="FOLDER", help="folder of runs and models, which the job writes")
    group.add_argument(
        "--cache", default="", metavar="FOLDER", help="folder of --samples or --data, which the job only reads"
    )
    group.add_argument(
        "--compiled",
        default="",
        metavar="gs://BUCKET/DIR",
        help="folder of compiled programs (default: compilation_cache of the experiment, inside the run)",
    )
    for name, text in (
        ("samples", "encoded samples, inside the folder of --cache if given, otherwise of --work"),
        ("data", "for an autoencoder: scored records, instead of --samples"),
        ("model", "model folder inside the folder of --work"),
        ("start", "source of the initial weights inside the folder of --work"),
        ("out", "folder of the run inside the folder of --work; the same folder continues a run"),
    ):
        group.add_argument(f"--{name}", default="", metavar="PATH", help=text)


def main(arguments: argparse.Namespace) -> None:
    submission = _submission(arguments)
    sys.stdout.write(submission.text)
    sys.stdout.flush()
    if not arguments.dry_run:
        submission.apply()


def _submission(arguments: argparse.Namespace) -> "Submission":
    from qi2_jax.launching import gke, queued_resources, slurm

    if arguments.on == "dataflow":
        return _scoring(arguments)
    job = _job(arguments)
    if arguments.on == "gke":
        cluster = gke.Cluster(
            namespace=arguments.namespace,
            queue=arguments.queue,
            service_account=arguments.service_account or "qi2",
            with_queue=arguments.with_queue,
            name=arguments.cluster,
            project=arguments.project,
            zone=arguments.zone,
        )
        return gke.submission(job, cluster)
    if arguments.on == "slurm":
        return slurm.submission(job, tuple(arguments.sbatch_option))
    account = arguments.service_account
    return queued_resources.submission(
        job, queued_resources.Place(project=arguments.project, zone=arguments.zone, service_account=account)
    )


def _job(arguments: argparse.Namespace) -> "Job":
    from qi2_jax.launching import folders, names, topology
    from qi2_jax.launching.job import Inputs, Job
    from qi2_jax.workflows.config import AutoencoderExperiment

    missing = [f"--{name}" for name in ("topology", "work", "out") if not getattr(arguments, name)]
    if missing:
        raise ValueError(f"--on {arguments.on} needs {' and '.join(missing)}")
    config = _load(arguments)
    is_autoencoder = isinstance(config, AutoencoderExperiment)
    _check_inputs(arguments, is_autoencoder)
    parse = topology.parse_node if arguments.on == "slurm" else topology.parse_slice
    return Job(
        name=arguments.name or names.label_of(pathlib.Path(arguments.experiment.partition(":")[0]).stem),
        experiment=arguments.experiment,
        overrides=tuple(arguments.overrides),
        mesh=config.vae.mesh if isinstance(config, AutoencoderExperiment) else config.transformer.mesh,
        mesh_key="vae.mesh" if is_autoencoder else "transformer.mesh",
        batch_sizes=_batch_sizes(config),
        hardware=parse(arguments.topology),
        slices=arguments.slices,
        work=folders.parse("--work", arguments.work),
        cache=folders.parse("--cache", arguments.cache) if arguments.cache else None,
        inputs=Inputs(**{name: getattr(arguments, name) for name in ("out", "samples", "data", "model", "start")}),
        compiled=folders.parse_bucket("--compiled", arguments.compiled) if arguments.compiled else None,
        image=arguments.image,
        spot=arguments.spot,
        restarts=arguments.restarts,
    )


def _check_inputs(arguments: argparse.Namespace, is_autoencoder: bool) -> None:
    """Raises a ValueError unless the inputs are those that `qi2 train` accepts for what the experiment trains."""
    what, needed, others = "a transformer", "samples", ["data"]
    if is_autoencoder:
        what, needed, others = "an autoencoder", "data", ["samples", "model", "start"]
    if not getattr(arguments, needed):
        raise ValueError(f"{arguments.experiment} trains {what}: name its training data with --{needed}")
    if given := [f"--{name}" for name in others if getattr(arguments, name)]:
        raise ValueError(f"{arguments.experiment} trains {what}, which {' and '.join(given)} is not for; leave it out")


def _batch_sizes(config: "StageExperiment | AutoencoderExperiment") -> tuple[int, ...]:
    from qi2_jax.workflows.config import AutoencoderExperiment

    if isinstance(config, AutoencoderExperiment):
        return tuple(phase.batch_size for phase in config.vae.phases.values())
    return tuple(config.transformer.batch_sizes)


def _load(arguments: argparse.Namespace) -> "StageExperiment | AutoencoderExperiment":
    config = options.load_trained(arguments)
    if config.platform == "cpu":
        raise ValueError(f"{arguments.experiment} runs on CPUs (platform 'cpu'); launch the form without :tiny")
    return config


def _scoring(arguments: argparse.Namespace) -> "Submission":
    from data_pipeline.filters import CASCADE
    from qi2_jax.launching import dataflow, folders

    if not arguments.records:
        raise ValueError("--on dataflow needs --records gs://BUCKET/DIR")
    required = _load(arguments).data.thresholds.require
    return dataflow.submission(
        folders.parse_bucket("--records", arguments.records),
        project=arguments.project,
        region=arguments.region,
        image=arguments.image,
        workers=arguments.workers,
        needs_model=[each.name for each in CASCADE if each.name in required and (each.on_device or not each.can_score)],
    )
