"""Cloud TPU queued resources: TPU VMs that start the container when they boot.

The text is a script that requests the slices, and requests them again when they were preempted, until the training is
finished. It is documented at https://cloud.google.com/tpu/docs/queued-resources.
"""

import dataclasses
import re
import shlex

from qi2_jax.launching import environment, names
from qi2_jax.launching.folders import Bucket, Export, Folder
from qi2_jax.launching.job import CACHE, WORK, Job, need_tpu
from qi2_jax.launching.submission import Submission, commented

POLL_SECONDS = 60
STOP_SECONDS = 30  # what Cloud TPU gives between SIGTERM and the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the TPUs are requested.

    Attributes:
      project, zone: Google Cloud project and zone.
      service_account: email address of the account of the TPU VMs; "": Compute Engine's default account.

    Raises:
      ValueError: for a missing or impossible name.
    """

    project: str
    zone: str
    service_account: str = ""

    def __post_init__(self) -> None:
        for flag in ("project", "zone"):
            if not getattr(self, flag):
                raise ValueError(f"--on queued-resources needs --{flag}")
            names.check_label(f"--{flag}", getattr(self, flag))
        if self.service_account and not re.fullmatch(r"[a-z0-9-]+@[a-z0-9.-]+", self.service_account, re.ASCII):
            raise ValueError(
                f"--service-account is {self.service_account!r}; write the email address of a service account"
            )


def submission(job: Job, place: Place) -> Submission:
    """The script that requests the slices of a job.

    Raises:
      ValueError: if the job needs something that TPU VMs do not have.
    """
    head = "#!/usr/bin/env bash\n" + commented(
        [
            *job.summary(environment.QUEUED_RESOURCES),
            "",
            "This script ends when the training is finished: a host then deletes the queued resource. Ctrl-C ends only",
            "the script, and starting it again watches the same queued resource.",
        ]
    )
    text = head + _SCRIPT.format(
        name=shlex.quote(job.name),
        where=shlex.join([f"--project={place.project}", f"--zone={place.zone}"]),
        create=shlex.join(create_flags(job, place)),
        startup=startup_script(job, place),
        poll=POLL_SECONDS,
    )
    hint = "see https://cloud.google.com/sdk/docs/install"
    return Submission(text, ("bash", "-s"), (("gcloud", hint), ("bash", "install bash")))


def create_flags(job: Job, place: Place) -> list[str]:
    """The flags of `gcloud compute tpus queued-resources create`, beside its place and the startup script."""
    tpu = need_tpu(job, environment.QUEUED_RESOURCES)
    nodes = [f"--node-id={job.name}"]
    if job.slices > 1:
        nodes = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    return [
        f"--accelerator-type={tpu.accelerator_type}",
        f"--runtime-version={tpu.kind.runtime}",
        *nodes,
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        *([f"--service-account={place.service_account}"] if place.service_account else []),
        *(["--spot"] if job.spot else []),
    ]


def startup_script(job: Job, place: Place) -> str:
    """The script that every TPU VM runs whenever it boots: mount the folders, then run the container."""
    volumes = {WORK: job.work} | ({CACHE: job.cache} if job.cache else {})
    env = [f"--env={each.name}={each.value}" for each in environment.variables(environment.QUEUED_RESOURCES)]
    container = [
        *("docker", "run", "--rm", f"--name={job.name}"),
        "--privileged",  # the TPU's devices
        "--network=host",  # other hosts connect to this one, and JAX asks the metadata server for their addresses
        "--shm-size=16g",  # worker processes that read samples share memory; the default is 64 MiB
        f"--stop-timeout={STOP_SECONDS}",
        *env,
        *(f"--volume={path}:{path}" for path in volumes),
        job.image,
        *job.start_command(job.restarts),
    ]
    delete = ["gcloud", "compute", "tpus", "queued-resources", "delete", job.name]
    delete += [f"--project={place.project}", f"--zone={place.zone}", "--force", "--async", "--quiet"]
    return _STARTUP.format(
        mounts="\n".join(_mount(path, folder) for path, folder in volumes.items()),
        registry=shlex.quote(job.image.partition("/")[0]),
        name=shlex.quote(job.name),
        container=shlex.join(container),
        delete=shlex.join(delete),
    )


def _mount(path: str, folder: Folder) -> str:
    """Shell commands that mount a folder on a TPU VM, unless it is mounted already."""
    if isinstance(folder, Bucket):
        options = folder.mount_options(read_only=path == CACHE)
        flags = [f"--{key.replace(':', '-')}" + f"={value}" * bool(value) for key, value in options.items()]
        flags += ["-o", "allow_other"] + (["-o", "ro"] if path == CACHE else [])
        command = ["gcsfuse", *flags, folder.name, path]
        install = "install_gcsfuse"
    elif isinstance(folder, Export):
        read_only = ["-o", "ro,nolock" if path == CACHE else "rw,hard"]
        command = ["mount", "-t", "nfs", *read_only, f"{folder.server}:{folder.path}", path]
        install = "install_nfs"
    else:
        raise ValueError(f"{folder} is not on the TPU VMs: use gs://BUCKET/FOLDER or nfs://SERVER/EXPORT")
    return f"mkdir -p {path}\n{install}\nmountpoint -q {path} || {shlex.join(command)}"


# The heredoc's delimiter is quoted, so that nothing in the startup script is expanded here. A function is read as a
# whole: bash reads the script from its standard input, which no command may consume.
_SCRIPT = """\
set -euo pipefail
startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat > "$startup" <<'END_OF_STARTUP_SCRIPT'
{startup}END_OF_STARTUP_SCRIPT

request() {{
  gcloud compute tpus queued-resources create {name} {where} \\
    {create} \\
    --metadata-from-file="startup-script=$startup"
}}

# Prints the state of the queued resource, or nothing if there is none. An error of the network is not "none".
state() {{
  gcloud compute tpus queued-resources list {where} \\
    --filter="name~/{name}\\$" --format='value(state.state)'
}}

main() {{
  now=$(state)
  test -n "$now" || request
  while true; do
    now=$(state) || now=UNKNOWN
    case "$now" in
      "") echo "finished: the queued resource is deleted"; exit 0 ;;
      FAILED)  # for instance without quota: the same request would fail again
        echo "FAILED: see gcloud compute tpus queued-resources describe {name} {where}; delete it to try again" >&2
        exit 1 ;;
      SUSPENDED)  # preempted: the run continues from its last checkpoint on new hosts
        echo "preempted; requesting the slices again"
        gcloud compute tpus queued-resources delete {name} {where} --force --quiet
        request ;;
      *) echo "$now" ;;
    esac
    sleep {poll}
  done
}}
main < /dev/null
"""

_STARTUP = """\
#!/bin/bash
# Runs at every boot of a TPU VM, also after maintenance. The training continues from its last checkpoint.
set -uo pipefail

install_gcsfuse() {{
  command -v gcsfuse > /dev/null && return
  key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  curl -fsS "$packages/doc/apt-key.gpg" > "$key"
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" > /etc/apt/sources.list.d/gcsfuse.list
  apt-get update -qq && apt-get install -y -qq gcsfuse
}}

install_nfs() {{
  command -v mount.nfs > /dev/null || {{ apt-get update -qq && apt-get install -y -qq nfs-common; }}
}}

set -e
{mounts}
gcloud auth configure-docker {registry} --quiet
set +e

docker rm --force {name} > /dev/null 2>&1  # of a VM that was switched off
{container}
status=$?
echo "the training ended with status $status"
# Only status 0 means that it is finished. One host then gives the TPUs back.
worker=$(curl -fsS -H 'Metadata-Flavor: Google' \\
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
if [ "$status" = 0 ] && [ "$worker" = 0 ]; then
  {delete}
fi
"""
