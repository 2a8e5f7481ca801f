"""Using a model: pictures do not depend on the batch, warnings and errors are clear, and all text modes work."""

import io
import json
import warnings
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dist_t2i
from dist_t2i.data.tokenizer import train_tokenizer
from dist_t2i.errors import UserError
from dist_t2i.inference.pipeline import PromptError, PromptWarning, UnknownWordsWarning
from dist_t2i.publish.export import export
from models_on_disk import CAPTIONS, write_run

PROMPTS = list(CAPTIONS[:5])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "dual")


@pytest.fixture(scope="module")
def model(run):
    return dist_t2i.load(run, "cpu")


def data(image):
    return image.tobytes()


def mode_run(tmp_path, mode):
    """A run with this text.mode. A frozen encoder is a table, or the S_D of an exported model."""
    if mode == "table":
        vectors = torch.randn(len(CAPTIONS), 16)
        save_file({"vectors": vectors}, tmp_path / "t.safetensors", metadata={"captions": json.dumps(CAPTIONS)})
        return write_run(tmp_path / "run", "text.mode=frozen", f"text.frozen={tmp_path / 't.safetensors'}")
    if mode == "encoder":
        source = export(write_run(tmp_path / "source", seed=5), tmp_path / "given")
        return write_run(tmp_path / "run", "text.mode=frozen", f"text.frozen={source}")
    return write_run(tmp_path / "run", f"text.mode={mode}")


def test_a_picture_is_the_same_whatever_the_batch(model):
    together = model.generate(PROMPTS, seed=7, images_per_prompt=3)
    assert len(together) == 15 and together[0].size == (32, 32) and together[0].mode == "RGB"
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate([prompt], seed=7, images_per_prompt=3)
        assert [data(a) for a in alone] == [data(t) for t in together[3 * i : 3 * i + 3]]
        assert data(model.generate([prompt], seed=7)[0]) == data(together[3 * i])
    backwards = model.generate(PROMPTS[::-1], seed=7)
    assert [data(b) for b in backwards] == [data(t) for t in together[::3]][::-1]


def test_padded_chunks_as_on_a_gpu_give_the_same_picture_too(run):
    model = dist_t2i.load(run, "cpu")
    model._chunk = 4
    many = model.generate(PROMPTS * 2, seed=1, images_per_prompt=3)
    few = model.generate(PROMPTS[:1], seed=1, images_per_prompt=3)
    assert [data(a) for a in many[:3]] == [data(b) for b in few]
    assert [data(a) for a in many[15:18]] == [data(b) for b in few]


def test_seed_index_and_prompt_all_matter(model):
    pictures = model.generate(PROMPTS[:2], seed=0, images_per_prompt=2) + model.generate(PROMPTS[:2], seed=1)
    assert len({data(picture) for picture in pictures}) == 6
    assert data(model.generate(PROMPTS[:1], seed=-3)[0]) != data(pictures[0])


def test_no_noise_is_the_same_for_every_seed(model):
    first, second = (model.generate(PROMPTS[:1], seed=seed, truncation=0.0)[0] for seed in (0, 1))
    assert data(first) == data(second)


@pytest.mark.parametrize("mode", ["dual", "shared", "table", "encoder"])
def test_every_text_mode_loads_from_a_run_and_from_its_export(tmp_path, mode):
    run = mode_run(tmp_path, mode)
    loaded = [dist_t2i.load(run, "cpu"), dist_t2i.load(export(run, tmp_path / "export"), "cpu")]
    pictures = [model.generate(PROMPTS, seed=2) for model in loaded]
    assert [data(p) for p in pictures[0]] == [data(p) for p in pictures[1]]
    scores = [model.score(pictures[0], PROMPTS) for model in loaded]
    assert torch.equal(*scores) and scores[0].shape == (5, 5) and scores[0].abs().max() <= 1.0001
    g, d = (loaded[1].embed_text(PROMPTS, which=which) for which in ("g", "d"))
    assert g.dtype == torch.float32 and g.shape == (5, 16)
    assert torch.equal(g, d) == (mode in ("table", "encoder"))
    assert loaded[0].images_seen == loaded[1].images_seen == 64


ATTN = ["model.generator=attn", "model.generator.attn.scales=4,8", "model.discriminator.words=4"]


def test_a_generator_that_attends_to_words_does_all_that_the_other_does(tmp_path):
    run = write_run(tmp_path / "run", *ATTN)
    loaded = [dist_t2i.load(run, "cpu"), dist_t2i.load(export(run, tmp_path / "export"), "cpu")]
    together = [model.generate(PROMPTS, seed=2, images_per_prompt=2) for model in loaded]
    assert [data(p) for p in together[0]] == [data(p) for p in together[1]]
    scores = [model.score(together[0], PROMPTS) for model in loaded]
    assert torch.equal(*scores) and scores[0].shape == (10, 5)
    for model, chunk in zip(loaded, (1, 4), strict=True):  # padded chunks, as on a GPU
        model._chunk = chunk
        together = [data(p) for p in model.generate(PROMPTS, seed=2, images_per_prompt=2)]
        for i, prompt in enumerate(PROMPTS):
            alone = model.generate([prompt], seed=2, images_per_prompt=2)
            assert [data(p) for p in alone] == together[2 * i : 2 * i + 2]


def test_frozen_encoder_is_the_sources_s_d(tmp_path):
    model = dist_t2i.load(mode_run(tmp_path, "encoder"), "cpu")
    source = dist_t2i.load(tmp_path / "given", "cpu")
    assert torch.equal(model.embed_text(PROMPTS), source.embed_text(PROMPTS, which="d"))


def test_frozen_sources_that_do_not_fit(tmp_path):
    save_file({"vectors": torch.randn(3, 16)}, tmp_path / "bare.safetensors")
    for source, said in (("bare.safetensors", "captions"), ("nowhere", "neither"), ("none.safetensors", "missing")):
        with pytest.raises(UserError, match=said):
            write_run(tmp_path / "run", "text.mode=frozen", f"text.frozen={tmp_path / source}")


def test_a_table_gives_captions_their_vectors(tmp_path):
    model = dist_t2i.load(mode_run(tmp_path, "table"), "cpu")
    table = model.files.frozen.tensors["vectors"]
    assert torch.equal(model.embed_text([CAPTIONS[3]])[0], table[3])
    assert torch.allclose(model.embed_text(["something else"])[0], table.mean(0))


@pytest.mark.parametrize(
    ("prompt", "named"), [("a blorp apple", "'blorp'"), ("🦄", "🦄"), ("красное яблоко", "яблоко"), ("苹果", "苹果")]
)
def test_words_never_seen_are_named_and_there_is_a_picture(model, prompt, named):
    with pytest.warns(UnknownWordsWarning, match=named):
        (picture,) = model.generate([prompt])
    assert picture.size == (32, 32)


def test_what_no_encoding_can_hold_is_no_reason_to_stop(model):
    assert len(model.generate(["\ud800 red apple"])) == 1


def test_empty_and_overlong_prompts(model):
    with pytest.warns(PromptWarning, match="empty"):
        assert len(model.generate(["", "   "])) == 2
    with pytest.warns(PromptWarning, match="cut after 12 tokens"):
        model.generate([" ".join(["red apple"] * 50)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(["red apple"])
        assert model.generate([]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": "red apple"}, r"write \['red apple'\]"),
        ({"prompts": None}, "list of texts"),
        ({"prompts": ["red apple", 3]}, r"prompts\[1\]"),
        ({"prompts": ["a"], "images_per_prompt": 0}, "images_per_prompt"),
        ({"prompts": ["a"], "seed": 1.5}, "seed"),
        ({"prompts": ["a"], "seed": True}, "seed"),
        ({"prompts": ["a"], "truncation": -1}, "truncation"),
        ({"prompts": ["a"], "truncation": float("nan")}, "truncation"),
    ],
)
def test_arguments_of_the_wrong_kind(model, arguments, said):
    with pytest.raises(PromptError, match=said):
        model.generate(**arguments)


def test_embed_text_rows_do_not_depend_on_the_others(model):
    together = model.embed_text(PROMPTS, which="d")
    assert all(torch.equal(model.embed_text([p], which="d")[0], row) for p, row in zip(PROMPTS, together, strict=True))
    assert model.embed_text([]).shape == (0, 16)
    with pytest.raises(PromptError, match="which"):
        model.embed_text(PROMPTS, which="s")


def test_images_of_every_kind_can_be_embedded(model):
    pictures = [
        Image.new("RGB", (32, 32), "red"),
        Image.new("L", (100, 50)),
        Image.new("RGBA", (20, 40), (255, 0, 0, 0)),
        Image.new("P", (64, 64)),
        Image.new("CMYK", (31, 33)),
        Image.new("1", (200, 10)),
    ]
    vectors = model.embed_image(pictures)
    assert vectors.shape == (6, 16) and torch.allclose(vectors.norm(dim=1), torch.ones(6), atol=1e-5)
    assert torch.equal(model.embed_image([pictures[2]])[0], vectors[2])
    white = model.embed_image([Image.new("RGB", (32, 32), "white")])
    assert torch.equal(white[0], vectors[2])
    assert model.score(pictures, PROMPTS).shape == (6, 5)
    assert model.score([], PROMPTS).shape == (0, 5) and model.score(pictures, []).shape == (6, 0)


def test_images_that_cannot_be_used(model):
    broken = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(broken, "PNG")
    cut = Image.open(io.BytesIO(broken.getvalue()[: len(broken.getvalue()) // 2]))
    for wrong, said in (("a.png", "list of PIL"), ([b"png"], r"images\[0\]"), ([cut], r"images\[0\]")):
        with pytest.raises(PromptError, match=said):
            model.embed_image(wrong)


def test_nothing_to_load(tmp_path, run):
    with pytest.raises(UserError, match="does not exist"):
        dist_t2i.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run"):
        dist_t2i.load(tmp_path)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        dist_t2i.load(tmp_path)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    run = write_run(tmp_path / "run", images=64)
    write_run(run, images=128, seed=1)
    weights = run / "checkpoints" / "images-000000128" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=r"ema\.safetensors"):
        assert dist_t2i.load(run).images_seen == 64


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    train_tokenizer(Counter(["other words", *CAPTIONS] * 3)).save(run / "tokenizer.json")
    with pytest.raises(UserError, match=r"text_g\.embedding\.weight"):
        dist_t2i.load(run)
