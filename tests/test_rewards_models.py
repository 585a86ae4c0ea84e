"""The rewards with models of transformers, against the definition, on small random models that are saved and loaded."""

import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerModel,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rewards
from rewards import RewardError, get_reward

PROMPTS = ["a red car", "a dog", "two blue buses", "nothing at all", "a cat on a mat", "a dog and a cat", "snow"]


def pictures(count=7, height=40, width=56, seed=0):
    """Random blocks of colour, (B, 3, H, W): pictures that differ in more than noise."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(small, (height, width), mode="nearest")


def pil(image):
    return Image.fromarray((image.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8))


@pytest.fixture(autouse=True)
def nothing_loaded():
    rewards.LOADED.clear()
    rewards._cut.clear()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP of 32-pixel images and 768-dimensional embeddings, as L/14's are, with tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("clip")
    characters = [chr(code) for code in range(33, 127)]
    vocab = {token: n for n, token in enumerate(characters + [c + "</w>" for c in characters])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    text = dict(vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1)  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    for parameter in model.parameters():  # larger than the usual start, so that scores differ
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.logit_scale.data.fill_(3.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def clip_parts(folder):
    model = CLIPModel.from_pretrained(folder).eval()
    return model, CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)


def naive_logits(folder, image, prompt):
    """The model's own logit of one image and one prompt, and its logit scale."""
    model, tokenizer, processor = clip_parts(folder)
    ids = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(pil(image), return_tensors="pt")["pixel_values"]
        return model(**ids, pixel_values=pixels).logits_per_image.item(), model.logit_scale.exp().item()


# ---------------------------------------------------------------- clipscore, pickscore


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (96, 33)])
def test_clipscore_is_the_cosine_of_pairs(clip_folder, size):
    images = pictures(7, *size)
    scores, _ = get_reward(f"clipscore:{clip_folder}")(images, PROMPTS)
    naive = [logit / scale for logit, scale in (naive_logits(clip_folder, i, p) for i, p in zip(images, PROMPTS))]
    assert scores.tolist() == pytest.approx(naive, abs=1e-5)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert scores.std() > 0.01 and scores.abs().max() <= 1


def test_pickscore_is_the_logit_over_26(clip_folder):
    images = pictures()
    scores, _ = get_reward(f"pickscore:{clip_folder}")(images, PROMPTS)
    naive = [naive_logits(clip_folder, image, prompt)[0] / 26 for image, prompt in zip(images, PROMPTS)]
    assert scores.tolist() == pytest.approx(naive, abs=1e-5)


def test_batches_of_one_and_of_seven_agree(clip_folder):
    images, longer = pictures(), [*PROMPTS[:-1], "a much longer prompt than the others have"]
    together = rewards.clipscore(images, longer, clip_folder)
    alone = torch.cat([rewards.clipscore(images[n : n + 1], longer[n : n + 1], clip_folder) for n in range(7)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, rewards.clipscore(images, longer, clip_folder, batch=3), atol=1e-5)
    assert torch.allclose(together, get_reward(f"clipscore:{clip_folder}?batch=2")(images, longer)[0], atol=1e-5)


def test_scores_follow_their_pairs(clip_folder):
    images, order = pictures(), torch.tensor([3, 0, 6, 5, 1, 2, 4])
    scores = rewards.clipscore(images, PROMPTS, clip_folder)
    moved = rewards.clipscore(images[order], [PROMPTS[n] for n in order], clip_folder)
    assert torch.allclose(moved, scores[order], atol=1e-5)
    assert not torch.allclose(rewards.clipscore(images[order], PROMPTS, clip_folder), scores, atol=1e-3)


def test_long_prompts_are_cut_and_that_is_said_once(clip_folder):
    images, long = pictures(2), "word " * 60
    with pytest.warns(UserWarning, match="more than 77 tokens are cut"):
        scores = rewards.clipscore(images, [long, "a dog"], clip_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards.clipscore(images, [long, "a dog"], clip_folder)
    model, scale = naive_logits(clip_folder, images[0], long)
    assert scores[0].item() == pytest.approx(model / scale, abs=1e-5)
    other_end = rewards.clipscore(images, [long + "and another end", "a dog"], clip_folder)
    assert torch.allclose(scores, other_end, atol=1e-6)


def test_rewards_share_a_model_and_leave_the_images_alone(clip_folder):
    images = pictures()
    before = images.clone()
    reward = get_reward(f"clipscore:{clip_folder}=0.5,pickscore:{clip_folder}=0.5", offload=True)
    total, parts = reward(images, PROMPTS)
    assert len(rewards.LOADED) == 1 and torch.equal(images, before)
    assert torch.equal(reward(images, PROMPTS)[0], total)
    assert torch.allclose(parts[f"pickscore:{clip_folder}"], parts[f"clipscore:{clip_folder}"] * np.exp(3.3) / 26)
    ((module, *_),) = rewards.LOADED.values()
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_nothing_is_loaded_before_the_first_use(clip_folder):
    get_reward(f"clipscore:{clip_folder}").check(PROMPTS)
    assert not rewards.LOADED


# ---------------------------------------------------------------- aesthetic

LAYERS = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def aesthetic_weights():
    torch.manual_seed(1)
    weights = {f"layers.{n}.weight": torch.randn(shape) / shape[1] ** 0.5 for n, shape in LAYERS.items()}
    return weights | {f"layers.{n}.bias": torch.randn(shape[0]) for n, shape in LAYERS.items()}


@pytest.mark.parametrize("form", ["pth", "safetensors", "file", "with clip"])
def test_aesthetic_is_the_network_on_the_normalised_embedding(clip_folder, tmp_path, form):
    weights = aesthetic_weights()
    if form == "safetensors":
        save_file(weights, tmp_path / "predictor.safetensors")
    else:
        torch.save(weights, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    source = tmp_path / "sac+logos+ava1-l14-linearMSE.pth" if form == "file" else tmp_path
    if form == "with clip":
        for file in Path(clip_folder).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        scores, _ = get_reward(f"aesthetic:{source}")(pictures(), PROMPTS)
    else:
        scores, _ = get_reward(f"aesthetic:{source}?clip={clip_folder}")(pictures(), PROMPTS)
    model, _, processor = clip_parts(clip_folder)
    for image, score in zip(pictures(), scores):
        with torch.no_grad():
            vision = model.vision_model(processor(pil(image), return_tensors="pt")["pixel_values"])
        x = model.visual_projection.weight.detach().numpy() @ vision.pooler_output[0].numpy()
        x = x / np.sqrt((x**2).sum())
        for n in LAYERS:
            x = weights[f"layers.{n}.weight"].numpy() @ x + weights[f"layers.{n}.bias"].numpy()
        assert score.item() == pytest.approx(float(x[0]), abs=1e-4)
    assert scores.std() > 1e-3


def test_aesthetic_weights_of_another_network_or_with_code_are_refused(clip_folder, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(3, 768)}, tmp_path / "weights.pth")
    reward = get_reward(f"aesthetic:{tmp_path}?clip={clip_folder}")
    for use in (reward.load, lambda: reward(pictures(), PROMPTS)):
        with pytest.raises(RewardError, match=r"the reward aesthetic.*768-1024-128-64-16-1") as error:
            use()
        assert error.value.exit_status == 2
    torch.save({"layers.0.weight": types.SimpleNamespace(harm=True)}, tmp_path / "weights.pth")
    with pytest.raises(RewardError, match="cannot be loaded as the aesthetic predictor"):
        reward.load()
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(RewardError, match="has 2 files"):
        reward.load()


# ---------------------------------------------------------------- wrong folders


def test_a_folder_that_is_no_such_model(clip_folder, detector_folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # and no weights
    (tmp_path / "empty").mkdir()
    for spec, told in [
        (f"geneval:{clip_folder}?clip={clip_folder}", "cannot be loaded as a Mask2Former"),
        (f"geneval:{detector_folder}?clip={detector_folder}", "cannot be loaded as a CLIP model"),
        (f"pickscore:{detector_folder}", "cannot be loaded as a CLIP model"),
        (f"clipscore:{tmp_path}", "cannot be loaded as a CLIP model"),
        (f"clipscore:{tmp_path}/empty", "cannot be loaded as a CLIP model"),
        (f"aesthetic:{clip_folder}", "has 0 files"),
        (f"aesthetic:{tmp_path}/empty?clip={clip_folder}", "has 0 files"),
    ]:
        reward = get_reward(f"jpeg_compressibility,{spec}")
        reward.check(["a photo of a dog"])
        with pytest.raises(RewardError, match=rf"^the reward {re.split(':', spec)[0]}.*{told}") as error:
            reward.load()
        assert error.value.exit_status == 2


def test_load_loads_all_that_is_used(clip_folder, detector_folder, monkeypatch):
    """After load() nothing is loaded any more; and what a sum's parts share is loaded once."""
    names = [
        f"clipscore:{clip_folder}",
        f"geneval:{detector_folder}?clip={clip_folder}&size=64",
        "jpeg_compressibility",
    ]
    reward = get_reward(",".join(names))
    reward.load()
    assert sorted(key[0] for key in rewards.LOADED) == ["load_clip", "load_detector"]
    monkeypatch.setattr(rewards, "load_pretrained", None)
    reward.load()
    reward(pictures(1), ["a photo of a red dog"])


def test_weights_that_lack_a_part_are_refused_not_made_up(clip_folder, tmp_path):
    for file in Path(clip_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"no weights for text_projection.weight"):
        get_reward(f"clipscore:{tmp_path}")(pictures(), PROMPTS)


def test_a_model_without_its_tokenizer(clip_folder, tmp_path):
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((Path(clip_folder) / name).read_bytes())
    with pytest.raises(RewardError, match="has no tokenizer of a CLIP model"):
        get_reward(f"clipscore:{tmp_path}")(pictures(), PROMPTS)


def test_a_repository_out_of_reach_is_told_before_anything_is_loaded(monkeypatch, clip_folder):
    import huggingface_hub

    def model_info(self, repo, timeout):
        asked.append(repo)
        raise OSError("no route to host")

    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda source, file: None)
    laion = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    asked_for = [
        ("pickscore", [rewards.PICKSCORE, laion]),
        ("clipscore:some/repository?batch=2", ["some/repository"]),
        (f"aesthetic?clip={clip_folder}", [rewards.AESTHETIC]),
        ("aesthetic", [rewards.AESTHETIC, rewards.CLIP]),
        ("geneval", [rewards.DETECTOR, rewards.CLIP]),
        ("geneval_graded?clip=another/clip", [rewards.DETECTOR, "another/clip"]),
        ("hpsv2", ["xswu/HPSv2"]),
        ("hpsv3", ["MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"]),
    ]
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda module: True)
    for name, sources in asked_for:
        for n, source in enumerate(sources):  # the first one is missing; then all but the first are
            asked = []
            there = sources[:n]
            monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda s, f: "f" if s in there else None)  # noqa: B023
            with pytest.raises(RewardError, match=rf"needs {source}.* cannot be fetched.*no route to host") as error:
                get_reward(name).check(["a photo of a dog"])
            assert error.value.exit_status == 2 and asked == [source]
    asked = []
    get_reward(f"clipscore:{clip_folder}").check(["a photo of a dog"])
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda source, file: "/cache/config.json")
    get_reward("pickscore").check(["a dog"])
    assert not asked


# ---------------------------------------------------------------- geneval, end to end


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    """A Mask2Former of 80 classes whose random head is sure of itself, so that some scores are over the thresholds."""
    folder = tmp_path_factory.mktemp("detector")
    swin = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12, num_labels=80,
    )  # fmt: skip
    torch.manual_seed(2)
    model = Mask2FormerModel(config)
    for parameter in model.transformer_module.decoder.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn_like(parameter) * 0.3
    weights = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    weights |= {"class_predictor.weight": torch.randn(81, 32) * 3, "class_predictor.bias": torch.zeros(81)}
    weights["criterion.empty_weight"] = torch.ones(81)  # transformers saves its loss as well
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["Mask2FormerForUniversalSegmentation"]
    config.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return str(folder)


def detector_outputs(folder, image):
    """Class logits (Q, 81) and mask logits (Q, h, w) of one image, put together by hand."""
    weights = load_file(Path(folder) / "model.safetensors")
    model = Mask2FormerModel(Mask2FormerConfig.from_pretrained(folder)).eval()
    model.load_state_dict({name[6:]: value for name, value in weights.items() if name.startswith("model.")})
    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        pixels = processor(pil(image), return_tensors="pt")["pixel_values"]
        outputs = model(pixel_values=pixels, output_hidden_states=True)
    queries = outputs.transformer_decoder_intermediate_states[-1][:, 0]  # (Q, 32)
    return queries @ weights["class_predictor.weight"].T, outputs.masks_queries_logits[-1][0]


def naive_instances(class_logits, mask_logits, size, limit=100):
    """(class, score, box, mask) of every query and class, by the definition, in loops."""
    candidates = []
    for query in range(len(class_logits)):
        exp = np.exp(class_logits[query].double().numpy() - class_logits[query].max().item())
        candidates += [(p, query, label) for label, p in enumerate((exp / exp.sum())[:-1])]
    found = []
    for p, query, label in sorted(candidates, reverse=True)[:limit]:
        logits = torch.nn.functional.interpolate(mask_logits[query][None, None], size, mode="bilinear")[0, 0].numpy()
        inside = [(y, x) for y in range(size[0]) for x in range(size[1]) if logits[y, x] > 0]
        if inside:
            score = p * np.mean([1 / (1 + np.exp(-logits[y, x])) for y, x in inside])
            ys, xs = [y for y, _ in inside], [x for _, x in inside]
            if score > 0.3:
                found.append((rewards.COCO[label], score, (min(xs), min(ys), max(xs) + 1, max(ys) + 1), len(inside)))
    return found


def test_instances_are_those_of_the_definition(detector_folder):
    total = 0
    for image in pictures(4):
        outputs = detector_outputs(detector_folder, image)
        found, naive = rewards.instances(*outputs, (40, 56)), naive_instances(*outputs, (40, 56))
        assert [(f.name, f.box, int(f.mask.sum())) for f in found] == [(n[0], n[2], n[3]) for n in naive]
        assert [f.score for f in found] == pytest.approx([n[1] for n in naive], abs=1e-4)
        total += len(found)
    assert total > 8


def test_the_detector_is_that_of_transformers(detector_folder):
    pytest.importorskip("scipy")  # its class cannot be made without
    from transformers import Mask2FormerForUniversalSegmentation

    theirs, info = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder, output_loading_info=True)
    assert not info["missing_keys"]
    ours, processor = rewards.load_detector(detector_folder, device="cpu")
    inputs = processor([pil(image) for image in pictures(3)], return_tensors="pt")
    with torch.no_grad():
        outputs, (classes, masks) = theirs.eval()(**inputs), ours(inputs["pixel_values"])
    assert torch.allclose(outputs.class_queries_logits, classes, atol=1e-4)
    assert torch.allclose(outputs.masks_queries_logits, masks, atol=1e-4)
    results = processor.post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(40, 56)] * 3, return_binary_maps=True
    )
    for result, *logits in zip(results, classes, masks):  # theirs resize masks otherwise, and take fewer candidates
        found = {(f.name, round(f.score, 1)) for f in rewards.instances(*logits, (40, 56)) if f.score > 0.4}
        their = [(rewards.COCO[segment["label_id"]], segment["score"]) for segment in result["segments_info"]]
        assert found <= {(name, round(score + d, 1)) for name, score in their for d in (-0.05, 0, 0.05)}


def test_geneval_end_to_end(clip_folder, detector_folder):
    images = pictures()
    found = []
    for image in images:
        found.append(naive_instances(*detector_outputs(detector_folder, image), (40, 56)))
    assert all(found)
    there = [things[0][0] for things in found]
    absent = next(name for name in rewards.COCO if all(name != t[0] for things in found for t in things))
    reward = get_reward(f"geneval:{detector_folder}?clip={clip_folder}&size=64")
    graded = get_reward(f"geneval_graded:{detector_folder}?clip={clip_folder}&size=64")
    prompts = [f"a photo of a {name}" for name in there]
    reward.check(prompts)
    assert reward(images, prompts)[0].tolist() == [1] * 7
    counts = [sum(t[0] == name for t in things) for name, things in zip(there, found)]
    assert graded(images, prompts)[0].tolist() == pytest.approx([1 - abs(n - 1) for n in counts])
    assert reward(images, [f"a photo of a {absent}"] * 7)[0].tolist() == [0] * 7
    assert reward(images, [f"a photo of a {absent} and a {name}" for name in there if name != absent])[0].sum() == 0
    numbers = {2: "two", 3: "three", 4: "four"}
    sure = [sum(t[0] == name and t[1] > 0.9 for t in things) for name, things in zip(there, found)]
    prompts = [f"a photo of {numbers.get(n, 'two')} {name}s" for n, name in zip(sure, there)]
    assert reward(images, prompts)[0].tolist() == [float(n in numbers) for n in sure]
    # batches
    prompts = [f"a photo of a {name}" if n % 2 else f"a photo of a {absent}" for n, name in enumerate(there)]
    alone = [reward(images[n : n + 1], prompts[n : n + 1])[0].item() for n in range(7)]
    assert reward(images, prompts)[0].tolist() == alone == [0, 1, 0, 1, 0, 1, 0]


def test_colours_are_clips_on_the_object_cut_out(clip_folder, detector_folder):
    model, tokenizer, processor = clip_parts(clip_folder)
    image = pictures(1, seed=3)[0]
    mask = torch.zeros(40, 56, dtype=torch.bool)
    mask[5:30, 10:40] = True
    mask[5:10, 10:20] = False
    thing = rewards.Found("car", 0.9, (10, 5, 40, 30), mask)
    array = np.array(pil(image))
    for y in range(40):
        for x in range(56):
            if not mask[y, x]:
                array[y, x] = (0x99, 0x99, 0x99)
    with torch.no_grad():
        pixels = processor(Image.fromarray(array[5:30, 10:40]), return_tensors="pt")["pixel_values"]
        cut = model.get_image_features(pixel_values=pixels).pooler_output[0]
        scores = {}
        for colour in rewards.GENEVAL_COLOURS:
            mean = 0
            for text in (
                f"a photo of a {colour} car",
                f"a photo of a {colour}-colored car",
                f"a photo of a {colour} object",
            ):
                embedding = model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0]
                mean = mean + embedding / embedding.norm() / 3
            scores[colour] = (cut @ mean / mean.norm()).item()
    (coloured,) = rewards.find_colours(pil(image), [thing], *rewards.load_clip(clip_folder, device="cpu"))
    assert coloured.colour == max(scores, key=scores.get)
    # and in the reward: exactly one of ten colours is right
    name = naive_instances(*detector_outputs(detector_folder, image), (40, 56))[0][0]
    prompts = [f"a photo of a {colour} {name}" for colour in rewards.GENEVAL_COLOURS]
    reward = get_reward(f"geneval:{detector_folder}?clip={clip_folder}&size=64")
    assert reward(image.expand(10, -1, -1, -1), prompts)[0].sum() == 1


def test_a_detector_of_other_classes_is_refused(detector_folder, tmp_path):
    weights = load_file(Path(detector_folder) / "model.safetensors")
    weights |= {name: weights[name][:8].contiguous() for name in ("class_predictor.weight", "class_predictor.bias")}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = Mask2FormerConfig.from_pretrained(detector_folder)
    config.num_labels = 7
    config.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"for COCO's 80 classes: it has 7 classes"):
        get_reward(f"geneval:{tmp_path}")(pictures(1), ["a photo of a dog"])


# ---------------------------------------------------------------- half precision, and models out of the way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_work_in_half_precision(clip_folder, monkeypatch, dtype):
    """What happens on CUDA: the same code with half weights, on the CPU."""
    full = rewards.pickscore(pictures(), PROMPTS, clip_folder)
    rewards.LOADED.clear()
    monkeypatch.setattr(
        rewards, "frozen", lambda model, device, half=None: model.eval().requires_grad_(False).to(dtype)
    )
    half = rewards.pickscore(pictures(), PROMPTS, clip_folder)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert torch.allclose(half, full, atol=0.002 if dtype == torch.float16 else 0.03)


@pytest.mark.parametrize("offload", [False, True])
def test_offload_moves_models_to_the_cpu_after_use(clip_folder, monkeypatch, offload):
    reward = get_reward(f"clipscore:{clip_folder}", "cpu", offload)
    reward(pictures(), PROMPTS)
    places = []
    ((module, *_),) = rewards.LOADED.values()
    monkeypatch.setattr(module, "to", lambda place: places.append(place) or module)
    reward(pictures(), PROMPTS)
    assert len(places) == 1 + offload  # to where it computes, and back
