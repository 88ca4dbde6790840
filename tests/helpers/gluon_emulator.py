"""Runs the kernel in Gluon on a CPU, as its own source: a stand-in for the language, a thread for its parts.

Gluon has no interpreter. Its module is executed with a `gl` whose tensors are PyTorch's, whose layouts mean
nothing, and whose barriers are those of the hardware: counts, expected bytes and a phase. What could go wrong
on a GPU is made to: either a copy arrives as soon as it is asked for, and a multiplication reads shared
memory only when its warps wait for it, or, with `LATE_COPIES`, copies take their time and multiplications
none. So a place that is filled or read too early gives other numbers; who waits for what never comes is told.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import itertools
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGE = "dit_accel.kernels.block_sparse"
PATIENCE = 60  # seconds that a partition waits before it is said to wait for ever
LATE_COPIES = False
DELAY = 0.003  # seconds of a late copy, thrice as many of every second one
_here = threading.local()  # of each thread: the program's number, multiplications that are under way
_changed = threading.Condition()
_copies = itertools.count()


class Dtype:
    """A type of numbers, by the name that Gluon has for it."""

    def __init__(self, torch_dtype: torch.dtype):
        self.torch, self.primitive_bitwidth = torch_dtype, 8 * torch_dtype.itemsize

    @property
    def element_ty(self) -> Dtype:
        return self


DTYPES = {
    x: Dtype(x)
    for x in (
        torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
        torch.float8_e4m3fn,
    )
}  # fmt: skip


def _plain(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


class Tensor:
    """A tensor or a number; integers are held in 64 bits, which 32 are signed in."""

    def __init__(self, data: Any, dtype: Dtype | None = None):
        self.data = torch.as_tensor(data)
        self.dtype = dtype or DTYPES.get(self.data.dtype)

    @property
    def type(self) -> Tensor:
        return self

    def is_block(self) -> bool:
        return self.data.ndim > 0

    def to(self, dtype: Dtype) -> Tensor:
        return Tensor(
            self.data.long() if dtype.torch in (torch.int32, torch.int64) else self.data.to(dtype.torch)
        )

    def expand_dims(self, dim: int) -> Tensor:
        return Tensor(self.data.unsqueeze(dim))

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data)


def _operator(name: str):
    def apply(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        other = torch.as_tensor(_plain(other))
        if name in ("__floordiv__", "__rfloordiv__") and not self.data.is_floating_point():
            a, b = (self.data, other) if name == "__floordiv__" else (other, self.data)
            return Tensor(torch.div(a, b, rounding_mode="floor"))
        return Tensor(getattr(self.data, name)(other) if hasattr(self.data, name) else NotImplemented)

    return apply


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "and",
    "rand", "or", "ror", "xor", "rxor", "lshift", "rlshift", "eq", "ne", "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(Tensor, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Places in a tensor's memory."""

    def __init__(self, x: torch.Tensor, offset: Any = 0):
        room = x.untyped_storage()
        self.memory = torch.empty(0, dtype=x.dtype).set_(room) if not offset else x
        self.offset, self.dtype = torch.as_tensor(x.storage_offset()), DTYPES[x.dtype]

    def __add__(self, other: Any) -> Pointer:
        moved = object.__new__(Pointer)
        moved.memory, moved.dtype = self.memory, self.dtype
        moved.offset = self.offset + torch.as_tensor(_plain(other))
        return moved


class Shared:
    """Shared memory, or a view of some."""

    def __init__(self, data: torch.Tensor):
        self.data, self.dtype = data, DTYPES[data.dtype]

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < len(self.data), "beyond what was allocated"
        return Shared(self.data[int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))


class BarrierError(Exception):
    """Of partitions that do not keep together."""


class Barrier:
    """One of the hardware's: a phase ends when all have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.count, self.left, self.bytes, self.phase = 0, 0, 0, 0

    def settle(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase + 1
        if self.left < 0:
            raise BarrierError("more arrived than were waited for")
        _changed.notify_all()


class Barriers:
    def __init__(self, number: int):
        self.all = [Barrier() for _ in range(number)]

    def index(self, i: Any) -> Barrier:
        assert 0 <= int(i) < len(self.all), "beyond what was allocated"
        return self.all[int(i)]


def _init(bar: Barrier, count: int) -> None:
    bar.count = bar.left = int(count)


def _wait(bar: Barrier, phase: Any) -> None:
    with _changed:
        if not _changed.wait_for(lambda: (bar.phase & 1) != int(phase), PATIENCE):
            raise BarrierError("a partition waits for ever")


def _arrive(bar: Barrier, count: int = 1) -> None:
    with _changed:
        bar.left -= count
        bar.settle()


def _expect(bar: Barrier, size: int) -> None:
    with _changed:
        bar.bytes += int(size)
        bar.left -= 1
        bar.settle()


def _fetch(desc: Any, at: list, bar: Barrier, to: Shared) -> None:
    """Copies a box; what is past the end is zeros."""
    first = [int(i) for i in at]
    box = torch.zeros(desc.block_shape, dtype=desc.base.dtype)
    part = desc.base[tuple(slice(i, i + n) for i, n in zip(first, desc.block_shape, strict=True))]
    box[tuple(slice(n) for n in part.shape)] = part

    def arrive() -> None:
        to.data.copy_(box)
        with _changed, suppress(BarrierError):  # who waits for the barrier then waits for ever
            bar.bytes -= box.numel() * box.element_size()
            bar.settle()

    if LATE_COPIES:
        threading.Timer(DELAY * (1 + 2 * (next(_copies) % 2)), arrive).start()
    else:
        arrive()


class Product:
    """A multiplication under way, which reads its operand in shared memory when it is finished."""

    def __init__(self, a: Any, b: Shared, acc: Tensor | None):
        self.a, self.b, self.acc, self.result = a, b, acc, None

    def finish(self) -> None:
        whole = self.b.data.dtype == torch.int8
        a, b = (x.data.double() if whole else x.data.float() for x in (self.a, self.b))
        product = a @ b
        self.result = Tensor(product.long() if whole else product)
        if self.acc is not None:
            self.result = Tensor(self.result.data + self.acc.data)


def _mma(a, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async, "what waits at once overlaps nothing"
    assert a.data.dtype == b.data.dtype
    product = Product(a, b, acc if use_acc else None)
    if LATE_COPIES:
        product.finish()
    _here.products.append(product)
    return product


def _mma_wait(left: int, deps: tuple) -> Any:
    while len(_here.products) > left:
        first = _here.products.pop(0)
        if first.result is None:
            first.finish()
    found = [x.result if isinstance(x, Product) else x for x in deps]
    assert not any(x is None for x in found), "a result that was not waited for"
    return found[0] if len(found) == 1 else tuple(found)


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    offset = pointer.offset
    wanted = torch.ones_like(offset, dtype=torch.bool) if mask is None else _plain(mask).expand(offset.shape)
    inside = (offset >= 0) & (offset < pointer.memory.numel())
    assert (inside | ~wanted).all(), "out of bounds"
    found = (
        pointer.memory[torch.where(wanted, offset, 0)] if pointer.memory.numel() else torch.zeros_like(offset)
    )
    found = torch.where(wanted, found, torch.as_tensor(_plain(other)).to(found.dtype))
    return Tensor(found.long() if found.dtype == torch.int32 else found)


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    wanted = mask.data.expand(pointer.offset.shape)
    pointer.memory[pointer.offset[wanted]] = value.data.to(pointer.memory.dtype)[wanted]


def _allocate(dtype: Dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    return Shared(torch.full(shape, 7, dtype=torch.float32).to(dtype.torch))  # what nobody wrote


def _warp_specialize(partitions: list, warps: list, registers: list) -> None:
    errors, program = [], _here.program

    def work(function, arguments):
        _here.program, _here.products = program, []
        try:
            function(*arguments)
            assert not _here.products, "multiplications that nobody waited for"
        except BaseException as error:  # of a thread, told to the one that waits
            errors.append(error)

    threads = [threading.Thread(target=work, args=each, daemon=True) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class _Whole(int):
    value = property(int)


class _Real(float):
    value = property(float)


def _constexpr(x: Any) -> Any:
    return _Whole(x) if isinstance(x, int) else _Real(x) if isinstance(x, float) else x


def _range(*ends: Any) -> Any:
    return (Tensor(i) for i in builtins.range(*map(int, ends)))


def _assert(condition: Any) -> None:
    assert condition


def _language() -> types.ModuleType:
    """What `gl` stands for."""
    gl: Any = types.ModuleType("gl")
    two = {"where": torch.where, "maximum": torch.maximum, "minimum": torch.minimum}
    for name, function in two.items():
        setattr(gl, name, lambda *x, f=function: Tensor(f(*(torch.as_tensor(_plain(i)) for i in x))))
    gl.exp2, gl.log2 = (lambda x: Tensor(x.data.exp2())), (lambda x: Tensor(x.data.log2()))
    gl.max, gl.sum = (lambda x, d: Tensor(x.data.amax(d))), (lambda x, d: Tensor(x.data.sum(d)))
    gl.arange = lambda first, last, layout: Tensor(torch.arange(int(first), int(last)))
    gl.full = lambda shape, value, dtype, layout: Tensor(torch.full(shape, float(value), dtype=dtype.torch))
    gl.zeros = lambda shape, dtype, layout: Tensor(torch.zeros(shape, dtype=dtype.torch))
    gl.convert_layout = lambda x, layout: x
    for name in ("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "NVMMASharedLayout"):
        setattr(gl, name, lambda *_, **__: "a layout")
    gl.load, gl.store, gl.constexpr, gl.static_assert = _load, _store, _constexpr, _assert
    gl.static_range = builtins.range
    gl.program_id, gl.num_programs = (
        (lambda d: Tensor(_here.program[0])),
        (lambda d: Tensor(_here.program[1])),
    )
    gl.allocate_shared_memory, gl.warp_specialize = _allocate, _warp_specialize
    gl.int8, gl.int32, gl.int64 = (DTYPES[x] for x in (torch.int8, torch.int32, torch.int64))
    gl.float32, gl.float8e4nv = DTYPES[torch.float32], DTYPES[torch.float8_e4m3fn]
    return gl


class Descriptor:
    def __init__(self, base: torch.Tensor, shape: list, strides: list, block_shape: list, layout: Any):
        self.base, self.block_shape, self.layout = base, block_shape, layout
        self.dtype = DTYPES[base.dtype]
        assert list(base.shape) == shape


def emulated(changes: dict[str, str] | None = None) -> Any:
    """The module `triton_gluon`, executed with the stand-in for Gluon, with `changes` of what warps do."""
    gluon, language = types.ModuleType("gluon"), _language()
    gluon.language, gluon.jit = language, lambda f=None, **_: f if f else lambda g: g
    hopper = types.ModuleType("hopper")
    hopper.mbarrier = types.SimpleNamespace(
        init=_init, wait=_wait, arrive=_arrive, expect=_expect, MBarrierLayout=lambda: "barriers"
    )
    hopper.tma = types.SimpleNamespace(async_load=_fetch)
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _mma, _mma_wait
    host = types.ModuleType("host")
    host.TensorDescriptor = Descriptor
    experimental = "triton.experimental.gluon"
    fakes = {
        experimental: gluon, f"{experimental}.language": language,
        f"{experimental}.language.nvidia.hopper": hopper, f"{experimental}.nvidia.hopper": host,
    }  # fmt: skip
    importlib.import_module(f"{PACKAGE}.triton_tma")  # with the real one
    known = {name: sys.modules.get(name) for name in (*fakes, f"{PACKAGE}.triton_gluon_warps")}
    parent = sys.modules.get("triton.experimental")
    had = getattr(parent, "gluon", None)
    sys.modules.update(fakes)
    if parent is not None:
        parent.gluon = gluon
    try:
        warps = _executed("triton_gluon_warps", changes or {})
        sys.modules[f"{PACKAGE}.triton_gluon_warps"] = warps
        return _executed("triton_gluon", {})
    finally:
        for name, module in known.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        if parent is not None:
            parent.gluon = had


def _executed(name: str, changes: dict[str, str]) -> Any:
    spec = importlib.util.find_spec(f"{PACKAGE}.{name}")
    assert spec is not None
    assert spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["range"] = _range
    source = Path(spec.origin).read_text()
    for old, new in changes.items():
        assert old in source, "the kernel is another"
        source = source.replace(old, new)
    exec(compile(source, spec.origin, "exec"), vars(module))
    return module


def launch(module: Any, grid: tuple[int], arguments: tuple, options: dict) -> None:
    """Every program of a launch, one after the other."""
    own = {"num_warps", "num_stages"}
    options = {name: value for name, value in options.items() if name not in own}

    def given(x: Any) -> Any:
        return Pointer(x) if isinstance(x, torch.Tensor) else Tensor(x) if isinstance(x, (int, float)) else x

    for program in builtins.range(grid[0]):
        _here.program = program, grid[0]
        module._forward(*map(given, arguments), **options)
