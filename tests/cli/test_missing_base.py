"""A base that is not there is said before anything that takes seconds is loaded: commands that name one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.core.plan import Plan
from fedlora.core.toml import dump_toml

ROOT = Path(__file__).parents[2]
SAYS = {
    "gone": "no such directory|no base model in",
    "empty": "config.json|no base model in",
    "text": "neither|GGUF",
}


def adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    (path / "adapter_model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("base", ["gone", "empty"])
@pytest.mark.parametrize("command", ["pin", "evaluate", "try"])
def test_a_base_that_is_none_is_said_before_anything_heavy_is_loaded(tmp_path, command, base):
    (tmp_path / "empty").mkdir()
    adapter(tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "plan.toml").write_text(dump_toml(Plan()))
    words = {
        "pin": ["plan.toml", "--model", base, "--out", "pinned"],
        "evaluate": ["adapter", "--base", base, "--on", "rows.jsonl"],
        "try": ["adapter", "--base", base, "--prompt", "why?"],
    }[command]
    code = (
        "import sys; from fedlora.cli import main; status = main(sys.argv[1:]);"
        " sys.exit(99 if {'torch', 'transformers'} & {m.partition('.')[0] for m in sys.modules} else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert any(word in done.stderr for word in SAYS[base].split("|")), done.stderr
    assert not (tmp_path / "pinned").exists()
