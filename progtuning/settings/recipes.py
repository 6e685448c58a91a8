"""The settings that a method's authors trained with (`--recipe paper`), and those of the paper by task."""

from collections.abc import Mapping
from math import ceil

from progtuning.base.errors import InputError

# Progtuning's own epochs on SQuAD (Table 2), of one stage each.
TASK_DEFAULTS = {"squad": {"epochs": 3}, "squad_v2": {"epochs": 2}}

# How Progtuning trains E (arXiv 2506.21119, Section 3: with every stage), under whatever method: in the ablations
# whose stages never or late train block 1 too. A method that trains something in E then leaves no backward pass to cut.
_PROGTUNING = {"embeddings": "always"}

# How a method trains is its authors'. Devlin et al. 2019 (arXiv 1810.04805): Section 4.1 gives GLUE's batch, epochs and
# learning rates (the best of four), 4.2 and 4.3 SQuAD's. The rest is google-research/bert: run_classifier.py,
# run_squad.py, and epsilon in optimization.py, whose Adam corrects no bias of its moments, and whose rate falls from
# the first step on, so that it is 0.9 of the peak where the warm-up ends; here both are as in transformers.
_BERT = {"warmup": 0.1, "weight_decay": 0.01, "adam_epsilon": 1e-6, **_PROGTUNING}
_BERT_GLUE = {"lr": 2e-5, "epochs": 3, "batch_size": 32, "max_length": 128, **_BERT}
_BERT_SQUAD = {
    "squad": {"lr": 5e-5, "epochs": 3, "batch_size": 32, "max_length": 384, **_BERT},
    "squad_v2": {"lr": 5e-5, "epochs": 2, "batch_size": 48, "max_length": 384, **_BERT},
}

# Houlsby et al. 2019 (arXiv 1902.00751): google-research/adapter-bert has batch, rate and epochs in the example of its
# README.md, decay and epsilon in optimization.py, GELU by tanh and the deviation at the start in modeling.py. Its
# bottleneck is of 64, and every LayerNorm trains, E's too. The recipe has instead what Progtuning's Table 3 counts, so
# that a run can be held against it: bottlenecks of 48 (a sixteenth of BERT-base's 768), no LayerNorm, and so nothing in
# E, and a backward pass that is cut. The table counts 16 epochs (MNLI, QNLI and QQP: 20), the example has 5: compare by
# the epoch, or give --epochs.
_ADAPTER = {
    **_BERT_GLUE,
    "lr": 3e-4,
    "epochs": 5,
    "adapter_size": 48,
    "adapter_layer_norms": False,
    "adapter_activation": "gelu_new",
    "adapter_init_std": 1e-3,
}

# Ben Zaken et al. 2022 (arXiv 2106.10199): benzakenelad/BitFit, the defaults of run_glue.py, and of glue_evaluator.py a
# constant rate, and transformers 4.2.1's AdamW as it comes: no decay, and this epsilon. (Progtuning names a linear
# decay for its ablations, and for BitFit says only that it keeps to the original.) Its Table 3 counts 8 epochs (MNLI,
# QNLI and QQP: 10), not these 16: compare by the epoch, or give --epochs.
_BITFIT = {
    "lr": 1e-3,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "epochs": 16,
    "batch_size": 8,
    "max_length": 128,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-6,
    **_PROGTUNING,
}

# Hu et al. 2021 (arXiv 2106.09685): microsoft/LoRA, examples/NLU/roberta_base_*.sh, which agree with the paper's Table
# 9 but for alpha (8 there). The batch of both, 16 or 32, is a GPU's, and the scripts start 8 GPUs, for CoLA 2 (the
# README beside them speaks of 4). Here it is what an optimizer step saw; --accumulation-steps makes it fit one GPU.
# Epochs are those that Progtuning's Table 3 counts. Theirs start MRPC, RTE and STS-B from the LoRA of MNLI; here every
# task starts afresh.
_LORA = {"lora_r": 8, "lora_alpha": 16.0, "max_length": 512, "warmup": 0.06, "weight_decay": 0.1, **_PROGTUNING}
_LORA_GLUE = {
    "mnli": {"lr": 5e-4, "epochs": 30, "batch_size": 8 * 16},
    "sst-2": {"lr": 5e-4, "epochs": 60, "batch_size": 8 * 16},
    "mrpc": {"lr": 4e-4, "epochs": 30, "batch_size": 8 * 16},
    "cola": {"lr": 4e-4, "epochs": 80, "batch_size": 2 * 32},
    "qnli": {"lr": 4e-4, "epochs": 25, "batch_size": 8 * 32},
    "qqp": {"lr": 5e-4, "epochs": 25, "batch_size": 8 * 16},
    "rte": {"lr": 5e-4, "epochs": 80, "batch_size": 8 * 32},
    "sts-b": {"lr": 4e-4, "epochs": 40, "batch_size": 8 * 16},
}

# Zhang et al. 2022 (arXiv 2211.01642): ZhangHaojie077/DPS, script/run_glue.sh, whose max_steps are 3 epochs; epsilon is
# the Trainer's, our default. script/run_trainer.py turns dropout off, but for dense in runs of 2,000 steps or more.
_DPS = {
    "lr": 2e-5,
    "epochs": 3,
    "batch_size": 16,
    "max_length": 128,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "dps_p": 0.3,
    "dps_update_ratio": 0.05,
    **_PROGTUNING,
}
_DPS_DENSE_DROPS_OUT_FROM = 2000  # optimizer steps


def recipe(method: str, task: str, dps: str = "off", num_rows: int = 0, given: Mapping | None = None) -> dict:
    """Return what `--recipe paper` sets: the values that a method's authors trained with, by field of the settings.

    The keys are fields of TrainConfig and PeftConfig, `dps_` and a field of DPSConfig, and the two dropouts of
    BertConfig. `method` is one of PEFT_METHODS, `task` the name of a task, `dps` one of DPS_MODES. What trains is what
    the tables of Progtuning count. Dropout under DPS depends on the optimizer steps over `num_rows` training rows, with
    the epochs and batch size of `given` (fields of TrainConfig) before the recipe's. Raises InputError where the
    authors give no values; it says for what they do.
    """
    if dps != "off" and task not in _BERT_SQUAD:
        run = {**_DPS, **(given or {})}
        num_steps = run["epochs"] * ceil(num_rows / max(1, run["batch_size"]))
        dropout = 0.1 if dps == "dense" and num_steps >= _DPS_DENSE_DROPS_OUT_FROM else 0.0
        return {**_DPS, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if dps == "off" and method == "none":
        return dict(_BERT_SQUAD.get(task, _BERT_GLUE))
    if dps == "off" and method == "lora" and task in _LORA_GLUE:
        return {**_LORA, **_LORA_GLUE[task]}
    if dps == "off" and method in ("adapter", "bitfit") and task not in _BERT_SQUAD:
        return dict(_ADAPTER if method == "adapter" else _BITFIT)
    got = f"--peft {method}" if dps == "off" else f"--dps {dps}"
    raise InputError(
        "--recipe paper has values for --peft none on every task, for adapter, bitfit and --dps on all but SQuAD, "
        f"and for lora on {', '.join(_LORA_GLUE)}; it has none for {got} on {task}"
    )
