"""What a run reads, how it trains, and when it is saved: its options, one line each. No torch."""

import json
import math
import re
from dataclasses import dataclass
from fractions import Fraction

from progtuning.base.errors import InputError
from progtuning.settings.options import Options, option
from progtuning.settings.peft import PeftConfig
from progtuning.stages import EMBEDDING_POLICIES, SCHEDULES

DPS_MODES = ("off", "dense", "mix")
PRECISIONS = ("fp32", "bf16")
CACHES = ("off", "memory", "disk", "device")
LR_SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class DataConfig(Options):
    """Which rows and columns of one's own data are read. Raises InputError that names the option that is wrong."""

    text_column: str | None = option(None, "your files: the column of the text (text)")
    pair_column: str | None = option(None, "your files: that of a second text (text_pair, if there is one)")
    label_column: str | None = option(None, "your files: that of the label (label)")
    train_split: str | None = option(None, "your files: name of the file, or the Hub's split, to train on (train)")
    dev_split: str | None = option(None, "your files: the same of the held-out rows (dev or validation)")
    dev_share: float | None = option(
        None, "hold out this share of the training rows, class by class (0.2 of one file)", at_least=0, at_most=1
    )
    split_seed: int = option(
        0, "seed of what --dev-share draws; evaluate has both from the run", at_least=0, at_most=2**63 - 1
    )

    def __post_init__(self):
        super().__post_init__()
        columns = self.columns.values()
        if len(set(columns)) < len(columns):
            raise InputError(f"--text-column, --pair-column and --label-column must differ, got {', '.join(columns)}")
        for name in ("train_split", "dev_split"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"\w[\w.-]*", value):
                raise InputError(
                    f"--{name.replace('_', '-')} must be a name of letters, digits, . and -, got {value!r}"
                )
        if self.dev_share is not None and self.dev_split is not None:
            raise InputError("--dev-share and --dev-split exclude each other: give one of them")

    @property
    def names_columns(self) -> bool:
        return not (self.text_column is self.pair_column is self.label_column is None)

    @property
    def columns(self) -> dict[str, str]:
        """The column of the file for each key of a row."""
        own = {"text": self.text_column, "text_pair": self.pair_column, "label": self.label_column}
        return {key: key if column is None else column for key, column in own.items()}


@dataclass(frozen=True)
class DPSConfig(Options):
    """Gradient-chosen subnetworks (Zhang et al. 2022). Raises InputError that names the option that is out of range."""

    mode: str = option("off", "gradient-chosen subnetworks: {choices}", name="dps", choices=DPS_MODES)
    p: float = option(
        0.3,
        "share of each matrix that a subnetwork leaves out",
        name="dps-p",
        at_least=0,
        at_most=1,
        beside=("mode", DPS_MODES[1:]),
    )
    update_ratio: float = option(
        0.05,
        "length of a window, as a share of all steps",
        name="dps-update-ratio",
        at_least=0,
        at_most=1,
        beside=("mode", DPS_MODES[1:]),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.p == 1:
            raise InputError("--dps-p must be less than 1, the share that would leave nothing to train")
        if self.update_ratio == 0:
            raise InputError("--dps-update-ratio must be more than 0, got 0")


@dataclass(frozen=True)
class SquadConfig(Options):
    """How questions and contexts become windows, and logits become answers; the values of google-research/bert's
    run_squad.py, but for the stride, which is counted as in transformers' run_qa.py. Raises InputError that names the
    option that is out of range.
    """

    doc_stride: int = option(128, "SQuAD: tokens by which the windows of a context overlap", at_least=0, at_most=1000)
    max_query_length: int = option(64, "SQuAD: tokens kept of a question", at_least=1, at_most=1000)
    max_answer_length: int = option(30, "SQuAD: tokens of the longest answer", at_least=1, at_most=1000)
    n_best: int = option(20, "SQuAD: answers kept for each question", at_least=1, at_most=1000)
    # None: 0 for squad_v2, else there always is one
    null_threshold: float | None = option(
        None, "SQuAD v2.0: odds above which there is no answer (0)", at_least=-1e9, at_most=1e9
    )


@dataclass(frozen=True)
class ScheduleKind:
    """What the settings of a run must know of a schedule before it is built (`methods.schedules.build_schedule`)."""

    stages_an_epoch: int = 1
    fewest_stages: int = 1
    prefix_drops_out: bool = True
    is_planned: bool = True  # what trains in which step is known before the run


SCHEDULE_KINDS = {
    **dict.fromkeys(SCHEDULES, ScheduleKind()),
    "adaptive": ScheduleKind(stages_an_epoch=5, fewest_stages=3, prefix_drops_out=False, is_planned=False),
}


@dataclass(frozen=True)
class TrainConfig(Options):
    """How a run trains. Raises InputError that names the command-line option where a value is out of range."""

    schedule: str = option("shrinking", "{choices}", choices=tuple(SCHEDULE_KINDS))
    stages: int | None = option(  # T
        None, "stages (one an epoch); of adaptive, intervals (five an epoch)", at_least=1, at_most=100_000
    )
    calendar: str | None = option(
        None, "instead of a schedule, blocks frozen, or with their shares of the steps: 4, or 0:2,4:1,8:1"
    )
    budget: float | None = option(
        None, "as many steps as cost this share of full fine-tuning's FLOPs over --epochs", at_least=1e-9, at_most=1e6
    )
    freeze_percentile: float = option(
        50.0,
        "of the scores of adaptive: lower ones freeze, from below",
        at_least=0,
        at_most=100,
        beside=("schedule", ("adaptive",)),
    )
    embeddings: str = option("with-block-1", "when E trains: {choices}", choices=EMBEDDING_POLICIES)
    epochs: int = option(3, "passes over the training rows", at_least=1, at_most=100_000)
    # Of evaluation too, where --batch-tokens does not count.
    batch_size: int = option(32, "examples an optimizer step", at_least=1, at_most=2**24)
    batch_tokens: int | None = option(  # rows times longest row of a batch, at most
        None, "instead, tokens an optimizer step, padding included", at_least=1, at_most=2**24
    )
    accumulation_steps: int = option(  # the update is the same
        1, "pieces that a batch is processed in, to save memory", at_least=1, at_most=2**24
    )
    lr: float = option(2e-5, "peak learning rate", at_least=0)
    lr_schedule: str = option("linear", "linear, which falls to 0 after the warm-up, or constant", choices=LR_SCHEDULES)
    lr_decay: float = option(
        1.0, "learning rate of a block, of that of the one above; E's of the lowest block's", at_least=1e-6, at_most=1
    )
    weight_decay: float = option(0.01, "AdamW's decay of weights, not of biases and LayerNorms", at_least=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", at_least=1e-30)  # 0 divides 0 by 0
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", at_least=0, at_most=1)
    max_grad_norm: float = option(1.0, "clip the gradient's norm; 0 does not", at_least=0)
    max_length: int | None = option(
        None, "tokens a sequence (128, of SQuAD 384, or what the model takes)", at_least=1, at_most=2**24
    )
    precision: str = option("fp32", "{choices}", choices=PRECISIONS)  # bf16: autocast
    compile: bool = option(False, "compile each block with torch.compile")
    cuda_graphs: bool = option(False, "record the blocks as CUDA graphs: where a GPU waits for the host")
    unpadded: bool = option(False, "run the blocks without padding, but for attention: where padding is much")
    checkpoint_activations: bool = option(
        False, "keep of each block its input alone and run it again in the backward pass: less memory, more time"
    )
    hidden_dropout_prob: float | None = option(None, "dropout (the model's own)", at_least=0, at_most=1)
    attention_probs_dropout_prob: float | None = option(
        None, "dropout of attention (the model's own)", at_least=0, at_most=1
    )
    # Below the cut. A cache needs it off, and "adaptive" has it so (AutoFreeze).
    prefix_dropout: bool | None = option(None, "dropout in the frozen blocks (true; false with --cache or adaptive)")
    cache: str = option("off", "keep the output of the frozen blocks for each example: {choices}", choices=CACHES)
    cache_dtype: str = option(
        "fp32", "what the cache holds: {choices}", choices=PRECISIONS, beside=("cache", CACHES[1:])
    )
    cache_limit: int | None = option(  # bytes
        None,
        "largest cache, in GB or with a unit: 500MB (half of what is free)",
        at_least=1,
        is_text=True,
        beside=("cache", CACHES[1:]),
    )
    group_by_length: bool = option(True, "batches of like lengths")
    matmul_peak: float | None = option(  # TFLOP/s
        None,
        "the device's fastest matrix product, to say what share is reached (on CUDA measured)",
        metavar="TFLOPS",
        at_least=1e-6,
        at_most=1e6,
    )
    class_weights: str | None = option(
        None, "of classes in the loss: balanced (a class of few rows counts more), or a=1,b=3 (the others 1), or JSON"
    )
    label_smoothing: float = option(0.0, "share of a label that goes to all classes evenly", at_least=0, at_most=1)
    evaluate: str = option("epoch", "after every epoch, or at the end", choices=("epoch", "end"))
    keep: str = option("last", "weights to write, the {choices} evaluated", choices=("last", "best"))
    patience: int | None = option(
        None, "end the run after N evaluations in a row that were no better", metavar="N", at_least=1, at_most=100_000
    )
    skip_nonfinite: bool = option(False, "pass over batches whose loss or gradient is not finite")
    seed: int = option(42, "of the data order, what is drawn afresh, and dropout", at_least=0, at_most=2**63 - 1)
    peft: PeftConfig = PeftConfig()
    dps: DPSConfig = DPSConfig()
    squad: SquadConfig = SquadConfig()

    def __post_init__(self):
        super().__post_init__()
        self._check_calendar()
        if self.class_weights is not None:
            parse_class_weights(self.class_weights)
        self._check_cache()
        self._check_graphs()
        if self.evaluate == "end" and (self.keep == "best" or self.patience is not None):
            what = "--keep best" if self.keep == "best" else "--patience"
            raise InputError(f"{what} compares evaluations, and --evaluate end makes one: leave it out")
        if self.accumulation_steps > self.batch_size and self.batch_tokens is None:
            got = f"{self.accumulation_steps} and {self.batch_size}"
            raise InputError(f"--accumulation-steps must be at most --batch-size, got {got}")
        if self.num_stages < self.kind.fewest_stages:
            raise InputError(
                f"--schedule {self.schedule} freezes after two intervals that it compares: "
                f"--stages must be at least {self.kind.fewest_stages}, got {self.num_stages}"
            )
        if self.dps.mode != "off" and self.peft.method != "none":
            raise InputError(f"--dps masks weights that --peft {self.peft.method} freezes: give --peft none with it")

    def _check_calendar(self) -> None:
        if self.calendar is not None:
            parse_calendar(self.calendar)
            if self.schedule != TrainConfig.schedule or self.stages is not None:
                raise InputError("--calendar takes the place of --schedule and --stages: leave them out")
        if self.budget is not None and self.batch_tokens is not None:
            raise InputError("--budget counts the steps of batches of --batch-size: leave out --batch-tokens")

    def _check_cache(self) -> None:
        if self.prefix_dropout and self.cache != "off":
            raise InputError(
                f"--cache {self.cache} needs the same output of the frozen blocks in every epoch: "
                "leave out --prefix-dropout"
            )

    def _check_graphs(self) -> None:
        moving = {  # what makes another shape of each batch, or other work of each pass
            "--unpadded": self.unpadded,
            "--checkpoint-activations": self.checkpoint_activations,
            "--batch-tokens": self.batch_tokens is not None,
        }
        for name, is_given in moving.items():
            if self.cuda_graphs and is_given:
                raise InputError(
                    f"--cuda-graphs records passes that are alike, which {name} does not make: leave it out"
                )

    @property
    def kind(self) -> ScheduleKind:
        return ScheduleKind() if self.calendar is not None else SCHEDULE_KINDS[self.schedule]

    @property
    def named_schedule(self) -> str:
        """The option that says which schedule a run has."""
        return f"--schedule {self.schedule}" if self.calendar is None else f"--calendar {self.calendar}"

    @property
    def drops_out_prefix(self) -> bool:
        """Whether the blocks below the cut drop out too."""
        if self.prefix_dropout is not None:
            return self.prefix_dropout
        return self.cache == "off" and self.kind.prefix_drops_out

    @property
    def num_stages(self) -> int:
        if self.stages is not None:
            return self.stages
        return self.kind.stages_an_epoch * self.epochs


def parse_calendar(text: str) -> list[tuple[int, int]]:
    """Return (frozen blocks, share of the optimizer steps) of each stage of a calendar. Raises InputError.

    >>> parse_calendar("4"), parse_calendar("0:0.5,8:1")
    ([(4, 1)], [(0, 1), (8, 2)])
    """
    stages = [
        re.fullmatch(r"(\d{1,4})(?::(\d{1,9}(?:\.\d{1,9})?))?", part.strip(), re.ASCII) for part in text.split(",")
    ]
    if not all(stages) or len(stages) > 1 and not all(stage[2] for stage in stages):
        raise InputError(
            f"--calendar must be frozen blocks (4), or pairs of them and a share (0:2,4:1,8:1), got {text!r}"
        )
    shares = [Fraction(stage[2] or 1) for stage in stages]
    if not all(shares):
        raise InputError(f"--calendar must give each stage a share above 0, got {text!r}")
    common = math.lcm(*(share.denominator for share in shares))
    return [(int(stage[1]), int(share * common)) for stage, share in zip(stages, shares)]


def parse_class_weights(text: str) -> dict[str, float] | None:
    """Return the weights by class name, None for "balanced". Raises InputError.

    >>> parse_class_weights("yes=3, no=0.5"), parse_class_weights('{"a=b": 2}')
    ({'yes': 3.0, 'no': 0.5}, {'a=b': 2.0})
    """
    if text == "balanced":
        return None
    try:
        is_json = text.lstrip().startswith("{")
        pairs = json.loads(text, object_pairs_hook=list) if is_json else [part.split("=") for part in text.split(",")]
        weights = {name.strip(): float(weight) for name, weight in pairs}
        if len(weights) < len(pairs) or not all(0 < weight < 1e6 for weight in weights.values()):
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(
            "--class-weights must be balanced, or CLASS=WEIGHT,CLASS=WEIGHT or a JSON object of weights above 0, each "
            f"class once, got {text!r}"
        ) from None
    return weights


def parse_size(option: str, text: str) -> int:
    """Return the bytes that `text` says: a number of GB, or one with a unit, as 500MB or 2GiB. Raises InputError.

    >>> parse_size("--cache-limit", "1.5"), parse_size("--cache-limit", "2 GiB")
    (1500000000, 2147483648)
    """
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?)B)?", text.strip(), re.ASCII)
    if not found:
        raise InputError(f"{option} must be a number of GB, or one with a unit (500MB, 2GiB), got {text!r}")
    number, letter, binary = found.groups()
    if not Fraction(number):
        raise InputError(f"{option} must be more than 0, got {text!r}")
    return int(Fraction(number) * (1024 if binary else 1000) ** " KMGT".index(letter or "G"))


@dataclass(frozen=True)
class CheckpointConfig(Options):
    """When a run is saved, so that it can be resumed. Raises InputError that names the option that is out of range."""

    save_every: int | None = option(  # None: only where a signal stops the run
        None, "save the run every N optimizer steps and at each stage's end", metavar="N", at_least=1
    )
    keep: int = option(2, "keep the last K of them", name="keep-checkpoints", metavar="K", at_least=1)
    resume: bool = option(False, "go on from the last checkpoint in --output-dir", is_flag=True)
