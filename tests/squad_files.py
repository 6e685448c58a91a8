"""Made files in SQuAD's layout that are easy to learn: the answer is the one word of opinion in its context."""

import json
import random
from pathlib import Path

from tests.conftest import WORDS

OPINIONS, OTHERS = WORDS[:8], WORDS[8:]


def write_squad(folder: Path, version: str, train: int = 240, dev: int = 24, words: int = 8) -> Path:
    """Write train-VERSION.json and dev-VERSION.json of `train` and `dev` questions into `folder` and return it.

    Contexts have 1 to `words` words. Every third question of v2.0 has no answer; those of dev have two gold answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(version)
    for split, count in (("train", train), ("dev", dev)):
        paragraphs = []
        for i in range(count):
            answerable = version == "v1.1" or i % 3 > 0
            found = generator.choices(OTHERS, k=generator.randint(0, words - 1))
            found.insert(generator.randint(0, len(found)), generator.choice(OPINIONS if answerable else OTHERS))
            context = "  ".join(found)
            golds = [word for word in found if word in OPINIONS]
            answers = [{"text": golds[0], "answer_start": context.index(golds[0])}] if golds else []
            qa = {"id": f"{split}-{i}", "question": "what was the film", "answers": answers * (1 + (split == "dev"))}
            qa |= {"is_impossible": not golds} if version == "v2.0" else {}
            paragraphs.append({"context": context, "qas": [qa]})
        document = {"version": version, "data": [{"title": "films", "paragraphs": paragraphs}]}
        (folder / f"{split}-{version}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder
