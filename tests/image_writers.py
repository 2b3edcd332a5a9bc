"""Image files as tests need them, also those that no library writes."""

import os
import struct
import zlib

import numpy as np


def gradient(height=20, width=30):
  y, x = np.mgrid[:height, :width]
  return np.stack([x * 8, y * 12, 255 - x * 8], -1).astype(np.uint8)


def gray_png(label, bits):
  """A gray PNG of 2 or 4 bits, which no library at hand writes."""

  def chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', check)

  height, width = label.shape
  spread = np.unpackbits(label[..., None], axis=-1)[..., 8 - bits :]
  rows = np.packbits(spread.reshape(height, -1), axis=-1)
  raw = b''.join(b'\0' + row.tobytes() for row in rows)
  header = struct.pack('>IIBBBBB', width, height, bits, 0, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(raw))
    + chunk(b'IEND', b'')
  )


def tiff(values, bits, *tags):
  """An uncompressed TIFF; tags are triples (number, type, value)."""
  height, width = values.shape[:2]
  if bits == 12:
    a, b = values.reshape(-1, 2).astype(int).T
    data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1)
    data = data.astype(np.uint8).tobytes()
  else:
    data = values.tobytes()
  samples = values.shape[2] if values.ndim == 3 else 1
  rows = {
    **{256: (4, width), 257: (4, height), 258: (3, bits), 259: (3, 1)},
    **{262: (3, 1), 273: (4, 0), 277: (3, samples)},
    **{278: (4, height), 279: (4, len(data))},
    **{number: (kind, value) for number, kind, value in tags},
  }
  start = 8 + 2 + 12 * len(rows) + 4
  extra = b''
  if samples > 1:
    extra = struct.pack(f'<{samples}H', *[bits] * samples)
  rows[273] = (4, start + len(extra))
  entries = b''
  for number, (kind, value) in sorted(rows.items()):
    count = 1
    if number == 258 and samples > 1:
      count, value = samples, start
      entries += struct.pack('<HHII', number, kind, count, value)
      continue
    pattern = '<HHIHxx' if kind == 3 else '<HHII'
    entries += struct.pack(pattern, number, kind, count, value)
  head = b'II*\0' + struct.pack('<IH', 8, len(rows))
  return head + entries + bytes(4) + extra + data


def sparse(path, size):
  """Makes a file of so many zeros, which take no room on the disk."""
  path.touch()
  os.truncate(path, size)
