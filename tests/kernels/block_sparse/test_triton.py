"""The Triton kernel against float64: interpreted on the CPU in a child process, or compiled on a GPU.

Triton reads TRITON_INTERPRET as it defines a kernel, so a process has it either interpreted or compiled. A
child that had the variable from its start serves every case here, whatever this process imported before.
"""

import dataclasses
import types

import pytest
import torch

from dit_accel import BlockMask
from dit_accel.kernels import can_run
from dit_accel.kernels.block_sparse.launch_order import mask_arguments

pytest.importorskip("triton", reason="Triton is not installed")
triton_kernel = pytest.importorskip("dit_accel.kernels.block_sparse.triton_forward")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
QUANTIZED = {
    "ragged": {"seq": 130, "block_size": (64, 64)},
    "text": {"seq": 130, "batch": 2, "dim": 24, "text": 40, "text_valid": (17, 0), "block_size": (64, 64)},
    "heads": {
        "seq": 130,
        "dim": 16,
        "per_head": True,
        "extra_keys": 30,
        "block_size": (64, 32),
        "strided": True,
    },
    "half": {"seq": 70, "dtype": torch.float16, "heads": 1, "block_size": (128, 128)},
    "bf16": {"seq": 70, "dtype": torch.bfloat16, "heads": 1, "dim": 128, "block_size": (64, 64)},
    "wide": {"seq": 70, "heads": 1, "dim": 256, "block_size": (64, 64)},
}
SPECIAL_ROWS = (0, 5, -1)  # attend nothing where a case has empty rows


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    seq_len: int
    head_dim: int
    dtype: str
    kv_len: int | None = None
    block_size: tuple[int, int] = (128, 64)
    per_head: bool = False
    per_sample: bool = False
    text: tuple[int, int] = (0, 0)
    text_valid: tuple[int, ...] | None = None
    empty_rows: bool = False
    layout: str = "contiguous"
    scale: float | None = None

    def __str__(self):
        changed = [f"K{self.kv_len}"] * (self.kv_len is not None)
        changed += ["{}x{}".format(*self.block_size)] * (self.block_size != (128, 64))
        changed += ["heads"] * self.per_head + ["samples"] * self.per_sample
        changed += ["text"] * (self.text_valid is not None)
        changed += ["empty"] * self.empty_rows + [self.layout] * (self.layout != "contiguous")
        changed += [f"scale{self.scale}"] * (self.scale is not None)
        sizes = f"B{self.batch}-H{self.heads}-N{self.seq_len}-D{self.head_dim}-{self.dtype}"
        return "-".join([sizes, *changed])


CASES = {
    str(case): case
    for case in (
        Case(1, 1, 1, 64, "bf16"),
        Case(1, 1, 63, 128, "bf16"),
        Case(1, 1, 128, 128, "fp16", block_size=(128, 128)),
        Case(1, 1, 387, 64, "bf16"),
        Case(1, 1, 128, 16, "fp32"),
        Case(1, 1, 63, 24, "fp16", layout="permuted"),
        Case(1, 1, 63, 1, "fp32"),
        Case(1, 1, 130, 256, "bf16"),
        Case(1, 1, 63, 256, "fp32"),
        Case(1, 1, 130, 64, "fp32", empty_rows=True),
        Case(1, 2, 300, 64, "fp16", per_head=True, empty_rows=True),
        Case(2, 2, 130, 64, "bf16", text=(100, 130), text_valid=(30, 7)),
        Case(2, 1, 200, 32, "fp16", text=(60, 190), text_valid=(0, 64), layout="permuted", empty_rows=True),
        Case(2, 2, 130, 64, "fp32", per_head=True, text=(64, 128), text_valid=(1, 40), layout="permuted"),
        Case(3, 2, 130, 32, "fp16", per_head=True, per_sample=True, text=(64, 128), text_valid=(1, 40, 64)),
        Case(1, 1, 128, 64, "bf16", kv_len=300, empty_rows=True),
        Case(2, 1, 130, 64, "fp16", kv_len=1, layout="permuted"),
        Case(1, 1, 130, 64, "bf16", block_size=(64, 32)),
        Case(1, 1, 130, 64, "fp16", block_size=(64, 128), text=(120, 125), text_valid=(2,)),
        Case(1, 1, 130, 128, "bf16", block_size=(64, 64), empty_rows=True),
        Case(2, 2, 100, 24, "fp16", layout="amid-nan"),
        Case(1, 1, 63, 64, "bf16", layout="amid-nan"),
        Case(2, 2, 100, 32, "fp16", layout="last-dim-strided"),
        Case(2, 2, 100, 32, "fp16", layout="expanded"),
        Case(1, 1, 100, 32, "fp32", scale=-0.3),
        Case(1, 1, 100, 32, "fp32", scale=0.0, empty_rows=True),
    )
}


def random_mask(case: Case) -> BlockMask:
    """Empty, full and partial blocks, about a third of each."""
    (bq, bk), kv_len = case.block_size, case.kv_len or case.seq_len
    differ = ((case.batch,) if case.per_sample else ()) + ((case.heads,) if case.per_head else ())
    kind = torch.randint(3, (*differ, -(-case.seq_len // bq), -(-kv_len // bk)))
    kind = kind.repeat_interleave(bq, -2).repeat_interleave(bk, -1)[..., : case.seq_len, :kv_len]
    mask = torch.where(kind == 2, torch.rand(kind.shape) < 0.3, kind == 1)
    mask[..., 0] = True
    if case.empty_rows:
        mask[..., SPECIAL_ROWS, :] = False
    return BlockMask.from_token_mask(mask, case.block_size, case.text)


def random_tensor(case: Case, length: int, device: str) -> torch.Tensor:
    """Normal numbers (batch, heads, length, head_dim) in the case's memory layout."""
    batch, heads, head_dim = case.batch, case.heads, case.head_dim
    shapes = {
        "contiguous": (batch, heads, length, head_dim),
        "permuted": (batch, length, heads, head_dim),
        "last-dim-strided": (batch, heads, head_dim, length),
        "expanded": (1, heads, length, head_dim),
        "amid-nan": (batch, heads, length + 64, head_dim + 8),
    }
    x = torch.randn(shapes[case.layout], dtype=torch.float64).to(device, DTYPES[case.dtype])
    if case.layout == "amid-nan":
        x[:, :, length:], x[..., head_dim:] = float("nan"), float("nan")
        return x[:, :, :length, :head_dim]
    if case.layout == "permuted":
        return x.transpose(1, 2)
    if case.layout == "last-dim-strided":
        return x.transpose(2, 3)
    return x.expand(batch, -1, -1, -1)


def plain_attention(q, k, v, keep, scale):
    """Attention and log-sum-exp in the inputs' own precision; rows that attend nothing: 0 and -inf."""
    scores = ((q @ k.transpose(-1, -2)) * scale).masked_fill(~keep, float("-inf"))
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    return scores.softmax(-1).masked_fill(~keep, 0) @ v, lse


def compare(name: str, got, plain, oracle, eps: float):
    """Error at most twice that of the plain implementation, plus eps relative to the largest value."""
    finite = oracle.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: finite where it should not be, or the reverse"
    error, allowed = ((x.double() - oracle)[finite].abs().max() for x in (got, plain))
    allowed = 2 * allowed + eps * oracle[finite].abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(name: str, device: str = "cpu"):
    """Run a case; the kernel's outputs hold NaN before it writes them."""
    from dit_accel.kernels.block_sparse import triton_forward as kernel

    case = CASES[name]
    torch.manual_seed(0)
    mask = random_mask(case)
    q, k, v = (random_tensor(case, n, device) for n in (mask.seq_len, mask.kv_len, mask.kv_len))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    text_valid = None if case.text_valid is None else torch.tensor(case.text_valid, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, device=device).isnan().all(), "outputs are not poisoned"
        out, lse = kernel.attention(q, k, v, mask.to(device), scale=scale, text_valid=text_valid)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32

    groups = mask.group_of_heads(case.batch, case.heads).expand(case.batch, case.heads)
    keep = mask.to_kernel_mask()[groups.long()]
    for sample, valid in enumerate(case.text_valid or ()):
        keep[sample, :, :, mask.text[0] + valid : mask.text[1]] = False
    keep = keep.to(device)
    plain = plain_attention(q, k, v, keep, scale)
    oracle = plain_attention(q.double(), k.double(), v.double(), keep, scale)
    oracle = oracle[0].nan_to_num(0.0), oracle[1]
    empty = ~keep.any(-1)
    assert (out[empty] == 0).all(), "out is not 0 where nothing is attended"
    assert (lse[empty] == float("-inf")).all(), "lse is not -inf where nothing is attended"
    compare("out", out, plain[0].nan_to_num(0.0), oracle[0], torch.finfo(q.dtype).eps)
    compare("lse", lse, plain[1], oracle[1], torch.finfo(torch.float32).eps)


def check_far_apart(path: str):
    """Rows 2**23 elements apart: offsets reach 2.4e9, beyond 32 bits. The file behind them is sparse."""
    from dit_accel.kernels.block_sparse import triton_forward as kernel

    length, stride, head_dim = 290, 2**23, 16
    storage = torch.from_file(path, shared=True, size=length * stride, dtype=torch.float16)
    torch.manual_seed(0)
    near = [torch.randn(1, 1, length, head_dim, dtype=torch.float16) for _ in range(3)]
    far = [storage.as_strided(x.shape, (1, 1, stride, 1), 1024 * i).copy_(x) for i, x in enumerate(near)]
    mask = BlockMask.from_token_mask(torch.ones(length, length, dtype=torch.bool), (128, 64))
    results = [kernel.attention(*qkv, mask, scale=0.25, text_valid=None) for qkv in (near, far)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b), "inputs far apart in memory give another result"


def check_text_lengths():
    """Text lengths through the public function, in every form that integers take in memory."""
    from dit_accel.kernels import block_sparse_attention

    torch.manual_seed(0)
    mask = BlockMask.from_token_mask(torch.rand(70, 70) < 0.5, (64, 32), (40, 70))
    q, k, v = torch.randn(3, 2, 1, 70, 16)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        spaced = torch.tensor([20, 30, 7, 30], dtype=dtype)
        for valid in (spaced[::2], spaced[:1].expand(2), spaced[::2].clone()):
            options = {"text_valid": valid, "return_lse": True}
            got = block_sparse_attention(q, k, v, mask, backend="triton", **options)
            expected = block_sparse_attention(q, k, v, mask, backend="reference", **options)
            torch.testing.assert_close(got, expected, msg=f"{dtype}, stride {valid.stride(0)}")


def check_numbers():
    """NaN and infinity, as tests/kernels/block_sparse/test_numbers.py has them for the other backends."""
    from number_cases import as_sdpa, check_nan, check_nothing

    places = (("q", 20, 3), ("q", 17, 0), ("k", 5, 23), ("k", 69, 1), ("v", 33, 2), ("v", 66, 20))
    for dtype in DTYPES.values():
        check_nothing("triton", dtype, (64, 32))
        for i, place in enumerate(places):
            payload = (1, 1 << 22, 1 << 9, (1 << 23) - 1, 1 << 6, 12345)[i]
            check_nan("triton", dtype, payload, i % 2 == 1, *place, (64, 32))
            value = (float("inf"), -float("inf"), 65000.0, -65000.0, 1e34, 1e-40)[i]
            as_sdpa("triton", dtype, value, *place, (64, 32))


def check_quantized(case: str, format: str):
    """As the reference; the interpreter's fp8 halves what is rounded up to a power of two."""
    import attention_cases

    slack = 0.05 if format == "int8-fp8" else 2e-4
    attention_cases.check_quantized(attention_cases.Case(**QUANTIZED[case]), "triton", format, slack)


def check_quantized_numbers():
    """What is not finite makes its query, group or channel NaN, and nothing else.

    Of fp8 only channels are looked at: the interpreter's has no NaN, the GPU's has.
    """
    from dit_accel.kernels import block_sparse_attention, quantizations

    allowed = torch.ones(128, 128, dtype=torch.bool)
    allowed[:64, 64:] = False
    mask = BlockMask.from_token_mask(allowed, (64, 64))
    for format in quantizations():
        options = {"backend": "triton", "quantization": format}
        for name, bad in (("q", float("nan")), ("k", float("inf")), ("v", float("nan"))):
            if format == "int8-fp8" and name != "v":
                continue
            given = dict(zip("qkv", torch.randn(3, 1, 1, 128, 16), strict=True))
            given[name][0, 0, 100, 5] = bad
            out = block_sparse_attention(**given, mask=mask, **options)[0, 0]
            hit = torch.zeros(128, 16, dtype=torch.bool)
            hit[{"q": (100,), "k": (slice(64, None),), "v": (slice(None), 5)}[name]] = True
            if name == "v" and format == "int8":  # 0 * NaN, as in any product of matrices, or not
                hit[:64] = ~out[:64].isfinite()
            assert torch.equal(~out.isfinite(), hit), f"{format}, {name}"
        ones = torch.full((1, 1, 128, 16), 60000.0, dtype=torch.float16)
        out = block_sparse_attention(*torch.randn(2, 1, 1, 128, 16).half(), ones, mask, **options)
        torch.testing.assert_close(out, ones, rtol=1e-3, atol=0)


def check_pv_threshold():
    """As the specification: interpreted in fp32 a launch computes a mask's blocks of 64 x 32 at once."""
    from attention_cases import THRESHOLD, far_apart

    from dit_accel.kernels import block_sparse_attention

    for format in (None, "int8", "int8-int8"):
        q, k, v, mask = far_apart((64, 32), seq=100, keys=300, dtype=torch.float32)
        options = {"quantization": format, "pv_threshold": THRESHOLD, "return_lse": True}
        got = block_sparse_attention(q, k, v, mask, backend="triton", **options)
        expected = block_sparse_attention(q, k, v, mask, backend="reference", **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
        options["pv_threshold"] = None
        plain, _ = block_sparse_attention(q, k, v, mask, backend="triton", **options)
        assert (plain - got[0]).abs().max() > 4e-3


def check_no_samples():
    from dit_accel.kernels import block_sparse_attention

    mask = BlockMask.from_token_mask(torch.rand(70, 70) < 0.5, (64, 32))
    for batch, heads in ((0, 2), (2, 0), (0, 0)):
        q, k, v = torch.randn(3, batch, heads, 70, 16)
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="triton")
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]


def check_compiled():
    """torch.compile without graph breaks, before and after the launch order is in the mask's cache."""
    from dit_accel.kernels.block_sparse import triton_forward as kernel

    torch.manual_seed(0)
    mask = BlockMask.from_token_mask(torch.rand(70, 70) < 0.5, (64, 32))
    q, k, v = torch.randn(3, 1, 2, 70, 16)

    def attention(q, k, v):
        out, lse = kernel.attention(q, k, v, mask, scale=0.25, text_valid=None)
        return out + 1, lse

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = compiled(q, k, v), attention(q, k, v)
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), "compiled and eager results differ"


@pytest.mark.parametrize("name", CASES)
def test_interpreted(interpreter, name):
    interpreter("check", name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_gpu(name):
    check(name, "cuda")


@pytest.mark.parametrize("format", ["int8", "int8-fp8", "int8-int8", "int8-int4"])
@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized(interpreter, case, format):
    interpreter("check_quantized", case, format)


def test_quantized_numbers_that_are_none(interpreter):
    interpreter("check_quantized_numbers")


def test_text_lengths_in_any_form(interpreter):
    interpreter("check_text_lengths")


def test_values_that_a_threshold_leaves_out(interpreter):
    interpreter("check_pv_threshold")


@pytest.mark.parametrize("check", ["check_numbers", "check_no_samples"])
def test_numbers_that_are_none_and_samples_that_are_none(interpreter, check):
    interpreter(check)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_than_the_current_gpu():
    with torch.cuda.device(0):
        check(next(iter(CASES)), "cuda:1")


def test_offsets_beyond_32_bits(interpreter, tmp_path):
    interpreter("check_far_apart", str(tmp_path / "sparse"))


@pytest.mark.slow
def test_compiles_without_graph_breaks(interpreter):
    interpreter("check_compiled")


def test_long_rows_of_all_heads_go_first():
    mask = torch.eye(8, dtype=torch.bool).repeat_interleave(64, 0).repeat_interleave(64, 1)
    mask[-64:] = True
    mask = BlockMask.from_token_mask(torch.stack([mask, mask.flip(0)]), (64, 64))
    rows, groups, *_ = mask_arguments(mask, batch=3, heads=2)
    (order,) = rows.tolist()
    assert order[:2] == [7, 8]
    assert order[2:] == sorted(order[2:])
    assert sorted(order) == list(range(16))
    assert groups.tolist() == [[0, 1]]
    assert mask_arguments(mask, batch=3, heads=2)[0] is rows


@pytest.mark.skipif(triton_kernel.INTERPRETED, reason="TRITON_INTERPRET is set")
def test_a_launch_asks_for_fused_multiply_add(monkeypatch):
    """From Triton 3.10 on who does not ask for it gets none."""
    launches = []
    monkeypatch.setattr(
        type(triton_kernel._forward), "run", lambda self, *a, **options: launches.append(options)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    mask = BlockMask.from_token_mask(torch.ones(128, 128, dtype=torch.bool))
    triton_kernel.attention(*torch.randn(3, 1, 1, 128, 64), mask, scale=0.125, text_valid=None)
    assert [options["enable_fp_fusion"] for options in launches] == [True]


@pytest.mark.parametrize(
    ("change", "interpreted", "words"),
    [
        ({"dtype": torch.float64}, False, "torch.float64"),
        ({"head_dim": 512}, False, "head_dim must be between 1 and 256, got 512"),
        ({"block_size": (128, 16)}, True, "got (128, 16)"),
        ({"block_size": (256, 64)}, True, "got (256, 64)"),
        ({"requires_grad": True, "quantization": "int8"}, True, "a few bits have no gradient"),
        ({"requires_grad": True, "pv_threshold": 50.0}, True, "no gradients where it skips values"),
        ({"block_size": (64, 16)}, False, "set TRITON_INTERPRET=1 before Python starts"),
    ],
    ids=["dtype", "head_dim", "key-block", "query-block", "quantized-gradients", "skipping-gradients", "cpu"],
)
def test_unavailable_says_why(change, interpreted, words, monkeypatch):
    monkeypatch.setattr(triton_kernel, "INTERPRETED", interpreted)
    asked = {"device": "cpu", "dtype": torch.bfloat16, "head_dim": 64, "block_size": (128, 64)}
    assert words in can_run("triton", **(asked | change))


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("gfx942:sramecc+:xnack-", {}, None),
        ("gfx942:sramecc+:xnack-", {"requires_grad": True}, None),
        ("gfx1100", {}, None),
        ("gfx1201", {}, None),
        ("gfx906", {}, "compiled for AMD's gfx942, gfx110x and gfx120x, got gfx906"),
        ("gfx1201", {"requires_grad": True}, "does not fit the registers of gfx1201; use backend='auto'"),
        ("gfx942", {"quantization": "int8"}, "quantizes on NVIDIA GPUs only, got gfx942"),
    ],
)
def test_amd_gpus(architecture, change, words, monkeypatch):
    monkeypatch.setattr(triton_kernel, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = types.SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    asked = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "block_size": (128, 64)}
    reason = can_run("triton", **(asked | change))
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1100", "gfx1201"])
def test_amd_gpus_have_launches_of_their_own(architecture):
    from dit_accel.kernels.block_sparse import triton_configs

    for head_dim in (1, 64, 72, 128, 256):
        for dtype in DTYPES.values():
            options = triton_configs.config(head_dim, dtype, (128, 64), architecture)
            assert options["num_stages"] == 1
            if architecture == "gfx942":
                for part in ("dq", "dkv"):
                    asked = part, "pointer", head_dim, dtype, (128, 64), architecture
                    assert triton_configs.backward_config(*asked)["num_stages"] == 1
