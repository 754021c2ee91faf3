import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for folder in ("lumos", "pipelines", "jobs", "tests") for path in (ROOT / folder).rglob("*.py"))

MAX_FILE_LINES = 500
MAX_JOB_LINES = 99
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (MAX_JOB_LINES if path.parent == ROOT / "jobs" else MAX_FILE_LINES)
    for function in functions(path):
        where = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        assert function.end_lineno - function.lineno + 1 <= MAX_FUNCTION_LINES, f"{where} is too long"
        arguments = function.args
        parameters = [a for a in arguments.posonlyargs + arguments.args if a.arg not in ("self", "cls")]
        assert len(parameters) + len(arguments.kwonlyargs) <= MAX_PARAMETERS, f"{where} has too many parameters"


def test_no_python_in_infra_and_no_utils():
    assert not list((ROOT / "infra").rglob("*.py"))
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc")]
