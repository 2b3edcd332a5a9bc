"""A run as one HTML page that loads nothing else.

`report.html` is the template: a script in it draws the data, which are JSON.
"""

import base64
import html
import io
import json
import math
import string
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

_PIXELS, _WIDEST = 3_000_000, 1920  # at most, of a picture
_BYTES = 1_600_000  # of a picture, so that a page stays below 5 MB


def page(title: str, data: dict[str, Any]) -> str:
  """Returns the page of JSON values, whose names `report.html` knows."""
  template = resources.files(__package__).joinpath('report.html').read_text()
  # No text of the data can end the script that holds them.
  values = json.dumps(data).replace('<', r'\u003c')
  return string.Template(template).substitute(
    title=html.escape(title), data=values
  )


def picture_url(path: Path) -> str:
  """Returns a picture as the URL of a JPEG, smaller where it is too large."""
  image: Image.Image = Image.open(io.BytesIO(path.read_bytes()))
  width, height = image.size
  scale = min(1, _WIDEST / width, math.sqrt(_PIXELS / (width * height)))
  size = max(1, int(width * scale)), max(1, int(height * scale))
  image = image.convert('RGB').resize(size, Image.Resampling.LANCZOS)
  for quality in 82, 60, 40, 20:
    buffer = io.BytesIO()
    # Classes a pixel wide keep their color only without subsampling.
    image.save(buffer, 'JPEG', quality=quality, subsampling=0)
    if len(buffer.getvalue()) < _BYTES:
      break
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'data:image/jpeg;base64,{data}'
