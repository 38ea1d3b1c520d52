"""What READMEs tell a reader to type exists: commands, subcommands, options, files, make targets, links."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from pretrain.phases import load_phases

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
GUIDES = ("tools/huggingface/README.md",)
GUIDE_COMMANDS = "\n".join((REPOSITORY / guide).read_text(encoding="utf-8") for guide in GUIDES)
OTHER_PROGRAMS = {"tensorboard"}
WITH_SUBCOMMANDS = {"tools.bench", "tools.checkpoint", "tools.tokenizer", "tools.shards", "tools.trials", "launch"}


def shell_commands(markdown: str) -> list[str]:
    """The lines of fenced bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def help_of(module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `python -m module arguments --help` prints."""
    package = importlib.util.find_spec(module)
    assert package is not None, f"there is no module {module}"
    name = f"{module}.__main__" if package.submodule_search_locations is not None else module
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main([*arguments, "--help"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def options_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


def recipe_overrides(words: list[str]) -> list[tuple[str, str]]:
    """The (name, value) pairs after the recipe that are fields of it, not options of the command."""
    pairs = zip(words, [*words, ""][1:], strict=True)
    own = ("--dry-run", "--ranks", "--resume")
    return [(name[2:], value) for name, value in pairs if name.startswith("--") and name not in own]


def check_python_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Raise AssertionError for `python -m words` with a module, subcommand, option or recipe that does not exist."""
    module, arguments = words[0], words[1:]
    shown = help_of(module, arguments[:1] if module in WITH_SUBCOMMANDS else [], capsys)
    recipes = [word for word in arguments if word.endswith(".yaml")]
    if recipes:
        place = arguments.index(recipes[0])
        load_phases(REPOSITORY / recipes[0], recipe_overrides(arguments[place + 1 :]))
        passed_on = {name for name, _ in recipe_overrides(arguments[place + 1 :])}
        arguments = [word for word in arguments if word.removeprefix("--") not in passed_on]
        if module == "launch":  # what follows the recipe is for the training
            shown += help_of("pretrain", [], capsys)
    for option in options_of(arguments):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown), f"python -m {module} has no {option}"


def test_there_are_commands_to_check():
    modules = {words.split()[2] for words in shell_commands(README) if words.startswith("python -m ")}
    assert {"tools.tokenizer", "tools.shards", "pretrain", "launch", "tools.export", "tools.evaluate"} <= modules


@pytest.mark.parametrize("command", shell_commands(README + GUIDE_COMMANDS))
def test_command_can_be_typed_as_written(command, capsys):
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        check_python_command(words[2:], capsys)
    elif words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    else:
        assert words[0] in OTHER_PROGRAMS


@pytest.mark.parametrize(
    "command",
    [
        "tools.no_such_tool --help",
        "tools.shards build --input x --tokenizers y",
        "tools.shards construct --input x",
        "launch local --nprocs 2 launch/recipes/demo.yaml",
        "launch local --nproc 2 launch/recipes/demo.yaml --model.presett mac-tiny",
        "pretrain launch/recipes/no-such.yaml",
    ],
)
def test_the_check_sees_a_wrong_command(command, capsys):
    with pytest.raises((AssertionError, ValueError)):
        check_python_command(shlex.split(command), capsys)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (REPOSITORY / link).exists()
