"""Which entries of the matrices that train take part in a step: all of them. `methods.dps.DPS` chooses among them."""

from collections.abc import Mapping


class NoMasks:
    """Every entry of what trains takes part in every step."""

    def before_step(self) -> None:
        """A batch begins."""

    def after_backward(self) -> bool:
        """The gradients are there. Return whether some of them were masked."""
        return False

    def after_step(self) -> None:
        """The optimizer has moved the weights."""

    def skip_step(self) -> None:
        """In place of `after_backward` and `after_step` for a batch that moves nothing."""

    def state_dict(self) -> dict:
        """Return what a resumed run needs, between two steps."""
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        """Take up a state of the same run."""
