"""Values of settings: their types, and text that stands for a tuple or None."""

import abc
import ast
import functools
import re
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import FieldReference, config_flags

from deeplab_jax.runtime.errors import UserError


class _Open(abc.ABC):  # noqa: B024
  """Type of a setting: a name or function, or a tuple or text for a tuple."""


class _AsGiven(flags.ArgumentParser):
  """Leaves an option as it was given; `read_value` reads it."""

  def parse(self, argument: Any) -> Any:
    return argument


_member: Any
for _member in (str, Callable, tuple, list):
  _Open.register(_member)
config_flags.register_flag_parser_for_type(_Open, _AsGiven())
# A setting of that type, with its default.
open_setting = functools.partial(FieldReference, field_type=_Open)


_FLOAT32_MAX = 3.4028234663852886e38


def read_value(key: str, value: Any, kind: Any, default: Any) -> Any:
  """Returns what was meant, if it is of the type of the default."""
  # '' and 0 are older spellings of 'not set', but 0 may be held out.
  unset = value is None or (not value and not key.endswith('.holdout'))
  if default is None and unset:
    return None
  if isinstance(default, tuple):
    first = type((*default, object())[0])  # a function may stand for a name
    value, kind = _parse_values(value), _Open if first is str else first
  by_name = kind is _Open
  if by_name and not isinstance(default, tuple) and not callable(value):
    kind = str
  for element in value if isinstance(value, tuple) else (value,):
    name = (*element, '')[0] if type(element) in (list, tuple) else element
    if by_name and re.match(r'[^\W\d]\w*\.', str(name)) and not callable(name):
      raise UserError(
        f'{key}={name} is a function of a recipe, which --config=RECIPE names'
      )
    fits = kind in (object, _Open) or type(element) is kind
    if not fits and not (kind is float and type(element) is int):
      raise UserError(f'{key} must be of type {kind.__name__}, got {value!r}')
    # Also false for NaN; and the network computes in no wider type.
    if kind is float and not abs(element) <= _FLOAT32_MAX:
      raise UserError(f'{key} must be finite in float32, got {value!r}')
  return value


def _parse_values(value: Any) -> tuple[Any, ...]:
  """Reads '1,2', '(1, 2)' and 'words,by,commas'; leaves what is no text."""
  if isinstance(value, str):
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      value = [part.strip() for part in value.split(',') if part.strip()]
  return tuple(value) if isinstance(value, tuple | list) else (value,)
