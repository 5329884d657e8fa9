# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of the transformers that make sound, and of those that are neither image, video nor sound."""

from __future__ import annotations

import torch

from lynx_compile.tools.support.draws import Integers, Mask, Normal, Same, Times, Tiny

INT = torch.int64

# fmt: off: a line for what belongs together
AUDIO_MODELS = {
    "AceStep": Tiny(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "sliding_window": 16,
        },
        {
            "hidden_states": Normal((2, 8, 8)),
            "timestep": Times((2,)),
            "timestep_r": Times((2,)),
            "encoder_hidden_states": Normal((2, 10, 32)),
            "context_latents": Normal((2, 8, 16)),
        },
    ),
    "StableAudio": Tiny(
        "StableAudioDiTModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "time_proj_dim": 32,
            "global_states_input_dim": 32,
            "cross_attention_input_dim": 32,
        },
        {
            "hidden_states": Normal((2, 4, 16)),
            "timestep": Times((2,)),
            "encoder_hidden_states": Normal((2, 6, 32)),
            "global_hidden_states": Normal((2, 1, 32)),
            "rotary_embedding": (Normal((17, 8)), Normal((17, 8))),
        },
    ),
    "StableAudio3": Tiny(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "patch_size": 1,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 32,
            "global_cond_dim": 16,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
            "use_differential_attention": False,
        },
        {
            "hidden_states": Normal((2, 8, 16)),
            "timestep": Times((2,)),
            "encoder_hidden_states": Normal((2, 4, 32)),
            "global_hidden_states": Normal((2, 16)),
        },
    ),
    "LongCatAudioDiT": Tiny(
        "LongCatAudioDiTTransformer",
        {
            "dit_dim": 32,
            "dit_depth": 2,
            "dit_heads": 2,
            "dit_text_dim": 32,
            "latent_dim": 8,
            "text_conv": False,
        },
        {
            "hidden_states": Normal((1, 16, 8)),
            "encoder_hidden_states": Normal((1, 10, 32)),
            "encoder_attention_mask": Mask((1, 10)),
            "attention_mask": Same(torch.ones(1, 16, dtype=torch.bool)),
            "timestep": Times(),
        },
    ),
    "MiniMaxMusic3": Tiny(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 8,
            "condition_dim": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 64,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        {
            "hidden_states": Normal((1, 8, 24)),
            "encoder_hidden_states": Normal((1, 24, 32)),
            "timestep": Times(),
        },
    ),
    "T5Film": Tiny(
        "T5FilmDecoder",
        {
            "input_dims": 16,
            "targets_length": 16,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 64,
        },
        {
            "encodings_and_masks": [
                (Normal((1, 6, 32)), Mask((1, 6), torch.float32)),
                (Normal((1, 8, 32)), Mask((1, 8), torch.float32)),
            ],
            "decoder_input_tokens": Normal((1, 16, 16)),
            "decoder_noise_time": Times(),
        },
    ),
    "MiniMaxMusic3Codes": Tiny(  # a token model, called by the pipeline code by code
        "MiniMaxMusic3RVQDepthDecoder",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "audio_vocab_size": 32,
            "num_codebooks": 4,
        },
        {"inputs_embeds": Normal((1, 4, 32))},
    ),
    "RFD4Proteina": Tiny(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 2,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 32,
            "pair_repr_dim": 32,
            "latent_dim": 16,
            "token_type_emb_dim": 16,
            "t_emb_dim": 32,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 16,
            "num_sequence_classes": 16,
        },
        {
            "bb_ca": Normal((1, 12, 3)),
            "local_latents": Normal((1, 12, 16)),
            "bb_ca_time": Times(),
            "local_latents_time": Times(),
            "padding_mask": Mask((1, 12)),
            "token_type": Integers((1, 12), 7),
            "conditioning": {
                "is_in_context_conditioning": Same([[False] * 12]),
                "supports_local_latent": Same([[True] * 12]),
            },
        },
    ),
    "Prior": Tiny(
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "embedding_dim": 32,
            "num_embeddings": 7,
            "additional_embeddings": 4,
        },
        {
            "hidden_states": Normal((2, 32)),
            "timestep": Times((2,), 1000.0, INT),
            "proj_embedding": Normal((2, 32)),
            "encoder_hidden_states": Normal((2, 7, 32)),
        },
    ),
    "Temporal": Tiny(
        "TransformerTemporalModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 1,
            "norm_num_groups": 2,
        },
        {"hidden_states": Normal((2, 32, 8, 8)), "timestep": Times((2,), 1000.0, INT), "num_frames": 2},
    ),
}
# fmt: on
