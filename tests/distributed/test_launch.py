"""Who starts ranks, where they meet, and what a user sees of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsakv.config import Config, LaunchConfig, ModelConfig
from dsakv.errors import InputError
from dsakv.launch import Place, find_place, first_host, ranks_to_start

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234567",
}


def config(**launch: Any) -> Config:
    return Config(model=ModelConfig(name="tiny-random"), launch=LaunchConfig(**launch))


def test_torchrun_and_slurm_give_a_process_its_place() -> None:
    assert find_place(TORCHRUN) == Place(3, 4, 1, "node1", 29500)
    assert find_place(SLURM) == Place(3, 4, 1, "gpu07", 20000 + 1234567 % 20000)
    assert find_place(SLURM | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}) == Place(3, 4, 1, "a", 1)
    assert find_place(SLURM | TORCHRUN) == find_place(TORCHRUN)


def test_a_command_in_a_batch_script_stands_alone() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a"}
    assert find_place({}) is None
    assert find_place(batch) is None
    assert find_place(batch | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu03", "gpu03"), ("gpu[03-05,9],login", "gpu03"), ("a,b", "a"), ("n[1,3]", "n1"), ("x-2-[10-12]", "x-2-10")],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but not LOCAL_RANK"),
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x', not a number"),
        (TORCHRUN | {"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', not a number"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "Slurm does not say which nodes"),
        (SLURM | {"SLURM_PROCID": "9"}, "rank 9 of 4 that meet at gpu07:"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4 that meet at node1:29500 makes no sense"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "rank 3 of 0"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "node1:0 makes no sense"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "node1:99999 makes no sense"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "meet at :29500 makes no sense"),
        (TORCHRUN | {"MASTER_ADDR": "a b/?rank=1"}, "makes no sense"),
    ],
)
def test_a_place_that_makes_no_sense(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_place(environ)


def test_ranks_are_as_many_as_asked_for_or_converted_for(tmp_path: Path) -> None:
    assert ranks_to_start(Config(), {}) == 1
    assert ranks_to_start(config(model_parallel=4), {}) == 4
    for rank in range(8):
        (tmp_path / f"model{rank}-mp8.safetensors").touch()
    converted = ModelConfig(ckpt_path=str(tmp_path))
    assert ranks_to_start(Config(model=converted), {}) == 8
    with pytest.raises(InputError, match=r"was converted for 8 ranks, --model-parallel is 4"):
        ranks_to_start(Config(model=converted, launch=LaunchConfig(model_parallel=4)), {})
    assert ranks_to_start(config(model_parallel=4, nnodes=2, node_rank=1, rdzv_endpoint="a:1"), {}) == 4


def test_started_ranks_start_no_others() -> None:
    for environ in (TORCHRUN, SLURM):
        assert ranks_to_start(Config(), environ) == 1
        assert ranks_to_start(config(model_parallel=4), environ) == 1


@pytest.mark.parametrize(
    ("launch", "environ", "message"),
    [
        ({"model_parallel": 2}, TORCHRUN, "--model-parallel 2, but 4 ranks were started"),
        ({"nnodes": 2, "rdzv_endpoint": "a:1"}, TORCHRUN, "the ranks are started already"),
        ({"nnodes": 2, "model_parallel": 4}, {}, "--nnodes 2, but --rdzv-endpoint is not given"),
        ({"nnodes": 2, "model_parallel": 4, "rdzv_endpoint": "host"}, {}, "--rdzv-endpoint is host"),
        ({"nnodes": 2, "model_parallel": 4, "rdzv_endpoint": "a:1", "node_rank": 2}, {}, "--node-rank 2, but --nnodes"),
        (
            {"nnodes": 2, "model_parallel": 3, "rdzv_endpoint": "a:1"},
            {},
            "--model-parallel 3 does not divide among 2 machines",
        ),
        ({"node_rank": 1}, {}, "--node-rank 1, but --nnodes 1"),
    ],
)
def test_launches_that_cannot_be(launch: dict[str, Any], environ: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ranks_to_start(config(**launch), environ)
