"""What each process of tests/test_distributed.py's launch runs: every case of CASES, one after the other.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed_worker FOLDER MODEL DATA

What the cases give is written into FOLDER, where the test reads it.
"""

import gc
import hashlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from progtuning.base.errors import InputError, RunError
from progtuning.base.files import write_json
from progtuning.data.batching import EncodedRows
from progtuning.data.registry import load_splits
from progtuning.data.tokenization import Encoding
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.run.build import build_trainer
from progtuning.run.evaluate import predict
from progtuning.run.finetune import fine_tune
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import CheckpointConfig, DPSConfig, TrainConfig
from progtuning.step.processes import World, join
from progtuning.train import Trainer
from tests.models import TINY, tiny_model

CPU = torch.device("cpu")
SETTINGS = TrainConfig(epochs=3, batch_size=8, lr=1e-3, seed=3)
NUM_ROWS = 41  # the last batch of an epoch has one row: with two ranks, one has none

# In double precision, so that AdamW does not divide rounding errors by their own size (a key's bias has gradient 0),
# and no choice of DPS hangs on them. The cache holds fp32 or bf16: there the optimizer's eps is raised.
CASES = {
    "Progtuning": {},
    "in pieces": {"accumulation_steps": 3},
    "full, in pieces": {"schedule": "full", "accumulation_steps": 2},
    "growing": {"schedule": "growing", "accumulation_steps": 2},
    "the head alone at the end": {"schedule": "without-low-blocks"},
    "embeddings always, rows in the order drawn, no clipping": {
        "embeddings": "always",
        "group_by_length": False,
        "max_grad_norm": 0.0,
    },
    "a stage begins in the middle of an epoch": {"epochs": 2, "stages": 3},
    "adaptive": {"schedule": "adaptive", "accumulation_steps": 2},
    "LoRA": {"peft": PeftConfig("lora", lora_r=2), "accumulation_steps": 2},
    "adapter": {"peft": PeftConfig("adapter", adapter_size=4)},
    "BitFit": {"peft": PeftConfig("bitfit")},
    "SPAFIT": {"peft": PeftConfig("spafit", spafit_bounds=(1, 2), lora_r=2)},
    "DPS dense": {"dps": DPSConfig("dense", update_ratio=0.15), "accumulation_steps": 2},
    "DPS mix": {"dps": DPSConfig("mix", update_ratio=0.15), "accumulation_steps": 2},
    "batches of tokens": {"batch_tokens": 40},
    "question answering": {"head": "question-answering", "labels": (), "accumulation_steps": 2},
    "cache": {"cache": "memory", "epochs": 6, "stages": 3},
    "cache, in pieces": {"cache": "disk", "accumulation_steps": 2},
    "cache, LoRA": {"cache": "memory", "peft": PeftConfig("lora", lora_r=2)},
    "cache, growing": {"cache": "memory", "schedule": "growing", "epochs": 6, "stages": 3},
    "cache, adaptive": {"cache": "memory", "schedule": "adaptive"},
}


def rows(head: str = "classification", count: int = NUM_ROWS) -> EncodedRows:
    """Random rows of 3 to 9 tokens; the first token is the row's number."""
    generator = np.random.default_rng(0)
    encodings = []
    for row in range(count):
        ids = np.concatenate(([row + 1], generator.integers(1, 60, generator.integers(2, 9)))).astype(np.int32)
        encodings.append(Encoding(ids, np.zeros_like(ids)))
    labels = generator.integers(0, 3, (count, 2) if head == "question-answering" else count)
    return EncodedRows(encodings, labels.tolist(), TINY.pad_token_id)


def make_trainer(case: str, world: World = World(), **changes) -> Trainer:
    changes = CASES[case] | changes
    model = tiny_model(**{key: changes.pop(key) for key in ("head", "labels") if key in changes})
    settings = replace(SETTINGS, **changes)
    apply_peft(model, settings.peft)
    if settings.cache == "off":
        model.double()
    run = build_trainer(model, rows(model.config.head), settings, CPU, world=world)
    if settings.cache != "off":
        for group in run.optimizer.param_groups:
            group["eps"] = 1e-3
    return run


def train(case: str, world: World = World()) -> tuple[dict[str, torch.Tensor], dict]:
    """Run a case; return the weights, and what else the tests compare."""
    run, logged, ran = make_trainer(case, world), [], Counter()
    run.progress.log = logged.append
    original = StageEngine.prefix

    def prefix(self, input_ids, attention_mask=None, token_type_ids=None, start=0, x=None, stop=None):
        passed = range(start, self.cut if stop is None else stop)
        ran.update((example, block) for example in (input_ids[:, 0] - 1).tolist() for block in passed)
        return original(self, input_ids, attention_mask, token_type_ids, start, x, stop)

    StageEngine.prefix = prefix
    try:
        run.fit()
    finally:
        StageEngine.prefix = original
    weights = {name: parameter.detach().clone() for name, parameter in run.engine.model.named_parameters()}
    digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights.values())).hexdigest()
    owned = run.replica.world.owns(NUM_ROWS)
    account = run.ledger.account()
    return weights, {
        "digest": digest,
        "log": logged,
        "account": account | {"stages": [stage.to_json() for stage in account["stages"]]},
        "outputs": predict(run.engine.model, run.loader.data, 4, CPU, world=world).tolist(),
        "owned_runs": max((count for (row, _), count in ran.items() if owned[row]), default=0),
        "all_runs": sum(ran.values()),
        "cache_rows": 0 if run.ledger.cache is None else run.ledger.cache.num_tokens,
        "drawn": torch.rand(1).item(),  # where the generator of dropout stands
        "rank": world.rank,
    }


def failure(call: Callable[[], object]) -> list:
    """Return the name of the class and the text of what a call raises."""
    try:
        call()
    except (InputError, RunError, SystemExit, KeyboardInterrupt) as error:
        return [type(error).__name__, str(error)]
    return []


def failures(world: World) -> dict:
    """What this process raises where an error is met by one process, by several, or by all."""

    def fail(ranks: Sequence[int], error: Exception) -> None:
        with world.agreed():
            if world.rank in ranks:
                raise error

    def diverge() -> None:
        make_trainer("Progtuning", world, lr=1e300, warmup=0.0, max_grad_norm=0.0).fit()

    def predict_nothing() -> None:
        model = tiny_model()
        model.classifier.bias.data.fill_(float("nan"))
        predict(model, rows(), 40, CPU, world=world)

    return {
        "none": failure(lambda: fail([], InputError())),
        "the second": failure(lambda: fail([1], InputError("only there"))),
        "a disk": failure(lambda: fail([1], OSError("no space left"))),
        "the first": failure(lambda: fail([0], RunError("only here"))),
        "a loss": failure(diverge),
        "an output": failure(predict_nothing),
        "fetched": world.first_alone(lambda: f"by {world.rank}"),
    }


RUN = TrainConfig(
    epochs=3, batch_size=30, accumulation_steps=2, lr=1e-3, cache="memory", hidden_dropout_prob=0.2, evaluate="end"
)


def tune(model: Path, data: Path, output: Path, world: World, **options) -> None:
    """Fine-tune a model folder on a data folder."""
    splits = load_splits("classification", str(data))
    fine_tune("tiny", model, splits, RUN, CPU, output, checkpoints=CheckpointConfig(**options), world=world)


def stop_and_resume(model: Path, data: Path, folder: Path, world: World) -> list:
    """Run once through, and once stopped by a signal that the last process gets in the second stage, and resumed.

    Return what stopped it.
    """
    tune(model, data, folder / "through", world, save_every=4)
    original = Trainer.update

    def update(self, loss):
        original(self, loss)
        if world.rank == world.size - 1 and self.step == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.update = update
    stopped = failure(lambda: tune(model, data, folder / "stopped", world, save_every=4))
    Trainer.update = original
    tune(model, data, folder / "stopped", world, save_every=4, resume=True)
    return stopped


def main() -> None:
    folder, model, data = map(Path, sys.argv[1:])
    gc.freeze()  # the search for garbage at each change of stage passes over what the imports made
    with join() as world:
        found = world.gather(failures(world) | {"stopped": stop_and_resume(model, data, folder, world)})
        if world.is_main:
            write_json(folder / "failures.json", found)
        for case in CASES:
            weights, results = train(case, world)
            results = world.gather(results)
            if world.is_main:
                save_file(weights, folder / f"{case}.safetensors")
                write_json(folder / f"{case}.json", results)


if __name__ == "__main__":
    main()
