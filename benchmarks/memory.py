"""memory.py — what a step needs of a GPU's memory, by family: estimated on the meta device.

    python benchmarks/memory.py

Nothing is allocated and nothing is downloaded: the networks are built from their public
configurations, without values. Weights are counted in bfloat16; "graph" is what autograd keeps for
φ's backward pass at batch 1 with a LoRA of rank 4, with and without checkpointing. Not counted: the
allocator, cuDNN's workspaces, the VAE, θ and the text encoders, which leave.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GIB = 2 ** 30


def unet(**config):
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(**config)


def sd21():
    """stabilityai/stable-diffusion-2-1-base: 512 pixels."""
    net = unet(sample_size=64, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
               use_linear_projection=True)
    return net, (torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 1024)), {}


def sdxl():
    """stabilityai/stable-diffusion-xl-base-1.0: 1024 pixels."""
    net = unet(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        transformer_layers_per_block=[1, 2, 10],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    extra = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    return net, (torch.zeros(1, 4, 128, 128), torch.zeros(1), torch.zeros(1, 77, 2048)), {
        "added_cond_kwargs": extra}


def sd3():
    """stabilityai/stable-diffusion-3-medium: 1024 pixels."""
    from diffusers import SD3Transformer2DModel
    net = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192)
    return net, (), {
        "hidden_states": torch.zeros(1, 16, 128, 128), "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 333, 4096),
        "pooled_projections": torch.zeros(1, 2048)}


def flux2():
    """black-forest-labs/FLUX.2-klein-base-4B: 1024 pixels."""
    from diffusers import Flux2Transformer2DModel
    net = Flux2Transformer2DModel(num_layers=5, num_single_layers=20, num_attention_heads=24,
                                  joint_attention_dim=7680, guidance_embeds=False)
    return net, (), {
        "hidden_states": torch.zeros(1, 4096, 128), "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 512, 7680), "img_ids": torch.zeros(1, 4096, 4),
        "txt_ids": torch.zeros(1, 512, 4)}


class Fused(torch.autograd.Function):
    """Attention as the kernels of GPUs keep it: q, k, v and the result, no L x L matrix."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def graph(net, args, kwargs):
    """Bytes that autograd keeps of one forward pass, parameters aside."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage                    # held, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = net(*args, **kwargs).sample
    del out
    return sum(storage.nbytes() for storage in kept.values())


def main():
    from diffusers.utils import logging
    from peft import LoraConfig
    from torch.utils._pytree import tree_map
    logging.set_verbosity_error()
    torch.nn.functional.scaled_dot_product_attention = (
        lambda query, key, value, **kwargs: Fused.apply(query, key, value))
    print("| family | network, parameters | weights, GiB | graph, GiB | with --checkpointing |")
    print("|---|---|---|---|---|")
    for make in (sd21, sdxl, sd3, flux2):
        with torch.device("meta"):
            net, args, kwargs = make()
            net.requires_grad_(False).to(torch.bfloat16)
            net.add_adapter(LoraConfig(r=4, target_modules=[
                "to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]))
            args, kwargs = tree_map(lambda x: x.bfloat16(), (args, kwargs))
            count = sum(p.numel() for p in net.parameters())
            plain = graph(net, args, kwargs)
            net.train()                              # diffusers checkpoints where it trains
            net.enable_gradient_checkpointing()
            less = graph(net, args, kwargs)
        name = make.__doc__.split("/")[1].split(":")[0]
        print(f"| {name} | {count / 1e9:.2f} B | {2 * count / GIB:.1f} | {plain / GIB:.1f} "
              f"| {less / GIB:.1f} |")


if __name__ == "__main__":
    main()
