"""Speed and memory: python -m deeplab_jax.benchmark [--mode=forward,train,...].

Measures ResNet-50 at output stride 16 and crop 513 with one image a batch, or
what `--config=FILE` and `--config.section.key=value` say. Each measurement runs
in a process of its own, `deeplab_jax.measure`, which takes the other options:
`--crop`, `--batch`, `--classes` and `--repeat`. Prints a table and a JSON line
each.

`--peer='COMMAND'` runs another program alternately with ours. It measures the
same and prints a JSON line with `seconds`, as ours does: after a call to warm
up, the best of the timed ones, for one batch.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from deeplab_jax import options
from deeplab_jax.runtime.errors import UserError

MODES = ('forward', 'train', 'input', 'evaluation', 'compile', 'startup')
_PAIRS = 5  # fewer say little: single times swing by a fifth


def benchmark(args: argparse.Namespace, rest: Sequence[str]) -> None:
  """Runs the measurements and prints them.

  Raises:
    UserError: if a program fails or says nothing that can be read.
  """
  modes = args.mode.split(',') if args.mode else MODES
  for mode in modes:
    if mode not in MODES:
      raise UserError(f'--mode={mode}: must be among {",".join(MODES)}')
  if args.peer and len(modes) != 1:
    raise UserError('--peer needs a single --mode to compare')
  if args.pairs < _PAIRS:
    raise UserError(f'--pairs={args.pairs}: must be at least {_PAIRS}')
  with _lines(args.json) as lines:
    for mode in modes:
      ours = [*(sys.executable, '-m', 'deeplab_jax.benchmark.measure'), *rest]
      ours.append(f'--mode={mode}')
      if args.peer:
        result = compare(ours, shlex.split(args.peer), args.pairs)
        print(format_pairs(result))
      else:
        result = run([*ours, '--layers'])
        print(format_measurement(result))
      print(json.dumps(result), file=lines, flush=True)


@contextlib.contextmanager
def _lines(path: str | None) -> Iterator[TextIO]:
  """The file that JSON lines go to; standard output without a path."""
  if path is None:
    yield sys.stdout
    return
  try:
    file = open(path, 'a')  # noqa: SIM115
  except OSError as error:
    raise UserError(f'--json={path}: {error.strerror}') from error
  with file:
    yield file


def run(command: Sequence[str]) -> dict[str, Any]:
  """Runs a measurement; returns the JSON object of its last line.

  Raises:
    UserError: if it fails, with the last thing it said, or prints none.
  """
  try:
    done = subprocess.run(command, capture_output=True, text=True)
  except OSError as error:
    raise UserError(f'{command[0]}: {error.strerror}') from error
  if done.returncode:
    said = done.stderr.strip().splitlines() or [f'status {done.returncode}']
    raise UserError(
      f'{shlex.join(command)} failed: {said[-1].removeprefix("error: ")}'
    )
  try:
    result = json.loads(done.stdout.strip().splitlines()[-1])
    float(result['seconds'])
  except (ValueError, LookupError, TypeError) as error:
    raise UserError(
      f'{shlex.join(command)} must print a JSON line with "seconds"'
    ) from error
  return result


def compare(
  ours: Sequence[str], peer: Sequence[str], pairs: int
) -> dict[str, Any]:
  """Runs two programs in turn, A B A B ..., so that drift hits both alike.

  Returns:
    `ratio`, our time over the peer's: its median, quartiles and extremes;
    `ours` and `peer`, the first measurement of each without its time; `pairs`,
    all times in seconds.
  """
  measured = []
  for number in range(1, pairs + 1):
    measured.append((run(ours), run(peer)))
    seconds = [result['seconds'] for result in measured[-1]]
    print(
      f'pair {number}/{pairs}: ours {seconds[0]:.4f} s, peer'
      f' {seconds[1]:.4f} s, ratio {seconds[0] / seconds[1]:.3f}',
      file=sys.stderr,
      flush=True,
    )
  times = [[result['seconds'] for result in pair] for pair in measured]
  return {
    'ratio': spread([a / b for a, b in times]),
    'ours': measured[0][0],
    'peer': measured[0][1],
    'pairs': times,
  }


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, quartiles and extremes."""
  quartiles = [values[0]] * 3
  if len(values) > 1:
    quartiles = statistics.quantiles(values, n=4, method='inclusive')
  return {
    'median': quartiles[1],
    'lower_quartile': quartiles[0],
    'upper_quartile': quartiles[2],
    'min': min(values),
    'max': max(values),
  }


def format_pairs(result: dict[str, Any]) -> str:
  """The comparison in one line."""
  ratio = result['ratio']
  return (
    f'ours / peer: {ratio["median"]:.3f}, median of {len(result["pairs"])}'
    f' pairs (quartiles {ratio["lower_quartile"]:.3f} to'
    f' {ratio["upper_quartile"]:.3f}, all {ratio["min"]:.3f} to'
    f' {ratio["max"]:.3f})'
  )


def format_measurement(result: dict[str, Any]) -> str:
  """A table of a measurement, and of its costliest layers."""
  title = f'== {result["mode"]}'
  if 'batch' in result:
    parts = [result['backbone'], result['dtype']]
    if 'crop' in result:
      parts.append('x'.join(map(str, result['crop'])))
    parts += [f'batch {result["batch"]}', result['device']]
    title += f': {", ".join(parts)}'
  return '\n'.join([title, *_rows(result), *_layer_rows(result)])


def _rows(result: dict[str, Any]) -> Iterator[str]:
  for name, value in result.items():
    row = ''
    if name.endswith('seconds'):
      row = f'{value:.4f} s'
    elif name.endswith('per_second') and 'flops' in name:
      row = f'{value / 1e9:.1f} GFLOP/s'
    elif name in ('flops', 'flops_on_map'):
      row = f'{value / 1e9:.2f} GFLOP'
    elif name.startswith('utilization'):
      row = f'{value:.1%} of a matrix product'
    elif name.startswith('peak'):
      row = f'{value / 2**20:.0f} MiB'
    elif name == 'images_per_second':
      row = f'{value:.2f}'
    elif name in ('compilations', 'images', 'devices'):
      row = f'{value}'
    if row:
      yield f'  {name.replace("_", " "):<26}{row}'


def _layer_rows(result: dict[str, Any]) -> Iterator[str]:
  for row in result.get('layers', ()):
    rate = row.get('flops_on_map_per_second')
    yield (
      f'  {row["share"]:6.1%} {1e3 * row["seconds"]:9.2f} ms'
      f' {"" if rate is None else f"{rate / 1e9:.0f} GFLOP/s":>13}'
      f'  {row["name"]}{" (backward)" if row["backward"] else ""}'
    )


def main(argv: Sequence[str]) -> None:
  """Reads this program's own options; the measurement takes the others."""
  parser = options.Parser('deeplab_jax.benchmark', __doc__)
  parser.add_argument('--mode', help=f'some of {",".join(MODES)}; all')
  parser.add_argument('--json', help='file for the JSON lines, appended to')
  parser.add_argument('--peer', help='command to compare with')
  parser.add_argument(
    '--pairs',
    type=int,
    default=_PAIRS,
    help=f'of ours and peer, at least {_PAIRS}',
  )
  benchmark(*parser.parse_known_args(argv))


if __name__ == '__main__':
  with options.one_line_errors():
    main(sys.argv[1:])
