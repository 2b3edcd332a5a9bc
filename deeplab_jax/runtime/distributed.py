"""Hosts and devices: joining them, placing arrays there and fetching them."""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import check_held, held

AXIS_NAME = 'batch'  # of the devices, in every mapped step


def initialize() -> None:
  """Joins the other processes if the environment names a cluster.

  JAX finds the address and its own index in the environment of Slurm, Open MPI
  or a TPU pod. Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID give them. A single machine joins nothing. Raises `UserError`
  if one of the last two variables is missing or not a number.
  """
  if jax.distributed.is_initialized():
    return
  counts = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  several = any(os.environ.get(count, '1') != '1' for count in counts)
  if address := os.environ.get('JAX_COORDINATOR_ADDRESS'):
    jax.distributed.initialize(
      address, _number('JAX_NUM_PROCESSES'), _number('JAX_PROCESS_ID')
    )
  elif several or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', ''):
    jax.distributed.initialize()


def _number(variable: str) -> int:
  value = os.environ.get(variable, '')
  if not value.isdigit():
    raise UserError(
      f'{variable} must be a number because JAX_COORDINATOR_ADDRESS is set, got'
      f' {value!r}'
    )
  return int(value)


def is_first_process() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


def one_run(function: Callable[..., Any]) -> Callable[..., Any]:
  """Lets `function(config, workdir)` be the only one that uses the workdir.

  The first process holds it; if it cannot, all raise a `UserError`.
  """

  @functools.wraps(function)
  def alone(config: Any, workdir: Any) -> Any:
    with contextlib.ExitStack() as stack:
      refused: Exception | None = None
      try:
        if is_first_process():
          stack.enter_context(held(workdir))
      except (UserError, OSError) as error:
        refused = error
      failed = np.array(refused is not None, np.int32)
      if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(failed)
      if failed:
        raise refused or UserError(
          f'{workdir}: the first process cannot use it'
        )
      return function(config, workdir)

  return alone


def check_run(workdir: Any) -> None:
  """Raises `UserError` if the workdir of `one_run` is gone or another's."""
  if is_first_process():
    check_held(workdir)


def replicate(tree: Any) -> Any:
  """Puts a tree on every local device, as the pmapped steps return it.

  With another placement the first call of a step would compile it twice.
  """
  return jax.device_put(tree, _sharding())


def put(batch: Any) -> Any:
  """Splits a batch as `shard` does and starts to copy it to the devices."""
  return jax.device_put(shard(batch), _sharding(AXIS_NAME))


def _sharding(*axes: str) -> NamedSharding:
  mesh = Mesh(np.asarray(jax.local_devices()), (AXIS_NAME,))
  return NamedSharding(mesh, PartitionSpec(*axes))


def shard(batch: Any) -> Any:
  """Splits arrays over the D local devices: [B, ...] -> [D, B / D, ...]."""
  shape = jax.local_device_count(), -1
  return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), batch)


def unshard(tree: Any) -> Any:
  """Undoes `shard` on results: device arrays [D, b, ...] -> numpy [B, ...]."""
  tree = jax.device_get(tree)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
