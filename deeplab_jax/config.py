"""Every setting with its default, and the checks that no constructor makes.

The default trains a small network on generated scenes within minutes on a
laptop. The recipes in `experiments/` change what they need. `docs/settings.py`
turns the comments, above a setting or behind it, into docs/settings.md.
"""

import copy
import json
import math
import re
from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from ml_collections.config_flags import config_path

from deeplab_jax.runtime.console import did_you_mean
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.values import open_setting as _open
from deeplab_jax.runtime.values import read_value


def get_config() -> ConfigDict:
  """Returns the default configuration, locked against new keys."""
  config = ConfigDict()
  config.seed = 0  # fixes initial weights, order of images, augmentation
  # Weights: `keras`, `torchvision/NAME`, a file, a workdir or hf://USER/NAME.
  # Unset: random ones.
  config.init_from = placeholder(str)
  config.init_allow = _open(())  # patterns of arrays that may be left out
  config.list = False  # `--mode=import` only prints where each array goes

  model = config.model = ConfigDict()
  # `paper`, `seed`, `slim`, `keras`, `timm`, `torchvision` or `vainf`. Unset:
  # that of the weights.
  model.preset = placeholder(str)
  # Or resnet34, 50, 101, 152, 200; of version 1.5: `resnet18_v1` and so on.
  model.backbone = _open('resnet18')
  model.width = 0.25  # factor on the channels of the backbone
  model.output_stride = 8  # or 16, 32; may change after training
  model.multi_grid = _open((1, 2, 4))  # factors on the rates in block 4
  model.aspp_rates = _open((6, 12, 18))  # rates at output stride 16
  model.aspp_features = 64  # channels of each ASPP branch
  # Before the class layer: `conv`, a 3x3 convolution, or `v3plus`, on finer
  # features, too.
  model.decoder = 'none'
  model.bn_decay = 0.97  # decay of the running batch statistics
  model.bn_epsilon = placeholder(float)  # of the variance; unset: by preset
  model.dtype = 'float32'  # or bfloat16; parameters stay float32
  # What to compute twice to save memory: `none`, `elementwise` or `block`.
  # Unset: `elementwise` on CPUs, `none` elsewhere.
  model.rematerialization = placeholder(str)

  data = config.data = ConfigDict()
  # Or `voc2012_segmentation`, with `/trainaug` or `/list` too, or a layout:
  # `folder`, `images_masks`, `coco`, `cityscapes`, `ade20k`, `tfds/NAME`.
  data.name = _open('shapes')
  data.dir = placeholder(str)  # folder of the source
  data.prepared_dir = placeholder(str)  # unset: ~/tensorflow_datasets
  data.train_split = 'train'  # split to train on
  data.eval_split = 'val'  # empty to train without evaluation
  data.ignore_label = 255  # label value of void in the files
  # What label values or colors mean: `255:1`, `0:void,1-9:0-8` or `#ff0000:1`.
  data.label_map = ''
  data.allow_outside = False  # take links in `dir` that lead out of it
  data.on_bad_image = 'stop'  # or `skip`, at an unreadable file
  data.scale = _open((0.5, 2.0))  # smallest and largest factor of scaling
  data.crop_size = _open((129, 129))  # height and width of training images
  data.flip = 0.5  # probability to mirror a training image
  # Largest random changes of brightness, contrast, saturation and hue.
  data.color_jitter = _open((0.0, 0.0, 0.0, 0.0))
  # Whether images keep their own channels and bits; else they become RGB.
  data.as_stored = False
  data.threads = 0  # loading threads; 0: one per core, at most 16
  data.workers = 0  # loading processes
  data.rotate = 0.0  # largest angle of rotation, either way, in degrees
  data.blur = 0.0  # largest standard deviation of a blur, in pixels
  data.noise = 0.0  # largest standard deviation of noise, in levels of 0..255
  data.cutout = 0.0  # share of each side that a gray rectangle hides
  data.crop_max_share = 1.0  # draw a crop again if one class fills more of it
  data.class_sampling = 0.0  # share of images drawn by class, all as likely
  data.transforms = _open(())  # functions of a recipe, applied last
  data.tile = placeholder(int)  # side of the tiles that larger images become
  options = data.options = ConfigDict()  # of one data set
  options.list = placeholder(str)  # of `.../list`: a file of ids to train on
  # Share held out of these (unset: 0.1), or of a set without splits (0.2).
  options.holdout = placeholder(float)
  options.images = placeholder(str)  # folder or glob of images; TFDS's feature
  options.masks = placeholder(str)  # the same of masks
  options.json = placeholder(str)  # of `coco`: glob of the instances

  train = config.train = ConfigDict()
  train.steps = 300  # steps to train
  train.batch_size = 8  # images of a batch, over all devices
  train.accumulate = 1  # parts of a batch that a device takes in turn
  train.log_every = 20  # steps between lines of the log
  train.eval_every = 150  # steps between evaluations, with a checkpoint each
  train.save_every = placeholder(int)  # steps between more checkpoints
  train.save_minutes = 10.0  # longest time without one
  train.keep = 3  # latest checkpoints to keep, beside the best one
  train.keep_every = placeholder(int)  # keep those of its multiples, too
  # At a loss that is not finite: `stop`, or `rollback` to the last checkpoint
  # and skip the batches that led there, also if the loss explodes.
  train.on_nan = 'stop'
  # Minutes without progress until all stacks are shown and the run ends.
  train.watchdog_minutes = placeholder(float)
  train.sync_bn = True  # batch statistics over all devices
  train.freeze_bn = False  # keep the batch statistics as loaded
  train.freeze = _open(())  # patterns of parameters to keep, as `backbone/*`
  train.freeze_steps = placeholder(int)  # up to this step; unset: to the end
  train.ema = placeholder(float)  # decay of averages of the parameters to use
  train.dropout = 0.0  # share of channels that the class layer lacks

  loss = config.loss = ConfigDict()
  # Or `focal`, `dice`, `lovasz_softmax`, or a sum: `cross_entropy:1,dice:0.5`.
  loss.terms = _open(('cross_entropy',))
  # One number per class, as `1,0.5,2`, or `median_frequency` of the labels, or
  # `sqrt_median_frequency`, the square roots of these.
  loss.class_weights = _open(())
  loss.hardest = 1.0  # share of each image's pixels, those of the largest loss
  loss.label_smoothing = 0.0  # share of the target spread over all classes
  loss.auxiliary = 0.0  # weight of a second head on block 3; 0: no such head

  optimizer = config.optimizer = ConfigDict()
  optimizer.name = _open('sgd')  # or `adam`, `adamw`
  optimizer.schedule = _open('poly')  # or `cosine`, `step`
  optimizer.learning_rate = 0.1  # rate at the start of the schedule
  optimizer.power = 0.9  # power of the poly schedule; 0: a constant rate
  optimizer.warmup_steps = 0  # steps over which the rate rises from 0
  optimizer.momentum = 0.9  # momentum of `sgd`
  # L2 penalty of convolution kernels; with `adamw` apart from the gradient.
  optimizer.weight_decay = 1e-4
  optimizer.head_multiplier = 1.0  # factor on the rate outside the backbone
  optimizer.clip_norm = placeholder(float)  # largest norm of the gradient
  optimizer.milestones = _open((0.5, 0.75))  # of `step`, as shares of the run
  optimizer.milestone_factor = 0.1  # factor on the rate at each

  evaluation = config.eval = ConfigDict()
  evaluation.step = 'best'  # checkpoint: `best`, `latest` or a number
  evaluation.batch_size = 8  # images of a batch, over all devices
  evaluation.panels = 8  # images in the picture of each evaluation
  evaluation.protocol = _open('whole')  # or `center_crop`, `sliding_window`
  evaluation.buckets = 4  # sizes to pad images to, each compiled once
  evaluation.crop_size = _open((513, 513))  # height, width of crop or window
  evaluation.overlap = 1 / 3  # share of a window that the next one covers
  evaluation.scales = _open((1.0,))  # average the probabilities over these
  evaluation.flip = False  # average over the mirrored image too
  evaluation.worst_and_best = 4  # images in each of these two pictures
  evaluation.save_predictions = False  # write an archive for a test server
  evaluation.boundary_iou = False  # measure the regions at boundaries, too

  log = config.log = ConfigDict()
  log.to = _open(('tensorboard', 'jsonl'))  # or `wandb`, `mlflow`

  predict = config.predict = ConfigDict()
  predict.output_dir = placeholder(str)  # unset: WORKDIR/predictions
  predict.overlay = True  # draw each prediction over its image, too
  predict.probabilities = placeholder(str)  # write them as `npz` or `png`
  predict.max_side = placeholder(int)  # shrink larger images to it first
  predict.scale = 1.0  # factor on the size of every image
  predict.window = 1536  # side of the windows of larger images, in pixels

  export = config.export = ConfigDict()
  export.format = 'stablehlo'  # or `savedmodel`, `onnx`
  export.output_dir = placeholder(str)  # unset: WORKDIR/export/FORMAT
  export.size = _open(())  # height and width of the images; empty for any
  # Where it will run: `cpu`, `cuda`, `rocm`, `tpu`. ONNX needs to know none.
  export.platforms = _open(('cpu', 'cuda', 'tpu'))
  export.dtype = 'float32'  # to store kernels in; or float16, bfloat16
  export.probabilities = False  # give them beside the classes

  publish = config.publish = ConfigDict()
  publish.to = placeholder(str)  # a folder, or hf://USER/NAME
  publish.license = 'unknown'  # of the weights, as the hub calls it: `mit`
  config.lock().data.options.unlock()
  return config


_STEP = re.compile(r'best|latest|[0-9]+')
# What values must be, in words and as a test, where no constructor knows it.
_RULES: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
  ('seed', 'in 0..2^32 - 1', lambda x: 0 <= x < 2**32),
  ('data.train_split', 'the name of a split', bool),
  ('data.threads data.workers', 'in 0..1024', lambda x: 0 <= x <= 1024),
  ('data.crop_size', 'at most 2^14', lambda x: max([0, *x]) <= 2**14),
  ('eval.crop_size', 'at most 2^14', lambda x: max([0, *x]) <= 2**14),
  ('model.width', 'at most 16', lambda x: x <= 16),
  ('model.aspp_features', 'at most 4096', lambda x: x <= 4096),
  ('model.aspp_rates', 'at most 4096', lambda x: max([0, *x]) <= 4096),
  ('model.multi_grid', 'at most 4096', lambda x: max([0, *x]) <= 4096),
  ('data.class_sampling', 'a share, 0 to 1', lambda x: 0 <= x <= 1),
  ('data.tile', 'at least 64', lambda x: x >= 64),
  ('train.steps', 'in 1..2^31 - 1', lambda x: 1 <= x < 2**31),
  ('train.batch_size eval.batch_size', 'in 1..2^16', lambda x: 1 <= x <= 2**16),
  ('train.accumulate eval.buckets', 'at least 1', lambda x: x >= 1),
  ('train.log_every train.eval_every', 'at least 1', lambda x: x >= 1),
  ('train.save_every train.freeze_steps', 'at least 1', lambda x: x >= 1),
  ('train.keep train.keep_every', 'at least 1', lambda x: x >= 1),
  ('train.ema', 'above 0 and below 1', lambda x: 0 < x < 1),
  ('train.dropout', 'from 0, and below 1', lambda x: 0 <= x < 1),
  ('train.save_minutes train.watchdog_minutes', 'above 0', lambda x: x > 0),
  ('publish.license', 'a name as mit', re.compile(r'[\w.+-]+').fullmatch),
  ('train.on_nan', 'stop or rollback', ('stop', 'rollback').__contains__),
  ('eval.step', 'best, latest or a number', _STEP.fullmatch),
  ('eval.panels eval.worst_and_best', 'at least 0', lambda x: x >= 0),
)


def validate(config: ConfigDict) -> None:
  """Raises `UserError` for what no constructor checks; see `build.check`."""
  check_types(config)
  for keys, what, holds in _RULES:
    for key in keys.split():
      value = config_path.get_value(key, config)
      if value is not None and not holds(value):
        raise UserError(f'config.{key} must be {what}, got {value!r}')
  crop_size, stride = config.data.crop_size, config.model.output_stride
  if crop_size and min(crop_size) < stride:
    raise UserError(
      f'config.data.crop_size={crop_size} must be at least one cell of the'
      f' feature map: config.model.output_stride={stride} pixels'
    )
  batch_size = config.train.batch_size
  if batch_size * math.prod(crop_size) > 2**30:
    raise UserError(
      f'config.train.batch_size={batch_size} and config.data.crop_size='
      f'{crop_size} make more than 2^30 pixels a step; lower them'
    )


def check_types(config: ConfigDict) -> None:
  """Checks keys and types, and reads text that stands for a tuple or None."""
  default, given = get_config(), flat(config)
  for key in given:
    if not key.startswith('data.options.'):
      check_key(key)
  for key, standard in flat(default).items():
    if key not in given:
      raise UserError(f'config.{key} is missing: the section was replaced')
    kind = config_path.get_type(key, default)
    given[key] = read_value(f'config.{key}', given[key], kind, standard)
  with config.ignore_type():
    config.update_from_flattened_dict(given)


def flat(config: Any) -> dict[str, Any]:
  """The values of a configuration, or of its `to_json`, as 'train.steps'."""
  values = config.to_dict() if isinstance(config, ConfigDict) else config
  return flatten_dict(values, sep='.')


def check_key(key: str, config: ConfigDict | None = None) -> None:
  """Raises `UserError` unless there is a setting `key`, as 'train.steps'."""
  section, path = config or get_config(), 'config'
  for name in key.split('.'):
    if not isinstance(section, ConfigDict):
      raise UserError(f'unknown key config.{key}; {path} is no section')
    if name not in section:
      near = did_you_mean(key, flat(get_config()))
      hint = f'did you mean config.{near}? ' if near else ''
      raise UserError(
        f'unknown key {path}.{name}; {hint}{path} has {", ".join(section)}'
      )
    section, path = section[name], f'{path}.{name}'


def with_preset(config: ConfigDict, preset: str) -> ConfigDict:
  """Returns a copy whose `model.preset` is `preset` if it was not set."""
  config = copy.deepcopy(config)
  config.model.preset = config.model.preset or preset
  return config


def to_json(config: ConfigDict) -> dict[str, Any]:
  """The configuration as JSON values; a function is its dotted name."""

  def name(function: Any) -> str:
    known = getattr(function, '__name__', type(function).__name__)
    return f'{function.__module__}.{known}'

  return json.loads(json.dumps(config.to_dict(), default=name))
