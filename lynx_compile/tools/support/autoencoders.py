# SPDX-License-Identifier: Apache-2.0
"""Tiny autoencoders for pipelines that ask theirs for a dtype, a factor or a mean even where nothing is decoded."""

from __future__ import annotations

from typing import Any

import diffusers


def kl(channels: int = 4) -> Any:
    """Images, 8 x 8 pixels to a latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        shift_factor=0.1,
    )


def wan(channels: int = 4) -> Any:
    """Videos, 8 x 8 pixels and 4 frames to a latent."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels,
        latents_std=[0.9] * channels,
    )


def flux2(channels: int = 4) -> Any:
    """FLUX.2's images: latents are normalised in groups of 2 x 2."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
    )


def magvit(channels: int = 4) -> Any:
    """EasyAnimate's videos."""
    return diffusers.AutoencoderKLMagvit(
        latent_channels=channels,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_num_groups=2,
    )


def hunyuan(channels: int = 4) -> Any:
    """HunyuanVideo's videos."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def hunyuan15(channels: int = 4) -> Any:
    """HunyuanVideo 1.5's videos."""
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=channels, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
    )


def ltx2(channels: int = 4) -> Any:
    """LTX-2's videos."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=channels,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )


def ltx2_audio() -> Any:
    """LTX-2's sound: 2 channels of 2 bands are the transformer's 4."""
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        mel_bins=8,
    )


def oobleck(channels: int = 4) -> Any:
    """Stable Audio's sound."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=channels,
        audio_channels=2,
        sampling_rate=16,
    )


def same(channels: int = 8) -> Any:
    """Stable Audio 3's sound."""
    return diffusers.AutoencoderSAME(
        audio_channels=2,
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=channels,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )


def qwen(channels: int = 4) -> Any:
    """Qwen-Image's pictures."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels,
        latents_std=[0.9] * channels,
    )


def longcat_audio(channels: int = 8) -> Any:
    """LongCat's sound."""
    return diffusers.LongCatAudioDiTVae(
        in_channels=1,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=channels,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=1000,
    )


def kandinsky6_sr(channels: int = 4) -> Any:
    """Kandinsky 6's videos in high resolution."""
    return diffusers.Kandinsky6SRVAE(
        latent_channels=channels,
        encoder_block_out_channels=(32,) * 5,
        decoder_block_out_channels=(32,) * 5,
        layers_per_block=1,
    )


def proteina(channels: int = 16) -> Any:
    """RFD4's residues."""
    return diffusers.RFD4ProteinaAutoencoder(
        atom37_mask=[[True] * 37] * 147,
        allowed_residue_types=[[True] * 147] * 7,
        latent_dim=channels,
        nlayers=1,
        token_dim=32,
        nheads=2,
        dim_cond=32,
        pair_repr_dim=32,
        token_type_emb_dim=16,
    )
