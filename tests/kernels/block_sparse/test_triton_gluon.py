"""The kernel in Gluon: against float64 on a Hopper GPU, and on a CPU by a stand-in for Gluon's language.

And where it runs, and how it refuses.
"""

import gluon_emulator
import pytest
import torch
from attention_cases import Case, check, error, relative_l1
from torch.nn import functional as F

from dit_accel.errors import UnavailableError
from dit_accel.kernels import automatic_backend, block_sparse_attention, can_run
from dit_accel.kernels.block_sparse import gluon, reference, triton_configs, tuned
from dit_accel.kernels.block_sparse.formats import FORMATS
from dit_accel.kernels.block_sparse.quantized import Quantized

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


EMULATED = [
    Case(1, HALF, heads=1, block_size=(128, 64)),
    Case(387, BRAIN, heads=1, dim=128, block_size=(128, 64)),
    Case(300, HALF, dim=72, strided=True, block_size=(128, 64)),
    Case(300, HALF, heads=3, per_head=True, text=40, text_valid=(5,), dim=24, block_size=(128, 64)),
    Case(200, HALF, batch=3, per_head=True, per_sample=True, text=40, text_valid=(5, 40, 0),
         block_size=(128, 64)),
    Case(130, HALF, extra_keys=477, block_size=(128, 64)),
    Case(300, HALF, heads=2, dim=20, density=0.0, block_size=(128, 64)),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulated():
    """The module with a stand-in for Gluon; a GPU of three multiprocessors."""
    module = gluon_emulator.emulated()
    module.multiprocessors = lambda device: 3
    return module


def by_emulation(module, case, launch, format=None):
    """Output and log-sum-exp of a launch of the kernel on a case."""
    from dit_accel.kernels.block_sparse.launch_order import mask_arguments
    from dit_accel.kernels.block_sparse.triton_tma import copied, describable

    inputs, mask, scale = case.inputs(), case.mask(), case.dim**-0.5
    valid = None if case.valid() is None else case.valid().int()
    codes = ()
    if format is not None:
        given = Quantized.of(*inputs, mask, FORMATS[format], scale=scale, text_valid=valid)
        codes, scale = (laid_out(given, module.held_head_dim(case.dim)),), 1.0
    q, k, v = (x if describable(x) else copied(x) for x in inputs)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
    grid, arguments, options = module.launch_arguments(
        q, k, v, out, lse, mask_arguments(mask, *q.shape[:2]), valid, scale, mask.block_size, mask.text,
        triton_configs.launch_options(launch, mask.block_size), *codes,
    )  # fmt: skip
    gluon_emulator.launch(module, grid, arguments, options)
    return grid, out, lse


def laid_out(given, dim):
    """Codes as `triton_quantize` writes them: padded with zeros to whole tiles and the kernel's head_dim."""

    def padded(x, last):
        return F.pad(x, (0, last, 0, -x.shape[2] % 128))

    q, k = (padded(x, dim - x.shape[3]) for x in (given.q, given.k))
    q_scale = F.pad(given.q_scale, (0, q.shape[2] - given.q.shape[2]))
    k_scale = F.pad(given.k_scale, (0, k.shape[2] // given.group - given.k_scale.shape[2]))
    v = given.v if given.v.stride(2) % 8 == 0 and given.v.stride(3) == 1 else F.pad(given.v, (0, -dim % 8))
    return Quantized(q, q_scale, k, k_scale, v, None, None, given.shift, given.group)


@pytest.mark.parametrize(
    ("ping_pong", "persistent", "stages", "late"),
    [(False, False, 3, False), (True, False, 2, True), (False, True, 2, True), (True, True, 3, False)],
    ids=["plain", "ping-pong", "persistent", "both"],
)
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_emulated(emulated, case, ping_pong, persistent, stages, late, monkeypatch):
    monkeypatch.setattr(gluon_emulator, "LATE_COPIES", late)
    launch = tuned.Launch(128, 64, 8, stages, "gluon", ping_pong=ping_pong, persistent=persistent)
    grid, out, lse = by_emulation(emulated, case, launch)
    q, k, v = (x.double() for x in case.inputs())
    valid = None if case.valid() is None else case.valid().int()
    expected, expected_lse = reference.attention(q, k, v, case.mask(), scale=case.dim**-0.5, text_valid=valid)
    tiles = case.batch * case.heads * -(-case.seq // 128)
    assert grid == (min(3, tiles) if persistent else tiles,)
    assert error(out.double(), expected) <= 4 * torch.finfo(case.dtype).eps * max(1.0, expected.abs().max())
    finite = expected_lse.isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert error(lse[finite].double(), expected_lse[finite]) <= 1e-5


@pytest.mark.parametrize("case", EMULATED[2:], ids=str)
def test_emulated_in_int8(emulated, case):
    launch = tuned.Launch(128, 64, 8, 3, "gluon", 64, "int8", ping_pong=True, persistent=True)
    _, out, lse = by_emulation(emulated, case, launch, "int8")
    valid = None if case.valid() is None else case.valid().int()
    q, k, v = (x.float() for x in case.inputs())
    expected, expected_lse = block_sparse_attention(
        q, k, v, case.mask(), text_valid=valid, quantization="int8", backend="reference", return_lse=True
    )
    assert relative_l1(out, expected) <= 2e-3
    finite = expected_lse.isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert error(lse[finite], expected_lse[finite]) <= 2e-3


@pytest.mark.parametrize(
    ("whole", "late"),
    [
        ("mbarrier.wait(filled(bars, 2 * before + 1, BUFFERS), ((n - 1) // BUFFERS) & 1)", True),
        ("mbarrier.wait(filled(bars, 2 * place, BUFFERS), (n // BUFFERS) & 1)", True),
        ("mbarrier.wait(empty, (turn & 1) ^ 1)", False),
        ("mbarrier.arrive(turn_of(bars, 1 - group, BUFFERS))", False),
        ("mbarrier.arrive(queries_emptied(bars, group, BUFFERS))", False),
    ],
    ids=["values not waited for", "keys not waited for", "places filled too early", "no turn", "rows kept"],
)
def test_the_stand_in_sees_a_barrier_that_is_missing(whole, late, monkeypatch):
    """A kernel that lacks one computes something else, or waits for ever."""
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 1)
    monkeypatch.setattr(gluon_emulator, "DELAY", 0.05)
    monkeypatch.setattr(gluon_emulator, "LATE_COPIES", late)
    module = gluon_emulator.emulated({whole: "pass"})
    module.multiprocessors = lambda device: 1
    case = Case(300, HALF, extra_keys=500, dim=24, block_size=(128, 64))
    launch = tuned.Launch(128, 64, 8, 2, "gluon", ping_pong=True, persistent=True)
    q, k, v = (x.double() for x in case.inputs())
    expected, _ = reference.attention(q, k, v, case.mask(), scale=24**-0.5, text_valid=None)
    try:
        _, out, _ = by_emulation(module, case, launch)
    except gluon_emulator.BarrierError:
        return
    assert not error(out.double(), expected) <= 0.1


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
        ({"quantization": "int8"}, (9, 0), None),
        ({"quantization": "int8", "tail": "pooled"}, (9, 0), None),
        ({"quantization": "int8-fp8"}, (9, 0), "does not compute quantization='int8-fp8', only 'int8'"),
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
    from dit_accel.kernels.block_sparse.launch_order import mask_arguments

    q, lse = torch.zeros(1, 1, 256, 64, dtype=HALF), torch.zeros(1, 1, 256)
    options = triton_configs.gluon_config(64, (128, 64), (9, 0))
    tiles = []
    for allowed in (torch.ones(256, 256), torch.ones(256, 256).tril()):
        mask = BlockMask.from_token_mask(allowed.bool(), (128, 64))
        given = mask_arguments(mask, 1, 1), None, 1.0, mask.block_size, mask.text, options
        grid, args, _ = kernel.launch_arguments(q, q, q, q, lse, *given)
        assert grid == (2,)
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
