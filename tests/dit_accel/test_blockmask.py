import pytest
import torch

from dit_accel import BlockMask, TokenLayout
from dit_accel.patterns import Clear, Neighborhood

LAYOUT = TokenLayout((2, 9, 14), text_len=21, text_first=True)


@pytest.fixture
def mask() -> BlockMask:
    return Clear(4).block_mask(LAYOUT, (32, 16), "tile")


def same(a: BlockMask, b: BlockMask) -> bool:
    tensors = ("full_ptr", "full_idx", "part_ptr", "part_idx", "part_tile", "tiles", "order")
    return a.block_size == b.block_size and a.text == b.text and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in tensors
    )  # fmt: skip


def test_round_trip_through_a_file(mask, tmp_path):
    mask.save(tmp_path / "mask.safetensors")
    assert same(mask, BlockMask.load(tmp_path / "mask.safetensors"))


def test_loading_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no block mask file"):
        BlockMask.load(tmp_path / "missing")
    (tmp_path / "text").write_text("not a mask")
    with pytest.raises(ValueError, match="not a safetensors file"):
        BlockMask.load(tmp_path / "text")


@pytest.mark.parametrize("shape", [(1, 1), (63, 64), (300, 300), (200, 333), (3, 130, 130)])
def test_token_mask_round_trip(shape):
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.2
    dense[..., : dense.shape[-2] // 2, : dense.shape[-1] // 2] = True
    mask = BlockMask.from_token_mask(dense, (32, 16))
    assert torch.equal(mask.to_token_mask(), dense)
    assert mask.density == pytest.approx(dense.double().mean().item(), abs=1e-12)


def test_density_counts_pairs_and_block_density_blocks(mask):
    dense = mask.to_token_mask()
    assert mask.density == pytest.approx(dense.double().mean().item(), abs=1e-12)
    assert mask.block_density == (mask.num_full + mask.num_partial) / (mask.num_rows * mask.num_cols)
    assert mask.density < mask.block_density


def test_tiles_are_distinct_and_text_blocks_partial(mask):
    assert len(mask.tiles.flatten(1).unique(dim=0)) == len(mask.tiles)
    assert len(mask.tiles) < mask.num_partial
    first_text_block = mask.text[0] // mask.block_size[1]
    assert int(mask.full_idx.max()) < first_text_block


def test_order_places_text_last(mask):
    assert sorted(mask.order.tolist()) == list(range(LAYOUT.seq_len))
    assert mask.order[mask.text[0] :].tolist() == list(range(21))


def test_flex_block_mask_is_the_same_mask(mask):
    flex = mask.to_flex()
    q, k = torch.meshgrid(torch.arange(mask.seq_len), torch.arange(mask.kv_len), indexing="ij")
    assert torch.equal(flex.mask_mod(0, 0, q, k), mask.to_kernel_mask()[0])
    blocks = flex.to_dense()[0, 0]
    full_rows, part_rows = mask.block_rows()
    expected = torch.zeros_like(blocks)
    expected[full_rows, mask.full_idx.long()] = 1
    expected[part_rows, mask.part_idx.long()] = 1
    assert torch.equal(blocks, expected)


def test_heads_may_differ():
    dense = torch.rand(3, 70, 70, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = BlockMask.from_token_mask(dense, (16, 8))
    q, k = torch.meshgrid(torch.arange(70), torch.arange(70), indexing="ij")
    assert torch.equal(
        torch.stack([mask.to_flex().mask_mod(0, torch.tensor(h), q, k) for h in range(3)]), dense
    )
    with pytest.raises(ValueError, match="this mask is for 3 heads, got tensors with 4"):
        mask.group_of_heads(4)


@pytest.mark.parametrize("block_size", [(100, 64), (128, 4), (0, 64), (128,)])
def test_unusable_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match="`block_size` must be"):
        Neighborhood(3).block_mask(LAYOUT, block_size)
