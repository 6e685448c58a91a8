"""What a stage costs, in closed form: parameters, FLOPs and bytes of M = E . B1 ... BL . H, without building the model.

    B  batch    S  length    N = B * S  tokens    D  hidden_size    H  heads    F  intermediate_size    C  num_outputs
    r  lora_r   A  adapter_size

Updated parameters (Progtuning, arXiv 2506.21119, Section 4.1): those that train in an epoch, summed over the epochs.

FLOPs are those of matrix products, 2 a multiply-add, with attention as two products ("math" attention). A product
Y = X W of an (m, k) and a (k, n) matrix costs

    forward                  Y  = X W          2 m k n
    gradient of its input    dX = dY W^T       2 m k n    where something that trains lies at or below X
    gradient of its weight   dW = X^T dY       2 m k n    where W trains

and Q K^T and P V likewise, with an activation on either side. The products of one block, from below:

    name                          times     m     k     n
    attention.self.query              1     N     D     D
    attention.self.key                1     N     D     D
    attention.self.value              1     N     D     D
    Q K^T                           B H     S   D/H     S
    P V                             B H     S     S   D/H
    attention.output.dense            1     N     D     D
    intermediate.dense                1     N     D     F
    output.dense                      1     N     F     D
    LoRA beside any of these linear layers, of shape k by n: lora_A 1, N, k, r and lora_B 1, N, r, n
    adapters after either output.dense: adapter.down 1, N, D, A and adapter.up 1, N, A, D
    where E is narrower than D: embeddings.project 1, N, embedding_size, D

Where the activations of a block are checkpointed (torch.utils.checkpoint), autograd keeps its input alone, and the
backward pass runs the products of each block that it crosses forward once more.

What needs a gradient is not written down for each method and stage but derived: `_Trace` runs the model over symbols,
in bert.py's order, and passes on from each operation to the next whether autograd would track its result, as the name
of the lowest parameter for whose sake it would. So the lowest active block needs no input gradient for its query, key
and value; with LoRA on query and value alone it needs none for K either; and blocks below the boundary cost input
gradients exactly where E trains beneath them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from math import prod

from progtuning.base.checks import check_choice, check_number
from progtuning.model.config import HEADS, BertConfig
from progtuning.model.names import BLOCK_LINEARS, EMBEDDINGS, HEAD, prefix_of
from progtuning.settings.peft import PeftConfig
from progtuning.stages import Schedule, Stage

ITEMSIZE = {"fp32": 4, "bf16": 2}  # bytes an element of a cache, by --cache-dtype
_FP32 = ITEMSIZE["fp32"]
PLAIN = PeftConfig()


# Parameters


@dataclass(frozen=True)
class Unit:
    """E, one block or H: the shapes of its parameters by name, and the names of those that train."""

    prefix: str  # of the names in the whole model: "embeddings.", "encoder.layer.0.", "" for H
    shapes: Mapping[str, tuple[int, ...]]
    trainable: frozenset[str]

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def num_trainable(self) -> int:
        return sum(prod(self.shapes[name]) for name in self.trainable)

    def first_trained(self, *names: str) -> str:
        """Return the first of these parameters that trains, by its name in the whole model; "" where none does."""
        return next((self.prefix + name for name in names if name in self.trainable), "")


@dataclass(frozen=True)
class Units:
    """E, B1 .. BL and H, with what a method trains (from `units`) or what it trains in one stage (from `during`)."""

    embeddings: Unit
    blocks: tuple[Unit, ...]
    head: Unit

    def __iter__(self):
        return iter((self.embeddings, *self.blocks, self.head))

    @property
    def num_parameters(self) -> int:
        return sum(unit.num_parameters for unit in self)

    @property
    def num_trainable(self) -> int:
        return sum(unit.num_trainable for unit in self)

    @property
    def trainable(self) -> set[str]:
        """The names, in the whole model, of the parameters that train."""
        return {unit.prefix + name for unit in self for name in unit.trainable}

    def during(self, stage: Stage) -> "Units":
        """Freeze what `stage` does not train. Raises ValueError for a stage of another number of blocks."""
        if stage.num_blocks != len(self.blocks):
            raise ValueError(f"stage must be of {len(self.blocks)} blocks, got one of {stage.num_blocks}")
        return Units(
            self.embeddings if stage.embeddings else _frozen(self.embeddings),
            tuple(unit if index in stage.blocks else _frozen(unit) for index, unit in enumerate(self.blocks)),
            self.head,
        )

    def training(self, names: Collection[str]) -> "Units":
        """Train exactly the parameters `names`, as the whole model has them."""
        embeddings, *blocks, head = (
            replace(unit, trainable=frozenset(name for name in unit.shapes if unit.prefix + name in names))
            for unit in self
        )
        return Units(embeddings, tuple(blocks), head)

    def active_blocks(self) -> list[int] | None:
        """Return the first and last block that train, counted from 1, or None."""
        numbers = [number for number, unit in enumerate(self.blocks, start=1) if unit.trainable]
        return [numbers[0], numbers[-1]] if numbers else None

    def cut(self) -> int | None:
        """Return how many blocks lie below the lowest that trains, run without grad; None where E trains: no cut."""
        if self.embeddings.trainable:
            return None
        return next((index for index, unit in enumerate(self.blocks) if unit.trainable), len(self.blocks))


def _frozen(unit: Unit) -> Unit:
    return replace(unit, trainable=frozenset())


def units(config: BertConfig, peft: PeftConfig = PLAIN) -> Units:
    """Return every unit of the model under a fine-tuning method, with the parameters that the method trains or adds.

    The names are those of bert.py, and so of Hugging Face checkpoints; a wrapped layer keeps its name and gains
    lora_A and lora_B, or adapter.down and adapter.up. Raises InputError where the method does not fit the
    architecture.
    """
    num_blocks = config.num_hidden_layers
    blocks = (_unit(index, _block_shapes(config, peft, index), peft, num_blocks) for index in range(num_blocks))
    return Units(
        _unit(EMBEDDINGS, _embedding_shapes(config), peft, num_blocks),
        tuple(blocks),
        _unit(HEAD, _head_shapes(config), peft, num_blocks),
    )


def _unit(unit: int | str, shapes: Mapping[str, tuple[int, ...]], peft: PeftConfig, num_blocks: int) -> Unit:
    prefix = prefix_of(unit)
    return Unit(prefix, shapes, frozenset(name for name in shapes if peft.trains(prefix + name, num_blocks)))


def _embedding_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    d, width = config.hidden_size, config.embedding_width
    types = {"token_type_embeddings.weight": (config.type_vocab_size, width)} if config.type_vocab_size else {}
    project = {"project.weight": (d, width), "project.bias": (d,)} if width != d else {}
    return {
        "word_embeddings.weight": (config.vocab_size, width),
        "position_embeddings.weight": (config.max_position_embeddings, width),
        **types,
        "LayerNorm.weight": (width,),
        "LayerNorm.bias": (width,),
        **project,
    }


def _block_shapes(config: BertConfig, peft: PeftConfig, index: int) -> dict[str, tuple[int, ...]]:
    d, f = config.hidden_size, config.intermediate_size
    shapes = {}
    for target, name in BLOCK_LINEARS.items():
        n_out, n_in = {"intermediate": (f, d), "output": (d, f)}.get(target, (d, d))
        shapes |= {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
        shapes |= peft.adds(target, n_out, n_in, index, config.num_hidden_layers)
    for name in ("attention.output", "output"):
        shapes |= {f"{name}.LayerNorm.weight": (d,), f"{name}.LayerNorm.bias": (d,)}
    return shapes


def _head_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    d, c = config.hidden_size, config.num_outputs
    if config.head is None:
        layers = {}
    elif HEADS[config.head].per_token:
        layers = {HEADS[config.head].layer: (c, d)}
    elif config.has_pooler:
        layers = {"pooler.dense": (d, d), "classifier": (c, d)}
    else:
        layers = {"classifier.dense": (d, d), "classifier.out_proj": (c, d)}
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def trainable_parameters(config: BertConfig, stage: Stage, peft: PeftConfig = PLAIN) -> int:
    """Return the number of parameters that train in `stage`."""
    return units(config, peft).during(stage).num_trainable


def updated_parameters(config: BertConfig, schedule: Schedule, num_epochs: int, peft: PeftConfig = PLAIN) -> int:
    """Return the updated parameters (Section 4.1) of a run: a stage counts for its share of the epochs, of equal ones
    for num_epochs / T.

    Rounded to the nearest integer where that is not whole.
    """
    check_number("--epochs", num_epochs, int, low=1)
    return sum(planned_updates(units(config, peft), schedule, num_epochs))


def updated_by_stage(stages: Iterable[tuple[int, Fraction]]) -> list[int]:
    """Return the updated parameters (Section 4.1) of stages, given how many parameters train in each and how long,
    in epochs.

    A stage of a plan is num_epochs / T epochs long, one of a run as many as its steps make: the two are equal where the
    run's steps divide evenly among the stages. Where they do not, a run's stages are a step longer or shorter, and so
    are its updated parameters; a plan, made without data, knows no number of steps.

    The sums up to each stage are rounded, not each stage, so that the stages add up to the rounded total.
    """
    so_far, counts = Fraction(0), []
    for num_trainable, epochs in stages:
        before, so_far = so_far, so_far + epochs * num_trainable
        counts.append(round(so_far) - round(before))
    return counts


def planned_updates(model: Units, schedule: Schedule, num_epochs: int | Fraction) -> list[int]:
    epochs = (Fraction(num_epochs * share, sum(schedule.shares)) for share in schedule.shares)
    stages = zip(schedule.planned, epochs, strict=True)
    return updated_by_stage((model.during(stage).num_trainable, length) for (stage, _), length in stages)


# FLOPs


@dataclass(frozen=True)
class Matmul:
    """`count` products Y = X W of an (m, k) and a (k, n) matrix, and which of their gradients are computed."""

    name: str
    count: int
    m: int
    k: int
    n: int
    # Each is the lowest parameter for whose sake the gradient is computed, "" where it is not.
    input_grad: str  # dX = dY W^T
    weight_grad: str  # dW = X^T dY; of the right-hand activation in Q K^T and P V

    @property
    def forward_flops(self) -> int:
        return 2 * self.count * self.m * self.k * self.n

    @property
    def backward_flops(self) -> int:
        return self.forward_flops * (bool(self.input_grad) + bool(self.weight_grad))


@dataclass(eq=False)
class _Symbol:
    """A tensor of the forward pass."""

    size: int  # elements
    grad: str  # the lowest parameter for whose sake autograd tracks it, "" where it does not
    base: "_Symbol | None" = None  # the tensor whose memory this one is a view of
    itemsize: int = _FP32


@dataclass(frozen=True)
class Kernels:
    """What a device and its kernels keep for the backward pass, and whether blocks are checkpointed."""

    itemsize: int = _FP32  # of what matrix products take and give: 2 under bf16 autocast, which also holds cast weights
    mask_itemsize: int = _FP32  # of dropout's masks: floats on a CPU, bools on CUDA
    fused: bool = False  # attention keeps Q, K, V, its result and a log-sum-exp a query, not the probabilities
    checkpointed: bool = False  # --checkpoint-activations


ON_CPU = Kernels()  # math attention, as PyTorch takes where attention drops out
ON_CUDA = {"fp32": Kernels(mask_itemsize=1, fused=True), "bf16": Kernels(itemsize=2, mask_itemsize=1, fused=True)}


class _Trace:
    """A forward pass over symbols. It notes every matrix product, and what autograd keeps for the backward pass."""

    def __init__(self, config: BertConfig, peft: PeftConfig, batch: int, length: int, kernels: Kernels = ON_CPU):
        self.config, self.peft, self.batch, self.length, self.kernels = config, peft, batch, length, kernels
        self.matmuls: list[Matmul] = []
        self.kept: dict[_Symbol, int] = {}  # bytes, of whole tensors
        self.ends: list[int] = []  # how many of `kept` there are after E and after each block
        self.again: list[Matmul] = []  # those that the backward pass runs forward once more
        self.kept_again = 0  # bytes that the largest checkpointed block keeps while it runs again

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs of the forward and of the backward pass."""
        backward = sum(one.backward_flops for one in self.matmuls) + sum(one.forward_flops for one in self.again)
        return sum(one.forward_flops for one in self.matmuls), backward

    @property
    def kept_bytes(self) -> int:
        """The most that autograd holds at a time."""
        return sum(self.kept.values()) + self.kept_again

    @property
    def working_bytes(self) -> int:
        tokens, workspaces = self.batch * self.length, 64 * 2**20 if self.kernels.fused else 0
        widened = 2 * self.config.intermediate_size * self.kernels.itemsize
        return tokens * (widened + 6 * self.config.hidden_size * _FP32) + workspaces

    @property
    def kept_by_unit(self) -> list[int]:
        """Bytes that autograd keeps in E, each block and H. A tensor that two units need is counted in the lower."""
        sizes = list(self.kept.values())
        return [sum(sizes[begin:end]) for begin, end in pairwise([0, *self.ends, len(sizes)])]

    def model(self, model: Units) -> "_Trace":
        self.head(model.head, self.prefix(model.embeddings, model.blocks))
        return self

    def prefix(self, embeddings: Unit, blocks: Iterable[Unit]) -> _Symbol:
        x = self.embeddings(embeddings)
        self.ends.append(len(self.kept))
        for unit in blocks:
            x = self.checkpointed_block(unit, x) if self.kernels.checkpointed else self.block(unit, x)
            self.ends.append(len(self.kept))
        return x

    def embeddings(self, unit: Unit) -> _Symbol:
        tables = unit.first_trained(*(name for name in unit.shapes if name.endswith("_embeddings.weight")))
        x = _Symbol(self.batch * self.length * self.config.embedding_width, tables)  # look-ups multiply nothing
        x = self.dropout(self.layer_norm(unit, "LayerNorm", x), self.config.hidden_dropout_prob)
        return self.linear(unit, "project", x) if "project.weight" in unit.shapes else x

    def checkpointed_block(self, unit: Unit, x: _Symbol) -> _Symbol:
        kept, before = dict(self.kept), len(self.matmuls)
        y = self.block(unit, x)
        if y.grad:
            kept[x] = x.size * x.itemsize
            self.kept_again = max(self.kept_again, sum(size for one, size in self.kept.items() if one not in kept))
            self.kept = kept
            self.again += self.matmuls[before:]
        return y

    def block(self, unit: Unit, x: _Symbol) -> _Symbol:
        config, s = self.config, self.length
        heads = self.batch * config.num_attention_heads
        width = config.hidden_size // config.num_attention_heads
        query = self.linear(unit, "attention.self.query", x)
        key = self.linear(unit, "attention.self.key", x)
        value = self.linear(unit, "attention.self.value", x)
        scores = self.product(f"{unit.prefix}Q K^T", query, key, heads, s, width, s)
        if self.kernels.fused:
            context = self.product(f"{unit.prefix}P V", scores, value, heads, s, s, width)
            for one in (query, key, value, context, _Symbol(heads * s, "")):
                self.keep(one, context.grad)
        else:
            self.keep_factors(query, key)
            probabilities = self.dropout(self.elementwise("softmax", scores), config.attention_probs_dropout_prob)
            context = self.product(f"{unit.prefix}P V", probabilities, value, heads, s, s, width)
            self.keep_factors(probabilities, value)
        x = self.output(unit, "attention.output", context, x, config.attention_dropout_prob)
        widened = self.elementwise(config.hidden_act, self.linear(unit, "intermediate.dense", x))
        return self.output(unit, "output", widened, x, config.hidden_dropout_prob)

    def output(self, unit: Unit, name: str, x: _Symbol, residual: _Symbol, dropout_prob: float) -> _Symbol:
        x = self.dropout(self.linear(unit, f"{name}.dense", x), dropout_prob)
        if f"{name}.adapter.down.weight" in unit.shapes:
            down = self.linear(unit, f"{name}.adapter.down", x)
            up = self.linear(unit, f"{name}.adapter.up", self.elementwise(self.peft.adapter_activation, down))
            x = self.sum(x, up)
        return self.layer_norm(unit, f"{name}.LayerNorm", self.sum(x, residual))

    def head(self, unit: Unit, x: _Symbol) -> None:
        config, dropout = self.config, self.config.head_dropout_prob
        # Of each sequence its first token.
        first = _Symbol(self.batch * config.hidden_size, x.grad, base=x, itemsize=x.itemsize)
        if config.head is not None and HEADS[config.head].per_token:
            self.linear(unit, HEADS[config.head].layer, self.dropout(x, dropout))
        elif config.has_pooler:
            pooled = self.elementwise("tanh", self.linear(unit, "pooler.dense", first))
            self.linear(unit, "classifier", self.dropout(pooled, dropout))
        elif config.head is not None:
            first = self.dropout(first, dropout) if config.family.drops_out_head_input else first
            hidden = self.elementwise(config.family.head_act, self.linear(unit, "classifier.dense", first))
            self.linear(unit, "classifier.out_proj", self.dropout(hidden, dropout))

    def linear(self, unit: Unit, name: str, x: _Symbol) -> _Symbol:
        n, k = unit.shapes[f"{name}.weight"]
        weight = self.weight(n * k, unit.first_trained(f"{name}.weight"))
        taken = self.cast(x)
        y = self.product(unit.prefix + name, taken, weight, 1, x.size // k, k, n)
        self.keep_factors(taken, weight)
        y.grad = y.grad or unit.first_trained(f"{name}.bias")
        if f"{name}.lora_A.weight" in unit.shapes:  # W x + (alpha / r) B A x
            low = self.linear(unit, f"{name}.lora_A", self.dropout(x, self.peft.lora_dropout))
            up = self.linear(unit, f"{name}.lora_B", low)
            y.grad = y.grad or up.grad
        return y

    def product(self, name: str, x: _Symbol, w: _Symbol, count: int, m: int, k: int, n: int) -> _Symbol:
        self.matmuls.append(Matmul(name, count, m, k, n, input_grad=x.grad, weight_grad=w.grad))
        return _Symbol(count * m * n, x.grad or w.grad, itemsize=self.kernels.itemsize)

    def keep_factors(self, x: _Symbol, w: _Symbol) -> None:
        self.keep(w, x.grad)  # dX = dY W^T
        self.keep(x, w.grad)  # dW = X^T dY

    def elementwise(self, name: str, x: _Symbol) -> _Symbol:
        """A function whose derivative is taken from its result (softmax, tanh, relu) or from its input (gelu)."""
        y = _Symbol(x.size, x.grad, itemsize=x.itemsize)
        self.keep(x if name.startswith("gelu") else y, x.grad)
        return y

    def layer_norm(self, unit: Unit, name: str, x: _Symbol) -> _Symbol:
        y = _Symbol(x.size, x.grad or unit.first_trained(f"{name}.weight", f"{name}.bias"))
        self.keep(self.cast(x, _FP32), y.grad)
        (width,) = unit.shapes[f"{name}.weight"]
        self.keep(_Symbol(2 * x.size // width, ""), y.grad)  # a token's mean and 1 / deviation
        return y

    def dropout(self, x: _Symbol, probability: float) -> _Symbol:
        if probability == 0:
            return x
        self.keep(_Symbol(x.size, "", itemsize=self.kernels.mask_itemsize), x.grad)
        return _Symbol(x.size, x.grad, itemsize=x.itemsize)

    def weight(self, size: int, grad: str) -> _Symbol:
        """A weight as a product takes it: the parameter, whose bytes are counted as such, or its copy in bf16."""
        return _Symbol(0 if self.kernels.itemsize == _FP32 else size, grad, itemsize=self.kernels.itemsize)

    def sum(self, x: _Symbol, y: _Symbol) -> _Symbol:
        return _Symbol(x.size, x.grad or y.grad, itemsize=max(x.itemsize, y.itemsize))

    def cast(self, x: _Symbol, itemsize: int | None = None) -> _Symbol:
        """Autocast copies what an operation takes, each time anew, where it is not of its dtype."""
        itemsize = itemsize or self.kernels.itemsize
        return x if x.itemsize == itemsize else _Symbol(x.size, x.grad, itemsize=itemsize)

    def keep(self, x: _Symbol, needed: str) -> None:
        if needed:
            x = x.base or x
            self.kept[x] = x.size * x.itemsize


def run_trace(
    config: BertConfig, model: Units, peft: PeftConfig, batch: int, length: int, kernels: Kernels = ON_CPU
) -> _Trace:
    check_number("--batch-size", batch, int, low=1)
    check_number("--length", length, int, low=1, high=config.max_length)
    return _Trace(config, peft, batch, length, kernels).model(model)


def matmuls(config: BertConfig, stage: Stage, peft: PeftConfig, batch: int, length: int) -> tuple[Matmul, ...]:
    """Return the derivation: the matrix products of a step in `stage` over (batch, length) tokens, in forward order.

    Raises InputError where batch or length is not in range.
    """
    return tuple(run_trace(config, units(config, peft).during(stage), peft, batch, length).matmuls)


def forward_flops(config: BertConfig, peft: PeftConfig, batch: int, length: int) -> int:
    """Return the FLOPs of a forward pass through all blocks and the head, the same in every stage."""
    return step_flops(config, units(config, peft), peft, batch, length)[0]


def backward_flops(config: BertConfig, stage: Stage, peft: PeftConfig, batch: int, length: int) -> int:
    """Return the FLOPs of a backward pass in `stage`."""
    return step_flops(config, units(config, peft).during(stage), peft, batch, length)[1]


def step_flops(
    config: BertConfig, active: Units, peft: PeftConfig, batch: int, length: int, checkpointed: bool = False
) -> tuple[int, int]:
    """Return the FLOPs of the forward and of the backward pass of a step in which `active` train.

    With `checkpointed` blocks the backward pass has another forward pass of each that it crosses.
    """
    return run_trace(config, active, peft, batch, length, Kernels(checkpointed=checkpointed)).flops


def prefix_flops(config: BertConfig, peft: PeftConfig, num_blocks: int, batch: int, length: int) -> int:
    """Return the FLOPs of a forward pass through the lowest `num_blocks` blocks, which a cache of their output spares.

    The backward pass has none there, as the cache keeps what is frozen alone.
    """
    model = units(config, peft)
    trace = _Trace(config, peft, batch, length)
    trace.prefix(model.embeddings, model.blocks[:num_blocks])
    return trace.flops[0]


# Bytes


def stage_bytes(
    config: BertConfig, stage: Stage, peft: PeftConfig, batch: int, length: int, kernels: Kernels = ON_CPU
) -> dict[str, int]:
    """Return what training with AdamW keeps in memory during `stage`, in bytes: weights and moments are fp32.

    parameter_bytes    every parameter, frozen or not
    gradient_bytes     one element for each that trains
    optimizer_bytes    AdamW's two moments for each that trains, and its step count, one fp32 scalar for each tensor
    activation_bytes   the floating-point tensors that autograd keeps from the forward to the backward pass, those of
                       bert.py in train mode by the `kernels` given. What the loss keeps, and int64 indices, are left
                       out; torch.compile keeps other tensors. Of checkpointed blocks it is their inputs, and what the
                       largest keeps while it runs again.
    working_bytes      a bound of what the backward pass of a block works with: two tensors of (B, S, F) and six fp32 of
                       (B, S, D); on CUDA the workspaces of its libraries too, 64 MiB

    The sum is a bound of a step's peak: while gradients are made, activations are given back. What PyTorch has not
    allocated, as CUDA's context, is not in it.
    """
    active = units(config, peft).during(stage)
    return bytes_of(active, run_trace(config, active, peft, batch, length, kernels))


def largest_batch(
    config: BertConfig, active: Units, peft: PeftConfig, length: int, kernels: Kernels, memory: int
) -> int:
    """Return the most rows of `length` tokens whose step takes at most `memory` bytes (`stage_bytes`), 0 for none."""

    def fits(batch: int) -> bool:
        return sum(bytes_of(active, run_trace(config, active, peft, batch, length, kernels)).values()) <= memory

    low, high = 0, 1
    while high <= 2**24 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bytes_of(active: Units, trace: _Trace) -> dict[str, int]:
    return state_bytes(active) | {"activation_bytes": trace.kept_bytes, "working_bytes": trace.working_bytes}


def state_bytes(active: Unit | Units) -> dict[str, int]:
    return {
        "parameter_bytes": active.num_parameters * _FP32,
        "gradient_bytes": active.num_trainable * _FP32,
        "optimizer_bytes": (2 * active.num_trainable + len(active.trainable)) * _FP32,
    }


def kept_levels(cuts: Sequence[int | None]) -> list[dict[int, int]]:
    """Return for each stage what a prefix cache keeps of an example that passes: shelf -> level, blocks passed.

    `cuts` are those of the stages, in order. Stages whose cut does not fall share a shelf, on which an entry takes the
    place of the one it was made from: the first of a stage's shelves is its own. What a later shelf begins with is kept
    as soon as no stage before trains below it. So in `growing` each frozen block runs once an example too:

    >>> kept_levels([None, 4, 8]), kept_levels([8, 4, None])
    ([{}, {0: 4}, {0: 8}], [{0: 8, 1: 4}, {1: 4}, {}])
    """
    cuts = [cut or 0 for cut in cuts]
    shelves = list(accumulate((before > after for before, after in zip(cuts, cuts[1:])), initial=0))
    begins: dict[int, int] = {}  # shelf -> the first of its stages that keeps anything
    for stage, (shelf, cut) in enumerate(zip(shelves, cuts)):
        if cut:
            begins.setdefault(shelf, stage)
    return [
        {shelves[stage]: cut}
        | {
            shelf: cuts[begin]
            for shelf, begin in begins.items()
            if shelf > shelves[stage] and cuts[begin] <= min(cuts[stage:begin])
        }
        if cut
        else {}
        for stage, cut in enumerate(cuts)
    ]


def cache_bytes(
    config: BertConfig, stage: Stage, tokens: int, cache_dtype: str = "fp32", peft: PeftConfig = PLAIN
) -> int:
    """Return the bytes of a shelf of a prefix cache at the cut of `stage`: D elements for each of `tokens` tokens.

    0 where E trains or no block is frozen: there is no prefix to keep. Raises InputError for an unknown cache_dtype.
    """
    check_choice("--cache-dtype", cache_dtype, ITEMSIZE)
    return tokens * config.hidden_size * ITEMSIZE[cache_dtype] if units(config, peft).during(stage).cut() else 0


def gradient_sum_bytes(config: BertConfig, stage: Stage, peft: PeftConfig = PLAIN) -> int:
    """Return the bytes of the sums by which the schedule "adaptive" decides: one for each that trains in a block."""
    return bytes_of_sums(units(config, peft).during(stage))


def bytes_of_sums(active: Units) -> int:
    return sum(block.num_trainable for block in active.blocks) * _FP32
