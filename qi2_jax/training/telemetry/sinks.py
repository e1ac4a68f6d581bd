"""Sinks: TensorBoard and Weights & Biases, which get the metrics that `metrics.jsonl` always gets."""

import contextlib
import math
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Any

from PIL import Image

SAMPLES, TENSORBOARD, WANDB_ID = "samples", "tensorboard", "wandb_id"


class TensorBoard:
    """Event files for TensorBoard. Points after step `start` that an earlier process wrote are declared void.

    Records are written by tensorboardX's record writer, in the caller's thread. Its `FileWriter` has a thread that dies
    on a full disk, after which its queue blocks the caller for ever.
    """

    def __init__(self, directory: pathlib.Path, start: int):
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2

        self._directory, self._summary, self._event = directory, summary, event_pb2.Event
        directory.mkdir(parents=True, exist_ok=True)
        # tensorboardX names event files by whole seconds: two processes within one second would share a file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = record_writer.RecordWriter(str(directory / name))
        void = start + 1 if start else 0
        begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self._event(step=void, file_version="brain.Event:2"), self._event(step=void, session_log=begun))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._write(*(self._event(step=step, summary=self._summary.scalar(*point)) for point in finite.items()))

    def images(self, step: int, images: Mapping[str, pathlib.Path]) -> None:
        for name, path in images.items():
            with Image.open(path) as image:
                size = dict(height=image.height, width=image.width, colorspace=len(image.getbands()))
            drawn = self._summary.Summary.Image(**size, encoded_image_string=path.read_bytes())
            value = self._summary.Summary.Value(tag=f"{SAMPLES}/{name}", image=drawn)
            self._write(self._event(step=step, summary=self._summary.Summary(value=[value])))

    def close(self) -> None:
        self._writer.close()

    def _write(self, *events: Any) -> None:
        """Appends events and flushes them to the disk.

        Raises:
          OSError: naming the directory, for example if the disk is full.
        """
        try:
            for event in events:
                event.wall_time = time.time()
                self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._writer.close()
            raise OSError(error.errno, error.strerror, str(self._directory)) from error


class WeightsAndBiases:
    """One W&B run per run directory, resumed by its id. WANDB_PROJECT, WANDB_MODE and similar variables apply."""

    def __init__(self, directory: pathlib.Path, start: int, config: Mapping[str, Any] | None):
        import wandb

        path = directory / WANDB_ID
        if start == 0 or not path.exists():
            path.write_text(uuid.uuid4().hex[:12] + "\n")
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "qi2"),
            name=os.environ.get("WANDB_NAME", directory.absolute().name),
            id=path.read_text().strip(),
            resume="allow",
            dir=str(directory),
            config=dict(config or {}),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, pathlib.Path]) -> None:
        self._run.log({f"{SAMPLES}/{name}": self._image(str(path)) for name, path in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
