"""The network of a workdir: what its checkpoints are of, and opening one."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.checkpoints import Checkpoints
from deeplab_jax.weights.mapping import flatten

# The settings, beside the preset, on which the use of the variables depends.
SHAPING = (
  *('backbone', 'width', 'multi_grid'),
  *('aspp_features', 'aspp_rates', 'decoder'),
)


class Network(NamedTuple):
  """A checkpoint opened for use."""

  step: int
  model: dict[str, Any]  # the arguments of `deeplab_v3` except `num_classes`
  dataset: dict[str, Any]  # `DatasetInfo.to_json()`, with the trained mean
  variables: dict[str, Any]  # what `model.apply` takes, numpy arrays
  trained_stride: int  # the output stride of training
  metrics: dict[str, Any] | None  # what the checkpoint reached, if evaluated


def check_workdir(workdir: Path) -> None:
  """Raises `UserError` unless there may be a checkpoint in a workdir."""
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(f'no checkpoint in {workdir}; train there first')


def read(workdir: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a checkpoint: its metadata, and its variables by path."""
  with Checkpoints(workdir) as checkpoints:
    saved = checkpoints.open(name)
  return saved.metadata, flatten(saved.variables)


def open_network(
  workdir: str | Path,
  name: str,
  model: dict[str, Any],
  dataset: dict[str, Any] | None = None,
) -> Network:
  """Reads a checkpoint that fits a model's settings; all processes together.

  `name` is 'best', 'latest' or a step. `model` holds the arguments of
  `deeplab_v3`; without a preset it is the checkpoint's. With `dataset`, the
  checkpoint must have been trained for its classes. Raises `UserError` if there
  is no such checkpoint, or it is of another network.
  """
  with Checkpoints(workdir) as checkpoints:
    saved = checkpoints.open(name)
    metadata, metrics = saved.metadata, checkpoints.metrics(saved.step)
    model = {**model, 'preset': model['preset'] or preset_of(metadata)}
    dataset = dataset or metadata['dataset']
    check_same_architecture(metadata, describe(model, dataset), workdir)
  there, stride = metadata['dataset'], metadata['model']['output_stride']
  measured = {key: there.get(key, ()) for key in ('mean', 'std')}
  dataset = {**dataset, **measured}
  variables = saved.variables
  for tree in variables.values():
    tree.pop('auxiliary', None)  # of training alone
  return Network(saved.step, model, dataset, variables, stride, metrics)


def describe(model: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
  """Returns the metadata of a checkpoint, as JSON gives it back.

  It joins the arguments of `deeplab_v3` and `DatasetInfo.to_json()`.
  """
  model = {**model, 'num_classes': len(dataset['classes'])}
  return json.loads(json.dumps({'model': model, 'dataset': dataset}))


def preset_of(metadata: dict[str, Any]) -> str:
  """Returns the preset of a checkpoint's network; old ones name none."""
  return metadata['model'].get('preset') or 'paper'


def check_same_architecture(
  saved: dict[str, Any], asked: dict[str, Any], workdir: str | Path
) -> None:
  """Raises a `UserError` that names what differs between two `describe`."""
  there = {**saved['model'], 'preset': preset_of(saved)}
  here = asked['model']
  keys = 'preset', *SHAPING, 'num_classes'
  there.setdefault('decoder', 'none')  # of checkpoints before there were any
  pairs = [(key, there[key], here[key]) for key in keys]
  old, new = (
    (len(x['dataset'].get('mean', ())) or 'RGB', x['dataset'].get('bits', 8))
    for x in (saved, asked)
  )
  pairs.append(('channels and bits', old, new))
  if there['num_classes'] == here['num_classes']:
    classes = (map(repr, x['dataset']['classes']) for x in (saved, asked))
    names = zip(*classes, strict=True)
    pairs += [('class', old, new) for old, new in names if old != new][:1]
  differences = '; '.join(
    f'{k} {old} there, {new} asked for' for k, old, new in pairs if old != new
  )
  if differences:
    raise UserError(
      f'the checkpoint in {workdir} is of another network: {differences}. Use'
      ' another --workdir, or that network'
    )
