"""Pruning and signs for `equal_bytes.py`: which weights are kept, and how many bits that takes on disk.

Magnitude keeps the largest |W| of a layer. Wanda (arXiv 2306.11695) keeps the largest |W_ij| ||x_j|| of each row.
Either keeps any weights, or two of every four in a row. ShortGPT (arXiv 2403.03853) leaves out whole blocks, those
first that change the direction of hidden states least. Signs are 1 bit a weight and a scale for each group of columns,
once, or again for what is left (as BiLLM, arXiv 2402.04291, does for some columns).
"""

from math import ceil, log2

import torch
from torch import nn

NUMBER_BITS = 16  # of a kept weight, and of a scale
POINTER_BITS = 32  # of the place where a row of a sparse matrix begins
OF_FOUR_BITS = 2  # that say which of four a kept weight is


def sparse_bits(kept, rows, columns):
    """Bits of a weight of which any `kept` numbers are stored: a mask, or column indices, whichever takes less."""
    indices = kept * ceil(log2(columns)) + (rows + 1) * POINTER_BITS
    return kept * NUMBER_BITS + min(rows * columns, indices)


def two_of_four_bits(rows, columns):
    return rows * columns // 2 * (NUMBER_BITS + OF_FOUR_BITS)


def signs_bits(rows, columns, group, planes):
    return planes * (rows * columns + rows * columns // group * NUMBER_BITS)


def largest(scores, count):
    """Mask of the largest scores of a whole matrix."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(count).indices] = True
    return mask.view_as(scores)


def largest_per_row(scores, count):
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)


def two_of_four(scores):
    """Mask of the two largest scores of every four beside one another in a row."""
    return largest_per_row(scores.reshape(-1, 4), 2).view_as(scores)


def wanda_scores(weight, squares):
    """|W_ij| ||x_j||, where `squares` are the sums of x_j^2."""
    return weight.abs() * squares.sqrt()


def signs(weight, group, planes, dtype):
    """A sum of `planes` matrices of signs times scales, which `dtype` holds; each scale is the best, mean |W|."""
    left = weight.reshape(weight.shape[0], -1, group)
    for _ in range(planes):
        scale = left.abs().mean(-1, keepdim=True).to(dtype).to(left)
        left = left - torch.where(left < 0, -scale, scale)
    return weight - left.reshape(weight.shape)


def kept_in_rows(shapes, bits):
    """For each shape, the weights to keep in a row: equal parts of all rows, so that all take at most `bits`."""

    def kept(part):
        return [int(part * columns) for _, columns in shapes]

    def taken(part):
        pairs = zip(kept(part), shapes, strict=True)
        return sum(sparse_bits(count * rows, rows, columns) for count, (rows, columns) in pairs)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) <= bits else (low, middle)
    return kept(low)


def blocks_to_keep(influence, sizes, bytes_):
    """Blocks of largest influence in model order, so that all take at most `bytes_`: those of least go first."""
    kept = set(range(len(sizes)))
    for index in sorted(kept, key=lambda i: influence[i]):
        if sum(sizes[i] for i in kept) <= bytes_:
            break
        kept.remove(index)
    return sorted(kept)


class LeftOut(nn.Module):
    """Instead of a block: hidden states pass on as they are."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


class InputSquares:
    """Sums of squares of the inputs of some layers, channel by channel, while a model runs."""

    def __init__(self, layers):
        self.layers, self.sums = layers, {}

    def __enter__(self):
        self._hooks = [layer.register_forward_pre_hook(self._add(path)) for path, layer in self.layers.items()]
        return self

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()

    def _add(self, path):
        def add(module, args):
            x = args[0].detach().flatten(0, -2).double()
            self.sums[path] = self.sums.get(path, 0) + x.square().sum(0)

        return add
