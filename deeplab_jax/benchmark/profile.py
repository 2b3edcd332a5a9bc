"""Time by named layer, from a trace of compiled operations."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Operations that only contain others, which have times of their own.
_CONTAINERS = ('call', 'while', 'conditional')
_OPERATION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)')
_OPERAND = re.compile(r'%([\w.\-]+)')
# The names of a function's arguments have no slash.
_SOURCE = re.compile(r'op_name="([^"]*/[^"]*)"')
_MODEL = re.compile(r'(transpose\()?jvp\(\w')
_NO_MODULE = re.compile(
  r'[(.]|^(shard_map|checkpoint|rematted_computation|cond|branch_\d+_fun)$'
)


class LayerTime(NamedTuple):
  """Time of a layer."""

  name: str  # the module's path, as 'block3/unit1/conv2', else the operation
  backward: bool  # whether it belongs to the gradient
  seconds: float  # of one call, summed over the threads


def profile(
  call: Callable[[], Any], hlo: str, calls: int = 2
) -> list[LayerTime]:
  """Times the layers of a compiled function, the most expensive first.

  `call` runs the function and returns its results. `hlo` is the text of the
  program, `jax.jit(...).lower(...).compile().as_text()`, which tells from which
  layer an operation comes. The time of one call is the mean over `calls`.
  Operations may overlap: the sum may exceed the time of the call.
  """
  layers = operation_layers(hlo)
  seconds: dict[tuple[str, bool], float] = collections.defaultdict(float)
  for operation, time in _trace(call, calls).items():
    kind = operation.rstrip('.0123456789')
    if kind not in _CONTAINERS:
      seconds[layers.get(operation, (kind, False))] += time / calls
  times = [LayerTime(*layer, time) for layer, time in seconds.items()]
  return sorted(times, key=lambda time: -time.seconds)


def operation_layers(hlo: str) -> dict[str, tuple[str, bool]]:
  """Layer of each operation of a program, and whether it is of the gradient.

  An operation without a source, as a copy that the compiler adds, takes the
  layer of an operation that reads it, else of one that it reads.
  """
  layers: dict[str, tuple[str, bool]] = {}
  reads: dict[str, list[str]] = {}
  for match in filter(None, map(_OPERATION.match, hlo.splitlines())):
    operation, rest = match.groups()
    if source := _SOURCE.search(rest):
      layers[operation] = _layer(source[1])
    reads[operation] = _OPERAND.findall(rest.partition(', metadata=')[0])
  for operation, operands in reversed(reads.items()):
    if operation in layers:
      for operand in operands:
        layers.setdefault(operand, layers[operation])
  for operation, operands in reads.items():
    for operand in operands:
      if operand in layers:
        layers.setdefault(operation, layers[operand])
  return layers


def _layer(source: str) -> tuple[str, bool]:
  """Splits `jit(f)/transpose(jvp(Model))/a/conv/dot` into 'a/conv' and True."""
  *path, operation = source.split('/')
  layer: list[str] = []
  for part in path:
    if _MODEL.match(part):  # occurs again where maps are computed again
      layer.clear()
    elif not _NO_MODULE.search(part):
      layer.append(part)
  if layer and layer[0][0].isupper():  # the class of the outermost module
    del layer[0]
  return '/'.join(layer) or operation, 'transpose(' in source


def _trace(call: Callable[[], Any], calls: int) -> dict[str, float]:
  """Seconds of each operation, summed over `calls` calls."""
  devices: dict[str, float] = collections.defaultdict(float)
  host: dict[str, float] = collections.defaultdict(float)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(calls):
        jax.block_until_ready(call())
    for file in Path(folder).rglob('*.xplane.pb'):
      for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        seconds = devices if plane.name.startswith('/device:') else host
        for event in (event for line in plane.lines for event in line.events):
          if operation := dict(event.stats).get('hlo_op'):
            seconds[operation] += event.duration_ns / 1e9
  return devices or host  # a host with an accelerator only starts operations
