"""The structure of the package.

Imports go one way, nothing reads a pickle, nothing but the five runtime packages is needed, and no line is too wide.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import progtuning
from progtuning.data.registry import KINDS, OWN
from progtuning.model.config import HEADS
from progtuning.model.heads import CLASSES

PACKAGE = Path(progtuning.__file__).parent
# Files and folders of the package; each may import from those before it alone.
ORDER = (
    "base partition stages model settings report cost data step methods engine speed train run compare cli __main__"
).split()
# The four files at the top, in reading order, and all that they may import: neither resuming, counting, logging and
# caching, nor another paper.
THE_PAPER = {
    "partition": set(),
    "stages": {"partition"},
    "engine": {"stages", "model.bert", "model.names"},
    "train": {"stages", "engine", "step.loader", "step.device"},
}
RUNTIME = {"torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "tqdm"}


def imports(path: Path) -> set[str]:
    """Return the dotted names of the modules that a file imports, wherever in it, but for type checkers alone."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(node) for block in blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports by a relative name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(dotted: str) -> str | None:
    """Return which entry of ORDER a dotted name `progtuning.x.y` belongs to."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "progtuning" and len(parts) > 1 and not parts[1].startswith("__") else None


def test_imports_go_only_up_the_list_of_files_and_folders():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            assert not any(name.startswith("progtuning") for name in imports(path))
            continue
        used = {unit(name) for name in imports(path)} - {None, own}
        late = [name for name in used if ORDER.index(name) > ORDER.index(own)]
        assert not late, f"{path.relative_to(PACKAGE)} imports {late}, which stand after it"


def test_the_top_level_is_the_paper_and_imports_nothing_else():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*THE_PAPER, "__init__", "__main__"}
    for name, allowed in THE_PAPER.items():
        modules = {dotted.rpartition(".")[0] for dotted in imports(PACKAGE / f"{name}.py")}
        used = {module.removeprefix("progtuning.") for module in modules if module.startswith("progtuning.")}
        assert used == allowed, f"{name}.py imports {used}"
    lines = {name: (PACKAGE / f"{name}.py").read_text(encoding="utf-8").count("\n") for name in THE_PAPER}
    assert sum(lines.values()) <= 500, lines


def test_a_folder_is_entered_without_loading_what_is_in_it():
    assert not [path for path in PACKAGE.glob("*/__init__.py") if imports(path)]


def test_only_the_runtime_packages_and_the_standard_library_are_imported_and_one_module_imports_each_extra():
    for path in PACKAGE.rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"progtuning"}
        extras = {"report/pictures.py": {"matplotlib"}, "data/parquet.py": {"pyarrow"}}
        allowed = RUNTIME | extras.get(path.relative_to(PACKAGE).as_posix(), set())
        assert outside <= allowed, f"{path.name} imports {outside - allowed}"


def test_one_module_alone_imports_what_speaks_to_other_processes():
    for path in PACKAGE.rglob("*.py"):
        found = {name for name in imports(path) if name.startswith(("torch.distributed", "torch.nn.parallel"))}
        assert not found or path == PACKAGE / "step" / "processes.py", f"{path.name} imports {found}"


def test_no_module_reads_or_writes_a_pickle():
    pickling = {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace(".eval(", "")
        assert not {name.split(".")[0] for name in imports(path)} & pickling
        assert not re.search(r"torch\.(load|save)\(|allow_pickle|\beval\(|\bexec\(", text), path.name


def test_the_model_and_the_methods_name_no_stage_and_no_loop():
    for path in (PACKAGE / "model" / name for name in ("bert.py", "heads.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(lora|adapter|bitfit|spafit|boundary|Stage)\b", text, re.IGNORECASE), path.name


def test_each_head_has_a_row_a_class_and_a_task_and_nobody_asks_which_kind_a_task_is():
    assert list(HEADS) == list(CLASSES) == list(KINDS) and set(OWN) <= set(HEADS)
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        kind = r"isinstance\([^)]*\b(Task|Classes|Numbers|Questions|SquadRows)\b|is_regression"
        assert not re.search(rf"{kind}|(?<!args)\.head [=!]= [\"']", text), path.name


def test_importing_every_module_touches_no_network_and_plans_without_torch():
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise SystemExit('network at import')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import progtuning.cli.command\n"
        "assert 'torch' not in sys.modules, 'the command line imports torch before it needs it'\n"
        "import importlib, pkgutil, progtuning\n"
        "for module in pkgutil.walk_packages(progtuning.__path__, 'progtuning.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_no_line_of_the_code_is_wider_than_120_columns():
    root = Path(__file__).resolve().parents[1]
    wide = [
        f"{path.relative_to(root)}:{number}"
        for pattern in ("progtuning/**/*.py", "benchmarks/*.py", "tests/*.py")
        for path in sorted(root.glob(pattern))
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
        if len(line) > 120
    ]
    assert not wide, f"wider than 120 columns: {', '.join(wide)}"


def test_the_front_door_has_every_name_of_the_readmes_loop_and_loads_no_torch_before_it_is_asked():
    code = (
        "import sys, progtuning\n"
        "assert 'torch' not in sys.modules and set(progtuning.__all__) <= set(dir(progtuning))\n"
        "from progtuning import make_schedule\n"
        "assert 'torch' not in sys.modules\n"
        "from progtuning import *\n"
        "assert all(callable(globals()[name]) for name in progtuning.__all__)\n"
        "assert not hasattr(progtuning, 'Engine')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    imported = re.search(r"^from progtuning import \(\n(.*?)\)$", readme, re.MULTILINE | re.DOTALL)[1]
    assert sorted(imported.replace(",", " ").split()) == sorted(progtuning.__all__)
