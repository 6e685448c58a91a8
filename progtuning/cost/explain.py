"""The document of `progtuning explain`: beside a plan, what each unit does in each stage, product by product, and why.

Nothing is counted a second time. The products, their gradients and the bytes are those of the trace that `plan` sums
up; a test holds that the units add up to the plan's totals.
"""

from collections.abc import Iterable
from dataclasses import replace

from progtuning.cost.budget import Forecast
from progtuning.cost.closed_form import Kernels, Matmul, Unit, Units, prefix_flops, run_trace, state_bytes, units
from progtuning.cost.plan import plan_run
from progtuning.model.config import BertConfig
from progtuning.model.names import prefix_of, unit_of
from progtuning.settings.peft import PeftConfig
from progtuning.stages import Schedule

# Of a plan's stage, what is compared with the first stage of full fine-tuning.
COMPARED = (
    "forward_flops backward_flops trainable_parameters parameter_bytes gradient_bytes optimizer_bytes activation_bytes"
    " working_bytes step_bytes"
).split()


class Explained:
    """The policies of E under which a run is explained, and what they share.

    Most units do the same in many stages, so that a unit stands in a list once and stages refer to it.
    """

    def __init__(
        self, config: BertConfig, peft: PeftConfig, forecast: Forecast, num_epochs: int, full: dict, kernels: Kernels
    ):
        """`full` is the only stage of the plan of full fine-tuning by the same method, `forecast` has no cache."""
        self.kernels = kernels
        self.config, self.peft, self.forecast, self.num_epochs, self.full = config, peft, forecast, num_epochs, full
        self.model = units(config, peft)
        self._numbers: dict[str, int] = {}  # repr of a unit's document -> where it stands in `units`
        self.units: list[dict] = []

    def policy(self, schedule: Schedule, plan: dict, batch: int, length: int) -> dict:
        """Return a plan with its stages taken apart, and with its run without and with a prefix cache."""
        document = {"plan": plan, "stages": []}
        for (stage, _), planned in zip(schedule.planned, plan["stages"], strict=True):
            active = self.model.during(stage)
            cut = active.cut()
            spared = prefix_flops(self.config, self.peft, cut, batch, length) if cut else 0
            trace = run_trace(self.config, active, self.peft, batch, length, self.kernels)
            document["stages"].append(
                {
                    "of_full": {key: planned[key] / (self.full[key] or 1) for key in COMPARED},
                    "cut": cut,
                    "spared_flops": spared,
                    "spared_share": spared / (planned["forward_flops"] + planned["backward_flops"]),
                    "kept_again": trace.kept_again,
                    "units": [self._number(one) for one in self._units(active, trace)],
                }
            )
        if "run" in plan and not schedule.sums_gradients:  # else nobody knows what the run costs
            cached = replace(self.forecast, keeper=[0] * plan["run"]["rows"])
            for name, forecast in (("without_cache", self.forecast), ("with_cache", cached)):
                document[name] = plan_run(forecast, schedule, self.num_epochs)
        return document

    def _number(self, document: dict) -> int:
        number = self._numbers.setdefault(repr(document), len(self.units))
        if number == len(self.units):
            self.units.append(document)
        return number

    def _units(self, active: Units, trace) -> list[dict]:
        return [
            self._unit(unit, whole, _of(unit, trace.matmuls))
            | {"again_flops": sum(one.forward_flops for one in _of(unit, trace.again)), "activation_bytes": kept}
            for unit, whole, kept in zip(active, self.model, trace.kept_by_unit, strict=True)
        ]

    def _unit(self, unit: Unit, whole: Unit, products: list[Matmul]) -> dict:
        done = {
            "forward": [one.forward_flops for one in products],
            "input": [one.forward_flops for one in products if one.input_grad],
            "weight": [one.forward_flops for one in products if one.weight_grad],
        }
        crossed = done["input"] or done["weight"]
        return {
            "state": "trains" if unit.trainable else "crossed" if crossed else "cut",
            "parameters": unit.num_parameters,
            "trainable_parameters": unit.num_trainable,
            "products": [self._product(one, unit, whole) for one in products],
            "done": {pass_: len(flops) for pass_, flops in done.items()},
            **{f"{pass_}_flops": sum(flops) for pass_, flops in done.items()},
            **state_bytes(unit),
        }

    def _product(self, one: Matmul, unit: Unit, whole: Unit) -> dict:
        name = one.name.removeprefix(unit.prefix)
        weight = f"{name}.weight"
        if weight not in unit.shapes:  # of activations, as Q K^T: the gradient of the right-hand one
            frozen = "nothing at or below it trains"
        else:
            frozen = "frozen in this stage" if weight in whole.trainable else f"{self.peft.method} never trains it"
        return {
            "name": name,
            "shape": [one.count, one.m, one.k, one.n],
            "flops": one.forward_flops,
            "input": bool(one.input_grad),
            "input_why": called(one.input_grad) or "nothing below it trains",
            "weight": bool(one.weight_grad),
            "weight_why": ("it trains" if weight in unit.trainable else called(one.weight_grad)) or frozen,
        }


def _of(unit: Unit, products: Iterable[Matmul]) -> list[Matmul]:
    return [one for one in products if prefix_of(unit_of(one.name)) == unit.prefix]


def called(name: str) -> str:
    """Say for the sake of which parameter a gradient is computed; "" for none.

    >>> called("encoder.layer.4.attention.self.query.weight")
    'for block 5, attention.self.query'
    """
    if not name:
        return ""
    unit = unit_of(name)
    where = {"embeddings": "E", "head": "H"}.get(unit, f"block {unit + 1}" if isinstance(unit, int) else "")
    return f"for {where}, {name.removeprefix(prefix_of(unit)).removesuffix('.weight')}"
