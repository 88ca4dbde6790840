"""`torch.compile` of blocks, which must trace accelerated layers without a graph break."""

import dataclasses

import pytest
import torch
import torch._dynamo

from dit_accel.runtime.switching import accelerated


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    """AnyFlow-FAR's own code needs several graphs: of its first chunk, of others and of the cache."""
    with torch._dynamo.config.patch(recompile_limit=16):
        yield
    torch.compiler.reset()


def compile_blocks(case, pipe, **options):
    """Compile one block of each kind."""
    kinds = {name.partition(".")[0]: layer for name, layer in case.layers(pipe.transformer).items()}
    for block in pipe.transformer.modules():
        if any(layer in block.children() for layer in kinds.values()):
            block.compile(fullgraph=True, **options)


@pytest.mark.feature("`torch.compile(fullgraph=True)` of a block")
def test_blocks(case):
    """At dense and sparse steps. `aot_eager` traces as inductor does and takes seconds, not minutes."""
    pipe, recipe = case.make(), dataclasses.replace(case.recipe, dense_steps=1)
    untouched = case.run(pipe)
    with accelerated(pipe, recipe):
        expected = case.run(pipe)
        compile_blocks(case, pipe, backend="aot_eager")
        case.close(case.run(pipe), expected)
    case.close(case.run(pipe), untouched)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan"])
def test_inductor(case):
    pipe = case.make()
    with accelerated(pipe, case.recipe):
        expected = case.run(pipe)
        compile_blocks(case, pipe)
        case.close(case.run(pipe), expected)
