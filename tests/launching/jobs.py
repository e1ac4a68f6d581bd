"""Jobs for tests of the launcher."""

import dataclasses
from typing import Any

from qi2_jax.launching import folders, topology
from qi2_jax.launching.job import Inputs, Job
from qi2_jax.sharding import MeshShape

IMAGE = "us-docker.pkg.dev/project/qi2/qi2:1"
TPU = Job(
    name="s1-256p",
    experiment="experiments/qwen_image_2/s1_256p_t2i.py",
    overrides=("transformer.train.steps=10",),
    mesh=MeshShape(4, 256, 1),
    mesh_key="transformer.mesh",
    batch_sizes=(),
    hardware=topology.parse_slice("v6e:16x16"),
    slices=4,
    work=folders.parse("--work", "gs://bucket/qi2"),
    cache=None,
    inputs=Inputs(out="runs/s1", samples="samples/s1", model="model"),
    compiled=None,
    image=IMAGE,
    spot=False,
    restarts=7,
)
GPU = dataclasses.replace(
    TPU,
    mesh=MeshShape(2, 8, 1),
    hardware=topology.parse_node("h100:8"),
    slices=2,
    work=folders.parse("--work", "/shared/qi2"),
    image="",
)


def tpu(**changes: Any) -> Job:
    return dataclasses.replace(TPU, **changes)


def gpu(**changes: Any) -> Job:
    return dataclasses.replace(GPU, **changes)
