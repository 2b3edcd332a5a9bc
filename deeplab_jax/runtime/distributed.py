"""Hosts and devices: joining them, placing arrays there and fetching them."""

import contextlib
import functools
import itertools
import logging
import os
import re
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import cache_key, clusters
from jax._src import distributed as service
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deeplab_jax.runtime import watchdog
from deeplab_jax.runtime.errors import UserError, first_line, require
from deeplab_jax.runtime.files import held

log = logging.getLogger(__name__)

AXIS_NAME = 'batch'  # of the devices, in every mapped step
_COMPILES = 3600  # seconds that one process may compile longer than others
_COUNTS = 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'JAX_NUM_PROCESSES'
_barriers = itertools.count()  # their names, the same on all processes


def initialize(mode: str = 'auto') -> None:
  """Joins the other processes, if there are any.

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them, else
  JAX asks Slurm, Open MPI, Kubernetes, and the environment or the metadata
  server of a TPU. Mode `off` joins nothing, `on` refuses to run alone, and
  `auto` refuses if the environment means another number of processes. Raises
  `UserError` then, and if they do not meet.
  """
  if mode == 'off' or jax.distributed.is_initialized():
    return
  try:
    address, count, index, local = _find()
    several = count not in (None, 1)
    if mode == 'on':
      require(
        several, '--distributed=on must find several processes', count or 1
      )
    else:
      _compare(count)
    if several:
      log.info('process %s of %s meets the others at %s', index, count, address)
      _share_programs()
      watchdog.join(address, count, index, local)
  except UserError:
    raise
  except Exception as error:  # of a detector, or of the one that joins
    raise UserError(
      f'other processes cannot be joined: {first_line(error)}; start all of'
      ' them, or use --distributed=off'
    ) from error


def _find() -> tuple[Any, ...]:
  """Returns address, number, index and devices; None where nothing is found."""
  if address := os.environ.get('JAX_COORDINATOR_ADDRESS'):
    host, _, port = address.rpartition(':')
    if not host or not port.isdigit() or int(port) > 65535:
      raise UserError(f'JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT')
    count, index = _number('JAX_NUM_PROCESSES'), _number('JAX_PROCESS_ID')
    return address, count, index, None
  with warnings.catch_warnings(action='ignore'):  # of packages, in seven lines
    # `jax.distributed.initialize()` would start a service for one process, too.
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, initialization_timeout=300
    )


def _compare(found: int | None) -> None:
  """Raises `UserError` if the environment means more processes, or fewer."""
  slices = int(os.environ.get('MEGASCALE_NUM_SLICES') or 1)
  means = {name: int(os.environ.get(name) or 1) for name in _COUNTS}
  for name in ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES'):
    means[name] = slices * len(os.environ.get(name, '').split(','))
  if 'TPU_PROCESS_ADDRESSES' in os.environ:  # JAX prefers it
    del means['TPU_WORKER_HOSTNAMES']
  means['MEGASCALE_NUM_SLICES'] = max(slices, found or 1)  # of several hosts
  if found is None:  # for want of the package kubernetes
    means['JOB_COMPLETION_INDEX'] = 2
  for name, count in means.items():
    if name in os.environ and count != (found or 1):
      raise UserError(
        f'{name}={os.environ[name]}, but the number of processes found is'
        f' {found or 1}; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and'
        ' JAX_PROCESS_ID, or run alone by --distributed=off'
      )


def _share_programs() -> None:
  """Lets all processes on CPUs find what process 0 wrote into the cache.

  JAX's key tells machines apart; on CPUs also processes, by their devices.
  """
  plain: Any = cache_key._hash_accelerator_config

  def hashes(key: Any, devices: Any) -> None:
    if devices.flat[0].platform != 'cpu':
      return plain(key, devices)
    with contextlib.suppress(OSError):  # not Linux
      info = Path('/proc/cpuinfo').read_text()
      found = set(re.findall('^(?:flags|Features).*', info, re.M))
      key.update(str(sorted(found)).encode())

  vars(cache_key)['_hash_accelerator_config'] = hashes


def _number(variable: str) -> int:
  value = os.environ.get(variable, '')
  if not value.isdigit():
    raise UserError(
      f'{variable} must be a number because JAX_COORDINATOR_ADDRESS is set, got'
      f' {value!r}'
    )
  return int(value)


def together(mapped: Any) -> Any:
  """Lets processes call a mapped function only when each has compiled it.

  Collectives wait for seconds, compiling may take minutes. A single process
  gets the function unchanged.
  """
  if jax.process_count() == 1:
    return mapped
  ready = set()

  def call(tree: Any, batch: Any) -> Any:
    shapes = tuple(x.shape for x in jax.tree.leaves(batch))
    if shapes not in ready:
      mapped.lower(tree, batch).compile()  # the call finds it
      barrier()
      ready.add(shapes)
    return mapped(tree, batch)

  return call


def is_first_process() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


def gathered(number: Any) -> list[Any]:
  """Returns the integers, or lists of them, of all processes, which call it."""
  if jax.process_count() == 1:
    return [number]
  return multihost_utils.process_allgather(np.int32(number)).tolist()


def check_same(values: Mapping[str, Any]) -> None:
  """Raises `UserError` unless all processes, which call it, have these values.

  It names the first one that differs. All must have the same number of them.
  """
  digests = [zlib.crc32(repr(x).encode()) >> 1 for x in values.values()]
  found = zip(*gathered(digests), strict=True)
  for (what, value), of_all in zip(values.items(), found, strict=True):
    if len(set(of_all)) > 1:
      raise UserError(
        f'{what} must be the same for all processes; here {value}'
      )


def barrier() -> None:
  """Waits until all processes are there, which may still compile."""
  if client := service.global_state.client:
    client.wait_at_barrier(f'{next(_barriers)}', 1000 * _COMPILES)


def one_run(function: Callable[..., Any]) -> Callable[..., Any]:
  """Lets `function(config, workdir)` be the only one that uses the workdir.

  The first process holds it; if it cannot, all raise a `UserError`.
  """

  @functools.wraps(function)
  def alone(config: Any, workdir: Any) -> Any:
    with contextlib.ExitStack() as stack:
      failed: Exception | None = None
      try:
        if is_first_process():
          stack.enter_context(held(workdir))
      except (UserError, OSError) as error:
        failed = error
      if any(gathered(failed is not None)):
        text = f'{workdir}: the first process cannot use it'
        raise failed or UserError(text)
      if not all(gathered(_appears(workdir / '.lock'))):
        raise UserError(f'{workdir}: some process sees another folder there')
      return function(config, workdir)

  return alone


def _appears(path: Path) -> bool:
  """Whether a file is there, in a minute on a slow shared file system."""
  end = time.monotonic() + 60
  while not path.exists() and time.monotonic() < end:
    time.sleep(1)
  return path.exists()


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
