# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of the transformers that draw images. Widths are multiples of 32: sparse kernels want 16."""

from __future__ import annotations

import torch

from lynx_compile.tools.support.draws import Integers, Mask, Normal, Same, Times, Tiny, grid

INT = torch.int64


def _packed(tokens: int = 16, channels: int = 4, text: int = 12, width: int = 32) -> dict[str, Normal]:
    return {"hidden_states": Normal((1, tokens, channels)), "encoder_hidden_states": Normal((1, text, width))}


def _ids(axes: int, text: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Same]:
    """Positions [tokens, axes] of 4 x 4 image tokens and of the text, as FLUX's pipeline makes them."""
    image = torch.zeros(16, axes, dtype=dtype)
    image[:, 1:3] = grid(4, 4)
    return {"img_ids": Same(image), "txt_ids": Same(torch.zeros(text, axes, dtype=dtype))}


# fmt: off: a line for what belongs together
FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
LATENTS = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}
SIZES = {name: Same([[64, 64]]) for name in ("original_size", "target_size")} | {
    "crop_coords": Same([[0, 0]])
}
JOINT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
    "num_layers": 2,
}
BLOCKS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 32,
    "num_layers": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
}  # those of a UNet

IMAGE_MODELS = {
    "Flux": Tiny(
        "FluxTransformer2DModel",
        FLUX | {"pooled_projection_dim": 32, "guidance_embeds": True},
        _packed()
        | _ids(3)
        | {
            "pooled_projections": Normal((1, 32)),
            "timestep": Times(),
            "guidance": Times(most=4.0),
        },
    ),
    "Flux2": Tiny(
        "Flux2Transformer2DModel",
        FLUX | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        _packed()
        | {
            "img_ids": Same(grid(1, 4, 4, 1)[None]),
            "txt_ids": Same(grid(1, 1, 1, 12)[None]),
            "timestep": Times(),
            "guidance": Times(most=4.0),
        },
    ),
    "Chroma": Tiny(
        "ChromaTransformer2DModel",
        FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 1},
        _packed() | _ids(3) | {"timestep": Times(), "attention_mask": Mask((1, 28))},
    ),
    "Bria": Tiny(
        "BriaTransformer2DModel",
        FLUX | {"pooled_projection_dim": None},
        _packed() | _ids(3) | {"timestep": Times(most=1000.0)},
    ),
    "BriaFibo": Tiny(
        "BriaFiboTransformer2DModel",
        FLUX | {"joint_attention_dim": 64, "text_encoder_dim": 32},
        _packed(width=64)
        | _ids(3)
        | {
            "timestep": Times(),
            "text_encoder_layers": [Normal((1, 12, 32)), Normal((1, 12, 32))],
        },
    ),
    "LongCatImage": Tiny(
        "LongCatImageTransformer2DModel",
        FLUX | {"pooled_projection_dim": 32},
        _packed() | _ids(3) | {"timestep": Times()},
    ),
    "OvisImage": Tiny(
        "OvisImageTransformer2DModel",
        FLUX | {"out_channels": 4},
        _packed() | _ids(3) | {"timestep": Times()},
    ),
    "QwenImage": Tiny(
        "QwenImageTransformer2DModel",
        JOINT,
        _packed(channels=16)
        | {
            "encoder_hidden_states_mask": Mask((1, 12), INT),
            "timestep": Times(),
            "img_shapes": [[(1, 4, 4)]],
        },
    ),
    "QwenImage21": Tiny(
        "QwenImage21Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 16,
            "out_channels": 16,
            "context_in_dim": 32,
            "axes_dims_rope": (4, 6, 6),
            "num_layers": 2,
        },
        _packed(channels=16)
        | {  # 4 image slots behind 12 text tokens, each of 2 x 2 latent tokens
            "encoder_hidden_states_mask": Mask((1, 12)),
            "timestep": Times(),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": Same([[False] * 12 + [True] * 4]),
        },
    ),
    "Flux3": Tiny(
        "Flux3Transformer2DModel",
        {
            "in_channels": 16,
            "cond_in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _packed(channels=16)
        | {
            "img_ids": Same(grid(1, 4, 4, 1).float()),
            "txt_ids": Same(grid(1, 1, 1, 12).float()),
            "timestep": Times(),
        },
    ),
    "BriaFibo2": Tiny(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 16,
            "patch_size": 2,
            "dim": 48,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "cap_feat_dim": 32,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        {
            "hidden_states": Normal((1, 16, 8, 8)),
            "timestep": Times(),
            "encoder_hidden_states": Normal((1, 2, 12, 32)),
            "encoder_attention_mask": Mask((1, 12)),
        },
    ),
    "ZImage": Tiny(
        "ZImageTransformer2DModel",
        {
            "in_channels": 16,
            "dim": 48,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [256, 32, 32],
        },
        {"x": [Normal((16, 1, 16, 16))], "t": Times(), "cap_feats": [Normal((12, 32))]},
    ),
    "SD3": Tiny(
        "SD3Transformer2DModel",
        LATENTS
        | {
            "sample_size": 8,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "encoder_hidden_states": Normal((2, 12, 32)),
            "pooled_projections": Normal((2, 64)),
            "timestep": Times((2,), 1000.0),
        },
    ),
    "SD35": Tiny(
        "SD3Transformer2DModel",
        LATENTS
        | {
            "sample_size": 8,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "encoder_hidden_states": Normal((2, 12, 32)),
            "pooled_projections": Normal((2, 64)),
            "timestep": Times((2,), 1000.0),
        },
    ),
    "Sana": Tiny(
        "SanaTransformer2DModel",
        LATENTS
        | {
            "patch_size": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": 8,
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "encoder_hidden_states": Normal((2, 12, 32)),
            "encoder_attention_mask": Mask((2, 12), INT),
            "timestep": Times((2,), 1000.0),
        },
    ),
    "HiDream": Tiny(
        "HiDreamImageTransformer2DModel",
        LATENTS
        | {
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [32, 32],
            "text_emb_dim": 32,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        {
            "hidden_states": Normal((2, 4, 16, 16)),
            "encoder_hidden_states_t5": Normal((2, 12, 32)),
            "encoder_hidden_states_llama3": Normal((2, 2, 12, 32)),
            "pooled_embeds": Normal((2, 32)),
            "timesteps": Times((2,), 1000.0),
        },
    ),
    "CogView4": Tiny(
        "CogView4Transformer2DModel",
        LATENTS | {"text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 16},
        {
            "hidden_states": Normal((1, 4, 8, 8)),
            "encoder_hidden_states": Normal((1, 12, 32)),
            "timestep": Times((1,), 1000.0),
        }
        | {name: Same(size.values, torch.float32) for name, size in SIZES.items()},
    ),
    "CogView3Plus": Tiny(
        "CogView3PlusTransformer2DModel",
        LATENTS
        | {
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 16,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        {
            "hidden_states": Normal((1, 4, 8, 8)),
            "encoder_hidden_states": Normal((1, 12, 32)),
            "timestep": Times((1,), 1000.0, INT),
        }
        | SIZES,
    ),
    "DiT": Tiny(
        "DiTTransformer2DModel",
        LATENTS | {"out_channels": 8, "num_embeds_ada_norm": 8, "sample_size": 8},
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "timestep": Times((2,), 1000.0, INT),
            "class_labels": Integers((2,), 8),
        },
    ),
    "PixArt": Tiny(
        "PixArtTransformer2DModel",
        LATENTS
        | {
            "out_channels": 8,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": 8,
            "use_additional_conditions": False,
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "encoder_hidden_states": Normal((2, 12, 32)),
            "encoder_attention_mask": Mask((2, 12), INT),
            "timestep": Times((2,), 1000.0, INT),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "PixArtWithSizes": Tiny(
        "PixArtTransformer2DModel",
        LATENTS
        | {
            "out_channels": 8,
            "cross_attention_dim": 48,
            "caption_channels": 32,
            "sample_size": 8,
            "attention_head_dim": 24,
            "use_additional_conditions": True,
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "encoder_hidden_states": Normal((2, 12, 32)),
            "encoder_attention_mask": Mask((2, 12), INT),
            "timestep": Times((2,), 1000.0, INT),
            "added_cond_kwargs": {"resolution": Same([[64.0, 64.0]] * 2), "aspect_ratio": Same([[1.0]] * 2)},
        },
    ),
    "AuraFlow": Tiny(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pos_embed_max_size": 64,
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "encoder_hidden_states": Normal((2, 12, 32)),
            "timestep": Times((2,)),
        },
    ),
    "HunyuanDiT": Tiny(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "hidden_size": 32,
            "text_len": 6,
            "text_len_t5": 6,
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "timestep": Times((2,), 1000.0),
            "encoder_hidden_states": Normal((2, 6, 32)),
            "text_embedding_mask": Mask((2, 6), INT),
            "encoder_hidden_states_t5": Normal((2, 6, 32)),
            "text_embedding_mask_t5": Mask((2, 6), INT),
            "image_meta_size": Same([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]] * 2),
            "style": Same([0, 0]),
            "image_rotary_emb": (Normal((16, 16)), Normal((16, 16))),
        },
    ),
    "HunyuanImage": Tiny(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": 32,
            "text_embed_2_dim": 32,
            "rope_axes_dim": (8, 8),
        },
        {
            "hidden_states": Normal((1, 4, 4, 4)),
            "timestep": Times((1,), 1000.0),
            "encoder_hidden_states": Normal((1, 12, 32)),
            "encoder_attention_mask": Mask((1, 12), INT),
            "encoder_hidden_states_2": Normal((1, 8, 32)),
            "encoder_attention_mask_2": Mask((1, 8), INT),
        },
    ),
    "Lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (8, 4, 4),
            "axes_lens": (64, 16, 16),
            "cap_feat_dim": 32,
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "timestep": Times((2,)),
            "encoder_hidden_states": Normal((2, 12, 32)),
            "encoder_attention_mask": Mask((2, 12)),
        },
    ),
    "LuminaNext": Tiny(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "cross_attention_dim": 32,
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "timestep": Times((2,)),
            "encoder_hidden_states": Normal((2, 12, 32)),
            "encoder_mask": Mask((2, 12), INT),
            "image_rotary_emb": Normal((384, 384, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    "OmniGen": Tiny(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 64,
            "in_channels": 4,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        {
            "hidden_states": Normal((2, 4, 8, 8)),
            "timestep": Times((2,)),
            "input_ids": Integers((2, 12), 64),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": Mask((2, 29, 29), INT),
            "position_ids": Same(torch.arange(29).expand(2, 29)),
        },
    ),
    "PRX": Tiny(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        {
            "hidden_states": Normal((1, 4, 8, 8)),
            "timestep": Times(),
            "encoder_hidden_states": Normal((1, 12, 32)),
            "attention_mask": Mask((1, 12)),
        },
    ),
    "NucleusMoEImage": Tiny(
        "NucleusMoEImageTransformer2DModel",
        JOINT | {"moe_enabled": False, "capacity_factors": [8.0, 8.0]},
        _packed(channels=16)
        | {
            "encoder_hidden_states_mask": Mask((1, 12), INT),
            "timestep": Times(),
            "img_shapes": [(1, 4, 4)],
        },
    ),
    "NucleusMoEImageExperts": Tiny(
        "NucleusMoEImageTransformer2DModel",
        JOINT
        | {
            "moe_enabled": True,
            "dense_moe_strategy": "all_moe",
            "num_experts": 4,
            "moe_intermediate_dim": 32,
            "capacity_factors": [2.0, 2.0],
        },
        _packed(channels=16)
        | {
            "encoder_hidden_states_mask": Mask((1, 12), INT),
            "timestep": Times(),
            "img_shapes": [(1, 4, 4)],
        },
    ),
    "DreamLite": Tiny(
        "DreamLiteTransformer2DModel",
        BLOCKS,
        {
            "hidden_states": Normal((1, 32, 8, 8)),
            "encoder_hidden_states": Normal((1, 12, 32)),
            "encoder_attention_mask": Mask((1, 12)),
        },
    ),
    "Transformer2D": Tiny(
        "Transformer2DModel",
        BLOCKS,
        {
            "hidden_states": Normal((1, 32, 8, 8)),
            "encoder_hidden_states": Normal((1, 12, 32)),
            "encoder_attention_mask": Mask((1, 12), INT),
        },
    ),
    "ErnieImage": Tiny(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 32,
            "rope_theta": 256,
            "rope_axes_dim": (8, 4, 4),
        },
        {
            "hidden_states": Normal((1, 16, 4, 4)),
            "timestep": Times((1,), 1000.0),
            "text_bth": Normal((1, 12, 32)),
            "text_lens": Same([12]),
        },
    ),
    "GlmImage": Tiny(
        "GlmImageTransformer2DModel",
        LATENTS
        | {
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 16,
            "prior_vq_quantizer_codebook_size": 64,
        },
        {
            "hidden_states": Normal((1, 4, 8, 8)),
            "encoder_hidden_states": Normal((1, 12, 32)),
            "prior_token_id": Integers((1, 16), 64),
            "prior_token_drop": Same([[False] * 16]),
            "timestep": Times((1,), 1000.0),
            "target_size": Same([[8.0, 8.0]]),
            "crop_coords": Same([[0.0, 0.0]]),
        },
    ),
    "Ideogram4": Tiny(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 32,
            "mrope_section": (4, 2, 2),
        },
        {
            "hidden_states": Normal((1, 20, 16)),
            "encoder_hidden_states": Normal((1, 20, 32)),
            "timestep": Times(),
            "position_ids": Same(
                torch.cat([torch.arange(4)[:, None].expand(4, 3), 65536 + grid(1, 4, 4)])[None]
            ),
            "segment_ids": Same([[1] * 20]),
            "indicator": Same([[3] * 4 + [2] * 16]),
        },
    ),
    "JoyImageEdit": Tiny(
        "JoyImageEditTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 16,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 32,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        {
            "hidden_states": Normal((1, 16, 1, 8, 8)),
            "timestep": Times((1,), 1000.0),
            "encoder_hidden_states": Normal((1, 12, 32)),
        },
    ),
    "JoyImageEditPlus": Tiny(
        "JoyImageEditPlusTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 16,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 32,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        {
            "hidden_states": Normal((1, 8, 16, 1, 2, 2)),
            "timestep": Times((1,), 1000.0),
            "encoder_hidden_states": Normal((1, 12, 32)),
            "shape_list": [[(1, 2, 2), (1, 2, 2)]],
        },
    ),
    "Krea2": Tiny(
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 32,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (8, 4, 4),
        },
        {
            "hidden_states": Normal((1, 16, 16)),
            "encoder_hidden_states": Normal((1, 8, 3, 32)),
            "timestep": Times(),
            "position_ids": Same(torch.cat([torch.zeros(8, 3), grid(1, 4, 4).float()])),
            "encoder_attention_mask": Mask((1, 8)),
        },
    ),
}
# fmt: on
