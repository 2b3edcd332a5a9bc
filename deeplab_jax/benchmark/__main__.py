"""Speed and memory: python -m deeplab_jax.benchmark [--mode=forward,train,...].

Measures ResNet-50 at output stride 16 and crop 513 with one image a device, or
what --config=RECIPE and --config.section.key=value say. Each measurement runs
in a process of its own. Prints a table and a JSON line for each.

--peer='COMMAND' runs another program in turn with ours. Its last line is JSON
with the `seconds` of the same measurement: after a call to warm up, the best of
the timed ones, for one batch.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from deeplab_jax.benchmark import measure
from deeplab_jax.runtime import console
from deeplab_jax.runtime.errors import UserError

_ROWS = (  # pattern of a name, unit and format
  (r'.*seconds', 1, '{:.4f} s'),
  (r'.*flops.*per_second', 1e9, '{:.1f} GFLOP/s'),
  (r'flops', 1e9, '{:.2f} GFLOP'),
  (r'utilization', 1, '{:.1%} of a matrix product'),
  (r'peak.*', 2**20, '{:.0f} MiB'),
  (r'images_per_second', 1, '{:.2f}'),
  (r'compilations|images|devices', 1, '{:.0f}'),
)


def _options() -> flags.FlagValues:
  """The options of this program; others have options of the same names."""
  options = flags.FlagValues()
  kinds: Any = flags.DEFINE_string, flags.DEFINE_bool, flags.DEFINE_integer
  text, switch, count = (
    functools.partial(define, flag_values=options) for define in kinds
  )
  modes = list(measure.MODES)
  flags.DEFINE_list('mode', modes, 'What to measure.', flag_values=options)
  text('config', None, 'Recipe, a Python file.')
  text('json', None, 'File to append the JSON lines to.')
  text('peer', None, 'Command to compare with.')
  text('trace', None, 'Folder for a trace of a call, which XProf shows.')
  count('pairs', 5, 'Runs of ours and peer; times vary by a fifth.', 5)
  count('crop', None, 'Height and width of the images.', 1)
  count('batch', None, 'Images of a batch.', 1)
  count('classes', 21, 'Classes of the labels.', 1)
  count('repeat', None, 'Timed calls; by default 3, more within 3 s.', 1)
  switch('in_process', False, 'Measure here, and print JSON alone.')
  switch('help', False, 'Show this text.')
  options.set_gnu_getopt()
  return options


def main(argv: Sequence[str]) -> None:
  """Runs the measurements that the options name, and prints them."""
  options = _options()
  with console.named_options():
    settings = options(argv, known_only=True)[1:]
  if options.help:
    print(__doc__, options, sep='\n')
    return
  if unknown := set(options.mode) - set(measure.MODES):
    known = ','.join(measure.MODES)
    raise UserError(f'--mode={unknown.pop()}: must be among {known}')
  if len(options.mode) > 1 and (options.peer or options.in_process):
    raise UserError('--peer and --in_process need a single --mode')
  if options.in_process:
    print(json.dumps(measure.measure(options, settings)), flush=True)
    return
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if 'glibc.malloc.hugetlb' not in tunables:
    tunables = f'{tunables}:glibc.malloc.hugetlb=1'.removeprefix(':')
    os.environ['GLIBC_TUNABLES'] = tunables  # of ours and the peer alike
    print(f'measuring with GLIBC_TUNABLES={tunables}', file=sys.stderr)
  file = open(options.json, 'a') if options.json else None  # noqa: SIM115
  with file or contextlib.nullcontext(sys.stdout) as lines:
    for mode in options.mode:
      ours = [sys.executable, '-m', 'deeplab_jax.benchmark', *argv[1:]]
      ours += [f'--mode={mode}', '--in_process']
      if options.peer:
        result = compare(ours, shlex.split(options.peer), options.pairs)
        print(format_pairs(result))
      else:
        result = run(ours)
        print('\n'.join(format_measurement(result)))
      print(json.dumps(result), file=lines, flush=True)


def run(command: Sequence[str]) -> dict[str, Any]:
  """Runs a measurement; returns the JSON object of its last line.

  Raises `UserError` if it fails, with the last line of its stderr, or prints
  none.
  """
  done = subprocess.run(command, capture_output=True, text=True)
  said = done.stderr.strip().splitlines() or [f'status {done.returncode}']
  problem = f'failed: {said[-1].removeprefix("error: ")}'
  if not done.returncode:
    problem = 'must print a JSON line with "seconds"'
    with contextlib.suppress(ValueError, LookupError, TypeError):
      result = json.loads(done.stdout.strip().splitlines()[-1])
      float(result['seconds'])
      return result
  raise UserError(f'{shlex.join(command)} {problem}')


def compare(
  ours: Sequence[str], peer: Sequence[str], pairs: int
) -> dict[str, Any]:
  """Runs two programs in turn, A B A B ..., so that drift affects both alike.

  Returns `ratio`, our time over the peer's: its median, quartiles and extremes;
  `ours` and `peer`, the first measurement of each; `pairs`, all seconds.
  """
  measured, times = [], []
  for number in range(1, pairs + 1):
    measured.append([run(ours), run(peer)])
    a, b = (result['seconds'] for result in measured[-1])
    times.append([a, b])
    line = f'ours {a:.4f} s, peer {b:.4f} s, ratio {a / b:.3f}'
    print(f'pair {number}/{pairs}: {line}', file=sys.stderr, flush=True)
  names = 'min', 'lower_quartile', 'median', 'upper_quartile', 'max'
  ratios = np.quantile([a / b for a, b in times], np.linspace(0, 1, 5))
  ratio = dict(zip(names, ratios.tolist(), strict=True))
  first, second = measured[0]
  return {'ratio': ratio, 'ours': first, 'peer': second, 'pairs': times}


def format_pairs(result: dict[str, Any]) -> str:
  """The comparison in one line."""
  return (
    'ours / peer: {median:.3f}, median of {pairs} pairs (quartiles'
    ' {lower_quartile:.3f} to {upper_quartile:.3f}, all {min:.3f} to {max:.3f})'
  ).format(pairs=len(result['pairs']), **result['ratio'])


def format_measurement(result: dict[str, Any]) -> Iterator[str]:
  """The lines of a table of a measurement."""
  about = 'backbone', 'dtype', 'crop', 'batch', 'device'
  parts = [f'{name} {result[name]}' for name in about if name in result]
  yield ', '.join([f'== {result["mode"]}', *parts])
  for name, value in result.items():
    for pattern, unit, text in _ROWS:
      if re.fullmatch(pattern, name):
        yield f'  {name.replace("_", " "):<26}{text.format(value / unit)}'
  parts = result.get('parts', {})
  for name, seconds in parts.items():
    share = seconds / sum(parts.values())
    yield f'    {name:<24}{1 / seconds:.0f} images/s, {share:.1%} of a thread'


if __name__ == '__main__':
  console.log_to_stderr()
  with console.one_line_errors():
    main(sys.argv)
