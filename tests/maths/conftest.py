"""Tiny models: more threads only cost."""

import torch

torch.set_num_threads(1)
