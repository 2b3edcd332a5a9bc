"""Checkpoints that describe themselves, through Orbax.

`WORKDIR/checkpoints/STEP` holds the state as numpy arrays, and as JSON the
settings of the model, the classes and the metrics that it reached.
"""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deeplab_jax.runtime.errors import UserError

_UNEVALUATED = -1.0
_TUPLES = ('multi_grid', 'aspp_rates')


class Checkpoints:
  """The checkpoints of one workdir: the latest one and the best by mIoU."""

  def __init__(self, workdir: str | Path) -> None:
    """Opens the folder, creating it if need be.

    Raises:
      UserError: if it cannot be read.
    """
    policies = ocp.checkpoint_managers
    self._directory = Path(workdir).absolute() / 'checkpoints'
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(1),
          policies.BestN(get_metric_fn=lambda m: m['miou'], n=1),
        ]
      ),
      best_fn=lambda metrics: metrics['miou'],
    )
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
        self._directory, item_names=('state', 'metadata'), options=options
      )
    except (ValueError, KeyError, OSError, TypeError) as error:
      raise UserError(
        f'{self._directory} cannot be used: {_first_line(error)}'
      ) from error

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None without one."""
    return self._manager.latest_step()

  def step_named(self, name: str) -> int:
    """The step for 'best', 'latest' or a number.

    Raises:
      UserError: if there is no such checkpoint.
    """
    steps = sorted(self._manager.all_steps())
    if not steps:
      raise UserError(
        f'no checkpoint in {self._directory}; train there first, or give the'
        ' --workdir of a training run'
      )
    if name == 'best':
      best = self._manager.best_step()
      return steps[-1] if best is None else best
    if name == 'latest':
      return steps[-1]
    if not name.isdigit() or int(name) not in steps:
      raise UserError(
        f'config.eval.step={name} is not in {self._directory}, which has'
        f' {", ".join(map(str, steps))}'
      )
    return int(name)

  def remove_interrupted(self) -> None:
    """Removes what a killed save left; only for the one process that saves.

    Orbax's own clean-up runs in a thread that a quick end of the program cuts
    off with a traceback, and would take a running save from under training
    when an evaluation starts.
    """
    if jax.process_count() == 1:
      for path in self._directory.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(path, ignore_errors=True)

  def save(self, state: Any, metadata: dict[str, Any]) -> None:
    """Starts to save, unless the step is there; `close` waits for the end.

    Args:
      state: tree of arrays with a field `step`.
      metadata: JSON values; `metadata['metrics']['miou']` ranks the
        checkpoint, which without metrics is only ever the latest.
    """
    state = jax.device_get(state)
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    miou = (metadata.get('metrics') or {}).get('miou')
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        metadata=ocp.args.JsonSave(metadata),
      ),
      metrics={'miou': _UNEVALUATED if miou is None else miou},
    )

  def metadata(self, step: int) -> dict[str, Any]:
    """What `save` was given as `metadata`."""
    with self._readable(step):
      metadata = self._manager.restore(
        step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
      ).metadata
    # The name of the metrics in older checkpoints.
    return {'metrics' if k == 'measures' else k: v for k, v in metadata.items()}

  def restore(self, step: int, template: Any) -> Any:
    """Restores the state into numpy arrays of the template's structure."""
    template = jax.device_get(template)
    with self._readable(step, 'it needs the config.optimizer it came from; '):
      return self._manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeRestore(template)),
      ).state

  def restore_variables(self, step: int) -> dict[str, Any]:
    """Restores what `model.apply` takes: `params` and `batch_stats`."""
    with self._readable(step):
      state = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore())
      ).state
    return {key: state[key] for key in ('params', 'batch_stats')}

  @contextlib.contextmanager
  def _readable(self, step: int, hint: str = '') -> Any:
    try:
      yield
    except (ValueError, KeyError, OSError, TypeError) as error:
      raise UserError(
        f'{self._directory / str(step)} cannot be restored:'
        f' {_first_line(error)}; {hint}if it was damaged, remove that folder to'
        ' fall back on the checkpoint before'
      ) from error

  def wait(self) -> None:
    """Waits until what `save` started is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and frees the manager."""
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _first_line(error: Exception) -> str:
  return (
    (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(':')
  )


@dataclasses.dataclass(frozen=True)
class Network:
  """A checkpoint opened for use.

  Attributes:
    step: of training.
    model: the arguments of `deeplab_v3` but for the number of classes.
    dataset: `DatasetInfo.to_json()`.
    variables: what `model.apply` takes, numpy arrays.
    trained_stride: the output stride of training.
  """

  step: int
  model: dict[str, Any]
  dataset: dict[str, Any]
  variables: dict[str, Any]
  trained_stride: int


def open_network(
  workdir: str | Path,
  name: str,
  model: dict[str, Any],
  dataset: dict[str, Any] | None = None,
) -> Network:
  """Reads a checkpoint that fits a model's settings; all processes together.

  Args:
    workdir: holds the checkpoints.
    name: 'best', 'latest' or a step.
    model: the arguments of `deeplab_v3`; an empty preset is the checkpoint's.
    dataset: what it must have been trained for; None for whatever it was.

  Raises:
    UserError: if there is no such checkpoint, or it is of another network.
  """
  with Checkpoints(workdir) as saved:
    step = saved.step_named(name)
    metadata = saved.metadata(step)
    model = {**model, 'preset': model['preset'] or preset_of(metadata)}
    dataset = dataset or metadata['dataset']
    check_same_architecture(metadata, describe(model, dataset), workdir)
    return Network(
      step,
      model,
      dataset,
      saved.restore_variables(step),
      metadata['model']['output_stride'],
    )


def describe(model: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
  """Metadata of a checkpoint: the arguments of `deeplab_v3`, and the data set.

  Args:
    model: settings by name, JSON values.
    dataset: `DatasetInfo.to_json()`.
  """
  return {
    'model': {**model, 'num_classes': len(dataset['classes'])},
    'dataset': dataset,
  }


def preset_of(metadata: dict[str, Any]) -> str:
  """The preset of a checkpoint's network, by what `describe` made."""
  return metadata['model'].get('preset') or 'paper'


def check_same_architecture(
  saved: dict[str, Any], asked: dict[str, Any], workdir: str | Path
) -> None:
  """Compares what the variables were made for, of two `describe`.

  Raises:
    UserError: naming the settings that differ.
  """
  classes = saved['dataset']['classes']
  void = saved['dataset'].get('ignore_label', 255)
  if void < len(classes):
    raise UserError(
      f'the checkpoint in {workdir} was trained by an older version with void,'
      f' {void}, as the class {classes[void]!r}; train again in another'
      ' --workdir'
    )
  differences = []
  old, new = preset_of(saved), preset_of(asked)
  if old != new:
    differences.append(f'preset {old} there, {new} asked for')
  for key in (
    'backbone',
    'width',
    'multi_grid',
    'aspp_features',
    'aspp_rates',
    'num_classes',
  ):
    old, new = saved['model'][key], asked['model'][key]
    if (list(old) != list(new)) if key in _TUPLES else (old != new):
      differences.append(f'{key} {old} there, {new} asked for')
  names = [list(d['dataset']['classes']) for d in (saved, asked)]
  if len(names[0]) == len(names[1]) and names[0] != names[1]:
    pairs = zip(*names, strict=True)
    old, new = next(pair for pair in pairs if pair[0] != pair[1])
    differences.append(f'class {old!r} there, {new!r} asked for')
  if differences:
    raise UserError(
      f'the checkpoint in {workdir} is of another network:'
      f' {"; ".join(differences)}. Use another --workdir, or that network'
    )
