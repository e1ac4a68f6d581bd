"""Several processes: each makes its own rows of a batch, and together they are the batch of one process."""

import socket
import subprocess
import sys

PROGRAM = """
import sys
import jax
process, processes, port = map(int, sys.argv[1:])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8 // processes)
jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
import jax.numpy as jnp
import numpy as np
from qi2_jax import sharding

for shape in ((8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)):
    # Devices in another order than the processes, as on a torus.
    devices = [jax.devices()[index] for index in (0, 5, 2, 7, 4, 1, 6, 3)]
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), sharding.AXES)
    whole = np.arange(48.0).reshape(16, 3)
    own = sharding.own_rows(mesh, 16)
    batch = sharding.put_batch(mesh, whole[list(own)], 16)
    for shard in batch.addressable_shards:
        assert np.array_equal(shard.data, whole[shard.index]), (shape, shard)
    weights = jnp.arange(16.0)
    assert float(jax.jit(lambda x: (weights @ x).sum())(batch)) == (np.arange(16.0) @ whole).sum()
    if len(own) < 16:
        try:
            sharding.put_batch(mesh, whole, 16)
        except ValueError as error:
            assert "16 rows; this process holds" in str(error)
        else:
            raise AssertionError("rows of other processes were taken for own ones")
print("same batch", process)
"""


def test_rows_of_two_processes_make_one_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(process), "2", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    for process, running in enumerate(started):
        printed = running.communicate(timeout=180)[0]
        assert running.returncode == 0 and f"same batch {process}" in printed, printed[-3000:]
