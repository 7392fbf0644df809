"""A tiny untrained Harmon, written in both of its official layouts from a seed: 32 x 32 pixels, 4 x 4 image tokens of 4 channels."""

import json

import torch
from helpers.tiny_masked import byte_tokenizer
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from mmalign.models._harmon import HarmonNet
from mmalign.models.layers.kl import KlAutoencoder
from mmalign.models.layers.ldm import Decoder, Encoder
from mmalign.models.layers.mar import Mar, MarSizes
from mmalign.testbed.tiny import randomise

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHANNELS, SIDE, STRIDE, INNER = 4, 32, 8, 16
HEADS = 4


def qwen_tokenizer(more=()):
    return byte_tokenizer([*QWEN_SPECIAL, *more], eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen_config(vocabulary, width, layers=2, tied=True):
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    }


def settle(denoiser, strength=1e-4, steady_norm=60):
    """Weights with which the noise that is predicted is about the state itself, as a trained one's for tokens of unit variance: a denoiser
    of random weights drives the tokens to 1e5 in a thousand times, where float32 is coarse. A constant part of the input makes the last
    normalisation nearly linear; all else is weak."""
    width, channels = denoiser.input_proj.weight.shape
    with torch.no_grad():
        for block in denoiser.res_blocks:
            block.adaLN_modulation[1].weight.mul_(strength)
            block.adaLN_modulation[1].bias.mul_(strength)
        basis = torch.linalg.qr(denoiser.input_proj.weight - denoiser.input_proj.weight.mean(0))[0]
        steady = denoiser.input_proj.bias - denoiser.input_proj.bias.mean()
        steady = steady - basis @ (basis.T @ steady)
        steady = steady_norm * steady / steady.norm()
        denoiser.input_proj.weight.copy_(basis)
        denoiser.input_proj.bias.copy_(steady)
        last, modulation = denoiser.final_layer["linear"], denoiser.final_layer["adaLN_modulation"][1]
        last.weight[:channels] = basis.T * steady.norm() / width**0.5
        last.weight[channels:] *= 0.3
        last.bias[:channels] = 0
        modulation.weight.mul_(strength)
        modulation.bias.mul_(strength)


def make_harmon(folder, seed=0, width=32, layers=2, with_coder=True):
    """wusize/Harmon-0_5B's layout. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    llm = qwen_config(len(tokenizer) + 4, width, layers)
    side = SIDE // STRIDE // 2  # positions are learned for half of what is drawn, and stretched
    sizes = MarSizes(CHANNELS, width, width, 2, 2, HEADS, HEADS, 2 * width, 3, side * side, 5, width, 2)
    projections = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, width)) for _ in range(2)]
    settings = Qwen2Config.from_dict({name: value for name, value in llm.items() if name != "architectures"})
    net = HarmonNet(Qwen2ForCausalLM(settings), Mar(sizes), *projections)
    randomise(net, seed)
    settle(net.mar.diffloss["net"])
    widths = [32] * 4
    coder = KlAutoencoder(
        Encoder(32, widths, [1] * 4, 2 * CHANNELS, [False] * 3 + [True]), Decoder(CHANNELS, 32, widths, [2] * 4), CHANNELS, STRIDE
    )
    randomise(coder, seed + 1)
    tensors = {name: value.contiguous() for name, value in net.state_dict().items() if name != "llm.lm_head.weight"}
    if with_coder:
        tensors |= {f"vae.{name}": value.contiguous() for name, value in coder.original_state().items()}
    else:
        torch.save({"model": coder.original_state()}, folder / "kl16.ckpt")
    save_file(tensors, folder / "model.safetensors")
    options = {"img_size": SIDE // 2, "vae_stride": STRIDE, "patch_size": 1, "vae_embed_dim": CHANNELS, "buffer_size": 3}
    mar = {**options, "encoder_num_heads": HEADS, "decoder_num_heads": HEADS, "num_sampling_steps": str(INNER)}
    (folder / "config.json").write_text(json.dumps({"model_type": "harmon", "llm": llm, "mar": mar}))
    return folder


def make_original_harmon(source, folder):
    """The Harmon in `source` as wusize/harmon's files, with its language model's folder inside: a .pth, kl16.ckpt, no config."""
    from safetensors.torch import load_file

    (folder / "qwen2.5").mkdir(parents=True)
    tensors = load_file(source / "model.safetensors")
    coder = {name.removeprefix("vae."): value for name, value in tensors.items() if name.startswith("vae.")}
    torch.save({"model": coder}, folder / "kl16.ckpt")
    kept = {name: value for name, value in tensors.items() if not name.startswith("vae.")}
    torch.save({**kept, "llm.lm_head.weight": kept["llm.model.embed_tokens.weight"]}, folder / "harmon_0.5b.pth")
    (folder / "qwen2.5" / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())["llm"]))
    for file in source.glob("tokenizer*"):
        (folder / "qwen2.5" / file.name).write_bytes(file.read_bytes())
    return folder
