"""Bad inputs to the command line, counted by kind: the corpus of tests/hostile.py, and good files damaged at random.

    python -m benchmarks.hostile --mutations 500

A line for each kind says how many were tried and how many ended as specified: status 1 or 2 and one line of error that
names the place, or accepted because it is valid; nothing left over, nothing written elsewhere. What did not is printed.
The last line of output is one JSON document. Exit status 1 where any did not.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from progtuning.report import tables
from tests.hostile import HUB, MUTATED, Mutations, attempt, corpus, make_ground, result, start_hub_cases
from tests.hub_server import HubServer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=200, help="random damages of each kind of file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        root, ground = Path(folder), make_ground(Path(folder, "ground"))
        for kind, cases in corpus(ground).items():
            wrong = try_hub(root, ground) if kind == HUB else try_cases(kind, cases, root, ground)
            rows.append(row(kind, len(cases), wrong))
        for kind in MUTATED:
            rows.append(try_mutations(kind, args.mutations, random.Random(f"{args.seed} {kind}"), root, ground))
    header = ["kind", "tried", "as specified", "of these valid"]
    print(tables.table(header, [[str(row[name]) for name in header] for row in rows]))
    tried, good = (sum(row[name] for row in rows) for name in ("tried", "as specified"))
    print(json.dumps({"tried": tried, "as_specified": good, "seconds": round(time.time() - begin), "rows": rows}))
    return int(good < tried)


def try_cases(kind: str, cases: dict, root: Path, ground: Path) -> list[str]:
    wrong = []
    for number, (name, case) in enumerate(cases.items()):
        if found := attempt(case, root / f"{kind} {number}".replace("/", " "), ground):
            wrong.append(f"{kind}: {name}: {found}")
    return wrong


def try_hub(root: Path, ground: Path) -> list[str]:
    with HubServer(hang=3) as server:
        ended = result(start_hub_cases(server, root, ground))["wrong"]
    return [f"{kind}: {name}: {found}" for kind, name, found in ended if found]


def try_mutations(kind: str, count: int, generator: random.Random, root: Path, ground: Path) -> dict:
    damages, wrong = Mutations(kind, root / f"{kind} at random", ground), []
    for number in range(count):
        if found := damages.attempt(generator.randrange):
            wrong.append(f"{kind}, damage {number}: {found}")
    return row(f"{kind}, damaged at random", count, wrong, damages.accepted)


def row(kind: str, tried: int, wrong: list[str], accepted: int | str = "") -> dict:
    for line in wrong:
        print(line, file=sys.stderr)
    return {"kind": kind, "tried": tried, "as specified": tried - len(wrong), "of these valid": accepted}


if __name__ == "__main__":
    sys.exit(main())
