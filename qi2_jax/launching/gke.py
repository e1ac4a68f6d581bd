"""Google Kubernetes Engine: a JobSet that Kueue admits, the objects of its queue, and the same job for `xpk`.

The fields are documented at https://jobset.sigs.k8s.io, https://kueue.sigs.k8s.io and
https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from qi2_jax.launching import environment, names
from qi2_jax.launching.folders import Bucket, Export, Folder
from qi2_jax.launching.job import CACHE, WORK, Job, need_tpu
from qi2_jax.launching.submission import Submission, commented
from qi2_jax.launching.topology import CHIPS_PER_HOST, Slice

CONTAINER = "train"
TPU = "google.com/tpu"
# Time to complete a microbatch and a save before a pod is killed. A Spot VM gives at most 30 seconds in any case.
GRACE_SECONDS = 300
XPK_QUEUE = "multislice-queue"  # of clusters that `xpk cluster create` made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a JobSet goes.

    Attributes:
      namespace: Kubernetes namespace.
      queue: Kueue's LocalQueue in this namespace.
      service_account: Kubernetes service account that may read and write the buckets.
      with_queue: whether the queue is created as well.
      name, project, zone: cluster, for the `xpk` commands; "": they are not printed.

    Raises:
      ValueError: for a name that Kubernetes refuses.
    """

    namespace: str = "default"
    queue: str = "qi2"
    service_account: str = "qi2"
    with_queue: bool = False
    name: str = ""
    project: str = ""
    zone: str = ""

    def __post_init__(self) -> None:
        for flag in ("namespace", "queue", "service_account"):
            names.check_label(f"--{flag.replace('_', '-')}", getattr(self, flag))
        for flag, value in (("cluster", self.name), ("project", self.project), ("zone", self.zone)):
            if value:
                names.check_label(f"--{flag}", value)


def submission(job: Job, cluster: Cluster) -> Submission:
    """The manifests of a job, with the `xpk` commands as a comment.

    Raises:
      ValueError: if the job needs something that GKE does not have.
    """
    tpu = need_tpu(job, environment.GKE)
    if job.slices > 1 and tpu.hosts == 1:
        raise ValueError(f"--topology {tpu} has one host; GKE joins slices only if each has several hosts")
    objects = queue_objects(tpu, job, cluster) if cluster.with_queue else []
    objects.append(jobset(job, cluster))
    head = commented([*job.summary(environment.GKE), "", *_xpk_lines(job, tpu, cluster)])
    text = yaml.safe_dump_all(objects, sort_keys=False, width=120, allow_unicode=True)
    hint = "install the Google Cloud CLI and `gcloud components install kubectl`"
    return Submission(head + text, ("kubectl", "apply", "-f", "-"), (("kubectl", hint),))


def jobset(job: Job, cluster: Cluster) -> dict[str, Any]:
    """The JobSet: one Job for each slice, with one pod for each host."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": cluster.namespace,
            "labels": {"kueue.x-k8s.io/queue-name": cluster.queue},
            # A Job gets a whole node pool, which is a slice: its hosts are never spread over two slices.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.restarts,
                # The pods of the earlier attempt are gone before new ones start: two attempts never share the folder.
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": job.slices, "template": {"spec": _job_of_slice(job, cluster)}}
            ],
        },
    }


def _job_of_slice(job: Job, cluster: Cluster) -> dict[str, Any]:
    hosts = need_tpu(job, environment.GKE).hosts
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # all hosts start together, or none: the JobSet restarts them
        # Both rules mean a preemption, which the JobSet does not count. Other failures are counted.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": CONTAINER,
                        "operator": "In",
                        "values": [environment.STOPPED],
                    },
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": _pod(job, cluster),
    }


def _pod(job: Job, cluster: Cluster) -> dict[str, Any]:
    tpu = need_tpu(job, environment.GKE)
    folders = {"work": (job.work, WORK)} | ({"cache": (job.cache, CACHE)} if job.cache else {})
    volumes = [_volume(name, folder, read_only=name == "cache") for name, (folder, _) in folders.items()]
    mounts = [{"name": name, "mountPath": path, "readOnly": name == "cache"} for name, (_, path) in folders.items()]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu.kind.accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.label,
    }
    tolerations = [{"key": TPU, "operator": "Exists", "effect": "NoSchedule"}]
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    in_buckets = any(isinstance(folder, Bucket) for folder, _ in folders.values())
    return {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} if in_buckets else {}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "serviceAccountName": cluster.service_account,
            "nodeSelector": selector,
            "tolerations": tolerations,
            # Slices exchange gradients over the hosts' network, faster without Kubernetes' network between.
            "hostNetwork": True,
            "dnsPolicy": "ClusterFirstWithHostNet",
            "containers": [_container(job, mounts)],
            # Worker processes that read samples share memory; a container has 64 MiB of it by default.
            "volumes": [*volumes, {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
        },
    }


def _container(job: Job, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": CONTAINER,
        "image": job.image,
        "command": job.start_command(0),  # the JobSet restarts
        "env": [{"name": each.name, "value": each.value} for each in environment.variables(environment.GKE)],
        "resources": {"limits": {TPU: str(CHIPS_PER_HOST)}},
        "securityContext": {"privileged": True},  # libtpu locks the memory of its buffers, and raises the limit for it
        "volumeMounts": [*mounts, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }


def _joined(options: Mapping[str, str]) -> str:
    """Mount options as the driver parses them: KEY, KEY=VALUE, or GROUP:KEY:VALUE as in gcsfuse's config file."""
    return ",".join(key + (":" if ":" in key else "=") * bool(value) + value for key, value in options.items())


def _volume(name: str, folder: Folder, *, read_only: bool) -> dict[str, Any]:
    if isinstance(folder, Bucket):
        attributes = {
            "bucketName": folder.name,
            "mountOptions": _joined(folder.mount_options(read_only=read_only)),
            "hostNetworkPodKSA": "true",  # the pod's service account, although the pod is on the host's network
        }
        return {
            "name": name,
            "csi": {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": read_only, "volumeAttributes": attributes},
        }
    if isinstance(folder, Export):
        return {"name": name, "nfs": {"server": folder.server, "path": folder.path, "readOnly": read_only}}
    raise ValueError(f"--{name} is {folder}; pods cannot see it: use gs://BUCKET/FOLDER or nfs://SERVER/EXPORT")


def queue_objects(tpu: Slice, job: Job, cluster: Cluster) -> list[dict[str, Any]]:
    """Kueue's objects of a queue for slices of one kind: an administrator creates them once."""
    flavor = f"{tpu.kind.name}-{tpu.label}" + ("-spot" if job.spot else "")
    labels = {
        "cloud.google.com/gke-tpu-accelerator": tpu.kind.accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.label,
    } | ({"cloud.google.com/gke-spot": "true"} if job.spot else {})
    quota = {"name": TPU, "nominalQuota": job.chips}
    return [
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "ResourceFlavor",
            "metadata": {"name": flavor},
            "spec": {"nodeLabels": labels},
        },
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "ClusterQueue",
            "metadata": {"name": cluster.queue},
            "spec": {
                "namespaceSelector": {},
                # A job of higher priority stops this one, which saves, and continues when the chips are free again.
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [
                    {"coveredResources": [TPU], "flavors": [{"name": flavor, "resources": [quota]}]},
                ],
            },
        },
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "LocalQueue",
            "metadata": {"name": cluster.queue, "namespace": cluster.namespace},
            "spec": {"clusterQueue": cluster.queue},
        },
    ]


def xpk_commands(job: Job, cluster: Cluster) -> list[list[str]]:
    """The same job for a cluster that `xpk cluster create` made: its storages, once, and the workload.

    The workload counts preemptions like other failures: `xpk` has no rule for them.
    """
    tpu = need_tpu(job, environment.GKE)
    where = ["--cluster", cluster.name, "--project", cluster.project, "--zone", cluster.zone]
    commands = []
    storages = []
    for name, folder, path in (("work", job.work, WORK), ("cache", job.cache, CACHE)):
        if isinstance(folder, Bucket):
            read_only = name == "cache"
            options = _joined(folder.mount_options(read_only=read_only))
            storages.append(f"{job.name}-{name}")
            commands.append(
                [
                    *("xpk", "storage", "attach", storages[-1], *where, "--type", "gcsfuse", "--auto-mount", "false"),
                    *("--bucket", folder.name, "--mount-point", path, "--readonly", str(read_only).lower()),
                    *("--size", "1", "--mount-options", options),
                ]
            )
    env = [part for each in environment.variables(environment.GKE) for part in ("--env", f"{each.name}={each.value}")]
    # Status 1: an error, or another host is gone. Status 70: the watchdog. By default, xpk restarts after neither.
    restart_on = f"1,70,{environment.STOPPED}"
    commands.append(
        [
            *("xpk", "workload", "create", "--workload", job.name, *where),
            *("--tpu-type", tpu.accelerator_type, "--num-slices", str(job.slices), "--docker-image", job.image),
            *("--command", shlex.join(job.start_command(0)), *env),
            *(part for storage in storages for part in ("--storage", storage)),
            *("--max-restarts", str(job.restarts), "--restart-on-exit-codes", restart_on),
            *("--termination-grace-period-seconds", str(GRACE_SECONDS)),
            *(["--spot"] if job.spot else []),
        ]
    )
    return commands


def _xpk_lines(job: Job, tpu: Slice, cluster: Cluster) -> list[str]:
    if not (cluster.name and cluster.project and cluster.zone):
        return ["For the xpk commands of the same job, give --cluster, --project and --zone."]
    lines = [f"The same job with xpk, whose clusters have the queue {XPK_QUEUE}:"]
    if not all(isinstance(folder, Bucket) for folder in (job.work, job.cache or job.work)):
        lines.append("(attach the NFS folder first: xpk storage attach --type gcpfilestore)")
    return [*lines, *map(shlex.join, xpk_commands(job, cluster))]
