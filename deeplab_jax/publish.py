"""--mode=publish: a network and its card, in a folder or on the hub."""

import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import deeplab_jax
from deeplab_jax import configure
from deeplab_jax.config import flat, get_config
from deeplab_jax.evaluation.metrics import format_table
from deeplab_jax.predict import Predictor
from deeplab_jax.report import evaluations
from deeplab_jax.runtime import distributed, files, host
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights import hub, networks

# The pictures, by what follows the name of an evaluation.
_PICTURES = {'': 'predictions.png', '_confusion': 'confusion.png'}
_FILES = {hub.CONFIG, hub.ARRAYS, 'README.md', *_PICTURES.values()}
_PROTOCOL = 'split', 'images', 'protocol', 'crop_size', 'scales', 'flip'


def publish(config: Any, workdir: Path) -> None:
  """Publishes the checkpoint `config.eval.step` as `config.publish` says.

  It writes the arrays, `config.json`, a card and pictures, all or nothing, in
  the place of an earlier publication. Raises `UserError` for what cannot be
  published, and for a folder that holds anything else.
  """
  to = config.publish.to or ''
  on_hub = re.fullmatch(r'hf://[\w.-]+/[\w.-]+', to)
  if not on_hub and re.fullmatch(r'|\w+:/.*|.*[\0-\x1f].*', to, re.DOTALL):
    raise UserError(f'config.publish.to={to}: name a folder, or hf://USER/NAME')
  folder = Path(to).resolve()
  if folder.exists() and not on_hub:
    names = set(os.listdir(folder)) if folder.is_dir() else {to}
    ours = hub.is_published(folder, damaged=False)
    if names - _FILES or (names and not ours):
      raise UserError(
        f'{folder} holds other things; name another --config.publish.to=DIR'
      )
  networks.check_workdir(workdir)
  predictor = Predictor.from_config(config, workdir)
  if not distributed.is_first_process():
    return
  kept: Any = files.new_folder(folder, replace=True)
  with tempfile.TemporaryDirectory() if on_hub else kept as new:
    source = to if on_hub else folder.name
    _write(Path(new), source, config.publish.license, predictor, workdir)
    if on_hub:
      hub.upload(Path(new), to)
  print(f'step {predictor.step} is published: {to}', flush=True)


def _write(
  folder: Path, source: str, license: str, predictor: Predictor, workdir: Path
) -> None:
  info, step = predictor.info.to_json(), predictor.step
  version, settings = deeplab_jax.__version__, predictor.settings
  hub.write(folder, version, settings, info, predictor.variables)
  found = [x for x in evaluations(workdir) if x.get('step') == step]
  parts = [_head(source, license, predictor), 'It was not evaluated.']
  if metrics := found[0] if found else predictor.metrics:
    known = (f'{key} {metrics[key]}' for key in _PROTOCOL if key in metrics)
    try:
      table = format_table(metrics)
    except Exception as error:  # damage may break anything
      text = f'{workdir}: an evaluation of step {step} is damaged; repeat it'
      raise UserError(text) from error
    text = f'{", ".join(known)}\n\n{table}'.replace('`', "'")
    parts[1:] = [f'```\n{text}\n```']
  for ending, name in _PICTURES.items() if found else ():
    picture = workdir / 'eval' / f'{found[0]["name"]}{ending}.png'
    if picture.exists():
      files.write(folder / name, picture.read_bytes())
      parts.append(f'![{Path(name).stem}]({name})')
  parts += _training(workdir, step)
  files.write(folder / 'README.md', '\n\n'.join(parts) + '\n')


def _head(source: str, license: str, predictor: Predictor) -> str:
  """The front matter, what the network is, and how to use it."""
  info, model = predictor.info, predictor.settings
  name = ' '.join(info.name.replace('`', '').split())  # anyone's text
  plus = '+' if model['decoder'] == 'v3plus' else ''
  return f"""---
license: "{license}"
library_name: deeplab_jax
pipeline_tag: image-segmentation
tags: [deeplab, semantic-segmentation, jax, flax]
metrics: [mean_iou, accuracy]
---

# {source.rpartition('/')[2]}

DeepLab v3{plus} for JAX: backbone `{model['backbone']}`, preset
`{model['preset']}`, decoder `{model['decoder']}`, output stride
{model['output_stride']}. It finds {info.num_classes} classes of `{name}` in
images of {len(info.fill)} channels of {info.bits} bits.

```python
from deeplab_jax import Predictor  # pip install 'deeplab_jax[hf]'

predictor = Predictor.from_pretrained({source!r})
classes = predictor('photo.jpg')  # uint8 [H, W], of predictor.info.classes
```

For other classes, `from_pretrained(..., num_classes=N)` keeps all but the class
layer, as does training with `--config.init_from={source}`.

## Evaluation"""


def _training(workdir: Path, step: int) -> list[str]:
  """The command, if it is known, and the versions that are installed.

  Of places on this machine only the last part is told.
  """
  default, used = flat(get_config()), configure.last_used(workdir)
  command = ['python -m deeplab_jax.main', '--workdir=WORKDIR']
  command += ['--mode=import'] * (step == 0)
  for key, value in used.items():
    if value != default.get(key) and not key.startswith('log.'):
      text = ','.join(map(str, value)) if type(value) is tuple else str(value)
      local = os.path.isabs(text) or files.is_remote(text)
      text = Path(text).name if local else text
      command.append(shlex.quote(f'--config.{key}={text}'))
  lines = ' \\\n  '.join(command) if used else '# its settings are not known'
  lines = lines.replace('`', '')  # anyone's text, which ends at one
  found = host.versions('deeplab_jax', 'jax', 'jaxlib', 'flax').items()
  versions = ', '.join(map(' '.join, found))
  return ['## Training', f'```bash\n{lines}\n```', f'Step {step}. {versions}.']
