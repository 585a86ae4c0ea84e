"""Make the bundled model: a StableDiffusion3Pipeline small enough for a laptop, trained from scratch on drawn
scenes.

    python tests/tiny/make.py            # writes the model and the two prompt files beside this script

Scenes have one to four large objects, at most one to a quadrant, and captions in the manner of GenEval:
counting ("three red circles"), two objects ("a red circle and a blue square"), position ("a red circle left
of a blue square"). As on the web, captions are noisy: NOISE of them tell of another scene. So the model draws
clear pictures that often are not what was asked for, and that is the room in which reinforcement learning can
show what it does.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
from common import save_pictures  # noqa: E402
from shapes import COLOURS, NUMBERS, RELATIONS, SHAPES, parse_scene, shape_inside, shapes  # noqa: E402

NOISE = 0.4  # share of captions with one wrong attribute
THINGS = list(itertools.product(COLOURS, SHAPES))
TEXT_TOKENS = 10  # the longest prompt has 8 words; start and end tokens come to them
ALL_PROMPTS = (
    [f"a {c} {s}" for c, s in THINGS]
    + [f"{n} {c} {s}s" for n in list(NUMBERS)[1:] for c, s in THINGS]
    + [
        f"a {a[0]} {a[1]} {r} a {b[0]} {b[1]}"
        for r in ["and", *RELATIONS]
        for a, b in itertools.permutations(THINGS, 2)
    ]
)


def split_prompts(seed=0):
    """Two lists of prompts, for training and held out: no count, no pair of things is in both."""
    rng = random.Random(seed)
    counts = [f"{n} {c} {s}s" for n in list(NUMBERS)[1:] for c, s in THINGS]
    pairs = list(itertools.combinations(THINGS, 2))
    rng.shuffle(counts)
    rng.shuffle(pairs)
    relations = ["and", *RELATIONS]

    def sentences(pairs, per_pair):
        for a, b in pairs:
            for relation in rng.sample(relations, per_pair):
                a, b = rng.sample([a, b], 2)
                yield f"a {a[0]} {a[1]} {relation} a {b[0]} {b[1]}"

    train = [f"a {c} {s}" for c, s in THINGS] + counts[12:] + list(sentences(pairs[18:], 3))
    held_out = counts[:12] + list(sentences(pairs[:18], 2))
    return train, held_out


def draw(scenes, rng):
    """Draw scenes, with random places and sizes:

    lists of (colour, shape), relation -> (B, 3, 32, 32) in [0, 1].
    """
    axis = torch.arange(32.0)
    images = torch.ones(len(scenes), 3, 32, 32)
    for image, (objects, relation) in zip(images, scenes):
        quadrants = rng.sample([(0, 0), (1, 0), (0, 1), (1, 1)], len(objects))
        if relation is not None:
            rx, ry = RELATIONS[relation]
            along, across = (rng.randrange(2), rng.randrange(2)), (rx + ry > 0, rx + ry < 0)
            quadrants = [(int(not b), a) if rx else (a, int(not b)) for a, b in zip(along, across)]
        for (colour, shape), (qx, qy) in zip(objects, quadrants):
            radius = rng.uniform(4.5, 6.0)
            dx = axis[None, :] - (7.5 + 16 * qx + rng.uniform(-1.2, 1.2))
            dy = axis[:, None] - (7.5 + 16 * qy + rng.uniform(-1.2, 1.2))
            cover = (0.5 - shape_inside(shape, dx, dy, radius)).clamp(0, 1)
            image.mul_(1 - cover).add_(cover * torch.tensor(COLOURS[colour]).view(3, 1, 1))
    return images


def miscaption(prompt, rng):
    """A caption that differs from the prompt in one attribute: number, colour, shape, order or relation."""
    while True:
        words = prompt.split()
        i = rng.randrange(len(words))
        word, plural = words[i].rstrip("s"), words[i].endswith("s")
        if word in COLOURS:
            words[i] = rng.choice(list(COLOURS))
        elif word in SHAPES:
            words[i] = rng.choice(SHAPES) + "s" * plural
        elif word in NUMBERS and word != "a":
            words[i] = rng.choice(list(NUMBERS)[1:])
        elif word in ("left", "right", "above", "below", "and"):
            n = 2 if word in ("left", "right") else 1
            words[i : i + n] = rng.choice(["and", *RELATIONS]).split()
        elif word == "a" and len(words) == 3:
            words = [rng.choice(list(NUMBERS)[1:]), words[1], words[2] + "s"]
        if (caption := " ".join(words)) != prompt:
            return caption


def make_tokenizer():
    """A CLIPTokenizer in which every word of the captions is one token: its letters are merged one after the
    other.

    Merges of long words come first; in another order the pairs of a short word would cut a long one in the
    wrong place.
    """
    words = sorted(
        {word for prompt in ALL_PROMPTS for word in prompt.split()}, key=lambda word: (-len(word), word)
    )
    merges, tokens = [], set()
    for word in words:
        head, *letters = [*word[:-1], word[-1] + "</w>"]
        tokens |= {head, *letters, *word}
        for letter in letters:
            merges += [(head, letter)] if (head, letter) not in merges else []
            head += letter
            tokens.add(head)
    vocab = {token: n for n, token in enumerate([*sorted(tokens), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)
    ids = tokenizer(ALL_PROMPTS)["input_ids"]
    assert all(len(i) == len(p.split()) + 2 for i, p in zip(ids, ALL_PROMPTS)), "a word is not one token"
    assert len({tuple(i) for i in ids}) == len(ALL_PROMPTS), "two prompts have the same tokens"
    return tokenizer


def add_files_of_old_tokenizers(folder):
    """Write vocab.json and merges.txt beside tokenizer.json: transformers 4 reads those."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def make_pipeline():
    """The pipeline with random weights: SD3's own classes, no T5."""
    tokenizer = make_tokenizer()
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    special["pad_token_id"] = tokenizer.pad_token_id

    def encoder(width, layers):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 16,
                max_position_embeddings=TEXT_TOKENS,
                projection_dim=width,
                **special,
            )
        )

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=128,
        pooled_projection_dim=96,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    # SD3's sinusoids are spaced for large grids: on 4 x 4 tokens neighbours would look alike. The table is a
    # buffer that is saved with the weights, so give each token a direction of its own.
    table = transformer.pos_embed.pos_embed
    table.copy_(torch.nn.init.orthogonal_(torch.empty(table.shape[1:])) * math.sqrt(table.shape[-1]) / 2)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=8,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        ),
        text_encoder=encoder(64, 3),
        tokenizer=tokenizer,
        text_encoder_2=encoder(32, 2),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def train_vae(vae, rng, steps, batch=64):
    """Reconstruction in L1, with a light KL; then the scale and shift that give latents mean 0 and std 1."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    for step in range(steps):
        images = draw([parse_scene(rng.choice(ALL_PROMPTS)) for _ in range(batch)], rng) * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample()).sample - images).abs().mean()
        loss = error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"vae {step:5d}  L1 {error.item():.4f}", flush=True)
    with torch.no_grad():
        images = draw([parse_scene(rng.choice(ALL_PROMPTS)) for _ in range(512)], rng) * 2 - 1
        latents = vae.encode(images).latent_dist.sample()
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )


def train_flow(pipe, rng, steps, noise, batch=128, lr=2e-3):
    """Flow matching, text encoders and transformer together:

    v = eps - x0 at a uniform sigma; EMA of the weights.
    """
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    ema = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    start, losses = time.time(), []
    for step in range(steps):
        prompts = [
            rng.choice(ALL_PROMPTS[: len(THINGS) * 4]) if rng.random() < 0.3 else rng.choice(ALL_PROMPTS)
            for _ in range(batch)
        ]
        captions = [miscaption(p, rng) if rng.random() < noise else p for p in prompts]
        captions = ["" if rng.random() < 0.1 else c for c in captions]
        embeds, _, pooled, _ = encode(pipe, captions)
        with torch.no_grad():
            images = draw([parse_scene(p) for p in prompts], rng) * 2 - 1
            x0 = (
                pipe.vae.encode(images).latent_dist.sample() - pipe.vae.config.shift_factor
            ) * pipe.vae.config.scaling_factor
        eps, sigma = torch.randn_like(x0), torch.rand(batch, 1, 1, 1)
        velocity = pipe.transformer(
            (1 - sigma) * x0 + sigma * eps, embeds, pooled, sigma.flatten() * 1000
        ).sample
        loss = F.mse_loss(velocity, eps - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(modules)
        losses.append(loss.item())
        if step % 250 == 0 or step == steps - 1:
            mean = sum(losses[-250:]) / len(losses[-250:])
            print(f"flow {step:5d}  loss {mean:.4f}  {time.time() - start:.0f} s", flush=True)
        if (step + 1) % 500 == 0 and step + 1 < steps:
            backup = {k: v.clone() for k, v in modules.state_dict().items()}
            modules.load_state_dict(ema.module.state_dict())
            judge(pipe, guidance=1.0)
            modules.load_state_dict(backup)
    modules.load_state_dict(ema.module.state_dict())


def encode(pipe, prompts):
    """Text embeddings as the pipeline makes them, without the zero tokens that stand for T5."""
    return pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0)


@torch.no_grad()
def judge(pipe, guidance, folder=None):
    """Mean reward of the pipeline's own pictures, 10 steps, over all prompts of the two files, by kind of
    prompt.
    """
    pipe.set_progress_bar_config(disable=True)
    train, held_out = split_prompts()
    prompts = held_out + train
    generator = torch.Generator().manual_seed(0)
    options = dict(
        num_inference_steps=10, guidance_scale=guidance, max_sequence_length=0, generator=generator
    )
    images = pipe(prompts, output_type="pt", **options).images
    scores = shapes(images, prompts)
    if folder:
        captions = [f"{score:.2f} {prompt}" for score, prompt in zip(scores, prompts)]
        save_pictures(images[:64].cpu(), captions, folder, round(guidance))
    kinds = ["count" if " a " not in p else "and" if " and " in p else "position" for p in prompts]
    means = {
        kind: scores[torch.tensor([k == kind for k in kinds])].mean().item() for kind in sorted(set(kinds))
    }
    text = "  ".join(f"{kind} {mean:.3f}" for kind, mean in means.items())
    print(f"guidance {guidance}: reward {scores.mean().item():.3f}  ({text})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="share of captions that tell of another scene"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, prompts in zip(("prompts.txt", "eval_prompts.txt"), split_prompts()):
        (args.output / name).write_text("\n".join(prompts) + "\n", encoding="utf-8")

    torch.manual_seed(0)
    pipe = make_pipeline()
    with torch.random.fork_rng():
        train_vae(pipe.vae, random.Random(0), args.vae_steps)
    train_flow(pipe, random.Random(0), args.steps, args.noise)
    for guidance in (1.0, 2.0, 4.0):
        judge(pipe, guidance, args.output)
    for module in (pipe.transformer, pipe.vae):  # to keep the files small; they are loaded in float32
        module.half()
    pipe.save_pretrained(args.output)
    for name in ("tokenizer", "tokenizer_2"):
        add_files_of_old_tokenizers(Path(args.output) / name)


if __name__ == "__main__":
    main()
