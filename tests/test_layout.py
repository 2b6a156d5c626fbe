"""Imports go one way, only `beam_jobs` knows Beam, and the thin parts stay thin."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "schemas": {"schemas"},
    "model": {"model", "schemas"},
    "serving": {"serving", "schemas"},
    "beam_jobs": {"beam_jobs", "model", "serving", "schemas"},
}
MAX_LINES = 400


def modules(package: str) -> list[pathlib.Path]:
    found = sorted((TOP / package).rglob("*.py"))
    assert found
    return found


def imports(path: pathlib.Path, at_import: bool = False) -> Iterator[str]:
    """Names of the modules that a file imports, anywhere in it; or, `at_import`, only when it is imported itself."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} has a relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif not at_import:
                yield from visit(child)
            elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                # Of `if TYPE_CHECKING:` only the other branch runs.
                checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                yield from visit(ast.Module(child.orelse, []) if isinstance(child, ast.If) and checking else child)

    yield from visit(ast.parse(path.read_text()))


def offenders(package: str, forbidden: set[str], at_import: bool = False) -> list[str]:
    """`module imports what`, of a package's modules and forbidden top-level packages."""
    return [
        f"{path.relative_to(TOP)} imports {name}"
        for path in modules(package)
        for name in imports(path, at_import)
        if name.partition(".")[0] in forbidden
    ]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    assert offenders(package, set(MAY_IMPORT) - MAY_IMPORT[package]) == []


def test_of_beam_jobs_only_the_lookup_and_the_command_know_the_service() -> None:
    known = {offender.partition(" ")[0] for offender in offenders("beam_jobs", {"serving"})}
    assert known <= {"beam_jobs/lookup.py", "beam_jobs/shard.py", "beam_jobs/ledger.py", "beam_jobs/cli.py"}


@pytest.mark.parametrize("package", ["schemas", "model", "serving"])
def test_only_beam_jobs_knows_beam(package: str) -> None:
    assert offenders(package, {"apache_beam"}) == []


@pytest.mark.parametrize("package", ["schemas", "serving"])
def test_neither_schemas_nor_serving_know_the_frameworks_of_models(package: str) -> None:
    assert offenders(package, {"tensorflow", "keras"}) == []


def test_the_service_imports_neither_numpy_nor_pyarrow() -> None:
    assert offenders("serving", {"numpy", "pyarrow"}, at_import=True) == []


@pytest.mark.parametrize("package", ["model", "beam_jobs"])
def test_models_load_in_functions_and_never_at_import(package: str) -> None:
    assert offenders(package, {"tensorflow", "keras"}, at_import=True) == []


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {str(path.relative_to(TOP)): len(path.read_text().splitlines()) for package in MAY_IMPORT for path in modules(package)}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_module_says_what_it_is_for(package: str) -> None:
    assert [str(path.relative_to(TOP)) for path in modules(package) if not ast.get_docstring(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("beam_jobs.cli", "apache_beam tensorflow keras pyarrow"),
        ("beam_jobs.month", "apache_beam tensorflow keras"),
        ("model.registry", "apache_beam tensorflow keras"),
        ("serving.__main__", "apache_beam tensorflow keras numpy pyarrow"),
        ("serving.app", "apache_beam tensorflow keras numpy pyarrow"),
    ],
)
def test_a_module_is_imported_without_what_it_seldom_needs(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({heavy.split()!r}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
