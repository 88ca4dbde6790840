"""The kernel in Gluon: compared with float64 on a Hopper GPU; elsewhere, where it runs and how it refuses."""

import pytest
import torch
from attention_cases import Case, check

from dit_accel.errors import UnavailableError
from dit_accel.kernels import automatic_backend, can_run
from dit_accel.kernels.block_sparse import gluon

pytest.importorskip("triton", reason="Triton is not installed")
kernel = pytest.importorskip("dit_accel.kernels.block_sparse.triton_gluon")

HALF, BRAIN = torch.float16, torch.bfloat16
ASKED = {"device": "cuda", "dtype": BRAIN, "head_dim": 128, "block_size": (128, 64)}
CASES = [
    Case(1, BRAIN, heads=1, block_size=(128, 64)),
    Case(1027, BRAIN, batch=2, dim=128, block_size=(128, 64)),
    Case(387, HALF, dim=72, strided=True, block_size=(128, 64)),
    Case(300, BRAIN, heads=3, per_head=True, text=40, text_valid=(5,), block_size=(128, 64)),
    Case(
        300,
        HALF,
        batch=3,
        per_head=True,
        per_sample=True,
        text=40,
        text_valid=(5, 40, 0),
        block_size=(128, 64),
    ),
    Case(300, HALF, extra_keys=77, block_size=(128, 64)),
    Case(300, HALF, dim=20, density=0.0, block_size=(128, 64)),
]


@pytest.mark.skipif(
    can_run("triton-gluon", **ASKED) is not None, reason="needs a GPU of compute capability 9.0"
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu(case):
    with torch.device("cuda"):
        check(case, "triton-gluon")


@pytest.mark.parametrize(
    ("change", "capability", "words"),
    [
        ({}, (9, 0), None),
        ({"requires_grad": True}, (9, 0), None),
        (
            {},
            (10, 0),
            "triton-gluon was written for compute capability 9.x, got compute capability 10.0; use",
        ),
        (
            {"block_size": (128, 128)},
            (9, 0),
            "needs blocks of (128, 64), got (128, 128); use backend='triton-tma'",
        ),
        ({"block_size": (64, 64)}, (9, 0), "needs blocks of (128, 64), got (64, 64)"),
        ({"head_dim": 256}, (9, 0), "takes head_dim up to 128, got 256"),
        ({"dtype": torch.float32}, (9, 0), "triton-gluon supports float16, bfloat16"),
        ({"quantization": "int8"}, (9, 0), "triton-gluon does not compute quantization='int8'"),
    ],
    ids=str,
)
def test_where_it_runs(change, capability, words, monkeypatch):
    from dit_accel.kernels.block_sparse import triton_forward, triton_tma

    for module in (triton_forward, triton_tma):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = can_run("triton-gluon", **(ASKED | change))
    assert reason is None if words is None else words in reason
    if reason is None:
        assert automatic_backend(**ASKED)[0] == "triton", "it is for who names it, or where it was measured"


def test_a_mask_without_tiles_is_given_one():
    """Of the first block of each row the kernel reads bits, whatever it is."""
    from dit_accel import BlockMask
    from dit_accel.kernels.block_sparse import triton_configs
    from dit_accel.kernels.block_sparse.triton_forward import mask_arguments

    q, lse = torch.zeros(1, 1, 256, 64, dtype=HALF), torch.zeros(1, 1, 256)
    options = triton_configs.launch_options(triton_configs.tuned.Launch(128, 64, 8, 3), (128, 64))
    tiles = []
    for allowed in (torch.ones(256, 256), torch.ones(256, 256).tril()):
        mask = BlockMask.from_token_mask(allowed.bool(), (128, 64))
        given = mask_arguments(mask, 1, 1), None, 1.0, mask.block_size, mask.text, options
        grid, args, _ = kernel.launch_arguments(q, q, q, q, lse, *given)
        assert grid == (2, 1)
        tiles.append(args[14])
    assert tiles[0].shape == (1, 128, 2)
    assert not tiles[0].any()
    assert torch.equal(tiles[1], mask.tiles.view(torch.int32))


def test_it_is_not_interpreted(monkeypatch):
    from dit_accel.kernels.block_sparse import triton_forward, triton_tma

    for module in (triton_forward, triton_tma):
        monkeypatch.setattr(module, "INTERPRETED", True)
    assert "Gluon has no interpreter" in can_run("triton-gluon", **(ASKED | {"device": "cpu"}))


def test_a_compiler_that_fails_is_named(monkeypatch):
    """Of the kernel that was asked for by its name, which nothing takes the place of."""
    kernel.failure.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def fail(*_, **__):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(type(kernel._forward), "warmup", fail)
    q = torch.zeros(1, 1, 128, 64, dtype=HALF)
    mask = Case(128, block_size=(128, 64)).mask()
    with pytest.raises(
        UnavailableError, match=r"RuntimeError: PassManager::run failed; use backend='triton-tma'"
    ):
        kernel.attention(q, q, q, mask, scale=1.0, text_valid=None)
    kernel.failure.cache_clear()


def test_gluon_of_another_triton_is_named(monkeypatch):
    import sys

    from dit_accel.kernels.block_sparse import triton_forward, triton_tma

    for module in (triton_forward, triton_tma):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(sys.modules, "dit_accel.kernels.block_sparse.triton_gluon", None)
    monkeypatch.delattr("dit_accel.kernels.block_sparse.triton_gluon")
    assert "needs the Gluon of Triton 3.6 to 3.9" in gluon.condition(can_run_problem())


def can_run_problem():
    from dit_accel.kernels.block_sparse.problem import Problem

    return Problem(**ASKED)
