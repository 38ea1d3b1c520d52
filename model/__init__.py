"""Titans language models: mathematics on one device."""

from model.config import MemoryConfig, ModelConfig
from model.language_model import ModelOutput, TitansLM
from model.state import ModelState

__all__ = ["MemoryConfig", "ModelConfig", "ModelOutput", "ModelState", "TitansLM"]
