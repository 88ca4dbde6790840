"""The Triton kernel whose keys the copy engine fetches, against float64 and the kernel with pointers.

Interpreted on the CPU, where a box past the end holds zeros as it does on a GPU, or compiled on one.
"""

import pytest
import torch
from attention_cases import Case

from dit_accel import BlockMask
from dit_accel.kernels import can_run

pytest.importorskip("triton", reason="Triton is not installed")
kernel = pytest.importorskip("dit_accel.kernels.block_sparse.triton_tma")

HALF, BRAIN = torch.float16, torch.bfloat16
CASES = {
    str(case): case
    for case in (
        Case(1, BRAIN, heads=1, block_size=(128, 64)),
        Case(63, HALF, heads=1, dim=128, block_size=(128, 64)),
        Case(387, BRAIN, heads=1, block_size=(128, 64)),
        Case(387, HALF, heads=1, dim=128, block_size=(128, 128)),
        Case(130, HALF, batch=2, dim=24, block_size=(64, 64), strided=True),
        Case(130, BRAIN, heads=1, dim=72, block_size=(64, 128)),
        Case(130, BRAIN, heads=1, dim=20, block_size=(64, 32), strided=True),
        Case(63, HALF, heads=1, dim=1, block_size=(64, 32)),
        Case(70, BRAIN, heads=1, dim=256, block_size=(128, 128)),
        Case(300, BRAIN, heads=3, per_head=True, text=40, text_valid=(5,), block_size=(128, 64)),
        Case(200, HALF, batch=3, dim=32, per_head=True, per_sample=True, text=40, text_valid=(5, 40, 0),
             block_size=(64, 64)),
        Case(200, BRAIN, batch=2, heads=1, dim=16, text=70, text_valid=(0, 33), block_size=(64, 128)),
        Case(130, HALF, heads=1, extra_keys=77, block_size=(128, 128)),
        Case(130, HALF, heads=1, dim=16, density=0.0, block_size=(64, 64)),
    )
}  # fmt: skip
BLOCK_SIZES = ((64, 32), (64, 64), (128, 128))


def check(name: str, device: str = "cpu"):
    """Error against float64 as the public function's other backends are held to."""
    import attention_cases

    with torch.device(device):
        attention_cases.check(CASES[name], "triton-tma")


def check_as_the_kernel_with_pointers():
    """In fp32, where both interpret the same products; NaN fills whatever nobody writes."""
    from dit_accel.kernels.block_sparse import triton_forward, triton_tma

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8).isnan().all(), "results are not poisoned"
        for size in BLOCK_SIZES:
            case = Case(150, batch=2, dim=24, per_head=True, text=40, text_valid=(7, 40), block_size=size)
            given = *case.inputs(), case.mask()
            for scale in (0.3, -0.3, 0.0):
                options = {"scale": scale, "text_valid": case.valid().int()}
                found = triton_tma.attention(*given, **options)
                for one, other in zip(found, triton_forward.attention(*given, **options), strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=3e-6, msg=f"{size}, {scale}")
    finally:
        torch.use_deterministic_algorithms(False)


def check_launches():
    """Every launch that a table of measurements may name computes the same."""
    from dit_accel.kernels.block_sparse import triton_configs, triton_tma, tuned

    case = Case(150, HALF, heads=1, dim=16, text=40, text_valid=(7,), block_size=(128, 128))
    q, k, v, mask = *case.inputs(), case.mask()
    given = {"scale": 0.25, "text_valid": case.valid().int()}
    expected = triton_tma.attention(q, k, v, mask, **given)
    for rows, keys in ((64, 32), (64, 128), (128, 64)):
        launch = triton_configs.launch_options(tuned.Launch(rows, keys, 4, 2), mask.block_size)
        found = triton_tma.attention(q, k, v, mask, **given, options=launch)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def check_numbers():
    from number_cases import as_sdpa, check_nan, check_nothing

    places = (("q", 20, 3), ("q", 17, 0), ("k", 5, 23), ("k", 69, 1), ("v", 33, 2), ("v", 66, 20))
    for dtype in (HALF, BRAIN):
        check_nothing("triton-tma", dtype, (64, 32))
        for i, place in enumerate(places):
            check_nan("triton-tma", dtype, (1, 1 << 22, 1 << 9)[i % 3], i % 2 == 1, *place, (64, 32))
            as_sdpa("triton-tma", dtype, (float("inf"), -float("inf"), 65000.0)[i % 3], *place, (64, 32))


def check_gradients_and_tail():
    """Through the public function: gradients by the kernels of the backward pass, a tail merged by lse."""
    import attention_cases

    from dit_accel.kernels import block_sparse_attention

    case = Case(130, HALF, heads=1, dim=16, text=40, text_valid=(7,), block_size=(64, 64))
    attention_cases.check_tail(case, "triton-tma")
    found = {}
    for backend in ("triton-tma", "triton"):
        inputs = [x.requires_grad_() for x in case.inputs()]
        out = block_sparse_attention(*inputs, case.mask(), text_valid=case.valid(), backend=backend)
        found[backend] = torch.autograd.grad((out * torch.ones_like(out).cumsum(2)).sum(), inputs)
    for one, other in zip(*found.values(), strict=True):
        assert other.abs().max() > 1
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * other.abs().max().item())


def check_formats():
    """As the reference in each, and as the kernel with pointers."""
    import attention_cases

    from dit_accel.kernels import block_sparse_attention

    for options in (
        {"seq": 70, "block_size": (64, 64), "dim": 24, "text": 40, "text_valid": (17, 0), "batch": 2},
        {"seq": 70, "block_size": (128, 128), "heads": 1, "dim": 128},
        {"seq": 70, "block_size": (64, 32), "dim": 16, "per_head": True, "extra_keys": 30, "strided": True},
    ):
        case = Case(dtype=HALF, **options)
        for format in ("int8", "int8-fp8"):
            if format != "int8-fp8":  # which the interpreter rounds in its own way
                attention_cases.check_quantized(case, "triton-tma", format)
            given = {"text_valid": case.valid(), "quantization": format, "return_lse": True}
            one, other = (
                block_sparse_attention(*case.inputs(), case.mask(), backend=name, **given)
                for name in ("triton-tma", "triton")
            )
            for found, expected in zip(one, other, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def check_no_samples():
    from dit_accel.kernels import block_sparse_attention

    mask = BlockMask.from_token_mask(torch.rand(70, 70) < 0.5, (64, 32))
    for batch, heads in ((0, 2), (2, 0)):
        q, k, v = torch.randn(3, batch, heads, 70, 16).half()
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="triton-tma")
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


@pytest.mark.parametrize("name", CASES)
def test_interpreted(interpreter, name):
    interpreter("check", name)


@pytest.mark.skipif(
    can_run("triton-tma", device="cuda", dtype=BRAIN, head_dim=64, block_size=(128, 64)) is not None,
    reason="needs a GPU of compute capability 9.x or 10.x",
)
@pytest.mark.parametrize("name", CASES)
def test_gpu(name):
    check(name, "cuda")


@pytest.mark.parametrize(
    "what",
    ["as_the_kernel_with_pointers", "launches", "numbers", "gradients_and_tail", "formats", "no_samples"],
)
def test_it_computes_what_the_kernel_with_pointers_does(interpreter, what):
    interpreter(f"check_{what}")


def test_what_the_copy_engine_can_read():
    x = torch.zeros(2, 3, 100, 72, dtype=HALF)
    assert kernel.describable(x)
    assert kernel.describable(x.transpose(1, 2).contiguous().transpose(1, 2)), "as attention layers hold it"
    for other, why in (
        (x[..., :-1, :].mT, "rows that are not contiguous"),
        (x[..., 1:], "a first number amid 16 bytes"),
        (torch.zeros(2, 3, 100, 20, dtype=HALF), "rows 40 bytes apart"),
        (x[:1].expand(2, -1, -1, -1), "samples in one place"),
    ):
        assert not kernel.describable(other), why
        copy = kernel.copied(other)
        assert kernel.describable(copy), why
        assert torch.equal(copy, other)
    assert kernel.describable(x[:1].expand(1, -1, -1, -1).as_strided((1, 3, 100, 72), (7, 7200, 72, 1)))


@pytest.mark.parametrize(
    ("change", "capability", "words"),
    [
        ({}, (9, 0), None),
        ({}, (10, 0), None),
        ({"requires_grad": True, "tail": "pooled"}, (9, 0), None),
        ({}, (8, 0), "written for compute capability 9.x and 10.x, got compute capability 8.0; use"),
        ({}, (12, 0), "got compute capability 12.0"),
        ({"dtype": torch.float32}, (9, 0), "triton-tma supports float16, bfloat16"),
        ({"quantization": "int8"}, (9, 0), None),
        ({"quantization": "int8-fp8"}, (9, 0), None),
        (
            {"quantization": "int8-int8"},
            (9, 0),
            "does not compute quantization='int8-int8', only 'int8', 'int8-fp8'",
        ),
        ({"pv_threshold": 50.0}, (9, 0), "triton-tma does not skip values"),
        ({"block_size": (64, 16)}, (9, 0), "got (64, 16)"),
    ],
    ids=str,
)
@pytest.mark.skipif(kernel.INTERPRETED, reason="TRITON_INTERPRET is set")
def test_where_it_runs(change, capability, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    asked = {"device": "cuda", "dtype": BRAIN, "head_dim": 64, "block_size": (128, 64)}
    reason = can_run("triton-tma", **(asked | change))
    assert reason is None if words is None else words in reason
