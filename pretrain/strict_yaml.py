"""YAML in which a key that is written twice is an error: YAML's own loaders keep the last and say nothing."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode


class _StrictLoader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> MappingNode:
        # Here and not where mappings are constructed: there, keys that `<<` brought in stand among the others.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        keys: list[Node] = [key for key, _ in node.value]
        for key in keys:
            if not isinstance(key, ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value!r} stands twice in one section, in lines {lines[key.value]} and {line}; remove one"
                )
            lines[key.value] = line
        return node


def load_yaml(text: str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError for a text that is no YAML, or that says a key twice."""
    try:
        return yaml.load(text, _StrictLoader)
    except ValueError as error:  # a date that does not exist, say
        raise yaml.YAMLError(str(error)) from error
