"""A model filled from a checkpoint: the right bits, each parameter once, in no more memory than it takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dsakv.kernels.reference import dequantize_into
from dsakv.weights import load as loading
from dsakv.weights.checkpoint import Checkpoint, Part
from dsakv.weights.layout import Layout
from dsakv.weights.plan import Plan, plan_loading
from tests.weights.toy import CPU, TOY, Scaled, Toy, fill, part_of, quantized, toy_tensors, write


def linear(n: int, k: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(k, n, bias=False, device="meta", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "total"), [(0, 1), (0, 2), (1, 2), (0, 5), (1, 5), (1, 25)])
def test_float8_becomes_value_times_scale(dim: int, total: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where a rank's part begins and ends within a square."""
    n, k = 400, 300
    values, scale, expected = quantized(n, k)
    write(tmp_path, {"model.safetensors": {"weight": values, "scale": scale}})
    for number in range(total):
        model = linear(n // total if dim == 0 else n, k // total if dim == 1 else k, dtype)
        fill(model, tmp_path, Layout(part=part_of(dim, number, total)))
        assert model.weight.dtype == dtype
        assert torch.equal(model.weight, expected.chunk(total, dim)[number].to(dtype))


def test_every_float8_number_is_decoded() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    out = torch.empty(2, 128)
    dequantize_into(out, values, torch.ones(1, 1), (0, 0))
    assert torch.equal(out.nan_to_num(7e7), values.float().nan_to_num(7e7))


@pytest.mark.parametrize("start", [(0, 0), (127, 0), (128, 129), (130, 255)])
@pytest.mark.parametrize("n", [1, 126, 270])
@pytest.mark.parametrize("k", [1, 200])
def test_a_part_may_begin_anywhere(start: tuple[int, int], n: int, k: int) -> None:
    values, scale, expected = quantized(400, 470)
    rows, columns = slice(start[0], start[0] + n), slice(start[1], start[1] + k)
    out = torch.full((n, k), torch.nan)
    dequantize_into(out, values[rows, columns], scale, start)
    assert torch.equal(out, expected[rows, columns])


@pytest.mark.parametrize(("dim", "total"), [(0, 1), (0, 3), (1, 2)])
def test_float8_parameters_keep_their_bits(dim: int, total: int, tmp_path: Path) -> None:
    values, scale, _ = quantized(384, 512)
    write(tmp_path, {"model.safetensors": {"weight": values, "scale": scale}})
    for number in range(total):
        shape = [384, 512]
        shape[dim] //= total
        model = Scaled(*shape)
        fill(model, tmp_path, Layout(part=part_of(dim, number, total)))
        bits = values.view(torch.uint8).chunk(total, dim)[number]
        assert torch.equal(model.weight.view(torch.uint8), bits)
        assert torch.equal(model.scale, scale.chunk(total, dim)[number])
        assert model.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_plain_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    write(tmp_path, {"model.safetensors": {"weight": whole}})
    for dim, number in product((0, 1), range(4)):
        model = linear(12 // 4 if dim == 0 else 12, 20 // 4 if dim == 1 else 20, torch.float32)
        fill(model, tmp_path, Layout(part=part_of(dim, number, 4)))
        assert torch.equal(model.weight, whole.chunk(4, dim)[number].float())
        assert model.weight.is_contiguous()


def test_numbers_at_odd_addresses_are_copied_to_even_ones(tmp_path: Path) -> None:
    """The format does not ask for alignment; kernels do."""
    save_file({"weight": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    odd = (size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    with Checkpoint(tmp_path) as checkpoint:
        stored = checkpoint.read("weight")
        assert stored.data_ptr() % 4
    model = linear(4, 4, torch.float32)
    fill(model, tmp_path, Layout())
    assert model.weight.data_ptr() % 4 == 0
    assert torch.equal(model.weight, stored)


def test_progress_counts_what_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": toy_tensors()})
    seen: list[int] = []

    @contextmanager
    def bar(n_bytes: int) -> Iterator[Any]:
        seen.append(n_bytes)
        yield seen.append
        seen.append(-1)

    with Checkpoint(tmp_path) as checkpoint:
        loading.load_parameters(Toy(), checkpoint, TOY, device=CPU, progress=bar)
    assert seen[0] == 24  # w becomes bfloat16; the others stay in the file
    assert sum(seen[1:-1]) == 24
    assert seen[-1] == -1


class _Torn(Checkpoint):
    """A checkpoint that returns other tensors than its headers tell."""

    def read(self, name: str, part: Part = Part()) -> torch.Tensor:  # noqa: B008 (as it is)
        tensor = super().read(name, part)
        return tensor[:1] if name == "g" else tensor


class _Buffered(Toy):
    """A buffer that nothing fills."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = nn.Buffer(torch.empty(3, device="meta"))


class _Forgetful(nn.Linear):
    """Takes no new weight."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or not hasattr(self, "weight"):
            super().__setattr__(name, value)


def made_plan(model: nn.Module, checkpoint: Checkpoint, change: str) -> Plan:
    readings = plan_loading(model, checkpoint, TOY, CPU).readings
    if change == "left out":
        return Plan([reading for reading in readings if reading.name != "norm.bias"])
    if change == "twice":
        return Plan([*readings, readings[0]])
    if change == "another's":
        return Plan([reading._replace(name="proj.bias") if reading.leaf == "bias" else reading for reading in readings])
    return Plan(readings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("none", None),
        ("left out", "in 2 places: norm.bias was set 0 times, norm.bias is on meta"),
        ("twice", "was set 2 times"),
        ("another's", "norm.bias was set 0 times, proj.bias is no parameter"),
        ("torn", "norm.weight is torch.float32 [1]"),
        ("forgetful", "proj.weight is on meta"),
        ("buffer", "in 1 places: scratch is on meta"),
    ],
)
def test_every_parameter_is_set_exactly_once(change: str, message: str | None, tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": toy_tensors()})
    model = _Buffered() if change == "buffer" else Toy()
    if change == "forgetful":
        model.proj = _Forgetful(3, 2, bias=False, device="meta", dtype=torch.bfloat16)
    with (_Torn if change == "torn" else Checkpoint)(tmp_path) as checkpoint:
        plan = made_plan(model, checkpoint, change)
        if message is None:
            loading.fill(model, plan, checkpoint, device=CPU)
            return
        with pytest.raises(RuntimeError) as caught:
            loading.fill(model, plan, checkpoint, device=CPU)
    assert message in str(caught.value)


SIZE, COUNT = 8 << 20, 6
PROGRAM = """
import resource, sys
import torch
from torch import nn
from dsakv.errors import DsakvError
from dsakv.weights.checkpoint import Checkpoint
from dsakv.weights.layout import Layout
from dsakv.weights.load import load_parameters
from pathlib import Path

directory, room = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
model = nn.ModuleList(nn.Linear(4096, 2048, bias=False, device="meta") for _ in range(6))
with Checkpoint(directory) as checkpoint:  # mapped in full, as address space
    status = dict(line.split(":") for line in open("/proc/self/status"))
    limit = int(status["VmData"].split()[0]) * 1024 + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        load_parameters(model, checkpoint, Layout(), device=torch.device("cpu"))
    except DsakvError as error:
        sys.exit(error.message)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits data by Linux's rules")
@pytest.mark.parametrize("stored", ["float16", "float8", "as needed"])
def test_loading_takes_the_parameters_and_less_than_one_tensor(stored: str, tmp_path: Path) -> None:
    """The kernel enforces it: all memory that the process may write is limited."""
    values, scale, _ = quantized(2048, 4096)
    for i in range(COUNT):
        tensors = {f"{i}.weight": values, f"{i}.scale": scale}
        if stored == "float16":
            tensors = {f"{i}.weight": values.half()}
        elif stored == "as needed":
            tensors = {f"{i}.weight": values.float()}
        save_file(tensors, tmp_path / f"{i}.safetensors")
    parameters = 0 if stored == "as needed" else COUNT * SIZE * 4

    def run(room: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(room)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    enough = run(parameters + SIZE * 4)
    assert enough.returncode == 0, enough.stderr
    if parameters:
        short = run(parameters - SIZE * 4)
        assert (short.returncode, short.stderr) == (1, "cpu has no room for the model's weights\n")
