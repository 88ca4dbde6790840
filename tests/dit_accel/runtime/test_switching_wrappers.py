"""Transformers and blocks in wrappers: what is unwrapped works, and what cannot be is named."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig, TensorParallelConfig
from left_behind import state_of
from torch import nn
from torch._dynamo.testing import CompileCounter

from dit_accel.errors import UnavailableError
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable, handle_of
from dit_accel.summary import summary

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])
OTHER = {"flux": [(10, 12), (12, 6)], "wan": [(4, 6, 8), (3, 5, 9)]}
OTHER |= {"sd3": OTHER["flux"], "hunyuan": OTHER["wan"]}


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


@pytest.fixture
def recipe(family):
    return Recipe(Clear(3) if family in ("flux", "sd3") else Neighborhood((3, 3, 3)), order="hilbert")


@pytest.fixture
def _compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def called(module, inputs):
    with torch.no_grad():
        return module(**inputs)[0]


# -- blocks ------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Hides a block behind another name, as wrappers of offloading and parallel training do."""

    def __init__(self, block):
        super().__init__()
        self.inner = block

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def wrap(transformer):
    for blocks in family_of(transformer).blocks(transformer):
        for i, block in enumerate(blocks):
            blocks[i] = Wrapper(block)


def hide_attention(transformer):
    """The attention modules, not the blocks, in wrappers."""
    for blocks in family_of(transformer).blocks(transformer):
        for block in blocks:
            name = "attn1" if hasattr(block, "attn1") else "attn"
            setattr(block, name, Wrapper(getattr(block, name)))


@FAMILIES
@pytest.mark.parametrize("hide", [wrap, hide_attention], ids=lambda hide: hide.__name__)
def test_wrapped_blocks_are_refused(case, recipe, hide):
    hide(case.pipe.transformer)
    untouched, before = case.run(case.pipe), state_of(case.pipe.transformer)
    for target in (case.pipe, case.pipe.transformer):
        with pytest.raises(UnavailableError, match=r"are not those of diffusers .* enable first and wrap"):
            enable(target, recipe)
        with pytest.raises(UnavailableError, match="are not those of diffusers"):
            summary(target)
    assert state_of(case.pipe.transformer) == before
    assert torch.equal(case.run(case.pipe), untouched)


@FAMILIES
def test_blocks_wrapped_while_enabled(case, recipe):
    """As the error says: enable first, wrap after that."""
    untouched = case.run(case.pipe)
    enable(case.pipe, recipe)
    expected = case.run(case.pipe)
    if case.pipe.transformer.config.get("dual_attention_layers") is None:
        wrap(case.pipe.transformer)
        assert torch.equal(case.run(case.pipe), expected)
        assert summary(case.pipe).rows
        disable(case.pipe)
        assert torch.equal(case.run(case.pipe), untouched)


# -- transformers ------------------------------------------------------------------------------------------


@FAMILIES
def test_peft_model(case, recipe):
    pipe, inputs = case.pipe, case.inputs(case.pipe)
    config = peft.LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False, r=4)
    model = peft.get_peft_model(pipe.transformer, config)
    untouched = called(model, inputs)
    handle = enable(model, recipe)
    assert handle_of(model) is handle
    assert handle.transformers == [model.get_base_model()]
    actual = called(model, inputs)
    disable(model)
    assert torch.equal(called(model, inputs), untouched)
    with accelerated(model.get_base_model(), recipe):
        assert torch.equal(called(model, inputs), actual)
    assert not torch.allclose(actual, untouched, atol=1e-3)


@FAMILIES
def test_distributed_data_parallel(case, recipe, tmp_path):
    inputs = case.inputs(case.pipe)

    def gradient(module):
        module.zero_grad()
        module(**inputs)[0].square().mean().backward()
        transformer = getattr(module, "module", module)
        return next(iter(family_of(transformer).layers(transformer).values())).to_q.weight.grad.clone()

    with accelerated(case.pipe.transformer, recipe):
        expected = gradient(case.pipe.transformer)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        module = nn.parallel.DistributedDataParallel(case.pipe.transformer, find_unused_parameters=True)
        with accelerated(module, recipe) as handle:
            torch.testing.assert_close(gradient(module), expected, rtol=1e-4, atol=1e-7)
            assert handle.stats()["calls"] == 1
        assert handle_of(module) is None
    finally:
        dist.destroy_process_group()


@FAMILIES
def test_data_parallel_is_named(case, recipe):
    with pytest.raises(TypeError, match=r"DataParallel runs copies .* pass its `\.module`"):
        enable(nn.DataParallel(case.pipe.transformer), recipe)


@pytest.mark.parametrize("family", ["flux", "wan"])
@pytest.mark.usefixtures("_compiled")
class TestCompiled:
    def test_transformer(self, case, recipe):
        """Compiled before or after; a pipeline may hold the compiled one."""
        pipe, original = case.pipe, case.pipe.transformer
        with accelerated(original, recipe):
            expected = case.run(pipe)
        pipe.transformer = torch.compile(original, backend="eager")
        for target in (pipe, pipe.transformer, original):
            with accelerated(target, recipe):
                torch.testing.assert_close(case.run(pipe), expected, rtol=1e-4, atol=1e-5)
            assert handle_of(original) is None

    def test_one_graph_for_all_sizes(self, case, recipe, family):
        """`dynamic=True` compiles as often as for an untouched transformer: not again for each size."""
        graphs = {}
        for enabled in (False, True):
            torch.compiler.reset()
            counter, pipe = CompileCounter(), case.make()
            if enabled:
                enable(pipe, recipe)
            for blocks in family_of(pipe.transformer).blocks(pipe.transformer):
                blocks[0].compile(backend=counter, dynamic=True)
            case.run(pipe)
            first = counter.frame_count
            for grid in OTHER[family]:
                case.run(pipe, grid=grid)
            graphs[enabled] = first, counter.frame_count
        assert graphs[True][0] == graphs[False][0] > 0
        assert graphs[True][1] <= graphs[False][1]

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_is_refused(self, case, recipe, strict):
        inputs = case.inputs(case.pipe)
        for attention in (recipe, Dense()):
            with (
                accelerated(case.pipe.transformer, attention),
                pytest.raises(
                    Exception, match=r"`torch\.export` cannot write down; call `dit_accel.disable`"
                ),
            ):
                torch.export.export(case.pipe.transformer, (), inputs, strict=strict)


# -- several devices ---------------------------------------------------------------------------------------

PARALLEL = {
    "ring": ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2)),
    "tensor": ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2)),
}


@FAMILIES
@pytest.mark.parametrize("kind", PARALLEL)
def test_parallelism_is_refused(case, recipe, kind):
    """Before anything else: inputs that no call could read get the same error."""
    transformer, before = case.pipe.transformer, state_of(case.pipe.transformer)
    untouched = case.run(case.pipe)
    message = rf"{kind} .* is not supported in accelerated layers.* make every layer dense"
    transformer._parallel_config = PARALLEL[kind]
    with pytest.raises(UnavailableError, match=message):
        enable(case.pipe, recipe)
    with accelerated(case.pipe, Dense()):
        pass
    transformer._parallel_config = None
    with accelerated(case.pipe, recipe):
        transformer._parallel_config = PARALLEL[kind]
        with pytest.raises(UnavailableError, match="call `enable` again"):
            transformer(SimpleNamespace(shape=()), timestep=None)
        transformer._parallel_config = None
    del transformer._parallel_config
    assert state_of(transformer) == before
    assert torch.equal(case.run(case.pipe), untouched)
