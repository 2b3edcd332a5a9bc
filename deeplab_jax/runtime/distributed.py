"""Hosts and devices: joining, replicating, sharding and fetching."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deeplab_jax.runtime.errors import UserError

AXIS_NAME = 'batch'  # of the devices, in every mapped step


def initialize() -> None:
  """Joins the other processes where the environment names a cluster.

  JAX finds the address and its own place in the environment of Slurm, Open MPI
  or a TPU pod; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
  give them anywhere else. Alone on a machine this does nothing.

  Raises:
    UserError: if one of the three variables is missing or no number.
  """
  if jax.distributed.is_initialized():
    return
  address = os.environ.get('JAX_COORDINATOR_ADDRESS')
  if address:
    jax.distributed.initialize(
      address,
      num_processes=_number('JAX_NUM_PROCESSES'),
      process_id=_number('JAX_PROCESS_ID'),
    )
  elif _in_cluster():
    jax.distributed.initialize()


def _number(variable: str) -> int:
  value = os.environ.get(variable, '')
  if not value.isdigit():
    raise UserError(
      f'{variable} must be a number where JAX_COORDINATOR_ADDRESS is set, got'
      f' {value!r}'
    )
  return int(value)


def _in_cluster() -> bool:
  several = any(
    os.environ.get(variable, '1') != '1'
    for variable in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  )
  return several or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')


def is_first_process() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def replicate(tree: Any) -> Any:
  """Puts a tree on every local device, as the pmapped steps return it.

  With any other placement a step's first call would compile it once more.
  """
  return jax.device_put(tree, _sharding())


def put(batch: Any) -> Any:
  """Puts a batch on the local devices, split as by `shard`: [D, B / D, ...].

  It returns at once; the copies go on while the devices work.
  """
  return jax.device_put(shard(batch), _sharding('batch'))


def _sharding(*axes: str) -> NamedSharding:
  mesh = Mesh(np.asarray(jax.local_devices()), ('batch',))
  return NamedSharding(mesh, PartitionSpec(*axes))


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
