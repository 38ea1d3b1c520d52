"""Run by itself: loads exported models with transformers, and compares their logits with given ones.

Usage: alone.py EXPECTED MODULES [--without A,B,...] FOLDER...: the last line printed is JSON.
"""

import json
import os
import sys
from pathlib import Path


class Without:
    """A finder of modules that does not find some packages, as if they were not installed."""

    def __init__(self, finder: object, names: set[str]) -> None:
        self.finder, self.names = finder, names

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def main(expected: str, modules: str, *rest: str) -> None:
    if rest[0] == "--without":
        sys.meta_path[:] = [Without(finder, set(rest[1].split(","))) for finder in sys.meta_path]
        rest = rest[2:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{modules}/code", "HF_HOME": f"{modules}/home"}
    import torch
    import transformers
    from safetensors.torch import load_file

    wanted = load_file(expected)
    ids = wanted.pop("ids")
    found = {"transformers": transformers.__version__}
    for folder in map(Path, rest):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            equal = torch.equal(model(ids).logits, wanted[folder.name])
            first = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            again = model.generate(
                first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False
            )
            whole = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1)
        same = torch.equal(again, whole[:, : again.shape[1]])
        text = tokenizer.decode(tokenizer("a b  c").input_ids, skip_special_tokens=True) == "a b  c"
        leaked = sorted({"deepspeed", "triton", "kernels", "model", "tools", "pretrain"} & sys.modules.keys())
        found[folder.name] = "equal" if equal and same and text and not leaked else f"{equal} {same} {text} {leaked}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
