"""Time by named layer, from a trace of compiled operations."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Operations that only contain others, which are timed as well.
_CONTAINERS = ('call', 'while', 'conditional')
_OPERATION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)')
_OPERAND = re.compile(r'%([\w.\-]+)')
# Arguments of the function have a name without a slash.
_MODEL = re.compile(r'(transpose\()?jvp\(\w')
_NO_MODULE = re.compile(r'[(.]|^(shard_map|checkpoint|rematted_computation)$')
_SOURCE = re.compile(r'op_name="([^"]*/[^"]*)"')


class LayerTime(NamedTuple):
  """Time of a layer.

  Attributes:
    name: path of the module, as 'backbone/block3/unit1/conv2'; outside of all
      modules the operation, as 'reduce_sum'.
    backward: whether it belongs to the gradient.
    seconds: of one call, summed over the threads.
  """

  name: str
  backward: bool
  seconds: float


def profile(
  call: Callable[[], Any], hlo: str, calls: int = 2
) -> list[LayerTime]:
  """Times the layers of a compiled function.

  Args:
    call: runs it once and returns its results; compiled already.
    hlo: its text, `jax.jit(...).lower(...).compile().as_text()`, which tells
      operations the layer that they come from.
    calls: how often to run it.

  Returns:
    The layers, the costliest first. Operations may overlap: the sum of their
    times may exceed that of the call.
  """
  layers = operation_layers(hlo)
  seconds: collections.Counter[tuple[str, bool]] = collections.Counter()
  for operation, time in _trace(call, calls).items():
    if operation.rstrip('.0123456789') not in _CONTAINERS:
      unknown = operation.rstrip('.0123456789'), False
      seconds[layers.get(operation, unknown)] += time / calls
  return [LayerTime(*key, time) for key, time in seconds.most_common()]


def operation_layers(hlo: str) -> dict[str, tuple[str, bool]]:
  """Layer and direction of each operation of a compiled function's text.

  What carries no name of its own, as copies that the compiler puts in, has
  that of an operation which reads it, else of one that it reads.
  """
  layers: dict[str, tuple[str, bool]] = {}
  reads: dict[str, list[str]] = {}
  for line in hlo.splitlines():
    match = _OPERATION.match(line)
    if not match:
      continue
    operation, rest = match.groups()
    source = _SOURCE.search(rest)
    if source:
      layers[operation] = _layer(source[1])
    reads[operation] = _OPERAND.findall(rest.partition(', metadata=')[0])
  for operation, operands in reversed(reads.items()):
    if operation in layers:
      for operand in operands:
        layers.setdefault(operand, layers[operation])
  for operation, operands in reads.items():
    known = [layers[operand] for operand in operands if operand in layers]
    if known:
      layers.setdefault(operation, known[0])
  return layers


def _layer(source: str) -> tuple[str, bool]:
  """Module path and direction of `jit(f)/transpose(jvp(Model))/a/conv/dot`."""
  backward = 'transpose(' in source
  *path, operation = source.split('/')
  layer: list[str] = []
  for part in path:
    if _MODEL.match(part):  # said once more where maps are computed again
      layer.clear()
    elif not _NO_MODULE.search(part):
      layer.append(part)
  if layer and layer[0][0].isupper():  # the class of the outermost module
    del layer[0]
  return '/'.join(layer) or operation, backward


def _trace(call: Callable[[], Any], calls: int) -> dict[str, float]:
  """Seconds of each operation over `calls` calls."""
  devices: collections.Counter[str] = collections.Counter()
  host: collections.Counter[str] = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(calls):
        jax.block_until_ready(call())
    for file in Path(folder).rglob('*.xplane.pb'):
      for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        seconds = devices if plane.name.startswith('/device:') else host
        for line in plane.lines:
          for event in line.events:
            operation = dict(event.stats).get('hlo_op')
            if operation:
              seconds[operation] += event.duration_ns / 1e9
  # Beside an accelerator the host only starts the operations.
  return devices or host
