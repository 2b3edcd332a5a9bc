"""Hosts and devices: joining, replicating, sharding and fetching."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_CLUSTER_VARIABLES = (
  'JAX_COORDINATOR_ADDRESS',
  'SLURM_JOB_NUM_NODES',
  'OMPI_COMM_WORLD_SIZE',
  'TPU_WORKER_HOSTNAMES',
)


def initialize() -> None:
  """Joins the other processes where the environment names a cluster.

  JAX reads the address and its own place from the environment of Slurm, Open
  MPI or a TPU pod, or from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID. Alone on a machine this does nothing.
  """
  if jax.distributed.is_initialized():
    return
  values = [os.environ.get(name, '') for name in _CLUSTER_VARIABLES]
  address, nodes, ranks, tpus = values
  if address or nodes not in ('', '1') or ranks not in ('', '1') or ',' in tpus:
    jax.distributed.initialize()


def is_first_process() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def replicate(tree: Any) -> Any:
  """Puts a tree on every local device, as the pmapped steps return it.

  With any other placement a step's first call would compile it once more.
  """
  mesh = Mesh(np.asarray(jax.local_devices()), ('batch',))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch: Any) -> Any:
  """Splits leading axes over the local devices: [B, ...] -> [D, B / D, ...]."""
  count = jax.local_device_count()
  return jax.tree.map(
    lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch
  )


def unshard(tree: Any) -> Any:
  """Undoes `shard` on results: device arrays [D, b, ...] -> numpy [B, ...]."""
  return jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(tree)
  )
