"""Reading order is dependency order: a file imports only from lower layers, or from a sibling named here."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = [
    "attention calculator common configurator download execution files jail_stub record report_page schedule task_data",
    "adamw compute corpus corpus_writer dataset folder_corpus muon sharding tokenizer",
    "conversation dataloader gpt model sizing",
    "checkpoint_manager core_eval engine hf_model loss_eval task_eval",
    "report run server signals train",
]
SIBLINGS = {
    "configurator": {"common"},
    "record": {"common"},
    "download": {"common", "files"},
    "execution": {"common", "jail_stub"},
    "task_data": {"common", "download", "files"},
    "schedule": {"common"},
    "gpt": {"model"},
    "sizing": {"model"},
    "dataloader": {"conversation"},
    "task_eval": {"engine"},
    "hf_model": {"core_eval"},
    "run": {"signals"},
    "train": {"run", "signals"},
    "adamw": {"compute", "sharding"},
    "muon": {"compute", "sharding"},
    "sharding": {"compute"},
    "corpus_writer": {"corpus"},
    "folder_corpus": {"corpus", "corpus_writer"},
    "dataset": {"corpus", "corpus_writer", "folder_corpus"},
}
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names.split()}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def local(path: Path, package: str) -> set[str]:
    """Names of the package's modules that a file imports."""
    modules = {file.stem for file in (ROOT / package).glob("*.py")}
    return {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")} & modules


def test_every_library_file_has_a_layer() -> None:
    files = {path.stem for path in (ROOT / "nanochat").glob("*.py")} - {"__init__"}
    assert files == set(LAYER), "name its layer in tests/test_layers.py"


def test_library_imports_point_down() -> None:
    for name, layer in LAYER.items():
        path = ROOT / "nanochat" / f"{name}.py"
        for other in local(path, "nanochat"):
            assert LAYER[other] < layer or other in SIBLINGS.get(name, ()), f"{name} imports {other}"
        assert not {module for module in imported(path) if module.split(".")[0] in ("scripts", "tasks", "tests")}, name


def test_scripts_do_not_import_scripts() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] in ("scripts", "tests")}, path


def test_tasks_import_only_the_lowest_layer_and_the_chat_format() -> None:
    for path in (ROOT / "tasks").glob("*.py"):
        allowed = {"conversation"}  # the one place that knows what a conversation is
        assert all(LAYER[name] == 0 or name in allowed for name in local(path, "nanochat")), path
