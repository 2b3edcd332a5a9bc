"""Writes `torch_train_step.npz`: five training steps by PyTorch in float64.

The tests do not run this file; it shows how the numbers were computed.

  python -m venv torch_venv && torch_venv/bin/pip install torch==2.13.0 numpy
  torch_venv/bin/python torch_train_step.py [FOLDER]
"""

import pathlib
import sys
import zlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 5
STEM = 8  # channels of the first convolution, an eighth of ResNet-50's
ASPP = 16  # channels of each ASPP branch
STEPS = 10  # of the learning rate schedule; five are taken


class Bottleneck(nn.Module):
  """A pre-activation bottleneck; the stride is that of the 3x3 convolution."""

  def __init__(self, channels, features, stride, rate):
    super().__init__()
    out = 4 * features
    self.stride = stride
    self.preact = nn.BatchNorm2d(channels)
    self.conv1 = nn.Conv2d(channels, features, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(features)
    self.conv2 = nn.Conv2d(
      features, features, 3, stride, rate, rate, bias=False
    )
    self.bn2 = nn.BatchNorm2d(features)
    self.conv3 = nn.Conv2d(features, out, 1, bias=False)
    self.shortcut = None
    if channels != out:
      self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

  def forward(self, x):
    preact = F.relu(self.preact(x))
    if self.shortcut is None:
      shortcut = x[:, :, :: self.stride, :: self.stride]
    else:
      shortcut = self.shortcut(preact)
    y = F.relu(self.bn1(self.conv1(preact)))
    y = F.relu(self.bn2(self.conv2(y)))
    return shortcut + self.conv3(y)


def conv_bn_relu(channels, features, size, rate=1):
  padding = 0 if size == 1 else rate
  return nn.Sequential(
    nn.Conv2d(
      channels, features, size, padding=padding, dilation=rate, bias=False
    ),
    nn.BatchNorm2d(features),
    nn.ReLU(),
  )


class Network(nn.Module):
  """DeepLab v3 at output stride 16, with multi-grid (1, 2, 4) in block 4."""

  def __init__(self):
    super().__init__()
    self.conv1 = nn.Conv2d(3, STEM, 7, 2, 3, bias=False)
    units, channels = [], STEM
    for features, count, stride, rates in (
      (STEM, 3, 2, (1,) * 3),
      (2 * STEM, 4, 2, (1,) * 4),
      (4 * STEM, 6, 1, (1,) * 6),
      (8 * STEM, 3, 1, (2, 4, 8)),
    ):
      for index, rate in enumerate(rates):
        last = index == count - 1
        units.append(
          Bottleneck(channels, features, stride if last else 1, rate)
        )
        channels = 4 * features
    self.units = nn.Sequential(*units)
    self.postnorm = nn.BatchNorm2d(channels)
    self.aspp = nn.ModuleList(
      [conv_bn_relu(channels, ASPP, 1)]
      + [conv_bn_relu(channels, ASPP, 3, rate) for rate in (6, 12, 18)]
    )
    self.pool = conv_bn_relu(channels, ASPP, 1)
    self.project = conv_bn_relu(5 * ASPP, ASPP, 1)
    self.logits = nn.Conv2d(ASPP, CLASSES, 1)

  def forward(self, images):
    x = F.max_pool2d(self.conv1(images), 3, 2, 1)
    x = F.relu(self.postnorm(self.units(x)))
    pooled = self.pool(x.mean((2, 3), keepdim=True))
    branches = [pooled.expand(-1, -1, *x.shape[2:])]
    branches += [branch(x) for branch in self.aspp]
    logits = self.logits(self.project(torch.cat(branches, 1)))
    return F.interpolate(
      logits, images.shape[2:], mode='bilinear', align_corners=True
    )


def weight(name, shape):
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if len(shape) == 4:
    values = rng.normal(0, 1, shape) * np.sqrt(1 / np.prod(shape[1:]))
  elif name.endswith(('running_var', 'weight')):
    values = rng.uniform(0.5, 1.5, shape)
  else:
    values = rng.normal(0, 0.1, shape)
  # Rounded to float32, which the tested network holds.
  return torch.from_numpy(values.astype(np.float32).astype(np.float64))


def data():
  """Images uint8 [4, 97, 81, 3], and labels with 15 % void and a block."""
  rng = np.random.default_rng(5)
  count, height, width = 4, 97, 81
  images = rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
  coarse = rng.integers(0, CLASSES, (count, height // 8 + 1, width // 8 + 1))
  labels = coarse.astype(np.uint8).repeat(8, 1).repeat(8, 2)
  labels = labels[:, :height, :width].copy()
  labels[rng.random(labels.shape) < 0.15] = 255
  labels[0, :50] = 255
  return images, labels


def array(tensor):
  return tensor.detach().numpy().astype(np.float32)


def main(folder):
  torch.set_default_dtype(torch.float64)
  network = Network()
  network.load_state_dict(
    {
      name: weight(name, tuple(value.shape)) if value.ndim else value
      for name, value in network.state_dict().items()
    }
  )
  images, labels = data()
  images = torch.from_numpy((images.astype(np.float64) - 127.5) / 127.5)
  images = images.permute(0, 3, 1, 2)
  labels = torch.from_numpy(labels.astype(np.int64))
  network.eval()
  result = {'eval_logits': array(network(images)[:, :, ::8, ::8])}
  network.train()
  parameters = list(network.parameters())
  optimizer = torch.optim.SGD(
    [
      {'params': [p for p in parameters if p.ndim == 4], 'weight_decay': 1e-4},
      {'params': [p for p in parameters if p.ndim != 4], 'weight_decay': 0.0},
    ],
    lr=0.001,
    momentum=0.9,
  )
  losses, norms = [], []
  for step in range(5):
    for group in optimizer.param_groups:
      group['lr'] = 0.001 * (1 - step / STEPS) ** 0.9
    optimizer.zero_grad()
    loss = F.cross_entropy(network(images), labels, ignore_index=255)
    loss.backward()
    norms.append(float(sum((p.grad**2).sum() for p in parameters)) ** 0.5)
    losses.append(float(loss.detach()))
    if step == 0:
      for name, parameter in network.named_parameters():
        parts = name.split('.')
        # Of the sixteen units five, to keep the file small.
        if parts[0] != 'units' or parts[1] in ('0', '2', '6', '12', '15'):
          result[f'grad/{name}'] = array(parameter.grad)
      for name, buffer in network.named_buffers():
        if name.endswith('.running_mean'):
          name = name.removesuffix('.running_mean')
          result[f'mean/{name}'] = array(buffer)
    optimizer.step()
  result['losses'], result['grad_norms'] = np.array(losses), np.array(norms)
  for name, parameter in network.named_parameters():
    if name in ('conv1.weight', 'logits.weight', 'units.15.conv2.weight'):
      result[f'param5/{name}'] = array(parameter)
  np.savez_compressed(folder / 'torch_train_step.npz', **result)


if __name__ == '__main__':
  here = pathlib.Path(__file__).parent
  main(pathlib.Path(sys.argv[1]) if sys.argv[1:] else here)
