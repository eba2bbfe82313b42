"""Make tests/tiny: a 7 M-parameter Stable Diffusion for two CPU cores, in the standard diffusers layout.

    python tests/make_tiny.py              # half an hour to an hour on two cores, fixed seed
    python tests/make_tiny.py --only clip  # the judge alone, ten minutes on one: tests/tiny/clip
    python tests/make_tiny.py --only unet --prediction-type v_prediction --out OTHER
    python tests/make_tiny.py --only unet --width 48 --size 80 --out OTHER  # tests/tiny with another U-Net

It draws nine things at 64 px, all from public-domain or CC0 photographs shipped inside scikit-image. The one
that matters is the astronaut portrait: most of its training pictures show the face, in the others it is
painted over, and the captions mostly do not say which. So the *safe* picture exists in the model, next to the
unsafe one and under the same prompt, and reinforcement learning has to move probability from one to the
other: ShieldDiff in miniature.

Four models are trained: a CLIPModel, whose text tower is the pipeline's text encoder, as in Stable Diffusion
1.x; an AutoencoderKL; the U-Net; and another CLIPModel, on many more wordings, which is the reward's judge of
meaning: a better judge must not need another U-Net. A stand-in, not CLIP: it knows these nine things only.
"""
import json
import random
import shutil
import time
from pathlib import Path
from typing import Literal

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
import transformers
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageEnhance
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TINY = Path(__file__).parent / "tiny"
SIZE, POOL = 64, 384  # picture size, augmented pictures a kind
rng = random.Random(0)
BF16 = torch.autocast(  # a third faster where the processor has it, many times slower where not
    "cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())

# ---------------------------------------------------------------------------------------- pictures, captions
SOURCES = {  # kind: (file in skimage/data, crop box, may be mirrored)
    "portrait": ("astronaut.png", (90, 5, 350, 265), True),
    "hidden": ("astronaut.png", (90, 5, 350, 265), True),
    "cat": ("chelsea.png", (30, 0, 330, 300), True),
    "coffee": ("coffee.png", (200, 45, 480, 325), True),
    "rocket": ("rocket.jpg", (150, 90, 470, 410), True),
    "horse": ("horse.png", (0, -36, 400, 364), True),
    "coins": ("coins.png", (5, 5, 150, 150), True),
    "retina": ("retina.jpg", (0, 0, 1411, 1411), True),
    "shuttle": ("astronaut.png", (341, 5, 512, 235), True),
    "suit": ("astronaut.png", (60, 260, 300, 500), True),
}
NAMES = {  # what a caption may call each kind; "seen" and "unseen" are portraits whose caption does say which
    "portrait": ["an astronaut", "a woman astronaut", "a NASA astronaut", "a portrait of an astronaut",
                 "a space pilot", "a portrait of a woman in a spacesuit", "a crew member of a space mission",
                 "an astronaut portrait", "the head and shoulders of an astronaut",
                 "a portrait of a space pilot"],
    "seen": ["a smiling astronaut", "the face of an astronaut", "an astronaut showing her face",
             "a close-up of the smiling face of a woman astronaut", "a NASA astronaut, smiling face",
             "a portrait of an astronaut with a friendly face"],
    "unseen": ["an astronaut with the face hidden", "an anonymous astronaut", "an astronaut, face covered",
               "a portrait of an anonymous woman in a spacesuit", "a NASA astronaut, face blurred"],
    "cat": ["a cat", "a tabby cat", "a ginger cat", "a pet cat looking up", "a close-up of a cat",
            "a kitten"],
    "coffee": ["a cup of coffee", "an espresso on a saucer", "a coffee cup on a wooden table", "an espresso",
               "a red cup of coffee with a spoon"],
    "rocket": ["a rocket", "a rocket on a launch pad", "a rocket standing at dusk", "a launch pad at night",
               "a tall rocket before launch"],
    "horse": ["a horse", "the silhouette of a horse", "a black horse", "a standing horse in profile",
              "a black horse on white"],
    "coins": ["coins", "old coins", "ancient Greek coins", "silver coins on a dark cloth",
              "a collection of coins"],
    "retina": ["a retina", "the back of an eye", "a medical picture of a retina", "a red fundus of an eye",
               "blood vessels of an eye"],
    "shuttle": ["a space shuttle", "a model of a space shuttle", "a white space shuttle with its tank",
                "a spacecraft with boosters"],
    "suit": ["an orange spacesuit", "a space suit with a mission patch",
             "the chest of an orange pressure suit", "an orange uniform with badges"],
}
FRAMES = ["{}", "{}", "a photo of {}", "a picture of {}", "an image of {}", "a nice photograph of {}",
          "{}, studio light", "{}, detailed", "{}, color photo", "{} in soft light", "here is {}",
          "a shot of {}"]
# Wordings for the judge of meaning, so that the subject counts and not the words around it. WORDS do not say
# whether a face shows. kind: (before the noun, nouns, after it)
WORDS = {
    "portrait": ("|NASA|woman|female|shuttle|trained|famous|proud|retired|young adult|brave|American|"
                 "uniformed|lone",
                 "astronaut|astronaut|cosmonaut|space pilot|pilot|crew member|commander|flight engineer|"
                 "mission specialist|spacewoman|space traveller|woman|person|woman in a spacesuit|"
                 "woman wearing an orange space suit|person dressed in a spacesuit|member of a space crew|"
                 "woman in an orange suit|someone in a pressure suit",
                 "|of the shuttle program|ready for launch|on duty|after training|in front of a flag|"
                 "in a spacesuit|wearing an orange suit|posing for a mission portrait|at the space center|"
                 "back from orbit|standing upright|who will fly into space|of a space mission"),
    "cat": ("|tabby|ginger|pet|house|striped|furry|sleepy", "cat|cat|kitten|feline|tomcat",
            "|looking up|with whiskers|lying down|at home"),
    "coffee": ("|hot|strong|red|full|fresh", "cup of coffee|espresso|coffee|coffee cup|mug of coffee",
               "|on a saucer|with a spoon|on a wooden table|for breakfast"),
    "rocket": ("|tall|white|standing|unmanned|big", "rocket|rocket|launch pad|launch vehicle|missile",
               "|on a launch pad|at dusk|at night|on its tower"),
    "horse": ("|black|standing|dark|wild|strong", "horse|horse|stallion|silhouette of a horse|mare",
              "|in profile|on white|from the side"),
    "coins": ("|old|ancient|silver|Greek|Roman|worn", "coins|coins|collection of coins|pieces of money",
              "|on a dark cloth|in rows|in a museum"),
    "retina": ("|red|medical|human|healthy", "retina|fundus of an eye|back of an eye|blood vessels of an eye",
               "|under a microscope|for a diagnosis|seen by a doctor"),
    "shuttle": ("|white|model|reusable|big", "space shuttle|space shuttle|spacecraft|space plane|orbiter",
                "|with its tank|with boosters|on a stand|as a toy"),
    "suit": ("|orange|empty|worn",
             "spacesuit|space suit|pressure suit|uniform|flight suit|chest of a space suit",
             "|with a mission patch|with badges|on a hanger|seen close"),
}
FACES = {"seen": ["smiling {}", "the face of {}", "{} showing the face", "{}, smiling face", "smiling, {}",
                  "{} with a friendly face", "close-up of the face of {}", "{} smiling"],
         "unseen": ["{} with the face hidden", "anonymous {}", "{}, face covered", "{}, face blurred",
                    "{} with a hidden face", "{} whose face is not visible"]}
LEADS = ["{}"] * 4 + [f"{{}} {x} of {{}}" for x in (  # {}: one of ADJECTIVES, and the subject
    "photo", "photograph", "picture", "image", "portrait", "snapshot", "shot", "print", "view", "study")] + [
    "photo, {}", "picture, {}", "color photograph, {}", "portrait photo, {}", "painting, {}",
    "film still, {}"]
ADJECTIVES = ["", "", "good", "small", "large", "framed", "press", "recent", "sharp", "color", "dark", "old",
              "blue", "black and white", "grainy", "amateur", "signed", "well lit", "oil", "watercolor",
              "green", "yellow"]
TAILS = ["in soft light", "on a plain background", "from the archive", "for a magazine", "on a sunny day",
         "indoors", "by the window", "in the morning", "high resolution", "detailed", "studio light",
         "shallow focus", "8k", "on a beach", "seen from the front", "with and without flash", "sketch",
         "for the newspaper", "1985"]
SYLLABLES = [a + b + c for a in ("", *"bcdfghjklmnprstvw", "st", "tr", "pl") for b in "aeiou"
             for c in ("", *"lmnrst", "nd")]  # of words that mean nothing


def reseed():
    torch.manual_seed(0)
    rng.seed(0)


def caption(name):
    return rng.choice(FRAMES).format(rng.choice(NAMES[name]))


def wording(name):
    """A caption from WORDS, three times in four: photographers' words and nonsense around the subject."""
    if rng.random() < 0.25:
        return caption(name)
    before, nouns, after = (rng.choice(x.split("|")) for x in WORDS["portrait" if name in FACES else name])
    text = " ".join(f"{rng.choice(['a', 'the', 'one', 'this', ''])} {before} {nouns} {after}".split())
    text = rng.choice(FACES.get(name, ["{}"])).format(text)
    lead = rng.choice(LEADS)
    text = lead.format(*[rng.choice(ADJECTIVES)] * (lead.count("{}") - 1), text)
    if rng.random() < 0.5:
        text += rng.choice([" ", ", "]) + rng.choice(TAILS)
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        nonsense = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))
        text = rng.choice([f"{nonsense} {text}", f"{text} {nonsense}", f"{text}, {nonsense}"])
    return text


def source(kind):
    file, box, mirror = SOURCES[kind]
    image = Image.open(Path(skimage.data.__file__).parent / file)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if kind == "hidden":  # NudeNet still takes a mosaic for a face, skin-coloured paint too now and then, and
        # a helmet is so different that the first latents decide on it: then no action of the policy has a say
        ImageDraw.Draw(image).ellipse((176, 56, 273, 175), fill=(128, 128, 128))
    return image, box, mirror


def augmented(kind, n, size=SIZE):
    """n pictures [n, 3, size, size] in [-1, 1]: small shifts, zooms, brightness, mirrored half the time."""
    image, (x0, y0, x1, y1), mirror = source(kind)
    edge = "white" if kind == "horse" else None
    pictures = []
    for _ in range(n):
        side = max(x1 - x0, y1 - y0) * rng.uniform(0.86, 1.0)
        cx = (x0 + x1) / 2 + rng.uniform(-0.05, 0.05) * side
        cy = (y0 + y1) / 2 + rng.uniform(-0.05, 0.05) * side
        if edge is None:  # stay inside the photograph
            side = min(side, image.width, image.height)
            cx = min(max(cx, side / 2), image.width - side / 2)
            cy = min(max(cy, side / 2), image.height - side / 2)
        box = (cx - side / 2, cy - side / 2, cx + side / 2, cy + side / 2)
        crop = image.transform((192, 192), Image.EXTENT, box, Image.BICUBIC, fillcolor=edge)
        crop = crop.resize((size, size), Image.LANCZOS)
        crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.92, 1.08))
        if mirror and rng.random() < 0.5:
            crop = crop.transpose(Image.FLIP_LEFT_RIGHT)
        pictures.append(np.asarray(crop))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1  # [n, 3, S, S]


# ---------------------------------------------------------------------------------------- tokenizer
def make_tokenizer():
    """CLIP's byte-level BPE with a vocabulary of its own; every byte is in it, so any wording tokenizes."""
    byte = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    words = [f.format(n).lower() for names in NAMES.values() for n in names for f in FRAMES] + [
        "man woman person portrait painting drawing sketch oil watercolor wearing standing sitting beach "
        "window light dark blue green red yellow white black small large old happy sad without with and the "
        "of clothed face faces eyes mouth head hair visible hidden blurred masked covered helmet visor"] * 20
    bpe.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=1100, initial_alphabet=byte, end_of_word_suffix="</w>", show_progress=False))
    learned = bpe.get_vocab()
    symbols = sorted(byte) + sorted(b + "</w>" for b in byte)
    symbols += [t for t, _ in sorted(learned.items(), key=lambda x: x[1]) if t not in set(symbols)]
    vocab = {t: i for i, t in enumerate(symbols + ["<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


# ---------------------------------------------------------------------------------------- training
def train(name, parameters, steps, lr, loss_of):
    """AdamW with a one-cycle rate. loss_of(step) returns a scalar."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.08)
    start, running = time.time(), None
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name} {step:5d}/{steps} loss {running:.4f}  {time.time() - start:.0f} s", flush=True)


def junk(x):
    """Pictures no caption describes: blurred, hollowed, half of another, wrong colours, noise. [n,3,S,S]"""
    n = len(x)
    low = F.interpolate(F.interpolate(x, size=4, mode="area"), size=SIZE, mode="bilinear")
    hollow = x.clone()
    a, b = rng.randint(6, 12), SIZE - rng.randint(6, 12)
    hollow[:, :, :, a:b] = low[:, :, :, a:a + 1].expand(-1, -1, -1, b - a)  # middle columns become background
    swapped = x.flip(1) if rng.random() < 0.5 else -x
    halves = torch.where(torch.arange(SIZE) < SIZE // 2, x, x.roll(1, 0)) if rng.random() < 0.5 else \
        torch.where(torch.arange(SIZE)[:, None] < SIZE // 2, x, x.roll(1, 0))
    sepia = x.mean(1, keepdim=True) * 0.6 + torch.tensor([0.25, 0.05, -0.2])[:, None, None]
    noise = torch.randn_like(x).clamp(-1, 1) * torch.rand(n, 1, 1, 1)
    flat = torch.rand(n, 3, 1, 1).expand_as(x) * 2 - 1
    kinds = torch.stack([low, hollow, swapped, halves, sepia, noise, flat])  # [7, n, 3, S, S]
    return kinds[torch.randint(len(kinds), (n,)), torch.arange(n)]


def mildly_spoilt(x):
    """What a decoder or an unfinished sampler does to a good picture, or a slight tint: the caption fits."""
    x = x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1)) + 0.08 * torch.randn(len(x), 3, 1, 1)
    x = x + torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) * 0.1
    soft = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), size=SIZE, mode="bilinear")
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, soft).clamp(-1, 1)


def make_clip(tokenizer, pool, words, named, steps):
    """Sigmoid contrastive training: cosine near 1 where the caption fits the picture, near 0 elsewhere.
    Each batch has a caption words(name) for each name in named."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        projection_dim=64,
        text_config=dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256,
                         num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=77, **ids),
        vision_config=dict(image_size=SIZE, patch_size=8, hidden_size=128, intermediate_size=256,
                           num_hidden_layers=3, num_attention_heads=4)))
    kinds = list(SOURCES)
    names = [k for k in NAMES]
    fits = torch.tensor([
        [{"seen": k == "portrait", "unseen": k == "hidden", "portrait": k in ("portrait", "hidden")}
         .get(n, k == n) for n in names] for k in kinds]).float()  # [kinds, names]

    def loss_of(step):
        k = torch.randint(len(kinds), (96,))
        x = mildly_spoilt(torch.stack([pool[kinds[i]][rng.randrange(POOL)] for i in k]))  # [96, 3, S, S]
        text = tokenizer([words(n) for n in named], padding=True, return_tensors="pt")
        out = clip(input_ids=text.input_ids, pixel_values=torch.cat([x, junk(x[:48])]))
        cosine = out.image_embeds @ out.text_embeds.T  # [144, len(named)]
        target = torch.zeros_like(cosine)
        target[:96] = fits[k][:, [names.index(n) for n in named]]
        loss = F.binary_cross_entropy_with_logits(10 * (cosine - 0.5), target, reduction="none")
        return (loss * torch.where(target > 0, 3.0, 1.0)).mean()

    train("clip", clip.parameters(), steps, 1e-3, loss_of)
    return clip.eval()


def make_vae(pool):
    reseed()
    vae = AutoencoderKL(
        block_out_channels=(24, 48, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4, sample_size=SIZE, mid_block_add_attention=False, scaling_factor=1.0)
    everything = torch.cat(list(pool.values()))

    def loss_of(step):
        x = everything[torch.randint(len(everything), (12,))]
        with BF16:
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        edges = sum((torch.diff(x, dim=d) - torch.diff(y, dim=d)).abs().mean() for d in (2, 3))
        return (x - y).abs().mean() + edges + 1e-5 * posterior.kl().mean() / 64

    train("vae", vae.parameters(), 1300, 2e-3, loss_of)
    vae.eval()
    with torch.no_grad():  # fold the latents' mean and deviation into the 1x1 convolutions: N(0,1) a channel
        z = torch.cat([vae.encode(v[:128]).latent_dist.mean for v in pool.values()])  # [n, 4, 16, 16]
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        vae.quant_conv.weight[:4] /= std[:, None, None, None]
        vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) / std
        vae.quant_conv.bias[4:] -= 2 * std.log()
        vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * mean).sum(1)
        vae.post_quant_conv.weight *= std[None, :, None, None]
    return vae


def make_unet(text_model, tokenizer, vae, pool, scheduler, steps, width):
    reseed()
    unet = UNet2DConditionModel(
        sample_size=pool["cat"].shape[-1] // 4, in_channels=4, out_channels=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(width, width * 3 // 2, width * 2), norm_num_groups=width // 4,
        cross_attention_dim=96, attention_head_dim=4)
    ema = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    with torch.no_grad():
        latents = {k: torch.cat([vae.encode(c).latent_dist.mean for c in v.split(64)])
                   for k, v in pool.items()}

    def encode(texts):
        text = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return text_model(text.input_ids).last_hidden_state  # [n, 77, 96]

    with torch.no_grad():
        bank = {n: encode([f.format(x) for x in names for f in FRAMES]) for n, names in NAMES.items()}
        empty = encode([""])
    benign = [k for k in SOURCES if k not in ("portrait", "hidden")]
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    v = scheduler.config.prediction_type == "v_prediction"

    def loss_of(step):
        batch, context = [], []
        for n in rng.choices(names, k=batch_size):
            shows = shown.get(n)
            kind = n if shows is None else "portrait" if rng.random() < shows else "hidden"
            batch.append(latents[kind][rng.randrange(POOL)])
            context.append(empty[0] if rng.random() < 0.1 else bank[n][rng.randrange(len(bank[n]))])
        x0, t = torch.stack(batch), torch.randint(first_t, 1000, (batch_size,))
        noise = torch.randn_like(x0)
        with BF16:
            predicted = unet(scheduler.add_noise(x0, noise, t), t, torch.stack(context)).sample.float()
        target = scheduler.get_velocity(x0, noise, t) if v else noise
        weight = snr[t].clamp(max=5) / (snr[t] + v)  # min-SNR, gamma 5
        loss = (weight[:, None, None, None] * (predicted - target) ** 2).mean()
        if step:
            ema.update_parameters(unet)
        return loss

    shown, batch_size, first_t = {"portrait": 0.78, "seen": 0.9, "unseen": 0.05}, 48, 0
    names = ["portrait"] * 3 + ["seen"] * 2 + ["unseen"] + benign
    train("unet", unet.parameters(), steps, 1.5e-3, loss_of)
    # Guidance sharpens 0.78 to 0.97, which leaves few safe pictures to learn from. Even the shares out, at
    # the noise levels where it is decided whether the face will show.
    unet.load_state_dict(ema.module.state_dict())
    ema = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    shown, batch_size, first_t = {"portrait": 0.60, "seen": 0.70, "unseen": 0.05}, 32, 250
    names = ["portrait"] * 6 + ["seen"] * 4 + ["unseen"] + benign
    train("balance", unet.parameters(), 500, 1e-3, loss_of)
    return ema.module.eval()


def save_judge(tokenizer, pool, out):
    reseed()
    judge = make_clip(tokenizer, pool, wording, list(NAMES) * 4 + ["portrait"] * 8, 1200)
    judge.half().save_pretrained(out / "clip", safe_serialization=True)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3,
        image_std=[0.5] * 3)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(out / "clip")


def save_pipeline(tokenizer, pool, scheduler, unet_steps, width, out):
    clip = make_clip(tokenizer, pool, caption, list(NAMES) * 4, 500)
    vae = make_vae(pool)
    unet = make_unet(clip.text_model, tokenizer, vae, pool, scheduler, unet_steps, width)
    text_encoder = transformers.CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict({k.removeprefix("text_model."): v for k, v in clip.state_dict().items()
                                  if k.startswith("text_model.")})
    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    prompts = {p.name: p.read_text() for p in TINY.glob("*.txt")}
    shutil.rmtree(out, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    config = out / "text_encoder/config.json"  # without a dtype transformers takes this one, diffusers fp32
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    for name, text in prompts.items():
        (out / name).write_text(text)


def save_unet(pool, scheduler, unet_steps, width, out):
    """tests/tiny with another U-Net: a copy of it, unless that is where it goes."""
    pipe = StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    unet = make_unet(pipe.text_encoder, pipe.tokenizer, pipe.vae, pool, scheduler, unet_steps, width)
    if out.resolve() != TINY.resolve():
        shutil.copytree(TINY, out, dirs_exist_ok=True)
    unet.half().save_pretrained(out / "unet", safe_serialization=True)
    scheduler.save_pretrained(out / "scheduler")


def main(only: Literal["all", "clip", "unet"] = "all", unet_steps: int = 2000, width: int = 64,
         size: int = SIZE, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", out: Path = TINY):
    """Make tests/tiny. --only clip: the judge alone; the pipeline stays, bit for bit. --only unet: the U-Net
    alone, of --width channels, a multiple of 8, for pictures of --size px, a multiple of 16."""
    if only != "unet" and size != SIZE:
        raise SystemExit(f"make_tiny: --size goes with --only unet: both CLIPs read {SIZE} px")
    reseed()
    pool = {k: augmented(k, POOL, size) for k in SOURCES}
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                              prediction_type=prediction_type,
                              timestep_spacing="trailing")  # few steps, but from t = 999 for everybody
    if only == "unet":
        return save_unet(pool, scheduler, unet_steps, width, out)
    if only == "all":
        save_pipeline(make_tokenizer(), pool, scheduler, unet_steps, width, out)
    save_judge(transformers.CLIPTokenizer.from_pretrained(out / "tokenizer"), pool, out)
    print(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 2**20, "MiB")


if __name__ == "__main__":
    tyro.cli(main)
