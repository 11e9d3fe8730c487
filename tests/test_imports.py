"""The rooms of the house: imports point down, and torch stays where it belongs."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dsakv

ROOT = Path(dsakv.__file__).parent
LEVELS = [
    {"cli", "options", "worker", "__main__"},
    {"jobs", "report"},
    {"launch"},
    {"engine", "kv", "weights", "convert"},
    {"models", "workloads", "hub", "analysis", "trace"},
    {"distributed", "kernels", "policies", "prefix", "tokenizer", "chat_templates", "gguf"},
    {"config", "settings", "request", "console", "layout", "header", "sizes"},
    {"errors", "threads", "compiled"},
]
"""From the top down. Rooms of one level may use each other, but not in a circle."""
TORCH_ROOMS = {"engine", "models", "kernels", "kv", "weights", "jobs", "distributed"}
TORCH_FREE_JOBS = {
    f"dsakv.jobs{name}"
    for name in ("", ".analyze", ".bench_compare", ".bench_summary", ".convert", ".default_model", ".fetch", ".wheel")
}
"""Jobs that run a model are imported when their command is, and only then."""
HEAVY = {"torch", "redis", "transformers", "numpy", "numba", "datasets", "huggingface_hub", "gguf"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[1]


def level(module: str) -> int:
    return next(depth for depth, rooms in enumerate(LEVELS) if room(module) in rooms)


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that the import statements below ``tree`` name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: neither bodies of functions nor what only a type checker sees."""

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else node

    outside: ast.Module = Outside().visit(tree)
    return outside


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@functools.cache
def loaded_by(module: str) -> frozenset[str]:
    """Modules that the import statements name which run when ``module`` is imported."""
    return frozenset(imports(at_import(parsed(module))))


def loads(module: str) -> set[str]:
    """Every module that importing ``module`` loads, by its import statements."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            todo += loaded_by(name)
            todo += [name.rpartition(".")[0]] if "." in name else []
    return seen


INSIDE = [name for name in MODULES if name != "dsakv"]


@pytest.mark.parametrize("module", INSIDE)
def test_imports_point_down(module: str) -> None:
    for target in imports(parsed(module)):
        if target.startswith("dsakv."):
            assert level(target) >= level(module), f"{module} imports {target}, which stands above it"


def test_rooms_form_no_circle() -> None:
    uses: dict[str, set[str]] = {}
    for module in INSIDE:
        targets = {room(target) for target in imports(parsed(module)) if target.startswith("dsakv.")}
        uses.setdefault(room(module), set()).update(targets - {room(module)})
    assert list(TopologicalSorter(uses).static_order())


@pytest.mark.parametrize(
    "module", [name for name in INSIDE if room(name) not in TORCH_ROOMS or name in TORCH_FREE_JOBS]
)
def test_torch_stays_in_its_rooms(module: str) -> None:
    assert "torch" not in {target.split(".")[0] for target in loads(module)}


LIGHT = (
    "--help",
    "--version",
    "generate --help",
    "trace ruler --help",
    "trace burstgpt --help",
    "trace mooncake --help",
    "analyze --help",
    "trace selfcheck -x",
    "fetch-data ruler --help",
    "convert --help",
    "bench links --help",
    "bench --help",
    "bench plan --help",
)


def test_help_loads_nothing_heavy() -> None:
    """In one process, which forgets nothing: the first command that loads something is named."""
    program = (
        "import sys; from dsakv.cli import run\n"
        "for arguments in sys.argv[1:]:\n"
        "    run(arguments.split())\n"
        f"    if found := {HEAVY!r} & set(sys.modules): sys.exit(f'{{arguments}} loads {{found}}')"
    )
    ran = subprocess.run([sys.executable, "-c", program, *LIGHT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Usage") == sum("--help" in arguments for arguments in LIGHT)
