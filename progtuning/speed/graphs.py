"""The blocks as CUDA graphs: what the host launches kernel by kernel is recorded once, and then launched as one.

A small model, or a late stage, keeps a GPU waiting for the host. A recording takes that wait away; it computes the
same, dropout too, but for one shape alone, and reads and writes the same tensors each time:

    B  batch    S  sequence, padded    D  hidden_size

    forward     x (B, S, D), mask (B, S)  copied in  ->  replay  ->  y (B, S, D)
    backward    dy (B, S, D)              copied in  ->  replay  ->  dx (B, S, D), a gradient for each parameter

So batches are padded to multiples of `MULTIPLE` tokens, for their shapes to be few, and a shape is recorded when it
comes again and again. All that is recorded in a stage works in one pool of memory: at any time one pass alone is
between its forward and its backward half. Evaluation is not recorded. See "CUDA semantics: CUDA Graphs" in PyTorch's
documentation.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from progtuning.base.errors import RunError
from progtuning.model.bert import Encoder, Model

MULTIPLE = 8  # tokens to which the rows of a batch are padded; at 16 SST-2 had 39 % of padding, at 8 it has 23 %
UNRECORDED = 2  # passes of a shape that run kernel by kernel; to record one costs about as much as four of these


def graph_blocks(model: Model) -> None:
    """Let the encoder of `model`, which is on a CUDA device, train by recordings, in place. Names and results stay."""
    model.encoder.forward = RecordedEncoder(model.encoder)


class Recorder:
    """Records work on the present CUDA device, in a stream and a pool of memory of its own."""

    def __init__(self):
        self.stream = torch.cuda.Stream()  # one for all stages: cuBLAS keeps working memory for each it has met
        self.forget()

    def forget(self) -> None:
        """Begin a new pool: the memory of the one before returns with the last of its recordings."""
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, work: Callable[[], None]) -> None:
        """Run `work` once in the stream: what PyTorch and cuBLAS set up on first use must not be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`, which does not run now, and return what runs it.

        Another thread may allocate meanwhile: the loader's, which pins the next batch ("thread_local").
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Blocks(nn.Module):
    """The blocks of a range: x (B, S, D), mask (B, S) bool or None -> (B, S, D).

    Weights are cast anew in every pass: a recording must do so, and torch.compile tells passes that do from others.
    """

    def __init__(self, encoder: Encoder, blocks: range):
        super().__init__()
        self.encoder, self.blocks = encoder, blocks

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        device = x.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            return Encoder.forward(self.encoder, x, mask, self.blocks)


def blocks_of(encoder: "weakref.ref[Encoder]", blocks: range) -> Blocks:
    return Blocks(encoder(), blocks)


class Recording:
    """A pass over blocks, forward and, where something in it trains, backward, on inputs of one shape.

    `blocks` gives them. `gradients` has a tensor for each parameter that trains; the backward pass writes into these.
    """

    def __init__(
        self,
        blocks: Callable[[], Blocks],
        x: Tensor,
        mask: Tensor | None,
        gradients: dict[nn.Parameter, Tensor],
        recorder: Recorder,
    ):
        self.blocks = blocks
        trained = {name: parameter for name, parameter in blocks().named_parameters() if parameter in gradients}
        self.gradients = {parameter: gradients[parameter] for parameter in trained.values()}
        # Parameters of the same memory in place of the model's: autograd ties one to the stream of a graph that is
        # still alive, as that of a loss that somebody keeps, and a recording may wait for no other stream.
        self.aliases = {name: nn.Parameter(parameter.detach()) for name, parameter in trained.items()}
        self.x = x.detach().clone().requires_grad_(x.requires_grad)
        self.mask = None if mask is None else mask.clone()
        self.dx = torch.empty_like(x) if x.requires_grad else None
        self.y = self.dy = self.output = None
        device = x.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.autocast = partial(torch.autocast, device, dtype, enabled)  # of the forward half alone
        self._let_go()
        # Neither the rehearsal nor the recording may take of the random numbers that the run draws dropout from.
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.autocast(device, enabled=False):
            recorder.rehearse(self._both)
            self.forward = recorder.record(self._forward)
            self.backward = recorder.record(self._backward) if self.crosses else None
        self.output = None  # and with it autograd's graph

    @property
    def crosses(self) -> bool:
        """Whether a gradient passes: something trains, or x asks for one."""
        return bool(self.gradients) or self.dx is not None

    def _both(self) -> None:
        self._run()
        self.y, self.dy = (torch.zeros_like(self.output, requires_grad=False) for _ in range(2))
        if self.crosses:
            self._backward()

    def _run(self) -> None:
        with self.autocast():
            self.output = functional_call(self.blocks(), self.aliases, (self.x, self.mask))

    def _forward(self) -> None:
        self._run()
        self.y.copy_(self.output.detach())

    def _backward(self) -> None:
        inputs, kept = list(self.aliases.values()), list(self.gradients.values())
        if self.dx is not None:
            inputs, kept = [self.x, *inputs], [self.dx, *kept]
        torch._foreach_copy_(kept, torch.autograd.grad(self.output, inputs, self.dy))

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return y, (B, S, D); where a gradient crosses, the next call writes it anew."""
        if not self.crosses:
            return self.replay(x, mask).clone()
        return _Replayed.apply(self, x, mask, *self.gradients)

    def replay(self, x: Tensor, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            self.x.copy_(x)
            if mask is not None:
                self.mask.copy_(mask)
            self.forward()
        return self.y.detach()

    def replay_backward(self, dy: Tensor) -> None:
        self.dy.copy_(dy)
        self._let_go()
        self.backward()

    def _let_go(self) -> None:
        """Keep what a piece of the batch before has left in the gradients: autograd adds to it, and does not copy."""
        for parameter, gradient in self.gradients.items():
            if parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr():
                parameter.grad = parameter.grad.clone()


class _Replayed(torch.autograd.Function):
    """A recording, in the eyes of autograd."""

    @staticmethod
    def forward(ctx, recording: Recording, x: Tensor, mask: Tensor | None, *parameters: nn.Parameter) -> Tensor:
        ctx.recording = recording
        return recording.replay(x, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        recording, ctx.recording = ctx.recording, None  # a loss that is kept keeps no recording
        recording.replay_backward(dy)
        dx = None if recording.dx is None else recording.dx.detach()
        return None, dx, None, *(gradient.detach() for gradient in recording.gradients.values())


class Shape(NamedTuple):
    """What tells one pass over blocks from another."""

    blocks: range
    size: torch.Size  # (B, S, D)
    dtype: torch.dtype
    is_padded: bool
    keeps: bool  # what a backward pass needs
    asks: bool  # for the gradient of x


class RecordedEncoder:
    """`Encoder.forward` by recordings, in training. They are forgotten when what trains changes, at a new stage."""

    def __init__(self, encoder: Encoder, recorder: Callable[[], Recorder] = Recorder):
        self._encoder = weakref.ref(encoder)  # whose `forward` this is: else both would wait for the garbage collector
        self.recorder = recorder()
        self.parameters = list(encoder.parameters())
        self.state: list[bool] = []
        self._forget()

    def _forget(self) -> None:
        self.seen: Counter[Shape] = Counter()
        self.recordings: dict[Shape, Recording] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.recorder.forget()

    def __call__(self, x: Tensor, mask: Tensor | None, blocks: range | None = None) -> Tensor:
        """Run the blocks of `blocks` over x (B, S, D): arguments and result are those of `Encoder.forward`."""
        encoder = self._encoder()
        blocks = range(len(encoder.layer)) if blocks is None else blocks
        if not encoder.training or not blocks:
            return Encoder.forward(encoder, x, mask, blocks)
        state = [p.requires_grad for p in self.parameters] + [block.training for block in encoder.layer]
        if state != self.state:
            self._forget()
            self.state = state
        keeps = torch.is_grad_enabled()
        shape = Shape(blocks, x.shape, x.dtype, mask is not None, keeps, keeps and x.requires_grad)
        if shape not in self.recordings:
            self.seen[shape] += 1
            if self.seen[shape] <= UNRECORDED:
                return Blocks(encoder, blocks)(x, mask)
            self.recordings[shape] = self._record(encoder, shape, x, mask)
        return self.recordings[shape](x, mask)

    def _record(self, encoder: Encoder, shape: Shape, x: Tensor, mask: Tensor | None) -> Recording:
        layers = [encoder.layer[index] for index in shape.blocks] if shape.keeps else []
        trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter not in self.gradients:
                self.gradients[parameter] = torch.empty_like(parameter, requires_grad=False)
        gradients = {parameter: self.gradients[parameter] for parameter in trained}
        blocks = partial(blocks_of, self._encoder, shape.blocks)
        try:
            return Recording(blocks, x if shape.asks else x.detach(), mask, gradients, self.recorder)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or type(error).__module__.startswith("torch._"):
                raise  # of memory and of torch.compile others speak
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RunError(f"--cuda-graphs: the blocks could not be recorded: {reason}") from error
