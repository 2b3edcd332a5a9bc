"""Prints docs/settings.md, made from the comments in deeplab_jax/config.py.

python docs/settings.py > docs/settings.md
"""

import inspect
import re

from deeplab_jax.config import flat, get_config

HEAD = """# Settings

`python docs/settings.py > docs/settings.md` makes this page from the comments
in [config.py](../deeplab_jax/config.py); a test keeps it current.

A recipe changes the default: `--config=camvid_resnet18` names one of
[experiments](../experiments), `--config=FILE` any Python file with a function
`get_config()`. `--config.section.key=value` changes one setting of either. A
workdir remembers its settings: without `--config` a command uses those. Of a
workdir that somebody else made it takes no paths ([security](security.md)). A
run that starts from weights, `--config.init_from=SOURCE`, takes their network
if its recipe changes no setting of `model`.

A tuple is written `1,2` or `(1,2)`. Where a name stands for a backbone, a data
set, a loss, an optimizer or a protocol, a recipe may also pass a function.
"""


def markdown() -> str:
  """Returns the page: for each section a table of its settings."""
  defaults, prefixes = flat(get_config()), {'config': ''}
  lines, comments, table = [HEAD.rstrip()], [], ''
  for line in map(str.strip, inspect.getsource(get_config).splitlines()):
    if line.startswith('#'):
      comments.append(line[1:].strip())
    elif found := re.match(r'(\w+) = (\w+)\.(\w+) = ConfigDict', line):
      name, parent, section = found.groups()
      prefixes[name] = f'{prefixes[parent]}{section}.'
      comments.clear()
    elif found := re.match(r'(\w+)\.(\w+) = [^#]*(?:# (.*))?', line):
      section, name, comment = found.groups()
      key = prefixes[section] + name
      if table != key.partition('.')[0] and '.' in key:
        table = key.partition('.')[0]
        lines += ['', f'## {table}']
      if '.' not in key and not table:
        table = 'config'
        lines += ['', '## General']
      if not lines[-1].startswith('|'):
        lines += ['', '| setting | default | meaning |', '| --- | --- | --- |']
      meaning = ' '.join([*comments, comment or '']).strip().rstrip('.')
      meaning = meaning[:1].upper() + meaning[1:]
      lines.append(f'| `{key}` | {_shown(defaults[key])} | {meaning} |')
      comments.clear()
  return '\n'.join(lines) + '\n'


def _shown(value: object) -> str:
  if value is None or value in ('', ()):
    return ''
  return f'`{value}`' if isinstance(value, str) else f'`{value!r}`'


if __name__ == '__main__':
  print(markdown(), end='')
