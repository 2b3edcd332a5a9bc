"""Checkpoints that describe themselves, through Orbax.

`WORKDIR/checkpoints/STEP` holds the state as numpy arrays, and as JSON the
settings of the model, the classes and the metrics that it reached.
"""

import contextlib
import json
import operator
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from deeplab_jax.runtime.errors import UserError, first_line

_UNEVALUATED = -1.0
# The settings, beside the preset, on which the use of the variables depends.
SHAPING = ('backbone', 'width', 'multi_grid', 'aspp_features', 'aspp_rates')


class Checkpoints(contextlib.AbstractContextManager['Checkpoints']):
  """The checkpoints of one workdir: the latest one and the best by mIoU.

  At the end of the context it waits for the last save.
  """

  def __init__(self, workdir: str | Path) -> None:
    """Opens the folder, or makes it; raises `UserError` if it cannot."""
    policies, miou = ocp.checkpoint_managers, operator.itemgetter('miou')
    self._directory = Path(workdir).absolute() / 'checkpoints'
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(
        [policies.LatestN(1), policies.BestN(get_metric_fn=miou, n=1)]
      ),
      best_fn=miou,
    )
    with _explaining(f'{self._directory} cannot be used'):
      self._directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
        self._directory, item_names=('state', 'metadata'), options=options
      )

  def __exit__(self, *_: object) -> None:
    self._manager.close()

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None without one."""
    return self._manager.latest_step()

  def step_named(self, name: str) -> int:
    """Returns the step for 'best', 'latest' or a number, or `UserError`."""
    if not (steps := sorted(self._manager.all_steps())):
      raise UserError(
        f'no checkpoint in {self._directory}; train there first, or give the'
        ' --workdir of a training run'
      )
    best = self._manager.best_step() if name == 'best' else None
    if name in ('best', 'latest'):
      return steps[-1] if best is None else best
    if not name.isdigit() or int(name) not in steps:
      raise UserError(
        f'config.eval.step={name} is not in {self._directory}, which has'
        f' {", ".join(map(str, steps))}'
      )
    return int(name)

  def remove_interrupted(self) -> None:
    """Removes what a killed save left; only for the one process that saves."""
    # Orbax could do this itself, but in a thread, which the end of a program
    # cuts off, and an evaluation would remove a save that training has begun.
    if jax.process_count() == 1:
      for path in self._directory.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(path, ignore_errors=True)

  def save(self, state: Any, metadata: dict[str, Any]) -> None:
    """Starts to save a tree with a field `step`, unless that step is there.

    `metadata` holds JSON values. `metadata['metrics']['miou']` ranks the
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

  def wait(self) -> None:
    """Waits until what `save` started is on disk."""
    self._manager.wait_until_finished()

  def metadata(self, step: int) -> dict[str, Any]:
    """Returns what `save` was given as `metadata`."""
    saved = self._restore(step, metadata=ocp.args.JsonRestore()).metadata
    if 'measures' in saved:  # their name in older workdirs
      saved['metrics'] = saved.pop('measures')
    return saved

  def restore(self, step: int, template: Any) -> Any:
    """Restores the state into numpy arrays of the template's structure."""
    args = ocp.args.PyTreeRestore(jax.device_get(template))
    hint = 'it needs the config.optimizer it came from; '
    return self._restore(step, hint, state=args).state

  def restore_variables(self, step: int) -> dict[str, Any]:
    """Restores what `model.apply` takes: `params` and `batch_stats`."""
    state = self._restore(step, state=ocp.args.PyTreeRestore()).state
    return {key: state[key] for key in ('params', 'batch_stats')}

  def _restore(self, step: int, hint: str = '', **items: Any) -> Any:
    with _explaining(
      f'{self._directory / str(step)} cannot be restored',
      f'; {hint}if it was damaged, remove that folder to fall back on the'
      ' checkpoint before',
    ):
      return self._manager.restore(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _explaining(problem: str, advice: str = '') -> Iterator[None]:
  """Turns the errors of Orbax into a `UserError`."""
  try:
    yield
  except (ValueError, KeyError, OSError, TypeError) as error:
    raise UserError(f'{problem}: {first_line(error)}{advice}') from error


class Network(NamedTuple):
  """A checkpoint opened for use."""

  step: int
  model: dict[str, Any]  # the arguments of `deeplab_v3` except `num_classes`
  dataset: dict[str, Any]  # `DatasetInfo.to_json()`
  variables: dict[str, Any]  # what `model.apply` takes, numpy arrays
  trained_stride: int  # the output stride of training
  metrics: dict[str, Any] | None  # what the checkpoint reached, if evaluated


def check_workdir(workdir: Path) -> None:
  """Raises `UserError` unless there may be a checkpoint in a workdir."""
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(f'no checkpoint in {workdir}; train there first')


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
  with Checkpoints(workdir) as saved:
    step = saved.step_named(name)
    metadata = saved.metadata(step)
    model = {**model, 'preset': model['preset'] or preset_of(metadata)}
    dataset = dataset or metadata['dataset']
    check_same_architecture(metadata, describe(model, dataset), workdir)
    variables = saved.restore_variables(step)
  stride = metadata['model']['output_stride']
  metrics = metadata.get('metrics')
  return Network(step, model, dataset, variables, stride, metrics)


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
  classes = saved['dataset']['classes']
  void = saved['dataset'].get('ignore_label', 255)
  if void < len(classes):
    raise UserError(
      f'the checkpoint in {workdir} was trained by an older version with void,'
      f' {void}, as the class {classes[void]!r}; train again in another'
      ' --workdir'
    )
  there, here = saved['model'], asked['model']
  pairs = [(key, there[key], here[key]) for key in (*SHAPING, 'num_classes')]
  pairs.insert(0, ('preset', preset_of(saved), preset_of(asked)))
  others = asked['dataset']['classes']
  if len(classes) == len(others):
    names = zip(map(repr, classes), map(repr, others), strict=True)
    pairs += [('class', old, new) for old, new in names if old != new][:1]
  differences = '; '.join(
    f'{k} {old} there, {new} asked for' for k, old, new in pairs if old != new
  )
  if differences:
    raise UserError(
      f'the checkpoint in {workdir} is of another network: {differences}. Use'
      ' another --workdir, or that network'
    )
