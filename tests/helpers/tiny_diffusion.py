"""Tiny untrained diffusers pipelines, written in their official layouts from a seed: SD3, FLUX.1, SD1.5, SANA, Qwen-Image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmalign.testbed.tiny import SENTENCES, randomise

LENGTH = 16  # tokens to which the tiny text encoders pad


def clip_tokenizer(folder: Path) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    made = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    spaces = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES * 3, trainer)
    content = json.loads(made.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [" ".join(pair) if not isinstance(pair, str) else pair for pair in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import T5TokenizerFast

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(SENTENCES * 12, trainer)
    return T5TokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_ids=0, model_max_length=LENGTH
    )


def clip_encoder(cls: Any, tokenizer: Any, width: int) -> Any:
    from transformers import CLIPTextConfig

    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=1,
        )
    )


def t5_encoder(tokenizer: Any, width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    settings = {"d_model": width, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "relative_attention_num_buckets": 8}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **settings))


def image_coder(levels: int, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    blocks = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(sample_size=16, layers_per_block=1, latent_channels=4, norm_num_groups=2, **blocks, **options)


def write(pipe: Any, folder: Path, seed: int, **settings: Any) -> Path:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part, seed)
    pipe.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_sequence_length": LENGTH, **settings}))
    return folder


def make_sd3(folder: Path, seed: int = 0, side: int = 8) -> Path:
    """An SD3.5-M in small: dual attention in its first block, RMS norms, two CLIP encoders and a T5; pictures of 2 * side pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    tokenizer, other = clip_tokenizer(folder / "tokenizer"), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=side,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=image_coder(2, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305),
            text_encoder=clip_encoder(CLIPTextModelWithProjection, tokenizer, 16),
            tokenizer=tokenizer,
            text_encoder_2=clip_encoder(CLIPTextModelWithProjection, tokenizer, 16),
            tokenizer_2=tokenizer,
            text_encoder_3=t5_encoder(other),
            tokenizer_3=other,
        )
    return write(pipe, folder, seed, num_inference_steps=5, guidance_scale=3.0)


def make_flux(folder: Path, seed: int = 0) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    tokenizer, other = clip_tokenizer(folder / "tokenizer"), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
        pipe = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0),
            vae=image_coder(2, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
            text_encoder=clip_encoder(CLIPTextModel, tokenizer, 32),
            tokenizer=tokenizer,
            text_encoder_2=t5_encoder(other),
            tokenizer_2=other,
        )
    return write(pipe, folder, seed, num_inference_steps=4)


def make_sd15(folder: Path, seed: int = 0) -> Path:
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = clip_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=2,
            attention_head_dim=4,
        )
        pipe = StableDiffusionPipeline(
            vae=image_coder(2),
            text_encoder=clip_encoder(CLIPTextModel, tokenizer, 32),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return write(pipe, folder, seed, num_inference_steps=4)


def make_sana(folder: Path, seed: int = 0) -> Path:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    from mmalign.testbed.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(SENTENCES * 3, 320)
    blocks = ("ResBlock", "EfficientViTBlock")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        )
        transformer = SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        )
        reader = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=4096,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    pipe = SanaPipeline(
        tokenizer=tokenizer, text_encoder=reader, vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    return write(pipe, folder, seed, num_inference_steps=4)


def make_qwen(folder: Path, seed: int = 0) -> Path:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from mmalign.testbed.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(SENTENCES * 3, 320)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}  # half of the head's width of 8
    words = {"vocab_size": len(tokenizer) + 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rope_parameters": rope}
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": 14}
    last = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={**words, **heads, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
                vision_config={**sight, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [0]},
                image_token_id=last,
                vision_start_token_id=last + 1,
                vision_end_token_id=last + 2,
                video_token_id=last + 3,
            )
        )
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 4, 4),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.1, 0.0, 0.2],
            latents_std=[1.1, 0.9, 1.0, 1.2],
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift=1.0, shift_terminal=0.02
    )
    pipe = QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=reader, tokenizer=tokenizer, transformer=transformer)
    folder = write(pipe, folder, seed, num_inference_steps=4)
    (folder / "generation_config.json").write_text(json.dumps({"max_sequence_length": 64, "num_inference_steps": 4}))
    return folder


MAKERS = {"sd3": make_sd3, "flux": make_flux, "sd15": make_sd15, "sana": make_sana, "qwen": make_qwen}
