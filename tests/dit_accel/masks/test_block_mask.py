import pytest
import torch

from dit_accel import BlockMask, TokenLayout
from dit_accel.patterns import Clear, Neighborhood

LAYOUT = TokenLayout((2, 9, 14), text_len=21, text_first=True)


@pytest.fixture
def mask() -> BlockMask:
    return Clear(4).block_mask(LAYOUT, (32, 16), "tile")


@pytest.mark.parametrize("shape", [(1, 1), (63, 64), (300, 300), (200, 333), (3, 130, 130), (2, 3, 50, 90)])
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
    assert int(mask.full.index.max()) < first_text_block


def test_order_places_text_last(mask):
    assert sorted(mask.order.tolist()) == list(range(LAYOUT.seq_len))
    assert mask.order[mask.text[0] :].tolist() == list(range(21))


def test_flex_block_mask_is_the_same_mask(mask):
    flex = mask.to_flex()
    q, k = torch.meshgrid(torch.arange(mask.seq_len), torch.arange(mask.kv_len), indexing="ij")
    assert torch.equal(flex.mask_mod(0, 0, q, k), mask.to_kernel_mask()[0])
    blocks = flex.to_dense()[0, 0]
    assert torch.equal(blocks != 0, mask.block_tiles()[0] != -1)


def test_heads_may_differ():
    dense = torch.rand(3, 70, 70, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = BlockMask.from_token_mask(dense, (16, 8))
    q, k = torch.meshgrid(torch.arange(70), torch.arange(70), indexing="ij")
    assert torch.equal(
        torch.stack([mask.to_flex().mask_mod(0, torch.tensor(h), q, k) for h in range(3)]), dense
    )
    with pytest.raises(ValueError, match="`mask` is for 3 heads, got tensors with 4"):
        mask.group_of_heads(2, 4)


@pytest.mark.parametrize("block_size", [(100, 64), (128, 4), (0, 64), (128,)])
def test_unusable_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match="`block_size` must be"):
        Neighborhood(3).block_mask(LAYOUT, block_size)


def test_transposed_lists_the_query_blocks_of_every_key_block(mask):
    tiles = mask.block_tiles()[0]
    full, partial = mask.transposed()
    for column in range(mask.num_cols):
        assert full.row(0, column)[0].tolist() == (tiles[:, column] == -2).nonzero()[:, 0].tolist()
        rows, tile = partial.row(0, column)
        assert rows.tolist() == (tiles[:, column] >= 0).nonzero()[:, 0].tolist()
        assert tile.tolist() == tiles[rows.long(), column].tolist()


def test_tensors_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        made = [
            Clear(4).block_mask(LAYOUT, (32, 16)),
            BlockMask.from_token_mask(torch.ones(70, 70, dtype=torch.bool), (32, 16)),
        ]
    assert not any(x.is_inference() for mask in made for x in mask.tensors().values())


def test_memory_counts_every_tensor_once(mask):
    lists = sum(x.nbytes for lists in (mask.full, mask.partial) for x in lists.tensors().values())
    assert mask.key_order is mask.order
    assert mask.nbytes == lists + mask.tiles.nbytes + mask.order.nbytes
