"""Checkpoints that describe themselves and notice damage, through Orbax.

`WORKDIR/checkpoints/STEP` holds the state as numpy arrays, and as JSON the
settings of the model, the classes, and a checksum of every array. When the
checkpoint is evaluated, its metrics are written beside them.
"""

import contextlib
import functools
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UnreadableError, UserError, first_line
from deeplab_jax.runtime.files import as_path, is_remote, write

log = logging.getLogger(__name__)

_TEMPORARY = '.orbax-checkpoint-tmp'  # in the names of what is not complete
_MARK = 'commit_success.txt'  # on gs://, in the folder of what is
_METRICS = 'evaluation.json'  # in the folder of an evaluated checkpoint


class Saved(NamedTuple):
  """A checkpoint as it was read, without damage."""

  path: Path
  metadata: dict[str, Any]  # what `Checkpoints.save` was given
  arrays: dict[str, np.ndarray]  # by path, as 'params/logits/bias'

  @property
  def step(self) -> int:
    """The number of training steps that led to it."""
    return int(self.path.name)

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes: `params`, or averages of it, `batch_stats`."""
    tree = unflatten_dict(self.arrays, sep='/')
    tree['params'] = tree.get('ema', tree['params'])
    return {key: tree[key] for key in ('params', 'batch_stats')}

  def fill(self, state: Any) -> Any:
    """Returns a state with the saved values, which it gives away.

    A checkpoint of step 0 has weights alone: the rest stays as it is. Averages
    of the parameters are there if the checkpoint has them.
    """
    if any(name.startswith('ema/') for name in self.arrays):
      state = state.replace(ema=state.params)
    leaves, treedef = _named(state), jax.tree.structure(state)
    if self.step and (other := leaves.keys() ^ self.arrays.keys()):
      second = any(name.startswith('params/auxiliary/') for name in other)
      what = 'loss.auxiliary' if second else 'optimizer'
      raise UserError(
        f'{self.path} is of another {what}: it needs the config.{what} it came'
        ' from'
      )
    values = [self.arrays.pop(name, leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(treedef, values)


class Checkpoints(contextlib.AbstractContextManager['Checkpoints']):
  """The checkpoints of one workdir: the latest ones and the best by mIoU.

  The first process alone saves, in the background; every process reads. At the
  end of the context it waits for the last save.
  """

  def __init__(
    self, workdir: str | Path, *, keep: int = 3, keep_every: int | None = None
  ) -> None:
    """Opens the folder, or makes it; raises `OSError` if it cannot.

    It keeps the latest `keep` checkpoints, the best one, and those of every
    step that `keep_every` divides.
    """
    folder, self._remote = as_path(workdir), is_remote(workdir)
    folder = folder if self._remote else folder.absolute()
    self._directory = folder / 'checkpoints'
    self._keep, self._keep_every = keep, keep_every
    self._thread = ThreadPoolExecutor(1)
    self._saving: Future[None] | None = None
    self._metrics: dict[int, dict[str, Any] | None] = {}
    own = jax.process_index()  # no process waits for another one
    options = ocp.options.MultiprocessingOptions(
      primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )
    self._orbax = ocp.Checkpointer(
      ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
        metadata=ocp.JsonCheckpointHandler(multiprocessing_options=options),
      ),
      multiprocessing_options=options,
    )
    self._directory.mkdir(parents=True, exist_ok=True)

  def __exit__(self, *_: object) -> None:
    try:
      self.wait()
    except UserError:
      time.sleep(1)  # TensorStore still writes what is in its queue
      self.remove_interrupted()
      raise
    finally:
      self._thread.shutdown()
      self._orbax.close()

  @property
  def steps(self) -> list[int]:
    """Steps of the checkpoints on disk, which may be damaged, in order."""
    try:
      if self._remote:  # where Orbax marks what is complete
        names = [p.parent.name for p in self._directory.glob(f'*/{_MARK}')]
      else:
        names = [path.name for path in self._directory.iterdir()]
    except OSError as error:
      text = f'{self._directory} was removed ({error.strerror}); start again'
      raise UserError(text) from error
    return sorted(int(n) for n in names if re.fullmatch('0|[1-9][0-9]*', n))

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None without one."""
    return max(self.steps, default=None)

  @property
  def best_step(self) -> int | None:
    """Step of the best one by mIoU; the latest if none is evaluated."""
    return next(iter(self._order('best')), None)

  def _order(self, name: str) -> list[int]:
    """The steps that `name` may mean, the first choice first."""
    if name not in ('best', 'latest'):
      return [step for step in self.steps if str(step) == name]
    mious = dict.fromkeys(self.steps, -1.0)
    for step in mious if name == 'best' else ():
      found = (self.metrics(step) or {}).get('miou')
      mious[step] = -1.0 if found is None else found
    return sorted(mious, key=lambda step: (mious[step], step), reverse=True)

  def open(self, name: str | int) -> Saved:
    """Reads 'best', 'latest' or a step; all processes read the same one.

    A damaged checkpoint is skipped with a warning, unless its step was asked
    for. Raises `UserError` if none can be read.
    """
    if not (steps := self.steps):
      raise UserError(
        f'no checkpoint in {self._directory}; train there first, or give the'
        ' --workdir of a training run'
      )
    tried: set[int] = set()
    while left := [s for s in self._order(str(name)) if s not in tried]:
      tried.add(left[0])
      path = self._directory / str(left[0])
      try:
        return self._read(path)
      except UnreadableError as error:
        if not path.exists():  # a run beside this one has just removed it
          continue
        if not left[1:]:
          advice = f'remove {path.parent} to start again'
          if len(tried) < len(steps):
            advice = 'choose another config.eval.step'
          raise UserError(f'{error}; {advice}') from error
        log.warning('%s; it is skipped', error)
    raise UserError(
      f'config.eval.step={name} is not in {self._directory}, which has'
      f' {", ".join(map(str, steps))}'
    )

  def _read(self, path: Path) -> Saved:
    """Reads a checkpoint; raises `UnreadableError` if anything is damaged."""
    with _reading(path):
      metadata = self._restore(path, metadata=ocp.args.JsonRestore()).metadata
      state = self._restore(path, state=ocp.args.PyTreeRestore()).state
      arrays = {name: np.asarray(leaf) for name, leaf in _named(state).items()}
      if str(arrays['step']) != path.name:
        raise ValueError(f'it holds step {arrays["step"]}')
      if 'checksum' in metadata or 'checksums' in metadata:  # else an old one
        metadata = _unsealed(metadata)
        if metadata.pop('checksums') != _checksums(arrays):
          raise ValueError('an array differs from its checksum')
    return Saved(path, metadata, arrays)

  def _restore(self, path: Path, **items: Any) -> Any:
    return self._orbax.restore(path, ocp.args.Composite(**items))

  def metrics(self, step: int) -> dict[str, Any] | None:
    """Returns what a checkpoint reached; None if it is not evaluated.

    It warns of a damaged file, which counts as none.
    """
    if step not in self._metrics:
      try:
        self._metrics[step] = self._read_metrics(self._directory / str(step))
      except UnreadableError as error:
        log.warning('%s; it counts as not evaluated', error)
        self._metrics[step] = None
    return self._metrics[step]

  def _read_metrics(self, path: Path) -> dict[str, Any] | None:
    if (path / _METRICS).exists():
      with _reading(path / _METRICS):
        found = _unsealed(json.loads((path / _METRICS).read_text()))
        if not 0 <= (found['miou'] or 0) <= 1:
          raise ValueError(f'miou is {found["miou"]}')
        return found
    with _reading(path):  # older versions wrote them with the rest
      saved = self._restore(path, metadata=ocp.args.JsonRestore()).metadata
      return saved.get('metrics', saved.get('measures'))

  def add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
    """Writes beside a checkpoint what it reached, as JSON values.

    `metrics['miou']` ranks it.
    """
    self.wait()
    self._metrics[step] = metrics
    if distributed.is_first_process():
      path = self._directory / str(step) / _METRICS
      write(path, json.dumps(_sealed(metrics)))

  def save(
    self,
    state: Any,
    metadata: dict[str, Any],
    then: Callable[[], None] = lambda: None,
  ) -> None:
    """Starts to save a tree with a field `step`, unless that step is there.

    `metadata` holds JSON values. The state may change or be donated at once.
    `then` is called once it is on disk. Raises `UserError` if the save before
    has failed.
    """
    self.wait()
    step = int(state.step)
    if step not in self.steps and distributed.is_first_process():
      copies = jax.tree.map(_copy, state)
      path = self._directory / str(step)
      self._saving = self._thread.submit(
        self._write, path, copies, metadata, then
      )

  def _write(self, path: Path, state: Any, metadata: Any, then: Any) -> None:
    state = jax.device_get(state)
    metadata = _sealed({**metadata, 'checksums': _checksums(_named(state))})
    state, metadata = ocp.args.PyTreeSave(state), ocp.args.JsonSave(metadata)
    try:
      if not self._remote:
        path.parent.stat()  # Orbax would make the folder again
      self._orbax.save(path, ocp.args.Composite(state=state, metadata=metadata))
    except Exception as error:  # of TensorStore, too
      raise UserError(
        f'{path} cannot be saved: {first_line(error)}; when that is mended, the'
        ' same command goes on from the checkpoint before'
      ) from error
    then()
    every, steps = self._keep_every, self.steps
    kept = {*steps[-self._keep :], self.best_step}
    for step in steps:
      if step not in kept and not (every and step % every == 0):
        old = path.with_name(str(step))
        if self._remote:
          (old / _MARK).unlink()
        else:
          old.rename(f'{path}{_TEMPORARY}-{step}')
    self.remove_interrupted()

  def wait(self) -> None:
    """Waits until what `save` started is on disk; raises its `UserError`."""
    if self._saving:
      self._saving.result()

  def remove_interrupted(self) -> None:
    """Removes what a killed save left; only for the run that saves."""
    steps, paths = set(map(str, self.steps)), self._directory.glob('[0-9]*')
    for path in paths if distributed.is_first_process() else ():
      if _TEMPORARY in path.name or (self._remote and path.name not in steps):
        with contextlib.suppress(OSError):
          epath.Path(path).rmtree()

  def set_aside(self, after: int) -> None:
    """Renames the checkpoints after a step, which are damaged."""
    for step in self.steps:
      if step > after and distributed.is_first_process():
        aside = self._directory / f'damaged-{step}'
        epath.Path(aside).rmtree(missing_ok=True)
        aside.with_name(str(step)).rename(aside)


def _copy(leaf: Any) -> Any:
  """A copy on the first device, made while the devices go on."""
  if isinstance(leaf, jax.Array):
    return jax.device_put(leaf.addressable_data(0), may_alias=False)
  return np.array(leaf)


def _named(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path, as 'params/logits/bias'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  return {name(path): leaf for path, leaf in leaves}


def _checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
  """CRC-32 of type, shape and bytes of each array."""
  return {
    name: zlib.crc32(x.tobytes(), zlib.crc32(f'{x.dtype}{x.shape}'.encode()))
    for name, x in arrays.items()
  }


def _sealed(value: dict[str, Any]) -> dict[str, Any]:
  """Adds a checksum to JSON values."""
  text = json.dumps(value, sort_keys=True)
  return {**value, 'checksum': zlib.crc32(text.encode())}


def _unsealed(value: dict[str, Any]) -> dict[str, Any]:
  """Undoes `_sealed`; raises `ValueError` if a value has changed."""
  own = {key: item for key, item in value.items() if key != 'checksum'}
  if _sealed(own) != value:
    raise ValueError('it differs from its checksum')
  return own


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
  """Turns all that reading may raise into an `UnreadableError`."""
  try:
    yield
  except Exception as error:  # damage may break anything in the readers
    raise UnreadableError(f'{path} is damaged: {first_line(error)}') from error
