"""CLIP through transformers: a small model with random weights, saved and read back as a user's folder is."""

import json

import pytest
import torch

from dist_t2i.errors import UserError
from dist_t2i.eval import metrics
from dist_t2i.eval.judges import clip, features
from pictures import shapes

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "</s>", "?", "a", "red", "blue", "square", "disc"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    folder = tmp_path_factory.mktemp("clip")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="?", pad_token="</s>"
    ).save_pretrained(folder)
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shared, "vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**shared, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_pictures_and_texts_are_clips(folder):
    """Compared with the whole model's own forward pass on the same pixels and tokens."""
    judge = features.load_features("clip", "cpu", str(folder))
    images, texts = shapes(5), ["a red square", "a blue disc", "disc", "a a a a a a a a a a a a a a", "green"]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    pixels = (images.float() / 255 - torch.tensor(clip._MEAN).view(3, 1, 1)) / torch.tensor(clip._STD).view(3, 1, 1)
    with torch.no_grad():
        whole = model(pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    ours = metrics.unit(judge(images)) @ metrics.unit(judge.embed_texts(texts)).T
    theirs = whole.image_embeds.double() @ whole.text_embeds.double().T
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert judge(images).shape == judge.embed_texts(texts).shape == (5, 16)
    assert judge.embed_texts([]).shape == (0, 16)
    assert torch.allclose(judge.embed_texts(texts[:1]), judge.embed_texts(texts)[:1], atol=1e-6)


def test_unknown_weights_have_no_published_name(folder, monkeypatch):
    judge = features.load_features("clip", "cpu", str(folder))
    assert judge.called("clip-score").startswith("picture-caption cosine x 100 (a CLIP network, weights sha256 ")
    monkeypatch.setattr(clip, "file_sha256", lambda path: next(iter(clip.KNOWN)))
    judge = features.load_features("clip", "cpu", str(folder))
    assert judge.called("clip-score") == "CLIP score (CLIP ViT-B/32 of OpenAI)"


def test_mistakes_say_what_to_do(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"no")
    (broken / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "empty").mkdir()
    for source, said in (
        (str(tmp_path / "none"), "is neither a folder"),
        (str(tmp_path / "empty"), "no model.safetensors or pytorch_model.bin"),
        (str(broken), "not a CLIP model"),
        ("nobody/nothing-at-all", "cannot be downloaded from the Hugging Face hub"),
    ):
        with pytest.raises(UserError) as raised:
            features.load_features("clip", "cpu", source)
        assert (
            said in str(raised.value) and "--weights clip=FOLDER" in str(raised.value) and "\n" not in str(raised.value)
        )
