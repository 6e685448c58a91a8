"""The stages in a model of other code: any nn.Module that runs a list of blocks, one after the other.

    M = E . B1 ... BL . H, by the dotted paths of its modules. Of four models of the library transformers:

                 blocks                  embeddings                         head
    DeBERTa-v2   deberta.encoder.layer   deberta.embeddings,                pooler, classifier
                                         deberta.encoder.rel_embeddings,
                                         deberta.encoder.LayerNorm
    ModernBERT   model.layers            model.embeddings                   model.final_norm, head, classifier
    GPT-2        transformer.h           transformer.wte, transformer.wpe,  transformer.ln_f, lm_head
                                         transformer.drop
    Llama        model.layers            model.embed_tokens                 model.norm, lm_head

The model's forward is its own and cannot be run in two halves, as `StageEngine` does. So each module below the cut runs
without grad by itself, through hooks. Between them nothing requires a gradient, so no graph is built there either.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from progtuning.base.checks import check_choice
from progtuning.base.errors import InputError
from progtuning.engine import StagedModel, keep_only
from progtuning.model.names import EMBEDDINGS, HEAD
from progtuning.stages import Stage


class ForeignEngine(StagedModel):
    """A model of other code under stages: `enter(stage)`, then call the model as ever, or this, which only calls it.

    `blocks` is the path of the list of blocks; `embeddings` and `head` are paths of modules, or of single parameters.
    Each parameter that requires a gradient must lie in one of the three. E is all that runs below the blocks.

    A parameter of both E and H, a tied one, needs a decision. With `tied="embeddings"` it trains where E does. With
    `tied="head"` it trains in every stage. As it is E's too, E then runs with grad in all of them, and nothing is cut.

    With `prefix_dropout=False` the modules below the cut run in eval mode, also while the model is in train mode. So
    does a dropout between them, as GPT-2's `transformer.drop`, if it is among the paths of the embeddings.

    `optimizer` is a torch optimizer, not one that wraps it. Its `state_dict` is that of one which holds all parameters
    and has moments of the stage's, so that an optimizer that no stage has changed yet can load it. Where this one loads
    a state, it holds all parameters, and `stage` is None, until the next `enter`.

    Raises InputError where a path leads nowhere, a parameter lies in none of the three or in several, or two blocks
    share one, or another engine has the model; and in the forward pass, where a parameter that trains is found to run
    below the cut.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str,
        embeddings: Sequence[str],
        head: Sequence[str],
        optimizer: Optimizer | None = None,
        prefix_dropout: bool = True,
        tied: str | None = None,
    ):
        layers = module_at(model, blocks)
        if not isinstance(layers, (nn.ModuleList, nn.Sequential)) or not len(layers):
            raise InputError(f"blocks must be the path of a list of modules, got {blocks!r}: {type(layers).__name__}")
        if any(getattr(hook, "__module__", "") == __name__ for hook in layers[0]._forward_pre_hooks.values()):
            raise InputError("the model is in an engine already, or is a copy of one that is: release that first")
        units, both = place(model, blocks, {EMBEDDINGS: embeddings, HEAD: head}, tied)
        super().__init__(model, optimizer, len(layers), units.__getitem__)
        self.prefix_dropout = prefix_dropout
        self.embeddings_always = both and tied == HEAD
        self.handles: list[RemovableHandle] = []
        below = [(EMBEDDINGS, module_at(model, path)) for path in embeddings]
        for unit, module in (*below, *enumerate(layers)):
            if module is not None:
                self.handles += self.cut_off(unit, module)
        if optimizer is not None:
            self.handles.append(optimizer.register_state_dict_pre_hook(self.hold_all))
            self.handles.append(optimizer.register_state_dict_post_hook(self.hold_stage))
            self.handles.append(optimizer.register_load_state_dict_pre_hook(self.leave_stage))

    def cut_of(self, stage: Stage) -> int | None:
        return None if self.embeddings_always else super().cut_of(stage)

    def forward(self, *args, **kwargs):
        """Call the model."""
        return self.model(*args, **kwargs)

    def release(self) -> None:
        """Make the model and the optimizer as they were before this was built, but for weights and moments."""
        for handle in self.handles:
            handle.remove()
        for parameter in self.candidates.values():
            parameter.requires_grad_()
        if self.optimizer is not None:
            self.hold_all()

    def hold_all(self, *_) -> None:
        keep_only(self.optimizer, self.groups, {parameter for group in self.groups for parameter in group})

    def hold_stage(self, *_) -> None:
        if self.stage is not None:
            active = self.trainable_names(self.stage)
            keep_only(self.optimizer, self.groups, {self.candidates[name] for name in active})

    def leave_stage(self, *_) -> None:
        self.hold_all()
        self.stage = None

    def cut_off(self, unit: int | str, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Make `module` run without grad, and in eval mode where that is asked for, while its unit is below the cut."""
        running: dict[nn.Module, ExitStack] = {}  # a copy of the module has the same hooks

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.cut is None or (unit != EMBEDDINGS and unit >= self.cut):
                return
            reached = set(leaves(tensors((args, kwargs)))) if torch.is_grad_enabled() else ()
            if names := [name for name, parameter in self.candidates.items() if parameter in reached]:
                raise InputError(
                    f"what is in {called(unit)} lies below the cut of stage {self.stage.index + 1}, but {names[0]!r}, "
                    "which trains, runs before it: expected all that runs below the blocks among the embeddings"
                )
            running[module] = contexts = ExitStack()
            contexts.enter_context(torch.no_grad())
            if not self.prefix_dropout:
                contexts.enter_context(evaluating(module))

        def after(module: nn.Module, args: tuple, output: object) -> None:
            if module in running:
                running.pop(module).close()

        first = module.register_forward_pre_hook(before, with_kwargs=True)
        return first, module.register_forward_hook(after, always_call=True)


def place(
    model: nn.Module, blocks: str, others: Mapping[str, Sequence[str]], tied: str | None
) -> tuple[dict[str, int | str], bool]:
    """Return the unit of each parameter that requires a gradient, and whether a parameter is in both E and H.

    `others` are the paths of E and of H. Names are those of `named_parameters`, which has one name a parameter.
    """
    if tied is not None:
        check_choice("tied", tied, others)
    paths = [(f"{blocks}.{index}", index) for index in range(len(module_at(model, blocks)))]
    for unit, given in others.items():
        if isinstance(given, str):
            raise InputError(f"{unit} must be a list of paths, got {given!r}")
        for path in given:
            module_at(model, path)
            paths.append((path, unit))
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names[parameter].append(name)
    units, both = {}, False
    for same in names.values():
        found = {}  # of each unit that has the parameter, a name
        for name in same:
            places = {unit for path, unit in paths if f"{name}.".startswith(f"{path}.")}
            if len(places) != 1:
                got = " and ".join(sorted(map(called, places))) or "none of them"
                raise InputError(f"parameter {name!r} must lie in a block, the embeddings or the head, got {got}")
            found[places.pop()] = name
        units[same[0]], *more = found
        if more:
            shared = f"{' and '.join(map(called, found))} share a parameter, {' = '.join(found.values())}"
            if set(found) != {EMBEDDINGS, HEAD}:
                raise InputError(f"{shared}: no stage can freeze the one and train the other")
            if tied is None:
                raise InputError(f"{shared}: tied must say whether it trains with the embeddings or with the head")
            units[same[0]], both = tied, True
    return units, both


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path, None where a parameter is there. Raises InputError where neither is."""
    module, rest = model, path
    while rest:
        name, _, rest = rest.partition(".")
        if not rest and name in dict(module.named_parameters(recurse=False)):
            return None
        children = dict(module.named_children())
        if name not in children:
            parts = ", ".join(children) or "none"
            raise InputError(f"{path!r} must be the path of a module: of {name!r}, expected one of {parts}")
        module = children[name]
    return module


def called(unit: int | str) -> str:
    return f"block {unit}" if isinstance(unit, int) else f"the {unit}"


def tensors(value: object) -> Iterator[Tensor]:
    """Give the tensors of a call's arguments: those in tuples, lists and mappings too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def leaves(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Give the leaves of the autograd graph that a backward pass from `results` would reach.

    That a tensor requires a gradient does not say that a parameter is behind it: activation checkpointing in
    transformers makes the embeddings' output require one, whatever trains.
    """
    nodes = [get_gradient_edge(result).node for result in results if result.requires_grad]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        nodes += new


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run the block with `module` in eval mode; then what was in train mode is again."""
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True
