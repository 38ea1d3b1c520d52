"""The rules of the house: who may import whom, how long a file may be, what must not be in the tree.

Each rule is a function from a file's text to the rule's violations, tested on a bad example before it is applied to the
repository.
"""

import ast
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("pretrain", "model", "kernels", "parallel", "launch", "tools")
TOP_LEVEL_FOLDERS = {*FOLDERS, "tests", ".ci"}

# What a folder may import of the other folders: a package, or only the named modules of it.
MAY_IMPORT = {
    "kernels": (),
    "model": ("kernels",),
    "parallel": ("model", "kernels"),
    "pretrain": ("parallel", "model", "kernels"),
    "launch": (
        "pretrain.config",
        "pretrain.phases",
        "pretrain.command_line",
        "pretrain.errors",
        "pretrain.exit_codes",
    ),  # what a recipe and its options say
    "tools": FOLDERS,
}
# Folders that may use only these packages beside the standard library.
THIRD_PARTY = {"kernels": {"torch", "triton", "flash_attn"}, "model": {"torch", "pydantic"}, "launch": set()}
ONLY_IN = {"deepspeed": ("parallel",)}
NOT_IN = {"torch.distributed": ("kernels", "model")}

FILE_LINES = 500
FUNCTION_LINES = 60

# Written in pieces, so that this file does not break its own rule.
FOREIGN_PATHS = re.compile(
    "|".join(
        (
            r"(?<![\w.])/(?:wo" + r"rk|farm|root|opt/py" + r"pi|opt/wh" + r"eels|tmp/ve" + r"nv)\b",
            r"(?<![\w.])/home/\w",
            r"(?<![\w.])/Us" + r"ers/\w",
            r"\bpy" + r"pi\.org|pytho" + r"nhosted|download\.pyto" + r"rch",
            r"--(?:extra-)?ind" + r"ex-url|--find-" + r"links",
        )
    )
)


def source_folder(path: str) -> str:
    """The top-level folder of a repository path, empty for a file at the top."""
    return path.split("/")[0] if "/" in path else ""


def imported_modules(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that is imported, also inside functions and by name at run time."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield node.lineno, f"torch.{node.attr}"  # `torch.distributed` needs no import of its own


def within(name: str, allowed: str) -> bool:
    """Whether a dotted name is the allowed module or lies inside it."""
    return name == allowed or name.startswith(f"{allowed}.")


def import_violations(path: str, source: str) -> list[str]:
    """Imports that the table above does not allow to a file at `path`."""
    folder = source_folder(path)
    if folder not in FOLDERS:
        return []
    found = []
    for line, name in imported_modules(path, ast.parse(source)):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top == folder:
            continue
        if top in FOLDERS or top == "tests":
            allowed = any(within(name, module) for module in MAY_IMPORT[folder])
        else:
            allowed = top in THIRD_PARTY.get(folder, {top})
        allowed = allowed and folder in ONLY_IN.get(top, (folder,))
        allowed = allowed and not any(within(name, module) and folder in where for module, where in NOT_IN.items())
        if not allowed:
            found.append(f"{path}:{line}: {folder}/ may not import {name}")
    return found


def length_violations(path: str, source: str) -> list[str]:
    """A file over the ceiling, and functions whose statements take more lines than a reader keeps in view."""
    found = []
    lines = source.count("\n")
    if lines > FILE_LINES:
        found.append(f"{path}: {lines} lines, the ceiling is {FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, the ceiling is {FUNCTION_LINES}")
    return found


def swallowed_exceptions(path: str, source: str) -> list[str]:
    """Handlers that do nothing, bare `except:`, and `suppress` of everything."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            nothing = all(
                isinstance(statement, ast.Pass)
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                for statement in node.body
            )
            if nothing or node.type is None:
                found.append(f"{path}:{node.lineno}: an exception is swallowed")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            if any(ast.unparse(argument) in ("Exception", "BaseException") for argument in node.args):
                found.append(f"{path}:{node.lineno}: an exception is swallowed")
    return found


def missing_docstrings(path: str, source: str) -> list[str]:
    """Modules and packages that do not say what they are for."""
    return [] if ast.get_docstring(ast.parse(source)) else [f"{path}: no docstring at the top"]


def left_overs(path: str, text: str) -> list[str]:
    """Paths and package hosts of one machine, and marks of unfinished work."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for match in FOREIGN_PATHS.finditer(line):
            found.append(f"{path}:{number}: {match.group()} belongs to one machine")
        for match in re.finditer(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", line):
            found.append(f"{path}:{number}: {match.group()}: finish it, or file it")
    return found


def loose_requirements(path: str, text: str) -> list[str]:
    """Requirements that are not pinned to one version."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.split("#")[0].strip()
        if line and not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*|-r requirements[\w-]*\.txt", line):
            found.append(f"{path}:{number}: {line} is not pinned to one version")
    return found


def tracked_files() -> list[str]:
    """Repository paths of all files under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def violations(rule: Callable[[str, str], list[str]], paths: list[str]) -> list[str]:
    """All violations of a rule; fails when there is nothing to apply it to."""
    assert paths, "the rule was applied to nothing"
    return [violation for path in paths for violation in rule(path, (REPOSITORY / path).read_text(encoding="utf-8"))]


def python_files() -> list[str]:
    return [path for path in tracked_files() if path.endswith(".py")]


def code_files() -> list[str]:
    return [path for path in python_files() if source_folder(path) in FOLDERS]


BAD = [
    (import_violations, "kernels/a.py", "import model"),
    (import_violations, "kernels/a.py", "import numpy"),
    (import_violations, "kernels/sub/a.py", "from ...model import config"),
    (import_violations, "kernels/a.py", "import torch.distributed as dist"),
    (import_violations, "model/a.py", "from torch import distributed"),
    (import_violations, "model/a.py", "import torch\ntorch.distributed.barrier()"),
    (import_violations, "model/a.py", "def f():\n    from parallel import mesh"),
    (import_violations, "parallel/a.py", "import pretrain.config"),
    (import_violations, "pretrain/a.py", "import deepspeed"),
    (import_violations, "tools/a.py", "from deepspeed.utils import groups"),
    (import_violations, "tools/a.py", "import importlib\nimportlib.import_module('deepspeed')"),
    (import_violations, "launch/a.py", "from pretrain import loop"),
    (import_violations, "launch/a.py", "from model import ModelConfig"),
    (import_violations, "launch/a.py", "import torch"),
    (import_violations, "tools/a.py", "from tests.helper import x"),
    (length_violations, "model/a.py", "x = 1\n" * 501),
    (length_violations, "model/a.py", "def f():\n" + "    x = 1\n" * 61),
    (swallowed_exceptions, "model/a.py", "try:\n    f()\nexcept OSError:\n    pass"),
    (swallowed_exceptions, "model/a.py", "try:\n    f()\nexcept OSError:\n    ..."),
    (swallowed_exceptions, "model/a.py", "try:\n    f()\nexcept:\n    g()"),
    (swallowed_exceptions, "model/a.py", "import contextlib\nwith contextlib.suppress(Exception):\n    f()"),
    (missing_docstrings, "model/a.py", "import os"),
    (left_overs, "README.md", "cd /wo" + "rk/main"),
    (left_overs, "README.md", "pip install --ind" + "ex-url x"),
    (left_overs, "model/a.py", "x = 1  # TO" + "DO: more"),
    (loose_requirements, "requirements.txt", "torch"),
    (loose_requirements, "requirements.txt", "torch>=2.11"),
    (loose_requirements, "requirements.txt", "torch==2.*"),
    (loose_requirements, "requirements.txt", "torch @ file:///x"),
]
GOOD = [
    (import_violations, "kernels/a.py", "import math, torch\nimport triton.language as tl\nfrom kernels import x"),
    (import_violations, "model/a.py", "import torch\ntorch.zeros(1)"),
    (import_violations, "kernels/sub/a.py", "from ..memory import x"),
    (import_violations, "launch/a.py", "from pretrain.config import load_recipe\nfrom pretrain import errors"),
    (import_violations, "parallel/a.py", "import deepspeed\nimport torch.distributed as dist"),
    (import_violations, "tools/a.py", "import launch.local\nimport torch.distributed as dist"),
    (length_violations, "model/a.py", 'def f():\n    """' + "text\n" * 70 + '"""\n    return 1\n'),
    (swallowed_exceptions, "model/a.py", "try:\n    f()\nexcept OSError:\n    g()"),
    (left_overs, "README.md", "python -m launch local --nproc 2 runs/wo" + "rk/x.yaml"),
    (loose_requirements, "requirements.txt", "# why\n-r requirements.txt\nflash-attn==2.8.3.post2  # comment"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_rules_see_a_violation(rule, path, text):
    assert rule(path, text)


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_rules_let_pass_what_is_allowed(rule, path, text):
    assert rule(path, text) == []


def test_imports_follow_the_table():
    assert violations(import_violations, code_files()) == []


def test_files_and_functions_can_be_read_in_one_sitting():
    assert violations(length_violations, python_files()) == []


def test_no_exception_is_swallowed():
    assert violations(swallowed_exceptions, python_files()) == []


def test_every_module_says_what_it_is_for():
    assert violations(missing_docstrings, python_files()) == []


def test_nothing_of_one_machine_and_nothing_unfinished_is_left():
    suffixes = (".py", ".md", ".txt", ".toml", ".yaml", ".json", "")
    assert violations(left_overs, [path for path in tracked_files() if Path(path).suffix in suffixes]) == []


def test_requirements_are_pinned():
    assert (
        violations(loose_requirements, [path for path in tracked_files() if Path(path).match("requirements*.txt")])
        == []
    )


def test_folders_at_the_top_are_those_of_the_design():
    assert {source_folder(path) for path in tracked_files()} - {""} <= TOP_LEVEL_FOLDERS


def test_every_code_folder_is_a_package():
    folders = {str(Path(path).parent) for path in code_files()}
    assert set(FOLDERS) <= folders
    assert [folder for folder in sorted(folders) if not (REPOSITORY / folder / "__init__.py").is_file()] == []


def test_tests_mirror_the_tree_under_unique_names():
    tests = [Path(path) for path in python_files() if source_folder(path) == "tests"]
    # tests/slurm has a cluster, which several folders' parts run on.
    assert {path.parts[1] for path in tests if len(path.parts) > 2} <= {*FOLDERS, "slurm"}
    names = [path.name for path in tests if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_license_is_the_whole_apache_2_text():
    digest = hashlib.sha256((REPOSITORY / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
