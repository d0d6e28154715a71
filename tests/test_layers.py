"""The plan of the house: a trunk that can be read in an afternoon, leaves around it, and what each may cost.

    python -m tests.test_layers      # prints today's figures

The trunk is what scripts.base_train imports, everything else in nanochat/ a leaf. Both stand here in reading order: a
file imports only from files before it, so that no arrow points up and no trunk file knows a leaf.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRUNK = """
common configurator files record schedule compute sharding muon adamw attention model gpt sizing
tokenizer corpus dataloader loss_eval core_eval checkpoint_manager signals run train
""".split()
LEAVES = """
char_byte download hf_tokenizer corpus_writer token_files
calculator engine decode_step fast gpt2 llama conversation names chat_train task_eval hf_model hf_import
task_data dataset gpt_hf hf_export gguf_export jail_stub execution report_page report runs serving api access markdown
server
""".split()
# The places to talk to a model, the other architectures, the faster recipe: what comes on top of the library.
ADDED = """
char_byte hf_tokenizer token_files hf_model fast gpt2 llama hf_import gpt_hf hf_export gguf_export runs api access
markdown serving server
""".split()
# What one reads to understand and change the training of a model.
STORY = ["speedrun.sh", "scripts/base_train.py"] + [
    f"nanochat/{name}.py"
    for name in "gpt attention model muon adamw schedule train run dataloader corpus loss_eval".split()
]
BUDGETS = {
    "files of the trunk": 25,
    "lines of the trunk": 5100,
    "lines of the story": 2500,
    "lines of the library": 8590,  # to become 7,500
    "lines of the library and the server": 11880,  # to become 9,000, with relatives and recipe
    "parameters of a library function": 7,
}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions, but not for types alone."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def local(path: Path) -> set[str]:
    """Names of the library's files that a file imports."""
    names = {name.split(".")[1] for name in imported(path) if name.startswith("nanochat.")}
    return names & {file.stem for file in (ROOT / "nanochat").glob("*.py")}


def closure(path: Path) -> set[str]:
    """Names of the library's files that a file imports, and those that they import."""
    found: set[str] = set()
    waiting = local(path)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= local(ROOT / "nanochat" / f"{name}.py") - found
    return found


def lines(paths: list[str]) -> int:
    return sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths)


def parameters(path: Path) -> dict[str, int]:
    """{function: how many parameters, without self} of all functions in a file."""
    counts = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            names = [argument.arg for argument in named if argument.arg not in ("self", "cls", "ctx")]
            counts[f"{path.stem}.{node.name}"] = len(names)
    return counts


def figures() -> dict[str, int]:
    """Today's, by the names of BUDGETS."""
    library = sorted((ROOT / "nanochat").glob("*.py"))
    return {
        "files of the trunk": len(TRUNK),
        "lines of the trunk": lines([f"nanochat/{name}.py" for name in TRUNK]),
        "lines of the story": lines(STORY),
        "lines of the library": lines([f"nanochat/{path.name}" for path in library if path.stem not in ADDED]),
        "lines of the library and the server": lines([f"nanochat/{path.name}" for path in library]),
        "parameters of a library function": max(max(parameters(path).values(), default=0) for path in library),
    }


def show() -> str:
    return "; ".join(f"{name}: {value:,} of {BUDGETS[name]:,}" for name, value in figures().items())


def test_budgets() -> None:
    assert all(value <= BUDGETS[name] for name, value in figures().items()), show()


def test_the_trunk_is_what_base_train_imports() -> None:
    """With gpt, the architecture that it takes unless --arch names another one."""
    assert closure(ROOT / "scripts" / "base_train.py") | {"gpt"} == set(TRUNK)


def test_every_library_file_imports_only_those_before_it() -> None:
    order = TRUNK + LEAVES
    assert {path.stem for path in (ROOT / "nanochat").glob("*.py")} - {"__init__"} == set(order)
    for place, name in enumerate(order):
        path = ROOT / "nanochat" / f"{name}.py"
        assert local(path) <= set(order[:place]), f"{name} imports {local(path) - set(order[:place])}"
        assert not {"dev", "scripts", "tasks", "tests"} & {module.split(".")[0] for module in imported(path)}, name


def test_scripts_do_not_import_scripts() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] in ("scripts", "tests")}, path


def test_tasks_need_nothing_of_torch() -> None:
    """Training data and benchmarks are text: they import what works without a model."""
    allowed = set(
        "common configurator files record tokenizer conversation calculator corpus task_data execution".split()
    )
    for path in (ROOT / "tasks").glob("*.py"):
        assert local(path) <= allowed, path


if __name__ == "__main__":
    print(show())
