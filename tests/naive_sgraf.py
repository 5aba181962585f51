"""SGR and SAF as the original runs them: one caption at a time, image by image. SPEC 11."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu


def unit(vector: Tensor) -> Tensor:
    return vector / (vector.norm() + 1e-8)


def image_globals(module, images: list[Tensor]) -> list[Tensor]:
    """v° of each image (L, C), BatchNorm as `module` is set: with one channel a region index."""
    local = torch.stack([module.local(image) for image in images])  # (B, L, C)
    overall = torch.stack([module.overall(image.mean(0)) for image in images])  # (B, C)
    norm, training = module.local_norm, module.training
    a = torch.empty_like(local)
    for region in range(local.shape[1]):
        values = local[:, region]
        mean = values.mean() if training else norm.running_mean[region]
        variance = values.var(correction=0) if training else norm.running_var[region]
        scaled = (values - mean) / (variance + norm.eps).sqrt()
        a[:, region] = scaled * norm.weight[region] + norm.bias[region]
    norm = module.overall_norm
    mean = overall.mean(0) if training else norm.running_mean
    variance = overall.var(0, correction=0) if training else norm.running_var
    g = (overall - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    return [_attended(module, image, a[i].tanh(), g[i].tanh()) for i, image in enumerate(images)]


def text_global(module, words: Tensor) -> Tensor:
    """t° of one caption (n, C)."""
    return _attended(
        module, words, module.local(words).tanh(), module.overall(words.mean(0)).tanh()
    )


def _attended(module, tokens: Tensor, local: Tensor, overall: Tensor) -> Tensor:
    weights = module.common(local * overall).squeeze(1).softmax(0)
    return unit((weights[:, None] * tokens).sum(0))


def context(regions: Tensor, words: Tensor, m: int) -> Tensor:
    """What word m gathers from the regions (L, C)."""
    logits = []
    for region in regions:
        row = leaky_relu(words @ region, 0.1)  # (n,)
        logits.append(9 * row[m] / (row.norm() + 1e-8))
    weights = torch.stack(logits).softmax(0)
    return unit((weights[:, None] * regions).sum(0))


def nodes(module, image: Tensor, regions: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """The similarity vectors of one pair, (1 + n, S)."""
    rows = [module.overall((image - text) ** 2)]
    for m, word in enumerate(words):
        rows.append(module.local((context(regions, words, m) - word) ** 2))
    return torch.stack([unit(row) for row in rows])


def reasoned(module, pair_nodes: Tensor) -> Tensor:
    for step in module.steps:
        edges = (step.query(pair_nodes) @ step.key(pair_nodes).T).softmax(1)
        pair_nodes = step.out(edges @ pair_nodes).relu()
    return pair_nodes[0]


def filtered(module, caption_nodes: list[Tensor]) -> list[Tensor]:
    """The vectors of all images with one caption; moves the running statistics in training."""
    norm = module.norm
    values = torch.stack([module.gate(one).squeeze(1) for one in caption_nodes])  # (B_v, 1 + n)
    mean, variance = norm.running_mean, norm.running_var
    if module.training:
        mean, variance = values.mean(), values.var(correction=0)
        with torch.no_grad():
            norm.running_mean.mul_(0.9).add_(0.1 * values.mean())
            norm.running_var.mul_(0.9).add_(0.1 * values.var(correction=1))
    gates = ((values - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).sigmoid()
    weights = gates / (gates.sum(1, keepdim=True) + 1e-8)
    return [unit(row @ one) for row, one in zip(weights, caption_nodes, strict=True)]


def similarity(model, images: list[Tensor], texts: list[Tensor]) -> Tensor:
    """S (B_v, B_t) of unit regions (L, C) each and unit words (n, C) each."""
    wholes = image_globals(model.image_attention, images)
    columns = []
    for words in texts:
        text = text_global(model.text_attention, words)
        made = [
            nodes(model.nodes, whole, regions, text, words)
            for whole, regions in zip(wholes, images, strict=True)
        ]
        if hasattr(model.reasoning, "steps"):
            vectors = [reasoned(model.reasoning, one) for one in made]
        else:
            vectors = filtered(model.reasoning, made)
        columns.append(torch.stack([model.evaluate(one).sigmoid()[0] for one in vectors]))
    return torch.stack(columns, dim=1)
