"""Fused query, key and value projections."""

import pytest
import torch
from fused_projections import CANNOT_FUSE

from dit_accel.runtime.switching import accelerated, disable, enable

REPLACED = {"sd3": "FusedJointAttnProcessor2_0", "cogvideox": "FusedCogVideoXAttnProcessor2_0"}
PLAIN_SD3 = {"dual_attention_layers": (), "qk_norm": None}  # all that diffusers' fused processor can do


def fuse(pipe):
    pipe.transformer.fuse_qkv_projections()


def unfused(pipe):
    fuse(pipe)
    pipe.transformer.unfuse_qkv_projections()


def config(case):
    return PLAIN_SD3 if case.family == "sd3" else {}


def fuses_nothing(case, cell) -> bool:
    """HunyuanVideo's attention is of the class that `fuse_qkv_projections` passes over."""
    if case.family in CANNOT_FUSE:
        error, match, why = CANNOT_FUSE[case.family]
        with pytest.raises(error, match=match):
            case.untouched(fuse)
        cell.no_such_thing(why)
        return True
    fuses = hasattr(case.make().transformer, "fuse_qkv_projections")
    pipe = case.untouched(fuse) if fuses else case.make()
    if not any(hasattr(module, "to_qkv") for module in pipe.transformer.modules()):
        cell.no_such_thing("diffusers fuses nothing here")
        return True
    return False


@pytest.mark.feature("QKV projections fused before enable")
def test_fused_before(case, cell):
    if not fuses_nothing(case, cell):
        case.works(fuse, config=config(case))


@pytest.mark.feature("QKV projections fused while enabled")
def test_fused_while_enabled(case, cell):
    if fuses_nothing(case, cell):
        return
    if case.family not in REPLACED:
        case.works(fuse, enabled_first=True)
        return
    pipe = case.make(**config(case))
    dense = case.run(pipe)
    enable(pipe, case.recipe)
    fuse(pipe)
    replaced = rf"replaced by {REPLACED[case.family]} .* `dit_accel.disable` .* and enable again"
    with cell.refused(RuntimeError, replaced, "diffusers replaces the processors; fuse before enable"):
        case.run(pipe)
    disable(pipe)
    pipe.transformer.unfuse_qkv_projections()  # puts back the processors that it found when it fused
    assert torch.equal(case.run(pipe), dense)
    with accelerated(pipe, case.recipe):
        assert not torch.allclose(case.run(pipe), dense, atol=1e-3)
    assert torch.equal(case.run(pipe), dense)


@pytest.mark.feature("QKV projections unfused while enabled")
def test_unfused_while_enabled(case, cell):
    if fuses_nothing(case, cell):
        return
    if case.family != "sd3":
        case.works(unfused, enabled_first=True)
        return
    pipe = case.make(**PLAIN_SD3)
    fuse(pipe)
    enable(pipe, case.recipe)
    pipe.transformer.unfuse_qkv_projections()
    replaced = r"replaced by JointAttnProcessor2_0 .* `dit_accel.disable` .* and enable again"
    with cell.refused(RuntimeError, replaced, "diffusers replaces the processors; unfuse before enable"):
        case.run(pipe)
