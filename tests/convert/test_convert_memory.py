"""Memory does not grow with the checkpoint, nor with its largest tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.convert.checkpoints import hollow

PROGRAM = """
import sys
from dsakv.cli import run
code = run(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""
MB = 1_000_000


def peak(source: Path, target: Path) -> int:
    """Greatest resident memory of a conversion for two ranks and its comparison, in bytes."""
    command = [
        "convert",
        "--hf-ckpt-path",
        str(source),
        "--save-path",
        str(target),
        "--model-parallel",
        "2",
        "--verify",
    ]
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.splitlines()[-1]) * 1024


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Rows and columns of tensors that are larger than the memory that is allowed for them."""
    shape = {"num_attention_heads": 2, "n_routed_experts": 2, "n_shared_experts": 2, "intermediate_size": 2}
    small = hollow(tmp_path / "small", vocab_size=2, hidden_size=64, **shape)
    wide = {"vocab_size": 30_000, "hidden_size": 1024, "v_head_dim": 16_384, "kv_lora_rank": 2}
    large = hollow(tmp_path / "large", **shape | wide)
    assert large > small + 180 * MB
    base = peak(tmp_path / "small", tmp_path / "out-small")
    assert peak(tmp_path / "large", tmp_path / "out-large") < base + 20 * MB
    assert base < 200 * MB
