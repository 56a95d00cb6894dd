"""The steps of the methods, read out of their scripts without importing JAX: for --help.

A step is a call `run.step("name", function, ...)`; its line of help is the first of its function's
docstring. The scripts are followed into the functions of this folder that they hand `run` to.
"""

import ast
import pathlib
from collections.abc import Iterator

METHODS = ("flora", "slim", "closed_form", "transfer")
_FOLDER = pathlib.Path(__file__).parent


def stages() -> dict[str, str]:
    """Every step with its line of help, in the order of the scripts."""
    functions, found = _functions(), dict[str, str]()
    for method in METHODS:
        for name, function in _steps(functions[method], functions):
            docstring = ast.get_docstring(functions[function]) or ""
            found.setdefault(name, docstring.partition("\n")[0])
    return found


def steps_of(method: str) -> list[str]:
    """The names of a method's steps in its order."""
    functions = _functions()
    return list(dict.fromkeys(name for name, _ in _steps(functions[method], functions)))


def _functions() -> dict[str, ast.FunctionDef]:
    """All functions of the scripts by their names."""
    trees = [ast.parse(file.read_text()) for file in sorted(_FOLDER.glob("*.py"))]
    return {
        node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)
    }


def _steps(
    script: ast.FunctionDef, functions: dict[str, ast.FunctionDef]
) -> Iterator[tuple[str, str]]:
    """The steps of a script in its order: (name, name of the function)."""
    calls = [node for node in ast.walk(script) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        called = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        called = call.func.id if isinstance(call.func, ast.Name) else called
        if called == "step":
            name, function = call.args[:2]
            yield ast.literal_eval(name), ast.unparse(function)
        elif called in functions and any(_is_run(argument) for argument in call.args):
            yield from _steps(functions[called], functions)


def _is_run(argument: ast.expr) -> bool:
    return isinstance(argument, ast.Name) and argument.id == "run"
