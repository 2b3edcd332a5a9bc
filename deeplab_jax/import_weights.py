"""Imports weights into a workdir, to evaluate, predict or train on."""

import copy
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from deeplab_jax import build
from deeplab_jax.config import get_config, to_json
from deeplab_jax.configure import from_json
from deeplab_jax.data.datasets import DATASETS, DatasetInfo, voc_palette
from deeplab_jax.models.deeplab import PRESETS
from deeplab_jax.runtime import distributed, own
from deeplab_jax.runtime.errors import UserError, naming, require
from deeplab_jax.runtime.files import as_path, write_json
from deeplab_jax.training import steps
from deeplab_jax.weights import checkpoints, networks
from deeplab_jax.weights import load as sources
from deeplab_jax.weights.keras import PUBLISHED

log = logging.getLogger(__name__)

_DEFAULT_SOURCE = 'keras'
_HEAD = 'multi_grid', 'aspp_rates', 'decoder'  # as a preset has them


@distributed.one_run
def import_weights(config: ConfigDict, workdir: Path) -> None:
  """Writes a checkpoint of step 0 with the weights of `config.init_from`.

  It logs what was loaded, what keeps its initial value and what was not used.
  With `config.list` it prints where each array would go, and writes nothing.
  Raises `UserError` if the source cannot be read, does not fit the
  configuration, or the workdir is in use.
  """
  pretrained, config = open_source(config)
  if config.list:
    print(f'{pretrained.names}\npreset: {config.model.preset}')
    return
  if (workdir / 'checkpoints').is_dir():
    with checkpoints.Checkpoints(workdir) as saved:
      if saved.latest_step is not None:
        raise UserError(
          f'{workdir} has a checkpoint of step {saved.latest_step}; import into'
          ' another --workdir'
        )
  default_data = get_config().data.to_dict()
  mine = sources.own_checkpoint(as_path(config.init_from))
  before = mine[0] / 'config.json' if mine else None
  if before and before.exists() and config.data.to_dict() == default_data:
    config.data.update(from_json(before).data.to_dict())
  info = _dataset_info(config, pretrained)
  if config.data.as_stored and not info.mean:
    raise UserError(
      f'config.data.as_stored=True contradicts {pretrained.source}, whose'
      ' images are RGB of 8 bits; leave it out, or name a data set'
    )
  config.data.as_stored = bool(info.mean)
  model = build.make_model(config, info.num_classes, **info.normalization)
  # Step 0 needs no state of an optimizer: training starts with a fresh one.
  state = steps.create_state(model, optax.identity(), config.seed)
  state = initialize(pretrained, state, config)
  described = networks.describe(to_json(config)['model'], info.to_json())
  with checkpoints.Checkpoints(workdir) as saved:
    saved.save(state, described)
  own.remember(to_json(config))
  if distributed.is_first_process():
    write_json(workdir / 'config.json', to_json(config))
    print(f'{workdir} holds the weights for --mode=eval and --mode=predict')
    if config.data.to_dict() == default_data:
      print('eval needs a data set of these classes: --config.data.*')


def open_network(
  source: str, info: DatasetInfo | None, num_classes: int | None = None
) -> dict[str, Any]:
  """Opens weights that have a class layer, as the arguments of `Predictor`.

  `info` says what the classes are; by default the source, and 21 are PASCAL
  VOC's. With another `num_classes`, the class layer is drawn from seed 0.
  """
  pretrained, config = open_source(config_of(source))
  if pretrained.num_classes is None:
    part = 'a backbone alone' if pretrained.arrays else 'no array of known name'
    raise UserError(
      f'{source} holds {part}, which knows no classes; train on it first:'
      f' --config.init_from={source}'
    )
  count = pretrained.num_classes if num_classes is None else num_classes
  info = info or _known_info(pretrained, count)
  model = build.make_model(config, count, **info.normalization)
  draw = functools.partial(steps.draw_variables, model)
  key = jax.random.key(0)
  shapes = jax.eval_shape(draw, key)
  variables, _ = _merge(pretrained, shapes, config, bool(info.mean))
  if count != pretrained.num_classes:
    layer = jax.jit(lambda key: draw(key)['params']['logits'])(key)
    variables['params']['logits'] = jax.device_get(layer)
  return {
    'model': model,
    'variables': variables,
    'info': info,
    'settings': to_json(config)['model'],
  }


def config_of(
  source: str | None, config: ConfigDict | None = None
) -> ConfigDict:
  """Gives a configuration, by default a new one, the network of a source.

  Without a source it is Keras, which has several backbones: that of
  `config.model` counts, or ResNet-50 if there are no weights for it.
  """
  _read.cache_clear()  # the source may have changed
  config = config or get_config()
  config.init_from, config.model.aspp_features = source or _DEFAULT_SOURCE, 256
  asked = config.model.backbone
  backbone = asked if asked in PUBLISHED else 'resnet50'
  pretrained = _open(config.init_from, backbone)
  fixed = pretrained.settings | (pretrained.use or {})
  preset = PRESETS[pretrained.presets[0]]
  by_preset = {key: preset[key] for key in _HEAD} | fixed
  config.model.update(by_preset, preset=pretrained.presets[0])
  if config.model.preset == 'vainf' and not pretrained.use:
    config.model.output_stride = 16  # of its training and published results
  return config


def open_source(
  config: ConfigDict, info: DatasetInfo | None = None
) -> tuple[sources.Pretrained, ConfigDict]:
  """Reads `config.init_from`; returns it, and a copy with what it fixes.

  A configuration that contradicts it raises a `UserError`. It warns if `info`
  has as many classes of other names.
  """
  config = copy.deepcopy(config)
  config.init_from = config.init_from or _DEFAULT_SOURCE
  model = config.model
  pretrained = _open(config.init_from, model.backbone)
  if pretrained.dataset:  # which anyone may have written
    with naming(f'config.init_from={config.init_from}'):
      DatasetInfo.from_json(pretrained.dataset)
  model.preset = pretrained.preset_for(model.preset)
  wanted = {'bn_epsilon': PRESETS[model.preset]['bn_epsilon']}
  wanted |= pretrained.settings
  model.bn_epsilon = model.bn_epsilon or wanted['bn_epsilon']
  asked = to_json(config)['model']
  contradictions = [
    f'config.model.{key}={asked[key]} (there {value})'
    for key, value in wanted.items()
    if asked[key] != (list(value) if isinstance(value, tuple) else value)
  ]
  if contradictions:
    looks = pretrained.settings.get('backbone', 'another network')
    raise UserError(
      f'{pretrained.source} looks like {looks}, which contradicts'
      f' {", ".join(contradictions)}'
    )
  if info and (other := _other_class(pretrained, info)):
    log.warning('%s; its class layer is kept all the same', other)
  return pretrained, config


_read = functools.lru_cache(1)(sources.open_pretrained)  # once for each run


def _open(source: str, backbone: str) -> sources.Pretrained:
  named = {'backbone': backbone} if source == _DEFAULT_SOURCE else {}
  return _read(source, **named)


def initialize(
  pretrained: sources.Pretrained, state: steps.TrainState, config: ConfigDict
) -> steps.TrainState:
  """Puts the weights into a fresh state, and logs what was loaded."""
  variables, report = _merge(
    pretrained, jax.device_get(state.variables), config, config.data.as_stored
  )
  if distributed.is_first_process():
    preset = ' or '.join(pretrained.presets)
    log.info('weights of %s, preset %s\n%s', pretrained.source, preset, report)
  return dataclasses.replace(state, **variables)


def _merge(
  pretrained: sources.Pretrained, variables: Any, config: Any, measured: bool
) -> tuple[dict[str, Any], Any]:
  own = bool((pretrained.dataset or {}).get('mean'))
  there, here = (
    sources.input_std(config.model.preset, measured=x) for x in (own, measured)
  )
  _read.cache_clear()
  return pretrained.merge_into(variables, config.init_allow, there / here)


def _dataset_info(config: Any, pretrained: sources.Pretrained) -> DatasetInfo:
  """What the classes mean: by the source, unless a data set was named."""
  if pretrained.num_classes and config.data.name == get_config().data.name:
    return _known_info(pretrained, pretrained.num_classes)
  split = config.data.eval_split or config.data.train_split
  info = build.open_dataset(config, split).info
  if other := _other_class(pretrained, info):
    raise UserError(f'{other}; import without config.data, or in that order')
  return info


def _other_class(pretrained: sources.Pretrained, info: DatasetInfo) -> str:
  """Says which class of as many the source calls otherwise; '' if none."""
  theirs = (pretrained.dataset or {}).get('classes', ())
  if len(theirs) == info.num_classes:
    for there, here in zip(theirs, info.classes, strict=True):
      if there != here:
        return f'{pretrained.source} has class {there!r} where {here!r} is here'
  return ''


def _known_info(pretrained: sources.Pretrained, count: int) -> DatasetInfo:
  """What a source says of its classes; 21 are VOC's, others have numbers."""
  voc = DATASETS['voc2012']
  known = voc if pretrained.num_classes == voc.num_classes else None
  if pretrained.dataset:
    known = DatasetInfo.from_json(pretrained.dataset)
  if known and known.num_classes == count:
    return known
  images = {k: getattr(known, k) for k in ('bits', 'mean', 'std') if known}
  with naming(source := pretrained.source):
    whole = hasattr(count, '__index__') and 1 <= count <= 255
    require(whole, 'num_classes must be 1 to 255', count)
    classes = tuple(f'class {i}' for i in range(count))
    return DatasetInfo(source, classes, voc_palette(count), **images)
