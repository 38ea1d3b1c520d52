"""What the guides tell a reader to type: the commands of their fenced bash blocks."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("kernels", "launch", "model", "parallel", "pretrain", "tools")
GUIDES = [REPOSITORY / "README.md", *sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.md"))]


def shell_commands(markdown: str) -> list[str]:
    """The lines of fenced bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def commands_of_guides() -> dict[str, Path]:
    """Each command, once, with the first guide that has it, as a path in the repository."""
    found: dict[str, Path] = {}
    for guide in GUIDES:
        for command in shell_commands(guide.read_text(encoding="utf-8")):
            found.setdefault(command, guide.relative_to(REPOSITORY))
    return found
