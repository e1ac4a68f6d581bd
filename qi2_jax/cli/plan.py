"""`qi2 plan STAGE --topology T`: what a stage needs on a pod, from programs compiled for it on this machine."""

import argparse
import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qi2_jax.cli import options

if TYPE_CHECKING:
    from data_pipeline.samples.cache import Cache
    from qi2_jax.planning.captions import Captions
    from qi2_jax.planning.stage import StagePlan
    from qi2_jax.workflows.config import AutoencoderExperiment, StageExperiment

UTILISATION = 0.4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_experiment_arguments(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="generation and chips of a slice, such as v6e:16x16, v5p:8x8x4 or v5e:16x16",
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="number of such slices (default 1)")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--captions",
        default="120:0.8:1024",
        metavar="MEDIAN:SIGMA:MOST",
        help="log-normal distribution of the captions' tokens, cut at MOST (default 120:0.8:1024)",
    )
    lengths.add_argument(
        "--samples", type=pathlib.Path, metavar="CACHE", help="take the lengths from encoded samples instead"
    )
    parser.add_argument(
        "--programs",
        choices=("binding", "all"),
        default="binding",
        help="compile those that decide about memory and time, or all of the stage; one takes minutes on two cores "
        "(default binding)",
    )
    parser.add_argument(
        "--sampler", action="store_true", help="also compile the sampler that draws images during training"
    )
    parser.add_argument(
        "--caching", action="store_true", help="plan `qi2 data cache` on one host of the topology, not the training"
    )
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        metavar="MODEL",
        help="model folder with the encoders of --caching, of which only each config.json is read (default: the "
        "published autoencoder and Qwen3-VL-8B)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=UTILISATION,
        metavar="SHARE",
        help=f"share of the peak rate at which days and cost are also given (default {UTILISATION})",
    )
    parser.add_argument("--price", type=float, metavar="USD", help="price of a chip for an hour, for the cost")
    parser.add_argument(
        "--search",
        type=pathlib.Path,
        metavar="FILE",
        help="find the mesh, the microbatches and what the backward pass keeps that are fastest by the bound, and "
        "write them as an experiment FILE.py",
    )
    parser.add_argument(
        "--tries", type=int, default=3, metavar="N", help="candidates that --search compiles, best first (default 3)"
    )
    parser.add_argument("--hlo", type=pathlib.Path, metavar="DIR", help="write the compiled programs as HLO text")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the plan as JSON too")


def main(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: accelerators of this machine are not touched
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # it cannot hold programs for chips that are absent

    from data_pipeline.samples.cache import Cache
    from qi2_jax.planning.captions import Captions
    from qi2_jax.planning.compile import topology_mesh
    from qi2_jax.planning.search import search
    from qi2_jax.planning.stage import binding_parts, parts_of, plan_stage, streams_of_stage
    from qi2_jax.runtime.atomic import write_atomic
    from qi2_jax.workflows.config import AutoencoderExperiment

    _check(arguments)
    config = options.load_trained(arguments)
    if isinstance(config, AutoencoderExperiment):
        _plan_autoencoder(config, arguments)
        return
    cache = Cache(arguments.samples) if arguments.samples else None
    captions = None if cache else Captions.parse(arguments.captions)
    name = pathlib.Path(arguments.experiment.partition(":")[0]).stem
    if arguments.caching:
        _plan_caching(name, config, captions, cache, arguments)
        return
    with _progress() as progress:
        if arguments.search:
            choice, plan = search(
                name, config, arguments.topology, arguments.slices, captions, cache, arguments.tries, progress
            )
            write_atomic(arguments.search, _experiment(arguments, choice.overrides(config)).encode())
        else:
            mesh = topology_mesh(arguments.topology, _mesh_on(config, arguments), arguments.slices)
            parts = parts_of(config, mesh, streams_of_stage(config, captions, cache))
            places = range(len(parts)) if arguments.programs == "all" else binding_parts(config, parts, mesh)
            topology = f"{arguments.slices} x {arguments.topology}"
            plan = plan_stage(
                name, topology, config, mesh, parts, list(places), progress, arguments.hlo, arguments.sampler
            )
    if arguments.json:
        write_atomic(arguments.json, json.dumps(as_json(plan, arguments), indent=1, allow_nan=False).encode())
    _show(plan, arguments)
    for path in filter(None, (arguments.json, arguments.search)):
        print(f"wrote {path}")


def _check(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.utilisation <= 1:
        raise ValueError(f"--utilisation is {arguments.utilisation}; it must be above 0 and at most 1")
    if arguments.price is not None and not arguments.price > 0:
        raise ValueError(f"--price is {arguments.price}; it must be above 0")
    for name in ("slices", "tries"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    if arguments.search and (arguments.hlo or arguments.sampler or arguments.programs != "binding"):
        raise ValueError(
            "--search takes no --hlo, --sampler and --programs; plan the experiment that it writes with them"
        )
    if arguments.model and not arguments.caching:
        raise ValueError("--model names the encoders of --caching; leave it out, or add --caching")
    if arguments.search and arguments.search.suffix != ".py":
        raise ValueError(f"--search {arguments.search} is an experiment to write; its name must end in .py")


def _experiment(arguments: argparse.Namespace, found: list[str]) -> str:
    """The text of an experiment: the stage with the changes that the search found."""
    path, _, form = arguments.experiment.partition(":")
    stage = os.path.relpath(path, arguments.search.parent) + (f":{form}" if form else "")
    overrides = "".join(f"    {override!r},\n" for override in [*arguments.overrides, *found])
    where = f"{pathlib.Path(path).stem} on {arguments.slices} x {arguments.topology}"
    return (
        f'"""{where}, chosen by `qi2 plan --search`."""\n\n'
        "import pathlib\n\nimport ml_collections\n\nfrom qi2_jax.config import loading\n\n"
        f"STAGE = {stage!r}  # beside this file\nOVERRIDES = (\n{overrides})\n\n\n"
        'def get_config(form: str = "") -> ml_collections.ConfigDict:\n'
        '    """The stage with these values, which has no forms."""\n'
        "    if form:\n"
        '        raise ValueError(f"this experiment has no form {form!r}")\n'
        "    config = loading.load(str(pathlib.Path(__file__).parent / STAGE), OVERRIDES)\n"
        "    return ml_collections.ConfigDict(config)\n"
    )


def _plan_autoencoder(config: "AutoencoderExperiment", arguments: argparse.Namespace) -> None:
    """Compiles the training step of an autoencoder, for the crop of its first phase, and prints what it needs."""
    _refuse("an autoencoder", arguments, "json", "search", "price", "hlo", "sampler", "samples", "caching")
    from qi2_jax.planning.autoencoder import compile_train_step
    from qi2_jax.planning.compile import topology_mesh

    mesh = topology_mesh(arguments.topology, config.vae.mesh, arguments.slices)
    with _progress() as progress:
        progress("compiling the training step of the autoencoder")
        report, _ = compile_train_step(config.vae, mesh)
    print("\n".join(report.lines()))


def _plan_caching(
    name: str,
    config: "StageExperiment",
    captions: "Captions | None",
    cache: "Cache | None",
    arguments: argparse.Namespace,
) -> None:
    """Compiles the largest programs of a stage's caching job for one host, and prints what they need."""
    _refuse("the caching job", arguments, "search", "price", "hlo", "sampler")
    from qi2_jax.cli import tables
    from qi2_jax.planning import programs
    from qi2_jax.planning.caching import CachingJob, plan_caching
    from qi2_jax.planning.compile import bytes_of, host_mesh
    from qi2_jax.planning.stage import streams_of_stage
    from qi2_jax.planning.tables import of_caching
    from qi2_jax.runtime.atomic import write_atomic

    encode = config.encode
    job = CachingJob(host_mesh(arguments.topology, encode.mesh), encode.dtype, encode.batch_size, encode.online)
    if arguments.model:
        job = job.with_encoders_of(arguments.model)
    with _progress() as progress:
        plans = plan_caching(job, config, streams_of_stage(config, captions, cache), progress)
    weights = {component: bytes_of(tree) for component, tree in job.weights.items()}
    print(f"{name}, caching on a host of {arguments.topology}: {job.mesh.size} chips, mesh {_axes(job.mesh.shape)}")
    tables.show(of_caching(plans, weights))
    if arguments.json:
        report = {"stage": name, "topology": arguments.topology, "mesh": dict(job.mesh.shape), "weight_bytes": weights}
        report["programs"] = [programs.as_json(plan) for plan in plans]
        write_atomic(arguments.json, json.dumps(report, indent=1, allow_nan=False).encode())
        print(f"wrote {arguments.json}")


def _refuse(what: str, arguments: argparse.Namespace, *names: str) -> None:
    if given := [name for name in names if getattr(arguments, name)]:
        raise ValueError(f"the plan of {what} has no --{given[0]}; leave it out")


def _mesh_on(config: "StageExperiment", arguments: argparse.Namespace) -> Any:
    """The mesh of the config, with as many replicas along `data` as the topology has chips for."""
    import dataclasses

    from qi2_jax.planning.compile import topology_devices

    mesh, chips = config.transformer.mesh, len(topology_devices(arguments.topology, arguments.slices))
    data, rest = divmod(chips, mesh.fsdp * mesh.tensor)
    if rest or not data:
        raise ValueError(
            f"{arguments.slices} x {arguments.topology} has {chips:,} chips, which fsdp={mesh.fsdp} x "
            f"tensor={mesh.tensor} does not divide; change transformer.mesh.fsdp or transformer.mesh.tensor"
        )
    return dataclasses.replace(mesh, data=data)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line with the time that the present compilation has taken; a plain line each where it is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False)
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()) as bar:
        task = bar.add_task("")
        yield lambda text: bar.reset(task, description=text)


def _show(plan: "StagePlan", arguments: argparse.Namespace) -> None:
    from qi2_jax.cli import tables
    from qi2_jax.planning.tables import of_stage, of_total

    print(f"{plan.name} on {plan.topology}: {plan.chips:,} chips, mesh {_axes(plan.mesh)}")
    tables.show(of_stage(plan))
    tables.show(of_total(plan, arguments.utilisation, arguments.price))


def _axes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items())


def as_json(plan: "StagePlan", arguments: argparse.Namespace) -> dict[str, Any]:
    """The plan as plain JSON."""
    from qi2_jax.planning import programs

    return {
        "stage": plan.name,
        "topology": plan.topology,
        "chips": plan.chips,
        "mesh": dict(plan.mesh),
        "updates": plan.updates,
        "images_per_update": plan.images,
        "state_bytes": dict(plan.state),
        "programs": [programs.as_json(program) for program in plan.compiled],
        "parts": [
            {
                "name": part.name,
                "images": part.images,
                "microbatches_per_update": part.microbatches,
                "model_flops": part.model_flops,
                "slot_flops": part.slot_flops,
                "compiled": place in plan.programs,
                "bound_seconds": plan.seconds_of(place),
            }
            for place, part in enumerate(plan.parts)
        ],
        "bound": {"update_seconds": plan.update_seconds, "mfu": plan.mfu_bound, "days": plan.days()},
        "at_utilisation": {"utilisation": arguments.utilisation, "days": plan.days(arguments.utilisation)},
        "price": arguments.price,
    }
