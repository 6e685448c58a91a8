"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): only biases train. Nothing is added to the model.

"All" takes every bias: of the linear layers, of the LayerNorms, E's included, and the pooler's. "query,intermediate" is
the half that they find to do nearly as well (Section 4, "Fewer bias parameters"): b_q and b_m2 of every block. Their
code trains the pooler's bias with either.
"""

from progtuning.model.names import BLOCK_LINEARS


def bitfit_trains(name: str, biases: str = "all") -> bool:
    """Say whether the parameter `name` (in a block: its name there) trains under "all" or "query,intermediate"."""
    if biases == "all":
        return name.endswith(".bias")
    return name in {f"{BLOCK_LINEARS[target]}.bias" for target in biases.split(",")}
