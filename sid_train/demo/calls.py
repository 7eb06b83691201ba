"""How many network calls an iteration has. A call is one forward pass for one sample of the batch; guidance that asks
with text and without makes two.
"""

from __future__ import annotations

from collections import Counter

from ..training.trainer import Trainer


def count_calls(trainer: Trainer) -> Counter[str]:
    """Calls by role for the whole batch, counted from now on; an encoder pass for the discriminator is one, too."""
    calls: Counter[str] = Counter()
    for name, network in {**trainer.networks, "teacher": trainer.teacher}.items():
        network.register_forward_hook(lambda module, args, output, name=name: calls.update({name: len(args[0])}))
    return calls


def calls_an_iteration(trainer: Trainer) -> float:
    """For each sample of the batch, on average over the steps that are drawn. It trains the run for an iteration."""
    step, more = trainer.method.planned_step()
    calls = count_calls(trainer)
    updates = trainer.method.updates(step, trainer.images_seen)
    trainer.train_iteration(step)
    return calls.total() / trainer.config.training.batch_size + more * len(updates)
