"""Mask files that lie: bytes changed at random, and contents changed at random under a checksum that fits.

Run as a program under AddressSanitizer, with a folder and a range of seeds, it writes such files, loads them
and attends with those that load; without arguments it does what the sanitizer must find.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save

from dit_accel import BlockMask, TokenLayout, tensor_files
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import cpp_library
from dit_accel.masks import mask_files
from dit_accel.masks.per_head import join_heads
from dit_accel.patterns import Clear, Dense, Neighborhood

LONGEST = 2_000  # queries and keys of a mask that is attended with
NUMBERS = (-(2**31), -1, 0, 1, 2, 7, 15, 16, 17, 255, 2**31 - 1, 2**31, 2**40, 2**63, 10**30)
DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.bfloat16, torch.bool)


def masks() -> list[BlockMask]:
    """Small masks of all sorts: text, orders, heads, samples, room to spare, lengths that differ."""
    layout = TokenLayout((1, 7, 9), text_len=21, text_first=True)
    patterns = {i: p.block_mask(layout, (32, 16), "raster") for i, p in enumerate([Clear(3), Dense()])}
    selected = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    keys, chunk = TokenLayout((4, 5, 6), 7), TokenLayout((1, 5, 6), offset=(2, 0, 0))
    return [
        Clear(3).block_mask(layout, (32, 16), "hilbert"),
        Neighborhood((3, 5)).block_mask(chunk, (16, 16), "tile", keys=keys),
        join_heads(patterns, [0, 1, 0]),
        BlockMask.from_blocks(selected, block_size=(16, 16), seq_len=75, kv_len=110, text=(60, 110)),
    ]


def damaged(mask: BlockMask, seed: int) -> bytes:
    """The file of a mask with something wrong, or at least another, in it."""
    draw = random.Random(seed)
    tensors = {name: x.clone() for name, x in mask.tensors().items()}
    fields = {n: getattr(mask, n) for n in ("block_size", "seq_len", "kv_len", "text")}
    if draw.random() < 0.3:
        return changed_bytes(signed(tensors, fields), draw)
    for _ in range(draw.choice((1, 1, 2, 3))):
        if draw.random() < 0.3:
            change_field(fields, draw)
        else:
            change_tensor(tensors, draw)
    return signed(tensors, fields)


def signed(tensors: dict[str, torch.Tensor], fields: dict) -> bytes:
    """A file of these contents, whatever they are, with their checksum."""
    described = json.dumps(fields)
    checksum = tensor_files.checksum(tensors, described)
    return save(tensors, {"format": mask_files.FORMAT, "fields": described, "sha256": checksum})


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    data = bytearray(data)
    kind = draw.choice(("flip", "header", "cut", "insert"))
    if kind == "cut":
        return bytes(data[: draw.randrange(len(data))])
    if kind == "insert":
        at = draw.randrange(len(data))
        return bytes(data[:at] + draw.randbytes(draw.randint(1, 9)) + data[at:])
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(data), 700) if kind == "header" else len(data))
        data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


def change_field(fields: dict, draw: random.Random) -> None:
    name = draw.choice(list(fields))
    number = draw.choice(NUMBERS) if draw.random() < 0.5 else draw.randint(-5, 200)
    if name in ("block_size", "text") and name in fields and isinstance(fields[name], tuple):
        pair = list(fields[name])
        pair[draw.randrange(2)] = number
        fields[name] = draw.choice((tuple(pair), tuple(pair), number, None, [*pair, number]))
    else:
        fields[name] = draw.choice((number, number, number, str(number), float(number), True, None, [number]))


def change_tensor(tensors: dict[str, torch.Tensor], draw: random.Random) -> None:
    name = draw.choice(list(tensors))
    x = tensors[name]
    kind = draw.choice(("value", "value", "value", "values", "shape", "dtype", "rows", "drop", "add"))
    if kind in ("value", "values") and x.numel():
        flat = x.flatten()
        for _ in range(1 if kind == "value" else 9):
            limits = torch.iinfo(x.dtype) if x.dtype in DTYPES[:4] else torch.iinfo(torch.uint8)
            at = draw.randrange(len(flat))
            near = int(flat[at]) + draw.choice((-1, 1))
            number = draw.choice((near, near, draw.randint(-2, 12), draw.choice(NUMBERS)))
            flat[at] = min(max(number, limits.min), limits.max)
        tensors[name] = flat.view(x.shape)
    elif kind == "shape":
        tensors[name] = draw.choice((x[None], x.flatten(), x[:0], x.flatten()[:1].sum(dtype=x.dtype)))
    elif kind == "dtype":
        tensors[name] = x.to(draw.choice(DTYPES))
    elif kind == "rows" and x.ndim:
        tensors[name] = draw.choice((x[1:], x[:-1], torch.cat([x, x[-1:]]), x.flip(0))).contiguous()
    elif kind == "drop":
        del tensors[name]
    elif kind == "add":
        other = draw.choice(("head_groups", "order", "key_order", "full.tile", "else"))
        count = draw.choice((1, 2, 3, 63, 75, 84, 110, 127))
        dtype = torch.int64 if "order" in other else torch.int32
        tensors[other] = torch.randperm(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    else:
        tensors[name] = x.clone()
    if not tensors:
        tensors["else"] = torch.zeros(1)


def outcome(path: Path, backend: str = "native") -> str:
    """What becomes of a file: refused with a ValueError, attended with, or valid but too long for that."""
    try:
        mask = BlockMask.load(path)
    except ValueError:
        return "refused"
    if max(mask.seq_len, mask.kv_len) > LONGEST:
        return "too long"
    shape = (1, 2) if mask.head_groups is None else (1, *mask.head_groups.shape)[-2:]
    if 0 in shape:
        return "no heads"
    lengths, generator = (mask.seq_len, mask.kv_len, mask.kv_len), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, n, 8, generator=generator) for n in lengths)
    if mask.block_size[1] % 16 and backend == "native":
        backend = "gather"
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*inputs, mask, backend=backend, return_lse=True)
    if not out.isfinite().all() or lse.isnan().any():
        raise AssertionError(f"{path}: the output is not finite")
    if not all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs)):
        raise AssertionError(f"{path}: a gradient is not finite")
    return "attended"


def outcomes(folder: Path, seeds: range) -> Counter:
    """How often each came of damaged files, written to a folder one after another."""
    sound, found, path = masks(), Counter(), folder / "mask.safetensors"
    for seed in seeds:
        path.write_bytes(damaged(sound[seed % len(sound)], seed))
        found[outcome(path)] += 1
    return found


def attend_out_of_bounds() -> None:
    """With a mask that nobody has looked into: what the sanitizer must find."""
    mask = masks()[0]
    far = replace(mask.partial, index=mask.partial.index + 10_000)
    q = torch.zeros(1, 1, mask.seq_len, 8)
    block_sparse_attention(q, q, q, replace(mask, partial=far).trusted(), backend="native")


if __name__ == "__main__":
    torch.set_num_threads(1)
    cpp_library.FLAGS += ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    if len(sys.argv) == 1:
        attend_out_of_bounds()
    else:
        print(json.dumps(outcomes(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])))))
