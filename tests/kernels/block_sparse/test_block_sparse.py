"""Every backend that runs on a CPU against float64, within twice the error of plain attention."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest
import torch
from attention_cases import LENGTHS, SHORT, VARIANTS, Case, check, error, plain

from dit_accel import BlockMask, TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.kernels import block_sparse_attention, can_run, default_block_size, support_table
from dit_accel.kernels.block_sparse import backends, flex, gather, gather_chunks, native, reference
from dit_accel.patterns import Clear


@pytest.mark.parametrize("case", LENGTHS + VARIANTS, ids=str)
@pytest.mark.parametrize("backend", ["native", "gather", "reference"])
def test_matches_the_specification(backend, case):
    if backend == "native" and case.block_size[1] % native.PANEL:
        pytest.skip("native takes key blocks of whole panels only")
    check(case, backend)


FLEX_CASES = [
    Case(300, batch=2, block_size=(128, 64)),
    Case(300, torch.bfloat16, strided=True, heads=3, per_head=True),
    Case(300, batch=2, text=40, text_valid=(17, 0)),
    Case(130, extra_keys=60),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", FLEX_CASES[1:3], ids=str)
def test_compiled_flex_matches_the_specification(case):
    """Each compiles for many seconds."""
    check_flex(case)


@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.parametrize("case", FLEX_CASES, ids=str)
def test_flex_matches_the_specification(case):
    check_flex(case)


def check_flex(case):
    if can_run("flex", device="cpu", dtype=case.dtype, head_dim=case.dim, block_size=case.block_size):
        pytest.skip("FlexAttention does not run here")
    check(case, "flex", with_lse=False)


ON_A_CPU = ["native", "gather", "reference", "flex"]
PICTURE = TokenLayout((1, 11, 13), text_len=37, text_first=True)


@pytest.mark.parametrize("text", ["last", "model"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (PICTURE, PICTURE),
        (TokenLayout((2, 7, 9), 11, offset=(2, 0, 0)), TokenLayout((5, 7, 9), 37, text_first=True)),
    ],
    ids=["picture", "chunk-of-a-video"],
)
@pytest.mark.parametrize("backend", ON_A_CPU)
@pytest.mark.usefixtures("uncompiled_flex")
def test_orders_of_queries_and_keys_and_text_anywhere(backend, queries, keys, text):
    """Moved to kernel order and back, with padded text, every backend is the pattern in the model's order."""
    if can_run(backend, device="cpu", dtype=torch.float32, head_dim=16, block_size=(32, 16)):
        pytest.skip(f"{backend} does not run here")
    pattern, valid = Clear(4), torch.tensor([5, 37])
    mask = pattern.block_mask(queries, (32, 16), "hilbert", keys=keys, text=text)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n.seq_len, 16, generator=generator) for n in (queries, keys, keys))
    moved = q[:, :, mask.order], k[:, :, mask.key_order], v[:, :, mask.key_order]
    out = block_sparse_attention(*moved, mask, text_valid=valid, backend=backend)
    allowed = pattern.token_mask(queries, keys).repeat(2, 1, 1, 1)
    for sample, length in enumerate(valid.tolist()):
        allowed[sample, :, :, keys.text_slice.start + length : keys.text_slice.stop] = False
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(out[:, :, torch.argsort(mask.order)], expected)


def test_float64_agrees():
    case = Case(300, torch.float64, batch=2, text=40, text_valid=(17, 0))
    q, k, v = case.inputs()
    expected = reference.attention(q, k, v, case.mask(), scale=64**-0.5, text_valid=case.valid())
    result = block_sparse_attention(q, k, v, case.mask(), text_valid=case.valid(), return_lse=True)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_a_full_mask_is_dense_attention(dtype):
    q, k, v = Case(257, dtype).inputs()
    mask = BlockMask.from_token_mask(torch.ones(257, 257, dtype=torch.bool), (64, 16))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    everything = torch.ones(257, 257, dtype=torch.bool)
    tolerance = 2 * error(plain(q, k, v, everything, 64**-0.5), exact) + torch.finfo(dtype).eps
    assert error(block_sparse_attention(q, k, v, mask), exact) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("backend", ["native", "gather"])
def test_uninitialised_memory_is_never_read(monkeypatch, backend, dtype):
    def poisoned(*args, _empty=torch.empty, **kwargs):
        return _empty(*args, **kwargs).fill_(math.nan)

    case = Case(300, dtype, batch=2, dim=40, text=40, text_valid=(17, 0))
    q, k, v = case.inputs()
    options = {"text_valid": case.valid(), "return_lse": True, "backend": backend}
    expected = block_sparse_attention(q, k, v, case.mask(), **options)
    monkeypatch.setattr(torch, "empty", poisoned)
    result = block_sparse_attention(q, k, v, case.mask(), **options)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 14, 1 << 30])
def test_chunking_does_not_change_the_result(monkeypatch, chunk_bytes, threads):
    monkeypatch.setattr(gather_chunks, "_CHUNK_BYTES_CPU", chunk_bytes)
    torch.set_num_threads(threads)
    check(Case(300, batch=2, heads=3, per_head=True, text=20, text_valid=(20, 3)), "gather")
    assert torch.get_num_threads() == threads


def test_many_tiles_stay_packed(monkeypatch):
    monkeypatch.setattr(gather, "_BIAS_BYTES", 0)
    check(Case(300, batch=2, text=20, text_valid=(20, 3)), "gather")


def test_key_lists_can_be_made_when_needed(monkeypatch):
    monkeypatch.setattr(gather_chunks, "_KEYS_BYTES", 0)
    check(Case(300, batch=2, heads=3, per_head=True, text=20, text_valid=(20, 3)), "gather")


@pytest.mark.parametrize("size", [1.0, 7.0, 1e4, -1e4])
@pytest.mark.parametrize("backend", ["native", "gather"])
def test_scores_of_any_size(backend, size):
    """Small ones are exponentiated as they are, large ones shifted by the largest of their row."""
    case = Case(300, batch=2, text=20, text_valid=(20, 3))
    q, k, v = case.inputs()
    q = q + size  # all of a row's scores large, together with k's mean of 1
    k = k + 1
    exact = reference.attention(
        q.double(), k.double(), v.double(), case.mask(), scale=0.125, text_valid=case.valid()
    )
    single = reference.attention(q, k, v, case.mask(), scale=0.125, text_valid=case.valid())
    got = block_sparse_attention(
        q, k, v, case.mask(), text_valid=case.valid(), return_lse=True, backend=backend
    )
    finite = exact[1].isfinite()
    assert torch.equal(got[1].isfinite(), finite)
    for mine, plain_one, truth in (
        (got[0], single[0], exact[0]),
        (got[1][finite], single[1][finite], exact[1][finite]),
    ):
        assert error(mine, truth) <= 2 * error(plain_one, truth) + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=SHORT.get)
def test_on_an_accelerator_half_precision_stays_what_it_is(monkeypatch, dtype):
    monkeypatch.setattr(gather, "_compute_dtype", lambda problem: dtype)
    check(Case(300, dtype, batch=2, text=20, text_valid=(20, 3)), "gather", with_lse=False)


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("text_valid", [(4, 0), None], ids=["padded", "all-valid"])
def test_gradients(text_valid, with_lse):
    case = Case(100, torch.float64, batch=2, dim=16, text=10, text_valid=text_valid, density=0.1)
    mask, weights = case.mask(), None
    with torch.inference_mode():  # plans made here must serve autograd later
        block_sparse_attention(*case.inputs(), mask, text_valid=case.valid())
    gradients = {}
    for backend in ("gather", "reference"):
        inputs = [x.requires_grad_() for x in case.inputs()]
        result = block_sparse_attention(
            *inputs, mask, text_valid=case.valid(), backend=backend, return_lse=with_lse
        )
        out, lse = result if with_lse else (result, None)
        weights = torch.randn_like(out) if weights is None else weights
        loss = (out * weights).sum()
        if with_lse:
            loss = loss + lse[lse.isfinite()].sum()
        gradients[backend] = torch.autograd.grad(loss, inputs)
    for got, expected in zip(gradients["gather"], gradients["reference"], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_autocast_changes_nothing_within(backend):
    """Backends say themselves in what they multiply; gradients are the same too."""
    case, answers = Case(100, torch.bfloat16, dim=16), []
    for enabled in (False, True):
        inputs = [x.requires_grad_() for x in case.inputs()]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = block_sparse_attention(*inputs, case.mask(), backend=backend)
        answers.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert all(map(torch.equal, *answers))


def test_the_plan_is_made_once_per_mask(monkeypatch):
    case = Case(300)
    mask, (q, k, v) = case.mask(), case.inputs()
    first = block_sparse_attention(q, k, v, mask, backend="gather")
    monkeypatch.setattr(gather_chunks, "_Rows", None)
    assert torch.equal(block_sparse_attention(q, k, v, mask, backend="gather"), first)


def test_scale():
    case = Case(128)
    mask, (q, k, v) = case.mask(), case.inputs()
    doubled = block_sparse_attention(q, k, v, mask, scale=0.25)
    torch.testing.assert_close(doubled, block_sparse_attention(q * 2, k, v, mask))


LENGTHS_OF_TEXT = {  # of two samples, in every form that integers take in memory
    "int64": torch.tensor([17, 3]),
    "int32": torch.tensor([17, 3], dtype=torch.int32),
    "int16": torch.tensor([17, 3], dtype=torch.int16),
    "uint8": torch.tensor([17, 3], dtype=torch.uint8),
    "every-second": torch.tensor([17, 40, 3, 40])[::2],
    "a-column": torch.tensor([[17, 40], [3, 40]], dtype=torch.int32)[:, 0],
    "expanded": torch.tensor([20]).expand(2),
    "expanded-int32": torch.tensor(20, dtype=torch.int32).expand(2),
    "list": [17, 3],
}


@pytest.mark.parametrize("valid", LENGTHS_OF_TEXT.values(), ids=LENGTHS_OF_TEXT)
@pytest.mark.parametrize("backend", ["native", "gather", "reference"])
def test_text_lengths_in_any_form(backend, valid):
    case = Case(300, batch=2, text=40)
    q, k, v = case.inputs()
    plain_valid = torch.tensor([int(n) for n in valid])
    expected = reference.attention(q, k, v, case.mask(), scale=0.125, text_valid=plain_valid)
    result = block_sparse_attention(q, k, v, case.mask(), text_valid=valid, return_lse=True, backend=backend)
    torch.testing.assert_close(result, expected)


# -- choice of the backend -----------------------------------------------------------------------------------


def test_auto_takes_native_on_a_cpu_and_says_so_once(caplog):
    backends.log_choice.cache_clear()
    case = Case(63)
    with caplog.at_level(logging.INFO, logger="dit_accel"):
        for _ in range(2):
            block_sparse_attention(*case.inputs(), case.mask())
    assert [record.message for record in caplog.records] == [
        "block_sparse_attention on cpu, torch.float32: backend 'native'"
    ]


def ask(backend="gather", device="cpu", dtype=torch.float32, head_dim=64, block_size=(64, 16), **options):
    return can_run(backend, device=device, dtype=dtype, head_dim=head_dim, block_size=block_size, **options)


def test_can_run():
    assert ask("auto") is None
    assert ask("gather", dtype=torch.float64) is None
    assert ask("reference", device="meta") is None
    assert "int32" in ask("gather", dtype=torch.int32)
    assert "int32" in ask("reference", dtype=torch.int32)
    assert "512" in ask("auto", head_dim=512)
    assert "does not compute quantization='int9'" in ask("auto", quantization="int9")
    assert "float64" in ask("flex", dtype=torch.float64)
    assert "lse" in ask("flex", return_lse=True)
    assert "backward" in ask("flex", requires_grad=True)
    assert "'mps'" in ask("flex", device="mps")
    with pytest.raises(ValueError, match=r"`backend` must be one of 'auto', 'triton', .*, got 'cudnn'"):
        ask("cudnn")


def test_flex_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(flex, "_compiler", lambda: None)
    assert "install g++ or clang++" in ask("flex")


def test_support_table_has_a_row_per_backend_and_dtype():
    table = support_table()
    assert {row["backend"] for row in table} == {backend.name for backend in backends.BACKENDS}
    plain = [row for row in table if row["backend"] in ("gather", "reference")]
    assert all(row["status"] == row["gradients"] == "yes" for row in plain)
    on_cpu = [row for row in table if row["device"] == "cpu" and row["backend"] == "flex"]
    assert not any(row["gradients"] == "yes" for row in on_cpu)


def test_default_block_sizes_can_be_used():
    for device in ("cpu", "cuda"):
        query, key = default_block_size(device)
        assert query % 16 == 0
        assert key % 8 == 0


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dit_accel.kernels as kernels\n"
        "asked = dict(device='cuda', dtype=torch.bfloat16, head_dim=64, block_size=(128, 64))\n"
        "print(kernels.can_run('triton', **asked))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Triton could not be imported" in run.stdout


# -- bad input -----------------------------------------------------------------------------------------------


THREE_HEADS = Case(128, heads=3, per_head=True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda a: a.update(q=a["q"][0]), ValueError, r"`q` must have shape \(batch, heads, seq, head_dim\)"),
        (lambda a: a.update(q=a["q"][:, :, 1:]), ValueError, "`q` has 127 tokens but .* seq_len=128"),
        (lambda a: a.update(v=a["v"][:, :, 1:]), ValueError, "`v` has 127 tokens but .* kv_len=128"),
        (lambda a: a.update(k=a["k"][:, :1]), ValueError, "`k` must agree with q"),
        (lambda a: a.update(v=a["v"].half()), TypeError, "q, k and v must have one dtype"),
        (lambda a: a.update(k=a["k"].to("meta")), ValueError, "must be on one device"),
        (lambda a: a.update(mask=None), TypeError, "`mask` must be a dit_accel.BlockMask, got NoneType"),
        (lambda a: a.update(mask=a["mask"].to("meta")), ValueError, r"move it once with mask.to\('cpu'\)"),
        (lambda a: a.update(mask=THREE_HEADS.mask()), ValueError, "is for 3 heads, got .* 2"),
        (lambda a: a.update(text_valid=torch.tensor([3])), ValueError, "the mask has no text"),
        (lambda a: a.update(backend="cudnn"), ValueError, "`backend` must be one of"),
        (lambda a: a.update(quantization="int9"), UnavailableError, "does not compute quantization='int9'"),
        (lambda a: a.update(backend="flex", return_lse=True), UnavailableError, "'flex' cannot run"),
        (lambda a: a.update({n: a[n].long() for n in "qkv"}), UnavailableError, "got torch.int64"),
        (lambda a: a.update({n: a[n].repeat(1, 1, 1, 8) for n in "qkv"}), UnavailableError, "got 512"),
    ],
)  # fmt: skip
def test_bad_input(change, kind, message):
    case = Case(128)
    arguments = dict(zip("qkv", case.inputs(), strict=True), mask=case.mask())
    change(arguments)
    with pytest.raises(kind, match=message):
        block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    "bad",
    [torch.tensor([3, 4]), torch.tensor([3.0]), torch.tensor(3), torch.tensor([True]), torch.tensor([3j])],
    ids=str,
)
def test_bad_text_valid(bad):
    case = Case(128, text=20)
    with pytest.raises(ValueError, match=r"`text_valid` must be integers of shape \(1,\)"):
        block_sparse_attention(*case.inputs(), case.mask(), text_valid=bad)
