"""Scoring of records on Dataflow, which prepares the data of a stage beside the training of another one."""

import re
import shlex
from collections.abc import Sequence

from qi2_jax.launching import names
from qi2_jax.launching.folders import Bucket
from qi2_jax.launching.submission import Submission, commented

MACHINE = "n2-standard-4"
MAX_WORKERS = 10_000


def submission(
    records: Bucket, *, project: str, region: str, image: str, workers: int, needs_model: Sequence[str]
) -> Submission:
    """The command that scores a folder of records on Dataflow.

    Args:
      records: folder of records, the copied output of `qi2 data ingest`.
      project, region: where Dataflow runs.
      image: image of the workers, built from the target `scoring` of launch/Containerfile.
      workers: most workers at a time.
      needs_model: scores that the stage requires and Dataflow cannot compute.

    Raises:
      ValueError: for a name that is missing or impossible.
    """
    for flag, value in (("--project", project), ("--region", region)):
        if not value:
            raise ValueError(f"--on dataflow needs {flag}")
        names.check_label(flag, value)
    if not image:
        raise ValueError("--on dataflow needs --image: the target `scoring` of launch/Containerfile")
    names.check_image(image)
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"--workers is {workers}; it must be from 1 to {MAX_WORKERS:,}")
    job = re.sub(r"[^a-z0-9]+", "-", f"qi2-score-{records.name}-{records.prefix}".lower()).strip("-")
    options = [
        f"--project={project}",
        f"--region={region}",
        f"--job_name={job[:60].strip('-')}",
        f"--temp_location=gs://{records.name}/dataflow",
        f"--sdk_container_image={image}",  # otherwise every worker would install the package when it starts
        f"--machine_type={MACHINE}",
        f"--max_num_workers={workers}",
    ]
    command = ["qi2", "data", "score", str(records), "--runner", "DataflowRunner"]
    command += [f"--beam-option={option}" for option in options]
    lines = [
        f"Scores {records} on at most {workers} workers. Running it again computes only missing scores.",
        "It needs: pip install 'apache-beam[gcp]>=2.77,<3'. docs/data_at_scale.md says what follows it.",
    ]
    if needs_model:
        lines.append(
            f"The stage requires {', '.join(needs_model)}, which need a model and an accelerator: afterwards run "
            "`qi2 data score` with --clip and --aesthetic on a machine with one."
        )
    text = "#!/usr/bin/env bash\n" + commented(lines) + "set -euo pipefail\n" + shlex.join(command) + "\n"
    return Submission(text, ("bash", "-s"), (("qi2", "install this package"),))
