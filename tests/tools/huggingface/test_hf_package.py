"""The code of exported models is that of this repository, and runs where there is nothing else of it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import MemoryConfig, ModelConfig
from tests.tools.huggingface.exported_cases import VARIANTS, random_ids
from tools.huggingface import package
from tools.huggingface.package import CONFIG_MODULE, ENTRIES, REMOTE, STAND_INS, flat_name, remote_files, source_path

FILES = remote_files()
ALONE = Path(__file__).parent / "alone.py"


def modules() -> dict[str, str]:
    """The packaged modules by file name."""
    paths = [path for top in ("kernels", "model") for path in (package.ROOT / top).rglob("*.py")]
    names = [".".join(path.relative_to(package.ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    remote = [f"{REMOTE}.{path.stem}" for path in (package.ROOT / "tools/huggingface/remote").glob("*.py")]
    return {f"{flat_name(name)}.py": name for name in [*names, *remote] if f"{flat_name(name)}.py" in FILES}


MODULES = modules()


def without_imports(text: str) -> str:
    """The code without its imports, comments aside."""
    tree = ast.parse(text)

    class Drop(ast.NodeTransformer):
        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            return None

    return ast.dump(Drop().visit(tree))


def imported(text: str) -> list[tuple[str, str, str]]:
    """(module in the export or outside, name there, name here) of every `from ... import`."""
    return [
        (f"{'.' * node.level}{node.module or ''}", alias.name, alias.asname or alias.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def test_every_file_has_a_source_and_the_model_is_among_them() -> None:
    assert MODULES.keys() == FILES.keys()
    needed = {"model_language_model.py", "kernels_memory_dual.py", "kernels_memory_chunk.py", "model_state.py"}
    assert needed <= FILES.keys()
    assert not [name for name in FILES if "triton" in name or "flash" in name]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_differs_from_its_source_in_imports_alone(name: str) -> None:
    module = MODULES[name]
    if module == CONFIG_MODULE:
        pytest.skip("compared field by field")
    source = source_path(STAND_INS.get(module, module)).read_text()
    own, theirs = FILES[name].split("\n", 1)[1], source
    if module in ENTRIES:
        own = own.split("\n# transformers copies")[0] + "\n"
    assert without_imports(own) == without_imports(theirs)
    for (there, what, here), (source_module, source_name, source_here) in zip(
        imported(own), imported(theirs), strict=True
    ):
        assert here == source_here
        if there == ".":
            assert what == flat_name(f"{source_module}.{source_name}")
        elif there.startswith("."):
            assert (there, what) == (f".{flat_name(source_module)}", source_name)
        else:
            assert (there, what) == (source_module, source_name)
            assert there.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}


def test_the_first_file_names_all_others() -> None:
    named = set(re.findall(r"^from \.(\w+) import __name__", FILES["modeling_titans.py"], flags=re.MULTILINE))
    assert {f"{name}.py" for name in named} == FILES.keys() - {"modeling_titans.py", "configuration_titans.py"}


def test_the_configuration_has_the_fields_defaults_and_properties_of_the_models(tmp_path, monkeypatch) -> None:
    (tmp_path / "packaged_config.py").write_text(FILES["model_config.py"])
    monkeypatch.syspath_prepend(tmp_path)
    space = vars(importlib.import_module("packaged_config"))
    for ours in (MemoryConfig, ModelConfig):
        theirs = space[ours.__name__]
        assert dataclasses.is_dataclass(theirs)
        fields = {field.name: field.default for field in dataclasses.fields(theirs)}
        assert fields.keys() == ours.model_fields.keys()
        for name, field in ours.model_fields.items():
            assert fields[name] == (dataclasses.MISSING if field.is_required() else field.default), name
        properties = {name for name, value in vars(ours).items() if isinstance(value, property)} - {"model_fields_set"}
        assert properties == {name for name, value in vars(theirs).items() if isinstance(value, property)}
    for preset in ("mac-tiny", "mag-tiny", "lmm-340m", "linear-tiny", "transformer-tiny"):
        ours = ModelConfig.preset(preset)
        fields = ours.model_dump(mode="json")
        memory = fields.pop("memory")
        memory = None if memory is None else space["MemoryConfig"](**memory)
        theirs = space["ModelConfig"](**fields, memory=memory)
        for name in ("head_dim", "has_attention", "grid"):
            assert getattr(theirs, name) == getattr(ours, name)
        assert memory is None or memory.bound == ours.memory.bound


def test_an_import_that_cannot_be_made_relative_is_refused() -> None:
    with pytest.raises(ValueError, match="can't be packaged"):
        package._flattened("import kernels.memory\n")


def run_alone(python: str, folders: list[Path], expected: Path, modules: Path, *options: str) -> dict[str, str]:
    """What alone.py says of exported models, in a process that sees neither this repository nor its variables."""
    command = [python, "-I", str(ALONE), str(expected), str(modules), *options, *map(str, folders)]
    result = subprocess.run(command, cwd=modules, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def write_expected(path: Path, exported, cases: tuple[str, ...]) -> tuple[list[Path], Path]:
    """Folders of the cases, and a file of tokens and the logits that the training code gives them."""
    from safetensors.torch import save_file

    ids = random_ids(2, 40)
    tensors = {"ids": ids}
    folders = []
    with torch.no_grad():
        for case in cases:
            folder, own = exported(case)
            folders.append(folder)
            tensors[case] = own(ids).logits
    save_file(tensors, path)
    return folders, path


def test_it_runs_without_deepspeed_triton_and_this_repository(exported, tmp_path: Path) -> None:
    cases = ("mac", "transformer")
    folders, expected = write_expected(tmp_path / "expected", exported, cases)
    blocked = "deepspeed,triton,pydantic,sentencepiece,kernels,model,parallel,pretrain,tools,launch,tests"
    found = run_alone(sys.executable, folders, expected, tmp_path, "--without", blocked)
    assert found.pop("transformers")
    assert found == dict.fromkeys(cases, "equal")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.57.6", "5.23.0"])
def test_it_runs_where_transformers_and_torch_alone_are_installed(version: str, exported, tmp_path: Path) -> None:
    folders, expected = write_expected(tmp_path / "expected", exported, VARIANTS)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    wanted = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={version}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    found = run_alone(python, folders, expected, tmp_path)
    assert found.pop("transformers") == version
    assert found == dict.fromkeys(VARIANTS, "equal")
