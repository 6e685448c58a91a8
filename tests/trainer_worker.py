"""The README's callback under transformers' Trainer: a run of it, and what each process of a launch of two runs.

python -m torch.distributed.run --nproc-per-node 2 -m tests.trainer_worker FOLDER
"""

import os
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F

from progtuning.base.files import write_json

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCK = next(
    block for block in re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S) if "TrainerCallback" in block
)
STEPS, BATCH = 18, 8  # three epochs of 48 rows
CASES = {
    "in pieces": {"gradient_accumulation_steps": 2},
    "growing, in pieces": {"schedule": "growing", "gradient_accumulation_steps": 2},
    "checkpointed": {"activation_checkpointing": True, "ddp_find_unused_parameters": True},
}
REFUSED = {
    "unused parameters are not looked for": {"ddp_find_unused_parameters": False},
    "a static graph": {"ddp_static_graph": True},
}


def callback(schedule: str = "shrinking") -> type:
    """Return the README's class, with another schedule in it."""
    names = {}
    exec(BLOCK.replace('"shrinking"', f'"{schedule}"'), names)
    return names["Stages"]


def build(dropout: float = 0.0) -> torch.nn.Module:
    """A random DeBERTa-v2 of 4 blocks, in double precision, so that AdamW does not divide rounding errors."""
    torch.manual_seed(0)
    relative = {"relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
    relative |= {"pos_att_type": ["c2p", "p2c"], "share_att_key": True, "position_biased_input": False}
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"), dropout)
    config = transformers.DebertaV2Config(
        vocab_size=40, num_labels=3, pad_token_id=0, initializer_range=0.3, **relative, **sizes, **drops
    )
    return transformers.DebertaV2ForSequenceClassification(config).double()


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (STEPS // 3 * BATCH, 7), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 3} for i, row in enumerate(ids)]


def mean_loss(outputs, labels: torch.Tensor, num_items_in_batch: int) -> torch.Tensor:
    """The part that some rows have in the mean over a batch, of which they may be a piece."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class Watch(transformers.TrainerCallback):
    """Notes which parameters have a gradient in each step."""

    def __init__(self):
        self.trained = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.trained.append([name for name, parameter in model.named_parameters() if parameter.grad is not None])


def make_trainer(
    folder: Path, model: torch.nn.Module, *callbacks, pieces: int = 1, **arguments
) -> transformers.Trainer:
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "num_train_epochs": 3, "save_strategy": "no"} | arguments
    size = BATCH // pieces // int(os.environ.get("WORLD_SIZE", 1))
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    settings = transformers.TrainingArguments(folder, per_device_train_batch_size=size, **quiet | settings)
    return transformers.Trainer(
        model, settings, train_dataset=rows(), callbacks=list(callbacks), compute_loss_func=mean_loss
    )


def train(folder: Path, case: dict) -> tuple[dict[str, torch.Tensor], list]:
    """Run a case; return the weights, and the names of what had a gradient in each step."""
    case, model, watch = dict(case), build(), Watch()
    stages = callback(case.pop("schedule", "shrinking"))
    make_trainer(folder, model, stages, watch, pieces=case.get("gradient_accumulation_steps", 1), **case).train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, watch.trained


def main() -> None:
    folder, rank, refused = Path(sys.argv[1]), os.environ["RANK"], {}
    for case, arguments in CASES.items():
        weights, trained = train(folder, arguments)
        save_file(weights, folder / f"{case}.{rank}.safetensors")
        write_json(folder / f"{case}.{rank}.json", trained)
    for case, arguments in REFUSED.items():
        try:
            train(folder, arguments)
        except RuntimeError as error:
            refused[case] = str(error)
    write_json(folder / f"refused.{rank}.json", refused)


if __name__ == "__main__":
    main()
