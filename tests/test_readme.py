"""What the guides tell a reader to type exists: commands that their own parsers take, files, make targets, links.

`test_guides.py` runs them, as far as a machine without GPUs and Slurm can.
"""

import argparse
import importlib
import importlib.util
import re
import shlex

import pytest

from pretrain.command_line import overrides_of, parse
from pretrain.phases import load_phases
from tests.guides import GUIDES, REPOSITORY, commands_of_guides, shell_commands

OTHER_PROGRAMS = {
    "cd",
    "deepspeed",
    "pip",
    "sbatch",
    "scancel",
    "scontrol",
    "squeue",
    "srun",
    "tensorboard",
    "torchrun",
}


class _ParsedError(Exception):
    """Carries the words that a parser left over, past the command that would go on with the others."""


def left_over(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the parser of `python -m module arguments` does not know, after it has taken all else; nothing is run.

    Raises AssertionError where there is no such module, or its parser refuses the words.
    """
    package = importlib.util.find_spec(module)
    assert package is not None, f"there is no module {module}"
    name = f"{module}.__main__" if package.submodule_search_locations is not None else module
    main, depth, known = importlib.import_module(name).main, 0, argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self: argparse.ArgumentParser, *rest: object) -> object:
        nonlocal depth
        depth += 1  # subcommands have parsers of their own, inside the first's call
        try:
            result = known(self, *rest)
        finally:
            depth -= 1
        if depth == 0:
            raise _ParsedError(result[1])
        return result

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        try:
            main(arguments)
        except _ParsedError as parsed:
            return parsed.args[0]
        except SystemExit as end:
            raise AssertionError(f"python -m {module} refuses {shlex.join(arguments)}") from end
    raise AssertionError(f"python -m {module} parsed nothing")


def check_python_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError or ValueError for `python -m words` that the module, its parser or the recipe refuses."""
    module, arguments = words[0], words[1:]
    recipe = next((index for index, word in enumerate(arguments) if word.endswith(".yaml")), None)
    if module == "pretrain":
        options = parse([str(REPOSITORY / word) if word.endswith(".yaml") else word for word in arguments])
        load_phases(options.recipe, options.overrides)
        return
    unknown = left_over(module, arguments, monkeypatch)
    if module == "launch" and recipe is not None:  # what follows the recipe is for the training
        check_python_command(["pretrain", *arguments[recipe:]], monkeypatch)
    if module == "tools.plan" and recipe is not None:
        load_phases(REPOSITORY / arguments[recipe], overrides_of(unknown))
        unknown = []
    assert not unknown, f"python -m {module} has no {unknown[0]}"


def check_other_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for a command of another program, which may start a module of ours: `torchrun ... -m MODULE ...`."""
    assert words[0] in OTHER_PROGRAMS
    if words[0] == "torchrun" and "-m" in words:
        check_python_command(words[words.index("-m") + 1 :], monkeypatch)


def test_there_are_commands_to_check():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    modules = {words.split()[2] for words in shell_commands(readme) if words.startswith("python -m ")}
    assert {"tools.tokenizer", "tools.shards", "pretrain", "launch", "tools.export", "tools.evaluate"} <= modules


@pytest.mark.parametrize(
    "command", [pytest.param(command, id=f"{guide}: {command}") for command, guide in commands_of_guides().items()]
)
def test_command_can_be_typed_as_written(command, monkeypatch):
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        check_python_command(words[2:], monkeypatch)
    elif words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    else:
        check_other_command(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "tools.no_such_tool --help",
        "tools.shards build --input x --tokenizers y",
        "tools.shards construct --input x",
        "launch local --nprocs 2 launch/recipes/demo.yaml",
        "launch local --nproc 2 launch/recipes/demo.yaml --model.presett mac-tiny",
        "pretrain launch/recipes/no-such.yaml",
        "pretrain launch/recipes/demo.yaml --ranks 2",
        "tools.plan --gpu h100 launch/recipes/demo.yaml --model.presett mac-tiny",
        "tools.generate model --max-new-tokens 0 --prompt x",
        "tools.evaluate",
    ],
)
def test_the_check_sees_a_wrong_command(command, monkeypatch):
    with pytest.raises((AssertionError, ValueError)):
        check_python_command(shlex.split(command), monkeypatch)


def test_the_check_sees_what_torchrun_starts(monkeypatch):
    start = "torchrun --nproc-per-node 8 -m tools.evaluate model --tasks all"
    check_other_command(shlex.split(start), monkeypatch)
    with pytest.raises(AssertionError, match="has no --bogus"):
        check_other_command(shlex.split(f"{start} --bogus"), monkeypatch)


@pytest.mark.parametrize("guide", GUIDES, ids=[str(guide.relative_to(REPOSITORY)) for guide in GUIDES])
def test_links_lead_somewhere(guide):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", guide.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (guide.parent / link).exists(), link


def test_the_models_guide_runs_as_written():
    """Its Python is a whole program, with asserts of its own."""
    text = (REPOSITORY / "model" / "README.md").read_text(encoding="utf-8")
    [program] = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(compile(program, "model/README.md", "exec"), names)
    assert names["more"].shape == (2, 8)
