"""Tiny untrained members of the masked families, written in their official layouts from a seed."""

import json

import torch
from diffusers import VQModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from mmalign.models._llada import renamed
from mmalign.models._showo_text import SPECIAL
from mmalign.models.layers.ldm import Decoder, Encoder
from mmalign.testbed.tiny import SENTENCES, randomise

BITS, SIDE, SCALE = 5, 16, 4


def byte_tokenizer(special, vocabulary=300, **roles):
    """A byte-level BPE whose special tokens come first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)


def make_magvit(folder, seed=0, bits=BITS, levels=3):
    """showlab/magvitv2's layout: encoder, decoder, the quantiser's tables; a config.json without sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    widths, blocks = [32] * levels, [1] * levels
    parts = torch.nn.ModuleDict({"encoder": Encoder(32, widths, blocks, bits), "decoder": Decoder(bits, 32, widths, blocks)})
    randomise(parts, seed)
    powers = 2 ** torch.arange(bits - 1, -1, -1)
    table = ((torch.arange(2**bits)[:, None] & powers) > 0).float() * 2 - 1
    tensors = {**parts.state_dict(), "quantize.embedding": table, "quantize.power_vals": powers}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2"}))
    return folder


def make_showo(folder, seed=0, width=48, layers=2):
    """showlab/show-o's layout with phi-1_5 and magvitv2 inside: 16 x 16 pixels, 4 x 4 image tokens of 32 codes."""
    tokenizer = byte_tokenizer(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "phi-1_5")
    text, codes = len(tokenizer), 2**BITS
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "max_position_embeddings": 1024,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
    }
    phi = {**sizes, "architectures": ["PhiForCausalLM"], "model_type": "phi", "vocab_size": text + 7, "tie_word_embeddings": False}
    (folder / "phi-1_5" / "config.json").write_text(json.dumps(phi))
    whole = text + len(SPECIAL) + codes + 1
    net = PhiForCausalLM(PhiConfig(**sizes, vocab_size=whole, qk_layernorm=True, tie_word_embeddings=False))
    randomise(net, seed)
    save_file({f"showo.{name}": value.contiguous() for name, value in net.state_dict().items()}, folder / "pytorch_model.safetensors")
    config = {
        "_class_name": "Showo",
        "vocab_size": whole,
        "llm_vocab_size": text,
        "llm_model_path": "microsoft/phi-1_5",
        "codebook_size": codes,
        "num_vq_tokens": (SIDE // SCALE) ** 2,
        "w_clip_vit": False,
        "load_from_showo": True,
        "mask_token_id": whole - 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    make_magvit(folder / "magvitv2", seed + 1)
    return folder


LLADA_SPECIAL = ["<|startoftext|>", "<|endoftext|>", *(f"<|reserved_token_{number}|>" for number in range(11)), "<|mdm_mask|>"]
TURNS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def llada_config(width, layers, rows, mask, **more):
    """config.json of a LLaDA under its own field names."""
    return {
        "d_model": width,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": layers,
        "mlp_hidden_size": 2 * width,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "activation_type": "silu",
        "block_type": "llama",
        "include_bias": False,
        "weight_tying": False,
        "max_sequence_length": 1024,
        "vocab_size": rows,
        "embedding_size": rows,
        "mask_token_id": mask,
        **more,
    }


def write_llada(folder, config, seed):
    """The weights of a LLaDA with random numbers, under its own names."""
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["embedding_size"],
            hidden_size=config["d_model"],
            intermediate_size=config["mlp_hidden_size"],
            num_hidden_layers=config["n_layers"],
            num_attention_heads=config["n_heads"],
            num_key_value_heads=config["n_kv_heads"],
            tie_word_embeddings=False,
        )
    )
    randomise(net, seed)
    tensors = renamed(net.state_dict(), to_llama=False)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def make_mmada(folder, seed=0, width=48, layers=2):
    """Gen-Verse/MMaDA's layout with magvitv2 inside: 16 x 16 pixels, 4 x 4 image tokens of 32 codes, and unused embeddings at the end."""
    tokenizer = byte_tokenizer([*LLADA_SPECIAL, *TURNS], bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    rows, mask = len(tokenizer) + 2**BITS + 5, tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    config = llada_config(width, layers, rows, mask, model_type="mmada", num_vq_tokens=(SIDE // SCALE) ** 2, codebook_size=2**BITS)
    write_llada(folder, config, seed)
    make_magvit(folder / "magvitv2", seed + 1)
    return folder


def make_dimoo(folder, seed=0, width=48, layers=2):
    """Alpha-VLLM/Lumina-DiMOO's layout: 4 pixels per code, 32 codes, the seven special tokens before them."""
    special = ["<Image>", "</Image>", "<uncondition>", "<system>", "</system>", "<answer>", "</answer>"]
    tokenizer = byte_tokenizer([*LLADA_SPECIAL, "<user>", "</user>"], bos_token="<|startoftext|>", eos_token="<|endoftext|>")
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.save_pretrained(folder)
    codes, mask = 2**BITS, tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    config = llada_config(width, layers, len(tokenizer) + codes, mask, model_type="llada", architectures=["LLaDAForMultiModalGeneration"])
    write_llada(folder, config, seed)
    levels = 3
    vq = VQModel(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=8,
        num_vq_embeddings=codes,
        lookup_from_codebook=True,
        mid_block_add_attention=False,
    )
    randomise(vq, seed + 1)
    vq.save_pretrained(folder / "vqvae")
    return folder
