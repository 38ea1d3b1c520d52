"""Named sizes: the paper's (Titans, arXiv 2501.00663, section 5.1), 1.3b, and one for CPUs.

The feed-forward widths make up what a variant's mixer leaves to the size in the name, at the vocabulary of 32,000.
"""

import difflib
from typing import Any

Fields = dict[str, Any]

_SIZES: dict[str, Fields] = {
    "tiny": {"num_layers": 2, "dim": 128, "num_heads": 4, "vocab_size": 4096},
    "170m": {"num_layers": 12, "dim": 768, "num_heads": 12, "vocab_size": 32_000},
    "340m": {"num_layers": 24, "dim": 1024, "num_heads": 16, "vocab_size": 32_000},
    "400m": {"num_layers": 24, "dim": 1024, "num_heads": 16, "vocab_size": 32_000},
    "760m": {"num_layers": 24, "dim": 1536, "num_heads": 24, "vocab_size": 32_000},
    "1.3b": {"num_layers": 24, "dim": 2048, "num_heads": 32, "vocab_size": 32_000},
}
_FFN_DIMS: dict[str, dict[str, int]] = {
    "mac": {"tiny": 256, "170m": 2560, "340m": 640, "400m": 1472, "760m": 1216, "1.3b": 1408},
    "mag": {"tiny": 256, "170m": 2560, "340m": 640, "400m": 1472, "760m": 1216, "1.3b": 1408},
    "mal": {"tiny": 256, "170m": 2816, "340m": 960, "400m": 1792, "760m": 1728, "1.3b": 2112},
    "lmm": {"tiny": 384, "170m": 3904, "340m": 2368, "400m": 3136, "760m": 3776, "1.3b": 4864},
    "transformer": {"tiny": 448, "170m": 4224, "340m": 2816, "400m": 3584, "760m": 4352, "1.3b": 5632},
    "linear": {"tiny": 384, "170m": 3968, "340m": 2432, "400m": 3264, "760m": 3840, "1.3b": 4928},
    "delta": {"tiny": 384, "170m": 3968, "340m": 2432, "400m": 3264, "760m": 3840, "1.3b": 4928},
    "ttt": {"tiny": 384, "170m": 3904, "340m": 2368, "400m": 3200, "760m": 3776, "1.3b": 4864},
}
_FAMILIES: dict[str, tuple[str, Fields]] = {
    "mac": ("mac", {}),
    "mag": ("mag", {}),
    "mal": ("mal", {}),
    "lmm": ("lmm", {}),
    "transformer": ("transformer", {}),
    # Baselines on the same memory code: linear attention with decay, the delta rule, test-time training.
    "linear": ("lmm", {"depth": 1, "objective": "dot", "momentum": False, "forget_to": "zero", "step_bound": None}),
    "delta": ("lmm", {"depth": 1, "momentum": False, "forgetting": False}),
    "ttt": ("lmm", {"depth": 2, "momentum": False, "forgetting": False}),
}
PRESETS = tuple(f"{family}-{size}" for family in _FAMILIES for size in _SIZES)
"""All names."""


def preset_fields(name: str) -> Fields:
    """The fields of `ModelConfig` for a preset's name.

    Raises:
        ValueError: there is no such preset; the message has the nearest names.
    """
    if name not in PRESETS:  # in a recipe it may be a number, or nothing
        near = difflib.get_close_matches(str(name), PRESETS, n=3) or PRESETS[:3]
        raise ValueError(
            f"preset is {name!r}: it must be one of {', '.join(_FAMILIES)} with one of {', '.join(_SIZES)}, "
            f"such as {', '.join(near)}"
        )
    family, size = name.split("-", 1)
    variant, memory = _FAMILIES[family]
    tiny = size == "tiny"
    fields = {"variant": variant, "ffn_dim": _FFN_DIMS[family][size], **_SIZES[size]}
    if variant != "transformer":
        fields["memory"] = {"depth": 2, "expansion": 2, "chunk": 16 if tiny else 64, **memory}
    if variant == "mac":
        fields["segment"] = 64 if tiny else 512
    if variant in ("mag", "mal"):
        fields["window"] = 64 if tiny else 1024
    if variant in ("mac", "mag", "mal"):
        fields["num_persistent"] = 4 if tiny else 16
    return fields
