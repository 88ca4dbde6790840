"""The table of measured launches: written, read back, used by the kernel, refused when damaged."""

import dataclasses
import json

import pytest
import torch

from dit_accel import BlockMask
from dit_accel.kernels.block_sparse import triton, triton_configs, tuned
from dit_accel.kernels.block_sparse.problem import Problem

ENTRY = tuned.Entry(
    "9.0", 2, 128, 64, 32, 4, 3,
    gain=1.25, gpu="a GPU", torch="2.11.0", triton="3.6.0", cuda="12.8", commit="abc",
)  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The file that the kernel reads, empty."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuned, "PATH", path)
    tuned._read.cache_clear()
    yield path
    tuned._read.cache_clear()


def write(path, **change):
    path.write_text(json.dumps({"entries": [dataclasses.asdict(ENTRY) | change]}))


def test_written_and_read_back(table):
    other = dataclasses.replace(ENTRY, head_dim=64, stages=5)
    tuned.save(table, [ENTRY, other])
    narrow = ("pointer", 64, "none", "forward")
    assert tuned.load(table) == {((9, 0), 2, 128, *narrow): ENTRY, ((9, 0), 2, 64, *narrow): other}
    newer = dataclasses.replace(ENTRY, warps=8)
    tuned.save(table, [newer])
    assert tuned.load(table) == {((9, 0), 2, 128, *narrow): newer, ((9, 0), 2, 64, *narrow): other}
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_nothing_is_measured_without_a_file(table):
    assert tuned.load(table) == {}
    assert tuned.find((9, 0), 2, 128) is None


def test_an_entry_holds_for_its_capability_bytes_and_head_dim_alone(table):
    tuned.save(table, [ENTRY])
    assert tuned.find((9, 0), 2, 128) == tuned.Launch(64, 32, 4, 3)
    assert tuned.find((9, 0), 2, 128, format="int8") is None
    for other in (((9, 1), 2, 128), ((10, 0), 2, 128), ((9, 0), 4, 128), ((9, 0), 2, 64)):
        assert tuned.find(*other) is None


def test_the_kernel_launches_as_measured(table):
    plain = triton_configs.config(128, torch.bfloat16, (128, 64), (9, 0))
    tuned.save(table, [ENTRY])
    tuned._read.cache_clear()
    measured = {"TQ": 64, "TK": 32, "num_warps": 4, "num_stages": 3}
    for head_dim in (65, 72, 128):
        for dtype in (torch.bfloat16, torch.float16):
            assert triton_configs.config(head_dim, dtype, (128, 64), (9, 0)) == measured
    other_chip = triton_configs.config(128, torch.bfloat16, (128, 64), (10, 0))
    assert other_chip == plain  # the kernel's table
    assert triton_configs.config(128, torch.float32, (128, 64), (9, 0))["TQ"] == 32


@pytest.mark.parametrize("launch", [(128, 128, 8, 2), (64, 32, 4, 8), (32, 64, 8, 1)], ids=str)
def test_every_launch_of_a_table_fits_every_mask(launch):
    for bq in triton.QUERY_BLOCKS:
        for bk in triton.KEY_BLOCKS:
            options = triton_configs.launch_options(tuned.Launch(*launch), (bq, bk))
            assert bq % options["TQ"] == bk % options["TK"] == 0


@pytest.mark.parametrize(
    ("launch", "block_size", "words"),
    [
        ((64, 16, 8, 1), (64, 64), "`keys` of a launch must be whole words of 32 bits of a mask's tile"),
        ((64, 8, 8, 1), (128, 128), "got 8; take 32, 64 or 128"),
        ((64, 48, 8, 1), (128, 96), "got 48"),
        ((64, 32, 8, 1), (64, 16), "divide blocks of 16 keys, got 32"),
        ((64, 64, 8, 1), (64, 96), "divide blocks of 96 keys, got 64"),
        (
            (48, 32, 8, 1),
            (64, 64),
            "`rows` of a launch must be 16 at least and divide blocks of 64 queries, got 48",
        ),
        ((8, 32, 8, 1), (64, 64), "got 8; take 16, 32, 64 or 128"),
    ],
    ids=str,
)
def test_tiles_that_the_kernels_would_read_wrongly_are_refused(launch, block_size, words):
    """Words of a tile have the bits of 32 keys; of fewer, a step would see those of the first."""
    with pytest.raises(ValueError, match="of a launch must") as caught:
        triton_configs.launch_options(tuned.Launch(*launch), block_size)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kernel", "table"), [("pointer", "BACKWARD_CONFIGS"), ("tma", "TMA_BACKWARD_CONFIGS")]
)
def test_a_table_of_the_backward_pass_with_such_tiles_is_refused(kernel, table, monkeypatch):
    bad = dict.fromkeys(getattr(triton_configs, table), ((64, 64, 8, 1), (64, 16, 8, 1)))
    monkeypatch.setattr(triton_configs, table, bad)
    asked = kernel, 128, torch.bfloat16, (128, 64), (9, 0)
    assert triton_configs.backward_config("dq", *asked)["TK"] == 64
    with pytest.raises(ValueError, match="whole words of 32 bits"):
        triton_configs.backward_config("dkv", *asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 48}, "`rows` must be one of 32, 64, 128, got 48"),
        ({"keys": 256}, "`keys` must be one of 32, 64, 128, got 256"),
        ({"warps": 6}, "`warps` must be one of 4, 8, got 6"),
        ({"warps": 8.0}, "`warps` must be one of 4, 8, got 8.0"),
        ({"stages": 0}, "`stages` must be one of"),
        ({"stages": "5"}, "`stages` must be one of"),
        ({"head_dim": 100}, "`head_dim` must be one of 64, 128, 256, got 100"),
        ({"element_bytes": 1}, "`element_bytes` must be one of 2, 4, got 1"),
        ({"capability": "sm_90"}, "`capability` must be like '9.0', got 'sm_90'"),
        ({"capability": 9.0}, "`capability` must be like '9.0', got 9.0"),
        ({"kernel": "fast"}, "`kernel` must be one of pointer, tma, gluon, got 'fast'"),
        ({"kernel": 1}, "`kernel` must be one of pointer, tma, gluon, got 1"),
        ({"block_keys": 32}, "`block_keys` must be one of 64, 128, got 32"),
        ({"format": "int8-int8"}, "`format` must be one of none, int8, int8-fp8, got 'int8-int8'"),
        ({"ping_pong": 1}, "`ping_pong` must be one of False, True, got 1"),
        ({"part": "dk"}, "`part` must be one of forward, dq, dkv, got 'dk'"),
        (
            {"part": "dq", "kernel": "gluon"},
            "`part` 'dq' is of the kernels 'pointer' and 'tma' with `block_keys` 64",
        ),
        ({"part": "dkv", "block_keys": 128}, "got 'pointer', 128 and 'none'"),
        ({"part": "dkv", "format": "int8"}, "got 'pointer', 64 and 'int8'"),
        ({"persistent": True}, "`ping_pong` and `persistent` are of the kernel 'gluon', got 'pointer'"),
        ({"gain": -1}, "`gain` must be a positive number, got -1"),
        ({"gpu": None}, "`gpu` must be text, got None"),
        ({"more": 1}, "exactly the fields"),
    ],
    ids=str,
)
def test_a_bad_entry_is_refused_by_name(table, change, words):
    write(table, **change)
    with pytest.raises(ValueError, match="entry 0") as caught:
        tuned.find((9, 0), 2, 128)
    assert words in str(caught.value)
    assert str(table) in str(caught.value)
    assert "measure again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"entries": {}}', '{"entries": 3}'], ids=repr)
def test_a_damaged_file_is_refused_by_name(table, text):
    table.write_text(text)
    with pytest.raises(ValueError, match="is not a table of launch configurations") as caught:
        tuned.find((8, 0), 2, 64)
    assert str(table) in str(caught.value)


def test_two_entries_for_one_key_are_refused(table):
    table.write_text(json.dumps({"entries": [dataclasses.asdict(ENTRY)] * 2}))
    with pytest.raises(ValueError, match="entry 1: there are two"):
        tuned.load(table)


def test_nothing_is_written_over_a_damaged_table(table):
    table.write_text("{")
    with pytest.raises(ValueError, match="is not a table"):
        tuned.save(table, [ENTRY])
    assert table.read_text() == "{"


TMA = dataclasses.replace(ENTRY, kernel="tma", gain=1.5)
WIDE = dataclasses.replace(TMA, block_keys=128, keys=128, gain=2.0)


def test_each_kernel_launches_as_it_was_measured(table):
    plain = triton_configs.tma_config(128, (128, 64), (9, 0))
    tuned.save(table, [ENTRY, TMA, dataclasses.replace(WIDE, rows=128)])
    tuned._read.cache_clear()
    narrow, wide = (triton_configs.tma_config(128, (128, keys), (9, 0)) for keys in (64, 128))
    assert narrow == {"TQ": 64, "TK": 32, "num_warps": 4, "num_stages": 3} != plain
    assert wide == narrow | {"TQ": 128, "TK": 128}
    assert triton_configs.tma_config(128, (128, 64), (10, 0)) == plain, "where nothing was measured"
    config = triton_configs.config(128, torch.bfloat16, (128, 128), (9, 0))
    assert config == {"TQ": 64, "TK": 32, "num_warps": 4, "num_stages": 3}, (
        "the narrow one, for want of another"
    )


def test_the_fastest_kernel_is_the_one_with_pointers_until_another_was_measured(table):
    def fastest(keys=64, dtype=torch.bfloat16, gpu=(9, 0)):
        tuned._read.cache_clear()
        return triton_configs.fastest_kernel(128, dtype, (128, keys), gpu)

    assert fastest() == "pointer"
    tuned.save(table, [ENTRY, dataclasses.replace(TMA, gain=1.2)])
    assert fastest() == "pointer"
    tuned.save(table, [TMA])
    assert fastest() == "tma"
    assert {fastest(128), fastest(dtype=torch.float32), fastest(gpu=(10, 0)), fastest(gpu="gfx942")} == {
        "pointer"
    }
    tuned.save(table, [WIDE])
    assert fastest(128) == "tma"


def test_parts_of_the_backward_pass_launch_as_they_were_measured(table):
    def config(part, kernel, keys=64, dtype=torch.bfloat16, gpu=(9, 0)):
        return triton_configs.backward_config(part, kernel, 128, dtype, (128, keys), gpu)

    def fastest(part, keys=64, dtype=torch.bfloat16, gpu=(9, 0)):
        return triton_configs.fastest_kernel(128, dtype, (128, keys), gpu, part=part)

    plain = {(part, kernel): config(part, kernel) for part in ("dq", "dkv") for kernel in ("pointer", "tma")}
    assert {fastest("dq"), fastest("dkv")} == {"pointer"}
    slow = dataclasses.replace(ENTRY, rows=32, keys=64, gain=1.1, part="dq")
    fast = dataclasses.replace(ENTRY, rows=32, warps=8, kernel="tma", gain=1.3, part="dkv")
    tuned.save(table, [ENTRY, WIDE, slow, dataclasses.replace(slow, kernel="tma", gain=0.9), fast])
    tuned._read.cache_clear()
    assert (fastest("dq"), fastest("dkv"), fastest("forward")) == ("pointer", "tma", "pointer")
    assert fastest("dkv", 128) == "tma", "tiles are the same on wider blocks"
    assert {
        fastest("dkv", dtype=torch.float32),
        fastest("dkv", gpu=(10, 0)),
        fastest("dkv", gpu="gfx942"),
    } == {"pointer"}
    assert (
        config("dq", "pointer")
        == {"TQ": 32, "TK": 64, "num_warps": 4, "num_stages": 3}
        != plain["dq", "pointer"]
    )
    measured = {"TQ": 32, "TK": 32, "num_warps": 8, "num_stages": 3}
    assert config("dkv", "tma") == config("dkv", "tma", 128) == measured != plain["dkv", "tma"]
    assert config("dkv", "pointer") == plain["dkv", "pointer"], "which was not measured"
    assert triton_configs.tma_config(128, (128, 64), (9, 0))["TQ"] == 128, "the forward pass has its own"
    assert triton.block_sizes(torch.device("cpu")) == {(128, 64): 1.0}


@pytest.mark.usefixtures("hopper")
def test_gradients_take_the_fastest_kernel_of_each_part_where_it_can(table):
    gradients = pytest.importorskip("dit_accel.kernels.block_sparse.triton_gradients")
    mask = BlockMask.from_token_mask(torch.ones(70, 70, dtype=torch.bool), (128, 64))
    lse = torch.zeros(1, 1, 70)

    def ways(x, dout=None, kernel=None, launch=None):
        dout = x if dout is None else dout
        given = gradients.Given(x, x, x, dout, lse, lse, mask, 1.0, None)
        return [gradients.way(part, given, kernel, launch)[0] for part in ("dq", "dkv")]

    half = torch.zeros(1, 1, 70, 128, dtype=torch.float16)
    assert ways(half) == ["pointer", "pointer"]
    tuned.save(table, [dataclasses.replace(ENTRY, part=part) for part in ("dq", "dkv")])
    tuned.save(table, [dataclasses.replace(TMA, part="dkv")])
    tuned._read.cache_clear()
    assert ways(half) == ["pointer", "tma"]
    assert ways(half.float()) == ["pointer", "pointer"], "it was measured in 16 bits"
    odd = torch.zeros(1, 1, 70, 132, dtype=torch.float16)[..., 4:]
    assert ways(odd) == ways(half, odd) == ["pointer", "pointer"], "it would be copied"
    assert ways(odd, kernel="tma") == ["tma", "tma"], "asked for"
    assert ways(half, launch=tuned.Launch(64, 64, 4, 2, "tma", part="dq")) == ["tma", "tma"]
    assert ways(half, launch=tuned.Launch(64, 64, 4, 2, part="dkv")) == ["pointer", "pointer"]


def test_int8_launches_as_it_was_measured(table):
    from dit_accel.kernels.block_sparse.formats import FORMATS

    int8 = FORMATS["int8"]
    both = dataclasses.replace(
        ENTRY, rows=128, keys=64, kernel="gluon", format="int8", ping_pong=True, persistent=True, gain=1.7
    )
    quantized = dataclasses.replace(ENTRY, format="int8", stages=4)
    tuned.save(table, [ENTRY, TMA, dataclasses.replace(TMA, format="int8", stages=2), both, quantized])
    tuned._read.cache_clear()
    options = {"TQ": 128, "TK": 64, "num_warps": 4, "num_stages": 3, "PING_PONG": True, "PERSISTENT": True}
    assert triton_configs.gluon_config(128, (128, 64), (9, 0), int8) == options
    plain = options | {"num_warps": 8, "PING_PONG": False, "PERSISTENT": False}
    assert triton_configs.gluon_config(128, (128, 64), (9, 0)) == plain, "16 bits were not measured"
    assert triton_configs.tma_config(128, (128, 64), (9, 0), int8)["num_stages"] == 2
    assert triton_configs.tma_config(128, (128, 64), (9, 0))["num_stages"] == 3
    half = torch.float16
    assert triton_configs.quantized_config(128, half, int8, (128, 64), (9, 0))["num_stages"] == 4
    fp8 = FORMATS["int8-fp8"]
    assert triton_configs.quantized_config(128, half, fp8, (128, 64), (9, 0))["num_stages"] == 5
    fastest = {
        format: triton_configs.fastest_kernel(128, half, (128, 64), (9, 0), format)
        for format in (None, "int8", "int8-fp8")
    }
    assert fastest == {None: "tma", "int8": "gluon", "int8-fp8": "pointer"}
    assert triton_configs.fastest_kernel(128, half, (64, 64), (9, 0), "int8") == "tma", "Gluon takes 128 rows"


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that no kernel is launched on: the names of those that would have been, in order."""
    kernel, tma = (
        pytest.importorskip(f"dit_accel.kernels.block_sparse.triton_{n}") for n in ("forward", "tma")
    )
    if kernel.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    called = []
    for name, module in (("pointer", kernel), ("tma", tma)):
        monkeypatch.setattr(module, "attention", lambda q, *_, name=name, **__: (called.append(name), q))
    return called


@pytest.mark.usefixtures("table")
def test_the_backend_takes_the_fastest_kernel_where_it_can(table, hopper):
    tuned.save(table, [ENTRY, TMA])
    mask = BlockMask.from_token_mask(torch.ones(70, 70, dtype=torch.bool), (128, 64))

    def ask(x, **options):
        problem = Problem("cuda", x.dtype, 128, (128, 64), **options)
        triton.attend(x, x, x, mask, problem, scale=1.0, text_valid=None)
        return hopper.pop()

    x = torch.zeros(1, 1, 70, 128, dtype=torch.float16)
    assert ask(x) == "tma"
    assert ask(x, pv_threshold=50.0) == "pointer"
    assert ask(x.float()) == "pointer", "it was measured in 16 bits"
    assert ask(torch.zeros(1, 1, 70, 132, dtype=torch.float16)[..., 4:]) == "pointer", "it would be copied"
    tuned.save(table, [dataclasses.replace(TMA, gain=0.9)])
    tuned._read.cache_clear()
    assert ask(x) == "pointer"


def test_int8_is_computed_by_the_fastest_kernel_too(table, hopper, monkeypatch):
    from dit_accel.kernels.block_sparse import triton_quantized

    asked = []
    monkeypatch.setattr(
        triton_quantized, "quantized_attention", lambda q, *_, kernel, **__: (asked.append(kernel), q)
    )
    tuned.save(table, [ENTRY, dataclasses.replace(TMA, format="int8")])
    mask = BlockMask.from_token_mask(torch.ones(70, 70, dtype=torch.bool), (128, 64))
    x = torch.zeros(1, 1, 70, 128, dtype=torch.float16)
    odd = torch.zeros(1, 1, 70, 132, dtype=torch.float16)[..., 4:]
    for q, v, format in ((x, x, "int8"), (odd, x, "int8"), (x, odd, "int8"), (x, x, "int8-fp8")):
        problem = Problem("cuda", x.dtype, 128, (128, 64), quantization=format)
        triton.attend(q, x, v, mask, problem, scale=1.0, text_valid=None)
    assert asked == ["tma", "tma", "pointer", "pointer"], "codes of q and k are new tensors, v stays as it is"
    assert hopper == []


def test_where_gluon_fails_the_copy_engine_stays_and_it_is_said_once(table, hopper, monkeypatch, caplog):
    gluon = pytest.importorskip("dit_accel.kernels.block_sparse.triton_gluon")
    tuned.save(table, [ENTRY, dataclasses.replace(TMA, kernel="gluon")])
    monkeypatch.setattr(gluon, "attention", lambda q, *_, **__: (hopper.append("gluon"), q))
    x, launched = torch.zeros(1, 1, 70, 128, dtype=torch.float16), []
    triton._say_once.cache_clear()
    for block_size, reason in (
        ((128, 64), None),
        ((64, 64), None),
        *[((128, 64), "CompilationError: x")] * 2,
    ):
        mask = BlockMask.from_token_mask(torch.ones(70, 70, dtype=torch.bool), block_size)
        monkeypatch.setattr(gluon, "failure", lambda *_, reason=reason: reason)
        problem = Problem("cuda", x.dtype, 128, block_size)
        triton.attend(x, x, x, mask, problem, scale=1.0, text_valid=None)
        launched.append(hopper.pop())
    assert launched == ["gluon", "tma", "tma", "tma"]
    assert [record.message for record in caplog.records] == [
        "the Gluon kernel, measured to be the fastest, gives way to the TMA kernel: CompilationError: x"
    ]


@pytest.mark.usefixtures("hopper")
def test_wide_blocks_are_tried_once_their_time_was_measured(table):
    device = torch.device("cuda")
    assert triton.block_sizes(device) == {(128, 64): 1.0}
    tuned.save(table, [ENTRY, TMA, dataclasses.replace(WIDE, head_dim=64)])
    tuned._read.cache_clear()
    assert triton.block_sizes(device) == {(128, 64): 1.0}
    tuned.save(table, [WIDE])
    tuned._read.cache_clear()
    assert triton.block_sizes(device) == {(128, 64): 1.0, (128, 128): pytest.approx(1.5 / 2.0)}
    assert triton.block_sizes(torch.device("cpu")) == {(128, 64): 1.0}


def test_the_committed_table_is_sound():
    tuned.load(tuned.PATH)
