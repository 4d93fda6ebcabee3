"""Statistics of one layer as the collector gathers them, and the same quantities from raw tokens and gradients."""

from collections import namedtuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slimrank.linalg.forms import Metric
from slimrank.methods.decomposer import Decomposer
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.collector import Collector

PATH = "block.layer"
UNTOUCHED = {"trim": 0, "clip": None, "accumulate": 1}

# inputs, gradients: one (windows x tokens x channels) tensor per batch
Observed = namedtuple("Observed", "weight statistics inputs gradients")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def observe(
    method, m=12, n=12, *, dtype=torch.float64, batches=2, windows=2, tokens=16, rank=None, seed=0,
    weight=None, outlier=None, dead=(), bias=False, conv1d=False, alone=False, padded=False,
    weight_scale=1.0, input_scale=1.0, loss_scale=1.0, **gathering,
):  # fmt: skip
    """Run a random m x n layer through the collector, with all that a method (or a set of needs) asks for.

    Args:
        method: a `Decomposer`, or needs.
        dtype: of the weight; the layer runs in float64 for float64 and in float32 for all others.
        rank: the planned rank.
        weight: use this one (m x n) and not a random one.
        outlier: a channel that is 3000 times the others.
        dead: channels that are always zero.
        alone: whether the layer is known to share its input with no other.
        padded: whether the mask leaves out every token.
    """
    needs = method.needs if isinstance(method, Decomposer) else method
    weight = ((random(m, n, seed=seed) if weight is None else weight) * weight_scale).to(dtype)
    runs_in = torch.float64 if dtype == torch.float64 else torch.float32
    layer = _layer(weight, runs_in, bias, conv1d, seed)
    inputs = [_inputs(windows, tokens, n, outlier, dead, seed + b) * input_scale for b in range(batches)]
    inputs = [x.to(runs_in) for x in inputs]
    loss = _loss(m, loss_scale, seed)
    collector = Collector(
        {PATH: layer}, GatherOptions(needs=needs, **{**UNTOUCHED, **gathering}), torch.device("cpu"),
        alone=frozenset({PATH} if alone else ()), ranks={} if rank is None else {PATH: rank},
    )  # fmt: skip
    with collector:
        for x in inputs:
            collector.begin(torch.zeros(windows, tokens, dtype=torch.long) if padded else None)
            _step(layer, x, loss)
    gradients = [_gradient(weight.to(runs_in), x, loss) for x in inputs]
    return Observed(weight, collector.statistics[PATH], inputs, gradients)


def _layer(weight, dtype, bias, conv1d, seed):
    m, n = weight.shape
    layer = (Conv1D(m, n) if conv1d else nn.Linear(n, m, bias=bias)).to(dtype).requires_grad_(False)
    layer.weight.copy_(weight.t() if conv1d else weight)
    if layer.bias is not None:
        layer.bias.copy_(3 * random(m, seed=seed + 70) if bias else torch.zeros(m))
    return layer


def _inputs(windows, tokens, n, outlier, dead, seed):
    """Correlated channels of unequal energy, and a mean that is not zero."""
    mix = random(n, n, seed=50) / n**0.5 + torch.eye(n, dtype=torch.float64)
    x = random(windows, tokens, n, seed=seed + 10) @ mix * torch.linspace(0.5, 2, n, dtype=torch.float64) + 0.3
    if outlier is not None:
        x[..., outlier] *= 3000
    x[..., list(dead)] = 0
    return x


def _loss(m, scale, seed):
    """A smooth loss that mixes channels and tokens, of the outputs in units of their mean magnitude."""
    mix, weights = random(m, 2 * m, seed=seed + 20), random(2 * m, seed=seed + 21)

    def loss(y):
        unit = y.detach().square().mean().sqrt()
        h = (y + 0.3 * y.mean(dim=1, keepdim=True)) / torch.where(unit > 0, unit, 1)
        return scale * (torch.sin(h @ mix.to(y) / m**0.5) @ weights.to(y)).sum()

    return loss


def _step(layer, x, loss):
    x = x.clone().requires_grad_()
    y = layer(x)
    torch.autograd.grad(loss(y if layer.bias is None else y - layer.bias), x)


def _gradient(weight, x, loss):
    y = (x @ weight.t()).requires_grad_()
    return torch.autograd.grad(loss(y), y)[0]


def rows(batches):
    """All tokens (tokens x channels, float64) of batches."""
    return torch.cat([b.reshape(-1, b.shape[-1]) for b in batches]).double()


def gram_of(batches):
    return rows(batches).t() @ rows(batches)


def weight_gradients(observed):
    """g^T x (m x n, float64) of every window."""
    pairs = zip(observed.gradients, observed.inputs, strict=True)
    return [g.double().t() @ x.double() for gs, xs in pairs for g, x in zip(gs, xs, strict=True)]


def damped(c, alpha):
    """(1 - alpha) C + alpha tr(C)/n I."""
    return (1 - alpha) * c + alpha * c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype)


def shrunk_to_diagonal(c, alpha):
    """(1 - alpha) C + alpha diag(C), the median of the others for channels that are zero."""
    energies = c.diagonal().clone()
    energies[energies == 0] = energies[energies > 0].median()
    return (1 - alpha) * c + alpha * energies.diag()


SHRUNK = {"identity": damped, "diagonal": shrunk_to_diagonal}


def ridged(c, alpha):
    """C + alpha tr(C)/n I."""
    return c + alpha * c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype)


def kronecker(samples, iterations):
    """Row and column factor by power iteration on dense weight gradients."""
    column = torch.eye(samples[0].shape[1], dtype=torch.float64)
    for _ in range(iterations):
        row = sum(s @ column @ s.t() for s in samples)
        row = row / row.norm()
        column = sum(s.t() @ row @ s for s in samples)
        column = column / column.norm()
    return row, column


def _outputs_only(observed):
    return Metric.of(column=gram_of(observed.inputs))


def _asvd(observed, alpha=0.5, scale="mean"):
    magnitude = rows(observed.inputs).abs()
    return Metric.of(column=(magnitude.amax(0) if scale == "max" else magnitude.mean(0)) ** (2 * alpha))


def _fwsvd(observed):
    return Metric.of(column=sum(s.square().sum(0) for s in weight_gradients(observed)))


def _coala(observed, mu=0.0):
    return Metric.of(column=ridged(gram_of(observed.inputs), mu))


def _gfwsvd(observed, iterations=100, shrink=0.1, shrink_target="diagonal"):
    row, column = kronecker(weight_gradients(observed), iterations)
    shrunk = SHRUNK[shrink_target]
    return Metric.of(shrunk(row, shrink), shrunk(column, shrink))


def _kfac(observed, row_shrink=0.1, column_shrink=0.03, shrink_target="diagonal"):
    shrunk = SHRUNK[shrink_target]
    return Metric.of(shrunk(gram_of(observed.gradients), row_shrink), shrunk(gram_of(observed.inputs), column_shrink))


METRICS = {
    "svd": lambda observed: Metric(),
    "fwsvd": _fwsvd,
    "asvd": _asvd,
    "svd_llm": _outputs_only,
    "svd_llm_v2": _outputs_only,
    "drone": _outputs_only,
    "basis_sharing": _outputs_only,
    "coala": _coala,
    "gfwsvd": _gfwsvd,
    "kfac_svd": _kfac,
}


def metric_of(method, observed, **options):
    """The metric that a method claims to be optimal in, whole and in float64, from raw tokens and gradients."""
    return METRICS[method](observed, **options)


def batch_bases(observed, rank):
    """The leading left singular vectors of each batch's outputs."""
    return [torch.linalg.svd(observed.weight.double() @ rows([x]).t()).U[:, :rank] for x in observed.inputs]


def projector_loss(observed, rank, b):
    """sum_b || U_b - P U_b ||^2, P the projector on the columns of b: what dobi_svd minimises."""
    p = b @ torch.linalg.pinv(b)
    return float(sum((u - p @ u).square().sum() for u in batch_bases(observed, rank)))
