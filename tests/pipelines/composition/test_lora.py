"""LoRA through PEFT, as `load_lora_weights` loads it."""

import pytest
import torch

peft = pytest.importorskip("peft")

TARGETS = {
    "flux": ["to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "x_embedder", "proj_out"],
    "sd3": ["to_q", "to_k", "to_v", "add_k_proj", "to_add_out", "to_out.0", "pos_embed.proj", "proj_out"],
    "wan": ["to_q", "to_v", "to_out.0", "proj_out", "net.0.proj"],
    "hunyuan": ["to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "x_embedder.proj", "proj_out"],
    "flux2": ["to_q", "to_k", "to_v", "add_k_proj", "to_qkv_mlp_proj", "to_out.0", "x_embedder", "proj_out"],
    "zimage": ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "cap_embedder.1"],
    "hunyuanimage": ["to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "proj_out"],
    "qwen": ["to_q", "to_k", "to_v", "add_k_proj", "to_add_out", "to_out.0", "img_in", "proj_out"],
}
TARGETS["ltx"] = ["to_q", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj"]
TARGETS["cogvideox"] = ["to_q", "to_v", "to_out.0", "text_proj", "proj_out", "net.0.proj"]
TARGETS["mochi"] = ["to_q", "to_v", "add_k_proj", "to_add_out", "to_out.0", "proj_out"]
TARGETS["chroma"] = TARGETS["flux"]
TARGETS["minimaxh3"] = ["to_q", "to_v", "to_out.0", "proj_in", "proj_out", "context_embedder"]
TARGETS["ltx2"] = TARGETS["ltx"]
for relative in ("animate", "chrono", "helios", "far"):
    TARGETS[relative] = TARGETS["wan"]
TARGETS["kandinsky5"] = ["to_query", "to_value", "attention.out_layer", "visual_embeddings.in_layer"]
TARGETS["skyreels"] = TARGETS["wan"]
TARGETS["hunyuan15"] = [t for t in TARGETS["hunyuan"] if t != "x_embedder.proj"]  # PEFT fuses no 1 x 1 x 1


@pytest.fixture
def load(case):
    """Loads the same random LoRA weights into any pipeline of the family."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=TARGETS[case.family], init_lora_weights=False)
    donor = case.make().transformer
    donor.add_adapter(config)
    weights = peft.get_peft_model_state_dict(donor, adapter_name="default")
    return lambda pipe: pipe.transformer.load_lora_adapter(dict(weights), prefix=None, adapter_name="a")


@pytest.mark.feature("LoRA loaded before enable")
def test_loaded_before(case, load):
    assert not torch.allclose(case.run(case.masked(load), steps=2), case.run(case.masked(), steps=2))
    case.works(load)


@pytest.mark.feature("LoRA loaded while enabled")
def test_loaded_while_enabled(case, load):
    case.works(load, enabled_first=True)


@pytest.mark.feature("LoRA fused into the weights while enabled")
def test_fused_while_enabled(case, load):
    def fuse(pipe):
        load(pipe)
        pipe.transformer.fuse_lora()

    case.works(fuse, enabled_first=True)


@pytest.mark.feature("LoRA unloaded while enabled")
def test_unloaded_while_enabled(case, load):
    def come_and_go(pipe):
        load(pipe)
        pipe.transformer.unload_lora()

    case.works(come_and_go, enabled_first=True)
