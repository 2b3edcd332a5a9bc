"""A published network, as a folder or on the Hugging Face hub.

`model.safetensors` holds the arrays by the paths of this project. `config.json`
says what they mean; anyone may have written it, so all of it is checked.
"""

import contextlib
import json
import re
import textwrap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from deeplab_jax.models.deeplab import PRESETS, deeplab_v3
from deeplab_jax.runtime.errors import UserError, first_line, naming, require
from deeplab_jax.runtime.files import read_bytes, write_json
from deeplab_jax.weights.mapping import flatten
from deeplab_jax.weights.timm import read_safetensors

CONFIG, ARRAYS = 'config.json', 'model.safetensors'
# An example of `config.json`, which has exactly these keys and types, lists
# of up to 256. `model` goes to `deeplab_v3`, `dataset` to `DatasetInfo`.
_FORM = json.loads("""{
  "format": 1, "library": "deeplab_jax", "version": "0.1.0",
  "model": {
    "preset": "paper", "backbone": "resnet50", "width": 1.0, "multi_grid": [1],
    "aspp_features": 256, "aspp_rates": [6], "decoder": "none",
    "bn_epsilon": 1e-5, "output_stride": 16, "dtype": "float32"
  },
  "normalization": {"mean": [127.5], "std": [127.5]},
  "dataset": {
    "name": "shapes", "classes": ["background"], "palette": [[0]],
    "ignore_label": 255, "values": [0], "void_value": 255, "bits": 8,
    "mean": [127.5], "std": [127.5]
  }
}""")


def write(
  folder: Path, version: str, model: Any, dataset: Any, variables: Any
) -> None:
  """Writes a network into a folder.

  `model` holds the arguments of `deeplab_v3`, and `dataset` is that of
  `DatasetInfo.to_json`. Raises `UserError` for what `read` would refuse.
  """
  preset = PRESETS[model['preset']]
  model = {key: model[key] for key in _FORM['model']}
  model['bn_epsilon'] = model['bn_epsilon'] or preset['bn_epsilon']
  config = {**_FORM, 'version': version, 'model': model, 'dataset': dataset}
  own = dataset if dataset['mean'] else preset
  config['normalization'] = {key: own[key] for key in ('mean', 'std')}
  config = json.loads(json.dumps(config))
  with naming('this network cannot be published'):
    _check(config)
  arrays = {path: np.asarray(x) for path, x in flatten(variables).items()}
  safetensors.numpy.save_file(arrays, folder / ARRAYS, {'format': 'np'})
  write_json(folder / CONFIG, config)


def is_published(folder: Path, *, damaged: bool = True) -> bool:
  """Whether a folder has our `config.json`, or a `damaged` one and arrays."""
  try:
    config = json.loads(read_bytes(folder / CONFIG))
    return config.get('library') == _FORM['library']
  except Exception:  # damage may break anything
    return damaged and (folder / ARRAYS).exists()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Reads `config.json`, and the arrays by path.

  Raises `UserError` if a file is damaged, or holds what it should not.
  """
  try:
    config = json.loads(read_bytes(folder / CONFIG))
    _check(config)
  except Exception as error:  # damage may break anything
    raise UserError(f'{folder / CONFIG}: {first_line(error)}') from error
  arrays = read_safetensors(folder / ARRAYS)
  shape = (len(config['dataset']['classes']),)
  if np.shape(arrays.get('params/logits/bias', ())) != shape:
    raise UserError(f'{folder / ARRAYS}: no class layer for {shape[0]} classes')
  return config, arrays


def _check(config: Any) -> None:
  """Raises `ValueError` unless a network can be built as `config` says."""
  newest, found = _FORM['format'], dict(config).get('format')
  require(found == newest, f'format must be {newest}; is it newer?', found)
  _check_form('config', config, _FORM)
  model, data = config['model'], config['dataset']
  used, classes = config['normalization'], data['classes']
  deeplab_v3(**model, num_classes=len(classes), **used)
  own = data if data['mean'] else PRESETS[model['preset']]
  holds = used == {key: list(own[key]) for key in ('mean', 'std')}
  holds &= len(used['mean']) == len(used['std']) and min(used['std']) > 1e-6
  rule = 'normalization must be that of data set or preset, std above 1e-6'
  require(holds, rule, used)
  numbers = *data['values'], data['void_value'], *chain(*data['palette'])
  holds = len(data['values']) == len(classes) and max(numbers) < 256
  require(holds, 'values must be one for each class, < 256', data['values'])
  require(data['bits'] in (8, 16), 'bits must be 8 or 16', data['bits'])


def _check_form(key: str, value: Any, example: Any) -> None:
  """Raises `ValueError` unless a value has the keys and types of an example."""
  kind = type(example)
  holds = type(value) is kind or (kind is float and type(value) is int)
  holds = holds and (kind not in (int, float) or 0 <= value < 2**16)
  holds = holds and (kind is not list or len(value) <= 256)
  require(holds, f'{key} must be like {json.dumps(example)}', value)
  if kind is dict:
    odd = sorted(value.keys() ^ example.keys())
    require(not odd, f'{key} must have the keys {", ".join(example)}', odd)
    for name in example:
      _check_form(f'{key}.{name}', value[name], example[name])
  for item in value if kind is list else ():
    _check_form(key, item, example[0])


def fetch(source: str) -> Path:
  """Downloads hf://USER/NAME: a folder that `read` takes, or a file of timm."""
  advice = 'download its files elsewhere and name the folder, or the file'
  with _asking(f'{source} cannot be fetched', advice) as hub:
    name = source.removeprefix('hf://')
    with contextlib.suppress(hub.errors.EntryNotFoundError):
      folder = Path(hub.hf_hub_download(name, CONFIG)).parent
      if is_published(folder):  # both files of one commit
        hub.hf_hub_download(name, ARRAYS, revision=folder.name)
        return folder
    return Path(hub.hf_hub_download(name, ARRAYS))


def upload(folder: Path, target: str) -> None:
  """Uploads the files of a folder to hf://USER/NAME, as one commit."""
  failure, name = f'{target} cannot be written', target.removeprefix('hf://')
  with _asking(failure, '`hf auth login` gives access') as hub:
    hub.create_repo(name, exist_ok=True)
    added = [hub.CommitOperationAdd(x.name, x) for x in folder.iterdir()]
    hub.create_commit(name, added, commit_message='A network of deeplab_jax')


@contextlib.contextmanager
def _asking(failure: str, advice: str) -> Iterator[Any]:
  """Yields huggingface_hub; its errors, and its lack, become a `UserError`."""
  try:
    import huggingface_hub.errors  # the extra 'hf'

    yield huggingface_hub
  except ImportError as error:
    needed = "it needs huggingface_hub: pip install 'deeplab_jax[hf]'"
    raise UserError(f'{failure}: {needed}') from error
  except Exception as error:  # the hub's HTTP clients raise errors of their own
    text = re.sub('Bearer .*', 'Bearer ...', str(error), flags=re.DOTALL)
    text = textwrap.shorten(text, 200) or type(error).__name__
    # A traceback of the error could show a token that is no valid header.
    raise UserError(f'{failure}: {text}; {advice}') from None
