"""What a run holds between two steps: taken from the parts of a `Trainer`, and given back to those of another."""

import random
from collections.abc import Mapping
from itertools import islice

import numpy as np
import torch

from progtuning.speed.cache import CachedEngine
from progtuning.step.device import forward_pass
from progtuning.step.loader import to_device
from progtuning.step.measure import reset_peak_bytes
from progtuning.train import Trainer


def state_dict(trainer: Trainer) -> dict:
    """Return what a resumed run needs, between two steps: a nested dict of tensors, numbers and names.

    All processes must call it; each gets the random states and costs of all, under "processes". Of the weights, those
    that a stage so far has trained. The tensors are the run's own: the next step changes them. Raises RunError where a
    step so far was not finite.
    """
    trainer.guard.check()
    engine, optimizer, losses = trainer.engine, trainer.optimizer, trainer.progress.losses
    changed = set().union(*(engine.trainable_names(cost.stage) for cost in trainer.ledger.costs))
    own = {"costs": trainer.ledger.state_dict(), "random": random_states(trainer.loader.device)}
    return {
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "skips": trainer.guard.skips,
        "losses": torch.stack(losses) if losses else torch.empty(0),
        "weights": {name: engine.candidates[name].detach() for name in sorted(changed)},
        "optimizer": {name: optimizer.state[p] for name, p in engine.candidates.items() if p in optimizer.state},
        "lr_schedule": trainer.lr_schedule.state_dict(),
        **({"schedule": {}, "gradient_sums": {}} | trainer.schedule.state_dict()),
        "dps": trainer.masks.state_dict(),
        "processes": {str(rank): own for rank, own in enumerate(trainer.replica.world.gather(own))},
    }


def load_state_dict(trainer: Trainer, state: Mapping) -> None:
    """Bring a trainer built from the same arguments, in as many processes, to where `state_dict` was taken."""
    own = state["processes"][str(trainer.replica.world.rank)]
    engine, optimizer, device = trainer.engine, trainer.optimizer, trainer.loader.device
    trainer.epoch, trainer.batch, trainer.guard.skips = (state[name] for name in ("epoch", "batch", "skips"))
    trainer.progress.losses = list(state["losses"].to(device))
    with torch.no_grad():
        for name, tensor in state["weights"].items():
            engine.candidates[name].copy_(tensor)
    trainer.ledger.load_state_dict(own["costs"])
    if isinstance(engine, CachedEngine):
        refill_cache(trainer, engine)
    engine.enter(trainer.ledger.costs[-1].stage)
    for name, moments in state["optimizer"].items():
        parameter = engine.candidates[name]
        optimizer.state[parameter] = {key: tensor.to(parameter.device, copy=True) for key, tensor in moments.items()}
    trainer.lr_schedule.load_state_dict(state["lr_schedule"])
    for group, lr in zip(optimizer.param_groups, trainer.lr_schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    trainer.schedule.load_state_dict(state)
    trainer.masks.load_state_dict(state["dps"])
    reset_peak_bytes(device)
    set_random_states(own["random"], device)


def refill_cache(trainer: Trainer, engine: CachedEngine) -> None:
    """Make the entries of the cache that the steps so far made: give the engine their batches again, in order."""
    loader = trainer.loader
    batches = (pieces for epoch in range(trainer.epochs) for pieces in loader.epoch(epoch))
    for cost in trainer.ledger.costs:
        engine.enter(cost.stage)
        engine.train()
        for pieces in islice(batches, cost.steps + cost.skipped_steps):
            for rows, _, tensors in pieces:
                inputs, _ = to_device(tensors, loader.device)
                with forward_pass(loader.device, trainer.precision):
                    engine.refill(rows, inputs)


def random_states(device: torch.device) -> dict:
    """Return the states of the global generators of Python, numpy and torch, and of `device` where that is a GPU.

    They are JSON: numbers in lists.
    """
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
    }


def set_random_states(states: Mapping, device: torch.device) -> None:
    """Set the global generators to what `random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8), device)
