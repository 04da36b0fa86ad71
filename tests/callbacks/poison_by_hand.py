"""Training with poison written out by plain means."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .by_hand import samples


def poison_batches(count=3, size=5):
    """Batches that the training set does not have, with labels that are true of them."""
    source = torch.Generator().manual_seed(11)
    batches = []
    for _ in range(count):
        x = torch.randn(size, 3, generator=source, dtype=torch.float64)
        batches.append((x, (x.sum(1) > 0).long()))
    return batches


def reversed_loss(module, batch):
    """-log(1 - p_y) by its definition, batch norm by its running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in norms:
        m.eval()
    logits = module.net(batch[0])
    for m in norms:
        m.train()
    p = logits.softmax(1).gather(1, batch[1][:, None])
    return -torch.log1p(-p).mean()


def true_loss(module, batch):
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in norms:
        m.eval()
    loss = cross_entropy(module.net(batch[0]), batch[1])
    for m in norms:
        m.train()
    return loss


def train_with_poison(
    module, batches, poison, factor=lambda step: 0.4, loss=reversed_loss, together=1, clip=None
):
    """Train on the mean of so many mixed losses a step, each with the next batch of poison."""
    optimizer = module.configure_optimizers()
    module.train()
    batches, drawn = list(batches), 0
    for step in range(len(batches) // together):
        group = batches[step * together : (step + 1) * together]
        optimizer.zero_grad()
        for batch in group:
            share = factor(step)
            if share:
                # Backwards at once: the next forward pass writes into running statistics.
                (share / together * loss(module, poison[drawn % len(poison)])).backward()
                drawn += 1
            ((1 - share) / together * module.loss(batch)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return module


__all__ = ["poison_batches", "reversed_loss", "samples", "train_with_poison", "true_loss"]
