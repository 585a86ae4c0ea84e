"""Pipelines of every family: the real classes with a few thousand random weights; nothing is fetched."""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, processors

try:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
except ImportError:  # diffusers 0.36
    Flux2KleinPipeline = None

NEW = Version(transformers.__version__).major >= 5
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT_TOKENS = 24  # of CLIP: a letter is a token


def clip_tokenizer():
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    if NEW:
        return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocab))
        files[1].write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(*files, model_max_length=TEXT_TOKENS)


def clip(tokenizer, model_class):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TEXT_TOKENS, projection_dim=16,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return model_class(config)


def t5():
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + LETTERS)]
    vocab = [(piece, 0.0 if n < 3 else -2.0) for n, piece in enumerate(pieces)]
    if NEW:
        tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    else:
        backend = Tokenizer(models.Unigram(vocab, unk_id=2))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        tokenizer = transformers.T5TokenizerFast(tokenizer_object=backend, extra_ids=0)
    sizes = dict(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    config = transformers.T5Config(vocab_size=len(tokenizer), **sizes)
    return tokenizer, transformers.T5EncoderModel(config)


def qwen3():
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={p: n for n, p in enumerate(pieces)},
        merges=[],
        additional_special_tokens=pieces[-2:],
        chat_template="{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}",
    )
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
        num_hidden_layers=27,  # the pipeline reads the states after layers 9, 18 and 27
    )  # fmt: skip
    return tokenizer, transformers.Qwen3ForCausalLM(config)


def autoencoder(model_class, **options):
    return model_class(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=32, use_quant_conv=False, use_post_quant_conv=False, **options,
    )  # fmt: skip


def sd3(dynamic_shifting=False):
    tokenizer = clip_tokenizer()
    tokenizer_3, text_encoder_3 = t5()
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting),
        vae=autoencoder(AutoencoderKL, scaling_factor=1.5, shift_factor=0.1),
        text_encoder=clip(tokenizer, transformers.CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, transformers.CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(guidance_embeds=True):
    tokenizer, (tokenizer_2, text_encoder_2) = clip_tokenizer(), t5()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        guidance_embeds=guidance_embeds, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(AutoencoderKL, scaling_factor=0.36, shift_factor=0.1),
        text_encoder=clip(tokenizer, transformers.CLIPTextModel),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def flux2(is_distilled=False):
    if Flux2KleinPipeline is None:
        import pytest

        pytest.skip("this version of diffusers has no FLUX.2 klein")
    tokenizer, text_encoder = qwen3()
    vae = autoencoder(AutoencoderKLFlux2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled)


MAKERS = {"sd3": sd3, "flux": flux, "flux2": flux2}


def save(folder, name, seed=0, **options):
    """Make the pipeline of a family with random weights, save it into folder. Pictures are 16 pixels wide."""
    torch.manual_seed(seed)
    pipe = MAKERS[name](**options)
    for weight in pipe.transformer.parameters():  # the usual start has zeros, which would hide errors
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.0 / weight[0].numel() ** 0.5)
    pipe.save_pretrained(folder)
    return pipe
