"""Dtypes of the transformer: half precision, casting while enabled, quantized and layerwise-cast weights."""

import pytest
import torch

from dit_accel.runtime.switching import accelerated, enable

CAST = ("hidden_states", "encoder_hidden_states", "pooled_projections", "guidance", "timestep")
CAST += ("encoder_hidden_states_2", "image_embeds", "audio_hidden_states", "audio_encoder_hidden_states")
CAST += ("r_timestep", "sigma", "pose_hidden_states", "face_pixel_values")


def in_dtype(inputs: dict, dtype: torch.dtype) -> dict:
    lists = {name: [x.to(dtype) for x in inputs[name]] for name in ("x", "cap_feats") if name in inputs}
    lists |= {"kv_cache": cached(inputs, dtype)} if "kv_cache" in inputs else {}
    return inputs | lists | {name: inputs[name].to(dtype) for name in CAST if inputs.get(name) is not None}


def cached(inputs: dict, where: torch.dtype | str) -> dict:
    """The cache of keys in a dtype, or on a device."""
    layers = inputs["kv_cache"].items()
    return {layer: {name: x.to(where) for name, x in kept.items()} for layer, kept in layers}


@torch.no_grad()
def call(pipe, inputs: dict) -> torch.Tensor:
    sample = pipe.transformer(**inputs)[0]
    return (sample if isinstance(sample, torch.Tensor) else torch.stack(sample)).float()  # Z-Image's: a list


def cast(pipe, dtype: torch.dtype) -> None:
    """The transformer in a dtype; of Kandinsky 5, whose call needs it, as `from_pretrained` does it."""
    pipe.transformer.to(dtype)
    if type(pipe.transformer).__name__ != "Kandinsky5Transformer3DModel":
        return
    for name, module in pipe.transformer.named_modules():
        if name.rpartition(".")[2] in pipe.transformer._keep_in_fp32_modules:
            module.float()


def half_precision(case, dtype):
    """The error against fp32 is at most twice that of diffusers' own attention in that dtype, plus eps."""
    inputs = case.inputs()
    low = in_dtype(inputs, dtype)
    ref, pipe = case.masked(), case.make()
    exact = call(ref, inputs)
    cast(ref, dtype)
    cast(pipe, dtype)
    untouched = call(pipe, low)
    plain = call(ref, low)
    with accelerated(pipe, case.recipe):
        ours = call(pipe, low)
    largest = exact.abs().max() * torch.finfo(dtype).eps
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + largest
    assert torch.equal(call(pipe, low), untouched)


@pytest.mark.feature("bf16")
def test_bfloat16(case):
    half_precision(case, torch.bfloat16)


@pytest.mark.feature("fp16")
def test_float16(case):
    half_precision(case, torch.float16)


@pytest.mark.feature("`.to(dtype)` while enabled")
def test_cast_while_enabled(case):
    inputs, dtype = in_dtype(case.inputs(), torch.bfloat16), torch.bfloat16
    pipe, cast_first = case.make(), case.make()
    with accelerated(pipe, case.recipe):
        call(pipe, case.inputs())
        cast(pipe, dtype)
        result = call(pipe, inputs)
    cast(cast_first, dtype)
    untouched = call(cast_first, inputs)
    enable(cast_first, case.recipe)
    assert torch.equal(result, call(cast_first, inputs))
    assert torch.equal(call(pipe, inputs), untouched)


@pytest.mark.feature("`.to(device)` while enabled")
def test_moved_while_enabled(case):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pipe, inputs = case.make(), case.inputs()
    expected, untouched = call(case.masked(), inputs), call(pipe, inputs)
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    if "kv_cache" in inputs:
        on_gpu["kv_cache"] = cached(inputs, "cuda")
    with accelerated(pipe, case.recipe):
        call(pipe, inputs)
        pipe.transformer.to("cuda")
        torch.testing.assert_close(call(pipe, on_gpu).cpu(), expected, rtol=1e-3, atol=1e-3)
        pipe.transformer.to("cpu")
    assert torch.equal(call(pipe, inputs), untouched)


@pytest.mark.feature("int8 weights (torchao), quantized before enable")
def test_int8_weights(case):
    case.works(int8_weights)


@pytest.mark.feature("int8 weights (torchao), quantized while enabled")
def test_int8_weights_while_enabled(case):
    case.works(int8_weights, enabled_first=True)


def int8_weights(pipe):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


@pytest.mark.feature("Layerwise casting, before enable")
def test_layerwise_casting(case):
    case.works(fp8_storage)


@pytest.mark.feature("Layerwise casting, while enabled")
def test_layerwise_casting_while_enabled(case):
    case.works(fp8_storage, enabled_first=True)


def fp8_storage(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
