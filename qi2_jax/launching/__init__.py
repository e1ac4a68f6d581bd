"""What a cluster needs to run a training: manifests, commands and scripts, built without a cluster.

`job.Job` describes a training. Each of `gke`, `queued_resources`, `slurm` and `dataflow` turns a job into a
`submission.Submission`: one text and the command that reads it. The container file and the start script of a process
are in `launch/` at the root of the repository.
"""
