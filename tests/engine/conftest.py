"""The models that the engine keeps its promises with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dsakv.config import ModelConfig
from dsakv.jobs.model import load_model
from dsakv.kernels import reference
from dsakv.kernels.contract import Quantized
from dsakv.models.contracts import Model
from dsakv.models.tiny import CONFIG
from tests.models.fp8_checkpoints import FP8_SHAPE, convert, write_fp8_checkpoint

SMALL_FP8: dict[str, Any] = CONFIG | FP8_SHAPE
# No experts: their gate computes in float32, whose sums depend on the batch in the last bit.
SMALL_FP8 |= {"num_hidden_layers": 2, "first_k_dense_replace": 2, "hidden_size": 128, "intermediate_size": 256}


class Wide:
    """The reference kernels, multiplying in float64: the order of a sum then tips nothing to another float8 number."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def fp8_gemm(self, x: Quantized, weight: Quantized) -> Tensor:
        wide = torch.empty(weight.values.shape)
        reference.dequantize_into(wide, weight.values, weight.scale, (0, 0))
        return reference.dequantize(x).double() @ wide.double().T


@pytest.fixture(scope="session", params=["float32", "fp8"])
def model(request: pytest.FixtureRequest, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Top-k 16, 512 tokens; the one in fp8 rounds and packs what fp8 does, and is exact in between."""
    if request.param == "float32":
        return load_model(ModelConfig(ckpt_path=str(small_checkpoint), device="cpu", dtype="float32")).model
    directory = tmp_path_factory.mktemp("fp8")
    write_fp8_checkpoint(directory, SMALL_FP8, seed=3)
    model = load_model(ModelConfig(ckpt_path=str(directory), device="cpu", dtype="fp8")).model
    assert isinstance(model, nn.Module)
    for module in model.modules():
        if hasattr(module, "kernels"):
            cast(Any, module).kernels = Wide()
    return convert(model, torch.float64)
