"""The code that an exported model carries: the sources of kernels/ and model/ themselves, side by side in one folder.

transformers runs a model's own code from the model's folder, without subfolders. So every module that the model needs
becomes a file, `kernels/memory/chunk.py` for example `kernels_memory_chunk.py`, in which nothing but the lines that
import other such modules is changed. Three are not copies: the two that choose among backends have stand-ins without
kernels for GPUs, and the model's configuration, whose pydantic classes become dataclasses with the same fields and
properties, so that nothing but transformers and torch is needed.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
REMOTE = "tools.huggingface.remote"
CONFIGURATION, MODELING = "configuration_titans", "modeling_titans"
ENTRIES = (f"{REMOTE}.{CONFIGURATION}", f"{REMOTE}.{MODELING}")
"""What config.json names."""
SHIPPED = ("kernels", "model", REMOTE)
STAND_INS = {
    "kernels.attention.choice": f"{REMOTE}.attention_choice",
    "kernels.memory.choice": f"{REMOTE}.memory_choice",
}
"""Modules whose source is another's."""
CONFIG_MODULE = "model.config"


def remote_files() -> dict[str, str]:
    """Every file of the code by name, in a fixed order."""
    sources: dict[str, str] = {}
    left = list(ENTRIES)
    while left:
        module = left.pop()
        if module in sources:
            continue
        sources[module], needed = _packaged(module)
        left += needed
    others = sorted(flat_name(module) for module in sources.keys() - set(ENTRIES))
    files = {f"{flat_name(module)}.py": source for module, source in sources.items()}
    files[f"{MODELING}.py"] += _naming(others)
    return dict(sorted(files.items()))


def flat_name(module: str) -> str:
    """The name of a module in the model's folder."""
    return module.removeprefix(f"{REMOTE}.").replace(".", "_")


def _naming(others: list[str]) -> str:
    lines = "".join(f"from .{name} import __name__ as _  # noqa: E402\n" for name in others)
    return f"\n# transformers copies the files that this one names, but not the files that those name.\n{lines}"


def _packaged(module: str) -> tuple[str, list[str]]:
    """A module's text in the export, and the modules that it needs."""
    path = source_path(STAND_INS.get(module, module))
    text = path.read_text(encoding="utf-8")
    if module == CONFIG_MODULE:
        text = as_dataclasses(text)
    text, needed = _flattened(text)
    return f"# {path.relative_to(ROOT).as_posix()} of Mnemosyne (Apache-2.0), made for this folder.\n{text}", needed


def source_path(module: str) -> Path:
    """The file of a module of this repository."""
    folder = ROOT.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def _is_shipped(module: str) -> bool:
    return any(module == top or module.startswith(f"{top}.") for top in SHIPPED)


def _flattened(text: str) -> tuple[str, list[str]]:
    """The text with the imports of shipped modules made relative, and these modules."""
    lines = text.splitlines(keepends=True)
    needed = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(_is_shipped(alias.name) for alias in node.names):
            raise ValueError(f"`{ast.unparse(node)}` can't be packaged: import the names from the module")
        if not isinstance(node, ast.ImportFrom) or node.level or not _is_shipped(node.module or ""):
            continue
        line = node.lineno - 1
        modules = [f"{node.module}.{alias.name}" for alias in node.names]
        if all(source_path(module).is_file() for module in modules):  # names are modules of a package
            aliases = ", ".join(
                f"{flat_name(module)} as {alias.asname or alias.name}"
                for module, alias in zip(modules, node.names, strict=True)
            )
            lines[line : node.end_lineno] = [f"{' ' * node.col_offset}from . import {aliases}\n"] + [""] * (
                node.end_lineno - node.lineno
            )
            needed += modules
        else:
            before = f"from {node.module} import"
            lines[line] = lines[line].replace(before, f"from .{flat_name(node.module)} import", 1)
            needed.append(node.module)
    return "".join(lines), needed


def as_dataclasses(text: str) -> str:
    """A module of pydantic classes with frozen dataclasses in their place: the fields with their defaults and
    docstrings, and the properties. What checks or makes configurations stays behind: an exported one was checked.
    """
    tree = ast.parse(text)
    head = ast.parse(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import Literal"
    )
    constants = [node for node in tree.body if isinstance(node, ast.Assign)]
    classes = [_as_dataclass(node) for node in tree.body if isinstance(node, ast.ClassDef)]
    body = [*head.body, *constants, *classes]
    docstring = ast.get_docstring(tree)
    return f'"""{docstring}"""\n\n' + ast.unparse(ast.Module(body, [])) + "\n"


def _as_dataclass(node: ast.ClassDef) -> ast.ClassDef:
    kept: list[ast.stmt] = []
    for index, statement in enumerate(node.body):
        if isinstance(statement, ast.AnnAssign):
            annotation = _without_constraints(statement.annotation)
            kept.append(ast.AnnAssign(statement.target, annotation, _default(statement.value), simple=1))
        elif isinstance(statement, ast.Expr):
            if index == 0 or isinstance(node.body[index - 1], ast.AnnAssign):
                kept.append(statement)
        elif isinstance(statement, ast.FunctionDef) and _is_property(statement):
            kept.append(statement)
    decorator = ast.parse("dataclass(frozen=True, kw_only=True)", mode="eval").body
    return ast.fix_missing_locations(
        ast.ClassDef(name=node.name, bases=[], keywords=[], body=kept, decorator_list=[decorator], type_params=[])
    )


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list)


def _default(value: ast.expr | None) -> ast.expr | None:
    """A field's default out of `Field(default=..., ...)`; None where it is required."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "Field"):
        return value
    return next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)


def _without_constraints(annotation: ast.expr) -> ast.expr:
    """`Annotated[float, Field(gt=0)]` as `float`, wherever it stands."""

    class Strip(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
            if ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
                return node.slice.elts[0]
            return node

    return Strip().visit(annotation)
