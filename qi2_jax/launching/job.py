"""A training that a cluster runs: what it trains, where, and with which folders."""

import dataclasses
import pathlib
import re
import shlex

from qi2_jax.launching import environment, names
from qi2_jax.launching.folders import Bucket, Folder
from qi2_jax.launching.topology import MAX_SLICES, GpuNode, Slice
from qi2_jax.sharding import MeshShape

WORK, CACHE = "/mnt/qi2/work", "/mnt/qi2/cache"  # where the containers of TPU hosts see the two folders
START = "/opt/qi2/launch/start.sh"  # in the image, see launch/Containerfile
MAX_RESTARTS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Paths of a training. `samples` and `data` are inside the cache folder if there is one, all others in `work`.

    Attributes:
      out: folder of the run.
      samples: encoded samples, for a transformer.
      data: scored records, for an autoencoder.
      model: model folder; "": none.
      start: source of the initial weights; "": random weights.

    Raises:
      ValueError: for a path that leaves the folder.
    """

    out: str
    samples: str = ""
    data: str = ""
    model: str = ""
    start: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if value := getattr(self, field.name):
                object.__setattr__(self, field.name, names.check_inside(f"--{field.name}", value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training on a cluster.

    Attributes:
      name: name of the job in the cluster.
      experiment: path of the experiment in the image, with its form.
      overrides: changes to its config.
      mesh: mesh of the training.
      mesh_key: config key of the mesh, for error messages.
      batch_sizes: global images of a batch, one value for each batch that the training reads.
      hardware: one slice of TPUs, or one node with GPUs.
      slices: number of slices, or of nodes.
      work: folder of runs and models, which the job writes.
      cache: folder of samples or records, which the job only reads; None: they are in `work`.
      inputs: paths in these folders.
      compiled: folder of compiled programs in a bucket; None: as the experiment says, inside the run.
      image: container image; "": the program is installed on the hosts (Slurm only).
      spot: whether the job may be preempted for a lower price.
      restarts: restarts after errors, before the job counts as failed. Restarts after a preemption do not count.

    Raises:
      ValueError: if the mesh does not fit the hardware, or a value is out of range.
    """

    name: str
    experiment: str
    overrides: tuple[str, ...]
    mesh: MeshShape
    mesh_key: str
    batch_sizes: tuple[int, ...]
    hardware: Slice | GpuNode
    slices: int
    work: Folder
    cache: Folder | None
    inputs: Inputs
    compiled: Bucket | None
    image: str
    spot: bool
    restarts: int

    def __post_init__(self) -> None:
        names.check_label("--name", self.name, names.MAX_NAME)
        _check_experiment(self.experiment)
        if self.image:
            names.check_image(self.image)
        for name, value, least, most in (
            ("slices", self.slices, 1, MAX_SLICES),
            ("restarts", self.restarts, 0, MAX_RESTARTS),
        ):
            if not least <= value <= most:
                raise ValueError(f"--{name} is {value}; it must be from {least} to {most}")
        if broken := [text for text in self.overrides if not text.isprintable()]:
            raise ValueError(f"override {broken[0]!r} has characters that cannot be printed; remove them")
        self._check_mesh()

    def _check_mesh(self) -> None:
        mesh, chips = self.mesh, self.hardware.chips * self.slices
        named = f"mesh data={mesh.data} x fsdp={mesh.fsdp} x tensor={mesh.tensor} of {self.experiment}"
        if mesh.size != chips:
            within = mesh.fsdp * mesh.tensor
            ways = [f"--slices {mesh.size // self.hardware.chips}"] * (mesh.size % self.hardware.chips == 0)
            ways += [f"{self.mesh_key}.data={chips // within}"] * (chips % within == 0)
            ways = ways or [f"{self.mesh_key}.data, .fsdp and .tensor with a product of {chips}"]
            raise ValueError(
                f"{named} has {mesh.size:,} chips, but --topology {self.hardware} x --slices {self.slices} has "
                f"{chips:,}; use {', or '.join(ways)}"
            )
        # Only `data` may cross slices of TPUs (`sharding.make_mesh`).
        if isinstance(self.hardware, Slice) and mesh.data % self.slices:
            raise ValueError(
                f"{named} does not split over {self.slices} slices: fsdp and tensor must stay within a slice. Make "
                f"{self.mesh_key}.data a multiple of {self.slices}"
            )

        shards = mesh.data * mesh.fsdp  # as `sharding.num_batch_shards`
        if uneven := [size for size in self.batch_sizes if size % shards]:
            raise ValueError(
                f"{named} does not split a batch of {uneven[0]:,} images over data x fsdp = {shards:,} chips; use "
                f"fewer chips, or more of them along {self.mesh_key}.tensor"
            )

    @property
    def chips(self) -> int:
        return self.hardware.chips * self.slices

    def command(self, work: str, cache: str) -> list[str]:
        """The command of every process.

        Args:
          work, cache: paths at which a process sees the two folders.
        """
        inputs = self.inputs
        flags = [
            ("--samples", inputs.samples, cache if self.cache else work),
            ("--data", inputs.data, cache if self.cache else work),
            ("--model", inputs.model, work),
            ("--start", inputs.start, work),
            ("--out", inputs.out, work),
        ]
        paths = [part for flag, path, folder in flags if path for part in (flag, f"{folder}/{path}")]
        compiled = [f"compilation_cache={self.compiled}"] if self.compiled else []
        return ["qi2", "train", self.experiment, *paths, "--distributed", *self.overrides, *compiled]

    def start_command(self, restarts: int) -> list[str]:
        """The command of a container: the start script, which runs `command` and passes signals on.

        Args:
          restarts: restarts within the container after errors.
        """
        return [START, "--restarts", str(restarts), "--", *self.command(WORK, CACHE)]

    def summary(self, target: str) -> list[str]:
        """What the job is and why its processes have which environment, for the head of a manifest."""
        return [
            f"{self.name}: {self.experiment} on {self.slices} x {self.hardware} ({self.chips:,} chips, mesh "
            f"data={self.mesh.data} x fsdp={self.mesh.fsdp} x tensor={self.mesh.tensor})",
            f"work {self.work}, cache {self.cache or 'in work'}, compiled programs "
            f"{self.compiled or 'as the experiment says'}",
            f"every process: {shlex.join(self.command(WORK, CACHE))}" if target != environment.SLURM else "",
            "",
            "Environment:",
            *(f"- {each.name}={each.value}: {each.reason}" for each in environment.variables(target)),
        ]


def _check_experiment(text: str) -> None:
    path = pathlib.PurePosixPath(text.partition(":")[0])
    if path.is_absolute() or ".." in path.parts or not re.fullmatch(r"[\w./-]+(:[\w.-]*)?", text, re.ASCII):
        raise ValueError(
            f"experiment is {text!r}; write its path from the root of the repository, where the image has it too, such "
            "as experiments/qwen_image_2/s1_256p_t2i.py"
        )


def need_tpu(job: Job, target: str) -> Slice:
    """Returns the slice of a job for TPU hosts.

    Raises:
      ValueError: if it has none, no image, or a folder that TPU hosts do not have.
    """
    if not isinstance(job.hardware, Slice):
        raise ValueError(f"--topology is {job.hardware}; --on {target} needs a TPU slice such as v6e:16x16")
    if not job.image:
        raise ValueError(f"--on {target} runs a container: name its image with --image")
    return job.hardware
