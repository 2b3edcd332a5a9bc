"""What the input pipeline is measured against; no test, and no part of it.

  python -m venv peer_venv
  peer_venv/bin/pip install torch numpy pillow opencv-python-headless
  python -m deeplab_jax.benchmark --mode=input --batch=16 --config=RECIPE \
    --config.data.dir=FOLDER --peer='peer_venv/bin/python tests/peer_loader.py \
    --dir=FOLDER --loader=torch --batch=16'

`--loader=decode` is a bare loop of cv2.imdecode on one core over the files of a
split; `--loader=torch` a DataLoader with the usual augmentation in OpenCV. Both
print the seconds of a batch, the best of `--repeat` rounds of 256 images.
"""

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np


def read(path):
  return np.frombuffer(path.read_bytes(), np.uint8)


def files(folder, split):
  names = (folder / 'ImageSets/Segmentation' / f'{split}.txt').read_text()
  return [
    (
      folder / 'JPEGImages' / f'{name}.jpg',
      folder / 'SegmentationClass' / f'{name}.png',
    )
    for name in names.split()
  ]


class Augmented:
  """Scale 0.5 to 2, crop, flip, as a map-style data set."""

  def __init__(self, pairs, crop):
    self.pairs, self.crop = pairs, crop

  def __len__(self):
    return len(self.pairs)

  def __getitem__(self, index):
    import torch
    from PIL import Image

    image_path, label_path = self.pairs[index]
    image = cv2.imdecode(read(image_path), cv2.IMREAD_COLOR_RGB)
    label = np.asarray(Image.open(label_path))
    rng = np.random.default_rng(torch.randint(2**62, ()).item())
    factor = rng.uniform(0.5, 2)
    height, width = (round(n * factor) for n in label.shape)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)
    bottom, right = max(self.crop - height, 0), max(self.crop - width, 0)
    pad = (0, bottom, 0, right, cv2.BORDER_CONSTANT)
    if bottom or right:
      image = cv2.copyMakeBorder(image, *pad, value=(124, 117, 104))
      label = cv2.copyMakeBorder(label, *pad, value=255)
    top = rng.integers(label.shape[0] - self.crop, endpoint=True)
    left = rng.integers(label.shape[1] - self.crop, endpoint=True)
    window = np.s_[top : top + self.crop, left : left + self.crop]
    image, label = image[window], label[window]
    if rng.random() < 0.5:
      image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    return tuple(
      torch.from_numpy(np.ascontiguousarray(x)) for x in (image, label)
    )


def start_worker(worker):
  cv2.setNumThreads(0)


def forever(loader):
  while True:
    yield from loader


def torch_batches(args, pairs):
  import torch

  loader = torch.utils.data.DataLoader(
    Augmented(pairs, args.crop),
    args.batch,
    shuffle=True,
    drop_last=True,
    num_workers=args.workers,
    persistent_workers=args.workers > 0,
    worker_init_fn=start_worker,
  )
  iterator = forever(loader)
  return lambda: next(iterator)


def decoded_batches(args, pairs):
  data = [(read(image), read(label)) for image, label in pairs]
  place = 0

  def next_batch():
    nonlocal place
    for _ in range(args.batch):
      image, label = data[place % len(data)]
      cv2.imdecode(image, cv2.IMREAD_COLOR_RGB)
      cv2.imdecode(label, cv2.IMREAD_GRAYSCALE)
      place += 1

  return next_batch


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--dir', type=Path, required=True)
  parser.add_argument('--split', default='train')
  parser.add_argument('--loader', choices=('decode', 'torch'), default='torch')
  parser.add_argument('--crop', type=int, default=513)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--repeat', type=int, default=3)
  args = parser.parse_args()
  cv2.setNumThreads(0)
  make = {'decode': decoded_batches, 'torch': torch_batches}[args.loader]
  next_batch = make(args, files(args.dir, args.split))
  batches, best = -(-256 // args.batch), float('inf')
  for number in range(args.repeat + 1):  # the first warms up
    start = time.perf_counter()
    for _ in range(batches):
      next_batch()
    seconds = (time.perf_counter() - start) / batches
    best = min(best, seconds) if number else best
  print(
    json.dumps(
      {
        'peer': args.loader,
        'crop': args.crop,
        'batch': args.batch,
        'seconds': best,
        'images_per_second': args.batch / best,
      }
    )
  )


if __name__ == '__main__':
  main()
